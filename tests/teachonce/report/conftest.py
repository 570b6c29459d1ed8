"""A bank with camera, LiDAR, calibration and one hostile key, and two runs of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from manifests.loading import load_job
from manifests.recipe import Recipe
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
from student_train.trainer import Trainer
from tests.conftest import jpeg, sweep, write_job, write_tar

HOSTILE = "x<script>alert(1)"
NO_IMAGE = "s0-0001"
SHARD_SIZES = (7, 4)
IMAGE_HW = (24, 40)
EXTENT = {"x_m": [0, 24], "y_m": [-8, 8]}
BIRDS = '''\
"""Counts points in 6 x 4 cells ahead; row 0 is farthest, column 0 farthest left."""
import torch
from torch import nn


class Birds(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(1, 5, 1)

    def forward(self, points):
        x, y = points[..., 0], points[..., 1]
        row = ((24 - x) / 4).floor().long()
        column = ((8 - y) / 4).floor().long()
        inside = (row >= 0) & (row < 6) & (column >= 0) & (column < 4)
        place = torch.where(inside, row * 4 + column, 24)
        counts = torch.zeros(len(points), 25).scatter_add_(1, place, torch.ones_like(x))
        return self.mix(counts[:, :24].reshape(-1, 1, 6, 4).log1p())
'''


@dataclass(frozen=True)
class Made:
    """A bank and the runs trained from it; not to be written to."""

    folder: Path
    runs: dict[str, Path]

    def open(self) -> Bank:
        return open_bank(str(self.folder / "bank"))

    def copy(self, folder: Path) -> Made:
        """Returns the bank copied, to be damaged; its shards are those copied too."""
        shutil.copytree(self.folder, folder)
        return Made(folder, self.runs)


def camera(seed: int) -> dict[str, list[list[float]]]:
    """A camera that looks along x; another one for each sample."""
    height, width = IMAGE_HW
    lidar2cam = [
        [0.0, -1.0, 0.0, 0.1 * seed],
        [0.0, 0.0, -1.0, 0.2],
        [1.0, 0.0, 0.0, -0.3],
        [0.0, 0.0, 0.0, 1.0],
    ]
    intrinsics = [[20.0 + seed, 0, width / 2], [0, 21.0, height / 2], [0, 0, 1]]
    return {"intrinsics": intrinsics, "lidar2cam": lidar2cam}


def write_scenes(folder: Path) -> None:
    seed = 0
    for number, size in enumerate(SHARD_SIZES):
        members: list[tuple[str, bytes]] = []
        for row in range(size):
            key = HOSTILE if (number, row) == (0, 3) else f"s{number}-{row:04d}"
            data = jpeg(seed, *IMAGE_HW)
            members += [
                (f"{key}.jpg", data[:100] if key == NO_IMAGE else data),
                (f"{key}.bin", sweep(seed)),
                (f"{key}.json", json.dumps({"cam": camera(seed)}).encode()),
                (f"{key}.cls", str(seed % 5).encode()),
            ]
            seed += 1
        write_tar(folder / "data" / f"train-{number}.tar", members)


def write_bank(folder: Path) -> Bank:
    write_scenes(folder)
    (folder / "birds.py").write_text(BIRDS)
    job = write_job(
        folder,
        metadata="json",
        inputs={
            "image": {"kind": "image", "member": "jpg", "calibration": "cam"},
            "lidar": {"kind": "points", "member": "bin"},
        },
        teachers={
            "net": {
                "model": "module:./nets.py:Net",
                "weights": "random:1",
                "on": ["image"],
                "sizes": [[16, 32]],
                "batch": 4,
                "outputs": {"logits": {}, "patch": {"from": "body"}},
            },
            "birds": {
                "model": "module:./birds.py:Birds",
                "weights": "random:2",
                "on": ["lidar"],
                "batch": 4,
                "preprocess": {"points": 64},
                "outputs": {"bev": {"from": "output", "extent": EXTENT}},
            },
        },
        block_rows=4,
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return open_bank(str(folder / "bank"))


VIT = {
    "model": "timm:deit_tiny_patch16_224",
    "input": "image",
    "args": {"embed_dim": 24, "depth": 1, "num_heads": 2},
}


def train(
    folder: Path,
    name: str,
    targets: dict[str, object],
    student: dict[str, object] = VIT,
) -> Path:
    recipe = Recipe.model_validate(
        {
            "run": str(folder / name),
            "banks": {"b": str(folder / "bank")},
            "student": student,
            "targets": targets,
            "stages": [
                {"name": "one", "steps": 3, "batch": 4, "lr": 1e-3, "size": [[32, 64]]},
                {"name": "two", "steps": 2, "batch": 4, "lr": 1e-4, "size": [[32, 64]]},
            ],
            "checkpoints": {"log_steps": 1},
        }
    )
    assert Trainer(recipe).run().is_done
    return folder / name


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("report")
    write_bank(folder)
    loss = {"cosine": 0.9, "smooth_l1": 0.1}
    targets = {
        "patch": {"from": "b/net/patch", "loss": loss},
        "bev": {
            "from": "b/birds/bev",
            "loss": loss,
            "head": {"kind": "bev", "hidden": 8},
        },
    }
    label = {"from": "b/labels/class", "loss": {"cross_entropy": 1.0}}
    runs = {
        "taught": train(folder, "taught", targets),
        "alone": train(
            folder, "alone", {"class": {**label, "head": {"kind": "linear"}}}
        ),
    }
    return Made(folder, runs)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
