"""Many hands on one bank: two runs of a job, the same work twice, and the lock."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time

import pytest

from manifests.bank import WorkItem
from manifests.errors import BankError
from manifests.job import EngineConfig, LimitsConfig
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank import lock as lock_module
from pipeline.bank.commits import read_commits
from pipeline.bank.lock import LOCK_PATH, bank_lock, read_lock
from pipeline.bank.objects import object_crc32c
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.engine import Engine
from pipeline.plan import make_plan
from pipeline.precompute import prepare, rows_lookup
from pipeline.work_items import work_items
from tests.conftest import bank_identity


def test_two_runs_of_a_job_share_the_work(forked, full, tmp_path):
    bank = tmp_path / "bank"
    command = ["precompute", full.path, f"bank={bank}", "--quiet"]
    for answer in forked.run(command, command):
        assert answer["code"] == 0, answer["output"]
    assert bank_identity(bank) == full.identity
    assert verify(*open_record(str(bank)), full=True).is_sound
    assert not (bank / LOCK_PATH).exists()


def test_runs_of_two_jobs_grow_one_bank(forked, full, tmp_path):
    """Each brings a teacher; whoever comes second plans again on what it finds."""
    bank = tmp_path / "bank"
    only = full.path.read_text()
    for name, cut in (("net", "points"), ("points", "net")):
        import yaml

        job = yaml.safe_load(only)
        del job["teachers"][cut]
        (full.path.parent / f"{name}.yaml").write_text(yaml.safe_dump(job))
    commands = [
        ["precompute", full.path.parent / f"{name}.yaml", f"bank={bank}", "--quiet"]
        for name in ("net", "points")
    ]
    codes = [answer["code"] for answer in forked.run(*commands)]
    # The one that ends first may find the other's teacher not done yet.
    assert set(codes) <= {0, 1}
    for command in commands:
        assert forked.run(command)["code"] == 0
    assert verify(*open_record(str(bank)), full=True).is_sound
    found = bank_identity(bank)
    features = [path for path in found if "/c." in path and "/stats/" not in path]
    assert len(features) > 20
    assert {path: found[path] for path in features} == {
        path: full.identity[path] for path in features
    }


def engine_and_items(path, bank):
    job = load_job(str(path), [f"bank={bank}"])
    store = Store(job.bank)
    plan, _ = prepare(job, store)
    items = list(work_items(plan, rows_lookup(store, plan), 1))
    config = EngineConfig(device="cpu", threads=2, memory=64 * 2**20)
    engine = Engine(store, plan.record, plan.wanted, config, LimitsConfig())
    return store, plan, items, engine


def test_teachers_are_whole_before_any_lane_runs(full, tmp_path):
    """Two lanes that built one teacher at once drew other random weights each time."""
    _, _, _, engine = engine_and_items(full.path, tmp_path / "bank")
    teachers = [live.teacher for live in engine._passes.values() if live.teacher]
    assert len(teachers) == 2
    for teacher in teachers:
        assert set(teacher._models) == set(teacher.sizes)
        # Shapes are the plan's; no lane asks a teacher for them.
        assert teacher._outputs == {}


def test_every_work_item_twice_at_once(full, tmp_path):
    store, plan, items, engine = engine_and_items(full.path, tmp_path / "bank")
    engine.retain()
    futures = [engine.submit(item) for item in items for _ in range(2)]
    results = [future.result(60) for future in futures]
    engine.release()
    assert not any(result.failures for result in results)
    assert sum(result.blocks for result in results) == 3 * len(plan.wanted)
    for name in plan.wanted:
        for content in read_commits(store, name, range(3)):
            for path, (size, crc) in content.objects.items():
                data = store.read(path)
                assert (len(data), object_crc32c([data])) == (size, crc), path
                assert data == full.identity[path], path


def test_two_engines_on_the_same_items(full, tmp_path):
    store, plan, items, one = engine_and_items(full.path, tmp_path / "bank")
    config = EngineConfig(device="cpu", threads=2, memory=64 * 2**20)
    two = Engine(store, plan.record, plan.wanted, config, LimitsConfig())
    for engine in (one, two):
        engine.retain()
    futures = [engine.submit(item) for item in items for engine in (one, two)]
    blocks = sum(future.result(60).blocks for future in futures)
    for engine in (one, two):
        engine.release()
    assert blocks == 3 * len(plan.wanted)
    assert make_plan(load_job(str(full.path), [f"bank={tmp_path / 'bank'}"])).committed


@pytest.mark.parametrize("memory", [2**20, 64 * 2**20])
def test_the_budget_is_kept(full, tmp_path, memory):
    """Its peak stays below the limit, except where one block alone is above it."""
    store, plan, items, _ = engine_and_items(full.path, tmp_path / "bank")
    config = EngineConfig(device="cpu", threads=2, memory=memory)
    engine = Engine(store, plan.record, plan.wanted, config, LimitsConfig())
    # A budget of a block and a half: two at once would be seen.
    from pipeline.estimate import block_bytes

    size = block_bytes(plan.record, plan.wanted)
    if memory == 2**20:
        engine.budget.total_bytes = size // 2
    else:
        engine.budget.total_bytes = size * 3 // 2
    engine.retain()
    merged = WorkItem(
        **{**dict(items[0]), "blocks": (*items[0].blocks, *items[1].blocks)}
    )
    for future in [engine.submit(item) for item in (merged, items[2])]:
        assert not future.result(60).failures
    engine.release()
    assert engine.budget.peak_bytes == size
    assert engine.budget._used == 0


def foreign_lock(store, **fields):
    owner = {
        "id": "x",
        "purpose": "precompute",
        "host": platform.node(),
        "boot": lock_module._boot_id(),
        "pid": os.getpid(),
        "process_start": lock_module._process_start(os.getpid()),
        "heartbeat": time.time(),
    }
    owner.update(fields)
    store.create(LOCK_PATH, json.dumps(owner).encode())


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path):
    store = Store(str(tmp_path))
    foreign_lock(store, pid=dead_process(), process_start="1")
    with bank_lock(store, "test", wait_s=0):
        assert read_lock(store)["pid"] == os.getpid()
    assert read_lock(store) is None


def test_a_lock_of_a_reused_process_number_is_taken_over(tmp_path):
    store = Store(str(tmp_path))
    foreign_lock(store, process_start="1")
    with bank_lock(store, "test", wait_s=0):
        assert read_lock(store)["id"] != "x"


def test_a_lock_of_before_the_restart_is_taken_over(tmp_path):
    store = Store(str(tmp_path))
    foreign_lock(store, boot="another-boot")
    with bank_lock(store, "test", wait_s=0):
        assert read_lock(store)["id"] != "x"


def test_a_dead_lock_has_one_rescuer_at_a_time(tmp_path):
    """Four take over a dead lock at once; no two hold it together."""
    holders, most = [], []

    def work(store):
        with bank_lock(store, "test", wait_s=30):
            holders.append(1)
            most.append(len(holders))
            time.sleep(0.002)
            holders.pop()

    for number in range(5):
        store = Store(str(tmp_path / str(number)))
        foreign_lock(store, pid=dead_process(), process_start="1")
        threads = [threading.Thread(target=work, args=(store,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(most) == 1
    assert len(most) == 20


def test_a_lock_of_another_host_is_waited_for(tmp_path):
    store = Store(str(tmp_path))
    foreign_lock(store, host="elsewhere", pid=7)
    threading.Timer(0.3, store.delete, [LOCK_PATH]).start()
    started = time.monotonic()
    with bank_lock(store, "test", wait_s=20):
        assert 0.2 < time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("age", "hint"), [(1, "wait for it to end"), (3600, "--break-lock")]
)
def test_a_lock_of_another_host_is_refused_by_name(tmp_path, age, hint):
    store = Store(str(tmp_path))
    foreign_lock(store, host="elsewhere", pid=7, heartbeat=time.time() - age)
    with (
        pytest.raises(BankError, match=rf"process 7 on elsewhere.*{hint}"),
        bank_lock(store, "test", wait_s=0.1),
    ):
        pass
    assert read_lock(store)["id"] == "x"


def test_a_locked_bank_is_refused_in_one_line(full, tmp_path, monkeypatch, capsys):
    """And ``--break-lock`` goes on."""
    from teachonce.cli import main

    bank = tmp_path / "bank"
    store = Store(str(bank))
    foreign_lock(store, host="elsewhere", pid=7, heartbeat=1.0)
    impatient = bank_lock.__wrapped__.__defaults__
    monkeypatch.setattr(bank_lock.__wrapped__, "__defaults__", (0.1,))
    assert impatient == (60.0,)
    command = ["precompute", str(full.path), f"bank={bank}", "--quiet"]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "locked by precompute of process 7 on elsewhere" in said
    assert "--break-lock" in said
    assert sorted(os.listdir(bank)) == [".tmp", "lock.json"]
    assert main([*command, "--break-lock"]) == 0
    assert bank_identity(bank) == full.identity


def test_a_lock_that_cannot_be_read_can_be_broken(tmp_path):
    store = Store(str(tmp_path))
    store.create(LOCK_PATH, b"{half")
    with (
        pytest.raises(BankError, match=r"an unknown run.*--break-lock"),
        bank_lock(store, "test", wait_s=0.1),
    ):
        pass


def test_a_held_lock_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.02)
    store = Store(str(tmp_path))
    with bank_lock(store, "test"):
        first = read_lock(store)["heartbeat"]
        deadline = time.monotonic() + 10
        while read_lock(store)["heartbeat"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert read_lock(store) is None


def test_a_broken_lock_is_not_given_back_by_its_old_owner(tmp_path, monkeypatch):
    """Whoever was broken neither beats over nor removes the new owner's lock."""
    monkeypatch.setattr(lock_module, "HEARTBEAT_S", 0.02)
    store = Store(str(tmp_path))
    with bank_lock(store, "test"):
        store.delete(LOCK_PATH)
        foreign_lock(store, host="elsewhere")
        time.sleep(0.1)
        assert read_lock(store)["id"] == "x"
    assert read_lock(store)["id"] == "x"
