"""A run's folder belongs to one recipe, one state of a bank, one process."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from manifests.recipe import Recipe
from student_train.run_folder import RunFolder

FIELDS = {
    "run": "/runs/a",
    "banks": {"main": "/bank"},
    "student": {"model": "timm:test_vit", "input": "image"},
    "targets": {"it": {"from": "main/net/patch", "loss": {"mse": 1.0}}},
    "stages": [{"steps": 3, "batch": 4, "lr": 0.1}],
}
FACTS = {"rows": [22], "sources": {"it": ["net/image/16x16/patch", "abc"]}}


def recipe(**fields) -> Recipe:
    return Recipe.model_validate({**FIELDS, **fields})


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(str(tmp_path / "deep" / "run"))
    assert not folder.path.exists()
    assert folder.claim(recipe(), FACTS)
    return folder


def test_the_same_recipe_goes_on(folder):
    before = (folder.path / "run.json").read_bytes()
    assert not folder.claim(recipe(), FACTS)
    assert (folder.path / "run.json").read_bytes() == before
    assert folder.read()["rows"] == [22]


@pytest.mark.parametrize(
    "fields",
    [
        {"run": "/elsewhere"},
        {"banks": {"main": "gs://moved/bank"}},
        {"data": {"shards": "/mnt/*.tar"}},
        {"loader": {"threads": 3, "workers": 2, "prefetch": 9}},
        {"engine": {"device": "cuda:1", "threads": 2}},
        {"checkpoints": {"every_steps": 7, "log_steps": 1}},
    ],
)
def test_what_may_change(fields, folder):
    assert not folder.claim(recipe(**fields), FACTS)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"seed": 1}, "seed is"),
        ({"precision": "bfloat16"}, "precision is"),
        ({"normalise": "none"}, "normalise is"),
        ({"banks": {"other": "/bank"}, "seed": 2}, "seed is"),
        ({"data": {"rows": {"limit": 3}}}, r"data\.rows\.limit is"),
        ({"loader": {"view": 0}}, r"loader\.view is"),
        (
            {"loader": {"window_blocks": 2, "view": 0}},
            r"view, loader\.window_blocks are",
        ),
        ({"optimizer": {"kind": "sgd"}}, r"optimizer\.kind is"),
        ({"stages": [{"steps": 4, "batch": 4, "lr": 0.1}]}, "stages is"),
    ],
)
def test_what_may_not(fields, named, folder):
    before = (folder.path / "run.json").read_bytes()
    with pytest.raises(ValueError, match=f"but .*{named} not what it"):
        folder.claim(recipe(**fields), FACTS)
    assert (folder.path / "run.json").read_bytes() == before


def test_another_state_of_the_bank(folder):
    facts = {**FACTS, "sources": {"it": ["net/image/16x16/patch", "abd"]}}
    with pytest.raises(ValueError, match=r"one state of its bank, but sources\.it is"):
        folder.claim(recipe(), facts)


def test_a_result_is_kept_beside_the_rest(folder):
    folder.finish({"steps": 3})
    assert folder.read()["result"] == {"steps": 3}
    # It is no part of what must be the same.
    assert not folder.claim(recipe(), FACTS)
    assert folder.read()["recipe"]["seed"] == 0


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"recipe": 3}'])
def test_damage(text, folder):
    (folder.path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is missing or damaged .*another"):
        folder.claim(recipe(), FACTS)
    with pytest.raises(ValueError, match="must be the folder of a run"):
        folder.read()


def test_a_record_of_an_older_recipe_is_another(folder):
    """A field that did not exist then is named, not stumbled over."""
    record = folder.read()
    del record["recipe"]["loader"]
    (folder.path / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"loader\.view"):
        folder.claim(recipe(), FACTS)


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run", "file:///run"])
def test_not_on_this_machine(url):
    with pytest.raises(ValueError, match="run must be a folder on this machine, got"):
        RunFolder(url)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/run"):
        folder = RunFolder(str(tmp_path / name))
        with pytest.raises(OSError, match=r"cannot write .*file"):
            folder.claim(recipe(), FACTS)
        with (
            pytest.raises(OSError, match=r"cannot write to run .*file"),
            folder.alone(),
        ):
            pass


def _hold(path, held, done):
    with RunFolder(path).alone():
        held.set()
        done.wait(30)


def test_one_process_at_a_time(folder):
    context = multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    arguments = (str(folder.path), held, done)
    other = context.Process(target=_hold, args=arguments)
    other.start()
    assert held.wait(30)
    with pytest.raises(ValueError, match="one process at a time"), folder.alone():
        pass
    # Killed, it lets go.
    other.kill()
    other.join()
    with folder.alone():
        pass
