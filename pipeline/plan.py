"""The plan: what a job needs of a bank, without writing anything.

Owns the shard table (which shards are known, new or changed), and block
sizes. ``precompute`` writes what `make_plan` returns; ``work_items`` and ``estimate`` are
pure functions of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

from manifests.bank import (
    BankRecord,
    BlockSpan,
    OutputEntry,
    PassEntry,
    ShardEntry,
    WorkItem,
)
from manifests.dataset import ShardRecord
from manifests.errors import BankError, ManifestError
from manifests.job import Job
from manifests.storage import Stat, Store
from pipeline import index, resolve, sizing
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.commits import list_commits
from pipeline.bank.record import read_record
from pipeline.errors import PipelineError
from pipeline.index import IndexedShard
from pipeline.inputs import resolve_input, view_policy
from pipeline.samples.shards import ShardRow

@dataclass(frozen=True)
class ShardChanges:
    """What the job's shards are to the bank's table."""

    new: list[IndexedShard] = field(default_factory=list)
    retired: frozenset[str] = frozenset()
    moved: Mapping[str, str] = field(default_factory=dict)
    unchanged: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything a run will do, from shapes and headers alone."""

    job: Job
    existing: BankRecord | None
    record: BankRecord
    changes: ShardChanges
    new_passes: tuple[PassEntry, ...]
    wanted: tuple[str, ...]
    committed: Mapping[str, frozenset[int]]
    flops_per_row: float

    @property
    def part(self) -> str:
        """Stem of the index part that the new shards will lie in."""
        taken = {shard.part for shard in self.existing.shards} if self.existing else set()
        return f"part-{len(taken):05d}"

    def missing_blocks(self) -> dict[str, list[int]]:
        """Returns the blocks each wanted pass still lacks, retired shards left out."""
        live = [
            block
            for shard in self.record.shards
            if not shard.retired
            for block in range(shard.first_block, shard.first_block + shard.blocks)
        ]
        return {
            name: [b for b in live if b not in self.committed.get(name, frozenset())]
            for name in self.wanted
        }

    @property
    def is_done(self) -> bool:
        """Whether the bank answers the job already."""
        state = self.existing.state if self.existing else None
        return (
            not self.changes.new
            and not self.changes.retired
            and not self.new_passes
            and state is not None
            and state.complete
            and not any(self.missing_blocks().values())
        )


def classify_shards(
    record: BankRecord | None,
    urls: Sequence[str],
    stats: Sequence[Stat],
    known_index: Mapping[str, IndexedShard],
    on_indexed: Callable[[], object] = lambda: None,
) -> ShardChanges:
    """Returns which shards are new, changed, moved or as they were.

    A shard is known by name, size and checksum or etag. Where the store keeps none (a
    local disk) an unchanged modification time at an unchanged place is enough; else the
    headers are walked again and compared.
    """
    live = {shard.name: shard for shard in record.shards if not shard.retired} if record else {}
    by_url = {shard.url: shard for shard in live.values()}
    names = dict(zip(urls, index.name_shards(urls), strict=True))
    unchanged: list[str] = []
    moved: dict[str, str] = {}
    unsure: list[tuple[str, str, Stat]] = []
    fresh: list[tuple[str, str, Stat]] = []
    for url, stat in zip(urls, stats, strict=True):
        entry = by_url.get(url) or live.get(names[url])
        if entry is None:
            fresh.append((names[url], url, stat))
        elif entry.size_bytes != stat.size_bytes:
            unsure.append((entry.name, url, stat))
        elif entry.url == url and entry.tag == stat.tag and (
            stat.tag is not None or entry.modified == stat.modified
        ):
            unchanged.append(entry.name)
        else:
            unsure.append((entry.name, url, stat))
    retired: set[str] = set()
    new: list[IndexedShard] = []
    for indexed in index.index_shards(unsure, on_indexed):
        entry = live[indexed.record.name]
        same = (entry.size_bytes, entry.headers_sha256) == (
            indexed.record.size_bytes,
            indexed.record.headers_sha256,
        ) and (entry.tag == indexed.record.tag or entry.url != indexed.record.url)
        if same:
            unchanged.append(entry.name)
            if entry.url != indexed.record.url:
                moved[entry.name] = indexed.record.url
        else:
            retired.add(entry.name)
            new.append(indexed)
    taken = {shard.name for shard in record.shards} if record else set()
    unknown = []
    for name, url, stat in fresh:
        held = known_index.get(url)
        if held is not None and held.record.size_bytes == stat.size_bytes:
            update = {"name": name, "tag": stat.tag, "modified": stat.modified}
            new.append(IndexedShard(held.record.model_copy(update=update), held.rows))
            on_indexed()
        else:
            unknown.append((name, url, stat))
    new += index.index_shards(unknown, on_indexed)
    order = {url: number for number, url in enumerate(urls)}
    new.sort(key=lambda shard: order[shard.record.url])
    renamed = []
    for shard in new:
        name, version = shard.record.name, 1
        while name in taken:
            version += 1
            name = f"{shard.record.name}@{version}"
        taken.add(name)
        renamed.append(
            IndexedShard(shard.record.model_copy(update={"name": name}), shard.rows)
        )
    return ShardChanges(renamed, frozenset(retired), moved, tuple(unchanged))


def shard_table(
    record: BankRecord | None, changes: ShardChanges, block_rows: int, part: str
) -> tuple[ShardEntry, ...]:
    """Returns the append-only shard table with new shards at its end."""
    table = []
    for shard in record.shards if record else ():
        update: dict[str, Any] = {}
        if shard.name in changes.retired:
            update["retired"] = True
        if shard.name in changes.moved:
            update["url"] = changes.moved[shard.name]
        table.append(shard.model_copy(update=update) if update else shard)
    next_block = sum(shard.blocks for shard in table)
    for indexed in changes.new:
        found: ShardRecord = indexed.record
        count = ceil(found.samples / block_rows)
        table.append(
            ShardEntry(
                name=found.name,
                url=found.url,
                size_bytes=found.size_bytes,
                tag=found.tag,
                modified=found.modified,
                headers_sha256=found.headers_sha256,
                samples=found.samples,
                sequential=found.sequential,
                damage=found.damage,
                faults=len(found.faults),
                part=part,
                first_block=next_block,
                blocks=count,
            )
        )
        next_block += count
    return tuple(table)


def _check_same_bank(job: Job, record: BankRecord, changes: ShardChanges, where: str) -> None:
    """Raises BankError where the bank was made by a job that this one contradicts."""
    if not changes.unchanged and not changes.retired:
        names = ", ".join(shard.name for shard in record.shards[:3])
        raise BankError(
            f"bank {where} is another job's: it was made from shards {names} ..., none of "
            "which this job names; choose another `bank`, or list its shards as well"
        )
    for name, config in job.inputs.items():
        held = record.inputs.get(name)
        if held is None:
            continue
        now = config.model_dump(mode="json")
        auto = {**now, "view0": held.config.get("view0")}
        if held.config != now and held.config != auto:
            raise BankError(
                f"bank {where} is another job's: input {name} was {held.config}, now it "
                f"is {now}; keep the input as it was, or choose another `bank`"
            )
    for name, label in job.labels.items():
        before = record.labels.get(name)
        if before is not None and before != label.model_dump(mode="json"):
            raise BankError(
                f"bank {where} is another job's: label {name} was {before}; keep it, or "
                "choose another `bank`"
            )


def _load_known_index(patterns: Sequence[str]) -> tuple[list[str], dict[str, IndexedShard]]:
    """Returns shard URLs, and indexes that ``teachonce index`` already made of them."""
    known: dict[str, IndexedShard] = {}
    plain: list[str] = []
    for pattern in patterns:
        if pattern.endswith(".json"):
            loaded = index.load_index(pattern)
            known |= {shard.record.url: shard for shard in loaded}
            plain += [shard.record.url for shard in loaded]
        else:
            plain += index.expand_shards([pattern])
    return list(dict.fromkeys(plain)), known


def _largest_row_bytes(passes: Sequence[PassEntry]) -> int:
    arrays = (
        ArraySpec.from_json(data)
        for entry in passes
        for output in entry.outputs
        for data in output.arrays
    )
    return max((spec.row_bytes for spec in arrays), default=1)


def make_plan(
    job: Job,
    on_indexed: Callable[[], object] = lambda: None,
    on_shards: Callable[[int], object] = lambda count: None,
) -> Plan:
    """Returns what the job needs of its bank; reads shard headers, writes nothing.

    Args:
        job: with absolute paths.
        on_indexed: called after each shard whose headers were walked.
        on_shards: called once with the number of shards.

    Raises:
        TeachOnceError: naming what cannot be used and what to do.
    """
    store = Store(job.bank)
    record = read_record(store)
    patterns = job.dataset.shards
    urls, known = _load_known_index([patterns] if isinstance(patterns, str) else patterns)
    on_shards(len(urls))
    stats = index.stat_shards(urls)
    changes = classify_shards(record, urls, stats, known, on_indexed)
    if record is not None:
        _check_same_bank(job, record, changes, job.bank)
    elif not any(shard.record.samples or shard.record.damage for shard in changes.new):
        if not any(shard.record.faults for shard in changes.new) and len(urls) > 1:
            raise ManifestError(
                f"dataset.shards: {len(urls)} shards hold no sample at all; check that they "
                "are WebDataset shards (members KEY.jpg, KEY.cls, ...)"
            )
    inputs = {
        name: (record.inputs[name] if record and name in record.inputs else None)
        or resolve_input(name, job, changes.new)
        for name in job.inputs
    }
    policy = view_policy(job, {**(record.inputs if record else {}), **inputs})
    # View 0's boxes are part of each input; the rest of the policy is the bank's.
    shared = {k: v for k, v in policy.to_json().items() if k != "view0"}
    _check_views(record, shared, job)
    teachers = resolve.group_teachers(job, inputs, shared, record)
    taken = {entry.id for entry in record.passes} if record else set()
    wanted: list[str] = []
    requests = dict(record.requests) if record else {}
    unresolved = [item for item in teachers if item.digest not in requests]
    described = {item.digest: resolve.describe(item) for item in unresolved}
    samples = [
        shard.samples for shard in (record.shards if record else ()) if not shard.retired
    ] + [shard.record.samples for shard in changes.new]
    held_rows = record.block_rows if record else job.block_rows
    batches = {
        item.digest: item.request.config.batch or sizing.choose_batch(samples, held_rows)
        for item in unresolved
    }
    new_passes: list[PassEntry] = []
    block_rows = held_rows or 1
    for attempt in ("size", "final"):
        # Arrays' shapes need block_rows, and block_rows needs the rows' bytes: the first
        # round, with blocks of one row, only measures.
        if attempt == "final" and held_rows is None:
            block_rows = sizing.choose_block_rows(
                _largest_row_bytes(new_passes), samples, sorted(set(batches.values()))
            )
        new_passes, names = [], set(taken)
        rows_pass, row_ids = resolve.resolve_rows(job, inputs, record, names)
        new_passes += [rows_pass] if rows_pass else []
        wanted = [*row_ids, *(entry.id for entry in new_passes)]
        for item in teachers:
            if item.digest in requests and item.digest not in described:
                wanted += requests[item.digest]
                continue
            new, old = resolve.resolve_teacher(
                item, job, shared, record, block_rows, batches[item.digest], names,
                described[item.digest],
            )
            new_passes += new
            if attempt == "final":
                requests[item.digest] = (*old, *(entry.id for entry in new))
            wanted += [*old, *(entry.id for entry in new)]
    part_count = len({shard.part for shard in record.shards}) if record else 0
    planned = BankRecord(
        created_by=record.created_by if record else _created_by(),
        dataset={
            **(record.dataset if record else {}),
            "license": job.dataset.license,
        },
        job=job.model_dump(mode="json", by_alias=True),
        inputs={**(record.inputs if record else {}), **inputs},
        labels={
            **(record.labels if record else {}),
            **{name: one.model_dump(mode="json") for name, one in job.labels.items()},
        },
        views=shared,
        num_views=max(job.views.random + 1, record.num_views if record else 1),
        block_rows=block_rows,
        shards=shard_table(record, changes, block_rows, f"part-{part_count:05d}"),
        passes=(*(record.passes if record else ()), *new_passes),
        requests=requests,
        state=record.state if record else None,
    )
    old_ids = {entry.id for entry in record.passes} if record else set()
    committed = {
        name: frozenset(list_commits(store, name)) for name in wanted if name in old_ids
    }
    missing_flops = sum(
        float(entry.provenance.get("flops_per_row", 0.0)) * len(entry.views)
        for entry in planned.passes
        if entry.id in wanted
    )
    return Plan(
        job=job,
        existing=record,
        record=planned,
        changes=changes,
        new_passes=tuple(new_passes),
        wanted=tuple(dict.fromkeys(wanted)),
        committed=committed,
        flops_per_row=missing_flops,
    )


def _created_by() -> str:
    import importlib.metadata

    return f"teachonce {importlib.metadata.version('teachonce')}"


def _check_views(record: BankRecord | None, views: Mapping[str, Any], job: Job) -> None:
    if record is None or job.views.random == 0:
        return
    if record.num_views > 1 and record.views != dict(views):
        raise BankError(
            f"bank {job.bank} draws its views with {record.views}, this job with "
            f"{dict(views)}; keep the bank's views, or choose another `bank`"
        )
