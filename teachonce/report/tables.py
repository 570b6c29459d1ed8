"""Tables of text, as facts are handed to the page."""

from __future__ import annotations

from dataclasses import dataclass

#: Where there is nothing to say.
NONE = "–"


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        head: of the columns.
        rows: a text per column each.
        numbers: columns that hold numbers.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()
