"""Rows that cannot be used: named, counted, and without effect on their neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import yaml

from manifests.bank import Commit
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.errors import PipelineError
from teachonce.cli import main
from tests.conftest import POINTS_INPUT, POINTS_TEACHER, jpeg, sweep, write_tar

ROWS = 60
BAD = (0, 7, 8, 19, 33, 59)
BRIGHT = 23

STRANGE_TEACHER = '''

class Strange(Net):
    """Says nonsense of one picture: the bright one."""

    def __init__(self, value=float("nan"), only_logits=True):
        super().__init__()
        self.value, self.only_logits = value, only_logits

    def forward(self, x):
        bright = x.mean((1, 2, 3)) > 0.9
        logits = super().forward(x)
        logits = torch.where(bright[:, None], self.value, logits)
        return {"logits": logits, "pooled": x.mean((2, 3))}
'''


def white():
    import io

    from PIL import Image

    sink = io.BytesIO()
    Image.new("RGB", (24, 24), (255, 255, 255)).save(sink, "JPEG")
    return sink.getvalue()


def write(folder, bad=(), points=False, bright=None):
    members = []
    for row in range(ROWS):
        data = b"\xff\xd8 no picture" if row in bad else jpeg(row)
        if row == bright:
            data = white()
        members += [(f"k{row:03d}.jpg", data), (f"k{row:03d}.cls", b"1")]
        if points:
            members.append((f"k{row:03d}.bin", sweep(row)))
    write_tar(folder / "data/train-00000.tar", members)


def values(bank, output="net/image/16x16/logits"):
    opened = open_bank(str(bank))
    blocks = range(opened.record.num_blocks)
    return np.concatenate([opened.read(output, block) for block in blocks])[:ROWS]


def test_a_work_item_with_too_much_invalid_is_refused(tmp_path, make_job, capsys, run):
    """Before its first commit; the next run, of a job that allows it, goes on."""
    write(tmp_path, BAD)
    job = make_job(limits={"max_invalid_fraction": 0.01})
    assert main(["precompute", str(job), "--quiet"]) == 1
    said = capsys.readouterr().err
    assert "shard train-00000.tar: more than 1.0% of a work item of 60 samples" in said
    assert "max_invalid_fraction" in said
    bank = tmp_path / "bank"
    assert not list(bank.glob("commits/*/*"))
    assert main(["verify", str(bank)]) == 1
    outcome = run(job, "limits.max_invalid_fraction=0.2")
    assert outcome.is_whole
    assert outcome.result.valid["net.image"] == ROWS - len(BAD)


def test_few_samples_are_not_judged(tmp_path, make_job, run):
    """Below 50 samples a share says nothing."""
    members = []
    for row in range(20):
        data = b"no picture" if row < 10 else jpeg(row)
        members += [(f"k{row:03d}.jpg", data), (f"k{row:03d}.cls", b"1")]
    write_tar(tmp_path / "data/train-00000.tar", members)
    assert run(make_job()).is_whole


def test_invalid_rows_have_reasons_and_neighbours_their_values(tmp_path, make_job, run):
    clean = tmp_path / "clean"
    clean.mkdir()
    write(clean, points=True)
    write(tmp_path, BAD, points=True)
    fields = {
        "inputs": {"image": {"kind": "image", "member": "jpg"}, "lidar": POINTS_INPUT},
        "limits": {"max_invalid_fraction": 0.2},
    }
    job = make_job(**fields)
    text = job.read_text()
    assert "teachers" in text
    import yaml

    parsed = yaml.safe_load(text)
    parsed["teachers"]["net"]["on"] = ["image"]
    parsed["teachers"]["points"] = {**POINTS_TEACHER, "on": ["lidar"]}
    job.write_text(yaml.safe_dump(parsed))
    outcome = run(job)
    assert outcome.is_whole
    reference = run(
        job, f"bank={clean / 'bank'}", f"dataset.shards={clean}/data/train-*.tar"
    )
    assert reference.result.valid["net.image"] == ROWS
    state = outcome.record.state
    assert state.valid == {
        "rows": ROWS - len(BAD),
        "net.image": ROWS - len(BAD),
        "points.lidar": ROWS,
    }
    assert state.invalid["net.image"] == {"image:undecodable": len(BAD)}
    assert state.invalid["points.lidar"] == {}
    good = [row for row in range(ROWS) if row not in BAD]
    for output in ("logits", "patch"):
        found = values(tmp_path / "bank", f"net/image/16x16/{output}")
        wanted = values(clean / "bank", f"net/image/16x16/{output}")
        assert found[good].tobytes() == wanted[good].tobytes()
        assert np.isnan(found[list(BAD)]).all()
    # What does not see the image is not touched at all.
    path = "features.zarr/points/lidar/native/logits"
    for one in (clean / "bank" / path).glob("c.*"):
        assert one.read_bytes() == (tmp_path / "bank" / path / one.name).read_bytes()
    lines = list(open_bank(str(tmp_path / "bank")).rows())
    assert len(lines) == ROWS
    for line in lines:
        is_bad = line["offset"] + line["block"] * 8 in BAD
        assert line["valid.net.image"] is not is_bad
        assert line["reason.net.image"] == ("image:undecodable" if is_bad else None)
        assert line["valid.points.lidar"]
    assert verify(*open_record(str(tmp_path / "bank")), full=True).is_sound


def strange_job(make_job, tmp_path, encoding="lossless", **args):
    net = {
        "model": "module:./nets.py:Strange",
        "args": args,
        "weights": "random:1",
        "sizes": [[16, 16]],
        "batch": 4,
        "outputs": {
            "logits": {"from": "output[logits]", "encoding": encoding},
            "pooled": {"from": "output[pooled]"},
        },
    }
    job = make_job(
        teachers={"net": net, "other": {**net, "model": "module:./nets.py:Calm"}},
        limits={"max_invalid_fraction": 0.05},
    )
    import yaml

    parsed = yaml.safe_load(job.read_text())
    parsed["teachers"]["other"] |= {"args": {}, "model": "module:./nets.py:Net"}
    parsed["teachers"]["other"]["outputs"] = {"logits": {}}
    job.write_text(yaml.safe_dump(parsed))
    nets = tmp_path / "nets.py"
    nets.write_text(nets.read_text() + STRANGE_TEACHER)
    return job


@pytest.mark.parametrize(
    ("encoding", "args", "reason"),
    [
        ("lossless", {}, "logits:non_finite"),
        ("raw", {}, "logits:non_finite"),
        ("half", {"value": 1e6}, "logits:overflow_float16"),
    ],
)
def test_values_that_cannot_be_kept(tmp_path, make_job, run, encoding, args, reason):
    """The row is invalid in every output of that pass, and of that pass only."""
    write(tmp_path, bright=BRIGHT)
    outcome = run(strange_job(make_job, tmp_path, encoding, **args))
    assert outcome.is_whole
    state = outcome.record.state
    assert state.valid == {"rows": ROWS, "net.image": ROWS - 1, "other.image": ROWS}
    assert state.invalid["net.image"] == {reason: 1}
    assert outcome.result.invalid == {f"net.image/{reason}": 1}
    bank = tmp_path / "bank"
    for output in ("logits", "pooled"):
        found = values(bank, f"net/image/16x16/{output}")
        assert np.flatnonzero(np.isnan(found).any(axis=1)).tolist() == [BRIGHT]
        assert np.isnan(found[BRIGHT]).all()
    assert np.isfinite(values(bank, "other/image/16x16/logits")).all()
    (line,) = (one for one in open_bank(str(bank)).rows() if not one["valid.net.image"])
    assert (line["row"], line["reason.net.image"]) == (BRIGHT, reason)
    assert verify(*open_record(str(bank)), full=True).is_sound


def test_a_commit_stays_small(tmp_path, make_job, run):
    """Also where every row of a large block is invalid for several reasons."""
    members = [("good.jpg", jpeg(1)), ("good.cls", b"1")]
    for row in range(1024):
        members += [(f"k{row:05d}.jpg", b"no picture"), (f"k{row:05d}.cls", b"1")]
    write_tar(tmp_path / "data/train-00000.tar", members)
    job = make_job(block_rows=1024, limits={"max_invalid_fraction": 1.0})
    outcome = run(job)
    assert outcome.record.state.valid["net.image"] == 1
    sizes = {
        path: path.stat().st_size for path in (tmp_path / "bank").glob("commits/*/*")
    }
    assert len(sizes) == 4
    assert max(sizes.values()) < 16_000
    for path in sizes:
        content = Commit.model_validate_json(path.read_text()).content
        invalid = {row for rows in content.invalid.values() for row in rows}
        assert content.valid + len(invalid) == content.rows


def test_a_model_whose_shapes_are_not_as_planned_is_named(tmp_path, make_job, run):
    """Shapes that hang on the pixels cannot be told from shapes alone."""
    write_tar(tmp_path / "data/train-00000.tar", [("a.jpg", jpeg(1))])
    job = make_job()
    (tmp_path / "nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def forward(self, x):\n"
        "        extra = 0 if x.is_meta or not x.sum() else 1\n"
        "        return torch.ones(len(x), 5 + extra, device=x.device)\n"
    )
    fields = yaml.safe_load(job.read_text())
    fields["teachers"]["net"]["outputs"] = {"logits": {}}
    job.write_text(yaml.safe_dump(fields))
    with pytest.raises(PipelineError, match=r"must have the shape \[5\] per row"):
        run(job)
