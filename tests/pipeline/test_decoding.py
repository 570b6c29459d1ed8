"""One sample decoded: values where it is sound, a reason where it is not."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from manifests.bank import InputEntry
from manifests.errors import ManifestError
from pipeline.decoding import SampleSchema, decode_sample
from pipeline.samples.points import Sweep
from pipeline.samples.shards import Sample
from tests.conftest import jpeg, sweep

CAMERA = {
    "kind": "image",
    "member": ["PNG", "jpg"],
    "calibration": "cam",
    "timestamp": "cam.time",
}
LIDAR = {
    "kind": "points",
    "member": "bin",
    "intensity_max": 2.0,
    "timestamp": "lidar.0",
}
META = {
    "cam": {
        "intrinsics": [[9.0, 0, 4], [0, 9.0, 3], [0, 0, 1]],
        "lidar2cam": np.eye(4).tolist(),
        "time": 12.5,
    },
    "lidar": [12],
    "weather": {"rain": 0.25},
}


@pytest.fixture
def schema() -> SampleSchema:
    return SampleSchema.of(
        {
            "cam": InputEntry(config=CAMERA, metadata="JSON", view0="full"),
            "lidar": InputEntry(config=LIDAR, metadata="JSON"),
        },
        {
            "class": {"member": "cls", "num_classes": 5},
            "rain": {"member": "json", "path": "weather.rain"},
        },
    )


def members(**changes: bytes | None) -> Sample:
    found = {
        "jpg": jpeg(1, height=20, width=30),
        "bin": sweep(1, points=7),
        "cls": b"3",
        "json": json.dumps(META).encode(),
    }
    found |= changes
    return Sample("k", {name: data for name, data in found.items() if data}, {})


def test_what_is_read(schema):
    assert schema.wanted == {"png", "jpg", "bin", "cls", "json"}


def test_a_sound_sample(schema):
    found = decode_sample(members(), schema)
    assert isinstance(found.values["cam"], Image.Image)
    expected = np.frombuffer(sweep(1, points=7), "<f4").reshape(7, 4).copy()
    expected[:, 3] /= 2
    decoded = found.values["lidar"]
    assert isinstance(decoded, Sweep)
    np.testing.assert_array_equal(decoded.points, expected)
    facts = found.facts
    assert facts.reasons == facts.label_reasons == {}
    assert facts.calibration_reasons == facts.time_reasons == {}
    assert facts.times == {"cam": 12.5, "lidar": 12.0}
    assert facts.dropped == {"lidar": 0}
    assert facts.sizes == {"cam": (20, 30)}
    assert facts.points == {"lidar": 7}
    assert facts.labels == {"class": 3, "rain": 0.25}
    np.testing.assert_array_equal(facts.intrinsics["cam"], META["cam"]["intrinsics"])
    np.testing.assert_array_equal(facts.lidar2cam["cam"], np.eye(4))


def test_dropped_points_are_counted(schema):
    rows = np.frombuffer(sweep(1, points=7), "<f4").reshape(7, 4).copy()
    rows[[0, 4], 1] = np.nan
    facts = decode_sample(members(bin=rows.tobytes()), schema).facts
    assert (facts.points, facts.dropped) == ({"lidar": 5}, {"lidar": 2})
    rows[:] = np.nan
    facts = decode_sample(members(bin=rows.tobytes()), schema).facts
    assert (facts.points, facts.dropped) == ({}, {})
    assert facts.reasons == {"lidar": "not_finite: the sweep has no finite point"}


@pytest.mark.parametrize(
    ("lidar", "reason"),
    [
        (None, "missing: the metadata has no 'lidar.0' (at 'lidar')"),
        (["12"], "not_a_number: '12' is no time"),
        ([1.5e18], "out_of_range: a time of 1.5e+18 s; it must be in seconds"),
    ],
)
def test_a_time_that_is_not_known_is_no_fault_of_the_row(schema, lidar, reason):
    meta = {**META, "lidar": lidar} if lidar else {"cam": META["cam"]}
    found = decode_sample(members(json=json.dumps(meta).encode()), schema)
    assert found.facts.reasons == found.facts.calibration_reasons == {}
    assert found.facts.time_reasons == {"lidar": reason}
    assert found.facts.times == {"cam": 12.5}
    assert set(found.values) == {"cam", "lidar"}


def test_calibration_and_times_need_no_image(schema):
    facts = decode_sample(members(jpg=None), schema).facts
    assert list(facts.reasons) == ["cam"]
    np.testing.assert_array_equal(facts.lidar2cam["cam"], np.eye(4))
    assert facts.times == {"cam": 12.5, "lidar": 12.0}


def test_metadata_is_read_for_a_time_alone():
    timed = {"kind": "points", "member": "bin", "timestamp": "t"}
    for config, wanted in (
        (timed, {"bin", "meta"}),
        (LIDAR | {"timestamp": None}, {"bin"}),
    ):
        schema = SampleSchema.of({"l": InputEntry(config=config, metadata="META")}, {})
        assert schema.wanted == wanted


def test_a_format_that_this_machine_cannot_read_stops_it():
    config = {"kind": "points", "member": "las"}
    with pytest.raises(ManifestError, match=r"inputs.l.format must be given .*'las'"):
        SampleSchema.of({"l": InputEntry(config=config)}, {})


def test_the_first_member_of_several_is_taken(schema):
    sink = io.BytesIO()
    Image.new("RGB", (5, 4)).save(sink, "PNG")
    found = decode_sample(members(png=sink.getvalue()), schema)
    assert found.facts.sizes == {"cam": (4, 5)}


def test_the_upright_size_is_recorded(schema):
    image = Image.new("RGB", (30, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    sink = io.BytesIO()
    image.save(sink, "JPEG", exif=exif)
    found = decode_sample(members(jpg=sink.getvalue()), schema)
    assert found.facts.sizes == {"cam": (30, 20)}


@pytest.mark.parametrize(
    ("changes", "name", "reason"),
    [
        ({"jpg": None}, "cam", "missing: no member .png or .jpg"),
        ({"jpg": b"nonsense"}, "cam", "undecodable: "),
        ({"bin": None}, "lidar", "missing: no member .bin"),
        ({"bin": sweep(1)[:-3]}, "lidar", "bad_size: "),
    ],
)
def test_a_fault_of_one_input_leaves_the_others(schema, changes, name, reason):
    found = decode_sample(members(**changes), schema)
    assert list(found.facts.reasons) == [name]
    assert found.facts.reasons[name].startswith(reason)
    assert set(found.values) == {"cam", "lidar"} - {name}
    assert found.facts.labels == {"class": 3, "rain": 0.25}


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"cls": b"9"}, "class"),
        ({"cls": b"x"}, "class"),
        ({"cls": None}, "class"),
        ({"json": json.dumps({**META, "weather": {}}).encode()}, "rain"),
    ],
)
def test_a_broken_label_leaves_the_inputs(schema, changes, label):
    found = decode_sample(members(**changes), schema)
    assert list(found.facts.label_reasons) == [label]
    assert found.facts.reasons == {}
    assert set(found.values) == {"cam", "lidar"}


@pytest.mark.parametrize("data", [None, b"{", b"[]", b'{"cam": {"intrinsics": 3}}'])
def test_broken_calibration_leaves_the_image(schema, data):
    found = decode_sample(members(json=data), schema)
    assert list(found.facts.calibration_reasons) == ["cam"]
    assert list(found.facts.time_reasons) == ["cam", "lidar"]
    assert "cam" in found.values
    assert found.facts.intrinsics == {}


def test_why_a_member_was_not_read_is_the_reason(schema):
    sample = Sample("k", {"bin": sweep(1)}, {"jpg": "link: never followed"})
    found = decode_sample(sample, schema)
    assert found.facts.reasons["cam"] == "link: never followed"


def test_a_refused_row_has_nothing_but_its_reason(schema):
    found = decode_sample(members(), schema, refused="duplicate_key: .jpg again")
    assert found.values == {}
    assert found.facts.reasons == dict.fromkeys(
        ("cam", "lidar"), "duplicate_key: .jpg again"
    )
    assert set(found.facts.label_reasons) == {"class", "rain"}
    assert found.facts.labels == {}
