"""Where samples lie: as the index found them, and refused where it is damaged."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.bank import ShardEntry
from manifests.errors import BankError
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.open import open_bank
from pipeline.bank.sample_table import SampleTable
from pipeline.precompute import precompute


def entry(name: str, samples: int, part: str = "p0") -> ShardEntry:
    return ShardEntry(
        name=name,
        url=f"/data/{name}",
        size_bytes=10**6,
        headers_sha256="0",
        samples=samples,
        part=part,
        first_block=0,
        blocks=1,
    )


def write(folder, rows, part="p0", refused=()):
    """A part of a dataset's index: (shard, row, offset, size), why by (shard, row)."""
    columns = zip(*rows, strict=True) if rows else ((), (), (), ())
    types = (pa.string(), pa.int64(), pa.int64(), pa.int64())
    names = ("shard", "row", "offset", "size")
    arrays = [pa.array(c, t) for c, t in zip(columns, types, strict=True)]
    why = dict(refused)
    arrays.append(pa.array([why.get(row[:2]) for row in rows], pa.string()))
    names = (*names, "refused")
    (folder / "dataset").mkdir(exist_ok=True)
    pq.write_table(pa.table(arrays, names), folder / "dataset" / f"{part}.parquet")


ROWS = [
    ("a", 0, 0, 1024),
    ("a", 1, 1024, 2048),
    ("a", 2, 3072, 512),
    ("b", 0, 512, 1536),
    ("c", 0, 0, 7),
    ("c", 1, 7, 9),
]


def test_rows_of_each_shard(tmp_path):
    write(tmp_path, ROWS)
    write(tmp_path, [("d", 0, 3, 4)], part="p1")
    table = SampleTable(Store(str(tmp_path)))
    for name, part in (("a", "p0"), ("b", "p0"), ("c", "p0"), ("d", "p1")):
        rows = [row for row in [*ROWS, ("d", 0, 3, 4)] if row[0] == name]
        spans = table.spans(entry(name, len(rows), part))
        assert spans.offset.tolist() == [row[2] for row in rows]
        assert spans.size.tolist() == [row[3] for row in rows]
        assert spans.offset.dtype == spans.size.dtype == np.int64


def test_why_the_index_refused_a_row(tmp_path):
    why = {("a", 2): "duplicate_key: .jpg again", ("c", 0): "duplicate_key: .cls again"}
    write(tmp_path, ROWS, refused=why.items())
    table = SampleTable(Store(str(tmp_path)))
    assert table.spans(entry("a", 3)).refused == {2: "duplicate_key: .jpg again"}
    assert table.spans(entry("b", 1)).refused == {}
    assert table.spans(entry("c", 2)).refused == {0: "duplicate_key: .cls again"}


def test_a_part_is_read_once(tmp_path):
    write(tmp_path, ROWS)
    table = SampleTable(Store(str(tmp_path)))
    table.spans(entry("a", 3))
    (tmp_path / "dataset" / "p0.parquet").unlink()
    assert table.spans(entry("c", 2)).offset.tolist() == [0, 7]


def test_offsets_are_those_of_a_tar(make_shards, make_job, tmp_path):
    """Python's own tar reader finds every sample's first member where it says."""
    shards = make_shards([11, 3])
    precompute(load_job(str(make_job())), quiet=True)
    bank = open_bank(str(tmp_path / "bank"))
    for shard, path in zip(bank.record.shards, shards, strict=True):
        spans = bank.sample_table.spans(shard)
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        keys = list(dict.fromkeys(member.name.split(".")[0] for member in members))
        for key, offset, size in zip(keys, spans.offset, spans.size, strict=True):
            own = [one for one in members if one.name.startswith(f"{key}.")]
            end = max(one.offset_data + -(-one.size // 512) * 512 for one in own)
            assert (own[0].offset, end) == (offset, offset + size)


@pytest.mark.parametrize(("name", "samples", "got"), [("z", 3, 0), ("a", 4, 3)])
def test_a_shard_that_it_lacks(tmp_path, name, samples, got):
    write(tmp_path, ROWS)
    message = (
        rf"dataset/p0\.parquet must hold the {samples} rows of {name}, got {got}; "
        "restore it from a copy"
    )
    with pytest.raises(BankError, match=message):
        SampleTable(Store(str(tmp_path))).spans(entry(name, samples))


def test_a_part_that_is_missing_or_damaged(tmp_path):
    write(tmp_path, ROWS)
    table = SampleTable(Store(str(tmp_path)))
    with pytest.raises(BankError, match=r"dataset/p9\.parquet is missing; restore it"):
        table.spans(entry("a", 3, part="p9"))
    path = tmp_path / "dataset" / "p0.parquet"
    sink = io.BytesIO()
    pq.write_table(pa.table({"shard": ["a"]}), sink)
    for data in (b"", path.read_bytes()[:-10], sink.getvalue()):
        path.write_bytes(data)
        with pytest.raises(BankError, match=r"dataset/p0\.parquet is damaged \("):
            table.spans(entry("a", 3))
