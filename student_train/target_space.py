"""The space that a target is learned in: its normaliser, and what its losses divide by.

Owns what is taken of a bank's statistics when a run begins, and kept from then on.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from manifests.errors import BankError
from pipeline.bank.open import Bank
from student_train.errors import TrainingError
from student_train.normalisation import MIXING, Normaliser
from student_train.tasks import Task


class TargetSpace(nn.Module):
    """What a run keeps of the statistics of a target; not-a-number until fitted.

    Attributes:
        normaliser: None where the target is learned as it is.
    """

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.normaliser = (
            None if task.normalise == "none" else Normaliser(task.normalise, task.width)
        )
        self._names = task.statistics
        for name in self._names:
            self.register_buffer(name, torch.tensor(torch.nan))

    def fit(self, task: Task, bank: Bank) -> None:
        """Takes its numbers from the bank.

        Args:
            task: the target that it was made for.
            bank: that has it.

        Raises:
            TrainingError: the bank has not what is asked for of this output.
            BankError: its statistics cannot be read.
        """
        if task.path is None or (self.normaliser is None and not self._names):
            return
        found = bank.statistics(task.path)
        if self.normaliser is not None:
            if task.normalise in MIXING:
                found = found | {"covariance": _covariance(task, task.path, bank)}
            self.normaliser.fit(found)
        for name in self._names:
            value = float(found[name])
            if not (math.isfinite(value) and value > 0):
                raise TrainingError(
                    f"targets.{task.name}.loss needs a {name} above 0 of {task.path}, "
                    f"got {value} in the bank: its vectors have no direction, or but "
                    "one; take another loss"
                )
            getattr(self, name).fill_(value)

    def forward(self, values: Tensor) -> Tensor:
        """Returns float32 (..., C) values, normalised."""
        return values if self.normaliser is None else self.normaliser(values)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """What losses are computed with, by name."""
        return {name: getattr(self, name) for name in self._names}


def _covariance(task: Task, path: str, bank: Bank) -> npt.NDArray[np.float64]:
    level, _, name = path.rpartition("/")
    try:
        return bank.whole_array(f"{level}/stats/{name}_covariance")
    except BankError as error:
        raise TrainingError(
            f"targets.{task.name}.normalise must be none or standardise for {path}, of "
            f"which the bank keeps no covariance, got {task.normalise} ({error}); "
            f"set `normalise: standardise` on the target"
        ) from error
