"""A shard's bytes as one stream: stored as they are, or gzip, bzip2 or xz.

Failures of the store become StorageError, failures of the data TarDamage: whoever reads
a shard can tell "try again" from "this shard is broken". Inflates in pieces, so that a
member that inflates to terabytes costs time and no memory.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from manifests.storage import explain, open_url
from pipeline.samples.tar import TarDamage, TarStream

_READ_BYTES = 2**18
# Always inflated in the same pieces, so that damaged data end at the same byte however
# they are read; what a broken piece would have held is lost.
_PIECE_BYTES = 2**14
_XZ_MEMORY = 512 * 2**20
_NOT_TAR = {
    b"\x28\xb5\x2f\xfd": "a zstd file; store it as plain .tar",
    b"PK\x03\x04": "a zip file; repack it as .tar",
    b"7z\xbc\xaf": "a 7z file; repack it as .tar",
}


class _Decoder(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _gzip() -> _Decoder:
    return zlib.decompressobj(wbits=31)


def _bzip2() -> _Decoder:
    return bz2.BZ2Decompressor()


def _xz() -> _Decoder:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


_DECODERS: dict[bytes, Callable[[], _Decoder]] = {
    b"\x1f\x8b": _gzip,
    b"BZh": _bzip2,
    b"\xfd7zXZ\x00": _xz,
}


class StoredFile:
    """A seekable file whose failures are StorageError."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self._url = url
        self._file = file

    def read(self, size: int, /) -> bytes:
        """Returns up to ``size`` bytes; raises StorageError where the store fails."""
        try:
            return self._file.read(size)
        except Exception as error:
            raise explain(error, "read", self._url) from error

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Moves to ``offset`` and returns the place."""
        try:
            return self._file.seek(offset, whence)
        except Exception as error:
            raise explain(error, "read", self._url) from error

    def tell(self) -> int:
        """Returns the place."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Returns True."""
        return True


class InflatedStream:
    """The inflated bytes of a compressed file, in order; cannot seek."""

    def __init__(
        self, file: TarStream, make: Callable[[], _Decoder], magic: bytes
    ) -> None:
        self._file = file
        self._make = make
        self._magic = magic
        self._decoder = make()
        self._pending = b""
        self._inflated = b""
        self._used = 0
        self._position = 0
        self._damage: TarDamage | None = None

    def tell(self) -> int:
        """Returns how many inflated bytes have been read."""
        return self._position

    def seekable(self) -> bool:
        """Returns False."""
        return False

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Refuses: reading on is the only way."""
        raise ValueError("a compressed stream cannot seek")

    def read(self, size: int, /) -> bytes:
        """Returns ``size`` inflated bytes, fewer only at the end.

        Raises:
            TarDamage: the compressed data are broken or end early.
        """
        parts: list[bytes] = []
        while size > 0:
            if self._used == len(self._inflated):
                try:
                    self._inflated, self._used = self._inflate(), 0
                except TarDamage:
                    if parts:
                        break  # it comes again with the next read
                    raise
                if not self._inflated:
                    break
            part = self._inflated[self._used : self._used + size]
            parts.append(part)
            size -= len(part)
            self._used += len(part)
            self._position += len(part)
        return b"".join(parts)

    def _inflate(self) -> bytes:
        if self._damage is not None:
            raise self._damage
        try:
            return self._inflate_piece()
        except TarDamage as damage:
            self._damage = damage
            raise

    def _inflate_piece(self) -> bytes:
        while True:
            if self._decoder.eof and not self._next_stream():
                return b""
            if not self._pending and getattr(self._decoder, "needs_input", True):
                self._pending = self._file.read(_READ_BYTES)
                if not self._pending:
                    what = "the compressed data end early,"
                    raise TarDamage(self._position, what)
            try:
                out = self._decoder.decompress(self._pending, _PIECE_BYTES)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
                what = f"the compressed data are broken ({error})"
                raise TarDamage(self._position, what) from error
            self._pending = getattr(self._decoder, "unconsumed_tail", b"")
            if out:
                return out

    def _next_stream(self) -> bool:
        """Starts on a further stream of the same file; False at the end of the file."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while len(rest) < len(self._magic):
            more = self._file.read(_READ_BYTES)
            if not more:
                return False
            rest = (rest + more).lstrip(b"\0")
        if not rest.startswith(self._magic):
            return False
        self._decoder = self._make()
        self._pending = rest
        return True


@contextlib.contextmanager
def open_shard(url: str) -> Iterator[tuple[TarStream, bool]]:
    """Opens a shard as (stream of the tar's bytes, whether it is compressed).

    Raises:
        StorageError: the store has no such file or fails to read it.
        TarDamage: the file is empty or of a known kind that is no tar.
    """
    with open_url(url) as raw:
        file = StoredFile(url, raw)
        head = file.read(8)
        file.seek(0)
        if not head:
            raise TarDamage(0, "an empty file is no tar,")
        for magic, what in _NOT_TAR.items():
            if head.startswith(magic):
                raise TarDamage(0, what)
        for magic, make in _DECODERS.items():
            if head.startswith(magic):
                yield InflatedStream(file, make, magic), True
                return
        yield file, False
