"""From members to what the student sees: the bank's views, and its label maps."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image

from manifests.recipe import MapLabel
from manifests.teacher import BevExtent
from pipeline.bank.open import Bank
from pipeline.samples.errors import SampleError
from pipeline.samples.shards import Sample
from student_train.errors import TrainingError
from student_train.inputs import InputReader, image_input
from tests.conftest import jpeg
from tests.student_train.conftest import png

EXTENT = BevExtent(x_m=(0, 40), y_m=(-20, 20))
HEIGHT, WIDTH = 20, 28
JPEG = jpeg(3, HEIGHT, WIDTH)
VALUES = np.random.default_rng(0).integers(0, 200, (HEIGHT, WIDTH), np.uint8)
CLASSES = VALUES.astype(np.int64)
DEPTH = np.random.default_rng(1).integers(1, 60_000, (5, 7), np.uint16)


@pytest.fixture(scope="module")
def record(joined):
    return joined.open().record


def read(record, *, maps=None, images=("image",), view=0, size=(8, 10), **members):
    reader = InputReader(record, dict.fromkeys(images, "bilinear"), maps or {})
    given = {"jpg": JPEG, "seg.png": png(VALUES), "depth.png": png(DEPTH)}
    given |= {name.replace("_", "."): data for name, data in members.items()}
    sample = Sample("k", {n: d for n, d in given.items() if d is not None}, {})
    sizes = dict.fromkeys(images, size)
    return reader, reader.read(sample, "train-0.tar", view, sizes, {})


def test_what_is_read_of_a_sample(record):
    maps = {
        "seg": MapLabel(member="SEG.png", input="image", num_classes=200),
        "bev": MapLabel(member="bev.png", extent=EXTENT),
    }
    reader = InputReader(record, {"image": "bicubic"}, maps)
    assert reader.wanted == {"jpg", "seg.png", "bev.png"}
    assert InputReader(record, {}, {"bev": maps["bev"]}).wanted == {"bev.png"}
    # The view of a map goes by its image's size.
    assert InputReader(record, {}, {"seg": maps["seg"]}).wanted == {"jpg", "seg.png"}


def test_the_evaluation_view_is_the_whole_image_of_a_rig(record):
    _, found = read(record)
    image = Image.open(io.BytesIO(JPEG))
    expected = image.resize((10, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found.images["image"], np.asarray(expected))
    assert found.maps == {}
    assert found.calibration == {}


def test_classes(record):
    label = MapLabel(member="seg.png", input="image", num_classes=200, ignore=[5, 255])
    _, found = read(record, maps={"seg": label}, size=(HEIGHT, WIDTH))
    expected = np.where(CLASSES == 5, -1, CLASSES)
    np.testing.assert_array_equal(found.maps["seg"], expected)
    assert found.maps["seg"].dtype == np.int32


def test_numbers_and_their_logarithm(record):
    values = DEPTH.copy()
    values[0, 0], values[1, 1] = 0, 333
    expected = values * 0.01
    expected[1, 1] = math.nan
    for log in (False, True):
        label = MapLabel(
            member="depth.png", extent=EXTENT, scale=0.01, ignore=[333], log=log
        )
        _, found = read(record, maps={"d": label}, depth_png=png(values))
        assert found.maps["d"].dtype == np.float32
        if log:
            expected[0, 0] = math.nan
            expected = np.log(expected)
        np.testing.assert_allclose(found.maps["d"], expected, rtol=1e-6)


def test_a_map_of_another_resolution(record):
    """Its pixels cover the image; each of the student's takes the nearest."""
    label = MapLabel(member="depth.png", input="image")
    _, found = read(record, maps={"d": label}, size=(10, 14))
    expected = DEPTH[np.arange(10) // 2][:, np.arange(14) // 2]
    np.testing.assert_array_equal(found.maps["d"], expected)


def test_a_map_without_its_image_keeps_its_size(record):
    label = MapLabel(member="depth.png", input="image")
    _, found = read(record, maps={"d": label}, images=())
    np.testing.assert_array_equal(found.maps["d"], DEPTH)
    assert found.images == {}


def test_a_map_on_a_birds_eye_grid_does_not_follow_the_image(record):
    label = MapLabel(member="seg.png", extent=EXTENT, num_classes=200)
    for view in (0, 1, 2):
        _, found = read(record, maps={"bev": label}, view=view)
        np.testing.assert_array_equal(found.maps["bev"], VALUES)


@pytest.mark.parametrize("num_classes", [1, 150, int(VALUES.max())])
def test_classes_out_of_range(record, num_classes):
    label = MapLabel(member="seg.png", input="image", num_classes=num_classes)
    message = (
        rf"label seg: class {VALUES.max()} of {num_classes}; put values that are no "
        r"class into `ignore`"
    )
    with pytest.raises(SampleError, match=message) as caught:
        read(record, maps={"seg": label}, size=(HEIGHT, WIDTH))
    assert caught.value.reason == "label_out_of_range"
    above = list(range(num_classes, 256))
    fine = label.model_copy(update={"ignore": above})
    _, found = read(record, maps={"seg": fine}, size=(HEIGHT, WIDTH))
    np.testing.assert_array_equal(
        found.maps["seg"], np.where(num_classes <= CLASSES, -1, CLASSES)
    )


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"jpg": None}, "missing: no member .jpg"),
        ({"jpg": b""}, "empty: the image has 0 bytes"),
        ({"jpg": JPEG[:200]}, "truncated: "),
        ({"seg_png": None}, r"missing: no member .seg.png"),
        (
            {"seg_png": JPEG},
            "not_a_map: a label map has one number a pixel, got",
        ),
        ({"seg_png": png(VALUES)[:-30]}, "truncated: "),
    ],
)
def test_members_that_cannot_be_used(record, members, reason):
    label = MapLabel(member="seg.png", input="image", num_classes=200)
    with pytest.raises(SampleError, match=reason):
        read(record, maps={"seg": label}, **members)


def test_why_a_member_was_not_read_is_said(record):
    reader = InputReader(record, {"image": "bilinear"}, {})
    sample = Sample("k", {}, {"jpg": "too_large: 9 bytes, at most 8 are read"})
    with pytest.raises(SampleError, match="too_large: 9 bytes, at most 8 are read"):
        reader.read(sample, "train-0.tar", 0, {"image": (8, 8)}, {})


def test_inputs_of_the_bank(joined):
    record = joined.open().record
    assert image_input(record, "image").calibration == "cam"
    message = r"input must be one of the bank's \(image, lidar\), got front"
    with pytest.raises(TrainingError, match=message):
        image_input(record, "front")
    with pytest.raises(TrainingError, match="must be an image, got lidar, which"):
        image_input(record, "lidar")
    label = MapLabel(member="seg.png", input="front", num_classes=3)
    with pytest.raises(TrainingError, match="got front"):
        InputReader(record, {}, {"seg": label})


def test_the_view_is_that_of_shard_and_key(joined):
    """A sample of the same name in another shard has other views."""
    bank = joined.open()
    one, other = (
        InputReader(bank.record, {"image": "bicubic"}, {}).read(
            Sample("k", {"jpg": JPEG}, {}), shard, 1, {"image": (16, 16)}, {}
        )
        for shard in ("train-0.tar", "train-1.tar")
    )
    assert not np.array_equal(one.images["image"], other.images["image"])
    assert isinstance(bank, Bank)
