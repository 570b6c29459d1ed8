"""From bank to bank, what lies around the blocks: index parts, runs, classifiers,
statistics.

Small and few; replaced whole, under the destination's lock.
"""

from __future__ import annotations

from collections.abc import Mapping

from manifests.bank import BankRecord
from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.classifiers import classifier_arrays
from pipeline.bank.dataset_index import copy_part
from pipeline.bank.places import FEATURES
from pipeline.bank.row_arrays import has_own_crc
from pipeline.bank.selection import BankPart

# Of outputs that have any: the covariance may be left out, the others never.
_ALWAYS = ("mean", "variance", "mean_direction", "dispersion", "count")
_STATISTICS = (*_ALWAYS, "covariance")
_WITHOUT = frozenset({"topk", "index", "jpeg"})


def copy_frame(
    source: Store, record: BankRecord, destination: Store, part: BankPart
) -> None:
    """Copies the kept shards' index, the runs' records and zero-shot classifiers.

    Args:
        source: the bank to copy from.
        record: its record.
        destination: the one to copy to.
        part: what is copied.

    Raises:
        BankError: something of the source is missing or damaged.
    """
    pairs = list(zip(part.source_shards, part.record.shards, strict=True))
    for stem in part.dataset_parts:
        shards = [pair for pair in pairs if pair[0].part == stem]
        copy_part(source, destination, stem, shards, part.rows)
    # A run tells of all samples, by name where one failed.
    for path, _ in source.list("runs") if part.rows is None else ():
        if path.endswith(".json"):
            destination.replace(path, source.read(path))
    for array in classifier_arrays(part.record):
        data = source.read_or_none(array.object_path)
        _check(source, array.object_path, data)
        assert data is not None
        destination.replace(array.object_path, data)
        destination.replace(array.metadata_path, array.metadata())


def has_statistics_of(
    record: BankRecord, part: BankPart, committed: Mapping[str, set[int]]
) -> bool:
    """Whether the source's statistics are those of the part as well.

    So where every block keeps its number, by which rows are drawn, and all were there
    when the source was finalised.

    Args:
        record: the source's.
        part: what is copied.
        committed: blocks of each pass that the destination has, by their numbers there.
    """
    if record.state is None or not part.keeps_rows_of(record):
        return False
    complete = record.state.complete_passes
    return all(
        one.target.id in complete and len(committed[one.target.id]) == record.num_blocks
        for one in part.passes
    )


def copy_statistics(source: Store, destination: Store, record: BankRecord) -> None:
    """Copies the statistics of every output of ``record``, the destination's.

    Raises:
        BankError: some are missing or damaged.
    """
    listed: dict[str, list[str]] = {}
    for path, _, output in layout.outputs(record):
        if output.encoding["encoding"] in _WITHOUT:
            continue
        level, _, name = path.rpartition("/")
        folder = f"{FEATURES}/{level}/stats"
        if folder not in listed:
            listed[folder] = [found for found, _ in source.list(folder)]
        for what in _STATISTICS:
            array = f"{folder}/{name}_{what}/"
            paths = [found for found in listed[folder] if found.startswith(array)]
            if len(paths) < 2 and what in _ALWAYS:
                _check(source, f"{array}zarr.json", None)
            for found in paths:
                data = source.read(found)
                if not found.endswith("zarr.json"):
                    _check(source, found, data)
                destination.replace(found, data)


def _check(source: Store, path: str, data: bytes | None) -> None:
    """Raises BankError where an object is missing or does not match its own crc32c."""
    if data is None or not has_own_crc(data):
        why = "is missing" if data is None else "does not match its own crc32c"
        raise BankError(
            f"{source.url_of(path)} {why}; run the job of that bank again with "
            "--repair, it is made anew"
        )
