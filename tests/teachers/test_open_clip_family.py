"""open_clip towers, against the whole models that open_clip itself builds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import open_clip.factory
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from teachers import open_clip_family
from teachers.errors import TeacherError
from teachers.interface import WeightsRecord
from teachers.registry import describe, find_weights, open_teacher
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]

SAFE = "open_clip_model.safetensors"
CLIP_L = "timm/vit_large_patch14_clip_224"
EVA_B = "timm/eva02_base_patch16_clip_224"

TEXT = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
VIT = {"image_size": 64, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32}
TRUNK = {"timm_model_name": "test_vit3", "image_size": 160}
VISION: dict[str, dict[str, Any]] = {
    "tiny-vit": VIT,
    "tiny-vit-late-norm": {**VIT, "final_ln_after_pool": True, "pool_type": "avg"},
    "tiny-resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "tiny-siglip": {**TRUNK, "timm_pool": "map", "timm_proj": "none"},
    "tiny-pe": {
        "timm_model_name": "vit_pe_core_tiny_patch16_384",
        "image_size": 384,
        "timm_pool": "map",
        "timm_proj": None,
    },
    "tiny-eva": {
        "timm_model_name": "eva02_tiny_patch14_224",
        "image_size": 224,
        "timm_pool": "token",
        "timm_proj": None,
    },
    "tiny-linear": {**TRUNK, "timm_model_name": "test_resnet", "timm_proj": "linear"},
}


@pytest.fixture(autouse=True)
def tiny_models(tmp_path: Path) -> Iterator[None]:
    """Small models that open_clip knows for the length of a test."""
    before = dict(open_clip.factory._MODEL_CONFIGS)
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, vision in VISION.items():
        # SigLIP's projection is its pooling; the width of both is test_vit3's.
        config = {"embed_dim": 96, "vision_cfg": vision, "text_cfg": TEXT}
        if "timm_model_name" in vision:
            config["custom_text"] = True
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIGS = before
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths


def _image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))


def _run(teacher: TorchTeacher, image: Tensor) -> dict[str, Tensor]:
    return teacher.forward({"image": image}, teacher.sizes[0])


def _whole(name: str, folder: Path) -> Any:
    """A model with its text tower and random weights, saved for teachers to load."""
    torch.manual_seed(11)
    model = open_clip.create_model(name).eval()
    torch.save({"state_dict": model.state_dict()}, folder / "whole.pt")
    return model


@pytest.mark.parametrize("name", list(VISION))
def test_embed_is_encode_image(name: str, tmp_path: Path, open_one: Open) -> None:
    model = _whole(name, tmp_path)
    teacher = open_one(f"open_clip:{name}", ["embed"], weights="whole.pt")
    image = _image(*(teacher.sizes[0] or ()))
    with torch.inference_mode():
        expected = model.encode_image(image)
    assert torch.equal(_run(teacher, image)["embed"], expected)
    own = sum(p.numel() for p in model.visual.parameters())
    assert teacher.facts.num_parameters == own
    assert not any(
        "text" in key for key in teacher.model(teacher.sizes[0]).state_dict()
    )


def test_transformer_outputs(tmp_path: Path, open_one: Open) -> None:
    visual = _whole("tiny-vit", tmp_path).visual
    outputs = {
        "cls": {},
        "pooled": {},
        "embed": {},
        "patch": {},
        "layer0": {"norm": "pre"},
        "layer1": {"norm": "post"},
    }
    teacher = open_one("open_clip:tiny-vit", outputs, weights="whole.pt")
    image = _image(64, 64)
    found = _run(teacher, image)
    with torch.inference_mode():
        tokens = visual._embeds(image)
        first = visual.transformer.resblocks[0](tokens)
        last = visual.transformer.resblocks[1](first)
        norm = visual.ln_post
        normed = F.layer_norm(last, last.shape[-1:], norm.weight, norm.bias, norm.eps)
    assert torch.allclose(found["cls"], normed[:, 0], atol=1e-6)
    assert torch.allclose(found["pooled"], normed[:, 0], atol=1e-6)
    assert torch.allclose(
        found["embed"], normed[:, 0] @ visual.proj.detach(), atol=1e-6
    )
    grid = normed[:, 1:].reshape(2, 4, 4, 64)
    assert torch.allclose(found["patch"], grid, atol=1e-6)
    assert torch.allclose(found["layer1"], grid, atol=1e-6)
    assert torch.equal(found["layer0"], first[:, 1:].reshape(2, 4, 4, 64))


def test_norm_after_pooling_is_applied_to_cells(tmp_path: Path, open_one: Open) -> None:
    visual = _whole("tiny-vit-late-norm", tmp_path).visual
    name = "open_clip:tiny-vit-late-norm"
    outputs: dict[str, Any] = {"patch": {}, "pooled": {}, "embed": {}}
    found = _run(open_one(name, outputs, weights="whole.pt"), _image(64, 64))
    pre = {"patch": {"norm": "pre"}}
    unnormed = _run(open_one(name, pre, weights="whole.pt"), _image(64, 64))["patch"]
    with torch.inference_mode():
        assert torch.allclose(found["patch"], visual.ln_post(unnormed), atol=1e-6)
        pooled = visual.ln_post(unnormed.mean((1, 2)))
    assert torch.allclose(found["pooled"], pooled, atol=1e-5)


def test_resnet_outputs(tmp_path: Path, open_one: Open) -> None:
    visual = _whole("tiny-resnet", tmp_path).visual
    name = "open_clip:tiny-resnet"
    found = _run(open_one(name, ["patch"], weights="whole.pt"), _image(64, 64))
    with torch.inference_mode():
        maps = visual.forward_intermediates(_image(64, 64), indices=[4])
    expected = maps["image_intermediates"][0].permute(0, 2, 3, 1)
    assert torch.equal(found["patch"], expected)
    for output in ("pooled", "cls"):
        teacher = open_one(name, [output], device="meta")
        with pytest.raises(TeacherError, match="which has embed, patch"):
            teacher.outputs((64, 64))
    wide = open_one(name, ["embed"], aspect=2.0, device="meta")
    with pytest.raises(TeacherError, match="fit: squash"):
        wide.outputs(wide.sizes[0])


def test_trunk_outputs(tmp_path: Path, open_one: Open) -> None:
    visual = _whole("tiny-siglip", tmp_path).visual
    outputs = ["embed", "pooled", "patch", "layer0"]
    teacher = open_one("open_clip:tiny-siglip", outputs, weights="whole.pt")
    found = _run(teacher, _image(160, 160))
    with torch.inference_mode():
        tokens = visual.trunk.forward_features(_image(160, 160))
        pooled = visual.trunk.forward_head(tokens, pre_logits=True)
    assert torch.equal(found["pooled"], pooled)
    assert torch.equal(found["embed"], pooled)
    assert torch.equal(found["patch"], tokens[:, 1:].reshape(2, 10, 10, 96))


def test_position_embeddings_are_resampled(tmp_path: Path, open_one: Open) -> None:
    visual = _whole("tiny-vit", tmp_path).visual
    sizes = [[64, 64], [48, 96]]
    teacher = open_one("open_clip:tiny-vit", ["patch"], weights="whole.pt", sizes=sizes)
    wide: Any = teacher.model((48, 96))
    square: Any = teacher.model((64, 64))
    grid = visual.positional_embedding[1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    expected = F.interpolate(
        grid, (3, 6), mode="bicubic", antialias=True, align_corners=False
    )
    found = wide.positional_embedding[1:].reshape(1, 3, 6, 64).permute(0, 3, 1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
    assert wide.conv1.weight.data_ptr() == square.conv1.weight.data_ptr()
    with pytest.raises(TeacherError, match="multiples of the patch 16 x 16"):
        open_one("open_clip:tiny-vit", ["patch"], sizes=[[50, 64]])


def test_a_file_of_the_tower_alone_loads(tmp_path: Path, open_one: Open) -> None:
    model = _whole("tiny-vit", tmp_path)
    torch.save(model.visual.state_dict(), tmp_path / "tower.pt")
    teacher = open_one("open_clip:tiny-vit", ["embed"], weights="tower.pt")
    with torch.inference_mode():
        expected = model.encode_image(_image(64, 64))
    assert torch.equal(_run(teacher, _image(64, 64))["embed"], expected)


def test_keys_rename_the_checkpoint(tmp_path: Path, open_one: Open) -> None:
    model = _whole("tiny-vit", tmp_path)
    state = {
        f"clip.{name.replace('visual.', 'vision.')}": value
        for name, value in model.state_dict().items()
    }
    torch.save(state, tmp_path / "ours.pt")
    keys = {r"^clip\.vision\.": "visual.", r"^clip\.": None}
    teacher = open_one("open_clip:tiny-vit", ["embed"], weights="ours.pt", keys=keys)
    with torch.inference_mode():
        expected = model.encode_image(_image(64, 64))
    assert torch.equal(_run(teacher, _image(64, 64))["embed"], expected)
    wrong = open_one(
        "open_clip:tiny-vit", ["embed"], weights="ours.pt", keys={"^net": ""}
    )
    with pytest.raises(TeacherError, match=r"t\.keys must match names.*clip\.vision"):
        wrong.model((64, 64))


def test_a_file_of_another_model_is_refused(tmp_path: Path, open_one: Open) -> None:
    _whole("tiny-resnet", tmp_path)
    teacher = open_one("open_clip:tiny-vit", ["embed"], weights="whole.pt")
    with pytest.raises(TeacherError, match=r"missing.*unexpected"):
        teacher.model((64, 64))


def test_random_weights_are_a_function_of_the_seed(open_one: Open) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _run(open_one("open_clip:tiny-vit", ["embed"]), _image(64, 64))
    assert torch.equal(torch.get_rng_state(), before)
    again = _run(open_one("open_clip:tiny-vit", ["embed"]), _image(64, 64))
    other = open_one("open_clip:tiny-vit", ["embed"], weights="random:4")
    assert torch.equal(first["embed"], again["embed"])
    assert not torch.equal(first["embed"], _run(other, _image(64, 64))["embed"])


@pytest.mark.parametrize(
    ("model", "weights", "mean", "size"),
    [
        ("ViT-B-32", "random", open_clip.OPENAI_DATASET_MEAN, (160, 288)),
        ("ViT-B-16-SigLIP", "random", (0.5, 0.5, 0.5), (224, 224)),
        ("ViT-L-14", "laion2b_s32b_b82k", (0.5, 0.5, 0.5), (168, 294)),
    ],
)
def test_preprocessing_and_fit_are_the_tags(
    open_one: Open,
    make_request: Callable[..., Any],
    model: str,
    weights: str,
    mean: tuple[float, ...],
    size: tuple[int, int],
) -> None:
    request = make_request(
        f"open_clip:{model}", ["embed"], weights=weights, aspect=16 / 9
    )
    teacher: Any = open_teacher(request, WeightsRecord("pretrained"), "meta")
    assert teacher.sizes == (size,)
    assert tuple(teacher.inputs(size)["image"].mean) == tuple(mean)


def test_quick_gelu_is_the_tags(make_request: Callable[..., Any]) -> None:
    for tag, expected in (("openai", "QuickGELU"), ("laion2b_e16", "GELU")):
        request = make_request("open_clip:ViT-B-32", ["embed"], weights=tag)
        teacher = open_clip_family.OpenClipTeacher(
            request, WeightsRecord("pretrained"), "meta"
        )
        tower: Any = teacher._blueprint((224, 224), "meta")
        assert type(tower.transformer.resblocks[0].mlp.gelu).__name__ == expected


@pytest.mark.parametrize(
    ("model", "tag", "repo", "first"),
    [
        (
            "ViT-B-32",
            "openai",
            "timm/vit_base_patch32_clip_224.openai",
            "open_clip_model.safetensors",
        ),
        ("ViT-B-16-SigLIP2", "webli", "timm/ViT-B-16-SigLIP2", SAFE),
        ("ViT-L-14", "metaclip_fullcc", f"{CLIP_L}.metaclip_2pt5b", SAFE),
        ("EVA02-B-16", "merged2b_s8b_b131k", f"{EVA_B}.merged2b_s8b_b131k", SAFE),
        ("PE-Core-bigG-14-448", "meta", "timm/PE-Core-bigG-14-448", SAFE),
        (
            "ViT-H-14-378-quickgelu",
            "dfn5b",
            "apple/DFN5B-CLIP-ViT-H-14-378",
            "open_clip_model.safetensors",
        ),
    ],
)
def test_tags_lead_to_the_hub(
    make_request: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    tag: str,
    repo: str,
    first: str,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        open_clip_family, "find_on_hub", lambda request, *rest: asked.append(rest)
    )
    open_clip_family.find_weights(
        make_request(f"open_clip:{model}", ["embed"], weights=tag)
    )
    assert asked[0][0] == repo
    assert asked[0][1][0] == first


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("ViT-B-31", "random", "did you mean ViT-B-32"),
        ("ViT-B-32", None, r"weights must be given: a tag of ViT-B-32 \(openai"),
        ("ViT-B-32", "openay", r"got 'openay'; did you mean openai\?"),
        ("ViT-B-16-plus", "x", "has no tags"),
        ("ViT-L-14", "whole.pt", "preprocess must give mean and std"),
    ],
)
def test_models_that_cannot_be_had(
    open_one: Open, tmp_path: Path, model: str, weights: str | None, message: str
) -> None:
    (tmp_path / "whole.pt").write_bytes(b"")
    with pytest.raises(TeacherError, match=message):
        open_one(f"open_clip:{model}", ["embed"], weights=weights)


def test_coca_has_no_norm_of_tokens(open_one: Open) -> None:
    teacher = open_one("open_clip:coca_ViT-B-32", ["patch"], device="meta")
    assert teacher.outputs((224, 224))["patch"].norm == "pre"
    teacher = open_one(
        "open_clip:coca_ViT-B-32", {"patch": {"norm": "post"}}, device="meta"
    )
    with pytest.raises(TeacherError, match="norm must be pre"):
        teacher.outputs((224, 224))


NC = "cc-by-nc-4.0"
APACHE = "apache-2.0"
HUB = "https://huggingface.co/"
GREY, CLIP = (0.5, 0.5, 0.5), open_clip.OPENAI_DATASET_MEAN


@pytest.mark.parametrize(
    ("model", "tag", "license", "fit", "mean", "embed", "pooled", "patch", "layers"),
    [
        ("ViT-B-16-SigLIP", "webli", APACHE, "squash", GREY, 768, 768, 14, 12),
        (
            "ViT-SO400M-14-SigLIP2-378",
            "webli",
            APACHE,
            "squash",
            GREY,
            1152,
            1152,
            27,
            27,
        ),
        (
            "ViT-gopt-16-SigLIP2-384",
            "webli",
            APACHE,
            "squash",
            GREY,
            1536,
            1536,
            24,
            40,
        ),
        ("ViT-L-14", "openai", APACHE, "tokens", CLIP, 768, 1024, 16, 24),
        ("ViT-H-14", "metaclip_fullcc", NC, "tokens", CLIP, 1024, 1280, 16, 32),
        ("ViT-H-14-378-quickgelu", "dfn5b", None, "squash", CLIP, 1024, 1280, 27, 32),
        (
            "EVA02-L-14-336",
            "merged2b_s6b_b61k",
            "mit",
            "tokens",
            CLIP,
            768,
            1024,
            24,
            24,
        ),
        ("PE-Core-L-14-336", "meta", APACHE, "squash", GREY, 1024, 1024, 24, 24),
        ("PE-Core-bigG-14-448", "meta", APACHE, "squash", GREY, 1280, 1536, 32, 50),
    ],
)
def test_the_models_of_this_field(
    make_request: Callable[..., Any],
    model: str,
    tag: str,
    license: str | None,
    fit: str,
    mean: tuple[float, ...],
    embed: int,
    pooled: int,
    patch: int,
    layers: int,
) -> None:
    facts = describe(f"open_clip:{model}")
    assert facts["outputs"]["embed"] == [embed]
    assert facts["outputs"]["pooled"] == [pooled]
    assert facts["outputs"]["patch"] == [patch, patch, pooled]
    assert f"layer{layers - 1}" in facts["outputs"]
    assert f"layer{layers}" not in facts["outputs"]
    told = facts["tags"][tag]
    assert told["source"].startswith(HUB)
    assert told["license"] == (license or f"unknown: see {told['source']}")
    assert (told["fit"], told["mean"]) == (fit, list(mean))
    wanted = ["embed", "pooled", "patch", f"layer{layers // 2}"]
    request = make_request(f"open_clip:{model}", wanted, weights=tag)
    teacher: Any = open_teacher(request, WeightsRecord("pretrained"), "meta")
    (size,) = teacher.sizes
    shapes = {name: list(spec.shape) for name, spec in teacher.outputs(size).items()}
    assert shapes == {name: facts["outputs"][name] for name in wanted}
    assert teacher.facts.license == told["license"]
    assert teacher.facts.source == told["source"]
    own = open_clip.get_pretrained_cfg(model, tag)
    spec = teacher.inputs(size)["image"]
    assert tuple(spec.mean) == tuple(own["mean"])
    assert tuple(spec.std) == tuple(own["std"])


@pytest.mark.parametrize(
    ("model", "tag", "note"),
    [
        ("ViT-B-32", "openai", r"\(with the file also write model: \S+-quickgelu\)"),
        ("ViT-L-14", "laion2b_s32b_b82k", r"preprocess: {mean: \[0.5, 0.5, 0.5\]"),
        ("ViT-H-14", "dfn5b", r"-quickgelu and preprocess: {fit: squash}\)"),
        ("ViT-B-16-SigLIP", "webli", r"or a path; `weights: random`"),
    ],
)
def test_what_a_staged_file_does_not_say_is_said(
    make_request: Callable[..., Any],
    hub_cache: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    tag: str,
    note: str,
) -> None:
    class Session:
        def head(self, url: str, timeout: float) -> None:
            raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    request = make_request(f"open_clip:{model}", ["embed"], weights=tag)
    with pytest.raises(TeacherError, match=note):
        find_weights(request)
