"""Checkpoints: everything that the next step depends on, in one safetensors file.

Weights of student and heads, the optimiser's state, the random generators, and where in
the data training stands. A checkpoint appears whole or not at all; the one before it is
removed only then.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from manifests.errors import StorageError
from student_train.errors import TrainingError

_NAME = re.compile(r"step-(\d{9})\.safetensors")
_UNFINISHED = re.compile(r"step-\d{9}\.tmp")
_POSITION = "position"
_MADE = "made_from"
_LEARNING = "learning/"


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
    folder: Path,
    position: Position,
    modules: nn.Module,
    optimizer: Optimizer,
    random: Sequence[Mapping[str, Tensor]] = (),
    learning: Mapping[str, Tensor] | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a checkpoint and removes those before it; returns its path.

    Args:
        folder: of checkpoints; made if missing.
        position: how far training is.
        modules: student and heads.
        optimizer: over ``modules``' parameters.
        random: `random_state` of every rank; of this process alone if omitted.
        learning: what else steps depend on, by name.
        made_from: said in its metadata: recipe, bank, licence.

    Raises:
        StorageError: it cannot be written; the one before it is still there.
    """
    tensors = {f"weights/{name}": one for name, one in modules.state_dict().items()}
    for name, parameter in modules.named_parameters():
        for kind, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                tensors[f"optimizer/{name}/{kind}"] = torch.as_tensor(value)
    for rank, state in enumerate(random or [random_state(modules)]):
        for kind, value in state.items():
            tensors[f"{_random_of(rank)}{kind}"] = value
    tensors |= {f"{_LEARNING}{name}": one for name, one in (learning or {}).items()}
    path = folder / f"step-{position.step:09d}.safetensors"
    said = {_POSITION: asdict(position), **({_MADE: made_from} if made_from else {})}
    _write(path, tensors, {name: json.dumps(one) for name, one in said.items()})
    for other in folder.iterdir():
        found = _NAME.fullmatch(other.name)
        is_older = found and int(found[1]) < position.step
        # What a killed run was writing is of no use to anybody.
        if is_older or _UNFINISHED.fullmatch(other.name):
            other.unlink()
    return path


def random_state(modules: nn.Module) -> dict[str, Tensor]:
    """Returns the state of the generators that dropout draws from, by kind."""
    found = {"cpu": torch.get_rng_state()}
    if (device := _cuda_of(modules)) is not None:
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _random_of(rank: int) -> str:
    return f"random/{rank}/" if rank else "random/"


def save_heads(path: Path, state: Mapping[str, Tensor]) -> None:
    """Writes heads and normalisations: the way back to a teacher's own space.

    Args:
        path: of the file.
        state: by target, as the objective gives it.

    Raises:
        StorageError: they cannot be written.
    """
    _write(path, state, {})


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a file of tensors that is there whole or not at all."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), temporary, metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error}; free some space or look at who owns it, "
            "the same command then goes on from the checkpoint before"
        ) from error


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors in plain memory that no two share, as safetensors demands."""
    found: dict[str, Tensor] = {}
    met: set[int] = set()
    for name, one in tensors.items():
        plain = one.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        # Weights may be tied: two names of one parameter.
        found[name] = plain.clone() if memory in met else plain
        met.add(memory)
    return found


def _cuda_of(modules: nn.Module) -> torch.device | None:
    """Returns the accelerator that modules lie on; asking any other would wake it."""
    devices = (parameter.device for parameter in modules.parameters())
    return next((device for device in devices if device.type == "cuda"), None)


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


def read_learning(path: Path) -> dict[str, Tensor]:
    """Returns what a checkpoint was given as ``learning``."""
    with safe_open(path, "pt") as file:
        return {
            name.removeprefix(_LEARNING): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(_LEARNING)
        }


def load_checkpoint(
    path: Path, modules: nn.Module, optimizer: Optimizer, rank: int = 0
) -> Position:
    """Puts a checkpoint's state back; returns how far it is.

    Args:
        path: of the checkpoint.
        modules: student and heads as they were made from the same recipe.
        optimizer: fresh, over their parameters.
        rank: whose generators are put back; a rank that there was not keeps its own.

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
    random = _under(tensors, _random_of(rank))
    if "cpu" in random:
        torch.set_rng_state(random["cpu"])
    if (device := _cuda_of(modules)) is not None and "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], device)
    return position


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """Returns what lies under a prefix, by the rest of its name; no deeper levels."""
    return {
        name.removeprefix(prefix): one
        for name, one in tensors.items()
        if name.startswith(prefix)
    }
