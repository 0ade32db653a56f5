"""The detector's parts by numbers: targets and back, losses, pillars, peaks, batch norm, files, ONNX."""

import dataclasses
import io
import pickle

import numpy as np
import onnxruntime
import polars as pl
import pytest
import torch

from stages.lib import augment, detector, onnx_model, targets, training
from stages.lib.dataset import BOX
from stages.lib.detector import Architecture, Detector, Net
from stages.lib.errors import ConfigError, DataError
from stages.lib.targets import CODE_SIZE, Wanted

ARCH = Architecture(
    classes=("vehicle.car", "human.pedestrian.adult"), range_m=(-16.0, -8.0, -1.0, 16.0, 8.0, 4.0), pillar_m=0.5,
    num_sweeps=2, ego_box_m=(-1.0, -1.0, 1.0, 1.0), intensity=True, pillar_channels=8, stages=(8, 8, 8),
    convs_per_stage=1, neck_channels=8, bn_momentum=0.1, nms_radius_m=(2.0, 0.5), min_score=0.1, max_boxes=50)
GRID = ARCH.grid  # 32 columns along x, 16 rows along y, 1 m each
RECIPE = training.Recipe(
    seed=3, device="cpu", num_devices=1, threads=1, steps=10, batch_size=2, lr=0.01, warmup_ratio=0.4,
    weight_decay=0.01, max_gradient_norm=10.0, code_weight=0.25, velocity_weight=0.2, bn_batches=2, flip=True,
    max_yaw_rad=0.4, max_scale_ratio=0.05)


def wanted(boxes: np.ndarray, ignored: tuple[int, ...] = (), label: int = 0, background: float = 1.0) -> Wanted:
    return Wanted(boxes, np.full(len(boxes), label), np.ones(len(boxes)), np.isin(np.arange(len(boxes)), ignored),
                  background)


def box(x_m: float, y_m: float, length_m: float = 4.0, width_m: float = 2.0) -> list[float]:
    return [x_m, y_m, 0.8, length_m, width_m, 1.5, 0.3, 5.0, -1.0]


def spread_boxes(seed: int) -> np.ndarray:
    """30 boxes at least 3 m apart, all over the grid and its negative half."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(-14.0, 15.0, 4.5), np.arange(-6.0, 7.0, 4.0))
    xy = np.stack([x.ravel(), y.ravel()], 1) + rng.uniform(-0.5, 0.5, (x.size, 2))
    return np.column_stack([xy, rng.uniform(-0.5, 2, len(xy)), rng.uniform(0.4, 12, (len(xy), 3)),
                            rng.uniform(-np.pi, np.pi, len(xy)), rng.normal(0, 8, (len(xy), 2))])


def cloud(num_points: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(-18, 18, num_points), rng.uniform(-9, 9, num_points),
                            rng.uniform(-1.5, 4.5, num_points), rng.uniform(0, 255, num_points),
                            rng.choice([0, 0.1], num_points)]).astype(np.float32)


@pytest.fixture(scope="module")
def model() -> Detector:
    with detector.reproducible(1, seed=0):
        net = Net(ARCH)
        detector.recalibrate_bn(net, [training.collate([ARCH.crop(cloud(4000, seed))]) for seed in range(3)])
        return Detector(ARCH, net, {"dataset_digest": "d" * 64})


# targets ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_boxes_made_to_targets_and_read_as_outputs_are_the_same_boxes(seed):
    boxes = spread_boxes(seed)
    made = targets.make(wanted(boxes, label=1), 2, GRID)
    code = np.zeros((CODE_SIZE, GRID.height * GRID.width), np.float32)
    code[:, made.cells] = made.code.T
    found, labels, scores = detector.peaks(made.heat, code.reshape(CODE_SIZE, GRID.height, GRID.width), ARCH)
    assert len(found) == len(boxes)
    assert set(labels) == {1}
    assert (scores == 1).all()
    nearest = np.hypot(*(found[:, None, :2] - boxes[None, :, :2]).transpose(2, 0, 1)).argmin(0)
    difference = found[nearest] - boxes
    difference[:, 6] = (difference[:, 6] + np.pi) % (2 * np.pi) - np.pi
    assert np.abs(difference).max() < 1e-3


def test_a_cell_is_counted_from_the_grids_corner_x_first():
    cells, code = targets.encode(np.array([box(-15.75, -7.0), box(0.5, 7.25)]), GRID)
    assert cells.tolist() == [1 * 32 + 0, 15 * 32 + 16]
    np.testing.assert_allclose(code[:, :2], [[0.25, 0.0], [0.5, 0.25]])


def test_boxes_outside_the_grid_have_no_target_not_even_just_below_its_corner():
    inside = [box(-16.0, -8.0), box(15.99, 7.99)]
    outside = [box(-16.4, 0), box(-16.01, -8.01), box(0, -8.01), box(16.0, 0), box(0, 8.0)]
    made = targets.make(wanted(np.array(inside + outside)), 2, GRID)
    assert made.cells.tolist() == [0, 16 * 32 - 1]
    assert (made.heat == 1).sum() == 2
    assert (made.heat_weight == 1).all()


def test_heat_is_one_at_the_box_falls_off_and_stays_in_its_class():
    made = targets.make(wanted(np.array([box(0.5, 0.5), box(2.5, 0.5)])), 2, GRID)
    row = made.heat[0, 8, 13:22]
    assert row[3] == row[5] == 1
    sigma = (2 * targets.MIN_RADIUS_CELLS + 1) / 6
    assert row[2] == row[6] == row[4] == pytest.approx(np.exp(-1 / (2 * sigma**2)))
    assert row[0] == row[8] == 0
    assert not made.heat[1].any()


@pytest.mark.parametrize(("length", "width"), [(4.0, 2.0), (12.0, 2.5), (10.0, 10.0), (60.0, 12.0)])
def test_corners_off_by_the_radius_leave_the_least_overlap(length, width):
    radius = float(targets.gaussian_radius(np.array([length]), np.array([width]))[0])
    area = length * width

    def overlaps(r: float) -> list[float]:
        moved = (length - r) * (width - r)
        return [moved / (2 * area - moved), (length - 2 * r) * (width - 2 * r) / area,
                area / ((length + 2 * r) * (width + 2 * r))]

    assert min(overlaps(radius)) == pytest.approx(targets.MIN_OVERLAP)
    assert min(overlaps(radius * 0.9)) > targets.MIN_OVERLAP


def test_around_an_ignored_box_no_cell_counts_but_a_neighbours_own():
    # A box of 4 x 2 m reaches 2.24 m; cells count by their centres. The wanted box's cell is 1 m from the ignored one.
    made = targets.make(wanted(np.array([box(0.5, 0.5), box(1.5, 0.5)]), ignored=(0,)), 2, GRID)
    assert made.heat_weight[0, 8, 12:22].tolist() == [1, 1, 0, 0, 0, 1, 0, 1, 1, 1]
    assert made.heat_weight[1].all()
    assert made.cells.tolist() == [8 * 32 + 17]
    assert len(made.code) == len(made.code_weight) == 1


def test_background_weighs_what_the_labels_say():
    made = targets.make(wanted(np.array([box(0.5, 0.5)]), background=0.25), 2, GRID)
    assert made.heat_weight[0, 8, 16] == 1
    assert (np.delete(made.heat_weight[0].ravel(), 8 * 32 + 16) == 0.25).all()


# losses -------------------------------------------------------------------------------------------------------------
def outputs(made: targets.Targets, logit: float = 20.0) -> tuple[torch.Tensor, torch.Tensor]:
    heat = torch.from_numpy(np.where(made.heat == 1, logit, -logit))[None].float()
    code = torch.zeros(1, CODE_SIZE, GRID.height * GRID.width)
    code[0][:, made.cells] = torch.from_numpy(made.code.T)
    return heat, code.view(1, CODE_SIZE, GRID.height, GRID.width)


def test_the_right_outputs_cost_nothing():
    made = targets.make(wanted(spread_boxes(0)), 2, GRID)
    assert all(float(value) < 1e-4 for value in targets.losses(*outputs(made), [made]).values())


def test_heat_costs_what_the_paper_says_by_hand():
    made = targets.make(wanted(np.array([box(0.5, 0.5)])), 2, GRID)
    heat, code = outputs(made)
    heat[0, 0, 8, 16] = 0.0  # the peak at p = 0.5: -(1 - p)^2 log p
    heat[0, 0, 8, 17] = 0.0  # beside it, y = exp(-1 / (2 sigma^2)): -(1 - y)^4 p^2 log(1 - p)
    y = np.exp(-1 / (2 * (5 / 6) ** 2))
    assert float(targets.losses(heat, code, [made])["heat"]) == pytest.approx(
        0.25 * np.log(2) + (1 - y) ** 4 * 0.25 * np.log(2), abs=1e-4)


def test_box_terms_are_means_over_wanted_boxes_by_weight_and_unknown_velocity_is_free():
    boxes = np.array([box(0.5, 0.5), box(8.5, 0.5)])
    boxes[1, 7:] = np.nan
    made = targets.make(dataclasses.replace(wanted(boxes), weights=np.array([1.0, 0.5])), 2, GRID)
    heat, code = outputs(made)
    code = code.nan_to_num()
    code[0, 2] += 0.3   # z off by 0.3 m at both
    code[0, 8] += 2.0   # vx off by 2 m/s at both, known at the first
    parts = targets.losses(heat, code, [made])
    assert float(parts["z"]) == pytest.approx(0.3)
    assert float(parts["velocity"]) == pytest.approx(2.0 / 1.5)
    assert float(parts["offset"]) == pytest.approx(0, abs=1e-6)


# augmentation -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mirror_x", [False, True])
@pytest.mark.parametrize("mirror_y", [False, True])
def test_points_stay_where_they_are_in_their_box(mirror_x, mirror_y):
    rng = np.random.default_rng(1)
    boxes = np.array([box(9.0, -4.0), box(-3.0, 2.0)])
    ahead_m, left_m = rng.uniform(-2, 2, 20), rng.uniform(-1, 1, 20)

    def inside(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
        x, y = (points[:, :2] - boxes[0, :2]).T
        cos, sin = np.cos(boxes[0, 6]), np.sin(boxes[0, 6])
        return np.stack([cos * x + sin * y, -sin * x + cos * y, points[:, 2] - boxes[0, 2]], 1)

    cos, sin = np.cos(0.3), np.sin(0.3)
    points = np.zeros((20, 5), np.float32)
    points[:, 0], points[:, 1] = 9 + cos * ahead_m - sin * left_m, -4 + sin * ahead_m + cos * left_m
    moved, moved_boxes = augment.move(augment.Motion(mirror_x, mirror_y, 0.7, 1.1), points, boxes)
    handed = -1 if mirror_x != mirror_y else 1
    expected = inside(boxes, points) * [1.1, 1.1 * handed, 1.1]
    np.testing.assert_allclose(inside(moved_boxes, moved), expected, atol=1e-4)
    np.testing.assert_allclose(moved_boxes[:, 3:6], boxes[:, 3:6] * 1.1)


def test_velocity_turns_with_the_box():
    boxes = np.array([box(9.0, -4.0)])
    boxes[0, 6:] = [0.3, 6 * np.cos(0.3), 6 * np.sin(0.3)]
    for motion in (augment.Motion(False, True, 1.0, 0.9), augment.Motion(True, False, -2.0, 0.9)):
        _, moved = augment.move(motion, cloud(5, 0), boxes)
        np.testing.assert_allclose(moved[0, 7:], 5.4 * np.array([np.cos(moved[0, 6]), np.sin(moved[0, 6])]))


# the net ------------------------------------------------------------------------------------------------------------
def test_points_out_of_range_change_nothing(model):
    points = cloud(4000, 7)
    inner = ARCH.crop(points)
    assert 0 < len(inner) < len(points)
    heat, code = (model.net(*training.collate([some])) for some in (points, inner))
    for a, b in zip(heat, code):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_samples_of_a_batch_do_not_see_each_other(model):
    clouds = [ARCH.crop(cloud(n, n)) for n in (3000, 1000)]
    both = model.net(*training.collate(clouds))
    for index, one in enumerate(clouds):
        for together, alone in zip(both, model.net(*training.collate([one]))):
            torch.testing.assert_close(together[index], alone[0], rtol=0, atol=1e-5)


def test_a_pillar_is_the_maximum_over_its_own_points(model):
    points = np.array([[0.1, 0.1, 0, 0, 0], [0.2, 0.4, 2, 90, 0], [-0.1, 0.1, 1, 0, 0]], np.float32)
    with torch.no_grad():
        both = model.net.pillars(*training.collate([points]))[0]
        alone = model.net.pillars(*training.collate([points[2:]]))[0]
    assert set(map(tuple, torch.nonzero(both.abs().sum(0)).tolist())) <= {(16, 32), (16, 31)}
    torch.testing.assert_close(both[:, 16, 31], alone[:, 16, 31])
    assert not alone[:, 16, 32].any()


def test_a_point_is_seen_from_its_pillars_mean_and_centre_and_nowhere_else(model):
    # One pillar of 0.5 m with its centre at (0.25, 0.25); the second cloud is the same 3 m further and 2 m to the left.
    points = np.array([[0.1, 0.1, 0, 51, 0], [0.3, 0.4, 2, 102, 0.1]], np.float32)
    shifted = points + np.array([3, 2, 0, 0, 0], np.float32)
    seen = []
    handle = model.net.pillars.linear.register_forward_pre_hook(lambda _module, rows: seen.append(rows[0]))
    for some in (points, shifted):
        model.net.pillars(*training.collate([some]))
    handle.remove()
    expected = torch.tensor([[0, 0, 0.2, -0.1, -0.15, -1, -0.15, -0.15], [2, 1, 0.4, 0.1, 0.15, 1, 0.05, 0.15]])
    for rows in seen:
        torch.testing.assert_close(rows, expected, rtol=0, atol=1e-5)


def test_detections_fall_in_score_and_keep_their_distance(model):
    found = model.detect(cloud(4000, 2))
    assert found.columns == ["category", *BOX, "score"]
    assert 0 < len(found) <= ARCH.max_boxes
    assert found["score"].is_sorted(descending=True)
    assert found["score"].min() >= ARCH.min_score
    assert np.isfinite(found.select(*BOX).to_numpy()).all()
    for name, radius_m in zip(ARCH.classes, ARCH.nms_radius_m):
        xy = found.filter(pl.col("category") == name).select("x_m", "y_m").to_numpy()
        apart = np.hypot(*(xy[:, None] - xy[None]).transpose(2, 0, 1)) + 99 * np.eye(len(xy))
        assert apart.min(initial=99) >= radius_m


def test_of_two_near_centres_the_better_one_stays_within_its_class():
    xy = np.array([[0.0, 0.0], [1.9, 0.0], [3.8, 0.0], [0.1, 0.0]])
    assert detector.thin(xy, np.array([0, 0, 0, 1]), (2.0, 0.5)).tolist() == [0, 2, 3]


def test_no_point_at_all_is_no_error(model):
    assert model.detect(np.empty((0, 5), np.float32)).columns == ["category", *BOX, "score"]


def test_recalibrated_batch_norm_holds_the_mean_over_the_batches():
    with detector.reproducible(1, seed=1):
        net = Net(ARCH)
    batches = [training.collate([ARCH.crop(cloud(2000, seed))]) for seed in (1, 2)]
    net(*batches[0])  # a moving average that must not matter
    detector.recalibrate_bn(net, batches)
    means = []
    with torch.no_grad():
        for points, _, _ in batches:
            hooked = []
            handle = net.pillars.linear.register_forward_hook(lambda _m, _i, out, seen=hooked: seen.append(out.mean(0)))
            net(points, torch.zeros(len(points), dtype=torch.int64), 1)
            handle.remove()
            means.append(hooked[0])
    torch.testing.assert_close(net.pillars.norm.running_mean, (means[0] + means[1]) / 2)
    assert net.pillars.norm.momentum == ARCH.bn_momentum
    assert not net.training


def test_reproducible_puts_back_what_it_changed():
    torch.manual_seed(5)
    before = torch.get_num_threads(), torch.get_deterministic_debug_mode(), torch.random.get_rng_state()
    draws = []
    for threads in (1, before[0] + 1):
        with detector.reproducible(threads, seed=0):
            assert torch.get_num_threads() == threads
            assert torch.are_deterministic_algorithms_enabled()
            draws.append(float(torch.rand(1)))
    assert draws[0] == draws[1]
    assert (torch.get_num_threads(), torch.get_deterministic_debug_mode()) == before[:2]
    assert torch.equal(torch.random.get_rng_state(), before[2])


# learning -----------------------------------------------------------------------------------------------------------
def test_an_epoch_visits_every_sample_once_in_an_order_of_its_own():
    seen = [place for step in range(7) for place in training.draw(0, 7, 2, step)]
    epochs = [[index for epoch, index in seen if epoch == wanted] for wanted in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]
    assert training.draw(0, 7, 2, 3) == seen[6:8]
    assert [training.draw(1, 7, 7, 0)] != [training.draw(0, 7, 7, 0)]


def test_the_rate_rises_from_a_tenth_to_its_peak_and_falls_to_nothing():
    rates = [training.one_cycle(step, RECIPE) for step in range(11)]
    assert rates[0] == pytest.approx((0.001, 0.95))
    assert rates[4] == pytest.approx((0.01, 0.85))
    assert rates[10] == pytest.approx((1e-6, 0.95))
    assert (np.diff([rate for rate, _ in rates[:5]]) > 0).all()
    assert (np.diff([rate for rate, _ in rates[4:]]) < 0).all()
    assert training.one_cycle(0, dataclasses.replace(RECIPE, steps=1, warmup_ratio=0.0))[0] == 0.01


# files --------------------------------------------------------------------------------------------------------------
def test_a_saved_model_finds_the_same_boxes_and_says_what_it_is(model, tmp_path):
    detector.save(model, tmp_path / "model.pt")
    loaded = detector.load(tmp_path / "model.pt")
    assert loaded.arch == ARCH
    assert loaded.provenance == {"dataset_digest": "d" * 64}
    assert loaded.detect(cloud(4000, 2)).equals(model.detect(cloud(4000, 2)))


def test_a_models_bytes_do_not_depend_on_where_it_is_saved(model, tmp_path):
    detector.save(model, tmp_path / "model.pt")
    detector.save(model, tmp_path / "other name.bin")
    assert (tmp_path / "model.pt").read_bytes() == (tmp_path / "other name.bin").read_bytes()


def test_what_is_no_model_is_refused_in_two_lines_and_never_executed(model, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    evil = io.BytesIO()
    torch.save({"format": 1, "architecture": Evil()}, evil)
    detector.save(model, tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    newer = io.BytesIO()
    torch.save({"format": 2}, newer)
    for content in (b"", b"no model", whole[:len(whole) // 2], pickle.dumps(Evil(), protocol=2), evil.getvalue(),
                    newer.getvalue()):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(DataError, match=r"bad.pt: not a model of this program \(.*\)\n  .* `dvc repro train`"):
            detector.load(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()


def test_onnx_gives_what_torch_gives_for_any_number_of_points(model, tmp_path):
    onnx_model.export(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for num_points in (1, 37, 5000):
        points = cloud(num_points, num_points)
        heat, code = session.run(None, {"points": points})
        with torch.no_grad():
            wanted_heat, wanted_code = model.net(*training.collate([points]))
        assert heat.shape == (2, GRID.height, GRID.width)
        assert not model.net.training
        assert np.abs(heat - wanted_heat[0].sigmoid().numpy()).max() < 1e-4
        assert np.abs(code - wanted_code[0].numpy()).max() < 1e-4
    about = session.get_modelmeta().custom_metadata_map
    assert about["classes"] == "vehicle.car,human.pedestrian.adult"
    assert about["code"] == "offset:2,z:1,size:3,heading:2,velocity:2"
    assert (about["x_min_m"], about["y_min_m"], about["cell_m"]) == ("-16.0", "-8.0", "1.0")
    assert about["dataset_digest"] == "d" * 64


def test_onnx_has_the_same_bytes_twice(model, tmp_path):
    for name in ("a.onnx", "b.onnx"):
        onnx_model.export(model, tmp_path / name)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# settings -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("changes", "text"), [
    ({"pillar_m": 0.6}, r"train.range_m -16..16 m along x is 53.3333 pillars of 0.6 m, expected a multiple of 8"),
    ({"range_m": (-16.0, -9.0, -1.0, 16.0, 9.0, 4.0)}, r"-9..9 m along y is 36 pillars of 0.5 m.*\n  change train"),
    ({"range_m": (16.0, -8.0, -1.0, -16.0, 8.0, 4.0)}, r"16..-16 m along x is -64 pillars"),
    ({"range_m": (-16.0, -8.0, 4.0, 16.0, 8.0, 4.0)}, r"train.range_m 4..4 m along z is empty"),
    ({"nms_radius_m": (2.0,)}, r"train.nms_radius_m has 1 values for 2 classes, expected one for each of train.cl"),
    ({"classes": (), "nms_radius_m": ()}, r"train.classes and train.stages need at least one value each"),
])
def test_settings_that_make_no_net_are_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        dataclasses.replace(ARCH, **changes)
