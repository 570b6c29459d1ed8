"""Scenes that several tests look at; drawn once."""

from __future__ import annotations

import pytest

from teachonce.demo.samples import DemoSample, make_sample
from teachonce.demo.scenes import SceneOptions

SEED, NUM_SCENES = 7, 12


@pytest.fixture(scope="session")
def samples() -> list[DemoSample]:
    """Twelve scenes by day, each class twice."""
    return [make_sample(SEED, index, SceneOptions()) for index in range(NUM_SCENES)]
