"""Linear probes of vectors: a class each, or a number each.

Owns the two grids of penalties, which are the same for every model, and the choice from
them. Fitting is ``regression``'s, to its own tolerance: where ``choose`` has few rows,
a coarser one changes what is chosen.

Shape suffixes: N rows, D features, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from student_train.probes.regression import Basis, logistic_path, ridge_path
from student_train.probes.scores import (
    ProbeScore,
    accuracy,
    curve_details,
    majority_accuracy,
    r_squared,
    rmse,
)
from student_train.probes.splits import (
    ClassSplit,
    NumberSplit,
    class_tensors,
    number_tensors,
)

PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""The grid of logistic fits, strong to weak, per row and on standardised features."""

RIDGE_PENALTIES = (1e2, 1e1, *PENALTIES)
"""The grid of ridge fits: wider, for it costs nothing and few rows want more."""


def linear_probe(
    fit: ClassSplit,
    choose: ClassSplit,
    test: ClassSplit,
    num_classes: int,
    *,
    device: str | torch.device = "cpu",
) -> ProbeScore:
    """Returns the top-1 accuracy of multinomial logistic regression, fitted on ``fit``.

    Features are standardised with the fit split's mean and floored deviation, so that
    their scale does not matter and a dead channel is not amplified. The penalty is that
    of ``PENALTIES`` with the best accuracy on ``choose``, the stronger where equal.

    Args:
        fit: rows to fit to.
        choose: rows that choose the penalty.
        test: rows scored.
        num_classes: K; a class absent from ``fit`` is never predicted.
        device: where to compute.

    Raises:
        TrainingError: a split that cannot be used, or a label out of range.
    """
    tensors = class_tensors(
        {"fit": fit, "choose": choose, "test": test}, num_classes, torch.device(device)
    )
    (features_ND, labels_N), (choose_ND, choose_N), (test_ND, test_N) = tensors.values()
    basis = Basis.of(features_ND)
    rotated = basis.rotate(choose_ND)
    targets_NK = F.one_hot(labels_N, num_classes).double()
    path = logistic_path(basis.rotate(features_ND), targets_NK, PENALTIES)
    maps = {found.penalty: found for found in path}
    curve = {
        penalty: accuracy(found(rotated).argmax(1), choose_N)
        for penalty, found in maps.items()
    }
    best = max(curve, key=lambda penalty: (curve[penalty], penalty))

    answer_N = maps[best](basis.rotate(test_ND)).argmax(1)
    details = curve_details("l2", curve)
    details["gradient"] = maps[best].gradient
    details["majority_accuracy"] = majority_accuracy(labels_N, test_N)
    details |= {f"num_{name}": float(len(rows)) for name, (_, rows) in tensors.items()}
    return ProbeScore(
        value=accuracy(answer_N, test_N),
        metric="accuracy",
        higher_is_better=True,
        setting={"l2": best},
        choose_value=curve[best],
        details=details,
    )


def ridge_probe(
    fit: NumberSplit,
    choose: NumberSplit,
    test: NumberSplit,
    *,
    device: str | torch.device = "cpu",
) -> ProbeScore:
    """Returns the root mean squared error of ridge regression, fitted on ``fit``.

    Features are standardised as in ``linear_probe``. The penalty is that of
    ``RIDGE_PENALTIES`` with the least error on ``choose``, the stronger where equal.
    ``details`` has ``r_squared`` on ``test`` and ``mean_rmse``, the error of answering
    the fit split's mean.

    Args:
        fit: rows to fit to.
        choose: rows that choose the penalty.
        test: rows scored.
        device: where to compute.

    Raises:
        TrainingError: a split that cannot be used; it is named.
    """
    tensors = number_tensors(
        {"fit": fit, "choose": choose, "test": test}, torch.device(device)
    )
    (features_ND, fit_N), (choose_ND, choose_N), (test_ND, test_N) = tensors.values()
    basis = Basis.of(features_ND)
    rotated = basis.rotate(choose_ND)
    maps = {
        found.penalty: found
        for found in ridge_path(
            basis.rotate(features_ND), basis.spectrum_R, fit_N, RIDGE_PENALTIES
        )
    }
    curve = {
        penalty: rmse(found(rotated)[:, 0], choose_N) for penalty, found in maps.items()
    }
    best = min(curve, key=lambda penalty: (curve[penalty], -penalty))

    answer_N = maps[best](basis.rotate(test_ND))[:, 0]
    details = curve_details("l2", curve)
    details["r_squared"] = r_squared(answer_N, test_N)
    details["mean_rmse"] = rmse(fit_N.mean().expand_as(test_N), test_N)
    details |= {f"num_{name}": float(len(rows)) for name, (_, rows) in tensors.items()}
    return ProbeScore(
        value=rmse(answer_N, test_N),
        metric="rmse",
        higher_is_better=False,
        setting={"l2": best},
        choose_value=curve[best],
        details=details,
    )
