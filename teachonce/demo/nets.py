"""A LiDAR network of the demo: points to a bird's-eye map.

Read by its path (``module:.../nets.py:BirdsEyeNet``), like any user's teacher.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BirdsEyeNet(nn.Module):
    """Points dropped into a grid over the ground, then convolved.

    Args:
        cells: grid cells along x and along y.
        extent_m: x from 0 to ``extent_m`` ahead, y within half of it either side.
        width: channels of the map.
    """

    def __init__(
        self, cells: int = 64, extent_m: float = 48.0, width: int = 32
    ) -> None:
        super().__init__()
        self.cells = cells
        self.extent_m = extent_m
        self.map = nn.Sequential(
            nn.Conv2d(4, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, points_BP4: Tensor) -> Tensor:
        """Returns (B, width, cells / 2, cells / 2) of x, y, z, intensity points."""
        num, _, _ = points_BP4.shape
        x, y, z, intensity = points_BP4.unbind(-1)
        cell_m = self.extent_m / self.cells
        row = (x / cell_m).floor().long()
        column = (y / cell_m + self.cells / 2).floor().long()
        inside = (row >= 0) & (row < self.cells) & (column >= 0) & (column < self.cells)
        # What lies outside falls into one cell past the end, which is cut off.
        flat = torch.where(inside, row * self.cells + column, self.cells**2)
        ones = torch.ones_like(z)
        values = torch.stack([ones, z, z * z, intensity], 1)
        grid = values.new_zeros(num, 4, self.cells**2 + 1)
        grid = grid.scatter_add(2, flat[:, None].expand_as(values), values)[..., :-1]
        count = grid[:, :1]
        mean = grid[:, 1:] / count.clamp_min(1)
        found = torch.cat([count.log1p(), mean], 1)
        bev: Tensor = self.map(found.reshape(num, 4, self.cells, self.cells))
        return bev
