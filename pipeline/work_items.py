"""Work items: the missing blocks of a plan in runs of about two minutes.

Pure functions from a plan to Beam's elements; every missing block is planned once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from manifests.bank import BlockSpan, ShardEntry, WorkItem
from manifests.job import EngineConfig
from pipeline.plan import Plan
from pipeline.samples.shards import ShardRow

ITEM_SECONDS = 120.0
# Deliberately low rates: an item that ends early costs nothing, a long one is a tail.
CPU_FLOPS_PER_CORE = 4e10
CUDA_FLOPS = 3e13
DECODE_ROWS_PER_SECOND = 200.0


def num_threads(config: EngineConfig) -> int:
    """Returns the threads to work with: the job's, or the cores there are for us."""
    return config.threads or len(os.sched_getaffinity(0))


def num_lanes(device: str, config: EngineConfig, lane_bytes: int) -> int:
    """Returns an engine's forward lanes.

    One on an accelerator; on a CPU one a core, fewer where what happens inside models
    would take more than half the budget.

    Args:
        device: what the engine runs on.
        config: its threads and budget.
        lane_bytes: memory of one forward's intermediate values.
    """
    if device.startswith("cuda"):
        return 1
    fitting = config.memory // 2 // max(1, lane_bytes)
    return max(1, min(num_threads(config), fitting))


def item_blocks(plan: Plan, device: str, threads: int) -> int:
    """Returns the blocks of a work item planned for about two minutes."""
    rate = CUDA_FLOPS if device.startswith("cuda") else CPU_FLOPS_PER_CORE * threads
    seconds = plan.flops_per_row / rate + plan.record.num_views / DECODE_ROWS_PER_SECOND
    return max(1, int(ITEM_SECONDS / (seconds * plan.record.block_rows)))


def work_items(
    plan: Plan,
    rows_of: Callable[[ShardEntry], Sequence[ShardRow]],
    blocks_per_item: int,
) -> Iterator[WorkItem]:
    """Yields every missing block exactly once, in runs of consecutive blocks.

    Blocks of a run lack the same passes. A shard that must be read from its start is
    one item. Longest items first is the reader's business, which sees them all.

    Args:
        plan: what is missing.
        rows_of: the index rows of a shard.
        blocks_per_item: the longest run.
    """
    lacking: dict[int, list[str]] = {}
    for name, missing in plan.missing_blocks().items():
        for block in missing:
            lacking.setdefault(block, []).append(name)
    size = plan.record.block_rows
    for shard in plan.record.shards:
        todo = [block for block in shard.block_numbers if block in lacking]
        if not todo:
            continue
        rows = rows_of(shard)
        runs: list[list[int]] = []
        for block in todo:
            grows = (
                runs
                and runs[-1][-1] == block - 1
                and lacking[block] == lacking[runs[-1][0]]
                and (shard.sequential or len(runs[-1]) < blocks_per_item)
            )
            if grows:
                runs[-1].append(block)
            else:
                runs.append([block])
        for run in runs:
            spans = []
            for block in run:
                first = (block - shard.first_block) * size
                held = rows[first : first + size]
                spans.append(
                    BlockSpan(
                        block=block,
                        first_row=first,
                        num_rows=len(held),
                        start=held[0].offset,
                        end=max(row.offset + row.size for row in held),
                        first_key=held[0].key,
                    )
                )
            end = spans[-1].first_row + spans[-1].num_rows
            yield WorkItem(
                shard=shard.name,
                url=shard.url,
                sequential=shard.sequential,
                passes=tuple(lacking[run[0]]),
                blocks=tuple(spans),
                refused={
                    row: str(rows[row].refused)
                    for row in range(spans[0].first_row, end)
                    if rows[row].refused
                },
            )
