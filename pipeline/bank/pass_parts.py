"""What an export leaves of a pass: outputs, views, chosen rows, other encodings.

A pure function of the record. A pass of which anything is left out or encoded anew is
no longer what its fingerprint says and gets one of its own; ``provenance`` keeps the
first one under ``exported_from`` and the one before rows or encodings last changed
under ``changed_from``, under ``decoded_from`` the encodings that an output's values
were read from, and under ``mixed_rows`` the outputs whose stored rows were encoded
beside rows that are left behind.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from manifests.bank import OutputEntry, PassEntry
from manifests.errors import BankError
from manifests.exported import Selection
from manifests.loading import digest
from manifests.teacher import OutputConfig
from pipeline.bank import layout
from pipeline.bank.arrays import ArraySpec, chunk_rows_for
from pipeline.bank.encoding import Encoding
from pipeline.bank.encodings import encoding_from_json, make_encoding

_PRESETS = get_args(OutputConfig.model_fields["encoding"].annotation)


@dataclass(frozen=True)
class PassPart:
    """A pass of the source and what it is in the part, under the same id.

    Attributes:
        source: as it is in the source.
        target: as it is in the part.
        encodings: by (size, name) of an output, how it is encoded anew.
    """

    source: PassEntry
    target: PassEntry
    encodings: Mapping[tuple[str, str], Encoding]

    @property
    def is_whole(self) -> bool:
        """Whether it keeps every output, view and row, as it was stored."""
        return self.source == self.target

    def source_output(self, output: OutputEntry) -> OutputEntry:
        """Returns what an output of the part is in the source."""
        wanted = output.size, output.name
        return next(
            one for one in self.source.outputs if (one.size, one.name) == wanted
        )


@dataclass(frozen=True)
class RowChange:
    """How the rows of a part lie where some were chosen.

    Attributes:
        selection: by which they were.
        block_rows: of the part.
    """

    selection: Selection
    block_rows: int

    def identity(self) -> dict[str, Any]:
        """Returns what tells one choice of rows from another."""
        chosen = {"keys_sha256", "fraction", "seed", "where"}
        return self.selection.model_dump(mode="json", include=chosen)


def part_of_pass(
    entry: PassEntry,
    kept: Collection[str],
    num_views: int,
    presets: Mapping[str, str],
    rows: RowChange | None,
) -> PassPart | None:
    """Returns what is left of a pass, None for nothing.

    Args:
        entry: the pass.
        kept: paths of the outputs that are kept.
        num_views: views that are kept.
        presets: path of an output to how it is encoded anew.
        rows: how rows lie, where some were chosen.

    Raises:
        BankError: an output cannot be encoded so.
    """
    last_view = min(entry.last_view, num_views - 1)
    outputs, encodings = [], {}
    for output in entry.outputs:
        path = f"{layout.level_path(entry, output.size)}/{output.name}"
        if path not in kept:
            continue
        encoding = None
        if path in presets:
            encoding = _other_encoding(path, output, presets[path], rows is not None)
        if encoding is not None:
            encodings[output.size, output.name] = encoding
        outputs.append(_part_of_output(entry, output, encoding, rows))
    if entry.outputs and (not outputs or entry.first_view > last_view):
        return None
    is_cut = len(outputs) < len(entry.outputs) or last_view < entry.last_view
    if not (is_cut or encodings or rows is not None):
        return PassPart(entry, entry, {})
    target = _changed_pass(entry, tuple(outputs), last_view, encodings, rows)
    return PassPart(entry, target, encodings)


def _part_of_output(
    entry: PassEntry,
    output: OutputEntry,
    encoding: Encoding | None,
    rows: RowChange | None,
) -> OutputEntry:
    if encoding is None and rows is None:
        return output
    specs = [ArraySpec.from_json(data) for data in output.arrays]
    size = specs[0].block_rows if rows is None else rows.block_rows
    if encoding is not None:
        arrays = encoding.arrays(layout.level_path(entry, output.size), size)
        # Of values that were rounded before, the type is no longer the teacher's.
        changes: dict[str, Any] = {
            "encoding": encoding.to_json(),
            "dtype": encoding.dtype,
        }
    else:
        chunks = (chunk_rows_for(spec.row_bytes, size) for spec in specs)
        arrays = tuple(
            replace(spec, block_rows=size, chunk_rows=chunk)
            for spec, chunk in zip(specs, chunks, strict=True)
        )
        changes = {}
    changes["arrays"] = tuple(spec.to_json() for spec in arrays)
    return output.model_copy(update=changes)


def _changed_pass(
    entry: PassEntry,
    outputs: tuple[OutputEntry, ...],
    last_view: int,
    encodings: Mapping[tuple[str, str], Encoding],
    rows: RowChange | None,
) -> PassEntry:
    """Returns a pass that is no longer what it was, which says what that was."""
    made = entry.provenance
    whole = made.get("exported_from") or {
        "fingerprint": entry.fingerprint,
        "outputs": [f"{output.size}/{output.name}" for output in entry.outputs],
        "views": [entry.first_view, entry.last_view],
    }
    identity: dict[str, Any] = {
        "exported_from": made.get("changed_from", whole["fingerprint"]),
        "outputs": [f"{output.size}/{output.name}" for output in outputs],
        "views": [entry.first_view, last_view],
    }
    provenance = {**made, "exported_from": whole}
    decoded = dict(made.get("decoded_from", {}))
    mixed = set(made.get("mixed_rows", ()))
    for output in entry.outputs:
        name = f"{output.size}/{output.name}"
        if (output.size, output.name) in encodings:
            decoded[name] = [*decoded.get(name, ()), output.encoding]
            mixed.discard(name)
        elif rows is not None and encoding_from_json(output.encoding).mixes_rows:
            mixed.add(name)
    held = set(identity["outputs"])
    if decoded := {name: one for name, one in decoded.items() if name in held}:
        provenance["decoded_from"] = decoded
    provenance.pop("mixed_rows", None)
    if mixed & held:
        provenance["mixed_rows"] = sorted(mixed & held)
    if encodings or rows is not None:
        # Outputs and views are cut by whatever way to the same part; these are not.
        provenance["changed_from"] = identity["exported_from"] = entry.fingerprint
        identity["encodings"] = [output.encoding for output in outputs]
        identity["rows"] = None if rows is None else rows.identity()
    return entry.model_copy(
        update={
            "outputs": outputs,
            "last_view": last_view,
            "fingerprint": digest(identity),
            "provenance": provenance,
        }
    )


def _other_encoding(
    path: str, output: OutputEntry, wanted: str, has_chosen_rows: bool
) -> Encoding | None:
    """Returns how an output is encoded anew, None where it is stored so already.

    What was encoded beside rows that are left behind is encoded anew by the same
    preset as well: then nothing of them is left in it.
    """
    held = encoding_from_json(output.encoding)
    config = _config(path, wanted)
    if output.kind == "index":
        raise BankError(
            f"encoding of {path} must stay, got {wanted}: it says which points the "
            "others are of"
        )
    if held.preset not in _PRESETS:
        raise BankError(
            f"encoding of {path} must stay {held.preset}, got {wanted}: it holds "
            "copies of images, not features; leave --inputs out, or name the outputs"
        )
    made = make_encoding(
        config, name=output.name, kind=held.kind, shape=held.shape, dtype=held.dtype
    )
    if made == held and not (has_chosen_rows and held.mixes_rows):
        return None
    if held.preset == "topk":
        raise BankError(
            f"encoding of {path} must stay topk, got {wanted}: the logits that it does "
            "not hold are not known; run the job with another encoding"
        )
    if held.is_exact:
        return made
    if made.is_exact:
        raise BankError(
            f"encoding of {path} must stay {held.preset} or become a smaller one, got "
            f"{wanted}: the values were rounded, and would take more bytes without "
            "being the teacher's again; run the job with that encoding"
        )
    return replace(made, dtype="float32")


def _config(path: str, wanted: str) -> OutputConfig:
    preset, _, count = wanted.partition(":")
    if preset not in _PRESETS or (preset == "topk") != count.isdigit():
        known = [one if one != "topk" else "topk:K" for one in _PRESETS]
        raise BankError(
            f"encoding of {path} must be one of {', '.join(known)}, got {wanted!r}"
        )
    return OutputConfig.model_validate(
        {"topk": int(count)} if count else {"encoding": preset}
    )
