"""Grids brought to one size, and grids read at points.

Owns resampling of what lies on a grid of the view. All of it is align_corners=False:
cell (i, j) is centred at ((j + .5)/W, (i + .5)/H) of the view, as in the bank.

Order of a patch loss: standardise the target, then bring both onto one grid here, take
the cosine last. Standardising is affine and resampling keeps sums of weights, so these
two commute where all cells are valid; but a masked cell is filled with 0, which is the
channel's mean only after standardising. A cosine does not commute with resampling.

On CUDA the gradients of these resamplings are summed in no fixed order: repeated runs
differ in the last bits.

Shape suffixes: B images, H and W grid, C channels, P points.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.devices import without_autocast

ResizeMode = Literal["bicubic", "bilinear"]
GridRule = Literal["larger", "smaller", "student", "teacher", "coincide"]

#: A resampled cell is valid if the absolute weights of the masked cells it draws on sum
#: to at most this, of weights that sum to 1: room for rounding and a filter's tail.
MASKED_WEIGHT = 1e-3


def resize_grid(
    grid_BHWC: Tensor, size_hw: tuple[int, int], mode: ResizeMode = "bicubic"
) -> Tensor:
    """Returns the grid at another size: (B, *size_hw, C) float32.

    An axis that shrinks is antialiased, one that grows is not: antialiasing cubics have
    another shape (a = -0.5 rather than -0.75) also where there is nothing to filter.

    Args:
        grid_BHWC: (B, H, W, C), any float dtype.
        size_hw: rows and columns wanted.
        mode: ``bicubic`` (EUPE) or ``bilinear``.

    Source: EUPE section 4.1.
    """
    height, width = grid_BHWC.shape[1:3]
    rows, columns = size_hw
    # A permuted view is torch's channels_last format: nothing is copied for it.
    grid_BCHW = grid_BHWC.float().permute(0, 3, 1, 2)
    grown = (max(rows, height), max(columns, width))
    if grown != (height, width):
        grid_BCHW = F.interpolate(grid_BCHW, grown, mode=mode, align_corners=False)
    if size_hw != grown:
        grid_BCHW = F.interpolate(
            grid_BCHW, (rows, columns), mode=mode, align_corners=False, antialias=True
        )
    return grid_BCHW.permute(0, 2, 3, 1)


def resize_mask(
    mask_BHW: Tensor, size_hw: tuple[int, int], mode: ResizeMode = "bicubic"
) -> Tensor:
    """Returns which cells of a resized grid draw on valid cells only: (B, *size_hw).

    A cell is valid where the absolute weights that `resize_grid` gives to masked cells
    sum to at most ``MASKED_WEIGHT``. Resizing the mask itself would not do: cubic
    weights are also negative, so that masked cells can cancel or even raise it.

    Args:
        mask_BHW: (B, H, W) bool.
        size_hw: rows and columns wanted.
        mode: that of the grid.
    """
    if mask_BHW.shape[1:] == size_hw:
        return mask_BHW
    with without_autocast(mask_BHW.device):
        rows_hH = _axis_weights(mask_BHW.shape[1], size_hw[0], mode, mask_BHW.device)
        columns_wW = _axis_weights(mask_BHW.shape[2], size_hw[1], mode, mask_BHW.device)
        masked_Bhw = rows_hH.abs() @ (~mask_BHW).float() @ columns_wW.abs().T
    return masked_Bhw <= MASKED_WEIGHT


def match_grids(
    prediction_BHWC: Tensor,
    target_BHWC: Tensor,
    mask_BHW: Tensor,
    rule: GridRule,
    mode: ResizeMode = "bicubic",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns prediction, target and mask on one grid.

    What has that size already is returned as it is, without a copy and in its dtype;
    what is resized is float32. Masked target cells (also NaN) are set to 0 before the
    target is resized, and no valid cell of the result draws on them (`resize_mask`).

    Args:
        prediction_BHWC: (B, H, W, C) on the student's grid.
        target_BHWC: (B, H', W', C) on the teacher's grid, standardised.
        mask_BHW: (B, H', W') bool, of the target.
        rule: ``larger`` takes the larger grid per axis (EUPE), ``smaller`` the smaller
            per axis, ``student`` and ``teacher`` that side's; with ``coincide`` both
            are the same (DUNE).
        mode: ``bicubic`` or ``bilinear``.

    Source: EUPE sections 3.1 and 4.1 for ``larger``.
    """
    student = (prediction_BHWC.shape[1], prediction_BHWC.shape[2])
    teacher = (target_BHWC.shape[1], target_BHWC.shape[2])
    size_hw = common_size(student, teacher, rule)
    if student != size_hw:
        prediction_BHWC = resize_grid(prediction_BHWC, size_hw, mode)
    if teacher != size_hw:
        filled_BHWC = torch.where(mask_BHW.unsqueeze(-1), target_BHWC, 0.0)
        target_BHWC = resize_grid(filled_BHWC, size_hw, mode)
        mask_BHW = resize_mask(mask_BHW, size_hw, mode)
    return prediction_BHWC, target_BHWC, mask_BHW


def common_size(
    student: tuple[int, int], teacher: tuple[int, int], rule: GridRule
) -> tuple[int, int]:
    """Returns the rows and columns on which `match_grids` compares.

    Args:
        student: rows and columns of the student's grid.
        teacher: rows and columns of the teacher's.
        rule: see `match_grids`.
    """
    if rule == "coincide" and student != teacher:
        raise ValueError(
            f"grids that coincide must be of one size, got {student} of the student "
            f"and {teacher} of the teacher; give the student another input size"
        )
    if rule == "student":
        return student
    if rule == "teacher":
        return teacher
    pick = max if rule == "larger" else min
    return pick(student[0], teacher[0]), pick(student[1], teacher[1])


def sample_grid(grid_BHWC: Tensor, points_BP2: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a grid's values at points, and which points lie inside the view.

    Bilinear between cell centres; within half a cell of the border the nearest centres
    hold, as nothing is known beyond.

    Args:
        grid_BHWC: (B, H, W, C), any float dtype.
        points_BP2: (B, P, 2) x and y as fractions of the view; NaN is outside.

    Returns:
        values (B, P, C) float32, 0 outside; inside (B, P) bool, where 0 <= x < 1 and
        0 <= y < 1.
    """
    inside_BP = ((points_BP2 >= 0) & (points_BP2 < 1)).all(-1)
    # Before the arithmetic, so that no NaN reaches the grid's gradient.
    points_BP2 = torch.where(inside_BP.unsqueeze(-1), points_BP2.float(), 0.0)
    values_BC1P = F.grid_sample(
        grid_BHWC.float().permute(0, 3, 1, 2),
        (2 * points_BP2 - 1).unsqueeze(1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    values_BPC = values_BC1P.squeeze(2).transpose(1, 2)
    return torch.where(inside_BP.unsqueeze(-1), values_BPC, 0.0), inside_BP


def _axis_weights(
    length: int, new_length: int, mode: ResizeMode, device: torch.device
) -> Tensor:
    """Returns the weights by which `resize_grid` resizes an axis: (new, old) float32.

    Resizing is linear and separable: the resized unit vectors are its weights.
    """
    unit = torch.eye(length, device=device)[None, :, :, None]
    return resize_grid(unit, (new_length, length), mode)[0, :, :, 0]
