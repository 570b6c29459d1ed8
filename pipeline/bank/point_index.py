"""The encoding ``index``: which points of a sweep as stored an output speaks of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.bank.arrays import ArraySpec
from pipeline.bank.encoding import AXES, Array, Encoded, Encoding, register
from pipeline.samples.points import NO_POINT


@register("index")
@dataclass(frozen=True, kw_only=True)
class PointIndex(Encoding):
    """Numbers of points in the sweep as stored, uint32."""

    holds_features: ClassVar[bool] = False

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns one uint32 array."""
        axes = tuple(zip(AXES[self.kind], self.shape, strict=True))
        attributes = {"meaning": "number of the point in its sweep as stored"}
        spec = self._spec(
            path, "", block_rows, "uint32", axes, "lz4", NO_POINT, attributes
        )
        return (spec,)

    def _encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        missing_cells: npt.NDArray[np.bool_] | None,
        reuse: bool,
    ) -> Encoded:
        """Returns the numbers; rows that are missing hold `NO_POINT`."""
        if not usable.all():
            values = values if reuse and values.flags.writeable else values.copy()
            values[~usable] = NO_POINT
        return Encoded({"": values}, {})

    def decode(self, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Returns the numbers as float32, exact below 2**24; NaN is no point."""
        values = arrays[""]
        return np.where(values == NO_POINT, np.nan, values).astype(np.float32)
