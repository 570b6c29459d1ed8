"""How inputs fit views: against closed forms, from plans of small jobs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from manifests.loading import load_job
from pipeline.fits import Fit, fits_of, list_fits
from pipeline.plan import make_plan
from tests.conftest import jpeg, run_cli, write_tar

NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "batch": 4,
    "outputs": {"logits": {}, "patch": {"from": "body"}},
}


@pytest.fixture
def planned(tmp_path, make_job):
    """Plans a job over images of these (height, width) with one teacher."""

    def plan(images, size, preprocess=None, teacher=None, **fields):
        members = [(f"{i:03}.jpg", jpeg(i, *hw)) for i, hw in enumerate(images)]
        write_tar(tmp_path / "data" / "train-00000.tar", members)
        net = {**NET, "sizes": [size], "preprocess": preprocess or {}}
        path = make_job(teachers={"net": teacher or net}, labels={}, **fields)
        return make_plan(load_job(str(path)))

    return plan


def only(plan) -> Fit:
    (fit,) = fits_of(plan)
    return fit


def test_a_wide_box_in_a_square(planned):
    fit = only(planned([(20, 60)] * 3 + [(20, 80)], [16, 16]))
    assert (fit.level, fit.input, fit.size) == ("net/image/16x16", "image", (16, 16))
    assert fit.grids == ((4, 4),)
    assert fit.distortion == pytest.approx(math.log(3))
    assert fit.distortion_max == pytest.approx(math.log(4))
    assert (fit.padding, fit.upsampled_random) == (0, None)
    assert (fit.fit, fit.is_unasked) == ("sizes", True)


def test_what_was_asked_for_is_no_surprise(planned):
    fit = only(planned([(20, 60)], [16, 16], {"fit": "squash"}))
    assert fit.distortion == pytest.approx(math.log(3))
    assert (fit.fit, fit.is_unasked) == ("squash", False)


def test_padding_instead_of_distortion(planned):
    fit = only(planned([(20, 60)], [48, 48], {"fit": "pad"}))
    assert fit.padding == pytest.approx(2 / 3)
    assert fit.distortion == pytest.approx(0)
    # The picture fills 16 x 48 of it: 768 pixels of the image's 1,200.
    assert (fit.upsampled, fit.is_unasked) == (0, False)


def test_images_with_fewer_pixels_are_enlarged(planned):
    # The centred squares have 100, 400, 900 and 576 pixels.
    images = [(10, 12), (20, 22), (30, 30), (24, 26)]
    fit = only(planned(images, [24, 24]))
    assert fit.upsampled == 0.5
    assert fit.distortion == 0


def test_random_views_are_enlarged_by_the_law_of_their_scale(planned):
    views = {"random": 3, "scale": [0.2, 0.7], "ratio": [1, 1]}
    # A share s of 3,600 pixels is below 1,600 where s < 4/9; s is uniform.
    fit = only(planned([(60, 60)] * 16, [40, 40], views=views))
    expected = (4 / 9 - 0.2) / 0.5
    assert fit.upsampled == 0
    assert fit.upsampled_random == pytest.approx(
        expected, abs=4 * 0.5 / math.sqrt(1008)
    )


def test_padding_is_over_all_views(planned):
    """View 0 is a third of the frame; of random views the simulated share."""
    views = {"random": 2, "ratio": [0.5, 2], "seed": 7}
    fit = only(planned([(20, 60)] * 16, [48, 48], {"fit": "pad"}, views=views))
    rng = np.random.default_rng(0)
    share, ratio = rng.uniform(0.4, 1, 40_000), 2 ** rng.uniform(-1, 1, 40_000)
    inside = np.maximum(share * ratio, share / ratio) <= 1
    aspect = 3 * ratio[inside]
    padded = 1 - np.minimum(aspect, 1 / aspect)
    assert fit.padding == pytest.approx((2 / 3 + 2 * padded.mean()) / 3, abs=0.02)


def test_own_geometry_has_no_box(planned):
    own = {
        "model": "timm:test_vit",
        "weights": "random",
        "preprocess": {"geometry": "teacher"},
        "outputs": {"patch": {}},
    }
    fit = only(planned([(20, 60)], [16, 16], teacher=own))
    assert fit == Fit("net/image/160x160", "image", (160, 160), ((10, 10),), "teacher")


def test_inputs_that_were_not_probed_are_left_out(planned):
    plan = planned([(20, 20)], [16, 16])
    assert list_fits(plan.record, {"image": []}) == []


def test_plan_prints_and_warns(planned, tmp_path):
    planned([(20, 60)], [16, 16])
    told = run_cli("plan", tmp_path / "job.yaml")
    assert told.returncode == 0, told.stderr
    line = next(x for x in told.stdout.splitlines() if x.startswith("net/16x16 "))
    assert line.split()[1] == "image"
    assert "4 x 4" in line
    assert f"{100 * math.log(3):.1f} %" in line
    assert "warning  net/image/16x16 distorts image by 109.9 %" in told.stdout
    facts = json.loads(run_cli("plan", tmp_path / "job.yaml", "--json").stdout)
    (fit,) = facts["fits"]
    assert fit["distortion"] == pytest.approx(math.log(3))
    assert fit["grids"] == [[4, 4]]
    asked = run_cli("plan", tmp_path / "job.yaml", "teachers.net.preprocess.fit=squash")
    assert "warning" not in asked.stdout
