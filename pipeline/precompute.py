"""The main job: plan, make the bank's frame, run the graph, tell what came out.

Owns the order of things and the progress bar. A finished job ends after the plan, with
neither torch nor Beam imported. Metadata is written under the bank's lock, teachers run
without it, so that runs of one job share the work.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from manifests.bank import BankRecord, ShardEntry, WorkResult
from manifests.errors import BankError, ManifestError, TeachOnceError
from manifests.job import Job
from manifests.storage import Store
from pipeline.bank.classifiers import (
    classifier_arrays,
    is_stored,
    write_classifier,
)
from pipeline.bank.commits import commit_path, list_commits
from pipeline.bank.dataset_index import part_path, read_part, write_part
from pipeline.bank.layout import write_metadata
from pipeline.bank.lock import bank_lock, break_lock, clear_dead_lock
from pipeline.bank.record import open_record, read_record, write_record
from pipeline.bank.verify import verify
from pipeline.beam_options import check_options, complete_options, run_here
from pipeline.cost import Terms
from pipeline.errors import PipelineError, RunStopped
from pipeline.estimate import Estimate, check_limits, estimate
from pipeline.index import restore_part
from pipeline.plan import Plan, make_plan
from pipeline.runs import new_run_id, read_run, start_run
from pipeline.samples.shards import ShardRow
from pipeline.work_items import item_blocks, num_threads, work_items
from teachers.zero_shot import read_classifier

if TYPE_CHECKING:
    from pipeline.engine import Engine

MAX_PLAN_ATTEMPTS = 5
PRICED_SAMPLES = 64
"""That ``limits.max_usd`` is judged on, fewer where they do not fit the memory."""


@dataclass
class Outcome:
    """What `precompute` did.

    Attributes:
        record: the bank afterwards.
        result: what this run did; empty where there was nothing to do.
        counters: Beam's, by name.
        removed: blocks that ``--repair`` gave up, as (pass, block).
        wanted: passes that answer the job.
        was_done: whether the bank answered the job already.
    """

    record: BankRecord
    result: WorkResult = field(default_factory=WorkResult)
    counters: dict[str, int] = field(default_factory=dict)
    removed: list[tuple[str, int]] = field(default_factory=list)
    wanted: tuple[str, ...] = ()
    was_done: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether the bank answers the whole job and no shard was damaged."""
        state = self.record.state
        return (
            state is not None
            and set(self.wanted) <= set(state.complete_passes)
            and not state.damaged_shards
            and not self.result.failures
        )


def plan_with_progress(job: Job, needs_weights: bool = True) -> Plan:
    """Returns the plan of a job, with a bar over the shards that are indexed."""
    with tqdm(desc="index", unit="shard", disable=None, leave=False, delay=1) as bar:

        def total(count: int) -> None:
            bar.total = count
            bar.refresh()

        return make_plan(job, lambda: bar.update(), total, needs_weights)


def _merge(store: Store, plan: Plan) -> bool:
    """Writes the plan's frame if the bank is still what was planned on; else False."""
    held = read_record(store)
    if held != plan.existing:
        return False
    changes = plan.changes
    if changes.new:
        write_part(store, plan.part, changes.new)
    write_metadata(store, plan.record)
    write_classifiers(store, plan.record)
    write_record(store, _unfinished(plan))
    return True


def write_classifiers(store: Store, record: BankRecord) -> None:
    """Copies zero-shot classifiers that a bank lacks from the files of its jobs.

    Only for the holder of the bank's lock.

    Raises:
        TeacherError: a file cannot be read.
        PipelineError: it is not the one that the bank's logits come from.
    """
    for array in classifier_arrays(record):
        if is_stored(store, array):
            continue
        found = read_classifier(array.url, f"{store.url_of(array.path)}: outputs")
        if found.sha256 != array.facts["sha256"]:
            raise PipelineError(
                f"{array.url} must be the classifier that the bank's logits come from, "
                f"of sha256 {array.facts['sha256']}, got {found.sha256}; put that file "
                "back"
            )
        write_classifier(store, array, found.weight)


def _unfinished(plan: Plan) -> BankRecord:
    """Returns a record that no longer says it is complete: what was added must be
    finalised, even if a run is killed when all of it is computed.
    """
    record = plan.record
    if record.state is None:
        return record
    growing = {name for name, blocks in plan.missing_blocks().items() if blocks}
    if plan.changes.new or plan.changes.retired:
        growing |= {entry.id for entry in record.passes}
    held = tuple(n for n in record.state.complete_passes if n not in growing)
    update = {"complete": False, "complete_passes": held, "files": None}
    return record.model_copy(update={"state": record.state.model_copy(update=update)})


def _remember(store: Store, plan: Plan) -> None:
    """Keeps what a plan found out about a finished bank: where its shards lie now, and
    that it answers this job, so that the next plan need not ask again.
    """
    held = plan.existing
    assert held is not None
    found = {"shards": plan.record.shards, "requests": plan.record.requests}
    known = held.model_copy(update=found)
    if known == held:
        return
    # A bank that may not be written, or is being written, is as good without.
    with contextlib.suppress(TeachOnceError), bank_lock(store, "precompute", 0):
        if read_record(store) == held:
            write_record(store, known)


def _check_price(plan: Plan, store: Store, terms: Terms | None) -> None:
    """Raises where a job may cost more than ``limits.max_usd``, or nobody can say."""
    limit = plan.job.limits.max_usd
    if limit is None or not plan.passes_to_do:
        return
    if terms is None:
        raise PipelineError(
            f"limits.max_usd is {limit:,g}: name the type of machine that will run "
            "the job, --machine NAME, so that its price can be judged on samples "
            "(--speedup X says how much faster it is than this one); or set "
            "limits.max_usd=null"
        )
    from pipeline.sample_plan.live_rows import most_rows
    from pipeline.sample_plan.whole_job import measure_plan

    count = max(1, min(PRICED_SAMPLES, most_rows(plan)))
    sampled = measure_plan(plan, count, rows_lookup(store, plan))
    terms.check(limit, sampled.amounts)


def prepare(
    job: Job,
    store: Store,
    load: Callable[[Plan], None] = lambda plan: None,
    terms: Terms | None = None,
) -> tuple[Plan, Estimate]:
    """Returns the plan of a job after making or growing its bank for it.

    Args:
        job: with absolute paths.
        store: the bank's.
        load: called before anything is written, to find out what only loading tells.
        terms: that ``limits.max_usd`` is judged by.

    Raises:
        TeachOnceError: the job cannot be run; nothing was written.
    """
    for _ in range(MAX_PLAN_ATTEMPTS):
        plan = plan_with_progress(job)
        numbers = estimate(plan)
        if plan.is_done:
            _remember(store, plan)
            return plan, numbers
        check_limits(plan, numbers, store)
        _check_price(plan, store, terms)
        load(plan)
        if plan.existing == plan.record:
            return plan, numbers
        with bank_lock(store, "precompute"):
            if _merge(store, plan):
                return plan, numbers
        # Another run changed the bank in the meantime; what is missing has changed.
    raise PipelineError(
        f"bank {store.url} keeps changing; run again when other runs have ended"
    )


def rows_lookup(store: Store, plan: Plan) -> Callable[[ShardEntry], Sequence[ShardRow]]:
    """Returns rows of a shard: from the plan where they are new, else from the bank."""
    fresh = {shard.record.name: shard.rows for shard in plan.changes.new}
    parts: dict[str, dict[str, tuple[ShardRow, ...]]] = {}

    def rows_of(shard: ShardEntry) -> Sequence[ShardRow]:
        if shard.name in fresh:
            return fresh[shard.name]
        if shard.part not in parts:
            parts.clear()
            parts[shard.part] = dict(read_part(store, shard.part))
        found = parts[shard.part].get(shard.name, ())
        if len(found) != shard.samples:
            raise BankError(
                f"{store.url_of(part_path(shard.part))} must hold the "
                f"{shard.samples} rows of {shard.name}, got {len(found)}; restore it "
                "from a copy"
            )
        return found

    return rows_of


def repair(store: Store, full: bool = True) -> list[tuple[str, int]]:
    """Gives up every damaged block: its commit first, then its objects. Writes metadata
    and the dataset's index again; row arrays, the bank's index and the rest are made
    anew by the finalise that follows.

    Returns:
        (pass, block) of what the next run will compute again.
    """
    with bank_lock(store, "repair"):
        _, record = open_record(store.url)
        report = verify(store, record, full=full)
        for pass_id, block in report.damaged_blocks:
            store.delete(commit_path(pass_id, block))
        for path in (
            *report.damaged_objects,
            *report.orphans,
            *report.damaged_metadata,
            *report.damaged_runs,
        ):
            store.delete(path)
        for part in report.damaged_parts:
            restore_part(store, record, part)
        write_metadata(store, record)
        write_classifiers(store, record)
        store.clear_temporary(0.0)
    return report.damaged_blocks


def precompute(
    job: Job,
    beam_options: Sequence[str] = (),
    *,
    do_repair: bool = False,
    do_break_lock: bool = False,
    fail_fast: bool = False,
    quiet: bool = False,
    terms: Terms | None = None,
) -> Outcome:
    """Makes a job's bank, or what it still lacks.

    Args:
        job: with absolute paths.
        beam_options: standard options of Beam; FnApiRunner where none is named.
        do_repair: verify first and compute damaged blocks again.
        do_break_lock: remove the bank's lock first.
        fail_fast: end at the first shard that fails.
        quiet: no progress bar.
        terms: that ``limits.max_usd`` is judged by, before anything is written.

    Raises:
        TeachOnceError: the job cannot be run, or the machine or the store failed.
    """
    if terms is not None and job.limits.max_usd is None:
        raise ManifestError(
            "--machine is what limits.max_usd is judged by, and the job has none; "
            "leave it out, or say limits.max_usd=400"
        )
    store = Store(job.bank)
    if do_break_lock:
        break_lock(store)
    removed: list[tuple[str, int]] = []
    if do_repair and read_record(store) is not None:
        removed = repair(store)
    options = complete_options(beam_options)
    engines: list[Engine] = []

    def load(plan: Plan) -> None:
        check_options(options)
        if run_here(options) and plan.passes_to_do:
            from pipeline.engine import Engine

            engines[:] = [
                Engine(store, plan.record, plan.passes_to_do, job.engine, job.limits)
            ]

    plan, numbers = prepare(job, store, load, terms)
    if plan.is_done and not do_repair:
        assert plan.existing is not None
        # A run that was killed in its last moment leaves a whole bank, but locked.
        clear_dead_lock(store)
        return Outcome(plan.existing, wanted=plan.wanted, was_done=True)
    run_id = new_run_id()
    missing = plan.missing_blocks()
    settings = {
        "passes": list(plan.passes_to_do),
        "engine": job.engine.model_dump(mode="json"),
        "limits": job.limits.model_dump(mode="json"),
        "fail_fast": fail_fast,
        "beam_options": list(options),
        "planned_blocks": {name: len(blocks) for name, blocks in missing.items()},
        "planned_bytes": numbers.bytes_to_do,
    }
    items = work_items(
        plan,
        rows_lookup(store, plan),
        item_blocks(plan, job.engine.device, num_threads(job.engine)),
    )
    start_run(store, run_id, settings, items)
    if engines:
        from pipeline.engine import make_ready

        make_ready(run_id, engines[0])
    counters = _run_graph(store, run_id, options, missing, quiet)
    _, record = open_record(store.url)
    found = read_run(store, run_id).get("result", {})
    result = WorkResult.model_validate(found)
    return Outcome(record, result, counters, removed, plan.wanted)


def _run_graph(
    store: Store,
    run_id: str,
    options: Sequence[str],
    missing: dict[str, list[int]],
    quiet: bool,
) -> dict[str, int]:
    """Runs the pipeline in a thread, draws the bar from commits; returns counters."""
    import logging

    # Beam warns at import about Google's optional libraries, which not every run needs.
    logging.disable(logging.WARNING)
    import apache_beam as beam

    logging.disable(logging.NOTSET)
    from apache_beam.options.pipeline_options import PipelineOptions

    from pipeline.transform import Precompute, query_counters

    if run_here(options):
        # What a worker in this process raises is raised here, as one line.
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    found: dict[str, Any] = {}

    def go() -> None:
        try:
            pipeline = beam.Pipeline(options=PipelineOptions(list(options)))
            _ = pipeline | "Precompute" >> Precompute(store.url, run_id)
            result = pipeline.run()
            result.wait_until_finish()
            found["counters"] = query_counters(result)
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=go, name="teachonce-beam", daemon=True)
    thread.start()
    _draw_progress(store, thread, missing, quiet)
    error = found.get("error")
    if error is not None:
        raise _unwrap(error)
    counters: dict[str, int] = found["counters"]
    return counters


def _draw_progress(
    store: Store, thread: threading.Thread, missing: dict[str, list[int]], quiet: bool
) -> None:
    wanted = {name: set(blocks) for name, blocks in missing.items() if blocks}
    total = sum(len(blocks) for blocks in wanted.values())
    interval = 0.2
    with tqdm(
        total=total, unit="block", desc="precompute", disable=True if quiet else None
    ) as bar:
        while thread.is_alive():
            thread.join(interval)
            if bar.disable:
                continue
            started = time.monotonic()
            done = sum(
                len(list_commits(store, name) & blocks)
                for name, blocks in wanted.items()
            )
            bar.update(done - bar.n)
            # Listings of a remote store are billed and slow; ask seldom where they are.
            interval = max(0.5, 20 * (time.monotonic() - started))
        if not bar.disable:
            bar.update(
                sum(len(list_commits(store, n) & b) for n, b in wanted.items()) - bar.n
            )


def _unwrap(error: BaseException) -> BaseException:
    """Returns the error that a runner wrapped, without its '[while running ...]'."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, TeachOnceError):
        seen = seen.__cause__ or seen.__context__
    if seen is None:
        return error
    stopped = RunStopped(str(seen).split(" [while running")[0])
    stopped.__cause__ = error
    return stopped
