"""``plan --sample``: what it says of a bank is what the bank then is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from manifests.errors import ManifestError
from manifests.job import Job
from manifests.loading import load_job
from manifests.prices import load_prices
from pipeline.cost import Assumed, Terms
from pipeline.errors import PipelineError
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import (
    POINTS_INPUT,
    POINTS_TEACHER,
    ROOT,
    sample_members,
    write_tar,
)

NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "on": ["image"],
    "sizes": [[32, 32]],
    "batch": 4,
    "outputs": {
        "logits": {"topk": 3},
        "patch": {"from": "body", "encoding": "compact"},
        "layer0": {"from": "stem", "codec": "zstd"},
    },
}


@pytest.fixture
def job(make_shards, make_job) -> Path:
    make_shards([40, 21], with_points=True)
    return make_job(
        inputs={"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT},
        views={"random": 2, "yaw_deg": 10.0},
        teachers={"net": NET, "points": {**POINTS_TEACHER, "on": ["lidar"]}},
        block_rows=16,
    )


def plan(capsys, *arguments: object, code: int = 0) -> dict:
    capsys.readouterr()
    assert main(["plan", *map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def sizes_of(bank: Path) -> dict[str, int]:
    return {
        str(path.relative_to(bank)): path.stat().st_size
        for path in bank.rglob("*")
        if path.is_file() and path.parts[-2] != "runs"
    }


def feature_bytes(sizes: dict[str, int], output: str) -> int:
    """Bytes of an output's objects, whatever arrays it is stored in."""
    lead = f"features.zarr/{output}"
    return sum(
        size
        for path, size in sizes.items()
        if path.startswith((f"{lead}/c.", f"{lead}_")) and not path.endswith("json")
    )


def own_bytes(sample: dict) -> dict[str, float]:
    return {
        output["path"]: one["job_bytes"]
        for output in sample["outputs"]
        for one in output["presets"]
        if one["is_own"]
    }


def test_a_bank_is_as_large_as_its_plan_says(job, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    sample = plan(capsys, job, "--sample", 24)["sample"]
    assert sorted(tmp_path.rglob("*")) == before
    assert sample["rows"] == 24
    assert sample["invalid"] == {}
    assert precompute(load_job(str(job)), quiet=True).is_whole
    sizes = sizes_of(tmp_path / "bank")
    for output, told in own_bytes(sample).items():
        real = feature_bytes(sizes, output)
        # Three numbers a row are less than a chunk costs: what they take is little.
        rel = 0.02 if output.endswith(("patch", "layer0")) else 0.1
        assert told == pytest.approx(real, rel=rel), output
    assert sample["amounts"]["bytes"] == pytest.approx(sum(sizes.values()), rel=0.02)
    assert sample["amounts"]["objects"] == pytest.approx(len(sizes), rel=0.02)


def test_what_is_measured_on_all_rows_is_exact(job, tmp_path, capsys):
    changes = ["views.random=1", "stored_inputs={image: {short_side: 20}}"]
    sample = plan(capsys, job, *changes, "--sample", 1000)["sample"]
    assert sample["rows"] == 61
    assert precompute(load_job(str(job), changes), quiet=True).is_whole
    sizes = sizes_of(tmp_path / "bank")
    copies = "stored_inputs/image/native/jpeg"
    told = own_bytes(sample)
    # The first JPEG of a chunk brings the tables that all share, half of one so small.
    assert told.pop(copies) == pytest.approx(feature_bytes(sizes, copies), rel=0.03)
    total = sum(feature_bytes(sizes, output) for output in told)
    assert sum(told.values()) == pytest.approx(total, rel=0.005)


def test_only_what_is_missing_is_counted_and_run(job, tmp_path, capsys):
    assert precompute(load_job(str(job)), quiet=True).is_whole
    done = plan(capsys, job, "--sample", 8)["sample"]
    assert done["amounts"]["machine_seconds"] == 0
    assert done["amounts"]["feature_bytes"] == 0
    assert done["break_even"] == []
    document = yaml.safe_load(job.read_text())
    document["teachers"]["more"] = {**NET, "weights": "random:2"}
    job.write_text(yaml.safe_dump(document))
    grown = plan(capsys, job, "--sample", 24)["sample"]
    assert {one["path"].split("/")[0] for one in grown["outputs"]} == {"more"}
    before = sizes_of(tmp_path / "bank")
    assert precompute(load_job(str(job)), quiet=True).is_whole
    after = sizes_of(tmp_path / "bank")
    told = grown["amounts"]["views"] * grown["amounts"]["feature_bytes"]
    real = sum(feature_bytes(after, one) for one in own_bytes(grown))
    assert told == pytest.approx(real, rel=0.02)
    assert sum(feature_bytes(before, one) for one in own_bytes(grown)) == 0


def test_samples_that_cannot_be_used_are_counted_and_said(job, tmp_path, capsys):
    members = [m for n in range(12) for m in sample_members(f"k{n:02d}", n, True)]
    members[15] = (members[15][0], b"no jpeg")
    write_tar(tmp_path / "data" / "train-00000.tar", members)
    (tmp_path / "data" / "train-00001.tar").unlink()
    sample = plan(capsys, job, "--sample", 12)["sample"]
    assert sample["invalid"] == {"image:undecodable": 1}
    assert main(["plan", str(job), "--sample", "12"]) == 0
    assert "invalid: 1 image:undecodable" in " ".join(capsys.readouterr().out.split())
    # The middle sample is the broken one.
    assert main(["plan", str(job), "--sample", "1"]) == 2
    told = capsys.readouterr().err
    assert "none of 1 sampled rows can be used by pass net.image" in told


def test_for_people_it_keeps_to_a_hundred_columns(job, capsys):
    arguments = ["plan", str(job), "--sample", "16", "--machine", "g2-standard-8"]
    assert main([*arguments, "--workers", "3", "--speedup", "7"]) == 0
    told = capsys.readouterr().out
    sample = told[told.index("sample   16 sample(s)") :]
    assert max(map(len, sample.splitlines())) <= 100
    for words in (
        "lossless zstd*",
        "compact*",
        "topk 3*",
        "nats (KL) off",
        "on 3 g2-standard-8s, each 7 times as fast as this one",
        "prices of 2026-",
        "of 1,000 samples/s reads",
        "students or ablations of 100 epochs",
    ):
        assert words in " ".join(sample.split()), words


def test_options_change_what_they_say(job, tmp_path, capsys):
    prices = tmp_path / "mine.yaml"
    storage = dict.fromkeys(
        ("gb_month", "writes_per_1000", "reads_per_1000", "egress_gb"), 0.0
    )
    prices.write_text(
        yaml.safe_dump(
            {
                "date": "2030-01-01",
                "region": "cellar",
                "sources": ["the electricity bill"],
                "machines": {"old": {"hourly": 36.0}},
                "storage": {**storage, "gb_month": 2.0},
            }
        )
    )
    options = ["--machine", "old", "--speedup", "4", "--workers", "2", "--months", "3"]
    options += ["--student-rate", "50", "--student-epochs", "20"]
    facts = plan(capsys, job, "--sample", 16, "--prices", prices, *options)["sample"]
    seconds = facts["amounts"]["machine_seconds"]
    assert facts["hours"] == pytest.approx(seconds / 4 / 2 / 3600)
    assert facts["price"]["making"] == pytest.approx(seconds / 4 / 3600 * 36)
    total = facts["amounts"]["bytes"]
    assert facts["price"]["storage_month"] == pytest.approx(total / 2**30 * 2)
    assert facts["prices"]["region"] == "cellar"
    assert facts["student_bytes_per_second"] == pytest.approx(
        50 * facts["sample_bytes"]
    )
    one, *_, eight = facts["break_even"]
    assert (one["views"], eight["views"]) == (1, 8)
    assert one["epochs"] / 20 == pytest.approx(one["students"])
    assert eight["epochs"] > 4 * one["epochs"] / 8


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--machine", "g2-standard-8"], "--machine: needs --sample N"),
        (["--speedup", "2", "--months", "3"], "--speedup, --months: needs --sample N"),
        (["--prices", "x.yaml"], "--prices: needs --sample N"),
        (["--sample", "0"], "--sample must be at least 1, got 0"),
        (["--sample", "4", "--machine", "abacus"], "got 'abacus'"),
        (["--sample", "4", "--workers", "0"], "--workers must be above 0, got 0"),
        (["--sample", "4", "--prices", "gone.yaml"], "cannot read the prices"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(job, capsys, options, told):
    assert main(["plan", str(job), *options]) == 2
    assert told in capsys.readouterr().err


def test_weights_and_memory_are_needed_to_sample(job, capsys):
    missing = "teachers.net.weights=gone.pt"
    assert main(["plan", str(job), missing]) == 1
    assert main(["plan", str(job), missing, "--sample", "4"]) == 2
    assert "gone.pt" in capsys.readouterr().err
    small = ["engine.memory=1 MiB", "teachers.net.sizes=[[64, 64]]"]
    assert main(["plan", str(job), *small, "--sample", "61"]) == 2
    assert "--sample must be at most" in capsys.readouterr().err


def test_a_price_limit_is_judged_by_plan(job, capsys):
    assert main(["plan", str(job), "limits.max_usd=5"]) == 0
    assert "limits.max_usd is 5: not judged, a price needs" in capsys.readouterr().err
    sampled = ["plan", str(job), "--sample", "8"]
    assert main([*sampled, "limits.max_usd=5"]) == 2
    assert "cannot be judged without the type of machine" in capsys.readouterr().err
    priced = [*sampled, "--machine", "g2-standard-8"]
    assert main([*priced, "limits.max_usd=5"]) == 0
    assert main([*priced, "limits.max_usd=1e-6"]) == 2
    assert "limits.max_usd is 1e-06, the job may cost" in capsys.readouterr().err


def test_a_price_limit_is_judged_before_a_bank_is_made(job, tmp_path):
    priced = Terms(Assumed(machine="n1-standard-4"), load_prices())

    def run(limit: float | None, terms: Terms | None):
        fields = load_job(str(job)).model_dump(by_alias=True, exclude_unset=True)
        limited = {**fields, "limits": {"max_usd": limit}}
        return precompute(Job.model_validate(limited), quiet=True, terms=terms)

    with pytest.raises(PipelineError, match="name the type of machine that will run"):
        run(5.0, None)
    with pytest.raises(PipelineError, match="the job may cost"):
        run(1e-6, priced)
    with pytest.raises(ManifestError, match=r"--machine is what limits\.max_usd is"):
        run(None, priced)
    assert not (tmp_path / "bank").exists()
    assert run(5.0, priced).is_whole
    # What is done costs nothing more, whatever the limit.
    assert run(1e-6, None).was_done


def test_without_samples_a_plan_imports_no_more_than_before(job):
    code = (
        "import sys; from teachonce.cli import main; "
        f"main(['plan', {str(job)!r}]); "
        "print([m for m in ('apache_beam', 'pipeline.live', "
        "'pipeline.sample_plan.whole_job') if m in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert told.stdout.splitlines()[-1] == "[]"
