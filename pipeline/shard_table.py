"""The shard table: which of a job's shards a bank knows, which are new or changed.

A shard is known by name, size and checksum or etag. Where the store keeps none (a local
disk) an unchanged modification time at an unchanged place is enough; else its headers
are walked again and compared. The table only grows: a shard whose bytes changed is a
new entry ``name@2``, and the old one is retired.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from manifests.bank import BankRecord, ShardEntry
from manifests.dataset import ShardRecord
from manifests.errors import BankError, StorageError
from manifests.storage import Stat, stat_url
from pipeline import index
from pipeline.bank.dataset_index import IndexedShard
from pipeline.samples import sources

_VERSION = re.compile(r"@\d+$")


@dataclass(frozen=True)
class ShardChanges:
    """What a job's shards are to a bank's table.

    Attributes:
        new: shards the table does not have yet, under the names they will get.
        retired: names of entries whose shards changed.
        refreshed: entries whose shards are the same bytes at another place or time.
        unchanged: names of all entries that are as they were, refreshed ones included.
    """

    new: tuple[IndexedShard, ...] = ()
    retired: frozenset[str] = frozenset()
    refreshed: Mapping[str, ShardRecord] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()


def find_shards(patterns: Sequence[str]) -> tuple[list[str], dict[str, IndexedShard]]:
    """Returns the URLs of a job's shards, and indexes that were made of them before.

    Args:
        patterns: of shards, or places of a ``dataset.json`` that ``teachonce index``
            made.

    Raises:
        ManifestError: a pattern matches nothing, or a shard is named twice.
        StorageError: a dataset.json cannot be read.
    """
    known: dict[str, IndexedShard] = {}
    urls: list[str] = []
    for pattern in patterns:
        if pattern.endswith(".json"):
            loaded = {shard.record.url: shard for shard in index.load_index(pattern)}
            known |= loaded
            urls += loaded
        else:
            urls += sources.expand_shards([pattern])
    sources.check_named_once(urls)
    return urls, known


def classify_shards(
    record: BankRecord | None,
    urls: Sequence[str],
    stats: Sequence[Stat],
    known: Mapping[str, IndexedShard],
    on_indexed: Callable[[], object] = lambda: None,
) -> ShardChanges:
    """Returns which shards are new, changed, moved or as they were.

    Args:
        record: the bank's, if there is one.
        urls: of the job's shards.
        stats: of each of them.
        known: indexes by URL; used where they are of the file as it is now.
        on_indexed: called for each shard whose index is at hand.

    Raises:
        StorageError: a shard cannot be read.
    """
    table = record.shards if record else ()
    live = {shard.name: shard for shard in table if not shard.retired}
    at_url = {shard.url: shard for shard in live.values()}
    unchanged: list[str] = []
    unsure: list[tuple[str, str, Stat]] = []
    for name, url, stat in zip(sources.name_shards(urls), urls, stats, strict=True):
        entry = at_url.get(url)
        if entry is not None and _is_as_it_was(entry, stat):
            unchanged.append(entry.name)
        else:
            unsure.append((name, url, stat))
    indexed = _index(unsure, known, on_indexed)
    # Entries that no URL of the job claims; a shard may have been moved from there.
    free = {name: one for name, one in live.items() if one.url not in set(urls)}
    retired: set[str] = set()
    refreshed: dict[str, ShardRecord] = {}
    new: list[IndexedShard] = []
    taken = {shard.name for shard in table}
    for shard in indexed:
        found = shard.record
        entry = at_url.get(found.url) or _moved_from(found, free)
        if entry is not None and _has_same_bytes(entry, found):
            refreshed[entry.name] = found
            unchanged.append(entry.name)
            free.pop(entry.name, None)
            continue
        if entry is not None:
            retired.add(entry.name)
            free.pop(entry.name, None)
        name = _free_name(entry.name if entry else found.name, taken)
        taken.add(name)
        renamed = found.model_copy(update={"name": name})
        new.append(IndexedShard(renamed, shard.rows))
    return ShardChanges(tuple(new), frozenset(retired), refreshed, tuple(unchanged))


def _is_as_it_was(entry: ShardEntry | ShardRecord, stat: Stat) -> bool:
    """Whether a file is what it was, as far as its store says."""
    if (entry.size_bytes, entry.tag) != (stat.size_bytes, stat.tag):
        return False
    return stat.tag is not None or entry.modified == stat.modified


def _has_same_bytes(entry: ShardEntry, found: ShardRecord) -> bool:
    same_tag = entry.tag == found.tag or entry.url != found.url
    return same_tag and (entry.size_bytes, entry.headers_sha256) == (
        found.size_bytes,
        found.headers_sha256,
    )


def _moved_from(
    found: ShardRecord, free: Mapping[str, ShardEntry]
) -> ShardEntry | None:
    """Returns the entry that a shard at a new place was known as, if it was.

    It is one of the same base name and bytes; or, with other bytes, one of the same
    name whose own place is empty now. What still lies where it lay is another shard.
    """
    base = found.url.rsplit("/", 1)[-1]
    for entry in free.values():
        if entry.url.rsplit("/", 1)[-1] == base and _has_same_bytes(entry, found):
            return entry
    for entry in free.values():
        if _VERSION.sub("", entry.name) == found.name and not _exists(entry.url):
            return entry
    return None


def check_reachable(shards: Iterable[ShardEntry], named: Iterable[str]) -> None:
    """Checks that shards which a job must read and does not name are where they were.

    Args:
        shards: of the bank, those with blocks that the job still lacks.
        named: URLs of the job's shards; they have been seen already.

    Raises:
        BankError: one is not; a receiver's job says where his copies lie.
    """
    seen = set(named)
    others = [shard for shard in shards if shard.url not in seen]
    gone = [shard for shard in others if not _exists(shard.url)]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise BankError(
            f"dataset.shards must name the bank's {gone[0].name}{more}, which the job "
            f"has to read, got none, and {gone[0].url}, where it was last found, "
            "cannot be read; add where it is now (a copy keeps its name), or go on "
            "with the shards you have: teachonce export BANK DEST --shards NAME ..."
        )


def _exists(url: str) -> bool:
    try:
        stat_url(url)
    except StorageError:
        return False
    return True


def _index(
    shards: Sequence[tuple[str, str, Stat]],
    known: Mapping[str, IndexedShard],
    on_indexed: Callable[[], object],
) -> list[IndexedShard]:
    """Returns indexes of shards (name, url, stat), in order, walking the unknown."""
    found: dict[str, IndexedShard] = {}
    unknown = []
    for name, url, stat in shards:
        held = known.get(url)
        if held is not None and _is_as_it_was(held.record, stat):
            record = held.record.model_copy(update={"name": name})
            found[url] = IndexedShard(record, held.rows)
            on_indexed()
        else:
            unknown.append((name, url, stat))
    for walked in index.index_shards(unknown, on_indexed):
        found[walked.record.url] = walked
    return [found[url] for _, url, _ in shards]


def _free_name(name: str, taken: set[str]) -> str:
    """Returns the name, or ``name@2``, ``name@3``, ... where it is taken."""
    stem = _VERSION.sub("", name) if name in taken else name
    version, free = 1, name
    while free in taken:
        version += 1
        free = f"{stem}@{version}"
    return free


def shard_table(
    record: BankRecord | None, changes: ShardChanges, block_rows: int, part: str
) -> tuple[ShardEntry, ...]:
    """Returns the append-only shard table with new shards at its end.

    Args:
        record: the bank's, if there is one.
        changes: what the job's shards are to it.
        block_rows: of the bank.
        part: stem of the index part that holds the rows of the new shards.
    """
    table = []
    for shard in record.shards if record else ():
        if shard.name in changes.retired:
            table.append(shard.model_copy(update={"retired": True}))
        elif shard.name in changes.refreshed:
            now = changes.refreshed[shard.name]
            place = {"url": now.url, "tag": now.tag, "modified": now.modified}
            table.append(shard.model_copy(update=place))
        else:
            table.append(shard)
    next_block = sum(shard.blocks for shard in table)
    for indexed in changes.new:
        found = indexed.record
        count = ceil(found.samples / block_rows)
        facts = found.model_dump(exclude={"faults"})
        table.append(
            ShardEntry(
                **facts,
                faults=len(found.faults),
                part=part,
                first_block=next_block,
                blocks=count,
            )
        )
        next_block += count
    return tuple(table)
