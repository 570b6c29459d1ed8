"""`geometry: teacher`: a model's own evaluation transform, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from manifests.job import Job
from pipeline.samples.views import Box, View
from teachers.errors import TeacherError
from teachers.inputs.image import ImageSpec, check_views_of_images
from teachers.inputs.own_transform import (
    OPEN_CLIP,
    TIMM,
    make_transform,
    tell_transform,
)
from teachers.interface import Teacher, TeacherRequest

OWN = {"geometry": "teacher"}
SHAPES = [(500, 375), (300, 451), (97, 64), (224, 224), (640, 90)]
Open = Callable[..., Teacher]


def picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def given_to_model(spec: Any, image: Image.Image) -> torch.Tensor:
    """What a model is given, through a buffer of rows as the engine has it."""
    box: Box = (0.0, 0.0, 1.0, 1.0)
    rows = np.zeros((1, *spec.row_shape), spec.row_dtype)
    rows[0] = spec.prepare(image, View(0, False, 0.0, 1.0, {"image": box}), "image")
    found: torch.Tensor = spec.to_tensor(rows, "cpu", torch.float32)[0]
    return found


@pytest.mark.parametrize(
    "name",
    [
        "test_vit",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "convnext_atto.d2_in1k",
        "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    ],
)
def test_timm_models_are_given_what_timm_gives_them(name: str, open_one: Open) -> None:
    teacher = open_one(
        f"timm:{name}", ["pooled"], device="meta", preprocess=OWN, aspect=1.9
    )
    with torch.device("meta"):
        model = timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    theirs = timm.data.create_transform(**config, is_training=False)
    size = tuple(config["input_size"][1:])
    assert teacher.sizes == (size,)
    spec = teacher.inputs(teacher.sizes[0])["image"]
    assert spec.blank("meta").shape == (1, 3, *size)
    for shape in SHAPES:
        image = picture(*shape)
        assert torch.equal(given_to_model(spec, image), theirs(image)), shape


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-16-SigLIP"])
def test_open_clip_models_are_given_what_open_clip_gives_them(
    name: str, open_one: Open
) -> None:
    teacher = open_one(
        f"open_clip:{name}",
        ["embed"],
        device="meta",
        preprocess=OWN,
        weights="random",
        aspect=1.9,
    )
    # Without a tag's weights: what open_clip records with the first one.
    config = open_clip.get_pretrained_cfg(
        name, open_clip.list_pretrained_tags_by_model(name)[0]
    )
    size = open_clip.get_model_config(name)["vision_cfg"].get("image_size", 224)
    known = {key: config[key] for key in ("mean", "std", "interpolation")}
    cfg = PreprocessCfg(
        size=size,
        **{key: value for key, value in known.items() if value},
        resize_mode=config.get("resize_mode") or "shortest",
    )
    theirs: Any = image_transform_v2(cfg, is_train=False)
    spec = teacher.inputs(teacher.sizes[0])["image"]
    for shape in SHAPES:
        image = picture(*shape)
        assert torch.equal(given_to_model(spec, image), theirs(image)), shape


def test_other_sizes_and_colours_are_given_to_the_transform(open_one: Open) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    teacher = open_one(
        "timm:test_vit",
        ["cls"],
        device="meta",
        sizes=[(96, 160)],
        preprocess={**OWN, "mean": mean, "std": std, "interpolation": "bilinear"},
    )
    spec = teacher.inputs((96, 160))["image"]
    known = timm.data.resolve_data_config(
        {"input_size": (3, 96, 160), "interpolation": "bilinear"},
        pretrained_cfg=timm.get_pretrained_cfg("test_vit").to_dict(),
    )
    theirs = timm.data.create_transform(**{**known, "mean": mean, "std": std})
    image = picture(300, 220)
    assert torch.equal(given_to_model(spec, image), theirs(image))


def test_a_spec_says_what_it_runs_and_older_ones_are_as_they_were(
    open_one: Open,
) -> None:
    plain = open_one("timm:test_vit", ["cls"], device="meta")
    own = open_one("timm:test_vit", ["cls"], device="meta", preprocess=OWN)
    before, after = (one.inputs(one.sizes[0])["image"] for one in (plain, own))
    assert isinstance(after, ImageSpec)
    assert "own" not in before.to_json()
    assert after.to_json()["own"] == after.own
    assert after.own is not None
    assert '"call": "timm.data.create_transform"' in after.own
    assert '"crop_pct"' in after.own
    assert replace(after, own=None) == before
    assert before.geometry != after.geometry
    assert after.row_bytes == 4 * before.row_bytes
    # The same words are the same transform, and specs that have them share pixels.
    assert make_transform(after.own) is make_transform(str(after.own))


@pytest.mark.parametrize(
    ("field", "value"),
    [("fit", "pad"), ("channels", "bgr"), ("range", 255.0), ("divide", 2.0)],
)
def test_what_a_transform_does_not_take_is_refused(
    field: str, value: Any, open_one: Open
) -> None:
    with pytest.raises(TeacherError, match=f"preprocess.{field} has no effect with"):
        open_one("timm:test_vit", ["cls"], preprocess={**OWN, field: value})


def test_a_filter_that_open_clip_does_not_have_is_refused(open_one: Open) -> None:
    preprocess = {**OWN, "interpolation": "lanczos"}
    teacher = open_one(
        "open_clip:ViT-S-32-alt", ["embed"], device="meta", preprocess=preprocess
    )
    with pytest.raises(TeacherError, match=r"open_clip\.image_transform must take"):
        teacher.inputs(teacher.sizes[0])


def test_a_family_without_a_transform_is_refused(
    make_request: Callable[..., TeacherRequest],
) -> None:
    request = make_request("module:net.py:Net", ["logits"], preprocess=OWN)
    with pytest.raises(TeacherError, match="geometry must be view for module"):
        check_views_of_images(request, {"image": ImageSpec(8, 8)})
    check_views_of_images(request, {"image": ImageSpec(8, 8, own="told")})


def test_only_known_calls_are_made() -> None:
    for call in (TIMM, OPEN_CLIP):
        assert call in tell_transform(call, {})
    with pytest.raises(TeacherError, match=r"made by one of .*got 'os.system'"):
        make_transform(tell_transform("os.system", {"command": "true"}))


def test_random_views_are_refused_with_it() -> None:
    def job(random: int) -> Job:
        return Job.model_validate(
            {
                "bank": "b",
                "dataset": {"shards": "a.tar"},
                "inputs": {"image": {"kind": "image", "member": "jpg"}},
                "views": {"random": random},
                "teachers": {
                    "vit": {
                        "model": "timm:test_vit",
                        "preprocess": OWN,
                        "outputs": {"cls": {}},
                    }
                },
            }
        )

    assert job(0).teachers["vit"].preprocess.geometry == "teacher"
    with pytest.raises(ValueError, match="must be view where there are random"):
        job(1)
