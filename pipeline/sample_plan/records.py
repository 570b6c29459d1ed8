"""All of a bank that is not features: weighed by making it, small and in memory.

Commits, row facts, row arrays, index, metadata, statistics and card are made by the
code that makes a bank's, for the first rows of the dataset with what decoding the
sample told; what grows with rows, blocks or shards is then scaled. So a new kind of
file, or a new column, is counted without a word here.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import fsspec
import numpy as np

from manifests.bank import (
    ROWS_TEACHER,
    BankRecord,
    Commit,
    CommitContent,
    PassEntry,
    ShardEntry,
)
from manifests.dataset import ShardRecord
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.commits import BLOCKS_PATH, write_commit
from pipeline.bank.dataset_index import IndexedShard, write_index
from pipeline.bank.finalise import finalise
from pipeline.bank.layout import block_objects, write_metadata
from pipeline.bank.objects import object_crc32c
from pipeline.bank.output_statistics import write_statistics_of
from pipeline.bank.record import FEATURES, RECORD_PATH, write_record
from pipeline.bank.rows import RowFacts, encode_rows, object_path
from pipeline.bank.statistic_arrays import statistics_of
from pipeline.plan import Plan
from pipeline.precompute import write_classifiers
from pipeline.samples.shards import ShardRow

REHEARSED_ROWS = 8192
_STAGES = ("read", "decode", "prepare", "encode", "write")
_PART = "part-00000"


@dataclass(frozen=True)
class Records:
    """Bytes and files of a bank beside its features, by what they are."""

    bytes: Mapping[str, float]
    files: float


@dataclass(frozen=True)
class Told:
    """What a sample tells of a bank's records.

    Attributes:
        facts: of the sampled rows.
        vectors: (n, channels) float32 of each output's values, by its path.
        device_kind: that commits name.
    """

    facts: Sequence[RowFacts]
    vectors: Mapping[str, np.ndarray]
    device_kind: str


def weigh_records(
    plan: Plan, told: Told, rows_of: Callable[[ShardEntry], Sequence[ShardRow]]
) -> Records:
    """Returns what a job writes beside features; row arrays and index as a whole.

    Args:
        plan: of the job.
        told: by the sample.
        rows_of: the index rows of a shard.
    """
    url = f"memory://teachonce-plan-{uuid.uuid4().hex}"
    store = Store(url)
    try:
        small = _first_rows(plan.record)
        _rehearse(store, plan, small, told, rows_of)
        return _scaled(store, plan, small)
    finally:
        fs, path = fsspec.core.url_to_fs(url)
        fs.rm(path, recursive=True)


def _first_rows(record: BankRecord) -> BankRecord:
    """Returns the record of a bank of the first rows alone, whole blocks of them."""
    size = record.block_rows
    shards: list[ShardEntry] = []
    left, first = max(REHEARSED_ROWS, size), 0
    for shard in record.shards:
        samples = min(shard.samples, left)
        if samples < shard.samples:
            samples -= samples % size
        if shard.retired or not samples:
            continue
        blocks = -(-samples // size)
        update = {"samples": samples, "first_block": first, "blocks": blocks}
        shards.append(shard.model_copy(update={**update, "part": _PART}))
        left, first = left - samples, first + blocks
    return record.model_copy(update={"shards": tuple(shards), "state": None})


def _rehearse(
    store: Store,
    plan: Plan,
    small: BankRecord,
    told: Told,
    rows_of: Callable[[ShardEntry], Sequence[ShardRow]],
) -> None:
    held = {shard.name: shard for shard in plan.record.shards}
    indexed = {shard.record.name: shard.record for shard in plan.changes.new}
    write_index(
        store,
        f"dataset/{_PART}",
        [
            IndexedShard(
                indexed.get(shard.name) or _shard_record(shard),
                tuple(rows_of(held[shard.name])[: shard.samples]),
            )
            for shard in small.shards
        ],
    )
    write_metadata(store, small)
    write_classifiers(store, small)
    # Rows that were not sampled are like those that were, drawn with replacement.
    draws = np.random.default_rng(0)
    for shard in small.shards:
        for block in shard.block_numbers:
            first = (block - shard.first_block) * small.block_rows
            count = min(small.block_rows, shard.samples - first)
            chosen = draws.integers(len(told.facts), size=count)
            facts = [told.facts[number] for number in chosen.tolist()]
            for name in plan.passes_to_do:
                entry = small.pass_by_id(name)
                _commit(store, small, entry, block, shard.name, facts, told)

    def statistics(
        into: Store, record: BankRecord, committed: Mapping[str, set[int]]
    ) -> None:
        for path, _, output in layout.outputs(record):
            if statistics_of(output) and path in told.vectors:
                write_statistics_of(into, path, output, [told.vectors[path]])

    finished = finalise(store, small, statistics)
    # The table of shards is a matter of the whole bank.
    write_record(store, plan.record.model_copy(update={"state": finished.state}))


def _shard_record(shard: ShardEntry) -> ShardRecord:
    known = shard.model_dump(include={*ShardRecord.model_fields} - {"faults"})
    return ShardRecord.model_validate(known)


def _commit(
    store: Store,
    record: BankRecord,
    entry: PassEntry,
    block: int,
    shard: str,
    facts: Sequence[RowFacts],
    told: Told,
) -> None:
    """Writes a block's commit as a run would; features themselves are not there."""
    invalid: dict[str, list[int]] = {}
    for row, one in enumerate(facts):
        for name in entry.inputs:
            if name in one.reasons:
                code = f"{name}:{one.reasons[name].partition(':')[0]}"
                invalid.setdefault(code, []).append(row)
    is_rows = entry.teacher == ROWS_TEACHER
    if is_rows:
        data = encode_rows(
            facts,
            {name: record.inputs[name] for name in entry.inputs},
            {name: record.labels[name] for name in entry.labels},
        )
        path = object_path(entry.id, block)
        store.create(path, data)
        objects = {path: (len(data), object_crc32c([data]))}
    else:
        objects = {
            path: (_some(path, 10**7), _some(path, 2**32))
            for path in block_objects(entry, block)
        }
    refused = {row for rows in invalid.values() for row in rows}
    stages = [*_STAGES, *(f"forward.{one.teacher}" for one in record.passes)]
    write_commit(
        store,
        Commit(
            content=CommitContent(
                pass_id=entry.id,
                fingerprint=entry.fingerprint,
                block=block,
                shard=shard,
                rows=len(facts),
                valid=len(facts) - len(refused),
                invalid={code: tuple(rows) for code, rows in invalid.items()},
                objects=objects,
            ),
            device=told.device_kind,
            timing={name: _some(name, 10**6) / 10**6 for name in dict.fromkeys(stages)},
        ),
    )


def _some(text: str, below: int) -> int:
    """Returns a number that no codec can tell from a size or a checksum."""
    return zlib.crc32(text.encode()) % below


def _scaled(store: Store, plan: Plan, small: BankRecord) -> Records:
    """Returns the files of a rehearsal, as many and as large as the job's will be."""
    record = plan.record
    live = [shard for shard in record.shards if not shard.retired]
    missing = plan.missing_blocks()
    used = rows_by_block(record)
    rows = sum(shard.samples for shard in small.shards)
    new = [shard for shard in live if shard.part == plan.part]
    blocks = small.num_blocks
    by_rows = sum(shard.samples for shard in live) / rows
    totals: dict[str, float] = {}
    files = 0.0
    for path, size in store.list(""):
        top, _, rest = path.partition("/")
        name = rest.partition("/")[0]
        count = 1.0
        if top == "commits":
            kind = "commits"
            factor = count = len(missing[name]) / blocks
        elif top == "rows":
            kind, count = "row facts", len(missing[name]) / blocks
            factor = sum(used[block] for block in missing[name]) / rows
        elif path == BLOCKS_PATH:
            kind, factor = "commits", record.num_blocks / blocks
        elif top == "dataset":
            is_table = path.endswith(".parquet")
            kind = "index"
            factor = (
                sum(shard.samples for shard in new) / rows
                if is_table
                else len(new) / len(small.shards)
            )
            count = float(bool(new))
        elif top == "index":
            kind, factor = "index", by_rows
        elif path.endswith("zarr.json") or path == RECORD_PATH or top != FEATURES:
            kind, factor = "metadata", 1.0
        elif "/stats/" in path or "_classifier" in path:
            kind, factor = "statistics", 1.0
        else:
            kind, factor = "row arrays", by_rows
        totals[kind] = totals.get(kind, 0.0) + size * factor
        files += count
    return Records(totals, files)


def rows_by_block(record: BankRecord) -> dict[int, int]:
    """Returns the rows of each live block that are no padding."""
    size = record.block_rows
    return {
        block: min(size, shard.samples - (block - shard.first_block) * size)
        for shard in record.shards
        if not shard.retired
        for block in shard.block_numbers
    }
