"""Asking a remote store again: what passes, what never will, and how long to wait.

Object stores answer 429, 503 or nothing at all now and then; their clients try again by
themselves, not all and not for long. What is tried again here must be harmless to do
twice. A local disk is never asked twice: what it says holds.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

Result = TypeVar("Result")

# Seconds before each further attempt, on average: 15.5 in all.
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0)

_PASSING_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_PASSING_ERRNO = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EREMOTEIO", "EBUSY", "EAGAIN", "EPIPE", "ESTALE", "ETIMEDOUT"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET"),
        *("EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
_LASTING = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
)
# Of aiohttp, botocore and google-auth, which need not be installed.
_PASSING_NAMES = frozenset(
    {"ClientConnectionError", "ClientPayloadError", "HTTPClientError", "TransportError"}
)


def may_pass(error: BaseException) -> bool:
    """Returns whether a failure of a remote store may be gone at the next attempt."""
    if isinstance(error, _LASTING) or is_forbidden(error):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    for name in ("status", "status_code", "code"):
        status = getattr(error, name, None)
        if isinstance(status, int) and status >= 400:
            return status in _PASSING_STATUS
    if isinstance(error, OSError):
        return error.errno is None or error.errno in _PASSING_ERRNO
    return any(one.__name__ in _PASSING_NAMES for one in type(error).__mro__)


def is_forbidden(error: BaseException) -> bool:
    """Returns whether a store says that something may not be done.

    gcsfs raises a plain OSError for it, which has only its text.
    """
    is_plain = type(error) is OSError and error.errno is None
    return isinstance(error, PermissionError) or (
        is_plain and str(error).startswith("Forbidden")
    )


def retrying(
    call: Callable[[], Result],
    on_failure: Callable[[], object] = lambda: None,
) -> Result:
    """Returns what ``call`` does, asked again while its failures may pass.

    Args:
        call: may have been done though it fails.
        on_failure: called after each failure that may pass.

    Raises:
        Exception: what ``call`` raised last.
    """
    for wait_s in WAITS_S:
        try:
            return call()
        except Exception as error:
            if not may_pass(error):
                raise
            on_failure()
        # Spread: workers that failed together must not come back together.
        time.sleep(wait_s * random.uniform(0.5, 1.5))
    return call()


class PatientFile:
    """A remote file that is read on where a read fails for a while."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        """Returns up to ``size`` bytes, all that are left where it is negative."""
        place = self._file.tell()

        def again() -> bytes:
            if self._file.tell() != place:
                self._file.seek(place)
            return self._file.read(size)

        return retrying(again)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Moves to ``offset`` and returns the place."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the place."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Returns whether it can move."""
        return self._file.seekable()

    def readable(self) -> bool:
        """Returns True."""
        return True

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._file.closed

    def close(self) -> None:
        """Closes it."""
        self._file.close()

    def __enter__(self) -> PatientFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
