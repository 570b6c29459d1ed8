"""The table of families, what is checked without a model, and finding weights again."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from teachers import registry, weights
from teachers.errors import TeacherError
from teachers.interface import GroupInput, TeacherRequest, WeightsRecord

Make = Callable[..., TeacherRequest]


def test_nothing_heavy_is_imported_before_a_teacher_is_opened() -> None:
    code = (
        "import sys, teachers.registry, teachers.weights, teachers.interface\n"
        "from manifests.job import TeacherConfig\n"
        "from teachers.interface import GroupInput, TeacherRequest\n"
        "config = TeacherConfig(model='timm:test_vit', weights='random:3', "
        "outputs={'cls': {}})\n"
        "group = (GroupInput('image', 'image'),)\n"
        "found = teachers.registry.find_weights(TeacherRequest('t', config, group))\n"
        "assert found.seed == 3\n"
        "print([m for m in ('torch', 'timm', 'open_clip') if m in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_families_have_a_line_each() -> None:
    names = [name for name, _ in registry.families()]
    assert names[:3] == ["timm", "open_clip", "module"]
    assert all(line for _, line in registry.families())


def test_unknown_family_names_close_ones(make_request: Make) -> None:
    with pytest.raises(TeacherError, match=r"'tim'.*did you mean timm\?"):
        registry.open_teacher(
            make_request("tim:x", ["cls"]), WeightsRecord("random"), "cpu"
        )
    with pytest.raises(TeacherError, match="FAMILY:NAME"):
        registry.describe("resnet50")


def test_family_of_another_package(
    make_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = EntryPoint("json", "json", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert registry.families()[-1][0] == "json"
    registry.check_request(make_request("json:x", ["anything"]))
    with pytest.raises(AttributeError, match="open_teacher"):
        registry.open_teacher(
            make_request("json:x", ["cls"]), WeightsRecord("random"), "cpu"
        )


def test_family_whose_package_is_missing(
    make_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = dataclasses.replace(registry.FAMILIES["timm"], module="no_such_package")
    monkeypatch.setitem(registry.FAMILIES, "timm", gone)
    with pytest.raises(TeacherError, match=r"install\s+teachonce\[precompute\]"):
        registry.describe("timm:test_vit")


SWEEP = (GroupInput("lidar", "points", columns=("x", "y", "z")),)
PAIR = (GroupInput("a", "image"), GroupInput("b", "image"))


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("timm:test_vit", {"outputs": ["bev"]}, r"outputs\.bev must be one of"),
        ("open_clip:ViT-B-32", {"outputs": ["level0"]}, r"outputs\.level0 must be one"),
        (
            "timm:test_vit",
            {"outputs": {"cls": {"from": "x"}}},
            r"cls\.from is for modu",
        ),
        (
            "timm:test_vit",
            {"outputs": {"cls": {"layout": "nc"}}},
            r"cls\.layout is for",
        ),
        ("timm:test_vit", {"method": "features"}, r"method is for module"),
        (
            "open_clip:ViT-B-32",
            {"args": {"a": 1}, "outputs": ["embed"]},
            "args must be",
        ),
        ("timm:test_vit", {"group": SWEEP}, r"on must name inputs of kind image"),
        ("timm:test_vit", {"group": PAIR}, r"one input at a time.*`on: \[a, b\]`"),
        ("module:x.py:N", {"group": SWEEP, "sizes": [[8, 8]]}, "sizes is for images"),
        ("module:x.py:N", {"preprocess": {"points": 4}}, r"preprocess\.points has no"),
        (
            "module:x.py:N",
            {"group": SWEEP, "preprocess": {"mean": (0, 0, 0)}},
            r"preprocess\.mean has no",
        ),
    ],
)
def test_fields_without_effect_are_refused(
    make_request: Make, model: str, config: dict[str, Any], message: str
) -> None:
    request = make_request(model, config.pop("outputs", ["cls"]), **config)
    with pytest.raises(TeacherError, match=message):
        registry.check_request(request)


def test_a_known_file_is_not_read_again(
    make_request: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.pt"
    file.write_bytes(b"one")
    request = make_request("timm:test_vit", ["cls"], weights="./w.pt")
    first = registry.find_weights(request)
    reads: list[str] = []
    digest = weights.digest

    def counting(url: str) -> str:
        reads.append(url)
        return digest(url)

    monkeypatch.setattr(weights, "digest", counting)
    assert registry.find_weights(request, first) is first
    assert reads == []
    file.write_bytes(b"other")
    second = registry.find_weights(request, first)
    assert reads == [str(file)]
    assert second.sha256 != first.sha256
    assert second.size_bytes == 5


def test_known_pretrained_weights_are_pinned_without_the_family(
    make_request: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request("timm:test_vit", ["cls"], weights=None)
    known = WeightsRecord(
        "pretrained",
        "hf://timm/x@abc/model.safetensors",
        asked="timm:test_vit pretrained",
    )
    monkeypatch.setattr(registry, "_load", lambda name: pytest.fail("imported"))
    assert registry.find_weights(request, known) is known


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("timm:test_vit", {"native_size": [160, 160], "license": "apache-2.0"}),
        ("timm:test_resnet", {"stride": 32}),
        ("open_clip:ViT-B-32", {"native_size": [224, 224]}),
    ],
)
def test_describe(model: str, expected: dict[str, Any]) -> None:
    facts = registry.describe(model)
    assert facts["model"] == model
    assert {name: facts[name] for name in expected} == expected
    assert facts["num_parameters"] > 0


def test_describe_lists_shapes() -> None:
    outputs = registry.describe("timm:test_vit")["outputs"]
    assert outputs["cls"] == [64]
    assert outputs["patch"] == [10, 10, 64]
    assert outputs["logits"] == [1000]
    assert "cls" not in registry.describe("timm:test_resnet")["outputs"]


def test_describe_module(net_file: Path) -> None:
    facts = registry.describe(f"module:{net_file.name}:Net", str(net_file.parent))
    assert facts["arguments"] == "(width=4)"
    assert "block.0" in facts["submodules"]
    assert facts["summary"].startswith("A small net")
