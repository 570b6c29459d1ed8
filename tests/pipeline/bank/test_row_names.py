"""Lists of keys, and shares of rows by a hash of shard and key."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import BankError
from pipeline.bank.row_names import KeyList, lies_in, row_places

KEYS = [f"key-{number}" for number in range(2000)]


def test_places_are_the_hash_that_the_documents_tell():
    word = hashlib.blake2b(b"a.tar\0key-1", digest_size=8).digest()
    assert row_places("a.tar", KEYS)[1] == int.from_bytes(word, "little")
    word = hashlib.blake2b(b"7\0a.tar\0key-1", digest_size=8).digest()
    assert row_places("a.tar", KEYS, 7)[1] == int.from_bytes(word, "little")


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 3))
def test_a_smaller_share_is_part_of_a_larger_one(first, second, seed):
    small, large = sorted((first, second))
    places = row_places("a.tar", KEYS, seed)
    few, many = (lies_in(places, 0.0, share) for share in (small, large))
    assert not (few & ~many).any()
    # Five deviations of a binomial.
    for found, share in ((few, small), (many, large)):
        assert (
            abs(found.sum() - 2000 * share)
            <= 5 * (2000 * share * (1 - share)) ** 0.5 + 1
        )


def test_shares_next_to_each_other_are_all_rows_once():
    places = row_places("a.tar", KEYS)
    parts = [lies_in(places, *edges) for edges in ((0.0, 0.3), (0.3, 0.9), (0.9, 1.0))]
    assert (np.sum(parts, axis=0) == 1).all()
    seeds = [lies_in(row_places("a.tar", KEYS, seed), 0.0, 0.5) for seed in (0, 1)]
    assert (seeds[0] != seeds[1]).any()


def test_a_list_names_rows_by_key_or_by_shard_and_key(tmp_path):
    path = tmp_path / "keys.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nx.tar\tb\n\n a \nnowhere\n")
    keys = KeyList.read(str(path))
    assert keys.matches("x.tar", ["a", "b", "c"]).tolist() == [True, True, False]
    assert keys.matches("y.tar", ["a", "b", "c"]).tolist() == [True, False, False]
    assert keys.unmet() == ["nowhere"]
    assert keys.ambiguous() == [("a", ["x.tar", "y.tar"])]
    assert keys.sha256 == KeyList(["nowhere", "a", "x.tar\tb"], "").sha256
    assert keys.sha256 != KeyList(["nowhere", "a", "y.tar\tb"], "").sha256
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(BankError, match="keys must be UTF-8 text"):
        KeyList.read(str(path))
