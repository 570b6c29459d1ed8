"""``report.html``: a bank and the runs trained from it, as one page to look at."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bank.open import Bank
from teachonce.report.facts import describe_bank
from teachonce.report.gallery import make_gallery
from teachonce.report.page import Content, render_page
from teachonce.report.run_facts import describe_run
from teachonce.report.score_facts import all_scores, score_table, split_table

__all__ = ["write_report"]


def write_report(
    path: str | Path,
    bank: Bank,
    runs: Mapping[str, Path],
    probe: Mapping[str, Any] | None,
    *,
    title: str,
    rows: Sequence[int] | None,
    shards: Sequence[str] | None = None,
) -> Path:
    """Writes the page and returns its path; whatever cannot be shown is said in it.

    The page is one file without scripts. Without runs torch is not imported.

    Args:
        path: of the page; its folder is made if missing.
        bank: to tell of.
        runs: name to folder of those trained from it; may be none.
        probe: the scores, as the probe writes them as JSON; None for none.
        title: of the page.
        rows: of the bank from which those shown are chosen, the held-out part for
            instance; None for all.
        shards: where the shards lie now; None for where the bank found them.

    Raises:
        BankError, StorageError: the bank's record or commits cannot be read.
        ValueError: ``rows`` holds one that the bank does not have.
    """
    scores = dict(probe or {})
    details = {
        "Every score": all_scores(scores),
        "Rows of the splits": split_table(scores),
    }
    content = Content(
        title=title,
        url=bank.url,
        bank=describe_bank(bank),
        runs=[describe_run(name, Path(folder)) for name, folder in runs.items()],
        scores=score_table(scores),
        score_details=[(name, one) for name, one in details.items() if one],
        gallery=make_gallery(bank, runs, rows, shards),
        made=f"Made {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())} by TeachOnce.",
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render_page(content), encoding="utf-8")
    return target
