"""The bank whose answers are known, a run over it, and probes of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from manifests.recipe import Probe
from pipeline.bank.open import Bank, open_bank
from tests import probing
from tests.training import once


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Two cores are shared with other test processes."""
    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)


@pytest.fixture(scope="session")
def url(tmp_path_factory) -> Path:
    return once(tmp_path_factory, "probed", probing.make_bank)


@pytest.fixture(scope="session")
def run(url, tmp_path_factory) -> Path:
    return probing.make_run(url, tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def probe(url, run, tmp_path):
    """Makes a probe; fields replace top-level ones."""

    def make(**more: Any) -> Probe:
        more = {"students": {"mine": str(run)}, **more}
        return probing.probe_of(tmp_path, url, **more)

    return make


@pytest.fixture(scope="session")
def known_bank(url) -> Bank:
    return open_bank(str(url))
