"""Packing end to end: what is in the shards, and that our readers and others agree."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipeline.errors import PipelineError
from pipeline.packing.clips import ClipCut
from pipeline.packing.pack import pack
from pipeline.packing.shards import ShardLimit
from pipeline.samples.shards import RowSpan, index_shard, read_samples
from tests.conftest import jpeg
from tests.pipeline.packing.conftest import content, photos, put, request


def by_webdataset(urls) -> list[dict]:
    """Samples as stock WebDataset groups them."""
    found = []
    for url in urls:
        with open(url, "rb") as stream:
            source = {"url": str(url), "stream": stream}
            found += group_by_keys(tar_file_expander([source]))
    return found


def test_class_folders_become_labels_by_sorted_name(tmp_path):
    files = photos(tmp_path / "in")
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    found = content(tmp_path / "out/shard-00000.tar")
    expected = {}
    for name, data in files.items():
        expected[name] = data
        expected[name.replace(".jpg", ".cls")] = b"0" if name[0] == "a" else b"1"
    assert found == expected
    assert packed.classes == ("a", "b")
    assert (tmp_path / "out/classes.txt").read_text() == "a\nb\n"
    assert sorted(os.listdir(tmp_path / "out")) == ["classes.txt", "shard-00000.tar"]


@pytest.mark.parametrize(
    "names", [["x.jpg", "a/y.jpg", "b/z.jpg"], ["a/x.jpg", "a/y.jpg"]]
)
def test_plain_folders_have_no_label(tmp_path, names):
    put(tmp_path / "in", {name: jpeg(n) for n, name in enumerate(names)})
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    assert packed.classes == ()
    assert sorted(content(tmp_path / "out/shard-00000.tar")) == sorted(names)
    assert not (tmp_path / "out/classes.txt").exists()


def test_our_reader_and_webdatasets_see_the_same_samples(tmp_path):
    files = photos(tmp_path / "in", 11)
    limit = ShardLimit(samples=4)
    packed = pack(request(tmp_path / "in", tmp_path / "o/t-{:03d}.tar", limit=limit))
    assert list(packed.shards.values()) == [4, 4, 3]
    ours: dict[str, dict[str, bytes]] = {}
    for url in packed.shards:
        index = index_shard(url)
        assert (index.damage, index.faults, index.sequential) == (None, [], False)
        assert all(row.refused is None for row in index.rows)
        end = index.rows[-1].offset + index.rows[-1].size
        span = RowSpan(0, len(index.rows), 0, end, index.rows[0].key)
        for _, sample in read_samples(url, span, frozenset({"jpg", "cls"}), False):
            ours[sample.key] = sample.members
    theirs = {
        one["__key__"]: {name: one[name] for name in ("jpg", "cls")}
        for one in by_webdataset(packed.shards)
    }
    assert ours == theirs
    assert {f"{key}.jpg": one["jpg"] for key, one in ours.items()} == files


def test_equal_input_gives_equal_bytes_whatever_its_times_and_order(tmp_path):
    files = photos(tmp_path / "one")
    put(tmp_path / "two", dict(reversed(files.items())))
    for path in (tmp_path / "two").rglob("*.jpg"):
        os.utime(path, (1, 1))
        path.chmod(0o600)
    digests = []
    for name in ("one", "two"):
        out = tmp_path / f"out-{name}"
        pack(request(tmp_path / name, out, shuffle=5, limit=ShardLimit(samples=3)))
        shards = sorted(out.glob("*.tar"))
        assert len(shards) == 4
        digests.append([hashlib.sha256(one.read_bytes()).digest() for one in shards])
    assert digests[0] == digests[1]


def test_a_seed_is_an_order_and_no_seed_is_the_order_of_keys(tmp_path):
    photos(tmp_path / "in", 30)

    def keys(name, **fields):
        pack(request(tmp_path / "in", tmp_path / name, **fields))
        found = content(tmp_path / name / "shard-00000.tar")
        return [one for one in found if one.endswith(".jpg")]

    plain, first, again, other = (
        keys("plain"),
        keys("s0", shuffle=0),
        keys("again", shuffle=0),
        keys("s1", shuffle=1),
    )
    assert plain == sorted(plain)
    assert first == again
    assert len({tuple(one) for one in (plain, first, other)}) == 3
    assert sorted(first) == sorted(other) == plain
    # Classes are mixed, not laid one after the other.
    labels = [one[0] for one in first]
    assert 8 < sum(a != b for a, b in itertools.pairwise(labels)) < 22


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a.b.c.jpg", "a_b_c"),
        ("v1.2/img.0.PNG", "v1.2/img_0"),
        ("ü ä/日本.jpg", "ü ä/日本"),
        ("x" * 120 + "/" + "y" * 130 + ".jpg", "x" * 120 + "/" + "y" * 130),
    ],
)
def test_keys_are_what_every_reader_makes_of_them(tmp_path, name, key):
    put(tmp_path / "in", {name: jpeg(1)})
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    (url,) = packed.shards
    assert [row.key for row in index_shard(url).rows] == [key]
    (sample,) = by_webdataset([url])
    assert sample["__key__"] == key
    assert packed.num_bytes == Path(url).stat().st_size


@pytest.mark.parametrize(
    "names", [("a.b.jpg", "a_b.jpg"), ("x/1.jpg", "x/1.png"), ("1.JPG", "1.jpg")]
)
def test_duplicates_are_refused_by_name(tmp_path, names):
    put(tmp_path / "in", {name: jpeg(1) for name in names})
    with pytest.raises(PipelineError, match="keys must be unique") as found:
        pack(request(tmp_path / "in", tmp_path / "out"))
    assert all(name in str(found.value) for name in names)
    assert not (tmp_path / "out").exists()


def test_hidden_files_are_passed_over_and_others_counted(tmp_path):
    put(
        tmp_path / "in",
        {
            "a.jpg": jpeg(1),
            ".b.jpg": b"",
            ".git/c.jpg": b"",
            "notes.txt": b"",
            "d": b"",
        },
    )
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    assert packed.members == {"jpg": 1}
    assert packed.num_others == 2


def test_links_to_folders_are_followed_and_loops_are_not(tmp_path):
    put(tmp_path / "real", {"x.jpg": jpeg(1)})
    put(tmp_path / "in", {"a/y.jpg": jpeg(2)})
    (tmp_path / "in/b").symlink_to(tmp_path / "real")
    (tmp_path / "in/a/up").symlink_to(tmp_path / "in")
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    assert set(content(tmp_path / "out/shard-00000.tar")) == {
        "a/y.jpg",
        "a/y.cls",
        "b/x.jpg",
        "b/x.cls",
    }
    assert packed.num_samples == 2


def test_classes_of_another_set_number_these(tmp_path):
    put(tmp_path / "val", {"b/1.jpg": jpeg(1), "c/2.jpg": jpeg(2)})
    (tmp_path / "classes.txt").write_text("c\na\nb\n")
    classes = str(tmp_path / "classes.txt")
    packed = pack(request(tmp_path / "val", tmp_path / "out", classes=classes))
    found = content(tmp_path / "out/shard-00000.tar")
    assert (found["b/1.cls"], found["c/2.cls"]) == (b"2", b"0")
    assert packed.classes == ("c", "a", "b")
    put(tmp_path / "val", {"d/3.jpg": jpeg(3)})
    with pytest.raises(PipelineError, match="named in --classes, got 'd'"):
        pack(request(tmp_path / "val", tmp_path / "out2", classes=classes))


def test_classes_that_differ_from_those_beside_the_shards_are_refused(tmp_path):
    photos(tmp_path / "in")
    put(tmp_path / "val", {"b/1.jpg": jpeg(1), "c/2.jpg": jpeg(2)})
    pack(request(tmp_path / "in", tmp_path / "out/train-{:05d}.tar"))
    with pytest.raises(PipelineError, match=r"classes must be those of .*classes\.txt"):
        pack(request(tmp_path / "val", tmp_path / "out/val-{:05d}.tar"))
    assert not list((tmp_path / "out").glob("val*"))


def test_what_is_there_is_replaced_only_when_asked_and_then_all_of_it(tmp_path):
    photos(tmp_path / "in")
    few, many = ShardLimit(samples=5), ShardLimit(samples=2)
    other = put(tmp_path / "out", {"shard-x.tar": b"other", "shard-1.tar.txt": b""})
    pack(request(tmp_path / "in", tmp_path / "out", limit=many))
    with pytest.raises(PipelineError, match=r"hold no shards of that name, got 5 \("):
        pack(request(tmp_path / "in", tmp_path / "out", limit=few))
    assert len(list(other.glob("shard-0*.tar"))) == 5
    pack(request(tmp_path / "in", tmp_path / "out", limit=few, overwrite=True))
    assert sorted(os.listdir(other)) == [
        "classes.txt",
        "shard-00000.tar",
        "shard-00001.tar",
        "shard-1.tar.txt",
        "shard-x.tar",
    ]


def test_an_unreadable_file_is_named_and_its_sample_left_out(tmp_path):
    files = photos(tmp_path / "in")
    (tmp_path / "in/a/img00.jpg").unlink()
    (tmp_path / "in/a/img00.jpg").symlink_to(tmp_path / "gone.jpg")
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    assert list(packed.unreadable) == [str(tmp_path / "in/a/img00.jpg")]
    assert "nothing is there" in packed.unreadable[str(tmp_path / "in/a/img00.jpg")]
    assert packed.num_left_out == 1
    found = content(tmp_path / "out/shard-00000.tar")
    assert {one for one in found if one.endswith("jpg")} == set(files) - {"a/img00.jpg"}


def test_nothing_is_written_where_nothing_can_be_read(tmp_path):
    put(tmp_path / "in", {"list.csv": b"jpg\nno.jpg\nnone.jpg\n"})
    with pytest.raises(PipelineError, match=r"got none that is: .*no\.jpg"):
        pack(request(tmp_path / "in/list.csv", tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"classes": "/c.txt", "clip": ClipCut(2, 1, 2)}, "no effect with --clip"),
        ({"clip": ClipCut(9, 1, 9)}, r"must have 9 frames for a clip, got a: 5, b: 5"),
    ],
)
def test_what_cannot_be_packed_is_refused(tmp_path, fields, match):
    photos(tmp_path / "in")
    with pytest.raises(PipelineError, match=match):
        pack(request(tmp_path / "in", tmp_path / "out", **fields))
    assert not (tmp_path / "out").exists()


def test_a_source_without_images_is_refused(tmp_path):
    put(tmp_path / "in", {"a.txt": b""})
    with pytest.raises(PipelineError, match="must be a folder with images"):
        pack(request(tmp_path / "in", tmp_path / "out"))
    with pytest.raises(PipelineError, match="must be a folder or a list"):
        pack(request(tmp_path / "none", tmp_path / "out"))


def test_pictures_that_are_broken_are_copied_all_the_same(tmp_path):
    """Whether a picture can be decoded is found, and recorded, by precompute."""
    sink = io.BytesIO(jpeg(1)[:100])
    put(tmp_path / "in", {"a.jpg": sink.getvalue(), "b.jpg": b""})
    packed = pack(request(tmp_path / "in", tmp_path / "out"))
    assert content(tmp_path / "out/shard-00000.tar") == {
        "a.jpg": sink.getvalue(),
        "b.jpg": b"",
    }
    assert packed.unreadable == {}
