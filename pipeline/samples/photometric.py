"""Colour changes of a view: their parameters as numbers, and what they do to pixels.

The one implementation, for teachers and the student: it takes the resized bytes of a
view and gives bytes. The steps run in the order of `PARAMETERS`, each on the bytes that
the one before it gave; x is a byte, and a result y becomes the byte
floor(clip(y, 0, 255) + 1/2). Luma is Pillow's, in integers:
L = (19595 R + 38470 G + 7471 B + 32768) >> 16 (ITU-R BT.601).

1. brightness b: y = b x.
2. contrast c: y = c x + (1 - c) m, m the mean of L over all pixels.
3. saturation s: y = s x + (1 - s) L.
4. hue h: the angle of HSV turned by h of a circle; value and chroma stay. With
   M and m the largest and smallest channel, C = M - m, p in [0, 6) the place of the
   hue (0 red, 2 green, 4 blue): channel n = (5, 3, 1) becomes
   M - C clip(min(k, 4 - k), 0, 1), k = (n + p + 6 h) mod 6.
5. grey: all three channels become L.
6. blur: a Gaussian of sigma times the longer side of the resized view, in pixels of
   it, as Pillow makes it: three box blurs of the same variance in all, the border
   pixel repeated.
7. solarize: x becomes 255 - x where x >= the threshold.

Contrast and blur see the resized view, so teachers of different sizes see nearly, not
exactly, the same picture. Where brightness, contrast, saturation and hue are 1, 1, 1
and 0 a step gives the bytes it takes.

No matrix product and no sum of floats: the bytes are equal on every machine.

Source: Smith, Color Gamut Transform Pairs (SIGGRAPH 1978), for HSV; SimCLR (Chen et al.
2020) and BYOL (Grill et al. 2020) for the set of changes.

Shape suffixes: H and W rows and columns, 3 channels R, G, B.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from manifests.views import PhotometricConfig

NEVER_SOLARIZED = 256


@dataclass(frozen=True)
class Photometric:
    """The colour changes of one view, the same for all its images and frames.

    Attributes:
        brightness: factor; 1 changes nothing.
        contrast: factor about the mean luma; 1 changes nothing.
        saturation: factor about the luma; 1 changes nothing.
        hue: turn as a share of the circle; 0 changes nothing.
        grey: whether colour is taken away.
        blur_sigma: as a share of the resized view's longer side; 0 changes nothing.
        solarize_above: bytes from here on are inverted; 256 changes nothing.
    """

    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    grey: bool = False
    blur_sigma: float = 0.0
    solarize_above: int = NEVER_SOLARIZED

    def to_numbers(self) -> tuple[float, ...]:
        """Returns the parameters in the order of `PARAMETERS`; grey is 0 or 1."""
        return tuple(float(getattr(self, name)) for name in PARAMETERS)


PARAMETERS = tuple(field.name for field in fields(Photometric))
"""Names of the parameters, in the order in which the steps run."""

DEFINITION = {
    "order": "as `parameters`, on the resized bytes of the view; each step gives bytes",
    "rounding": "y becomes floor(clip(y, 0, 255) + 1/2)",
    "luma": "L = (19595 R + 38470 G + 7471 B + 32768) >> 16",
    "brightness": "y = brightness * x",
    "contrast": "y = contrast * x + (1 - contrast) * mean of L over the view",
    "saturation": "y = saturation * x + (1 - saturation) * L",
    "hue": "the hue of HSV is turned by this share of the circle",
    "grey": "1: R, G, B become L",
    "blur_sigma": "Gaussian of this share of the resized view's longer side, by "
    "Pillow's three box blurs; 0: none",
    "solarize_above": "x becomes 255 - x where x >= it; 256: none",
}
"""The steps in words, for whoever reads a bank without this code."""

NUM_DRAWS = 8
"""Uniform numbers that a draw takes, whatever is asked for."""


def draw_photometric(config: PhotometricConfig, uniforms: list[float]) -> Photometric:
    """Returns colour changes made of `NUM_DRAWS` numbers, uniform in [0, 1).

    Each number has one use, so that asking for one more change moves no other.
    """
    brightness, contrast, saturation, hue, grey, blur, sigma, solarize = uniforms
    low, high = config.blur_sigma
    return Photometric(
        brightness=_factor(config.brightness, brightness),
        contrast=_factor(config.contrast, contrast),
        saturation=_factor(config.saturation, saturation),
        hue=config.hue * (2 * hue - 1),
        grey=grey < config.grey,
        blur_sigma=low + (high - low) * sigma if blur < config.blur else 0.0,
        solarize_above=(
            config.solarize_above if solarize < config.solarize else NEVER_SOLARIZED
        ),
    )


def _factor(largest: float, uniform: float) -> float:
    return 1 + largest * (2 * uniform - 1)


def change_colours(image: Image.Image, photometric: Photometric) -> Image.Image:
    """Returns an RGB image after the steps of this module.

    Args:
        image: RGB, a view at the size at which it is looked at.
        photometric: of the view.
    """
    ramp = np.arange(256, dtype=np.float64)
    if photometric.brightness != 1:
        image = _look_up(image, photometric.brightness * ramp)
    if photometric.contrast != 1:
        luma = np.asarray(image.convert("L"))
        mean = int(luma.sum(dtype=np.int64)) / luma.size
        factor = photometric.contrast
        image = _look_up(image, factor * ramp + (1 - factor) * mean)
    if photometric.saturation != 1:
        image = _saturate(image, photometric.saturation)
    if photometric.hue:
        image = Image.fromarray(_turn_hue(np.asarray(image), photometric.hue))
    if photometric.grey:
        image = image.convert("L").convert("RGB")
    if photometric.blur_sigma:
        sigma = photometric.blur_sigma * max(image.size)
        image = image.filter(ImageFilter.GaussianBlur(sigma))
    if photometric.solarize_above < NEVER_SOLARIZED:
        inverted = ramp >= photometric.solarize_above
        image = _look_up(image, np.where(inverted, 255 - ramp, ramp))
    return image


def _look_up(image: Image.Image, values: NDArray[np.float64]) -> Image.Image:
    """Returns an image whose bytes are looked up in 256 values, then rounded."""
    table = np.floor(np.clip(values, 0, 255) + 0.5).astype(int).tolist()
    return image.point(table * 3)


def _rounded(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    # In place: the array is the caller's last use of it. A cast drops the fraction,
    # which for numbers that are not negative is the floor.
    np.clip(values, 0, 255, out=values)
    values += np.float32(0.5)
    return values.astype(np.uint8)


def _saturate(image: Image.Image, factor: float) -> Image.Image:
    luma_HW1 = np.asarray(image.convert("L"), np.float32)[..., None]
    values_HW3 = np.asarray(image, np.float32) * np.float32(factor)
    values_HW3 += luma_HW1 * np.float32(1 - factor)
    return Image.fromarray(_rounded(values_HW3))


def _turn_hue(pixels_HW3: NDArray[np.uint8], hue: float) -> NDArray[np.uint8]:
    planes_3HW = np.ascontiguousarray(np.moveaxis(pixels_HW3, 2, 0))
    top_HW = planes_3HW.max(axis=0)
    red, green, blue = planes_3HW.astype(np.float32)
    value_HW = top_HW.astype(np.float32)
    chroma_HW = value_HW - planes_3HW.min(axis=0)
    # Grey pixels have no hue; whatever it is taken for is multiplied by 0.
    divisor_HW = np.maximum(chroma_HW, 1)
    is_red, is_green = planes_3HW[0] == top_HW, planes_3HW[1] == top_HW
    difference_HW = np.where(
        is_red, green - blue, np.where(is_green, blue - red, red - green)
    )
    place_HW = difference_HW / divisor_HW
    sector = np.where(is_green, np.float32(2), np.float32(4))
    place_HW += np.where(is_red, np.float32(0), sector)
    turned_HW3 = np.empty_like(pixels_HW3)
    for channel, start in enumerate((5, 3, 1)):
        k = place_HW + np.float32((start + 6 * hue) % 6)
        k -= 6 * np.floor(k * np.float32(1 / 6))
        np.minimum(k, 4 - k, out=k)
        np.clip(k, 0, 1, out=k)
        k *= chroma_HW
        turned_HW3[..., channel] = _rounded(np.subtract(value_HW, k, out=k))
    return turned_HW3
