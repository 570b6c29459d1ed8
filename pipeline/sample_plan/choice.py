"""Which samples a plan is measured on: a pure function of how long the shards are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_RUNS = 16


@dataclass(frozen=True)
class Run:
    """Consecutive rows of one shard."""

    shard: int
    first_row: int
    num_rows: int


def choose_runs(sizes: Sequence[int], count: int) -> list[Run]:
    """Returns ``count`` rows, spread evenly over all shards, as runs of neighbours.

    About sixteen runs with equal gaps: neighbours share a chunk in the bank too, and
    may be alike (frames of one drive), which a codec sees; places far apart say what
    the whole is like.

    Args:
        sizes: samples of every shard.
        count: rows wanted; all where there are no more.
    """
    total = sum(sizes)
    count = min(count, total)
    num_runs = min(NUM_RUNS, count)
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + size)
    found = []
    shard = 0
    for number in range(num_runs):
        before = number * count // num_runs
        length = (number + 1) * count // num_runs - before
        # Half a gap before the first run and behind the last.
        first = before + (2 * number + 1) * (total - count) // (2 * num_runs)
        while length:
            while first >= starts[shard + 1]:
                shard += 1
            rows = min(length, starts[shard + 1] - first)
            found.append(Run(shard, first - starts[shard], rows))
            first, length = first + rows, length - rows
    return found
