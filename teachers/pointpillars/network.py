"""The PointPillars network without its head, as both published code bases compute it.

A small net looks at each point of a pillar, its maximum is written to a canvas seen
from above, three stages of convolutions follow, and a neck brings them to one size.

The code bases run the point layers on tables in which a pillar that is not full is
padded with zeros, and the padding takes part in the maximum. Here only the points are
run, and one more value per pillar stands for its padding: the same numbers in a
thirtieth of the memory.

Source: Lang et al., PointPillars, CVPR 2019; the layers' order and constants (batch
norm with eps 1e-3, no bias before it) are those of mmdetection3d and OpenPCDet.

Shape suffixes: B batch, P points, K pillars, C channels; H rows along y and W columns
along x (maps inside the network), X rows along x and Y columns along y (maps that leave
it).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from teachers.pointpillars.presets import TIME_LAG, PillarsConfig
from teachers.pointpillars.voxels import (
    PillarGrid,
    Pillars,
    mean_of_pillars,
    voxelise,
)

_EPS = 1e-3
_XYZ = 3


class Maps(NamedTuple):
    """What the network gives.

    Attributes:
        bev_BXYC: the neck's features; row 0 is the highest x, column 0 the highest y.
        levels: features of the stages, (B, X, Y, C) each.
    """

    bev_BXYC: Tensor
    levels: tuple[Tensor, ...]


class PointPillars(nn.Module):
    """Sweeps to maps seen from above.

    Args:
        config: of the network.
        columns: those of the sweeps it is given. `TIME_LAG` may be missing: it is 0 in
            a single sweep.
    """

    def __init__(self, config: PillarsConfig, columns: tuple[str, ...]) -> None:
        super().__init__()
        self.config = config
        self.columns = columns
        self.encoder = PillarEncoder(config)
        width = config.encoder_channels[-1]
        self.stages = nn.ModuleList()
        for layers, stride, channels in zip(
            config.stage_layers,
            config.stage_strides,
            config.stage_channels,
            strict=True,
        ):
            self.stages.append(_stage(width, channels, layers, stride))
            width = channels
        self.neck = (
            TopDownNeck(config.stage_channels, config.neck_channels[0])
            if config.neck == "fpn"
            else DeconvNeck(config)
        )

    def forward(self, points_BPC: Tensor) -> Maps:
        """Returns the maps of sweeps: float32 rows, those with NaN are no points."""
        grid = self.config.grid
        pillars = voxelise(self._features(points_BPC), grid)
        values_BKC = self.encoder(pillars, grid)
        map_BCHW = scatter_to_canvas(values_BKC, pillars.cell_BK, grid)
        levels = []
        for stage in self.stages:
            map_BCHW = stage(map_BCHW)
            levels.append(map_BCHW)
        return Maps(
            seen_from_above(self.neck(levels)),
            tuple(seen_from_above(level) for level in levels),
        )

    def _features(self, points_BPC: Tensor) -> Tensor:
        """Returns the columns that the network takes, in its order and scale."""
        columns = points_BPC.to(torch.float32).unbind(-1)
        given = dict(zip(self.columns, columns, strict=True))
        found = []
        for name in self.config.columns:
            column_BP = given.get(name)
            if column_BP is None:
                assert name == TIME_LAG, "other columns were checked to be there"
                column_BP = torch.zeros_like(given["x"])
            if name == "intensity":
                column_BP = column_BP * self.config.intensity_scale
                if self.config.intensity_tanh:
                    column_BP = column_BP.tanh()
            found.append(column_BP)
        return torch.stack(found, -1)


class PointLayer(nn.Module):
    """Linear, batch norm and ReLU of each point."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, channels, bias=False)
        self.norm = nn.BatchNorm1d(channels, eps=_EPS)

    def forward(self, values: Tensor) -> Tensor:
        """Returns (..., channels) of (..., width)."""
        flat = self.norm(self.linear(values).flatten(0, -2))
        return F.relu(flat).reshape(*values.shape[:-1], -1)


class PillarEncoder(nn.Module):
    """Points of pillars to one vector per pillar."""

    def __init__(self, config: PillarsConfig) -> None:
        super().__init__()
        self._legacy = config.legacy
        self._centre_axes = len(config.centre)
        width = len(config.columns) + _XYZ + self._centre_axes
        last = len(config.encoder_channels) - 1
        self.layers = nn.ModuleList()
        for number, channels in enumerate(config.encoder_channels):
            if config.encoder == "pfn" and number < last:
                channels //= 2
            self.layers.append(PointLayer(width, channels))
            width = 2 * channels

    def forward(self, pillars: Pillars, grid: PillarGrid) -> Tensor:
        """Returns (B, K, C); of slots without a pillar some number or other."""
        values_BPC = self._decorate(pillars, grid)
        first = self.layers[0]
        assert isinstance(first, PointLayer)
        values_BPC = values_BPC.to(first.linear.weight.dtype)
        batch, slots = pillars.cell_BK.shape
        padding_BKC = values_BPC.new_zeros(batch, slots, values_BPC.shape[-1])
        largest_BKC = padding_BKC
        has_room_BK = pillars.count_BK < grid.max_points
        for number, layer in enumerate(self.layers):
            if number:
                again_BPC = _of_points(largest_BKC, pillars.slot_BP)
                values_BPC = torch.cat([values_BPC, again_BPC], -1)
                padding_BKC = torch.cat([padding_BKC, largest_BKC], -1)
            values_BPC, padding_BKC = layer(values_BPC), layer(padding_BKC)
            # After a ReLU nothing is below 0, so 0 is no limit from below.
            floor_BKC = torch.where(has_room_BK[..., None], padding_BKC, 0)
            largest_BKC = _largest(values_BPC, pillars.slot_BP, floor_BKC)
        return largest_BKC

    def _decorate(self, pillars: Pillars, grid: PillarGrid) -> Tensor:
        """Returns each point with its offsets from its pillar's mean and centre.

        ``legacy`` puts the offset from the centre in the place of the coordinates too,
        as SECOND's code did and mmdetection3d's KITTI models still do.
        """
        points_BPC = pillars.points_BPC
        xyz_BP3 = points_BPC[..., :_XYZ]
        mean_BK3 = mean_of_pillars(pillars, grid.max_points)
        from_mean_BP3 = xyz_BP3 - _of_points(mean_BK3, pillars.slot_BP)
        cell_BP = _of_points(pillars.cell_BK[..., None], pillars.slot_BP)[..., 0]
        across = grid.cells[0]
        steps = [cell_BP % across, cell_BP // across, torch.zeros_like(cell_BP)]
        offsets = []
        for axis in range(self._centre_axes):
            size, low = grid.voxel_size[axis], grid.lowest[axis]
            centre_BP = steps[axis].to(torch.float32) * size + (size / 2 + low)
            offsets.append(xyz_BP3[..., axis] - centre_BP)
        from_centre = torch.stack(offsets, -1)
        if self._legacy:
            rest = points_BPC[..., self._centre_axes :]
            points_BPC = torch.cat([from_centre, rest], -1)
        return torch.cat([points_BPC, from_mean_BP3, from_centre], -1)


class DeconvNeck(nn.ModuleList):
    """SECOND's neck: each stage enlarged (or reduced) to one size, side by side."""

    def __init__(self, config: PillarsConfig) -> None:
        blocks = []
        for width, channels, stride in zip(
            config.stage_channels,
            config.neck_channels,
            config.neck_strides,
            strict=True,
        ):
            if stride >= 1:
                step = round(stride)
                resize: nn.Module = nn.ConvTranspose2d(
                    width, channels, step, step, bias=False
                )
            else:
                step = round(1 / stride)
                resize = nn.Conv2d(width, channels, step, step, bias=False)
            blocks.append(_normed(resize, channels))
        super().__init__(blocks)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Returns (B, sum of channels, H, W)."""
        pairs = zip(self, levels, strict=True)
        return torch.cat([block(level) for block, level in pairs], 1)


class TopDownNeck(nn.Module):
    """A feature pyramid: coarser stages are added to finer ones; its finest level."""

    def __init__(self, widths: tuple[int, ...], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(
            _normed(nn.Conv2d(width, channels, 1, bias=False), channels)
            for width in widths
        )
        self.output = nn.ModuleList(
            _normed(nn.Conv2d(channels, channels, 3, padding=1, bias=False), channels)
            for _ in widths
        )

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Returns (B, channels, H, W), of the size of the first stage."""
        pairs = zip(self.lateral, levels, strict=True)
        finer = [lateral(level) for lateral, level in pairs]
        total = finer.pop()
        while finer:
            below = finer.pop()
            total = below + F.interpolate(total, size=below.shape[2:], mode="nearest")
        finest: Tensor = self.output[0](total)
        return finest


def _normed(convolution: nn.Module, channels: int) -> nn.Sequential:
    norm = nn.BatchNorm2d(channels, eps=_EPS)
    return nn.Sequential(convolution, norm, nn.ReLU(inplace=True))


def _stage(width: int, channels: int, layers: int, stride: int) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for number in range(layers + 1):
        step = 1 if number else stride
        convolution = nn.Conv2d(
            channels if number else width, channels, 3, step, padding=1, bias=False
        )
        blocks += _normed(convolution, channels)
    return nn.Sequential(*blocks)


def _of_points(values_BKC: Tensor, slot_BP: Tensor) -> Tensor:
    """Returns, for each point, the values of its pillar; of the last one where none."""
    last = values_BKC.shape[1] - 1
    index_BPC = slot_BP.clamp(max=last)[..., None].expand(-1, -1, values_BKC.shape[2])
    return values_BKC.gather(1, index_BPC)


def _largest(values_BPC: Tensor, slot_BP: Tensor, floor_BKC: Tensor) -> Tensor:
    """Returns the largest value of each pillar's points, at least its floor."""
    batch, slots, channels = floor_BKC.shape
    row_B1 = torch.arange(batch, device=slot_BP.device)[:, None] * slots
    place_BP = torch.where(slot_BP < slots, row_B1 + slot_BP, batch * slots)
    # One more row takes what belongs to no pillar.
    room = torch.cat([floor_BKC.flatten(0, 1), floor_BKC.new_zeros(1, channels)])
    index = place_BP.flatten()[:, None].expand(-1, channels)
    found = room.scatter_reduce(0, index, values_BPC.flatten(0, 1), "amax")
    return found[:-1].view(batch, slots, channels)


def scatter_to_canvas(values_BKC: Tensor, cell_BK: Tensor, grid: PillarGrid) -> Tensor:
    """Returns the canvas (B, C, H, W), 0 where no pillar stands."""
    batch, _, channels = values_BKC.shape
    columns, rows, _ = grid.cells
    size = grid.num_cells
    row_B1 = torch.arange(batch, device=cell_BK.device)[:, None] * size
    place_BK = torch.where(cell_BK < size, row_B1 + cell_BK, batch * size)
    canvas = values_BKC.new_zeros(batch * size + 1, channels)
    index = place_BK.flatten()[:, None].expand(-1, channels)
    canvas = canvas.scatter(0, index, values_BKC.flatten(0, 1))
    canvas_BHWC = canvas[:-1].view(batch, rows, columns, channels)
    return canvas_BHWC.permute(0, 3, 1, 2)


def seen_from_above(map_BCHW: Tensor) -> Tensor:
    """Returns a map as (B, X, Y, C): row 0 the highest x, column 0 the highest y."""
    return map_BCHW.permute(0, 3, 2, 1).flip(1, 2)


def initialise(model: PointPillars) -> None:
    """Draws convolutions so that what passes keeps its size; norms stay as they are.

    Source: He et al., ICCV 2015; mmdetection3d's default for these stages.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
