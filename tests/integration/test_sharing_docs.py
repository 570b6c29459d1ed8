"""What docs/sharing.md shows: every command runs, and prints lines of that kind."""

from __future__ import annotations

import re
import shlex

import pytest

from manifests.loading import load_job
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import ROOT, write_job, write_shards

TEXT = (ROOT / "docs" / "sharing.md").read_text()


@pytest.fixture
def bank(tmp_path, monkeypatch):
    """A small bank with the names of the one in the document."""
    for number, path in enumerate(write_shards(tmp_path, [12, 9, 7, 5, 8])):
        kind = "train" if number < 4 else "test"
        path.rename(path.with_name(f"cifar10-{kind}-0000{number % 4}.tar"))
    net = {
        "model": "module:./nets.py:Net",
        "weights": "random:1",
        "sizes": [[32, 32]],
        "batch": 4,
        "outputs": {
            "logits": {},
            "patch": {"from": "body", "encoding": "compact"},
            "layer2": {"from": "stem"},
        },
    }
    fields = {
        "dataset": {"shards": ["./data/cifar10-train-*", "./data/cifar10-test-*"]},
        "labels": {"class": {"member": "cls"}},
        "teachers": {"resnet20": net},
    }
    precompute(load_job(str(write_job(tmp_path, **fields))), quiet=True)
    keys = [*(f"s0-{row:04d}" for row in (1, 4, 7)), "cifar10-train-00001.tar\ts1-0002"]
    (tmp_path / "keys.txt").write_text("\n".join([*keys, "s2-0001"]) + "\n")
    monkeypatch.chdir(tmp_path)


def kind_of(line):
    """What a line of output is, whatever its numbers."""
    return re.sub(r"[\d.,]+( [kM]?B)?", "N", line)


def test_every_command_runs_and_prints_such_lines(bank, capsys):
    num_commands = 0
    for block in re.findall(r"```console\n(.*?)```", TEXT, re.DOTALL):
        for command, *lines in (part.splitlines() for part in block.split("$ ")[1:]):
            program, *arguments = shlex.split(command)
            assert program == "teachonce"
            code = main(arguments)
            said = capsys.readouterr().out
            assert code == (1 if arguments[0] == "diff" else 0), (command, said)
            printed = {kind_of(line) for line in said.splitlines()}
            assert {kind_of(line) for line in lines} <= printed, said
            num_commands += 1
    assert num_commands >= 8
