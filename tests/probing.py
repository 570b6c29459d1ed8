"""What the tests of probes share: a bank whose answers are known, and students of it.

An image is 4 x 8 blocks of 8 x 8 pixels, each of one colour; maps say which colour and
how bright, a class which colour most blocks have. Teacher ``blocks`` gives the blocks'
colours, so that its features hold every answer of the image. The bird's-eye label is
the colour that a cell's projection shows, and noise where the camera does not see;
teacher ``above`` is told it by the sweep, on a grid that runs the other way round.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from manifests.loading import load_job
from manifests.recipe import Probe, Recipe, StudentConfig
from manifests.recipe_loading import load_probe
from pipeline.precompute import precompute
from student_train.export import export_student
from student_train.run_folder import RunFolder
from student_train.students import make_student
from tests.conftest import write_job, write_tar

SHARD_SIZES = {"fit": 26, "choose": 12, "test": 12}
BLOCKS_HW, BLOCK = (4, 8), 8
IMAGE_HW = (BLOCKS_HW[0] * BLOCK, BLOCKS_HW[1] * BLOCK)
EXTENT = {"x_m": [2.0, 10.0], "y_m": [-8.0, 8.0]}
CELLS = (8, 8)
HEIGHT_M = -1.0
INTRINSICS = np.array([[32.0, 0, 32.0], [0, 32.0, 8.0], [0, 0, 1]])
LIDAR2CAM = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
NO_IMAGE, NO_CLASS, NO_SWEEP = "fit-0003", "choose-0002", "test-0001"

TEACHERS = '''\
import torch
from torch import nn


class Blocks(nn.Module):
    """The mean colour of each block and of the image, and things that say nothing."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        patch = nn.functional.avg_pool2d(x, 8)
        pooled = x.mean((2, 3))
        return {
            "patch": patch,
            "pooled": pooled,
            "logits": torch.cat([pooled, pooled], 1) * self.scale,
            "blind": torch.ones_like(patch),
        }


class Above(nn.Module):
    """One-hot of z on a grid whose first row and column are the lowest x and y."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, points):
        rows = ((points[..., 0] - 2) / 1).long().clamp(0, 7)
        columns = ((points[..., 1] + 8) / 2).long().clamp(0, 7)
        grid = torch.zeros(len(points), 3, 8, 8)
        for number, sweep in enumerate(points):
            grid[number, sweep[:, 2].round().long(), rows[number], columns[number]] = 1
        return grid * self.scale
'''

STUDENT = {
    "model": "timm:vit_tiny_patch16_224",
    "input": "image",
    "args": {"img_size": [32, 64], "embed_dim": 24, "depth": 1, "num_heads": 2},
}
MAPS = {
    "seg": {"member": "seg.png", "input": "image", "num_classes": 3},
    "depth": {"member": "depth.png", "input": "image", "scale": 0.01, "log": True},
    "blocks": {"member": "blocks.png", "input": "image", "num_classes": 3},
    "far": {"member": "far.png", "input": "image", "scale": 0.01, "log": True},
    "metres": {"member": "far.png", "input": "image", "scale": 0.01},
    "ground": {"member": "ground.png", "extent": EXTENT, "num_classes": 3},
}
SPLITS = {name: {"shards": [f"{name}*"]} for name in SHARD_SIZES}


@dataclass(frozen=True)
class Drawn:
    """A sample before it became bytes."""

    colours: np.ndarray
    levels: np.ndarray
    main: int
    ground: np.ndarray
    sees: np.ndarray

    @property
    def image(self) -> np.ndarray:
        """uint8 (H, W, 3)."""
        blocks = np.zeros((*BLOCKS_HW, 3), np.uint8)
        np.put_along_axis(
            blocks, self.colours[..., None], self.levels[..., None].astype(np.uint8), -1
        )
        return enlarge(blocks)


def enlarge(blocks: np.ndarray) -> np.ndarray:
    """Blocks as pixels."""
    return blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)


def cell_views() -> tuple[np.ndarray, np.ndarray]:
    """Where the cells' centres fall, (R, K, 2) x and y in blocks; which are seen."""
    x = 10.0 - (np.arange(8) + 0.5)
    y = 8.0 - 2 * (np.arange(8) + 0.5)
    forward, left = np.meshgrid(x, y, indexing="ij")
    u = 32.0 * -left / forward + 32.0
    v = 32.0 * -HEIGHT_M / forward + 8.0
    sees = (u >= 0) & (u < IMAGE_HW[1]) & (v >= 0) & (v < IMAGE_HW[0])
    return np.stack([u, v], -1) / BLOCK, sees


def draw(seed: int) -> Drawn:
    """A sample from its number."""
    rng = np.random.default_rng(seed)
    main = seed % 3
    colours = np.where(rng.random(BLOCKS_HW) < 0.6, main, rng.integers(0, 3, BLOCKS_HW))
    levels = rng.integers(150, 256, BLOCKS_HW)
    blocks = np.zeros((*BLOCKS_HW, 3))
    np.put_along_axis(blocks, colours[..., None], levels[..., None].astype(float), -1)
    at, sees = cell_views()
    shown = np.zeros((8, 8, 3))
    for row, column in np.argwhere(sees):
        x, y = np.clip(at[row, column] - 0.5, 0, (7, 3))
        x0, y0 = min(int(x), 6), min(int(y), 2)
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight = (1 - abs(x - x0 - dx)) * (1 - abs(y - y0 - dy))
            shown[row, column] += weight * blocks[y0 + dy, x0 + dx]
    noise = rng.integers(0, 3, CELLS)
    ground = np.where(sees, shown.argmax(-1), noise)
    return Drawn(colours, levels, main, ground.astype(np.uint8), sees)


def seeds() -> dict[str, int]:
    """Keys and the numbers that samples are drawn from."""
    keys = [f"{name}-{row:04d}" for name, n in SHARD_SIZES.items() for row in range(n)]
    return {key: seed for seed, key in enumerate(keys)}


def members(key: str, seed: int) -> list[tuple[str, bytes]]:
    """The members of a sample."""
    drawn = draw(seed)
    x = 10.0 - (np.arange(8) + 0.5)
    y = 8.0 - 2 * (np.arange(8) + 0.5)
    forward, left = np.meshgrid(x, y, indexing="ij")
    points = np.stack(
        [forward, left, drawn.ground.astype(float), np.zeros(CELLS)], -1
    ).reshape(-1, 4)
    sweep = points.astype("<f4").tobytes()
    camera = {"intrinsics": INTRINSICS.tolist(), "lidar2cam": LIDAR2CAM.tolist()}
    facts = {"camera": camera, "bright": float(drawn.levels.mean())}
    image = png(drawn.image)
    found = [
        (f"{key}.png", image[:60] if key == NO_IMAGE else image),
        (f"{key}.seg.png", png(enlarge(drawn.colours.astype(np.uint8)))),
        (f"{key}.blocks.png", png(drawn.colours.astype(np.uint8))),
        (f"{key}.far.png", png(depth_of(drawn))),
        (f"{key}.depth.png", png(enlarge(depth_of(drawn)))),
        (f"{key}.ground.png", png(drawn.ground)),
        (f"{key}.bin", sweep[:-3] if key == NO_SWEEP else sweep),
        (f"{key}.json", json.dumps(facts).encode()),
    ]
    if key != NO_CLASS:
        found.append((f"{key}.cls", str(drawn.main).encode()))
    return found


def depth_of(drawn: Drawn) -> np.ndarray:
    """uint16 hundredths; its logarithm is linear in the block's brightness."""
    return np.round(100 * np.exp(drawn.levels / 64)).astype(np.uint16)


def png(values: np.ndarray) -> bytes:
    """The bytes of an image or a map."""
    sink = io.BytesIO()
    Image.fromarray(values).save(sink, "PNG")
    return sink.getvalue()


def make_bank(folder: Path) -> Path:
    """Makes the bank; returns its folder."""
    numbers = seeds()
    for name, size in SHARD_SIZES.items():
        keys = [f"{name}-{row:04d}" for row in range(size)]
        samples = [one for key in keys for one in members(key, numbers[key])]
        write_tar(folder / "data" / f"{name}.tar", samples)
    (folder / "known.py").write_text(TEACHERS)
    job = write_job(
        folder,
        dataset={"shards": "./data/*.tar", "license": "cc0-1.0"},
        metadata="json",
        inputs={
            "image": {"kind": "image", "member": "png", "calibration": "camera"},
            "lidar": {"kind": "points", "member": "bin"},
        },
        labels={
            "class": {"member": "cls", "num_classes": 3},
            "bright": {"member": "json", "path": "bright"},
        },
        teachers={
            "blocks": {
                "model": "module:./known.py:Blocks",
                "weights": "random:1",
                "on": ["image"],
                "sizes": [list(IMAGE_HW)],
                "outputs": {
                    name: {"from": f"output[{name}]"}
                    for name in ("patch", "pooled", "logits")
                },
            },
            "blind": {
                "model": "module:./known.py:Blocks",
                "weights": "random:1",
                "on": ["image"],
                "sizes": [list(IMAGE_HW)],
                "outputs": {"patch": {"from": "output[blind]"}},
            },
            "above": {
                "model": "module:./known.py:Above",
                "weights": "random:1",
                "on": ["lidar"],
                "preprocess": {"points": 64},
                "outputs": {
                    "bev": {
                        "from": "output",
                        "extent": {**EXTENT, "row_0": "x_min", "column_0": "y_min"},
                    }
                },
            },
        },
        block_rows=8,
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder / "bank"


def make_run(
    bank: Path,
    folder: Path,
    stage: dict[str, Any] | None = None,
    *,
    seed: int = 5,
    **student: Any,
) -> Path:
    """Makes the folder of a run that is done, without training; returns it."""
    config = StudentConfig.model_validate({**STUDENT, **student})
    stage = stage or {"steps": 1, "batch": 4, "lr": 1.0e-3}
    recipe = Recipe.model_validate(
        {
            "run": str(folder),
            "banks": {"main": str(bank)},
            "student": config.model_dump(),
            "targets": {
                "class": {"from": "main/labels/class", "loss": {"cross_entropy": 1}}
            },
            "stages": [stage],
        }
    )
    run = RunFolder(str(folder))
    run.claim(recipe, {})
    made = make_student(config, IMAGE_HW, seed=seed)
    export_student(made, config, run.student, {})
    run.finish({"steps": 1})
    return folder


def write_probe(
    folder: Path, bank: Path, name: str = "probe.yaml", **more: Any
) -> Path:
    """Writes a probe over the bank; fields replace top-level ones."""
    document: dict[str, Any] = {
        "banks": {"main": str(bank)},
        "data": {"labels": MAPS},
        "splits": SPLITS,
        "probes": {"main": {"label": "main/labels/class"}},
        "batch": 7,
        "engine": {"device": "cpu"},
    }
    document.update(more)
    path = folder / "probe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def probe_of(folder: Path, bank: Path, **more: Any) -> Probe:
    """A probe over the bank."""
    return load_probe(str(write_probe(folder, bank, **more)))
