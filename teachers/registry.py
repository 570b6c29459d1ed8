"""Which teacher families there are, and the two things asked of them.

Owns the table of families, the checks of a request that need no model, and finding
weights again. Imports neither torch nor any model library: a family's module is
imported when a teacher of it is opened. A new family is one file and one line of
`FAMILIES`, or an entry point of the group ``teachonce.teachers`` in another package
(``name = "module"``).

A family's module has three functions:

* ``open_teacher(request, weights, device) -> Teacher``; ``device="meta"`` reads no
  weights and answers nothing but shapes;
* ``find_weights(request) -> WeightsRecord``: its own pretrained weights. Files, URLs
  and random weights never reach it; a family with ``weights_at`` does not have it;
* ``describe(name, base) -> dict``: what the command line prints of a model.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, cast

from manifests.student_folder import WEIGHTS_NAME
from manifests.suggestions import close_matches
from manifests.teacher import OutputConfig, PreprocessConfig
from teachers.errors import TeacherError, WeightsNotFound
from teachers.interface import Teacher, TeacherRequest, WeightsRecord
from teachers.weights import (
    Wanted,
    find_file,
    parse_wanted,
    random_record,
    resolve,
)

ENTRY_POINTS = "teachonce.teachers"


@dataclass(frozen=True)
class Family:
    """Where a family lives and what can be said of it before it is imported.

    Attributes:
        module: dotted path of its module.
        summary: one line for people.
        kinds: kinds of input it takes.
        groups: whether it can look at several inputs together.
        outputs: pattern that names of its outputs match in full; None: any.
        takes_from: whether `from`, `layout`, `grid` and `method` mean something to it.
        takes_args: whether `args` do.
        draws_sweeps: whether it looks at sweeps as images, so that `sizes` and
            `preprocess.raster` mean something to it.
        weights_at: where its weights lie below the place that its model names, '' for
            that place itself; None: `weights` says where.
        code_at: what of its model's name is code that runs: a ``file``, before the last
            colon; a student's ``folder``; the ``weights`` themselves; None: nothing.
        takes_classifier: whether its ``logits`` may come from a zero-shot classifier.
    """

    module: str
    summary: str
    kinds: tuple[str, ...] = ("image",)
    groups: bool = False
    outputs: str | None = None
    takes_from: bool = False
    takes_args: bool = True
    draws_sweeps: bool = False
    weights_at: str | None = None
    code_at: Literal["file", "folder", "weights"] | None = None
    takes_classifier: bool = False


FAMILIES: dict[str, Family] = {
    "timm": Family(
        "teachers.timm_family",
        "timm:NAME[.TAG], any timm model that gives features",
        outputs=r"cls|pooled|embed|patch|logits|(layer|level)\d+",
        takes_classifier=True,
    ),
    "open_clip": Family(
        "teachers.open_clip_family",
        "open_clip:NAME, the image tower of a contrastive model; weights: its tag",
        outputs=r"embed|pooled|cls|patch|layer\d+|logits",
        takes_args=False,
        takes_classifier=True,
    ),
    "module": Family(
        "teachers.module_family",
        "module:./file.py:CLASS, any torch module of yours",
        kinds=("image", "points", "clip"),
        groups=True,
        takes_from=True,
        code_at="file",
    ),
    "student": Family(
        "teachers.student_family",
        "student:./folder, a student that `train` made, or a folder of its kind",
        kinds=("image", "points", "clip"),
        groups=True,
        takes_from=True,
        takes_args=False,
        weights_at=WEIGHTS_NAME,
        code_at="folder",
    ),
    "exported": Family(
        "teachers.exported_family",
        "exported:./file.pt2, a program that torch.export saved",
        kinds=("image", "points", "clip"),
        groups=True,
        takes_from=True,
        takes_args=False,
        weights_at="",
        code_at="weights",
    ),
    "pointpillars": Family(
        "teachers.pointpillars_family",
        "pointpillars:kitti, nuscenes or waymo; weights of OpenPCDet or mmdetection3d",
        kinds=("points",),
        outputs=r"bev|level\d+",
    ),
    "range_view": Family(
        "teachers.raster_family",
        "range_view:NAME, any timm model on a sweep as its sensor sees it",
        kinds=("points",),
        outputs=r"cls|pooled|patch|logits|(layer|level)\d+",
        draws_sweeps=True,
    ),
    "bev_raster": Family(
        "teachers.raster_family",
        "bev_raster:NAME, any timm model on a sweep as seen from above",
        kinds=("points",),
        outputs=r"cls|pooled|bev|logits|(layer|level)\d+",
        draws_sweeps=True,
    ),
}

_IMAGE_FIELDS = frozenset(
    {"channels", "range", "mean", "std", "divide", "interpolation", "fit"}
)
_POINT_FIELDS = frozenset({"points", "columns", "centre", "unit_sphere"})
_RASTER_FIELDS = frozenset({"raster"})
_FIELDS = {
    "image": (_IMAGE_FIELDS, "looks at no input of kind image"),
    "points": (_POINT_FIELDS, "is given no sweep as points"),
    "raster": (_RASTER_FIELDS, "draws no sweep, as range_view: and bev_raster: do"),
}
"""What of `preprocess` is for which way of taking an input, and why it may be idle."""


class FamilyModule(Protocol):
    """What the module of a family has."""

    def open_teacher(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> Teacher:
        """Returns the teacher on ``device``."""

    def find_weights(self, request: TeacherRequest) -> WeightsRecord:
        """Returns which of its own pretrained weights are meant."""

    def describe(self, name: str, base: str) -> dict[str, Any]:
        """Returns what there is to know of a model, as plain values."""


def families() -> list[tuple[str, str]]:
    """Returns (name, one line) of every family, ours first."""
    ours = [(name, family.summary) for name, family in FAMILIES.items()]
    others = [
        (name, f"{name}:NAME, from the package {_package(point)}")
        for name, point in sorted(_installed().items())
    ]
    return ours + others


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> Teacher:
    """Returns the teacher, frozen and in eval mode.

    Args:
        request: what the job asks for.
        weights: what `find_weights` returned for it.
        device: ``cpu``, ``cuda``, ``cuda:N``; ``meta`` for shapes alone.

    Raises:
        TeacherError: the family, model, weights, sizes or outputs cannot be had.
    """
    check_request(request)
    return _load(request.config.family).open_teacher(request, weights, device)


def find_weights(
    request: TeacherRequest, known: WeightsRecord | None = None
) -> WeightsRecord:
    """Returns which weights are meant, digested.

    A file that ``known`` describes and whose size and etag or time have not changed is
    not read again. Pretrained weights of a hub are pinned by ``known``: a revision
    never changes, so they are not looked for at all.

    Raises:
        TeacherError: there are no such weights, or they cannot be read.
    """
    check_request(request)
    family = FAMILIES.get(request.config.family)
    if family is not None and family.weights_at is not None:
        return _find_beside(request, family.weights_at, known)
    wanted: Wanted = parse_wanted(request)
    if wanted.kind == "random":
        return random_record(request, wanted.seed)
    if wanted.kind == "file":
        return find_file(request, wanted.url, known)
    if known and known.kind == "pretrained" and known.asked == wanted.asked:
        return known
    return _load(request.config.family).find_weights(request)


def _find_beside(
    request: TeacherRequest, weights_at: str, known: WeightsRecord | None
) -> WeightsRecord:
    url = resolve(request.base, request.config.model_name).rstrip("/")
    try:
        return find_file(request, f"{url}/{weights_at}" if weights_at else url, known)
    except WeightsNotFound as error:
        what = f"a folder with {weights_at}" if weights_at else "a file"
        raise TeacherError(
            f"teachers.{request.name}.model must be {what} that can be read, got "
            f"{request.config.model!r} ({error.__cause__}); correct the path"
        ) from error


def describe(model: str, base: str = ".") -> dict[str, Any]:
    """Returns what a model can give, its sizes, parameters, licence and source.

    Args:
        model: ``FAMILY:NAME``.
        base: folder that a relative path in the name starts from.

    Raises:
        TeacherError: there is no such family or model.
    """
    family, _, name = model.partition(":")
    if not name:
        raise TeacherError(
            f"model must be FAMILY:NAME, got {model!r}; families: {_family_names()}"
        )
    return {"model": model, "family": family, **_load(family).describe(name, base)}


def check_request(request: TeacherRequest) -> None:
    """Checks what can be checked of a request without its model.

    Raises:
        TeacherError: an unknown family, inputs it does not take, an output it never
            has, or a field that would have no effect.
    """
    config = request.config
    where = f"teachers.{request.name}"
    family = FAMILIES.get(config.family)
    if family is None:
        _find(config.family)
        return
    kinds = {item.kind for item in request.group}
    if unknown := sorted(kinds - set(family.kinds)):
        raise TeacherError(
            f"{where}.on must name inputs of kind {' or '.join(family.kinds)} for "
            f"{config.family}:, got {', '.join(unknown)}; say which with `on: [NAME]`"
        )
    if len(request.group) != 1 and not family.groups:
        names = ", ".join(item.name for item in request.group)
        raise TeacherError(
            f"{where}.on must give {config.family}: one input at a time, got the group "
            f"({names}); use a list, `on: [{names}]`"
        )
    for name, output in config.outputs.items():
        if family.outputs and not re.fullmatch(family.outputs, name):
            raise TeacherError(
                f"{where}.outputs.{name} must be one of those of {config.family}: "
                f"({family.outputs.replace('|', ', ')})"
            )
        if output.classifier is not None:
            _check_classifier(name, output, family, where)
        for field in ("source", "layout", "grid"):
            if not family.takes_from and getattr(output, field) is not None:
                alias = "from" if field == "source" else field
                raise TeacherError(
                    f"{where}.outputs.{name}.{alias} is for module: teachers; "
                    f"{config.family}: knows where {name} is, leave it out"
                )
    if not family.takes_from and config.method != "forward":
        raise TeacherError(f"{where}.method is for module: teachers; leave it out")
    if family.weights_at is not None:
        for field in ("weights", "keys"):
            if getattr(config, field):
                raise TeacherError(
                    f"{where}.{field} must be left out for {config.family}:, whose "
                    "weights come with its model"
                )
    if not family.takes_args and config.args:
        raise TeacherError(f"{where}.args must be empty for {config.family}:")
    # A clip's frames are taken as images are.
    kinds = {"image" if kind == "clip" else kind for kind in kinds}
    if family.draws_sweeps:
        kinds = {"raster"}
    if config.sizes and not kinds & {"image", "raster"}:
        raise TeacherError(
            f"{where}.sizes is for images; a sweep has none, leave it out"
        )
    _check_fields(config.preprocess, kinds, where)


def _check_classifier(
    name: str, output: OutputConfig, family: Family, where: str
) -> None:
    if not family.takes_classifier or name != "logits":
        takers = [f"{one}:" for one, it in FAMILIES.items() if it.takes_classifier]
        raise TeacherError(
            f"{where}.outputs.{name}.classifier is for the logits of "
            f"{' and '.join(takers)} teachers; leave it out"
        )
    if output.norm is not None or output.pool is not None:
        raise TeacherError(
            f"{where}.outputs.{name} has neither norm nor pool with a classifier; "
            "leave them out"
        )


def _check_fields(config: PreprocessConfig, kinds: set[str], where: str) -> None:
    given = config.model_fields_set
    for kind, (fields, reason) in _FIELDS.items():
        if kind not in kinds and (idle := sorted(given & fields)):
            raise TeacherError(
                f"{where}.preprocess.{idle[0]} has no effect: the teacher {reason}; "
                "leave it out"
            )


def _installed() -> dict[str, EntryPoint]:
    points = entry_points(group=ENTRY_POINTS)
    return {point.name: point for point in points if point.name not in FAMILIES}


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _family_names() -> str:
    return ", ".join([*FAMILIES, *sorted(_installed())])


def _find(name: str) -> str:
    if name in FAMILIES:
        return FAMILIES[name].module
    installed = _installed()
    if name in installed:
        return installed[name].value
    raise TeacherError(
        f"model must begin with a known family, got {name!r} (known: "
        f"{_family_names()}){close_matches(name, [*FAMILIES, *installed])}"
    )


def _load(name: str) -> FamilyModule:
    path = _find(name)
    try:
        return cast(FamilyModule, importlib.import_module(path))
    except ImportError as error:
        raise TeacherError(
            f"family {name!r} needs a package that is not installed ({error}); install "
            "teachonce[precompute]"
        ) from error
