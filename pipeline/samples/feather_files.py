"""Sweeps in ``.feather`` files (Argoverse 2): columns of an Arrow table, by name.

A Feather file of version 2 is an Arrow IPC file: a stream of messages between two
magics. The messages are read in order, and the size that each compressed buffer
declares is summed before any is decompressed: Arrow itself takes what a file asks for.

Source: Arrow columnar format, "Serialization and Interprocess Communication", and its
``Message.fbs``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from pipeline.samples.errors import SampleError
from pipeline.samples.point_columns import Columns, check_bounds, check_names

_MAGIC = b"ARROW1\0\0"
_FAULTS = (pa.ArrowException, OSError, ValueError, struct.error)


def read_feather(data: bytes, columns: Sequence[str]) -> Columns:
    """Returns columns of a Feather file; a null is NaN.

    Raises:
        SampleError: ``bad_feather`` (no such file, or damaged), ``bad_type`` (a column
            of other than numbers), ``missing_column`` or ``too_large``.
    """
    if data[: len(_MAGIC)] != _MAGIC:
        hint = "; Feather version 1 is not read" if data[:4] == b"FEA1" else ""
        raise SampleError("bad_feather", f"it does not begin as version 2{hint}")
    if not data.endswith(_MAGIC[:6]):
        # Without this, a file cut between two batches would read as fewer points.
        raise SampleError("bad_feather", "it has no end")
    try:
        batches = list(_read_batches(pa.py_buffer(data)[len(_MAGIC) :], columns))
        parts = {name: [_to_numpy(one, name) for one in batches] for name in columns}
    except SampleError:
        raise
    except _FAULTS as error:
        raise SampleError("bad_feather", str(error)[:200]) from error
    if not batches:
        raise SampleError("empty", "the file has 0 batches of points")
    return {name: np.concatenate(found) for name, found in parts.items()}


def _read_batches(
    stream: pa.Buffer, columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    messages = iter(pa.ipc.MessageReader.open_stream(stream))
    first = next(messages, None)
    if first is None or first.type != "schema":
        raise SampleError("bad_feather", "its first message must be the schema")
    schema = pa.ipc.read_schema(first)
    check_names(columns, schema.names)
    for name in columns:
        if schema.names.count(name) != 1 or not _is_number(schema.field(name).type):
            raise SampleError("bad_type", f"column {name!r} is no column of numbers")
    num_points = num_bytes = 0
    for message in messages:
        if message.type != "record batch":
            raise SampleError("bad_feather", f"a {message.type} message is not read")
        rows, size_bytes = _sizes(message)
        num_points, num_bytes = num_points + rows, num_bytes + size_bytes
        check_bounds(num_points, num_bytes)
        yield pa.ipc.read_record_batch(message, schema)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _to_numpy(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch.column(name)
    # Arrow trusts lengths that a damaged file declares until it is asked to check.
    column.validate(full=True)
    return np.asarray(column.to_numpy(zero_copy_only=False))


def _sizes(message: pa.Message) -> tuple[int, int]:
    """Returns rows of a batch, and bytes its buffers take once decompressed.

    Walks the message's FlatBuffer: ``Message {version, header_type, header, ...}``,
    ``RecordBatch {length, nodes, buffers: [{offset, length}], compression}``.
    """
    table = memoryview(message.metadata)
    body = memoryview(message.body or b"")
    (root,) = struct.unpack_from("<I", table, 0)
    batch = _reference(table, root, 2)
    if batch is None:
        raise SampleError("bad_feather", "a batch without a header")
    length = _slot(table, batch, 0)
    rows = struct.unpack_from("<q", table, length)[0] if length else 0
    buffers = _reference(table, batch, 2)
    if buffers is None or _slot(table, batch, 3) is None:
        return rows, 0
    (count,) = struct.unpack_from("<I", table, buffers)
    total = 0
    for number in range(count):
        start, size = struct.unpack_from("<qq", table, buffers + 4 + 16 * number)
        if size >= 8 and 0 <= start <= len(body) - 8:
            # A negative size says that this buffer is not compressed.
            total += max(0, struct.unpack_from("<q", body, start)[0])
    return rows, total


def _slot(table: memoryview, at: int, slot: int) -> int | None:
    """Returns where a field of a FlatBuffers table lies, None where it is left out."""
    (back,) = struct.unpack_from("<i", table, at)
    size = struct.unpack_from("<H", table, at - back)[0]
    entry = 4 + 2 * slot
    if entry + 2 > size:
        return None
    offset: int = struct.unpack_from("<H", table, at - back + entry)[0]
    return at + offset if offset else None


def _reference(table: memoryview, at: int, slot: int) -> int | None:
    """Returns where the table or vector that a field refers to lies."""
    found = _slot(table, at, slot)
    if found is None:
        return None
    return found + int(struct.unpack_from("<I", table, found)[0])
