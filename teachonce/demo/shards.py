"""Writing generated scenes as WebDataset shards; the same arguments, the same bytes.

A shard appears under its name only when it is whole.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from teachonce.demo.errors import DemoError
from teachonce.demo.samples import make_sample
from teachonce.demo.scenes import SceneOptions


@dataclass(frozen=True)
class _Part:
    """One shard to write: scenes ``start`` to ``end``."""

    path: str
    seed: int
    start: int
    end: int
    options: SceneOptions


def write_shards(
    folder: str | Path,
    num_scenes: int,
    scenes_per_shard: int = 100,
    seed: int = 0,
    options: SceneOptions | None = None,
    *,
    first_index: int = 0,
    workers: int = 0,
    on_shard: Callable[[str], object] | None = None,
) -> list[str]:
    """Writes ``scenes-00000.tar`` and following into ``folder``; returns their paths.

    Args:
        folder: where to; made if missing. Shards of these names are replaced.
        num_scenes: how many scenes in all.
        scenes_per_shard: how many in each shard but the last.
        seed: what the scenes are drawn from; other seeds give other scenes.
        options: how they are drawn and sensed.
        first_index: index, and so key, of the first scene.
        workers: processes; 0 writes in this one. The bytes do not depend on it.
        on_shard: called with each path once it is written, in order.

    Raises:
        DemoError: a number is out of range.
    """
    for name, value, least in (
        ("num_scenes", num_scenes, 1),
        ("scenes_per_shard", scenes_per_shard, 1),
        ("first_index", first_index, 0),
        ("workers", workers, 0),
    ):
        if value < least:
            raise DemoError(
                f"{name} must be at least {least}, got {value}; choose another value"
            )
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_scenes, scenes_per_shard)
    parts = [
        _Part(
            path=str(target / f"scenes-{number:05d}.tar"),
            seed=seed,
            start=first_index + start,
            end=first_index + min(start + scenes_per_shard, num_scenes),
            options=options or SceneOptions(),
        )
        for number, start in enumerate(starts)
    ]
    paths = []
    for path in _run(parts, workers):
        paths.append(path)
        if on_shard is not None:
            on_shard(path)
    return paths


def _run(parts: list[_Part], workers: int) -> Iterable[str]:
    if workers == 0:
        yield from map(_write_part, parts)
        return
    # Spawned, not forked: the caller may have threads (Beam, torch).
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(parts)), mp_context=context) as pool:
        yield from pool.map(_write_part, parts)


def _write_part(part: _Part) -> str:
    temporary = f"{part.path}.{os.getpid()}.tmp"
    try:
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(part.start, part.end):
                sample = make_sample(part.seed, index, part.options)
                for extension, data in sample.members().items():
                    header = tarfile.TarInfo(f"{sample.scene.key}.{extension}")
                    header.size, header.mtime, header.mode = len(data), 0, 0o644
                    tar.addfile(header, io.BytesIO(data))
        Path(temporary).replace(part.path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return part.path
