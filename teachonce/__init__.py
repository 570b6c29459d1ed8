"""TeachOnce: run each teacher once, keep its features in a bank, distil from the bank.

The public names are lazy: importing this package imports neither torch nor Beam.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.bank.open import Bank as Bank
    from pipeline.bank.open import open_bank as open_bank
    from pipeline.bank.row_geometry import point_table as point_table
    from student_train.dataset import BankDataset as BankDataset
    from student_train.reading import Reading as Reading

_PUBLIC = {
    "open_bank": "pipeline.bank.open",
    "Bank": "pipeline.bank.open",
    "point_table": "pipeline.bank.row_geometry",
    "BankDataset": "student_train.dataset",
    "Reading": "student_train.reading",
}

__all__ = [
    "Bank",
    "BankDataset",
    "Reading",
    "__version__",
    "open_bank",
    "point_table",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("teachonce")
    if name in _PUBLIC:
        from teachonce.environment import check_packages, explain_missing

        check_packages()
        try:
            return getattr(importlib.import_module(_PUBLIC[name]), name)
        except ImportError as error:
            missing = explain_missing(error, name)
            if missing is None:
                raise
            raise ImportError(missing, name=error.name, path=error.path) from error
    raise AttributeError(f"module 'teachonce' has no attribute {name!r}")
