"""The arrays under ``stats/``: which an output has, their metadata and objects.

What they hold is computed by ``output_statistics``. zarr-python makes both metadata and
objects; it is imported when they are made: opening a bank needs none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.bank import OutputEntry

if TYPE_CHECKING:
    import zarr

MAX_COVARIANCE_CHANNELS = 4096
_NO_COVARIANCE = frozenset({"logits"})
_WITHOUT = frozenset({"topk", "index", "jpeg"})
_ALWAYS = ("mean", "variance", "mean_direction", "dispersion", "count")


def statistics_of(output: OutputEntry) -> tuple[str, ...]:
    """Returns the names of an output's statistics; none where it holds no vectors."""
    if output.encoding["encoding"] in _WITHOUT:
        return ()
    is_small = output.shape[-1] <= MAX_COVARIANCE_CHANNELS
    has_covariance = is_small and output.name not in _NO_COVARIANCE
    return (*_ALWAYS, "covariance") if has_covariance else _ALWAYS


def statistic_metadata(output: OutputEntry, what: str) -> bytes:
    """Returns the ``zarr.json`` of one statistic of an output."""
    channels = output.shape[-1]
    shapes = {"dispersion": (), "count": (), "covariance": (channels, channels)}
    written: dict[str, Any] = {}
    dtype = np.dtype(np.int64 if what == "count" else np.float64)
    _create(written, output.name, shapes.get(what, (channels,)), dtype)
    data: bytes = written["zarr.json"].to_bytes()
    return data


def statistic_objects(output: str, values: np.ndarray) -> dict[str, bytes]:
    """Returns the files of one statistic by name, metadata last.

    Args:
        output: name of the output.
        values: of the statistic, float64 or int64.
    """
    written: dict[str, Any] = {}
    _create(written, output, values.shape, values.dtype)[...] = values
    return {key: data.to_bytes() for key, data in sorted(written.items())}


def _create(
    written: dict[str, Any], output: str, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> zarr.Array[Any]:
    import zarr
    from zarr.codecs import Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    return zarr.create_array(
        MemoryStore(written),
        shape=shape,
        chunks=shape,
        dtype=dtype,
        fill_value="NaN" if dtype.kind == "f" else 0,
        filters=(),
        compressors=(ZstdCodec(level=1), Crc32cCodec()),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=[f"{output}_channel", f"{output}_channel_2"][: len(shape)],
        config={"write_empty_chunks": True},
        zarr_format=3,
    )
