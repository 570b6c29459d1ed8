"""Shards made to do harm: good samples come out, bad ones are named with a reason.

Goes over the folder ``shared/data/hostile`` beside the repository, where there is one.
``pytest -s`` prints the table of what became of each case.
"""

from __future__ import annotations

import io
import json
import os
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from manifests.inputs import LabelConfig, PointsInput
from pipeline.samples.errors import SampleError
from pipeline.samples.images import decode_image, image_size, resize_view
from pipeline.samples.labels import parse_label, parse_metadata
from pipeline.samples.points import decode_sweep
from pipeline.samples.shards import RowSpan, Sample, index_shard, read_samples

IMAGES = ("jpg", "jpeg", "png")
SWEEP = PointsInput(kind="points", member="bin")
WANTED = frozenset({*IMAGES, "bin", "cls", "json"})
PICKLE_PROOF = Path("/") / "tmp" / "hostile-pickle-ran"  # where the data puts it
# Identity is (shard, key), so the same key in two shards is two samples.
NOT_FAULTS_HERE = {("key-duplicate-across-shards-a", "shared")} | {
    ("key-duplicate-across-shards-b", "shared")
}


@dataclass
class Outcome:
    """What became of one shard: images by key, and reasons by key."""

    images: dict[str, Image.Image] = field(default_factory=dict)
    sweeps: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)
    damage: str | None = None

    def fault(self, key: str, reason: str) -> None:
        self.reasons[key] = (
            f"{self.reasons[key]}; {reason}" if key in self.reasons else reason
        )


def first_image(sample: Sample) -> bytes:
    for extension in IMAGES:
        if extension in sample.faults:
            raise SampleError(*sample.faults[extension].split(": ", 1))
        if extension in sample.members:
            return sample.members[extension]
    raise SampleError("missing", "no image")


def run(url: str, has_points: bool) -> Outcome:
    """Does what a run does to a shard, keeping every reason."""
    outcome = Outcome()
    index = index_shard(url)
    outcome.damage = index.damage
    for fault in index.faults:
        outcome.fault(fault.key, f"{fault.reason}: {fault.detail}")
    if not index.rows:
        return outcome
    rows = index.rows
    end = max(row.offset + row.size for row in rows)
    span = RowSpan(0, len(rows), rows[0].offset, end, rows[0].key)
    for row, sample in read_samples(url, span, WANTED, index.sequential):
        refused = rows[row].refused
        if refused is not None:
            outcome.fault(sample.key, refused)
            continue
        try:
            data = first_image(sample)
            image = decode_image(data)
            height, width = image_size(data)
            assert image.size == (width, height)
            resize_view(image, (0.0, 0.0, width, height), False, (32, 32), "bicubic")
            outcome.images[sample.key] = image
        except SampleError as error:
            outcome.fault(sample.key, str(error))
        if has_points:
            try:
                if "bin" not in sample.members:
                    raise SampleError("missing", "no bin")
                decode_sweep(sample.members["bin"], SWEEP)
                outcome.sweeps.add(sample.key)
            except SampleError as error:
                outcome.fault(sample.key, str(error))
        for extension, parse in (
            (
                "cls",
                lambda d: parse_label(
                    d, LabelConfig(member="cls", path=None, num_classes=1000)
                ),
            ),
            ("json", parse_metadata),
        ):
            try:
                if extension in sample.members:
                    parse(sample.members[extension])
            except SampleError as error:
                outcome.fault(sample.key, f"{extension} {error}")
    return outcome


def test_every_case_is_handled(data_folder: Callable[[str], Path]) -> None:
    folder = data_folder("hostile")
    expected = json.loads((folder / "expected.json").read_text())
    before = sorted(os.listdir(folder))
    failures = []
    for name, case in expected.items():
        has_points = case["group"] == "lidar"
        tracemalloc.start()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outcome = run(str(folder / f"{name}.tar"), has_points)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        good = (
            set(outcome.images) & outcome.sweeps if has_points else set(outcome.images)
        )
        shown = {key[:20]: reason[:90] for key, reason in outcome.reasons.items()}
        print(f"{name:32} good {len(good)} damage {outcome.damage} {shown}")
        missing = set(case["good_keys"]) - good
        if missing:
            failures.append(f"{name}: good keys {missing} did not come out: {shown}")
        for bad in case["bad_keys"]:
            key = bad.split(" (")[0]
            is_named = bool(outcome.reasons.get(key))
            if (
                not is_named
                and "either way" not in bad
                and (name, key) not in NOT_FAULTS_HERE
            ):
                failures.append(f"{name}: {key!r} is not named with a reason")
        if case["group"] == "archive" and case["bad_keys"] and outcome.damage is None:
            failures.append(f"{name}: the shard is not marked damaged")
        if peak > 64 * 2**20:
            failures.append(f"{name}: {peak} bytes")
    assert not failures, "\n".join(failures)
    assert sorted(os.listdir(folder)) == before
    assert not PICKLE_PROOF.exists()


def pixels(folder: Path, name: str) -> np.ndarray:
    image = run(str(folder / f"{name}.tar"), False).images["case"]
    return np.asarray(image).astype(int)


def test_all_ways_to_write_the_picture_give_the_picture(
    data_folder: Callable[[str], Path],
) -> None:
    """The cases are one scene: whatever the format, the same colours come out."""
    folder = data_folder("hostile")
    truth = pixels(folder, "img-png-rgb16")
    url = str(folder / "img-rgba-png.tar")
    rows = index_shard(url).rows
    span = RowSpan(2, 1, rows[2].offset, rows[2].offset + rows[2].size, "case")
    ((_, sample),) = read_samples(url, span, WANTED, False)
    stored = np.asarray(Image.open(io.BytesIO(sample.members["png"]))) / 255
    np.testing.assert_array_equal(stored[..., :3] * 255, truth)
    alpha = stored[..., 3:]
    on_white = 255 * (stored[..., :3] * alpha + 1 - alpha)
    assert np.abs(pixels(folder, "img-rgba-png") - on_white).max() <= 1
    for name in ("img-cmyk-jpeg", "img-progressive-jpeg", "img-palette-png"):
        assert np.abs(pixels(folder, name) - truth).mean() < 8, name
    assert np.abs(pixels(folder, "img-animated-gif-named-png") - truth).mean() < 8
    grey = pixels(folder, "img-gray-jpeg")
    assert (grey == grey[..., :1]).all()
    assert set(np.unique(pixels(folder, "img-1bit-png"))) == {0, 255}
    assert pixels(folder, "img-exif-rotate-6").shape == (96, 72, 3)
    turned = np.rot90(truth, -1)
    assert np.abs(pixels(folder, "img-exif-rotate-6") - turned).mean() < 8
