"""Zero-shot classifiers beside the logits they gave: arrays of a bank without rows.

Owns ``<level>/<output>_classifier`` (class, channel) float32, one object, so that a
student can be scored zero-shot without any text tower. What it is stands in the record;
its values come from the job's file. Written by the holder of the bank's lock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.bank import BankRecord, OutputEntry, PassEntry
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.places import FEATURES

SUFFIX = "_classifier"


@dataclass(frozen=True, eq=False)
class StoredClassifier:
    """A zero-shot classifier as a bank holds it.

    With ``e`` an embedding divided by its length, logits are
    ``scale * e @ weight.T + bias``.

    Attributes:
        weight: (class, channel) float32, each row of length 1.
        scale: a positive number.
        bias: 0 where its model has none.
        classes: names, one per row.
        model: ``FAMILY:NAME`` of the text tower.
        sha256: of the file it came from.
    """

    weight: npt.NDArray[np.float32]
    scale: float
    bias: float
    classes: tuple[str, ...]
    model: str
    sha256: str


@dataclass(frozen=True)
class ClassifierArray:
    """Where one classifier lies and what the record says of it.

    Attributes:
        path: inside ``features.zarr``.
        url: of the job's file.
        facts: ``classes``, ``channels``, ``scale``, ``bias``, ``model``, ``sha256``.
    """

    path: str
    url: str
    facts: dict[str, Any]

    @property
    def metadata_path(self) -> str:
        """Path of its ``zarr.json`` in the bank."""
        return f"{FEATURES}/{self.path}/zarr.json"

    @property
    def object_path(self) -> str:
        """Path of its one object in the bank."""
        return f"{FEATURES}/{self.path}/c.0.0"

    @property
    def shape(self) -> tuple[int, int]:
        """Classes and channels."""
        return len(self.facts["classes"]), self.facts["channels"]

    def metadata(self) -> bytes:
        """Returns the bytes of its ``zarr.json``."""
        return self._make(None)[0]

    def object(self, weight: npt.NDArray[np.float32]) -> bytes:
        """Returns the bytes of its one object.

        Args:
            weight: (class, channel) float32.
        """
        return self._make(weight)[1]

    def _make(self, weight: npt.NDArray[np.float32] | None) -> tuple[bytes, bytes]:
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec
        from zarr.storage import MemoryStore

        name = self.path.rpartition("/")[2]
        written: dict[str, Any] = {}
        array = zarr.create_array(
            MemoryStore(written),
            shape=self.shape,
            chunks=self.shape,
            dtype="float32",
            fill_value="NaN",
            filters=(),
            compressors=(ZstdCodec(level=1), Crc32cCodec()),
            chunk_key_encoding={"name": "default", "separator": "."},
            dimension_names=(f"{name}_class", f"{name}_channel"),
            attributes={
                **{key: self.facts[key] for key in ("classes", "scale", "bias")},
                **{key: self.facts[key] for key in ("sha256", "model")},
                "logits": "scale * embedding / its length @ this.T + bias",
            },
            zarr_format=3,
        )
        if weight is not None:
            array[...] = weight
        document = json.loads(written["zarr.json"].to_bytes())
        data = written["c.0.0"].to_bytes() if weight is not None else b""
        return json.dumps(document, indent=2).encode(), data


def classifier_arrays(record: BankRecord) -> Iterator[ClassifierArray]:
    """Yields the classifier of every output that has one."""
    for path, entry, output in layout.outputs(record):
        if "classifier" in output.definition:
            yield _array(path, entry, output)


def _array(path: str, entry: PassEntry, output: OutputEntry) -> ClassifierArray:
    return ClassifierArray(
        f"{path}{SUFFIX}",
        entry.request["outputs"][output.name]["classifier"],
        entry.provenance["facts"]["classifiers"][output.name],
    )


def write_classifier(
    store: Store, array: ClassifierArray, weight: npt.NDArray[np.float32]
) -> None:
    """Writes one classifier where none is; for the holder of the bank's lock."""
    store.create(array.object_path, array.object(weight))
    store.create(array.metadata_path, array.metadata())


def is_stored(store: Store, array: ClassifierArray) -> bool:
    """Tells whether a classifier's object and metadata are there."""
    paths = (array.object_path, array.metadata_path)
    return all(store.size(path) is not None for path in paths)
