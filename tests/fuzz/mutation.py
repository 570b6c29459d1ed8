"""Seeds to hostile inputs: a deterministic mutator that knows a little of each format.

A mutant hangs on its seed, the number and Python's version of `random.Random` alone.
What a format checks first (a tar header's sum, a PNG chunk's CRC, JSON's brackets) is
mended in most mutants: else all of them would die at the door.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

_NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 511, 512, 513, 32767, 32768, 65535)
_NUMBERS += (2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63)
_NUMBERS += (-1, -2, -128, -32768, -(2**31), -(2**63), 10**11, 2**64 - 1)
_TEXTS = (
    "",
    " ",
    "\0",
    "..",
    "../../x",
    "/etc/passwd",
    "é\u202e",
    "\ud800",
    "x" * 5000,
)
_TEXTS += ("nan", "-0", "1e999", "0-99999999999", "{}", "%s", "*", "a.b", "a/b", "null")
_TEXTS += ("memory://x/{0..99999999}", "https://", "file:", "auto", "float32", "patch")
_DIGITS = re.compile(rb"\d+")
_WORDS = re.compile(rb"[A-Za-z_][A-Za-z_0-9]*")


def mutate(
    name: str, data: bytes, draw: random.Random, others: Sequence[bytes]
) -> bytes:
    """Returns a mutant of a seed.

    Args:
        name: the seed's file name, whose suffix tells the format.
        data: its bytes.
        draw: where all chance comes from.
        others: seeds to splice with.
    """
    if name.endswith(".json") and draw.random() < 0.7:
        return mutate_json(data, draw)
    if name.endswith(".gz") and draw.random() < 0.7:
        try:
            inner = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            return mutate_bytes(data, draw, others)
        return gzip.compress(mutate(name[:-3], inner, draw, others), 1, mtime=0)
    if name.endswith(".npz") and draw.random() < 0.5:
        return _mutate_zip(data, draw, others)
    mutant = mutate_bytes(data, draw, others)
    mend = _MENDERS.get(name.rpartition(".")[2])
    return mend(mutant) if mend is not None and draw.random() < 0.8 else mutant


def mutate_bytes(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """Returns bytes after one to six changes of which nothing is known."""
    found = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        _CHANGES[draw.randrange(len(_CHANGES))](found, draw, others)
    return bytes(found[: 2**22])


def _place(found: bytearray, draw: random.Random) -> int:
    """Returns a place: headers come first, so half of all changes fall on them."""
    limit = len(found) if draw.random() < 0.5 else min(len(found), 600)
    return draw.randrange(limit + 1)


def _flip(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    if found:
        found[_place(found, draw) % len(found)] ^= 1 << draw.randrange(8)


def _byte(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    if found:
        found[_place(found, draw) % len(found)] = draw.choice(
            (0, 1, 9, 10, 32, 47, 255)
        )


def _number(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    size, order = draw.choice((1, 2, 4, 8)), draw.choice(("little", "big"))
    value = draw.choice(_NUMBERS) % 2 ** (8 * size)
    at = _place(found, draw)
    found[at : at + size] = value.to_bytes(size, order)


def _digits(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    places = list(_DIGITS.finditer(found[: 2**16]))
    if places:
        place, number = draw.choice(places), str(draw.choice(_NUMBERS)).encode()
        if draw.random() < 0.5:
            number = number.rjust(place.end() - place.start(), b"0")[-32:]
        found[place.start() : place.end()] = number


def _word(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    places = list(_WORDS.finditer(found[: 2**16]))
    if places:
        place, other = draw.choice(places), draw.choice(places)
        text = draw.choice(
            (other[0], draw.choice(_TEXTS).encode(errors="surrogatepass"))
        )
        found[place.start() : place.end()] = text


def _cut(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    del found[_place(found, draw) :]


def _remove(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    at = _place(found, draw)
    del found[at : at + draw.choice((1, 4, 16, 100, 512, 5000))]


def _repeat(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    at, size = _place(found, draw), draw.choice((1, 16, 200, 512, 1024, 5000))
    found[at:at] = found[at : at + size] * draw.choice((1, 2, 20))


def _noise(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    at, size = _place(found, draw), draw.choice((1, 4, 64, 512))
    end = at + size if draw.random() < 0.5 else at
    found[at:end] = draw.randbytes(size)


def _zeros(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    at, size = _place(found, draw), draw.choice((4, 64, 512, 1024, 4096))
    found[at : at + size] = bytes(size)


def _splice(found: bytearray, draw: random.Random, others: Sequence[bytes]) -> None:
    other = draw.choice(others) if others else bytes(found)
    start = draw.randrange(len(other) + 1)
    at = _place(found, draw)
    if draw.random() < 0.5:  # formats of blocks of 512 bytes
        at, start = at // 512 * 512, start // 512 * 512
    found[at:] = other[start:]


_CHANGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip,
    _byte,
    _number,
    _number,
    _digits,
    _digits,
    _word,
    _cut,
    _remove,
    _repeat,
    _noise,
    _zeros,
    _splice,
)


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Returns JSON of which one to three values are others; bytes where it is none."""
    try:
        root = [json.loads(data)]
    except (ValueError, RecursionError):
        return mutate_bytes(data, draw, [])
    for _ in range(draw.choice((1, 1, 2, 3))):
        parent, key = draw.choice(list(_slots(root)))
        parent[key] = _other_value(parent[key], draw)
        if draw.random() < 0.15 and isinstance(parent, dict):
            del parent[key]
        elif draw.random() < 0.1 and isinstance(parent, dict):
            parent[draw.choice(_TEXTS)] = parent.pop(key)
        if not root:
            break
    text = json.dumps(root[0] if root else None)
    return text.encode(errors="surrogatepass")


def _slots(node: Any) -> list[tuple[Any, Any]]:
    """Returns (container, key) of every value in a JSON document."""
    found: list[tuple[Any, Any]] = []
    pending = [node]
    while pending:
        one = pending.pop()
        keys = one.keys() if isinstance(one, dict) else range(len(one))
        for key in keys:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                pending.append(one[key])
    return found


def _other_value(value: Any, draw: random.Random) -> Any:
    kind = draw.randrange(8)
    if kind == 0:
        return draw.choice((None, True, False, [], {}, "", [[]], {"": None}))
    if kind == 1:
        return draw.choice(_TEXTS)
    if kind == 2:
        return draw.choice((float("nan"), float("inf"), -0.0, 1e308, 0.5))
    if kind == 3:
        return [value] * draw.choice((1, 2, 100))
    if isinstance(value, int) and draw.random() < 0.5:
        return value + draw.choice((-1, 1))
    if isinstance(value, list) and value:
        return draw.choice((value[:-1], value + value[:1], value[::-1]))
    if isinstance(value, str) and value:
        return draw.choice((value[:-1], value + "x", value.upper(), value * 3))
    return draw.choice(_NUMBERS)


def mend_tar(data: bytes) -> bytes:
    """Puts the right sum into what still looks like a tar header."""
    found = bytearray(data)
    for at in range(0, len(found) - 511, 512):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


def mend_png(data: bytes) -> bytes:
    """Puts the right CRC behind every chunk that still fits."""
    found = bytearray(data)
    at = 8
    while at + 12 <= len(found):
        (length,) = struct.unpack_from(">I", found, at)
        end = at + 8 + length
        if end + 4 > len(found):
            break
        struct.pack_into(">I", found, end, zlib.crc32(found[at + 4 : end]))
        at = end + 4
    return bytes(found)


_MENDERS = {"tar": mend_tar, "png": mend_png}


def _mutate_zip(data: bytes, draw: random.Random, others: Sequence[bytes]) -> bytes:
    """Returns the archive with one member's bytes changed, sums and sizes right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {one: archive.read(one) for one in archive.namelist()}
    except (zipfile.BadZipFile, OSError, zlib.error, EOFError, NotImplementedError):
        return mutate_bytes(data, draw, others)
    if not members:
        return mutate_bytes(data, draw, others)
    chosen = draw.choice(list(members))
    members[chosen] = mutate_bytes(members[chosen], draw, others)
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return sink.getvalue()
