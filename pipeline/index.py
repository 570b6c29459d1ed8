"""From shard patterns to the dataset index: who the shards are, where each sample lies.

Owns expanding patterns, telling known shards from new and changed ones, and the Parquet
of rows. Reading the tar headers themselves is in ``pipeline.samples.shards``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.dataset import DatasetRecord, FaultRecord, ShardRecord
from manifests.errors import ManifestError
from manifests.loading import load_json, resolve_path
from manifests.storage import Stat, Store, read_url
from pipeline.samples.shards import ShardRow, index_shard

_THREADS = 8
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


def index_one(name: str, url: str, stat: Stat) -> IndexedShard:
    """Returns one shard's index, made by walking its headers."""
    index = index_shard(url)
    record = ShardRecord(
        name=name,
        url=url,
        size_bytes=stat.size_bytes,
        tag=stat.tag,
        modified=stat.modified,
        headers_sha256=index.headers_sha256,
        samples=len(index.rows),
        sequential=index.sequential,
        damage=index.damage,
        faults=tuple(
            FaultRecord(key=fault.key, reason=fault.reason, detail=fault.detail)
            for fault in index.faults
        ),
    )
    return IndexedShard(record, tuple(index.rows))


def index_shards(
    named: Sequence[tuple[str, str, Stat]],
    on_done: Callable[[], object] = lambda: None,
) -> list[IndexedShard]:
    """Returns the indexes of shards (name, url, stat), in order, made in parallel."""

    def one(shard: tuple[str, str, Stat]) -> IndexedShard:
        indexed = index_one(*shard)
        on_done()
        return indexed

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(one, named))


def encode_rows(shards: Sequence[IndexedShard]) -> bytes:
    """Returns the Parquet of rows, one row group per shard."""
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, _ROW_SCHEMA, compression="zstd") as writer:
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
                schema=_ROW_SCHEMA,
            )
            writer.write_table(table, row_group_size=max(count, 1))
    return sink.getvalue()


def write_index(store: Store, stem: str, shards: Sequence[IndexedShard]) -> None:
    """Writes ``<stem>.parquet`` and then ``<stem>.json``."""
    store.replace(f"{stem}.parquet", encode_rows(shards))
    record = DatasetRecord(shards=tuple(shard.record for shard in shards))
    text = json.dumps(record.model_dump(mode="json"), indent=1)
    store.replace(f"{stem}.json", text.encode() + b"\n")


def read_rows(data: bytes) -> Iterator[tuple[str, tuple[ShardRow, ...]]]:
    """Yields (shard name, rows) for every shard of an index's Parquet, in order."""
    file = pq.ParquetFile(io.BytesIO(data))
    name: str | None = None
    rows: list[ShardRow] = []
    for group in range(file.num_row_groups):
        table = file.read_row_group(group).to_pydict()
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


def load_index(url: str) -> list[IndexedShard]:
    """Returns the index that ``teachonce index`` wrote at ``url`` (a dataset.json).

    Raises:
        ManifestError: it is not such a record, or its Parquet does not agree with it.
    """
    record = load_json(DatasetRecord, read_url(url), url)
    rows = dict(read_rows(read_url(url.removesuffix(".json") + ".parquet")))
    shards = []
    for shard in record.shards:
        found = rows.get(shard.name, ())
        if len(found) != shard.samples:
            raise ManifestError(
                f"{url}: says {shard.samples} samples in {shard.name}, its Parquet has "
                f"{len(found)}; run `teachonce index` again"
            )
        # A record written by hand may name its shards relative to itself.
        base = url.rsplit("/", 1)[0]
        moved = shard.model_copy(update={"url": resolve_path(shard.url, base)})
        shards.append(IndexedShard(moved, found))
    return shards
