"""How fast a block is encoded and written, against ``np.save`` of the same bytes.

    python benchmarks/write_block.py [--directory DIR] [--rounds 7]

Ours is all that a worker does after the teacher: look for rows that are not finite,
encode, checksum each chunk and the object, write create-only. The reference writes the
same array with ``np.save`` to a new file, without any check. Both are interleaved in
one process, into the page cache, no fsync; medians of the rounds.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from manifests.storage import Store
from manifests.teacher import OutputConfig
from pipeline.bank.arrays import object_name
from pipeline.bank.encoding import Encoding
from pipeline.bank.encodings import make_encoding
from pipeline.bank.objects import encode_object, object_crc32c, object_size

ROWS, GRID = 256, (14, 14, 768)
PRESETS = ("raw", "lossless")


def bfloat16_block() -> npt.NDArray[np.uint16]:
    """Returns (rows, y, x, channel) bit patterns of normal numbers, 77 MB."""
    draws = np.random.default_rng(0).standard_normal((ROWS, *GRID), np.float32)
    return (draws.view(np.uint32) >> 16).astype(np.uint16)


def write(store: Store, encoding: Encoding, values: npt.NDArray[np.uint16]) -> int:
    """Encodes and writes one block as a worker does; returns the bytes stored."""
    (spec,) = encoding.arrays("teacher/image/224x224", ROWS)
    encoded = encoding.encode(values, np.ones(ROWS, np.bool_))
    parts = encode_object(encoded.arrays[""], spec, ROWS)
    size_bytes, _ = object_size(parts), object_crc32c(parts)
    if not store.create(object_name(spec, 0), parts):
        raise RuntimeError("a block of an earlier round is still there")
    return size_bytes


def timed(action: Callable[[], object]) -> tuple[float, float]:
    """Returns (wall, processor) seconds of one call."""
    wall, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    """Prints one line per preset."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--directory", help="where to write; default: the temporary one"
    )
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    values = bfloat16_block()
    encodings = {
        preset: make_encoding(
            OutputConfig.model_validate({"encoding": preset}),
            name="patch",
            kind="grid",
            shape=GRID,
            dtype="bfloat16",
        )
        for preset in PRESETS
    }
    seconds: dict[str, list[tuple[float, float]]] = {"np.save": []}
    seconds |= {preset: [] for preset in PRESETS}
    sizes = {"np.save": values.nbytes}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        saved, store = Path(folder) / "saved.npy", Store(f"{folder}/bank")
        # The first round warms the allocator and the page cache and does not count.
        for number in range(arguments.rounds + 1):
            measured = {"np.save": timed(lambda: np.save(saved, values))}
            saved.unlink()
            for preset, encoding in encodings.items():

                def ours(encoding: Encoding = encoding, preset: str = preset) -> None:
                    sizes[preset] = write(store, encoding, values)

                measured[preset] = timed(ours)
                (spec,) = encoding.arrays("teacher/image/224x224", ROWS)
                store.delete(object_name(spec, 0))
            if number:
                for name, pair in measured.items():
                    seconds[name].append(pair)
    report(seconds, sizes, values.nbytes)


def report(
    seconds: dict[str, list[tuple[float, float]]], sizes: dict[str, int], num_bytes: int
) -> None:
    """Prints medians, and the reference's time as a share of ours."""
    load = os.getloadavg()[0]
    print(
        f"{datetime.date.today()}  {platform.processor() or platform.machine()}, ",
        end="",
    )
    print(f"{os.cpu_count()} cores, load {load:.1f}, block of {num_bytes / 1e6:.0f} MB")
    print(f"{'':10}  wall ms   CPU ms  bytes wall ratio CPU ratio")
    medians = {
        name: [statistics.median(column) for column in zip(*pairs, strict=True)]
        for name, pairs in seconds.items()
    }
    reference_wall, reference_processor = medians["np.save"]
    for name, (wall, processor) in medians.items():
        print(
            f"{name:10} {wall * 1e3:8.1f} {processor * 1e3:8.1f} "
            f"{sizes[name] / num_bytes:6.2f} {reference_wall / wall:10.2f} "
            f"{reference_processor / processor:9.2f}"
        )


if __name__ == "__main__":
    main()
