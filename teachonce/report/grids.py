"""Teachers' grids of the rows that a report shows, in the space of their colours.

Owns reading them from the bank and standardising; what cannot be read is said, and the
other rows and outputs go on.

Shape suffixes: R and K rows and columns of a grid, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manifests.bank import OutputEntry
from manifests.errors import BankError, TeachOnceError
from manifests.teacher import BevExtent
from pipeline.bank.open import Bank
from pipeline.bank.statistics import floored_std
from teachonce.report.pictures import Basis, fit_basis
from teachonce.report.shown import SHOWN_VIEW


@dataclass(frozen=True, eq=False)
class ShownOutput:
    """A teacher's grid output on the rows that are shown.

    Attributes:
        path: in the bank.
        entry: what the bank says of it.
        inputs: that the teacher looked at.
        extent: of a bird's-eye grid, else None.
        mean_C, std_C: by which it is standardised.
        grids: by row, (R, K, C) float32, standardised.
        basis: of their colours.
        problems: what could not be read.
    """

    path: str
    entry: OutputEntry
    inputs: tuple[str, ...]
    extent: BevExtent | None
    mean_C: np.ndarray
    std_C: np.ndarray
    grids: dict[int, np.ndarray]
    basis: Basis | None
    problems: tuple[str, ...]

    @property
    def teacher(self) -> str:
        """Its teacher."""
        return self.path.split("/")[0]

    def standardise(self, values: np.ndarray) -> np.ndarray:
        """Returns values (..., C) in the space of ``grids``."""
        found: np.ndarray = (values - self.mean_C) / self.std_C
        return found


def read_outputs(bank: Bank, rows: Sequence[int]) -> list[ShownOutput]:
    """Returns every grid output of view 0 on some rows, in the order of the bank.

    Args:
        bank: finalised.
        rows: of the bank.
    """
    return [
        _read_output(bank, path, rows)
        for path in bank.outputs
        if bank.output(path).kind == "grid" and SHOWN_VIEW in bank.views_of(path)
    ]


def _read_output(bank: Bank, path: str, rows: Sequence[int]) -> ShownOutput:
    raw: dict[int, np.ndarray] = {}
    problems: list[str] = []
    size = bank.record.block_rows
    try:
        valid = bank.validity(path)
    except TeachOnceError as error:
        valid = np.ones(bank.record.num_rows, np.bool_)
        problems.append(str(error))
    for block in sorted({row // size for row in rows}):
        try:
            values = bank.read(path, block, SHOWN_VIEW)
        except (TeachOnceError, OSError) as error:
            problems.append(str(error))
            continue
        for row in rows:
            # A copy: the block is let go of.
            if row // size == block and valid[row]:
                raw[row] = _picture(values[row % size]).copy()
    mean_C, std_C = _moments(bank, path, raw)
    grids = {row: (grid - mean_C) / std_C for row, grid in raw.items()}
    return ShownOutput(
        path,
        bank.output(path),
        bank.pass_of(path).inputs,
        bank.output(path).extent,
        mean_C,
        std_C,
        grids,
        basis_of(grids),
        tuple(problems),
    )


def _picture(grid_HWC: np.ndarray) -> np.ndarray:
    """Returns the part of a grid that lies on the picture, without padding's cells."""
    is_cell_HW = np.isfinite(grid_HWC[..., 0])
    return grid_HWC[is_cell_HW.any(1)][:, is_cell_HW.any(0)]


def _moments(
    bank: Bank, path: str, raw: Mapping[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and floored deviation: the bank's, else those of what is shown."""
    channels = bank.output(path).shape[-1]
    try:
        found = bank.statistics(path)
        mean_C, variance_C = found["mean"], found["variance"]
    except BankError:
        mean_C = variance_C = np.full(channels, np.nan)
    if not (np.isfinite(mean_C).all() and np.isfinite(variance_C).all()):
        cells_NC = _cells(raw, channels)
        mean_C = cells_NC.mean(0) if len(cells_NC) else np.zeros(channels)
        variance_C = cells_NC.var(0) if len(cells_NC) else np.ones(channels)
    return mean_C.astype(np.float32), floored_std(variance_C).astype(np.float32)


def _cells(grids: Mapping[int, np.ndarray], channels: int) -> np.ndarray:
    """Returns the finite cells of grids, (N, C) float64."""
    cells_NC = np.concatenate(
        [np.empty((0, channels))]
        + [grid.reshape(-1, channels).astype(np.float64) for grid in grids.values()]
    )
    return cells_NC[np.isfinite(cells_NC).all(axis=1)]


def basis_of(grids: Mapping[int, np.ndarray]) -> Basis | None:
    """Returns the basis of all cells of some grids, None where none is finite."""
    if not grids:
        return None
    cells_NC = _cells(grids, next(iter(grids.values())).shape[-1])
    return fit_basis(cells_NC) if len(cells_NC) else None
