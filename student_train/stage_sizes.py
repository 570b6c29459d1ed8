"""The sizes of a student's input in each stage of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from manifests.recipe import Recipe, StageConfig
from pipeline.bank.open import Bank
from pipeline.samples.fitting import fit_size
from student_train.errors import TrainingError
from student_train.features import Student
from student_train.inputs import Size
from student_train.students import make_student
from student_train.tasks import Task


class StageSizes:
    """Finds the sizes of a recipe's stages."""

    def __init__(self, recipe: Recipe, bank: Bank, tasks: Sequence[Task]) -> None:
        """Takes the recipe and what it learns.

        Raises:
            TrainingError: targets whose grids must coincide have different ones.
        """
        self._recipe, self._bank = recipe, bank
        self._coinciding = [task for task in tasks if must_coincide(task)]
        grids = {task.grid for task in self._coinciding}
        if len(grids) > 1:
            shown = ", ".join(f"{t.name} {_shown(t.grid)}" for t in self._coinciding)
            raise TrainingError(
                "targets with `grid: coincide` must have grids of one size, got "
                f"{shown}; let one coincide and give the others `grid: student`"
            )
        self._asked: dict[Size | None, tuple[Size, int]] = {}

    def all(self) -> list[list[Size]]:
        """Returns each stage's sizes, those in one number fitted to the view's aspect.

        Raises:
            TrainingError: a student from a file without a size.
        """
        found: list[list[Size]] = []
        for stage in self._recipe.stages:
            if not stage.sizes and self._coinciding:
                found.append([self._coincident(stage)])
                continue
            given: list[int | Size | None] = [*stage.sizes] or [None]
            found.append(
                [
                    one if isinstance(one, tuple) else self._fitted(one, stage)
                    for one in given
                ]
            )
        return found

    def check(self, student: Student, sizes: Sequence[Sequence[Size]]) -> None:
        """Checks sizes against the student before anything is trained.

        Raises:
            TrainingError: a size that it refuses, or at which its grid is not that of a
                target with `grid: coincide`.
        """
        if student.patch_dim is None:
            return
        for size in dict.fromkeys(size for stage in sizes for size in stage):
            grid = student.grid_of(size)
            for task in self._coinciding:
                if grid != task.grid:
                    assert task.grid is not None
                    wanted = [cells * student.stride for cells in task.grid]
                    raise TrainingError(
                        f"targets.{task.name}.grid: the student's grid must be "
                        f"{_shown(task.grid)} to coincide with the teacher's, got "
                        f"{_shown(grid)} at an input of {_shown(size)}; set the "
                        f"stage's size to [{wanted}] if the student takes that, or "
                        "`grid: larger`"
                    )

    def _coincident(self, stage: StageConfig) -> Size:
        """Returns the size at which the student's grid should be the teacher's."""
        grid = self._coinciding[0].grid
        assert grid is not None
        self._check_module(stage, None)
        _, stride = self._size_and_stride(None)
        return grid[0] * stride, grid[1] * stride

    def _fitted(self, side: int | None, stage: StageConfig) -> Size:
        """Returns the size of about ``side`` x ``side`` pixels in the view's aspect."""
        student = self._recipe.student
        aspect = self._bank.record.inputs[student.input].aspect
        asked = None if side is None else (side, side)
        self._check_module(stage, asked)
        is_module = student.model.startswith("module:")
        native_size, stride = self._size_and_stride(asked if is_module else None)
        return fit_size(asked or native_size, stride, aspect, "tokens")

    def _check_module(self, stage: StageConfig, asked: Size | None) -> None:
        if self._recipe.student.model.startswith("module:") and asked is None:
            raise TrainingError(
                f"size of stage {stage.name} must be given for a module: student, "
                "which does not say at what size it looks at images; add `size: 224`"
            )

    def _size_and_stride(self, size: Size | None) -> tuple[Size, int]:
        """Returns a student's own size and its stride, built once to ask it."""
        if size not in self._asked:
            model = make_student(
                self._recipe.student, size, seed=0, base="", untrained=True
            )
            self._asked[size] = model.native_size, model.stride
        return self._asked[size]


def must_coincide(task: Task) -> bool:
    """Returns whether a target asks for the size at which grids coincide."""
    return (
        task.shape == "grid"
        and task.grid is not None
        and task.config.grid == ("coincide")
    )


def _shown(size: Size | None) -> str:
    return "none" if size is None else f"{size[0]} x {size[1]}"
