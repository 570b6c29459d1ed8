"""Which rows of a bank are meant: by shard, by key, by share, by number."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from manifests.recipe import RowsConfig
from pipeline.bank.open import Bank
from pipeline.bank.row_names import KeyList, lies_in, row_places
from student_train.errors import TrainingError

Bools = npt.NDArray[np.bool_]


def select_rows(bank: Bank, config: RowsConfig, where: str) -> Bools:
    """Returns which rows a selection means, (num_rows,); padding is never among them.

    Args:
        bank: an open bank.
        config: the selection; without a field, all samples of shards in use.
        where: its entry in the document, for messages.

    Raises:
        TrainingError: it means no row, or names keys that the bank does not have.
    """
    record = bank.record
    chosen = np.zeros(record.num_rows, np.bool_)
    for shard in record.shards:
        patterns = config.shards or ["*"]
        if not shard.retired and any(fnmatch.fnmatch(shard.name, p) for p in patterns):
            first = shard.first_block * record.block_rows
            chosen[first : first + shard.samples] = True
    if config.shards and not chosen.any():
        names = ", ".join(shard.name for shard in record.shards[:5])
        raise TrainingError(
            f"{where}.shards must match shards of the bank ({names}, ...), got "
            f"{config.shards}"
        )
    if config.keys is not None:
        chosen &= _by_keys(bank, config.keys, where)
    if config.share is not None or config.limit is not None:
        rows = np.flatnonzero(chosen)
        places = _hashes(bank, rows)
        if config.share is not None:
            inside = lies_in(places, *config.share)
            rows, places = rows[inside], places[inside]
        if config.limit is not None:
            rows = rows[np.argsort(places, kind="stable")[: config.limit]]
        chosen = np.zeros(record.num_rows, np.bool_)
        chosen[rows] = True
    if not chosen.any():
        raise TrainingError(f"{where} must mean at least one row, got none")
    return chosen


def shard_names(bank: Bank, rows: npt.NDArray[np.int64]) -> list[str]:
    """Returns the name of the shard that each row comes from."""
    shards = bank.record.shards
    starts = [shard.first_block * bank.record.block_rows for shard in shards]
    places = np.searchsorted(starts, rows, side="right") - 1
    return [shards[place].name for place in places.tolist()]


def _hashes(bank: Bank, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Returns 64 bits per row that depend on its shard's name and its key alone."""
    found = np.empty(len(rows), np.uint64)
    for shard, places, keys in _by_shard(bank, rows):
        found[places] = row_places(shard, keys)
    return found


def _by_keys(bank: Bank, path: str, where: str) -> Bools:
    listed = KeyList.read(path)
    rows = np.flatnonzero(bank.keys() != "")
    chosen = np.zeros(bank.record.num_rows, np.bool_)
    for shard, places, keys in _by_shard(bank, rows):
        chosen[rows[places]] = listed.matches(shard, keys)
    if absent := listed.unmet():
        raise TrainingError(
            f"{where}.keys must be keys of the bank, got {absent[0]!r} and "
            f"{len(absent) - 1} more that it does not have ({path})"
        )
    return chosen


def _by_shard(
    bank: Bank, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[str, slice, npt.NDArray[np.object_]]]:
    """Yields (shard, where in ``rows``, keys) of ascending rows, shard by shard."""
    keys = bank.keys()[rows]
    names = np.asarray(shard_names(bank, rows), object)
    borders = np.flatnonzero(names[1:] != names[:-1]) + 1
    for start, end in itertools.pairwise([0, *borders.tolist(), len(rows)]):
        if start < end:
            yield str(names[start]), slice(start, end), keys[start:end]
