"""Writes the corpus's first seeds: ``python -m tests.fuzz.make_corpus``.

Sound files of every format, and the hostile forms one can think of. Inputs that did
harm once are added by hand beside them, under the name of what they broke.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.conftest import sweep
from tests.fuzz.campaign import CORPUS
from tests.fuzz.tar_forms import tars
from tests.fuzz.targets import BANKS
from tests.pipeline.samples.point_files import FILES


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
        "animated.png": saved(
            image, "PNG", save_all=True, append_images=[rgba.convert("RGB")]
        ),
        "animated.gif": saved(
            frames[0], "GIF", save_all=True, append_images=frames[1:]
        ),
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
    lying = (
        png[:16]
        + huge
        + png[24:29]
        + zlib.crc32(png[12:16] + huge + png[24:29]).to_bytes(4, "big")
        + png[33:]
    )
    made |= {
        "huge-header.png": lying,
        "huge-header.jpg": jpg[:at] + b"\xff\xff\xff\xff" + jpg[at + 4 :],
        "zero-header.jpg": jpg[:at] + bytes(4) + jpg[at + 4 :],
        "huge-header.webp": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0"
        + bytes(4)
        + b"\xff" * 6,
        "huge-header.gif": b"GIF89a" + b"\xff" * 4 + bytes(3) + b"\x2c" + bytes(20),
        "cut.jpg": jpg[: len(jpg) * 2 // 3],
        "cut.png": png[:-20],
        "garbage-behind.jpg": jpg + b"x" * 40,
        "nothing.jpg": b"",
        "text.jpg": b"this is no image",
        "exif-loop.jpg": made["exif.jpg"].replace(b"MM\0*\0\0\0\x08", b"MM\0*\0\0\0\0"),
    }
    return made


COMMIT = (
    b'{"content": {"pass_id": "p", "fingerprint": "f", "block": 0, "shard": "s", '
    b'"rows": 4, "valid": 0, "invalid": {"x": "RUNS"}, "objects": {}}}'
)
METADATA = (
    b'{"label": 3, "time": 12.5, "cameras": {"front": {"intrinsics": '
    b"[[500, 0, 320], [0, 500, 240], [0, 0, 1]], "
    b'"lidar2cam": [[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]]}}}'
)


def manifests() -> dict[str, bytes]:
    """Documents that are hostile to whoever parses them; sound ones lie elsewhere."""
    bomb = b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    for one, two in zip("abcdefgh", "bcdefghi", strict=True):
        bomb += (
            b"%c: &%c [" % (ord(two), ord(two))
            + b", ".join([b"*%c" % ord(one)] * 9)
            + b"]\n"
        )
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
        "job-keys-of-every-kind.yaml": b"1: a\nnull: b\n? [1, 2]\n"
        b": c\n? {a: b}\n: d\n1.5: e\n",
        "job-python-tag.yaml": b"bank: !!python/object/apply:os.system [id]\n",
        "job-binary.yaml": b"bank: !!binary aGVsbG8=\nteachers: !!set {a, b}\n",
        "job-date.yaml": b"bank: 2026-11-22\nteachers: {net: {model: 2026-11-22}}\n",
        "job-big-number.yaml": b"bank: x\nblock_rows: " + b"9" * 5000 + b"\n",
        "job-two-documents.yaml": b"bank: x\n---\nbank: y\n",
        "job-utf16.yaml": "bank: x\n".encode("utf-16"),
        "job-nul.yaml": b'bank: "x\\0y"\nteachers: {net: {model: timm:x}}\n',
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
        "commit-runs.json": COMMIT.replace(b"RUNS", b"0-99999999999"),
        "commit-runs-odd.json": COMMIT.replace(b"RUNS", b"3-1,-,5"),
        "metadata-plain.json": METADATA,
        "metadata-deep.json": b'{"cameras": {"front": {"intrinsics": '
        + b"[" * 900
        + b"1"
        + b"]" * 900
        + b"}}}",
        "metadata-huge-numbers.json": b'{"label": '
        + b"9" * 400
        + b', "time": '
        + b"9" * 400
        + b', "cameras": {"front": {"intrinsics": '
        + b"[[1e999, 0, 0], [0, 1, 0], [0, 0, 1]]}}}",
    }


def banks() -> dict[str, bytes]:
    """Files of a bank that are well formed and lie: names that leave it, counts."""
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
