"""A job's teachers on their groups: weights found, and what each says of itself.

Owns which teacher looks at which inputs, the digest by which a bank knows a request
again without importing torch, and asking a teacher on the meta device.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manifests.bank import BankRecord, InputEntry
from manifests.document import check_name
from manifests.errors import ManifestError
from manifests.job import Job
from manifests.loading import digest
from manifests.teacher import TeacherConfig
from teachers import registry
from teachers.code import code_digest, kinds_wanted
from teachers.errors import TeacherError, WeightsNotFound
from teachers.interface import (
    Cost,
    GroupInput,
    OutputSpec,
    Teacher,
    TeacherRequest,
    WeightsRecord,
)
from teachers.zero_shot import classifier_digests

NATIVE = "native"


@dataclass(frozen=True)
class GroupTeacher:
    """A teacher of the job on one of its groups."""

    teacher: str
    group: str
    inputs: tuple[str, ...]
    request: TeacherRequest
    weights: WeightsRecord
    digest: str


@dataclass(frozen=True)
class Described:
    """A teacher asked on the meta device: its outputs by name of size, then by name."""

    outputs: Mapping[str, Mapping[str, OutputSpec]]
    preprocess: Mapping[str, Any]
    facts: Mapping[str, Any]
    cost: Cost
    input_bytes: int


def size_name(size: tuple[int, int] | None) -> str:
    """Returns a size's name in paths: ``256x448`` (height x width) or ``native``."""
    return NATIVE if size is None else f"{size[0]}x{size[1]}"


def parse_size(name: str) -> tuple[int, int] | None:
    """Returns what `size_name` made of."""
    if name == NATIVE:
        return None
    height, _, width = name.partition("x")
    return int(height), int(width)


def groups_of(
    name: str, config: TeacherConfig, inputs: Mapping[str, InputEntry]
) -> dict[str, tuple[str, ...]]:
    """Returns group name to its inputs for one teacher.

    Raises:
        ManifestError: a pattern in ``on`` matches no input, or there is none to run on.
    """
    kinds = kinds_wanted(config.family, config.preprocess.points is not None)

    def match(pattern: str) -> list[str]:
        found = [one for one in inputs if fnmatch.fnmatchcase(one, pattern)]
        if not found:
            raise ManifestError(
                f"teachers.{name}.on: {pattern!r} matches no input; inputs are "
                f"{', '.join(inputs)}"
            )
        return found

    if isinstance(config.on, dict):
        for group in config.on:
            try:
                check_name(group, f"teachers.{name}.on: name of group")
            except ValueError as error:
                raise ManifestError(str(error)) from error
        return {
            group: tuple(dict.fromkeys(one for p in patterns for one in match(p)))
            for group, patterns in config.on.items()
        }
    if config.on is not None:
        names = dict.fromkeys(one for pattern in config.on for one in match(pattern))
    else:
        names = dict.fromkeys(
            one for one, entry in inputs.items() if entry.config["kind"] in kinds
        )
    if not names:
        raise ManifestError(
            f"teachers.{name}: {config.model} takes {' or '.join(sorted(kinds))} and "
            "the job has no such input; add one, or say `on`"
        )
    return {one: (one,) for one in names}


def request_of(
    name: str,
    config: TeacherConfig,
    members: Sequence[str],
    inputs: Mapping[str, InputEntry],
) -> TeacherRequest:
    """Returns what a family needs to build the teacher for one group."""
    group = tuple(
        GroupInput(
            name=one,
            kind=inputs[one].config["kind"],
            aspect=inputs[one].aspect,
            columns=tuple(inputs[one].config.get("columns", ())),
            frames=int(inputs[one].config.get("frames", 0)),
        )
        for one in members
    )
    return TeacherRequest(name=name, config=config, group=group)


def _known_weights(record: BankRecord | None, teacher: str) -> WeightsRecord | None:
    for entry in record.passes if record else ():
        if entry.teacher == teacher and "weights" in entry.provenance:
            return WeightsRecord(**entry.provenance["weights"])
    return None


def find_teachers(
    job: Job,
    inputs: Mapping[str, InputEntry],
    views: Mapping[str, Any],
    record: BankRecord | None,
    missing_weights: dict[str, str] | None = None,
) -> list[GroupTeacher]:
    """Returns every (teacher, group) of the job with its weights found and digested.

    Args:
        job: with absolute paths.
        inputs: of the bank and the job.
        views: how views are drawn.
        record: of the bank, if there is one.
        missing_weights: where given, weights that cannot be found are noted here by
            teacher instead of raised; shapes need none.

    Raises:
        TeacherError: a teacher or its weights cannot be had.
    """
    found = []
    for name, config in job.teachers.items():
        weights: WeightsRecord | None = None
        for group, members in groups_of(name, config, inputs).items():
            request = request_of(name, config, members, inputs)
            if weights is None:
                known = _known_weights(record, name)
                try:
                    weights = registry.find_weights(request, known)
                except WeightsNotFound as error:
                    if missing_weights is None:
                        raise
                    missing_weights[name] = str(error)
                    weights = known or WeightsRecord("missing")
            identity: dict[str, Any] = {
                "config": config.model_dump(mode="json", by_alias=True),
                "code": code_digest(request),
                "inputs": {one: inputs[one].model_dump(mode="json") for one in members},
                "weights": weights.identity,
                "views": views,
                "num_views": job.views.random + 1,
            }
            if config.keys:
                identity["keys"] = config.key_rules
            if classifiers := classifier_digests(request):
                identity["classifiers"] = classifiers
            found.append(
                GroupTeacher(
                    name, group, tuple(members), request, weights, digest(identity)
                )
            )
    return found


def describe(item: GroupTeacher) -> Described:
    """Returns outputs, preprocessing and cost of a teacher, from shapes alone."""
    # It imports torch, which a job that the bank answers does without.
    from teachers.inputs.image import check_views_of_images

    teacher = registry.open_teacher(item.request, item.weights, "meta")
    outputs = {size_name(size): _with_index(teacher, size) for size in teacher.sizes}
    specs = {size_name(size): teacher.inputs(size) for size in teacher.sizes}
    for taken in specs.values():
        check_views_of_images(item.request, taken)
    preprocess = {
        size: {name: spec.to_json() for name, spec in taken.items()}
        for size, taken in specs.items()
    }
    costs = [teacher.cost(size) for size in teacher.sizes]
    cost = Cost(
        flops=sum(one.flops for one in costs),
        working_bytes=max(one.working_bytes for one in costs),
    )
    input_bytes = sum(
        spec.row_bytes for taken in specs.values() for spec in taken.values()
    )
    return Described(outputs, preprocess, teacher.facts.to_json(), cost, input_bytes)


def _with_index(
    teacher: Teacher, size: tuple[int, int] | None
) -> dict[str, OutputSpec]:
    """Returns a teacher's outputs, and beside those of points which points they are.

    Raises:
        TeacherError: an output of points whose sweep is not plain, or of other points
            than were given.
    """
    outputs: dict[str, OutputSpec] = {}
    given = [
        spec.row_shape[0]
        for spec in teacher.inputs(size).values()
        if spec.to_json()["kind"] == "points"
    ]
    for name, spec in teacher.outputs(size).items():
        outputs[name] = spec
        if spec.kind == "points":
            if given != [spec.shape[0]]:
                entry = f"teachers.{teacher.request.name}.outputs.{name}"
                raise TeacherError(
                    f"{entry} must have a row for each point of one sweep, got "
                    f"{spec.shape[0]} of sweeps of {given}; give the teacher one "
                    "sweep, or give the output a grid"
                )
            index = f"{name}_index"
            source = f"which points of the sweep as stored {name} is of"
            outputs[index] = OutputSpec(
                index, "index", spec.shape[:1], "uint32", source=source
            )
    return outputs
