"""The pictures of a report: rows of a bank as sensors, teachers and students see them.

Owns which pictures stand beside which, and their captions; drawing is ``pictures``,
the page is ``page``. Once the pictures are as large as a page may be, further rows are
left out, and the page says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manifests.bank import is_logits
from pipeline.bank.open import Bank
from teachonce.report import pictures
from teachonce.report.curves import frame_height
from teachonce.report.grids import ShownOutput, read_outputs
from teachonce.report.pictures import Picture
from teachonce.report.shown import FAULTS, ShownRow, choose_rows, read_rows

if TYPE_CHECKING:
    from teachonce.report.student_maps import Prediction, StudentMaps

NUM_ROWS = 6
MAX_BYTES = 4_500_000

_WIDTH, _HIGHEST = 320, 320
_MAP_WIDTH = 240
_DEPTH_STEP_M = 10.0

Ends = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """One picture with its caption.

    Attributes:
        uri: of the picture.
        size_hw: of it, pixels of the page.
        caption: under it.
        alt: what a reader who does not see it is told.
        extent: x and y that a picture from above spans, metres; None for others.
    """

    uri: str
    size_hw: tuple[int, int]
    caption: str
    alt: str
    extent: tuple[Ends, Ends] | None = None


@dataclass(frozen=True)
class Group:
    """Pictures that are to be compared.

    Attributes:
        title: of all.
        figures: in order.
    """

    title: str
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Panel:
    """One row of the bank.

    Attributes:
        row: of the bank.
        key: of the sample.
        shard: that it lies in.
        groups: of its pictures.
        problems: what could not be shown.
    """

    row: int
    key: str
    shard: str
    groups: tuple[Group, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Gallery:
    """All pictures of a report.

    Attributes:
        panels: a row of the bank each.
        far_m: depth of the last colour of points on images; None without any.
        notes: what concerns all rows.
    """

    panels: tuple[Panel, ...] = ()
    far_m: float | None = None
    notes: tuple[str, ...] = ()


def make_gallery(
    bank: Bank,
    runs: Mapping[str, Path],
    rows: Sequence[int] | None,
    shards: Sequence[str] | None,
) -> Gallery:
    """Returns the pictures of some rows; what cannot be shown is said.

    Args:
        bank: that the runs were trained from.
        runs: name to folder.
        rows: to choose from; None for all.
        shards: where the shards lie now; None for where the bank found them.
    """
    try:
        chosen = choose_rows(bank, rows, NUM_ROWS)
        shown = read_rows(bank, chosen, shards)
        outputs = read_outputs(bank, chosen)
    except FAULTS as error:
        return Gallery(notes=(f"No rows can be shown: {error}",))
    if not shown:
        return Gallery(notes=("No row is valid.",))
    students = _map_runs(runs, bank, shown, outputs)
    notes = [f"{one.path}: {why}" for one in outputs for why in one.problems]
    notes += [f"{one.name}: {why}" for one in students for why in one.problems]
    drawing = _Drawing(outputs, students, _farthest(shown))
    panels: list[Panel] = []
    num_bytes = 0
    for row in shown:
        panel = drawing.panel(row)
        num_bytes += sum(len(f.uri) for group in panel.groups for f in group.figures)
        if panels and num_bytes > MAX_BYTES:
            left = len(shown) - len(panels)
            notes.append(f"{left} more rows are left out: the page would be too large.")
            break
        panels.append(panel)
    return Gallery(tuple(panels), drawing.far_m, tuple(notes))


def _map_runs(
    runs: Mapping[str, Path],
    bank: Bank,
    shown: Sequence[ShownRow],
    outputs: Sequence[ShownOutput],
) -> list[StudentMaps]:
    if not runs:
        return []
    from teachonce.report.student_maps import map_run

    return [map_run(name, path, bank, shown, outputs) for name, path in runs.items()]


@dataclass(frozen=True, eq=False)
class _Drawing:
    """Draws rows; all of them in the same colours."""

    outputs: Sequence[ShownOutput]
    students: Sequence[StudentMaps]
    far_m: float | None

    def panel(self, row: ShownRow) -> Panel:
        """Returns all pictures of a row."""
        groups = []
        flat = [one for one in self.outputs if not one.extent]
        for name in row.images:
            on_image = [one for one in flat if one.inputs == (name,)]
            compared = [one for one in on_image if self._is_predicted(one)]
            beside = [one for one in on_image if one not in compared]
            groups.append(self._seen_by(row, name, beside))
            groups += [self._compared(row, one) for one in compared]
        elsewhere = [one for one in flat if not self._is_of_an_image(row, one)]
        groups += [self._compared(row, one) for one in elsewhere]
        groups += [self._tokens(row)]
        groups += [self._above(row, one) for one in self.outputs if one.extent]
        with_map = {name for one in self.outputs if one.extent for name in one.inputs}
        groups += [
            _sweep_alone(row, name) for name in row.sweeps if name not in with_map
        ]
        kept = tuple(group for group in groups if group.figures)
        return Panel(row.row, row.key, row.shard, kept, tuple(row.problems))

    def _is_predicted(self, output: ShownOutput) -> bool:
        return any(output.path in student.predictions for student in self.students)

    def _is_of_an_image(self, row: ShownRow, output: ShownOutput) -> bool:
        return len(output.inputs) == 1 and output.inputs[0] in row.images

    def _seen_by(
        self, row: ShownRow, name: str, beside: Sequence[ShownOutput]
    ) -> Group:
        """Returns an image, each sweep on it, and teachers' maps of it."""
        size = _shown_size(row, name)
        image_HW3 = row.pixels(name, size)
        figures = [_photo(image_HW3, name, f"{name} of {row.key}")]
        for sweep in row.sweeps:
            uv_N2, depth_N = row.place_sweep(sweep, name, size)
            if self.far_m is None or not len(uv_N2):
                continue
            count = int(pictures.points_in_image(uv_N2, depth_N, size).sum())
            drawn = pictures.points_on_image(image_HW3, uv_N2, depth_N, self.far_m)
            caption = f"{sweep} on {name}: {count:,} points"
            alt = f"{count} points of {sweep} on {name} of {row.key}, by depth"
            figures.append(_photo(drawn, caption, alt))
        for output in beside:
            for caption, picture in self._pair(row, output):
                alt = f"{caption}: {output.path} of {row.key}"
                figures.append(_map(picture, size, _title(output), alt))
        return Group(f"View 0 of {name}", tuple(figures))

    def _compared(self, row: ShownRow, output: ShownOutput) -> Group:
        """Returns a teacher's grid, and what each run's head makes of it."""
        size = self._map_size(row, output.inputs, output.entry.shape)
        figures = [
            _map(picture, size, caption, f"{caption}: {output.path} of {row.key}")
            for caption, picture in self._pair(row, output)
        ]
        return Group(_title(output), tuple(figures))

    def _above(self, row: ShownRow, output: ShownOutput) -> Group:
        """Returns sweeps from above, a teacher's map, and what heads make of it."""
        extent = output.extent
        assert extent is not None
        ends = extent.x_m, extent.y_m
        size = frame_height(*ends, _MAP_WIDTH), _MAP_WIDTH
        figures = []
        for name in output.inputs:
            if name in row.sweeps:
                figures.append(_sweep(row, name, *ends, size))
        for caption, picture in self._pair(row, output):
            upright = pictures.ahead_up(picture, extent.row_0, extent.column_0)
            alt = f"{caption}: {output.path} of {row.key} from above"
            figures.append(_map(upright, size, caption, alt, ends))
        return Group(_title(output), tuple(figures))

    def _pair(self, row: ShownRow, output: ShownOutput) -> list[tuple[str, Picture]]:
        """Returns the teacher's picture and each head's, in the teacher's colours."""
        teacher_RKC = output.grids.get(row.row)
        found = []
        if teacher_RKC is not None:
            drawn = output.colours(teacher_RKC)
            if drawn is None:
                return []
            found.append((f"teacher {output.teacher}", drawn))
        for student in self.students:
            made = student.predictions.get(output.path, {}).get(row.row)
            if made is None:
                continue
            picture = output.colours(made.grid_RKC)
            if picture is None:
                continue
            caption = f"{student.name}: its head for {output.teacher}"
            if made.seen_RK is not None:
                picture = pictures.fade(picture, made.seen_RK)
            if teacher_RKC is not None:
                caption += f", cosine {_agreement(made, teacher_RKC):.2f}"
            found.append((caption, picture))
        return found

    def _tokens(self, row: ShownRow) -> Group:
        """Returns each student's own tokens, in colours of its own."""
        figures = []
        for student in self.students:
            basis, grid = student.basis, student.grids.get(row.row)
            if basis is not None and grid is not None:
                caption = f"{student.name}: {grid.shape[0]} x {grid.shape[1]} tokens"
                alt = f"{caption} of {row.key}"
                size = self._map_size(row, (student.input,))
                figures.append(_map(basis.colours(grid), size, caption, alt))
        return Group("Students' own tokens, each in its own colours", tuple(figures))

    def _map_size(
        self, row: ShownRow, inputs: Sequence[str], shape: Sequence[int] = (1, 1)
    ) -> tuple[int, int]:
        """Returns the size of a map: the image's that it lies on, else by its cells."""
        for name in inputs:
            if name in row.images:
                return _shown_size(row, name)
        height = round(_MAP_WIDTH * shape[0] / shape[1])
        return min(max(height, _MAP_WIDTH // 8), _HIGHEST), _MAP_WIDTH


def _farthest(shown: Sequence[ShownRow]) -> float | None:
    """Returns the depth below which nearly all points on images lie."""
    depths = [
        depth_N[pictures.points_in_image(uv_N2, depth_N, size)]
        for row in shown
        for image in row.images
        for sweep in row.sweeps
        for size in [_shown_size(row, image)]
        for uv_N2, depth_N in [row.place_sweep(sweep, image, size)]
    ]
    seen_N = np.concatenate([np.empty(0), *depths])
    if not len(seen_N):
        return None
    far = float(np.percentile(seen_N, 98)) / _DEPTH_STEP_M
    return _DEPTH_STEP_M * max(1, math.ceil(far))


def _title(output: ShownOutput) -> str:
    shape = output.entry.shape[-3:]
    where = f"{shape[0]} x {shape[1]} cells of {shape[2]} channels"
    if is_logits(output.entry.name):
        return f"{output.path}: {where}, in the colour of the largest"
    share = math.nan if output.basis is None else output.basis.share
    shown = f"; the colours hold {share:.0%} of the variance"
    return f"{output.path}: {where}{'' if math.isnan(share) else shown}"


def _agreement(made: Prediction, teacher_RKC: np.ndarray) -> float:
    """Returns the mean cosine between head and teacher over the cells that are seen."""
    seen_RK = np.ones(teacher_RKC.shape[:2], np.bool_)
    if made.seen_RK is not None:
        seen_RK = made.seen_RK
    return pictures.mean_cosine(made.grid_RKC[seen_RK], teacher_RKC[seen_RK])


def _shown_size(row: ShownRow, name: str) -> tuple[int, int]:
    """Returns the size on the page of view 0 of an image, in its aspect."""
    height, width = row.box_size(name)
    scale = min(_WIDTH / width, _HIGHEST / height)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _photo(picture: Picture, caption: str, alt: str) -> Figure:
    uri = pictures.data_uri(pictures.to_jpeg(picture))
    return Figure(uri, (picture.shape[0], picture.shape[1]), caption, alt)


def _map(
    picture: Picture,
    size: tuple[int, int],
    caption: str,
    alt: str,
    extent: tuple[Ends, Ends] | None = None,
) -> Figure:
    uri = pictures.data_uri(pictures.to_png(pictures.enlarge(picture, size)))
    return Figure(uri, size, caption, alt, extent)


def _sweep(
    row: ShownRow, name: str, x_m: Ends, y_m: Ends, size: tuple[int, int]
) -> Figure:
    points_N3 = row.sweeps[name]
    # At half the size, then enlarged: a point is 2 x 2 pixels of the page.
    coarse = (max(1, size[0] // 2), max(1, size[1] // 2))
    drawn = pictures.points_from_above(points_N3, x_m, y_m, coarse)
    alt = f"{name} of {row.key} from above, by height"
    return _map(drawn, size, f"{name} from above", alt, (x_m, y_m))


def _sweep_alone(row: ShownRow, name: str) -> Group:
    """Returns a sweep from above, as far as nearly all of its points lie."""
    reach = float(np.percentile(np.abs(row.sweeps[name][:, :2]), 95))
    far = _DEPTH_STEP_M * max(1, math.ceil(reach / _DEPTH_STEP_M))
    ends = (-far, far)
    size = (_MAP_WIDTH, _MAP_WIDTH)
    return Group(f"Sweep of {name}", (_sweep(row, name, ends, ends, size),))
