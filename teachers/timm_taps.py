"""Where the outputs of a timm model lie: one forward pass, and what is taken of it.

Owns nothing of how a model is built. What a model has is read from what it says of
itself (``feature_info``, ``forward_intermediates``, its norms, its class token) and,
where that would mislead, from its class; the one thing that no model says, how many of
C-RADIO's prefix tokens are its summary, is a table.

With ``features = model.forward_features(image)``:

* ``pooled``: ``forward_head(features, pre_logits=True)``.
* ``logits``: ``forward_head(features)``. ``embed``: the same of a contrastive tower,
  whose head is its projection; SigLIP's is its attention pooling.
* ``patch``: the last grid without prefix tokens (class, registers), in raster order.
* ``cls``: the class token; C-RADIO's is its summary, several tokens behind one another.
  There is none where there is no class token.
* ``layer<k>``: block k (from 0) of a model whose blocks all have one grid.
* ``level<k>``: stage k (from 0) of a model with several, always ``pre``.

``post`` is after the model's final norm, wherever it keeps it: in ``forward_features``
(``norm``, SAM's ``neck``), or behind the pooling (``fc_norm``, the norm of a ConvNeXt's
or Hiera's head), where it is applied to each cell, as DINOv3 does. ``pre`` is before
it, and all there is of a model without one: C-RADIO, PE lang and spatial, SAM 2.

Shape suffixes: B batch, N tokens, H and W grid, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.imagenet_info import infer_imagenet_subset
from timm.layers.classifier import ClNormMlpClassifierHead, NormMlpClassifierHead
from timm.models import get_pretrained_cfg
from timm.models.convnext import ConvNeXt
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.interface import Size
from teachers.torch_teacher import Tap, channels_last, recording

_DEFAULT_STRIDE = 32
_NO_EMBEDDING = 2048
_PLAIN_NAMES = ("cls", "pooled", "embed", "patch", "logits")

_SUMMARY_TOKENS = {
    "base_patch16_radio_v3": 3,
    "large_patch16_radio_v3": 3,
    "huge_patch16_radio_v3": 3,
    "giant_patch16_radio_v3": 3,
    "so400m_patch16_radio_v4": 2,
    "huge_patch16_radio_v4": 2,
}
"""Class tokens of which C-RADIO's summary is made, the first so many prefix tokens.

One for each of its teachers with ``use_summary``; SAM, the last, has none. timm keeps
the first as class token and counts the others among the registers.

Source: NVlabs/RADIO, radio/radio_model.py and issue 80; the published summaries are
2304 wide for v3-B, 3072 for v3-L, and 2304 for v4-SO400M.
"""


@dataclass(frozen=True)
class FinalNorm:
    """A model's final norm.

    Attributes:
        path: of the module.
        module: the norm, or what ends in it (SAM's neck).
        is_inside: whether ``forward_features`` applies it.
        fits_layers: whether it can be applied to any layer.
        is_channels_first: whether it takes (B, C, H, W).
    """

    path: str
    module: nn.Module
    is_inside: bool = False
    fits_layers: bool = True
    is_channels_first: bool = False

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns ``tokens`` (..., C) or a grid (B, H, W, C), normed."""
        if self.is_channels_first:
            return channels_last(self.module(tokens.permute(0, 3, 1, 2)))
        normed: Tensor = self.module(tokens)
        return normed


@dataclass(frozen=True)
class _Run:
    """One forward pass.

    Attributes:
        features: what ``forward_features`` returned.
        maps: (B, H, W, C) by index of layer or level, those asked for and the last.
        last: the last of all of them, None where the model gives none.
        before_norm: (B, N, C) or a grid, what the final norm took.
    """

    features: Any
    maps: dict[int, Tensor]
    last: Tensor | None
    before_norm: list[Tensor]


def stride_of(model: nn.Module) -> int:
    """Returns the pixels of one cell of the model's coarsest grid."""
    info = getattr(model, "feature_info", None)
    strides = [item["reduction"] for item in info] if info else [_DEFAULT_STRIDE]
    return max(int(max(it) if isinstance(it, (tuple, list)) else it) for it in strides)


def patch_of(model: nn.Module) -> Size:
    """Returns the (height, width) in pixels of which an input must be a multiple."""
    if isinstance(model, Hiera):
        # It would take other sizes with as many tokens, and mix up their rows.
        rows, columns = zip(model.patch_stride, model.mask_unit_size, strict=True)
        return rows[0] * rows[1], columns[0] * columns[1]
    if isinstance(model, HieraDet):
        unit = int(model.window_spec[0] * model.patch_embed.proj.stride[0])
        return unit, unit
    if isinstance(model, ConvNeXt):
        # Its strided convolutions have no padding: a rest would not be looked at.
        return stride_of(model), stride_of(model)
    embed = getattr(model, "patch_embed", None) or getattr(model, "embeds", None)
    patch = getattr(embed, "patch_size", 1)
    # A model that pads its input, and one that has no patches, takes any size.
    if isinstance(patch, int) or getattr(embed, "dynamic_img_pad", False):
        return (1, 1)
    return patch[0], patch[1]


def num_prefix_tokens(model: nn.Module) -> int:
    """Returns how many tokens of the model are no cells: class token and registers."""
    return int(getattr(model, "num_prefix_tokens", 0) or 0)


def layer_names(model: nn.Module) -> list[str]:
    """Returns the names of the model's layers, or of its levels where grids differ."""
    info = getattr(model, "feature_info", None)
    if not info or not hasattr(model, "forward_intermediates"):
        return []
    single = len({str(item["reduction"]) for item in info}) == 1
    return [f"{'layer' if single else 'level'}{k}" for k in range(len(info))]


def find_final_norm(model: nn.Module) -> FinalNorm | None:
    """Returns where the model keeps its final norm, None where it has none."""
    if (norm := _real(getattr(model, "norm", None))) is not None:
        return FinalNorm("norm", norm, is_inside=True)
    if (norm := _real(getattr(model, "fc_norm", None))) is not None:
        return FinalNorm("fc_norm", norm)
    if isinstance(model, VisionTransformerSAM) and _real(model.neck) is not None:
        return FinalNorm("neck", model.neck, is_inside=True, fits_layers=False)
    head = getattr(model, "head", None)
    if isinstance(head, NormMlpClassifierHead) and _real(head.norm) is not None:
        return FinalNorm(
            "head.norm", head.norm, fits_layers=False, is_channels_first=True
        )
    # SAM 2 has such a head too, whose norm was never trained.
    if isinstance(model, HieraDet) and not model.num_classes:
        return None
    if isinstance(head, ClNormMlpClassifierHead) and _real(head.norm) is not None:
        return FinalNorm("head.norm", head.norm, fits_layers=False)
    return None


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
    for name in wanted:
        if name not in (*_PLAIN_NAMES, *layers):
            shown = ", ".join([*layers[:1], "...", *layers[-1:]] if layers else [])
            raise TeacherError(
                f"{where}.outputs.{name} is not in this model, which has cls (with a "
                f"class token), pooled, patch, logits or embed (with a head), {shown}"
            )
    run = _run(model, image_BCHW, wanted)
    taps = {
        name: _take(model, run, name, norm, f"{where}.outputs.{name}")
        for name, norm in wanted.items()
    }
    return taps, run.features


def describe_taps(model: nn.Module, size: Size) -> dict[str, Tap]:
    """Returns every output that a model on the meta device has, from one forward."""
    names = (*_PLAIN_NAMES, *layer_names(model))
    channels = getattr(model, "in_chans", 3)
    taps = {}
    with torch.inference_mode():
        image = torch.zeros(1, channels, *size, device="meta")
        run = _run(model, image, dict.fromkeys(names))
        for name in names:
            with contextlib.suppress(TeacherError):
                taps[name] = _take(model, run, name, None, name)
    return taps


def describe_outputs(model: nn.Module, size: Size) -> dict[str, list[int]]:
    """Returns the shape of a row by name of every output that a model on meta has."""
    taps = describe_taps(model, size)
    return {name: list(found.tensor.shape[1:]) for name, found in taps.items()}


def _run(
    model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None]
) -> _Run:
    layers = layer_names(model)
    call: Any = model
    norm = find_final_norm(model)
    watched = (norm.path,) if norm is not None and norm.is_inside else ()
    maps: dict[int, Tensor] = {}
    with recording(model, inputs=watched) as seen:
        if layers and any(name == "patch" or name in layers for name in wanted):
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
        before_norm = seen(watched[0], True) if watched else []
    return _Run(features, maps, maps.get(len(layers) - 1), before_norm)


def _take(model: nn.Module, run: _Run, name: str, norm: str | None, entry: str) -> Tap:
    if name in ("pooled", "embed", "logits"):
        return _take_head(model, run.features, name, norm, entry)
    if name == "cls":
        return _take_cls(model, run, norm, entry)
    if name == "patch":
        return _take_patch(model, run, norm, entry)
    index = layer_names(model).index(name)
    return _take_layer(model, run.maps[index], name, norm, entry)


def _real(module: Any) -> nn.Module | None:
    """Returns ``module`` if it is a norm, None for an Identity or nothing at all."""
    usable = isinstance(module, nn.Module) and not isinstance(
        module, (nn.Identity, nn.ModuleList)
    )
    return module if usable else None


def is_contrastive(model: nn.Module) -> bool:
    """Tells whether what the head gives is an embedding beside a text tower's.

    timm keeps a contrastive projection where others have their classifier, and says of
    neither which it is. Among its weights they are told apart by width (checked for
    all of them): no embedding is as wide as one of ImageNet's sets of classes, nor as
    wide as the classifiers for other sets. A head of another width than the weights'
    is a classifier of somebody's own. SigLIP ends in its attention pooling.
    """
    num_outputs = int(getattr(model, "num_classes", 0) or 0)
    if not num_outputs:
        return getattr(model, "attn_pool", None) is not None
    published = get_pretrained_cfg(_published_name(model), allow_unregistered=True)
    return (
        published is not None
        and published.num_classes == num_outputs < _NO_EMBEDDING
        and infer_imagenet_subset({"num_classes": num_outputs}) is None
    )


def _published_name(model: nn.Module) -> str:
    """Returns the name of the model and of its weights, as timm registers them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = config.get("architecture") or "", config.get("tag") or ""
    return f"{architecture}.{tag}" if tag else architecture


def _take_head(
    model: nn.Module, features: Any, name: str, norm: str | None, entry: str
) -> Tap:
    if norm is not None:
        raise TeacherError(f"{entry}.norm has no effect; leave it out")
    if name == "embed" and not is_contrastive(model):
        raise TeacherError(
            f"{entry}: this model has no contrastive projection; take `pooled`"
        )
    if name == "logits" and not getattr(model, "num_classes", 0):
        raise TeacherError(
            f"{entry}: this model has no classifier; `pooled` is what one would see"
        )
    if name == "logits" and is_contrastive(model):
        raise TeacherError(
            f"{entry}: this model's head is a contrastive projection; take `embed`"
        )
    head: Any = model.forward_head
    vector = head(features, pre_logits=name == "pooled")
    if not isinstance(vector, Tensor) or vector.ndim != 2:
        raise TeacherError(
            f"{entry}: this model does not pool to a vector; take `patch`"
        )
    source = "forward_head(pre_logits=True)" if name == "pooled" else "forward_head"
    return Tap(vector, None, source)


def _take_cls(model: nn.Module, run: _Run, norm: str | None, entry: str) -> Tap:
    has_token = getattr(model, "has_class_token", None)
    if has_token is None:
        has_token = getattr(model, "cls_token", None) is not None
    features = run.features
    if not has_token or not isinstance(features, Tensor) or features.ndim != 3:
        raise TeacherError(
            f"{entry}: this model has no class token; `pooled` is its own summary"
        )
    architecture = _published_name(model).partition(".")[0].partition("_")[2]
    if (num_tokens := _SUMMARY_TOKENS.get(architecture)) is not None:
        _refuse_post(model, norm, entry)
        summary = features[:, :num_tokens].flatten(1)
        return Tap(summary, "pre", f"forward_features, tokens 0 to {num_tokens - 1}")
    final = find_final_norm(model)
    if norm == "pre" and final is not None and final.is_inside:
        return Tap(run.before_norm[-1][:, 0], "pre", f"input of {final.path}, token 0")
    return _end(model, final, features[:, 0], norm, "forward_features, token 0", entry)


def _take_patch(model: nn.Module, run: _Run, norm: str | None, entry: str) -> Tap:
    if norm == "pre" and run.last is not None:
        return Tap(run.last, "pre", "forward_intermediates, last")
    grid = _grid_of(model, run)
    final = find_final_norm(model)
    is_normed = final is not None and final.is_inside
    if grid is None or (norm == "pre" and is_normed):
        raise TeacherError(
            f"{entry}{'.norm: pre' if grid is not None else ''}: this model's final "
            "features have no such grid; take a layer or level of it"
        )
    return _end(model, final, grid, norm, "forward_features", entry)


def _end(
    model: nn.Module,
    final: FinalNorm | None,
    found: Tensor,
    norm: str | None,
    source: str,
    entry: str,
) -> Tap:
    """Returns what the model's end gives, after the final norm unless ``pre``."""
    if final is not None and final.is_inside:
        return Tap(found, "post", source)
    if final is None or norm == "pre":
        _refuse_post(model, norm, entry)
        return Tap(found, "pre", source)
    return Tap(final(found), "post", f"{source}, {final.path}")


def _refuse_post(model: nn.Module, norm: str | None, entry: str) -> None:
    if norm == "post":
        raise TeacherError(
            f"{entry}.norm must be pre: {type(model).__name__} has no norm for it; "
            "leave it out"
        )


def _grid_of(model: nn.Module, run: _Run) -> Tensor | None:
    """Returns the final features as (B, H, W, C), None where they are no grid."""
    features, last = run.features, run.last
    if isinstance(model, Hiera):
        # Its tokens stay in the order of mask units where a stage does not pool.
        return last
    if not isinstance(features, Tensor):
        return None
    if features.ndim == 4:
        is_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        return features if is_last else channels_last(features)
    if features.ndim != 3 or last is None:
        return None
    num_prefix = features.shape[1] - last.shape[1] * last.shape[2]
    if num_prefix < 0 or num_prefix != getattr(model, "num_prefix_tokens", num_prefix):
        return None
    tokens_BNC = features[:, num_prefix:]
    return tokens_BNC.reshape(len(tokens_BNC), *last.shape[1:3], -1)


def _take_layer(
    model: nn.Module, grid: Tensor, name: str, norm: str | None, entry: str
) -> Tap:
    source = f"forward_intermediates, {name}"
    final = find_final_norm(model)
    fits = final is not None and final.fits_layers and name.startswith("layer")
    if norm == "pre" or final is None or not fits:
        _refuse_post(model, norm, entry)
        return Tap(grid, "pre", source)
    return Tap(final(grid), "post", f"{source}, {final.path}")
