"""Students as teachers: folders that name a loader, of one input or several."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teachers import registry
from teachers.code import code_digest
from teachers.errors import TeacherError
from teachers.interface import GroupInput, TeacherRequest
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]
Make = Callable[..., TeacherRequest]

SWEEP = GroupInput("lidar", "points", columns=("x", "y", "z", "intensity"))
FRONT, BACK = GroupInput("front", "image"), GroupInput("back", "image")
LOADER = '''
import json
from pathlib import Path

import torch
from torch import nn


class Rig(nn.Module):
    """Looks at two cameras and a sweep; one sequence of tokens out."""

    def __init__(self, width):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 8, 8)
        self.points = nn.Linear(4, width)

    def forward(self, front, back, lidar):
        maps = [self.stem(front), self.stem(back)]
        tokens = torch.cat([one.flatten(2) for one in maps], 2).transpose(1, 2)
        sweep = self.points(lidar).amax(1)
        return {"tokens": tokens + sweep[:, None], "sweep": sweep, "front": maps[0]}


class One(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 8, 8)

    def forward(self, image):
        return self.stem(image)


def make(folder):
    args = json.loads((Path(folder) / "config.json").read_text())["args"]
    return Rig(args["width"])


def make_one(folder):
    return One()


def make_from_list(folder):
    return Rig(len((Path(folder) / "words.txt").read_text().split()))


def greedy(folder):
    return (Path(folder) / "model.safetensors").read_bytes()
'''
RIG: dict[str, Any] = {
    "loader": "model.py:make",
    "args": {"width": 6},
    "inputs": {
        "image": {"size": [16, 24], "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]},
        "points": {"points": 5, "columns": ["x", "y", "z", "intensity"]},
    },
    "outputs": {
        "tokens": {"from": "output[tokens]", "layout": "nlc", "grid": [4, 3]},
        "sweep": {"from": "output[sweep]"},
    },
    "license": "cc-by-nc-4.0",
}
GROUP = (FRONT, BACK, SWEEP)


def _module(make: str, path: Path) -> Any:
    """Returns what a loader's code makes, run without ours."""
    space: dict[str, Any] = {}
    exec((path / "model.py").read_text(), space)
    return space[make](str(path))


@pytest.fixture
def rig(tmp_path: Path) -> Path:
    """Returns the folder of a student that looks at three inputs together."""
    return _write_rig(tmp_path / "rig")


def _write_rig(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(LOADER)
    (folder / "config.json").write_text(json.dumps({**RIG, **changes}))
    torch.manual_seed(5)
    save_file(_module("make", folder).state_dict(), folder / "model.safetensors")
    return folder


def _batch(teacher: TorchTeacher) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(2, *spec.blank("meta").shape[1:], generator=generator)
        for name, spec in teacher.inputs(teacher.sizes[0]).items()
    }


@pytest.mark.parametrize("place", ["rig", "memory://students/rig"])
def test_several_inputs_together(open_one: Open, rig: Path, place: str) -> None:
    _upload(rig, "memory://students/rig")
    outputs = {"tokens": {}, "sweep": {}, "front": {"from": "output[front]"}}
    teacher = open_one(f"student:{place}", outputs, weights=None, group=GROUP)
    assert teacher.sizes == ((16, 24),)
    specs: Any = teacher.inputs((16, 24))
    assert (specs["back"].mean, specs["back"].std) == ((0.4,) * 3, (0.2,) * 3)
    assert specs["front"].interpolation == "bicubic"
    assert (specs["lidar"].num_points, specs["lidar"].indices) == (5, (0, 1, 2, 3))
    batch = _batch(teacher)
    model = _module("make", rig)
    model.load_state_dict(load_file(rig / "model.safetensors"))
    with torch.inference_mode():
        expected = model(**batch)
    found = teacher.forward(batch, (16, 24))
    assert torch.equal(found["tokens"], expected["tokens"].reshape(2, 4, 3, 6))
    assert torch.equal(found["sweep"], expected["sweep"])
    assert torch.equal(found["front"], expected["front"].permute(0, 2, 3, 1))


def test_a_job_may_say_otherwise(open_one: Open, rig: Path) -> None:
    outputs = {
        "tokens": {"grid": (2, 6)},
        "sweep": {"from": "output[tokens]", "layout": "nlc", "grid": (6, 2)},
    }
    teacher = open_one(
        "student:rig",
        outputs,
        weights=None,
        group=GROUP,
        sizes=[[8, 48]],
        preprocess={"points": 9, "interpolation": "nearest"},
        device="meta",
    )
    specs: Any = teacher.inputs((8, 48))
    assert specs["lidar"].num_points == 9
    assert specs["lidar"].columns == ("x", "y", "z", "intensity")
    assert (specs["front"].interpolation, specs["front"].std) == ("nearest", (0.2,) * 3)
    shapes = {name: spec.shape for name, spec in teacher.outputs((8, 48)).items()}
    assert shapes == {"tokens": (2, 6, 6), "sweep": (6, 2, 6)}


def test_what_is_recorded_of_a_loader(open_one: Open, rig: Path) -> None:
    def facts() -> Any:
        return open_one(
            "student:rig", ["sweep"], weights=None, group=GROUP, device="meta"
        ).facts

    first = facts()
    code = (rig / "model.py").read_bytes()
    assert first.code_sha256 == hashlib.sha256(code).hexdigest()
    assert first.license == "cc-by-nc-4.0"
    assert first.num_parameters == 3 * 8 * 8 * 6 + 6 + 4 * 6 + 6
    _write_rig(rig, teachonce={"steps": 7})
    assert facts().model == first.model
    outputs = {**RIG["outputs"], "sweep": {"from": "output[front]"}}
    _write_rig(rig, outputs=outputs)
    assert facts().model != first.model


def test_a_loaders_code_is_part_of_its_digest(make_request: Make, rig: Path) -> None:
    request = make_request("student:rig", ["sweep"], weights=None, group=GROUP)
    first = code_digest(request)
    with (rig / "model.py").open("a") as file:
        file.write("# more\n")
    second = code_digest(request)
    assert second != first
    _write_rig(rig, loader="model.py:make_from_list", files=["words.txt"])
    (rig / "words.txt").write_text("a b c d e f")
    third = code_digest(request)
    (rig / "words.txt").write_text("f e d c b a")
    assert len({first, second, third, code_digest(request)}) == 4


def test_a_loader_sees_what_is_digested_and_nothing_else(
    open_one: Open, rig: Path
) -> None:
    (rig / "words.txt").write_text("a b c d e f")
    outputs, group = ["sweep"], GROUP
    _write_rig(rig, loader="model.py:make_from_list")
    with pytest.raises(TeacherError, match=r"`files` that it lists, got FileNotFound"):
        open_one("student:rig", outputs, weights=None, group=group)
    _write_rig(rig, loader="model.py:make_from_list", files=["words.txt"])
    teacher = open_one("student:rig", outputs, weights=None, group=group)
    assert teacher.forward(_batch(teacher), (16, 24))["sweep"].shape == (2, 6)
    _write_rig(rig, loader="model.py:greedy")
    with pytest.raises(TeacherError, match=r"got FileNotFound.*model\.safetensors"):
        open_one("student:rig", outputs, weights=None, group=group)


def test_one_input_is_given_by_position(open_one: Open, tmp_path: Path) -> None:
    folder = tmp_path / "one"
    inputs = {"image": {"size": [16, 24]}}
    outputs = {"patch": {}}
    _write_rig(folder, loader="model.py:make_one", inputs=inputs, outputs=outputs)
    model = _module("make_one", folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    teacher = open_one(
        "student:one", ["patch"], weights=None, group=(GroupInput("any", "image"),)
    )
    image = _image(16, 24)
    with torch.inference_mode():
        expected = model(image).permute(0, 2, 3, 1)
    assert torch.equal(teacher.forward({"any": image}, (16, 24))["patch"], expected)


def test_weights_of_a_loader_are_strict(open_one: Open, rig: Path) -> None:
    save_file({"stem.bias": torch.ones(6)}, rig / "model.safetensors")
    teacher = open_one("student:rig", ["sweep"], weights=None, group=GROUP)
    with pytest.raises(TeacherError, match=r"3 missing \(stem\.weight"):
        teacher.load()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"outputs": ["token"]},
            r"token must be one of this student's \(tokens, sweep\).*did you mean",
        ),
        ({"group": (GroupInput("clip", "clip", frames=2),)}, r"image or points.*clip"),
        ({"preprocess": {"geometry": "teacher"}}, r"geometry must be view for student"),
        ({"outputs": {"sweep": {"norm": "pre"}}}, r"sweep\.norm has no effect"),
    ],
)
def test_what_a_job_may_not_ask_of_a_loader(
    open_one: Open, rig: Path, changes: dict[str, Any], message: str
) -> None:
    config = {"outputs": ["sweep"], "group": GROUP, "weights": None, **changes}
    with pytest.raises(TeacherError, match=message):
        open_one("student:rig", **config, device="meta")


def _image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))


def _upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        with fsspec.open(f"{url}/{path.name}", "wb") as file:
            file.write(path.read_bytes())


def test_describe(rig: Path) -> None:
    facts = registry.describe("student:rig", str(rig.parent))
    assert facts["inputs"]["points"]["points"] == 5
    assert facts["outputs"]["tokens"]["from"] == "output[tokens]"
    assert facts["num_parameters"] == 1188
    assert facts["license"] == "cc-by-nc-4.0"
    with pytest.raises(TeacherError, match="student's folder"):
        registry.describe("student:gone", str(rig))
