"""What a recipe's targets are, once bank and labels have been asked.

Owns finding each target's source, kind and width and refusing what cannot be learned;
heads and losses are the objective's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from manifests.bank import is_logits
from manifests.recipe import (
    DATA,
    LABELS,
    DataConfig,
    MapLabel,
    Recipe,
    TargetConfig,
)
from manifests.teacher import BevExtent
from pipeline.bank.open import Bank
from pipeline.bank.record import view_policy_of
from student_train.errors import TrainingError
from student_train.inputs import Size, image_input
from student_train.losses import LossTerm, TargetKind, parse_terms
from student_train.reading import Reading
from student_train.targets import find_output

Shape = Literal["vector", "grid", "bev"]


@dataclass(frozen=True)
class Task:
    """One target, resolved.

    Attributes:
        name: in the recipe.
        config: its entry.
        kind: what its values are.
        shape: a value per row, a grid of the student's view, a bird's-eye grid.
        width: channels of a feature, classes, or 1 for a number.
        terms: of its loss.
        path: output of the bank; None for a label.
        label: name of the label; None for an output.
        grid: cells of the teacher's grid; None for vectors and labels.
        extent: of a bird's-eye grid.
    """

    name: str
    config: TargetConfig
    kind: TargetKind
    shape: Shape
    width: int
    terms: tuple[LossTerm, ...]
    path: str | None = None
    label: str | None = None
    grid: Size | None = None
    extent: BevExtent | None = None


def resolve_tasks(recipe: Recipe, bank: Bank) -> tuple[Task, ...]:
    """Returns the recipe's targets, checked against the bank.

    Raises:
        TrainingError: a target that the bank does not have or that cannot be learned
            from the student's input, or a loss that does not fit it.
    """
    (bank_name,) = recipe.banks
    image_input(bank.record, recipe.student.input)
    tasks = []
    for name, config in recipe.targets.items():
        where = f"targets.{name}.from"
        first, _, rest = config.source.partition("/")
        if first == DATA:
            task = _map_task(name, config, rest, recipe.data, where)
        elif first != bank_name:
            raise TrainingError(
                f"{where} must start with {bank_name}/ or {DATA}/, got "
                f"{config.source!r}"
            )
        elif rest.partition("/")[0] == LABELS:
            task = _label_task(name, config, rest.partition("/")[2], bank, where)
        else:
            task = _output_task(name, config, rest, recipe, bank, where)
        _check_head(task, recipe, bank)
        tasks.append(task)
    labels = [(task.label, task.shape == "vector") for task in tasks if task.label]
    clash = sorted(
        name for name, is_scalar in labels if (name, not is_scalar) in labels
    )
    if clash:
        raise TrainingError(
            f"data.labels.{clash[0]} must not be called as a label of the bank that is "
            "a target too; give it another name"
        )
    return tuple(tasks)


def _terms(name: str, config: TargetConfig, kind: TargetKind) -> tuple[LossTerm, ...]:
    losses = {
        loss: one.model_dump(exclude_none=True) for loss, one in config.loss.items()
    }
    return parse_terms(losses, kind, f"targets.{name}.loss")


def _map_task(
    name: str, config: TargetConfig, label: str, data: DataConfig, where: str
) -> Task:
    found = map_label(data, label, where)
    kind: TargetKind = "numbers" if found.num_classes is None else "classes"
    return Task(
        name,
        config,
        kind,
        "grid" if found.extent is None else "bev",
        found.num_classes or 1,
        _terms(name, config, kind),
        label=label,
        extent=found.extent,
    )


def map_label(data: DataConfig, label: str, where: str) -> MapLabel:
    """Returns a label map of ``data.labels``; raises TrainingError where it is none."""
    if label not in data.labels:
        raise TrainingError(
            f"{where}: label must be one of data.labels "
            f"({', '.join(data.labels) or 'none'}), got {label!r}"
        )
    return data.labels[label]


def _label_task(
    name: str, config: TargetConfig, label: str, bank: Bank, where: str
) -> Task:
    num_classes = num_label_classes(bank, label, where)
    kind: TargetKind = "numbers" if num_classes is None else "classes"
    return Task(
        name,
        config,
        kind,
        "vector",
        num_classes or 1,
        _terms(name, config, kind),
        label=label,
    )


def num_label_classes(bank: Bank, label: str, where: str) -> int | None:
    """Returns the classes of a bank's label, None where it is a number.

    Raises:
        TrainingError: the bank has no such label.
    """
    labels = bank.record.labels
    if label not in labels:
        raise TrainingError(
            f"{where}: label must be one of the bank's ({', '.join(labels) or 'none'})"
            f", got {label!r}; add it to the job's labels"
        )
    found = labels[label].get("num_classes")
    return None if found is None else int(found)


def _output_task(
    name: str,
    config: TargetConfig,
    source: str,
    recipe: Recipe,
    bank: Bank,
    where: str,
) -> Task:
    path = find_output(bank, source, recipe.student.input, where)
    entry = bank.output(path)
    if entry.kind not in ("vector", "grid"):
        raise TrainingError(
            f"{where} must lead to a vector or a grid, got {path} of kind "
            f"{entry.kind}, which no head gives; take another output of the bank"
        )
    kind: TargetKind = "logits" if is_logits(entry.name) else "features"
    extent = entry.extent
    shape: Shape = "vector"
    if entry.kind == "grid":
        shape = "grid" if extent is None else "bev"
        if shape == "grid" and bank.pass_of(path).has_own_geometry(entry.size):
            raise TrainingError(
                f"{where}: the grid of {path} comes of the teacher's own resize and "
                "crop (geometry: teacher) and does not lie on what the student sees; "
                "take cls, pooled, embed or logits of it, or a bank without it"
            )
        group = bank.pass_of(path).inputs
        if shape == "grid" and group != (recipe.student.input,):
            raise TrainingError(
                f"{where}: the grid of {path} lies on {', '.join(group)} and cannot "
                f"match the student's {recipe.student.input}; take an output of a "
                f"teacher on {recipe.student.input}, a vector, or give the output its "
                "`extent` in the job and use a bev head"
            )
    return Task(
        name,
        config,
        kind,
        shape,
        entry.shape[-1],
        _terms(name, config, kind),
        path=path,
        grid=None if entry.kind == "vector" else (entry.shape[0], entry.shape[1]),
        extent=extent,
    )


def _check_head(task: Task, recipe: Recipe, bank: Bank) -> None:
    """Refuses a head that cannot give the target's shape."""
    config, where = task.config, f"targets.{task.name}"
    if (config.head.kind == "bev") != (task.shape == "bev"):
        wanted = "bev" if task.shape == "bev" else "adapter or linear"
        what = "bird's-eye grid" if task.shape == "bev" else task.shape
        raise TrainingError(
            f"{where}.head must be {wanted} for a {what}, got {config.head.kind}"
        )
    is_vector = task.shape == "vector"
    if config.tokens is not None and (config.tokens == "patch") == is_vector:
        wanted = "cls or pooled" if is_vector else "patch"
        raise TrainingError(
            f"{where}.tokens must be {wanted} for a {task.shape}, got {config.tokens}"
        )
    policy = view_policy_of(bank.record)
    moves_sweep = policy.flips or policy.yaw_rad or policy.point_scale != (1.0, 1.0)
    if (
        task.label is not None
        and task.shape == "bev"
        and moves_sweep
        and recipe.loader.view != 0
    ):
        raise TrainingError(
            f"{where}: a bird's-eye label does not follow the flips, turns and scales "
            "of this bank's views; set loader.view to 0"
        )


def reading_of(recipe: Recipe, tasks: tuple[Task, ...], sizes: list[Size]) -> Reading:
    """Returns what a batch must hold for a recipe's targets."""
    student = recipe.student
    scalars, maps = [], {}
    for task in tasks:
        if task.label is None:
            continue
        if task.shape == "vector":
            scalars.append(task.label)
        else:
            maps[task.label] = recipe.data.labels[task.label]
    features: Mapping[str, str] = {
        task.name: task.path for task in tasks if task.path is not None
    }
    standardised = frozenset(
        task.name
        for task in tasks
        if task.kind == "features" and recipe.normalise == "standardise"
    )
    has_bev = any(task.shape == "bev" for task in tasks)
    return Reading(
        inputs={student.input: sizes[0] if len(sizes) == 1 else sizes},
        targets=features,
        labels=tuple(dict.fromkeys(scalars)),
        maps=maps,
        cameras=(student.input,) if has_bev else (),
        normalise=standardised,
        interpolation=student.interpolation,
        stored=recipe.data.inputs == "bank",
    )
