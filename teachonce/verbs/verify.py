"""``teachonce verify``: is a bank what it was, and is it what its teachers say?"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from manifests.errors import ManifestError
from manifests.job import EngineConfig
from manifests.loading import load_job, resolve_patterns
from pipeline.bank.record import open_record
from pipeline.bank.verify import VerifyReport, verify
from teachonce.verbs import text

if TYPE_CHECKING:
    from pipeline.recheck import OutputVerdict, Recheck


def run(args: argparse.Namespace) -> int:
    """Verifies a bank; exit 1 where anything is wrong, with a line for each."""
    _check(args)
    store, record = open_record(args.bank)
    # What makes a recheck impossible is said before anything is verified.
    found = None if args.recheck is None else _recheck(args)
    report = verify(store, record, full=args.full)
    is_sound = report.is_sound and (found is None or found.holds)
    if args.json:
        facts = {**asdict(report), "sound": is_sound}
        if found is not None:
            facts["recheck"] = recheck_facts(found)
        text.print_json(facts)
    else:
        print_report(report, args.full)
        if found is not None:
            print_recheck(found)
    return 0 if is_sound else 1


def _check(args: argparse.Namespace) -> None:
    if args.recheck is None:
        for name in ("job", "teachers", "shards", "seed", "device"):
            if getattr(args, name):
                raise ManifestError(f"--{name} has no effect without --recheck N")
    elif args.recheck < 1:
        raise ManifestError(
            f"--recheck must be a number of rows of at least 1, got {args.recheck}"
        )


def _recheck(args: argparse.Namespace) -> Recheck:
    from pipeline.recheck_rows import recheck

    job = None if args.job is None else load_job(args.job)
    engine = EngineConfig() if job is None else job.engine
    if args.device is not None:
        engine = engine.model_copy(update={"device": args.device})
    return recheck(
        args.bank,
        args.recheck,
        seed=args.seed,
        teachers=args.teachers,
        shards=None if args.shards is None else resolve_patterns(args.shards, "."),
        job=job,
        engine=engine,
    )


def recheck_facts(found: Recheck) -> dict[str, Any]:
    """Returns what a recheck found, as JSON values."""
    outputs = [one.to_json() for one in found.outputs]
    return {**asdict(found), "outputs": outputs, "holds": found.holds}


def print_recheck(found: Recheck) -> None:
    """Prints what a recheck found, for people."""
    from pipeline.recheck import TOLERANCE

    print(
        f"rechecked {found.rows:,} rows, {found.invalid_rows:,} invalid ones tried, "
        f"seed {found.seed}, on {found.device}"
    )
    head: tuple[str, ...] = ("output", "rows x views", "identical", "cosine", "worst")
    head += ("standardised", "worst", "largest error", "beyond rounding", "")
    print(text.table(head, (_line(one) for one in found.outputs)))
    for name, why in found.notes.items():
        print(f"pass {name}: bits need not be the same ({why})")
    if found.notes:
        print(f"there {TOLERANCE}")
    for one in found.outputs:
        if not one.holds and one.worst is not None:
            print(
                f"{one.output}: {one.failed:,} of {one.compared:,} are not what the "
                f"teacher says; worst is row {one.worst.row} ({one.worst.key!r} of "
                f"{one.worst.shard}) in view {one.worst.view}"
            )
    for problem in found.problems:
        print(problem)
    if found.holds:
        print("the bank is what its teachers say")


def _line(one: OutputVerdict) -> tuple[str, ...]:
    means = one.standardised_mean, one.standardised_worst
    return (
        one.output,
        f"{one.compared:,}",
        text.share(one.identical / one.compared if one.compared else None),
        f"{one.cosine_mean:.7f}",
        f"{one.cosine_worst:.7f}",
        *("" if value is None else f"{value:.7f}" for value in means),
        f"{one.largest_error:.2g}",
        f"{one.largest_excess:.2g}",
        "holds" if one.holds else "DIFFERS",
    )


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
