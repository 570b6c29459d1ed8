"""Clips of folders and of lists: which frames they have, and what is known of them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.packing.clips import ClipCut
from pipeline.packing.pack import pack
from tests.conftest import jpeg
from tests.pipeline.packing.conftest import content, put, request


def test_clips_of_folders(tmp_path):
    names = [
        f"{clip}/frame_{n}.jpg"
        for clip, c in (("s/a", 11), ("s/b", 3))
        for n in range(c)
    ]
    files = {name: jpeg(n) for n, name in enumerate(names)}
    put(tmp_path / "in", files)
    cut = ClipCut(3, 2, 4)
    packed = pack(request(tmp_path / "in", tmp_path / "out", clip=cut))
    found = content(tmp_path / "out/shard-00000.tar")
    expected = {}
    for start in (0, 4):
        taken = [f"s/a/frame_{start + 2 * k}.jpg" for k in range(3)]
        for number, name in enumerate(taken):
            expected[f"s/a/{start:06d}.{number:03d}.jpg"] = files[name]
        facts = {"frames": taken}
        assert json.loads(found.pop(f"s/a/{start:06d}.json")) == facts
    assert found == expected
    assert packed.short == {"s/b": 3}
    assert packed.classes == ()


def test_clips_of_a_list_follow_its_times(tmp_path):
    rng = np.random.default_rng(0)
    order = rng.permutation(8)
    lines = ["clip,time,cam_front.jpg,bin,cls"]
    for n in order:
        clip = "x" if n < 4 else "y"
        lines.append(f"{clip},{100 + 0.1 * n},f{n}.jpg,p{n}.bin,{int(n >= 4)}")
        put(tmp_path / "in", {f"f{n}.jpg": jpeg(n), f"p{n}.bin": bytes([n])})
    (tmp_path / "in/list.csv").write_text("\n".join(lines))
    pack(request(tmp_path / "in/list.csv", tmp_path / "out", clip=ClipCut(2, 1, 2)))
    found = content(tmp_path / "out/shard-00000.tar")
    for number, (clip, first) in enumerate([("x", 0), ("x", 2), ("y", 4), ("y", 6)]):
        key = f"{clip}/{2 * (number % 2):06d}"
        for k in range(2):
            assert found[f"{key}.{k:03d}.cam_front.jpg"] == jpeg(first + k)
            assert found[f"{key}.{k:03d}.bin"] == bytes([first + k])
        assert found[f"{key}.cls"] == str(int(first >= 4)).encode()
        facts = json.loads(found[f"{key}.json"])
        assert facts["frames"] == [f"f{first}.jpg", f"f{first + 1}.jpg"]
        assert facts["times_s"] == pytest.approx([0, 0.1], abs=1e-9)
    assert len(found) == 4 * 6


@given(
    num=st.integers(0, 60),
    frames=st.integers(1, 7),
    stride=st.integers(1, 5),
    every=st.integers(1, 9),
)
def test_clips_start_wherever_they_fit(num, frames, stride, every):
    starts = ClipCut(frames, stride, every).starts(num)
    expected = [
        start for start in range(0, num, every) if start + (frames - 1) * stride < num
    ]
    assert list(starts) == expected
