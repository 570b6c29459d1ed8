"""Trains the demo's experts: ``python -m teachonce.demo.experts.train OUT``.

They learn from what is true of the scenes per pixel and per cell, never from the scene
class, and from scenes that the demo never shows: other seeds, other textures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from manifests.errors import TeachOnceError
from teachonce.demo.experts.augmentation import IGNORED, CameraViews, LidarViews
from teachonce.demo.experts.drawn import Drawn, draw
from teachonce.demo.experts.scores import (
    depth_scores,
    occupancy_scores,
    semantics_scores,
)
from teachonce.demo.nets import DepthNet, OccupancyNet, SemanticsNet
from teachonce.demo.objects import CLASSES
from teachonce.demo.palettes import Family
from teachonce.demo.scenes import SceneOptions
from teachonce.demo.truth import BEV_CLASSES

#: The demo draws from seed 0 and textures b.
SEED, SCENES = 10_000_019, 10_000
HELD_OUT: dict[Family, int] = {"a": 10_000_139, "b": 10_000_121}
HELD_OUT_SCENES = 200
CONDITIONS = SceneOptions(night=0.25, fog=0.25, lidar_range_m=60.0)
STEPS = {"semantics": 2400, "depth": 1600, "occupancy": 800}
BATCH = 16

_PEAK_RATE, _WARM_SHARE, _WEIGHT_DECAY = 3e-3, 0.05, 0.02
_COARSE_SHARE, _STEP_SHARE = 0.4, 0.5
_TAKEN_BACK = 0.5
_MEDIAN_M = 15.0
#: Scenes whose truth says how rare each class is.
_COUNTED = 1000

Net = SemanticsNet | DepthNet | OccupancyNet
SCORES: dict[str, Callable[[nn.Module, Drawn], dict[str, float]]] = {
    "semantics": semantics_scores,
    "depth": depth_scores,
    "occupancy": occupancy_scores,
}

#: Draws a batch and returns its loss.
Loss = Callable[[Net], Tensor]


def class_weights(truth: np.ndarray, classes: int) -> Tensor:
    """Returns float32 (classes,): one over the root of the share, 1 on average.

    Args:
        truth: numbers of classes, any shape.
        classes: how many there are.
    """
    counts = np.bincount(truth.ravel(), minlength=classes)
    weights = 1 / np.sqrt(np.maximum(counts / counts.sum(), 1e-4))
    return torch.from_numpy((weights / weights.mean()).astype(np.float32))


def both_scales(
    answers: tuple[Tensor, Tensor], loss: Callable[[Tensor], Tensor]
) -> Tensor:
    """Returns the loss of the answer and, weighted less, of the coarse one enlarged."""
    fine, coarse = (answer.float() for answer in answers)
    enlarged = F.interpolate(coarse, scale_factor=2, mode="bilinear")
    return loss(fine) + _COARSE_SHARE * loss(enlarged)


def semantics_loss(drawn: Drawn, rng: np.random.Generator, weights: Tensor) -> Loss:
    """Returns weighted cross entropy over pixels."""
    views = CameraViews(drawn, rng)

    def loss(model: Net) -> Tensor:
        batch = views.batch(rng.integers(len(drawn), size=BATCH))
        return both_scales(
            _answers(model, batch.image_B3HW),
            lambda logits: F.cross_entropy(logits, batch.seg_BHW, weights),
        )

    return loss


def depth_loss(drawn: Drawn, rng: np.random.Generator) -> Loss:
    """Returns `log_error` of the depth."""
    views = CameraViews(drawn, rng)

    def loss(model: Net) -> Tensor:
        batch = views.batch(rng.integers(len(drawn), size=BATCH))
        return both_scales(
            _answers(model, batch.image_B3HW),
            lambda log_B1HW: log_error(log_B1HW[:, 0], batch.log_depth_BHW),
        )

    return loss


def log_error(guess_BHW: Tensor, truth_BHW: Tensor) -> Tensor:
    """Returns the mean absolute error, and of its steps between neighbours.

    The steps keep outlines sharp. Where the truth is NaN nothing counts.

    Source: Li and Snavely, MegaDepth (2018), section 4, equation 4, at one scale.
    """
    error_BHW = guess_BHW - truth_BHW
    down, across = error_BHW.diff(dim=1), error_BHW.diff(dim=2)
    whole, *steps = (
        item[item.isfinite()].abs().mean() for item in (error_BHW, down, across)
    )
    return whole + _STEP_SHARE * (steps[0] + steps[1])


def occupancy_loss(drawn: Drawn, rng: np.random.Generator, weights: Tensor) -> Loss:
    """Returns weighted cross entropy over cells of the map."""
    views = LidarViews(drawn, rng)

    def loss(model: Net) -> Tensor:
        points_BP4, map_BXY = views.batch(rng.integers(len(drawn), size=BATCH))
        return both_scales(
            _answers(model, points_BP4),
            lambda logits: F.cross_entropy(
                logits, map_BXY, weights, ignore_index=IGNORED
            ),
        )

    return loss


def _answers(model: Net, batch: Tensor) -> tuple[Tensor, Tensor]:
    # Half the time of float32 where the CPU multiplies bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        return model.answers(batch)


def fit(name: str, model: Net, loss: Loss, steps: int) -> None:
    """Trains ``model`` in place: AdamW, a short warm-up, then half a cosine to zero."""
    model.train().to(memory_format=torch.channels_last)
    parameters = list(model.parameters())
    decayed = [item for item in parameters if item.ndim > 1]
    others = [item for item in parameters if item.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": _WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=_PEAK_RATE)
    warm = max(1, round(_WARM_SHARE * steps))

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    with tqdm(range(steps), name, unit="step", disable=None) as bar:
        for _ in bar:
            optimiser.zero_grad()
            value = loss(model)
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    model.eval()


def take_back(model: Net, weights: Tensor) -> None:
    """Takes ``_TAKEN_BACK`` of what the classes' weights added out of the logits.

    Weighted, a network calls too much rare; unweighted, it never learns what is rare.

    Source: Menon et al., Long-tail learning via logit adjustment (2021), section 4.
    """
    head = model.pyramid.refine[-1]
    assert isinstance(head, nn.Conv2d)
    assert head.bias is not None
    with torch.no_grad():
        head.bias -= _TAKEN_BACK * weights.log()


def save(model: nn.Module, path: Path) -> None:
    """Writes the model's state: kernels and matrices as float16, the rest float32.

    A strict ``load_state_dict`` copies them into float32 parameters.
    """
    state = {
        name: (item.half() if item.ndim > 1 else item).contiguous()
        for name, item in model.state_dict().items()
    }
    save_file(state, str(path))
    # What is scored is what is stored.
    model.load_state_dict(state)


def start_from(model: nn.Module, other: nn.Module) -> None:
    """Copies into ``model`` whatever of ``other`` has the same name and shape."""
    own = model.state_dict()
    shared = {
        name: item
        for name, item in other.state_dict().items()
        if name in own and item.shape == own[name].shape
    }
    model.load_state_dict({**own, **shared})


def learn(
    name: str,
    drawn: Drawn,
    rng: np.random.Generator,
    steps: int,
    learned: Mapping[str, Net],
) -> Net:
    """Returns the expert ``name``, trained on ``drawn``.

    Args:
        name: of the expert.
        drawn: scenes to learn from.
        rng: what batches are drawn from.
        steps: how many.
        learned: the experts before it; depth starts from semantics.
    """
    if name == "depth":
        depth = DepthNet()
        start_from(depth, learned["semantics"])
        depth.start_at(math.log(_MEDIAN_M))
        fit(name, depth, depth_loss(drawn, rng), steps)
        return depth
    if name == "semantics":
        model: Net = SemanticsNet()
        weights = class_weights(drawn.seg_NHW[:_COUNTED, ::4, ::4], len(CLASSES))
        loss = semantics_loss(drawn, rng, weights)
    else:
        model = OccupancyNet()
        weights = class_weights(drawn.bev_NXY[:_COUNTED], len(BEV_CLASSES))
        loss = occupancy_loss(drawn, rng, weights)
    fit(name, model, loss, steps)
    take_back(model, weights)
    return model


def train(
    out: Path, seed: int, scenes: int, held_out: int, steps: dict[str, int]
) -> dict[str, Any]:
    """Trains and scores the three experts; returns what ``experts.json`` says.

    Args:
        out: folder of the three weights files and ``experts.json``.
        seed: of the scenes, of the first weights and of every draw.
        scenes: how many are drawn to learn from.
        held_out: how many of each texture family are drawn to score on.
        steps: of each expert.
    """
    drawn = draw(seed, scenes, _options("a"))
    unseen = {
        family: draw(number, held_out, _options(family))
        for family, number in HELD_OUT.items()
    }
    report: dict[str, Any] = {
        "seed": seed,
        "scenes": scenes,
        "textures": "a",
        "night": CONDITIONS.night,
        "fog": CONDITIONS.fog,
        "lidar_range_m": CONDITIONS.lidar_range_m,
        "held_out": {"seeds": HELD_OUT, "scenes": held_out},
        "batch": BATCH,
        "torch": torch.__version__,
        "experts": {},
    }
    learned: dict[str, Net] = {}
    for number, (name, scores) in enumerate(SCORES.items()):
        torch.manual_seed(seed + number)
        rng = np.random.default_rng([seed, number])
        model = learned[name] = learn(name, drawn, rng, steps[name], learned)
        save(model, out / f"{name}.safetensors")
        report["experts"][name] = {
            "class": type(model).__name__,
            "parameters": sum(item.numel() for item in model.parameters()),
            "steps": steps[name],
            "scores": {
                f"textures_{family}": _rounded(scores(model, scenes_of))
                for family, scenes_of in unseen.items()
            },
        }
        print(json.dumps({name: report["experts"][name]["scores"]}), flush=True)
        (out / "experts.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def _options(family: Family) -> SceneOptions:
    return replace(CONDITIONS, textures=family)


def _rounded(scores: dict[str, float]) -> dict[str, float]:
    """Returns what is finite, to 4 digits: JSON knows no NaN."""
    found = {name: value for name, value in scores.items() if math.isfinite(value)}
    return {name: round(value, 4) for name, value in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Trains the experts that ``argv`` asks for; returns 0, or 2 for unusable input."""
    parser = argparse.ArgumentParser(
        prog="python -m teachonce.demo.experts.train",
        description="Train the demo's three experts on scenes that it never shows.",
        epilog="example: python -m teachonce.demo.experts.train ./experts",
    )
    add = parser.add_argument
    add("out", type=Path, help="folder of the weights and experts.json")
    add("--scenes", type=int, default=SCENES, help=f"drawn to learn from ({SCENES})")
    add("--seed", type=int, default=SEED, help=f"what they are drawn from ({SEED})")
    add(
        "--held-out",
        type=int,
        default=HELD_OUT_SCENES,
        help=f"drawn to score on, of each texture family ({HELD_OUT_SCENES})",
    )
    add("--speed", type=float, default=1.0, help="divides the number of steps (1)")
    add("--threads", type=int, default=1, help="of torch (1)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    steps = {name: max(1, int(num / arguments.speed)) for name, num in STEPS.items()}
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        train(
            arguments.out,
            arguments.seed,
            arguments.scenes,
            arguments.held_out,
            steps,
        )
    except (TeachOnceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
