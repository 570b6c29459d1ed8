"""Which rows, and what is shown of them: against the raw members and plain NumPy."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from student_train.export import load_student
from teachonce.report.gallery import Gallery, make_gallery
from teachonce.report.grids import read_outputs
from teachonce.report.shown import choose_rows, read_rows
from teachonce.report.student_maps import map_run
from tests.conftest import ROOT, jpeg, sweep
from tests.teachonce.report.conftest import HOSTILE, IMAGE_HW, Made, camera, train

# Of the bank: blocks of 4 rows, shards of 7 and 4 samples.
FIRST_OF_SECOND_SHARD = 8
PATCH, BEV = "net/image/16x32/patch", "birds/lidar/native/bev"
STUDENT = """
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)

    def forward_features(self, image):
        return self.stem(image)
"""


def test_rows_are_valid_and_spread_evenly(made: Made) -> None:
    bank = made.open()
    every = choose_rows(bank, None, 100)
    # Row 1 has a broken image, row 7 is padding.
    assert every == [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert choose_rows(bank, None, 3) == [2, 6, 10]
    assert choose_rows(bank, None, 3) == choose_rows(made.open(), None, 3)
    assert choose_rows(bank, [11, 1, 0], 6) == [0, 11]
    assert choose_rows(bank, [1], 6) == [1]
    assert choose_rows(bank, [7], 6) == []
    with pytest.raises(
        ValueError, match=r"rows must be below the bank's 12, got 0 to 12"
    ):
        choose_rows(bank, [0, 12], 6)


def test_sensors_are_the_members(made: Made) -> None:
    row = FIRST_OF_SECOND_SHARD + 1
    seed = row - 1
    (shown,) = read_rows(made.open(), [row], None)
    assert (shown.key, shown.shard, shown.problems) == ("s1-0001", "train-1.tar", [])
    with Image.open(io.BytesIO(jpeg(seed, *IMAGE_HW))) as image:
        expected = np.asarray(image.convert("RGB"))
    assert (shown.pixels("image", IMAGE_HW) == expected).all()
    points = np.frombuffer(sweep(seed), "<f4").reshape(-1, 4)
    assert (shown.sweeps["lidar"] == points[:, :3]).all()


def test_points_fall_where_the_calibration_says(made: Made) -> None:
    row = 5
    (shown,) = read_rows(made.open(), [row], None)
    size = (72, 100)
    uv, depth = shown.place_sweep("lidar", "image", size)
    matrices = camera(row)
    points = np.frombuffer(sweep(row), "<f4").reshape(-1, 4)[:, :3].astype(float)
    scale = np.array([size[1] / IMAGE_HW[1], size[0] / IMAGE_HW[0]])
    for place, point in enumerate(points):
        in_camera = np.array(matrices["lidar2cam"]) @ np.append(point, 1.0)
        assert depth[place] == pytest.approx(in_camera[2])
        if in_camera[2] > 0:
            pixel = np.array(matrices["intrinsics"]) @ in_camera[:3] / in_camera[2]
            assert uv[place] == pytest.approx(pixel[:2] * scale)
        else:
            assert np.isnan(uv[place]).all()


def test_grids_are_standardised_as_the_bank_says(made: Made) -> None:
    bank = made.open()
    rows = [0, 1, 3, 9]
    patch, bev = read_outputs(bank, rows)
    assert (patch.path, bev.path) == (PATCH, BEV)
    # Row 1 has no image, but a sweep.
    assert list(patch.grids) == [0, 3, 9]
    assert list(bev.grids) == rows
    found = bank.statistics(PATCH)
    std = np.sqrt(found["variance"])
    std = np.maximum(std, 0.01 * np.median(std))
    expected = (bank.read(PATCH, 2, 0)[1] - found["mean"]) / std
    assert np.allclose(patch.grids[9], expected, atol=1e-4)
    assert bev.extent is not None
    assert bev.extent.x_m == (0, 24)


def test_heads_answer_in_the_teachers_space(made: Made) -> None:
    bank, run = made.open(), made.runs["taught"]
    rows = [0, 3, 9]
    shown, outputs = read_rows(bank, rows, None), read_outputs(bank, rows)
    found = map_run("taught", run, bank, shown, outputs)
    assert found.problems == []
    assert set(found.predictions) == {PATCH, BEV}
    student = load_student(run / "student").eval()
    weights = safetensors.torch.load_file(run / "heads.safetensors")
    pixels = torch.from_numpy(
        np.stack([one.pixels("image", (32, 64)) for one in shown])
    )
    with torch.no_grad():
        tokens = student(pixels).patch.numpy().astype(np.float64)
    # The adapter by its formula: linear, layer norm, GELU, linear.
    hidden = tokens @ weights["patch.expand.weight"].numpy().T
    centred = hidden - hidden.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    normed = normed * weights["patch.norm.weight"].numpy()
    normed += weights["patch.norm.bias"].numpy()
    erf = torch.erf(torch.from_numpy(normed / np.sqrt(2))).numpy()
    made_of = (0.5 * normed * (1 + erf)) @ weights["patch.contract.weight"].numpy().T
    # On the teacher's 4 x 8 cells; the student has 2 x 4.
    assert found.predictions[PATCH][0].grid_RKC.shape == (4, 8, 16)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(made_of).permute(0, 3, 1, 2), (4, 8), mode="bicubic"
    ).permute(0, 2, 3, 1)
    for place, row in enumerate(rows):
        grid = found.predictions[PATCH][row].grid_RKC
        assert np.allclose(grid, resized[place].numpy(), atol=1e-4)
        bev = found.predictions[BEV][row]
        assert bev.grid_RKC.shape == (6, 4, 5)
        assert bev.seen_RK is not None
        assert bev.seen_RK.any()
        assert not bev.seen_RK.all()
    cells = np.concatenate([found.grids[row].reshape(-1, 24) for row in rows])
    assert np.allclose(cells.mean(0), 0, atol=1e-5)
    assert np.allclose(cells.std(0), 1, atol=1e-3)


def captions(gallery: Gallery) -> list[str]:
    return [
        figure.caption
        for panel in gallery.panels
        for group in panel.groups
        for figure in group.figures
    ]


def test_everything_is_shown_of_each_row(made: Made) -> None:
    gallery = make_gallery(made.open(), made.runs, [3], None)
    assert gallery.notes == ()
    (panel,) = gallery.panels
    assert (panel.key, panel.row, panel.problems) == (HOSTILE, 3, ())
    found = captions(gallery)
    assert found[0] == "image"
    assert found[1].startswith("lidar on image: ")
    assert found[2] == "teacher net"
    assert found[3].startswith("taught: its head for net, cosine ")
    assert found[4:7] == [
        "taught: 2 x 4 tokens",
        "alone: 2 x 4 tokens",
        "lidar from above",
    ]
    assert found[7] == "teacher birds"
    assert found[8].startswith("taught: its head for birds, cosine ")
    assert len(found) == 9


def test_without_runs_torch_is_not_needed(made: Made, tmp_path: Path) -> None:
    code = (
        "import sys; from teachonce import open_bank\n"
        "from teachonce.report import write_report\n"
        "write_report(sys.argv[2], open_bank(sys.argv[1]), {}, None, title='t', "
        "rows=None)\n"
        "assert not {'torch', 'apache_beam', 'timm'} & set(sys.modules)"
    )
    arguments = [str(made.folder / "bank"), str(tmp_path / "r.html")]
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    found = captions(make_gallery(made.open(), {}, [0], None))
    assert not any("head" in one or "tokens" in one for one in found)


def test_a_student_from_a_file(made: Made, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    (copy.folder / "own.py").write_text(STUDENT)
    student = {"model": f"module:{copy.folder}/own.py:Own", "input": "image"}
    target = {"from": "b/net/patch", "loss": {"cosine": 1.0}}
    run = train(copy.folder, "own", {"patch": target}, student)
    gallery = make_gallery(copy.open(), {"own": run}, [3], None)
    assert gallery.notes == ()
    found = captions(gallery)
    assert "own: 8 x 16 tokens" in found
    assert any(one.startswith("own: its head for net") for one in found)


def test_missing_shards_and_damaged_blocks_are_told(made: Made, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    moved = copy.folder / "moved"
    moved.mkdir()
    (copy.folder / "data" / "train-0.tar").rename(moved / "train-0.tar")
    patterns = [str(moved / "*.tar")]
    features = copy.folder / "bank" / "features.zarr"
    (features / PATCH / "c.0.0.0.0.0").write_bytes(b"nonsense")
    (features / BEV / "c.2.0.0.0.0").unlink()
    gallery = make_gallery(copy.open(), made.runs, [0, 9], patterns)
    first, second = gallery.panels
    # Row 9 lies in a shard of which there is no copy; its features are shown.
    assert any("must have a copy" in one for one in second.problems)
    assert first.problems == ()
    assert any(PATCH in one and "committed" in one for one in gallery.notes)
    assert any(BEV in one and "no object" in one for one in gallery.notes)
    titles = [
        [group.title.split(":")[0] for group in one.groups] for one in (first, second)
    ]
    assert BEV in titles[0]
    assert titles[1] == [PATCH]


def test_runs_without_students_or_of_other_banks_are_told(
    made: Made, tmp_path: Path
) -> None:
    gone = make_gallery(made.open(), {"gone": tmp_path}, [0], None)
    assert any(one.startswith("gone: no student: ") for one in gone.notes)
    run = made.runs["taught"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "student").symlink_to(run / "student")
    text = (run / "run.json").read_text()
    (other / "run.json").write_text(text)
    heads = make_gallery(made.open(), {"other": other}, [0], None)
    assert any("no heads" in one and "is missing" in one for one in heads.notes)
    assert "other: 2 x 4 tokens" in captions(heads)
    (other / "heads.safetensors").symlink_to(run / "heads.safetensors")
    fingerprint = made.open().pass_of(PATCH).fingerprint
    (other / "run.json").write_text(text.replace(fingerprint, "0" * 64))
    refused = make_gallery(made.open(), {"other": other}, [0], None)
    assert any("another pass than this bank's" in one for one in refused.notes)


def test_a_page_stays_small(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teachonce.report.gallery.MAX_BYTES", 1)
    gallery = make_gallery(made.open(), {}, [0, 3, 9], None)
    assert len(gallery.panels) == 1
    assert gallery.notes == ("2 more rows are left out: the page would be too large.",)
