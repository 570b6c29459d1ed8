"""Six kinds of street: what stands where, drawn from a layout stream.

Each function takes an empty ``Yard`` and returns the ``Street`` it has furnished. The
car drives on the right, at x = 0, in the outermost lane, which is free from 8 m behind
to 7 m ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from teachonce.demo.frontage import (
    add_corners,
    add_frontage,
    add_tree_row,
    add_works,
)
from teachonce.demo.furniture import (
    AHEAD_M,
    BACK_M,
    SIDES,
    Street,
    add_gantry,
    add_lamps,
    add_strip,
    add_traffic,
    add_walkers,
    lay_road,
    park_cars,
)
from teachonce.demo.ground import Road
from teachonce.demo.objects import Label, Yard
from teachonce.demo.palettes import Material

#: Scene classes in order of the number in ``KEY.cls``.
SCENE_CLASSES = (
    "residential",
    "avenue",
    "industrial",
    "motorway",
    "intersection",
    "rural",
)


def build_street(cls: int, yard: Yard) -> Street:
    """Returns a street of class ``cls``, its objects added to ``yard``."""
    return _BUILDERS[cls](yard)


def _residential(yard: Yard) -> Street:
    """Narrow, unmarked, cars parked at both kerbs."""
    plan = Road(
        lanes=1,
        lane_m=yard.uniform(2.8, 3.3),
        margin_m=2.1,
        pavement_m=yard.uniform(1.3, 3.0),
        verge=Label.TERRAIN if yard.chance(0.7) else Label.PAVEMENT,
        centre="none" if yard.chance(0.7) else "dashed",
    )
    road = lay_road(yard, 1 / 120, plan)
    street = Street(road, speed_mps=yard.uniform(5, 11))
    shares = {"houses": 0.55, "terrace": 0.25, "blocks": 0.12, "field": 0.08}
    for side in SIDES:
        kind = add_frontage(yard, road, side, shares, yard.uniform(1.5, 6))
        if kind in ("terrace", "blocks") and yard.chance(0.3):
            add_tree_row(yard, road, side)
    park_cars(yard, road, yard.uniform(0.2, 0.55))
    add_traffic(yard, street, 45, 0.05)
    add_walkers(yard, road, yard.layout.integers(1, 5).item())
    add_lamps(yard, street, yard.uniform(22, 34), 0.5)
    if yard.chance(0.5):
        yard.sign(*road.place(yard.uniform(9, 30), -(road.half_m + 0.5)))
    return street


def _avenue(yard: Yard) -> Street:
    """Two lanes each way between rows of trees."""
    plan = Road(
        lanes=2,
        lane_m=yard.uniform(2.9, 3.4),
        median_m=1.4 if yard.chance(0.4) else 0.0,
        margin_m=2.2 if yard.chance(0.7) else 0.4,
        pavement_m=yard.uniform(3.0, 6.0),
        verge=Label.PAVEMENT if yard.chance(0.7) else Label.TERRAIN,
        centre="solid" if yard.chance(0.6) else "dashed",
    )
    road = lay_road(yard, 1 / 250, plan)
    street = Street(road, speed_mps=yard.uniform(8, 15))
    shares = {
        "blocks": 0.5, "terrace": 0.2, "houses": 0.12, "halls": 0.1, "field": 0.08,
    }  # fmt: skip
    for side in SIDES:
        back_m = yard.uniform(0, 1) if yard.chance(0.6) else yard.uniform(1, 8)
        add_frontage(yard, road, side, shares, back_m)
        add_tree_row(yard, road, side)
    if road.margin_m > 1:
        park_cars(yard, road, yard.uniform(0.1, 0.7))
    add_traffic(yard, street, yard.uniform(20, 40), 0.12)
    add_walkers(yard, road, yard.layout.integers(1, 8).item())
    add_lamps(yard, street, 30, 0.5)
    if yard.chance(0.5):
        yard.sign(*road.place(yard.uniform(10, 30), -(road.half_m + 0.5)))
    return street


def _industrial(yard: Yard) -> Street:
    """Halls, containers and chimneys set back; lorries."""
    plan = Road(
        lanes=2 if yard.chance(0.25) else 1,
        lane_m=yard.uniform(3.2, 4.0),
        margin_m=yard.uniform(0.3, 2.5),
        pavement_m=yard.uniform(0.8, 2.5),
        verge=Label.PAVEMENT if yard.chance(0.6) else Label.TERRAIN,
        has_edge_line=yard.chance(0.5),
    )
    road = lay_road(yard, 1 / 180, plan)
    street = Street(road, speed_mps=yard.uniform(8, 15))
    shares = {"halls": 0.7, "blocks": 0.1, "field": 0.2}
    for side in SIDES:
        back_m = yard.uniform(5, 12)
        kind = add_frontage(yard, road, side, shares, back_m)
        if kind != "blocks":
            add_works(yard, road, side, back_m)
    if road.margin_m > 2 and yard.chance(0.5):
        park_cars(yard, road, yard.uniform(0.1, 0.3))
    add_traffic(yard, street, 34, 0.45)
    add_walkers(yard, road, yard.layout.integers(0, 3).item())
    add_lamps(yard, street, 34, 0.6)
    return street


def _motorway(yard: Yard) -> Street:
    """Divided, with a hard shoulder; nobody on foot."""
    plan = Road(
        lanes=yard.layout.integers(2, 4).item(),
        lane_m=yard.uniform(3.4, 3.7),
        median_m=yard.uniform(1.6, 2.6),
        margin_m=yard.uniform(2.0, 2.8),
        centre="none",
        has_edge_line=True,
    )
    road = lay_road(yard, 1 / 500, plan)
    street = Street(road, speed_mps=yard.uniform(17, 33))
    rail = (Label.BARRIER, Material.RAIL)
    add_strip(yard, road, 0.0, BACK_M, AHEAD_M, 0.8, *rail, thick=0.5, piece_m=15)
    shares = {"wood": 0.4, "field": 0.4, "halls": 0.1, "blocks": 0.1}
    for side in SIDES:
        left = side * (road.half_m + 0.6)
        if yard.chance(0.75):
            add_strip(yard, road, left, BACK_M, AHEAD_M, 0.32, *rail, 0.12, 0.45, 15)
        if yard.chance(0.3):
            start, left = yard.uniform(-40, 20), side * (road.half_m + 2.2)
            height = yard.uniform(2.4, 4.2)
            concrete = (Label.BARRIER, Material.CONCRETE)
            add_strip(yard, road, left, start, AHEAD_M, height, *concrete, 0.3, 0.0, 15)
            shares_here = {"blocks": 0.3, "field": 0.7}
        else:
            shares_here = shares
        add_frontage(yard, road, side, shares_here, yard.uniform(6, 16))
    if yard.chance(0.5):
        add_gantry(yard, road, yard.uniform(22, 60))
    add_traffic(yard, street, yard.uniform(22, 45), 0.3)
    return street


def _intersection(yard: Yard) -> Street:
    """A crossing with lights ahead, in any kind of built-up street."""
    plan = Road(
        lanes=2 if yard.chance(0.35) else 1,
        lane_m=yard.uniform(2.9, 3.5),
        margin_m=2.1 if yard.chance(0.4) else 0.3,
        pavement_m=yard.uniform(1.5, 4.5),
        verge=Label.PAVEMENT if yard.chance(0.6) else Label.TERRAIN,
        centre="solid" if yard.chance(0.3) else "dashed",
        cross_m=yard.uniform(17, 38),
        cross_half_m=yard.uniform(3.2, 5.5),
    )
    road = lay_road(yard, 1 / 900, plan)
    cross_m = road.cross_m or 0.0
    street = Street(road, speed_mps=yard.uniform(6, 13), is_red=yard.chance(0.5))
    reach = road.cross_half_m + road.pavement_m
    shares = {
        "houses": 0.2, "terrace": 0.25, "blocks": 0.3, "halls": 0.15, "field": 0.1,
    }  # fmt: skip
    kinds = []
    for side in SIDES:
        back_m = yard.uniform(0, 1) if yard.chance(0.5) else yard.uniform(1, 7)
        kinds.append(add_frontage(yard, road, side, shares, back_m))
        if yard.chance(0.25):
            add_tree_row(yard, road, side)
    if "field" not in kinds:
        add_corners(yard, road)
    _add_crossing(yard, street, cross_m)
    if road.margin_m > 1:
        park_cars(yard, road, yard.uniform(0.1, 0.5))
    add_traffic(yard, street, 32, 0.12)
    add_walkers(yard, road, yard.layout.integers(1, 6).item())
    stop = cross_m - reach
    for side in SIDES:
        corner = road.place(stop + 0.5, side * (road.half_m + 0.5))
        yard.traffic_light(*corner, bool(street.is_red))
    add_lamps(yard, street, 26, 0.6)
    if yard.chance(0.5):
        yard.sign(*road.place(stop - yard.uniform(4, 9), -(road.half_m + 0.6)))
    return street


def _add_crossing(yard: Yard, street: Street, cross_m: float) -> None:
    """Cars and people that cross ahead."""
    road = street.road
    middle = road.place(cross_m, 0.0)[1]
    for side in SIDES:
        for _ in range(yard.layout.integers(0, 3)):
            away = yard.uniform(4, 30) * (1 if yard.chance(0.5) else -1)
            lane = side * road.cross_half_m / 2
            yard.car(cross_m + lane, middle + away, side * 1.5707963)
    # People wait whatever the light shows: only its colour tells whether to stop.
    street.has_crosser = yard.chance(0.25)
    for number in range(yard.layout.integers(1, 5)):
        x = cross_m - road.cross_half_m - yard.uniform(1.4, 3.6)
        aside = (-1 if yard.chance(0.5) else 1) * yard.uniform(0.4, 1.6)
        left = (
            road.half_m * aside / 2
            if number == 0 and street.has_crosser
            else (aside + np.sign(aside) * road.half_m)
        )
        at_x, at_y, _yaw = road.place(x, float(left))
        yard.pedestrian(at_x, at_y)


def _rural(yard: Yard) -> Street:
    """Two lanes through fields, woods and hamlets; no pavement."""
    plan = Road(
        lanes=1,
        lane_m=yard.uniform(2.8, 3.6),
        margin_m=yard.uniform(0.2, 1.2),
        centre="none" if yard.chance(0.3) else "dashed",
        has_edge_line=yard.chance(0.6),
    )
    road = lay_road(yard, 1 / 140, plan)
    street = Street(road, speed_mps=yard.uniform(10, 25))
    shares = {"field": 0.45, "wood": 0.35, "houses": 0.2}
    for side in SIDES:
        kind = add_frontage(yard, road, side, shares, yard.uniform(3, 7))
        if kind != "houses" and yard.chance(0.3):
            rail = (Label.BARRIER, Material.RAIL)
            left, start = side * (road.half_m + 0.7), yard.uniform(-20, 25)
            add_strip(yard, road, left, start, start + 60, 0.32, *rail, 0.12, 0.4)
    if yard.chance(0.5):
        side = -1.0 if yard.chance(0.5) else 1.0
        for x in range(-25, 100, 25):
            at_x, at_y, _yaw = road.place(float(x), side * (road.half_m + 2.2))
            yard.pole(at_x, at_y, 7.0, 0.12)
    if yard.chance(0.4):
        yard.sign(*road.place(yard.uniform(10, 40), -(road.half_m + 1.2)))
    add_traffic(yard, street, yard.uniform(35, 70), 0.2)
    return street


_BUILDERS: tuple[Callable[[Yard], Street], ...] = (
    _residential,
    _avenue,
    _industrial,
    _motorway,
    _intersection,
    _rural,
)
