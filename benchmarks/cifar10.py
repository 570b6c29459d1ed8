"""CIFAR-10: what a bank gives a student that has few labels, and plain distillation.

    python benchmarks/cifar10.py DATA OUT                    # all three, three seeds
    python benchmarks/cifar10.py DATA OUT --only scarce --seeds 5

DATA holds ``cifar10-train`` and ``cifar10-test`` (WebDataset shards of KEY.jpg and
KEY.cls) and ``cifar10-teachers/resnet56.pt`` (published weights). One bank is made in
OUT; every arm is a recipe trained from it and scored with ``probe`` (linear and kNN on
the student's pooled features, view 0, settings chosen on rows of their own).

* scarce: 10,000 images of which 1,000 have labels; labels alone against the bank, at
  equal steps.
* experts: expert A's logits cover classes 0 to 4, expert B's 5 to 9 (two halves of one
  network's logits: an illustration); one student of both against each alone.
* kd: 25,000 images, 5 epochs; labels alone against 0.9 x KL (T = 4) + 0.1 x labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from manifests.loading import load_job
from manifests.recipe import Probe, Recipe, RowsConfig, StudentConfig
from pipeline.precompute import precompute
from student_train import BankDataset, Reading
from student_train.probes.protocol import ProbeRun
from student_train.students import make_student
from student_train.trainer import Trainer

NETS = Path(__file__).with_name("cifar_nets.py")
TRAIN, TEST = "cifar10-train-*", "cifar10-test-*"
BATCH = 128


def make_bank(data: Path, out: Path) -> str:
    """Makes the bank of all images, or goes on with it; returns where it lies."""
    output = {"from": "output[logits]"}
    job = {
        "bank": str(out / "bank"),
        "dataset": {
            "shards": [
                str(data / "cifar10-train" / "*.tar"),
                str(data / "cifar10-test" / "*.tar"),
            ]
        },
        "inputs": {"image": {"kind": "image", "member": "jpg"}},
        "labels": {"class": {"member": "cls", "num_classes": 10}},
        "teachers": {
            "resnet56": {
                "model": f"module:{NETS}:CifarResNet",
                "args": {"depth": 56},
                "weights": str(data / "cifar10-teachers" / "resnet56.pt"),
                "sizes": [[32, 32]],
                "preprocess": {
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                },
                "outputs": {
                    "logits": output,
                    "logits_first": {"from": "output[first]"},
                    "logits_last": {"from": "output[last]"},
                },
            }
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    loaded = load_job(str(path))
    precompute(loaded)
    return loaded.bank


def distil(output: str, weight: float = 1.0) -> dict[str, Any]:
    """Returns the target of a teacher's logits."""
    return {
        "from": f"main/resnet56/{output}",
        "tokens": "pooled",
        "head": {"kind": "linear"},
        "loss": {"kl": {"weight": weight, "temperature": 4}},
    }


def labels(weight: float = 1.0, **head: str) -> dict[str, Any]:
    """Returns the target of the labels."""
    return {
        "from": "main/labels/class",
        "tokens": "pooled",
        "head": head or {"kind": "linear"},
        "loss": {"cross_entropy": weight},
    }


def train(
    bank: str,
    run: Path,
    targets: dict[str, Any],
    rows: dict[str, Any],
    seed: int,
    steps: int,
) -> Path:
    """Trains one student; returns its run's folder."""
    recipe = Recipe.model_validate(
        {
            "run": str(run),
            "banks": {"main": bank},
            "data": {"rows": {"shards": [TRAIN], **rows}},
            "student": {"model": f"module:{NETS}:CifarResNet", "input": "image"},
            "targets": targets,
            "optimizer": {"kind": "sgd", "weight_decay": 5.0e-4, "clip_norm": None},
            "stages": [
                {
                    "steps": steps,
                    "batch": BATCH,
                    "lr": 0.1,
                    "warmup_steps": steps // 5,
                    "size": [[32, 32]],
                }
            ],
            "seed": seed,
            "engine": {"threads": 1},
            "loader": {"threads": 1},
        }
    )
    outcome = Trainer(recipe).run()
    print(f"  {run.name}: {outcome.result}", flush=True)
    return run


def probe(bank: str, students: dict[str, Path], out: Path) -> dict[str, Any]:
    """Returns the scores of students, of a random one, and of the teacher."""
    found = Probe.model_validate(
        {
            "banks": {"main": bank},
            "students": {name: str(path) for name, path in students.items()},
            "teachers": {"resnet56": ["resnet56/logits"]},
            "splits": {
                "fit": {"shards": [TRAIN], "share": [0.0, 0.04]},
                "choose": {"shards": [TRAIN], "share": [0.4, 0.44]},
                "test": {"shards": [TEST]},
            },
            "probes": {"class": {"label": "main/labels/class"}},
            "result": str(out),
            "batch": 500,
        }
    )
    return ProbeRun(found).run().to_json()


def top1(bank: str, run: Path, target: str) -> float:
    """Returns the share of test images that a run's own head gets right, in percent."""
    config = StudentConfig(
        model=f"module:{NETS}:CifarResNet",
        input="image",
        weights=str(run / "student" / "model.safetensors"),
    )
    student = make_student(config, (32, 32), seed=0).eval()
    heads = load_file(run / "heads.safetensors")
    reading = Reading(inputs={"image": (32, 32)}, labels=["class"])
    rows = RowsConfig(shards=[TEST])
    dataset = BankDataset(
        bank, reading, batch=500, rows=rows, shuffle=False, keep_rest=True
    )
    right = 0
    with torch.no_grad():
        for batch in dataset.batches(0):
            pooled = student(batch.inputs["image"]).pooled
            logits = pooled @ heads[f"{target}.linear.weight"].T
            logits = logits + heads[f"{target}.linear.bias"]
            right += int((logits.argmax(1) == batch.labels["class"]).sum())
    return 100 * right / dataset.num_rows


SCARCE = {"share": (0.0, 0.04)}
TENTH = {"share": (0.0, 0.4)}
ARMS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any], int]]] = {
    "scarce": {
        "labels-1000": ({"class": labels()}, SCARCE, 312),
        "bank": ({"logits": distil("logits")}, TENTH, 312),
    },
    "experts": {
        "expert-a": ({"first": distil("logits_first")}, TENTH, 312),
        "expert-b": ({"last": distil("logits_last")}, TENTH, 312),
        "both": (
            {"first": distil("logits_first"), "last": distil("logits_last")},
            TENTH,
            312,
        ),
    },
    "kd": {
        "labels-all": ({"class": labels()}, {}, 975),
        "kd": (
            {
                "logits": distil("logits", 0.9),
                "class": labels(0.1, same_as="logits"),
            },
            {},
            975,
        ),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", choices=ARMS, action="append")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    bank = make_bank(args.data.resolve(), args.out.resolve())
    for name in args.only or ARMS:
        scores: dict[str, dict[str, list[float]]] = {}
        for seed in range(args.seeds):
            runs = {
                arm: train(bank, args.out / f"{arm}-{seed}", targets, rows, seed, steps)
                for arm, (targets, rows, steps) in ARMS[name].items()
            }
            if name == "kd":
                for arm, run in runs.items():
                    target = "logits" if arm == "kd" else "class"
                    found = top1(bank, run, target)
                    scores.setdefault(arm, {}).setdefault("top-1", []).append(found)
                continue
            result = probe(bank, runs, args.out / f"probe-{name}-{seed}.json")
            for score in result["probes"]["class"]["scores"]:
                if score["kind"] is None:
                    continue
                held = scores.setdefault(f"{score['role']} {score['model']}", {})
                kind = f"{score['kind']} {score['scale']}"
                held.setdefault(kind, []).append(100 * score["value"])
        print(f"\n{name}, {args.seeds} seeds: mean (each)")
        for arm, kinds in scores.items():
            shown = ", ".join(
                f"{kind} {statistics.mean(v):.1f} ({', '.join(f'{x:.1f}' for x in v)})"
                for kind, v in kinds.items()
            )
            print(f"  {arm:24} {shown}")
        (args.out / f"{name}.json").write_text(json.dumps(scores, indent=1))


if __name__ == "__main__":
    main()
