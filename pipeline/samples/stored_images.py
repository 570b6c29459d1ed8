"""Copies of images for a bank: the whole upright image, resized once, as JPEG.

Teachers look at the original, a student that has no shards at the copy; both see the
same part of the picture, since boxes are scaled with it. The bytes depend on the
image, the numbers below and the versions of Pillow and libjpeg-turbo alone.

Colours are kept at full resolution (4:4:4): on photographs quality 90 so takes 34 KB at
39.1 dB (worst image 30.3), while 4:2:0 takes 38 KB at 38.9 dB (worst image 25.4).
"""

from __future__ import annotations

import io
import itertools
import math
from dataclasses import dataclass

from PIL import Image

from pipeline.samples.views import Box

LOWEST_QUALITY = 30
_QUALITY_STEP = 5
# Of the JPEG format, less a margin that libjpeg keeps.
_MAX_SIDE = 65500
_HEADER_BYTES = 2048
_ROUND_BYTES = 256
# Bytes per pixel that one photograph in a hundred takes or exceeds, with a margin: of
# 100 photographs of 256 pixels the largest took 1.06 at quality 90.
_BYTES_PER_PIXEL = (
    (30, 0.25),
    (50, 0.35),
    (75, 0.6),
    (85, 0.85),
    (90, 1.1),
    (95, 1.55),
    (97, 1.95),
    (100, 3.0),
)


@dataclass(frozen=True)
class StoredImage:
    """A copy of an image.

    Attributes:
        data: the JPEG.
        quality: with which it was made.
    """

    data: bytes
    quality: int


def stored_size(size_hw: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Returns (height, width) of an image's copy: never larger than the image.

    Args:
        size_hw: of the upright image.
        short_side: of the copy, unless the image's is shorter already.
    """
    shorter = min(size_hw)
    if shorter <= short_side:
        return size_hw
    height, width = (
        # Whole numbers: half goes up, on every machine.
        (2 * side * short_side + shorter) // (2 * shorter)
        for side in size_hw
    )
    return height, width


def store_image(
    image: Image.Image, short_side: int, quality: int, max_bytes: int
) -> StoredImage | None:
    """Returns an image's copy; None where it does not fit at the lowest quality.

    Args:
        image: upright RGB, whole.
        short_side: see `stored_size`.
        quality: Pillow's, 1 to 100; lowered in steps of 5 until the copy fits.
        max_bytes: most that the copy may take.
    """
    height, width = stored_size((image.height, image.width), short_side)
    if max(height, width) > _MAX_SIDE:
        return None
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    lowest = min(LOWEST_QUALITY, quality)
    for tried in (*range(quality, lowest, -_QUALITY_STEP), lowest):
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=tried, subsampling="4:4:4")
        if sink.tell() <= max_bytes:
            return StoredImage(sink.getvalue(), tried)
    return None


def ample_bytes(pixels: int, quality: int) -> int:
    """Returns what nearly every copy of so many pixels takes at most.

    Args:
        pixels: of a copy.
        quality: of its JPEG.
    """
    points = _BYTES_PER_PIXEL
    held = min(max(quality, points[0][0]), points[-1][0])
    (low, at_low), (high, at_high) = next(
        pair for pair in itertools.pairwise(points) if held <= pair[1][0]
    )
    per_pixel = at_low + (at_high - at_low) * (held - low) / (high - low)
    rounds = math.ceil((_HEADER_BYTES + pixels * per_pixel) / _ROUND_BYTES)
    return rounds * _ROUND_BYTES


def scale_box(box: Box, full_hw: tuple[int, int], stored_hw: tuple[int, int]) -> Box:
    """Returns a view's box in pixels of an image's copy: it shows the same.

    Args:
        box: in upright pixels of the image.
        full_hw: (height, width) of the image.
        stored_hw: of its copy.
    """
    down, across = (held / full for held, full in zip(stored_hw, full_hw, strict=True))
    x0, y0, x1, y1 = box
    # Rounding must not lead out of the image.
    return (
        x0 * across,
        y0 * down,
        min(x1 * across, float(stored_hw[1])),
        min(y1 * down, float(stored_hw[0])),
    )
