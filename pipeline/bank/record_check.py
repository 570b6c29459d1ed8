"""Whether ``bank.json`` holds together: what is handed over is not trusted.

Its fields have been checked one by one when this looks at it; here they are checked
against each other, names before any of them becomes a path, and numbers before anyone
counts up to them. Whatever readers derive from a record is derived once, so that a
damaged one is refused where it is opened and not deep in whoever uses it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import ValidationError

from manifests.bank import MAX_BLOCK_ROWS, BankRecord, OutputEntry, PassEntry
from manifests.errors import BankError, TeachOnceError
from manifests.inputs import INPUT
from pipeline.bank import layout
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.classifiers import classifier_arrays
from pipeline.bank.encoding import ENCODINGS
from pipeline.bank.encodings import encoding_from_json
from pipeline.samples.views import ViewPolicy

MAX_BLOCKS = 2**24
"""Most blocks of a bank, whatever its record says: they are counted up in memory."""
MAX_VIEWS = 2**16

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,199}")
# What deriving something from JSON of another make may raise.
_FAULTS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def check_record(record: BankRecord, where: str) -> None:
    """Checks that a record can be read by; changes nothing.

    Args:
        record: as parsed.
        where: its place, for the message.

    Raises:
        BankError: it contradicts itself; says where.
    """
    cause: Exception | None = None
    try:
        problem = next(_problems(record), None)
        if problem is None:
            _derive(record)
    except TeachOnceError as error:
        problem, cause = str(error), error
    except _FAULTS as error:
        told = f"{type(error).__name__}: {str(error)[:200]}"
        problem, cause = f"what follows from it fails ({told})", error
    if problem is not None:
        raise BankError(
            f"{where} must hold together, but {problem}; restore it from a copy, "
            "everything else of the bank is still there"
        ) from cause


def _problems(record: BankRecord) -> Iterator[str]:
    if not 1 <= record.block_rows <= MAX_BLOCK_ROWS:
        yield f"block_rows is {record.block_rows}"
    if not 1 <= record.num_views <= MAX_VIEWS:
        yield f"num_views is {record.num_views}"
    for what, names in (
        ("input", record.inputs),
        ("label", record.labels),
        ("pass", [entry.id for entry in record.passes]),
    ):
        for name in names:
            if not _NAME.fullmatch(name):
                yield f"{name[:80]!r} is no name of a {what}"
    ids = [entry.id for entry in record.passes]
    if len(set(ids)) < len(ids):
        yield "two passes have one id"
    yield from _shard_problems(record)
    for entry in record.passes:
        yield from _pass_problems(record, entry)
    yield from _state_problems(record, set(ids))


def _shard_problems(record: BankRecord) -> Iterator[str]:
    next_block = 0
    names = set()
    for shard in record.shards:
        if shard.name in names:
            yield f"shard {shard.name[:80]!r} is there twice"
        names.add(shard.name)
        if not _NAME.fullmatch(shard.part):
            yield f"{shard.part[:80]!r} is no name of an index part"
        if shard.first_block != next_block:
            yield (
                f"shard {shard.name[:80]!r} begins at block {shard.first_block}, the "
                f"shards before it end at {next_block}"
            )
        holds = shard.blocks * record.block_rows
        if not 0 <= shard.samples <= holds or not 0 <= shard.blocks <= MAX_BLOCKS:
            yield (
                f"shard {shard.name[:80]!r} has {shard.samples} samples in "
                f"{shard.blocks} blocks"
            )
        next_block += shard.blocks
    if next_block > MAX_BLOCKS:
        yield f"it has {next_block} blocks"


def _pass_problems(record: BankRecord, entry: PassEntry) -> Iterator[str]:
    if not 0 <= entry.first_view <= entry.last_view < record.num_views:
        yield (
            f"pass {entry.id} has views {entry.first_view} to {entry.last_view} of "
            f"{record.num_views}"
        )
    if entry.outputs and not _NAME.fullmatch(entry.group):
        yield f"{entry.group[:80]!r} is no name of a group"
    if not _NAME.fullmatch(entry.teacher):
        yield f"{entry.teacher[:80]!r} is no name of a teacher"
    for name in entry.inputs:
        if name not in record.inputs:
            yield f"pass {entry.id} looks at {name[:80]!r}, which is no input"
    for name in entry.labels:
        if name not in record.labels:
            yield f"pass {entry.id} reads {name[:80]!r}, which is no label"
    for output in entry.outputs:
        yield from _output_problems(record, entry, output)


def _output_problems(
    record: BankRecord, entry: PassEntry, output: OutputEntry
) -> Iterator[str]:
    """Yields what keeps an output's arrays from being those of its encoding."""
    level = layout.level_path(entry, output.size)
    where = f"output {output.name[:80]!r} of pass {entry.id}"
    if not _NAME.fullmatch(output.name) or not _NAME.fullmatch(output.size):
        yield f"{where} at {output.size[:80]!r} is no name"
        return
    found = [ArraySpec.from_json(data) for data in output.arrays]
    if output.encoding.get("encoding") not in ENCODINGS:
        # Of a later release: refused when it is read, but no path may lead elsewhere.
        if not all(_lies_at(one.path, f"{level}/{output.name}") for one in found):
            yield f"{where} has arrays elsewhere"
        return
    encoding = encoding_from_json(output.encoding)
    wanted = encoding.arrays(level, record.block_rows)
    told = (encoding.name, encoding.kind, encoding.shape, encoding.dtype)
    if repr(told) != repr((output.name, output.kind, output.shape, output.dtype)):
        yield f"{where} is encoded as another one"
    # Not the chunks: how large they are may change from version to version.
    # By their text: in JSON 2.0 and true compare equal to lengths that they are not.
    if [_decoded_by(one) for one in found] != [_decoded_by(one) for one in wanted]:
        yield f"{where} has other arrays than its encoding"


def _lies_at(path: str, output: str) -> bool:
    return (
        path.startswith(output)
        and re.fullmatch(r"\w*", path[len(output) :]) is not None
    )


def _decoded_by(spec: ArraySpec) -> str:
    """Returns what of an array a reader decodes by."""
    fields = (spec.path, spec.dtype, spec.row_shape, spec.block_rows, spec.has_view)
    return repr(fields)


def _state_problems(record: BankRecord, ids: set[str]) -> Iterator[str]:
    state = record.state
    if state is None:
        return
    for what, counts in (("valid", state.valid), ("invalid", state.invalid)):
        for name in counts:
            if name not in ids:
                yield f"state.{what} speaks of {name[:80]!r}, which is no pass"


def _derive(record: BankRecord) -> None:
    """Derives what readers do from a record, for the errors."""
    view0 = {name: one.view0 for name, one in record.inputs.items() if one.view0}
    ViewPolicy.from_json({**record.views, "view0": view0})
    for name, given in record.inputs.items():
        try:
            INPUT.validate_python(given.config)
        except ValidationError as error:
            raise ValueError(
                f"input {name} is none: {error.errors()[0]['msg']}"
            ) from error
    layout.row_arrays(record)
    layout.group_paths(record)
    for one in classifier_arrays(record):
        _ = (*one.shape, one.facts["scale"], one.facts["bias"], one.facts["sha256"])
    for entry in record.passes:
        str(entry.model)
        _ = entry.flops_per_row + entry.input_bytes + entry.working_bytes
        for output in entry.outputs:
            entry.has_own_geometry(output.size)
            entry.pads(output.size)
            str(output.extent)
