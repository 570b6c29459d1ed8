"""How inputs fit the boxes of views: distortion, enlarged views, padding per teacher.

Facts of a plan, from shapes and headers alone. Owns the numbers; `plan` prints them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Any

from manifests.bank import BankRecord, PassEntry
from manifests.inputs import INPUT, PointsInput
from pipeline.bank.layout import level_path
from pipeline.bank.record import view_policy_of
from pipeline.inputs import PROBED_SHARDS, probe_sizes
from pipeline.plan import Plan, probed_shards
from pipeline.samples.fitting import padded_size
from pipeline.samples.views import Box, ViewPolicy, draw_view

LARGEST_DISTORTION = 0.05
"""What has to be asked for, as the logarithm of the ratio of two aspects."""

DRAWS_PER_IMAGE = 64


@dataclass(frozen=True)
class Fit:
    """How one input of a teacher fits the boxes it is given at one size.

    Attributes:
        level: ``<teacher>/<group>/<size>``.
        input: name of the image or clip.
        size: (height, width) of what the model is given, in pixels.
        grids: rows and columns of its outputs that lie on the image.
        fit: what the job says: ``tokens``, ``pad`` or ``squash``; ``sizes`` where it
            gives those alone; ``teacher`` for its own geometry; else ``default``.
        distortion: |log(aspect of view 0's box / aspect of what it fills)|, the median
            of the probed images; None with its own geometry, as all below.
        distortion_max: the largest of them.
        upsampled: share of images of view 0 whose box has fewer pixels than it fills.
        upsampled_random: the same of random views; None where there are none.
        padding: share of the pixels given that are padding, over all views.
    """

    level: str
    input: str
    size: tuple[int, int]
    grids: tuple[tuple[int, int], ...]
    fit: str
    distortion: float | None = None
    distortion_max: float | None = None
    upsampled: float | None = None
    upsampled_random: float | None = None
    padding: float | None = None

    @property
    def is_unasked(self) -> bool:
        """Whether it distorts more than 5 % and the job does not say squash."""
        return (
            self.fit != "squash"
            and self.distortion is not None
            and self.distortion > LARGEST_DISTORTION
        )


def fits_of(plan: Plan) -> list[Fit]:
    """Returns the fits of a plan's passes; reads the headers of a few images."""
    sizes = {}
    for name, entry in plan.record.inputs.items():
        config = INPUT.validate_python(entry.config)
        if not isinstance(config, PointsInput):
            shards = (shard for shard in probed_shards(plan) if shard[2])
            sizes[name] = probe_sizes(islice(shards, PROBED_SHARDS), config)
    return list_fits(plan.record, sizes)


def list_fits(
    record: BankRecord, sizes: Mapping[str, Sequence[tuple[int, int]]]
) -> list[Fit]:
    """Returns the fit of every level and image input of a bank.

    Args:
        record: of the bank.
        sizes: (height, width) of some images by input; inputs without any are left out.
    """
    policy = view_policy_of(record)
    boxes: dict[tuple[str, bool], list[Box]] = {}
    for name, found in sizes.items():
        boxes[name, False] = list(_boxes(policy, name, found, [0]))
        boxes[name, True] = list(_boxes(policy, name, found, range(1, DRAWS_PER_IMAGE)))
    views: dict[str, int] = {}
    first: dict[str, tuple[PassEntry, str]] = {}
    for entry in record.passes:
        if entry.holds_inputs:
            continue
        for size in dict.fromkeys(output.size for output in entry.outputs):
            level = level_path(entry, size)
            first.setdefault(level, (entry, size))
            views[level] = max(views.get(level, 0), entry.last_view)
    return [
        _fit(level, entry, size, name, spec.get("frame", spec), views[level], boxes)
        for level, (entry, size) in first.items()
        for name, spec in entry.provenance["preprocess"][size].items()
        if sizes.get(name)
    ]


def _boxes(
    policy: ViewPolicy,
    name: str,
    sizes: Sequence[tuple[int, int]],
    views: Sequence[int],
) -> Iterator[Box]:
    for number, size in enumerate(sizes):
        for view in views:
            yield draw_view(policy, "", str(number), view, {name: size}).boxes[name]


def _fit(
    level: str,
    entry: PassEntry,
    size: str,
    name: str,
    spec: Mapping[str, Any],
    num_random: int,
    boxes: Mapping[tuple[str, bool], Sequence[Box]],
) -> Fit:
    whole = (int(spec["height"]), int(spec["width"]))
    grids = dict.fromkeys(
        (output.shape[-3], output.shape[-2])
        for output in entry.outputs
        if output.size == size
        and output.kind in ("grid", "frames")
        and output.extent is None
    )
    asked = entry.request.get("preprocess", {}).get("fit")
    fit = asked or ("sizes" if entry.request.get("sizes") else "default")
    if spec.get("own") is not None:
        return Fit(level, name, whole, tuple(grids), "teacher")

    def filled(box: Box) -> tuple[int, int]:
        return padded_size(box, whole) if spec.get("pad") else whole

    def upsampled(some: Sequence[Box]) -> float:
        return _mean([_area(box) < math.prod(filled(box)) for box in some])

    def padding(some: Sequence[Box]) -> float:
        return _mean([1 - math.prod(filled(box)) / math.prod(whole) for box in some])

    fixed, drawn = boxes[name, False], boxes[name, True]
    distortions = [_distortion(box, filled(box)) for box in fixed]
    return Fit(
        level,
        name,
        whole,
        tuple(grids),
        fit,
        distortion=median(distortions),
        distortion_max=max(distortions),
        upsampled=upsampled(fixed),
        upsampled_random=upsampled(drawn) if num_random else None,
        padding=(padding(fixed) + num_random * padding(drawn)) / (1 + num_random),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _distortion(box: Box, filled: tuple[int, int]) -> float:
    aspect = (box[2] - box[0]) / (box[3] - box[1])
    return abs(math.log(aspect * filled[0] / filled[1]))
