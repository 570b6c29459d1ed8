"""Hostile input for as long as one likes: ``python -m tests.fuzz --target tar``.

Exit code 0: the law held; 1: it did not, the inputs lie in ``--keep``. A process that
died in mid-input left it in ``at-work/``. What is mended goes into
``tests/data/corpus``, where every run of the tests meets it again.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path

from tests.fuzz.campaign import run_campaign
from tests.fuzz.targets import TARGETS, Target

# An arena of address space per thread, of which little is used, would hide the bound.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": "1"}


def main() -> int:
    """Runs one target; returns the exit code."""
    if any(os.environ.get(name) != value for name, value in _ENVIRONMENT.items()):
        again = [sys.executable, "-m", "tests.fuzz", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, **_ENVIRONMENT})
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--target", choices=[*TARGETS, "bank"], required=True)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument(
        "--rounds", type=int, help="mutants; as many as there is time for"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for inputs that do harm")
    options = parser.parse_args()
    faulthandler.enable()
    warnings.simplefilter("error")
    keep = options.keep or Path(tempfile.mkdtemp(prefix="teachonce-fuzz-"))
    target = _bank(keep) if options.target == "bank" else TARGETS[options.target]
    started = time.monotonic()
    until = started + 60 * options.minutes
    campaign = run_campaign(target, options.seed, options.rounds, until, keep)
    print(
        f"{options.target}: {campaign.inputs} inputs in "
        f"{time.monotonic() - started:.0f} s, "
        f"{campaign.accepted} taken, {campaign.refused} refused, "
        f"{len(campaign.found)} against the law"
    )
    if campaign.found:
        print(f"they lie in {keep}")
    return 1 if campaign.found else 0


def _bank(keep: Path) -> Target:
    # It needs torch, which the others do not wait for.
    from tests.fuzz.bank_target import bank_target

    return bank_target(keep)


if __name__ == "__main__":
    sys.exit(main())
