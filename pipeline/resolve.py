"""From a job to passes: what the bank lacks, as units with a fingerprint.

Owns what defines an output and a teacher, which pass already holds what, and the
refusal of anything that contradicts it. Who looks at what is ``group_teachers``. A job
that the bank already answers is told by digests alone, with neither torch nor Beam
imported.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from manifests.bank import ROWS_TEACHER, BankRecord, InputEntry, OutputEntry, PassEntry
from manifests.errors import BankError, ManifestError
from manifests.job import Job
from manifests.loading import digest
from manifests.teacher import OutputConfig
from pipeline.bank.encoding import Encoding
from pipeline.bank.encodings import make_encoding
from pipeline.bank.point_index import PointIndex
from pipeline.bank.stored_jpeg import StoredJpeg
from pipeline.group_teachers import Described, GroupTeacher
from teachers.interface import (
    OutputSpec,
)

NO_CONFIG = OutputConfig()
"""Of outputs that a job does not name: they come with others."""


def _definition(spec: OutputSpec, config: OutputConfig, path: str) -> dict[str, Any]:
    """Returns the fields of an output's job entry that define its values.

    A bird's-eye grid has the extent that its teacher knows, else that of the job. A
    zero-shot classifier is its bytes, wherever it lies.

    Raises:
        ManifestError: the job contradicts the teacher's extent.
    """
    data = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    for stored in ("encoding", "codec", "topk", "temperatures"):
        data.pop(stored, None)
    if spec.classifier is not None:
        data["classifier"] = spec.classifier
    if spec.extent is not None:
        known = spec.extent.model_dump(mode="json")
        if data.setdefault("extent", known) != known:
            raise ManifestError(
                f"extent of {path} must be the teacher's own {known}, got "
                f"{data['extent']}; leave it out of the job"
            )
    return data


def output_entry(
    spec: OutputSpec, config: OutputConfig, folder: str, size: str, block_rows: int
) -> OutputEntry:
    """Returns one output as the bank will hold it, its arrays included.

    Raises:
        ManifestError: the job contradicts the extent that the teacher knows.
    """
    if spec.kind == "index":
        encoding: Encoding = PointIndex(
            name=spec.name, kind="index", shape=spec.shape, dtype="uint32"
        )
    elif spec.kind == "image":
        encoding = StoredJpeg(
            name=spec.name, kind="image", shape=spec.shape, dtype="uint8"
        )
    else:
        encoding = make_encoding(
            config, name=spec.name, kind=spec.kind, shape=spec.shape, dtype=spec.dtype
        )
    arrays = encoding.arrays(folder, block_rows)
    return OutputEntry(
        name=spec.name,
        size=size,
        kind=spec.kind,
        shape=spec.shape,
        dtype=spec.dtype,
        norm=spec.norm,
        source=spec.source,
        definition=_definition(spec, config, f"{folder}/{spec.name}"),
        encoding=encoding.to_json(),
        arrays=tuple(array.to_json() for array in arrays),
    )


def teacher_identity(item: GroupTeacher, described: Described) -> dict[str, Any]:
    """Returns what makes two runs of a teacher the same teacher, field by field."""
    config = item.request.config
    model = described.facts.get("model")
    if model is None:
        is_file = config.family == "module"
        model = config.model_name.rpartition("/")[2] if is_file else config.model_name
    identity = {
        "model": model,
        "family": config.family,
        "args": config.args,
        "method": config.method,
        "code": described.facts.get("code_sha256"),
        "weights": item.weights.identity,
        "precision": config.precision,
        "inputs": list(item.inputs),
    }
    # Only where there are any: banks made before it existed keep their fingerprints.
    if config.keys:
        identity["keys"] = config.key_rules
    return identity


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name}: {old.get(name)!r} in the bank, {new.get(name)!r} now"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def installed_versions() -> dict[str, str]:
    """Returns the versions that numbers depend on, as provenance keeps them."""
    found = {}
    for name in ("teachonce", "torch", "timm", "open_clip_torch", "numpy", "pillow"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _pass_id(teacher: str, group: str, taken: set[str]) -> str:
    stem = f"{teacher}.{group}" if group else teacher
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}.{number}"
    taken.add(name)
    return name


def _check_same_teacher(
    item: GroupTeacher, identity: dict[str, Any], passes: Sequence[PassEntry]
) -> None:
    for entry in passes:
        if entry.teacher_fingerprint != digest(identity):
            old = entry.provenance["identity"]
            raise BankError(
                f"teacher {item.teacher} on {item.group} is not the one in the bank "
                f"({_differences(old, identity)}); give it another name, or make "
                "another bank"
            )


def _missing_outputs(
    item: GroupTeacher,
    entries: Mapping[tuple[str, str], OutputEntry],
    preprocess: Mapping[str, Any],
    passes: Sequence[PassEntry],
    last_view: int,
) -> dict[tuple[int, int], list[OutputEntry]]:
    """Returns outputs that no pass holds, by the range of views they lack."""
    missing: dict[tuple[int, int], list[OutputEntry]] = {}
    for (size, name), entry in entries.items():
        reached = -1
        for old_pass in passes:
            for old in old_pass.outputs:
                if (old.size, old.name) != (size, name):
                    continue
                now, before = (
                    {
                        "definition": one.definition,
                        "encoding": one.encoding,
                        "shape": list(one.shape),
                        "preprocess": how,
                    }
                    for one, how in (
                        (entry, preprocess[size]),
                        (old, old_pass.provenance["preprocess"][size]),
                    )
                )
                if digest(now) != digest(before):
                    raise BankError(
                        f"output {item.teacher}/{item.group}/{size}/{name} is stored "
                        f"differently in the bank ({_differences(before, now)}); keep "
                        "what the bank has, or make another bank"
                    )
                reached = max(reached, old_pass.last_view)
        if reached < last_view:
            missing.setdefault((reached + 1, last_view), []).append(entry)
    return missing


def resolve_teacher(
    item: GroupTeacher,
    described: Described,
    record: BankRecord | None,
    *,
    views: Mapping[str, Any],
    last_view: int,
    block_rows: int,
    batch: int,
    taken: set[str],
) -> tuple[list[PassEntry], list[str]]:
    """Returns the passes a bank lacks for one teacher and group, and those it has.

    Args:
        item: the teacher on the group.
        described: its outputs, by shapes alone.
        record: the bank's, if there is one.
        views: how random views are drawn.
        last_view: number of the last view the job wants.
        block_rows: of the bank.
        batch: rows per forward.
        taken: ids of passes, grown by those of the new ones.

    Raises:
        BankError: the bank holds another teacher, or another output, of that name.
    """
    identity = teacher_identity(item, described)
    passes = [
        entry
        for entry in (record.passes if record else ())
        if (entry.teacher, entry.group) == (item.teacher, item.group)
    ]
    _check_same_teacher(item, identity, passes)
    config = item.request.config
    entries = {
        (size, name): output_entry(
            spec,
            config.outputs.get(name, NO_CONFIG),
            f"{item.teacher}/{item.group}/{size}",
            size,
            block_rows,
        )
        for size, specs in described.outputs.items()
        for name, spec in specs.items()
    }
    missing = _missing_outputs(item, entries, described.preprocess, passes, last_view)
    new = []
    for (first, last), outputs in missing.items():
        fingerprint = digest(
            {
                "teacher": identity,
                "views": dict(views) if last > 0 else None,
                "preprocess": described.preprocess,
                "outputs": [
                    one.model_dump(mode="json", exclude={"arrays"}) for one in outputs
                ],
                "batch": batch,
                "block_rows": block_rows,
            }
        )
        new.append(
            PassEntry(
                id=_pass_id(item.teacher, item.group, taken),
                teacher=item.teacher,
                group=item.group,
                inputs=item.inputs,
                first_view=first,
                last_view=last,
                batch=min(batch, block_rows),
                outputs=tuple(outputs),
                teacher_fingerprint=digest(identity),
                fingerprint=fingerprint,
                request=config.model_dump(
                    mode="json", by_alias=True, exclude_unset=True
                ),
                provenance={
                    "identity": identity,
                    "weights": asdict(item.weights),
                    "preprocess": dict(described.preprocess),
                    "facts": dict(described.facts),
                    "license": config.license or described.facts.get("license"),
                    "cost_per_row": {
                        **asdict(described.cost),
                        "input_bytes": described.input_bytes,
                    },
                    "versions": installed_versions(),
                },
            )
        )
    return new, [entry.id for entry in passes]


def resolve_rows(
    job: Job,
    inputs: Mapping[str, InputEntry],
    record: BankRecord | None,
    taken: set[str],
) -> tuple[PassEntry | None, list[str]]:
    """Returns the pass of row facts that a bank lacks, and the ids of those it has."""
    held = [e for e in (record.passes if record else ()) if e.teacher == ROWS_TEACHER]
    have_inputs = {name for entry in held for name in entry.inputs}
    have_labels = {name for entry in held for name in entry.labels}
    new_inputs = tuple(name for name in inputs if name not in have_inputs)
    new_labels = tuple(name for name in job.labels if name not in have_labels)
    ids = [entry.id for entry in held]
    if not new_inputs and not new_labels:
        return None, ids
    identity = {
        "inputs": {name: inputs[name].model_dump(mode="json") for name in new_inputs},
        "labels": {
            name: job.labels[name].model_dump(mode="json") for name in new_labels
        },
    }
    entry = PassEntry(
        id=_pass_id(ROWS_TEACHER, "", taken),
        teacher=ROWS_TEACHER,
        inputs=new_inputs,
        labels=new_labels,
        teacher_fingerprint=digest(identity),
        fingerprint=digest(identity),
        provenance={"identity": identity, "versions": installed_versions()},
    )
    return entry, ids
