"""How a student's model is run while it is trained; what it computes stays the same.

Batch norm over all ranks, activations computed twice to save memory, compiled kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from student_train.errors import TrainingError
from student_train.features import Student
from student_train.learning import Modules
from student_train.objective import Objective
from student_train.ranks import Ranks


def compile_features(student: Student, objective: Objective) -> None:
    """Lets torch compile a student's forward, at the first step of each input size.

    Raises:
        TrainingError: a head looks at its layers, which is not compiled.
    """
    if objective.needs_layers:
        raise TrainingError(
            "engine.compile must be false with heads that look at the student's "
            "layers, got true; leave it out"
        )
    student.compile_features()


def forget_activations(student: Student) -> None:
    """Lets a student compute activations again in the backward pass, to save memory.

    Raises:
        TrainingError: its model has no such thing.
    """
    model: Any = student.model
    try:
        model.set_grad_checkpointing(True)
    # timm's models without it have the method, and an assertion in it.
    except (AttributeError, AssertionError) as error:
        raise TrainingError(
            "student.checkpointing must be of a model that has it "
            f"(set_grad_checkpointing), got {type(model).__name__}; leave it out, or "
            "set `accumulate` of the stage to save memory"
        ) from error


def share_batch_norms(modules: Modules, device: torch.device, ranks: Ranks) -> None:
    """Lets layers that norm over a batch norm over the batch of all ranks.

    Raises:
        TrainingError: they cannot on this device.
    """
    model = modules.student.model
    norms = [one for one in model.modules() if _is_batch_norm(one)]
    if ranks.is_alone or not norms:
        return
    if device.type != "cuda":
        raise TrainingError(
            f"student.model with batch norm ({len(norms)} layers) must be trained by "
            f"one process on a CPU, got {ranks.count} ranks, whose layers would each "
            "norm by rows of their own; start it without torchrun, or on accelerators"
        )
    modules.student.model = convert_sync_batchnorm(model)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
