"""Labels, metadata and dotted paths: every refusal has its reason."""

from __future__ import annotations

import pytest

from manifests.inputs import LabelConfig
from pipeline.samples.errors import SampleError
from pipeline.samples.labels import lookup, parse_label, parse_metadata


@pytest.mark.parametrize(
    ("member", "path", "num_classes", "expected"),
    [
        (b"7", None, 10, 7),
        (b" 7\n", None, 10, 7),
        (b"0", None, 1, 0),
        (b'{"a": {"class": 3}}', "a.class", 10, 3),
        (b'{"a": ["x", "3"]}', "a.1", 10, 3),
        (b"7", None, None, 7.0),
        (b"-2.5e-1\n", None, None, -0.25),
        (b'{"speed": 12.5}', "speed", None, 12.5),
        (b"", None, 10, "not_a_class"),
        (b"cat", None, 10, "not_a_class"),
        (b"7.0", None, 10, "not_a_class"),
        (b"1_0", None, 100, "not_a_class"),
        (b"\xff\xfe7", None, 10, "not_a_class"),
        ("٣".encode(), None, 10, "not_a_class"),
        (b"9" * 6000, None, 10, "not_a_class"),
        (b'{"c": true}', "c", 10, "not_a_class"),
        (b'{"c": 1.0}', "c", 10, "not_a_class"),
        (b'{"c": [1]}', "c", 10, "not_a_class"),
        (b"10", None, 10, "out_of_range"),
        (b"-1", None, 10, "out_of_range"),
        (b'{"c": 1e999}', "c", None, "out_of_range"),
        (b"nan", None, None, "out_of_range"),
        (b"cat", None, None, "not_a_number"),
        (b'{"c": null}', "c", None, "not_a_number"),
        (b'{"c": true}', "c", None, "not_a_number"),
        (b'{"broken": ', "c", 10, "bad_json"),
        (b"{}", "c", 10, "missing"),
    ],
)
def test_labels(
    member: bytes, path: str | None, num_classes: int | None, expected: object
) -> None:
    config = LabelConfig(member="cls", path=path, num_classes=num_classes)
    if isinstance(expected, str):
        with pytest.raises(SampleError) as raised:
            parse_label(member, config)
        assert raised.value.reason == expected
        assert len(raised.value.detail) < 250
    else:
        label = parse_label(member, config)
        assert label == expected
        assert type(label) is type(expected)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"\xff\xff",
        b'{"a": \xff}',
        b"[" * 100_000,
        b"9" * 5000,
        b" " * (16 * 2**20 + 1),
    ],
    ids=["empty", "open", "binary", "latin", "deep", "long number", "large"],
)
def test_bad_metadata(data: bytes) -> None:
    with pytest.raises(SampleError) as raised:
        parse_metadata(data)
    assert raised.value.reason == "bad_json"


def test_lookup() -> None:
    metadata = parse_metadata(b'{"cameras": {"CAM_FRONT": [1, {"x": null}]}}')
    assert lookup(metadata, "cameras.CAM_FRONT.1") == {"x": None}
    assert lookup(metadata, "cameras.CAM_FRONT.1.x") is None
    for path in ("cameras.CAM_BACK", "cameras.CAM_FRONT.2", "cameras.CAM_FRONT.-1", ""):
        with pytest.raises(SampleError, match="missing: the metadata has no"):
            lookup(metadata, path)
