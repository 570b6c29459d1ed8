"""Runs: who ran what, when; the settings workers need; the work items of a run."""

from __future__ import annotations

import gzip
import json
import os
import platform
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from manifests.bank import WorkItem
from manifests.errors import ManifestError
from manifests.own_checksum import parse_checked, with_own_checksum
from manifests.storage import Store
from pipeline.bank.lock import died_here, make_owner


def new_run_id() -> str:
    """Returns a name that sorts by time and is not used twice."""
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()) + "-" + uuid.uuid4().hex[:6]


def run_path(run_id: str) -> str:
    """Returns where a run's record lies in the bank."""
    return f"runs/{run_id}.json"


def items_path(run_id: str) -> str:
    """Returns where a run's work items lie until it ends."""
    return f"runs/{run_id}.items.jsonl.gz"


def start_run(
    store: Store, run_id: str, settings: Mapping[str, Any], items: Iterable[WorkItem]
) -> int:
    """Writes a run's work items and record; returns the number of items."""
    lines = [item.model_dump_json() for item in items]
    record = {
        "run": run_id,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "owner": make_owner("run"),
        "user": os.environ.get("USER", ""),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "work_items": len(lines),
        **settings,
    }
    write_run(store, run_id, record)
    data = gzip.compress("\n".join(lines).encode(), compresslevel=1, mtime=0)
    store.replace(items_path(run_id), data)
    return len(lines)


def write_run(store: Store, run_id: str, record: Mapping[str, Any]) -> None:
    """Replaces a run's record."""
    text = json.dumps(record, indent=1).encode()
    store.replace(run_path(run_id), with_own_checksum(text))


def read_run(store: Store, run_id: str) -> dict[str, Any]:
    """Returns a run's record.

    Raises:
        ManifestError: it is damaged.
    """
    path = run_path(run_id)
    return parse_checked(store.read(path), store.url_of(path))


def end_run(store: Store, run_id: str, result: Mapping[str, Any]) -> None:
    """Adds what a run did to its record and drops its work items."""
    record = read_run(store, run_id)
    ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_run(store, run_id, {**record, "ended": ended, "result": dict(result)})
    for other in list_runs(store):
        # What a killed run was about to do is planned anew by whoever goes on.
        if other["run"] == run_id or (
            "ended" not in other and died_here(other.get("owner", {}))
        ):
            store.delete(items_path(other["run"]))


def list_runs(store: Store) -> list[dict[str, Any]]:
    """Returns the records of all runs, oldest first; of a damaged one, its name."""
    paths = sorted(path for path, _ in store.list("runs") if path.endswith(".json"))
    return [{**_read(store, path), "run": PurePosixPath(path).stem} for path in paths]


def _read(store: Store, path: str) -> dict[str, Any]:
    """Returns the record of a run, empty where it is damaged or none."""
    try:
        record = parse_checked(store.read(path), store.url_of(path))
    except ManifestError:
        return {}
    told = record.get("owner", {}), record.get("result") or {}
    return record if all(isinstance(one, dict) for one in told) else {}
