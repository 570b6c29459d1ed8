"""The Beam job: a composite transform from the work items of a run to a finished bank.

Owns the graph and its counters, nothing else: what a work item does is in ``engine``,
what the end does is in ``run_end``. The graph holds the bank's URL and a run's name;
work items are read inside it. Only work items and results, a few hundred bytes each,
cross a shuffle; a feature never does.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

import apache_beam as beam
from apache_beam.metrics import Metrics
from apache_beam.pvalue import PBegin, PCollection
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.shared import Shared
from apache_beam.utils.windowed_value import WindowedValue

from manifests.bank import WorkItem, WorkResult
from manifests.storage import Store
from pipeline.errors import PipelineError
from pipeline.run_end import finalise_run
from pipeline.runs import items_path, read_run

NAMESPACE = "teachonce"
# While one item is being written the next is read: the engine never runs dry.
ITEMS_IN_FLIGHT = 2


class ReadWorkItems(beam.DoFn):  # type: ignore[misc]
    """Yields the work items of a run, the longest first, as JSON text."""

    def __init__(self, bank_url: str) -> None:
        self._bank_url = bank_url

    def process(self, run_id: str) -> Iterator[str]:
        """Yields one text per item."""
        text = gzip.decompress(Store(self._bank_url).read(items_path(run_id)))
        lines = text.decode().splitlines()
        yield from sorted(
            lines,
            key=lambda line: -sum(b["num_rows"] for b in json.loads(line)["blocks"]),
        )


class RunWorkItems(beam.DoFn):  # type: ignore[misc]
    """Hands work items to the process's engine and yields what each one did.

    Data faults are in the results. What raises here is the machine's: a runner that
    retries does, locally the same command goes on where this one stopped.
    """

    def __init__(self, bank_url: str, run_id: str) -> None:
        self._bank_url = bank_url
        self._run_id = run_id
        self._shared = Shared()

    def setup(self) -> None:
        """Loads the teachers once per process."""
        from pipeline.engine import Engine

        run = read_run(Store(self._bank_url), self._run_id)
        self._engine = self._shared.acquire(
            lambda: Engine.for_run(self._bank_url, run), tag=self._run_id
        )
        self._engine.retain()
        self._fail_fast = bool(run["fail_fast"])

    def start_bundle(self) -> None:
        """Begins with nothing in flight."""
        self._pending: set[Future[WorkResult]] = set()

    def process(self, text: str) -> Iterator[str]:
        """Starts one item; yields results of those that are done."""
        item = WorkItem.model_validate_json(text)
        self._pending.add(self._engine.submit(item))
        while len(self._pending) >= ITEMS_IN_FLIGHT:
            yield from self._finish_some()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        """Yields the results that are still out."""
        end = GlobalWindow().max_timestamp()
        while self._pending:
            for text in self._finish_some():
                yield WindowedValue(text, end, [GlobalWindow()])

    def teardown(self) -> None:
        """Ends the engine's threads with its last user."""
        self._engine.release()

    def _finish_some(self) -> Iterator[str]:
        """Waits for whichever item is done first; yields its result."""
        done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            yield self._finish(future)

    def _finish(self, future: Future[WorkResult]) -> str:
        try:
            result = future.result()
            _count(result)
            if self._fail_fast and result.failures:
                raise PipelineError(f"{result.failures[0]} (--fail-fast)")
        except BaseException:
            # This bundle is over; its other items must not hold up the end.
            self._engine.abandon(self._pending)
            raise
        return result.model_dump_json()


def _count(result: WorkResult) -> None:
    """Adds a result to Beam's counters and distributions."""
    for name, value in (
        ("work_items", result.items),
        ("blocks", result.blocks),
        ("samples", result.samples),
        ("objects", result.objects),
        ("bytes_read", result.bytes_read),
        ("bytes_written", result.bytes_written),
        ("failed_work_items", result.failed_items),
    ):
        Metrics.counter(NAMESPACE, name).inc(value)
    for name, value in result.valid.items():
        Metrics.counter(NAMESPACE, f"valid/{name}").inc(value)
    for reason, value in result.invalid.items():
        Metrics.counter(NAMESPACE, f"invalid/{reason}").inc(value)
    for stage, seconds in result.seconds.items():
        Metrics.distribution(NAMESPACE, f"{stage}_ms").update(int(seconds * 1000))


class SumResults(beam.CombineFn):  # type: ignore[misc]
    """Adds results up; associative and commutative."""

    def create_accumulator(self) -> WorkResult:
        """Returns nothing done."""
        return WorkResult()

    def add_input(self, accumulator: WorkResult, text: str) -> WorkResult:
        """Adds one result."""
        return accumulator.plus(WorkResult.model_validate_json(text))

    def merge_accumulators(self, accumulators: Iterable[WorkResult]) -> WorkResult:
        """Adds partial sums."""
        total = WorkResult()
        for one in accumulators:
            total = total.plus(one)
        return total

    def extract_output(self, accumulator: WorkResult) -> str:
        """Returns the sum as JSON text."""
        return accumulator.model_dump_json()


class Finalise(beam.DoFn):  # type: ignore[misc]
    """Makes row arrays, index, statistics and record, once everything was tried."""

    def __init__(self, bank_url: str, run_id: str) -> None:
        self._bank_url = bank_url
        self._run_id = run_id

    def process(self, text: str) -> Iterator[str]:
        """Finalises the bank; yields the run's result."""
        finalise_run(self._bank_url, self._run_id, WorkResult.model_validate_json(text))
        yield text


class Precompute(beam.PTransform):  # type: ignore[misc]
    """Runs every missing block of a planned run and finalises the bank.

    Args:
        bank_url: the bank, its record and arrays already made for this run.
        run_id: the run, whose settings and work items lie in the bank.
    """

    def __init__(self, bank_url: str, run_id: str) -> None:
        super().__init__()
        self._bank_url = bank_url
        self._run_id = run_id

    def expand(self, begin: PBegin) -> PCollection[str]:
        """Returns one element: the run's result."""
        return (
            begin
            | "Run" >> beam.Create([self._run_id], reshuffle=False)
            | "ReadWorkItems"
            >> beam.ParDo(ReadWorkItems(self._bank_url)).with_output_types(str)
            | "Spread" >> beam.Reshuffle()
            | "RunWorkItems"
            >> beam.ParDo(RunWorkItems(self._bank_url, self._run_id)).with_output_types(
                str
            )
            | "SumResults" >> beam.CombineGlobally(SumResults()).with_output_types(str)
            | "Finalise"
            >> beam.ParDo(Finalise(self._bank_url, self._run_id)).with_output_types(str)
        )


def query_counters(result: Any) -> dict[str, int]:
    """Returns the counters of a finished pipeline by name."""
    metrics = result.metrics().query()
    return {one.key.metric.name: one.result for one in metrics["counters"]}
