"""Sweeps: what is refused, and the transform of a view against matrices."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest

from manifests.inputs import PointsInput
from pipeline.samples.errors import SampleError
from pipeline.samples.points import decode_sweep, points_in_view, read_sweep
from pipeline.samples.shards import Sample
from pipeline.samples.views import View

XYZI = ("x", "y", "z", "intensity")
PLAIN = View(0, False, 0.0, 1.0, {})


def config(**fields: Any) -> PointsInput:
    return PointsInput(**{"kind": "points", "member": "bin", **fields})


@pytest.fixture
def sweep_N4() -> np.ndarray:
    rng = np.random.default_rng(0)
    xyz_N3 = rng.normal(0, 20, (500, 3))
    intensity_N1 = rng.uniform(0, 255, (500, 1))
    return np.hstack([xyz_N3, intensity_N1]).astype("<f4")


def test_points_come_back_with_intensity_scaled(sweep_N4: np.ndarray) -> None:
    sweep = decode_sweep(sweep_N4.tobytes(), config(intensity_max=255.0))
    points = sweep.points
    assert points.dtype == np.float32
    assert points.flags.writeable
    np.testing.assert_array_equal(points[:, :3], sweep_N4[:, :3])
    np.testing.assert_array_equal(points[:, 3], sweep_N4[:, 3] / np.float32(255))
    assert (sweep.columns, sweep.stored, sweep.num_dropped) == (XYZI, None, 0)


def test_columns_are_found_by_name(sweep_N4: np.ndarray) -> None:
    turned = sweep_N4[:, [3, 2, 1, 0]]
    columns = ("intensity", "z", "y", "x")
    declared = config(columns=columns, intensity_max=2.0)
    points = decode_sweep(turned.tobytes(), declared).points
    np.testing.assert_array_equal(points[:, 1:], turned[:, 1:])
    np.testing.assert_array_equal(points[:, 0], turned[:, 0] / 2)


def test_points_that_are_not_finite_are_dropped_and_counted(
    sweep_N4: np.ndarray,
) -> None:
    sweep_N4[3, 0], sweep_N4[9, 3], sweep_N4[11, 2] = np.nan, np.inf, -np.inf
    sweep = decode_sweep(sweep_N4.tobytes(), config())
    np.testing.assert_array_equal(sweep.points, np.delete(sweep_N4, [3, 9, 11], axis=0))
    assert sweep.num_dropped == 3
    assert sweep.stored is not None
    assert sweep.stored.dtype == np.int64
    np.testing.assert_array_equal(sweep_N4[sweep.stored], sweep.points)
    moved = sweep.in_view(View(1, True, 0.0, 1.0, {}))
    assert (moved.num_dropped, moved.stored is sweep.stored) == (3, True)


def test_all_zero_is_a_sweep() -> None:
    assert not decode_sweep(bytes(160), config(intensity_max=255.0)).points.any()


def text(sweep: np.ndarray) -> bytes:
    data = "\n".join(" ".join(f"{v:.3f}" for v in row) for row in sweep).encode()
    return data[: len(data) // 16 * 16]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda s: b"", "empty"),
        (lambda s: s.tobytes() + b"1234567", "bad_size"),
        (lambda s: s.tobytes()[:-1], "bad_size"),
        (lambda s: np.full_like(s, np.nan).tobytes(), "not_finite"),
        (lambda s: np.full_like(s, np.inf).tobytes(), "not_finite"),
        (lambda s: s.astype(">f4").tobytes(), "out_of_range"),
        (lambda s: np.round(s).astype(">f4").tobytes(), "out_of_range"),
        (lambda s: np.full_like(s, 1.0).astype(">f4").tobytes(), "out_of_range"),
        (lambda s: s.astype("<f8").tobytes(), "out_of_range"),
        (lambda s: s.astype("<i4").tobytes(), "out_of_range|not_finite"),
        (lambda s: np.where(np.arange(500)[:, None] == 7, 1e30, s), "out_of_range"),
        (lambda s: (s * 1000).astype("<f4").tobytes(), "out_of_range"),
        (text, "out_of_range"),
        (lambda s: np.random.default_rng(0).bytes(1600), "out_of_range"),
    ],
)
def test_what_is_no_sweep_has_a_reason(make, reason, sweep_N4) -> None:  # type: ignore[no-untyped-def]
    made = make(sweep_N4)
    data = made if isinstance(made, bytes) else made.astype("<f4").tobytes()
    with pytest.raises(SampleError) as raised:
        decode_sweep(data, config(intensity_max=255.0))
    assert raised.value.reason in reason.split("|")


def test_a_view_without_geometry_gives_the_points_themselves(
    sweep_N4: np.ndarray,
) -> None:
    assert points_in_view(sweep_N4, XYZI, PLAIN) is sweep_N4
    sweep = decode_sweep(sweep_N4.tobytes(), config())
    assert sweep.in_view(PLAIN) is sweep


def test_flip_then_yaw_then_scale(sweep_N4: np.ndarray) -> None:
    before = sweep_N4.copy()
    view = View(1, True, 0.3, 1.1, {})
    moved = points_in_view(sweep_N4, XYZI, view)
    turn = np.array(
        [
            [math.cos(0.3), -math.sin(0.3), 0],
            [math.sin(0.3), math.cos(0.3), 0],
            [0, 0, 1],
        ]
    )
    expected = sweep_N4[:, :3] @ (1.1 * turn @ np.diag([1, -1, 1])).T
    np.testing.assert_allclose(moved[:, :3], expected, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(moved[:, 3], sweep_N4[:, 3])
    np.testing.assert_array_equal(sweep_N4, before)
    assert moved.dtype == np.float32


def test_the_member_that_a_sample_has_tells_the_format(sweep_N4: np.ndarray) -> None:
    stored = io.BytesIO()
    np.save(stored, sweep_N4)
    either = config(member=["NPY", "bin"])
    for members in ({"npy": stored.getvalue()}, {"bin": sweep_N4.tobytes()}):
        sweep = read_sweep(Sample("k", members, {}), either)
        np.testing.assert_array_equal(sweep.points, sweep_N4)
    with pytest.raises(SampleError, match=r"missing: no member .npy or .bin"):
        read_sweep(Sample("k", {}, {}), either)
    with pytest.raises(SampleError, match=r"^link: never followed"):
        read_sweep(Sample("k", {}, {"bin": "link: never followed"}), either)
    named = config(member="velodyne", format="bin")
    sweep = read_sweep(Sample("k", {"velodyne": sweep_N4.tobytes()}, {}), named)
    assert len(sweep.points) == 500
