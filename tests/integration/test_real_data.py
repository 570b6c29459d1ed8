"""The main job on real images and real sweeps (`shared_data`; skips where absent)."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import numpy as np
import pytest

from manifests.dataset import DatasetRecord
from manifests.job import Job
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from pipeline.recheck_rows import recheck
from tests.conftest import POINTS_TEACHER, TEACHER_FILE

CIFAR_PIXELS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def run(fields):
    outcome = precompute(Job.model_validate(fields), quiet=True)
    store, record = open_record(fields["bank"])
    report = verify(store, record, full=True)
    assert report.problems == []
    for entry in record.passes:
        told = record.state.valid[entry.id] + sum(
            record.state.invalid[entry.id].values()
        )
        assert told == record.state.rows
    return outcome, open_bank(fields["bank"])


def read_all(bank: Bank, path: str, view: int = 0) -> np.ndarray:
    """All rows of the shards, padding left out, in order."""
    rows = []
    for shard in bank.record.shards:
        for number in range(shard.blocks):
            values = bank.read(path, shard.first_block + number, view)
            left = shard.samples - number * bank.record.block_rows
            rows.append(values[: max(0, left)])
    return np.concatenate(rows)


def cifar_teacher(folder: Path, depth: int) -> dict:
    return {
        "model": f"module:{folder}/cifar_resnet.py:CifarResNet",
        "args": {"depth": depth},
        "weights": f"{folder}/resnet{depth}.pt",
        "sizes": [[32, 32]],
        "preprocess": CIFAR_PIXELS,
        "outputs": {"logits": {"from": "output"}, "patch": {"from": "layer3"}},
    }


def test_cifar10_logits_are_the_published_networks(shared_data, tmp_path):
    folder = shared_data / "cifar10-teachers"
    fields = {
        "bank": str(tmp_path / "bank"),
        "dataset": {
            "shards": f"{shared_data}/cifar10-test/cifar10-test-{{00000..00009}}.tar"
        },
        "inputs": {"image": {"kind": "image", "member": "jpg"}},
        "labels": {"class": {"member": "cls", "num_classes": 10}},
        "teachers": {
            "resnet56": cifar_teacher(folder, 56),
            "resnet20": cifar_teacher(folder, 20),
        },
    }
    outcome, bank = run(fields)
    assert outcome.is_whole
    reference = np.load(shared_data / "reference" / "cifar10-test-logits.npz")
    rows = list(bank.rows())
    assert [row["key"] for row in rows] == [str(key) for key in reference["keys"]]
    labels = np.array([row["label.class"] for row in rows])
    np.testing.assert_array_equal(labels, reference["labels"])
    for name, top1 in (("resnet56", 83.20), ("resnet20", 81.03)):
        logits = read_all(bank, f"{name}/image/32x32/logits")
        worst = float(np.abs(logits - reference[name]).max())
        found = 100 * float((logits.argmax(1) == labels).mean())
        print(f"\n{name}: top-1 {found:.2f} %, largest logit difference {worst:.1e}")
        assert worst < 1e-3
        assert found == pytest.approx(top1, abs=0.005)
    again = recheck(fields["bank"], 64, job=Job.model_validate(fields))
    assert again.holds
    assert [one.identical for one in again.outputs] == [64] * 4


def test_imagenet_sample_in_one_pass(shared_data, tmp_path):
    fields = {
        "bank": str(tmp_path / "bank"),
        "dataset": {
            "shards": f"{shared_data}/imagenet-sample/imagenet-sample-0000{{0..2}}.tar"
        },
        "inputs": {"image": {"kind": "image", "member": ["jpg", "jpeg", "png"]}},
        "labels": {"class": {"member": "cls", "num_classes": 1000}},
        "teachers": {
            "vit": {
                "model": "timm:vit_tiny_patch16_224",
                "weights": "random",
                "precision": "bfloat16",
                "outputs": {"cls": {}, "patch": {}, "logits": {"topk": 10}},
            },
            "convnext": {
                "model": "timm:convnext_atto",
                "weights": "random",
                "outputs": {"pooled": {"encoding": "half"}, "patch": {}},
            },
            "clip": {
                "model": "open_clip:ViT-B-32",
                "weights": "random",
                "outputs": {"embed": {}, "patch": {"encoding": "half"}},
            },
        },
    }
    outcome, bank = run(fields)
    state = outcome.record.state
    assert state.rows == 300
    for name in ("vit.image", "convnext.image", "clip.image"):
        assert state.valid[name] == 300, state.invalid[name]
    assert outcome.record.inputs["image"].view0 == "square"
    # Every image is another one, so every embedding must be.
    embed = read_all(bank, "clip/image/224x224/embed")
    assert len(np.unique(embed.round(5), axis=0)) == 300


def street_teacher(folder: Path, size: list[int]) -> dict:
    return {
        "model": f"module:{folder}/driving_teachers.py:CameraSegTeacher",
        "args": {"q": 8},
        "weights": f"{folder}/espnet-p2q8-cityscapes.pt",
        "on": ["cam*"],
        "sizes": [size],
        "preprocess": {
            "channels": "bgr",
            "range": 255,
            "mean": [72.3923111, 82.90893555, 73.15840149],
            "std": [45.3192215, 46.15289307, 44.91483307],
            "divide": 255,
        },
        "outputs": {
            "patch": {"from": "encoder[2]"},
            "logits": {"from": "output", "pool": [8, 8], "topk": 3},
        },
    }


def point_teacher(folder: Path) -> dict:
    return {
        "model": f"module:{folder}/driving_teachers.py:PointTeacher",
        "weights": f"{folder}/pointnet-modelnet40.pt",
        "method": "features",
        "on": ["lidar"],
        "preprocess": {"points": 4096, "centre": True, "unit_sphere": True},
        "outputs": {
            "pooled": {"from": "output[global]"},
            "logits": {"from": "output[logits]"},
        },
    }


def test_kitti_cameras_and_sweeps(shared_data, tmp_path):
    folder = shared_data / "driving-teachers"
    fields = {
        "bank": str(tmp_path / "bank"),
        "dataset": {"shards": f"{shared_data}/driving/driving-kitti-00000.tar"},
        "metadata": "json",
        "inputs": {
            "cam": {"kind": "image", "member": "png", "calibration": "camera"},
            "lidar": {"kind": "points", "member": "bin"},
        },
        "teachers": {
            "street": street_teacher(folder, [384, 1248]),
            "pointnet": point_teacher(folder),
        },
    }
    outcome, bank = run(fields)
    assert outcome.is_whole
    assert outcome.record.inputs["cam"].view0 == "full"
    assert outcome.record.inputs["cam"].aspect == pytest.approx(1242 / 375, rel=0.01)
    # Published weights, real streets: the lower middle of a KITTI image is road.
    logits = read_all(bank, "street/cam/384x1248/logits")
    road = logits[:, 39:46, 62:94].argmax(-1) == 0
    print(f"\nESPNet: {road.mean():.0%} of the cells ahead of the car are road")
    assert road.mean() > 0.75
    pooled = read_all(bank, "pointnet/lidar/native/pooled")
    assert pooled.shape == (3, 1024)
    assert (pooled >= 0).all()
    assert (pooled.std(axis=1) > 0).all()


def test_nuscenes_six_cameras_of_one_sample(shared_data, tmp_path):
    folder = shared_data / "driving-teachers"
    others = ("front_right", "front_left", "back", "back_left", "back_right")
    cameras = {
        f"cam_{name}": {
            "kind": "image",
            "member": f"cam_{name}.jpg",
            "calibration": f"cameras.CAM_{name.upper()}",
        }
        for name in others
    }
    fields = {
        "bank": str(tmp_path / "bank"),
        "dataset": {"shards": f"{shared_data}/driving/driving-nuscenes-00000.tar"},
        "metadata": "json",
        "inputs": {
            "cam_front": {
                "kind": "image",
                "member": "jpg",
                "calibration": "cameras.CAM_FRONT",
            },
            **cameras,
            "lidar": {
                "kind": "points",
                "member": "bin",
                "columns": ["x", "y", "z", "intensity", "ring"],
                "intensity_max": 255,
            },
        },
        "teachers": {
            "street": street_teacher(folder, [256, 448]),
            "pointnet": point_teacher(folder),
        },
    }
    outcome, bank = run(fields)
    assert outcome.is_whole
    assert len(outcome.record.passes) == 1 + 6 + 1
    maps = [
        read_all(bank, f"street/{name}/256x448/patch")
        for name in ("cam_front", *(f"cam_{other}" for other in others))
    ]
    assert all(one.shape == (1, 32, 56, 256) for one in maps)
    assert len({one.tobytes() for one in maps}) == 6


def test_hostile_shards(shared_data, tmp_path):
    """Every good key comes out, every bad key is named; one bad shard stops nothing."""
    folder = shared_data / "hostile"
    expected = json.loads((folder / "expected.json").read_text())
    marker = Path("/") / "tmp" / "hostile-pickle-ran"
    assert not marker.exists()
    (tmp_path / "nets.py").write_text(TEACHER_FILE)
    module = f"module:{tmp_path}/nets.py"
    fields = {
        "bank": str(tmp_path / "bank"),
        "dataset": {"shards": f"{folder}/*.tar"},
        "metadata": "json",
        "inputs": {
            "image": {"kind": "image", "member": ["jpg", "jpeg", "png"]},
            "lidar": {"kind": "points", "member": "bin"},
        },
        "labels": {
            "class": {"member": "cls", "num_classes": 1000},
            "meta": {"member": "json", "path": "label"},
        },
        "teachers": {
            "net": {
                "model": f"{module}:Net",
                "weights": "random",
                "sizes": [[32, 32]],
                "on": ["image"],
                "outputs": {"logits": {}},
            },
            "points": {**POINTS_TEACHER, "model": f"{module}:Points", "on": ["lidar"]},
        },
    }
    outcome = precompute(Job.model_validate(fields), quiet=True)
    assert outcome.record.state.complete
    assert not outcome.is_whole, "damaged shards must end a run with exit 1"
    assert not marker.exists()
    bank = open_bank(fields["bank"])
    part = (tmp_path / "bank" / "dataset" / "part-00000.json").read_text()
    faults = {
        shard.name: {fault.key: fault.reason for fault in shard.faults}
        for shard in DatasetRecord.model_validate_json(part).shards
    }
    facts = label_reasons(tmp_path / "bank", bank)
    rows = list(bank.rows())
    print(f"\n{'shard':32} {'good':>4}  bad keys and their reasons")
    for name, want in expected.items():
        pass_id = "points.lidar" if want["group"] == "lidar" else "net.image"
        own = [row for row in rows if row["shard"] == f"{name}.tar"]
        good = {row["key"] for row in own if row[f"valid.{pass_id}"]}
        bad = dict(faults[f"{name}.tar"])
        bad |= {
            row["key"]: row[f"reason.{pass_id}"]
            for row in own
            if row["key"] not in good
        }
        labels = facts.get(f"{name}.tar", {})
        damage = outcome.record.state.damaged_shards.get(f"{name}.tar")
        shown = {key[:20]: why for key, why in {**labels, **bad}.items()}
        print(f"{name:32} {len(good):4}  {shown or ''} {damage or ''}")
        assert set(want["good_keys"]) <= good, name
        for key in want["bad_keys"]:
            bare = key.split(" (")[0]
            named = (
                bare in bad or bare in labels or any(k.startswith(bare) for k in bad)
            )
            # An identical key in another shard is another sample; a bad checksum inside
            # a picture may go either way.
            either = "(" in key or (want["group"] == "key" and "across" in name)
            assert named or either, f"{name}: {key} is not named"
        if want["level"] == "shard" and want["bad_keys"]:
            assert damage, name
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of the process {peak:.0f} MiB")


def label_reasons(folder: Path, bank: Bank) -> dict[str, dict[str, str]]:
    """Labels that were there and could not be read, by shard and key."""
    from pipeline.bank.rows import decode_rows

    found: dict[str, dict[str, str]] = {}
    keys = {(row["block"], row["offset"]): row for row in bank.rows()}
    for block in range(bank.record.num_blocks):
        path = folder / "rows" / "rows" / f"{block:08d}.parquet"
        columns = decode_rows(path.read_bytes(), str(path))
        for label in ("class", "meta"):
            for offset, reason in enumerate(columns[f"label.{label}.reason"]):
                if reason and not reason.startswith("missing"):
                    row = keys[block, offset]
                    shard = found.setdefault(row["shard"], {})
                    shard[row["key"]] = f"{label}: {reason.partition(':')[0]}"
    return found
