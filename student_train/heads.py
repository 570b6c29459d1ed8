"""Heads: from a student's tokens to one output of a teacher.

Owns what is trained beside the student and dropped afterwards, and the geometry of the
head that turns a camera's grid into a bird's-eye one. Weights are torch's defaults for
their layers, drawn from the global generator in the order of construction.

Shape suffixes: B images, H and W a camera's grid, R and K rows and columns of the
bird's-eye grid, Z heights, N points, C channels. ``...`` is any leading axes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from manifests.errors import ManifestError
from student_train.grids import sample_grid

#: What lies nearer to the camera's plane than this is not seen, metres.
MIN_DEPTH_M = 0.1


class Adapter(nn.Module):
    """EUPE's head of two layers: linear, layer norm, GELU, linear, without biases.

    Args:
        dim_in: channels of the student's tokens.
        dim_out: channels of the teacher's output.
        hidden: channels between; EUPE has 1536 for its proxy, 3072 for its students.

    Source: EUPE (arXiv 2603.22387) section 4.1.
    """

    def __init__(self, dim_in: int, dim_out: int, hidden: int) -> None:
        super().__init__()
        check_widths(dim_in=dim_in, dim_out=dim_out, hidden=hidden)
        self.expand = nn.Linear(dim_in, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.contract = nn.Linear(hidden, dim_out, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns (..., dim_out) of (..., dim_in)."""
        found: Tensor = self.contract(F.gelu(self.norm(self.expand(tokens))))
        return found

    def last_layers(self) -> tuple[nn.Linear, ...]:
        """Returns the layers whose outputs sum to what it gives."""
        return (self.contract,)


class LinearHead(nn.Module):
    """One linear layer with a bias, as for logits.

    Args:
        dim_in: channels of the student's tokens.
        dim_out: channels of the teacher's output.
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        check_widths(dim_in=dim_in, dim_out=dim_out)
        self.linear = nn.Linear(dim_in, dim_out)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns (..., dim_out) of (..., dim_in)."""
        found: Tensor = self.linear(tokens)
        return found

    def last_layers(self) -> tuple[nn.Linear, ...]:
        """Returns the layers whose outputs sum to what it gives."""
        return (self.linear,)


@dataclass(frozen=True)
class BevGrid:
    """A bird's-eye grid in the LiDAR's frame: rows run along x, columns along y.

    Attributes:
        x_m: lowest and highest x that the grid covers, metres.
        y_m: lowest and highest y that the grid covers, metres.
        cells: rows and columns.
        row_0: which end of x the first row lies at.
        column_0: which end of y the first column lies at.
    """

    x_m: tuple[float, float]
    y_m: tuple[float, float]
    cells: tuple[int, int]
    row_0: Literal["x_max", "x_min"] = "x_max"
    column_0: Literal["y_max", "y_min"] = "y_max"

    def __post_init__(self) -> None:
        for name, (low, high) in (("x_m", self.x_m), ("y_m", self.y_m)):
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ManifestError(
                    f"{name} must rise from its first to its second number, got "
                    f"{low}, {high} (bird's-eye extent); correct it"
                )
        if min(self.cells) < 1:
            raise ManifestError(
                f"cells must be at least 1 row and 1 column, got {self.cells} "
                "(bird's-eye extent); correct it"
            )


def bev_cell_centres(extent: BevGrid) -> Tensor:
    """Returns x and y of each cell's centre: (R, K, 2) float32, metres.

    Args:
        extent: of the grid.
    """
    x_R = _centres(extent.x_m, extent.cells[0], descending=extent.row_0 == "x_max")
    y_K = _centres(extent.y_m, extent.cells[1], descending=extent.column_0 == "y_max")
    return torch.stack(torch.meshgrid(x_R, y_K, indexing="ij"), -1).float()


def project_cells(
    points_N3: Tensor,
    intrinsics_B33: Tensor,
    lidar2cam_B44: Tensor,
    size_hw: tuple[int, int],
    min_depth_m: float = MIN_DEPTH_M,
) -> tuple[Tensor, Tensor]:
    """Returns where points of the LiDAR's frame fall in each view.

    Written without a matrix product, which autocast and TF32 would round to pixels.

    Args:
        points_N3: (N, 3), metres.
        intrinsics_B33: (B, 3, 3), camera to pixels of the view; an image of width W
            spans [0, W). The last row is 0 0 1.
        lidar2cam_B44: (B, 4, 4), LiDAR to camera (x right, y down, z forward).
        size_hw: height and width of the view, pixels.
        min_depth_m: points nearer along the camera's axis, or behind it, are not seen.

    Returns:
        points (B, N, 2) x and y as fractions of the view, finite; visible (B, N) bool,
        where the point is far enough ahead and inside the view. Not visible points are
        at 0.
    """
    height, width = size_hw
    rotation_B133 = lidar2cam_B44[:, None, :3, :3]
    translation_B13 = lidar2cam_B44[:, None, :3, 3]
    camera_BN3 = (rotation_B133 * points_N3[:, None, :]).sum(-1) + translation_B13
    depth_BN1 = camera_BN3[..., 2:]
    uvw_BN2 = (intrinsics_B33[:, None, :2] * camera_BN3[..., None, :]).sum(-1)
    points_BN2 = uvw_BN2 / depth_BN1 / uvw_BN2.new_tensor([width, height])
    # NaN and infinity, from a depth of 0, are inside nothing.
    inside_BN2 = (points_BN2 >= 0) & (points_BN2 < 1)
    visible_BN = (depth_BN1.squeeze(-1) > min_depth_m) & inside_BN2.all(-1)
    return torch.where(visible_BN[..., None], points_BN2, 0.0), visible_BN


class BevHead(nn.Module):
    """From a camera's grid of tokens to a bird's-eye grid of a teacher's output.

    Each cell looks into the camera's grid at several heights above its centre, where
    they project to; what is seen at the heights, whether anything is, and the cell's
    place (x, y, range, in units of the largest range) are mixed per cell, then between
    neighbours. The lift has no weights and knows no depth: along a ray all cells see
    the same, and the layers behind have to tell them apart.

    Args:
        dim_in: channels of the student's grid.
        dim_out: channels of the teacher's output.
        hidden: channels of the bird's-eye layers.
        extent: of the bird's-eye grid.
        heights_m: z in the LiDAR's frame at which cells look, metres.
        lifted: channels that the camera's grid is reduced to before it is lifted; every
            cell holds that many per height.

    Source: Harley et al., Simple-BEV (ICRA 2023, arXiv 2206.07959) section 3.
    """

    centres_N3: Tensor
    place_RK3: Tensor

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        hidden: int,
        extent: BevGrid,
        heights_m: Sequence[float],
        lifted: int = 64,
    ) -> None:
        super().__init__()
        check_widths(dim_in=dim_in, dim_out=dim_out, hidden=hidden, lifted=lifted)
        if not heights_m or not all(math.isfinite(height) for height in heights_m):
            raise ManifestError(
                f"heights_m must hold at least one finite height, got "
                f"{list(heights_m)} (bird's-eye head); give metres above the LiDAR"
            )
        self.extent = extent
        self.num_heights = len(heights_m)
        # Constants of the configuration: not part of a checkpoint.
        self.register_buffer(
            "centres_N3", _cells_at_heights(extent, heights_m), persistent=False
        )
        self.register_buffer("place_RK3", _place_code(extent), persistent=False)
        self.reduce = nn.Linear(dim_in, lifted)
        self.mix_in = nn.Linear(self.num_heights * (lifted + 1) + 3, hidden)
        self.mix_out = nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList([_CellBlock(hidden), _CellBlock(hidden)])
        self.norm = nn.LayerNorm(hidden)
        self.out = nn.Linear(hidden, dim_out)

    def forward(
        self,
        grid_BHWC: Tensor,
        intrinsics_B33: Tensor,
        lidar2cam_B44: Tensor,
        size_hw: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Returns the bird's-eye grid and which of its cells the camera sees.

        Args:
            grid_BHWC: (B, H, W, dim_in), the student's tokens.
            intrinsics_B33: (B, 3, 3), of the view at the student's input size.
            lidar2cam_B44: (B, 4, 4), from the view's sweep to its camera.
            size_hw: height and width of the student's input, pixels.

        Returns:
            prediction (B, R, K, dim_out); visible (B, R, K) bool, where the camera sees
            at least one of the cell's heights. Cells it does not see are predicted
            from their place and their neighbours.
        """
        lifted_BRKC, visible_BRKZ = self.lift(
            self.reduce(grid_BHWC), intrinsics_B33, lidar2cam_B44, size_hw
        )
        place_BRK3 = self.place_RK3.expand(len(grid_BHWC), -1, -1, -1)
        seen = visible_BRKZ.to(lifted_BRKC.dtype)
        cells_BRKC = torch.cat([lifted_BRKC, seen, place_BRK3], -1)
        cells_BRKC = self.mix_out(F.gelu(self.mix_in(cells_BRKC)))
        for block in self.blocks:
            cells_BRKC = block(cells_BRKC)
        prediction_BRKC = self.out(self.norm(cells_BRKC))
        return prediction_BRKC, visible_BRKZ.any(-1)

    def last_layers(self) -> tuple[nn.Linear, ...]:
        """Returns the layers whose outputs sum to what it gives."""
        return (self.out,)

    def visible(
        self,
        intrinsics_B33: Tensor,
        lidar2cam_B44: Tensor,
        size_hw: tuple[int, int],
    ) -> Tensor:
        """Returns which cells the camera sees, as `forward` does: (B, R, K) bool."""
        _, visible_BN = project_cells(
            self.centres_N3, intrinsics_B33, lidar2cam_B44, size_hw
        )
        return visible_BN.reshape(len(visible_BN), *self.extent.cells, -1).any(-1)

    def lift(
        self,
        grid_BHWC: Tensor,
        intrinsics_B33: Tensor,
        lidar2cam_B44: Tensor,
        size_hw: tuple[int, int],
    ) -> tuple[Tensor, Tensor]:
        """Returns what each cell sees at its heights, without weights.

        Args:
            grid_BHWC: (B, H, W, C), in a camera's view.
            intrinsics_B33: as in `forward`.
            lidar2cam_B44: as in `forward`.
            size_hw: as in `forward`.

        Returns:
            (B, R, K, Z C) float32, heights in order, 0 where not seen; (B, R, K, Z)
            bool, whether it is seen.
        """
        points_BN2, visible_BN = project_cells(
            self.centres_N3, intrinsics_B33, lidar2cam_B44, size_hw
        )
        values_BNC, _ = sample_grid(grid_BHWC, points_BN2)
        values_BNC = torch.where(visible_BN[..., None], values_BNC, 0.0)
        shape = (len(grid_BHWC), *self.extent.cells, -1)
        return values_BNC.reshape(shape), visible_BN.reshape(shape)


class _CellBlock(nn.Module):
    """Adds to every cell what its 3 x 3 neighbourhood says of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # Over the channels of a cell: cells that nothing is known of move no others.
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, cells_BRKC: Tensor) -> Tensor:
        """Returns the same shape."""
        inner_BCRK = F.gelu(self.norm(cells_BRKC)).permute(0, 3, 1, 2)
        summed: Tensor = cells_BRKC + self.conv(inner_BCRK).permute(0, 2, 3, 1)
        return summed


def _cells_at_heights(extent: BevGrid, heights_m: Sequence[float]) -> Tensor:
    """Returns the points that cells look at: (R K Z, 3) float32, heights innermost."""
    xy_RK2 = bev_cell_centres(extent)
    rows, columns = extent.cells
    xy_RKZ2 = xy_RK2[:, :, None].expand(rows, columns, len(heights_m), 2)
    z_Z = torch.tensor(heights_m, dtype=torch.float32)
    z_RKZ1 = z_Z[:, None].expand(rows, columns, len(heights_m), 1)
    return torch.cat([xy_RKZ2, z_RKZ1], -1).reshape(-1, 3)


def _place_code(extent: BevGrid) -> Tensor:
    """Returns x, y and range of cells, the largest range being 1: (R, K, 3) float32."""
    xy_RK2 = bev_cell_centres(extent)
    range_RK1 = torch.linalg.vector_norm(xy_RK2, dim=-1, keepdim=True)
    # One cell around the LiDAR itself has range 0.
    largest = range_RK1.max().clamp(min=1e-6)
    return torch.cat([xy_RK2 / largest, range_RK1 / largest], -1)


def _centres(ends: tuple[float, float], cells: int, descending: bool) -> Tensor:
    low, high = ends
    step = (high - low) / cells
    centres = low + (torch.arange(cells, dtype=torch.float64) + 0.5) * step
    return centres.flip(0) if descending else centres


def check_widths(**widths: int) -> None:
    """Raises ManifestError where a width is below 1."""
    for name, width in widths.items():
        if width < 1:
            raise ManifestError(
                f"{name} must be at least 1, got {width} (head); correct it"
            )
