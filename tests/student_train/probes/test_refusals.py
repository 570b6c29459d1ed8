"""What a probe refuses, in one line and before it computes anything."""

from __future__ import annotations

import json
import shutil

import pytest

from manifests.recipe import Probe
from student_train.errors import TrainingError
from student_train.probes import protocol
from student_train.probes.protocol import ProbeRun
from tests import probing


def refused(made: Probe, match: str) -> None:
    with pytest.raises(TrainingError, match=match) as caught:
        ProbeRun(made).run()
    assert "\n" not in str(caught.value)


def test_splits_are_disjoint(probe):
    fit, test = {"shards": ["fit*"]}, {"shards": ["test*"]}
    rows = r"both in fit \(26 rows\) and in choose \(26\)"
    refused(
        probe(splits={"fit": fit, "choose": fit, "test": test}),
        f"splits must have no row in common, got 26 {rows}; separate",
    )
    thirds = {
        "fit": {"share": [0, 0.5]},
        "choose": {"share": [0.5, 0.75]},
        "test": {"share": [0.7, 1]},
    }
    refused(probe(splits=thirds), r"got \d+ both in choose .* and in test")
    thirds["test"] = {"share": [0.75, 1]}
    (found,) = ProbeRun(probe(splits=thirds)).run().probes
    assert sum(one.asked for one in found.splits.values()) == 50


def test_splits_are_not_empty(probe):
    refused(
        probe(data={"rows": {"shards": ["fit*"]}, "labels": probing.MAPS}),
        r"splits\.choose must mean at least one row of data\.rows, got none",
    )
    missing = {**probing.SPLITS, "test": {"shards": ["nothing*"]}}
    refused(probe(splits=missing), r"splits\.test\.shards must match shards")


def test_splits_with_no_row_that_all_have(probe, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(probing.NO_SWEEP)
    made = probe(splits={**probing.SPLITS, "test": {"keys": str(keys)}})
    refused(
        made,
        r"split test must have rows .* for every model, got none of 1 \(0 without a "
        r"label; lacking: .*above/lidar/native/bev: 1",
    )


def test_unknown_things(probe):
    cases = {
        r"label: label must be one of the bank's \(class, bright\), got 'colour'": {
            "probes": {"p": {"label": "main/labels/colour"}}
        },
        r"label: label must be one of data\.labels \(seg, .*\), got 'sky'": {
            "probes": {"p": {"label": "data/sky"}}
        },
        r"label must be main/labels/NAME, .* or trajectories/NAME, got 'main/blocks/": {
            "probes": {"p": {"label": "main/blocks/patch"}}
        },
        r"p\.label must be one of trajectories \(none\), got 'far'": {
            "probes": {"p": {"label": "trajectories/far"}}
        },
        r"teachers\.t: teacher must be one of the bank's .*, got 'dino'": {
            "teachers": {"t": ["dino/cls"]}
        },
        r"teachers\.t: the bank must have the output, got 'blocks/cls'": {
            "teachers": {"t": ["blocks/cls"]}
        },
        r"teachers\.t must name at least one output": {"teachers": {"t": []}},
        r"data\.labels\.seg: input must be one of the bank's .*, got left": {
            "probes": {"p": {"label": "data/seg"}},
            "data": {"labels": {"seg": {**probing.MAPS["seg"], "input": "left"}}},
        },
    }
    for match, fields in cases.items():
        refused(probe(**fields), match)


def test_folders_that_hold_no_student(probe, url, run, tmp_path):
    (tmp_path / "empty").mkdir()
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "student")
    elsewhere = probing.make_run(url, tmp_path / "elsewhere")
    record = json.loads((elsewhere / "run.json").read_text())
    record["recipe"]["student"]["input"] = "left"
    (elsewhere / "run.json").write_text(json.dumps(record))
    cases = {
        "gone": r"got .*gone, which is not there; correct",
        "probe.yaml": r"which is a file; correct",
        "empty": r"which holds neither; correct",
        "unfinished": r"a run that is done, got .* without a student; run its",
        "elsewhere": r"input must be one of the bank's \(image, lidar\), got left",
    }
    for name, match in cases.items():
        refused(
            probe(students={"mine": str(tmp_path / name)}), rf"students\.mine.*{match}"
        )


def test_kinds_that_do_not_fit(probe):
    for label, kinds, match in (
        ("data/seg", ["knn"], "among dense for a map label, got knn"),
        ("main/labels/bright", ["knn"], "among linear for a number label, got knn"),
        ("main/labels/class", ["dense"], "among knn, linear for a class label"),
        ("main/labels/class", [], "got none"),
    ):
        refused(probe(probes={"p": {"label": label, "kinds": kinds}}), match)


def test_a_probe_that_nobody_can_answer(probe):
    made = probe(
        students={},
        teachers={"above": ["above/bev"]},
        probes={"p": {"label": "data/seg"}},
    )
    refused(
        made,
        r"probes\.p must have a model that can answer it, got none \(above: it has no "
        "grid on image in view 0",
    )


def test_cells_finer_than_the_label(probe):
    # Unasked, they are never finer: the bird's-eye label read as one of the image.
    label = {"member": "ground.png", "input": "image", "num_classes": 3}
    fine = probe(
        students={},
        teachers={"blocks": ["blocks/patch"]},
        data={"labels": {"coarse": label}},
        probes={"p": {"label": "data/coarse"}},
    )
    assert ProbeRun(fine).questions[0].grid == (4, 8)
    made = probe(probes={"p": {"label": "data/blocks", "grid": [5, 8]}})
    refused(made, r"probes\.p\.grid must be at most the label's 4 x 8, got 5 x 8")


def test_cells_that_no_camera_sees(probe):
    high = {"label": "data/ground", "heights_m": [500.0]}
    refused(
        probe(probes={"p": high}), r"p: split fit must have a cell that every model"
    )


def test_one_name_for_two_models(probe, run):
    made = probe(students={"blocks": str(run)})
    refused(made, "models must have different names, got blocks both in students")


def test_classes_out_of_range_name_the_sample(probe):
    labels = {"seg": {**probing.MAPS["seg"], "num_classes": 2}}
    made = probe(data={"labels": labels}, probes={"p": {"label": "data/seg"}})
    refused(made, r"label_out_of_range.*class 2 of 2.*row 0, 'choose-0000'")


def test_more_than_half_of_the_memory_is_refused(probe, monkeypatch):
    made = probe(probes={"p": {"label": "data/seg", "grid": [4, 8]}})
    # 50 rows without the broken image: 32 cells of 24 channels for the student, in
    # float32; two float64 copies of the largest split; labels, held and at work.
    features, work = 49 * 32 * 24 * 4, 25 * 32 * 24 * 16
    pixels = 49 * 32 * 64
    needed = features + work + pixels * (2 + 8)
    monkeypatch.setattr(protocol, "free_bytes", lambda: 2 * needed)
    ProbeRun(made)
    monkeypatch.setattr(protocol, "free_bytes", lambda: 2 * needed - 2)
    refused(made, rf"half of the free memory, got {needed:,} bytes for mine")
    monkeypatch.setattr(protocol, "free_bytes", lambda: None)
    ProbeRun(made)
