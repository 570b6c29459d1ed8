"""From YAML and ``key=value`` overrides to a checked document.

Owns turning validation failures into one line that names each field, and making
relative paths absolute: they start from the YAML's own folder. The YAML itself is in
``yaml_text``.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import posixpath
import re
import reprlib
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel, ValidationError

from manifests.errors import ManifestError, StorageError
from manifests.job import Job
from manifests.own_checksum import parse_checked
from manifests.storage import read_url
from manifests.teacher import TeacherConfig
from manifests.yaml_text import apply_overrides, parse_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

# Errors whose text says all: what was given is not repeated behind it.
_SAID_ALREADY = (
    "extra_forbidden",
    "missing",
    "value_error",
    "union_tag_not_found",
    "union_tag_invalid",
)
_WEIGHTS_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".npz")
# Their models are folders and files, named by path.
_FAMILIES_BY_PATH = ("student", "exported")
# What a message shows of a document, which may be any stranger's.
_MOST_FIELDS = 20
_LONGEST = 500
_REPR = reprlib.Repr()
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 20
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 200
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def canonical_json(value: Any) -> str:
    """Returns JSON text that is equal for equal values: sorted keys, no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any) -> str:
    """Returns the sha256 hex digest of a JSON value in canonical form."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def folder_of(url: str) -> str:
    """Returns the folder that paths inside the document at ``url`` start from."""
    if _SCHEME.match(url):
        return url.rsplit("/", 1)[0]
    return os.path.dirname(os.path.abspath(url))


def resolve_path(path: str, base: str) -> str:
    """Returns ``path`` as an absolute path or URL; relative ones start at ``base``."""
    if _SCHEME.match(path):
        return path
    if _SCHEME.match(base):
        scheme, _, folder = base.partition("://")
        joined = posixpath.normpath(posixpath.join(folder, path))
        return path if path.startswith("/") else f"{scheme}://{joined}"
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))


def _cut(text: str) -> str:
    """Returns the beginning of a text: an error is a line that is read."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _shown(value: Any) -> str:
    return _cut(_REPR.repr(value))


def _branches(annotation: Any) -> list[Any]:
    """Returns what a type may be: the members of unions, without annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _branches(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [one for part in get_args(annotation) for one in _branches(part)]
    return [annotation]


def _is_model(annotation: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _has_kind(model: type[BaseModel], value: Any) -> bool:
    """Whether a model of a discriminated union is the one that a value names."""
    kind = model.model_fields.get("kind")
    named = value.get("kind") if isinstance(value, Mapping) else None
    return kind is None or named in get_args(kind.annotation)


def _fields_at(
    model: type[BaseModel], steps: Sequence[str | int], value: Any
) -> list[str]:
    """Returns the names of the fields that may stand at a path of a document."""
    current: list[Any] = [model]
    for step in steps:
        following: list[Any] = []
        for one in current:
            if _is_model(one):
                following += [
                    branch
                    for name, field in one.model_fields.items()
                    if step in (name, field.alias)
                    for branch in _branches(field.annotation)
                ]
            else:
                following += [b for arg in get_args(one) for b in _branches(arg)]
        value = value[step]
        current = following
    return [
        field.alias or name
        for one in current
        if _is_model(one) and _has_kind(one, value)
        for name, field in one.model_fields.items()
    ]


def _written_path(
    location: Sequence[str | int], value: Any, is_missing: bool
) -> list[str | int]:
    """Returns a path as it is written, without pydantic's names of union branches."""
    steps: list[str | int] = []
    for number, step in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(value, Mapping) and (step in value or (is_last and is_missing)):
            steps.append(step)
            value = value.get(step)
        elif isinstance(value, (list, tuple)) and isinstance(step, int):
            steps.append(step)
            value = value[step] if step < len(value) else None
    return steps


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(names)}"


def _complaint(
    item: ErrorDetails, steps: list[str | int], model: type[BaseModel], data: Any
) -> str:
    """Returns what one of pydantic's errors says, in our words."""
    context = item.get("ctx", {})
    kind = str(context.get("discriminator", "")).strip("'")
    match item["type"]:
        case "extra_forbidden":
            known = _fields_at(model, steps[:-1], data)
            return f"no such field; {_nearest(str(steps[-1]), known)}"
        case "missing":
            return "missing, it must be given"
        case "value_error":
            return item["msg"].removeprefix("Value error, ")
        case "union_tag_not_found":
            return f"{kind} is missing, it must be given"
        case "union_tag_invalid":
            known = re.findall(r"'([^']+)'", context["expected_tags"])
            return (
                f"no such {kind}: {context['tag']!r}; {_nearest(context['tag'], known)}"
            )
        case "literal_error":
            known = re.findall(r"'([^']+)'", context["expected"])
            return (
                f"must be {context['expected']}; {_nearest(str(item['input']), known)}"
            )
    return item["msg"][:1].lower() + item["msg"][1:]


def explain(
    error: ValidationError, model: type[BaseModel], data: Any, where: str
) -> ManifestError:
    """Returns one error that names each field that is wrong, with the nearest name."""
    found: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    items = error.errors()
    for item in items:
        steps = _written_path(item["loc"], data, item["type"] == "missing")
        path = ".".join(str(step) for step in steps)
        found.setdefault(path, []).append(_complaint(item, steps, model, data))
        if item["type"] not in _SAID_ALREADY:
            got[path] = f" (got {_shown(item['input'])})"
    lines = [
        (f"{_cut(path)}: " if path else "")
        + " or ".join(map(_cut, said))
        + got.get(path, "")
        for path, said in itertools.islice(found.items(), _MOST_FIELDS)
    ]
    if len(found) > _MOST_FIELDS:
        lines.append(f"and {len(found) - _MOST_FIELDS} more")
    return ManifestError(f"{where}: {'; '.join(lines)}")


def parse_document(model: type[Model], data: Mapping[str, Any], where: str) -> Model:
    """Returns ``data`` as a checked model.

    Raises:
        ManifestError: naming each field that is wrong and what to write instead.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model, data, where) from error


def load_json(model: type[Model], text: bytes, where: str) -> Model:
    """Returns a JSON document as a checked model; its own crc32c is compared.

    Raises:
        ManifestError: it is not such a document, or is damaged.
    """
    return parse_document(model, parse_checked(text, where), where)


def is_weights_file(weights: str) -> bool:
    """Whether ``weights:`` names a file or URL, not a tag: by slash or suffix."""
    return (
        "/" in weights or "\\" in weights or weights.lower().endswith(_WEIGHTS_SUFFIXES)
    )


def _resolve_teacher(where: str, config: TeacherConfig, base: str) -> TeacherConfig:
    changes: dict[str, Any] = {}
    if config.weights is not None and is_weights_file(config.weights):
        changes["weights"] = resolve_path(config.weights, base)
    if any(output.classifier is not None for output in config.outputs.values()):
        changes["outputs"] = {
            name: output
            if output.classifier is None
            else output.model_copy(
                update={"classifier": resolve_path(output.classifier, base)}
            )
            for name, output in config.outputs.items()
        }
    if config.family == "module":
        file, colon, attribute = config.model_name.rpartition(":")
        if not colon:
            raise ManifestError(
                f"{where}.model: must be module:FILE.py:CLASS, got {config.model!r}"
            )
        changes["model"] = f"module:{resolve_path(file, base)}:{attribute}"
    if config.family in _FAMILIES_BY_PATH:
        changes["model"] = f"{config.family}:{resolve_path(config.model_name, base)}"
    return config.model_copy(update=changes)


def load_yaml(
    model: type[Model], path: str, overrides: Sequence[str], what: str
) -> Model:
    """Returns the document at ``path`` with overrides applied, its paths as written.

    Args:
        model: of the document.
        path: of the YAML.
        overrides: ``key=value``, dotted.
        what: a name for messages, such as ``job``.

    Raises:
        ManifestError: the file is missing, is not YAML or has a wrong field.
    """
    try:
        text = read_url(path)
    except StorageError as error:
        raise ManifestError(f"cannot read the {what}: {error}") from error
    data = parse_yaml(text, path)
    apply_overrides(data, overrides)
    return parse_document(model, data, path)


def resolve_patterns(shards: str | Sequence[str], base: str) -> list[str]:
    """Returns patterns of shards as absolute paths or URLs."""
    patterns = [shards] if isinstance(shards, str) else shards
    return [resolve_path(pattern, base) for pattern in patterns]


def load_job(path: str, overrides: Sequence[str] = ()) -> Job:
    """Returns the job at ``path`` with overrides applied and every path absolute.

    Raises:
        ManifestError: the file is missing, is not YAML or has a wrong field.
    """
    job = load_yaml(Job, path, overrides, "job")
    base = folder_of(path)
    dataset = job.dataset.model_copy(
        update={"shards": resolve_patterns(job.dataset.shards, base)}
    )
    teachers = {
        name: _resolve_teacher(f"{path}: teachers.{name}", config, base)
        for name, config in job.teachers.items()
    }
    return job.model_copy(
        update={
            "bank": resolve_path(job.bank, base),
            "dataset": dataset,
            "teachers": teachers,
        }
    )
