"""Exports that are killed, refused, or find damage."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest

from manifests.errors import BankError
from manifests.exported import Selection
from pipeline.bank.export import export
from pipeline.errors import RunStopped
from teachonce.cli import main
from tests.conftest import bank_identity
from tests.exporting import check_sound, commits

PATCH = "net/image/16x16/patch"
LOGITS = "net/image/16x16/logits"


# At every step: `test_kills`. Here: what others make of the half that is left.
NAMED = {
    "after saying what is made": (r"/export\.json$", 0, "after"),
    "after a few commits": (r"commits/", 4, "after"),
    "before the record": (r"/bank\.json$", 0, "before"),
}


@pytest.mark.parametrize("name", NAMED)
def test_killed_it_goes_on(forked, full, tmp_path, capsys, name):
    match, nth, when = NAMED[name]
    part = tmp_path / "part"
    command = ["export", full.bank, part, "--quiet"]
    kill = {"match": match, "nth": nth, "when": when}
    killed = forked.run(command, kill=kill)
    assert killed["code"] == -signal.SIGKILL, killed["output"]
    held = commits(part)
    names = {path.name for path in part.iterdir()}
    if "export.json" in names and "bank.json" not in names:
        assert main(["info", str(part)]) == 2
        assert main(["precompute", str(full.path), f"bank={part}"]) == 2
        assert "got an export that has not ended" in capsys.readouterr().err
    done = forked.run(command)
    assert done["code"] == 0, done["output"]
    assert bank_identity(part) == full.identity
    after = commits(part)
    assert {path: after[path] for path in held} == held
    assert not {path.name for path in part.iterdir()} & {"lock.json", "export.json"}
    check_sound(part)


def test_killed_again_and_again_it_ends(forked, full, tmp_path):
    """Each attempt gets one commit further at least, and copies none again."""
    part = tmp_path / "part"
    command = ["export", full.bank, part, "--quiet", "--json"]
    kill = {"match": r"commits/", "nth": 1, "when": "after"}
    counts = [0]
    while forked.run(command, kill=kill)["code"] == -signal.SIGKILL:
        counts.append(len(commits(part)))
        assert counts[-1] > counts[-2]
    assert counts[-1] >= 8
    assert bank_identity(part) == full.identity
    assert json.loads(forked.run(command)["output"])["objects"] == 0


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damaged", "damage", "message"),
    [
        (
            "features.zarr/net/image/16x16/patch/c.1.1.0.0.0",
            flip,
            r"pass net\.image block 1: .*patch/c\.1\.1\.0\.0\.0 has another crc32c",
        ),
        (
            "features.zarr/points/lidar/native/logits/c.2.0.0",
            lambda path: path.unlink(),
            r"pass points\.lidar block 2: .*logits/c\.2\.0\.0 is missing",
        ),
        (
            "rows/rows/00000001.parquet",
            lambda path: path.write_bytes(path.read_bytes()[:-3]),
            r"pass rows block 1: .*00000001\.parquet has \d+ bytes, its commit says",
        ),
        (
            "commits/net.image/00000000.json",
            lambda path: path.write_bytes(path.read_bytes()[:-3]),
            r"pass net\.image block 0: .*00000000\.json cannot be read",
        ),
    ],
)
def test_damage_is_named_and_does_not_travel(
    full, tmp_path, capsys, damaged, damage, message
):
    source, part = tmp_path / "bank", tmp_path / "part"
    shutil.copytree(full.bank, source)
    kept = (source / damaged).read_bytes()
    damage(source / damaged)
    assert main(["export", str(source), str(part)]) == 1
    said = capsys.readouterr().out
    assert len(re.findall("^damaged", said, re.MULTILINE)) == 1
    assert re.search(message, said)
    assert "not finished: mend the bank" in said
    assert len(commits(part)) == 8
    assert main(["info", str(part)]) == 2
    (source / damaged).write_bytes(kept)
    assert main(["export", str(source), str(part)]) == 0
    assert bank_identity(part) == full.identity


def test_damaged_statistics_do_not_travel(full, tmp_path):
    """They are copied where every block stays, and computed where shards are chosen."""
    source = tmp_path / "bank"
    shutil.copytree(full.bank, source)
    flip(source / "features.zarr/net/image/16x16/stats/patch_mean/c.0")
    with pytest.raises(RunStopped, match=r"patch_mean/c\.0 does not match its own crc"):
        export(str(source), str(tmp_path / "part"))
    shards = Selection(shards=("train-00000.tar",))
    assert export(str(source), str(tmp_path / "shards"), shards).is_whole
    check_sound(tmp_path / "shards")


def test_what_is_gone_or_cut_at_the_destination_is_copied_again(full, tmp_path):
    part = tmp_path / "part"
    export(str(full.bank), str(part))
    gone = part / "features.zarr" / PATCH / "c.0.0.0.0.0"
    gone.unlink()
    cut = part / "features.zarr" / LOGITS / "c.2.1.0"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert export(str(full.bank), str(part)).objects == 2
    assert bank_identity(part) == full.identity


def test_places_that_are_refused(full, tmp_path, run, make_job, make_shards):
    bank = str(full.bank)
    with pytest.raises(BankError, match="destination must lie outside the bank"):
        export(bank, f"{bank}/part")
    with pytest.raises(BankError, match="destination must lie outside the bank"):
        export(bank, bank)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(BankError, match=r"must be empty or hold this .*notes\.txt"):
        export(bank, str(taken))
    assert [path.name for path in taken.iterdir()] == ["notes.txt"]
    make_shards([4])
    run(make_job())
    with pytest.raises(BankError, match=r"got another bank .*not exported from"):
        export(bank, str(tmp_path / "bank"))
    part = tmp_path / "part"
    export(bank, str(part), Selection(teachers=("net",)))
    with pytest.raises(BankError, match=r"teachers: \('net',\) there, all now"):
        export(bank, str(part))
    moved = tmp_path / "moved"
    shutil.copytree(full.bank, moved)
    with pytest.raises(BankError, match=rf"exported from {bank}, not {moved}"):
        export(str(moved), str(part), Selection(teachers=("net",)))
    with pytest.raises(BankError, match="no bank at"):
        export(str(taken), str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--teachers", "nat"], r"teachers must be in the bank, got 'nat' .*mean net"),
        (["--groups", "cam"], r"groups must be in the bank, got 'cam' .*image, lidar"),
        (["--outputs", "cls"], "outputs must be in the bank, got 'cls'"),
        (["--outputs", "a/b/c"], "outputs must be OUTPUT, TEACHER/OUTPUT or"),
        (["--teachers", "net", "--groups", "lidar"], "must leave an output, got none"),
        (["--shards", "train-0000{0..3}.tra"], "shards must be in the bank, got"),
        (["--views", "1"], "--views must be all from 0 to some last one, got 1"),
        (["--views", "x"], "--views must be numbers such as 0 or 0-3, got 'x'"),
        (["--views", "0-4"], r"views must be in the bank, got 0 to 4 \(it has 0 to 1"),
    ],
)
def test_selections_that_are_refused(full, tmp_path, capsys, options, message):
    part = tmp_path / "part"
    assert main(["export", str(full.bank), str(part), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("teachonce export: ")
    assert re.search(message, said), said
    assert not part.exists()


def test_a_store_that_fails_in_the_middle(full, tmp_path, monkeypatch):
    import errno
    import os

    part = tmp_path / "part"
    replace = os.replace

    def failing(source, target):
        if "/patch/c.1" in str(target):
            raise OSError(errno.ENOSPC, "full")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(RunStopped, match=r"no space left.*same command goes"):
            export(str(full.bank), str(part))
    assert not (part / "lock.json").exists()
    assert export(str(full.bank), str(part)).is_whole
    assert bank_identity(part) == full.identity


def test_a_dead_runs_lock_is_removed_where_asked(full, tmp_path):
    part = tmp_path / "part"
    part.mkdir()
    owner = {"id": "x", "host": "elsewhere", "pid": 1, "purpose": "export"}
    (part / "lock.json").write_text(json.dumps(owner))
    assert main(["export", str(full.bank), str(part), "--break-lock"]) == 0
    assert not (part / "lock.json").exists()
