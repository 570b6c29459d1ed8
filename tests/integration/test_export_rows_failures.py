"""Parts of chosen rows that are killed, refused, find damage, or have no room."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest

from manifests.errors import BankError
from manifests.loading import load_job
from pipeline.bank.export import export
from pipeline.bank.row_names import KeyList
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import (
    bank_identity,
    sample_members,
    write_job,
    write_tar,
)
from tests.exporting import check_sound, commits, key_file

PATCH = "net/image/16x16/patch"


NAMED = {
    "before saying what is made": (r"/export\.json$", 0, "before"),
    "an object without its commit": (r"patch/c\.0", 0, "after"),
    "after a few commits": (r"commits/", 2, "after"),
    "in the statistics": (r"stats/patch_variance/c", 0, "after"),
    "before the record": (r"/bank\.json$", 0, "before"),
}


@pytest.mark.parametrize("name", NAMED)
def test_killed_it_goes_on_with_the_same_rows(forked, full, tmp_path, capsys, name):
    match, nth, when = NAMED[name]
    part, whole = tmp_path / "part", tmp_path / "whole"
    chosen = ["--fraction", "0.6", "--encoding", "patch=compact", "--quiet"]
    kill = {"match": match, "nth": nth, "when": when}
    command = ["export", full.bank, part, *chosen]
    assert forked.run(command, kill=kill)["code"] == -signal.SIGKILL
    held = commits(part)
    if name != "before saying what is made":
        other = ["--fraction", "0.5", *chosen[2:]]
        assert main(["export", str(full.bank), str(part), *other]) == 2
        assert "fraction: 0.6 there, 0.5 now" in capsys.readouterr().err
        assert main(["export", str(full.bank), str(part), *chosen[:2]]) == 2
        assert "encodings: {'patch': 'compact'} there, as stored now" in (
            capsys.readouterr().err
        )
    done = forked.run(command)
    assert done["code"] == 0, done["output"]
    after = commits(part)
    assert {path: after[path] for path in held} == held
    check_sound(part)
    assert main(["export", str(full.bank), str(whole), *chosen]) == 0
    assert bank_identity(part) == bank_identity(whole)
    done = forked.run([*command, "--json"])
    assert json.loads(done["output"])["objects"] == 0


def test_rows_of_a_bank_that_grows(full, tmp_path, capsys):
    source, part = tmp_path / "bank", tmp_path / "part"
    shutil.copytree(full.bank, source)
    gone = source / "commits/net.image/00000001.json"
    kept = gone.read_bytes()
    gone.unlink()
    command = ["export", str(source), str(part), "--fraction", "0.6"]
    assert main([*command, "--whole"]) == 2
    assert "it lacks 1 of net.image" in capsys.readouterr().err
    assert main(command) == 1
    assert "missing  pass net.image: 1 blocks" in capsys.readouterr().out
    gone.write_bytes(kept)
    assert main(command) == 0
    check_sound(part)
    whole = tmp_path / "whole"
    assert main(["export", str(source), str(whole), "--fraction", "0.6"]) == 0
    assert bank_identity(part) == bank_identity(whole)


def test_damage_does_not_travel_with_rows(full, tmp_path, capsys):
    source, part = tmp_path / "bank", tmp_path / "part"
    shutil.copytree(full.bank, source)
    path = source / f"features.zarr/{PATCH}/c.1.1.0.0.0"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))
    assert main(["export", str(source), str(part), "--fraction", "0.9"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"damaged  pass net\.image block 1: .*has another crc32c", said)
    assert main(["info", str(part)]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keys", "KEYS:s0-0001 nowhere"], r"got 'nowhere' \(.*keys\.txt\)"),
        (["--keys", "KEYS:"], "keys must be given, a line each, got none"),
        (["--keys", "KEYS:s1-0001", "--shards", "*0.tar"], "got 's1-0001'"),
        (["--fraction", "0"], r"--fraction must be in \(0, 1\], got 0"),
        (["--fraction", "1.5"], r"--fraction must be in \(0, 1\], got 1\.5"),
        (["--seed", "3"], "--seed must be a number from 0 on, beside --fraction"),
        (["--where", "label.class == 77"], "must leave a row, got none"),
        (["--where", "label.kind == 3"], r"must be on columns of the index"),
        (["--where", "label.class"], "must be COLUMN OP VALUE"),
    ],
)
def test_choices_that_are_refused(full, tmp_path, capsys, options, message):
    name, _, value = options[1].partition(":")
    if name == "KEYS":
        options[1] = str(key_file(tmp_path, value.split()))
    part = tmp_path / "part"
    assert main(["export", str(full.bank), str(part), *options]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert not part.exists()


def test_a_key_of_two_shards_must_say_which(tmp_path):
    for number in range(2):
        path = tmp_path / "data" / f"train-0000{number}.tar"
        write_tar(path, sample_members("sample-2", 1, False))
    precompute(load_job(str(write_job(tmp_path))), quiet=True)
    bank = tmp_path / "bank"
    with pytest.raises(
        BankError, match=r"got 'sample-2', which is in train-00000\.tar, tra"
    ):
        export(str(bank), str(tmp_path / "part"), keys=KeyList(["sample-2"], "list"))


def test_a_place_without_room_is_refused_before_the_first_byte(
    full, tmp_path, monkeypatch, capsys
):
    def run(free, *options):
        monkeypatch.setattr("manifests.storage.Store.free_bytes", lambda store: free)
        return main(["export", str(full.bank), str(tmp_path / "part"), *options])

    sizes = [
        size
        for path in full.bank.glob("commits/*/*.json")
        for size, _ in json.loads(path.read_text())["content"]["objects"].values()
    ]
    for options in ([], ["--fraction", "0.5"], ["--encoding", "patch=compact"]):
        assert run(0, *options) == 2
        said = capsys.readouterr().err
        assert re.search(r"must have room for about \d+ MiB, got 0 MiB free", said)
    assert run(sum(sizes) - 1) == 2
    assert not (tmp_path / "part").exists()
    assert run(sum(sizes)) == 0
    # What is there already takes no more room.
    assert run(0) == 0
