"""Copies of images: their size, their bytes, and boxes that show the same in them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.samples.stored_images import (
    ample_bytes,
    scale_box,
    store_image,
    stored_size,
)

SIDES = st.integers(1, 4000)


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some texture."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    noise = rng.integers(-12, 13, (height, width, 3))
    pixels = np.clip(np.asarray(smooth, np.int64) + noise, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), np.float64)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a - b) ** 2)))


@given(SIDES, SIDES, st.integers(8, 600))
def test_a_copy_has_the_short_side_and_the_aspect(height, width, side):
    down, across = stored_size((height, width), side)
    assert min(down, across) == min(side, height, width)
    if min(height, width) <= side:
        assert (down, across) == (height, width)
    else:
        # At most half a pixel from the exact aspect.
        assert max(down, across) - side * max(height, width) / min(
            height, width
        ) == pytest.approx(0, abs=0.5)


def test_a_copy_is_the_resized_image_with_bounded_loss():
    image = picture(90, 150)
    found = store_image(image, 60, 90, 2**20)
    assert found is not None
    assert found.quality == 90
    resized = image.resize((100, 60), Image.Resampling.BICUBIC)
    assert decoded(found.data).shape == (60, 100, 3)
    assert psnr_db(decoded(found.data), np.asarray(resized, np.float64)) > 33
    assert store_image(image, 60, 90, 2**20) == found


def test_a_small_image_is_not_resized():
    image = picture(20, 30)
    found = store_image(image, 64, 100, 2**20)
    assert found is not None
    assert psnr_db(decoded(found.data), np.asarray(image, np.float64)) > 45


def test_colours_are_kept_at_full_resolution():
    # Red and green columns of one pixel: at half resolution they would be one brown.
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, ::2, 0] = pixels[:, 1::2, 1] = 255
    found = store_image(Image.fromarray(pixels), 16, 95, 2**16)
    assert found is not None
    assert np.abs(decoded(found.data) - pixels).mean() < 10


def test_quality_is_lowered_until_a_copy_fits():
    image = picture(64, 64, seed=3)
    sizes = {}
    for quality in (90, 85, 80, 75):
        sink = io.BytesIO()
        image.save(sink, "JPEG", quality=quality, subsampling="4:4:4")
        sizes[quality] = len(sink.getvalue())
    found = store_image(image, 64, 90, sizes[80])
    assert found is not None
    assert (found.quality, len(found.data)) == (80, sizes[80])
    found = store_image(image, 64, 90, sizes[80] - 1)
    assert found is not None
    assert found.quality == 75


def test_what_fits_at_no_quality_has_no_copy():
    assert store_image(picture(64, 64), 64, 90, 700) is None
    # No JPEG has a side as long.
    assert store_image(Image.new("RGB", (65501, 1)), 64, 90, 2**20) is None


@given(st.integers(1, 10**8), st.integers(30, 100))
def test_ample_bytes_grow_with_pixels_and_quality(pixels, quality):
    found = ample_bytes(pixels, quality)
    assert found % 256 == 0
    assert found <= ample_bytes(2 * pixels, quality)
    assert found <= ample_bytes(pixels, min(100, quality + 1))


@pytest.mark.parametrize(("quality", "per_pixel"), [(30, 0.25), (90, 1.1), (100, 3.0)])
def test_ample_bytes_are_those_measured(quality, per_pixel):
    pixels = 10**6
    assert ample_bytes(pixels, quality) == pytest.approx(
        2048 + per_pixel * pixels, abs=256
    )


@given(st.data(), SIDES, SIDES, st.integers(8, 600))
def test_a_scaled_box_is_the_same_share_of_the_picture(data, height, width, side):
    share = st.floats(0, 1)
    x0, x1 = sorted((data.draw(share), data.draw(share)))
    y0, y1 = sorted((data.draw(share), data.draw(share)))
    box = x0 * width, y0 * height, x1 * width, y1 * height
    down, across = stored_size((height, width), side)
    found = scale_box(box, (height, width), (down, across))
    expected = np.array([x0 * across, y0 * down, x1 * across, y1 * down])
    assert np.allclose(found, expected, atol=1e-6 * max(down, across))
    assert found[2] <= across
    assert found[3] <= down


def test_what_a_scaled_box_shows_lies_where_it_lay():
    # A bright spot, found by its centre of mass in the view of the original and in that
    # of the copy: they must agree to a fraction of a pixel of the view.
    height, width = 240, 361
    y, x = np.mgrid[:height, :width] + 0.5
    spot = np.exp(-((x - 201.3) ** 2 + (y - 97.8) ** 2) / (2 * 14.0**2))
    image = Image.fromarray(np.repeat(255 * spot[..., None], 3, 2).astype(np.uint8))
    found = store_image(image, 75, 95, 2**20)
    assert found is not None
    copy = Image.open(io.BytesIO(found.data))
    box = (121.7, 33.4, 287.2, 169.9)
    scaled = scale_box(box, (height, width), (copy.height, copy.width))
    centres = []
    for source, seen in ((image, box), (copy, scaled)):
        view = source.resize((64, 48), Image.Resampling.BICUBIC, box=seen)
        mass = np.asarray(view, np.float64)[..., 0]
        rows, columns = np.mgrid[:48, :64] + 0.5
        centres.append(
            np.array([(mass * rows).sum(), (mass * columns).sum()]) / mass.sum()
        )
    assert np.abs(centres[0] - centres[1]).max() < 0.1
    # The test can tell: half a pixel of the copy to the side is seen.
    moved = tuple(np.add(scaled, 0.5))
    view = copy.resize((64, 48), Image.Resampling.BICUBIC, box=moved)
    mass = np.asarray(view, np.float64)[..., 0]
    columns = np.mgrid[:48, :64][1] + 0.5
    assert abs((mass * columns).sum() / mass.sum() - centres[0][1]) > 0.3
