"""Sweeps in ``.npy`` and ``.npz`` files: (N, C) arrays, structured arrays, or an array
per column. Nothing is ever unpickled.

The header is read here, strictly: sizes are known before memory is taken, and NumPy's
own reader accepts more than there is to accept.

Source: the NPY format, versions 1.0 to 3.0 (numpy.lib.format).
"""

from __future__ import annotations

import ast
import io
import math
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.samples.errors import SampleError
from pipeline.samples.point_columns import (
    Columns,
    check_bounds,
    check_names,
    rows_as_columns,
)

_MAGIC = b"\x93NUMPY"
_MAX_HEADER_BYTES = 2**14
_NUMBER = re.compile(r"[<>|=][fiu][1248]")
# Fields that are not wanted may also be bool, complex, text, times or padding.
_FIELD = re.compile(r"[<>|=][biufcSUVmM][1-9][0-9]{0,3}(\[[0-9]{0,4}[a-z]{1,2}\])?")
# What zipfile and zlib raise at bytes that are not what they should be.
_ZIP_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    ValueError,
)


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype
    shape: tuple[int, ...]
    is_fortran: bool
    size_bytes: int

    @property
    def data_bytes(self) -> int:
        """Bytes that follow the header."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_npy(data: bytes, columns: Sequence[str]) -> Columns:
    """Returns columns of an array: in order of (N, C), by name of a structured one.

    Raises:
        SampleError: ``bad_npy`` (no such file), ``bad_type`` (not numbers), ``empty``,
            ``bad_size`` (another shape, or bytes missing or left over),
            ``missing_column`` or ``too_large``.
    """
    return _as_columns(_read_array(data), columns)


def read_npz(data: bytes, columns: Sequence[str]) -> Columns:
    """Returns columns of an archive: arrays named as they are, or else its only array.

    Raises:
        SampleError: ``bad_npz`` (no such file), or as `read_npy`.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            is_single = len(members) == 1 and not set(columns) & set(members)
            if not is_single:
                check_names(columns, members)
            names = list(members) if is_single else list(columns)
            check_bounds(0, sum(members[name].file_size for name in names))
            arrays = [_read_array(_read_member(archive, members[n])) for n in names]
    except SampleError:
        raise
    except _ZIP_FAULTS as error:
        raise SampleError("bad_npz", str(error)[:200]) from error
    if is_single:
        return _as_columns(arrays[0], columns)
    return dict(zip(names, arrays, strict=True))


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.flag_bits & 1:
        raise SampleError("bad_npz", f"{info.filename[:80]!r} is encrypted")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise SampleError("bad_npz", f"compression {info.compress_type} is not read")
    with archive.open(info) as member:
        # Never more than was bounded, whatever the member really holds.
        return member.read(info.file_size)


def _as_columns(array: np.ndarray, columns: Sequence[str]) -> Columns:
    if array.dtype.names is None:
        return rows_as_columns(array, columns)
    check_names(columns, array.dtype.names)
    return {name: array[name] for name in columns}


def _read_array(data: bytes) -> np.ndarray:
    header = _read_header(data)
    check_bounds(header.shape[0] if header.shape else 0, header.data_bytes)
    left = len(data) - header.size_bytes
    if header.data_bytes != left:
        raise SampleError(
            "bad_size",
            f"{left} bytes of data, must be {header.data_bytes} for shape "
            f"{header.shape} of {header.dtype}",
        )
    if not header.data_bytes:
        raise SampleError("empty", f"an array of shape {header.shape}")
    flat = np.frombuffer(data, header.dtype, math.prod(header.shape), header.size_bytes)
    if header.is_fortran:
        return flat.reshape(header.shape[::-1]).T
    return flat.reshape(header.shape)


def _read_header(data: bytes) -> _Header:
    if data[: len(_MAGIC)] != _MAGIC or len(data) < 12:
        raise SampleError("bad_npy", "it does not begin as an .npy file")
    version = data[6]
    width = {1: 2, 2: 4, 3: 4}.get(version)
    if width is None:
        raise SampleError("bad_npy", f"format version {version} is not known")
    length = int.from_bytes(data[8 : 8 + width], "little")
    end = 8 + width + length
    if length > _MAX_HEADER_BYTES or end > len(data):
        raise SampleError("bad_npy", f"a header of {length} bytes")
    try:
        text = data[8 + width : end].decode("utf-8" if version == 3 else "latin-1")
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise SampleError("bad_npy", f"its header: {str(error)[:160]}") from error
    if not isinstance(found, dict) or set(found) != {"descr", "fortran_order", "shape"}:
        raise SampleError("bad_npy", "its header must hold descr, fortran_order, shape")
    shape = found["shape"]
    is_shape = isinstance(shape, tuple) and all(type(n) is int for n in shape)
    if not is_shape or min(shape, default=0) < 0:
        raise SampleError("bad_size", f"shape {str(shape)[:80]}")
    dtype = _dtype_of(found["descr"])
    if dtype.names is not None and len(shape) != 1:
        raise SampleError("bad_size", f"a structured array of shape {shape}")
    return _Header(dtype, shape, bool(found["fortran_order"]), end)


def _dtype_of(descr: object) -> np.dtype:
    """Returns a type of plain numbers, or of fields that are not nested."""
    try:
        if isinstance(descr, str) and _NUMBER.fullmatch(descr):
            return np.dtype(descr)
        if isinstance(descr, list) and descr and all(map(_is_flat, descr)):
            return np.lib.format.descr_to_dtype(descr)
    except (TypeError, ValueError, OverflowError) as error:
        raise SampleError("bad_type", str(error)[:200]) from error
    raise SampleError(
        "bad_type",
        f"{str(descr)[:120]} is neither float or int of 1 to 8 bytes nor flat fields",
    )


def _is_flat(field: object) -> bool:
    if not isinstance(field, tuple) or len(field) not in (2, 3):
        return False
    name, kind, *shape = field
    if not isinstance(name, str) or not isinstance(kind, str):
        return False
    is_shape = all(
        isinstance(one, tuple) and all(type(n) is int and 0 < n < 1000 for n in one)
        for one in shape
    )
    return is_shape and _FIELD.fullmatch(kind) is not None
