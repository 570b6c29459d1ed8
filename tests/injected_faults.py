"""Faults put into the files of a bank, and who finds them.

A bank with every kind of file, small enough to be damaged hundreds of times; damage of
four kinds; and for each fault: does `verify` name it, does a trainer refuse it by name
or at least learn from the same numbers, does `--repair` make the bank what it was?
Shared by the tests and by ``benchmarks/faults.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.errors import TeachOnceError
from manifests.loading import load_job
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import Outcome, precompute
from student_train import BankDataset, Reading
from tests.conftest import POINTS_INPUT, write_job, write_tar
from tests.training import street_members

DAMAGES = ("deleted", "emptied", "truncated", "flipped")
# Where a wrong bit is put: chunk or page and magic, index or footer, anywhere.
PLACES = ("head", "tail", "anywhere")
_EDGE_BYTES = 24

ENCODED = {
    "exact": {"from": "body"},
    "patch": {"from": "body", "encoding": "compact"},
    "layer1": {"from": "stem", "encoding": "half"},
    "logits": {"encoding": "raw"},
}
CAMERA = "calibration/image_intrinsics"
# The first pattern that matches a path in the bank says what kind of file it is.
KINDS = {
    "record": r"bank\.json$",
    "commit": r"commits/",
    "row facts": r"rows/",
    "index": r"index/",
    "table of blocks": r"blocks\.parquet$",
    "table of files": r"files\.parquet$",
    "dataset's rows": r"dataset/.*parquet$",
    "dataset's record": r"dataset/.*json$",
    "card": r"README\.md$",
    "catalogue record": r"croissant\.json$",
    "run": r"runs/",
    "statistics": r"features\.zarr/.*/stats/[^/]+/c",
    "metadata": r"features\.zarr/(.*/)?zarr\.json$",
    "keys": r"features\.zarr/key/",
    "views": r"features\.zarr/views/",
    "labels": r"features\.zarr/labels/",
    "calibration": r"features\.zarr/calibration/",
    "validity": r"features\.zarr/.*/valid/",
    "raw": r"features\.zarr/net/.*/logits/",
    "lossless, float32": r"features\.zarr/net/.*/exact/",
    "lossless, bfloat16": r"features\.zarr/coarse/.*/patch/",
    "half": r"features\.zarr/net/.*/layer1/",
    "compact, codes": r"features\.zarr/net/.*/patch/",
    "compact, scale": r"features\.zarr/net/.*/patch_scale/",
    "compact, mean and std": r"features\.zarr/net/.*/patch_(mean|std)/",
    "topk": r"features\.zarr/points/.*/logits_(index|value|rest)/",
    "points": r"features\.zarr/points/.*/pooled/",
}
READING = Reading(
    inputs={"image": (16, 16)},
    targets={
        "exact": "net/exact",
        "patch": "net/patch",
        "half": "net/layer1",
        "logits": "net/logits",
        "coarse": "coarse/patch",
        "pooled": "points/pooled",
        "topk": "points/logits",
    },
    labels=("class", "distance"),
    cameras=("image",),
)


def make_varied_bank(folder: Path) -> Path:
    """Makes a bank that has every kind of file; returns its job."""
    for number, size in enumerate((6, 3)):
        members = []
        for row in range(size):
            seed = 10 * number + row
            members += street_members(f"v{number}-{row:04d}", seed)
        write_tar(folder / "data" / f"train-{number}.tar", members)
    net = {
        "model": "module:./nets.py:Net",
        "weights": "random:1",
        "on": ["image"],
        "sizes": [[16, 32]],
        "batch": 4,
    }
    points = {
        "model": "module:./nets.py:Points",
        "weights": "random:2",
        "on": ["lidar"],
        "batch": 4,
        "preprocess": {"points": 32, "centre": True, "unit_sphere": True},
        "outputs": {
            "pooled": {"from": "output[pooled]"},
            "logits": {"from": "output[logits]", "topk": 2},
        },
    }
    outputs = {"patch": {"from": "body"}}
    return write_job(
        folder,
        metadata="json",
        inputs={
            "image": {"kind": "image", "member": "jpg", "calibration": "camera"},
            "lidar": POINTS_INPUT,
        },
        labels={
            "class": {"member": "cls", "num_classes": 5},
            "distance": {"member": "json", "path": "distance"},
        },
        views={"random": 1, "yaw_deg": 10.0},
        teachers={
            "net": {**net, "outputs": ENCODED},
            "coarse": {**net, "precision": "bfloat16", "outputs": outputs},
            "points": points,
        },
        block_rows=4,
    )


def kind_of(path: str) -> str:
    """Returns the kind of file that a path in the bank is."""
    return next(name for name, pattern in KINDS.items() if re.match(pattern, path))


def files_of(bank: Path) -> dict[str, list[str]]:
    """Returns the paths in a bank of every kind of file."""
    found: dict[str, list[str]] = {name: [] for name in KINDS}
    for path in sorted(bank.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(bank))
            found[kind_of(name)].append(name)
    return found


@dataclass(frozen=True)
class Fault:
    """Damage to one file, and what the file held.

    Attributes:
        bank: the bank.
        path: in the bank.
        damage: one of ``DAMAGES``.
        where: what was changed, for messages.
        before: the bytes of the file.
    """

    bank: Path
    path: str
    damage: str
    where: str
    before: bytes

    def undo(self) -> None:
        """Puts the file back."""
        (self.bank / self.path).write_bytes(self.before)


def inject(
    bank: Path, path: str, damage: str, rng: np.random.Generator, place: str = ""
) -> Fault:
    """Damages one file.

    Args:
        bank: the bank.
        path: in it.
        damage: one of ``DAMAGES``.
        rng: draws where.
        place: of a wrong bit, one of ``PLACES``; drawn where omitted.
    """
    file = bank / path
    before = file.read_bytes()
    where = ""
    # A snapshot may share the file by a hard link: it is never written in place.
    file.unlink()
    if damage == "emptied":
        file.write_bytes(b"")
    elif damage == "truncated":
        keep = int(rng.integers(1, len(before)))
        where = f"to {keep} of {len(before)} bytes"
        file.write_bytes(before[:keep])
    elif damage == "flipped":
        edge = min(_EDGE_BYTES, len(before))
        spans = {
            "head": (0, edge),
            "tail": (len(before) - edge, len(before)),
            "anywhere": (0, len(before)),
        }
        byte = int(rng.integers(*spans[place or str(rng.choice(PLACES))]))
        bit = int(rng.integers(8))
        where = f"bit {bit} of byte {byte} of {len(before)}"
        data = bytearray(before)
        data[byte] ^= 1 << bit
        file.write_bytes(bytes(data))
    return Fault(bank, path, damage, where, before)


def can_be_told(kind: str, damage: str) -> bool:
    """Returns whether a bank can tell that a file was damaged so.

    The card's words are for people, who edit them; a run more or less was never
    promised.
    """
    if kind == "card":
        return damage in ("deleted", "emptied")
    if kind == "catalogue record":
        return damage != "flipped"
    return not (kind == "run" and damage == "deleted")


def block_of(path: str) -> int | None:
    """Returns the block that a file is of, None where it is of no block alone."""
    kind = kind_of(path)
    if kind in ("commit", "row facts"):
        return int(Path(path).stem)
    is_object = list(KINDS).index(kind) >= list(KINDS).index("raw")
    return int(path.rpartition("/c.")[2].split(".")[0]) if is_object else None


def _is_named(path: str, said: str) -> bool:
    """Whether a message names a file; of a block's objects, its array and block."""
    block = block_of(path)
    if path in said and block is None:
        return True
    if kind_of(path) == "commit":
        return f"pass {Path(path).parent.name} block {block}" in said
    inside = path.removeprefix("features.zarr/")
    name = inside if block is None else inside.rpartition("/c.")[0] or path
    return name in said and (block is None or re.search(rf"block {block}\b", said))


def found_by_verify(fault: Fault) -> bool:
    """Whether `verify` names the file; `verify --full` where only its bytes tell."""
    try:
        store, record = open_record(str(fault.bank))
    except TeachOnceError as error:
        return _is_named(fault.path, str(error))
    full = fault.damage == "flipped" or kind_of(fault.path) == "run"
    report = verify(store, record, full=full)
    named = [one for one in report.problems if _is_named(fault.path, one)]
    return bool(named) and not report.is_sound


def learned(bank: Path) -> str:
    """Returns a digest of everything that a trainer is given of a bank, in all views.

    Raises:
        TeachOnceError: it refuses the bank.
    """
    digest = hashlib.sha256()
    shards = [str(bank.parent / "data" / "train-*.tar")]
    for view in (0, 1):
        dataset = BankDataset(
            str(bank),
            READING,
            batch=2,
            shards=shards,
            view=view,
            threads=1,
            window_blocks=1,
        )
        for batch in dataset.batches(0):
            digest.update(repr((batch.rows.tolist(), batch.keys)).encode())
            for tensors in (batch.inputs, batch.labels):
                for name in sorted(tensors):
                    digest.update(tensors[name].numpy().tobytes())
            for name in sorted(batch.targets):
                digest.update(batch.targets[name].values().numpy().tobytes())
            for name in sorted(batch.cameras):
                for value in vars(batch.cameras[name]).values():
                    digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def found_by_trainer(fault: Fault, undamaged: str) -> str:
    """Returns what a trainer makes of a fault.

    Args:
        fault: the damage.
        undamaged: what ``learned`` says of the sound bank.

    Returns:
        ``refused`` by name, ``same`` where it learns from the same numbers, ``wrong``
        where it learns from others, or what it said without naming the file.
    """
    try:
        return "same" if learned(fault.bank) == undamaged else "wrong"
    except TeachOnceError as error:
        return "refused" if _is_named(fault.path, str(error)) else str(error)


def untouched(bank: Path) -> dict[str, tuple[bytes, int]]:
    """Returns bytes and inode of every data object, row-fact object and commit."""
    found = {}
    for path in sorted(bank.rglob("*")):
        name = str(path.relative_to(bank))
        if path.is_file() and block_of(name) is not None:
            found[name] = (path.read_bytes(), path.stat().st_ino)
    return found


def repair(job: Path, bank: Path) -> Outcome:
    """Runs ``precompute JOB --repair`` in this process."""
    return precompute(load_job(str(job), [f"bank={bank}"]), quiet=True, do_repair=True)


def objects_of(bank: Path, path: str) -> Iterator[str]:
    """Yields the files that a repair may write because one is damaged: its block's."""
    block = block_of(path)
    for commit in sorted((bank / "commits").glob("*/*.json")):
        objects = json.loads(commit.read_bytes())["content"]["objects"]
        name = str(commit.relative_to(bank))
        if int(commit.stem) == block and path in (name, *objects):
            yield from (name, *objects)
