"""Recheck, the work: rows of a bank through the live teachers again.

Rows of any blocks share a forward, each in the slot of the batch that it had: a forward
is a full batch in any case. Few models let one row's bits depend on the others; a row
that is near but not identical, where it should be, is run once more in the batch that
it was in. What near means is in ``recheck``, what the bank says in ``recheck_bank``,
which teachers may run in ``recheck_teachers``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from manifests.bank import BankRecord, PassEntry
from manifests.job import EngineConfig, Job
from manifests.loading import canonical_json
from manifests.storage import Store
from pipeline.bank.encoding import Encoded, to_float32
from pipeline.bank.open import Bank
from pipeline.bank.record import open_record, view_policy_of
from pipeline.bank.shard_copies import ShardCopies
from pipeline.decoding import SampleSchema, decode_sample
from pipeline.errors import PipelineError
from pipeline.estimate import block_bytes, lane_bytes
from pipeline.live import (
    LivePass,
    StoredOutput,
    device_kind,
    explain_failure,
    load_passes,
    pick_device,
    set_lane_threads,
)
from pipeline.prepared_rows import PreparedRows
from pipeline.recheck import Nearness, OutputVerdict, Recheck, choose_rows, compare
from pipeline.recheck_bank import BankSide, Codes, Rows, candidates, path_of
from pipeline.recheck_teachers import agreed_record, passes_of
from pipeline.samples.errors import ShardError
from pipeline.work_items import num_lanes, num_threads

ROUND_BYTES = 2**29
"""Memory of the rows that are looked at together: inputs, outputs and both again."""

OutputView = tuple[StoredOutput, int]
Indices = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]
Pack = tuple[Indices, Indices]
"""Which rows share a forward, and their slots in it."""


def recheck(
    url: str,
    count: int,
    *,
    seed: int = 0,
    teachers: Sequence[str] | None = None,
    shards: Sequence[str] | None = None,
    job: Job | None = None,
    engine: EngineConfig | None = None,
) -> Recheck:
    """Returns how near a bank is to what its teachers say of random rows of it.

    Up to ``count`` valid rows, and as many of those that are not, are drawn by seed.

    Args:
        url: the bank's.
        count: rows of each kind.
        seed: another one draws other rows.
        teachers: names of those that run; None: all of the bank.
        shards: where the shards lie, as paths or URLs; None: where the bank found them.
        job: names the teachers that are code, and where weights lie now.
        engine: device and threads.

    Raises:
        TeachOnceError: the bank was never finalised; a teacher, its code, its weights
            or a shard is not there or not what the bank was made from.
    """
    store, record = open_record(url)
    if record.state is None:
        raise PipelineError(
            f"bank {url} must be finalised to be rechecked; run `teachonce finalise`"
        )
    passes = passes_of(record, teachers)
    valid, refused = candidates(store, record, passes)
    identity = [shard.headers_sha256 for shard in record.shards]
    chosen = choose_rows(valid, count, seed, identity)
    tried = choose_rows(refused, count, seed, identity)
    rows = np.union1d(chosen, tried)
    copies = ShardCopies(Bank(store, record), shards, rows, "--shards")
    agreed = agreed_record(record, passes, job)
    names = [entry.id for entry in passes]
    work = _RecheckWork(store, agreed, names, copies, engine or EngineConfig())
    outputs, problems = work.run(rows)
    return Recheck(
        seed=seed,
        device=work.device,
        rows=len(chosen),
        invalid_rows=len(tried),
        outputs=outputs,
        problems=problems,
        notes=work.bank.differences,
    )


@dataclass(frozen=True)
class _Looked:
    """Rows, prepared for passes, and what decoding said of each."""

    rows: Rows
    prepared: PreparedRows
    reasons: list[Mapping[str, str]]

    def codes(self, entry: PassEntry, index: int) -> Codes:
        """Returns why a row's inputs cannot be used by a pass."""
        found = self.reasons[index]
        return frozenset(
            f"{name}:{found[name].partition(':')[0]}"
            for name in entry.inputs
            if name in found
        )


class _RecheckWork:
    """The live teachers, and the rows that go through them."""

    def __init__(
        self,
        store: Store,
        record: BankRecord,
        pass_ids: Sequence[str],
        copies: ShardCopies,
        config: EngineConfig,
    ) -> None:
        device = pick_device(config.device)
        self.device = device_kind(device)
        self.bank = BankSide(store, record, self.device)
        self._record, self._copies = record, copies
        self._passes = list(load_passes(record, pass_ids, device).values())
        names = {name for live in self._passes for name in live.entry.inputs}
        inputs = {name: one for name, one in record.inputs.items() if name in names}
        self._schema = SampleSchema.of(inputs, {})
        self._policy = view_policy_of(record)
        self._threads = num_threads(config)
        self._num_lanes = num_lanes(device, config, lane_bytes(record, pass_ids))
        row_bytes = block_bytes(record, pass_ids) // record.block_rows
        self._round_rows = max(1, ROUND_BYTES // max(1, 2 * row_bytes))
        self._verdicts: dict[str, OutputVerdict] = {}
        self._problems: list[str] = []

    def run(self, rows: Rows) -> tuple[list[OutputVerdict], list[str]]:
        """Returns a verdict per output and what else is wrong with rows, ascending."""
        for live in self._passes:
            self._check_preprocess(live)
        lane_threads = max(1, self._threads // self._num_lanes)
        total, size = len(rows) * len(self._passes), self._round_rows
        with (
            ThreadPoolExecutor(self._threads, "teachonce-decode") as self._decoders,
            ThreadPoolExecutor(
                self._num_lanes, "teachonce-lane", set_lane_threads, (lane_threads,)
            ) as self._lanes,
            tqdm(total=total, desc="recheck", unit="row", disable=None) as bar,
        ):
            for start in range(0, len(rows), size):
                looked = self._look(rows[start : start + size], self._passes)
                for live in self._passes:
                    self._judge(live, looked)
                    bar.update(len(looked.rows))
        return [*self._verdicts.values()], [*self._problems, *self.bank.damaged]

    def _check_preprocess(self, live: LivePass) -> None:
        """Notes where the bank says another preprocessing than its teacher's."""
        for size, specs in live.specs.items():
            recorded = live.entry.provenance["preprocess"].get(size, {})
            for name, spec in specs.items():
                if canonical_json(recorded.get(name)) != canonical_json(spec.to_json()):
                    self._problems.append(
                        f"pass {live.entry.id}: the bank says that {name} is taken as "
                        f"{recorded.get(name)} at {size}, its teacher takes it as "
                        f"{spec.to_json()}"
                    )

    def _look(self, rows: Rows, passes: Sequence[LivePass]) -> _Looked:
        """Reads, decodes and prepares rows, a block at a time on each thread."""
        prepared = PreparedRows(passes, len(rows))
        reasons: list[Mapping[str, str]] = [{}] * len(rows)
        blocks = rows // self._record.block_rows

        def decode(block: int) -> None:
            shard = self._copies.shard_of(block)
            places = np.flatnonzero(blocks == block)
            # From a row of the bank to that of its shard.
            shift = self._copies.first_row(block) - block * self._record.block_rows
            refused = self.bank.bank.sample_table.spans(shard).refused
            within = rows[places] + shift
            reader = self._copies.open(block, within, self._schema.wanted)
            try:
                for place, row in zip(places.tolist(), within.tolist(), strict=True):
                    sample = reader.read(row)
                    key = str(self.bank.keys[rows[place]])
                    if sample.key != key:
                        raise ShardError(
                            f"key must be the bank's {key!r}, got {sample.key!r} (row "
                            f"{row} of {self._copies.url_of(block)}); give the shards "
                            "that the bank was made from"
                        )
                    decoded = decode_sample(sample, self._schema, refused.get(row))
                    prepared.put(place, shard.name, key, decoded, self._policy)
                    reasons[place] = decoded.facts.reasons
            finally:
                reader.close()

        for _ in self._decoders.map(decode, np.unique(blocks).tolist()):
            pass
        return _Looked(rows, prepared, reasons)

    def _judge(self, live: LivePass, looked: _Looked) -> None:
        """Adds to verdicts and problems what one pass says of some rows."""
        entry = live.entry
        then = {
            index: codes
            for index, row in enumerate(looked.rows.tolist())
            if (codes := self.bank.codes(entry, row)) is not None
        }
        now = {index: looked.codes(entry, index) for index in then}
        wanted = np.array([i for i, codes in now.items() if not codes], np.intp)
        slots = looked.rows % self._record.block_rows % entry.batch
        refused, nears = self._measure(
            live, looked, wanted, pack_rows(slots.astype(np.intp), wanted)
        )
        for index, codes in refused.items():
            now[index] |= codes
        for index, codes in then.items():
            if now[index] != codes:
                self._note(live, int(looked.rows[index]), codes, now[index])
        rows = looked.rows[wanted]
        is_valid = _bools(not then[i] and not now[i] for i in wanted.tolist())
        bits = _bools(self.bank.has_same_bits(entry, row) for row in rows.tolist())
        self._measure_in_place(live, rows, nears, bits & is_valid)
        for (output, view), (near, is_read) in nears.items():
            path = path_of(entry, output)
            verdict = self._verdicts.setdefault(path, OutputVerdict(path))
            chosen = is_valid & is_read
            places = [self.bank.place(row, view) for row in rows[chosen].tolist()]
            verdict.add(near.take(chosen), places, bits[chosen])

    def _note(self, live: LivePass, row: int, then: Codes, now: Codes) -> None:
        place = self.bank.place(row, 0)
        self._problems.append(
            f"row {row} ({place.key!r} of {place.shard}), pass {live.entry.id}: "
            f"{_shown(then)} in the bank, {_shown(now)} now"
        )

    def _measure(
        self, live: LivePass, looked: _Looked, wanted: Indices, packs: Sequence[Pack]
    ) -> tuple[dict[int, Codes], dict[OutputView, tuple[Nearness, Bools]]]:
        """Returns rows that outputs refuse, and how near the bank is for all wanted.

        Args:
            live: the pass.
            looked: rows.
            wanted: which of them are compared.
            packs: forwards in which all of them are.

        Returns:
            From row of ``looked`` to the codes it is refused for; from output and view
            to the nearness of ``wanted`` and which of those the bank could be read for.
        """
        assert live.teacher is not None
        precision = live.teacher.request.config.precision
        refused: dict[int, Codes] = {}
        nears = {}
        for (output, view), values in self._forward(live, looked, packs).items():
            cells = looked.prepared.missing_cells(live, output, view, wanted)
            stored, is_read = self.bank.stored(
                live.entry, output, view, looked.rows[wanted]
            )
            encoded, exact = _encode(output, values[wanted], stored, cells)
            for index, reason in encoded.refused.items():
                row, code = int(wanted[index]), f"{output.name}:{reason}"
                refused[row] = refused.get(row, frozenset()) | {code}
            near = compare(
                output.encoding,
                stored,
                encoded.arrays,
                exact,
                self.bank.moments(live.entry, output),
                precision,
            )
            nears[output, view] = near, is_read
        return refused, nears

    def _measure_in_place(
        self,
        live: LivePass,
        rows: Rows,
        nears: Mapping[OutputView, tuple[Nearness, Bools]],
        bits: Bools,
    ) -> None:
        """Measures rows anew that are near, not identical, and should be.

        They are run in the very batch that they were in.
        """
        doubted = np.zeros(len(rows), np.bool_)
        for near, _ in nears.values():
            is_near = near.holds(np.zeros(len(rows), np.bool_))
            doubted |= bits & is_near & ~near.identical
        size, batch = self._record.block_rows, live.entry.batch
        starts = rows - rows % size % batch
        for start in np.unique(starts[doubted]).tolist():
            block = start // size
            left = self._copies.shard_of(block).samples - self._copies.first_row(block)
            count = min(batch, size - start % size, left - start % size)
            looked = self._look(np.arange(start, start + count), [live])
            chosen = np.flatnonzero(doubted & (starts == start))
            every = np.arange(count)
            _, again = self._measure(
                live, looked, (rows[chosen] - start).astype(np.intp), [(every, every)]
            )
            for key, (near, _) in again.items():
                nears[key][0].put(chosen, near)

    def _forward(
        self, live: LivePass, looked: _Looked, packs: Sequence[Pack]
    ) -> dict[OutputView, np.ndarray]:
        """Returns what the teacher says, by output and view, (rows, *shape)."""
        values = {
            (output, view): np.zeros((len(looked.rows), *output.shape), output.dtype)
            for output in live.outputs
            for view in live.entry.views
        }

        def run(task: tuple[Pack, str, int]) -> None:
            (rows, slots), size, view = task
            arrays = looked.prepared.batch(live, size, view, rows, slots)
            try:
                found = live.forward(size, arrays)
            except (RuntimeError, MemoryError) as error:
                raise explain_failure(live, error, live.entry.batch) from error
            for (output, number), target in values.items():
                if output.size == size and number == view and output.kind != "index":
                    target[rows] = found[output.name][slots]

        views = live.entry.views
        tasks = [
            (p, size, view) for p in packs for size in live.sizes for view in views
        ]
        for _ in self._lanes.map(run, tasks):
            pass
        for (output, _), target in values.items():
            if output.kind == "index":
                target[...] = looked.prepared.points_of(live, output)
        return values


def pack_rows(slots: Indices, wanted: Indices) -> list[Pack]:
    """Returns forwards that together hold every wanted row once, in its own slot.

    Args:
        slots: (n,) slot of each row.
        wanted: which rows.
    """
    packs: list[list[int]] = []
    taken: dict[int, int] = defaultdict(int)
    for row in wanted.tolist():
        slot = int(slots[row])
        if taken[slot] == len(packs):
            packs.append([])
        packs[taken[slot]].append(row)
        taken[slot] += 1
    rows = [np.array(pack, np.intp) for pack in packs]
    return [(pack, slots[pack]) for pack in rows]


def _encode(
    output: StoredOutput,
    values: np.ndarray,
    stored: Mapping[str, np.ndarray],
    cells: Bools | None,
) -> tuple[Encoded, npt.NDArray[np.float32]]:
    """Returns rows as the bank should have them, and as float32, missing ones NaN."""
    encoding = output.encoding
    encoded = encoding.encode_again(values, stored, missing_cells=cells)
    if output.kind == "index":
        return encoded, encoding.decode(encoded.arrays)
    exact = np.array(to_float32(values, encoding.dtype))
    if cells is not None:
        exact[cells] = np.nan
    return encoded, exact


def _bools(values: Iterable[bool]) -> Bools:
    return np.fromiter(values, np.bool_)


def _shown(codes: Codes) -> str:
    return ", ".join(sorted(codes)) or "valid"
