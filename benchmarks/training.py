"""What targets from a bank cost a training step, and what a live teacher would.

    python benchmarks/training.py

One student (a small ViT), one teacher (a larger one, random weights: the cost is the
same), patch targets. In one process, on the same images:

* a step from the bank against the same step with its batches already in memory;
* an epoch from the bank, an epoch on labels alone, and an epoch with the teacher live
  in the loop. The ideal of live / bank is (teacher + student) / student, both measured
  alone on batches in memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch
from precompute import job_fields, make_shards

from manifests.job import Job
from manifests.recipe import Recipe
from pipeline.precompute import precompute
from student_train.batches import Batch
from student_train.optimizers import make_optimizer
from student_train.targets import Target
from student_train.trainer import Trainer
from teachers import registry
from teachers.interface import GroupInput, TeacherRequest

TEACHER = {"model": "timm:vit_small_patch16_224", "weights": "random", "batch": 32}
STUDENT = {
    "model": "timm:vit_tiny_patch16_224",
    "input": "image",
    "args": {"depth": 6},
}
SIZE, BATCH = 224, 32


def make_trainer(folder: Path, bank: str, targets: dict, name: str) -> Trainer:
    recipe = {
        "run": str(folder / name),
        "banks": {"main": bank},
        "student": STUDENT,
        "targets": targets,
        "stages": [{"epochs": 1, "batch": BATCH, "lr": 1e-4, "size": [[SIZE, SIZE]]}],
    }
    return Trainer(Recipe.model_validate(recipe))


def seconds(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def steps(trainer: Trainer, batches: Iterable[Batch]) -> None:
    """Makes a step of each batch, as the trainer does."""
    optimizer = make_optimizer(trainer.recipe.optimizer, trainer.modules)
    for batch in batches:
        trainer.step(batch, optimizer, 1e-4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fields = job_fields(
            str(folder / "bank"),
            make_shards(folder, args.rows),
            {"vit": {**TEACHER, "outputs": {"patch": {}}}},
        )
        fields["labels"] = {"class": {"member": "cls", "num_classes": 10}}
        job = Job.model_validate(fields)
        precompute(job, quiet=True)
        target = {
            "from": "main/vit/patch",
            "head": {"kind": "adapter", "hidden": 384},
            "loss": {"cosine": 0.9, "smooth_l1": 0.1},
        }
        label = {
            "from": "main/labels/class",
            "head": {"kind": "linear"},
            "loss": {"cross_entropy": 1.0},
        }
        trainer = make_trainer(folder, job.bank, {"patch": target}, "bank")
        labels = make_trainer(folder, job.bank, {"class": label}, "labels")
        request = TeacherRequest(
            "vit", job.teachers["vit"], (GroupInput("image", "image"),)
        )
        teacher = registry.open_teacher(request, registry.find_weights(request), "cpu")
        spec = teacher.inputs((SIZE, SIZE))["image"]

        source = trainer.datasets[0].sources["patch"]

        def live(batches: Iterable[Batch]) -> Iterable[Batch]:
            for batch in batches:
                pixels = batch.inputs["image"].numpy()
                with torch.inference_mode():
                    inputs = {"image": spec.to_tensor(pixels, "cpu", torch.float32)}
                    found = teacher.forward(inputs, (SIZE, SIZE))["patch"]
                valid = torch.ones(len(batch), dtype=torch.bool)
                target = Target(source, {"": found.clone()}, valid)
                yield replace(batch, targets={"patch": target})

        dataset = trainer.datasets[0]
        images = labels.datasets[0]
        in_memory = list(dataset.batches(0))
        only_images = list(images.batches(0))
        ways = {
            "in memory": lambda: steps(trainer, in_memory),
            "from the bank": lambda: steps(trainer, dataset.batches(0)),
            "labels alone": lambda: steps(labels, images.batches(0)),
            "live teacher": lambda: steps(trainer, live(images.batches(0))),
            "live, in memory": lambda: steps(trainer, live(only_images)),
        }
        steps(trainer, in_memory[:2])
        best = {way: (float("inf"), float("inf")) for way in ways}
        for _ in range(args.rounds):
            for way, run in ways.items():
                best[way] = min(best[way], seconds(run))
        cores = len(os.sched_getaffinity(0))
        print(f"{platform.machine()}, {cores} cores, {time.strftime('%d %b %Y')}")
        for way, (wall, cpu) in best.items():
            print(f"  {way:16} {wall:.2f} s wall {cpu:.2f} s CPU an epoch")
        share = best["in memory"][0] / best["from the bank"][0]
        print(f"  a step from the bank: {share:.3f} of the speed of one in memory")
        ideal = best["live, in memory"][0] / best["in memory"][0]
        found = best["live teacher"][0] / best["from the bank"][0]
        print(
            f"  live / bank: {found:.2f}, ideal (teacher + student) / student "
            f"{ideal:.2f}: {found / ideal:.2f} of it"
        )


if __name__ == "__main__":
    main()
