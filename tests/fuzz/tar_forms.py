"""Shards in every form that a tar can take, and in some that it must not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile

from tests.conftest import jpeg, sweep
from tests.fuzz.mutation import mend_tar

BLOCK = 512


def header(
    name: bytes, size: bytes | int = 0, kind: bytes = b"0", **at: bytes
) -> bytes:
    """A ustar header with a right sum; ``at``: more bytes by offset, as ``_345``."""
    block = bytearray(BLOCK)
    block[: len(name)] = name[:100]
    block[100:108] = b"0000644\0"
    block[124:136] = (
        b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
    )
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    for place, value in at.items():
        start = int(place[1:])
        block[start : start + len(value)] = value
    return mend_tar(bytes(block))


def member(name: bytes, data: bytes, kind: bytes = b"0", **at: bytes) -> bytes:
    """A header and its padded data."""
    return header(name, len(data), kind, **at) + data + bytes(-len(data) % BLOCK)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    """An extension header that holds these records as they are."""
    return member(b"PaxHeaders/x", b"".join(records), kind)


def record(keyword: bytes, value: bytes) -> bytes:
    """A PAX record of the right length."""
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return str(length).encode() + rest


GOOD = member(b"a.cls", b"1") + member(b"a.txt", b"hello")
LAST = member(b"z.cls", b"2") + member(b"z.txt", b"world")
END = bytes(2 * BLOCK)


def library_tar(tar_format: int) -> bytes:
    """A shard as the standard library writes it, with a long name and an odd one."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tar_format) as archive:
        for name, data in (
            ("dir/one.jpg", jpeg(1, 8, 8)),
            ("dir/one.cls", b"3"),
            (
                "é" * 60 + ".txt" if tar_format != tarfile.USTAR_FORMAT else "e.txt",
                b"x",
            ),
            ("l" * 90 + "/" + "k" * 60 + ".bin", sweep(1, 9)),
            ("three.json", b'{"label": 3}'),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue().rstrip(b"\0") + bytes(1024 + BLOCK)


def tars() -> dict[str, bytes]:
    """Shards by file name."""
    plain = GOOD + LAST + END
    sparse_map = struct.pack("12s12s", b"0" * 11, b"00000000100") * 4
    between: dict[str, bytes] = {
        "gnu-sparse": member(b"s.bin", b"x" * 100, b"S", _386=sparse_map, _482=b"\0"),
        "gnu-sparse-maps": header(b"s.bin", 0, b"S", _386=sparse_map, _482=b"\1")
        + (bytes(504) + b"\1" + bytes(7)) * 3
        + bytes(BLOCK),
        "gnu-sparse-endless": header(b"s.bin", 0, b"S", _482=b"\1")
        + (bytes(504) + b"\1" + bytes(7)) * 4,
        "pax-sparse": pax(
            record(b"GNU.sparse.major", b"1"),
            record(b"GNU.sparse.name", b"s.bin"),
            record(b"GNU.sparse.realsize", b"99999999999"),
        )
        + member(b"GNUSparseFile/s.bin", b"1\n0\n5\n".ljust(512, b"\0") + b"12345"),
        "gnu-long-name": member(b"././@LongLink", b"n" * 300 + b".txt\0", b"L")
        + member(b"n", b"x"),
        "gnu-long-empty": member(b"././@LongLink", b"", b"L") + member(b"n.txt", b"x"),
        "gnu-long-huge": header(b"././@LongLink", 2**30, b"L"),
        "gnu-long-alone": member(b"././@LongLink", b"n" * 200 + b"\0", b"L") + END,
        "gnu-long-many": member(b"././@LongLink", b"n.txt\0", b"L") * 40
        + member(b"n", b"x"),
        "ustar-prefix": member(b"base.txt", b"x", _345=b"p" * 155),
        "pax-path": pax(record(b"path", b"p" * 500 + b".txt")) + member(b"p", b"x"),
        "pax-length-0": pax(b"0 path=a.txt\n") + member(b"p.txt", b"x"),
        "pax-length-short": pax(b"5 path=a.txt\n") + member(b"p.txt", b"x"),
        "pax-length-long": pax(b"9999999 path=a.txt\n") + member(b"p.txt", b"x"),
        "pax-no-equals": pax(b"12 path.a.tx\n") + member(b"p.txt", b"x"),
        "pax-no-newline": pax(b"14 path=a.txt!") + member(b"p.txt", b"x"),
        "pax-size-huge": pax(record(b"size", b"9" * 19)) + member(b"p.txt", b"x"),
        "pax-size-negative": pax(record(b"size", b"-1")) + member(b"p.txt", b"x"),
        "pax-size-other": pax(record(b"size", b"600")) + member(b"p.txt", b"x" * 700),
        "pax-path-empty": pax(record(b"path", b"")) + member(b"p.txt", b"x"),
        "pax-path-nul": pax(record(b"path", b"a\0b.txt")) + member(b"p.txt", b"x"),
        "pax-path-latin1": pax(record(b"path", b"\xe9\xff.txt")) + member(b"p", b"x"),
        "pax-path-dots": pax(record(b"path", b"../../up.txt")) + member(b"p", b"x"),
        "pax-global": pax(record(b"path", b"all.txt"), kind=b"g")
        + member(b"p.cls", b"1"),
        "pax-global-size": pax(record(b"size", b"3"), kind=b"g")
        + member(b"p.cls", b"1"),
        "pax-solaris": pax(record(b"path", b"sol.txt"), kind=b"X") + member(b"p", b"x"),
        "duplicate-member": member(b"b.txt", b"1") + member(b"b.txt", b"2"),
        "duplicate-by-case": member(b"b.TXT", b"1") + member(b"b.txt", b"2"),
        "interleaved": member(b"b.txt", b"1")
        + member(b"c.txt", b"2")
        + member(b"b.cls", b"3"),
        "zero-size": member(b"b.txt", b"") + member(b"b.cls", b""),
        "size-past-the-end": header(b"b.txt", 2**33 - 1),
        "size-base-256": header(b"b.txt", b"\x80" + (7).to_bytes(11, "big"))
        + bytes(BLOCK),
        "size-base-256-huge": header(b"b.txt", b"\x80" + b"\x7f" * 11),
        "size-base-256-negative": header(b"b.txt", b"\xff" * 12),
        "size-spaces": header(b"b.txt", b" " * 12),
        "size-letters": header(b"b.txt", b"0000000000z\0"),
        "symlink": header(b"b.txt", 0, b"2", _157=b"/etc/passwd"),
        "symlink-with-size": header(b"b.txt", 512, b"2", _157=b"a.txt"),
        "hard-link": header(b"b.txt", 0, b"1", _157=b"a.txt"),
        "devices": header(b"b.txt", 0, b"3")
        + header(b"c.txt", 0, b"4")
        + header(b"d.txt", 0, b"6"),
        "directory": header(b"b.txt/", 0, b"5") + member(b"b.txt/c.txt", b"x"),
        "directory-with-size": header(b"b.d/", 512, b"5") + member(b"c.txt", b"x"),
        "unknown-type": member(b"b.txt", b"x", b"Z"),
        "old-type": member(b"b.txt", b"x", b"\0"),
        "name-nul": member(b"b\0c.txt", b"x"),
        "name-latin1": member(b"b\xe9.txt", b"x"),
        "name-odd-utf8": member("\u202eb\u0301\u00a0.txt".encode(), b"x"),
        "name-cut-utf8": member(b"x" * 95 + b".t" + "é€".encode()[:3], b"x"),
        "name-absolute": member(b"/etc/b.txt", b"x"),
        "name-dots": member(b"a/../../b.txt", b"x"),
        "name-drive": member(b"C:\\b.txt", b"x"),
        "name-only-extension": member(b".txt", b"x") + member(b"d/.txt", b"x"),
        "name-empty": member(b"", b"x"),
        "name-many-dots": member(b"b......txt", b"x") + member(b"b..", b"x"),
        "checksum": b"x" * BLOCK,
        "zero-block": bytes(BLOCK),
        "end-in-the-middle": END,
        "no-magic": bytes(member(b"b.txt", b"x")).replace(b"ustar", b"\0\0\0\0\0"),
    }
    made = {
        f"{name}.tar": GOOD + middle + LAST + END for name, middle in between.items()
    }
    made |= {
        "library-gnu.tar": library_tar(tarfile.GNU_FORMAT),
        "library-pax.tar": library_tar(tarfile.PAX_FORMAT),
        "library-ustar.tar": library_tar(tarfile.USTAR_FORMAT),
        "concatenated.tar": plain + plain,
        "no-end.tar": GOOD + LAST,
        "cut-in-header.tar": plain[:1200],
        "cut-in-data.tar": GOOD + member(b"b.txt", b"x" * 900)[:1000],
        "empty.tar": END,
        "nothing.tar": b"",
        "one.tar.gz": gzip.compress(plain, mtime=0),
        "one.tar.bz2": bz2.compress(plain),
        "one.tar.xz": lzma.compress(plain),
        "two-streams.tar.gz": gzip.compress(plain[:1500], mtime=0)
        + gzip.compress(plain[1500:], mtime=0),
        "cut.tar.gz": gzip.compress(plain, mtime=0)[:-20],
        "zeros-behind.tar.gz": gzip.compress(plain, mtime=0) + bytes(100),
        "interleaved.tar.gz": gzip.compress(
            GOOD + between["interleaved"] + END, mtime=0
        ),
        "duplicate.tar.gz": gzip.compress(
            GOOD + between["duplicate-member"] + END, mtime=0
        ),
        # 96 MiB of zeros that nobody asked for.
        "bomb.tar.bz2": bz2.compress(
            GOOD + member(b"b.dat", bytes(96 * 2**20)) + LAST + END
        ),
        "gz-in-gz.tar.gz": gzip.compress(gzip.compress(plain, mtime=0), mtime=0),
        "zstd.tar": b"\x28\xb5\x2f\xfd" + bytes(60),
    }
    return made
