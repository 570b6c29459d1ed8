"""The code that a teacher is made of, where a job names it: digested, never trusted.

Imports neither torch nor a model library, so that a finished job is recognised without.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from manifests.student_folder import LoaderFolder, read_student_folder
from teachers.errors import TeacherError
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


def is_code(family: str) -> bool:
    """Returns whether a teacher of a family runs code that its model's name names."""
    known = FAMILIES.get(family)
    return known is not None and known.code_at is not None


def check_code(request: TeacherRequest, identity: Mapping[str, Any]) -> None:
    """Checks, running nothing, that a model's code is that of a teacher in a bank.

    A program's file is its weights, which are checked as such.

    Args:
        request: names the code.
        identity: of the teacher, from its provenance.

    Raises:
        StorageError, ManifestError: the code cannot be read.
        TeacherError: it is not the code that the bank has its numbers from.
    """
    family = FAMILIES.get(request.config.family)
    name, where = request.config.model_name, f"teachers.{request.name}.model"
    found: dict[str, Any] = {}
    match family.code_at if family else None:
        case "file":
            found["model"] = name.rpartition("/")[2]
            found["code"] = code_digest(request)
        case "folder":
            folder = read_student_folder(resolve(request.base, name), where)
            found["model"] = folder.identity
            if isinstance(folder.document, LoaderFolder):
                loader = folder.files[folder.document.loader_file]
                found["code"] = hashlib.sha256(loader).hexdigest()
    for field, value in found.items():
        if value != identity.get(field):
            raise TeacherError(
                f"{where} must be the code that the bank's numbers come from, of "
                f"{field} {identity.get(field)}, got {value} ({name}); code that "
                "changed is not run, put the bank's back"
            )


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
