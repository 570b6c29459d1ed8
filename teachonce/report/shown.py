"""The rows that a report shows: which they are, and what their sensors saw in view 0.

Reads the shards as the bank knows them; a shard that is gone or damaged is a line of
text in the row, never the end of the report. Knows no features and no pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import TypeAdapter

from manifests.errors import TeachOnceError
from manifests.inputs import ClipInput, ImageInput, InputConfig, PointsInput
from manifests.recipe import Interpolation
from pipeline.bank.open import Bank
from pipeline.bank.record import view_policy_of
from pipeline.bank.shard_copies import ShardCopies
from pipeline.samples.calibration import Calibration, calibration_for_view, project
from pipeline.samples.clips import decode_clip
from pipeline.samples.errors import SampleError
from pipeline.samples.images import decode_image, resize_view
from pipeline.samples.members import find_member, members_of
from pipeline.samples.points import read_sweep
from pipeline.samples.shards import Sample
from pipeline.samples.views import View, draw_view

Size = tuple[int, int]
Rows = npt.NDArray[np.int64]

#: The evaluation view: no random geometry.
SHOWN_VIEW = 0
#: What a shard or a sample may raise when it is read.
FAULTS = (TeachOnceError, OSError)

_INPUT: TypeAdapter[InputConfig] = TypeAdapter(InputConfig)


@dataclass(frozen=True, eq=False)
class ShownRow:
    """One row of the bank, as its sensors saw it.

    Attributes:
        row: of the bank.
        key: of the sample.
        shard: that it lies in; '' where that is not known.
        view: view 0 of it; None where nothing was read.
        images: upright images by input; of a clip its first frame.
        sweeps: (N, 3) x, y, z in metres by input, in the view.
        calibration: of the full images, where it is known.
        problems: what could not be read, a line each.
    """

    row: int
    key: str
    shard: str = ""
    view: View | None = None
    images: dict[str, Image.Image] = field(default_factory=dict)
    sweeps: dict[str, np.ndarray] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def pixels(
        self, name: str, size_hw: Size, interpolation: Interpolation = "bicubic"
    ) -> npt.NDArray[np.uint8]:
        """Returns view 0 of an image that was read: (height, width, 3)."""
        assert self.view is not None
        box = self.view.boxes[name]
        return resize_view(
            self.images[name], box, self.view.flip, size_hw, interpolation
        )

    def box_size(self, name: str) -> tuple[float, float]:
        """Returns height and width of view 0's box of an image that was read."""
        assert self.view is not None
        x0, y0, x1, y1 = self.view.boxes[name]
        return y1 - y0, x1 - x0

    def camera(self, name: str, size_hw: Size) -> Calibration | None:
        """Returns the calibration of view 0 at a size, None where there is none."""
        if self.view is None or name not in self.calibration:
            return None
        if name not in self.view.boxes:
            return None
        return calibration_for_view(self.calibration[name], self.view, name, size_hw)

    def place_sweep(
        self, sweep: str, image: str, size_hw: Size
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns where a sweep falls in view 0 of an image at a size.

        Returns:
            uv (N, 2) pixels and depth (N,) metres, as ``project`` gives them; of no
            point where there is no calibration.
        """
        camera = self.camera(image, size_hw)
        if camera is None:
            return np.empty((0, 2)), np.empty(0)
        return project(self.sweeps[sweep], camera)


def choose_rows(bank: Bank, rows: Sequence[int] | None, count: int) -> list[int]:
    """Returns up to ``count`` rows, spread evenly; the same for equal arguments.

    Rows that are valid for every output come first; where there are none, those that
    are valid for most.

    Args:
        bank: finalised.
        rows: to choose from; None for all of the bank.
        count: how many.

    Raises:
        BankError: the bank was never finalised, or is damaged.
        ValueError: a row that the bank does not have.
    """
    num_rows = bank.record.num_rows
    asked = np.zeros(num_rows, np.bool_)
    if rows is None:
        for shard in bank.record.shards:
            if not shard.retired:
                first = shard.first_block * bank.record.block_rows
                asked[first : first + shard.samples] = True
    else:
        given = np.asarray(rows, np.int64)
        if len(given) and (given.min() < 0 or given.max() >= num_rows):
            raise ValueError(
                f"rows must be below the bank's {num_rows}, got "
                f"{given.min()} to {given.max()} (report); choose others"
            )
        asked[given] = True
    asked &= bank.keys() != ""
    levels = {path.rpartition("/")[0]: path for path in bank.outputs}
    num_valid = np.zeros(num_rows, np.int64)
    for path in levels.values():
        num_valid += bank.validity(path)
    candidates = np.flatnonzero(asked)
    if not len(candidates):
        return []
    most = num_valid[candidates].max()
    best = candidates[num_valid[candidates] == most]
    taken = min(count, len(best))
    places = ((np.arange(taken) + 0.5) * len(best) / taken).astype(int)
    return [int(row) for row in best[places]]


def read_rows(
    bank: Bank, rows: Sequence[int], shards: Sequence[str] | None
) -> list[ShownRow]:
    """Returns what the sensors of some rows saw; what cannot be read is said in them.

    Args:
        bank: finalised.
        rows: of the bank.
        shards: where the shards lie now; None for where the bank found them.
    """
    keys = bank.keys()
    configs = {
        name: _INPUT.validate_python(entry.config)
        for name, entry in bank.record.inputs.items()
    }
    matrices, without = _matrices(bank, configs)
    found = []
    for row in rows:
        shown = ShownRow(row, str(keys[row]))
        try:
            shown = _read_row(bank, shown, shards, configs)
        except FAULTS as error:
            shown.problems.append(str(error))
        shown.problems.extend(without)
        for name, (intrinsics, lidar2cam) in matrices.items():
            if np.isfinite(intrinsics[row]).all() and np.isfinite(lidar2cam[row]).all():
                one = Calibration(intrinsics[row], lidar2cam[row])
                shown.calibration[name] = one
        found.append(shown)
    return found


def _matrices(
    bank: Bank, configs: Mapping[str, InputConfig]
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], list[str]]:
    """Returns intrinsics and lidar2cam of all rows by input, and what is missing."""
    found, problems = {}, []
    for name, config in configs.items():
        if isinstance(config, ImageInput) and config.calibration:
            path = f"calibration/{name}"
            try:
                found[name] = (
                    bank.whole_array(f"{path}_intrinsics"),
                    bank.whole_array(f"{path}_lidar2cam"),
                )
            except FAULTS as error:
                problems.append(str(error))
    return found, problems


def _read_row(
    bank: Bank,
    shown: ShownRow,
    shards: Sequence[str] | None,
    configs: Mapping[str, InputConfig],
) -> ShownRow:
    row = np.array([shown.row], np.int64)
    block = shown.row // bank.record.block_rows
    # One row at a time: a shard that is gone takes no other row with it.
    copies = ShardCopies(bank, shards, row)
    within = copies.first_row(block) + row % bank.record.block_rows
    members = frozenset(name for one in configs.values() for name in members_of(one))
    reader = copies.open(block, within, members)
    try:
        sample = reader.read(int(within[0]))
    finally:
        reader.close()
    if sample.key != shown.key:
        shown.problems.append(f"the shard has {sample.key!r} in its place")
        return shown
    images, problems = _decode_images(sample, configs)
    shard = copies.shard_of(block).name
    sizes = {name: (image.height, image.width) for name, image in images.items()}
    policy = view_policy_of(bank.record)
    view = draw_view(policy, shard, sample.key, SHOWN_VIEW, sizes)
    sweeps = {}
    for name, config in configs.items():
        if isinstance(config, PointsInput):
            try:
                sweeps[name] = _decode_sweep(sample, config, view)
            except SampleError as error:
                problems.append(f"{name}: {error}")
    return ShownRow(
        shown.row, shown.key, shard, view, images, sweeps, problems=problems
    )


def _decode_images(
    sample: Sample, configs: Mapping[str, InputConfig]
) -> tuple[dict[str, Image.Image], list[str]]:
    images, problems = {}, []
    for name, config in configs.items():
        if isinstance(config, ImageInput):
            try:
                images[name] = decode_image(find_member(sample, members_of(config)))
            except SampleError as error:
                problems.append(f"{name}: {error}")
        elif isinstance(config, ClipInput):
            try:
                images[name] = decode_clip(sample, config)[0]
            except SampleError as error:
                problems.append(f"{name}: {error}")
    return images, problems


def _decode_sweep(sample: Sample, config: PointsInput, view: View) -> np.ndarray:
    """Returns x, y and z of a sweep in the view, (N, 3) float32."""
    sweep = read_sweep(sample, config).in_view(view)
    axes = [sweep.columns.index(axis) for axis in ("x", "y", "z")]
    return sweep.points[:, axes]
