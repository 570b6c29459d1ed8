"""The code that a teacher is made of, where a job names it: digested, never trusted.

Imports neither torch nor a model library, so that a finished job is recognised without.
"""

from __future__ import annotations

from manifests.student_folder import read_student_folder
from teachers.interface import TeacherRequest
from teachers.registry import FAMILIES
from teachers.weights import digest, resolve


def code_digest(request: TeacherRequest) -> str | None:
    """Returns the sha256 of the code that a teacher's model names, else None.

    Of ``module:`` that is its file, of ``student:`` all that its folder says of the
    model. A program's file is its weights, whose record has its digest.

    Raises:
        StorageError, ManifestError: it cannot be read, or is no student's folder.
    """
    family = FAMILIES.get(request.config.family)
    name = request.config.model_name
    match family.code_at if family else None:
        case "file":
            return digest(resolve(request.base, name.rpartition(":")[0]))
        case "folder":
            where = f"teachers.{request.name}.model"
            return read_student_folder(resolve(request.base, name), where).digest
    return None


def kinds_wanted(request_family: str, wants_points: bool) -> frozenset[str]:
    """Returns the kinds of input a teacher runs on where the job does not say which.

    A family that takes all kinds takes sweeps where the job says how many points, else
    images and clips.
    """
    family = FAMILIES.get(request_family)
    kinds = frozenset(family.kinds if family else ("image", "points"))
    if len(kinds) > 1:
        return frozenset({"points"}) if wants_points else kinds - {"points"}
    return kinds
