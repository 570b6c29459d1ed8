"""A strict tar reader: every member, or the exact place where the archive is damaged.

Owns the archive's headers: ustar, GNU (long names, base-256 sizes) and PAX. Reads no
member's data, follows no link, makes no path. The standard library's reader stops
silently at a damaged header and recurses over extension headers; this one raises
`TarDamage` and loops. Memory is one extension header, at most 1 MiB.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from pipeline.samples.errors import ShardError
from pipeline.samples.names import split_name

BLOCK = 512
MAX_EXTENSION_BYTES = 2**20
SCAN_BYTES = 64 * 2**20
"""How far past the archive's end, or past damage, headers are looked for."""

Kind = Literal["file", "directory", "link", "sparse", "special"]

_ZERO = bytes(BLOCK)
_PIECE = 2**20
_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE)
_NO_DATA = (
    *_LINKS,
    tarfile.DIRTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTENSIONS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XGLTYPE,
    *_PAX,
)
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class TarStream(Protocol):
    """What the reader needs of a file; ``seek`` is called only where it is seekable."""

    def read(self, size: int, /) -> bytes:
        """Returns up to ``size`` bytes; none only at the end."""
        ...

    def tell(self) -> int:
        """Returns the place."""
        ...

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Moves to ``offset`` and returns the place."""
        ...

    def seekable(self) -> bool:
        """Returns whether `seek` may be called."""
        ...


class TarDamage(ShardError):
    """The place in an archive from which its bytes cannot be trusted.

    Attributes:
        offset: byte of the (inflated) archive, at the header concerned.
        what: what is wrong there.
        name: the member that is cut by it, where its name could still be read.
    """

    def __init__(self, offset: int, what: str, name: str | None = None) -> None:
        super().__init__(f"{what} at byte {offset}")
        self.offset = offset
        self.what = what
        self.name = name


@dataclass(frozen=True)
class Member:
    """One member of an archive.

    Attributes:
        name: as stored; bytes that are not UTF-8 as surrogates.
        key: path up to the first dot of the base name.
        extension: what follows that dot, in lower case.
        header_offset: byte of its first header, extension headers included.
        data_offset: byte of its data.
        size: bytes of its data in the archive; 0 for what has none.
        is_file: whether it is a regular file whose data are in the archive as they are.
        kind: what it is.
    """

    name: str
    key: str
    extension: str
    header_offset: int
    data_offset: int
    size: int
    is_file: bool
    kind: Kind = "file"

    @property
    def end(self) -> int:
        """Byte after its padded data."""
        return self.data_offset + padded(self.size)


@dataclass
class _Extended:
    """What extension headers say about the member that follows them."""

    path: str | None = None
    size: int | None = None
    sparse: bool = False

    def update(self, other: _Extended) -> None:
        self.path = self.path if other.path is None else other.path
        self.size = self.size if other.size is None else other.size
        self.sparse = self.sparse or other.sparse


def padded(size: int) -> int:
    """Returns ``size`` rounded up to whole tar blocks."""
    return -(-size // BLOCK) * BLOCK


def read_exactly(file: TarStream, size: int) -> bytes:
    """Returns ``size`` bytes, or fewer only where the stream ends."""
    data = file.read(size)
    if len(data) == size or not data:
        return data
    parts = [data]
    while (missing := size - sum(map(len, parts))) and (data := file.read(missing)):
        parts.append(data)
    return b"".join(parts)


def walk_members(
    file: TarStream, start: int = 0, end: int | None = None
) -> Iterator[Member]:
    """Yields the members whose first header lies in bytes [start, end).

    Between two members the caller may seek and read ``file`` as it likes; a stream that
    is not seekable may be read only within the member just yielded.

    Args:
        file: at any place if seekable, else at or before ``start``.
        start: byte of a member's first header.
        end: where to stop; None for the end of the archive, which is then checked.

    Raises:
        TarDamage: a bad checksum, a truncated header or member, an extension header
            that is broken or over 1 MiB, or members after the end of the archive.
            Members before it have been yielded; on a stream that is not seekable, so
            has the one that is cut (it is named by the error).
    """
    return iter(TarWalk(file, start, end))


class TarWalk:
    """The walk of `walk_members`, with what it learns about the archive as a whole.

    Attributes:
        has_global_header: whether a global PAX header was met.
        headers: running SHA-256 of all header blocks, extension headers included.
    """

    def __init__(
        self,
        file: TarStream,
        start: int = 0,
        end: int | None = None,
        first_block: bytes | None = None,
    ) -> None:
        """Prepares a walk; ``first_block`` is that at ``start`` if already read."""
        self._file = file
        self._end = end
        self._next = start
        self._peeked = None if first_block is None else (start, first_block)
        self._size = file.seek(0, 2) if file.seekable() else None
        self._last: Member | None = None
        self._globals = _Extended()
        self.has_global_header = False
        self.headers = hashlib.sha256()

    def __iter__(self) -> Iterator[Member]:
        while self._end is None or self._next < self._end:
            member = self._read_member()
            if member is None:
                return
            self._last = member
            self._next = member.end
            yield member

    def _read_member(self) -> Member | None:
        first = position = self._next
        extended = _Extended()
        while True:
            block = self._read_block(position)
            if not block and position == first:
                return None
            if len(block) < BLOCK:
                what = "the file ends inside a header"
                raise TarDamage(position, what, raw_name(block))
            if block == _ZERO:
                if position != first:
                    raise TarDamage(position, "an extension header has no member")
                self._check_tail(position)
                return None
            header = _parse_header(block, position)
            self.headers.update(block)
            if header.type not in _EXTENSIONS:
                break
            payload = self._read_extension(header, position)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                extended.path = payload.split(b"\0", 1)[0].decode(
                    errors="surrogateescape"
                )
            elif header.type == tarfile.XGLTYPE:
                self.has_global_header = True
                self._globals.update(_parse_pax(payload, position))
            elif header.type in _PAX:
                extended.update(_parse_pax(payload, position))
            position += BLOCK + padded(header.size)
        return self._make_member(header, block, first, position, extended)

    def _make_member(
        self,
        header: tarfile.TarInfo,
        block: bytes,
        first: int,
        position: int,
        extended: _Extended,
    ) -> Member:
        path = extended.path if extended.path is not None else self._globals.path
        name = header.name if path is None else path
        size = extended.size if extended.size is not None else self._globals.size
        size = header.size if size is None else size
        kind: Kind = "special"
        if header.type == tarfile.DIRTYPE:
            kind, name = "directory", name.rstrip("/")
        elif header.type in _LINKS:
            kind = "link"
        elif header.type == tarfile.GNUTYPE_SPARSE or extended.sparse:
            kind = "sparse"
        elif header.type in _REGULAR:
            kind = "file"
        if header.type in _NO_DATA:
            size = 0
        data_offset = position + BLOCK
        if header.type == tarfile.GNUTYPE_SPARSE:
            data_offset = self._skip_sparse_maps(block, data_offset)
        if self._size is not None and data_offset + size > self._size:
            held = max(self._size - data_offset, 0)
            what = f"{name[:200]!r} has {size} bytes and the file holds {held} of them,"
            raise TarDamage(first, what, name)
        key, extension = split_name(name)
        return Member(
            name, key, extension, first, data_offset, size, kind == "file", kind
        )

    def _skip_sparse_maps(self, block: bytes, position: int) -> int:
        is_extended = bool(block[482])
        while is_extended:
            more = self._read_block(position)
            if len(more) < BLOCK:
                raise TarDamage(position, "the file ends inside a sparse map")
            self.headers.update(more)
            is_extended = bool(more[504])
            position += BLOCK
        return position

    def _read_extension(self, header: tarfile.TarInfo, position: int) -> bytes:
        if header.size > MAX_EXTENSION_BYTES:
            raise TarDamage(position, f"an extension header of {header.size} bytes")
        payload = read_exactly(self._file, header.size)
        if len(payload) < header.size:
            raise TarDamage(position, "the file ends inside an extension header")
        self.headers.update(payload)
        return payload

    def _read_block(self, position: int) -> bytes:
        if self._peeked is not None and self._peeked[0] == position:
            block = self._peeked[1]
            self._peeked = None
            if self._size is not None:
                self._file.seek(position + BLOCK)
            return block
        if self._size is not None:
            if position > self._size:
                self._raise_cut(self._size)
            self._file.seek(position)
        else:
            self._skip_forward(position)
        return read_exactly(self._file, BLOCK)

    def _skip_forward(self, position: int) -> None:
        try:
            reached = skip_to(self._file, position)
        except TarDamage as damage:
            last, reached = self._last, self._file.tell()
            if last is None or reached >= last.data_offset + last.size:
                raise
            what = f"{last.name[:200]!r} is cut since {damage.what}"
            raise TarDamage(last.header_offset, what, last.name) from damage
        if reached < position:
            self._raise_cut(reached)

    def _raise_cut(self, reached: int) -> None:
        """Raises what it means that the file ends before the next header."""
        last = self._last
        if last is not None and reached < last.data_offset + last.size:
            held = max(reached - last.data_offset, 0)
            what = (
                f"{last.name[:200]!r} has {last.size} bytes and the file holds {held},"
            )
            raise TarDamage(last.header_offset, what, last.name)
        raise TarDamage(reached, "the file ends inside the padding of a member")

    def _check_tail(self, position: int) -> None:
        """Raises TarDamage if members follow what looks like the archive's end.

        Two zero blocks end an archive; whatever follows is ignored unless it holds tar
        headers (concatenated archives). One zero block alone is a header overwritten.
        """
        block = read_exactly(self._file, BLOCK)
        if block and block.strip(b"\0"):
            raise TarDamage(position, "a header of zeros in the middle of the archive")
        if not block:
            return
        if find_header(self._file, position + 2 * BLOCK, SCAN_BYTES) is not None:
            what = "an end of archive with members after it (concatenated archives?)"
            raise TarDamage(position, what)


def skip_to(file: TarStream, position: int) -> int:
    """Reads a stream that cannot seek up to ``position``; returns where it got to."""
    reached = file.tell()
    while reached < position:
        piece = file.read(min(_PIECE, position - reached))
        if not piece:
            break
        reached += len(piece)
    return reached


def find_header(file: TarStream, position: int, limit: int) -> tuple[int, bytes] | None:
    """Returns (offset, block) of the next ustar header in 512-byte steps, or None.

    Args:
        file: a seekable stream, or one that is at or before ``position``.
        position: a multiple of 512.
        limit: how many bytes to look at.
    """
    if file.seekable():
        file.seek(position)
    elif skip_to(file, position) != position:
        return None
    for offset in range(position, position + limit, BLOCK):
        block = read_exactly(file, BLOCK)
        if len(block) < BLOCK:
            return None
        if block[257:262] == b"ustar":
            try:
                _parse_header(block, offset)
            except TarDamage:
                continue
            return offset, block
    return None


def raw_name(block: bytes) -> str | None:
    """Returns the name in a damaged header if it still looks like one, else None."""
    name = block[:100].split(b"\0", 1)[0]
    magic = block[257:262]
    try:
        text = name.decode()
    except UnicodeDecodeError:
        return None
    if magic != b"ustar"[: len(magic)] or not text.isprintable():
        return None
    is_whole = len(name) < min(len(block), 100)
    return text if text and is_whole else None


def _parse_header(block: bytes, position: int) -> tarfile.TarInfo:
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise TarDamage(position, f"{error} in a header", raw_name(block)) from error
    if header.size < 0:
        raise TarDamage(position, "a negative size in a header", raw_name(block))
    if block[257:265] == tarfile.GNU_MAGIC:
        # GNU keeps times where ustar keeps a prefix; tarfile joins them to the name.
        stored = block[:100].split(b"\0", 1)[0]
        header.name = stored.decode(errors="surrogateescape")
    return header


def _parse_pax(payload: bytes, position: int) -> _Extended:
    found = _Extended()
    start = 0
    while start < len(payload) and payload[start] != 0:
        match = _PAX_RECORD.match(payload, start)
        length = int(match[1]) if match else 0
        record = payload[start : start + length]
        if match is None or match.end() > start + length or record[-1:] != b"\n":
            raise TarDamage(position, "a broken PAX header")
        if len(record) < length:
            raise TarDamage(position, "a PAX header cut short")
        keyword, value = match[2], payload[match.end() : start + length - 1]
        if keyword == b"path":
            found.path = value.decode(errors="surrogateescape").rstrip("/")
        elif keyword == b"size":
            if not re.fullmatch(rb"\d{1,19}", value):
                raise TarDamage(position, "a PAX size that is no number")
            found.size = int(value)
        elif keyword.startswith(b"GNU.sparse."):
            found.sparse = True
        start += length
    return found
