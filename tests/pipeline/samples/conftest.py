"""Shards made in memory, and where real data lie if there are any."""

from __future__ import annotations

import io
import tarfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import fsspec
import pytest

DATA = Path(__file__).parents[3].parent / "shared" / "data"


def make_tar(
    members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.GNU_FORMAT
) -> bytes:
    """Returns a tar as the standard library writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def tar_of() -> Callable[..., bytes]:
    return make_tar


@pytest.fixture(scope="session")
def stored() -> Iterator[Callable[[bytes], str]]:
    """Puts bytes under a new memory:// URL, so that fsspec's path is what is tested."""
    memory = fsspec.filesystem("memory")
    folder = f"/samples-{uuid.uuid4().hex}"
    count = iter(range(10**9))

    def put(data: bytes) -> str:
        path = f"{folder}/{next(count)}.tar"
        memory.pipe_file(path, data)
        return f"memory:/{path}"

    yield put
    memory.rm(folder, recursive=True)


@pytest.fixture(scope="session")
def data_folder() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        if not (DATA / name).is_dir():
            pytest.skip(f"needs real data: no shared/data/{name} beside the repository")
        return DATA / name

    return find
