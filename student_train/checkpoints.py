"""Checkpoints: everything that the next step depends on, in one safetensors file.

Weights of student and heads, the optimiser's state, the random generators, and where in
the data training stands. A checkpoint appears whole or not at all; the one before it is
removed only then.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from student_train.errors import TrainingError

_NAME = re.compile(r"step-(\d{9})\.safetensors")
_POSITION = "position"


@dataclass(frozen=True)
class Position:
    """How far training is: what has been done, counted.

    Attributes:
        step: optimiser steps in all stages.
        stage: number of the stage that goes on.
        stage_step: steps done of it.
        epoch: of the data that goes on.
        epoch_step: batches used of it.
    """

    step: int = 0
    stage: int = 0
    stage_step: int = 0
    epoch: int = 0
    epoch_step: int = 0


def save_checkpoint(
    folder: Path, position: Position, modules: nn.Module, optimizer: Optimizer
) -> Path:
    """Writes a checkpoint and removes those before it; returns its path.

    Args:
        folder: of checkpoints; made if missing.
        position: how far training is.
        modules: student and heads.
        optimizer: over ``modules``' parameters.
    """
    tensors = {f"weights/{name}": one for name, one in modules.state_dict().items()}
    for name, parameter in modules.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{name}/{kind}"] = torch.as_tensor(value)
    tensors["random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        for number, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"random/cuda{number}"] = state
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{position.step:09d}.safetensors"
    temporary = path.with_suffix(".tmp")
    # safetensors refuses tensors that share memory; clones of views do not.
    contiguous = {
        name: one.detach().cpu().contiguous() for name, one in tensors.items()
    }
    save_file(contiguous, temporary, {_POSITION: json.dumps(asdict(position))})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    for other in folder.iterdir():
        found = _NAME.fullmatch(other.name)
        if found and int(found[1]) < position.step:
            other.unlink()
    return path


def save_heads(path: Path, heads: nn.Module) -> None:
    """Writes the heads' weights by target: the way back to a teacher's own space."""
    temporary = path.with_suffix(".tmp")
    weights = {k: v.detach().cpu().contiguous() for k, v in heads.state_dict().items()}
    save_file(weights, temporary)
    temporary.replace(path)


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the checkpoint that is furthest, None where there is none."""
    if not folder.is_dir():
        return None
    found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    return found[-1] if found else None


def read_position(path: Path) -> Position:
    """Returns how far a checkpoint is.

    Raises:
        TrainingError: it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return Position(**json.loads(file.metadata()[_POSITION]))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise TrainingError(
            f"{path} must be a checkpoint, but it is damaged ({error}); remove it to "
            "start from the beginning"
        ) from error


def load_checkpoint(path: Path, modules: nn.Module, optimizer: Optimizer) -> Position:
    """Puts a checkpoint's state back; returns how far it is.

    Args:
        path: of the checkpoint.
        modules: student and heads as they were made from the same recipe.
        optimizer: fresh, over their parameters.

    Raises:
        TrainingError: it is damaged, or of another student.
    """
    position = read_position(path)
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    weights = _under(tensors, "weights/")
    try:
        modules.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise TrainingError(
            f"{path} must be of this recipe's student: {str(error).splitlines()[-1]}"
        ) from error
    states = _under(tensors, "optimizer/")
    for name, parameter in modules.named_parameters():
        own = _under(states, f"{name}/")
        if own:
            optimizer.state[parameter] = {
                kind: value if kind == "step" else value.to(parameter.device)
                for kind, value in own.items()
            }
    torch.set_rng_state(tensors["random/cpu"])
    for number in range(torch.cuda.device_count()):
        if f"random/cuda{number}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random/cuda{number}"], number)
    return position


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Returns what lies under a prefix, by the rest of its name; no deeper levels."""
    return {
        name.removeprefix(prefix): one
        for name, one in tensors.items()
        if name.startswith(prefix)
    }
