"""A zero-shot classifier from class names to logits in a bank, through the verbs."""

from __future__ import annotations

import io
import json
import shutil

import numpy as np
import open_clip
import open_clip.factory
import pytest
import xarray
import zarr
from safetensors.numpy import load_file

from manifests.errors import BankError
from manifests.storage import Store
from pipeline.bank.open import open_bank
from pipeline.bank.verify import verify
from teachers.errors import TeacherError
from teachonce.cli import main
from tests.conftest import write_job, write_shards

CONFIG = {
    "embed_dim": 24,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        "image_size": 32,
        "layers": 1,
        "width": 64,
        "patch_size": 16,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}
CLASSES = ["car", "pedestrian", "traffic light", "bicycle", "truck"]
PATH = "clip/image/32x32/logits"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two shards, a tiny model that open_clip knows, and its classifier by the verb."""
    folder = tmp_path_factory.mktemp("zero")
    configs = dict(open_clip.factory._MODEL_CONFIGS)
    paths = list(open_clip.factory._MODEL_CONFIG_PATHS)
    (folder / "configs").mkdir()
    (folder / "configs" / "tiny-zero.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / "configs")
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    (folder / "templates.txt").write_text("a photo of a {}.\na blurry {}.\n")
    write_shards(folder, [11, 5])
    code = main(
        [
            "teachers",
            "open_clip:tiny-zero",
            "--weights=random:3",
            f"--classes={folder}/classes.txt",
            f"--templates={folder}/templates.txt",
            f"--to={folder}/zero.safetensors",
        ]
    )
    assert code == 0
    yield folder
    open_clip.factory._MODEL_CONFIGS = configs
    open_clip.factory._MODEL_CONFIG_PATHS[:] = paths


def zero_job(folder, name="job.yaml", classifier="./zero.safetensors", **logits):
    teacher = {
        "model": "open_clip:tiny-zero",
        "weights": "random:3",
        "batch": 4,
        "outputs": {"embed": {}, "logits": {"classifier": classifier, **logits}},
    }
    return write_job(folder, name, teachers={"clip": teacher})


@pytest.fixture(scope="module")
def bank(folder):
    """The bank of that job; not to be written to."""
    assert main(["precompute", str(zero_job(folder)), "--quiet"]) == 0
    return folder / "bank"


@pytest.fixture
def bank_copy(bank, tmp_path):
    """A bank of one's own to damage."""
    return shutil.copytree(bank, tmp_path / "bank")


def by_numpy(bank, file):
    """Logits of every row in float64 from the stored embeddings and the file."""
    opened = open_bank(str(bank))
    embed = np.concatenate(
        [opened.read("clip/image/32x32/embed", block) for block in range(3)]
    ).astype(np.float64)
    held = load_file(file)
    unit = embed / np.linalg.norm(embed, axis=1, keepdims=True)
    return held["scale"] * unit @ held["weight"].T.astype(np.float64) + held["bias"]


def test_logits_are_numpys_from_the_stored_embeddings(bank, folder):
    opened = open_bank(str(bank))
    logits = np.concatenate([opened.read(PATH, block) for block in range(3)])
    expected = by_numpy(bank, folder / "zero.safetensors")
    valid = opened.validity(PATH)
    assert valid.sum() == 16
    np.testing.assert_allclose(logits[valid], expected[valid], atol=1e-4)
    assert np.isnan(logits[~valid]).all()
    assert opened.output(PATH).dtype == "float32"


def test_a_classifier_travels_with_its_logits(bank, tmp_path):
    part = tmp_path / "part"
    command = ["export", str(bank), str(part), "--shards", "train-00001.tar"]
    assert main([*command, "--outputs", "logits"]) == 0
    ours, theirs = open_bank(str(part)), open_bank(str(bank))
    assert ours.outputs == (PATH,)
    mine, whole = ours.classifier(PATH), theirs.classifier(PATH)
    np.testing.assert_array_equal(mine.weight, whole.weight)
    assert (mine.classes, mine.sha256) == (whole.classes, whole.sha256)
    np.testing.assert_array_equal(ours.read(PATH, 0), theirs.read(PATH, 2))
    assert main(["verify", str(part), "--full"]) == 0
    without = tmp_path / "without"
    assert main(["export", str(bank), str(without), "--outputs", "embed"]) == 0
    assert not list(without.rglob("*_classifier"))


def test_a_damaged_classifier_does_not_travel(bank_copy, tmp_path, capsys):
    held = bank_copy / f"features.zarr/{PATH}_classifier/c.0.0"
    held.write_bytes(held.read_bytes()[:-1])
    assert main(["export", str(bank_copy), str(tmp_path / "part")]) == 1
    assert "logits_classifier/c.0.0 does not match its own" in capsys.readouterr().err
    assert main(["info", str(tmp_path / "part")]) == 2


def test_the_bank_holds_the_classifier(bank, folder):
    held = load_file(folder / "zero.safetensors")
    found = open_bank(str(bank)).classifier(PATH)
    np.testing.assert_array_equal(found.weight, held["weight"])
    assert found.classes == tuple(CLASSES)
    assert (found.scale, found.bias) == (held["scale"], held["bias"])
    assert found.model == "open_clip:tiny-zero"
    stock = zarr.open_group(str(bank / "features.zarr"), mode="r")[f"{PATH}_classifier"]
    np.testing.assert_array_equal(stock[...], held["weight"])
    assert stock.attrs["classes"] == CLASSES
    assert stock.attrs["sha256"] == found.sha256
    assert stock.attrs["scale"] == pytest.approx(1 / 0.07)
    assert stock.attrs["bias"] == -10
    with pytest.raises(BankError, match="comes from no zero-shot classifier"):
        open_bank(str(bank)).classifier("clip/image/32x32/embed")


def test_xarray_opens_the_level_and_the_tree(bank):
    url = str(bank / "features.zarr")
    level = xarray.open_zarr(url, group="clip/image/32x32", consolidated=False)
    assert level["logits_classifier"].shape == (len(CLASSES), 24)
    assert level["logits"].shape[-1] == len(CLASSES)
    with xarray.open_datatree(url, engine="zarr", consolidated=False) as tree:
        assert "logits_classifier" in tree["clip/image/32x32"]


def test_provenance_names_classes_and_digest_but_no_folder(bank, folder):
    record = open_bank(str(bank)).record
    entry = next(one for one in record.passes if one.teacher == "clip")
    told = entry.provenance["facts"]["classifiers"]["logits"]
    assert told["classes"] == CLASSES
    output = next(one for one in entry.outputs if one.name == "logits")
    assert output.definition == {"classifier": told["sha256"]}
    assert str(folder) not in json.dumps(output.model_dump(mode="json"))


def test_the_same_classifier_elsewhere_is_the_same_job(bank_copy, folder):
    before = (bank_copy / "bank.json").read_bytes()
    (folder / "moved").mkdir()
    shutil.copy(folder / "zero.safetensors", folder / "moved" / "again.safetensors")
    job = zero_job(folder, "moved.yaml", "./moved/again.safetensors")
    assert main(["precompute", str(job), f"bank={bank_copy}", "--quiet"]) == 0
    passes = json.loads((bank_copy / "bank.json").read_bytes())["passes"]
    assert passes == json.loads(before)["passes"]


def test_another_classifier_at_the_same_path_is_refused(bank_copy, folder, tmp_path):
    file = tmp_path / "zero.safetensors"
    shutil.copy(folder / "zero.safetensors", file)
    job = zero_job(folder, "other.yaml", str(file))
    (folder / "fewer.txt").write_text("car\ntruck\n")
    arguments = ["precompute", str(job), f"bank={bank_copy}", "--quiet"]
    assert main(arguments) == 0
    code = main(
        [
            "teachers",
            "open_clip:tiny-zero",
            "--weights=random:3",
            f"--classes={folder}/fewer.txt",
            f"--to={file}",
        ]
    )
    assert code == 0
    assert main(arguments) == 2


def test_topk_of_a_classifier(folder):
    job = zero_job(folder, "topk.yaml", topk=2)
    bank = folder / "topk-bank"
    assert main(["precompute", str(job), f"bank={bank}", "--quiet"]) == 0
    opened = open_bank(str(bank))
    logits = np.concatenate([opened.read(PATH, block) for block in range(3)])
    expected = by_numpy(bank, folder / "zero.safetensors")
    valid = opened.validity(PATH)
    order = np.argsort(-expected[valid], axis=1)[:, :2]
    np.testing.assert_allclose(
        np.take_along_axis(logits[valid], order, 1),
        np.take_along_axis(expected[valid], order, 1),
        atol=1e-4,
    )
    assert opened.classifier(PATH).classes == tuple(CLASSES)
    assert verify(Store(str(bank)), opened.record, full=True).is_sound


def test_verify_and_repair(bank_copy, folder):
    store, record = Store(str(bank_copy)), open_bank(str(bank_copy)).record
    assert verify(store, record, full=True).is_sound
    object_path = bank_copy / "features.zarr" / f"{PATH}_classifier" / "c.0.0"
    whole = object_path.read_bytes()
    for damage in (None, bytes([whole[0] ^ 1]) + whole[1:]):
        object_path.unlink()
        if damage is not None:
            object_path.write_bytes(damage)
        report = verify(store, record, full=True)
        assert any("logits_classifier/c.0.0" in line for line in report.problems)
        if damage is None:
            with pytest.raises(BankError, match="is missing"):
                open_bank(str(bank_copy)).classifier(PATH)
        arguments = [str(folder / "job.yaml"), f"bank={bank_copy}", "--quiet"]
        zero_job(folder)
        assert main(["precompute", *arguments, "--repair"]) == 0
        assert object_path.read_bytes() == whole
        assert verify(store, record, full=True).is_sound


def test_a_classifier_that_is_gone_stops_the_job_before_it_starts(folder, tmp_path):
    job = zero_job(folder, "gone.yaml", "./gone.safetensors")
    from manifests.loading import load_job
    from pipeline.precompute import precompute

    with pytest.raises(TeacherError, match=r"teachers\.clip\.outputs\.logits\.class"):
        precompute(load_job(str(job), [f"bank={tmp_path}/bank"]), quiet=True)
    assert not (tmp_path / "bank").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=x"], "--to must come with --classes"),
        (["open_clip:tiny-zero", "--weights=random"], "--weights must come with"),
        (
            ["open_clip:tiny-zero", "--classes=classes.txt"],
            "must come with a model and",
        ),
        (["timm:test_vit", "--classes=classes.txt", "--to=x"], "made by an open_clip:"),
        (["open_clip:tiny-zero", "--classes=gone.txt", "--to=x"], "gone.txt"),
        (
            ["open_clip:tiny-zero", "--classes=classes.txt", "--to=x"],
            "weights must be given",
        ),
    ],
)
def test_what_the_verb_refuses(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    assert main(["teachers", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "x").exists()


def test_the_verb_says_what_it_made(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["teachers", "open_clip:tiny-zero", "--weights=random:3"]
    arguments += ["--classes=classes.txt", "--to=made.safetensors"]
    assert main(arguments) == 0
    assert "5 classes x 24 channels, 18 templates" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.load(io.StringIO(capsys.readouterr().out))["classes"] == CLASSES
