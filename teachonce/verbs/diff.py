"""``teachonce diff``: what differs between two banks?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pipeline.bank.diff import Diff, Difference, ObjectPair, diff, read_contents
from pipeline.bank.diff_rows import SampleCounts, row_differences, shared_rows
from pipeline.bank.diff_values import (
    BytesRead,
    ValueDifference,
    read_bytes,
    value_differences,
)
from pipeline.bank.record import open_record
from teachonce.verbs import text

_FIRST_JSON = 100
_LONGEST_VALUE = 60


def run(args: argparse.Namespace) -> int:
    """Prints what differs; exit 0 where the content is the same, 1 where it is not."""
    stores, records = zip(*map(open_record, (args.a, args.b)), strict=True)
    contents = [read_contents(*one) for one in zip(stores, records, strict=True)]
    found = diff(*contents)
    read, values = None, []
    banks = list(zip(stores, contents, strict=True))
    shared = shared_rows(*banks)
    samples = SampleCounts.of(shared)
    if args.full:
        read = read_bytes(found, *banks)
        values = list(value_differences(found, read, *banks))
        values += row_differences(shared, *banks)
    is_same = found.is_same and (read is None or read.is_same) and not shared
    if args.json:
        text.print_json(
            {"a": stores[0].url, "b": stores[1].url, "full": args.full, "same": is_same}
            | _facts(found, read, values)
            | {"samples": samples.to_json()}
        )
    else:
        print(f"A        {stores[0].url}\nB        {stores[1].url}")
        for line in (*_sample_lines(samples), *_lines(found, read, values)):
            print(line)
        how = "every byte read" if args.full else "as committed; --full reads the bytes"
        print(
            f"{'same content' if is_same else 'not the same'}: {len(found.objects):,} "
            f"objects that both have were compared ({how})"
        )
    return 0 if is_same else 1


def _sample_lines(samples: SampleCounts) -> Iterator[str]:
    if samples.shards:
        yield (
            f"samples  {samples.both:,} in both, by key; {samples.only_a:,} only in A, "
            f"{samples.only_b:,} only in B ({samples.shards:,} shards whose rows lie "
            "otherwise in each)"
        )


def _different(found: Diff, read: BytesRead | None) -> tuple[ObjectPair, ...]:
    return found.different_objects if read is None else read.different


def _facts(
    found: Diff, read: BytesRead | None, values: list[ValueDifference]
) -> dict[str, Any]:
    pairs = _different(found, read)
    return {
        "differences": [asdict(one) for one in found.differences],
        "objects": {
            "compared": len(found.objects),
            "different": len(pairs),
            "first": [[one.path_a, one.path_b] for one in pairs[:_FIRST_JSON]],
        },
        "missing": {side: one.to_json() for side, one in found.missing.items()},
        "damaged": {} if read is None else read.damaged,
        "values": [one.to_json() for one in values],
    }


def _lines(
    found: Diff, read: BytesRead | None, values: list[ValueDifference]
) -> Iterator[str]:
    grouped: dict[str, tuple[Difference, list[str]]] = {}
    for one in found.differences:
        said = f"{one.section:<9}{{}}: {_sentence(one)}"
        grouped.setdefault(said, (one, []))[1].append(one.what)
    for one, names in grouped.values():
        named = text.named(names)
        yield f"{one.section:<9}{named + ': ' if named else ''}{_sentence(one)}"
    pairs = _different(found, read)
    if pairs:
        yield (
            f"objects  {len(pairs):,} of {len(found.objects):,} have other bytes: "
            + text.named([one.path_a for one in pairs])
        )
    for side, missing in found.missing.items():
        yield from text.missing_lines(missing, side)
    for name, paths in (read.damaged if read else {}).items():
        if paths:
            yield (
                f"damaged  {name}: {len(paths):,} objects are not what was committed: "
                f"{text.named(paths)}"
            )
    for value in values:
        yield f"values   {value.output}: {_distance(value)}"


def _sentence(one: Difference) -> str:
    if one.only is not None:
        value = one.a if one.only == "A" else one.b
        told = f"{one.field} " if one.field else ""
        told += f"{_short(value)} " if value is not None else ""
        return f"{told}only in {one.only}"
    return f"{one.field}: {_short(one.a)} in A, {_short(one.b)} in B"


def _short(value: Any) -> str:
    said = value if isinstance(value, str) else repr(value)
    return said if len(said) <= _LONGEST_VALUE else f"{said[: _LONGEST_VALUE - 3]}..."


def _distance(value: ValueDifference) -> str:
    told = [f"{value.blocks:,} blocks"]
    if value.cosine_mean is not None:
        told.append(
            f"cosine {value.cosine_mean:.8f} mean, {value.cosine_least:.8f} least; "
            f"largest error {value.largest_error:.3g}; {value.vectors:,} vectors"
        )
    for side, count in (("A", value.only_a), ("B", value.only_b)):
        if count:
            told.append(f"{count:,} vectors only in {side}")
    return "; ".join(told)
