"""Which rows of a bank a selection means."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from manifests.errors import StorageError
from manifests.recipe import RowsConfig
from pipeline.bank.open import Bank
from student_train.errors import TrainingError
from student_train.selection import select_rows, shard_names
from tests.student_train.conftest import BLOCK_ROWS


@pytest.fixture(scope="module")
def bank(joined) -> Bank:
    return joined.open()


def chosen(bank, **fields):
    return np.flatnonzero(select_rows(bank, RowsConfig(**fields), "data.rows"))


def keys_of(bank, **fields):
    return set(bank.keys()[chosen(bank, **fields)].tolist())


def test_all_rows_but_padding(bank, joined):
    assert keys_of(bank) == set(joined.samples)
    assert len(chosen(bank)) == 25
    # A shard owns whole blocks: 11, 8 and 6 samples in blocks of 4.
    assert chosen(bank).tolist() == [*range(11), *range(12, 20), *range(20, 26)]


def test_names_of_shards(bank):
    rows = np.array([0, 11, 12, 19, 20, 27, 4])
    names = [f"train-{number}.tar" for number in (0, 0, 1, 1, 2, 2, 0)]
    assert shard_names(bank, rows) == names


@pytest.mark.parametrize(
    ("patterns", "numbers"),
    [
        (["train-1.tar"], "1"),
        (["train-[02].tar"], "02"),
        (["*-1*", "train-2.tar"], "12"),
        (["*", "nothing"], "012"),
    ],
)
def test_shards_by_pattern(bank, joined, patterns, numbers):
    expected = {key for key in joined.samples if key[1] in numbers}
    assert keys_of(bank, shards=patterns) == expected


def test_shards_that_are_retired_are_left_out(bank, joined):
    shards = [
        shard.model_copy(update={"retired": shard.name == "train-1.tar"})
        for shard in bank.record.shards
    ]
    record = bank.record.model_copy(update={"shards": shards})
    grown = Bank(bank._store, record)
    expected = {key for key in joined.samples if key[1] != "1"}
    assert keys_of(grown) == expected
    with pytest.raises(TrainingError, match=r"\.shards must match shards of the bank"):
        chosen(grown, shards=["train-1.tar"])


def test_keys_of_a_file(bank, tmp_path):
    path = tmp_path / "keys.txt"
    path.write_text("s0-0003\n\ntrain-1.tar\ts1-0002\n  s2-0005  \n")
    assert keys_of(bank, keys=str(path)) == {"s0-0003", "s1-0002", "s2-0005"}
    narrowed = keys_of(bank, keys=str(path), shards=["train-[01].tar"])
    assert narrowed == {"s0-0003", "s1-0002"}


@pytest.mark.parametrize("line", ["s9-0000", "train-0.tar\ts1-0002", "train-0.tar"])
def test_keys_that_the_bank_lacks(bank, tmp_path, line):
    path = tmp_path / "keys.txt"
    path.write_text(f"s0-0003\n{line}\nzzz\n")
    message = (
        rf"data\.rows\.keys must be keys of the bank, got {line!r} and 1 more that"
    )
    with pytest.raises(TrainingError, match=message.replace("\\t", "\\\\t")):
        chosen(bank, keys=str(path))


def test_a_file_of_keys_that_is_not_there(bank, tmp_path):
    with pytest.raises(StorageError, match="nothing is there; check the path"):
        chosen(bank, keys=str(tmp_path / "keys.txt"))


def place_of(shard: str, key: str) -> int:
    """The hash that says where in [0, 1) a sample lies."""
    digest = hashlib.blake2b(f"{shard}\0{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def places(joined):
    return {key: place_of(f"train-{key[1]}.tar", key) for key in joined.samples}


@pytest.mark.parametrize("edges", [(0, 0.5), (0.5, 1), (0.25, 0.75), (0.9, 1)])
def test_a_share_goes_by_shard_and_key(bank, joined, edges):
    low, high = edges
    expected = {k for k, at in places(joined).items() if low <= at / 2**64 < high}
    assert keys_of(bank, share=edges) == expected
    narrowed = {key for key in expected if key[1] != "1"}
    assert keys_of(bank, share=edges, shards=["train-[02].tar"]) == narrowed


def test_shares_split_the_rows(bank):
    parts = [chosen(bank, share=(i / 3, (i + 1) / 3)) for i in range(3)]
    together = np.concatenate(parts)
    assert len(together) == len(set(together)) == 25
    assert chosen(bank, share=(0, 1)).tolist() == chosen(bank).tolist()


def test_a_limit_takes_the_same_rows_of_every_bank(bank, joined):
    ordered = sorted(places(joined), key=places(joined).get)
    for limit in (1, 7, 25, 1000):
        assert keys_of(bank, limit=limit) == set(ordered[:limit])
    of_one = [key for key in ordered if key[1] == "2"]
    assert keys_of(bank, limit=3, shards=["train-2.tar"]) == set(of_one[:3])
    half = [key for key in ordered if places(joined)[key] >= 2**63]
    assert keys_of(bank, share=(0.5, 1), limit=2) == set(half[:2])


def test_selections_that_mean_nothing(bank):
    message = (
        r"data\.rows\.shards must match shards of the bank \(train-0\.tar, train-1\.tar"
        r", train-2\.tar, \.\.\.\), got \['val-\*'\]"
    )
    with pytest.raises(TrainingError, match=message):
        chosen(bank, shards=["val-*"])
    with pytest.raises(TrainingError, match=r"rows must mean at least one row"):
        chosen(bank, share=(0.0, 1e-6))
    assert bank.record.block_rows == BLOCK_ROWS
