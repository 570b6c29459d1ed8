"""`fit: pad`: Segment Anything's procedure, and which cells show nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from manifests.teacher import PreprocessConfig
from pipeline.samples.photometric import Photometric, change_colours
from pipeline.samples.views import Box, View
from teachers.errors import TeacherError
from teachers.inputs.clip import ClipSpec
from teachers.inputs.image import ImageSpec, check_views_of_images, image_spec
from teachers.interface import TeacherRequest

# segment_anything.modeling.Sam's pixel_mean and pixel_std, for bytes.
MEAN_255 = np.array([123.675, 116.28, 103.53])
STD_255 = np.array([58.395, 57.12, 57.375])


def sam(image: Image.Image, length: int) -> np.ndarray:
    """What SAM is given, (3, length, length): longest side, normalise, pad with 0.

    Source: segment-anything, ResizeLongestSide.apply_image (torchvision's resize of a
    PIL image: bilinear) and Sam.preprocess.
    """
    old_h, old_w = image.height, image.width
    scale = length * 1.0 / max(old_h, old_w)
    new_h, new_w = int(old_h * scale + 0.5), int(old_w * scale + 0.5)
    resized = image.resize((new_w, new_h), Image.Resampling.BILINEAR)
    normalised = (np.asarray(resized, np.float64) - MEAN_255) / STD_255
    padded = np.pad(normalised, [(0, length - new_h), (0, length - new_w), (0, 0)])
    return padded.transpose(2, 0, 1)


def sam_spec(length: int) -> ImageSpec:
    return image_spec(
        PreprocessConfig(fit="pad", interpolation="bilinear"),
        (length, length),
        interpolation="bicubic",
        mean=tuple(MEAN_255 / 255),
        std=tuple(STD_255 / 255),
        where="teachers.sam",
    )


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width + height)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def view_of(box: Box, flip: bool = False, **more: Any) -> View:
    return View(0, flip, 0.0, 1.0, {"image": box}, **more)


def whole(image: Image.Image) -> Box:
    return (0.0, 0.0, float(image.width), float(image.height))


@pytest.mark.parametrize(
    ("width", "height", "length"),
    [(640, 427, 1024), (427, 640, 1024), (1242, 375, 256), (75, 75, 64), (33, 9, 128)],
)
def test_a_padded_image_is_what_sam_is_given(
    width: int, height: int, length: int
) -> None:
    image, spec = noise(width, height), sam_spec(length)
    row = spec.prepare(image, view_of(whole(image)), "image")
    found = spec.to_tensor(row[None], "cpu", torch.float32)[0].numpy()
    expected = sam(image, length)
    assert found.shape == expected.shape == (3, length, length)
    assert np.abs(found - expected).max() < 1e-5
    np.testing.assert_array_equal(found == 0, expected == 0)


def test_a_box_a_mirror_and_colours_come_before_the_padding() -> None:
    image, spec = noise(90, 60), sam_spec(32)
    box, changes = (10.0, 5.0, 74.0, 21.0), Photometric(brightness=0.5, hue=0.2)
    row = spec.prepare(image, view_of(box, True, photometric=changes), "image")
    cut = image.resize((32, 8), Image.Resampling.BILINEAR, box=box)
    expected = np.asarray(change_colours(cut, changes))[:, ::-1]
    np.testing.assert_array_equal(row[:8, :, :3], expected)
    is_picture = np.zeros((32, 32), bool)
    is_picture[:8] = True
    np.testing.assert_array_equal(row[..., 3], 255 * is_picture)


@given(
    st.tuples(st.integers(1, 400), st.integers(1, 400)),
    st.sampled_from([(64, 64), (32, 96), (96, 32)]),
    st.sampled_from([(1, 1), (2, 2), (4, 2)]),
)
def test_missing_cells_are_those_whose_centres_lie_on_padding(
    box: tuple[int, int], size: tuple[int, int], pool: tuple[int, int]
) -> None:
    spec = ImageSpec(*size, interpolation="nearest", pad=True)
    image = Image.new("RGB", box)
    row = spec.prepare(image, view_of(whole(image)), "image")
    rows, columns = size[0] // 8, size[1] // 8
    shape = (rows // pool[0], columns // pool[1], 5)
    found = spec.missing_cells(row[None], shape, pool)
    assert found is not None
    # Longest side first: how much of the input the picture fills, in pixels.
    scale = min(size[0] / box[1], size[1] / box[0])
    height = max(1, min(size[0], int(box[1] * scale + 0.5)))
    width = max(1, min(size[1], int(box[0] * scale + 0.5)))
    for i in range(shape[0]):
        for j in range(shape[1]):
            # The last of the cells that are pooled lies farthest to the lower right.
            y, x = (i + 1) * pool[0] * 8 - 4, (j + 1) * pool[1] * 8 - 4
            assert found[0, i, j] == (y >= height or x >= width), (i, j)


def test_no_cell_is_missing_without_padding() -> None:
    spec = ImageSpec(8, 8)
    assert (
        spec.missing_cells(np.zeros((1, 8, 8, 3), np.uint8), (2, 2, 3), (1, 1)) is None
    )


def test_frames_of_a_clip_miss_the_same_cells() -> None:
    frame = ImageSpec(16, 16, pad=True)
    spec = ClipSpec(frame, 3)
    clip = tuple(noise(40, 20) for _ in range(3))
    row = spec.prepare(clip, view_of(whole(clip[0])), "image")
    assert row.shape == spec.row_shape == (3, 16, 16, 4)
    in_frames = spec.missing_cells(row[None], (3, 4, 4, 7), (1, 1))
    of_clip = spec.missing_cells(row[None], (4, 4, 7), (1, 1))
    assert in_frames is not None
    assert of_clip is not None
    expected = np.arange(4)[:, None].repeat(4, 1) >= 2
    np.testing.assert_array_equal(of_clip, expected[None])
    np.testing.assert_array_equal(in_frames, np.stack([expected] * 3)[None])


@pytest.mark.parametrize(
    ("outputs", "inputs", "message"),
    [
        ({"patch": {}}, ["front", "back"], r"pad with several inputs \(front, back\)"),
        (
            {"bev": {"extent": {"x_m": [0, 1], "y_m": [0, 1]}}},
            ["front"],
            "pad with the bird's-eye grid bev",
        ),
    ],
)
def test_padding_that_cells_cannot_be_told_of_is_refused(
    outputs: dict[str, Any],
    inputs: list[str],
    message: str,
    make_request: Callable[..., TeacherRequest],
) -> None:
    request = make_request("module:net.py:Net", outputs)
    padded = {name: ImageSpec(8, 8, pad=True) for name in inputs}
    with pytest.raises(TeacherError, match=message):
        check_views_of_images(request, padded)
    check_views_of_images(request, {name: ImageSpec(8, 8) for name in inputs})
