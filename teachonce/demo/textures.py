"""Procedural patterns: what each material paints on the points that a camera sees."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.palettes import NOISE_SIZE, Floats, Material, Palette

Ints = NDArray[np.int64]


def grain(palette: Palette, u_P: Floats, v_P: Floats) -> Floats:
    """Returns the grain at surface coordinates in metres, float32 (P,), about -1..1."""
    scale = np.float32(palette.noise_per_m)
    column = np.floor(u_P * scale).astype(np.int32) & (NOISE_SIZE - 1)
    row = np.floor(v_P * scale).astype(np.int32) & (NOISE_SIZE - 1)
    shade_P: Floats = palette.noise()[row, column]
    return shade_P


def scatter(a_P: Ints, b_P: Ints, c_P: Ints) -> Floats:
    """Returns a hash of three integers as float32 in [0, 1), the same everywhere."""
    mixed = (
        a_P.astype(np.uint32) * np.uint32(0x9E3779B1)
        ^ b_P.astype(np.uint32) * np.uint32(0x85EBCA77)
        ^ c_P.astype(np.uint32) * np.uint32(0xC2B2AE3D)
    )
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x2C1B3C6D)
    mixed ^= mixed >> np.uint32(12)
    draw_P: Floats = (mixed >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
    return draw_P


@dataclass
class Surface:
    """P visible points of one material, with what a pattern may ask of them.

    Attributes:
        u_P, v_P: metres across the face, and above the primitive's base.
        unit_P3: position in the unit shape, -1..1.
        half_P3: the primitive's half extents, metres.
        axis_P: the face's axis (0, 1 sides, 2 top), sides and tops of round shapes too.
        which_P: number of the primitive.
        detail_P: 1 near, towards 0 where a pattern is finer than the pixels.
        albedo_P3, accent_P3: the primitive's two colours; the first is painted over.
        glow_P3: light that the point itself sends out; painted over.
    """

    u_P: Floats
    v_P: Floats
    unit_P3: Floats
    half_P3: Floats
    axis_P: Ints
    which_P: Ints
    detail_P: Floats
    albedo_P3: Floats
    accent_P3: Floats
    glow_P3: Floats


def paint(
    surface: Surface, material: Material, palette: Palette, is_night: bool
) -> None:
    """Paints albedo and glow of ``surface`` with the material's pattern."""
    match material:
        case Material.FACADE:
            _facade(surface, palette, is_night)
        case Material.HALL:
            _hall(surface, palette)
        case Material.ROOF:
            _stripes(surface, surface.v_P, 0.35, 0.25)
            _speckle(surface, palette, 0.25)
        case Material.PAINT | Material.CAB:
            _vehicle(surface, material)
        case Material.GLASS:
            _cabin(surface)
        case Material.CARGO:
            _stripes(surface, surface.u_P, 0.6, 0.12)
            surface.albedo_P3[surface.v_P < 0.35] = 0.02
        case Material.CLOTHES:
            is_low = surface.unit_P3[:, 2] < 0
            surface.albedo_P3[is_low] = surface.accent_P3[is_low] * 0.6
        case Material.FOLIAGE:
            _speckle(surface, palette, 0.9)
            _speckle(surface, palette, 0.5, 0.25)
        case Material.SIGN:
            _sign(surface)
        case Material.SIGNAL:
            _signal(surface)
        case Material.LAMP:
            if is_night:
                surface.glow_P3[:] = (1.6, 1.2, 0.7)
        case Material.PANEL:
            _panel(surface)
        case Material.RAIL:
            _stripes(surface, surface.v_P, 0.3, 0.3)
        case Material.SKIN | Material.METAL:
            pass
        case Material.BARK | Material.CONCRETE:
            _stripes(surface, surface.u_P, 2.0, 0.1)
            _speckle(surface, palette, 0.3)


def _speckle(
    surface: Surface, palette: Palette, strength: float, scale: float = 1.0
) -> None:
    shade_P = grain(palette, surface.u_P * scale, surface.v_P * scale)
    surface.albedo_P3 *= (1 + strength * shade_P * surface.detail_P)[:, None]


def _stripes(surface: Surface, at_P: Floats, period_m: float, depth: float) -> None:
    is_groove = np.mod(at_P, period_m) < 0.25 * period_m
    surface.albedo_P3 *= (1 - depth * is_groove * surface.detail_P)[:, None]


def _facade(surface: Surface, palette: Palette, is_night: bool) -> None:
    period_u, period_v, left, right, low, high = palette.window
    _stripes(surface, surface.v_P, palette.joint_m, 0.18)
    _speckle(surface, palette, 0.2)
    column, across = np.divmod(surface.u_P / np.float32(period_u), np.float32(1))
    floor, up = np.divmod(surface.v_P / np.float32(period_v), np.float32(1))
    top_P = 2 * surface.half_P3[:, 2]
    is_side = surface.axis_P != 2
    is_window = (
        is_side
        & (across > left)
        & (across < right)
        & (up > low)
        & (up < high)
        & ((floor + high) * period_v < top_P - 0.2)
        & (surface.half_P3[:, 0] > 1.5)
    )
    is_frame = is_window & (
        (across < left + 0.04)
        | (across > right - 0.04)
        | (np.abs(across - 0.5 * (left + right)) < 0.02)
        | (up < low + 0.04)
    )
    draw_P = scatter(column.astype(np.int64), floor.astype(np.int64), surface.which_P)
    glass_P3 = (0.03 + 0.22 * draw_P[:, None] ** 2) * np.array(
        (0.8, 0.95, 1.15), np.float32
    )
    # A base course and a door now and then: what tells a house from a block.
    is_base = is_side & (surface.v_P < 0.5)
    surface.albedo_P3[is_base] *= 0.6
    is_door = (
        is_side & (surface.v_P < 2.1) & (np.abs(across - 0.5) < 0.2) & (draw_P < 0.3)
    )
    surface.albedo_P3[is_window] = glass_P3[is_window]
    surface.albedo_P3[is_frame] = 0.6
    surface.albedo_P3[is_door] = surface.accent_P3[is_door] * 0.3
    surface.albedo_P3[~is_side] = 0.16
    if is_night:
        is_lit = is_window & ~is_frame & (draw_P > 0.65)
        surface.glow_P3[is_lit] = np.array((0.55, 0.38, 0.16), np.float32)


def _hall(surface: Surface, palette: Palette) -> None:
    _stripes(surface, surface.u_P, 0.5, 0.3)
    _speckle(surface, palette, 0.1)
    is_side = surface.axis_P != 2
    column, across = np.divmod(surface.u_P, np.float32(9.0))
    is_gate = is_side & (across < 4.0) & (surface.v_P < 4.0) & (np.mod(column, 2) == 0)
    surface.albedo_P3[is_gate] = surface.accent_P3[is_gate] * 0.5
    _rib = is_gate & (np.mod(surface.v_P, 0.5) < 0.1)
    surface.albedo_P3[_rib] *= 0.5
    top_P = 2 * surface.half_P3[:, 2]
    is_strip = is_side & (top_P - surface.v_P < 1.5) & (top_P - surface.v_P > 0.7)
    surface.albedo_P3[is_strip] = (0.1, 0.12, 0.14)
    surface.albedo_P3[~is_side] = 0.3


def _vehicle(surface: Surface, material: Material) -> None:
    unit_P3, half_P3 = surface.unit_P3, surface.half_P3
    is_flank = surface.axis_P == 1
    if material is Material.CAB:
        is_glass = (unit_P3[:, 2] > 0.1) & (unit_P3[:, 2] < 0.8)
        is_glass &= (surface.axis_P == 0) | (is_flank & (unit_P3[:, 0] > -0.2))
        surface.albedo_P3[is_glass] = 0.04
    wheel_P = (np.abs(unit_P3[:, 0]) - 0.62) * half_P3[:, 0]
    radius_P = np.hypot(wheel_P, surface.v_P - 0.14)
    surface.albedo_P3[is_flank & (radius_P < 0.36)] = 0.015
    surface.albedo_P3[is_flank & (radius_P < 0.18)] = 0.35
    surface.albedo_P3[(surface.v_P < 0.08) & (surface.axis_P != 2)] = 0.015
    is_end = surface.axis_P == 0
    is_lamp = (
        is_end & (np.abs(unit_P3[:, 1]) > 0.62) & (np.abs(surface.v_P - 0.42) < 0.1)
    )
    is_front = unit_P3[:, 0] > 0
    surface.albedo_P3[is_lamp & is_front] = 0.8
    surface.albedo_P3[is_lamp & ~is_front] = (0.5, 0.01, 0.01)
    surface.glow_P3[is_lamp & is_front] = (1.5, 1.5, 1.4)
    surface.glow_P3[is_lamp & ~is_front] = (0.6, 0.02, 0.02)
    is_plate = (
        is_end & (np.abs(unit_P3[:, 1]) < 0.28) & (np.abs(surface.v_P - 0.3) < 0.07)
    )
    surface.albedo_P3[is_plate] = 0.7


def _cabin(surface: Surface) -> None:
    unit_P3 = surface.unit_P3
    is_flank = surface.axis_P == 1
    is_glass = (surface.axis_P != 2) & (np.abs(unit_P3[:, 2]) < 0.75)
    is_glass &= ~(is_flank & (np.abs(unit_P3[:, 0]) < 0.06))
    is_glass &= ~(is_flank & (np.abs(unit_P3[:, 0]) > 0.92))
    is_glass &= is_flank | (np.abs(unit_P3[:, 1]) < 0.88)
    surface.albedo_P3[is_glass] = (0.03, 0.037, 0.045)
    # The sky's reflection towards the roof, what makes it read as a windscreen.
    surface.albedo_P3[is_glass] += 0.05 * (1 + unit_P3[is_glass, 2:])


def _sign(surface: Surface) -> None:
    across_P, up_P = surface.unit_P3[:, 1], surface.unit_P3[:, 2]
    radius_P = np.hypot(across_P, up_P)
    is_face = surface.axis_P == 0
    is_white = surface.albedo_P3[:, 2] > 0.6 * surface.albedo_P3[:, 0]
    is_white &= surface.albedo_P3[:, 0] > 0.3
    is_rim = is_face & (radius_P > 0.7)
    surface.albedo_P3[is_rim] = (0.7, 0.7, 0.7)
    surface.albedo_P3[is_rim & is_white & (radius_P < 1.05)] = (0.6, 0.02, 0.02)
    is_bar = is_face & (np.abs(up_P) < 0.14) & (np.abs(across_P) < 0.5)
    surface.albedo_P3[is_bar & is_white] = 0.02
    is_arrow = is_face & (np.abs(across_P) < 0.14) & (np.abs(up_P) < 0.5)
    surface.albedo_P3[is_arrow & ~is_white] = 0.75
    surface.albedo_P3[~is_face] = 0.3


def _signal(surface: Surface) -> None:
    up_P, across_P = surface.v_P, surface.unit_P3[:, 1] * surface.half_P3[:, 1]
    is_face = surface.axis_P == 0
    is_red = surface.accent_P3[:, 0] > surface.accent_P3[:, 1]
    height_P = np.where(is_red, np.float32(0.78), np.float32(0.22))
    is_lit = is_face & (np.hypot(up_P - height_P, across_P) < 0.17)
    surface.albedo_P3[is_lit] = surface.accent_P3[is_lit]
    surface.glow_P3[is_lit] = surface.accent_P3[is_lit] * 1.2


def _panel(surface: Surface) -> None:
    is_face = surface.axis_P == 0
    is_rim = np.abs(surface.unit_P3[:, 1:]).max(axis=1) > 0.93
    line, up = np.divmod(surface.v_P, np.float32(0.6))
    word_P = scatter(
        np.floor(surface.u_P / 0.35).astype(np.int64),
        line.astype(np.int64),
        surface.which_P,
    )
    is_text = (up > 0.2) & (up < 0.45) & (word_P > 0.35)
    surface.albedo_P3[is_face & (is_rim | is_text)] = 0.8
    surface.albedo_P3[~is_face] = 0.25
