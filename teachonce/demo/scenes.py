"""Scenes drawn from a seed: what is there, how it is lit, and where the car goes.

A scene is a pure function of (seed, index, options). Each concern draws from its own
counter-based stream, so night, fog, LiDAR range and textures never move an object: the
truth of a scene is the same under every switch.

Frames: *ego* is x forward, y left, z up, its origin on the ground below the LiDAR; the
LiDAR frame is the ego frame lifted by ``Rig.lidar_height_m``; the camera frame is x
right, y down, z forward. Pixel (column 0, row 0) has its centre at (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.errors import DemoError
from teachonce.demo.furniture import Street
from teachonce.demo.ground import Road
from teachonce.demo.objects import Objects, Yard
from teachonce.demo.palettes import FAMILIES, Family, Palette
from teachonce.demo.streets import SCENE_CLASSES, build_street

#: Times of the future waypoints, seconds.
WAYPOINT_S = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)

_HARDEST_MPS2 = 5.0


class Stream(IntEnum):
    """Independent random streams of one scene."""

    CLASS = 0
    LAYOUT = 1
    PAINT = 2
    RIG = 3
    WEATHER = 4
    CAMERA_NOISE = 5
    LIDAR_NOISE = 6
    LOOK = 7


def draw_stream(seed: int, index: int, stream: Stream) -> np.random.Generator:
    """Returns the counter-based generator of one concern of one scene."""
    key = np.array([seed, int(stream)], np.uint64)
    counter = np.array([0, 0, 0, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class SceneOptions:
    """How scenes are drawn and sensed.

    Attributes:
        height, width: of the camera image, pixels.
        rings, azimuths: rays of the LiDAR, up and around.
        night: probability of night; True and False are 1 and 0.
        fog: probability of fog; True and False are 1 and 0.
        lidar_range_m: farthest return.
        textures: texture family; ``a`` is for experts, ``b`` for the demo.
        quality: of the JPEG.
    """

    height: int = 160
    width: int = 320
    rings: int = 32
    azimuths: int = 512
    night: float = 0.0
    fog: float = 0.0
    lidar_range_m: float = 60.0
    textures: Family = "b"
    quality: int = 90

    def __post_init__(self) -> None:
        for name in ("night", "fog"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise DemoError(
                    f"{name} must be a probability from 0 to 1, got {value}; "
                    "give a share of the scenes"
                )
        for name, least, most in (
            ("height", 16, 2048),
            ("width", 16, 4096),
            ("rings", 1, 128),
            ("azimuths", 8, 4096),
            ("lidar_range_m", 1, 300),
            ("quality", 1, 95),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise DemoError(
                    f"{name} must lie from {least} to {most}, got {value}; "
                    "choose another value"
                )
        if self.textures not in FAMILIES:
            raise DemoError(
                f"textures must be one of {', '.join(FAMILIES)}, "
                f"got {self.textures!r}; a is the experts' family, b the demo's"
            )


@dataclass(frozen=True)
class Rig:
    """The calibrated sensors.

    Attributes:
        lidar_height_m: of the LiDAR above the ground.
        intrinsics_33: float64 camera matrix, pixels.
        lidar2cam_44: float64 rigid transform, LiDAR frame to camera frame, metres.
    """

    lidar_height_m: float
    intrinsics_33: NDArray[np.float64]
    lidar2cam_44: NDArray[np.float64]

    @cached_property
    def ego2cam_44(self) -> NDArray[np.float64]:
        """Rigid transform from the ego frame to the camera frame."""
        lift_44 = np.eye(4)
        lift_44[2, 3] = -self.lidar_height_m
        return self.lidar2cam_44 @ lift_44


@dataclass(frozen=True)
class Look:
    """How this day and this camera look; nothing here is geometry.

    Attributes:
        exposure: gain of the camera.
        balance_3: float32 gain of red, green, blue.
        is_overcast: whether clouds hide the sun.
        clouds: how much of the sky they cover, about -0.2 to 0.4.
        ground: albedo gains of asphalt, pavement, terrain.
        dryness: share of straw in the terrain's green, 0 to 0.6.
    """

    exposure: float
    balance_3: NDArray[np.float32]
    is_overcast: bool
    clouds: float
    ground: tuple[float, float, float]
    dryness: float


def _draw_look(seed: int, index: int) -> Look:
    draws = draw_stream(seed, index, Stream.LOOK).random(10)
    asphalt, pavement, terrain = (0.65 + 0.8 * draws[5:8]).tolist()
    return Look(
        exposure=float(0.65 * 2.1 ** draws[0]),
        balance_3=(0.88 + 0.24 * draws[1:4]).astype(np.float32),
        is_overcast=bool(draws[4] < 0.25),
        clouds=float(-0.2 + 0.6 * draws[8]),
        ground=(asphalt, pavement, terrain),
        dryness=float(0.6 * draws[9]),
    )


@dataclass(frozen=True)
class Scene:
    """Everything that is true about one scene, before any sensor looks at it.

    Attributes:
        seed, index, options: what it was drawn from.
        cls: number in ``SCENE_CLASSES``.
        street: road, lamps, traffic.
        objects: what stands there.
        rig: the sensors.
        look: light and colour of the day.
        sun_3: unit vector towards the sun, ego frame.
        is_night: whether it is night.
        fog_m: how far one sees in the fog, metres; None without fog.
        waypoints_W2: float64 (6, 2) where the car will be at ``WAYPOINT_S``, ego frame.
    """

    seed: int
    index: int
    options: SceneOptions
    cls: int
    street: Street
    objects: Objects
    rig: Rig
    look: Look
    sun_3: NDArray[np.float64]
    is_night: bool
    fog_m: float | None
    waypoints_W2: NDArray[np.float64] = field(repr=False)

    @property
    def key(self) -> str:
        """Key of the sample."""
        return f"scene-{self.index:06d}"

    @property
    def road(self) -> Road:
        """The road."""
        return self.street.road

    @property
    def palette(self) -> Palette:
        """The texture family's colours and patterns."""
        return FAMILIES[self.options.textures]

    def stream(self, stream: Stream) -> np.random.Generator:
        """Returns a fresh generator of one concern of this scene."""
        return draw_stream(self.seed, self.index, stream)


def draw_class(seed: int, index: int) -> int:
    """Returns the scene's class; indices 6k to 6k + 5 have each class once."""
    round_number, place = divmod(index, len(SCENE_CLASSES))
    order = draw_stream(seed, round_number, Stream.CLASS).permutation(
        len(SCENE_CLASSES)
    )
    return int(order[place])


def draw_scene(seed: int, index: int, options: SceneOptions | None = None) -> Scene:
    """Returns scene ``index`` of ``seed``.

    Raises:
        DemoError: seed or index is negative or too large.
    """
    options = options or SceneOptions()
    for name, value in (("seed", seed), ("index", index)):
        if not 0 <= value < 2**63:
            raise DemoError(
                f"{name} must lie from 0 to 2^63 - 1, got {value}; choose another value"
            )
    cls = draw_class(seed, index)
    yard = Yard(
        layout=draw_stream(seed, index, Stream.LAYOUT),
        paint=draw_stream(seed, index, Stream.PAINT),
        palette=FAMILIES[options.textures],
    )
    street = build_street(cls, yard)
    # Nobody drives so fast that they would have to brake harder than this.
    street.speed_mps = min(
        street.speed_mps, float(np.sqrt(2 * _HARDEST_MPS2 * _free_m(street)))
    )
    weather = draw_stream(seed, index, Stream.WEATHER)
    night_draw, fog_draw, fog_share, turn, rise = weather.random(5)
    azimuth, elevation = 2 * np.pi * turn, np.radians(28 + 30 * rise)
    return Scene(
        seed=seed,
        index=index,
        options=options,
        cls=cls,
        street=street,
        objects=yard.table(),
        rig=_draw_rig(seed, index, options),
        look=_draw_look(seed, index),
        sun_3=np.array(
            [
                np.cos(elevation) * np.cos(azimuth),
                np.cos(elevation) * np.sin(azimuth),
                np.sin(elevation),
            ]
        ),
        is_night=bool(night_draw < options.night),
        fog_m=float(25 + 45 * fog_share) if fog_draw < options.fog else None,
        waypoints_W2=_drive(street),
    )


def _draw_rig(seed: int, index: int, options: SceneOptions) -> Rig:
    """Draws the calibration: no two cars carry their camera quite alike."""
    draws = draw_stream(seed, index, Stream.RIG).random(9) * 2 - 1
    focal = options.width * (0.62 + 0.05 * draws[0])
    intrinsics_33 = np.array(
        [
            [focal, 0.0, options.width * (0.5 + 0.01 * draws[1])],
            [0.0, focal, options.height * (0.5 + 0.01 * draws[2])],
            [0.0, 0.0, 1.0],
        ]
    )
    yaw, pitch, roll = np.radians(np.array([3.0, 1.8, 1.0]) * draws[3:6])
    turn_33 = _rotation(2, yaw) @ _rotation(1, pitch + np.radians(1.5))
    turn_33 = turn_33 @ _rotation(0, roll)
    axes_33 = np.array([[0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [1.0, 0.0, 0.0]])
    lidar2cam_44 = np.eye(4)
    lidar2cam_44[:3, :3] = axes_33 @ turn_33.T
    place_3 = np.array([0.3, 0.0, -0.15]) + np.array([0.05, 0.06, 0.03]) * draws[6:9]
    lidar2cam_44[:3, 3] = -lidar2cam_44[:3, :3] @ place_3
    return Rig(1.85, intrinsics_33, lidar2cam_44)


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = (axis + 1) % 3, (axis + 2) % 3
    matrix_33 = np.eye(3)
    matrix_33[first, first] = matrix_33[second, second] = cos
    matrix_33[first, second], matrix_33[second, first] = -sin, sin
    return matrix_33


def _free_m(street: Street) -> float:
    """Returns how far the car can go before it has to stand; inf if nothing is ahead.

    It stands 7 m short of the middle of the vehicle ahead, or at the stop line if the
    light is red or somebody crosses.
    """
    road = street.road
    stops = [] if street.lead_x_m is None else [street.lead_x_m - 7.0]
    if (street.is_red or street.has_crosser) and road.cross_m is not None:
        stops.append(road.cross_m - road.cross_half_m - road.stop_m - 2.0)
    return max(1.0, min(stops, default=float("inf")))


def _drive(street: Street) -> NDArray[np.float64]:
    """Returns the waypoints: along the lane, braking evenly for what is ahead.

    The car brakes where standing in time needs more than a gentle 1 m/s^2. So where it
    goes depends on the road's bend, the traffic and the colour of a light, not on its
    speed alone.
    """
    road, speed = street.road, street.speed_mps
    slowing = speed * speed / (2 * _free_m(street))
    slowing = slowing if slowing > 1.0 else 0.0
    zero = np.zeros(1, np.float32)
    own_m = float(road.left_of(zero, zero)[0])
    points, x, step_s = [], 0.0, 0.05
    for tick in range(1, 61):
        x += max(speed, 0.0) * step_s * np.cos(np.arctan(road.slope(x)))
        speed -= slowing * step_s
        if tick % 10 == 0:
            points.append(road.place(x, own_m)[:2])
    return np.array(points)
