"""The protocol: known answers, the same rows for all, and what is refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from manifests.errors import StorageError
from pipeline.bank.open import open_bank
from student_train.probes import protocol
from student_train.probes.dense import DenseSplit, dense_number_probe
from student_train.probes.linear import RIDGE_PENALTIES
from student_train.probes.protocol import ProbeRun
from student_train.probes.result import ModelScore, ProbeResult, write_result
from student_train.probes.splits import standardised
from tests import probing

CLASS = {"main": {"label": "main/labels/class"}}
RANDOM = "random:vit_tiny_patch16_224"


def by_model(result: ProbeResult, name: str, kind: str | None = None) -> dict:
    """Scores of a probe by model and, for kNN, by model and scale."""
    (found,) = (one for one in result.probes if one.name == name)
    scores: dict[str, ModelScore] = {}
    for one in found.scores:
        if kind is None or one.kind == kind:
            scores[f"{one.model} {one.scale}" if one.kind == "knn" else one.model] = one
    return scores


def test_classes_of_rows(probe):
    result = ProbeRun(probe(probes=CLASS)).run()
    (found,) = result.probes
    assert (found.form, found.grid, found.label_size) == ("value", None, None)
    linear = by_model(result, "main", "linear")
    assert list(linear) == ["mine", RANDOM, "blocks", "blind", "above"]
    assert linear["blocks"].score.value == 1
    # What says nothing gives one answer to all.
    blind = linear["blind"].score
    assert blind.value == blind.details["majority_accuracy"] < 0.5
    knn = by_model(result, "main", "knn")
    assert knn["blocks raw"].score.value == knn["blocks standardised"].score.value == 1
    features = {one.model: one.features for one in found.scores}
    assert features == {
        "mine": "cls",
        RANDOM: "cls",
        # A vector where there is one, never unnamed logits, else the mean of a grid.
        "blocks": "blocks/image/32x64/pooled",
        "blind": "blind/image/32x64/patch",
        "above": "above/lidar/native/bev",
    }
    roles = {one.model: one.role for one in found.scores}
    assert roles == {"mine": "student", RANDOM: "random"} | dict.fromkeys(
        ("blocks", "blind", "above"), "teacher"
    )


def test_rows_are_the_same_for_all_and_every_one_is_counted(probe, url):
    (found,) = ProbeRun(probe(probes=CLASS)).run().probes
    counts = {
        name: (one.asked, one.unlabelled, one.left_out, one.used)
        for name, one in found.splits.items()
    }
    # No image in fit, no class in choose, no sweep in test: each costs all models.
    assert counts == {
        "fit": (26, 0, 1, 25),
        "choose": (12, 1, 0, 11),
        "test": (12, 0, 1, 11),
    }
    image, lidar = {"mine", RANDOM}, {"above/lidar/native/bev"}
    outputs = {"blocks/image/32x64/pooled", "blind/image/32x64/patch"}
    assert dict(found.left_out_by) == dict.fromkeys(image | outputs | lidar, 1)
    for one in found.scores:
        assert one.score.details["num_fit"] == 25
        assert one.score.details["num_test"] == 11
    keys = open_bank(str(url)).keys()
    rows = [
        row
        for run in found.splits["test"].rows.split(",")
        for row in range(int(run.split("-")[0]), int(run.split("-")[-1]) + 1)
    ]
    expected = [f"test-{number:04d}" for number in range(12) if number != 1]
    assert keys[rows].tolist() == expected

    # Without the teacher of sweeps its missing row is back.
    (fewer,) = ProbeRun(probe(probes=CLASS, teachers={})).run().probes
    assert fewer.splits["test"].used == 12


def test_numbers_of_rows(probe):
    result = ProbeRun(probe(probes={"main": {"label": "main/labels/bright"}})).run()
    scores = by_model(result, "main")
    # The mean of all channels is a third of the mean level.
    assert scores["blocks"].score.metric == "rmse"
    assert scores["blocks"].score.value < 0.01
    assert scores["blocks"].score.details["r_squared"] > 0.999
    assert scores["mine"].score.value > 1
    assert scores[RANDOM].score.value > 1


def test_classes_of_cells(probe):
    probes = {
        "given": {"label": "data/blocks", "grid": [4, 8]},
        "smallest": {"label": "data/blocks"},
        "pixels": {"label": "data/seg", "grid": [4, 8]},
    }
    result = ProbeRun(probe(probes=probes)).run()
    given = by_model(result, "given")
    assert given["blocks"].score.value == 1
    for name in ("mine", RANDOM):
        # Its cells are four blocks each.
        assert given[name].features == "patch"
        assert given[name].score.value < 0.8
    assert given["above"].score is None
    assert given["above"].reason == "it has no grid on image in view 0"
    by_name = {one.name: one for one in result.probes}
    # The label's own resolution, not the image's; the coarsest model's grid.
    assert by_name["given"].label_size == (4, 8)
    assert by_name["smallest"].grid == (2, 4)
    assert by_name["pixels"].label_size == probing.IMAGE_HW
    smallest = by_model(result, "smallest")
    assert smallest["blocks"].score.value < 0.8
    pixels = by_model(result, "pixels")
    # Only borders are lost, where bilinear maps go from one colour to the next.
    assert 0.9 < pixels["blocks"].score.value < 1


def test_numbers_of_cells(probe):
    probes = {
        "log": {"label": "data/far", "grid": [4, 8]},
        "plain": {"label": "data/metres", "grid": [4, 8]},
    }
    result = ProbeRun(probe(probes=probes)).run()
    log = by_model(result, "log")
    assert log["blocks"].score.metric == "delta1"
    assert log["blocks"].score.value == 1
    assert log["mine"].score.value < 0.7
    plain = by_model(result, "plain")
    assert plain["blocks"].score.metric == "rmse"
    assert not plain["blocks"].score.higher_is_better
    assert plain["blocks"].score.details["r_squared"] > 0.95
    assert plain["mine"].score.value > 3 * plain["blocks"].score.value


def test_numbers_without_logarithms_are_ridge_regression():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=5)

    def scene(num: int) -> DenseSplit:
        grids = rng.normal(size=(num, 3, 4, 5)).astype(np.float32)
        noise = rng.normal(0, 0.3, (num, 3, 4))
        # Negative numbers, which have no logarithm.
        return DenseSplit(grids, numbers_NHW=grids @ weight - 4 + noise)

    fit, choose, test = scene(3), scene(2), scene(2)
    score = dense_number_probe(fit, choose, test, log=False)
    x = fit.grids_NHWC.reshape(-1, 5).astype(np.float64)
    y = fit.numbers_NHW.reshape(-1)
    mean, std = x.mean(0), x.std(0)
    design = (x - mean) / std
    errors = {}
    for penalty in RIDGE_PENALTIES:
        solved = np.linalg.solve(
            design.T @ design / len(x) + penalty * np.eye(5),
            design.T @ (y - y.mean()) / len(x),
        )
        errors[penalty] = [
            ((one.grids_NHWC - mean) / std @ solved + y.mean()) - one.numbers_NHW
            for one in (choose, test)
        ]
    best = min(errors, key=lambda penalty: (errors[penalty][0] ** 2).mean())
    assert score.setting == {"l2": best}
    error = errors[best][1]
    assert score.value == pytest.approx(np.sqrt((error**2).mean()), rel=1e-4)
    share = (error**2).mean() / test.numbers_NHW.var()
    assert score.details["r_squared"] == pytest.approx(1 - share, rel=1e-4)


def test_cells_from_above(probe):
    ground = {"label": "data/ground", "grid": [8, 8], "heights_m": [probing.HEIGHT_M]}
    result = ProbeRun(probe(probes={"main": ground})).run()
    scores = by_model(result, "main")
    # Where the camera does not see the label is noise: it counts for nobody.
    assert scores["blocks"].score.value == 1
    # The other grid starts at the other ends: it is turned, not taken as it lies.
    assert scores["above"].score.value == 1
    seen = probing.cell_views()[1].sum()
    for name in ("mine", RANDOM, "blind"):
        assert scores[name].score.value < 0.9
        assert scores[name].score.details["num_fit_cells"] == 25 * seen
    assert scores["above"].score.details["num_fit_cells"] == 25 * seen

    # Nobody looks through a camera: all cells count, and noise is not predictable
    # from the image but is what the sweep says.
    alone = ProbeRun(
        probe(students={}, teachers={"above": ["above/bev"]}, probes={"main": ground})
    ).run()
    (score,) = by_model(alone, "main").values()
    assert score.score.value == 1
    # The row without an image is back; the one without a sweep is not.
    assert score.score.details["num_fit_cells"] == 26 * 64


def test_cells_from_above_have_a_size_of_their_own(probe):
    result = ProbeRun(probe(probes={"main": {"label": "data/ground"}})).run()
    (found,) = result.probes
    assert (found.form, found.grid, found.label_size) == ("bird's-eye", (4, 4), (8, 8))


def test_twice_the_same(probe, url):
    probes = {**CLASS, "seg": {"label": "data/seg"}, "from": {"label": "data/ground"}}
    teachers = {"blocks": ["blocks/pooled", "blocks/patch"]}
    made = probe(probes=probes, teachers=teachers)
    first = ProbeRun(made).run().to_json()
    again = ProbeRun(made, open_bank(str(url))).run().to_json()
    assert first == again
    del probes["main"]
    made = probe(probes=probes, teachers={}, seed=1)
    other = ProbeRun(made).run().to_json()
    assert other["probes"]["seg"]["scores"][0] == first["probes"]["seg"]["scores"][0]
    assert other["probes"]["seg"]["scores"][1] != first["probes"]["seg"]["scores"][1]


def test_named_outputs_alone(probe):
    teachers = {
        "guess": ["blocks/logits"],
        "both": ["blocks/pooled", "blocks/image/32x64/patch"],
    }
    probes = {**CLASS, "seg": {"label": "data/seg"}}
    result = ProbeRun(probe(probes=probes, teachers=teachers, random=False)).run()
    linear = by_model(result, "main", "linear")
    assert list(linear) == ["mine", "guess", "both"]
    assert linear["guess"].features == "blocks/image/32x64/logits"
    assert linear["both"].features == "blocks/image/32x64/pooled"
    seg = by_model(result, "seg")
    assert seg["guess"].reason == "it has no grid on image in view 0"
    assert seg["both"].features == "blocks/image/32x64/patch"
    assert result.to_json()["models"]["guess"]["outputs"].keys() == {
        "blocks/image/32x64/logits"
    }


def test_kinds(probe):
    only = {"main": {"label": "main/labels/class", "kinds": ["knn"]}}
    (found,) = ProbeRun(probe(probes=only, teachers={})).run().probes
    assert [(one.model, one.kind, one.scale) for one in found.scores] == [
        ("mine", "knn", "raw"),
        ("mine", "knn", "standardised"),
        (RANDOM, "knn", "raw"),
        (RANDOM, "knn", "standardised"),
    ]


def test_standardised_by_the_fit_split():
    rng = np.random.default_rng(1)
    fit = rng.normal(3, [1, 2, 1e-6], (40, 3)).astype(np.float32)
    test = rng.normal(3, 2, (5, 3)).astype(np.float32)
    found = standardised({"fit": torch.from_numpy(fit), "test": torch.from_numpy(test)})
    # The deviation of a dead channel is lifted to 0.01 of the median.
    std = fit.astype(np.float64).std(0)
    std = np.maximum(std, 0.01 * np.median(std))
    expected = (test - fit.mean(0, dtype=np.float64)) / std
    np.testing.assert_allclose(found["test"], expected, rtol=1e-5, atol=1e-5)


def test_a_student_that_diverged_spoils_nothing(probe, run, tmp_path):
    broken = shutil.copytree(run, tmp_path / "broken")
    weights = broken / "student" / "model.safetensors"
    state = safetensors.torch.load_file(weights)
    state["cls_token"][:] = torch.nan
    safetensors.torch.save_file(state, weights, {"format": "pt"})
    students = {"broken": str(broken), "mine": str(run)}
    result = ProbeRun(probe(students=students, teachers={}, probes=CLASS)).run()
    scores = by_model(result, "main")
    assert scores["broken"].reason == "its features are not finite"
    assert scores["broken"].score is None
    assert scores["mine"].score.value > 0.5


def test_progress_ends_where_it_says(probe):
    heard = []
    ProbeRun(probe(probes={**CLASS, "seg": {"label": "data/seg"}})).run(heard.append)
    # Five models answer the first, four the second.
    assert {one.total for one in heard} == {9}
    assert [one.done for one in heard] == sorted(one.done for one in heard)
    assert (heard[-1].done, heard[-1].what) == (9, "done")
    assert any("mine: 42 of" in one.what for one in heard)


def test_the_result_is_json_and_is_written_whole(probe, tmp_path):
    result = ProbeRun(probe(probes={"seg": {"label": "data/blocks"}})).run()
    path = tmp_path / "deep" / "scores.json"
    write_result(result, str(path))
    write_result(result, str(path))
    assert [one.name for one in path.parent.iterdir()] == ["scores.json"]

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    held = json.loads(path.read_text(), parse_constant=refuse)
    assert held == json.loads(json.dumps(result.to_json()))
    with pytest.raises(StorageError, match=r"cannot write .*scores.json/under"):
        write_result(result, str(path / "under"))


def test_students_alone_need_no_run(probe, run, tmp_path):
    moved = shutil.copytree(run / "student", tmp_path / "moved")
    with_run = ProbeRun(probe(teachers={}, random=False)).run()
    without = ProbeRun(
        probe(students={"mine": str(moved)}, teachers={}, random=False)
    ).run()
    assert with_run.probes == without.probes


def test_free_memory_is_what_the_system_says():
    free = protocol.free_bytes()
    assert free is None or 2**20 < free < 2**50
