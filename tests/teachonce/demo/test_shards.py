"""Shards on disk: members, bytes, the command."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from teachonce.demo.__main__ import main
from teachonce.demo.errors import DemoError
from teachonce.demo.objects import CLASSES
from teachonce.demo.samples import DemoSample
from teachonce.demo.scenes import SceneOptions
from teachonce.demo.shards import write_shards
from teachonce.demo.sheet import BEV_COLOURS, SEG_COLOURS, draw_contact_sheet
from teachonce.demo.truth import BEV_CLASSES

EXTENSIONS = ["jpg", "bin", "json", "cls", "seg.png", "depth.png", "bev.png"]
SMALL = SceneOptions(height=48, width=96, rings=8, azimuths=64, night=0.5, fog=0.5)


def _members(path: str | Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


def test_same_seed_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in "abc"]
    runs = [
        write_shards(folder, 7, 3, seed=5, options=SMALL, workers=workers)
        for folder, workers in zip(folders, (0, 0, 2), strict=True)
    ]
    names = ["scenes-00000.tar", "scenes-00001.tar", "scenes-00002.tar"]
    for folder, paths in zip(folders, runs, strict=True):
        assert paths == [str(folder / name) for name in names]
        assert sorted(path.name for path in folder.iterdir()) == names
    contents = [[Path(path).read_bytes() for path in paths] for paths in runs]
    assert contents[0] == contents[1] == contents[2]


def test_another_seed_shares_no_scene(tmp_path: Path) -> None:
    one, two = (
        _members(write_shards(tmp_path / str(seed), 6, 6, seed=seed, options=SMALL)[0])
        for seed in (1, 2)
    )
    for extension in ("jpg", "bin", "depth.png", "bev.png"):
        values = [
            {data for name, data in shard.items() if name.endswith(f".{extension}")}
            for shard in (one, two)
        ]
        assert not values[0] & values[1], extension


def test_a_run_in_parts_gives_the_same_samples(tmp_path: Path) -> None:
    whole = _members(write_shards(tmp_path / "w", 4, 4, seed=5, options=SMALL)[0])
    late = _members(
        write_shards(tmp_path / "l", 2, 2, seed=5, options=SMALL, first_index=2)[0]
    )
    assert late == {name: whole[name] for name in late}
    assert sorted({name[:12] for name in late}) == ["scene-000002", "scene-000003"]


def test_members_decode_to_the_sample(
    samples: list[DemoSample], tmp_path: Path
) -> None:
    path = write_shards(tmp_path, 2, seed=7)[0]
    with tarfile.open(path) as tar:
        names = [member.name for member in tar]
        assert all(member.mtime == 0 and member.uid == 0 for member in tar)
    wanted = [
        f"scene-00000{i}.{extension}" for i in range(2) for extension in EXTENSIONS
    ]
    assert names == wanted
    members, sample = _members(path), samples[1]
    key = "scene-000001"

    def image(extension: str) -> Image.Image:
        return Image.open(io.BytesIO(members[f"{key}.{extension}"]))

    assert image("jpg").size == (320, 160)
    shown = np.asarray(image("jpg")).astype(float)
    assert np.abs(shown - sample.image_HW3).mean() < 5
    assert np.array_equal(np.asarray(image("seg.png")), sample.seg_HW)
    assert np.array_equal(np.asarray(image("depth.png")), sample.depth_HW)
    assert np.array_equal(np.asarray(image("bev.png")), sample.bev_XY)
    assert sample.depth_HW.dtype == np.uint16
    assert int(members[f"{key}.cls"]) == sample.scene.cls
    points = np.frombuffer(members[f"{key}.bin"], "<f4").reshape(-1, 5)
    assert np.array_equal(points, sample.points_P5)


def test_record_has_the_layout_of_the_real_shards(samples: list[DemoSample]) -> None:
    record = json.loads(samples[0].members()["json"])
    assert record["sensor"] == "demo"
    assert set(record["lidar"]) == {"columns", "dtype", "points"}
    assert record["lidar"]["columns"] == ["x", "y", "z", "intensity", "ring"]
    assert record["lidar"]["dtype"] == "<f4"
    assert set(record["camera"]) == {
        "name", "width", "height", "intrinsics", "lidar2cam",
    }  # fmt: skip
    assert np.shape(record["camera"]["intrinsics"]) == (3, 3)
    assert np.shape(record["camera"]["lidar2cam"]) == (4, 4)
    assert record["night"] is False
    assert record["fog"] is False
    assert record["lidar_range_m"] == 60
    assert record["seg"]["classes"] == list(CLASSES)
    assert record["bev"]["classes"] == list(BEV_CLASSES)


def test_an_unfinished_shard_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("teachonce.demo.shards.make_sample", fail)
    with pytest.raises(OSError, match="No space left"):
        write_shards(tmp_path, 2, options=SMALL)
    assert not list(tmp_path.iterdir())


def test_no_scenes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="num_scenes must be at least 1, got 0"):
        write_shards(tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


def test_command_writes_shards_and_sheet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    words = [str(tmp_path / "out"), "--scenes", "3", "--per-shard", "2", "--seed", "9"]
    words += ["--night", "1", "--lidar-range", "25", "--sheet", str(sheet)]
    assert main(words) == 0
    paths = capsys.readouterr().out.split()
    assert [Path(path).name for path in paths] == [
        "scenes-00000.tar",
        "scenes-00001.tar",
    ]
    record = json.loads(_members(paths[1])["scene-000002.json"])
    assert record["night"] is True
    assert record["lidar_range_m"] == 25
    with Image.open(sheet) as picture:
        assert picture.width > 1280


def test_command_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), "--night", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: night must be a probability")
    assert error.count("\n") == 1


def test_sheet_has_a_row_per_sample(samples: list[DemoSample]) -> None:
    assert len(SEG_COLOURS) == len(CLASSES)
    assert len(BEV_COLOURS) == len(BEV_CLASSES)
    one, two = (draw_contact_sheet(samples[:count]) for count in (1, 2))
    assert two.width == one.width
    assert two.height - one.height == 160 + 18
