"""The page: facts and pictures as one HTML file without scripts.

Everything that comes from outside is escaped here, once; what drawings give is markup
already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from teachonce.report.curves import draw_chart, draw_framed
from teachonce.report.facts import BankFacts
from teachonce.report.gallery import Figure, Gallery, Panel
from teachonce.report.run_facts import RunFacts
from teachonce.report.tables import Table

_STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --soft: #5c6470; --line: #d9dde3;
  --back: #ffffff; --card: #f6f7f9; --bad: #b3261e; --axis: #8a93a8; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --soft: #a2aab6;
  --line: #353b45; --back: #14171b; --card: #1c2026; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 24px; color: var(--text);
  background: var(--back); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 20px; margin: 40px 0 8px; }
h3 { font-size: 16px; margin: 24px 0 6px; overflow-wrap: anywhere; }
nav a { margin-right: 14px; } a { color: inherit; }
p, li { max-width: 90ch; } .soft { color: var(--soft); } .bad { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin: 8px 0; }
th, td { border-bottom: 1px solid var(--line); padding: 4px 12px 4px 0;
  text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; } .number { text-align: right; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px;
  margin: 8px 0; font-size: 14px; } dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: 10px 12px; overflow-x: auto; font-size: 13px; }
.strip { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.group { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 8px 10px; max-width: 100%; }
.group h4 { font-size: 12px; font-weight: 600; margin: 0 0 6px;
  overflow-wrap: anywhere; }
.group .strip { gap: 10px; }
figure { margin: 0; } figure img, .framed { display: block; max-width: 100%;
  height: auto; } figure img { border-radius: 3px; }
figcaption { font-size: 12px; color: var(--soft); max-width: 320px;
  overflow-wrap: anywhere; }
.chart { width: 460px; max-width: 100%; } .tick { font: 11px system-ui, sans-serif;
  fill: var(--soft); }
.grid { stroke: var(--line); } .axis { stroke: var(--axis); }
.mark { stroke: var(--axis); stroke-dasharray: 3 3; }
.depth { display: inline-block; width: 120px; height: 10px; vertical-align: middle;
  border-radius: 2px; background: linear-gradient(90deg, #ff0000, #ff8000, #80ff80,
  #0080ff, #0000ff); }
"""


@dataclass(frozen=True)
class Content:
    """All that a page shows.

    Attributes:
        title: of the page.
        url: of the bank.
        bank: what is said of it.
        runs: what is said of each.
        scores: one line per model; None without a probe.
        score_details: further tables about the probe, with their titles.
        gallery: pictures.
        made: when and by what.
    """

    title: str
    url: str
    bank: BankFacts
    runs: Sequence[RunFacts]
    scores: Table | None
    score_details: Sequence[tuple[str, Table]]
    gallery: Gallery
    made: str


def render_page(content: Content) -> str:
    """Returns the page as HTML."""
    sections = [
        ("bank", "The bank", "".join(_bank(content.bank))),
        ("scores", "Scores", "".join(_scores(content))),
        ("runs", "Runs", "".join(_run(run) for run in content.runs)),
        ("rows", "Rows", "".join(_gallery(content.gallery))),
        ("sizes", "Sizes", _table(content.bank.arrays)),
        ("opening", "Opening it", _opening(content.url)),
    ]
    kept = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title, _ in kept)
    body = "".join(
        f'<section id="{name}"><h2>{title}</h2>{text}</section>'
        for name, title, text in kept
    )
    title = escape(content.title)
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{title}</h1><p class="soft">{escape(content.made)}</p>'
        f"<nav>{links}</nav>{body}</body></html>\n"
    )


def _bank(facts: BankFacts) -> Iterable[str]:
    yield _pairs(facts.summary)
    if facts.damage:
        yield '<h3 class="bad">Damaged or failed</h3>' + _list(facts.damage, "bad")
    yield "<h3>Teachers</h3>" + _table(facts.teachers)
    if facts.invalid is None:
        yield '<p class="soft">No row is known to be invalid.</p>'
    else:
        yield "<h3>Invalid rows</h3>" + _table(facts.invalid)
    yield "<h3>Outputs</h3>"
    yield _table(facts.outputs)
    yield (
        '<p class="soft">On disk: objects of committed blocks, padding of the last one '
        "included. As float32: the same samples and views, uncompressed.</p>"
    )


def _scores(content: Content) -> Iterable[str]:
    if content.scores is not None:
        yield _table(content.scores)
        yield (
            '<p class="soft">On the test split, on view 0. Teachers are a reference '
            "from their cached features, not a ceiling; random is the same student "
            "untrained. In brackets: the features asked. Of several features or scales "
            "the one counts that did best on the split for choosing.</p>"
        )
    for title, table in content.score_details:
        yield _details(title, _table(table))


def _run(run: RunFacts) -> str:
    parts = [f"<h3>{escape(run.name)}</h3>"]
    if run.problem is not None:
        parts.append(_list([run.problem], "bad"))
    parts.append(_pairs(run.summary))
    charts = [
        draw_chart(lines, f"{what} of {run.name} over steps", what, marks=run.stages)
        for what, lines in (("loss", run.losses), ("learning rate", run.rates))
        if lines
    ]
    if charts:
        parts.append(f'<div class="strip">{"".join(charts)}</div>')
    if run.is_thinned:
        parts.append(
            '<p class="soft">Points are means over neighbouring lines of the log.</p>'
        )
    return "".join(parts)


def _gallery(gallery: Gallery) -> Iterable[str]:
    if gallery.panels:
        yield (
            "<p>Colours of features are the first three principal components of their "
            "standardised values over all rows below: alike colours mean alike "
            "features within one output, on all inputs of its teacher and across rows, "
            "and nothing between outputs. Logits have the colour of their largest. A "
            "head's map is in its teacher's colours. From above, cells that the camera "
            "does not see are faded, and do not count in the cosine.</p>"
        )
    if gallery.far_m is not None:
        yield (
            '<p class="soft">Points on images: <span class="depth"></span> from 0 to '
            f"over {gallery.far_m / 4:g} to {gallery.far_m:g} m.</p>"
        )
    yield _list(gallery.notes, "bad")
    for panel in gallery.panels:
        yield _panel(panel)


def _panel(panel: Panel) -> str:
    where = f' <span class="soft">row {panel.row}'
    where += f" of {escape(panel.shard)}</span>" if panel.shard else "</span>"
    groups = "".join(
        f'<div class="group"><h4>{escape(group.title)}</h4><div class="strip">'
        f"{''.join(_figure(figure) for figure in group.figures)}</div></div>"
        for group in panel.groups
    )
    return (
        f"<article><h3>{escape(panel.key)}{where}</h3>{_list(panel.problems, 'bad')}"
        f'<div class="strip">{groups}</div></article>'
    )


def _figure(figure: Figure) -> str:
    height, width = figure.size_hw
    if figure.extent is not None:
        picture = draw_framed(figure.uri, figure.alt, *figure.extent, width)
    else:
        picture = (
            f'<img src="{escape(figure.uri)}" width="{width}" height="{height}" '
            f'alt="{escape(figure.alt)}">'
        )
    return (
        f"<figure>{picture}<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _opening(url: str) -> str:
    path = f"{url.rstrip('/')}/features.zarr"
    code = (
        "import xarray as xr\n"
        f"tree = xr.open_datatree({path!r}, engine='zarr', consolidated=False)"
    )
    ours = f"from teachonce import open_bank\nbank = open_bank({url!r})"
    return (
        "<p>With anything that reads Zarr v3:</p>"
        f"<pre>{escape(code)}</pre><p>With TeachOnce, checked against its commits:</p>"
        f"<pre>{escape(ours)}</pre>"
    )


def _pairs(pairs: Sequence[tuple[str, str]]) -> str:
    if not pairs:
        return ""
    lines = (f"<dt>{escape(a)}</dt><dd>{escape(b)}</dd>" for a, b in pairs)
    return f"<dl>{''.join(lines)}</dl>"


def _list(lines: Sequence[str], kind: str) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="{kind}">{items}</ul>'


def _details(title: str, inner: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def _table(table: Table) -> str:
    kinds = [
        ' class="number"' if place in table.numbers else ""
        for place in range(len(table.head))
    ]
    head = "".join(
        f'<th scope="col"{kind}>{escape(text)}</th>'
        for kind, text in zip(kinds, table.head, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(
            f"<td{kind}>{escape(text)}</td>"
            for kind, text in zip(kinds, row, strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
