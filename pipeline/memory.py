"""The engine's memory: one budget in bytes, and buffers that are used again.

Fresh pages cost far more than copying into used ones (measured 0.2-0.4 against 10 GB/s
where the host gives memory lazily), so block buffers are kept and handed out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque

import numpy as np

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Lets the C library keep what is freed for the next that asks (glibc).

    By default it gives every large piece back to the system and gets it anew, page by
    page, for each operator of each forward; keeping them took 6 % off a job of three
    teachers. Does nothing elsewhere.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


class Budget:
    """Bytes that may be in flight; first come, first served.

    A request larger than the whole budget is granted when nothing else is in flight, so
    that a large block is slow, not stuck.
    """

    def __init__(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        self.peak_bytes = 0
        self._used = 0
        self._queue: deque[object] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def acquire(self, size_bytes: int) -> bool:
        """Waits until ``size_bytes`` fit; returns False where the budget was closed."""
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            while not self._closed and not (
                self._queue[0] is ticket
                and (self._used == 0 or self._used + size_bytes <= self.total_bytes)
            ):
                self._changed.wait()
            self._queue.remove(ticket)
            if not self._closed:
                self._used += size_bytes
                self.peak_bytes = max(self.peak_bytes, self._used)
            self._changed.notify_all()
            return not self._closed

    def release(self, size_bytes: int) -> None:
        """Gives ``size_bytes`` back."""
        with self._changed:
            self._used -= size_bytes
            self._changed.notify_all()

    def close(self) -> None:
        """Wakes whoever waits, with a refusal."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class Buffers:
    """Arrays handed out and taken back by size; at most ``keep_bytes`` are kept."""

    def __init__(self, keep_bytes: int) -> None:
        self._keep = keep_bytes
        self._kept = 0
        self._free: dict[int, list[np.ndarray]] = {}
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Returns an array of that shape and dtype; its contents are arbitrary."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        with self._lock:
            stack = self._free.get(size)
            raw = stack.pop() if stack else None
            if raw is not None:
                self._kept -= size
        if raw is None:
            raw = np.empty(size, np.uint8)
        return raw.view(dtype).reshape(shape)

    def give(self, array: np.ndarray) -> None:
        """Takes an array back; the caller must not touch it again."""
        raw = array.reshape(-1).view(np.uint8)
        with self._lock:
            if self._kept + raw.nbytes <= self._keep:
                self._free.setdefault(raw.nbytes, []).append(raw)
                self._kept += raw.nbytes
