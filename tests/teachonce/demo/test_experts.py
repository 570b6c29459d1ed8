"""The experts: their weights, where those come from, and whether they are any good."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from pipeline.samples.points import Sweep
from pipeline.samples.views import View
from teachers.inputs.image import ImageSpec
from teachers.inputs.points import PointsSpec
from teachonce.demo import nets
from teachonce.demo.experts import EXPERTS, INTENSITY_MAX, NETS, REPORT, train
from teachonce.demo.experts.augmentation import (
    IGNORED,
    CameraViews,
    LidarViews,
    moved_map,
)
from teachonce.demo.experts.drawn import Drawn, draw, take_points
from teachonce.demo.experts.scores import (
    as_images,
    class_iou,
    confusion,
    depth_scores,
    occupancy_scores,
)
from teachonce.demo.objects import CLASSES
from teachonce.demo.samples import DemoSample
from teachonce.demo.scenes import SceneOptions
from teachonce.demo.truth import BEV_CELL_M, BEV_CELLS, BEV_CLASSES

DEMO_SEED, FRESH_SEED, NUM_FRESH = 0, 4242, 24
MOST_BYTES = 4 * 2**20


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def open_expert(name: str) -> nn.Module:
    model: nn.Module = getattr(nets, EXPERTS[name].class_name)()
    model.load_state_dict(load_file(EXPERTS[name].weights), strict=True)
    return model.eval()


@pytest.fixture(scope="module")
def fresh() -> Drawn:
    """Scenes as the demo draws them, from a seed that nobody else uses."""
    return draw(FRESH_SEED, NUM_FRESH, SceneOptions(textures="b"))


def batch_of(name: str, drawn: Drawn) -> torch.Tensor:
    if EXPERTS[name].kind == "points":
        return torch.from_numpy(drawn.points_NP4.astype(np.float32))
    return as_images(drawn.image_NHW3)


@torch.inference_mode()
def answer(name: str, drawn: Drawn) -> NDArray[np.float32]:
    return np.asarray(open_expert(name)(batch_of(name, drawn)))


def mean_iou(truth: NDArray[np.uint8], guess: NDArray[np.int64]) -> float:
    """Returns the mean over the classes in the truth, from masks."""
    scores = []
    for label in np.unique(truth):
        hit, called = truth == label, guess == label
        scores.append((hit & called).sum() / (hit | called).sum())
    return float(np.mean(scores))


# --- what is shipped ------------------------------------------------------------------


def test_the_weights_are_small() -> None:
    sizes = [expert.weights.stat().st_size for expert in EXPERTS.values()]
    assert sum(sizes) <= MOST_BYTES


def test_the_experts_never_saw_the_demo() -> None:
    report = json.loads(REPORT.read_text())
    seeds = {report["seed"], *report["held_out"]["seeds"].values()}
    assert DEMO_SEED not in seeds
    assert FRESH_SEED not in seeds
    assert len(seeds) == 3
    assert report["textures"] == "a"
    assert SceneOptions().textures == "b"
    assert report["scenes"] >= 10 * 800
    assert set(report["experts"]) == set(EXPERTS)


def test_the_report_tells_scores_on_both_textures() -> None:
    experts = json.loads(REPORT.read_text())["experts"]
    for name, score, least in (
        ("semantics", "miou", 0.5),
        ("depth", "delta1", 0.7),
        ("occupancy", "occupied_iou", 0.45),
    ):
        for family in ("textures_a", "textures_b"):
            assert experts[name]["scores"][family][score] > least


@pytest.mark.parametrize("name", EXPERTS)
def test_shapes_are_those_of_the_table(name: str, fresh: Drawn) -> None:
    expert, model = EXPERTS[name], open_expert(name)
    seen = []
    model.get_submodule(expert.features).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    batch = batch_of(name, fresh)[:2]
    with torch.inference_mode():
        answered = model(batch)
    (features,) = seen
    assert features.shape == (2, expert.channels, *expert.grid)
    assert answered.shape == (2, *expert.answer_shape)
    if expert.kind == "image":
        assert batch.shape[2:] == expert.sizes[0]
    assert answered.isfinite().all()


def test_the_table_names_the_file_of_the_classes() -> None:
    assert str(NETS) == nets.__file__
    assert EXPERTS["depth"].model == f"module:{nets.__file__}:DepthNet"


# --- the job's preprocessing is the one of the training -------------------------------


def test_images_are_prepared_as_a_job_prepares_them(fresh: Drawn) -> None:
    config = EXPERTS["semantics"].preprocess
    ((height, width),) = EXPERTS["semantics"].sizes
    spec = ImageSpec(
        height=height,
        width=width,
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        range=config["range"],
    )
    whole = (0.0, 0.0, 320.0, 160.0)
    prepared = spec.prepare(
        Image.fromarray(fresh.image_NHW3[0]),
        View(0, False, 0.0, 1.0, {"cam": whole}),
        "cam",
    )
    expected = spec.to_tensor(prepared[None], "cpu", torch.float32)
    torch.testing.assert_close(as_images(fresh.image_NHW3[:1]), expected)


@pytest.mark.parametrize("num", [100, 8192, 12_345])
def test_points_are_chosen_as_a_job_chooses_them(num: int) -> None:
    sweep = np.random.default_rng(num).normal(size=(num, 4)).astype(np.float32)
    config = EXPERTS["occupancy"].preprocess
    spec = PointsSpec(
        columns=tuple(config["columns"]),
        indices=(0, 1, 2, 3),
        num_points=config["points"],
    )
    np.testing.assert_array_equal(
        take_points(sweep),
        spec.prepare(
            Sweep(sweep, tuple(config["columns"])),
            View(0, False, 0.0, 1.0, {}),
            "lidar",
        ),
    )


def test_intensity_is_a_share(samples: list[DemoSample], fresh: Drawn) -> None:
    assert samples[0].points_P5[:, 3].max() > 1
    assert samples[0].points_P5[:, 3].max() <= INTENSITY_MAX
    assert fresh.points_NP4[..., 3].max() <= 1


# --- how good they are ----------------------------------------------------------------


def test_semantics_are_right(fresh: Drawn) -> None:
    logits_BCHW = answer("semantics", fresh)
    # The pixel just past the middle of each 4 x 4.
    truth_BHW = fresh.seg_NHW[:, 2::4, 2::4]
    guess_BHW = logits_BCHW.argmax(axis=1)
    assert mean_iou(truth_BHW, guess_BHW) > 0.45
    assert (truth_BHW == guess_BHW).mean() > 0.8


def test_depth_is_right(fresh: Drawn) -> None:
    metres_BHW = np.exp(answer("depth", fresh)[:, 0])
    truth_BHW = fresh.depth_NHW[:, 2::4, 2::4] / 100
    seen = truth_BHW > 0
    ratio = metres_BHW[seen] / truth_BHW[seen]
    assert ((ratio > 0.8) & (ratio < 1.25)).mean() > 0.7
    # Far better than the one depth that suits the most pixels.
    constant = np.abs(np.log(truth_BHW[seen] / np.median(truth_BHW[seen]))).mean()
    assert np.abs(np.log(ratio)).mean() < 0.4 * constant


def test_a_crop_is_called_nearer_as_it_is_seen_larger(fresh: Drawn) -> None:
    whole = answer("depth", fresh)[:, 0, 10:30, 20:60]
    cut = np.stack(
        [
            np.asarray(
                Image.fromarray(image).resize((320, 160), 2, box=(80, 40, 240, 120))
            )
            for image in fresh.image_NHW3
        ]
    )
    with torch.inference_mode():
        zoomed = np.asarray(open_expert("depth")(as_images(cut)))[:, 0]
    assert -1.0 < np.median(zoomed) - np.median(whole) < -0.4


def test_the_map_is_right_and_the_right_way_round(fresh: Drawn) -> None:
    guess = answer("occupancy", fresh).argmax(axis=1) > 0
    truth = fresh.bev_NXY > 0

    def iou(guess: NDArray[np.bool_]) -> float:
        return float((guess & truth).sum() / (guess | truth).sum())

    assert iou(guess) > 0.4
    for turned in (guess[:, ::-1], guess[:, :, ::-1], guess.transpose(0, 2, 1)):
        assert iou(guess) > iou(turned) + 0.1


@pytest.mark.parametrize(
    ("x", "y", "row", "column"),
    [(47.9, 23.9, 0, 0), (47.9, -23.9, 0, 63), (0.1, 23.9, 63, 0), (30.2, 6.2, 23, 23)],
)
def test_points_fall_into_their_cell(x: float, y: float, row: int, column: int) -> None:
    points = torch.tensor([[[x, y, 0.5, 1.0], [-5.0, 0.0, 0.0, 1.0]]])
    raster = nets.OccupancyNet().rasterise(points)[0].numpy()
    where = np.argwhere(raster.any(axis=0))
    assert (where // 2).tolist() == [[row, column]]
    # Two floors lie above: log 2 in the layer from 0 to 1 m, then intensity and height.
    expected = [0, 0, 0, 0, np.log(2), 0, 0, 1.0, 0.5]
    np.testing.assert_allclose(raster[:, *where[0]], expected, rtol=1e-6)


def test_a_wall_of_points_lights_up_its_cells(fresh: Drawn) -> None:
    points_P4 = fresh.points_NP4[0].astype(np.float32).copy()
    model = open_expert("occupancy")
    # A block 6 m wide and 2.4 m high, 15 m ahead, 4 m to the left, in place of
    # every third point.
    rng = np.random.default_rng(0)
    block_P3 = rng.uniform((15, 1, -1.5), (15.7, 7, 0.9), (len(points_P4[::3]), 3))
    with_block_P4 = points_P4.copy()
    with_block_P4[::3, :3], with_block_P4[::3, 3] = block_P3, 0.35
    pair = torch.from_numpy(np.stack([points_P4, with_block_P4]))
    with torch.inference_mode():
        without, with_block = np.asarray(model(pair).softmax(1))[:, 0]
    more = without - with_block
    inside = more[64 - 21 : 64 - 19, 32 - 9 : 32 - 2]
    mirrored = more[64 - 21 : 64 - 19, 32 + 2 : 32 + 9]
    assert inside.mean() > mirrored.mean() + 0.2


# --- views to train on ----------------------------------------------------------------


def test_a_still_map_stays(fresh: Drawn) -> None:
    bev = fresh.bev_NXY[0]
    np.testing.assert_array_equal(moved_map(bev, np.eye(2)), bev)


def test_a_mirrored_ground_mirrors_the_map(fresh: Drawn) -> None:
    bev = fresh.bev_NXY[0]
    moved = moved_map(bev, np.diag([1.0, -1.0]))
    np.testing.assert_array_equal(moved, bev[:, ::-1])


def test_a_turned_map_keeps_to_its_points() -> None:
    """One marked cell goes where its centre goes."""
    yaw, (x, y) = np.radians(15.0), (20.625, 7.125)
    cos, sin = np.cos(yaw), np.sin(yaw)
    turn = np.array([[cos, -sin], [sin, cos]])
    bev = np.zeros((BEV_CELLS, BEV_CELLS), np.uint8)
    bev[int((48 - x) / BEV_CELL_M), int((24 - y) / BEV_CELL_M)] = 2
    moved = moved_map(bev, turn)
    found = np.argwhere(moved == 2).mean(axis=0)
    x_to, y_to = turn @ (x, y)
    expected = ((48 - x_to) / BEV_CELL_M - 0.5, (24 - y_to) / BEV_CELL_M - 0.5)
    np.testing.assert_allclose(found, expected, atol=0.75)
    # What was behind the map's edge is not known.
    assert moved[-1, 0] == moved[-1, -1] or IGNORED in moved[:, 0]


def test_points_and_map_move_together(fresh: Drawn) -> None:
    """What stands where points do is on the map within a cell, in every view."""
    views = LidarViews(fresh, np.random.default_rng(1))
    points_BP4, map_BXY = (item.numpy() for item in views.batch(np.arange(16)))
    shares = []
    for points_P4, map_XY in zip(points_BP4, map_BXY, strict=True):
        x, y, z, _ = points_P4.T
        standing = (z > -1.0) & (z < 0) & (x > 1) & (x < 45) & (np.abs(y) < 22)
        row = ((48 - x[standing]) / BEV_CELL_M).astype(int)
        column = ((24 - y[standing]) / BEV_CELL_M).astype(int)
        padded = np.pad(map_XY, 1)
        around = np.max(
            [padded[row + i, column + j] for i in range(3) for j in range(3)], axis=0
        )
        shares.append((around > 0).mean())
    assert min(shares) > 0.97


def test_truth_follows_the_crop_and_the_mirror() -> None:
    """A bright patch stays where the truth says it is, whatever the view."""
    seg = np.zeros((8, 160, 320), np.uint8)
    seg[:, 40:100, 30:130] = 1
    image = np.where(seg[..., None] == 1, 200, 40).astype(np.uint8)
    drawn = Drawn(
        image_NHW3=np.broadcast_to(image, (8, 160, 320, 3)),
        seg_NHW=seg,
        depth_NHW=np.where(seg == 1, 0, 1000).astype(np.uint16),
        points_NP4=np.zeros((8, 1, 4), np.float16),
        bev_NXY=np.zeros((8, 64, 64), np.uint8),
    )
    views = CameraViews(drawn, np.random.default_rng(3))
    for _ in range(4):
        batch = views.batch(np.arange(8))
        light_BHW = nn.functional.avg_pool2d(batch.image_B3HW, 4).mean(1).numpy()
        seg_BHW = batch.seg_BHW.numpy()
        assert (np.isnan(batch.log_depth_BHW.numpy()) == (seg_BHW == 1)).all()
        for light_HW, seg_HW in zip(light_BHW, seg_BHW, strict=True):
            middle = (light_HW.max() + light_HW.min()) / 2
            if 0 < seg_HW.sum() < seg_HW.size:
                assert ((light_HW > middle) == (seg_HW == 1)).mean() > 0.95


def test_depth_of_a_crop_is_that_of_its_zoom() -> None:
    plain = Drawn(
        image_NHW3=np.zeros((64, 160, 320, 3), np.uint8),
        seg_NHW=np.zeros((64, 160, 320), np.uint8),
        depth_NHW=np.full((64, 160, 320), 2000, np.uint16),
        points_NP4=np.zeros((64, 1, 4), np.float16),
        bev_NXY=np.zeros((64, 64, 64), np.uint8),
    )
    views = CameraViews(plain, np.random.default_rng(5))
    metres = views.batch(np.arange(64)).log_depth_BHW.exp().numpy()[:, 0, 0]
    # Whole images keep 20 m; crops of at least 0.4 of the area shrink it by its root.
    assert (np.abs(metres - 20) < 1e-3).mean() > 0.3
    assert metres.min() > 20 * np.sqrt(0.4) * 0.95
    assert metres.min() < 16
    assert metres.max() < 20.001


# --- scores ---------------------------------------------------------------------------


def test_iou_of_a_small_case() -> None:
    truth, guess = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    counts = confusion(truth, guess, 3)
    assert counts.tolist() == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    np.testing.assert_allclose(class_iou(counts), [1 / 3, 2 / 4, np.nan])


class Constant(nn.Module):
    """Answers the same whatever it is shown."""

    def __init__(self, values: list[float], size: tuple[int, int]) -> None:
        super().__init__()
        self.answer = torch.tensor(values)[:, None, None].expand(-1, *size)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.answer.expand(len(batch), *self.answer.shape)


def test_scores_of_constant_answers(fresh: Drawn) -> None:
    depth = depth_scores(Constant([float(np.log(12.0))], (40, 80)), fresh)
    truth = fresh.depth_NHW[fresh.depth_NHW > 0] / 100
    near = (truth < 12 * 1.25) & (truth > 12 / 1.25)
    assert depth["delta1"] == pytest.approx(near.mean(), abs=1e-4)
    all_structure = Constant([0.0, 1.0, 0.0, 0.0, 0.0], (64, 64))
    scores = occupancy_scores(all_structure, fresh)
    assert scores["occupied_iou"] == pytest.approx((fresh.bev_NXY > 0).mean())
    assert scores["iou_structure"] == pytest.approx((fresh.bev_NXY == 1).mean())


# --- the training itself --------------------------------------------------------------


def test_rarer_classes_weigh_more() -> None:
    weights = train.class_weights(np.array([0] * 75 + [1] * 25), 2).numpy()
    np.testing.assert_allclose(weights[1] / weights[0], np.sqrt(3), rtol=1e-5)
    np.testing.assert_allclose(weights.mean(), 1, rtol=1e-6)


def test_log_error_of_a_small_case() -> None:
    """Nothing counts in the sky, neither there nor in steps to it."""
    truth = torch.tensor([[[1.0, 2.0], [3.0, float("nan")]]])
    guess = torch.tensor([[[1.5, 2.0], [2.0, 9.0]]], requires_grad=True)
    loss = train.log_error(guess, truth)
    # Errors 0.5, 0, -1; one step down of -1.5, one across of -0.5.
    assert loss.item() == pytest.approx(1.5 / 3 + 0.5 * (1.5 + 0.5))
    loss.backward()
    assert guess.grad is not None
    assert guess.grad.isfinite().all()
    assert guess.grad[0, 1, 1] == 0


def test_depth_starts_from_semantics_where_it_can() -> None:
    semantics, depth = nets.SemanticsNet(), nets.DepthNet()
    head = depth.pyramid.coarse[0].weight.clone()
    train.start_from(depth, semantics)
    assert torch.equal(depth.stem[1][0].weight, semantics.stem[1][0].weight)
    assert torch.equal(depth.pyramid.features.bias, semantics.pyramid.features.bias)
    assert torch.equal(depth.pyramid.coarse[0].weight, head)


def test_half_of_the_weighting_is_taken_back() -> None:
    torch.manual_seed(0)
    model = nets.OccupancyNet().eval()
    points = torch.rand(1, 500, 4) * 20
    weights = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0])
    with torch.inference_mode():
        before = model(points).softmax(1).numpy()
        train.take_back(model, weights)
        after = model(points).softmax(1).numpy()
    share = before / np.sqrt(weights.numpy())[:, None, None]
    np.testing.assert_allclose(after, share / share.sum(1, keepdims=True), rtol=1e-4)


def test_training_writes_what_is_shipped(tmp_path) -> None:
    arguments = ["--scenes", "6", "--held-out", "2", "--speed", "1000"]
    assert train.main([str(tmp_path), *arguments]) == 0
    assert set(json.loads((tmp_path / "experts.json").read_text())) == set(
        json.loads(REPORT.read_text())
    )
    for name, expert in EXPERTS.items():
        made = load_file(tmp_path / f"{name}.safetensors")
        shipped = load_file(expert.weights)
        assert {key: (item.shape, item.dtype) for key, item in made.items()} == {
            key: (item.shape, item.dtype) for key, item in shipped.items()
        }


def test_an_unusable_seed_is_refused(tmp_path, capsys) -> None:
    assert train.main([str(tmp_path), "--seed", "-1", "--scenes", "1"]) == 2
    assert "error: " in capsys.readouterr().err


def test_classes_are_those_of_the_scenes() -> None:
    assert EXPERTS["semantics"].answer_shape[0] == len(CLASSES)
    assert EXPERTS["occupancy"].answer_shape[0] == len(BEV_CLASSES)
