"""Training from a bank's own copies of images, with no shards at all."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from manifests.errors import BankError, ManifestError, TeachOnceError
from manifests.loading import load_job
from manifests.recipe import MapLabel
from manifests.recipe_loading import load_probe, load_recipe
from pipeline.bank.export import export
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from student_train import BankDataset, Reading
from student_train.dataset import bank_loader
from student_train.errors import TrainingError
from student_train.probes.protocol import ProbeRun
from student_train.trainer import Trainer
from tests.storing import BROKEN, MAKERS, resized, store_job, upright
from tests.training import LOGITS, PATCH, recipe_for, trainer_for

SIZE = (16, 24)
READING = Reading(inputs={"image": SIZE}, targets={"patch": "net/patch"}, stored=True)


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A bank whose shards are gone; not to be written to."""
    folder = tmp_path_factory.mktemp("stored")
    precompute(load_job(str(store_job(folder))), quiet=True)
    shutil.rmtree(folder / "data")
    return folder / "bank"


def batches(bank, reading=READING, **options):
    given = {"batch": 10, "view": 0, "shuffle": False, "keep_rest": True, **options}
    return list(BankDataset(str(bank), reading, **given))


@pytest.mark.parametrize("view", [0, 1, 2])
def test_a_view_is_that_of_the_resized_image(bank, view):
    opened = open_bank(str(bank))
    boxes = opened.whole_array("views/image_box")[:, view]
    flips = opened.whole_array("views/flip")[:, view]
    seen = 0
    for batch in batches(bank, view=view):
        for row, key, pixels in zip(
            batch.rows, batch.keys, batch.inputs["image"].numpy(), strict=True
        ):
            original, copy = upright(key), resized(key)
            across, down = (
                small / full
                for small, full in zip(copy.size, original.size, strict=True)
            )
            box = boxes[row] * [across, down, across, down]
            box = np.minimum(box, [*copy.size, *copy.size])
            expected = copy.resize(SIZE[::-1], Image.Resampling.BICUBIC, box=tuple(box))
            wanted = np.asarray(expected, np.float64)
            wanted = wanted[:, ::-1] if flips[row] else wanted
            error = np.abs(pixels.astype(np.float64) - wanted)
            # What is left is the JPEG's loss.
            assert error.mean() < 3, key
            shifted = np.abs(np.roll(wanted, 2, axis=1) - wanted)
            assert error.mean() < shifted.mean() / 2, key
            seen += 1
    assert seen == len(MAKERS) - 1


def test_targets_belong_to_the_images_beside_them(bank):
    found = [(b.keys, b.targets["patch"].values()) for b in batches(bank)]
    opened = open_bank(str(bank))
    rows = {key: row for row, key in enumerate(opened.keys().tolist())}
    for keys, values in found:
        for key, value in zip(keys, values, strict=True):
            block, offset = divmod(rows[key], opened.record.block_rows)
            assert BROKEN not in keys
            stored = opened.read("net/image/16x16/patch", block)[offset]
            mean, std = (
                opened.statistics("net/image/16x16/patch")[name]
                for name in ("mean", "variance")
            )
            expected = (stored - mean) / np.sqrt(std)
            assert np.allclose(value.numpy(), expected, atol=2e-3)


def test_training_without_shards_runs_and_resumes(bank, tmp_path):
    fields = {"data": "bank", "targets": {"patch": PATCH, "logits": LOGITS}}
    stages = [{"steps": 6, "batch": 4, "lr": 1.0e-3, "size": [[16, 16]]}]
    fields["stages"] = stages
    whole = trainer_for(bank, tmp_path / "whole", **fields)
    assert whole.run().is_done
    assert (
        not trainer_for(bank, tmp_path / "broken", **fields)
        .run(should_stop=lambda: True)
        .is_done
    )
    again = trainer_for(bank, tmp_path / "broken", **fields)
    assert again.run().is_done
    theirs = again.modules.state_dict()
    for name, value in whole.modules.state_dict().items():
        assert torch.equal(value, theirs[name]), name


def test_rows_without_a_copy_are_left_out(tmp_path):
    tight = {"image": {"short_side": 40, "quality": 95, "max_bytes": 1100}}
    precompute(load_job(str(store_job(tmp_path, stored_inputs=tight))), quiet=True)
    opened = open_bank(str(tmp_path / "bank"))
    rows = list(opened.rows())
    held = {row["key"] for row in rows if row["valid.stored_inputs.image"]}
    computed = {row["key"] for row in rows if row["valid.net.image"]}
    assert held < computed
    assert {key for b in batches(tmp_path / "bank") for key in b.keys} == held


def test_workers_give_the_same_batches(bank):
    def taken(workers):
        dataset = BankDataset(
            str(bank), READING, batch=4, window_blocks=2, view="epoch"
        )
        loader = bank_loader(dataset, workers)
        found = [next(loader).inputs["image"].numpy().copy() for _ in range(3)]
        loader.close()
        return found

    for mine, theirs in zip(taken(0), taken(2), strict=True):
        assert np.array_equal(mine, theirs)


def test_probes_read_the_copies(bank, tmp_path):
    assert trainer_for(bank, tmp_path / "run", data="bank").run().is_done
    splits = {"fit": {"share": [0, 0.6]}, "choose": {"share": [0.6, 0.8]}}
    document = {
        "banks": {"main": str(bank)},
        "data": "bank",
        "students": {"mine": str(tmp_path / "run")},
        "random": False,
        "splits": {**splits, "test": {"share": [0.8, 1]}},
        "probes": {"class": {"label": "main/labels/class", "kinds": ["knn"]}},
        "engine": {"device": "cpu"},
    }
    path = tmp_path / "probe.yaml"
    path.write_text(yaml.safe_dump(document))
    run = ProbeRun(load_probe(str(path)))
    rows = next(iter(run.questions[0].lines)).source.usable
    assert rows.sum() == len(MAKERS) - 1
    assert run.run().probes


def test_a_bank_without_copies_says_what_to_do(bank, tmp_path):
    part = export(str(bank), str(tmp_path / "part")).bank
    with pytest.raises(BankError, match=r"copies of input 'image', it has none; add"):
        trainer_for(part, tmp_path / "run", data="bank")


def test_shards_that_are_gone_lead_to_the_copies(bank, tmp_path):
    with pytest.raises(TeachOnceError, match=r"with `data: \{inputs: bank\}` no shar"):
        trainer_for(bank, tmp_path / "run")
    part = export(str(bank), str(tmp_path / "part")).bank
    with pytest.raises(TeachOnceError) as error:
        trainer_for(part, tmp_path / "run")
    assert "inputs: bank" not in str(error.value)


def test_what_lies_in_shards_alone_is_refused(bank, tmp_path):
    label = {"seg": {"member": "seg.png", "input": "image", "num_classes": 3}}
    with pytest.raises(ManifestError, match=r"label seg lies in the shards alone"):
        recipe_for(bank, tmp_path / "run", data={"inputs": "bank", "labels": label})
    with pytest.raises(ManifestError, match=r"give `shards`, or `inputs: bank`"):
        recipe_for(bank, tmp_path / "run", data={"inputs": "bank", "shards": "x.tar"})
    maps = {"seg": MapLabel(**label["seg"])}
    reading = Reading(inputs={"image": SIZE}, maps=maps, stored=True)
    with pytest.raises(TrainingError, match=r"label seg lies in the shards alone"):
        BankDataset(str(bank), reading, batch=2)


def test_copies_are_no_targets(bank, tmp_path):
    target = {**PATCH, "from": "main/stored_inputs/jpeg"}
    with pytest.raises(TrainingError, match=r"teacher must be one of the bank's"):
        trainer_for(bank, tmp_path / "run", data="bank", targets={"patch": target})


def test_a_damaged_copy_ends_training_by_name(bank, tmp_path):
    shutil.copytree(bank, tmp_path / "bank")
    path = tmp_path / "bank/features.zarr/stored_inputs/image/native/jpeg/c.0.0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    trainer = trainer_for(tmp_path / "bank", tmp_path / "run", data="bank")
    with pytest.raises(BankError, match=r"stored_inputs/image/native/jpeg, block 0"):
        trainer.run()


def test_a_run_of_shards_is_another_than_one_of_copies(bank, tmp_path):
    trainer_for(bank, tmp_path / "run", data="bank").run()
    folder = bank.parent
    store_job(folder)
    with pytest.raises(TrainingError, match=r"data.inputs"):
        trainer_for(bank, tmp_path / "run").run()
    shutil.rmtree(folder / "data")


def test_a_run_that_was_begun_before_the_field_goes_on(tmp_path):
    folder = tmp_path / "made"
    precompute(load_job(str(store_job(folder))), quiet=True)
    trainer_for(folder / "bank", tmp_path / "run").run()
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    del record["recipe"]["data"]["inputs"]
    path.write_text(json.dumps(record))
    assert Trainer(load_recipe(str(tmp_path / "run.yaml"))).run().is_done
