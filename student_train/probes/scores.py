"""What a probe answers, and the measures it answers with.

Owns ``ProbeScore`` and measures of predictions. Knows no features and fits nothing.
Measures are float64 sums over whatever device the tensors are on.

Shape suffixes: N things predicted, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -1
"""Label of a pixel that has none; it neither trains nor counts."""


@dataclass(frozen=True)
class ProbeScore:
    """A probe's result on the test split, and the setting that ``choose`` picked.

    Attributes:
        value: on ``test``, which was scored once, with the chosen setting only.
        metric: name of what ``value`` measures.
        higher_is_better: whether a larger value is a better model.
        setting: what was chosen from the grid, by name, as ``{"l2": 0.001}``.
        choose_value: the same measure on ``choose``, with that setting. It was selected
            for being good, so it flatters.
        details: further measures on ``test``; counts; and the value on ``choose`` for
            every setting (``choose_<setting>_<number>``), which shows whether the best
            lies at the grid's border.
    """

    value: float
    metric: str
    higher_is_better: bool
    setting: dict[str, float]
    choose_value: float
    details: dict[str, float]


def curve_details(
    name: str, curve: Mapping[int, float] | Mapping[float, float]
) -> dict[str, float]:
    """Returns the values on ``choose`` as ``ProbeScore.details`` names them.

    Args:
        name: of the setting.
        curve: value by setting.
    """
    return {f"choose_{name}_{number:g}": value for number, value in curve.items()}


def accuracy(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Returns the share of predictions that are right, 0 to 1.

    Args:
        predicted_N: (N,) int64 classes, N at least 1.
        labels_N: (N,) int64 classes.
    """
    return int((predicted_N == labels_N).sum()) / len(labels_N)


def majority_accuracy(fit_labels_N: Tensor, labels_N: Tensor) -> float:
    """Returns the accuracy of always answering the most frequent class of ``fit``.

    The number below which a model's features say nothing. Of equally frequent classes
    the smallest counts.

    Args:
        fit_labels_N: (N,) int64, at least one.
        labels_N: (M,) int64, those to predict, at least one.
    """
    classes, counts = fit_labels_N.unique(return_counts=True)
    return accuracy(classes[counts.argmax()].expand_as(labels_N), labels_N)


def confusion_matrix(predicted_N: Tensor, labels_N: Tensor, num_classes: int) -> Tensor:
    """Returns (K, K) int64 counts: row is the true class, column the predicted one.

    Args:
        predicted_N: (N,) int64 classes in [0, num_classes).
        labels_N: (N,) int64 classes in [0, num_classes), or -1: left out.
        num_classes: K.
    """
    # What is left out becomes pair -1, counted first and dropped: cheaper than a mask.
    pairs_N = (labels_N * num_classes + predicted_N).clamp_min(-1)
    counts = torch.bincount(pairs_N + 1, minlength=num_classes * num_classes + 1)
    return counts[1:].reshape(num_classes, num_classes)


def class_iou(confusion_KK: Tensor) -> Tensor:
    """Returns (K,) float64 intersection over union of each class.

    NaN for a class that is neither true nor predicted anywhere: it has no union.

    Args:
        confusion_KK: (K, K) int64, from ``confusion_matrix`` over the whole split.
    """
    right_K = confusion_KK.diagonal().double()
    union_K = (confusion_KK.sum(0) + confusion_KK.sum(1)).double() - right_K
    return right_K / union_K


def mean_iou(confusion_KK: Tensor) -> float:
    """Returns the mean of ``class_iou`` over the classes that have one, 0 to 1.

    Classes absent from both truth and prediction are left out; a class that is only
    predicted counts as 0. One matrix over the split: a mean of images' values would
    weigh rare classes by how they are spread. NaN where nothing was counted.

    Args:
        confusion_KK: (K, K) int64.
    """
    return float(class_iou(confusion_KK).nanmean())


def pixel_accuracy(confusion_KK: Tensor) -> float:
    """Returns the share of counted things that are right; NaN where none were counted.

    Args:
        confusion_KK: (K, K) int64.
    """
    total = int(confusion_KK.sum())
    return int(confusion_KK.diagonal().sum()) / total if total else math.nan


def rmse(predicted_N: Tensor, true_N: Tensor) -> float:
    """Returns the root of the mean squared error, in the numbers' own unit.

    Args:
        predicted_N: (N,) float, N at least 1.
        true_N: (N,) float.
    """
    return math.sqrt(float((predicted_N.double() - true_N.double()).square().mean()))


def r_squared(predicted_N: Tensor, true_N: Tensor) -> float:
    """Returns 1 - squared error / squared distance to the mean of ``true_N``.

    1 is perfect, 0 as good as the split's own mean, negative worse. NaN where all true
    numbers are equal.

    Args:
        predicted_N: (N,) float, N at least 1.
        true_N: (N,) float.
    """
    true_N = true_N.double()
    error = float((predicted_N.double() - true_N).square().sum())
    spread = float((true_N - true_N.mean()).square().sum())
    return 1 - error / spread if spread else math.nan


def delta1(predicted_N: Tensor, true_N: Tensor) -> float:
    """Returns the share of predictions within a factor of 1.25 of the truth, 0 to 1.

    Args:
        predicted_N: (N,) float, positive, N at least 1.
        true_N: (N,) float, positive, same unit.

    Source: Eigen, Puhrsch and Fergus, "Depth map prediction from a single image using a
        multi-scale deep network" (2014), section 4.2: max(d/d*, d*/d) < 1.25.
    """
    predicted_N, true_N = predicted_N.double(), true_N.double()
    near_N = (predicted_N < 1.25 * true_N) & (true_N < 1.25 * predicted_N)
    return int(near_N.sum()) / len(near_N)
