"""A bank with a bit of everything to learn from, made once; not to be written to."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from manifests.loading import load_job
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
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


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Joined:
    """The bank and its shards; not to be written to."""
    return make_joined(tmp_path_factory.mktemp("joined"))
