"""Targets: an order that hangs on (seed, epoch) alone, values standardised."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import BankError
from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from student_train.targets import block_order, iter_targets, standardise

PATH = "net/image/16x16/patch"


@given(st.integers(0, 300), st.integers(0, 2**32), st.integers(0, 1000))
def test_order_is_a_permutation(num_blocks, seed, epoch):
    order = block_order(num_blocks, seed, epoch)
    assert sorted(order) == list(range(num_blocks))


def test_order_does_not_change_between_versions():
    assert block_order(8, seed=0, epoch=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert block_order(8, seed=0, epoch=1).tolist() != block_order(8, 0, 0).tolist()


def test_standardise_floors_dead_channels():
    values = np.array([[1.0, 5.0, 5.0], [3.0, 5.0, 7.0]])
    out = standardise(values, values.mean(0), values.var(0))
    # std is 1, 0, 1: the dead channel is divided by 0.01 times the median, not by 0.
    np.testing.assert_allclose(out, [[-1, 0, -1], [1, 0, 1]], atol=1e-6)


def test_every_valid_row_once_with_its_key(make_shards, make_job, tmp_path):
    make_shards([11, 8, 3])
    precompute(load_job(str(make_job())), quiet=True)
    bank = open_bank(str(tmp_path / "bank"))
    blocks = list(iter_targets(bank, PATH, seed=3, epoch=2))
    rows = np.concatenate([block.rows for block in blocks])
    assert sorted(rows) == np.flatnonzero(bank.validity(PATH)).tolist()
    assert [block.rows[0] // 8 for block in blocks] == block_order(4, 3, 2).tolist()
    keys = bank.keys()
    for block in blocks:
        assert list(block.keys) == [keys[row] for row in block.rows]
    values = np.concatenate([block.values for block in blocks])
    flat = values.reshape(-1, values.shape[-1])
    np.testing.assert_allclose(flat.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(flat.std(0), 1, atol=1e-3)
    raw = next(iter_targets(bank, PATH, seed=3, epoch=2, normalise=False))
    first = int(raw.rows[0]) // 8
    inside = bank.validity(PATH)[first * 8 : first * 8 + 8]
    np.testing.assert_array_equal(raw.values, bank.read(PATH, first)[inside])


def test_a_missing_object_is_named(make_shards, make_job, tmp_path):
    make_shards([11])
    precompute(load_job(str(make_job())), quiet=True)
    path = tmp_path / "bank" / "features.zarr" / PATH / "c.1.0.0.0.0"
    path.unlink()
    bank = open_bank(str(tmp_path / "bank"))
    with pytest.raises(BankError, match=f"{PATH}, block 1, view 0"):
        list(iter_targets(bank, PATH))
