"""A finished bank opened without TeachOnce: zarr, xarray, tensorstore, pyarrow, NumPy.

The lines between the markers are those a user writes; what they give is compared with
what our own reader gives, with the views drawn anew, and with NumPy over all rows.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorstore
import xarray as xr
import zarr

from manifests.loading import load_job
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.record import view_policy_of
from pipeline.precompute import precompute
from pipeline.samples.views import draw_view
from tests.conftest import (
    POINTS_INPUT,
    POINTS_TEACHER,
    jpeg,
    sample_members,
    sweep,
    write_job,
    write_tar,
)

NUM_VIEWS = 3
BLOCK_ROWS = 8
NET = {"model": "module:./nets.py:Net", "weights": "random:1", "batch": 4}
OUTPUTS = {
    "net/image/16x16/logits": "topk",
    "net/image/16x16/patch": "lossless",
    "net/image/16x16/layer1": "half",
    "net/image/24x32/logits": "topk",
    "net/image/24x32/patch": "lossless",
    "net/image/24x32/layer1": "half",
    "brain/image/16x16/patch": "lossless",
    "brain/image/16x16/logits": "raw",
    "points/lidar/native/pooled": "raw",
    "points/lidar/native/logits": "lossless",
}
GRID = ("sample", "view", "patch_y", "patch_x", "patch_channel")


def make_bank(folder: Path) -> Path:
    """Two shards of 11 and 5 samples, of which some lack or break something."""
    for number, size in ((0, 11), (1, 5)):
        members = []
        for row in range(size):
            members += sample_members(f"s{number}-{row}", 100 * number + row, True)
        broken = {
            "s0-3.cls": b"seven",
            "s0-4.cls": None,
            "s0-5.jpg": jpeg(5)[:100],
            "s1-2.bin": sweep(2)[:-3],
        }
        kept = [(name, broken.get(name, data)) for name, data in members]
        sound = [(name, data) for name, data in kept if data is not None]
        write_tar(folder / "data" / f"train-{number}.tar", sound)
    teachers = {
        "net": {
            **NET,
            "on": ["image"],
            "sizes": [[16, 16], [24, 32]],
            "outputs": {
                "logits": {"topk": 3, "temperatures": [1.0, 2.0]},
                "patch": {"from": "body"},
                "layer1": {"from": "stem", "encoding": "half"},
            },
        },
        "brain": {
            **NET,
            "on": ["image"],
            "sizes": [[16, 16]],
            "precision": "bfloat16",
            "outputs": {"patch": {"from": "body"}, "logits": {"encoding": "raw"}},
        },
        "points": {
            **POINTS_TEACHER,
            "outputs": {
                "pooled": {"from": "output[pooled]", "encoding": "raw"},
                "logits": {"from": "output[logits]"},
            },
        },
    }
    job = write_job(
        folder,
        dataset={"shards": "./data/*.tar", "license": "cc0-1.0"},
        inputs={"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT},
        labels={
            "class": {"member": "cls", "num_classes": 5},
            "number": {"member": "cls"},
        },
        views={"random": NUM_VIEWS - 1, "seed": 9, "flip": True, "yaw_deg": 20},
        teachers=teachers,
        block_rows=BLOCK_ROWS,
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder / "bank"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_bank(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture(scope="module")
def bank(folder) -> Bank:
    return open_bank(str(folder))


def ours(bank: Bank, path: str, suffix: str | None = None) -> np.ndarray:
    """What our own reader gives of all rows and views: (rows, views, ...)."""
    from pipeline.bank.blocks import read_block

    def one(block: int, view: int) -> np.ndarray:
        if suffix is None:
            return bank.read(path, block, view)
        return read_block(bank.array(path, suffix), block, view)

    views = [
        np.concatenate([one(block, view) for block in range(bank.record.num_blocks)])
        for view in range(NUM_VIEWS)
    ]
    return np.stack(views, axis=1)


def test_every_output_is_there_as_the_job_says(bank):
    assert set(bank.outputs) == set(OUTPUTS)
    assert {path: bank.output(path).encoding["encoding"] for path in OUTPUTS} == OUTPUTS


def test_zarr(folder, bank):
    root = zarr.open_group(f"{folder}/features.zarr", mode="r")
    patch = root["net/image/24x32/patch"]
    valid = root["net/image/24x32/valid"][:]
    keys = root["key"][:]

    assert patch.metadata.dimension_names == GRID
    assert patch.dtype == np.float32
    np.testing.assert_array_equal(patch[:], ours(bank, "net/image/24x32/patch"))
    half = root["net/image/16x16/layer1"]
    assert half.dtype == np.float16
    np.testing.assert_array_equal(
        half[:].astype(np.float32), ours(bank, "net/image/16x16/layer1")
    )
    assert keys[:11].tolist() == [f"s0-{row}" for row in range(11)]
    assert keys[11:16].tolist() == [""] * 5
    assert keys[16:21].tolist() == [f"s1-{row}" for row in range(5)]
    assert np.flatnonzero(valid).tolist() == [*range(5), *range(6, 11), *range(16, 21)]
    assert root["points/lidar/native/valid"][16:21].tolist() == [1, 1, 0, 1, 1]
    # One block on its own: one object of the store.
    np.testing.assert_array_equal(
        patch[16:24, 1], bank.read("net/image/24x32/patch", 2, 1)
    )


@pytest.mark.parametrize("path", OUTPUTS)
def test_every_array_reads_the_same_with_zarr_xarray_and_tensorstore(
    folder, bank, path
):
    group, _, name = path.rpartition("/")
    opened = xr.open_zarr(
        f"{folder}/features.zarr", group=group, consolidated=False, mask_and_scale=False
    )
    suffixes = ("_index", "_value", "_rest") if OUTPUTS[path] == "topk" else ("",)
    for suffix in suffixes:
        expected = ours(bank, path, suffix)
        spec = {
            "driver": "zarr3",
            "kvstore": {
                "driver": "file",
                "path": f"{folder}/features.zarr/{path}{suffix}",
            },
        }
        store = tensorstore.open(spec, open=True, read=True).result()
        np.testing.assert_array_equal(store.read().result(), expected)
        assert store.domain.labels == opened[f"{name}{suffix}"].dims
        np.testing.assert_array_equal(opened[f"{name}{suffix}"].values, expected)
        array = zarr.open_array(f"{folder}/features.zarr/{path}{suffix}", mode="r")
        np.testing.assert_array_equal(array[:], expected)


def test_xarray_tree(folder, bank):
    tree = xr.open_datatree(
        f"{folder}/features.zarr", engine="zarr", consolidated=False
    )
    level = tree["net/image/24x32"]
    features = level["patch"].where(level["valid"])

    assert features.dims == GRID
    expected = ours(bank, "net/image/24x32/patch")
    np.testing.assert_array_equal(features.values, expected)
    assert tree["net/image/24x32/patch"].sizes["sample"] == tree["key"].sizes["sample"]
    assert tree["net/image/24x32/stats/patch_covariance"].dims == (
        "patch_channel",
        "patch_channel_2",
    )
    assert set(tree["views"].data_vars) == {
        *("flip", "image_box", "image_size", "yaw", "scale"),
    }
    assert {name.split("/")[1] for name in tree.groups if name != "/"} == {
        *("net", "brain", "points", "views", "labels"),
    }


def test_xarray_one_group(folder, bank):
    level = xr.open_zarr(
        f"{folder}/features.zarr", group="points/lidar/native", consolidated=False
    )
    pooled = level["pooled"].isel(view=0).values

    np.testing.assert_array_equal(
        pooled, ours(bank, "points/lidar/native/pooled")[:, 0]
    )
    assert level["pooled"].dims == ("sample", "view", "pooled_channel")


@pytest.mark.parametrize("name", ["patch", "logits"])
def test_bfloat16_in_two_lines_of_numpy(folder, bank, name):
    array = zarr.open_array(
        f"{folder}/features.zarr/brain/image/16x16/{name}", mode="r"
    )
    bits = array[:].astype(np.uint32) << 16
    features = bits.view(np.float32)

    assert array.dtype == np.uint16
    assert array.attrs["logical_dtype"] == "bfloat16"
    assert "upper 16 bits" in array.attrs["decode"]
    np.testing.assert_array_equal(features, ours(bank, f"brain/image/16x16/{name}"))
    assert np.isnan(features[11:16]).all()
    assert np.isfinite(features[:5]).all()


def test_topk_from_its_attributes(folder, bank):
    group = zarr.open_group(f"{folder}/features.zarr/net/image/16x16", mode="r")
    index, value, rest = (
        group[f"logits_{what}"] for what in ("index", "value", "rest")
    )
    assert rest.attrs["temperatures"] == [1.0, 2.0]
    full = ours(bank, "net/image/16x16/logits")
    rows = group["valid"][:]
    found = np.full((len(rows), NUM_VIEWS, 5), np.nan, np.float32)
    np.put_along_axis(found[rows], index[:][rows].astype(np.int64), 0, axis=-1)
    picked = np.take_along_axis(full[rows], index[:][rows].astype(np.int64), axis=-1)
    np.testing.assert_array_equal(picked, value[:][rows])
    # Against the same network's exact logits, which `brain` keeps in bfloat16.
    exact = ours(bank, "brain/image/16x16/logits")[rows]
    best = np.argsort(-exact, axis=-1)[..., :1]
    assert (best == index[:][rows][..., :1]).mean() > 0.9
    assert (index[:][~rows] == np.iinfo(index.dtype).max).all()


def test_keys_validity_labels_and_index_agree(folder, bank):
    root = zarr.open_group(f"{folder}/features.zarr", mode="r")
    index = pq.read_table(folder / "index").to_pydict()
    rows = np.asarray(index["row"])
    assert root["key"][:][rows].tolist() == index["key"]
    assert (np.delete(root["key"][:], rows) == "").all()
    np.testing.assert_array_equal(rows // BLOCK_ROWS, index["block"])
    np.testing.assert_array_equal(rows % BLOCK_ROWS, index["offset"])
    assert index["shard"] == ["train-0.tar"] * 11 + ["train-1.tar"] * 5
    for level, name in {
        "net/image/16x16": "net.image",
        "net/image/24x32": "net.image",
        "brain/image/16x16": "brain.image",
        "points/lidar/native": "points.lidar",
    }.items():
        valid = root[f"{level}/valid"][:]
        assert valid[rows].tolist() == index[f"valid.{name}"]
        assert not np.delete(valid, rows).any()
    reasons = dict(zip(index["key"], index["reason.net.image"], strict=True))
    assert [key for key, reason in reasons.items() if reason] == ["s0-5"]
    reasons = dict(zip(index["key"], index["reason.points.lidar"], strict=True))
    assert [key for key, reason in reasons.items() if reason] == ["s1-2"]
    classes = root["labels/class"][:]
    expected = [None if value == -1 else value for value in classes[rows].tolist()]
    assert index["label.class"] == expected
    assert list(bank.rows()) == pq.read_table(folder / "index").to_pylist()


def test_a_label_that_is_broken_or_missing_leaves_its_row_valid(folder):
    root = zarr.open_group(f"{folder}/features.zarr", mode="r")
    classes, numbers = root["labels/class"][:], root["labels/number"][:]
    assert classes[:11].tolist() == [0, 1, 2, -1, -1, 0, 1, 2, 3, 4, 0]
    assert (classes[11:16] == -1).all()
    assert np.isnan(numbers[[3, 4, 12]]).all()
    np.testing.assert_array_equal(numbers[:3], [0, 1, 2])
    assert root["net/image/16x16/valid"][:][[3, 4]].all()


def test_views_are_those_that_are_drawn(folder, bank):
    root = zarr.open_group(f"{folder}/features.zarr/views", mode="r")
    policy = view_policy_of(bank.record)
    assert policy.view0 == {"image": "full"}
    for row in bank.rows():
        number = row["row"]
        size = root["image_size"][number].tolist()
        is_broken = row["key"] == "s0-5"
        assert size == ([0, 0] if is_broken else [24, 24])
        sizes = {} if is_broken else {"image": (24, 24)}
        for view in range(NUM_VIEWS):
            drawn = draw_view(policy, row["shard"], row["key"], view, sizes)
            assert root["flip"][number, view] == drawn.flip
            assert root["yaw"][number, view] == drawn.yaw
            assert root["scale"][number, view] == drawn.scale
            box = root["image_box"][number, view]
            if is_broken:
                assert np.isnan(box).all()
            else:
                np.testing.assert_array_equal(box, drawn.boxes["image"])
    np.testing.assert_array_equal(root["image_box"][0, 0], [0, 0, 24, 24])
    assert abs(root["yaw"][:11, 1:]).max() <= math.radians(20)
    assert root["flip"][:11, 1:].any()
    assert np.isnan(root["image_box"][11:16]).all()


@pytest.mark.parametrize("path", [p for p, how in OUTPUTS.items() if how != "topk"])
def test_statistics_are_those_of_all_valid_rows(folder, bank, path):
    group, _, name = path.rpartition("/")
    level = zarr.open_group(f"{folder}/features.zarr/{group}", mode="r")
    stats = level["stats"]
    rows = ours(bank, path)[:, 0][level["valid"][:]].astype(np.float64)
    vectors = rows.reshape(-1, rows.shape[-1])
    cells = rows[0].size // rows.shape[-1]
    if cells > 64:
        # Of larger grids 64 cells a row are looked at, which ones hangs on the row.
        assert stats[f"{name}_count"][()] == len(rows) * 64
        spread = 6 * vectors.std(0) / 8
        assert (abs(stats[f"{name}_mean"][:] - vectors.mean(0)) < spread).all()
        return
    assert stats[f"{name}_count"][()] == len(vectors)
    close = {"rtol": 1e-9, "atol": 1e-12}
    np.testing.assert_allclose(stats[f"{name}_mean"][:], vectors.mean(0), **close)
    np.testing.assert_allclose(stats[f"{name}_variance"][:], vectors.var(0), **close)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    units = vectors / np.where(lengths > 0, lengths, 1)
    direction = units.sum(0) / np.linalg.norm(units.sum(0))
    np.testing.assert_allclose(stats[f"{name}_mean_direction"][:], direction, **close)
    angles = np.arccos(np.clip(units[lengths[:, 0] > 0] @ direction, -1, 1))
    np.testing.assert_allclose(
        stats[f"{name}_dispersion"][()], np.mean(angles**2), rtol=1e-6
    )
    if name == "logits":
        assert f"{name}_covariance" not in stats
    else:
        np.testing.assert_allclose(
            stats[f"{name}_covariance"][:],
            np.cov(vectors, rowvar=False, bias=True),
            rtol=1e-7,
            atol=1e-12,
        )


def test_attributes_say_what_made_it(folder):
    root = zarr.open_group(f"{folder}/features.zarr", mode="r")
    assert root.attrs["teachonce"]["block_rows"] == BLOCK_ROWS
    assert root["net"].attrs["model"].endswith("nets.py:Net")
    assert root["net/image"].attrs["inputs"] == ["image"]
    preprocess = root["net/image/24x32"].attrs["preprocess"]["image"]
    assert (preprocess["height"], preprocess["width"]) == (24, 32)
    assert root["views/image_box"].attrs["edges"] == ["x0", "y0", "x1", "y1"]
    assert json.loads((folder / "bank.json").read_text())["state"]["complete"] is True
    assert not list(folder.rglob(".zmetadata"))


def test_the_lines_of_the_card_run(folder, bank):
    card = (folder / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code, names)
    assert names["tree"]["net/image/16x16/patch"].dims == GRID
    assert "16 samples of 2 shards, 3 view(s), blocks of 8 rows. Complete." in card
