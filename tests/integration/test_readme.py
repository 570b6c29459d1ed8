"""The README's Python lines, run as they stand, give the numbers the bank has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from manifests.loading import load_job
from manifests.recipe_loading import load_recipe
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from tests.conftest import ROOT

PATH = "net/image/16x16/patch"


def snippets() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def bank(make_shards, make_job, tmp_path, monkeypatch) -> Path:
    make_shards([11, 8])
    precompute(load_job(str(make_job())), quiet=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bank"


def expected(bank: Path) -> np.ndarray:
    opened = open_bank(str(bank))
    return np.concatenate([opened.read(PATH, b) for b in range(3)])


def test_the_stock_reader(bank):
    (lines,) = (text for text in snippets() if "import zarr" in text)
    names: dict = {}
    exec(lines, names)
    found = np.asarray(names["patch"])
    np.testing.assert_array_equal(found, expected(bank))
    np.testing.assert_array_equal(names["valid"], ~np.isnan(found[:, 0, 0, 0]))
    assert names["keys"][0] == "s0-0000"


def test_the_loop_of_ones_own(bank):
    (lines,) = (text for text in snippets() if "BankDataset" in text)
    assert len(lines.strip().splitlines()) <= 30
    names: dict = {}
    exec(lines, names)
    assert names["batch"].epoch == 1
    assert names["target"].values().shape == (4, 4, 4, 16)
    assert names["loss"].item() < 1.5


def test_literal_json_in_the_architecture_is_json():
    text = (ROOT / "docs" / "architecture.md").read_text()
    found = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    assert len(found) == 3
    for document in found:
        json.loads(document)


def test_the_documents_load(tmp_path):
    text = (ROOT / "README.md").read_text()
    job, recipe = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "job.yaml").write_text(job)
    loaded = load_job(str(tmp_path / "job.yaml"))
    assert set(loaded.teachers) == {"dinov3", "siglip2", "pillars", "ours"}
    assert loaded.teachers["ours"].outputs["logits"].encoding == "topk"
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert set(load_recipe(str(tmp_path / "recipe.yaml")).targets) == {
        "cls",
        "patch",
        "class",
    }
