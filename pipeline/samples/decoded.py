"""What an input is once it is decoded: an image, the frames of a clip, a sweep."""

from __future__ import annotations

from PIL import Image

from pipeline.samples.points import Sweep

Clip = tuple[Image.Image, ...]
"""Upright RGB frames of one size, in order."""

Decoded = Image.Image | Clip | Sweep
