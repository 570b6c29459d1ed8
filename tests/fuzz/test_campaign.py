"""The law is enforced: who breaks it is found out, with the input that did it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

CODE = """
import sys, time
from pathlib import Path
from manifests.errors import ManifestError
from tests.fuzz.campaign import run_campaign
from tests.fuzz.targets import Target, check

def run(name, data):
    if name == "1-ours":
        raise ManifestError("no")
    if name == "2-crash":
        raise KeyError("yes")
    if name == "3-contradiction":
        check(1 > 2, "one is above two")
    if name == "4-memory":
        b"x" * (200 * 2**20)
    if name == "5-more-memory":
        bytearray(2**40)
    if name == "6-hidden":
        try:
            bytearray(2**40)
        except MemoryError as error:
            raise ManifestError("no") from error
    if name == "7-hang":
        while True:
            pass

names = ["0-fine", "1-ours", "2-crash", "3-contradiction", "4-memory"]
names += ["5-more-memory", "6-hidden", "7-hang"]
seeds = {name: b"data" for name in names}
target = Target("nothing", run, 64 * 2**20, seeds=lambda: seeds, deadline_s=1.0)
print(run_campaign(target, 0, 0, time.monotonic() + 60, Path(sys.argv[1])))
"""


def test_what_breaks_the_law_is_kept(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_ARENA_MAX": "2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # The last one took longer than it may: the process is gone, the input is there.
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)" in done.stderr
    kept = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*-*/*")}
    assert kept == {
        "KeyError-3/2-crash",
        "Broken-4/3-contradiction",
        "memory-5/4-memory",
        "MemoryError-6/5-more-memory",
        "ManifestError-7/6-hidden",
        "at-work/7-hang",
    }
