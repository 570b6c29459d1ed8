"""What docs/format.md shows: each encoding's lines decode it without TeachOnce."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from manifests.loading import load_job
from pipeline.bank.encoding import ENCODINGS
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.open import Bank, open_bank
from pipeline.precompute import precompute
from tests.conftest import (
    POINTS_INPUT,
    ROOT,
    TEACHER_FILE,
    jpeg,
    sweep,
    write_job,
    write_tar,
)

TEXT = (ROOT / "docs" / "format.md").read_text()
EACH_POINT = """

class EachPoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 7)

    def forward(self, points_BPC):
        return self.out(points_BPC)
"""
# 35 and 70 channels: the last byte of a cell half empty, the last group short.
NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "args": {"width": 35},
    "on": ["image"],
    "sizes": [[32, 32]],
    "batch": 4,
    "preprocess": {"fit": "pad"},
}
KINDS = {
    "raw": {"patch": {"from": "stem", "encoding": "raw"}},
    "lossless": {"patch": {"from": "stem"}},
    "half": {"patch": {"from": "stem", "encoding": "half"}},
    "compact": {"patch": {"from": "stem", "encoding": "compact"}},
    "tiny": {"patch": {"from": "stem", "encoding": "tiny"}},
    "tiny_even": {"patch": {"from": "body", "encoding": "tiny"}},
    "topk": {"logits": {"topk": 2, "temperatures": [1.0, 4.0]}},
    "topk_all": {"logits": {"topk": 5}},
    "topk_grid": {"logits_map": {"from": "stem", "topk": 3}},
}
# Every encoding of a teacher in float32 and in bfloat16.
OUTPUTS = KINDS | {f"{name}16": outputs for name, outputs in KINDS.items()}


def section(name: str) -> str:
    parts = re.split(r"^#{2,3} (.*)$", TEXT, flags=re.MULTILINE)
    (found,) = (
        text
        for title, text in zip(parts[1::2], parts[2::2], strict=True)
        if name == title or f"`{name}`" in title
    )
    return found


def fences(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """Two shards with bad and padded samples, in two views, in every encoding."""
    folder = tmp_path_factory.mktemp("format")
    sizes = [(20, 60), (60, 20), (30, 30), (21, 64), (24, 24), (2, 200)]
    for shard, count in enumerate((6, 3)):
        members = [("broken.jpg", b"no picture")] if shard else []
        for row, hw in enumerate(sizes[:count]):
            key, seed = f"s{shard}-{row}", 10 * shard + row
            members += [(f"{key}.jpg", jpeg(seed, *hw)), (f"{key}.bin", sweep(seed))]
        write_tar(folder / "data" / f"train-{shard}.tar", members)
    points = {
        "model": "module:./nets.py:EachPoint",
        "weights": "random:4",
        "on": ["lidar"],
        "batch": 4,
        "preprocess": {"points": 80},
        "outputs": {"points": {"from": "output", "layout": "nlc"}},
    }
    precision = {True: "bfloat16", False: "float32"}
    teachers: dict[str, Any] = {
        name: {**NET, "precision": precision[name.endswith("16")], "outputs": outputs}
        for name, outputs in OUTPUTS.items()
    }
    job = write_job(
        folder,
        teachers={**teachers, "points": points},
        labels={},
        inputs={
            "image": {"kind": "image", "member": "jpg", "view0": "full"},
            "lidar": POINTS_INPUT,
        },
        views={"random": 1, "flip": False},
        stored_inputs={"image": {"short_side": 16}},
        limits={"max_invalid_fraction": 1.0},
        block_rows=4,
    )
    (folder / "nets.py").write_text(TEACHER_FILE + EACH_POINT)
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return open_bank(str(folder / "bank"))


def decoded_by_the_lines(
    url: str, path: str, encoding: str, rows: slice, view: int, **changes: str
) -> np.ndarray:
    """What the document's lines make of an output, run with zarr and NumPy alone."""
    level, _, name = path.removesuffix("_index").rpartition("/")
    (opening,) = (one for one in fences(section("Opening it")) if "open_group" in one)
    opening = opening.replace("bank/features.zarr/vit/image/224x224", f"{url}/{level}")
    opening = opening.replace("slice(0, 64), 0", f"{rows}, {view}")
    (lines,) = fences(section(encoding))
    assert len(lines.splitlines()) <= 10
    shown = re.findall(r'level\[f?"([a-z]+)', lines)[0]
    lines = re.sub(rf'(level\[f?"){shown}(?=[_"{{])', rf"\1{name}", lines)
    for before, after in changes.items():
        assert before in lines
        lines = lines.replace(before, after)
    assert "teachonce" not in lines
    assert "pipeline" not in lines
    names: dict[str, Any] = {}
    exec(opening + lines, names)
    result = lines.splitlines()[-1].partition(" = ")[0]
    if "put_along_axis" in result:
        result = "logits"
    found: np.ndarray = names[result]
    return found


def read(bank: Bank, path: str, rows: slice, view: int) -> np.ndarray:
    """What our reader makes of it."""
    blocks = range(bank.record.num_rows // bank.record.block_rows)
    return np.concatenate([bank.read(path, block, view) for block in blocks])[rows]


PATHS = [
    *(f"{name}/image/32x32/{next(iter(one))}" for name, one in OUTPUTS.items()),
    "points/lidar/native/points",
    "points/lidar/native/points_index",
]


def test_every_encoding_is_in_the_bank_and_in_the_document(bank: Bank) -> None:
    assert set(PATHS) == set(bank.outputs)
    passes = bank.record.passes
    held = {one.encoding["encoding"] for entry in passes for one in entry.outputs}
    assert held == set(ENCODINGS)


def test_the_lines_open_the_copies_of_images(
    bank: Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(bank.url).parent)
    (lines,) = fences(section("jpeg"))
    names: dict[str, Any] = {"zarr": zarr, "rows": slice(0, 12)}
    exec(lines, names)
    found = names["images"]
    # Shorter side 16, or the image's own 2; a picture is broken, the rest is padding.
    assert [one and one.size for one in found] == [
        (48, 16), (16, 48), (16, 16), (49, 16), (16, 16), (200, 2), None, None,
        None, (48, 16), (16, 48), (16, 16),
    ]  # fmt: skip
    assert {one.format for one in found if one} == {"JPEG"}


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("path", PATHS)
def test_the_lines_decode_it(bank: Bank, path: str, view: int) -> None:
    entry = bank.output(path)
    # Of three blocks and two shards, invalid rows and padding among them.
    rows = slice(1, 12)
    found = decoded_by_the_lines(
        f"{bank.url}/features.zarr", path, entry.encoding["encoding"], rows, view
    )
    expected = read(bank, path, rows, view)
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.float32 or entry.kind == "index"


@pytest.mark.parametrize("name", ["topk", "topk16"])
def test_the_mass_of_the_others_at_another_temperature(bank: Bank, name: str) -> None:
    path = f"{name}/image/32x32/logits"
    found = decoded_by_the_lines(
        f"{bank.url}/features.zarr", path, "topk", slice(0, 4), 0, **{"1.0": "4.0"}
    )
    encoding = encoding_from_json(bank.output(path).encoding)
    arrays = {
        s: np.asarray(bank.whole_array(path + s))[:4, 0] for s in encoding.suffixes
    }
    expected = encoding.decode(arrays, temperature=4.0)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(expected, encoding.decode(arrays), equal_nan=True)


def test_codes_whose_object_is_gone_are_missing(bank: Bank, tmp_path: Path) -> None:
    """Stock zarr reads fill values there; the scales are still as they were."""
    shutil.copytree(bank.url, tmp_path / "bank")
    url = f"{tmp_path}/bank/features.zarr"
    for name in ("compact", "tiny"):
        path = f"{name}/image/32x32/patch"
        Path(url, path, "c.0.0.0.0.0").unlink()
        found = decoded_by_the_lines(url, path, name, slice(0, 4), 0)
        assert np.isnan(found).all()


def test_it_opens_as_shown(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits agree with their objects; xarray and tensorstore read what zarr does."""
    (check,) = fences(section("Blocks and commits"))
    folder = Path(bank.url).parent
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(check.replace("vit.image", "tiny.image"), names)
    assert len(names["commit"]["content"]["objects"]) == 8
    shown = [
        one.replace("vit/image/224x224", "tiny/image/32x32") for one in fences(TEXT)
    ]
    found = []
    for library in ("import xarray", "import tensorstore"):
        (lines,) = (one for one in shown if library in one)
        names = {}
        exec(lines, names)
        found.append(np.asarray(names["patch"]))
    expected = bank.whole_array("tiny/image/32x32/patch")[:, 0]
    for one in found:
        assert one.dtype == np.uint8
        np.testing.assert_array_equal(one, expected)


def test_the_lines_decode_banks_of_before(tmp_path: Path) -> None:
    """Every schema that there was: the very numbers that its own version read."""
    stored = sorted((ROOT / "tests" / "data" / "banks").glob("schema-*.zip"))
    assert stored
    for number, path in enumerate(stored):
        folder = tmp_path / str(number)
        with zipfile.ZipFile(path) as one:
            one.extractall(folder)
        old, expected = (
            open_bank(str(folder / "bank")),
            np.load(folder / "expected.npz"),
        )
        size = old.record.block_rows
        rows = [
            r for b in old.record.live_blocks for r in range(b * size, (b + 1) * size)
        ]
        for name in expected:
            if name == "keys":
                continue
            output, _, view = name.partition("@")
            found = decoded_by_the_lines(
                f"{old.url}/features.zarr",
                output,
                old.output(output).encoding["encoding"],
                slice(0, old.record.num_rows),
                int(view),
            )
            np.testing.assert_array_equal(found[rows], expected[name], name)
