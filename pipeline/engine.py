"""The engine: one per process; reading, decoding, teachers and writing overlapped.

A work item is read by its own thread and decoded by one pool; forward lanes run the
teachers (one lane on an accelerator, one per core on a CPU, where a lane runs on one
thread so that no core waits at another's barrier); one pool encodes and writes. Blocks
of all items in flight share one memory budget. What a block is, is in ``block_work``.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from manifests.bank import (
    BankRecord,
    BlockSpan,
    Commit,
    WorkItem,
    WorkResult,
)
from manifests.job import EngineConfig, LimitsConfig
from manifests.storage import Store
from pipeline.bank.commits import write_commit
from pipeline.bank.record import open_record, view_policy_of
from pipeline.block_work import BlockWork
from pipeline.decoding import SampleSchema
from pipeline.errors import PipelineError
from pipeline.estimate import block_bytes, lane_bytes
from pipeline.live import LivePass, device_kind, load_passes, pick_device
from pipeline.memory import Budget, Buffers, keep_freed_memory
from pipeline.samples.errors import ShardError
from pipeline.samples.shards import RowSpan, Sample, read_samples
from pipeline.stopwatch import Stopwatch
from pipeline.work_items import num_lanes, num_threads

SMALLEST_JUDGED_ITEM = 50
RAW_SAMPLES_PER_THREAD = 4


class _ItemWork:
    """One work item in flight: its blocks, its verdict and its result."""

    def __init__(self, item: WorkItem) -> None:
        self.item = item
        self.future: Future[WorkResult] = Future()
        self.watch = Stopwatch()
        self.stop = threading.Event()
        self.failures: list[str] = []
        self.error: BaseException | None = None
        self.blocks: list[BlockWork] = []
        self._invalid_rows = 0
        self._lock = threading.Lock()

    def add_block(self, block: BlockWork) -> None:
        """Takes a block into the item; gives it up at once where the item has ended."""
        with self._lock:
            self.blocks.append(block)
        if self.stop.is_set():
            block.abandon()

    def abort(self, cause: BaseException | str) -> None:
        """Ends the item with none of its blocks committed.

        Args:
            cause: an exception is the machine's fault and will be raised; a text is the
                data's and goes into the result.
        """
        with self._lock:
            if isinstance(cause, str):
                self.failures.append(cause)
            elif self.error is None:
                self.error = cause
            blocks = list(self.blocks)
        self.stop.set()
        for block in blocks:
            block.abandon()

    def count_invalid(self) -> int:
        """Counts one more invalid row; returns how many there are."""
        with self._lock:
            self._invalid_rows += 1
            return self._invalid_rows


class Engine:
    """Runs work items. Thread-safe: `submit` from any thread, wait on the future."""

    def __init__(
        self,
        store: Store,
        record: BankRecord,
        pass_ids: Sequence[str],
        config: EngineConfig,
        limits: LimitsConfig,
    ) -> None:
        self._store = store
        self._record = record
        self._limits = limits
        self._threads = num_threads(config)
        self.device = pick_device(config.device)
        self._device_kind = device_kind(self.device)
        self._schema = SampleSchema.of(record.inputs, record.labels)
        self._policy = view_policy_of(record)
        self._passes: dict[str, LivePass] = load_passes(record, pass_ids, self.device)
        if self.device == "cpu":
            keep_freed_memory()
        inside = lane_bytes(record, pass_ids)
        self._num_lanes = num_lanes(self.device, config, inside)
        # What is left beside the lanes' own values is for blocks; a single block is
        # always let through.
        self.budget = Budget(max(config.memory - self._num_lanes * inside, 1))
        self._buffers = Buffers(self.budget.total_bytes)
        self._users = 0
        self._in_flight: set[_ItemWork] = set()
        self._lock = threading.Lock()
        self._forwards: queue.SimpleQueue[tuple[_ItemWork, BlockWork, str, int] | None]
        self._forwards = queue.SimpleQueue()

    @classmethod
    def for_run(cls, bank_url: str, run: Mapping[str, Any]) -> Engine:
        """Returns the engine of a run: the one made ready in this process, or a new one
        from the bank's record and the run's own settings.
        """
        ready = _READY.pop(str(run["run"]), None)
        if ready is not None:
            return ready
        store, record = open_record(bank_url)
        return cls(
            store,
            record,
            run["passes"],
            EngineConfig.model_validate(run["engine"]),
            LimitsConfig.model_validate(run["limits"]),
        )

    def retain(self) -> None:
        """Starts the threads for the first user."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._readers = ThreadPoolExecutor(8, "teachonce-item")
            self._decoders = ThreadPoolExecutor(self._threads, "teachonce-decode")
            self._writers = ThreadPoolExecutor(self._threads, "teachonce-write")
            self._raw = threading.Semaphore(RAW_SAMPLES_PER_THREAD * self._threads)
            self._lanes = [
                threading.Thread(target=self._forward_lane, name=f"teachonce-lane-{n}")
                for n in range(self._num_lanes)
            ]
            for lane in self._lanes:
                lane.daemon = True
                lane.start()

    def release(self) -> None:
        """Ends the threads with the last user; teachers stay loaded."""
        with self._lock:
            self._users -= 1
            if self._users:
                return
            # None is left unless a runner gave up: its items would wait for lanes that
            # have ended.
            for work in list(self._in_flight):
                work.abort(_stopped())
            for _ in self._lanes:
                self._forwards.put(None)
            for lane in self._lanes:
                lane.join()
            for pool in (self._readers, self._decoders, self._writers):
                pool.shutdown(wait=True)

    def submit(self, item: WorkItem) -> Future[WorkResult]:
        """Starts a work item and returns the future of its result.

        The future raises what the machine did (storage, memory); what the data did is
        in the result.
        """
        work = _ItemWork(item)
        self._in_flight.add(work)
        self._readers.submit(self._run_item, work)
        return work.future

    def abandon(self, futures: Collection[Future[WorkResult]]) -> None:
        """Gives items up that nobody waits for any more; what they committed stays."""
        for work in list(self._in_flight):
            if work.future in futures:
                work.abort(_stopped())

    def _run_item(self, work: _ItemWork) -> None:
        try:
            self._read_item(work)
            for block in work.blocks:
                block.wait_decoded()
            # Only now is it certain that the item is not refused as a whole.
            result = self._commit_blocks(work)
        except BaseException as error:
            work.abort(error)
        self._in_flight.discard(work)
        if work.error is not None:
            work.future.set_exception(work.error)
        else:
            work.future.set_result(result)

    def _read_item(self, work: _ItemWork) -> None:
        """Reads samples and hands them to the decoders until the item ends or fails."""
        item = work.item
        span = _row_span(item)
        spans = iter(item.blocks)
        block: BlockWork | None = None
        left = 0
        samples = read_samples(item.url, span, self._schema.wanted, item.sequential)
        try:
            while not work.stop.is_set():
                with work.watch.stage("read"):
                    found = next(samples, None)
                if found is None:
                    break
                if left == 0:
                    block = self._open_block(work, next(spans))
                    if block is None:
                        return
                    left = block.span.num_rows
                assert block is not None
                self._raw.acquire()
                self._decoders.submit(self._decode, work, block, *found)
                left -= 1
        except ShardError as error:
            # The blocks before stay; the one that was being read has not all its rows.
            if block is not None and left:
                block.abandon()
            work.failures.append(str(error))

    def _open_block(self, work: _ItemWork, span: BlockSpan) -> BlockWork | None:
        size = block_bytes(self._record, work.item.passes)
        if not self.budget.acquire(size):
            work.abort(_stopped())
            return None
        block = BlockWork(
            item=work.item,
            span=span,
            record=self._record,
            passes=[self._passes[name] for name in work.item.passes],
            buffers=self._buffers,
            watch=work.watch,
            on_released=lambda: self.budget.release(size),
        )
        work.add_block(block)
        return block

    def _decode(
        self, work: _ItemWork, block: BlockWork, row: int, sample: Sample
    ) -> None:
        try:
            if block.is_aborted:
                return
            refused = work.item.refused.get(row)
            ready, without, is_invalid = block.decode_row(
                row, sample, refused, self._schema, self._policy
            )
            if is_invalid:
                self._judge(work, work.count_invalid())
            for name, batch in ready:
                self._forwards.put((work, block, name, batch))
            for name in without:
                self._writers.submit(self._write, work, block, name)
        except BaseException as error:
            work.abort(error)
        finally:
            self._raw.release()

    def _judge(self, work: _ItemWork, invalid_rows: int) -> None:
        """Refuses an item, before its first commit, when too much of it is invalid."""
        rows = work.item.num_rows
        limit = self._limits.max_invalid_fraction
        too_many = rows >= SMALLEST_JUDGED_ITEM and invalid_rows > limit * rows
        if too_many and not work.stop.is_set():
            work.abort(
                f"shard {work.item.shard}: more than {limit:.1%} of a work item of "
                f"{rows} samples is invalid (limits.max_invalid_fraction), none of it "
                "was committed; look at a few of its samples, mend the shard or the job"
            )

    def _forward_lane(self) -> None:
        from pipeline.live import set_lane_threads

        set_lane_threads(max(1, self._threads // self._num_lanes))
        while True:
            task = self._forwards.get()
            if task is None:
                return
            work, block, name, batch = task
            try:
                if not block.is_aborted and block.forward(name, batch):
                    self._writers.submit(self._write, work, block, name)
            except BaseException as error:
                work.abort(error)
            # A lane that waits must not keep the last block's buffers alive.
            del task, work, block

    def _write(self, work: _ItemWork, block: BlockWork, name: str) -> None:
        try:
            block.write_pass(name, self._store)
        except BaseException as error:
            work.abort(error)

    def _commit_blocks(self, work: _ItemWork) -> WorkResult:
        """Commits the item's whole blocks, in order."""
        result = WorkResult(items=1)
        for block in work.blocks:
            contents = block.wait_written()
            if contents is None:
                continue
            timing = work.watch.seconds()
            written = sum(
                write_commit(
                    self._store,
                    Commit(content=content, device=self._device_kind, timing=timing),
                )
                for content in contents
            )
            result = result.plus(block.result(written))
        return result.plus(
            WorkResult(
                seconds=work.watch.seconds(),
                failed_items=int(bool(work.failures)),
                failures=tuple(work.failures),
            )
        )


# A local run loads its teachers before it writes anything, so that weights that do not
# fit leave no bank behind; the graph's workers in this process take them from here.
_READY: dict[str, Engine] = {}


def make_ready(run_id: str, engine: Engine) -> None:
    """Leaves an engine for the workers of a run in this process."""
    _READY[run_id] = engine


def _stopped() -> PipelineError:
    return PipelineError("the engine was stopped; run the same command again")


def _row_span(item: WorkItem) -> RowSpan:
    """Returns the rows of a work item's shard, from its first block to its last."""
    first, last = item.blocks[0], item.blocks[-1]
    return RowSpan(
        first_row=first.first_row,
        num_rows=last.first_row + last.num_rows - first.first_row,
        start=first.start,
        end=last.end,
        first_key=first.first_key,
    )
