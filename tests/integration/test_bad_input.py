"""Unusable input: one clear line, exit 2, and nothing half-made."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable

import pytest
import torch

from manifests.loading import load_job
from manifests.storage import Store
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import POINTS_INPUT, POINTS_TEACHER, without_checksum, write_tar

NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "sizes": [[16, 16]],
    "batch": 4,
    "outputs": {"logits": {}},
}


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """Runs a verb that must be refused; returns its one line."""

    def run(*arguments: object, verb: str = "precompute", code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        assert main([verb, *map(str, arguments)]) == code
        out, error = capsys.readouterr()
        assert out == ""
        lines = error.splitlines()
        assert len(lines) == 1, error
        assert lines[0].startswith(f"teachonce {verb}: ")
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def matches(line: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, line), f"{pattern!r} is not in {line!r}"


def net(**changes: object) -> dict[str, object]:
    return {"teachers": {"net": {**NET, **changes}}}


def test_a_missing_shard(refused, make_shards, make_job, tmp_path):
    make_shards([3])
    shards = "./data/train-{00000..00005}.tar"
    line = refused(make_job(dataset={"shards": shards}))
    matches(line, "cannot read .*train-00001.tar: nothing is there", r"\(and 2 more\)")


def test_a_pattern_that_matches_nothing(refused, make_job):
    line = refused(make_job(dataset={"shards": "./data/none-*.tar"}))
    matches(line, r"no shard matches .*/data/none-\*.tar", "check the folder")


def test_braces_that_do_not_close(refused, make_job):
    line = refused(make_job(dataset={"shards": "./data/{0..3.tar"}))
    matches(line, "dataset.shards: .*/data/{0..3.tar: ")


def test_a_shard_named_twice(refused, make_job, make_shards):
    make_shards([3])
    shards = ["./data/*.tar", "./data/train-00000.tar"]
    matches(
        refused(make_job(dataset={"shards": shards})), "train-00000.tar is named twice"
    )


def test_shards_without_any_sample(refused, make_job, tmp_path):
    for number in range(2):
        write_tar(tmp_path / "data" / f"train-{number}.tar", [])
    matches(refused(make_job()), r"no sample in any of 2 shard\(s\)", "KEY.jpg")


def test_no_job(refused, tmp_path):
    line = refused(tmp_path / "nojob.yaml")
    matches(
        line, "cannot read the job", "nojob.yaml", "nothing is there; check the path"
    )
    matches(refused(tmp_path), "it is a folder, a file is needed")


def test_a_typo_in_the_job(refused, make_job, make_shards):
    make_shards([3])
    line = refused(make_job(**net(precison="bfloat16")))
    matches(line, r"job.yaml: teachers.net.precison: no such field; did you mean prec")
    line = refused(make_job(), "teachers.net.bacth=2")
    matches(line, "teachers.net.bacth: no such field; did you mean batch?")


def test_an_unknown_family(refused, make_job, make_shards):
    make_shards([3])
    line = refused(make_job(**net(model="tim:vit_small_patch16_224")))
    matches(line, "known family, got 'tim'", "did you mean timm")


def test_an_unknown_model(refused, make_job, make_shards):
    make_shards([3])
    line = refused(make_job(**net(model="timm:vit_smal_patch16_224", sizes=None)))
    matches(line, "vit_smal_patch16_224", "vit_small_patch16_224")


def test_an_unknown_output(refused, make_job, make_shards):
    make_shards([3])
    outputs = {"ptach": {}}
    line = refused(make_job(**net(model="timm:test_vit", sizes=None, outputs=outputs)))
    matches(line, r"teachers.net.outputs.ptach must be one of")
    line = refused(make_job(**net(outputs={"patch": {"from": "bdy"}})))
    matches(
        line, "from must be `output` or a submodule, got 'bdy'", "did you mean body"
    )


def test_weights_that_are_missing(refused, make_job, make_shards, tmp_path):
    make_shards([3])
    line = refused(make_job(**net(weights="./net.pt")))
    matches(
        line, r"teachers.net.weights must be a file", f"{tmp_path}/net.pt", "nothing is"
    )
    # A bare name with the suffix of weights lies beside the YAML as well.
    matches(refused(make_job(**net(weights="net.pt"))), f"{tmp_path}/net.pt")


def test_weights_that_do_not_fit(refused, make_job, make_shards, tmp_path):
    make_shards([3])
    torch.save({"other.weight": torch.zeros(3)}, tmp_path / "net.pt")
    line = refused(make_job(**net(weights="./net.pt")))
    matches(line, "net.pt", "other.weight", "stem.weight")


def test_weights_that_would_run_code(refused, make_job, make_shards, tmp_path):
    make_shards([3])
    torch.save(torch.nn.Linear(2, 2), tmp_path / "net.pt")
    line = refused(make_job(**net(weights="./net.pt")))
    matches(line, "hold nothing but tensors", "run code", "net.pt")


def test_a_module_file_that_is_missing_or_raises(
    refused, make_job, make_shards, tmp_path
):
    make_shards([3])
    line = refused(make_job(**net(model="module:./nothere.py:Net")))
    matches(line, f"{tmp_path}/nothere.py", "nothing is there")
    (tmp_path / "bad.py").write_text("x = 1\nraise ValueError('first\\nsecond')\n")
    line = refused(make_job(**net(model="module:./bad.py:Net")))
    matches(
        line, "teachers.net.model: .*bad.py must load", "ValueError at line 2: first"
    )
    matches(
        refused(make_job(**net(model="module:./nets.py"))), "must be module:FILE.py:CL"
    )
    line = refused(make_job(**net(model="module:./nets.py:Nett")))
    matches(line, "got 'Nett'", "did you mean Net")
    matches(refused(make_job(**net(args={"wdth": 3}))), "wdth")


def test_an_unknown_input_in_on(refused, make_job, make_shards):
    make_shards([3])
    line = refused(make_job(**net(on=["cam_*"])))
    matches(line, r"teachers.net.on: 'cam_\*' matches no input; inputs are image")
    line = refused(make_job(**net(on={"No": ["image"]})))
    matches(line, "teachers.net.on: name of group must be", "'No'")


def test_an_input_of_a_kind_the_teacher_does_not_take(refused, make_job, make_shards):
    make_shards([3], with_points=True)
    job = make_job(inputs={"lidar": POINTS_INPUT}, **net(model="timm:test_vit"))
    matches(refused(job), "teachers.net: timm:test_vit takes image", "no such input")
    points = {**POINTS_TEACHER, "on": ["lidar"], "preprocess": {}}
    job = make_job(inputs={"lidar": POINTS_INPUT}, teachers={"points": points})
    matches(refused(job), "teachers.points.preprocess.points must be given")


def test_a_member_that_is_not_there(refused, make_job, make_shards, tmp_path):
    make_shards([3])
    job = make_job(inputs={"image": {"kind": "image", "member": "jpgg"}})
    matches(refused(job), "inputs.image: none of the first samples .* 'jpgg'", "tar tf")
    assert main(["precompute", str(make_job()), "--quiet"]) == 0
    again = {"image": {"kind": "image", "member": "jpg"}}
    again["more"] = {"kind": "image", "member": "jpgg"}
    matches(refused(make_job(inputs=again)), "inputs.more: none of the first samples")


def test_another_jobs_bank(refused, make_job, make_shards, tmp_path):
    make_shards([3])
    assert main(["precompute", str(make_job()), "--quiet"]) == 0
    (tmp_path / "data").rename(tmp_path / "older")
    make_shards([4], first=7)
    line = refused(make_job())
    matches(line, f"bank {tmp_path}/bank is another job's", "choose another `bank`")


def test_not_a_bank(refused, tmp_path):
    for verb in ("info", "verify", "finalise"):
        line = refused(tmp_path, verb=verb)
        matches(line, f"no bank at {tmp_path} ", "bank.json is missing", "precompute")
    (tmp_path / "file").write_text("x")
    matches(refused(tmp_path / "file", verb="info"), "a file is in the way")


def test_a_newer_or_broken_bank(refused, make_job, make_shards, tmp_path):
    make_shards([3])
    job = make_job()
    assert main(["precompute", str(job), "--quiet"]) == 0
    path = tmp_path / "bank" / "bank.json"
    stored = path.read_text()
    whole = without_checksum(stored)
    path.write_text(json.dumps({**json.loads(whole), "schema_version": 99}))
    bank = tmp_path / "bank"
    before = {one: one.stat().st_mtime_ns for one in bank.rglob("*")}
    cases = [(verb, job) for verb in ("precompute", "plan")]
    cases += [(verb, bank) for verb in ("info", "verify", "finalise", "report")]
    for verb, what in cases:
        line = refused(what, verb=verb)
        matches(
            line, "schema version 99, this TeachOnce reads up to 1", "install a newer"
        )
    assert {one: one.stat().st_mtime_ns for one in bank.rglob("*")} == before
    path.write_text(whole[: len(whole) // 2])
    matches(refused(tmp_path / "bank", verb="info"), "is not a bank record", "restore")
    path.write_text(json.dumps({**json.loads(whole), "block_rows": "x"}))
    matches(refused(tmp_path / "bank", verb="verify"), "bank.json: block_rows: ", "'x'")
    path.write_text(stored.replace("cc0-1.0", "cc0-2.0"))
    matches(refused(tmp_path / "bank", verb="info"), "bank.json must match its own crc")


def test_no_space(refused, make_job, make_shards, monkeypatch):
    make_shards([3])
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1000)
    line = refused(make_job())
    matches(line, "no space", "1,000 are free", "put the bank elsewhere")
    matches(refused(make_job(), verb="plan"), "no space")


def test_more_bytes_than_the_job_allows(refused, make_job, make_shards):
    make_shards([3])
    line = refused(make_job(limits={"max_bytes": "1 kB"}))
    matches(
        line, r"limits.max_bytes is 1,000, the job may write 3,\d\d\d", "drop outputs"
    )


def test_a_bank_that_cannot_be_written(
    refused, make_job, make_shards, tmp_path, monkeypatch
):
    make_shards([3])
    (tmp_path / "file").write_text("x")
    line = refused(make_job(), "bank=./file")
    matches(line, f"cannot .* {tmp_path}/file", "a file is in the way")
    matches(refused(make_job(), "bank=./file/bank"), "a file is in the way")

    def forbidden(self: Store, *args: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Store, "_create_local", forbidden)
    line = refused(make_job())
    matches(
        line, f"cannot write {tmp_path}/bank/lock.json: permission denied; check who"
    )


def test_a_scheme_that_nothing_reads(refused, make_job, make_shards):
    make_shards([3])
    matches(
        refused(make_job(), "bank=nosuch://bucket/bank"), "cannot open nosuch://bucket"
    )


def test_a_device_that_is_not_there(refused, make_job, make_shards):
    make_shards([3])
    line = refused(make_job(), "engine.device=cuda:97")
    matches(line, "engine.device 'cuda:97' cannot be used", "use auto or cpu")
    line = refused(make_job(), "engine.device=gpu")
    matches(line, "engine.device 'gpu' cannot be used", "use auto or cpu")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--runner=NoRunner", "runner 'NoRunner' cannot be had .*Valid values are"),
        (
            "--direct_num_workers=two",
            "argument --direct_num_workers: invalid int value",
        ),
        (
            "--direct_num_worker=2",
            "no --direct_num_worker=2; did you mean --direct_num_wo",
        ),
        ("stray", "Beam has no stray"),
    ],
)
def test_a_bad_beam_option(refused, make_job, make_shards, option, message):
    make_shards([3])
    matches(refused(make_job(), "--", option), f"Beam options after `--`: .*{message}")


def test_beam_options_where_none_are_used(refused, tmp_path):
    matches(refused(tmp_path, "--", "--x=1", verb="info"), "info takes no Beam options")


def test_a_damaged_dataset_json(refused, make_job, make_shards, tmp_path):
    make_shards([3])
    (tmp_path / "dataset.json").write_text("{}")
    job = make_job(dataset={"shards": "./dataset.json"})
    matches(refused(job), "dataset.json: shards: missing, it must be given")
    (tmp_path / "dataset.json").write_text("[")
    matches(refused(job), "dataset.json: not JSON")
    matches(refused(make_job(dataset={"shards": "./nothere.json"})), "nothing is there")


def test_index_without_a_folder(refused, make_shards):
    paths = make_shards([3])
    matches(refused(paths[0], verb="index"), "index needs patterns and then a folder")


def test_an_unusual_error_is_one_line_too(capsys, make_job, make_shards, monkeypatch):
    make_shards([3])

    def fail(*_: object, **__: object) -> None:
        raise OSError("first\nsecond")

    monkeypatch.setattr("teachonce.verbs.plan.plan_with_progress", fail)
    assert main(["plan", str(make_job())]) == 1
    assert capsys.readouterr().err == "teachonce plan: first second\n"


def test_the_same_refusals_from_python(make_job, make_shards):
    make_shards([3])
    with pytest.raises(Exception, match="no such field") as caught:
        load_job(str(make_job(**net(bacth=3))))
    assert isinstance(caught.value, ValueError)
    with pytest.raises(RuntimeError, match="Beam has no"):
        precompute(load_job(str(make_job())), ["--typo=1"], quiet=True)
