"""Work items: every missing block exactly once, in runs that a worker can take."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from manifests.bank import BankRecord, PassEntry, ShardEntry
from manifests.job import EngineConfig
from pipeline.plan import Plan
from pipeline.samples.shards import ShardRow
from pipeline.shard_table import ShardChanges
from pipeline.work_items import item_blocks, num_lanes, num_threads, work_items

PASSES = ("rows", "a.image", "b.image")


def shard_entry(
    number: int, samples: int, rows: int, first: int, **more: Any
) -> ShardEntry:
    return ShardEntry(
        name=f"{number}.tar",
        url=f"/data/{number}.tar",
        size_bytes=1,
        headers_sha256="",
        samples=samples,
        part="part-00000",
        first_block=first,
        blocks=-(-samples // rows),
        **more,
    )


def pass_entry(name: str) -> PassEntry:
    return PassEntry(
        id=name,
        teacher=name.split(".")[0],
        inputs=("image",),
        teacher_fingerprint="",
        fingerprint="",
    )


def rows_of(shard: ShardEntry) -> list[ShardRow]:
    """Rows with a gap behind each; every seventh is refused."""
    return [
        ShardRow(
            f"{shard.name}-{row}", 1000 * row, 900, "why: so" if row % 7 == 3 else None
        )
        for row in range(shard.samples)
    ]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    block_rows = draw(st.integers(1, 9))
    shards, first = [], 0
    for number, samples in enumerate(draw(st.lists(st.integers(0, 60), max_size=5))):
        entry = shard_entry(
            number,
            samples,
            block_rows,
            first,
            sequential=draw(st.booleans()),
            retired=draw(st.integers(0, 4)) == 0,
        )
        shards.append(entry)
        first += entry.blocks
    blocks = st.frozensets(st.integers(0, max(first - 1, 0)))
    record = BankRecord(
        created_by="",
        dataset={},
        job={},
        inputs={},
        labels={},
        views={},
        num_views=1,
        block_rows=block_rows,
        shards=tuple(shards),
        passes=tuple(pass_entry(name) for name in PASSES),
    )
    return Plan(
        job=None,  # type: ignore[arg-type]
        existing=record,
        record=record,
        changes=ShardChanges(),
        new_passes=(),
        wanted=PASSES,
        committed={name: draw(blocks) for name in PASSES if draw(st.booleans())},
    )


@given(plans(), st.integers(1, 5))
def test_every_missing_block_of_every_pass_exactly_once(plan, longest):
    planned = [
        (name, span.block)
        for item in work_items(plan, rows_of, longest)
        for span in item.blocks
        for name in item.passes
    ]
    expected = {
        (name, block)
        for shard in plan.record.shards
        if not shard.retired
        for block in range(shard.first_block, shard.first_block + shard.blocks)
        for name in PASSES
        if block not in plan.committed.get(name, ())
    }
    assert len(planned) == len(set(planned))
    assert set(planned) == expected
    missing = {(name, b) for name, held in plan.missing_blocks().items() for b in held}
    assert missing == expected


@given(plans(), st.integers(1, 5))
def test_runs_are_consecutive_blocks_of_one_shard_that_lack_the_same(plan, longest):
    shards = {shard.name: shard for shard in plan.record.shards}
    lacking = {
        block: tuple(name for name in PASSES if block in plan.missing_blocks()[name])
        for block in range(plan.record.num_blocks)
    }
    for item in work_items(plan, rows_of, longest):
        shard = shards[item.shard]
        numbers = [span.block for span in item.blocks]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] >= shard.first_block
        assert numbers[-1] < shard.first_block + shard.blocks
        assert {lacking[number] for number in numbers} == {item.passes}
        assert item.sequential == shard.sequential
        assert item.url == shard.url
        assert shard.sequential or len(numbers) <= longest


@given(plans(), st.integers(1, 5))
def test_spans_say_where_their_rows_lie(plan, longest):
    shards = {shard.name: shard for shard in plan.record.shards}
    for item in work_items(plan, rows_of, longest):
        shard = shards[item.shard]
        rows = rows_of(shard)
        for span in item.blocks:
            assert span.first_row == (span.block - shard.first_block) * (
                plan.record.block_rows
            )
            left = shard.samples - span.first_row
            assert span.num_rows == min(plan.record.block_rows, left) > 0
            held = rows[span.first_row : span.first_row + span.num_rows]
            assert (span.start, span.end) == (held[0].offset, held[-1].offset + 900)
            assert span.first_key == held[0].key
        first, last = item.blocks[0], item.blocks[-1]
        covered = range(first.first_row, last.first_row + last.num_rows)
        assert item.num_rows == len(covered)
        assert item.refused == {row: "why: so" for row in covered if row % 7 == 3}


@given(plans())
def test_a_shard_read_from_its_start_is_one_item_where_nothing_is_done(plan):
    fresh = Plan(**{**vars(plan), "committed": {}})
    items = list(work_items(fresh, rows_of, 1))
    for shard in plan.record.shards:
        if shard.sequential and not shard.retired and shard.blocks:
            assert [item.shard for item in items].count(shard.name) == 1


def test_the_end_of_a_span_is_that_of_its_farthest_row():
    """Samples may be interleaved: the last row need not end last."""
    shard = shard_entry(0, 3, 3, 0)
    record = SimpleNamespace(block_rows=3, shards=[shard], num_views=1)
    plan: Any = SimpleNamespace(record=record, missing_blocks=lambda: {"rows": [0]})
    rows = [ShardRow("a", 0, 5000, None), ShardRow("b", 1000, 10, None)]
    rows.append(ShardRow("c", 2000, 10, None))
    (item,) = work_items(plan, lambda shard: rows, 9)
    assert (item.blocks[0].start, item.blocks[0].end) == (0, 5000)


@given(st.floats(0, 1e15), st.integers(1, 10_000), st.integers(1, 64))
def test_an_item_has_a_block_and_no_more_than_two_minutes_work(flops, rows, threads):
    record = SimpleNamespace(block_rows=rows, num_views=1)
    plan: Any = SimpleNamespace(flops_per_row=flops, record=record)
    for device, rate in (("cpu", 4e10 * threads), ("cuda:0", 3e13)):
        blocks = item_blocks(plan, device, threads)
        assert blocks >= 1
        seconds = blocks * rows * (flops / rate + 1 / 200)
        assert blocks == 1 or seconds <= 120.001


def test_threads_are_those_of_the_job_or_of_the_machine():
    assert num_threads(EngineConfig(threads=3)) == 3
    assert num_threads(EngineConfig()) >= 1


def test_lanes_leave_half_the_budget_to_blocks():
    config = EngineConfig(threads=8, memory=2**30)
    assert num_lanes("cpu", config, lane_bytes=2**20) == 8
    assert num_lanes("cpu", config, lane_bytes=200 * 2**20) == 2
    assert num_lanes("cpu", config, lane_bytes=2**32) == 1
    assert num_lanes("cuda", config, lane_bytes=2**20) == 1
