"""Teachers from timm: any of its models that gives features.

Owns how a timm model is found and built at a size, and how its weights are loaded;
`teachers.timm_taps` owns its outputs. Nothing is decided by a model's name: sizes are
found by trying on the meta device.

A file is read in whichever layout timm knows: its own, and the authors' of DINOv2,
DINOv3, EUPE, CLIP, SigLIP, EVA, PE, SAM, MAE, C-RADIO and others. Of other layouts
``keys:`` of the job makes one of these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import timm.models
import torch
from timm.data import resolve_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn

from manifests.suggestions import close_matches
from teachers.cost import building_on
from teachers.errors import TeacherError
from teachers.image_teacher import ImageTeacher, Pixels
from teachers.inputs.image import ImageSpec
from teachers.inputs.own_transform import TIMM, tell_transform
from teachers.interface import (
    Size,
    TeacherRequest,
    WeightsRecord,
)
from teachers.key_maps import map_keys
from teachers.timm_taps import (
    describe_taps,
    find_final_norm,
    num_prefix_tokens,
    patch_of,
    stride_of,
    tap,
)
from teachers.timm_weights import (
    check_no_biases,
    dinov3_biases,
    has_attention_biases,
    recording_missing,
)
from teachers.torch_teacher import Tap, freeze, seeded
from teachers.weights import (
    explain_mismatch,
    find_on_hub,
    local_path,
    parse_wanted,
    read_state_dict,
)

_RESERVED_ARGS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "img_size")
_BIN_NAME = "pytorch_model.bin"


def find_config(model: str) -> PretrainedCfg:
    """Returns timm's own record of a model: input, normalisation, weights, licence.

    Args:
        model: architecture, with the tag of its weights or without.

    Raises:
        TeacherError: timm has no such architecture or tag.
    """
    architecture, tag = timm.models.split_model_name_tag(model)
    if ":" in model or "/" in model or not timm.models.is_model(architecture):
        known = timm.list_models()
        if ":" in model or "/" in model:
            close = "; name an architecture and give `weights: hf://ORG/NAME/FILE`"
        else:
            close = close_matches(architecture, known)
        raise TeacherError(
            f"model must be one of timm {timm.__version__}'s {len(known)} "
            f"architectures, got {model!r}{close or '; see timm.list_models()'}"
        )
    tags = _tags(architecture)
    if tag and tag not in tags:
        raise TeacherError(
            f"model must have a tag that timm knows, got {model!r} (known: "
            f"{', '.join(tags) or 'none'}){close_matches(tag, tags)}"
        )
    return timm.models.get_pretrained_cfg(model) or PretrainedCfg(
        architecture=architecture
    )


def _tags(architecture: str | None) -> list[str]:
    names = timm.models.get_arch_pretrained_cfgs(architecture or "")
    return [tag for name in names if (tag := name.partition(".")[2])]


def check_activation(config: PretrainedCfg, where: str) -> None:
    """Checks that a model has the activation that its weights were trained with.

    timm loads OpenAI's, MetaCLIP's and DFN's weights into GELU models too, and says in
    a note that QuickGELU gives the original's results.

    Raises:
        TeacherError: it has not; with the name of the one that has.
    """
    architecture = config.architecture or ""
    twin = architecture.replace("_clip_", "_clip_quickgelu_")
    is_noted = any("QuickGELU" in note for note in config.notes or ())
    if is_noted and "quickgelu" not in architecture and timm.models.is_model(twin):
        raise TeacherError(
            f"{where}.model must have the activation of its weights, QuickGELU, got "
            f"{architecture}.{config.tag}; write model: timm:{twin}.{config.tag}"
        )


def find_weights(request: TeacherRequest) -> WeightsRecord:
    """Returns the record of timm's own weights, from the hub's cache or the network.

    Raises:
        TeacherError: the model has none, or they are not in reach.
    """
    config = find_config(request.config.model_name)
    if tag := parse_wanted(request).tag:
        raise TeacherError(
            f"teachers.{request.name}.weights must be a path, a URL or `random`, got "
            f"{tag!r}; a tag is part of timm's name: "
            f"model: {request.config.family}:{config.architecture}.{tag}"
        )
    check_activation(config, f"teachers.{request.name}")
    num_classes = request.config.args.get("num_classes", config.num_classes)
    if num_classes != config.num_classes:
        raise TeacherError(
            f"teachers.{request.name}.args.num_classes must be left out with "
            f"pretrained weights, which have {config.num_classes}, got {num_classes}"
        )
    if not config.hf_hub_id:
        tags = _tags(config.architecture)
        raise TeacherError(
            f"teachers.{request.name}.model {request.config.model!r} has no pretrained "
            f"weights on the hub (tags: {', '.join(tags) or 'none'}); give "
            "`weights:` a file, or `weights: random`"
        )
    filename = config.hf_hub_filename or _BIN_NAME
    safe = {_BIN_NAME: "model.safetensors"}.get(filename)
    return find_on_hub(
        request, config.hf_hub_id, [safe, filename] if safe else [filename]
    )


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> TimmTeacher:
    """Returns a timm model as a teacher; see `teachers.registry.open_teacher`."""
    return TimmTeacher(request, weights, device)


class TimmTeacher(ImageTeacher):
    """A timm model that looks at one image."""

    def __init__(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> None:
        super().__init__(request, device)
        if reserved := [name for name in _RESERVED_ARGS if name in request.config.args]:
            raise TeacherError(
                f"{self.where}.args.{reserved[0]} is set by `weights` and `sizes`; "
                "leave it out"
            )
        self._name = request.config.model_name
        self._weights = weights
        self._config = self._find_config()
        if weights.kind != "random":
            check_activation(self._config, self.where)
        self._variants: dict[Size, dict[str, Any]] = {}
        probe = self._create_empty("meta", {})
        self._native: Size = native_size(self._config)
        self._pixels = Pixels(
            self._config.interpolation, self._config.mean, self._config.std
        )
        patch = patch_of(probe)
        # SigLIP's 384 is no multiple of its 14: what it drops there is not given to it.
        whole = (
            self._native[0] // patch[0] * patch[0],
            self._native[1] // patch[1] * patch[1],
        )
        self._choose_sizes(whole, stride_of(probe), patch)
        hub = self._config.hf_hub_id
        self.facts = self._make_facts(
            probe,
            license=self._config.license,
            source=self._config.origin_url
            or (f"https://huggingface.co/{hub}" if hub else None),
            versions={"timm": timm.__version__},
        )

    def _tap(
        self, model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None]
    ) -> dict[str, Tap]:
        return tap(model, image_BCHW, wanted, self.where)

    def _own_transform(self, spec: ImageSpec) -> str:
        given = {
            "input_size": (3, spec.height, spec.width),
            "interpolation": spec.interpolation,
            "mean": spec.mean,
            "std": spec.std,
        }
        own = self._config.to_dict()
        return tell_transform(TIMM, resolve_data_config(given, pretrained_cfg=own))

    def _blueprint(self, size: Size | None, device: str) -> nn.Module:
        assert size is not None, "an image has a size"
        if size not in self._variants:
            self._variants[size] = self._find_variant(size, device)
        return self._create_empty(device, self._variants[size])

    def _find_variant(self, size: Size, device: str) -> dict[str, Any]:
        """Returns the constructor arguments with which the model runs at ``size``.

        Some models take any size as they are; others need ``img_size``, which the
        former may not accept. Neither says so, hence the trial.
        """
        failure: Exception | None = None
        for variant in self._variants_to_try(size):
            try:
                model: Any = freeze(self._create_empty(device, variant))
                image = self.inputs(size)[self._input.name].blank(device)
                with torch.inference_mode():
                    model.forward_features(image)
                if variant and device == "meta":
                    self._check_resizing(size, variant)
                return variant
            except TeacherError:
                raise
            # What a model raises at a size it does not take is not agreed upon; the
            # constructor's complaint of an unknown img_size is not the one to show.
            except Exception as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _variants_to_try(self, size: Size) -> list[dict[str, Any]]:
        """Returns constructor arguments that may make the model run at ``size``."""
        return [{}] if size == self._native else [{}, {"img_size": size}]

    def _find_config(self) -> PretrainedCfg:
        """Returns the record of the model: timm's own."""
        return find_config(self._name)

    def _check_resizing(self, size: Size, variant: dict[str, Any]) -> None:
        """Checks now what loading would find out: that weights of one size fit another.

        Raises:
            TeacherError: timm does not resize what the model has per position.
        """
        with building_on("meta"), seeded(0):
            overlay = {**self._overlay, **self._source_of(self._create({}))}
            try:
                self._create(variant, pretrained=True, pretrained_cfg_overlay=overlay)
            except RuntimeError as error:
                names = re.findall(r"size mismatch for ([^:]+):", str(error))
                if names:
                    raise TeacherError(
                        f"{self.where}.sizes must be the model's own "
                        f"{list(self._native)}, got {list(size)}: timm does not resize "
                        f"{names[0]} of {self._name}; leave sizes out and use "
                        "`preprocess: {fit: squash}` or `pad`"
                    ) from error
            # Not every loader can run without data; then loading itself will tell.
            except Exception:
                return

    @property
    def _overlay(self) -> dict[str, Any]:
        # With num_classes as the model has it, timm loads strictly and keeps the head.
        classes = self.request.config.args.get("num_classes", self._config.num_classes)
        return {"num_classes": classes, "custom_load": False}

    @property
    def _arguments(self) -> dict[str, Any]:
        """Arguments of the model's constructor, whatever its size and weights."""
        return self.request.config.args

    def _create_empty(self, device: str, variant: dict[str, Any]) -> nn.Module:
        with building_on(device), seeded(0):
            return self._create(variant)

    def _create(self, variant: dict[str, Any], **more: Any) -> nn.Module:
        try:
            model: nn.Module = timm.create_model(
                self._name, **{**self._arguments, **variant}, **more
            )
        except TypeError as error:
            if not self.request.config.args:
                raise
            raise TeacherError(
                f"{self.where}.args must be arguments of {self._name!r}, got "
                f"{self.request.config.args} ({error})"
            ) from error
        return model

    def _build(self, size: Size | None) -> nn.Module:
        assert size is not None, "an image has a size"
        self.outputs(size)
        variant = self._variants[size]
        if self._weights.kind == "random":
            with seeded(self._weights.seed):
                model = self._create({})
                if not variant:
                    return model
                # Sizes are levels of one teacher: drawn once, resized as a file is.
                return self._load(variant, self._source_of(model), "random")
        with local_path(self.request, self._weights) as path, seeded(0):
            source: dict[str, Any] = {"file": path}
            if keys := self.request.config.keys:
                state = read_state_dict(path, self._weights.url)
                source = {"state_dict": map_keys(state, keys, self.where)}
            model = self._load(variant, source, self._weights.url)
            if not has_attention_biases(model):
                biases = source.get("state_dict") or dinov3_biases(path)
                check_no_biases(biases, self._name, self._weights.url)
            return model

    def _source_of(self, model: nn.Module) -> dict[str, Any]:
        """Returns a model's own weights as timm takes those of a file."""
        return {"state_dict": model.state_dict()}

    def _load(
        self, variant: dict[str, Any], source: dict[str, Any], name: str
    ) -> nn.Module:
        try:
            with recording_missing() as missing:
                model = self._create(
                    variant,
                    pretrained=True,
                    pretrained_cfg_overlay={**self._overlay, **source},
                )
        except RuntimeError as error:
            raise explain_mismatch(error, name) from error
        # timm knows which of its own weights lack a norm; of a file nobody does.
        if missing and self._weights.kind == "file":
            raise TeacherError(
                f"weights must have exactly the model's parameters, got {len(missing)} "
                f"missing ({', '.join(missing[:5])}) ({name}); are they of this model?"
            )
        for config in (model.pretrained_cfg, model.default_cfg):
            if isinstance(config, dict):
                config.pop("state_dict", None)
        return model


def native_size(config: PretrainedCfg) -> Size:
    """Returns the (height, width) that a model was made for."""
    return config.input_size[1], config.input_size[2]


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns outputs and their shapes, sizes, parameters, licence and source.

    Raises:
        TeacherError: timm has no such model.
    """
    del base
    config = find_config(name)
    with building_on("meta"):
        model = freeze(timm.create_model(name))
    size = native_size(config)
    taps = describe_taps(model, size)
    patch = taps.get("patch")
    final = find_final_norm(model)
    hub = config.hf_hub_id
    return {
        "native_size": list(size),
        "stride": stride_of(model),
        "multiple_of": list(patch_of(model)),
        "grid": list(patch.tensor.shape[1:3]) if patch is not None else None,
        "prefix_tokens": num_prefix_tokens(model),
        "final_norm": final.path if final is not None else None,
        "outputs": {key: list(one.tensor.shape[1:]) for key, one in taps.items()},
        "norms": {
            re.sub(r"\d+$", "<k>", key): one.norm
            for key, one in taps.items()
            if one.norm is not None
        },
        "num_parameters": sum(item.numel() for item in model.parameters()),
        "preprocess": {
            "interpolation": config.interpolation,
            "mean": list(config.mean),
            "std": list(config.std),
        },
        "pretrained": hub is not None,
        "tags": _tags(config.architecture),
        "notes": list(config.notes or ()),
        "license": config.license,
        "source": config.origin_url
        or (f"https://huggingface.co/{hub}" if hub else None),
    }
