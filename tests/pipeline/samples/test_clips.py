"""Clips: frames in order, of one size, and which one is at fault."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from manifests.inputs import ClipInput
from pipeline.samples.clips import decode_clip
from pipeline.samples.errors import SampleError
from pipeline.samples.members import frames_of, members_of
from pipeline.samples.shards import Sample


def flat(value: int, width: int = 6, height: int = 4, **save) -> bytes:
    sink = io.BytesIO()
    Image.new("L", (width, height), value).save(sink, "PNG", **save)
    return sink.getvalue()


def clip_of(members: dict[str, bytes], faults=None) -> Sample:
    return Sample("k", members, faults or {})


def config(frames: int = 3, member="png") -> ClipInput:
    return ClipInput(kind="clip", member=member, frames=frames)


@given(st.integers(1, 1000))
def test_members_are_numbered_as_they_sort(frames):
    names = [one for (one,) in frames_of(config(frames, "JPG"))]
    assert names == sorted(names)
    assert len(set(names)) == frames
    assert names[0] == "000.jpg"
    assert members_of(config(frames, "JPG")) == tuple(names)


def test_frames_come_by_number_whatever_the_order_of_members():
    members = {f"{n:03d}.png": flat(10 * n) for n in (2, 0, 1)}
    frames = decode_clip(clip_of(members), config())
    assert [np.asarray(one)[0, 0, 0] for one in frames] == [0, 10, 20]
    assert {one.mode for one in frames} == {"RGB"}


def test_frames_may_differ_in_format_and_more_frames_are_not_looked_at():
    sink = io.BytesIO()
    Image.new("RGB", (6, 4), (9, 9, 9)).save(sink, "BMP")
    members = {"000.png": flat(1), "001.bmp": sink.getvalue(), "002.png": b"broken"}
    frames = decode_clip(clip_of(members), config(2, ["png", "bmp"]))
    assert [np.asarray(one)[0, 0, 0] for one in frames] == [1, 9]


def test_frames_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    members = {"000.png": flat(1, 4, 6), "001.png": flat(1, 6, 4, exif=exif)}
    frames = decode_clip(clip_of(members), config(2))
    assert [one.size for one in frames] == [(4, 6), (4, 6)]


@pytest.mark.parametrize(
    ("changes", "faults", "reason", "detail"),
    [
        ({"001.png": None}, {}, "missing", r"frame 1: no member \.001\.png"),
        ({"002.png": b"no"}, {}, "undecodable", "frame 2: "),
        ({"000.png": b""}, {}, "empty", "frame 0: "),
        (
            {"001.png": flat(1, 6, 5)},
            {},
            "frame_sizes",
            "frames must be of one size, got 6 x 4, 6 x 5",
        ),
        (
            {"001.png": None},
            {"001.png": "link: never followed"},
            "link",
            "frame 1: never followed",
        ),
    ],
)
def test_a_clip_that_cannot_be_had_names_its_frame(changes, faults, reason, detail):
    members = {f"{n:03d}.png": flat(n) for n in range(3)} | changes
    sample = clip_of(
        {name: data for name, data in members.items() if data is not None}, faults
    )
    with pytest.raises(SampleError, match=detail) as found:
        decode_clip(sample, config())
    assert found.value.reason == reason
