"""The real command killed at random moments, until the bank is whole; then compared.

    python benchmarks/random_kills.py --data DATA --kills 30 --seed 0

DATA holds ``cifar10-train/*.tar`` (KEY.jpg, KEY.cls) and
``cifar10-teachers/resnet20.pt`` (published weights). One undisturbed run of ``teachonce
precompute`` makes the bank to compare with and says how long it takes, start-up and
all. Then the same command is started, and killed (SIGKILL, the whole process group)
after a time drawn evenly from nothing to that long; started again on what is left, and
so on. A bank that gets whole in spite of it is compared and verified, and the next one
begins, until as many kills are done. Exit 1 if a bank differs by a byte, a commit was
ever written again, or a run planned a block that was committed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.conftest import ROOT, bank_identity, write_tar

NETS = Path(__file__).with_name("cifar_nets.py")
SHARDS = 4
Commits = dict[str, tuple[bytes, int]]


def read_samples(data: Path) -> Iterator[tuple[str, bytes]]:
    """Yields name and bytes of every member of the dataset's shards, in order."""
    for path in sorted((data / "cifar10-train").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                yield member.name, file.read()


def take_samples(data: Path, folder: Path, count: int) -> None:
    """Writes the first samples of the dataset into a few small shards."""
    samples = groupby(read_samples(data), lambda one: one[0].partition(".")[0])
    for number in range(SHARDS):
        members: list[tuple[str, bytes]] = []
        for _, group in islice(samples, count // SHARDS):
            members += group
        write_tar(folder / f"cifar-{number:05d}.tar", members)


def write_job(folder: Path, weights: Path) -> Path:
    """Writes the job: a published network's logits and last map."""
    job = {
        "bank": "./bank",
        "dataset": {"shards": "./data/*.tar"},
        "inputs": {"image": {"kind": "image", "member": "jpg"}},
        "labels": {"class": {"member": "cls", "num_classes": 10}},
        "teachers": {
            "resnet20": {
                "model": f"module:{NETS}:CifarResNet",
                "args": {"depth": 20},
                "weights": str(weights),
                "sizes": [[32, 32]],
                "preprocess": {
                    "mean": [0.485, 0.456, 0.406],
                    "std": [0.229, 0.224, 0.225],
                },
                "batch": 32,
                "outputs": {
                    "logits": {"from": "output[logits]"},
                    "patch": {"from": "layer3", "encoding": "compact"},
                },
            }
        },
        "views": {"random": 1},
        "block_rows": 64,
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    return path


def start(job: Path, bank: Path) -> subprocess.Popen[bytes]:
    """Starts the command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "teachonce", "precompute", str(job), f"bank={bank}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def commits(bank: Path) -> Commits:
    """Returns bytes and inode of every commit by name."""
    return {
        str(path.relative_to(bank)): (path.read_bytes(), path.stat().st_ino)
        for path in sorted(bank.glob("commits/*/*.json"))
    }


def phase(bank: Path, known: set[str], num_commits: int, total: int) -> str:
    """Returns what a killed run was at, as far as its bank tells.

    Args:
        bank: as the kill left it.
        known: runs that it had before.
        num_commits: that it has now.
        total: commits of a whole bank.
    """
    record, is_locked = bank / "bank.json", (bank / "lock.json").exists()
    if not record.exists():
        return "making the bank" if is_locked else "starting"
    if not runs_of(bank) - known:
        return "starting again"
    if num_commits < total:
        return "computing"
    state = json.loads(record.read_bytes())["state"]
    return "ending" if state is not None and state["complete"] else "finalising"


def runs_of(bank: Path) -> set[str]:
    """Returns the names of the records of runs."""
    return {path.name for path in bank.glob("runs/*.json")}


def planned_twice(bank: Path, known: set[str], lacking: int) -> int:
    """Returns how many committed blocks runs that began since planned again."""
    found = 0
    for path in bank.glob("runs/*.json"):
        if path.name not in known:
            planned = json.loads(path.read_bytes())["planned_blocks"]
            found += abs(sum(planned.values()) - lacking)
    return found


@dataclass
class Campaign:
    """What is killed, compared and counted."""

    job: Path
    identity: dict[str, object]
    total: int
    recomputed: int = 0
    whole: int = 0
    is_identical: bool = True
    phases: Counter[str] = field(default_factory=Counter)

    def attempt(
        self, bank: Path, wait_s: float | None
    ) -> tuple[Commits, Commits, bool]:
        """Runs the command, killed after a while; returns commits and if it ended."""
        before = commits(bank)
        known = runs_of(bank)
        process = start(self.job, bank)
        try:
            process.wait(wait_s)
            has_ended = True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            has_ended = False
        after = commits(bank)
        self.recomputed += sum(after.get(name) != one for name, one in before.items())
        self.recomputed += planned_twice(bank, known, self.total - len(before))
        if has_ended and process.returncode:
            raise SystemExit(f"the command ended with {process.returncode} on {bank}")
        return before, after, has_ended

    def compare(self, bank: Path) -> None:
        """Compares a bank that is whole with the undisturbed one, and verifies it."""
        self.whole += 1
        found = bank_identity(bank)
        names = sorted(found.keys() | self.identity.keys())
        wrong = [one for one in names if found.get(one) != self.identity.get(one)]
        command = [sys.executable, "-m", "teachonce", "verify", str(bank), "--full"]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = f"{done.stdout}{done.stderr}".strip()
            wrong.append(f"verify ended with {done.returncode}: {said}")
        if (bank / "lock.json").exists():
            wrong.append("it is locked")
        for one in wrong:
            print(f"{bank.name}: {one}", flush=True)
        self.is_identical &= not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="omitted: DATA's resnet20.pt")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = args.data.resolve()
    weights = args.weights or data / "cifar10-teachers" / "resnet20.pt"
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        take_samples(data, folder / "data", args.samples)
        job = write_job(folder, weights.resolve())
        started = time.monotonic()
        if start(job, folder / "undisturbed").wait():
            raise SystemExit("the undisturbed run failed")
        seconds = time.monotonic() - started
        whole = folder / "undisturbed"
        campaign = Campaign(job, bank_identity(whole), len(commits(whole)))
        print(
            f"{args.samples} samples, {campaign.total} blocks of passes, undisturbed "
            f"{seconds:.1f} s; seed {args.seed}\n"
            f"{'kill':>4} {'bank':>4} {'after s':>8} {'before':>7} {'after':>6}  phase",
            flush=True,
        )
        kill = 0
        while kill < args.kills:
            bank = folder / f"bank-{campaign.whole}"
            wait_s = rng.uniform(0, seconds)
            known = runs_of(bank)
            before, after, has_ended = campaign.attempt(bank, wait_s)
            if has_ended:
                campaign.compare(bank)
                continue
            kill += 1
            at = phase(bank, known, len(after), campaign.total)
            campaign.phases[at] += 1
            print(
                f"{kill:4} {campaign.whole:4} {wait_s:8.1f} {len(before):7} "
                f"{len(after):6}  {at}",
                flush=True,
            )
        last = folder / f"bank-{campaign.whole}"
        campaign.attempt(last, None)
        campaign.compare(last)
    phases = ", ".join(f"{count} {one}" for one, count in campaign.phases.items())
    verdict = "identical and sound" if campaign.is_identical else "NOT IDENTICAL"
    print(
        f"{kill} kills ({phases}); {campaign.whole} banks got whole, all {verdict}; "
        f"committed blocks computed or written again: {campaign.recomputed}"
    )
    return 0 if campaign.is_identical and not campaign.recomputed else 1


if __name__ == "__main__":
    sys.exit(main())
