"""The one protocol: every model, every probe, the same rows, settings from ``choose``.

A model is run, or read, once for all probes; what they ask of it is held in memory in
float32, with all labels, and let go of before the next model. A run that would take
more than half of the free memory is refused before it starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from manifests.recipe import Probe
from pipeline.bank.open import Bank, open_bank
from student_train.devices import choose_device
from student_train.errors import TrainingError
from student_train.probes.dense import (
    DenseSplit,
    dense_class_probe,
    dense_number_probe,
)
from student_train.probes.features import Ask, Source, collect
from student_train.probes.knn import knn_probe
from student_train.probes.linear import linear_probe, ridge_probe
from student_train.probes.lines import Line
from student_train.probes.models import ScoredTeacher, open_students, open_teachers
from student_train.probes.questions import SPLITS, Question, Resolver
from student_train.probes.result import ModelScore, ProbeResult, QuestionResult
from student_train.probes.scores import ProbeScore
from student_train.probes.splits import ClassSplit, NumberSplit, standardised
from student_train.probes.trajectory import Futures, TrajectoryProbe
from student_train.probes.truth import bank_label, map_dtype, read_maps
from student_train.probes.zero_shot import zero_shot_probe

Tensors = Mapping[str, Tensor]
"""By split."""


@dataclass(frozen=True)
class ProbeProgress:
    """What is said while probes run.

    Attributes:
        done, total: models scored, over all probes.
        what: is being done.
    """

    done: int
    total: int
    what: str


class ProbeRun:
    """The probes of a document, checked; ``run`` answers them."""

    def __init__(self, probe: Probe, bank: Bank | None = None) -> None:
        """Checks the document against bank, students and shards.

        Args:
            probe: with absolute paths.
            bank: opened already, or None.

        Raises:
            TrainingError: what is asked cannot be had; nothing was computed.
            BankError, StorageError: bank or shards cannot be read.
        """
        self.probe = probe
        (url,) = probe.banks.values()
        self.bank = bank or open_bank(url)
        self.device = choose_device(probe.engine.device)
        if probe.engine.threads is not None:
            torch.set_num_threads(probe.engine.threads)
        self.students = open_students(probe, self.bank)
        self.teachers = open_teachers(probe, self.bank)
        taken = {one.name for one in self.students}
        if twice := [one.name for one in self.teachers if one.name in taken]:
            raise TrainingError(
                f"models must have different names, got {', '.join(twice)} both in "
                "students and in teachers; rename the student"
            )
        resolver = Resolver(probe, self.bank, self.students, self.teachers, self.device)
        self.shards = resolver.shards
        self.questions = [resolver.resolve(name) for name in probe.probes]
        self._plan = self._by_source()
        self._futures: dict[str, TrajectoryProbe] = {}
        if self.device.type == "cpu":
            self._check_memory(free_bytes())

    def _by_source(self) -> dict[Source, list[tuple[Question, Line]]]:
        plan: dict[Source, list[tuple[Question, Line]]] = {}
        for question in self.questions:
            for line in question.lines:
                if line.source is not None:
                    plan.setdefault(line.source, []).append((question, line))
        return plan

    def _check_memory(self, free: int | None) -> None:
        """Refuses what would take more than half of the free memory."""
        labels = fitting = 0
        for question in self.questions:
            if question.map is not None and question.label_size is not None:
                num_rows = sum(len(rows) for rows in question.rows.values())
                pixels = num_rows * math.prod(question.label_size)
                labels += pixels * map_dtype(question.map).itemsize
                # A probe works on 8-byte labels of all its splits.
                fitting = max(fitting, 8 * pixels)
        largest, name = 0, ""
        for source, lines in self._plan.items():
            features = work = 0
            for question, line in lines:
                ask = line.ask(question.rows)
                features += ask.size_bytes(source)
                num_rows = max(len(rows) for rows in question.rows.values())
                # Two float64 copies of a split while it is fitted.
                work = max(work, 16 * num_rows * math.prod(ask.row_shape(source)))
            if features + work > largest:
                largest, name = features + work, lines[0][1].model
        needed = labels + fitting + largest
        if free is not None and needed > free / 2:
            raise TrainingError(
                f"probes must fit into half of the free memory, got {needed:,} bytes "
                f"for {name} and the labels of {free:,} bytes free; take fewer rows "
                "(splits.*.limit), fewer cells (probes.*.grid) or fewer probes at once"
            )

    def run(
        self, on_progress: Callable[[ProbeProgress], object] = lambda _: None
    ) -> ProbeResult:
        """Returns the scores of all models in all probes.

        Args:
            on_progress: called now and then.

        Raises:
            TrainingError: a sample or label cannot be read, or a split cannot be used.
            BankError: a block is missing or damaged.
        """
        total = sum(len(lines) for lines in self._plan.values())
        done = 0
        truths, seen = {}, {}
        for question in self.questions:
            on_progress(ProbeProgress(done, total, f"labels of {question.name}"))
            if question.futures is not None:
                self._futures[question.name] = self._future(question, question.futures)
            truths[question.name] = self._truth(question)
            seen[question.name] = _seen(question)
        scores: dict[tuple[str, Line], list[ModelScore]] = {}
        for source, lines in self._plan.items():
            model = lines[0][1].model
            say = partial(_say_rows, on_progress, done, total, model)
            asks, places = _without_twins(lines)
            features = collect(source, asks, say)
            for (question, line), place in zip(lines, places, strict=True):
                text = f"{model}: {question.name}"
                on_progress(ProbeProgress(done, total, text))
                scores[question.name, line] = self._score(
                    question,
                    line,
                    features[place],
                    truths[question.name],
                    seen[question.name],
                )
                done += 1
        on_progress(ProbeProgress(done, total, "done"))
        return self._result(scores)

    # One model in one probe.

    def _future(self, question: Question, futures: Futures) -> TrajectoryProbe:
        splits = {name: futures.of(rows) for name, rows in question.rows.items()}
        config = self.probe.trajectories[question.label]
        return TrajectoryProbe(splits, config.step_s, config.turn_m, self.device)

    def _truth(self, question: Question) -> Tensors:
        if question.futures is not None:
            return {}
        if question.map is None:
            values, _ = bank_label(self.bank, question.label)
            return {
                split: torch.from_numpy(values[rows])
                for split, rows in question.rows.items()
            }
        assert question.label_size is not None
        return read_maps(
            self.bank,
            self.shards,
            question.map,
            question.label_size,
            question.rows,
            self.probe.batch,
        )

    def _score(
        self,
        question: Question,
        line: Line,
        features: Tensors,
        truth: Tensors,
        seen: Tensors | None,
    ) -> list[ModelScore]:
        if not all(bool(values.isfinite().all()) for values in features.values()):
            reason = "its features are not finite"
            return [ModelScore(line.model, line.role, line.features, reason=reason)]
        found = []
        try:
            for kind in question.kinds:
                for scale, score in self._answers(
                    question, kind, features, truth, seen
                ):
                    found.append(
                        ModelScore(
                            line.model, line.role, line.features, kind, scale, score
                        )
                    )
        except TrainingError as error:
            raise TrainingError(f"probes.{question.name}: {error}") from error
        return found

    def _answers(
        self,
        question: Question,
        kind: str,
        features: Tensors,
        truth: Tensors,
        seen: Tensors | None,
    ) -> list[tuple[str, ProbeScore]]:
        """Returns the scores of one way of asking, by the features' scale."""
        num_classes, device = question.num_classes, self.device
        if question.futures is not None:
            return [("standardised", self._futures[question.name].score(features))]
        if question.classifier is not None:
            split = ClassSplit(features["test"], truth["test"])
            weight = question.classifier.weight
            return [("raw", zero_shot_probe(split, weight, device=device))]
        if kind == "knn":
            scaled = {"raw": features, "standardised": standardised(features)}
            return [
                (scale, knn_probe(*_classes(values, truth), device=device))
                for scale, values in scaled.items()
            ]
        if kind == "linear" and num_classes is not None:
            fit, choose, test = _classes(features, truth)
            found = linear_probe(fit, choose, test, num_classes, device=device)
        elif kind == "linear":
            numbers = [NumberSplit(features[name], truth[name]) for name in SPLITS]
            found = ridge_probe(*numbers, device=device)
        else:
            found = self._dense(question, features, truth, seen)
        return [("standardised", found)]

    def _dense(
        self,
        question: Question,
        features: Tensors,
        truth: Tensors,
        seen: Tensors | None,
    ) -> ProbeScore:
        assert question.map is not None
        num_classes = question.num_classes
        fit, choose, test = (
            DenseSplit(
                features[name],
                labels_NHW=None if num_classes is None else truth[name],
                numbers_NHW=truth[name] if num_classes is None else None,
                valid_NHW=None if seen is None else seen[name],
            )
            for name in SPLITS
        )
        if num_classes is None:
            log = question.map.log
            return dense_number_probe(fit, choose, test, log=log, device=self.device)
        return dense_class_probe(fit, choose, test, num_classes, device=self.device)

    # What is said of it.

    def _result(
        self, scores: Mapping[tuple[str, Line], list[ModelScore]]
    ) -> ProbeResult:
        probes = []
        for question in self.questions:
            found = []
            for line in question.lines:
                if line.source is None:
                    found.append(
                        ModelScore(line.model, line.role, None, reason=line.reason)
                    )
                else:
                    found += scores[question.name, line]
            if question.futures is not None:
                found += [
                    ModelScore(name, "baseline", None, kind, "standardised", score)
                    for kind in question.kinds
                    for name, score in self._futures[question.name].baselines.items()
                ]
            probes.append(
                QuestionResult(
                    question.name,
                    question.config.label,
                    question.form,
                    question.grid,
                    question.label_size,
                    question.counts,
                    question.left_out_by,
                    tuple(found),
                )
            )
        models: dict[str, dict[str, object]] = {}
        for student in self.students:
            models[student.name] = {
                "role": student.role,
                "model": student.config.model,
                "source": student.source,
                "input": student.input,
                "size": list(student.student.size),
            }
        for teacher in self.teachers:
            models[teacher.name] = self._facts(teacher)
        return ProbeResult(self.bank.url, self.probe.seed, 0, models, tuple(probes))

    def _facts(self, teacher: ScoredTeacher) -> dict[str, object]:
        return {
            "role": "teacher",
            "model": self.bank.pass_of(teacher.paths[0]).model,
            "outputs": {
                path: self.bank.pass_of(path).fingerprint for path in teacher.paths
            },
        }


def free_bytes() -> int | None:
    """Returns the memory that this machine could still give, None where unknown."""
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _say_rows(
    on_progress: Callable[[ProbeProgress], object],
    done: int,
    total: int,
    model: str,
    read: int,
    rows: int,
) -> None:
    on_progress(ProbeProgress(done, total, f"{model}: {read} of {rows} rows"))


def _seen(question: Question) -> Tensors | None:
    """Returns the cells that count, by split; None where all do."""
    found = {}
    for split in SPLITS:
        cells = question.seen(split)
        if cells is None:
            return None
        if not bool(cells.any()):
            raise TrainingError(
                f"probes.{question.name}: split {split} must have a cell that every "
                "model sees, got none; compare models of one camera, or correct the "
                "label's extent or `heights_m`"
            )
        found[split] = cells
    return found


def _classes(
    features: Tensors, truth: Tensors
) -> tuple[ClassSplit, ClassSplit, ClassSplit]:
    fit, choose, test = (ClassSplit(features[one], truth[one]) for one in SPLITS)
    return fit, choose, test


def _without_twins(
    lines: list[tuple[Question, Line]],
) -> tuple[list[Ask], list[int]]:
    """Returns what a source is asked for, and which of it each line takes.

    Two probes that want the same cells of the same rows share them.
    """
    asks: list[Ask] = []
    places = []
    for question, line in lines:
        new = line.ask(question.rows)
        twins = [place for place, one in enumerate(asks) if one.same_as(new)]
        if not twins:
            twins = [len(asks)]
            asks.append(new)
        places.append(twins[0])
    return asks, places
