"""What is taken of timm models, against the models' own parts put together by hand.

Block outputs are caught by hooks of the test's own; final norms are computed in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from teachers.errors import TeacherError
from teachers.timm_taps import is_contrastive, patch_of
from teachers.torch_teacher import TorchTeacher

Open = Callable[..., TorchTeacher]

TINY: dict[str, Any] = {"embed_dim": 64, "depth": 3, "num_heads": 2}


class Case(NamedTuple):
    """A transformer made small, and what is known of it.

    Attributes:
        model: timm's name.
        prefix: tokens that are no cells.
        norm: where its final norm is; None where it has none.
        args: that make it small.
        size: of the image.
    """

    model: str
    prefix: int
    norm: str | None
    args: dict[str, Any] = TINY
    size: tuple[int, int] = (64, 96)


CASES = [
    Case("vit_small_patch14_dinov2", 1, "norm", size=(56, 84)),
    Case("vit_small_patch14_reg4_dinov2", 5, "norm", size=(56, 84)),
    Case("vit_small_patch16_dinov3", 5, "norm"),
    Case("vit_huge_plus_patch16_dinov3", 5, "norm"),
    Case("vit_base_patch16_dinov3_qkvb", 5, "norm"),
    Case("vit_base_patch16_siglip_256", 0, "norm"),
    Case("vit_base_patch16_clip_224", 1, "norm"),
    Case("eva02_base_patch16_clip_224", 1, "norm"),
    Case("eva_giant_patch14_clip_224", 1, "norm", size=(56, 84)),
    Case("vit_pe_core_base_patch16_224", 1, "norm"),
    Case("vit_pe_lang_large_patch14_448", 1, None, size=(56, 84)),
    Case("vit_pe_spatial_base_patch16_512", 1, None),
    Case("vit_base_patch16_224.mae", 1, "norm"),
    Case("vit_base_patch16_224", 1, "norm"),
    Case("eva02_tiny_patch14_224", 1, "fc_norm", size=(56, 84)),
    Case("beitv2_base_patch16_224", 1, "fc_norm", size=(224, 224)),
    Case("vit_base_patch16_radio_v3", 8, None),
    Case("naflexvit_base_patch16_radio_v3", 8, None),
    Case("naflexvit_so400m_patch16_radio_v4", 10, None),
    Case("naflexvit_base_patch16_siglip", 0, "norm"),
]
SUMMARIES = {
    "vit_base_patch16_radio_v3": 3,
    "naflexvit_base_patch16_radio_v3": 3,
    "naflexvit_so400m_patch16_radio_v4": 2,
}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)


def _open(open_one: Open, case: Case, outputs: Any) -> TorchTeacher:
    return open_one(
        f"timm:{case.model}", outputs, sizes=[list(case.size)], args=case.args
    )


def _image(case: Case) -> Tensor:
    return torch.randn(2, 3, *case.size, generator=torch.Generator().manual_seed(1))


def _blocks(model: Any, image: Tensor) -> list[NDArray[np.float64]]:
    """What each block returns in the model's own forward, (B, N, C)."""
    caught: list[NDArray[np.float64]] = []
    hooks = [
        block.register_forward_hook(lambda _, __, out: caught.append(out.numpy()))
        for block in model.blocks
    ]
    with torch.inference_mode():
        model(image)
    for hook in hooks:
        hook.remove()
    return [tokens.astype(np.float64) for tokens in caught]


def _normed(model: Any, path: str | None, tokens: NDArray[Any]) -> NDArray[Any]:
    if path is None:
        return tokens
    norm = model.get_submodule(path)
    centred = tokens - tokens.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + norm.eps)
    moved: NDArray[Any] = scaled * norm.weight.numpy() + norm.bias.numpy()
    return moved


def _grid(tokens: NDArray[Any], case: Case, model: Any) -> NDArray[Any]:
    side = 14 if case.size[0] % 16 else 16
    rows, columns = case.size[0] // side, case.size[1] // side
    return tokens[:, case.prefix :].reshape(len(tokens), rows, columns, -1)


@every_case
@pytest.mark.parametrize("asked", [None, "pre"])
def test_tokens_are_the_blocks_own(
    case: Case, asked: str | None, open_one: Open
) -> None:
    names = ["patch", "layer1", "layer2", *(["cls"] if case.prefix else [])]
    outputs = {name: {"norm": asked} if asked else {} for name in names}
    teacher = _open(open_one, case, outputs)
    # Norms that change nothing cannot be told from none.
    model: Any = teacher.model(case.size)
    generator = torch.Generator().manual_seed(2)
    for part in (getattr(model, "norm", None), getattr(model, "fc_norm", None)):
        if isinstance(getattr(part, "weight", None), Tensor):
            part.weight.data = torch.rand(64, generator=generator) + 0.5
            part.bias.data = torch.randn(64, generator=generator)
    image = _image(case)
    found = teacher.forward({"image": image}, case.size)
    blocks = _blocks(model, image)
    path = None if asked else case.norm
    for name, k in (("patch", 2), ("layer2", 2), ("layer1", 1)):
        expected = _grid(_normed(model, path, blocks[k]), case, model)
        np.testing.assert_allclose(found[name].numpy(), expected, atol=1e-4)
        spec = teacher.outputs(case.size)[name]
        assert spec.norm == ("pre" if path is None else "post")
    if case.prefix:
        num = SUMMARIES.get(case.model, 1)
        tokens = _normed(model, path, blocks[2])[:, :num].reshape(2, -1)
        np.testing.assert_allclose(found["cls"].numpy(), tokens, atol=1e-4)


@every_case
def test_pooled_and_the_head_are_the_models_own(case: Case, open_one: Open) -> None:
    small = timm.create_model(case.model, **case.args)
    ends = ["pooled"]
    if is_contrastive(small):
        ends.append("embed")
    elif small.num_classes:
        ends.append("logits")
    teacher = _open(open_one, case, ends)
    image = _image(case)
    found = teacher.forward({"image": image}, case.size)
    model: Any = teacher.model(case.size)
    with torch.inference_mode():
        whole = model(image)
        tokens = model.forward_features(image)
    if len(ends) > 1:
        assert torch.equal(found[ends[1]], whole)
    if case.model.startswith(("vit_base_patch16_siglip", "vit_pe_core")):
        with torch.inference_mode():
            assert torch.equal(found["pooled"], model.attn_pool(tokens))
    elif model.global_pool == "avg":
        mean = tokens[:, case.prefix :].mean(1).numpy().astype(np.float64)
        path = case.norm if case.norm == "fc_norm" else None
        expected = _normed(model, path, mean)
        np.testing.assert_allclose(found["pooled"].numpy(), expected, atol=1e-4)
    elif model.global_pool == "token":
        assert torch.equal(found["pooled"], tokens[:, 0])


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("vit_base_patch16_clip_224.openai", True),
        ("vit_base_patch16_clip_224.metaclip_2pt5b", True),
        ("vit_base_patch16_clip_224.dfn2b", True),
        ("eva02_base_patch16_clip_224.merged2b", True),
        ("vit_base_patch16_siglip_256.v2_webli", True),
        ("vit_pe_core_tiny_patch16_384.fb", True),
        ("vit_base_patch16_clip_224.openai_ft_in1k", False),
        ("vit_base_patch16_224.mae", False),
        ("vit_small_patch16_dinov3.lvd1689m", False),
        ("test_vit", False),
    ],
)
def test_contrastive_towers_are_told_from_classifiers(
    model: str, expected: bool
) -> None:
    with torch.device("meta"):
        assert is_contrastive(timm.create_model(model)) == expected
        if expected and not model.startswith("vit_base_patch16_siglip"):
            own_head = timm.create_model(model, num_classes=10)
            assert not is_contrastive(own_head)


@pytest.mark.parametrize(
    ("model", "outputs", "message"),
    [
        ("test_vit", {"embed": {}}, "no contrastive projection; take `pooled`"),
        (
            "vit_base_patch16_clip_224.openai",
            {"logits": {}},
            "head is a contrastive projection; take `embed`",
        ),
        (
            "vit_base_patch16_radio_v3",
            {"cls": {"norm": "post"}},
            "cls.norm must be pre: VisionTransformer has no norm for it",
        ),
        (
            "vit_pe_spatial_tiny_patch16_512",
            {"patch": {"norm": "post"}},
            "patch.norm must be pre: Eva has no norm",
        ),
        (
            "samvit_base_patch16",
            {"layer3": {"norm": "post"}},
            "layer3.norm must be pre: VisionTransformerSAM",
        ),
        ("sam2_hiera_tiny", {"cls": {}}, "no class token; `pooled`"),
    ],
)
def test_what_a_model_has_not_is_refused(
    model: str, outputs: dict[str, Any], message: str, open_one: Open
) -> None:
    teacher = open_one(f"timm:{model}", outputs, device="meta")
    with pytest.raises(TeacherError, match=message):
        teacher.outputs(teacher.sizes[0])


SAM: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "global_attn_indexes": (1, 3),
    "window_size": 3,
}


@pytest.mark.parametrize("size", [(64, 96), (1024, 1024)])
def test_sam_ends_in_its_neck(size: tuple[int, int], open_one: Open) -> None:
    teacher = open_one(
        "timm:samvit_base_patch16",
        ["patch", "pooled", "layer3"],
        sizes=[list(size)],
        args=SAM,
    )
    image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    found = teacher.forward({"image": image}, size)
    model: Any = teacher.model(size)
    [*_, last] = _blocks(model, image)
    assert found["patch"].shape == (1, size[0] // 16, size[1] // 16, 256)
    np.testing.assert_allclose(found["layer3"].numpy(), last, atol=1e-5)
    with torch.inference_mode():
        after = model.neck(torch.tensor(last, dtype=torch.float32).permute(0, 3, 1, 2))
    expected = after.permute(0, 2, 3, 1)
    assert torch.allclose(found["patch"], expected, atol=1e-5)
    assert torch.allclose(found["pooled"], expected.mean((1, 2)), atol=1e-5)
    norms = {key: spec.norm for key, spec in teacher.outputs(size).items()}
    assert norms == {"patch": "post", "pooled": None, "layer3": "pre"}


HIERA: dict[str, Any] = {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}
HIERAS = {
    "hiera_tiny_224": HIERA,
    "hiera_base_abswin_256": HIERA,
    "sam2_hiera_tiny": {**HIERA, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)},
}


@pytest.mark.parametrize("model", list(HIERAS))
@pytest.mark.parametrize("place", [(0.2, 0.3), (0.8, 0.3), (0.3, 0.8), (0.9, 0.9)])
def test_hiera_levels_are_in_raster_order(
    model: str, place: tuple[float, float], open_one: Open
) -> None:
    """A patch in the image is answered where it is, on every level."""
    names = [f"level{k}" for k in range(4)] + ["patch"]
    teacher = open_one(f"timm:{model}", names, args=HIERAS[model])
    size: Any = teacher.sizes[0]
    generator = torch.Generator().manual_seed(4)
    ground = torch.randn(1, 3, *size, generator=generator) * 0.1
    patched = ground.clone()
    y, x = int(place[1] * size[0]), int(place[0] * size[1])
    patched[..., y - 8 : y + 8, x - 8 : x + 8] += 3
    found = teacher.forward({"image": torch.cat([ground, patched])}, size)
    for name in names:
        grid = found[name]
        rows, columns = grid.shape[1:3]
        assert rows == size[0] / (4 * 2 ** min(3, names.index(name)))
        response = (grid[1] - grid[0]).square().sum(-1)
        row, column = divmod(int(response.argmax()), columns)
        # The patch covers 16 pixels, and so several cells of the finest level.
        slack = max(1.0, 8 / size[0] * rows + 0.5)
        assert abs(row + 0.5 - place[1] * rows) <= slack, name
        assert abs(column + 0.5 - place[0] * columns) <= slack, name


def test_hiera_tokens_of_a_stage_are_not_in_raster_order_of_themselves() -> None:
    """What the test above would find, were the blocks' own order taken."""
    model: Any = timm.create_model("hiera_tiny_224", **HIERA).eval()
    raster = torch.arange(56 * 56).reshape(1, -1, 1).float()
    order = model.unroll(raster)[0, :, 0]
    assert order[:4].tolist() != [0, 1, 2, 3]
    assert torch.equal(
        model.reroll(order.reshape(1, -1, 1), 0).flatten(), raster[0, :, 0]
    )


def test_hiera_norms_its_cells_and_sam2_has_no_norm(open_one: Open) -> None:
    for model, norm in (("hiera_tiny_224", "post"), ("sam2_hiera_tiny", "pre")):
        teacher = open_one(f"timm:{model}", ["patch", "level3"], args={**HIERAS[model]})
        size: Any = teacher.sizes[0]
        own: Any = teacher.model(size)
        own.head.norm.weight.data *= 2
        image = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
        found = teacher.forward({"image": image}, size)
        level = found["level3"].numpy().astype(np.float64)
        path = "head.norm" if norm == "post" else None
        expected = _normed(own, path, level)
        np.testing.assert_allclose(found["patch"].numpy(), expected, atol=1e-4)
        assert teacher.outputs(size)["patch"].norm == norm


@pytest.mark.parametrize(
    ("model", "align_corners"),
    [
        ("naflexvit_base_patch16_radio_v3", True),
        ("naflexvit_large_patch16_radio_v3", False),
        ("naflexvit_so400m_patch16_radio_v4", False),
    ],
)
def test_radio_takes_any_size_as_its_authors_do(
    model: str, align_corners: bool, open_one: Open
) -> None:
    """Positions of 128 x 128 cells, resized to the larger side, cut to the other."""
    teacher = open_one(f"timm:{model}", ["patch"], sizes=[[64, 112]], args=TINY)
    own: Any = teacher.model((64, 112))
    image = torch.randn(1, 3, 64, 112, generator=torch.Generator().manual_seed(1))
    taken: list[Tensor] = []
    hook = own.blocks[0].register_forward_pre_hook(
        lambda _, args: taken.append(args[0])
    )
    teacher.forward({"image": image}, (64, 112))
    hook.remove()
    state = own.state_dict()
    positions = state["embeds.pos_embed"]
    assert positions.shape == (1, 128, 128, 64)
    resized = F.interpolate(
        positions.permute(0, 3, 1, 2),
        (7, 7),
        mode="bilinear",
        align_corners=align_corners,
    )
    cells = F.unfold(image, 16, stride=16).transpose(1, 2)
    kernel = state["embeds.proj.weight"].reshape(64, -1)
    if "embeds.proj.weight" in state and state["embeds.proj.weight"].ndim == 2:
        # A linear layer over (row, column, colour).
        kernel = kernel.reshape(64, 16, 16, 3).permute(0, 3, 1, 2).reshape(64, -1)
    expected = cells @ kernel.T + state["embeds.proj.bias"]
    expected = expected + resized[:, :, :4].flatten(2).transpose(1, 2)
    assert torch.allclose(taken[0][:, -28:], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("hiera_tiny_224", (32, 32)),
        ("sam2_hiera_tiny", (32, 32)),
        ("convnext_tiny", (32, 32)),
        ("samvit_base_patch16", (16, 16)),
        ("naflexvit_base_patch16_radio_v3", (16, 16)),
        ("vit_7b_patch16_dinov3", (16, 16)),
        ("test_resnet", (1, 1)),
    ],
)
def test_sizes_are_multiples_of(model: str, expected: tuple[int, int]) -> None:
    with torch.device("meta"):
        assert patch_of(timm.create_model(model)) == expected
