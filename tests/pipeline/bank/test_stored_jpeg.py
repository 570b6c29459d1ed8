"""The encoding ``jpeg``: what is stored of copies, and the end of each found again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import BankError
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.stored_jpeg import StoredJpeg, jpeg_of

ENCODING = StoredJpeg(name="jpeg", kind="image", shape=(40,), dtype="uint8")


@given(st.binary(max_size=60), st.integers(1, 255), st.integers(0, 30))
def test_the_end_is_the_last_byte_that_is_not_zero(data, last, room):
    whole = data + bytes([last])
    row = np.frombuffer(whole + bytes(room), np.uint8)
    assert jpeg_of(row) == whole


@pytest.mark.parametrize("length", [0, 3, 8, 13])
def test_all_zeros_are_no_jpeg(length):
    assert jpeg_of(np.zeros(length, np.uint8)) == b""


def test_rows_are_split_into_quality_and_bytes():
    values = np.zeros((4, 41), np.uint8)
    for row, (quality, data) in enumerate(
        [(90, b"\xff\xd8\xffone\xff\xd9"), (0, b""), (55, b"\xff\xd8\xffx\xff\xd9")]
    ):
        values[row, 0] = quality
        values[row, 1 : 1 + len(data)] = np.frombuffer(data, np.uint8)
    values[3] = 7
    before = values.copy()
    usable = np.array([True, True, True, False])
    found = ENCODING.encode(values, usable, reuse=True)
    assert found.refused == {1: "over_capacity"}
    assert found.arrays["_quality"].tolist() == [90, 0, 55, 0]
    assert [jpeg_of(row) for row in found.arrays[""]] == [
        b"\xff\xd8\xffone\xff\xd9",
        b"",
        b"\xff\xd8\xffx\xff\xd9",
        b"",
    ]
    # They are the block's prepared rows: an encoding that is asked again needs them.
    assert np.array_equal(values, before)


def test_arrays_are_of_samples_and_have_no_view():
    jpeg, quality = ENCODING.arrays("stored_inputs/cam/native", 8)
    assert (jpeg.row_shape, quality.row_shape) == ((40,), ())
    assert not jpeg.has_view
    assert not quality.has_view
    assert encoding_from_json(ENCODING.to_json()) == ENCODING


def test_copies_are_no_features():
    arrays = {"": np.zeros((2, 40), np.uint8), "_quality": np.zeros(2, np.uint8)}
    with pytest.raises(BankError, match=r"holds copies of an input, not features"):
        ENCODING.decode(arrays)
    with pytest.raises(BankError, match=r"values of jpeg must be uint8 \(2, 41\)"):
        ENCODING.encode(np.zeros((2, 40), np.uint8), np.ones(2, np.bool_))
