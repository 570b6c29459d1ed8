"""Students: any timm model, or a module of yours, behind one interface of features.

Owns how a student is built at a size; `features` owns what it gives, `student_weights`
what it starts from. Sizes are found by trying on the meta device, not by a model's
name. A student takes the pixels of a view and normalises them itself, and has no
classifier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import timm
import timm.models
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import PretrainedCfg
from torch import nn

from manifests.code import explained, load_code
from manifests.errors import ManifestError
from manifests.recipe import StudentConfig
from manifests.suggestions import close_matches
from student_train.errors import TrainingError, reason_of
from student_train.features import Size, Student, StudentFeatures, measure, refused
from student_train.student_weights import (
    Start,
    load_strict,
    parse_start,
    read_weights,
)

__all__ = ["Student", "StudentFeatures", "make_student", "seeded"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_RESERVED_ARGS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "num_classes",
    "in_chans",
    "features_only",
)


def make_student(
    config: StudentConfig,
    size: Size | None,
    *,
    seed: int,
    base: str = ".",
    untrained: bool = False,
) -> Student:
    """Returns a student as the recipe says, on the CPU, in train mode.

    The same arguments give the same weights; the caller's random state is untouched.

    Args:
        config: the recipe's ``student``.
        size: (height, width) to build it for; None is the model's own. Where the model
            can run at other sizes too, this one will.
        seed: of random weights, unless ``weights`` names its own.
        base: folder that relative paths start from.
        untrained: draw from ``seed`` whatever ``weights`` says: the floor of a probe.

    Raises:
        TrainingError: an unknown model, arguments or a size that it does not take, or
            weights that do not fit.
    """
    family, _, name = config.model.partition(":")
    start = parse_start(None if untrained else config.weights, seed, base)
    if family == "module":
        return _make_module(config, name, size, start, base)
    if family != "timm":
        raise TrainingError(
            f"student.model must be timm:NAME or module:FILE:CLASS, got "
            f"{config.model!r}"
        )
    return _make_timm(name, config.args, size, start)


def _make_timm(
    name: str, args: Mapping[str, Any], size: Size | None, start: Start
) -> Student:
    record = _find_record(name)
    if reserved := [key for key in _RESERVED_ARGS if key in args]:
        raise TrainingError(
            f"student.args.{reserved[0]} is set by `weights` or is always the same; "
            "leave it out"
        )

    def create(more: Mapping[str, Any]) -> nn.Module:
        model: nn.Module = timm.create_model(name, **{"num_classes": 0, **args, **more})
        return model

    native = _pair(args.get("img_size") or record.input_size[1:])
    chosen = _choose_variant(create, name, args, size or native)
    with seeded(start.seed):
        model = create(chosen)
    classifier = record.classifier or ()
    unused = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    if start.kind == "file":
        load_strict(model, read_weights(start.url), start.url, unused)
    if start.kind == "pretrained":
        with seeded(start.seed):
            full = _pretrained(name, record, create, chosen)
        load_strict(model, full.state_dict(), name, unused)
    return Student(
        model,
        native_size=native,
        size=size or native,
        mean=record.mean,
        std=record.std,
        architecture=record.architecture,
        args={**args, **chosen},
    )


def _make_module(
    config: StudentConfig, name: str, size: Size | None, start: Start, base: str
) -> Student:
    if size is None:
        raise TrainingError(
            "a module: student's size must be given: a module does not say at which "
            "[height, width] it looks at images"
        )
    if start.kind == "pretrained":
        raise TrainingError(
            "student.weights must be a file or `random` for a module: student, got "
            "'pretrained': a module has no weights of its own to find"
        )
    with _as_training_error():
        code = load_code(name, base, "student", nn.Module)
        with (
            explained(f"student.model: {name}(**args) must be built"),
            seeded(start.seed),
        ):
            model = code.make(**config.args)
    if not isinstance(model, nn.Module):
        raise TrainingError(
            f"student.model must be a torch.nn.Module, got {type(model).__name__} "
            f"from {name}"
        )
    if not callable(getattr(model, "forward_features", None)):
        raise TrainingError(
            f"student.model must have forward_features(image), got {name} without; it "
            "returns (B, C, H, W), or (B, N, C) with num_prefix_tokens"
        )
    if start.kind == "file":
        load_strict(model, read_weights(start.url), start.url)
    return Student(
        model,
        native_size=size,
        size=size,
        mean=_three(model, "mean", IMAGENET_MEAN),
        std=_three(model, "std", IMAGENET_STD),
        args=config.args,
    )


def _find_record(name: str) -> PretrainedCfg:
    """Returns timm's record of a model: input, normalisation, classifier."""
    architecture, tag = timm.models.split_model_name_tag(name)
    if set(name) & set(":/\\") or not timm.models.is_model(architecture):
        known = timm.list_models()
        raise TrainingError(
            f"student.model must be one of timm {timm.__version__}'s {len(known)} "
            f"architectures, got {name!r}"
            f"{close_matches(architecture, known) or '; see timm.list_models()'}"
        )
    names = timm.models.get_arch_pretrained_cfgs(architecture)
    tags = [item.partition(".")[2] for item in names if "." in item]
    if tag and tag not in tags:
        raise TrainingError(
            f"student.model must have a tag that timm knows, got {name!r} (known: "
            f"{', '.join(tags) or 'none'}){close_matches(tag, tags)}"
        )
    return timm.models.get_pretrained_cfg(name) or PretrainedCfg(
        architecture=architecture
    )


def _choose_variant(
    create: Callable[[Mapping[str, Any]], nn.Module],
    name: str,
    args: Mapping[str, Any],
    size: Size,
) -> dict[str, Any]:
    """Returns the further arguments with which the model runs at ``size``.

    Some models take any size as they are, some need ``img_size`` and refuse all others
    unless ``dynamic_img_size`` is set, some accept neither. None says so, hence the
    trial. One that runs at several sizes is preferred, for recipes that vary it.
    """
    failure: Exception | None = None
    was_built = False
    # What cannot be built or run on meta may well be on a CPU.
    for device in ("meta", "cpu"):
        running: list[dict[str, Any]] = []
        for more in (
            {},
            {"img_size": size, "dynamic_img_size": True},
            {"img_size": size},
            {"dynamic_img_size": True},
        ):
            if any(key in args for key in more):
                continue
            try:
                model = _build_empty(create, more, device)
                was_built = True
                measure(model, size)
                running.append(more)
                # Free on meta, where nothing is computed; not on a CPU.
                if device == "meta":
                    measure(model, (2 * size[0], 2 * size[1]))
                return more
            # A model raises what it likes. The complaint to show is ours, or that of
            # the model as it is, not that of an argument which only some models have.
            except Exception as error:
                if failure is None or isinstance(error, TrainingError):
                    failure = error
        if running:
            return running[0]
    assert failure is not None
    if not was_built:
        raise TrainingError(
            f"student.args must be arguments that {name!r} takes together, got "
            f"{dict(args)} ({reason_of(failure)})"
        ) from failure
    if isinstance(failure, TrainingError):
        raise failure
    raise refused(name, size, failure) from failure


def _build_empty(
    create: Callable[[Mapping[str, Any]], nn.Module],
    more: Mapping[str, Any],
    device: str,
) -> nn.Module:
    with seeded(0), torch.device(device):
        return create(more)


def _pretrained(
    name: str,
    record: PretrainedCfg,
    create: Callable[[Mapping[str, Any]], nn.Module],
    chosen: Mapping[str, Any],
) -> nn.Module:
    """Returns the model with timm's weights, its classifier included.

    With the classifier that the weights have, timm loads strictly; without it, what is
    missing would stay random in silence.
    """
    if not (record.hf_hub_id or record.url or record.file):
        names = timm.models.get_arch_pretrained_cfgs(record.architecture or name)
        tags = [item.partition(".")[2] for item in names if "." in item]
        raise TrainingError(
            f"student.weights must be a file or `random` for {name!r}, which timm has "
            f"no pretrained weights of (tags: {', '.join(tags) or 'none'})"
        )
    overlay: dict[str, Any] = {}
    for file in ("model.safetensors", record.hf_hub_filename):
        # Weights that are at hand are loaded without asking the network.
        cached = (
            file and record.hf_hub_id and try_to_load_from_cache(record.hf_hub_id, file)
        )
        if isinstance(cached, str):
            overlay = {"file": cached, "custom_load": False}
            break
    more = {
        "num_classes": record.num_classes,
        "pretrained": True,
        "pretrained_cfg_overlay": overlay,
    }
    try:
        return create({**chosen, **more})
    # The hub, the network and load_state_dict each have errors of their own.
    except Exception as error:
        raise TrainingError(
            f"student.weights: timm's pretrained weights of {name!r} must be in reach "
            f"and fit student.args, got {reason_of(error)}; fetch them where there is "
            "a network and name the file (weights: /path/file), or correct args"
        ) from error


def _three(
    model: nn.Module, attribute: str, default: tuple[float, ...]
) -> tuple[float, ...]:
    given = getattr(model, attribute, None)
    if given is None:
        return default
    values = tuple(torch.as_tensor(given, dtype=torch.float64).flatten().tolist())
    if len(values) != 3 or (attribute == "std" and min(values) <= 0):
        raise TrainingError(
            f"a module's {attribute} must be three numbers for R, G, B in 0..1"
            f"{', each positive' if attribute == 'std' else ''}, got {list(values)}"
        )
    return values


def _pair(size: Any) -> Size:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
        raise TrainingError(
            "student.args.img_size must be a number of pixels or [height, width], got "
            f"{size!r}"
        )
    return pair[0], pair[1]


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draws random weights from ``seed``; torch's own generators are left as they were.

    Of the CPU's alone, where students are built: seeding all would reset CUDA's.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def _as_training_error() -> Iterator[None]:
    try:
        yield
    except ManifestError as error:
        raise TrainingError(str(error)) from error.__cause__
