"""What is given hostile input, and what must hold of whatever comes out.

A target takes a file's name and bytes, uses them as the product would, and lets our own
errors through. It raises `Broken` where a result contradicts itself.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.bank import Commit
from manifests.dataset import DatasetRecord
from manifests.errors import TeachOnceError
from manifests.inputs import LabelConfig, PointsInput
from manifests.loading import load_job, load_json
from manifests.recipe_loading import load_probe, load_recipe
from manifests.storage import Store
from pipeline.bank.record import encode_record, parse_record
from pipeline.samples import images, point_columns
from pipeline.samples.calibration import parse_calibration, parse_time
from pipeline.samples.labels import parse_label, parse_metadata
from pipeline.samples.maps import decode_map
from pipeline.samples.points import decode_sweep
from pipeline.samples.shards import RowSpan, index_shard, parse_sample, read_samples

ROOT = Path(__file__).parents[2]
WANTED = frozenset({"jpg", "png", "bin", "cls", "json", "txt"})


class Broken(Exception):
    """A result that contradicts itself: as much a bug as a crash."""


def check(holds: object, what: str) -> None:
    """Raises Broken unless ``holds``."""
    if not holds:
        raise Broken(what)


@dataclass(frozen=True)
class Target:
    """Something that reads files of strangers.

    Attributes:
        folder: of its seeds under ``tests/data/corpus``.
        run: takes a file's name and bytes.
        memory: bytes of address space that one input may take.
        make_small: lowers the product's own bounds, so that what it may rightly take
            is far below ``memory``.
        seeds: more seeds than lie in the folder.
        deadline_s: seconds that one input may take.
    """

    folder: str
    run: Callable[[str, bytes], None]
    memory: int
    make_small: Callable[[], None] = lambda: None
    seeds: Callable[[], dict[str, bytes]] = dict
    deadline_s: float = 20.0


def read_shard(name: str, data: bytes) -> None:
    """Indexes a shard and reads it, all and from the middle, as index and run do."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        url = str(path)
        index = index_shard(url)
        rows = index.rows
        check(len({row.key for row in rows}) == len(rows), "a key has two rows")
        check(all(fault.reason for fault in index.faults), "a fault without a reason")
        if not rows:
            return
        end = max(row.offset + row.size for row in rows)
        for first in {0, len(rows) // 2}:
            span = RowSpan(
                first, len(rows) - first, rows[first].offset, end, rows[first].key
            )
            # What was indexed can be read; the bytes are the same.
            found = list(read_samples(url, span, WANTED, index.sequential))
            numbers = [number for number, _ in found]
            check(numbers == list(range(first, len(rows))), "rows are read otherwise")
            keys = [sample.key for _, sample in found]
            check(keys == [row.key for row in rows[first:]], "keys are read otherwise")
        if index.sequential:
            return
        for row, (_, sample) in zip(rows, read_all(url, rows), strict=True):
            part = data[row.offset : row.offset + row.size]
            again = parse_sample(part, WANTED, url)
            check(again == sample, "a row by itself is another sample")


def read_all(url: str, rows: list) -> list:
    """Returns every row and sample of a plain shard."""
    end = max(row.offset + row.size for row in rows)
    span = RowSpan(0, len(rows), rows[0].offset, end, rows[0].key)
    return list(read_samples(url, span, WANTED, sequential=False))


def read_points(name: str, data: bytes) -> None:
    """Reads a sweep by its file's suffix, with and without intensity."""
    member = name.rpartition(".")[2]
    errors = []
    for columns in (("x", "y", "z", "intensity"), ("z", "x", "y")):
        config = PointsInput(kind="points", member=member, columns=columns)
        try:
            sweep = decode_sweep(data, config)
        except TeachOnceError as error:
            errors.append(error)
            continue
        points = sweep.points
        check(points.dtype == np.float32, "points are no float32")
        check(points.ndim == 2 and points.shape[1] == len(columns), "another shape")
        check(
            len(points) > 0 and np.isfinite(points).all(), "points that cannot be used"
        )
        total = len(points) + sweep.num_dropped
        stored = np.arange(total) if sweep.stored is None else sweep.stored
        check(
            len(stored) == len(points) and stored[-1] < total, "points are misnumbered"
        )
    if errors:
        raise errors[0]


def read_image(name: str, data: bytes) -> None:
    """Decodes an image, as one of colours and as a map, and resizes a view of it."""
    size = images.image_size(data)
    try:
        label = decode_map(data)
        check(label.mode in ("L", "I"), f"a map of mode {label.mode}")
    except TeachOnceError:
        pass
    image = images.decode_image(data)
    check(image.mode == "RGB", f"mode {image.mode}")
    check(image.size == size[::-1], f"{image.size} where the header says {size}")
    box = (0.0, 0.0, float(image.width), float(image.height))
    view = images.resize_view(image, box, True, (7, 9), "bicubic")
    check(view.shape == (7, 9, 3) and view.dtype == np.uint8, "a view of another shape")


def read_manifest(name: str, data: bytes) -> None:
    """Reads a document of the kind that its file's name begins with."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(data)
        try:
            _read_document(name.partition("-")[0], str(path), data)
        except TeachOnceError as error:
            # The command line prints it as one line: nobody reads a megabyte.
            check(len(str(error)) < 20_000, f"an error of {len(str(error))} characters")
            raise


def _read_document(kind: str, path: str, data: bytes) -> None:
    match kind:
        case "job":
            job = load_job(path)
            again = type(job).model_validate(job.model_dump(by_alias=True))
            check(again == job, "a job is another once it was stored")
        case "recipe":
            load_recipe(path)
        case "probe":
            load_probe(path)
        case "override":
            job = Path(path).with_name("job.yaml")
            job.write_text(
                "bank: ./bank\nteachers: {net: {model: timm:x, sizes: [[1, 1]]}}\n"
            )
            load_job(str(job), [data.decode("utf-8", "surrogateescape")])
        case "dataset":
            load_json(DatasetRecord, data, path)
        case "bank":
            record = parse_record(Store(path), data)
            check(json.loads(encode_record(record)), "a record that cannot be written")
        case "commit":
            content = load_json(Commit, data, path).content
            check(content.rows >= 0, "rows below 0")
        case "metadata":
            _read_metadata(data)
        case _:
            raise AssertionError(f"no kind of document: {kind}")


def _read_metadata(data: bytes) -> None:
    document = parse_metadata(data)
    errors: list[TeachOnceError] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except TeachOnceError as error:
            errors.append(error)

    attempt(lambda: parse_calibration(document, "cameras.front"))
    attempt(lambda: parse_time(document, "time"))
    for classes in (None, 5):
        label = LabelConfig(member="json", path="label", num_classes=classes)
        attempt(lambda label=label: parse_label(data, label))
    if errors:
        raise errors[0]


def _small_images() -> None:
    images.MAX_PIXELS = 2**20


def _small_points() -> None:
    point_columns.MAX_POINTS = 2**18
    point_columns.MAX_STORED_BYTES = 2**22


def _sound_manifests() -> dict[str, bytes]:
    """Returns the examples, and documents of the stored bank."""
    found = {}
    for path in sorted(EXAMPLES.rglob("*.yaml")):
        kind = "job" if path.parent == EXAMPLES else "recipe"
        kind = "probe" if path.stem == "probe" else kind
        found[f"{kind}-{path.name}"] = path.read_bytes()
    with zipfile.ZipFile(BANKS / "schema-1.zip") as stored:
        found["job-stored.yaml"] = stored.read("job.yaml")
        found["bank-stored.json"] = stored.read("bank/bank.json")
        found["dataset-stored.json"] = stored.read("bank/dataset/part-00000.json")
        for name in ("rows", "net.image"):
            commit = stored.read(f"bank/commits/{name}/00000001.json")
            found[f"commit-{name}.json"] = commit
    return found


MIB = 2**20
EXAMPLES = ROOT / "manifests" / "examples"
BANKS = ROOT / "tests" / "data" / "banks"
TARGETS = {
    "tar": Target("tar", read_shard, 64 * MIB),
    "points": Target("points", read_points, 128 * MIB, _small_points),
    "images": Target("images", read_image, 128 * MIB, _small_images),
    "manifests": Target("manifests", read_manifest, 128 * MIB, seeds=_sound_manifests),
}
