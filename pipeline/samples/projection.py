"""The point table: which points of a sweep fall on which pixels of which cameras.

What image-to-LiDAR distillation pairs features by: a line per point and camera that
sees it. Computed from the sweep and calibration alone, never from an image, so it is
not stored: six cameras and 35,000 points take a few milliseconds.

Pixels are continuous, as in `calibration`: no rounding is applied. ScaLR takes the
pixel that holds a point (floor), SLidR the one at the nearest whole number (round).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from pipeline.samples.calibration import Calibration, project
from pipeline.samples.views import View

UNKNOWN = math.nan
"""A time, or a difference of times, that is not known."""


@dataclass(frozen=True)
class Camera:
    """An image that points can fall on.

    Attributes:
        calibration: of the full upright image.
        size: (height, width) of it in pixels.
        time: when it was taken, seconds; NaN where unknown.
    """

    calibration: Calibration
    size: tuple[int, int]
    time: float = UNKNOWN


@dataclass(frozen=True)
class ZBuffer:
    """How hidden points are told: a sensor sees past what stands before a camera.

    Attributes:
        cell_px: side of the cells that the nearest depth is kept of, upright pixels.
        margin_m: how far behind the nearest point of its cell a point is hidden.
    """

    cell_px: float = 8.0
    margin_m: float = 0.5


@dataclass(frozen=True, eq=False)
class PointTable:
    """Points in front of cameras and inside their images, by camera, then as stored.

    Attributes:
        cameras: names that ``camera`` counts.
        index: (M,) int64, number of the point in its sweep as stored.
        camera: (M,) int64, number of the camera.
        u: (M,) float64, pixels from the left edge.
        v: (M,) float64, pixels from the upper edge.
        depth: (M,) float64, metres along the camera's axis.
        dt: (M,) float64, time of the camera less that of the sweep, seconds; NaN where
            one is unknown.
        hidden: (M,) bool, whether another point lies in front; None where not asked.
    """

    cameras: tuple[str, ...]
    index: np.ndarray
    camera: np.ndarray
    u: np.ndarray
    v: np.ndarray
    depth: np.ndarray
    dt: np.ndarray
    hidden: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index)

    def where(self, chosen: np.ndarray) -> PointTable:
        """Returns some of its lines, of the same cameras.

        Args:
            chosen: (M,) bool or int64 numbers of lines.
        """
        columns = {name: values[chosen] for name, values in self._columns().items()}
        return replace(self, **columns)

    def in_view(
        self, view: View, name: str, size: tuple[float, float] | None = None
    ) -> PointTable:
        """Returns the points of one camera that a view sees, in the view's pixels.

        The same as projecting `points_in_view` with `calibration_for_view`.

        Args:
            view: flip, scale and the camera's box.
            name: the camera.
            size: (height, width) that its box is resized to; omitted: as it is.

        Raises:
            ValueError: the table has no such camera, or the view no box of it.
        """
        if name not in self.cameras or name not in view.boxes:
            raise ValueError(
                f"camera must be one of the table's ({', '.join(self.cameras)}) and "
                f"have a box in the view ({', '.join(view.boxes)}), got {name}"
            )
        x0, y0, x1, y1 = view.boxes[name]
        height, width = size or (y1 - y0, x1 - x0)
        one = self.where(self.camera == self.cameras.index(name))
        u = (one.u - x0) * (width / (x1 - x0))
        v = (one.v - y0) * (height / (y1 - y0))
        if view.flip:
            u = width - u
        moved = replace(one, u=u, v=v, depth=one.depth * view.scale)
        return moved.where((u >= 0) & (u < width) & (v >= 0) & (v < height))

    @classmethod
    def joined(cls, tables: Sequence[PointTable], cameras: Sequence[str]) -> PointTable:
        """Returns one table of several of the same cameras, in order."""
        names = tuple(cameras)
        if not tables:
            none = np.empty(0)
            numbers = np.empty(0, np.int64)
            return cls(names, numbers, numbers, none, none, none, none)
        parts = [table._columns() for table in tables]
        columns = {
            name: np.concatenate([one[name] for one in parts]) for name in parts[0]
        }
        return cls(names, **columns)

    def _columns(self) -> dict[str, Any]:
        names = [field.name for field in fields(self) if field.name != "cameras"]
        found = {name: getattr(self, name) for name in names}
        return {name: values for name, values in found.items() if values is not None}


def project_sweep(
    points_xyz: np.ndarray,
    cameras: Mapping[str, Camera | None],
    *,
    time: float = UNKNOWN,
    stored: np.ndarray | None = None,
    min_depth_m: float = 0.0,
    occlusion: ZBuffer | None = None,
) -> PointTable:
    """Returns which points fall on which pixels, in upright pixels of the full images.

    A point is seen where its depth is above ``min_depth_m`` and 0 <= u < width and
    0 <= v < height.

    Args:
        points_xyz: (N, 3) or more columns of which the first three are used; metres,
            of the sweep itself, not of a view.
        cameras: by name; a camera of which nothing is known is None, sees nothing and
            keeps its number.
        time: of the sweep, seconds; NaN where unknown.
        stored: (N,) int64, `Sweep.stored`; None: points are as stored.
        min_depth_m: nuScenes' tools leave out what is nearer than 1 m.
        occlusion: how hidden points are told; None: they are not.
    """
    names = tuple(cameras)
    xyz_N3 = np.asarray(points_xyz, np.float64)[:, :3]
    found = []
    for number, camera in enumerate(cameras.values()):
        if camera is None:
            continue
        uv_N2, depth_N = project(xyz_N3, camera.calibration)
        u_N, v_N = uv_N2.T
        height, width = camera.size
        seen = (depth_N > min_depth_m) & (u_N >= 0) & (u_N < width)
        seen_M = np.flatnonzero(seen & (v_N >= 0) & (v_N < height))
        u_M, v_M, depth_M = u_N[seen_M], v_N[seen_M], depth_N[seen_M]
        table = PointTable(
            cameras=names,
            index=seen_M if stored is None else stored[seen_M],
            camera=np.full(len(seen_M), number),
            u=u_M,
            v=v_M,
            depth=depth_M,
            dt=np.full(len(seen_M), camera.time - time),
        )
        if occlusion is not None:
            is_hidden = _is_hidden(u_M, v_M, depth_M, width, occlusion)
            table = replace(table, hidden=is_hidden)
        found.append(table)
    return PointTable.joined(found, names)


def _is_hidden(
    u: np.ndarray, v: np.ndarray, depth: np.ndarray, width: int, config: ZBuffer
) -> np.ndarray:
    num_columns = math.ceil(width / config.cell_px)
    cells = (v // config.cell_px).astype(np.int64) * num_columns
    cells += (u // config.cell_px).astype(np.int64)
    nearest = np.full(cells.max(initial=0) + 1, np.inf)
    np.minimum.at(nearest, cells, depth)
    is_hidden: np.ndarray = depth > nearest[cells] + config.margin_m
    return is_hidden
