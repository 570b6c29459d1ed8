"""Materials and the two texture families: which colours and patterns there are.

Family ``a`` (warm brick, tall windows, green) is what the demo's experts learn from,
``b`` (cool panels, ribbon windows, autumn) is what the demo itself is drawn with, so
that an expert never saw the demo's surfaces. A family changes pixels, never geometry.

All colours are linear light, 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Colour = tuple[float, float, float]
Family = Literal["a", "b"]

NOISE_SIZE = 256


class Material(IntEnum):
    """What a primitive is made of; decides its pattern and its palette."""

    FACADE = 0
    HALL = 1
    ROOF = 2
    PAINT = 3
    GLASS = 4
    CAB = 5
    CARGO = 6
    CLOTHES = 7
    SKIN = 8
    FOLIAGE = 9
    BARK = 10
    METAL = 11
    LAMP = 12
    SIGN = 13
    SIGNAL = 14
    CONCRETE = 15
    RAIL = 16
    PANEL = 17


_CARS: tuple[Colour, ...] = (
    (0.02, 0.02, 0.025),
    (0.65, 0.65, 0.67),
    (0.3, 0.31, 0.33),
    (0.4, 0.02, 0.02),
    (0.02, 0.06, 0.3),
    (0.05, 0.05, 0.06),
    (0.75, 0.74, 0.7),
)
_CLOTHES: tuple[Colour, ...] = (
    (0.5, 0.04, 0.04),
    (0.04, 0.08, 0.35),
    (0.03, 0.03, 0.04),
    (0.55, 0.5, 0.42),
    (0.06, 0.22, 0.1),
    (0.6, 0.42, 0.05),
    (0.1, 0.1, 0.13),
)
_CARGO: tuple[Colour, ...] = (
    (0.7, 0.7, 0.7),
    (0.04, 0.16, 0.4),
    (0.45, 0.1, 0.04),
    (0.55, 0.45, 0.1),
    (0.06, 0.25, 0.14),
)
_SIGNS: tuple[Colour, ...] = ((0.8, 0.8, 0.8), (0.02, 0.12, 0.6), (0.8, 0.6, 0.03))
_SHARED: dict[Material, tuple[Colour, ...]] = {
    Material.PAINT: _CARS,
    Material.CAB: _CARS[1:],
    Material.CARGO: _CARGO,
    Material.CLOTHES: _CLOTHES,
    Material.SKIN: ((0.55, 0.33, 0.24), (0.2, 0.1, 0.06), (0.35, 0.2, 0.13)),
    Material.GLASS: ((0.03, 0.035, 0.045),),
    Material.SIGN: _SIGNS,
    Material.SIGNAL: ((0.02, 0.02, 0.02),),
    Material.LAMP: ((0.25, 0.25, 0.24),),
}


@dataclass(frozen=True)
class Palette:
    """One texture family: colours to choose from and the constants of its patterns.

    Attributes:
        name: ``a`` or ``b``.
        colours: per material, the linear colours to choose from.
        asphalt, pavement, terrain, paint: ground colours.
        window: period across, period up (metres); first and last fraction of the
            period that is glass, across and up.
        joint_m: spacing of the facade's joints (brick courses or panels), metres.
        slab_m: side of a paving slab, metres.
        noise_per_m: frequency of the grain.
        sky: zenith and horizon colour by day.
        noise_key: what the grain is drawn from.
    """

    name: Family
    colours: dict[Material, tuple[Colour, ...]]
    asphalt: Colour
    pavement: Colour
    terrain: Colour
    paint: Colour
    window: tuple[float, float, float, float, float, float]
    joint_m: float
    slab_m: float
    noise_per_m: float
    sky: tuple[Colour, Colour]
    noise_key: int

    def pick(self, material: Material, draws_2: NDArray[np.float64]) -> Colour:
        """Returns a colour for two uniform draws: which one, and how bright."""
        choices = self.colours[material]
        red, green, blue = choices[int(draws_2[0] * len(choices))]
        gain = 0.8 + 0.4 * float(draws_2[1])
        return (red * gain, green * gain, blue * gain)

    def noise(self) -> Floats:
        """Returns the tileable grain, float32 (256, 256), mean 0, about -1..1."""
        return _noise(self.noise_key)


@cache
def _noise(key: int) -> Floats:
    rng = np.random.Generator(np.random.Philox(key=key))
    total = np.zeros((NOISE_SIZE, NOISE_SIZE), np.float64)
    for octave in range(5):
        cells = 16 << octave
        coarse = rng.standard_normal((cells, cells))
        repeat = NOISE_SIZE // cells
        tile = np.kron(coarse, np.ones((repeat, repeat)))
        for axis in (0, 1):
            for shift in range(1, repeat):
                tile += np.roll(np.kron(coarse, np.ones((repeat, repeat))), shift, axis)
        total += tile / tile.std() * 0.7**octave
    total /= total.std() * 2
    return np.clip(total, -1, 1).astype(np.float32)


FAMILIES: dict[Family, Palette] = {
    "a": Palette(
        name="a",
        colours={
            **_SHARED,
            Material.FACADE: (
                (0.38, 0.13, 0.08),
                (0.55, 0.42, 0.26),
                (0.5, 0.28, 0.12),
                (0.62, 0.55, 0.42),
                (0.3, 0.17, 0.12),
            ),
            Material.HALL: ((0.35, 0.4, 0.46), (0.5, 0.5, 0.46), (0.2, 0.3, 0.42)),
            Material.ROOF: ((0.36, 0.1, 0.05), (0.25, 0.08, 0.05), (0.3, 0.16, 0.1)),
            Material.FOLIAGE: (
                (0.06, 0.18, 0.03),
                (0.09, 0.22, 0.04),
                (0.04, 0.13, 0.03),
            ),
            Material.BARK: ((0.13, 0.08, 0.05),),
            Material.METAL: ((0.25, 0.27, 0.28), (0.12, 0.13, 0.13)),
            Material.CONCRETE: ((0.42, 0.41, 0.38),),
            Material.RAIL: ((0.45, 0.47, 0.48),),
            Material.PANEL: ((0.02, 0.12, 0.55), (0.02, 0.25, 0.12)),
        },
        asphalt=(0.085, 0.085, 0.09),
        pavement=(0.33, 0.31, 0.28),
        terrain=(0.1, 0.2, 0.04),
        paint=(0.72, 0.72, 0.7),
        window=(2.4, 3.0, 0.28, 0.72, 0.3, 0.82),
        joint_m=0.4,
        slab_m=0.8,
        noise_per_m=9.0,
        sky=((0.12, 0.28, 0.62), (0.62, 0.74, 0.86)),
        noise_key=101,
    ),
    "b": Palette(
        name="b",
        colours={
            **_SHARED,
            Material.FACADE: (
                (0.5, 0.52, 0.54),
                (0.66, 0.66, 0.62),
                (0.3, 0.36, 0.42),
                (0.42, 0.5, 0.46),
                (0.55, 0.47, 0.48),
            ),
            Material.HALL: ((0.6, 0.6, 0.58), (0.28, 0.36, 0.3), (0.42, 0.26, 0.2)),
            Material.ROOF: ((0.1, 0.1, 0.12), (0.16, 0.15, 0.15), (0.12, 0.15, 0.17)),
            Material.FOLIAGE: (
                (0.2, 0.17, 0.03),
                (0.26, 0.12, 0.03),
                (0.1, 0.14, 0.04),
            ),
            Material.BARK: ((0.2, 0.18, 0.16),),
            Material.METAL: ((0.34, 0.34, 0.33), (0.1, 0.16, 0.13)),
            Material.CONCRETE: ((0.5, 0.47, 0.42),),
            Material.RAIL: ((0.38, 0.37, 0.36),),
            Material.PANEL: ((0.02, 0.22, 0.3), (0.03, 0.08, 0.4)),
        },
        asphalt=(0.13, 0.125, 0.12),
        pavement=(0.36, 0.24, 0.19),
        terrain=(0.22, 0.2, 0.07),
        paint=(0.7, 0.7, 0.66),
        window=(3.4, 3.0, 0.1, 0.9, 0.36, 0.78),
        joint_m=3.0,
        slab_m=0.4,
        noise_per_m=5.0,
        sky=((0.3, 0.4, 0.55), (0.75, 0.76, 0.76)),
        noise_key=202,
    ),
}
