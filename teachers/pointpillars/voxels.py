"""Sweeps into pillars: hard voxelisation, batched and without a loop over points.

Points are taken in the order given: a pillar keeps its first ``max_points``, and of the
pillars, in the order in which they first appear, the first ``max_pillars`` are kept.
That is what spconv's and mmcv's voxelisation on the CPU do, point by point. Here it is
one stable sort and a few gathers, so it is deterministic on any device, a row does not
depend on its neighbours, and no shape depends on values: it runs on the meta device and
never makes an accelerator wait.

Source: mmcv, ``hard_voxelize_forward`` (CPU); spconv, ``points_to_voxel``.

Shape suffixes: B batch, P points, C columns, K pillars, M points of a pillar.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class PillarGrid:
    """Where pillars stand and how many points and pillars are kept.

    Attributes:
        voxel_size: x, y, z of a pillar, metres.
        lowest, highest: corners of the box that is looked at, metres.
        max_points: most points of a pillar.
        max_pillars: most pillars of a sweep.
    """

    voxel_size: Triple
    lowest: Triple
    highest: Triple
    max_points: int
    max_pillars: int

    @property
    def cells(self) -> tuple[int, int, int]:
        """Number of cells along x, y and z."""
        sides = zip(self.lowest, self.highest, self.voxel_size, strict=True)
        x, y, z = (round((high - low) / size) for low, high, size in sides)
        return x, y, z

    @property
    def num_cells(self) -> int:
        """Cells of the canvas; pillars are as high as the box."""
        return self.cells[0] * self.cells[1]


@dataclass(frozen=True)
class Pillars:
    """The points of a batch of sweeps, grouped by pillar.

    Points stand sorted by cell, those of a cell in the order given. A sweep has room
    for K pillars; those it has come first, in the order in which they first appear.

    Attributes:
        points_BPC: float32; 0 where a row is no point.
        slot_BP: int64, pillar of each point; K where it is not kept.
        rank_BP: int64, place of a point in its pillar.
        cell_BK: int64, cell ``iy * nx + ix`` of each pillar; ``num_cells`` for none.
        count_BK: int64, points kept of each pillar.
    """

    points_BPC: Tensor
    slot_BP: Tensor
    rank_BP: Tensor
    cell_BK: Tensor
    count_BK: Tensor

    @property
    def num_slots(self) -> int:
        """K."""
        return self.cell_BK.shape[1]


def cells_of(points_BPC: Tensor, grid: PillarGrid) -> Tensor:
    """Returns the cell of each point: (B, P) int64, ``grid.num_cells`` outside the box.

    Args:
        points_BPC: float32, x, y, z first; a NaN there is a row without a point.
        grid: of pillars.
    """
    device = points_BPC.device
    # By a tensor, not by numbers: CUDA would multiply by the rounded inverse.
    size_3 = torch.tensor(grid.voxel_size, dtype=torch.float32, device=device)
    lowest_3 = torch.tensor(grid.lowest, dtype=torch.float32, device=device)
    number_3 = torch.tensor(grid.cells, dtype=torch.float32, device=device)
    step_BP3 = torch.floor((points_BPC[..., :3] - lowest_3) / size_3)
    # Every comparison with NaN is false.
    inside_BP = ((step_BP3 >= 0) & (step_BP3 < number_3)).all(-1)
    index_BP3 = torch.where(inside_BP[..., None], step_BP3, 0).to(torch.int64)
    cell_BP = index_BP3[..., 1] * grid.cells[0] + index_BP3[..., 0]
    return torch.where(inside_BP, cell_BP, grid.num_cells)


def voxelise(points_BPC: Tensor, grid: PillarGrid) -> Pillars:
    """Returns the sweeps' points by pillar.

    Args:
        points_BPC: float32, x, y, z first; rows of NaN are no points.
        grid: of pillars.
    """
    batch, number, columns = points_BPC.shape
    slots = min(grid.max_pillars, grid.num_cells, number)
    cell_BP, order_BP = torch.sort(cells_of(points_BPC, grid), dim=1, stable=True)
    is_inside_BP = cell_BP < grid.num_cells

    is_first_BP = torch.ones_like(is_inside_BP)
    is_first_BP[:, 1:] = cell_BP[:, 1:] != cell_BP[:, :-1]
    place_P = torch.arange(number, device=points_BPC.device)
    start_BP = torch.where(is_first_BP, place_P, 0).cummax(1).values
    rank_BP = place_P - start_BP

    # A pillar's number counts, in the order given, the first points before its own.
    opens_BP = torch.zeros_like(is_first_BP)
    opens_BP = opens_BP.scatter(1, order_BP, is_first_BP & is_inside_BP)
    number_BP = opens_BP.to(torch.int64).cumsum(1) - 1
    pillar_BP = number_BP.gather(1, order_BP.gather(1, start_BP))
    is_pillar_BP = is_inside_BP & (pillar_BP < slots)
    is_kept_BP = is_pillar_BP & (rank_BP < grid.max_points)
    slot_BP = torch.where(is_kept_BP, pillar_BP, slots)

    room = (batch, slots + 1)
    cell_BK = torch.full(room, grid.num_cells, device=points_BPC.device)
    at_BP = torch.where(is_first_BP & is_pillar_BP, pillar_BP, slots)
    cell_BK = cell_BK.scatter(1, at_BP, cell_BP)
    count_BK = torch.zeros_like(cell_BK)
    count_BK = count_BK.scatter_add(1, slot_BP, torch.ones_like(slot_BP))

    index_BPC = order_BP[..., None].expand(-1, -1, columns)
    sorted_BPC = points_BPC.gather(1, index_BPC)
    return Pillars(
        points_BPC=torch.where(is_kept_BP[..., None], sorted_BPC, 0.0),
        slot_BP=slot_BP,
        rank_BP=rank_BP,
        cell_BK=cell_BK[:, :slots],
        count_BK=count_BK[:, :slots],
    )


def mean_of_pillars(pillars: Pillars, max_points: int) -> Tensor:
    """Returns the mean x, y, z of each pillar: (B, K, 3) float32; 0 for none.

    Summed in a table of the pillars' points, not by adding up at an index: that would
    be in another order each time on an accelerator.
    """
    batch, slots = pillars.cell_BK.shape
    size = slots * max_points
    place_BP = pillars.slot_BP * max_points + pillars.rank_BP
    place_BP = torch.where(pillars.slot_BP < slots, place_BP, size)
    xyz_BP3 = pillars.points_BPC[..., :3]
    table = torch.zeros(batch, size + 1, 3, device=xyz_BP3.device)
    table = table.scatter(1, place_BP[..., None].expand(-1, -1, 3), xyz_BP3)
    table_BKM3 = table[:, :size].unflatten(1, (slots, max_points))
    mean_BK3: Tensor = table_BKM3.sum(2) / pillars.count_BK.clamp(min=1)[..., None]
    return mean_BK3


def is_whole(low: float, high: float, size: float) -> bool:
    """Whether a side is a whole number of cells, to a thousandth of one."""
    cells = (high - low) / size
    return round(cells) >= 1 and math.isclose(cells, round(cells), abs_tol=1e-3)
