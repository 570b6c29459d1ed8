"""``probe PROBE``: scores of students, random ones and teachers, by one protocol."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from tqdm import tqdm

from manifests.recipe_loading import load_probe
from student_train.probes.protocol import ProbeProgress, ProbeRun
from student_train.probes.result import (
    ModelScore,
    ProbeResult,
    QuestionResult,
    write_result,
)
from teachonce.verbs import text

_ROLES = {
    "student": "student",
    "random": "random weights (floor)",
    "teacher": "teacher reference",
    "baseline": "without features",
}
# What is shown beside the value, of the details on `test`.
_MORE = (
    "top5_accuracy",
    "pixel_accuracy",
    "rmse_log",
    "rmse",
    "r_squared",
    "reduction_low",
    "reduction_high",
    "ade",
    "fde",
    "turning_reduction",
    "turning_fde",
)
_NONE = "-"


def probe(run: ProbeRun, quiet: bool) -> ProbeResult:
    """Runs probes with a progress bar; returns what came out."""
    with tqdm(unit="score", disable=quiet or None) as bar:

        def on_progress(progress: ProbeProgress) -> None:
            bar.total = progress.total
            bar.set_description(progress.what, refresh=False)
            bar.update(progress.done - bar.n)
            bar.refresh()

        return run.run(on_progress)


def print_result(result: ProbeResult) -> None:
    """Prints a table per probe, models as rows."""
    for number, question in enumerate(result.probes):
        if number:
            print()
        print(_title(question))
        print(_table(question))
        for line in _remarks(question):
            print(line)


def run(args: argparse.Namespace) -> int:
    """Scores; nothing is computed where the document cannot be used."""
    document = load_probe(args.probe, args.overrides)
    result = probe(ProbeRun(document), args.quiet or args.json)
    # First said, then written: scores are not lost to a full disk.
    if args.json:
        text.print_json(result.to_json())
    else:
        print_result(result)
    if document.result is not None:
        write_result(result, document.result)
    return 0


def _title(question: QuestionResult) -> str:
    rows = ", ".join(f"{name} {one.used}" for name, one in question.splits.items())
    found = f"{question.name}: {question.label} on {rows} rows"
    if question.grid is not None and question.label_size is not None:
        grid, pixels = question.grid, question.label_size
        found += (
            f"; {grid[0]} x {grid[1]} cells, {pixels[0]} x {pixels[1]} labels"
            f"{' from above' if question.form != 'grid' else ''}"
        )
    return found


def _table(question: QuestionResult) -> str:
    """Returns models as rows, what was measured as columns."""
    columns: dict[tuple[str, str, str], str] = {}
    lines: dict[tuple[str, str | None], list[ModelScore]] = {}
    for one in question.scores:
        lines.setdefault((one.model, one.features), []).append(one)
        for key in _cells(one):
            columns.setdefault(key, _heading(*key))
    rows: list[Sequence[object]] = []
    for (model, features), scores in lines.items():
        cells = {key: value for one in scores for key, value in _cells(one).items()}
        shown = (features or _NONE).removeprefix(f"{model}/")
        values = [cells.get(key, _NONE) for key in columns]
        rows.append((model, _ROLES[scores[0].role], shown, *values))
    return text.table(("model", "what", "features", *columns.values()), rows)


def _cells(one: ModelScore) -> dict[tuple[str, str, str], str]:
    """Returns what a score shows, by way of asking, scale and measure."""
    if one.score is None or one.kind is None or one.scale is None:
        return {}
    measures = {one.score.metric: one.score.value}
    measures |= {
        name: one.score.details[name] for name in _MORE if name in one.score.details
    }
    return {
        (one.kind, one.scale, name): _NONE if math.isnan(value) else f"{value:.4f}"
        for name, value in measures.items()
    }


def _heading(kind: str, scale: str, metric: str) -> str:
    words = metric.replace("_", " ")
    if kind == "knn":
        return f"{kind} {scale} {words}"
    # A trajectory is all that its table has.
    return words if kind == "trajectory" else f"{kind.replace('_', '-')} {words}"


def _remarks(question: QuestionResult) -> list[str]:
    found = []
    for one in question.scores:
        if one.score is not None and "majority_accuracy" in one.score.details:
            share = one.score.details["majority_accuracy"]
            found.append(f"always the most frequent class: {share:.4f}")
            break
    for one in question.scores:
        if one.score is not None and "chance" in one.score.details:
            found.append(f"chance: {one.score.details['chance']:.4f}")
            break
    for one in question.scores:
        if one.score is not None and "num_turning" in one.score.details:
            num = int(one.score.details["num_turning"])
            found.append(f"rows of test that turn: {num}; ade and fde are in metres")
            break
    found += [
        f"{one.model}: {one.reason}"
        for one in question.scores
        if one.reason is not None
    ]
    unlabelled = sum(one.unlabelled for one in question.splits.values())
    left_out = sum(one.left_out for one in question.splits.values())
    if unlabelled:
        found.append(f"rows without a label: {unlabelled}")
    if left_out:
        by = ", ".join(f"{name} {num}" for name, num in question.left_out_by.items())
        found.append(f"rows left out for every model: {left_out}, lacking in {by}")
    return found
