"""Reading features: whole blocks, one request each, checked, into reused memory.

``read_block`` is the one seam through which features are read; whatever engine is
behind it can change without a caller noticing. A thread keeps one buffer as large as
the largest
object it has read from a local disk: fresh memory costs more than the copy into it.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError
from manifests.storage import Store, explain
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.encoding import Encoding
from pipeline.bank.objects import ScatteredObject, decode_object, plain_chunks

Expected = Callable[[int, int], tuple[int, int] | None]

# Buffers that one preadv takes (IOV_MAX of Linux and macOS).
_MAX_BUFFERS = 1024

# A process may have 65,530 maps on Linux.
_MAX_MAPS = 8192

_Identity = tuple[int, int, int]

_reused = threading.local()


@dataclass(frozen=True)
class BankArray:
    """One array of a bank, with what its commits say of its objects.

    Attributes:
        store: the Zarr root, ``features.zarr``.
        spec: the array.
        expected: from (block, view) to the committed (size in bytes, crc32c) of the
            object, or None where the block has no commit.
    """

    store: Store
    spec: ArraySpec
    expected: Expected


def read_block(
    array: BankArray,
    block: int,
    view: int = 0,
    *,
    out: npt.NDArray[Any] | None = None,
) -> npt.NDArray[Any]:
    """Returns the stored values of one block and view, fetched in one request.

    Args:
        array: which array of which bank.
        block: number of the block in the bank.
        view: number of the view; 0 for an array without views.
        out: (block_rows, *row_shape) of the stored type to decode into, C-contiguous; a
            new array where omitted. A trainer reuses (pinned) ones.

    Returns:
        (block_rows, *row_shape), as stored; rows that are missing hold the fill value.

    Raises:
        BankError: the block is not committed, or its object is gone, of another size
            than committed, or damaged. ``out`` may then hold some of its rows.
        StorageError: the store cannot be read.
    """
    committed = array.expected(block, view)
    if committed is None:
        raise BankError(
            "block must be committed to be read, got no commit "
            f"({_where(array, block, view)}); run precompute to make it"
        )
    size_bytes, _ = committed
    if out is None:
        spec = array.spec
        out = np.empty((spec.block_rows, *spec.row_shape), spec.numpy_dtype)
    try:
        if array.store.local_root is not None:
            return _read_local(array, block, view, size_bytes, out)
        data = array.store.read_or_none(
            object_name(array.spec, block, view), size_bytes
        )
        _check_size(None if data is None else len(data), size_bytes)
        assert data is not None
        return decode_object(data, array.spec, out)
    except BankError as error:
        raise BankError(f"{error} ({_where(array, block, view)})") from error


class MappedBlock:
    """A block without a codec as it lies in the page cache, every chunk checked."""

    def __init__(self, chunks: Sequence[npt.NDArray[Any]], identity: _Identity) -> None:
        """Takes the chunks of a checked map, and the file that they are of."""
        self._chunks, self.identity = list(chunks), identity

    def take(self, rows: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Copies rows of the block, which must not be padding, into ``out``."""
        size = len(self._chunks[0])
        for place, row in enumerate(rows.tolist()):
            out[place] = self._chunks[row // size][row % size]

    def close(self) -> None:
        """Does nothing: the map goes when nobody looks at it any more."""


class BlockMaps:
    """Blocks that are mapped rather than read: local ones without a codec.

    Saves the copy into memory of one's own where rows are copied on anyway, and the
    check of bytes that were checked before: a map is used again as long as its file
    is the same, by inode, size and time. Maps take addresses, not memory. A file that
    somebody cuts while it is mapped ends the process, as with every mapped file; the
    bank itself never rewrites an object in place.
    """

    def __init__(self, limit: int = _MAX_MAPS) -> None:
        """Keeps at most ``limit`` maps, those used last."""
        self._limit = limit
        self._maps: OrderedDict[str, MappedBlock] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, array: BankArray, block: int, view: int = 0) -> MappedBlock | None:
        """Returns a block where it lies; None where it must be read instead.

        Raises:
            BankError: its object is of another size than committed, or damaged.
            StorageError: the store cannot be read.
        """
        root, spec = array.store.local_root, array.spec
        committed = array.expected(block, view)
        if root is None or spec.codec != "none" or committed is None:
            return None
        path = str(root / object_name(spec, block, view))
        try:
            identity = _identity(os.stat(path))
            with self._lock:
                held = self._maps.get(path)
                if held is not None and held.identity == identity:
                    self._maps.move_to_end(path)
                    return held
            found = _map(path, spec, committed[0])
        except FileNotFoundError:
            return None
        except BankError as error:
            raise BankError(f"{error} ({_where(array, block, view)})") from error
        except OSError as error:
            raise explain(error, "read", path) from error
        if found is not None:
            with self._lock:
                self._maps[path] = found
                while len(self._maps) > self._limit:
                    self._maps.popitem(last=False)
        return found


def _identity(found: os.stat_result) -> _Identity:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _map(path: str, spec: ArraySpec, size_bytes: int) -> MappedBlock | None:
    with open(path, "rb") as file:
        found = os.fstat(file.fileno())
        _check_size(found.st_size, size_bytes)
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ)
    chunks = plain_chunks(memoryview(mapped), spec)
    return MappedBlock(chunks, _identity(found)) if chunks else None


def read_values(
    encoding: Encoding, arrays: Mapping[str, BankArray], block: int, view: int = 0
) -> npt.NDArray[np.float32]:
    """Returns one output's decoded values of one block and view.

    Args:
        encoding: how the output is stored.
        arrays: from each of ``encoding.suffixes`` to its array.
        block: number of the block in the bank.
        view: number of the view.

    Returns:
        (block_rows, *shape of the output) float32; rows that are missing are NaN.

    Raises:
        BankError: as ``read_block``, or the stored values contradict the encoding.
        StorageError: the store cannot be read.
    """
    return encoding.decode(
        {
            suffix: read_block(arrays[suffix], block, view)
            for suffix in encoding.suffixes
        }
    )


def _where(array: BankArray, block: int, view: int) -> str:
    return f"array {array.spec.path}, block {block}, view {view}"


def _check_size(size_bytes: int | None, expected_bytes: int) -> None:
    if size_bytes != expected_bytes:
        got = "no object" if size_bytes is None else f"{size_bytes} bytes"
        raise BankError(
            f"object must have the committed {expected_bytes} bytes, got {got}; "
            "run precompute --repair"
        )


def _read_local(
    array: BankArray, block: int, view: int, size_bytes: int, out: npt.NDArray[Any]
) -> npt.NDArray[Any]:
    spec, name = array.spec, object_name(array.spec, block, view)
    assert array.store.local_root is not None
    try:
        handle = os.open(array.store.local_root / name, os.O_RDONLY)
    except FileNotFoundError:
        _check_size(None, size_bytes)
        raise
    except OSError as error:
        raise explain(error, "read", array.store.url_of(name)) from error
    try:
        _check_size(os.fstat(handle).st_size, size_bytes)
        scattered = ScatteredObject.plan(size_bytes, spec, out)
        if scattered is not None:
            _read_into(handle, scattered.buffers)
            if scattered.check():
                return out
        buffer = _buffer(size_bytes)
        _read_into(handle, [buffer])
        return decode_object(buffer, spec, out)
    except OSError as error:
        raise explain(error, "read", array.store.url_of(name)) from error
    finally:
        os.close(handle)


def _buffer(size_bytes: int) -> memoryview:
    """Returns this thread's buffer, cut to size; valid until the thread's next call."""
    kept: bytearray | None = getattr(_reused, "buffer", None)
    if kept is None or len(kept) < size_bytes:
        kept = _reused.buffer = bytearray(size_bytes)
    return memoryview(kept)[:size_bytes]


def _read_into(handle: int, buffers: Sequence[memoryview]) -> None:
    """Fills the buffers in order with a file's bytes from its start.

    Raises:
        BankError: the file ends before they are full: it was cut since it was opened.
    """
    offset, pending = 0, list(buffers)
    while pending:
        num_read = os.preadv(handle, pending[:_MAX_BUFFERS], offset)
        if num_read == 0:
            raise BankError(f"object ends at byte {offset} while it is read")
        offset += num_read
        while pending and num_read >= pending[0].nbytes:
            num_read -= pending.pop(0).nbytes
        if num_read:
            pending[0] = pending[0][num_read:]
