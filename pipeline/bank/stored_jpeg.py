"""The encoding ``jpeg``: copies of images, each a JPEG with zeros behind its end.

JPEGs differ in length and an array has one shape, so every row has room for the longest
that is allowed; zstd makes the zeros vanish. Any JPEG decoder takes a row as it is: it
ends at the end-of-image marker. A row belongs to its sample alone, so rows can be
copied without their neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from manifests.errors import BankError
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.encoding import Array, Encoded, Encoding, register, row_numbers

OVER_CAPACITY = "over_capacity"
"""Reason of a row whose image does not fit, whatever its quality."""

START = b"\xff\xd8\xff"
"""First bytes of every JPEG."""


@register("jpeg")
@dataclass(frozen=True, kw_only=True)
class StoredJpeg(Encoding):
    """JPEGs and the quality with which each was made.

    Values that come in are uint8 (rows, 1 + max_bytes): the quality, 0 where no JPEG
    fits, then the JPEG. ``shape`` is (max_bytes,).
    """

    suffixes: ClassVar[tuple[str, ...]] = ("", "_quality")
    holds_features: ClassVar[bool] = False

    def arrays(self, path: str, block_rows: int) -> tuple[ArraySpec, ...]:
        """Returns the JPEGs (sample, byte) and their qualities (sample)."""
        specs = (
            self._spec(
                path,
                "",
                block_rows,
                "uint8",
                (("byte", self.shape[0]),),
                "zstd",
                0,
                {"decode": "a JPEG, zeros behind its end; all zeros are missing"},
            ),
            self._spec(
                path,
                "_quality",
                block_rows,
                "uint8",
                (),
                "zstd",
                0,
                {"meaning": "quality of the row's JPEG, Pillow's scale; 0 is missing"},
            ),
        )
        # A copy is of the sample, whatever its views.
        return tuple(
            ArraySpec.from_json({**spec.to_json(), "has_view": False}) for spec in specs
        )

    def _checked(
        self, values: Array, usable: npt.NDArray[np.bool_]
    ) -> tuple[Array, npt.NDArray[np.bool_]]:
        width = 1 + self.shape[0]
        if values.dtype != np.uint8 or values.shape != (len(usable), width):
            raise BankError(
                f"values of {self.name} must be uint8 ({len(usable)}, {width}), got "
                f"{values.dtype} {values.shape}"
            )
        return values, usable

    def _encode(
        self,
        values: Array,
        usable: npt.NDArray[np.bool_],
        missing_cells: npt.NDArray[np.bool_] | None,
        reuse: bool,
    ) -> Encoded:
        """Returns the JPEGs; a usable row without one is refused."""
        quality, data = values[:, 0].copy(), values[:, 1:].copy()
        none = usable & (quality == 0)
        data[~usable] = 0
        quality[~usable] = 0
        refused = dict.fromkeys(row_numbers(none), OVER_CAPACITY)
        return Encoded({"": data, "_quality": quality}, refused)

    def decode(self, arrays: Mapping[str, Array]) -> npt.NDArray[np.float32]:
        """Refuses: copies of inputs are no features.

        Raises:
            BankError: always.
        """
        raise BankError(
            f"{self.name} holds copies of an input, not features, and has no float32 "
            "values; read them with `Bank.stored_images`"
        )


def jpeg_of(row: npt.NDArray[np.uint8]) -> bytes:
    """Returns the JPEG of a row, b"" where it is missing.

    Args:
        row: (max_bytes,), as stored.
    """
    # A JPEG's last byte is that of a marker, never 0. Its end is looked for in words of
    # 8 bytes: only what is the JPEG's is ever copied.
    whole = len(row) - len(row) % 8
    words = np.flatnonzero(row[:whole].view(np.uint64))
    start = 8 * int(words[-1]) if len(words) else 0
    rest = np.flatnonzero(row[whole:]) + whole
    used = rest if len(rest) else np.flatnonzero(row[start : start + 8]) + start
    return row[: int(used[-1]) + 1].tobytes() if len(used) else b""
