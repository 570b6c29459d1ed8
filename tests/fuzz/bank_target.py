"""A bank of which one file was exchanged, opened and used in every way that reads it.

The bank is that of ``tests/data/banks``. A seed is ``<case>/<path in the bank>``: the
case ``sound`` is the file as it is.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manifests.errors import TeachOnceError
from pipeline.bank import record_check
from pipeline.bank.diff import diff, read_contents
from pipeline.bank.diff_values import read_bytes, value_differences
from pipeline.bank.export import export
from pipeline.bank.open import Bank, open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.bank.verify_frame import has_own_crc
from pipeline.info import bank_facts
from student_train.dataset import BankDataset
from student_train.reading import Reading
from tests.fuzz.targets import BANKS, MIB, Target, check

# One of each kind of file.
SOUND = (
    "bank.json",
    "blocks.parquet",
    "dataset/part-00000.json",
    "dataset/part-00000.parquet",
    "runs/20261122T202044Z-8e92d0.json",
    "index/part-00000.parquet",
    "rows/rows/00000001.parquet",
    "commits/rows/00000000.json",
    "commits/net.image/00000001.json",
    "commits/points.lidar/00000002.json",
    "features.zarr/zarr.json",
    "features.zarr/key/zarr.json",
    "features.zarr/key/c.0",
    "features.zarr/labels/class/zarr.json",
    "features.zarr/labels/class/c.0",
    "features.zarr/views/image_box/zarr.json",
    "features.zarr/net/image/16x32/valid/zarr.json",
    "features.zarr/net/image/16x32/valid/c.0",
    "features.zarr/net/image/16x32/patch/zarr.json",
    "features.zarr/net/image/16x32/patch/c.0.0.0.0.0",
    "features.zarr/half/image/16x32/patch/c.1.0.0.0.0",
    "features.zarr/fine/image/32x64/patch/c.2.1.0.0.0",
    "features.zarr/net/image/16x32/stats/patch_mean/zarr.json",
    "features.zarr/net/image/16x32/stats/patch_mean/c.0",
)


WITHOUT_STATISTICS = ("topk", "index")


class HostileBank:
    """The stored bank in a folder, one file of which is another's at a time."""

    def __init__(self, folder: Path) -> None:
        with zipfile.ZipFile(BANKS / "schema-1.zip") as stored:
            stored.extractall(folder)
        self.folder = folder
        self.bank = folder / "bank"
        self.sound = {
            str(path.relative_to(self.bank)): path.read_bytes()
            for path in self.bank.rglob("*")
            if path.is_file()
        }
        self.expected = dict(np.load(folder / "expected.npz"))
        self.record = open_record(str(self.bank))
        self._is_used_sound = False
        torch.set_num_threads(1)

    def seeds(self) -> dict[str, bytes]:
        """Returns one file of each kind."""
        return {f"sound/{path}": self.sound[path] for path in SOUND}

    def run(self, name: str, data: bytes) -> None:
        """Uses the bank with one file exchanged, then puts the file back.

        The sound bank is used once, whichever file it is that was not changed.
        """
        path = name.partition("/")[2]
        if data == self.sound[path]:
            if self._is_used_sound:
                return
            self._is_used_sound = True
        (self.bank / path).write_bytes(data)
        try:
            self._use(path, zlib.crc32(data))
        finally:
            (self.bank / path).write_bytes(self.sound[path])

    def _use(self, path: str, number: int) -> None:
        errors: list[TeachOnceError] = []

        def attempt(call: Callable[[], Any]) -> Any:
            try:
                return call()
            except TeachOnceError as error:
                errors.append(error)
                check(len(str(error)) < 20_000, "an error that nobody reads")
                return None

        bank = attempt(lambda: open_bank(str(self.bank)))
        if bank is not None:
            self._read(bank, attempt, is_same_record=path != "bank.json")
            store, record = open_record(str(self.bank))
            report = attempt(lambda: verify(store, record, full=True))
            attempt(lambda: json.dumps(bank_facts(store, record)))
            uses = (self._train, self._export, self._diff)
            uses[number % 3](attempt)
            held = (self.bank / path).read_bytes()
            if report is not None and _must_be_seen(path, held, self.sound[path]):
                check(not report.is_sound, f"verify takes {path} for sound")
        if errors:
            raise errors[0]

    def _read(
        self, bank: Bank, attempt: Callable[..., Any], is_same_record: bool
    ) -> None:
        for output in bank.outputs:
            attempt(lambda o=output: bank.validity(o))
            if bank.output(output).encoding["encoding"] not in WITHOUT_STATISTICS:
                attempt(lambda o=output: bank.statistics(o))
            attempt(lambda o=output: bank.committed_blocks(o))
            for view in sorted(bank.views_of(output))[:3]:
                blocks = bank.record.live_blocks[:6]
                read = [
                    attempt(lambda o=output, b=b, v=view: bank.read(o, b, v))
                    for b in blocks
                ]
                if is_same_record:
                    self._compare(f"{output}@{view}", read)
        for name in ("key", "labels/class", "views/flip", "views/image_box"):
            attempt(lambda n=name: bank.whole_array(n))
        attempt(lambda: list(bank.rows()))
        attempt(bank.missing)
        for shard in bank.record.shards[:4]:
            attempt(lambda s=shard: bank.sample_table.spans(s))

    def _compare(self, name: str, read: list[np.ndarray | None]) -> None:
        """What can be read is what was stored: never a plausible number."""
        rows = len(self.expected[name]) // len(read)
        for number, values in enumerate(read):
            if values is not None:
                wanted = self.expected[name][number * rows : (number + 1) * rows]
                same = np.array_equal(values, wanted, equal_nan=True)
                check(same, f"{name} block {number} reads as other numbers")

    def _train(self, attempt: Callable[..., Any]) -> None:
        reading = Reading(
            inputs={"image": (8, 8)},
            targets={"patch": "net/patch", "points": "points/pooled"},
            labels=("class",),
        )

        def batches() -> None:
            dataset = BankDataset(
                str(self.bank),
                reading,
                batch=2,
                threads=1,
                window_blocks=2,
                shards=[str(self.folder / "data" / "*.tar")],
            )
            for batch in dataset.batches(0):
                for target in batch.targets.values():
                    values = target.values()[target.valid]
                    check(values.isfinite().all(), "a target is not finite")

        attempt(batches)

    def _export(self, attempt: Callable[..., Any]) -> None:
        before = _files(self.folder)
        copy = self.folder / "export" / "copy"
        try:
            report = attempt(lambda: export(str(self.bank), str(copy)))
            if report is not None and (copy / "bank.json").exists():
                attempt(lambda: verify(*open_record(str(copy)), full=True))
        finally:
            strays = _files(self.folder) - before
            for path in strays:
                path.unlink()
        outside = {path for path in strays if copy not in path.parents}
        check(not outside, f"export wrote elsewhere: {sorted(outside)[:3]}")

    def _diff(self, attempt: Callable[..., Any]) -> None:
        def compare() -> None:
            stores = [self.record, open_record(str(self.bank))]
            contents = [read_contents(*one) for one in stores]
            found = diff(*contents)
            banks = [(one[0], held) for one, held in zip(stores, contents, strict=True)]
            read = read_bytes(found, *banks)
            list(value_differences(found, read, *banks))

        attempt(compare)


def _files(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


def _must_be_seen(path: str, held: bytes, sound: bytes) -> bool:
    """Whether ``verify --full`` must notice that an object is not what it was.

    Of arrays that finalise makes, nothing but their own checksums is recorded: another
    sound object in one's place is noticed by who reads it, if at all.
    """
    if held == sound or not path.rpartition("/")[2].startswith("c."):
        return False
    is_feature = "/patch/" in path
    return is_feature or not has_own_crc(held)


def bank_target(keep: Path) -> Target:
    """Returns the target; its bank lies under ``keep``."""
    hostile = HostileBank(keep / "made")
    return Target("bank", hostile.run, 512 * MIB, _small_banks, hostile.seeds)


def _small_banks() -> None:
    record_check.MAX_BLOCKS = 2**12
