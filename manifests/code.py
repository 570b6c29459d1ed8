"""Code that a document names: ``module:FILE:CLASS``, for teachers and students.

The file is code that runs because the document names it; its SHA-256 goes into what is
recorded. It is loaded alone, under a name of its own: what lies beside it is not
importable. Knows nothing of what the class is for, and imports no model library.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from manifests.errors import ManifestError, StorageError, TeachOnceError
from manifests.loading import resolve_path
from manifests.storage import read_url
from manifests.suggestions import close_matches


@dataclass(frozen=True)
class Code:
    """A file of code as loaded.

    Attributes:
        make: the class, or a function that returns an instance of one.
        sha256: of the file's bytes.
    """

    make: Callable[..., Any]
    sha256: str


def load_code(name: str, base: str, where: str, kind: type = object) -> Code:
    """Returns what ``FILE:CLASS`` names, running the file.

    Args:
        name: path or URL of the file, a colon, a name in it.
        base: folder that a relative path starts from.
        where: the entry in the document, for messages.
        kind: what the class should derive from; only used to list what could have been
            meant, for a function may return it as well.

    Raises:
        ManifestError: the file or the name is not there, or the file raises.
    """
    path, _, attribute = name.rpartition(":")
    if not path or not attribute.isidentifier():
        raise ManifestError(
            f"{where}.model must be module:FILE:CLASS, got 'module:{name}'"
        )
    url = resolve_path(path, base)
    if "://" not in url:
        url = os.path.abspath(url)
    try:
        source = read_url(url)
    except StorageError as error:
        raise ManifestError(
            f"{where}.model must name a file that can be read, got {path!r} ({error}; "
            f"relative paths start from {base})"
        ) from error
    sha256 = hashlib.sha256(source).hexdigest()
    module = types.ModuleType(f"teachonce_module_{sha256[:16]}")
    module.__file__ = url
    # Dataclasses and pickle look a class's module up by its name.
    sys.modules[module.__name__] = module
    with explained(f"{where}.model: {path} must load", (path, url)):
        exec(compile(source, url, "exec"), module.__dict__)
    found = getattr(module, attribute, None)
    if not callable(found):
        public = [
            item
            for item, value in vars(module).items()
            if inspect.isclass(value) and issubclass(value, kind)
        ]
        raise ManifestError(
            f"{where}.model must name a class of {path}, got {attribute!r} (modules: "
            f"{', '.join(public) or 'none'}){close_matches(attribute, public)}"
        )
    return Code(found, sha256)


@contextlib.contextmanager
def explained(what: str, files: tuple[str, ...] = ()) -> Iterator[None]:
    """Turns whatever somebody's code raises into one line that says where it did.

    Args:
        what: the beginning of the line.
        files: names of the files whose line number is told.

    Raises:
        ManifestError: the code raised something that is not ours.
    """
    try:
        yield
    except TeachOnceError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [item.lineno for item in frames if item.filename in files]
        line = f" at line {lines[-1]}" if lines else ""
        raise ManifestError(
            f"{what}, got {type(error).__name__}{line}: {error}"
        ) from error
