"""Views: laws of the draw, and its numbers, which must never change."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.views import PhotometricConfig
from pipeline.samples.photometric import Photometric
from pipeline.samples.views import View, View0, ViewPolicy, draw_view, evaluation_box

POLICY = ViewPolicy(
    seed=0,
    scale=(0.4, 1.0),
    ratio=(3 / 4, 4 / 3),
    flips=True,
    yaw_rad=0.5,
    point_scale=(0.9, 1.1),
    view0={"front": "full", "back": "square"},
)
SIDES = st.integers(1, 5000)
LOW = st.floats(0.01, 1.0)


def test_evaluation_boxes() -> None:
    assert evaluation_box((375, 1242), "full") == (0.0, 0.0, 1242.0, 375.0)
    assert evaluation_box((375, 1242), "square") == (433.5, 0.0, 808.5, 375.0)
    assert evaluation_box((7, 4), "square") == (0.0, 1.5, 4.0, 5.5)
    assert evaluation_box((1, 1), "square") == (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="must have pixels"):
        evaluation_box((0, 4), "full")


def test_the_numbers_never_change() -> None:
    """Banks hold these draws; a change of them is a change of every bank."""
    view = draw_view(
        POLICY, "shard-0", "key-0", 1, {"front": (375, 1242), "back": (64, 48)}
    )
    assert view == GOLDEN


@given(
    st.integers(0, 2**64),
    st.text(max_size=20),
    st.integers(1, 10_000),
    st.tuples(SIDES, SIDES),
    st.tuples(LOW, LOW).map(lambda pair: (min(pair), max(pair))),
    st.tuples(st.floats(0.2, 1.0), st.floats(1.0, 5.0)),
    st.sampled_from(["full", "square"]),
)
@settings(max_examples=200, deadline=None)
def test_boxes_are_inside_and_of_the_wanted_area(
    seed: int,
    key: str,
    index: int,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    kind: View0,
) -> None:
    policy = replace(POLICY, seed=seed, scale=scale, ratio=ratio, view0={"a": kind})
    x0, y0, x1, y1 = draw_view(policy, "s", key, index, {"a": size}).boxes["a"]
    w0, h0, w1, h1 = evaluation_box(size, kind)
    assert w0 <= x0 < x1 <= w1
    assert h0 <= y0 < y1 <= h1
    share = (x1 - x0) * (y1 - y0) / ((w1 - w0) * (h1 - h0))
    assert scale[0] * (1 - 1e-9) <= share <= scale[1] * (1 + 1e-9)
    aspect = (x1 - x0) / (y1 - y0) / ((w1 - w0) / (h1 - h0))
    assert ratio[0] * (1 - 1e-9) <= aspect <= ratio[1] * (1 + 1e-9)


@given(st.permutations(range(6)))
def test_draws_do_not_depend_on_their_order_or_on_other_inputs(
    order: list[int],
) -> None:
    sizes = {"front": (375, 1242), "back": (64, 48)}
    expected = [draw_view(POLICY, "s", "k", i, sizes) for i in range(6)]
    for i in order:
        assert (
            draw_view(POLICY, "s", "k", i, dict(reversed(sizes.items()))) == expected[i]
        )
        alone = draw_view(POLICY, "s", "k", i, {"back": (64, 48)})
        assert alone.boxes == {"back": expected[i].boxes["back"]}
        assert (alone.flip, alone.yaw, alone.scale) == (
            expected[i].flip,
            expected[i].yaw,
            expected[i].scale,
        )


def test_view_0_has_no_randomness() -> None:
    for key in ("a", "b"):
        view = draw_view(POLICY, "s", key, 0, {"front": (10, 20), "back": (10, 20)})
        boxes = {"front": (0.0, 0.0, 20.0, 10.0), "back": (5.0, 0.0, 15.0, 10.0)}
        assert view == View(0, False, 0.0, 1.0, boxes)


def test_every_part_of_the_identity_matters() -> None:
    size = {"front": (100, 100)}
    seen = {
        draw_view(replace(POLICY, seed=seed), shard, key, view, size).boxes["front"]
        for seed, shard, key, view in [
            (0, "a", "b", 1),
            (1, "a", "b", 1),
            (0, "ab", "", 1),
            (0, "a", "c", 1),
            (0, "a", "b", 2),
        ]
    }
    assert len(seen) == 5


def test_draws_are_uniform_over_keys() -> None:
    views = [draw_view(POLICY, "s", f"{i:05d}", 1, {}) for i in range(4000)]
    flips = np.array([view.flip for view in views])
    assert abs(flips.mean() - 0.5) < 4 * 0.5 / math.sqrt(len(views))
    for values in (
        np.array([view.yaw for view in views]) + 0.5,
        (np.array([view.scale for view in views]) - 0.9) / 0.2,
    ):
        # Kolmogorov-Smirnov distance to the uniform law; 1.95 is the 0.1 % point.
        distance = np.abs(np.sort(values) - np.arange(len(views)) / len(views)).max()
        assert distance * math.sqrt(len(views)) < 1.95
    neighbours = np.corrcoef(flips[:-1], flips[1:])[0, 1]
    assert abs(neighbours) < 4 / math.sqrt(len(views))


def test_no_flip_unless_allowed() -> None:
    policy = replace(POLICY, flips=False)
    assert not any(draw_view(policy, "s", str(i), 1, {}).flip for i in range(50))


def test_policies_survive_json_exactly() -> None:
    policy = replace(POLICY, yaw_rad=math.radians(22.5), ratio=(3 / 4, 4 / 3))
    assert ViewPolicy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


PHOTOMETRIC = replace(
    POLICY,
    photometric=PhotometricConfig(
        brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grey=0.2, blur=0.5
    ),
)


@given(st.text(max_size=8), st.integers(0, 50))
def test_colour_changes_move_no_geometry(key: str, index: int) -> None:
    sizes = {"front": (375, 1242), "back": (64, 48)}
    plain = draw_view(POLICY, "s", key, index, sizes)
    changed = draw_view(PHOTOMETRIC, "s", key, index, sizes)
    assert plain.photometric is None
    assert replace(changed, photometric=None) == plain
    assert (changed.photometric is None) == (index == 0)


def test_colour_changes_are_one_draw_for_all_inputs() -> None:
    both = draw_view(PHOTOMETRIC, "s", "k", 3, {"front": (9, 9), "back": (64, 48)})
    none = draw_view(PHOTOMETRIC, "s", "k", 3, {})
    assert both.photometric == none.photometric
    assert draw_view(PHOTOMETRIC, "s", "k", 4, {}).photometric != none.photometric


def test_the_numbers_of_colour_changes_never_change() -> None:
    found = draw_view(PHOTOMETRIC, "shard-0", "key-0", 1, {}).photometric
    assert found == GOLDEN_COLOURS


def test_colour_changes_are_uniform_over_keys() -> None:
    views = [draw_view(PHOTOMETRIC, "s", f"{i:05d}", 1, {}) for i in range(3000)]
    found = [view.photometric for view in views if view.photometric is not None]
    assert len(found) == len(views)
    scaled = {
        "brightness": np.array([one.brightness - 0.6 for one in found]) / 0.8,
        "contrast": np.array([one.contrast - 0.6 for one in found]) / 0.8,
        "saturation": np.array([one.saturation - 0.8 for one in found]) / 0.4,
        "hue": np.array([one.hue + 0.1 for one in found]) / 0.2,
        "sigma": np.array(
            [(one.blur_sigma - 0.0005) / 0.0095 for one in found if one.blur_sigma]
        ),
    }
    for name, values in scaled.items():
        steps = np.arange(len(values)) / len(values)
        distance = np.abs(np.sort(values) - steps).max()
        assert distance * math.sqrt(len(values)) < 1.95, name
    assert abs(len(scaled["sigma"]) / 3000 - 0.5) < 4 * 0.5 / math.sqrt(3000)
    grey = np.array([one.grey for one in found])
    assert abs(grey.mean() - 0.2) < 4 * 0.4 / math.sqrt(3000)
    together = np.corrcoef([scaled[name] for name in list(scaled)[:4]])
    assert np.abs(together - np.eye(4)).max() < 4 / math.sqrt(3000)


def test_policies_without_colour_changes_are_written_as_they_were() -> None:
    """Fingerprints of banks are made of this JSON."""
    keys = ["seed", "scale", "ratio", "flips", "yaw_rad", "point_scale", "view0"]
    assert list(POLICY.to_json()) == keys
    assert ViewPolicy.from_json(POLICY.to_json()).photometric is None
    text = json.dumps(PHOTOMETRIC.to_json())
    assert ViewPolicy.from_json(json.loads(text)) == PHOTOMETRIC


def test_an_input_without_a_view_0_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \['left'\]"):
        draw_view(POLICY, "s", "k", 1, {"left": (4, 4)})


GOLDEN = View(
    index=1,
    flip=False,
    yaw=-0.03520814382232218,
    scale=0.9062156223112832,
    boxes={
        "front": (
            237.62844879221402,
            56.16843727589825,
            1098.3189037872212,
            370.45913114605895,
        ),
        "back": (
            1.2043439688658173,
            18.73046125347258,
            42.65202996828372,
            55.97778415595283,
        ),
    },
)

GOLDEN_COLOURS = Photometric(
    brightness=0.6039765845557339,
    contrast=1.3744252637987802,
    saturation=1.0458583237086443,
    hue=0.05221337164500411,
    grey=False,
    blur_sigma=0.0084976922603349,
    solarize_above=256,
)
