"""``teachonce info``: what a bank holds, also while it grows."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from pipeline.bank.holdings import Missing
from pipeline.bank.layout import OWN_GEOMETRY
from pipeline.bank.record import open_record
from pipeline.info import bank_facts
from teachonce.verbs import text


def run(args: argparse.Namespace) -> int:
    """Prints facts of a bank; exit 1 where it is not whole."""
    store, record = open_record(args.bank)
    facts = bank_facts(store, record)
    if args.json:
        text.print_json(facts)
    else:
        print_facts(facts)
    is_whole = facts["complete"] and not facts["damaged_shards"]
    return 0 if is_whole and not Missing(**facts["missing"]).is_damaged else 1


def print_facts(facts: dict[str, Any]) -> None:
    """Prints a bank's facts for people."""
    print(
        f"bank     {facts['bank']}: "
        + ("complete" if facts["complete"] else "not complete")
        + (f", locked by {facts['lock'].get('purpose')}" if facts["lock"] else "")
    )
    print(
        f"samples  {facts['samples']:,} in {facts['shards']:,} shards; "
        f"{facts['rows']:,} rows in blocks of {facts['block_rows']}, "
        f"{facts['views']} view(s)"
    )
    for one in facts["exported_from"][-1:]:
        chosen = one["samples"] and any(
            one["selection"][name] for name in ("keys_sha256", "fraction", "where")
        )
        part = f", {facts['samples']:,} of its {one['samples']:,} samples"
        when = one["exported"] + (part if chosen else "")
        print(f"from     {one['bank']}, exported {when}")
    print(f"licence  data: {facts['dataset_license'] or 'not stated'}")
    passes = [
        (
            name,
            one["model"].rsplit("/", 1)[-1],
            f"{one['blocks']}/{one['blocks_total']}",
            "" if one["valid"] is None else f"{one['valid']:,}",
            "" if one["bytes"] is None else text.size(one["bytes"]),
            one["license"] or ("" if one["model"] == "row facts" else "not stated"),
        )
        for name, one in facts["passes"].items()
    ]
    print(
        "\n"
        + text.table(("pass", "model", "blocks", "valid", "bytes", "licence"), passes)
    )
    outputs = [
        (
            path,
            " x ".join(map(str, one["shape"])),
            one["dtype"],
            one["encoding"],
            _channels(one["dead_channels"]),
        )
        for path, one in facts["outputs"].items()
    ]
    head = ("output", "row", "dtype", "encoding", "dead channels")
    print("\n" + text.table(head, outputs) + "\n")
    for name, one in facts["stored_inputs"].items():
        allowed = facts["copies_allowed"]
        print(
            f"images   copies of {name}: JPEG of quality {one['quality']}, shorter "
            f"side at most {one['short_side']}"
            + (f"; allowed by: {allowed}" if allowed else "")
        )
    for path, one in facts["outputs"].items():
        if not one["aligned"]:
            print(f"own      {path}: {OWN_GEOMETRY}")
    for name, one in facts["passes"].items():
        for reason, count in (one["invalid"] or {}).items():
            print(f"invalid  {name}: {count} rows {reason}")
    for name, one in facts["points"].items():
        if one["dropped"]:
            total = one["usable"] + one["dropped"]
            print(f"points   {name}: {one['dropped']:,} of {total:,} points dropped")
    if facts["faults_without_row"]:
        print(f"faults   {facts['faults_without_row']} things in shards got no row")
    for name, why in facts["damaged_shards"].items():
        print(f"damaged  {name}: {why}")
    for line in text.missing_lines(Missing(**facts["missing"])):
        print(line)
    for failure in facts["last_failures"]:
        print(f"failed   {failure}", file=sys.stderr)


def _channels(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return (
        f"{len(numbers)}: {shown}{', ...' if len(numbers) > 5 else ''}"
        if numbers
        else ""
    )
