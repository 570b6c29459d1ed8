"""Batches of images from the bank's own copies against the same batches from shards.

    python benchmarks/stored_inputs.py            # 2,000 drawn JPEGs, 400 x 300
    python benchmarks/stored_inputs.py --shards 'imagenet-sample-*.tar'

Every way gives the same rows of view 0 at 224 x 224 in the same batches, from a warm
page cache, through BankDataset: decoded, cut and resized.

* copies: one object a block, from the bank;
* shards: the originals, as teachers see them;
* shards of copies: the very same JPEGs in tars, so that only what holds them differs.

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
from pathlib import Path

from precompute import job_fields, make_shards

from manifests.job import Job
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
from student_train import BankDataset, Reading

SIZE = (224, 224)
TEACHER = {
    "model": "timm:vit_tiny_patch16_224",
    "weights": "random",
    "sizes": [[32, 32]],
    "outputs": {"cls": {}},
}


def make_bank(url: Path, shards: str, threads: int, stored: dict[str, object]) -> Bank:
    """Makes a bank with a small teacher, and with copies where ``stored`` says so."""
    fields = job_fields(str(url), shards, {"tiny": TEACHER})
    fields["engine"] = {"device": "cpu", "threads": threads}
    fields["stored_inputs"] = stored
    fields["dataset"]["copies_allowed"] = "a benchmark that throws them away"
    fields["dataset"]["license"] = "benchmark"
    precompute(Job.model_validate(fields), quiet=True)
    return open_bank(str(url))


def write_copies(bank: Bank, folder: Path) -> str:
    """Writes a tar of the bank's own JPEGs for every shard; returns their pattern."""
    folder.mkdir()
    keys, size = bank.keys(), bank.record.block_rows
    for shard in bank.record.shards:
        with tarfile.open(folder / shard.name.replace("/", "_"), "w") as tar:
            for block in shard.block_numbers:
                images = bank.stored_images("image", block)
                for offset, data in enumerate(images):
                    if data:
                        info = tarfile.TarInfo(f"{keys[block * size + offset]}.jpg")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    return str(folder / "*.tar")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", help="pattern of shards with .jpg members")
    parser.add_argument("--rows", type=int, default=2000, help="where none are given")
    parser.add_argument("--short-side", type=int, default=256)
    parser.add_argument("--quality", type=int, default=90)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = args.shards or make_shards(folder, args.rows)
        how = {"short_side": args.short_side, "quality": args.quality}
        bank = make_bank(folder / "bank", shards, args.threads, {"image": how})
        packed = make_bank(
            folder / "packed", write_copies(bank, folder / "copies"), args.threads, {}
        )

        def dataset(of: Bank, stored: bool) -> BankDataset:
            reading = Reading(inputs={"image": SIZE}, stored=stored)
            return BankDataset(
                of, reading, batch=args.batch, view=0, threads=args.threads
            )

        ways = {
            "copies": dataset(bank, True),
            "shards": dataset(bank, False),
            "shards of copies": dataset(packed, False),
        }
        best = dict.fromkeys(ways, (float("inf"), float("inf")))
        for _ in range(args.rounds):
            for way, one in ways.items():
                wall, cpu = time.perf_counter(), time.process_time()
                for _batch in one.batches(0):
                    pass
                spent = time.perf_counter() - wall, time.process_time() - cpu
                best[way] = min(best[way], spent)
        rows = ways["copies"].num_steps * args.batch
        spec = bank.array(bank.stored_path("image")).spec
        found = [bank.stored_images("image", b) for b in range(bank.record.num_blocks)]
        sizes = [len(data) for images in found for data in images if data]
        print(
            f"{platform.machine()}, {args.threads} threads, {time.strftime('%d %b %Y')}"
        )
        print(
            f"{rows} rows; copies of {sum(sizes) / len(sizes) / 1e3:.1f} kB (at most "
            f"{max(sizes) / 1e3:.1f} of {spec.row_bytes / 1e3:.1f}), blocks of "
            f"{bank.record.block_rows} rows"
        )
        for way, (wall, cpu) in best.items():
            print(
                f"  {way:18} {rows / wall:7.0f} images/s {1e3 * cpu / rows:.2f} ms CPU "
                f"an image"
            )
        for other in ("shards", "shards of copies"):
            print(f"  copies / {other}: {best[other][0] / best['copies'][0]:.2f}")


if __name__ == "__main__":
    main()
