"""Reading a whole array of ``features.zarr``: keys, views, labels, statistics.

zarr-python decodes; but it takes a missing object, and an empty one of a block, for
fill values, and one wrong bit in ``zarr.json`` (the separator of chunk names, a shape)
makes another array. So metadata is compared with what the record makes of it, and every
object must be there.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.arrays import metadata
from pipeline.bank.classifiers import classifier_arrays
from pipeline.bank.row_arrays import has_own_crc
from pipeline.bank.statistic_arrays import statistic_metadata, statistics_of

_READERS = 16
_HINT = "run the same `teachonce precompute` with --repair, it is made anew"
# What zarr-python and its codecs raise at bytes that are not what they should be.
_FAULTS = (
    ArithmeticError,
    AssertionError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def read_whole_array(
    features: Store, record: BankRecord, path: str
) -> npt.NDArray[Any]:
    """Returns a whole array of a bank; what lies beyond its record is left out.

    Args:
        features: the bank's Zarr root, ``features.zarr``.
        record: the bank's.
        path: of the array in it.

    Raises:
        BankError: there is no array of that path, or it is damaged; the file is named.
    """
    import zarr
    from zarr.core.buffer import default_buffer_prototype
    from zarr.storage import MemoryStore

    make = default_buffer_prototype().buffer.from_bytes
    # As the record has it: a bank that grows has longer arrays, and a stranger's may
    # say any length.
    held = {"zarr.json": make(_checked_metadata(features, record, path))}
    array = zarr.open_array(MemoryStore(held), mode="r", zarr_format=3)
    with ThreadPoolExecutor(_READERS) as pool:
        names = _objects(array)
        found = pool.map(lambda name: features.read_or_none(f"{path}/{name}"), names)
        for name, data in zip(names, found, strict=True):
            # zarr takes a missing object, and an empty one of a block, for fill values.
            if not data:
                where = features.url_of(f"{path}/{name}")
                why = "missing" if data is None else "empty"
                raise BankError(f"{where} is {why}; {_HINT}")
            held[name] = make(data)
    try:
        return np.asarray(array[...])
    except _FAULTS as error:
        damaged = [one for one in names if not has_own_crc(held[one].to_bytes())]
        where = features.url_of(f"{path}/{damaged[0]}" if damaged else path)
        told = str(error)[:200] or type(error).__name__
        raise BankError(f"{where} is damaged ({told}); {_HINT}") from error


def _checked_metadata(features: Store, record: BankRecord, path: str) -> bytes:
    """Returns the metadata that a record implies for an array, compared with what is.

    Raises:
        BankError: it is another one, or there is no such array.
    """
    expected = _expected(record, path)
    if expected is None and path in layout.group_paths(record):
        raise BankError(f"{features.url_of(path)} is a group, not an array")
    name = f"{path}/zarr.json"
    if expected is None:
        raise BankError(f"no array {path!r} in {features.url}")
    held = features.read_or_none(name)
    if held is None:
        raise BankError(f"{features.url_of(name)} is missing; {_HINT}")
    try:
        is_same = is_array_of(json.loads(held), json.loads(expected))
    except (RecursionError, TypeError, ValueError) as error:
        raise BankError(f"{features.url_of(name)} is damaged; {_HINT}") from error
    if not is_same:
        raise BankError(
            f"{features.url_of(name)} is damaged: it is not what bank.json implies; "
            f"{_HINT}"
        )
    return expected


def is_array_of(held: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Returns whether metadata describes the array that is expected, or one grown.

    Args:
        held: a ``zarr.json``.
        expected: what it should be, but for attributes and later rows and views.
    """
    rest = {"shape": None, "attributes": None}
    if not isinstance(held, dict) or {**held, **rest} != {**expected, **rest}:
        return False
    shape, least = held.get("shape"), expected["shape"]
    if not isinstance(shape, list) or len(shape) != len(least):
        return False
    names = expected.get("dimension_names") or [""] * len(least)
    return all(
        mine >= other if name in ("sample", "view") else mine == other
        for mine, other, name in zip(shape, least, names, strict=True)
    )


def _expected(record: BankRecord, path: str) -> bytes | None:
    """Returns the metadata that a record implies for an array, None for others."""
    rows, views = record.num_rows, record.num_views
    for array in layout.row_arrays(record):
        if array.path == path:
            return array.metadata(rows, views)
    for spec in layout.feature_arrays(record):
        if spec.path == path:
            return metadata(spec, rows, views)
    for classifier in classifier_arrays(record):
        if classifier.path == path:
            return classifier.metadata()
    level, _, name = path.rpartition("/stats/")
    for output_path, _, output in layout.outputs(record):
        if output_path == f"{level}/{output.name}":
            for what in statistics_of(output):
                if name == f"{output.name}_{what}":
                    return statistic_metadata(output, what)
    return None


def _objects(array: Any) -> list[str]:
    """Returns the names of all objects of an opened array."""
    size = array.shards or array.chunks
    counts = [
        -(-length // chunk) for length, chunk in zip(array.shape, size, strict=True)
    ]
    return [".".join(["c", *map(str, index)]) for index in np.ndindex(*counts)]
