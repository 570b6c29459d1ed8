"""Index and reader: laws over arbitrary archives, and each rule by an example."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manifests.errors import StorageError
from pipeline.samples import shards
from pipeline.samples.errors import ShardError
from pipeline.samples.shards import (
    RowSpan,
    Sample,
    ShardIndex,
    index_shard,
    read_samples,
)

TarOf = Callable[..., bytes]
Put = Callable[[bytes], str]
QUICK = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
ALL = frozenset({"jpg", "cls", "json", "cam.jpg", "bin"})

KEYS = st.text(st.sampled_from("abük/_- 1"), min_size=1, max_size=130).filter(
    lambda key: not key.startswith("/") and not key.endswith("/") and "//" not in key
)
CONTENTS = st.dictionaries(
    st.sampled_from(sorted(ALL)), st.binary(max_size=1300), min_size=1, max_size=4
)
SHARDS = st.dictionaries(KEYS, CONTENTS, max_size=6)
FORMATS = st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def members_of(samples: dict[str, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    return [
        (f"{key}.{extension}", data)
        for key, contents in samples.items()
        for extension, data in contents.items()
    ]


def span_of(index: ShardIndex, first: int, last: int) -> RowSpan:
    rows = index.rows[first:last]
    end = max(row.offset + row.size for row in rows)
    return RowSpan(first, len(rows), rows[0].offset, end, rows[0].key)


def read_all(url: str, index: ShardIndex) -> dict[str, dict[str, bytes]]:
    if not index.rows:
        return {}
    span = span_of(index, 0, len(index.rows))
    found = list(read_samples(url, span, ALL, index.sequential))
    assert [row for row, _ in found] == list(range(len(index.rows)))
    assert [sample.key for _, sample in found] == [row.key for row in index.rows]
    return {sample.key: sample.members for _, sample in found}


@QUICK
@given(SHARDS, FORMATS, st.sampled_from(sorted(COMPRESSIONS)), st.data())
def test_rows_and_bytes_are_those_of_tarfile(
    tar_of: TarOf,
    stored: Put,
    samples: dict[str, dict[str, bytes]],
    tar_format: int,
    compression: str,
    data: st.DataObject,
) -> None:
    tar = tar_of(members_of(samples), tar_format)
    url = stored(COMPRESSIONS[compression](tar))
    oracle: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        for member in archive:
            folder, slash, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            file = archive.extractfile(member)
            assert file is not None
            oracle.setdefault(folder + slash + stem, {})[extension] = file.read()
    index = index_shard(url)
    assert index.damage is None
    assert not index.faults
    assert index.sequential == (compression != "plain")
    assert [row.key for row in index.rows] == list(oracle)
    assert read_all(url, index) == oracle
    if oracle:
        first = data.draw(st.integers(0, len(oracle) - 1))
        last = data.draw(st.integers(first + 1, len(oracle)))
        span = span_of(index, first, last)
        wanted = frozenset(data.draw(st.sets(st.sampled_from(sorted(ALL)))))
        read = list(read_samples(url, span, wanted, index.sequential))
        assert read == [
            (
                row,
                Sample(key, {e: d for e, d in oracle[key].items() if e in wanted}, {}),
            )
            for row, key in list(enumerate(oracle))[first:last]
        ]
        if compression == "plain":
            # Offsets alone are enough for a stranger: each row is a tar of its own.
            row = index.rows[first]
            part = io.BytesIO(tar[row.offset : row.offset + row.size])
            with tarfile.open(fileobj=part) as archive:
                names = archive.getnames()
            assert names == [f"{row.key}.{e}" for e in oracle[row.key]]


@QUICK
@given(SHARDS, FORMATS, st.sampled_from(sorted(COMPRESSIONS)), st.data())
def test_a_cut_shard_keeps_a_prefix_of_whole_samples(
    tar_of: TarOf,
    stored: Put,
    samples: dict[str, dict[str, bytes]],
    tar_format: int,
    compression: str,
    data: st.DataObject,
) -> None:
    whole = COMPRESSIONS[compression](tar_of(members_of(samples), tar_format))
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    index = index_shard(stored(cut))
    keys = [row.key for row in index.rows]
    assert keys == list(samples)[: len(keys)]
    if len(keys) < len(samples) and compression != "plain":
        assert index.damage is not None
    found = read_all(stored(cut), index)
    for key, members in found.items():
        # The last one may lack members where the cut fell between two of them.
        assert members == {e: samples[key][e] for e in members}
        assert key == keys[-1] or members == samples[key]


@QUICK
@given(
    SHARDS,
    FORMATS,
    st.sampled_from(sorted(COMPRESSIONS)),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1),
)
def test_flipped_bytes_give_damage_or_other_rows_and_never_a_crash(
    tar_of: TarOf,
    stored: Put,
    samples: dict[str, dict[str, bytes]],
    tar_format: int,
    compression: str,
    flips: list[tuple[float, int]],
) -> None:
    damaged = bytearray(
        COMPRESSIONS[compression](tar_of(members_of(samples), tar_format))
    )
    whole = index_shard(stored(bytes(damaged)))
    for place, bits in flips:
        damaged[int(place * len(damaged))] ^= bits
    url = stored(bytes(damaged))
    index = index_shard(url)
    read_all(url, index)
    if whole.rows:
        span = span_of(whole, 0, len(whole.rows))
        message, num_read = "", 0
        try:
            num_read = len(list(read_samples(url, span, ALL, whole.sequential)))
        except ShardError as error:
            message = str(error)
        assert num_read == len(whole.rows) or "changed since it was" in message


@QUICK
@given(
    st.binary(max_size=3000), st.sampled_from([b"", b"\x1f\x8b\x08", b"BZh9", b"ustar"])
)
def test_any_bytes_give_an_index(stored: Put, data: bytes, magic: bytes) -> None:
    index = index_shard(stored(magic + data))
    assert index.rows == []
    assert index.damage is not None or not data.strip(b"\0")


@pytest.mark.parametrize("compression", sorted(COMPRESSIONS))
def test_interleaved_samples_are_put_together(
    tar_of: TarOf, stored: Put, compression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a.jpg", "b.jpg", "c.jpg", "b.cls", "c.cls", "a.cls"]
    tar = tar_of([(name, name.encode() * 100) for name in names])
    url = stored(COMPRESSIONS[compression](tar))
    index = index_shard(url)
    assert index.sequential
    expected = {
        key: {e: f"{key}.{e}".encode() * 100 for e in ("jpg", "cls")} for key in "abc"
    }
    assert read_all(url, index) == expected
    monkeypatch.setattr(shards, "MAX_INTERLEAVED_BYTES", 900)
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 600)
    if compression == "plain":
        assert read_all(url, index) == expected
    else:
        with pytest.raises(ShardError, match="repack it, or store it as plain"):
            read_all(url, index)


def test_a_global_header_makes_a_shard_sequential(stored: Put) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer,
        mode="w",
        format=tarfile.PAX_FORMAT,
        pax_headers={"comment": "c"},
    ) as archive:
        for key in "ab":
            archive.addfile(tarfile.TarInfo(f"{key}.jpg"))
    url = stored(buffer.getvalue())
    index = index_shard(url)
    assert index.sequential
    assert read_all(url, index) == {
        "a": {"jpg": b""},
        "b": {"jpg": b""},
    }


@pytest.mark.parametrize("order", ["aab", "aba"])
@pytest.mark.parametrize("compression", ["plain", "gzip"])
def test_a_key_twice_is_refused_and_never_mixed(
    tar_of: TarOf, stored: Put, order: str, compression: str
) -> None:
    members = []
    for number, key in enumerate(order):
        members += [(f"{key}.jpg", b"%d" % number), (f"{key}.cls", b"%d" % number)]
    members += [("a.json", b"late")]
    url = stored(COMPRESSIONS[compression](tar_of(members)))
    index = index_shard(url)
    assert [(row.key, bool(row.refused)) for row in index.rows] == [
        ("a", True),
        ("b", False),
    ]
    assert index.rows[0].refused
    assert index.rows[0].refused.startswith("duplicate_key: ")
    assert [(fault.key, fault.reason) for fault in index.faults] == [
        ("a", "duplicate_key")
    ]
    assert index.sequential
    b = b"%d" % order.index("b")
    assert read_all(url, index) == {
        "a": {"jpg": b"0", "cls": b"0"},
        "b": {"jpg": b, "cls": b},
    }


def test_extensions_that_differ_in_case_are_one_extension(
    tar_of: TarOf, stored: Put
) -> None:
    index = index_shard(stored(tar_of([("a.jpg", b"1"), ("a.JPG", b"2")])))
    assert [bool(row.refused) for row in index.rows] == [True]


def test_what_is_no_sample_is_a_fault_and_leaves_rows_alone(
    tar_of: TarOf, stored: Put
) -> None:
    names = ["a.jpg", "._a.jpg", "a.cls", "../x.jpg", ".jpg", "README", "b.jpg"]
    url = stored(tar_of([(name, name.encode()) for name in names]))
    index = index_shard(url)
    assert [(f.key, f.reason) for f in index.faults] == [
        ("._a.jpg", "junk"),
        ("../x", "unsafe_key"),
        ("", "junk"),
        ("README", "junk"),
    ]
    assert not index.sequential
    assert read_all(url, index) == {
        "a": {"jpg": b"a.jpg", "cls": b"a.cls"},
        "b": {"jpg": b"b.jpg"},
    }


def test_links_and_large_members_are_faults_of_their_sample(
    stored: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MAX_MEMBER_BYTES", 100)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        for name, size in (("a.cls", 1), ("a.bin", 101)):
            info = tarfile.TarInfo(name)
            info.size = size
            archive.addfile(info, io.BytesIO(bytes(size)))
    url = stored(buffer.getvalue())
    ((_, sample),) = read_samples(url, span_of(index_shard(url), 0, 1), ALL, False)
    assert sample.members == {"cls": b"\0"}
    assert sample.faults == {
        "jpg": "link: never followed",
        "bin": "too_large: 101 bytes, at most 100 are read",
    }


def test_samples_behind_a_bad_checksum_are_named(tar_of: TarOf, stored: Put) -> None:
    names = [f"{key}.{e}" for key in "abcd" for e in ("jpg", "cls")]
    tar = bytearray(tar_of([(name, b"x" * 600) for name in names]))
    place = tar.index(b"b.cls")
    tar[place] ^= 1  # is "c.cls" now, by a name that no checksum vouches for
    index = index_shard(stored(bytes(tar)))
    assert [row.key for row in index.rows] == ["a", "b"]
    tar[place] ^= 1
    tar[place + 120] ^= 1
    index = index_shard(stored(bytes(tar)))
    assert [row.key for row in index.rows] == ["a"]
    assert index.damage == f"bad checksum in a header at byte {place}"
    assert [(f.key, f.reason) for f in index.faults] == [
        ("b", "truncated"),
        ("c", "after_damage"),
        ("d", "after_damage"),
    ]
    compressed = index_shard(stored(gzip.compress(bytes(tar))))
    assert compressed.faults == index.faults
    assert compressed.damage == index.damage


def test_a_sample_on_both_sides_of_damage_has_no_row(
    tar_of: TarOf, stored: Put
) -> None:
    names = ["a.jpg", "b.jpg", "x.jpg", "a.cls", "c.jpg"]
    tar = bytearray(tar_of([(name, b"x" * 600) for name in names]))
    tar[tar.index(b"x.jpg") : tar.index(b"x.jpg") + 5] = b"\xff\xfe\xff\xfe\xff"
    url = stored(bytes(tar))
    index = index_shard(url)
    assert [row.key for row in index.rows] == ["b"]
    assert index.sequential
    assert {(f.key, f.reason) for f in index.faults} == {
        ("a", "truncated"),
        ("c", "after_damage"),
    }
    assert read_all(url, index) == {"b": {"jpg": b"x" * 600}}


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "an empty file"),
        (b"PK\x03\x04" + bytes(600), "zip"),
        (b"\x28\xb5\x2f\xfd" + bytes(600), "zstd"),
        (b"<html>not found</html>", "inside a header"),
        (random.Random(0).randbytes(20480), "header"),
        (gzip.compress(random.Random(0).randbytes(20480)), "header"),
        (gzip.compress(bytes(2000))[:-12], "end early"),
        (gzip.compress(bytes(2000))[:-8] + bytes(8), "incorrect data check"),
    ],
)
def test_what_is_no_tar_is_damage_by_name(stored: Put, data: bytes, what: str) -> None:
    index = index_shard(stored(data))
    assert index.rows == []
    assert index.damage is not None
    assert what in index.damage
    assert index.size_bytes == len(data)


def test_no_samples_is_no_damage(tar_of: TarOf, stored: Put) -> None:
    index = index_shard(stored(tar_of([])))
    assert (index.rows, index.faults, index.damage) == ([], [], None)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_shard_that_changed_is_refused(
    tar_of: TarOf, stored: Put, sequential: bool
) -> None:
    old = tar_of([(f"{key}.jpg", b"1") for key in "abc"])
    index = index_shard(stored(old))
    span = span_of(index, 1, 3)
    changed = {
        "row 1 is 'x'": tar_of([(f"{key}.jpg", b"1") for key in "axc"]),
        "it has [12] rows": tar_of([(f"{key}.jpg", b"1") for key in "ab"]),
        "the file ends inside|it has 2 rows": old[:2000],
    }
    if not sequential:
        changed["is compressed now"] = gzip.compress(old)
        changed["it has more rows"] = tar_of([(f"{key}.jpg", b"") for key in "xabcdef"])
        changed["a key twice"] = tar_of([(f"{key}.jpg", b"1") for key in "abb"])
    for what, new in changed.items():
        with pytest.raises(ShardError, match=what) as raised:
            list(read_samples(stored(new), span, ALL, sequential))
        assert "changed since it was indexed" in str(raised.value)
        assert "run index again" in str(raised.value)


def test_a_missing_shard_is_the_stores_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing is there"):
        index_shard(str(tmp_path / "none.tar"))


def test_a_failing_store_is_never_damage(
    tar_of: TarOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of([("a.jpg", bytes(5000))]))

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() >= 512:
                raise ConnectionError("reset by peer")
            return super().read(size)

    monkeypatch.setattr(
        "pipeline.samples.streams.open_url", lambda url: Broken(path.read_bytes())
    )
    with pytest.raises(StorageError, match="reset by peer"):
        index_shard(str(path))


def test_a_bomb_inflates_in_pieces(tar_of: TarOf, stored: Put) -> None:
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        info = tarfile.TarInfo("a.bin")
        info.size = 2**27
        file.write(info.tobuf())
        for _ in range(2**7):
            file.write(bytes(2**20))
        file.write(tar_of([("b.cls", b"1")]))
    url = stored(buffer.getvalue())
    tracemalloc.start()
    index = index_shard(url)
    ((_, sample),) = read_samples(url, span_of(index, 1, 2), ALL, True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.key for row in index.rows] == ["a", "b"]
    assert index.damage is None
    assert sample.members == {"cls": b"1"}
    assert peak < 16 * 2**20
