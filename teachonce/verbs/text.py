"""How facts are printed: bytes, counts, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.bank.holdings import Missing

_FIRST = 5


def size(number: float) -> str:
    """Returns a number of bytes for people: ``1.53 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 1000 or unit == "TB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.2f} {unit}"
        number /= 1000
    raise AssertionError


def share(value: float | None) -> str:
    """Returns a share for people, ``12.5 %``; nothing for None."""
    return "" if value is None else f"{100 * value:.1f} %"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Returns an aligned text table; numbers are given as text already."""
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def named(names: Sequence[str]) -> str:
    """Returns the first few of many names, and how many more there are."""
    more = len(names) - _FIRST
    return ", ".join(names[:_FIRST]) + (f" and {more:,} more" if more > 0 else "")


def missing_lines(missing: Missing, bank: str = "") -> Iterator[str]:
    """Yields a line for each kind of thing that a bank lacks.

    Args:
        missing: what it lacks.
        bank: which bank, where there are several.
    """
    lead = f"missing  {bank} " if bank else "missing  "
    for name, blocks in missing.blocks.items():
        yield f"{lead}pass {name}: {len(blocks):,} blocks have no commit"
    for what, paths in (
        ("commits", missing.commits),
        ("objects", missing.objects),
        ("files", missing.files),
    ):
        if paths:
            yield f"{lead}{len(paths):,} {what}: {named(paths)}"


def print_json(value: Any) -> None:
    """Prints a value as JSON."""
    print(json.dumps(value, indent=1, default=str))
