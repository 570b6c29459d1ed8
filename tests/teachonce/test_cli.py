"""The command line: verbs, exit codes, JSON, and what a finished job imports."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import teachonce
from manifests.loading import load_job
from pipeline.precompute import precompute
from teachonce import cli
from teachonce.arguments import make_parser
from teachonce.cli import main
from teachonce.verbs import text
from tests.conftest import ROOT, run_cli, write_tar

VERBS = (
    "pack",
    "index",
    "plan",
    "precompute",
    "info",
    "diff",
    "verify",
    "export",
    "finalise",
    "teachers",
    "demo",
    "train",
    "probe",
    "report",
)


def printed(capsys, *arguments: object, code: int = 0) -> str:
    capsys.readouterr()
    assert main([str(one) for one in arguments]) == code
    return capsys.readouterr().out


@pytest.fixture
def job(make_shards, make_job) -> Path:
    make_shards([6, 4])
    return make_job()


@pytest.fixture
def bank(job, tmp_path) -> Path:
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return tmp_path / "bank"


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    found = capsys.readouterr().out
    example = found[found.index(f"example: teachonce {verb} ") :].strip()
    words = example.split("teachonce ", 1)[1].replace('"', "").split()
    cut = words.index("--") if "--" in words else len(words)
    assert cli._parse(words[:cut]).verb == verb


def test_every_verb_is_a_module_and_has_help():
    parser = make_parser()
    (verbs,) = (
        action
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    assert set(verbs.choices) == set(VERBS)
    for verb in VERBS:
        assert (ROOT / "teachonce" / "verbs" / f"{verb}.py").is_file()


def test_no_verb_and_version(capsys):
    assert "The first hour" in printed(capsys, code=2)
    assert printed(capsys, "--version") == f"teachonce {teachonce.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["nosuch"], ["plan"], ["plan", "job.yaml", "--nosuch"], ["info", "a", "b"]],
)
def test_arguments_that_cannot_be_parsed_are_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_overrides_may_stand_before_and_behind_options():
    args = cli._parse(["plan", "job.yaml", "a=1", "--json", "b.c=2"])
    assert args.overrides == ["a=1", "b.c=2"]
    assert args.json


def test_plan_as_json_and_it_writes_nothing(job, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    facts = json.loads(printed(capsys, "plan", job, "--json", "teachers.net.batch=2"))
    assert sorted(tmp_path.rglob("*")) == before
    assert facts["bank"] == str(tmp_path / "bank")
    assert facts["done"] is False
    assert (facts["shards"], facts["samples"]) == (2, 10)
    assert (facts["rows"], facts["block_rows"]) == (16, 8)
    assert facts["padding"] == pytest.approx(6 / 16)
    assert facts["blocks_to_do"] == 2 * 2
    # A row fact object a block, and one object per output and block.
    assert facts["objects_to_do"] == 2 + 2 * 2
    row = {"logits": 5 * 4, "patch": 4 * 4 * 16 * 4}
    assert facts["bytes_by_output"] == {
        f"net/image/16x16/{name}": 10 * size for name, size in row.items()
    }
    assert facts["bytes_to_do"] == 10 * sum(row.values())
    assert facts["memory_bytes"] == 64 * 2**20 + facts["parameter_bytes"]
    weights = 3 * 8 * 9 + 8 + 8 * 16 * 9 + 16 + 16 * 5 + 5
    assert facts["parameter_bytes"] == 4 * weights
    assert facts["flops"] > 10 * 2 * (8 * 8 * 3 * 8 * 9)
    assert facts["passes"]["net.image"]["batch"] == 2
    assert facts["passes"]["net.image"]["outputs"] == {
        "16x16/logits": [5],
        "16x16/patch": [4, 4, 16],
    }


def test_plan_for_people(job, bank, capsys, make_job):
    done = printed(capsys, "plan", job)
    assert "nothing to do: the bank has all of it" in done
    new = printed(capsys, "plan", job, "bank=./other")
    assert "other (new)" in new
    assert "samples  10 in 2 shards; 16 rows in blocks of 8 (37.5% padding)" in new
    assert "input    image: image, view 0: square (aspect 1.00)" in new
    assert "net/image/16x16/patch" in new
    assert "to do    4 blocks of passes, 6 objects, at most 10.44 kB" in new
    assert "cannot overlap" in printed(
        capsys, "plan", job, "bank=./other", "block_rows=2000", "engine.memory=1 MiB"
    )


def test_a_plan_counts_only_what_is_missing(job, bank, capsys, make_job, make_shards):
    whole = json.loads(printed(capsys, "plan", job, "bank=./other", "--json"))
    done = json.loads(printed(capsys, "plan", job, "--json"))
    assert done["done"] is True
    assert (done["blocks_to_do"], done["bytes_to_do"], done["flops"]) == (0, 0, 0)
    make_shards([5], first=2)
    grown = json.loads(printed(capsys, "plan", job, "--json"))
    assert grown["samples"] == 15
    assert grown["blocks_to_do"] == 2
    assert grown["flops"] == pytest.approx(whole["flops"] / 2)
    assert grown["bytes_to_do"] == whole["bytes_to_do"] / 2


def test_precompute_as_json(job, capsys, tmp_path):
    facts = json.loads(printed(capsys, "precompute", job, "--json", "--quiet"))
    assert facts["was_done"] is False
    assert facts["result"]["samples"] == 10
    assert facts["result"]["blocks"] == 4
    assert facts["state"]["complete"] is True
    assert facts["state"]["valid"] == {"rows": 10, "net.image": 10}
    assert facts["repaired"] == []
    again = json.loads(printed(capsys, "precompute", job, "--json", "--quiet"))
    assert again["was_done"] is True
    assert "nothing to do" in printed(capsys, "precompute", job)


def test_info_as_json(bank, capsys):
    facts = json.loads(printed(capsys, "info", bank, "--json"))
    assert facts["bank"] == str(bank)
    assert facts["complete"] is True
    assert (facts["samples"], facts["shards"], facts["rows"]) == (10, 2, 16)
    assert (facts["block_rows"], facts["views"], facts["runs"]) == (8, 1, 1)
    assert facts["dataset_license"] == "cc0-1.0"
    assert facts["lock"] is None
    one = facts["passes"]["net.image"]
    assert (one["blocks"], one["blocks_total"], one["valid"]) == (2, 2, 10)
    assert one["invalid"] == {}
    assert one["weights"]["kind"] == "random"
    stored = sum(
        path.stat().st_size for path in bank.glob("features.zarr/net/*/*/*/c.*")
    )
    stats = sum(p.stat().st_size for p in bank.glob("features.zarr/net/*/*/valid/c.*"))
    assert one["bytes"] == stored - stats
    assert facts["outputs"]["net/image/16x16/patch"]["shape"] == [4, 4, 16]
    assert facts["outputs"]["net/image/16x16/patch"]["encoding"] == "lossless"


def test_info_counts_no_retired_block(bank, job, tmp_path, capsys):
    from tests.conftest import sample_members

    members = [
        one for row in range(9) for one in sample_members(f"n{row}", 90 + row, False)
    ]
    write_tar(tmp_path / "data" / "train-00000.tar", members)
    assert main(["precompute", str(job), "--quiet"]) == 0
    facts = json.loads(printed(capsys, "info", bank, "--json"))
    assert (facts["shards"], facts["retired_shards"], facts["samples"]) == (2, 1, 13)
    for one in facts["passes"].values():
        assert (one["blocks"], one["blocks_total"]) == (3, 3)


def test_info_for_people(bank, capsys):
    found = printed(capsys, "info", bank)
    assert ": complete" in found
    assert "samples  10 in 2 shards; 16 rows in blocks of 8, 1 view(s)" in found
    assert "nets.py:Net" in found


def test_info_of_a_bank_that_grows(job, bank, capsys, make_shards):
    """Between planning and the first commit: what is there is said, and exit 1."""
    from pipeline.precompute import prepare

    make_shards([5], first=2)
    loaded = load_job(str(job))
    from manifests.storage import Store

    prepare(loaded, Store(loaded.bank))
    facts = json.loads(printed(capsys, "info", bank, "--json", code=1))
    one = facts["passes"]["net.image"]
    assert (one["blocks"], one["blocks_total"]) == (2, 3)
    assert facts["complete"] is False
    assert facts["samples"] == 15


def test_verify(bank, capsys):
    facts = json.loads(printed(capsys, "verify", bank, "--full", "--json"))
    assert facts["sound"] is True
    assert facts["problems"] == []
    victim = next(bank.glob("features.zarr/net/image/16x16/patch/c.*"))
    victim.unlink()
    assert "mend with" in printed(capsys, "verify", bank, code=1)


def test_finalise(bank, capsys):
    before = (bank / "bank.json").read_bytes()
    assert printed(capsys, "finalise", bank) == "10 rows; complete\n"
    assert (bank / "bank.json").read_bytes() == before


def test_index(make_shards, make_job, tmp_path, capsys):
    paths = make_shards([5, 3])
    folder = tmp_path / "made"
    facts = json.loads(
        printed(capsys, "index", tmp_path / "data" / "*.tar", folder, "--json")
    )
    assert facts["dataset"] == f"{folder}/dataset.json"
    assert (facts["shards"], facts["samples"]) == (2, 8)
    assert facts["bytes"] == sum(path.stat().st_size for path in paths)
    assert facts["damaged"] == facts["faults"] == {}
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        *("dataset.json", "dataset.parquet"),
    ]
    job = make_job(dataset={"shards": "./made/dataset.json"})
    planned = json.loads(printed(capsys, "plan", job, "--json"))
    assert planned["samples"] == 8
    # Shells expand patterns themselves; one damaged shard is said, and exit 1.
    paths[1].write_bytes(paths[1].read_bytes()[:3300])
    found = printed(capsys, "index", *paths, folder, code=1)
    assert "6 samples in 2 shards" in found
    assert "damaged: train-00001.tar: " in found
    assert "no row: train-00001.tar:s1-0001: truncated" in found


def test_teachers(capsys):
    assert "timm:NAME" in printed(capsys, "teachers")
    assert set(json.loads(printed(capsys, "teachers", "--json"))) >= {"timm", "module"}


def test_a_stop_says_that_the_same_command_goes_on(job):
    """Ctrl-C in a process of its own: the handler ends it at once."""
    code = (
        "import sys; from teachonce.cli import main; import teachonce.verbs.plan as v\n"
        "def stop(args): raise KeyboardInterrupt\n"
        "v.run = stop\n"
        f"sys.exit(main(['plan', {str(job)!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == "teachonce: stopped; the same command goes on from here\n"


def test_a_finished_job_run_again_imports_neither_torch_nor_beam(job, bank):
    code = (
        "import sys; from teachonce.cli import main\n"
        f"code = main(['precompute', {str(job)!r}])\n"
        "heavy = {'torch', 'apache_beam', 'timm', 'open_clip', 'torchvision'}\n"
        "print(sorted(heavy & set(sys.modules)), code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
    assert "nothing to do" in done.stdout


def test_opening_a_bank_imports_neither_torch_nor_beam(bank):
    code = (
        "import sys, teachonce\n"
        f"found = teachonce.open_bank({str(bank)!r})\n"
        "found.read('net/image/16x16/patch', 0)\n"
        "heavy = {'torch', 'apache_beam', 'timm', 'teachers', 'zarr'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", ["pipeline", "manifests"])
def test_a_foreign_package_is_named(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    for verb in ("info", "plan"):
        done = run_cli(verb, "x", cwd=tmp_path / name, PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            f"teachonce {verb}: package '{name}' is found at {tmp_path}"
        )
        assert "another package of that name is on the path" in line


def test_a_foreign_package_is_named_in_python_too(tmp_path):
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "__init__.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "import teachonce; teachonce.open_bank"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        cwd="/",
        check=False,
    )
    assert "ForeignPackageError: package 'pipeline' is found at" in done.stderr


def test_names_that_the_package_does_not_have():
    with pytest.raises(AttributeError, match="has no attribute 'nosuch'"):
        _ = teachonce.nosuch
    assert set(teachonce.__all__) == {
        "Bank",
        "BankDataset",
        "Reading",
        "__version__",
        "open_bank",
        "point_table",
    }


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1530, "1.53 kB"),
        (2.5e12, "2.50 TB"),
        (3e16, "30000.00 TB"),
    ],
)
def test_sizes_for_people(number, expected):
    assert text.size(number) == expected


def test_a_table():
    found = text.table(("a", "long"), [("xyz", 1), ("", "")])
    assert found == "a    long\n---  ----\nxyz  1\n"


def test_plan_without_weights_says_so(make_shards, make_job, tmp_path, capsys):
    """Shapes need no weights: the numbers come out, and what is missing is named."""
    make_shards([3])
    teachers = yaml.safe_load(make_job().read_text())["teachers"]
    teachers["net"]["weights"] = "./nowhere.pt"
    path = make_job(teachers=teachers)
    assert main(["plan", str(path)]) == 1
    said = capsys.readouterr()
    assert "net/image/16x16/logits" in said.out
    assert "missing  teachers.net.weights must be a file" in said.err
    assert not (tmp_path / "bank").exists()
    assert main(["precompute", str(path)]) == 2


def test_plan_checks_beam_options(make_shards, make_job, capsys):
    make_shards([3])
    assert main(["plan", str(make_job()), "--", "--runner=NoRunner"]) == 2
    assert "NoRunner" in capsys.readouterr().err
