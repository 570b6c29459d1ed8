"""Facts of a bank, of runs and of scores, against what lies on disk and in JSON."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from teachonce.report.facts import describe_bank
from teachonce.report.run_facts import describe_run
from teachonce.report.score_facts import all_scores, score_table, split_table
from teachonce.report.tables import Table
from teachonce.verbs.text import size
from tests.conftest import without_checksum
from tests.teachonce.report.conftest import SHARD_SIZES, Made


def column(table: Table, name: str) -> list[str]:
    place = table.head.index(name)
    return [row[place] for row in table.rows]


def line(table: Table, first: str) -> dict[str, str]:
    (found,) = [row for row in table.rows if row[0] == first]
    return dict(zip(table.head, found, strict=True))


def test_bytes_of_outputs_are_those_on_disk(made: Made) -> None:
    facts = describe_bank(made.open())
    num_bytes = 0
    for path, values in (("net/image/16x32/patch", 4 * 8 * 16),):
        folder = made.folder / "bank" / "features.zarr" / path
        stored = sum(one.stat().st_size for one in folder.glob("c.*"))
        found = line(facts.outputs, path)
        assert found["on disk"] == size(stored)
        assert found["as float32"] == size(4 * values * sum(SHARD_SIZES))
        assert found["share"] == f"{stored / (4 * values * sum(SHARD_SIZES)):.0%}"
        assert line(facts.arrays, path)["bytes"] == size(stored)
    features = made.folder / "bank" / "features.zarr"
    for name in column(facts.outputs, "output")[:-1]:
        num_bytes += sum(one.stat().st_size for one in (features / name).glob("c.*"))
    assert line(facts.outputs, "all")["on disk"] == size(num_bytes)


def test_arrays_are_those_that_zarr_sees(made: Made) -> None:
    zarr = pytest.importorskip("zarr")
    root = zarr.open_group(str(made.folder / "bank" / "features.zarr"), mode="r")
    facts = describe_bank(made.open())
    for path, shape in zip(
        column(facts.arrays, "array of features.zarr"),
        column(facts.arrays, "shape"),
        strict=True,
    ):
        numbers = tuple(int(one.replace(",", "")) for one in shape.split(" x "))
        assert numbers == root[path].shape, path


def test_teachers_rows_and_seconds(made: Made) -> None:
    facts = describe_bank(made.open())
    (run,) = (made.folder / "bank" / "runs").glob("*.json")
    seconds = json.loads(run.read_text())["result"]["seconds"]
    net = line(facts.teachers, "net")
    assert net["seconds of forwards"] == f"{seconds['forward.net']:,.1f}"
    assert (net["valid rows"], net["invalid rows"]) == ("10", "1")
    assert net["weights (sha256)"] == "random, seed 1"
    birds = line(facts.teachers, "birds")
    assert (birds["valid rows"], birds["invalid rows"]) == ("11", "0")
    assert facts.invalid is not None
    assert ("net.image", "image:truncated", "1") in facts.invalid.rows
    summary = dict(facts.summary)
    assert summary["samples"] == "11 in 2 shards"
    assert summary["state"] == "complete"


def test_damaged_shards_and_failures_are_told(made: Made, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    record_path = copy.folder / "bank" / "bank.json"
    record = json.loads(without_checksum(record_path.read_text()))
    record["shards"][0]["damage"] = "ends in mid-member"
    record_path.write_text(json.dumps(record))
    (run_path,) = (copy.folder / "bank" / "runs").glob("*.json")
    run = json.loads(without_checksum(run_path.read_text()))
    run["result"]["failures"] = ["shard b: gone"]
    run_path.write_text(json.dumps(run))
    facts = describe_bank(copy.open())
    assert facts.damage == (
        "shard train-0.tar is damaged: ends in mid-member",
        "the last run failed: shard b: gone",
    )


def test_a_bank_that_was_never_finalised(made: Made, tmp_path: Path) -> None:
    copy = made.copy(tmp_path / "copy")
    record_path = copy.folder / "bank" / "bank.json"
    record = json.loads(without_checksum(record_path.read_text())) | {"state": None}
    record_path.write_text(json.dumps(record))
    facts = describe_bank(copy.open())
    assert dict(facts.summary)["state"] == "not complete"
    assert line(facts.teachers, "net")["valid rows"] == "–"
    assert facts.invalid is None


def test_curves_are_the_log(made: Made) -> None:
    facts = describe_run("taught", made.runs["taught"])
    with (made.runs["taught"] / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert [one.name for one in facts.losses] == ["all targets", "patch", "bev"]
    for one, name in zip(facts.losses, ("loss", "loss.patch", "loss.bev"), strict=True):
        assert list(one.x) == [1, 2, 3, 4, 5]
        assert list(one.y) == [float(row[name]) for row in log]
    assert list(facts.rates[0].y) == [float(row["lr"]) for row in log]
    assert facts.stages == ((1.0, "one"), (4.0, "two"))
    assert not facts.is_thinned
    assert dict(facts.summary)["steps"] == "3, 2"
    alone = describe_run("alone", made.runs["alone"])
    assert [one.name for one in alone.losses] == ["all targets"]


def test_runs_that_are_gone_or_damaged(made: Made, tmp_path: Path) -> None:
    found = describe_run("gone", tmp_path / "nowhere")
    assert found.problem is not None
    assert "must be the folder of a run" in found.problem
    run = tmp_path / "half"
    run.mkdir()
    record = json.loads((made.runs["taught"] / "run.json").read_text())
    del record["result"]
    (run / "run.json").write_text(json.dumps(record))
    half = describe_run("half", run)
    assert (half.problem, half.losses) == (None, ())
    assert ("state", "not done") in half.summary


def score(model: str, role: str, value: float | None, **more: Any) -> dict[str, Any]:
    return {
        "model": model,
        "role": role,
        "features": "pooled",
        "kind": "knn",
        "metric": "accuracy",
        "value": value,
        "choose_value": value,
        "higher_is_better": True,
        **more,
    }


PROBE: dict[str, Any] = {
    "models": {
        "a/b": {"role": "teacher"},
        "random:vit": {"role": "random"},
        "mine": {"role": "student"},
    },
    "probes": {
        "scene": {
            "label": "b/labels/scene",
            "splits": {"fit": {"asked": 9, "unlabelled": 1, "left_out": 2, "used": 6}},
            "scores": [
                score("a/b", "teacher", 0.9, features="a/cam/native/cls"),
                score("mine", "student", 0.70, choose_value=0.6, features="cls"),
                score("mine", "student", 0.65, choose_value=0.8),
                score("random:vit", "random", 0.25),
            ],
        },
        "depth": {
            "scores": [
                {
                    **score("mine", "student", 3.0, features="patch", kind="dense"),
                    "metric": "rmse",
                    "higher_is_better": False,
                },
                {"model": "a/b", "role": "teacher", "value": None, "reason": "no grid"},
            ]
        },
    },
}


def test_one_line_per_model_one_column_per_question() -> None:
    table = score_table(PROBE)
    assert table is not None
    assert table.head == (
        "model",
        "role",
        "scene: knn, accuracy ↑",
        "depth: dense, rmse ↓",
    )
    assert table.rows == (
        # What was best on `choose` counts, not what was best on the test.
        ("mine", "student", "0.65 (pooled)", "3 (patch)"),
        ("random:vit", "random floor", "0.25 (pooled)", "–"),
        ("a/b", "teacher", "0.9 (cls)", "–"),
    )
    every = all_scores(PROBE)
    assert every is not None
    assert len(every.rows) == 6
    assert every.rows[-1][-1] == "no grid"
    splits = split_table(PROBE)
    assert splits is not None
    assert splits.rows == (("scene", "b/labels/scene", "fit", "6", "9", "1", "2"),)


def test_less_is_better_where_it_is() -> None:
    worse = score("mine", "student", 4.0, higher_is_better=False, features="cls")
    better = score("mine", "student", 3.0, higher_is_better=False)
    table = score_table({"probes": {"d": {"scores": [better, worse]}}})
    assert table is not None
    assert table.rows == (("mine", "student", "3 (pooled)"),)


@pytest.mark.parametrize(
    "probe",
    [
        {},
        {"probes": {}},
        {"probes": {"a": {"scores": []}}},
        {"probes": {"a": None}, "models": 3},
        {"probes": [1]},
    ],
)
def test_other_documents_have_no_scores(probe: dict[str, Any]) -> None:
    assert score_table(probe) is None
    assert all_scores(probe) is None
    assert split_table(probe) is None
