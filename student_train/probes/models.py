"""Which models a probe scores: students, the same untrained, and teachers by name.

A random student has nothing of the trained one but architecture, arguments, size and
normalisation of pixels; it is built anew and drawn from the probe's seed. Its BatchNorm
stays as it is made (mean 0, variance 1): no row of the bank is used to estimate it, so
that the floor is the network that training would start from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from manifests.recipe import Probe, Recipe, StudentConfig
from pipeline.bank.open import Bank
from pipeline.samples.fitting import fit_size
from student_train.errors import TrainingError
from student_train.export import CONFIG_NAME, WEIGHTS_NAME, load_student
from student_train.features import Student
from student_train.inputs import image_input
from student_train.run_folder import RunFolder
from student_train.students import make_student
from student_train.targets import find_output

Role = Literal["student", "random", "teacher", "baseline"]


@dataclass(frozen=True, eq=False)
class ScoredStudent:
    """A student to score.

    Attributes:
        name: in the result.
        role: whether it was trained.
        student: on the CPU; it looks at images of its own ``size``.
        source: folder that it, or its architecture, comes from.
        config: what builds its architecture; its input and the filter of its resize.
    """

    name: str
    role: Role
    student: Student
    source: str
    config: StudentConfig

    @property
    def input(self) -> str:
        """Image input of the bank that it looks at."""
        return self.config.input


@dataclass(frozen=True)
class ScoredTeacher:
    """A teacher to score from its cached features.

    Attributes:
        name: in the result.
        paths: outputs of the bank.
        is_named: whether the probe names them; logits are scored only then.
    """

    name: str
    paths: tuple[str, ...]
    is_named: bool


def open_students(probe: Probe, bank: Bank) -> list[ScoredStudent]:
    """Returns the probe's students and, behind each, its architecture untrained.

    An architecture at one size on one input has one random student, however many
    trained ones.

    Raises:
        TrainingError: a folder that holds no student, or one whose input is not the
            bank's.
    """
    found: list[ScoredStudent] = []
    drawn: set[str] = set()
    for name, folder in probe.students.items():
        trained = _open_student(name, folder, bank)
        found.append(trained)
        kind = _kind_of(trained)
        if probe.random and kind not in drawn:
            drawn.add(kind)
            found.append(_untrained(trained, probe, {one.name for one in found}))
    return found


def open_teachers(probe: Probe, bank: Bank) -> list[ScoredTeacher]:
    """Returns the probe's teachers, with those of their outputs that may be scored.

    Raises:
        TrainingError: the bank has no such teacher or output.
    """
    if probe.teachers is None:
        names = dict.fromkeys(path.split("/")[0] for path in bank.outputs)
        return [
            ScoredTeacher(
                name,
                tuple(path for path in bank.outputs if path.split("/")[0] == name),
                is_named=False,
            )
            for name in names
        ]
    if empty := [name for name, outputs in probe.teachers.items() if not outputs]:
        raise TrainingError(
            f"teachers.{empty[0]} must name at least one output of the bank, got none; "
            "leave it out, or leave out `teachers` for all"
        )
    return [
        ScoredTeacher(
            name,
            tuple(
                find_output(bank, output, "", f"teachers.{name}") for output in outputs
            ),
            is_named=True,
        )
        for name, outputs in probe.teachers.items()
    ]


def _open_student(name: str, folder: str, bank: Bank) -> ScoredStudent:
    given, where = Path(folder), f"students.{name}"
    if not given.is_dir():
        raise TrainingError(
            f"{where} must be the folder of a run or of a student, got {folder}, which "
            f"is {'a file' if given.exists() else 'not there'}; correct the path"
        )
    is_student = (given / WEIGHTS_NAME).is_file()
    run = RunFolder(str(given.parent if is_student else given))
    recipe = _recipe_of(run)
    if not is_student and recipe is None:
        raise TrainingError(
            f"{where} must be the folder of a run or of a student, got {folder}, which "
            "holds neither; correct the path"
        )
    if not is_student and not (run.student / WEIGHTS_NAME).is_file():
        raise TrainingError(
            f"{where} must be a run that is done, got {folder} without a student; run "
            "its `teachonce train` to the end"
        )
    place = given if is_student else run.student
    if recipe is None or run.student.resolve() != place.resolve():
        student, config = _exported(place, where, bank)
    else:
        student, config = student_of_run(recipe, place, bank), recipe.student
    try:
        image_input(bank.record, config.input)
    except TrainingError as error:
        raise TrainingError(f"{where}: {error}") from error
    return ScoredStudent(name, "student", student, str(place), config)


def run_of(model: ScoredStudent) -> tuple[RunFolder, Recipe] | None:
    """Returns the run that a student, or its architecture, comes from.

    None where its folder lies in no run.
    """
    run = RunFolder(str(Path(model.source).parent))
    recipe = _recipe_of(run)
    is_its = run.student.resolve() == Path(model.source).resolve()
    return (run, recipe) if recipe is not None and is_its else None


def _recipe_of(run: RunFolder) -> Recipe | None:
    """Returns the recipe of a run's folder, None where it is none."""
    try:
        return Recipe.model_validate(run.read()["recipe"])
    except (TrainingError, ValidationError):
        return None


def student_of_run(recipe: Recipe, place: Path, bank: Bank) -> Student:
    """Returns the student of a run: timm builds most, a module is built by its file.

    Args:
        recipe: of the run.
        place: folder of the student, whole.
        bank: whose views fit its size.
    """
    config = recipe.student
    if (place / CONFIG_NAME).is_file():
        return load_student(place)
    weights = config.model_copy(update={"weights": str(place / WEIGHTS_NAME)})
    given = next(iter(recipe.stages[0].sizes), None)
    if not isinstance(given, int):
        return make_student(weights, given, seed=0, base="")
    stride = make_student(weights, (given, given), seed=0, base="").stride
    aspect = bank.record.inputs[config.input].aspect
    fitted = fit_size((given, given), stride, aspect, "tokens")
    return make_student(weights, fitted, seed=0, base="")


def _exported(place: Path, where: str, bank: Bank) -> tuple[Student, StudentConfig]:
    """Returns a student whose run is not at hand, and what builds its architecture.

    Its input is what its export says, else the bank's only image.
    """
    student = load_student(place)
    document: Mapping[str, Any] = json.loads(
        (place / CONFIG_NAME).read_text(encoding="utf-8")
    )
    images = [name for name, one in bank.record.inputs.items() if one.view0]
    name = document.get("teachonce", {}).get("input")
    if name is None and len(images) != 1:
        raise TrainingError(
            f"{where} must say which input it looks at, got {place}, which does not, "
            f"and a bank with {', '.join(images) or 'no image'}; name the run's folder"
        )
    return student, StudentConfig(
        model=f"timm:{student.architecture}",
        input=name or images[0],
        weights=None,
        args=student.args,
        interpolation=document["pretrained_cfg"].get("interpolation", "bicubic"),
    )


def _untrained(trained: ScoredStudent, probe: Probe, taken: set[str]) -> ScoredStudent:
    like = trained.student
    config = trained.config.model_copy(update={"args": like.args})
    drawn = make_student(config, like.size, seed=probe.seed, base="", untrained=True)
    student = Student(
        drawn.model,
        native_size=like.native_size,
        size=like.size,
        mean=like.mean,
        std=like.std,
        architecture=like.architecture,
        args=like.args,
    )
    model = like.architecture or trained.config.model.rpartition(":")[2]
    stem = name = f"random:{model}"
    number = 1
    while name in taken or name in probe.students:
        number += 1
        name = f"{stem}#{number}"
    return ScoredStudent(name, "random", student, trained.source, trained.config)


def _kind_of(model: ScoredStudent) -> str:
    """Returns what two students share whose random students would be the same."""
    student = model.student
    name = student.architecture or model.config.model
    facts = [name, student.args, student.size, student.mean, student.std]
    seen = [model.input, model.config.interpolation]
    return json.dumps([*facts, *seen], sort_keys=True, default=str)
