"""What is read of each row of a bank, checked against the bank before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from manifests.bank import is_logits
from manifests.recipe import Interpolation, MapLabel
from pipeline.bank.open import Bank
from student_train.errors import TrainingError
from student_train.inputs import InputReader, Size
from student_train.order import draw_size
from student_train.targets import TargetSource, find_output


@dataclass(frozen=True)
class Reading:
    """What a batch holds of each row.

    Attributes:
        inputs: image input to its (height, width), or several of which each step draws
            one.
        targets: name to ``<teacher>/<output>`` of the bank.
        labels: labels of the bank.
        maps: label maps that are read from the shards.
        cameras: image inputs whose calibration is wanted.
        normalise: targets that are standardised; all but logits where omitted.
        interpolation: filter of the inputs' resize.
        stored: whether images are the bank's own copies, not those of the shards.
    """

    inputs: Mapping[str, Size | Sequence[Size]] = field(default_factory=dict)
    targets: Mapping[str, str] = field(default_factory=dict)
    labels: Sequence[str] = ()
    maps: Mapping[str, MapLabel] = field(default_factory=dict)
    cameras: Sequence[str] = ()
    normalise: frozenset[str] | None = None
    interpolation: Interpolation = "bicubic"
    stored: bool = False

    def sizes(self, seed: int, epoch: int, step: int) -> dict[str, Size]:
        """Returns (height, width) of each image input in one batch."""
        found: dict[str, Size] = {}
        for name, given in self.inputs.items():
            if isinstance(given[0], int):
                found[name] = cast(Size, given)
            else:
                place = draw_size(len(given), seed, epoch, step)
                found[name] = cast(Size, given[place])
        return found


class OpenedReading:
    """A reading of one bank: arrays that hold a value per row, and how to get the rest.

    Attributes:
        sources: targets by name.
        valid: (num_rows,) bool by target.
        labels: (num_rows,) int64 classes or float32 numbers, by label.
        calibration: by image input, intrinsics (num_rows, 3, 3) and lidar2cam
            (num_rows, 4, 4).
        boxes: by image input that a teacher saw padded, (num_rows, views, 4) boxes.
        reader: decodes samples; None where nothing of the shards is read.
    """

    def __init__(self, bank: Bank, reading: Reading, views: set[int]) -> None:
        """Checks what is read against the bank.

        Args:
            bank: an open bank.
            reading: what is asked.
            views: that will be shown.

        Raises:
            TrainingError: the bank has not what is asked.
            BankError: it cannot be read.
        """
        self._bank, self._reading = bank, reading
        self.sources: dict[str, TargetSource] = {}
        self.valid: dict[str, npt.NDArray[np.bool_]] = {}
        student_input = next(iter(reading.inputs), "")
        for name, source in reading.targets.items():
            path = find_output(bank, source, student_input, f"targets.{name}")
            if lacking := sorted(views - bank.views_of(path)):
                raise TrainingError(
                    f"targets.{name}: {path} must have the views that are shown, it "
                    f"lacks {lacking[:5]}; add them to the bank, or set loader.view"
                )
            chosen = reading.normalise
            output = path.rpartition("/")[2]
            normalise = not is_logits(output) if chosen is None else name in chosen
            self.sources[name] = TargetSource.open(bank, path, normalise)
            self.valid[name] = bank.validity(path)
        padded = [one.padding.input for one in self.sources.values() if one.padding]
        self.boxes = {
            name: bank.whole_array(f"views/{name}_box")
            for name in dict.fromkeys(padded)
        }
        self.labels = {name: self._label(name) for name in reading.labels}
        self._full_sizes = self._find_copies() if reading.stored else {}
        self.reader: InputReader | None = None
        if reading.inputs or reading.maps:
            images = dict.fromkeys(reading.inputs, reading.interpolation)
            self.reader = InputReader(
                bank.record, images, reading.maps, stored=reading.stored
            )
        self.calibration = {name: self._calibration(name) for name in reading.cameras}

    def _find_copies(self) -> dict[str, npt.NDArray[np.int32]]:
        """Returns the size of every row's original image, by input.

        Raises:
            TrainingError: something is read that only shards have.
            BankError: the bank has no copies of an input.
        """
        if self._reading.maps:
            raise TrainingError(
                f"label {next(iter(self._reading.maps))} lies in the shards alone and "
                "cannot be read with `data: {inputs: bank}`; give data.shards, or "
                "leave it out of data.labels"
            )
        for name in self._reading.inputs:
            self._bank.stored_path(name)
        return {
            name: self._bank.whole_array(f"views/{name}_size")
            for name in self._reading.inputs
        }

    def full_sizes(self, row: int) -> dict[str, Size] | None:
        """Returns (height, width) of a row's originals where copies are read."""
        if not self._reading.stored:
            return None
        return {
            name: (int(sizes[row, 0]), int(sizes[row, 1]))
            for name, sizes in self._full_sizes.items()
        }

    def _label(self, name: str) -> npt.NDArray[Any]:
        if name not in self._bank.record.labels:
            held = ", ".join(self._bank.record.labels) or "none"
            raise TrainingError(
                f"label must be one of the bank's ({held}), got {name}; labels that "
                "the bank does not hold go into data.labels"
            )
        values = self._bank.whole_array(f"labels/{name}")
        return values if _is_class(values) else values.astype(np.float32)

    def _calibration(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name not in self._reading.inputs:
            raise TrainingError(
                f"camera must be among the inputs that are read, got {name} of "
                f"{', '.join(self._reading.inputs) or 'none'}; read its image too"
            )
        config = self._bank.record.inputs[name].config
        if not config.get("calibration"):
            raise TrainingError(
                f"input {name} must have calibration in the bank to be used with a bev "
                "head, got none; add `calibration` to the job"
            )
        intrinsics, lidar2cam = (
            self._bank.whole_array(f"calibration/{name}_{kind}")
            for kind in ("intrinsics", "lidar2cam")
        )
        return intrinsics, lidar2cam

    @property
    def map_names(self) -> tuple[str, ...]:
        """Labels that are maps."""
        return tuple(self._reading.maps)

    def usable(self, keys: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Returns which rows hold something to learn and an input to learn it from.

        Args:
            keys: of every row, '' where it is padding.
        """
        asks_nothing = not (self.valid or self.labels)
        found = np.full(len(keys), asks_nothing or bool(self._reading.maps))
        for valid in self.valid.values():
            found |= valid
        for values in self.labels.values():
            found |= values >= 0 if _is_class(values) else ~np.isnan(values)
        found &= keys != ""
        mapped = {one.input for one in self._reading.maps.values() if one.input}
        for name in sorted({*self._reading.inputs, *mapped}):
            found &= (self._bank.whole_array(f"views/{name}_size") > 0).all(axis=1)
        if self._reading.stored:
            for name in self._reading.inputs:
                found &= self._bank.validity(self._bank.stored_path(name))
        return found


def _is_class(values: npt.NDArray[Any]) -> bool:
    return bool(np.issubdtype(values.dtype, np.integer))
