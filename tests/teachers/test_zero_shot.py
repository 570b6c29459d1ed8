"""Zero-shot classifiers, against what open_clip itself makes of the same models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip.factory
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from teachers import zero_shot
from teachers.errors import TeacherError
from teachers.interface import TeacherRequest, WeightsRecord
from teachers.registry import find_weights, open_teacher
from teachers.text_tower import find_tokenizer, make_classifier
from teachers.torch_teacher import TorchTeacher
from teachers.zero_shot import Classifier, check_names, check_templates

Open = Callable[..., TorchTeacher]
Make = Callable[..., TeacherRequest]

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VISION = {
    "image_size": 32,
    "layers": 1,
    "width": 64,
    "patch_size": 16,
    "head_width": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "tiny-clip": {},
    "tiny-clip-quickgelu": {"quick_gelu": True},
    "tiny-custom": {"custom_text": True},
    "tiny-sigmoid": {"custom_text": True, "init_logit_bias": -10},
}
CLASSES = ("car", "traffic light", "Straße {}")
TEMPLATES = ("a photo of a {}.", "itap of the {}.", "{}")


@pytest.fixture(autouse=True)
def tiny_models(tmp_path: Path) -> Iterator[None]:
    """Small models with CLIP's own vocabulary that open_clip knows during a test."""
    before = dict(open_clip.factory._MODEL_CONFIGS)
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, more in MODELS.items():
        config = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT, **more}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    yield
    open_clip.factory._MODEL_CONFIGS = before
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths


def whole(name: str, path: Path) -> Any:
    """A model with random weights, its scale and bias moved, saved for us to load."""
    torch.manual_seed(11)
    model: Any = open_clip.create_model(name).eval()
    with torch.no_grad():
        model.logit_scale.fill_(3.25)
        if model.logit_bias is not None:
            model.logit_bias.fill_(-7.5)
    torch.save({"state_dict": model.state_dict()}, path)
    return model


def made(make_request: Make, name: str, **config: Any) -> Classifier:
    request = make_request(f"open_clip:{name}", ["embed"], **config)
    weights = find_weights(request)
    return make_classifier(request, weights, find_tokenizer(name), CLASSES, TEMPLATES)


@pytest.mark.parametrize("name", list(MODELS))
def test_weights_are_open_clips_own(
    name: str, tmp_path: Path, make_request: Make
) -> None:
    model = whole(name, tmp_path / "whole.pt")
    found = made(make_request, name, weights="whole.pt")
    templates = [lambda c, t=text: t.replace("{}", c) for text in TEMPLATES]
    expected = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(name), CLASSES, templates
    )
    np.testing.assert_allclose(found.weight, expected.T.numpy(), atol=1e-6)
    assert found.scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)
    assert found.bias == (-7.5 if name == "tiny-sigmoid" else 0.0)
    data = (tmp_path / "whole.pt").read_bytes()
    assert found.weights_sha256 == hashlib.sha256(data).hexdigest()
    assert (found.classes, found.templates) == (CLASSES, TEMPLATES)
    assert found.model == f"open_clip:{name}"


def test_random_weights_have_the_models_first_scale_and_bias(
    make_request: Make,
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = made(make_request, "tiny-sigmoid")
    again = made(make_request, "tiny-sigmoid")
    assert torch.equal(torch.get_rng_state(), before)
    assert found.to_bytes() == again.to_bytes()
    assert found.scale == pytest.approx(1 / 0.07)
    assert found.bias == -10
    assert found.weights_sha256 == ""


def test_file_is_safetensors_and_comes_back(tmp_path: Path, make_request: Make) -> None:
    classifier = made(make_request, "tiny-sigmoid")
    path = tmp_path / "zero.safetensors"
    path.write_bytes(classifier.to_bytes())
    tensors = load_file(path)
    assert set(tensors) == {"weight", "scale", "bias"}
    np.testing.assert_array_equal(tensors["weight"], classifier.weight)
    assert tensors["scale"].shape == tensors["bias"].shape == ()
    with safe_open(path, "np") as file:
        told = file.metadata()
    assert json.loads(told["classes"]) == list(CLASSES)
    assert json.loads(told["templates"]) == list(TEMPLATES)
    assert told["model"] == "open_clip:tiny-sigmoid"
    found = zero_shot.read_classifier(str(path), "o")
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.classes == CLASSES
    assert found.to_json()["channels"] == 24
    np.testing.assert_array_equal(found.weight, classifier.weight)
    assert found.scale == pytest.approx(classifier.scale, rel=1e-6)


def test_default_templates_are_those_of_clip_for_cifar() -> None:
    plain = [
        "a photo of a {}.",
        "a blurry photo of a {}.",
        "a black and white photo of a {}.",
        "a low contrast photo of a {}.",
        "a high contrast photo of a {}.",
        "a bad photo of a {}.",
        "a good photo of a {}.",
        "a photo of a small {}.",
        "a photo of a big {}.",
    ]
    definite = [text.replace("photo of a", "photo of the") for text in plain]
    assert list(zero_shot.CIFAR_TEMPLATES) == plain + definite


def stored(folder: Path, classifier: Classifier) -> str:
    (folder / "zero.safetensors").write_bytes(classifier.to_bytes())
    return "zero.safetensors"


def logits_of(path: str, **more: Any) -> dict[str, Any]:
    return {"embed": {}, "logits": {"classifier": path, **more}}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny-clip", "tiny-sigmoid"])
def test_logits_are_those_of_the_whole_model(
    name: str, precision: str, tmp_path: Path, make_request: Make, open_one: Open
) -> None:
    model = whole(name, tmp_path / "whole.pt")
    path = stored(tmp_path, made(make_request, name, weights="whole.pt"))
    teacher = open_one(
        f"open_clip:{name}", logits_of(path), weights="whole.pt", precision=precision
    )
    dtype = getattr(torch, precision)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    found = teacher.forward({"image": image.to(dtype)}, (32, 32))
    spec = teacher.outputs((32, 32))["logits"]
    assert (spec.shape, spec.dtype) == ((3,), "float32")
    assert list(found) == ["embed", "logits"]
    assert found["embed"].dtype == dtype
    assert found["logits"].dtype == torch.float32
    embed = found["embed"].to(torch.float64).numpy()
    embed /= np.linalg.norm(embed, axis=1, keepdims=True)
    held = zero_shot.read_classifier(str(tmp_path / path), "o")
    expected = held.scale * embed @ held.weight.T.astype(np.float64) + held.bias
    np.testing.assert_allclose(found["logits"].numpy(), expected, atol=1e-4)
    if precision == "float32":
        with torch.inference_mode():
            unit = model.encode_image(image, normalize=True)
            own = model.logit_scale.exp() * unit @ torch.from_numpy(held.weight).T
            own = (own + held.bias).numpy()
        np.testing.assert_allclose(found["logits"].numpy(), own, atol=1e-5)


def test_embed_need_not_be_asked_for(
    tmp_path: Path, make_request: Make, open_one: Open
) -> None:
    path = stored(tmp_path, made(make_request, "tiny-clip"))
    both = open_one("open_clip:tiny-clip", logits_of(path))
    alone = open_one("open_clip:tiny-clip", {"logits": {"classifier": path}})
    image = {"image": torch.ones(1, 3, 32, 32)}
    found = alone.forward(image, (32, 32))
    assert list(found) == ["logits"]
    assert torch.equal(found["logits"], both.forward(image, (32, 32))["logits"])
    assert alone.facts.to_json()["classifiers"]["logits"]["classes"] == list(CLASSES)
    assert (
        "classifiers" not in open_one("open_clip:tiny-clip", ["embed"]).facts.to_json()
    )


SIGLIP = "timm:vit_base_patch16_siglip_224"
SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2}


def test_timm_towers_take_a_classifier_too(
    tmp_path: Path, make_request: Make, open_one: Open
) -> None:
    path = stored(tmp_path, made(make_request, "tiny-sigmoid"))
    teacher = open_one(SIGLIP, {"pooled": {}, **logits_of(path)}, args=SMALL)
    found = teacher.forward({"image": torch.randn(2, 3, 224, 224)}, (224, 224))
    pooled = found["pooled"].numpy()
    held = zero_shot.read_classifier(str(tmp_path / path), "o")
    unit = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    expected = held.scale * unit @ held.weight.T + held.bias
    np.testing.assert_allclose(found["logits"].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (
            SIGLIP,
            {**SMALL, "embed_dim": 32},
            r"must have the 32 channels of this model's embed, got 24, made by "
            r"open_clip:tiny-clip",
        ),
        ("timm:test_vit", {}, "no contrastive projection"),
    ],
)
def test_towers_that_do_not_fit_a_classifier(
    tmp_path: Path,
    make_request: Make,
    open_one: Open,
    model: str,
    args: dict[str, Any],
    message: str,
) -> None:
    path = stored(tmp_path, made(make_request, "tiny-clip"))
    teacher = open_one(model, {"logits": {"classifier": path}}, args=args)
    with pytest.raises(TeacherError, match=message):
        teacher.outputs(teacher.sizes[0])


def test_a_classifier_of_other_weights_than_the_tags_is_refused(
    tmp_path: Path, make_request: Make
) -> None:
    whole("tiny-clip", tmp_path / "whole.pt")
    classifier = made(make_request, "tiny-clip", weights="whole.pt")
    path = stored(tmp_path, classifier)
    request = make_request(
        "open_clip:ViT-B-32", {"logits": {"classifier": path}}, weights="openai"
    )
    record = WeightsRecord("pretrained", sha256="ab" * 32)
    with pytest.raises(
        TeacherError,
        match=rf"weights of this teacher, abababababab, got one of "
        rf"{classifier.weights_sha256[:12]} \(open_clip:tiny-clip\).*--weights openai",
    ):
        open_teacher(request, record, "meta")


@pytest.mark.parametrize(
    ("model", "outputs", "message"),
    [
        ("module:./a.py:B", {"x": {"classifier": "c"}}, "for the logits of timm: and"),
        ("open_clip:tiny-clip", {"embed": {"classifier": "c"}}, "for the logits of"),
        (
            "open_clip:tiny-clip",
            {"logits": {"classifier": "c", "norm": "post"}},
            "neither norm nor pool",
        ),
        (
            "open_clip:tiny-clip",
            {"logits": {"classifier": "./gone.safetensors"}},
            r"outputs\.logits\.classifier must be a file that can be read.*--classes",
        ),
        ("open_clip:tiny-clip", {"logits": {}}, "logits.*needs `classifier: FILE`"),
    ],
)
def test_jobs_that_are_refused(
    open_one: Open, model: str, outputs: dict[str, Any], message: str
) -> None:
    with pytest.raises(TeacherError, match=message):
        open_one(model, outputs).outputs((32, 32))


GOOD = {
    "weight": np.eye(2, 3, dtype=np.float32),
    "scale": np.array(2.0, np.float32),
    "bias": np.array(0.0, np.float32),
}
TOLD = {
    "classes": '["a", "b"]',
    "templates": '["{}"]',
    "model": "open_clip:x",
    "weights_sha256": "",
}


@pytest.mark.parametrize(
    ("tensors", "told", "message"),
    [
        ({k: v for k, v in GOOD.items() if k != "bias"}, TOLD, "KeyError: 'bias'"),
        (GOOD, {}, "KeyError: 'classes'"),
        (GOOD, {**TOLD, "classes": "a, b"}, "JSONDecodeError"),
        (GOOD, {**TOLD, "classes": '["a"]'}, r"\[2, 3\] for 1 classes"),
        ({**GOOD, "weight": np.eye(2)}, TOLD, "float64"),
        ({**GOOD, "scale": np.array(np.inf, np.float32)}, TOLD, "must be finite"),
        ({**GOOD, "weight": np.full((2, 3), np.nan, np.float32)}, TOLD, "be finite"),
    ],
)
def test_files_that_are_no_classifier(
    tmp_path: Path, tensors: dict[str, Any], told: dict[str, str], message: str
) -> None:
    path = tmp_path / "z.safetensors"
    save_file(tensors, path, told)
    with pytest.raises(TeacherError, match=rf"t\.logits\.classifier .*{message}"):
        zero_shot.read_classifier(str(path), "t.logits")
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(TeacherError, match="SafetensorError"):
        zero_shot.read_classifier(str(path), "t.logits")


def test_a_tower_alone_makes_no_classifier(tmp_path: Path, make_request: Make) -> None:
    model = whole("tiny-clip", tmp_path / "whole.pt")
    torch.save(model.visual.state_dict(), tmp_path / "tower.pt")
    with pytest.raises(TeacherError, match="must hold the text tower and logit_scale"):
        made(make_request, "tiny-clip", weights="tower.pt")


def test_a_file_of_another_model_makes_none(tmp_path: Path, make_request: Make) -> None:
    model = whole("tiny-custom", tmp_path / "whole.pt")
    state = model.state_dict()
    del state["text.ln_final.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(TeacherError, match=r"1 missing \(ln_final.weight\)"):
        made(make_request, "tiny-custom", weights="less.pt")


def test_tokenizers_of_the_hub_say_how_to_fetch_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(name: str) -> None:
        raise OSError("cannot reach the hub\nmore")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(TeacherError) as raised:
        find_tokenizer("ViT-B-16-SigLIP2")
    for part in (
        "timm/ViT-B-16-SigLIP2: cannot reach the hub)",
        "pip install transformers",
        "hf download timm/ViT-B-16-SigLIP2",
        "models--timm--ViT-B-16-SigLIP2",
        "gs://",
    ):
        assert part in str(raised.value)


def test_names_and_templates_of_files() -> None:
    assert check_names([" a ", "", "b c"], "f") == ("a", "b c")
    assert check_templates(["x {}", ""], "f") == ("x {}",)
    for lines, message in ((["a"], "two or more"), (["a", "b", "a"], "'a' more than")):
        with pytest.raises(TeacherError, match=message):
            check_names(lines, "f")
    for lines in ([], ["a photo"], ["{} of {}"]):
        with pytest.raises(TeacherError, match=r"must hold \{\} once"):
            check_templates(lines, "f")


def test_embeddings_without_a_direction_are_refused() -> None:
    with pytest.raises(TeacherError, match="finite and not zero"):
        zero_shot.make_weight(np.zeros((2, 4), np.float32), 1)
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0]], np.float32)
    with pytest.raises(TeacherError, match="finite and not zero"):
        zero_shot.make_weight(opposite, 2)
