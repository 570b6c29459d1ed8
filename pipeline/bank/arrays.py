"""What one array of a bank looks like on disk, and its Zarr v3 metadata.

Owns ``ArraySpec`` and the bytes of ``zarr.json``, which zarr-python itself makes, so
that they are what stock readers expect. Does not write objects (``objects``) or take
the bank's lock.

zarr-python is imported where metadata is made: reading features needs none of its 0.2
seconds, which each process of a trainer would pay.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from manifests.errors import BankError

if TYPE_CHECKING:
    from zarr.codecs import BloscCodec, ZstdCodec

Codec = Literal["none", "lz4", "zstd"]
Fill = bool | int | float | str

CODECS: tuple[Codec, ...] = ("none", "lz4", "zstd")
LZ4_LEVEL = 5
ZSTD_LEVEL = 1

# Measured: below 256 KiB the cost per chunk dominates, above 1 MiB nothing changes; 4
# MiB still leaves a block of 64 MiB enough chunks to sample from.
_CHUNK_BYTES = 4 * 2**20
_MAX_CHUNK_ROWS = 4096
_DTYPES = frozenset({"bool", "float16", "float32", "float64"}) | {
    f"{sign}{bits}" for sign in ("int", "uint") for bits in (8, 16, 32, 64)
}


@dataclass(frozen=True)
class ArraySpec:
    """One Zarr array of a bank, of axes (sample, view, ...) or (sample, ...).

    Attributes:
        path: the array's path inside ``features.zarr``, such as
            ``dinov3/image/256x256/patch``.
        dtype: NumPy name of the stored type; bfloat16 is stored as ``uint16``.
        row_shape: shape of one row, after (sample, view).
        dimension_names: names of the axes of ``row_shape``.
        block_rows: rows of one object.
        chunk_rows: rows of one inner chunk; divides ``block_rows``.
        codec: ``none``, ``lz4`` (blosc, level 5, bitshuffle) or ``zstd`` (level 1).
        fill: what an absent chunk reads as: the value that means *missing*. A JSON
            value; not-a-number is ``"NaN"``.
        attributes: JSON values kept in the array's metadata.
        has_view: whether the second axis is ``view``.

    Raises:
        BankError: the parts contradict each other.
    """

    path: str
    dtype: str
    row_shape: tuple[int, ...]
    dimension_names: tuple[str, ...]
    block_rows: int
    chunk_rows: int
    codec: Codec
    fill: Fill
    attributes: Mapping[str, Any] = field(default_factory=dict, hash=False)
    has_view: bool = True

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            self._refuse("dtype", f"be one of {sorted(_DTYPES)}", self.dtype)
        if self.codec not in CODECS:
            self._refuse("codec", f"be one of {list(CODECS)}", self.codec)
        if any(length < 1 for length in self.row_shape):
            self._refuse("row_shape", "hold lengths of at least 1", self.row_shape)
        if len(self.dimension_names) != len(self.row_shape):
            self._refuse(
                "dimension_names", f"name {self.row_shape}", self.dimension_names
            )
        if self.chunk_rows < 1 or self.block_rows % self.chunk_rows:
            self._refuse("chunk_rows", f"divide {self.block_rows}", self.chunk_rows)
        try:
            _ = self.fill_value
        except (ValueError, OverflowError, TypeError):
            self._refuse("fill", f"be a value of {self.dtype}", self.fill)

    def _refuse(self, what: str, rule: str, got: object) -> None:
        raise BankError(f"{what} must {rule}, got {got!r} (array {self.path})")

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The stored type, little-endian."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def fill_value(self) -> Any:
        """``fill`` as a NumPy scalar of the stored type."""
        fill = math.nan if self.fill == "NaN" else self.fill
        value = np.dtype(self.dtype).type(fill)
        if not (value == fill or value != value):
            raise ValueError(f"{fill!r} is not a value of {self.dtype}")
        return value

    @property
    def num_chunks(self) -> int:
        """Inner chunks of one object."""
        return self.block_rows // self.chunk_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, before compression."""
        return math.prod(self.row_shape) * self.numpy_dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one inner chunk, before compression."""
        return self.chunk_rows * self.row_bytes

    def to_json(self) -> dict[str, Any]:
        """Returns the spec as JSON values; ``from_json`` gives an equal spec back."""
        data = asdict(self)
        data["row_shape"] = list(self.row_shape)
        data["dimension_names"] = list(self.dimension_names)
        data["attributes"] = dict(self.attributes)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ArraySpec:
        """Returns the spec that ``to_json`` wrote.

        Raises:
            BankError: a field is missing, unknown or contradicts another.
        """
        fields = dict(data)
        try:
            fields["row_shape"] = tuple(fields["row_shape"])
            fields["dimension_names"] = tuple(fields["dimension_names"])
            spec = cls(**fields)
            _check_types(spec)
        except (AttributeError, KeyError, TypeError) as error:
            raise BankError(
                f"array must have the fields of ArraySpec: {error}"
            ) from error
        return spec


def _check_types(spec: ArraySpec) -> None:
    """Raises TypeError where JSON held what compares equal and is not: 2.0, true."""
    for number in (*spec.row_shape, spec.block_rows, spec.chunk_rows):
        if type(number) is not int:
            raise TypeError(f"{number!r} is no length")
    for text in (spec.path, *spec.dimension_names):
        if not isinstance(text, str):
            raise TypeError(f"{text!r} is no name")
    if not isinstance(spec.attributes, Mapping) or type(spec.has_view) is not bool:
        raise TypeError("attributes must be a mapping and has_view a truth value")


def chunk_rows_for(row_bytes: int, block_rows: int) -> int:
    """Returns the rows of an inner chunk: a divisor of ``block_rows`` near 4 MiB.

    It is the largest divisor of at most 4,096 rows whose chunk takes at most 4 MiB, and
    1 where already one row takes more.
    """
    most = max(1, min(_MAX_CHUNK_ROWS, block_rows, _CHUNK_BYTES // max(1, row_bytes)))
    return next(rows for rows in range(most, 0, -1) if block_rows % rows == 0)


def object_name(spec: ArraySpec, block: int, view: int = 0) -> str:
    """Returns the path of one block object, such as ``<path>/c.7.0.0.0.0``."""
    lead = [block, view] if spec.has_view else [block]
    return f"{spec.path}/c." + ".".join(map(str, lead + [0] * len(spec.row_shape)))


def metadata(spec: ArraySpec, num_rows: int, num_views: int) -> bytes:
    """Returns the array's ``zarr.json`` for ``num_rows`` rows and ``num_views`` views.

    Equal arguments give equal bytes. ``num_views`` is ignored where the array has no
    view axis.
    """
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    views = (num_views,) if spec.has_view else ()
    one_view = (1,) if spec.has_view else ()
    names = ("sample", "view") if spec.has_view else ("sample",)
    written: dict[str, Any] = {}
    zarr.create_array(
        MemoryStore(written),
        shape=(num_rows, *views, *spec.row_shape),
        shards=(spec.block_rows, *one_view, *spec.row_shape),
        chunks=(spec.chunk_rows, *one_view, *spec.row_shape),
        dtype=spec.dtype,
        fill_value=spec.fill_value,
        filters=(),
        serializer=BytesCodec(endian="little"),
        compressors=(*_compressors(spec), Crc32cCodec()),
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=(*names, *spec.dimension_names),
        attributes=dict(spec.attributes),
        zarr_format=3,
    )
    return _dump(json.loads(written["zarr.json"].to_bytes()))


def _compressors(spec: ArraySpec) -> tuple[BloscCodec | ZstdCodec, ...]:
    from zarr.codecs import BloscCodec, ZstdCodec

    if spec.codec == "lz4":
        return (
            BloscCodec(
                cname="lz4",
                clevel=LZ4_LEVEL,
                shuffle="bitshuffle",
                typesize=spec.numpy_dtype.itemsize,
            ),
        )
    return (ZstdCodec(level=ZSTD_LEVEL),) if spec.codec == "zstd" else ()


def group_metadata(attributes: Mapping[str, Any]) -> bytes:
    """Returns the ``zarr.json`` of a group with these attributes."""
    import zarr
    from zarr.storage import MemoryStore

    written: dict[str, Any] = {}
    zarr.create_group(MemoryStore(written), attributes=dict(attributes), zarr_format=3)
    return _dump(json.loads(written["zarr.json"].to_bytes()))


def resized(metadata: bytes, num_rows: int, num_views: int) -> bytes:
    """Returns an array's ``zarr.json`` grown to ``num_rows`` rows, ``num_views`` views.

    Nothing but the shape changes: the objects that are there keep their names and
        bytes.

    Raises:
        BankError: the array would shrink, which deletes objects, or the bytes are not
            the metadata of an array.
    """
    try:
        document = json.loads(metadata)
        shape, names = document["shape"], document["dimension_names"]
        has_view = names[1:2] == ["view"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BankError(f"zarr.json must describe an array: {error!r}") from error
    grown = [num_rows, num_views] if has_view else [num_rows]
    if any(new < old for new, old in zip(grown, shape, strict=False)):
        raise BankError(
            f"an array must not shrink, got {grown} from {shape[: len(grown)]}; "
            "read the number of rows and views again, another writer has grown it"
        )
    document["shape"] = [*grown, *shape[len(grown) :]]
    return _dump(document)


def _dump(document: Any) -> bytes:
    # zarr-python's own indent is a setting of the process; the bytes must not be.
    return json.dumps(document, indent=2).encode()
