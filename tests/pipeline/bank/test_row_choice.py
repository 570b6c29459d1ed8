"""How many rows a block of a part has."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.teacher import OutputConfig
from pipeline.bank.encodings import make_encoding
from pipeline.bank.row_choice import part_block_rows
from tests.pipeline.bank.test_selection import entry, output, record


def bank(block_rows, channels):
    """A bank of one output of so many float32 channels."""
    made = make_encoding(
        OutputConfig(), name="cls", kind="vector", shape=(channels,), dtype="float32"
    )
    arrays = tuple(one.to_json() for one in made.arrays("net/image/8x8", block_rows))
    held = output("cls", kind="vector").model_copy(update={"arrays": arrays})
    return record(block_rows=block_rows, passes=(entry("net", "image", held),))


def rows_of(*sizes):
    return {str(number): np.arange(size) for number, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((10, 10, 10), 10),  # what a shard needs
        ((500, 499), 128),  # never more than the source's
        ((40, 25), 25),  # 40 pads 19 %, 25 pads 13 %
        ((7,), 7),
        ((1, 1, 100), 25),  # all pad too much: a quarter, not less
    ],
)
def test_blocks_are_as_long_as_padding_allows(sizes, expected):
    assert part_block_rows(bank(128, 4), rows_of(*sizes)) == expected


def test_chunks_stay_as_long_as_they_were():
    # 4 MiB take 16 rows of 64 Ki channels.
    whole = bank(128, 2**16)
    assert part_block_rows(whole, rows_of(101, 99)) == 112
    assert part_block_rows(whole, rows_of(9, 7)) == 9


@given(st.integers(1, 64), st.lists(st.integers(1, 300), min_size=1, max_size=8))
def test_it_is_a_length_that_a_bank_can_have(block_rows, sizes):
    found = part_block_rows(bank(block_rows, 4), rows_of(*sizes))
    most = min(block_rows, max(sizes))
    assert most / 4 <= found <= most
