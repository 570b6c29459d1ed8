"""From YAML to a checked job: paths, overrides, and errors that say what to write."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
import yaml

from manifests.errors import ManifestError, TeachOnceError
from manifests.job import Job
from manifests.loading import (
    canonical_json,
    digest,
    folder_of,
    is_weights_file,
    load_job,
    load_json,
    resolve_path,
)

NET = {"model": "timm:test_vit", "outputs": {"cls": {}}}
MINIMAL = {
    "bank": "./bank",
    "dataset": {"shards": "./data/train-{0..3}.tar"},
    "inputs": {"image": {"kind": "image", "member": "jpg"}},
    "teachers": {"net": NET},
}


def write(folder: Path, text: str | None = None, **fields: object) -> str:
    path = folder / "job.yaml"
    path.write_text(text if text is not None else yaml.safe_dump({**MINIMAL, **fields}))
    return str(path)


def refused(folder: Path, *overrides: str, text: str | None = None, **fields: object):
    with pytest.raises(ManifestError) as caught:
        load_job(write(folder, text, **fields), overrides)
    assert isinstance(caught.value, (TeachOnceError, ValueError))
    message = str(caught.value)
    assert "\n" not in message
    return message


def teacher(**fields: object) -> dict[str, object]:
    return {"teachers": {"net": {**NET, **fields}}}


def test_relative_paths_start_at_the_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    fields = {
        "dataset": {"shards": ["../data/a.tar", "gs://acme/b.tar", "/c/d.tar"]},
        "teachers": {
            "file": {**NET, "weights": "./w/net.pt"},
            "bare": {**NET, "weights": "net.safetensors"},
            "url": {**NET, "weights": "hf://acme/net/net.pt"},
            "tag": {**NET, "weights": "webli"},
            "seed": {**NET, "weights": "random:3"},
            "code": {**NET, "model": "module:code/net.py:Net"},
            "proxy": {**NET, "model": "student:../runs/proxy/student"},
            "there": {**NET, "model": "student:gs://acme/proxy"},
            "program": {**NET, "model": "exported:./net.pt2"},
        },
    }
    job = load_job(write(tmp_path, **fields))
    assert job.bank == f"{tmp_path}/bank"
    assert job.dataset.shards == [
        f"{tmp_path.parent}/data/a.tar",
        "gs://acme/b.tar",
        "/c/d.tar",
    ]
    assert {name: one.weights for name, one in job.teachers.items()} == {
        "file": f"{tmp_path}/w/net.pt",
        "bare": f"{tmp_path}/net.safetensors",
        "url": "hf://acme/net/net.pt",
        "tag": "webli",
        "seed": "random:3",
        "code": None,
        "proxy": None,
        "there": None,
        "program": None,
    }
    code = job.teachers["code"]
    assert code.model == f"module:{tmp_path}/code/net.py:Net"
    assert (code.family, code.model_name) == ("module", f"{tmp_path}/code/net.py:Net")
    assert (
        job.teachers["proxy"].model == f"student:{tmp_path.parent}/runs/proxy/student"
    )
    assert job.teachers["there"].model == "student:gs://acme/proxy"
    assert job.teachers["program"].model == f"exported:{tmp_path}/net.pt2"


def test_relative_paths_of_a_job_in_a_store():
    models = {
        "proxy": "student:../runs/proxy/student",
        "program": "exported:./net.pt2",
        "code": "module:net.py:Net",
        "local": "student:/data/student",
    }
    teachers = {name: {**NET, "model": model} for name, model in models.items()}
    with fsspec.open("memory://acme/jobs/job.yaml", "w") as file:
        file.write(yaml.safe_dump({**MINIMAL, "teachers": teachers}))
    job = load_job("memory://acme/jobs/job.yaml")
    assert {name: one.model for name, one in job.teachers.items()} == {
        "proxy": "student:memory://acme/runs/proxy/student",
        "program": "exported:memory://acme/jobs/net.pt2",
        "code": "module:memory://acme/jobs/net.py:Net",
        "local": "student:/data/student",
    }
    assert job.bank == "memory://acme/jobs/bank"


@pytest.mark.parametrize(
    ("path", "base", "expected"),
    [
        ("a/b.tar", "/x", "/x/a/b.tar"),
        ("../b.tar", "/x/y", "/x/b.tar"),
        ("./b.tar", "gs://acme/jobs", "gs://acme/jobs/b.tar"),
        ("/b.tar", "gs://acme/jobs", "/b.tar"),
        ("../b.tar", "gs://acme/jobs", "gs://acme/b.tar"),
        ("../../b/./{0..3}.tar", "s3://acme/x/y", "s3://acme/b/{0..3}.tar"),
        ("s3://acme/b.tar", "/x", "s3://acme/b.tar"),
    ],
)
def test_resolve_path(path, base, expected):
    assert resolve_path(path, base) == expected


def test_a_home_folder_is_resolved(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert resolve_path("~/b.tar", "/x") == "/home/ada/b.tar"
    assert folder_of("gs://acme/jobs/job.yaml") == "gs://acme/jobs"


def test_what_is_a_file_of_weights():
    files = ("./a", "a/b", "net.pt", "NET.SAFETENSORS", "C:\\net", "gs://x/y")
    assert all(is_weights_file(text) for text in files)
    assert not any(is_weights_file(text) for text in ("webli", "random", "random:1"))


def test_overrides(tmp_path):
    job = load_job(
        write(tmp_path),
        [
            "teachers.net.batch=7",
            "teachers.net.sizes=[[32, 64], [64, 128]]",
            "teachers.net.outputs.patch.pool=[2, 2]",
            "views.random=2",
            "bank=./other",
            "limits.max_bytes=1.2 TB",
            "engine.memory=64 MiB",
            "labels.class={member: cls, num_classes: 3}",
            "dataset.license=a=b",
        ],
    )
    net = job.teachers["net"]
    assert (net.batch, net.sizes) == (7, [(32, 64), (64, 128)])
    assert net.outputs["patch"].pool == (2, 2)
    assert list(net.outputs) == ["cls", "patch"]
    assert job.views.random == 2
    assert job.bank == f"{tmp_path}/other"
    assert job.limits.max_bytes == 1_200_000_000_000
    assert job.engine.memory == 64 * 2**20
    assert job.labels["class"].num_classes == 3
    assert job.dataset.license == "a=b"


def test_an_override_fills_an_empty_field(tmp_path):
    text = yaml.safe_dump(MINIMAL) + "views:\n"
    assert load_job(write(tmp_path, text), ["views.seed=4"]).views.seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch", "override must be key=value, got 'batch'"),
        ("=3", "override must be key=value"),
        ("teachers..batch=3", "override must be key=value"),
        ("bank.place=3", "override 'bank.place=3': bank is a value, not a mapping"),
        ("teachers.net.sizes=[[", "the value is not YAML"),
        (
            "teachers.net.btach=3",
            "teachers.net.btach: no such field; did you mean batch?",
        ),
    ],
)
def test_overrides_that_are_refused(tmp_path, override, message):
    assert message in refused(tmp_path, override)


IMAGE = {"kind": "image", "member": "jpg"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            teacher(precison="x"),
            "teachers.net.precison: no such field; did you mean prec",
        ),
        ({"teecher": 1}, "job.yaml: teecher: no such field; did you mean teachers?"),
        ({"zzz": 1}, "zzz: no such field; known: bank, dataset, metadata, inputs"),
        (
            {"inputs": {"image": {**IMAGE, "calibraton": "x"}}},
            "inputs.image.calibraton: no such field; did you mean calibration?",
        ),
        (
            {"inputs": {"lidar": {"kind": "points", "member": "b", "intensty_max": 3}}},
            "inputs.lidar.intensty_max: no such field; did you mean intensity_max?",
        ),
        (
            {"inputs": {"it": {"kind": "points", "member": "b", "view0": "full"}}},
            "inputs.it.view0: no such field; known: kind, member, format, columns",
        ),
        (
            {"inputs": {"image": {**IMAGE, "kind": "imgae"}}},
            "inputs.image: no such kind: 'imgae'; did you mean image?",
        ),
        ({"inputs": {"image": {"member": "j"}}}, "inputs.image: kind is missing"),
        (
            {"inputs": {"image": {"kind": "image"}}},
            "inputs.image.member: missing, it must",
        ),
        (
            teacher(outputs={"patch": {"fron": "x"}}),
            "teachers.net.outputs.patch.fron: no such field; did you mean from?",
        ),
        (
            teacher(outputs={"patch": {"encoding": "losless"}}),
            "teachers.net.outputs.patch.encoding: must be 'raw', 'lossless', 'half', "
            "'compact', 'tiny' or 'topk'; did you mean lossless? (got 'losless')",
        ),
        (
            teacher(preprocess={"chanels": "bgr"}),
            "net.preprocess.chanels: no such field",
        ),
        (teacher(sizes=[[32]]), "teachers.net.sizes.0.1: missing"),
        (
            teacher(sizes=[[32, 1.5]]),
            "teachers.net.sizes.0.1: input should be a valid int",
        ),
        (teacher(sizes=[]), "teachers.net.sizes: "),
        (
            teacher(batch=0),
            "teachers.net.batch: input should be greater than or equal to 1",
        ),
        (
            teacher(outputs={}),
            "teachers.net.outputs: dictionary should have at least 1",
        ),
        (
            teacher(on=3),
            "teachers.net.on: input should be a valid list or input should be ",
        ),
        (teacher(model="resnet50"), "teachers.net.model: must be FAMILY:NAME"),
        (
            teacher(model="module:net.py"),
            "teachers.net.model: must be module:FILE.py:CLASS",
        ),
        (
            {"dataset": {"shards": 5}},
            "dataset.shards: input should be a valid string or",
        ),
        ({"dataset": None}, "dataset: "),
        (
            {"limits": {"max_bytes": "1.2 XB"}},
            "limits.max_bytes: must be a size like '64 M",
        ),
        (
            {"limits": {"max_bytes": "1.2.3 GB"}},
            "limits.max_bytes: must be a size like",
        ),
        ({"limits": {"max_eur": 3}}, "limits.max_eur: no such field"),
    ],
)
def test_a_wrong_field_is_named_with_its_whole_path(tmp_path, fields, message):
    found = refused(tmp_path, **fields)
    assert found.startswith(f"{tmp_path}/job.yaml: ")
    assert message in found


def test_every_wrong_field_is_named(tmp_path):
    found = refused(tmp_path, **teacher(bacth=1, batch="x"), viewz={}, bank=None)
    for path in ("teachers.net.bacth", "teachers.net.batch", "viewz", "bank"):
        assert f"{path}: " in found
    assert found.count("job.yaml") == 1


def test_a_missing_field(tmp_path):
    text = yaml.safe_dump({k: v for k, v in MINIMAL.items() if k != "bank"})
    assert "bank: missing, it must be given" in refused(tmp_path, text=text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bank: [1\nteachers: {}\n", "job.yaml line 2: not YAML: "),
        ("bank: ./b\nbank: ./c\n", "job.yaml line 2: not YAML: bank is given twice"),
        ("a: {x: 1,\n x: 2}\n", "job.yaml line 2: not YAML: x is given twice"),
        ("- a\n- b\n", "must be a mapping of fields, got list"),
        ("", "must be a mapping of fields, got nothing"),
        (
            "a: !!python/object/apply:os.getcwd []\n",
            "line 1: not YAML: could not determ",
        ),
        ("a: \x07\n", "not YAML: "),
    ],
)
def test_what_is_not_a_yaml_mapping(tmp_path, text, message):
    assert message in refused(tmp_path, text=text)


def test_bytes_that_are_not_text(tmp_path):
    (tmp_path / "job.yaml").write_bytes(b"bank: \xff\xfe\x00")
    with pytest.raises(ManifestError, match="not YAML"):
        load_job(str(tmp_path / "job.yaml"))


def test_words_stay_words_and_numbers_are_numbers(tmp_path):
    """YAML 1.1 reads `on` as true, 1e-4 as text and 1:30 as ninety."""
    text = """
    bank: ./b
    dataset: {shards: a.tar, license: 2024-01-01}
    inputs: {no: {kind: image, member: jpg}}
    views: {random: 1, scale: [4e-1, 1], flip: true}
    teachers:
      net: {model: timm:test_vit, on: [no], args: {time: 1:30}, outputs: {cls: {}}}
    """
    job = load_job(write(tmp_path, text), ["teachers.net.license=on"])
    assert job.teachers["net"].on == ["no"]
    assert job.teachers["net"].args == {"time": "1:30"}
    assert job.teachers["net"].license == "on"
    assert job.views.scale == (0.4, 1.0)
    assert job.views.flip is True
    assert job.dataset.license == "2024-01-01"


def test_anchors_and_merges(tmp_path):
    text = """
    bank: ./b
    dataset: {shards: a.tar}
    inputs: {image: &image {kind: image, member: jpg}, more: {<<: *image, member: png}}
    teachers: {net: {model: timm:test_vit, outputs: {cls: {}}}}
    """
    inputs = load_job(write(tmp_path, text)).inputs
    assert [one.member for one in inputs.values()] == ["jpg", "png"]


def test_canonical_json_is_one_text_for_one_value():
    assert canonical_json({"b": 1, "a": [1.5, None]}) == '{"a":[1.5,null],"b":1}'
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"a": float("nan")})


def test_json_documents(tmp_path):
    job = load_job(write(tmp_path))
    again = load_json(Job, job.model_dump_json(by_alias=True).encode(), "x.json")
    assert again == job
    with pytest.raises(ManifestError, match=r"x\.json: not JSON"):
        load_json(Job, b"{", "x.json")
    with pytest.raises(ManifestError, match=r"x\.json: must be a JSON object"):
        load_json(Job, b"[]", "x.json")
    with pytest.raises(ManifestError, match=r"x\.json: not JSON"):
        load_json(Job, b"[" * 100_000, "x.json")


def test_a_classifiers_path_starts_at_the_yaml(tmp_path):
    outputs = {
        "embed": {},
        "logits": {"classifier": "./zero/z.safetensors", "topk": 2},
    }
    job = load_job(write(tmp_path, **teacher(outputs=outputs)))
    logits = job.teachers["net"].outputs["logits"]
    assert logits.classifier == str(tmp_path / "zero" / "z.safetensors")
    assert logits.topk == 2
    assert job.teachers["net"].outputs["embed"].classifier is None
    outputs["logits"] = {"classifier": "gs://acme/z.safetensors"}
    job = load_job(write(tmp_path, **teacher(outputs=outputs)))
    found = job.teachers["net"].outputs["logits"].classifier
    assert found == "gs://acme/z.safetensors"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"^(a": ""}, r"teachers.net.keys: must be a regular expression"),
        ({"^a": r"\1"}, "invalid group reference"),
        ({"^(?P<n>a)": r"\g<m>"}, "unknown group name"),
    ],
)
def test_bad_expressions_are_refused_when_the_job_is_read(tmp_path, keys, message):
    assert message in refused(tmp_path, **teacher(keys=keys))


def test_good_expressions_are_kept_in_order(tmp_path):
    keys = {"^z": None, r"^a\.(\d)": r"b.\1", "^m": ""}
    # PyYAML sorts what it writes; JSON is YAML.
    text = json.dumps({**MINIMAL, **teacher(keys=keys)})
    job = load_job(write(tmp_path, text))
    assert list(job.teachers["net"].keys.items()) == list(keys.items())
