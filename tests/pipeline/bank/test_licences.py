"""Licences: what is known of a name, and which of several restricts most."""

from __future__ import annotations

from itertools import permutations

import pytest

from pipeline.bank.licences import NOT_STATED, Restriction, find_licence, strictest


@pytest.mark.parametrize(
    ("text", "restriction"),
    [
        ("apache-2.0", Restriction.PERMISSIVE),
        ("MIT", Restriction.PERMISSIVE),
        ("cc-by-4.0", Restriction.ATTRIBUTION),
        ("cc-by-sa-3.0", Restriction.ATTRIBUTION),
        ("cc-by-nc-sa-4.0", Restriction.NON_COMMERCIAL),
        ("dinov3-license", Restriction.CUSTOM),
        ("unknown: see https://huggingface.co/x", Restriction.UNKNOWN),
        ("somebody's own, much like mit", Restriction.UNKNOWN),
        (
            "apache-2.0; trained on data under cc-by-nc-sa-4.0",
            Restriction.NON_COMMERCIAL,
        ),
        ("apache-2.0; something else", Restriction.UNKNOWN),
        (" ", Restriction.UNKNOWN),
        (None, Restriction.UNKNOWN),
    ],
)
def test_what_is_known(text, restriction):
    found = find_licence(text)
    assert found.restriction is restriction
    assert found.url.startswith("https://") == (restriction is not Restriction.UNKNOWN)
    assert found.name == ((text or "").strip() or NOT_STATED)


def test_the_order():
    names = ["mit", "cc-by-4.0", "cc-by-nc-4.0", "gemma", None]
    for some in permutations(names, 3):
        hardest = max(some, key=names.index)
        assert strictest(map(find_licence, some)) == find_licence(hardest)
