"""Sweeps: what is refused, and the transform of a view against matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.samples.errors import SampleError
from pipeline.samples.points import decode_points, points_in_view
from pipeline.samples.views import View

XYZI = ("x", "y", "z", "intensity")


@pytest.fixture
def sweep_N4() -> np.ndarray:
    rng = np.random.default_rng(0)
    xyz_N3 = rng.normal(0, 20, (500, 3))
    intensity_N1 = rng.uniform(0, 255, (500, 1))
    return np.hstack([xyz_N3, intensity_N1]).astype("<f4")


def test_points_come_back_with_intensity_scaled(sweep_N4: np.ndarray) -> None:
    points = decode_points(sweep_N4.tobytes(), XYZI, 255.0)
    assert points.dtype == np.float32
    assert points.flags.writeable
    np.testing.assert_array_equal(points[:, :3], sweep_N4[:, :3])
    np.testing.assert_array_equal(points[:, 3], sweep_N4[:, 3] / np.float32(255))


def test_columns_are_found_by_name(sweep_N4: np.ndarray) -> None:
    turned = sweep_N4[:, [3, 2, 1, 0]]
    points = decode_points(turned.tobytes(), ("intensity", "z", "y", "x"), 2.0)
    np.testing.assert_array_equal(points[:, 1:], turned[:, 1:])
    np.testing.assert_array_equal(points[:, 0], turned[:, 0] / 2)


def test_rows_that_are_not_finite_are_dropped(sweep_N4: np.ndarray) -> None:
    sweep_N4[3, 0], sweep_N4[9, 3], sweep_N4[11, 2] = np.nan, np.inf, -np.inf
    points = decode_points(sweep_N4.tobytes(), XYZI, 1.0)
    np.testing.assert_array_equal(points, np.delete(sweep_N4, [3, 9, 11], axis=0))


def test_all_zero_is_a_sweep() -> None:
    assert not decode_points(bytes(160), XYZI, 255.0).any()


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
        decode_points(data, XYZI, 255.0)
    assert raised.value.reason in reason.split("|")


def test_a_view_without_geometry_gives_the_points_themselves(
    sweep_N4: np.ndarray,
) -> None:
    assert points_in_view(sweep_N4, XYZI, View(0, False, 0.0, 1.0, {})) is sweep_N4


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
