"""Teachers from timm: any of its models that gives features.

Owns how a timm model is found, built at a size and tapped. Nothing is decided by a
model's name: sizes by trying on the meta device, outputs by what the model says of
itself (``feature_info``, ``forward_intermediates``, its norms, its class token).

Outputs, with ``features = model.forward_features(image)``:

* ``pooled``: ``forward_head(features, pre_logits=True)``; ``logits``: ``forward_head``.
* ``patch``: the last grid without prefix tokens (class, registers). ``post`` is after
  the final norm; where a model norms only what it has pooled (``fc_norm``, or the norm
  of a ConvNeXt head) that norm is applied to each cell, as DINOv3 does. ``pre`` is the
  last block's or stage's map.
* ``cls``: the class token, likewise; there is none where there is no class token.
* ``layer<k>``: block k (from 0) of a model whose blocks all have one grid.
* ``level<k>``: stage k (from 0) of a model with several, always ``pre``.

Shape suffixes: B batch, N tokens, H and W grid, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import timm
import timm.models
import torch
from timm.layers.classifier import NormMlpClassifierHead
from timm.models import PretrainedCfg
from torch import Tensor, nn

from manifests.suggestions import close_matches
from teachers.cost import building_on
from teachers.errors import TeacherError
from teachers.image_teacher import ImageTeacher, Pixels
from teachers.interface import (
    Size,
    TeacherRequest,
    WeightsRecord,
)
from teachers.torch_teacher import (
    Tap,
    channels_last,
    freeze,
    recording,
    seeded,
)
from teachers.weights import (
    explain_mismatch,
    find_on_hub,
    local_path,
    parse_wanted,
)

_RESERVED_ARGS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "img_size")
_BIN_NAME = "pytorch_model.bin"
_DEFAULT_STRIDE = 32


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
            f"model: timm:{config.architecture}.{tag}"
        )
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
        self._config = find_config(self._name)
        self._variants: dict[Size, dict[str, Any]] = {}
        probe = self._create_empty("meta", {})
        self._native: Size = native_size(self._config)
        self._pixels = Pixels(
            self._config.interpolation, self._config.mean, self._config.std
        )
        self._choose_sizes(self._native, stride_of(probe), patch_of(probe))
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
        variants: list[dict[str, Any]] = [{}]
        if size != self._native:
            variants.append({"img_size": size})
        failure: Exception | None = None
        for variant in variants:
            try:
                model: Any = freeze(self._create_empty(device, variant))
                with torch.inference_mode():
                    model.forward_features(torch.zeros(1, 3, *size, device=device))
                return variant
            # What a model raises at a size it does not take is not agreed upon; the
            # constructor's complaint of an unknown img_size is not the one to show.
            except Exception as error:
                failure = failure or error
        assert failure is not None
        raise failure

    def _create_empty(self, device: str, variant: dict[str, Any]) -> nn.Module:
        with building_on(device), seeded(0):
            return self._create(variant)

    def _create(self, variant: dict[str, Any], **more: Any) -> nn.Module:
        try:
            model: nn.Module = timm.create_model(
                self._name, **self.request.config.args, **variant, **more
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
        num_classes = self.request.config.args.get(
            "num_classes", self._config.num_classes
        )
        # With num_classes as the model has it, timm loads strictly and keeps the head.
        overlay: dict[str, Any] = {"num_classes": num_classes, "custom_load": False}
        if self._weights.kind == "random":
            with seeded(self._weights.seed):
                model = self._create({})
                if not variant:
                    return model
                # Sizes are levels of one teacher: drawn once, resized as a file is.
                state = model.state_dict()
                return self._load(variant, {**overlay, "state_dict": state}, "random")
        with local_path(self.request, self._weights) as path, seeded(0):
            return self._load(variant, {**overlay, "file": path}, self._weights.url)

    def _load(
        self, variant: dict[str, Any], overlay: dict[str, Any], name: str
    ) -> nn.Module:
        try:
            model = self._create(
                variant, pretrained=True, pretrained_cfg_overlay=overlay
            )
        except RuntimeError as error:
            raise explain_mismatch(error, name) from error
        for config in (model.pretrained_cfg, model.default_cfg):
            if isinstance(config, dict):
                config.pop("state_dict", None)
        return model


def native_size(config: PretrainedCfg) -> Size:
    """Returns the (height, width) that a model was made for."""
    return config.input_size[1], config.input_size[2]


def stride_of(model: nn.Module) -> int:
    """Returns the pixels of one cell of the model's coarsest grid."""
    info = getattr(model, "feature_info", None)
    strides = [item["reduction"] for item in info] if info else [_DEFAULT_STRIDE]
    return max(int(max(it) if isinstance(it, (tuple, list)) else it) for it in strides)


def patch_of(model: nn.Module) -> Size:
    """Returns the (height, width) in pixels that the model cuts its input into."""
    embed = getattr(model, "patch_embed", None)
    patch = getattr(embed, "patch_size", 1)
    # A model that pads its input, and one that has no patches, takes any size.
    if isinstance(patch, int) or getattr(embed, "dynamic_img_pad", False):
        return (1, 1)
    return patch[0], patch[1]


def layer_names(model: nn.Module) -> list[str]:
    """Returns the names of the model's layers, or of its levels where grids differ."""
    info = getattr(model, "feature_info", None)
    if not info or not hasattr(model, "forward_intermediates"):
        return []
    single = len({str(item["reduction"]) for item in info}) == 1
    return [f"{'layer' if single else 'level'}{k}" for k in range(len(info))]


def tap(
    model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None], where: str
) -> dict[str, Tap]:
    """Runs a timm model once and returns outputs of it.

    Args:
        model: in eval mode.
        image_BCHW: normalised.
        wanted: norm (``post``, ``pre`` or None for the default) by output name.
        where: the teacher's entry in the job, for messages.

    Returns:
        Vectors (B, C) and grids (B, H, W, C).

    Raises:
        TeacherError: the model has no such output; the message names those it has.
    """
    return tap_with_features(model, image_BCHW, wanted, where)[0]


def tap_with_features(
    model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None], where: str
) -> tuple[dict[str, Tap], Any]:
    """Returns what `tap` does, and what the model's ``forward_features`` returned."""
    layers = layer_names(model)
    call: Any = model
    if unknown := [
        name
        for name in wanted
        if name not in ("cls", "pooled", "patch", "logits", *layers)
    ]:
        shown = ", ".join([*layers[:1], "...", *layers[-1:]] if layers else [])
        raise TeacherError(
            f"{where}.outputs.{unknown[0]} is not in this model, which has cls (with a "
            f"class token), pooled, patch, logits (with a classifier), {shown}"
        )
    maps: dict[int, Tensor] = {}
    taken = ("norm",) if _real(getattr(model, "norm", None)) is not None else ()
    with recording(model, inputs=taken) as seen:
        if layers and any(name not in ("pooled", "logits", "cls") for name in wanted):
            indices = sorted(
                {len(layers) - 1}
                | {layers.index(name) for name in wanted if name in layers}
            )
            features, found = call.forward_intermediates(
                image_BCHW, indices=indices, stop_early=False, output_fmt="NCHW"
            )
            maps = {
                k: channels_last(item) for k, item in zip(indices, found, strict=True)
            }
        else:
            features = call.forward_features(image_BCHW)
        before_norm = seen("norm", True) if taken else []
    last = maps.get(len(layers) - 1)
    taps = {}
    for name, norm in wanted.items():
        entry = f"{where}.outputs.{name}"
        if name in ("pooled", "logits"):
            taps[name] = _tap_head(model, features, name, norm, entry)
        elif name == "cls":
            taps[name] = _tap_cls(model, features, before_norm, norm, entry)
        elif name == "patch":
            taps[name] = _tap_patch(model, features, last, norm, entry)
        else:
            taps[name] = _tap_layer(model, maps[layers.index(name)], name, norm, entry)
    return taps, features


def _real(module: Any) -> nn.Module | None:
    """Returns ``module`` if it is a norm, None for an Identity or nothing at all."""
    usable = isinstance(module, nn.Module) and not isinstance(
        module, (nn.Identity, nn.ModuleList)
    )
    return module if usable else None


def _norm_after_pooling(model: nn.Module, tokens: Tensor) -> tuple[Tensor, str]:
    """Applies to each token (..., C) the norm that a model keeps for what it pools."""
    if _real(getattr(model, "norm", None)) is not None:
        return tokens, ""
    if (norm := _real(getattr(model, "fc_norm", None))) is not None:
        return norm(tokens), ", fc_norm"
    head = getattr(model, "head", None)
    # Not ClNormMlpClassifierHead: SAM 2 has it with a norm that was never trained.
    norm = _real(head.norm) if isinstance(head, NormMlpClassifierHead) else None
    if norm is not None and tokens.ndim == 4:
        return channels_last(norm(tokens.permute(0, 3, 1, 2))), ", head.norm"
    return tokens, ""


def _tap_head(
    model: nn.Module, features: Any, name: str, norm: str | None, entry: str
) -> Tap:
    if norm is not None:
        raise TeacherError(f"{entry}.norm has no effect; leave it out")
    if name == "logits" and not getattr(model, "num_classes", 0):
        raise TeacherError(
            f"{entry}: this model has no classifier; `pooled` is what one would see"
        )
    head: Any = model.forward_head
    vector = head(features, pre_logits=name == "pooled")
    if not isinstance(vector, Tensor) or vector.ndim != 2:
        raise TeacherError(
            f"{entry}: this model does not pool to a vector; take `patch`"
        )
    source = "forward_head(pre_logits=True)" if name == "pooled" else "forward_head"
    return Tap(vector, None, source)


def _tap_cls(
    model: nn.Module,
    features: Any,
    before_norm: list[Tensor],
    norm: str | None,
    entry: str,
) -> Tap:
    has_token = getattr(model, "has_class_token", None)
    if has_token is None:
        has_token = getattr(model, "cls_token", None) is not None
    if not has_token or not isinstance(features, Tensor) or features.ndim != 3:
        raise TeacherError(
            f"{entry}: this model has no class token; `pooled` is its own summary"
        )
    if norm != "pre":
        token, also = _norm_after_pooling(model, features[:, 0])
        return Tap(token, "post", f"forward_features, token 0{also}")
    if _real(getattr(model, "norm", None)) is None:
        return Tap(features[:, 0], "pre", "forward_features, token 0")
    return Tap(before_norm[-1][:, 0], "pre", "input of norm, token 0")


def _tap_patch(
    model: nn.Module, features: Any, last: Tensor | None, norm: str | None, entry: str
) -> Tap:
    if norm == "pre" and last is not None:
        return Tap(last, "pre", "forward_intermediates, last")
    grid: Tensor | None = None
    if isinstance(features, Tensor) and features.ndim == 4:
        is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        grid = features if is_last else channels_last(features)
    elif isinstance(features, Tensor) and features.ndim == 3 and last is not None:
        num_prefix = features.shape[1] - last.shape[1] * last.shape[2]
        declared = getattr(model, "num_prefix_tokens", num_prefix)
        if num_prefix >= 0 and num_prefix == declared:
            rows, columns = last.shape[1:3]
            tokens_BNC = features[:, num_prefix:]
            grid = tokens_BNC.reshape(len(tokens_BNC), rows, columns, -1)
    if grid is None or norm == "pre":
        raise TeacherError(
            f"{entry}{'.norm: pre' if grid is not None else ''}: this model's final "
            "features have no such grid; take a layer or level of it"
        )
    grid, also = _norm_after_pooling(model, grid)
    return Tap(grid, "post", f"forward_features{also}")


def _tap_layer(
    model: nn.Module, grid: Tensor, name: str, norm: str | None, entry: str
) -> Tap:
    source = f"forward_intermediates, {name}"
    is_level = name.startswith("level")
    own = None if is_level else _real(getattr(model, "norm", None))
    own = own or (None if is_level else _real(getattr(model, "fc_norm", None)))
    if norm == "pre" or (norm is None and own is None):
        return Tap(grid, "pre", source)
    if own is None:
        raise TeacherError(
            f"{entry}.norm must be pre: this model has no norm for it; leave it out"
        )
    return Tap(own(grid), "post", f"{source}, final norm")


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
    hub = config.hf_hub_id
    return {
        "native_size": list(size),
        "stride": stride_of(model),
        "outputs": describe_outputs(model, size),
        "num_parameters": sum(item.numel() for item in model.parameters()),
        "preprocess": {
            "interpolation": config.interpolation,
            "mean": list(config.mean),
            "std": list(config.std),
        },
        "pretrained": hub is not None,
        "tags": _tags(config.architecture),
        "license": config.license,
        "source": config.origin_url
        or (f"https://huggingface.co/{hub}" if hub else None),
    }


def describe_outputs(model: nn.Module, size: Size) -> dict[str, list[int]]:
    """Returns the shape of a row by name of every output that a model on meta has."""
    shapes: dict[str, list[int]] = {}
    image = torch.zeros(1, 3, *size, device="meta")
    for name in ("cls", "pooled", "patch", "logits", *layer_names(model)):
        with contextlib.suppress(TeacherError), torch.inference_mode():
            found = tap(model, image, {name: None}, "model")[name]
            shapes[name] = list(found.tensor.shape[1:])
    return shapes
