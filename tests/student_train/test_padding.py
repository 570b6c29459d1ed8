"""Padded grids against the picture they were cut from, and through the loader."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from pipeline.samples.fitting import padded_size
from student_train.dataset import BankDataset
from student_train.padding import spread_picture
from student_train.reading import Reading
from tests.conftest import write_job, write_tar


def _ramp(rows: int, columns: int) -> np.ndarray:
    """A grid whose channels are the centres of its cells, as shares."""
    y, x = np.mgrid[0:rows, 0:columns]
    return np.stack([(y + 0.5) / rows, (x + 0.5) / columns], -1).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    share_y=st.floats(0.2, 1.0),
    share_x=st.floats(0.2, 1.0),
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
)
def test_cells_lie_where_the_picture_has_them(
    share_y: float, share_x: float, rows: int, columns: int
) -> None:
    """A ramp over the frame, read on the picture's grid, is the ramp of the picture."""
    frame = _ramp(16, 16)
    on_picture = (frame[..., 0] < share_y) & (frame[..., 1] < share_x)
    frame[~on_picture] = np.nan
    shares = torch.tensor([[share_y, share_x]])
    found = spread_picture(torch.from_numpy(frame[None]), shares, (rows, columns))[0]
    expected = _ramp(rows, columns) * [share_y, share_x]
    # Beyond the outermost centres the outermost cell holds.
    low, high = 0.5 / 16, np.nanmax(frame.reshape(-1, 2), axis=0)
    np.testing.assert_allclose(found, expected.clip(low, high), atol=1e-5)


def test_rows_do_not_see_each_other_and_missing_rows_stay_missing() -> None:
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.normal(size=(3, 8, 8, 4)).astype(np.float32))
    frames[0, 5:] = torch.nan
    frames[1] = torch.nan
    shares = torch.tensor([[5 / 8, 1.0], [1.0, 1.0], [1.0, 1.0]])
    found = spread_picture(frames, shares, (5, 8))
    assert torch.equal(found[:1], spread_picture(frames[:1], shares[:1], (5, 8)))
    torch.testing.assert_close(found[0], frames[0, :5])
    assert found[1].isnan().all()
    assert found[2].isfinite().all()


def _picture(number: int, width: int, height: int) -> bytes:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


NET = """
from torch import nn


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(4)

    def forward(self, image):
        return self.pool(image)
"""


@pytest.fixture
def padded_bank(tmp_path: Path) -> Path:
    """A bank of pictures of 40 x 20 and 20 x 40, seen padded to 32 x 32."""
    (tmp_path / "net.py").write_text(NET)
    sizes = [(40, 20), (40, 20), (20, 40)]
    members = [
        (f"a{number}.png", _picture(number, *size)) for number, size in enumerate(sizes)
    ]
    write_tar(tmp_path / "s-000.tar", members)
    job = write_job(
        tmp_path,
        dataset={"shards": str(tmp_path / "s-000.tar")},
        inputs={"image": {"kind": "image", "member": "png"}},
        labels={},
        views={"random": 2},
        teachers={
            "net": {
                "model": "module:./net.py:Blocks",
                "weights": "random",
                "sizes": [[32, 32]],
                "preprocess": {"fit": "pad", "interpolation": "bilinear"},
                "outputs": {"patch": {}},
            }
        },
    )
    precompute(load_job(str(job), []))
    return tmp_path


def test_padding_is_missing_in_the_bank_and_gone_when_read(padded_bank: Path) -> None:
    bank = open_bank(str(padded_bank / "bank"))
    path = "net/image/32x32/patch"
    for view in range(3):
        stored = bank.read(path, 0, view)[:3]
        boxes = bank.whole_array("views/image_box")[:3, view]
        dataset = BankDataset(
            bank,
            Reading(targets={"patch": "net/patch"}, normalise=frozenset()),
            batch=3,
            view=view,
            shuffle=False,
        )
        (batch,) = dataset
        values = batch.targets["patch"].values()
        assert values.shape == (3, 4, 8, 3)
        assert values.isfinite().all()
        assert not bank.validity(path)[3:].any()
        for row, box in enumerate(boxes.tolist()):
            rows, columns = padded_size(tuple(box), (32, 32))
            is_picture = np.zeros((8, 8), np.bool_)
            centres = (np.arange(8) + 0.5) * 4
            is_picture[np.ix_(centres < rows, centres < columns)] = True
            np.testing.assert_array_equal(np.isfinite(stored[row, ..., 0]), is_picture)
            # The picture as a teacher without padding would have seen it.
            mean = stored[row][is_picture].mean(0)
            assert np.abs(values[row].mean((0, 1)).numpy() - mean).max() < 0.1
