"""Colour changes of views: against torchvision, NumPy and closed forms."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as torchvision

from manifests.views import PhotometricConfig
from pipeline.samples.images import resize_view
from pipeline.samples.photometric import (
    NUM_DRAWS,
    PARAMETERS,
    Photometric,
    change_colours,
    draw_photometric,
)

ALL = PhotometricConfig(
    brightness=0.4,
    contrast=0.3,
    saturation=0.2,
    hue=0.1,
    grey=0.25,
    blur=0.5,
    solarize=0.75,
    solarize_above=100,
)


def picture(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    """Smooth colours of every hue with noise on them, and grey corners."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-20, 21, (height, width, 3))
    pixels = np.clip(np.asarray(smooth).astype(int) + noise, 0, 255).astype(np.uint8)
    pixels[:4, :4], pixels[-4:, -4:] = 77, (255, 255, 255)
    return Image.fromarray(pixels)


def changed(image: Image.Image, **parameters: float) -> np.ndarray:
    found = change_colours(image, Photometric(**parameters))  # type: ignore[arg-type]
    assert (found.mode, found.size) == ("RGB", image.size)
    return np.asarray(found).astype(int)


def by_torchvision(
    image: Image.Image, change: Callable[[torch.Tensor], torch.Tensor]
) -> np.ndarray:
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return change(tensor).permute(1, 2, 0).numpy().astype(int)


@pytest.mark.parametrize("factor", [0.0, 0.3, 0.8, 1.0, 1.3, 2.0])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("brightness", torchvision.adjust_brightness),
        ("contrast", torchvision.adjust_contrast),
        ("saturation", torchvision.adjust_saturation),
    ],
)
def test_factors_are_torchvisions(
    name: str, change: Callable[..., torch.Tensor], factor: float
) -> None:
    image = picture(1)
    expected = by_torchvision(image, lambda tensor: change(tensor, factor))
    apart = np.abs(changed(image, **{name: factor}) - expected)
    # It cuts fractions off where we round, and its luma with it.
    assert apart.max() <= (2 if name == "saturation" else 1)


@pytest.mark.parametrize("hue", [-0.5, -0.21, -0.02, 0.02, 0.1, 1 / 3, 0.5])
def test_hue_is_torchvisions(hue: float) -> None:
    image = picture(2)
    expected = by_torchvision(image, lambda x: torchvision.adjust_hue(x, hue))
    assert np.abs(changed(image, hue=hue) - expected).max() <= 1


def test_hue_is_the_standard_librarys_for_every_kind_of_pixel() -> None:
    levels = np.array([0, 1, 100, 200, 254, 255], np.uint8)
    pixels = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(12, 18, 3)
    for hue in (-0.35, 0.125, 0.4):
        found = changed(Image.fromarray(pixels), hue=hue)
        for value, ours in zip(
            pixels.reshape(-1, 3), found.reshape(-1, 3), strict=True
        ):
            h, s, v = colorsys.rgb_to_hsv(*(value / 255))
            exact = np.array(colorsys.hsv_to_rgb((h + hue) % 1, s, v)) * 255
            assert np.abs(ours - exact).max() <= 0.5 + 1e-3


def test_grey_is_the_luma_of_bt_601() -> None:
    image = picture(3)
    found = changed(image, grey=True)
    exact = np.asarray(image).astype(float) @ [0.299, 0.587, 0.114]
    assert (found == found[..., :1]).all()
    assert np.abs(found[..., 0] - exact).max() <= 0.51


def test_solarize_is_torchvisions() -> None:
    image = picture(4)
    expected = by_torchvision(image, lambda x: torchvision.solarize(x, 100))
    np.testing.assert_array_equal(changed(image, solarize_above=100), expected)


def box_blurs(pixels_HW3: np.ndarray, sigma: float) -> np.ndarray:
    """Three box blurs of equal fractional width and of variance sigma^2 in all.

    Source: Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended
    Box Filtering (2011).
    """
    variance = sigma**2 / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    # Weights 1 within `whole`, `part` beyond: their variance is the wanted one.
    inner = whole * (whole + 1) * (2 * whole + 1) / 3
    part = ((2 * whole + 1) * variance - inner) / (2 * ((whole + 1) ** 2 - variance))
    weights = np.array([part, *[1.0] * (2 * whole + 1), part])
    weights /= weights.sum()
    values = pixels_HW3.astype(float)
    for axis in (0, 1):
        for _ in range(3):
            pads = [(0, 0)] * 3
            pads[axis] = (whole + 1, whole + 1)
            padded = np.pad(values, pads, mode="edge")
            length = values.shape[axis]
            values = sum(
                weight * padded.take(range(start, start + length), axis)
                for start, weight in enumerate(weights)
            )
    return values


@pytest.mark.parametrize("share", [0.002, 0.008, 0.02, 0.05])
def test_blur_is_three_box_blurs_of_its_variance(share: float) -> None:
    image = picture(5, 60, 90)
    exact = box_blurs(np.asarray(image), share * 90)
    # Pillow rounds to bytes after each of the six, by at most a half.
    assert np.abs(changed(image, blur_sigma=share) - exact).max() <= 3


def test_blur_is_torchvisions_gaussian_nearly() -> None:
    image = picture(6, 60, 90)
    sigma = 0.03 * 90
    expected = by_torchvision(
        image, lambda x: torchvision.gaussian_blur(x, [27, 27], [sigma, sigma])
    )
    # Its border is mirrored, ours repeated: compare what no border reaches.
    inner = (slice(14, -14), slice(14, -14))
    apart = np.abs(changed(image, blur_sigma=0.03) - expected)[inner]
    assert apart.max() <= 4
    assert apart.mean() < 1


def test_steps_run_in_order_each_on_the_bytes_of_the_one_before() -> None:
    image = picture(7)
    one = Photometric(0.7, 1.3, 1.2, 0.1, True, 0.02, 120)
    found = np.asarray(change_colours(image, one))
    for name in PARAMETERS:
        image = change_colours(image, Photometric(**{name: getattr(one, name)}))
    np.testing.assert_array_equal(found, np.asarray(image))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_identity_is_the_limit_of_each_step(name: str) -> None:
    """What a step is at its identity, by continuity; it is skipped there."""
    image = picture(8)
    at = getattr(Photometric(), name)
    near = at + (-1e-7 if name == "solarize_above" else 1e-7)
    if name in ("grey", "solarize_above"):
        near = at
    np.testing.assert_array_equal(changed(image, **{name: near}), np.asarray(image))


def test_a_mirrored_view_has_mirrored_colours() -> None:
    image, one = picture(9), Photometric(0.8, 1.2, 0.7, -0.1, False, 0.02, 200)
    box = (1.5, 2.25, 50.5, 39.0)
    straight = resize_view(image, box, False, (24, 32), "bilinear", one)
    mirrored = resize_view(image, box, True, (24, 32), "bilinear", one)
    np.testing.assert_array_equal(mirrored, straight[:, ::-1])
    plain = Image.fromarray(resize_view(image, box, False, (24, 32), "bilinear"))
    np.testing.assert_array_equal(straight, np.asarray(change_colours(plain, one)))


def test_the_blur_scales_with_the_view() -> None:
    """A picture of twice the size is blurred as far, seen as a whole."""
    coarse = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    image, box = Image.fromarray(coarse).resize((400, 300)), (0.0, 0.0, 400.0, 300.0)
    blurred = Photometric(blur_sigma=0.05)
    small = resize_view(image, box, False, (60, 80), "bilinear", blurred)
    large = resize_view(image, box, False, (120, 160), "bilinear", blurred)
    halved = large.reshape(60, 2, 80, 2, 3).mean((1, 3))
    assert np.abs(small - halved).max() <= 4


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=8, max_size=8))
@settings(max_examples=200)
def test_draws_lie_in_what_was_asked(uniforms: list[float]) -> None:
    assert len(uniforms) == NUM_DRAWS
    one = draw_photometric(ALL, uniforms)
    assert abs(one.brightness - 1) <= 0.4
    assert abs(one.contrast - 1) <= 0.3 + 1e-12
    assert abs(one.saturation - 1) <= 0.2 + 1e-12
    assert abs(one.hue) <= 0.1
    assert one.blur_sigma == 0 or 0.0005 <= one.blur_sigma <= 0.01
    assert one.solarize_above in (100, 256)
    assert one.to_numbers() == tuple(float(getattr(one, name)) for name in PARAMETERS)
    # Asking for less changes nothing else.
    less = draw_photometric(ALL.model_copy(update={"hue": 0.0, "blur": 0.0}), uniforms)
    assert less == replace(one, hue=0.0, blur_sigma=0.0)


def test_nothing_asked_is_nothing_changed() -> None:
    assert draw_photometric(PhotometricConfig(), [0.3] * NUM_DRAWS) == Photometric()
