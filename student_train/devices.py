"""Which device a student runs on."""

from __future__ import annotations

import contextlib
import re
from contextlib import AbstractContextManager

import torch

from student_train.errors import TrainingError
from student_train.ranks import Ranks


def choose_device(name: str, ranks: Ranks | None = None) -> torch.device:
    """Returns the device of ``engine.device``; ``auto`` is CUDA where there is one.

    Args:
        name: the recipe's.
        ranks: that train together: each takes an accelerator of its own.

    Raises:
        TrainingError: no such device, or this machine has none.
    """
    if ranks is not None and not ranks.is_alone and name != "cpu":
        if name not in ("auto", "cuda"):
            raise TrainingError(
                "engine.device must be auto, cpu or cuda where ranks train together, "
                f"got {name}; each takes an accelerator of its own"
            )
        if name == "cuda" or torch.cuda.is_available():
            name = f"cuda:{ranks.local}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise TrainingError(
            f"engine.device must be auto, cpu, cuda or cuda:N, got {name!r}"
        )
    device = torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise TrainingError(
            f"engine.device must be a device of this machine, got {name}; torch sees "
            f"{count or 'no'} accelerator{'s' if count > 1 else ''}"
        )
    return device


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Returns a context in which float32 stays float32, whatever the trainer asked for.

    Args:
        device: of the tensors; on one that autocast does not know there is none.
    """
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
