"""What normalising targets costs beside decoding them and beside a student's step.

    python benchmarks/normalisation.py [--device cuda] [--batch 256]

Targets are int8 grids of 14 x 14 cells (`compact`), decoded and normalised where the
student is. Everything is measured in one run on one thread per core that torch has; the
share is of a step that decodes, normalises, and goes forward and backward through a
student of timm's in float32, or in bfloat16 on an accelerator.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import timm
import torch
from torch import Tensor

from manifests.target import NormaliseRule
from student_train.normalisation import Normaliser, phi_s

GRID = (14, 14)
CHANNELS = (768, 1536)
STUDENTS = ("vit_tiny_patch16_224", "vit_small_patch16_224")
RULES: tuple[NormaliseRule, ...] = ("standardise", "phi_s")


def main() -> None:
    """Prints milliseconds and shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {given.device}, ", end="")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")

    def clock(call: Callable[[], object]) -> float:
        return milliseconds(call, given.device, given.repeats)

    steps = {name: clock(step(name, given.batch, given.device)) for name in STUDENTS}
    for name, one in steps.items():
        print(f"{name}: forward and backward of {given.batch} images {one:.1f} ms")
    for channels in CHANNELS:
        vectors = np.random.default_rng(0).normal(size=(2 * channels, channels))
        found = {
            "mean": vectors.mean(0),
            "variance": vectors.var(0),
            "covariance": np.cov(vectors.T, bias=True),
        }
        begun = time.perf_counter()
        phi_s(found["covariance"])
        print(f"{channels} channels: PHI-S made in {time.perf_counter() - begun:.2f} s")
        decode = decoder(given.batch, channels, given.device)
        values, base = decode(), clock(decode)
        print(f"  decode {base:.2f} ms")
        for rule in RULES:
            normaliser = Normaliser.of(rule, found).to(given.device)
            cost = clock(partial(normaliser, values))
            shares = ", ".join(
                f"{cost / (one + base + cost):.2%} of a step of {name}"
                for name, one in steps.items()
            )
            print(f"  {rule} {cost:.2f} ms: {shares}")


def step(name: str, batch: int, device: str) -> Callable[[], object]:
    """Returns a step of a student without targets."""
    model = timm.create_model(name, num_classes=0).to(device)
    pixels = torch.randn(batch, 3, 224, 224, device=device)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model.forward_features(pixels).float().square().mean()
        loss.backward()

    return run


def decoder(batch: int, channels: int, device: str) -> Callable[[], Tensor]:
    """Returns the decoding of one batch of int8 grids, as `student_train.targets`."""
    shape = (batch, *GRID)
    codes = torch.randint(-127, 128, (*shape, channels), dtype=torch.int8).to(device)
    scale = torch.rand(shape, device=device).half()
    std, mean = torch.rand(2, batch, 1, 1, channels, device=device)

    def run() -> Tensor:
        values = codes.float().mul_(scale.float().unsqueeze(-1))
        return values.mul_(std).add_(mean)

    return run


def milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """Returns the median time of a call."""
    found = []
    for number in range(repeats + 1):
        begun = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize(device)
        if number:
            found.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(found)


if __name__ == "__main__":
    main()
