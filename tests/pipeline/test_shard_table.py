"""Shards of a bank: new, known, moved, touched, changed, damaged and mended."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import ManifestError, StorageError
from manifests.loading import load_job
from manifests.storage import Stat, Store
from pipeline import index
from pipeline.bank.dataset_index import IndexedShard, encode_rows, write_index
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.plan import make_plan
from pipeline.precompute import Outcome, precompute
from pipeline.samples import sources
from pipeline.shard_table import ShardChanges, classify_shards, find_shards, shard_table
from tests.conftest import sample_members, write_tar


def run(path: Path, *overrides: str) -> Outcome:
    return precompute(load_job(str(path), overrides), quiet=True)


def changes_of(path: Path) -> tuple[ShardChanges, bool]:
    plan = make_plan(load_job(str(path)))
    return plan.changes, plan.is_done


@pytest.fixture
def job(make_shards, make_job) -> Path:
    make_shards([6, 4])
    path = make_job()
    assert run(path).is_whole
    return path


def reasons(tmp_path: Path) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for row in open_bank(str(tmp_path / "bank")).rows():
        found.setdefault(row["shard"], set()).add(row["reason.net.image"])
    return found


def test_as_they_were(job):
    changes, is_done = changes_of(job)
    assert changes == ShardChanges(unchanged=("train-00000.tar", "train-00001.tar"))
    assert is_done


def test_an_unchanged_shard_is_not_read(job, monkeypatch):
    def fail(url):
        raise AssertionError(url)

    monkeypatch.setattr(index, "index_shard", fail)
    assert changes_of(job)[1]


def test_touched(job, tmp_path, monkeypatch):
    path = tmp_path / "data" / "train-00000.tar"
    os.utime(path, (1, 1))
    changes, is_done = changes_of(job)
    assert set(changes.unchanged) == {"train-00000.tar", "train-00001.tar"}
    assert list(changes.refreshed) == ["train-00000.tar"]
    assert is_done
    # Once looked into, it is known by its new time.
    assert run(job).was_done
    assert changes_of(job)[0].refreshed == {}


def test_moved(job, tmp_path, make_job):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    path = make_job(dataset={"shards": "./elsewhere/*.tar", "license": "cc0-1.0"})
    changes, is_done = changes_of(path)
    assert set(changes.unchanged) == {"train-00000.tar", "train-00001.tar"}
    assert changes.new == ()
    assert is_done
    assert run(path).was_done
    record = open_record(str(tmp_path / "bank"))[1]
    folders = {Path(shard.url).parent for shard in record.shards}
    assert folders == {tmp_path / "elsewhere"}
    assert changes_of(path)[0].refreshed == {}


def test_moved_and_grown_into_two_folders_of_the_same_names(job, tmp_path, make_job):
    (tmp_path / "data").rename(tmp_path / "a")
    members = [
        m for row in range(5) for m in sample_members(f"b{row}", 70 + row, False)
    ]
    write_tar(tmp_path / "b" / "train-00000.tar", members)
    path = make_job(dataset={"shards": ["./a/*.tar", "./b/*.tar"]})
    outcome = run(path)
    assert outcome.is_whole
    assert [shard.name for shard in outcome.record.shards] == [
        *("train-00000.tar", "train-00001.tar", "b/train-00000.tar"),
    ]
    assert not any(shard.retired for shard in outcome.record.shards)
    assert outcome.result.samples == 5


def test_the_same_names_in_two_folders(tmp_path, make_job):
    for number, folder in enumerate("ab"):
        for shard in range(2):
            seed = 100 * number + 10 * shard
            members = [
                one
                for row in range(3)
                for one in sample_members(f"{row}", seed + row, False)
            ]
            write_tar(tmp_path / folder / f"{shard}.tar", members)
    outcome = run(make_job(dataset={"shards": ["./a/*.tar", "./b/*.tar"]}))
    names = [shard.name for shard in outcome.record.shards]
    assert names == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    # A job that names one folder calls them otherwise, and they are the same.
    path = make_job(dataset={"shards": "./b/*.tar"})
    changes, is_done = changes_of(path)
    assert changes.unchanged == ("b/0.tar", "b/1.tar")
    assert is_done


@pytest.mark.parametrize("times", [1, 2])
def test_changed(job, tmp_path, times):
    for number in range(times):
        members = [
            one
            for row in range(9 + number)
            for one in sample_members(f"n{row}", 300 + 20 * number + row, False)
        ]
        write_tar(tmp_path / "data" / "train-00000.tar", members)
        outcome = run(job)
        assert outcome.is_whole
        assert outcome.result.samples == 9 + number
    names = [shard.name for shard in outcome.record.shards]
    versions = [f"train-00000.tar@{number}" for number in range(2, 2 + times)]
    assert names == ["train-00000.tar", "train-00001.tar", *versions]
    retired = [shard.name for shard in outcome.record.shards if shard.retired]
    assert retired == ["train-00000.tar", *versions[:-1]]
    found = reasons(tmp_path)
    assert found["train-00000.tar"] == {"retired"}
    assert found["train-00001.tar"] == found[versions[-1]] == {None}
    assert outcome.record.state.rows == 4 + 8 + times
    assert verify(*open_record(str(tmp_path / "bank")), full=True).is_sound
    assert run(job).was_done


def test_changed_and_moved(job, tmp_path, make_job):
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    members = [
        m for row in range(5) for m in sample_members(f"n{row}", 80 + row, False)
    ]
    write_tar(tmp_path / "elsewhere" / "train-00000.tar", members)
    path = make_job(dataset={"shards": "./elsewhere/*.tar"})
    changes, _ = changes_of(path)
    assert changes.retired == {"train-00000.tar"}
    assert changes.unchanged == ("train-00001.tar",)
    assert [shard.record.name for shard in changes.new] == ["train-00000.tar@2"]


def test_another_shard_of_a_known_name_retires_none(job, tmp_path, make_job):
    members = [
        m for row in range(5) for m in sample_members(f"n{row}", 80 + row, False)
    ]
    write_tar(tmp_path / "more" / "train-00000.tar", members)
    dataset = {"shards": ["./data/train-00001.tar", "./more/train-00000.tar"]}
    changes, _ = changes_of(make_job(dataset=dataset))
    assert changes.retired == frozenset()
    assert [shard.record.name for shard in changes.new] == ["train-00000.tar@2"]


def test_a_job_that_names_fewer_shards_keeps_the_others(job, make_job, tmp_path):
    path = make_job(dataset={"shards": "./data/train-00001.tar"})
    changes, is_done = changes_of(path)
    assert changes == ShardChanges(unchanged=("train-00001.tar",))
    assert is_done


def test_a_damaged_shard_that_comes_again_whole(make_shards, make_job, tmp_path):
    whole, _ = make_shards([10, 4])
    kept = tmp_path / "kept.tar"
    shutil.copy(whole, kept)
    whole.write_bytes(kept.read_bytes()[:7000])
    path = make_job()
    first = run(path)
    assert not first.is_whole
    assert list(first.record.state.damaged_shards) == ["train-00000.tar"]
    assert first.record.state.complete
    assert 0 < first.record.shards[0].samples < 10
    # Run again, the damage is still said.
    again = run(path)
    assert again.was_done
    assert not again.is_whole
    shutil.copy(kept, whole)
    mended = run(path)
    assert mended.is_whole
    assert [shard.name for shard in mended.record.shards if not shard.retired] == [
        *("train-00001.tar", "train-00000.tar@2"),
    ]
    assert mended.record.state.rows == 14
    assert mended.record.state.damaged_shards == {}


def test_a_dataset_json_is_used_and_checked(
    make_shards, make_job, tmp_path, monkeypatch
):
    paths = make_shards([5, 3])
    urls = [str(path) for path in paths]
    named = list(
        zip(sources.name_shards(urls), urls, sources.stat_shards(urls), strict=True)
    )
    store = Store(str(tmp_path / "index"))
    write_index(store, "dataset", index.index_shards(named))
    path = make_job(dataset={"shards": "./index/dataset.json"})
    walked: list[str] = []
    walk = index.index_shard
    monkeypatch.setattr(
        index, "index_shard", lambda url: (walked.append(url), walk(url))[1]
    )
    plan = make_plan(load_job(str(path)))
    assert walked == []
    assert [shard.samples for shard in plan.record.shards] == [5, 3]
    assert run(path).is_whole
    # A shard that is another one than when the index was made is walked again.
    members = [
        m for row in range(7) for m in sample_members(f"n{row}", 80 + row, False)
    ]
    write_tar(paths[1], members)
    outcome = run(path)
    assert set(walked) == {str(paths[1])}
    assert outcome.record.state.rows == 5 + 7


def test_an_index_whose_parquet_disagrees_is_refused(make_shards, tmp_path):
    urls = [str(path) for path in make_shards([5, 3])]
    named = list(
        zip(sources.name_shards(urls), urls, sources.stat_shards(urls), strict=True)
    )
    store = Store(str(tmp_path))
    shards = index.index_shards(named)
    write_index(store, "dataset", shards)
    store.replace("dataset.parquet", encode_rows(shards[:1]))
    with pytest.raises(
        ManifestError, match=r"says 3 samples in train-00001.tar, its Par"
    ):
        find_shards([str(tmp_path / "dataset.json")])
    (tmp_path / "dataset.parquet").unlink()
    with pytest.raises(StorageError, match=r"dataset.parquet: nothing is there"):
        find_shards([str(tmp_path / "dataset.json")])


def test_a_store_with_checksums_is_believed(make_shards):
    path = str(make_shards([3])[0])
    before = Stat(os.path.getsize(path), "etag-1", "monday")
    first = classify_shards(None, [path], [before], {})
    record = FakeRecord(shard_table(None, first, 8, "part-00000"))
    later = Stat(before.size_bytes, "etag-1", "tuesday")
    assert classify_shards(record, [path], [later], {}).unchanged == (
        "train-00000.tar",
    )
    # Equal headers and size do not outweigh another checksum.
    other = Stat(before.size_bytes, "etag-2", "monday")
    assert classify_shards(record, [path], [other], {}).retired == {"train-00000.tar"}


class FakeRecord:
    """The one field of a record that the shard table looks at."""

    def __init__(self, shards):
        self.shards = shards


@given(st.lists(st.integers(0, 40), max_size=8), st.integers(1, 9), st.integers(0, 8))
def test_blocks_follow_each_other_and_are_never_given_twice(sizes, block_rows, cut):
    def new(number, samples):
        record = index.ShardRecord(
            name=f"{number}.tar",
            url=f"/{number}.tar",
            size_bytes=1,
            headers_sha256="",
            samples=samples,
            sequential=False,
        )
        return IndexedShard(record, ())

    shards = [new(number, size) for number, size in enumerate(sizes)]
    first = shard_table(
        None, ShardChanges(tuple(shards[:cut])), block_rows, "part-00000"
    )
    retired = frozenset(shard.name for shard in first[:1])
    grown = shard_table(
        FakeRecord(first),
        ShardChanges(tuple(shards[cut:]), retired),
        block_rows,
        "part-1",
    )
    assert [
        s.model_copy(update={"retired": False}) for s in grown[: len(first)]
    ] == list(first)
    assert {shard.name for shard in grown if shard.retired} == retired
    end = 0
    for shard, size in zip(grown, sizes, strict=True):
        assert shard.first_block == end
        assert shard.blocks == -(-size // block_rows)
        end += shard.blocks
