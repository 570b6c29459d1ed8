"""How many rows a block has, and how many rows a forward pass takes.

Pure functions of row sizes and shard sizes; decided once, when the bank is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import ceil, lcm

from manifests.bank import MAX_BLOCK_ROWS

MAX_OBJECT_BYTES = 64 * 2**20
MAX_PADDING = 0.15
MAX_WORKING_BYTES = 512 * 2**20
DEFAULT_BATCH = 32
SMALLEST_DEFAULT_BATCH = 16
BATCH_WASTE = 0.03


def padding(block_rows: int, shard_sizes: Sequence[int]) -> float:
    """Returns the share of the sample axis that is padding."""
    # Shards of one size are counted together: there may be many thousands.
    counts = Counter(shard_sizes).items()
    total = sum(ceil(size / block_rows) * block_rows * count for size, count in counts)
    return 1 - sum(size * count for size, count in counts) / total if total else 0.0


def choose_batch(
    shard_sizes: Sequence[int],
    block_rows: int | None = None,
    row_working_bytes: int = 0,
) -> int:
    """Returns rows per forward where the job says none.

    That is 32, or the nearest below it whose last batches waste at most 3 % of the work
    on these shards; fewer where a forward's intermediate values would take more than
    512 MiB. The machine does not enter: a job's batch is part of its bank.

    Args:
        shard_sizes: samples of every shard.
        block_rows: rows of a block, where the bank has them already.
        row_working_bytes: memory of one row's intermediate values.
    """

    def waste(batch: int) -> float:
        padded = 0
        for size, count in Counter(shard_sizes).items():
            full, rest = divmod(size, block_rows) if block_rows else (0, size)
            forwards = full * ceil((block_rows or 0) / batch) + ceil(rest / batch)
            padded += forwards * batch * count
        return 1 - sum(shard_sizes) / padded if padded else 0.0

    largest = max(shard_sizes, default=1) or 1
    if block_rows is not None:
        largest = min(largest, block_rows)
    fitting = max(1, MAX_WORKING_BYTES // max(1, row_working_bytes))
    high = min(DEFAULT_BATCH, largest, fitting)
    candidates = range(high, min(SMALLEST_DEFAULT_BATCH, high) - 1, -1)
    for batch in candidates:
        if waste(batch) <= BATCH_WASTE:
            return batch
    return min(candidates, key=lambda batch: (waste(batch), -batch))


def choose_block_rows(
    largest_row_bytes: int, shard_sizes: Sequence[int], batches: Sequence[int]
) -> int:
    """Returns the rows of a block: DESIGN section 3, rule 2.

    The largest multiple of the batches whose largest output is at most 64 MiB and whose
    padding over the shards is at most 15 %, never more than the largest shard needs.
    Where no multiple does (few samples, huge rows), the size that pads least.

    Args:
        largest_row_bytes: bytes of one row and view of the largest array.
        shard_sizes: samples of every shard.
        batches: rows per forward of every teacher.
    """
    sizes = [size for size in shard_sizes if size > 0] or [1]
    unit = lcm(*batches) if batches else 1
    by_bytes = max(1, MAX_OBJECT_BYTES // max(largest_row_bytes, 1))
    by_bytes = min(by_bytes, MAX_BLOCK_ROWS)
    needed = ceil(max(sizes) / unit) * unit
    multiples = range(unit, min(by_bytes, needed) + 1, unit)
    # Exactly 15 % is allowed, whatever floating point makes of it.
    most = MAX_PADDING + 1e-9
    fitting = [rows for rows in multiples if padding(rows, sizes) <= most]
    if fitting:
        return fitting[-1]
    candidates: list[int] = [*multiples, *range(1, min(by_bytes, max(sizes)) + 1)]
    _, rows = min((round(padding(rows, sizes), 2), -rows) for rows in candidates)
    return -rows
