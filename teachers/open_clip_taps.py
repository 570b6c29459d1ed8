"""Where the outputs of open_clip's image towers lie: one forward, what is taken of it.

Owns nothing of how a tower is built. ``embed`` is after the projection, not normalised;
``pooled`` before it; ``cls``, ``patch`` and ``layer<k>`` (block k, from 0) where the
tower has them, ``post`` (after the tower's final norm, the default) or ``pre``.

Shape suffixes: B batch, N tokens, H and W grid, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from teachers.errors import TeacherError
from teachers.interface import Size
from teachers.timm_taps import layer_names as timm_layer_names
from teachers.timm_taps import patch_of as timm_patch_of
from teachers.timm_taps import stride_of as timm_stride_of
from teachers.timm_taps import tap_with_features as tap_timm
from teachers.torch_teacher import Tap, channels_last, recording

_RESNET_STRIDE = 32


def split_projection(tower: nn.Module) -> nn.Module:
    """Lets a transformer stop before its projection, kept as ``projection``."""
    if isinstance(tower, VisionTransformer):
        projection, tower.proj = tower.proj, None
        tower.register_parameter("projection", projection)
    return tower


def stride_of(tower: nn.Module) -> int:
    """Returns the pixels of one cell of the tower's grid."""
    if isinstance(tower, VisionTransformer):
        return int(max(tower.patch_size))
    return (
        timm_stride_of(tower.trunk) if isinstance(tower, TimmModel) else _RESNET_STRIDE
    )


def patch_of(tower: nn.Module) -> Size:
    """Returns the (height, width) in pixels that the tower cuts its input into."""
    if isinstance(tower, VisionTransformer):
        return tower.patch_size[0], tower.patch_size[1]
    return timm_patch_of(tower.trunk) if isinstance(tower, TimmModel) else (1, 1)


def layer_names(tower: nn.Module) -> list[str]:
    """Returns the names of the tower's layers."""
    if isinstance(tower, VisionTransformer):
        return [f"layer{k}" for k in range(len(tower.transformer.resblocks))]
    if isinstance(tower, TimmModel):
        return [name for name in timm_layer_names(tower.trunk) if "layer" in name]
    return []


def tap(
    tower: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None], where: str
) -> dict[str, Tap]:
    """Runs a tower once and returns outputs of it.

    Args:
        tower: in eval mode, after `split_projection`.
        image_BCHW: normalised.
        wanted: norm (``post``, ``pre`` or None for the default) by output name.
        where: the teacher's entry in the job, for messages.

    Returns:
        Vectors (B, C) and grids (B, H, W, C).

    Raises:
        TeacherError: the tower has no such output.
    """
    if "logits" in wanted:
        raise TeacherError(
            f"{where}.outputs.logits needs `classifier: FILE`, which `teachonce "
            "teachers MODEL --weights TAG --classes FILE --to FILE` makes"
        )
    for name in ("embed", "pooled"):
        if wanted.get(name) is not None:
            raise TeacherError(
                f"{where}.outputs.{name}.norm has no effect; leave it out"
            )
    if isinstance(tower, VisionTransformer):
        return _tap_transformer(tower, image_BCHW, wanted, where)
    if isinstance(tower, TimmModel):
        return _tap_trunk(tower, image_BCHW, wanted, where)
    if isinstance(tower, ModifiedResNet):
        return _tap_resnet(tower, image_BCHW, wanted, where)
    raise TeacherError(
        f"{where}.model has a {type(tower).__name__}, which is not known"
    )


def _refuse(where: str, name: str, has: list[str]) -> TeacherError:
    shown = has if len(has) < 8 else [*has[:4], "...", has[-1]]
    return TeacherError(
        f"{where}.outputs.{name} is not in this tower, which has {', '.join(shown)}"
    )


def _tap_transformer(
    tower: VisionTransformer,
    image_BCHW: Tensor,
    wanted: Mapping[str, str | None],
    where: str,
) -> dict[str, Tap]:
    layers = layer_names(tower)
    paths = {
        name: f"transformer.resblocks.{layers.index(name)}"
        for name in wanted
        if name in layers
    }
    with recording(tower, outputs=["transformer", *paths.values()]) as seen:
        pooled = tower(image_BCHW)
    projection = tower.projection
    num_rows = image_BCHW.shape[2] // tower.patch_size[0]
    num_columns = image_BCHW.shape[3] // tower.patch_size[1]
    taps = {}
    for name, norm in wanted.items():
        if name == "pooled":
            taps[name] = Tap(pooled, None, "before proj")
            continue
        if name == "embed":
            embed = pooled if projection is None else pooled @ projection
            taps[name] = Tap(embed, None, "after proj")
            continue
        if name not in ("cls", "patch", *layers):
            raise _refuse(where, name, ["embed", "pooled", "cls", "patch", *layers])
        tokens_BNC = seen(paths.get(name, "transformer"), False)[-1]
        if name in layers and not tower.transformer.batch_first:
            tokens_BNC = tokens_BNC.transpose(0, 1)
        # CoCa's norm follows its attention pooling and is not one of tokens.
        if tower.attn_pool is not None:
            if norm == "post":
                raise TeacherError(f"{where}.outputs.{name}.norm must be pre: CoCa")
            norm = "pre"
        if name == "cls":
            found = tokens_BNC[:, 0]
        else:
            found = tokens_BNC[:, 1:].reshape(
                len(image_BCHW), num_rows, num_columns, -1
            )
        norm = norm or "post"
        source = name if name in layers else "transformer"
        taps[name] = Tap(
            tower.ln_post(found) if norm == "post" else found,
            norm,
            f"{source}, ln_post" if norm == "post" else source,
        )
    return taps


def _tap_trunk(
    tower: TimmModel,
    image_BCHW: Tensor,
    wanted: Mapping[str, str | None],
    where: str,
) -> dict[str, Tap]:
    """The trunk is a timm model; its classifier or a head after it projects."""
    names = {name: norm for name, norm in wanted.items() if name != "embed"}
    taps, features = tap_timm(tower.trunk, image_BCHW, names, where)
    if "embed" in wanted:
        embed = tower.head(tower.trunk.forward_head(features))
        taps["embed"] = Tap(embed, None, "after the projection")
    return taps


def _tap_resnet(
    tower: ModifiedResNet,
    image_BCHW: Tensor,
    wanted: Mapping[str, str | None],
    where: str,
) -> dict[str, Tap]:
    with recording(tower, outputs=["layer4"]) as seen:
        embed = tower(image_BCHW)
    found = {
        "embed": Tap(embed, None, "attnpool"),
        "patch": Tap(channels_last(seen("layer4", False)[-1]), None, "layer4"),
    }
    for name, norm in wanted.items():
        if name not in found:
            raise _refuse(where, name, list(found))
        if norm is not None:
            raise TeacherError(
                f"{where}.outputs.{name}.norm has no effect; leave it out"
            )
    return {name: found[name] for name in wanted}
