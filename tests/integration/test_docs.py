"""What docs/teachers.md shows: every line opens, every Python line runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.teacher import TeacherConfig
from manifests.yaml_text import parse_yaml
from pipeline.bank.open import open_bank
from pipeline.samples.calibration import Calibration, project
from teachers.interface import GroupInput, TeacherRequest, WeightsRecord
from teachers.registry import check_request, describe, open_teacher
from tests.conftest import ROOT
from tests.training import IMAGE_HW, once, street_bank, street_members, street_sample

TEXT = (ROOT / "docs" / "teachers.md").read_text()
SWEEP = GroupInput("lidar", "points", columns=("x", "y", "z", "intensity", "ring"))
CLIP = GroupInput("clip", "clip", frames=8)
RIG = (*(GroupInput(f"cam_{name}", "image") for name in ("front", "back")), SWEEP)
# Files of the user's, which no document brings along.
OWN_FILES = ("module", "exported", "student")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def lines() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for block in blocks("yaml"):
        entries = parse_yaml(block.encode(), "teachers.md")
        assert not set(entries) & set(found)
        found |= entries
    return found


LINES = lines()


def request_of(name: str) -> TeacherRequest:
    config = TeacherConfig.model_validate(LINES[name])
    if isinstance(config.on, dict):
        return TeacherRequest(name, config, RIG)
    is_sweep = config.family in ("pointpillars", "range_view", "bev_raster")
    one = CLIP if config.on == ["clip"] else GroupInput("image", "image", 16 / 9)
    return TeacherRequest(name, config, (SWEEP if is_sweep else one,))


def test_every_family_of_the_issue_has_a_line() -> None:
    models = " ".join(line["model"] for line in LINES.values())
    words = """
        dinov2 dinov3 siglip SigLIP2 quickgelu eva02 pe_core pe_lang pe_spatial samvit
        sam2_hiera mae tiny_vit swin radio eupe pointpillars range_view bev_raster
        module: exported: student:
    """
    for word in words.split():
        assert word in models


@pytest.mark.parametrize("name", list(LINES))
def test_a_line_opens_without_weights(name: str) -> None:
    request = request_of(name)
    check_request(request)
    needs_file = any(it.classifier for it in request.config.outputs.values())
    if request.config.family in OWN_FILES or needs_file:
        return
    teacher = open_teacher(request, WeightsRecord("missing"), "meta")
    for size in teacher.sizes:
        assert set(teacher.outputs(size)) == set(request.config.outputs)
    assert teacher.facts.source


@pytest.mark.parametrize("name", ["dinov3", "clip", "pillars", "scan"])
def test_a_model_is_described_with_licence_and_source(name: str) -> None:
    facts = str(describe(LINES[name]["model"]))
    assert "license" in facts
    assert "source" in facts


def test_the_point_table_is_that_of_the_sample(
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bank = once(tmp_path_factory, "street", street_bank)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bank").symlink_to(bank)
    members = dict(street_members("s0-0000", 0))
    (tmp_path / "sweep.bin").write_bytes(members["s0-0000.bin"])
    (code,) = blocks("python")
    names: dict[str, Any] = {}
    exec(code, names)
    table, sweep = names["table"], names["sweep"]
    assert open_bank(str(bank)).keys()[0] == "s0-0000"
    sample = street_sample(0)
    calibration = Calibration(
        *(np.array(sample[key]) for key in ("intrinsics", "lidar2cam"))
    )
    uv, depth = project(sweep.points, calibration)
    height, width = IMAGE_HW
    inside = (depth > 0) & (uv[:, 0] >= 0) & (uv[:, 0] < width)
    inside &= (uv[:, 1] >= 0) & (uv[:, 1] < height)
    assert table.index.tolist() == inside.nonzero()[0].tolist()
    assert table.u == pytest.approx(uv[inside, 0])
    assert table.v == pytest.approx(uv[inside, 1])
