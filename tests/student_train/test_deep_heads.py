"""Heads over layers and over all tokens, against NumPy; and a student's layers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from manifests.recipe import StudentConfig
from student_train.deep_heads import Ladder, TransformerHead
from student_train.students import make_student

PIXELS = torch.randint(
    0,
    256,
    (2, 32, 48, 3),
    dtype=torch.uint8,
    generator=torch.Generator().manual_seed(0),
)
SMALL = {"img_size": [32, 48], "patch_size": 8, "embed_dim": 24, "depth": 3}
ROPE = {**SMALL, "num_heads": 2}
# Plain ViTs: class token, registers and class token, neither; rotary; two tokens.
LAYERED = {
    "vit_tiny_patch16_224": {**SMALL, "num_heads": 3},
    "vit_small_patch14_reg4_dinov2": {**SMALL, "num_heads": 3},
    "vit_base_patch16_siglip_224": {**SMALL, "num_heads": 3},
    "vit_small_patch16_dinov3": ROPE,
    "deit_tiny_distilled_patch16_224": {**SMALL, "num_heads": 3},
    "beit_base_patch16_224": {**SMALL, "num_heads": 3},
}


def student_of(name, args):
    config = StudentConfig(model=f"timm:{name}", input="image", args=args)
    return make_student(config, (32, 48), seed=0).eval()


def weights(module):
    return {k: v.double().numpy() for k, v in module.state_dict().items()}


def gelu(values):
    return values * (1 + np.vectorize(math.erf)(values / math.sqrt(2))) / 2


@pytest.mark.parametrize("name", LAYERED)
def test_layers_are_what_the_blocks_give(name):
    """Against hooks on the model's own blocks; the features stay the same bits."""
    student = student_of(name, LAYERED[name])
    assert student.has_layers
    assert student.num_layers == 3
    seen = []
    for block in student.model.blocks:
        block.register_forward_hook(lambda _, __, found: seen.append(found.clone()))
    with torch.no_grad():
        plain = student(PIXELS)
        del seen[:]
        found = student(PIXELS, layers=True)
    assert plain.layers == ()
    for kind in ("cls", "pooled", "patch"):
        mine, theirs = getattr(found, kind), getattr(plain, kind)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    assert len(found.layers) == len(seen) - 1 == 2
    for layer, tokens in zip(found.layers, seen, strict=False):
        torch.testing.assert_close(layer.patch.flatten(1, 2), tokens[:, -24:])
        assert layer.patch.shape == (2, 4, 6, 24)
        assert (layer.cls is None) == (plain.cls is None)
        assert layer.cls is None or torch.equal(layer.cls, tokens[:, 0])


def test_a_student_of_one_layer_has_none_below_it():
    args = {**LAYERED["vit_tiny_patch16_224"], "depth": 1}
    student = student_of("vit_tiny_patch16_224", args)
    with torch.no_grad():
        found, plain = student(PIXELS, layers=True), student(PIXELS)
    assert (student.num_layers, found.layers) == (1, ())
    assert torch.equal(found.patch, plain.patch)


@pytest.mark.parametrize(
    "name", ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_pyramids_have_no_layers_on_one_grid(name):
    config = StudentConfig(model=f"timm:{name}", input="image")
    assert not make_student(config, (64, 64), seed=0).has_layers


@pytest.mark.parametrize("shape", [(5,), (5, 2, 3)])
def test_the_ladder_equals_its_formula(shape):
    torch.manual_seed(0)
    ladder = Ladder(6, 4, num_layers=3, hidden=9, rungs=5)
    layers = [torch.randn(*shape, 6) for _ in range(3)]
    held, expected = weights(ladder), 0.0
    for number, tokens in enumerate(layers):
        inner = gelu(
            tokens.double().numpy() @ held[f"expand.{number}.weight"].T
            + held[f"expand.{number}.bias"]
        )
        expected = expected + inner @ held[f"contract.{number}.weight"].T
        expected = expected + held[f"contract.{number}.bias"]
    widths = [held[f"expand.{number}.weight"].shape[0] for number in range(3)]
    assert widths == [5, 5, 9]
    np.testing.assert_allclose(ladder(layers).detach(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="shorter"):
        ladder(layers[:2])


def np_norm(values, held, name):
    centred = values - values.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(values.var(-1, keepdims=True) + 1e-5)
    return scaled * held[f"{name}.weight"] + held[f"{name}.bias"]


def np_block(tokens_NC, held, heads):
    """A pre-norm layer of a transformer with LayerScale, one image."""
    width = tokens_NC.shape[1]
    inner = np_norm(tokens_NC, held, "block.norm1")
    qkv = inner @ held["block.attn.qkv.weight"].T + held["block.attn.qkv.bias"]
    found = []
    for head in range(heads):
        span = slice(head * width // heads, (head + 1) * width // heads)
        query, key, value = (
            qkv[:, k * width : (k + 1) * width][:, span] for k in range(3)
        )
        scores = query @ key.T / math.sqrt(width // heads)
        shares = np.exp(scores - scores.max(1, keepdims=True))
        found.append(shares / shares.sum(1, keepdims=True) @ value)
    mixed = np.concatenate(found, 1) @ held["block.attn.proj.weight"].T
    mixed = mixed + held["block.attn.proj.bias"]
    tokens_NC = tokens_NC + held["block.ls1.gamma"] * mixed
    inner = np_norm(tokens_NC, held, "block.norm2")
    inner = gelu(inner @ held["block.mlp.fc1.weight"].T + held["block.mlp.fc1.bias"])
    inner = inner @ held["block.mlp.fc2.weight"].T + held["block.mlp.fc2.bias"]
    return tokens_NC + held["block.ls2.gamma"] * inner


@pytest.mark.parametrize("has_cls", [True, False])
def test_the_transformer_head_equals_its_formula(has_cls):
    torch.manual_seed(0)
    head = TransformerHead(8, 5, heads=2)
    assert (head.block.ls1.gamma == 1e-4).all()
    # So that the layer counts at all.
    for scale in (head.block.ls1, head.block.ls2):
        torch.nn.init.normal_(scale.gamma)
    patch = torch.randn(3, 2, 4, 8)
    cls = torch.randn(3, 8) if has_cls else None
    with torch.no_grad():
        found_cls, found_patch = head(cls, patch)
    held = weights(head)
    tokens = patch.flatten(1, 2)
    if cls is not None:
        tokens = torch.cat([cls[:, None], tokens], 1)
    expected = np.stack([np_block(one.double().numpy(), held, 2) for one in tokens])
    expected = expected @ held["linear.weight"].T + held["linear.bias"]
    assert found_patch.shape == (3, 2, 4, 5)
    np.testing.assert_allclose(found_patch.flatten(1, 2), expected[:, -8:], atol=1e-5)
    assert (found_cls is None) == (not has_cls)
    if found_cls is not None:
        np.testing.assert_allclose(found_cls, expected[:, 0], atol=1e-5)


def test_heads_of_attention():
    assert TransformerHead(192, 5).block.attn.num_heads == 3
    assert TransformerHead(48, 5).block.attn.num_heads == 1
    with pytest.raises(ValueError, match="divide the tokens' 8 channels, got 3"):
        TransformerHead(8, 5, heads=3)
