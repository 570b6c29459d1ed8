"""The error of this package."""

from manifests.errors import TeachOnceError


class TeacherError(TeachOnceError, ValueError):
    """A teacher that cannot be named, built, loaded or asked for that output."""
