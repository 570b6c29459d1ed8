"""``report BANK``: pictures of a bank, of runs trained from it, and their scores."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from manifests.errors import TeachOnceError
from pipeline.bank.open import open_bank
from teachonce.report import write_report


def run(args: argparse.Namespace) -> int:
    """Writes the page; exit 0."""
    runs = {}
    for given in args.run or ():
        name, equals, folder = given.partition("=")
        if not equals or not name or not folder:
            raise TeachOnceError(f"--run must be NAME=FOLDER, got {given!r}")
        runs[name] = Path(folder)
    bank = open_bank(args.bank)
    page = write_report(
        args.out,
        bank,
        runs,
        None if args.probe is None else _scores(args.probe),
        title=args.title or f"Feature bank {bank.url.rstrip('/').rpartition('/')[2]}",
        rows=None,
        shards=args.shards,
    )
    print(page)
    return 0


def _scores(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise TeachOnceError(
            f"--probe must be the result of `teachonce probe`, got {path}: {error}"
        ) from error
    if not isinstance(found, dict):
        raise TeachOnceError(f"--probe must be the result of a probe, got {path}")
    return found
