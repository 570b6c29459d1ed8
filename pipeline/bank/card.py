"""The bank's card: README.md and croissant.json for whoever is handed the bank.

Says what lies there, from what and by which weights and preprocessing it was made,
under which licences, and how it is opened. Written by finalise, read by nothing of
ours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from manifests.bank import BankRecord, PassEntry
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.card_origin import changed_outputs, origin
from pipeline.bank.commits import BLOCKS_PATH
from pipeline.bank.croissant import CROISSANT_PATH, croissant
from pipeline.bank.licences import Licence, find_licence, strictest
from pipeline.bank.record import RECORD_PATH, encode_record
from pipeline.bank.row_index import read_index_part

CARD_PATH = "README.md"


def write_card(store: Store, record: BankRecord) -> None:
    """Writes card and Croissant of a bank that is being finalised; index and table of
    blocks are there already, the record is the one that will be written last.
    """
    files = {
        RECORD_PATH: encode_record(record),
        BLOCKS_PATH: store.read(BLOCKS_PATH),
    }
    facts = {
        path: (len(data), hashlib.sha256(data).hexdigest())
        for path, data in files.items()
    }
    schema = read_index_part(store, 0).schema
    # The lines that open the bank are to run wherever they are pasted.
    url = str(store.local_root or store.url)
    document = croissant(url, record, schema, facts)
    store.replace(CARD_PATH, render_card(url, record).encode())
    store.replace(CROISSANT_PATH, json.dumps(document, indent=1).encode() + b"\n")


def licences(record: BankRecord) -> dict[str, Licence]:
    """Returns the licences that a bank stands under: of the data and each teacher.

    Weights drawn from a seed are nobody's, unless the job says otherwise.
    """
    found = {"data": find_licence(record.dataset.get("license"))}
    for entry in _teacher_passes(record):
        told = entry.provenance.get("license")
        if told or entry.provenance["weights"]["kind"] != "random":
            found.setdefault(f"weights of {entry.teacher}", find_licence(told))
    return found


def render_card(url: str, record: BankRecord) -> str:
    """Returns the card as Markdown; equal for equal banks.

    Args:
        url: where the bank lies.
        record: of a finalised bank.
    """
    sections = (
        _summary(url, record),
        _licences(record),
        _teachers(record),
        _preprocessing(record),
        _stored_inputs(url, record),
        _arrays(record),
        _opening(url, record),
    )
    return "\n".join(line for section in sections for line in section)


def _teacher_passes(record: BankRecord) -> list[PassEntry]:
    return [
        entry for entry in record.passes if entry.outputs and not entry.holds_inputs
    ]


def _table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---'] * len(head))} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _summary(url: str, record: BankRecord) -> Iterator[str]:
    state = record.state
    assert state is not None
    num_shards = sum(not shard.retired for shard in record.shards)
    whole = (
        "Complete." if state.complete else "**Not complete: run the same job again.**"
    )
    yield f"# Feature bank {url.rstrip('/').rsplit('/', 1)[-1]}"
    yield ""
    yield (
        f"{state.rows:,} samples of {num_shards:,} shards, {record.num_views} view(s), "
        f"blocks of {record.block_rows} rows. {whole}"
    )
    yield ""
    yield from origin(record)
    yield (
        "Outputs of frozen models (teachers), run once over a dataset and kept as "
        "plain Zarr v3, to train smaller models from."
    )
    yield ""
    for name, one in record.inputs.items():
        member = one.config["member"]
        members = member if isinstance(member, str) else " or ".join(member)
        box = {
            "full": ", view 0 is the whole image",
            "square": ", view 0 is the largest centred square",
        }.get(one.view0 or "", "")
        yield f"- input `{name}`: {one.config['kind']}, member `{members}`{box}"
    for name, label in record.labels.items():
        classes = label.get("num_classes")
        kind = f"class of {classes}" if classes else "number"
        yield f"- label `{name}`: {kind}, member `{label['member']}`"
    if record.num_views > 1:
        drawn = ", ".join(
            f"{name} {_short(value)}" for name, value in record.views.items()
        )
        yield f"- views 1 to {record.num_views - 1} are random: {drawn}"
    yield ""


def _licences(record: BankRecord) -> Iterator[str]:
    found = licences(record)
    whose, most = next(
        (name, one) for name, one in found.items() if one == strictest(found.values())
    )
    yield "## Licences"
    yield ""
    yield f"Data licence: {found['data'].name}."
    yield ""
    yield (
        f"Strictest: {most.name}, of the {whose} ({most.restriction.words}). Cached "
        "outputs may inherit what data and weights are under. A reading of names, not "
        "legal advice."
    )
    yield ""
    rows = (
        (whose, one.name, one.restriction.words, one.url)
        for whose, one in found.items()
    )
    yield from _table(("what", "licence", "restricts", "terms"), rows)


def _teachers(record: BankRecord) -> Iterator[str]:
    state = record.state
    assert state is not None
    yield "## Teachers"
    yield ""
    head = ("teacher", "model", "inputs", "precision", "valid rows", "invalid rows")
    yield from _table(
        head,
        (
            (
                entry.teacher,
                entry.model,
                ", ".join(entry.inputs),
                entry.provenance["identity"]["precision"],
                f"{state.valid[entry.id]:,}",
                ", ".join(f"{n:,} {why}" for why, n in state.invalid[entry.id].items()),
            )
            for entry in _teacher_passes(record)
        ),
    )
    columns = ("teacher", "weights", "revision", "sha256", "licence")
    yield from _table(
        columns, iter(dict.fromkeys(map(_weights, _teacher_passes(record))))
    )


def _weights(entry: PassEntry) -> tuple[str, ...]:
    weights = entry.provenance["weights"]
    licence = find_licence(entry.provenance.get("license")).name
    if weights["kind"] == "random":
        return entry.teacher, f"random, seed {weights['seed']}", "", "", licence
    revision = weights["tag"] if weights["kind"] == "pretrained" else ""
    return entry.teacher, weights["url"], revision, weights["sha256"], licence


def _preprocessing(record: BankRecord) -> Iterator[str]:
    """Yields how each teacher was given its inputs, and what follows for its grids."""
    yield "## Preprocessing"
    yield ""
    yield (
        "Every teacher sees the same box of the upright image (`views/`), resized to "
        "its own size in one step. Pixels are `((pixel / 255 * range) - mean) / std / "
        "divide`, per channel in the order of `channels`."
    )
    yield ""
    told: dict[str, None] = {}
    notes: dict[str, None] = {}
    for entry in _teacher_passes(record):
        for size in dict.fromkeys(output.size for output in entry.outputs):
            level = layout.level_path(entry, size)
            for name, spec in entry.provenance["preprocess"][size].items():
                fields = ", ".join(f"{key} {_short(one)}" for key, one in spec.items())
                told[f"- `{level}` takes `{name}`: {fields}"] = None
            if entry.has_own_geometry(size):
                notes[
                    f"Not aligned: {level} hold {layout.OWN_GEOMETRY}, nor on the "
                    "grids of other teachers."
                ] = None
            if entry.pads(size):
                notes[
                    f"Padded: {level} was given boxes filled up to its size; cells on "
                    "padding hold the fill value (missing) in valid rows too."
                ] = None
    yield from told
    yield ""
    for note in notes:
        yield note
        yield ""


def _short(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{key} {_short(one)}" for key, one in value.items())
        return f"({inner})"
    if isinstance(value, list):
        return f"[{', '.join(_short(one) for one in value)}]"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _stored_inputs(url: str, record: BankRecord) -> Iterator[str]:
    """Yields that a bank holds copies of its data, how, and who allows it."""
    found = [
        (path, entry) for path, entry, _ in layout.outputs(record) if entry.holds_inputs
    ]
    if not found:
        return
    state = record.state
    assert state is not None
    allowed = record.dataset.get("copies_allowed")
    yield "## Images"
    yield ""
    yield (
        "**This bank holds copies of the data itself**, under the licence of the data: "
        f"{find_licence(record.dataset.get('license')).name}."
        + (f" Copies allowed by: {allowed}." if allowed else "")
        + " Whoever passes the bank on passes them on; `teachonce export` leaves them "
        "out unless `--inputs` names them."
    )
    yield ""
    yield from _table(
        ("array (sample, byte)", "input", "shorter side", "quality", "images"),
        (
            (
                path,
                entry.inputs[0],
                f"{entry.request['args']['short_side']} at most",
                f"{entry.request['args']['quality']} at most",
                f"{state.valid[entry.id]:,}",
            )
            for path, entry in found
        ),
    )
    yield (
        "A row is a JPEG with zeros behind its end: the whole upright image (EXIF "
        "applied), resized once. All zeros is missing. `<array>_quality` says with "
        "which quality each was made. Boxes in `views/` are in pixels of the original, "
        "whose size is `views/<input>_size`; scale them by the JPEG's own size."
    )
    yield ""
    yield "```python"
    yield "import io"
    yield ""
    yield "import zarr"
    yield "from PIL import Image"
    yield ""
    yield f'root = zarr.open_group("{url}/features.zarr", mode="r")'
    yield f'image = Image.open(io.BytesIO(root["{found[0][0]}"][0].tobytes()))'
    yield "```"
    yield ""


def _arrays(record: BankRecord) -> Iterator[str]:
    yield "## Arrays"
    yield ""
    head = ("array (sample, view, ...)", "shape of a row", "encoding", "dtype", "norm")
    rows = (
        (
            path,
            " x ".join(str(length) for length in output.shape),
            output.encoding["encoding"],
            output.dtype,
            output.norm or "",
        )
        for path, entry, output in layout.outputs(record)
        if not entry.holds_inputs
    )
    yield from _table(head, rows)
    yield (
        "Row i belongs to `key[i]`; rows where `valid` is false hold each array's fill "
        "value. `index/` has a line per row with shard, key and the reason where a row "
        "is not valid; `bank.json` says which weights and which preprocessing made it. "
        "An array's attribute `decode` says how its values are read where they are not "
        "plain numbers; docs/format.md of TeachOnce decodes each in lines of NumPy."
    )
    yield ""
    yield from changed_outputs(record)


def _opening(url: str, record: BankRecord) -> Iterator[str]:
    """Yields lines that open one output with each of four readers."""
    outputs = [one for one in layout.outputs(record) if not one[1].holds_inputs]
    if not outputs:
        return
    path, _, output = next(
        (one for one in outputs if one[2].kind == "grid"), outputs[0]
    )
    suffix = output.arrays[0]["path"].removeprefix(path)
    level, _, name = path.rpartition("/")
    root = f"{url}/features.zarr"
    place = url if "://" in url else f"file://{url}"
    yield "## Open it"
    yield ""
    for library, lines in (
        (
            "xarray",
            (
                "import xarray as xr",
                "",
                f'url = "{root}"',
                'tree = xr.open_datatree(url, engine="zarr", consolidated=False)',
                f'values = tree["{level}"]["{name}{suffix}"].isel(view=0)',
            ),
        ),
        (
            "zarr-python",
            (
                "import zarr",
                "",
                f'root = zarr.open_group("{root}", mode="r")',
                f'values = root["{path}{suffix}"][:, 0]  # (sample, ...) of view 0',
                f'valid = root["{level}/valid"][:]  # rows to use',
                'keys = root["key"][:]  # row i belongs to keys[i]',
            ),
        ),
        (
            "tensorstore (all but strings)",
            (
                "import tensorstore as ts",
                "",
                f'url = "{place}/features.zarr/{path}{suffix}/"',
                'array = ts.open({"driver": "zarr3", "kvstore": url}).result()',
                "values = array[:, 0].read().result()",
            ),
        ),
        (
            "TeachOnce (decoded, checked)",
            (
                "from teachonce import open_bank",
                "",
                f'bank = open_bank("{url}")',
                "# float32, NaN is missing",
                f'values = bank.read("{path}", block=0, view=0)',
            ),
        ),
    ):
        yield f"With {library}:"
        yield ""
        yield "```python"
        yield from lines
        yield "```"
        yield ""
