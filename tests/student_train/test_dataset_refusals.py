"""What BankDataset refuses: one clear line, at once or at the batch concerned."""

from __future__ import annotations

import itertools
from pathlib import Path

import fsspec
import numpy as np
import pytest

from manifests.errors import BankError, StorageError
from manifests.loading import load_job
from manifests.recipe import MapLabel, RowsConfig
from pipeline.bank.open import Bank
from pipeline.precompute import precompute
from pipeline.samples.errors import ShardError
from student_train import BankDataset, Reading
from student_train.dataset import bank_loader
from student_train.errors import TrainingError
from tests.conftest import write_job, write_shards, write_tar
from tests.student_train.conftest import (
    LEAN,
    SEG,
    Joined,
    epoch_of,
    members_of,
)

pytestmark = pytest.mark.usefixtures("no_thread_stays")


def refused(error, message, bank, reading=LEAN, **options):
    with pytest.raises(error, match=message):
        BankDataset(bank, reading, **({"batch": 4} | options))


def test_readings_that_the_bank_cannot_give(bank):
    def target(source):
        return Reading(inputs={"image": (8, 8)}, targets={"t": source})

    refused(
        TrainingError,
        r"targets\.t: teacher must be one of the bank's \(brain, net, points\), got 'n",
        bank,
        target("nte/patch"),
    )
    refused(
        TrainingError,
        r"targets\.t: the bank must have the output, got 'net/cls'; of net it has net/",
        bank,
        target("net/cls"),
    )
    refused(
        TrainingError,
        r"'brain/patch' must name one output, it could be any of brain/image/16x16/pat"
        r"ch, brain/image/8x16/patch; write it whole",
        bank,
        target("brain/patch"),
    )
    refused(
        TrainingError,
        r"label must be one of the bank's \(class, number\), got colour; labels that",
        bank,
        Reading(labels=["colour"]),
    )
    refused(
        TrainingError,
        r"input must be one of the bank's \(image, lidar\), got img",
        bank,
        Reading(inputs={"img": (8, 8)}),
    )
    refused(
        TrainingError,
        "input must be an image, got lidar, which is points",
        bank,
        Reading(inputs={"lidar": (8, 8)}),
    )
    refused(
        TrainingError,
        "camera must be among the inputs that are read, got image of none; read its im",
        bank,
        Reading(labels=["class"], cameras=["image"]),
    )
    inputs = dict(bank.record.inputs)
    config = {**inputs["image"].config, "calibration": None}
    inputs["image"] = inputs["image"].model_copy(update={"config": config})
    plain = Bank(bank._store, bank.record.model_copy(update={"inputs": inputs}))
    refused(
        TrainingError,
        "input image must have calibration in the bank to be used with a bev head, got",
        plain,
        Reading(inputs={"image": (8, 8)}, cameras=["image"]),
    )
    refused(
        BankError,
        "no array 'net/image/16x16/stats/logits_mean'",
        bank,
        Reading(targets={"t": "net/logits"}, normalise=frozenset({"t"})),
    )


def test_views_that_are_not_there(bank):
    refused(TrainingError, "view must be below the bank's 4 views, got 4", bank, view=4)
    passes = [
        entry.model_copy(update={"last_view": 1}) if entry.teacher == "net" else entry
        for entry in bank.record.passes
    ]
    record = bank.record.model_copy(update={"passes": passes})
    short = Bank(bank._store, record)
    message = (
        r"targets\.patch: net/image/16x16/patch must have the views that are shown, it "
        r"lacks \[2, 3\]; add them to the bank, or set loader.view"
    )
    refused(TrainingError, message, short)
    BankDataset(short, LEAN, batch=4, view=1)


def test_batches_and_windows_that_cannot_be(bank):
    refused(
        TrainingError,
        "batch must be at most the usable rows, got 25 of 24",
        bank,
        batch=25,
    )
    refused(
        TrainingError,
        "rows must have at least one that is valid",
        bank,
        rows=np.zeros(bank.record.num_rows, np.bool_),
    )
    message = r"must be a multiple of ranks x workers, got 3 for 2 x 1"
    dataset = BankDataset(bank, LEAN, batch=6, window_blocks=3, world_size=2)
    with pytest.raises(TrainingError, match=message):
        next(dataset.batches(0))
    dataset = BankDataset(bank, LEAN, batch=6, window_blocks=3)
    with pytest.raises(TrainingError, match="got 3 for 1 x 2") as caught:
        next(bank_loader(dataset, 2))
    assert "\n" not in str(caught.value)


def test_shards_that_are_not_there(bank, joined, tmp_path):
    missing = joined.copy(tmp_path / "missing")
    missing.shards[1].unlink()
    shards = [f"{missing.folder}/data/*.tar"]
    refused(
        BankError,
        r"data.shards must have a copy of the bank's train-1.tar, got none among 2 sh",
        bank,
        shards=shards,
    )
    refused(
        StorageError,
        r"data.shards: cannot read .*train-1.tar: nothing is there",
        bank,
        shards=[f"{missing.folder}/data/train-{{0..2}}.tar"],
    )
    # Rows of the others can be had.
    rows = RowsConfig(shards=["train-0*", "train-2*"])
    assert BankDataset(bank, LEAN, batch=4, shards=shards, rows=rows).num_rows == 16


def test_a_shard_of_another_size(bank, joined, tmp_path):
    other = joined.copy(tmp_path / "other")
    with open(other.shards[2], "ab") as file:
        file.write(b"\0" * 1024)
    refused(
        BankError,
        r"data.shards: .*train-2.tar must be the bank's train-2.tar of \d+ bytes, got "
        r"\d+; give the shards that the bank was made from",
        bank,
        shards=[f"{other.folder}/data/*.tar"],
    )


def fails(error, message, dataset, workers=0):
    """The loop ends with one clear line; returns the batches before it."""
    found = []
    batches = itertools.islice(bank_loader(dataset, workers), 100)
    with pytest.raises(error, match=message) as caught:
        found.extend(batches)
    assert "\n" not in str(caught.value)
    return found


def rewritten(joined: Joined, folder: Path, number: int, change) -> list[str]:
    """Shards of which one has other members, in as many bytes."""
    other = joined.copy(folder)
    keys = [key for key in joined.samples if key.startswith(f"s{number}-")]
    members = []
    for key in keys:
        seed = list(joined.samples).index(key)
        members += members_of(key, joined.samples[key], seed)
    path = other.shards[number]
    size = path.stat().st_size
    write_tar(path, change(members))
    assert path.stat().st_size == size
    return [f"{other.folder}/data/*.tar"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_with_other_members(bank, joined, tmp_path, workers):
    def rename(members):
        return [(name.replace("s1-0005", "s1-9995"), data) for name, data in members]

    shards = rewritten(joined, tmp_path / "other", 1, rename)
    dataset = BankDataset(bank, LEAN, batch=4, window_blocks=2, shards=shards)
    message = "train-1.tar must be the bank's train-1.tar, but its members differ; give"
    fails(ShardError, message, dataset, workers)


def test_a_remote_shard_with_other_members(bank, joined, remote, tmp_path):
    """Where headers are not compared, keys are."""

    def swap(members):
        names = {"s1-0005": "s1-0006", "s1-0006": "s1-0005"}
        return [(names.get(n[:7], n[:7]) + n[7:], data) for n, data in members]

    shards = rewritten(joined, tmp_path / "other", 1, swap)
    for path in sorted((tmp_path / "other" / "data").glob("*.tar")):
        remote.pipe_file(f"/copy/{path.name}", path.read_bytes())
    dataset = BankDataset(bank, LEAN, batch=4, shards=["memory://copy/*.tar"])
    message = (
        r"key must be the bank's 's1-000[56]', got 's1-000[56]' \(row 1[78], .*train-1"
        r".tar\); give the shards that the bank was made from"
    )
    fails(TrainingError, message, dataset)
    assert shards


def test_two_shards_in_each_others_place(tmp_path):
    """Equal sizes, equal headers but for the keys: each sample's key is compared."""
    write_shards(tmp_path, [8, 8])
    job = write_job(tmp_path)
    precompute(load_job(str(job)), quiet=True)
    one, other = sorted((tmp_path / "data").glob("*.tar"))
    assert one.stat().st_size == other.stat().st_size
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/swapped/{one.name}", other.read_bytes())
    fs.pipe_file(f"/swapped/{other.name}", one.read_bytes())
    try:
        dataset = BankDataset(
            str(tmp_path / "bank"), LEAN, batch=4, shards=["memory://swapped/*.tar"]
        )
        message = r"key must be the bank's 's[01]-000\d', got 's[10]-000\d' \(row \d+, "
        fails(TrainingError, message, dataset)
    finally:
        fs.rm("/swapped", recursive=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_object_is_named(joined, tmp_path, workers):
    broken = joined.copy(tmp_path / "broken")
    path = broken.folder / "bank/features.zarr/net/image/16x16/patch/c.5.2.0.0.0"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    options = {"batch": 4, "window_blocks": 2, "view": 2, "shuffle": not workers}
    if workers:
        options["shuffle"] = True
    dataset = BankDataset(broken.open(), LEAN, **options)
    message = r"\(array net/image/16x16/patch, block 5, view 2\)"
    fails(BankError, message, dataset, workers)
    # Other views are sound.
    assert epoch_of(BankDataset(broken.open(), LEAN, batch=4, view=1))


@pytest.mark.parametrize("threads", [1, 8])
def test_a_missing_object_is_named(joined, tmp_path, threads):
    broken = joined.copy(tmp_path / "broken")
    path = broken.folder / "bank/features.zarr/net/image/16x16/patch/c.6.0.0.0.0"
    path.unlink()
    dataset = BankDataset(
        broken.open(), LEAN, batch=4, view=0, shuffle=False, threads=threads
    )
    message = (
        r"object must have the committed \d+ bytes, got no object; run precompute "
        r"--repair \(array net/image/16x16/patch, block 6, view 0\)"
    )
    found = fails(BankError, message, dataset)
    # What lies before it was given.
    assert len(found) == 5


def test_a_sample_that_cannot_be_read(bank, joined, tmp_path):
    def damage(members):
        return [
            (
                name,
                b"\xff\xd8" + bytes(len(data) - 2) if name == "s1-0004.jpg" else data,
            )
            for name, data in members
        ]

    shards = rewritten(joined, tmp_path / "other", 1, damage)
    dataset = BankDataset(bank, LEAN, batch=4, shards=shards, view=0)
    message = (
        r"sample must be readable, got undecodable: .* \(row 16, 's1-0004' of "
        r".*train-1.tar\); check data.shards and data.labels"
    )
    fails(TrainingError, message, dataset)


def test_labels_of_the_shards_that_are_wrong(bank):
    def reading(**fields):
        options = {"member": "seg.png", "input": "image", "num_classes": 4} | fields
        return Reading(inputs={"image": (8, 8)}, maps={"seg": MapLabel(**options)})

    fails(
        TrainingError,
        r"got label_out_of_range: label seg: class 3 of 3; put values that are no class"
        r" into `ignore` \(row \d+, ",
        BankDataset(bank, reading(num_classes=3), batch=4),
    )
    fails(
        TrainingError,
        r"sample must be readable, got missing: no member .sgg.png \(row",
        BankDataset(bank, reading(member="sgg.png"), batch=4),
    )
    sizes = Reading(maps={"seg": SEG})
    fails(
        TrainingError,
        r"maps of label seg must be of one size, got \[\(24, 30\), .*; read the input",
        BankDataset(bank, sizes, batch=16, view=0),
    )
