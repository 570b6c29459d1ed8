"""What the tests of stored inputs share: images of many kinds, and a bank of copies."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from tests.conftest import write_job, write_tar

SIDE = 20
STORED = {"image": {"short_side": SIDE, "quality": 95}}
BROKEN = "s0-0005"
BLOCK_ROWS = 4


def picture(seed: int, height: int, width: int) -> Image.Image:
    """A smooth picture drawn from a seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def _turned(image: Image.Image) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(image, "JPEG", quality=98, exif=exif)


def _with_alpha(image: Image.Image) -> bytes:
    rgba = image.convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize(image.size))
    return saved(rgba, "PNG")


MAKERS: dict[str, Callable[[], bytes]] = {
    "s0-0000": lambda: saved(picture(0, 40, 60), "JPEG", quality=98),
    "s0-0001": lambda: saved(picture(1, 61, 33).convert("L"), "PNG"),
    "s0-0002": lambda: saved(picture(2, 50, 50).convert("CMYK"), "JPEG", quality=98),
    "s0-0003": lambda: _with_alpha(picture(3, 30, 70)),
    "s0-0004": lambda: _turned(picture(4, 44, 90)),
    BROKEN: lambda: saved(picture(5, 40, 60), "JPEG")[:300],
    "s1-0000": lambda: saved(picture(6, 12, 15), "PNG"),
    "s1-0001": lambda: saved(picture(7, 200, 31).convert("P"), "PNG"),
    "s1-0002": lambda: saved(picture(8, 47, 47), "WEBP", lossless=True),
    "s1-0003": lambda: saved(picture(9, 25, 80), "JPEG", quality=98),
    "s1-0004": lambda: saved(picture(10, 33, 34), "PNG"),
}


def upright(key: str) -> Image.Image:
    """The upright RGB image of a sample, on white, by other means than ours."""
    image: Image.Image = Image.open(io.BytesIO(MAKERS[key]()))
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def resized(key: str) -> Image.Image:
    """The copy of a sample's image before it became a JPEG."""
    image = upright(key)
    factor = min(1.0, SIDE / min(image.size))
    width, height = (int(side * factor + 0.5) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def store_job(folder: Path, name: str = "job.yaml", **fields: Any) -> Path:
    """Writes shards of every kind of image, and a job that stores them."""
    for shard in ("s0", "s1"):
        members = []
        for number, (key, make) in enumerate(MAKERS.items()):
            if key.startswith(shard):
                members.append((f"{key}.jpg", make()))
                members.append((f"{key}.cls", str(number % 5).encode()))
        write_tar(folder / "data" / f"{shard}.tar", members)
    return write_job(
        folder,
        name,
        **{
            "dataset": {"shards": "./data/s?.tar", "license": "cc-by-4.0"},
            "views": {"random": 2},
            "stored_inputs": STORED,
            "limits": {"max_invalid_fraction": 1.0},
            "block_rows": BLOCK_ROWS,
            **fields,
        },
    )
