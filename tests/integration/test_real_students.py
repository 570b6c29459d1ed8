"""Students on real images and real sweeps (`shared_data`; skips where absent).

The worked recipes are run as they stand, with fewer steps and smaller models.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from manifests.job import Job
from manifests.loading import load_job
from manifests.recipe_loading import load_recipe
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
from student_train import BankDataset, Reading
from student_train.trainer import Trainer
from teachonce.cli import main
from tests.conftest import POINTS_TEACHER, ROOT, TEACHER_FILE, write_tar
from tests.integration.test_real_data import street_teacher

EXAMPLES = ROOT / "manifests" / "examples"
SMALL_VIT = (
    "student.model=timm:vit_tiny_patch16_224",
    "student.args={embed_dim: 48, depth: 2, num_heads: 3}",
)
ROTATED = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two cores are shared with other test processes."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)


def losses_of(trainer: Trainer) -> list[float]:
    """Trains to the end; returns the loss of every step."""
    found: list[float] = []
    outcome = trainer.run(lambda progress: found.append(progress.loss))
    assert outcome.is_done
    assert (outcome.folder / "student" / "model.safetensors").exists()
    assert all(math.isfinite(loss) for loss in found)
    return found


def members_of(shard: Path) -> dict[str, bytes]:
    """Every member of a tar, by the standard library."""
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar if m.isfile()}


def epoch_rows(bank: Bank, target: str, **reading) -> dict[int, str]:
    """Rows and keys of an epoch in batches; no row may come twice."""
    dataset = BankDataset(
        bank,
        Reading(targets={"target": target}, **reading),
        batch=16,
        window_blocks=4,
        view=0,
        threads=1,
        keep_rest=True,
    )
    found: dict[int, str] = {}
    for batch in dataset.batches(0):
        assert batch.targets["target"].valid.all()
        assert not batch.targets["target"].values().isnan().any()
        assert not set(batch.rows.tolist()) & set(found)
        found |= dict(zip(batch.rows.tolist(), batch.keys, strict=True))
    return found


# ImageNet.


def square_by_pillow(data: bytes, side: int) -> np.ndarray:
    """The largest centred square of the upright image, resized, by Pillow alone."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box))


def rotated_shard(folder: Path, source: bytes) -> Path:
    """A shard of one real picture that a camera held sideways took."""
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    sink = io.BytesIO()
    Image.open(io.BytesIO(source)).save(sink, "JPEG", exif=exif, quality=95)
    return write_tar(
        folder / "rotated.tar",
        [("sideways.jpg", sink.getvalue()), ("sideways.cls", b"0")],
    )


@pytest.fixture(scope="module")
def imagenet(shared_data, tmp_path_factory):
    """Bank of 300 photographs and a sideways one, in two random views; pictures."""
    folder = tmp_path_factory.mktemp("imagenet")
    shards = [
        shared_data / "imagenet-sample" / f"imagenet-sample-{number:05d}.tar"
        for number in range(3)
    ]
    pictures = {
        name.removesuffix(".jpg"): data
        for shard in shards
        for name, data in members_of(shard).items()
        if name.endswith(".jpg")
    }
    wide = next(
        data
        for data in pictures.values()
        if Image.open(io.BytesIO(data)).size == (500, 375)
    )
    shards.append(rotated_shard(folder, wide))
    pictures |= {
        name.removesuffix(".jpg"): data
        for name, data in members_of(shards[-1]).items()
        if name.endswith(".jpg")
    }
    job = load_job(
        str(EXAMPLES / "imagenet.yaml"),
        [f"bank={folder / 'bank'}", "views.random=2"],
    )
    tiny = {
        "model": "timm:vit_tiny_patch16_224",
        "weights": "random:1",
        "args": {"embed_dim": 48, "depth": 2, "num_heads": 3},
        "sizes": [[64, 64]],
        "outputs": {"cls": {}, "patch": {}},
    }
    fields = job.model_dump(by_alias=True) | {
        "dataset": {"shards": [str(shard) for shard in shards]},
        "teachers": {"dinov3": tiny},
        "block_rows": 32,
    }
    outcome = precompute(Job.model_validate(fields), quiet=True)
    state = outcome.record.state
    assert (state.rows, state.valid["dinov3.image"]) == (301, 301), state.invalid
    return folder / "bank", pictures


def test_imagenet_student_of_random_views(imagenet, tmp_path):
    bank, _ = imagenet
    recipe = load_recipe(
        str(EXAMPLES / "recipes" / "eupe.yaml"),
        [
            f"run={tmp_path / 'run'}",
            f"banks.in1k={bank}",
            *SMALL_VIT,
            "targets.cls.head.hidden=64",
            "targets.patch.head.hidden=64",
            "loader.workers=0",
            "stages.0.steps=12",
            "stages.0.batch=64",
            "stages.0.lr=3.0e-3",
            "stages.0.warmup_steps=1",
            "stages.0.size=64",
            "precision=float32",
        ],
    )
    trainer = Trainer(recipe)
    (dataset,) = trainer.datasets
    assert dataset.num_rows == 301
    shown = {dataset.view_at(block, epoch) for block in range(10) for epoch in (0, 1)}
    assert shown == {1, 2}
    losses = losses_of(trainer)
    print(f"\nlosses: {', '.join(f'{loss:.3f}' for loss in losses)}")
    assert np.mean(losses[-3:]) < 0.95 * np.mean(losses[:3])


def test_imagenet_rows_and_pixels_are_those_of_the_pictures(imagenet):
    bank, pictures = imagenet
    grey = [
        key
        for key, data in pictures.items()
        if Image.open(io.BytesIO(data)).mode == "L"
    ]
    assert len(grey) >= 6
    wanted = {*grey, "sideways", *list(pictures)[::25]}
    dataset = BankDataset(
        str(bank),
        Reading(inputs={"image": (64, 64)}, targets={"patch": "dinov3/patch"}),
        batch=32,
        view=0,
        threads=1,
        keep_rest=True,
    )
    keys: list[str] = []
    for batch in dataset.batches(0):
        keys += batch.keys
        for place, key in enumerate(batch.keys):
            if key in wanted:
                pixels = batch.inputs["image"][place].numpy().astype(int)
                # The box is resized in one step; Pillow's own may round another way.
                expected = square_by_pillow(pictures[key], 64)
                assert np.abs(pixels - expected).max() <= 1, key
                assert key not in grey or (pixels == pixels[..., :1]).all()
    assert sorted(keys) == sorted(pictures)


# KITTI and nuScenes.


def points_in_image(
    points: np.ndarray, intrinsics: np.ndarray, lidar2cam: np.ndarray, size
) -> int:
    """How many points of a sweep fall into an image, by a product of matrices."""
    homogeneous = np.c_[points[:, :3].astype(np.float64), np.ones(len(points))]
    camera = homogeneous @ np.asarray(lidar2cam, np.float64).T
    ahead = camera[camera[:, 2] > 0, :3] @ np.asarray(intrinsics, np.float64).T
    u, v = ahead[:, 0] / ahead[:, 2], ahead[:, 1] / ahead[:, 2]
    height, width = size
    return int(((u >= 0) & (u < width) & (v >= 0) & (v < height)).sum())


def calibrated(bank: Bank, camera: str, size) -> dict[str, tuple]:
    """Intrinsics and lidar2cam of a camera's view 0 at a size, by key."""
    dataset = BankDataset(
        bank,
        Reading(inputs={camera: size}, cameras=[camera]),
        batch=1,
        view=0,
        threads=1,
    )
    return {
        batch.keys[0]: (
            batch.cameras[camera].intrinsics[0].numpy(),
            batch.cameras[camera].lidar2cam[0].numpy(),
        )
        for batch in dataset.batches(0)
    }


def street_recipe(folder: Path, bank: Path, camera: str, source: str) -> Trainer:
    path = folder / "recipe.yaml"
    path.write_text(
        json.dumps(
            {
                "run": "./run",
                "banks": {"street": str(bank)},
                "student": {
                    "model": "timm:resnet10t",
                    "input": camera,
                    "args": {
                        "channels": [16, 24, 32, 48],
                        "stem_width": 8,
                        "output_stride": 8,
                    },
                },
                "targets": {
                    "patch": {
                        "from": source,
                        "head": {"kind": "linear"},
                        "loss": {"cosine": 0.9, "smooth_l1": 0.1},
                    }
                },
                "stages": [{"steps": 3, "batch": 1, "lr": 0.003, "size": 128}],
            }
        )
    )
    return Trainer(load_recipe(str(path), ["loader.threads=1", "engine.threads=1"]))


def test_kitti_camera_student(shared_data, tmp_path):
    shard = shared_data / "driving" / "driving-kitti-00000.tar"
    fields = {
        "bank": str(tmp_path / "bank"),
        "dataset": {"shards": str(shard)},
        "metadata": "json",
        "inputs": {"cam": {"kind": "image", "member": "png", "calibration": "camera"}},
        "teachers": {
            "street": street_teacher(shared_data / "driving-teachers", [128, 416])
        },
    }
    assert precompute(Job.model_validate(fields), quiet=True).is_whole
    trainer = street_recipe(tmp_path, tmp_path / "bank", "cam", "street/street/patch")
    ((height, width),) = trainer.datasets[0].reading.sizes(0, 0, 0).values()
    assert width / height == pytest.approx(1242 / 375, rel=0.1)
    losses = losses_of(trainer)
    assert len(losses) == 3
    members = members_of(shard)
    size = (96, 352)
    found = calibrated(open_bank(fields["bank"]), "cam", size)
    assert len(found) == 3
    for key, (intrinsics, lidar2cam) in found.items():
        facts = json.loads(members[f"{key}.json"])
        points = np.frombuffer(members[f"{key}.bin"], "<f4").reshape(-1, 4)
        inside = points_in_image(points, intrinsics, lidar2cam, size)
        print(f"\n{key}: {inside} of {facts['expected']['points_in_image']} points")
        # Calibration is float32: a point on the very edge may fall either way.
        assert inside == pytest.approx(facts["expected"]["points_in_image"], abs=2)


def test_nuscenes_student_of_one_of_six_cameras(shared_data, tmp_path):
    driving = shared_data / "driving"
    job = load_job(str(EXAMPLES / "nuscenes.yaml"), [f"bank={tmp_path / 'bank'}"])
    teacher = street_teacher(shared_data / "driving-teachers", [128, 224])
    fields = job.model_dump(by_alias=True) | {
        "dataset": {"shards": str(driving / "driving-nuscenes-00000.tar")},
        "teachers": {"street": {**teacher, "on": ["cam_*"]}},
    }
    assert precompute(Job.model_validate(fields), quiet=True).is_whole
    bank = open_bank(str(tmp_path / "bank"))
    trainer = street_recipe(
        tmp_path, tmp_path / "bank", "cam_front", "street/street/patch"
    )
    assert [task.path for task in trainer.tasks] == ["street/cam_front/128x224/patch"]
    assert len(losses_of(trainer)) == 3
    sweep = members_of(driving / "driving-nuscenes-00000.tar")
    (points,) = (data for name, data in sweep.items() if name.endswith(".bin"))
    points = np.frombuffer(points, "<f4").reshape(-1, 5)
    facts = {
        name.removeprefix("nusc-").removesuffix(".json").replace("-", "_"): json.loads(
            data
        )["expected"]["points_in_image"]
        for name, data in members_of(
            driving / "driving-nuscenes-percam-00000.tar"
        ).items()
        if name.endswith(".json")
    }
    assert len(facts) == 6
    size = (100, 180)
    for camera, expected in facts.items():
        ((intrinsics, lidar2cam),) = calibrated(bank, camera, size).values()
        inside = points_in_image(points, intrinsics, lidar2cam, size)
        print(f"\n{camera}: {inside} of {expected} points")
        assert inside == pytest.approx(expected, abs=2)


# Hostile shards.


@pytest.fixture(scope="module")
def hostile(shared_data, tmp_path_factory):
    """Bank of all hostile shards, its rows, and what each shard's keys should be."""
    folder, made = shared_data / "hostile", tmp_path_factory.mktemp("hostile")
    (made / "nets.py").write_text(TEACHER_FILE)
    module = f"module:{made}/nets.py"
    fields = {
        "bank": str(made / "bank"),
        "dataset": {"shards": f"{folder}/*.tar"},
        "inputs": {
            "image": {"kind": "image", "member": ["jpg", "jpeg", "png"]},
            "lidar": {"kind": "points", "member": "bin"},
        },
        "labels": {"class": {"member": "cls", "num_classes": 1000}},
        "teachers": {
            "net": {
                "model": f"{module}:Net",
                "weights": "random",
                "sizes": [[32, 32]],
                "on": ["image"],
                "outputs": {"patch": {"from": "body"}},
            },
            "points": {**POINTS_TEACHER, "model": f"{module}:Points", "on": ["lidar"]},
        },
    }
    precompute(Job.model_validate(fields), quiet=True)
    bank = open_bank(fields["bank"])
    expected = json.loads((folder / "expected.json").read_text())
    return bank, list(bank.rows()), expected


def test_hostile_shards_are_streamed(hostile):
    """Every valid row comes once, no other does, and its key is the bank's."""
    bank, rows, expected = hostile
    for name, target, reading in (
        ("net.image", "net/patch", {"inputs": {"image": (24, 24)}}),
        ("points.lidar", "points/pooled", {}),
    ):
        found = epoch_rows(bank, target, **reading)
        valid = {row["row"]: row["key"] for row in rows if row[f"valid.{name}"]}
        assert found == valid
        print(f"\n{name}: {len(found)} of {len(rows)} rows")
        by_shard: dict[str, set[str]] = {}
        for row in rows:
            if row["row"] in found:
                by_shard.setdefault(row["shard"], set()).add(row["key"])
        for shard, want in expected.items():
            if (want["group"] == "lidar") == (name == "points.lidar"):
                assert set(want["good_keys"]) <= by_shard.get(f"{shard}.tar", set())


def test_hostile_targets_and_labels_are_masked_each_by_itself(hostile):
    bank, rows, _ = hostile
    dataset = BankDataset(
        bank,
        Reading(
            inputs={"image": (24, 24)},
            targets={"patch": "net/patch", "points": "points/pooled"},
            labels=["class"],
        ),
        batch=16,
        view=0,
        threads=1,
        keep_rest=True,
    )
    by_row = {row["row"]: row for row in rows}
    batches = list(dataset.batches(0))
    seen = [row for batch in batches for row in batch.rows.tolist()]
    readable = {row for row, one in by_row.items() if one["valid.net.image"]}
    assert sorted(seen) == sorted(readable)
    for batch in batches:
        mine = [by_row[row] for row in batch.rows.tolist()]
        for name, of in (("patch", "net.image"), ("points", "points.lidar")):
            target = batch.targets[name]
            valid = [one[f"valid.{of}"] for one in mine]
            assert target.valid.tolist() == valid
            is_missing = target.values().flatten(1).isnan()
            assert is_missing.all(1).tolist() == is_missing.any(1).tolist()
            assert is_missing.any(1).tolist() == [not one for one in valid]
        told = [one["label.class"] for one in mine]
        labels = batch.labels["class"].tolist()
        assert labels == [-1 if one is None else one for one in told]
    refused = {
        one["key"]
        for one in rows
        if one["shard"] == "lab-cls-not-int.tar" and one["label.class"] is None
    }
    assert len(refused) == 1


# The worked recipes of CIFAR-10.


def test_cifar10_recipes_and_their_probe(shared_data, tmp_path, capsys):
    """The commands of the examples' comments, on a tenth of the rows, for one epoch."""
    (tmp_path / "data").mkdir()
    for name in ("cifar10-teachers", "cifar10-test"):
        (tmp_path / "data" / name).symlink_to(shared_data / name)
    for path in [EXAMPLES / "cifar10.yaml", *(EXAMPLES / "recipes").glob("*.yaml")]:
        copy = tmp_path / path.relative_to(EXAMPLES)
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    shard = tmp_path / "data" / "cifar10-test" / "cifar10-test-00000.tar"
    job = load_job(str(tmp_path / "cifar10.yaml"), [f"dataset.shards={shard}"])
    assert precompute(job, quiet=True).is_whole
    short = ["stages.0.epochs=1", "stages.0.warmup_steps=1", "engine.threads=1"]
    told = {}
    for name in ("plain_kd", "labels"):
        recipe = tmp_path / "recipes" / f"{name}.yaml"
        assert main(["train", str(recipe), *short, "--json"]) == 0
        told[name] = json.loads(capsys.readouterr().out)
        # One epoch of about 8 in 10 of 1,000 rows, in batches of 128.
        assert told[name]["steps"] == 6
    assert set(told["plain_kd"]["losses"]) == {
        "loss",
        "loss.logits",
        "loss.class",
    }
    assert set(told["labels"]["losses"]) == {"loss", "loss.class"}
    probe = tmp_path / "recipes" / "probe.yaml"
    assert main(["probe", str(probe), "engine.threads=1", "--quiet"]) == 0
    with capsys.disabled():
        print(f"\n{capsys.readouterr().out}")
    result = json.loads((tmp_path / "runs" / "probe.json").read_text())
    scores = result["probes"]["class"]["scores"]
    models = {score["model"] for score in scores}
    assert {"kd", "labels", "resnet56", "resnet20"} < models
    assert len(models) == 5, "and one student that is not trained"
    # Published weights, 83 % of the test set with their own head; chance is 10 %.
    assert max(one["value"] for one in scores if one["model"] == "resnet56") > 0.6
