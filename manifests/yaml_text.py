"""YAML as text: reading it with YAML 1.2's plain values, and ``key=value`` overrides.

PyYAML reads YAML 1.1, where ``on`` and ``no`` are truth values (so a teacher's ``on:``
would not be a word), ``1e-4`` is text, ``1:30`` is ninety, and of two equal keys the
first is lost without a word. Aliases let a few lines stand for billions of values, or
for themselves: what a text holds is counted before anyone walks it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Any

import yaml

from manifests.errors import ManifestError

MAX_VALUES = 200_000
"""Most values of a document, those behind aliases counted each time."""

_SHOWN = 200
_MERGE_TAG = "tag:yaml.org,2002:merge"
_KEPT_TAGS = (_MERGE_TAG, "tag:yaml.org,2002:null")


class _Loader(yaml.SafeLoader):
    """Plain values as YAML 1.2 has them; a field that is given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - as PyYAML declares it
        first: [(tag, rule) for tag, rule in rules if tag in _KEPT_TAGS]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(
        self, node: yaml.MappingNode, deep: bool = False
    ) -> dict[Hashable, Any]:
        """Returns a mapping; raises ConstructorError where a key is there twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_TAG:
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{key.value} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merges ``<<`` into a mapping; raises ConstructorError at too much."""
        super().flatten_mapping(node)
        if len(node.value) > MAX_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, "more values than a document may hold", node.start_mark
            )


for _tag, _rule, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)"
        r"|\.(nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_rule})$"), list(_first)
    )


def _load_yaml(text: bytes | str) -> Any:
    # A subclass of SafeLoader: it makes nothing but plain values.
    try:
        found = yaml.load(text, _Loader)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    _check_size(found)
    return found


def _check_size(document: Any) -> None:
    """Raises ValueError where a document is too large once its aliases are followed."""
    pending, num_values = [document], 0
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            pending += one.values()
        elif isinstance(one, (list, tuple, set)):
            pending += one
        num_values += 1
        if num_values + len(pending) > MAX_VALUES:
            raise ValueError(
                f"it holds more than {MAX_VALUES} values, aliases followed"
            )


def parse_yaml(text: bytes, where: str) -> dict[str, Any]:
    """Returns the mapping that a YAML text holds.

    Args:
        text: UTF-8.
        where: its place, for messages.

    Raises:
        ManifestError: it is not YAML, with the line, or not a mapping.
    """
    try:
        data = _load_yaml(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ManifestError(f"{where}{line}: not YAML: {problem}") from error
    if not isinstance(data, dict):
        got = "nothing" if data is None else type(data).__name__
        raise ManifestError(f"{where}: must be a mapping of fields, got {got}")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> None:
    """Sets ``a.b.c=value``, values read as YAML; a number is a place in a list.

    Raises:
        ManifestError: an override has no '=', walks through a value, or names a place
            that its list does not have.
    """
    for given in overrides:
        path, equals, value = given.partition("=")
        text = given if len(given) <= _SHOWN else f"{given[:_SHOWN]}..."
        *parents, last = path.split(".")
        if not equals or not all([*parents, last]):
            raise ManifestError(f"override must be key=value, got {text!r}")
        target: dict[str, Any] | list[Any] = data
        for parent in parents:
            if isinstance(target, dict) and target.get(parent) is None:
                target[parent] = {}
            target = _child(target, parent, text)
            if not isinstance(target, (dict, list)):
                raise ManifestError(
                    f"override {text!r}: {parent} is a value, not a mapping; give the "
                    "whole of it"
                )
        try:
            parsed = _load_yaml(value)
        except (yaml.YAMLError, ValueError) as error:
            raise ManifestError(f"override {text!r}: the value is not YAML") from error
        if isinstance(target, list):
            _child(target, last, text)
            target[int(last)] = parsed
        else:
            target[last] = parsed


def _child(target: dict[str, Any] | list[Any], step: str, text: str) -> Any:
    """Returns what stands at one step of an override's path."""
    if isinstance(target, dict):
        return target[step]
    if not step.isdecimal() or len(step) > 9 or int(step) >= len(target):
        raise ManifestError(
            f"override {text!r}: {step} must be a place in a list of {len(target)}, "
            "counted from 0"
        )
    return target[int(step)]
