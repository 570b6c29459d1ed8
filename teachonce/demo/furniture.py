"""What streets are furnished with: traffic, houses, walls, lamps along a road.

Everything here draws from the yard's layout stream and adds to the yard.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from teachonce.demo.ground import Road
from teachonce.demo.objects import Label, Shape, Yard
from teachonce.demo.palettes import Material

BACK_M, AHEAD_M = -45.0, 105.0
SIDES = (-1.0, 1.0)


@dataclass
class Street:
    """A furnished street.

    Attributes:
        road: the road; its middle fixes where the car is in it.
        speed_mps: how fast the car drives.
        lead_x_m: x of the nearest vehicle ahead in the own lane, None if free.
        is_red: state of the traffic light, None where there is none.
        has_crosser: whether somebody is on the zebra crossing ahead.
        lamps: street lamps' lights, metres.
    """

    road: Road
    speed_mps: float
    lead_x_m: float | None = None
    is_red: bool | None = None
    has_crosser: bool = False
    lamps: list[tuple[float, float, float]] = field(default_factory=list)


def lay_road(yard: Yard, bend: float, plan: Road) -> Road:
    """Returns ``plan`` with the car in its lane, curved by up to ``bend`` per metre."""
    return replace(
        plan,
        offset_m=plan.lane_centre(plan.lanes - 1) + yard.uniform(-0.45, 0.45),
        heading=yard.uniform(-0.05, 0.05),
        curvature_per_m=yard.uniform(-bend, bend),
    )


def is_crossing(road: Road, x: float, margin_m: float) -> bool:
    """Returns whether x lies within ``margin_m`` of the crossing road's pavements."""
    if road.cross_m is None:
        return False
    reach = road.cross_half_m + road.pavement_m + margin_m
    return abs(x - road.cross_m) < reach


def add_traffic(yard: Yard, street: Street, gap_m: float, trucks: float) -> None:
    """Fills the lanes with vehicles about ``gap_m`` apart."""
    road = street.road
    for side in SIDES:
        for lane in range(road.lanes):
            is_own = side < 0 and lane == road.lanes - 1
            x = BACK_M + yard.uniform(0, gap_m)
            while x < AHEAD_M:
                is_truck = yard.chance(trucks)
                reach = 9.0 if is_truck else 4.0
                is_blocked = is_own and -8 - reach < x < 7 + reach
                if not is_blocked and not is_crossing(road, x, 5.5 + reach):
                    left = side * road.lane_centre(lane) + yard.uniform(-0.2, 0.2)
                    at_x, at_y, yaw = road.place(x, left)
                    yaw += 0.0 if side < 0 else 3.14159265
                    (yard.truck if is_truck else yard.car)(at_x, at_y, yaw)
                    if is_own and x > 0 and street.lead_x_m is None:
                        street.lead_x_m = x
                x += reach * 2 + yard.uniform(0.5, 1.5) * gap_m


def park_cars(yard: Yard, road: Road, share: float) -> None:
    """Parks cars along both kerbs, in ``share`` of the places."""
    for side in SIDES:
        x = BACK_M
        while x < 80:
            if yard.chance(share) and not is_crossing(road, x, 8.0):
                at_x, at_y, yaw = road.place(x, side * (road.half_m - 1.05))
                yaw += 0.0 if yard.chance(0.7) == (side < 0) else 3.14159265
                yard.car(at_x, at_y, yaw)
            x += 6.2


def add_walkers(yard: Yard, road: Road, number: int) -> None:
    """Puts people on the pavements."""
    for _ in range(number):
        side = -1.0 if yard.chance(0.5) else 1.0
        left = side * (road.half_m + yard.uniform(0.6, max(0.8, road.pavement_m - 0.4)))
        x, y, _yaw = road.place(yard.uniform(5, 45), left)
        yard.pedestrian(x, y)


def add_lamps(yard: Yard, street: Street, step_m: float, out_m: float) -> None:
    """Sets up street lamps, left and right in turn."""
    x, side = -12.0 + yard.uniform(0, step_m), -1.0 if yard.chance(0.5) else 1.0
    while x < 90:
        if not is_crossing(street.road, x, 0.0):
            at = street.road.place(x, side * (street.road.half_m + out_m))
            street.lamps.append(yard.lamp(*at, -side))
        x, side = x + step_m, -side


def add_block(
    yard: Yard,
    road: Road,
    x: float,
    left: float,
    size: tuple[float, float, float],
    material: Material,
) -> None:
    """Adds a building of (frontage, depth, height), its front ``left`` of middle."""
    front, depth, height = size
    out = left + (depth / 2 if left > 0 else -depth / 2)
    at_x, at_y, yaw = road.place(x, out)
    yard.add(
        Shape.BOX,
        (at_x, at_y, 0.0),
        (front / 2, depth / 2, height / 2),
        yaw,
        Label.BUILDING,
        material,
        reflectivity=0.45,
    )


def add_house(yard: Yard, road: Road, x: float, left: float) -> None:
    """Adds a house with a pitched roof, its front ``left`` of the middle."""
    front, depth = yard.uniform(8, 12), yard.uniform(7.5, 9.5)
    wall, roof = yard.uniform(3.2, 6.0), yard.uniform(2.4, 3.6)
    add_block(yard, road, x, left, (front, depth, wall), Material.FACADE)
    out = left + (depth / 2 if left > 0 else -depth / 2)
    at_x, at_y, yaw = road.place(x, out)
    half = (front / 2 + 0.3, depth / 2 + 0.4, roof / 2)
    if yard.chance(0.35):
        yaw, half = yaw + 1.5707963, (depth / 2 + 0.3, front / 2 + 0.4, roof / 2)
    yard.add(
        Shape.GABLE,
        (at_x, at_y, wall - 0.05),
        half,
        yaw,
        Label.BUILDING,
        Material.ROOF,
        reflectivity=0.4,
    )


def add_strip(
    yard: Yard,
    road: Road,
    left: float,
    start: float,
    end: float,
    height: float,
    label: Label,
    material: Material,
    thick: float = 0.12,
    bottom: float = 0.0,
    piece_m: float = 10.0,
) -> None:
    """Adds a wall, hedge or rail that follows the road."""
    x = start
    while x < end:
        length = min(piece_m, end - x)
        if not is_crossing(road, x + length / 2, length / 2):
            at_x, at_y, yaw = road.place(x + length / 2, left)
            yard.add(
                Shape.BOX,
                (at_x, at_y, bottom),
                (length / 2 + 0.1, thick / 2, height / 2),
                yaw,
                label,
                material,
            )
        x += length


def add_container(yard: Yard, x: float, y: float, yaw: float) -> None:
    """Adds one container, or two on top of each other."""
    for level in range(yard.layout.integers(1, 3)):
        yard.add(
            Shape.BOX,
            (x, y, 2.5 * level),
            (3.0, 1.2, 1.25),
            yaw,
            Label.BARRIER,
            Material.CARGO,
            reflectivity=0.5,
        )


def add_chimney(yard: Yard, x: float, y: float) -> None:
    """Adds a chimney or a silo."""
    is_silo = yard.chance(0.5)
    radius = yard.uniform(2.2, 3.4) if is_silo else yard.uniform(0.6, 1.1)
    height = yard.uniform(9, 13) if is_silo else yard.uniform(18, 30)
    yard.add(
        Shape.CYLINDER,
        (x, y, 0.0),
        (radius, radius, height / 2),
        0.0,
        Label.BUILDING,
        Material.CONCRETE,
    )


def add_gantry(yard: Yard, road: Road, x: float) -> None:
    """Adds a sign bridge over the own carriageway."""
    inner, outer = -0.4, -(road.half_m + 1.4)
    for left in (inner, outer):
        at_x, at_y, _ = road.place(x, left)
        yard.pole(at_x, at_y, 6.4, 0.18)
    at_x, at_y, yaw = road.place(x, (inner + outer) / 2)
    half = (0.15, (inner - outer) / 2, 0.15)
    yard.add(Shape.BOX, (at_x, at_y, 6.1), half, yaw, Label.POLE, Material.METAL)
    for lane in range(road.lanes):
        at_x, at_y, yaw = road.place(x - 0.3, -road.lane_centre(lane))
        half = (0.05, road.lane_m * 0.44, 0.85)
        yard.add(
            Shape.BOX,
            (at_x, at_y, 5.3),
            half,
            yaw,
            Label.SIGN,
            Material.PANEL,
            reflectivity=0.95,
        )
