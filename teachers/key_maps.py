"""Names of a checkpoint's parameters: renaming them, and what to say where they differ.

Owns the meaning of a job's ``keys:`` and the search for the ``keys:`` that a checkpoint
lacks. Knows no model; imports no torch: parameters are names and shapes here.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from teachers.errors import TeacherError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...] | None
Rules = dict[str, str | None]

_SHOWN = 5
_MAX_RULES = 4
_MAX_CANDIDATES = 12
# What other frameworks call a norm's weight and bias; shapes do not tell them apart.
_KNOWN = frozenset({(r"\.gamma$", ".weight"), (r"\.beta$", ".bias")})


def map_keys(
    state: Mapping[str, Tensor], keys: Mapping[str, str | None], where: str
) -> dict[str, Tensor]:
    """Returns a state dict under the names that a job's ``keys:`` gives it.

    Args:
        state: by the checkpoint's own names.
        keys: regular expression to replacement, applied in order, each to what the
            ones before made; None leaves the names out in which it is found.
        where: the teacher's entry in the job, for messages.

    Raises:
        TeacherError: a rule matches no name, or two names become one.
    """
    renamed = rename(list(state), keys, where)
    return {new: state[old] for old, new in renamed.items()}


def rename(
    names: Sequence[str], keys: Mapping[str, str | None], where: str
) -> dict[str, str]:
    """Returns new name by old name for those that `map_keys` keeps; raises as it."""
    current = {name: name for name in names}
    for pattern, replacement in keys.items():
        rule = re.compile(pattern)
        found = [old for old, new in current.items() if rule.search(new)]
        if not found:
            raise TeacherError(
                f"{where}.keys must match names of the checkpoint, got {pattern!r} for "
                f"{len(current)} names of which it matches none "
                f"({listed(list(current.values()))}); correct or remove it"
            )
        for old in found:
            if replacement is None:
                del current[old]
            else:
                current[old] = rule.sub(replacement, current[old])
    taken: dict[str, str] = {}
    for old, new in current.items():
        if new in taken:
            raise TeacherError(
                f"{where}.keys must keep names apart, got {new!r} for both "
                f"{taken[new]!r} and {old!r}; leave one out with `null`"
            )
        taken[new] = old
    return current


def explain_difference(
    wanted: Mapping[str, Shape],
    given: Mapping[str, Shape],
    name: str,
    is_whole: bool = True,
) -> str | None:
    """Returns how a checkpoint differs from a model, None where it does not.

    Args:
        wanted: shapes of the model's parameters by name; None where not known.
        given: those of the checkpoint.
        name: what to call the checkpoint.
        is_whole: whether these are all names, or only those that do not fit.
    """
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    differing = [
        key
        for key, shape in wanted.items()
        if key in given and given[key] is not None and given[key] != shape
    ]
    if not (missing or unexpected or differing):
        return None
    parts = [
        f"{len(keys)} {what} ({listed(keys)})"
        for what, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            (
                "of another shape",
                [_side_by_side(key, given[key], wanted[key]) for key in differing],
            ),
        )
        if keys
    ]
    rules = suggest_keys(wanted, given, is_whole)
    hint = "are they of this model, with these `args`?"
    if rules:
        fits = _num_fitting(rename(list(given), rules, ""), wanted, given)
        whose = "the model's" if is_whole else "these"
        hint = (
            f"with `{written(rules)}` {fits} of {whose} {len(wanted)} fit"
            f"{'' if fits == len(wanted) else '; the others are missing or differ'}"
        )
    return (
        f"weights must have exactly the model's parameters, got {', '.join(parts)} "
        f"({name}); {hint}"
    )


def _side_by_side(key: str, given: Shape, wanted: Shape) -> str:
    turned = bool(given and wanted) and tuple(reversed(given or ())) == wanted
    return f"{key} {given} for {wanted}{', transposed' if turned else ''}"


def listed(names: Sequence[str]) -> str:
    """Returns the first names, for messages."""
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def written(rules: Mapping[str, str | None]) -> str:
    """Returns rules as the line of YAML that a job would hold."""
    parts = (
        f"'{pattern}': {'null' if new is None else repr(new)}"
        for pattern, new in rules.items()
    )
    return f"keys: {{{', '.join(parts)}}}"


def suggest_keys(
    wanted: Mapping[str, Shape], given: Mapping[str, Shape], is_whole: bool = True
) -> Rules:
    """Returns ``keys:`` that let most names of a checkpoint fit, {} where none do.

    Looked for are prefixes that are there, missing or named otherwise, and single parts
    of names that are called otherwise; where then nothing is missing, what is left over
    is left out. Names alone decide nothing: shapes must agree where they are known.
    Where two answers are as good as each other there is none.

    Args:
        wanted: shapes of the model's parameters by name; None where not known.
        given: those of the checkpoint.
        is_whole: whether these are all names; else nothing can safely be left out.
    """
    rules: Rules = {}
    names = {name: name for name in given}
    before = fits = _num_fitting(names, wanted, given)
    while len(rules) < _MAX_RULES and fits < len(wanted):
        tried = [
            (count, rule in _KNOWN, -len(rule[0]), rule, renamed)
            for rule in _candidates(names, wanted, given)
            if (renamed := _renamed(names, rule)) and rule[0] not in rules
            if (count := _num_fitting(renamed, wanted, given)) > fits
        ]
        if not tried:
            break
        fits, is_known, _, rule, names = max(tried, key=lambda one: one[:4])
        rivals = [one for one in tried if one[0] == fits and one[4] != names]
        if not is_known and any(
            _num_fitting(_renamed(names, one[3]), wanted, given) <= fits
            for one in rivals
        ):
            # Two answers for the same names: a wrong one would load and say nothing.
            return {}
        rules[rule[0]] = rule[1]
    lacking = len(wanted) - before
    if lacking and fits - before <= lacking / 2:
        return {}
    if is_whole and fits == len(wanted):
        rules |= _left_out(names, wanted)
    return rules


def _renamed(names: Mapping[str, str], rule: tuple[str, str]) -> dict[str, str]:
    """Returns new names by the checkpoint's own, {} where two would become one."""
    pattern, new = rule
    renamed = {old: re.sub(pattern, new, name) for old, name in names.items()}
    return renamed if len(set(renamed.values())) == len(renamed) else {}


def _num_fitting(
    names: Mapping[str, str], wanted: Mapping[str, Shape], given: Mapping[str, Shape]
) -> int:
    return sum(_agree(new, wanted, given[old]) for old, new in names.items())


def _agree(name: str, wanted: Mapping[str, Shape], shape: Shape) -> bool:
    return name in wanted and (
        shape is None or wanted[name] is None or wanted[name] == shape
    )


def _candidates(
    names: Mapping[str, str], wanted: Mapping[str, Shape], given: Mapping[str, Shape]
) -> list[tuple[str, str]]:
    """Returns (pattern, replacement) that most pairs of unmatched names speak for."""
    held = set(names.values())
    by_suffix: dict[tuple[str, ...], list[str]] = defaultdict(list)
    by_gap: dict[tuple[int, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in wanted:
        if name in held:
            continue
        parts = tuple(name.split("."))
        for start in range(len(parts)):
            by_suffix[parts[start:]].append(name)
            by_gap[start, (*parts[:start], *parts[start + 1 :])].append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for old, name in names.items():
        if name in wanted:
            continue
        parts = tuple(name.split("."))
        for start in range(len(parts)):
            others = by_suffix.get(parts[start:], [])
            # An ending that most names have (`weight`) says nothing of any.
            if len(others) > _MAX_CANDIDATES:
                break
            pairs = [
                (".".join(parts[:start]), other[: -len(".".join(parts[start:]))])
                for other in others
                if _agree(other, wanted, given[old])
            ]
            votes.update(_prefix_rule(mine, theirs) for mine, theirs in pairs)
            if pairs:
                break
        for place in range(1, len(parts)):
            gap = (*parts[:place], *parts[place + 1 :])
            for other in by_gap.get((place, gap), ()):
                theirs = other.split(".")[place]
                is_number = parts[place].isdigit() or theirs.isdigit()
                if not is_number and _agree(other, wanted, given[old]):
                    end = "$" if place == len(parts) - 1 else r"\."
                    dot = "" if end == "$" else "."
                    rule = rf"\.{re.escape(parts[place])}{end}", f".{theirs}{dot}"
                    votes[rule] += 1
    return [rule for rule, _ in votes.most_common(_MAX_CANDIDATES)]


def _prefix_rule(mine: str, theirs: str) -> tuple[str, str]:
    pattern = rf"^{re.escape(mine)}\." if mine else "^"
    return pattern, theirs


def _left_out(names: Mapping[str, str], wanted: Mapping[str, Shape]) -> Rules:
    """Returns rules that leave out what a model does not have, and nothing else."""
    extra = [name for name in names.values() if name not in wanted]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in extra:
        groups[name.partition(".")[0]].append(name)
    rules: Rules = {}
    for group in groups.values():
        paths = [name.split(".")[:-1] for name in group]
        shared = takewhile(
            lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)
        )
        stem = ".".join(parts[0] for parts in shared)
        pattern = rf"^{re.escape(stem)}\." if stem else rf"^{re.escape(group[0])}$"
        if any(re.search(pattern, name) for name in wanted):
            return {}
        rules[pattern] = None
    return rules if len(rules) <= _MAX_RULES else {}
