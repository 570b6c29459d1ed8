"""The plan: what a job needs of a bank, without writing anything.

Owns the order in which it is found out, and the refusal of a bank that is another
job's. Shards are classified in ``shard_table``, teachers become passes in ``resolve``.
``precompute`` writes what `make_plan` returns; ``work_items`` and ``estimate`` are pure
functions of it.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from manifests.bank import BankRecord, InputEntry, PassEntry, ShardEntry
from manifests.errors import BankError, ManifestError
from manifests.inputs import INPUT, InputConfig
from manifests.job import Job
from manifests.storage import Store
from pipeline import group_teachers, resolve, sizing, stored_inputs
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.commits import list_commits
from pipeline.bank.dataset_index import read_part
from pipeline.bank.record import read_record
from pipeline.group_teachers import Described, GroupTeacher
from pipeline.inputs import ProbedShard, resolve_input, view_policy
from pipeline.samples import sources
from pipeline.shard_table import (
    ShardChanges,
    check_reachable,
    classify_shards,
    find_shards,
    shard_table,
)


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
    missing_weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def part(self) -> str:
        """Stem of the index part that the new shards will lie in."""
        return _next_part(self.existing)

    @cached_property
    def _missing(self) -> dict[str, list[int]]:
        live = self.record.live_blocks
        return {
            name: [b for b in live if b not in self.committed.get(name, frozenset())]
            for name in self.wanted
        }

    def missing_blocks(self) -> dict[str, list[int]]:
        """Returns the blocks each wanted pass still lacks, retired shards left out."""
        return self._missing

    @property
    def shards_to_read(self) -> list[ShardEntry]:
        """Returns the shards with blocks that a wanted pass still lacks."""
        lacking = {block for found in self._missing.values() for block in found}
        return [
            shard
            for shard in self.record.shards
            if not shard.retired and not lacking.isdisjoint(shard.block_numbers)
        ]

    @property
    def passes_to_do(self) -> tuple[str, ...]:
        """Passes that lack a block: the only teachers a run has to load."""
        return tuple(name for name, blocks in self.missing_blocks().items() if blocks)

    @property
    def flops_per_row(self) -> float:
        """Operations that a row costs in all passes that lack a block."""
        passes = (self.record.pass_by_id(name) for name in self.passes_to_do)
        return sum(entry.flops_per_row for entry in passes)

    @property
    def is_done(self) -> bool:
        """Whether the bank answers the job already."""
        state = self.existing.state if self.existing else None
        return (
            not self.changes.new
            and not self.changes.retired
            and not self.new_passes
            and state is not None
            and set(self.wanted) <= set(state.complete_passes)
            and not any(self.missing_blocks().values())
        )


@dataclass(frozen=True)
class _Passes:
    """What a job's teachers need of a bank."""

    block_rows: int
    new: tuple[PassEntry, ...]
    wanted: tuple[str, ...]
    requests: Mapping[str, tuple[str, ...]]


def make_plan(
    job: Job,
    on_indexed: Callable[[], object] = lambda: None,
    on_shards: Callable[[int], object] = lambda count: None,
    needs_weights: bool = True,
) -> Plan:
    """Returns what the job needs of its bank; reads shard headers, writes nothing.

    Args:
        job: with absolute paths.
        on_indexed: called after each shard whose headers were walked.
        on_shards: called once with the number of shards.
        needs_weights: whether weights that cannot be found are an error; shapes do not
            need them, a run does.

    Raises:
        TeachOnceError: naming what cannot be used and what to do.
    """
    store = Store(job.bank)
    record = read_record(store)
    patterns = job.dataset.shards
    urls, known = find_shards([patterns] if isinstance(patterns, str) else patterns)
    on_shards(len(urls))
    changes = classify_shards(
        record, urls, sources.stat_shards(urls), known, on_indexed
    )
    if record is None:
        _check_samples(changes)
    else:
        _check_same_bank(job, record, changes)
    inputs = _resolve_inputs(job, store, record, changes)
    views = _resolve_views(job, record, inputs)
    missing: dict[str, str] = {}
    teachers = group_teachers.find_teachers(
        job, inputs, views, record, None if needs_weights else missing
    )
    teachers += stored_inputs.find_stored_inputs(
        job, inputs, record, lambda: _probed(store, record, changes)
    )
    passes = _resolve_passes(job, inputs, views, record, teachers, changes)
    planned = BankRecord(
        created_by=record.created_by if record else _created_by(),
        dataset=_dataset(job, record),
        job=job.model_dump(mode="json", by_alias=True),
        inputs={**(record.inputs if record else {}), **inputs},
        labels={**(record.labels if record else {}), **_labels(job)},
        views=dict(views),
        num_views=max(job.views.random + 1, record.num_views if record else 1),
        block_rows=passes.block_rows,
        shards=shard_table(record, changes, passes.block_rows, _next_part(record)),
        passes=(*(record.passes if record else ()), *passes.new),
        requests=dict(passes.requests),
        exported_from=record.exported_from if record else (),
        state=record.state if record else None,
    )
    held = {entry.id for entry in record.passes} if record else set()
    plan = Plan(
        job=job,
        existing=record,
        record=planned,
        changes=changes,
        new_passes=passes.new,
        wanted=passes.wanted,
        committed={
            name: frozenset(list_commits(store, name))
            for name in passes.wanted
            if name in held
        },
        missing_weights=missing,
    )
    check_reachable(plan.shards_to_read, urls)
    return plan


def _created_by() -> str:
    return f"teachonce {importlib.metadata.version('teachonce')}"


def _next_part(record: BankRecord | None) -> str:
    taken = {shard.part for shard in record.shards} if record else set()
    return f"part-{len(taken):05d}"


def _labels(job: Job) -> dict[str, dict[str, Any]]:
    return {name: one.model_dump(mode="json") for name, one in job.labels.items()}


def _dataset(job: Job, record: BankRecord | None) -> dict[str, Any]:
    held = record.dataset if record else {}
    found = {**held, "license": job.dataset.license or held.get("license")}
    if job.dataset.copies_allowed is not None:
        found["copies_allowed"] = job.dataset.copies_allowed
    return found


def _check_samples(changes: ShardChanges) -> None:
    """Raises ManifestError where a new bank would hold nothing, not even faults."""
    found = [shard.record for shard in changes.new]
    if not any(one.samples or one.damage or one.faults for one in found):
        raise ManifestError(
            f"dataset.shards: there is no sample in any of {len(found)} shard(s), such "
            f"as {found[0].url}; check that they are WebDataset shards (members "
            "KEY.jpg, KEY.cls, ...)"
        )


def _check_same_bank(job: Job, record: BankRecord, changes: ShardChanges) -> None:
    """Raises BankError where a bank was made by a job that this one contradicts."""
    if record.has_chosen_rows:
        raise BankError(
            f"bank {job.bank} must hold every sample of its shards to be computed on, "
            f"got rows that an export chose from {record.exported_from[-1].bank}; run "
            "the job on a bank of its own, or export again to mend this one"
        )
    now_at = {shard.record.url for shard in changes.new}
    is_rewritten = any(
        shard.name in changes.retired and shard.url in now_at for shard in record.shards
    )
    if not changes.unchanged and not is_rewritten:
        names = ", ".join(shard.name for shard in record.shards[:3])
        raise BankError(
            f"bank {job.bank} is another job's: it was made from shards {names} ..., "
            "none of which this job names; choose another `bank`, or list its shards "
            "as well (a copy keeps its name)"
        )
    for name, config in job.inputs.items():
        held = record.inputs.get(name)
        if held is not None and not _is_same_input(held, config, job.metadata):
            now = config.model_dump(mode="json")
            what = [
                f"{key}: {held.config.get(key)!r} in the bank, {value!r} now"
                for key, value in now.items()
                if held.config.get(key) != value
            ] or [f"metadata: {held.metadata!r} in the bank, {job.metadata!r} now"]
            raise BankError(
                f"bank {job.bank} is another job's: input {name} is another one there "
                f"({'; '.join(what)}); keep the input, or choose another `bank`"
            )
    for name, label in _labels(job).items():
        before = record.labels.get(name)
        if before is not None and before != label:
            raise BankError(
                f"bank {job.bank} is another job's: label {name} is another one there "
                f"({before} in the bank, {label} now); keep it, or choose another "
                "`bank`"
            )


def _is_same_input(held: InputEntry, config: InputConfig, metadata: str | None) -> bool:
    now = config.model_dump(mode="json")
    # Read as this version does: a field that came later has its default.
    before = INPUT.validate_python(held.config).model_dump(mode="json")
    if "view0" in now and now["view0"] in ("auto", held.view0):
        now["view0"] = before.get("view0")
    uses_metadata = bool(before.get("calibration") or before.get("timestamp"))
    return before == now and (not uses_metadata or held.metadata == metadata)


def _resolve_inputs(
    job: Job, store: Store, record: BankRecord | None, changes: ShardChanges
) -> dict[str, InputEntry]:
    """Returns entries of the job's inputs: the bank's, or else decided now."""
    held = record.inputs if record else {}
    return {
        name: held.get(name)
        or resolve_input(name, job, _probed(store, record, changes))
        for name in job.inputs
    }


def probed_shards(plan: Plan) -> Iterator[ProbedShard]:
    """Yields a plan's shards to look into: the bank's own, then new ones."""
    return _probed(Store(plan.job.bank), plan.existing, plan.changes)


def _probed(
    store: Store, record: BankRecord | None, changes: ShardChanges
) -> Iterator[ProbedShard]:
    """Yields shards to look into: the bank's own, then new ones."""
    for part in dict.fromkeys(
        shard.part for shard in (record.shards if record else ())
    ):
        assert record is not None
        rows = dict(read_part(store, part))
        for shard in record.shards:
            if shard.part == part and not shard.retired and shard.name in rows:
                url = shard.url
                if shard.name in changes.refreshed:
                    url = changes.refreshed[shard.name].url
                yield url, shard.sequential, rows[shard.name]
    for indexed in changes.new:
        yield indexed.record.url, indexed.record.sequential, indexed.rows


def _resolve_views(
    job: Job, record: BankRecord | None, inputs: Mapping[str, InputEntry]
) -> dict[str, Any]:
    """Returns how the bank draws random views: as it does, once it has any.

    View 0's boxes are part of each input and left out.

    Raises:
        BankError: the job wants random views that are drawn otherwise.
    """
    policy = view_policy(job, dict(inputs)).to_json()
    views = {name: value for name, value in policy.items() if name != "view0"}
    if record is None or record.num_views == 1:
        return views
    held = record.views
    if job.views.flip is None:
        # The default hangs on the number of inputs, which may have grown.
        views["flips"] = held["flips"]
    if job.views.random and views != held:
        what = "; ".join(
            f"{name}: {held.get(name)!r} in the bank, {views.get(name)!r} now"
            for name in sorted({*views, *held})
            if views.get(name) != held.get(name)
        )
        raise BankError(
            f"bank {job.bank} draws its views otherwise ({what}); keep the bank's "
            "views, or choose another `bank`"
        )
    return dict(held)


def _describe(item: GroupTeacher) -> Described:
    if stored_inputs.is_stored_input(item):
        return stored_inputs.describe_stored_input(item)
    return group_teachers.describe(item)


def _largest_row_bytes(passes: Iterable[PassEntry]) -> int:
    arrays = (
        ArraySpec.from_json(data)
        for entry in passes
        for output in entry.outputs
        for data in output.arrays
    )
    return max((spec.row_bytes for spec in arrays), default=1)


def _live_samples(record: BankRecord | None, changes: ShardChanges) -> list[int]:
    held = [
        shard.samples
        for shard in (record.shards if record else ())
        if not shard.retired and shard.name not in changes.retired
    ]
    return held + [shard.record.samples for shard in changes.new]


def _resolve_passes(
    job: Job,
    inputs: Mapping[str, InputEntry],
    views: Mapping[str, Any],
    record: BankRecord | None,
    teachers: Sequence[GroupTeacher],
    changes: ShardChanges,
) -> _Passes:
    """Returns the passes a job needs; teachers that a bank answers are not opened."""
    requests = dict(record.requests) if record else {}
    unknown = [item for item in teachers if item.digest not in requests]
    described = {item.digest: _describe(item) for item in unknown}
    samples = _live_samples(record, changes)
    held_rows = record.block_rows if record else job.block_rows
    batches = {
        item.digest: item.request.config.batch
        or sizing.choose_batch(
            samples, held_rows, described[item.digest].cost.working_bytes
        )
        for item in unknown
        if not stored_inputs.is_stored_input(item)
    }

    def resolved(block_rows: int) -> _Passes:
        taken = {entry.id for entry in record.passes} if record else set()
        rows_pass, wanted = resolve.resolve_rows(job, inputs, record, taken)
        new = [rows_pass] if rows_pass else []
        wanted += [entry.id for entry in new]
        answers = dict(requests)
        for item in teachers:
            if item.digest not in described:
                wanted += requests[item.digest]
                continue
            is_copy = stored_inputs.is_stored_input(item)
            fresh, old = resolve.resolve_teacher(
                item,
                described[item.digest],
                record,
                views=views,
                # A copy is of the sample, in none of its views.
                last_view=0 if is_copy else job.views.random,
                block_rows=block_rows,
                batch=block_rows if is_copy else batches[item.digest],
                taken=taken,
            )
            new += fresh
            answers[item.digest] = (*old, *(entry.id for entry in fresh))
            wanted += answers[item.digest]
        return _Passes(block_rows, tuple(new), tuple(dict.fromkeys(wanted)), answers)

    if held_rows is not None:
        return resolved(held_rows)
    # Shapes of arrays need block_rows, and block_rows needs the bytes of a row: with
    # blocks of one row they are only measured.
    largest = _largest_row_bytes(resolved(1).new)
    return resolved(
        sizing.choose_block_rows(largest, samples, sorted(set(batches.values())))
    )
