"""The demo's documents: job, recipes and probe, as a user would write them."""

from __future__ import annotations

from typing import Any

import yaml

from teachonce.demo.experts import EXPERTS, INTENSITY_MAX, Expert
from teachonce.demo.objects import CLASSES
from teachonce.demo.streets import SCENE_CLASSES
from teachonce.demo.truth import BEV_CLASSES, BEV_X_M, BEV_Y_M, DEPTH_PER_M

#: Scenes whose labels are known: to learn from, and to choose a probe's settings on.
NUM_LABELLED, NUM_CHOOSE = 100, 40

TRAIN, TEST = "train/*", "test/*"
LABELLED = {"shards": [TRAIN], "share": [0.0, 0.5], "limit": NUM_LABELLED}
CHOOSE = {"shards": [TRAIN], "share": [0.5, 1.0], "limit": NUM_CHOOSE}

BATCH = 32
MIN_SCENES = 24
STUDENT = {
    "model": "timm:resnet10t",
    "input": "cam",
    "args": {"channels": [24, 48, 96, 128], "stem_width": 16, "output_stride": 8},
}
SIZE = [80, 160]
_EXTENT = {"x_m": list(BEV_X_M), "y_m": list(BEV_Y_M)}
_LABELS = {
    "seg": {"member": "seg.png", "input": "cam", "num_classes": len(CLASSES)},
    "depth": {
        "member": "depth.png",
        "input": "cam",
        "scale": 1 / DEPTH_PER_M,
        "ignore": [0],
        "log": True,
    },
    "bev": {"member": "bev.png", "extent": _EXTENT, "num_classes": len(BEV_CLASSES)},
}


def job() -> str:
    """Returns the job: three trained experts, each run once."""
    return _document(
        "The demo's job: two camera experts and a LiDAR expert, each run once.",
        {
            "bank": "./bank",
            "dataset": {
                "shards": ["./scenes/train/*.tar", "./scenes/test/*.tar"],
                "license": "cc0-1.0",
            },
            "metadata": "json",
            "inputs": {
                "cam": {"kind": "image", "member": "jpg", "calibration": "camera"},
                "lidar": {
                    "kind": "points",
                    "member": "bin",
                    "columns": ["x", "y", "z", "intensity", "ring"],
                    "intensity_max": INTENSITY_MAX,
                },
            },
            "labels": {"scene": {"member": "cls", "num_classes": len(SCENE_CLASSES)}},
            "teachers": {name: _teacher(one) for name, one in EXPERTS.items()},
        },
    )


def _teacher(expert: Expert) -> dict[str, Any]:
    is_camera = expert.kind == "image"
    features: dict[str, Any] = {"from": expert.features, "encoding": "half"}
    if not is_camera:
        features["extent"] = _EXTENT
    entry: dict[str, Any] = {
        "model": expert.model,
        "weights": str(expert.weights),
        "on": ["cam" if is_camera else "lidar"],
        "preprocess": dict(expert.preprocess),
        "outputs": {"patch" if is_camera else "bev": features},
    }
    if is_camera:
        entry["sizes"] = [list(size) for size in expert.sizes]
    return entry


def bank_recipe(steps: int, seed: int, batch: int) -> str:
    """Returns the recipe of the student that learns from the bank, with no label."""
    loss = {"cosine": 0.9, "smooth_l1": 0.1}
    adapter = {"kind": "adapter", "hidden": 256}
    targets = {
        "semantics": {"from": "main/semantics/patch", "head": adapter, "loss": loss},
        "depth": {"from": "main/depth/patch", "head": adapter, "loss": loss},
        "occupancy": {
            "from": "main/occupancy/bev",
            "head": {"kind": "bev", "hidden": 32},
            "loss": loss,
        },
    }
    return _recipe(
        "A student of three experts, from the bank alone: no label, no live teacher.",
        "bank",
        {"rows": {"shards": [TRAIN]}},
        targets,
        (steps, batch),
        seed,
    )


def labels_recipe(steps: int, seed: int, batch: int) -> str:
    """Returns the recipe of the same student on the few labels, for as many steps."""
    linear = {"kind": "linear"}
    targets = {
        "scene": {
            "from": "main/labels/scene",
            "head": linear,
            "loss": {"cross_entropy": 1.0},
        },
        "seg": {"from": "data/seg", "head": linear, "loss": {"cross_entropy": 1.0}},
        "depth": {"from": "data/depth", "head": linear, "loss": {"smooth_l1": 1.0}},
        "bev": {
            "from": "data/bev",
            "head": {"kind": "bev", "hidden": 32, "cells": [16, 16]},
            "loss": {"cross_entropy": 1.0},
        },
    }
    return _recipe(
        f"The same student on {NUM_LABELLED} labelled scenes alone.",
        "labels",
        {"rows": LABELLED, "labels": _LABELS},
        targets,
        (steps, batch),
        seed,
    )


def _recipe(
    title: str,
    run: str,
    data: dict[str, Any],
    targets: dict[str, Any],
    length: tuple[int, int],
    seed: int,
) -> str:
    steps, batch = length
    return _document(
        title,
        {
            "run": f"./runs/{run}",
            "banks": {"main": "./bank"},
            "data": data,
            "student": STUDENT,
            "targets": targets,
            "optimizer": {"kind": "adamw", "weight_decay": 0.05},
            "stages": [
                {
                    "steps": steps,
                    "batch": batch,
                    "lr": 3.0e-3,
                    "warmup_steps": max(1, steps // 10),
                    "size": [SIZE],
                }
            ],
            "seed": seed,
        },
    )


def probe() -> str:
    """Returns the probe: four questions, settings chosen on scenes of their own."""
    return _document(
        "Four questions to each student, to random weights, and to each expert.",
        {
            "banks": {"main": "./bank"},
            "data": {"labels": _LABELS},
            "students": {"bank": "./runs/bank", "labels": "./runs/labels"},
            "splits": {"fit": LABELLED, "choose": CHOOSE, "test": {"shards": [TEST]}},
            "probes": {
                "scene": {"label": "main/labels/scene"},
                "semantics": {"label": "data/seg", "grid": [10, 20]},
                "depth": {"label": "data/depth", "grid": [10, 20]},
                "occupancy": {"label": "data/bev", "grid": [16, 16]},
            },
            "result": "./probe.json",
        },
    )


class _Dumper(yaml.SafeDumper):
    """Writes equal values out each time, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        """Returns that nothing is an alias."""
        del data
        return True


def _document(title: str, fields: dict[str, Any]) -> str:
    text: str = yaml.dump(
        fields, Dumper=_Dumper, sort_keys=False, width=88, default_flow_style=None
    )
    return f"# {title}\n{text}"
