"""One step of learning: forward, backward, the ranks' sum, the optimiser.

A step is of one batch whichever way it is shared out: sums over images are divided by
the number that counts in the whole of it, so that ranks give the gradient of one.
Which batch, and at which rate, is the trainer's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.optim import Optimizer

from manifests.recipe import Recipe
from student_train.batches import Batch, split_batch
from student_train.errors import TrainingError, reason_of
from student_train.features import Student
from student_train.objective import Objective
from student_train.ranks import Ranks

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# What changes of a scaler's state, by torch's names for it.
_SCALER: dict[str, Callable[[Tensor], float]] = {"scale": float, "_growth_tracker": int}
_AVERAGE = "average/"


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
        is_skipped: whether the gradient overflowed in float16, so that the weights
            stayed and the next loss is scaled less.
        shares: each target's mean loss, before its weight.
    """

    loss: Tensor
    norm: Tensor
    shares: dict[str, Tensor]
    is_skipped: bool = False


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
        self._dtype = _DTYPES.get(recipe.precision, torch.float32)
        is_scaled = self._dtype == torch.float16
        self._scaler = torch.amp.GradScaler(device.type, enabled=is_scaled)
        self.average: ModelEmaV3 | None = None
        if recipe.ema is not None and ranks.is_first:
            self.average = ModelEmaV3(modules.student.model, recipe.ema.decay)
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
        self._scaler.unscale_(optimizer)
        limit = recipe.optimizer.clip_norm
        norm = nn.utils.clip_grad_norm_(
            self._modules.parameters(), math.inf if limit is None else limit
        )
        self._scaler.step(optimizer)
        self._scaler.update()
        if self.average is not None:
            self.average.update(self._modules.student.model)
        # Every rank's sums are of its own images, over the number of all.
        losses = self._ranks.mean(losses)
        names = [task.name for task in objective.tasks]
        shares = dict(zip(names, losses[1:], strict=True))
        return Step(losses[0], norm, shares, self._was_skipped(norm))

    def _was_skipped(self, norm: Tensor) -> bool:
        # A gradient that overflows at any scale is not float16's doing.
        has_room = self._scaler.is_enabled() and self._scaler.get_scale() >= 1
        return has_room and not bool(torch.isfinite(norm))

    def _learn(self, batch: Batch, totals_2T: Tensor | None) -> Tensor:
        """Adds a part's gradient; returns its loss and shares: (1 + T,)."""
        kind, is_half = self._device.type, self._dtype != torch.float32
        with torch.autocast(kind, self._dtype, enabled=is_half):
            loss, shares = self._run(batch, totals_2T)
        self._scaler.scale(loss).backward()
        return torch.stack([loss.detach(), *shares.values()])

    def _run(
        self, batch: Batch, totals_2T: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            found: tuple[Tensor, dict[str, Tensor]] = self._modules(
                batch, self._recipe.student.input, totals_2T
            )
        except TorchDynamoException as error:
            raise TrainingError(
                "engine.compile must be false where torch cannot compile "
                f"{self._recipe.student.model}, got {reason_of(error)}; leave it out"
            ) from error
        return found

    def averaged(self) -> Student:
        """Returns the student with the averaged weights of a recipe with `ema`."""
        assert self.average is not None
        student = self._modules.student
        return Student(
            self.average.module,
            native_size=student.native_size,
            size=student.size,
            mean=student.mean,
            std=student.std,
            architecture=student.architecture,
            args=student.args,
        )

    # What a checkpoint holds besides weights and optimiser.

    def state(self) -> dict[str, Tensor]:
        """Returns the averaged weights and float16's scale, where there are such."""
        found: dict[str, Tensor] = {
            name: torch.tensor(one, dtype=torch.float64)
            for name, one in self._scaler.state_dict().items()
            if name in _SCALER
        }
        if self.average is not None:
            held = self.average.module.state_dict()
            found |= {f"{_AVERAGE}{name}": one for name, one in held.items()}
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `state` gave on the first rank."""
        if self._scaler.is_enabled():
            held = {name: kind(state[name]) for name, kind in _SCALER.items()}
            self._scaler.load_state_dict({**self._scaler.state_dict(), **held})
        if self.average is not None:
            self.average.module.load_state_dict(
                {
                    name.removeprefix(_AVERAGE): one
                    for name, one in state.items()
                    if name.startswith(_AVERAGE)
                }
            )

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
