"""The bank's card: README.md for whoever is handed the bank."""

from __future__ import annotations

from manifests.bank import BankRecord
from pipeline.bank import layout


def render_card(url: str, record: BankRecord) -> str:
    """Returns the card as Markdown; equal for equal banks."""
    state = record.state
    assert state is not None
    shards = [shard for shard in record.shards if not shard.retired]
    lines = [
        f"# Feature bank {url.rstrip('/').rsplit('/', 1)[-1]}",
        "",
        f"{state.rows:,} samples of {len(shards):,} shards, {record.num_views} "
        f"view(s), blocks of {record.block_rows} rows. "
        + (
            "Complete."
            if state.complete
            else "**Not complete: run the same job again.**"
        ),
        "",
        *_origin(record),
        f"Data licence: {record.dataset.get('license') or 'not stated'}.",
        "",
        "| teacher | model | inputs | valid rows | licence of the weights | sha256 |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for entry in record.passes:
        if not entry.outputs:
            continue
        weights = entry.provenance["weights"]
        sha = weights["sha256"][:12] or f"random, seed {weights['seed']}"
        lines.append(
            f"| {entry.teacher} | {entry.model} | {', '.join(entry.inputs)} "
            f"| {state.valid[entry.id]:,} "
            f"| {entry.provenance.get('license') or 'not stated'} | {sha} |"
        )
    lines += ["", "| array (sample, view, ...) | shape of a row | encoding | dtype |"]
    lines += ["| --- | --- | --- | --- |"]
    for path, _, output in layout.outputs(record):
        shape = " x ".join(str(length) for length in output.shape)
        lines.append(
            f"| {path} | {shape} | {output.encoding['encoding']} | {output.dtype} |"
        )
    unaligned = [
        layout.level_path(entry, size)
        for entry in record.passes
        for size in dict.fromkeys(output.size for output in entry.outputs)
        if entry.has_own_geometry(size)
    ]
    if unaligned:
        lines += [
            "",
            f"Not aligned: {', '.join(dict.fromkeys(unaligned))} hold "
            f"{layout.OWN_GEOMETRY}, nor on the grids of other teachers.",
        ]
    lines += [
        "",
        "Open it with anything that reads Zarr v3:",
        "",
        "```python",
        "import xarray as xr",
        f'url = "{url}/features.zarr"',
        'tree = xr.open_datatree(url, engine="zarr", consolidated=False)',
        "```",
        "",
        "Row i belongs to `key[i]`; rows where `valid` is false hold each array's fill "
        "value. `index/` has a line per row with shard, key and the reason where a row "
        "is not valid; `bank.json` says which weights and which preprocessing made it.",
        "",
    ]
    return "\n".join(lines)


def _origin(record: BankRecord) -> list[str]:
    """Returns what the card says of the banks that this one was copied from."""
    held = {path for path, _, _ in layout.outputs(record)}
    num_shards = sum(not shard.retired for shard in record.shards)
    lines = []
    for origin in record.exported_from:
        parts = []
        left_out = [path for path in origin.outputs if path not in held]
        if left_out:
            parts.append(f"without {', '.join(left_out)}")
        if num_shards < origin.shards:
            parts.append(f"{num_shards:,} of its {origin.shards:,} shards")
        if record.num_views < origin.num_views:
            parts.append(f"{record.num_views} of its {origin.num_views} views")
        what = f"**A part** ({'; '.join(parts)})" if parts else "A copy"
        lines += [
            f"{what} of {origin.bank}, exported {origin.exported} (sha256 of its "
            f"bank.json: {origin.bank_sha256[:12]}).",
            "",
        ]
    return lines
