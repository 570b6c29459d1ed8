"""What a report says of a run: what it learned from, its curves, how it ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import TeachOnceError
from student_train.run_folder import RunFolder
from teachonce.report.curves import Line, number, thin
from teachonce.report.tables import NONE


@dataclass(frozen=True)
class RunFacts:
    """What is said of a run.

    Attributes:
        name: of the run.
        summary: what to what.
        losses: of all targets together, and of each; none where nothing was logged.
        rates: the learning rate.
        stages: first step and name of each stage, where there are several.
        is_thinned: whether points of the curves are means of several lines of the log.
        problem: why nothing more is known.
    """

    name: str
    summary: tuple[tuple[str, str], ...] = ()
    losses: tuple[Line, ...] = ()
    rates: tuple[Line, ...] = ()
    stages: tuple[tuple[float, str], ...] = ()
    is_thinned: bool = False
    problem: str | None = None


def describe_run(name: str, folder: Path) -> RunFacts:
    """Returns what a report says of a run; what is missing or damaged is said in it."""
    # It brings torch and TensorBoard, which a page without runs does without.
    from student_train.run_log import read_log

    try:
        record = RunFolder(str(folder)).read()
        log = read_log(folder)
    except (TeachOnceError, OSError, ValueError) as error:
        return RunFacts(name, problem=str(error))
    losses, rates = _curves(log)
    return RunFacts(
        name,
        _run_summary(folder, record),
        tuple(thin(line) for line in losses),
        tuple(thin(line) for line in rates),
        _stages(log),
        any(thin(line) is not line for line in losses),
    )


def _curves(log: Sequence[Mapping[str, Any]]) -> tuple[list[Line], list[Line]]:
    names = dict.fromkeys(
        name for row in log for name in row if name.startswith("loss.")
    )
    shown = ["loss", *names] if len(names) != 1 else ["loss"]

    def line(column: str, label: str) -> Line | None:
        points = [
            (float(row["step"]), float(row[column]))
            for row in log
            if isinstance(row.get(column), (int, float))
        ]
        if not points:
            return None
        steps, values = zip(*points, strict=True)
        return Line(label, steps, values)

    losses = [
        line(name, "all targets" if name == "loss" else name.removeprefix("loss."))
        for name in shown
    ]
    rates = [line("lr", "learning rate")]
    return [one for one in losses if one], [one for one in rates if one]


def _stages(log: Sequence[Mapping[str, Any]]) -> tuple[tuple[float, str], ...]:
    firsts: dict[str, float] = {}
    for row in log:
        firsts.setdefault(str(row.get("stage", "")), float(row["step"]))
    found = tuple((step, name) for name, step in firsts.items())
    return found if len(found) > 1 else ()


def _run_summary(
    folder: Path, record: Mapping[str, Any]
) -> tuple[tuple[str, str], ...]:
    recipe = record.get("recipe") or {}
    student = recipe.get("student") or {}
    targets = recipe.get("targets") or {}
    learned = [
        f"{name} from {one.get('from')} ({', '.join(one.get('loss') or {})})"
        for name, one in targets.items()
    ]
    found = [
        ("folder", str(folder)),
        ("student", f"{student.get('model', NONE)} on {student.get('input', NONE)}"),
        ("targets", "; ".join(learned) or NONE),
        ("rows", _times_of(record.get("rows"))),
        ("steps", _times_of(record.get("steps"))),
    ]
    result = record.get("result")
    if result is None:
        return (*found, ("state", "not done"))
    return (
        *found,
        ("state", "done"),
        ("seconds", f"{result.get('seconds', 0):,.1f} since it was last started"),
        ("samples per second", number(result.get("samples_per_s", 0))),
        ("waiting for data", f"{result.get('wait_share', 0):.1%} of the time"),
    )


def _times_of(counts: Any) -> str:
    """Returns numbers of several stages: ``120, 60``."""
    return ", ".join(f"{count:,}" for count in counts) if counts else NONE
