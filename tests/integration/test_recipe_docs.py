"""What docs/recipes.md shows: every line of YAML loads, every part has a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from manifests.recipe import Recipe
from manifests.recipe_loading import load_recipe
from manifests.target import BalanceConfig, NormaliseRule, TargetConfig
from manifests.yaml_text import parse_yaml
from student_train.loss_terms import LOSSES, parse_terms
from student_train.task_heads import HEADS, head_kind
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "recipes.md").read_text()
EXAMPLES = ROOT / "manifests" / "examples" / "recipes"
RECIPES = [p for p in EXAMPLES.glob("*.yaml") if not p.stem.startswith("probe")]
FENCES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
# Rows of tables whose last column is YAML: the part's cell and the line.
LINES = re.findall(r"^\| (.+?) \|.*\| `(\w+: .+)` \|$", TEXT, re.MULTILINE)
TARGET = {"from": "in1k/dinov3/patch", "loss": {"cosine": 1.0}}
OF_TARGETS = ("loss", "head", "grid")


def loaded(folder: Path, fields: dict[str, Any]) -> Recipe:
    """A recipe with these fields, its losses and heads found by name."""
    recipe = {
        "run": "./run",
        "banks": {"in1k": "./bank"},
        "student": {"model": "timm:vit_base_patch16_224", "input": "image"},
        "targets": {"patch": TARGET},
        "stages": [{"steps": 10, "batch": 8, "lr": 0.1}],
        **fields,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    found = load_recipe(str(path))
    for name, target in found.targets.items():
        head_kind(target.head, f"targets.{name}.head")
        for loss, one in target.loss.items():
            given = one.model_dump(exclude_none=True, exclude={"args"})
            kind = LOSSES[loss].targets[0]
            assert parse_terms({loss: given}, kind, f"targets.{name}.loss")
    return found


@pytest.mark.parametrize("fence", FENCES)
def test_a_fence_loads(fence: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, parse_yaml(fence.encode(), "recipes.md"))


@pytest.mark.parametrize("line", [line for _, line in LINES])
def test_a_line_loads_and_says_what_it_does(line: str, tmp_path: Path) -> None:
    fields = parse_yaml(line.encode(), "recipes.md")
    (name,) = fields
    if name in OF_TARGETS:
        recipe = loaded(tmp_path, {"targets": {"patch": {**TARGET, **fields}}})
        held = recipe.targets["patch"]
    else:
        held = loaded(tmp_path, fields)
    # Nothing is said that is not read.
    assert name in held.model_fields_set


def test_every_part_has_a_line_and_every_example_a_row() -> None:
    named = {one for part, _ in LINES for one in re.findall(r"`(\w+)`", part)}
    grids = get_args(TargetConfig.model_fields["grid"].annotation)
    kinds = get_args(BalanceConfig.model_fields["kind"].annotation)
    parts = {*LOSSES, *HEADS, *get_args(NormaliseRule), *grids, *kinds}
    assert named == parts
    table = TEXT.split("## Example recipes")[1].split("## Parts of your own")[0]
    rows = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", table, re.M)))
    )
    assert rows == {path.stem for path in RECIPES}


def test_every_part_is_in_an_example_or_said_to_wait() -> None:
    used: set[str] = set()
    for path in RECIPES:
        recipe = load_recipe(str(path))
        used |= {recipe.normalise, recipe.balance.kind}
        for target in recipe.targets.values():
            used |= {*target.loss, target.head.kind, target.grid}
    assert {*LOSSES, *HEADS, "phi_s", "drop_teachers", "coincide"} - used == {
        "unit_l2",
        "l1",
    }
    assert "`unit_l2` waits for" in TEXT
