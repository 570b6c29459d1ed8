"""Parts of a bank are banks: what they hold, how they are made, how they grow.

What is left out at the beginning is compared with a bank that was made without it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import uuid

import fsspec
import numpy as np
import pytest
import xarray
import yaml
import zarr

from manifests.errors import BankError
from manifests.exported import Selection
from pipeline.bank.export import export
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from student_train import BankDataset, Reading
from teachonce.cli import main
from tests.conftest import ROOT, bank_identity
from tests.exporting import check_sound, commits
from tests.training import write_recipe

PATCH = "net/image/16x16/patch"
LOGITS = "net/image/16x16/logits"
POOLED = "points/lidar/native/pooled"


def make(forked, full, bank, *overrides):
    """A bank of the job from scratch, with other fields."""
    command = ["precompute", full.path, f"bank={bank}", "--quiet", *overrides]
    done = forked.run(command)
    assert done["code"] == 0, done["output"]
    return bank_identity(bank)


def digests(bank, *folders):
    """Digest of every data object under folders of ``features.zarr``, by path."""
    return {
        str(path.relative_to(bank)): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in (bank / "features.zarr" / folder).rglob("c.*")
    }


def test_a_whole_copy_is_the_bank(full, tmp_path, capsys):
    copy = tmp_path / "copy"
    assert main(["export", str(full.bank), str(copy), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    blocks = list(full.bank.glob("commits/*/*.json"))
    contents = [json.loads(path.read_text())["content"]["objects"] for path in blocks]
    sizes = [size for one in contents for size, _ in one.values()]
    assert (told["objects"], told["bytes"]) == (len(sizes), sum(sizes))
    assert (told["blocks"], told["held_objects"]) == (len(blocks), 0)
    assert told["whole"]
    assert bank_identity(copy) == full.identity
    check_sound(copy)
    record, source = open_record(str(copy))[1], open_record(str(full.bank))[1]
    changed = {"exported_from": (), "state": source.state}
    assert record.model_copy(update=changed) == source
    assert record.state == source.state
    (origin,) = record.exported_from
    text = (full.bank / "bank.json").read_bytes()
    assert origin.bank_sha256 == hashlib.sha256(text).hexdigest()
    assert origin.bank == str(full.bank)
    assert f"A copy of {full.bank}, exported" in (copy / "README.md").read_text()
    assert [path.name for path in copy.glob("runs/*")] == [
        path.name for path in full.bank.glob("runs/*")
    ]
    assert not {path.name for path in copy.iterdir()} & {"lock.json", "export.json"}
    assert main(["info", str(copy)]) == 0
    assert f"from     {full.bank}, exported 20" in capsys.readouterr().out
    # Again: nothing is written.
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    assert main(["export", str(full.bank), str(copy)]) == 0
    assert "0 objects copied (0 B, " in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    ours = {".tmp", copy.name}
    assert {p: t for p, t in after.items() if p.name not in ours} == {
        p: t for p, t in before.items() if p.name not in ours
    }


@pytest.mark.parametrize("number", [0, 1])
def test_shards_are_the_bank_that_is_made_of_them_alone(forked, full, tmp_path, number):
    """Blocks are numbered anew; bytes, draws of views and statistics are the same."""
    name = f"train-{number:05d}.tar"
    part = tmp_path / "part"
    code = main(["export", str(full.bank), str(part), "--shards", name, "--quiet"])
    assert code == 0
    shards = f"dataset.shards={full.path.parent}/data/{name}"
    assert bank_identity(part) == make(forked, full, tmp_path / "fresh", shards)
    check_sound(part)
    other = f"s{1 - number}-".encode()
    for path in part.rglob("*"):
        assert (
            not path.is_file()
            or path.parent.name == "runs"
            or (other not in path.read_bytes())
        ), path
    assert "1 of its 2 shards" in (part / "README.md").read_text()


def test_teachers_are_the_bank_that_is_made_of_them_alone(forked, full, tmp_path):
    part = tmp_path / "part"
    assert main(["export", str(full.bank), str(part), "--teachers", "po*"]) == 0
    job = yaml.safe_load(full.path.read_text())
    job["teachers"] = {"points": job["teachers"]["points"]}
    path = full.path.with_name("points.yaml")
    path.write_text(yaml.safe_dump(job, sort_keys=False))
    done = forked.run(["precompute", path, f"bank={tmp_path}/fresh", "--quiet"])
    assert done["code"] == 0, done["output"]
    fresh = bank_identity(tmp_path / "fresh")
    assert bank_identity(part) == fresh
    check_sound(part)
    by_group = tmp_path / "group"
    assert main(["export", str(full.bank), str(by_group), "--groups", "lidar"]) == 0
    assert bank_identity(by_group) == fresh
    card = (part / "README.md").read_text()
    assert f"**A part** (without {LOGITS}, {PATCH}) of {full.bank}" in card


def test_outputs_and_what_the_job_makes_of_them(forked, full, tmp_path, capsys):
    part = tmp_path / "part"
    chosen = ["--outputs", "net/patch", "points/lidar/native/*"]
    assert main(["export", str(full.bank), str(part), *chosen]) == 0
    check_sound(part)
    bank = open_bank(str(part))
    pooled = (POOLED, "points/lidar/native/logits")
    assert set(bank.outputs) == {PATCH, *pooled}
    assert digests(part, PATCH) == digests(full.bank, PATCH)
    assert not (part / "features.zarr" / LOGITS).exists()
    before, source = (open_record(str(one))[1] for one in (part, full.bank))
    cut, whole = before.pass_by_id("net.image"), source.pass_by_id("net.image")
    assert cut.fingerprint != whole.fingerprint
    assert cut.provenance["exported_from"] == {
        "fingerprint": whole.fingerprint,
        "outputs": ["16x16/logits", "16x16/patch"],
        "views": [0, 1],
    }
    kept = source.pass_by_id("points.lidar")
    assert before.pass_by_id("points.lidar") == kept
    # The original job computes what is missing and rewrites nothing.
    made = commits(part)
    command = ["precompute", full.path, f"bank={part}", "--quiet"]
    done = forked.run(command)
    assert done["code"] == 0, done["output"]
    after = commits(part)
    assert {path: after[path] for path in made} == made
    assert {path.parent.name for path in set(after) - set(made)} == {"net.image.2"}
    assert digests(part, "net", "points") == digests(full.bank, "net", "points")
    check_sound(part)
    assert open_record(str(part))[1].exported_from == before.exported_from
    assert forked.run(command)["output"].startswith("nothing to do")


def test_views_and_what_the_job_makes_of_them(forked, full, tmp_path):
    part = tmp_path / "part"
    assert main(["export", str(full.bank), str(part), "--views", "0"]) == 0
    check_sound(part)
    assert open_record(str(part))[1].num_views == 1
    whole = digests(full.bank, "net", "points")
    held = digests(part, "net", "points")
    random = re.compile(r"(patch|logits|pooled)/c\.\d+\.1\.")
    expected = {path: one for path, one in whole.items() if not random.search(path)}
    assert held == expected
    assert "1 of its 2 views" in (part / "README.md").read_text()
    made = commits(part)
    command = ["precompute", full.path, f"bank={part}", "--quiet"]
    assert forked.run(command)["code"] == 0
    after = commits(part)
    assert {path: after[path] for path in made} == made
    assert digests(part, "net", "points", "views") == digests(
        full.bank, "net", "points", "views"
    )
    check_sound(part)


def test_a_shard_that_was_left_out_is_added_by_the_job(forked, full, tmp_path):
    part = tmp_path / "part"
    name = "train-00001.tar"
    assert main(["export", str(full.bank), str(part), "--shards", name]) == 0
    made = commits(part)
    done = forked.run(["precompute", full.path, f"bank={part}", "--quiet"])
    assert done["code"] == 0, done["output"]
    after = commits(part)
    assert {path: after[path] for path in made} == made
    assert len(after) == 3 * 3
    check_sound(part)
    record = open_record(str(part))[1]
    assert [shard.name for shard in record.shards] == [name, "train-00000.tar"]
    assert len({shard.part for shard in record.shards}) == 2
    ours, theirs = open_bank(str(part)), open_bank(str(full.bank))
    for view in (0, 1):
        for mine, whole in ((0, 2), (1, 0), (2, 1)):
            np.testing.assert_array_equal(
                ours.read(PATCH, mine, view), theirs.read(PATCH, whole, view)
            )


def test_stock_readers_open_a_part(full, tmp_path):
    part = tmp_path / "part"
    selection = Selection(outputs=("patch",), shards=("*1.tar",), num_views=1)
    assert export(str(full.bank), str(part), selection).is_whole
    root = zarr.open_group(f"{part}/features.zarr", mode="r")
    whole = zarr.open_group(f"{full.bank}/features.zarr", mode="r")
    np.testing.assert_array_equal(root[PATCH][:, 0], whole[PATCH][16:, 0])
    assert root[PATCH].shape == (8, 1, 4, 4, 16)
    assert list(root["key"][:]) == [f"s1-{row:04d}" for row in range(6)] + ["", ""]
    url = f"{part}/features.zarr"
    tree = xarray.open_datatree(url, engine="zarr", consolidated=False)
    level = tree["net/image/16x16"]
    assert level["patch"].dims[:2] == ("sample", "view")
    assert int(level["valid"].sum()) == 6


def test_a_loop_of_ones_own_reads_a_part(full, tmp_path):
    part = tmp_path / "part"
    selection = Selection(outputs=("patch",), shards=("train-00001.tar",))
    export(str(full.bank), str(part), selection)
    reading = Reading(
        {"image": (16, 16)}, {"patch": "net/patch"}, normalise=frozenset()
    )
    dataset = BankDataset(str(part), reading, batch=3, seed=0, view=1)
    batches = list(dataset.batches(0))
    assert sorted(row for batch in batches for row in batch.rows) == list(range(6))
    whole = open_bank(str(full.bank)).read(PATCH, 2, 1)
    for batch in batches:
        assert batch.keys == tuple(f"s1-{row:04d}" for row in batch.rows)
        found = batch.targets["patch"].values().numpy()
        np.testing.assert_array_equal(found, whole[batch.rows])


def test_a_student_of_a_part_is_the_one_of_the_bank(full, tmp_path):
    """The same rows, order, views and statistics: the same weights, bit for bit."""
    part = tmp_path / "part"
    export(str(full.bank), str(part), Selection(outputs=("patch",)))
    students = []
    for bank in (full.bank, part):
        recipe = write_recipe(tmp_path, f"{bank.name}.yaml", banks={"main": str(bank)})
        run = tmp_path / f"run-{bank.name}"
        assert main(["train", str(recipe), f"run={run}", "--quiet"]) == 0
        students.append((run / "student" / "model.safetensors").read_bytes())
    assert students[0] == students[1]


def test_through_a_store_that_is_no_disk_and_back(full, tmp_path):
    url = f"memory://export-{uuid.uuid4().hex}/bank"
    fs = fsspec.filesystem("memory")
    assert export(str(full.bank), url).is_whole
    check_sound(url)
    assert not fs.exists(f"{url}/export.json")
    again = export(str(full.bank), url)
    assert (again.objects, again.is_whole) == (0, True)
    with pytest.raises(
        BankError, match=rf"must be empty .*got {url.rpartition('/')[0]}"
    ):
        export(str(full.bank), url.rpartition("/")[0])
    back = tmp_path / "back"
    assert export(url, str(back)).is_whole
    assert bank_identity(back) == full.identity
    assert [one.bank for one in open_record(str(back))[1].exported_from] == [
        str(full.bank),
        url,
    ]
    fs.rm(url, recursive=True)


def test_a_bank_that_grows(full, tmp_path, capsys):
    """What is committed is copied; the same command takes the rest later."""
    source, part = tmp_path / "bank", tmp_path / "part"
    shutil.copytree(full.bank, source)
    kept = {}
    for name in ("commits/net.image/00000002.json", "commits/rows/00000001.json"):
        kept[name] = (source / name).read_bytes()
        (source / name).unlink()
    assert main(["export", str(source), str(part), "--whole"]) == 2
    said = capsys.readouterr()
    assert "it lacks 1 of rows, 1 of net.image; run its job again" in said.err
    assert not part.exists()
    assert main(["export", str(source), str(part)]) == 1
    said = capsys.readouterr().out
    assert "missing  pass rows: 1 blocks" in said
    assert "missing  pass net.image: 1 blocks" in said
    state = open_record(str(part))[1].state
    assert not state.complete
    assert state.complete_passes == ("points.lidar",)
    assert state.invalid["net.image"] == {"not_computed": 6}
    assert main(["info", str(part)]) == 1
    for name, data in kept.items():
        (source / name).write_bytes(data)
    before = commits(part)
    assert main(["export", str(source), str(part)]) == 0
    after = commits(part)
    assert {path: after[path] for path in before} == before
    assert bank_identity(part) == full.identity


def test_what_a_partly_copied_bank_lacks_is_computed_by_its_job(forked, full, tmp_path):
    source, part = tmp_path / "bank", tmp_path / "part"
    shutil.copytree(full.bank, source)
    (source / "commits/net.image/00000002.json").unlink()
    assert export(str(source), str(part)).missing_blocks["net.image"] == 1
    done = forked.run(["precompute", full.path, f"bank={part}", "--quiet"])
    assert done["output"].startswith("1 blocks of passes committed")
    assert bank_identity(part) == full.identity
    assert export(str(source), str(part)).is_whole


def test_shards_and_teachers_added_to_the_bank_are_added_to_its_copy(
    forked, run, make_job, make_shards, tmp_path
):
    make_shards([10, 3])
    run(make_job())
    bank, copy = tmp_path / "bank", tmp_path / "copy"
    assert export(str(bank), str(copy)).is_whole
    before = commits(copy)
    make_shards([9], first=2)
    net = yaml.safe_load(make_job().read_text())["teachers"]["net"]
    teachers = {"net": net, "other": {**net, "weights": "random:7"}}
    job = make_job(teachers=teachers, views={"random": 1})
    assert run(job).is_whole
    # Killed in between it is a bank that grows; the same command goes on.
    kill = {"match": r"commits/other", "nth": 0, "when": "after"}
    command = ["export", bank, copy, "--quiet"]
    assert forked.run(command, kill=kill)["code"] == -signal.SIGKILL
    state = open_record(str(copy))[1].state
    assert (state.complete, state.complete_passes) == (False, ())
    assert forked.run(command)["code"] == 0
    assert bank_identity(copy) == bank_identity(bank)
    after = commits(copy)
    assert {path: after[path] for path in before} == before
    check_sound(copy)
    # The copy has become another bank when it has grown by itself.
    make_shards([4], first=3)
    run(job, f"bank={copy}")
    with pytest.raises(BankError, match=r"got another bank .*other shards"):
        export(str(bank), str(copy))


def test_retired_shards_are_left_behind(run, make_job, make_shards, tmp_path):
    make_shards([10, 5])
    job = make_job()
    run(job)
    make_shards([12])
    run(job)
    record = open_record(str(tmp_path / "bank"))[1]
    retired = [shard.name for shard in record.shards if shard.retired]
    assert retired == ["train-00000.tar"]
    part = tmp_path / "part"
    assert export(str(tmp_path / "bank"), str(part)).is_whole
    held = open_record(str(part))[1]
    assert [shard.name for shard in held.shards][-1] == "train-00000.tar@2"
    assert not any(shard.retired for shard in held.shards)
    assert held.num_rows == 8 * (1 + 2)
    check_sound(part)
    assert run(job, f"bank={part}").was_done
    # Statistics are those of the rows that are there.
    mine = open_bank(str(part)).statistics(PATCH)
    theirs = open_bank(str(tmp_path / "bank")).statistics(PATCH)
    assert mine["count"] == theirs["count"]


def test_it_needs_neither_torch_nor_beam(full, tmp_path):
    code = (
        "import sys\n"
        "from teachonce.cli import main\n"
        f"assert main(['export', {str(full.bank)!r}, '{tmp_path}/part']) == 0\n"
        "assert not {'torch', 'apache_beam', 'teachers', 'timm'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
