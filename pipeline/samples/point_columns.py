"""Columns of a sweep as a file has them: what every reader of a format returns.

Owns the bounds that readers keep before they take memory, and finding columns by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from pipeline.samples.errors import SampleError

Columns = Mapping[str, np.ndarray]
"""Name to (N,) numbers, as stored; N the same for all."""

Reader = Callable[[bytes, Sequence[str]], Columns]
"""From the bytes of a member, and the columns that are wanted, to those columns."""

MAX_POINTS = 2**24
"""Most points of a sweep: numbers of points stay exact in float32."""
MAX_STORED_BYTES = 2**29
"""Most memory that the points of one compressed file may take."""


def check_bounds(num_points: int, num_bytes: int) -> None:
    """Checks what a file says of itself, before memory is taken for it.

    Raises:
        SampleError: ``too_large``, or ``bad_size`` where a count is negative.
    """
    if num_points < 0 or num_bytes < 0:
        raise SampleError("bad_size", f"{min(num_points, num_bytes)} points or bytes")
    if num_points > MAX_POINTS:
        raise SampleError("too_large", f"{num_points} points, at most {MAX_POINTS}")
    if num_bytes > MAX_STORED_BYTES:
        raise SampleError("too_large", f"{num_bytes} bytes, at most {MAX_STORED_BYTES}")


def check_names(wanted: Iterable[str], names: Iterable[str]) -> None:
    """Checks that a file has the wanted columns.

    Raises:
        SampleError: ``missing_column``: it lacks one; says which it has.
    """
    found = list(names)
    for name in wanted:
        if name not in found:
            shown = ", ".join(found)[:200] or "none"
            raise SampleError("missing_column", f"no column {name!r}, it has {shown}")


def rows_as_columns(rows: np.ndarray, columns: Sequence[str]) -> Columns:
    """Returns the columns of an array without names.

    Args:
        rows: (N, C) numbers.
        columns: what each of the C is.

    Raises:
        SampleError: ``bad_size``: another shape.
    """
    if rows.ndim != 2 or rows.shape[1] != len(columns):
        raise SampleError(
            "bad_size",
            f"an array of shape {rows.shape}, must be points x {len(columns)} "
            f"({', '.join(columns)})",
        )
    return {name: rows[:, number] for number, name in enumerate(columns)}
