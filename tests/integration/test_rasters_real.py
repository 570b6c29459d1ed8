"""Sweeps drawn as images, on real streets (`shared_data`; skips where absent)."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from manifests.job import Job
from manifests.teacher import BevExtent
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from pipeline.samples.rasters import range_image

COLUMNS = ("x", "y", "z", "intensity")


def _job(shard: Path, bank: Path, lidar: dict[str, Any], **teachers: Any) -> Job:
    return Job.model_validate(
        {
            "bank": str(bank),
            "dataset": {"shards": str(shard)},
            "metadata": "json",
            "inputs": {"lidar": {"kind": "points", "member": "bin", **lidar}},
            "teachers": {
                name: {"weights": "random", **one} for name, one in teachers.items()
            },
        }
    )


def _check(job: Job, rows: int) -> dict[str, Any]:
    """Runs a job and returns its outputs by path."""
    outcome = precompute(job, quiet=True)
    assert outcome.is_whole
    store, record = open_record(job.bank)
    assert verify(store, record, full=True).problems == []
    bank = open_bank(job.bank)
    found = {}
    for entry in record.passes:
        for output in entry.outputs:
            path = f"{entry.teacher}/{entry.group}/{output.size}/{output.name}"
            values = bank.read(path, 0, 0)[:rows].astype(np.float32)
            assert np.isfinite(values).all()
            # Every sweep is another one.
            assert len(np.unique(values.reshape(rows, -1), axis=0)) == rows
            found[path] = (output, values.shape[1:])
    return found


def test_kitti_seen_ahead_and_from_above(shared_data: Path, tmp_path: Path) -> None:
    found = _check(
        _job(
            shared_data / "driving" / "driving-kitti-00000.tar",
            tmp_path / "bank",
            {},
            ahead={
                "model": "range_view:test_vit",
                "args": {"patch_size": [8, 16]},
                "sizes": [[64, 512]],
                "preprocess": {
                    "raster": {"elevation_deg": [-25, 3], "azimuth_deg": [-45, 45]}
                },
                "outputs": {"patch": {}, "pooled": {}},
            },
            above={
                "model": "bev_raster:test_convnext",
                "precision": "bfloat16",
                "sizes": [[256, 256]],
                "preprocess": {"raster": {"x_m": [0, 51.2], "y_m": [-25.6, 25.6]}},
                "outputs": {"bev": {}, "level1": {"pool": [2, 2]}},
            },
        ),
        rows=3,
    )
    extent = BevExtent(
        x_m=(0, 51.2), y_m=(-25.6, 25.6), row_0="x_max", column_0="y_max"
    )
    shapes = {path: (entry.extent, shape) for path, (entry, shape) in found.items()}
    assert shapes == {
        "ahead/lidar/64x512/patch": (None, (8, 32, 64)),
        "ahead/lidar/64x512/pooled": (None, (64,)),
        "above/lidar/256x256/bev": (extent, (8, 8, 64)),
        "above/lidar/256x256/level1": (extent, (16, 16, 32)),
    }


def test_nuscenes_all_around(shared_data: Path, tmp_path: Path) -> None:
    found = _check(
        _job(
            shared_data / "driving" / "driving-nuscenes-00000.tar",
            tmp_path / "bank",
            {"columns": [*COLUMNS, "ring"], "intensity_max": 255},
            around={
                "model": "range_view:test_resnet",
                "sizes": [[32, 1024]],
                "preprocess": {
                    "raster": {
                        "elevation_deg": [-30.67, 10.67],
                        # +y is ahead of the car there: it goes into the middle.
                        "azimuth_deg": [-90, 270],
                        "range_m": [1, 120],
                        "channels": ["range", "z", "intensity", "ring"],
                    }
                },
                "outputs": {"level2": {}, "logits": {"topk": 5}},
            },
        ),
        rows=1,
    )
    assert found["around/lidar/32x1024/level2"][1] == (4, 128, 48)


def test_a_range_image_lies_as_the_cameras_picture_does(shared_data: Path) -> None:
    """By the calibration: what is left in the picture is left, what is up is up."""
    points: dict[str, np.ndarray] = {}
    metadata: dict[str, Any] = {}
    with tarfile.open(shared_data / "driving" / "driving-kitti-00000.tar") as shard:
        for member in shard:
            key, _, extension = member.name.partition(".")
            data = shard.extractfile(member)
            assert data is not None
            if extension == "bin":
                points[key] = np.frombuffer(data.read(), "<f4").reshape(-1, 4)
            elif extension == "json":
                metadata[key] = json.loads(data.read())["camera"]
    assert len(points) == 3
    for key, sweep in points.items():
        image = range_image(
            sweep, COLUMNS, (64, 512), (-25, 3), (-45, 45), ("x", "y", "z", "occupied")
        )
        rows, columns = np.nonzero(image[..., 3])
        xyz1 = np.column_stack([image[rows, columns, :3], np.ones(len(rows))])
        camera = xyz1 @ np.array(metadata[key]["lidar2cam"]).T
        pixels = camera[:, :3] @ np.array(metadata[key]["intrinsics"]).T
        u, v = (pixels[:, :2] / pixels[:, 2:]).T
        assert len(rows) > 8000
        # The camera stands beside the LiDAR, so near things shift a little.
        assert np.corrcoef(columns, u)[0, 1] > 0.99
        assert np.corrcoef(rows, v)[0, 1] > 0.97
