"""Which samples are looked at: so many, each once, spread over everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.sample_plan.choice import NUM_RUNS, choose_runs


def rows_of(runs, sizes):
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [
        starts[run.shard] + run.first_row + row
        for run in runs
        for row in range(run.num_rows)
    ]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 200))
def test_rows_are_distinct_ascending_and_inside_their_shards(sizes, count):
    runs = choose_runs(sizes, count)
    assert all(run.first_row + run.num_rows <= sizes[run.shard] for run in runs)
    rows = rows_of(runs, sizes)
    assert len(rows) == min(count, sum(sizes))
    assert rows == sorted(set(rows))


@given(st.integers(100, 5000), st.integers(1, 99))
def test_no_stretch_of_the_dataset_is_left_out(size, count):
    sizes = [size // 3, size - size // 3]
    rows = rows_of(choose_runs(sizes, count), sizes)
    num_runs = min(NUM_RUNS, count)
    # A gap between runs is (rows not taken) / runs; half a one at either end.
    most = (size - count) / num_runs + 2
    gaps = [b - a for a, b in zip([-1, *rows], [*rows, size], strict=True)]
    assert max(gaps) <= most


def test_a_shard_without_samples_is_passed_over():
    assert rows_of(choose_runs([0, 3, 0, 2], 9), [0, 3, 0, 2]) == [0, 1, 2, 3, 4]
