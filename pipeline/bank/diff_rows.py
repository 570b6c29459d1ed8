"""What two banks have of the same samples, where their rows lie otherwise in each.

A part of chosen rows beside the bank it is of, two parts, or banks whose blocks have
other lengths: rows are matched by shard and key.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.bank import BankRecord, ShardEntry
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.dataset_index import read_rows
from pipeline.bank.diff import Contents, common_outputs, common_views, shards_by_key
from pipeline.bank.diff_values import ValueDifference
from pipeline.bank.open import Bank

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SharedRows:
    """The samples of one shard that two banks have.

    Attributes:
        shard: its name.
        rows_a: (n,) their rows in A, ascending.
        rows_b: (n,) the rows of the same samples in B.
        only_a: how many A alone has.
        only_b: how many B alone has.
    """

    shard: str
    rows_a: Int64s
    rows_b: Int64s
    only_a: int
    only_b: int


@dataclass(frozen=True)
class SampleCounts:
    """How many samples two banks have, of shards whose rows lie otherwise in each.

    Attributes:
        shards: how many such shards there are.
        both: samples that both have.
        only_a: that A alone has.
        only_b: that B alone has.
    """

    shards: int
    both: int
    only_a: int
    only_b: int

    @classmethod
    def of(cls, shared: Sequence[SharedRows]) -> SampleCounts:
        """Returns the sums over shards."""
        return cls(
            len(shared),
            sum(len(one.rows_a) for one in shared),
            sum(one.only_a for one in shared),
            sum(one.only_b for one in shared),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return asdict(self)


def shared_rows(
    a: tuple[Store, Contents], b: tuple[Store, Contents]
) -> list[SharedRows]:
    """Returns which samples both banks have, shard by shard.

    Args:
        a: store and contents of A.
        b: store and contents of B.

    Raises:
        BankError: the index of a bank is missing or damaged.
    """
    pairs = list(shards_by_key(a[1].record, b[1].record))
    keys_a = _keys(a[0], [shard for shard, _ in pairs])
    keys_b = _keys(b[0], [shard for _, shard in pairs])
    found = []
    for mine, theirs in pairs:
        place = {key: row for row, key in enumerate(keys_b[theirs.name])}
        names = keys_a[mine.name]
        rows = [(row, place[key]) for row, key in enumerate(names) if key in place]
        both = np.asarray(rows, np.int64).reshape(-1, 2)
        starts = [
            shard.first_block * record.block_rows
            for shard, record in ((mine, a[1].record), (theirs, b[1].record))
        ]
        found.append(
            SharedRows(
                mine.name,
                both[:, 0] + starts[0],
                both[:, 1] + starts[1],
                mine.samples - len(both),
                theirs.samples - len(both),
            )
        )
    return found


def _keys(store: Store, shards: Sequence[ShardEntry]) -> dict[str, list[str]]:
    wanted = {shard.name for shard in shards}
    found = {}
    for part in dict.fromkeys(shard.part for shard in shards):
        path = f"dataset/{part}.parquet"
        for name, rows in read_rows(store.read(path), store.url_of(path)):
            if name in wanted:
                found[name] = [row.key for row in rows]
    return found


def row_differences(
    shared: Sequence[SharedRows],
    a: tuple[Store, Contents],
    b: tuple[Store, Contents],
) -> Iterator[ValueDifference]:
    """Yields how far apart the values of the same samples are, for each output.

    Outputs of one kind and shape, and not which points an output is of. Blocks that
    cannot be read are left out; ``verify`` names them.

    Args:
        shared: samples that both have.
        a: store and contents of A.
        b: store and contents of B.
    """
    records = a[1].record, b[1].record
    for path, mine, theirs in common_outputs(*records):
        if mine.kind == "index" or (mine.kind, mine.shape) != (
            theirs.kind,
            theirs.shape,
        ):
            continue
        result = ValueDifference(path)
        for view in common_views(*records, path):
            readers = [
                _Rows(Bank(store, contents.record), path, view)
                for store, contents in (a, b)
            ]
            for one in shared:
                for rows in _runs(one, records):
                    try:
                        values = [
                            reader.read(numbers[rows])
                            for reader, numbers in zip(
                                readers, (one.rows_a, one.rows_b), strict=True
                            )
                        ]
                    except BankError:
                        continue
                    result.add(*values)
        if result.blocks:
            yield result


def _runs(
    shared: SharedRows, records: tuple[BankRecord, BankRecord]
) -> Iterator[slice]:
    """Yields runs of samples that lie in one block of each bank."""
    blocks = np.stack(
        [
            numbers // record.block_rows
            for numbers, record in zip(
                (shared.rows_a, shared.rows_b), records, strict=True
            )
        ]
    )
    borders = np.flatnonzero((blocks[:, 1:] != blocks[:, :-1]).any(axis=0)) + 1
    edges = [0, *borders.tolist(), blocks.shape[1]]
    for start, end in itertools.pairwise(edges):
        if start < end:
            yield slice(start, end)


class _Rows:
    """Rows of one output and view; the last block is kept, for rows ascend."""

    def __init__(self, bank: Bank, path: str, view: int) -> None:
        self._bank, self._path, self._view = bank, path, view
        self._block: int | None = None
        self._values: npt.NDArray[np.float32]

    def read(self, rows: Int64s) -> npt.NDArray[np.float32]:
        """Returns (n, *shape) decoded rows that lie in one block."""
        size = self._bank.record.block_rows
        block = int(rows[0]) // size
        if block != self._block:
            self._values = self._bank.read(self._path, block, self._view)
            self._block = block
        return self._values[rows - block * size]
