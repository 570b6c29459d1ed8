"""Labels and metadata: members to numbers, and dotted paths into JSON."""

from __future__ import annotations

import json
import math
import re

from manifests.inputs import LabelConfig
from pipeline.samples.errors import SampleError

MAX_METADATA_BYTES = 16 * 2**20
"""Largest JSON member that is parsed."""

_MAX_TEXT_BYTES = 64
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")


def parse_label(member: bytes, config: LabelConfig) -> int | float:
    """Returns the label in a member's bytes.

    Args:
        member: text such as ``b"7"``, or JSON where ``config.path`` says where in it.
        config: how many classes there are; omitted for a number.

    Returns:
        An int in [0, num_classes), or a finite float where there are no classes.

    Raises:
        SampleError: ``bad_json``, ``missing`` (nothing at the path), ``not_a_class``
            (no integer), ``not_a_number`` or ``out_of_range`` (no such class, or not
            finite).
    """
    value: object
    if config.path is not None:
        value = lookup(parse_metadata(member), config.path)
    else:
        value = _text(member)
    if config.num_classes is None:
        return _number(value)
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise SampleError("not_a_class", f"{_shown(value)} is no integer")
    if not 0 <= value < config.num_classes:
        raise SampleError(
            "out_of_range",
            f"class {_shown(value)} is not in 0..{config.num_classes - 1}",
        )
    return value


def parse_metadata(data: bytes) -> object:
    """Returns what a JSON member holds.

    Raises:
        SampleError: ``bad_json``: not JSON, nested too deep, or over 16 MiB.
    """
    if len(data) > MAX_METADATA_BYTES:
        raise SampleError(
            "bad_json", f"{len(data)} bytes, at most {MAX_METADATA_BYTES} are parsed"
        )
    try:
        result: object = json.loads(data)
    except RecursionError as error:
        raise SampleError("bad_json", "it is nested too deep") from error
    except ValueError as error:
        raise SampleError("bad_json", str(error)[:200]) from error
    return result


def lookup(metadata: object, path: str) -> object:
    """Returns what lies at a dotted path, such as ``cameras.CAM_FRONT`` or ``boxes.0``.

    Raises:
        SampleError: ``missing``: there is nothing at that path.
    """
    value = metadata
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise SampleError("missing", f"the metadata has no {path!r} (at {part!r})")
    return value


def _text(member: bytes) -> str:
    try:
        return member[: _MAX_TEXT_BYTES + 1].decode("ascii").strip()
    except UnicodeDecodeError:
        return member[:_MAX_TEXT_BYTES].decode("ascii", "backslashreplace")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise SampleError("not_a_number", f"{_shown(value)} is no number")
    try:
        number = float(value)
    except (ValueError, OverflowError) as error:
        raise SampleError("not_a_number", f"{_shown(value)} is no number") from error
    if not math.isfinite(number):
        raise SampleError("out_of_range", f"{_shown(value)} is not finite")
    return number


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
