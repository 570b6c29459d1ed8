"""Teachers that are students: the folder that `train` made, or one of its kind.

``student:./folder`` is built by timm where its ``config.json`` is in timm's hub form,
and is then the teacher that ``timm:`` makes of it: the same outputs, several sizes.
Where ``config.json`` names a loader, that runs, because the job names the folder, and
the rest is as with ``module:``; its SHA-256 goes into the teacher's facts. How the
folder looks is `manifests.student_folder`. Nothing of what trained the student is
needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import timm
import timm.models
from timm.models import PretrainedCfg
from torch import nn

from manifests.code import Code, load_code
from manifests.errors import StorageError
from manifests.storage import stat_url
from manifests.student_folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    LoaderFolder,
    StudentFolder,
    TimmFolder,
    read_student_folder,
)
from manifests.suggestions import close_matches
from manifests.teacher import OutputConfig, PreprocessConfig, TeacherConfig
from teachers.cost import building_on
from teachers.errors import TeacherError, as_teacher_error
from teachers.image_teacher import Pixels
from teachers.interface import GroupInput, Teacher, TeacherRequest, WeightsRecord
from teachers.module_family import ModuleTeacher
from teachers.timm_family import TimmTeacher, native_size
from teachers.timm_taps import describe_outputs, stride_of
from teachers.torch_teacher import freeze
from teachers.weights import resolve

_STATED = ("source", "layout", "grid")


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> Teacher:
    """Returns a student as a teacher; see `teachers.registry.open_teacher`."""
    where = f"teachers.{request.name}"
    folder = _read(request.config.model_name, request.base, f"{where}.model")
    if isinstance(folder.document, TimmFolder):
        return TimmStudentTeacher(request, weights, device, folder, folder.document)
    return LoaderTeacher(request, weights, device, folder, folder.document)


def _read(name: str, base: str, where: str) -> StudentFolder:
    with as_teacher_error():
        return read_student_folder(resolve(base, name), where)


class TimmStudentTeacher(TimmTeacher):
    """A student that timm builds, on one image."""

    def __init__(
        self,
        request: TeacherRequest,
        weights: WeightsRecord,
        device: str,
        folder: StudentFolder,
        document: TimmFolder,
    ) -> None:
        where = f"teachers.{request.name}"
        _check_timm_request(request, where)
        self._document = document
        self._place = f"{where}.model ({folder.url}/{CONFIG_NAME})"
        built = request.config.model_copy(
            update={"model": f"timm:{document.architecture}"}
        )
        super().__init__(dataclasses.replace(request, config=built), weights, device)
        self.facts = dataclasses.replace(
            self.facts,
            license=request.config.license or document.license or self._config.license,
            source=request.config.model_name,
            model=folder.identity,
        )

    def _find_config(self) -> PretrainedCfg:
        """Returns the record of the model: that of its folder."""
        return _record(self._document, self._place)

    @property
    def _arguments(self) -> dict[str, Any]:
        return _arguments(self._document, self._config)

    def _create(self, variant: dict[str, Any], **more: Any) -> nn.Module:
        try:
            return super()._create(variant, **more)
        except TypeError as error:
            raise TeacherError(
                f"{self._place} must have model_args that timm {timm.__version__} "
                f"builds {self._name} with, got {self._document.model_args} ({error})"
            ) from error


def _check_timm_request(request: TeacherRequest, where: str) -> None:
    kinds = [item.kind for item in request.group]
    if kinds != ["image"]:
        raise TeacherError(
            f"{where}.on must give this student, which timm builds, one image at a "
            f"time, got {', '.join(kinds)}; use a list of image inputs"
        )
    for name, output in request.config.outputs.items():
        for field in _STATED:
            if getattr(output, field) is not None:
                shown = "from" if field == "source" else field
                raise TeacherError(
                    f"{where}.outputs.{name}.{shown} has no effect on a student that "
                    "timm builds; leave it out"
                )
    if request.config.method != "forward":
        raise TeacherError(
            f"{where}.method has no effect on a student that timm builds; leave it out"
        )


def _record(document: TimmFolder, place: str) -> PretrainedCfg:
    """Returns a folder's record of its model, in timm's own type.

    Raises:
        TeacherError: timm has no such architecture, or the record is not one.
    """
    name = document.architecture
    if not timm.models.is_model(name):
        raise TeacherError(
            f"{place} must name an architecture of timm {timm.__version__}, got "
            f"{name!r}{close_matches(name, timm.list_models())}; was it trained with a "
            "newer timm?"
        )
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    fields = {key: one for key, one in document.pretrained_cfg.items() if key in known}
    args = document.model_args
    # What the model was built with is what its weights are of.
    num_classes = args.get("num_classes", document.num_classes)
    if num_classes is not None:
        fields["num_classes"] = num_classes
    record = PretrainedCfg(**{**fields, "architecture": name})
    try:
        channels, height, width = record.input_size
        numbers = (*record.mean, *record.std)
        is_sound = len(numbers) == 6 and min(height, width, *record.std) > 0
        is_sound = is_sound and all(isinstance(one, (int, float)) for one in numbers)
    except (TypeError, ValueError):
        channels, is_sound = 0, False
    if not is_sound or channels != 3:
        raise TeacherError(
            f"{place} must have pretrained_cfg.input_size [3, height, width] and three "
            f"numbers each of mean and std, got {record.input_size}, {record.mean}, "
            f"{record.std}"
        )
    if record.fixed_input_size and (side := args.get("img_size")) is not None:
        pair = (side, side) if isinstance(side, int) else tuple(side)
        record = dataclasses.replace(record, input_size=(3, *pair))
    return record


def _arguments(document: TimmFolder, record: PretrainedCfg) -> dict[str, Any]:
    """Returns what ``timm.create_model("local-dir:...")`` would build with."""
    return {
        **document.model_args,
        "pretrained_cfg": record,
        "pretrained_model_args": dict(document.model_args),
    }


class LoaderTeacher(ModuleTeacher):
    """A student that a file of its folder builds, on one input or several together."""

    def __init__(
        self,
        request: TeacherRequest,
        weights: WeightsRecord,
        device: str,
        folder: StudentFolder,
        document: LoaderFolder,
    ) -> None:
        self._folder, self._document = folder, document
        where = f"teachers.{request.name}"
        config = _with_defaults(request, document, where)
        super().__init__(dataclasses.replace(request, config=config), weights, device)
        self.facts = dataclasses.replace(
            self.facts,
            license=self.facts.license or document.license,
            model=folder.identity,
        )

    def _load_code(self) -> Code:
        with as_teacher_error():
            url = f"{self._folder.url}/{self._document.loader}"
            return load_code(url, self.request.base, self.where, nn.Module)

    @property
    def _asked(self) -> str:
        return (
            f"{self._folder.url}/{self._document.loader} must build the model from "
            f"{CONFIG_NAME} and the `files` that it lists"
        )

    def _construct(self) -> Any:
        with self._folder.copied() as path:
            return self._code.make(path)

    def _pixels(self, item: GroupInput) -> Pixels:
        taken = getattr(self._document.inputs, item.kind)
        return Pixels(taken.interpolation, taken.mean, taken.std)

    def _points(self, item: GroupInput) -> PreprocessConfig:
        """Returns how a sweep is taken: the folder's word, then the job's."""
        taken = self._document.inputs.points
        assert taken is not None, item.name
        given = self.request.config.preprocess.model_dump(exclude_unset=True)
        return PreprocessConfig(**{**taken.model_dump(), **given})


def _with_defaults(
    request: TeacherRequest, document: LoaderFolder, where: str
) -> TeacherConfig:
    """Returns the job's entry with what the folder says where the job is silent.

    Raises:
        TeacherError: the student takes no such input, or has no such output.
    """
    config, taken = request.config, document.inputs
    kinds = {item.kind for item in request.group}
    if unknown := sorted(kinds.difference(taken.kinds)):
        raise TeacherError(
            f"{where}.on must name inputs of kind {' or '.join(taken.kinds)} for this "
            f"student, got {', '.join(unknown)}; say which with `on: [NAME]`"
        )
    outputs: dict[str, OutputConfig] = {}
    for name, given in config.outputs.items():
        stated = document.outputs.get(name)
        if stated is None and given.source is None:
            raise TeacherError(
                f"{where}.outputs.{name} must be one of this student's "
                f"({', '.join(document.outputs)}), or say `from`"
                f"{close_matches(name, list(document.outputs))}"
            )
        # Layout and grid are those of the tensor that the folder means.
        defaults = stated.model_dump() if stated and given.source is None else {}
        silent = {
            field: value
            for field, value in defaults.items()
            if getattr(given, field) is None
        }
        outputs[name] = given.model_copy(update=silent)
    image = taken.image if "image" in kinds else taken.clip if "clip" in kinds else None
    sizes = config.sizes or ([image.size] if image else None)
    return config.model_copy(update={"outputs": outputs, "sizes": sizes})


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns what a student takes and gives, how it was made, and its licence.

    Raises:
        TeacherError: there is no such folder, or it cannot be built.
    """
    folder = _read(name, base, "model")
    try:
        weights = stat_url(f"{folder.url}/{WEIGHTS_NAME}")
    except StorageError as error:
        raise TeacherError(f"model must be a folder with weights: {error}") from error
    document = folder.document
    common = {
        "weights": f"{folder.url}/{WEIGHTS_NAME}",
        "weights_bytes": weights.size_bytes,
        "license": document.license,
        **({"teachonce": document.teachonce} if document.teachonce else {}),
    }
    if isinstance(document, TimmFolder):
        return {**_describe_timm(document, folder), **common}
    fields = document.model_dump(mode="json", by_alias=True, exclude_none=True)
    with as_teacher_error():
        code = load_code(f"{folder.url}/{document.loader}", base, "model", nn.Module)
    facts = {
        "loader": document.loader,
        "code_sha256": code.sha256,
        "args": document.args,
        "inputs": fields["inputs"],
        "outputs": fields["outputs"],
    }
    # What cannot be built on meta is still a student; its parameters are not counted.
    with contextlib.suppress(Exception), building_on("meta"), folder.copied() as path:
        model = freeze(code.make(path))
        facts["num_parameters"] = sum(item.numel() for item in model.parameters())
    return {**facts, **common}


def _describe_timm(document: TimmFolder, folder: StudentFolder) -> dict[str, Any]:
    place = f"{folder.url}/{CONFIG_NAME}"
    record = _record(document, place)
    try:
        with building_on("meta"):
            model = freeze(
                timm.create_model(document.architecture, **_arguments(document, record))
            )
    except TypeError as error:
        raise TeacherError(
            f"{place} must have model_args that timm {timm.__version__} builds "
            f"{document.architecture} with, got {document.model_args} ({error})"
        ) from error
    size = native_size(record)
    return {
        "architecture": document.architecture,
        "args": document.model_args,
        "native_size": list(size),
        "stride": stride_of(model),
        "outputs": describe_outputs(model, size),
        "num_parameters": sum(item.numel() for item in model.parameters()),
        "preprocess": {
            "interpolation": record.interpolation,
            "mean": list(record.mean),
            "std": list(record.std),
        },
    }
