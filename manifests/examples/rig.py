"""A teacher that looks at six cameras and a sweep together, for the job rig.yaml.

A pattern to start from, not a trained expert: an in-house driving encoder has more in
it, but is called in the same way: one keyword argument per input of the group, images
as (B, 3, H, W) and the sweep as (B, P, C); here it answers with a dict of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rig(nn.Module):
    """Encodes each camera, gathers the sweep on a grid, and lets the grid ask cameras.

    Args:
        dim: channels of all tokens.
        cells: rows and columns of the bird's-eye grid.
        reach_m: the grid covers [-reach_m, reach_m] in x and y.
        heads: of the attention from the grid's cells to the cameras' tokens.
    """

    def __init__(
        self, dim: int = 64, cells: int = 32, reach_m: float = 51.2, heads: int = 4
    ) -> None:
        super().__init__()
        self.cells, self.reach_m = cells, reach_m
        self.camera = nn.Sequential(
            nn.Conv2d(3, dim // 2, 8, 8), nn.GELU(), nn.Conv2d(dim // 2, dim, 4, 4)
        )
        self.point = nn.Sequential(nn.Linear(4, dim), nn.GELU(), nn.Linear(dim, dim))
        self.attend = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, *, lidar: Tensor, **cameras: Tensor) -> dict[str, Tensor]:
        """Returns ``pooled`` (B, dim) and ``bev`` (B, dim, cells, cells)."""
        tokens_BNC = torch.cat(
            [self.camera(cameras[name]).flatten(2).mT for name in sorted(cameras)], 1
        )
        grid_BNC = self._gather(lidar)
        asked_BNC, _ = self.attend(grid_BNC, tokens_BNC, tokens_BNC)
        cells_BNC = self.norm(grid_BNC + asked_BNC)
        bev = cells_BNC.mT.unflatten(2, (self.cells, self.cells))
        return {"pooled": cells_BNC.mean(1), "bev": bev}

    def _gather(self, lidar_BPC: Tensor) -> Tensor:
        """Returns the largest feature of each cell's points, row 0 farthest in x."""
        place_BP2 = (self.reach_m - lidar_BPC[..., :2]) / (2 * self.reach_m)
        is_inside = ((place_BP2 >= 0) & (place_BP2 < 1)).all(-1)
        row_BP, column_BP = (
            (place_BP2.clamp(0, 1 - 1e-6) * self.cells).long().unbind(-1)
        )
        cell_BP1 = (row_BP * self.cells + column_BP).unsqueeze(-1)
        features_BPC = self.point(lidar_BPC).masked_fill(~is_inside.unsqueeze(-1), -1e4)
        empty_BNC = features_BPC.new_full(
            (len(lidar_BPC), self.cells**2, features_BPC.shape[-1]), -1e4
        )
        index = cell_BP1.expand_as(features_BPC)
        grid_BNC = empty_BNC.scatter_reduce(1, index, features_BPC, "amax")
        cells_BNC: Tensor = grid_BNC.masked_fill(grid_BNC <= -1e4, 0)
        return cells_BNC
