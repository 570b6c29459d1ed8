"""The things that stand on a street: one table of upright primitives.

Every primitive is a unit shape (box, ellipsoid, cylinder, gable, cone) scaled by half
extents, turned about the vertical and moved: one transform serves ray casting, shadows,
shading and the map. Cars, trees and people are a few primitives each.

Frame: x forward, y left, z up, metres, origin on the ground below the LiDAR.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.palettes import Material, Palette

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]

#: Per-pixel classes of ``seg.png``, in order of their number. Road, pavement and
#: terrain are one flat plane with one LiDAR reflectivity: only the camera can tell.
CLASSES = (
    "sky",
    "road",
    "marking",
    "pavement",
    "terrain",
    "building",
    "barrier",
    "vehicle",
    "pedestrian",
    "vegetation",
    "pole",
    "sign",
)


class Label(IntEnum):
    """Numbers of ``CLASSES``."""

    SKY = 0
    ROAD = 1
    MARKING = 2
    PAVEMENT = 3
    TERRAIN = 4
    BUILDING = 5
    BARRIER = 6
    VEHICLE = 7
    PEDESTRIAN = 8
    VEGETATION = 9
    POLE = 10
    SIGN = 11


class Shape(IntEnum):
    """Unit shapes, inscribed in the cube from -1 to 1.

    BOX is the cube; GABLE is a roof with its ridge along x at z = 1; CONE has its base
    at z = -1 and its tip at z = 1.
    """

    BOX = 0
    ELLIPSOID = 1
    CYLINDER = 2
    GABLE = 3
    CONE = 4


@dataclass(frozen=True)
class Objects:
    """A table of N primitives.

    Attributes:
        shape_N: ``Shape`` numbers.
        center_N3: float32 centres, metres.
        half_N3: float32 half extents along the own axes, metres.
        yaw_N: float32 turn of the own x axis about z, radians.
        label_N: ``Label`` numbers.
        material_N: ``Material`` numbers.
        colour_N3: float32 linear albedo, 0..1.
        accent_N3: float32 second albedo (trousers, rim, lit lamp), 0..1.
        reflectivity_N: float32 LiDAR reflectivity, 0..1.
    """

    shape_N: Ints
    center_N3: Floats
    half_N3: Floats
    yaw_N: Floats
    label_N: Ints
    material_N: Ints
    colour_N3: Floats
    accent_N3: Floats
    reflectivity_N: Floats

    def __len__(self) -> int:
        return len(self.shape_N)

    def corners(self) -> Floats:
        """Returns the corners of the bounding boxes, float32 (N, 8, 3), metres."""
        unit_83 = np.array(
            [(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32
        )
        local_N83 = unit_83 * self.half_N3[:, None]
        cos_N1, sin_N1 = np.cos(self.yaw_N)[:, None], np.sin(self.yaw_N)[:, None]
        world_N83 = np.empty_like(local_N83)
        world_N83[..., 0] = cos_N1 * local_N83[..., 0] - sin_N1 * local_N83[..., 1]
        world_N83[..., 1] = sin_N1 * local_N83[..., 0] + cos_N1 * local_N83[..., 1]
        world_N83[..., 2] = local_N83[..., 2]
        return world_N83 + self.center_N3[:, None]

    def local(self, point_3: Floats) -> Floats:
        """Returns ``point_3`` in every primitive's own axes, (N, 3), metres."""
        offset_N3 = point_3 - self.center_N3
        cos_N, sin_N = np.cos(self.yaw_N), np.sin(self.yaw_N)
        return np.stack(
            [
                cos_N * offset_N3[:, 0] + sin_N * offset_N3[:, 1],
                cos_N * offset_N3[:, 1] - sin_N * offset_N3[:, 0],
                offset_N3[:, 2],
            ],
            axis=1,
        )


@dataclass
class Yard:
    """Collects primitives; geometry and paint are drawn from separate streams.

    So the same seed gives the same geometry whatever the textures are.
    """

    layout: np.random.Generator
    paint: np.random.Generator
    palette: Palette
    _rows: list[tuple[object, ...]] = field(default_factory=list)

    def uniform(self, low: float, high: float) -> float:
        """Returns the next number of the layout stream in [low, high)."""
        return float(low + (high - low) * self.layout.random())

    def chance(self, probability: float) -> bool:
        """Returns True with ``probability``, from the layout stream."""
        return bool(self.layout.random() < probability)

    def pick(self, material: Material) -> tuple[float, float, float]:
        """Returns a colour of the palette, from the paint stream."""
        return self.palette.pick(material, self.paint.random(2))

    def add(
        self,
        shape: Shape,
        at: tuple[float, float, float],
        half: tuple[float, float, float],
        yaw: float,
        label: Label,
        material: Material,
        colour: tuple[float, float, float] | None = None,
        accent: tuple[float, float, float] | None = None,
        reflectivity: float = 0.35,
    ) -> None:
        """Adds one primitive whose *base* (not centre) is at ``at``."""
        first, second = self.pick(material), self.pick(material)
        self._rows.append(
            (
                int(shape),
                (at[0], at[1], at[2] + half[2]),
                half,
                yaw,
                int(label),
                int(material),
                first if colour is None else colour,
                second if accent is None else accent,
                reflectivity,
            )
        )

    def table(self) -> Objects:
        """Returns all primitives added so far."""
        columns = list(zip(*self._rows, strict=True))
        return Objects(
            shape_N=np.array(columns[0], np.int64),
            center_N3=np.array(columns[1], np.float32),
            half_N3=np.array(columns[2], np.float32),
            yaw_N=np.array(columns[3], np.float32),
            label_N=np.array(columns[4], np.int64),
            material_N=np.array(columns[5], np.int64),
            colour_N3=np.array(columns[6], np.float32),
            accent_N3=np.array(columns[7], np.float32),
            reflectivity_N=np.array(columns[8], np.float32),
        )

    # --- composite things -------------------------------------------------------------

    def car(self, x: float, y: float, yaw: float) -> None:
        """Adds a car: body and cabin, its front towards ``yaw``."""
        length, width = self.uniform(3.7, 4.8), self.uniform(1.7, 1.9)
        body, cabin = self.uniform(0.62, 0.75), self.uniform(0.48, 0.62)
        colour = self.pick(Material.PAINT)
        self.add(
            Shape.BOX,
            (x, y, 0.18),
            (length / 2, width / 2, body / 2),
            yaw,
            Label.VEHICLE,
            Material.PAINT,
            colour,
            reflectivity=0.5,
        )
        shift = -0.06 * length
        self.add(
            Shape.BOX,
            (x + shift * np.cos(yaw), y + shift * np.sin(yaw), 0.18 + body),
            (length * 0.27, width * 0.45, cabin / 2),
            yaw,
            Label.VEHICLE,
            Material.GLASS,
            colour,
            reflectivity=0.3,
        )

    def truck(self, x: float, y: float, yaw: float) -> None:
        """Adds a lorry: cab and cargo box, its front towards ``yaw``."""
        length, height = self.uniform(5.5, 9.0), self.uniform(2.6, 3.3)
        front, back = length / 2, -1.2
        self.add(
            Shape.BOX,
            (x + front * np.cos(yaw), y + front * np.sin(yaw), 0.35),
            (1.0, 1.15, 1.15),
            yaw,
            Label.VEHICLE,
            Material.CAB,
            reflectivity=0.5,
        )
        self.add(
            Shape.BOX,
            (x + back * np.cos(yaw), y + back * np.sin(yaw), 0.5),
            (length / 2, 1.22, height / 2),
            yaw,
            Label.VEHICLE,
            Material.CARGO,
            reflectivity=0.6,
        )

    def pedestrian(self, x: float, y: float) -> None:
        """Adds a person: body and head."""
        height = self.uniform(1.5, 1.85)
        self.add(
            Shape.CYLINDER,
            (x, y, 0.0),
            (0.24, 0.24, (height - 0.24) / 2),
            0.0,
            Label.PEDESTRIAN,
            Material.CLOTHES,
        )
        self.add(
            Shape.ELLIPSOID,
            (x, y, height - 0.26),
            (0.13, 0.13, 0.15),
            0.0,
            Label.PEDESTRIAN,
            Material.SKIN,
        )

    def tree(self, x: float, y: float, scale: float = 1.0) -> None:
        """Adds a broad-leaved tree: trunk and crown."""
        trunk = self.uniform(1.9, 2.8) * scale
        wide, tall = self.uniform(1.4, 2.3) * scale, self.uniform(1.5, 2.6) * scale
        thick = self.uniform(0.13, 0.22)
        self.add(
            Shape.CYLINDER,
            (x, y, 0.0),
            (thick, thick, trunk / 2 + 0.3),
            0.0,
            Label.VEGETATION,
            Material.BARK,
        )
        self.add(
            Shape.ELLIPSOID,
            (x, y, trunk),
            (wide, wide, tall),
            0.0,
            Label.VEGETATION,
            Material.FOLIAGE,
        )

    def conifer(self, x: float, y: float) -> None:
        """Adds a conifer: a trunk and a cone."""
        wide, tall = self.uniform(1.2, 1.9), self.uniform(2.8, 4.5)
        self.add(
            Shape.CYLINDER,
            (x, y, 0.0),
            (0.16, 0.16, 0.7),
            0.0,
            Label.VEGETATION,
            Material.BARK,
        )
        self.add(
            Shape.CONE,
            (x, y, 0.9),
            (wide, wide, tall),
            0.0,
            Label.VEGETATION,
            Material.FOLIAGE,
        )

    def pole(self, x: float, y: float, height: float, thick: float = 0.08) -> None:
        """Adds a slim upright pole."""
        self.add(
            Shape.CYLINDER,
            (x, y, 0.0),
            (thick, thick, height / 2),
            0.0,
            Label.POLE,
            Material.METAL,
        )

    def lamp(
        self, x: float, y: float, yaw: float, side: float
    ) -> tuple[float, float, float]:
        """Adds a street lamp reaching to ``side`` (+1 left); returns its light."""
        height = self.uniform(5.5, 7.0)
        self.pole(x, y, height)
        head = (x - side * 0.7 * np.sin(yaw), y + side * 0.7 * np.cos(yaw))
        self.add(
            Shape.BOX,
            (*head, height - 0.1),
            (0.16, 0.8, 0.08),
            yaw,
            Label.POLE,
            Material.LAMP,
        )
        return (float(head[0]), float(head[1]), height - 0.2)

    def sign(self, x: float, y: float, yaw: float) -> None:
        """Adds a traffic sign on a pole; its face looks back along ``yaw``."""
        height = self.uniform(1.9, 2.4)
        self.pole(x, y, height + 0.3, 0.04)
        self.add(
            Shape.BOX,
            (x - 0.09 * np.cos(yaw), y - 0.09 * np.sin(yaw), height - 0.25),
            (0.03, 0.36, 0.36),
            yaw,
            Label.SIGN,
            Material.SIGN,
            reflectivity=0.95,
        )

    def traffic_light(self, x: float, y: float, yaw: float, is_red: bool) -> None:
        """Adds a traffic light that looks back along ``yaw``."""
        self.pole(x, y, 3.6)
        lit = (1.0, 0.06, 0.03) if is_red else (0.05, 1.0, 0.25)
        self.add(
            Shape.BOX,
            (x - 0.15 * np.cos(yaw), y - 0.15 * np.sin(yaw), 2.5),
            (0.14, 0.2, 0.5),
            yaw,
            Label.SIGN,
            Material.SIGNAL,
            accent=lit,
        )
