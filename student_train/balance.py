"""Which teachers an image is learned from: UNIC's teacher dropping.

A function of the losses of a batch and of (seed, epoch, step, row): there is no state
to keep, and whoever holds a row of the batch draws the same for it.

Shape suffixes: T teachers, B images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from student_train.batches import Batch
from student_train.errors import TrainingError
from student_train.order import row_draws
from student_train.tasks import Task


class TeacherDropping:
    """Drops teachers by chance for each image, never the one with the highest loss.

    A teacher's loss of an image is the weighted sum over its targets that are valid
    there; all of them are kept or dropped together. A teacher without a valid target is
    not among those that may be highest. Labels are no teacher and are always kept.

    Source: UNIC (arXiv 2408.05088), teacher dropping, p = 0.5. A dropped image counts
    in neither sum nor number of its teacher's loss.
    """

    def __init__(self, tasks: Sequence[Task], p: float, seed: int) -> None:
        """Takes the targets.

        Args:
            tasks: of a recipe.
            p: chance that a teacher which is not the highest is dropped.
            seed: of the draws.

        Raises:
            TrainingError: there is only one teacher, so that none is ever dropped.
        """
        self._seed, self._p = seed, p
        self._tasks = {
            teacher: [task for task in tasks if task.teacher == teacher]
            for teacher in sorted({task.teacher for task in tasks if task.teacher})
        }
        if len(self._tasks) < 2:
            raise TrainingError(
                "balance must be fixed where fewer than two teachers are learned from, "
                f"got drop_teachers for {', '.join(self._tasks) or 'none'}; leave "
                "`balance` out"
            )

    def kept(
        self,
        per_image: Mapping[str, Tensor],
        valid: Mapping[str, Tensor],
        batch: Batch,
    ) -> dict[str, Tensor]:
        """Returns which images count for each target: (B,) bool, only valid ones.

        Args:
            per_image: (B,) loss by target.
            valid: (B,) bool by target.
            batch: whose images they are.
        """
        losses, has = [], []
        for tasks in self._tasks.values():
            weighted = [
                task.config.weight
                * torch.where(valid[task.name], per_image[task.name].detach(), 0.0)
                for task in tasks
            ]
            losses.append(torch.stack(weighted).sum(0))
            has.append(torch.stack([valid[task.name] for task in tasks]).any(0))
        loss_TB = torch.where(torch.stack(has), torch.stack(losses), -torch.inf)
        is_highest_TB = torch.zeros_like(loss_TB, dtype=torch.bool)
        is_highest_TB.scatter_(0, loss_TB.argmax(0, keepdim=True), True)
        draws_TB = row_draws(
            self._seed, batch.epoch, batch.step, batch.rows, len(self._tasks)
        )
        survives_TB = torch.from_numpy(draws_TB >= self._p).to(loss_TB.device)
        kept_TB = is_highest_TB | survives_TB
        found = dict(valid)
        for kept_B, tasks in zip(kept_TB, self._tasks.values(), strict=True):
            for task in tasks:
                found[task.name] = valid[task.name] & kept_B
        return found
