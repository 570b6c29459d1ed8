"""YAML of strangers: few lines that stand for billions of values, or themselves."""

from __future__ import annotations

import pytest

from manifests.errors import ManifestError
from manifests.loading import load_job
from manifests.yaml_text import MAX_VALUES, apply_overrides, parse_yaml
from tests.fuzz.make_corpus import manifests


def laughs(levels: int) -> bytes:
    """Each level is nine times the one before it."""
    text = b"l0: &l0 [x, x, x]\n"
    for level in range(1, levels):
        aliases = b", ".join([b"*l%d" % (level - 1)] * 9)
        text += b"l%d: &l%d [%s]\n" % (level, level, aliases)
    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (laughs(9), f"more than {MAX_VALUES} values, aliases followed"),
        (b"a: &a [*a]", f"more than {MAX_VALUES} values, aliases followed"),
        (b"a: &a {b: *a}", f"more than {MAX_VALUES} values, aliases followed"),
        (b"a: " + b"[" * 2000 + b"]" * 2000, "nested too deep"),
        (b"{a: " * 2000 + b"1" + b"}" * 2000, "nested too deep"),
        (
            b"a: &a {x: 1}\nb: &b {<<: [%s]}\nc: {<<: [%s]}\n"
            % (b", ".join([b"*a"] * 900), b", ".join([b"*b"] * 900)),
            "more values than a document may hold",
        ),
    ],
)
def test_bombs_are_refused_before_they_are_walked(text, message):
    """Bounded in memory too: the corpus has them, under a limit."""
    with pytest.raises(ManifestError, match=message):
        parse_yaml(text, "job.yaml")


def test_aliases_within_reason_are_followed():
    found = parse_yaml(laughs(4) + b"again: *l3\n", "job.yaml")
    assert found["again"] == found["l3"]
    assert len(found["l3"]) == len(found["l3"][0]) == 9


def test_a_bomb_in_an_override_is_refused():
    with pytest.raises(ManifestError, match="the value is not YAML"):
        apply_overrides({}, ["a=" + "[" * 2000 + "]" * 2000])
    with pytest.raises(ManifestError, match="must be a place in a list of 1"):
        apply_overrides({"a": [1]}, ["a." + "9" * 5000 + "=1"])


@pytest.mark.parametrize(
    "name", ["job-many-keys.yaml", "job-long-word.yaml", "job-same-key.yaml"]
)
def test_an_error_is_a_line_that_can_be_read(tmp_path, name):
    path = tmp_path / "job.yaml"
    path.write_bytes(manifests()[name])
    with pytest.raises(ManifestError) as caught:
        load_job(str(path))
    assert len(str(caught.value)) < 4000
    if name == "job-many-keys.yaml":
        assert "k0: no such field" in str(caught.value)
        assert str(caught.value).endswith("more")
