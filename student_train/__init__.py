"""Training a student from a bank: reads targets, never a live teacher.

Imports manifests, pipeline.samples and pipeline.bank; neither teachers nor Beam. The
public names are lazy: importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from student_train.batches import Batch as Batch
    from student_train.dataset import BankDataset as BankDataset
    from student_train.reading import Reading as Reading

_PUBLIC = {
    "BankDataset": "student_train.dataset",
    "Batch": "student_train.batches",
    "Reading": "student_train.reading",
}

__all__ = ["BankDataset", "Batch", "Reading"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
