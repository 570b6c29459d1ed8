"""Targets from a bank: blocks in an order of their own, standardised for a loss.

Owns the order (a function of seed and epoch alone, never of workers or world size) and
the normalisation. The join with inputs and the trainer build on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.bank.open import Bank
from pipeline.bank.statistics import floored_std


@dataclass(frozen=True)
class TargetBlock:
    """One block of one output, ready for a loss.

    Attributes:
        rows: (n,) row numbers in the bank, of valid rows only.
        keys: (n,) keys of those rows.
        values: (n, *shape) float32, standardised if asked.
    """

    rows: npt.NDArray[np.int64]
    keys: tuple[str, ...]
    values: npt.NDArray[np.float32]


def block_order(num_blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Returns a permutation of ``num_blocks`` that depends on (seed, epoch) alone.

    Raw words of a counter-based generator are sorted, so that NumPy's own shuffling may
    change without changing the order.
    """
    words = np.random.Philox(key=[seed, epoch]).random_raw(num_blocks)
    return np.argsort(words, kind="stable").astype(np.int64)


def standardise(
    values: npt.NDArray[np.floating],
    mean: npt.NDArray[np.float64],
    variance: npt.NDArray[np.float64],
) -> npt.NDArray[np.float32]:
    """Returns (values - mean) / std over the last axis, std floored as the bank says.

    Args:
        values: (..., C).
        mean: (C,).
        variance: (C,).

    Source: EUPE section 3.3; the floor is DESIGN section 3, rule 11.
    """
    found: npt.NDArray[np.float32] = ((values - mean) / floored_std(variance)).astype(
        np.float32
    )
    return found


def iter_targets(
    bank: Bank,
    path: str,
    *,
    view: int = 0,
    seed: int = 0,
    epoch: int = 0,
    normalise: bool = True,
) -> Iterator[TargetBlock]:
    """Yields every committed block of an output once, in the order of (seed, epoch).

    Args:
        bank: an open bank.
        path: ``<teacher>/<group>/<size>/<output>``.
        view: which view.
        seed: of the order.
        epoch: of the order.
        normalise: standardise with the bank's own statistics.

    Raises:
        BankError: a block is missing or damaged; it is named.
    """
    valid = bank.validity(path)
    if normalise:
        statistics = bank.statistics(path)
        mean, variance = statistics["mean"], statistics["variance"]
    blocks = bank.committed_blocks(path)
    keys = bank.keys()
    size = bank.record.block_rows
    for position in block_order(len(blocks), seed, epoch):
        block = int(blocks[position])
        inside = valid[block * size : (block + 1) * size]
        values = bank.read(path, block, view)[inside]
        rows = block * size + np.flatnonzero(inside)
        yield TargetBlock(
            rows=rows,
            keys=tuple(keys[row] for row in rows),
            values=standardise(values, mean, variance) if normalise else values,
        )
