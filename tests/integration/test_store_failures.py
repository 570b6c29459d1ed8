"""The store fails: full, forbidden, read-only, or not a disk at all."""

from __future__ import annotations

import errno
import os
import re
import subprocess

import pytest

from manifests.bank import Commit
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.commits import read_commits
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import bank_identity, without_checksum

FAILURES = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "no space left",
    errno.EACCES: "permission denied",
    errno.EROFS: "read-only",
}


def fail_from(monkeypatch, function, code, nth):
    """Makes ``os.<function>`` fail from its n-th call on in a bank."""
    call = getattr(os, function)
    count = [0]

    def failing(*arguments, **named):
        if function == "write" or any("/bank" in str(one) for one in arguments):
            count[0] += 1
            if count[0] > nth:
                raise OSError(code, os.strerror(code))
        return call(*arguments, **named)

    monkeypatch.setattr(os, function, failing)


def check_committed(bank):
    """Every commit there is has all its objects, byte for byte."""
    store = Store(str(bank))
    num = 0
    for path in bank.glob("commits/*/*.json"):
        content = Commit.model_validate_json(path.read_bytes()).content
        (again,) = read_commits(store, content.pass_id, [content.block])
        for name, (size, _) in again.objects.items():
            assert store.size(name) == size
        num += 1
    return num


@pytest.mark.parametrize(
    ("code", "function", "match"),
    [
        (errno.ENOSPC, "write", r"patch/c\.1"),
        (errno.ENOSPC, "write", r"commits/.*0\.json$"),
        (errno.EDQUOT, "write", r"views/flip/c"),
        (errno.EROFS, "link", r"patch/c\.2"),
        (errno.EACCES, "link", r"commits/.*2\.json$"),
        (errno.EACCES, "replace", r"index/part"),
    ],
)
def test_the_store_fails_in_the_middle(
    full, tmp_path, monkeypatch, capsys, code, function, match
):
    bank = tmp_path / "bank"
    create, replace = Store.create, Store.replace
    state = {"fails": False}

    def watch(call):
        def write(self, path, data):
            state["fails"] = state["fails"] or bool(re.search(match, path))
            return call(self, path, data)

        return write

    original = getattr(os, function)

    def failing(*arguments, **named):
        if state["fails"]:
            raise OSError(code, os.strerror(code))
        return original(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "create", watch(create))
        patch.setattr(Store, "replace", watch(replace))
        patch.setattr(os, function, failing)
        exit_code = main(["precompute", str(full.path), f"bank={bank}", "--quiet"])
    said = capsys.readouterr()
    assert exit_code == 1, said.err
    (line,) = said.err.strip().splitlines()
    assert FAILURES[code] in line
    assert str(bank) in line
    check_committed(bank)
    assert not list(bank.glob(".tmp/*"))
    assert main(["precompute", str(full.path), f"bank={bank}", "--quiet"]) == 0
    assert bank_identity(bank) == full.identity


@pytest.mark.parametrize(
    ("function", "code"),
    [(name, code) for name in ("mkdir", "open") for code in FAILURES]
    + [("write", errno.ENOSPC), ("write", errno.EDQUOT)],
)
def test_the_store_fails_before_the_run(
    full, tmp_path, monkeypatch, capsys, code, function
):
    bank = tmp_path / "bank"
    with monkeypatch.context() as patch:
        fail_from(patch, function, code, 0)
        exit_code = main(["precompute", str(full.path), f"bank={bank}", "--quiet"])
    said = capsys.readouterr()
    assert exit_code == 2, said.err
    (line,) = said.err.strip().splitlines()
    assert FAILURES[code] in line
    assert str(bank) in line
    assert [path for path in bank.rglob("*") if path.is_file()] == []
    assert main(["precompute", str(full.path), f"bank={bank}", "--quiet"]) == 0


def test_a_disk_that_is_too_small_is_known_before(full, tmp_path, monkeypatch, capsys):
    bank = tmp_path / "bank"
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    assert main(["precompute", str(full.path), f"bank={bank}", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no space" in line
    assert "1,000 are free" in line
    assert not bank.exists()


def test_a_real_full_disk(full, tmp_path, monkeypatch, capsys):
    """A file system of 128 KiB, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        monkeypatch.setattr(Store, "free_bytes", lambda self: None)
        bank = disk / "bank"
        code = main(["precompute", str(full.path), f"bank={bank}", "--quiet"])
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert code in (1, 2)
        assert "no space left" in line
        check_committed(bank)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def memory_bank():
    """A bank in fsspec's memory file system: not a disk, and no temporary names."""
    import fsspec

    fs = fsspec.filesystem("memory")
    url = "memory://failures/bank"
    yield url, fs
    fs.rm("/failures", recursive=True)


def memory_files(fs, url):
    root = "/" + url.split("://")[1]
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in sorted(fs.find(root))}


def test_a_store_that_is_not_a_disk(full, memory_bank, tmp_path):
    url, fs = memory_bank
    job = load_job(str(full.path), [f"bank={url}"])
    outcome = precompute(job, quiet=True)
    assert outcome.is_whole
    files = memory_files(fs, url)
    assert not [path for path in files if ".tmp" in path or path == "lock.json"]
    local = tmp_path / "bank"
    for path, data in files.items():
        (local / path).parent.mkdir(parents=True, exist_ok=True)
        (local / path).write_bytes(data)
    assert bank_identity(local) == full.identity
    assert verify(*open_record(url), full=True).is_sound
    assert precompute(job, quiet=True).was_done
    here, there = open_bank(str(full.bank)), open_bank(url)
    assert there.outputs == here.outputs
    for name in here.outputs:
        assert there.read(name, 0).tobytes() == here.read(name, 0).tobytes()


def test_nothing_is_overwritten_on_a_store_that_is_not_a_disk(full, memory_bank):
    """An object and a commit that are there already stay, byte for byte."""
    url, fs = memory_bank
    store = Store(url)
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read("a/b") == b"first"
    written = []
    pipe = type(fs).pipe_file

    def watched(self, path, value, mode="overwrite", **named):
        written.append((path, mode))
        return pipe(self, path, value, mode=mode, **named)

    type(fs).pipe_file = watched
    try:
        precompute(load_job(str(full.path), [f"bank={url}"]), quiet=True)
    finally:
        type(fs).pipe_file = pipe
    for path, mode in written:
        is_data = re.search(r"/(net|points)/[a-z]+/[^/]+/[a-z]+/c\.|/commits/", path)
        if is_data and "/stats/" not in path and "/valid/" not in path:
            assert mode == "create", path


SLOW = """

import time


class Slow(Net):
    def forward(self, x):
        if x.device.type == "cpu":
            time.sleep(0.4)
        return super().forward(x)
"""


@pytest.mark.parametrize("is_shard", [True, False])
def test_a_failure_does_not_wait_for_the_rest(
    forked, make_shards, make_job, tmp_path, is_shard
):
    """Neither with --fail-fast nor when the store fails: the others are given up."""
    shards = make_shards([8, 160])
    net = {
        "model": "module:./nets.py:Slow",
        "weights": "random:1",
        "sizes": [[16, 16]],
        "batch": 4,
        "outputs": {"logits": {}},
    }
    job = make_job(teachers={"net": net})
    nets = tmp_path / "nets.py"
    nets.write_text(nets.read_text() + SLOW)
    kept = shards[0].read_bytes()
    command = ["precompute", job, "--quiet", "--fail-fast"]
    bank = tmp_path / "bank"
    if is_shard:
        # Indexed whole, and cut before it is read.
        assert forked.run(command, kill={"match": "items", "when": "after"})["code"]
        shards[0].write_bytes(kept[: len(kept) // 2])
        stat = shards[0].stat()
        record = without_checksum((bank / "bank.json").read_text())
        text = re.sub(
            r'("name": "train-00000.tar".*?"size_bytes": )\d+(.*?"modified": ")[^"]+"',
            rf'\g<1>{stat.st_size}\g<2>{stat.st_mtime}"',
            record,
            flags=re.DOTALL,
        )
        assert text != record
        (bank / "bank.json").write_text(text)
    else:
        orphan = bank / "features.zarr/net/image/16x16/logits/c.0.0.0"
        assert forked.run(command, kill={"match": "items", "when": "after"})["code"]
        orphan.write_bytes(b"not an object")
    done = forked.run(command)
    assert done["code"] == 1
    (line,) = done["output"].strip().splitlines()
    assert ("train-00000.tar" in line) if is_shard else ("--repair" in line)
    # All of it takes 40 batches of 0.4 s on 2 lanes.
    assert done["seconds"] < 6
