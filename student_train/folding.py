"""A head and the way back to the teacher's own space, as one head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from student_train.errors import TrainingError
from student_train.normalisation import Normaliser


def fold(head: nn.Module, normaliser: Normaliser | None) -> nn.Module:
    """Returns a head that gives a teacher's features as the teacher did.

    Undoing a normalisation is affine, as is a head's last layer: one layer does both,
    at the cost of the last one alone. The head given is left as it is.

    Args:
        head: trained on normalised targets.
        normaliser: of those targets; None where they were not normalised.

    Raises:
        TrainingError: a head of another package that does not say its last layers.

    Source: PHI-S (arXiv 2410.01680), on folding the inverse into the last layer.
    """
    folded = copy.deepcopy(head)
    if normaliser is None:
        return folded
    found: Any = getattr(folded, "last_layers", None)
    if found is None:
        raise TrainingError(
            f"a head must have last_layers() to be folded, got {type(head).__name__} "
            "without; it returns the linear layers whose outputs sum to what it gives"
        )
    with torch.no_grad():
        matrix, offset = normaliser.undoing()
        for layer in found():
            bias = offset.to(layer.weight.device)
            inverse = matrix.to(layer.weight.device)
            if layer.bias is not None:
                bias = bias + inverse @ layer.bias.double()
            weight = inverse @ layer.weight.double()
            layer.weight = nn.Parameter(weight.to(layer.weight.dtype))
            layer.bias = nn.Parameter(bias.to(layer.weight.dtype))
            # The sum has the mean once.
            offset = torch.zeros_like(offset)
    return folded
