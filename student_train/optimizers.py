"""Optimisers, and which parameters weight decay acts on; rates are ``schedules``'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifests.recipe import OptimizerConfig


def make_optimizer(config: OptimizerConfig, modules: nn.Module) -> Optimizer:
    """Returns an optimiser; weight decay spares norms, biases and tokens.

    Args:
        config: the recipe's ``optimizer``.
        modules: whose parameters are learned; those that are frozen are left out.
    """
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for name, parameter in modules.named_parameters():
        if not parameter.requires_grad:
            continue
        is_token = name.rpartition(".")[2].endswith(("token", "tokens", "embed"))
        (spared if parameter.ndim < 2 or is_token else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.kind == "adamw":
        return torch.optim.AdamW(groups, betas=config.betas, eps=config.eps)
    return torch.optim.SGD(
        groups,
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov and config.momentum > 0,
    )
