"""A bank with a bit of everything to learn from, made once; not to be written to."""

from __future__ import annotations

import io
import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from manifests.loading import load_job
from manifests.recipe import MapLabel
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
from student_train import BankDataset, Reading
from student_train.batches import Batch
from tests.conftest import (
    POINTS_INPUT,
    POINTS_TEACHER,
    jpeg,
    sweep,
    write_job,
    write_tar,
)

SHARD_SIZES = (11, 8, 6)
BLOCK_ROWS = 4
NUM_CLASSES = 5
NET = {"model": "module:./nets.py:Net", "weights": "random:1", "on": ["image"]}
NO_IMAGE, NO_LABEL, NO_SWEEP = "s0-0002", "s1-0003", "s2-0001"
SIZE = (12, 20)
SEG = MapLabel(member="seg.png", input="image", num_classes=4, ignore=[3])
DEPTH = MapLabel(member="depth.png", input="image", scale=0.25, ignore=[7])
READING = Reading(
    inputs={"image": SIZE},
    targets={
        "patch": "net/patch",
        "half": "net/layer1",
        "top": "net/logits",
        "brain": "brain/image/16x16/patch",
        "all": "brain/image/16x16/logits",
        "points": "points/pooled",
        "raw_logits": "points/logits",
    },
    labels=["class", "number"],
    maps={"seg": SEG, "depth": DEPTH},
    cameras=["image"],
)
"""All there is to read of the bank, in one reading."""
LEAN = Reading(inputs={"image": (8, 8)}, targets={"patch": "net/patch"})


def png(values: np.ndarray, palette: bool = False) -> bytes:
    """A label map: 16-bit numbers, or indices into a palette."""
    image = Image.fromarray(values)
    if palette:
        image = image.convert("L")
        image.putpalette(np.random.default_rng(0).bytes(768))
    sink = io.BytesIO()
    image.save(sink, "PNG")
    return sink.getvalue()


@dataclass
class RawSample:
    """What was written of one sample, before it became bytes."""

    jpeg: bytes
    seg: np.ndarray
    depth: np.ndarray
    label: int
    intrinsics: np.ndarray
    lidar2cam: np.ndarray


@dataclass
class Joined:
    """A bank, its shards and what they were made of.

    Attributes:
        folder: of ``bank``, ``data`` and ``job.yaml``.
        samples: by key.
    """

    folder: Path
    samples: dict[str, RawSample] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return str(self.folder / "bank")

    @property
    def shards(self) -> list[Path]:
        return sorted((self.folder / "data").glob("*.tar"))

    def open(self) -> Bank:
        return open_bank(self.url)

    def copy(self, folder: Path) -> Joined:
        """Returns it copied, to be damaged."""
        shutil.copytree(self.folder, folder)
        return Joined(folder, self.samples)


def raw_sample(seed: int) -> RawSample:
    rng = np.random.default_rng(seed)
    height, width = 24 + seed % 3, 30 + seed % 4
    rotation = np.eye(4)
    rotation[:3] = [[0, -1, 0, 0.1], [0, 0, -1, 0.2 * seed], [1, 0, 0, -0.3]]
    return RawSample(
        jpeg(seed, height, width),
        rng.integers(0, 4, (height, width), np.uint8),
        rng.integers(0, 2**16, (height // 2, width // 2), np.uint16),
        seed % NUM_CLASSES,
        np.array([[20.0 + seed, 0, width / 2], [0, 21.0, height / 2], [0, 0, 1]]),
        rotation,
    )


def members_of(key: str, sample: RawSample, seed: int) -> list[tuple[str, bytes]]:
    camera = {
        "intrinsics": sample.intrinsics.tolist(),
        "lidar2cam": sample.lidar2cam.tolist(),
    }
    data = sample.jpeg[:100] if key == NO_IMAGE else sample.jpeg
    found = [(f"{key}.jpg", data)]
    if key != NO_LABEL:
        found.append((f"{key}.cls", str(sample.label).encode()))
    points = sweep(seed, 40 + seed % 5)
    found += [
        (f"{key}.bin", points[:-3] if key == NO_SWEEP else points),
        (f"{key}.seg.png", png(sample.seg, palette=True)),
        (f"{key}.depth.png", png(sample.depth)),
        (f"{key}.json", json.dumps({"cam": camera}).encode()),
    ]
    return found


def make_joined(folder: Path) -> Joined:
    joined = Joined(folder)
    seed = 0
    for number, size in enumerate(SHARD_SIZES):
        members = []
        for row in range(size):
            key = f"s{number}-{row:04d}"
            joined.samples[key] = raw_sample(seed)
            members += members_of(key, joined.samples[key], seed)
            seed += 1
        write_tar(folder / "data" / f"train-{number}.tar", members)
    patch = {"from": "body"}
    job = write_job(
        folder,
        dataset={"shards": "./data/*.tar", "license": "cc0-1.0"},
        metadata="json",
        inputs={
            "image": {"kind": "image", "member": "jpg", "calibration": "cam"},
            "lidar": POINTS_INPUT,
        },
        labels={
            "class": {"member": "cls", "num_classes": NUM_CLASSES},
            "number": {"member": "cls"},
        },
        views={"random": 3, "seed": 7, "flip": True, "yaw_deg": 20},
        teachers={
            "net": {
                **NET,
                "sizes": [[16, 16]],
                "batch": 4,
                "outputs": {
                    "logits": {"topk": 3, "temperatures": [1.0, 2.0]},
                    "patch": patch,
                    "layer1": {"from": "stem", "encoding": "half"},
                },
            },
            "brain": {
                **NET,
                "sizes": [[16, 16], [8, 16]],
                "batch": 4,
                "precision": "bfloat16",
                "outputs": {"patch": patch, "logits": {"topk": NUM_CLASSES}},
            },
            "points": {
                **POINTS_TEACHER,
                "on": ["lidar"],
                "outputs": {
                    "pooled": {"from": "output[pooled]", "encoding": "raw"},
                    "logits": {"from": "output[logits]"},
                },
            },
        },
        block_rows=BLOCK_ROWS,
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return joined


def contents(batch: Batch) -> dict[str, np.ndarray]:
    """Everything a batch holds, as arrays of their own memory."""
    found = {
        "at": np.array([batch.epoch, batch.step]),
        "rows": batch.rows.copy(),
        "keys": np.array(batch.keys),
    }
    tensors = {f"inputs/{name}": one for name, one in batch.inputs.items()}
    tensors |= {f"labels/{name}": one for name, one in batch.labels.items()}
    for name, target in batch.targets.items():
        tensors[f"targets/{name}/valid"] = target.valid
        tensors[f"targets/{name}"] = target.values()
        for suffix, array in target.arrays.items():
            is_bfloat16 = array.dtype == torch.bfloat16
            tensors[f"targets/{name}{suffix}:stored"] = (
                array.view(torch.int16) if is_bfloat16 else array
            )
    for name, camera in batch.cameras.items():
        tensors[f"cameras/{name}/intrinsics"] = camera.intrinsics
        tensors[f"cameras/{name}/lidar2cam"] = camera.lidar2cam
    return found | {name: one.numpy().copy() for name, one in tensors.items()}


def assert_equal(
    one: Sequence[dict[str, np.ndarray]], other: Sequence[dict[str, np.ndarray]]
) -> None:
    """Asserts that batches hold the same, bit for bit."""
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name, array in left.items():
            assert array.dtype == right[name].dtype
            np.testing.assert_array_equal(array, right[name], err_msg=name)


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    """The bank and its shards; not to be written to."""
    return make_joined(tmp_path_factory.mktemp("joined"))


@pytest.fixture(scope="module")
def bank(joined: Joined) -> Bank:
    """The bank, opened."""
    return joined.open()


def epoch_of(
    dataset: BankDataset, epoch: int = 0, step: int = 0
) -> list[dict[str, np.ndarray]]:
    """Contents of the batches of an epoch from a step on."""
    return [contents(batch) for batch in dataset.batches(epoch, step)]


def our_threads() -> list[str]:
    """Names of a dataset's threads that run now."""
    names = [one.name for one in threading.enumerate()]
    return [name for name in names if name.startswith(("load", "make"))]


@pytest.fixture
def no_thread_stays() -> Iterator[None]:
    """Asserts that the test leaves none of a dataset's threads behind."""
    yield
    assert our_threads() == []


@pytest.fixture
def remote(joined: Joined) -> Iterator[Any]:
    """The shards in an object store."""
    fs = fsspec.filesystem("memory")
    for path in joined.shards:
        fs.pipe_file(f"/copy/{path.name}", path.read_bytes())
    yield fs
    fs.rm("/copy", recursive=True)
