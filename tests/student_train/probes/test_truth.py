"""Labels of a bank and of its shards, in the evaluation view."""

from __future__ import annotations

import numpy as np
import pytest

from manifests.loading import load_job
from manifests.recipe import MapLabel
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from student_train.probes.truth import bank_label, map_size, read_maps
from tests.conftest import jpeg, write_job, write_tar
from tests.student_train.conftest import DEPTH, NO_IMAGE, NO_LABEL, SEG, png


@pytest.fixture(scope="module")
def bank(joined):
    return joined.open()


def rows_of(bank, keys) -> np.ndarray:
    return np.flatnonzero(np.isin(bank.keys(), list(keys)))


def test_labels_of_the_bank(bank, joined):
    values, known = bank_label(bank, "class")
    keys = bank.keys()
    assert (values.dtype, known.shape) == (np.int64, (bank.record.num_rows,))
    assert set(keys[~known]) == {"", NO_LABEL}
    for row in np.flatnonzero(known):
        assert values[row] == joined.samples[str(keys[row])].label
    numbers, has_number = bank_label(bank, "number")
    assert numbers.dtype == np.float64
    np.testing.assert_array_equal(numbers[has_number], values[has_number])


@pytest.mark.parametrize("label", [SEG, DEPTH], ids=["seg", "depth"])
def test_maps_of_one_size_keep_it(bank, joined, label):
    # 24 x 30 pixels, all of which view 0 shows; the depth has half the resolution.
    same = [k for k, one in joined.samples.items() if one.seg.shape == (24, 30)]
    rows = rows_of(bank, same)
    assert len(rows) >= 2
    mask = np.zeros(bank.record.num_rows, np.bool_)
    mask[rows] = True
    size = map_size(bank, None, label, mask, (99, 99))
    splits = {"fit": rows[1:], "choose": rows[:1]}
    found = read_maps(bank, None, label, size, splits, batch=2)
    assert size == ((24, 30) if label is SEG else (12, 15))
    for split, chosen in splits.items():
        for place, row in enumerate(chosen):
            sample = joined.samples[str(bank.keys()[row])]
            if label is SEG:
                expected = sample.seg.astype(int)
                expected[expected == 3] = -1
            else:
                depth = sample.depth.astype(np.float32)
                expected = np.where(depth == 7, np.nan, depth * 0.25)
            np.testing.assert_array_equal(found[split][place], expected)


def test_maps_are_cut_as_the_view_is(tmp_path):
    # Of 24 x 32 pixels view 0 is the centred square: 4 to 27 across, and 2 to 13 of a
    # map of half the resolution.
    drawn = np.random.default_rng(0).integers(0, 200, (2, 12, 16), np.uint8)
    members = []
    for number, values in enumerate(drawn):
        members += [
            (f"{number}.jpg", jpeg(number, 24, 32)),
            (f"{number}.cls", b"1"),
            (f"{number}.map.png", png(values)),
        ]
    write_tar(tmp_path / "data" / "train-0.tar", members)
    assert precompute(load_job(str(write_job(tmp_path))), quiet=True).is_whole
    square = open_bank(str(tmp_path / "bank"))
    label = MapLabel(member="map.png", input="image", num_classes=200)
    mask = square.keys() != ""
    size = map_size(square, None, label, mask, None)
    assert size == (12, 12)
    rows = {"fit": np.flatnonzero(mask)}
    found = read_maps(square, None, label, size, rows, batch=2)["fit"]
    np.testing.assert_array_equal(found, drawn[:, :, 2:14])


def test_maps_of_many_sizes_are_read_at_the_students(bank):
    mask = bank.whole_array("views/image_size").min(1) > 0
    assert NO_IMAGE not in bank.keys()[mask]
    assert map_size(bank, None, SEG, mask, (10, 14)) == (10, 14)
    # Nobody's input to go by: that of the first row, 24 x 30 as it happens.
    assert map_size(bank, None, SEG, mask, None) == (24, 30)
    rows = {"fit": np.flatnonzero(mask)}
    found = read_maps(bank, None, SEG, (10, 14), rows, batch=4)
    assert found["fit"].shape == (mask.sum(), 10, 14)
    assert set(found["fit"].unique().tolist()) == {-1, 0, 1, 2}


def test_what_has_no_logarithm_is_no_label(bank, joined):
    label = MapLabel(member="depth.png", input="image", ignore=[7], log=True)
    first = rows_of(bank, ["s0-0000"])
    found = read_maps(bank, None, label, (12, 15), {"fit": first}, batch=1)["fit"][0]
    depth = joined.samples["s0-0000"].depth.astype(np.float32)
    # The numbers themselves: who scores them takes the logarithm.
    expected = np.where((depth == 7) | (depth == 0), np.nan, depth)
    np.testing.assert_array_equal(found, expected)
