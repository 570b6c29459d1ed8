"""Which shards a pattern stands for, what they are called, how large they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from braceexpand import braceexpand

from manifests.errors import ManifestError, StorageError
from manifests.storage import Stat, glob_url, stat_url

_THREADS = 8


def expand_shards(patterns: Sequence[str], field: str = "dataset.shards") -> list[str]:
    """Returns the shard URLs that patterns with braces and ``*`` stand for, in order.

    Args:
        patterns: as given.
        field: that they stand in, for messages.

    Raises:
        ManifestError: a pattern stands for nothing, or names a shard twice.
    """
    urls: list[str] = []
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError as error:
            raise ManifestError(f"{field}: {pattern}: {error}") from error
        found = []
        for name in names:
            found += glob_url(name) if any(c in name for c in "*?[") else [name]
        if not found:
            raise ManifestError(
                f"{field}: no shard matches {pattern}; check the folder and the "
                "pattern (braces like {000..127} and * expand)"
            )
        urls += found
    check_named_once(urls, field)
    return urls


def check_named_once(urls: Sequence[str], field: str = "dataset.shards") -> None:
    """Raises ManifestError where a shard is named twice."""
    twice = [url for url, count in Counter(urls).items() if count > 1]
    if twice:
        raise ManifestError(f"{field}: {twice[0]} is named twice; name it once")


def stat_shards(urls: Sequence[str], field: str = "dataset.shards") -> list[Stat]:
    """Returns sizes and tags of shards, in order.

    Raises:
        StorageError: naming every shard (the first few) that cannot be read.
    """

    def stat(url: str) -> Stat | StorageError:
        try:
            return stat_url(url)
        except StorageError as error:
            return error

    with ThreadPoolExecutor(_THREADS) as pool:
        results = list(pool.map(stat, urls))
    errors = [result for result in results if isinstance(result, StorageError)]
    if errors:
        more = f" (and {len(errors) - 3} more)" if len(errors) > 3 else ""
        shown = "; ".join(str(error) for error in errors[:3])
        raise StorageError(f"{field}: {shown}{more}")
    return [result for result in results if isinstance(result, Stat)]


def name_shards(urls: Sequence[str]) -> list[str]:
    """Returns a unique name per shard: its base name, with folders where it repeats."""
    depth = 1
    while True:
        names = ["/".join(url.rstrip("/").split("/")[-depth:]) for url in urls]
        if len(set(names)) == len(names):
            return names
        depth += 1
