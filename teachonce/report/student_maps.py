"""What runs' students make of the rows that a report shows.

Owns opening a run's student and heads and one forward pass. Needs torch, so it is
imported only where there are runs.

Shape suffixes: B rows, H and W grid of the view, R and K rows and columns of a grid,
C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from manifests.errors import TeachOnceError
from manifests.recipe import Recipe
from pipeline.bank.open import Bank
from pipeline.bank.statistics import floored_std
from student_train.batches import Cameras
from student_train.errors import TrainingError, reason_of
from student_train.export import WEIGHTS_NAME
from student_train.features import Student, StudentFeatures
from student_train.grids import resize_grid
from student_train.inputs import Size
from student_train.objective import Objective
from student_train.probes.models import student_of_run
from student_train.run_folder import RunFolder
from student_train.tasks import Task, resolve_tasks
from teachonce.report.grids import ShownOutput, basis_of
from teachonce.report.pictures import Basis
from teachonce.report.shown import ShownRow


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a head makes of one row.

    Attributes:
        grid_RKC: on the teacher's grid, in the space of its colours.
        seen_RK: bool, cells that the camera sees; None where that is all.
    """

    grid_RKC: np.ndarray
    seen_RK: np.ndarray | None


@dataclass(frozen=True, eq=False)
class StudentMaps:
    """What one run's student makes of the rows.

    Attributes:
        name: of the run.
        input: that it looks at.
        grids: its own tokens by row, (H, W, C), standardised over these rows.
        predictions: by output of the bank and row.
        problems: what could not be had.
    """

    name: str
    input: str = ""
    grids: dict[int, np.ndarray] = field(default_factory=dict)
    predictions: dict[str, dict[int, Prediction]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def basis(self) -> Basis | None:
        """Of the colours of its own tokens; None where there are none."""
        return basis_of(list(self.grids.values()))


def map_run(
    name: str,
    folder: Path,
    bank: Bank,
    rows: Sequence[ShownRow],
    outputs: Sequence[ShownOutput],
) -> StudentMaps:
    """Returns what a run's student and heads make of rows; what fails is said in it.

    Args:
        name: of the run.
        folder: of the run.
        bank: that it was trained from.
        rows: that are shown.
        outputs: of the bank, on these rows.
    """
    try:
        run = RunFolder(str(folder))
        record = run.read()
        recipe = Recipe.model_validate(record["recipe"])
        student = _open_student(run, recipe, bank).eval()
    except (TeachOnceError, OSError, ValidationError, KeyError) as error:
        return StudentMaps(name, problems=[f"no student: {reason_of(error)}"])
    found = StudentMaps(name, recipe.student.input)
    seen = [row for row in rows if recipe.student.input in row.images]
    if not seen:
        return found
    pixels_BHW3 = _pixels(seen, recipe, student.size)
    with torch.inference_mode():
        features = student(pixels_BHW3, layers=student.has_layers)
    tokens_BHWC = features.patch
    if tokens_BHWC is None:
        found.problems.append("its student has no grid of tokens")
        return found
    _keep_tokens(found, seen, tokens_BHWC)
    try:
        objective = _open_heads(run, record, recipe, student, bank)
    except (TeachOnceError, OSError, KeyError, RuntimeError) as error:
        found.problems.append(f"no heads: {reason_of(error)}")
        return found
    by_path = {output.path: output for output in outputs}
    for task in objective.tasks:
        if task.path in by_path and task.shape != "vector":
            output = by_path[task.path]
            try:
                found.predictions[output.path] = _predict(
                    task, objective, recipe, output, seen, features, student.size
                )
            except TrainingError as error:
                found.problems.append(f"{task.name}: {error}")
    return found


def _open_student(run: RunFolder, recipe: Recipe, bank: Bank) -> Student:
    """Returns the student of a run that is done, on the CPU.

    Raises:
        TrainingError: it has none, or it does not load.
    """
    place = run.student
    if not (place / WEIGHTS_NAME).is_file():
        raise TrainingError(
            f"a run must be done to show its student, got {run.path} without one; run "
            "its `teachonce train` to the end"
        )
    return student_of_run(recipe, place, bank)


def _open_heads(
    run: RunFolder,
    record: Mapping[str, object],
    recipe: Recipe,
    student: Student,
    bank: Bank,
) -> Objective:
    """Returns a run's heads with their weights.

    Raises:
        TrainingError: there are none, or they were trained from another bank.
    """
    if not run.heads.is_file():
        raise TrainingError(f"{run.heads} is missing")
    tasks = resolve_tasks(recipe, bank)
    for task in tasks:
        _check_source(task, record.get("sources"), bank)
    objective = Objective(tasks, student)
    objective.load_head_state(load_file(run.heads))
    return objective.eval()


def _check_source(task: Task, sources: object, bank: Bank) -> None:
    """Raises TrainingError where a target was learned from other features."""
    held = sources.get(task.name) if isinstance(sources, dict) else None
    if task.path is None or held is None:
        return
    own = [task.path, bank.pass_of(task.path).fingerprint]
    if list(held) != own:
        raise TrainingError(
            f"targets.{task.name} was learned from {held[0]} of another pass than this "
            "bank's"
        )


def _pixels(rows: Sequence[ShownRow], recipe: Recipe, size: Size) -> Tensor:
    name, interpolation = recipe.student.input, recipe.student.interpolation
    found = [row.pixels(name, size, interpolation) for row in rows]
    return torch.from_numpy(np.stack(found))


def _keep_tokens(
    found: StudentMaps, rows: Sequence[ShownRow], tokens_BHWC: Tensor
) -> None:
    values = tokens_BHWC.float().numpy()
    cells_NC = values.reshape(-1, values.shape[-1]).astype(np.float64)
    scaled = (values - cells_NC.mean(0)) / floored_std(cells_NC.var(0))
    found.grids.update({row.row: grid for row, grid in zip(rows, scaled, strict=True)})


def _predict(
    task: Task,
    objective: Objective,
    recipe: Recipe,
    output: ShownOutput,
    rows: Sequence[ShownRow],
    features: StudentFeatures,
    size: Size,
) -> dict[int, Prediction]:
    """Returns what a head makes of each row, on the teacher's grid."""
    name = recipe.student.input
    camera = None
    with torch.inference_mode():
        if task.shape == "bev":
            cameras = [row.camera(name, size) for row in rows]
            kept = [place for place, camera in enumerate(cameras) if camera is not None]
            rows = [rows[place] for place in kept]
            if not rows:
                return {}
            known = [camera for camera in cameras if camera is not None]
            intrinsics = np.stack([one.intrinsics for one in known]).astype(np.float32)
            lidar2cam = np.stack([one.lidar2cam for one in known]).astype(np.float32)
            camera = Cameras(torch.from_numpy(intrinsics), torch.from_numpy(lidar2cam))
            assert features.patch is not None
            features = replace(features, patch=features.patch[kept])
        grid_BRKC, visible_BRK = objective.predict(task, features, camera, size)
        grid_BRKC = objective.undo(task, grid_BRKC)
        shape = (output.entry.shape[0], output.entry.shape[1])
        if tuple(grid_BRKC.shape[1:3]) != shape:
            grid_BRKC = resize_grid(grid_BRKC, shape)
            if visible_BRK is not None:
                seen = resize_grid(visible_BRK[..., None].float(), shape, "bilinear")
                visible_BRK = seen[..., 0] >= 0.5
    grids = output.standardise(grid_BRKC.float().numpy())
    seen_of = [None] * len(rows) if visible_BRK is None else list(visible_BRK.numpy())
    return {
        row.row: Prediction(grid, seen)
        for row, grid, seen in zip(rows, grids, seen_of, strict=True)
    }
