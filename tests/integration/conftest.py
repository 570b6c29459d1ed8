"""What the tests of whole runs share: forked runs, and a job that has it all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from manifests.loading import load_job
from pipeline.precompute import precompute
from tests.conftest import (
    POINTS_INPUT,
    POINTS_TEACHER,
    bank_identity,
    write_job,
    write_shards,
)
from tests.integration.fork_server import ForkServer


@pytest.fixture(scope="session")
def forked():
    """Runs command lines in forked children; see `ForkServer.run`."""
    server = ForkServer()
    yield server
    server.close()


@dataclass(frozen=True)
class FullJob:
    """A job with images, sweeps, labels and a random view on two shards, and its bank.

    Attributes:
        path: of the YAML; tests give it another ``bank=``.
        bank: made by an undisturbed run.
        identity: what every bank of the job must be.
        num_writes: number of writes of the undisturbed run.
    """

    path: Path
    bank: Path
    identity: dict
    num_writes: int


@pytest.fixture(scope="session")
def full(tmp_path_factory, forked):
    """The job that has it all, and its bank; not to be written to."""
    folder = tmp_path_factory.mktemp("full")
    write_shards(folder, [11, 6], with_points=True)
    net = {
        "model": "module:./nets.py:Net",
        "weights": "random:1",
        "on": ["image"],
        "sizes": [[16, 16]],
        "batch": 4,
        "outputs": {"logits": {}, "patch": {"from": "body"}},
    }
    path = write_job(
        folder,
        inputs={"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT},
        views={"random": 1, "yaw_deg": 10.0},
        teachers={"net": net, "points": {**POINTS_TEACHER, "on": ["lidar"]}},
    )
    done = forked.run(["precompute", path, "--quiet"], log=folder / "log")
    assert done["code"] == 0, done["output"]
    num_writes = len((folder / "log").read_text().splitlines())
    bank = folder / "bank"
    return FullJob(path, bank, bank_identity(bank), num_writes)


@pytest.fixture
def run():
    """Runs a job in this process: ``run(path, "key=value", ..., **options)``."""

    def call(path, *overrides, **options):
        return precompute(load_job(str(path), overrides), quiet=True, **options)

    return call
