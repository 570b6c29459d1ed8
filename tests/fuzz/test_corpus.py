"""Hostile input: the corpus and some mutants, each target in a process of its own.

``python -m tests.fuzz`` runs as many as one likes; what it ever found is in the corpus.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fuzz.campaign import CORPUS, mutants

MUTANTS = {"tar": 100, "points": 400, "images": 250, "manifests": 120, "bank": 8}


@pytest.mark.parametrize("target", MUTANTS)
def test_no_error_but_ours_no_hang_and_little_memory(
    target: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--target", target]
    command += ["--rounds", str(MUTANTS[target]), "--keep", str(tmp_path / "keep")]
    done = subprocess.run(
        [*command, "--minutes", "5"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    told = re.search(r"(\d+) inputs .* (\d+) taken, (\d+) refused, 0 ag", done.stdout)
    assert told is not None, done.stdout
    inputs, taken, refused = map(int, told.groups())
    assert inputs > MUTANTS[target]
    # Seeds that are sound are taken, and not all mutants: it reads what it gets.
    assert taken > 5
    assert target == "tar" or refused > 5


def test_the_corpus_has_every_kind() -> None:
    for folder in ("tar", "points", "images", "manifests", "bank"):
        assert any(path.is_file() for path in (CORPUS / folder).rglob("*")), folder


def test_mutants_are_the_same_again() -> None:
    seeds = {"a.tar": b"x" * 2000, "b.json": b'{"a": [1, 2.5, "three"]}'}
    pairs = [list(zip(range(200), mutants(seeds, 3), strict=False)) for _ in range(2)]
    assert pairs[0] == pairs[1]
    other = list(zip(range(200), mutants(seeds, 4), strict=False))
    assert other != pairs[0]
    changed = sum(data != seeds[name] for _, (name, data) in pairs[0])
    assert changed > 150
