"""The promise of a bank: learning from it is learning from the live teacher.

The same recipe twice through the same loop: from the bank, and with the teacher run on
the raw shards in every step. The live side works in a copy of the bank that has lost
every feature; it keeps what was recorded of views and statistics.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.bank.open import Bank, open_bank
from pipeline.bank.record import view_policy_of
from pipeline.live import load_passes
from pipeline.samples.images import decode_image
from pipeline.samples.shards import RowSpan, index_shard, read_samples
from pipeline.samples.views import draw_view
from student_train import trainer as trainer_module
from student_train.dataset import BankDataset
from student_train.reading import Reading
from tests.training import LOGITS, PATCH, once, plain_bank, trainer_for


@dataclass
class LiveTarget:
    """What a live teacher says of a batch, in the place of what a bank holds."""

    live: torch.Tensor
    valid: torch.Tensor

    def values(self, temperature: float | None = None) -> torch.Tensor:
        assert temperature is None
        return self.live


class LiveTeachers:
    """Every image teacher of a bank, run on rows of its shards."""

    def __init__(self, bank: Bank):
        self.bank, record = bank, bank.record
        self.policy = view_policy_of(record)
        wanted = {one.id: one for one in record.passes if one.inputs == ("image",)}
        self.passes = load_passes(record, list(wanted), "cpu")
        self.samples = {}
        for shard in record.shards:
            rows = index_shard(shard.url).rows
            end = rows[-1].offset + rows[-1].size
            span = RowSpan(0, len(rows), rows[0].offset, end, rows[0].key)
            first = shard.first_block * record.block_rows
            found = read_samples(shard.url, span, frozenset({"jpg"}), sequential=False)
            for row, sample in found:
                self.samples[first + row] = (shard.name, sample)

    def targets(self, paths, rows, views) -> dict[str, LiveTarget]:
        """What the teachers say of rows in their views, by path of the output."""
        found = {}
        for live in self.passes.values():
            for size in live.sizes:
                outputs = self._forward(live, size, rows, views)
                level = f"{live.entry.teacher}/image/{size}"
                for name, values in outputs.items():
                    if (path := f"{level}/{name}") in paths:
                        found[path] = values
        return found

    def _forward(self, live, size, rows, views):
        spec = live.specs[size]["image"]
        pixels = []
        for row, view in zip(rows, views, strict=True):
            shard, sample = self.samples[row]
            image = decode_image(sample.members["jpg"])
            sizes = {"image": (image.height, image.width)}
            drawn = draw_view(self.policy, shard, sample.key, view, sizes)
            pixels.append(spec.prepare(image, drawn, "image"))
        return live.forward(size, {"image": np.stack(pixels)})


def live_loader(bank: Bank, paths: dict[str, str], view, num_rows: list[int]):
    """A loader as the trainer's own, whose targets come from live teachers."""
    teachers = LiveTeachers(bank)

    def load(dataset, workers, epoch=0, step=0):
        reading = Reading(
            inputs=dataset.reading.inputs, interpolation=dataset.reading.interpolation
        )
        # The order is the recipe's; nothing of what teachers said is read.
        inputs = BankDataset(
            bank,
            reading,
            batch=6,
            view=view,
            window_blocks=2,
            seed=0,
            threads=1,
        )
        for batch in inputs.stream(epoch, step):
            num_rows.append(len(batch))
            blocks = batch.rows // bank.record.block_rows
            views = [inputs.view_at(int(block), batch.epoch) for block in blocks]
            values = teachers.targets(set(paths.values()), batch.rows.tolist(), views)
            batch.targets.update(
                {
                    name: LiveTarget(
                        torch.from_numpy(values[path]),
                        torch.ones(len(batch), dtype=torch.bool),
                    )
                    for name, path in paths.items()
                }
            )
            yield batch

    return load


def lose_features(bank: Path) -> int:
    """Removes every object that holds what a teacher said; returns how many."""
    record = open_bank(str(bank)).record
    lost = 0
    for entry in record.passes:
        for output in entry.outputs:
            for spec in output.arrays:
                for one in (bank / "features.zarr" / spec["path"]).glob("c.*"):
                    one.unlink()
                    lost += 1
    return lost


def losses_of(bank: Path, run: Path, overrides, **fields) -> list[tuple[int, float]]:
    losses = []
    trainer = trainer_for(bank, run, *overrides, **fields)
    outcome = trainer.run(lambda one: losses.append((one.position.step, one.loss)))
    assert outcome.is_done
    return losses


COLOURS = {
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "grey": 0.3,
    "blur": 0.5,
    "blur_sigma": [0.01, 0.05],
    "solarize": 0.3,
}
RAW = {"logits": {"encoding": "raw"}, "patch": {"from": "body", "encoding": "raw"}}


@pytest.fixture(scope="module")
def raw_bank(tmp_path_factory):
    def make(folder):
        net = {"model": "module:./nets.py:Net", "weights": "random:1", "batch": 4}
        teachers = {"net": {**net, "sizes": [[16, 16]], "outputs": RAW}}
        return plain_bank(folder, teachers=teachers)

    return once(tmp_path_factory, "raw", make)


@pytest.fixture(scope="module")
def colour_bank(tmp_path_factory):
    """As `raw_bank`, whose random views change colours too."""

    def make(folder):
        net = {"model": "module:./nets.py:Net", "weights": "random:1", "batch": 4}
        teachers = {"net": {**net, "sizes": [[16, 16]], "outputs": RAW}}
        return plain_bank(
            folder, teachers=teachers, views={"random": 2, "photometric": COLOURS}
        )

    return once(tmp_path_factory, "colour", make)


def test_the_same_losses_in_other_colours(colour_bank, raw_bank, tmp_path, monkeypatch):
    same_losses(colour_bank, "epoch", tmp_path, monkeypatch)
    # The comparison is not blind to colours: the geometry of both banks is one.
    monkeypatch.undo()
    colours, plain = (
        losses_of(bank, tmp_path / bank.parent.name, ["loader.view=1"])[0][1]
        for bank in (colour_bank, raw_bank)
    )
    assert colours != pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("view", ["0", "epoch"])
def test_the_same_losses_with_the_live_teacher(view, raw_bank, tmp_path, monkeypatch):
    """Grid and vector, in the evaluation view and in random ones; 6 and 24 rows."""
    same_losses(raw_bank, view, tmp_path, monkeypatch)


def same_losses(raw_bank, view, tmp_path, monkeypatch):
    targets = {
        "patch": {**PATCH, "grid": "teacher"},
        "logits": LOGITS,
        "vector": {
            "from": "main/net/logits",
            "head": {"kind": "linear"},
            "loss": {"mse": 0.5},
        },
    }
    size = {"size": [[20, 20]]}
    fields = {
        "targets": targets,
        "stages": [{"epochs": 2, "batch": 6, "lr": 2e-3, **size}],
    }
    overrides = [f"loader.view={view}"]
    cached = losses_of(raw_bank, tmp_path / "cached", overrides, **fields)
    assert len(cached) == 6

    shutil.copytree(raw_bank, tmp_path / "bare")
    assert lose_features(tmp_path / "bare") > 0
    with pytest.raises(RuntimeError, match="object must have the committed"):
        losses_of(tmp_path / "bare", tmp_path / "broken", overrides, **fields)
    bare = open_bank(str(tmp_path / "bare"))
    paths = {
        "patch": "net/image/16x16/patch",
        "logits": "net/image/16x16/logits",
        "vector": "net/image/16x16/logits",
    }
    num_rows: list[int] = []
    loader = live_loader(bare, paths, 0 if view == "0" else view, num_rows)
    monkeypatch.setattr(trainer_module, "bank_loader", loader)
    live = losses_of(tmp_path / "bare", tmp_path / "live", overrides, **fields)
    assert sum(num_rows[:6]) == 36
    assert [step for step, _ in live] == [step for step, _ in cached]
    np.testing.assert_allclose(
        [loss for _, loss in live], [loss for _, loss in cached], rtol=2e-5
    )


def test_another_view_is_another_loss(raw_bank, tmp_path):
    """The comparison above can tell views apart: it is not blind."""
    found = [
        losses_of(raw_bank, tmp_path / f"view{view}", [f"loader.view={view}"])[0][1]
        for view in (0, 1, 2)
    ]
    assert len({round(loss, 3) for loss in found}) == 3
