"""From patterns to shards, and the index of rows in Parquet."""

from __future__ import annotations

import io

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.dataset import INDEX_COLUMNS, ShardRecord
from manifests.errors import ManifestError, StorageError
from manifests.storage import Store
from pipeline import index
from pipeline.bank.dataset_index import (
    IndexedShard,
    encode_rows,
    read_rows,
    write_index,
)
from pipeline.samples import sources
from pipeline.samples.shards import ShardRow
from pipeline.samples.sources import expand_shards, name_shards
from tests.conftest import write_tar


def test_braces_and_stars(tmp_path):
    for name in ("a-0", "a-1", "b-0"):
        write_tar(tmp_path / f"{name}.tar", [])
    assert expand_shards([f"{tmp_path}/a-{{0..1}}.tar"]) == [
        f"{tmp_path}/a-0.tar",
        f"{tmp_path}/a-1.tar",
    ]
    assert expand_shards([f"{tmp_path}/*-0.tar"]) == [
        f"{tmp_path}/a-0.tar",
        f"{tmp_path}/b-0.tar",
    ]
    assert expand_shards([f"{tmp_path}/{{a,b}}-[0-9].tar"]) == [
        f"{tmp_path}/a-0.tar",
        f"{tmp_path}/a-1.tar",
        f"{tmp_path}/b-0.tar",
    ]
    assert expand_shards(["gs://acme/x-{000..002}.tar"])[-1] == "gs://acme/x-002.tar"


def test_patterns_that_are_refused(tmp_path):
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(ManifestError, match=r"no shard matches .*\*.tgz"):
        expand_shards([f"{tmp_path}/*.tgz"])
    with pytest.raises(ManifestError, match=r"a.tar is named twice; name it once"):
        expand_shards([f"{tmp_path}/*.tar", f"{tmp_path}/a.tar"])
    with pytest.raises(ManifestError, match="Unbalanced"):
        expand_shards([f"{tmp_path}/{{0..3.tar"])


def test_all_that_is_missing_is_counted(tmp_path):
    urls = [f"{tmp_path}/{number}.tar" for number in range(5)]
    with pytest.raises(StorageError, match=r"0.tar.*1.tar.*2.tar.*\(and 2 more\)"):
        sources.stat_shards(urls)


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["/x/a.tar", "/x/b.tar"], ["a.tar", "b.tar"]),
        (["/x/a.tar", "/y/a.tar"], ["x/a.tar", "y/a.tar"]),
        (["gs://b/x/a.tar", "gs://c/x/a.tar"], ["b/x/a.tar", "c/x/a.tar"]),
        (["/x/a.tar", "/y/a.tar", "/y/b.tar"], ["x/a.tar", "y/a.tar", "y/b.tar"]),
        ([], []),
    ],
)
def test_names(urls, names):
    assert name_shards(urls) == names


ROWS = st.lists(
    st.builds(
        ShardRow,
        st.text(min_size=1, max_size=8).filter(lambda key: key.isprintable()),
        st.integers(0, 2**50),
        st.integers(512, 2**40),
        st.none() | st.just("duplicate_key: .jpg again at byte 5"),
    ),
    max_size=12,
)


def shard(name: str, rows: list[ShardRow]) -> IndexedShard:
    record = ShardRecord(
        name=name,
        url=f"/{name}",
        size_bytes=1,
        headers_sha256="",
        samples=len(rows),
        sequential=False,
    )
    return IndexedShard(record, tuple(rows))


@given(st.lists(ROWS, max_size=5))
def test_rows_come_back_as_they_were_shard_by_shard(rows):
    shards = [shard(f"{number}.tar", one) for number, one in enumerate(rows)]
    data = encode_rows(shards)
    assert encode_rows(shards) == data
    expected = [(one.record.name, one.rows) for one in shards if one.rows]
    assert list(read_rows(data, "here")) == expected
    assert tuple(pq.read_schema(io.BytesIO(data)).names) == INDEX_COLUMNS


def test_an_index_is_written_and_loaded(tmp_path):
    shards = [shard("a.tar", [ShardRow("k", 0, 1024, None)]), shard("b.tar", [])]
    write_index(Store(str(tmp_path)), "dataset", shards)
    assert index.load_index(str(tmp_path / "dataset.json")) == shards


def test_a_record_may_name_its_shards_relative_to_itself(tmp_path):
    path = tmp_path / "dataset.json"
    write_index(Store(str(tmp_path)), "dataset", [shard("a.tar", [])])
    path.write_text(path.read_text().replace('"/a.tar"', '"data/a.tar"'))
    (found,) = index.load_index(str(path))
    assert found.record.url == f"{tmp_path}/data/a.tar"
