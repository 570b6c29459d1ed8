"""The end of a run: the bank is finalised and what the run did is written down."""

from __future__ import annotations

from manifests.bank import BankRecord, WorkResult
from manifests.storage import Store
from pipeline.bank.finalise import finalise
from pipeline.bank.lock import bank_lock
from pipeline.bank.record import open_record
from pipeline.runs import end_run

LONGEST_WRITE_S = 3600.0


def finalise_run(bank_url: str, run_id: str, result: WorkResult) -> BankRecord:
    """Finalises the bank at the end of a run and writes down what the run did."""
    store = Store(bank_url)
    with bank_lock(store, f"finalise of run {run_id}"):
        _, record = open_record(bank_url)
        finished = finalise(store, record)
        end_run(store, run_id, result.model_dump(mode="json"))
        store.clear_temporary(LONGEST_WRITE_S)
    return finished
