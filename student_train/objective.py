"""What a student is trained for: a head and a loss per target.

Shape suffixes: B images, H and W grid of the view, R and K rows and columns of a
bird's-eye grid, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from student_train.batches import Batch
from student_train.errors import TrainingError
from student_train.features import Student, StudentFeatures
from student_train.grids import match_grids, resize_grid
from student_train.heads import Adapter, BevGrid, BevHead, LinearHead
from student_train.inputs import Size
from student_train.losses import reduce, valid_images
from student_train.tasks import Task

# Cells of a bird's-eye head for a label, where the recipe does not say.
_BEV_CELLS = (32, 32)
# Channels that a camera's cells are brought to before they are lifted, at most.
_BEV_LIFTED = 64


class Objective(nn.Module):
    """Heads and losses of all targets.

    Attributes:
        tasks: the targets.
        heads: by target; those that use another's are not among them.
    """

    def __init__(self, tasks: Sequence[Task], student: Student) -> None:
        """Makes the heads, from torch's global generator.

        Raises:
            TrainingError: the student has not the tokens that a target asks for.
        """
        super().__init__()
        self.tasks = tuple(tasks)
        self._input_tokens = {task.name: _tokens(task, student) for task in tasks}
        self._head_of = {
            task.name: task.config.head.same_as or task.name for task in tasks
        }
        self._check_shared()
        self.heads = nn.ModuleDict(
            {
                task.name: _make_head(task, self._input_tokens[task.name], student)
                for task in tasks
                if self._head_of[task.name] == task.name
            }
        )

    def _check_shared(self) -> None:
        """Refuses a shared head that its second target cannot use."""
        tasks = {task.name: task for task in self.tasks}
        for task in self.tasks:
            other = tasks[self._head_of[task.name]]
            tokens = self._input_tokens[task.name], self._input_tokens[other.name]
            if tokens[0] != tokens[1] or task.width != other.width:
                raise TrainingError(
                    f"targets.{task.name}.head.same_as must name a target of its own "
                    f"tokens and width ({tokens[0]}, {task.width}), got {other.name} "
                    f"({tokens[1]}, {other.width}); set `tokens`, or give it a head"
                )

    def forward(
        self, features: StudentFeatures, batch: Batch, input_name: str
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the whole loss and each target's share of it, before its weight.

        Args:
            features: of the student.
            batch: what they are compared with.
            input_name: the student's input.
        """
        size_hw = (
            batch.inputs[input_name].shape[1],
            batch.inputs[input_name].shape[2],
        )
        shares = {}
        for task in self.tasks:
            tokens = getattr(features, self._input_tokens[task.name])
            head = self.heads[self._head_of[task.name]]
            if task.shape == "bev":
                camera = batch.cameras[input_name]
                prediction, visible = head(
                    tokens, camera.intrinsics, camera.lidar2cam, size_hw
                )
            else:
                prediction, visible = head(tokens), None
            shares[task.name] = self._loss(task, prediction, visible, batch)
        total = torch.stack(
            [task.config.weight * shares[task.name] for task in self.tasks]
        ).sum()
        return total, {name: share.detach() for name, share in shares.items()}

    def _loss(
        self, task: Task, prediction: Tensor, visible: Tensor | None, batch: Batch
    ) -> Tensor:
        if task.label is not None:
            target, mask = _label(task, batch)
            if task.shape != "vector":
                prediction = resize_grid(
                    prediction, (target.shape[1], target.shape[2]), "bilinear"
                )
        else:
            found = batch.targets[task.name]
            target = found.values()
            mask = found.valid
            if task.shape != "vector":
                mask = mask[:, None, None].expand(target.shape[:3])
                prediction, target, mask = match_grids(
                    prediction, target, mask, task.config.grid
                )
        if visible is not None:
            mask = mask & _nearest(visible, (mask.shape[1], mask.shape[2]))
        per_image = torch.stack(
            [term.weight * term(prediction, target, mask) for term in task.terms]
        ).sum(0)
        return reduce(per_image, valid_images(mask))


def _label(task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns a label as its loss takes it, and where there is one."""
    assert task.label is not None
    found = batch.labels[task.label]
    if task.kind == "classes":
        return found, found >= 0
    return found.to(torch.float32)[..., None], ~found.isnan()


def _nearest(mask_BHW: Tensor, size: Size) -> Tensor:
    """Returns a mask on another grid, each cell the nearest of it."""
    if mask_BHW.shape[1:] == size:
        return mask_BHW
    resized = nn.functional.interpolate(
        mask_BHW[:, None].float(), size, mode="nearest-exact"
    )
    return resized[:, 0] > 0


def _tokens(task: Task, student: Student) -> str:
    """Returns which of the student's tokens a target is learned from."""
    chosen = task.config.tokens
    if task.shape != "vector":
        chosen = "patch"
    elif chosen is None:
        chosen = (
            "cls" if student.cls_dim is not None and task.label is None else "pooled"
        )
    if getattr(student, f"{chosen}_dim") is None:
        raise TrainingError(
            f"targets.{task.name} must be learned from tokens that the student has, "
            f"got {chosen}, which it has not; choose another student or `tokens`"
        )
    return chosen


def _make_head(task: Task, tokens: str, student: Student) -> nn.Module:
    config = task.config.head
    width = int(getattr(student, f"{tokens}_dim"))
    hidden = config.hidden or 4 * width
    if config.kind == "adapter":
        return Adapter(width, task.width, hidden)
    if config.kind == "linear":
        return LinearHead(width, task.width)
    assert task.extent is not None
    extent = task.extent
    grid = BevGrid(
        x_m=extent.x_m,
        y_m=extent.y_m,
        cells=config.cells or task.grid or _BEV_CELLS,
        row_0=extent.row_0,
        column_0=extent.column_0,
    )
    return BevHead(
        width, task.width, hidden, grid, config.heights_m, min(hidden, _BEV_LIFTED)
    )
