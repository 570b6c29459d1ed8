"""Exports: the files, what is refused, and that nothing half-made is left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from manifests.recipe import StudentConfig
from student_train import export
from student_train.errors import TrainingError
from student_train.export import export_student, load_student
from student_train.students import Student, make_student

ARGS: dict[str, Any] = {"embed_dim": 48, "depth": 1, "num_heads": 3}
CONFIG = StudentConfig(model="timm:deit_tiny_patch16_224", input="image", args=ARGS)
FACTS = {"bank": "./banks/a", "recipe": "sha256:12", "steps": 40}


def _student(seed: int = 0) -> Student:
    return make_student(CONFIG, (32, 48), seed=seed)


def test_files(tmp_path: Path) -> None:
    student = _student()
    folder = export_student(student, CONFIG, tmp_path / "deep" / "out", FACTS)
    assert folder == tmp_path / "deep" / "out"
    assert [item.name for item in folder.parent.iterdir()] == ["out"]
    names = {"README.md", "config.json", "model.safetensors"}
    assert {item.name for item in folder.iterdir()} == names
    document = json.loads((folder / "config.json").read_text())
    assert document["architecture"] == "deit_tiny_patch16_224"
    assert (document["num_classes"], document["num_features"]) == (0, 48)
    expected = {**ARGS, "img_size": [32, 48], "dynamic_img_size": True}
    assert document["model_args"] == expected
    assert document["pretrained_cfg"]["interpolation"] == "bicubic"
    assert document["teachonce"] == FACTS
    readme = (folder / "README.md").read_text()
    line = f'timm.create_model("local-dir:{folder}", pretrained=True)'
    assert line in readme
    for name, value in FACTS.items():
        assert f"| {name} | {value} |" in readme
    state = safetensors.torch.load_file(folder / "model.safetensors")
    own = student.model.state_dict()
    assert state.keys() == own.keys()
    assert all(torch.equal(state[key], own[key]) for key in own)


def test_a_student_in_another_memory_format(tmp_path: Path) -> None:
    config = StudentConfig(model="timm:test_resnet", input="image")
    student = make_student(config, (64, 64), seed=0)
    student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loaded = load_student(export_student(student, config, tmp_path / "out", {}))
    own = student.model.state_dict()
    for key, value in loaded.model.state_dict().items():
        assert torch.equal(value, own[key])


def test_an_export_replaces_one_before_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    export_student(_student(0), CONFIG, folder, FACTS)
    export_student(_student(1), CONFIG, folder, FACTS)
    own = _student(1).model.state_dict()
    for key, value in load_student(folder).model.state_dict().items():
        assert torch.equal(value, own[key])
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(TrainingError, match=r"folder of its own.*holds something else"):
        export_student(_student(), CONFIG, other, FACTS)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["other", "out"]


def test_a_loaded_student_can_be_exported_again(tmp_path: Path) -> None:
    first = export_student(_student(), CONFIG, tmp_path / "a", FACTS)
    second = export_student(load_student(first), CONFIG, tmp_path / "b", FACTS)
    for name in ("config.json", "model.safetensors"):
        one, two = (json_or_bytes(folder / name) for folder in (first, second))
        assert one == two


def json_or_bytes(path: Path) -> Any:
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_bytes()


def test_what_timm_does_not_give_back_is_not_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_student(_student(), CONFIG, tmp_path / "out", FACTS)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    changed = _student(1)
    changed.model.norm = nn.LayerNorm(48, eps=0.5)
    with pytest.raises(TrainingError, match=r"come back.*what it computes different"):
        export_student(changed, CONFIG, tmp_path / "out", FACTS)
    with torch.no_grad():
        next(changed.model.parameters()).fill_(float("nan"))
    changed.model.norm = _student(1).model.norm
    assert export_student(changed, CONFIG, tmp_path / "nan", FACTS).is_dir()
    shutil.rmtree(tmp_path / "nan")
    changed.model.norm = nn.Identity()
    with pytest.raises(TrainingError, match=r"must be one that timm .*norm.weight"):
        export_student(changed, CONFIG, tmp_path / "out", FACTS)

    def fail(*_: object) -> str:
        raise OSError("disk full")

    monkeypatch.setattr(export, "_readme", fail)
    with pytest.raises(OSError, match="disk full"):
        export_student(_student(1), CONFIG, tmp_path / "out", FACTS)
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_export_leaves_random_state_and_student_alone(tmp_path: Path) -> None:
    student = _student().train()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    load_student(export_student(student, CONFIG, tmp_path / "out", FACTS))
    assert torch.equal(torch.get_rng_state(), state)
    assert student.model.training


def test_folders_that_are_no_student(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"gone, which is not there"):
        load_student(tmp_path / "gone")
    folder = export_student(_student(), CONFIG, tmp_path / "out", FACTS)
    with pytest.raises(TrainingError, match=r"which is a file"):
        load_student(folder / "config.json")
    document = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").rename(folder / "kept")
    with pytest.raises(TrainingError, match=r"none of model.safetensors"):
        load_student(folder)
    (folder / "kept").rename(folder / "model.safetensors")
    del document["pretrained_cfg"]["mean"]
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(TrainingError, match="mean and std, got KeyError: 'mean'"):
        load_student(folder)
    document["architecture"] = "deit_huge"
    (folder / "config.json").write_text(json.dumps(document))
    with pytest.raises(
        TrainingError, match=r"timm .* loads, got RuntimeError: Unknown"
    ):
        load_student(folder)
    (folder / "config.json").unlink()
    with pytest.raises(TrainingError, match=r"weights alone .*student.weights: /"):
        load_student(folder)


def test_a_module_is_exported_as_weights(tmp_path: Path) -> None:
    (tmp_path / "code.py").write_text(
        "from torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.stem = nn.Conv2d(3, 4, 8, 8)\n\n"
        "    def forward_features(self, image):\n        return self.stem(image)\n"
    )
    config = StudentConfig(model="module:code.py:Net", input="image")
    student = make_student(config, (16, 16), seed=0, base=str(tmp_path))
    folder = export_student(student, config, tmp_path / "out", FACTS)
    assert {item.name for item in folder.iterdir()} == {
        "README.md",
        "model.safetensors",
    }
    readme = (folder / "README.md").read_text()
    assert "which timm does not know and cannot build" in readme
    again = config.model_copy(update={"weights": f"{folder}/model.safetensors"})
    found = make_student(again, (16, 16), seed=1, base=str(tmp_path)).model.state_dict()
    for key, value in student.model.state_dict().items():
        assert torch.equal(found[key], value)
