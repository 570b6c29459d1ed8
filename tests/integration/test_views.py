"""Views in a bank: colour changes, padding, a teacher's own geometry; end to end."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import fields

import numpy as np
import pytest
import timm
import torch
import zarr
from PIL import Image

from manifests.code import load_code
from manifests.errors import BankError
from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record, view_policy_of
from pipeline.bank.verify import verify
from pipeline.errors import PipelineError
from pipeline.plan import make_plan
from pipeline.samples.images import resize_view
from pipeline.samples.photometric import DEFINITION, Photometric
from pipeline.samples.views import draw_view
from student_train.errors import TrainingError
from tests.conftest import POINTS_INPUT, POINTS_TEACHER, jpeg, run_cli, write_tar
from tests.training import PATCH, trainer_for

COLOURS = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grey": 0.3,
    "blur": 0.6,
    "blur_sigma": [0.01, 0.05],
    "solarize": 0.3,
}


def seed_one_net(folder):
    """The job's network with its weights, made beside the bank."""
    torch.manual_seed(1)
    code = load_code("./nets.py:Net", str(folder), "test", torch.nn.Module)
    return code.make().eval()


def grids_of(net, pixels_NHW3):
    """Features of pixels by the network alone: (N, y, x, C) and logits (N, C)."""
    with torch.inference_mode():
        x = torch.from_numpy(pixels_NHW3).permute(0, 3, 1, 2).float() / 255
        body = net.body(torch.relu(net.stem(x)))
        return body.permute(0, 2, 3, 1).numpy(), net(x).numpy()


def cosine(a, b):
    a, b = (x.reshape(len(x), -1).astype(float) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def images_of(folder):
    found = {}
    for path in sorted((folder / "data").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".jpg"):
                    data = tar.extractfile(member).read()
                    image = Image.open(io.BytesIO(data)).convert("RGB")
                    found[member.name.removesuffix(".jpg")] = image
    return found


def test_colour_changes_are_kept_and_seen_by_teachers(
    make_shards, make_job, run, tmp_path
):
    """Boxes and parameters as the bank holds them give the features it holds."""
    make_shards([6])
    run(make_job(views={"random": 2, "photometric": COLOURS}))
    bank = open_bank(str(tmp_path / "bank"))
    group = zarr.open_group(str(tmp_path / "bank" / "features.zarr"), mode="r")
    stored = group["views/photometric"]
    names = stored.attrs["parameters"]
    assert names == [field.name for field in fields(Photometric)]
    assert stored.attrs["definition"] == DEFINITION
    assert stored.metadata.dimension_names[2] == "photometric_parameter"
    numbers, boxes = stored[:], group["views/image_box"][:]
    flips = group["views/flip"][:]
    np.testing.assert_array_equal(numbers[:6, 0], [[1, 1, 1, 0, 0, 0, 256]] * 6)
    assert np.isnan(numbers[6:]).all()
    assert len(np.unique(numbers[:6, 1:].reshape(-1, 7), axis=0)) == 12

    images, net = list(images_of(tmp_path).values()), seed_one_net(tmp_path)
    apart = []
    for view in range(3):
        seen = {True: [], False: []}
        for row, image in enumerate(images):
            told = dict(zip(names, numbers[row, view].tolist(), strict=True))
            changes = Photometric(**{**told, "grey": bool(told["grey"])})
            for is_changed, found in seen.items():
                pixels = resize_view(
                    image,
                    tuple(boxes[row, view]),
                    bool(flips[row, view]),
                    (16, 16),
                    "bilinear",
                    changes if is_changed else None,
                )
                found.append(pixels)
        for output, number in (("patch", 0), ("logits", 1)):
            path = f"net/image/16x16/{output}"
            cached = bank.read(path, 0, view)[:6]
            live, plain = (
                grids_of(net, np.stack(seen[x]))[number] for x in (True, False)
            )
            assert cosine(cached, live).min() >= 0.9999
            np.testing.assert_allclose(cached, live, atol=1e-5)
            apart.append(np.abs(cached - plain).max())
    assert max(apart[:2]) < 1e-5 < min(apart[2:])


def test_colour_changes_move_no_box_and_older_jobs_stay_what_they_are(
    make_shards, make_job, run, tmp_path
):
    make_shards([4])
    run(make_job(views={"random": 2}))
    plain = open_bank(str(tmp_path / "bank"))
    assert "photometric" not in plain.record.views
    assert not (tmp_path / "bank" / "features.zarr" / "views" / "photometric").exists()
    run(make_job(bank="./other", views={"random": 2, "photometric": COLOURS}))
    other = open_bank(str(tmp_path / "other"))
    for name in ("views/image_box", "views/flip"):
        np.testing.assert_array_equal(plain.whole_array(name), other.whole_array(name))
    prints = [
        bank.record.pass_by_id("net.image").fingerprint for bank in (plain, other)
    ]
    assert prints[0] != prints[1]
    same = make_plan(load_job(str(make_job(views={"random": 2, "photometric": None}))))
    assert same.is_done


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, {"hue": 0.1}),
        ({"hue": 0.1}, None),
        ({"hue": 0.1}, {"hue": 0.2}),
    ],
)
def test_a_bank_keeps_its_colour_changes(before, after, make_shards, make_job, run):
    make_shards([2])
    run(make_job(views={"random": 1, "photometric": before}))
    job = load_job(str(make_job(views={"random": 2, "photometric": after})))
    with pytest.raises(BankError, match=r"draws its views otherwise .*photometric: "):
        make_plan(job)


def test_colour_changes_may_come_with_the_first_random_view(
    make_shards, make_job, run, tmp_path
):
    make_shards([3])
    run(make_job())
    run(make_job(views={"random": 1, "photometric": {"brightness": 0.5}}))
    bank = open_bank(str(tmp_path / "bank"))
    numbers = bank.whole_array("views/photometric")
    policy = view_policy_of(bank.record)
    for row in bank.rows():
        drawn = draw_view(policy, row["shard"], row["key"], 1, {"image": (24, 24)})
        assert tuple(numbers[row["row"], 1]) == drawn.photometric.to_numbers()
    report = verify(*open_record(str(tmp_path / "bank")), full=True)
    assert report.problems == []


def test_colour_changes_without_an_image_are_refused(make_shards, make_job):
    make_shards([2], with_points=True)
    job = make_job(
        inputs={"lidar": POINTS_INPUT},
        labels={},
        teachers={"points": POINTS_TEACHER},
        views={"random": 1, "photometric": {"hue": 0.1}},
    )
    with pytest.raises(PipelineError, match="the job has no image or clip"):
        make_plan(load_job(str(job)))


# Padding.

PADDED = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "sizes": [[32, 32]],
    "batch": 2,
    "preprocess": {"fit": "pad"},
    "outputs": {
        "logits": {},
        "raw": {"from": "body", "encoding": "raw"},
        "lossless": {"from": "body"},
        "half": {"from": "body", "encoding": "half"},
        "top": {"from": "body", "topk": 3},
        "pooled_grid": {"from": "body", "pool": [2, 2]},
    },
}
SIZES = [(20, 60), (60, 20), (30, 30), (21, 64), (2, 200)]


@pytest.fixture
def padded(tmp_path, make_job, run):
    members = [(f"{i}.jpg", jpeg(i, *hw)) for i, hw in enumerate(SIZES)]
    write_tar(tmp_path / "data" / "train-00000.tar", members)

    def make(precision="float32"):
        path = make_job(
            teachers={"net": {**PADDED, "precision": precision}},
            labels={},
            inputs={"image": {"kind": "image", "member": "jpg", "view0": "full"}},
            views={"random": 2, "flip": True},
        )
        run(path)
        return open_bank(str(tmp_path / "bank"))

    return make


def longest_side(box, length):
    """Rows and columns that a box fills: SAM's ResizeLongestSide."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = length / max(height, width)
    return max(1, int(height * scale + 0.5)), int(width * scale + 0.5)


def test_padded_grids_hold_what_the_picture_shows(padded, tmp_path):
    bank, images, net = padded(), images_of(tmp_path), seed_one_net(tmp_path)
    boxes, flips = (bank.whole_array(f"views/{x}") for x in ("image_box", "flip"))
    assert flips[:4].any()
    kept = {}
    for view in range(3):
        pixels, shown = np.zeros((4, 32, 32, 3), np.uint8), np.zeros((4, 8, 8), bool)
        for row in range(4):
            rows, columns = longest_side(boxes[row, view], 32)
            picture = images[str(row)].resize(
                (columns, rows), Image.Resampling.BILINEAR, box=tuple(boxes[row, view])
            )
            pixels[row, :rows, :columns] = (
                np.asarray(picture)[:, ::-1] if flips[row, view] else picture
            )
            # Centres of cells of 4 pixels lie at 2, 6, 10 ...
            centre = 4 * np.arange(8) + 2
            shown[row] = (centre < rows)[:, None] & (centre < columns)
        grid, logits = grids_of(net, pixels)

        def read(name, view=view):
            return bank.read(f"net/image/32x32/{name}", 0, view)[:4]

        np.testing.assert_allclose(read("logits"), logits, atol=1e-5)
        for name in ("raw", "lossless", "half"):
            found = read(name)
            assert np.isnan(found[~shown]).all()
            bound = 1e-2 if name == "half" else 1e-5
            np.testing.assert_allclose(found[shown], grid[shown], atol=bound)
        top = read("top")
        assert np.isnan(top[~shown]).all()
        best = grid.argmax(-1)
        np.testing.assert_array_equal(top[shown].argmax(-1), best[shown])
        # A pooled cell shows a picture where all of its cells do.
        blocks = shown.reshape(4, 4, 2, 4, 2).all((2, 4))
        means = grid.reshape(4, 4, 2, 4, 2, 16).mean((2, 4))
        pooled = read("pooled_grid")
        assert np.isnan(pooled[~blocks]).all()
        np.testing.assert_allclose(pooled[blocks], means[blocks], atol=1e-5)
        kept[view] = grid[shown], means[blocks]
    # Statistics are of the cells of view 0 that show something.
    for name, cells in (("lossless", kept[0][0]), ("pooled_grid", kept[0][1])):
        found = bank.statistics(f"net/image/32x32/{name}")
        assert int(found["count"]) == len(cells)
        np.testing.assert_allclose(found["mean"], cells.mean(0), atol=1e-5)
        np.testing.assert_allclose(found["variance"], cells.var(0), atol=1e-5)


def test_a_picture_without_a_cell_of_its_own_is_an_invalid_row(padded):
    """200 x 2 pixels fill less than half a cell of 32 rows."""
    bank = padded()
    rows = {row["key"]: row for row in bank.rows()}
    assert rows["4"]["valid.net.image"] is False
    assert "all_padding" in rows["4"]["reason.net.image"]
    assert all(rows[str(i)]["valid.net.image"] for i in range(4))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_padded_banks_verify_and_damage_is_still_found(padded, precision, tmp_path):
    bank = padded(precision)
    store, record = open_record(bank.record.job["bank"])
    assert verify(store, record, full=True).problems == []
    found = bank.read("net/image/32x32/lossless", 0, 0)[:4]
    is_missing = np.isnan(found)
    assert is_missing.any()
    np.testing.assert_array_equal(is_missing.any(-1), is_missing.all(-1))
    # A hole in a cell that shows something is no padding.
    unpadded = record.model_copy(
        update={
            "passes": tuple(
                entry.model_copy(
                    update={
                        "provenance": {
                            **entry.provenance,
                            "preprocess": {"32x32": {"image": {"kind": "image"}}},
                        }
                    }
                )
                for entry in record.passes
            )
        }
    )
    report = verify(store, unpadded, full=True)
    assert any("missing values in valid rows" in str(one) for one in report.problems)


# A teacher's own geometry.


@pytest.fixture
def own_bank(tmp_path, make_job, run):
    members = []
    for i in range(4):
        members += [(f"{i}.jpg", jpeg(i, 60 + 9 * i, 100)), (f"{i}.cls", b"1")]
    write_tar(tmp_path / "data" / "train-00000.tar", members)
    vit = {
        "model": "timm:test_vit",
        "weights": "random:3",
        "batch": 2,
        "preprocess": {"geometry": "teacher"},
        "outputs": {"cls": {}, "patch": {}},
    }
    net = {
        "model": "module:./nets.py:Net",
        "weights": "random:1",
        "sizes": [[16, 16]],
        "batch": 2,
        "outputs": {"patch": {"from": "body"}},
    }
    run(make_job(teachers={"vit": vit, "net": net}))
    return tmp_path / "bank"


def test_a_teachers_own_geometry_is_timms(own_bank, tmp_path):
    bank = open_bank(str(own_bank))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = timm.create_model("test_vit").eval()
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    images = torch.stack([transform(one) for one in images_of(tmp_path).values()])
    with torch.inference_mode():
        live = model.forward_features(images)[:, 0].numpy()
    cached = bank.read("vit/image/160x160/cls", 0, 0)[:4]
    assert cosine(cached, live).min() >= 0.9999


def test_the_bank_says_that_grids_are_not_aligned(own_bank):
    bank = open_bank(str(own_bank))
    own = bank.record.pass_by_id("vit.image").provenance["preprocess"]
    told = json.loads(own["160x160"]["image"]["own"])
    assert told["call"] == "timm.data.create_transform"
    assert (
        "own"
        not in bank.record.pass_by_id("net.image").provenance["preprocess"]["16x16"][
            "image"
        ]
    )
    group = zarr.open_group(str(own_bank / "features.zarr"), mode="r")
    assert "do not lie on the boxes" in group["vit/image/160x160"].attrs["geometry"]
    assert "geometry" not in group["net/image/16x16"].attrs
    card = (own_bank / "README.md").read_text()
    assert "Not aligned: vit/image/160x160 hold the teacher's own resize" in card
    facts = json.loads(run_cli("info", own_bank, "--json").stdout)
    aligned = {path: one["aligned"] for path, one in facts["outputs"].items()}
    assert aligned == {
        "vit/image/160x160/cls": False,
        "vit/image/160x160/patch": False,
        "net/image/16x16/patch": True,
    }
    told_info = run_cli("info", own_bank).stdout
    assert "own      vit/image/160x160/patch: the teacher's own resize" in told_info


def test_its_grids_are_no_targets_and_its_vectors_are(own_bank, tmp_path):
    patch = {"patch": {**PATCH, "from": "main/vit/patch"}}
    with pytest.raises(TrainingError, match="comes of the teacher's own resize"):
        trainer_for(own_bank, tmp_path / "grid", targets=patch)
    vector = {"head": {"kind": "linear"}, "loss": {"mse": 1.0}}
    targets = {
        "cls": {"from": "main/vit/cls", **vector},
        "patch": {**PATCH, "from": "main/net/patch"},
    }
    trainer_for(own_bank, tmp_path / "vector", targets=targets)
