"""Writes the corpus's first seeds: ``python -m tests.fuzz.make_corpus``.

Sound files of every format, and the hostile forms one can think of. Inputs that did harm
once are added by hand beside them, under the name of what they broke.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.conftest import jpeg, sweep
from tests.fuzz.campaign import CORPUS
from tests.fuzz.mutation import mend_tar
from tests.fuzz.targets import BANKS
from tests.pipeline.samples.point_files import FILES

BLOCK = 512


def header(name: bytes, size: bytes | int = 0, kind: bytes = b"0", **at: bytes) -> bytes:
    """A ustar header with a right sum; ``at`` gives more bytes by offset, as ``_345``."""
    block = bytearray(BLOCK)
    block[: len(name)] = name[:100]
    block[100:108] = b"0000644\0"
    block[124:136] = b"%011o\0" % size if isinstance(size, int) else size.ljust(12, b"\0")
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
            ("é" * 60 + ".txt" if tar_format != tarfile.USTAR_FORMAT else "e.txt", b"x"),
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
        "pax-global": pax(record(b"path", b"all.txt"), kind=b"g") + member(b"p.cls", b"1"),
        "pax-global-size": pax(record(b"size", b"3"), kind=b"g") + member(b"p.cls", b"1"),
        "pax-solaris": pax(record(b"path", b"sol.txt"), kind=b"X") + member(b"p", b"x"),
        "duplicate-member": member(b"b.txt", b"1") + member(b"b.txt", b"2"),
        "duplicate-by-case": member(b"b.TXT", b"1") + member(b"b.txt", b"2"),
        "interleaved": member(b"b.txt", b"1") + member(b"c.txt", b"2") + member(b"b.cls", b"3"),
        "zero-size": member(b"b.txt", b"") + member(b"b.cls", b""),
        "size-past-the-end": header(b"b.txt", 2**33 - 1),
        "size-base-256": header(b"b.txt", b"\x80" + (7).to_bytes(11, "big")) + bytes(BLOCK),
        "size-base-256-huge": header(b"b.txt", b"\x80" + b"\x7f" * 11),
        "size-base-256-negative": header(b"b.txt", b"\xff" * 12),
        "size-spaces": header(b"b.txt", b" " * 12),
        "size-letters": header(b"b.txt", b"0000000000z\0"),
        "symlink": header(b"b.txt", 0, b"2", _157=b"/etc/passwd"),
        "symlink-with-size": header(b"b.txt", 512, b"2", _157=b"a.txt") ,
        "hard-link": header(b"b.txt", 0, b"1", _157=b"a.txt"),
        "devices": header(b"b.txt", 0, b"3") + header(b"c.txt", 0, b"4") + header(b"d.txt", 0, b"6"),
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
    made = {f"{name}.tar": GOOD + middle + LAST + END for name, middle in between.items()}
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
        "interleaved.tar.gz": gzip.compress(GOOD + between["interleaved"] + END, mtime=0),
        "duplicate.tar.gz": gzip.compress(GOOD + between["duplicate-member"] + END, mtime=0),
        # 96 MiB of zeros that nobody asked for.
        "bomb.tar.bz2": bz2.compress(GOOD + member(b"b.dat", bytes(96 * 2**20)) + LAST + END),
        "gz-in-gz.tar.gz": gzip.compress(gzip.compress(plain, mtime=0), mtime=0),
        "zstd.tar": b"\x28\xb5\x2f\xfd" + bytes(60),
    }
    return made


def points() -> dict[str, bytes]:
    """Sweeps by file name: each format as other libraries write it."""
    made = {}
    for name, make in FILES.items():
        suffix, data = make()
        made[f"{name.replace(' ', '-').replace(',', '')}.{suffix}"] = data
    odd = np.zeros((6, 4), "<f4")
    odd[:, 0] = [1, np.nan, np.inf, -np.inf, 1e30, 5]
    made |= {
        "four-columns.bin": sweep(3, 40),
        "not-finite.bin": odd.tobytes(),
        "odd-length.bin": sweep(3, 4)[:-3],
        "big-endian.bin": np.frombuffer(sweep(3, 40), "<f4").astype(">f4").tobytes(),
        "nothing.bin": b"",
    }
    return made


def images() -> dict[str, bytes]:
    """Small images by file name, one of each format and mode."""
    y, x = np.mgrid[:12, :20]
    pixels = np.stack([x * 12, y * 20, 255 - x - y], axis=-1).astype(np.uint8)
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6

    def saved(one: Image.Image, kind: str, **options: object) -> bytes:
        sink = io.BytesIO()
        one.save(sink, kind, **options)
        return sink.getvalue()

    grey16 = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    rgba = image.convert("RGBA")
    rgba.putalpha(image.convert("L"))
    frames = [image.rotate(90 * n).convert("P") for n in range(3)]
    made = {
        "rgb.jpg": saved(image, "JPEG"),
        "grey.jpg": saved(image.convert("L"), "JPEG"),
        "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
        "progressive.jpg": saved(image, "JPEG", progressive=True),
        "exif.jpg": saved(image, "JPEG", exif=exif.tobytes()),
        "rgb.png": saved(image, "PNG"),
        "rgba.png": saved(rgba, "PNG"),
        "grey-alpha.png": saved(rgba.convert("LA"), "PNG"),
        "grey16.png": saved(grey16, "PNG"),
        "palette.png": saved(image.convert("P"), "PNG", transparency=3),
        "palette-4.png": saved(image.quantize(7), "PNG", bits=4),
        "one-bit.png": saved(image.convert("1"), "PNG"),
        "exif.png": saved(image, "PNG", exif=exif.tobytes()),
        "animated.png": saved(image, "PNG", save_all=True, append_images=[rgba.convert("RGB")]),
        "animated.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "lossy.webp": saved(image, "WEBP"),
        "lossless.webp": saved(rgba, "WEBP", lossless=True),
        "animated.webp": saved(image, "WEBP", save_all=True, append_images=[image]),
        "rgb.bmp": saved(image, "BMP"),
        "palette.bmp": saved(image.convert("P"), "BMP"),
        "plain.tif": saved(image, "TIFF"),
        "deflated.tif": saved(image, "TIFF", compression="tiff_deflate", exif=exif),
        "lzw16.tif": saved(grey16, "TIFF", compression="tiff_lzw"),
        "float.tif": saved(image.convert("F"), "TIFF"),
        "plain.ppm": saved(image, "PPM"),
        "text.ppm": b"P3\n# x\n2 2 255\n" + b"1 2 3 " * 4,
        "sixteen.pgm": b"P5 2 2 65535\n" + bytes(range(8)),
        "bits.pbm": b"P1 3 2\n101 010\n",
    }
    png = made["rgb.png"]
    jpg = made["rgb.jpg"]
    at = jpg.index(b"\xff\xc0") + 5
    huge = struct.pack(">II", 50_000, 50_000)
    lying = png[:16] + huge + png[24:29] + zlib.crc32(png[12:16] + huge + png[24:29]).to_bytes(4, "big") + png[33:]
    made |= {
        "huge-header.png": lying,
        "huge-header.jpg": jpg[:at] + b"\xff\xff\xff\xff" + jpg[at + 4 :],
        "zero-header.jpg": jpg[:at] + bytes(4) + jpg[at + 4 :],
        "huge-header.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff" * 6,
        "huge-header.gif": b"GIF89a" + b"\xff" * 4 + bytes(3) + b"\x2c" + bytes(20),
        "cut.jpg": jpg[: len(jpg) * 2 // 3],
        "cut.png": png[:-20],
        "garbage-behind.jpg": jpg + b"x" * 40,
        "nothing.jpg": b"",
        "text.jpg": b"this is no image",
        "exif-loop.jpg": made["exif.jpg"].replace(b"MM\0*\0\0\0\x08", b"MM\0*\0\0\0\0"),
    }
    return made


def manifests() -> dict[str, bytes]:
    """Documents that are hostile to whoever parses them; sound ones lie elsewhere."""
    bomb = b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, two in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += b"%c: &%c [" % (ord(two), ord(two)) + b", ".join([b"*%c" % ord(one)] * 9) + b"]\n"
    deep = 1200
    return {
        "job-alias-bomb.yaml": bomb + b"bank: *i\n",
        "job-alias-bomb-as-teachers.yaml": bomb + b"bank: ./b\nteachers: {net: *i}\n",
        "job-alias-of-itself.yaml": b"bank: &a [*a]\n",
        "job-alias-mapping-of-itself.yaml": b"bank: x\nteachers: &a {net: *a}\n",
        "job-merge-of-itself.yaml": b"a: &a {<<: *a}\n",
        "job-deep-lists.yaml": b"bank: " + b"[" * deep + b"]" * deep,
        "job-deep-mappings.yaml": b"{a: " * deep + b"1" + b"}" * deep,
        "job-deep-lines.yaml": b"".join(b" " * n + b"a:\n" for n in range(250)),
        "job-same-key.yaml": b"bank: x\nbank: y\n",
        "job-keys-of-every-kind.yaml": b"1: a\nnull: b\n? [1, 2]\n: c\n? {a: b}\n: d\n1.5: e\n",
        "job-python-tag.yaml": b"bank: !!python/object/apply:os.system [id]\n",
        "job-binary.yaml": b"bank: !!binary aGVsbG8=\nteachers: !!set {a, b}\n",
        "job-date.yaml": b"bank: 2026-11-22\nteachers: {net: {model: 2026-11-22}}\n",
        "job-big-number.yaml": b"bank: x\nblock_rows: " + b"9" * 5000 + b"\n",
        "job-two-documents.yaml": b"bank: x\n---\nbank: y\n",
        "job-utf16.yaml": "bank: x\n".encode("utf-16"),
        "job-nul.yaml": b"bank: \"x\\0y\"\nteachers: {net: {model: timm:x}}\n",
        "job-long-word.yaml": b"bank: " + b"x" * 20_000 + b"\n",
        "job-many-keys.yaml": b"".join(b"k%d: 1\n" % n for n in range(3000)),
        "job-list.yaml": b"- bank\n",
        "job-nothing.yaml": b"",
        "override-plain.txt": b"teachers.net.batch=4",
        "override-deep.txt": b"teachers.net.sizes.0.1=" + b"[" * deep,
        "override-place.txt": b"teachers.net.sizes.99999999999999999999=1",
        "override-digit.txt": "teachers.net.sizes.²=1".encode(),
        "override-nothing.txt": b"=",
        "bank-deep.json": b'{"schema_version": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        "bank-version.json": b'{"schema_version": true}',
        "bank-list.json": b"[]",
        "bank-number.json": b"1" * 5000,
        "dataset-deep.json": b"[" * 5000,
        "dataset-nan.json": b'{"schema_version": NaN, "shards": []}',
        "commit-runs.json": b'{"content": {"pass_id": "p", "fingerprint": "f", "block": 0, "shard": "s", "rows": 4, "valid": 0, "invalid": {"x": "0-99999999999"}, "objects": {}}}',
        "commit-runs-odd.json": b'{"content": {"pass_id": "p", "fingerprint": "f", "block": 0, "shard": "s", "rows": 4, "valid": 0, "invalid": {"x": "3-1,-,5"}, "objects": {}}}',
        "metadata-plain.json": b'{"label": 3, "time": 12.5, "cameras": {"front": {"intrinsics": [[500, 0, 320], [0, 500, 240], [0, 0, 1]], "lidar2cam": [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]}}}',
        "metadata-deep.json": b'{"cameras": {"front": {"intrinsics": ' + b"[" * 900 + b"1" + b"]" * 900 + b"}}}",
        "metadata-huge-numbers.json": b'{"label": ' + b"9" * 400 + b', "time": ' + b"9" * 400 + b', "cameras": {"front": {"intrinsics": [[1e999, 0, 0], [0, 1, 0], [0, 0, 1]]}}}',
    }


def banks() -> dict[str, bytes]:
    """Files of a bank that are well formed and lie: names that leave it, huge counts."""
    with zipfile.ZipFile(BANKS / "schema-1.zip") as stored:
        record = stored.read("bank/bank.json")
        commit = stored.read("bank/commits/rows/00000000.json")
        blocks = stored.read("bank/blocks.parquet")
        rows = stored.read("bank/dataset/part-00000.parquet")

    def edited(edit: Callable[[dict], object], data: bytes = record) -> bytes:
        document = json.loads(data)
        edit(document)
        return json.dumps(document).encode()

    def table(data: bytes, edit: Callable[[pa.Table], pa.Table]) -> bytes:
        sink = io.BytesIO()
        pq.write_table(edit(pq.read_table(io.BytesIO(data))), sink, compression="zstd")
        return sink.getvalue()

    def shorter(found: pa.Table) -> pa.Table:
        lists = [one[:-1] for one in found["crc32c"].to_pylist()]
        place = found.schema.get_field_index("crc32c")
        return found.set_column(place, "crc32c", pa.array(lists, pa.list_(pa.int64())))

    def no_rows(found: pa.Table) -> pa.Table:
        place = found.schema.get_field_index("row")
        return found.set_column(place, "row", pa.array([5] * len(found), pa.int64()))

    return {
        "pass-leaves-the-bank/bank.json": edited(
            lambda one: one["passes"][1].update(id="../../../stray")
        ),
        "index-leaves-the-bank/bank.json": edited(
            lambda one: one["shards"][0].update(part="../../stray")
        ),
        "array-leaves-the-bank/bank.json": edited(
            lambda one: one["passes"][1]["outputs"][0]["arrays"][0].update(
                path="../../stray"
            )
        ),
        "many-blocks/bank.json": edited(
            lambda one: one["shards"][1].update(blocks=10**12, samples=10**12)
        ),
        "lengths-that-are-no-numbers/bank.json": edited(
            lambda one: one["passes"][1]["outputs"][0]["arrays"][0].update(
                chunk_rows=2.0
            )
        ),
        "commit-of-many-rows/commits/rows/00000000.json": edited(
            lambda one: one["content"].update(invalid={"x": "0-99999999999"}), commit
        ),
        "commit-leaves-the-bank/commits/rows/00000000.json": edited(
            lambda one: one["content"].update(objects={"../../stray": [9, 9]}), commit
        ),
        "blocks-of-two-lengths/blocks.parquet": table(blocks, shorter),
        "blocks-without-objects/blocks.parquet": table(
            blocks, lambda one: one.drop_columns(["objects"])
        ),
        "rows-of-no-shard/dataset/part-00000.parquet": table(rows, no_rows),
        "rows-without-offsets/dataset/part-00000.parquet": table(
            rows, lambda one: one.drop_columns(["offset"])
        ),
        "run-of-a-list/runs/20261122T202044Z-8e92d0.json": b"[1, 2]",
        "run-of-numbers/runs/20261122T202044Z-8e92d0.json": b'{"result": 3, "run": 1}',
    }


GROUPS: dict[str, Callable[[], dict[str, bytes]]] = {
    "tar": tars,
    "points": points,
    "images": images,
    "manifests": manifests,
    "bank": banks,
}


def main() -> int:
    """Writes every seed that is not there yet; returns the exit code."""
    for group, make in GROUPS.items():
        folder: Path = CORPUS / group
        for name, data in make().items():
            if not (folder / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
