"""Students: sizes, weights, modules from a file, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor

from manifests.recipe import StudentConfig
from student_train.errors import TrainingError
from student_train.students import Student, make_student

VIT: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
DEIT = "timm:deit_tiny_patch16_224"

CODE = '''
import torch
from torch import nn


class Map(nn.Module):
    mean = (0.1, 0.2, 0.3)
    std = torch.tensor([0.5, 0.25, 0.125]).view(3, 1, 1)

    def __init__(self, width=4):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.norm = nn.BatchNorm2d(width)

    def forward_features(self, image):
        return self.norm(self.stem(image))


class Tokens(nn.Module):
    """Tokens with a class token first and a register after it."""

    num_prefix_tokens = 2

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 2, 4))
        self.lift = nn.Linear(4, 6)

    def forward_features(self, image):
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        return torch.cat([self.cls_token.expand(len(image), -1, -1), tokens], 1)

    def forward_head(self, features, pre_logits=False):
        return self.lift(features[:, 0])


class Scalar(nn.Module):
    def forward_features(self, image):
        return image.mean()


class BadStd(Map):
    std = (1.0, 0.0, 1.0)


class Headless(nn.Module):
    pass


def number():
    return 3
'''


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two cores are shared with other test processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "code.py").write_text(CODE)
    return tmp_path


def _make(
    model: str = DEIT,
    size: tuple[int, int] | None = (32, 48),
    *,
    seed: int = 3,
    base: str | Path = ".",
    untrained: bool = False,
    **config: Any,
) -> Student:
    if model.startswith(DEIT):
        config.setdefault("args", VIT)
    made = StudentConfig(model=model, input="image", **config)
    return make_student(made, size, seed=seed, base=str(base), untrained=untrained)


def _pixels(rows: int, height: int, width: int) -> Tensor:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels)


def _same_weights(left: Student, right: Student) -> bool:
    one, two = left.model.state_dict(), right.model.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_random_weights_are_timms_own_draw() -> None:
    student = _make(DEIT, (224, 224), seed=11)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        own = timm.create_model("deit_tiny_patch16_224", num_classes=0, **VIT)
    found, expected = student.model.state_dict(), own.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_seeds_of_weights() -> None:
    assert _same_weights(_make(seed=3), _make(seed=3, weights="random"))
    assert _same_weights(_make(seed=3), _make(seed=9, weights="random:3"))
    twin = _make(seed=3, weights="random:5", untrained=True)
    assert _same_weights(twin, _make(seed=3))
    assert not _same_weights(twin, _make(seed=4))


def test_a_size_of_the_recipes_args_is_the_native_one() -> None:
    student = _make(args={**VIT, "img_size": 64}, size=(32, 48))
    assert student.native_size == (64, 64)
    assert student.args["img_size"] == 64
    positions: Any = student.model.pos_embed
    assert positions.shape == (1, 1 + 4 * 4, 48)
    assert student.grid_of((32, 48)) == (2, 3)


def test_a_student_measures_without_changing() -> None:
    student = _make("timm:test_resnet", (64, 64)).train()
    student.model.get_submodule("bn1").eval()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert student.grid_of((96, 160)) == (3, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(value, before[k]) for k, value in student.state_dict().items()
    )
    assert student.training
    assert student.model.training
    assert not student.model.get_submodule("bn1").training


def test_drop_path_works_in_training_alone() -> None:
    args = {**VIT, "drop_path_rate": 0.5}
    student, pixels = _make(args=args), _pixels(16, 32, 48)
    with torch.no_grad():
        torch.manual_seed(0)
        first, second = student.train()(pixels), student(pixels)
        assert not torch.equal(first.pooled, second.pooled)
        first, second = student.eval()(pixels), student(pixels)
        assert torch.equal(first.pooled, second.pooled)


def test_a_token_normed_after_pooling_is_normed() -> None:
    args = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    student = _make("timm:eva02_tiny_patch14_224", (28, 42), args=args).eval()
    model: Any = student.model
    with torch.no_grad():
        model.fc_norm.weight.uniform_(0.5, 2.0)
        found = student(_pixels(2, 28, 42))
        features = model.forward_features(student.normalise(_pixels(2, 28, 42)))
    token = features[:, 0].double().numpy()
    centred = token - token.mean(1, keepdims=True)
    variance = (centred**2).mean(1, keepdims=True)
    weight = model.fc_norm.weight.detach().double().numpy()
    expected = centred / np.sqrt(variance + model.fc_norm.eps) * weight
    assert np.abs(found.cls.numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped", "classifier"])
def test_weights_from_a_file(tmp_path: Path, kind: str) -> None:
    source = _make(seed=8)
    state = source.model.state_dict()
    name = "w.safetensors" if kind == "safetensors" else "w.pt"
    if kind == "safetensors":
        safetensors.torch.save_file(state, tmp_path / name)
    elif kind == "pt":
        torch.save(state, tmp_path / name)
    elif kind == "wrapped":
        torch.save({"model": source.state_dict(), "step": 3}, tmp_path / name)
    else:
        head = {"head.weight": torch.ones(10, 48), "head.bias": torch.ones(10)}
        torch.save({**state, **head}, tmp_path / name)
    found = _make(seed=1, weights=f"./{name}", base=tmp_path)
    assert _same_weights(found, source)
    twin = _make(seed=1, weights=f"./{name}", base=tmp_path, untrained=True)
    assert _same_weights(twin, _make(seed=1))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({**VIT, "depth": 3}, r"12 missing \(blocks.2.norm1.weight, .*, \.\.\.\)"),
        ({**VIT, "depth": 1}, r"12 unexpected \(blocks.1"),
        (
            {**VIT, "mlp_ratio": 2},
            r"6 of another shape \(blocks.0.mlp.fc1.weight \(192",
        ),
    ],
)
def test_weights_that_do_not_fit(
    tmp_path: Path, args: dict[str, Any], message: str
) -> None:
    torch.save(_make().model.state_dict(), tmp_path / "w.pt")
    with pytest.raises(TrainingError, match=message):
        _make(args=args, weights="w.pt", base=tmp_path)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"can be read, got /.*/gone.pt"):
        _make(weights="gone.pt", base=tmp_path)
    (tmp_path / "w.pt").write_bytes(b"no weights at all")
    with pytest.raises(TrainingError, match=r"tensors and nothing else.*w.pt"):
        _make(weights="w.pt", base=tmp_path)
    torch.save(_make(), tmp_path / "w.pt")
    with pytest.raises(TrainingError, match=r"tensors and nothing else.*w.pt"):
        _make(weights="w.pt", base=tmp_path)
    torch.save({"step": 3}, tmp_path / "w.pt")
    with pytest.raises(TrainingError, match="mapping of names to tensors"):
        _make(weights="w.pt", base=tmp_path)


@pytest.mark.parametrize("has_head", [True, False])
def test_pretrained_weights_are_taken_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_head: bool
) -> None:
    name = "test_vit.r160_in1k" if has_head else "vit_small_patch16_dinov3.lvd1689m"
    args = {} if has_head else VIT
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(21)
        full = timm.create_model(name, **args)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(full.state_dict(), path)
    monkeypatch.setattr(
        "student_train.students.try_to_load_from_cache", lambda repo, file: str(path)
    )
    found = _make(f"timm:{name}", (64, 96), args=args, weights="pretrained")
    own = found.model.state_dict()
    assert all(torch.equal(full.state_dict()[key], own[key]) for key in own)
    assert len(full.state_dict()) - len(own) == (2 if has_head else 0)
    if not has_head:
        deeper = {**args, "depth": 3}
        with pytest.raises(TrainingError, match=r"reach and fit student.args.*Miss"):
            _make(f"timm:{name}", (64, 96), args=deeper, weights="pretrained")


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("timm:resnet1O", {}, r"architectures, got 'resnet1O'; did you mean .*resnet1"),
        ("timm:test_vit.in1k", {}, r"tag that timm knows.*known: r160_in1k"),
        ("timm:hf/some", {}, r"architectures, got 'hf/some'"),
        (DEIT, {"args": {"patch": 8}}, r"'deit_tiny_patch16_224' takes.*'patch': 8.*T"),
        (DEIT, {"args": {"img_size": "64"}}, r"pixels or \[height, width\], got '64'"),
        (DEIT, {"args": {"num_classes": 3}}, r"args.num_classes is set by"),
        (DEIT, {"args": {**VIT, "global_pool": ""}}, "pool to one vector.*global_pool"),
        (DEIT, {"size": (30, 48)}, r"16 x 16, got 30 x 48; the nearest is \[32, 48\]"),
        (
            DEIT,
            {"args": {**VIT, "img_size": 64, "dynamic_img_size": False}},
            r"got 32 x 48 .* for deit_tiny.*\(AssertionError: Input height",
        ),
        (DEIT, {"weights": "random:x"}, "whole number, got 'random:x'"),
        (DEIT, {"weights": "fb_in1k"}, r"got 'fb_in1k'; a tag is part"),
        ("timm:test_vit4", {"weights": "pretrained"}, "in reach and fit|no pretrained"),
    ],
)
def test_students_that_cannot_be_had(
    model: str, config: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TrainingError, match=message):
        _make(model, **config)


def test_a_size_refused_later_is_named() -> None:
    student = _make()
    with pytest.raises(TrainingError, match="got 20 x 48"):
        student(_pixels(1, 20, 48))
    with pytest.raises(TrainingError, match="got 20 x 48"):
        student.grid_of((20, 48))


def test_pixels_of_another_kind_are_refused() -> None:
    student = _make()
    with pytest.raises(TrainingError, match=r"uint8 .*got torch.float32 \(1, 32, 48"):
        student(_pixels(1, 32, 48).float())
    with pytest.raises(TrainingError, match=r"got torch.uint8 \(1, 3, 32, 48\)"):
        student.normalise(_pixels(1, 32, 48).permute(0, 3, 1, 2))


def test_tokens_dropped_in_training_are_refused() -> None:
    student = _make(args={**VIT, "patch_drop_rate": 0.5}).train()
    with pytest.raises(TrainingError, match=r"2 x 3 tokens, got 3 .*patch_drop_rate"):
        student(_pixels(2, 32, 48))


def test_a_module_that_gives_a_map(code: Path) -> None:
    student = _make("module:code.py:Map", base=code, args={"width": 5}).eval()
    assert (student.cls_dim, student.pooled_dim, student.patch_dim) == (None, 5, 5)
    assert (student.stride, student.grid_of((64, 16))) == (8, (8, 2))
    assert student.native_size == student.size == (32, 48)
    pixels = _pixels(2, 32, 48)
    with torch.no_grad():
        found = student(pixels)
    mean, std = np.array([0.1, 0.2, 0.3]), np.array([0.5, 0.25, 0.125])
    image = (pixels.numpy() / 255 - mean) / std
    model: Any = student.model
    weight = model.stem.weight.detach().double().numpy()
    cells = image.reshape(2, 4, 8, 6, 8, 3)
    grid = np.einsum("bhywxc,ocyx->bhwo", cells, weight)
    grid = (grid + model.stem.bias.detach().double().numpy()) / np.sqrt(1 + 1e-5)
    assert np.abs(found.patch.numpy() - grid).max() < 1e-5
    assert np.abs(found.pooled.numpy() - grid.mean((1, 2))).max() < 1e-5
    assert found.cls is None


def test_a_module_that_gives_tokens(code: Path, tmp_path: Path) -> None:
    student = _make("module:./code.py:Tokens", base=code).eval()
    assert (student.cls_dim, student.pooled_dim, student.patch_dim) == (4, 6, 4)
    pixels, model = _pixels(2, 32, 48), student.model
    with torch.no_grad():
        found = student(pixels)
        tokens = model.forward_features(student.normalise(pixels)).numpy()  # type: ignore[operator]
    assert np.array_equal(found.cls.numpy(), tokens[:, 0])
    assert np.array_equal(found.patch.numpy(), tokens[:, 2:].reshape(2, 4, 6, 4))
    assert student.mean == (0.485, 0.456, 0.406)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    again = _make("module:code.py:Tokens", base=code, seed=5, weights="w.pt")
    assert _same_weights(again, student)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("code.py:Mop", {}, r"'Mop' \(modules: Map, Tokens.*did you mean Map"),
        ("gone.py:Map", {}, "file that can be read, got 'gone.py'"),
        ("code.py:Map", {"size": None}, "size must be given"),
        ("code.py:Map", {"weights": "pretrained"}, "no weights of its own"),
        ("code.py:Map", {"args": {"depth": 2}}, "built, got TypeError.*'depth'"),
        ("code.py:number", {}, "torch.nn.Module, got int"),
        ("code.py:Headless", {}, "must have forward_features"),
        ("code.py:Scalar", {}, r"one vector per image, got \(\) from forward_features"),
        ("code.py:BadStd", {}, "std must be three numbers.*positive"),
        ("code.py:Map", {"size": (4, 4)}, "got 4 x 4"),
    ],
)
def test_modules_that_cannot_be_had(
    code: Path, name: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        _make(f"module:{name}", base=code, **config)


def test_a_model_without_a_grid_says_so() -> None:
    student = _make("timm:crossvit_tiny_240", None, args={"depth": [[1, 1, 0]]})
    assert (student.patch_dim, student.cls_dim) == (None, None)
    with pytest.raises(TrainingError, match="'crossvit_tiny_240' has no grid"):
        student.grid_of((240, 240))
