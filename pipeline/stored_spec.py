"""How an input is taken that is only copied: decoded once, resized once, as JPEG."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from manifests.bank import PassEntry
from pipeline.group_teachers import NATIVE
from pipeline.samples.decoded import Decoded
from pipeline.samples.stored_images import store_image
from pipeline.samples.views import View
from teachers.inputs.spec import InputSpec


@dataclass(frozen=True)
class StoredImageSpec(InputSpec):
    """A row is the quality of a JPEG, 0 where none fits, then its bytes."""

    short_side: int
    quality: int
    max_bytes: int

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(1 + max_bytes,)."""
        return (1 + self.max_bytes,)

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """Bytes."""
        return np.dtype(np.uint8)

    def prepare(self, value: Decoded, view: View, name: str) -> NDArray[np.generic]:
        """Returns the whole image's copy, whatever the view."""
        assert isinstance(value, Image.Image)
        row = np.zeros(self.row_shape, np.uint8)
        found = store_image(value, self.short_side, self.quality, self.max_bytes)
        if found is not None:
            row[0] = found.quality
            row[1 : 1 + len(found.data)] = np.frombuffer(found.data, np.uint8)
        return row

    def to_tensor(
        self,
        batch: NDArray[np.generic],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Refuses: no model looks at a copy."""
        raise AssertionError("a copy of an input is not given to a model")

    def blank(self, device: torch.device | str) -> Tensor:
        """Refuses: no model looks at a copy."""
        raise AssertionError("a copy of an input is not given to a model")


def stored_specs(entry: PassEntry) -> Mapping[str, Mapping[str, InputSpec]]:
    """Returns how a pass that copies its input takes it, by size and input."""
    (name,) = entry.inputs
    return {NATIVE: {name: StoredImageSpec(**entry.request["args"])}}
