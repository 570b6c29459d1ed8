"""Linear probes of grids: a class or a number for every pixel.

Owns the protocol: what is fitted, what is scored, and the choice of the penalty.
Fitting is ``regression``'s, pixels and cells are ``cells``', grids of another size are
the caller's to resample.

Cells are fitted, pixels are scored: a cell's target is what its area holds, and a
prediction is interpolated before it is judged, bilinear with align_corners=False, as
for all grids of a view. One penalty costs a fit and one pass over ``choose``'s pixels;
memory is one float64 copy of a split's cells, two while fitting.

Shape suffixes: N images, H and W of labels, h and w of the grid, C features, R axes,
K classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from student_train.errors import TrainingError
from student_train.probes.cells import (
    cell_means,
    class_shares,
    image_pieces,
    upsample,
    valid_pixels,
)
from student_train.probes.linear import PENALTIES, RIDGE_PENALTIES
from student_train.probes.regression import (
    Basis,
    LinearMap,
    logistic_path,
    ridge_path,
)
from student_train.probes.scores import (
    IGNORED,
    ProbeScore,
    class_iou,
    confusion_matrix,
    curve_details,
    delta1,
    mean_iou,
    pixel_accuracy,
    r_squared,
    rmse,
)
from student_train.probes.splits import (
    Values,
    as_labels,
    as_tensor,
    check_finite,
    check_labels,
    check_rows_and_widths,
)

CELLS_GRADIENT = 1e-4
"""Largest preconditioned gradient component of a fit of cells.

Ten times ``regression.GRADIENT``, for half of the evaluations. On 11 fits of 16 to 20
thousand cells (64 to 256 channels, 5 and 12 classes) mean IoU on test changed by at
most 0.01 points, and the chosen penalty never.
"""


@dataclass(frozen=True)
class DenseSplit:
    """Grids of features over images, with a label or a number for each pixel.

    Attributes:
        grids_NHWC: (N, h, w, C) float, finite in valid cells.
        labels_NHW: (N, H, W) integer classes, -1 where there is none. At least as fine
            as the grid, over the same box; a whole multiple is not needed.
        numbers_NHW: (N, H, W) float, NaN where there is none; positive if logarithms
            are learned.
        valid_NHW: (N, h, w) bool; other cells are not fitted, their pixels not scored
            and never drawn on. All, if absent.
    """

    grids_NHWC: Values
    labels_NHW: Values | None = None
    numbers_NHW: Values | None = None
    valid_NHW: Values | None = None


class _Cells(NamedTuple):
    """A checked split: zeros in invalid cells; numbers or logarithms in float64."""

    grids_NhwC: Tensor
    valid_Nhw: Tensor
    truth_NHW: Tensor


def dense_class_probe(
    fit: DenseSplit,
    choose: DenseSplit,
    test: DenseSplit,
    num_classes: int,
    *,
    device: str | torch.device = "cpu",
) -> ProbeScore:
    """Returns the mean IoU of a linear classifier of cells, fitted on ``fit``.

    A cell's target is the share of each class among its labelled pixels; cells without
    any are left out; all others weigh the same. Logits are upsampled to the labels'
    resolution, then the largest wins. The mean is over one confusion matrix of the
    split; classes neither true nor predicted in it are left out. The penalty is that of
    ``PENALTIES`` with the best mean IoU on ``choose``, the stronger where equal.
    ``details`` has ``pixel_accuracy`` and ``num_scored_classes`` on ``test``.

    Args:
        fit: images to fit to, with labels.
        choose: images that choose the penalty.
        test: images scored.
        num_classes: K; a class absent from ``fit`` is never predicted.
        device: where to compute.

    Raises:
        TrainingError: a split that cannot be used, or a label out of range.
    """
    splits = _class_cells(fit, choose, test, num_classes, torch.device(device))
    shares_NhwK = class_shares(
        splits["fit"].truth_NHW, splits["fit"].valid_Nhw.shape[1:], num_classes
    )
    chosen_Nhw = splits["fit"].valid_Nhw & (shares_NhwK.sum(-1) > 0)
    features = splits["fit"].grids_NhwC[chosen_Nhw]
    basis = Basis.of(features)
    rotated = _rotate(basis, splits["choose"].grids_NhwC)
    path = logistic_path(
        basis.rotate(features),
        shares_NhwK[chosen_Nhw],
        PENALTIES,
        tolerance=CELLS_GRADIENT,
    )
    maps = {found.penalty: found for found in path}
    curve = {
        penalty: mean_iou(_confusion(rotated, found, splits["choose"], num_classes))
        for penalty, found in maps.items()
    }
    best = max(curve, key=lambda penalty: (curve[penalty], penalty))

    rotated = _rotate(basis, splits["test"].grids_NhwC)
    confusion_KK = _confusion(rotated, maps[best], splits["test"], num_classes)
    details = curve_details("l2", curve)
    details["gradient"] = maps[best].gradient
    details["pixel_accuracy"] = pixel_accuracy(confusion_KK)
    details["num_scored_classes"] = float(class_iou(confusion_KK).isfinite().sum())
    return ProbeScore(
        value=mean_iou(confusion_KK),
        metric="mean_iou",
        higher_is_better=True,
        setting={"l2": best},
        choose_value=curve[best],
        details=details | _counts(splits, len(features)),
    )


def dense_number_probe(
    fit: DenseSplit,
    choose: DenseSplit,
    test: DenseSplit,
    *,
    log: bool = True,
    device: str | torch.device = "cpu",
) -> ProbeScore:
    """Returns delta1 (``log``) or the error of a ridge regression fitted on ``fit``.

    A cell's target is the mean of its known pixels, or of their natural logarithms;
    cells without any are left out. The prediction is upsampled to the numbers'
    resolution. With ``log`` the measure is delta1, the share of known pixels within a
    factor of 1.25, and ``details`` has ``rmse_log`` and ``rmse`` (the numbers' unit) on
    ``test``; else it is the root mean squared error, and ``details`` has ``r_squared``.
    The penalty is that of ``RIDGE_PENALTIES`` with the best measure on ``choose``, the
    stronger where equal.

    Args:
        fit: images to fit to, with numbers.
        choose: images that choose the penalty.
        test: images scored.
        log: learn and score logarithms; numbers are then positive.
        device: where to compute.

    Raises:
        TrainingError: a split that cannot be used, or a number that is not positive.
    """
    splits = _number_cells(fit, choose, test, log, torch.device(device))
    means_Nhw = cell_means(splits["fit"].truth_NHW, splits["fit"].valid_Nhw.shape[1:])
    chosen_Nhw = splits["fit"].valid_Nhw & means_Nhw.isfinite()
    features = splits["fit"].grids_NhwC[chosen_Nhw]
    basis = Basis.of(features)
    rotated = _rotate(basis, splits["choose"].grids_NhwC)
    path = ridge_path(
        basis.rotate(features),
        basis.spectrum_R,
        means_Nhw[chosen_Nhw],
        RIDGE_PENALTIES,
    )
    maps = {found.penalty: found for found in path}
    known_NHW = splits["choose"].truth_NHW.isfinite()
    true_P = _in_unit(splits["choose"].truth_NHW[known_NHW], log)
    curve = {}
    for penalty, found in maps.items():
        predicted_P = _predictions(rotated, found, splits["choose"], known_NHW)
        curve[penalty] = _measure(_in_unit(predicted_P, log), true_P, log)
    sign = 1 if log else -1
    best = max(curve, key=lambda penalty: (sign * curve[penalty], penalty))

    rotated = _rotate(basis, splits["test"].grids_NhwC)
    known_NHW = splits["test"].truth_NHW.isfinite()
    true_P = splits["test"].truth_NHW[known_NHW]
    predicted_P = _predictions(rotated, maps[best], splits["test"], known_NHW)
    details = curve_details("l2", curve)
    if log:
        details["rmse_log"] = rmse(predicted_P, true_P)
    else:
        details["r_squared"] = r_squared(predicted_P, true_P)
    predicted_P, true_P = _in_unit(predicted_P, log), _in_unit(true_P, log)
    if log:
        details["rmse"] = rmse(predicted_P, true_P)
    return ProbeScore(
        value=_measure(predicted_P, true_P, log),
        metric="delta1" if log else "rmse",
        higher_is_better=log,
        setting={"l2": best},
        choose_value=curve[best],
        details=details | _counts(splits, len(features)),
    )


def _in_unit(values_P: Tensor, log: bool) -> Tensor:
    """Returns what was fitted in the numbers' own unit."""
    return values_P.exp() if log else values_P


def _measure(predicted_P: Tensor, true_P: Tensor, log: bool) -> float:
    """Returns delta1 (``log``), else the root mean squared error."""
    return delta1(predicted_P, true_P) if log else rmse(predicted_P, true_P)


def _confusion(
    rotated_NhwR: Tensor, found: LinearMap, split: _Cells, num_classes: int
) -> Tensor:
    """Returns the (K, K) confusion matrix of a split's labelled pixels."""
    confusion_KK = torch.zeros(
        (num_classes, num_classes), dtype=torch.int64, device=rotated_NhwR.device
    )
    for images in image_pieces(split.truth_NHW, num_classes):
        truth_NHW = split.truth_NHW[images]
        # Without invalid cells the weights no longer sum to 1; the largest logit stays
        # the largest, for all classes lack the same.
        logits_NKHW = upsample(
            found(rotated_NhwR[images]) * split.valid_Nhw[images].unsqueeze(-1),
            truth_NHW,
        )
        confusion_KK += confusion_matrix(
            logits_NKHW.argmax(1).flatten(), truth_NHW.flatten(), num_classes
        )
    return confusion_KK


def _predictions(
    rotated_NhwR: Tensor, found: LinearMap, split: _Cells, known_NHW: Tensor
) -> Tensor:
    """Returns (P,) float32: what is predicted of a split's known pixels."""
    predicted = []
    for images in image_pieces(split.truth_NHW, 2):
        valid_Nhw1 = split.valid_Nhw[images].unsqueeze(-1).double()
        both_Nhw2 = torch.cat(
            [found(rotated_NhwR[images]) * valid_Nhw1, valid_Nhw1], dim=-1
        )
        known = known_NHW[images]
        value_NHW, weight_NHW = upsample(both_Nhw2, known).unbind(1)
        predicted.append((value_NHW / weight_NHW)[known])
    return torch.cat(predicted)


def _rotate(basis: Basis, grids_NhwC: Tensor) -> Tensor:
    """Returns (N, h, w, R) float64."""
    rotated = basis.rotate(grids_NhwC.flatten(0, 2))
    return rotated.reshape(*grids_NhwC.shape[:3], -1)


def _class_cells(
    fit: DenseSplit,
    choose: DenseSplit,
    test: DenseSplit,
    num_classes: int,
    device: torch.device,
) -> dict[str, _Cells]:
    """Returns the checked splits by name; labels of invalid cells' pixels are -1."""
    splits = {}
    for name, split in {"fit": fit, "choose": choose, "test": test}.items():
        if split.labels_NHW is None:
            raise TrainingError(f"labels_NHW must be given, got None (split {name})")
        labels_NHW = as_labels(name, split.labels_NHW, device)
        check_labels(name, labels_NHW, num_classes, lowest=IGNORED)
        cells = _cells(name, split, labels_NHW)
        labels_NHW = labels_NHW.where(
            valid_pixels(cells.valid_Nhw, cells.truth_NHW), IGNORED
        )
        _check_known(name, "labelled", labels_NHW != IGNORED)
        splits[name] = cells._replace(truth_NHW=labels_NHW)
    check_rows_and_widths({name: cells.grids_NhwC for name, cells in splits.items()})
    return splits


def _number_cells(
    fit: DenseSplit,
    choose: DenseSplit,
    test: DenseSplit,
    log: bool,
    device: torch.device,
) -> dict[str, _Cells]:
    """Returns the checked splits by name; invalid cells' pixels are NaN."""
    splits = {}
    for name, split in {"fit": fit, "choose": choose, "test": test}.items():
        if split.numbers_NHW is None:
            raise TrainingError(f"numbers_NHW must be given, got None (split {name})")
        numbers_NHW = as_tensor(split.numbers_NHW, torch.float64, device)
        wrong = numbers_NHW.isinf()
        if log:
            wrong |= numbers_NHW <= 0
        if bool(wrong.any()):
            raise TrainingError(
                f"numbers must be {'positive and ' if log else ''}finite, or NaN where "
                f"there is none, got {float(numbers_NHW[wrong][0])} (split {name})"
            )
        cells = _cells(name, split, numbers_NHW)
        truth_NHW = (numbers_NHW.log() if log else numbers_NHW).where(
            valid_pixels(cells.valid_Nhw, cells.truth_NHW), math.nan
        )
        _check_known(name, "known", truth_NHW.isfinite())
        splits[name] = cells._replace(truth_NHW=truth_NHW)
    check_rows_and_widths({name: cells.grids_NhwC for name, cells in splits.items()})
    return splits


def _cells(name: str, split: DenseSplit, truth_NHW: Tensor) -> _Cells:
    """Returns the checked grids of one split beside ``truth_NHW``."""
    grids_NhwC = as_tensor(split.grids_NHWC, torch.float32, truth_NHW.device)
    shape = tuple(grids_NhwC.shape)
    pixels = tuple(truth_NHW.shape)
    if len(shape) != 4 or len(pixels) != 3 or shape[0] != pixels[0]:
        raise TrainingError(
            "grids and truth must be (N, h, w, C) and (N, H, W) of the same images, "
            f"got {shape} and {pixels} (split {name})"
        )
    check_rows_and_widths({name: grids_NhwC})
    if pixels[1] < shape[1] or pixels[2] < shape[2]:
        raise TrainingError(
            f"truth must be at least as fine as the grid {shape[1:3]}, got "
            f"{pixels[1:]} (split {name}); resample the grid"
        )
    valid_Nhw = torch.ones(shape[:3], dtype=torch.bool, device=truth_NHW.device)
    if split.valid_NHW is not None:
        valid_Nhw = as_tensor(split.valid_NHW, torch.bool, truth_NHW.device)
        if tuple(valid_Nhw.shape) != shape[:3]:
            raise TrainingError(
                f"valid must be one for each cell {shape[:3]}, got "
                f"{tuple(valid_Nhw.shape)} (split {name})"
            )
        grids_NhwC = grids_NhwC.where(valid_Nhw.unsqueeze(-1), 0.0)
    check_finite(name, "features of valid cells", grids_NhwC)
    return _Cells(grids_NhwC, valid_Nhw, truth_NHW)


def _check_known(name: str, word: str, known_NHW: Tensor) -> None:
    """Refuses a split without a pixel to fit to or to score."""
    if not bool(known_NHW.any()):
        raise TrainingError(
            f"split {name} must have a {word} pixel in a valid cell, got none"
        )


def _counts(splits: dict[str, _Cells], num_cells: int) -> dict[str, float]:
    """Returns how many images each split has, and the cells that were fitted."""
    counts = {f"num_{name}": float(len(cells[0])) for name, cells in splits.items()}
    return counts | {"num_fit_cells": float(num_cells)}
