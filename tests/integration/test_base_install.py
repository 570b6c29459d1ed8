"""An installation without extras: a bank opens, is verified, compared and handed on.

The environment is a real one, whose packages are exactly those that the base
requirements lead to. Neither torch nor Beam is among them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT, jpeg

OURS = ("manifests", "pipeline", "student_train", "teachers", "teachonce")
ABSENT = ("apache_beam", "open_clip", "safetensors", "tensorboard", "timm", "torch")


def closure(requirements: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """What an installer would bring for some requirements, from what is here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = [Requirement(text) for text in requirements]
    while pending:
        one = pending.pop()
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(one.name)
        assert found[name].version in one.specifier
        for text in found[name].requires or []:
            needed = Requirement(text)
            extras = {"", *one.extras}
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in extras
            ):
                pending.append(needed)
    return found


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with TeachOnce and its base requirements."""
    folder = tmp_path_factory.mktemp("base") / "env"
    make = [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(folder)]
    subprocess.run(make, check=True, timeout=60)
    site = next(folder.glob("lib/python*/site-packages"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(closure(project["dependencies"]).values())
    for one in wanted:
        tops = {path.parts[0] for path in one.files or ()} - {"..", "__pycache__"}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))))
    for package in OURS:
        (site / package).symlink_to(ROOT / package)
    # Beside the sources lies what built them, beside the packages what was installed.
    ours = importlib.metadata.distribution("teachonce")
    info = site / f"teachonce-{ours.version}.dist-info"
    info.mkdir()
    told = ours.read_text("METADATA") or ours.read_text("PKG-INFO")
    assert told
    (info / "METADATA").write_text(told)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stored bank with its job, its shards and its values."""
    found = tmp_path_factory.mktemp("handed")
    with zipfile.ZipFile(ROOT / "tests" / "data" / "banks" / "schema-1.zip") as stored:
        stored.extractall(found)
    (found / "images").mkdir()
    (found / "images" / "a.jpg").write_bytes(jpeg(1))
    (found / "probe.yaml").write_text("banks: {b: ./bank}\n")
    (found / "recipe.yaml").write_text("run: ./run\nbanks: {b: ./bank}\n")
    return found


def run(python: Path, folder: Path, code: str) -> dict:
    """Runs lines of Python there; returns what they leave in ``told``."""
    script = f"import json, sys\ntold = {{}}\n{code}\nprint(json.dumps(told))"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(
        [str(python), "-W", "error", "-c", script],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert not {"torch", "apache_beam"} & set(told.get("modules", ()))
    return told


VERBS = """
from teachonce.cli import main
import contextlib, io
for line in LINES:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(line.split())
    told[line] = [code, out.getvalue(), err.getvalue()]
"""


def test_what_is_not_there(python: Path, folder: Path) -> None:
    code = "import importlib.util as u\n"
    code += f"told['found'] = [n for n in {ABSENT} if u.find_spec(n)]\n"
    code += "import teachonce\ntold['file'] = teachonce.__file__\n"
    code += "told['version'] = teachonce.__version__"
    told = run(python, folder, code)
    assert told["found"] == []
    assert Path(told["file"]).resolve() == ROOT / "teachonce" / "__init__.py"
    assert told["version"] == importlib.metadata.version("teachonce")


def test_values_are_read(python: Path, folder: Path) -> None:
    code = """
import numpy as np
from teachonce import open_bank
bank = open_bank("bank")
expected = np.load("expected.npz")
for name in expected:
    path, _, view = name.partition("@")
    if view:
        blocks = [bank.read(path, b, int(view)) for b in bank.record.live_blocks]
        np.testing.assert_array_equal(np.concatenate(blocks), expected[name], name)
        told[name] = bool(np.isfinite(expected[name]).any())
told["keys"] = bank.keys().tolist()
told["mean"] = bank.statistics("half/image/16x32/patch")["mean"].shape
told["missing"] = bool(bank.missing())
told["rows"] = len(list(bank.rows()))
"""
    told = run(python, folder, code)
    with np.load(folder / "expected.npz") as expected:
        assert told.pop("keys") == expected["keys"].tolist()
        assert {name for name, any_finite in told.items() if "@" in name} == {
            name for name in expected if "@" in name
        }
    assert not told["missing"]
    assert told["rows"] == 6


def test_verbs_for_who_is_handed_a_bank(python: Path, folder: Path) -> None:
    lines = [
        "info bank",
        "verify bank --full",
        "export bank copy --teachers net half",
        "verify copy --full --json",
        "diff bank bank --full",
        "diff bank copy",
        "index data/train-0.tar data/train-1.tar index",
        "report bank",
        "finalise bank",
        "teachers",
    ]
    code = f"LINES = {lines!r}\n{VERBS}\ntold['modules'] = list(sys.modules)"
    told = run(python, folder, code)
    codes = {line: told[line][0] for line in lines}
    # The copy has fewer teachers: the difference is said.
    assert codes == dict.fromkeys(lines, 0) | {"diff bank copy": 1}, told
    assert "sound" in told["verify bank --full"][1]
    assert json.loads(told["verify copy --full --json"][1])["sound"] is True
    assert "fine" in told["diff bank copy"][1]


@pytest.mark.parametrize(
    ("line", "extra"),
    [
        ("plan job.yaml", "precompute"),
        ("precompute job.yaml", "precompute"),
        ("teachers timm:vit_tiny_patch16_224", "precompute"),
        ("pack images packed", "precompute"),
        ("verify bank --recheck 2", "precompute"),
        ("train recipe.yaml", "train"),
        ("probe probe.yaml", "train"),
        ("demo demo", "precompute,train"),
    ],
)
def test_verbs_that_need_more_say_what_to_install(
    refused: dict, line: str, extra: str
) -> None:
    code, _, err = refused[line]
    assert code == 2, err
    assert err.count("\n") == 1
    assert re.search(rf"install(ed)?.* teachonce\[{extra}\]$", err.strip()), err


@pytest.fixture(scope="module")
def refused(python: Path, folder: Path) -> dict:
    """What became of each verb that cannot run here."""
    lines = [
        case[0]
        for mark in test_verbs_that_need_more_say_what_to_install.pytestmark
        for case in mark.args[1]
    ]
    before = {path for path in folder.rglob("*") if path.is_file()}
    told = run(python, folder, f"LINES = {lines!r}\n{VERBS}")
    assert {path for path in folder.rglob("*") if path.is_file()} == before
    return told


def test_names_that_need_more_say_what_to_install(python: Path, folder: Path) -> None:
    code = """
import teachonce
for name in ("BankDataset", "Reading"):
    try:
        getattr(teachonce, name)
    except ImportError as error:
        told[name] = str(error)
"""
    told = run(python, folder, code)
    for name in ("BankDataset", "Reading"):
        assert told[name] == (
            f"{name} needs the package torch, which is not installed; install "
            "teachonce[train]"
        )
