"""``train`` then ``probe`` from the command line: tables, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from teachonce.cli import main
from tests import probing
from tests.training import once

MODELS = ["mine", "random:vit_tiny_patch16_224", "blocks", "blind", "above"]
PROBES = {
    "class": {"label": "main/labels/class"},
    "seg": {"label": "data/blocks", "grid": [4, 8]},
    "ground": {"label": "data/ground", "grid": [8, 8], "heights_m": [-1.0]},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two cores are shared with other test processes."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Path:
    return once(tmp_path_factory, "probed", probing.make_bank)


@pytest.fixture(scope="module")
def trained(url, tmp_path_factory) -> Path:
    """A folder with a recipe, its run, and a probe of it."""
    folder = tmp_path_factory.mktemp("trained")
    recipe: dict[str, Any] = {
        "run": "./run",
        "banks": {"main": str(url)},
        "data": {"rows": {"shards": ["fit*"]}},
        "student": probing.STUDENT,
        "targets": {
            "patch": {
                "from": "main/blocks/patch",
                "head": {"kind": "adapter", "hidden": 16},
                "loss": {"cosine": 1.0},
            }
        },
        "stages": [{"steps": 3, "batch": 8, "lr": 1.0e-3, "size": [[32, 64]]}],
        "engine": {"device": "cpu"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "recipe.yaml"), "--quiet"]) == 0
    probing.write_probe(
        folder, url, students={"mine": "./run"}, probes=PROBES, result="./scores.json"
    )
    return folder


def test_tables_and_their_file(trained, capsys):
    capsys.readouterr()
    assert main(["probe", str(trained / "probe.yaml"), "--quiet"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    tables = shown.out.strip().split("\n\n")
    assert [table.split(":")[0] for table in tables] == list(PROBES)
    for table in tables:
        lines = table.splitlines()
        assert [line.split()[0] for line in lines[3:8]] == MODELS
        # Aligned: what stands under a heading starts where it does.
        start = lines[1].index("what")
        words = [line[start:].split("  ")[0] for line in lines[3:8]]
        assert words == [
            "student",
            "random weights (floor)",
            *["teacher reference"] * 3,
        ]
    assert "knn raw accuracy" in tables[0]
    assert "knn standardised accuracy" in tables[0]
    assert "rows left out for every model: 2, lacking in mine 1," in tables[0]
    assert "4 x 8 cells, 4 x 8 labels" in tables[1]
    assert "above: it has no grid on image in view 0" in tables[1]
    blocks = next(line for line in tables[1].splitlines() if line.startswith("blocks"))
    assert blocks.split()[-2:] == ["1.0000", "1.0000"]

    held = json.loads((trained / "scores.json").read_text())
    assert list(held["probes"]) == list(PROBES)


def test_json(trained, capsys, tmp_path):
    path = tmp_path / "other.json"
    capsys.readouterr()
    arguments = ["--json", "seed=1", "probes.class.kinds=[linear]", f"result={path}"]
    assert main(["probe", str(trained / "probe.yaml"), *arguments]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    found = json.loads(shown.out)
    assert found == json.loads(path.read_text())
    assert (found["seed"], found["view"]) == (1, 0)
    assert found["models"]["mine"] == {
        "role": "student",
        "model": "timm:vit_tiny_patch16_224",
        "source": str(trained / "run" / "student"),
        "input": "image",
        "size": [32, 64],
    }
    assert list(found["models"]) == MODELS
    for name, one in found["probes"].items():
        assert one.keys() == {
            "label",
            "form",
            "grid",
            "label_size",
            "splits",
            "left_out_by",
            "scores",
        }
        assert one["splits"].keys() == {"fit", "choose", "test"}
        assert one["splits"]["fit"].keys() == {
            "asked",
            "unlabelled",
            "left_out",
            "used",
            "rows",
        }
        assert [score["model"] for score in one["scores"]] == MODELS
        for score in one["scores"]:
            if score["reason"] is None:
                assert score["kind"] == ("linear" if name == "class" else "dense")
                assert 0 <= score["value"] <= 1
                assert score["setting"].keys() == {"l2"}
                assert score["higher_is_better"] is True
                assert 0 <= score["choose_value"] <= 1
                assert score["details"]["num_test"] == one["splits"]["test"]["used"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["students.mine=./nowhere"], "students.mine must be the folder of a run"),
        (["probes.seg.label=data/sky"], "label must be one of data.labels"),
        (["probes.class.label=main/labels/sky"], "label must be one of the bank's"),
        (["splits.choose.shards=[fit*]"], "got 26 both in fit (26 rows) and in choose"),
        (["splits.test.shards=[x*]"], "splits.test.shards must match shards"),
        (["teachers.net=[dino/cls]"], "teacher must be one of the bank's"),
        (["engine.device=tpu"], "engine.device must be auto, cpu, cuda or cuda:N"),
        (["probes.seg.grid=[0, 8]"], "must have at least 1 row and 1 column"),
        (["banks.main=./nowhere"], "no bank at"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_exit_2(
    trained, capsys, overrides, message
):
    result = trained / "never.json"
    capsys.readouterr()
    arguments = [*overrides, f"result={result}", "--quiet"]
    assert main(["probe", str(trained / "probe.yaml"), *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("teachonce probe: ")
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert not result.exists()
