"""The error of this package."""

from manifests.errors import TeachOnceError


class DemoError(TeachOnceError, ValueError):
    """An option of the generated data set that cannot be used."""
