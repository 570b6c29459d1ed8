"""``torchrun ... -m teachonce train``: one word out, one student, one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.training import once, plain_bank, write_recipe


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "plain", plain_bank)


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*launcher, "--nproc-per-node=2", "-m", "teachonce", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_student_of_two_ranks(bank, tmp_path):
    path = write_recipe(tmp_path, banks={"main": str(bank)})
    done = torchrun("train", path, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["done"], found["steps"]) == (True, 3)
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()
    refused = torchrun("train", path, "run=./other", "loader.window_blocks=3")
    assert refused.returncode == 1
    assert "window_blocks (or the batch, if smaller) must be" in refused.stderr
    assert not (tmp_path / "other").exists()
