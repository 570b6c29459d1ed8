"""The dataset's index in a bank: ``dataset/part-*``, who the shards are and their rows.

Owns the Parquet of rows and the JSON beside it; walking shards to make them is in
``pipeline.index``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from manifests.bank import ShardEntry
from manifests.dataset import DatasetRecord, ShardRecord
from manifests.errors import BankError
from manifests.loading import load_json
from manifests.own_checksum import with_own_checksum
from manifests.storage import Store
from pipeline.bank.row_index import (
    TABLE_FAULTS,
    check_table,
    describe_checksum,
    open_checked,
    with_table_checksum,
)
from pipeline.samples.shards import ShardRow

_HINT = (
    "run the same `teachonce precompute` with --repair, it is made anew from the shards"
)
_ROW_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("row", pa.int64()),
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("refused", pa.string()),
    ]
)


@dataclass(frozen=True)
class IndexedShard:
    """A shard's record and its rows, in order."""

    record: ShardRecord
    rows: tuple[ShardRow, ...]


def encode_rows(shards: Sequence[IndexedShard]) -> bytes:
    """Returns the Parquet of rows, one row group per shard."""
    sink = io.BytesIO()
    schema = describe_checksum(_ROW_SCHEMA)
    with pq.ParquetWriter(
        sink, schema, compression="zstd", write_page_checksum=True
    ) as writer:
        for shard in shards:
            count = len(shard.rows)
            table = pa.table(
                {
                    "shard": [shard.record.name] * count,
                    "row": list(range(count)),
                    "key": [row.key for row in shard.rows],
                    "offset": [row.offset for row in shard.rows],
                    "size": [row.size for row in shard.rows],
                    "refused": [row.refused for row in shard.rows],
                },
                schema=schema,
            )
            writer.write_table(table, row_group_size=max(count, 1))
    return with_table_checksum(sink.getvalue())


def write_index(store: Store, stem: str, shards: Sequence[IndexedShard]) -> None:
    """Writes ``<stem>.parquet`` and then ``<stem>.json``, which people may edit."""
    store.replace(f"{stem}.parquet", encode_rows(shards))
    store.replace(f"{stem}.json", _encode_shards(shards) + b"\n")


def write_part(store: Store, part: str, shards: Sequence[IndexedShard]) -> None:
    """Writes a part of a bank's dataset: its rows, then the record of its shards.

    Only for the holder of the bank's lock.
    """
    store.replace(part_path(part), encode_rows(shards))
    store.replace(part_record_path(part), with_own_checksum(_encode_shards(shards)))


def _encode_shards(shards: Sequence[IndexedShard]) -> bytes:
    record = DatasetRecord(shards=tuple(shard.record for shard in shards))
    return json.dumps(record.model_dump(mode="json"), indent=1).encode()


def part_path(part: str) -> str:
    """Returns where the rows of a part of the dataset lie in the bank."""
    return f"dataset/{part}.parquet"


def part_record_path(part: str) -> str:
    """Returns where the record of the shards of a part lies in the bank."""
    return f"dataset/{part}.json"


def read_part(store: Store, part: str) -> Iterator[tuple[str, tuple[ShardRow, ...]]]:
    """Yields (shard name, rows) for every shard of one part of a bank's dataset.

    Raises:
        BankError: it is missing or damaged.
    """
    path = part_path(part)
    data = store.read_or_none(path)
    if data is None:
        raise BankError(f"{store.url_of(path)} is missing; {_HINT}")
    yield from read_rows(data, store.url_of(path), _HINT)


def read_rows(
    data: bytes, where: str, hint: str = "run `teachonce index` again"
) -> Iterator[tuple[str, tuple[ShardRow, ...]]]:
    """Yields (shard name, rows) for every shard of an index's Parquet, in order.

    Args:
        data: the whole file.
        where: what it is, for the message.
        hint: what to do if it is damaged.

    Raises:
        BankError: it is damaged, or holds another table.
    """
    name: str | None = None
    rows: list[ShardRow] = []
    for table in _row_groups(data, where, hint):
        for shard, key, offset, size, refused in zip(
            table["shard"],
            table["key"],
            table["offset"],
            table["size"],
            table["refused"],
            strict=True,
        ):
            if shard != name:
                if name is not None:
                    yield name, tuple(rows)
                name, rows = shard, []
            rows.append(ShardRow(key, offset, size, refused))
    if name is not None:
        yield name, tuple(rows)


def _row_groups(data: bytes, where: str, hint: str) -> Iterator[dict[str, list[Any]]]:
    """Yields the columns of an index's row groups, checked."""
    try:
        file = open_checked(data, where, hint)
        check_table(file.schema_arrow, _ROW_SCHEMA)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, use_threads=False)
            table.validate(full=True)
            check_spans(table)
            yield table.to_pydict()
    except TABLE_FAULTS as error:
        raise BankError(f"{where} is damaged ({str(error)[:300]}); {hint}") from error


def check_spans(table: pa.Table) -> None:
    """Raises ValueError where an index's rows cannot lie in any shard."""
    names = [
        name
        for name in ("shard", "key", "offset", "size")
        if name in table.schema.names
    ]
    if any(table[name].null_count for name in names):
        raise ValueError("values are missing")
    for name in ("offset", "size"):
        least = pc.min(table[name]).as_py()
        if least is not None and least < 0:
            raise ValueError(f"an {name} of {least}")


def copy_part(
    source: Store,
    destination: Store,
    stem: str,
    shards: Sequence[tuple[ShardEntry, ShardEntry]],
    chosen: Mapping[str, npt.NDArray[np.int64]] | None = None,
) -> None:
    """Copies what a part of a bank's index says of some shards, of no other.

    Args:
        source: the bank to copy from.
        destination: the one to copy to.
        stem: name of the part in the source, such as ``part-00000``.
        shards: those to keep, in order, each as the source and the destination have
            it.
        chosen: by shard, the rows to keep; of all others nothing is said, nor of what
            got no row. None for all.

    Raises:
        BankError: the part does not agree with the shards.
    """
    data = source.read(part_path(stem))
    path = part_record_path(stem)
    text = source.read(path)
    record = load_json(DatasetRecord, text, source.url_of(path))
    target = shards[0][1].part
    rows = dict(read_rows(data, source.url_of(part_path(stem)), _HINT))
    records = {one.name: one for one in record.shards}
    for shard, _ in shards:
        if shard.name not in records or len(rows.get(shard.name, ())) != shard.samples:
            raise BankError(
                f"{source.url_of(path)} and .parquet must hold the {shard.samples} "
                f"rows of {shard.name}, got {len(rows.get(shard.name, ()))}; restore "
                "them from a copy"
            )
    if chosen is None and len(shards) == len(record.shards):
        destination.replace(part_path(target), data)
        destination.replace(part_record_path(target), text)
        return
    kept = []
    for shard, _ in shards:
        found, held = records[shard.name], rows.get(shard.name, ())
        if chosen is not None:
            held = tuple(held[row] for row in chosen[shard.name].tolist())
            changes = {"samples": len(held), "damage": None, "faults": ()}
            found = found.model_copy(update=changes)
        kept.append(IndexedShard(found, held))
    write_part(destination, target, kept)
