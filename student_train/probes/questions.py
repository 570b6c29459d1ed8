"""What each probe asks, once bank and models are known: who answers, on which rows.

Owns the splits, ways of asking, resolutions, and the rows that all models share.
Computes no feature and reads no sample but the first map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from manifests.bank import format_runs
from manifests.recipe import DATA, LABELS, TRAJECTORIES, MapLabel, Probe, ProbeConfig
from pipeline.bank.classifiers import StoredClassifier
from pipeline.bank.open import Bank
from student_train.errors import TrainingError
from student_train.inputs import Size, image_input
from student_train.probes.bird_eye import CameraCells, MetricCells
from student_train.probes.features import (
    Bools,
    SplitRows,
    StudentSource,
    TeacherSource,
    has_image,
)
from student_train.probes.lines import Line, Lines
from student_train.probes.models import ScoredStudent, ScoredTeacher
from student_train.probes.result import SplitCount
from student_train.probes.trajectory import Futures
from student_train.probes.truth import bank_label, map_size, read_futures
from student_train.selection import select_rows
from student_train.targets import find_output
from student_train.tasks import map_label, num_label_classes

QuestionForm = Literal["value", "grid", "bird's-eye", "trajectory"]

SPLITS = ("fit", "choose", "test")
MOST_BEV_CELLS = 32
ZERO_SHOT = "zero_shot"
EMBED = "embed"
"""The output that zero-shot classifiers take."""


@dataclass(frozen=True, eq=False)
class Question:
    """One probe, resolved.

    Attributes:
        name: of the probe.
        config: its entry.
        form: a value per row, a grid of the view, a bird's-eye grid, or a future.
        kinds: ways of asking, in order.
        label: name of the label.
        map: the label, where it is a map.
        num_classes: None where it is numbers.
        grid, label_size: cells and pixels; None for a value per row.
        lines: of the models, in order.
        rows: that all models share.
        counts: of the rows.
        left_out_by: student, or output of a teacher, to the labelled rows it lacks.
        classifier: of a zero-shot probe, which asks for rows of ``test`` alone.
        futures: of a trajectory probe, for every row of the bank.
    """

    name: str
    config: ProbeConfig
    form: QuestionForm
    kinds: tuple[str, ...]
    label: str
    map: MapLabel | None
    num_classes: int | None
    grid: Size | None
    label_size: Size | None
    lines: tuple[Line, ...]
    rows: SplitRows
    counts: Mapping[str, SplitCount]
    left_out_by: Mapping[str, int]
    classifier: StoredClassifier | None = None
    futures: Futures | None = None

    def seen(self, split: str) -> Tensor | None:
        """Returns (rows, R, K) bool: bird's-eye cells that every model has; or None."""
        if self.form != "bird's-eye":
            return None
        assert self.grid is not None
        rows = self.rows[split]
        found = torch.ones((len(rows), *self.grid), dtype=torch.bool)
        for form in dict.fromkeys(line.form for line in self.lines):
            if isinstance(form, CameraCells):
                found &= form.sees(rows)
            elif isinstance(form, MetricCells):
                found &= form.covered_RK
        return found


def split_rows(probe: Probe, bank: Bank) -> dict[str, Bools]:
    """Returns (num_rows,) which rows of the bank each split means.

    Raises:
        TrainingError: a split means no row, or two have rows in common.
    """
    among = select_rows(bank, probe.data.rows, "data.rows")
    found = {}
    for name in SPLITS:
        config = getattr(probe.splits, name)
        found[name] = select_rows(bank, config, f"splits.{name}") & among
        if not found[name].any():
            raise TrainingError(
                f"splits.{name} must mean at least one row of data.rows, got none; "
                "widen one of them"
            )
    for one, other in combinations(SPLITS, 2):
        common = int((found[one] & found[other]).sum())
        if common:
            raise TrainingError(
                f"splits must have no row in common, got {common} both in {one} "
                f"({int(found[one].sum())} rows) and in {other} "
                f"({int(found[other].sum())}); separate them by `shards`, `keys` or "
                "`share`"
            )
    return found


class Resolver:
    """Resolves the probes of one document; a model is one source for all of them."""

    def __init__(
        self,
        probe: Probe,
        bank: Bank,
        students: Sequence[ScoredStudent],
        teachers: Sequence[ScoredTeacher],
        device: torch.device,
    ) -> None:
        """Takes the models.

        Raises:
            TrainingError: splits that cannot be used.
        """
        shards = probe.data.shards
        self.shards = [shards] if isinstance(shards, str) else shards
        self._probe, self._bank = probe, bank
        self._splits = split_rows(probe, bank)
        paths = dict.fromkeys(path for one in teachers for path in one.paths)
        self._lines = Lines(
            bank,
            {
                one.name: StudentSource(
                    one,
                    bank,
                    self.shards,
                    probe.batch,
                    device,
                    stored=probe.data.inputs == "bank",
                )
                for one in students
            },
            teachers,
            {path: TeacherSource(path, bank, probe.batch, device) for path in paths},
        )

    def resolve(self, name: str) -> Question:
        """Returns a probe of the document, checked.

        Raises:
            TrainingError: an unknown label, no model that can answer, no row that all
                models share.
        """
        config, where = self._probe.probes[name], f"probes.{name}"
        (bank_name,) = self._probe.banks
        first, _, rest = config.label.partition("/")
        section, _, label = rest.partition("/")
        found: MapLabel | None = None
        form: QuestionForm = "value"
        if first == TRAJECTORIES:
            return self._resolve_future(name, config, rest)
        if first == DATA:
            label, found = rest, map_label(self._probe.data, rest, f"{where}.label")
            num_classes = found.num_classes
            form = "grid" if found.extent is None else "bird's-eye"
        elif first == bank_name and section == LABELS:
            num_classes = num_label_classes(self._bank, label, f"{where}.label")
        else:
            raise TrainingError(
                f"{where}.label must be {bank_name}/{LABELS}/NAME, {DATA}/NAME or "
                f"{TRAJECTORIES}/NAME, got {config.label!r}"
            )
        kinds = _kinds(config, found is not None, num_classes, where)
        classifier: StoredClassifier | None = None
        splits: Sequence[str] = SPLITS
        if found is None:
            known, grid, size = bank_label(self._bank, label)[1], None, None
            if config.classifier is None:
                lines = self._lines.of_values()
            else:
                path, classifier = self._classifier(
                    config.classifier, num_classes, where
                )
                kinds, splits = (ZERO_SHOT,), SPLITS[-1:]
                lines = self._lines.of_embeddings(path, self._probe.seed)
        elif config.classifier is not None:
            raise TrainingError(
                f"{where}.label must be a class of the bank's for a `classifier`, got "
                f"the map {config.label}"
            )
        elif found.extent is None:
            assert found.input is not None
            try:
                image_input(self._bank.record, found.input)
            except TrainingError as error:
                raise TrainingError(f"data.labels.{label}: {error}") from error
            known = has_image(self._bank, found.input)
            size = self._label_size(found, known)
            lines, grid = self._lines.of_grids(config, found.input, size)
        else:
            known = np.ones(self._bank.record.num_rows, np.bool_)
            size = self._label_size(found, known)
            grid = config.grid or (
                max(1, min(size[0] // 2, MOST_BEV_CELLS)),
                max(1, min(size[1] // 2, MOST_BEV_CELLS)),
            )
            lines = self._lines.of_cells(config, found.extent, grid)
        if all(line.source is None for line in lines):
            reasons = "; ".join(f"{line.model}: {line.reason}" for line in lines)
            raise TrainingError(
                f"{where} must have a model that can answer it, got none ({reasons})"
            )
        if grid is not None and size is not None and not _is_within(grid, size):
            raise TrainingError(
                f"{where}.grid must be at most the label's {size[0]} x {size[1]}, got "
                f"{grid[0]} x {grid[1]}; set a smaller `grid`"
            )
        rows, counts, left_out_by = self._shared_rows(lines, known, splits, where)
        return Question(
            name,
            config,
            form,
            kinds,
            label,
            found,
            num_classes,
            grid,
            size,
            tuple(lines),
            rows,
            counts,
            left_out_by,
            classifier,
        )

    def _resolve_future(self, name: str, config: ProbeConfig, label: str) -> Question:
        where, known_names = f"probes.{name}", self._probe.trajectories
        if label not in known_names:
            raise TrainingError(
                f"{where}.label must be one of trajectories "
                f"({', '.join(known_names) or 'none'}), got {label!r}"
            )
        if config.kinds or config.grid or config.classifier:
            raise TrainingError(
                f"{where} must have no `kinds`, `grid` or `classifier`: a trajectory "
                "is asked for in one way; leave them out"
            )
        futures = read_futures(self._bank, known_names[label], f"trajectories.{label}")
        lines = self._lines.of_values()
        return Question(
            name,
            config,
            "trajectory",
            ("trajectory",),
            label,
            None,
            None,
            None,
            None,
            tuple(lines),
            *self._shared_rows(lines, futures.known, SPLITS, where),
            futures=futures,
        )

    def _classifier(
        self, source: str, num_classes: int | None, where: str
    ) -> tuple[str, StoredClassifier]:
        """Returns the path of a classifier's embeddings, and the classifier.

        Raises:
            TrainingError: it does not fit the label, or the bank lacks the embeddings.
            BankError: the output comes from no classifier.
        """
        path = find_output(self._bank, source, "", f"{where}.classifier")
        found = self._bank.classifier(path)
        if num_classes != len(found.classes):
            got = "none" if num_classes is None else str(num_classes)
            raise TrainingError(
                f"{where}.label must have the {len(found.classes)} classes of "
                f"{path}'s classifier ({found.classes[0]}, ...), got {got}; take the "
                "label that it was made for"
            )
        embed = f"{path.rpartition('/')[0]}/{EMBED}"
        if embed not in self._bank.outputs:
            raise TrainingError(
                f"{where}.classifier: the bank must have {embed} beside {path}, which "
                f"students learn to give; add `{EMBED}: {{}}` to the teacher's outputs"
            )
        return embed, found

    # On which rows.

    def _label_size(self, label: MapLabel, known: Bools) -> Size:
        rows = known & np.logical_or.reduce(list(self._splits.values()))
        sizes = [
            one.model.student.size
            for one in self._lines.students.values()
            if one.model.input == label.input
        ]
        fallback = max(sizes, key=lambda size: size[0] * size[1], default=None)
        if not rows.any():
            raise TrainingError(
                f"splits must have rows with an image of {label.input}, got none"
            )
        return map_size(self._bank, self.shards, label, rows, fallback)

    def _shared_rows(
        self, lines: Sequence[Line], known: Bools, splits: Sequence[str], where: str
    ) -> tuple[SplitRows, dict[str, SplitCount], dict[str, int]]:
        """Returns the rows of each split that all models have, and who lacks others."""
        shared, left_out_by = known.copy(), {}
        asked_of = {name: self._splits[name] for name in splits}
        anywhere = np.logical_or.reduce(list(asked_of.values())) & known
        for line in lines:
            if line.source is None:
                continue
            usable = line.usable()
            shared &= usable
            if lacking := int((anywhere & ~usable).sum()):
                is_teacher = line.role == "teacher"
                left_out_by[str(line.features) if is_teacher else line.model] = lacking
        rows, counts = {}, {}
        for name, asked in asked_of.items():
            rows[name] = np.flatnonzero(asked & shared).astype(np.int64)
            counts[name] = SplitCount(
                asked=int(asked.sum()),
                unlabelled=int((asked & ~known).sum()),
                left_out=int((asked & known & ~shared).sum()),
                used=len(rows[name]),
                rows=format_runs(rows[name].tolist()),
            )
            if not len(rows[name]):
                lacking_text = ", ".join(f"{k}: {v}" for k, v in left_out_by.items())
                raise TrainingError(
                    f"{where}: split {name} must have rows that have a label and hold "
                    f"for every model, got none of {counts[name].asked} "
                    f"({counts[name].unlabelled} without a label; lacking: "
                    f"{lacking_text or 'none'}); leave a model out or choose other rows"
                )
        return rows, counts, left_out_by


def _kinds(
    config: ProbeConfig, is_map: bool, num_classes: int | None, where: str
) -> tuple[str, ...]:
    """Returns the ways of asking, checked against the label."""
    if is_map:
        possible: tuple[str, ...] = ("dense",)
    else:
        possible = ("linear",) if num_classes is None else ("knn", "linear")
    if config.kinds is None:
        return possible
    wrong = [kind for kind in config.kinds if kind not in possible]
    if wrong or not config.kinds:
        what = "map" if is_map else "number" if num_classes is None else "class"
        raise TrainingError(
            f"{where}.kinds must be among {', '.join(possible)} for a {what} label, "
            f"got {', '.join(wrong) or 'none'}"
        )
    return tuple(dict.fromkeys(config.kinds))


def _is_within(grid: Size, size: Size) -> bool:
    return grid[0] <= size[0] and grid[1] <= size[1]
