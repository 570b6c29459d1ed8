"""Six kinds of street: what stands where, drawn from a layout stream.

Each function takes an empty ``Yard`` and returns the ``Street`` it has furnished. The
car drives on the right, at x = 0, in the outermost lane, which is free from 8 m behind
to 7 m ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from teachonce.demo.furniture import (
    AHEAD_M,
    BACK_M,
    SIDES,
    Street,
    add_block,
    add_chimney,
    add_container,
    add_gantry,
    add_house,
    add_lamps,
    add_strip,
    add_traffic,
    add_walkers,
    lay_road,
    park_cars,
)
from teachonce.demo.ground import Road
from teachonce.demo.objects import Label, Shape, Yard
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
    road = lay_road(
        yard,
        1 / 110,
        Road(
            lanes=1,
            lane_m=yard.uniform(2.8, 3.2),
            margin_m=2.1,
            pavement_m=yard.uniform(1.4, 2.0),
            centre="none",
        ),
    )
    street = Street(road, speed_mps=yard.uniform(5, 10))
    for side in SIDES:
        garden = yard.uniform(3.0, 5.5)
        is_hedged = yard.chance(0.6)
        x = BACK_M + yard.uniform(0, 6)
        while x < 95:
            add_house(yard, road, x, side * (road.edge_m + garden))
            if yard.chance(0.5):
                left = side * (road.edge_m + yard.uniform(1.8, 3.0))
                at_x, at_y, _ = road.place(x + yard.uniform(5, 8), left)
                yard.tree(at_x, at_y, 0.8)
            if is_hedged:
                left = side * (road.edge_m + 0.6)
                add_strip(
                    yard,
                    road,
                    left,
                    x - 5,
                    x + 4,
                    yard.uniform(0.7, 1.3),
                    Label.VEGETATION,
                    Material.FOLIAGE,
                    thick=0.7,
                )
            x += yard.uniform(13, 17)
    park_cars(yard, road, yard.uniform(0.2, 0.55))
    add_traffic(yard, street, 45, 0.03)
    add_walkers(yard, road, yard.layout.integers(1, 5).item())
    add_lamps(yard, street, 24, 0.5)
    if yard.chance(0.5):
        yard.sign(*road.place(yard.uniform(9, 30), -(road.half_m + 0.5)))
    return street


def _avenue(yard: Yard) -> Street:
    road = lay_road(
        yard,
        1 / 320,
        Road(
            lanes=2,
            lane_m=yard.uniform(3.0, 3.4),
            median_m=1.4 if yard.chance(0.4) else 0.0,
            margin_m=2.2,
            pavement_m=yard.uniform(4.5, 6.0),
            verge=Label.PAVEMENT,
            centre="solid",
        ),
    )
    street = Street(road, speed_mps=yard.uniform(8, 14))
    for side in SIDES:
        x = BACK_M
        while x < AHEAD_M:
            front = yard.uniform(12, 22)
            size = (front, 12.0, yard.uniform(11, 22))
            left = side * (road.edge_m + yard.uniform(0, 0.8))
            add_block(yard, road, x + front / 2, left, size, Material.FACADE)
            x += front
        step, x = yard.uniform(8.5, 12), -20 + yard.uniform(0, 6)
        while x < 85:
            at_x, at_y, _ = road.place(x, side * (road.half_m + 1.3))
            yard.tree(at_x, at_y, yard.uniform(0.95, 1.15))
            x += step
    park_cars(yard, road, yard.uniform(0.25, 0.7))
    add_traffic(yard, street, 26, 0.08)
    add_walkers(yard, road, yard.layout.integers(4, 10).item())
    add_lamps(yard, street, 26, 0.5)
    yard.sign(*road.place(yard.uniform(10, 30), -(road.half_m + 0.5)))
    return street


def _industrial(yard: Yard) -> Street:
    road = lay_road(
        yard,
        1 / 220,
        Road(
            lanes=1,
            lane_m=yard.uniform(3.5, 4.0),
            margin_m=yard.uniform(0.5, 2.5),
            pavement_m=yard.uniform(0.8, 1.6),
            verge=Label.PAVEMENT,
            has_edge_line=True,
        ),
    )
    street = Street(road, speed_mps=yard.uniform(8, 13))
    for side in SIDES:
        x = BACK_M
        while x < AHEAD_M:
            front = yard.uniform(22, 40)
            size = (front, 20.0, yard.uniform(6, 10))
            left = side * (road.edge_m + yard.uniform(7, 11))
            add_block(yard, road, x + front / 2, left, size, Material.HALL)
            x += front + yard.uniform(4, 14)
        if yard.chance(0.6):
            add_strip(
                yard,
                road,
                side * (road.edge_m + 0.5),
                yard.uniform(-40, 8),
                yard.uniform(40, 80),
                yard.uniform(1.0, 2.0),
                Label.BARRIER,
                Material.CONCRETE,
            )
        for _ in range(yard.layout.integers(2, 6)):
            left = side * (road.edge_m + yard.uniform(2.8, 5.2))
            at_x, at_y, yaw = road.place(yard.uniform(5, 70), left)
            add_container(yard, at_x, at_y, yaw)
        for _ in range(yard.layout.integers(0, 3)):
            left = side * (road.edge_m + yard.uniform(9, 14))
            at_x, at_y, _yaw = road.place(yard.uniform(25, 90), left)
            add_chimney(yard, at_x, at_y)
    add_traffic(yard, street, 34, 0.55)
    add_walkers(yard, road, yard.layout.integers(0, 3).item())
    add_lamps(yard, street, 34, 0.6)
    return street


def _motorway(yard: Yard) -> Street:
    road = lay_road(
        yard,
        1 / 600,
        Road(
            lanes=yard.layout.integers(2, 4).item(),
            lane_m=yard.uniform(3.4, 3.7),
            median_m=yard.uniform(1.6, 2.6),
            margin_m=2.6,
            centre="none",
            has_edge_line=True,
        ),
    )
    street = Street(road, speed_mps=yard.uniform(20, 33))
    rail = (Label.BARRIER, Material.RAIL)
    add_strip(yard, road, 0.0, BACK_M, AHEAD_M, 0.8, *rail, thick=0.5, piece_m=15)
    for side in SIDES:
        left = side * (road.half_m + 0.6)
        add_strip(yard, road, left, BACK_M, AHEAD_M, 0.32, *rail, 0.12, 0.45, 15)
        if yard.chance(0.4):
            start, left = yard.uniform(-40, 20), side * (road.half_m + 2.2)
            height = yard.uniform(2.8, 4.2)
            concrete = (Label.BARRIER, Material.CONCRETE)
            add_strip(yard, road, left, start, AHEAD_M, height, *concrete, 0.3, 0.0, 15)
        else:
            for _ in range(yard.layout.integers(5, 14)):
                left = side * (road.half_m + yard.uniform(6, 22))
                at_x, at_y, _yaw = road.place(yard.uniform(-20, 95), left)
                yard.tree(at_x, at_y, yard.uniform(1.0, 1.7))
    if yard.chance(0.6):
        add_gantry(yard, road, yard.uniform(22, 60))
    add_traffic(yard, street, 30, 0.3)
    return street


def _intersection(yard: Yard) -> Street:
    road = lay_road(
        yard,
        1 / 900,
        Road(
            lanes=1,
            lane_m=yard.uniform(3.1, 3.5),
            margin_m=yard.uniform(0.2, 2.0),
            pavement_m=yard.uniform(2.2, 3.2),
            verge=Label.PAVEMENT,
            cross_m=yard.uniform(18, 30),
            cross_half_m=yard.uniform(3.4, 5.0),
        ),
    )
    cross_m = road.cross_m or 0.0
    street = Street(road, speed_mps=yard.uniform(6, 12), is_red=yard.chance(0.5))
    reach = road.cross_half_m + road.pavement_m
    for side in SIDES:
        for direction in SIDES:
            x = cross_m + direction * reach
            while BACK_M < x < 95:
                front = yard.uniform(9, 15)
                size = (front, yard.uniform(10, 14), yard.uniform(7, 15))
                left = side * (road.edge_m + 0.2)
                at = x + direction * front / 2
                add_block(yard, road, at, left, size, Material.FACADE)
                x += direction * front
        # Fronts along the crossing road, behind the corner houses.
        for direction in SIDES:
            y = side * (road.edge_m + 14)
            while abs(y) < 60:
                front = yard.uniform(9, 15)
                at_x = cross_m + direction * (reach + 5.0)
                at_y = road.place(cross_m, y + side * front / 2)[1]
                half = (5.0, front / 2, yard.uniform(3.5, 7.0))
                yard.add(
                    Shape.BOX,
                    (at_x, at_y, 0.0),
                    half,
                    0.0,
                    Label.BUILDING,
                    Material.FACADE,
                    reflectivity=0.45,
                )
                y += side * front
    _crossing_traffic(yard, street, cross_m)
    park_cars(yard, road, 0.25 if road.margin_m > 1.9 else 0.0)
    add_traffic(yard, street, 30, 0.08)
    add_walkers(yard, road, yard.layout.integers(2, 6).item())
    stop = cross_m - reach
    for left, red in ((-1.0, bool(street.is_red)), (1.0, bool(street.is_red))):
        corner = road.place(stop + 0.5, left * (road.half_m + 0.5))
        yard.traffic_light(*corner, red)
    add_lamps(yard, street, 24, 0.6)
    yard.sign(*road.place(stop - yard.uniform(4, 9), -(road.half_m + 0.6)))
    return street


def _crossing_traffic(yard: Yard, street: Street, cross_m: float) -> None:
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
    road = lay_road(
        yard,
        1 / 130,
        Road(
            lanes=1,
            lane_m=yard.uniform(2.8, 3.4),
            margin_m=0.25,
            has_edge_line=True,
        ),
    )
    street = Street(road, speed_mps=yard.uniform(13, 25))
    for side in SIDES:
        is_forest = yard.chance(0.45)
        for _ in range(yard.layout.integers(22, 34) if is_forest else 6):
            near = 3.0 if is_forest else 6.0
            left = side * (road.half_m + near + 22 * yard.uniform(0, 1) ** 2)
            at_x, at_y, _yaw = road.place(yard.uniform(-20, 100), left)
            if is_forest and yard.chance(0.7):
                yard.conifer(at_x, at_y)
            else:
                yard.tree(at_x, at_y, yard.uniform(0.9, 1.4))
        if not is_forest:
            if yard.chance(0.6):
                left = side * (road.half_m + yard.uniform(12, 25))
                add_house(yard, road, yard.uniform(20, 80), left)
            if yard.chance(0.5):
                hedge = (Label.VEGETATION, Material.FOLIAGE)
                left = side * (road.half_m + yard.uniform(3, 9))
                start, height = yard.uniform(-20, 30), yard.uniform(0.9, 1.6)
                add_strip(yard, road, left, start, start + 50, height, *hedge, 1.0)
            elif yard.chance(0.6):
                rail = (Label.BARRIER, Material.RAIL)
                left, start = side * (road.half_m + 1.0), yard.uniform(-20, 25)
                add_strip(yard, road, left, start, start + 45, 0.32, *rail, 0.12, 0.4)
    side = -1.0 if yard.chance(0.5) else 1.0
    if yard.chance(0.6):
        for x in range(-25, 100, 25):
            at_x, at_y, _yaw = road.place(float(x), side * (road.half_m + 3.0))
            yard.pole(at_x, at_y, 7.0, 0.12)
    if yard.chance(0.5):
        yard.sign(*road.place(yard.uniform(10, 40), -(road.half_m + 1.2)))
    add_traffic(yard, street, 60, 0.15)
    return street


_BUILDERS: tuple[Callable[[Yard], Street], ...] = (
    _residential,
    _avenue,
    _industrial,
    _motorway,
    _intersection,
    _rural,
)
