"""Which formats of sweeps there are, and which one a member has.

A format is one line of `FORMATS`, or an entry point of the group ``teachonce.points``
in another package: ``name = "module:function"``, a function from bytes to a mapping of
column name to a 1-D array of numbers, which raises ValueError where the bytes are no
sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import numpy as np

from manifests.errors import ManifestError
from manifests.inputs import PointsInput
from manifests.suggestions import close_matches
from pipeline.samples.errors import SampleError
from pipeline.samples.feather_files import read_feather
from pipeline.samples.numpy_files import read_npy, read_npz
from pipeline.samples.pcd_files import read_pcd
from pipeline.samples.point_columns import (
    Columns,
    Reader,
    check_bounds,
    check_names,
    rows_as_columns,
)

ENTRY_POINTS = "teachonce.points"


def read_bin(data: bytes, columns: Sequence[str]) -> Columns:
    """Returns columns of rows of little-endian float32: KITTI, nuScenes and others.

    Raises:
        SampleError: ``bad_size`` (no whole number of rows) or ``too_large``.
    """
    row_bytes = 4 * len(columns)
    if len(data) % row_bytes:
        raise SampleError(
            "bad_size",
            f"{len(data)} bytes are no multiple of {row_bytes} "
            f"({len(columns)} float32 columns)",
        )
    check_bounds(len(data) // row_bytes, len(data))
    rows = np.frombuffer(data, "<f4").reshape(-1, len(columns))
    return rows_as_columns(rows, columns)


FORMATS: dict[str, Reader] = {
    "bin": read_bin,
    "npy": read_npy,
    "npz": read_npz,
    "feather": read_feather,
    "pcd": read_pcd,
}


def check_formats(name: str, config: PointsInput) -> None:
    """Checks that every member an input may have is of a format that can be read.

    Raises:
        ManifestError: one is not; says which formats there are.
    """
    members = [config.member] if isinstance(config.member, str) else config.member
    for member in members:
        try:
            find_reader(config, member)
        except ManifestError as error:
            raise ManifestError(f"inputs.{name}.{error}") from error


def find_reader(config: PointsInput, member: str) -> Reader:
    """Returns the reader of a member: of the declared format, or by its extension.

    Raises:
        ManifestError: there is no such format.
    """
    format_name = config.format or member.rpartition(".")[2].lower()
    if format_name in FORMATS:
        return FORMATS[format_name]
    added = _added()
    if format_name in added:
        return _load(format_name)
    known = [*FORMATS, *sorted(added)]
    hint = close_matches(format_name, known)
    if config.format is None:
        raise ManifestError(
            f"format must be given where the member's extension is none of "
            f"{', '.join(known)}, got member {member!r}; add `format: NAME`{hint}"
        )
    raise ManifestError(
        f"format must be one of {', '.join(known)}, got {format_name!r}; install the "
        f"package that adds it (entry point of {ENTRY_POINTS}){hint}"
    )


@cache
def _added() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _load(name: str) -> Reader:
    point = _added()[name]
    try:
        function: Callable[[bytes], Columns] = point.load()
    except (ImportError, AttributeError) as error:
        raise ManifestError(
            f"format {name!r} must be readable by {point.value} (entry point of "
            f"{ENTRY_POINTS}), got {error}; install that package anew"
        ) from error

    def read(data: bytes, columns: Sequence[str]) -> Columns:
        try:
            found = function(data)
        except ValueError as error:
            if isinstance(error, SampleError):
                raise
            raise SampleError(f"bad_{name}", str(error)[:200]) from error
        check_names(columns, found)
        return {column: np.asarray(found[column]) for column in columns}

    return read
