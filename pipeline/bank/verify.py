"""Verify: does every commit have its objects, and do they hold what it says?

Fast: sizes from the store's own listing. Full: every byte is read, checksums compared,
and missing rows are missing exactly where the commit says so. Names blocks; repairs
nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from manifests.bank import BankRecord, CommitContent, OutputEntry, PassEntry
from manifests.errors import BankError, TeachOnceError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.commits import commit_path, list_commits, read_blocks, read_commits
from pipeline.bank.frame_files import damaged_files
from pipeline.bank.objects import decode_object, has_crc32c
from pipeline.bank.places import FEATURES
from pipeline.bank.rows import decode_rows
from pipeline.bank.verify_frame import (
    damaged_card,
    damaged_classifiers,
    damaged_metadata,
    damaged_parts,
    damaged_rows,
    damaged_runs,
)

_THREADS = 4


@dataclass
class VerifyReport:
    """What `verify` found.

    Attributes:
        blocks: committed blocks looked at, over all passes.
        objects: objects looked at.
        bytes: their sizes, and in a full run the bytes read.
        problems: one line each, naming pass, block and object.
        damaged_blocks: (pass, block) to compute again.
        damaged_objects: paths that are not what their commit says.
        missing_blocks: number of blocks per pass that have no commit.
        orphans: objects that no commit names, left by a run that was ended.
        damaged_metadata: paths of ``zarr.json`` to write again.
        damaged_parts: parts of the dataset's index to make again from the shards.
        damaged_runs: records of runs that cannot be read; nothing needs them.
    """

    blocks: int = 0
    objects: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    damaged_blocks: list[tuple[str, int]] = field(default_factory=list)
    damaged_objects: list[str] = field(default_factory=list)
    missing_blocks: dict[str, int] = field(default_factory=dict)
    orphans: list[str] = field(default_factory=list)
    damaged_metadata: list[str] = field(default_factory=list)
    damaged_parts: list[str] = field(default_factory=list)
    damaged_runs: list[str] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """Whether nothing that is committed is damaged and nothing is missing."""
        return not self.problems and not any(self.missing_blocks.values())


def list_objects(store: Store, record: BankRecord) -> dict[str, int]:
    """Returns path and size of every data object, by listing the arrays' folders."""
    folders = [f"{FEATURES}/{spec.path}" for spec in layout.feature_arrays(record)]
    folders += [f"rows/{entry.id}" for entry in record.passes if not entry.outputs]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda folder: list(store.list(folder)), folders)
        return {
            path: size
            for listing in found
            for path, size in listing
            if not path.endswith("zarr.json")
        }


def _contents(
    store: Store, entry: PassEntry, blocks: list[int], report: VerifyReport
) -> Iterator[CommitContent]:
    """Yields the commits that can be read; the others become problems."""
    for block in blocks:
        try:
            content = next(iter(read_commits(store, entry.id, [block])))
        except TeachOnceError as error:
            report.problems.append(f"pass {entry.id} block {block}: {error}")
            report.damaged_blocks.append((entry.id, block))
            continue
        if content.fingerprint != entry.fingerprint:
            report.problems.append(
                f"pass {entry.id} block {block}: commit of another job "
                f"({content.fingerprint[:12]}, the pass is {entry.fingerprint[:12]})"
            )
            report.damaged_blocks.append((entry.id, block))
            continue
        yield content


def verify(store: Store, record: BankRecord, full: bool = False) -> VerifyReport:
    """Returns what is wrong with a bank; every damaged block is named.

    Args:
        store: the bank's.
        record: its record.
        full: read every byte instead of comparing sizes.
    """
    report = VerifyReport()
    sizes = list_objects(store, record)
    named: set[str] = set()
    live = set(record.live_blocks)
    lines: dict[tuple[str, int], tuple[tuple[str, int, int], ...]] = {}
    for entry in record.passes:
        blocks = sorted(list_commits(store, entry.id))
        report.missing_blocks[entry.id] = len(live - set(blocks))
        contents = list(_contents(store, entry, blocks, report))
        report.blocks += len(blocks)
        for content in contents:
            named |= set(content.objects)
            lines[entry.id, content.block] = tuple(
                (path, *content.objects[path]) for path in sorted(content.objects)
            )
            _check_sizes(entry, content, sizes, report)
        if full:
            _check_contents(store, record, entry, contents, report)
    report.orphans = sorted(set(sizes) - named)
    _check_table(store, record, lines, report)
    _check_rows(record, report)
    for path, why in (
        *damaged_metadata(store, record),
        *damaged_classifiers(store, record, full),
    ):
        report.problems.append(f"{path} {why}")
        report.damaged_metadata.append(path)
    found = dict(damaged_parts(store, record, full))
    report.damaged_parts = sorted({PurePosixPath(path).stem for path in found})
    if record.state is not None and not any(report.missing_blocks.values()):
        found |= dict(damaged_rows(store, record, full))
    for path, why in damaged_files(store, record, full):
        if path not in report.damaged_metadata:
            found.setdefault(path, why)
            if path.endswith("zarr.json"):
                report.damaged_metadata.append(path)
    found |= dict(damaged_card(store, record))
    runs = dict(damaged_runs(store)) if full else {}
    report.damaged_runs = list(runs)
    report.problems += [f"{path} {why}" for path, why in (found | runs).items()]
    return report


def _fail(report: VerifyReport, content: CommitContent, path: str, why: str) -> None:
    report.problems.append(
        f"pass {content.pass_id} block {content.block} (shard {content.shard}): "
        f"{path} {why}"
    )
    if path not in report.damaged_objects:
        report.damaged_objects.append(path)
    if (content.pass_id, content.block) not in report.damaged_blocks:
        report.damaged_blocks.append((content.pass_id, content.block))


def _check_sizes(
    entry: PassEntry,
    content: CommitContent,
    sizes: dict[str, int],
    report: VerifyReport,
) -> None:
    for path in sorted(layout.block_objects(entry, content.block)):
        report.objects += 1
        if path not in content.objects:
            _fail(report, content, path, "is not in its commit")
            continue
        size = content.objects[path][0]
        held = sizes.get(path)
        if held is None:
            _fail(report, content, path, "is missing")
        elif held != size:
            _fail(report, content, path, f"has {held} bytes, its commit says {size}")
        else:
            report.bytes += size


def _check_contents(
    store: Store,
    record: BankRecord,
    entry: PassEntry,
    contents: list[CommitContent],
    report: VerifyReport,
) -> None:
    bad = set(report.damaged_objects)

    def check(content: CommitContent) -> list[tuple[CommitContent, str, str]]:
        found = []
        for path, (size, crc) in sorted(content.objects.items()):
            if path in bad:
                continue
            try:
                data = store.read(path, size)
                if not has_crc32c([data], crc):
                    why = "has another crc32c than its commit says"
                    found.append((content, path, why))
                elif not entry.outputs:
                    decode_rows(data, path)
            except TeachOnceError as error:
                found.append((content, path, f"cannot be read: {error}"))
        if not found and not any(path in bad for path in content.objects):
            found += _check_missing(store, record, entry, content)
        return found

    with ThreadPoolExecutor(_THREADS) as pool:
        for found in pool.map(check, contents):
            for content, path, why in found:
                _fail(report, content, path, why)


def _check_missing(
    store: Store, record: BankRecord, entry: PassEntry, content: CommitContent
) -> list[tuple[CommitContent, str, str]]:
    """Finds rows that are missing but valid, or there but invalid."""
    usable = np.zeros(record.block_rows, np.bool_)
    usable[: content.rows] = True
    for rows in content.invalid.values():
        usable[list(rows)] = False
    found = []
    for output in entry.outputs:
        for spec in map(ArraySpec.from_json, output.arrays):
            for view in entry.views:
                path = f"{FEATURES}/{object_name(spec, content.block, view)}"
                stored = decode_object(store.read(path), spec)
                fill = spec.fill_value
                is_fill = np.equal(stored, fill) if fill == fill else np.isnan(stored)
                why = _why_missing(is_fill, usable, entry, output)
                if why is not None:
                    found.append((content, path, why))
    return found


def _why_missing(
    is_fill: npt.NDArray[np.bool_],
    usable: npt.NDArray[np.bool_],
    entry: PassEntry,
    output: OutputEntry,
) -> str | None:
    """Returns what is wrong with where an array, (rows, ...), holds the fill value."""
    flat = is_fill.reshape(len(is_fill), -1)
    if not np.array_equal(~flat.all(axis=1), usable):
        return "misses other rows than its commit says"
    if entry.pads(output.size) and output.kind in ("grid", "frames"):
        # Cells on padding are missing, but whole, and not all of a row.
        cells = is_fill.shape[1 : len(output.shape)]
        if cells == output.shape[:-1]:
            is_fill = is_fill.reshape(len(is_fill), *cells, -1)
            is_torn = is_fill.any(axis=-1) & ~is_fill.all(axis=-1)
            flat = is_torn.reshape(len(is_fill), -1)
    if flat[usable].any() and output.encoding["encoding"] not in (
        "topk",
        "jpeg",
    ):
        return "has missing values in valid rows"
    return None


def _check_table(
    store: Store,
    record: BankRecord,
    lines: dict[tuple[str, int], tuple[tuple[str, int, int], ...]],
    report: VerifyReport,
) -> None:
    """Compares blocks.parquet, which trainers trust, with the commits."""
    if record.state is None:
        report.problems.append("the bank was never finalised; run precompute again")
        return
    try:
        table = read_blocks(store).to_pydict()
    except BankError as error:
        report.problems.append(str(error))
        return
    told = {
        (name, block): tuple(zip(objects, size, crc, strict=True))
        for name, block, objects, size, crc in zip(
            table["pass"],
            table["block"],
            table["objects"],
            table["size_bytes"],
            table["crc32c"],
            strict=True,
        )
    }
    for key in sorted(set(told) - set(lines)):
        if key not in report.damaged_blocks:
            report.problems.append(
                f"pass {key[0]} block {key[1]}: in blocks.parquet, but "
                f"{commit_path(*key)} is gone"
            )
            report.damaged_blocks.append(key)
    for key in sorted(set(told) & set(lines)):
        if told[key] != lines[key]:
            report.problems.append(
                f"pass {key[0]} block {key[1]}: blocks.parquet and commit disagree; "
                "run `teachonce finalise BANK`"
            )


def _check_rows(record: BankRecord, report: VerifyReport) -> None:
    """Every row is valid or invalid with a reason, for every pass."""
    state = record.state
    if state is None:
        return
    for entry in record.passes:
        told = state.valid[entry.id] + sum(state.invalid[entry.id].values())
        if told != state.rows:
            report.problems.append(
                f"pass {entry.id}: {told} rows accounted for, the bank has {state.rows}"
            )
