"""`verify --recheck`: what a bank says beside what its live teachers say.

Sound banks come out bit for bit; what no checksum can see (objects that were put in
another's place and committed again, another preprocessing) is found; code runs only
where a job names it, and never where it changed.
"""

from __future__ import annotations

import io
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from manifests.loading import load_job
from pipeline.bank.arrays import ArraySpec
from pipeline.bank.objects import decode_object, encode_object, object_crc32c
from pipeline.live import device_kind
from pipeline.precompute import precompute
from pipeline.recheck_rows import recheck
from teachonce.cli import main
from tests.conftest import (
    TEACHER_FILE,
    jpeg,
    sweep,
    without_checksum,
    write_job,
    write_shards,
    write_tar,
)
from tests.contracts import made_elsewhere

NETS = (
    TEACHER_FILE
    + '''

class Clip(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 6, (2, 4, 4), (1, 4, 4))

    def forward(self, clip_BTCHW):
        return self.stem(clip_BTCHW.transpose(1, 2)).transpose(1, 2)


class EachPoint(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(3, 7)

    def forward(self, points_BPC):
        return self.out(points_BPC)


class Crowd(nn.Module):
    """A row's last bits depend on the rows beside it."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x):
        return self.net(x) * (1 + 1e-6 * x.mean())
'''
)
MODULE = "module:./nets.py"
NET = {"model": f"{MODULE}:Net", "weights": "random:1", "batch": 4, "on": ["image"]}
TEACHERS = {
    "net": {
        **NET,
        "sizes": [[16, 16], [24, 32]],
        "outputs": {
            "logits": {"topk": 3},
            "patch": {"from": "body"},
            "half": {"from": "body", "encoding": "half"},
            "compact": {"from": "body", "encoding": "compact"},
            "tiny": {"from": "stem", "encoding": "tiny"},
            "level1": {"from": "stem", "pool": [2, 2], "encoding": "raw"},
        },
    },
    "brain": {
        **NET,
        "precision": "bfloat16",
        "batch": 3,
        "sizes": [[16, 16]],
        "outputs": {"logits": {}, "top": {"from": "body", "topk": 2}},
    },
    "padded": {
        **NET,
        "sizes": [[32, 32]],
        "preprocess": {"fit": "pad"},
        "outputs": {
            "patch": {"from": "body"},
            "top": {"from": "body", "topk": 2},
            "tiny": {"from": "body", "encoding": "tiny"},
        },
    },
    "video": {
        "model": f"{MODULE}:Clip",
        "weights": "random:3",
        "on": ["clip"],
        "batch": 2,
        "sizes": [[16, 16]],
        "outputs": {"patch": {"from": "output", "layout": "ntchw"}},
    },
    "points": {
        "model": f"{MODULE}:Points",
        "weights": "random:2",
        "on": ["lidar"],
        "batch": 4,
        "preprocess": {"points": 32, "centre": True, "unit_sphere": True},
        "outputs": {"pooled": {"from": "output[pooled]"}},
    },
    "each": {
        "model": f"{MODULE}:EachPoint",
        "weights": "random:4",
        "on": ["lidar"],
        "batch": 4,
        "preprocess": {"points": 32},
        "outputs": {"points": {"from": "output", "layout": "nlc"}},
    },
    "named": {
        "model": "timm:test_vit",
        "weights": "random:5",
        "on": ["image"],
        "batch": 4,
        "sizes": [[32, 32]],
        "outputs": {"cls": {}, "patch": {}},
    },
}
COLOURS = {"brightness": 0.4, "contrast": 0.4, "hue": 0.1, "grey": 0.3, "blur": 0.5}
BAD_IMAGE, NO_SWEEP = "s1-0002", "s0-0005"


def members_of(key: str, seed: int) -> list[tuple[str, bytes]]:
    image = jpeg(seed, 24, 30 + seed % 4)
    found = [(f"{key}.jpg", image[:100] if key == BAD_IMAGE else image)]
    if key != NO_SWEEP:
        found.append((f"{key}.bin", sweep(seed, 40 + seed % 5)))
    return found + [(f"{key}.{n:03d}.jpg", jpeg(50 * seed + n)) for n in range(3)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a job of every way of taking inputs and storing outputs, its
    shards and its bank; not to be written to.
    """
    folder = tmp_path_factory.mktemp("recheck")
    for shard, size in enumerate((11, 6)):
        members = []
        for row in range(size):
            members += members_of(f"s{shard}-{row:04d}", 100 * shard + row)
        write_tar(folder / "data" / f"train-{shard}.tar", members)
    job(folder, teachers=TEACHERS)
    precompute(load_job(str(folder / "job.yaml")), quiet=True)
    return folder


def job(folder: Path, **fields) -> Path:
    inputs = {
        "image": {"kind": "image", "member": "jpg"},
        "clip": {"kind": "clip", "member": "jpg", "frames": 3},
        "lidar": {"kind": "points", "member": "bin"},
    }
    views = {"random": 1, "yaw_deg": 10.0, "photometric": COLOURS}
    path = write_job(folder, labels={}, **{"inputs": inputs, "views": views, **fields})
    (folder / "nets.py").write_text(NETS)
    return path


def copy_of(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    return folder


def small(folder: Path, **fields) -> Path:
    """A job with images alone, and its bank; returns its folder."""
    write_shards(folder, [12, 7])
    path = write_job(folder, **fields)
    (folder / "nets.py").write_text(NETS)
    precompute(load_job(str(path)), quiet=True)
    return folder


def run(capsys, folder: Path, *options, rows=5) -> tuple[int, dict]:
    """Exit code and facts of `verify --recheck --json` with the folder's job."""
    given = ["verify", str(folder / "bank"), "--recheck", str(rows), "--json"]
    code = main([*given, "--job", str(folder / "job.yaml"), *map(str, options)])
    return code, json.loads(capsys.readouterr().out)


def refused(capsys, folder: Path, *options) -> str:
    """The one line of a recheck that does nothing."""
    code = main(["verify", str(folder / "bank"), "--recheck", "3", *map(str, options)])
    told = capsys.readouterr()
    assert code == 2
    assert told.out == ""
    assert len(told.err.splitlines()) == 1
    return told.err


def edit(path: Path, change) -> None:
    data = json.loads(without_checksum(path.read_text()))
    change(data)
    path.write_text(json.dumps(data))


def commit_again(bank: Path, pass_id: str) -> None:
    """Writes into every commit what its objects are now, then finalises."""

    def change(data):
        for path in data["content"]["objects"]:
            held = (bank / path).read_bytes()
            data["content"]["objects"][path] = [len(held), object_crc32c([held])]

    for path in sorted((bank / "commits" / pass_id).glob("*.json")):
        edit(path, change)
    assert main(["finalise", str(bank)]) == 0


# Sound banks.


def test_a_sound_bank_is_its_teachers_bit_for_bit(made, capsys):
    code, facts = run(capsys, made, rows=9)
    found = facts["recheck"]
    assert code == 0
    assert facts["sound"]
    assert found["holds"]
    assert (found["problems"], found["notes"]) == ([], {})
    assert (found["rows"], found["invalid_rows"]) == (9, 2)
    names = {one["output"] for one in found["outputs"]}
    assert names == {
        *(
            f"net/image/{size}/{name}"
            for size in ("16x16", "24x32")
            for name in ("logits", "patch", "half", "compact", "tiny", "level1")
        ),
        "brain/image/16x16/logits",
        "brain/image/16x16/top",
        "padded/image/32x32/patch",
        "padded/image/32x32/top",
        "padded/image/32x32/tiny",
        "video/clip/16x16/patch",
        "points/lidar/native/pooled",
        "each/lidar/native/points",
        "each/lidar/native/points_index",
        "named/image/32x32/cls",
        "named/image/32x32/patch",
    }
    for one in found["outputs"]:
        assert one["identical"] == one["bits_expected"] == one["compared"], one
        # Two views; both invalid rows are tried, and compared where they are valid.
        assert one["compared"] in (18, 20, 22), one
        name = one["output"].rpartition("/")[2]
        assert one["cosine_worst"] > (0.98 if name == "tiny" else 0.9999), one
        is_exact = name not in ("half", "compact", "tiny")
        assert (one["largest_error"] == 0) == is_exact, one
        assert one["largest_excess"] == 0, one
        has_none = name in ("points_index", "top") or (
            one["output"].startswith("net") and name == "logits"
        )
        assert (one["standardised_mean"] is None) == has_none, one


def test_rows_are_those_of_the_seed(made):
    job = load_job(str(made / "job.yaml"))

    def worst(seed):
        found = recheck(str(made / "bank"), 1, seed=seed, teachers=["net"], job=job)
        return found.outputs[0].worst.row

    rows = [worst(seed) for seed in range(6)]
    assert rows == [worst(seed) for seed in range(6)]
    assert len(set(rows)) > 2


def test_it_is_printed_for_people(made, capsys):
    options = ["--recheck", "3", "--teachers", "named"]
    assert main(["verify", str(made / "bank"), *options]) == 0
    told = capsys.readouterr().out
    assert "sound\nrechecked 3 rows, 1 invalid ones tried, seed 0, on " in told
    assert "named/image/32x32/cls" in told
    assert told.rstrip().endswith("the bank is what its teachers say")


def test_a_row_that_depends_on_its_neighbours_is_run_beside_them(tmp_path, capsys):
    crowd = {**NET, "model": f"{MODULE}:Crowd", "sizes": [[16, 16]]}
    folder = small(tmp_path, teachers={"net": {**crowd, "outputs": {"logits": {}}}})
    code, facts = run(capsys, folder, rows=6)
    (one,) = facts["recheck"]["outputs"]
    assert code == 0
    assert one["identical"] == one["compared"] == 6


def test_another_device_or_version_may_round_otherwise(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    for path in (folder / "bank/commits/net.image").glob("*.json"):
        edit(path, lambda data: data.update(device="Colossus"))

    def older(data):
        for entry in data["passes"]:
            if entry["id"] == "named.image":
                entry["provenance"]["versions"]["torch"] = "1.0"

    edit(folder / "bank/bank.json", older)
    code, facts = run(capsys, folder, "--teachers", "net", "named")
    notes = facts["recheck"]["notes"]
    assert code == 0
    assert notes == {
        "net.image": "made on Colossus",
        "named.image": f"torch 1.0 then, {version('torch')} now",
    }
    assert {one["bits_expected"] for one in facts["recheck"]["outputs"]} == {0}
    given = ["verify", str(folder / "bank"), "--recheck", "2", "--device", "cpu"]
    assert main([*given, "--teachers", "named"]) == 0
    told = capsys.readouterr().out
    assert "there a row's cosine, plain and standardised, must be at least 0.9999 " in (
        told
    )


def test_the_device_is_the_one_that_is_named(made, tmp_path, capsys):
    """Omitted, the job's; a job that asks for what is not there does not stop it."""
    told = refused(capsys, made, "--teachers", "named", "--device", "quantum")
    assert "engine.device 'quantum' cannot be used: " in told
    folder = copy_of(made, tmp_path)
    job(folder, teachers=TEACHERS, engine={"device": "quantum"})
    options = ["--teachers", "named", "--job", folder / "job.yaml"]
    assert "engine.device 'quantum' cannot" in refused(capsys, folder, *options)
    code, facts = run(capsys, folder, "--teachers", "named", "--device", "cpu")
    assert code == 0
    assert facts["recheck"]["device"] == device_kind("cpu")


# Banks that no checksum gives away.


@pytest.mark.parametrize("preset", ["compact", "tiny"])
@pytest.mark.parametrize("device", ["same", "other"])
def test_codes_of_another_row(tmp_path, capsys, preset, device):
    """Rows that change places inside a chunk: mean and deviation are the right ones."""
    outputs = {"patch": {"from": "body", "encoding": preset}}
    teachers = {"net": {**NET, "sizes": [[16, 16]], "outputs": outputs}}
    folder = small(tmp_path, teachers=teachers, block_rows=8)
    bank = folder / "bank"
    (spec,) = (
        ArraySpec.from_json(data)
        for data in json.loads((bank / "bank.json").read_text())["passes"][1][
            "outputs"
        ][0]["arrays"]
        if data["path"].endswith("patch")
    )
    for path in (bank / "features.zarr" / spec.path).glob("c.0.0*"):
        rows = decode_object(path.read_bytes(), spec).copy()
        rows[[1, 2]] = rows[[2, 1]]
        path.write_bytes(b"".join(map(bytes, encode_object(rows, spec, 8))))
    commit_again(bank, "net.image")
    if device == "other":
        for path in (bank / "commits/net.image").glob("*.json"):
            edit(path, lambda data: data.update(device="Colossus"))
    assert main(["verify", str(bank), "--full"]) == 0
    capsys.readouterr()
    code, facts = run(capsys, folder, rows=19)
    (one,) = facts["recheck"]["outputs"]
    assert code == 1
    assert (one["failed"], one["identical"]) == (2, 17)
    assert one["largest_excess"] > 0
    assert one["worst"]["row"] in (1, 2)


@pytest.mark.parametrize("device", ["same", "other"])
def test_rows_of_another_shard(tmp_path, capsys, device):
    """Whole blocks of two shards change places; caught without equal bits too."""
    teachers = {
        "net": {
            **NET,
            "sizes": [[16, 16]],
            "outputs": {"logits": {"topk": 2}, "patch": {"from": "body"}},
        }
    }
    folder = small(tmp_path, teachers=teachers, block_rows=4)
    bank = folder / "bank"
    for path in (bank / "features.zarr/net/image/16x16").glob("*/c.0.0*"):
        other = path.with_name(path.name.replace("c.0.", "c.1.", 1))
        held = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(held)
    commit_again(bank, "net.image")
    if device == "other":
        for path in (bank / "commits/net.image").glob("*.json"):
            edit(path, lambda data: data.update(device="Colossus"))
    assert main(["verify", str(bank), "--full"]) == 0
    capsys.readouterr()
    code, facts = run(capsys, folder, rows=19)
    assert code == 1
    for one in facts["recheck"]["outputs"]:
        assert one["compared"] == 19
        if device == "same":
            assert one["failed"] == 8
        else:
            assert 6 <= one["failed"] <= 8
        assert one["worst"]["shard"] == "train-00000.tar"
        assert one["worst"]["row"] < 8
    main(["verify", str(bank), "--recheck", "19", "--job", str(folder / "job.yaml")])
    told = capsys.readouterr().out
    assert "net/image/16x16/patch: " in told
    assert "of 19 are not what the teacher says; worst is row" in told


def test_another_preprocessing(made, tmp_path, capsys):
    """The request is what the teacher is built from, provenance what people read."""
    folder = copy_of(made, tmp_path)

    def swap(data):
        for entry in data["passes"]:
            if entry["id"] == "named.image":
                entry["request"]["preprocess"] = {"mean": [0.4, 0.5, 0.6]}

    edit(folder / "bank/bank.json", swap)
    options = ["--recheck", "4", "--json", "--teachers", "named"]
    assert main(["verify", str(folder / "bank"), *options]) == 1
    found = json.loads(capsys.readouterr().out)["recheck"]
    assert [one["holds"] for one in found["outputs"]] == [False, False]
    assert found["outputs"][0]["failed"] == found["outputs"][0]["compared"]
    (line,) = found["problems"]
    assert line.startswith("pass named.image: the bank says that image is taken as {")


def test_a_turned_image(tmp_path, capsys):
    """The same member with another orientation in its header: other pixels."""

    def image(seed, orientation):
        sink = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = orientation
        source = Image.open(io.BytesIO(jpeg(seed)))
        source.save(sink, "JPEG", quality=90, exif=exif)
        return sink.getvalue()

    def shard(orientation):
        members = [(f"k{n}.jpg", image(n, orientation)) for n in range(6)]
        write_tar(tmp_path / "data/train-0.tar", members)

    shard(1)
    path = write_job(
        tmp_path,
        labels={},
        teachers={
            "net": {**NET, "sizes": [[16, 16]], "outputs": {"patch": {"from": "body"}}}
        },
    )
    precompute(load_job(str(path)), quiet=True)
    assert run(capsys, tmp_path)[0] == 0
    shard(3)
    code, facts = run(capsys, tmp_path)
    (one,) = facts["recheck"]["outputs"]
    assert code == 1
    assert one["failed"] == one["compared"] == 5


def test_reasons_that_cannot_be_reproduced(tmp_path, capsys):
    """An image that could not be decoded now can; one that could now cannot."""

    def shard(broken):
        members = []
        for n in range(6):
            data = jpeg(n)
            members.append((f"k{n}.jpg", bytes(len(data)) if n == broken else data))
        write_tar(tmp_path / "data/train-0.tar", members)

    shard(2)
    path = write_job(
        tmp_path,
        labels={},
        teachers={"net": {**NET, "sizes": [[16, 16]], "outputs": {"logits": {}}}},
    )
    precompute(load_job(str(path)), quiet=True)
    code, facts = run(capsys, tmp_path)
    assert (code, facts["recheck"]["invalid_rows"]) == (0, 1)
    shard(4)
    code, facts = run(capsys, tmp_path)
    assert code == 1
    assert facts["recheck"]["problems"] == [
        "row 2 ('k2' of train-0.tar), pass net.image: image:undecodable in the bank, "
        "valid now",
        "row 4 ('k4' of train-0.tar), pass net.image: valid in the bank, "
        "image:undecodable now",
    ]


def test_a_key_twice_is_refused_again(tmp_path, capsys):
    """Such a shard is read from its start; its other rows come out as they are."""
    members = [(f"k{n}.jpg", jpeg(n)) for n in (0, 1, 2, 3, 1, 4)]
    write_tar(tmp_path / "data/train-0.tar", members)
    teachers = {"net": {**NET, "sizes": [[16, 16]], "outputs": {"logits": {}}}}
    path = write_job(tmp_path, labels={}, teachers=teachers)
    precompute(load_job(str(path)), quiet=True)
    code, facts = run(capsys, tmp_path, rows=9)
    found = facts["recheck"]
    assert (code, found["rows"], found["invalid_rows"]) == (0, 4, 1)
    assert found["outputs"][0]["identical"] == 4


def test_outputs_that_refuse_a_row_refuse_it_again(tmp_path, capsys):
    """What overflows float16 does so again; a reason that was put there does not."""
    loud = {**NET, "sizes": [[16, 16]], "preprocess": {"std": [1e-7] * 3}}
    teachers = {
        "loud": {**loud, "outputs": {"half": {"from": "body", "encoding": "half"}}},
    }
    folder = small(tmp_path, teachers=teachers, limits={"max_invalid_fraction": 1})
    code, facts = run(capsys, folder, rows=4)
    assert code == 0
    assert facts["recheck"]["rows"] == 0
    assert facts["recheck"]["invalid_rows"] == 4
    for path in (folder / "bank/commits/loud.image").glob("*.json"):
        edit(
            path,
            lambda data: data["content"].update(
                invalid={"image:undecodable": f"0-{data['content']['rows'] - 1}"}
            ),
        )
    code, facts = run(capsys, folder, rows=4)
    assert code == 1
    assert len(facts["recheck"]["problems"]) == 4
    line = facts["recheck"]["problems"][0]
    assert line.endswith("image:undecodable in the bank, half:overflow_float16 now")


def test_an_object_that_cannot_be_read(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    path = folder / "bank/features.zarr/named/image/32x32/cls/c.0.1.0"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))
    code, facts = run(capsys, folder, "--teachers", "named", rows=17)
    assert code == 1
    (line,) = facts["recheck"]["problems"]
    assert line.startswith("pass named.image: ")
    assert "array named/image/32x32/cls, block 0, view 1" in line
    assert all(one["holds"] for one in facts["recheck"]["outputs"])


# What may run.


def test_code_runs_only_where_a_job_names_it(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    told = refused(capsys, folder)
    assert (
        "teacher net must be named by a job to be run: its model is code (module:"
        in (told)
    )
    assert "no job was named; give --job JOB.yaml, or leave it out with --teachers" in (
        told
    )
    job(folder, teachers={"named": TEACHERS["named"]})
    told = refused(capsys, folder, "--job", folder / "job.yaml")
    assert "the job does not have it" in told


def test_code_that_changed_is_not_run(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    marker = tmp_path / "ran"
    evil = f"open({str(marker)!r}, 'w')\n"
    (folder / "nets.py").write_text(NETS + evil)
    # Before the weights, and whatever the bank's own path leads to.
    told = refused(capsys, folder, "--job", folder / "job.yaml")
    assert "net.model must be the code that the bank's numbers come from" in told
    assert "code that changed is not run, put the bank's back" in told
    assert not marker.exists()


def test_the_jobs_file_is_run_and_not_the_banks(made, tmp_path, capsys):
    """The bank's record names a file that is gone, the job one that is there."""
    folder = copy_of(made, tmp_path)

    def elsewhere(data):
        for entry in data["passes"]:
            if entry["request"].get("model", "").startswith("module:"):
                name = entry["request"]["model"].rpartition("/")[2]
                entry["request"]["model"] = f"module:/nowhere/{name}"

    edit(folder / "bank/bank.json", elsewhere)
    assert run(capsys, folder)[0] == 0


def test_another_teacher_of_that_name(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    net = {**TEACHERS["net"], "preprocess": {"channels": "bgr"}}
    job(folder, teachers={**TEACHERS, "net": net})
    told = refused(capsys, folder, "--job", folder / "job.yaml")
    assert "net of the job must be the bank's, got another (preprocess: " in told
    patch = {"from": "stem"}
    net = {**TEACHERS["net"], "outputs": {**TEACHERS["net"]["outputs"], "patch": patch}}
    job(folder, teachers={**TEACHERS, "net": net})
    told = refused(capsys, folder, "--job", folder / "job.yaml")
    assert "(outputs.patch: " in told
    job(
        folder, teachers={**TEACHERS, "net": {**TEACHERS["net"], "weights": "random:9"}}
    )
    told = refused(capsys, folder, "--job", folder / "job.yaml")
    assert "net.weights must be those that the bank's numbers come from" in told
    assert "(kind random, seed 1), got kind random, seed 9" in told


def test_other_weights(tmp_path, capsys):
    weights = tmp_path / "net.safetensors"
    shapes = {
        "stem.weight": (8, 3, 3, 3),
        "stem.bias": (8,),
        "body.weight": (16, 8, 3, 3),
        "body.bias": (16,),
        "head.weight": (5, 16),
        "head.bias": (5,),
    }

    def write(seed):
        generator = torch.Generator().manual_seed(seed)
        save_file(
            {n: torch.randn(s, generator=generator) for n, s in shapes.items()}, weights
        )

    write(0)
    net = {**NET, "sizes": [[16, 16]], "outputs": {"logits": {}}}
    net["weights"] = "./net.safetensors"
    folder = small(tmp_path, teachers={"net": net})
    given = ("--job", folder / "job.yaml")
    assert run(capsys, folder)[0] == 0
    # Where the job says that they lie now.
    moved = weights.rename(tmp_path / "moved.safetensors")
    told = refused(capsys, folder, *given)
    assert "teachers.net.weights must be a file that can be read" in told
    teachers = {
        "net": {**net, "weights": "./moved.safetensors", "outputs": {"logits": {}}}
    }
    write_job(folder, teachers=teachers)
    (folder / "nets.py").write_text(NETS)
    assert run(capsys, folder)[0] == 0
    moved.unlink()
    write(1)
    weights.rename(moved)
    told = refused(capsys, folder, *given)
    assert "net.weights must be those that the bank's numbers come from" in told
    assert "put them back" in told


def test_folders_and_programs(tmp_path, capsys):
    """A student of timm, one with a loader, and an exported program."""
    made_elsewhere.write_files(tmp_path)
    cases = ("student of timm", "student with a loader", "program")
    teachers = {
        name: {
            "batch": 4,
            **{k: v for k, v in made_elsewhere.CASES[case].items() if v is not None},
            "sizes": [list(size) for size in made_elsewhere.CASES[case]["sizes"][:1]],
        }
        for name, case in zip(("vit", "rig", "program"), cases, strict=True)
    }
    folder = small(tmp_path, teachers=teachers)
    for name in teachers:
        told = refused(capsys, folder, "--teachers", name)
        assert f"teacher {name} must be named by a job to be run" in told
    code, facts = run(capsys, folder)
    assert code == 0
    for one in facts["recheck"]["outputs"]:
        assert one["identical"] == one["compared"] == 5, one
    given = ("--job", folder / "job.yaml", "--teachers")
    marker = tmp_path / "ran"
    loader = folder / "loader/model.py"
    held = loader.read_text()
    loader.write_text(f"{held}\nopen({str(marker)!r}, 'w')\n")
    told = refused(capsys, folder, *given, "rig")
    assert "rig.model must be the code that the bank's numbers come from" in told
    assert not marker.exists()
    loader.write_text(held)
    edit(folder / "vit/config.json", lambda data: data["model_args"].update(depth=1))
    told = refused(capsys, folder, *given, "vit")
    assert "vit.model must be the code that the bank's numbers come from" in told
    shutil.copy(folder / "grid_of_four.pt2", folder / "grid.pt2")
    told = refused(capsys, folder, *given, "program")
    assert "program.weights must be those that the bank's numbers come from" in told


# Where the shards are.


def test_shards_that_moved(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    (folder / "data").rename(folder / "elsewhere")

    def gone(data):
        for shard in data["shards"]:
            shard["url"] = f"/nowhere/{shard['name']}"

    edit(folder / "bank/bank.json", gone)
    told = refused(capsys, folder, "--teachers", "named")
    assert "--shards: cannot read /nowhere/train-" in told
    options = ["--teachers", "named", "--shards", folder / "elsewhere/train-{0..1}.tar"]
    assert run(capsys, folder, *options)[0] == 0


def test_the_wrong_shards(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    path = folder / "data/train-0.tar"
    data = path.read_bytes()
    # Two samples change names: every header stays a header, every size the same.
    swapped = data.replace(b"s0-0003", b"s0-____").replace(b"s0-0004", b"s0-0003")
    swapped = swapped.replace(b"s0-____", b"s0-0004")
    swapped = with_checksums(swapped)
    options = ["--teachers", "named", "--shards"]
    path.write_bytes(swapped)
    given = [*options, str(folder / "data/*.tar")]
    code = main(["verify", str(folder / "bank"), "--recheck", "17", *given])
    assert code == 2
    told = capsys.readouterr().err
    assert "--shards: " in told
    assert "must be the bank's train-0.tar, but its members differ" in told
    # Headers of a remote copy are not walked: there the keys tell.
    fs = fsspec.filesystem("memory")
    try:
        for name in ("train-0.tar", "train-1.tar"):
            fs.pipe_file(f"/recheck/{name}", (folder / "data" / name).read_bytes())
        given = [*options, "memory://recheck/*.tar"]
        code = main(["verify", str(folder / "bank"), "--recheck", "17", *given])
    finally:
        fs.rm("/recheck", recursive=True)
    assert code == 2
    told = capsys.readouterr().err
    assert "key must be the bank's 's0-000" in told
    assert "give the shards that the bank was made from" in told


def with_checksums(data: bytes) -> bytes:
    """A tar whose header checksums are made anew."""
    found = bytearray(data)
    for start in range(0, len(found), 512):
        if found[start + 257 : start + 262] == b"ustar":
            found[start + 148 : start + 156] = b" " * 8
            total = sum(found[start : start + 512])
            found[start + 148 : start + 156] = f"{total:06o}\0 ".encode()
    return bytes(found)


# Arguments.


def test_arguments_that_mean_nothing(made, capsys):
    bank = str(made / "bank")
    assert main(["verify", bank, "--teachers", "net"]) == 2
    assert "--teachers has no effect without --recheck N" in capsys.readouterr().err
    assert main(["verify", bank, "--recheck", "0"]) == 2
    assert "--recheck must be a number of rows of at least 1" in capsys.readouterr().err
    assert main(["verify", bank, "--recheck", "1", "--teachers", "nett"]) == 2
    told = capsys.readouterr().err
    assert "--teachers must name teachers of the bank (net, brain, padded, " in told
    assert "did you mean net" in told


def test_a_bank_that_was_never_finalised(made, tmp_path, capsys):
    folder = copy_of(made, tmp_path)
    edit(folder / "bank/bank.json", lambda data: data.update(state=None))
    assert "must be finalised to be rechecked" in refused(capsys, folder)


def test_commits_name_the_device(made):
    kinds = {
        json.loads(path.read_text())["device"]
        for path in (made / "bank/commits").rglob("*.json")
    }
    assert kinds == {device_kind("cpu")}
    assert kinds.pop().endswith(torch.backends.cpu.get_cpu_capability())
