"""The worked examples: every one loads, and those on real data are planned."""

from __future__ import annotations

from pathlib import Path

import pytest

from manifests.loading import load_job
from pipeline.estimate import estimate
from pipeline.plan import make_plan
from tests.conftest import ROOT

EXAMPLES = sorted((ROOT / "manifests" / "examples").glob("*.yaml"))


def test_there_are_examples():
    names = {path.stem for path in EXAMPLES}
    assert {"imagenet", "cifar10", "kitti", "nuscenes"} <= names


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_loads_and_says_how_it_is_run(path):
    job = load_job(str(path))
    assert job.teachers
    assert f"{path.name}" in path.read_text()
    assert all(one.outputs for one in job.teachers.values())
    assert job.bank.startswith(("gs://", str(path.parent)))


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
