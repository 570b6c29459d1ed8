"""Whole arrays of ``features.zarr`` other than features: keys, validity, labels, ...

Read by zarr-python, which takes an absent object for fill values and the word of a
``zarr.json`` for how much memory to take: both are checked against the bank's record
first. It is imported when one is read: opening a bank needs none of its 0.2 seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    from zarr.errors import ContainsGroupError, NodeTypeValidationError

    where = features.url_of(path)
    if features.size(f"{path}/zarr.json") is None:
        raise BankError(f"no array {path!r} in {features.url}")
    try:
        array = zarr.open_array(features.url_of(path), mode="r", zarr_format=3)
    except (ContainsGroupError, NodeTypeValidationError) as error:
        raise BankError(f"{where} is a group, not an array") from error
    except _FAULTS as error:
        raise _damaged(f"{where}/zarr.json", error) from error
    _check_shape(array, record, path, where)
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


def _check_shape(
    array: zarr.Array[Any], record: BankRecord, path: str, where: str
) -> None:
    """Raises BankError where an array is not the one that the record speaks of."""
    made = next((one for one in layout.row_arrays(record) if one.path == path), None)
    if made is not None:
        rows, views = record.num_rows, record.num_views
        wanted = made.empty(0, views)
        lead = 2 if made.has_view else 1
        # Rows and views may be more: another run is growing the bank.
        is_long = array.shape[:lead] >= (rows, views)[:lead]
        is_same = len(array.shape) == wanted.ndim and is_long
        is_same &= array.shape[lead:] == wanted.shape[lead:]
        is_same &= np.dtype(array.dtype).kind == wanted.dtype.kind
        rule = f"have {rows} rows of {wanted.dtype} {wanted.shape[lead:]}"
    else:
        # Statistics and classifiers: no axis is longer than there are channels.
        longest = max(_lengths(record))
        is_same = len(array.shape) <= 2 and max(array.shape, default=0) <= longest
        rule = f"have at most 2 axes of at most {longest}"
        spec = next((s for s in layout.feature_arrays(record) if s.path == path), None)
        if spec is not None:
            is_same = array.shape[-len(spec.row_shape) :] == spec.row_shape
            rule = f"have rows of {spec.row_shape}"
    if not is_same:
        raise BankError(
            f"{where} must {rule}, got {array.dtype} {array.shape}; {_HINT}"
        )


def _lengths(record: BankRecord) -> Iterator[int]:
    yield 1
    for _, _, output in layout.outputs(record):
        yield output.shape[-1]
    for classifier in classifier_arrays(record):
        yield from classifier.shape


def _object_names(
    array: zarr.Array[Any], path: str, num_rows: int | None
) -> Iterator[str]:
    shape = array.shape if num_rows is None else (num_rows, *array.shape[1:])
    objects = array.shards or array.chunks
    counts = [-(-one // size) for one, size in zip(shape, objects, strict=True)]
    for index in np.ndindex(*counts):
        yield f"{path}/{'.'.join(['c', *map(str, index)])}"
