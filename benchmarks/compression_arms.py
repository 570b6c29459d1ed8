"""The arms of ``compression.py``: one bank, and a run that learns one of its outputs.

Owns everything that is the same in all runs, and how an arm differs: by what is stored.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from manifests.loading import load_job
from manifests.recipe import Probe, Recipe
from pipeline.bank.encoding import ENCODINGS
from pipeline.precompute import precompute
from student_train.probes.protocol import ProbeRun

NETS = Path(__file__).with_name("cifar_nets.py")
SHARDS = [f"cifar10-train-{number:05d}.tar" for number in range(15)]
LEARNED, FITTED, CHOSEN = SHARDS[:10], SHARDS[10:14], SHARDS[14:]
TESTED = ["cifar10-test-*"]

#: Points of test accuracy that matter: a smaller loss buys no smaller student.
MARGIN = 0.5
REFERENCE = "lossless"
#: Seeds from here on are a pilot's: they plan the test and do not count in it.
PILOT = 1000
PATH = "resnet56/image/32x32/patch"
PRESETS = tuple(
    name for name in ("lossless", "half", "compact", "tiny") if name in ENCODINGS
)
NAIVE = ("naive_1", "naive_2", "naive_3")
ARMS = (*(name for name in PRESETS if name != "half"), "naive_1")

LOSS = {"cosine": 0.9, "smooth_l1": 0.1}
STUDENT = {
    "model": f"module:{NETS}:CifarResNet",
    "input": "image",
    "args": {"depth": 8, "width": 16},
}
STEPS = 240
SETTINGS: dict[str, Any] = {
    "data": {"rows": {"shards": LEARNED}},
    "optimizer": {"kind": "adamw", "weight_decay": 0.01},
    "stages": [
        {
            "steps": STEPS,
            "batch": 128,
            "lr": 2.0e-3,
            "warmup_steps": STEPS // 5,
            "size": [[32, 32]],
        }
    ],
    "loader": {"threads": 1},
    "engine": {"threads": 1, "device": "cpu"},
}
SPLITS = {
    "fit": {"shards": FITTED},
    "choose": {"shards": CHOSEN},
    "test": {"shards": TESTED},
}


def output_of(arm: str) -> dict[str, str]:
    """Returns how the job takes and stores what an arm learns."""
    if arm in NAIVE:
        return {"from": f"output[{arm}]"}
    return {"from": "output[exact]", "encoding": arm}


def make_bank(data: Path, out: Path, arms: list[str]) -> str:
    """Makes the bank of all arms, or adds what it lacks; returns where it lies."""
    train = [str(data / "cifar10-train" / name) for name in SHARDS]
    job = {
        "bank": str(out / "bank"),
        "dataset": {"shards": [*train, str(data / "cifar10-test" / "*.tar")]},
        "inputs": {"image": {"kind": "image", "member": "jpg"}},
        "labels": {"class": {"member": "cls", "num_classes": 10}},
        "teachers": {
            "resnet56": {
                "model": f"module:{NETS}:CoarseResNet",
                "args": {"depth": 56},
                "weights": str(data / "cifar10-teachers" / "resnet56.pt"),
                "sizes": [[32, 32]],
                "preprocess": {
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                },
                "outputs": {f"patch_{arm}": output_of(arm) for arm in arms},
            }
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    loaded = load_job(str(path))
    precompute(loaded)
    return loaded.bank


def recipe_of(bank: str, arm: str, seed: int, run: Path) -> Recipe:
    """Returns the recipe of a run."""
    target = {
        "from": f"main/resnet56/patch_{arm}",
        "head": {"kind": "linear"},
        "loss": LOSS,
    }
    return Recipe.model_validate(
        {
            "run": str(run),
            "banks": {"main": bank},
            "student": STUDENT,
            "targets": {"patch": target},
            "checkpoints": {"every_steps": 40},
            "seed": seed,
            **SETTINGS,
        }
    )


def probe(bank: str, run: Path, **more: object) -> dict[str, float]:
    """Returns accuracies in percent, by model."""
    found = Probe.model_validate(
        {
            "banks": {"main": bank},
            "students": {"student": str(run)},
            "splits": SPLITS,
            "probes": {"class": {"label": "main/labels/class", "kinds": ["linear"]}},
            "batch": 500,
            "random": False,
            "teachers": {},
            "engine": SETTINGS["engine"],
            **more,
        }
    )
    scores = ProbeRun(found).run().to_json()["probes"]["class"]["scores"]
    return {one["model"]: 100 * one["value"] for one in scores}


def settings_digest() -> str:
    """Returns a name for everything that is the same in all runs."""
    held = {
        "loss": LOSS,
        "student": {**STUDENT, "model": "CifarResNet"},
        "settings": SETTINGS,
        "splits": SPLITS,
        "nets": hashlib.sha256(NETS.read_bytes()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:8]
