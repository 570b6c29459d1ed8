"""Rows as teachers take them: prepared once for all passes, handed out as batches.

What a block of the bank and a row that is looked at again have in common: which inputs
are prepared in which views, that a row without its input is zeros in its slot, that a
batch is always full, and which cells of an output show nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.decoding import DecodedSample
from pipeline.live import LivePass, Prepared, PreparedKey, StoredOutput
from pipeline.samples.decoded import Decoded
from pipeline.samples.points import NO_POINT, Sweep
from pipeline.samples.views import View, ViewPolicy, draw_view
from teachers.inputs.points import PointsSpec

Take = Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
Rows = slice | npt.NDArray[np.intp]


class PreparedRows:
    """Inputs of some rows in every view that some passes look at.

    Passes whose specs have one geometry share their rows. Rows that are never given
    stay zero. `put` may be called from any thread, once a row.
    """

    def __init__(
        self, passes: Sequence[LivePass], num_rows: int, take: Take = np.zeros
    ) -> None:
        """Makes room for ``num_rows`` rows.

        Args:
            passes: that will look at them; those without a teacher take nothing.
            num_rows: how many.
            take: gives an array of a shape and type, whatever it holds.
        """
        self._needs: dict[Prepared, set[int]] = {}
        for live in passes:
            for _, one in live.prepared():
                held = next((p for p in self._needs if p.key == one.key), one)
                self._needs.setdefault(held, set()).update(live.entry.views)
        self._arrays: dict[tuple[PreparedKey, int], np.ndarray] = {}
        for one, views in self._needs.items():
            for view in views:
                array = take((num_rows, *one.spec.row_shape), one.spec.row_dtype)
                # A row that is missing keeps its slot, which must not hold another's
                # pixels.
                array.fill(0)
                self._arrays[one.key, view] = array
        # Which points of its sweep a row was given, where an output speaks of points.
        self._points_given = {
            one.key: np.full((num_rows, one.spec.num_points), NO_POINT, np.uint32)
            for live in passes
            if any(output.kind == "index" for output in live.outputs)
            for _, one in live.prepared()
            if isinstance(one.spec, PointsSpec)
        }

    def put(
        self,
        row: int,
        shard: str,
        key: str,
        decoded: DecodedSample,
        policy: ViewPolicy,
    ) -> None:
        """Prepares one row's inputs, those that are sound, in every view.

        Args:
            row: where it goes.
            shard: identity of its shard.
            key: of the sample.
            decoded: the sample.
            policy: how the bank draws views.
        """
        drawn: dict[int, View] = {
            view: draw_view(policy, shard, key, view, decoded.facts.sizes)
            for view in sorted({view for _, view in self._arrays})
        }
        moved: dict[tuple[str, int], Decoded] = {}
        for one, wanted in self._needs.items():
            value = decoded.values.get(one.input)
            if value is None:
                continue
            if isinstance(value, Sweep) and one.key in self._points_given:
                assert isinstance(one.spec, PointsSpec)
                self._points_given[one.key][row] = one.spec.stored_rows(value)
            for number in wanted:
                view = drawn[number]
                seen = value
                if isinstance(value, Sweep):
                    seen = moved.setdefault((one.input, number), value.in_view(view))
                self._arrays[one.key, number][row] = one.spec.prepare(
                    seen, view, one.input
                )

    def batch(
        self,
        live: LivePass,
        size: str,
        view: int,
        rows: Rows,
        slots: Rows | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns a full batch of a pass, by input name: (batch, *row_shape).

        The kernel that a row meets must not depend on its block: what has no row is
        zeros.

        Args:
            live: the pass.
            size: name of its size.
            view: number of the view.
            rows: which rows.
            slots: their places in the batch; None: one after the other from its start.
        """
        batch = live.entry.batch
        found = {}
        for of_size, one in live.prepared():
            if of_size != size:
                continue
            array = self._arrays[one.key, view]
            given = array[rows]
            if slots is not None or len(given) < batch:
                full = np.zeros((batch, *array.shape[1:]), array.dtype)
                full[slice(len(given)) if slots is None else slots] = given
                given = full
            found[one.input] = given
        return found

    def missing_cells(
        self, live: LivePass, output: StoredOutput, view: int, rows: Rows = slice(None)
    ) -> npt.NDArray[np.bool_] | None:
        """Returns which cells of an output lie on padding; None where none do.

        Args:
            live: the pass.
            output: one of its outputs.
            view: number of the view.
            rows: which rows.

        Returns:
            (len(rows), y, x) or (len(rows), t, y, x).
        """
        for size, one in live.prepared():
            if size != output.size or output.kind not in ("grid", "frames"):
                continue
            prepared = self._arrays[one.key, view][rows]
            missing = one.spec.missing_cells(prepared, output.shape, output.pool)
            if missing is not None:
                return missing
        return None

    def points_of(self, live: LivePass, output: StoredOutput) -> np.ndarray:
        """Returns which points of its sweep each row was given, (rows, P)."""
        for size, one in live.prepared():
            if size == output.size and one.key in self._points_given:
                return self._points_given[one.key]
        raise AssertionError("an output of points has a sweep")

    def copies_of(self, live: LivePass) -> dict[tuple[StoredOutput, int], np.ndarray]:
        """Returns prepared rows as the output of a pass that copies its input."""
        ((_, one),) = live.prepared()
        (output,) = live.outputs
        return {
            (output, view): self._arrays[one.key, view] for view in live.entry.views
        }

    def release(self, give: Callable[[np.ndarray], None]) -> None:
        """Hands every array to ``give``; the rows are gone."""
        for array in self._arrays.values():
            give(array)
        self._arrays = {}
