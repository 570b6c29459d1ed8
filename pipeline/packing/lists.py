"""Lists: CSV, TSV or JSON lines with a column per member.

A cell is a path, relative to the list, or a literal: an integer in a column ``cls``,
JSON in a column ``json``. An empty cell leaves its sample without that member.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from manifests.loading import folder_of, resolve_path
from manifests.storage import read_url
from pipeline.errors import PipelineError
from pipeline.packing.clips import Frame, FrameSequence
from pipeline.packing.sample import PackedSample, Part, check_member, safe_key

LIST_SUFFIXES = (".csv", ".tsv", ".jsonl")

_KEY, _CLIP, _TIME, _POSE = "key", "clip", "time", "pose"
_LITERAL_CLASS = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class ListRow:
    """One line of a list.

    Attributes:
        where: its file and number, for messages.
        fields: value of each column that is not empty; text, or any JSON.
        members: what its member columns hold, by extension.
        name: its first path, as the list has it; '' where it has none.
        base: folder that its paths start from.
    """

    where: str
    fields: Mapping[str, Any]
    members: Mapping[str, Part]
    name: str
    base: str


def is_list(url: str) -> bool:
    """Returns whether a name is that of a list."""
    return url.lower().endswith(LIST_SUFFIXES)


def read_list(url: str) -> list[ListRow]:
    """Returns the lines of a list, in order.

    Raises:
        PipelineError: it is not such a list, or a line is broken; the message names it.
        StorageError: it cannot be read.
    """
    try:
        text = read_url(url).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PipelineError(f"{url} must be UTF-8, got {error}; save it so") from error
    is_json = url.lower().endswith(".jsonl")
    rows = _json_lines(text, url) if is_json else _table(text, url)
    base = folder_of(url)
    found = [_row(where, fields, base) for where, fields in rows]
    if not found:
        raise PipelineError(f"{url} must have a line per sample, got none")
    return found


def list_samples(rows: Sequence[ListRow]) -> list[PackedSample]:
    """Returns a sample per line, in the order of the list.

    Raises:
        PipelineError: columns that mean something for clips alone.
    """
    for row in rows:
        for column in (_CLIP, _TIME, _POSE):
            if column in row.fields:
                raise PipelineError(
                    f"column {column!r} is for --clip or --sweeps, got it without "
                    f"({row.where}); leave it out, or put it into a column `json`"
                )
    width = len(str(len(rows)))
    samples = []
    for number, row in enumerate(rows):
        key = name_row(row, f"{number:0{width}d}")
        samples.append(PackedSample(key, row.members, row.where))
    return samples


def name_row(row: ListRow, otherwise: str) -> str:
    """Returns a line's key: its own, else that of its first path, else another."""
    stem = re.sub(r"\.[^./\\]*$", "", row.name) or otherwise
    return safe_key(str(row.fields.get(_KEY, stem)))


def list_sequences(rows: Sequence[ListRow]) -> list[FrameSequence]:
    """Returns a sequence per value of column ``clip``, in the order of the list.

    Frames are in the order of column ``time`` (seconds), else of the list.

    Raises:
        PipelineError: no such column, or times that are no order.
    """
    for row in rows:
        for column in (_KEY, _POSE):
            if column in row.fields:
                raise PipelineError(
                    f"column {column!r} has no effect with --clip: a clip is called by "
                    f"`clip` and its first frame ({row.where}); leave it out"
                )
    return [
        FrameSequence(name, tuple(_frame(row, time_s) for row, time_s in timed))
        for name, timed in sequences_of(rows).items()
    ]


def sequences_of(
    rows: Sequence[ListRow],
) -> dict[str, list[tuple[ListRow, float | None]]]:
    """Returns lines and their times by column ``clip``, in order of their times.

    Where there are no times, in the order of the list.

    Raises:
        PipelineError: no such column, or times that are no order.
    """
    by_clip: dict[str, list[tuple[ListRow, float | None]]] = {}
    for row in rows:
        if _CLIP not in row.fields:
            raise PipelineError(
                "frames and sweeps need a column `clip`, which sequence they are of, "
                f"got none ({row.where}); add it"
            )
        by_clip.setdefault(str(row.fields[_CLIP]), []).append((row, _time(row)))
    for name, timed in by_clip.items():
        times = [time_s for _, time_s in timed]
        if any(time_s is not None for time_s in times):
            if None in times or len(set(times)) < len(times):
                what = "each have one" if None in times else "differ"
                raise PipelineError(
                    f"times of the frames of a clip must {what} (clip {name!r}, "
                    f"{timed[0][0].where}); mend column `time`"
                )
            timed.sort(key=lambda one: one[1] or 0.0)
    return by_clip


def _frame(row: ListRow, time_s: float | None) -> Frame:
    members = {name: part for name, part in row.members.items() if name != "cls"}
    label = row.members.get("cls")
    if isinstance(label, str):
        label = read_url(label)
    assert label is None or isinstance(label, bytes), "a list makes no other parts"
    return Frame(row.name, members, time_s, label)


def _table(text: str, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    delimiter = "\t" if url.lower().endswith(".tsv") else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    head: list[str] | None = None
    try:
        for cells in reader:
            where = f"{url}, line {reader.line_num}"
            if head is None:
                head = [cell.strip() for cell in cells]
                if "" in head or len(set(head)) < len(head):
                    raise PipelineError(
                        f"{url} must begin with a header of different names, got {head}"
                    )
            elif cells:
                if len(cells) != len(head):
                    raise PipelineError(
                        f"a line must have {len(head)} cells, got {len(cells)} "
                        f"({where}); quote cells that hold the separator"
                    )
                yield where, dict(zip(head, cells, strict=True))
    except csv.Error as error:
        raise PipelineError(f"{url}, line {reader.line_num}: {error}") from error


def _json_lines(text: str, url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{url}, line {number}"
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PipelineError(
                f"a line must be JSON, got {error} ({where})"
            ) from error
        if not isinstance(fields, dict):
            raise PipelineError(
                f"a line must be a JSON object, got {line[:80]!r} ({where})"
            )
        yield where, fields


def _row(where: str, given: Mapping[str, Any], base: str) -> ListRow:
    fields = {
        name: value
        for name, value in given.items()
        if value is not None and not (isinstance(value, str) and not value.strip())
    }
    members: dict[str, Part] = {}
    first = ""
    for column, value in fields.items():
        if column in (_KEY, _CLIP, _TIME, _POSE):
            continue
        extension = check_member(column, where)
        if extension in members:
            raise PipelineError(f"column {column!r} comes twice ({where}); rename one")
        literal = _literal(extension, value, where)
        if literal is not None:
            members[extension] = literal
            continue
        if not isinstance(value, str):
            raise PipelineError(
                f"column {column!r} must hold a path, got {value!r} ({where}); "
                "literals stand in cls and json"
            )
        members[extension] = resolve_path(value.strip(), base)
        first = first or value.strip()
    if not members:
        raise PipelineError(f"a line must name a member, got none ({where})")
    return ListRow(where, fields, members, first, base)


def _literal(extension: str, value: Any, where: str) -> bytes | None:
    """Returns a cell's bytes where it is a literal; None where it is a path."""
    kind = extension.rpartition(".")[2]
    if kind == "cls":
        text = str(value).strip()
        is_number = isinstance(value, int) and not isinstance(value, bool)
        return text.encode() if is_number or _LITERAL_CLASS.fullmatch(text) else None
    if kind == "json":
        if not isinstance(value, str):
            return _encoded(json.dumps(value, ensure_ascii=False), extension, where)
        if value.lstrip().startswith(("{", "[")):
            try:
                json.loads(value)
            except (ValueError, RecursionError) as error:
                raise PipelineError(
                    f"column {extension!r} must hold JSON or a path, got {error} "
                    f"({where}); quotes in CSV are doubled"
                ) from error
            return _encoded(value.strip(), extension, where)
    return None


def _encoded(text: str, extension: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise PipelineError(
            f"column {extension!r} must hold Unicode, got half a character ({where}); "
            "mend it"
        ) from error


def _time(row: ListRow) -> float | None:
    value = row.fields.get(_TIME)
    if value is None:
        return None
    try:
        time = float(value)
    except (TypeError, ValueError):
        time = math.nan
    if not math.isfinite(time):
        raise PipelineError(
            f"column 'time' must be seconds, got {value!r} ({row.where}); mend it"
        )
    return time
