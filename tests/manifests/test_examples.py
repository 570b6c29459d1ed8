"""The worked examples: all load and fit together, those on real data are planned."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

from manifests.inputs import LabelConfig
from manifests.job import Job
from manifests.loading import load_job
from manifests.recipe import Probe, Recipe
from manifests.recipe_loading import load_probe, load_recipe
from manifests.teacher import TeacherConfig
from manifests.yaml_text import parse_yaml
from pipeline.estimate import estimate
from pipeline.plan import make_plan
from tests.conftest import ROOT

FOLDER = ROOT / "manifests" / "examples"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
PROBES = sorted((FOLDER / "recipes").glob("probe*.yaml"))
RECIPES = sorted(set((FOLDER / "recipes").glob("*.yaml")) - set(PROBES))
PROBE = FOLDER / "recipes" / "probe.yaml"


def comment_of(path: Path) -> list[str]:
    """The lines that an example starts with, without their #."""
    lines = path.read_text().splitlines()
    end = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    return [line[1:] for line in lines[:end]]


def job_of(bank: str) -> Job:
    """The example whose job makes a bank, with what a recipe's comment adds to it."""
    (job,) = (job for job in map(load_job, map(str, EXAMPLES)) if job.bank == bank)
    return job


def added_teachers(path: Path) -> dict[str, TeacherConfig]:
    """Teachers that a comment says to add to the job, five columns in."""
    return {
        name: TeacherConfig.model_validate(one) for name, one in added(path).items()
    }


def added(path: Path) -> dict[str, Any]:
    """What stands five columns in in a comment."""
    text = "\n".join(line for line in comment_of(path) if line.startswith(" " * 5))
    return parse_yaml(text.encode(), path.name) if text else {}


def assert_held(job: Job, teachers: dict[str, TeacherConfig], source: str) -> None:
    """Asserts that a job gives <teacher>/<output>, or with a group between."""
    name, *group, output = source.split("/")
    if name == "labels":
        assert output in job.labels
        return
    teacher = (job.teachers | teachers)[name]
    assert output in teacher.outputs
    patterns = teacher.on or ["*"]
    assert isinstance(patterns, list)
    on = [one for one in job.inputs if any(fnmatch.fnmatch(one, p) for p in patterns)]
    # A teacher on several inputs has an output of that name for each.
    assert group in ([], *([one] for one in on))


def test_there_are_examples():
    names = {path.stem for path in EXAMPLES}
    assert {"imagenet", "cifar10", "kitti", "nuscenes"} <= names
    assert {path.stem for path in RECIPES} == {
        *("am_radio", "camera_from_lidar", "dune", "eupe", "labels", "plain_kd"),
        *("radio_angle", "radio_phi_s", "several_teachers", "theia", "tiny_vit"),
        "unic",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_says_how_it_is_run(path):
    job = load_job(str(path))
    assert job.teachers
    assert f"{path.name}" in path.read_text()
    assert all(one.outputs for one in job.teachers.values())
    assert job.bank.startswith(("gs://", str(path.parent)))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_learns_what_an_example_makes(path):
    recipe = load_recipe(str(path))
    ((name, bank),) = recipe.banks.items()
    job = job_of(bank)
    assert job.inputs[recipe.student.input].kind == "image"
    for target in recipe.targets.values():
        first, _, source = target.source.partition("/")
        assert first == name
        assert_held(job, added_teachers(path), source)
    assert recipe.run.startswith(str(FOLDER / "runs"))
    assert recipe.student.weights is None


@pytest.mark.parametrize("path", [*RECIPES, *PROBES], ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_run_and_where_its_numbers_are_from(path):
    verb = "probe" if path in PROBES else "train"
    comment = comment_of(path)
    assert any(
        line.strip().startswith(f"teachonce {verb} {path.name}") for line in comment
    )
    assert any(line.startswith(" Numbers: ") for line in comment)


def test_eupe_is_the_published_second_stage():
    # EUPE (arXiv 2603.22387), sections 3.1, 3.3 and 4.1.
    recipe = load_recipe(str(FOLDER / "recipes" / "eupe.yaml"))
    weights = {
        name: {loss: term.weight for loss, term in target.loss.items()}
        for name, target in recipe.targets.items()
    }
    assert weights == {
        "cls": {"cosine": 1.0},
        "patch": {"cosine": 0.9, "smooth_l1": 0.1},
    }
    heads = [target.head for target in recipe.targets.values()]
    assert {(head.kind, head.hidden) for head in heads} == {("adapter", 3072)}
    assert recipe.targets["patch"].grid == "larger"
    assert recipe.normalise == "standardise"
    (stage,) = recipe.stages
    assert (stage.steps, stage.batch, stage.lr) == (390_000, 8192, 2e-5)
    assert (stage.schedule, stage.sizes) == ("cosine", [256])
    assert recipe.optimizer.weight_decay == 1e-4


def test_plain_distillation_has_one_head_and_differs_from_labels_in_the_teacher():
    kd, labels = (
        load_recipe(str(FOLDER / "recipes" / f"{name}.yaml"))
        for name in ("plain_kd", "labels")
    )
    assert kd.targets["class"].head.same_as == "logits"
    term = kd.targets["logits"].loss["kl"]
    assert (term.weight, term.temperature) == (0.9, 4)
    assert kd.targets["class"].loss["cross_entropy"].weight == pytest.approx(0.1)
    changed = {"run", "targets"}
    assert kd.model_dump(exclude=changed) == labels.model_dump(exclude=changed)
    assert kd.run != labels.run
    assert list(labels.targets) == ["class"]


def recipe_of(name):
    return load_recipe(str(FOLDER / "recipes" / f"{name}.yaml"))


def terms_of(target):
    return {name: term.weight for name, term in target.loss.items()}


def test_the_radios_differ_in_space_and_loss():
    """AM-RADIO 2312.06709, RADIOv2.5 2412.07679 with PHI-S 2410.01680, C-RADIOv4."""
    summaries = ("dinov3_cls", "siglip2_embed")
    expected = {
        "am_radio": ("none", {"cosine": 1.0}, {"cosine": 0.9, "smooth_l1": 0.1}),
        "radio_phi_s": ("phi_s", {"cosine": 1.0}, {"mse": 1.0}),
        "radio_angle": ("phi_s", {"angle": 1.0}, {"mse": 1.0}),
    }
    for name, (rule, summary, patch) in expected.items():
        recipe = recipe_of(name)
        assert recipe.normalise == rule
        for key, target in recipe.targets.items():
            is_summary = key in summaries
            assert terms_of(target) == (summary if is_summary else patch)
            assert (target.normalise or rule) == ("none" if is_summary else rule)
            assert target.weight == 1


def test_theia_is_a_mean_over_teachers_of_whole_maps():
    recipe = recipe_of("theia")
    assert sum(one.weight for one in recipe.targets.values()) == pytest.approx(1, 1e-3)
    for target in recipe.targets.values():
        assert terms_of(target) == {"map_cosine": 0.9, "smooth_l1": 0.1}
        assert target.source.endswith("/patch")
    (stage,) = recipe.stages
    assert stage.lr == 2e-3 * stage.batch / 512
    assert stage.warmup_steps == pytest.approx(
        0.1 * 50 * 1281167 / stage.batch, rel=0.01
    )


def test_unic_is_halves_on_a_ladder_with_teachers_dropped():
    recipe = recipe_of("unic")
    assert (recipe.balance.kind, recipe.balance.p) == ("drop_teachers", 0.5)
    for target in recipe.targets.values():
        assert terms_of(target) == {"cosine": 0.5, "smooth_l1": 0.5}
        assert target.weight == 0.5
        head = target.head
        assert (head.kind, head.hidden, head.rungs) == ("ladder", 3072, 768)
    assert recipe.optimizer.betas == (0.9, 0.99)


def test_dune_is_one_layer_more_on_grids_that_coincide():
    recipe = recipe_of("dune")
    grids = {name: one.grid for name, one in recipe.targets.items()}
    assert grids["dinov3_patch"] == grids["siglip2_patch"] == "coincide"
    assert recipe.targets["dinov3_cls"].head.same_as == "dinov3_patch"
    assert recipe.targets["siglip2_patch"].head.kind == "transformer"
    (stage,) = recipe.stages
    assert stage.sizes == []
    assert stage.warmup_steps == 0.2 * stage.steps


def test_tiny_vit_learns_the_rest_at_a_temperature_that_is_stored():
    recipe = recipe_of("tiny_vit")
    teachers = added_teachers(FOLDER / "recipes" / "tiny_vit.yaml")
    output = teachers["beit"].outputs["logits"]
    assert output.topk == 100
    assert recipe.targets["logits"].loss["kl"].temperature in output.temperatures
    assert recipe.loader.view == "epoch"


def test_several_teachers_are_several():
    recipe = load_recipe(str(FOLDER / "recipes" / "several_teachers.yaml"))
    sources = [target.source.split("/")[1:] for target in recipe.targets.values()]
    assert {teacher for teacher, _ in sources} == {"dinov3", "siglip2"}
    assert len(sources) == 4


def test_a_camera_learns_a_map_that_says_where_it_lies():
    path = FOLDER / "recipes" / "camera_from_lidar.yaml"
    recipe = load_recipe(str(path))
    job = job_of(*recipe.banks.values())
    target = recipe.targets["bev"]
    _, name, output = target.source.split("/")
    teacher = added_teachers(path)[name]
    extent = teacher.outputs[output].extent
    assert target.head.kind == "bev"
    assert extent is not None
    assert extent.x_m == extent.y_m == (-51.2, 51.2)
    assert [job.inputs[one].kind for one in teacher.on] == ["points"]
    assert set(teacher.preprocess.columns) <= set(job.inputs["lidar"].columns)
    assert job.inputs[recipe.student.input].calibration


def test_the_probe_asks_what_the_recipes_trained():
    probe = load_probe(str(PROBE))
    recipes = [load_recipe(str(path)) for path in RECIPES]
    (bank,) = probe.banks.values()
    runs = {recipe.run: recipe for recipe in recipes if bank in recipe.banks.values()}
    assert set(probe.students.values()) == set(runs)
    job = job_of(bank)
    for outputs in probe.teachers.values():
        for source in outputs:
            assert_held(job, {}, source)
    for question in probe.probes.values():
        assert_held(job, {}, question.label.partition("/")[2])
    # No student has learned from a row that is chosen or scored on.
    splits = probe.splits
    for recipe in runs.values():
        learned = recipe.data.rows.share[1]
        assert splits.fit.share[1] <= learned <= splits.choose.share[0]
    assert splits.choose.share[1] <= splits.test.share[0]


def student_of(probe: Probe) -> Recipe:
    """The recipe of a probe's only student, which learned from the probe's bank."""
    (run,) = probe.students.values()
    (recipe,) = (one for one in map(load_recipe, map(str, RECIPES)) if one.run == run)
    assert list(recipe.banks.values()) == list(probe.banks.values())
    return recipe


def test_the_zero_shot_probe_asks_through_a_head_that_was_trained():
    path = FOLDER / "recipes" / "probe_zero_shot.yaml"
    probe = load_probe(str(path))
    job = job_of(*probe.banks.values())
    (question,) = probe.probes.values()
    name, output = question.classifier.split("/")
    teacher = added_teachers(path)[name]
    assert teacher.outputs[output].classifier is not None
    # What the comment adds is one output; the rest is the example's own teacher.
    kept = {key: one for key, one in teacher.outputs.items() if key != output}
    assert teacher.model_copy(update={"outputs": kept}) == job.teachers[name]
    sources = {one.source for one in student_of(probe).targets.values()}
    assert f"in1k/{name}/embed" in sources
    assert_held(job, {}, question.label.partition("/")[2])
    for outputs in probe.teachers.values():
        assert outputs == [f"{name}/embed"]


def test_the_trajectory_probe_asks_for_labels_that_its_comment_adds():
    path = FOLDER / "recipes" / "probe_trajectory.yaml"
    probe = load_probe(str(path))
    labels = {key: LabelConfig.model_validate(one) for key, one in added(path).items()}
    (future,) = probe.trajectories.values()
    named = [name for pair in future.waypoints for name in pair] + future.state
    assert {*named, future.sequence} == set(labels)
    assert len(future.waypoints) * future.step_s == 3.0
    for step, (x, y) in enumerate(future.waypoints):
        assert labels[x].path == f"future.{step}.0"
        assert labels[y].path == f"future.{step}.1"
    job = job_of(*probe.banks.values())
    assert student_of(probe).student.input in job.inputs
    for outputs in probe.teachers.values():
        for source in outputs:
            assert_held(job, {}, source)


@pytest.mark.parametrize(
    ("name", "samples", "outputs"),
    [("cifar10", 10_000, 4), ("kitti", 3, 4), ("nuscenes", 1, 24 + 1)],
)
def test_an_example_on_real_data_is_planned(
    shared_data, tmp_path, name, samples, outputs
):
    text = (ROOT / "manifests" / "examples" / f"{name}.yaml").read_text()
    path: Path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    (tmp_path / "data").symlink_to(shared_data)
    job = load_job(str(path))
    # Its weights are not ours to hand out; without them shapes are known all the same.
    kept = {key: one for key, one in job.teachers.items() if key != "dinov3"}
    plan = make_plan(job.model_copy(update={"teachers": kept}))
    numbers = estimate(plan)
    assert numbers.samples == samples
    assert len(numbers.bytes_by_output) == outputs
    assert not (tmp_path / "banks").exists()
