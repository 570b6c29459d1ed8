"""Parts: few in memory, in order, given back, and nobody waits for good."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest

from student_train.parts import BlockMemory, LoadedPart, PartKey, PartQueue


class Shelf:
    """Loads parts that say their block, and counts what is loaded at a time."""

    def __init__(self):
        self.lock = threading.Lock()
        self.loaded, self.unloaded, self.most = [], [], 0

    def load(self, key):
        if key.block == 13:
            raise OSError("no block 13")
        with self.lock:
            self.loaded.append(key.block)
            self.most = max(self.most, len(self.loaded) - len(self.unloaded))
        return LoadedPart({("x", ""): np.array([key.block])}, None)

    def unload(self, part):
        with self.lock:
            self.unloaded.append(int(part.arrays["x", ""][0]))


def queue_of(shelf, pool, blocks, resident, rows=2):
    upcoming = ((PartKey(0, 0, block), rows) for block in blocks)
    return PartQueue(pool, upcoming, shelf.load, shelf.unload, resident)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as one:
        yield one


def test_parts_come_in_order_and_few_at_a_time(pool):
    shelf = Shelf()
    parts = queue_of(shelf, pool, range(10), resident=3)
    for block in range(10):
        key = PartKey(0, 0, block)
        for _ in range(2):
            assert parts.take(key).arrays["x", ""].tolist() == [block]
            parts.give_back(key, 1)
    parts.stop()
    parts.close()
    assert sorted(shelf.loaded) == shelf.unloaded == list(range(10))
    assert shelf.most <= 3


def test_who_comes_early_waits(pool):
    """A task whose part is not loading yet, for those before it are not given back."""
    shelf = Shelf()
    parts = queue_of(shelf, pool, range(4), resident=1)
    with ThreadPoolExecutor(1) as other:
        early = other.submit(parts.take, PartKey(0, 0, 3))
        for block in range(3):
            assert not early.done()
            parts.take(PartKey(0, 0, block))
            parts.give_back(PartKey(0, 0, block), 2)
        assert early.result(10).arrays["x", ""].tolist() == [3]
    parts.stop()
    parts.close()
    assert shelf.unloaded == [0, 1, 2, 3]


def test_stopping_lets_those_who_wait_go(pool):
    shelf = Shelf()
    parts = queue_of(shelf, pool, range(4), resident=1)
    with ThreadPoolExecutor(1) as other:
        early = other.submit(parts.take, PartKey(0, 0, 3))
        parts.take(PartKey(0, 0, 0))
        parts.stop()
        with pytest.raises(CancelledError):
            early.result(10)
    parts.give_back(PartKey(0, 0, 0), 2)
    assert shelf.loaded == [0]
    parts.close()


def test_what_loading_raised_is_raised(pool):
    shelf = Shelf()
    parts = queue_of(shelf, pool, [13, 14], resident=2)
    with pytest.raises(OSError, match="no block 13"):
        parts.take(PartKey(0, 0, 13))
    parts.take(PartKey(0, 0, 14))
    parts.stop()
    parts.close()
    assert shelf.unloaded == [14]


def test_memory_of_blocks_is_used_again():
    memory = BlockMemory()
    first = memory.take((4, 3), np.dtype(np.uint16))
    assert memory.take((4, 3), np.dtype(np.uint16)) is not first
    memory.give_back(first)
    assert memory.take((4, 3), np.dtype(np.uint8)) is not first
    assert memory.take((4, 3), np.dtype(np.uint16)) is first
