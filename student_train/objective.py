"""What a student is trained for: a head and a loss per target, weighed against others.

Order of a patch loss: decode, normalise, bring both onto one grid, then the loss, mean
over valid cells, then over valid images. Shape suffixes: B images, H and W grid of the
view, R and K rows and columns of a bird's-eye grid, C channels, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from manifests.target import BalanceConfig
from pipeline.bank.open import Bank
from student_train.balance import TeacherDropping
from student_train.batches import Batch, Cameras
from student_train.errors import TrainingError
from student_train.features import Student, StudentFeatures
from student_train.grids import common_size, match_grids, resize_grid
from student_train.heads import BevHead
from student_train.inputs import Size
from student_train.losses import reduce, valid_images
from student_train.target_space import TargetSpace
from student_train.task_heads import TokenKind, Wanted, head_kind, tokens_of
from student_train.tasks import Task

# What heads have made of features, by head and kind of tokens.
_Made = dict[tuple[str, TokenKind], Tensor]

_NORMALISER = "normaliser"
_DROP_P = 0.5


class Objective(nn.Module):
    """Heads, normalisations and losses of all targets.

    Attributes:
        tasks: the targets.
        heads: by target; those that use another's are not among them.
        spaces: by target of features: what is kept of the bank's statistics.
        needs_layers: whether a head looks at the student's layers.
        total_of: from numbers of images that count here, (2 T,) float32 as kept by
            balance and as valid for each target, to what sums are divided by. With
            several ranks: the mean of their numbers, as gradients are averaged too.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        student: Student,
        balance: BalanceConfig | None = None,
        seed: int = 0,
    ) -> None:
        """Makes the heads, from torch's global generator.

        Args:
            tasks: the targets.
            student: whose features are learned with.
            balance: between teachers; fixed if omitted.
            seed: of its draws.

        Raises:
            TrainingError: the student has not the tokens that a target asks for, or a
                head that cannot look at them.
            ManifestError: an unknown head, or a field of another one.
        """
        super().__init__()
        self.tasks = tuple(tasks)
        self.total_of: Callable[[Tensor], Tensor] = lambda counts_T: counts_T
        self._tokens = {task.name: tokens_of(task, student) for task in tasks}
        self._head_of = {
            task.name: task.config.head.same_as or task.name for task in tasks
        }
        by_name = {task.name: task for task in tasks}
        self._kinds = {
            name: head_kind(by_name[name].config.head, f"targets.{name}.head")
            for name in dict.fromkeys(self._head_of.values())
        }
        self.needs_layers = any(kind.needs_layers for kind in self._kinds.values())
        self._check_shared(by_name)
        self.heads = nn.ModuleDict(
            {
                name: kind.make(Wanted(by_name[name], self._tokens[name], student))
                for name, kind in self._kinds.items()
            }
        )
        self.spaces = nn.ModuleDict(
            {task.name: TargetSpace(task) for task in tasks if task.kind == "features"}
        )
        self._dropping = None
        if balance is not None and balance.kind == "drop_teachers":
            chance = _DROP_P if balance.p is None else balance.p
            self._dropping = TeacherDropping(tasks, chance, seed)

    def _check_shared(self, tasks: Mapping[str, Task]) -> None:
        """Refuses a shared head that its second target cannot use."""
        for task in self.tasks:
            other = tasks[self._head_of[task.name]]
            tokens = self._tokens[task.name], self._tokens[other.name]
            is_same = tokens[0] == tokens[1] or self._kinds[other.name].gives_all
            if not is_same or task.width != other.width:
                raise TrainingError(
                    f"targets.{task.name}.head.same_as must name a target of its own "
                    f"tokens and width ({tokens[0]}, {task.width}), got {other.name} "
                    f"({tokens[1]}, {other.width}); set `tokens`, or give it a head"
                )

    def fit(self, bank: Bank) -> None:
        """Takes the numbers of normalisations and losses from the bank's statistics.

        Once, when a run begins: afterwards they come from its checkpoints.

        Raises:
            TrainingError: the bank has not what is asked for of an output.
            BankError: its statistics cannot be read.
        """
        for task in self.tasks:
            if task.name in self.spaces:
                self._space(task).fit(task, bank)

    def _space(self, task: Task) -> TargetSpace:
        space = self.spaces[task.name]
        assert isinstance(space, TargetSpace)
        return space

    # Learning.

    def counts(self, batch: Batch, input_name: str) -> Tensor:
        """Returns what `total_of` takes of a batch, without a student: (2 T,) float32.

        Args:
            batch: whose images are counted.
            input_name: the student's input.
        """
        assert self._dropping is None
        valid = [self._counted(task, batch, input_name).sum() for task in self.tasks]
        return torch.stack([*valid, *valid]).float()

    def _counted(self, task: Task, batch: Batch, input_name: str) -> Tensor:
        """Returns which images are valid for a target, as `_loss` does: (B,) bool."""
        if task.label is not None:
            mask = _label(task, batch)[1]
        else:
            mask = batch.targets[task.name].valid
        if task.shape != "bev":
            return valid_images(mask)
        head, camera = self.heads[self._head_of[task.name]], batch.cameras[input_name]
        assert isinstance(head, BevHead)
        height, width = batch.inputs[input_name].shape[1:3]
        visible = head.visible(camera.intrinsics, camera.lidar2cam, (height, width))
        if task.label is not None:
            return valid_images(mask & _nearest(visible, _rows_columns(mask)))
        assert task.grid is not None
        size = common_size(_rows_columns(visible), task.grid, task.config.grid)
        return mask & valid_images(_nearest(visible, size))

    def forward(
        self,
        features: StudentFeatures,
        batch: Batch,
        input_name: str,
        totals_2T: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the whole loss and each target's share of it, before its weight.

        Shares are means over all valid images, also of those that balance leaves out,
        so that they compare from step to step.

        Args:
            features: of the student, with its layers where `needs_layers`.
            batch: what they are compared with.
            input_name: the student's input.
            totals_2T: what sums are divided by, where the batch is a part of a step's.
        """
        pixels = batch.inputs[input_name]
        size_hw = (pixels.shape[1], pixels.shape[2])
        camera = batch.cameras.get(input_name)
        per_image, valid = {}, {}
        made: _Made = {}
        for task in self.tasks:
            prediction, visible = self.predict(task, features, camera, size_hw, made)
            per_image[task.name], valid[task.name] = self._loss(
                task, prediction, visible, batch
            )
        kept = valid
        if self._dropping is not None:
            kept = self._dropping.kept(per_image, valid, batch)
        if totals_2T is None:
            counts_2T = torch.stack(
                [one[task.name].sum() for one in (kept, valid) for task in self.tasks]
            )
            totals_2T = self.total_of(counts_2T.float())
        kept_T, valid_T = totals_2T.chunk(2)
        total = torch.stack(
            [
                task.config.weight
                * reduce(per_image[task.name], kept[task.name], count)
                for task, count in zip(self.tasks, kept_T, strict=True)
            ]
        ).sum()
        shares = {
            task.name: reduce(per_image[task.name].detach(), valid[task.name], count)
            for task, count in zip(self.tasks, valid_T, strict=True)
        }
        return total, shares

    def predict(
        self,
        task: Task,
        features: StudentFeatures,
        camera: Cameras | None,
        size_hw: Size,
        made: _Made | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what a target's head makes of the student's features.

        Args:
            task: the target.
            features: of the student, with its layers where `needs_layers`.
            camera: calibration of its input; for bird's-eye heads.
            size_hw: height and width of its input.
            made: what heads have made of these features already; added to.

        Returns:
            prediction (B, C) or (B, H, W, C), normalised as its target is; which cells
            the camera sees (B, R, K) bool, None where all count.
        """
        name = self._head_of[task.name]
        if task.shape == "bev":
            assert camera is not None
            prediction, visible = self.heads[name](
                features.patch, camera.intrinsics, camera.lidar2cam, size_hw
            )
            return prediction, visible
        tokens, made = self._tokens[task.name], {} if made is None else made
        if (name, tokens) not in made:
            found = self._kinds[name].run(self.heads[name], features, tokens)
            made.update({(name, kind): one for kind, one in found.items()})
        return made[name, tokens], None

    def undo(self, task: Task, prediction: Tensor) -> Tensor:
        """Returns predictions (..., C) as the teacher would have given them."""
        if task.name not in self.spaces:
            return prediction
        normaliser = self._space(task).normaliser
        return prediction if normaliser is None else normaliser.undo(prediction)

    def _loss(
        self, task: Task, prediction: Tensor, visible: Tensor | None, batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of each image (B,), and which are valid: (B,) bool."""
        statistics: Mapping[str, Tensor] = {}
        if task.label is not None:
            target, mask = _label(task, batch)
            if task.shape != "vector":
                prediction = resize_grid(
                    prediction, (target.shape[1], target.shape[2]), "bilinear"
                )
        else:
            found = batch.targets[task.name]
            target, mask = found.values(task.temperature), found.valid
            if task.name in self.spaces:
                space = self._space(task)
                target, statistics = space(target), space.statistics
            if task.shape != "vector":
                mask = mask[:, None, None].expand(target.shape[:3])
                prediction, target, mask = match_grids(
                    prediction, target, mask, task.config.grid
                )
        if visible is not None:
            mask = mask & _nearest(visible, (mask.shape[1], mask.shape[2]))
        per_image = torch.stack(
            [
                term.weight * term(prediction, target, mask, statistics)
                for term in task.terms
            ]
        ).sum(0)
        return per_image, valid_images(mask)

    # What is kept when training is done.

    def head_state(self) -> dict[str, Tensor]:
        """Returns heads by target, and ``<target>.normaliser.<number>``."""
        found: dict[str, Tensor] = dict(self.heads.state_dict())
        for task in self.tasks:
            if task.name in self.spaces:
                normaliser = self._space(task).normaliser
                numbers = {} if normaliser is None else normaliser.state_dict()
                for name, one in numbers.items():
                    found[f"{task.name}.{_NORMALISER}.{name}"] = one
        return found

    def load_head_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes what `head_state` gave.

        Raises:
            RuntimeError: it is of other heads.
        """
        own = {name: one for name, one in state.items() if f".{_NORMALISER}." in name}
        self.heads.load_state_dict(
            {name: one for name, one in state.items() if name not in own}
        )
        for task in self.tasks:
            normaliser = (
                self._space(task).normaliser if task.name in self.spaces else None
            )
            if normaliser is not None:
                prefix = f"{task.name}.{_NORMALISER}."
                normaliser.load_state_dict(
                    {
                        name.removeprefix(prefix): one
                        for name, one in own.items()
                        if name.startswith(prefix)
                    }
                )


def _label(task: Task, batch: Batch) -> tuple[Tensor, Tensor]:
    """Returns a label as its loss takes it, and where there is one."""
    assert task.label is not None
    found = batch.labels[task.label]
    if task.kind == "classes":
        return found, found >= 0
    return found.to(torch.float32)[..., None], ~found.isnan()


def _rows_columns(mask_BHW: Tensor) -> Size:
    return mask_BHW.shape[1], mask_BHW.shape[2]


def _nearest(mask_BHW: Tensor, size: Size) -> Tensor:
    """Returns a mask on another grid, each cell the nearest of it."""
    if mask_BHW.shape[1:] == size:
        return mask_BHW
    resized = nn.functional.interpolate(
        mask_BHW[:, None].float(), size, mode="nearest-exact"
    )
    return resized[:, 0] > 0
