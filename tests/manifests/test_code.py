"""Code that a document names: what is found, and what is said where it is not."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from manifests.code import explained, load_code
from manifests.errors import ManifestError, StorageError

SOURCE = """
import dataclasses


@dataclasses.dataclass
class Ladder:
    rungs: int = 3


class Rope:
    pass


def ladder():
    return Ladder(5)
"""


def test_a_class_or_a_function_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "tools.py").write_text(SOURCE)
    found = load_code("./tools.py:Ladder", str(tmp_path), "student")
    assert found.make(4).rungs == 4
    assert found.sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    assert load_code("tools.py:ladder", str(tmp_path), "student").make().rungs == 5
    absolute = f"{tmp_path}/tools.py:Rope"
    assert load_code(absolute, "gs://elsewhere", "student").make.__name__ == "Rope"


def test_a_relative_base_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tools.py").write_text("where = lambda: __file__\n")
    monkeypatch.chdir(tmp_path)
    assert load_code("tools.py:where", ".", "student").make() == f"{tmp_path}/tools.py"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tools.py", "student.model must be module:FILE:CLASS, got 'module:tools.py'"),
        ("tools.py:a-b", "must be module:FILE:CLASS"),
        ("gone.py:Rope", r"can be read, got 'gone.py' \(cannot read /.*relative paths"),
        ("tools.py:Robe", r"'Robe' \(modules: Rope\); did you mean Rope\?"),
        ("bad.py:Rope", r"bad.py must load, got ZeroDivisionError at line 2: "),
    ],
)
def test_code_that_cannot_be_had(tmp_path: Path, name: str, message: str) -> None:
    rope = "\n\nclass Rope(list):\n    pass\n\n\nclass Stone:\n    pass\n"
    (tmp_path / "tools.py").write_text(rope)
    (tmp_path / "bad.py").write_text("one = 1\n1 / 0\n")
    with pytest.raises(ManifestError, match=message):
        load_code(name, str(tmp_path), "student", list)


def test_our_own_errors_pass() -> None:
    with pytest.raises(StorageError, match="full"), explained("it must work"):
        raise StorageError("full")
    message = "it must work, got KeyError: 'a'"
    with pytest.raises(ManifestError, match=message), explained("it must work"):
        raise KeyError("a")


def test_it_needs_no_model_library() -> None:
    code = "import sys, manifests.code; assert not {'torch', 'timm'} & set(sys.modules)"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
