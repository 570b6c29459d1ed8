"""A sample's rows: read, decoded, prepared, and what live teachers say of them.

Each step is timed as the engine does it: decoding on all cores at once, forwards on its
lanes, in full batches. Rates are of this machine as it is just now.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NoReturn

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from manifests.bank import PassEntry, ShardEntry
from pipeline.bank.record import view_policy_of
from pipeline.bank.rows import RowFacts
from pipeline.decoding import SampleSchema, decode_sample
from pipeline.errors import PipelineError
from pipeline.estimate import lane_bytes
from pipeline.live import (
    LivePass,
    StoredOutput,
    device_kind,
    explain_failure,
    load_passes,
    pick_device,
    set_lane_threads,
)
from pipeline.memory import keep_freed_memory
from pipeline.plan import Plan
from pipeline.prepared_rows import PreparedRows
from pipeline.sample_plan.choice import Run, choose_runs
from pipeline.samples.shards import RowSpan, Sample, ShardRow, read_samples
from pipeline.work_items import num_lanes, num_threads

RowsOf = Callable[[ShardEntry], Sequence[ShardRow]]
OutputView = tuple[StoredOutput, int]
Bools = npt.NDArray[np.bool_]


@dataclass
class Rates:
    """Seconds of this machine with all its cores at work.

    Attributes:
        read: a row.
        decode: a row.
        prepare: a row and view.
        forward: a full batch and view, by pass; all its sizes.
    """

    read: float = 0.0
    decode: float = 0.0
    prepare: float = 0.0
    forward: dict[str, float] = field(default_factory=dict)


def measured_views(live: LivePass) -> LivePass:
    """Returns a pass with its first two views: the second stands for all others."""
    entry = live.entry
    last = min(entry.last_view, entry.first_view + 1)
    return replace(live, entry=entry.model_copy(update={"last_view": last}))


def passes_to_measure(plan: Plan) -> list[PassEntry]:
    """Returns the passes that lack a block, or all of the job where none does."""
    return [plan.record.pass_by_id(name) for name in plan.passes_to_do or plan.wanted]


def most_rows(plan: Plan) -> int:
    """Returns the samples whose inputs, and one pass's outputs, fit the memory."""
    passes = passes_to_measure(plan)
    inputs = sum(min(2, len(one.views)) * one.input_bytes for one in passes)
    outputs = max(
        min(2, len(one.views))
        * sum(4 * math.prod(output.shape) for output in one.outputs)
        for one in passes
    )
    return plan.job.engine.memory // max(1, inputs + outputs)


class LiveRows:
    """Samples spread over the shards, and the live teachers of a plan."""

    def __init__(self, plan: Plan, count: int, rows_of: RowsOf) -> None:
        """Loads the teachers, reads and prepares the rows.

        Args:
            plan: whose teachers are run, see `passes_to_measure`.
            count: samples wanted.
            rows_of: the index rows of a shard.

        Raises:
            TeachOnceError: a teacher or a shard cannot be used, or so many samples do
                not fit ``engine.memory``.
        """
        record, config = plan.record, plan.job.engine
        self._record = record
        names = [entry.id for entry in passes_to_measure(plan)]
        self.device = pick_device(config.device)
        self.device_kind = device_kind(self.device)
        if self.device == "cpu":
            keep_freed_memory()
        self._threads = num_threads(config)
        self._num_lanes = num_lanes(self.device, config, lane_bytes(record, names))
        self._shards = [s for s in record.shards if not s.retired and s.samples]
        runs = choose_runs([shard.samples for shard in self._shards], count)
        self.num_rows = sum(run.num_rows for run in runs)
        most = most_rows(plan)
        if self.num_rows > most:
            raise PipelineError(
                f"--sample must be at most {most} for this job, so that inputs and "
                f"outputs fit engine.memory, got {self.num_rows}; take fewer, or raise "
                "engine.memory"
            )
        loaded = load_passes(record, names, self.device).values()
        self.passes = [measured_views(live) for live in loaded if live.entry.outputs]
        self.facts = [RowFacts() for _ in range(self.num_rows)]
        self.rates = Rates()
        self._prepared = PreparedRows(self.passes, self.num_rows)
        self._read(plan, runs, rows_of)

    @property
    def invalid(self) -> dict[str, int]:
        """Samples that cannot be used, by ``<input>:<reason>``."""
        return dict(
            Counter(
                f"{name}:{reason.partition(':')[0]}"
                for facts in self.facts
                for name, reason in facts.reasons.items()
            )
        )

    def usable(self, live: LivePass) -> Bools:
        """Returns (rows,): whose inputs are all sound for a pass."""
        found = [
            not any(name in facts.reasons for name in live.entry.inputs)
            for facts in self.facts
        ]
        return np.array(found, np.bool_)

    def _read(self, plan: Plan, runs: Sequence[Run], rows_of: RowsOf) -> None:
        record = self._record
        schema = SampleSchema.of(record.inputs, record.labels)
        policy = view_policy_of(record)
        started = time.perf_counter()
        samples = list(self._samples(runs, rows_of, schema.wanted))
        self.rates.read = (time.perf_counter() - started) / self.num_rows
        seconds = np.zeros((2, self.num_rows))

        def decode(place: int) -> None:
            shard, sample, refused = samples[place]
            begin = time.perf_counter()
            decoded = decode_sample(sample, schema, refused)
            middle = time.perf_counter()
            self._prepared.put(place, shard.name, sample.key, decoded, policy)
            seconds[:, place] = middle - begin, time.perf_counter() - middle
            self.facts[place] = decoded.facts

        with ThreadPoolExecutor(self._threads, "teachonce-decode") as pool:
            for _ in pool.map(decode, range(self.num_rows)):
                pass
        views = max((len(live.entry.views) for live in self.passes), default=1)
        self.rates.decode = float(seconds[0].mean()) / self._threads
        self.rates.prepare = float(seconds[1].mean()) / self._threads / views

    def _samples(
        self, runs: Sequence[Run], rows_of: RowsOf, wanted: frozenset[str]
    ) -> Iterator[tuple[ShardEntry, Sample, str | None]]:
        """Yields each sample with its shard, and why the index refused it."""
        for run in runs:
            shard = self._shards[run.shard]
            held = rows_of(shard)[run.first_row : run.first_row + run.num_rows]
            span = RowSpan(
                first_row=run.first_row,
                num_rows=len(held),
                start=held[0].offset,
                end=max(row.offset + row.size for row in held),
                first_key=held[0].key,
            )
            found = read_samples(shard.url, span, wanted, shard.sequential)
            for (_, sample), row in zip(found, held, strict=True):
                yield shard, sample, row.refused

    def outputs(
        self, live: LivePass, bar: tqdm[NoReturn]
    ) -> Mapping[OutputView, np.ndarray]:
        """Returns what a teacher says, (rows, *shape) by output and view; times it.

        Args:
            live: one of the passes.
            bar: told of every forward.
        """
        entry = live.entry
        if entry.holds_inputs:
            # Made where images are prepared, and timed there.
            self.rates.forward[entry.id] = 0.0
            return self._prepared.copies_of(live)
        values = {
            (output, view): np.zeros((self.num_rows, *output.shape), output.dtype)
            for output in live.outputs
            for view in entry.views
        }

        def run(task: tuple[int, str, int]) -> float:
            low, size, view = task
            rows = slice(low, min(low + entry.batch, self.num_rows))
            started = time.perf_counter()
            arrays = self._prepared.batch(live, size, view, rows)
            try:
                found = live.forward(size, arrays)
            except (RuntimeError, MemoryError) as error:
                raise explain_failure(live, error, entry.batch) from error
            for (output, number), target in values.items():
                if output.size != size or number != view:
                    continue
                if output.encoding.holds_features:
                    target[rows] = found[output.name][: rows.stop - low]
            bar.update()
            return time.perf_counter() - started

        starts = range(0, self.num_rows, entry.batch)
        lane_threads = max(1, self._threads // self._num_lanes)
        total = 0.0
        with ThreadPoolExecutor(
            self._num_lanes, "teachonce-lane", set_lane_threads, (lane_threads,)
        ) as lanes:
            for size in live.sizes:
                # Kernels are chosen and memory is taken at the first forward.
                for _ in lanes.map(run, [(0, size, entry.first_view)]):
                    pass
                tasks = [(low, size, view) for low in starts for view in entry.views]
                total += float(np.mean(list(lanes.map(run, tasks)))) / self._num_lanes
        self.rates.forward[entry.id] = total
        for (output, _), target in values.items():
            if output.kind == "index":
                target[...] = self._prepared.points_of(live, output)
        return values

    def missing_cells(
        self, live: LivePass, output: StoredOutput, view: int
    ) -> Bools | None:
        """Returns (rows, ...) which cells show nothing but padding; None where none."""
        return self._prepared.missing_cells(live, output, view)
