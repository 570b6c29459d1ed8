"""What a bank holds: facts for `info`, also while it grows."""

from __future__ import annotations

from typing import Any

import numpy as np

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.holdings import read_holdings
from pipeline.bank.lock import read_lock
from pipeline.bank.places import FEATURES
from pipeline.bank.statistics import dead_channels
from pipeline.bank.whole_arrays import read_whole_array
from pipeline.runs import list_runs


def _variance(store: Store, record: BankRecord, path: str) -> np.ndarray | None:
    """Returns the variance of an output, None where it has no sound statistics."""
    level, _, name = path.rpartition("/")
    features = Store(store.url_of(FEATURES))
    try:
        return read_whole_array(features, record, f"{level}/stats/{name}_variance")
    except BankError:
        # What is missing is told beside it; `verify` speaks of damage.
        return None


def bank_facts(store: Store, record: BankRecord) -> dict[str, Any]:
    """Returns all that `info` prints, as JSON values."""
    live = [shard for shard in record.shards if not shard.retired]
    blocks = set(record.live_blocks)
    holdings = read_holdings(store, record)
    held = holdings.committed()
    stored: dict[str, int] = {}
    for (name, _), objects in holdings.table.items():
        stored[name] = stored.get(name, 0) + sum(size for size, _ in objects.values())
    missing = holdings.missing()
    passes = {}
    for entry in record.passes:
        state = record.state
        passes[entry.id] = {
            "model": entry.model,
            "inputs": list(entry.inputs),
            "views": [entry.first_view, entry.last_view],
            "blocks": len(held[entry.id] & blocks),
            "blocks_total": len(blocks),
            "bytes": stored.get(entry.id),
            "valid": state.valid.get(entry.id) if state else None,
            "invalid": dict(state.invalid.get(entry.id, {})) if state else None,
            "license": entry.provenance.get("license"),
            "weights": entry.provenance.get("weights"),
            "fingerprint": entry.fingerprint,
        }
    outputs = {}
    for path, entry, output in layout.outputs(record):
        if entry.holds_inputs:
            continue
        variance = _variance(store, record, path)
        dead = [] if variance is None else dead_channels(variance).tolist()
        outputs[path] = {
            "shape": list(output.shape),
            "dtype": output.dtype,
            "encoding": output.encoding["encoding"],
            "norm": output.norm,
            "aligned": not entry.has_own_geometry(output.size),
            "dead_channels": dead,
        }
    points = record.state.points if record.state else {}
    dropped = record.state.dropped_points if record.state else {}
    runs = list_runs(store)
    last = (runs[-1].get("result") or {}) if runs else {}
    return {
        "bank": store.url,
        "schema_version": record.schema_version,
        "complete": bool(record.state and record.state.complete),
        "samples": sum(shard.samples for shard in live),
        "shards": len(live),
        "retired_shards": len(record.shards) - len(live),
        "damaged_shards": {shard.name: shard.damage for shard in live if shard.damage},
        "faults_without_row": sum(shard.faults for shard in live),
        "rows": record.num_rows,
        "block_rows": record.block_rows,
        "views": record.num_views,
        "dataset_license": record.dataset.get("license"),
        "copies_allowed": record.dataset.get("copies_allowed"),
        "stored_inputs": {
            entry.inputs[0]: {"path": path, **entry.request["args"]}
            for path, entry, _ in layout.outputs(record)
            if entry.holds_inputs
        },
        "passes": passes,
        "outputs": outputs,
        "points": {
            name: {"usable": count, "dropped": dropped.get(name, 0)}
            for name, count in points.items()
        },
        "exported_from": [
            one.model_dump(mode="json", exclude={"outputs"})
            for one in record.exported_from
        ],
        "missing": missing.to_json(),
        "lock": read_lock(store),
        "runs": len(runs),
        "last_failures": last.get("failures", []),
    }
