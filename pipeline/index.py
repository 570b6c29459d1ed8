"""From shard patterns to the dataset index: who the shards are, where each sample lies.

Owns walking shards in parallel and loading what ``teachonce index`` wrote. The Parquet
of rows is in ``pipeline.bank.dataset_index``, reading the tar headers themselves in
``pipeline.samples.shards``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from manifests.bank import BankRecord
from manifests.dataset import DatasetRecord, FaultRecord, ShardRecord
from manifests.errors import BankError, ManifestError
from manifests.loading import load_json, resolve_path
from manifests.storage import Stat, Store, read_url, stat_url
from pipeline.bank.dataset_index import (
    IndexedShard,
    part_path,
    read_rows,
    write_part,
)
from pipeline.samples.shards import index_shard

_THREADS = 8


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


def load_index(url: str) -> list[IndexedShard]:
    """Returns the index that ``teachonce index`` wrote at ``url`` (a dataset.json).

    Raises:
        ManifestError: it is not such a record, or its Parquet does not agree with it.
        BankError: its Parquet is damaged.
    """
    record = load_json(DatasetRecord, read_url(url), url)
    table = url.removesuffix(".json") + ".parquet"
    rows = dict(read_rows(read_url(table), table))
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


def restore_part(store: Store, record: BankRecord, part: str) -> None:
    """Makes a part of a bank's dataset again from its shards.

    Only for the holder of the bank's lock.

    Raises:
        BankError: a shard is not what it was; nothing was written.
        StorageError: a shard cannot be read.
    """
    entries = [shard for shard in record.shards if shard.part == part]
    found = index_shards([(one.name, one.url, stat_url(one.url)) for one in entries])
    restored = []
    for entry, indexed in zip(entries, found, strict=True):
        now = indexed.record
        if (now.samples, now.headers_sha256) != (entry.samples, entry.headers_sha256):
            raise BankError(
                f"{store.url_of(part_path(part))} is damaged and can only be made "
                f"again from its shards, but {entry.url} is not what it was; restore "
                "one of the two from a copy"
            )
        place = {"tag": entry.tag, "modified": entry.modified}
        restored.append(IndexedShard(now.model_copy(update=place), indexed.rows))
    write_part(store, part, restored)
