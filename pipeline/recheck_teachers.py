"""Which teachers of a bank may run again: code agreed to, weights and code compared.

Nothing in a bank makes code run. A teacher whose model names code (a module's file, a
student's folder, an exported program) is taken from a job that the user names, and
only where that code is what the bank recorded; all others are rebuilt from the record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from manifests.bank import BankRecord, PassEntry
from manifests.job import Job
from manifests.suggestions import close_matches
from manifests.teacher import OutputConfig, TeacherConfig
from pipeline.errors import PipelineError
from pipeline.group_teachers import request_of
from teachers import registry
from teachers.code import check_code, is_code
from teachers.interface import TeacherRequest, WeightsRecord
from teachers.weights import digest, local_path

_PLACES = frozenset({"model", "weights", "on", "batch", "license", "outputs"})
"""Fields of a teacher that a job may say otherwise: places, and what passes hold."""

_STORED = frozenset({"classifier", "encoding", "topk", "temperatures"})
"""Fields of an output that are compared elsewhere, or do not change its values."""


def passes_of(record: BankRecord, teachers: Sequence[str] | None) -> list[PassEntry]:
    """Returns the passes of some teachers of a bank; None: of all of them.

    Raises:
        PipelineError: it has no such teacher.
    """
    held = [
        entry for entry in record.passes if entry.outputs and not entry.holds_inputs
    ]
    names = list(dict.fromkeys(entry.teacher for entry in held))
    for name in teachers or ():
        if name not in names:
            raise PipelineError(
                f"--teachers must name teachers of the bank ({', '.join(names)}), got "
                f"{name!r}{close_matches(name, names)}"
            )
    return [entry for entry in held if teachers is None or entry.teacher in teachers]


def agreed_record(
    record: BankRecord, passes: Sequence[PassEntry], job: Job | None
) -> BankRecord:
    """Returns the record from which the teachers of some passes may be loaded.

    A teacher that the job names has its places (model, weights, classifier) from there.

    Args:
        record: the bank's.
        passes: whose teachers will run.
        job: with absolute paths; None where the user named none.

    Raises:
        TeachOnceError: a teacher is code that no job names, is not the job's, or its
            code or weights are gone or not those that the bank recorded.
    """
    agreed: dict[str, PassEntry] = {}
    checked: dict[str, WeightsRecord] = {}
    for entry in passes:
        config = _config_of(entry, job)
        request = request_of(entry.teacher, config, entry.inputs, record.inputs)
        check_code(request, entry.provenance["identity"])
        if entry.teacher not in checked:
            checked[entry.teacher] = _find_weights(request, entry)
        weights = asdict(checked[entry.teacher])
        agreed[entry.id] = entry.model_copy(
            update={
                "request": config.model_dump(
                    mode="json", by_alias=True, exclude_unset=True
                ),
                "provenance": {**entry.provenance, "weights": weights},
            }
        )
    found = tuple(agreed.get(entry.id, entry) for entry in record.passes)
    return record.model_copy(update={"passes": found})


def _config_of(entry: PassEntry, job: Job | None) -> TeacherConfig:
    held = TeacherConfig.model_validate(entry.request)
    named = None if job is None else job.teachers.get(entry.teacher)
    if named is None:
        if is_code(held.family):
            what = "no job was named" if job is None else "the job does not have it"
            raise PipelineError(
                f"teacher {entry.teacher} must be named by a job to be run: its model "
                f"is code ({held.model}), which no bank makes run, and {what}; give "
                "--job JOB.yaml, or leave it out with --teachers"
            )
        return held
    if differences := _differences(entry, held, named):
        raise PipelineError(
            f"teachers.{entry.teacher} of the job must be the bank's, got another "
            f"({'; '.join(differences)}); give the job that made the bank"
        )
    return named


def _differences(
    entry: PassEntry, held: TeacherConfig, named: TeacherConfig
) -> list[str]:
    before, now = (
        {
            **one.model_dump(mode="json", by_alias=True, exclude=set(_PLACES)),
            "keys": one.key_rules,
            # What the name of code names is compared with the code itself.
            "model": one.family if is_code(one.family) else one.model,
            **{
                f"outputs.{name}": _definition(one.outputs.get(name))
                for name in (output.name for output in entry.outputs)
                if name in held.outputs
            },
        }
        for one in (held, named)
    )
    return [
        f"{name}: {before[name]!r} in the bank, {now[name]!r} in the job"
        for name in before
        if before[name] != now[name]
    ]


def _definition(config: OutputConfig | None) -> Mapping[str, Any] | None:
    if config is None:
        return None
    return config.model_dump(mode="json", by_alias=True, exclude=set(_STORED))


def _find_weights(request: TeacherRequest, entry: PassEntry) -> WeightsRecord:
    """Returns where the recorded weights lie now, every byte of them compared."""
    recorded = WeightsRecord(**entry.provenance["weights"])
    pinned = recorded if recorded.kind == "pretrained" else None
    found = registry.find_weights(request, pinned)
    if found.kind == "pretrained":
        with local_path(request, found) as path:
            found = replace(found, sha256=digest(path))
    if found.identity != recorded.identity:
        raise PipelineError(
            f"teachers.{request.name}.weights must be those that the bank's numbers "
            f"come from ({_shown(recorded.identity)}), got {_shown(found.identity)} "
            f"({found.url or found.kind}); put them back, or give a --job that says "
            "where they are"
        )
    return found


def _shown(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items())
