"""The error of this package, and how it tells those of others."""

from manifests.errors import TeachOnceError


class TrainingError(TeachOnceError, ValueError):
    """A student, target or run that cannot be made or trained as the recipe says."""


def reason_of(error: BaseException) -> str:
    """Returns what somebody else's error says, on one line of bounded length."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else f"{text[:297]}..."
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
