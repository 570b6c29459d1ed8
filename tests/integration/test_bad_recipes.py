"""Unusable recipes: one clear line, exit 2, and nothing written."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from manifests.loading import load_job
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import write_job, write_shards, write_tar
from tests.training import (
    CLASS,
    EXTENT,
    PATCH,
    STUDENT,
    once,
    plain_bank,
    street_bank,
    write_recipe,
)

HEAD = {"kind": "linear"}
WIDE = [{"steps": 3, "batch": 4, "lr": 1e-3, "size": [[16, 32]]}]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return once(tmp_path_factory, "plain", plain_bank)


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    return once(tmp_path_factory, "street", street_bank)


@pytest.fixture
def refused(tmp_path, capsys):
    """Runs `train` on a recipe that must be refused; returns its one line."""

    def run(bank: Path, *overrides: str, **fields) -> str:
        fields = {"banks": {"main": str(bank)}, **fields}
        path = write_recipe(tmp_path, **fields)
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = main(["train", str(path), *overrides, "--quiet"])
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("teachonce train: ")
        assert sorted(tmp_path.rglob("*")) == before
        return lines[0]

    return run


def target(source: str, **fields) -> dict:
    return {"targets": {"it": {"from": source, "loss": {"mse": 1.0}, **fields}}}


def matches(line: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, line), f"{pattern!r} is not in {line!r}"


# What the document alone tells.


def test_fields(refused, plain):
    line = refused(plain, stages=[{"step": 3, "batch": 4, "lr": 1e-3}])
    matches(line, r"stages\.0\.step: no such field", "did you mean steps")
    line = refused(plain, "optimiser.kind=sgd")
    matches(line, "optimiser: no such field; did you mean optimizer")
    stage = {"batch": 4, "lr": 1e-3}
    line = refused(plain, stages=[{**stage, "steps": 3, "epochs": 1}])
    matches(line, "stages", "give `steps` or `epochs`, one of them")
    matches(refused(plain, stages=[stage]), "give `steps` or `epochs`, one of them")
    line = refused(plain, stages=[{**stage, "steps": 3, "warmup_steps": 3}])
    matches(line, r"warmup_steps must be fewer than steps \(3\), got 3")
    matches(refused(plain, "seed=-1"), "seed")
    matches(refused(plain, targets={}), "targets")
    two = [{**stage, "steps": 3}, {**stage, "steps": 3}]
    matches(refused(plain, stages=two), "stages must have different names")


def test_a_warm_up_longer_than_its_epochs(refused, plain):
    stages = [{"epochs": 1, "batch": 4, "lr": 1e-3, "warmup_steps": 5}]
    line = refused(plain, stages=stages)
    matches(line, r"warmup_steps of stage train must be fewer than its steps \(5\)")


def test_no_recipe(tmp_path, capsys):
    assert main(["train", str(tmp_path / "none.yaml")]) == 2
    err = capsys.readouterr().err
    matches(err, "^teachonce train: cannot read the recipe: .*none.yaml: nothing is")
    assert len(err.splitlines()) == 1


def test_runs_that_cannot_be_had(refused, plain, tmp_path):
    matches(refused(plain, run="gs://bucket/run"), "run must be a folder on this machi")
    (tmp_path / "file").write_text("")
    matches(refused(plain, run="./file"), "cannot write to run .*/file")
    matches(refused(plain, run="./file/run"), "cannot write to run .*a file is in the")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.lock").write_text("")
    for text in ("{", "[]", "{}"):
        (tmp_path / "damaged" / "run.json").write_text(text)
        line = refused(plain, run="./damaged")
        matches(line, "must be the folder of a run, but run.json is missing or damaged")


# Banks, shards and rows.


def test_banks(refused, plain, tmp_path):
    line = refused(tmp_path / "nothere")
    matches(line, "no bank at .*/nothere", "precompute")
    matches(refused(plain.parent), "no bank at", r"bank\.json is missing")


def test_views(refused, plain):
    line = refused(plain, "loader.view=3")
    matches(line, "view must be below the bank's 3 views, got 3")


def test_a_teacher_that_lacks_views(refused, tmp_path):
    folder = tmp_path / "grown"
    write_shards(folder, [9])
    net = {"model": "module:./nets.py:Net", "sizes": [[16, 16]], "batch": 4}
    other = {"other": {**net, "weights": "random:2", "outputs": {"logits": {}}}}
    jobs = {"views": {"random": 0}}, {"views": {"random": 1}, "teachers": other}
    for fields in jobs:
        job = load_job(str(write_job(folder, **fields)))
        assert precompute(job, quiet=True).is_whole
    line = refused(folder / "bank")
    matches(line, r"net/image/16x16/patch must have the views that are shown")
    matches(line, r"it lacks \[1\]; add them to the bank, or set loader\.view")
    path = tmp_path / "recipe.yaml"
    assert main(["train", str(path), "loader.view=0", "--quiet"]) == 0


def test_rows(refused, plain, tmp_path):
    line = refused(plain, stages=[{"steps": 3, "batch": 23, "lr": 1e-3}])
    matches(line, "batch", "22", "23")
    line = refused(plain, "data.rows.shards=[test-*]")
    matches(line, r"data\.rows\.shards must match shards of the bank", "test-")
    (tmp_path / "keys.txt").write_text("s0-0001\nnothere\n")
    line = refused(plain, "data.rows.keys=./keys.txt")
    matches(line, r"data\.rows\.keys must be keys of the bank, got 'nothere'")
    line = refused(plain, "data.rows.share=[0.5,0.2]")
    matches(line, r"data\.rows\.share: must be 0 <= low < high <= 1")


def test_shards_that_are_not_the_banks(refused, plain, tmp_path):
    matches(refused(plain, "data.shards=./none/*.tar"), "no shard matches .*/none/")
    write_shards(tmp_path / "short", [13, 40])
    line = refused(plain, f"data.shards={tmp_path}/short/data/*.tar")
    matches(line, r"data\.shards: .*train-00001\.tar must be the bank's", "bytes, got")
    (tmp_path / "one").mkdir()
    first = sorted((plain.parent / "data").glob("*.tar"))[0]
    shutil.copy(first, tmp_path / "one" / first.name)
    line = refused(plain, f"data.shards={tmp_path}/one/*.tar")
    matches(line, "must have a copy of the bank's train-00001.tar, got none among 1")


def test_shards_with_other_keys(plain, tmp_path, capsys):
    """Headers are compared when a shard is first read: by then the run has begun."""
    for shard in sorted((plain.parent / "data").glob("*.tar")):
        with tarfile.open(shard) as tar:
            found = [(one, tar.extractfile(one).read()) for one in tar.getmembers()]
        members = [(one.name.replace("s0-", "x0-"), data) for one, data in found]
        write_tar(tmp_path / "other" / shard.name, members)
    path = write_recipe(tmp_path, banks={"main": str(plain)})
    shards = f"data.shards={tmp_path}/other/*.tar"
    capsys.readouterr()
    assert main(["train", str(path), shards, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    matches(err, "train-00000.tar must be the bank's", "its members differ")
    assert not (tmp_path / "run" / "student").exists()


# Targets.


def test_targets_that_are_not_there(refused, plain):
    line = refused(plain, **target("main/other/patch"))
    matches(line, r"targets\.it\.from: teacher must be one of .*\(net\), got 'other'")
    line = refused(plain, **target("main/net/cls"))
    matches(line, r"targets\.it\.from: the bank must have the output, got 'net/cls'")
    matches(line, "net/image/16x16/logits, net/image/16x16/patch")
    line = refused(plain, **target("mian/net/patch"))
    matches(line, r"targets\.it\.from must start with main/ or data/")
    line = refused(plain, **target("main/labels/kind"))
    matches(line, r"targets\.it\.from: label must be one of the bank's \(class\)")
    line = refused(plain, **target("data/seg"))
    matches(line, r"label must be one of data\.labels \(none\), got 'seg'")


def test_an_output_at_several_sizes(refused, street):
    line = refused(street, stages=WIDE, **target("main/fine/patch"))
    matches(line, r"targets\.it\.from: 'fine/patch' must name one output")
    matches(line, "fine/image/32x64/patch, fine/image/16x32/patch; write it whole")


def test_grids_that_cannot_match(refused, street):
    line = refused(street, stages=WIDE, **target("main/ground/patch"))
    matches(line, r"the grid of ground/lidar/native/patch lies on lidar and cannot")
    matches(line, "match the student's image", "`extent`", "bev head")


def test_heads_that_do_not_fit(refused, street):
    bev = {"head": {"kind": "bev"}}
    line = refused(street, stages=WIDE, **target("main/ground/patch", **bev))
    matches(line, "give the output its `extent` in the job and use a bev head")
    line = refused(street, stages=WIDE, **target("main/net/patch", **bev))
    matches(line, r"targets\.it\.head must be adapter or linear for a grid, got bev")
    line = refused(street, stages=WIDE, **target("main/ground/bev"))
    matches(line, r"targets\.it\.head must be bev for a bird's-eye grid, got adapter")
    line = refused(street, stages=WIDE, **target("main/points/pooled", **bev))
    matches(line, r"targets\.it\.head must be adapter or linear for a vector, got bev")


def test_tokens(refused, plain):
    line = refused(plain, **target("main/net/logits", tokens="patch"))
    matches(line, r"targets\.it\.tokens must be cls or pooled for a vector, got patch")
    line = refused(plain, **target("main/net/patch", tokens="cls"))
    matches(line, r"targets\.it\.tokens must be patch for a grid, got cls")
    conv = {"model": "timm:test_resnet", "input": "image"}
    fields = {"student": conv, "stages": [{"steps": 3, "batch": 4, "lr": 1e-3}]}
    line = refused(plain, **fields, **target("main/net/logits", tokens="cls"))
    matches(line, "it must be learned from tokens that the student has, got cls")


def test_losses(refused, plain):
    line = refused(plain, **target("main/net/patch", loss={"cosin": 1.0}))
    matches(line, "a loss must be one of cosine, .* got cosin", r"targets\.it\.loss")
    loss = {"cosine": {"weight": 1.0, "beta": 2.0}}
    line = refused(plain, **target("main/net/patch", loss=loss))
    matches(line, "a parameter of cosine must be one of weight, got beta")
    line = refused(plain, **target("main/net/patch", loss={"cosine": -1.0}))
    matches(line, r"targets\.it\.loss\.cosine")
    line = refused(plain, **target("main/net/patch", loss={"cosine": "much"}))
    matches(line, r"targets\.it\.loss\.cosine")
    line = refused(plain, **target("main/net/patch", loss={}))
    matches(line, r"targets\.it\.loss")
    line = refused(plain, **target("main/net/patch", loss={"kl": 1.0}))
    matches(line, "a target of features must take features, got kl", "use one of cos")
    line = refused(plain, **target("main/net/patch", loss={"cross_entropy": 1.0}))
    matches(line, "a target of features must take features, got cross_entropy")
    line = refused(plain, **target("main/net/logits", loss={"cosine": 1.0}))
    matches(line, "a target of logits must take logits, got cosine")
    line = refused(plain, **target("main/labels/class", head=HEAD))
    matches(line, "a target of classes must take classes, got mse")


def test_map_labels(refused, street, tmp_path):
    label = {"member": "seg.png", "input": "image", "num_classes": 4}
    it = target("data/seg", head=HEAD, loss={"cross_entropy": 1.0})

    def data(**changes):
        return {"data": {"labels": {"seg": {**label, **changes}}}, "stages": WIDE, **it}

    line = refused(street, **data(input=None))
    matches(line, "give `input` .labels its pixels. or `extent`, not both")
    matches(refused(street, **data(extent=EXTENT)), "`extent`, not both")
    matches(refused(street, **data(log=True)), "`scale` and `log` are of numbers")
    line = refused(street, **data(input="lidar"))
    matches(line, "input must be an image, got lidar, which is points")
    line = refused(street, **data(input="camera"))
    matches(line, r"input must be one of the bank's \(image, lidar\), got camera")


def test_a_map_with_a_class_beyond_the_last(street, tmp_path, capsys):
    """Maps are read with the samples: the run has begun, nothing looks finished."""
    label = {"member": "seg.png", "input": "image", "num_classes": 4}
    path = write_recipe(
        tmp_path,
        banks={"main": str(street)},
        data={"labels": {"seg": label}},
        stages=WIDE,
        **target("data/seg", head=HEAD, loss={"cross_entropy": 1.0}),
    )
    capsys.readouterr()
    assert main(["train", str(path), "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    matches(err, "label_out_of_range: label seg: class 4 of 4", "`ignore`")
    matches(err, r"\(row \d+, 's\d-\d{4}' of .*train-\d.tar\)")
    assert not (tmp_path / "run" / "student").exists()


# Students and devices.


def test_students(refused, plain):
    def student(**changes):
        stages = [{"steps": 3, "batch": 4, "lr": 1e-3}]
        return {"student": {**STUDENT, **changes}, "stages": stages}

    line = refused(plain, **student(model="timm:vit_tinny_patch16_224", args={}))
    matches(line, "'vit_tinny_patch16_224'", "did you mean .*vit_tiny_patch16_224")
    line = refused(plain, **student(model="vit_tiny_patch16_224"))
    matches(line, "must be timm:NAME or module:FILE.py:CLASS")
    line = refused(plain, **student(args={**STUDENT["args"], "dept": 2}))
    matches(line, r"student\.args must be arguments that .* takes together", "dept")
    line = refused(plain, **student(args={**STUDENT["args"], "num_classes": 2}))
    matches(line, r"student\.args\.num_classes is set by `weights` or is always")
    line = refused(plain, **student(input="camera"))
    matches(line, r"input must be one of the bank's \(image\), got camera")
    line = refused(plain, **student(weights="./none.safetensors"))
    matches(line, r"none\.safetensors")
    fields = student(model="module:./none.py:Net")
    fields["stages"][0]["size"] = 16
    matches(refused(plain, **fields), "none.py")
    line = refused(plain, "stages.0.size=[[18,16]]")
    matches(line, "a student's size must be a multiple of its patch 4 x 4, got 18 x 16")


def test_a_module_student_without_a_size(refused, plain, tmp_path):
    file = tmp_path / "net.py"
    file.write_text("import torch\nclass Net(torch.nn.Module):\n    pass\n")
    stages = [{"steps": 3, "batch": 4, "lr": 1e-3}]
    student = {"model": "module:./net.py:Net", "input": "image"}
    line = refused(plain, student=student, stages=stages)
    matches(line, "size of stage train must be given for a module: student", "size: 2")
    stages[0]["size"] = 16
    line = refused(plain, student=student, stages=stages)
    matches(line, "must have forward_features")


def test_devices(refused, plain, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refused(plain, "engine.device=cuda")
    matches(line, "device of this machine, got cuda; torch sees no accelerator")
    line = refused(plain, "engine.device=warp")
    matches(line, r"engine\.device must be auto, cpu, cuda or cuda:N, got 'warp'")
    line = refused(plain, "engine.device=cuda:x")
    matches(line, r"engine\.device must be auto, cpu, cuda or cuda:N, got 'cuda:x'")
    line = refused(plain, "engine.device=mps")
    matches(line, r"engine\.device must be auto, cpu, cuda or cuda:N, got 'mps'")


def test_lanes_that_workers_cannot_share(refused, plain):
    line = refused(plain, "loader.workers=2", "loader.window_blocks=3")
    matches(
        line,
        "window_blocks .* must be a multiple of ranks x loader.workers, got 3 for 1 "
        "ranks and 2 workers",
    )


def test_the_good_recipe_is_good(plain, tmp_path):
    """What the others spoil: without it they might fail for another reason."""
    path = write_recipe(
        tmp_path,
        banks={"main": str(plain)},
        targets={"patch": PATCH, "class": CLASS},
    )
    assert main(["train", str(path), "--quiet"]) == 0
