"""timm teachers, against the models' own calls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor

from teachers.errors import TeacherError
from teachers.interface import TeacherRequest
from teachers.registry import find_weights, open_teacher
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]

REG4: dict[str, Any] = {
    "model": "timm:vit_small_patch14_reg4_dinov2",
    "args": {"embed_dim": 48, "depth": 3, "num_heads": 2},
}
BEIT: dict[str, Any] = {
    "model": "timm:beitv2_base_patch16_224",
    "args": {"embed_dim": 48, "depth": 2, "num_heads": 2},
}
SWIN: dict[str, Any] = {
    "model": "timm:swin_tiny_patch4_window7_224",
    "args": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
}


def _image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))


def _run(teacher: TorchTeacher, image: Tensor) -> dict[str, Tensor]:
    return teacher.forward({"image": image}, teacher.sizes[0])


def _own(teacher: TorchTeacher) -> Any:
    """The module itself, for calls that do not go through the teacher."""
    return teacher.model(teacher.sizes[0])


def test_outputs_are_the_models_own_calls(open_one: Open) -> None:
    teacher = open_one("timm:test_vit", ["cls", "pooled", "patch", "logits"])
    image = _image(160, 160)
    found, model = _run(teacher, image), _own(teacher)
    with torch.inference_mode():
        tokens = model.forward_features(image)
        assert torch.equal(found["logits"], model(image))
        assert torch.equal(found["cls"], tokens[:, 0])
        assert torch.equal(found["pooled"], model.forward_head(tokens, pre_logits=True))
    assert torch.equal(found["patch"], tokens[:, 1:].reshape(2, 10, 10, 64))


def test_registers_are_no_cells(open_one: Open) -> None:
    teacher = open_one(outputs=["cls", "patch", "pooled"], sizes=[[98, 126]], **REG4)
    image = _image(98, 126)
    found, model = _run(teacher, image), _own(teacher)
    assert model.num_prefix_tokens == 5
    with torch.inference_mode():
        tokens = model.forward_features(image)
    assert torch.equal(found["patch"], tokens[:, 5:].reshape(2, 7, 9, 48))
    assert torch.equal(found["cls"], tokens[:, 0])


@pytest.mark.parametrize(
    ("name", "channels_last"),
    [("test_convnext", False), ("test_resnet", False), ("test_byobnet", False)],
)
def test_maps_are_channels_last(open_one: Open, name: str, channels_last: bool) -> None:
    teacher = open_one(
        f"timm:{name}", ["pooled", "logits", "level2"], sizes=[[96, 160]]
    )
    image = _image(96, 160)
    found, model = _run(teacher, image), _own(teacher)
    with torch.inference_mode():
        features, maps = model.forward_intermediates(image, indices=[2])
        assert torch.equal(found["logits"], model(image))
        pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(found["pooled"], pooled)
    assert torch.equal(found["level2"], maps[0].permute(0, 2, 3, 1))


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's, as it resizes a Swin
def test_nhwc_maps_stay_as_they_are(open_one: Open) -> None:
    teacher = open_one(outputs=["patch", "level1"], sizes=[[96, 160]], **SWIN)
    image = _image(96, 160)
    found, model = _run(teacher, image), _own(teacher)
    with torch.inference_mode():
        assert torch.equal(found["patch"], model.forward_features(image))
        level = model.layers[1](model.layers[0](model.patch_embed(image)))
    assert found["patch"].shape == (2, 3, 5, 192)
    assert torch.equal(found["level1"], level)


def test_norm_after_pooling_is_applied_to_cells(open_one: Open) -> None:
    """BEiT averages, then norms (fc_norm): its tokens leave unnormed."""
    outputs: dict[str, Any] = {"patch": {}, "cls": {}}
    post = _run(open_one(outputs=outputs, **BEIT), _image(224, 224))
    pre_outputs = {name: {"norm": "pre"} for name in outputs}
    teacher = open_one(outputs=pre_outputs, **BEIT)
    pre, model = _run(teacher, _image(224, 224)), _own(teacher)
    with torch.inference_mode():
        tokens = model.forward_features(_image(224, 224))
        for name, cut in (("cls", tokens[:, 0]), ("patch", tokens[:, 1:])):
            assert torch.equal(pre[name].reshape(cut.shape), cut)
            normed = F.layer_norm(
                cut, cut.shape[-1:], model.fc_norm.weight, model.fc_norm.bias, 1e-6
            )
            assert torch.allclose(post[name].reshape(cut.shape), normed, atol=1e-5)
    assert teacher.outputs(teacher.sizes[0])["patch"].norm == "pre"


def test_head_norm_of_a_convnext_is_applied_to_cells(open_one: Open) -> None:
    teacher = open_one("timm:test_convnext", ["patch"])
    found, model = _run(teacher, _image(160, 160)), _own(teacher)
    with torch.inference_mode():
        features = model.forward_features(_image(160, 160)).permute(0, 2, 3, 1)
        norm = model.head.norm
        expected = F.layer_norm(
            features, features.shape[-1:], norm.weight, norm.bias, norm.eps
        )
    assert torch.allclose(found["patch"], expected, atol=1e-5)


def test_pre_is_before_the_final_norm(open_one: Open) -> None:
    outputs = {name: {"norm": "pre"} for name in ("cls", "patch", "layer1")}
    teacher = open_one("timm:test_vit", outputs)
    found, model = _run(teacher, _image(160, 160)), _own(teacher)
    with torch.inference_mode():
        tokens = model._pos_embed(model.patch_embed(_image(160, 160)))
        tokens = model.blocks[:2](model.norm_pre(tokens))
        assert torch.equal(found["layer1"], tokens[:, 1:].reshape(2, 10, 10, 64))
        tokens = model.blocks[2:](tokens)
    assert torch.equal(found["cls"], tokens[:, 0])
    assert torch.equal(found["patch"], tokens[:, 1:].reshape(2, 10, 10, 64))


def test_layers_are_normed_by_default(open_one: Open) -> None:
    outputs: dict[str, Any] = {"layer1": {}, "layer5": {}, "patch": {}}
    teacher = open_one("timm:test_vit", outputs)
    found = _run(teacher, _image(160, 160))
    assert torch.allclose(found["layer5"], found["patch"], atol=1e-6)
    pre = open_one("timm:test_vit", {"layer1": {"norm": "pre"}})
    with torch.inference_mode():
        expected = _own(teacher).norm(_run(pre, _image(160, 160))["layer1"])
    assert torch.allclose(found["layer1"], expected, atol=1e-6)


def test_pooling_averages_cells(open_one: Open) -> None:
    whole = _run(open_one("timm:test_vit", {"patch": {}}), _image(160, 160))["patch"]
    teacher = open_one("timm:test_vit", {"patch": {"pool": (2, 5)}})
    found = _run(teacher, _image(160, 160))["patch"]
    nchw = whole.permute(0, 3, 1, 2)
    expected = F.avg_pool2d(nchw, (2, 5)).permute(0, 2, 3, 1)
    assert teacher.outputs(teacher.sizes[0])["patch"].shape == (5, 2, 64)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"patch": {"pool": (3, 2)}}, "pool must divide the grid 10 x 10"),
        ({"cls": {"pool": (2, 2)}}, "pool is for grids"),
        ({"layer9": {}}, r"layer9 is not in this model.*layer0, \.\.\., layer5"),
        ({"level1": {}}, "level1 is not in this model"),
        ({"logits": {"norm": "pre"}}, r"logits\.norm has no effect"),
    ],
)
def test_outputs_that_cannot_be_had(
    open_one: Open, outputs: dict[str, Any], message: str
) -> None:
    teacher = open_one("timm:test_vit", outputs, device="meta")
    with pytest.raises(TeacherError, match=message):
        teacher.outputs(teacher.sizes[0])


def test_what_a_model_has_not_is_refused_with_a_way_out(open_one: Open) -> None:
    for model, name, message in (
        ("timm:test_resnet", "cls", "no class token; `pooled`"),
        ("timm:vit_small_patch14_dinov2", "logits", "no classifier; `pooled`"),
        ("timm:crossvit_tiny_240", "patch", "take a layer or level"),
        ("timm:test_resnet", "layer1", r"level0, \.\.\., level4"),
    ):
        teacher = open_one(model, [name], device="meta")
        with pytest.raises(TeacherError, match=message):
            teacher.outputs(teacher.sizes[0])
    teacher = open_one("timm:test_resnet", {"level1": {"norm": "post"}}, device="meta")
    with pytest.raises(TeacherError, match="norm must be pre"):
        teacher.outputs(teacher.sizes[0])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("timm:test_vit", (128, 224)),  # 8 x 14 of about 100 tokens
        ("timm:test_convnext", (128, 224)),  # 4 x 7 of about 25, stride 32
        ("timm:vit_small_patch16_dinov3", (192, 336)),
        ("timm:samvit_base_patch16", (768, 1360)),
        ("timm:swin_tiny_patch4_window7_224", (160, 288)),
    ],
)
def test_own_size_follows_the_aspect(
    open_one: Open, model: str, expected: tuple[int, int]
) -> None:
    teacher = open_one(model, ["patch"], aspect=16 / 9, device="meta")
    assert teacher.sizes == (expected,)
    grid = teacher.outputs(expected)["patch"].shape
    assert grid[1] / grid[0] == pytest.approx(expected[1] / expected[0])
    squashed = open_one(
        model, ["patch"], aspect=16 / 9, preprocess={"fit": "squash"}, device="meta"
    )
    config: Any = timm.models.get_pretrained_cfg(model.partition(":")[2])
    assert squashed.sizes == (config.input_size[1:],)


def test_sizes_that_leave_pixels_over_are_refused(open_one: Open) -> None:
    with pytest.raises(
        TeacherError, match=r"multiples of the patch 14 x 14.*\[252, 448"
    ):
        open_one(outputs=["patch"], sizes=[[256, 448]], device="meta", **REG4)


def test_random_weights_are_a_function_of_the_seed(open_one: Open) -> None:
    image = _image(160, 160)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _run(open_one("timm:test_vit", ["pooled"]), image)["pooled"]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = _run(open_one("timm:test_vit", ["pooled"], weights="random:0"), image)
    other = _run(open_one("timm:test_vit", ["pooled"], weights="random:1"), image)
    assert torch.equal(first, again["pooled"])
    assert not torch.equal(first, other["pooled"])
    torch.manual_seed(0)
    model: Any = timm.create_model("test_vit").eval()
    with torch.inference_mode():
        features = model.forward_features(image)
        assert torch.equal(first, model.forward_head(features, pre_logits=True))


def test_sizes_share_weights_and_resample_position(open_one: Open) -> None:
    """DINOv2 is of one size, so that each of ours is a model of its own."""
    teacher = open_one(outputs=["patch"], sizes=[[518, 518], [84, 196]], **REG4)
    native, wide = teacher.model((518, 518)), teacher.model((84, 196))
    own = dict(native.named_parameters())
    for name, parameter in wide.named_parameters():
        if name == "pos_embed":
            square = own[name].reshape(1, 37, 37, 48).permute(0, 3, 1, 2)
            expected = F.interpolate(
                square, (6, 14), mode="bicubic", antialias=True, align_corners=False
            )
            found = parameter.reshape(1, 6, 14, 48).permute(0, 3, 1, 2)
            assert torch.allclose(found, expected, atol=1e-6)
        else:
            assert parameter.data_ptr() == own[name].data_ptr(), name
    config: Any = wide.pretrained_cfg
    assert "state_dict" not in config


def test_one_model_serves_all_sizes_it_takes_as_they_are(open_one: Open) -> None:
    teacher = open_one("timm:test_convnext", ["patch"], sizes=[[96, 96], [96, 160]])
    first, second = (
        dict(teacher.model(size).named_parameters()) for size in teacher.sizes
    )
    assert all(first[key].data_ptr() == second[key].data_ptr() for key in first)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a test_vit with ten classes, as timm's trainer writes it."""
    torch.manual_seed(3)
    model: Any = timm.create_model("test_vit", num_classes=10)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "w.pth")
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    return tmp_path


def test_a_file_is_loaded_whole_with_its_head(saved: Path, open_one: Open) -> None:
    teacher = open_one(
        "timm:test_vit", ["logits"], weights="w.pth", args={"num_classes": 10}
    )
    model: Any = timm.create_model("test_vit", num_classes=10).eval()
    model.load_state_dict(torch.load(saved / "plain.pt", weights_only=True))
    with torch.inference_mode():
        expected = model(_image(160, 160))
    assert torch.equal(_run(teacher, _image(160, 160))["logits"], expected)
    assert teacher.facts.num_parameters == sum(p.numel() for p in model.parameters())
    wide = open_one(
        "timm:test_vit",
        ["logits"],
        weights="w.pth",
        args={"num_classes": 10},
        sizes=[[96, 224]],
    )
    assert _run(wide, _image(96, 224))["logits"].shape == (2, 10)


def test_a_file_of_another_head_is_refused(saved: Path, open_one: Open) -> None:
    teacher = open_one("timm:test_vit", ["pooled"], weights="plain.pt")
    with pytest.raises(
        TeacherError, match=r"2 of another shape \(head.weight .*, head.b"
    ):
        teacher.model((160, 160))


def test_a_file_of_another_model_is_refused(saved: Path, open_one: Open) -> None:
    teacher = open_one("timm:test_resnet", ["pooled"], weights="plain.pt")
    with pytest.raises(TeacherError, match=r"missing \(conv1.*unexpected"):
        teacher.model((160, 160))


def test_pretrained_weights_come_from_the_cache(
    make_request: Callable[..., TeacherRequest],
    hub_cache: Callable[[str, str, bytes], Path],
) -> None:
    torch.manual_seed(5)
    model: Any = timm.create_model("test_vit").eval()
    hub_cache("timm/test_vit.r160_in1k", "model.safetensors", save(model.state_dict()))
    request = make_request("timm:test_vit.r160_in1k", ["logits"], weights=None)
    record = find_weights(request)
    assert record.kind == "pretrained"
    teacher: Any = open_teacher(request, record, "cpu")
    with torch.inference_mode():
        expected = model(_image(160, 160))
    assert torch.equal(_run(teacher, _image(160, 160))["logits"], expected)
    assert teacher.facts.license == "apache-2.0"
    assert teacher.facts.source == "https://huggingface.co/timm/test_vit.r160_in1k"


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("timm:tset_vit", {}, "did you mean test_vit"),
        ("timm:test_vit.in22k", {}, r"tag that timm knows.*known: r160_in1k"),
        ("timm:hf-hub:org/name", {}, "weights: hf://ORG/NAME/FILE"),
        ("timm:test_vit", {"args": {"img_size": 96}}, "img_size is set by"),
        (
            "timm:test_vit",
            {"args": {"depht": 3}},
            "args must be arguments of 'test_vit'",
        ),
        ("timm:test_vit", {"weights": "in22k"}, "a tag is part of timm's name"),
        (
            "timm:test_vit",
            {"weights": None, "args": {"num_classes": 3}},
            "num_classes must be left out",
        ),
        (
            "timm:test_vit_relpos",
            {"weights": None},
            "has no pretrained|not in the local",
        ),
        ("timm:vit_tiny_patch16_384.none", {}, "tag that timm knows"),
    ],
)
def test_models_that_cannot_be_had(
    open_one: Open,
    hub_cache: Callable[[str, str, bytes], Path],
    model: str,
    config: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(TeacherError, match=message):
        open_one(model, ["pooled"], **config)


def test_a_size_the_model_cannot_take_is_said_so(open_one: Open) -> None:
    teacher = open_one("timm:nest_tiny", ["pooled"], sizes=[[64, 96]], device="meta")
    with pytest.raises(TeacherError, match=r"cannot run at 64 x 96.*choose other"):
        teacher.outputs((64, 96))


def test_a_model_that_meta_does_not_know_is_described_on_the_cpu(
    open_one: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = open_one("timm:test_vit", ["patch"], device="meta")
    real = type(teacher)._blueprint

    def only_cpu(self: Any, size: Any, device: str) -> Any:
        if device == "meta":
            raise NotImplementedError("no such kernel")
        return real(self, size, device)

    monkeypatch.setattr(type(teacher), "_blueprint", only_cpu)
    assert teacher.outputs((160, 160))["patch"].shape == (10, 10, 64)


def test_meta_has_shapes_alone(open_one: Open) -> None:
    teacher = open_one("timm:test_vit", ["cls"], device="meta")
    with pytest.raises(TeacherError, match="only shapes"):
        _run(teacher, _image(160, 160))
