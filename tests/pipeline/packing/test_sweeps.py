"""Accumulated sweeps: a scene that stands still stays where it is."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.packing.lists import read_list
from pipeline.packing.pack import PackRequest, pack
from pipeline.packing.shards import ShardLimit, ShardNames
from pipeline.packing.sweeps import SweepJoin, join_sweeps

COLUMNS = ("x", "y", "intensity", "z")
FAR = np.array([5_123_456.0, 412_345.0, 80.0])
"""Where the world's origin is not: coordinates as a survey has them."""


def pose_of(number: int) -> np.ndarray:
    """A sensor that drives, turns and nods."""
    a, b = 0.1 * number, 0.02 * number
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    nod = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    pose = np.eye(4)
    pose[:3, :3] = turn @ nod
    moved = np.array([3.0 * number, 0.5 * number**2, 0.01 * number])
    pose[:3, 3] = FAR + moved
    return pose


def world(number: int) -> np.ndarray:
    """Points of the scene that sweep `number` sees, (N, 3) float64."""
    rng = np.random.default_rng(number)
    return FAR + rng.uniform(-40, 40, (20 + number, 3))


def seen_from(pose: np.ndarray, points_N3: np.ndarray) -> np.ndarray:
    """World points in the sensor's coordinates, by the inverse written out."""
    return (points_N3 - pose[:3, 3]) @ pose[:3, :3]


def write_scene(folder: Path, count: int = 6, keyed=lambda n: True) -> Path:
    lines = []
    for number in range(count):
        points = np.empty((len(world(number)), 4), "<f4")
        points[:, [0, 1, 3]] = seen_from(pose_of(number), world(number))
        points[:, 2] = number
        (folder / f"{number}.bin").write_bytes(points.tobytes())
        pose = pose_of(number).tolist()
        line = {"clip": "s", "time": 50 + 0.05 * number, "bin": f"{number}.bin"}
        if number % 2:
            (folder / f"{number}.json").write_text(json.dumps(pose))
            pose = f"{number}.json"
        line |= {"pose": pose, "cls": number}
        if keyed(number):
            line["key"] = f"s/{number}"
        lines.append(json.dumps(line))
    path = folder / "list.jsonl"
    # Times are the order, not lines.
    path.write_text("\n".join(lines[::-1]))
    return path


def packed(path: Path, count: int) -> dict[str, bytes]:
    names = ShardNames.parse(str(path.parent / f"out{count}"), "s")
    join = SweepJoin(count, COLUMNS)
    done = pack(PackRequest(str(path), names, ShardLimit(), sweeps=join))
    assert not done.unreadable
    with tarfile.open(next(iter(done.shards))) as tar:
        return {one.name: tar.extractfile(one).read() for one in tar}


@pytest.mark.parametrize("count", [1, 3, 10])
def test_what_stands_still_is_where_the_sensor_sees_it_now(tmp_path, count):
    found = packed(write_scene(tmp_path), count)
    for number in range(6):
        rows = np.frombuffer(found[f"s/{number}.bin"], "<f4").reshape(-1, 5)
        sources = range(number, max(-1, number - count), -1)
        expected = np.concatenate(
            [seen_from(pose_of(number), world(n)) for n in sources]
        )
        np.testing.assert_allclose(rows[:, [0, 1, 3]], expected, atol=2e-5)
        sweeps = np.concatenate([np.full(len(world(n)), n) for n in sources])
        np.testing.assert_array_equal(rows[:, 2], sweeps)
        np.testing.assert_allclose(rows[:, 4], 0.05 * (number - sweeps), atol=1e-6)
        assert found[f"s/{number}.cls"] == str(number).encode()
    # The sample's own points are those of its file, to the bit.
    raw = np.frombuffer((tmp_path / "5.bin").read_bytes(), "<f4").reshape(-1, 4)
    np.testing.assert_array_equal(rows[: len(raw), :4], raw)
    assert (rows[: len(raw), 4] == 0).all()


def test_lines_without_a_key_are_history(tmp_path):
    every = packed(write_scene(tmp_path), 3)
    (tmp_path / "keyed").mkdir()
    some = packed(write_scene(tmp_path / "keyed", keyed=lambda n: n % 3 == 2), 3)
    assert set(some) == {f"s/{n}.{part}" for n in (2, 5) for part in ("bin", "cls")}
    assert all(some[name] == every[name] for name in some)


def test_points_without_a_number_stay_for_the_reader_to_drop(tmp_path):
    path = write_scene(tmp_path, 2)
    points = (
        np.frombuffer((tmp_path / "0.bin").read_bytes(), "<f4").reshape(-1, 4).copy()
    )
    points[3, 0], points[4, 2] = np.nan, np.inf
    (tmp_path / "0.bin").write_bytes(points.tobytes())
    rows = np.frombuffer(packed(path, 2)["s/1.bin"], "<f4").reshape(-1, 5)
    older = rows[len(world(1)) :]
    assert np.flatnonzero(~np.isfinite(older).all(1)).tolist() == [3, 4]


def test_a_sweep_of_other_columns_is_named_and_left_out(tmp_path):
    path = write_scene(tmp_path, 3)
    (tmp_path / "0.bin").write_bytes(b"123")
    names = ShardNames.parse(str(tmp_path / "out"), "s")
    done = pack(
        PackRequest(str(path), names, ShardLimit(), sweeps=SweepJoin(2, COLUMNS))
    )
    assert done.num_samples == 1
    assert len(done.unreadable) == 2
    assert all(
        "must have whole rows of 4 float32" in w for w in done.unreadable.values()
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"pose": [[1, 0], [0, 1]]}, "pose must be a 4 x 4 matrix"),
        ({"pose": (2 * np.eye(4)).tolist()}, "pose must be a 4 x 4 matrix"),
        ({"pose": np.diag([1, 1, -1, 1]).tolist()}, "pose must be a 4 x 4 matrix"),
        ({"pose": "[[1,"}, "pose must be a 4 x 4 matrix"),
        ({"pose": None}, "pose must be a 4 x 4 matrix"),
        ({"time": None}, "got none of time"),
        ({"bin": None, "jpg": "a.jpg"}, "got none of bin"),
        ({"clip": None}, "need a column `clip`"),
    ],
)
def test_a_line_that_lacks_something_is_refused(tmp_path, change, match):
    line = {"clip": "s", "time": 1, "pose": np.eye(4).tolist(), "bin": "a.bin"}
    (tmp_path / "l.jsonl").write_text(json.dumps(line | change))
    with pytest.raises(PipelineError, match=match):
        join_sweeps(read_list(str(tmp_path / "l.jsonl")), SweepJoin(2, COLUMNS))


@pytest.mark.parametrize(
    ("count", "columns", "match"),
    [
        (0, COLUMNS, "--sweeps must be at least 1"),
        (2, ("x", "y"), "--columns must hold x, y, z"),
        (2, ("x", "y", "z", "x"), "--columns must hold x, y, z"),
        (2, ("x", "y", "z", "time_lag"), "make the column time_lag"),
    ],
)
def test_what_cannot_be_joined_is_refused(count, columns, match):
    with pytest.raises(PipelineError, match=match):
        SweepJoin(count, columns)
