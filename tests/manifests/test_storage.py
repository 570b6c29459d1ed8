"""Stores keep to themselves: paths that lead out of them, and what is no file."""

from __future__ import annotations

import os
import uuid

import fsspec
import pytest

from manifests.errors import StorageError
from manifests.storage import Store, open_url, read_url

OUTSIDE = ["../stray", "a/../../stray", "/etc/hostname", "a\0b", ".."]


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    """A store with a neighbour that nobody may reach through it."""
    (tmp_path / "stray").write_bytes(b"secret")
    if request.param == "file":
        (tmp_path / "store").mkdir()
        yield Store(str(tmp_path / "store"))
        return
    folder = f"/{uuid.uuid4().hex}"
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{folder}/stray", b"secret")
    yield Store(f"memory:/{folder}/store")
    memory.rm(folder, recursive=True)


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize(
    "use",
    [
        lambda store, path: store.read(path),
        lambda store, path: store.read_or_none(path),
        lambda store, path: store.size(path),
        lambda store, path: store.create(path, b"x"),
        lambda store, path: store.replace(path, b"x"),
        lambda store, path: store.delete(path),
        lambda store, path: list(store.list(path)),
    ],
)
def test_paths_that_lead_out_are_refused(store, path, use):
    with pytest.raises(StorageError, match="leads out of it; the path must stay ins"):
        use(store, path)


def test_odd_names_within_are_names(store):
    for path in ("a..b", "...", "é/..c", "a b"):
        store.replace(path, b"1")
        assert store.read(path) == b"1"


def test_what_never_ends_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for call in (open_url, read_url, Store(str(tmp_path)).read):
        where = "pipe" if call not in (open_url, read_url) else str(tmp_path / "pipe")
        with pytest.raises(StorageError, match="a pipe or a device is no file"):
            call(where)
    with pytest.raises(StorageError, match="a pipe or a device is no file"):
        read_url("/dev/zero")


def test_what_a_shell_passes_is_read():
    """``teachonce plan <(sed ... job.yaml)`` gives a pipe under this name."""
    reading, writing = os.pipe()
    os.write(writing, b"bank: x")
    os.close(writing)
    try:
        assert read_url(f"/dev/fd/{reading}") == b"bank: x"
    finally:
        os.close(reading)
