"""Row arrays: what finalise writes per row: keys, validity, views, labels, calibration.

Chunked by 65,536 rows whatever the block size, one object per chunk (and view).
zarr-python makes both the metadata and the objects; they are replaced whole, under the
bank's lock. It is imported when they are made: reading features needs none of it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from crc32c import crc32c

if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore

CHUNK_ROWS = 65_536
_CRC_BYTES = 4


@dataclass(frozen=True)
class RowArray:
    """One array with a line per row: axes (sample[, view], ...).

    Attributes:
        path: inside ``features.zarr``.
        dtype: NumPy name, or ``str``.
        fill: value of rows that are padding or have none.
        row_shape: shape after (sample[, view]).
        dimension_names: of ``row_shape``.
        has_view: whether the second axis is ``view``.
        attributes: JSON values.
    """

    path: str
    dtype: str
    fill: Any
    row_shape: tuple[int, ...] = ()
    dimension_names: tuple[str, ...] = ()
    has_view: bool = False
    attributes: dict[str, Any] = field(default_factory=dict, hash=False)

    def _make(
        self, store: MemoryStore, num_rows: int, num_views: int
    ) -> zarr.Array[Any]:
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec

        views, chunk, names = (
            ((num_views,), (1,), ("view",)) if self.has_view else ((),) * 3
        )
        return zarr.create_array(
            store,
            shape=(num_rows, *views, *self.row_shape),
            chunks=(CHUNK_ROWS, *chunk, *self.row_shape),
            dtype=str if self.dtype == "str" else self.dtype,
            fill_value=self.fill,
            filters=(),
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=("sample", *names, *self.dimension_names),
            attributes=self.attributes,
            config={"write_empty_chunks": True},
            zarr_format=3,
        )

    def metadata(self, num_rows: int, num_views: int) -> bytes:
        """Returns the array's ``zarr.json``."""
        from zarr.storage import MemoryStore

        written: dict[str, Any] = {}
        self._make(MemoryStore(written), num_rows, num_views)
        return json.dumps(
            json.loads(written["zarr.json"].to_bytes()), indent=2
        ).encode()

    def empty(self, num_rows: int, num_views: int) -> np.ndarray:
        """Returns (num_rows[, num_views], *row_shape) full of the fill value."""
        views = (num_views,) if self.has_view else ()
        dtype = np.dtypes.StringDType() if self.dtype == "str" else np.dtype(self.dtype)
        fill = math.nan if self.fill == "NaN" else self.fill
        return np.full((num_rows, *views, *self.row_shape), fill, dtype)

    def object_paths(self, num_rows: int, num_views: int) -> list[str]:
        """Returns the paths of all its objects inside ``features.zarr``."""
        chunks = range(-(-num_rows // CHUNK_ROWS))
        views = range(num_views) if self.has_view else (None,)
        rest = [0] * len(self.row_shape)
        parts = ((chunk, view, *rest) for chunk in chunks for view in views)
        return [
            ".".join([f"{self.path}/c", *(str(x) for x in one if x is not None)])
            for one in parts
        ]

    def objects(self, chunk: int, values: np.ndarray) -> dict[str, bytes]:
        """Returns the objects of one chunk of rows by path inside ``features.zarr``.

        Args:
            chunk: number of the chunk.
            values: (rows[, views], *row_shape), rows at most 65,536.
        """
        from zarr.storage import MemoryStore

        written: dict[str, Any] = {}
        views = values.shape[1] if self.has_view else 1
        array = self._make(MemoryStore(written), CHUNK_ROWS, views)
        array[: len(values)] = values
        found = {}
        for key, data in written.items():
            if not key.startswith("c."):
                continue
            rest = key.split(".")[2:]
            name = ".".join(["c", str(chunk), *rest])
            found[f"{self.path}/{name}"] = data.to_bytes()
        return found


def has_own_crc(data: bytes) -> bool:
    """Whether the last four bytes are the crc32c of the others, as the codec has it."""
    if len(data) < _CRC_BYTES:
        return False
    told = int.from_bytes(data[-_CRC_BYTES:], "little")
    return bool(crc32c(data[:-_CRC_BYTES]) == told)
