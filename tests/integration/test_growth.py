"""A bank grows: only what is missing is computed, nothing that is there is touched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from manifests.errors import BankError
from manifests.loading import load_job
from manifests.storage import Store
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import Outcome, precompute, prepare
from tests.conftest import POINTS_INPUT, POINTS_TEACHER

NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "sizes": [[16, 16]],
    "batch": 4,
    "outputs": {"logits": {}, "patch": {"from": "body"}},
}


def run(path: Path, *overrides: str) -> Outcome:
    return precompute(load_job(str(path), overrides), quiet=True)


def frozen_files(bank: Path) -> dict[str, tuple[bytes, int]]:
    """Feature objects, row facts, commits (timing too) and index, and their times."""
    found = [*bank.glob("features.zarr/*/*/*/*/c.*"), *bank.glob("rows/*/*")]
    found += [*bank.glob("commits/*/*.json"), *bank.glob("dataset/*")]
    return {
        str(path.relative_to(bank)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(found)
        if not {"stats", "valid"} & set(path.parts)
    }


def check_grown(bank: Path, before: dict[str, tuple[bytes, int]]) -> set[str]:
    """Checks that nothing changed and all is sound; returns what is new."""
    after = frozen_files(bank)
    assert {path: after[path] for path in before} == before
    assert verify(*open_record(str(bank)), full=True).is_sound
    return set(after) - set(before)


def passes_of(files: set[str]) -> set[str]:
    return {path.split("/")[1] for path in files if path.startswith("commits/")}


def values(bank: Path, path: str, view: int = 0) -> np.ndarray:
    found = open_bank(str(bank))
    rows = found.whole_array("key") != ""
    blocks = range(found.record.num_blocks)
    return np.concatenate([found.read(path, block, view) for block in blocks])[rows]


@pytest.fixture
def bank(make_shards, make_job, tmp_path) -> Path:
    make_shards([10, 6], with_points=True)
    assert run(make_job()).is_whole
    return tmp_path / "bank"


def with_net(**changes: object) -> dict[str, object]:
    return {"net": {**NET, **changes}}


def test_a_second_teacher(bank, make_job):
    before = frozen_files(bank)
    outcome = run(
        make_job(teachers=with_net() | {"other": {**NET, "weights": "random:7"}})
    )
    assert outcome.is_whole
    new = check_grown(bank, before)
    assert passes_of(new) == {"other.image"}
    assert sum(path.startswith("commits/") for path in new) == 3
    ours, theirs = (
        values(bank, "net/image/16x16/logits"),
        values(bank, "other/image/16x16/logits"),
    )
    assert np.isfinite(ours).all()
    assert np.isfinite(theirs).all()
    assert np.abs(ours - theirs).max() > 1e-3


def test_two_jobs_with_other_teachers_one_after_another(bank, make_job):
    before = frozen_files(bank)
    job = make_job("second.yaml", teachers={"other": {**NET, "weights": "random:7"}})
    assert run(job).is_whole
    assert passes_of(check_grown(bank, before)) == {"other.image"}
    middle = frozen_files(bank)
    third = {"third": {**NET, "weights": "random:8", "sizes": [[24, 24]]}}
    assert run(make_job("third.yaml", teachers=third)).is_whole
    assert passes_of(check_grown(bank, middle)) == {"third.image"}
    assert run(job).was_done
    assert run(make_job()).was_done
    assert set(open_record(str(bank))[1].state.valid.values()) == {16}


def test_another_output(bank, make_job, tmp_path):
    before = frozen_files(bank)
    outputs = {**NET["outputs"], "layer1": {"from": "stem", "encoding": "half"}}
    assert run(make_job(teachers=with_net(outputs=outputs))).is_whole
    new = check_grown(bank, before)
    assert passes_of(new) == {"net.image.2"}
    assert not any("/patch/" in path or "/logits/" in path for path in new)
    fresh = tmp_path / "fresh"
    run(make_job(teachers=with_net(outputs=outputs)), f"bank={fresh}")
    for name in ("logits", "patch", "layer1"):
        path = f"net/image/16x16/{name}"
        np.testing.assert_array_equal(values(bank, path), values(fresh, path))


def test_another_size(bank, make_job, tmp_path):
    before = frozen_files(bank)
    assert run(make_job(teachers=with_net(sizes=[[16, 16], [24, 32]]))).is_whole
    new = check_grown(bank, before)
    assert passes_of(new) == {"net.image.2"}
    assert not any("/16x16/" in path for path in new)
    assert values(bank, "net/image/24x32/patch").shape == (16, 6, 8, 16)
    fresh = tmp_path / "fresh"
    run(make_job(teachers=with_net(sizes=[[24, 32]])), f"bank={fresh}")
    path = "net/image/24x32/patch"
    np.testing.assert_array_equal(values(bank, path), values(fresh, path))


def test_random_views(bank, make_job, tmp_path):
    before = frozen_files(bank)
    views = {"random": 2, "seed": 3, "scale": [0.5, 0.9]}
    assert run(make_job(views=views)).is_whole
    new = check_grown(bank, before)
    assert passes_of(new) == {"net.image.2"}
    assert all(
        path.split("/")[-1].split(".")[2] in "12" for path in new if "/c." in path
    )
    fresh = tmp_path / "fresh"
    run(make_job(views=views), f"bank={fresh}")
    for view in range(3):
        path = "net/image/16x16/patch"
        np.testing.assert_array_equal(
            values(bank, path, view), values(fresh, path, view)
        )
    ours, theirs = open_bank(str(bank)), open_bank(str(fresh))
    for name in ("views/image_box", "views/flip"):
        np.testing.assert_array_equal(ours.whole_array(name), theirs.whole_array(name))
    # A job that wants fewer views, or none, is answered, and redraws nothing.
    assert run(make_job(views={"random": 1, "seed": 3, "scale": [0.5, 0.9]})).was_done
    assert run(make_job()).was_done
    other = {"other": {**NET, "weights": "random:7"}}
    assert run(make_job(teachers=other)).is_whole
    np.testing.assert_array_equal(
        open_bank(str(bank)).whole_array("views/image_box"),
        theirs.whole_array("views/image_box"),
    )
    # Random views of the new teacher follow what the bank draws.
    assert run(make_job(teachers=other, views=views)).is_whole
    middle = frozen_files(bank)
    assert any(path.startswith("commits/other.image.2/") for path in middle)


def test_more_shards(bank, make_job, make_shards, tmp_path):
    before = frozen_files(bank)
    make_shards([9], with_points=True, first=2)
    outcome = run(make_job())
    assert outcome.is_whole
    assert outcome.result.samples == 9
    new = check_grown(bank, before)
    assert {int(path[-13:-5]) for path in new if "commits/" in path} == {3, 4}
    assert outcome.record.shards[-1].part == "part-00001"
    fresh = tmp_path / "fresh"
    run(make_job(), f"bank={fresh}")
    path = "net/image/16x16/logits"
    np.testing.assert_array_equal(values(bank, path), values(fresh, path))


def test_another_input_with_its_teacher_and_a_label(bank, make_job):
    before = frozen_files(bank)
    image = {"kind": "image", "member": "jpg"}
    job = make_job(
        inputs={"image": image, "lidar": POINTS_INPUT, "again": image},
        labels={
            "class": {"member": "cls", "num_classes": 5},
            "number": {"member": "cls"},
        },
        teachers={
            "net": {**NET, "on": ["image"]},
            "points": {**POINTS_TEACHER, "on": ["lidar"]},
        },
    )
    assert run(job).is_whole
    new = check_grown(bank, before)
    assert passes_of(new) == {"points.lidar", "rows.2"}
    opened = open_bank(str(bank))
    assert np.isfinite(values(bank, "points/lidar/native/pooled")).all()
    rows = opened.whole_array("key") != ""
    labels = opened.whole_array("labels/class")[rows]
    np.testing.assert_array_equal(labels, opened.whole_array("labels/number")[rows])
    assert opened.record.inputs["again"].view0 == "full"
    assert opened.record.inputs["again"].aspect == 1.0
    assert not np.isnan(opened.whole_array("views/again_box")[rows]).any()
    # The first input keeps what was decided when the bank was made.
    assert opened.record.inputs["image"].view0 == "square"
    assert run(job).was_done


def test_an_input_added_to_random_views_keeps_how_they_are_drawn(
    make_shards, make_job, tmp_path
):
    make_shards([6], with_points=True)
    run(make_job(views={"random": 1}))
    before = open_bank(str(tmp_path / "bank")).whole_array("views/flip")
    job = make_job(
        views={"random": 1},
        inputs={"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT},
        teachers={"points": POINTS_TEACHER},
    )
    assert run(job).is_whole
    opened = open_bank(str(tmp_path / "bank"))
    np.testing.assert_array_equal(opened.whole_array("views/flip"), before)
    assert opened.record.views["flips"] is True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"teachers": with_net(weights="random:2")},
            r"weights: .*'seed': 1.*'seed': 2",
        ),
        (
            {"teachers": with_net(args={"width": 4})},
            r"args: \{\} in the bank.*'width': 4",
        ),
        (
            {"teachers": with_net(precision="bfloat16")},
            "precision: 'float32' in the bank",
        ),
        (
            {"teachers": with_net(preprocess={"channels": "bgr"})},
            "stored differently.*preprocess.*'rgb'.*'bgr'",
        ),
        (
            {"teachers": with_net(outputs={"logits": {"encoding": "raw"}})},
            "net/image/16x16/logits is stored differently.*encoding",
        ),
        (
            {"teachers": with_net(outputs={"patch": {"from": "body", "pool": [2, 2]}})},
            r"patch is stored differently.*definition: .*'pool': \[2, 2\]",
        ),
        (
            {"teachers": with_net(outputs={"patch": {"from": "stem"}})},
            "patch is stored differently.*'from': 'stem'",
        ),
        (
            {"inputs": {"image": {"kind": "image", "member": "png"}}},
            r"input image is another one.*member: 'jpg' in the bank, 'png' now",
        ),
        (
            {"inputs": {"image": {"kind": "image", "member": "jpg", "view0": "full"}}},
            "input image is another one.*view0: 'auto' in the bank, 'full' now",
        ),
        (
            {"labels": {"class": {"member": "cls", "num_classes": 9}}},
            "label class is another one there",
        ),
    ],
)
def test_what_contradicts_the_bank_is_refused_by_name(bank, make_job, fields, message):
    before = frozen_files(bank)
    record = (bank / "bank.json").read_bytes()
    with pytest.raises(BankError, match=message):
        run(make_job(**fields))
    assert check_grown(bank, before) == set()
    assert (bank / "bank.json").read_bytes() == record


def test_views_drawn_otherwise_are_refused(make_shards, make_job):
    make_shards([4])
    run(make_job(views={"random": 1}))
    with pytest.raises(BankError, match="seed: 0 in the bank, 5 now"):
        run(make_job(views={"random": 1, "seed": 5}))
    with pytest.raises(BankError, match="flips: True in the bank, False now"):
        run(make_job(views={"random": 2, "flip": False}))


def test_another_datasets_job_is_refused(bank, make_job, make_shards, tmp_path):
    (tmp_path / "data").rename(tmp_path / "kept")
    make_shards([10, 6], with_points=True, first=50)
    (tmp_path / "data").rename(tmp_path / "foreign")
    (tmp_path / "kept").rename(tmp_path / "data")
    shards = {"dataset": {"shards": "./foreign/*.tar"}}
    with pytest.raises(
        BankError, match=r"is another job's: it was made from shards train"
    ):
        run(make_job("foreign.yaml", **shards))
    # Also where the shards are called the same.
    for number in (0, 1):
        path = tmp_path / "foreign" / f"train-{50 + number:05d}.tar"
        path.rename(path.with_name(f"train-{number:05d}.tar"))
    with pytest.raises(BankError, match="is another job's"):
        run(make_job("foreign.yaml", **shards))


def test_another_file_of_code_is_another_teacher(bank, make_job, tmp_path):
    path = make_job()
    with open(tmp_path / "nets.py", "a") as file:
        file.write("\n# a word\n")
    with pytest.raises(BankError, match="code: "):
        run(path)


def test_a_card_and_licences_survive_a_job_that_says_none(bank, make_job):
    other = {"other": {**NET, "weights": "random:7"}}
    run(make_job(dataset={"shards": "./data/train-*.tar"}, teachers=other))
    assert open_record(str(bank))[1].dataset["license"] == "cc0-1.0"
    card = (bank / "README.md").read_text()
    assert "Data licence: cc0-1.0." in card
    assert "16 samples of 2 shards" in card
    run_files = [json.loads(path.read_text()) for path in bank.glob("runs/*.json")]
    assert len(run_files) == 2
    assert yaml.safe_load((bank / "bank.json").read_text())["num_views"] == 1


def test_a_job_is_done_while_another_jobs_passes_are_not(make_shards, make_job):
    """Two jobs share a bank; one of them was killed before it computed anything."""
    make_shards([11])
    first = make_job()
    assert run(first).is_whole
    teachers = {"other": {**NET, "weights": "random:7"}}
    second = make_job("second.yaml", teachers=teachers)
    job = load_job(str(second))
    prepare(job, Store(job.bank))
    again = run(first)
    assert again.was_done
    assert again.is_whole
    assert not again.record.state.complete
    assert run(second).is_whole
    assert run(first).record.state.complete
