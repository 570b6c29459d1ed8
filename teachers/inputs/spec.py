"""What every way of taking an input is: from a decoded value in a view to a tensor.

A spec is data, kept in a bank's provenance. It has two halves: `prepare` runs on the
decoding threads and makes one row of NumPy, `to_tensor` runs where the teacher is and
makes a batch of it what the model takes. Teachers whose specs have one `geometry` share
their prepared rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.samples.decoded import Decoded
from pipeline.samples.views import View


@dataclass(frozen=True)
class InputSpec(ABC):
    """How a teacher takes one input."""

    omitted: ClassVar[Mapping[str, Any]] = {}
    """Values of fields that `to_json` leaves out: those that came later."""

    @property
    @abstractmethod
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one prepared row."""

    @property
    @abstractmethod
    def row_dtype(self) -> np.dtype[Any]:
        """Type of a prepared row."""

    @property
    def geometry(self) -> Hashable:
        """What decides the prepared rows: specs that agree on it share them."""
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of one prepared row."""
        return math.prod(self.row_shape) * self.row_dtype.itemsize

    @abstractmethod
    def prepare(self, value: Decoded, view: View, name: str) -> NDArray[np.generic]:
        """Returns one row of a batch, of `row_shape` and `row_dtype`.

        Args:
            value: as decoded; a sweep already lies in the view.
            view: whose box of the input is seen.
            name: of the input.

        Raises:
            SampleError: nothing can be made of it.
        """

    @abstractmethod
    def to_tensor(
        self,
        batch: NDArray[np.generic],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Tensor:
        """Returns what the model takes.

        Args:
            batch: (B, *row_shape) prepared rows.
            device: where the model is.
            dtype: its precision.
        """

    @abstractmethod
    def blank(self, device: torch.device | str) -> Tensor:
        """Returns a float32 batch of one, of the shape that `to_tensor` gives."""

    def missing_cells(
        self,
        batch: NDArray[np.generic],
        shape: tuple[int, ...],
        pool: tuple[int, int],
    ) -> NDArray[np.bool_] | None:
        """Returns which cells of an output show nothing; None where all show something.

        Args:
            batch: (B, *row_shape) prepared rows.
            shape: of the output, (y, x, C) or (t, y, x, C), after pooling.
            pool: cells that are pooled, (y, x).

        Returns:
            (B, y, x) or (B, t, y, x).
        """
        del batch, shape, pool
        return None

    def to_json(self) -> dict[str, Any]:
        """Returns its fields, for provenance."""
        fields = asdict(self)
        return {
            name: value
            for name, value in fields.items()
            if name not in self.omitted or value != self.omitted[name]
        }


def as_tensor(batch: NDArray[np.generic], device: torch.device | str) -> Tensor:
    """Returns prepared rows on a device."""
    if not batch.flags.writeable:
        batch = batch.copy()
    tensor = torch.from_numpy(np.ascontiguousarray(batch))
    return tensor.to(device, non_blocking=True)
