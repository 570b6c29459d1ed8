"""The strict tar reader: against tarfile where that is right, and where it is not."""

from __future__ import annotations

import io
import itertools
import struct
import tarfile
from collections.abc import Callable

import pytest

from pipeline.samples.names import refuse_name, split_name
from pipeline.samples.tar import TarDamage, TarWalk, walk_members

TarOf = Callable[..., bytes]


def header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """Returns a ustar header written by hand, field by field."""
    fields = (name, b"0000644\0", b"0000000\0", b"0000000\0", size, b"0" * 11 + b"\0")
    block = struct.pack("100s8s8s8s12s12s", *fields) + b" " * 8 + kind
    block = struct.pack("257s8s247s", block, b"ustar\x0000", b"")
    checksum = b"%06o\0 " % sum(block)
    return block[:148] + checksum + block[156:]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("0001.jpg", "0001", "jpg"),
        ("a.b/0001.Cam.JPG", "a.b/0001", "cam.jpg"),
        ("./x.cls", "./x", "cls"),
        ("README", "README", ""),
        (".jpg", "", "jpg"),
        ("dir/.jpg", "dir/", "jpg"),
    ],
)
def test_names_split_as_webdataset_splits_them(
    name: str, key: str, extension: str
) -> None:
    assert split_name(name) == (key, extension)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ok.jpg", None),
        ("sub/ok.jpg", None),
        ("..ok/a..b/c.jpg", None),
        ("ünï/çödé 1.jpg", None),
        ("k" * 4096 + ".jpg", None),
        ("k" * 4097 + ".jpg", "key_too_long"),
        ("ü" * 2049 + ".jpg", "key_too_long"),
        ("README", "junk"),
        (".jpg", "junk"),
        ("x/.DS_Store", "junk"),
        ("x/Thumbs.db", "junk"),
        ("x/._ok.jpg", "junk"),
        ("__MACOSX/ok.jpg", "junk"),
        ("__worker__", "junk"),
        ("../ok.jpg", "unsafe_key"),
        ("a/../ok.jpg", "unsafe_key"),
        ("a\\..\\ok.jpg", "unsafe_key"),
        ("../../.jpg", "unsafe_key"),
        ("..\\ok.jpg", "unsafe_key"),
        ("/etc/ok.jpg", "unsafe_key"),
        ("C:\\ok.jpg", "unsafe_key"),
        ("a\0b.jpg", "unsafe_key"),
        ("a\udcff.jpg", "not_utf8"),
    ],
)
def test_names_without_a_row_have_a_reason(name: str, reason: str | None) -> None:
    refusal = refuse_name(name)
    assert (refusal and refusal[1]) == reason
    if refusal:
        "".join(refusal).encode()  # what is reported can be written as UTF-8


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_walk_finds_what_tarfile_finds(tar_of: TarOf, tar_format: int) -> None:
    names = ["a.jpg", "d/" * 60 + "long.jpg", "b.bin"]
    if tar_format != tarfile.USTAR_FORMAT:
        names += ["x" * 300 + ".jpg", "ü" * 200 + ".cls"]
    data = tar_of([(n, bytes(i * 300)) for i, n in enumerate(names)], tar_format)
    found = list(walk_members(io.BytesIO(data)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        oracle = archive.getmembers()
    assert [(m.name, m.data_offset, m.size) for m in found] == [
        (m.name, m.offset_data, m.size) for m in oracle
    ]
    # tarfile's own offset skips PAX headers or not by version: ours is where the
    # previous member ended, so a walk may start there.
    for before, member in itertools.pairwise(found):
        assert member.header_offset == before.end
        again = walk_members(io.BytesIO(data), member.header_offset, member.end)
        assert list(again) == [member]


def test_kinds_are_told_apart_and_links_have_no_data() -> None:
    data = b"".join(
        [
            header(b"d.x/", b"00000000000\0", b"5"),
            header(b"s.jpg", b"00000000011\0", b"2"),
            header(b"h.jpg", b"00000000011\0", b"1"),
            header(b"p.jpg", b"00000000000\0", b"6"),
            header(b"f.jpg", b"00000000003\0") + b"abc".ljust(512, b"\0"),
            header(b"v.jpg", b"00000000003\0", b"V") + b"abc".ljust(512, b"\0"),
            header(b"S.jpg", b"00000000003\0", b"S") + b"abc".ljust(512, b"\0"),
            header(b"last.jpg", b"00000000000\0"),
        ]
    )
    found = [
        (m.name, m.kind, m.is_file, m.size) for m in walk_members(io.BytesIO(data))
    ]
    assert found == [
        ("d.x", "directory", False, 0),
        ("s.jpg", "link", False, 0),
        ("h.jpg", "link", False, 0),
        ("p.jpg", "special", False, 0),
        ("f.jpg", "file", True, 3),
        ("v.jpg", "special", False, 3),
        ("S.jpg", "sparse", False, 3),
        ("last.jpg", "file", True, 0),
    ]


def test_pax_sparse_files_are_told_apart(tar_of: TarOf) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.bin")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        archive.addfile(info)
    assert [m.kind for m in walk_members(io.BytesIO(buffer.getvalue()))] == ["sparse"]


def test_base_256_sizes_are_read() -> None:
    data = header(b"f.jpg", b"\x80" + (3).to_bytes(11, "big")) + b"abc".ljust(
        512, b"\0"
    )
    assert [m.size for m in walk_members(io.BytesIO(data))] == [3]


def test_a_global_header_is_noticed_and_hashed(tar_of: TarOf) -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer,
        mode="w",
        format=tarfile.PAX_FORMAT,
        pax_headers={"comment": "c"},
    ) as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    walk = TarWalk(io.BytesIO(buffer.getvalue()))
    assert [m.header_offset for m in walk] == [0]
    assert walk.has_global_header
    assert walk.headers.hexdigest() != TarWalk(io.BytesIO()).headers.hexdigest()


GOOD = header(b"a.jpg", b"00000000003\0") + b"abc".ljust(512, b"\0")


@pytest.mark.parametrize(
    ("data", "what", "name"),
    [
        (b"x" * 512, "header", None),
        (GOOD[:200], "inside a header", "a.jpg"),
        (GOOD[:514], "holds 2 of them", "a.jpg"),
        (GOOD[:600], "inside the padding", None),
        (GOOD + bytes(512) + GOOD, "zeros in the middle", None),
        (GOOD + bytes(1024) + GOOD, "members after it", None),
        (header(b"a.jpg", b"77777777777\0"), "holds 0 of them", "a.jpg"),
        (header(b"a.jpg", b"\xff" * 12), "negative size", "a.jpg"),
        (header(b"a.jpg", b"-0000000001\0"), "negative size", "a.jpg"),
        (header(b"x", b"00004000001\0", b"L") + bytes(2**21), "1048577 bytes", None),
        (header(b"x", b"00000000003\0", b"L"), "inside an extension", None),
        (header(b"x", b"00000000000\0", b"L") + bytes(1024), "has no member", None),
        (header(b"x", b"00000000003\0", b"x") + b"zzz".ljust(512), "broken PAX", None),
        (
            header(b"x", b"00000000012\0", b"x") + b"10 size=x\n".ljust(512) + GOOD,
            "no number",
            None,
        ),
    ],
)
def test_damage_is_named_where_it_is(data: bytes, what: str, name: str | None) -> None:
    with pytest.raises(TarDamage, match=what) as raised:
        list(walk_members(io.BytesIO(data)))
    assert raised.value.name == name


@pytest.mark.parametrize("tail", [b"", bytes(512), bytes(1024), bytes(1024) + b"x" * 9])
def test_missing_end_blocks_and_trailing_bytes_are_no_damage(tail: bytes) -> None:
    assert len(list(walk_members(io.BytesIO(GOOD + tail)))) == 1


def test_many_extension_headers_need_no_stack() -> None:
    one = header(b"x", b"00000000004\0", b"L") + b"n.x\0".ljust(512, b"\0")
    members = list(walk_members(io.BytesIO(one * 3000 + GOOD)))
    assert [m.name for m in members] == ["n.x"]
    assert members[0].header_offset == 0
