"""Another team is handed a bank; its copy of the shards lies elsewhere."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest
import yaml

from manifests.errors import BankError, TeachOnceError
from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.plan import make_plan
from pipeline.precompute import precompute
from student_train.dataset import BankDataset
from student_train.reading import Reading
from teachonce.cli import main
from tests.conftest import TEACHER_FILE, without_checksum, write_job, write_shards
from tests.training import STUDENT

OTHER = {
    "other": {
        "model": "module:./nets.py:Net",
        "weights": "random:7",
        "sizes": [[16, 16]],
        "batch": 4,
        "outputs": {"logits": {}},
    }
}
READING = Reading(inputs={"image": (8, 8)}, targets={"patch": "net/patch"})


def objects(bank: Path) -> dict[str, bytes]:
    """Every object of every pass, and every commit."""
    found = [*bank.glob("features.zarr/*/*/*/*/c.*"), *bank.glob("rows/*/*")]
    found += bank.glob("commits/*/*.json")
    return {
        str(path.relative_to(bank)): path.read_bytes()
        for path in found
        if not {"stats", "valid"} & set(path.parts)
    }


@dataclass(frozen=True)
class Handed:
    """What a receiver has: a folder with the bank, and the raw shards elsewhere."""

    folder: Path
    bank: Path
    raw: Path
    first: list  # the maker's own batches

    def job(self, name: str, shards: object, **fields: object) -> Path:
        fields = {"teachers": OTHER, **fields}
        return write_job(self.folder, name, dataset={"shards": shards}, **fields)

    def batches(self, shards: str | None) -> list:
        return batches_of(self.bank, shards)


def batches_of(bank: Path, shards: str | None) -> list:
    patterns = None if shards is None else [shards]
    dataset = BankDataset(str(bank), READING, batch=4, shards=patterns, threads=1)
    return [
        (batch.inputs["image"].numpy().copy(), batch.targets["patch"].values().numpy())
        for batch in dataset.batches(0)
    ]


@pytest.fixture(scope="module")
def maker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("maker")
    write_shards(folder, [11, 6])
    done = precompute(load_job(str(write_job(folder))), quiet=True)
    assert done.is_whole
    return folder


@pytest.fixture
def handed(maker: Path, tmp_path: Path) -> Handed:
    first = batches_of(maker / "bank", None)
    folder, raw = tmp_path / "receiver", tmp_path / "raw" / "deep"
    shutil.copytree(maker / "bank", folder / "bank")
    shutil.copytree(maker / "data", raw)
    (folder / "nets.py").write_text(TEACHER_FILE)
    # The maker's folder is another machine's: nothing lies there.
    path = folder / "bank" / "bank.json"
    told = without_checksum(path.read_text())
    path.write_text(told.replace(str(maker), "/nowhere/else"))
    return Handed(folder, folder / "bank", raw, first)


def same(mine: list, theirs: list) -> None:
    assert len(mine) == len(theirs) > 2
    for (pixels, values), (other_pixels, other_values) in zip(
        mine, theirs, strict=True
    ):
        np.testing.assert_array_equal(pixels, other_pixels)
        np.testing.assert_array_equal(values, other_values)


def refused(call, *patterns: str) -> None:
    with pytest.raises(TeachOnceError) as caught:
        call()
    for pattern in patterns:
        assert re.search(pattern, str(caught.value)), str(caught.value)


def test_a_student_learns_from_the_same_batches(handed: Handed) -> None:
    same(handed.batches(f"{handed.raw}/*.tar"), handed.first)
    refused(
        lambda: handed.batches(None),
        r"data.shards: cannot read /nowhere/else/data/train-00000.tar: nothing is",
    )
    recipe = {
        "run": "./run",
        "banks": {"b": "./bank"},
        "data": {"shards": "../raw/*/train-*.tar"},
        "student": STUDENT,
        "targets": {
            "patch": {
                "from": "b/net/patch",
                "head": {"kind": "linear"},
                "loss": {"cosine": 1.0},
            }
        },
        "loader": {"workers": 0, "window_blocks": 2},
        "optimizer": {"kind": "adamw"},
        "stages": [{"name": "one", "steps": 1, "batch": 4, "lr": 0.001, "size": 16}],
    }
    path = handed.folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["train", str(path), "--quiet"]) == 0


def test_a_teacher_is_added_by_shards_that_lie_elsewhere(handed: Handed) -> None:
    before = objects(handed.bank)
    job = handed.job("job.yaml", "../raw/deep/train-*.tar")
    assert precompute(load_job(str(job)), quiet=True).is_whole
    after = objects(handed.bank)
    assert {path: after[path] for path in before} == before
    assert {path.split("/")[1] for path in set(after) - set(before)} == {
        "other.image"
    } | {"other"}
    store, record = open_record(str(handed.bank))
    assert verify(store, record, full=True).is_sound
    # The bank knows where they are now, under the names that it gave them.
    assert [shard.url for shard in record.shards] == [
        f"{handed.raw}/train-0000{number}.tar" for number in range(2)
    ]
    same(handed.batches(None), handed.first)
    logits = open_bank(str(handed.bank)).read("other/image/16x16/logits", 0)
    assert np.isfinite(logits).all()


def test_shards_in_a_store(handed: Handed) -> None:
    """Another scheme is another place, nothing more."""
    fs = fsspec.filesystem("memory")
    for path in handed.raw.iterdir():
        fs.pipe_file(f"/receiver/{path.name}", path.read_bytes())
    try:
        shards = "memory://receiver/train-*.tar"
        same(handed.batches(shards), handed.first)
        before = objects(handed.bank)
        assert precompute(load_job(str(handed.job("job.yaml", shards))), quiet=True)
        after = objects(handed.bank)
        assert {path: after[path] for path in before} == before
        _, record = open_record(str(handed.bank))
        assert record.state.valid["other.image"] == 17
    finally:
        fs.rm("/receiver", recursive=True)


def test_copies_under_other_names_are_not_guessed_at(handed: Handed) -> None:
    for number, path in enumerate(sorted(handed.raw.iterdir())):
        path.rename(path.with_name(f"imagenet_{number}.tar"))
    record = (handed.bank / "bank.json").read_bytes()
    shards = f"{handed.raw}/*.tar"
    refused(
        lambda: handed.batches(shards),
        "data.shards must have a copy of the bank's train-00000.tar",
        r"imagenet_0.tar",
        "a copy keeps its name: rename or link it",
    )
    job = load_job(str(handed.job("job.yaml", shards)))
    refused(lambda: make_plan(job), "another job's", "a copy keeps its name")
    assert (handed.bank / "bank.json").read_bytes() == record


def test_a_shard_that_changed_is_not_the_banks(handed: Handed, tmp_path: Path) -> None:
    write_shards(tmp_path / "foreign", [6], first=1)
    foreign = tmp_path / "foreign" / "data" / "train-00001.tar"
    assert foreign.stat().st_size == (handed.raw / foreign.name).stat().st_size
    data = foreign.read_bytes().replace(b"s1-0003.", b"s1-9993.")
    shutil.copy(mended(data, foreign), handed.raw / foreign.name)
    refused(
        lambda: handed.batches(f"{handed.raw}/*.tar"),
        r"data.shards: .*/raw/deep/train-00001.tar must be the bank's train-00001.tar",
        "its members differ; give the shards that the bank was made from",
    )


def mended(data: bytes, path: Path) -> Path:
    """Writes a tar whose names were changed, its headers' sums right."""
    found = bytearray(data)
    for at in range(0, len(found), 512):
        if found[at + 257 : at + 262] == b"ustar":
            found[at + 148 : at + 156] = b" " * 8
            found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    path.write_bytes(found)
    return path


def test_who_has_a_part_of_the_shards_is_told_before_anything_is_done(
    handed: Handed, capsys: pytest.CaptureFixture[str]
) -> None:
    (handed.raw / "train-00000.tar").unlink()
    shards = f"{handed.raw}/*.tar"
    record = (handed.bank / "bank.json").read_bytes()
    job = handed.job("job.yaml", shards)
    refused(
        lambda: make_plan(load_job(str(job))),
        "dataset.shards must name the bank's train-00000.tar, which the job has to rea",
        "/nowhere/else/data/train-00000.tar, where it was last found, cannot be read",
        "teachonce export BANK DEST --shards",
    )
    for verb in ("plan", "precompute"):
        assert main([verb, str(job)]) == 2
    assert (handed.bank / "bank.json").read_bytes() == record
    # What it says works.
    part = handed.folder / "part"
    command = ["export", str(handed.bank), str(part), "--shards", "train-00001.tar"]
    assert main([*command, "--quiet"]) == 0
    assert main(["precompute", str(job), f"bank={part}", "--quiet"]) == 0
    capsys.readouterr()
    _, grown = open_record(str(part))
    assert grown.state.valid["other.image"] == 6


def test_a_job_that_reads_nothing_needs_no_shards(handed: Handed) -> None:
    """What is complete is not read again, wherever it lay."""
    (handed.raw / "train-00000.tar").unlink()
    job = load_job(str(write_job(handed.folder, dataset={"shards": f"{handed.raw}/*"})))
    plan = make_plan(job)
    assert not any(plan.missing_blocks().values())
    with pytest.raises(BankError, match="no output 'other"):
        open_bank(str(handed.bank)).read("other/image/16x16/logits", 0)
