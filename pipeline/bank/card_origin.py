"""What a card says of where a bank was copied from, and what that did to its values."""

from __future__ import annotations

from collections.abc import Iterator

from manifests.bank import BankRecord
from manifests.exported import ExportedFrom
from pipeline.bank import layout
from pipeline.bank.encodings import encoding_from_json


def origin(record: BankRecord) -> list[str]:
    """Returns what the card says of the banks that this one was copied from."""
    held = {path for path, _, _ in layout.outputs(record)}
    num_shards = sum(not shard.retired for shard in record.shards)
    num_samples = sum(shard.samples for shard in record.shards if not shard.retired)
    lines = []
    for one in record.exported_from:
        parts = []
        left_out = [path for path in one.outputs if path not in held]
        if left_out:
            parts.append(f"without {', '.join(left_out)}")
        if num_shards < one.shards:
            parts.append(f"{num_shards:,} of its {one.shards:,} shards")
        if record.num_views < one.num_views:
            parts.append(f"{record.num_views} of its {one.num_views} views")
        if one.samples is not None and one.selection.chooses_rows:
            parts.append(_chosen(num_samples, one))
        what = f"**A part** ({'; '.join(parts)})" if parts else "A copy"
        anew = ", ".join(f"{a} as {b}" for a, b in one.selection.encodings.items())
        what += f", with {anew}," if anew else ""
        lines += [
            f"{what} of {one.bank}, exported {one.exported} (sha256 of its "
            f"bank.json: {one.bank_sha256[:12]}).",
            "",
        ]
    return lines


def _chosen(num_samples: int, one: ExportedFrom) -> str:
    """Returns by what the samples of a part were chosen."""
    selection = one.selection
    by = []
    if selection.num_keys is not None:
        by.append(f"by a list of {selection.num_keys:,} keys")
    if selection.fraction is not None:
        by.append(f"fraction {selection.fraction:g} with seed {selection.seed}")
    by += [f"where `{text}`" for text in selection.where]
    return f"{num_samples:,} of its {one.samples or 0:,} samples, {', '.join(by)}"


def changed_outputs(record: BankRecord) -> Iterator[str]:
    """Yields what exports did to the values of outputs."""
    told: dict[str, None] = {}
    for entry in record.passes:
        made = entry.provenance
        for output in entry.outputs:
            name = f"{output.size}/{output.name}"
            path = f"{layout.level_path(entry, output.size)}/{output.name}"
            decoded = made.get("decoded_from", {}).get(name, ())
            before = [encoding_from_json(one) for one in decoded]
            if before:
                was_exact = all(one.is_exact for one in before)
                rounded = "no loss" if was_exact else "**rounded before**"
                names = ", then ".join(one.preset for one in before)
                told[
                    f"- `{path}` was encoded from what a bank held as {names} "
                    f"({rounded}), not by running its teacher."
                ] = None
            if name in made.get("mixed_rows", ()):
                told[
                    f"- `{path}` is stored by the mean and deviation of channels over "
                    "chunks of the bank it was copied from, of which some rows are not "
                    "here: of those, these means alone can be known."
                ] = None
    yield from told
    if told:
        yield ""
