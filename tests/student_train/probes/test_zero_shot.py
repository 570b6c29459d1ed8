"""Zero-shot: a stored classifier reads what teachers give, and what heads give back."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import open_clip.factory
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from manifests.errors import BankError
from manifests.loading import load_job
from manifests.recipe import Recipe
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from student_train.errors import TrainingError
from student_train.probes.features import AsItIs, Ask, collect
from student_train.probes.protocol import ProbeRun
from student_train.probes.splits import ClassSplit
from student_train.probes.zero_shot import zero_shot_probe
from student_train.trainer import Trainer
from teachers.zero_shot import Classifier
from teachonce.verbs.probe import print_result
from tests import probing
from tests.conftest import jpeg, write_job, write_tar

SAMPLES, CLASSES, CHANNELS = 48, 8, 24
EMBED = "clip/image/32x32/embed"
STUDENT = {**probing.STUDENT, "args": {**probing.STUDENT["args"], "img_size": [32, 32]}}
RANDOM = "random:vit_tiny_patch16_224"
MODEL = {
    "embed_dim": CHANNELS,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 64,
        "patch_size": 16,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}


def write_samples(folder: Path, labels: np.ndarray) -> None:
    members = []
    for number, label in enumerate(labels.tolist()):
        key = f"s-{number:04d}"
        members.append((f"{key}.jpg", jpeg(number, 32, 32)))
        members.append((f"{key}.cls", str(label).encode()))
    write_tar(folder / "data" / "train-00000.tar", members)


def make_bank(folder: Path, outputs: dict[str, Any]) -> Path:
    job = write_job(
        folder,
        labels={
            "class": {"member": "cls", "num_classes": CLASSES},
            "other": {"member": "cls", "num_classes": CLASSES + 1},
            "number": {"member": "cls"},
        },
        teachers={
            "clip": {
                "model": "open_clip:tiny-probed",
                "weights": "random:3",
                "outputs": outputs,
            },
            "net": {
                "model": "module:./nets.py:Net",
                "weights": "random:1",
                "sizes": [[16, 16]],
                "outputs": {"logits": {}},
            },
        },
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder / "bank"


def values_of(url: Path, path: str) -> np.ndarray:
    bank = open_bank(str(url))
    blocks = [bank.read(path, block) for block in range(SAMPLES // 8)]
    return np.concatenate(blocks).astype(np.float64)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A bank whose labels are the teacher's own answers, but in every fourth row."""
    folder = tmp_path_factory.mktemp("zero")
    configs = dict(open_clip.factory._MODEL_CONFIGS)
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny-probed.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / "configs")
    (folder / "first").mkdir()
    write_samples(folder / "first", np.zeros(SAMPLES, int))
    first = make_bank(folder / "first", {"embed": {}})
    embed = values_of(first, EMBED)
    # Around the embeddings' mean, so that all classes are answered.
    rng = np.random.default_rng(4)
    weight = unit(embed.mean(0) + rng.normal(0, 0.3, (CLASSES, CHANNELS)))
    classifier = Classifier(
        weight=weight.astype(np.float32),
        scale=20.0,
        bias=-3.0,
        classes=tuple("abcdefgh"),
        templates=("{}",),
        model="open_clip:tiny-probed",
        weights_sha256="",
    )
    (folder / "classes.safetensors").write_bytes(classifier.to_bytes())
    answers = (unit(embed) @ weight.T).argmax(1)
    assert len(set(answers.tolist())) > 3
    labels = np.where(np.arange(SAMPLES) % 4 == 0, (answers + 1) % CLASSES, answers)
    write_samples(folder, labels)
    logits = {"classifier": "../classes.safetensors", "encoding": "lossless"}
    (folder / "second").mkdir()
    (folder / "data").rename(folder / "second" / "data")
    second = make_bank(folder / "second", {"embed": {}, "logits": logits})
    yield second, weight, labels
    open_clip.factory._MODEL_CONFIGS = configs
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths


def make_run(url: Path, folder: Path, loss: dict[str, float], **target: Any) -> Path:
    """A run that is done, with heads as drawn; see `save_heads`."""
    run = probing.make_run(url, folder, args=STUDENT["args"])
    record = json.loads((run / "run.json").read_text())
    head = {"kind": "linear"}
    fields = {"from": "main/clip/embed", "head": head, "loss": loss, **target}
    label = {"from": "main/labels/class", "loss": {"cross_entropy": 1}}
    targets = {"class": label, "text": fields}
    recipe = Recipe.model_validate({**record["recipe"], "targets": targets})
    record["recipe"] = recipe.model_dump(mode="json", by_alias=True)
    (run / "run.json").write_text(json.dumps(record))
    return run


def probe_of(folder: Path, url: Path, run: Path | None, **more: Any) -> ProbeRun:
    splits = {
        "fit": {"share": [0, 0.2]},
        "choose": {"share": [0.2, 0.6]},
        "test": {"share": [0.6, 1]},
    }
    fields: dict[str, Any] = {
        "data": {},
        "splits": splits,
        "students": {} if run is None else {"mine": str(run)},
        "teachers": {"clip": ["clip/embed"]},
        "probes": {"p": {"label": "main/labels/class", "classifier": "clip/logits"}},
        **more,
    }
    return ProbeRun(probing.probe_of(folder, url, **fields))


def scores_of(asked: ProbeRun) -> dict[str, Any]:
    (found,) = asked.run().probes
    return {one.model: one for one in found.scores}


def fit_head(url: Path, run: Path, folder: Path, scale: float = 1.0) -> None:
    """Solves the head of ``text`` for the rows of test, which are fewer than weights.

    It gives their embeddings, standardised by hand, times ``scale``.
    """
    save_file({}, run / "heads.safetensors")
    asked = probe_of(folder, url, run, probes={"p": {"label": "main/labels/class"}})
    (question,) = asked.questions
    rows = question.rows["test"]
    ask = Ask("cls", AsItIs(), {"test": rows})
    (found,) = collect(question.lines[0].source, [ask])
    cls = np.c_[found["test"].double().numpy(), np.ones(len(rows))]
    embed = values_of(url, EMBED)
    mean, std = embed.mean(0), embed.std(0)
    wanted = scale * (embed[rows] - mean) / std
    solved = np.linalg.lstsq(cls, wanted, rcond=None)[0]
    assert np.abs(cls @ solved - wanted).max() < 1e-3 * scale
    state = {
        "text.linear.weight": torch.from_numpy(solved[:-1].T).float().contiguous(),
        "text.linear.bias": torch.from_numpy(solved[-1]).float(),
        "text.normaliser.mean": torch.from_numpy(mean).float(),
        "text.normaliser.std": torch.from_numpy(std).float(),
        "class.linear.bias": torch.zeros(3),
    }
    save_file(state, run / "heads.safetensors")


def test_the_teacher_is_right_where_the_labels_are_its_own(world, tmp_path, capsys):
    url, _, labels = world
    asked = probe_of(tmp_path, url, None)
    (question,) = asked.questions
    assert question.rows.keys() == {"test"}
    rows = question.rows["test"]
    scores = scores_of(asked)
    score = scores["clip"].score
    assert score.value == np.mean(rows % 4 != 0)
    assert (scores["clip"].kind, scores["clip"].features) == ("zero_shot", EMBED)
    embed, weight = values_of(url, EMBED)[rows], world[1]
    best5 = np.argsort(-unit(embed) @ weight.T, axis=1)[:, :5]
    expected = (best5 == labels[rows, None]).any(1).mean()
    assert score.details["top5_accuracy"] == expected < 1
    assert score.details["chance"] == 1 / CLASSES
    result = asked.run()
    (held,) = result.to_json()["probes"].values()
    assert (held["splits"].keys(), held["scores"][0]["setting"]) == ({"test"}, {})
    assert held["scores"][0]["choose_value"] is None
    print_result(result)
    shown = capsys.readouterr().out
    assert f"on test {len(rows)} rows" in shown
    assert "zero-shot accuracy  zero-shot top5 accuracy" in shown
    assert "chance: 0.1250" in shown
    # The logits that the bank holds say the same.
    logits = values_of(url, "clip/image/32x32/logits")[rows]
    assert (logits.argmax(1) == labels[rows]).mean() == score.value


@pytest.mark.parametrize("loss", [{"mse": 1.0}, {"cosine": 0.9, "smooth_l1": 0.1}])
def test_a_head_that_gives_the_embeddings_scores_as_the_teacher(world, tmp_path, loss):
    url, _, _ = world
    run = make_run(url, tmp_path / "run", loss)
    fit_head(url, run, tmp_path)
    scores = scores_of(probe_of(tmp_path, url, run))
    assert list(scores) == ["mine", RANDOM, "clip"]
    assert scores["mine"].features == "head text"
    assert scores["mine"].score.value == scores["clip"].score.value > 0.6
    assert scores[RANDOM].score.value < scores["mine"].score.value


def test_lengths_count_only_where_a_loss_sees_them(world, tmp_path):
    """Far too long predictions: a cosine cannot tell, so they are brought back."""
    url, weight, labels = world
    values = {}
    for name in ("cosine", "mse"):
        run = make_run(url, tmp_path / name, {name: 1.0})
        for scale in (1.0, 0.02):
            fit_head(url, run, tmp_path, scale)
            values[name, scale] = scores_of(probe_of(tmp_path, url, run))["mine"]
    found = {key: one.score.value for key, one in values.items()}
    assert found["cosine", 1.0] == found["cosine", 0.02]
    assert found["mse", 1.0] > found["mse", 0.02]
    # By hand: directions of the standardised embeddings, of length sqrt(24).
    rows = probe_of(tmp_path, url, None).questions[0].rows["test"]
    embed = values_of(url, EMBED)
    mean, std = embed.mean(0), embed.std(0)
    drawn = unit((embed[rows] - mean) / std) * math.sqrt(CHANNELS) * std + mean
    right = (unit(drawn) @ weight.T).argmax(1) == labels[rows]
    assert found["cosine", 1.0] == right.mean()


@pytest.mark.parametrize("kind", ["adapter", "ladder", "transformer"])
def test_what_a_run_has_trained_is_looked_through(world, tmp_path, kind):
    """The trainer's own file of heads, read back: as its objective predicts."""
    url, weight, labels = world
    embed = {"from": "main/clip/embed", "loss": {"cosine": 1, "mse": 0.1}}
    recipe = Recipe.model_validate(
        {
            "run": str(tmp_path / "run"),
            "banks": {"main": str(url)},
            "data": {"rows": {"share": [0, 0.5]}},
            "student": {**STUDENT, "args": {**STUDENT["args"], "depth": 2}},
            "targets": {
                "text": {**embed, "head": {"kind": kind}},
                "again": {**embed, "head": {"same_as": "text"}},
            },
            "stages": [{"steps": 2, "batch": 8, "lr": 1.0e-2}],
            "engine": {"device": "cpu"},
        }
    )
    trainer = Trainer(recipe)
    trainer.run()
    asked = probe_of(tmp_path, url, tmp_path / "run")
    rows = asked.questions[0].rows["test"]
    line = asked.questions[0].lines[0]
    (found,) = collect(line.source, [line.ask({"test": rows})])
    student, objective = trainer.modules.student.eval(), trainer.modules.objective
    pixels = [
        np.asarray(Image.open(io.BytesIO(jpeg(row, 32, 32)))) for row in rows.tolist()
    ]
    with torch.inference_mode():
        features = student(torch.from_numpy(np.stack(pixels)), layers=True)
        task = objective.tasks[0]
        made = objective.predict(task, features, None, (32, 32))[0].double().numpy()
    values = values_of(url, EMBED)
    expected = made * values.std(0) + values.mean(0)
    np.testing.assert_allclose(found["test"], expected, atol=1e-4)
    right = (unit(expected) @ weight.T).argmax(1) == labels[rows]
    assert scores_of(asked)["mine"].score.value == right.mean()


def test_not_normalised_targets_are_taken_as_they_are(world, tmp_path):
    url, _, _ = world
    run = make_run(url, tmp_path / "run", {"cosine": 1.0}, normalise="none")
    save_file({}, run / "heads.safetensors")
    asked = probe_of(tmp_path, url, None)
    rows = asked.questions[0].rows["test"]
    fit_head(url, make_run(url, tmp_path / "like", {"mse": 1.0}), tmp_path)
    held = load_file(tmp_path / "like" / "heads.safetensors")
    # The affine way back, in the head itself.
    mean, std = held["text.normaliser.mean"], held["text.normaliser.std"]
    state = {
        "text.linear.weight": held["text.linear.weight"] * std[:, None],
        "text.linear.bias": held["text.linear.bias"] * std + mean,
    }
    save_file(state, run / "heads.safetensors")
    scores = scores_of(probe_of(tmp_path, url, run))
    assert scores["mine"].score.value == np.mean(rows % 4 != 0)


def test_who_cannot_answer_says_why(world, tmp_path):
    url, _, _ = world
    plain = probing.make_run(url, tmp_path / "plain", args=STUDENT["args"])
    moved = (tmp_path / "plain" / "student").rename(tmp_path / "moved")
    plain = probing.make_run(url, tmp_path / "other", args=STUDENT["args"])
    scores = scores_of(
        probe_of(
            tmp_path,
            url,
            None,
            students={"moved": str(moved), "plain": str(plain)},
            teachers={"clip": ["clip/embed"], "net": ["net/logits"]},
        )
    )
    assert "its run is not at hand" in scores["moved"].reason
    assert f"no head for {EMBED}: no target" in scores["plain"].reason
    assert f"outputs have no {EMBED} in view 0" in scores["net"].reason
    assert scores["clip"].score is not None


def test_what_is_refused(world, tmp_path):
    url, _, _ = world
    label = {"label": "main/labels/class"}
    for fields, error, match in (
        ({**label, "classifier": "net/logits"}, BankError, "no zero-shot classifier"),
        ({**label, "classifier": "clip/text"}, TrainingError, "p.classifier: the bank"),
        (
            {"label": "main/labels/other", "classifier": "clip/logits"},
            TrainingError,
            r"must have the 8 classes of clip/.*/logits's classifier \(a, ...\), got 9",
        ),
        (
            {"label": "main/labels/number", "classifier": "clip/logits"},
            TrainingError,
            "must have the 8 classes .* got none; take",
        ),
    ):
        with pytest.raises(error, match=match):
            probe_of(tmp_path, url, None, probes={"p": fields})
    maps = {"labels": {"map": {"member": "png", "input": "image", "num_classes": 8}}}
    asked = {"p": {"label": "data/map", "classifier": "clip/logits"}}
    with pytest.raises(TrainingError, match="of the bank's for a `classifier`, got"):
        probe_of(tmp_path, url, None, probes=asked, data=maps)
    run = make_run(url, tmp_path / "run", {"mse": 1.0})
    with pytest.raises(TrainingError, match="must hold the heads that the run trained"):
        probe_of(tmp_path, url, run)
    save_file({}, run / "heads.safetensors")
    with pytest.raises(TrainingError, match=r"got no text\.linear\.weight; train"):
        probe_of(tmp_path, url, run)
    fit_head(url, run, tmp_path)
    state = load_file(run / "heads.safetensors")
    state["text.linear.bias"] = torch.zeros(3)
    save_file(state, run / "heads.safetensors")
    with pytest.raises(TrainingError, match="must have the heads of its recipe, got"):
        probe_of(tmp_path, url, run)


def test_equal_cosines_count_for_the_first_class():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 5000)
    still = np.zeros((5000, 4), np.float32)
    weight = rng.normal(size=(7, 4)).astype(np.float32)
    found = zero_shot_probe(ClassSplit(still, labels), weight)
    assert found.value == (labels == 0).mean()
    assert found.details["top5_accuracy"] == (labels < 5).mean()
    with pytest.raises(TrainingError, match="classifier's 4 channels, got 3; take"):
        zero_shot_probe(ClassSplit(still[:, :3], labels), weight)
    with pytest.raises(TrainingError, match="below num_classes 7, got"):
        zero_shot_probe(ClassSplit(still, labels + 3), weight)
