"""One step of learning: forward, backward, the ranks' sum, the optimiser.

A step is of one batch whichever way it is shared out: sums over images are divided by
the number that counts in the whole of it, so that ranks give the gradient of one.
Which batch, and at which rate, is the trainer's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from manifests.recipe import Recipe
from student_train.batches import Batch, split_batch
from student_train.errors import TrainingError
from student_train.features import Student
from student_train.objective import Objective
from student_train.ranks import Ranks


class Modules(nn.Module):
    """Student and heads as one module: what a checkpoint holds."""

    def __init__(self, student: Student, objective: Objective) -> None:
        """Takes both."""
        super().__init__()
        self.student = student
        self.objective = objective

    def forward(
        self, batch: Batch, input_name: str, totals_2T: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the whole loss and each target's share, as the objective does."""
        objective = self.objective
        features = self.student(batch.inputs[input_name], layers=objective.needs_layers)
        found: tuple[Tensor, dict[str, Tensor]] = objective(
            features, batch, input_name, totals_2T
        )
        return found


@dataclass(frozen=True)
class Step:
    """What a step came to, before the weights moved; the same on all ranks.

    Attributes:
        loss: of the whole batch.
        norm: of its gradient, before it was clipped.
        shares: each target's mean loss, before its weight.
    """

    loss: Tensor
    norm: Tensor
    shares: dict[str, Tensor]


class Learner:
    """Makes steps of a recipe's student, alone or with other ranks."""

    def __init__(
        self, recipe: Recipe, modules: Modules, device: torch.device, ranks: Ranks
    ) -> None:
        """Takes the modules, which lie on the device with the weights to go on from.

        Args:
            recipe: what is asked.
            modules: of this rank; those of the first are given to all.
            device: where they lie.
            ranks: that learn together.
        """
        self._recipe, self._modules, self._device = recipe, modules, device
        self._ranks = ranks
        if not ranks.is_alone:
            modules.objective.total_of = ranks.mean
            for one in modules.state_dict().values():
                ranks.copy_first(one)

    def step(
        self, batch: Batch, optimizer: Optimizer, rate: float, parts: int = 1
    ) -> Step:
        """Makes one step.

        Args:
            batch: this rank's rows of it.
            optimizer: over the modules' parameters.
            rate: of learning.
            parts: that the rows go through the student in, one after the other.
        """
        recipe, objective = self._recipe, self._modules.objective
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = batch.to(self._device)
        pieces, totals_2T = [batch], None
        if parts > 1:
            pieces = split_batch(batch, parts)
            counts = [objective.counts(one, recipe.student.input) for one in pieces]
            totals_2T = objective.total_of(torch.stack(counts).sum(0))
        optimizer.zero_grad(set_to_none=True)
        losses = torch.stack([self._learn(piece, totals_2T) for piece in pieces]).sum(0)
        self._average_gradients()
        limit = recipe.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(
            self._modules.parameters(), math.inf if limit is None else limit
        )
        optimizer.step()
        # Every rank's sums are of its own images, over the number of all.
        losses = self._ranks.mean(losses)
        names = [task.name for task in objective.tasks]
        return Step(losses[0], norm, dict(zip(names, losses[1:], strict=True)))

    def _learn(self, batch: Batch, totals_2T: Tensor | None) -> Tensor:
        """Adds a part's gradient; returns its loss and shares: (1 + T,)."""
        recipe = self._recipe
        is_half = recipe.precision == "bfloat16"
        with torch.autocast(self._device.type, torch.bfloat16, enabled=is_half):
            loss, shares = self._modules(batch, recipe.student.input, totals_2T)
        loss.backward()
        return torch.stack([loss.detach(), *shares.values()])

    def _average_gradients(self) -> None:
        """Gives every rank the mean of all ranks' gradients.

        In one message, and not torch's DistributedDataParallel: that has to be told
        which weights no target reaches, which is the recipe's doing, or searches for
        them in every step.
        """
        if self._ranks.is_alone:
            return
        found = [one.grad for one in self._modules.parameters() if one.grad is not None]
        flat = self._ranks.mean(torch.cat([one.flatten() for one in found]))
        sizes = [one.numel() for one in found]
        for gradient, mean in zip(found, flat.split(sizes), strict=True):
            gradient.copy_(mean.view_as(gradient))


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
    from timm.layers import convert_sync_batchnorm

    modules.student.model = convert_sync_batchnorm(model)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
