"""From a sample's members to what the student and its labels see in a view.

The geometry is the bank's: the same views, drawn by the same function, resized by the
same code as every teacher's, so that all grids cover the same pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import TypeAdapter

from manifests.bank import BankRecord
from manifests.inputs import ImageInput, InputConfig
from manifests.recipe import Interpolation, MapLabel
from pipeline.bank.record import view_policy_of
from pipeline.samples.calibration import Calibration, calibration_for_view
from pipeline.samples.errors import SampleError
from pipeline.samples.images import decode_image, image_size, resize_view
from pipeline.samples.maps import decode_map, map_in_view
from pipeline.samples.members import find_member, members_of
from pipeline.samples.shards import Sample
from pipeline.samples.stored_images import scale_box
from pipeline.samples.views import View, ViewPolicy, draw_view
from student_train.errors import TrainingError

Size = tuple[int, int]
_INPUT: TypeAdapter[InputConfig] = TypeAdapter(InputConfig)


@dataclass(frozen=True)
class SampleInView:
    """One sample as the student sees it.

    Attributes:
        images: by input, uint8 (H, W, 3).
        maps: by label, int32 (H, W) of class indices, -1 where there is none; or
            float32 of numbers, NaN where there is none.
        calibration: by input, of the view at the input's size.
    """

    images: dict[str, npt.NDArray[np.uint8]] = field(default_factory=dict)
    maps: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    calibration: dict[str, Calibration] = field(default_factory=dict)


class InputReader:
    """Decodes samples of a bank's shards, or its copies of them, into views."""

    def __init__(
        self,
        record: BankRecord,
        images: Mapping[str, Interpolation],
        maps: Mapping[str, MapLabel],
        stored: bool = False,
    ) -> None:
        """Chooses what is decoded.

        Args:
            record: of the bank.
            images: image inputs to the filter of their resize.
            maps: label maps by name.
            stored: whether samples are the bank's copies, whose members are called as
                the inputs are.

        Raises:
            TrainingError: an input that the bank does not have or that is no image.
        """
        self._policy: ViewPolicy = view_policy_of(record)
        self._interpolation = dict(images)
        self._maps = dict(maps)
        asked = {*images, *(one.input for one in maps.values() if one.input)}
        self._configs = {name: image_input(record, name) for name in sorted(asked)}
        self._members = {
            name: (name,) if stored else members_of(one)
            for name, one in self._configs.items()
        }
        members = {member for found in self._members.values() for member in found}
        members |= {one.member.lower() for one in maps.values()}
        self.wanted: frozenset[str] = frozenset(members)

    def read(
        self,
        sample: Sample,
        shard: str,
        view: int,
        sizes: Mapping[str, Size],
        calibration: Mapping[str, Calibration],
        originals: Mapping[str, Size] | None = None,
    ) -> SampleInView:
        """Returns a sample in a view.

        Args:
            sample: its members.
            shard: the bank's name of its shard.
            view: number of the view.
            sizes: (height, width) of each image input.
            calibration: of the full images, for inputs whose calibration is asked.
            originals: (height, width) of the images that the sample's are copies of;
                None where they are the images themselves. Views are of the originals.

        Raises:
            SampleError: a member is missing or cannot be decoded.
        """
        images: dict[str, Image.Image] = {}
        full: dict[str, Size] = {}
        for name, members in self._members.items():
            data = find_member(sample, members)
            if name in self._interpolation:
                images[name] = decode_image(data)
                full[name] = (images[name].height, images[name].width)
            else:
                full[name] = image_size(data)
        whole = full if originals is None else {**full, **originals}
        drawn = draw_view(self._policy, shard, sample.key, view, whole)
        found = SampleInView()
        for name, image in images.items():
            box = drawn.boxes[name]
            if originals is not None:
                box = scale_box(box, whole[name], full[name])
            found.images[name] = resize_view(
                image,
                box,
                drawn.flip,
                sizes[name],
                self._interpolation[name],
                drawn.photometric,
            )
        for name, label in self._maps.items():
            found.maps[name] = self._read_map(sample, name, label, drawn, full, sizes)
        for name, one in calibration.items():
            found.calibration[name] = calibration_for_view(
                one, drawn, name, sizes[name]
            )
        return found

    def _read_map(
        self,
        sample: Sample,
        name: str,
        label: MapLabel,
        drawn: View,
        full: Mapping[str, Size],
        sizes: Mapping[str, Size],
    ) -> npt.NDArray[Any]:
        decoded = decode_map(find_member(sample, (label.member.lower(),)))
        if label.input is None:
            values_HW = np.asarray(decoded, np.int32)
        else:
            values_HW = map_in_view(
                decoded,
                drawn.boxes[label.input],
                full[label.input],
                drawn.flip,
                sizes.get(label.input, (decoded.height, decoded.width)),
            )
        ignored = np.isin(values_HW, label.ignore)
        if label.num_classes is None:
            numbers_HW = values_HW.astype(np.float32) * np.float32(label.scale)
            if label.log:
                ignored |= numbers_HW <= 0
                numbers_HW = np.log(np.where(ignored, 1, numbers_HW))
            return np.where(ignored, np.float32(np.nan), numbers_HW)
        if ((values_HW >= label.num_classes) | (values_HW < 0))[~ignored].any():
            worst = int(values_HW[~ignored].max())
            raise SampleError(
                "label_out_of_range",
                f"label {name}: class {worst} of {label.num_classes}; put values that "
                "are no class into `ignore`",
            )
        return np.where(ignored, np.int32(-1), values_HW)


def image_input(record: BankRecord, name: str) -> ImageInput:
    """Returns the bank's image input of a name.

    Raises:
        TrainingError: it has none, or the input is no image.
    """
    if name not in record.inputs:
        raise TrainingError(
            f"input must be one of the bank's ({', '.join(record.inputs)}), got {name}"
        )
    config = _INPUT.validate_python(record.inputs[name].config)
    if not isinstance(config, ImageInput):
        raise TrainingError(
            f"input must be an image, got {name}, which is {config.kind}; name another "
            "input of the bank"
        )
    return config
