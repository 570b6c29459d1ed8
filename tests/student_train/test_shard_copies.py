"""The reader's own copy of the shards: which file is which shard, and its rows."""

from __future__ import annotations

import shutil

import fsspec
import numpy as np
import pytest

from manifests.errors import BankError, ManifestError, StorageError
from manifests.loading import load_job
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.shard_copies import ShardCopies
from pipeline.precompute import precompute
from pipeline.samples.errors import ShardError
from tests.conftest import jpeg
from tests.student_train.conftest import BLOCK_ROWS

ALL = np.array([*range(11), *range(12, 20), *range(20, 26)])
WANTED = frozenset({"jpg", "cls"})


@pytest.fixture(scope="module")
def bank(joined) -> Bank:
    return joined.open()


@pytest.fixture
def memory(joined):
    """The shards in an object store."""
    fs = fsspec.filesystem("memory")
    for path in joined.shards:
        fs.pipe_file(f"/shards/{path.name}", path.read_bytes())
    yield fs
    fs.rm("/shards", recursive=True)


@pytest.fixture(params=["file", "memory"])
def patterns(request, joined, memory):
    """The shards on disk, and in an object store."""
    folder = joined.folder / "data" if request.param == "file" else "memory://shards"
    return [f"{folder}/train-*.tar"]


def test_every_row_is_its_sample(bank, joined, patterns):
    copies = ShardCopies(bank, patterns, ALL)
    keys = bank.keys()
    for block in np.unique(ALL // BLOCK_ROWS):
        rows = ALL[block == ALL // BLOCK_ROWS]
        first = copies.first_row(block)
        within = rows - block * BLOCK_ROWS + first
        assert copies.shard_of(block).name == f"train-{keys[rows[0]][1]}.tar"
        assert copies.url_of(block).endswith(copies.shard_of(block).name)
        reader = copies.open(int(block), within, WANTED)
        # In any order, and again.
        for row, number in [*zip(rows, within, strict=True)][::-1] * 2:
            sample = reader.read(int(number))
            assert sample.key == keys[row]
            raw = joined.samples[sample.key]
            assert set(sample.members) <= WANTED
            if sample.key != "s0-0002":
                assert sample.members["jpg"] == raw.jpeg
            if "cls" in sample.members:
                assert sample.members["cls"] == str(raw.label).encode()
        reader.close()


def test_only_the_shards_of_the_rows_are_needed(bank, joined, tmp_path):
    shutil.copy(joined.shards[1], tmp_path)
    rows = np.arange(12, 20)
    copies = ShardCopies(bank, [f"{tmp_path}/*.tar"], rows)
    assert {copies.url_of(block) for block in (3, 4)} == {f"{tmp_path}/train-1.tar"}
    message = "data.shards must have a copy of the bank's train-0.tar, got none among 1"
    with pytest.raises(BankError, match=message):
        ShardCopies(bank, [f"{tmp_path}/*.tar"], ALL)


def test_where_the_bank_found_them(bank, joined):
    copies = ShardCopies(bank, None, ALL)
    assert copies.url_of(0) == str(joined.shards[0])


def test_copies_in_several_folders(bank, joined, tmp_path):
    """Base names say which is which; others may lie beside them."""
    for number, path in enumerate(joined.shards):
        folder = tmp_path / f"part{number}"
        folder.mkdir()
        shutil.copy(path, folder)
    shutil.copy(joined.shards[0], tmp_path / "part1" / "val-0.tar")
    copies = ShardCopies(bank, [f"{tmp_path}/*/*.tar"], ALL)
    assert copies.url_of(6) == f"{tmp_path}/part2/train-2.tar"
    # Which of two?
    shutil.copy(joined.shards[2], tmp_path / "part0")
    with pytest.raises(BankError, match=r"copy of the bank's train-2.tar, got"):
        ShardCopies(bank, [f"{tmp_path}/*/*.tar"], ALL)


def test_names_with_folders(bank, joined, tmp_path):
    """A bank of shards whose base names repeat knows them by folder."""
    names = ["a/shard.tar", "b/shard.tar", "c/shard.tar"]
    shards = [
        shard.model_copy(update={"name": name, "url": f"/old/place/{name}"})
        for shard, name in zip(bank.record.shards, names, strict=True)
    ]
    renamed = Bank(bank._store, bank.record.model_copy(update={"shards": shards}))
    for name, path in zip(names, joined.shards, strict=True):
        (tmp_path / name).parent.mkdir()
        shutil.copy(path, tmp_path / name)
    copies = ShardCopies(renamed, [f"{tmp_path}/*/*.tar"], ALL)
    assert copies.url_of(3) == f"{tmp_path}/b/shard.tar"


def test_a_name_with_a_version(bank, joined):
    """A shard whose bytes changed has another name in the bank, not on disk."""
    shards = [
        shard.model_copy(update={"name": f"{shard.name}@2"})
        for shard in bank.record.shards
    ]
    renamed = Bank(bank._store, bank.record.model_copy(update={"shards": shards}))
    copies = ShardCopies(renamed, [f"{joined.folder}/data/*.tar"], ALL)
    assert copies.url_of(3) == str(joined.shards[1])


def test_patterns_that_are_wrong(bank, joined, tmp_path):
    with pytest.raises(ManifestError, match=r"data\.shards: no shard matches .*/x-\*"):
        ShardCopies(bank, [f"{tmp_path}/x-*.tar"], ALL)
    twice = [str(joined.shards[0])] * 2
    with pytest.raises(ManifestError, match=r"data\.shards: .*train-0.tar is named tw"):
        ShardCopies(bank, twice, ALL)
    with pytest.raises(StorageError, match=r"data\.shards: cannot read .*/train-1.tar"):
        ShardCopies(bank, [f"{tmp_path}/train-{{0..2}}.tar"], ALL)


def test_another_size(bank, joined, memory):
    memory.pipe_file("/shards/train-1.tar", joined.shards[1].read_bytes()[:-512])
    message = r"data\.shards: memory://.*/train-1.tar must be the bank's train-1.tar of"
    with pytest.raises(BankError, match=message):
        ShardCopies(bank, ["memory://shards/*.tar"], ALL)


def test_other_members_of_the_same_size(bank, joined, tmp_path):
    copy = joined.copy(tmp_path / "copy")
    data = bytearray(copy.shards[1].read_bytes())
    # Rename a member: the checksum of a tar header is the sum of its bytes.
    at = data.index(b"s1-0005.cls")
    data[at : at + 7] = b"s1-0050"
    copy.shards[1].write_bytes(data)
    copies = ShardCopies(bank, [f"{copy.folder}/data/*.tar"], ALL)
    reader = copies.open(0, np.arange(4), WANTED)
    reader.close()
    message = "train-1.tar must be the bank's train-1.tar, but its members differ; g"
    for block in (3, 4):
        with pytest.raises(ShardError, match=message):
            copies.open(block, np.arange(4), WANTED)


def test_a_shard_cut_while_it_is_read(bank, joined, tmp_path, memory):
    copy = joined.copy(tmp_path / "copy")
    copies = ShardCopies(bank, [f"{copy.folder}/data/*.tar"], ALL)
    reader = copies.open(3, np.arange(4), WANTED)
    with open(copy.shards[1], "r+b") as file:
        file.truncate(3000)
    with pytest.raises(ShardError, match=r"-1.tar ends before byte \d+, within row 3"):
        reader.read(3)
    reader.close()
    far = ShardCopies(bank, ["memory://shards/*.tar"], ALL)
    memory.pipe_file("/shards/train-1.tar", b"\0" * 3000)
    with pytest.raises(ShardError, match=r"train-1.tar ends before byte \d+"):
        far.open(3, np.arange(4), WANTED)
    memory.pipe_file("/shards/train-1.tar", b"\0" * 200_000)
    with pytest.raises(ShardError, match="there is no sample where a row was"):
        far.open(3, np.arange(4), WANTED).read(0)


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_a_shard_that_ends_without_padding(scheme, make_shards, make_job, tmp_path):
    """What its index found in it can be read again, the last row too."""
    (path,) = make_shards([9])
    data = path.read_bytes().rstrip(b"\0")
    assert len(data) % 512
    path.write_bytes(data)
    done = precompute(load_job(str(make_job())), quiet=True)
    assert done.record.state.valid["net.image"] == 9
    shards = [str(path)]
    if scheme == "memory":
        shards = ["memory://unpadded/train-00000.tar"]
        fsspec.filesystem("memory").pipe_file("/unpadded/train-00000.tar", data)
    bank = open_bank(str(tmp_path / "bank"))
    copies = ShardCopies(bank, shards, np.arange(9))
    reader = copies.open(1, np.array([8]), WANTED)
    assert reader.read(8).key == "s0-0008"
    assert reader.read(8).members == {"jpg": jpeg(8), "cls": b"3"}
    reader.close()


def test_headers_are_compared_once(bank, joined, monkeypatch):
    asked = []
    from pipeline.bank import shard_copies

    plain = shard_copies.index_shard
    monkeypatch.setattr(
        shard_copies, "index_shard", lambda url: (asked.append(url), plain(url))[1]
    )
    copies = ShardCopies(bank, None, ALL)
    for block in (0, 1, 2, 3, 0):
        copies.open(block, np.arange(2), WANTED).close()
    assert asked == [str(path) for path in joined.shards[:2]]
