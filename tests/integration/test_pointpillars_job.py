"""PointPillars on real sweeps through a whole job (`shared_data`; skips without)."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.job import Job
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute


def sweeps_of(path: Path, num_columns: int) -> list[np.ndarray]:
    """Returns the sweeps of a shard, float32 (N, C) each, in order."""
    with tarfile.open(path) as shard:
        return [
            np.frombuffer(shard.extractfile(member).read(), "<f4").reshape(
                -1, num_columns
            )
            for member in shard
            if member.name.endswith(".bin")
        ]


def moved(points: np.ndarray, flip: bool, yaw: float, scale: float) -> np.ndarray:
    """Returns x, y, z mirrored, turned and scaled, from the formulas."""
    xyz = points[:, :3].astype(np.float64)
    if flip:
        xyz = xyz * [1, -1, 1]
    turn = np.array(
        [[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]]
    )
    return scale * xyz @ turn.T


def occupancy(xyz: np.ndarray, extent: Any, z: Any, shape: Any) -> np.ndarray:
    """Returns the number of points of each cell, rows from the highest x down."""
    xyz = xyz[(xyz[:, 2] > z[0]) & (xyz[:, 2] < z[1])]
    counts, _, _ = np.histogram2d(
        xyz[:, 0], xyz[:, 1], bins=shape, range=(extent.x_m, extent.y_m)
    )
    return counts[::-1, ::-1]


CASES: dict[str, dict[str, Any]] = {
    "kitti": {
        "shard": "driving-kitti-00000.tar",
        "columns": ["x", "y", "z", "intensity"],
        "intensity_max": 1,
        "rows": 3,
        "z": (-3, 1),
        "x_m": (0, 69.12),
        "y_m": (-39.68, 39.68),
        "args": {},
        "bev": (54, 62, 384),
    },
    "nuscenes": {
        "shard": "driving-nuscenes-00000.tar",
        "columns": ["x", "y", "z", "intensity", "ring"],
        "intensity_max": 255,
        "rows": 1,
        "z": (-5, 3),
        "x_m": (-51.2, 51.2),
        "y_m": (-51.2, 51.2),
        "args": {"layout": "openpcdet"},
        "bev": (32, 32, 384),
    },
}


@pytest.mark.parametrize("name", list(CASES))
def test_real_sweeps_become_maps_that_lie_on_their_points(
    name: str, shared_data: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    shard = shared_data / "driving" / case["shard"]
    job = {
        "bank": str(tmp_path / "bank"),
        "dataset": {"shards": str(shard)},
        "inputs": {
            "lidar": {
                "kind": "points",
                "member": "bin",
                "columns": case["columns"],
                "intensity_max": case["intensity_max"],
            }
        },
        "views": {"random": 1, "yaw_deg": 40, "flip": True, "seed": 3},
        "teachers": {
            "pillars": {
                "model": f"pointpillars:{name}",
                "weights": "random",
                "args": case["args"],
                "outputs": {"bev": {"pool": [4, 4]}, "level0": {"encoding": "half"}},
            }
        },
    }
    outcome = precompute(Job.model_validate(job), quiet=True)
    assert outcome.is_whole
    store, record = open_record(job["bank"])
    assert verify(store, record, full=True).problems == []
    assert record.state.valid["pillars.lidar"] == case["rows"]
    bank = open_bank(job["bank"])
    sweeps = sweeps_of(shard, len(case["columns"]))
    assert len(sweeps) == case["rows"]
    views = {
        field: bank.whole_array(f"views/{field}") for field in ("flip", "yaw", "scale")
    }
    for output in ("bev", "level0"):
        path = f"pillars/lidar/native/{output}"
        extent = bank.output(path).extent
        assert extent is not None
        assert (extent.x_m, extent.y_m) == (case["x_m"], case["y_m"])
        for view in (0, 1):
            maps = bank.read(path, 0, view)[: case["rows"]]
            assert np.isfinite(maps).all()
            for row, points in enumerate(sweeps):
                xyz = moved(points, *(views[k][row, view] for k in views))
                shape = maps.shape[1:3]
                energy = np.square(maps[row], dtype=np.float64).sum(-1)
                counts = occupancy(xyz, extent, case["z"], shape)
                assert (energy[counts > 0] > 0).mean() > 0.99, (output, view)
                seen = np.log(energy + 1e-6).ravel()
                fit = {
                    turn: np.corrcoef(seen, np.log1p(one).ravel())[0, 1]
                    for turn, one in {
                        "as it is": counts,
                        "rows reversed": counts[::-1],
                        "columns reversed": counts[:, ::-1],
                        "both": counts[::-1, ::-1],
                    }.items()
                }
                assert max(fit, key=lambda turn: fit[turn]) == "as it is", fit
                assert fit["as it is"] > 0.3
        assert bank.output(path).shape == (
            case["bev"] if output == "bev" else bank.output(path).shape
        )
