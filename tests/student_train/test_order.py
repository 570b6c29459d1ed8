"""The order of an epoch: every row once, by (seed, epoch) alone, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from student_train.errors import TrainingError
from student_train.order import (
    EpochOrder,
    Part,
    block_order,
    draw_size,
    row_order,
    view_of,
)

counts = st.lists(st.integers(1, 9), min_size=1, max_size=12)
seeds = st.integers(0, 2**64 - 1)


def make(counts, batch, lanes, seed=0, epoch=0, **options):
    """The order of blocks that are numbered 0, 3, 6, ... in the bank."""
    blocks = 3 * np.arange(len(counts), dtype=np.int64)
    return EpochOrder(
        blocks,
        np.asarray(counts, np.int64),
        batch=batch,
        lanes=lanes,
        seed=seed,
        epoch=epoch,
        **options,
    )


def lane_rows(order: EpochOrder, lane: int, counts, step: int = 0):
    """(block, row of the block) of a lane from a step on, by its parts alone."""
    found = []
    for part in order.parts(lane, step):
        shuffled = order.rows_of(part.block, counts[part.block // 3])
        found += [(part.block, row) for row in shuffled[part.first : part.last]]
    return found


def batches(order: EpochOrder, counts):
    """(block, row) of every batch, lane after lane."""
    lanes = [lane_rows(order, lane, counts) for lane in range(order.num_lanes)]
    for step in range(order.num_steps):
        batch = []
        for lane, rows in enumerate(lanes):
            first, last = order.lane_span(lane, step)
            batch += rows[first:last]
        yield batch


@given(counts, st.integers(1, 40), st.integers(1, 12), seeds, st.booleans())
def test_every_row_once_but_for_the_rest(counts, batch, lanes, seed, shuffle):
    total = sum(counts)
    everything = {(3 * b, row) for b, n in enumerate(counts) for row in range(n)}
    kept = make(counts, batch, lanes, seed, shuffle=shuffle, keep_rest=True)
    given = list(batches(kept, counts))
    rows = [row for one in given for row in one]
    assert len(rows) == total
    assert set(rows) == everything
    assert [len(one) for one in given[:-1]] == [batch] * (len(given) - 1)
    assert kept.num_steps == len(given) == -(-total // batch)
    if batch > total:
        with pytest.raises(TrainingError, match=rf"got {batch} of {total}; take a sma"):
            make(counts, batch, lanes, seed)
        return
    full = make(counts, batch, lanes, seed, shuffle=shuffle)
    dropped = list(batches(full, counts))
    assert [len(one) for one in dropped] == [batch] * (total // batch)
    assert len({row for one in dropped for row in one}) == total // batch * batch


@given(counts, st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), seeds)
def test_it_depends_on_its_arguments_alone(counts, batch, lanes, epoch, seed):
    one, other = (
        make(counts, batch, lanes, seed, epoch, keep_rest=True) for _ in range(2)
    )
    np.random.default_rng().random()
    assert list(batches(one, counts)) == list(batches(other, counts))


def test_epochs_and_seeds_differ():
    counts = [5] * 20
    orders = {
        str(list(batches(make(counts, 10, 4, seed, epoch), counts)))
        for seed in range(5)
        for epoch in range(5)
    }
    assert len(orders) == 25


@given(counts, st.integers(1, 12), st.integers(1, 4), st.booleans())
def test_lanes_are_equally_long_and_give_equal_quotas(counts, lanes, share, keep):
    if lanes * share > sum(counts):
        return
    order = make(counts, lanes * share, lanes, keep_rest=keep)
    assert order.quotas.tolist() == [share] * lanes
    lengths = [len(lane_rows(order, lane, counts)) for lane in range(lanes)]
    full = sum(counts) // (lanes * share) * share
    rest = sum(counts) % (lanes * share) if keep else 0
    assert sum(lengths) == full * lanes + rest
    # The rest goes round the lanes.
    assert lengths == [full + (rest + lanes - 1 - i) // lanes for i in range(lanes)]


@given(counts, st.integers(1, 40), st.integers(1, 40))
def test_quotas_differ_by_one_at_most(counts, batch, lanes):
    order = make(counts, batch, lanes, keep_rest=True)
    assert order.num_lanes == min(batch, lanes)
    assert order.quotas.sum() == batch
    assert order.quotas.max() - order.quotas.min() <= 1
    assert order.quotas.min() >= 1


@given(counts, st.integers(1, 20), st.integers(1, 8), st.booleans(), st.data())
def test_parts_from_a_step_on_are_the_end_of_all_parts(
    counts, batch, lanes, keep, data
):
    if batch > sum(counts) and not keep:
        return
    order = make(counts, batch, lanes, keep_rest=keep)
    step = data.draw(st.integers(0, order.num_steps))
    for lane in range(order.num_lanes):
        whole = lane_rows(order, lane, counts)
        start = order.lane_span(lane, step)[0]
        assert lane_rows(order, lane, counts, step) == whole[start:]
        places = [part.start for part in order.parts(lane, step)]
        assert places == sorted(set(places))
        if places:
            assert places[0] == start
        # A block is one part of a lane: nobody reads it twice.
        blocks = [part.block for part in order.parts(lane)]
        assert len(blocks) == len(set(blocks))


def test_the_banks_own_order():
    counts = [3, 2, 4]
    order = make(counts, 4, 8, shuffle=False, keep_rest=True)
    assert order.num_lanes == 1
    assert list(batches(order, counts)) == [
        [(0, 0), (0, 1), (0, 2), (3, 0)],
        [(3, 1), (6, 0), (6, 1), (6, 2)],
        [(6, 3)],
    ]


@given(st.integers(0, 300), seeds, st.integers(0, 2**32), st.integers(0, 2**32))
def test_permutations(count, seed, epoch, block):
    assert sorted(block_order(count, seed, epoch)) == list(range(count))
    assert sorted(row_order(count, seed, epoch, block)) == list(range(count))


def test_an_order_is_uniform():
    """Every place is as likely: chi-squared over 9 places stays below its 99.9 %."""
    first = [int(row_order(10, 1, epoch, 4)[0]) for epoch in range(5000)]
    expected = 500
    found = np.bincount(first, minlength=10)
    assert ((found - expected) ** 2 / expected).sum() < 27.9


@given(st.integers(0, 10**6), st.integers(2, 9), seeds, st.integers(0, 50))
def test_random_views_take_turns(block, num_views, seed, epoch):
    num_random = num_views - 1
    shown = [view_of(block, epoch + i, num_views, seed) for i in range(num_random)]
    assert sorted(shown) == list(range(1, num_views))
    assert view_of(block, epoch + num_random, num_views, seed) == shown[0]


def test_view_0_only_where_there_is_no_other():
    assert {view_of(block, 3, 1, 0) for block in range(50)} == {0}
    # An epoch shows all of them: blocks start at different views.
    assert {view_of(block, 3, 5, 0) for block in range(50)} == {1, 2, 3, 4}


def test_sizes_are_all_drawn():
    drawn = [draw_size(3, 0, 0, step) for step in range(3000)]
    assert np.bincount(drawn).min() > 900
    assert drawn == [draw_size(3, 0, 0, step) for step in range(3000)]
    assert drawn != [draw_size(3, 0, 1, step) for step in range(3000)]


def test_the_order_never_changes_by_accident():
    """Runs that resume under a newer version go on in the order they began with."""
    assert block_order(8, 0, 0).tolist() == GOLDEN_BLOCKS[0]
    assert block_order(8, 0, 1).tolist() == GOLDEN_BLOCKS[1]
    assert block_order(8, 2**63, 5).tolist() == GOLDEN_BLOCKS[2]
    assert row_order(8, 0, 0, 0).tolist() == GOLDEN_ROWS[0]
    assert row_order(8, 3, 2, 1).tolist() == GOLDEN_ROWS[1]
    assert [view_of(block, 0, 4, 0) for block in range(8)] == GOLDEN_VIEWS[0]
    assert [view_of(2, epoch, 4, 9) for epoch in range(6)] == GOLDEN_VIEWS[1]
    assert [draw_size(3, 0, 0, step) for step in range(8)] == GOLDEN_SIZES
    order = EpochOrder(
        np.array([0, 1, 3, 4, 9]),
        np.array([4, 4, 3, 4, 2]),
        batch=6,
        lanes=3,
        seed=5,
        epoch=2,
    )
    assert [list(order.parts(lane)) for lane in range(3)] == GOLDEN_PARTS


GOLDEN_BLOCKS = [
    [0, 2, 1, 5, 4, 3, 6, 7],
    [5, 3, 7, 2, 4, 1, 0, 6],
    [6, 0, 5, 7, 2, 4, 3, 1],
]
GOLDEN_ROWS = [[1, 2, 3, 5, 0, 4, 7, 6], [5, 6, 7, 4, 0, 3, 2, 1]]
GOLDEN_VIEWS = [[2, 2, 1, 1, 2, 1, 3, 3], [3, 1, 2, 3, 1, 2]]
GOLDEN_SIZES = [0, 2, 1, 1, 2, 0, 2, 2]
GOLDEN_PARTS = [
    [Part(lane=0, block=4, first=0, last=4, start=0)],
    [
        Part(lane=1, block=3, first=0, last=3, start=0),
        Part(lane=1, block=1, first=0, last=1, start=3),
    ],
    [
        Part(lane=2, block=1, first=1, last=4, start=0),
        Part(lane=2, block=0, first=0, last=1, start=3),
    ],
]
