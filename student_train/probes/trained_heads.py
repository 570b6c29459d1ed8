"""Heads that students were trained with, for a look through them at a teacher's space.

Owns finding a run's head for one output of a bank, and the way from what it gives to
what the teacher would have given.

Shape suffixes: B rows, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from manifests.recipe import LABELS, Recipe
from pipeline.bank.open import Bank
from student_train.errors import TrainingError, reason_of
from student_train.features import StudentFeatures
from student_train.inputs import Size
from student_train.objective import Objective
from student_train.probes.models import ScoredStudent, run_of
from student_train.run_folder import RunFolder
from student_train.targets import find_output
from student_train.tasks import Task, resolve_tasks

DIRECTIONAL = ("cosine", "map_cosine", "angle", "unit_l2")
"""Losses that are blind to the length of a prediction."""


class TrainedHead(nn.Module):
    """A student's head of one target, then the way back to the teacher's own space.

    Where the target is normalised and all its losses are blind to lengths, a prediction
    has a direction only, but the way back adds the mean to it, so its length counts. It
    gets that of a normalised target then: the root of the number of channels, each of
    which has variance 1.

    Attributes:
        task: the target.
        width: its channels.
        needs_layers: whether its head looks at the student's layers.
    """

    def __init__(self, objective: Objective, task: Task) -> None:
        """Takes an objective that has the task's head."""
        super().__init__()
        self._objective, self.task = objective, task
        self.width, self.needs_layers = task.width, objective.needs_layers
        weighed = [term.name for term in task.terms if term.weight > 0]
        self._is_free = task.normalise != "none" and all(
            name in DIRECTIONAL for name in weighed
        )

    def forward(self, features: StudentFeatures, size: Size) -> Tensor:
        """Returns (B, C) float32 as the teacher would have given them.

        Args:
            features: of the student, with its layers where `needs_layers`.
            size: height and width of its input.
        """
        found_BC, _ = self._objective.predict(self.task, features, None, size)
        if self._is_free:
            found_BC = F.normalize(found_BC, dim=-1) * math.sqrt(self.width)
        return self._objective.undo(self.task, found_BC)


def open_head(
    model: ScoredStudent, path: str, bank: Bank, seed: int
) -> TrainedHead | str:
    """Returns a student's head for a vector output of a bank, or why there is none.

    A random student has the same head, as drawn, with the normalisation of the run: the
    floor of the whole way.

    Args:
        model: a student or a random one.
        path: of the output.
        bank: that holds it; its teacher may have made another bank for training.
        seed: of the random student's head.

    Raises:
        TrainingError: the run's file of heads is missing or is of another recipe.
    """
    held = run_of(model)
    if held is None:
        return "its run is not at hand, whose heads.safetensors has the head"
    run, recipe = held
    names = [name for name in recipe.targets if _learns(recipe, name, path, bank)]
    if not names:
        return f"it has no head for {path}: no target of its recipe is that output"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective, task = _make(model, recipe, names[0], bank)
    state = _read(run)
    made = objective.head_state()
    is_random = model.role == "random"
    wanted = [name for name in made if not is_random or ".normaliser." in name]
    if missing := [name for name in wanted if name not in state]:
        raise TrainingError(
            f"{run.heads} must have the heads of its recipe, got no {missing[0]}; "
            "train again"
        )
    try:
        objective.load_head_state(made | {name: state[name] for name in wanted})
    except RuntimeError as error:
        raise TrainingError(
            f"{run.heads} must have the heads of its recipe, got {reason_of(error)}; "
            "train again"
        ) from error
    return TrainedHead(objective.eval(), task)


def _learns(recipe: Recipe, name: str, path: str, bank: Bank) -> bool:
    """Tells whether a target of a recipe is an output of a bank."""
    first, _, source = recipe.targets[name].source.partition("/")
    if first not in recipe.banks or source.partition("/")[0] == LABELS:
        return False
    try:
        return find_output(bank, source, recipe.student.input, name) == path
    except TrainingError:
        return False


def _make(
    model: ScoredStudent, recipe: Recipe, name: str, bank: Bank
) -> tuple[Objective, Task]:
    """Returns an objective of one target, with the target whose head it uses."""
    wanted = (name, recipe.targets[name].head.same_as)
    targets = {one: recipe.targets[one] for one in recipe.targets if one in wanted}
    try:
        tasks = resolve_tasks(recipe.model_copy(update={"targets": targets}), bank)
        objective = Objective(tasks, model.student)
    except TrainingError as error:
        raise TrainingError(f"students.{model.name}: {error}") from error
    (task,) = (one for one in tasks if one.name == name)
    return objective, task


def _read(run: RunFolder) -> Mapping[str, Tensor]:
    try:
        return load_file(run.heads)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{run.heads} must hold the heads that the run trained, but it cannot be "
            f"read ({reason_of(error)}); train again"
        ) from error
