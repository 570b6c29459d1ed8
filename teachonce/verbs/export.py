"""``teachonce export``: a part of a bank as a bank of its own."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from tqdm import tqdm

from manifests.errors import TeachOnceError
from manifests.exported import Selection
from pipeline.bank.block_copy import BlockCopied
from pipeline.bank.export import ExportReport, export
from pipeline.bank.row_names import KeyList
from teachonce.verbs import text


def run(args: argparse.Namespace) -> int:
    """Exports; exit 1 where blocks are missing or damaged, with a line for each."""
    if args.fraction is not None and not 0 < args.fraction <= 1:
        raise TeachOnceError(f"--fraction must be in (0, 1], got {args.fraction}")
    if args.seed is not None and (args.fraction is None or args.seed < 0):
        raise TeachOnceError(
            f"--seed must be a number from 0 on, beside --fraction, got {args.seed}"
        )
    selection = Selection(
        teachers=tuple(args.teachers or ()),
        outputs=tuple(args.outputs or ()),
        groups=tuple(args.groups or ()),
        num_views=None if args.views is None else count_views(args.views),
        shards=tuple(args.shards or ()),
        # The option alone means all of them.
        inputs=() if args.inputs is None else tuple(args.inputs or ("*",)),
        fraction=args.fraction,
        seed=args.seed or 0,
        where=tuple(args.where),
        encodings=encodings(args.encoding),
    )
    keys = None if args.keys is None else KeyList.read(args.keys)
    with tqdm(
        unit="block", desc="export", disable=True if args.quiet else None, delay=1
    ) as bar:
        num_bytes = 0

        def total(count: int) -> None:
            bar.total = count
            bar.refresh()

        def done(copied: BlockCopied) -> None:
            nonlocal num_bytes
            num_bytes += copied.bytes
            bar.set_postfix_str(text.size(num_bytes), refresh=False)
            bar.update()

        report = export(
            args.bank,
            args.dest,
            selection,
            keys=keys,
            whole=args.whole,
            do_break_lock=args.break_lock,
            on_blocks=total,
            on_block=done,
        )
    if args.json:
        text.print_json({**asdict(report), "whole": report.is_whole})
    else:
        print_report(report)
    return 0 if report.is_whole else 1


def count_views(given: list[str]) -> int:
    """Returns how many views are asked for by numbers and ranges, ``0 1`` or ``0-1``.

    Raises:
        TeachOnceError: they are not all numbers from 0 on. A view is drawn by its
            number, so none can be left out before another.
    """
    numbers: set[int] = set()
    for part in (part for one in given for part in one.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise TeachOnceError(
                f"--views must be numbers such as 0 or 0-3, got {part!r}"
            )
        numbers |= set(range(int(first), int(last or first) + 1))
    if numbers != set(range(len(numbers))):
        raise TeachOnceError(
            f"--views must be all from 0 to some last one, got {' '.join(given)}: a "
            "view is drawn by its number, so none can be left out before another"
        )
    return len(numbers)


def encodings(given: list[str]) -> dict[str, str]:
    """Returns pattern to preset of ``OUTPUT=PRESET`` each.

    Raises:
        TeachOnceError: one is not of that form, or a pattern is given twice.
    """
    found: dict[str, str] = {}
    for one in given:
        pattern, _, preset = one.rpartition("=")
        if not pattern or not preset or pattern in found:
            raise TeachOnceError(
                "--encoding must be OUTPUT=PRESET, each output once, such as "
                f"'*/patch=compact', got {one!r}"
            )
        found[pattern] = preset
    return found


def print_report(report: ExportReport) -> None:
    """Prints what an export did, for people."""
    print(
        f"{report.bank}: {report.blocks:,} blocks of passes; {report.objects:,} "
        f"objects copied ({text.size(report.bytes)}, {report.seconds:.1f} s), "
        f"{report.held_objects:,} there already"
    )
    if report.left_out_inputs:
        print(
            f"left out copies of inputs ({', '.join(report.left_out_inputs)}); "
            "--inputs takes them along"
        )
    if report.chosen_of is not None:
        print(
            f"rows     {report.samples:,} of {report.chosen_of:,} samples; nothing of "
            "the others" + (", but:" if report.mixed_rows else "")
        )
    for path in report.mixed_rows:
        print(
            f"mixed    {path}: stored by the mean and deviation of chunks that held "
            f"others too; --encoding {path}=PRESET takes them anew, with a loss"
        )
    for problem in report.damaged:
        print(f"damaged  {problem}")
    for name, count in report.missing_blocks.items():
        if count:
            print(f"missing  pass {name}: {count} blocks")
    if report.damaged:
        print(
            "not finished: mend the bank (its job again with --repair), then the same "
            "command goes on"
        )
    elif report.is_whole:
        print("complete")
