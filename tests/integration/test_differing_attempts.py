"""Attempts whose bytes differ, as an accelerator's may: commit and store always agree.

The teachers add noise that is another one in every attempt, far below what anybody
would notice in a value. What is stored first is kept; who comes second takes it up.
"""

from __future__ import annotations

import random
import signal

import numpy as np
import pytest

from manifests.job import EngineConfig, LimitsConfig
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.commits import list_commits, read_commits
from pipeline.bank.objects import object_crc32c
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.engine import Engine
from pipeline.precompute import prepare, rows_lookup
from pipeline.work_items import work_items
from tests.conftest import write_job, write_shards

NOISY = """

import os


class Noisy(Net):
    def forward(self, x):
        y = super().forward(x)
        if y.device.type == "meta":
            return y
        noise = int.from_bytes(os.urandom(2), "little") / 65536
        return y * (1 + 1e-6 * noise)
"""


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A job with such a teacher."""
    folder = tmp_path_factory.mktemp("noisy")
    write_shards(folder, [11, 6])
    teacher = {
        "model": "module:./nets.py:Noisy",
        "weights": "random:1",
        "sizes": [[16, 16]],
        "batch": 4,
        "outputs": {"logits": {}},
    }
    path = write_job(folder, teachers={"net": teacher}, views={"random": 1})
    with open(folder / "nets.py", "a") as file:
        file.write(NOISY)
    return path


def check_agrees(bank, num_commits):
    """Every commit is of what is stored; every byte of the bank is sound."""
    store, record = open_record(str(bank))
    found = 0
    for entry in record.passes:
        for content in read_commits(
            store, entry.id, sorted(list_commits(store, entry.id))
        ):
            found += 1
            for path, told in content.objects.items():
                data = store.read(path)
                assert (len(data), object_crc32c([data])) == told, path
    assert found == num_commits
    return store, record


def logits(bank):
    found = open_bank(str(bank))
    path = "net/image/16x16/logits"
    blocks = range(found.record.num_blocks)
    return np.stack([[found.read(path, b, v) for b in blocks] for v in (0, 1)])


def test_the_noise_is_there_and_small(noisy, run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for bank in (one, two):
        assert run(noisy, f"bank={bank}").is_whole
    a, b = logits(one), logits(two)
    assert (np.isnan(a) == np.isnan(b)).all()
    assert 0 < np.nanmax(np.abs(a - b)) < 1e-5


def test_every_work_item_three_times_at_once(noisy, tmp_path):
    bank = tmp_path / "bank"
    job = load_job(str(noisy), [f"bank={bank}"])
    store = Store(job.bank)
    plan, _ = prepare(job, store)
    items = list(work_items(plan, rows_lookup(store, plan), 1))
    config = EngineConfig(device="cpu", threads=2, memory=64 * 2**20)
    engines = [
        Engine(store, plan.record, plan.wanted, config, LimitsConfig())
        for _ in range(2)
    ]
    for engine in engines:
        engine.retain()
    work = [(engine, item) for item in items for engine in (*engines, engines[0])]
    random.Random(3).shuffle(work)
    results = [one.result(60) for one in [e.submit(item) for e, item in work]]
    for engine in engines:
        engine.release()
    assert not any(result.failures for result in results)
    # Each block was computed three times, and committed once.
    assert sum(result.blocks for result in results) == 3 * len(plan.wanted)
    check_agrees(bank, 3 * len(plan.wanted))


def test_two_runs_at_once(forked, noisy, tmp_path):
    bank = tmp_path / "bank"
    command = ["precompute", noisy, f"bank={bank}", "--quiet"]
    for answer in forked.run(command, command):
        assert answer["code"] == 0, answer["output"]
    assert verify(*check_agrees(bank, 6), full=True).is_sound


@pytest.mark.parametrize(
    "kill",
    [
        {"match": r"logits/c\.0\.0", "when": "after"},
        {"match": r"logits/c\.[12]\.1", "when": "after"},
        {"match": r"commits/net", "when": "before"},
        {"match": r"commits/net", "when": "after"},
    ],
    ids=["an object", "all but one", "no commit", "one commit"],
)
def test_one_of_two_runs_is_killed(forked, noisy, tmp_path, kill):
    """What it left is taken up, by a run that is at work at the same time."""
    bank = tmp_path / "bank"
    command = ["precompute", noisy, f"bank={bank}", "--quiet"]
    killed, other = forked.run(command, command, kill=[kill, None])
    assert killed["code"] in (-signal.SIGKILL, 0), killed["output"]
    assert other["code"] == 0, other["output"]
    assert verify(*check_agrees(bank, 6), full=True).is_sound
    assert forked.run(command)["output"].startswith("nothing to do")


def test_a_resume_keeps_what_it_finds(forked, noisy, tmp_path):
    bank = tmp_path / "bank"
    command = ["precompute", noisy, f"bank={bank}", "--quiet"]
    kill = {"match": r"commits/net", "nth": 0, "when": "before"}
    assert forked.run(command, kill=kill)["code"] == -signal.SIGKILL
    left = {
        path: (path.read_bytes(), path.stat().st_ino)
        for path in bank.glob("features.zarr/net/image/16x16/logits/c.*")
    }
    assert left
    assert forked.run(command)["code"] == 0
    assert {path: (path.read_bytes(), path.stat().st_ino) for path in left} == left
    assert verify(*check_agrees(bank, 6), full=True).is_sound
