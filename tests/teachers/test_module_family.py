"""Modules from a file: what is tapped, what is refused, and the real small teachers."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teachers.errors import TeacherError
from teachers.interface import GroupInput
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]

pytestmark = pytest.mark.usefixtures("net_file")


def _image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))


def _import(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("imported_for_test", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _net(open_one: Open, outputs: Any, **config: Any) -> TorchTeacher:
    config = {"sizes": [[8, 12]], "method": "features", **config}
    return open_one("module:./net.py:Net", outputs, **config)


def _run(teacher: TorchTeacher, image: Tensor) -> dict[str, Tensor]:
    return teacher.forward({"image": image}, teacher.sizes[0])


def test_outputs_are_the_modules_own(open_one: Open) -> None:
    outputs = {
        "pooled": {"from": "output[logits]"},
        "patch": {"from": "output['grid']"},
        "level0": {"from": "output[pair][0]"},
        "layer0": {"from": "output[pair][1]", "layout": "nlc", "grid": (2, 3)},
        "level1": {"from": "block.0"},
        "logits": {"from": "head"},
    }
    teacher = _net(open_one, outputs)
    image = _image(8, 12)
    found, model = _run(teacher, image), teacher.model((8, 12))
    with torch.inference_mode():
        own = model.features(image)  # type: ignore[operator]
        inner = model.block[0](model.stem(image))  # type: ignore[index,operator]
    assert torch.equal(found["pooled"], own["logits"])
    assert torch.equal(found["logits"], own["logits"])
    assert torch.equal(found["patch"], own["grid"].permute(0, 2, 3, 1))
    assert torch.equal(found["level0"], own["pair"][0].permute(0, 2, 3, 1))
    assert torch.equal(found["layer0"], own["pair"][1].reshape(2, 2, 3, 4))
    assert torch.equal(found["level1"], inner.permute(0, 2, 3, 1))
    assert {name: spec.kind for name, spec in teacher.outputs((8, 12)).items()} == {
        "pooled": "vector",
        "patch": "grid",
        "level0": "grid",
        "layer0": "grid",
        "level1": "grid",
        "logits": "vector",
    }


def test_forward_is_the_default(open_one: Open) -> None:
    teacher = _net(open_one, ["logits"], method="forward", args={"width": 6})
    with torch.inference_mode():
        expected = teacher.model((8, 12))(_image(8, 12))
    assert torch.equal(_run(teacher, _image(8, 12))["logits"], expected)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({}, r"which tensor of output.*\[grid\] \[1, 4, 2, 3\], \[pair\] tuple, \[log"),
        (
            {"from": "output[pair]"},
            r"which tensor of output\[pair\].*\[0\] \[1, 4, 2, 3\], \[1\] \[1, 6, 4\]",
        ),
        ({"from": "output[pair][2]"}, r"got \[2\] of output\[pair\], which has \[0\]"),
        (
            {"from": "output[grid][0]"},
            r"nothing: it is a tensor of shape \[1, 4, 2, 3\]",
        ),
        ({"from": "output[gird]"}, r"got \[gird\] of output"),
        ({"from": "blok"}, r"got 'blok' \(at the top: stem.*did you mean block"),
        ({"from": "unused"}, "'unused', called 0 times"),
        ({"from": "twice"}, "'twice', called 2 times"),
        ({"from": "output["}, r"from must be `output` or a submodule's path"),
        ({"from": "output[pair][1]"}, "give `layout: nlc` and `grid"),
        ({"from": "head", "layout": "nchw"}, "for layout nchw"),
        (
            {"from": "output[pair][1]", "layout": "nlc", "grid": (2, 2)},
            "H x W = 6 tokens",
        ),
        ({"from": "block", "grid": (2, 3)}, "grid is for layout nlc"),
        ({"from": "block", "norm": "pre"}, "norm has no effect"),
        ({"from": "head", "pool": (2, 2)}, "pool is for grids"),
    ],
)
def test_outputs_that_cannot_be_had(
    open_one: Open, output: dict[str, Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        _net(open_one, {"patch": output}, device="meta").outputs((8, 12))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("module:net.py", {}, "must be module:FILE:CLASS"),
        ("module:gone.py:Net", {}, r"'gone.py' \(cannot read /.*/gone.py"),
        ("module:net.py:Nat", {}, r"'Nat' \(modules: Net, Rig\); did you mean Net"),
        ("module:net.py:not_a_module", {}, "must be a torch.nn.Module, got int"),
        ("module:net.py:Net", {"args": {"depth": 2}}, "TypeError.*'depth'"),
        ("module:net.py:Net", {"method": "extract"}, r"'extract'.*features"),
        ("module:net.py:Net", {"sizes": None}, "sizes must be given"),
        ("module:net.py:Net", {"weights": None}, "got nothing"),
        ("module:net.py:Net", {"weights": "webli"}, "got 'webli'"),
        ("module:bad.py:Net", {}, "bad.py must load, got ZeroDivisionError at line 2"),
    ],
)
def test_modules_that_cannot_be_had(
    open_one: Open, tmp_path: Path, model: str, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "bad.py").write_text("one = 1\n1 / 0\n")
    with pytest.raises(TeacherError, match=message):
        open_one(model, ["logits"], **{"sizes": [[8, 8]], **config})


def test_code_is_recorded_and_stays_out_of_the_way(
    open_one: Open, net_file: Path
) -> None:
    before = set(sys.modules)
    teacher = _net(open_one, {"logits": {"from": "head"}}, device="meta")
    sha256 = hashlib.sha256(net_file.read_bytes()).hexdigest()
    assert teacher.facts.code_sha256 == sha256
    assert set(sys.modules) - before <= {f"teachonce_module_{sha256[:16]}"}


def test_a_group_is_called_by_name(open_one: Open) -> None:
    group = (
        GroupInput("lidar", "points", columns=("x", "y", "z", "intensity")),
        GroupInput("front", "image"),
    )
    teacher = open_one(
        "module:net.py:Rig",
        {"pooled": {"from": "output[0]"}, "embed": {"from": "output[1]"}},
        group=group,
        sizes=[[4, 6]],
        preprocess={"points": 5},
    )
    inputs = teacher.inputs((4, 6))
    assert {name: spec.kind for name, spec in inputs.items()} == {
        "lidar": "points",
        "front": "image",
    }
    batch = {"lidar": torch.randn(2, 5, 3), "front": _image(4, 6)}
    found = teacher.forward(batch, (4, 6))
    model: Any = teacher.model((4, 6))
    with torch.inference_mode():
        expected = model(lidar=batch["lidar"], front=batch["front"])
    assert torch.equal(found["pooled"], expected[0])
    assert torch.equal(found["embed"], expected[1])


def test_random_weights_are_a_function_of_the_seed(open_one: Open) -> None:
    outputs = {"logits": {"from": "head"}}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = _run(_net(open_one, outputs), _image(8, 12))["logits"]
    assert torch.equal(torch.get_rng_state(), before)
    again = _run(_net(open_one, outputs), _image(8, 12))["logits"]
    other = _run(_net(open_one, outputs, weights="random:9"), _image(8, 12))["logits"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_load_strictly(open_one: Open, tmp_path: Path, net_file: Path) -> None:
    torch.manual_seed(5)
    model = _import(net_file).Net()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    teacher = _net(open_one, ["logits"], method="forward", weights="w.pt")
    with torch.inference_mode():
        expected = model.eval()(_image(8, 12))
    assert torch.equal(_run(teacher, _image(8, 12))["logits"], expected)
    wider = _net(
        open_one, ["logits"], method="forward", weights="w.pt", args={"width": 5}
    )
    with pytest.raises(TeacherError, match=r"of another shape \(stem.weight"):
        wider.model((8, 12))


def test_keys_rename_a_checkpoint(
    open_one: Open, tmp_path: Path, net_file: Path
) -> None:
    torch.manual_seed(5)
    model = _import(net_file).Net()
    state = {f"net.{key}": value for key, value in model.state_dict().items()}
    torch.save(state | {"ema.x": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(TeacherError, match=r"with `keys: {'\^net\\.': '', '\^ema"):
        _net(open_one, ["logits"], method="forward", weights="w.pt").model((8, 12))
    keys = {r"^net\.": "", r"^ema\.": None}
    teacher = _net(open_one, ["logits"], method="forward", weights="w.pt", keys=keys)
    with torch.inference_mode():
        expected = model.eval()(_image(8, 12))
    assert torch.equal(_run(teacher, _image(8, 12))["logits"], expected)


def test_cifar_resnet_gives_its_own_logits(open_one: Open, shared_data: Path) -> None:
    folder = shared_data / "cifar10-teachers"
    teacher = open_one(
        "module:./cifar_resnet.py:CifarResNet",
        {"logits": {}, "patch": {"from": "layer3"}},
        base=str(folder),
        weights="./resnet20.pt",
        sizes=[[32, 32]],
        args={"depth": 20},
    )
    own = _import(folder / "cifar_resnet.py")
    model = own.load_teacher(str(folder / "resnet20.pt"), 20)
    image = _image(32, 32)
    found = _run(teacher, image)
    with torch.inference_mode():
        features = model.features(image)
    assert torch.equal(found["logits"], features["logits"])
    assert torch.equal(found["patch"], features["stage3"].permute(0, 2, 3, 1))
    assert teacher.facts.num_parameters == 269_722


DRIVING = {"channels": "bgr", "range": 255, "divide": 255}


def test_espnet_gives_its_own_maps(open_one: Open, shared_data: Path) -> None:
    folder = shared_data / "driving-teachers"
    own = _import(folder / "driving_teachers.py")
    teacher = open_one(
        "module:./driving_teachers.py:CameraSegTeacher",
        {"patch": {"from": "encoder[2]"}, "logits": {"from": "output"}},
        base=str(folder),
        args={"q": 8},
        weights="./espnet-p2q8-cityscapes.pt",
        sizes=[[64, 128]],
        preprocess={**DRIVING, "mean": own.BGR_MEAN, "std": own.BGR_STD},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 128, 3), dtype=np.uint8)
    spec = teacher.inputs((64, 128))["image"]
    image = spec.to_tensor(pixels, "cpu", torch.float32)
    assert torch.allclose(
        image, own.camera_preprocess(torch.from_numpy(pixels)), rtol=0, atol=1e-8
    )
    net = own.CameraSegTeacher(q=8)
    model = own.load(net, str(folder / "espnet-p2q8-cityscapes.pt"))
    found = _run(teacher, image)
    with torch.inference_mode():
        features = model.features(image)
    assert found["patch"].shape == (2, 8, 16, 256)
    assert torch.equal(found["patch"], features["eighth"].permute(0, 2, 3, 1))
    assert torch.equal(found["logits"], features["logits"].permute(0, 2, 3, 1))


def test_pointnet_gives_its_own_vectors(open_one: Open, shared_data: Path) -> None:
    folder = shared_data / "driving-teachers"
    own = _import(folder / "driving_teachers.py")
    teacher = open_one(
        "module:./driving_teachers.py:PointTeacher",
        {"pooled": {"from": "output[global]"}, "logits": {"from": "output[logits]"}},
        base=str(folder),
        group=(GroupInput("lidar", "points", columns=("x", "y", "z", "intensity")),),
        method="features",
        weights="./pointnet-modelnet40.pt",
        preprocess={"points": 256, "centre": True, "unit_sphere": True},
    )
    assert teacher.sizes == (None,)
    points = torch.randn(2, 256, 3)
    model = own.load(own.PointTeacher(), str(folder / "pointnet-modelnet40.pt"))
    found = teacher.forward({"lidar": points}, None)
    with torch.inference_mode():
        features = model.features(points)
    assert torch.equal(found["pooled"], features["global"])
    assert torch.equal(found["logits"], features["logits"])
