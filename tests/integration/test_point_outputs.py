"""Outputs of points: each row leads back to the point of the file that it is of.

The index of the bank picks points from the sweep's bytes; moved into the view by its
numbers and put through the network in float64, they give what the bank holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from torch import nn

from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from tests.conftest import bank_identity, write_job, write_tar

NUM_POINTS, WIDTH, CHANNELS, NUM_VIEWS, BLOCK_ROWS = 32, 5, 7, 3, 4
NO_POINT = 2**32 - 1
INTENSITY_MAX = 255.0

POINT_FILE = '''\
"""A small PointNet: a value per point that knows of all points."""
import torch
from torch import nn


class PointNet(nn.Module):
    def __init__(self, width=5, channels=7, channels_first=False):
        super().__init__()
        self.point = nn.Linear(4, width)
        self.out = nn.Linear(2 * width, channels)
        self.channels_first = channels_first

    def forward(self, points_BPC):
        each = torch.relu(self.point(points_BPC))
        pooled = each.amax(1)
        both = torch.cat([each, pooled[:, None].expand_as(each)], -1)
        found = self.out(both)
        if self.channels_first:
            found = found.transpose(1, 2)
        return {"points": found, "pooled": pooled}
'''

COUNTS = {"many": 200, "few": 10, "exact": 32, "one": 1, "holes": 90, "worse": 40}
"""Points of each sweep as stored."""


def sweep_of(key: str) -> np.ndarray:
    """The sweep of a sample as stored, (N, 4); some points hold no number."""
    rng = np.random.default_rng(len(key) + 7 * COUNTS[key])
    points = rng.normal(0, 12, (COUNTS[key], 4)).astype("<f4")
    points[:, 3] = rng.integers(0, 256, COUNTS[key])
    if key in ("holes", "worse"):
        bad = rng.choice(COUNTS[key], COUNTS[key] // 3, replace=False)
        points[bad, rng.integers(0, 4, len(bad))] = [np.nan, np.inf, -np.inf][
            len(key) % 3
        ]
        points[0, 0] = np.nan
    return points


def forward(given: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    """Returns (P, channels) float64 of points as the network gets them."""
    each = np.maximum(given @ weights["point.weight"].T + weights["point.bias"], 0)
    both = np.concatenate([each, np.broadcast_to(each.max(0), each.shape)], -1)
    return both @ weights["out.weight"].T + weights["out.bias"]


def drawn_weights(seed: int) -> dict[str, np.ndarray]:
    """What torch draws for the two layers, in the order that they are made."""
    torch.manual_seed(seed)
    layers = {"point": nn.Linear(4, WIDTH), "out": nn.Linear(2 * WIDTH, CHANNELS)}
    return {
        f"{name}.{part}": values.double().numpy()
        for name, layer in layers.items()
        for part, values in layer.state_dict().items()
    }


TEACHERS = {"plain": (3, {}), "centred": (4, {"centre": True, "unit_sphere": True})}
"""Teacher to the seed of its weights and what it does to its points."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two shards of sweeps, one of them broken, and the bank of two teachers."""
    folder = tmp_path_factory.mktemp("points")
    (folder / "pointnet.py").write_text(POINT_FILE)
    members = [(f"{key}.bin", sweep_of(key).tobytes()) for key in COUNTS]
    write_tar(folder / "data/train-0.tar", [*members[:3], ("cut.bin", b"123")])
    write_tar(folder / "data/train-1.tar", members[3:])
    columns = ["x", "y", "z", "intensity"]
    teachers = {}
    for name, (seed, prepare) in TEACHERS.items():
        is_first = name == "centred"
        teachers[name] = {
            "model": "module:./pointnet.py:PointNet",
            "args": {"channels_first": is_first},
            "weights": f"random:{seed}",
            "batch": 2,
            "preprocess": {"points": NUM_POINTS, "columns": columns, **prepare},
            "outputs": {
                "points": {
                    "from": "output[points]",
                    "layout": "ncl" if is_first else "nlc",
                },
                "pooled": {"from": "output[pooled]"},
            },
        }
    job = write_job(
        folder,
        inputs={
            "lidar": {
                "kind": "points",
                "member": "bin",
                "columns": columns,
                "intensity_max": INTENSITY_MAX,
            }
        },
        labels={},
        views={
            "random": NUM_VIEWS - 1,
            "flip": True,
            "yaw_deg": 40.0,
            "point_scale": [0.9, 1.1],
        },
        limits={"max_invalid_fraction": 1.0},
        block_rows=BLOCK_ROWS,
        teachers=teachers,
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder


@pytest.fixture(scope="module")
def bank(folder):
    return open_bank(str(folder / "bank"))


def in_view(bank, row: int, view: int, points: np.ndarray) -> np.ndarray:
    """Points mirrored, turned and scaled by the numbers of the bank, float64."""
    flip = bool(bank.whole_array("views/flip")[row, view])
    yaw = float(bank.whole_array("views/yaw")[row, view])
    scale = float(bank.whole_array("views/scale")[row, view])
    mirror = np.diag([1.0, -1.0 if flip else 1.0, 1.0])
    c, s = np.cos(yaw), np.sin(yaw)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    moved = points.astype(np.float64).copy()
    moved[:, :3] = scale * moved[:, :3] @ (turn @ mirror).T
    moved[:, 3] /= INTENSITY_MAX
    return moved


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_index_leads_to_the_points_that_the_values_are_of(bank, teacher):
    seed, prepare = TEACHERS[teacher]
    weights = drawn_weights(seed)
    keys = bank.keys()
    level = f"{teacher}/lidar/native"
    indices = bank.whole_array(f"{level}/points_index")
    assert indices.dtype == np.uint32
    moves = set()
    for key in COUNTS:
        row = int(np.flatnonzero(keys == key)[0])
        stored = sweep_of(key)
        block, offset = divmod(row, BLOCK_ROWS)
        for view in range(NUM_VIEWS):
            index = indices[row, view]
            given = in_view(bank, row, view, stored[index])
            assert np.isfinite(given).all()
            moves.add(given[0].tobytes())
            if prepare:
                given[:, :3] -= given[:, :3].mean(0)
                radius = np.linalg.norm(given[:, :3], axis=1).max()
                given[:, :3] /= max(radius, 1e-6)
            found = bank.read(f"{level}/points", block, view)[offset]
            np.testing.assert_allclose(found, forward(given, weights), atol=2e-5)
    assert len(moves) == len(COUNTS) * NUM_VIEWS


def test_points_are_taken_evenly_and_few_are_repeated(bank):
    keys = bank.keys()
    indices = bank.whole_array("plain/lidar/native/points_index")
    for key in COUNTS:
        row = int(np.flatnonzero(keys == key)[0])
        finite = np.flatnonzero(np.isfinite(sweep_of(key)).all(1))
        num = len(finite)
        places = [
            i * num // NUM_POINTS if num >= NUM_POINTS else i % num
            for i in range(NUM_POINTS)
        ]
        assert (indices[row] == finite[places]).all(), key
        # The views of a row see the same points.
        assert (indices[row] == indices[row, :1]).all()


def test_a_row_without_points_has_no_index(bank, folder):
    keys = bank.keys()
    (row,) = np.flatnonzero(keys == "cut")
    level = "plain/lidar/native"
    assert not bank.validity(f"{level}/points")[row]
    index = bank.whole_array(f"{level}/points_index")[row]
    assert (index == NO_POINT).all()
    block, offset = divmod(int(row), BLOCK_ROWS)
    assert np.isnan(bank.read(f"{level}/points", block)[offset]).all()
    assert np.isnan(bank.read(f"{level}/points_index", block)[offset]).all()


def test_others_open_it_and_every_byte_is_sound(bank, folder):
    level = "plain/lidar/native"
    url = str(folder / "bank/features.zarr")
    opened = xr.open_zarr(url, group=level, consolidated=False, mask_and_scale=False)
    assert opened["points"].dims == ("sample", "view", "points_point", "points_channel")
    assert opened["points_index"].dims == ("sample", "view", "points_index_point")
    array = zarr.open_group(url, mode="r")[f"{level}/points_index"]
    assert array.attrs["encoding"] == "index"
    np.testing.assert_array_equal(
        opened["points_index"].values, bank.whole_array(f"{level}/points_index")
    )
    assert verify(*open_record(str(folder / "bank")), full=True).is_sound


def test_statistics_are_of_points_and_there_are_none_of_numbers(bank):
    found = bank.statistics("plain/lidar/native/points")
    values = np.concatenate(
        [bank.read("plain/lidar/native/points", block) for block in range(2)]
    )
    rows = values[np.isfinite(values[:, 0, 0])].reshape(-1, CHANNELS)
    assert len(rows) == len(COUNTS) * NUM_POINTS
    assert found["count"] == len(rows)
    np.testing.assert_allclose(found["mean"], rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(found["variance"], rows.var(0), rtol=1e-2)
    names = zarr.open_group(f"{bank.url}/features.zarr", mode="r")
    assert not [name for name in names["plain/lidar/native/stats"] if "index" in name]


def test_it_goes_on_where_it_was_stopped(folder, tmp_path):
    job = load_job(str(folder / "job.yaml"), [f"bank={tmp_path / 'bank'}"])
    assert precompute(job, quiet=True).is_whole
    assert bank_identity(tmp_path / "bank") == bank_identity(folder / "bank")
    for path in sorted((tmp_path / "bank").glob("commits/plain.lidar/*.json"))[1:]:
        for name in json.loads(path.read_text())["content"]["objects"]:
            (tmp_path / "bank" / name).unlink()
        path.unlink()
    assert precompute(job, quiet=True).is_whole
    assert bank_identity(tmp_path / "bank") == bank_identity(folder / "bank")
