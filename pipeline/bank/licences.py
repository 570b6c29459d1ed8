"""What licence identifiers ask for, roughly, and the strictest of several.

A small table of identifiers that datasets and timm's, open_clip's and our own records
of weights use, in four classes by how much they restrict, each with the text it was
read from. Whatever is not in it is *unknown*, which is the strictest: nobody has read
it. A guide to where to look, not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from manifests.errors import BankError

NOT_STATED = "not stated"
# How our PointPillars presets join the licence of the code to that of the data.
_TRAINED_ON = "trained on data under "


class Restriction(IntEnum):
    """How much a licence restricts, ascending."""

    PERMISSIVE = 0
    ATTRIBUTION = 1
    NON_COMMERCIAL = 2
    CUSTOM = 3
    UNKNOWN = 4

    @property
    def words(self) -> str:
        """What it says to a reader."""
        return _WORDS[self]


_WORDS = {
    Restriction.PERMISSIVE: "permissive",
    Restriction.ATTRIBUTION: "attribution or share-alike",
    Restriction.NON_COMMERCIAL: "non-commercial",
    Restriction.CUSTOM: "terms of its own: read them",
    Restriction.UNKNOWN: "unknown: find out before use",
}

_SPDX = "https://spdx.org/licenses/"
_CC = "https://creativecommons.org/licenses/"
_KNOWN: dict[str, tuple[Restriction, str]] = {
    "cc0-1.0": (
        Restriction.PERMISSIVE,
        "https://creativecommons.org/publicdomain/zero/1.0/",
    ),
    "apache-2.0": (Restriction.PERMISSIVE, f"{_SPDX}Apache-2.0.html"),
    "mit": (Restriction.PERMISSIVE, f"{_SPDX}MIT.html"),
    "bsd-2-clause": (Restriction.PERMISSIVE, f"{_SPDX}BSD-2-Clause.html"),
    "bsd-3-clause": (Restriction.PERMISSIVE, f"{_SPDX}BSD-3-Clause.html"),
    "isc": (Restriction.PERMISSIVE, f"{_SPDX}ISC.html"),
    "cdla-permissive-2.0": (
        Restriction.PERMISSIVE,
        f"{_SPDX}CDLA-Permissive-2.0.html",
    ),
    **{
        f"cc-{kind}-{version}": (restriction, f"{_CC}{kind}/{version}/")
        for kind, restriction in (
            ("by", Restriction.ATTRIBUTION),
            ("by-sa", Restriction.ATTRIBUTION),
            ("by-nc", Restriction.NON_COMMERCIAL),
            ("by-nc-sa", Restriction.NON_COMMERCIAL),
        )
        for version in ("2.0", "3.0", "4.0")
    },
    "odc-by-1.0": (Restriction.ATTRIBUTION, f"{_SPDX}ODC-By-1.0.html"),
    "odbl-1.0": (Restriction.ATTRIBUTION, f"{_SPDX}ODbL-1.0.html"),
    "gpl-3.0": (Restriction.ATTRIBUTION, f"{_SPDX}GPL-3.0-only.html"),
    "agpl-3.0": (Restriction.ATTRIBUTION, f"{_SPDX}AGPL-3.0-only.html"),
    "imagenet-noncommercial": (
        Restriction.NON_COMMERCIAL,
        "https://www.image-net.org/download.php",
    ),
    "waymo-open-dataset-license": (
        Restriction.NON_COMMERCIAL,
        "https://waymo.com/open/terms/",
    ),
    "cityscapes-license": (
        Restriction.NON_COMMERCIAL,
        "https://www.cityscapes-dataset.com/license/",
    ),
    "fair-noncommercial-research-license": (
        Restriction.NON_COMMERCIAL,
        "https://raw.githubusercontent.com/facebookresearch/vggt-omega/master/LICENSE",
    ),
    "apple-amlr": (
        Restriction.CUSTOM,
        "https://huggingface.co/apple/mobileclip_b_timm",
    ),
    "dinov3-license": (
        Restriction.CUSTOM,
        "https://ai.meta.com/resources/models-and-libraries/dinov3-license/",
    ),
    "nvidia-open-model-license": (
        Restriction.CUSTOM,
        "https://www.nvidia.com/en-us/agreements/enterprise-software/"
        "nvidia-open-model-license/",
    ),
    "gemma": (Restriction.CUSTOM, "https://ai.google.dev/gemma/terms"),
}

# Those of the table that let nobody pass the data itself on, resized or not: whoever
# wants it is to ask its owner. Of `nd` licences, which are not in the table, changed
# copies may not be passed on.
_NO_COPIES = frozenset(
    {"imagenet-noncommercial", "waymo-open-dataset-license", "cityscapes-license"}
)
_NO_CHANGES = re.compile(r"cc-by(-nc)?-nd-\d\.\d")
# Those of the table that are no licences of data, or whose words on copies nobody read.
_COPIES_UNREAD = frozenset({"fair-noncommercial-research-license"})


@dataclass(frozen=True)
class Licence:
    """A licence as something names it.

    Attributes:
        name: as it was given, or ``not stated``.
        restriction: how much it restricts; of several the strictest.
        url: where its text is; '' where nobody knows.
    """

    name: str
    restriction: Restriction
    url: str


def find_licence(text: str | None) -> Licence:
    """Returns what is known of a licence.

    Args:
        text: an identifier in any case, or several, joined by ``;``.
    """
    if not text or not text.strip():
        return Licence(NOT_STATED, Restriction.UNKNOWN, "")
    restriction, url = max(
        (_KNOWN.get(part, (Restriction.UNKNOWN, "")) for part in identifiers(text)),
        key=lambda found: found[0],
    )
    return Licence(text.strip(), restriction, url)


def identifiers(text: str | None) -> list[str]:
    """Returns the identifiers that a licence is told by, in lower case.

    Args:
        text: one or several, joined by ``;``; of none it is ``not stated``.
    """
    parts = [part.strip().lower() for part in (text or "").split(";")]
    return [part.removeprefix(_TRAINED_ON) for part in parts if part] or [NOT_STATED]


def strictest(licences: Iterable[Licence]) -> Licence:
    """Returns the licence that restricts most; the first of equals.

    Raises:
        ValueError: there is none.
    """
    return max(licences, key=lambda licence: licence.restriction)


def check_copies(licence: str | None, allowed: str | None, where: str) -> None:
    """Checks that copies of data may be kept where others can get at them.

    A licence that forbids it does so whatever else is said. One that is not known to
    allow it, or none, needs somebody who says so.

    Args:
        licence: of the data; an identifier, or several joined by ``;``.
        allowed: who says that copies are allowed, None for nobody.
        where: what would be copied, for messages.

    Raises:
        BankError: copies are not allowed.
    """
    names = [part.strip().lower() for part in (licence or "").split(";")]
    for name in names:
        if name in _NO_COPIES or _NO_CHANGES.fullmatch(name):
            url = _KNOWN.get(name, (None, ""))[1]
            raise BankError(
                f"{where} must be left out: the licence of the data, {name}, does not "
                f"allow copies to be passed on{f' ({url})' if url else ''}; students "
                "read the shards. If its owner allowed them to you, name that "
                "agreement as dataset.license"
            )
    known = all(
        _KNOWN.get(name, (Restriction.UNKNOWN, ""))[0] <= Restriction.NON_COMMERCIAL
        and name not in _COPIES_UNREAD
        for name in names
    )
    if not known and not allowed:
        raise BankError(
            f"{where} needs a licence of the data that is known to allow copies, got "
            f"{licence or NOT_STATED}; state it as dataset.license (such as "
            "cc-by-4.0), or say in dataset.copies_allowed who allows them"
        )
