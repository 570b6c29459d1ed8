"""What replaying a view is worth: cached against live features, and the shortcuts.

With real weights, of networks that were trained on such pictures:

    python benchmarks/views.py --cifar TEACHERS 'cifar10-test-00000.tar'
    python benchmarks/views.py --espnet TEACHERS 'driving-nuscenes-percam-00000.tar'

TEACHERS is the folder with ``cifar_resnet.py`` and ``resnet56.pt``, or with
``driving_teachers.py`` and ``espnet-p2q8-cityscapes.pt``. A bank of view 0 and two
random views is made, with and without colour changes; then each row of the table asks
how far what a bank would give lies from what the live teacher says of the picture that
the student sees:

- ``replayed``: the same view on both sides, as TeachOnce does; random views.
- ``mirrored map``: the student's picture is mirrored and the cached map with it.
- the others: view 0's features, while the student alone sees the picture changed, with
  jitter as drawn for brightness, contrast, saturation 0.4 and hue 0.1.

Cosines are of maps standardised by the bank's statistics, the mean over cells; ``worst
row`` is of plain maps, whole. KL(cached || live) is of logits at temperature 4, times
16 as in a loss; of grids of logits per cell. The top class is the same in so many.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from manifests.job import Job
from manifests.views import PhotometricConfig
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.record import view_policy_of
from pipeline.bank.statistics import floored_std
from pipeline.live import LivePass, load_passes
from pipeline.precompute import precompute
from pipeline.samples.images import decode_image
from pipeline.samples.photometric import NUM_DRAWS, Photometric, draw_photometric
from pipeline.samples.shards import RowSpan, index_shard, read_samples
from pipeline.samples.views import View, draw_view

Array = NDArray[Any]
Features = tuple[Array, Array]
"""Maps (N, H, W, C) and logits (N, C) or (N, H, W, C)."""

TEMPERATURE = 4.0
NUM_RANDOM = 2
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "jitter": JITTER,
    "grey": {"grey": 1.0},
    "solarize": {"solarize": 1.0},
    "blur": {"blur": 1.0},
    "all of them": {**JITTER, "grey": 0.2, "blur": 0.5, "solarize": 0.2},
}


@dataclass(frozen=True)
class Case:
    """A network with real weights and the pictures it is asked about."""

    name: str
    shards: str
    member: str
    size: str
    teacher: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """One picture of a bank: where it lies and what its shard holds."""

    row: int
    shard: str
    key: str
    image: Image.Image


def cifar(folder: str, shards: str) -> Case:
    """Returns ResNet-56 on CIFAR-10, 83 % on its test images as JPEG."""
    teacher = {
        "model": f"module:{folder}/cifar_resnet.py:CifarResNet",
        "args": {"depth": 56},
        "weights": f"{folder}/resnet56.pt",
        "sizes": [[32, 32]],
        "preprocess": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
        "outputs": {"logits": {"from": "output"}, "patch": {"from": "layer3"}},
    }
    return Case("ResNet-56, 32 x 32", shards, "jpg", "32x32", teacher)


def espnet(folder: str, shards: str) -> Case:
    """Returns ESPNet on streets, trained on Cityscapes."""
    teacher = {
        "model": f"module:{folder}/driving_teachers.py:CameraSegTeacher",
        "args": {"q": 8},
        "weights": f"{folder}/espnet-p2q8-cityscapes.pt",
        "sizes": [[256, 448]],
        "preprocess": {
            "channels": "bgr",
            "range": 255,
            "mean": [72.3923111, 82.90893555, 73.15840149],
            "std": [45.3192215, 46.15289307, 44.91483307],
            "divide": 255,
        },
        "outputs": {
            "patch": {"from": "encoder[2]"},
            "logits": {"from": "output", "pool": [8, 8]},
        },
    }
    return Case("ESPNet, 256 x 448", shards, "jpg", "256x448", teacher)


def make_bank(case: Case, folder: Path, photometric: dict[str, Any] | None) -> Bank:
    """Returns a bank of view 0 and two random views."""
    fields = {
        "bank": str(folder),
        "dataset": {"shards": case.shards},
        "inputs": {"image": {"kind": "image", "member": case.member}},
        "views": {"random": NUM_RANDOM, "photometric": photometric},
        "teachers": {"net": case.teacher},
        "engine": {"device": "cpu"},
    }
    outcome = precompute(Job.model_validate(fields), quiet=True)
    assert outcome.is_whole
    return open_bank(str(folder))


def pictures(bank: Bank, member: str, most: int) -> Iterator[Seen]:
    """Yields the first pictures of a bank's shards."""
    for shard in bank.record.shards:
        rows = index_shard(shard.url).rows[:most]
        most -= len(rows)
        if not rows:
            return
        end = rows[-1].offset + rows[-1].size
        span = RowSpan(0, len(rows), rows[0].offset, end, rows[0].key)
        first = shard.first_block * bank.record.block_rows
        for row, sample in read_samples(shard.url, span, frozenset({member}), False):
            image = decode_image(sample.members[member])
            yield Seen(first + row, shard.name, sample.key, image)


class Comparison:
    """A bank, its live teacher, and some pictures."""

    def __init__(self, bank: Bank, case: Case, most: int) -> None:
        self.bank, self.case = bank, case
        self.seen = list(pictures(bank, case.member, most))
        self.live: LivePass = load_passes(bank.record, ["net.image"], "cpu")[
            "net.image"
        ]
        self._level = f"net/image/{case.size}"
        found = bank.statistics(f"{self._level}/patch")
        self._mean, self._std = found["mean"], floored_std(found["variance"])

    def cached(self, view: int) -> Features:
        """Returns what the bank holds of the pictures in a view."""
        size = self.bank.record.block_rows
        found = []
        for name in ("patch", "logits"):
            blocks: dict[int, Array] = {}
            rows = []
            for one in self.seen:
                block, offset = divmod(one.row, size)
                if block not in blocks:
                    path = f"{self._level}/{name}"
                    blocks[block] = self.bank.read(path, block, view)
                rows.append(blocks[block][offset])
            found.append(np.stack(rows))
        return found[0], found[1]

    def drawn(self, view: int) -> list[View]:
        """Returns the bank's view of each picture."""
        policy = view_policy_of(self.bank.record)
        return [
            draw_view(
                policy,
                one.shard,
                one.key,
                view,
                {"image": (one.image.height, one.image.width)},
            )
            for one in self.seen
        ]

    def ask(self, views: Sequence[View]) -> Features:
        """Returns what the live teacher says of each picture in a view of its own.

        One picture at a time: the bank's batches are other ones.
        """
        spec = self.live.specs[self.case.size]["image"]
        found = []
        for one, view in zip(self.seen, views, strict=True):
            pixels = spec.prepare(one.image, view, "image")[None]
            found.append(self.live.forward(self.case.size, {"image": pixels}))
        return (
            np.concatenate([one["patch"] for one in found]),
            np.concatenate([one["logits"] for one in found]),
        )

    def line(self, cached: Features, live: Features) -> tuple[float, ...]:
        """Returns standardised cosine, worst row's cosine, KL, share of equal tops."""
        maps = [(one - self._mean) / self._std for one in (cached[0], live[0])]
        rows = [one.reshape(len(one), -1) for one in (cached[0], live[0])]
        logits = [torch.from_numpy(one[1]).double() for one in (cached, live)]
        target, guess = ((one / TEMPERATURE).log_softmax(-1) for one in logits)
        divergence = (target.exp() * (target - guess)).sum(-1).mean()
        same = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
        return (
            float(cosines(*maps).mean()),
            float(cosines(*rows).min()),
            float(divergence) * TEMPERATURE**2,
            float(same),
        )


def cosines(a: Array, b: Array) -> Array:
    """Returns the cosine along the last axis, in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    found: Array = (a * b).sum(-1) / np.maximum(lengths, 1e-30)
    return found


def changed(views: Sequence[View], config: dict[str, Any]) -> list[View]:
    """Returns views whose colours alone are drawn anew."""
    rng = np.random.default_rng(0)
    wanted = PhotometricConfig.model_validate(config)

    def draw() -> Photometric:
        return draw_photometric(wanted, rng.random(NUM_DRAWS).tolist())

    return [replace(view, photometric=draw()) for view in views]


def replayed(comparison: Comparison) -> tuple[float, ...]:
    """Returns the line of the random views as the bank drew them."""
    features = [
        (comparison.cached(view), comparison.ask(comparison.drawn(view)))
        for view in range(1, NUM_RANDOM + 1)
    ]
    cached, live = (
        (
            np.concatenate([one[side][0] for one in features]),
            np.concatenate([one[side][1] for one in features]),
        )
        for side in (0, 1)
    )
    return comparison.line(cached, live)


def measure(case: Case, most: int) -> None:
    """Prints the table of one network."""
    with tempfile.TemporaryDirectory() as folder:
        plain = Comparison(make_bank(case, Path(folder, "plain"), None), case, most)
        lines = [("replayed, geometry", replayed(plain))]
        colours = CHANGES["all of them"]
        bank = make_bank(case, Path(folder, "colour"), colours)
        lines.append(("replayed, with colours", replayed(Comparison(bank, case, most))))
        # View 0 is the whole picture or its centred square: mirrored about its middle.
        maps, logits = plain.cached(0)
        still = plain.drawn(0)
        mirrored = plain.ask([replace(view, flip=True) for view in still])
        is_grid = logits.ndim == 4
        turned = maps[:, :, ::-1], logits[:, :, ::-1].copy() if is_grid else logits
        lines.append(("mirrored map", plain.line(turned, mirrored)))
        for name, config in CHANGES.items():
            answer = plain.ask(changed(still, config))
            lines.append((f"student alone: {name}", plain.line((maps, logits), answer)))
    print(f"\n{case.name}, {len(plain.seen)} pictures of {Path(case.shards).name}")
    print(f"{'':28}{'cosine':>10}{'worst row':>11}{'KL, T = 4':>11}{'same top':>10}")
    for name, (mean, worst, divergence, same) in lines:
        print(f"{name:28}{mean:10.5f}{worst:11.6f}{divergence:11.3g}{same:10.1%}")


def main() -> None:
    """Prints machine, date and a table per network."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cases: dict[str, Callable[[str, str], Case]] = {"cifar": cifar, "espnet": espnet}
    for name in cases:
        parser.add_argument(f"--{name}", nargs=2, metavar=("TEACHERS", "SHARDS"))
    parser.add_argument("--pictures", type=int, default=300)
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in cases if getattr(args, name)}
    if not given:
        parser.error("give --cifar or --espnet: real weights are what it is about")
    day = datetime.now(UTC).date()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
    print(f"{day}, CPU, float32")
    for name, (folder, shards) in given.items():
        where = str(Path(folder).resolve())
        measure(cases[name](where, str(Path(shards).resolve())), args.pictures)


if __name__ == "__main__":
    main()
