"""What a recipe's targets are, once bank and labels have been asked.

Owns finding each target's source, kind and width and refusing what cannot be learned;
heads and losses are the objective's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from manifests.bank import OutputEntry, is_logits
from manifests.recipe import DATA, LABELS, DataConfig, MapLabel, Recipe
from manifests.target import NormaliseRule, TargetConfig
from manifests.teacher import BevExtent
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.open import Bank
from pipeline.bank.record import view_policy_of
from pipeline.bank.topk import TopK
from student_train.errors import TrainingError
from student_train.inputs import Size, image_input
from student_train.loss_terms import LossTerm, TargetKind, parse_terms
from student_train.padding import Padding
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
        normalise: rule of a feature's normalisation.
        temperature: at which the mass of logits that are not stored is known; None
            where all are stored.
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
    normalise: NormaliseRule = "none"
    temperature: float | None = None

    @property
    def teacher(self) -> str | None:
        """Name of the teacher in the bank; None for a label."""
        return None if self.path is None else self.path.split("/")[0]

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics of the bank that its loss is computed with."""
        names = [name for term in self.terms for name in term.loss.statistics]
        return tuple(dict.fromkeys(names))


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
        _check_normalise(task)
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
        loss: {**one.model_dump(exclude_none=True, exclude={"args"}), **one.args}
        for loss, one in config.loss.items()
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
    terms = _terms(name, config, kind)
    padding = Padding.of(bank, path)
    grid = (entry.shape[0], entry.shape[1]) if entry.kind == "grid" else None
    rule: NormaliseRule = "none"
    if kind == "features":
        rule = config.normalise or recipe.normalise
    return Task(
        name,
        config,
        kind,
        shape,
        entry.shape[-1],
        terms,
        path=path,
        grid=grid if padding is None else padding.grid,
        extent=extent,
        normalise=rule,
        temperature=_temperature(entry, terms, f"targets.{name}"),
    )


def _temperature(
    entry: OutputEntry, terms: tuple[LossTerm, ...], where: str
) -> float | None:
    """Returns the temperature at which logits are decoded, None where all are stored.

    Raises:
        TrainingError: a loss that needs all logits, or their mass at a temperature that
            the bank has not.
    """
    encoding = encoding_from_json(entry.encoding)
    if not isinstance(encoding, TopK) or encoding.topk == encoding.num_classes:
        return None
    what = f"the bank keeps {encoding.topk} of {encoding.num_classes} logits"
    for term in terms:
        if term.name != "kl":
            raise TrainingError(
                f"{where}.loss must be kl where not all logits are stored, got "
                f"{term.name} ({what}); use kl"
            )
        temperature = term.parameters["temperature"]
        if temperature not in encoding.temperatures:
            known = ", ".join(f"{one:g}" for one in encoding.temperatures)
            raise TrainingError(
                f"{where}.loss.kl.temperature must be one of {known}, got "
                f"{temperature:g}: {what}, and the mass of the others at these "
                "temperatures alone; take one of them, or add it to the job's "
                "`temperatures` under another output"
            )
    return terms[0].parameters["temperature"]


def _check_normalise(task: Task) -> None:
    """Refuses what a target's values cannot be normalised for."""
    where = f"targets.{task.name}"
    if task.kind != "features" and task.config.normalise not in (None, "none"):
        raise TrainingError(
            f"{where}.normalise must be left out for {task.kind}, which are learned as "
            f"they are, got {task.config.normalise}"
        )
    if task.statistics and task.normalise != "none":
        names = [term.name for term in task.terms if term.loss.statistics]
        raise TrainingError(
            f"{where}.normalise must be none for the loss {names[0]}, whose "
            f"{', '.join(task.statistics)} the bank has of features as they are, got "
            f"{task.normalise}; add `normalise: none` to the target"
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
    if config.grid == "coincide" and (task.shape != "grid" or task.path is None):
        raise TrainingError(
            f"{where}.grid must be larger, smaller, student or teacher for what is no "
            "grid of a teacher on the student's image, got coincide; leave it out"
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
    has_bev = any(task.shape == "bev" for task in tasks)
    return Reading(
        inputs={student.input: sizes[0] if len(sizes) == 1 else sizes},
        targets=features,
        labels=tuple(dict.fromkeys(scalars)),
        maps=maps,
        cameras=(student.input,) if has_bev else (),
        # By the objective, whose numbers a checkpoint holds.
        normalise=frozenset(),
        interpolation=student.interpolation,
        stored=recipe.data.inputs == "bank",
    )
