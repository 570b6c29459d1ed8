"""Checkpoints in their authors' layouts, written by the tests, read strictly.

The layouts are those of the published files: names and shapes are put together here
from a timm model's tensors, which then have to come back unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from teachers.errors import TeacherError
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]
State = dict[str, Tensor]

TINY: dict[str, Any] = {"embed_dim": 64, "depth": 2, "num_heads": 2}
EUPE = "vit_base_patch16_dinov3_qkvb"
LEVELS: dict[str, Any] = {"depths": (1, 2, 1, 1), "dims": (16, 24, 32, 40)}


def _drawn(name: str, **args: Any) -> Any:
    """A model none of whose parameters is zero or one."""
    model: Any = timm.create_model(name, **args).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def _dinov3_vit(state: State, head_dim: int = 32) -> State:
    """A ViT under the names of DINOv3's own code, with all that its files hold."""
    renamed: State = {}
    for name, value in state.items():
        name = name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        name = name.replace("reg_token", "storage_tokens")
        name = name.replace("mlp.fc1_g", "mlp.w1").replace("mlp.fc1_x", "mlp.w2")
        if ".w1." in name or ".w2." in name:
            pass
        elif "mlp.fc2" in name and any("fc1_g" in key for key in state):
            name = name.replace("mlp.fc2", "mlp.w3")
        if name.endswith("attn.v_bias"):
            continue
        if name.endswith("attn.q_bias"):
            v_bias = state[name.replace("q_bias", "v_bias")]
            # What would be the keys' is drawn and masked.
            name = name.replace("q_bias", "qkv.bias")
            renamed[f"{name}_mask"] = torch.ones(3 * len(value))
            value = torch.cat([value, torch.randn(len(value)), v_bias])
        renamed[name] = value
    renamed["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    renamed["rope_embed.periods"] = torch.ones(head_dim // 4)
    return renamed


def _dinov3_convnext(state: State) -> State:
    """A ConvNeXt under the names of DINOv3's own code."""
    renamed: State = {}
    for name, value in state.items():
        name = re.sub(r"^stem\.", "downsample_layers.0.", name)
        name = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", name)
        name = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", name)
        name = name.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        if name.startswith("head.norm."):
            name = name.replace("head.", "")
            renamed[name.replace("norm.", "norms.3.")] = value
        renamed[name] = value
    return renamed


def _save(state: State, path: Path) -> None:
    state = {name: value.detach().clone() for name, value in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)


def _image(*size: int) -> Tensor:
    return torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("file", ["eupe_vitb16.pt", "eupe_vitb16.safetensors"])
def test_eupe_loads_from_its_own_layout_at_three_sizes(
    file: str, open_one: Open, tmp_path: Path
) -> None:
    """As a job names it: ``model: timm:vit_base_patch16_dinov3_qkvb``."""
    source = _drawn(EUPE, **TINY)
    state = _dinov3_vit(source.state_dict())
    assert {"storage_tokens", "blocks.0.ls1.gamma", "mask_token"} <= set(state)
    state["projectors.dino.0.weight"] = torch.ones(3, 3)
    _save(state, tmp_path / file)
    sizes = [(256, 256), (384, 384), (512, 512)]
    teacher = open_one(
        f"timm:{EUPE}", ["cls", "patch"], weights=f"./{file}", sizes=sizes, args=TINY
    )
    for size in sizes:
        found = teacher.forward({"image": _image(*size)}, size)
        with torch.inference_mode():
            tokens = source.forward_features(_image(*size))
        side = size[0] // 16
        assert torch.allclose(found["cls"], tokens[:, 0], atol=1e-5)
        expected = tokens[:, 5:].reshape(1, side, side, 64)
        assert torch.allclose(found["patch"], expected, atol=1e-5)
    first, *others = (dict(teacher.model(size).named_parameters()) for size in sizes)
    for other in others:
        assert all(first[name].data_ptr() == other[name].data_ptr() for name in first)


def test_biases_that_timm_would_drop_are_refused(
    open_one: Open, tmp_path: Path
) -> None:
    """DINOv3's architecture without biases reads EUPE's file, and would print."""
    state = _dinov3_vit(_drawn(EUPE, **TINY).state_dict())
    for name in ("w.pt", "w.safetensors"):
        _save(state, tmp_path / name)
        teacher = open_one(
            "timm:vit_base_patch16_dinov3", ["cls"], weights=f"./{name}", args=TINY
        )
        with pytest.raises(
            TeacherError,
            match=r"2 attention biases \(blocks.0.attn.qkv.bias.*use model: timm:"
            "vit_base_patch16_dinov3_qkvb",
        ):
            teacher.load()
    # The same by way of `keys`.
    inside = {f"student.{name}": value for name, value in state.items()}
    _save(inside, tmp_path / "w.pt")
    teacher = open_one(
        "timm:vit_base_patch16_dinov3",
        ["cls"],
        weights="./w.pt",
        keys={r"^student\.": ""},
        args=TINY,
    )
    with pytest.raises(TeacherError, match="2 attention biases"):
        teacher.load()


def test_biases_of_zero_are_left_out_quietly(
    open_one: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DINOv3's own B, L and H have them, and timm's models of those names do not."""
    source = _drawn("vit_base_patch16_dinov3", **TINY)
    state = _dinov3_vit(source.state_dict())
    for k in range(2):
        bias = torch.zeros(192)
        bias[64:128] = 3.0  # of the keys: masked
        state[f"blocks.{k}.attn.qkv.bias"] = bias
    _save(state, tmp_path / "w.pth")
    teacher = open_one(
        "timm:vit_base_patch16_dinov3",
        ["cls"],
        weights="./w.pth",
        sizes=[(64, 64)],
        args=TINY,
    )
    found = teacher.forward({"image": _image(64, 64)}, (64, 64))["cls"]
    with torch.inference_mode():
        expected = source.forward_features(_image(64, 64))[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    assert capsys.readouterr().out == ""


def test_gated_dinov3_loads_from_its_own_layout(open_one: Open, tmp_path: Path) -> None:
    """S+, H+ and 7B have an MLP of three matrices."""
    name = "vit_huge_plus_patch16_dinov3_qkvb"
    source = _drawn(name, **TINY)
    state = _dinov3_vit(source.state_dict())
    assert {"blocks.0.mlp.w1.weight", "blocks.0.mlp.w3.weight"} <= set(state)
    state["local_cls_norm.weight"] = torch.ones(64)
    _save(state, tmp_path / "w.pth")
    teacher = open_one(
        f"timm:{name}", ["cls"], weights="./w.pth", sizes=[(64, 64)], args=TINY
    )
    found = teacher.forward({"image": _image(64, 64)}, (64, 64))["cls"]
    with torch.inference_mode():
        expected = source.forward_features(_image(64, 64))[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)


def test_eupe_convnext_loads_from_its_own_layout(
    open_one: Open, tmp_path: Path
) -> None:
    name = "convnext_tiny.eupe_lvd1689m"
    source = _drawn(name, **LEVELS)
    state = _dinov3_convnext(source.state_dict())
    assert {"downsample_layers.0.0.weight", "stages.0.0.dwconv.weight"} <= set(state)
    assert {"stages.1.0.pwconv1.weight", "norm.weight", "norms.3.weight"} <= set(state)
    _save(state, tmp_path / "eupe_convnext_tiny.pt")
    sizes = [(64, 64), (96, 96)]
    teacher = open_one(
        f"timm:{name}",
        ["patch", "pooled"],
        weights="./eupe_convnext_tiny.pt",
        sizes=sizes,
        args=LEVELS,
    )
    for size in sizes:
        found = teacher.forward({"image": _image(*size)}, size)
        with torch.inference_mode():
            cells = source.forward_features(_image(*size)).permute(0, 2, 3, 1)
            norm = source.head.norm
            layer_norm = torch.nn.functional.layer_norm
            normed = layer_norm(cells, (40,), norm.weight, norm.bias, norm.eps)
            mean = layer_norm(
                cells.mean((1, 2)), (40,), norm.weight, norm.bias, norm.eps
            )
        assert torch.allclose(found["patch"], normed, atol=1e-5)
        assert torch.allclose(found["pooled"], mean, atol=1e-5)


IN_HOUSE: dict[str, Any] = {"args": TINY, "sizes": [(64, 64)], "weights": "./rap.pt"}


@pytest.fixture
def in_house(tmp_path: Path) -> Any:
    """A driving model: an encoder behind ``backbone.`` and a planner beside it."""
    encoder = _drawn("vit_huge_plus_patch16_dinov3", **TINY)
    state = {f"backbone.{key}": item for key, item in encoder.state_dict().items()}
    state["planner.0.weight"] = torch.ones(4, 4)
    state["planner.0.bias"] = torch.ones(4)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "rap.pt")
    return encoder


def test_an_in_house_encoder_loads_strictly_with_two_rules(
    in_house: Any, open_one: Open
) -> None:
    teacher = open_one(
        "timm:vit_huge_plus_patch16_dinov3",
        ["patch"],
        keys={r"^backbone\.": "", r"^planner\.": None},
        **IN_HOUSE,
    )
    found = teacher.forward({"image": _image(64, 64)}, (64, 64))["patch"]
    with torch.inference_mode():
        tokens = in_house.forward_features(_image(64, 64))
    assert torch.allclose(found, tokens[:, 5:].reshape(1, 4, 4, 64), atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "missing .*unexpected"),
        ({r"^backbone\.": ""}, r"2 unexpected \(planner.0.weight"),
        (
            {r"^backbone\.": "", r"^planner\.": None, r"^blocks\.1\.": None},
            r"missing \(blocks.1",
        ),
        ({r"^encoder\.": ""}, "keys must match names of the checkpoint"),
    ],
)
def test_what_does_not_match_is_said(
    in_house: Any, open_one: Open, keys: dict[str, str | None], message: str
) -> None:
    teacher = open_one(
        "timm:vit_huge_plus_patch16_dinov3", ["patch"], keys=keys, **IN_HOUSE
    )
    with pytest.raises(TeacherError, match=message):
        teacher.load()


def test_a_model_that_timm_loads_loosely_is_loaded_whole(
    open_one: Open, tmp_path: Path
) -> None:
    """SigLIP without its pooling reads SigLIP with it, but nothing else."""
    args = {**TINY, "img_size": 64}
    whole = _drawn("vit_base_patch16_siglip_256", **args).state_dict()
    assert any(name.startswith("attn_pool") for name in whole)
    asked: dict[str, Any] = {
        "model": "timm:vit_base_patch16_siglip_gap_256",
        "outputs": ["patch"],
        "weights": "./w.pt",
        "sizes": [(64, 64)],
        "args": TINY,
    }
    _save(whole, tmp_path / "w.pt")
    open_one(**asked).load()
    del whole["blocks.1.norm1.weight"]
    _save(whole, tmp_path / "w.pt")
    with pytest.raises(TeacherError, match=r"1 missing \(blocks.1.norm1.weight\)"):
        open_one(**asked).load()
