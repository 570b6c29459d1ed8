"""What scenes promise: determinism, balance, and switches that move nothing."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from teachonce.demo.errors import DemoError
from teachonce.demo.objects import CLASSES, Objects
from teachonce.demo.samples import DemoSample, make_sample
from teachonce.demo.scenes import SceneOptions, draw_class, draw_scene
from teachonce.demo.streets import SCENE_CLASSES

#: What the fixture ``samples`` is drawn from.
SEED = 7


def _truth_differs(one: DemoSample, other: DemoSample) -> list[str]:
    names = ("seg_HW", "depth_HW", "bev_XY")
    return [n for n in names if not np.array_equal(getattr(one, n), getattr(other, n))]


def _brightness(sample: DemoSample) -> float:
    return float(sample.image_HW3.mean())


@pytest.mark.parametrize("start", [0, 6, 600])
def test_classes_are_balanced_over_every_six(start: int) -> None:
    drawn = [draw_class(3, index) for index in range(start, start + 6)]
    assert sorted(drawn) == list(range(len(SCENE_CLASSES)))


def test_class_order_is_not_the_index() -> None:
    orders = {tuple(draw_class(3, 6 * k + i) for i in range(6)) for k in range(20)}
    assert len(orders) > 15


def test_same_arguments_give_the_same_sample(samples: list[DemoSample]) -> None:
    again = make_sample(SEED, 4, SceneOptions())
    assert again.members() == samples[4].members()


def test_another_seed_or_index_gives_another_scene(samples: list[DemoSample]) -> None:
    pictures = {sample.image_HW3.tobytes() for sample in samples}
    others = [make_sample(SEED + 1, index) for index in range(3)]
    pictures |= {sample.image_HW3.tobytes() for sample in others}
    assert len(pictures) == len(samples) + len(others)
    # Different streets, not only different noise.
    maps = {sample.bev_XY.tobytes() for sample in [*samples, *others]}
    assert len(maps) == len(pictures)


@pytest.mark.parametrize("index", [0, 3, 8])
def test_night_darkens_the_image_and_nothing_else(
    samples: list[DemoSample], index: int
) -> None:
    day, night = samples[index], make_sample(SEED, index, SceneOptions(night=True))
    assert night.scene.is_night
    assert not day.scene.is_night
    assert _brightness(night) < 0.4 * _brightness(day)
    assert np.array_equal(day.points_P5, night.points_P5)
    assert not _truth_differs(day, night)


@pytest.mark.parametrize("index", [0, 3, 8])
def test_fog_shortens_the_lidar_and_leaves_the_truth(
    samples: list[DemoSample], index: int
) -> None:
    clear, fog = samples[index], make_sample(SEED, index, SceneOptions(fog=True))
    assert fog.scene.fog_m is not None
    far = [np.linalg.norm(s.points_P5[:, :3], axis=1).max() for s in (clear, fog)]
    assert far[1] < fog.scene.fog_m
    assert far[1] < 0.95 * far[0]
    assert len(fog.points_P5) < len(clear.points_P5)
    assert fog.image_HW3.std() < 0.85 * clear.image_HW3.std()
    assert not _truth_differs(clear, fog)


def test_lidar_range_is_kept_and_leaves_the_rest(samples: list[DemoSample]) -> None:
    near = make_sample(SEED, 2, SceneOptions(lidar_range_m=20))
    assert np.linalg.norm(near.points_P5[:, :3], axis=1).max() <= 20 + 1e-3
    assert np.array_equal(near.image_HW3, samples[2].image_HW3)
    assert not _truth_differs(near, samples[2])


def test_textures_change_pixels_never_geometry(samples: list[DemoSample]) -> None:
    for index in range(6):
        other = make_sample(SEED, index, SceneOptions(textures="a"))
        mine = samples[index]
        assert not _truth_differs(other, mine)
        assert np.array_equal(other.points_P5, mine.points_P5)
        change = np.abs(other.image_HW3.astype(int) - mine.image_HW3.astype(int))
        assert change.mean() > 5
        for name in (field.name for field in fields(Objects)):
            if name not in ("colour_N3", "accent_N3"):
                one, two = (getattr(s.scene.objects, name) for s in (mine, other))
                assert np.array_equal(one, two), name


def test_probabilities_are_met_and_nested() -> None:
    some, more = SceneOptions(night=0.3, fog=0.5), SceneOptions(night=0.6, fog=0.5)
    drawn = [
        (draw_scene(1, index, some), draw_scene(1, index, more)) for index in range(120)
    ]
    assert 20 <= sum(few.is_night for few, _ in drawn) <= 54
    assert 42 <= sum(few.fog_m is not None for few, _ in drawn) <= 78
    assert all(many.is_night for few, many in drawn if few.is_night)


def test_every_class_of_pixel_occurs(samples: list[DemoSample]) -> None:
    seen = np.unique(np.concatenate([sample.seg_HW.ravel() for sample in samples]))
    assert seen.tolist() == list(range(len(CLASSES)))


def test_nothing_stands_in_the_car_s_way_at_once(samples: list[DemoSample]) -> None:
    for index in range(60):
        scene = draw_scene(SEED, index)
        low = scene.objects.center_N3[:, 2] - scene.objects.half_N3[:, 2] < 2.5
        beyond = np.abs(scene.objects.local(np.zeros(3, np.float32)))
        gap = np.linalg.norm(
            np.maximum(beyond[:, :2] - scene.objects.half_N3[:, :2], 0), axis=1
        )
        assert gap[low].min() > 0.7, (index, scene.cls)


def test_waypoints_follow_the_lane_and_stop_at_red() -> None:
    is_braking_seen = False
    for index in range(120):
        scene = draw_scene(5, index)
        way = np.vstack([[0.0, 0.0], scene.waypoints_W2])
        steps = np.linalg.norm(np.diff(way, axis=0), axis=1)
        assert steps.max() <= 0.5 * scene.street.speed_mps + 0.5
        left = scene.road.left_of(*(axis.astype(np.float32) for axis in way.T))
        assert np.ptp(left) < 0.5
        if scene.street.lead_x_m is not None:
            assert way[-1, 0] < scene.street.lead_x_m - 5
        if scene.street.is_red and scene.road.cross_m is not None:
            is_braking_seen = True
            stop = scene.road.cross_m - scene.road.cross_half_m
            assert way[-1, 0] < stop
    assert is_braking_seen


def test_seg_agrees_with_depth_about_the_sky(samples: list[DemoSample]) -> None:
    for sample in samples:
        assert np.array_equal(sample.seg_HW == 0, sample.depth_HW == 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"night": 1.5}, r"night must be a probability from 0 to 1, got 1\.5"),
        ({"fog": -0.1}, r"fog must be a probability"),
        ({"lidar_range_m": 0.0}, r"lidar_range_m must lie from 1 to 300, got 0\.0"),
        ({"textures": "c"}, r"textures must be one of a, b, got 'c'"),
        ({"height": 3}, r"height must lie from 16 to 2048, got 3"),
    ],
)
def test_unusable_options_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(DemoError, match=message):
        replace(SceneOptions(), **change)  # type: ignore[arg-type]


def test_negative_seed_is_refused() -> None:
    with pytest.raises(DemoError, match=r"seed must lie from 0 to 2\^63 - 1, got -1"):
        draw_scene(-1, 0)
