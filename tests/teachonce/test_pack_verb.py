"""``teachonce pack``: what it says, its exit codes, and a bank from what it made."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from pipeline.samples.shards import index_shard
from teachonce.cli import main
from tests.conftest import jpeg, sweep, write_job


def put(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture
def call(capsys):
    """Runs the verb; returns the exit code, what it printed, and its errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["pack", *(str(one) for one in arguments)])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


def test_it_says_what_it_packed(call, tmp_path):
    files = {f"{'ab'[n % 2]}/{n}.jpg": jpeg(n) for n in range(6)}
    put(tmp_path / "in", {**files, "notes.txt": b""})
    code, out, _ = call(
        tmp_path / "in", tmp_path / "o/t-{:02d}.tar", "--samples-per-shard", 4
    )
    assert code == 0
    size = sum(path.stat().st_size for path in (tmp_path / "o").glob("*.tar"))
    pattern = f"{tmp_path}/o/t-{{00..01}}.tar"
    assert f"6 samples in 2 shards, {size / 1000:.2f} kB -> {pattern}" in out
    assert "members: .cls 6, .jpg 6" in out
    assert "classes: 2, named in classes.txt" in out
    assert "pack with --shuffle 0" in out
    assert "no images: 1" in out
    code, out, _ = call(tmp_path / "in", tmp_path / "s", "--shuffle", 1, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["samples"] == 6
    assert facts["pattern"] == f"{tmp_path}/s/shard-00000.tar"
    assert facts["members"] == {"cls": 6, "jpg": 6}
    assert facts["classes"] == ["a", "b"]
    assert not [note for note in facts["notes"] if "--shuffle" in note]


def test_labels_can_be_left_out(call, tmp_path):
    put(tmp_path / "in", {"a/1.jpg": jpeg(1), "b/2.jpg": jpeg(2)})
    code, out, _ = call(tmp_path / "in", tmp_path / "o", "--no-labels", "--json")
    assert (code, json.loads(out)["members"]) == (0, {"jpg": 2})


def test_unreadable_files_are_named_and_end_with_1(call, tmp_path):
    put(tmp_path / "in", {"a.jpg": jpeg(1), "list.csv": b"jpg\na.jpg\ngone.jpg\n"})
    code, out, _ = call(tmp_path / "in/list.csv", tmp_path / "o")
    assert code == 1
    assert "left out: 1 samples" in out
    assert f"unreadable: cannot read {tmp_path}/in/gone.jpg: nothing is there" in out
    assert (tmp_path / "o/shard-00000.tar").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["none", "o"], "SOURCE must be a folder or a list"),
        (["in", "o.tar"], "DEST must be a folder, or a name with one number"),
        (["in", "o", "--stride", "2"], "are for --clip T"),
        (["in", "o", "--columns", "x,y,z"], "--columns is for --sweeps N"),
        (["in", "o", "--sweeps", "2"], "--sweeps is for lists, got the folder"),
        (["in", "o", "--sweeps", "2", "--clip", "2"], "different samples; give one"),
        (["in", "o", "--clip", "0"], "--clip must be 1 to 1000"),
        (["in", "o", "--shard-bytes", "much"], "--shard-bytes must be a size"),
        (["in", "o", "--samples-per-shard", "0"], "at least 1 sample or byte"),
        (["in", "o", "--clip", "2"], "must have 2 frames for a clip, got .: 1"),
    ],
)
def test_what_cannot_be_done_ends_with_2_and_does_nothing(
    call, tmp_path, monkeypatch, arguments, match
):
    put(tmp_path / "in", {"a.jpg": jpeg(1)})
    monkeypatch.chdir(tmp_path)
    code, _, err = call(*arguments)
    assert code == 2
    assert match in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_cameras_and_sweeps_of_a_list_make_a_bank(call, tmp_path):
    lines = ["key\tcam_front.jpg\tcam_back.jpg\tbin\tcls\tjson"]
    for n in range(5):
        put(
            tmp_path / "raw",
            {f"f/{n}.jpg": jpeg(n), f"b/{n}.jpg": jpeg(50 + n), f"l/{n}.bin": sweep(n)},
        )
        back = "" if n == 3 else f"b/{n}.jpg"
        facts = json.dumps({"speed": n / 2}).replace('"', '""')
        lines.append(f'scene.1/{n:03d}\tf/{n}.jpg\t{back}\tl/{n}.bin\t{n}\t"{facts}"')
    (tmp_path / "raw/list.tsv").write_text("\n".join(lines))
    code, _, _ = call(tmp_path / "raw/list.tsv", tmp_path / "data", "--prefix", "train")
    assert code == 0
    net = {
        "model": "module:./nets.py:Net",
        "weights": "random:1",
        "on": ["cam_*"],
        "sizes": [[16, 16]],
        "outputs": {"logits": {}},
    }
    job = write_job(
        tmp_path,
        inputs={
            "cam_front": {"kind": "image", "member": "cam_front.jpg"},
            "cam_back": {"kind": "image", "member": "cam_back.jpg"},
            "lidar": {"kind": "points", "member": "bin"},
        },
        labels={
            "class": {"member": "cls", "num_classes": 5},
            "speed": {"member": "json", "path": "speed"},
        },
        limits={"max_invalid_fraction": 1.0},
        teachers={"net": net},
    )
    assert precompute(load_job(str(job)), quiet=True).is_whole
    bank = open_bank(str(tmp_path / "bank"))
    keys = bank.keys()
    assert [key for key in keys if key] == [f"scene.1/{n:03d}" for n in range(5)]
    assert bank.validity("net/cam_front/16x16/logits").sum() == 5
    assert bank.validity("net/cam_back/16x16/logits").tolist()[:5] == [
        True,
        True,
        True,
        False,
        True,
    ]
    assert bank.whole_array("labels/class")[:5].tolist() == list(range(5))
    assert bank.whole_array("labels/speed")[:5].tolist() == [n / 2 for n in range(5)]


def test_sweeps_of_a_list_become_one_input(call, tmp_path):
    for n in range(3):
        put(tmp_path, {f"{n}.bin": np.full((4 + n, 3), 1 + n, "<f4").tobytes()})
    pose = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    lines = [
        {"clip": "a", "time": n, "bin": f"{n}.bin", "pose": pose} for n in range(3)
    ]
    lines[2]["pose"] = [[1, 0, 0, 5], *pose[1:]]
    (tmp_path / "l.jsonl").write_text("\n".join(json.dumps(one) for one in lines))
    options = ["--sweeps", 2, "--columns", "x,y,z"]
    code, _, _ = call(tmp_path / "l.jsonl", tmp_path / "o", *options)
    assert code == 0
    index = index_shard(str(tmp_path / "o/shard-00000.tar"))
    assert (index.faults, [row.key for row in index.rows]) == ([], ["0", "1", "2"])
    with tarfile.open(tmp_path / "o/shard-00000.tar") as tar:
        data = tar.extractfile("2.bin").read()
    rows = np.frombuffer(data, "<f4").reshape(-1, 4).tolist()
    # The sensor went 5 m on: what it saw before is 5 m nearer now.
    assert rows == [[3, 3, 3, 0]] * 6 + [[-3, 2, 2, 1]] * 5
