"""What differs between two banks, told apart from what only looks different."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

from manifests.loading import load_job
from pipeline.bank.diff_values import ValueDifference
from pipeline.precompute import precompute
from teachonce.cli import main
from tests.conftest import without_checksum, write_job, write_shards

PATCH = "net/image/16x16/patch"
PATCH_OBJECT = f"features.zarr/{PATCH}/c.1.0.0.0.0"
NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "sizes": [[16, 16]],
    "batch": 4,
    "outputs": {"logits": {}, "patch": {"from": "body"}},
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with shards and the bank ``bank`` of two of them."""
    folder = tmp_path_factory.mktemp("diff")
    write_shards(folder, [11, 6])
    make(folder, "bank")
    return folder


def make(folder: Path, name: str, **fields: object) -> Path:
    job = write_job(folder, f"{name}.yaml", bank=f"./{name}", **fields)
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return folder / name


def copy_of(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / "bank", tmp_path / "copy"))


def edit(bank: Path, change) -> None:
    record = json.loads(without_checksum((bank / "bank.json").read_text()))
    change(record)
    (bank / "bank.json").write_text(json.dumps(record))


@pytest.fixture
def told(home, capsys):
    """Runs ``diff`` against the module's bank: (exit code, what it prints)."""

    def call(other: Path, *options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["diff", str(home / "bank"), str(other), *options])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return call


def facts(answer: tuple[int, str]) -> dict:
    return json.loads(answer[1])


@pytest.mark.parametrize("options", [(), ("--full",)])
def test_a_bank_made_again_is_the_same(home, told, options):
    code, said = told(make(home, "again"), *options)
    assert code == 0
    assert "same content: 9 objects" in said
    assert said.count("\n") == 3


def test_places_and_times_are_no_content(home, told, tmp_path):
    bank = copy_of(home, tmp_path)

    def move(record):
        for shard in record["shards"]:
            shard.update(url="gs://elsewhere/x.tar", tag="other", modified="now")

    edit(bank, move)
    shutil.rmtree(bank / "runs")
    assert told(bank)[0] == 0


def test_a_licence_is_content(home, told, tmp_path):
    bank = copy_of(home, tmp_path)
    edit(bank, lambda record: record["dataset"].update(license="cc-by-4.0"))
    code, said = told(bank)
    assert code == 1
    assert "dataset  license: cc0-1.0 in A, cc-by-4.0 in B\n" in said


def test_a_bank_that_grew_by_a_teacher(home, told):
    teachers = {"net": NET, "other": {**NET, "weights": "random:7"}}
    answer = told(make(home, "grown", teachers=teachers), "--json")
    assert answer[0] == 1
    found = facts(answer)["differences"]
    assert {(one["section"], one["what"], one["only"]) for one in found} == {
        ("passes", "other.image", "B"),
        ("outputs", "other/image/16x16/logits", "B"),
        ("outputs", "other/image/16x16/patch", "B"),
    }
    assert facts(answer)["objects"]["different"] == 0


def test_other_weights_under_the_same_name(home, told):
    other = make(home, "weights", teachers={"net": {**NET, "weights": "random:2"}})
    code, said = told(other)
    assert code == 1
    assert "passes   net.image: weights.seed: 1 in A, 2 in B\n" in said
    # Told from the commits alone, of objects of one size too.
    assert "objects  6 of 9 have other bytes: features.zarr/net/image/16x16/log" in said
    found = facts(told(other, "--full", "--json"))
    assert found["objects"]["different"] == 6
    values = {one["output"]: one for one in found["values"]}
    assert set(values) == {"net/image/16x16/logits", PATCH}
    a, b = (
        zarr.open_group(str(bank / "features.zarr"), mode="r")[PATCH][:]
        for bank in (home / "bank", other)
    )
    rows = ~np.isnan(a).any(axis=(1, 2, 3, 4))
    a, b = (one[rows].astype(np.float64).reshape(-1, 16) for one in (a, b))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    told_of = values[PATCH]
    assert told_of["vectors"] == len(a) == 17 * 16
    assert told_of["cosine_mean"] == pytest.approx(cosine.mean(), rel=1e-9)
    assert told_of["cosine_least"] == pytest.approx(cosine.min(), rel=1e-9)
    assert told_of["largest_error"] == pytest.approx(abs(a - b).max(), rel=1e-9)


def test_another_encoding_is_compared_by_what_it_decodes_to(home, told):
    outputs = {"logits": {}, "patch": {"from": "body", "encoding": "half"}}
    other = make(home, "half", teachers={"net": {**NET, "outputs": outputs}})
    code, said = told(other)
    assert code == 1
    assert f"{PATCH}: encoding.encoding: lossless in A, half in B\n" in said
    assert "objects  " not in said
    (values,) = facts(told(other, "--full", "--json"))["values"]
    assert values["output"] == PATCH
    stored = zarr.open_group(str(home / "bank/features.zarr"), mode="r")[PATCH][:]
    exact = stored[~np.isnan(stored)]
    error = abs(exact - exact.astype(np.float16).astype(np.float32)).max()
    assert values["largest_error"] == pytest.approx(error, rel=1e-6)
    assert values["cosine_least"] > 1 - 1e-6


def test_other_views(home, told):
    code, said = told(make(home, "views", views={"random": 1}))
    assert code == 1
    assert "views    num_views: 1 in A, 2 in B\n" in said
    assert f"outputs  net/image/16x16/logits, {PATCH}: views: [0] in A, [0, 1]" in said


def test_one_more_shard(tmp_path, home, told):
    write_shards(tmp_path, [11, 6, 4])
    code, said = told(make(tmp_path, "more"))
    assert code == 1
    assert "shards   train-00002.tar: only in B\n" in said
    assert "rows     rows, net.image: valid: 17 in A, 21 in B\n" in said
    assert "objects  " not in said


def test_a_shard_of_the_same_name_with_other_bytes(tmp_path, home, told):
    write_shards(tmp_path, [11])
    write_shards(tmp_path, [5], first=1)
    code, said = told(make(tmp_path, "bytes"))
    assert code == 1
    assert "shards   train-00001.tar: headers_sha256: " in said
    assert "shards   train-00001.tar: samples: 6 in A, 5 in B\n" in said
    # Blocks of the other shard are compared, those of this one are not.
    assert "6 objects that both have" in said


def test_shards_that_came_in_another_order(tmp_path, home, told):
    """The rows lie elsewhere, and nothing else differs."""
    shutil.copytree(home / "data", tmp_path / "data")
    second = {"shards": "./data/train-00001.tar", "license": "cc0-1.0"}
    make(tmp_path, "turned", dataset=second)
    answer = told(make(tmp_path, "turned"), "--full", "--json")
    found = facts(answer)
    assert {one["field"] for one in found["differences"]} == {"first_block"}
    assert found["objects"] == {"compared": 9, "different": 0, "first": []}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(bytes(data))


def test_one_flipped_byte(home, told, tmp_path):
    bank = copy_of(home, tmp_path)
    flip(bank / PATCH_OBJECT)
    code, said = told(bank)
    assert code == 0
    assert "as committed; --full reads the bytes" in said
    code, said = told(bank, "--full")
    assert code == 1
    assert f"damaged  B: 1 objects are not what was committed: {PATCH_OBJECT}\n" in said
    assert f"objects  1 of 9 have other bytes: {PATCH_OBJECT}\n" in said


def test_a_partly_copied_bank(home, told, tmp_path):
    bank = copy_of(home, tmp_path)
    (bank / PATCH_OBJECT).unlink()
    (bank / "commits/net.image/00000002.json").unlink()
    (bank / "features.zarr/key/c.0").unlink()
    for options in ((), ("--full",)):
        code, said = told(bank, *options)
        assert code == 1
        assert f"missing  B 1 objects: {PATCH_OBJECT}\n" in said
        assert "missing  B 1 commits: commits/net.image/00000002.json\n" in said
        assert "missing  B 1 files: features.zarr/key/c.0\n" in said
    (bank / "blocks.parquet").unlink()
    code, said = told(bank)
    assert code == 1
    assert "missing  B pass net.image: 1 blocks have no commit\n" in said
    assert "blocks   net.image: committed: 3 of 3 in A, 2 of 3 in B\n" in said


def test_a_bank_that_was_never_finalised(home, told, tmp_path):
    bank = copy_of(home, tmp_path)
    edit(bank, lambda record: record.update(state=None))
    code, said = told(bank)
    assert code == 1
    assert "rows     finalised only in A\n" in said


def test_what_cannot_be_opened_ends_with_2(home, told, tmp_path):
    bank = copy_of(home, tmp_path)
    edit(bank, lambda record: record.update(schema_version=99))
    code, said = told(bank)
    assert code == 2
    assert "has schema version 99, this TeachOnce reads up to" in said
    code, said = told(tmp_path)
    assert code == 2
    assert "no bank at" in said


def test_a_fingerprint_tells_what_no_field_does(home, told, tmp_path):
    bank = copy_of(home, tmp_path)
    edit(bank, lambda record: record["passes"][1].update(fingerprint="0" * 64))
    code, said = told(bank)
    assert code == 1
    assert "passes   net.image: fingerprint: " in said


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 7))
def test_distances_are_numpys_and_ignore_what_is_missing(seed, rows, channels):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, rows, 3, channels)).astype(np.float32)
    gone_a, gone_b = rng.random((2, rows, 3)) < 0.3
    a[gone_a], b[gone_b] = np.nan, np.nan
    found = ValueDifference("x")
    found.add(a, b)
    both = ~gone_a & ~gone_b
    assert (found.only_a, found.only_b) == (
        (gone_b & ~gone_a).sum(),
        (gone_a & ~gone_b).sum(),
    )
    assert found.vectors == both.sum()
    if both.any():
        u, v = a[both].astype(np.float64), b[both].astype(np.float64)
        cosine = np.einsum("nc,nc->n", u, v) / np.sqrt((u**2).sum(1) * (v**2).sum(1))
        assert found.cosine_mean == pytest.approx(cosine.mean(), abs=1e-9)
        assert found.largest_error == pytest.approx(np.abs(u - v).max())


def test_vectors_of_zeros():
    found = ValueDifference("x")
    found.add(np.zeros((2, 3), np.float32), np.float32([[0, 0, 0], [1, 0, 0]]))
    assert (found.cosine_mean, found.cosine_least, found.largest_error) == (0.5, 0, 1)
