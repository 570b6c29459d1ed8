"""One block in flight: from decoded rows to stored objects.

Owns a block's buffers and counts what is still to do. Which thread calls what is the
engine's business; every method may be called from any thread.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import ceil

import numpy as np

from manifests.bank import (
    BankRecord,
    BlockSpan,
    CommitContent,
    WorkItem,
    WorkResult,
)
from manifests.storage import Store
from pipeline.bank.adoption import adopt_object, refuse_orphan
from pipeline.bank.arrays import ArraySpec, object_name
from pipeline.bank.objects import encode_object, object_crc32c, object_size
from pipeline.bank.places import FEATURES
from pipeline.bank.rows import RowFacts, encode_rows, object_path
from pipeline.decoding import SampleSchema, decode_sample
from pipeline.live import LivePass, StoredOutput, explain_failure
from pipeline.memory import Buffers
from pipeline.prepared_rows import PreparedRows
from pipeline.samples.shards import Sample
from pipeline.samples.views import ViewPolicy
from pipeline.stopwatch import Stopwatch

OutputKey = tuple[StoredOutput, int]


class BlockWork:
    """A block of a work item: inputs, outputs and what is still to do."""

    def __init__(
        self,
        item: WorkItem,
        span: BlockSpan,
        record: BankRecord,
        passes: Sequence[LivePass],
        buffers: Buffers,
        watch: Stopwatch,
        on_released: Callable[[], None],
    ) -> None:
        self.item = item
        self.span = span
        self._record = record
        self._passes = {live.entry.id: live for live in passes}
        self._buffers = buffers
        self._watch = watch
        self._on_released = on_released
        self._lock = threading.Lock()
        self._decoded = threading.Event()
        self._written = threading.Event()
        self._released = False
        self._aborted = False
        self._rows_left = span.num_rows
        self._bytes_read = 0
        self._facts = [RowFacts() for _ in range(span.num_rows)]
        self._batches_left: dict[tuple[str, int], int] = {}
        self._passes_left = len(passes)
        self._forwards_left: dict[str, int] = {}
        for live in passes:
            if live.teacher is None:
                continue
            batch = live.entry.batch
            count = ceil(span.num_rows / batch)
            self._forwards_left[live.entry.id] = count
            for number in range(count):
                rows = min(batch, span.num_rows - number * batch)
                self._batches_left[live.entry.id, number] = rows
        self._usable = {
            name: np.zeros(record.block_rows, np.bool_) for name in self._passes
        }
        self._reasons: dict[str, dict[str, list[int]]] = {
            name: defaultdict(list) for name in self._passes
        }
        self._inputs = PreparedRows(passes, record.block_rows, buffers.take)
        self._outputs: dict[str, dict[OutputKey, np.ndarray]] = {}
        self._contents: list[CommitContent] = []
        self._bytes_written = 0

    # Decoding.

    def decode_row(
        self,
        row: int,
        sample: Sample,
        refused: str | None,
        schema: SampleSchema,
        policy: ViewPolicy,
    ) -> tuple[list[tuple[str, int]], list[str], bool]:
        """Decodes one row and prepares it for every teacher and view.

        Returns:
            The (pass, batch) that are now ready to run, the passes that are ready to be
            written without running anything, and whether the row is invalid for some
            teacher.
        """
        offset = row - self.span.first_row
        with self._watch.stage("decode"):
            decoded = decode_sample(sample, schema, refused)
        with self._watch.stage("prepare"):
            self._inputs.put(offset, self.item.shard, sample.key, decoded, policy)
        read = sum(len(member) for member in sample.members.values())
        return self._row_done(offset, decoded.facts, read)

    def _row_done(
        self, offset: int, facts: RowFacts, bytes_read: int
    ) -> tuple[list[tuple[str, int]], list[str], bool]:
        ready: list[tuple[str, int]] = []
        is_invalid = False
        with self._lock:
            self._facts[offset] = facts
            self._bytes_read += bytes_read
            self._rows_left -= 1
            is_last = self._rows_left == 0
            for name, live in self._passes.items():
                codes = [
                    f"{one}:{facts.reasons[one].partition(':')[0]}"
                    for one in live.entry.inputs
                    if one in facts.reasons
                ]
                self._usable[name][offset] = not codes
                for code in codes:
                    self._reasons[name][code].append(offset)
                is_invalid = is_invalid or bool(live.outputs and codes)
                if live.teacher is None:
                    continue
                batch = offset // live.entry.batch
                self._batches_left[name, batch] -= 1
                if self._batches_left[name, batch] == 0:
                    ready.append((name, batch))
        without = []
        if is_last:
            without = [n for n, live in self._passes.items() if live.teacher is None]
            self._decoded.set()
        return ready, without, is_invalid

    # Running teachers.

    def forward(self, name: str, batch: int) -> bool:
        """Runs one batch of a pass; returns whether it was the pass's last."""
        live = self._passes[name]
        low = batch * live.entry.batch
        high = min(low + live.entry.batch, self._record.block_rows)
        outputs = self._outputs_of(live)
        if self._usable[name][low:high].any():
            with self._watch.stage(f"forward.{live.entry.teacher}"):
                for size in live.sizes:
                    for view in live.entry.views:
                        self._forward_view(live, size, view, low, high, outputs)
        with self._lock:
            self._forwards_left[name] -= 1
            return self._forwards_left[name] == 0

    def _forward_view(
        self,
        live: LivePass,
        size: str,
        view: int,
        low: int,
        high: int,
        outputs: Mapping[OutputKey, np.ndarray],
    ) -> None:
        arrays = self._inputs.batch(live, size, view, slice(low, high))
        try:
            found = live.forward(size, arrays)
        except (RuntimeError, MemoryError) as error:
            raise explain_failure(live, error, live.entry.batch) from error
        for (output, number), target in outputs.items():
            if output.size == size and number == view and output.kind != "index":
                np.copyto(target[low:high], found[output.name][: high - low], "no")

    def _outputs_of(self, live: LivePass) -> dict[OutputKey, np.ndarray]:
        with self._lock:
            if live.entry.id not in self._outputs:
                self._outputs[live.entry.id] = {
                    (output, view): self._buffers.take(
                        (self._record.block_rows, *output.shape), output.dtype
                    )
                    for output in live.outputs
                    for view in live.entry.views
                }
            return self._outputs[live.entry.id]

    # Writing.

    def write_pass(self, name: str, store: Store) -> None:
        """Encodes and writes every object of a pass whose rows are all there."""
        if self._aborted:
            return
        live = self._passes[name]
        if not live.outputs:
            objects = self._write_facts(live, store)
        else:
            objects = self._write_outputs(live, store)
        usable = self._usable[name][: self.span.num_rows]
        content = CommitContent(
            pass_id=name,
            fingerprint=live.entry.fingerprint,
            block=self.span.block,
            shard=self.item.shard,
            rows=self.span.num_rows,
            valid=int(usable.sum()),
            invalid={
                code: tuple(sorted(rows))
                for code, rows in sorted(self._reasons[name].items())
            },
            objects=objects,
        )
        with self._lock:
            self._contents.append(content)
            self._passes_left -= 1
            is_last = self._passes_left == 0
            for array in self._outputs.pop(name, {}).values():
                if not self._aborted:
                    self._buffers.give(array)
        if is_last:
            self._release(reuse=True)
            self._written.set()

    def _write_facts(self, live: LivePass, store: Store) -> dict[str, tuple[int, int]]:
        with self._watch.stage("encode"):
            data = encode_rows(
                self._facts,
                {name: self._record.inputs[name] for name in live.entry.inputs},
                {name: self._record.labels[name] for name in live.entry.labels},
            )
        path = object_path(live.entry.id, self.span.block)
        with self._watch.stage("write"):
            if not store.create(path, data) and store.read(path) != data:
                raise refuse_orphan(store, path)
        self._bytes_written += len(data)
        return {path: (len(data), object_crc32c([data]))}

    def _write_outputs(
        self, live: LivePass, store: Store
    ) -> dict[str, tuple[int, int]]:
        name = live.entry.id
        usable = self._usable[name]
        if live.teacher is None:
            values = self._inputs.copies_of(live)
        else:
            values = self._outputs_of(live)
        for (output, _), target in values.items():
            if output.kind == "index":
                np.copyto(target, self._inputs.points_of(live, output))
        while True:
            # A row that one output refuses is missing in all: encode until none is new.
            with self._watch.stage("encode"):
                encoded = {
                    (output, view): output.encoding.encode(
                        array,
                        usable,
                        missing_cells=self._inputs.missing_cells(live, output, view),
                        reuse=True,
                    )
                    for (output, view), array in values.items()
                }
            refused = {
                (row, f"{output.name}:{reason}")
                for (output, _), one in encoded.items()
                for row, reason in one.refused.items()
            }
            if not refused:
                break
            for row, code in sorted(refused):
                usable[row] = False
                if row not in self._reasons[name][code]:
                    self._reasons[name][code].append(row)
        objects = {}
        for (output, view), one in encoded.items():
            stored = list(one.arrays.values())
            for spec, rows in zip(output.arrays, stored, strict=True):
                path, size, crc = self._write_object(spec, rows, view, usable, store)
                objects[path] = (size, crc)
        return objects

    def _write_object(
        self,
        spec: ArraySpec,
        rows: np.ndarray,
        view: int,
        usable: np.ndarray,
        store: Store,
    ) -> tuple[str, int, int]:
        with self._watch.stage("encode"):
            parts = encode_object(rows, spec, self.span.num_rows)
            size, crc = object_size(parts), object_crc32c(parts)
        path = f"{FEATURES}/{object_name(spec, self.span.block, view)}"
        with self._watch.stage("write"):
            if not store.create(path, parts):
                size, crc = adopt_object(store, path, spec, (size, crc), usable)
        with self._lock:
            self._bytes_written += size
        return path, size, crc

    # The end.

    def abandon(self) -> None:
        """Gives the block up: nothing of it will be committed. May be called twice."""
        with self._lock:
            if self._written.is_set():
                return
            self._aborted = True
        # Other threads may still write into its buffers: they are not handed out again.
        self._release(reuse=False)
        self._decoded.set()
        self._written.set()

    def _release(self, reuse: bool) -> None:
        with self._lock:
            if self._released:
                return
            self._released = True
        if reuse:
            self._inputs.release(self._buffers.give)
        self._on_released()

    @property
    def is_aborted(self) -> bool:
        """Whether it was given up."""
        return self._aborted

    def wait_decoded(self) -> None:
        """Waits until every row was decoded, or the block given up."""
        self._decoded.wait()

    def wait_written(self) -> list[CommitContent] | None:
        """Waits for the objects; returns what to commit, None where it was given up."""
        self._written.wait()
        if self._aborted:
            return None
        return sorted(self._contents, key=lambda content: content.pass_id)

    def result(self, num_committed: int) -> WorkResult:
        """Returns what the block adds to its work item's result."""
        invalid: Counter[str] = Counter()
        for content in self._contents:
            for code, rows in content.invalid.items():
                invalid[f"{content.pass_id}/{code}"] += len(rows)
        return WorkResult(
            blocks=num_committed,
            samples=self.span.num_rows,
            valid={content.pass_id: content.valid for content in self._contents},
            invalid=dict(invalid),
            bytes_read=self._bytes_read,
            bytes_written=self._bytes_written,
            objects=sum(len(content.objects) for content in self._contents),
        )
