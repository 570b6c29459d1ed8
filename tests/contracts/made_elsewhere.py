"""Contract cases of teachers whose model is a folder or file made elsewhere.

`write_files` makes them: students in timm's hub form and with a loader, and exported
programs, with random weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import Dim

COLUMNS = ("x", "y", "z", "intensity")
TOKENS: dict[str, Any] = {"cls": {}, "pooled": {}, "patch": {}, "layer1": {}}
LEVELS: dict[str, Any] = {"pooled": {}, "logits": {}, "patch": {}, "level1": {}}
GRID: dict[str, Any] = {
    "patch": {"from": "output[grid]"},
    "logits": {"from": "output[logits]"},
}
CASES: dict[str, dict[str, Any]] = {
    "student of timm": {
        "model": "student:./vit",
        "weights": None,
        "outputs": TOKENS,
        "sizes": [(96, 160), (64, 64)],
    },
    "student of timm, of one size": {
        "model": "student:./vit_of_one_size",
        "weights": None,
        "outputs": TOKENS,
        "sizes": [(64, 96), (96, 160)],
    },
    "student of timm, convolutional": {
        "model": "student:./resnet",
        "weights": None,
        "outputs": LEVELS,
        "sizes": [(96, 160)],
    },
    "student with a loader": {
        "model": "student:./loader",
        "weights": None,
        "outputs": {"patch": {}, "logits": {}},
        "sizes": [(64, 128)],
    },
    "student on sweeps": {
        "model": "student:./sweeps",
        "weights": None,
        "outputs": {"pooled": {}},
    },
    "program": {
        "model": "exported:./grid.pt2",
        "weights": None,
        "outputs": GRID,
        "sizes": [(64, 128)],
    },
    "program of a fixed batch": {
        "model": "exported:./grid_of_four.pt2",
        "weights": None,
        "batch": 4,
        "outputs": GRID,
        "sizes": [(64, 128)],
    },
    "program on sweeps": {
        "model": "exported:./sweeps.pt2",
        "weights": None,
        "outputs": {"pooled": {"from": "output"}},
        "preprocess": {"points": 32, "columns": COLUMNS},
    },
}
FLOAT32_ONLY = frozenset(name for name in CASES if name.startswith("program"))
"""Cases that have no other precision: a program keeps the one it was exported with."""

LOADER = """
from torch import nn


class Grid(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Dropout(),
            nn.Conv2d(8, 8, 4, 4),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, image):
        grid = self.encoder(image)
        return {"grid": grid, "logits": self.head(grid.mean((2, 3)))}


class Sweeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.each = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))

    def forward(self, sweep):
        return self.each(sweep).amax(1)


def make_grid(folder):
    return Grid()


def make_sweeps(folder):
    return Sweeps()
"""


def write_files(folder: Path) -> None:
    """Writes what the models of `CASES` name."""
    vit = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": [64, 96]}
    _write_timm(
        folder / "vit",
        "vit_tiny_patch16_224",
        {**vit, "dynamic_img_size": True},
        num_classes=0,
        size=(64, 96),
    )
    _write_timm(
        folder / "vit_of_one_size",
        "vit_tiny_patch16_224",
        vit,
        num_classes=0,
        size=(64, 96),
    )
    _write_timm(folder / "resnet", "test_resnet", {}, num_classes=1000, size=(96, 96))
    _write_loader(
        folder / "loader",
        "make_grid",
        inputs={"image": {"size": [32, 32], "mean": [0.5] * 3, "std": [0.2] * 3}},
        outputs=GRID,
    )
    _write_loader(
        folder / "sweeps",
        "make_sweeps",
        inputs={"points": {"points": 32, "columns": COLUMNS}},
        outputs={"pooled": {}},
    )
    grid, sweeps = _made("make_grid"), _made("make_sweeps")
    _write_program(folder / "grid.pt2", grid, torch.zeros(2, 3, 64, 128), Dim("batch"))
    _write_program(folder / "grid_of_four.pt2", grid, torch.zeros(4, 3, 64, 128), None)
    _write_program(folder / "sweeps.pt2", sweeps, torch.zeros(2, 32, 4), Dim("batch"))


def _write_timm(
    folder: Path,
    architecture: str,
    args: dict[str, Any],
    *,
    num_classes: int,
    size: tuple[int, int],
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=num_classes, **args)
    record = {
        "input_size": [3, *size],
        "interpolation": "bicubic",
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "num_classes": num_classes,
    }
    fields = {
        "architecture": architecture,
        "num_classes": num_classes,
        "model_args": args,
        "pretrained_cfg": record,
    }
    _write_folder(folder, fields, model)


def _write_loader(folder: Path, name: str, **fields: Any) -> None:
    _write_folder(folder, {"loader": f"model.py:{name}", **fields}, _made(name))
    (folder / "model.py").write_text(LOADER)


def _write_folder(folder: Path, fields: dict[str, Any], model: nn.Module) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(model.state_dict(), folder / "model.safetensors")


def _made(name: str) -> nn.Module:
    space: dict[str, Any] = {}
    exec(LOADER, space)
    torch.manual_seed(0)
    model: nn.Module = space[name]("")
    return model.eval()


def _write_program(
    path: Path, model: nn.Module, example: Tensor, batch: Dim | None
) -> None:
    shapes = None if batch is None else ({0: batch},)
    program = torch.export.export(model, (example,), dynamic_shapes=shapes)
    torch.export.save(program, path)
