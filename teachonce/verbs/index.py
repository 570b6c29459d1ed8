"""``teachonce index``: the dataset's index as two files that a job may name."""

from __future__ import annotations

import argparse
import os

from tqdm import tqdm

from manifests.errors import ManifestError
from manifests.storage import Store
from pipeline import index
from pipeline.bank.dataset_index import write_index
from pipeline.samples import sources
from teachonce.verbs import text


def run(args: argparse.Namespace) -> int:
    """Indexes shards into a folder; exit 1 where a shard is damaged."""
    *patterns, folder = args.shards
    if not patterns or folder.endswith(".tar"):
        raise ManifestError("index needs patterns and then a folder for the result")
    absolute = [p if "://" in p else os.path.abspath(p) for p in patterns]
    urls = sources.expand_shards(absolute)
    stats = sources.stat_shards(urls)
    named = list(zip(sources.name_shards(urls), urls, stats, strict=True))
    with tqdm(total=len(urls), unit="shard", desc="index", disable=None) as bar:
        shards = index.index_shards(named, lambda: bar.update())
    store = Store(folder if "://" in folder else os.path.abspath(folder))
    write_index(store, "dataset", shards)
    damaged = [shard.record for shard in shards if shard.record.damage]
    faults = {
        f"{shard.record.name}:{fault.key}": f"{fault.reason}: {fault.detail}"
        for shard in shards
        for fault in shard.record.faults
    }
    num_bytes = sum(shard.record.size_bytes for shard in shards)
    facts = {
        "dataset": store.url_of("dataset.json"),
        "shards": len(shards),
        "samples": sum(shard.record.samples for shard in shards),
        "bytes": num_bytes,
        "damaged": {record.name: record.damage for record in damaged},
        "faults": faults,
    }
    if args.json:
        text.print_json(facts)
    else:
        print(
            f"{facts['samples']:,} samples in {facts['shards']:,} shards, "
            f"{text.size(num_bytes)} -> {facts['dataset']}"
        )
        for record in damaged:
            print(f"damaged: {record.name}: {record.damage}")
        for name, why in faults.items():
            print(f"no row: {name}: {why}")
    return 1 if damaged else 0
