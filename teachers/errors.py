"""The error of this package."""

from manifests.errors import TeachOnceError


class TeacherError(TeachOnceError, ValueError):
    """A teacher that cannot be named, built, loaded or asked for that output."""


class WeightsNotFound(TeacherError):
    """Weights that are not where they should be; shapes can be told without them."""
