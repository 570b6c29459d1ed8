"""Where each sample lies in its shard, as the index that made the bank found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from manifests.bank import ShardEntry
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.row_index import decode_table


@dataclass(frozen=True)
class ShardSpans:
    """Where the rows of one shard lie in it.

    Attributes:
        offset: (n,) int64, byte of the first header of each row's first member.
        size: (n,) int64, bytes from there to the end of its last member.
        refused: row to why the index refused it.
    """

    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    refused: Mapping[int, str]


class SampleTable:
    """Spans of every shard of a bank; reads each part of the dataset's index once."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: dict[str, dict[str, ShardSpans]] = {}

    def spans(self, shard: ShardEntry) -> ShardSpans:
        """Returns where the rows of a shard lie.

        Raises:
            BankError: the index part is missing, damaged or lacks the shard.
        """
        if shard.part not in self._parts:
            self._parts[shard.part] = self._read(shard.part)
        found = self._parts[shard.part].get(shard.name)
        if found is None or len(found.offset) != shard.samples:
            raise BankError(
                f"{self._url(shard.part)} must hold the {shard.samples} rows of "
                f"{shard.name}, got {0 if found is None else len(found.offset)}; "
                "restore it from a copy"
            )
        return found

    def _url(self, part: str) -> str:
        return self._store.url_of(f"dataset/{part}.parquet")

    def _read(self, part: str) -> dict[str, ShardSpans]:
        data = self._store.read_or_none(f"dataset/{part}.parquet")
        if data is None:
            raise BankError(f"{self._url(part)} is missing; restore it from a copy")
        columns = ["shard", "row", "offset", "size", "refused"]
        table = decode_table(data, self._url(part), "restore it from a copy", columns)
        offset, size = (table[name].to_numpy() for name in ("offset", "size"))
        starts = np.flatnonzero(table["row"].to_numpy() == 0).tolist()
        ends = [*starts[1:], table.num_rows]
        refused = table["refused"]
        lines = np.flatnonzero(refused.is_valid().to_numpy())
        return {
            table["shard"][start].as_py(): ShardSpans(
                offset[start:end],
                size[start:end],
                {
                    line - start: refused[line].as_py()
                    for line in lines[(lines >= start) & (lines < end)].tolist()
                },
            )
            for start, end in zip(starts, ends, strict=True)
        }
