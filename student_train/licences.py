"""Under which licences a student stands: of its data and of its teachers.

What identifiers ask for is `pipeline.bank.licences`' to say, and no lawyer's advice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.bank.licences import NOT_STATED, Licence, find_licence, identifiers
from pipeline.bank.licences import strictest as strictest_of
from pipeline.bank.open import Bank
from student_train.errors import TrainingError
from student_train.tasks import Task


def student_licences(bank: Bank, tasks: Sequence[Task]) -> dict[str, Licence]:
    """Returns licences by what they are of: the data, then each teacher of a target.

    Weights drawn from a seed are nobody's, unless the job says otherwise.
    """
    found = {"data": find_licence(bank.record.dataset.get("license"))}
    for task in tasks:
        if task.path is None:
            continue
        entry = bank.pass_of(task.path)
        told = entry.provenance.get("license")
        if told or entry.provenance["weights"]["kind"] != "random":
            found[f"weights of {entry.teacher}"] = find_licence(told)
    return found


def check_licences(found: Mapping[str, Licence], allowed: Sequence[str]) -> None:
    """Checks that every licence is among those that are allowed.

    Args:
        found: by what they are of.
        allowed: identifiers, in any case.

    Raises:
        TrainingError: one is not; all that are not are named.
    """
    names = {name.lower() for name in allowed}
    refused = [
        f"{licence.name} ({what})"
        for what, licence in found.items()
        if not names.issuperset(identifiers(licence.name))
    ]
    if refused:
        raise TrainingError(
            f"require_license must name every licence that the student stands under, "
            f"got {', '.join(allowed)} without {', '.join(refused)}; leave those "
            "targets out, or ask who may allow it"
        )


def licence_facts(found: Mapping[str, Licence]) -> dict[str, str]:
    """Returns what is told: ``license``, the strictest, and ``licenses``, all."""
    strictest = strictest_of(found.values()).name
    told = ", ".join(f"{what}: {one.name}" for what, one in found.items())
    return ({} if strictest == NOT_STATED else {"license": strictest}) | {
        "licenses": told
    }
