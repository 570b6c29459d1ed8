"""What lines a street on one side: houses, a terrace, blocks, halls, a wood, a field.

Scene classes share kinds on purpose: no single thing gives a class away.
"""

from __future__ import annotations

from collections.abc import Callable

from teachonce.demo.furniture import (
    AHEAD_M,
    BACK_M,
    add_block,
    add_chimney,
    add_container,
    add_house,
    add_strip,
    is_crossing,
)
from teachonce.demo.ground import Road
from teachonce.demo.objects import Label, Shape, Yard
from teachonce.demo.palettes import Material

Size = Callable[[], tuple[float, float, float]]


def add_frontage(
    yard: Yard, road: Road, side: float, shares: dict[str, float], back_m: float
) -> str:
    """Adds one side's frontage, ``back_m`` behind the pavement; returns its kind.

    Args:
        yard: where to add.
        road: what it stands along.
        side: +1 left, -1 right.
        shares: kinds and how likely each is; they sum to 1.
        back_m: from the pavement's edge to the buildings' fronts.
    """
    draw, kind = yard.uniform(0, 1), next(iter(shares))
    for name, share in shares.items():
        kind = name
        draw -= share
        if draw < 0:
            break
    _KINDS[kind](yard, road, side, back_m)
    return kind


def _houses(yard: Yard, road: Road, side: float, back_m: float) -> None:
    is_hedged = yard.chance(0.5)
    height = yard.uniform(0.7, 1.3)
    x = BACK_M + yard.uniform(0, 6)
    while x < 95:
        if not is_crossing(road, x, 7.0):
            add_house(yard, road, x, side * (road.edge_m + back_m))
            if yard.chance(0.5):
                left = side * (road.edge_m + yard.uniform(1.8, 3.0))
                at_x, at_y, _ = road.place(x + yard.uniform(5, 8), left)
                yard.tree(at_x, at_y, 0.8)
            if is_hedged:
                hedge = (Label.VEGETATION, Material.FOLIAGE)
                left = side * (road.edge_m + 0.6)
                add_strip(yard, road, left, x - 5, x + 4, height, *hedge, 0.7)
        x += yard.uniform(13, 19)


def _row(
    yard: Yard,
    road: Road,
    side: float,
    back_m: float,
    material: Material,
    size: Size,
    gap: Callable[[], float],
) -> None:
    """Adds buildings in a row, none on the crossing road."""
    x = BACK_M
    while x < AHEAD_M:
        front, depth, height = size()
        middle = x + front / 2
        if road.cross_m is not None and is_crossing(road, middle, front / 2):
            reach = road.cross_half_m + road.pavement_m
            # Up to the corner, then on behind the other one.
            front = road.cross_m - reach - x
            if front > 4:
                at = (front, depth, height)
                left = side * (road.edge_m + back_m)
                add_block(yard, road, x + front / 2, left, at, material)
            x = road.cross_m + reach
            continue
        left = side * (road.edge_m + back_m)
        add_block(yard, road, middle, left, (front, depth, height), material)
        x += front + gap()


def _terrace(yard: Yard, road: Road, side: float, back_m: float) -> None:
    low = yard.uniform(5.5, 8.5)

    def size() -> tuple[float, float, float]:
        return yard.uniform(6, 10), 10.0, low + yard.uniform(0, 2)

    _row(yard, road, side, back_m, Material.FACADE, size, lambda: 0.0)


def _blocks(yard: Yard, road: Road, side: float, back_m: float) -> None:
    low = yard.uniform(8, 14)
    step = yard.uniform(0, 8) if yard.chance(0.4) else 0.0

    def size() -> tuple[float, float, float]:
        return yard.uniform(12, 22), 12.0, low + yard.uniform(0, 8)

    _row(yard, road, side, back_m, Material.FACADE, size, lambda: step)


def _halls(yard: Yard, road: Road, side: float, back_m: float) -> None:
    def size() -> tuple[float, float, float]:
        return yard.uniform(20, 40), 20.0, yard.uniform(5.5, 11)

    _row(yard, road, side, back_m, Material.HALL, size, lambda: yard.uniform(4, 14))


def _wood(yard: Yard, road: Road, side: float, back_m: float) -> None:
    conifers = yard.uniform(0, 1)
    for _ in range(yard.layout.integers(16, 34)):
        left = side * (road.edge_m + max(back_m, 3) + 22 * yard.uniform(0, 1) ** 2)
        x = yard.uniform(-20, 100)
        at_x, at_y, _yaw = road.place(x, left)
        if is_crossing(road, x, 2.5):
            continue
        if yard.chance(conifers):
            yard.conifer(at_x, at_y)
        else:
            yard.tree(at_x, at_y, yard.uniform(0.9, 1.6))


def _field(yard: Yard, road: Road, side: float, back_m: float) -> None:
    for _ in range(yard.layout.integers(2, 9)):
        left = side * (road.edge_m + max(back_m, 6) + yard.uniform(0, 20))
        x = yard.uniform(-20, 100)
        if not is_crossing(road, x, 3.0):
            yard.tree(*road.place(x, left)[:2], yard.uniform(0.9, 1.5))
    if yard.chance(0.4):
        left = side * (road.edge_m + max(back_m, 6) + yard.uniform(6, 15))
        x = yard.uniform(20, 80)
        if not is_crossing(road, x, 8.0):
            add_house(yard, road, x, left)
    if yard.chance(0.4):
        hedge = (Label.VEGETATION, Material.FOLIAGE)
        left = side * (road.edge_m + yard.uniform(2.5, 6))
        start, height = yard.uniform(-20, 30), yard.uniform(0.9, 1.6)
        add_strip(yard, road, left, start, start + 50, height, *hedge, 1.0)


_KINDS: dict[str, Callable[[Yard, Road, float, float], None]] = {
    "houses": _houses,
    "terrace": _terrace,
    "blocks": _blocks,
    "halls": _halls,
    "wood": _wood,
    "field": _field,
}


def add_tree_row(yard: Yard, road: Road, side: float) -> None:
    """Plants street trees along one pavement."""
    # Crowns reach 2.6 m: clear of the car where no parking strip keeps them off.
    out = road.half_m + 1.2 + max(0.0, 1.8 - road.margin_m)
    step, x = yard.uniform(8.5, 13), -20 + yard.uniform(0, 6)
    while x < 85:
        if not is_crossing(road, x, 2.5):
            at_x, at_y, _ = road.place(x, side * out)
            yard.tree(at_x, at_y, yard.uniform(0.9, 1.15))
        x += step


def add_works(yard: Yard, road: Road, side: float, back_m: float) -> None:
    """Adds containers, silos, chimneys and walls in front of one side's halls."""
    for _ in range(yard.layout.integers(1, 6)):
        left = side * (road.edge_m + yard.uniform(1.8, max(2.0, back_m - 2.5)))
        at_x, at_y, yaw = road.place(yard.uniform(5, 70), left)
        add_container(yard, at_x, at_y, yaw)
    for _ in range(yard.layout.integers(0, 3)):
        left = side * (road.edge_m + back_m + yard.uniform(2, 6))
        at_x, at_y, _yaw = road.place(yard.uniform(25, 90), left)
        add_chimney(yard, at_x, at_y)
    if yard.chance(0.5):
        start, end = yard.uniform(-40, 8), yard.uniform(40, 80)
        wall = (Label.BARRIER, Material.CONCRETE)
        left = side * (road.edge_m + 0.4)
        add_strip(yard, road, left, start, end, yard.uniform(0.9, 2.0), *wall)


def add_corners(yard: Yard, road: Road) -> None:
    """Adds fronts along the crossing road, behind the corner houses."""
    if road.cross_m is None:
        return
    reach = road.cross_half_m + road.pavement_m
    low = yard.uniform(5, 12)
    for side in (-1.0, 1.0):
        for direction in (-1.0, 1.0):
            material = Material.HALL if yard.chance(0.2) else Material.FACADE
            away = road.edge_m + yard.uniform(13, 16)
            while away < 60:
                front = yard.uniform(9, 15)
                at_x = road.cross_m + direction * (reach + 5.0)
                at_y = road.place(road.cross_m, side * (away + front / 2))[1]
                half = (5.0, front / 2, (low + yard.uniform(0, 4)) / 2)
                place = (at_x, at_y, 0.0)
                yard.add(Shape.BOX, place, half, 0.0, Label.BUILDING, material)
                away += front + yard.uniform(0, 3)
