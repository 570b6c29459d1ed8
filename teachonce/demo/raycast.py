"""Vectorised ray casting: what each ray of a sensor meets first, and how far away.

Camera, LiDAR and the sun's shadows use the same function on the same table. Each
primitive is tried only on the window of the ray grid that its bounding box covers, in
closed form: all windows together have about as many rays as the grid.

Rows of a grid are H, columns W; distances are along unit rays, metres.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.objects import Floats, Objects, Shape

Int32s = NDArray[np.int32]
Vector = tuple[Floats, Floats, Floats]

#: Object number of a ray that meets the ground, and of one that meets nothing.
GROUND, SKY = -1, -2

_NEAR_M = 0.1
_EDGES = np.array(
    [(a, b) for a in range(8) for b in range(a + 1, 8) if bin(a ^ b).count("1") == 1]
)


@dataclass(frozen=True)
class Hits:
    """What each ray meets first.

    Attributes:
        range_HW: float32 distance along the ray, metres; inf for the sky.
        object_HW: int32 row of the primitive, ``GROUND`` or ``SKY``.
    """

    range_HW: Floats
    object_HW: Int32s


class RayGrid(Protocol):
    """Rays in rows and columns, and the windows of them that boxes cover."""

    @property
    def origin(self) -> Vector:
        """Where rays start: three float32 arrays that broadcast to (H, W)."""

    @property
    def direction(self) -> Vector:
        """Unit directions: three float32 arrays that broadcast to (H, W)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""

    def windows(self, objects: Objects) -> NDArray[np.int64]:
        """Returns (object, first row, end row, first column, end column), int (M, 5).

        Every ray that meets an object lies in one of its windows.
        """


def cast(grid: RayGrid, objects: Objects, farthest_m: float) -> Hits:
    """Returns what each ray of ``grid`` meets within ``farthest_m``.

    A primitive that holds the ray's origin is not seen.
    """
    height, width = grid.shape
    best_HW = np.full((height, width), np.inf, np.float32)
    which_HW = np.full((height, width), SKY, np.int32)
    with np.errstate(divide="ignore", invalid="ignore"):
        ground_HW = np.broadcast_to(-grid.origin[2] / grid.direction[2], grid.shape)
        is_ground = (ground_HW > 0) & (ground_HW < farthest_m)
        best_HW[is_ground] = ground_HW[is_ground]
        which_HW[is_ground] = GROUND
        cos_N, sin_N = np.cos(objects.yaw_N), np.sin(objects.yaw_N)
        for number, top, end, left, right in grid.windows(objects).tolist():
            window = (slice(top, end), slice(left, right))
            turn = (float(cos_N[number]), float(sin_N[number]))
            center, half = objects.center_N3[number], objects.half_N3[number]
            offset = tuple(
                _cut(axis, window) - center[k] for k, axis in enumerate(grid.origin)
            )
            start = _to_unit(offset, turn, half)
            way = _to_unit([_cut(axis, window) for axis in grid.direction], turn, half)
            found = _MEET[objects.shape_N[number]](start, way)
            best = best_HW[window]
            is_nearer = found < best
            is_nearer &= found < farthest_m
            best[is_nearer] = np.broadcast_to(found, best.shape)[is_nearer]
            which_HW[window][is_nearer] = number
    return Hits(best_HW, which_HW)


def _cut(axis: Floats, window: tuple[slice, slice]) -> Floats:
    rows = window[0] if axis.shape[0] > 1 else slice(None)
    columns = window[1] if axis.shape[1] > 1 else slice(None)
    return axis[rows, columns]


def _to_unit(
    vector: tuple[Floats, ...] | list[Floats], turn: tuple[float, float], half: Floats
) -> Vector:
    """Returns a world vector in a primitive's axes, divided by its half extents."""
    cos, sin = turn
    x, y, z = vector
    return (
        x * np.float32(cos / half[0]) + y * np.float32(sin / half[0]),
        y * np.float32(cos / half[1]) - x * np.float32(sin / half[1]),
        z * np.float32(1 / half[2]),
    )


# --- first meetings with unit shapes: distance, or inf or NaN where there is none -----


def _slab(start: Floats, way: Floats) -> tuple[Floats, Floats]:
    inverse = np.float32(1) / way
    middle = -start * inverse
    reach = np.abs(inverse)
    return middle - reach, middle + reach


def _visible(enter: Floats, leave: Floats) -> Floats:
    """Returns ``enter`` where it is ahead and before ``leave``, else inf."""
    is_met = (enter <= leave) & (enter > 0)
    return np.where(is_met, enter, np.float32(np.inf))


def _meet_box(start: Vector, way: Vector) -> Floats:
    enter, leave = _slab(start[0], way[0])
    for k in (1, 2):
        near, far = _slab(start[k], way[k])
        enter, leave = np.maximum(enter, near), np.minimum(leave, far)
    return _visible(enter, leave)


def _meet_ellipsoid(start: Vector, way: Vector) -> Floats:
    a = way[0] * way[0] + way[1] * way[1] + way[2] * way[2]
    b = start[0] * way[0] + start[1] * way[1] + start[2] * way[2]
    c = start[0] * start[0] + start[1] * start[1] + start[2] * start[2] - 1
    found = (-b - np.sqrt(b * b - a * c)) / a
    return np.where(found > 0, found, np.float32(np.inf))


def _meet_cylinder(start: Vector, way: Vector) -> Floats:
    a = way[0] * way[0] + way[1] * way[1]
    b = start[0] * way[0] + start[1] * way[1]
    c = start[0] * start[0] + start[1] * start[1] - 1
    root = np.sqrt(b * b - a * c)
    near, far = _slab(start[2], way[2])
    return _visible(np.maximum((-b - root) / a, near), np.minimum((-b + root) / a, far))


def _meet_gable(start: Vector, way: Vector) -> Floats:
    enter, leave = _slab(start[0], way[0])
    for side in (-2.0, 2.0):
        enter, leave = _clip(
            start[2] + side * start[1] - 1, way[2] + side * way[1], enter, leave
        )
    enter, leave = _clip(-1 - start[2], -way[2], enter, leave)
    return _visible(enter, leave)


def _clip(
    outside: Floats, rate: Floats, enter: Floats, leave: Floats
) -> tuple[Floats, Floats]:
    """Keeps the part of [enter, leave] where ``outside + t rate`` is not positive."""
    at = -outside / rate
    return (
        np.where(rate < 0, np.maximum(enter, at), enter),
        np.where(rate > 0, np.minimum(leave, at), leave),
    )


def _meet_cone(start: Vector, way: Vector) -> Floats:
    """A cone is where x^2 + y^2 <= w^2 with w = (1 - z) / 2, for w from 0 to 1."""
    width, rate = (1 - start[2]) / 2, way[2] / -2
    a = way[0] * way[0] + way[1] * way[1] - rate * rate
    b = start[0] * way[0] + start[1] * way[1] - width * rate
    c = start[0] * start[0] + start[1] * start[1] - width * width
    root = np.sqrt(b * b - a * c)
    nearest = np.full(np.broadcast_shapes(a.shape, b.shape), np.inf, np.float32)
    for sign in (-1, 1):
        found = (-b + sign * root) / a
        at = width + found * rate
        is_met = (found > 0) & (at >= 0) & (at <= 1) & (found < nearest)
        nearest = np.where(is_met, found, nearest)
    found = (-1 - start[2]) / way[2]
    x, y = start[0] + found * way[0], start[1] + found * way[1]
    is_met = (found > 0) & (x * x + y * y <= 1) & (found < nearest)
    return np.where(is_met, found, nearest)


_MEET = {
    int(Shape.BOX): _meet_box,
    int(Shape.ELLIPSOID): _meet_ellipsoid,
    int(Shape.CYLINDER): _meet_cylinder,
    int(Shape.GABLE): _meet_gable,
    int(Shape.CONE): _meet_cone,
}


# --- the three grids of rays ----------------------------------------------------------


def _row(values: NDArray[np.float64]) -> Floats:
    return np.ascontiguousarray(values, np.float32)


def _point(place_3: NDArray[np.float64]) -> Vector:
    x, y, z = (np.full((1, 1), value, np.float32) for value in place_3)
    return x, y, z


def _windows(bounds_N4: Floats, shape: tuple[int, int]) -> NDArray[np.int64]:
    """Returns windows from float bounds (top, end, left, right)."""
    height, width = shape
    limit_4 = np.array([height, height, width, width], np.float32)
    whole_N4 = np.clip(np.nan_to_num(bounds_N4, nan=0.0), 0, limit_4)
    whole_N4[:, [0, 2]] = np.floor(whole_N4[:, [0, 2]])
    whole_N4[:, [1, 3]] = np.ceil(whole_N4[:, [1, 3]])
    is_seen = (whole_N4[:, 0] < whole_N4[:, 1]) & (whole_N4[:, 2] < whole_N4[:, 3])
    number_M = np.flatnonzero(is_seen)
    return np.column_stack([number_M, whole_N4[number_M].astype(np.int64)])


class CameraGrid:
    """A pinhole camera's rays through the pixels' centres."""

    def __init__(
        self,
        intrinsics_33: NDArray[np.float64],
        ego2cam_44: NDArray[np.float64],
        height: int,
        width: int,
    ) -> None:
        self._intrinsics, self._ego2cam = intrinsics_33, ego2cam_44
        turn_33 = ego2cam_44[:3, :3].T
        place_3 = -turn_33 @ ego2cam_44[:3, 3]
        x_1W = (np.arange(width)[None] + 0.5 - intrinsics_33[0, 2]) / intrinsics_33[
            0, 0
        ]
        y_H1 = (np.arange(height)[:, None] + 0.5 - intrinsics_33[1, 2]) / intrinsics_33[
            1, 1
        ]
        self.shape = (height, width)
        self.origin = _point(place_3)
        #: float32 (H, W): depth along the optical axis per metre of ray.
        self.cosine_HW = _row(1 / np.sqrt(1 + x_1W**2 + y_H1**2))
        x, y, z = (
            _row(turn_33[k, 0] * x_1W + turn_33[k, 1] * y_H1 + turn_33[k, 2])
            * self.cosine_HW
            for k in range(3)
        )
        self.direction = (x, y, z)

    def windows(self, objects: Objects) -> NDArray[np.int64]:
        """See ``RayGrid``; boxes are clipped at a near plane, then projected."""
        corners_N83 = objects.corners().astype(np.float64)
        seen_N83 = corners_N83 @ self._ego2cam[:3, :3].T + self._ego2cam[:3, 3]
        first, second = seen_N83[:, _EDGES[:, 0]], seen_N83[:, _EDGES[:, 1]]
        with np.errstate(divide="ignore", invalid="ignore"):
            share = (_NEAR_M - first[..., 2]) / (second[..., 2] - first[..., 2])
            border = first + share[..., None] * (second - first)
            points = np.concatenate([seen_N83, border], axis=1)
            is_ahead = np.concatenate(
                [seen_N83[..., 2] >= _NEAR_M, (share >= 0) & (share <= 1)], axis=1
            )
            u = points[..., 0] / points[..., 2] * self._intrinsics[0, 0]
            v = points[..., 1] / points[..., 2] * self._intrinsics[1, 1]
        u, v = u + self._intrinsics[0, 2], v + self._intrinsics[1, 2]
        low_u = np.where(is_ahead, u, np.inf).min(axis=1) - 1
        low_v = np.where(is_ahead, v, np.inf).min(axis=1) - 1
        high_u = np.where(is_ahead, u, -np.inf).max(axis=1) + 1
        high_v = np.where(is_ahead, v, -np.inf).max(axis=1) + 1
        bounds_N4 = np.stack([low_v, high_v, low_u, high_u], axis=1).astype(np.float32)
        return _windows(bounds_N4, self.shape)


class SweepGrid:
    """A turning LiDAR's rays: row = ring (0 lowest), column = azimuth from -pi up."""

    def __init__(
        self,
        place_3: NDArray[np.float64],
        elevations_H: NDArray[np.float64],
        azimuths: int,
        farthest_m: float,
    ) -> None:
        self._elevations, self._farthest_m = elevations_H, farthest_m
        self._step = 2 * np.pi / azimuths
        azimuth_1W = (np.arange(azimuths)[None] + 0.5) * self._step - np.pi
        rise_H1 = elevations_H[:, None]
        self.shape = (len(elevations_H), azimuths)
        self.place_3 = place_3.astype(np.float32)
        self.origin = _point(place_3)
        self.direction = (
            _row(np.cos(rise_H1) * np.cos(azimuth_1W)),
            _row(np.cos(rise_H1) * np.sin(azimuth_1W)),
            _row(np.sin(rise_H1)),
        )

    def windows(self, objects: Objects) -> NDArray[np.int64]:
        """See ``RayGrid``; a box across the seam behind the car has two windows."""
        offset_N83 = objects.corners() - self.place_3
        away_N8 = np.hypot(offset_N83[..., 0], offset_N83[..., 1])
        beyond_N3 = np.abs(objects.local(self.place_3)) - objects.half_N3
        near_N = np.hypot(*np.maximum(beyond_N3[:, :2], 0).T)
        far_N = away_N8.max(axis=1)
        top_N, low_N = offset_N83[..., 2].max(axis=1), offset_N83[..., 2].min(axis=1)
        rise_N = np.arctan2(top_N, np.where(top_N > 0, near_N, far_N))
        fall_N = np.arctan2(low_N, np.where(low_N < 0, near_N, far_N))
        first_N = np.searchsorted(self._elevations, fall_N - 1e-3)
        end_N = np.searchsorted(self._elevations, rise_N + 1e-3)
        middle_N = np.arctan2(
            offset_N83[..., 1].mean(axis=1), offset_N83[..., 0].mean(axis=1)
        )
        turn_N8 = np.arctan2(offset_N83[..., 1], offset_N83[..., 0]) - middle_N[:, None]
        turn_N8 = np.mod(turn_N8 + np.pi, 2 * np.pi) - np.pi
        is_around = near_N <= 0
        left_N = np.where(is_around, -np.pi, middle_N + turn_N8.min(axis=1))
        right_N = np.where(is_around, np.pi, middle_N + turn_N8.max(axis=1))
        columns_N2 = (np.stack([left_N, right_N], axis=1) + np.pi) / self._step
        columns_N2 += np.array([-1.5, 0.5])
        is_far = near_N > self._farthest_m
        parts = []
        for shift in (-self.shape[1], 0, self.shape[1]):
            bounds_N4 = np.stack(
                [first_N, end_N, *(columns_N2 + shift).T], axis=1
            ).astype(np.float32)
            bounds_N4[is_far] = 0
            parts.append(_windows(bounds_N4, self.shape))
        return np.concatenate(parts)


class SunGrid:
    """Parallel rays from the sun on a raster of ground points: a shadow map.

    Cell (i, j) holds the ray that would meet the ground at
    x = x_m[0] + (i + .5) cell_m, y = y_m[0] + (j + .5) cell_m; it starts ``height_m``
    above.
    """

    def __init__(
        self,
        sun_3: NDArray[np.float64],
        x_m: tuple[float, float],
        y_m: tuple[float, float],
        cell_m: float,
        height_m: float,
    ) -> None:
        self.shape = (
            round((x_m[1] - x_m[0]) / cell_m),
            round((y_m[1] - y_m[0]) / cell_m),
        )
        self.height_m = height_m
        self._low, self._cell_m = (x_m[0], y_m[0]), cell_m
        self._lean = (sun_3[0] / sun_3[2], sun_3[1] / sun_3[2])
        x_H = x_m[0] + (np.arange(self.shape[0]) + 0.5) * cell_m
        y_W = y_m[0] + (np.arange(self.shape[1]) + 0.5) * cell_m
        self.origin = (
            _row(x_H[:, None] + self._lean[0] * height_m),
            _row(y_W[None] + self._lean[1] * height_m),
            np.full((1, 1), height_m, np.float32),
        )
        self.direction = _point(-sun_3)
        self._sun_z = float(sun_3[2])

    def cells(self, x_P: Floats, y_P: Floats, z_P: Floats) -> tuple[Floats, Floats]:
        """Returns the (row, column), fractional, of the ray through each point."""
        return (
            (x_P - z_P * np.float32(self._lean[0]) - np.float32(self._low[0]))
            * np.float32(1 / self._cell_m),
            (y_P - z_P * np.float32(self._lean[1]) - np.float32(self._low[1]))
            * np.float32(1 / self._cell_m),
        )

    def top(self, hits: Hits) -> Floats:
        """Returns how high above the ground each ray first meets something, metres."""
        return np.float32(self.height_m) - hits.range_HW * np.float32(self._sun_z)

    def windows(self, objects: Objects) -> NDArray[np.int64]:
        """See ``RayGrid``."""
        corners_N83 = objects.corners()
        row_N8, column_N8 = self.cells(
            corners_N83[..., 0], corners_N83[..., 1], corners_N83[..., 2]
        )
        bounds_N4 = np.stack(
            [
                row_N8.min(axis=1) - 1,
                row_N8.max(axis=1) + 1,
                column_N8.min(axis=1) - 1,
                column_N8.max(axis=1) + 1,
            ],
            axis=1,
        )
        return _windows(bounds_N4, self.shape)
