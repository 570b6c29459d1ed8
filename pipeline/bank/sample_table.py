"""Where each sample lies in its shard, as the index that made the bank found it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from manifests.bank import ShardEntry
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.dataset_index import check_spans
from pipeline.bank.row_index import decode_table
from pipeline.samples.tar import padded

_COLUMNS = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("refused", pa.string()),
    ]
)


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
        if not shard.sequential and len(found.offset):
            # Whoever reads a row takes so much memory for it. Neither is negative.
            end = int(np.max(found.offset.astype(np.uint64) + found.size.astype("u8")))
            if end > padded(shard.size_bytes):
                raise BankError(
                    f"{self._url(shard.part)} must hold rows within the "
                    f"{shard.size_bytes} bytes of {shard.name}, got one that ends at "
                    f"byte {end}; restore it from a copy"
                )
        return found

    def _url(self, part: str) -> str:
        return self._store.url_of(f"dataset/{part}.parquet")

    def _read(self, part: str) -> dict[str, ShardSpans]:
        data = self._store.read_or_none(f"dataset/{part}.parquet")
        if data is None:
            raise BankError(f"{self._url(part)} is missing; restore it from a copy")
        where, hint = self._url(part), "restore it from a copy"
        table = decode_table(data, where, hint, _COLUMNS, _COLUMNS.names)
        try:
            check_spans(table)
        except ValueError as error:
            raise BankError(f"{where} is damaged ({error}); {hint}") from error
        offset, size = (table[name].to_numpy() for name in ("offset", "size"))
        starts = np.flatnonzero(table["row"].to_numpy() == 0).tolist()
        if starts[:1] != [0][: table.num_rows]:
            raise BankError(f"{self._url(part)} is damaged; restore it from a copy")
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
