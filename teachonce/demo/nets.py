"""The demo's three experts: camera to semantics, camera to depth, LiDAR to a map.

Read by their path (``module:.../nets.py:SemanticsNet``), like any user's teachers, so
this file needs torch and nothing else. All three are one pyramid behind two stems. Its
weights come from `teachonce.demo.experts.train`.

What may be taken of each (``from:``): ``pyramid.features``, 64 channels at a sixteenth
of the camera image or in cells of 3 m; ``pyramid.fine``, 48 channels at twice that
resolution; and ``output``, the answer, at four times that. The features alone are
trained to yield the answer at twice their resolution through one linear layer.

Shape suffixes: B batch, C channels, H and W a grid, P points, S places of the raster,
L layers of height.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (32, 64, 96)
FEATURES, FINE = 64, 48


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Returns convolution, batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Block(nn.Module):
    """A residual block of two full convolutions, for the finer scales.

    Source: He et al., Deep Residual Learning for Image Recognition (2016), figure 2.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            _conv(width, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, grid_BCHW: Tensor) -> Tensor:
        """Returns the same shape."""
        return F.relu(grid_BCHW + self.mix(grid_BCHW))


class SlimBlock(nn.Module):
    """A residual block that looks around per channel, then mixes channels widely.

    Source: Liu et al., A ConvNet for the 2020s (2022), section 2.6, with a 3 x 3
    kernel, batch norm and ReLU, which a CPU runs faster.
    """

    def __init__(self, width: int, dilation: int = 1) -> None:
        super().__init__()
        self.mix = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, dilation, dilation, width, bias=False),
            nn.BatchNorm2d(width),
            nn.Conv2d(width, 2 * width, 1),
            nn.ReLU(),
            nn.Conv2d(2 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, grid_BCHW: Tensor) -> Tensor:
        """Returns the same shape."""
        mixed: Tensor = grid_BCHW + self.mix(grid_BCHW)
        return mixed


class Context(nn.Module):
    """Adds to every cell what the whole grid shows on average."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.turn = nn.Sequential(
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)
        )

    def forward(self, grid_BCHW: Tensor) -> Tensor:
        """Returns the same shape."""
        told: Tensor = grid_BCHW + self.turn(grid_BCHW.mean((2, 3)))[:, :, None, None]
        return told


def _enlarge(grid_BCHW: Tensor) -> Tensor:
    """Returns the grid at twice its resolution, bilinear."""
    return F.interpolate(grid_BCHW, scale_factor=2, mode="bilinear")


class Pyramid(nn.Module):
    """Three scales down to `features`, and back up to the scale of its input.

    Args:
        outputs: channels of the answer.
    """

    def __init__(self, outputs: int) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.scale1 = _conv(first, first)
        self.scale2 = nn.Sequential(_conv(first, second, stride=2), Block(second))
        self.scale3 = nn.Sequential(
            _conv(second, third, stride=2),
            SlimBlock(third),
            SlimBlock(third, dilation=2),
            Context(third),
            SlimBlock(third, dilation=4),
            SlimBlock(third),
        )
        self.features = nn.Conv2d(third, FEATURES, 1)
        self.coarse = nn.Sequential(
            nn.Conv2d(FEATURES, 4 * outputs, 1), nn.PixelShuffle(2)
        )
        self.across2 = nn.Conv2d(second, FINE, 1)
        self.down3 = nn.Conv2d(FEATURES, FINE, 1)
        self.fine = SlimBlock(FINE)
        self.across1 = nn.Conv2d(first, first, 1)
        self.down2 = nn.Conv2d(FINE, first, 1)
        self.refine = nn.Sequential(_conv(first, first), nn.Conv2d(first, outputs, 1))

    def answers(self, grid_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the answer, and what `features` alone make of it.

        Args:
            grid_BCHW: (B, 32, H, W), H and W multiples of 4.

        Returns:
            (B, outputs, H, W) and (B, outputs, H / 2, W / 2).
        """
        scale1 = self.scale1(grid_BCHW)
        scale2 = self.scale2(scale1)
        features = self.features(self.scale3(scale2))
        coarse = self.coarse(features)
        fine = self.fine(self.across2(scale2) + _enlarge(self.down3(features)))
        joined = self.across1(scale1) + _enlarge(self.down2(fine))
        return self.refine(joined) + _enlarge(coarse), coarse


class _CameraNet(nn.Module):
    """A pyramid over a camera image."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.PixelUnshuffle(2), _conv(12, WIDTHS[0], stride=2))
        self.pyramid = Pyramid(outputs)

    def answers(self, image_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, outputs, H / 4, W / 4) and, from `features`, half of that."""
        return self.pyramid.answers(self.stem(image_B3HW))

    def forward(self, image_B3HW: Tensor) -> Tensor:
        """Returns (B, outputs, H / 4, W / 4).

        Args:
            image_B3HW: normalised R, G, B; H and W multiples of 16.
        """
        return self.answers(image_B3HW)[0]


class SemanticsNet(_CameraNet):
    """Per-pixel classes: logits.

    Args:
        classes: how many.
    """

    def __init__(self, classes: int = 12) -> None:
        super().__init__(classes)


class DepthNet(_CameraNet):
    """Natural logarithm of the depth along the optical axis in metres, one channel.

    It answers as though the view were the whole image of the demo's camera: in a crop
    of half the width and height everything is twice as large, and called half as far.
    What it says of the sky means nothing.
    """

    def __init__(self) -> None:
        super().__init__(1)

    def start_at(self, log_depth: float) -> None:
        """Makes ``log_depth`` the first answer, before any training."""
        head = self.pyramid.coarse[0]
        assert isinstance(head, nn.Conv2d)
        assert head.bias is not None
        nn.init.constant_(head.bias, log_depth)


class OccupancyNet(nn.Module):
    """Points counted by place and height, then a pyramid: logits of what stands where.

    Row 0 of the map is farthest ahead (x = ``extent_m``), column 0 farthest left
    (y = ``extent_m`` / 2).

    Args:
        classes: how many.
        cells: cells of the map along x and along y; points are counted in cells of
            half that size.
        extent_m: x from 0 to ``extent_m`` ahead, y within half of it either side.
        floors_m: lower ends in z of the layers that points are counted in.
    """

    def __init__(
        self,
        classes: int = 5,
        cells: int = 64,
        extent_m: float = 48.0,
        floors_m: tuple[float, ...] = (-1.5, -1.1, -0.6, 0.0, 1.0, 2.5),
    ) -> None:
        super().__init__()
        self.raster = 2 * cells
        self.extent_m = extent_m
        self.floors_m = tuple(floors_m)
        self.stem = _conv(len(self.floors_m) + 3, WIDTHS[0], stride=2)
        self.pyramid = Pyramid(classes)

    def rasterise(self, points_BP4: Tensor) -> Tensor:
        """Returns what lies in each place, (B, layers + 3, raster, raster).

        Logarithms of the counts per layer (one more than floors), the mean intensity
        and the mean height.
        """
        num, size = len(points_BP4), self.raster
        x_BP, y_BP, z_BP, intensity_BP = points_BP4.float().unbind(-1)
        per_m = size / self.extent_m
        row_BP = size - 1 - (x_BP * per_m).floor().long()
        column_BP = size - 1 - (y_BP * per_m + size / 2).floor().long()
        inside_BP = (row_BP >= 0) & (row_BP < size)
        inside_BP &= (column_BP >= 0) & (column_BP < size)
        # What lies outside falls into one place past the end, which is cut off.
        place_BP = torch.where(inside_BP, row_BP * size + column_BP, size**2)
        layer_BP = sum((z_BP >= floor).long() for floor in self.floors_m)
        layers = len(self.floors_m) + 1
        counts = z_BP.new_zeros(num, (size**2 + 1) * layers)
        counts.scatter_add_(1, place_BP * layers + layer_BP, torch.ones_like(z_BP))
        counts_BLS = counts.view(num, size**2 + 1, layers)[:, :-1].transpose(1, 2)
        sums = z_BP.new_zeros(2, num, size**2 + 1)
        sums[0].scatter_add_(1, place_BP, intensity_BP)
        sums[1].scatter_add_(1, place_BP, z_BP)
        total_B1S = counts_BLS.sum(1, keepdim=True).clamp_min(1)
        mean_B2S = sums[..., :-1].transpose(0, 1) / total_B1S
        found = torch.cat([counts_BLS.log1p(), mean_B2S], 1)
        return found.reshape(num, layers + 2, size, size)

    def answers(self, points_BP4: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (B, classes, cells, cells) and, from `features`, half of that."""
        return self.pyramid.answers(self.stem(self.rasterise(points_BP4)))

    def forward(self, points_BP4: Tensor) -> Tensor:
        """Returns (B, classes, cells, cells).

        Args:
            points_BP4: x, y, z in metres in the LiDAR's frame, intensity 0..1.
        """
        return self.answers(points_BP4)[0]
