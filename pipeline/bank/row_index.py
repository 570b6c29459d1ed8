"""``index/``: a Parquet line per row, in parts; and Parquet that checks itself.

What finalise writes into it is its own business; this owns where parts lie and how they
are read, so that a damaged or missing one is refused.

Parquet checks its pages, but not its footer, which says what the pages are. So eight
bytes of a mark and the crc32c of all other bytes lie between the last page and the
footer, where no reader looks: offsets are those of pages, and the footer is found from
the end.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from crc32c import crc32c

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store

INDEX_PART_ROWS = 2**20
# What Arrow raises at Parquet that is not what it should be.
TABLE_FAULTS = (pa.ArrowException, OSError, ValueError, OverflowError)
_MARK = b"\0crc32c\0"
_CRC_BYTES = 4
# Length of the footer, and the magic behind it.
_TAIL_BYTES = 8
# Told in the footer as well: a wrong bit in the mark must not make it go unnoticed.
_METADATA = {"teachonce.crc32c": "in front of the footer"}


def encode_table(table: pa.Table) -> bytes:
    """Returns Parquet bytes whose pages carry checksums."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def describe_checksum(schema: pa.Schema) -> pa.Schema:
    """Returns a schema whose footer says that the file carries its own crc32c."""
    found: pa.Schema = schema.with_metadata({**(schema.metadata or {}), **_METADATA})
    return found


def with_table_checksum(data: bytes) -> bytes:
    """Returns Parquet bytes that carry the crc32c of all of themselves.

    Args:
        data: a whole file, whose schema is from ``describe_checksum``.
    """
    start = _footer_start(data)
    crc: int = crc32c(data[start:], crc32c(data[:start]))
    trailer = _MARK + crc.to_bytes(_CRC_BYTES, "little")
    return data[:start] + trailer + data[start:]


def matches_table_checksum(data: bytes) -> bool:
    """Returns whether Parquet bytes are what was written, as far as they tell.

    True for a file without a crc32c of its own: an earlier version wrote it.
    """
    start = _footer_start(data)
    end = start - _CRC_BYTES
    begin = end - len(_MARK)
    if begin >= 0 and data[begin:end] == _MARK:
        told = int.from_bytes(data[end:start], "little")
        return bool(crc32c(data[start:], crc32c(data[:begin])) == told)
    return not any(mark in data for mark in (_MARK, *map(str.encode, _METADATA)))


def _footer_start(data: bytes) -> int:
    footer = int.from_bytes(data[-_TAIL_BYTES:-4], "little")
    return len(data) - _TAIL_BYTES - footer


def encode_checked_table(table: pa.Table) -> bytes:
    """Returns Parquet bytes that carry the crc32c of all of themselves."""
    schema = describe_checksum(table.schema)
    return with_table_checksum(
        encode_table(table.replace_schema_metadata(schema.metadata))
    )


def decode_table(
    data: bytes,
    where: str,
    hint: str,
    schema: pa.Schema | None = None,
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Returns the table of Parquet bytes, every byte checked where they tell how.

    Args:
        data: the whole file.
        where: what it is, for the message.
        hint: what to do if it is damaged.
        schema: columns that it must have, of these types.
        columns: those to read; all where omitted.

    Raises:
        BankError: they are damaged, or hold another table.
    """
    file = open_checked(data, where, hint)
    try:
        check_table(file.schema_arrow, schema)
        # Arrow's pool of threads may end a process at exit with an abort, or never
        # (github.com/apache/arrow/issues/34314 and 50482; measured: 1 verify of 15).
        table = file.read(columns, use_threads=False)
        # Arrow takes the word of a file for its lengths until it is asked to check.
        table.validate(full=True)
    except TABLE_FAULTS as error:
        told = str(error)[:300]
        raise BankError(f"{where} is damaged ({told}); {hint}") from error
    return table


def open_checked(data: bytes, where: str, hint: str) -> pq.ParquetFile:
    """Returns a Parquet file, every byte checked where it tells how, else its pages.

    Args:
        data: the whole file.
        where: what it is, for the message.
        hint: what to do if it is damaged.

    Raises:
        BankError: it is damaged.
    """
    if not matches_table_checksum(data):
        raise BankError(f"{where} does not match its own crc32c; {hint}")
    try:
        buffer = pa.BufferReader(data)
        return pq.ParquetFile(buffer, page_checksum_verification=True)
    except TABLE_FAULTS as error:
        told = str(error)[:300]
        raise BankError(f"{where} is damaged ({told}); {hint}") from error


def check_table(found: pa.Schema, wanted: pa.Schema | None) -> None:
    """Raises ValueError unless a table has the columns that are wanted of it."""
    for field in wanted or ():
        if found.names.count(field.name) != 1:
            raise ValueError(f"it has no column {field.name!r}")
        if found.field(field.name).type != field.type:
            raise ValueError(
                f"column {field.name!r} is {found.field(field.name).type}, it must be "
                f"{field.type}"
            )


def index_path(part: int) -> str:
    """Returns where a part of the index lies; each has 2**20 rows of the axis."""
    return f"index/part-{part:05d}.parquet"


def num_index_parts(record: BankRecord) -> int:
    """Returns the number of parts of the index of a finalised bank."""
    return -(-max(record.num_rows, 1) // INDEX_PART_ROWS)


def read_index_part(store: Store, part: int) -> pa.Table:
    """Returns one part of the index of a finalised bank.

    Raises:
        BankError: it is missing or damaged.
    """
    path = index_path(part)
    data = store.read_or_none(path)
    hint = "make it anew with `teachonce finalise BANK`"
    if data is None:
        raise BankError(f"{store.url_of(path)} is missing; {hint}")
    return decode_table(data, store.url_of(path), hint)
