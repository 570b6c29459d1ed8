"""Member names to keys: the WebDataset convention, and which names get no row.

A key is data: it is compared, stored and printed, and never used as a path.
"""

from __future__ import annotations

import re

MAX_KEY_BYTES = 4096
"""Longest key kept, in bytes of UTF-8; a longer one is refused, never shortened."""

_JUNK_NAMES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_ABSOLUTE = re.compile(r"^(?:[/\\]|[A-Za-z]:[/\\])")


def split_name(name: str) -> tuple[str, str]:
    """Returns (key, extension) of a member's name.

    The key is the path up to the first dot of the base name, the extension what follows
    that dot, in lower case: ``a.b/0001.Cam.JPG`` gives ``("a.b/0001", "cam.jpg")``.
    Where the base name has no dot the extension is empty.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def refuse_name(name: str) -> tuple[str, str, str] | None:
    """Returns (key or name, reason, detail) of a name that gets no row, or None.

    Reasons: ``junk`` (no key or no extension, a system's file, WebDataset's own
    ``__meta__``), ``unsafe_key`` (absolute, with ``..`` or NUL), ``key_too_long`` and
    ``not_utf8``.
    """
    key, extension = split_name(name)
    base = name.rpartition("/")[2]
    shown = name.encode("utf-8", "backslashreplace").decode()
    if len(shown) > 200:
        shown = f"{shown[:200]}... ({len(name)} characters)"
    if _ABSOLUTE.match(name) or ".." in re.split(r"[/\\]", name) or "\0" in name:
        detail = f"{shown!r} is absolute or leaves its root"
        return _printable(key), "unsafe_key", detail
    if "__MACOSX" in name.split("/")[:-1] or base.startswith("._"):
        return _printable(name), "junk", f"{shown!r} is a resource fork of macOS"
    if base in _JUNK_NAMES:
        return _printable(name), "junk", f"{shown!r} is a file of the operating system"
    if base.startswith("__") and base.endswith("__"):
        return _printable(name), "junk", f"{shown!r} is WebDataset metadata"
    if not key or key.endswith("/"):
        return _printable(key), "junk", f"{shown!r} has no key before its first dot"
    if not extension:
        return _printable(name), "junk", f"{shown!r} has no extension"
    try:
        num_bytes = len(key.encode())
        extension.encode()
    except UnicodeEncodeError:
        return _printable(key), "not_utf8", f"{shown!r} is not UTF-8"
    if num_bytes > MAX_KEY_BYTES:
        detail = f"{num_bytes} bytes, at most {MAX_KEY_BYTES} are kept"
        return key, "key_too_long", detail
    return None


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
