"""Clips end to end: folders of frames, `pack --clip`, a video teacher, a bank.

What the bank holds is compared with frames cut, mirrored and resized by Pillow from the
numbers that the bank says of its views, and the network run on them in float32.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xarray as xr
import yaml
import zarr
from PIL import Image
from torch import nn

from manifests.bank import Commit
from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from student_train.errors import TrainingError
from teachonce.cli import main
from tests.conftest import bank_identity, jpeg, write_job, write_tar
from tests.training import trainer_for

T, HW, CELLS, WIDTH, NUM_CLASSES = 4, (8, 32), (2, 8), 6, 5
FRAME_HW = (20, 30)
NUM_VIEWS = 3
BLOCK_ROWS = 4
GRID = ("sample", "view", "patch_frame", "patch_y", "patch_x", "patch_channel")

VIDEO_FILE = '''\
"""A small real network over time and space."""
import torch
from torch import nn


class Video(nn.Module):
    def __init__(self, width=6, classes=5):
        super().__init__()
        self.stem = nn.Conv3d(3, width, (3, 4, 4), (1, 4, 4), (1, 0, 0))
        self.mix = nn.Conv3d(width, width, 3, 1, 1)
        self.head = nn.Linear(width, classes)

    def forward(self, clip_BTCHW):
        x = torch.relu(self.stem(clip_BTCHW.transpose(1, 2)))
        x = self.mix(x)
        frames_BTCHW = x.transpose(1, 2)
        tokens = frames_BTCHW.permute(0, 1, 3, 4, 2).flatten(1, 3)
        return {
            "cls": self.head(x.mean((2, 3, 4))),
            "frames": frames_BTCHW,
            "tokens": tokens,
        }
'''


class Video(nn.Module):
    """The network of the file, written a second time, by formulas of its own."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, WIDTH, (3, 4, 4))
        self.mix = nn.Conv3d(WIDTH, WIDTH, 3)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, clip_THW3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns cls (classes) and patch (T, rows, columns, C) of one clip."""
        x = np.moveaxis(clip_THW3, -1, 0).astype(np.float64)
        x = np.maximum(self._convolve(x, self.stem, (1, 4, 4), (1, 0, 0)), 0)
        x = self._convolve(x, self.mix, (1, 1, 1), (1, 1, 1))
        weight, bias = (one.detach().double().numpy() for one in self.head.parameters())
        return weight @ x.mean((1, 2, 3)) + bias, np.moveaxis(x, 0, -1)

    @staticmethod
    def _convolve(x, layer, stride, padding):
        kernel = layer.weight.detach().double().numpy()
        x = np.pad(x, [(0, 0), *((one, one) for one in padding)])
        windows = np.lib.stride_tricks.sliding_window_view(
            x, kernel.shape[2:], axis=(1, 2, 3)
        )[:, :: stride[0], :: stride[1], :: stride[2]]
        found = np.einsum("cthwxyz,ocxyz->othw", windows, kernel)
        return found + layer.bias.detach().double().numpy()[:, None, None, None]


def frame_files(folder: Path) -> None:
    """Three folders of 11, 9 and 3 frames; two are cut into clips of 4, every 2."""
    for number, (name, count) in enumerate({"a": 11, "b.x": 9, "short": 3}.items()):
        for frame in range(count):
            path = folder / name / f"{frame}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(100 * number + frame, *FRAME_HW))


def video_job(folder: Path, **fields) -> Path:
    (folder / "video.py").write_text(VIDEO_FILE)
    teacher = {
        "model": "module:./video.py:Video",
        "weights": "random:7",
        "sizes": [list(HW)],
        "batch": 2,
        "preprocess": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]},
        "outputs": {
            "cls": {"from": "output[cls]"},
            "patch": {"from": "output[frames]"},
            "layer1": {
                "from": "output[tokens]",
                "layout": "nlc",
                "grid": [T, *CELLS],
                "encoding": "half",
            },
        },
    }
    fields = {
        "inputs": {
            "clip": {"kind": "clip", "member": "jpg", "frames": T, "view0": "full"}
        },
        "labels": {},
        "views": {"random": NUM_VIEWS - 1},
        "block_rows": BLOCK_ROWS,
        "teachers": {"video": teacher},
        **fields,
    }
    return write_job(folder, **fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with frames, the shards that `pack` made of them, a job and its bank."""
    folder = tmp_path_factory.mktemp("video")
    frame_files(folder / "frames")
    packing = ["pack", folder / "frames", folder / "data", "--prefix", "train"]
    packing += ["--clip", T, "--stride", 1, "--every", 2, "--samples-per-shard", 5]
    assert main([str(one) for one in packing]) == 0
    assert len(list((folder / "data").glob("*.tar"))) == 2
    job = video_job(folder)
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder


@pytest.fixture(scope="module")
def bank(folder):
    return open_bank(str(folder / "bank"))


def seen(files: list[Path], box: np.ndarray, flip: bool) -> np.ndarray:
    """Frames in a box at the teacher's size, (T, H, W, 3) uint8, by Pillow."""
    found = []
    for path in files:
        image = Image.open(path).convert("RGB")
        size = (HW[1], HW[0])
        image = image.resize(size, Image.Resampling.BILINEAR, box=tuple(box))
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        found.append(np.asarray(image))
    return np.stack(found)


def clips(folder: Path) -> dict[str, list[Path]]:
    """Key to the files of its frames, said anew."""
    return {
        f"{name}/{start:06d}": [
            folder / "frames" / name / f"{start + k}.jpg" for k in range(T)
        ]
        for name, count in {"a": 11, "b.x": 9}.items()
        for start in range(0, count - T + 1, 2)
    }


def test_every_view_of_every_clip_is_what_the_network_says(folder, bank):
    torch.manual_seed(7)
    network = Video()
    keys = bank.keys()
    boxes = bank.whole_array("views/clip_box")
    flips = bank.whole_array("views/flip")
    expected_keys = clips(folder)
    assert sorted(key for key in keys if key) == sorted(expected_keys)
    flipped = set()
    for row in np.flatnonzero(keys != ""):
        for view in range(NUM_VIEWS):
            box, flip = boxes[row, view], bool(flips[row, view])
            flipped.add(flip)
            pixels = seen(expected_keys[keys[row]], box, flip) / 255.0
            normal = (pixels - [0.4, 0.5, 0.6]) / [0.2, 0.25, 0.3]
            cls, patch = network(normal)
            block, offset = divmod(int(row), BLOCK_ROWS)
            level = f"video/clip/{HW[0]}x{HW[1]}"
            stored = {
                name: bank.read(f"{level}/{name}", block, view)[offset]
                for name in ("cls", "patch", "layer1")
            }
            np.testing.assert_allclose(stored["cls"], cls, atol=1e-5)
            np.testing.assert_allclose(stored["patch"], patch, atol=1e-5)
            np.testing.assert_allclose(stored["layer1"], patch, atol=2e-3)
    assert flipped == {False, True}
    whole = [0, 0, FRAME_HW[1], FRAME_HW[0]]
    assert (boxes[keys != "", 0] == whole).all()


def test_others_open_it(folder, bank):
    path = f"video/clip/{HW[0]}x{HW[1]}"
    url = str(folder / "bank/features.zarr")
    group = zarr.open_group(url, mode="r")[path]
    opened = xr.open_zarr(url, group=path, consolidated=False)
    assert opened["patch"].dims == GRID
    assert opened["patch"].shape[1:] == (NUM_VIEWS, T, *CELLS, WIDTH)
    assert opened["cls"].dims == ("sample", "view", "cls_channel")
    assert opened["layer1"].dims[2:5] == ("layer1_frame", "layer1_y", "layer1_x")
    for view in range(NUM_VIEWS):
        ours = bank.read(f"{path}/patch", 1, view)
        rows = slice(BLOCK_ROWS, 2 * BLOCK_ROWS)
        np.testing.assert_array_equal(np.asarray(group["patch"][rows, view]), ours)
        np.testing.assert_array_equal(opened["patch"].values[rows, view], ours)
    sizes = zarr.open_group(url, mode="r")["views/clip_size"][:]
    assert (sizes[bank.keys() != ""] == FRAME_HW).all()


def test_statistics_are_those_of_cells_of_all_frames(folder, bank):
    path = f"video/clip/{HW[0]}x{HW[1]}"
    found = bank.statistics(f"{path}/patch")
    group = zarr.open_group(str(folder / "bank/features.zarr"), mode="r")[path]
    cells = np.asarray(group["patch"][:, 0], np.float64)[bank.keys() != ""]
    assert found["count"] == 64 * len(cells)
    everything = cells.reshape(-1, WIDTH)
    np.testing.assert_allclose(found["mean"], everything.mean(0), atol=1e-6)
    np.testing.assert_allclose(found["variance"], everything.var(0, ddof=0), rtol=1e-2)
    assert np.abs(cells[:, 0].mean((0, 1, 2)) - everything.mean(0)).max() > 1e-3
    cls = np.asarray(group["cls"][:, 0], np.float64)[bank.keys() != ""]
    np.testing.assert_allclose(
        bank.statistics(f"{path}/cls")["mean"], cls.mean(0), atol=1e-6
    )


def test_it_is_sound_and_goes_on_where_it_was_stopped(folder, tmp_path):
    whole = folder / "bank"
    assert verify(*open_record(str(whole)), full=True).is_sound
    halted = tmp_path / "bank"
    shutil.copytree(whole, halted)
    lost = sorted(halted.glob("commits/video.clip/*.json"))[1:]
    assert lost
    for path in lost:
        for name in json.loads(path.read_text())["content"]["objects"]:
            (halted / name).unlink()
        path.unlink()
    job = load_job(str(folder / "job.yaml"), [f"bank={halted}"])
    outcome = precompute(job, quiet=True)
    assert outcome.is_whole
    assert bank_identity(halted) == bank_identity(whole)


def test_plan_info_and_report_know_clips(folder, tmp_path, capsys):
    assert main(["plan", str(folder / "job.yaml"), "--json"]) == 0
    assert "clip" in capsys.readouterr().out
    assert main(["plan", str(folder / "job.yaml"), f"bank={tmp_path}/new"]) == 0
    assert main(["info", str(folder / "bank")]) == 0
    assert f"video/clip/{HW[0]}x{HW[1]}" in capsys.readouterr().out
    page = tmp_path / "report.html"
    assert main(["report", str(folder / "bank"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "View 0 of clip" in text
    assert "data:image/jpeg" in text


def clip_members(key: str, seed: int, **changes) -> list[tuple[str, bytes]]:
    members = {f"{k:03d}.jpg": jpeg(seed + k, *FRAME_HW) for k in range(T)}
    members |= changes
    return [(f"{key}.{name}", data) for name, data in members.items() if data]


def test_a_broken_frame_takes_its_clip_alone(tmp_path):
    png = io.BytesIO()
    Image.new("RGB", (30, 20)).save(png, "PNG")
    broken = {
        "k1": ({"002.jpg": None}, "clip:missing", "frame 2: no member .002.jpg"),
        "k3": ({"000.jpg": b"\xff\xd8 no"}, "clip:undecodable", "frame 0: "),
        "k5": (
            {"003.jpg": jpeg(9, 20, 31)},
            "clip:frame_sizes",
            "must be of one size, got 30 x 20, 31 x 20",
        ),
        "k6": (
            {"001.jpg": None, "001.png": png.getvalue()},
            "clip:missing",
            "frame 1: no member .001.jpg",
        ),
    }
    members = []
    for row in range(8):
        changes = broken.get(f"k{row}", ({},))[0]
        members += clip_members(f"k{row}", 10 * row, **changes)
    write_tar(tmp_path / "data/train-0.tar", members)
    # An untouched twin of each sound clip, to compare with.
    twin = tmp_path / "twin"
    whole = [m for row in range(8) for m in clip_members(f"k{row}", 10 * row)]
    write_tar(twin / "data/train-0.tar", whole)
    limits = {"limits": {"max_invalid_fraction": 1.0}}
    for place in (tmp_path, twin):
        job = load_job(str(video_job(place, **limits)))
        assert precompute(job, quiet=True).is_whole
    bank, sound = (open_bank(str(place / "bank")) for place in (tmp_path, twin))
    keys = bank.keys()
    path = f"video/clip/{HW[0]}x{HW[1]}/patch"
    valid = bank.validity(path)
    assert {key for key in keys[~valid] if key} == set(broken)
    facts = [
        why
        for one in sorted((tmp_path / "bank/rows").rglob("*.parquet"))
        for why in pq.read_table(one)["clip.reason"].to_pylist()
    ]
    invalid: dict[str, list[int]] = {}
    for one in sorted((tmp_path / "bank/commits/video.clip").glob("*.json")):
        content = Commit.model_validate_json(one.read_text()).content
        for code, rows in content.invalid.items():
            first = content.block * BLOCK_ROWS
            invalid.setdefault(code, []).extend(first + row for row in rows)
    for key, (_, code, detail) in broken.items():
        row = int(np.flatnonzero(keys == key)[0])
        assert detail in facts[row]
        assert row in invalid[code]
    for block in range(2):
        here = valid[block * BLOCK_ROWS :][:BLOCK_ROWS]
        for view in range(NUM_VIEWS):
            found = bank.read(path, block, view)
            assert np.isnan(found[~here]).all()
            np.testing.assert_array_equal(
                found[here], sound.read(path, block, view)[here]
            )


def test_no_student_learns_from_a_clip_or_from_frames(folder, tmp_path):
    head = {"head": {"kind": "linear"}, "loss": {"cosine": 1.0}}
    fields = {"student": {"model": "timm:test_vit", "input": "clip"}}
    target = {"from": "main/video/cls", **head}
    with pytest.raises(
        TrainingError, match="must be an image, got clip, which is clip"
    ):
        trainer_for(folder / "bank", tmp_path / "a", targets={"t": target}, **fields)
    image = {"kind": "image", "member": "000.jpg", "view0": "full"}
    clip = {"kind": "clip", "member": "jpg", "frames": T, "view0": "full"}
    shutil.copytree(folder / "data", tmp_path / "data")
    inputs = {"clip": clip, "image": image}
    teachers = yaml.safe_load((folder / "job.yaml").read_text())["teachers"]
    teachers["video"]["on"] = ["clip"]
    job = video_job(tmp_path, inputs=inputs, teachers=teachers)
    assert precompute(load_job(str(job)), quiet=True).is_whole
    fields = {"student": {"model": "timm:test_vit", "input": "image"}}
    target = {"from": "main/video/patch", **head}
    match = "must lead to a vector or a grid, got .*/patch of kind frames"
    with pytest.raises(TrainingError, match=match):
        trainer_for(tmp_path / "bank", tmp_path / "b", targets={"t": target}, **fields)
