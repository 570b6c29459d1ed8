"""The card and croissant.json say what a bank is, and their lines open it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from manifests.loading import load_job
from pipeline.bank.card import licences, render_card
from pipeline.bank.licences import strictest
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import write_job, write_shards

PATCH = "net/image/16x24/patch"
VALIDATE = """
import json, sys
import mlcroissant
dataset = mlcroissant.Dataset(jsonld=sys.argv[1])
issues = dataset.metadata.ctx.issues
rows = [
    {name: value.decode() if isinstance(value, bytes) else value
     for name, value in row.items()}
    for row in dataset.records("rows")
]
print(json.dumps([sorted(issues.errors), sorted(issues.warnings), rows], default=int))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A bank of a teacher with padding and weights in a file, and a random one."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("card")
    write_shards(folder, [11, 5])
    net = {
        "model": "module:./nets.py:Net",
        "weights": "./net.pt",
        "license": "cc-by-nc-4.0",
        "sizes": [[16, 24]],
        "batch": 4,
        "preprocess": {"fit": "pad"},
        "outputs": {"logits": {}, "patch": {"from": "body"}},
    }
    drawn = {**net, "weights": "random:1", "preprocess": {}}
    del drawn["license"]
    path = write_job(folder, teachers={"net": net, "drawn": drawn})
    names: dict = {}
    exec((folder / "nets.py").read_text(), names)
    torch.manual_seed(0)
    torch.save(names["Net"]().state_dict(), folder / "net.pt")
    assert precompute(load_job(str(path)), quiet=True).is_whole
    return folder / "bank"


def test_it_says_what_made_the_bank(made):
    card = (made / "README.md").read_text()
    sha256 = hashlib.sha256((made.parent / "net.pt").read_bytes()).hexdigest()
    assert f"| net | {made.parent}/net.pt |  | {sha256} | cc-by-nc-4.0 |" in card
    assert "| drawn | random, seed 1 |  |  | not stated |" in card
    assert "`net/image/16x24` takes `image`: height 16, width 24" in card
    assert "Padded: net/image/16x24 was given boxes" in card
    assert "Padded: drawn" not in card
    assert "16 samples of 2 shards" in card
    assert "- label `class`: class of 5, member `cls`" in card


def test_it_names_the_strictest_licence(made):
    card = (made / "README.md").read_text()
    assert "Data licence: cc0-1.0." in card
    assert "Strictest: cc-by-nc-4.0, of the weights of net (non-commercial)." in card
    store, record = open_record(str(made))
    # Weights drawn from a seed are under no licence.
    assert set(licences(record)) == {"data", "weights of net"}
    unsaid = record.model_copy(update={"dataset": {"license": None}})
    assert strictest(licences(unsaid).values()).name == "not stated"
    said = render_card(store.url, unsaid)
    assert "Strictest: not stated, of the data (unknown: find out before use)." in said


@pytest.mark.parametrize("library", ["xarray", "zarr", "tensorstore", "teachonce"])
def test_its_lines_open_the_bank(made, library):
    card = (made / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 4
    (code,) = (one for one in blocks if re.match(rf"(import|from) {library}\b", one))
    names: dict = {}
    exec(code, names)
    bank = open_bank(str(made))
    expected = np.concatenate([bank.read(PATCH, block) for block in range(3)])
    found = np.asarray(names["values"])
    np.testing.assert_array_equal(found, expected[: len(found)])
    if library == "zarr":
        assert names["keys"][0] == "s0-0000"
        assert names["valid"].sum() == 16


def test_both_are_equal_for_equal_banks(made):
    store, record = open_record(str(made))
    assert render_card(store.url, record) == (made / "README.md").read_text()


def test_a_relative_path_makes_no_other_card(made, monkeypatch):
    before = [(made / name).read_bytes() for name in ("README.md", "croissant.json")]
    monkeypatch.chdir(made.parent)
    assert main(["finalise", "bank"]) == 0
    after = [(made / name).read_bytes() for name in ("README.md", "croissant.json")]
    assert after == before


def test_croissant_names_the_files_as_they_are(made):
    document = json.loads((made / "croissant.json").read_text())
    assert document["license"] == ["cc0-1.0", "cc-by-nc-4.0"]
    files = {one["@id"]: one for one in document["distribution"]}
    for path in ("bank.json", "blocks.parquet"):
        data = (made / path).read_bytes()
        assert files[path]["sha256"] == hashlib.sha256(data).hexdigest()
        assert files[path]["contentSize"] == f"{len(data)} B"
    for name in ("index", "features.zarr"):
        assert list(made.glob(files[name]["includes"]))


@pytest.mark.skipif(
    importlib.util.find_spec("mlcroissant") is None, reason="mlcroissant is not there"
)
def test_mlcroissant_validates_it_and_reads_the_rows(made):
    # In a process of its own: rdflib, which it uses, warns of itself.
    done = subprocess.run(
        [sys.executable, "-c", VALIDATE, str(made / "croissant.json")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    errors, warnings, rows = json.loads(done.stdout)
    assert errors == []
    # What only whoever publishes a bank can say.
    assert [re.search(r"(\w+)\"", one)[1] for one in warnings] == [
        "citeAs",
        "datePublished",
        "version",
    ]
    expected = [
        {f"rows/{name}": value for name, value in row.items()}
        for row in open_bank(str(made)).rows()
    ]
    assert rows == expected
