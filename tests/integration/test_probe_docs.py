"""What docs/probes.md shows: every fence of YAML loads as part of a probe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from manifests.recipe_loading import load_probe
from manifests.yaml_text import parse_yaml
from teachonce.verbs import probe as verb
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "probes.md").read_text()
FENCES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("fence", FENCES)
def test_a_fence_loads(fence: str, tmp_path: Path) -> None:
    rows = {"share": [0.0, 0.1]}
    document = {
        "banks": {"in1k": "./bank"},
        "splits": {"fit": rows, "choose": rows, "test": rows},
        **parse_yaml(fence.encode(), "probes.md"),
    }
    path = tmp_path / "probe.yaml"
    path.write_text(yaml.safe_dump(document))
    probe = load_probe(str(path))
    (question,) = probe.probes.values()
    first, _, name = question.label.partition("/")
    assert first in probe.banks or name in probe.trajectories


def test_columns_are_those_that_are_shown() -> None:
    table = TEXT[TEXT.index("| column |") :]
    columns = re.findall(
        r"`([a-z ]+)`", "".join(re.findall(r"^\| (`.*?) \|", table, re.M))
    )
    shown = {name.replace("_", " ") for name in verb._MORE}
    assert columns[0] == "ade reduction"
    assert set(columns[1:]) <= shown
