"""Students as teachers: folders in timm's hub form."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from teachers import registry, weights
from teachers.code import code_digest
from teachers.errors import TeacherError
from teachers.interface import GroupInput, TeacherRequest
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]
Make = Callable[..., TeacherRequest]

SWEEP = GroupInput("lidar", "points", columns=("x", "y", "z", "intensity"))
FRONT, BACK = GroupInput("front", "image"), GroupInput("back", "image")
VIT: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
RECORD: dict[str, Any] = {
    "input_size": [3, 32, 48],
    "interpolation": "bilinear",
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "fixed_input_size": True,
    "custom_load": False,
    "num_classes": 0,
}


def _write(folder: Path, architecture: str, args: dict[str, Any], **more: Any) -> Path:
    """Writes a folder in timm's hub form, with weights drawn from a seed."""
    folder.mkdir(exist_ok=True)
    fields: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": 0,
        "model_args": args,
        "pretrained_cfg": RECORD,
        **more,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    torch.manual_seed(3)
    model = timm.create_model(
        architecture, **{"num_classes": fields["num_classes"], **args}
    )
    for value in model.state_dict().values():
        # Norms begin as ones and zeros, whose mixing up no test would see.
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.2 + 0.05)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """Returns the folder of a small transformer that runs at any size."""
    args = {**VIT, "img_size": [32, 48], "dynamic_img_size": True}
    record = {**RECORD, "fixed_input_size": False, "license": "cc-by-4.0"}
    return _write(
        tmp_path / "student", "vit_tiny_patch16_224", args, pretrained_cfg=record
    )


def _own(folder: Path, **args: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **args).eval()


def _image(*size: int) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(7))


def _forward(teacher: TorchTeacher, image: Tensor) -> dict[str, Tensor]:
    return teacher.forward({"image": image}, tuple(image.shape[2:]))


def test_a_student_gives_what_timm_gives_at_every_size(
    open_one: Open, vit: Path
) -> None:
    sizes = [[32, 48], [64, 32]]
    teacher = open_one(
        "student:./student",
        ["cls", "pooled", "patch", "layer0"],
        weights=None,
        sizes=sizes,
    )
    model = _own(vit)
    for height, width in sizes:
        image = _image(height, width)
        found = _forward(teacher, image)
        with torch.inference_mode():
            tokens = model.forward_features(image)
            inner = model.blocks[0](model._pos_embed(model.patch_embed(image)))
            inner = model.norm(inner)
            pooled = model(image)
        grid = (2, height // 16, width // 16, 48)
        assert torch.equal(found["cls"], tokens[:, 0])
        assert torch.equal(found["patch"], tokens[:, 1:].reshape(grid))
        assert torch.equal(found["layer0"], inner[:, 1:].reshape(grid))
        assert torch.equal(found["pooled"], pooled)


def test_a_student_of_one_size_is_resized_as_timm_resizes_it(
    open_one: Open, tmp_path: Path
) -> None:
    args = {**VIT, "img_size": [32, 48]}
    folder = _write(tmp_path / "student", "vit_tiny_patch16_224", args)
    outputs = ["patch"]
    own = open_one("student:student", outputs, weights=None, aspect=1.5)
    assert own.sizes == ((32, 48),)
    other = open_one("student:student", outputs, weights=None, sizes=[[64, 32]])
    for teacher, model in (
        (own, _own(folder)),
        (other, _own(folder, img_size=[64, 32])),
    ):
        (size,) = teacher.sizes
        assert size is not None
        with torch.inference_mode():
            expected = model.forward_features(_image(*size))[:, 1:]
        assert torch.equal(
            _forward(teacher, _image(*size))["patch"].flatten(1, 2), expected
        )


def test_a_classifier_and_levels(open_one: Open, tmp_path: Path) -> None:
    record = {**RECORD, "input_size": [3, 64, 64], "num_classes": 7, "classifier": "fc"}
    record["fixed_input_size"] = False
    folder = _write(
        tmp_path / "student", "test_resnet", {}, num_classes=7, pretrained_cfg=record
    )
    teacher = open_one("student:student", ["logits", "level1", "patch"], weights=None)
    model, image = _own(folder), _image(64, 64)
    found = _forward(teacher, image)
    with torch.inference_mode():
        features = model.forward_features(image)
        assert torch.equal(found["logits"], model(image))
    assert found["logits"].shape == (2, 7)
    assert torch.equal(found["patch"], features.permute(0, 2, 3, 1))


def test_pixels_are_those_of_its_folder(open_one: Open, vit: Path) -> None:
    teacher = open_one("student:student", ["cls"], weights=None, device="meta")
    spec: Any = teacher.inputs((32, 48))["image"]
    assert (spec.interpolation, spec.mean, spec.std) == (
        "bilinear",
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
    )


def test_what_is_recorded(make_request: Make, open_one: Open, vit: Path) -> None:
    request = make_request("student:student", ["cls"], weights=None)
    record = registry.find_weights(request)
    data = (vit / "model.safetensors").read_bytes()
    assert (record.kind, record.url) == ("file", str(vit / "model.safetensors"))
    assert record.size_bytes == len(data)
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    facts = open_one("student:student", ["cls"], weights=None, device="meta").facts
    assert (facts.license, facts.code_sha256) == ("cc-by-4.0", None)
    assert facts.model is not None
    assert json.loads(facts.model)["architecture"] == "vit_tiny_patch16_224"
    own = open_one(
        "student:student", ["cls"], weights=None, device="meta", license="mit"
    )
    assert own.facts.license == "mit"


def test_a_folder_that_moved_is_the_same_model_and_one_that_changed_is_not(
    open_one: Open, vit: Path, tmp_path: Path
) -> None:
    here = open_one("student:student", ["cls"], weights=None, device="meta").facts
    vit.rename(tmp_path / "elsewhere")
    moved = open_one("student:elsewhere", ["cls"], weights=None, device="meta").facts
    assert moved.model == here.model
    path = tmp_path / "elsewhere" / "config.json"
    fields = json.loads(path.read_text())
    fields["model_args"]["num_heads"] = 4
    path.write_text(json.dumps(fields))
    other = open_one("student:elsewhere", ["cls"], weights=None, device="meta").facts
    assert other.model != here.model


def test_changed_bytes_are_noticed_and_unchanged_ones_not_read_again(
    make_request: Make, vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request("student:student", ["cls"], weights=None)
    first, code = registry.find_weights(request), code_digest(request)
    reads: list[str] = []
    digest = weights.digest
    monkeypatch.setattr(
        weights, "digest", lambda url: (reads.append(url), digest(url))[1]
    )
    assert registry.find_weights(request, first) is first
    assert code_digest(request) == code
    assert reads == []
    with (vit / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert registry.find_weights(request, first).sha256 != first.sha256
    assert reads == [first.url]
    assert code_digest(request) == code
    with (vit / "config.json").open("a") as file:
        file.write(" ")
    assert code_digest(request) != code


def test_a_student_is_recognised_without_torch(vit: Path) -> None:
    code = (
        "import sys\n"
        "from manifests.teacher import TeacherConfig\n"
        "from teachers import registry\n"
        "from teachers.code import code_digest\n"
        "from teachers.interface import GroupInput, TeacherRequest\n"
        f"config = TeacherConfig(model='student:{vit}', outputs={{'cls': {{}}}})\n"
        "group = (GroupInput('image', 'image'),)\n"
        "request = TeacherRequest('t', config, group)\n"
        "assert len(registry.find_weights(request).sha256) == 64\n"
        "assert len(code_digest(request)) == 64\n"
        "print([m for m in ('torch', 'timm', 'safetensors') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def _upload(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        with fsspec.open(f"{url}/{path.name}", "wb") as file:
            file.write(path.read_bytes())


def test_a_folder_in_a_store(open_one: Open, vit: Path) -> None:
    url = "memory://students/vit"
    _upload(vit, url)
    here = open_one("student:student", ["patch"], weights=None)
    there = open_one(f"student:{url}/", ["patch"], weights=None)
    image = _image(32, 48)
    assert torch.equal(_forward(there, image)["patch"], _forward(here, image)["patch"])
    by_job = open_one(
        "student:../students/vit", ["patch"], weights=None, base="memory://jobs"
    )
    assert torch.equal(_forward(by_job, image)["patch"], _forward(here, image)["patch"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": "random"}, r"weights must be left out for student:"),
        ({"keys": {"a": "b"}}, r"keys must be left out for student:"),
        ({"args": {"depth": 3}}, r"args must be empty for student:"),
        ({"method": "features"}, r"method has no effect on a student that timm"),
        ({"outputs": {"cls": {"from": "output"}}}, r"cls\.from has no effect on a stu"),
        ({"outputs": {"cls": {"grid": (2, 2)}}}, r"cls\.grid has no effect on a stu"),
        ({"outputs": ["bev"]}, r"outputs\.bev is not in this model, which has cls"),
        ({"sizes": [[30, 48]]}, r"must be multiples of the patch 16 x 16"),
        (
            {"group": (SWEEP,)},
            r"one image at a time, got points; use a list of image inputs",
        ),
        ({"group": (FRONT, BACK)}, r"one image at a time, got image, image"),
    ],
)
def test_what_a_job_may_not_ask(
    open_one: Open, vit: Path, changes: dict[str, Any], message: str
) -> None:
    config = {"outputs": ["cls"], "weights": None, **changes}
    with pytest.raises(TeacherError, match=message):
        open_one("student:student", **config, device="meta").outputs((32, 48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_tny"}, r"architecture of timm .*, got 'vit_tny'"),
        ({"model_args": {"wings": 2}}, r"model_args that timm .* got \{'wings': 2\}"),
        (
            {"pretrained_cfg": {**RECORD, "input_size": [1, 8, 8]}},
            r"input_size \[3, height, width\].*got \[1, 8, 8\]",
        ),
        ({"pretrained_cfg": {**RECORD, "std": [1, 0, 1]}}, r"three numbers each of"),
        ({"pretrained_cfg": {**RECORD, "mean": "grey"}}, r"three numbers each of"),
        ({"model_args": 3}, r"model_args: "),
    ],
)
def test_folders_that_are_not_a_students(
    open_one: Open, vit: Path, changes: dict[str, Any], message: str
) -> None:
    fields = json.loads((vit / "config.json").read_text())
    (vit / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(TeacherError, match=message):
        open_one("student:student", ["cls"], weights=None, device="meta")


def test_weights_that_do_not_fit(open_one: Open, vit: Path) -> None:
    state = {"norm.weight": torch.ones(48)}
    save_file(state, vit / "model.safetensors")
    teacher = open_one("student:student", ["cls"], weights=None)
    with pytest.raises(TeacherError, match=r"missing \("):
        teacher.load()


def test_folders_that_are_not_there(open_one: Open, vit: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"must be a folder with model\.safetensors"):
        open_one("student:gone", ["cls"], weights=None)
    (vit / "config.json").unlink()
    with pytest.raises(TeacherError, match=r"student's folder.*module:FILE:CLASS"):
        open_one("student:student", ["cls"], weights=None)


def test_describe(vit: Path) -> None:
    facts = registry.describe(f"student:{vit}")
    assert facts["architecture"] == "vit_tiny_patch16_224"
    assert facts["native_size"] == [32, 48]
    assert facts["outputs"] == {
        "cls": [48],
        "pooled": [48],
        "patch": [2, 3, 48],
        "layer0": [2, 3, 48],
        "layer1": [2, 3, 48],
    }
    size = (vit / "model.safetensors").stat().st_size
    assert (facts["license"], facts["weights_bytes"]) == (None, size)
