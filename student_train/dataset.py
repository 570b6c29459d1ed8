"""BankDataset: inputs joined with what teachers said of them, in the order of an epoch.

Joined by row, and the key of every sample compared with the bank's. Whole blocks, one
request each, decoded on threads into memory that is used again, a few batches ahead of
who learns from them. What is in which batch depends on (seed, epoch) alone: see
``order``.
"""

from __future__ import annotations

import heapq
import itertools
import os
import signal
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from manifests.errors import BankError, StorageError, TeachOnceError
from manifests.recipe import RowsConfig
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.shard_copies import Copies, ShardCopies
from pipeline.bank.stored_copies import StoredCopies
from student_train.batches import Batch, merge_batches
from student_train.errors import TrainingError
from student_train.making import BatchMaker, Making, Piece
from student_train.order import EpochOrder, view_of
from student_train.parts import LoadedPart, PartKey, PartQueue
from student_train.reading import OpenedReading, Reading
from student_train.selection import select_rows
from student_train.targets import TargetSource

# Blocks that are read before a lane needs them, over all lanes.
_AHEAD = 2


class BankDataset(IterableDataset[Batch]):
    """Batches of a bank and its samples; see the README for a loop of one's own.

    Iterating gives the batches of ``epoch``; ``stream`` goes on from one epoch to the
    next without a pause. Under a ``torch`` DataLoader with ``batch_size=None`` every
    worker gives its share of each batch, in turn.

    Attributes:
        epoch: that iterating gives.
        num_rows: usable rows of an epoch: at least one target or label holds.
        num_steps: batches of an epoch; the same for every rank and every epoch.
        sources: targets by name, as the bank holds them.
    """

    def __init__(
        self,
        bank: str | Bank,
        reading: Reading,
        *,
        batch: int,
        rows: RowsConfig | npt.NDArray[np.bool_] | None = None,
        shards: Sequence[str] | None = None,
        view: Literal["epoch"] | int = "epoch",
        window_blocks: int = 8,
        seed: int = 0,
        shuffle: bool = True,
        keep_rest: bool = False,
        rank: int = 0,
        world_size: int = 1,
        threads: int | None = None,
        prefetch: int = 3,
        pin_memory: bool = False,
    ) -> None:
        """Opens the bank and checks what is asked against it.

        Args:
            bank: path or URL, or an open bank.
            reading: what is read of each row.
            batch: rows of a batch, over all ranks.
            rows: which rows; all where omitted.
            shards: the reader's own copy; where the bank found them if omitted. Not
                read where ``reading`` takes the bank's copies.
            view: ``epoch`` for another random view each epoch, or a number.
            window_blocks: blocks that a batch draws from, ranks and workers together.
            seed: of the order.
            shuffle: False for the bank's own order.
            keep_rest: whether an epoch's last, smaller batch is given.
            rank, world_size: of this process among those that train together.
            threads: that read and decode; the cores there are if omitted.
            prefetch: batches made ahead.
            pin_memory: whether batches lie in page-locked memory.

        Raises:
            TrainingError: the bank has not what is asked, or the shards are not its.
            BankError, StorageError: it cannot be read.
        """
        super().__init__()
        self.bank = open_bank(bank) if isinstance(bank, str) else bank
        self.reading = reading
        self.epoch = 0
        self._batch, self._seed, self._shuffle = batch, seed, shuffle
        self._window_blocks, self._keep_rest = window_blocks, keep_rest
        self._rank, self._world_size = rank, world_size
        self._threads = threads or len(os.sched_getaffinity(0))
        self._prefetch = prefetch
        self._view = view
        record = self.bank.record
        if view != "epoch" and view >= record.num_views:
            raise TrainingError(
                f"view must be below the bank's {record.num_views} views, got {view}; "
                "take another one, or `epoch`"
            )
        opened = OpenedReading(self.bank, reading, self._views_shown())
        if isinstance(rows, np.ndarray):
            chosen = rows.copy()
        else:
            chosen = select_rows(self.bank, rows or RowsConfig(), "rows")
        chosen &= opened.usable(self.bank.keys())
        usable = np.flatnonzero(chosen)
        if not len(usable):
            raise TrainingError(
                "rows must have at least one that is valid for a target or a label, "
                "got none; see `teachonce info`"
            )
        self.num_rows = len(usable)
        blocks = usable // record.block_rows
        self._blocks, starts = np.unique(blocks, return_index=True)
        groups = np.split(usable - blocks * record.block_rows, starts[1:])
        self._offsets = dict(zip(self._blocks.tolist(), groups, strict=True))
        self._counts = np.asarray([len(one) for one in groups], np.int64)
        copies: Copies | None = None
        if opened.reader is not None:
            copies = _find_copies(self.bank, reading, shards, usable)
        self.sources: Mapping[str, TargetSource] = opened.sources
        self._maker = BatchMaker(self.bank, opened, copies, self._offsets, pin_memory)
        self._arguments: dict[str, Any] = {
            "bank": self.bank,
            "reading": reading,
            "batch": batch,
            "rows": chosen,
            "shards": shards,
            "view": view,
            "window_blocks": window_blocks,
            "seed": seed,
            "shuffle": shuffle,
            "keep_rest": keep_rest,
            "rank": rank,
            "world_size": world_size,
            "threads": threads,
            "prefetch": prefetch,
            "pin_memory": pin_memory,
        }
        # Too large a batch is said now, not when training begins.
        self.num_steps = self.order(0).num_steps

    def __reduce__(self) -> tuple[Any, ...]:
        # Locks and memory stay behind: another process makes its own.
        return _reopen, (self._arguments, self.epoch)

    def _views_shown(self) -> set[int]:
        if self._view != "epoch":
            return {self._view}
        count = self.bank.record.num_views
        return {0} if count == 1 else set(range(1, count))

    # What comes when.

    def order(self, epoch: int) -> EpochOrder:
        """Returns the order of an epoch's rows."""
        return EpochOrder(
            self._blocks,
            self._counts,
            batch=self._batch,
            lanes=self._window_blocks,
            seed=self._seed,
            epoch=epoch,
            shuffle=self._shuffle,
            keep_rest=self._keep_rest,
        )

    def _lanes(self, order: EpochOrder) -> range:
        """Returns the lanes of this rank and worker."""
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        consumers = self._world_size * count
        place = self._rank * count + number
        if order.num_lanes % consumers:
            raise TrainingError(
                "window_blocks (or the batch, if smaller) must be a multiple of ranks "
                f"x workers, got {order.num_lanes} for {self._world_size} x {count}"
            )
        share = order.num_lanes // consumers
        return range(place * share, (place + 1) * share)

    def view_at(self, block: int, epoch: int) -> int:
        """Returns which view of a block an epoch shows."""
        if self._view != "epoch":
            return self._view
        return view_of(block, epoch, self.bank.record.num_views, self._seed)

    # Iterating.

    def __iter__(self) -> Iterator[Batch]:
        return self.batches(self.epoch)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yields the batches of one epoch from a step on, in order.

        Raises:
            BankError: a block is missing or damaged; it is named.
            TrainingError: a sample is not the bank's, or cannot be read.
        """
        return self._run(epoch, first_step, endless=False)

    def stream(self, epoch: int = 0, first_step: int = 0) -> Iterator[Batch]:
        """Yields batches without end, epoch after epoch, reading ahead across them."""
        return self._run(epoch, first_step, endless=True)

    def _run(self, first_epoch: int, step: int, endless: bool) -> Iterator[Batch]:
        loads = ThreadPoolExecutor(self._threads, "load")
        work = ThreadPoolExecutor(self._threads, "make")
        lanes = len(self._lanes(self.order(0)))
        # Threads take from `upcoming`: it shares no iterator with the loop below.
        upcoming = self._upcoming(self._epochs(first_epoch, step, endless))
        parts = PartQueue(
            loads, upcoming, self._load, self._maker.unload, lanes + _AHEAD
        )
        pending: deque[Making] = deque()
        try:
            for epoch, order, start in self._epochs(first_epoch, step, endless):
                for number in range(start, order.num_steps):
                    pieces = self._pieces(epoch, number, order)
                    sizes = self.reading.sizes(self._seed, epoch, number)
                    pending.append(
                        self._maker.begin(epoch, number, sizes, pieces, parts, work)
                    )
                    if len(pending) > self._prefetch:
                        yield self._maker.finish(pending.popleft())
            while pending:
                yield self._maker.finish(pending.popleft())
        finally:
            parts.stop()
            work.shutdown(wait=False, cancel_futures=True)
            loads.shutdown(wait=True, cancel_futures=True)
            work.shutdown(wait=True)
            parts.close()

    def _epochs(
        self, first_epoch: int, first_step: int, endless: bool
    ) -> Iterator[tuple[int, EpochOrder, int]]:
        for epoch in itertools.count(first_epoch) if endless else [first_epoch]:
            yield epoch, self.order(epoch), first_step
            first_step = 0

    def _upcoming(
        self, epochs: Iterator[tuple[int, EpochOrder, int]]
    ) -> Iterator[tuple[PartKey, int]]:
        """Yields parts by the step that first needs them, as `PartQueue` asks."""
        for epoch, order, first_step in epochs:

            def keyed(
                lane: int,
                epoch: int = epoch,
                order: EpochOrder = order,
                start: int = first_step,
            ) -> Iterator[tuple[int, int, PartKey, int]]:
                quota = int(order.quotas[lane])
                for part in order.parts(lane, start):
                    key = PartKey(epoch, lane, part.block)
                    yield part.start // quota, lane, key, part.last - part.first

            lanes = (keyed(lane) for lane in self._lanes(order))
            for _, _, key, count in heapq.merge(*lanes, key=lambda one: one[:2]):
                yield key, count

    def _pieces(self, epoch: int, step: int, order: EpochOrder) -> list[Piece]:
        """Returns where the rows of this rank's batch come from."""
        found: list[Piece] = []
        slot = 0
        for lane in self._lanes(order):
            place, end = order.lane_span(lane, step)
            for part in order.parts(lane, step):
                if place >= end:
                    break
                last = min(part.start + part.last - part.first, end)
                usable = self._offsets[part.block]
                shuffled = order.rows_of(part.block, len(usable))
                begin = part.first + place - part.start
                offsets = usable[shuffled[begin : begin + last - place]]
                found.append(
                    Piece(
                        PartKey(epoch, lane, part.block),
                        self.view_at(part.block, epoch),
                        offsets,
                        slot,
                    )
                )
                slot += last - place
                place = last
        return found

    def _load(self, key: PartKey) -> LoadedPart:
        return self._maker.load(key.block, self.view_at(key.block, key.epoch))


def _find_copies(
    bank: Bank,
    reading: Reading,
    shards: Sequence[str] | None,
    rows: npt.NDArray[np.int64],
) -> Copies:
    """Returns where samples are read: the bank's own copies, or the shards.

    Raises:
        BankError, StorageError: they are not there; where shards are not and the bank
            could do without, the message says so.
    """
    if reading.stored:
        return StoredCopies(bank, list(reading.inputs), rows)
    try:
        return ShardCopies(bank, shards, rows)
    except (BankError, StorageError) as error:
        held = bank.stored_inputs
        if reading.maps or not reading.inputs or not reading.inputs.keys() <= set(held):
            raise
        raise type(error)(
            f"{error} (the bank holds copies of {', '.join(reading.inputs)}: with "
            "`data: {inputs: bank}` no shards are needed)"
        ) from error


def _reopen(arguments: dict[str, Any], epoch: int) -> BankDataset:
    dataset = BankDataset(**arguments)
    dataset.epoch = epoch
    return dataset


class _Shares(IterableDataset[Batch | TeachOnceError]):
    """A worker's share of every batch, without end.

    An error travels as a value: a loader would wrap it in its worker's traceback.
    """

    def __init__(self, dataset: BankDataset, epoch: int, step: int) -> None:
        super().__init__()
        self._dataset, self._start = dataset, (epoch, step)

    def __iter__(self) -> Iterator[Batch | TeachOnceError]:
        try:
            yield from self._dataset.stream(*self._start)
        except TeachOnceError as error:
            yield error


def _leave_signals_to_main(worker: int) -> None:
    """Makes a worker deaf to what a terminal or a scheduler sends to all processes.

    The main process hears it, finishes its step with the workers' help and ends them; a
    worker also ends by itself when its parent is gone.
    """
    del worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def bank_loader(
    dataset: BankDataset, workers: int, epoch: int = 0, step: int = 0
) -> Generator[Batch, None, None]:
    """Yields batches without end from a step on, made by processes or by threads.

    Args:
        dataset: what to read.
        workers: processes, each with its share of the lanes; 0 for threads alone.
        epoch, step: the first batch.

    Raises:
        BankError, TrainingError: as ``BankDataset.batches``.
    """
    if not workers:
        yield from dataset.stream(epoch, step)
        return
    loader: DataLoader[Batch | TeachOnceError] = DataLoader(
        _Shares(dataset, epoch, step),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2,
        worker_init_fn=_leave_signals_to_main,
        # Its seed is drawn from here, not from the generator that training goes by.
        generator=torch.Generator(),
    )
    shares: list[Batch] = []
    for share in loader:
        if isinstance(share, TeachOnceError):
            raise share
        shares.append(share)
        if len(shares) == workers:
            yield merge_batches(shares)
            shares = []
