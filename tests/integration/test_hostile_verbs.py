"""Hostile shards through index, plan, precompute, verify, the trainer and pack.

The corpus of ``tests/data`` in one job: whatever one file is, the others' samples come
out, and every row and every damage has its name.
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from manifests.dataset import DatasetRecord
from pipeline.bank.open import open_bank
from student_train.dataset import BankDataset
from student_train.reading import Reading
from teachonce.cli import main
from tests.conftest import jpeg, write_job
from tests.fuzz.campaign import CORPUS

SHARDS = CORPUS / "tar"
# Shards that a run cannot take whole, and what it says of them.
DAMAGED = {
    "checksum.tar": "invalid header",
    "concatenated.tar": "members after it",
    "cut-in-data.tar": "the file holds",
    "cut.tar.gz": "the compressed data end early",
    "nothing.tar": "an empty file is no tar",
    "size-base-256-negative.tar": "negative",
    "size-past-the-end.tar": "the file holds",
    "pax-length-0.tar": "PAX header",
    "pax-size-negative.tar": "a PAX size that is no number",
    "gnu-long-huge.tar": "an extension header of 1073741824 bytes",
    "zstd.tar": "a zstd file",
}
REFUSED = {
    ("duplicate-member.tar", "b"): "duplicate_key",
    ("name-absolute.tar", "/etc/b"): "unsafe_key",
    ("name-dots.tar", "a/../../b"): "unsafe_key",
    ("pax-path-dots.tar", "../../up"): "unsafe_key",
    ("name-nul.tar", "b"): "",
    ("pax-path-latin1.tar", r"\udce9\udcff"): "not_utf8",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    # The shape of images is that of the first: good ones come first.
    names = sorted(os.listdir(SHARDS), key=lambda name: ("library" not in name, name))
    return write_job(
        folder,
        dataset={"shards": [str(SHARDS / name) for name in names]},
        inputs={"image": {"kind": "image", "member": "jpg"}},
        block_rows=4,
    )


def test_index_names_what_is_wrong(tmp_path, capsys):
    patterns = [f"{SHARDS}/*.tar", f"{SHARDS}/*.tar.*"]
    code = main(["index", *patterns, str(tmp_path / "index"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert code == 1
    text = (tmp_path / "index" / "dataset.json").read_text()
    shards = {one.name: one for one in DatasetRecord.model_validate_json(text).shards}
    assert set(shards) == set(os.listdir(SHARDS))
    for name, what in DAMAGED.items():
        assert what in (shards[name].damage or ""), (name, shards[name].damage)
    for (name, key), reason in REFUSED.items():
        faults = {fault.key: fault.reason for fault in shards[name].faults}
        assert reason in faults.get(key, ""), (name, faults)
    for name in ("library-gnu.tar", "library-pax.tar", "one.tar.gz", "one.tar.xz"):
        assert shards[name].damage is None
        assert not shards[name].faults
    assert told["samples"] == sum(one.samples for one in shards.values())


def test_a_run_takes_what_is_good(job, capsys):
    bank = job.parent / "bank"
    assert main(["plan", str(job)]) in (0, 1)
    assert not bank.exists()
    assert main(["precompute", str(job), "--quiet"]) == 1
    capsys.readouterr()
    opened = open_bank(str(bank))
    state = opened.record.state
    assert state.complete
    for name, what in DAMAGED.items():
        assert what in state.damaged_shards[name]
    # Every row has a value or a reason.
    rows = list(opened.rows())
    assert len(rows) == state.rows > 150
    for row in rows:
        is_valid = row["valid.net.image"]
        assert is_valid == (row["reason.net.image"] is None), row
    good = {(row["shard"], row["key"]) for row in rows if row["valid.net.image"]}
    kinds = ("gnu", "pax", "ustar")
    assert good == {(f"library-{kind}.tar", "dir/one") for kind in kinds}
    # Nothing that a link or a path said was followed.
    assert not any("passwd" in row["key"] for row in rows)
    assert main(["verify", str(bank), "--full"]) == 0
    assert main(["info", str(bank)]) == 1
    said = capsys.readouterr().out
    for name in DAMAGED:
        assert f"damaged  {name}: " in said
    # The trainer reads what is good, and nothing else.
    reading = Reading(inputs={"image": (8, 8)}, targets={"patch": "net/patch"})
    dataset = BankDataset(str(bank), reading, batch=1, threads=1, window_blocks=1)
    assert dataset.num_rows == 3
    keys = [key for batch in dataset.batches(0) for key in batch.keys]
    assert keys == ["dir/one"] * 3
    # Another teacher finds the same rows.
    assert main(["precompute", str(job), "--quiet"]) == 1


def test_all_hostile_shards_through_index_and_plan(shared_data, tmp_path, capsys):
    folder = shared_data / "hostile"
    expected = json.loads((folder / "expected.json").read_text())
    code = main(["index", f"{folder}/*.tar", str(tmp_path / "index")])
    assert code == 1
    text = (tmp_path / "index" / "dataset.json").read_text()
    shards = {one.name: one for one in DatasetRecord.model_validate_json(text).shards}
    assert {name.removesuffix(".tar") for name in shards} == set(expected)
    for name, want in expected.items():
        if name.startswith("ar-") and want["bad_keys"]:
            assert shards[f"{name}.tar"].damage, name
    inputs = {"image": {"kind": "image", "member": ["jpg", "jpeg", "png"]}}
    where = {"shards": str(tmp_path / "index" / "dataset.json")}
    job = write_job(tmp_path, dataset=where, inputs=inputs, labels={})
    assert main(["plan", str(job)]) in (0, 1)
    assert not (tmp_path / "bank").exists()
    capsys.readouterr()


def test_pack_leaves_out_what_is_no_file(tmp_path, capsys):
    """A pipe would wait for ever, a device never end, a link may lead nowhere."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jpg").write_bytes(jpeg(1))
    os.mkfifo(source / "pipe.jpg")
    (source / "zero.jpg").symlink_to("/dev/zero")
    (source / "nowhere.jpg").symlink_to(tmp_path / "nothing")
    (source / "folder.jpg").mkdir()
    assert main(["pack", str(source), str(tmp_path / "out"), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 1
    reasons = {Path(path).name: why for path, why in told["unreadable"].items()}
    assert set(reasons) == {"pipe.jpg", "zero.jpg", "nowhere.jpg"}
    assert "a pipe or a device is no file" in reasons["pipe.jpg"]
    assert "a pipe or a device is no file" in reasons["zero.jpg"]
    (shard,) = (tmp_path / "out").glob("*.tar")
    with tarfile.open(shard) as archive:
        assert archive.getnames() == ["a.jpg"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"jpg": "a.jpg", "json": ' + "[" * 5000 + "]" * 5000 + "}", "must be JSON"),
        (
            '{"jpg": "a.jpg", "json": "' + r"{\"a\": " * 5000 + '"}',
            "must hold JSON or a",
        ),
        ('{"jpg": "a.jpg", "json": {"a": "\\ud800"}}', "must hold Unicode, got half a"),
        ('{"jpg": "a.jpg", "cls": ' + "9" * 5000 + "}", "must be JSON"),
    ],
)
def test_pack_refuses_hostile_lists_by_line(tmp_path, capsys, line, message):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"jpg": "a.jpg", "key": "good"}\n' + line + "\n")
    assert main(["pack", str(listed), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert len(said) < 1000
    assert message in said
    assert "line 2" in said
    assert not list((tmp_path / "out").glob("*.tar"))


def test_a_shard_that_is_a_pipe_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "train-0.tar")
    job = write_job(tmp_path)
    assert main(["plan", str(job)]) == 2
    assert "a pipe or a device is no file" in capsys.readouterr().err
