"""Killed at every step: the same command makes the identical bank.

The smallest bank that has every kind of step: two shards, two blocks, two passes, two
views. A run is ended by SIGKILL before its n-th write becomes visible (what it was
about to link or rename lies there under its temporary name), for every n but the
middle of a series of writes alike: what it leaves is also what a kill after the write
before leaves. Then the same command goes on.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from tests.conftest import bank_identity, write_job, write_shards

SIZES, MORE = (3, 2), (3,)
BATCH, VIEWS = 2, 2
CALLING = """

import os


class Calling(Net):
    def forward(self, x):
        if x.device.type != "meta":
            with open(os.environ["CALLS"], "a") as file:
                file.write("one batch of one view\\n")
        return super().forward(x)
"""
TEACHER = {
    "model": "module:./nets.py:Calling",
    "weights": "random:1",
    "sizes": [[16, 16]],
    "batch": BATCH,
    "outputs": {"logits": {}},
}
# What a write is for; the first that its path matches.
STEPS = {
    "lock": r"/lock\.json$",
    "record": r"/(bank|export)\.json$",
    "dataset": r"/dataset/",
    "run": r"/runs/",
    "commit": r"/commits/",
    "statistics": r"/stats/[^/]+/",
    "metadata": r"/zarr\.json$",
    "table": r"/(blocks|files)\.parquet$",
    "index": r"/index/",
    "row facts": r"/rows/",
    "object": r"/logits/c",
    "row array": r"/features\.zarr/",
    "card": r"/(README\.md|croissant\.json)$",
}


@dataclass(frozen=True)
class Small:
    """The job, its grown form and their banks, made by undisturbed runs.

    Attributes:
        job: the YAML; ``grown`` has a shard and a teacher more.
        bank, grown_bank: of them.
        committed: a copy of ``bank`` as it is when all is computed, nothing finalised.
        writes: of the undisturbed run that made ``bank``, paths in order.
    """

    job: Path
    grown: Path
    bank: Path
    grown_bank: Path
    committed: Path
    writes: tuple[str, ...]


def traced(forked, folder: Path, command: list[object]) -> tuple[str, ...]:
    """Runs a command to its end; returns the paths that it wrote, in order."""
    log = folder / "log"
    log.unlink(missing_ok=True)
    done = forked.run(command, log=log)
    assert done["code"] == 0, done["output"]
    return tuple(log.read_text().splitlines())


@pytest.fixture(scope="module")
def small(forked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_shards(folder, SIZES)
    fields = {"views": {"random": VIEWS - 1}, "block_rows": 4}
    shards = "./data/train-0000{0..1}.tar"
    job = write_job(
        folder, dataset={"shards": shards}, teachers={"net": TEACHER}, **fields
    )
    more = {"net": TEACHER, "other": {**TEACHER, "weights": "random:2"}}
    write_shards(folder, MORE, first=len(SIZES))
    grown = write_job(folder, "grown.yaml", teachers=more, **fields)
    with open(folder / "nets.py", "a") as file:
        file.write(CALLING)
    writes = traced(forked, folder, command(job, folder / "bank"))
    shutil.copytree(folder / "bank", folder / "grown")
    traced(forked, folder, command(grown, folder / "grown"))
    committed = folder / "committed"
    kill = {"match": r"blocks\.parquet$", "when": "before"}
    assert forked.run(command(job, committed), kill=kill)["code"] == -signal.SIGKILL
    return Small(job, grown, folder / "bank", folder / "grown", committed, writes)


def command(job: Path, bank: Path, *options: str) -> list[object]:
    return ["precompute", job, f"bank={bank}", "--quiet", *options]


def step_of(path: str) -> str:
    return next(name for name, pattern in STEPS.items() if re.search(pattern, path))


def starts_of_steps(writes: Iterable[str]) -> list[int]:
    """Returns the number of the first write of each step of a run."""
    steps = groupby(enumerate(writes), lambda one: step_of(one[1]))
    return [next(group)[0] for _, group in steps]


def before_finalise(writes: tuple[str, ...]) -> list[int]:
    """Returns the starts of steps up to finalise, which has a test of its own."""
    (end,) = (n for n, path in enumerate(writes) if path.endswith("/blocks.parquet"))
    points = [point for point in starts_of_steps(writes) if point <= end]
    return [*points, len(writes) - 1]


def all_but_series(writes: tuple[str, ...]) -> list[int]:
    """Returns the numbers of all writes; of more than six alike each third, and ends.

    Alike are the metadata of one array after the other, and such; a kill between two
    leaves some of them.
    """
    found = []
    for _, group in groupby(range(len(writes)), lambda number: step_of(writes[number])):
        numbers = list(group)
        if len(numbers) > 6:
            numbers = [*numbers[:-1:3], numbers[-1]]
        found += numbers
    return found


def commits(bank: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path.relative_to(bank)): (path.read_bytes(), path.stat().st_ino)
        for path in sorted(bank.glob("commits/*/*.json"))
    }


def calls_left(bank: Path, held: Iterable[str]) -> int:
    """Returns how often teachers are called for the blocks that lack a commit."""
    count = 0
    for path in sorted(bank.glob("commits/*/*.json")):
        content = json.loads(path.read_bytes())["content"]
        is_teacher = not content["pass_id"].startswith("rows")
        if is_teacher and str(path.relative_to(bank)) not in held:
            count += VIEWS * -(-content["rows"] // BATCH)
    return count


def killed_at(
    forked, tmp_path: Path, points: list[int], start: Path | None, line
) -> Iterator[tuple[int, Path, dict, dict, dict]]:
    """Kills a command at each point and runs it again, two banks at a time.

    Args:
        forked: the server of forks.
        tmp_path: for the banks.
        points: numbers of the writes before which to kill.
        start: what the banks hold before; None for nothing.
        line: makes the command of a bank.

    Yields:
        Point, bank, commits that the killed run left, answers of the two runs.
    """
    for pair in zip(points[::2], [*points[1::2], None], strict=False):
        banks = {}
        for point in pair:
            if point is not None:
                banks[point] = tmp_path / str(point)
                if start is not None:
                    shutil.copytree(start, banks[point])
        lines = [line(bank) for bank in banks.values()]
        kills = [{"write": point, "when": "before"} for point in banks]
        killed = as_list(forked.run(*lines, kill=kills))
        left = [commits(bank) for bank in banks.values()]
        again = as_list(forked.run(*lines))
        for place, (point, bank) in enumerate(banks.items()):
            assert killed[place]["code"] == -signal.SIGKILL, (point, killed[place])
            assert again[place]["code"] == 0, (point, again[place]["output"])
            yield point, bank, left[place], killed[place], again[place]
            shutil.rmtree(bank)


def as_list(answers):
    return [answers] if isinstance(answers, dict) else answers


def check(point: int, bank: Path, expected: dict) -> None:
    """Checks that a bank is what an undisturbed run makes, whole and unlocked."""
    assert bank_identity(bank) == expected, point
    report = verify(*open_record(str(bank)), full=True)
    assert report.is_sound, (point, report.problems)
    assert report.orphans == [], point
    left = {path.name for path in bank.iterdir()}
    assert not left & {"lock.json", "export.json"}, point


def check_resumed(point, bank, left, killed, again) -> None:
    """Checks that no committed block was computed, or written, twice."""
    after = commits(bank)
    assert {path: after[path] for path in left} == left, point
    assert again["calls"] == calls_left(bank, left), point
    num_new = len(after) - len(left)
    if num_new:
        said = f"{num_new} blocks of passes committed"
        assert again["output"].startswith(said), (point, again["output"])


def test_every_step_is_among_the_writes(small):
    steps = {step_of(path) for path in small.writes}
    assert steps == set(STEPS)
    kinds = {re.sub(r"\d+", "N", path.rsplit("/", 1)[1]) for path in small.writes}
    assert {"bank.json", "lock.json", "zarr.json", "c.N.N.N", "N.json"} <= kinds


def test_a_run_killed_before_any_write(forked, small, tmp_path):
    expected = bank_identity(small.bank)
    points = all_but_series(small.writes)
    calls = set()
    for one in killed_at(
        forked, tmp_path, points, None, lambda bank: command(small.job, bank)
    ):
        check(one[0], one[1], expected)
        check_resumed(*one)
        calls.add(one[4]["calls"])
    # All of it, a part of it and nothing was left to compute.
    assert {0, 2, 6} <= calls


def test_growth_killed_in_any_step(forked, small, tmp_path):
    """A shard and a teacher more: index, arrays and record grow, then the rest."""
    expected = bank_identity(small.grown_bank)
    before = {
        path: data
        for path, data in bank_identity(small.bank).items()
        if re.search(r"logits/c|^rows/|^commits/", path)
    }
    bank = tmp_path / "traced"
    shutil.copytree(small.bank, bank)
    writes = traced(forked, tmp_path, command(small.grown, bank))
    assert len([path for path in writes if step_of(path) == "metadata"]) > 10
    for one in killed_at(
        forked,
        tmp_path,
        before_finalise(writes),
        small.bank,
        lambda bank: command(small.grown, bank),
    ):
        check(one[0], one[1], expected)
        check_resumed(*one)
        held = bank_identity(one[1])
        assert {path: held[path] for path in before} == before


def damage(bank: Path) -> None:
    """Damages an object, a row-fact object, an index and metadata."""
    (bank / "features.zarr/net/image/16x16/logits/c.0.1.0").write_bytes(b"")
    (bank / "rows/rows/00000001.parquet").unlink()
    (bank / "index/part-00000.parquet").unlink()
    (bank / "features.zarr/key/zarr.json").unlink()
    (bank / "dataset/part-00000.parquet").write_bytes(b"")


def test_repair_killed_in_any_step(forked, small, tmp_path):
    expected = bank_identity(small.bank)
    kept = commits(small.bank).keys() - {
        "commits/net.image/00000000.json",
        "commits/rows/00000001.json",
    }
    before = commits(small.bank)
    damaged = tmp_path / "damaged"
    shutil.copytree(small.bank, damaged)
    damage(damaged)
    bank = tmp_path / "traced"
    shutil.copytree(damaged, bank)
    line = command(small.job, bank, "--repair")
    writes = traced(forked, tmp_path, line)
    for point, bank, left, _, again in killed_at(
        forked,
        tmp_path,
        before_finalise(writes),
        damaged,
        lambda bank: command(small.job, bank, "--repair"),
    ):
        check(point, bank, expected)
        after = commits(bank)
        assert all(after[path] == left[path] for path in kept), point
        path = "commits/net.image/00000000.json"
        is_new = path in left and left[path][0] != before[path][0]
        # Two batches in two views, unless the killed run got as far as to commit them.
        assert again["calls"] == (0 if is_new else 2 * VIEWS), point


def test_finalise_killed_before_any_step(forked, small, tmp_path):
    expected = bank_identity(small.bank)
    bank = tmp_path / "traced"
    shutil.copytree(small.committed, bank)
    writes = traced(forked, tmp_path, ["finalise", bank])
    for point, bank, left, _, _ in killed_at(
        forked,
        tmp_path,
        starts_of_steps(writes),
        small.committed,
        lambda bank: ["finalise", bank],
    ):
        check(point, bank, expected)
        assert commits(bank) == left


def test_export_killed_in_any_step(forked, small, tmp_path):
    expected = bank_identity(small.bank)
    writes = traced(
        forked, tmp_path, ["export", small.bank, tmp_path / "traced", "--quiet"]
    )
    for point, bank, left, _, _ in killed_at(
        forked,
        tmp_path,
        starts_of_steps(writes),
        None,
        lambda bank: ["export", small.bank, bank, "--quiet"],
    ):
        check(point, bank, expected)
        after = commits(bank)
        assert {path: after[path] for path in left} == left, point
