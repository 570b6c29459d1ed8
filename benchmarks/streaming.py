"""An epoch of targets from the bank against three other ways to read the same rows.

    python benchmarks/streaming.py              # 4,096 rows of 14 x 14 x 192 bfloat16

Every way gives the same rows in the same batches, shuffled within a window of blocks
(webdataset: its own buffer of as many samples), from a warm page cache, and ends where
a trainer would take over: a batch of stored values in memory.

* raw against ``numpy.memmap`` of one file of the same rows, taken by fancy index;
* lossless against zarr-python's own slices of whole blocks of the same store;
* lossless against tars of per-sample safetensors read by webdataset.

Ratio = the other way's time / ours, best of several rounds that alternate.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
import zarr
from precompute import job_fields, make_shards
from safetensors.torch import load, save

from manifests.job import Job
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
from student_train import BankDataset, Reading

BATCH, WINDOW = 128, 8
TEACHER = {"model": "timm:vit_tiny_patch16_224", "weights": "random", "batch": 32}


def make_bank(folder: Path, rows: int, threads: int) -> Bank:
    """Makes a bank whose one teacher is stored raw and lossless."""
    fields = job_fields(
        str(folder / "bank"),
        make_shards(folder, rows),
        {
            encoding: {
                **TEACHER,
                "precision": "bfloat16",
                "outputs": {"patch": {"encoding": encoding}},
            }
            for encoding in ("raw", "lossless")
        },
    )
    fields["engine"] = {"device": "cpu", "threads": threads}
    precompute(Job.model_validate(fields), quiet=True)
    return open_bank(str(folder / "bank"))


def make_dataset(bank: Bank, encoding: str, threads: int) -> BankDataset:
    reading = Reading(targets={"patch": f"{encoding}/patch"})
    return BankDataset(
        bank, reading, batch=BATCH, window_blocks=WINDOW, threads=threads
    )


def ours(dataset: BankDataset) -> Iterator[torch.Tensor]:
    """Yields batches of stored values through BankDataset."""
    for batch in dataset.batches(0):
        yield batch.targets["patch"].arrays[""]


def write_memmap(bank: Bank, path: Path) -> np.memmap:
    """Writes all rows into one file; returns it mapped."""
    array = zarr.open_array(bank.url + "/features.zarr/" + path_of(bank, "raw"))
    values = array[:, 0]
    values.tofile(path)
    return np.memmap(path, values.dtype, "r", shape=values.shape)


def path_of(bank: Bank, encoding: str) -> str:
    return next(path for path in bank.outputs if path.startswith(encoding + "/"))


def from_memmap(values: np.memmap, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
    for some in rows:
        yield torch.from_numpy(values[some])


def from_zarr(bank: Bank, rows: list[np.ndarray]) -> Iterator[torch.Tensor]:
    """Yields the same batches from whole blocks that zarr-python slices."""
    array = zarr.open_array(bank.url + "/features.zarr/" + path_of(bank, "lossless"))
    size = bank.record.block_rows
    held: dict[int, np.ndarray] = {}
    left = dict.fromkeys(range(bank.record.num_blocks), 0)
    for some in rows:
        for block, count in zip(
            *np.unique(some // size, return_counts=True), strict=True
        ):
            left[int(block)] += int(count)
    for some in rows:
        out = np.empty((len(some), *array.shape[2:]), array.dtype)
        blocks = some // size
        for block in np.unique(blocks).tolist():
            if block not in held:
                held[block] = array[block * size : (block + 1) * size, 0]
            mine = blocks == block
            out[mine] = held[block][some[mine] % size]
            left[block] -= int(mine.sum())
            if not left[block]:
                del held[block]
        yield torch.from_numpy(out)


def write_tars(bank: Bank, folder: Path, memmap: np.memmap) -> list[str]:
    """Writes a tar of one safetensors per sample for every shard, as Theia does."""
    keys, size = bank.keys(), bank.record.block_rows
    paths = []
    for number, shard in enumerate(bank.record.shards):
        path = folder / f"features-{number:05d}.tar"
        with tarfile.open(path, "w") as tar:
            first = shard.first_block * size
            for row in range(first, first + shard.samples):
                values = torch.from_numpy(memmap[row].copy()).view(torch.bfloat16)
                data = save({"embedding": values})
                info = tarfile.TarInfo(f"{keys[row]}.safetensors")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        paths.append(str(path))
    return paths


def from_tars(paths: list[str], buffer: int) -> Iterator[torch.Tensor]:
    """Yields batches by webdataset: shards shuffled, samples shuffled in a buffer."""
    dataset = (
        wds.WebDataset(paths, shardshuffle=len(paths), seed=0)
        .shuffle(buffer)
        .map(lambda sample: load(sample["safetensors"])["embedding"])
        .batched(BATCH, collation_fn=torch.stack, partial=False)
    )
    yield from dataset


def seconds(batches: Callable[[], Iterator[torch.Tensor]]) -> tuple[float, float]:
    """Returns wall and CPU seconds of one epoch, every value looked at by nobody."""
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(len(batch) for batch in batches())
    assert count
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bank = make_bank(folder, args.rows, args.threads)
        raw, lossless = (
            make_dataset(bank, encoding, args.threads)
            for encoding in ("raw", "lossless")
        )
        rows = [batch.rows for batch in raw.batches(0)]
        memmap = write_memmap(bank, folder / "rows.bin")
        tars = write_tars(bank, folder, memmap)
        buffer = WINDOW * bank.record.block_rows
        ways = {
            "raw, ours": lambda: ours(raw),
            "memmap": lambda: from_memmap(memmap, rows),
            "lossless, ours": lambda: ours(lossless),
            "zarr-python": lambda: from_zarr(bank, rows),
            "tars of safetensors": lambda: from_tars(tars, buffer),
        }
        best = {way: (float("inf"), float("inf")) for way in ways}
        for _ in range(args.rounds):
            for way, batches in ways.items():
                best[way] = min(best[way], seconds(batches))
        size = len(rows) * BATCH * memmap[0].nbytes
        print(
            f"{platform.machine()}, {args.threads} threads, {time.strftime('%d %b %Y')}"
        )
        print(
            f"{len(rows) * BATCH} rows, {size / 1e6:.0f} MB, blocks of "
            f"{bank.record.block_rows} rows"
        )
        for way, (wall, cpu) in best.items():
            print(
                f"  {way:22} {wall:.3f} s wall {cpu:.3f} s CPU "
                f"{size / wall / 1e9:.2f} GB/s"
            )
        for mine, other in (
            ("raw, ours", "memmap"),
            ("lossless, ours", "zarr-python"),
            ("lossless, ours", "tars of safetensors"),
        ):
            print(
                f"  {mine} / {other}: {best[other][0] / best[mine][0]:.2f} of its speed"
            )


if __name__ == "__main__":
    main()
