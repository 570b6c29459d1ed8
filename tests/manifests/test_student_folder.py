"""A student's folder: its two documents, what is read of it, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from manifests.errors import ManifestError
from manifests.student_folder import (
    LoaderFolder,
    StudentFolder,
    TimmFolder,
    read_student_folder,
)

TIMM: dict[str, Any] = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "model_args": {"depth": 2},
    "pretrained_cfg": {
        "input_size": [3, 8, 8],
        "mean": [0.5] * 3,
        "global_pool": "avg",
    },
    "num_features": 192,
}
LOADER: dict[str, Any] = {
    "loader": "model.py:make",
    "inputs": {"image": {"size": [8, 16]}, "points": {"points": 4}},
    "outputs": {"tokens": {"from": "output[0]", "layout": "nlc", "grid": [2, 4]}},
}


def write(folder: Path, fields: Any, **files: str) -> Path:
    text = fields if isinstance(fields, str) else json.dumps(fields)
    (folder / "config.json").write_text(text)
    for name, data in {"model.py": "def make(folder): ...\n", **files}.items():
        (folder / name).write_text(data)
    return folder


def read(folder: Path, fields: Any, **files: str) -> StudentFolder:
    return read_student_folder(f"{write(folder, fields, **files)}/", "teachers.t.model")


def test_timms_form(tmp_path):
    folder = read(tmp_path, TIMM)
    assert isinstance(folder.document, TimmFolder)
    assert folder.document.architecture == "vit_tiny_patch16_224"
    assert (folder.url, list(folder.files)) == (str(tmp_path), ["config.json"])
    assert json.loads(folder.identity) == {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"depth": 2},
        "num_classes": 0,
        "input_size": [3, 8, 8],
        "global_pool": "avg",
    }


def test_a_loaders_form(tmp_path):
    folder = read(tmp_path, {**LOADER, "files": ["a.txt"]}, **{"a.txt": "words"})
    document = folder.document
    assert isinstance(document, LoaderFolder)
    assert document.inputs.kinds == ("image", "points")
    assert document.inputs.image.interpolation == "bicubic"
    assert document.inputs.points.columns == ("x", "y", "z")
    assert document.outputs["tokens"].source == "output[0]"
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with folder.copied() as copy:
        assert sorted(os.listdir(copy)) == ["a.txt", "config.json", "model.py"]
        assert Path(copy, "a.txt").read_text() == "words"
    assert not Path(copy).exists()


def test_digest_and_identity_change_with_what_matters(tmp_path):
    plain = read(tmp_path, LOADER)
    told = read(tmp_path, {**LOADER, "teachonce": {"steps": 3}, "license": "mit"})
    assert told.digest != plain.digest
    assert told.identity == plain.identity
    changed = [
        read(tmp_path, {**LOADER, "args": {"width": 3}}),
        read(tmp_path, {**LOADER, "loader": "model.py:other"}),
        read(tmp_path, {**LOADER, "outputs": {"tokens": {}}}),
        read(tmp_path, {**LOADER, "files": ["a"]}, a="1"),
        read(tmp_path, {**LOADER, "files": ["a"]}, a="2"),
    ]
    assert len({one.identity for one in (plain, *changed)}) == 6
    assert len({one.digest for one in (plain, told, *changed)}) == 7
    # The loader's code has a digest of its own in the teacher's facts.
    code = read(tmp_path, LOADER, **{"model.py": "def make(folder): return 1\n"})
    assert code.identity == plain.identity
    assert code.digest != plain.digest


def test_a_folder_in_a_store(tmp_path):
    for name, data in read(tmp_path, LOADER).files.items():
        with fsspec.open(f"memory://folders/a/{name}", "wb") as file:
            file.write(data)
    there = read_student_folder("memory://folders/a", "teachers.t.model")
    assert there.digest == read(tmp_path, LOADER).digest


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("{", "must be JSON"),
        ([1], "must have `architecture`"),
        ({"model": 1}, "must have `architecture`"),
        ({"architecture": "a"}, "pretrained_cfg: missing"),
        ({**TIMM, "num_classes": -1}, "num_classes: "),
        ({**LOADER, "wings": 2}, "wings: no such field"),
        ({**LOADER, "loader": "../model.py:make"}, r"must be FILE\.py:NAME in the fol"),
        ({**LOADER, "loader": "model.txt:make"}, r"must be FILE\.py:NAME in the fol"),
        ({**LOADER, "loader": "model.py"}, r"must be FILE\.py:NAME in the folder"),
        ({**LOADER, "loader": "gone.py:make"}, r"names gone\.py: cannot read"),
        ({**LOADER, "files": ["../a"]}, r"names of files beside it, got '\.\./a'"),
        ({**LOADER, "files": ["model.safetensors"]}, "names of files beside it"),
        ({**LOADER, "inputs": {}}, "at least one of image, clip, points"),
        ({**LOADER, "outputs": {}}, "outputs: "),
        (
            {**LOADER, "inputs": {"image": {"size": [8, 8], "std": [1, 0, 1]}}},
            "three positive numbers",
        ),
        (
            {
                **LOADER,
                "inputs": {"image": {"size": [8, 8]}, "clip": {"size": [8, 9]}},
            },
            "must be the same",
        ),
        ({**LOADER, "inputs": {"points": {"points": 0}}}, r"inputs\.points\.points: "),
    ],
)
def test_what_is_refused(tmp_path, fields, message):
    with pytest.raises(ManifestError, match=message) as caught:
        read(tmp_path, fields)
    assert "teachers.t.model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path):
    message = r"teachers\.t\.model must be a student's folder.*module:FILE:CLASS"
    with pytest.raises(ManifestError, match=message):
        read_student_folder(f"{tmp_path}/gone", "teachers.t.model")
