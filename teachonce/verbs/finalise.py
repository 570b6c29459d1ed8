"""``teachonce finalise``: index, row arrays and statistics of what is committed."""

from __future__ import annotations

import argparse

from manifests.storage import Store
from pipeline.bank.finalise import finalise
from pipeline.bank.lock import bank_lock
from pipeline.bank.record import open_record


def run(args: argparse.Namespace) -> int:
    """Finalises a bank; exit 1 where blocks are still missing."""
    store = Store(args.bank)
    open_record(args.bank)
    with bank_lock(store, "finalise"):
        _, record = open_record(args.bank)
        state = finalise(store, record).state
    assert state is not None
    print(f"{state.rows:,} rows; " + ("complete" if state.complete else "not complete"))
    return 0 if state.complete else 1
