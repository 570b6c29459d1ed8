"""Sweeps as images that a teacher takes: what is given, and its arithmetic."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from manifests.teacher import RasterConfig
from pipeline.samples.errors import SampleError
from pipeline.samples.points import Sweep
from pipeline.samples.views import View
from teachers.errors import TeacherError
from teachers.inputs.raster import (
    RasterSpec,
    bev_raster_spec,
    range_view_spec,
)
from teachers.interface import GroupInput

COLUMNS = ("x", "y", "z", "intensity")
LIDAR = GroupInput("lidar", "points", columns=COLUMNS)
VIEW = View(0, False, 0.0, 1.0, {})
AREA: dict[str, Any] = {"x_m": (0, 40), "y_m": (-20, 20)}
Make = Callable[..., RasterSpec]


def _range_view(item: GroupInput = LIDAR, **raster: Any) -> RasterSpec:
    config = RasterConfig(**{"elevation_deg": (-25, 3), **raster})
    return range_view_spec(config, item, (16, 64), "teachers.t")


def _from_above(item: GroupInput = LIDAR, **raster: Any) -> RasterSpec:
    config = RasterConfig(**{**AREA, **raster})
    return bev_raster_spec(config, item, (8, 8), "teachers.t")


def _sweep(num: int = 60) -> Sweep:
    rng = np.random.default_rng(0)
    low, high = (1, -19, -2, 0), (39, 19, 1, 1)
    points = rng.uniform(low, high, (num, 4)).astype(np.float32)
    return Sweep(points, COLUMNS)


def test_the_familys_own() -> None:
    spec = _range_view()
    assert spec.channels == ("range", "x", "y", "z", "intensity")
    assert (spec.mean, spec.std) == ((0.0,) * 5, (1.0,) * 5)
    assert spec.row_shape == (16, 64, 5)
    assert spec.row_bytes == 16 * 64 * 5 * 4
    assert _from_above().channels == ("occupied", "z", "intensity", "density")
    assert spec.blank("meta").shape == (1, 5, 16, 64)


@pytest.mark.parametrize("make", [_range_view, _from_above])
def test_the_arithmetic_and_empty_pixels(make: Make) -> None:
    plain = make()
    count = len(plain.channels)
    mean, std = np.arange(1, count + 1) * 1.5, np.arange(1, count + 1) * 0.5
    spec = make(mean=tuple(mean), std=tuple(std))
    row = spec.prepare(_sweep(), VIEW, "lidar")
    assert (row.shape, row.dtype) == (spec.row_shape, spec.row_dtype)
    empty = np.isnan(row).all(-1)
    assert np.array_equal(empty, np.isnan(row).any(-1))
    assert 0 < empty.sum() < empty.size
    found = spec.to_tensor(row[None], "cpu", torch.float32).numpy()
    expected = np.where(empty[..., None], 0, (row.astype(np.float64) - mean) / std)
    assert found.shape == (1, count, *row.shape[:2])
    assert np.abs(found[0] - expected.transpose(2, 0, 1)).max() < 1e-4
    assert (found[0][:, empty] == 0).all()


def test_bfloat16_rounds_after_the_arithmetic() -> None:
    """50.2 m with the mean of 50 is 0.2; rounded first it would be 0.25."""
    sweep = Sweep(np.array([[50.2, 0, 0, 0.5]], np.float32), COLUMNS)
    spec = _range_view(channels=("x",), mean=(50.0,), std=(1.0,))
    row = spec.prepare(sweep, VIEW, "lidar")
    found = spec.to_tensor(row[None], "cpu", torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert float(found.max()) == pytest.approx(0.2, rel=2**-8)


@pytest.mark.parametrize("make", [_range_view, _from_above])
def test_specs_that_differ_in_arithmetic_alone_share_rows(make: Make) -> None:
    channels = ("z", "occupied")
    one = make(channels=channels)
    other = make(channels=channels, mean=(1.0, 2.0), std=(3.0, 4.0))
    assert one != other
    assert one.geometry == other.geometry
    assert hash(one.geometry) == hash(other.geometry)
    assert make(channels=("z", "x")).geometry != one.geometry
    assert dataclasses.replace(one, height=32).geometry != one.geometry


def test_specs_are_plain_json() -> None:
    spec = _from_above(z_m=(-3, 2))
    assert json.loads(json.dumps(spec.to_json())) == {
        "kind": "raster",
        "height": 8,
        "width": 8,
        "channels": ["occupied", "z", "intensity", "density"],
        "mean": [0, 0, 0, 0],
        "std": [1, 1, 1, 1],
        "x_m": [0, 40],
        "y_m": [-20, 20],
        "z_m": [-3, 2],
    }


def test_what_a_view_does_to_a_sweep_is_seen() -> None:
    sweep, spec = _sweep(), _from_above(channels=("z", "intensity"))
    flipped = sweep.in_view(View(1, True, 0.0, 1.0, {}))
    plain, mirrored = (
        spec.prepare(one, VIEW, "lidar").copy() for one in (sweep, flipped)
    )
    assert np.array_equal(mirrored, plain[:, ::-1], equal_nan=True)


def test_an_image_without_a_point_is_a_fault_of_the_sample() -> None:
    spec = _from_above(z_m=(50, 60))
    with pytest.raises(SampleError, match="no point of lidar falls into the image"):
        spec.prepare(_sweep(), VIEW, "lidar")


@pytest.mark.parametrize(
    ("make", "raster", "message"),
    [
        (_range_view, {"elevation_deg": None}, r"elevation_deg must be given.*KITTI"),
        (_range_view, {"elevation_deg": (-95, 3)}, "must lie in -90 to 90"),
        (_range_view, {"azimuth_deg": (-200, 200)}, "must span at most 360"),
        (_range_view, {"x_m": (0, 1)}, r"x_m has no effect: it is for bev_raster"),
        (_range_view, {"mean": (0, 0)}, r"mean must be 5 numbers, one per channel"),
        (_range_view, {"std": (1, 1, 0, 1, 1)}, "std must be 5 numbers.*positive"),
        (_range_view, {"channels": ("ring",)}, r"must be columns of lidar.*got ring"),
        (_from_above, {"x_m": None}, r"x_m must be given"),
        (_from_above, {"y_m": None}, r"y_m must be given"),
        (_from_above, {"elevation_deg": (0, 1)}, "elevation_deg has no effect"),
        (_from_above, {"range_m": (0, 1)}, "range_m has no effect"),
    ],
)
def test_refused(make: Make, raster: dict[str, Any], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        make(**raster)


def test_a_sweep_without_intensity_needs_channels() -> None:
    bare = GroupInput("lidar", "points", columns=("x", "y", "z"))
    with pytest.raises(TeacherError, match="got intensity"):
        _range_view(bare)
    assert _range_view(bare, channels=("range",)).row_shape == (16, 64, 1)
