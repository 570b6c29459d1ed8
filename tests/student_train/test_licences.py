"""What follows from data and teachers: told everywhere, and refused where asked."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from student_train.checkpoints import latest_checkpoint
from teachonce.cli import main
from tests.training import (
    CLASS,
    LOGITS,
    PATCH,
    once,
    plain_bank,
    trainer_for,
    write_recipe,
)

NET = {"model": "module:./nets.py:Net", "sizes": [[16, 16]], "on": ["image"]}
OUTPUTS = {"patch": {"from": "body"}, "logits": {}}


def licensed_bank(folder):
    """Open data, an expert that forbids commerce, and one drawn from a seed."""
    strict = {"weights": "random:1", "license": "CC-BY-NC-4.0; Apache-2.0"}
    return plain_bank(
        folder,
        dataset={"shards": "./data/*.tar", "license": "CC0-1.0"},
        teachers={
            "net": {**NET, **strict, "outputs": OUTPUTS},
            "free": {**NET, "weights": "random:2", "outputs": OUTPUTS},
        },
    )


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    return once(tmp_path_factory, "licensed", licensed_bank)


def test_the_strictest_follows(bank, tmp_path):
    free = {**LOGITS, "from": "main/free/logits"}
    for run, targets, expected in (
        ("strict", {"patch": PATCH, "class": CLASS}, "CC-BY-NC-4.0; Apache-2.0"),
        ("free", {"logits": free, "class": CLASS}, "CC0-1.0"),
    ):
        trainer = trainer_for(bank, tmp_path / run, targets=targets)
        assert trainer.run().is_done
        document = json.loads((trainer.folder.student / "config.json").read_text())
        assert document["license"] == expected
        held = latest_checkpoint(trainer.folder.checkpoints)
        with safe_open(held, "pt") as file:
            made = json.loads(file.metadata()["made_from"])
        assert made["license"] == expected
        same = ("recipe", "bank", "bank_state", "license", "licenses")
        assert {name: document["teachonce"][name] for name in same} == made
        assert made["bank"] == str(bank)
    assert made["licenses"] == "data: CC0-1.0"
    assert "| license | CC0-1.0 |" in (trainer.folder.student / "README.md").read_text()


def test_what_is_not_stated_is_not_made_up(tmp_path_factory, tmp_path):
    bank = once(tmp_path_factory, "plain", plain_bank)
    trainer = trainer_for(bank, tmp_path / "run")
    assert trainer.run().is_done
    document = json.loads((trainer.folder.student / "config.json").read_text())
    told = trainer.bank.record.dataset.get("license")
    assert document.get("license") == told
    assert document["teachonce"]["licenses"] == f"data: {told or 'not stated'}"


def test_what_is_not_allowed_is_refused(bank, tmp_path, capsys):
    path = write_recipe(tmp_path, banks={"main": str(bank)})
    for allowed, line in (
        (["cc0-1.0"], "without CC-BY-NC-4.0; Apache-2.0 (weights of net); leave"),
        (
            ["cc0-1.0", "apache-2.0"],
            "without CC-BY-NC-4.0; Apache-2.0 (weights of net)",
        ),
        (["mit"], "got mit without CC0-1.0 (data), CC-BY-NC-4.0"),
        (["mit", "seed=1"], "must be names of licences, got seed=1; write overrides"),
    ):
        assert main(["train", str(path), "--quiet", "--require-license", *allowed]) != 0
        assert line in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert main(["train", str(path), "require_license=[mit]", "--quiet"]) != 0
    assert "require_license must name every licence" in capsys.readouterr().err
    allowed = ["--require-license", "CC0-1.0", "cc-by-nc-4.0", "apache-2.0"]
    assert main(["train", str(path), "seed=1", "--quiet", *allowed]) == 0
    # Who may use it is no part of what is learned: the same run goes on.
    assert main(["train", str(path), "seed=1", "--quiet"]) == 0
