"""What the tests of exports share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pipeline.bank.record import open_record
from pipeline.bank.verify import verify


def check_sound(bank: object) -> None:
    """Checks every byte of a bank, and that nothing lies there that is not its own."""
    report = verify(*open_record(str(bank)), full=True)
    assert report.is_sound, report.problems
    assert report.orphans == []


def commits(bank: Path) -> dict[Path, tuple[bytes, int]]:
    """Commits of a bank by path: their bytes and times."""
    return {
        path.relative_to(bank): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in bank.glob("commits/*/*.json")
    }


def key_file(folder: Path, lines: Iterable[str]) -> Path:
    """Writes a list of keys, a line each."""
    path = folder / "keys.txt"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path
