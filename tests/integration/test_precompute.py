"""From shards to a bank, in this process: numbers, rows, views, inputs, growth."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from manifests.loading import load_job
from pipeline.bank.open import open_bank
from pipeline.precompute import precompute
from tests.conftest import jpeg


def run(path: Path, *overrides: str, **options):
    return precompute(load_job(str(path), overrides), quiet=True, **options)


def test_features_equal_the_model_run_by_hand(make_shards, make_job, tmp_path):
    make_shards([11, 5])
    outcome = run(make_job())
    assert outcome.is_whole
    assert outcome.record.block_rows == 8
    bank = open_bank(str(tmp_path / "bank"))
    logits = np.concatenate(
        [bank.read("net/image/16x16/logits", block) for block in range(3)]
    )
    namespace: dict = {}
    exec((tmp_path / "nets.py").read_text(), namespace)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = namespace["Net"]().eval()
    for row in range(11):
        image = Image.open(io.BytesIO(jpeg(row))).convert("RGB").resize((16, 16), 2)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        with torch.inference_mode():
            expected = net(x)[0].numpy()
        np.testing.assert_allclose(logits[row], expected, atol=1e-5)
    assert np.isnan(logits[11:16]).all()
    assert not np.isnan(logits[16:21]).any()
