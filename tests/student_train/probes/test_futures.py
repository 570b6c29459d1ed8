"""Trajectory probes of a bank: labels, rows, models and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manifests.loading import load_job
from pipeline.precompute import precompute
from student_train.errors import TrainingError
from student_train.probes import trajectory
from student_train.probes.protocol import ProbeRun
from teachonce.verbs.probe import print_result
from tests import probing
from tests.conftest import write_job, write_tar

SIZES = {"fit": 60, "choose": 24, "test": 30}
UNKNOWN, SPEEDLESS = 3, 70
FUTURE = {
    "waypoints": [["x1", "y1"], ["x2", "y2"]],
    "step_s": 0.5,
    "speed": "speed",
    "yaw_rate": "yaw_rate",
    "sequence": "drive",
}
PROBES = {"plan": {"label": "trajectories/far"}}


@pytest.fixture(autouse=True)
def short_fits(monkeypatch):
    monkeypatch.setattr(trajectory, "MLP_STEPS", 40)


def facts_of(number: int) -> dict[str, Any]:
    """A row turns to the side by how much redder than green its image is."""
    drawn = probing.draw(number)
    pixels = drawn.image.reshape(-1, 3).mean(0)
    side = float(pixels[0] - pixels[1]) / 20
    speed = 5.0 + number % 7
    future = [[speed * t, side * t**2] for t in (0.5, 1.0)]
    facts: dict[str, Any] = {"ego": {"speed": speed, "yaw": 0.0}, "future": future}
    if number == UNKNOWN:
        facts["future"] = future[:1]
    if number == SPEEDLESS:
        del facts["ego"]["speed"]
    return {**facts, "drive": number // 5}


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("futures")
    number = 0
    for name, size in SIZES.items():
        members = []
        for row in range(size):
            key = f"{name}-{row:04d}"
            members.append((f"{key}.png", probing.png(probing.draw(number).image)))
            members.append((f"{key}.json", json.dumps(facts_of(number)).encode()))
            number += 1
        write_tar(folder / "data" / f"{name}.tar", members)
    (folder / "known.py").write_text(probing.TEACHERS)

    def teacher(output: str) -> dict[str, Any]:
        return {
            "model": "module:./known.py:Blocks",
            "weights": "random:1",
            "sizes": [list(probing.IMAGE_HW)],
            "outputs": {"patch": {"from": f"output[{output}]"}},
        }

    paths = {
        **{
            f"{axis}{t}": f"future.{t - 1}.{n}"
            for t in (1, 2)
            for n, axis in enumerate("xy")
        },
        "speed": "ego.speed",
        "yaw_rate": "ego.yaw",
    }
    job = write_job(
        folder,
        dataset={"shards": "./data/*.tar", "license": "cc0-1.0"},
        inputs={"image": {"kind": "image", "member": "png"}},
        labels={
            **{name: {"member": "json", "path": path} for name, path in paths.items()},
            "drive": {"member": "json", "path": "drive", "num_classes": 100},
        },
        teachers={"blocks": teacher("patch"), "blind": teacher("blind")},
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder / "bank"


def probe_of(folder: Path, url: Path, future: dict[str, Any], **more: Any) -> ProbeRun:
    fields = {"data": {}, "probes": PROBES, "trajectories": {"far": future}, **more}
    return ProbeRun(probing.probe_of(folder, url, **fields))


def test_a_teacher_that_sees_where_the_road_goes(url, tmp_path, capsys):
    run = probing.make_run(url, tmp_path / "run")
    result = probe_of(tmp_path, url, FUTURE, students={"mine": str(run)}).run()
    (found,) = result.probes
    assert (found.form, found.grid, found.label) == (
        "trajectory",
        None,
        "trajectories/far",
    )
    counts = [(one.unlabelled, one.used) for one in found.splits.values()]
    # One future lacks a waypoint, one row its speed.
    assert counts == [(1, 59), (1, 23), (0, 30)]
    scores = {one.model: one for one in found.scores}
    baselines = ["mean trajectory", "constant motion", "ego state"]
    models = ["mine", "random:vit_tiny_patch16_224", "blocks", "blind"]
    assert list(scores) == models + baselines
    assert {scores[name].role for name in baselines} == {"baseline"}
    assert {one.kind for one in found.scores} == {"trajectory"}
    assert scores["blocks"].score.value > 0.9
    assert abs(scores["blind"].score.value) < 0.1
    assert scores["ego state"].score.value == 0
    # Constant motion is all that the state tells here: the sides are left over.
    sides = [abs(facts_of(n)["future"][t][1]) for n in range(84, 114) for t in (0, 1)]
    constant = scores["constant motion"].score.details
    assert constant["ade"] == pytest.approx(np.mean(sides))
    turning = sum(side >= 2 for side in sides[1::2])
    assert 0 < constant["num_turning"] == turning < 30
    assert "reduction_low" in scores["blocks"].score.details
    print_result(result)
    shown = capsys.readouterr().out
    heading = next(line for line in shown.splitlines() if line.startswith("model"))
    columns = "ade reduction,reduction low,reduction high,ade,fde,turning reduction"
    assert (
        heading.split("features")[1].split()[:10] == columns.replace(",", " ").split()
    )
    assert f"rows of test that turn: {turning}; ade and fde are in metres" in shown
    assert "without features" in shown
    assert found.to_json()["scores"][-1]["model"] == "ego state"


def test_what_is_refused(url, tmp_path):
    for future, probes, match in (
        (
            {**FUTURE, "speed": "pace"},
            PROBES,
            r"far\.speed: label must be one of the b",
        ),
        ({**FUTURE, "ego": ["drive"]}, PROBES, r"far\.ego must be a number label, got"),
        ({**FUTURE, "sequence": "log"}, PROBES, r"far\.sequence: label must be one of"),
        (
            FUTURE,
            {"p": {"label": "trajectories/near"}},
            r"p\.label must be one of trajectories \(far\), got 'near'",
        ),
        (
            FUTURE,
            {"p": {"label": "trajectories/far", "kinds": ["linear"]}},
            "p must have no `kinds`, `grid` or `classifier`: a trajectory is asked",
        ),
    ):
        with pytest.raises(TrainingError, match=match):
            probe_of(tmp_path, url, future, probes=probes)


def test_drives_need_not_be_known(url, tmp_path):
    future = {name: one for name, one in FUTURE.items() if name != "sequence"}
    (found,) = probe_of(tmp_path, url, future).run().probes
    assert "reduction_low" not in found.scores[0].score.details
