"""What a report says of scores: the JSON of a probe as tables.

Tolerant: what a probe of another version leaves out is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from teachonce.report.tables import NONE, Table

# In the order of a reader's questions: what was made, what is expected of nothing at
# all, what is it held against.
_ROLES = {"student": "student", "random": "random floor", "teacher": "teacher"}


def score_table(probe: Mapping[str, Any]) -> Table | None:
    """Returns scores with a line per model and a column per question, or None.

    Where a model was asked in several ways (several tokens, outputs or scales), the one
    that did best on the split for choosing counts: the test split chose nothing.

    Args:
        probe: what the probe wrote as JSON.
    """
    columns: dict[tuple[str, str, str], None] = {}
    best: dict[tuple[str, tuple[str, str, str]], Mapping[str, Any]] = {}
    roles: dict[str, str] = {
        name: str(one.get("role", "")) for name, one in _mapping(probe, "models")
    }
    for name, score in _scores(probe):
        model = str(score.get("model"))
        roles.setdefault(model, str(score.get("role") or ""))
        if score.get("value") is None:
            continue
        column = (name, str(score.get("kind")), str(score.get("metric")))
        columns.setdefault(column)
        held = best.get((model, column))
        if held is None or _chosen(score) > _chosen(held):
            best[model, column] = score
    if not columns:
        return None
    order = [*_ROLES, *roles.values()]
    models = sorted(roles, key=lambda model: order.index(roles[model]))
    rows = tuple(
        (
            model,
            _ROLES.get(roles[model], roles[model]),
            *(_score_text(best.get((model, column))) for column in columns),
        )
        for model in models
    )
    head = ("model", "role", *(_column_text(column, best) for column in columns))
    return Table(head, rows, frozenset(range(2, len(head))))


def all_scores(probe: Mapping[str, Any]) -> Table | None:
    """Returns every score and every reason for having none, a line each."""
    rows = tuple(
        (
            name,
            str(score.get("model")),
            str(score.get("features") or NONE),
            str(score.get("kind") or NONE),
            str(score.get("scale") or NONE),
            str(score.get("metric") or NONE),
            _number_text(score.get("value")),
            _number_text(score.get("choose_value")),
            _setting_text(score.get("setting")),
            str(score.get("reason") or ""),
        )
        for name, score in _scores(probe)
    )
    head = (
        "probe",
        "model",
        "features",
        "kind",
        "scale",
        "metric",
        "test",
        "choose",
        "setting",
        "why none",
    )
    return Table(head, rows, frozenset({6, 7})) if rows else None


def split_table(probe: Mapping[str, Any]) -> Table | None:
    """Returns how many rows each probe fitted, chose and scored on."""
    rows = tuple(
        (
            name,
            str(one.get("label", NONE)),
            split,
            *(
                f"{counts.get(what, 0):,}"
                for what in ("used", "asked", "unlabelled", "left_out")
            ),
        )
        for name, one in _mapping(probe, "probes")
        for split, counts in _mapping(one, "splits")
    )
    head = ("probe", "label", "split", "rows used", "asked", "unlabelled", "left out")
    return Table(head, rows, frozenset({3, 4, 5, 6})) if rows else None


def _mapping(
    held: Mapping[str, Any], name: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    found = held.get(name)
    if isinstance(found, Mapping):
        for key, value in found.items():
            if isinstance(value, Mapping):
                yield str(key), value


def _scores(probe: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, one in _mapping(probe, "probes"):
        for score in one.get("scores") or ():
            if isinstance(score, Mapping):
                yield name, score


def _chosen(score: Mapping[str, Any]) -> float:
    """Returns how good a score is on ``choose``: more is better."""
    value = score.get("choose_value")
    if not isinstance(value, (int, float)):
        return float("-inf")
    return float(value) if score.get("higher_is_better", True) else -float(value)


def _column_text(
    column: tuple[str, str, str], best: Mapping[Any, Mapping[str, Any]]
) -> str:
    name, kind, metric = column
    scores = [one for (_, asked), one in best.items() if asked == column]
    is_higher = all(one.get("higher_is_better", True) for one in scores)
    return f"{name}: {kind}, {metric} {'↑' if is_higher else '↓'}"


def _score_text(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return NONE
    features = score.get("features")
    shown = _number_text(score.get("value"))
    return f"{shown} ({str(features).rpartition('/')[2]})" if features else shown


def _number_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else NONE


def _setting_text(setting: Any) -> str:
    if not isinstance(setting, Mapping) or not setting:
        return NONE
    return ", ".join(f"{name} {_number_text(one)}" for name, one in setting.items())
