"""Sweeps: a number of points, evenly chosen, with the columns a model takes.

Shape suffixes: B batch, N points of a sweep, P points given, C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from manifests.teacher import PreprocessConfig
from pipeline.samples.decoded import Decoded
from pipeline.samples.errors import SampleError
from pipeline.samples.points import NO_POINT, Sweep
from pipeline.samples.views import View
from teachers.errors import TeacherError
from teachers.inputs.spec import InputSpec, as_tensor
from teachers.interface import GroupInput

_XYZ = ("x", "y", "z")
_MIN_RADIUS = 1e-6


@dataclass(frozen=True)
class PointsSpec(InputSpec):
    """How a teacher takes a sweep: a fixed number of evenly chosen points.

    Attributes:
        columns: names of the columns given, in order.
        indices: where each of them stands in the sweep as decoded.
        num_points: rows given.
        centre: subtract the mean of x, y, z over the points given.
        unit_sphere: divide x, y, z by the largest radius (at least 1e-6).
        fill: what a smaller sweep is filled up with: itself from its start
            (``repeat``), or rows of NaN, which are no points (``nan``).
        exact: given in float32 whatever the teacher's precision: bfloat16 would move a
            point at 50 m by up to 0.25 m.
    """

    columns: tuple[str, ...]
    indices: tuple[int, ...]
    num_points: int
    centre: bool = False
    unit_sphere: bool = False
    kind: Literal["points"] = "points"
    fill: Literal["repeat", "nan"] = "repeat"
    exact: bool = False

    omitted: ClassVar[dict[str, Any]] = {"fill": "repeat", "exact": False}

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(P, C)."""
        return self.num_points, len(self.columns)

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """float32."""
        return np.dtype(np.float32)

    def choose(self, num: int) -> NDArray[np.int64]:
        """Returns which of ``num`` points are given: (P,), -1 where a row is none."""
        steps = np.arange(self.num_points, dtype=np.int64)
        if num >= self.num_points:
            return steps * num // self.num_points
        if self.fill == "repeat":
            return steps % num
        return np.where(steps < num, steps, -1)

    def stored_rows(self, sweep: Sweep) -> NDArray[np.uint32]:
        """Returns which points of the sweep as stored are given: (P,) uint32.

        Rows that are no point have `NO_POINT`.
        """
        chosen = self.choose(len(sweep.points))
        rows = chosen if sweep.stored is None else sweep.stored[chosen]
        return np.where(chosen < 0, NO_POINT, rows).astype(np.uint32)

    def prepare(self, value: Decoded, view: View, name: str) -> NDArray[np.generic]:
        """Returns float32 (P, C); see `InputSpec.prepare`.

        Raises:
            SampleError: the sweep has no point.
        """
        assert isinstance(value, Sweep)
        sweep_NC = value.points
        if not len(sweep_NC):
            raise SampleError("empty", "the sweep has no point")
        rows = self.choose(len(sweep_NC))
        points_PC = sweep_NC[rows][:, list(self.indices)]
        points_PC[rows < 0] = np.nan
        if self.centre or self.unit_sphere:
            xyz = [self.columns.index(column) for column in _XYZ]
            given = np.ix_(np.flatnonzero(rows >= 0), np.array(xyz))
            coordinates = points_PC[given]
            if self.centre:
                # In float64 the mean of equal points is that point: what is left of one
                # point, repeated, is 0 and no rounding that `unit_sphere` blows up.
                mean = coordinates.mean(axis=0, dtype=np.float64)
                coordinates = coordinates - mean.astype(np.float32)
            if self.unit_sphere:
                radius = np.sqrt((coordinates**2).sum(axis=1, dtype=np.float32)).max()
                coordinates = coordinates / np.maximum(radius, np.float32(_MIN_RADIUS))
            points_PC[given] = coordinates
        return np.ascontiguousarray(points_PC, dtype=np.float32)

    def to_tensor(
        self,
        batch: NDArray[np.generic],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns (B, P, C); see `InputSpec.to_tensor`."""
        return as_tensor(batch, device).to(torch.float32 if self.exact else dtype)

    def blank(self, device: torch.device | str) -> Tensor:
        """Returns zeros (1, P, C)."""
        return torch.zeros(1, *self.row_shape, device=device)


def points_spec(config: PreprocessConfig, item: GroupInput, where: str) -> PointsSpec:
    """Returns the spec of a sweep.

    Raises:
        TeacherError: the number of points is not given, or a column does not exist.
    """
    if config.points is None:
        raise TeacherError(
            f"{where}.preprocess.points must be given: the number of points of "
            f"{item.name} that the model takes"
        )
    columns = config.columns or _XYZ
    if absent := [name for name in columns if name not in item.columns]:
        raise TeacherError(
            f"{where}.preprocess.columns must be columns of {item.name} "
            f"({', '.join(item.columns)}), got {', '.join(absent)}"
        )
    centre, unit_sphere = bool(config.centre), bool(config.unit_sphere)
    if (centre or unit_sphere) and not set(_XYZ) <= set(columns):
        raise TeacherError(
            f"{where}.preprocess.columns must hold x, y and z for centre or "
            f"unit_sphere, got {', '.join(columns)}"
        )
    return PointsSpec(
        columns=tuple(columns),
        indices=tuple(item.columns.index(name) for name in columns),
        num_points=config.points,
        centre=centre,
        unit_sphere=unit_sphere,
    )
