"""Parts that other installed packages bring, by entry point."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import entry_points

from manifests.errors import ManifestError
from manifests.suggestions import close_matches


def load_part(
    group: str, name: str, known: Iterable[str], what: str, where: str
) -> object:
    """Returns what an entry point of another package leads to.

    Args:
        group: of entry points.
        name: of the entry point.
        known: names of our own parts of that sort, for messages.
        what: the part is called, for messages.
        where: its entry in the recipe, for messages.

    Raises:
        ManifestError: there is none of that name, or it cannot be imported.
    """
    installed = {point.name: point for point in entry_points(group=group)}
    if name not in installed:
        names = [*known, *sorted(installed)]
        raise ManifestError(
            f"{what} must be one of {', '.join(names)}, got {name} ({where})"
            f"{close_matches(name, names) or '; name one of these'}"
        )
    try:
        found: object = installed[name].load()
    except (ImportError, AttributeError) as error:
        raise ManifestError(
            f"{what} must be importable, got {name} of {installed[name].value} "
            f"({error}) ({where}); install its package again"
        ) from error
    return found
