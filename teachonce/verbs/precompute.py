"""``teachonce precompute``: the main job."""

from __future__ import annotations

import argparse
import sys

from manifests.errors import ManifestError
from manifests.loading import load_job
from manifests.prices import load_prices
from pipeline.cost import Assumed, Terms
from pipeline.precompute import Outcome, precompute
from teachonce.verbs import text


def run(args: argparse.Namespace) -> int:
    """Makes a bank; exit 1 where a shard failed or the bank is not whole."""
    job = load_job(args.job, args.overrides)
    outcome = precompute(
        job,
        args.beam_options,
        do_repair=args.repair,
        do_break_lock=args.break_lock,
        fail_fast=args.fail_fast,
        quiet=args.quiet,
        terms=_terms(args),
    )
    if args.json:
        state = outcome.record.state
        text.print_json(
            {
                "bank": job.bank,
                "was_done": outcome.was_done,
                "result": outcome.result.model_dump(mode="json"),
                "counters": outcome.counters,
                "repaired": outcome.removed,
                "state": state.model_dump(mode="json") if state else None,
            }
        )
    else:
        print_outcome(job.bank, outcome)
    return 0 if outcome.is_whole else 1


def _terms(args: argparse.Namespace) -> Terms | None:
    """Returns what the price is judged by, None where no machine is named."""
    if args.machine is None:
        if args.speedup is not None or args.prices is not None:
            raise ManifestError(
                "--speedup and --prices are about the machine that will run the job; "
                "name it, --machine NAME"
            )
        return None
    assumed = Assumed(machine=args.machine, speedup=args.speedup)
    return Terms(assumed, load_prices(args.prices))


def print_outcome(bank: str, outcome: Outcome) -> None:
    """Prints what a run did, for people."""
    result, state = outcome.result, outcome.record.state
    assert state is not None
    if outcome.was_done:
        print(f"nothing to do: {bank} has all of it ({state.rows:,} samples)")
    else:
        seconds = ", ".join(f"{k} {v:.1f} s" for k, v in result.seconds.items())
        print(
            f"{result.blocks:,} blocks of passes committed, {result.samples:,} "
            f"samples, {text.size(result.bytes_read)} read, "
            f"{text.size(result.bytes_written)} "
            f"written ({seconds})"
        )
    for name, block in outcome.removed:
        print(f"repaired: pass {name} block {block}")
    for name in state.valid:
        reasons = ", ".join(f"{n} {why}" for why, n in state.invalid[name].items())
        print(
            f"{name}: {state.valid[name]:,} of {state.rows:,} rows valid"
            + (f"; {reasons}" if reasons else "")
        )
    for shard, why in state.damaged_shards.items():
        print(f"damaged shard {shard}: {why}", file=sys.stderr)
    if result.failed_items > len(result.failures):
        print(f"{result.failed_items} work items failed, shown are:", file=sys.stderr)
    for failure in result.failures:
        print(f"failed: {failure}", file=sys.stderr)
    lacking = [name for name in state.valid if name not in state.complete_passes]
    if set(lacking) & set(outcome.wanted):
        print("the bank is not complete: run the same command again", file=sys.stderr)
    elif lacking:
        print(f"not complete, and not of this job: {', '.join(lacking)}")
