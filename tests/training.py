"""What the tests of training share: two small banks, and recipes that learn from them.

``plain`` holds images alone, in random views; ``street`` holds cameras with
calibration, sweeps, label maps, and teachers of both, one of which gives a bird's-eye
grid. Samples are drawn from their number, so that a test knows what was written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from manifests.loading import load_job
from manifests.recipe import Recipe
from manifests.recipe_loading import load_recipe
from pipeline.precompute import precompute
from student_train.trainer import Trainer
from tests.conftest import (
    POINTS_INPUT,
    jpeg,
    sweep,
    write_job,
    write_shards,
    write_tar,
)

PLAIN_SIZES = (13, 9)
STREET_SIZES = (6, 5)
IMAGE_HW = (20, 40)
NUM_CLASSES, NUM_MAP_CLASSES = 5, 4
EXTENT = {"x_m": [-8.0, 8.0], "y_m": [-10.0, 10.0]}
BEV_CELLS = (4, 5)
# Samples of `street` that lack something.
BROKEN_SWEEPS, BROKEN_LABELS = ("s0-0002", "s1-0001"), ("s0-0004",)

STUDENT = {
    "model": "timm:vit_tiny_patch16_224",
    "input": "image",
    "args": {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
    },
}
# Whatever is random in a forward is on.
NOISY = {
    **STUDENT,
    "args": {**STUDENT["args"], "drop_path_rate": 0.3, "proj_drop_rate": 0.2},
}
PATCH = {
    "from": "main/net/patch",
    "head": {"kind": "adapter", "hidden": 24},
    "loss": {"cosine": 0.9, "smooth_l1": 0.1},
}
LOGITS = {
    "from": "main/net/logits",
    "head": {"kind": "linear"},
    "loss": {"kl": {"weight": 1.0, "temperature": 2}},
}
CLASS = {
    "from": "main/labels/class",
    "head": {"kind": "linear"},
    "loss": {"cross_entropy": 1.0},
}

EXPERTS = '''\
"""Two small experts of images: class token, embedding, grid and logits of each."""
import torch
from torch import nn


class Expert(nn.Module):
    def __init__(self, width, classes=9):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.embed = nn.Linear(width, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        sizes = torch.arange(1.0, self.embed.in_features + 1)[:, None, None]
        grid = torch.tanh(3 * self.patch(x)) * sizes.to(x)
        cls = grid.mean((2, 3)) + 1
        return {
            "cls": cls,
            "embed": self.embed(cls),
            "patch": grid,
            "logits": self.head(grid.amax((2, 3))),
        }
'''
PAIR_SIZES = (24, 16)
PAIR_TOPK = 4

BEV_TEACHER = '''\
"""A small teacher of sweeps that gives a bird's-eye grid, (B, C, rows, columns)."""
import torch
from torch import nn


class Bev(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.mix = nn.Conv2d(3, width, 1)
        rows, columns = torch.linspace(6, -6, 4), torch.linspace(8, -8, 5)
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
        self.register_buffer("grid", grid.reshape(-1, 2))

    def forward(self, x):
        near = torch.exp(-torch.cdist(self.grid, x[..., :2]) / 4)
        summed = near @ x[..., :3] / near.sum(-1, keepdim=True)
        return self.mix(summed.transpose(1, 2).reshape(len(x), 3, 4, 5))
'''


def once(
    factory: pytest.TempPathFactory, name: str, make: Callable[[Path], Path]
) -> Path:
    """Returns a bank that all test modules of a session share; not to be written to."""
    folder = factory.getbasetemp() / name
    if not folder.exists():
        folder.mkdir()
        make(folder)
    return folder / "bank"


def plain_bank(folder: Path, **fields: Any) -> Path:
    """Makes a bank of images in two random views; returns its folder."""
    write_shards(folder, PLAIN_SIZES)
    fields = {"views": {"random": 2}, **fields}
    return _make(write_job(folder, **fields))


def pair_bank(folder: Path) -> Path:
    """Makes a bank of two experts, ``first`` and ``second``, with equal grids.

    One is twelve channels wide, for which there is a Hadamard matrix, and has an int8
    grid; the other ten, for which there is none.
    """
    write_shards(folder, PAIR_SIZES)
    (folder / "experts.py").write_text(EXPERTS)

    def expert(seed: int, width: int, encoding: str) -> dict[str, Any]:
        outputs: dict[str, Any] = {
            name: {"from": f"output[{name}]"}
            for name in ("cls", "embed", "patch", "logits")
        }
        outputs["patch"]["encoding"] = encoding
        outputs["logits"] |= {"topk": PAIR_TOPK, "temperatures": [1.0, 3.0]}
        return {
            "model": "module:./experts.py:Expert",
            "args": {"width": width},
            "weights": f"random:{seed}",
            "sizes": [[16, 16]],
            "batch": 8,
            "outputs": outputs,
        }

    teachers = {
        "first": expert(1, 12, "compact"),
        "second": expert(2, 10, "lossless"),
    }
    return _make(write_job(folder, teachers=teachers, views={"random": 2}))


def _make(job: Path) -> Path:
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return job.parent / "bank"


def street_sample(seed: int) -> dict[str, Any]:
    """What is written of a sample of ``street``: camera, class, distance, maps."""
    rng = np.random.default_rng(seed)
    lidar2cam = np.eye(4)
    lidar2cam[:3] = [[0, -1, 0, 0.1], [0, 0, -1, -0.4], [1, 0, 0, 0.01 * seed]]
    return {
        "intrinsics": [[22.0 + seed % 3, 0, 20.5], [0, 21.0, 9.5], [0, 0, 1]],
        "lidar2cam": lidar2cam.tolist(),
        "class": seed % NUM_CLASSES,
        "distance": round(float(rng.uniform(1, 5)), 3),
        "seg": rng.integers(0, NUM_MAP_CLASSES + 1, IMAGE_HW).astype(np.uint8),
        "depth": rng.integers(0, 5000, IMAGE_HW).astype(np.uint16),
        "ground": rng.integers(0, NUM_MAP_CLASSES, (8, 10)).astype(np.uint8),
    }


def _png(values: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(values).save(sink, "PNG")
    return sink.getvalue()


def street_members(key: str, seed: int) -> list[tuple[str, bytes]]:
    """The members of a sample of ``street``."""
    sample = street_sample(seed)
    camera = {name: sample[name] for name in ("intrinsics", "lidar2cam")}
    facts = {"camera": camera, "distance": sample["distance"]}
    points = sweep(seed)
    found = [
        (f"{key}.jpg", jpeg(seed, *IMAGE_HW)),
        (f"{key}.bin", points[:-3] if key in BROKEN_SWEEPS else points),
        (f"{key}.json", json.dumps(facts).encode()),
        (f"{key}.seg.png", _png(sample["seg"])),
        (f"{key}.depth.png", _png(sample["depth"])),
        (f"{key}.ground.png", _png(sample["ground"])),
    ]
    if key not in BROKEN_LABELS:
        found.append((f"{key}.cls", str(sample["class"]).encode()))
    return found


def street_keys() -> dict[str, int]:
    """Keys of ``street`` and the number that each sample was drawn from."""
    keys = [
        f"s{number}-{row:04d}"
        for number, size in enumerate(STREET_SIZES)
        for row in range(size)
    ]
    return {key: seed for seed, key in enumerate(keys)}


def street_bank(folder: Path) -> Path:
    """Makes a bank of cameras, sweeps and label maps; returns its folder."""
    seeds = street_keys()
    for number, size in enumerate(STREET_SIZES):
        members = []
        for row in range(size):
            key = f"s{number}-{row:04d}"
            members += street_members(key, seeds[key])
        write_tar(folder / "data" / f"train-{number}.tar", members)
    net = {"model": "module:./nets.py:Net", "weights": "random:1", "on": ["image"]}
    points = {"weights": "random:2", "on": ["lidar"], "preprocess": {"points": 32}}
    (folder / "bev.py").write_text(BEV_TEACHER)
    job = write_job(
        folder,
        metadata="json",
        inputs={
            "image": {"kind": "image", "member": "jpg", "calibration": "camera"},
            "lidar": POINTS_INPUT,
        },
        labels={
            "class": {"member": "cls", "num_classes": NUM_CLASSES},
            "distance": {"member": "json", "path": "distance"},
        },
        teachers={
            "net": {
                **net,
                "sizes": [[16, 32]],
                "outputs": {"logits": {}, "patch": {"from": "body"}},
            },
            "fine": {
                **net,
                "sizes": [[32, 64], [16, 32]],
                "outputs": {"patch": {"from": "body"}},
            },
            "points": {
                **points,
                "model": "module:./nets.py:Points",
                "outputs": {"pooled": {"from": "output[pooled]"}},
            },
            "ground": {
                **points,
                "model": "module:./bev.py:Bev",
                "outputs": {
                    "bev": {"from": "output", "extent": EXTENT},
                    "patch": {"from": "mix"},
                },
            },
        },
        limits={"max_invalid_fraction": 1.0},
        block_rows=4,
    )
    return _make(job)


def write_recipe(folder: Path, name: str = "recipe.yaml", **fields: Any) -> Path:
    """Writes a recipe for the bank in ``folder``; fields replace top-level ones."""
    recipe: dict[str, Any] = {
        "run": "./run",
        "banks": {"main": "./bank"},
        "student": STUDENT,
        "targets": {"patch": PATCH},
        "stages": [{"steps": 3, "batch": 4, "lr": 1.0e-3, "size": [[16, 16]]}],
        "loader": {"threads": 2, "window_blocks": 2},
        "engine": {"device": "cpu", "threads": 1},
    }
    recipe.update(fields)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def recipe_for(bank: Path, run: Path, *overrides: str, **fields: Any) -> Recipe:
    """A recipe for a bank, resolved; nothing is written beside the bank."""
    path = write_recipe(
        run.parent,
        f"{run.name}.yaml",
        banks={"main": str(bank)},
        run=str(run),
        **fields,
    )
    return load_recipe(str(path), overrides)


def trainer_for(bank: Path, run: Path, *overrides: str, **fields: Any) -> Trainer:
    """A trainer of such a recipe."""
    return Trainer(recipe_for(bank, run, *overrides, **fields))
