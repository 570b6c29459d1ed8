"""Teachers from open_clip: the image towers of contrastive models.

Owns how a tower is found, built without the text tower and tapped. ``weights:`` is one
of the model's tags, a file of the whole model or of its tower, or random.

Outputs: ``embed`` (after the projection, not normalised) and ``pooled`` (before it);
and where the tower has them ``cls``, ``patch`` and ``layer<k>`` (block k, from 0),
``post`` (after the tower's final norm, the default) or ``pre``.

Shape suffixes: B batch, N tokens, H and W grid, C channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import open_clip
import timm
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import _build_vision_tower, resize_pos_embed
from open_clip.modified_resnet import ModifiedResNet
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from manifests.suggestions import close_matches
from teachers.cost import building_on
from teachers.errors import TeacherError
from teachers.image_teacher import ImageTeacher, Pixels
from teachers.interface import Size, TeacherRequest, WeightsRecord
from teachers.timm_family import layer_names as timm_layer_names
from teachers.timm_family import patch_of as timm_patch_of
from teachers.timm_family import stride_of as timm_stride_of
from teachers.timm_family import tap_with_features as tap_timm
from teachers.torch_teacher import (
    Tap,
    channels_last,
    freeze,
    recording,
    seeded,
)
from teachers.weights import (
    find_on_hub,
    load_strict,
    local_path,
    parse_wanted,
    read_state_dict,
)

_TOWER = "visual."
_RESNET_STRIDE = 32


def find_model(name: str) -> dict[str, Any]:
    """Returns open_clip's configuration of a model.

    Raises:
        TeacherError: it has no such model.
    """
    known = open_clip.list_models()
    if name not in known:
        raise TeacherError(
            f"model must be one of open_clip {open_clip.__version__}'s {len(known)} "
            f"models, got {name!r}"
            f"{close_matches(name, known) or '; see open_clip.list_models()'}"
        )
    config: dict[str, Any] = open_clip.get_model_config(name)
    return config


def find_weights(request: TeacherRequest) -> WeightsRecord:
    """Returns the record of a tag's weights, from the hub's cache or the network.

    Raises:
        TeacherError: the model has no such tag, or its weights are not in reach.
    """
    name = request.config.model_name
    find_model(name)
    config = _tag_config(request)
    if config is None:
        raise TeacherError(
            f"teachers.{request.name}.weights must be given: "
            f"{_tags_shown(name)}, a path, a URL or `random`"
        )
    repo, _, filename = config["hf_hub"].rpartition("/")
    if not repo:
        raise TeacherError(
            f"teachers.{request.name}.weights {request.config.weights!r} is not on the "
            f"hub; fetch {config['url'] or 'it'} and name the file"
        )
    filenames = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    if filename:
        stem = filename.rpartition(".")[0]
        filenames = list(dict.fromkeys([f"{stem}.safetensors", filename]))
    return find_on_hub(request, repo, filenames)


def _tag_config(request: TeacherRequest) -> dict[str, Any] | None:
    """Returns open_clip's record of the tag that the job names, None without one."""
    tag = parse_wanted(request).tag
    if tag is None:
        return None
    name = request.config.model_name
    config: dict[str, Any] = get_pretrained_cfg(name, tag)
    if not config:
        tags = list_pretrained_tags_by_model(name)
        raise TeacherError(
            f"teachers.{request.name}.weights must be {_tags_shown(name)}, a path, a "
            f"URL or `random`, got {tag!r}{close_matches(tag, tags)}"
        )
    return config


def _tags_shown(name: str) -> str:
    tags = list_pretrained_tags_by_model(name)
    return f"a tag of {name} ({', '.join(tags)})" if tags else f"({name} has no tags)"


def open_teacher(
    request: TeacherRequest, weights: WeightsRecord, device: str
) -> OpenClipTeacher:
    """Returns an image tower as a teacher; see `teachers.registry.open_teacher`."""
    return OpenClipTeacher(request, weights, device)


class OpenClipTeacher(ImageTeacher):
    """The image tower of a contrastive model, looking at one image."""

    def __init__(
        self, request: TeacherRequest, weights: WeightsRecord, device: str
    ) -> None:
        super().__init__(request, device)
        self._weights = weights
        self._name = request.config.model_name
        self._config = find_model(self._name)
        tag = _tag_config(request)
        self._quick_gelu = bool(
            self._config.get("quick_gelu", False)
            or (tag or {}).get("quick_gelu", False)
        )
        preprocess = self._find_preprocess(tag)
        self._native = native_size(self._config)
        probe = self._tower(self._native, "meta")
        self._pixels = Pixels(preprocess.interpolation, preprocess.mean, preprocess.std)
        own_fit = "squash" if preprocess.resize_mode == "squash" else "tokens"
        self._choose_sizes(self._native, stride_of(probe), patch_of(probe), own_fit)
        repo = (tag or {}).get("hf_hub", "").rpartition("/")[0]
        self.facts = self._make_facts(
            probe,
            source=f"https://huggingface.co/{repo}" if repo else None,
            versions={"open_clip": open_clip.__version__, "timm": timm.__version__},
        )

    def _find_preprocess(self, tag: dict[str, Any] | None) -> PreprocessCfg:
        """Returns the tag's preprocessing; without one, what all tags agree on."""
        if tag is not None:
            return preprocess_of(tag)
        tags = list_pretrained_tags_by_model(self._name)
        found = [preprocess_of(get_pretrained_cfg(self._name, item)) for item in tags]
        given = self.request.config.preprocess
        kinds = {(item.mean, item.std) for item in found}
        is_given = given.mean is not None and given.std is not None
        if len(kinds) > 1 and not is_given and self._weights.kind == "file":
            raise TeacherError(
                f"{self.where}.preprocess must give mean and std: the tags of "
                f"{self._name} differ in them and the file does not say"
            )
        return found[0] if found else PreprocessCfg()

    def _tap(
        self, model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None]
    ) -> dict[str, Tap]:
        return tap(model, image_BCHW, wanted, self.where)

    def _blueprint(self, size: Size | None, device: str) -> nn.Module:
        assert size is not None, "an image has a size"
        return split_projection(self._tower(size, device))

    def _tower(self, size: Size, device: str) -> nn.Module:
        with building_on(device), seeded(self._weights.seed):
            return build_tower(
                self._config, size, native_size(self._config), self._quick_gelu
            )

    def _build(self, size: Size | None) -> nn.Module:
        assert size is not None, "an image has a size"
        self.outputs(size)
        tower = self._tower(self._native, "cpu")
        if self._weights.kind != "random":
            with local_path(self.request, self._weights) as path:
                state = read_state_dict(path, self._weights.url)
            load_strict(tower, tower_state(tower, state), self._weights.url)
        if size == self._native:
            return split_projection(tower)
        if isinstance(tower, TimmModel):
            tower.set_input_size(size)
            return freeze(tower)
        resized = self._tower(size, "cpu")
        load_strict(resized, tower_state(resized, tower.state_dict()), self._name)
        return split_projection(resized)


def preprocess_of(tag: Mapping[str, Any]) -> PreprocessCfg:
    """Returns the preprocessing that open_clip records with pretrained weights."""
    fields = ("mean", "std", "interpolation", "resize_mode")
    return PreprocessCfg(**{name: tag[name] for name in fields if tag.get(name)})


def native_size(config: Mapping[str, Any]) -> Size:
    """Returns the (height, width) that a tower was made for."""
    size = config["vision_cfg"].get("image_size", 224)
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def build_tower(
    config: Mapping[str, Any], size: Size, native: Size, quick_gelu: bool
) -> nn.Module:
    """Returns the image tower alone, with random weights, on the current device.

    open_clip builds it as part of a model with its text tower; its own function for the
    tower is private, but needs neither the memory nor, for some models, the download.

    Args:
        config: of the model.
        size: (height, width) of its input.
        native: the size it was made for.
        quick_gelu: whether its activation is the approximation that OpenAI used.

    Raises:
        TeacherError: the tower cannot run at ``size``.
    """
    vision = {**config["vision_cfg"], "timm_model_pretrained": False}
    vision["image_size"] = list(native if "timm_model_name" in vision else size)
    if isinstance(vision.get("layers"), list):
        if size != native:
            raise TeacherError(
                f"sizes of this tower must be its own [{native[0]}, {native[1]}], got "
                f"[{size[0]}, {size[1]}]: its attention pooling has no other; use "
                "`preprocess: {fit: squash}`"
            )
        vision["image_size"] = native[0]
    tower: nn.Module = _build_vision_tower(config["embed_dim"], vision, quick_gelu)
    if isinstance(tower, TimmModel) and size != native:
        tower.set_input_size(size)
    if isinstance(tower, VisionTransformer):
        tower.output_tokens = False
    return tower


def split_projection(tower: nn.Module) -> nn.Module:
    """Lets a transformer stop before its projection, kept as ``projection``."""
    if isinstance(tower, VisionTransformer):
        projection, tower.proj = tower.proj, None
        tower.register_parameter("projection", projection)
    return tower


def tower_state(tower: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tower's part of a state dict, its position embedding resized."""
    state = convert_state_dict(SimpleNamespace(visual=tower), state)
    if any(key.startswith(_TOWER) for key in state):
        state = {key: item for key, item in state.items() if key.startswith(_TOWER)}
    else:
        state = {f"{_TOWER}{key}": item for key, item in state.items()}
    resize_pos_embed(state, SimpleNamespace(visual=tower))
    return {key[len(_TOWER) :]: item for key, item in state.items()}


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


def describe(name: str, base: str) -> dict[str, Any]:
    """Returns outputs and their shapes, sizes, parameters and tags.

    Raises:
        TeacherError: open_clip has no such model.
    """
    del base
    config = find_model(name)
    size = native_size(config)
    with building_on("meta"):
        built = build_tower(config, size, size, bool(config.get("quick_gelu", False)))
        tower = freeze(split_projection(built))
    image = torch.zeros(1, 3, *size, device="meta")
    shapes: dict[str, list[int]] = {}
    for output in ("embed", "pooled", "cls", "patch", *layer_names(tower)):
        with contextlib.suppress(TeacherError), torch.inference_mode():
            found = tap(tower, image, {output: None}, "model")[output]
            shapes[output] = list(found.tensor.shape[1:])
    return {
        "native_size": list(size),
        "stride": stride_of(tower),
        "outputs": shapes,
        "num_parameters": sum(item.numel() for item in tower.parameters()),
        "tags": list_pretrained_tags_by_model(name),
    }
