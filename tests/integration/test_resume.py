"""A run that is killed, stopped or left to others goes on; nothing is computed twice.

Killed at every single write: ``test_kills``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time

from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from tests.conftest import ROOT, bank_identity

OBJECT = r"features\.zarr/.*/c\.1\."


def commit_files(bank):
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(bank.glob("commits/*/*.json"))
    }


def check_resumed(bank, identity, before, done):
    assert done["code"] == 0, done["output"]
    assert bank_identity(bank) == identity
    after = commit_files(bank)
    assert {path: after[path] for path in before} == before
    assert not (bank / "lock.json").exists()
    if not done["output"].startswith("nothing to do"):
        assert not list(bank.glob("runs/*.items.jsonl.gz"))
    assert verify(*open_record(str(bank)), full=True).is_sound
    match = re.match(r"(\d+) blocks of passes committed", done["output"])
    assert int(match[1] if match else 0) == len(after) - len(before)


def test_killed_again_and_again_it_ends(forked, full, tmp_path):
    """Each attempt gets one commit further at least."""
    bank = tmp_path / "bank"
    command = ["precompute", full.path, f"bank={bank}", "--quiet"]
    kill = {"match": r"commits/points", "nth": 0, "when": "after"}
    counts = [0]
    while forked.run(command, kill=kill)["code"] == -signal.SIGKILL:
        counts.append(len(list(bank.glob("commits/points.lidar/*.json"))))
        assert counts[-1] > counts[-2]
    assert 2 <= len(counts) <= 4
    before = commit_files(bank)
    assert len(before) == 9
    assert bank_identity(bank) == full.identity
    assert forked.run(command)["output"].startswith("nothing to do")


def test_ctrl_c_ends_at_once_and_it_goes_on(full, forked, tmp_path):
    """The real command line in a process of its own, with a teacher that takes long."""
    bank = tmp_path / "bank"
    slow = tmp_path / "slow"
    slow.mkdir()
    for path in (full.path, full.path.parent / "nets.py"):
        text = path.read_text().replace("./data", str(full.path.parent / "data"))
        (slow / path.name).write_text(text)
    nets = slow / "nets.py"
    fast = nets.read_text()
    hold = slow / "hold"
    hold.touch()
    held = fast.replace(
        "        x = self.body(",
        "        import os, time\n"
        f"        while x.device.type != 'meta' and os.path.exists({str(hold)!r}):\n"
        "            time.sleep(0.05)\n"
        "        x = self.body(",
    )
    assert held != fast
    nets.write_text(held)
    command = ["precompute", str(slow / "job.yaml"), f"bank={bank}", "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "teachonce", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        # A shell that runs this in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not list(bank.glob("rows/rows/*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    # The teacher would hold it for ever: that it ends at all is that it does not wait.
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the same command goes on" in said
    assert "Traceback" not in said
    hold.unlink()
    done = forked.run(command)
    assert done["code"] == 0, done["output"]
    found = bank_identity(bank)
    assert found.keys() == full.identity.keys()
    # The teacher's file is another one, and so is its fingerprint; its numbers are not.
    for path in found:
        if re.search(r"/c[.0-9]*$", path):
            assert found[path] == full.identity[path], path


def test_what_killed_writers_leave_is_swept(forked, full, tmp_path):
    bank = tmp_path / "bank"
    command = ["precompute", full.path, f"bank={bank}", "--quiet"]
    kill = {"match": OBJECT, "nth": 0, "when": "before"}
    assert forked.run(command, kill=kill)["code"] == -signal.SIGKILL
    left = list((bank / ".tmp").iterdir())
    assert left
    for path in left:
        os.utime(path, (0, 0))
    young = bank / ".tmp" / "another-writer's"
    young.write_bytes(b"half")
    assert forked.run(command)["code"] == 0
    assert list((bank / ".tmp").iterdir()) == [young]
    assert bank_identity(bank) == full.identity


def test_a_growing_bank_that_is_killed_is_finalised(forked, full, tmp_path):
    """Killed when the new shards are all computed, but in no index yet."""
    job = tmp_path / "job.yaml"
    data = full.path.parent / "data"
    for name in ("nets.py", "job.yaml"):
        text = (full.path.parent / name).read_text()
        (tmp_path / name).write_text(text.replace("./data", "./shards"))
    (tmp_path / "shards").mkdir()
    for path in sorted(data.glob("*.tar")):
        shutil.copy2(path, tmp_path / "shards" / path.name)
        if path.name == "train-00000.tar":
            assert forked.run(["precompute", job, "--quiet"])["code"] == 0
    bank = tmp_path / "bank"
    kill = {"match": r"lock\.json$", "nth": 2, "when": "after"}
    killed = forked.run(["precompute", job, "--quiet"], kill=kill)
    assert killed["code"] == -signal.SIGKILL
    before = commit_files(bank)
    assert len(before) == 9
    done = forked.run(["precompute", job, "--quiet"])
    # The path of the job's file of teachers is in the bank: compare within the folder.
    fresh = tmp_path / "fresh"
    command = ["precompute", job, f"bank={fresh}", "--quiet"]
    assert forked.run(command)["code"] == 0
    check_resumed(bank, bank_identity(fresh), before, done)
    assert forked.run(["precompute", job, "--quiet"])["output"].startswith("nothing")
