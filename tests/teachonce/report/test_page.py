"""The whole page: it parses, its pictures decode, nothing hostile or from outside."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from teachonce.report import write_report
from tests.conftest import write_job, write_shards
from tests.teachonce.report.conftest import HOSTILE, Made
from tests.teachonce.report.test_facts import PROBE

VOID = {"meta", "img", "br", "line", "image", "circle", "polyline"}


class Page(HTMLParser):
    """A page's tags, texts and pictures; open and closed tags must match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(self.text)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def written(made: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    found = write_report(
        path,
        made.open(),
        made.runs,
        PROBE,
        title="A <b>bank</b> & runs",
        rows=[0, 3, 9],
    )
    assert found == path
    return path.read_text(encoding="utf-8")


def test_the_page_parses_and_has_its_parts(written: str, made: Made) -> None:
    page = Page(written)
    sections = [one["id"] for one in page.of("section")]
    assert sections == ["bank", "scores", "runs", "rows", "sizes", "opening"]
    links = [one["href"] for one in page.of("a")]
    assert links == [f"#{name}" for name in sections]
    for text in (
        "A <b>bank</b> & runs",
        "11 in 2 shards",
        "image:truncated",
        "0.65 (pooled)",
        "random floor",
        "net/image/16x32/patch",
        "xr.open_datatree",
        "learning rate",
        "lidar from above",
        HOSTILE,
    ):
        assert text in page.words, text
    assert str(made.folder / "bank" / "features.zarr") in page.words


def test_the_commands_shown_run(written: str) -> None:
    page = Page(written)
    commands = [text for text in page.text if text.startswith(("import x", "from t"))]
    for command in commands:
        found: dict[str, Any] = {}
        exec(command, found)
        if "tree" in found:
            array = found["tree"]["net/image/16x32"]["patch"]
            assert array.shape == (12, 1, 4, 8, 16)
        else:
            assert found["bank"].record.num_rows == 12
    assert len(commands) == 2


def test_pictures_decode_and_are_told_to_those_who_do_not_see(written: str) -> None:
    page = Page(written)
    pictures = [one["src"] for one in page.of("img")]
    pictures += [one["href"] for one in page.of("image")]
    assert len(pictures) == 3 * 9
    for uri in pictures:
        assert uri is not None
        head, _, body = uri.partition(",")
        assert head in ("data:image/png;base64", "data:image/jpeg;base64")
        with Image.open(io.BytesIO(base64.b64decode(body))) as image:
            image.load()
            assert min(image.size) > 1
    assert all(one["alt"] for one in page.of("img"))
    assert all(one["aria-label"] and one["role"] for one in page.of("svg"))


def test_nothing_hostile_and_nothing_from_outside(written: str) -> None:
    page = Page(written)
    assert page.of("script") == []
    assert page.of("link") == page.of("b") == []
    assert HOSTILE not in written
    assert "x&lt;script&gt;alert(1)" in written
    for name in ("http://", "https://", "url("):
        assert name not in written
    assert "prefers-color-scheme: dark" in written
    assert len(written) < 6e6


def test_a_bank_of_images_alone_without_runs_or_probe(tmp_path: Path) -> None:
    write_shards(tmp_path, [5])
    precompute(load_job(str(write_job(tmp_path))), quiet=True)
    bank = open_bank(str(tmp_path / "bank"))
    path = write_report(tmp_path / "r.html", bank, {}, None, title="t", rows=None)
    page = Page(path.read_text())
    sections = [one["id"] for one in page.of("section")]
    assert sections == ["bank", "rows", "sizes", "opening"]
    assert len(page.of("img")) == 2 * 5
    assert page.of("image") == []


def test_several_cameras(tmp_path: Path) -> None:
    write_shards(tmp_path, [4])
    image: dict[str, Any] = {"kind": "image", "member": "jpg"}
    net = {
        "model": "module:./nets.py:Net",
        "weights": "random:1",
        "sizes": [[16, 16]],
        "batch": 4,
        "on": ["left", "right"],
        "outputs": {"patch": {"from": "body"}},
    }
    job = write_job(
        tmp_path, inputs={"left": image, "right": image}, teachers={"net": net}
    )
    precompute(load_job(str(job)), quiet=True)
    bank = open_bank(str(tmp_path / "bank"))
    path = write_report(tmp_path / "r.html", bank, {}, None, title="t", rows=[2])
    page = Page(path.read_text())
    assert len(page.of("img")) == 2 * 2
    assert "View 0 of right" in page.words


def test_a_bank_whose_rows_cannot_be_read_still_has_a_page(
    made: Made, tmp_path: Path
) -> None:
    copy = made.copy(tmp_path / "copy")
    (copy.folder / "bank" / "features.zarr" / "key" / "c.0").unlink()
    path = write_report(
        tmp_path / "r.html", copy.open(), made.runs, None, title="t", rows=None
    )
    page = Page(path.read_text())
    assert "No rows can be shown" in page.words
    assert page.of("img") == []
    assert "11 in 2 shards" in page.words
