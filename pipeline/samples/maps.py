"""Label maps: a number for every pixel, from a PNG, in a view.

Never interpolated: a view of a map takes the nearest pixel. Palette images give their
indices, not their colours.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from pipeline.samples.errors import SampleError
from pipeline.samples.images import load_image
from pipeline.samples.views import Box

_PNG = b"\x89PNG\r\n\x1a\n"
# Bits to the factor by which Pillow stretches shallow grey PNGs over 0..255.
_STRETCH = {1: 255, 2: 85, 4: 17}
_MODES = ("1", "L", "P", "I;16", "I;16L", "I;16B", "I")


def decode_map(data: bytes) -> Image.Image:
    """Returns a label map as a single-channel image of integers.

    Raises:
        SampleError: it is not an image, is damaged, too large, or has colours.
    """
    image = load_image(data)
    if image.mode not in _MODES:
        raise SampleError(
            "not_a_map", f"a label map has one number a pixel, got mode {image.mode}"
        )
    if image.mode == "P":
        return Image.frombytes("L", image.size, image.tobytes())
    factor = _STRETCH.get(data[24], 1) if data.startswith(_PNG) else 1
    if factor > 1:
        return image.convert("L").point([value // factor for value in range(256)])
    # Pillow resizes 8-bit and 32-bit integers by nearest pixel; not all 16-bit modes.
    return image if image.mode == "L" else image.convert("I")


def map_in_view(
    label: Image.Image,
    box: Box,
    image_size: tuple[int, int],
    flip: bool,
    size: tuple[int, int],
) -> np.ndarray:
    """Returns a view of a label map at one size, each pixel the nearest of the map.

    Args:
        label: from ``decode_map``; may have another resolution than the image.
        box: what the view sees, in pixels of the image.
        image_size: (height, width) of the upright image.
        flip: whether the view is mirrored.
        size: (height, width) of the result.

    Returns:
        int32 (height, width).
    """
    down, across = label.height / image_size[0], label.width / image_size[1]
    scaled = (
        box[0] * across,
        box[1] * down,
        min(box[2] * across, float(label.width)),
        min(box[3] * down, float(label.height)),
    )
    resized = label.resize((size[1], size[0]), Image.Resampling.NEAREST, box=scaled)
    values_HW = np.asarray(resized, np.int32)
    return np.ascontiguousarray(values_HW[:, ::-1] if flip else values_HW)
