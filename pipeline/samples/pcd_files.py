"""Sweeps in ``.pcd`` files of the Point Cloud Library: fields by name, as text, binary
or compressed.

The reader is our own: pypcd4, the library that is kept, takes the memory that a header
asks for unchecked, and reads headers of version 0.7 alone. LZF is undone in Python:
compressed points cost about 20 ms a sweep of 35,000, and need no package.

Source: "The PCD (Point Cloud Data) file format" (pointclouds.org); LZF: liblzf's
``lzf_d.c`` as a description of the stream.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.samples.errors import SampleError
from pipeline.samples.point_columns import Columns, check_bounds, check_names

_MAX_HEADER_BYTES = 2**14
_TYPES = {
    ("F", 4): "<f4",
    ("F", 8): "<f8",
    **{("I", size): f"<i{size}" for size in (1, 2, 4, 8)},
    **{("U", size): f"<u{size}" for size in (1, 2, 4, 8)},
}


@dataclass(frozen=True)
class _Field:
    name: str
    kind: str
    size: int
    count: int

    @property
    def size_bytes(self) -> int:
        """Bytes that it takes of each point."""
        return self.size * self.count


@dataclass(frozen=True)
class _Header:
    fields: tuple[_Field, ...]
    num_points: int
    encoding: str

    @property
    def point_bytes(self) -> int:
        """Bytes of one point."""
        return sum(field.size_bytes for field in self.fields)


def read_pcd(data: bytes, columns: Sequence[str]) -> Columns:
    """Returns fields of a PCD file. ``VIEWPOINT`` is not applied.

    Raises:
        SampleError: ``bad_pcd`` (no such file), ``bad_size`` (not the points that its
            header says), ``bad_type`` (a field with several values), ``missing_column``
            or ``too_large``.
    """
    header, body = _read_header(data)
    check_names(columns, (field.name for field in header.fields))
    for field in header.fields:
        if field.name in columns and field.count != 1:
            raise SampleError("bad_type", f"{field.name!r} has {field.count} values")
    names = [field.name for field in header.fields]
    if doubled := [name for name in columns if names.count(name) > 1]:
        raise SampleError("bad_pcd", f"two fields are named {doubled[0]!r}")
    if not header.num_points:
        raise SampleError("empty", "the file has 0 points")
    check_bounds(header.num_points, header.num_points * header.point_bytes)
    if header.encoding == "ascii":
        return _read_text(header, body, columns)
    if header.encoding == "binary":
        return _read_binary(header, body, columns)
    return _read_compressed(header, body, columns)


def _read_header(data: bytes) -> tuple[_Header, memoryview]:
    entries: dict[str, list[str]] = {}
    start = 0
    while "DATA" not in entries:
        end = data.find(b"\n", start, _MAX_HEADER_BYTES)
        if end < 0:
            raise SampleError("bad_pcd", "its header has no line DATA")
        words = data[start:end].decode("latin-1").split()
        start = end + 1
        if words and not words[0].startswith("#"):
            entries[words[0].upper()] = words[1:]
    try:
        return _parse_header(entries), memoryview(data)[start:]
    except (ValueError, KeyError, IndexError) as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("bad_pcd", f"its header: {str(error)[:160]}") from error


def _parse_header(entries: dict[str, list[str]]) -> _Header:
    # Before version 0.6 FIELDS was COLUMNS; COUNT and POINTS came later.
    names = entries["FIELDS"] if "FIELDS" in entries else entries["COLUMNS"]
    kinds = [kind.upper() for kind in entries["TYPE"]]
    sizes = [_count(size) for size in entries["SIZE"]]
    counts = [_count(count) for count in entries.get("COUNT", ["1"] * len(names))]
    fields = tuple(map(_Field, names, kinds, sizes, counts))
    if not len(names) == len(kinds) == len(sizes) == len(counts):
        raise SampleError("bad_pcd", "FIELDS, SIZE, TYPE, COUNT differ in length")
    if unknown := [one for one in fields if (one.kind, one.size) not in _TYPES]:
        kind, size = unknown[0].kind, unknown[0].size
        raise SampleError("bad_pcd", f"there is no type {kind[:9]} of {size} bytes")
    area = _count(entries["WIDTH"][0]) * _count(entries.get("HEIGHT", ["1"])[0])
    num_points = _count(entries["POINTS"][0]) if "POINTS" in entries else area
    if area != num_points:
        raise SampleError("bad_size", f"WIDTH x HEIGHT is {area}, POINTS {num_points}")
    encoding = entries["DATA"][0].lower()
    if encoding not in ("ascii", "binary", "binary_compressed"):
        raise SampleError("bad_pcd", f"DATA {encoding[:40]!r} is not read")
    return _Header(fields, num_points, encoding)


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise SampleError("bad_size", f"{text[:40]!r} is no count")
    return int(text)


def _read_text(header: _Header, body: memoryview, columns: Sequence[str]) -> Columns:
    at, width = {}, 0
    for field in header.fields:
        at[field.name] = width
        width += field.count
    try:
        text = bytes(body).decode("ascii")
        if not text.strip():
            raise SampleError("bad_size", f"0 points, POINTS is {header.num_points}")
        # All columns are read: a line with one too few or too many is an error.
        values = np.loadtxt(io.StringIO(text), np.float64, comments=None, ndmin=2)
    except ValueError as error:
        if isinstance(error, SampleError):
            raise
        raise SampleError("bad_pcd", str(error)[:200]) from error
    if values.shape != (header.num_points, width):
        raise SampleError(
            "bad_size",
            f"{len(values)} lines of {values.shape[1]} values, the header says "
            f"{header.num_points} of {width}",
        )
    return {name: values[:, at[name]] for name in columns}


def _read_binary(header: _Header, body: memoryview, columns: Sequence[str]) -> Columns:
    num_bytes = header.num_points * header.point_bytes
    # A new line at the end does no harm; a point more says that the header is wrong.
    if not 0 <= len(body) - num_bytes < max(header.point_bytes, 1):
        raise SampleError(
            "bad_size", f"{len(body)} bytes of points, the header says {num_bytes}"
        )
    offset, found = 0, {}
    for field in header.fields:
        if field.name in columns:
            found[field.name] = np.ndarray(
                (header.num_points,),
                _TYPES[field.kind, field.size],
                body,
                offset,
                (header.point_bytes,),
            )
        offset += field.size_bytes
    return found


def _read_compressed(
    header: _Header, body: memoryview, columns: Sequence[str]
) -> Columns:
    num_bytes = header.num_points * header.point_bytes
    packed = int.from_bytes(body[:4], "little")
    unpacked = int.from_bytes(body[4:8], "little")
    if len(body) < 8 + packed or unpacked != num_bytes:
        raise SampleError(
            "bad_size",
            f"{packed} bytes for {unpacked}; there are {max(len(body) - 8, 0)}, and "
            f"the header says {num_bytes}",
        )
    # Compressed, each field's values lie together.
    data = decompress_lzf(bytes(body[8 : 8 + packed]), unpacked)
    offset, found = 0, {}
    for field in header.fields:
        if field.name in columns:
            kind = _TYPES[field.kind, field.size]
            found[field.name] = np.frombuffer(data, kind, header.num_points, offset)
        offset += field.size_bytes * header.num_points
    return found


def decompress_lzf(data: bytes, size: int) -> bytes:
    """Returns the ``size`` bytes that an LZF stream holds.

    A control byte below 32 is followed by one more than so many bytes to be kept.
    Otherwise its upper 3 bits (7: more in the next byte) plus 2 are the length of a
    repetition, its lower 5 bits and the next byte how far back it begins, less 1.

    Raises:
        SampleError: ``bad_pcd``: it is damaged, or holds more or less.
    """
    out = bytearray()
    at, end = 0, len(data)
    try:
        while at < end and len(out) <= size:
            control = data[at]
            at += 1
            if control < 32:
                out += data[at : at + control + 1]
                at += control + 1
                continue
            length = control >> 5
            if length == 7:
                length += data[at]
                at += 1
            length += 2
            back = ((control & 31) << 8) + data[at] + 1
            at += 1
            start = len(out) - back
            if start < 0:
                raise SampleError("bad_pcd", "a repetition begins before the points")
            if back >= length:
                out += out[start : start + length]
            else:
                # It overlaps what it writes: the last bytes over and over.
                out += (out[start:] * math.ceil(length / back))[:length]
    except IndexError as error:
        raise SampleError("bad_pcd", "its compressed points end too early") from error
    if at != end or len(out) != size:
        raise SampleError("bad_pcd", f"{len(out)} bytes of points, must be {size}")
    return bytes(out)
