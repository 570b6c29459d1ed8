"""Several people grow one bank, each by a job file of their own: at once, or in turn.

What is there keeps its digest, whoever adds what; and what two people's jobs contradict
each other in is refused by name, to the one who comes second.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import pytest

from manifests.loading import load_job
from pipeline.bank.record import open_record
from pipeline.bank.verify import verify
from pipeline.precompute import precompute
from tests.conftest import write_job, write_shards

NET = {
    "model": "module:./nets.py:Net",
    "weights": "random:1",
    "sizes": [[16, 16]],
    "batch": 4,
    "outputs": {"logits": {}},
}
MORE = {"patch": {"from": "body"}}
OTHER = {"other": {**NET, "weights": "random:7"}}


def digests(bank: Path, commits: bool = True) -> dict[str, str]:
    """sha256 of every feature object, and of every commit and row object if asked."""
    found = [*bank.glob("features.zarr/*/*/*/*/c.*")]
    if commits:
        found += [*bank.glob("rows/*/*"), *bank.glob("commits/*/*.json")]
        found += bank.glob("dataset/*")
    return {
        str(path.relative_to(bank)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(found)
        if not {"stats", "valid"} & set(path.parts)
    }


def check_kept(bank: Path, before: dict[str, str]) -> None:
    after = digests(bank)
    assert len(before) > 5
    assert {path: after.get(path) for path in before} == before
    # A job may leave others' teachers lacking on its new shards; damage is none.
    assert not verify(*open_record(str(bank)), full=True).problems


class People:
    """A bank of two shards, and people with folders and copies of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bank = folder / "bank"
        self.data = write_shards(folder, [7, 4])[0].parent
        self.job = self.write("maker", teachers={"net": NET})

    def write(self, person: str, **fields: object) -> Path:
        """Writes a person's job beside a copy of the data that only they see."""
        home = self.folder / person
        if not home.exists():
            shutil.copytree(self.data, home / "data")
        return write_job(home, bank="../bank", block_rows=4, **fields)

    def add_shard(self, person: str) -> None:
        write_shards(self.folder / person, [5], first=2)


@pytest.fixture
def people(tmp_path: Path) -> People:
    found = People(tmp_path)
    assert precompute(load_job(str(found.job)), quiet=True).is_whole
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Feature objects of a bank that one person made in one go, with everything."""
    people = People(tmp_path_factory.mktemp("alone"))
    people.write("maker")
    people.add_shard("maker")
    net = {**NET, "sizes": [[16, 16], [24, 24]], "outputs": {**NET["outputs"], **MORE}}
    job = people.write("maker", teachers={"net": net, **OTHER}, views={"random": 1})
    assert precompute(load_job(str(job)), quiet=True).is_whole
    return digests(people.bank, commits=False)


def test_two_teachers_at_once_by_two_people(people, forked, alone):
    before = digests(people.bank)
    jobs = [
        people.write("ann", teachers=OTHER),
        people.write("bob", teachers={"net": {**NET, "sizes": [[16, 16], [24, 24]]}}),
    ]
    commands = [["precompute", job, "--quiet"] for job in jobs]
    # Whoever ends first may find the other's teacher not done yet.
    for answer in forked.run(*commands):
        assert answer["code"] in (0, 1), answer["output"]
    for command in commands:
        answer = forked.run(command)
        assert answer["code"] == 0, answer["output"]
    check_kept(people.bank, before)
    made = digests(people.bank, commits=False)
    assert {path: alone[path] for path in made} == made
    _, record = open_record(str(people.bank))
    assert {entry.id for entry in record.passes} >= {"net.image", "other.image"}
    assert record.state.complete


def test_a_teacher_and_shards_at_once(people, forked, alone):
    """The one's teacher is due on the other's shards as well."""
    before = digests(people.bank)
    ann = people.write("ann", teachers=OTHER)
    bob = people.write("bob", teachers={"net": NET})
    people.add_shard("bob")
    commands = [["precompute", job, "--quiet"] for job in (ann, bob)]
    for answer in forked.run(*commands):
        assert answer["code"] in (0, 1), answer["output"]
    # Ann has not the new shard, so who has it finishes her teacher too.
    both = people.write("bob", teachers={"net": NET, **OTHER})
    answer = forked.run(["precompute", both, "--quiet"])
    assert answer["code"] == 0, answer["output"]
    check_kept(people.bank, before)
    made = digests(people.bank, commits=False)
    assert {path: alone[path] for path in made} == made
    _, record = open_record(str(people.bank))
    assert record.state.complete
    assert record.state.rows == 16


def test_one_name_for_two_teachers_at_once(people, forked):
    second = {"weights": "random:8"}
    before = digests(people.bank)
    ann = people.write("ann", teachers=OTHER)
    bob = people.write("bob", teachers={"other": {**OTHER["other"], **second}})
    commands = [["precompute", job, "--quiet"] for job in (ann, bob)]
    answers = forked.run(*commands)
    codes = [answer["code"] for answer in answers]
    assert sorted(codes) == [0, 2], [answer["output"] for answer in answers]
    said = answers[codes.index(2)]["output"]
    assert "other" in said
    assert re.search(r"weights: .*'seed': [78].* in the bank", said), said
    check_kept(people.bank, before)
    # The loser may take another name.
    bob = people.write("bob", teachers={"others": {**OTHER["other"], **second}})
    answer = forked.run(["precompute", bob, "--quiet"])
    assert answer["code"] == 0, answer["output"]
    check_kept(people.bank, before)


STEPS = {
    "shard": {"teachers": {"net": NET}},
    "view": {"teachers": {"net": NET}, "views": {"random": 1}},
    "size": {"teachers": {"net": {**NET, "sizes": [[16, 16], [24, 24]]}}},
    "output": {"teachers": {"net": {**NET, "outputs": {**NET["outputs"], **MORE}}}},
    "teacher": {"teachers": OTHER},
}


def test_each_adds_something_in_turn(people, alone):
    """It becomes the bank that one person made of all of it, in one go."""
    for number, (step, fields) in enumerate(STEPS.items()):
        before = digests(people.bank)
        job = people.write(f"person{number}", **fields)
        # Who comes after the new shard has it too.
        people.add_shard(f"person{number}")
        assert precompute(load_job(str(job)), quiet=True).is_whole
        check_kept(people.bank, before)
        assert digests(people.bank).keys() > before.keys(), step
    # What no step asked for together is asked for now; nothing else is computed.
    before = digests(people.bank)
    net = {**NET, "sizes": [[16, 16], [24, 24]], "outputs": {**NET["outputs"], **MORE}}
    job = people.write("last", teachers={"net": net, **OTHER}, views={"random": 1})
    people.add_shard("last")
    assert precompute(load_job(str(job)), quiet=True).is_whole
    check_kept(people.bank, before)
    assert verify(*open_record(str(people.bank)), full=True).is_sound
    assert digests(people.bank, commits=False) == alone
