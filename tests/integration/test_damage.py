"""Damage of every kind to every kind of file.

It is named by verify, refused by readers and mended by ``--repair``; afterwards the
bank is what it was.
"""

from __future__ import annotations

import re
import shutil
import signal

import numpy as np
import pytest

from manifests.errors import TeachOnceError
from pipeline.bank.open import open_bank
from teachonce.cli import main
from tests.conftest import bank_identity

PATCH = "features.zarr/net/image/16x16/patch/c.1.1.0.0.0"
LOGITS = "features.zarr/points/lidar/native/logits/c.2.0.0"
SWAPPED = [f"points/lidar/native/logits/c.{block}.0.0" for block in (0, 2)]
ROWS = "rows/rows/00000001.parquet"
COMMIT = "commits/net.image/00000001.json"


def delete(path):
    path.unlink()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


def flip_in_first_page(path):
    data = bytearray(path.read_bytes())
    data[60] ^= 4
    path.write_bytes(bytes(data))


DAMAGES = [delete, truncate, empty, flip]


def copy_of(full, tmp_path):
    bank = tmp_path / "bank"
    shutil.copytree(full.bank, bank)
    return bank


def check(capsys, bank, *options):
    code = main(["verify", str(bank), *options])
    return code, capsys.readouterr().out


def repair(forked, full, bank):
    done = forked.run(["precompute", full.path, f"bank={bank}", "--quiet", "--repair"])
    assert done["code"] == 0, done["output"]
    assert bank_identity(bank) == full.identity
    assert main(["verify", str(bank), "--full"]) == 0
    return done["output"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_features(forked, full, tmp_path, capsys, damage):
    """Two objects of two passes and blocks, and nothing else is computed again."""
    bank = copy_of(full, tmp_path)
    kept = (bank / "commits/net.image/00000000.json").read_bytes()
    damage(bank / PATCH)
    damage(bank / LOGITS)
    options = ["--full"] if damage is flip else []
    code, said = check(capsys, bank, *options)
    assert code == 1
    assert re.search(rf"pass net\.image block 1 .*{re.escape(PATCH)}", said)
    assert re.search(rf"pass points\.lidar block 2 .*{re.escape(LOGITS)}", said)
    assert said.count("\npass ") == 2
    opened = open_bank(str(bank))
    with pytest.raises(TeachOnceError, match=r"patch, block 1, view 1\)"):
        opened.read("net/image/16x16/patch", 1, 1)
    with pytest.raises(TeachOnceError, match=r"logits, block 2, view 0\)"):
        opened.read("points/lidar/native/logits", 2)
    whole = open_bank(str(full.bank))
    np.testing.assert_array_equal(
        opened.read("net/image/16x16/patch", 1, 0),
        whole.read("net/image/16x16/patch", 1, 0),
    )
    said = repair(forked, full, bank)
    assert said.startswith("2 blocks of passes committed")
    assert "repaired: pass net.image block 1\n" in said
    assert "repaired: pass points.lidar block 2\n" in said
    assert (bank / "commits/net.image/00000000.json").read_bytes() == kept


def test_sound_objects_that_changed_places(forked, full, tmp_path, capsys):
    """Each is what it should be, but for another block: only the commit can tell."""
    bank = copy_of(full, tmp_path)
    first, second = (bank / f"features.zarr/{path}" for path in SWAPPED)
    one, other = first.read_bytes(), second.read_bytes()
    assert len(one) == len(other)
    first.write_bytes(other)
    second.write_bytes(one)
    code, said = check(capsys, bank, "--full")
    assert code == 1
    for block in (0, 2):
        assert re.search(rf"pass points\.lidar block {block} .*another crc32c", said)
    repair(forked, full, bank)


def test_any_flipped_bit_of_an_object_is_noticed(full, tmp_path):
    bank = copy_of(full, tmp_path)
    path = bank / LOGITS
    data = path.read_bytes()
    for position in range(0, len(data), 3):
        wrong = bytearray(data)
        wrong[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(wrong))
        with pytest.raises(TeachOnceError):
            open_bank(str(bank)).read("points/lidar/native/logits", 2)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_row_facts(forked, full, tmp_path, capsys, damage):
    bank = copy_of(full, tmp_path)
    damage(bank / ROWS)
    code, said = check(capsys, bank, *(["--full"] if damage is flip else []))
    assert code == 1
    assert re.search(rf"pass rows block 1 .*{ROWS}", said)
    assert repair(forked, full, bank).startswith("1 blocks of passes committed")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_commits(forked, full, tmp_path, capsys, damage):
    bank = copy_of(full, tmp_path)
    damage(bank / COMMIT)
    code, said = check(capsys, bank)
    assert code == 1
    assert "pass net.image block 1" in said
    assert repair(forked, full, bank).startswith("1 blocks of passes committed")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"block":1', '"block":2'), ('"fingerprint":"', '"fingerprint":"0')],
)
def test_edited_commits(forked, full, tmp_path, capsys, old, new):
    bank = copy_of(full, tmp_path)
    text = (bank / COMMIT).read_text()
    assert old in text
    (bank / COMMIT).write_text(text.replace(old, new))
    code, said = check(capsys, bank)
    assert code == 1
    assert "pass net.image block 1" in said
    repair(forked, full, bank)


@pytest.mark.parametrize("damage", [delete, truncate, empty, flip_in_first_page])
def test_damaged_blocks_table(forked, full, tmp_path, capsys, damage):
    """Made anew from the commits: no block is computed."""
    bank = copy_of(full, tmp_path)
    damage(bank / "blocks.parquet")
    code, said = check(capsys, bank)
    assert code == 1
    assert "blocks.parquet" in said
    with pytest.raises(TeachOnceError, match=r"blocks\.parquet"):
        open_bank(str(bank)).read("net/image/16x16/patch", 0)
    assert repair(forked, full, bank).startswith("0 blocks of passes committed")


@pytest.mark.parametrize(
    "path",
    [
        "features.zarr/zarr.json",
        "features.zarr/net/image/16x16/zarr.json",
        "features.zarr/net/image/16x16/patch/zarr.json",
        "features.zarr/views/flip/zarr.json",
    ],
)
@pytest.mark.parametrize("damage", [delete, truncate, empty])
def test_damaged_metadata(full, tmp_path, capsys, damage, path, run):
    """Arrays that stock readers would not find, or misread."""
    bank = copy_of(full, tmp_path)
    damage(bank / path)
    code, said = check(capsys, bank)
    assert code == 1
    assert path in said
    outcome = run(full.path, f"bank={bank}", do_repair=True)
    assert outcome.is_whole
    assert bank_identity(bank) == full.identity


@pytest.mark.parametrize(
    "path",
    [
        "features.zarr/views/flip/c.0.1",
        "features.zarr/views/image_box/c.0.0.0",
        "features.zarr/labels/class/c.0",
        "features.zarr/key/c.0",
        "features.zarr/net/image/16x16/valid/c.0",
        "index/part-00000.parquet",
    ],
)
@pytest.mark.parametrize("damage", [delete, flip])
def test_damaged_row_arrays(full, tmp_path, capsys, damage, path, run):
    """A deleted one would read as fill: not flipped, no label; verify says so first."""
    bank = copy_of(full, tmp_path)
    damage(bank / path)
    code, said = check(capsys, bank, *(["--full"] if damage is flip else []))
    assert code == 1
    assert path in said
    outcome = run(full.path, f"bank={bank}", do_repair=True)
    assert outcome.is_whole
    assert outcome.result.blocks == 0
    assert bank_identity(bank) == full.identity


@pytest.mark.parametrize("damage", DAMAGES)
def test_finalise_refuses_damaged_row_facts(full, tmp_path, capsys, damage):
    """It must not turn them into labels and sizes that look right."""
    bank = copy_of(full, tmp_path)
    before = bank_identity(bank)
    damage(bank / ROWS)
    del before[ROWS]
    assert main(["finalise", str(bank)]) != 0
    said = capsys.readouterr().err
    assert ROWS in said
    assert "--repair" in said
    after = bank_identity(bank)
    after.pop(ROWS, None)
    assert after == before


def test_a_missing_index_is_refused(full, tmp_path):
    bank = copy_of(full, tmp_path)
    (bank / "index/part-00000.parquet").unlink()
    with pytest.raises(TeachOnceError, match=r"index/part-00000\.parquet"):
        list(open_bank(str(bank)).rows())


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_damaged_record_is_refused(full, tmp_path, capsys, damage):
    bank = copy_of(full, tmp_path)
    damage(bank / "bank.json")
    assert main(["verify", str(bank)]) == 2
    said = capsys.readouterr().err
    assert "bank.json" in said
    assert said.count("\n") == 1


def killed_with_orphans(forked, full, bank):
    command = ["precompute", full.path, f"bank={bank}", "--quiet"]
    kill = {"match": r"commits/", "nth": 0, "when": "before"}
    assert forked.run(command, kill=kill)["code"] == -signal.SIGKILL
    orphans = sorted(bank.glob("features.zarr/net/image/16x16/patch/c.*"))
    assert orphans
    return command, orphans


def test_equal_orphans_are_taken_up(forked, full, tmp_path):
    bank = tmp_path / "bank"
    command, orphans = killed_with_orphans(forked, full, bank)
    before = {path: path.stat().st_ino for path in orphans}
    done = forked.run(command)
    assert done["code"] == 0, done["output"]
    assert {path: path.stat().st_ino for path in orphans} == before
    assert bank_identity(bank) == full.identity


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_damaged_orphans_are_refused_then_repaired(forked, full, tmp_path, damage):
    bank = tmp_path / "bank"
    command, orphans = killed_with_orphans(forked, full, bank)
    damage(orphans[0])
    done = forked.run(command)
    assert done["code"] == 1
    (line,) = done["output"].strip().splitlines()
    assert "uncommitted and with other contents" in line
    assert "--repair" in line
    block = int(orphans[0].name.split(".")[1])
    assert not (bank / f"commits/net.image/{block:08d}.json").exists()
    done = forked.run([*command, "--repair"])
    assert done["code"] == 0, done["output"]
    assert bank_identity(bank) == full.identity
