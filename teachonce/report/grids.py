"""Teachers' grids of the rows that a report shows, in the space of their colours.

Owns reading them from the bank and standardising; what cannot be read is said, and the
other rows and outputs go on.

Shape suffixes: R and K rows and columns of a grid, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manifests.bank import OutputEntry, is_logits
from manifests.errors import BankError, TeachOnceError
from manifests.teacher import BevExtent
from pipeline.bank.open import Bank
from pipeline.bank.statistics import floored_std
from teachonce.report.pictures import Basis, Picture, class_colours, fit_basis
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

    def colours(self, grid_RKC: np.ndarray) -> Picture | None:
        """Returns a standardised grid as a picture; None where nothing can be shown.

        Logits have the colour of their largest, other features those of the basis.
        """
        if is_logits(self.entry.name):
            return class_colours(grid_RKC * self.std_C + self.mean_C)
        return None if self.basis is None else self.basis.colours(grid_RKC)

    def standardise(self, values: np.ndarray) -> np.ndarray:
        """Returns values (..., C) in the space of ``grids``."""
        found: np.ndarray = (values - self.mean_C) / self.std_C
        return found


def read_outputs(bank: Bank, rows: Sequence[int]) -> list[ShownOutput]:
    """Returns every grid output of view 0 on some rows, in the order of the bank.

    Of frames it is the first frame's.

    One output of a teacher has one space and one set of colours on all its inputs: six
    cameras can be compared.

    Args:
        bank: finalised.
        rows: of the bank.
    """
    found: dict[tuple[str, ...], list[_Stored]] = {}
    for path in bank.outputs:
        is_map = bank.output(path).kind in ("grid", "frames")
        if is_map and SHOWN_VIEW in bank.views_of(path):
            teacher, _, size, name = path.split("/")
            one = _read_output(bank, path, rows)
            found.setdefault((teacher, size, name), []).append(one)
    shown = [one for alike in found.values() for one in _in_one_space(bank, alike)]
    order = {path: place for place, path in enumerate(bank.outputs)}
    return sorted(shown, key=lambda one: order[one.path])


@dataclass(frozen=True, eq=False)
class _Stored:
    """Grids of one output as stored, by row, and what could not be read."""

    path: str
    raw: dict[int, np.ndarray]
    problems: tuple[str, ...]


def _read_output(bank: Bank, path: str, rows: Sequence[int]) -> _Stored:
    raw: dict[int, np.ndarray] = {}
    problems: list[str] = []
    size = bank.record.block_rows
    has_frames = bank.output(path).kind == "frames"
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
                found = values[row % size]
                raw[row] = _picture(found[0] if has_frames else found).copy()
    return _Stored(path, raw, tuple(problems))


def _in_one_space(bank: Bank, alike: Sequence[_Stored]) -> list[ShownOutput]:
    """Returns outputs standardised together, in the colours of one basis."""
    moments = [_moments(bank, one.path, one.raw) for one in alike]
    mean_C = np.mean([mean for mean, _ in moments], axis=0)
    square_C = np.mean([var + (mean - mean_C) ** 2 for mean, var in moments], axis=0)
    std_C = floored_std(square_C).astype(np.float32)
    mean_C = mean_C.astype(np.float32)
    grids = [
        {row: (grid - mean_C) / std_C for row, grid in one.raw.items()} for one in alike
    ]
    basis = basis_of([grid for one in grids for grid in one.values()])
    return [
        ShownOutput(
            one.path,
            bank.output(one.path),
            bank.pass_of(one.path).inputs,
            bank.output(one.path).extent,
            mean_C,
            std_C,
            standardised,
            basis,
            one.problems,
        )
        for one, standardised in zip(alike, grids, strict=True)
    ]


def _picture(grid_HWC: np.ndarray) -> np.ndarray:
    """Returns the part of a grid that lies on the picture, without padding's cells."""
    is_cell_HW = np.isfinite(grid_HWC[..., 0])
    picture_HWC: np.ndarray = grid_HWC[is_cell_HW.any(1)][:, is_cell_HW.any(0)]
    return picture_HWC


def _moments(
    bank: Bank, path: str, raw: Mapping[int, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and variance: the bank's, else those of what is shown."""
    channels = bank.output(path).shape[-1]
    try:
        found = bank.statistics(path)
        mean_C, variance_C = found["mean"], found["variance"]
    except BankError:
        mean_C = variance_C = np.full(channels, np.nan)
    if not (np.isfinite(mean_C).all() and np.isfinite(variance_C).all()):
        cells_NC = _cells(list(raw.values()), channels)
        mean_C = cells_NC.mean(0) if len(cells_NC) else np.zeros(channels)
        variance_C = cells_NC.var(0) if len(cells_NC) else np.ones(channels)
    return mean_C, variance_C


def _cells(grids: Sequence[np.ndarray], channels: int) -> np.ndarray:
    """Returns the finite cells of grids, (N, C) float64."""
    cells_NC = np.concatenate(
        [np.empty((0, channels))]
        + [grid.reshape(-1, channels).astype(np.float64) for grid in grids]
    )
    return cells_NC[np.isfinite(cells_NC).all(axis=1)]


def basis_of(grids: Sequence[np.ndarray]) -> Basis | None:
    """Returns the basis of all cells of some grids, None where none is finite."""
    if not grids:
        return None
    cells_NC = _cells(grids, grids[0].shape[-1])
    return fit_basis(cells_NC) if len(cells_NC) else None
