"""Recheck, the work: rows of a bank through the live teachers again.

Rows of any blocks share a forward, each in the slot of the batch that it had: a forward
is a full batch in any case. Few models let one row's bits depend on the others; a row
that is near but not identical, where it should be, is run once more in the batch that
it was in. What near means is in ``recheck``, which teachers may run in
``recheck_teachers``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from manifests.bank import BankRecord, Commit, PassEntry
from manifests.errors import BankError, StorageError
from manifests.job import EngineConfig, Job
from manifests.loading import canonical_json
from manifests.storage import Store
from pipeline.bank.blocks import read_block
from pipeline.bank.commits import read_commit
from pipeline.bank.encoding import (
    NON_FINITE,
    Encoded,
    mask_cells,
    non_finite_rows,
    row_numbers,
    to_float32,
)
from pipeline.bank.layout import level_path
from pipeline.bank.open import Bank
from pipeline.bank.record import open_record, view_policy_of
from pipeline.bank.row_index import num_index_parts, read_index_part
from pipeline.bank.shard_copies import ShardCopies
from pipeline.decoding import SampleSchema, decode_sample
from pipeline.errors import PipelineError
from pipeline.estimate import block_bytes, lane_bytes
from pipeline.finalise import NOT_COMPUTED, RETIRED
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
from pipeline.recheck import (
    ROW_BY_ROW,
    Moments,
    Nearness,
    OutputVerdict,
    Place,
    Recheck,
    choose_rows,
    compare,
)
from pipeline.recheck_teachers import agreed_record, passes_of
from pipeline.resolve import installed_versions
from pipeline.samples.errors import ShardError
from pipeline.work_items import num_lanes, num_threads

ROUND_BYTES = 2**29
"""Memory of the rows that are looked at together: inputs, outputs and both again."""

Rows = npt.NDArray[np.int64]
OutputView = tuple[StoredOutput, int]
Codes = frozenset[str]
Pack = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]
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
    valid, invalid = _candidates(store, record, passes)
    identity = [shard.headers_sha256 for shard in record.shards]
    chosen = choose_rows(valid, count, seed, identity)
    tried = choose_rows(invalid, count, seed, identity)
    agreed = agreed_record(record, passes, job)
    work = _RecheckWork(store, agreed, [one.id for one in passes], engine)
    work.result.seed = seed
    work.result.rows, work.result.invalid_rows = len(chosen), len(tried)
    work.run(np.union1d(chosen, tried), shards)
    return work.result


def _candidates(
    store: Store, record: BankRecord, passes: Sequence[PassEntry]
) -> tuple[Rows, Rows]:
    """Returns rows that are valid for some pass, and those that some pass refused."""
    valid, invalid = [], []
    gone = pa.array([RETIRED, NOT_COMPUTED])
    for part in range(num_index_parts(record)):
        table: pa.Table = read_index_part(store, part)
        rows = table["row"].to_numpy()
        is_valid, is_refused = np.zeros((2, len(rows)), np.bool_)
        for entry in passes:
            held = table[f"valid.{entry.id}"].to_numpy()
            left_out = pc.is_in(table[f"reason.{entry.id}"], value_set=gone).to_numpy()
            is_valid |= held
            is_refused |= ~held & ~left_out
        valid.append(rows[is_valid])
        invalid.append(rows[is_refused])
    return np.concatenate(valid), np.concatenate(invalid)


@dataclass
class _Looked:
    """Rows of one round: prepared for passes, with what decoding said of each."""

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
        engine: EngineConfig | None,
    ) -> None:
        config = engine or EngineConfig()
        self._store, self._record = store, record
        self._bank = Bank(store, record)
        self._device = pick_device(config.device)
        self._passes = load_passes(record, pass_ids, self._device)
        self.result = Recheck(0, device_kind(self._device))
        names = {name for live in self._passes.values() for name in live.entry.inputs}
        inputs = {name: one for name, one in record.inputs.items() if name in names}
        self._schema = SampleSchema.of(inputs, {})
        self._policy = view_policy_of(record)
        self._keys = self._bank.keys()
        self._threads = num_threads(config)
        self._lanes = num_lanes(self._device, config, lane_bytes(record, pass_ids))
        self._row_bytes = block_bytes(record, pass_ids) // record.block_rows
        self._commits: dict[tuple[str, int], Commit | None] = {}
        self._moments: dict[str, Moments | None] = {}
        self._verdicts: dict[str, OutputVerdict] = {}

    def run(self, rows: Rows, shards: Sequence[str] | None) -> None:
        """Looks at rows, ascending, and fills the result."""
        copies = ShardCopies(self._bank, shards, rows, "--shards")
        for live in self._passes.values():
            self._check_preprocess(live)
        size = max(1, ROUND_BYTES // max(1, 2 * self._row_bytes))
        live_threads = max(1, self._threads // self._lanes)
        with (
            ThreadPoolExecutor(self._threads, "teachonce-decode") as self._decoders,
            ThreadPoolExecutor(
                self._lanes, "teachonce-lane", set_lane_threads, (live_threads,)
            ) as self._forwards,
            tqdm(
                total=len(rows) * len(self._passes),
                desc="recheck",
                unit="row",
                disable=None,
            ) as bar,
        ):
            for start in range(0, len(rows), size):
                passes = list(self._passes.values())
                looked = self._look(rows[start : start + size], passes, copies)
                for live in passes:
                    self._judge(live, looked, copies)
                    bar.update(len(looked.rows))
        self.result.outputs = list(self._verdicts.values())

    def _check_preprocess(self, live: LivePass) -> None:
        for size, specs in live.specs.items():
            recorded = live.entry.provenance["preprocess"].get(size, {})
            for name, spec in specs.items():
                if canonical_json(recorded.get(name)) != canonical_json(spec.to_json()):
                    self.result.problems.append(
                        f"pass {live.entry.id}: the bank says that {name} is taken as "
                        f"{recorded.get(name)} at {size}, its teacher takes it as "
                        f"{spec.to_json()}"
                    )

    # From rows to prepared inputs.

    def _look(
        self, rows: Rows, passes: Sequence[LivePass], copies: ShardCopies
    ) -> _Looked:
        """Reads, decodes and prepares rows, a block at a time on each thread."""
        prepared = PreparedRows(passes, len(rows))
        reasons: list[Mapping[str, str]] = [{}] * len(rows)

        def decode(block: int) -> None:
            shard = copies.shard_of(block)
            places = np.flatnonzero(rows // self._record.block_rows == block)
            first = copies.first_row(block) - block * self._record.block_rows
            refused = self._bank.sample_table.spans(shard).refused
            reader = copies.open(block, rows[places] + first, self._schema.wanted)
            try:
                for place in places.tolist():
                    row = int(rows[place])
                    sample = reader.read(row + first)
                    if sample.key != self._keys[row]:
                        raise ShardError(
                            f"key must be the bank's {str(self._keys[row])!r}, got "
                            f"{sample.key!r} (row {row}, {copies.url_of(block)}); give "
                            "the shards that the bank was made from"
                        )
                    decoded = decode_sample(
                        sample, self._schema, refused.get(row + first)
                    )
                    prepared.put(place, shard.name, sample.key, decoded, self._policy)
                    reasons[place] = decoded.facts.reasons
            finally:
                reader.close()

        blocks = np.unique(rows // self._record.block_rows).tolist()
        for _ in self._decoders.map(decode, blocks):
            pass
        return _Looked(rows, prepared, reasons)

    # From prepared inputs to verdicts.

    def _judge(self, live: LivePass, looked: _Looked, copies: ShardCopies) -> None:
        """Adds to the result what one pass says of the rows of a round."""
        then = {
            index: codes
            for index, row in enumerate(looked.rows.tolist())
            if (codes := self._codes_then(live.entry, row)) is not None
        }
        now = {index: looked.codes(live.entry, index) for index in then}
        wanted = np.array([i for i, codes in now.items() if not codes], np.intp)
        refused, nears = self._measure(
            live, looked, wanted, _pack(self._slots(live, looked.rows), wanted)
        )
        for index, codes in refused.items():
            now[index] |= codes
        for index, codes in then.items():
            if now[index] != codes:
                self._tell(live, int(looked.rows[index]), codes, now[index])
        is_valid = np.array(
            [not then[i] and not now[i] for i in wanted.tolist()], np.bool_
        )
        compared = looked.rows[wanted]
        bits = np.array(
            [self._is_same_kind(live.entry, row) for row in compared.tolist()],
            np.bool_,
        )
        self._measure_in_place(
            live, looked.rows[wanted], nears, bits & is_valid, copies
        )
        for (output, view), (near, is_read) in nears.items():
            path = self._path(live, output)
            verdict = self._verdicts.setdefault(path, OutputVerdict(path))
            chosen = is_valid & is_read
            places = [self._place(row, view) for row in compared[chosen].tolist()]
            exact = output.encoding.preset in ROW_BY_ROW
            verdict.add(near.take(chosen), places, (bits & exact)[chosen])

    def _measure(
        self,
        live: LivePass,
        looked: _Looked,
        wanted: npt.NDArray[np.intp],
        packs: Sequence[Pack],
    ) -> tuple[dict[int, Codes], dict[OutputView, tuple[Nearness, np.ndarray]]]:
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
        values = self._forward(live, looked, packs)
        refused: dict[int, Codes] = {}
        nears = {}
        for (output, view), all_values in values.items():
            encoding, taken = output.encoding, all_values[wanted]
            usable = np.ones(len(wanted), np.bool_)
            cells = looked.prepared.missing_cells(live, output, view, wanted)
            if encoding.preset in ROW_BY_ROW:
                encoded = encoding.encode(taken, usable)
            else:
                bad = row_numbers(non_finite_rows(taken, encoding.dtype))
                encoded = Encoded({}, dict.fromkeys(bad, NON_FINITE))
            if output.kind == "index":
                exact = encoding.decode(encoded.arrays)
            else:
                exact = to_float32(taken, encoding.dtype).copy()
            if cells is not None:
                exact[cells] = np.nan
                if encoded.arrays:
                    encoded = mask_cells(encoding, encoded, cells, usable)
            for index, reason in encoded.refused.items():
                row = int(wanted[index])
                code = f"{output.name}:{reason}"
                refused[row] = refused.get(row, frozenset()) | {code}
            stored, is_read = self._stored(live, output, view, looked.rows[wanted])
            moments = self._moments_of(self._path(live, output), output)
            near = compare(encoding, stored, encoded.arrays or None, exact, moments)
            nears[output, view] = near, is_read
        return refused, nears

    def _measure_in_place(
        self,
        live: LivePass,
        rows: Rows,
        nears: Mapping[OutputView, tuple[Nearness, np.ndarray]],
        bits: npt.NDArray[np.bool_],
        copies: ShardCopies,
    ) -> None:
        """Measures rows anew that are near, not identical, and should be.

        They are run in the very batch that they were in.
        """
        doubted = np.zeros(len(rows), np.bool_)
        for (output, _), (near, _) in nears.items():
            if output.encoding.preset in ROW_BY_ROW:
                is_near = near.holds(np.zeros(len(rows), np.bool_))
                doubted |= bits & is_near & ~near.identical
        size, batch = self._record.block_rows, live.entry.batch
        starts = rows - rows % size % batch
        for start in np.unique(starts[doubted]).tolist():
            block = start // size
            shard = copies.shard_of(block)
            held = shard.samples - copies.first_row(block) - start % size
            count = min(batch, size - start % size, held)
            looked = self._look(np.arange(start, start + count), [live], copies)
            chosen = np.flatnonzero(doubted & (starts == start))
            sound = np.array(
                [i for i in range(count) if not looked.codes(live.entry, i)], np.intp
            )
            _, again = self._measure(
                live, looked, rows[chosen] - start, [(sound, sound)]
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

        tasks = [
            (pack, size, view)
            for pack in packs
            for size in live.sizes
            for view in live.entry.views
        ]
        for _ in self._forwards.map(run, tasks):
            pass
        for (output, _), target in values.items():
            if output.kind == "index":
                target[...] = looked.prepared.points_of(live, output)
        return values

    # What the bank says.

    def _stored(
        self, live: LivePass, output: StoredOutput, view: int, rows: Rows
    ) -> tuple[dict[str, np.ndarray], npt.NDArray[np.bool_]]:
        """Returns rows as stored, by suffix, and which of them could be read."""
        suffixes = output.encoding.suffixes
        stored = {
            suffix: np.zeros((len(rows), *spec.row_shape), spec.numpy_dtype)
            for suffix, spec in zip(suffixes, output.arrays, strict=True)
        }
        is_read = np.ones(len(rows), np.bool_)
        blocks = rows // self._record.block_rows
        for block in np.unique(blocks).tolist():
            here = blocks == block
            for suffix in suffixes:
                array = self._bank.array(self._path(live, output), suffix)
                try:
                    held = read_block(array, block, view)
                except BankError as error:
                    is_read &= ~here
                    line = f"pass {live.entry.id}: {error}"
                    if line not in self.result.problems:
                        self.result.problems.append(line)
                else:
                    stored[suffix][here] = held[rows[here] % self._record.block_rows]
        return stored, is_read

    def _moments_of(self, path: str, output: StoredOutput) -> Moments | None:
        if path not in self._moments:
            has_none = output.encoding.preset in ("topk", "index")
            self._moments[path] = (
                None if has_none else Moments.of(self._bank.statistics(path))
            )
        return self._moments[path]

    def _commit(self, entry: PassEntry, row: int) -> Commit | None:
        key = entry.id, row // self._record.block_rows
        if key not in self._commits:
            try:
                self._commits[key] = read_commit(self._store, *key)
            except StorageError:
                self._commits[key] = None
        return self._commits[key]

    def _codes_then(self, entry: PassEntry, row: int) -> Codes | None:
        """Returns why a row is invalid in the bank; None where it was not computed."""
        commit = self._commit(entry, row)
        if commit is None:
            return None
        offset = row % self._record.block_rows
        found = commit.content.invalid.items()
        return frozenset(code for code, rows in found if offset in rows)

    def _is_same_kind(self, entry: PassEntry, row: int) -> bool:
        """Whether a row's bits must be the same here and now; notes why not."""
        commit = self._commit(entry, row)
        assert commit is not None
        then, now = entry.provenance.get("versions", {}), installed_versions()
        why = [
            f"{name} {then.get(name, 'none')} then, {now.get(name, 'none')} now"
            for name in sorted({*then, *now})
            if then.get(name) != now.get(name)
        ]
        if commit.device != self.result.device:
            why.append(f"made on {commit.device or 'a device that it does not name'}")
        if why:
            self.result.notes.setdefault(entry.id, ", ".join(why))
        return not why

    # Names.

    def _slots(self, live: LivePass, rows: Rows) -> npt.NDArray[np.intp]:
        """Returns the slot of its batch that each row had."""
        slots: npt.NDArray[np.intp] = (
            rows % self._record.block_rows % live.entry.batch
        ).astype(np.intp)
        return slots

    def _path(self, live: LivePass, output: StoredOutput) -> str:
        return f"{level_path(live.entry, output.size)}/{output.name}"

    def _place(self, row: int, view: int) -> Place:
        block = row // self._record.block_rows
        name = next(s.name for s in self._record.shards if block in s.block_numbers)
        return Place(row, view, name, str(self._keys[row]))

    def _tell(self, live: LivePass, row: int, then: Codes, now: Codes) -> None:
        place = self._place(row, 0)
        self.result.problems.append(
            f"row {row} ({place.key!r} of {place.shard}), pass {live.entry.id}: "
            f"{_shown(then)} in the bank, {_shown(now)} now"
        )


def _shown(codes: Codes) -> str:
    return ", ".join(sorted(codes)) or "valid"


def _pack(slots: npt.NDArray[np.intp], wanted: npt.NDArray[np.intp]) -> list[Pack]:
    """Returns forwards that together hold every wanted row once, in its own slot.

    Args:
        slots: (n,) slot of each row.
        wanted: which rows.
    """
    packs: list[list[int]] = []
    held: dict[int, int] = defaultdict(int)
    for row in wanted.tolist():
        number = held[int(slots[row])]
        held[int(slots[row])] += 1
        if number == len(packs):
            packs.append([])
        packs[number].append(row)
    rows = [np.array(pack, np.intp) for pack in packs]
    return [(pack, slots[pack]) for pack in rows]
