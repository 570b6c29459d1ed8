"""The proxy story: a bank of a big expert, a student of it, a bank of the student.

Also programs and students with a loader in whole jobs: what is computed once is not
computed again, and what changed is refused.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from manifests.errors import BankError
from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from tests.conftest import POINTS_INPUT, ROOT, write_job, write_shards
from tests.training import trainer_for

SIZES = (7, 5)
EXPERT = {
    "model": "timm:test_vit",
    "weights": "random:3",
    "sizes": [[32, 32]],
    "batch": 4,
    "outputs": {"patch": {}},
}
STUDENT = {
    "model": "timm:vit_tiny_patch16_224",
    "input": "image",
    "args": {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
}
PATCH = {
    "from": "main/expert/patch",
    "head": {"kind": "adapter", "hidden": 24},
    "loss": {"cosine": 0.9, "smooth_l1": 0.1},
    "grid": "larger",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two cores are shared with other test processes."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """Returns a student's folder, trained for a few steps from a bank of an expert."""
    folder = tmp_path_factory.mktemp("expert")
    write_shards(folder, SIZES)
    job = load_job(str(write_job(folder, teachers={"expert": EXPERT}, labels={})))
    assert precompute(job, quiet=True).is_whole
    recipe = {
        "student": STUDENT,
        "targets": {"patch": PATCH},
        "stages": [{"steps": 6, "batch": 4, "lr": 1.0e-2, "size": [[24, 32]]}],
    }
    outcome = trainer_for(folder / "bank", folder / "runs" / "proxy", **recipe).run()
    assert outcome.is_done
    return outcome.folder / "student"


def images_of(folder: Path) -> dict[str, Image.Image]:
    """Every picture of the shards by key, by the standard library and Pillow."""
    found = {}
    for shard in sorted((folder / "data").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    data = tar.extractfile(member)
                    assert data is not None
                    image = Image.open(io.BytesIO(data.read())).convert("RGB")
                    found[member.name.removesuffix(".jpg")] = image
    return found


def test_a_bank_of_a_student_holds_its_own_features(student, tmp_path):
    """Its patch, in every view and at two sizes, is forward_features of that view."""
    write_shards(tmp_path, SIZES, first=3)
    proxy = {
        "model": f"student:{student}",
        "sizes": [[24, 32], [40, 48]],
        "batch": 4,
        "outputs": {"patch": {}, "pooled": {}},
    }
    path = write_job(
        tmp_path,
        teachers={"proxy": proxy},
        labels={},
        views={"random": 1, "flip": True},
    )
    outcome = precompute(load_job(str(path)), quiet=True)
    assert outcome.is_whole
    root: Any = zarr.open_group(f"{tmp_path}/bank/features.zarr", mode="r")
    model: Any = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
    own = json.loads((student / "config.json").read_text())["pretrained_cfg"]
    images, keys = images_of(tmp_path), root["key"][:]
    num_flipped = num_rows = 0
    for row, key in enumerate(keys):
        if not key:
            continue
        num_rows += 1
        for view in (0, 1):
            box = tuple(root["views/image_box"][row, view])
            flip = bool(root["views/flip"][row, view])
            num_flipped += flip
            for height, width in proxy["sizes"]:
                cut = images[key].resize(
                    (width, height), Image.Resampling.BICUBIC, box=box
                )
                pixels = np.asarray(cut)[:, :: -1 if flip else 1] / 255.0
                pixels = (pixels - own["mean"]) / own["std"]
                batch = torch.from_numpy(pixels.transpose(2, 0, 1)[None].copy()).float()
                with torch.inference_mode():
                    tokens = model.forward_features(batch)
                    pooled = model(batch)
                level = root[f"proxy/image/{height}x{width}"]
                patch = torch.from_numpy(level["patch"][row, view])
                assert patch.shape == (height // 8, width // 8, 48)
                assert torch.allclose(patch.flatten(0, 1), tokens[0, 1:], atol=1e-4)
                found = torch.from_numpy(level["pooled"][row, view])
                assert torch.allclose(found, pooled[0], atol=1e-4)
    assert num_rows == sum(SIZES)
    assert 0 < num_flipped < num_rows
    (entry,) = [one for one in outcome.record.passes if one.teacher == "proxy"]
    assert entry.provenance["weights"]["url"] == f"{student}/model.safetensors"


def test_a_finished_job_is_recognised_without_torch(student, tmp_path):
    write_shards(tmp_path, SIZES)
    teachers = {
        "proxy": {
            "model": f"student:{student}",
            "outputs": {"patch": {}},
            "batch": 4,
        },
        "program": program(tmp_path),
    }
    path = write_job(tmp_path, teachers=teachers, labels={})
    assert precompute(load_job(str(path)), quiet=True).is_whole
    code = (
        "import sys\n"
        "from manifests.loading import load_job\n"
        "from pipeline.precompute import precompute\n"
        f"outcome = precompute(load_job({str(path)!r}), quiet=True)\n"
        "assert outcome.was_done and outcome.is_whole\n"
        "print([m for m in ('torch', 'timm', 'apache_beam') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]", done.stderr


class Cells(nn.Module):
    """A map and a vector of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)

    def forward(self, image):
        grid = self.stem(image)
        return {"grid": grid, "mean": grid.mean((2, 3))}


def cells(seed: int) -> Cells:
    torch.manual_seed(seed)
    return Cells().eval()


def program(folder: Path, seed: int = 0) -> dict[str, Any]:
    """Writes a program of a fixed batch of 4; returns its entry of a job."""
    exported = torch.export.export(cells(seed), (torch.zeros(4, 3, 16, 16),))
    torch.export.save(exported, folder / "cells.pt2")
    return {
        "model": "exported:./cells.pt2",
        "sizes": [[16, 16]],
        "batch": 4,
        "outputs": {"patch": {"from": "output[grid]"}},
    }


def test_a_program_in_a_job(tmp_path):
    write_shards(tmp_path, SIZES)
    path = write_job(tmp_path, teachers={"program": program(tmp_path)}, labels={})
    outcome = precompute(load_job(str(path)), quiet=True)
    assert outcome.is_whole
    root: Any = zarr.open_group(f"{tmp_path}/bank/features.zarr", mode="r")
    images, model = images_of(tmp_path), cells(0)
    for row, key in enumerate(root["key"][:]):
        if not key:
            continue
        cut = images[key].resize(
            (16, 16),
            Image.Resampling.BILINEAR,
            box=tuple(root["views/image_box"][row, 0]),
        )
        batch = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            expected = model(batch)["grid"][0].permute(1, 2, 0)
        found = torch.from_numpy(root["program/image/16x16/patch"][row, 0])
        assert torch.allclose(found, expected, atol=1e-5)
    facts = outcome.record.passes[-1].provenance
    assert facts["facts"]["code_sha256"] == facts["weights"]["sha256"]
    # Another place is the same program; another program is another teacher.
    (tmp_path / "cells.pt2").rename(tmp_path / "moved.pt2")
    moved = [f"teachers.program.model=exported:{tmp_path}/moved.pt2"]
    assert precompute(load_job(str(path), moved), quiet=True).was_done
    program(tmp_path, seed=1)
    with pytest.raises(BankError, match=r"not the one in the bank \(code: '"):
        precompute(load_job(str(path)), quiet=True)


LOADER = """
from torch import nn


class Rig(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.points = nn.Linear(3, 6)

    def forward(self, image, lidar):
        tokens = self.stem(image).flatten(2).transpose(1, 2)
        return {"tokens": tokens + self.points(lidar).amax(1)[:, None]}


def make(folder):
    return Rig()
"""
RIG = {
    "loader": "model.py:make",
    "inputs": {"image": {"size": [16, 16]}, "points": {"points": 8}},
    "outputs": {"tokens": {"from": "output[tokens]", "layout": "nlc", "grid": [4, 4]}},
}


def test_a_student_of_several_inputs_in_a_job(tmp_path):
    """A fused student: an image and a sweep, together."""
    folder = tmp_path / "rig"
    folder.mkdir()
    (folder / "model.py").write_text(LOADER)
    (folder / "config.json").write_text(json.dumps(RIG))
    space: dict[str, Any] = {}
    exec(LOADER, space)
    save_file(space["make"]("").state_dict(), folder / "model.safetensors")
    write_shards(tmp_path, SIZES, with_points=True)
    rig = {
        "model": "student:./rig",
        "on": {"both": ["image", "lidar"]},
        "batch": 4,
        "outputs": {"tokens": {}},
    }
    path = write_job(
        tmp_path,
        inputs={"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT},
        teachers={"rig": rig},
        labels={},
    )
    outcome = precompute(load_job(str(path)), quiet=True)
    assert outcome.is_whole
    assert open_bank(str(tmp_path / "bank")).record.state.valid["rig.both"] == sum(
        SIZES
    )
    (entry,) = [one for one in outcome.record.passes if one.teacher == "rig"]
    assert entry.provenance["preprocess"]["16x16"]["lidar"]["num_points"] == 8
    assert entry.outputs[0].shape == (4, 4, 6)
    # Its own place, and words about its making, are no part of what it is.
    folder.rename(tmp_path / "moved")
    told = {**RIG, "teachonce": {"steps": 4}}
    (tmp_path / "moved" / "config.json").write_text(json.dumps(told))
    moved = ["teachers.rig.model=student:./moved"]
    assert precompute(load_job(str(path), moved), quiet=True).was_done
    told["args"] = {"width": 3}
    (tmp_path / "moved" / "config.json").write_text(json.dumps(told))
    with pytest.raises(BankError, match=r"not the one in the bank \(model: '\{"):
        precompute(load_job(str(path), moved), quiet=True)
