"""A remote store that fails: tried again where it may pass, else one clear line.

Whatever fails, no commit is written before its data, and the next run ends with the
identical bank.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter

import fsspec
import pytest

from manifests import retrying
from manifests.bank import BankRecord
from manifests.errors import BankError, StorageError
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.lock import LOCK_PATH, bank_lock, read_lock
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from student_train import BankDataset, Reading
from teachonce.cli import main
from tests.conftest import bank_identity
from tests.failing_store import (
    LASTING,
    PASSING,
    ROOT,
    Rule,
    clear_store,
    failing_store,
)

BANK = f"{ROOT}/bank"
EVERY = "read|write|create|delete|info|list|open"


@pytest.fixture(autouse=True)
def fresh_store(monkeypatch):
    """An empty store, and no waiting between attempts."""
    monkeypatch.setattr(retrying, "WAITS_S", (0.0,) * len(retrying.WAITS_S))
    clear_store()
    yield
    clear_store()


def run(full, bank=BANK):
    return main(["precompute", str(full.path), f"bank={bank}", "--quiet"])


def copy_home(fs, folder):
    """Copies the bank to a local folder, to be compared."""
    for path in fs.find("/store/bank"):
        target = folder / path.removeprefix("/store/bank/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(fs.store[path].getvalue())
    return folder


def check_whole(full, folder):
    fs = fsspec.filesystem("failing")
    assert bank_identity(copy_home(fs, folder)) == full.identity
    assert verify(*open_record(BANK), full=True).is_sound
    assert LOCK_PATH not in {path.rsplit("/", 1)[1] for path in fs.find("/store/bank")}


def in_turn():
    """Makes the errors that pass, one after the other."""
    errors = itertools.cycle(PASSING.values())
    return lambda: next(errors)()


def test_every_request_fails_twice_and_is_asked_again(full, tmp_path):
    with failing_store(Rule(EVERY, "", in_turn(), times=2)) as fs:
        assert run(full) == 0
        asked = Counter(fs.asked)
        assert fs.bad_commits == []
    creates = [one for one in asked if one[0] == "create" and "/commits/" in one[1]]
    assert len(creates) == 9
    assert all(asked[one] == 3 for one in creates)
    check_whole(full, tmp_path / "bank")


def test_every_write_is_done_and_fails(full, tmp_path, capsys):
    """The answer is lost: the second attempt finds what the first one wrote."""
    rule = Rule("create|write|delete", "", PASSING["503"], is_done=True)
    with failing_store(rule) as fs:
        assert run(full) == 0
        assert fs.bad_commits == []
    assert capsys.readouterr().out.startswith("9 blocks of passes committed")
    check_whole(full, tmp_path / "bank")


def test_a_create_that_was_anothers_is_not_ours():
    rule = Rule("create", "", PASSING["timeout"], is_done=True)
    store = Store(BANK)
    with failing_store(rule):
        assert store.create("a", b"mine")
        assert not store.create("a", b"mine")
    with failing_store(Rule("create", "", PASSING["timeout"])):
        assert not store.create("a", b"yours")
    assert store.read("a") == b"mine"


def test_a_lock_that_the_store_took_twice_is_held_once():
    """A client that tries again by itself says that the lock is there: it is ours."""
    lost = Rule("create", LOCK_PATH, lambda: FileExistsError("412"), is_done=True)
    store = Store(BANK)
    with failing_store(lost), bank_lock(store, "test", wait_s=0):
        assert read_lock(store) is not None
    assert read_lock(store) is None


@pytest.mark.parametrize(
    ("name", "request_", "path"),
    [
        ("no space left", "create", r"patch/c\.1"),
        ("permission denied", "create", r"commits/rows/"),
        ("i/o", "create", r"rows/rows/.*1\.parquet"),
        ("read-only", "write", r"index/part"),
        ("HTTP 400", "write", r"bank\.json"),
    ],
)
def test_what_does_not_pass_ends_in_one_line(
    full, tmp_path, capsys, name, request_, path
):
    """Not asked again where it is lasting; six times where it never passed."""
    errors = {**LASTING, **PASSING}
    skip = 1 if path == r"bank\.json" else 0
    rule = Rule(request_, path, errors[name], times=None, skip=skip)
    with failing_store(rule) as fs:
        assert run(full) == 1
        asked = Counter(one for one in fs.asked if one[0] == request_)
        assert fs.bad_commits == []
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"teachonce precompute: cannot write {BANK}/")
    told = "input/output error" if name == "i/o" else name
    assert told in line
    most = len(retrying.WAITS_S) + 1 if name == "i/o" else 1
    failed = [one for one in rule.seen if re.search(path, one[1])]
    assert failed
    assert all(asked[one] - skip == most for one in failed)
    assert LOCK_PATH not in " ".join(path for path in fs.find("/store/bank"))
    assert run(full) == 0
    check_whole(full, tmp_path / "bank")


def test_a_store_that_may_not_be_written_is_refused_before_anything(full, capsys):
    with failing_store(Rule("create|write", "", LASTING["permission denied"], None)):
        assert run(full) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "permission denied" in line
    assert fsspec.filesystem("failing").find("/store") == []


def test_a_slow_store_is_only_slow(full, tmp_path):
    with failing_store(delay_s=0.003) as fs:
        assert run(full) == 0
        assert fs.bad_commits == []
    check_whole(full, tmp_path / "bank")


def test_shards_on_a_store_that_fails(full, tmp_path):
    """Reading on after a failed read gives the same bytes."""
    fs = fsspec.filesystem("failing")
    for shard in sorted((full.path.parent / "data").glob("*.tar")):
        fs.store[f"/store/data/{shard.name}"] = fs.open(
            f"/store/data/{shard.name}", "wb", data=shard.read_bytes()
        )
    override = f"dataset.shards={ROOT}/data/*.tar"
    bank = tmp_path / "bank"
    job = load_job(str(full.path), [f"bank={bank}", override])
    with failing_store(Rule("open|read|info|list", "/data/", PASSING["503"])) as fs:
        assert precompute(job, quiet=True).is_whole
        assert ("open", "/store/data/train-00000.tar") in fs.asked
    assert bank_identity(bank) == full.identity


@pytest.fixture
def stored(full):
    """The whole bank on the store."""
    fs = fsspec.filesystem("failing")
    for path in sorted(full.bank.rglob("*")):
        if path.is_file() and ".tmp" not in path.parts:
            name = f"/store/bank/{path.relative_to(full.bank)}"
            fs.pipe_file(name, path.read_bytes())
    return fs


def learn(full):
    reading = Reading(targets={"patch": "net/patch"}, labels=("class",))
    dataset = BankDataset(BANK, reading, batch=4, view=1, threads=1)
    return [one.targets["patch"].values() for one in dataset.batches(0)]


@pytest.mark.parametrize("error", [*PASSING.values(), None])
def test_a_trainer_reads_on(full, stored, error):
    """``None``: half of an object comes, and the store says that all of it is there."""
    path = "" if error else r"patch/c\.[0-9.]+$"
    expected = learn(full)
    with failing_store(Rule("read|info" if error else "read", path, error)):
        found = learn(full)
    assert len(found) == len(expected) > 0
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("path", [r"patch/c\.1", r"labels/class/c", r"blocks\.parquet"])
@pytest.mark.parametrize("error", [PASSING["timeout"], LASTING["permission denied"]])
def test_a_trainer_refuses_what_it_cannot_read(full, stored, path, error):
    with (
        failing_store(Rule("read", path, error, times=None)),
        pytest.raises((StorageError, BankError), match=path),
    ):
        learn(full)


def test_half_an_object_never_reads_as_numbers(full, stored):
    with (
        failing_store(Rule("read", r"patch/c\.1", None, times=None)),
        pytest.raises((StorageError, BankError), match=r"patch"),
    ):
        learn(full)


def test_half_a_record_is_refused(stored):
    with (
        failing_store(Rule("read", r"bank\.json", None, times=None)),
        pytest.raises(BankError, match=r"bank\.json is not a bank record"),
    ):
        open_bank(BANK)
    assert isinstance(open_record(BANK)[1], BankRecord)
