"""Banks stored otherwise, from what is stored: no teacher, and said so."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from manifests.errors import BankError
from manifests.exported import Selection
from manifests.loading import load_job
from pipeline.bank.encoding import ENCODINGS
from pipeline.bank.export import export
from pipeline.bank.open import open_bank
from pipeline.bank.record import open_record
from pipeline.bank.row_names import KeyList
from pipeline.precompute import precompute
from pipeline.recheck_rows import recheck
from teachonce.cli import main
from tests.conftest import TEACHER_FILE, bank_identity, write_job, write_shards
from tests.exporting import check_sound
from tests.integration.test_compact import make_bank as padded_bank

PATCH, LOGITS = "net/image/16x16/patch", "net/image/16x16/logits"
STATS = "features.zarr/net/image/16x16/stats"
NETS = (
    TEACHER_FILE
    + '''

class Wide(Net):
    """Some logits of some images are beyond float16."""
    def forward(self, x):
        y = super().forward(x)
        is_odd = (x.mean((1, 2, 3)) * 1e4).long() % 2 == 1
        return y * torch.where(is_odd[:, None], 1e9, 1.0)
'''
)


def make_bank(folder, precision="float32", model="Net", **outputs):
    """A bank of two small shards with these outputs, and its job."""
    if not (folder / "data").exists():
        write_shards(folder, [11, 6])
    net = {
        "model": f"module:./nets.py:{model}",
        "weights": "random:1",
        "sizes": [[16, 16]],
        "batch": 4,
        "precision": precision,
        "outputs": {"logits": {}, "patch": {"from": "body"}} | outputs,
    }
    job = write_job(folder, teachers={"net": net}, views={"random": 1})
    (folder / "nets.py").write_text(NETS)
    precompute(load_job(str(job)), quiet=True)
    return folder / "bank", job


def split(identity):
    """What a bank holds: its statistics, and all else that the encoding decides."""
    stats = {path: data for path, data in identity.items() if path.startswith(STATS)}
    rest = {
        path: data
        for path, data in identity.items()
        if path not in stats and path.split("/")[0] not in ("commits",)
    }
    return stats, rest


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_is_the_bank_that_the_job_makes(tmp_path, precision, capsys):
    """From exact values every byte is the same; statistics stay those of before."""
    bank, job = make_bank(tmp_path, precision)
    part, direct = tmp_path / "part", tmp_path / "direct"
    chosen = ["patch=compact", "logits=topk:2"]
    command = ["export", str(bank), str(part), "--encoding", *chosen]
    assert main(command) == 0
    check_sound(part)
    outputs = {"logits": {"topk": 2}, "patch": {"from": "body", "encoding": "compact"}}
    override = [f"teachers.net.outputs={json.dumps(outputs)}"]
    precompute(load_job(str(job), [f"bank={direct}", *override]), quiet=True)
    stats, rest = split(bank_identity(part))
    _, made = split(bank_identity(direct))
    assert rest == made
    before, _ = split(bank_identity(bank))
    assert stats == {k: one for k, one in before.items() if "/logits_" not in k}
    entry = open_record(str(part))[1].pass_by_id("net.image")
    whole = open_record(str(bank))[1].pass_by_id("net.image")
    decoded = entry.provenance["decoded_from"]
    assert {name: one[0]["encoding"] for name, one in decoded.items()} == {
        "16x16/logits": "lossless",
        "16x16/patch": "lossless",
    }
    assert entry.provenance["exported_from"]["fingerprint"] == whole.fingerprint
    card = (part / "README.md").read_text()
    assert "A copy, with patch as compact, logits as topk:2, of" in card
    assert (
        f"- `{PATCH}` was encoded from what a bank held as lossless (no loss)" in card
    )
    found = recheck(str(part), 10, job=load_job(str(job)))
    assert found.holds, found
    # The job of before is another one now; that of the new encoding has nothing to do.
    capsys.readouterr()
    assert main(["precompute", str(job), f"bank={part}"]) == 2
    assert "is stored differently in the bank" in capsys.readouterr().err
    assert precompute(
        load_job(str(job), [f"bank={part}", *override]), quiet=True
    ).was_done
    assert main(["diff", str(bank), str(part), "--full"]) == 1
    said = capsys.readouterr().out
    assert re.search(r"passes   net\.image: decoded_from .* only in B", said)
    assert re.search(rf"values   {PATCH}: \d+ blocks; cosine 0\.99", said)


def test_cells_on_padding_stay_missing(tmp_path):
    """The job stores the same grid in both ways: `exact` and `patch`."""
    bank, part = padded_bank(tmp_path), tmp_path / "part"
    export(str(bank), str(part), Selection(encodings={"exact": "compact"}))
    check_sound(part)
    level = "features.zarr/net/image/32x32"
    for suffix in ("", "_scale", "_mean", "_std"):
        objects = sorted((bank / level / f"patch{suffix}").glob("c.*"))
        assert len(objects) == 2
        for theirs in objects:
            mine = part / level / f"exact{suffix}" / theirs.name
            assert mine.read_bytes() == theirs.read_bytes()
    rows = tmp_path / "rows"
    keys = KeyList(["0", "broken", "5"], "list")
    export(str(bank), str(rows), Selection(encodings={"exact": "half"}), keys=keys)
    check_sound(rows)
    path = "net/image/32x32/exact"
    whole = open_bank(str(bank)).read(path, 0, 1)[[0, 2, 6]]
    found = open_bank(str(rows)).read(path, 0, 1)[:3]
    np.testing.assert_array_equal(found, whole.astype(np.float16).astype(np.float32))
    cells = np.isnan(found[..., 0])
    assert cells[0].any()
    assert not cells[0].all()


def test_bits_that_only_change_their_codec_are_the_same(tmp_path):
    bank, _ = make_bank(tmp_path, patch={"from": "body", "encoding": "raw"})
    part = tmp_path / "part"
    export(str(bank), str(part), Selection(encodings={"net/patch": "lossless"}))
    check_sound(part)
    for block in range(3):
        for view in (0, 1):
            np.testing.assert_array_equal(
                open_bank(str(part)).read(PATCH, block, view),
                open_bank(str(bank)).read(PATCH, block, view),
            )
    # Asked for what it has, nothing is done to it.
    same = tmp_path / "same"
    export(str(part), str(same), Selection(encodings={"*": "lossless"}))
    assert bank_identity(same) == bank_identity(part)
    assert open_record(str(same))[1].passes == open_record(str(part))[1].passes


def test_what_was_rounded_is_rounded_once_more_and_says_so(tmp_path):
    bank, _ = make_bank(tmp_path, patch={"from": "body", "encoding": "half"})
    part = tmp_path / "part"
    export(str(bank), str(part), Selection(encodings={PATCH: "compact"}))
    check_sound(part)
    before, now = (open_bank(str(one)) for one in (bank, part))
    encoding = open_record(str(part))[1].pass_by_id("net.image").outputs[1].encoding
    assert (encoding["encoding"], encoding["dtype"]) == ("compact", "float32")
    # It is what compact makes of the values as they were decoded.
    values = before.read(PATCH, 0, 1)
    made = ENCODINGS["compact"](
        name="patch", kind="grid", shape=values.shape[1:], dtype="float32"
    )
    expected = made.decode(made.encode(values, np.ones(8, np.bool_)).arrays)
    np.testing.assert_array_equal(now.read(PATCH, 0, 1), expected)
    assert "held as half (**rounded before**)" in (part / "README.md").read_text()
    twice = tmp_path / "twice"
    export(str(part), str(twice), Selection(encodings={PATCH: "half"}))
    assert "held as half, then compact (**rounded" in (twice / "README.md").read_text()


def test_rounded_values_of_a_teacher_in_bfloat16_are_float32(tmp_path):
    bank, job = make_bank(tmp_path, "bfloat16", patch={"from": "body"})
    small, part = tmp_path / "small", tmp_path / "part"
    export(str(bank), str(small), Selection(encodings={PATCH: "compact"}))
    assert open_bank(str(small)).output(PATCH).dtype == "bfloat16"
    chosen = Selection(encodings={PATCH: "tiny"}, fraction=0.7)
    export(str(small), str(part), chosen)
    check_sound(part)
    assert open_bank(str(part)).output(PATCH).dtype == "float32"
    found = recheck(str(part), 10, job=load_job(str(job)))
    assert found.holds, found
    assert main(["diff", str(small), str(part)]) == 1


def test_a_row_that_an_encoding_refuses_is_missing_in_its_pass(tmp_path):
    bank, _ = make_bank(tmp_path, model="Wide")
    part = tmp_path / "part"
    assert main(["export", str(bank), str(part), "--encoding", "logits=half"]) == 0
    check_sound(part)
    exact = np.concatenate([open_bank(str(bank)).read(LOGITS, b, 0) for b in range(3)])
    random = np.concatenate([open_bank(str(bank)).read(LOGITS, b, 1) for b in range(3)])
    is_wide = np.fmax(abs(exact), abs(random)).max(axis=1) > 65504
    here = ~np.isnan(exact[:, 0])
    assert 0 < is_wide.sum() < here.sum()
    bank_now = open_bank(str(part))
    np.testing.assert_array_equal(bank_now.validity(LOGITS), here & ~is_wide)
    for path in (LOGITS, PATCH):
        found = np.concatenate([bank_now.read(path, b, 0) for b in range(3)])
        is_missing = np.isnan(found.reshape(24, -1)).all(axis=1)
        np.testing.assert_array_equal(is_missing, ~here | is_wide)
    state = open_record(str(part))[1].state
    assert state.invalid["net.image"] == {"logits:overflow_float16": is_wide.sum()}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A bank whose outputs are stored in several ways; not to be written to."""
    return make_bank(
        tmp_path_factory.mktemp("mixed"),
        logits={"topk": 2},
        patch={"from": "body", "encoding": "compact"},
        cls={"from": "output", "encoding": "half"},
    )[0]


@pytest.mark.parametrize(
    ("encodings", "message"),
    [
        (
            {"patch": "lossless"},
            r"patch must stay compact or become a smaller one, got",
        ),
        ({"cls": "raw"}, "the values were rounded, and would take more bytes"),
        (
            {"logits": "lossless"},
            "must stay topk, got lossless: the logits that it does",
        ),
        ({"cls": "compact"}, "encoding compact must be of a grid of features"),
        ({"patch": "jpeg"}, r"must be one of raw, lossless, .*topk:K, got 'jpeg'"),
        ({"cls": "topk"}, r"topk:K.*, got 'topk'"),
        ({"cls": "half:3"}, "got 'half:3'"),
        ({"bev": "half"}, "encodings must be in the bank, got 'bev'"),
        ({"patch": "half", "net/*": "half"}, "must name an output once, got net/image"),
    ],
)
def test_encodings_that_are_refused(mixed, tmp_path, encodings, message):
    with pytest.raises(BankError, match=message):
        export(str(mixed), str(tmp_path / "part"), Selection(encodings=encodings))
    assert not (tmp_path / "part").exists()


@pytest.mark.parametrize("given", ["patch", "=half", "patch=", "patch=half patch=raw"])
def test_options_that_are_none(mixed, tmp_path, capsys, given):
    command = ["export", str(mixed), str(tmp_path / "part"), "--encoding"]
    assert main([*command, *given.split()]) == 2
    assert "--encoding must be OUTPUT=PRESET, each output once" in (
        capsys.readouterr().err
    )
