"""Every model's features on one bird's-eye grid, by where things are in metres.

A camera's grid is looked at where cells project to; a grid that lies in the LiDAR's
frame already is resampled. Both are fixed: nothing is learned before the probe. Cells
and metres are of view 0, which has no flip, turn or scale.

Shape suffixes: B rows, R and K rows and columns of the probe's grid, r and k of a
teacher's, Z heights, N points, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from manifests.teacher import BevExtent
from pipeline.bank.open import Bank
from pipeline.samples.calibration import Calibration, calibration_in_view
from student_train.grids import sample_grid
from student_train.heads import BevGrid, bev_cell_centres, project_cells
from student_train.inputs import Size

Bools = npt.NDArray[np.bool_]
Int64s = npt.NDArray[np.int64]
Shape = tuple[int, ...]


def bev_grid(extent: BevExtent, cells: Size) -> BevGrid:
    """Returns a grid of so many rows and columns over an extent."""
    return BevGrid(
        x_m=extent.x_m,
        y_m=extent.y_m,
        cells=cells,
        row_0=extent.row_0,
        column_0=extent.column_0,
    )


@dataclass(frozen=True, eq=False)
class CameraCells:
    """What a camera's grid shows at the cells' heights, one behind the other.

    Attributes:
        grid: the probe's.
        points_N3: (R K Z, 3) float32, heights innermost, metres.
        intrinsics_B33: float32, for every row of the bank; pixels of view 0 whose box
            has width and height 1.
        lidar2cam_B44: the same.
        known: (num_rows,) which rows have both.
    """

    grid: BevGrid
    points_N3: Tensor
    intrinsics_B33: Tensor
    lidar2cam_B44: Tensor
    known: Bools

    @classmethod
    def open(
        cls, bank: Bank, name: str, grid: BevGrid, heights_m: Sequence[float]
    ) -> CameraCells:
        """Returns the looks of an image input, which has calibration in the bank.

        Args:
            bank: an open bank.
            name: of the input.
            grid: the probe's.
            heights_m: z in the LiDAR's frame.

        Raises:
            BankError: an array of the bank cannot be read.
        """
        intrinsics, lidar2cam = (
            bank.whole_array(f"calibration/{name}_{kind}")
            for kind in ("intrinsics", "lidar2cam")
        )
        boxes = bank.whole_array(f"views/{name}_box")[:, 0]
        known = (
            np.isfinite(intrinsics).all((1, 2))
            & np.isfinite(lidar2cam).all((1, 2))
            & (boxes[:, 2:] > boxes[:, :2]).all(1)
        )
        in_view = np.zeros(intrinsics.shape)
        for row in np.flatnonzero(known).tolist():
            full = Calibration(intrinsics[row], lidar2cam[row])
            x0, y0, x1, y1 = map(float, boxes[row])
            seen = calibration_in_view(full, (x0, y0, x1, y1), False, (1, 1))
            in_view[row] = seen.intrinsics
        xy_RK2 = bev_cell_centres(grid)
        rows, columns = grid.cells
        z_Z = torch.tensor(heights_m, dtype=torch.float32)
        points_RKZ3 = torch.cat(
            [
                xy_RK2[:, :, None].expand(rows, columns, len(z_Z), 2),
                z_Z[:, None].expand(rows, columns, len(z_Z), 1),
            ],
            -1,
        )
        return cls(
            grid,
            points_RKZ3.reshape(-1, 3),
            torch.from_numpy(in_view.astype(np.float32)),
            torch.from_numpy(np.nan_to_num(lidar2cam).astype(np.float32)),
            known,
        )

    def row_shape(self, shape: Shape) -> Shape:
        """Returns (R, K, Z C)."""
        num_heights = len(self.points_N3) // (self.grid.cells[0] * self.grid.cells[1])
        return *self.grid.cells, num_heights * shape[-1]

    def __call__(self, values: Tensor, rows: Int64s) -> Tensor:
        """Returns (B, R, K, Z C) float32 of (B, H, W, C); 0 where it does not see."""
        points_BN2, visible_BN = self._project(rows)
        values_BNC, _ = sample_grid(values, points_BN2.to(values.device))
        values_BNC = values_BNC * visible_BN.to(values.device)[..., None]
        return values_BNC.reshape(len(rows), *self.row_shape(tuple(values.shape)))

    def sees(self, rows: Int64s) -> Tensor:
        """Returns (B, R, K) bool: whether the camera sees a cell at all heights."""
        pieces = [
            self._project(piece)[1].reshape(len(piece), *self.grid.cells, -1).all(-1)
            for piece in np.array_split(rows, max(1, len(rows) // 64))
        ]
        return torch.cat(pieces)

    def _project(self, rows: Int64s) -> tuple[Tensor, Tensor]:
        places = torch.from_numpy(rows)
        return project_cells(
            self.points_N3,
            self.intrinsics_B33[places],
            self.lidar2cam_B44[places],
            (1, 1),
        )


@dataclass(frozen=True, eq=False)
class MetricCells:
    """A bird's-eye grid of a teacher on the probe's cells, antialiased bilinear.

    Attributes:
        rows_Rr: (R, r) float32 weights; each row sums to 1, or is 0 outside.
        columns_Kk: (K, k) float32, the same.
    """

    rows_Rr: Tensor
    columns_Kk: Tensor

    @classmethod
    def between(cls, teacher: BevGrid, probe: BevGrid) -> MetricCells:
        """Returns the resampling from a teacher's grid to the probe's."""
        centres_RK2 = bev_cell_centres(probe).double()
        return cls(
            _axis_weights(
                centres_RK2[:, 0, 0],
                (probe.x_m[1] - probe.x_m[0]) / probe.cells[0],
                teacher.x_m,
                teacher.cells[0],
                descending=teacher.row_0 == "x_max",
            ),
            _axis_weights(
                centres_RK2[0, :, 1],
                (probe.y_m[1] - probe.y_m[0]) / probe.cells[1],
                teacher.y_m,
                teacher.cells[1],
                descending=teacher.column_0 == "y_max",
            ),
        )

    @property
    def covered_RK(self) -> Tensor:
        """(R, K) bool: whether a cell's centre lies in the teacher's extent."""
        return self.rows_Rr.any(1)[:, None] & self.columns_Kk.any(1)

    def row_shape(self, shape: Shape) -> Shape:
        """Returns (R, K, C)."""
        return len(self.rows_Rr), len(self.columns_Kk), shape[-1]

    def __call__(self, values: Tensor, rows: Int64s) -> Tensor:
        """Returns (B, R, K, C) float32 of (B, r, k, C); 0 outside its extent."""
        rows_Rr = self.rows_Rr.to(values.device)
        columns_Kk = self.columns_Kk.to(values.device)
        along = torch.einsum("Rr,BrkC->BRkC", rows_Rr, values.float())
        return torch.einsum("Kk,BRkC->BRKC", columns_Kk, along)


def _axis_weights(
    centres_N: Tensor,
    cell_m: float,
    ends_m: tuple[float, float],
    num_cells: int,
    *,
    descending: bool,
) -> Tensor:
    """Returns (N, num_cells) float32: a triangle around each centre, cut at the ends.

    It is as wide as two cells of the coarser grid, so that a finer grid is averaged.

    Args:
        centres_N: (N,) float64 of the new cells, metres.
        cell_m: side of a new cell, metres.
        ends_m: lowest and highest metre that the old cells cover.
        num_cells: of the old.
        descending: whether the first old cell lies at the highest metre.
    """
    step_m = (ends_m[1] - ends_m[0]) / num_cells
    places_N = (centres_N - ends_m[0]) / step_m
    if descending:
        places_N = num_cells - places_N
    cells = torch.arange(num_cells, dtype=torch.float64) + 0.5
    distance = (places_N[:, None] - cells).abs() / max(1.0, cell_m / step_m)
    weights = (1 - distance).clamp_min(0)
    inside_N = (places_N >= 0) & (places_N <= num_cells)
    weights = weights * inside_N[:, None]
    return (weights / weights.sum(1, keepdim=True).clamp_min(1e-12)).float()
