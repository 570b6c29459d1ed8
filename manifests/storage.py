"""Where documents, shards and banks lie: any fsspec URL, one code path.

Owns opening, listing, create-only and atomic writing, not what the bytes mean. A write
becomes visible whole or not at all: object stores do that by nature; on a local disk a
temporary name in ``.tmp/`` is linked (create) or renamed (replace) into place. What a
remote store fails to do for a while is tried again (``manifests.retrying``).
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from fsspec.core import url_to_fs

from manifests.errors import StorageError
from manifests.retrying import PatientFile, is_forbidden, retrying

Result = TypeVar("Result")
Buffer = bytes | bytearray | memoryview

_TEMPORARY = ".tmp"
_CONTENT_TAGS = ("crc32c", "md5Hash", "ETag", "etag", "content_md5", "sha256")
_READ_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Stat:
    """Size of a file, and a tag that changes with its bytes where the store has one."""

    size_bytes: int
    tag: str | None
    modified: str | None


def _local_path(fs: Any, path: str) -> Path | None:
    protocol = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
    return Path(path) if "file" in protocol else None


def is_local(url: str) -> bool:
    """Returns whether ``url`` is a path on this machine."""
    fs, path = split_url(url)
    return _local_path(fs, path) is not None


def explain(error: BaseException, what: str, url: str) -> StorageError:
    """Returns the one-line StorageError for a failure of the store under ``url``."""
    code = getattr(error, "errno", None)
    text = str(error) or type(error).__name__
    if code == errno.ENOSPC or code == errno.EDQUOT:
        hint = "no space left there; free some or put the bank elsewhere"
    elif is_forbidden(error) or code in (errno.EACCES, errno.EPERM):
        hint = "permission denied; check who owns it and what you may write"
    elif code == errno.EROFS:
        hint = "the file system is read-only; choose another place"
    elif isinstance(error, NotADirectoryError):
        hint = "a file is in the way, not a folder; move it or choose another path"
    elif isinstance(error, IsADirectoryError):
        hint = "it is a folder, a file is needed"
    elif isinstance(error, FileNotFoundError):
        hint = "nothing is there; check the path"
    elif isinstance(error, ImportError):
        hint = f"{text}; install the package of that URL scheme"
    else:
        hint = f"{type(error).__name__}: {text}"
    return StorageError(f"cannot {what} {url}: {hint}")


def split_url(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system and the path of ``url``.

    Raises:
        StorageError: the scheme is unknown or its package is not installed.
    """
    try:
        fs, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise explain(error, "open", url) from error
    return fs, str(path)


def stat_url(url: str) -> Stat:
    """Returns size and content tag of one file.

    Raises:
        StorageError: it is missing or may not be read.
    """
    fs, path = split_url(url)
    try:
        info = _ask(fs, path, lambda: fs.info(path))
    except Exception as error:
        raise explain(error, "read", url) from error
    if info.get("type") == "directory":
        raise StorageError(f"cannot read {url}: it is a folder, a file is needed")
    tag = next((str(info[name]) for name in _CONTENT_TAGS if info.get(name)), None)
    modified = info.get("mtime") or info.get("updated") or info.get("LastModified")
    return Stat(int(info["size"]), tag, None if modified is None else str(modified))


def open_url(url: str) -> BinaryIO:
    """Returns a seekable binary reader of ``url`` that reads ahead in 8 MiB requests.

    Raises:
        StorageError: it is missing or may not be read.
    """
    fs, path = split_url(url)
    try:
        if _local_path(fs, path) is not None:
            return _open_file(path)
        opened = retrying(
            lambda: fs.open(path, "rb", block_size=_READ_BYTES, cache_type="readahead")
        )
        return cast(BinaryIO, PatientFile(opened))
    except Exception as error:
        raise explain(error, "read", url) from error


def _open_file(path: str | Path) -> BinaryIO:
    """Returns a local file opened for reading: one that ends and does not block.

    A pipe waits for a writer and a device may never end; what a shell passes is read.
    """
    mode = os.stat(path).st_mode
    is_file = stat.S_ISREG(mode) or stat.S_ISDIR(mode)
    if not is_file and not str(path).startswith(("/dev/fd/", "/dev/stdin")):
        raise OSError("a pipe or a device is no file; give a file")
    return open(path, "rb")


def read_url(url: str) -> bytes:
    """Returns all bytes of ``url``; raises StorageError where it cannot be read."""
    with open_url(url) as file:
        try:
            return file.read()
        except Exception as error:
            raise explain(error, "read", url) from error


def read_range(url: str, start: int, end: int) -> bytes:
    """Returns bytes [start, end) of ``url`` in one request, fewer where it ends before.

    Raises:
        StorageError: it cannot be read.
    """
    fs, path = split_url(url)
    try:
        data: bytes = _ask(fs, path, lambda: fs.cat_file(path, start=start, end=end))
    except Exception as error:
        raise explain(error, "read", url) from error
    return data


def _check_inside(path: str) -> None:
    """Raises ValueError unless a path stays in its store, whoever wrote it."""
    if path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise ValueError(f"{path[:200]!r} leads out of it; the path must stay inside")


def _ask(fs: Any, path: str, call: Callable[[], Result]) -> Result:
    return call() if _local_path(fs, path) is not None else retrying(call)


class Store:
    """A directory on any fsspec URL, addressed by relative, '/'-separated paths."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._fs, root = split_url(self.url)
        self._root = root.rstrip("/")
        self._local = _local_path(self._fs, self._root)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return (Store, (self.url,))

    @property
    def local_root(self) -> Path | None:
        """The directory on this machine, or None where the store is remote."""
        return self._local

    def url_of(self, path: str) -> str:
        """Returns the full URL of ``path``, for messages and for other readers."""
        return f"{self.url}/{path}"

    def _key(self, path: str) -> str:
        _check_inside(path)
        return f"{self._root}/{path}"

    def _file(self, path: str) -> Path:
        """Returns where an object of a local store lies."""
        assert self._local is not None
        _check_inside(path)
        return self._local / path

    def read(self, path: str, size_bytes: int | None = None) -> bytes:
        """Returns all bytes of one object; raises StorageError where it is missing.

        Args:
            path: where, relative to the store.
            size_bytes: that it should have, if known: a remote store that gives fewer,
                though it says that they are there, is asked again.
        """
        try:
            if self._local is not None:
                with _open_file(self._file(path)) as file:
                    return file.read()
            return retrying(lambda: self._read_remote(path, size_bytes))
        except Exception as error:
            raise explain(error, "read", self.url_of(path)) from error

    def _read_remote(self, path: str, size_bytes: int | None) -> bytes:
        data = bytes(self._fs.cat_file(self._key(path)))
        if size_bytes is not None and len(data) < size_bytes:
            there = int(self._fs.info(self._key(path))["size"])
            if there > len(data):
                raise TimeoutError(f"only {len(data)} of {there} bytes came")
        return data

    def read_or_none(self, path: str, size_bytes: int | None = None) -> bytes | None:
        """Returns all bytes of one object, or None where it does not exist.

        Args:
            path: where, relative to the store.
            size_bytes: as for ``read``.
        """
        try:
            return self.read(path, size_bytes)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise

    def size(self, path: str) -> int | None:
        """Returns an object's size in bytes, or None where it does not exist."""
        try:
            if self._local is not None:
                return os.stat(self._file(path)).st_size
            found = retrying(lambda: self._fs.info(self._key(path)))
            return int(found["size"])
        except FileNotFoundError:
            return None
        except Exception as error:
            raise explain(error, "stat", self.url_of(path)) from error

    def create(self, path: str, parts: Buffer | Sequence[Buffer]) -> bool:
        """Writes an object only if none is there, whole or not at all.

        Args:
            path: where, relative to the store.
            parts: its bytes, in order; not copied on a local disk.

        Returns:
            True if this call made the object, False if one was there already.
        """
        is_one = isinstance(parts, (bytes, bytearray, memoryview))
        buffers = cast(Sequence[Buffer], [parts] if is_one else parts)
        try:
            if self._local is not None:
                return self._create_local(self._file(path), buffers)
            data = b"".join(bytes(part) for part in buffers)
            return self._create_remote(self._key(path), data)
        except FileExistsError:
            return False
        except Exception as error:
            raise explain(error, "write", self.url_of(path)) from error

    def _create_remote(self, key: str, data: bytes) -> bool:
        failed: list[bool] = []
        try:
            retrying(
                lambda: self._fs.pipe_file(key, data, mode="create"),
                lambda: failed.append(True),
            )
        except FileExistsError:
            # An attempt that failed may have been done: then the object is ours.
            return bool(failed) and data == retrying(lambda: self._fs.cat_file(key))
        return True

    def _create_local(self, target: Path, parts: Sequence[Buffer]) -> bool:
        with self._temporary(parts) as temporary:
            for _ in range(2):
                try:
                    os.link(temporary, target)
                    return True
                except FileNotFoundError:
                    target.parent.mkdir(parents=True, exist_ok=True)
            raise FileNotFoundError(f"{target.parent} vanished while writing")

    def replace(self, path: str, data: bytes) -> None:
        """Writes an object over whatever is there; readers see the old or the new."""
        try:
            if self._local is not None:
                target = self._file(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._temporary([data]) as temporary:
                    os.replace(temporary, target)
            else:
                retrying(lambda: self._fs.pipe_file(self._key(path), data))
        except Exception as error:
            raise explain(error, "write", self.url_of(path)) from error

    @contextlib.contextmanager
    def _temporary(self, parts: Sequence[Buffer]) -> Iterator[Path]:
        assert self._local is not None
        folder = self._local / _TEMPORARY
        path = folder / uuid.uuid4().hex
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            try:
                for part in parts:
                    view = memoryview(part).cast("B")
                    while view.nbytes:
                        view = view[os.write(handle, view) :]
            finally:
                os.close(handle)
            yield path
        finally:
            path.unlink(missing_ok=True)

    def clear_temporary(self, older_than_s: float) -> None:
        """Removes what killed writers left behind.

        Args:
            older_than_s: age since the last write; longer than any one write takes, for
                other writers may be at work.
        """
        if self._local is None or not (self._local / _TEMPORARY).is_dir():
            return
        before = time.time() - older_than_s
        for path in (self._local / _TEMPORARY).iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()

    def delete(self, path: str) -> None:
        """Removes an object if it is there."""
        try:
            if self._local is not None:
                self._file(path).unlink(missing_ok=True)
            else:
                retrying(lambda: self._fs.rm_file(self._key(path)))
        except FileNotFoundError:
            pass
        except Exception as error:
            raise explain(error, "delete", self.url_of(path)) from error

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Yields (path inside the store, size) of every object under ``prefix``."""
        try:
            if self._local is not None:
                _check_inside(prefix)
                yield from self._list_local(self._local, prefix.rstrip("/"))
                return
            found = retrying(lambda: self._find(prefix))
        except FileNotFoundError:
            return
        except Exception as error:
            raise explain(error, "list", self.url_of(prefix)) from error
        start = len(self._root) + 1
        for name, info in found.items():
            yield name[start:], int(info["size"])

    def _find(self, prefix: str) -> dict[str, Any]:
        self._fs.invalidate_cache()
        found: dict[str, Any] = self._fs.find(self._key(prefix), detail=True)
        return found

    def _list_local(self, root: Path, prefix: str) -> Iterator[tuple[str, int]]:
        try:
            entries = sorted(os.scandir(root / prefix), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            path = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name != _TEMPORARY:
                    yield from self._list_local(root, path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield path, entry.stat().st_size

    def free_bytes(self) -> int | None:
        """Returns the free bytes of a local disk, or None for a remote store."""
        if self._local is None:
            return None
        folder = self._local
        while not folder.exists():
            folder = folder.parent
        usage = os.statvfs(folder)
        return usage.f_bavail * usage.f_frsize


def glob_url(url: str) -> list[str]:
    """Returns the URLs that a pattern with ``*`` or ``?`` matches, sorted."""
    fs, path = split_url(url)
    try:
        found = sorted(fs.glob(path))
    except Exception as error:
        raise explain(error, "list", url) from error
    if _local_path(fs, path) is not None:
        return [str(name) for name in found]
    return [str(fs.unstrip_protocol(name)) for name in found]
