"""What the tests of packing share: files to pack, and what is in a shard."""

from __future__ import annotations

import tarfile
from pathlib import Path

from pipeline.packing.pack import PackRequest
from pipeline.packing.shards import ShardLimit, ShardNames
from tests.conftest import jpeg


def request(source, dest, **fields) -> PackRequest:
    names = ShardNames.parse(str(dest), fields.pop("prefix", "shard"))
    return PackRequest(str(source), names, fields.pop("limit", ShardLimit()), **fields)


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def content(path: Path) -> dict[str, bytes]:
    """Members of a tar, by tarfile."""
    with tarfile.open(path) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}


def photos(folder: Path, count: int = 10) -> dict[str, bytes]:
    files = {f"{'ab'[n % 2]}/img{n:02d}.jpg": jpeg(n) for n in range(count)}
    put(folder, files)
    return files
