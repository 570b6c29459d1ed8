"""One sweep of 64 points in every format, as other libraries write it.

The compressed PCD is what liblzf (through python-neo-lzf 0.3.5) made of its columns.
"""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather

from manifests.inputs import PointsInput

NAMES = ("x", "y", "z", "intensity", "t")
LZF = base64.b64decode(
    "AQAAQAABgD8gBQBAIAIgAwCAIAMAoCADAMAgAwDgIANAAODTHwFgwOAVAwAgIB/gEwMBwL/gFQMA"
    "ACAf4BQDQXvgEgMAwCAb4BMDACAho+ATAwBgIB/gEwPgE3vg2hsfAQIDBAUGBwgJCgsMDQ4PEBES"
    "ExQVFhcYGRobHB0eHyAdISIjJCUmJygpKissLS4vMDEyMzQ1Njc4OTo7PD0+IZuAAAHoA4AHAdAH"
    "gAcBuAuABwGgD4AHAYgTgAcBcBeABwFYG4AHAUAfgAcBKCOABwEQJ4AHAfgqgAcB4C6ABwHIMoAH"
    "AbA2gAcBmDqABwGAPoAHAWhCgAcBUEaABwE4SoAHASBOgAcBCFKABwHwVYAHAdhZgAcBwF2ABwGo"
    "YYAHAZBlgAcBeGmABwFgbYAHAUhxgAcBMHWABwEYeYAHAQB9IAMgAAHogCAEIAAB0IQgBCAAAbiI"
    "IAQgAAGgjCAEIAABiJAgBCAAAXCUIAQgAAFYmCAEIAABQJwgBCAAASigIAQgAAEQpCAEIAAB+Kcg"
    "BCAAAeCrIAQgAAHIryAEIAABsLMgBCAAAZi3IAQgAAGAuyAEIAAAaENlIAABUMMgBCAAATjHIAQg"
    "AAEgyyAEIAABCM8gBCAAAfDSIAQgAAHY1iAEIAABwNogBCAAAajeIAQgAAGQ4iAEIAABeOYgBCAA"
    "AWDqIAQgAAFI7iAEIAABMPIgBCAAARj2IAQgAA=="
)
HEADER = """# .PCD v0.7 - Point Cloud Data file format
VERSION 0.7
FIELDS x y z intensity t
SIZE 4 4 4 1 8
TYPE F F F U I
COUNT 1 1 1 1 1
WIDTH 64
HEIGHT 1
VIEWPOINT 0 0 0 1 0 0 0
POINTS 64
DATA {}
"""


def columns_64() -> dict[str, np.ndarray]:
    """A sweep of 64 points, column by column, each of another type."""
    n = np.arange(64)
    return {
        "x": (n % 8).astype("<f4"),
        "y": (n // 8 - 3.5).astype("<f4"),
        "z": np.full(64, 0.5, "<f4"),
        "intensity": n.astype("u1"),
        "t": (n * 1000).astype("<i8"),
    }


def structured() -> np.ndarray:
    found = columns_64()
    rows = np.zeros(64, [(name, one.dtype) for name, one in found.items()])
    for name, values in found.items():
        rows[name] = values
    return rows


def expected(names: Sequence[str] = NAMES, intensity_max: float = 1.0) -> np.ndarray:
    """The matrix that every file below holds."""
    found = columns_64()
    rows = np.stack([found[name].astype(np.float64) for name in names], axis=1)
    if "intensity" in names:
        rows[:, list(names).index("intensity")] /= intensity_max
    return rows.astype(np.float32)


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, array, version=version)
    return sink.getvalue()


def npz(compressed: bool = False, **arrays: np.ndarray) -> bytes:
    sink = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(sink, **arrays)
    return sink.getvalue()


def feather(table: Mapping[str, Any], **options: Any) -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.table(dict(table)), sink, **options)
    return sink.getvalue()


def pcd_binary(rows: np.ndarray | None = None) -> bytes:
    rows = structured() if rows is None else rows
    return HEADER.format("binary").encode() + rows.tobytes()


def pcd_text(separator: str = "\n") -> bytes:
    lines = [" ".join(map(repr, row)) for row in structured().tolist()]
    text = HEADER.format("ascii") + "\n".join(lines) + "\n"
    return text.replace("\n", separator).encode()


def pcd_compressed(packed: bytes = LZF, size: int = 64 * 21) -> bytes:
    head = HEADER.format("binary_compressed").encode()
    return head + struct.pack("<II", len(packed), size) + packed


def declare(member: str, columns: Sequence[str] = NAMES, **fields: Any) -> PointsInput:
    return PointsInput(kind="points", member=member, columns=tuple(columns), **fields)


FILES: dict[str, Callable[[], tuple[str, bytes]]] = {
    "bin": lambda: ("bin", expected().astype("<f4").tobytes()),
    "npy": lambda: ("npy", npy(expected())),
    "npy float64": lambda: ("npy", npy(expected().astype(np.float64))),
    "npy big-endian": lambda: ("npy", npy(expected().astype(">f4"))),
    "npy columns first": lambda: ("npy", npy(np.asfortranarray(expected()))),
    "npy version 2": lambda: ("npy", npy(expected(), (2, 0))),
    "npy version 3": lambda: ("npy", npy(expected(), (3, 0))),
    "npy fields": lambda: ("npy", npy(structured())),
    "npz one array": lambda: ("npz", npz(points=expected())),
    "npz packed": lambda: ("npz", npz(compressed=True, points=expected())),
    "npz one array of fields": lambda: ("npz", npz(arr_0=structured())),
    "npz by column": lambda: ("npz", npz(compressed=True, label=0, **columns_64())),
    "feather": lambda: ("feather", feather(columns_64())),
    "feather raw": lambda: (
        "feather",
        feather(columns_64(), compression="uncompressed"),
    ),
    "feather zstd": lambda: ("feather", feather(columns_64(), compression="zstd")),
    "feather chunks": lambda: ("feather", feather(columns_64(), chunksize=7)),
    "feather more": lambda: ("feather", feather({"s": ["a"] * 64} | columns_64())),
    "pcd binary": lambda: ("pcd", pcd_binary()),
    "pcd binary, new line": lambda: ("pcd", pcd_binary() + b"\n"),
    "pcd text": lambda: ("pcd", pcd_text()),
    "pcd text of Windows": lambda: ("pcd", pcd_text("\r\n")),
    "pcd compressed": lambda: ("pcd", pcd_compressed()),
}
