"""``teachonce verify``: is every committed block what it was?"""

from __future__ import annotations

import argparse
from dataclasses import asdict

from pipeline.bank.record import open_record
from pipeline.bank.verify import VerifyReport, verify
from teachonce.verbs import text


def run(args: argparse.Namespace) -> int:
    """Verifies a bank; exit 1 where anything is wrong, with a line for each."""
    store, record = open_record(args.bank)
    report = verify(store, record, full=args.full)
    if args.json:
        text.print_json({**asdict(report), "sound": report.is_sound})
    else:
        print_report(report, args.full)
    return 0 if report.is_sound else 1


def print_report(report: VerifyReport, full: bool) -> None:
    """Prints what `verify` found, for people."""
    how = "every byte read" if full else "sizes compared; --full reads every byte"
    print(
        f"{report.blocks:,} blocks of passes, {report.objects:,} objects, "
        f"{text.size(report.bytes)} ({how})"
    )
    for problem in report.problems:
        print(problem)
    for name, count in report.missing_blocks.items():
        if count:
            print(f"pass {name}: {count} blocks not computed yet")
    if report.orphans:
        print(
            f"{len(report.orphans)} objects have no commit (an ended run left them; "
            "the same command takes them up)"
        )
    if report.is_sound:
        print("sound")
    elif report.problems:
        print("mend with: teachonce precompute JOB.yaml --repair")
