"""A job measured on samples, added up: every output and preset, and the whole."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from manifests.bank import PassEntry
from manifests.errors import ManifestError
from manifests.teacher import OutputConfig, TeacherConfig
from pipeline.bank.encoding import non_finite_rows, to_float32
from pipeline.bank.layout import level_path
from pipeline.cost import Amounts, MachineSeconds
from pipeline.errors import PipelineError
from pipeline.live import LivePass, StoredOutput
from pipeline.plan import Plan
from pipeline.sample_plan.live_rows import Bools, LiveRows, OutputView, RowsOf
from pipeline.sample_plan.presets import (
    Figures,
    Loss,
    Values,
    candidates,
    label_of,
    measure,
)
from pipeline.sample_plan.records import Records, Told, rows_by_block, weigh_records
from pipeline.work_items import num_threads

NO_CONFIG = OutputConfig()
_MAX_VECTORS = 4096


@dataclass(frozen=True)
class PresetPlan:
    """One output in one encoding: a row is one view of a sample.

    Attributes:
        name: of the encoding, such as ``lossless zstd``.
        is_own: whether it is the job's choice.
        job_bytes: of all blocks and views that are to do.
        row_bytes: of one row, checksums and indexes included.
        value_bytes: of one value of the teacher's.
        spread: standard error of ``row_bytes`` over it; None where unknown.
        refused: sampled rows and views that it cannot store.
        loss: against the teacher's values, standardised; None for an index.
        encode: seconds a row, one thread.
        decode: seconds a row, one thread.
    """

    name: str
    is_own: bool
    job_bytes: float
    row_bytes: float
    value_bytes: float
    spread: float | None
    refused: int
    loss: Loss | None
    encode: float
    decode: float


@dataclass(frozen=True)
class OutputPlan:
    """One output of a pass in every encoding that fits it.

    Attributes:
        path: ``<teacher>/<group>/<size>/<output>``.
        shape: of a row.
        dtype: the teacher's.
        views: that are to do.
        presets: the job's choice among them.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    views: int
    presets: tuple[PresetPlan, ...]

    @property
    def own(self) -> PresetPlan:
        """The job's choice."""
        return next(one for one in self.presets if one.is_own)


@dataclass(frozen=True)
class SamplePlan:
    """What a job costs, measured on samples.

    Attributes:
        rows: samples that were looked at.
        invalid: those that a pass cannot use, by reason.
        device: kind of this machine's.
        cores: of this machine that were used.
        outputs: of the passes that lack a block, or of all where none does.
        amounts: of the whole job.
        records: of all that is not features.
        spread: standard error of the features' bytes over them; None where unknown.
    """

    rows: int
    invalid: Mapping[str, int]
    device: str
    cores: int
    outputs: tuple[OutputPlan, ...]
    amounts: Amounts
    records: Records
    spread: float | None

    @property
    def sample_bytes(self) -> float:
        """Bytes of one view of a sample in all outputs, as a student reads them."""
        return sum(output.own.row_bytes for output in self.outputs)


def measure_plan(plan: Plan, count: int, rows_of: RowsOf) -> SamplePlan:
    """Returns what a job costs, measured on samples of it; writes nothing.

    Args:
        plan: of the job; its weights are there.
        count: samples to look at.
        rows_of: the index rows of a shard.

    Raises:
        TeachOnceError: a teacher or a shard cannot be used, too many samples for the
            memory, or none that a pass can use.
    """
    if count < 1:
        raise ManifestError(f"--sample must be at least 1, got {count}")
    live_rows = LiveRows(plan, count, rows_of)
    measured = _Measured(plan, live_rows)
    with tqdm(
        total=measured.num_steps(),
        desc="sample",
        unit="step",
        disable=None,
        leave=False,
    ) as bar:
        for live in live_rows.passes:
            measured.add(live, bar)
    told = Told(live_rows.facts, measured.vectors, live_rows.device_kind)
    records = weigh_records(plan, told, rows_of)
    return SamplePlan(
        rows=live_rows.num_rows,
        invalid={**live_rows.invalid, **measured.refused},
        device=live_rows.device_kind,
        cores=num_threads(plan.job.engine),
        outputs=tuple(measured.outputs),
        amounts=measured.amounts(records),
        records=records,
        spread=measured.spread(),
    )


class _Measured:
    """Passes as they are measured, one after the other."""

    def __init__(self, plan: Plan, rows: LiveRows) -> None:
        self._plan, self._rows = plan, rows
        self._used = rows_by_block(plan.record)
        self.outputs: list[OutputPlan] = []
        self.vectors: dict[str, np.ndarray] = {}
        self.refused: dict[str, int] = {}
        self._encode = 0.0

    def num_steps(self) -> int:
        """Returns the forwards and encodings there will be."""
        steps = 0
        for live in self._rows.passes:
            views = len(live.entry.views)
            batches = math.ceil(self._rows.num_rows / live.entry.batch)
            steps += len(live.sizes) * (1 + views * batches)
            for output in live.outputs:
                config = _config_of(live.entry, output)
                steps += views * len(candidates(output.encoding, config))
        return steps

    def blocks(self, pass_id: str) -> list[int]:
        """Returns the used rows of each block to do; of all where there is none."""
        missing = self._plan.missing_blocks().get(pass_id)
        return [self._used[block] for block in missing or self._used]

    def add(self, live: LivePass, bar: tqdm[NoReturn]) -> None:
        """Runs a teacher on the sample and measures its outputs."""
        values = self._rows.outputs(live, bar)
        usable = self._usable(live, values)
        whole = self._plan.record.pass_by_id(live.entry.id)
        used = self.blocks(whole.id)
        for output in live.outputs:
            config = _config_of(live.entry, output)
            found: dict[str, list[Figures]] = {}
            for view in live.entry.views:
                cells = self._rows.missing_cells(live, output, view)
                given = Values.of(values[output, view], usable, cells, output.encoding)
                if view == live.entry.first_view:
                    path = f"{level_path(whole, output.size)}/{output.name}"
                    self._keep_vectors(path, output, given)
                for encoding in candidates(output.encoding, config):
                    figures = measure(encoding, given, self._plan.record.block_rows)
                    found.setdefault(label_of(encoding), []).append(figures)
                    bar.update()
            own = label_of(output.encoding)
            views = len(whole.views)
            presets = tuple(
                _preset(name, name == own, figures, output, used, views)
                for name, figures in found.items()
            )
            entry = next(
                o
                for o in whole.outputs
                if (o.size, o.name) == (output.size, output.name)
            )
            self.outputs.append(
                OutputPlan(path, output.shape, entry.dtype, views, presets)
            )
            todo = sum(used) if self._plan.missing_blocks().get(whole.id) else 0
            self._encode += self.outputs[-1].own.encode * views * todo

    def _usable(self, live: LivePass, values: Mapping[OutputView, np.ndarray]) -> Bools:
        """Returns (rows,) which rows every output of a pass can store."""
        usable = self._rows.usable(live)
        for (output, view), array in values.items():
            cells = self._rows.missing_cells(live, output, view)
            encoded = output.encoding.encode(array, usable, missing_cells=cells)
            bad = np.zeros(len(array), np.bool_)
            bad[list(encoded.refused)] = True
            if output.encoding.holds_features:
                bad |= usable & non_finite_rows(array, output.encoding.dtype)
            for row in np.flatnonzero(bad & usable).tolist():
                reason = encoded.refused.get(row, "non_finite")
                code = f"{live.entry.id}/{output.name}:{reason}"
                self.refused[code] = self.refused.get(code, 0) + 1
            usable &= ~bad
        if not usable.any():
            why = dict(Counter({**self._rows.invalid, **self.refused}))
            raise PipelineError(
                f"none of {len(usable)} sampled rows can be used by pass "
                f"{live.entry.id} ({why}); look at a few of them, or sample more"
            )
        return usable

    def _keep_vectors(self, path: str, output: StoredOutput, values: Values) -> None:
        """Keeps some vectors of an output, of which statistics are made."""
        if not output.encoding.holds_features:
            return
        kept: list[np.ndarray] = []
        for rows in values.pieces():
            exact = to_float32(values.array[rows], output.encoding.dtype)
            kept.append(values.kept(exact, rows)[:_MAX_VECTORS])
            if sum(map(len, kept)) >= _MAX_VECTORS:
                break
        vectors = np.concatenate(kept)[:_MAX_VECTORS]
        if self._rows.num_rows < sum(self._used.values()):
            # Sums over a whole dataset use every digit, of every channel; those of a
            # few rows of 16 bits, or of zeros, do not, and would compress.
            digits = np.random.default_rng(0).normal(0, 2**-9, vectors.shape)
            vectors = vectors + (digits * vectors.std()).astype(np.float32)
        self.vectors[path] = vectors

    def spread(self) -> float | None:
        """Returns the standard error of all features' bytes over them."""
        own = [output.own for output in self.outputs]
        total = sum(one.job_bytes for one in own)
        if not total or any(one.spread is None for one in own):
            return None
        # One sample gave them all: their errors are taken to go together.
        return sum(one.job_bytes * (one.spread or 0.0) for one in own) / total

    def amounts(self, records: Records) -> Amounts:
        """Returns what the whole job makes."""
        plan, rates = self._plan, self._rows.rates
        missing = plan.missing_blocks()
        looked = {
            block
            for live in self._rows.passes
            for block in missing.get(live.entry.id, ())
        }
        rows = sum(self._used[block] for block in looked)
        forward, views = 0.0, 1
        feature_bytes = objects = 0.0
        for live in self._rows.passes:
            entry = plan.record.pass_by_id(live.entry.id)
            todo = [self._used[block] for block in missing.get(entry.id, ())]
            batches = sum(math.ceil(used / entry.batch) for used in todo)
            forward += batches * len(entry.views) * rates.forward[entry.id]
            views = max(views, len(entry.views))
            if todo:
                arrays = sum(len(output.arrays) for output in entry.outputs)
                objects += len(todo) * arrays * len(entry.views)
        is_todo = {
            f"{level_path(entry, output.size)}/{output.name}"
            for entry in map(plan.record.pass_by_id, plan.passes_to_do)
            for output in entry.outputs
        }
        for output in self.outputs:
            if output.path in is_todo:
                feature_bytes += output.own.job_bytes
        return Amounts(
            seconds=MachineSeconds(
                read=rows * rates.read,
                decode=rows * rates.decode,
                prepare=rows * views * rates.prepare,
                forward=forward,
                encode=self._encode / num_threads(plan.job.engine),
                is_accelerated=self._rows.device.startswith("cuda"),
            ),
            views=views,
            feature_bytes=feature_bytes / views,
            record_bytes=sum(records.bytes.values()),
            feature_objects=objects / views,
            other_objects=records.files,
        )


def _config_of(entry: PassEntry, output: StoredOutput) -> OutputConfig:
    if entry.holds_inputs:
        return NO_CONFIG
    config = TeacherConfig.model_validate(entry.request)
    return config.outputs.get(output.name, NO_CONFIG)


def _mean(numbers: Sequence[float | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return float(np.mean(known)) if known else None


def _preset(
    name: str,
    is_own: bool,
    figures: Sequence[Figures],
    output: StoredOutput,
    used: Sequence[int],
    views: int,
) -> PresetPlan:
    """Returns what an encoding costs all blocks and views of an output.

    Args:
        name: of the encoding.
        is_own: whether it is the job's.
        figures: of the first view, and of one that stands for all others.
        output: that is stored.
        used: rows of each block.
        views: that are to do.
    """
    first, other = figures[0], figures[-1]
    total = sum(
        count * (first.block_bytes(rows) + (views - 1) * other.block_bytes(rows))
        for rows, count in Counter(used).items()
    )
    row = total / (sum(used) * views)
    losses = [one.loss for one in figures if one.loss is not None]
    loss = None
    if losses:
        loss = Loss(
            float(np.mean([one.one_minus_cosine for one in losses])),
            max(one.worst_channel for one in losses),
            _mean([one.divergence for one in losses]),
        )
    spreads = [one.spread for one in figures if one.spread is not None]
    return PresetPlan(
        name=name,
        is_own=is_own,
        job_bytes=total,
        row_bytes=row,
        value_bytes=row / math.prod(output.shape),
        spread=max(spreads) if spreads else None,
        refused=sum(one.refused for one in figures),
        loss=loss,
        encode=float(np.mean([one.encode for one in figures])),
        decode=float(np.mean([one.decode for one in figures])),
    )
