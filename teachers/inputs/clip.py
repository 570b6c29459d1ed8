"""Clips: every frame is taken as an image is, all in the same box.

Shape suffixes: B batch, T frames, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.samples.decoded import Decoded
from pipeline.samples.views import View
from teachers.inputs.image import ImageSpec
from teachers.inputs.spec import InputSpec


@dataclass(frozen=True)
class ClipSpec(InputSpec):
    """How a teacher takes a clip.

    Attributes:
        frame: how it takes each frame.
        num_frames: T.
    """

    frame: ImageSpec
    num_frames: int
    kind: Literal["clip"] = "clip"

    @property
    def row_shape(self) -> tuple[int, ...]:
        """(T, H, W, 3)."""
        return self.num_frames, *self.frame.row_shape

    @property
    def row_dtype(self) -> np.dtype[Any]:
        """That of a frame."""
        return self.frame.row_dtype

    @property
    def geometry(self) -> Hashable:
        """Teachers that differ only in colour arithmetic share their pixels."""
        return ("clip", self.num_frames, self.frame.geometry)

    def prepare(self, value: Decoded, view: View, name: str) -> NDArray[np.generic]:
        """Returns uint8 (T, H, W, 3); see `InputSpec.prepare`."""
        assert isinstance(value, tuple)
        return np.stack([self.frame.prepare(frame, view, name) for frame in value])

    def to_tensor(
        self,
        batch: NDArray[np.generic],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns (B, T, 3, H, W); see `InputSpec.to_tensor`."""
        num, frames = batch.shape[:2]
        flat = batch.reshape(num * frames, *batch.shape[2:])
        images = self.frame.to_tensor(flat, device, dtype)
        return images.reshape(num, frames, *images.shape[1:])

    def missing_cells(
        self,
        batch: NDArray[np.generic],
        shape: tuple[int, ...],
        pool: tuple[int, int],
    ) -> NDArray[np.bool_] | None:
        """Returns cells on padding, the same in all frames; see `InputSpec`."""
        missing = self.frame.missing_cells(batch[:, 0], shape[-3:], pool)
        if missing is None or len(shape) == 3:
            return missing
        return np.repeat(missing[:, None], shape[0], axis=1)

    def blank(self, device: torch.device | str) -> Tensor:
        """Returns zeros (1, T, 3, H, W)."""
        frame = self.frame.blank(device)
        return frame.unsqueeze(1).expand(-1, self.num_frames, -1, -1, -1)
