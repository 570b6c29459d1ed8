"""Parquet that checks all of itself, its footer too, and that any reader reads."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.errors import BankError
from pipeline.bank.row_index import decode_table, encode_checked_table, encode_table

TABLE = pa.table(
    {"key": ["a", "b", "c"], "row": [0, 1, 2], "valid": [True, None, False]}
)


def test_a_stock_reader_reads_it():
    data = encode_checked_table(TABLE)
    assert pq.read_table(io.BytesIO(data)).equals(TABLE)
    assert decode_table(data, "here", "mend it").equals(TABLE)


def test_every_wrong_bit_is_found():
    data = encode_checked_table(TABLE)
    for byte in range(len(data)):
        wrong = bytearray(data)
        wrong[byte] ^= 1 << (byte % 8)
        with pytest.raises(BankError, match=r"here.*mend it"):
            decode_table(bytes(wrong), "here", "mend it")


def test_every_cut_is_found():
    data = encode_checked_table(TABLE)
    for size in range(0, len(data), 7):
        with pytest.raises(BankError, match=r"here.*mend it"):
            decode_table(data[:size], "here", "mend it")


def test_a_file_of_before_is_read():
    assert decode_table(encode_table(TABLE), "here", "mend it").equals(TABLE)


def test_a_column_that_is_not_there_is_refused():
    data = encode_checked_table(TABLE)
    wanted = pa.schema([*TABLE.schema, ("weight", pa.float64())])
    with pytest.raises(BankError, match="has no column 'weight'"):
        decode_table(data, "here", "mend it", wanted, wanted.names)
