"""What a selection leaves of a record, without any bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.bank import BankRecord, OutputEntry, PassEntry, ShardEntry
from manifests.errors import BankError
from manifests.exported import Selection
from pipeline.bank.selection import select


def output(name: str, size: str = "16x16", kind: str = "grid") -> OutputEntry:
    return OutputEntry(
        name=name,
        size=size,
        kind=kind,
        shape=(2,),
        dtype="float32",
        definition={},
        encoding={},
        arrays=(),
    )


def entry(teacher: str, group: str, *outputs: OutputEntry, **fields) -> PassEntry:
    return PassEntry(
        **{
            "id": f"{teacher}.{group}" if group else teacher,
            "teacher": teacher,
            "group": group,
            "inputs": (group,),
            "outputs": outputs,
            "teacher_fingerprint": teacher,
            "fingerprint": f"{teacher}.{group}",
            **fields,
        }
    )


def shard(number: int, blocks: int, **fields) -> ShardEntry:
    return ShardEntry(
        **{
            "name": f"train-{number:02d}.tar",
            "url": "",
            "size_bytes": 1,
            "headers_sha256": str(number),
            "samples": 8 * blocks,
            "part": "part-00000",
            "first_block": 0,
            "blocks": blocks,
            **fields,
        }
    )


def table(*shards: ShardEntry) -> tuple[ShardEntry, ...]:
    """The shards one behind the other."""
    found, first = [], 0
    for one in shards:
        found.append(one.model_copy(update={"first_block": first}))
        first += one.blocks
    return tuple(found)


def record(**fields) -> BankRecord:
    passes = (
        entry("rows", ""),
        entry(
            "net",
            "front",
            output("cls", kind="vector"),
            output("patch"),
            output("patch", "32x32"),
            last_view=1,
        ),
        entry("net", "back", output("cls", kind="vector"), output("patch")),
        entry(
            "net", "front", output("cls"), id="net.front.2", first_view=2, last_view=3
        ),
        entry(
            "sweep",
            "lidar",
            output("points", "native", "points"),
            output("points_index", "native", "index"),
            output("bev", "native"),
        ),
    )
    given = {
        "created_by": "",
        "dataset": {},
        "job": {},
        "inputs": {},
        "labels": {},
        "views": {},
        "num_views": 4,
        "block_rows": 8,
        "shards": table(shard(0, 2), shard(1, 3)),
        "passes": passes,
        "requests": {
            "all": ("net.front", "net.front.2"),
            "front": ("net.front",),
            "back": ("net.back",),
            "sweep": ("sweep.lidar",),
        },
    }
    return BankRecord(**{**given, **fields})


def left(selection: Selection) -> dict[str, list[str]]:
    part = select(record(), selection)
    return {
        one.id: [f"{each.size}/{each.name}" for each in one.outputs]
        for one in part.record.passes
        if one.outputs
    }


def test_nothing_named_keeps_all():
    whole = record()
    part = select(whole, Selection())
    assert part.record == whole
    assert all(one.is_whole for one in part.passes)
    moved = {
        block.block: [piece.block for piece in block.pieces]
        for block in part.blocks(record().block_rows)
    }
    assert moved == {block: [block] for block in range(5)}
    assert part.keeps_rows_of(whole)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (
            {"outputs": ("patch",)},
            {"net.front": ["16x16/patch", "32x32/patch"], "net.back": ["16x16/patch"]},
        ),
        ({"outputs": ("net/*/32x32/*",)}, {"net.front": ["32x32/patch"]}),
        ({"groups": ("back",)}, {"net.back": ["16x16/cls", "16x16/patch"]}),
        (
            {"teachers": ("net",), "groups": ("front",), "outputs": ("cls",)},
            {"net.front": ["16x16/cls"], "net.front.2": ["16x16/cls"]},
        ),
        # Points would be of no use without the index that says which they are.
        (
            {"outputs": ("sweep/points",)},
            {"sweep.lidar": ["native/points", "native/points_index"]},
        ),
        ({"outputs": ("{bev,none}",)}, {"sweep.lidar": ["native/bev"]}),
    ],
)
def test_outputs_left(selection, expected):
    assert left(Selection(**selection)) == expected


def test_requests_stay_where_their_passes_are_whole():
    part = select(record(), Selection(groups=("front", "lidar"), num_views=2)).record
    assert set(part.requests) == {"front", "sweep"}
    assert [one.id for one in part.passes] == ["rows", "net.front", "sweep.lidar"]
    assert part.num_views == 2
    assert part.pass_by_id("net.front") == record().pass_by_id("net.front")


def test_a_pass_that_is_cut_twice_says_what_it_was():
    once = select(record(), Selection(outputs=("patch", "cls"), num_views=1)).record
    twice = select(once, Selection(outputs=("net/patch",))).record
    direct = select(record(), Selection(outputs=("net/patch",), num_views=1)).record
    assert twice.passes == direct.passes
    cut = twice.pass_by_id("net.front")
    assert (cut.first_view, cut.last_view) == (0, 0)
    assert cut.teacher_fingerprint == "net"
    assert cut.fingerprint not in (
        "net.front",
        once.pass_by_id("net.front").fingerprint,
    )
    assert cut.provenance["exported_from"] == {
        "fingerprint": "net.front",
        "outputs": ["16x16/cls", "16x16/patch", "32x32/patch"],
        "views": [0, 1],
    }


SHARDS = st.lists(
    st.tuples(st.integers(0, 4), st.booleans(), st.booleans(), st.integers(0, 2)),
    min_size=1,
    max_size=12,
)


@given(SHARDS)
def test_blocks_of_kept_shards_lie_without_holes_in_their_order(drawn):
    shards = [
        shard(number, blocks, retired=retired, part=f"part-{part:05d}")
        for number, (blocks, retired, _, part) in enumerate(drawn)
    ]
    whole = record(shards=table(*shards))
    wanted = tuple(
        one.name
        for one, (_, retired, keep, _) in zip(shards, drawn, strict=True)
        if keep and not retired
    )
    part = select(whole, Selection(shards=wanted))
    kept = [one for one in whole.shards if not one.retired]
    kept = [one for one in kept if not wanted or one.name in wanted]
    assert [one.name for one in part.record.shards] == [one.name for one in kept]
    blocks = list(part.blocks(whole.block_rows))
    assert [one.block for one in blocks] == list(range(part.record.num_blocks))
    new = [block for one in part.record.shards for block in one.block_numbers]
    assert [one.block for one in blocks] == new
    old = [block for one in kept for block in one.block_numbers]
    assert [piece.block for one in blocks for piece in one.pieces] == old
    assert all(piece.rows.tolist() == [*range(8)] for b in blocks for piece in b.pieces)
    # New shards lie in part number len(parts): none of the kept may be called so.
    parts = {one.part for one in part.record.shards}
    assert parts == {f"part-{number:05d}" for number in range(len(parts))}
    moved = {one.name: one.part for one in part.record.shards}
    assert all(part.dataset_parts[one.part] == moved[one.name] for one in kept)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (
            {"teachers": ("net", "nit")},
            r"teachers must be .* got 'nit'.*did you mean net",
        ),
        ({"outputs": ("net/front/patch",)}, "TEACHER/GROUP/SIZE/OUTPUT, got"),
        ({"outputs": ("bev",), "teachers": ("net",)}, "outputs must be in the bank"),
        ({"groups": ("lidar",), "teachers": ("net",)}, "must leave an output"),
        ({"shards": ("train-0{0..1}.tar", "x*")}, "shards must be in the bank, got 'x"),
        ({"num_views": 5}, "views must be in the bank, got 0 to 4"),
    ],
)
def test_what_is_not_there_is_refused_by_name(selection, message):
    with pytest.raises(BankError, match=message):
        select(record(), Selection(**selection))
