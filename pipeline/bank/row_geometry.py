"""Calibration, times and views of a bank's rows, and the point table of a row's sweep.

For whoever has a bank and the sweeps: the bank holds what pairs points with the cells
of its grids, and the table is made from it when it is wanted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from manifests.errors import BankError
from pipeline.bank import layout
from pipeline.bank.open import Bank
from pipeline.bank.row_arrays import RowArray
from pipeline.samples.calibration import Calibration
from pipeline.samples.points import Sweep
from pipeline.samples.projection import Camera, PointTable, ZBuffer, project_sweep
from pipeline.samples.views import View

Size = tuple[float, float]


class RowGeometry:
    """What a bank knows of the geometry of its rows; reads each array once."""

    def __init__(self, bank: Bank) -> None:
        """Reads nothing yet.

        Args:
            bank: an open bank that was finalised.
        """
        self._bank = bank
        self._held: dict[str, np.ndarray] = {}
        self._stored = {array.path for array in layout.row_arrays(bank.record)}
        inputs = bank.record.inputs
        self.cameras = tuple(
            name for name, one in inputs.items() if one.config.get("calibration")
        )
        self.images = tuple(
            name for name, one in inputs.items() if one.config["kind"] != "points"
        )
        self.sweeps = tuple(
            name for name, one in inputs.items() if one.config["kind"] == "points"
        )

    def camera(self, row: int, name: str) -> Camera | None:
        """Returns a camera of a row, None where its calibration or image is missing."""
        self._check(row, 0)
        intrinsics, lidar2cam = (
            self._read(array)[row] for array in layout.calibration_arrays(name)
        )
        height, width = map(int, self._read(layout.size_array(name))[row])
        if not (np.isfinite(intrinsics).all() and np.isfinite(lidar2cam).all()):
            return None
        if not (height and width):
            return None
        calibration = Calibration(intrinsics, lidar2cam)
        return Camera(calibration, (height, width), self.time(row, name))

    def time(self, row: int, name: str) -> float:
        """Returns when an input of a row was taken, seconds; NaN where unknown."""
        array = layout.time_array(name)
        return float(self._read(array)[row]) if array.path in self._stored else math.nan

    def view(self, row: int, number: int) -> View:
        """Returns a view of a row as the bank holds it, with the boxes that it has."""
        self._check(row, number)
        boxes = {}
        for name in self.images:
            x0, y0, x1, y1 = map(float, self._read(layout.box_array(name))[row, number])
            if math.isfinite(x0 + y0 + x1 + y1):
                boxes[name] = (x0, y0, x1, y1)
        flip = bool(self._read(layout.FLIP)[row, number])
        yaw, scale = 0.0, 1.0
        if self.sweeps:
            yaw = float(self._read(layout.YAW)[row, number])
            scale = float(self._read(layout.SCALE)[row, number])
        return View(number, flip, yaw, scale, boxes)

    def point_table(
        self,
        row: int,
        sweep: Sweep,
        view: int = 0,
        *,
        sizes: Mapping[str, Size] | None = None,
        sweep_input: str | None = None,
        min_depth_m: float = 0.0,
        occlusion: ZBuffer | None = None,
    ) -> PointTable:
        """Returns where the points of a row's sweep fall in a view of its cameras.

        Args:
            row: of the bank.
            sweep: as it was decoded, not moved by a view.
            view: number of the view.
            sizes: (height, width) of the cameras that are wanted, such as an input size
                or a grid; omitted: all calibrated cameras, each box as it is in upright
                pixels.
            sweep_input: which input the sweep is, for its time; omitted: the only one.
            min_depth_m: leaves out what is nearer.
            occlusion: how hidden points are told; None: they are not.

        Raises:
            BankError: no such row, view or camera, or several sweeps to choose from.
        """
        self._check(row, view)
        names = self.cameras if sizes is None else tuple(sizes)
        if unknown := [name for name in names if name not in self.cameras]:
            raise BankError(
                f"sizes must be of inputs with calibration "
                f"({', '.join(self.cameras) or 'this bank has none'}), got {unknown[0]}"
            )
        table = project_sweep(
            _xyz(sweep),
            {n: self.camera(row, n) if n in names else None for n in self.cameras},
            time=self._sweep_time(row, sweep_input),
            stored=sweep.stored,
            min_depth_m=min_depth_m,
            occlusion=occlusion,
        )
        drawn = self.view(row, view)
        found = [
            table.in_view(drawn, name, sizes[name] if sizes else None)
            for name in self.cameras
            if name in names and name in drawn.boxes
        ]
        return PointTable.joined(found, self.cameras)

    def _sweep_time(self, row: int, name: str | None) -> float:
        timed = [one for one in self.sweeps if self._is_timed(one)]
        if name is not None and name not in self.sweeps:
            raise BankError(
                f"sweep_input must be one of {', '.join(self.sweeps) or 'none'}, got "
                f"{name}"
            )
        if name is None and len(self.sweeps) > 1 and timed:
            raise BankError(
                f"sweep_input must be given where there are several sweeps with times, "
                f"one of {', '.join(self.sweeps)}"
            )
        if not timed:
            return math.nan
        return self.time(row, name or timed[0])

    def _is_timed(self, name: str) -> bool:
        return layout.time_array(name).path in self._stored

    def _read(self, array: RowArray) -> np.ndarray:
        if array.path not in self._held:
            self._held[array.path] = self._bank.whole_array(array.path)
        return self._held[array.path]

    def _check(self, row: int, view: int) -> None:
        record = self._bank.record
        for what, value, count in (
            ("row", row, record.num_rows),
            ("view", view, record.num_views),
        ):
            if not 0 <= value < count:
                raise BankError(
                    f"{what} must be 0 to {count - 1}, got {value} (bank "
                    f"{self._bank.url})"
                )


def point_table(
    bank: Bank,
    row: int,
    sweep: Sweep,
    view: int = 0,
    *,
    sizes: Mapping[str, Size] | None = None,
    sweep_input: str | None = None,
    min_depth_m: float = 0.0,
    occlusion: ZBuffer | None = None,
) -> PointTable:
    """Returns where the points of a row's sweep fall in a view of its cameras.

    Reads the bank's row arrays anew: for many rows make one `RowGeometry` and ask it.
    Arguments and errors are those of `RowGeometry.point_table`.
    """
    return RowGeometry(bank).point_table(
        row,
        sweep,
        view,
        sizes=sizes,
        sweep_input=sweep_input,
        min_depth_m=min_depth_m,
        occlusion=occlusion,
    )


def _xyz(sweep: Sweep) -> np.ndarray:
    return sweep.points[:, [sweep.columns.index(axis) for axis in ("x", "y", "z")]]
