"""LiDAR sweeps: bytes to points, and points in a view.

Shape suffixes: N points, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from manifests.inputs import PointsInput
from pipeline.samples.errors import SampleError
from pipeline.samples.views import View


@dataclass(frozen=True, eq=False)
class Sweep:
    """The points of a sweep that can be used.

    Attributes:
        points: float32 (N, C), finite, N at least 1.
        columns: what each of the C is.
        stored: (N,) int64, which point of the sweep as stored each is; None: the same.
        num_dropped: points as stored that are not among them.
    """

    points: np.ndarray
    columns: tuple[str, ...]
    stored: np.ndarray | None = None
    num_dropped: int = 0

    def in_view(self, view: View) -> Sweep:
        """Returns it as a view has it; itself where the view does nothing to it."""
        moved = points_in_view(self.points, self.columns, view)
        return self if moved is self.points else replace(self, points=moved)


MAX_RANGE_M = 10_000.0
"""No sensor sees farther; a coordinate beyond it is a wrong byte order or column."""
MIN_COORDINATE_M = 1e-6
"""No sensor resolves less; most coordinates below it are a wrong byte order or text."""


def decode_points(
    data: bytes, columns: Sequence[str], intensity_max: float
) -> np.ndarray:
    """Returns the points of a sweep, without those that have a non-finite value.

    Args:
        data: little-endian float32, row after row.
        columns: what each float32 of a row is; holds x, y, z in metres.
        intensity_max: full scale; the column ``intensity`` is divided by it.

    Returns:
        float32 array (N, C), N at least 1; a new, writable array.

    Raises:
        SampleError: ``empty``, ``bad_size`` (no whole number of rows), ``not_finite``
            (not one finite point) or ``out_of_range`` (a coordinate beyond 10 km, or
            more than half of those that are not 0 below a micrometre: bytes swapped,
            another data type or other columns).
    """
    if not data:
        raise SampleError("empty", "the sweep has 0 bytes")
    row_bytes = 4 * len(columns)
    if len(data) % row_bytes:
        raise SampleError(
            "bad_size",
            f"{len(data)} bytes are no multiple of {row_bytes} "
            f"({len(columns)} float32 columns)",
        )
    points_NC = np.frombuffer(data, "<f4").reshape(-1, len(columns))
    points_NC = points_NC[np.isfinite(points_NC).all(axis=1)]
    if not len(points_NC):
        raise SampleError("not_finite", "the sweep has no finite point")
    coordinates_N3 = np.abs(points_NC[:, _xyz(columns)])
    largest = float(coordinates_N3.max())
    if largest > MAX_RANGE_M:
        raise SampleError(
            "out_of_range",
            f"a coordinate of {largest:.3g} m, at most {MAX_RANGE_M:g} m make sense; "
            "check byte order, data type and columns",
        )
    num_nonzero = np.count_nonzero(coordinates_N3)
    num_tiny = num_nonzero - np.count_nonzero(coordinates_N3 >= MIN_COORDINATE_M)
    if 2 * num_tiny > num_nonzero:
        raise SampleError(
            "out_of_range",
            f"{num_tiny} of {num_nonzero} coordinates are below "
            f"{MIN_COORDINATE_M:g} m; "
            "check byte order, data type and columns",
        )
    result_NC: np.ndarray = points_NC.astype(np.float32)
    if "intensity" in columns:
        result_NC[:, list(columns).index("intensity")] /= np.float32(intensity_max)
    return result_NC


def decode_sweep(data: bytes, config: PointsInput) -> Sweep:
    """Returns the points of a sweep as its input declares them.

    Raises:
        SampleError: as `decode_points`.
    """
    points = decode_points(data, config.columns, config.intensity_max)
    return Sweep(points, config.columns)


def points_in_view(
    points: np.ndarray, columns: Sequence[str], view: View
) -> np.ndarray:
    """Returns the points as the view has them: mirrored (y to -y), turned, scaled.

    Args:
        points: float32 array (N, C); not changed.
        columns: what each column is. Only x, y, z are transformed.
        view: its yaw turns about z, from x towards y, in radians.

    Returns:
        float32 array (N, C); ``points`` itself where the view does nothing to them.
    """
    if not view.flip and view.yaw == 0 and view.scale == 1:
        return points
    x, y, z = _xyz(columns)
    x_N, y_N, z_N = (points[:, i].astype(np.float64) for i in (x, y, z))
    if view.flip:
        y_N = -y_N
    cosine, sine = math.cos(view.yaw), math.sin(view.yaw)
    moved_NC: np.ndarray = points.copy()
    moved_NC[:, x] = view.scale * (cosine * x_N - sine * y_N)
    moved_NC[:, y] = view.scale * (sine * x_N + cosine * y_N)
    moved_NC[:, z] = view.scale * z_N
    return moved_NC


def _xyz(columns: Sequence[str]) -> list[int]:
    names = list(columns)
    return [names.index(name) for name in ("x", "y", "z")]
