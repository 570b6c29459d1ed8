"""``bank.json``: reading it with care, writing it whole."""

from __future__ import annotations

import json

from manifests.bank import BANK_SCHEMA, BankRecord
from manifests.errors import BankError
from manifests.loading import load_json
from manifests.own_checksum import with_own_checksum
from manifests.storage import Store
from pipeline.bank.places import FEATURES as FEATURES
from pipeline.bank.record_check import check_record
from pipeline.samples.views import ViewPolicy

RECORD_PATH = "bank.json"
# The record of an export that has not ended; bank.json takes its place.
UNFINISHED_PATH = "export.json"


def read_record(store: Store) -> BankRecord | None:
    """Returns the record of the bank in ``store``, or None where there is none yet.

    Raises:
        BankError: it was made by a newer TeachOnce, something else lies there, or an
            export to there has not ended.
        ManifestError: it is damaged.
    """
    text = store.read_or_none(RECORD_PATH)
    if text is None:
        if store.size(UNFINISHED_PATH) is not None:
            raise BankError(
                f"{store.url} must be a whole bank, got an export that has not ended "
                f"({UNFINISHED_PATH}); run the same `teachonce export` again"
            )
        return None
    return parse_record(store, text)


def parse_record(store: Store, text: bytes, path: str = RECORD_PATH) -> BankRecord:
    """Returns the record of the bank in ``store`` that ``text`` holds.

    Raises:
        BankError: it was made by a newer TeachOnce, something else lies there, or it
            contradicts itself.
        ManifestError: it is damaged.
    """
    try:
        version = json.loads(text).get("schema_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise BankError(
            f"{store.url_of(path)} is not a bank record ({error}); restore it "
            "from a copy, everything else of the bank is still there"
        ) from error
    if type(version) is not int or not 1 <= version <= BANK_SCHEMA:
        raise BankError(
            f"bank {store.url} has schema version {version}, this TeachOnce reads up "
            f"to {BANK_SCHEMA} ({path}); install a newer one"
        )
    record = load_json(BankRecord, text, store.url_of(path))
    check_record(record, store.url_of(path))
    return record


def open_record(url: str) -> tuple[Store, BankRecord]:
    """Returns store and record of an existing bank; raises BankError where none is."""
    store = Store(url)
    record = read_record(store)
    if record is None:
        raise BankError(
            f"no bank at {url} (bank.json is missing); check the path, or make one "
            "with `teachonce precompute JOB.yaml`"
        )
    return store, record


def encode_record(record: BankRecord) -> bytes:
    """Returns the bytes of ``bank.json``, with its own crc32c; equal for equal ones."""
    text = json.dumps(record.model_dump(mode="json", by_alias=True), indent=1)
    return with_own_checksum(text.encode())


def write_record(store: Store, record: BankRecord, path: str = RECORD_PATH) -> None:
    """Replaces the record; only for the holder of the bank's lock."""
    store.replace(path, encode_record(record))


def view_policy_of(record: BankRecord) -> ViewPolicy:
    """Returns how a bank draws views."""
    view0 = {name: one.view0 for name, one in record.inputs.items() if one.view0}
    return ViewPolicy.from_json({**record.views, "view0": view0})
