"""Blocks on their way into batches: read ahead, shared by many tasks, given back.

A part is a run of one block's rows in a lane. Parts are loaded in the order in which
batches first need them and only a few lie in memory, so that what a run takes does not
grow with the dataset. Whoever takes a part waits for it; it is given back when the last
of its rows has been copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Executor, Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pipeline.bank.shard_copies import RowReader


@dataclass(frozen=True)
class PartKey:
    """Which part: a block comes again in another epoch, and where two lanes meet."""

    epoch: int
    lane: int
    block: int


class StoredRows(Protocol):
    """Rows of a block, to be copied from any thread."""

    def take(self, rows: npt.NDArray[np.int64], out: np.ndarray) -> None:
        """Copies rows of the block into ``out``, (n, ...)."""
        ...

    def close(self) -> None:
        """Lets go of them."""
        ...


class HeldRows:
    """Rows of a block that were decoded into memory of the loader's."""

    def __init__(self, values: np.ndarray, memory: BlockMemory) -> None:
        """Takes (block_rows, ...) values, and where their memory goes back to."""
        self._values, self._memory = values, memory

    def take(self, rows: npt.NDArray[np.int64], out: np.ndarray) -> None:
        """Copies rows of the block into ``out``, (n, ...)."""
        # Rows are inside by construction; any other mode copies twice.
        np.take(self._values, rows, axis=0, out=out, mode="clip")

    def close(self) -> None:
        """Gives the memory back."""
        self._memory.give_back(self._values)


@dataclass(eq=False)
class LoadedPart:
    """What was loaded of a part.

    Attributes:
        arrays: by (target, suffix), the block's rows as stored.
        rows: reads the samples of the block; None where no input is asked.
    """

    arrays: dict[tuple[str, str], StoredRows]
    rows: RowReader | None


class PartQueue:
    """Parts in the order of their first need, some of them loading or loaded."""

    def __init__(
        self,
        pool: Executor,
        upcoming: Iterator[tuple[PartKey, int]],
        load: Callable[[PartKey], LoadedPart],
        unload: Callable[[LoadedPart], None],
        resident: int,
    ) -> None:
        """Starts loading.

        Args:
            pool: whose threads load.
            upcoming: parts and how many of their rows will be used, ordered by their
                first need.
            load: reads a part.
            unload: takes back its memory.
            resident: parts that may be loading or loaded, at least one a lane.
        """
        self._pool, self._upcoming = pool, upcoming
        self._load, self._unload = load, unload
        self._futures: dict[PartKey, Future[LoadedPart]] = {}
        self._left: dict[PartKey, int] = {}
        self._changed = threading.Condition()
        self._stopped = False
        for _ in range(resident):
            self._start_next()

    def _start_next(self) -> None:
        with self._changed:
            following = None if self._stopped else next(self._upcoming, None)
            if following is None:
                return
            key, num_rows = following
            self._left[key] = num_rows
            self._futures[key] = self._pool.submit(self._load, key)
            self._changed.notify_all()

    def take(self, key: PartKey) -> LoadedPart:
        """Returns a loaded part, waiting for it; raises what its loading raised.

        With many threads a task may come before those that its part waits behind. It
        never waits for good: the earliest task that is not done has its part loading.

        Raises:
            CancelledError: the queue was stopped first.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or key in self._futures)
            future = self._futures.get(key)
        if future is None:
            raise CancelledError
        return future.result()

    def give_back(self, key: PartKey, num_rows: int) -> None:
        """Counts rows of a part as used; after the last of them the next one loads."""
        with self._changed:
            self._left[key] -= num_rows
            if self._left[key] > 0:
                return
            del self._left[key]
            future = self._futures.pop(key)
        self._unload(future.result())
        self._start_next()

    def stop(self) -> None:
        """Starts nothing more; whoever waits for what is not started is let go."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """Lets go of what is loaded; stopped, and the pools are done by now."""
        with self._changed:
            futures = list(self._futures.values())
            self._futures.clear()
        for future in futures:
            if future.done() and not future.cancelled() and not future.exception():
                self._unload(future.result())


class BlockMemory:
    """Arrays for whole blocks, given back when their part is."""

    def __init__(self) -> None:
        self._free: dict[tuple[tuple[int, ...], str], list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> np.ndarray:
        """Returns an array with anything in it."""
        with self._lock:
            held = self._free.get((shape, dtype.str))
            if held:
                return held.pop()
        return np.empty(shape, dtype)

    def give_back(self, array: np.ndarray) -> None:
        """Takes an array that nobody looks at any more."""
        with self._lock:
            key = (array.shape, array.dtype.str)
            self._free.setdefault(key, []).append(array)
