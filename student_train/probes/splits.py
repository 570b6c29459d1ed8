"""Splits of vectors with a class or a number each, checked before anything is fitted.

Owns what the vector probes take (``ClassSplit``, ``NumberSplit``) and the refusals that
all probes share. Which rows are in which split, and where features come from, is the
caller's.

Shape suffixes: N rows, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.bank.statistics import floored_std
from student_train.errors import TrainingError

Values = npt.NDArray[np.generic] | Tensor


@dataclass(frozen=True)
class ClassSplit:
    """Vectors, each of one class.

    Attributes:
        features_ND: (N, D) float, finite.
        labels_N: (N,) integer classes from 0.
    """

    features_ND: Values
    labels_N: Values


@dataclass(frozen=True)
class NumberSplit:
    """Vectors, each with one number.

    Attributes:
        features_ND: (N, D) float, finite.
        numbers_N: (N,) float, finite.
    """

    features_ND: Values
    numbers_N: Values


def as_tensor(values: Values, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns the values as a tensor without gradient, copied only where it must be.

    Args:
        values: an array (also a read-only one) or a tensor.
        dtype: of the tensor.
        device: of the tensor.
    """
    if isinstance(values, np.ndarray):
        # torch warns of read-only memory, which a memory-mapped bank hands out.
        values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    return values.detach().to(device=device, dtype=dtype)


def class_tensors(
    splits: Mapping[str, ClassSplit], num_classes: int | None, device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns each split's (N, D) float32 features and (N,) int64 labels.

    Args:
        splits: by name.
        num_classes: bound of the labels; ``None`` for labels that need only be names.
        device: of the tensors.

    Raises:
        TrainingError: a split is empty, of another width, not finite, or has a label
            out of range.
    """
    features = vector_tensors(
        {name: split.features_ND for name, split in splits.items()}, device
    )
    tensors = {}
    for name, split in splits.items():
        labels_N = as_labels(name, split.labels_N, device)
        check_length(name, "labels", labels_N, features[name])
        check_labels(name, labels_N, num_classes)
        tensors[name] = (features[name], labels_N)
    return tensors


def number_tensors(
    splits: Mapping[str, NumberSplit], device: torch.device
) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns each split's (N, D) float32 features and (N,) float64 numbers.

    Args:
        splits: by name.
        device: of the tensors.

    Raises:
        TrainingError: a split is empty, of another width, or not finite.
    """
    features = vector_tensors(
        {name: split.features_ND for name, split in splits.items()}, device
    )
    tensors = {}
    for name, split in splits.items():
        numbers_N = as_tensor(split.numbers_N, torch.float64, device)
        check_length(name, "numbers", numbers_N, features[name])
        check_finite(name, "numbers", numbers_N)
        tensors[name] = (features[name], numbers_N)
    return tensors


def vector_tensors(
    splits: Mapping[str, Values], device: torch.device
) -> dict[str, Tensor]:
    """Returns each split's (N, D) float32 features, N at least 1, D alike.

    Args:
        splits: (N, D) by name.
        device: of the tensors.

    Raises:
        TrainingError: a split is empty, of another width, or not finite.
    """
    tensors = {}
    for name, values in splits.items():
        features_ND = as_tensor(values, torch.float32, device)
        if features_ND.ndim != 2:
            shape = tuple(features_ND.shape)
            raise TrainingError(f"features must be (N, D), got {shape} (split {name})")
        check_finite(name, "features", features_ND)
        tensors[name] = features_ND
    check_rows_and_widths(tensors)
    return tensors


def standardised(features: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns vectors by split, standardised by the fit split's mean and deviation.

    Args:
        features: (N, C) float32 by split; deviations are floored as the bank's are.
    """
    fit = features["fit"].double()
    std = torch.from_numpy(floored_std(fit.var(0, correction=0).numpy()))
    mean = fit.mean(0)
    return {
        split: ((values.double() - mean) / std).float()
        for split, values in features.items()
    }


def as_labels(name: str, labels: Values, device: torch.device) -> Tensor:
    """Returns the labels of split ``name`` as int64.

    Raises:
        TrainingError: they are not integers, which a cast would hide.
    """
    dtype = str(labels.dtype).removeprefix("torch.")
    if not dtype.startswith(("int", "uint")):
        raise TrainingError(f"labels must be integers, got {dtype} (split {name})")
    return as_tensor(labels, torch.int64, device)


def check_rows_and_widths(tensors: Mapping[str, Tensor]) -> None:
    """Refuses a split without rows, and features of different widths.

    Args:
        tensors: (N, ..., D) by split.

    Raises:
        TrainingError: as said.
    """
    for name, features in tensors.items():
        if len(features) == 0:
            raise TrainingError(
                f"split {name} must have at least one row, got 0; give it keys"
            )
    widths = {name: features.shape[-1] for name, features in tensors.items()}
    if len(set(widths.values())) > 1:
        raise TrainingError(
            f"features must have the same width in all splits, got {widths}; take them "
            "from one model and output"
        )


def check_length(name: str, what: str, values: Tensor, features: Tensor) -> None:
    """Refuses labels or numbers that are not one for each row.

    Raises:
        TrainingError: as said.
    """
    if values.shape != features.shape[:1]:
        raise TrainingError(
            f"{what} must be one for each of {len(features)} rows, got shape "
            f"{tuple(values.shape)} (split {name})"
        )


def check_labels(
    name: str, labels: Tensor, num_classes: int | None, lowest: int = 0
) -> None:
    """Refuses a label outside [lowest, num_classes).

    Args:
        name: of the split.
        labels: int64, any shape.
        num_classes: bound; ``None`` for none.
        lowest: smallest label allowed.

    Raises:
        TrainingError: it names split, label and ``num_classes``.
    """
    wrong = labels < lowest
    if num_classes is not None:
        wrong = wrong | (labels >= num_classes)
    if bool(wrong.any()):
        bound = "" if num_classes is None else f" and below num_classes {num_classes}"
        raise TrainingError(
            f"labels must be at least {lowest}{bound}, got {int(labels[wrong][0])} "
            f"(split {name}); correct the labels or the number of classes"
        )


def check_finite(name: str, what: str, values: Tensor) -> None:
    """Refuses values that are not finite.

    Raises:
        TrainingError: as said.
    """
    if not bool(torch.isfinite(values).all()):
        raise TrainingError(
            f"{what} must be finite, got some that are not (split {name}); leave out "
            "invalid rows"
        )
