"""Every family of teachers: rows a second of a whole job beside its bare forward.

One model of each family, small enough for a CPU, with random weights:

    python benchmarks/families.py
    python benchmarks/families.py --only timm pointpillars --rows 64

The bare forward runs the teacher on prepared rows in memory, one thread per core; the
job reads, decodes, runs, compresses and commits the same number of rows. What is
between the two is mostly decoding, which several teachers of one job share. Run it with
nothing else on the machine.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from manifests.inputs import INPUT
from manifests.job import EngineConfig, Job
from pipeline.precompute import precompute
from pipeline.work_items import num_threads
from teachers import registry
from teachers.inputs.spec import InputSpec
from teachers.interface import GroupInput, Size, Teacher, TeacherRequest

BATCH = 16
COLUMNS = ("x", "y", "z", "intensity", "ring")
NUM_POINTS = 30_000
IMAGE_HW = (360, 640)
SPINNING = {"elevation_deg": [-30.0, 10.0]}
ABOVE = {"x_m": [-51.2, 51.2], "y_m": [-51.2, 51.2]}

MODULE = """
from torch import nn


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 96, (2, 16, 16), (2, 16, 16))
        self.mix = nn.Conv3d(96, 96, 3, padding=1)

    def forward(self, clip):
        return self.mix(self.stem(clip.transpose(1, 2))).transpose(1, 2)


class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 256), nn.ReLU()
        )

    def forward(self, lidar):
        return self.net(lidar)
"""

IMAGE, LIDAR, CLIP = "image", "lidar", "clip"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "timm, ViT": (
        IMAGE,
        {
            "model": "timm:vit_tiny_patch16_224",
            "outputs": {"cls": {}, "patch": {"encoding": "half"}},
        },
    ),
    "timm, DINOv3": (
        IMAGE,
        {
            "model": "timm:vit_small_patch16_dinov3",
            "outputs": {"cls": {}, "patch": {"encoding": "half"}},
        },
    ),
    "timm, ConvNeXt": (
        IMAGE,
        {
            "model": "timm:convnext_atto",
            "outputs": {"pooled": {}, "patch": {"encoding": "half"}},
        },
    ),
    "timm, SAM padded": (
        IMAGE,
        {
            "model": "timm:samvit_base_patch16_224",
            "preprocess": {"fit": "pad"},
            "outputs": {"patch": {"encoding": "half"}},
        },
    ),
    "open_clip": (
        IMAGE,
        {
            "model": "open_clip:ViT-S-32-alt",
            "outputs": {"embed": {}, "patch": {"encoding": "half"}},
        },
    ),
    "pointpillars": (
        LIDAR,
        {
            "model": "pointpillars:nuscenes",
            "outputs": {"bev": {"encoding": "half", "pool": [4, 4]}},
        },
    ),
    "range_view": (
        LIDAR,
        {
            "model": "range_view:vit_tiny_patch16_224",
            "sizes": [[32, 1024]],
            "preprocess": {"raster": SPINNING},
            "outputs": {"patch": {"encoding": "half"}},
        },
    ),
    "bev_raster": (
        LIDAR,
        {
            "model": "bev_raster:vit_tiny_patch16_224",
            "sizes": [[256, 256]],
            "preprocess": {"raster": ABOVE},
            "outputs": {"bev": {"encoding": "half"}},
        },
    ),
    "module, points": (
        LIDAR,
        {
            "model": "module:./nets.py:Points",
            "preprocess": {"points": 4096},
            "outputs": {"points": {"encoding": "half"}},
        },
    ),
    "module, clip": (
        CLIP,
        {
            "model": "module:./nets.py:Video",
            "sizes": [[160, 288]],
            "outputs": {"patch": {"encoding": "half"}},
        },
    ),
}
INPUTS: dict[str, dict[str, Any]] = {
    IMAGE: {"kind": "image", "member": "jpg"},
    LIDAR: {
        "kind": "points",
        "member": "bin",
        "columns": list(COLUMNS),
        "intensity_max": 255,
    },
    CLIP: {"kind": "clip", "member": "jpg", "frames": 4},
}


def draw_jpeg(rng: np.random.Generator) -> bytes:
    coarse = rng.integers(0, 256, (45, 80, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(IMAGE_HW[::-1], Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def draw_sweep(rng: np.random.Generator) -> bytes:
    """A ground plane of rings, with intensity and ring."""
    ring = rng.integers(0, 32, NUM_POINTS)
    azimuth = rng.uniform(-np.pi, np.pi, NUM_POINTS)
    reach = 1.8 / np.tan(np.radians(1 + ring)) * rng.uniform(0.3, 1, NUM_POINTS)
    x, y = reach * np.cos(azimuth), reach * np.sin(azimuth)
    z = rng.normal(-1.8, 0.1, NUM_POINTS)
    intensity = rng.uniform(0, 255, NUM_POINTS)
    return np.stack([x, y, z, intensity, ring], 1).astype("<f4").tobytes()


def write_shards(folder: Path, kind: str, rows: int) -> str:
    """Draws shards of 32 samples."""
    rng = np.random.default_rng(0)
    for shard in range(-(-rows // 32)):
        with tarfile.open(folder / f"{kind}-{shard:04d}.tar", "w") as tar:
            for row in range(min(32, rows - shard * 32)):
                members = {"jpg": draw_jpeg(rng)} if kind == IMAGE else {}
                if kind == LIDAR:
                    members = {"bin": draw_sweep(rng)}
                if kind == CLIP:
                    members = {f"{k:03d}.jpg": draw_jpeg(rng) for k in range(4)}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"b{shard:03d}-{row:04d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return str(folder / f"{kind}-*.tar")


def bare_forward(
    teacher: Teacher, size: Size | None, specs: dict[str, InputSpec], rows: int
) -> float:
    """Returns seconds of the model alone on ``rows`` rows, a thread per core."""
    rng = np.random.default_rng(0)
    taken = {}
    for name, spec in specs.items():
        shape = (BATCH, *spec.row_shape)
        if spec.row_dtype == np.uint8:
            taken[name] = rng.integers(0, 256, shape, dtype=np.uint8)
        else:
            taken[name] = rng.normal(0, 15, shape).astype(np.float32)
    batches = iter(range(-(-rows // BATCH)))
    lock = threading.Lock()

    def lane() -> None:
        torch.set_num_threads(1)
        while True:
            with lock:
                if next(batches, None) is None:
                    return
            batch = {
                name: spec.to_tensor(taken[name], "cpu", torch.float32)
                for name, spec in specs.items()
            }
            teacher.forward(batch, size)

    lanes = [threading.Thread(target=lane) for _ in os.sched_getaffinity(0)]
    start = time.perf_counter()
    for one in lanes:
        one.start()
    for one in lanes:
        one.join()
    return time.perf_counter() - start


def measure(case: str, shards: str, rows: int, folder: Path) -> tuple[float, float]:
    """Returns rows a second of the bare forward and of the job."""
    kind, config = CASES[case]
    job = Job.model_validate(
        {
            "bank": str(folder / f"bank-{case.replace(' ', '-')}"),
            "dataset": {"shards": shards},
            "inputs": {kind: INPUTS[kind]},
            "teachers": {
                "t": {
                    **config,
                    "model": config["model"].replace("./", f"{folder}/"),
                    "weights": "random",
                    "batch": BATCH,
                }
            },
            "engine": {"device": "cpu", "memory": "4 GiB"},
        }
    )
    given = INPUT.validate_python(INPUTS[kind])
    aspect = IMAGE_HW[1] / IMAGE_HW[0] if kind != LIDAR else 1.0
    item = GroupInput(
        kind,
        given.kind,
        aspect,
        tuple(getattr(given, "columns", ())),
        int(getattr(given, "frames", 0)),
    )
    request = TeacherRequest("t", job.teachers["t"], (item,), str(folder))
    teacher = registry.open_teacher(request, registry.find_weights(request), "cpu")
    teacher.load()
    size = teacher.sizes[0]
    specs = teacher.inputs(size)
    bare_forward(teacher, size, specs, BATCH)
    bare = bare_forward(teacher, size, specs, rows)
    start = time.perf_counter()
    precompute(job, quiet=True)
    return rows / bare, rows / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--only", nargs="+", help="cases that begin so")
    args = parser.parse_args()
    threads = num_threads(EngineConfig())
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.processor() or platform.machine()}, "
        f"{threads} threads, torch {torch.__version__}"
    )
    print("| family | model | bare forward, rows/s | job, rows/s | share |")
    print("| --- | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "nets.py").write_text(MODULE)
        shards = {kind: write_shards(folder, kind, args.rows) for kind in INPUTS}
        for case, (kind, config) in CASES.items():
            if args.only and not any(case.startswith(one) for one in args.only):
                continue
            bare, job = measure(case, shards[kind], args.rows, folder)
            print(
                f"| {case} | {config['model'].replace('./nets.py:', '')} | {bare:.1f} "
                f"| {job:.1f} | {job / bare:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
