"""The environment: are the packages that are found really TeachOnce's?

Import names are short (`pipeline`, `teachers`); another package of that name on the
path is named here, instead of failing strangely later. So nothing of ours is imported
here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("manifests", "pipeline", "student_train", "teachers")


class ForeignPackageError(ImportError):
    """Another package hides one of ours."""


def check_packages() -> None:
    """Raises ForeignPackageError where a foreign package hides one of ours."""
    home = Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or origin.parent.parent != home:
            raise ForeignPackageError(
                f"package {name!r} is found at {origin}, TeachOnce's lies in {home}: "
                "another package of that name is on the path; install TeachOnce in an "
                "environment of its own, or run from another folder"
            )
