"""What was probably meant, for the end of an error's line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def close_matches(wanted: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean a, b?"`` or, with nothing close, ``""``."""
    found = get_close_matches(wanted, list(known), n=5, cutoff=0.6)
    return f"; did you mean {', '.join(found)}?" if found else ""
