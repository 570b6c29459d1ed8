"""A bank in `compact` and `tiny`, from shards to a student, beside `lossless`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import torch
import xarray as xr
import zarr

from manifests.loading import load_job
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.record import open_record
from pipeline.bank.statistics import floored_std
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from student_train import BankDataset, Reading
from tests.conftest import bank_identity, jpeg, run_cli, write_job, write_tar
from tests.training import CLASS, LOGITS, NOISY, PATCH, plain_bank, trainer_for

SUFFIXES = ("", "_scale", "_mean", "_std")
PATH = "net/image/32x32"
# The picture of the last fills less than half a cell of the padded frame.
SIZES = [(20, 60), (60, 20), (30, 30), (21, 64), (24, 24), (2, 200)]
TEACHER = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "sizes": [[32, 32]],
    "batch": 4,
    "preprocess": {"fit": "pad"},
    "outputs": {
        "exact": {"from": "body"},
        "patch": {"from": "body", "encoding": "compact"},
        "layer1": {"from": "stem", "encoding": "compact", "pool": [2, 2]},
        "tiny": {"from": "body", "encoding": "tiny"},
    },
}


def make_bank(folder: Path, precision: str = "float32") -> Path:
    members = [(f"{i}.jpg", jpeg(i, *hw)) for i, hw in enumerate(SIZES)]
    members.insert(2, ("broken.jpg", b"no picture"))
    write_tar(folder / "data" / "train-00000.tar", members)
    job = write_job(
        folder,
        teachers={"net": {**TEACHER, "precision": precision}},
        labels={},
        inputs={"image": {"kind": "image", "member": "jpg", "view0": "full"}},
        views={"random": 1, "flip": True},
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder / "bank"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(tmp_path_factory.mktemp("compact"))


@pytest.fixture(scope="module")
def bank(folder: Path) -> Bank:
    return open_bank(str(folder))


def test_what_is_decoded_is_close_and_misses_the_same_cells(bank: Bank) -> None:
    std = floored_std(bank.statistics(f"{PATH}/exact")["variance"])
    for view in (0, 1):
        exact, found = (bank.read(f"{PATH}/{x}", 0, view) for x in ("exact", "patch"))
        np.testing.assert_array_equal(np.isnan(found), np.isnan(exact))
        cells = ~np.isnan(exact[..., 0])
        # Broken, without a cell, and the tail of the block; and some of every other.
        empty = ~cells.reshape(8, -1).any(axis=1)
        np.testing.assert_array_equal(np.flatnonzero(empty), [2, 6, 7])
        assert not cells[[0, 1, 4]].reshape(3, -1).all(axis=1).any()
        assert (abs(found - exact)[cells] / std).max() < 0.05
        stored = zarr.open_group(bank.url + f"/features.zarr/{PATH}", mode="r")
        kept = exact[cells].astype(np.float64)
        for row in np.flatnonzero(~empty):
            # Padding is in no mean: the cells that are kept alone.
            mean = stored["patch_mean"][row, view]
            np.testing.assert_allclose(mean, kept.mean(axis=0), atol=1e-6)
            std_here = stored["patch_std"][row, view]
            np.testing.assert_allclose(std_here, floored_std(kept.var(axis=0)), 1e-4)


def test_its_arrays_say_how_they_are_decoded(folder: Path) -> None:
    level = zarr.open_group(f"{folder}/features.zarr/{PATH}", mode="r")
    for suffix in SUFFIXES:
        attributes = level[f"patch{suffix}"].attrs
        assert attributes["encoding"] == "compact"
        assert "code * scale (per cell) * std + mean" in attributes["decode"]


@pytest.mark.parametrize("name", ["patch", "layer1", "tiny"])
def test_other_readers_see_the_same(folder: Path, bank: Bank, name: str) -> None:
    opened = xr.open_zarr(
        f"{folder}/features.zarr", group=PATH, consolidated=False, mask_and_scale=False
    )
    is_tiny = name == "tiny"
    dims = {
        "": ("y", "x", "byte" if is_tiny else "channel"),
        "_scale": ("y", "x", "group") if is_tiny else ("y", "x"),
        "_mean": ("channel",),
        "_std": ("channel",),
    }
    for suffix in SUFFIXES:
        path = f"{folder}/features.zarr/{PATH}/{name}{suffix}"
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": path}}
        expected = zarr.open_array(path, mode="r")[:]
        store = tensorstore.open(spec, open=True, read=True).result()
        np.testing.assert_array_equal(store.read().result(), expected)
        array = opened[f"{name}{suffix}"]
        np.testing.assert_array_equal(array.values, expected)
        own = tuple(f"{name}_{axis}" for axis in dims[suffix])
        assert array.dims == ("sample", "view", *own)
    if is_tiny:
        return
    values = opened[name] * opened[f"{name}_scale"].astype(np.float32)
    values = values * opened[f"{name}_std"] + opened[f"{name}_mean"]
    np.testing.assert_array_equal(
        values.transpose(*opened[name].dims).values[:, 1],
        bank.read(f"{PATH}/{name}", 0, 1),
    )


def test_statistics_are_close_to_the_exact_ones(bank: Bank) -> None:
    exact, found = (bank.statistics(f"{PATH}/{x}") for x in ("exact", "patch"))
    std = np.sqrt(exact["variance"])
    assert found["count"] == exact["count"] > 0
    assert (abs(found["mean"] - exact["mean"]) / std).max() < 1e-3
    np.testing.assert_allclose(found["variance"], exact["variance"], rtol=5e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_verifies_is_made_alike_twice_and_damage_is_found(
    tmp_path: Path, precision: str
) -> None:
    once, again = (make_bank(tmp_path / name, precision) for name in ("a", "b"))
    assert bank_identity(once) == bank_identity(again)
    store, record = open_record(str(once))
    assert verify(store, record, full=True).problems == []
    for suffix in SUFFIXES:
        (damaged,) = (once / "features.zarr" / PATH / f"patch{suffix}").glob("c.0.1*")
        data = damaged.read_bytes()
        damaged.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
        found = verify(store, record, full=True)
        assert [Path(path).parent.name for path in found.damaged_objects] == [
            f"patch{suffix}"
        ]
        damaged.unlink()
        assert len(verify(store, record).damaged_objects) == 1
        done = run_cli("precompute", tmp_path / "a" / "job.yaml", "--repair")
        assert done.returncode == 0, done.stderr
        assert bank_identity(once) == bank_identity(again)


@pytest.mark.parametrize(
    ("name", "codes"), [("patch", torch.int8), ("tiny", torch.uint8)]
)
def test_a_batch_holds_codes_and_decodes_them_as_the_bank_does(
    bank: Bank, name: str, codes: torch.dtype
) -> None:
    reading = Reading(targets={"patch": f"net/{name}"}, normalise=frozenset())
    (batch,) = BankDataset(bank, reading, batch=5, view=0)
    target = batch.targets["patch"]
    assert {suffix: one.dtype for suffix, one in target.arrays.items()} == {
        "": codes,
        "_scale": torch.float16,
        "_mean": torch.float32,
        "_std": torch.float32,
    }
    assert batch.rows.tolist() != sorted(batch.rows)
    decoded = target.source.encoding.decode(
        {suffix: one.numpy() for suffix, one in target.arrays.items()}
    )
    expected = bank.read(f"{PATH}/{name}", 0)[batch.rows]
    np.testing.assert_array_equal(decoded, expected)
    # On a grid of the picture's own, padding is gone.
    assert target.values().isfinite().all()


@pytest.mark.parametrize("preset", ["compact", "tiny"])
def test_a_vector_is_refused_before_anything_is_done(
    tmp_path: Path, preset: str
) -> None:
    write_tar(tmp_path / "data" / "train-00000.tar", [("a.jpg", jpeg(0))])
    outputs = {"logits": {"encoding": preset}}
    job = write_job(
        tmp_path, labels={}, teachers={"net": {**TEACHER, "outputs": outputs}}
    )
    done = run_cli("precompute", job)
    assert done.returncode == 2
    assert "vectors and logits keep 16 bits or more" in done.stderr
    assert not (tmp_path / "bank").exists()


def test_training_is_the_same_when_it_is_stopped(tmp_path: Path) -> None:
    outputs = {"logits": {}, "patch": {"from": "body", "encoding": "compact"}}
    net = {**TEACHER, "sizes": [[16, 16]], "preprocess": {}, "outputs": outputs}
    bank = plain_bank(tmp_path, teachers={"net": net})
    recipe = {
        "student": NOISY,
        "targets": {"patch": PATCH, "logits": LOGITS, "class": CLASS},
        "stages": [{"name": "only", "steps": 5, "batch": 6, "lr": 1.0e-3}],
    }
    losses: dict[str, list[float]] = {"whole": [], "stopped": []}
    whole = trainer_for(bank, tmp_path / "whole", **recipe)
    assert whole.run(lambda step: losses["whole"].append(step.loss)).is_done
    stopped = trainer_for(bank, tmp_path / "stopped", **recipe)
    for _ in range(3):
        stopped.run(lambda step: losses["stopped"].append(step.loss), lambda: True)
        stopped = trainer_for(bank, tmp_path / "stopped", **recipe)
    assert stopped.run(lambda step: losses["stopped"].append(step.loss)).is_done
    assert len(losses["whole"]) == 5
    assert losses["stopped"] == losses["whole"]
    for name in ("student/model.safetensors", "heads.safetensors"):
        data = [(tmp_path / run / name).read_bytes() for run in ("whole", "stopped")]
        assert data[0] == data[1]
