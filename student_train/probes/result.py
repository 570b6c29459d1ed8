"""What a run of probes found, as values and as JSON."""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.storage import Store, explain, is_local
from student_train.probes.models import Role
from student_train.probes.scores import ProbeScore


@dataclass(frozen=True)
class ModelScore:
    """How one model did in one way of asking, or why it could not be asked.

    Attributes:
        model: its name.
        role: what it is: teachers are a reference, not a ceiling; random is the floor;
            a baseline has no features.
        features: ``cls``, ``pooled`` or ``patch`` of a student, or its ``head`` of a
            target; an output of the bank; None where it has none that fits.
        kind: ``knn``, ``linear``, ``dense``, ``zero_shot`` or ``trajectory``; None
            without a score.
        scale: ``raw``, or ``standardised`` by the fit split; None without a score.
        score: None where there is ``reason``.
        reason: why there is none.
    """

    model: str
    role: Role
    features: str | None
    kind: str | None = None
    scale: str | None = None
    score: ProbeScore | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON; numbers that are not finite are null."""
        found: dict[str, Any] = {
            "model": self.model,
            "role": self.role,
            "features": self.features,
            "kind": self.kind,
            "scale": self.scale,
            "reason": self.reason,
        }
        if self.score is not None:
            found |= {
                "metric": self.score.metric,
                "value": _number(self.score.value),
                "higher_is_better": self.score.higher_is_better,
                "setting": _numbers(self.score.setting),
                "choose_value": _number(self.score.choose_value),
                "details": _numbers(self.score.details),
            }
        return found


@dataclass(frozen=True)
class SplitCount:
    """The rows of a split in one probe; the same ones for every model.

    Attributes:
        asked: rows that the split means.
        unlabelled: of these, rows without a label.
        left_out: labelled rows that some model has no features of.
        used: the rest.
        rows: those, as runs of the bank's rows: ``0-4,7``.
    """

    asked: int
    unlabelled: int
    left_out: int
    used: int
    rows: str


@dataclass(frozen=True)
class QuestionResult:
    """One probe, answered by all models.

    Attributes:
        name: of the probe.
        label: that it asks for.
        form: a value per row, a grid of the view, or a bird's-eye grid.
        grid: cells of every model's grid; None for a value per row.
        label_size: pixels that are scored; None for a value per row.
        splits: rows by split.
        left_out_by: student, or output of a teacher, to the labelled rows that it has
            no features of.
        scores: of the models, in the order of the probe.
    """

    name: str
    label: str
    form: str
    grid: tuple[int, int] | None
    label_size: tuple[int, int] | None
    splits: Mapping[str, SplitCount]
    left_out_by: Mapping[str, int]
    scores: tuple[ModelScore, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {
            "label": self.label,
            "form": self.form,
            "grid": None if self.grid is None else list(self.grid),
            "label_size": None if self.label_size is None else list(self.label_size),
            "splits": {name: vars(one) for name, one in self.splits.items()},
            "left_out_by": dict(self.left_out_by),
            "scores": [one.to_json() for one in self.scores],
        }


@dataclass(frozen=True)
class ProbeResult:
    """All probes of a document.

    Attributes:
        bank: where it lies.
        seed: of the random students.
        view: that everything was scored on.
        models: by name: role, and where it comes from.
        probes: in the order of the document.
    """

    bank: str
    seed: int
    view: int
    models: Mapping[str, Mapping[str, Any]]
    probes: tuple[QuestionResult, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns it as JSON."""
        return {
            "bank": self.bank,
            "seed": self.seed,
            "view": self.view,
            "models": {name: dict(one) for name, one in self.models.items()},
            "probes": {one.name: one.to_json() for one in self.probes},
        }


def write_result(result: ProbeResult, url: str) -> None:
    """Writes a result as JSON; a reader sees all of it or what was there before.

    Raises:
        StorageError: it cannot be written there.
    """
    data = (json.dumps(result.to_json(), indent=1) + "\n").encode()
    if not is_local(url):
        folder, _, name = url.rpartition("/")
        Store(folder).replace(name, data)
        return
    path = Path(url)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise explain(error, "write", url) from error


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _numbers(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in values.items()}
