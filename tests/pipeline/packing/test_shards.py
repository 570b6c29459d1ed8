"""Shards: their names and sizes, on disk and in a store, and runs that do not end."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.errors import StorageError
from pipeline.errors import PipelineError
from pipeline.packing import pack as pack_module
from pipeline.packing.pack import pack
from pipeline.packing.shards import ShardLimit, ShardNames
from tests.conftest import ROOT
from tests.pipeline.packing.conftest import content, photos, put, request

DYING = """
import os, sys
from pipeline.packing.pack import PackRequest, pack
from pipeline.packing.shards import ShardLimit, ShardNames

done = []
def die():
    done.append(0)
    if len(done) == 5:
        os._exit(9)

names = ShardNames.parse(sys.argv[2], "shard")
pack(PackRequest(sys.argv[1], names, ShardLimit(samples=2)), on_done=die)
"""
"""Dies with two shards written and none published."""


@given(
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=20),
    limit=st.integers(2000, 12000),
)
def test_shards_are_as_full_as_their_bytes_allow(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("bytes")
    put(folder / "in", {f"{n:03d}.png": bytes(s) for n, s in enumerate(sizes)})
    packed = pack(
        request(folder / "in", folder / "out", limit=ShardLimit(num_bytes=limit))
    )
    assert packed.num_samples == len(sizes)
    held = [
        [512 + -(-len(data) // 512) * 512 for data in content(Path(url)).values()]
        for url in packed.shards
    ]
    assert [len(one) for one in held] == list(packed.shards.values())
    assert all(sum(one) <= limit or len(one) == 1 for one in held)
    # The next sample would not have fitted.
    for one, following in itertools.pairwise(held):
        assert sum(one) + following[0] > limit


def test_the_bytes_said_are_those_on_disk(tmp_path):
    photos(tmp_path / "in")
    packed = pack(request(tmp_path / "in", tmp_path / "o", limit=ShardLimit(samples=3)))
    assert packed.num_bytes == sum(Path(url).stat().st_size for url in packed.shards)


def test_a_run_that_fails_leaves_no_shard(tmp_path, monkeypatch):
    photos(tmp_path / "in")
    seen = []

    def read(sample):
        seen.append(sample.key)
        if len(seen) > 6:
            raise OSError("the machine fails")
        return real(sample)

    real = pack_module._read
    monkeypatch.setattr(pack_module, "_read", read)
    with pytest.raises(OSError, match="the machine fails"):
        pack(request(tmp_path / "in", tmp_path / "out", limit=ShardLimit(samples=2)))
    assert os.listdir(tmp_path / "out") == []


def test_a_run_that_was_killed_leaves_nothing_that_a_pattern_matches(tmp_path):
    photos(tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-c", DYING, tmp_path / "in", tmp_path / "out"],
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 9
    left = os.listdir(tmp_path / "out")
    assert left != []
    assert all(name.endswith(".part") for name in left)
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    assert sorted(packed.leftovers) == sorted(
        str(tmp_path / "out" / name) for name in left
    )
    assert packed.num_samples == 10


def test_a_store_takes_shards_and_gives_files(tmp_path):
    files = photos(tmp_path / "in")
    memory = fsspec.filesystem("memory")
    for name, data in files.items():
        memory.pipe_file(f"/pack-in/{name}", data)
    limit = ShardLimit(samples=4)
    there = request("memory://pack-in", "memory://pack-out/t-{:05d}.tar", limit=limit)
    pack(request(tmp_path / "in", tmp_path / "out/t-{:05d}.tar", limit=limit))
    try:
        packed = pack(there)
        assert [url.rpartition("/")[2] for url in packed.shards] == [
            f"t-{n:05d}.tar" for n in range(3)
        ]
        found = {
            path.rpartition("/")[2]: memory.cat_file(path)
            for path in memory.find("/pack-out")
        }
        local = {one.name: one.read_bytes() for one in (tmp_path / "out").iterdir()}
        assert found == local
        with pytest.raises(PipelineError, match="hold no shards"):
            pack(there)
    finally:
        memory.rm("/pack-in", recursive=True)
        memory.rm("/pack-out", recursive=True)


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    photos(tmp_path / "in")
    import pipeline.packing.shards as shards

    class Full(shards.TarWriter):
        def write(self, obj):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "TarWriter", Full)
    with pytest.raises(StorageError, match="no space left there"):
        pack(request(tmp_path / "in", tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("given", "urls", "pattern"),
    [
        (
            "o/t-{:05d}.tar",
            ["o/t-00000.tar", "o/t-00011.tar"],
            "o/t-{00000..00011}.tar",
        ),
        ("o/t-%03d.tar", ["o/t-000.tar", "o/t-011.tar"], "o/t-{000..011}.tar"),
        ("o/t{}.tar", ["o/t0.tar", "o/t11.tar"], "o/t{0..11}.tar"),
        (
            "gs://b/o",
            ["gs://b/o/p-00000.tar", "gs://b/o/p-00011.tar"],
            "gs://b/o/p-{00000..00011}.tar",
        ),
    ],
)
def test_names_of_shards(given, urls, pattern):
    names = ShardNames.parse(given, "p")
    assert [names.url(0), names.url(11)] == urls
    assert names.pattern(12) == pattern
    assert names.pattern(1) == urls[0]


@pytest.mark.parametrize(
    "given", ["out.tar", "o/{:05d}/x.tar", "{}-{}.tar", "o/{}.zip"]
)
def test_names_without_one_number_are_refused(given):
    with pytest.raises(PipelineError, match=r"number"):
        ShardNames.parse(given, "p")
