"""The example recipes, really run: their parts on a small bank and a small student.

What a recipe is made of stays as it is: targets, heads, losses, normalisation, balance,
grids, optimiser. What makes it large is made small: student, widths, steps, sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from manifests.yaml_text import parse_yaml
from student_train.run_log import read_log
from student_train.trainer import Trainer
from tests.conftest import ROOT
from tests.training import STUDENT, once, pair_bank, recipe_for

FOLDER = ROOT / "manifests" / "examples" / "recipes"
NAMES = ("am_radio", "radio_phi_s", "radio_angle", "theia", "unic", "dune", "tiny_vit")
SMALL = {"hidden": 24, "rungs": 12, "heads": 3}
STEPS = 16


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "pair", pair_bank)


def small(name: str) -> dict[str, Any]:
    """An example's fields, for `recipe_for`."""
    path = FOLDER / f"{name}.yaml"
    recipe = parse_yaml(path.read_bytes(), path.name)
    teachers: dict[str, str] = {}
    targets = yaml.safe_load(yaml.safe_dump(recipe["targets"]))
    for target in targets.values():
        _, teacher, output = target["from"].split("/")
        teachers.setdefault(teacher, ("first", "second")[len(teachers) % 2])
        target["from"] = f"main/{teachers[teacher]}/{output}"
        head = target["head"]
        head |= {key: SMALL[key] for key in head.keys() & SMALL.keys()}
    sized = "size" in recipe["stages"][0]
    stage = {"steps": STEPS, "batch": 8, "lr": 4e-3, "warmup_steps": 2}
    student = {**STUDENT, "args": {**STUDENT["args"]}}
    if "drop_path_rate" in recipe["student"].get("args", {}):
        student["args"]["drop_path_rate"] = recipe["student"]["args"]["drop_path_rate"]
    kept = ("normalise", "balance", "optimizer")
    return {
        **{key: recipe[key] for key in kept if key in recipe},
        "student": student,
        "targets": targets,
        "stages": [{**stage, "size": [[16, 16]]} if sized else stage],
        "checkpoints": {"log_steps": 1, "every_steps": 5},
    }


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.name}:{name}": one
        for path in sorted(run.rglob("*.safetensors"))
        for name, one in safetensors.torch.load_file(path).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_learns_and_goes_on_where_it_was(
    name: str, bank: Path, tmp_path: Path
) -> None:
    fields = small(name)
    whole = Trainer(recipe_for(bank, tmp_path / "whole", **fields))
    assert whole.run().is_done
    log = read_log(tmp_path / "whole")
    losses = [row["loss"] for row in log]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    for target in fields["targets"]:
        shares = [row[f"loss.{target}"] for row in log]
        assert sum(shares[-4:]) < sum(shares[:4])
    parts = recipe_for(bank, tmp_path / "parts", **fields)
    stops = iter([False] * 2 + [True] + [False] * 5 + [True] + [False] * STEPS)
    while not Trainer(parts).run(should_stop=lambda: next(stops)).is_done:
        torch.manual_seed(9)
    mine, theirs = tensors_of(tmp_path / "parts"), tensors_of(tmp_path / "whole")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
