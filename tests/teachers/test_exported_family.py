"""Exported programs as teachers: what they give, and what cannot be one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from teachers import registry, weights
from teachers.code import code_digest
from teachers.errors import TeacherError
from teachers.interface import GroupInput, TeacherRequest
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]
Make = Callable[..., TeacherRequest]

FRONT = GroupInput("front", "image")
SWEEP = GroupInput("lidar", "points", columns=("x", "y", "z", "intensity"))


class Net(nn.Module):
    """A small net with a tuple, a dict, tokens, dropout and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> dict[str, Any]:
        grid = self.drop(self.norm(self.stem(image)))
        return {
            "grid": grid,
            "pair": (self.head(grid.mean((2, 3))), grid.flatten(2).transpose(1, 2)),
        }


class Rig(nn.Module):
    """Looks at an image and a sweep together; the order of them matters."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Linear(4, 6)

    def forward(self, image: Tensor, sweep: Tensor) -> tuple[Tensor, Tensor]:
        points = self.points(sweep).to(image.dtype)
        return image.mean((2, 3)) + points.amax(1)[:, :3], points


class Named(nn.Module):
    """Takes its input by name."""

    def forward(self, *, image: Tensor) -> Tensor:
        return image


class Noisy(nn.Module):
    """Draws numbers."""

    def forward(self, image: Tensor) -> Tensor:
        return image + torch.rand_like(image)


class Attending(nn.Module):
    """Has an operator that draws numbers only where it drops something."""

    def __init__(self, dropped: float) -> None:
        super().__init__()
        self.dropped = dropped

    def forward(self, image: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        return attend(image, image, image, dropout_p=self.dropped)


class Summed(nn.Module):
    """Gives one row for all of a batch."""

    def forward(self, image: Tensor) -> Tensor:
        return image.sum(0, keepdim=True)


def _net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad():
        for value in (*model.norm.parameters(), model.norm.running_var):
            assert value is not None
            value.uniform_(0.5, 2)
    return model


def _export(model: nn.Module, path: Path, *inputs: Tensor, **dims: Any) -> None:
    """Exports ``model``; the first axis of every input may be ``batch``."""
    batch = dims.get("batch", Dim("batch"))
    shapes = tuple({0: batch} for _ in inputs) if batch else None
    program = torch.export.export(model, inputs, dynamic_shapes=shapes)
    torch.export.save(program, path)


IMAGE = torch.zeros(2, 3, 8, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with programs that tests read."""
    path = tmp_path_factory.mktemp("programs")
    _export(_net(), path / "net.pt2", IMAGE)
    _export(_net(), path / "four.pt2", torch.zeros(4, 3, 8, 12), batch=None)
    three = torch.zeros(3, 3, 8, 12)
    _export(_net(), path / "to_eight.pt2", three, batch=Dim("batch", min=3, max=8))
    _export(_net().to(torch.bfloat16), path / "bf16.pt2", IMAGE.to(torch.bfloat16))
    torch.manual_seed(1)
    _export(Rig(), path / "rig.pt2", IMAGE, torch.zeros(2, 5, 4))
    return path


def _open(open_one: Open, folder: Path, outputs: Any, **config: Any) -> TorchTeacher:
    name = config.pop("name", "net.pt2")
    defaults: dict[str, Any] = {
        "weights": None,
        "sizes": [[8, 12]],
        "base": str(folder),
    }
    return open_one(f"exported:./{name}", outputs, **{**defaults, **config})


def _image(rows: int) -> Tensor:
    return torch.randn(rows, 3, 8, 12, generator=torch.Generator().manual_seed(rows))


def _forward(teacher: TorchTeacher, image: Tensor) -> dict[str, Tensor]:
    return teacher.forward({"image": image}, (8, 12))


OUTPUTS: dict[str, Any] = {
    "patch": {"from": "output[grid]"},
    "logits": {"from": "output[pair][0]"},
    "layer0": {"from": "output[pair][1]", "layout": "nlc", "grid": (2, 3)},
    "level0": {"from": "output[grid]", "pool": (2, 1)},
}


@pytest.mark.parametrize(
    ("name", "batch"), [("net.pt2", None), ("four.pt2", 4), ("to_eight.pt2", 8)]
)
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_outputs_are_the_models_own(
    open_one: Open, folder: Path, name: str, batch: int | None, rows: int
) -> None:
    teacher = _open(open_one, folder, OUTPUTS, name=name, batch=batch)
    image = _image(rows)
    with torch.inference_mode():
        own = _net()(image)
    found = _forward(teacher, image)
    grid = own["grid"].permute(0, 2, 3, 1)
    # Another batch may take another kernel.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(found["patch"], grid, **close)
    torch.testing.assert_close(found["logits"], own["pair"][0], **close)
    torch.testing.assert_close(found["layer0"], grid, **close)
    torch.testing.assert_close(found["level0"], grid.mean(1, keepdim=True), **close)


def test_it_is_described_without_its_weights(open_one: Open, folder: Path) -> None:
    declared = _open(open_one, folder, OUTPUTS, device="meta")
    live = _open(open_one, folder, OUTPUTS)
    assert declared.outputs((8, 12)) == live.outputs((8, 12))
    shapes = {name: spec.shape for name, spec in live.outputs((8, 12)).items()}
    assert shapes == {
        "patch": (2, 3, 8),
        "logits": (5,),
        "layer0": (2, 3, 8),
        "level0": (1, 3, 8),
    }
    # Two operations for each weight of the convolution at each of six cells, and for
    # each of the classifier's.
    assert live.cost((8, 12)).flops == 2 * 6 * (3 * 4 * 4 * 8) + 2 * 8 * 5
    four = _open(open_one, folder, OUTPUTS, name="four.pt2", batch=4, device="meta")
    assert four.cost((8, 12)).flops == live.cost((8, 12)).flops


def test_threads_do_not_see_each_other(open_one: Open, folder: Path) -> None:
    teacher = _open(open_one, folder, {"patch": OUTPUTS["patch"]})
    teacher.load()
    images = [_image(1 + number % 3) for number in range(24)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda item: _forward(teacher, item), images))
    for image, found in zip(images, together, strict=True):
        assert torch.equal(found["patch"], _forward(teacher, image)["patch"])


def test_precision_is_the_programs_own(open_one: Open, folder: Path) -> None:
    config = {"name": "bf16.pt2", "outputs": {"patch": OUTPUTS["patch"]}}
    teacher = _open(open_one, folder, **config, precision="bfloat16")
    image = _image(2).to(torch.bfloat16)
    with torch.inference_mode():
        own = _net().to(torch.bfloat16)(image)["grid"]
    found = _forward(teacher, image)["patch"]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, own.permute(0, 2, 3, 1))
    assert teacher.facts.parameter_bytes == 2 * teacher.facts.num_parameters
    with pytest.raises(TeacherError, match=r"own, got float32 for.*precision: bfloat1"):
        _open(open_one, folder, **config)


def test_several_inputs_in_the_order_of_the_group(open_one: Open, folder: Path) -> None:
    config: dict[str, Any] = {
        "name": "rig.pt2",
        "outputs": {"pooled": {"from": "output[0]"}, "points": {"from": "output[1]"}},
        "preprocess": {"points": 5, "columns": ("x", "y", "z", "intensity")},
    }
    teacher = _open(open_one, folder, **config, group=(FRONT, SWEEP))
    batch = {"lidar": torch.randn(3, 5, 4), "front": _image(3)}
    torch.manual_seed(1)
    with torch.inference_mode():
        own = Rig()(batch["front"], batch["lidar"])
    found = teacher.forward(batch, (8, 12))
    torch.testing.assert_close(found["pooled"], own[0])
    torch.testing.assert_close(found["points"], own[1])
    with pytest.raises(TeacherError, match=r"exported with, got lidar \('batch', 5, 4"):
        _open(open_one, folder, **config, group=(SWEEP, FRONT))
    with pytest.raises(TeacherError, match=r"its 2 inputs \(image \(batch, 3, 8, 12\)"):
        _open(open_one, folder, **{**config, "preprocess": {}}, group=(FRONT,))


def test_points_stay_exact_beside_images_of_less(
    open_one: Open, tmp_path: Path
) -> None:
    inputs = (IMAGE.to(torch.bfloat16), torch.zeros(2, 5, 4))
    _export(Rig(), tmp_path / "mixed.pt2", *inputs)
    teacher = open_one(
        "exported:mixed.pt2",
        {"pooled": {"from": "output[0]"}},
        group=(FRONT, SWEEP),
        weights=None,
        sizes=[[8, 12]],
        precision="bfloat16",
        preprocess={"points": 5, "columns": ("x", "y", "z", "intensity")},
    )
    specs: Any = teacher.inputs((8, 12))
    assert specs["lidar"].exact
    assert teacher.outputs((8, 12))["pooled"].dtype == "bfloat16"


def test_what_is_recorded(make_request: Make, open_one: Open, folder: Path) -> None:
    request = make_request(
        "exported:net.pt2", OUTPUTS, weights=None, base=str(folder), sizes=[[8, 12]]
    )
    record = registry.find_weights(request)
    data = (folder / "net.pt2").read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    assert (record.kind, record.url) == ("file", str(folder / "net.pt2"))
    assert (record.sha256, record.size_bytes) == (sha256, len(data))
    facts = _open(open_one, folder, OUTPUTS, device="meta", license="mit").facts
    assert (facts.code_sha256, facts.license) == (sha256, "mit")
    net = _net()
    assert facts.num_parameters == sum(item.numel() for item in net.parameters())


def test_its_place_is_no_part_of_what_it_is(
    open_one: Open, folder: Path, tmp_path: Path
) -> None:
    here = _open(open_one, folder, OUTPUTS, device="meta").facts
    (tmp_path / "moved.pt2").write_bytes((folder / "net.pt2").read_bytes())
    there = _open(open_one, tmp_path, OUTPUTS, device="meta", name="moved.pt2").facts
    assert (there.model, there.code_sha256) == (here.model, here.code_sha256)
    assert here.model is not None


def test_changed_bytes_are_noticed_and_unchanged_ones_not_read_again(
    make_request: Make, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.pt2"
    file.write_bytes((folder / "net.pt2").read_bytes())
    request = make_request("exported:p.pt2", OUTPUTS, weights=None, sizes=[[8, 12]])
    first = registry.find_weights(request)
    monkeypatch.setattr(weights, "digest", lambda url: "read again")
    assert registry.find_weights(request, first) is first
    # The record of its weights has the digest: it is not read twice for its code.
    assert code_digest(request) is None
    file.write_bytes((folder / "four.pt2").read_bytes())
    assert registry.find_weights(request, first).sha256 == "read again"


def test_a_program_in_a_store(open_one: Open, folder: Path) -> None:
    url = "memory://programs/net.pt2"
    with fsspec.open(url, "wb") as file:
        file.write((folder / "net.pt2").read_bytes())
    there = open_one(f"exported:{url}", OUTPUTS, weights=None, sizes=[[8, 12]])
    here = _open(open_one, folder, OUTPUTS)
    image = _image(2)
    assert torch.equal(_forward(there, image)["patch"], _forward(here, image)["patch"])


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gone.pt2", {}, r"must be a file that can be read.*gone\.pt2"),
        ("text.pt2", {}, r"must be a program that torch\.export\.save wrote"),
        ("net.pt2", {"weights": "random"}, "weights must be left out for exported:"),
        ("net.pt2", {"args": {"a": 1}}, "args must be empty"),
        ("net.pt2", {"sizes": None}, "sizes must be given"),
        ("net.pt2", {"sizes": [[8, 8]]}, r"sizes must be those.*got image.*8, 8\)"),
        ("net.pt2", {"method": "features"}, "method has no effect on a program"),
        (
            "net.pt2",
            {"outputs": {"patch": {"from": "stem"}}},
            "no submodules, got 'stem'",
        ),
        ("net.pt2", {"outputs": {"patch": {}}}, r"has \[grid\].*\[pair\] tuple"),
        ("net.pt2", {"outputs": {"patch": {"norm": "pre"}}}, "norm has no effect"),
        ("four.pt2", {}, "batch must be 4, the fixed batch.*got None; give `batch: 4`"),
        ("four.pt2", {"batch": 8}, "batch must be 4, the fixed batch"),
        ("to_eight.pt2", {}, "batch must be at most 8.*got None; give `batch: 8`"),
        ("to_eight.pt2", {"batch": 9}, "batch must be at most 8"),
    ],
)
def test_what_a_job_may_not_ask(
    open_one: Open, folder: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    (folder / "text.pt2").write_text("no program")
    config = {"outputs": OUTPUTS, **changes}
    with pytest.raises(TeacherError, match=message):
        _open(open_one, folder, name=name, **config, device="meta").outputs((8, 12))


class Trained(nn.Module):
    """A part that does something else while it is trained."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, image: Tensor) -> Tensor:
        return self.part(image).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Trained(nn.BatchNorm2d(3)), "whenever it runs, got aten"),
        (
            Trained(nn.BatchNorm2d(3, track_running_stats=False)),
            r"got aten\.batch_norm",
        ),
        (Trained(nn.Dropout()), r"got aten\.dropout"),
        (Attending(0.25), r"got aten\.scaled_dot_product_attention"),
        (Noisy(), r"got aten\.rand_like"),
        (Named(), "each by position, got image; export it with `args` alone"),
    ],
)
def test_programs_that_are_no_teachers(
    open_one: Open, tmp_path: Path, model: nn.Module, message: str
) -> None:
    is_named = isinstance(model, Named)
    program = torch.export.export(
        model, () if is_named else (IMAGE,), {"image": IMAGE} if is_named else {}
    )
    torch.export.save(program, tmp_path / "p.pt2")
    with pytest.raises(TeacherError, match=message):
        _open(open_one, tmp_path, {"patch": {}}, name="p.pt2", batch=2)


def test_attention_that_drops_nothing_is_a_teacher(
    open_one: Open, tmp_path: Path
) -> None:
    _export(Attending(0.0), tmp_path / "p.pt2", IMAGE)
    teacher = _open(open_one, tmp_path, {"patch": {}}, name="p.pt2")
    image = _image(3)
    expected = Attending(0.0)(image).permute(0, 2, 3, 1)
    torch.testing.assert_close(_forward(teacher, image)["patch"], expected)


def test_rows_must_come_out_as_they_went_in(open_one: Open, tmp_path: Path) -> None:
    _export(Summed(), tmp_path / "p.pt2", IMAGE, batch=None)
    teacher = _open(open_one, tmp_path, {"patch": {}}, name="p.pt2", batch=2)
    with pytest.raises(TeacherError, match=r"a row for each of the 2 .*got \[1, 8, 12"):
        _forward(teacher, _image(2))


def test_describe(folder: Path) -> None:
    facts = registry.describe("exported:four.pt2", str(folder))
    data = (folder / "four.pt2").read_bytes()
    assert facts["code_sha256"] == hashlib.sha256(data).hexdigest()
    assert facts["size_bytes"] == len(data)
    assert facts["inputs"] == {"image": "image (batch, 3, 8, 12) torch.float32"}
    assert facts["outputs"] == {
        "output[grid]": [8, 2, 3],
        "output[pair][0]": [5],
        "output[pair][1]": [6, 8],
    }
    assert facts["batch"] == 4
    ranged = registry.describe("exported:to_eight.pt2", str(folder))
    assert ranged["batch"] == "3 to 8"
    assert registry.describe("exported:net.pt2", str(folder))["batch"] == "any"
    with pytest.raises(TeacherError, match="must be a file that can be read"):
        registry.describe("exported:gone.pt2", str(folder))
