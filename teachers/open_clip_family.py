"""Teachers from open_clip: the image towers of contrastive models.

Owns how a tower is found and built without the text tower; `teachers.open_clip_taps`
has its outputs. ``weights:`` is one of the model's tags, a file of the whole model or
of its tower, or random.
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
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from manifests.suggestions import close_matches
from teachers.cost import building_on
from teachers.errors import TeacherError
from teachers.image_teacher import ImageTeacher, Pixels
from teachers.inputs.image import ImageSpec
from teachers.inputs.own_transform import OPEN_CLIP, tell_transform
from teachers.interface import Size, TeacherRequest, WeightsRecord
from teachers.open_clip_taps import (
    layer_names,
    patch_of,
    split_projection,
    stride_of,
    tap,
)
from teachers.torch_teacher import Tap, freeze, seeded
from teachers.weights import (
    find_on_hub,
    load_strict,
    local_path,
    map_keys,
    parse_wanted,
    read_state_dict,
)

_TOWER = "visual."


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
    config = tag_config(request)
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
    return find_on_hub(request, repo, filenames, _staging_note(name, config))


def _staging_note(name: str, tag: Mapping[str, Any]) -> str:
    """Returns what a job must say beside a file, which does not say its tag."""
    config = find_model(name)
    notes = []
    if has_quick_gelu(config, tag) != has_quick_gelu(config, None):
        notes.append(f"model: open_clip:{name}-quickgelu")
    own, first = preprocess_of(tag), _preprocesses(name)[0]
    if (own.mean, own.std) != (first.mean, first.std) or not _agree_on_colour(name):
        notes.append(f"preprocess: {{mean: {list(own.mean)}, std: {list(own.std)}}}")
    if own.resize_mode != first.resize_mode:
        notes.append(f"preprocess: {{fit: {_fit_of(own)}}}")
    return f"with the file also write {' and '.join(notes)}" if notes else ""


def has_quick_gelu(config: Mapping[str, Any], tag: Mapping[str, Any] | None) -> bool:
    """Whether a model's towers, with these weights, use OpenAI's approximate GELU."""
    return bool(config.get("quick_gelu") or (tag or {}).get("quick_gelu"))


def _preprocesses(name: str) -> list[PreprocessCfg]:
    """Returns the preprocessing of every tag of a model; the default without any."""
    tags = list_pretrained_tags_by_model(name)
    found = [preprocess_of(get_pretrained_cfg(name, tag)) for tag in tags]
    return found or [PreprocessCfg()]


def _agree_on_colour(name: str) -> bool:
    return len({(item.mean, item.std) for item in _preprocesses(name)}) == 1


def _fit_of(preprocess: PreprocessCfg) -> str:
    return "squash" if preprocess.resize_mode == "squash" else "tokens"


def tag_config(request: TeacherRequest) -> dict[str, Any] | None:
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
        tag = tag_config(request)
        self._quick_gelu = has_quick_gelu(self._config, tag)
        preprocess = self._preprocess = self._find_preprocess(tag)
        self._native = native_size(self._config)
        probe = self._tower(self._native, "meta")
        self._pixels = Pixels(preprocess.interpolation, preprocess.mean, preprocess.std)
        self._choose_sizes(
            self._native, stride_of(probe), patch_of(probe), _fit_of(preprocess)
        )
        self._check_classifiers()
        self.facts = self._make_facts(
            probe,
            license=None if tag is None else license_of(self._name, tag),
            source=None if tag is None else source_of(tag),
            versions={"open_clip": open_clip.__version__, "timm": timm.__version__},
        )

    def _find_preprocess(self, tag: dict[str, Any] | None) -> PreprocessCfg:
        """Returns the tag's preprocessing; without one, what all tags agree on."""
        if tag is not None:
            return preprocess_of(tag)
        given = self.request.config.preprocess
        is_given = given.mean is not None and given.std is not None
        is_file = self._weights.kind == "file"
        if is_file and not is_given and not _agree_on_colour(self._name):
            raise TeacherError(
                f"{self.where}.preprocess must give mean and std: the tags of "
                f"{self._name} differ in them and the file does not say"
            )
        return _preprocesses(self._name)[0]

    def _check_classifiers(self) -> None:
        """Raises TeacherError where a classifier is of other weights than the tag's."""
        if self._weights.kind != "pretrained" or not self._weights.sha256:
            return
        for name, one in self._classifiers.items():
            if one.weights_sha256 != self._weights.sha256:
                raise TeacherError(
                    f"{self.where}.outputs.{name}.classifier must be made by the "
                    f"weights of this teacher, {self._weights.sha256[:12]}, got one of "
                    f"{one.weights_sha256[:12] or 'random weights'} ({one.model}); "
                    f"make it with `teachonce teachers {self.request.config.model} "
                    f"--weights {self.request.config.weights} --classes ...`"
                )

    def _tap(
        self, model: nn.Module, image_BCHW: Tensor, wanted: Mapping[str, str | None]
    ) -> dict[str, Tap]:
        return tap(model, image_BCHW, wanted, self.where)

    def _own_transform(self, spec: ImageSpec) -> str:
        return tell_transform(
            OPEN_CLIP,
            {
                "image_size": (spec.height, spec.width),
                "is_train": False,
                "mean": spec.mean,
                "std": spec.std,
                "resize_mode": self._preprocess.resize_mode,
                "interpolation": spec.interpolation,
                "fill_color": self._preprocess.fill_color,
            },
        )

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
            state = map_keys(state, self.request.config.keys, self.where)
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


def tower_state(tower: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tower's part of a state dict, its position embedding resized."""
    state = convert_state_dict(SimpleNamespace(visual=tower), state)
    if any(key.startswith(_TOWER) for key in state):
        state = {key: item for key, item in state.items() if key.startswith(_TOWER)}
    else:
        state = {f"{_TOWER}{key}": item for key, item in state.items()}
    resize_pos_embed(state, SimpleNamespace(visual=tower))
    return {key[len(_TOWER) :]: item for key, item in state.items()}


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
    return {
        "native_size": list(size),
        "stride": stride_of(tower),
        "outputs": _describe_outputs(tower, size),
        "num_parameters": sum(item.numel() for item in tower.parameters()),
        "tags": {
            tag: _describe_tag(name, get_pretrained_cfg(name, tag))
            for tag in list_pretrained_tags_by_model(name)
        },
    }


def _describe_outputs(tower: nn.Module, size: Size) -> dict[str, list[int]]:
    """Returns the shape of a row by name of every output that a tower on meta has."""
    shapes: dict[str, list[int]] = {}
    image = torch.zeros(1, 3, *size, device="meta")
    for names in (["embed"], ["pooled"], ["cls"], ["patch"], layer_names(tower)):
        with contextlib.suppress(TeacherError), torch.inference_mode():
            found = tap(tower, image, dict.fromkeys(names), "model")
            shapes |= {it: list(found[it].tensor.shape[1:]) for it in names}
    return shapes


def _describe_tag(name: str, tag: Mapping[str, Any]) -> dict[str, Any]:
    preprocess = preprocess_of(tag)
    return {
        "license": license_of(name, tag),
        "source": source_of(tag),
        "fit": _fit_of(preprocess),
        "interpolation": preprocess.interpolation,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "quick_gelu": has_quick_gelu(find_model(name), tag),
    }


def source_of(tag: Mapping[str, Any]) -> str | None:
    """Returns the page of a tag's weights."""
    repo = tag.get("hf_hub", "").rpartition("/")[0]
    return f"https://huggingface.co/{repo}" if repo else tag.get("url") or None


def license_of(name: str, tag: Mapping[str, Any]) -> str:
    """Returns the licence of a tag's weights, or where to look for it.

    open_clip records none. timm does, for the weights it keeps on the hub: the same
    repository's; or, where the tower is one of timm's architectures, that of all its
    weights if they have one in common.
    """
    unknown = f"unknown: see {source_of(tag)}"
    organisation, _, stem = tag.get("hf_hub", "").rpartition("/")[0].partition("/")
    if organisation != "timm":
        return unknown
    architecture = timm.models.split_model_name_tag(stem)[0]
    tower = find_model(name)["vision_cfg"].get("timm_model_name", "")
    if timm.models.is_model(architecture):
        known = timm.models.get_arch_pretrained_cfgs(architecture)
        same = [stem] if stem in known else []
    else:
        same = []
    if not same and timm.models.is_model(tower):
        same = list(timm.models.get_arch_pretrained_cfgs(tower))
    configs = [timm.models.get_pretrained_cfg(one) for one in same]
    found = {None if one is None else one.license for one in configs}
    return (found.pop() or unknown) if len(found) == 1 else unknown
