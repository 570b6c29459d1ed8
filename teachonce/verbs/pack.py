"""``teachonce pack``: a folder of images, or files named in a list, to shards."""

from __future__ import annotations

import argparse
import os
from typing import Any

from tqdm import tqdm

from manifests.document import parse_bytes
from pipeline.errors import PipelineError
from pipeline.packing.clips import ClipCut
from pipeline.packing.sweeps import SweepJoin
from teachonce.verbs import text

_SHARD_BYTES = "256 MB"
_SHOWN = 20


def run(args: argparse.Namespace) -> int:
    """Writes the shards; exit 1 where a file could not be read."""
    try:
        from pipeline.packing.pack import PackRequest, pack
        from pipeline.packing.shards import ShardLimit, ShardNames
    except ImportError as error:
        raise PipelineError(
            f"pack needs a package that is not installed ({error}); install "
            "teachonce[precompute]"
        ) from error

    request = PackRequest(
        source=_absolute(args.source),
        names=ShardNames.parse(_absolute(args.destination), args.prefix),
        limit=ShardLimit(args.samples_per_shard, _num_bytes(args)),
        shuffle=args.shuffle,
        clip=_clip_of(args),
        sweeps=_sweeps_of(args),
        labels=not args.no_labels,
        classes=None if args.classes is None else _absolute(args.classes),
        overwrite=args.overwrite,
    )
    with tqdm(unit="sample", desc="pack", disable=None) as bar:

        def start(total: int) -> None:
            bar.total = total
            bar.refresh()

        packed = pack(request, start, lambda: bar.update())
    pattern = request.names.pattern(len(packed.shards))
    notes = []
    if packed.classes and request.shuffle is None:
        notes.append(
            "classes lie one after another; training mixes samples within a few blocks "
            "at a time, so pack with --shuffle 0 what a student will learn from"
        )
    if packed.num_others:
        notes.append(f"files left out, since they are no images: {packed.num_others:,}")
    if packed.short:
        named = [f"{name} ({count})" for name, count in packed.short.items()]
        more = f" and {len(named) - _SHOWN} more" if len(named) > _SHOWN else ""
        notes.append(
            f"{len(named):,} sequences have too few frames for a clip: "
            f"{', '.join(named[:_SHOWN])}{more}"
        )
    if packed.leftovers:
        notes.append(
            f"{len(packed.leftovers)} temporary files of other runs lie there "
            f"({packed.leftovers[0]}); remove them if none is at work"
        )
    facts: dict[str, Any] = {
        "pattern": pattern,
        "shards": len(packed.shards),
        "samples": packed.num_samples,
        "bytes": packed.num_bytes,
        "members": packed.members,
        "classes": list(packed.classes),
        "left_out": packed.num_left_out,
        "unreadable": packed.unreadable,
        "short": packed.short,
        "notes": notes,
    }
    if args.json:
        text.print_json(facts)
    else:
        _print(facts)
    return 1 if packed.unreadable else 0


def _print(facts: dict[str, Any]) -> None:
    print(
        f"{facts['samples']:,} samples in {facts['shards']:,} shards, "
        f"{text.size(facts['bytes'])} -> {facts['pattern']}"
    )
    members = [f".{name} {count:,}" for name, count in facts["members"].items()]
    print(f"members: {', '.join(members)}")
    if facts["classes"]:
        print(f"classes: {len(facts['classes']):,}, named in classes.txt beside them")
    for note in facts["notes"]:
        print(f"note: {note}")
    if facts["unreadable"]:
        print(f"left out: {facts['left_out']:,} samples with a file that is unreadable")
    for why in facts["unreadable"].values():
        print(f"unreadable: {why}")


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _num_bytes(args: argparse.Namespace) -> int | None:
    given = args.shard_bytes
    if given is None:
        given = None if args.samples_per_shard is not None else _SHARD_BYTES
    try:
        return None if given is None else parse_bytes(given)
    except ValueError as error:
        raise PipelineError(f"--shard-bytes {error}") from error


def _clip_of(args: argparse.Namespace) -> ClipCut | None:
    if args.clip is not None:
        every = args.clip * args.stride if args.every is None else args.every
        return ClipCut(args.clip, args.stride, every)
    if args.every is not None or args.stride != 1:
        raise PipelineError(
            "--stride and --every are for --clip T; give it, or neither"
        )
    return None


def _sweeps_of(args: argparse.Namespace) -> SweepJoin | None:
    if args.sweeps is None:
        if args.columns is not None:
            raise PipelineError("--columns is for --sweeps N; give it, or neither")
        return None
    if args.clip is not None:
        raise PipelineError("--sweeps and --clip make different samples; give one")
    columns = args.columns or "x,y,z,intensity"
    return SweepJoin(args.sweeps, tuple(one.strip() for one in columns.split(",")))
