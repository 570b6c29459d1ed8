"""Damage of every kind to every kind of file: found, refused by name, mended.

The small version of ``benchmarks/faults.py``.
"""

from __future__ import annotations

import shutil
import zlib

import numpy as np
import pytest

from manifests.loading import load_job
from pipeline.precompute import precompute
from tests.conftest import bank_identity
from tests.injected_faults import (
    DAMAGES,
    KINDS,
    block_of,
    can_be_told,
    files_of,
    found_by_trainer,
    found_by_verify,
    inject,
    learned,
    make_varied_bank,
    objects_of,
    repair,
    untouched,
)

# What a trainer of every target, label and camera reads whole.
READ = {
    *("record", "table of blocks", "dataset's rows", "keys", "labels", "calibration"),
    *("validity", "raw", "lossless, float32", "lossless, bfloat16", "half", "topk"),
    *("compact, codes", "compact, scale", "compact, mean and std", "points"),
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The job of a bank that has every kind of file, made."""
    job = make_varied_bank(tmp_path_factory.mktemp("varied"))
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return job


@pytest.fixture(scope="module")
def undamaged(job):
    return learned(job.parent / "bank")


def test_every_kind_of_file_is_there(job):
    assert all(files_of(job.parent / "bank").values())


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_found_and_never_learned_from(job, undamaged, kind):
    bank = job.parent / "bank"
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    for damage in DAMAGES:
        if not can_be_told(kind, damage):
            continue
        fault = inject(bank, str(rng.choice(files_of(bank)[kind])), damage, rng)
        try:
            assert found_by_verify(fault), fault
            said = found_by_trainer(fault, undamaged)
            assert said in (("refused",) if kind in READ else ("refused", "same")), (
                said,
                fault.path,
                fault.where,
            )
        finally:
            fault.undo()


@pytest.mark.parametrize("damage", DAMAGES)
def test_repair_computes_exactly_what_is_damaged(job, tmp_path, damage):
    """A file of every kind at once, all that belong to a block to the same one."""
    bank = tmp_path / "bank"
    shutil.copytree(job.parent / "bank", bank)
    identity, before = bank_identity(bank), untouched(bank)
    rng = np.random.default_rng(DAMAGES.index(damage))
    allowed: set[str] = set()
    for kind, paths in files_of(bank).items():
        if kind == "record" or not can_be_told(kind, damage):
            continue
        chosen = [path for path in paths if block_of(path) in (None, 1)]
        path = str(rng.choice(chosen))
        allowed |= set(objects_of(job.parent / "bank", path))
        if block_of(path) is not None:
            allowed.add(path)
        inject(bank, path, damage, rng)
    shutil.copytree(job.parent / "data", tmp_path / "data")
    outcome = repair(job, bank)
    assert outcome.is_whole
    assert {block for _, block in outcome.removed} == {1}
    # Block 1 of each pass: `net`, `coarse`, `points` and the row facts.
    assert outcome.result.blocks == 4
    assert bank_identity(bank) == identity
    after = untouched(bank)
    assert after.keys() == before.keys()
    kept = before.keys() - allowed
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}
    assert {block_of(path) for path in kept} >= {0, 2}


def test_a_lost_record_is_made_again_by_its_job(job, tmp_path):
    """Shards, fingerprints and commits say all that it did."""
    bank = tmp_path / "bank"
    shutil.copytree(job.parent / "bank", bank)
    identity, before = bank_identity(bank), untouched(bank)
    (bank / "bank.json").unlink()
    outcome = precompute(load_job(str(job), [f"bank={bank}"]), quiet=True)
    assert outcome.is_whole
    assert outcome.result.blocks == 0
    assert bank_identity(bank) == identity
    assert untouched(bank) == before
