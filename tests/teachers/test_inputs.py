"""Points and pixel arithmetic, against independent computations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as transforms

from manifests.teacher import PreprocessConfig
from pipeline.samples.errors import SampleError
from pipeline.samples.points import Sweep
from pipeline.samples.views import Box, View
from teachers.errors import TeacherError
from teachers.inputs.image import ImageSpec, image_spec
from teachers.inputs.points import PointsSpec, points_spec
from teachers.interface import GroupInput

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _image_spec(
    config: PreprocessConfig, mean: Any = MEAN, std: Any = STD
) -> ImageSpec:
    return image_spec(
        config, (4, 6), interpolation="bicubic", mean=mean, std=std, where="teachers.t"
    )


def _view(box: Box, flip: bool = False) -> View:
    return View(0, flip, 0.0, 1.0, {"image": box})


def _points(spec: PointsSpec, sweep_NC: np.ndarray) -> np.ndarray:
    columns = tuple("abcdefgh"[: sweep_NC.shape[1]])
    return spec.prepare(Sweep(sweep_NC, columns), _view((0, 0, 1, 1)), "lidar")


def test_image_spec_takes_the_familys_values() -> None:
    assert _image_spec(PreprocessConfig()) == ImageSpec(4, 6, mean=MEAN, std=STD)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"range": 255.0}, "range must come with mean and std"),
        ({"channels": "bgr", "mean": MEAN}, "channels must come with mean and std"),
        ({"mean": (0.5,)}, "mean must be three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be three numbers.*positive"),
    ],
)
def test_image_spec_refuses_half_an_override(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        _image_spec(PreprocessConfig(**config))


def test_image_spec_refuses_a_filter_that_views_do_not_have() -> None:
    with pytest.raises(TeacherError, match="interpolation must be given"):
        image_spec(
            PreprocessConfig(),
            (4, 4),
            interpolation="hamming",
            mean=MEAN,
            std=STD,
            where="t",
        )


def test_to_tensor_is_torchvisions_arithmetic() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    found = _image_spec(PreprocessConfig()).to_tensor(pixels, "cpu", torch.float32)
    expected = torch.stack(
        [transforms.normalize(transforms.to_tensor(item), MEAN, STD) for item in pixels]
    )
    assert found.shape == (3, 3, 5, 7)
    assert (found - expected).abs().max() < 1e-6


def test_to_tensor_covers_every_byte_in_every_order_and_range() -> None:
    pixels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(1, 16, 16, 3)
    pixels = (pixels + np.array([0, 85, 170], np.uint8)).astype(np.uint8)
    mean, std = (72.39, 82.91, 73.16), (45.32, 46.15, 44.91)
    spec = ImageSpec(16, 16, channels="bgr", range=255, mean=mean, std=std, divide=255)
    found = spec.to_tensor(pixels, "cpu", torch.float32).numpy()
    bgr = pixels[..., ::-1].astype(np.float64)
    expected = ((bgr - mean) / std / 255).transpose(0, 3, 1, 2)
    assert np.abs(found - expected).max() < 1e-8


def test_to_tensor_rounds_once_to_the_precision() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    spec = _image_spec(PreprocessConfig())
    exact = spec.to_tensor(pixels, "cpu", torch.float32)
    found = spec.to_tensor(pixels, "cpu", torch.bfloat16)
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_to_tensor_passes_points_on() -> None:
    spec = PointsSpec(("x", "y", "z"), (0, 1, 2), 2)
    points = np.ones((1, 2, 3), np.float32)
    assert spec.to_tensor(points, "cpu", torch.float32).shape == (1, 2, 3)


def test_prepare_resizes_the_fractional_box_once() -> None:
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    )
    box = (3.25, 4.5, 51.75, 36.0)
    spec = ImageSpec(8, 12, interpolation="bilinear")
    expected = np.asarray(image.resize((12, 8), Image.Resampling.BILINEAR, box=box))
    assert np.array_equal(spec.prepare(image, _view(box), "image"), expected)
    assert np.array_equal(
        spec.prepare(image, _view(box, True), "image"), expected[:, ::-1]
    )


@given(st.integers(1, 50), st.integers(1, 60))
def test_points_are_evenly_chosen(num: int, wanted: int) -> None:
    sweep = np.arange(num, dtype=np.float32)[:, None].repeat(3, 1)
    spec = PointsSpec(("z", "x", "y"), (2, 0, 1), wanted)
    found = _points(spec, sweep)[:, 0].astype(int).tolist()
    if num >= wanted:
        assert found == [i * num // wanted for i in range(wanted)]
        assert len(set(found)) == wanted
    else:
        assert found == (list(range(num)) * wanted)[:wanted]


def test_points_are_centred_and_scaled() -> None:
    rng = np.random.default_rng(0)
    sweep = rng.normal(size=(100, 4)).astype(np.float32) * 30 + 5
    columns = ("intensity", "x", "y", "z")
    spec = PointsSpec(columns, (3, 0, 1, 2), 100, centre=True, unit_sphere=True)
    found = _points(spec, sweep)
    xyz = sweep[:, :3].astype(np.float64) - sweep[:, :3].mean(0)
    xyz /= np.linalg.norm(xyz, axis=1).max()
    assert found.dtype == np.float32
    assert np.array_equal(found[:, 0], sweep[:, 3])
    assert np.abs(found[:, 1:] - xyz).max() < 1e-6


def test_points_that_are_all_one_stay_finite() -> None:
    spec = PointsSpec(("x", "y", "z"), (0, 1, 2), 4, centre=True, unit_sphere=True)
    assert np.array_equal(_points(spec, np.ones((3, 3), np.float32)), np.zeros((4, 3)))


def test_points_are_those_of_the_models_own_preprocessing(shared_data: Path) -> None:
    source = (shared_data / "driving-teachers" / "driving_teachers.py").read_text()
    names: dict[str, Any] = {}
    exec(source, names)
    sweep = np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32) * 20
    spec = PointsSpec(("x", "y", "z"), (0, 1, 2), 64, centre=True, unit_sphere=True)
    expected = names["point_preprocess"](torch.from_numpy(sweep)).numpy()
    assert np.abs(_points(spec, sweep) - expected).max() < 1e-6


def test_an_empty_sweep_is_a_fault_of_the_sample() -> None:
    with pytest.raises(SampleError, match="no point"):
        _points(PointsSpec(("x", "y", "z"), (0, 1, 2), 4), np.zeros((0, 3), np.float32))


SWEEP = GroupInput("lidar", "points", columns=("x", "y", "z", "intensity"))


def test_points_spec() -> None:
    config = PreprocessConfig(points=8, columns=("intensity", "x"))
    spec = points_spec(config, SWEEP, "teachers.t")
    assert (spec.indices, spec.num_points) == ((3, 0), 8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "points must be given"),
        ({"points": 4, "columns": ("x", "ring")}, r"columns of lidar \(x.*got ring"),
        ({"points": 4, "columns": ("x", "y"), "centre": True}, "hold x, y and z"),
    ],
)
def test_points_spec_refuses(config: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        points_spec(PreprocessConfig(**config), SWEEP, "teachers.t")
