"""LiDAR sweeps: bytes to points, and points in a view.

Owns what makes a sweep usable, whatever its format; `point_formats` reads the files.

Shape suffixes: N points, C columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from manifests.inputs import PointsInput
from pipeline.samples.errors import SampleError
from pipeline.samples.members import find_member, members_of
from pipeline.samples.point_columns import Columns, check_bounds
from pipeline.samples.point_formats import find_reader
from pipeline.samples.shards import Sample
from pipeline.samples.views import View

NO_POINT = 2**32 - 1
"""Number of what is no point: padding of a small sweep, or a row without one."""


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


def read_sweep(sample: Sample, config: PointsInput) -> Sweep:
    """Returns the sweep of a sample as its input declares it.

    Raises:
        SampleError: there is no such member, or as `decode_sweep`.
    """
    names = members_of(config)
    data = find_member(sample, names)
    member = next(name for name in names if name in sample.members)
    return decode_sweep(data, config, member)


def decode_sweep(data: bytes, config: PointsInput, member: str | None = None) -> Sweep:
    """Returns the points of a sweep, without those that have a non-finite value.

    Args:
        data: bytes of the member.
        config: format, columns and full intensity.
        member: the member's extension, where it tells the format; omitted: the first
            that the input may have.

    Raises:
        SampleError: ``empty``, ``not_finite`` (not one finite point), ``bad_type``,
            ``bad_size``, ``out_of_range`` (a coordinate beyond 10 km, or more than half
            of those that are not 0 below a micrometre: bytes swapped, another data type
            or other columns), or what the format's reader says.
        ManifestError: there is no such format.
    """
    reader = find_reader(config, member or members_of(config)[0])
    if not data:
        raise SampleError("empty", "the sweep has 0 bytes")
    stored_NC = _as_matrix(reader(data, config.columns), config)
    is_finite_N = np.isfinite(stored_NC).all(axis=1)
    stored = None if is_finite_N.all() else np.flatnonzero(is_finite_N)
    points_NC = stored_NC if stored is None else stored_NC[stored]
    if not len(points_NC):
        raise SampleError("not_finite", "the sweep has no finite point")
    _check_range(np.abs(points_NC[:, _xyz(config.columns)]))
    num_dropped = len(stored_NC) - len(points_NC)
    return Sweep(points_NC, config.columns, stored, num_dropped)


def _as_matrix(found: Columns, config: PointsInput) -> np.ndarray:
    """Returns a new float32 (N, C) of the columns in order, intensity scaled."""
    columns = config.columns
    lengths = {name: found[name].shape for name in columns}
    for name, shape in lengths.items():
        kind = found[name].dtype
        if kind.kind not in "fiu" or len(shape) != 1:
            raise SampleError("bad_type", f"column {name!r} is {kind} of shape {shape}")
    if len(set(lengths.values())) > 1:
        raise SampleError("bad_size", f"columns differ in length: {lengths}")
    num_points = len(found[columns[0]])
    if not num_points:
        raise SampleError("empty", "the sweep has 0 points")
    check_bounds(num_points, 0)
    matrix_NC = np.empty((num_points, len(columns)), np.float32)
    # What float32 cannot hold becomes infinite, and is dropped and counted.
    with np.errstate(all="ignore"):
        for number, name in enumerate(columns):
            matrix_NC[:, number] = found[name]
        if "intensity" in columns:
            column = columns.index("intensity")
            matrix_NC[:, column] /= np.float32(config.intensity_max)
    return matrix_NC


def _check_range(coordinates_N3: np.ndarray) -> None:
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
