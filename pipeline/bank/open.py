"""Opening a bank to read it: what exists, and features by block.

Never lists: ``bank.json`` and ``blocks.parquet`` say what exists; a block that was
committed after the last finalise is asked for by its commit's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from manifests.bank import BankRecord, OutputEntry, PassEntry
from manifests.errors import BankError, StorageError
from manifests.storage import Store
from pipeline.bank import layout
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.blocks import BankArray, read_block, read_values
from pipeline.bank.classifiers import SUFFIX, StoredClassifier, classifier_arrays
from pipeline.bank.commits import read_blocks, read_commits
from pipeline.bank.encodings import encoding_from_json
from pipeline.bank.holdings import Missing, read_holdings
from pipeline.bank.places import FEATURES
from pipeline.bank.record import open_record
from pipeline.bank.row_index import num_index_parts, read_index_part
from pipeline.bank.sample_table import SampleTable
from pipeline.bank.stored_jpeg import jpeg_of
from pipeline.bank.whole_arrays import read_whole_array


def open_bank(url: str) -> Bank:
    """Returns the bank at a path or any fsspec URL.

    Raises:
        BankError: there is none, or it was made by a newer TeachOnce.
    """
    return Bank(*open_record(url))


class Bank:
    """A bank to read from.

    Attributes:
        record: everything ``bank.json`` says.
    """

    def __init__(self, store: Store, record: BankRecord) -> None:
        self.record = record
        self._store = store
        self._features = Store(store.url_of(FEATURES))
        self._outputs: dict[str, list[tuple[PassEntry, OutputEntry]]] = {}
        for entry in record.passes:
            for output in entry.outputs:
                path = f"{layout.level_path(entry, output.size)}/{output.name}"
                self._outputs.setdefault(path, []).append((entry, output))
        self._committed: dict[str, dict[str, tuple[int, int]]] | None = None

    @property
    def url(self) -> str:
        """Where it lies."""
        return self._store.url

    @cached_property
    def sample_table(self) -> SampleTable:
        """Where every sample lies in its shard."""
        return SampleTable(self._store)

    def views_of(self, path: str) -> frozenset[int]:
        """Returns the views that an output has."""
        self.output(path)
        return frozenset(v for one, _ in self._outputs[path] for v in one.views)

    def pass_of(self, path: str) -> PassEntry:
        """Returns the pass that first made an output: its teacher, group and inputs."""
        self.output(path)
        return self._outputs[path][0][0]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Paths of teachers' outputs: ``<teacher>/<group>/<size>/<output>``."""
        return tuple(
            path
            for path, found in self._outputs.items()
            if not found[0][0].holds_inputs
        )

    @property
    def stored_inputs(self) -> dict[str, str]:
        """Inputs that the bank holds copies of, and the path of each one's array."""
        return {
            found[0][0].inputs[0]: path
            for path, found in self._outputs.items()
            if found[0][0].holds_inputs
        }

    def stored_images(self, name: str, block: int) -> list[bytes]:
        """Returns the copies of an input that a block holds, each a JPEG.

        Args:
            name: of the input.
            block: number of the block in the bank.

        Returns:
            (block_rows,) bytes, b"" where there is none.

        Raises:
            BankError: the bank holds no copies of it, or the block is not committed or
                damaged.
        """
        held = read_block(self.array(self.stored_path(name)), block)
        return [jpeg_of(row) for row in held]

    def stored_path(self, name: str) -> str:
        """Returns the path of an input's copies, as of an output.

        Raises:
            BankError: the bank holds no copies of it.
        """
        paths = self.stored_inputs
        if name not in paths:
            raise BankError(
                f"bank {self._store.url} must hold copies of input {name!r}, it has "
                f"{', '.join(paths) or 'none'}; add it to stored_inputs of its job, "
                "export it with --inputs, or give data.shards"
            )
        return paths[name]

    def output(self, path: str) -> OutputEntry:
        """Returns what the bank says of one output.

        Raises:
            BankError: it has none of that path; those it has are named.
        """
        if path not in self._outputs:
            raise BankError(
                f"bank {self._store.url} has no output {path!r}; it has "
                f"{', '.join(self.outputs) or 'none'}"
            )
        return self._outputs[path][0][1]

    def _sizes(self, pass_id: str) -> dict[str, tuple[int, int]]:
        if self._committed is None:
            # Filled before it is seen: threads that read at once must find it whole.
            committed: dict[str, dict[str, tuple[int, int]]] = {
                entry.id: {} for entry in self.record.passes
            }
            if self.record.state is not None:
                table = read_blocks(self._store).to_pydict()
                for name, paths, sizes, crcs in zip(
                    table["pass"],
                    table["objects"],
                    table["size_bytes"],
                    table["crc32c"],
                    strict=True,
                ):
                    found = zip(sizes, crcs, strict=True)
                    committed[name] |= dict(zip(paths, found, strict=True))
            self._committed = committed
        return self._committed[pass_id]

    def array(self, path: str, suffix: str = "") -> BankArray:
        """Returns one stored array of an output, for ``read_block``.

        Args:
            path: of the output.
            suffix: of the array, for encodings that have several (``_value``, ...).
        """
        entry = self.output(path)
        suffixes = encoding_from_json(entry.encoding).suffixes
        if suffix not in suffixes:
            raise BankError(
                f"output {path} has no array with suffix {suffix!r}, it has {suffixes}"
            )
        spec = ArraySpec.from_json(entry.arrays[suffixes.index(suffix)])
        passes = [one for one, _ in self._outputs[path]]

        def expected(block: int, view: int) -> tuple[int, int] | None:
            name = f"{FEATURES}/{object_name(spec, block, view)}"
            for one in passes:
                if view not in one.views:
                    continue
                sizes = self._sizes(one.id)
                if name not in sizes:
                    try:
                        content = next(read_commits(self._store, one.id, [block]))
                    except StorageError:
                        continue
                    sizes |= content.objects
                if name in sizes:
                    return sizes[name]
            return None

        return BankArray(self._features, spec, expected)

    def read(self, path: str, block: int, view: int = 0) -> npt.NDArray[np.float32]:
        """Returns decoded values of one output, block and view; missing rows are NaN.

        Returns:
            (block_rows, *shape) float32.

        Raises:
            BankError: the block is not committed or its object is damaged.
        """
        encoding = encoding_from_json(self.output(path).encoding)
        arrays = {suffix: self.array(path, suffix) for suffix in encoding.suffixes}
        return read_values(encoding, arrays, block, view)

    def whole_array(self, path: str) -> npt.NDArray[Any]:
        """Returns a whole array of ``features.zarr``: ``key``, ``labels/class``, ...

        Raises:
            BankError: the bank has none of that path, or it is damaged.
        """
        return read_whole_array(self._features, self.record, path)

    def keys(self) -> npt.NDArray[Any]:
        """Returns the key of every row, (num_rows,); '' where a row is padding."""
        return self.whole_array("key")

    def validity(self, path: str) -> npt.NDArray[np.bool_]:
        """Returns which rows of an output's level are valid, (num_rows,)."""
        self.output(path)
        return self.whole_array(f"{path.rpartition('/')[0]}/valid")

    def statistics(self, path: str) -> dict[str, npt.NDArray[np.float64]]:
        """Returns the statistics of an output: mean, variance, covariance, ...

        Raises:
            BankError: it has none: top-k logits, or a bank that was never finalised.
        """
        self.output(path)
        level, _, name = path.rpartition("/")
        kinds = ("mean", "variance", "mean_direction", "dispersion", "count")
        return {
            kind: self.whole_array(f"{level}/stats/{name}_{kind}") for kind in kinds
        }

    def classifier(self, path: str) -> StoredClassifier:
        """Returns the zero-shot classifier that an output's logits came from.

        Raises:
            BankError: they came from none, or it is gone.
        """
        if "classifier" not in self.output(path).definition:
            raise BankError(
                f"output {path} of bank {self._store.url} comes from no zero-shot "
                "classifier; name one in a job: `logits: {classifier: FILE}`"
            )
        found = next(
            one
            for one in classifier_arrays(self.record)
            if one.path == f"{path}{SUFFIX}"
        )
        return StoredClassifier(
            weight=self.whole_array(found.path),
            scale=found.facts["scale"],
            bias=found.facts["bias"],
            classes=tuple(found.facts["classes"]),
            model=found.facts["model"],
            sha256=found.facts["sha256"],
        )

    def committed_blocks(self, path: str) -> npt.NDArray[np.int64]:
        """Returns the blocks of an output that were committed at the last finalise."""
        self.output(path)
        wanted = {entry.id for entry, _ in self._outputs[path][:1]}
        table = read_blocks(self._store)
        blocks = [
            block
            for name, block in zip(
                table["pass"].to_pylist(), table["block"].to_pylist(), strict=True
            )
            if name in wanted
        ]
        return np.asarray(sorted(blocks), np.int64)

    def missing(self) -> Missing:
        """Returns what the bank lacks: it still grows, or was copied in part. Lists."""
        return read_holdings(self._store, self.record).missing()

    def rows(self) -> Iterator[dict[str, object]]:
        """Yields a mapping per row: shard, key, row, block, offset, labels, valid."""
        if self.record.state is None:
            return
        for part in range(num_index_parts(self.record)):
            yield from read_index_part(self._store, part).to_pylist()
