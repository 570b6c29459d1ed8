"""Rows of a block and of a forward: DESIGN section 3, rule 2, as laws and as cases."""

from __future__ import annotations

from math import ceil, lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sizing import choose_batch, choose_block_rows, padding

MIB = 2**20
CLS = 768 * 4
PATCH_VIT_B = 14 * 14 * 768 * 4
PATCH_SAM = 64 * 64 * 256 * 4

SHARDS = st.lists(st.integers(0, 3000), min_size=1, max_size=30)
BATCHES = st.lists(st.sampled_from([1, 4, 8, 16, 24, 31, 32, 64]), max_size=3)
ROW_BYTES = st.integers(1, 200 * MIB)


def axis(rows: int, shards: list[int]) -> int:
    return sum(-(-size // rows) * rows for size in shards)


@given(st.integers(1, 500), SHARDS)
def test_padding_is_the_share_of_rows_that_no_sample_has(rows, shards):
    expected = 1 - sum(shards) / axis(rows, shards) if any(shards) else 0
    assert padding(rows, shards) == pytest.approx(expected)


@given(ROW_BYTES, SHARDS, BATCHES)
def test_an_object_is_at_most_64_mib_unless_one_row_is_more(row_bytes, shards, batches):
    rows = choose_block_rows(row_bytes, shards, batches)
    assert rows == 1 or rows * row_bytes <= 64 * MIB


@given(ROW_BYTES, SHARDS, BATCHES)
def test_a_block_is_never_more_than_the_largest_shard_needs(row_bytes, shards, batches):
    rows = choose_block_rows(row_bytes, shards, batches)
    unit = lcm(*batches) if batches else 1
    assert 1 <= rows <= ceil(max([*shards, 1]) / unit) * unit


@given(ROW_BYTES, SHARDS, BATCHES)
def test_padding_is_at_most_15_percent(row_bytes, shards, batches):
    rows = choose_block_rows(row_bytes, shards, batches)
    assert axis(rows, shards) - sum(shards) <= 0.15 * axis(rows, shards) + 1e-9


@given(ROW_BYTES, SHARDS, BATCHES)
def test_it_is_the_largest_multiple_of_the_batch_that_will_do(
    row_bytes, shards, batches
):
    rows = choose_block_rows(row_bytes, shards, batches)
    unit = lcm(*batches) if batches else 1
    most = min(64 * MIB // row_bytes, ceil(max([*shards, 1]) / unit) * unit)
    will_do = [
        multiple
        for multiple in range(unit, most + 1, unit)
        if axis(multiple, shards) * 85 <= sum(shards) * 100 or not any(shards)
    ]
    if will_do and any(shards):
        assert rows == will_do[-1]


@pytest.mark.parametrize(
    ("row_bytes", "shards", "batches", "expected"),
    [
        # 1000-sample shards, class tokens only: one block a shard, 2.3 % padding.
        (CLS, [1000] * 128, [32], 1024),
        # With a batch that divides: no padding.
        (CLS, [1000] * 128, [25], 1000),
        # ViT-B patch tokens in float32 take 588 KiB a row: 111 rows are 64 MiB.
        (PATCH_VIT_B, [1000] * 128, [25], 100),
        (PATCH_VIT_B, [1000] * 128, [32], 96),
        # SAM's 64 x 64 x 256 map is 4 MiB a row.
        (PATCH_SAM, [1000] * 128, [4], 16),
        (PATCH_SAM, [1000] * 128, [16], 16),
        # A batch that does not fit 64 MiB gives way to what pads least.
        (PATCH_SAM, [1000] * 128, [32], 15),
        # A row of more than 64 MiB is a block.
        (65 * MIB, [10], [8], 1),
        # Few samples: no more rows than there are, no batch padded.
        (CLS, [3], [3], 3),
        (CLS, [100], [32], 100),
        (CLS, [100] * 50, [25], 100),
        (CLS, [3, 1000], [20], 100),
        # Nothing at all.
        (CLS, [0, 0], [32], 1),
        (CLS, [], [], 1),
    ],
)
def test_literal_cases(row_bytes, shards, batches, expected):
    assert choose_block_rows(row_bytes, shards, batches) == expected


def forwards(shards: list[int], batch: int, block_rows: int | None) -> int:
    """Forward passes, counted block by block."""
    count = 0
    for size in shards:
        step = block_rows or max(size, 1)
        for start in range(0, size, step):
            count += -(-min(step, size - start) // batch)
    return count


@given(SHARDS, st.none() | st.integers(1, 300))
def test_a_batch_wastes_little_or_the_least_there_is(shards, block_rows):
    batch = choose_batch(shards, block_rows)
    largest = (
        max([*shards, 1]) if block_rows is None else min(max([*shards, 1]), block_rows)
    )
    assert 1 <= batch <= min(32, largest)
    assert batch >= min(16, largest)
    if not any(shards):
        return

    def waste(one: int) -> float:
        return 1 - sum(shards) / (forwards(shards, one, block_rows) * one)

    candidates = range(min(16, largest), min(32, largest) + 1)
    if waste(batch) > 0.03:
        assert waste(batch) == pytest.approx(min(map(waste, candidates)))
    else:
        assert all(waste(one) > 0.03 for one in candidates if one > batch)


@pytest.mark.parametrize(
    ("shards", "block_rows", "expected"),
    [
        ([1000] * 4, None, 32),
        ([1024] * 4, 128, 32),
        ([100], None, 25),
        ([3], None, 3),
        ([0], None, 1),
        ([], None, 1),
        ([1000], 8, 8),
    ],
)
def test_literal_batches(shards, block_rows, expected):
    assert choose_batch(shards, block_rows) == expected


def test_many_shards_are_sized_in_no_time():
    shards = [1000 + number % 7 for number in range(100_000)]
    rows = choose_block_rows(CLS, shards, [choose_batch(shards)])
    assert padding(rows, shards) <= 0.15


def test_a_batch_is_small_where_models_take_much_memory():
    """SAM at 1024 x 1024 takes 1.7 GB a row inside its global attention."""
    assert choose_batch([1000], row_working_bytes=1_700 * 2**20) == 1
    assert choose_batch([1000], row_working_bytes=100 * 2**20) == 5
    assert choose_batch([1000], row_working_bytes=2**20) == choose_batch([1000])
