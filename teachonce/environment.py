"""The environment: are the packages that are found really TeachOnce's, and are others
that a part of it needs installed?

Import names are short (`pipeline`, `teachers`); another package of that name on the
path is named here, instead of failing strangely later. So nothing of ours is imported
here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGES = ("manifests", "pipeline", "student_train", "teachers")


# Packages that the extras bring, and what needs them: verbs, and names of `teachonce`.
_OPTIONAL = frozenset(
    {"apache_beam", "huggingface_hub", "open_clip", "safetensors", "tensorboard"}
    | {"timm", "torch", "torchvision", "webdataset"}
)
_EXTRAS = {
    "train": "train",
    "probe": "train",
    "BankDataset": "train",
    "Reading": "train",
    "demo": "precompute,train",
}


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


def explain_missing(error: ImportError, user: str) -> str | None:
    """Returns what to install where a package of an extra is missing, else None.

    Args:
        error: that was raised.
        user: the verb, or the name imported from ``teachonce``.
    """
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in _OPTIONAL:
        return None
    extra = _EXTRAS.get(user, "precompute")
    return (
        f"{user} needs the package {package}, which is not installed; install "
        f"teachonce[{extra}]"
    )
