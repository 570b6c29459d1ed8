"""Key maps: renaming a checkpoint's parameters, and the line a report suggests."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from teachers.errors import TeacherError
from teachers.key_maps import explain_difference, map_keys, suggest_keys, written
from teachers.weights import load_strict


def state_of(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.full((1,), float(k)) for k, name in enumerate(names)}


def test_rules_run_in_order_each_on_what_the_ones_before_made() -> None:
    state = state_of("module.a.w", "module.b.w", "ema.a.w")
    keys = {r"^ema\.": None, r"^module\.": "", r"^(\w)\.w$": r"net.\1.weight"}
    found = map_keys(state, keys, "teachers.t")
    assert list(found) == ["net.a.weight", "net.b.weight"]
    assert found["net.b.weight"] is state["module.b.w"]


def test_no_rules_change_nothing() -> None:
    state = state_of("a", "b")
    assert map_keys(state, {}, "teachers.t") == state


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"^c": ""}, r"teachers\.t\.keys must match .* '\^c' .* \(a\.w, b\.w\)"),
        (
            {r"^[ab]\.": ""},
            r"keys must keep names apart, got 'w' for both 'a\.w' and 'b\.w'",
        ),
        ({"^a": None, r"^a\.": ""}, r"1 names of which it matches none \(b\.w\)"),
    ],
)
def test_rules_that_are_refused(keys: dict[str, str | None], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        map_keys(state_of("a.w", "b.w"), keys, "teachers.t")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(4)
        self.attn = nn.Linear(4, 12)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 2, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(4)


def suggested(error: TeacherError) -> dict[str, str | None]:
    """The ``keys:`` of a message, read as the YAML that a user would paste."""
    line = re.search(r"`(keys: \{.*?\})`", str(error))
    assert line is not None, str(error)
    keys: dict[str, str | None] = yaml.safe_load(line[1])["keys"]
    return keys


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


FOREIGN = {
    "decode_head.conv.weight": torch.zeros(2),
    "decode_head.bn.weight": torch.zeros(2),
}


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (lambda own: prefixed(own, "backbone."), {r"^backbone\.": ""}),
        (lambda own: prefixed(own, "module.encoder."), {r"^module\.encoder\.": ""}),
        (
            lambda own: prefixed(own, "encoder.") | FOREIGN,
            {r"^encoder\.": "", r"^decode_head\.": None},
        ),
        (lambda own: own | FOREIGN, {r"^decode_head\.": None}),
        (
            lambda own: {k.replace(".attn.", ".attention."): v for k, v in own.items()},
            {r"\.attention\.": ".attn."},
        ),
        (
            lambda own: prefixed(
                {k.replace(".mlp.", ".ffn."): v for k, v in own.items()}, "model.net."
            ),
            {r"^model\.net\.": "", r"\.ffn\.": ".mlp."},
        ),
        (
            # Equal shapes: known by name alone, and not to be mixed up.
            lambda own: {
                re.sub(
                    r"(norm\d?)\.(\w+)$",
                    lambda m: f"{m[1]}.{'gamma' if m[2] == 'weight' else 'beta'}",
                    k,
                ): v
                for k, v in own.items()
            },
            {r"\.beta$": ".bias", r"\.gamma$": ".weight"},
        ),
    ],
)
def test_the_suggested_line_loads_the_checkpoint(change, keys) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(3)
    source, model = Encoder(), Encoder()
    state = change(source.state_dict())
    with pytest.raises(TeacherError) as raised:
        load_strict(model, state, "w.pt")
    found = suggested(raised.value)
    assert found == keys
    load_strict(model, map_keys(state, found, "teachers.t"), "w.pt")
    for name, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_missing_prefix_is_suggested() -> None:
    model = nn.ModuleDict({"backbone": Encoder()})
    with pytest.raises(TeacherError) as raised:
        load_strict(model, Encoder().state_dict(), "w.pt")
    assert suggested(raised.value) == {"^": "backbone."}


@pytest.mark.parametrize(
    "given",
    [
        # A student and its teacher, both whole: which one is meant is not ours to say.
        {"student.a": (3,), "student.b": (4,), "teacher.a": (3,), "teacher.b": (4,)},
        {"x.gain": (3,), "x.shift": (4,)},
    ],
)
def test_nothing_is_suggested_where_it_could_be_wrong(given) -> None:  # type: ignore[no-untyped-def]
    assert suggest_keys({"a": (3,), "b": (4,)}, given) == {}


def test_two_of_one_shape_are_not_told_apart() -> None:
    wanted = {"n.alpha": (3,), "n.omega": (3,)}
    assert suggest_keys(wanted, {"n.first": (3,), "n.second": (3,)}) == {}


def test_a_head_of_its_own_is_left_out_whole_or_not_at_all() -> None:
    wanted = {"a.w": (3,), "head.w": (4,)}
    assert suggest_keys(wanted, wanted | {"head.more": (1,)}) == {}


def test_shapes_stand_side_by_side_and_transposed_ones_are_named() -> None:
    model = nn.Linear(5, 3)
    state = {"weight": torch.zeros(5, 3), "bias": torch.zeros(9)}
    with pytest.raises(TeacherError) as raised:
        load_strict(model, state, "w.pt")
    assert (
        "2 of another shape (weight (5, 3) for (3, 5), transposed, bias (9,) for (3,))"
        in str(raised.value)
    )


def test_what_still_differs_after_a_rename_is_counted() -> None:
    wanted = {"a.w": (3,), "b.w": (4,), "head.w": (10, 4)}
    given = {"net.a.w": (3,), "net.b.w": (4,), "net.head.w": (7, 4)}
    text = explain_difference(wanted, given, "w.pt")
    assert text is not None
    assert r"with `keys: {'^net\.': ''}` 2 of the model's 3 fit; the others" in text


def test_equal_names_and_shapes_do_not_differ() -> None:
    assert explain_difference({"a": (1,)}, {"a": (1,)}, "w.pt") is None


NAMES = st.lists(
    st.text("abcx._", min_size=1, max_size=6).map(lambda text: f"{text}.w"),
    min_size=1,
    max_size=8,
    unique=True,
)


@given(NAMES, st.sampled_from(["backbone.", "module.net.", "x."]))
def test_what_is_suggested_is_yaml_and_never_joins_names(
    names: list[str], prefix: str
) -> None:
    wanted = {name: (number + 1,) for number, name in enumerate(names)}
    given = {f"{prefix}{name}": shape for name, shape in wanted.items()}
    rules = suggest_keys(wanted, given)
    assert yaml.safe_load(written(rules)) == {"keys": rules}
    if rules:
        state = {name: torch.zeros(shape) for name, shape in given.items()}
        renamed = map_keys(state, rules, "teachers.t")
        fitting = [n for n in wanted if n in renamed and renamed[n].shape == wanted[n]]
        assert len(fitting) > len(wanted) / 2
