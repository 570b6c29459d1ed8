"""The camera's picture of what its rays met: sun and shadow, night, fog, sensor noise.

Works on all hit pixels at once, after the cast: position and normal follow from the
primitive's own axes. P counts pixels.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from teachonce.demo.ground import ground_label
from teachonce.demo.objects import Floats, Label, Objects, Shape
from teachonce.demo.palettes import Material
from teachonce.demo.raycast import GROUND, SKY, CameraGrid, Hits, SunGrid, cast
from teachonce.demo.scenes import Scene, Stream
from teachonce.demo.textures import Surface, grain, paint

#: Beyond this the ground and everything on it melt into the sky, metres.
FARTHEST_M = 250.0

_SHADOW_X_M, _SHADOW_Y_M = (0.0, 64.0), (-32.0, 32.0)
_SHADOW_CELL_M = 0.25
_SUN = np.array((1.15, 1.08, 0.95), np.float32)
_SKYLIGHT = np.array((0.42, 0.46, 0.54), np.float32)
_MOONLIGHT = np.array((0.014, 0.017, 0.026), np.float32)
_HEADLIGHT = np.array((1.0, 0.97, 0.85), np.float32)
_LAMPLIGHT = np.array((1.0, 0.72, 0.38), np.float32)
_FOG_DAY = np.array((0.55, 0.57, 0.6), np.float32)
_FOG_NIGHT = np.array((0.035, 0.035, 0.04), np.float32)
_STRAW = np.array((0.3, 0.25, 0.12), np.float32)
_LEVELS = 4096


def seen_labels(scene: Scene, grid: CameraGrid, hits: Hits) -> NDArray[np.uint8]:
    """Returns the ``Label`` of what each ray of ``grid`` met, uint8 (H, W)."""
    label_HW = np.zeros(grid.shape, np.uint8)
    is_object = hits.object_HW >= 0
    label_HW[is_object] = scene.objects.label_N[hits.object_HW[is_object]]
    is_ground = hits.object_HW == GROUND
    x_P, y_P, _ = _points(grid, hits, is_ground)
    label_HW[is_ground] = ground_label(scene.road, x_P, y_P)
    return label_HW


def shade(
    scene: Scene, grid: CameraGrid, hits: Hits, label_HW: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Returns the camera image, uint8 RGB (H, W, 3)."""
    light_HW3 = _sky(scene, grid)
    is_hit = hits.object_HW != SKY
    object_P = hits.object_HW[is_hit]
    at = _points(grid, hits, is_hit)
    albedo_P3 = np.empty((len(object_P), 3), np.float32)
    normal_P3 = np.zeros_like(albedo_P3)
    glow_P3 = np.zeros_like(albedo_P3)
    range_P = hits.range_HW[is_hit]

    on_ground = object_P == GROUND
    normal_P3[on_ground, 2] = 1
    albedo_P3[on_ground] = _ground_albedo(
        scene, label_HW[is_hit][on_ground], at[0][on_ground], at[1][on_ground]
    )
    on_object = ~on_ground
    _paint_objects(
        scene,
        object_P[on_object].astype(np.int64),
        np.stack([axis[on_object] for axis in at], axis=1),
        range_P[on_object],
        (on_object, albedo_P3, normal_P3, glow_P3),
    )
    lamp = _night_light if scene.is_night else _day_light
    light_P3 = albedo_P3 * lamp(scene, grid, at, normal_P3, range_P)
    light_P3 += glow_P3 if scene.is_night else 0.25 * glow_P3
    haze = _FOG_NIGHT if scene.is_night else _FOG_DAY
    clear_P1 = np.exp(-3 * range_P / np.float32(scene.fog_m or 1800))[:, None]
    if scene.fog_m is None and scene.is_night:
        clear_P1 = np.ones_like(clear_P1)
    light_HW3[is_hit] = light_P3 * clear_P1 + haze * (1 - clear_P1)
    return _expose(scene, light_HW3)


def _points(
    grid: CameraGrid, hits: Hits, chosen_HW: NDArray[np.bool_]
) -> tuple[Floats, Floats, Floats]:
    range_P = hits.range_HW[chosen_HW]
    x, y, z = (
        range_P * direction[chosen_HW] + origin[0, 0]
        for origin, direction in zip(grid.origin, grid.direction, strict=True)
    )
    return x, y, z


def _expose(scene: Scene, light_HW3: Floats) -> NDArray[np.uint8]:
    """Returns the picture for linear light: tone curve, then the sensor's noise."""
    rng = scene.stream(Stream.CAMERA_NOISE)
    gain = scene.look.exposure * (1.5 if scene.is_night else 1.0)
    gain_3 = scene.look.balance_3 * np.float32(gain * _LEVELS / 1.4)
    index_HW3 = np.clip(light_HW3 * gain_3, 0, _LEVELS - 1)
    shown_HW3 = _tone_curve()[index_HW3.astype(np.int32)]
    noise_HW3 = rng.standard_normal(light_HW3.shape, np.float32)
    shown_HW3 += noise_HW3 * np.float32(4.5 if scene.is_night else 1.8)
    image_HW3: NDArray[np.uint8] = np.clip(shown_HW3 + 0.5, 0, 255).astype(np.uint8)
    return image_HW3


@cache
def _tone_curve() -> Floats:
    """Returns 8-bit values for linear light from 0 to 1.4, highlights rolled off."""
    light = np.arange(_LEVELS) / _LEVELS * 1.4
    return (255 * (1 - np.exp(-1.9 * light)) ** (1 / 1.6)).astype(np.float32)


def _sky(scene: Scene, grid: CameraGrid) -> Floats:
    x_HW, y_HW, z_HW = grid.direction
    rise_HW = np.clip(z_HW, 0.0, 1.0)
    if scene.is_night:
        light_HW3 = np.array((0.006, 0.008, 0.016), np.float32) + (
            np.exp(-rise_HW * 12)[..., None]
            * np.array((0.03, 0.022, 0.014), np.float32)
        )
        haze = _FOG_NIGHT
    else:
        zenith, horizon = (np.array(colour, np.float32) for colour in scene.palette.sky)
        share_HW1 = np.exp(-rise_HW * 4)[..., None]
        light_HW3 = zenith + (horizon - zenith) * share_HW1
        over_HW = 1 / (rise_HW + np.float32(0.12))
        shift = np.float32(scene.index % 97)
        noise = scene.palette.noise()
        row = (x_HW * over_HW * 26 + shift * 3).astype(np.int32) & 255
        column = (y_HW * over_HW * 26 + shift * 7).astype(np.int32) & 255
        cloud_HW1 = np.clip(noise[row, column] * 0.7 + scene.look.clouds, 0, 0.6)[
            ..., None
        ]
        light_HW3 += (np.float32(0.82) - light_HW3) * cloud_HW1
        sun = scene.sun_3.astype(np.float32)
        toward_HW = x_HW * sun[0] + y_HW * sun[1] + z_HW * sun[2]
        if scene.look.is_overcast:
            light_HW3 = np.float32(0.55) + 0.2 * (light_HW3 - np.float32(0.6))
        else:
            light_HW3 += (0.5 * np.clip(toward_HW, 0, 1) ** 24)[..., None] * _SUN
        haze = _FOG_DAY
    if scene.fog_m is not None:
        thin_HW1 = np.clip(rise_HW - 0.1, 0, 1)[..., None] * np.float32(0.8)
        light_HW3 = haze + (light_HW3 - haze) * thin_HW1
    return np.asarray(light_HW3, np.float32)


def _ground_albedo(
    scene: Scene,
    label_P: NDArray[np.uint8],
    x_P: Floats,
    y_P: Floats,
) -> Floats:
    palette = scene.palette
    table = np.zeros((len(Label), 3), np.float32)
    table[Label.ROAD], table[Label.MARKING] = palette.asphalt, palette.paint
    table[Label.PAVEMENT], table[Label.TERRAIN] = palette.pavement, palette.terrain
    table[[Label.ROAD, Label.PAVEMENT, Label.TERRAIN]] *= np.array(
        scene.look.ground, np.float32
    )[:, None]
    table[Label.TERRAIN] += scene.look.dryness * (_STRAW - table[Label.TERRAIN])
    albedo_P3 = table[label_P]
    fine_P, coarse_P = grain(palette, x_P, y_P), grain(palette, x_P * 0.13, y_P * 0.13)
    rough = np.zeros(len(Label), np.float32)
    rough[Label.ROAD], rough[Label.PAVEMENT] = 0.16, 0.12
    rough[Label.MARKING], rough[Label.TERRAIN] = 0.12, 0.4
    shade_P = 1 + rough[label_P] * (0.7 * fine_P + 0.6 * coarse_P)
    left_P = scene.road.left_of(x_P, y_P)
    slab = np.float32(palette.slab_m)
    is_joint = (label_P == Label.PAVEMENT) & (
        (np.mod(x_P, slab) < 0.06 * slab + 0.02)
        | (np.mod(left_P, slab) < 0.06 * slab + 0.02)
    )
    shade_P[is_joint] *= 0.75
    # The kerb is a band of paint: the ground is one plane.
    is_kerb = np.abs(np.abs(left_P) - scene.road.half_m - 0.08) < 0.08
    is_kerb &= label_P == Label.PAVEMENT
    albedo_P3[is_kerb] = 0.45
    albedo_P3 *= shade_P[:, None]
    return albedo_P3


def _paint_objects(
    scene: Scene,
    object_P: NDArray[np.int64],
    at_P3: Floats,
    range_P: Floats,
    targets: tuple[NDArray[np.bool_], Floats, Floats, Floats],
) -> None:
    """Writes albedo, normal and glow of the object pixels into the arrays of all."""
    objects = scene.objects
    half_P3 = objects.half_N3[object_P]
    yaw_P = objects.yaw_N[object_P]
    cos_P, sin_P = np.cos(yaw_P), np.sin(yaw_P)
    offset_P3 = at_P3 - objects.center_N3[object_P]
    local_P3 = offset_P3.copy()
    local_P3[:, 0] = cos_P * offset_P3[:, 0] + sin_P * offset_P3[:, 1]
    local_P3[:, 1] = cos_P * offset_P3[:, 1] - sin_P * offset_P3[:, 0]
    unit_P3 = local_P3 / half_P3
    axis_P, normal_P3 = _normals(objects, object_P, unit_P3, half_P3)
    turned_P3 = normal_P3.copy()
    turned_P3[:, 0] = cos_P * normal_P3[:, 0] - sin_P * normal_P3[:, 1]
    turned_P3[:, 1] = sin_P * normal_P3[:, 0] + cos_P * normal_P3[:, 1]

    across_P = np.where(axis_P == 0, local_P3[:, 1], local_P3[:, 0])
    up_P = np.where(axis_P == 2, local_P3[:, 1], local_P3[:, 2] + half_P3[:, 2])
    glow_P3 = np.zeros_like(at_P3)
    albedo_P3 = objects.colour_N3[object_P]
    accent_P3 = objects.accent_N3[object_P]
    detail_P = np.clip(1.25 - range_P / 60, 0.1, 1).astype(np.float32)
    material_P = objects.material_N[object_P]
    for number in np.unique(material_P).tolist():
        here = np.flatnonzero(material_P == number)
        surface = Surface(
            u_P=across_P[here],
            v_P=up_P[here],
            unit_P3=unit_P3[here],
            half_P3=half_P3[here],
            axis_P=axis_P[here],
            which_P=object_P[here],
            detail_P=detail_P[here],
            albedo_P3=albedo_P3[here],
            accent_P3=accent_P3[here],
            glow_P3=glow_P3[here],
        )
        paint(surface, Material(number), scene.palette, scene.is_night)
        albedo_P3[here], glow_P3[here] = surface.albedo_P3, surface.glow_P3
    chosen, all_albedo, all_normal, all_glow = targets
    all_albedo[chosen], all_normal[chosen] = albedo_P3, turned_P3
    all_glow[chosen] = glow_P3


def _normals(
    objects: Objects, object_P: NDArray[np.int64], unit_P3: Floats, half_P3: Floats
) -> tuple[NDArray[np.int64], Floats]:
    """Returns the face's axis and the outward normal, both in the primitive's axes."""
    shape_P = objects.shape_N[object_P]
    size_P3 = np.abs(unit_P3)
    axis_P = np.argmax(size_P3, axis=1)
    sign_P3 = np.sign(unit_P3)
    normal_P3 = np.where(np.arange(3) == axis_P[:, None], sign_P3, 0).astype(np.float32)

    is_round = shape_P == Shape.ELLIPSOID
    normal_P3[is_round] = unit_P3[is_round] / half_P3[is_round]
    axis_P[is_round] = 0

    radius_P = np.hypot(unit_P3[:, 0], unit_P3[:, 1])
    is_wall = (shape_P == Shape.CYLINDER) & (radius_P >= size_P3[:, 2])
    normal_P3[is_wall] = unit_P3[is_wall] / half_P3[is_wall]
    normal_P3[is_wall, 2] = 0
    axis_P[is_wall] = 0

    is_cone = shape_P == Shape.CONE
    normal_P3[is_cone] = unit_P3[is_cone] / half_P3[is_cone]
    normal_P3[is_cone, 2] = (1 - unit_P3[is_cone, 2]) / 4 / half_P3[is_cone, 2]
    axis_P[is_cone] = 0

    slope_P = np.abs(unit_P3[:, 2] + 2 * size_P3[:, 1] - 1)
    is_roof = shape_P == Shape.GABLE
    is_slope = is_roof & (slope_P < np.abs(1 - size_P3[:, 0]))
    axis_P[is_roof] = 0
    axis_P[is_slope] = 1
    normal_P3[is_slope, 0] = 0
    normal_P3[is_slope, 1] = 2 * sign_P3[is_slope, 1] / half_P3[is_slope, 1]
    normal_P3[is_slope, 2] = 1 / half_P3[is_slope, 2]
    normal_P3 /= np.sqrt((normal_P3**2).sum(axis=1, keepdims=True)) + np.float32(1e-9)
    return axis_P, normal_P3


def _day_light(
    scene: Scene,
    _grid: CameraGrid,
    at: tuple[Floats, Floats, Floats],
    normal_P3: Floats,
    _range_P: Floats,
) -> Floats:
    """Returns the light that falls on each point by day, float32 (P, 3)."""
    sun = scene.sun_3.astype(np.float32)
    facing_P = np.clip(normal_P3[:, 0] * sun[0] + normal_P3[:, 1] * sun[1]
                       + normal_P3[:, 2] * sun[2], 0, 1)  # fmt: skip
    direct = np.float32(1.0)
    if scene.fog_m is None and not scene.look.is_overcast:
        facing_P *= 1 - _shadow(scene, at, normal_P3)
    else:
        direct = np.float32(0.3)
    around_P = 0.62 + 0.38 * normal_P3[:, 2]
    light_P3: Floats = (direct * facing_P)[:, None] * _SUN + around_P[
        :, None
    ] * _SKYLIGHT
    return light_P3


def _shadow(
    scene: Scene, at: tuple[Floats, Floats, Floats], normal_P3: Floats
) -> Floats:
    """Returns how much of the sun is hidden at each point, 0 to 1."""
    grid = SunGrid(scene.sun_3, _SHADOW_X_M, _SHADOW_Y_M, _SHADOW_CELL_M, 40.0)
    top_HW = grid.top(cast(grid, scene.objects, 1000.0))
    # Half a step off the surface, or it would lie in its own shadow.
    row_P, column_P = grid.cells(
        at[0] + 0.2 * normal_P3[:, 0], at[1] + 0.2 * normal_P3[:, 1], at[2]
    )
    height, width = grid.shape
    is_covered = (row_P >= 0) & (row_P < height) & (column_P >= 0) & (column_P < width)
    row = np.where(is_covered, row_P, 0).astype(np.int32)
    column = np.where(is_covered, column_P, 0).astype(np.int32)
    is_dark = is_covered & (top_HW[row, column] > at[2] + 0.25 + 0.2 * normal_P3[:, 2])
    return is_dark.astype(np.float32)


def _night_light(
    scene: Scene,
    grid: CameraGrid,
    at: tuple[Floats, Floats, Floats],
    normal_P3: Floats,
    range_P: Floats,
) -> Floats:
    """Returns the light at night: a little sky, two headlights as one cone, lamps."""
    light_P3: Floats = np.tile(_MOONLIGHT, (len(range_P), 1))
    x_P, y_P, z_P = at
    # The beam leaves the bumper level and spreads to the sides more than up and down.
    ahead_P = np.maximum(x_P - 1.5, 0.1)
    side_P, rise_P = y_P / ahead_P, (z_P - 0.65) / ahead_P
    beam_P = np.exp(-((side_P / 0.42) ** 2)) * np.exp(
        -((rise_P / np.where(rise_P > 0, np.float32(0.06), np.float32(0.22))) ** 2)
    )
    beam_P *= (x_P > 1.5) / (1 + (range_P / 14) ** 2)
    facing_P = -(
        normal_P3[:, 0] * x_P + normal_P3[:, 1] * y_P + normal_P3[:, 2] * (z_P - 0.65)
    ) / (range_P + 0.1)
    light_P3 += (1.6 * beam_P * (0.25 + np.clip(facing_P, 0, 1)))[:, None] * _HEADLIGHT
    near = [lamp for lamp in scene.street.lamps if 0 < lamp[0] < 60][:4]
    for lamp in near:
        to = [np.float32(place) - axis for place, axis in zip(lamp, at, strict=True)]
        square_P = to[0] ** 2 + to[1] ** 2 + to[2] ** 2
        facing_P = (
            normal_P3[:, 0] * to[0] + normal_P3[:, 1] * to[1] + normal_P3[:, 2] * to[2]
        ) / np.sqrt(square_P)
        bright_P = (0.15 + np.clip(facing_P, 0, 1)) * (to[2] > -0.5)
        light_P3 += (bright_P * (11 / (12 + square_P)))[:, None] * _LAMPLIGHT
    return light_P3
