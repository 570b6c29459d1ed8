"""Whole arrays of ``features.zarr`` other than features: keys, validity, labels, ...

Read by zarr-python, which takes an absent object for fill values and the word of a
``zarr.json`` for how much memory to take: both are checked against the bank's record
first. It is imported when one is read: opening a bank needs none of its 0.2 seconds.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.classifiers import classifier_arrays

if TYPE_CHECKING:
    import zarr

# What zarr-python and its codecs raise at bytes that are not what they should be.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Axes of channels that each kind of statistics has.
_STATISTICS = {
    "mean": 1,
    "variance": 1,
    "covariance": 2,
    "mean_direction": 1,
    "dispersion": 0,
    "count": 0,
}
_HINT = "run the same `teachonce precompute` with --repair, it is made anew"


def read_whole(features: Store, record: BankRecord, path: str) -> npt.NDArray[Any]:
    """Returns a whole array of ``features.zarr``: ``key``, ``labels/class``, ...

    Args:
        features: ``features.zarr``.
        record: of the bank; says how many rows there are.
        path: of the array.

    Raises:
        BankError: there is none of that path, or it is damaged or another one than the
            record says.
    """
    import zarr

    where = features.url_of(path)
    wanted = _wanted(record, path)
    if wanted is None and path in layout.group_paths(record):
        raise BankError(f"{where} is a group, not an array")
    if wanted is None or features.size(f"{path}/zarr.json") is None:
        raise BankError(f"no array {path!r} in {features.url}")
    try:
        array = zarr.open_array(features.url_of(path), mode="r", zarr_format=3)
    except _FAULTS as error:
        raise _damaged(f"{where}/zarr.json", error) from error
    _check_shape(array, wanted, where)
    names = array.metadata.dimension_names or ("",)  # type: ignore[union-attr]
    # A bank that grows has longer arrays than its record says.
    num_rows = record.num_rows if names[:1] == ("sample",) else None
    for name in _object_names(array, path, num_rows):
        if features.size(name) is None:
            raise BankError(f"{features.url_of(name)} is missing; {_HINT}")
    try:
        return np.asarray(array[...] if num_rows is None else array[:num_rows])
    except _FAULTS as error:
        raise _damaged(where, error) from error


def _damaged(where: str, error: BaseException) -> BankError:
    told = str(error)[:200] or type(error).__name__
    return BankError(f"{where} is damaged ({told}); {_HINT}")


@dataclass(frozen=True)
class _Wanted:
    """What the record says of an array.

    Attributes:
        lead: least lengths of its first axes: rows, and views where it has them.
        rest: lengths of the others.
        kinds: NumPy's kinds of type that it may have.
    """

    lead: tuple[int, ...]
    rest: tuple[int, ...]
    kinds: str


def _check_shape(array: zarr.Array[Any], wanted: _Wanted, where: str) -> None:
    """Raises BankError where an array is not the one that the record speaks of."""
    lead = len(wanted.lead)
    # Rows and views may be more: another run is growing the bank.
    is_long = all(map(operator.ge, array.shape[:lead], wanted.lead))
    is_same = len(array.shape) >= lead and array.shape[lead:] == wanted.rest
    kind = np.dtype(array.dtype).kind
    if not (is_long and is_same and kind in wanted.kinds):
        raise BankError(
            f"{where} must be of shape {(*wanted.lead, *wanted.rest)} or longer, got "
            f"{array.dtype} of {array.shape}; {_HINT}"
        )


def _wanted(record: BankRecord, path: str) -> _Wanted | None:
    """Returns what the record says of an array, None where it knows of none there."""
    rows, views = record.num_rows, record.num_views
    for made in layout.row_arrays(record):
        if made.path == path:
            kind = made.empty(0, views).dtype.kind
            lead = (rows, views) if made.has_view else (rows,)
            return _Wanted(lead, made.row_shape, kind)
    for spec in layout.feature_arrays(record):
        if spec.path == path:
            lead = (rows, views) if spec.has_view else (rows,)
            return _Wanted(lead, spec.row_shape, spec.numpy_dtype.kind)
    for classifier in classifier_arrays(record):
        if classifier.path == path:
            return _Wanted((), classifier.shape, "f")
    for output_path, _, output in layout.outputs(record):
        level, _, name = output_path.rpartition("/")
        for what, num_axes in _STATISTICS.items():
            if path == f"{level}/stats/{name}_{what}":
                return _Wanted((), (output.shape[-1],) * num_axes, "fiu")
    return None


def _object_names(
    array: zarr.Array[Any], path: str, num_rows: int | None
) -> Iterator[str]:
    shape = array.shape if num_rows is None else (num_rows, *array.shape[1:])
    objects = array.shards or array.chunks
    counts = [-(-one // size) for one, size in zip(shape, objects, strict=True)]
    for index in np.ndindex(*counts):
        yield f"{path}/{'.'.join(['c', *map(str, index)])}"
