"""Drawings as SVG: curves over steps, and pictures with axes in metres.

Pure functions from numbers to text that stands in an HTML page as it is. Axes are drawn
in the page's own text colour, so that they are read on light and dark alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

#: Told apart on white and on black, also by most who are colour-blind.
COLOURS = (
    "#4269d0",
    "#e8833a",
    "#3ca951",
    "#e0457b",
    "#6cc5b0",
    "#a463f2",
    "#9c6b4e",
    "#8a93a8",
)
MAX_POINTS = 300

_WIDTH, _HEIGHT = 460, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 68, 22, 12, 34
_LEGEND_ROW, _LETTER = 16, 6.6
_FRAME_LEFT, _FRAME_BOTTOM, _FRAME_MARGIN = 40, 34, 10


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: in the legend.
        x: rising.
        y: one per ``x``; where it is not finite the curve has a gap.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]


def thin(line: Line, limit: int = MAX_POINTS) -> Line:
    """Returns a curve of at most ``limit`` points, each the mean of its neighbours."""
    count = len(line.x)
    if count <= limit:
        return line
    edges = [count * place // limit for place in range(limit + 1)]
    spans = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return Line(
        line.name, [_mean(line.x[s]) for s in spans], [_mean(line.y[s]) for s in spans]
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Returns round numbers within [low, high], ``count`` + 1 at most.

    They are 1, 2 or 5 times a power of ten apart.
    """
    if not low < high:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """Returns a number for people: four digits, or whole with commas."""
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def draw_chart(
    lines: Sequence[Line],
    title: str,
    y_label: str,
    x_label: str = "step",
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """Returns an SVG of curves with linear axes, and a legend where there are several.

    Args:
        lines: at least one, of at least one point.
        title: what a reader who does not see it is told.
        y_label: of the upright axis.
        x_label: of the other.
        marks: places on x with a name: where a stage begins.
    """
    xs = [float(x) for line in lines for x in line.x]
    ys = [float(y) for line in lines for y in line.y if math.isfinite(y)]
    x_low, x_high = _ends(xs)
    y_low, y_high = _ends(ys)
    rows = _legend_rows([line.name for line in lines] if len(lines) > 1 else [])
    bottom = _HEIGHT + _LEGEND_ROW * len(rows)
    inner = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def across(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * inner[0]

    def down(y: float) -> float:
        return _TOP + (y_high - y) / (y_high - y_low) * inner[1]

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {bottom}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for x in ticks(x_low, x_high):
        parts.append(
            _text(across(x), _TOP + inner[1] + 14, number(x), "middle", "tick")
        )
    for y in ticks(y_low, y_high):
        parts.append(_rule(_LEFT, down(y), _WIDTH - _RIGHT, down(y), "grid"))
        parts.append(_text(_LEFT - 6, down(y) + 4, number(y), "end", "tick"))
    for x, name in marks:
        parts.append(_rule(across(x), _TOP, across(x), _TOP + inner[1], "mark"))
        parts.append(_text(across(x) + 3, _TOP + 9, name, "start", "tick"))
    middle = _TOP + inner[1] / 2
    parts.append(
        f'<text class="tick" text-anchor="middle" transform="translate(12 {middle:.1f})'
        f' rotate(-90)">{escape(y_label)}</text>'
    )
    centre = _LEFT + inner[0] / 2
    parts.append(_text(centre, _HEIGHT - 6, x_label, "middle", "tick"))
    for place, line in enumerate(lines):
        points = [(across(x), down(y)) for x, y in zip(line.x, line.y, strict=True)]
        parts += _polylines(points, place)
    for row, names in enumerate(rows):
        at = float(_LEFT)
        for place, name in names:
            y = _HEIGHT + _LEGEND_ROW * row + 8
            parts.append(
                f'<line x1="{at:.1f}" y1="{y - 4}" x2="{at + 14:.1f}" y2="{y - 4}" '
                f"{_stroke(place)}/>"
            )
            parts.append(_text(at + 19, y, name, "start", "tick"))
            at += _legend_width(name)
    return "".join([*parts, "</svg>"])


def draw_framed(
    uri: str,
    alt: str,
    x_m: tuple[float, float],
    y_m: tuple[float, float],
    width: int,
) -> str:
    """Returns an SVG of a picture from above with axes in metres.

    Args:
        uri: of the picture, x ahead upwards and y to the left.
        alt: what a reader who does not see it is told.
        x_m: ends of the picture, upright.
        y_m: ends of the picture, across; the left edge is the higher.
        width: of the picture, pixels of the page.
    """
    height = frame_height(x_m, y_m, width)
    whole = (
        _FRAME_LEFT + width + _FRAME_MARGIN,
        _FRAME_MARGIN + height + _FRAME_BOTTOM,
    )
    parts = [
        f'<svg class="framed" width="{whole[0]}" height="{whole[1]}" '
        f'viewBox="0 0 {whole[0]} {whole[1]}" role="img" aria-label="{escape(alt)}">',
        f'<image x="{_FRAME_LEFT}" y="{_FRAME_MARGIN}" width="{width}" '
        f'height="{height}" preserveAspectRatio="none" href="{escape(uri)}"/>',
    ]
    for x in ticks(*x_m, 4):
        y_px = _FRAME_MARGIN + (x_m[1] - x) / (x_m[1] - x_m[0]) * height
        parts.append(_rule(_FRAME_LEFT - 4, y_px, _FRAME_LEFT, y_px, "axis"))
        parts.append(_text(_FRAME_LEFT - 6, y_px + 4, number(x), "end", "tick"))
    base = _FRAME_MARGIN + height
    for y in ticks(*y_m, 4):
        x_px = _FRAME_LEFT + (y_m[1] - y) / (y_m[1] - y_m[0]) * width
        parts.append(_rule(x_px, base, x_px, base + 4, "axis"))
        parts.append(_text(x_px, base + 15, number(y), "middle", "tick"))
    centre = _FRAME_LEFT + width / 2
    parts.append(_text(centre, base + 29, "y, metres (left)", "middle", "tick"))
    middle = _FRAME_MARGIN + height / 2
    parts.append(
        f'<text class="tick" text-anchor="middle" transform="translate(10 {middle:.1f})'
        f' rotate(-90)">x, metres (ahead)</text>'
    )
    return "".join([*parts, "</svg>"])


def frame_height(x_m: tuple[float, float], y_m: tuple[float, float], width: int) -> int:
    """Returns the height at which a picture from above has square metres."""
    return max(1, round(width * (x_m[1] - x_m[0]) / (y_m[1] - y_m[0])))


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Returns what an axis spans: some room around one value, 0 to 1 without any."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) / 2 or 0.5
        return low - room, high + room
    return low, high


def _polylines(points: Sequence[tuple[float, float]], place: int) -> list[str]:
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    found = []
    for run in runs:
        if len(run) == 1:
            ((x, y),) = run
            colour = COLOURS[place % len(COLOURS)]
            found.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>')
        elif run:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            found.append(f'<polyline points="{path}" {_stroke(place)}/>')
    return found


def _stroke(place: int) -> str:
    # Where the colours run out, the next lines are dashed.
    dash = 4 * (place // len(COLOURS))
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    colour = COLOURS[place % len(COLOURS)]
    return f'fill="none" stroke="{colour}" stroke-width="1.6"{dashes}'


def _legend_width(name: str) -> float:
    return 34 + _LETTER * len(name)


def _legend_rows(names: Sequence[str]) -> list[list[tuple[int, str]]]:
    rows: list[list[tuple[int, str]]] = [[]]
    at = 0.0
    for place, name in enumerate(names):
        if rows[-1] and at + _legend_width(name) > _WIDTH - _LEFT:
            rows.append([])
            at = 0.0
        rows[-1].append((place, name))
        at += _legend_width(name)
    return rows


def _text(x: float, y: float, text: str, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
    )


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return (
        f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" '
        f'y2="{y2:.1f}"/>'
    )
