"""The demo as a user runs it, on few scenes: whole, again at once, and refused."""

from __future__ import annotations

import json

import pytest

from tests.conftest import run_cli

SMALL = ("--scenes", "24", "--steps", "3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    return folder, run_cli("demo", folder, *SMALL, timeout=550)


def test_it_tells_the_whole_story(made):
    folder, found = made
    assert found.returncode == 0, found.stdout + found.stderr
    for verb in ("plan", "precompute", "verify", "train", "probe"):
        assert f"== teachonce {verb} " in found.stdout
    table = found.stdout.split("== what came out")[1]
    for model in ("bank", "labels", "random:resnet10t", "semantics", "occupancy"):
        assert f"\n{model} " in table
    assert "s saved" in table
    assert {one.name for one in folder.iterdir()} >= {
        "job.yaml",
        "recipe-bank.yaml",
        "recipe-labels.yaml",
        "probe.yaml",
        "probe.json",
        "report.html",
        "scenes.png",
    }
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") > 10
    assert "<script" not in page


def test_scores_are_of_scenes_that_nobody_learned_from(made):
    folder, _ = made
    result = json.loads((folder / "probe.json").read_text())
    assert list(result["probes"]) == ["scene", "semantics", "depth", "occupancy"]
    for probe in result["probes"].values():
        rows = {name: set(_rows(one["rows"])) for name, one in probe["splits"].items()}
        assert not rows["fit"] & rows["test"]
        assert not rows["choose"] & rows["test"]
        assert len(rows["test"]) == 6


def _rows(text):
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        yield from range(int(first), int(last or first) + 1)


def test_the_same_command_goes_on(made):
    folder, _ = made
    before = (folder / "probe.json").read_text()
    found = run_cli("demo", folder, *SMALL, timeout=550)
    assert found.returncode == 0, found.stdout + found.stderr
    assert (folder / "probe.json").read_text() == before


def test_a_folder_of_another_demo_is_refused(made):
    folder, _ = made
    found = run_cli("demo", folder, "--scenes", "30")
    assert found.returncode == 2
    assert "holds one with other options" in found.stderr


def test_report_of_a_bank_and_a_run(made, tmp_path):
    folder, _ = made
    page = tmp_path / "page.html"
    found = run_cli(
        *("report", folder / "bank", "--run", f"mine={folder / 'runs' / 'bank'}"),
        *("--probe", folder / "probe.json", "--out", page),
    )
    assert found.returncode == 0, found.stderr
    assert "mine" in page.read_text()
    assert run_cli("report", folder / "bank", "--run", "x").returncode == 2
