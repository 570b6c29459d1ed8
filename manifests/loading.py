"""From YAML and ``key=value`` overrides to a checked document.

Owns reading the file, applying overrides, turning validation failures into one line per
field, and making relative paths absolute: they start from the YAML's own folder.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from manifests.errors import ManifestError, StorageError
from manifests.job import Job, TeacherConfig
from manifests.storage import read_url

Model = TypeVar("Model", bound=BaseModel)

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
        return path if path.startswith("/") else f"{base}/{path.removeprefix('./')}"
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))


def _parse_yaml(text: bytes, where: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ManifestError(f"{where}{line}: not YAML: {problem}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{where}: must be a mapping of fields, got {type(data).__name__}")
    return data


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> None:
    """Sets ``a.b.c=value`` in nested mappings, values read as YAML.

    Raises:
        ManifestError: an override has no '=' or walks through a value.
    """
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals or not path:
            raise ManifestError(f"override must be key=value, got {text!r}")
        target = data
        *parents, last = path.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise ManifestError(f"override {text!r}: {parent} is a value, not a mapping")
        try:
            target[last] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ManifestError(f"override {text!r}: the value is not YAML") from error


def _field_names(model: Any) -> list[str]:
    """Returns field names of a model, or of the models in a type expression."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return [field.alias or name for name, field in model.model_fields.items()]
    return [name for part in get_args(model) for name in _field_names(part)]


def _names_near(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Returns names of the fields beside an unknown one, to suggest from."""
    current: Any = model
    for step in location[:-1]:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = next(
                (f for n, f in current.model_fields.items() if step in (n, f.alias)), None
            )
            current = field.annotation if field else None
        else:
            models = [
                part
                for part in _all_parts(current)
                if isinstance(part, type) and issubclass(part, BaseModel)
            ]
            tagged = [
                part
                for part in models
                if "kind" in part.model_fields
                and step in get_args(part.model_fields["kind"].annotation)
            ]
            current = (tagged or [models[0] if len(models) == 1 else tuple(models)])[0]
            if isinstance(current, tuple):
                continue
    if isinstance(current, tuple):
        return [name for part in current for name in _field_names(part)]
    return _field_names(current) if current is not None else []


def _all_parts(annotation: Any) -> list[Any]:
    parts = [annotation]
    for part in get_args(annotation):
        parts.extend(_all_parts(part))
    return parts


def explain(error: ValidationError, model: type[BaseModel], where: str) -> ManifestError:
    """Returns one error with a line per field that is wrong, with the nearest name."""
    lines = []
    for item in error.errors():
        path = ".".join(str(step) for step in item["loc"])
        if item["type"] == "extra_forbidden":
            known = _names_near(model, item["loc"])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            lines.append(f"{path}: no such field; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{path}: missing, it must be given")
        elif item["type"] == "value_error":
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {message}" if path else message)
        else:
            lines.append(f"{path}: {item['msg'].lower()}, got {item['input']!r}")
    return ManifestError("; ".join(f"{where}: {line}" for line in lines))


def parse_document(model: type[Model], data: Mapping[str, Any], where: str) -> Model:
    """Returns ``data`` as a checked model.

    Raises:
        ManifestError: naming each field that is wrong and what to write instead.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error, model, where) from error


def load_json(model: type[Model], text: bytes, where: str) -> Model:
    """Returns a JSON document as a checked model; raises ManifestError else."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{where}: must be a JSON object")
    return parse_document(model, data, where)


def _resolve_teacher(config: TeacherConfig, base: str) -> TeacherConfig:
    changes: dict[str, Any] = {}
    weights = config.weights
    if weights is not None and (weights.startswith((".", "/", "~")) or "/" in weights):
        changes["weights"] = resolve_path(weights, base)
    if config.family == "module":
        file, colon, attribute = config.model_name.rpartition(":")
        if not colon:
            raise ManifestError(
                f"model must be module:FILE.py:CLASS, got {config.model!r}"
            )
        changes["model"] = f"module:{resolve_path(file, base)}:{attribute}"
    return config.model_copy(update=changes)


def load_job(path: str, overrides: Sequence[str] = ()) -> Job:
    """Returns the job at ``path`` with overrides applied and every path absolute.

    Raises:
        ManifestError: the file is missing, is not YAML or has a wrong field.
    """
    try:
        text = read_url(path)
    except StorageError as error:
        raise ManifestError(f"cannot read the job: {error}") from error
    data = _parse_yaml(text, path)
    apply_overrides(data, overrides)
    job = parse_document(Job, data, path)
    base = folder_of(path)
    shards = job.dataset.shards
    patterns = [shards] if isinstance(shards, str) else shards
    dataset = job.dataset.model_copy(
        update={"shards": [resolve_path(pattern, base) for pattern in patterns]}
    )
    teachers = {
        name: _resolve_teacher(config, base) for name, config in job.teachers.items()
    }
    return job.model_copy(
        update={
            "bank": resolve_path(job.bank, base),
            "dataset": dataset,
            "teachers": teachers,
        }
    )
