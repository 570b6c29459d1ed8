"""Banks of every schema that was ever published open, verify, train and grow.

``tests/data/banks/schema-N.zip`` holds a job, its shards, its bank as the version of
its time wrote it, and the decoded values of every output as that version read them.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from manifests.bank import BANK_SCHEMA
from manifests.errors import BankError, ManifestError
from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.plan import make_plan
from pipeline.precompute import precompute
from student_train.dataset import BankDataset
from student_train.reading import Reading
from tests.conftest import ROOT, run_cli

FOLDER = ROOT / "tests" / "data" / "banks"
SCHEMAS = range(1, BANK_SCHEMA + 1)


@pytest.fixture(params=SCHEMAS)
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Returns the folder of a bank of an earlier version, at another place."""
    with zipfile.ZipFile(FOLDER / f"schema-{request.param}.zip") as stored:
        stored.extractall(tmp_path)
    return tmp_path


def test_every_value_is_what_it_was(old: Path) -> None:
    bank = open_bank(str(old / "bank"))
    expected = np.load(old / "expected.npz")
    assert bank.keys().tolist() == expected["keys"].tolist()
    names = {name for name in expected if name != "keys"}
    assert {name.partition("@")[0] for name in names} == set(bank.outputs)
    for name in sorted(names):
        path, _, view = name.partition("@")
        blocks = [bank.read(path, b, int(view)) for b in bank.record.live_blocks]
        np.testing.assert_array_equal(np.concatenate(blocks), expected[name], name)


def test_it_is_sound(old: Path) -> None:
    told = run_cli("verify", old / "bank", "--full")
    assert told.returncode == 0, told.stdout + told.stderr
    assert run_cli("info", old / "bank").returncode == 0


def test_its_job_has_nothing_to_do_and_can_grow(old: Path) -> None:
    """Its fingerprints are those that this version gives the same job."""
    before = {
        path: path.read_bytes()
        for path in (old / "bank" / "features.zarr").rglob("c.*")
        if path.parent.parent.name in ("16x32", "32x64", "native")
    }
    assert before
    plan = make_plan(load_job(str(old / "job.yaml")))
    assert not plan.new_passes
    assert not any(plan.missing_blocks().values())
    grown = load_job(str(old / "job.yaml"), ["views.random=2"])
    assert precompute(grown, quiet=True).is_whole
    for path, data in before.items():
        assert path.read_bytes() == data
    assert open_bank(str(old / "bank")).record.num_views == 3


def test_a_student_learns_from_it(old: Path) -> None:
    reading = Reading(inputs={"image": (16, 16)}, targets={"patch": "net/patch"})
    dataset = BankDataset(
        str(old / "bank"), reading, batch=2, shards=[str(old / "data/*.tar")]
    )
    (batch, *_) = dataset.batches(0)
    target = batch.targets["patch"]
    assert target.values()[target.valid].isfinite().all()


def test_what_a_later_release_may_add(old: Path) -> None:
    """Another encoding: that output alone is refused; another field: all of it."""
    path = old / "bank" / "bank.json"
    record = json.loads(path.read_text())
    for entry in record["passes"]:
        if entry["id"] == "net.image":
            entry["outputs"][0]["encoding"]["encoding"] = "cubist"
    path.write_text(json.dumps(record))
    bank = open_bank(str(old / "bank"))
    with pytest.raises(BankError, match="got 'cubist'; the bank may come from a newer"):
        bank.read("net/image/16x32/logits", 0)
    assert np.isfinite(bank.read("net/image/16x32/patch", 0)).any()
    path.write_text(json.dumps({**record, "colour": "green"}))
    with pytest.raises(ManifestError, match="colour: no such field"):
        open_bank(str(old / "bank"))


def test_a_newer_bank_is_refused(old: Path) -> None:
    path = old / "bank" / "bank.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "schema_version": BANK_SCHEMA + 1}))
    told = run_cli("info", old / "bank")
    assert told.returncode == 2
    assert "schema" in told.stderr
