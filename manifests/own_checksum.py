"""JSON documents that carry their own crc32c, so that no wrong bit reads as a fact.

The last field of such a document is ``crc32c``: that of every byte before the comma in
front of it, as eight hexadecimal digits. A document without one is read as it is: it
was written by hand, or by a version that made none.
"""

from __future__ import annotations

import json
import re
from typing import Any

from crc32c import crc32c
from pydantic import model_validator

from manifests.document import Strict
from manifests.errors import ManifestError

FIELD = "crc32c"
_TAIL = re.compile(rb',\s*"([^"]*)":\s*"([0-9a-f]{8})"\s*\}\s*\Z')


class Checked(Strict):
    """Base of documents that may carry their own crc32c; it is no field of theirs."""

    @model_validator(mode="before")
    @classmethod
    def _drop_checksum(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: one for name, one in value.items() if name != FIELD}


def with_own_checksum(text: bytes) -> bytes:
    """Returns a JSON object's text with its own crc32c as the last field.

    Args:
        text: of an object that has at least one field.
    """
    body = text.rstrip().removesuffix(b"}").rstrip()
    digits = b"%08x" % crc32c(body)
    if b"\n" in body:
        return body + b',\n "crc32c": "' + digits + b'"\n}\n'
    return body + b',"crc32c":"' + digits + b'"}'


def check_own_checksum(text: bytes, document: dict[str, Any], where: str) -> None:
    """Checks a JSON object against its own crc32c, if it carries one.

    Args:
        text: of the object.
        document: what it parses to.
        where: it lies, for the message.

    Raises:
        ManifestError: they do not match.
    """
    found = _TAIL.search(text)
    matches = found is not None and crc32c(text[: found.start()]) == int(found[2], 16)
    # A checksum that matches under another name: the wrong bit is in the name.
    if matches != (FIELD in document):
        raise ManifestError(
            f"{where} must match its own crc32c, got damage or an edit; restore it "
            f"from a copy (after an edit on purpose, remove its field `{FIELD}`)"
        )


def parse_checked(text: bytes, where: str) -> dict[str, Any]:
    """Returns a JSON object, without its own crc32c, which is compared if it has one.

    Args:
        text: of the object.
        where: it lies, for the message.

    Raises:
        ManifestError: it is no JSON object, or damaged.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{where}: not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: must be a JSON object")
    check_own_checksum(text, document, where)
    return {name: value for name, value in document.items() if name != FIELD}
