"""A document's own crc32c: every wrong bit is found, and none is asked for."""

from __future__ import annotations

import json

import pytest
from crc32c import crc32c

from manifests.errors import ManifestError
from manifests.own_checksum import parse_checked, with_own_checksum

DOCUMENT = {"name": "a", "rows": 18, "nested": {"crc32c": "x"}, "share": 0.5}
LAYOUTS = [None, 1]


@pytest.mark.parametrize("indent", LAYOUTS)
def test_it_is_of_all_bytes_before_it(indent):
    text = with_own_checksum(json.dumps(DOCUMENT, indent=indent).encode())
    body, _, rest = text.rpartition(b",")
    assert json.loads(text) == {**DOCUMENT, "crc32c": f"{crc32c(body):08x}"}
    assert b"crc32c" in rest
    assert parse_checked(text, "here") == DOCUMENT


@pytest.mark.parametrize("indent", LAYOUTS)
def test_every_wrong_bit_is_found(indent):
    text = with_own_checksum(json.dumps(DOCUMENT, indent=indent).encode())
    for byte in range(len(text)):
        for bit in range(8):
            wrong = bytearray(text)
            wrong[byte] ^= 1 << bit
            with pytest.raises(ManifestError, match="here"):
                parse_checked(bytes(wrong), "here")


@pytest.mark.parametrize("indent", LAYOUTS)
def test_every_cut_is_found(indent):
    text = with_own_checksum(json.dumps(DOCUMENT, indent=indent).encode()).rstrip()
    for size in range(len(text)):
        with pytest.raises(ManifestError, match="here"):
            parse_checked(text[:size], "here")


def test_a_document_without_one_is_read():
    assert parse_checked(json.dumps(DOCUMENT).encode(), "here") == DOCUMENT


def test_an_edit_says_how_to_go_on():
    text = with_own_checksum(json.dumps(DOCUMENT).encode()).replace(b"18", b"19")
    with pytest.raises(ManifestError, match=r"own crc32c.*remove its field `crc32c`"):
        parse_checked(text, "here")
