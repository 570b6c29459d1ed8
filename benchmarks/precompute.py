"""Whole job against its floor: bare decode plus bare forward of the same, same threads.

On a CPU both are bound by the same cores, so the floor of a job is the sum of the two.
Run it with nothing else on the machine:

    python benchmarks/precompute.py                 # one teacher, then three
    python benchmarks/precompute.py --shards 'imagenet-sample-{00000..00002}.tar'

Ratio = floor / job: 1.0 would mean that planning, Beam, views, encoding, writing,
committing and finalising cost nothing. Both sides start after imports; the job loads
its teachers inside its time. Wall and CPU seconds (all threads) of one process.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from manifests.job import Job
from pipeline.precompute import precompute
from pipeline.samples.images import decode_image, resize_view
from pipeline.samples.sources import expand_shards
from pipeline.samples.views import evaluation_box
from pipeline.work_items import num_threads
from teachers import registry
from teachers.interface import GroupInput, TeacherRequest

TEACHERS = {
    "vit": {
        "model": "timm:vit_tiny_patch16_224",
        "outputs": {"cls": {}, "patch": {}},
    },
    "resnet": {"model": "timm:resnet18", "outputs": {"pooled": {}, "patch": {}}},
    "convnext": {"model": "timm:convnext_atto", "outputs": {"patch": {}}},
}
BATCH = 32


def make_shards(folder: Path, count: int) -> str:
    """Draws JPEGs of 400 x 300 pixels, about 40 kB each, 128 to a shard."""
    rng = np.random.default_rng(0)
    for shard in range(-(-count // 128)):
        with tarfile.open(folder / f"bench-{shard:05d}.tar", "w") as tar:
            for row in range(min(128, count - shard * 128)):
                coarse = rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((400, 300), 3)
                sink = io.BytesIO()
                image.save(sink, "JPEG", quality=90)
                members = {"jpg": sink.getvalue(), "cls": str(row % 10).encode()}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"b{shard:03d}-{row:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / "bench-*.tar")


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Returns wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def read_images(shards: list[str]) -> list[bytes]:
    """Returns the bytes of every image, in memory."""
    found = []
    for url in shards:
        with tarfile.open(url) as tar:
            for member in tar:
                if member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                    file = tar.extractfile(member)
                    assert file is not None
                    found.append(file.read())
    return found


def bare_decode(images: list[bytes], threads: int, size: int) -> None:
    """Decodes and resizes every image once, with as many threads."""

    def one(data: bytes) -> None:
        image = decode_image(data)
        box = evaluation_box((image.height, image.width), "square")
        resize_view(image, box, False, (size, size), "bicubic")

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, images))


def open_live(name: str, config: dict) -> registry.Teacher:
    job = Job.model_validate(job_fields("x", "x", {name: config}))
    request = TeacherRequest(name, job.teachers[name], (GroupInput("image", "image"),))
    return registry.open_teacher(request, registry.find_weights(request), "cpu")


def bare_forward(teacher: registry.Teacher, num_images: int, threads: int) -> None:
    """Runs the model on pixels in memory, one torch thread in each of ``threads``."""
    size = teacher.sizes[0]
    spec = teacher.inputs(size)["image"]
    pixels = np.zeros((BATCH, spec.height, spec.width, 3), np.uint8)
    batches = iter(range(-(-num_images // BATCH)))
    lock = threading.Lock()

    def lane() -> None:
        torch.set_num_threads(1)
        while True:
            with lock:
                if next(batches, None) is None:
                    return
            batch = {"image": spec.to_tensor(pixels, "cpu", torch.float32)}
            with torch.inference_mode():
                teacher.forward(batch, size)

    lanes = [threading.Thread(target=lane) for _ in range(threads)]
    for one in lanes:
        one.start()
    for one in lanes:
        one.join()


def job_fields(bank: str, shards: str | list[str], teachers: dict) -> dict:
    return {
        "bank": bank,
        "dataset": {"shards": shards},
        "inputs": {"image": {"kind": "image", "member": ["jpg", "jpeg", "png"]}},
        "teachers": {
            name: {**config, "weights": "random", "batch": BATCH}
            for name, config in teachers.items()
        },
        "engine": {"device": "cpu"},
    }


def measure(names: list[str], shards: list[str], repeats: int, folder: Path) -> None:
    images = read_images(shards)
    chosen = {name: TEACHERS[name] for name in names}
    threads = num_threads(Job.model_validate(job_fields("x", "x", chosen)).engine)
    live = {name: open_live(name, config) for name, config in chosen.items()}
    for teacher in live.values():
        bare_forward(teacher, BATCH, 1)
    rows = []
    for repeat in range(repeats):
        decode = timed(lambda: bare_decode(images, threads, 224))
        forward = [
            timed(lambda one=one: bare_forward(one, len(images), threads))
            for one in live.values()
        ]
        bank = folder / f"bank-{len(names)}-{repeat}"
        fields = job_fields(str(bank), shards, chosen)
        spec = Job.model_validate(fields)
        job = timed(lambda spec=spec: precompute(spec, quiet=True))
        shutil.rmtree(bank)
        floor = [decode[k] + sum(one[k] for one in forward) for k in (0, 1)]
        rows.append((decode, floor, job))
        print(
            f"  {repeat}: decode {decode[0]:.1f} s, floor {floor[0]:.1f} s wall "
            f"{floor[1]:.1f} s CPU, job {job[0]:.1f} s wall {job[1]:.1f} s CPU",
            flush=True,
        )
    for k, what in enumerate(("wall", "CPU")):
        ratio = statistics.median(floor[k] / job[k] for _, floor, job in rows)
        print(
            f"{len(names)} teacher(s), {len(images)} images, {threads} threads: "
            f"ratio {ratio:.2f} in {what} seconds (goal 0.90)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shards", help="real shards instead of drawn ones")
    parser.add_argument("--teachers", type=int, choices=(1, 3), help="only this arm")
    args = parser.parse_args()
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{len(os.sched_getaffinity(0))} cores, torch {torch.__version__}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = expand_shards([args.shards or make_shards(folder, args.images)])
        for count in (1, 3) if args.teachers is None else (args.teachers,):
            # Three teachers take twice as long an image; half the images will do.
            part = shards if count == 1 else shards[: (len(shards) + 1) // 2]
            measure(list(TEACHERS)[:count], part, args.repeats, folder)


if __name__ == "__main__":
    main()
