"""What a plan costs: rows, blocks, bytes, objects and memory, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifests.bank import BankRecord, OutputEntry
from manifests.storage import Store
from pipeline import sizing
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.encoding import STORED_DTYPE
from pipeline.bank.layout import level_path
from pipeline.errors import PipelineError
from pipeline.plan import Plan
from pipeline.work_items import num_lanes


@dataclass(frozen=True)
class Estimate:
    """What a plan costs, from shapes alone."""

    shards: int
    samples: int
    rows: int
    block_rows: int
    padding: float
    blocks_to_do: int
    objects_to_do: int
    bytes_to_do: int
    bytes_by_output: dict[str, int]
    block_bytes: int
    working_bytes: int
    parameter_bytes: int
    flops: float


def output_row_bytes(output: OutputEntry) -> int:
    """Returns stored bytes of one row and view, before any codec."""
    return sum(ArraySpec.from_json(data).row_bytes for data in output.arrays)


def block_bytes(record: BankRecord, pass_ids: Sequence[str]) -> int:
    """Returns the memory of one block in flight: inputs, outputs, encoded copy."""
    row = 0
    for name in pass_ids:
        entry = record.pass_by_id(name)
        outputs = sum(
            math.prod(output.shape) * np.dtype(STORED_DTYPE[output.dtype]).itemsize
            + output_row_bytes(output)
            for output in entry.outputs
        )
        row += len(entry.views) * (entry.input_bytes + outputs)
    return row * record.block_rows


def lane_bytes(record: BankRecord, pass_ids: Sequence[str]) -> int:
    """Returns the memory that one forward lane takes for intermediate values."""
    passes = (record.pass_by_id(name) for name in pass_ids)
    return max((entry.working_bytes for entry in passes), default=0)


def estimate(plan: Plan) -> Estimate:
    """Returns rows, blocks, bytes, objects and memory of a plan."""
    record = plan.record
    live = [shard for shard in record.shards if not shard.retired]
    rows_in = {}
    for shard in live:
        for number in range(shard.blocks):
            left = shard.samples - number * record.block_rows
            rows_in[shard.first_block + number] = min(record.block_rows, left)
    by_output: dict[str, int] = {}
    objects = total_blocks = 0
    flops = 0.0
    for name, missing in plan.missing_blocks().items():
        entry = record.pass_by_id(name)
        rows = sum(rows_in[block] for block in missing)
        total_blocks += len(missing)
        flops += rows * entry.flops_per_row
        if not entry.outputs:
            objects += len(missing)
        for output in entry.outputs:
            folder = f"{level_path(entry, output.size)}/{output.name}"
            stored = rows * output_row_bytes(output) * len(entry.views)
            by_output[folder] = by_output.get(folder, 0) + stored
            objects += len(missing) * len(entry.views) * len(output.arrays)
    teachers = {
        entry.teacher: entry
        for entry in record.passes
        if entry.outputs and entry.id in plan.wanted
    }
    samples = sum(shard.samples for shard in live)
    engine = plan.job.engine
    inside = lane_bytes(record, plan.passes_to_do)
    return Estimate(
        shards=len(live),
        samples=samples,
        rows=record.num_rows,
        block_rows=record.block_rows,
        padding=sizing.padding(record.block_rows, [shard.samples for shard in live]),
        blocks_to_do=total_blocks,
        objects_to_do=objects,
        bytes_to_do=sum(by_output.values()),
        bytes_by_output=by_output,
        block_bytes=block_bytes(record, plan.passes_to_do),
        working_bytes=inside * num_lanes(engine.device, engine, inside),
        parameter_bytes=sum(
            int(entry.provenance["facts"]["parameter_bytes"])
            for entry in teachers.values()
        ),
        flops=flops,
    )


def check_limits(plan: Plan, numbers: Estimate, store: Store) -> None:
    """Raises PipelineError where the plan exceeds its limits or the disk."""
    limit = plan.job.limits.max_bytes
    if limit is not None and numbers.bytes_to_do > limit:
        raise PipelineError(
            f"limits.max_bytes is {limit:,}, the job may write {numbers.bytes_to_do:,} "
            "bytes before compression; raise it, pool grids or drop outputs"
        )
    free = store.free_bytes()
    if free is not None and numbers.bytes_to_do > free:
        raise PipelineError(
            f"bank {store.url}: no space: the job may write {numbers.bytes_to_do:,} "
            f"bytes and {free:,} are free; free some or put the bank elsewhere"
        )
