"""The code that a teacher is made of, where a job names it: digested, never trusted.

Imports neither torch nor a model library, so that a finished job is recognised without.
"""

from __future__ import annotations

from teachers.interface import TeacherRequest
from teachers.registry import FAMILIES
from teachers.weights import digest, resolve


def code_digest(request: TeacherRequest) -> str | None:
    """Returns the sha256 of the file a ``module:`` teacher is read from, else None.

    Raises:
        StorageError: the file cannot be read.
    """
    family = FAMILIES.get(request.config.family)
    if family is None or not family.takes_from:
        return None
    file, _, _ = request.config.model_name.rpartition(":")
    return digest(resolve(request.base, file))


def kinds_wanted(request_family: str, wants_points: bool) -> frozenset[str]:
    """Returns the kinds of input a teacher runs on where the job does not say which.

    A family that takes both kinds takes sweeps where the job says how many points, else
    images.
    """
    family = FAMILIES.get(request_family)
    kinds = frozenset(family.kinds if family else ("image", "points"))
    if len(kinds) > 1:
        return frozenset({"points"} if wants_points else {"image"})
    return kinds
