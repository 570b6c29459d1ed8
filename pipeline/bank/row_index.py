"""``index/``: a Parquet line per row, in parts; and Parquet that checks itself.

What finalise writes into it is its own business; this owns where parts lie and how they
are read, so that a damaged or missing one is refused.
"""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store

INDEX_PART_ROWS = 2**20
# What Arrow raises at Parquet that is not what it should be.
TABLE_FAULTS = (pa.ArrowException, OSError, ValueError, OverflowError)


def encode_table(table: pa.Table) -> bytes:
    """Returns Parquet bytes whose pages carry checksums."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def decode_table(
    data: bytes, where: str, hint: str, schema: pa.Schema | None = None
) -> pa.Table:
    """Returns the table of Parquet bytes, each page checked.

    Args:
        data: the whole file.
        where: what it is, for the message.
        hint: what to do if it is damaged.
        schema: columns that it must have, of these types.

    Raises:
        BankError: they are damaged, or hold another table.
    """
    try:
        file = pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True)
        check_table(file.schema_arrow, schema)
        table = file.read()
        # Arrow takes the word of a file for its lengths until it is asked to check.
        table.validate(full=True)
    except TABLE_FAULTS as error:
        told = str(error)[:300]
        raise BankError(f"{where} is damaged ({told}); {hint}") from error
    return table


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
