"""Moments against NumPy over the whole; the choice of chunks and cells as laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import BankError
from pipeline.bank.statistics import (
    Moments,
    angle_dispersion,
    choose_cells,
    choose_chunks,
    dead_channels,
    floored_std,
)


@settings(deadline=None)
@given(
    num=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    covariance=st.booleans(),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_merged_moments_are_those_of_the_whole(num, cuts, covariance, offset, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(num, 5)) * [1, 10, 0.1, 0, 3] + offset
    merged = Moments(5, covariance=covariance)
    for part in np.split(values, sorted(cuts)):
        moments = Moments(5, covariance=covariance)
        half = len(part) // 2
        moments.update(part[:half])
        moments.update(part[half:])
        merged.merge(moments)
    scale = 1 + offset
    assert merged.count == num
    np.testing.assert_allclose(merged.mean, values.mean(axis=0), atol=1e-9)
    np.testing.assert_allclose(
        merged.variance, values.var(axis=0), rtol=1e-9, atol=1e-9 * scale
    )
    units = values / np.linalg.norm(values, axis=1, keepdims=True)
    direction = units.mean(axis=0)
    np.testing.assert_allclose(
        merged.mean_direction, direction / np.linalg.norm(direction), atol=1e-9
    )
    arrays = merged.to_arrays(dispersion=0.5)
    assert arrays["count"] == num
    assert arrays["dispersion"] == 0.5
    if covariance:
        np.testing.assert_allclose(
            arrays["covariance"],
            np.cov(values, rowvar=False, bias=True),
            rtol=1e-9,
            atol=1e-9 * scale,
        )
    else:
        assert "covariance" not in arrays
        with pytest.raises(BankError, match="covariance must be asked for"):
            _ = merged.covariance


def test_order_and_values_fix_every_bit():
    values = np.random.default_rng(0).normal(size=(100, 7)).astype(np.float32)

    def run():
        moments = Moments(7, covariance=True)
        for part in np.split(values, 4):
            moments.update(part)
        return {name: array.tobytes() for name, array in moments.to_arrays(1).items()}

    assert run() == run()


def test_no_vectors_have_no_statistics():
    moments = Moments(3)
    moments.update(np.empty((0, 3), np.float32))
    moments.merge(Moments(3))
    arrays = moments.to_arrays()
    assert arrays.pop("count") == 0
    assert all(np.isnan(array).all() for array in arrays.values())


def test_vectors_of_length_zero_have_no_direction():
    moments = Moments(2)
    moments.update(np.array([[0, 0], [3, 4]]))
    np.testing.assert_allclose(moments.mean_direction, [0.6, 0.8])
    moments.update(np.array([[-3, -4]]))
    assert np.isnan(moments.mean_direction).all()


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (np.zeros((2, 4)), r"must be \(n, 3\), got \(2, 4\)"),
        (np.zeros(3), r"must be \(n, 3\)"),
        (np.array([[0, 1, np.nan]]), "must be finite"),
        (np.array([[0, 1, np.inf]]), "must be finite"),
    ],
)
def test_values_that_would_spoil_moments_are_refused(values, match):
    moments = Moments(3)
    with pytest.raises(BankError, match=match):
        moments.update(values)
    assert moments.count == 0


def test_moments_of_other_channels_do_not_merge():
    with pytest.raises(BankError, match="same channels"):
        Moments(3).merge(Moments(4))
    with pytest.raises(BankError, match="same channels"):
        Moments(3).merge(Moments(3, covariance=True))


def test_dispersion_is_the_mean_squared_angle():
    rng = np.random.default_rng(0)
    angles = rng.normal(size=500) * 0.7
    values = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(
        1, 9, (500, 1)
    )
    direction = np.array([1.0, 0.0])
    total = np.array(
        [angle_dispersion(part, direction) for part in np.split(values, 5)]
    )
    np.testing.assert_allclose(total[:, 0].sum(), (angles**2).sum(), rtol=1e-12)
    assert total[:, 1].sum() == 500


def test_dispersion_keeps_its_digits_at_small_and_large_angles():
    for angle in (1e-9, np.pi - 1e-9):
        vector = np.array([[np.cos(angle), np.sin(angle)]])
        squares, num = angle_dispersion(vector, np.array([1.0, 0.0]))
        assert num == 1
        np.testing.assert_allclose(np.sqrt(squares), angle, rtol=1e-9)
    assert angle_dispersion(np.zeros((3, 2)), np.array([1.0, 0.0])) == (0.0, 0)


def test_std_is_floored_by_the_outputs_median():
    variance = np.array([4.0, 4.0, 4.0, 1e-8, 0.0, 100.0, 4.0])
    np.testing.assert_allclose(floored_std(variance), [2, 2, 2, 0.02, 0.02, 10, 2])
    assert dead_channels(variance).tolist() == [3, 4]


def test_std_of_mostly_constant_channels_can_be_divided_by():
    variance = np.array([0.0, 0.0, 0.0, 4.0])
    np.testing.assert_allclose(floored_std(variance), [0.02, 0.02, 0.02, 2])
    assert dead_channels(variance).tolist() == [0, 1, 2]
    np.testing.assert_allclose(floored_std(np.zeros(3)), 1)
    assert dead_channels(np.zeros(3)).tolist() == [0, 1, 2]


@settings(max_examples=200, deadline=None)
@given(
    num_blocks=st.integers(1, 12),
    chunks=st.integers(1, 6),
    chunk_rows=st.integers(1, 8),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    limit=st.integers(1, 400),
    seed=st.integers(0, 20),
)
def test_chosen_chunks(num_blocks, chunks, chunk_rows, share, limit, seed):
    rng = np.random.default_rng(seed)
    valid = rng.random((num_blocks, chunks * chunk_rows)) < share
    chosen = choose_chunks(valid, chunk_rows, limit)
    counts = valid.reshape(num_blocks, chunks, chunk_rows).sum(axis=2)
    assert chosen.dtype == np.int64
    assert chosen.shape == (len(chosen), 2)
    flat = chosen[:, 0] * chunks + chosen[:, 1]
    assert (np.diff(flat) > 0).all()
    picked = counts[chosen[:, 0], chosen[:, 1]]
    assert (picked > 0).all()
    if valid.sum() <= limit:
        assert picked.sum() == valid.sum()
    elif share == 1:
        # Full chunks: as near to the limit as whole chunks come.
        assert abs(picked.sum() - limit) <= chunk_rows
    elif len(chosen):
        assert picked.sum() <= limit + 0.5 * counts.max() * (1 + len(chosen))


def test_chosen_chunks_are_spread_evenly():
    valid = np.ones((100, 40), np.bool_)
    chosen = choose_chunks(valid, 10, 500)
    assert len(chosen) == 50
    assert (np.diff(chosen[:, 0] * 4 + chosen[:, 1]) == 8).all()
    with pytest.raises(BankError, match="chunk_rows must divide 40, got 7"):
        choose_chunks(valid, 7, 500)


def test_cells_are_drawn_by_row_alone():
    rows = np.array([0, 5, 2**40, 6], np.int64)
    cells = choose_cells(rows, 196)
    assert cells.shape == (4, 64)
    assert (np.diff(cells, axis=1) > 0).all()
    assert cells.min() >= 0
    assert cells.max() < 196
    np.testing.assert_array_equal(choose_cells(rows[1:2], 196)[0], cells[1])
    assert len({row.tobytes() for row in cells}) == 4
    np.testing.assert_array_equal(choose_cells(rows, 5), np.tile(np.arange(5), (4, 1)))
    # Part of a bank's identity: may never change. From a SplitMix64 in plain ints.
    golden = [[52, 348, 475, 919]]
    assert choose_cells(np.array([7], np.int64), 1000, 4).tolist() == golden


def test_cells_are_drawn_fairly():
    counts = np.bincount(choose_cells(np.arange(4000), 100, 25).ravel(), minlength=100)
    # 1,000 each; five standard deviations of a draw without replacement.
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)
