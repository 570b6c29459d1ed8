"""The job's own rules: those that need no file, no model and no network."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from manifests import bank, dataset, job
from manifests.document import parse_bytes
from manifests.inputs import LabelConfig
from manifests.job import Job
from manifests.teacher import OutputConfig
from manifests.views import ViewsConfig

NET = {"model": "timm:test_vit", "outputs": {"cls": {}}}
IMAGE = {"kind": "image", "member": "jpg"}


def make(**fields: object) -> Job:
    data = {
        "bank": "b",
        "dataset": {"shards": "a.tar"},
        "inputs": {"image": IMAGE},
        "teachers": {"net": NET},
        **fields,
    }
    return Job.model_validate(data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (2000, 2000),
        ("2000", 2000),
        ("64 MiB", 64 * 2**20),
        ("1.2 TB", 1_200_000_000_000),
        ("1.5kb", 1500),
        (" 3 GiB ", 3 * 2**30),
        ("1 PB", 10**15),
        ("12 B", 12),
    ],
)
def test_sizes_in_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text", ["", "MB", "1.2.3 MB", "-1 MB", "1 MBs", "1e3", ". MB"]
)
def test_what_is_no_size(text):
    with pytest.raises(
        ValueError, match=r"must be a size like '64 MiB' or '1.2 TB', got"
    ):
        parse_bytes(text)


@pytest.mark.parametrize(
    "name", ["Image", "1st", "a-b", "a.b", "", "views", "key", "rows"]
)
@pytest.mark.parametrize("where", ["inputs", "labels", "teachers"])
def test_names_that_cannot_name_a_group(name, where):
    value = {"inputs": IMAGE, "labels": {"member": "cls"}, "teachers": NET}[where]
    with pytest.raises(
        ValidationError, match=r"must be lower-case letters, digits and _"
    ):
        make(**{where: {name: value}})


def test_a_job_has_an_input_and_a_teacher():
    for where in ("inputs", "teachers"):
        with pytest.raises(ValidationError, match="at least 1 item"):
            make(**{where: {}})


def test_calibration_needs_metadata():
    inputs = {"cam": {**IMAGE, "calibration": "cameras.FRONT"}}
    with pytest.raises(
        ValidationError, match=r"inputs.cam.calibration needs `metadata: "
    ):
        make(inputs=inputs)
    assert make(inputs=inputs, metadata="json").inputs["cam"].calibration


@pytest.mark.parametrize("kind", ["image", "points"])
def test_times_need_metadata(kind):
    inputs = {"one": {"kind": kind, "member": "bin", "timestamp": "t"}}
    with pytest.raises(
        ValidationError, match=r"inputs.one.timestamp needs `metadata: "
    ):
        make(inputs=inputs)
    assert make(inputs=inputs, metadata="json").inputs["one"].timestamp == "t"


def test_points_have_x_y_and_z_once():
    for columns in (["x", "y"], ["x", "y", "z", "x"], []):
        with pytest.raises(ValidationError, match="must hold x, y, z once each"):
            make(
                inputs={"lidar": {"kind": "points", "member": "b", "columns": columns}}
            )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scale": [0.5, 0.2]}, "must be 0 < low <= high"),
        ({"scale": [0, 0.2]}, "must be 0 < low <= high"),
        ({"scale": [0.5, 1.5]}, r"must be at most 1 \(the whole box\)"),
        ({"ratio": [2, 1]}, "must be 0 < low <= high"),
        ({"yaw_deg": 200}, "less than or equal to 180"),
        ({"random": -1}, "greater than or equal to 0"),
    ],
)
def test_views_that_cannot_be_drawn(fields, message):
    with pytest.raises(ValidationError, match=message):
        ViewsConfig.model_validate(fields)


def test_a_single_input_is_flipped_by_default():
    two = {"image": IMAGE, "more": IMAGE}
    assert make().flips
    assert not make(inputs=two).flips
    assert make(inputs=two, views={"flip": True}).flips
    assert not make(views={"flip": False}).flips


def test_topk_and_its_encoding_go_together():
    assert OutputConfig.model_validate({"topk": 5}).encoding == "topk"
    for fields in ({"encoding": "topk"}, {"topk": 5, "encoding": "raw"}):
        with pytest.raises(ValidationError, match="go together"):
            OutputConfig.model_validate(fields)
    for temperatures in ([], [0], [-1.0]):
        with pytest.raises(ValidationError, match="list of positive numbers"):
            OutputConfig.model_validate({"topk": 5, "temperatures": temperatures})


def test_from_is_the_source():
    config = OutputConfig.model_validate({"from": "encoder[2]"})
    assert config.source == "encoder[2]"
    assert config.model_dump(by_alias=True)["from"] == "encoder[2]"


def test_models_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        make().bank = "c"


def models() -> list[type[BaseModel]]:
    found = [
        value
        for module in (job, bank, dataset)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, job.Strict)
    ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("model", models(), ids=lambda model: model.__name__)
def test_every_document_refuses_what_it_does_not_know(model):
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["frozen"]
    assert model.__doc__


@pytest.mark.parametrize(
    "model", [m for m in models() if m.__module__ == "manifests.job"]
)
def test_every_field_of_a_job_is_described(model):
    plain = {
        "kind",
        "dataset",
        "inputs",
        "labels",
        "views",
        "teachers",
        "limits",
        "engine",
    }
    for name, field in model.model_fields.items():
        assert field.description or name in plain, f"{model.__name__}.{name}"


def test_labels_are_classes_or_numbers():
    assert LabelConfig(member="cls").num_classes is None
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        LabelConfig(member="cls", num_classes=0)
