"""In which order rows are learned from: a pure function of (seed, epoch).

An epoch is one sequence of rows: blocks in a random order, the rows of each block in a
random order. The sequence is cut into ``window_blocks`` *lanes* of equal length that
are read side by side; every batch takes its share from each lane. So a batch mixes rows
of as many blocks as there are lanes, a block is read once and whole, and memory is one
block a lane whatever the dataset. A rank or a worker takes some of the lanes: nobody
reads what another reads, all make equally many steps, and who takes which lane changes
nothing about what a batch holds.

Random numbers are raw words of a counter-based generator, so that NumPy's own shuffling
may change without changing the order. Source: Salmon et al., Parallel Random Numbers:
As Easy as 1, 2, 3 (SC 2011).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.bank.statistics import mixed_bits
from student_train.errors import TrainingError

Int64s = npt.NDArray[np.int64]

_KEPT_BLOCKS = 2

_BLOCKS, _ROWS, _VIEWS, _STEPS, _DRAWS, _RANKS = range(6)


def _words(
    seed: int, epoch: int, stream: int, number: int, count: int
) -> npt.NDArray[np.uint64]:
    """Returns random words that depend on the arguments alone."""
    # As words: NumPy makes floats of a list with a number of 2**63 and more.
    key = np.array([seed, epoch], np.uint64)
    counter = np.array([0, 0, stream, number], np.uint64)
    bits = np.random.Philox(key=key, counter=counter)
    words: npt.NDArray[np.uint64] = bits.random_raw(count)
    return words


def _permutation(words: npt.NDArray[np.uint64]) -> Int64s:
    return np.argsort(words, kind="stable").astype(np.int64)


def block_order(num_blocks: int, seed: int, epoch: int) -> Int64s:
    """Returns a permutation of ``num_blocks`` that depends on (seed, epoch) alone."""
    return _permutation(_words(seed, epoch, _BLOCKS, 0, num_blocks))


def row_order(num_rows: int, seed: int, epoch: int, block: int) -> Int64s:
    """Returns a permutation of a block's rows, by (seed, epoch, block) alone."""
    return _permutation(_words(seed, epoch, _ROWS, block, num_rows))


def view_of(block: int, epoch: int, num_views: int, seed: int) -> int:
    """Returns which view of a block an epoch shows: each random one in turn.

    Blocks start at different views, so that an epoch shows all of them. View 0, the
    evaluation view, is shown only where there is no other.

    Args:
        block: number of the block.
        epoch: number of the epoch.
        num_views: of the bank, view 0 included.
        seed: of the order.
    """
    if num_views == 1:
        return 0
    start = int(_words(seed, 0, _VIEWS, block, 1)[0] % np.uint64(num_views - 1))
    return 1 + (start + epoch) % (num_views - 1)


def draw_size(num_sizes: int, seed: int, stage: int, step: int) -> int:
    """Returns which of several input sizes a step has, by (seed, stage, step) alone."""
    return int(_words(seed, stage, _STEPS, step, 1)[0] % np.uint64(num_sizes))


def rank_seed(seed: int, step: int, rank: int) -> int:
    """Returns where a rank's dropout starts, by (seed, step, rank) alone."""
    return int(_words(seed, step, _RANKS, rank, 1)[0] >> np.uint64(1))


def row_draws(
    seed: int, epoch: int, step: int, rows: Int64s, count: int
) -> npt.NDArray[np.float64]:
    """Returns ``count`` uniform draws in [0, 1) for each row of a batch: (count, B).

    A row's draws depend on (seed, epoch, step) and its number alone, whoever holds it
    and wherever it stands in the batch.

    Args:
        seed: of the draws.
        epoch, step: which batch.
        rows: (B,) numbers of rows in the bank.
        count: draws of each row.
    """
    keys = _words(seed, epoch, _DRAWS, step, count)
    words = mixed_bits(mixed_bits(rows.astype(np.uint64)) ^ keys[:, None])
    # 53 bits are what a float64 holds.
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class Part:
    """A run of one block's shuffled rows in a lane.

    Attributes:
        lane: it belongs to.
        block: number of the block in the bank.
        first, last: which of the block's shuffled rows, [first, last).
        start: place of the first of them in the lane.
    """

    lane: int
    block: int
    first: int
    last: int
    start: int


class EpochOrder:
    """The rows of one epoch, by lane and step.

    Attributes:
        num_steps: batches of the epoch; all full, but the last where ``keep_rest``.
        quotas: (lanes,) rows that each lane gives to a full batch.
    """

    def __init__(
        self,
        blocks: Int64s,
        counts: Int64s,
        *,
        batch: int,
        lanes: int,
        seed: int,
        epoch: int,
        shuffle: bool = True,
        keep_rest: bool = False,
    ) -> None:
        """Makes the order.

        Args:
            blocks: (n,) numbers of the blocks with usable rows, ascending.
            counts: (n,) usable rows of each.
            batch: rows of a batch, over all ranks.
            lanes: blocks that a batch draws from; fewer where the batch is smaller.
            seed: of the order.
            epoch: of the order.
            shuffle: False for the bank's own order (then in one lane).
            keep_rest: whether the last, smaller batch is kept.

        Raises:
            TrainingError: there are fewer rows than a batch.
        """
        num_rows = int(counts.sum())
        if num_rows < 1 or (num_rows < batch and not keep_rest):
            raise TrainingError(
                f"batch must be at most the usable rows, got {batch} of {num_rows}; "
                "take a smaller batch or more rows"
            )
        self._seed, self._epoch, self._shuffle = seed, epoch, shuffle
        self._shuffled: dict[int, Int64s] = {}
        lanes = min(lanes, batch) if shuffle else 1
        order = (
            block_order(len(blocks), seed, epoch)
            if shuffle
            else np.arange(len(blocks), dtype=np.int64)
        )
        self._blocks, self._counts = blocks[order], counts[order]
        self._ends = np.cumsum(self._counts)
        num_full, rest = divmod(num_rows, batch)
        slots = np.bincount(np.arange(batch) % lanes, minlength=lanes)
        self.quotas: Int64s = slots.astype(np.int64)
        lengths = num_full * self.quotas
        if keep_rest and rest:
            lengths = lengths + np.bincount(np.arange(rest) % lanes, minlength=lanes)
        self.num_steps = num_full + bool(keep_rest and rest)
        # A lane is a stretch of the one sequence of rows.
        self._lane_ends = np.cumsum(lengths)
        self._lane_starts = self._lane_ends - lengths

    @property
    def num_lanes(self) -> int:
        """Number of lanes."""
        return len(self.quotas)

    def rows_of(self, block: int, num_rows: int) -> Int64s:
        """Returns the shuffled places of a block's usable rows among themselves."""
        if not self._shuffle:
            return np.arange(num_rows, dtype=np.int64)
        # A lane asks for the same block in many steps.
        if block not in self._shuffled:
            if len(self._shuffled) > _KEPT_BLOCKS * self.num_lanes:
                del self._shuffled[next(iter(self._shuffled))]
            found = row_order(num_rows, self._seed, self._epoch, block)
            self._shuffled[block] = found
        return self._shuffled[block]

    def lane_span(self, lane: int, step: int) -> tuple[int, int]:
        """Returns which places of a lane a step takes, [first, last)."""
        length = int(self._lane_ends[lane] - self._lane_starts[lane])
        quota = int(self.quotas[lane])
        return min(step * quota, length), min((step + 1) * quota, length)

    def parts(self, lane: int, first_step: int = 0) -> Iterator[Part]:
        """Yields the runs of blocks of a lane from a step on, in order."""
        begin = int(self._lane_starts[lane])
        end = int(self._lane_ends[lane])
        place = begin + self.lane_span(lane, first_step)[0]
        number = int(np.searchsorted(self._ends, place, side="right"))
        while place < end:
            block_end = int(self._ends[number])
            block_start = block_end - int(self._counts[number])
            last = min(block_end, end)
            yield Part(
                lane,
                int(self._blocks[number]),
                place - block_start,
                last - block_start,
                place - begin,
            )
            place, number = last, number + 1
