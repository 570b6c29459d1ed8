"""What a report says of a bank in words and numbers.

Gathers; draws nothing. Everything becomes text here, so that a page has only to escape
it. Runs and scores are ``run_facts`` and ``score_facts``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifests.bank import BankRecord
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.commits import read_blocks
from pipeline.bank.open import Bank
from pipeline.bank.places import FEATURES
from pipeline.info import bank_facts
from pipeline.runs import list_runs
from teachonce.report.tables import NONE, Table
from teachonce.verbs.text import size

_SHA_LETTERS = 12
_FLOAT32_BYTES = 4
_FORWARD = "forward."


@dataclass(frozen=True)
class BankFacts:
    """What is said of a bank.

    Attributes:
        summary: what to what.
        teachers: one line per pass.
        outputs: one line per output: bytes against float32.
        arrays: one line per array.
        invalid: rows by pass and reason; None where all are valid.
        damage: what is damaged or failed, a line each.
    """

    summary: tuple[tuple[str, str], ...]
    teachers: Table
    outputs: Table
    arrays: Table
    invalid: Table | None
    damage: tuple[str, ...]


def describe_bank(bank: Bank) -> BankFacts:
    """Returns what a report says of a bank, also of one that is not finalised."""
    record, store = bank.record, Store(bank.url)
    facts = bank_facts(store, record)
    sizes = array_bytes(store, record)
    return BankFacts(
        _summary(facts, sizes, record),
        _teachers(facts, record, teacher_seconds(store)),
        _outputs(store, record, sizes),
        _arrays(store, record, sizes),
        _invalid(facts),
        tuple(_damage(facts)),
    )


def _summary(
    facts: Mapping[str, Any], sizes: Mapping[str, int], record: BankRecord
) -> tuple[tuple[str, str], ...]:
    shards = f"{facts['shards']:,}"
    if facts["retired_shards"]:
        shards += f" and {facts['retired_shards']:,} retired"
    return (
        ("bank", str(facts["bank"])),
        ("state", "complete" if facts["complete"] else "not complete"),
        ("samples", f"{facts['samples']:,} in {shards} shards"),
        ("rows", f"{facts['rows']:,} in blocks of {facts['block_rows']:,}"),
        ("views", f"{facts['views']:,}"),
        ("inputs", ", ".join(record.inputs)),
        ("labels", ", ".join(record.labels) or NONE),
        ("features", size(sum(sizes.values()))),
        ("data licence", str(facts["dataset_license"] or "not stated")),
        ("format", f"Zarr v3, schema {facts['schema_version']}"),
        ("made by", record.created_by),
    )


def teacher_seconds(store: Store) -> dict[str, float]:
    """Returns seconds of forwards by teacher, over all runs that ended."""
    found: dict[str, float] = defaultdict(float)
    for run in list_runs(store):
        for stage, seconds in ((run.get("result") or {}).get("seconds") or {}).items():
            if stage.startswith(_FORWARD):
                found[stage.removeprefix(_FORWARD)] += seconds
    return dict(found)


def _teachers(
    facts: Mapping[str, Any], record: BankRecord, seconds: Mapping[str, float]
) -> Table:
    rows = []
    # One teacher may have several passes; its time is not known by pass.
    told: set[str] = set()
    for entry in record.passes:
        if not entry.outputs or entry.holds_inputs:
            continue
        one = facts["passes"][entry.id]
        taken = seconds.get(entry.teacher)
        known = taken is not None and entry.teacher not in told
        told.add(entry.teacher)
        rows.append(
            (
                entry.teacher,
                entry.model.rsplit("/", 1)[-1],
                ", ".join(entry.inputs),
                str(entry.first_view)
                if entry.first_view == entry.last_view
                else f"{entry.first_view} to {entry.last_view}",
                _weights(one["weights"] or {}),
                str(one["license"] or "not stated"),
                f"{one['blocks']:,} of {one['blocks_total']:,}",
                NONE if one["valid"] is None else f"{one['valid']:,}",
                NONE if one["valid"] is None else f"{sum(one['invalid'].values()):,}",
                f"{taken:,.1f}" if known else NONE,
            )
        )
    head = (
        "teacher",
        "model",
        "inputs",
        "views",
        "weights (sha256)",
        "licence of the weights",
        "blocks",
        "valid rows",
        "invalid rows",
        "seconds of forwards",
    )
    return Table(head, tuple(rows), frozenset({6, 7, 8, 9}))


def _weights(weights: Mapping[str, Any]) -> str:
    if weights.get("sha256"):
        return str(weights["sha256"])[:_SHA_LETTERS]
    return f"random, seed {weights['seed']}" if "seed" in weights else NONE


def array_bytes(store: Store, record: BankRecord) -> dict[str, int]:
    """Returns bytes of the committed objects of each array of features."""
    found: dict[str, int] = defaultdict(int)
    for objects in _committed(store, record):
        for path, size_bytes in objects:
            found[path] += size_bytes
    return dict(found)


def _committed(store: Store, record: BankRecord) -> Iterator[list[tuple[str, int]]]:
    """Yields each committed block's objects of arrays: path of the array, bytes."""
    if record.state is None:
        return
    table = read_blocks(store)
    for paths, sizes in zip(
        table["objects"].to_pylist(), table["size_bytes"].to_pylist(), strict=True
    ):
        yield [
            (path.removeprefix(f"{FEATURES}/").rpartition("/")[0], size_bytes)
            for path, size_bytes in zip(paths, sizes, strict=True)
            if path.startswith(f"{FEATURES}/")
        ]


def float32_bytes(store: Store, record: BankRecord) -> dict[str, int]:
    """Returns what each array's rows and views would take as float32, by its path.

    An array that holds a part of an output counts as the whole output.
    """
    if record.state is None:
        return {}
    values = {
        ArraySpec.from_json(array).path: int(np.prod(output.shape))
        for _, _, output in layout.outputs(record)
        for array in output.arrays
    }
    found: dict[str, int] = defaultdict(int)
    rows = read_blocks(store)["rows"].to_pylist()
    for count, objects in zip(rows, _committed(store, record), strict=True):
        for path, _ in objects:
            found[path] += _FLOAT32_BYTES * count * values.get(path, 0)
    return dict(found)


def _outputs(store: Store, record: BankRecord, sizes: Mapping[str, int]) -> Table:
    rows = []
    as_float32 = float32_bytes(store, record)
    total = [0, 0]
    for path, entry, output in layout.outputs(record):
        if entry.holds_inputs:
            # Bytes of pictures are no float32; they are among the arrays.
            continue
        arrays = [ArraySpec.from_json(data).path for data in output.arrays]
        stored = sum(sizes.get(array, 0) for array in arrays)
        full = as_float32.get(arrays[0], 0)
        total = [total[0] + stored, total[1] + full]
        rows.append(
            (
                path,
                _times(output.shape),
                output.dtype,
                str(output.encoding["encoding"]),
                size(stored),
                size(full),
                _share(stored, full),
            )
        )
    rows.append(("all", "", "", "", size(total[0]), size(total[1]), _share(*total)))
    head = (
        "output",
        "shape of a row",
        "computed in",
        "encoding",
        "on disk",
        "as float32",
        "share",
    )
    return Table(head, tuple(rows), frozenset({4, 5, 6}))


def _arrays(store: Store, record: BankRecord, sizes: Mapping[str, int]) -> Table:
    rows = []
    lead = f"{record.num_rows:,}"
    for spec in layout.feature_arrays(record):
        views = (record.num_views,) if spec.has_view else ()
        rows.append(
            (
                spec.path,
                _times((lead, *views, *spec.row_shape)),
                spec.dtype,
                spec.codec,
                size(sizes.get(spec.path, 0)),
            )
        )
    for array in layout.row_arrays(record):
        views = (record.num_views,) if array.has_view else ()
        held = sum(count for _, count in store.list(f"{FEATURES}/{array.path}/"))
        rows.append(
            (
                array.path,
                _times((lead, *views, *array.row_shape)),
                array.dtype,
                "zstd",
                size(held),
            )
        )
    head = ("array of features.zarr", "shape", "stored as", "codec", "bytes")
    return Table(head, tuple(rows), frozenset({4}))


def _invalid(facts: Mapping[str, Any]) -> Table | None:
    rows = tuple(
        (name, reason, f"{count:,}")
        for name, one in facts["passes"].items()
        for reason, count in (one["invalid"] or {}).items()
    )
    return Table(("pass", "reason", "rows"), rows, frozenset({2})) if rows else None


def _damage(facts: Mapping[str, Any]) -> Iterator[str]:
    for name, why in facts["damaged_shards"].items():
        yield f"shard {name} is damaged: {why}"
    if facts["faults_without_row"]:
        yield f"{facts['faults_without_row']:,} things in shards got no row"
    for failure in facts["last_failures"]:
        yield f"the last run failed: {failure}"


def _times(shape: Sequence[object]) -> str:
    return " x ".join(str(length) for length in shape)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else NONE
