"""A run that is killed, anywhere: the same command makes the identical bank, and computes
no committed block again.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from tests.conftest import ROOT, bank_identity

NUM_SPREAD = 12
OBJECT = r"features\.zarr/.*/c\.1\."
NAMED = {
    "before making the frame": (r"lock\.json$", 0, "after"),
    "before the index of shards": (r"dataset/.*\.json$", 0, "before"),
    "in making arrays": (r"patch/zarr\.json$", 0, "before"),
    "before the record": (r"bank\.json$", 0, "before"),
    "after the record, holding the lock": (r"bank\.json$", 0, "after"),
    "before the work items": (r"items\.jsonl\.gz$", 0, "before"),
    "before the run's record": (r"runs/[^.]*\.json$", 0, "before"),
    "an object without its commit": (OBJECT, 2, "after"),
    "before the first commit": (r"commits/", 0, "before"),
    "after the first commit": (r"commits/.*", 1, "after"),
    "between two commits of a block": (r"commits/points.*1\.json$", 0, "after"),
    "after the last commit": (r"commits/rows/00000002\.json$", 0, "after"),
    "holding the lock of finalise": (r"lock\.json$", 2, "after"),
    "between two arrays of finalise": (r"views/flip/c\.", 0, "after"),
    "in the statistics": (r"stats/patch_variance/c", 0, "after"),
    "before the state": (r"bank\.json$", 1, "before"),
    "after the state": (r"bank\.json$", 1, "after"),
    "before giving the lock back": (r"lock\.json$", 3, "before"),
}


def commit_files(bank):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(bank.glob("commits/*/*.json"))
    }


def check_resumed(bank, full, before, done):
    assert done["code"] == 0, done["output"]
    assert bank_identity(bank) == full.identity
    after = commit_files(bank)
    assert {path: after[path] for path in before} == before
    assert not (bank / "lock.json").exists()
    assert verify(*open_record(str(bank)), full=True).is_sound
    match = re.match(r"(\d+) blocks of passes committed", done["output"])
    assert int(match[1] if match else 0) == len(after) - len(before)


def kill_and_resume(forked, full, bank, kill):
    command = ["precompute", full.path, f"bank={bank}", "--quiet"]
    killed = forked.run(command, kill=kill)
    assert killed["code"] == -signal.SIGKILL, (kill, killed["output"])
    before = commit_files(bank)
    check_resumed(bank, full, before, forked.run(command))
    return before


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", range(0, NUM_SPREAD))
def test_killed_at_any_write_it_goes_on(forked, full, tmp_path, point, when):
    if (point % 2 == 0) != (when == "before"):
        pytest.skip("points take turns: before a write, after a write")
    write = int((point + 0.5) / NUM_SPREAD * full.num_writes)
    kill_and_resume(forked, full, tmp_path / "bank", {"write": write, "when": when})


@pytest.mark.parametrize("name", NAMED)
def test_killed_at_a_delicate_write_it_goes_on(forked, full, tmp_path, name):
    match, nth, when = NAMED[name]
    kill = {"match": match, "nth": nth, "when": when}
    kill_and_resume(forked, full, tmp_path / "bank", kill)
