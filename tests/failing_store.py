"""A remote store that fails on demand: an fsspec file system over memory.

Every request asks the rules in turn; the first that applies makes it fail, come short,
or fail after it was done. What was asked is kept, and a commit that names an object
which is not there, or is another, is noted the moment that it is written.
"""

from __future__ import annotations

import errno
import io
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.bank.objects import object_crc32c

ROOT = "failing://store"


class UnavailableError(Exception):
    """What an HTTP client raises that is no OSError: it has a status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


PASSING: dict[str, Callable[[], Exception]] = {
    "i/o": lambda: OSError(errno.EIO, "input/output error"),
    "timeout": lambda: TimeoutError("no answer"),
    "503": lambda: UnavailableError(503),
    "429": lambda: UnavailableError(429),
    "reset": lambda: ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    "plain": lambda: OSError("the server said something odd"),
}
LASTING: dict[str, Callable[[], Exception]] = {
    "permission denied": lambda: PermissionError(errno.EACCES, "denied"),
    "no space left": lambda: OSError(errno.ENOSPC, "full"),
    "read-only": lambda: OSError(errno.EROFS, "read-only"),
    "HTTP 400": lambda: UnavailableError(400),
}


@dataclass
class Rule:
    """When requests fail, and how.

    Attributes:
        requests: regular expression of what is asked: ``read``, ``write``, ``create``,
            ``delete``, ``info``, ``list``, ``open``.
        path: regular expression of the path in the store.
        error: makes the error; None for a read that comes short.
        times: how often each (request, path) fails; None for always.
        skip: requests that match and are let through first.
        is_done: whether it is done before it fails.
    """

    requests: str
    path: str
    error: Callable[[], Exception] | None
    times: int | None = 1
    skip: int = 0
    is_done: bool = False
    seen: dict[tuple[str, str], int] = field(default_factory=dict)


class FailingFileSystem(MemoryFileSystem):
    """Memory that fails as its rules say."""

    protocol = "failing"
    cachable = False
    store: dict[str, Any] = {}  # noqa: RUF012  (as fsspec's own has it)
    pseudo_dirs = [""]  # noqa: RUF012
    rules: list[Rule] = []  # noqa: RUF012
    asked: list[tuple[str, str]] = []  # noqa: RUF012
    bad_commits: list[str] = []  # noqa: RUF012
    delay_s = 0.0
    _guard = threading.Lock()

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix("failing://"))

    def _apply(self, request: str, path: str, do: Callable[[], Any]) -> Any:
        path = self._strip_protocol(path)
        time.sleep(self.delay_s)
        with self._guard:
            self.asked.append((request, path))
            rule = self._rule(request, path)
        if rule is None:
            return do()
        if rule.error is None:
            data = do()
            return data[: len(data) // 2]
        if rule.is_done:
            do()
        raise rule.error()

    def _rule(self, request: str, path: str) -> Rule | None:
        for rule in self.rules:
            if not re.fullmatch(rule.requests, request):
                continue
            if not re.search(rule.path, path):
                continue
            if rule.skip:
                rule.skip -= 1
                continue
            count = rule.seen.get((request, path), 0)
            if rule.times is None or count < rule.times:
                rule.seen[request, path] = count + 1
                return rule
        return None

    def cat_file(self, path: str, start: Any = None, end: Any = None, **named: Any):
        call = super().cat_file
        return self._apply("read", path, lambda: call(path, start, end, **named))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **named: Any):
        call = super().pipe_file

        def do() -> None:
            if "/commits/" in path:
                self._check_commit(path, value)
            call(path, value, mode=mode, **named)

        request = "create" if mode == "create" else "write"
        return self._apply(request, path, do)

    def rm_file(self, path: str) -> None:
        call = super().rm_file
        self._apply("delete", path, lambda: call(path))

    def info(self, path: str, **named: Any):
        call = super().info
        return self._apply("info", path, lambda: call(path, **named))

    def find(self, path: str, *arguments: Any, **named: Any):
        call = super().find
        return self._apply("list", path, lambda: call(path, *arguments, **named))

    def open(self, path: str, mode: str = "rb", **named: Any):
        if mode != "rb":
            return super().open(path, mode, **named)
        # Memory's own readers share one position.
        return _FailingFile(self, path, io.BytesIO(super().cat_file(path)))

    def _check_commit(self, path: str, value: bytes) -> None:
        root = self._strip_protocol(path).partition("/commits/")[0]
        for name, told in json.loads(value)["content"]["objects"].items():
            held = self.store.get(f"{root}/{name}")
            data = None if held is None else held.getvalue()
            if data is None or (len(data), object_crc32c([data])) != tuple(told):
                self.bad_commits.append(f"{path}: {name}")


class _FailingFile:
    """An opened file whose reads fail as the rules say."""

    def __init__(self, fs: FailingFileSystem, path: str, file: Any) -> None:
        self._fs, self._path, self._file = fs, path, file

    def read(self, size: int = -1) -> bytes:
        return self._fs._apply("open", self._path, lambda: self._file.read(size))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FailingFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@contextmanager
def failing_store(*rules: Rule, delay_s: float = 0.0) -> Iterator[FailingFileSystem]:
    """Gives the store, with these rules while the block runs; its files stay."""
    kind = FailingFileSystem
    kind.rules, kind.asked, kind.bad_commits = list(rules), [], []
    kind.delay_s = delay_s
    try:
        yield fsspec.filesystem("failing")
    finally:
        kind.rules, kind.delay_s = [], 0.0


def clear_store() -> None:
    """Removes every file."""
    FailingFileSystem.store.clear()
    FailingFileSystem.pseudo_dirs[:] = [""]
