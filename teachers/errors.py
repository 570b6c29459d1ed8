"""The errors of this package."""

import contextlib
from collections.abc import Iterator

from manifests.errors import ManifestError, TeachOnceError


class TeacherError(TeachOnceError, ValueError):
    """A teacher that cannot be named, built, loaded or asked for that output."""


class WeightsNotFound(TeacherError):
    """Weights that are not where they should be; shapes can be told without them."""


@contextlib.contextmanager
def as_teacher_error() -> Iterator[None]:
    """Raises what is wrong with a document as this package's error."""
    try:
        yield
    except ManifestError as error:
        raise TeacherError(str(error)) from error.__cause__
