"""What many tests need: small shards, a small teacher, jobs, and the command line.

Everything is made on the spot; `shared_data` alone lies outside the repository and its
tests skip, with that reason, where it is absent.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]

# A law is a law on a slow or busy machine too.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

TEACHER_FILE = '''\
"""A small real network for images and one for sweeps."""
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=8, classes=5):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.body = nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.body(torch.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))


class Points(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.point = nn.Linear(3, width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        pooled = torch.relu(self.point(x)).amax(1)
        return {"pooled": pooled, "logits": self.head(pooled)}
'''


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data beside the repository; its tests skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data is not beside the repository ({folder})")
    return folder


def jpeg(seed: int, height: int = 24, width: int = 24) -> bytes:
    """A small JPEG with structure, drawn from a seed."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=90)
    return sink.getvalue()


def sweep(seed: int, points: int = 64) -> bytes:
    """A small sweep: x, y, z, intensity as little-endian float32."""
    rng = np.random.default_rng(seed)
    rows = np.concatenate(
        [rng.normal(0, 10, (points, 3)), rng.random((points, 1))], axis=1
    )
    return rows.astype("<f4").tobytes()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Writes a tar with these members, in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample_members(key: str, seed: int, with_points: bool) -> list[tuple[str, bytes]]:
    """Members of one sample: image, class and, if asked, a sweep."""
    members = [(f"{key}.jpg", jpeg(seed)), (f"{key}.cls", str(seed % 5).encode())]
    if with_points:
        members.append((f"{key}.bin", sweep(seed)))
    return members


def write_shards(
    folder: Path, sizes: Iterable[int], with_points: bool = False, first: int = 0
) -> list[Path]:
    """Writes shards ``data/train-00000.tar`` ... of so many samples each."""
    paths, seed = [], 1000 * first
    for number, size in enumerate(sizes, first):
        members = []
        for row in range(size):
            members += sample_members(f"s{number}-{row:04d}", seed, with_points)
            seed += 1
        path = folder / "data" / f"train-{number:05d}.tar"
        paths.append(write_tar(path, members))
    return paths


def write_job(folder: Path, name: str = "job.yaml", **fields: Any) -> Path:
    """Writes a job (and the teachers' file); fields replace or add top-level ones."""
    (folder / "nets.py").write_text(TEACHER_FILE)
    job: dict[str, Any] = {
        "bank": "./bank",
        "dataset": {"shards": "./data/train-*.tar", "license": "cc0-1.0"},
        "inputs": {"image": {"kind": "image", "member": "jpg"}},
        "labels": {"class": {"member": "cls", "num_classes": 5}},
        "teachers": {
            "net": {
                "model": "module:./nets.py:Net",
                "weights": "random:1",
                "sizes": [[16, 16]],
                "batch": 4,
                "outputs": {"logits": {}, "patch": {"from": "body"}},
            }
        },
        "engine": {"threads": 2, "memory": "64 MiB", "device": "cpu"},
        "block_rows": 8,
    }
    job.update(fields)
    path = folder / name
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


@pytest.fixture
def make_shards(tmp_path: Path) -> Callable[..., list[Path]]:
    """Writes shards under ``tmp_path``; see `write_shards`."""
    return partial(write_shards, tmp_path)


@pytest.fixture
def make_job(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``job.yaml`` under ``tmp_path``; ``teachers`` replaces all teachers."""
    return partial(write_job, tmp_path)


POINTS_INPUT = {"kind": "points", "member": "bin"}
POINTS_TEACHER = {
    "model": "module:./nets.py:Points",
    "weights": "random:2",
    "batch": 4,
    "preprocess": {"points": 32, "centre": True, "unit_sphere": True},
    "outputs": {
        "pooled": {"from": "output[pooled]"},
        "logits": {"from": "output[logits]"},
    },
}


def run_cli(
    *arguments: str | Path, cwd: Path | None = None, timeout: float = 180, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m teachonce`` as a user would; returns output and exit code."""
    return subprocess.run(
        [sys.executable, "-m", "teachonce", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd or ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        check=False,
    )


def without_checksum(text: str) -> str:
    """A document's text without its own crc32c, so that it may be edited."""
    return re.sub(r',\s*"crc32c":\s*"[0-9a-f]{8}"(?=\s*}\s*$)', "", text)


def bank_identity(bank: Path) -> dict[str, bytes | str]:
    """What must be equal between two banks of one job: DESIGN section 3, rule 4."""
    found: dict[str, bytes | str] = {}
    for folder in ("features.zarr", "index", "rows"):
        for path in sorted((bank / folder).rglob("*")):
            if path.is_file():
                found[str(path.relative_to(bank))] = path.read_bytes()
    found["blocks.parquet"] = (bank / "blocks.parquet").read_bytes()
    for path in sorted((bank / "commits").rglob("*.json")):
        content = json.loads(path.read_text())["content"]
        found[str(path.relative_to(bank))] = json.dumps(content, sort_keys=True)
    return found
