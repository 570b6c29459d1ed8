"""From pixels to the cells of a grid and back.

Owns what a cell holds (shares of classes, means) and which pixels are a cell's. Cell
(i, j) covers [i/h, (i + 1)/h) x [j/w, (j + 1)/w) of the view, as in the bank. Knows no
features and no probe.

Shape suffixes: N images, H and W pixels, h and w cells, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE_ELEMENTS = 1 << 20
"""Elements (images x classes x pixels) of a temporary, or one image's if more.

Small enough for a core's cache, large enough that a piece's overhead does not count.
"""


def class_shares(labels_NHW: Tensor, grid_hw: tuple[int, ...], num: int) -> Tensor:
    """Returns (N, h, w, K) float32: each class's share of a cell's labelled area.

    A pixel on the border of two cells counts in each by the area it has there. Cells
    without a labelled pixel are all 0; all others sum to 1.

    Args:
        labels_NHW: (N, H, W) int64, -1 where there is none.
        grid_hw: h and w.
        num: K.
    """
    rows_hH, columns_wW = _overlaps(labels_NHW, grid_hw)
    classes_K = torch.arange(num, device=labels_NHW.device)
    pieces = []
    for images in image_pieces(labels_NHW, num):
        # A comparison, not one_hot: -1 matches nothing, and no int64 table is made.
        one_hot_NHWK = (labels_NHW[images].unsqueeze(-1) == classes_K).float()
        area_NhwK = torch.einsum("hH,NHWK->NhWK", rows_hH, one_hot_NHWK)
        pieces.append(torch.einsum("wW,NhWK->NhwK", columns_wW, area_NhwK))
    area_NhwK = torch.cat(pieces)
    return area_NhwK / area_NhwK.sum(-1, keepdim=True).clamp_min(1)


def cell_means(numbers_NHW: Tensor, grid_hw: tuple[int, ...]) -> Tensor:
    """Returns (N, h, w) float64: the mean of a cell's known numbers, NaN without any.

    A pixel on the border of two cells counts in each by the area it has there.

    Args:
        numbers_NHW: (N, H, W) float64, NaN where there is none.
        grid_hw: h and w.
    """
    rows_hH, columns_wW = (
        weights.double() for weights in _overlaps(numbers_NHW, grid_hw)
    )
    area_Nhw = rows_hH @ numbers_NHW.isfinite().double() @ columns_wW.T
    total_Nhw = rows_hH @ numbers_NHW.nan_to_num(nan=0.0) @ columns_wW.T
    return torch.where(area_Nhw > 0, total_Nhw / area_Nhw, math.nan)


def _overlaps(pixels_NHW: Tensor, grid_hw: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns (h, H) and (w, W) float32: how much of each pixel lies in each cell.

    In units of 1/h and 1/w of a pixel these are integers, so that sums are exact and a
    cell that only touches a pixel has none of it.
    """
    found = []
    for num_cells, num_pixels in zip(grid_hw, pixels_NHW.shape[1:], strict=True):
        cells = torch.arange(num_cells, device=pixels_NHW.device).unsqueeze(1)
        pixels = torch.arange(num_pixels, device=pixels_NHW.device)
        ends = torch.minimum((cells + 1) * num_pixels, (pixels + 1) * num_cells)
        starts = torch.maximum(cells * num_pixels, pixels * num_cells)
        found.append((ends - starts).clamp_min(0).float())
    return found[0], found[1]


def valid_pixels(valid_Nhw: Tensor, pixels_NHW: Tensor) -> Tensor:
    """Returns (N, H, W) bool: whether the cell that holds a pixel's centre is valid.

    A centre on a border is in the later cell.

    Args:
        valid_Nhw: (N, h, w) bool.
        pixels_NHW: (N, H, W), of which only the shape counts.
    """
    at = []
    for num_cells, num_pixels in zip(
        valid_Nhw.shape[1:], pixels_NHW.shape[1:], strict=True
    ):
        pixels = torch.arange(num_pixels, device=valid_Nhw.device)
        at.append((2 * pixels + 1) * num_cells // (2 * num_pixels))
    return valid_Nhw[:, at[0].unsqueeze(1), at[1]]


def upsample(values_NhwK: Tensor, pixels_NHW: Tensor) -> Tensor:
    """Returns (N, K, H, W) float32, bilinear, align_corners=False.

    Args:
        values_NhwK: (N, h, w, K) float.
        pixels_NHW: (N, H, W), of which only the shape counts.
    """
    values_NKhw = values_NhwK.permute(0, 3, 1, 2).float()
    size_HW = tuple(pixels_NHW.shape[1:])
    pixels_NKHW: Tensor = F.interpolate(
        values_NKhw, size_HW, mode="bilinear", align_corners=False
    )
    return pixels_NKHW


def image_pieces(pixels_NHW: Tensor, num_channels: int) -> Iterator[slice]:
    """Yields runs of images whose (n, channels, H, W) is about ``PIECE_ELEMENTS``."""
    num_images, height, width = pixels_NHW.shape
    step = max(1, PIECE_ELEMENTS // (num_channels * height * width))
    for start in range(0, num_images, step):
        yield slice(start, start + step)
