"""HSSDA: scores, thresholds and levels, quadrant shuffles, teacher and trainer."""

import copy
import math
from itertools import permutations

import numpy as np
import pytest
import torch
from clouds import random_boxes, random_points
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.shuffles.hssda import (
    BEVDetector,
    Detections,
    HSSDATrainer,
    PseudoLabeller,
    Targets,
    bev_areas,
    consistency_score,
    dual_threshold,
    ema_keep,
    ema_update,
    move_areas,
    points_in_boxes,
    pseudo_targets,
    remove_points,
    rotated_iou_bev,
    seam,
    shuffle_bev_map,
    shuffle_bev_points,
    split_supervision,
    transform_boxes,
    unshuffle_bev_indices,
    unshuffle_bev_map,
)
from shuffle_nb.shuffles.point_clouds import (
    global_view,
    inside_boxes,
    nms_bev,
    random_quadrants,
    rasterise,
    two_means,
)

PERMS = st.permutations(range(4))
SEEDS = st.integers(0, 10_000)
ALL_PERMS = list(permutations(range(4)))


def in_range(points: torch.Tensor) -> torch.Tensor:
    x, y = points[..., 0], points[..., 1]
    return (x >= 0) & (x < 70.4) & (y >= -40) & (y < 40)


# ---------------------------------------------------------------- transform, consistency


@settings(deadline=None)
@given(SEEDS, st.booleans(), st.floats(-0.8, 0.8), st.floats(0.95, 1.05))
def test_consistency_of_an_equivariant_teacher_is_one(seed, flip, rotation, scale):
    boxes, transform = random_boxes(6, seed), dict(flip_y=flip, rotation=rotation, scale=scale)
    aug_boxes = transform_boxes(boxes, **transform)
    score = consistency_score(boxes, aug_boxes.flip(0), transform)
    assert torch.allclose(score, torch.ones(6).double(), atol=1e-9)
    assert (consistency_score(boxes, aug_boxes[:0], transform) == 0).all()
    assert consistency_score(boxes[:0], aug_boxes, transform).shape == (0,)


def test_consistency_is_the_largest_overlap():
    box = torch.tensor([[5.0, 0, 0, 2, 2, 2, 0]])
    others = box.repeat(3, 1)
    others[:, 0] += torch.tensor([1.5, 0.5, 30])
    assert consistency_score(box, others, {}).item() == pytest.approx(3 / 5)


# ---------------------------------------------------------------- thresholds and levels


def squares(scores: np.ndarray, centres) -> float:
    return np.minimum(*[(scores - float(c)) ** 2 for c in centres]).sum()


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(3, 60), st.booleans())
def test_two_means_is_at_least_as_good_as_kmeans(seed, n, coarse):
    scores = torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = (scores * 5).round() / 5 if coarse else scores
    centres = two_means(scores)
    assert centres[0] >= centres[1]
    if len(scores.unique()) > 1:
        fitted = KMeans(2, n_init=3, random_state=0).fit(scores.numpy()[:, None])
        assert squares(scores.numpy(), centres) <= fitted.inertia_ + 1e-9
        best = min(
            squares(scores.numpy(), (part.mean(), rest.mean()))
            for k in range(1, n)
            for part, rest in [scores.sort().values.tensor_split([k])]
        )
        assert squares(scores.numpy(), centres) == pytest.approx(best, abs=1e-12)


def test_two_means_equals_kmeans_where_groups_are_apart():
    g = np.random.default_rng(0)
    scores = np.concatenate([g.normal(0.2, 0.02, 40), g.normal(0.8, 0.02, 25)])
    fitted = np.sort(
        KMeans(2, n_init=3, random_state=0).fit(scores[:, None]).cluster_centers_[:, 0]
    )
    high, low = two_means(torch.from_numpy(scores))
    assert [low.item(), high.item()] == pytest.approx(fitted, abs=1e-9)


def test_many_pools_at_once_are_the_single_pools():
    scores, valid = torch.rand(4, 30), torch.rand(4, 30) > 0.4
    high, low = two_means(scores, valid)
    for pool in range(4):
        one = two_means(scores[pool][valid[pool]])
        assert torch.allclose(torch.stack([high[pool], low[pool]]), torch.stack(one), atol=1e-12)


@given(st.lists(st.floats(0, 1, width=32), min_size=3, max_size=30), st.randoms())
def test_thresholds_do_not_depend_on_the_order(values, random):
    mixed = values.copy()
    random.shuffle(mixed)
    high, low = dual_threshold(torch.tensor(values))
    assert (high, low) == dual_threshold(torch.tensor(mixed))
    assert 0 <= low <= high <= 1
    assert high == math.floor(high * 100 + 0.5) / 100


@pytest.mark.parametrize("value", [0.29, 0.57, 0.58, 1.0, 0.0, 1e-5, 0.995, 0.28999])
def test_equal_scores_give_equal_thresholds_cut_to_two_decimals(value):
    expected = math.floor(round(value * 1e6) / 1e4) / 100
    for dtype in (torch.float32, torch.float64):
        assert dual_threshold(torch.full((7,), value, dtype=dtype)) == (expected, expected)


def test_two_scores_or_fewer_give_the_default():
    assert dual_threshold(torch.tensor([0.1, 0.9])) == (0.99, 0.99)
    assert dual_threshold(torch.tensor([]), (0.95, 0.9)) == (0.95, 0.9)
    assert dual_threshold(torch.tensor([0.1, 0.2, 0.9])) == (0.9, 0.15)


@settings(deadline=None)
@given(SEEDS)
def test_levels_partition_and_never_fall_when_scores_rise(seed):
    g = torch.Generator().manual_seed(seed)
    thresholds = torch.rand(3, 3, 2, generator=g).sort(-1, descending=True).values / 1.5
    scores, labels = torch.rand(100, 3, generator=g), torch.randint(3, (100,), generator=g)
    counts = torch.randint(0, 12, (100,), generator=g)
    level, weight = split_supervision(scores, labels, thresholds, counts, no_middle=(1,))
    assert set(level.tolist()) <= {0, 1, 2}
    for i in range(100):
        above = [bool((scores[i] > thresholds[labels[i], :, k]).all()) for k in (0, 1)]
        high = above[0] and counts[i] > 5
        middle = above[1] and not high and labels[i] != 1
        assert level[i] == (2 if high else int(middle))
    assert (weight[level == 2] == 1).all() and (weight[level == 0] == 0).all()
    soft = level == 1
    assert torch.allclose(weight[soft], (scores[:, 0] * scores[:, 1])[soft])
    assert ((weight[soft] > 0) & (weight[soft] <= 1)).all()
    raised = scores + (1 - scores) * torch.rand(100, 3, generator=g)
    assert (split_supervision(raised, labels, thresholds, counts, 5, (1,))[0] >= level).all()


# ---------------------------------------------------------------- shuffles


@settings(deadline=None)
@given(SEEDS, PERMS, st.sampled_from([torch.float32, torch.float64]))
def test_point_shuffle_is_undone_by_the_inverse(seed, perm, dtype):
    points = random_points(300, seed, dtype=dtype)
    inside, inverse = points[in_range(points)], torch.tensor(perm).argsort()
    moved = shuffle_bev_points(points, perm)
    assert len(moved) == len(inside) and in_range(moved).all()
    assert torch.equal(moved[:, 2:], inside[:, 2:])
    assert torch.allclose(shuffle_bev_points(moved, inverse), inside, atol=1e-5, rtol=0)
    # Each point keeps its place within its area, and goes to the area that perm names.
    areas = bev_areas().to(dtype)

    def area_of(p):
        hits = (p[:, :1] >= areas[:, 0]) & (p[:, :1] < areas[:, 1])
        hits &= (p[:, 1:2] >= areas[:, 2]) & (p[:, 1:2] < areas[:, 3])
        assert (hits.sum(1) == 1).all()
        return hits.int().argmax(1)

    before, after = area_of(inside), area_of(moved)
    assert torch.equal(torch.tensor(perm)[before], after)
    from_corner = [p[:, :2] - areas[a][:, 0::2] for p, a in ((inside, before), (moved, after))]
    assert torch.allclose(*from_corner, atol=1e-5)
    assert torch.equal(shuffle_bev_points(points, [0, 1, 2, 3]), inside)


def test_points_at_the_edge_of_an_area_stay_in_their_new_area():
    edge = np.nextafter(np.float32(35.2), np.float32(0))
    top = np.nextafter(np.float32(0), np.float32(-1))
    points = torch.tensor([[edge, top, 0.0], [edge, 39.999996, 0], [70.39999, top, 0], [0, -40, 0]])
    for perm in ALL_PERMS:
        moved = shuffle_bev_points(points, perm)
        assert len(moved) == 4 and len(shuffle_bev_points(moved, [3, 2, 1, 0])) == 4
        back = shuffle_bev_points(moved, torch.tensor(perm).argsort())
        assert torch.allclose(back, points, atol=1e-5)


def test_a_batch_of_clouds_keeps_its_shape_and_drops_by_nan():
    points = random_points(600, 1).view(3, 200, 4)
    perms = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
    moved = shuffle_bev_points(points, perms)
    assert moved.shape == points.shape
    assert torch.equal(moved.isnan().all(-1), ~in_range(points))
    for cloud, perm, own in zip(points, perms, moved, strict=True):
        assert torch.equal(own[~own.isnan().any(-1)], shuffle_bev_points(cloud, perm))
    shared = shuffle_bev_points(points, perms[1])
    assert torch.equal(
        shared[2].nan_to_num(-1), shuffle_bev_points(points[2:], perms[1])[0].nan_to_num(-1)
    )


@settings(deadline=None, max_examples=30)
@given(SEEDS, PERMS, st.integers(1, 6), st.integers(1, 6))
def test_rasterising_commutes_with_shuffling(seed, perm, half_rows, half_columns):
    rows, columns = 2 * half_rows, 2 * half_columns
    x_range, y_range = (0.0, float(columns)), (-float(half_rows), float(half_rows))
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(columns, (80,), generator=g) + 0.5
    y = torch.randint(rows, (80,), generator=g) + 0.5 - half_rows
    points = torch.stack([x, y, torch.rand(80, generator=g)], dim=1).double()
    plain = rasterise(points, (rows, columns), x_range, y_range)
    assert plain.sum() == 80
    moved = shuffle_bev_points(points, perm, x_range, y_range)
    there = shuffle_bev_map(plain[None, None], perm)
    assert torch.equal(rasterise(moved, (rows, columns), x_range, y_range), there[0, 0])
    # And sparse indices of the shuffled map go back to the plain one.
    cells = there[:, 0].nonzero().int()
    home = unshuffle_bev_indices(cells, perm, (rows, columns)).long()
    assert torch.equal(plain[home[:, 1], home[:, 2]], there[:, 0][tuple(cells.long().T)])


@settings(deadline=None)
@given(SEEDS, st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))
def test_map_shuffle_moves_blocks_and_is_exactly_undone(seed, batch, half_rows, half_columns):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 999, (batch, 3, 2 * half_rows, 2 * half_columns), generator=g)
    perms = random_quadrants(batch, g)
    moved = shuffle_bev_map(x, perms)
    assert torch.equal(unshuffle_bev_map(moved, perms), x)
    assert torch.equal(shuffle_bev_map(unshuffle_bev_map(x, perms), perms), x)
    low, high = slice(None, half_rows), slice(half_rows, None)
    near, far = slice(None, half_columns), slice(half_columns, None)
    blocks = [(low, far), (high, far), (high, near), (low, near)]
    for own, after, perm in zip(x, moved, perms, strict=True):
        for area, target in enumerate(perm.tolist()):
            assert torch.equal(own[:, *blocks[area]], after[:, *blocks[target]])
        assert torch.equal(shuffle_bev_map(own[None], perm)[0], after)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_map_shuffle_of_any_type_and_layout(dtype):
    x = torch.randint(0, 2, (2, 3, 6, 8)).to(dtype).to(memory_format=torch.channels_last)
    perm = [1, 2, 3, 0]
    assert torch.equal(unshuffle_bev_map(shuffle_bev_map(x, perm), perm), x)
    assert torch.equal(shuffle_bev_map(x, range(4)), x)


def test_map_shuffle_has_the_gradient_of_a_permutation():
    x = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    perms = torch.tensor([[1, 0, 3, 2], [2, 0, 3, 1]])
    assert torch.autograd.gradcheck(lambda x: shuffle_bev_map(x, perms), x)
    assert torch.autograd.gradcheck(lambda x: unshuffle_bev_map(x, perms), x)


@settings(deadline=None, max_examples=25)
@given(SEEDS, st.sampled_from([torch.int32, torch.int64]))
def test_sparse_indices_of_a_batch_agree_with_maps(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    perms = random_quadrants(3, g)
    dense = torch.rand(3, 5, 6, 8, generator=g) * (torch.rand(3, 5, 6, 8, generator=g) > 0.7)
    moved = shuffle_bev_map(dense, perms)
    cells = moved.nonzero()  # (scene, z, y, x)
    home = unshuffle_bev_indices(cells.to(dtype), perms, (5, 6, 8))
    assert home.dtype == dtype and torch.equal(home[:, :2].long(), cells[:, :2])
    assert torch.equal(dense[tuple(home.long().T)], moved[tuple(cells.T)])
    assert torch.equal(unshuffle_bev_indices(cells, [0, 1, 2, 3], (5, 6, 8)), cells)


@pytest.mark.parametrize("perm", ALL_PERMS)
def test_pointwise_backbones_do_not_notice_and_3x3_differ_on_the_seam(perm):
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    pointwise, conv = nn.Conv2d(3, 4, 1).double(), nn.Conv2d(3, 4, 3, padding=1).double()
    there_and_back = [
        unshuffle_bev_map(layer(shuffle_bev_map(x, perm)), perm) for layer in (pointwise, conv)
    ]
    assert torch.allclose(there_and_back[0], pointwise(x), atol=1e-12)
    differs = ((there_and_back[1] - conv(x)).abs() > 1e-12).any(1)
    mask = seam(perm, (8, 12))
    assert torch.equal(differs[0], mask) and torch.equal(differs[1], mask)
    band = torch.ones(8, 12, dtype=torch.bool)
    for rows in (slice(1, 3), slice(5, 7)):
        for columns in (slice(1, 5), slice(7, 11)):
            band[rows, columns] = False
    assert not (mask & ~band).any()


def test_the_full_border_band_is_attained_by_one_permutation():
    masks = torch.stack([seam(perm, (8, 8)) for perm in ALL_PERMS])
    assert (masks.flatten(1).sum(1) == 64 - 4 * 4).sum() == 1
    assert not masks[0].any()


@pytest.mark.parametrize("k", [2, 3])
def test_the_seam_of_stacked_convolutions(k):
    layers = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(k))).double()
    x = torch.randn(1, 2, 16, 16, dtype=torch.float64)
    for perm in ALL_PERMS[1::5]:
        back = unshuffle_bev_map(layers(shuffle_bev_map(x, perm)), perm)
        differs = ((back - layers(x)).abs() > 1e-12).any(1)[0]
        assert torch.equal(differs, seam(perm, (16, 16), k))


def test_random_quadrants_are_uniform_and_repeatable():
    drawn = random_quadrants(24_000, torch.Generator().manual_seed(0))
    codes = (drawn * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(codes) == 24 and ((codes - 1000).abs() < 150).all()
    state = torch.get_rng_state()
    assert random_quadrants(generator=torch.Generator()).shape == (4,)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.usefixtures("plain_python")
def test_maps_and_clouds_compile_without_graph_breaks():
    x, perms = torch.randn(2, 3, 6, 8), torch.tensor([[1, 0, 3, 2], [2, 0, 3, 1]])

    def compiled(function):
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    for function in (shuffle_bev_map, unshuffle_bev_map):
        assert torch.equal(compiled(function)(x, perms), function(x, perms))
    points = random_points(100, 3)
    batch = compiled(shuffle_bev_points)(points.view(2, 50, 4), perms)
    expected = shuffle_bev_points(points.view(2, 50, 4), perms)
    assert torch.equal(batch.nan_to_num(-1), expected.nan_to_num(-1))
    boxes = random_boxes(6).float()
    assert torch.allclose(compiled(rotated_iou_bev)(boxes, boxes), rotated_iou_bev(boxes, boxes))
    assert torch.equal(compiled(points_in_boxes)(points, boxes), points_in_boxes(points, boxes))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotated_iou_bev(boxes, boxes), rotated_iou_bev(boxes, boxes))
        assert torch.equal(shuffle_bev_map(x, perms), compiled(shuffle_bev_map)(x, perms))


@pytest.mark.usefixtures("plain_python")
def test_dropping_points_compiles_where_sizes_may_depend_on_data():
    points = random_points(100, 4)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(shuffle_bev_points, fullgraph=True, backend="aot_eager")
        moved = compiled(points, torch.tensor([2, 0, 3, 1]))
    assert torch.equal(moved, shuffle_bev_points(points, [2, 0, 3, 1]))


# ---------------------------------------------------------------- teacher


def test_share_that_the_teacher_keeps():
    assert ema_keep(0) == 0.5
    assert ema_keep(1000) == pytest.approx(0.7498)
    assert ema_keep(1999) < ema_keep(2000) == ema_keep(10**6) == 0.9996
    assert ema_keep(0, ramp=0) == 0.9996


def test_the_whole_state_is_averaged_and_integers_are_copied():
    student, teacher = (nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)) for _ in range(2))
    student(torch.randn(8, 3))
    before = copy.deepcopy(teacher.state_dict())
    ema_update(teacher, student, step=1000)
    for name, value in teacher.state_dict().items():
        new = student.state_dict()[name]
        expected = 0.7498 * before[name] + 0.2502 * new if new.is_floating_point() else new
        assert torch.allclose(value.double(), expected.double(), atol=1e-6), name
    assert teacher[1].num_batches_tracked == 1
    for value in teacher.parameters():
        assert value.requires_grad


def test_tied_weights_move_once():
    def tied():
        first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        second.weight = first.weight
        return nn.Sequential(first, second)

    student, teacher = tied(), tied()
    expected = (teacher[0].weight + student[0].weight) / 2
    ema_update(teacher, student, step=0)
    assert torch.allclose(teacher[1].weight, expected)


# ---------------------------------------------------------------- trainer


class Fixed(nn.Module):
    """A detector with given boxes, which records what it is taught."""

    def __init__(self, kept: Detections, candidates: Detections | None = None):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(()))
        self.norm = nn.BatchNorm1d(1)
        self.kept, self.candidates = kept, candidates or kept
        self.seen, self.taught = [], []

    def detect(self, points):
        assert not self.training
        self.seen.append(points)
        scenes = len(points)
        return tuple(
            Detections(*(x[:scenes] for x in found)) for found in (self.kept, self.candidates)
        )

    def loss(self, points, targets, perm):
        assert self.training
        self.taught.append((points, targets, perm))
        return {"bias": (self.bias - 1).square(), "none": 0 * self.bias}


def row(x, y, *scores):
    return [x, y, 0, 4, 2, 2, 0], scores


def detections(*rows, scenes=2):
    boxes, scores = zip(*rows, strict=True)
    boxes = torch.tensor(boxes, dtype=torch.float32).repeat(scenes, 1, 1)
    scores = torch.tensor(scores, dtype=torch.float32).repeat(scenes, 1, 1)
    return Detections(boxes, torch.zeros(boxes.shape[:2], dtype=torch.long), scores)


def unmoved(points, generator=None):
    return points, lambda boxes: boxes


KEPT = detections(
    row(10, 0, 0.9, 0.8), row(20, 0, 0.6, 0.5), row(30, 0, 0.3, 0.9), row(40, 0, 0, 0)
)
CANDIDATES = detections(
    row(10, 0.5, 0.5, 0.5), row(30, 0, 0.3, 0.9), row(50, 0, 0.12, 0.1), row(60, 0, 0.09, 0.9)
)
THRESHOLDS = torch.tensor([[[0.8, 0.4], [0.7, 0.4], [0.9, 0.5]]])


def fixed_trainer(kept=KEPT, candidates=CANDIDATES, **options):
    student, teacher = Fixed(kept, candidates), Fixed(kept, candidates)
    optimizer = torch.optim.SGD(student.parameters(), 0.1)
    options = dict(second_view=unmoved, generator=torch.Generator().manual_seed(0)) | options
    return HSSDATrainer(student, teacher, optimizer, THRESHOLDS.clone(), **options)


def scene_points(scenes=2):
    """Six points around each of six places."""
    places = torch.tensor([[x, 0.0, 0, 1] for x in (10.0, 20, 30, 40, 50, 60)])
    points = places.repeat_interleave(6, 0) + torch.randn(36, 4) * 0.1
    return points.repeat(scenes, 1, 1)


def annotated(*rows, scenes=2):
    found = detections(*rows, scenes=scenes)
    return Targets(found.boxes, found.labels, found.scores[..., 0])


def test_levels_of_a_step_weights_and_doubtful_boxes():
    trainer = fixed_trainer()
    targets, doubtful = trainer.pseudo_labels(scene_points())
    assert targets.weights[0].tolist() == pytest.approx([0.72, 0.3, 0, 0])
    # Overlapping what is taught, or unlikely: not doubtful. Padding is NaN.
    assert doubtful[0, :, 0].isnan().tolist() == [True, False, False, True]
    hard, _ = fixed_trainer(soft=False).pseudo_labels(scene_points())
    assert hard.weights[0].tolist() == [1, 1, 0, 0]


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_removal_empties_doubtful_places_and_takes_no_point_of_a_taught_box(seed):
    boxes = random_boxes(24, seed, spread=16).float().view(2, 12, 7)
    g = torch.Generator().manual_seed(seed)
    found = Detections(boxes, torch.zeros(2, 12).long(), torch.rand(2, 12, 3, generator=g))
    nothing = Targets(boxes[:, :0], found.labels[:, :0], boxes[:, :0, 0])
    low = torch.tensor([[[0.8, 0.4]] * 3])
    taught, doubtful = pseudo_targets(found, found, nothing, low)
    points = random_points(400, seed).view(2, 200, 4)
    points[..., :3] = boxes[:, torch.randint(12, (200,), generator=g), :3] + 0.4 * (
        torch.rand(2, 200, 3, generator=g) - 0.5
    )
    emptied = remove_points(points, doubtful)
    assert not inside_boxes(emptied, doubtful).any()
    before, after = (inside_boxes(cloud, taught.boxes).sum(1) for cloud in (points, emptied))
    on = taught.weights > 0
    assert torch.equal(before[on], after[on])


def test_boxes_that_overlap_an_annotation_are_dropped():
    trainer, mined = fixed_trainer(), annotated(row(11, 0.2, 1.0), row(20, 0, 0.0))
    targets, doubtful = trainer.pseudo_labels(scene_points(), mined)
    assert targets.weights[0].tolist() == pytest.approx([1, 0, 0, 0.3, 0, 0])
    assert torch.equal(targets.boxes[:, :2], mined.boxes)
    assert doubtful[0, :, 0].isnan().tolist() == [True, False, False, True]


def test_a_box_that_is_not_found_again_is_not_taught():
    def lost(points, generator=None):
        return points, lambda boxes: boxes + torch.tensor([0, 30.0, 0, 0, 0, 0, 0])

    trainer = fixed_trainer(second_view=lost)
    found, _ = trainer.detect(scene_points())
    assert (found.scores[..., 2] == 0).all()
    assert (trainer.pseudo_labels(scene_points())[0].weights == 0).all()


def test_a_place_that_the_second_view_scores_zero_does_not_confirm_a_box():
    scores = fixed_trainer().detect(scene_points())[0].scores
    assert scores[0, :, 2].tolist() == [1, 1, 1, 0]  # the fourth is absent in both views


def test_a_step_removes_and_shuffles_unlabelled_scenes_only():
    trainer = fixed_trainer()
    labelled = (scene_points(3)[:, :20], annotated(row(10, 0, 1.0), scenes=3))
    clean = scene_points()
    losses = trainer.step(labelled, (clean, None))
    assert set(losses) == {"bias", "none", "loss"} and losses["loss"] == 1
    points, targets, perm = trainer.student.taught[0]
    assert perm.shape == (5, 4) and torch.equal(perm[:3], torch.arange(4).expand(3, 4))
    assert torch.equal(points[:3, :20], labelled[0]) and points[:3, 20:].isnan().all()
    gone = points[3:].isnan().any(-1)
    expected = torch.tensor([x in (30, 50) for x in (10, 20, 30, 40, 50, 60)])
    assert torch.equal(gone[0], expected.repeat_interleave(6))
    assert targets.boxes.shape == (5, 4, 7) and (targets.weights[:3, 1:] == 0).all()
    for seen in trainer.teacher.seen:  # the teacher sees clean scenes
        assert torch.equal(seen, clean)
    assert trainer.steps == 1 and trainer.teacher.bias.item() == pytest.approx(0.2 * ema_share(1))
    assert torch.equal(clean, clean.nan_to_num(-1))  # in place nothing was changed


def ema_share(step, keep=0.9996):
    return 1 - ema_keep(step, keep)


def test_options_switch_shuffle_and_removal_off():
    trainer = fixed_trainer(shuffle=False, remove=False)
    trainer.step((scene_points(), annotated(row(10, 0, 1.0))), (scene_points(), None))
    points, _, perm = trainer.student.taught[0]
    assert perm is None and not points.isnan().any()


def test_burn_in_trains_the_student_and_then_becomes_the_teacher():
    trainer = fixed_trainer()
    batch = (scene_points(), annotated(row(10, 0, 1.0)))
    assert set(trainer.burn_in(batch)) == {"bias", "none", "loss"}
    assert trainer.student.bias.item() == pytest.approx(0.2) and trainer.teacher.bias == 0
    assert trainer.student.taught[0][2] is None
    trainer.detect(scene_points())
    assert trainer.teacher.bias.item() == pytest.approx(0.2)
    assert not trainer.teacher.bias.requires_grad and trainer.steps == 0


def test_mining_learns_thresholds_from_matches_and_asks_for_points():
    kept = detections(
        *(
            row(10 * i, 0, s, r)
            for i, s, r in ((1, 0.9, 0.8), (2, 0.88, 0.81), (3, 0.5, 0.4), (4, 0.3, 0.3))
        )
    )
    trainer = fixed_trainer(kept, kept)
    # In the labelled scenes three are matched (the third by 0.6), the fourth is not annotated.
    labelled = (scene_points(), annotated(row(10, 0, 1.0), row(20, 0, 1.0), row(31, 0, 1.0)))
    bare = scene_points()
    bare[1, 1:6] = torch.nan  # the second scene has but one point left in the first box
    mined = trainer.mine(labelled, (bare, None), batch_size=1)
    confidence, objectness, consistency = trainer.thresholds[0].tolist()
    assert confidence == pytest.approx([0.89, 0.5]) and objectness == pytest.approx([0.8, 0.4])
    assert consistency == pytest.approx([1, 1])  # every pair is perfect
    assert (mined.weights == 0).all()  # nothing exceeds a consistency of one
    trainer.thresholds[0, 2] = 0.5
    level, _ = split_supervision(
        torch.tensor([[0.9, 0.805, 1.0]]), torch.zeros(1).long(), trainer.thresholds
    )
    assert level == 2


def test_mining_needs_more_than_five_points_and_scores_above_high():
    def less_well(points, generator=None):
        """Each place is found again half a metre aside, the second view's later boxes more so."""
        return points, lambda boxes: boxes + 0.1 * (boxes[..., :1] == 20) * torch.eye(7)[1]

    rows = ((1, 0.95, 0.9), (2, 0.94, 0.89), (3, 0.3, 0.2), (4, 0.2, 0.2))
    kept = detections(*(row(10 * i, 0, s, r) for i, s, r in rows))
    trainer = fixed_trainer(kept, kept, second_view=less_well)
    scenes = scene_points()
    scenes[1, 1:6] = torch.nan  # one point is left in the first box of the second scene
    # Annotated are the second to fourth: the first is found perfectly again, the second by 0.9.
    known = (scene_points(), annotated(*(row(10 * i, 0, 1.0) for i in (2, 2, 3, 4))))
    mined = trainer.mine(known, (scenes, None))
    assert trainer.thresholds[0, 0].tolist() == pytest.approx([0.94, 0.25])
    assert trainer.thresholds[0, 2].tolist() == pytest.approx([1.0, 0.9])
    assert (mined.weights == 0).all()  # a perfect overlap does not exceed 1
    trainer.thresholds = trainer.thresholds.clone()
    levels, _ = split_supervision(
        torch.tensor([[0.95, 0.9, 1.0]] * 2),
        torch.zeros(2, dtype=torch.long),
        trainer.thresholds - torch.tensor([0, 0, 0.05])[:, None],
        inside_boxes(scenes, kept.boxes).sum(-2)[:, 0],
    )
    assert levels.tolist() == [2, 1]


def test_mining_moves_the_annotations_along_with_the_second_view():
    aside = 100 * torch.eye(7)[1]

    class Follows(Fixed):
        """Finds every box again in a scene that was moved aside."""

        def detect(self, points):
            found, moved = super().detect(points), points[..., 1].mean() > 50
            return tuple(x._replace(boxes=x.boxes + aside * moved) for x in found)

    kept = detections(*(row(10 * i, 0, 0.9, 0.8) for i in (1, 2, 3)))
    student, teacher = Follows(kept), Follows(kept)
    trainer = HSSDATrainer(
        student,
        teacher,
        torch.optim.SGD(student.parameters(), 0.1),
        THRESHOLDS.clone(),
        second_view=lambda points, _: (points + aside[:4], lambda boxes: boxes + aside),
    )
    known = annotated(*(row(10 * i, 0, 1.0) for i in (1, 2, 3)))
    trainer.mine((scene_points(), known), (scene_points(), None))
    assert trainer.thresholds[0, 2].tolist() == pytest.approx([1, 1])  # not the default


def test_too_few_matches_give_the_defaults():
    trainer = fixed_trainer()
    nothing = annotated(row(70, 30, 1.0))
    mined = trainer.mine((scene_points(), nothing), (scene_points(), nothing))
    assert trainer.thresholds[0].tolist() == [
        pytest.approx([0.99, 0.99]), pytest.approx([0.95, 0.95]), pytest.approx([0.93, 0.93])
    ]  # fmt: skip
    assert (mined.weights == 0).all() and len(mined.boxes) == 2


def small_detector(**options):
    torch.manual_seed(0)
    anchors = [[0, 4, 2, 2], [0, 3, 3, 2]]
    return BEVDetector(anchors, (32, 32), (0.0, 32.0), (-16.0, 16.0), width=8, **options)


def small_scenes(scenes=3):
    g = torch.Generator().manual_seed(1)
    boxes = torch.zeros(scenes, 3, 7)
    boxes[..., 0] = torch.tensor([6.0, 16, 26]) + torch.rand(scenes, 3, generator=g)
    boxes[..., 1] = torch.tensor([-8.0, 0, 8]) + torch.rand(scenes, 3, generator=g)
    boxes[..., 3:6] = torch.tensor([4.0, 2, 2])
    points = boxes[..., None, :3] + (torch.rand(scenes, 3, 30, 3, generator=g) - 0.5) * 2
    points = torch.cat([points.flatten(1, 2), torch.rand(scenes, 90, 1, generator=g)], dim=-1)
    points[:, -5:] = torch.nan
    labels = torch.tensor([0, 0, 0]).expand(scenes, 3).contiguous()
    return points, Targets(boxes, labels, torch.ones(scenes, 3))


def test_training_with_the_real_detector_runs_and_resumes():
    def build():
        student = small_detector()
        optimizer = torch.optim.AdamW(student.parameters(), 2e-3)
        thresholds = torch.full((2, 3, 2), 0.3)
        g = torch.Generator().manual_seed(0)
        return HSSDATrainer(student, copy.deepcopy(student), optimizer, thresholds, generator=g)

    trainer, scenes = build(), small_scenes()
    losses = [trainer.burn_in(scenes)["loss"].item() for _ in range(60)]
    assert losses[-1] < 0.2 * losses[0]
    found, _ = trainer.detect(scenes[0])
    assert trainer.student.training and not trainer.teacher.training
    best = found.boxes[torch.arange(3), found.scores[..., 0].argmax(1)]
    assert (rotated_iou_bev(best[:, None], scenes[1].boxes).amax(-1) > 0.5).all()
    mined = trainer.mine(scenes, (scenes[0], None), batch_size=2)
    trainer.step(scenes, (scenes[0], mined))
    other = build()
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    other.generator.set_state(trainer.generator.get_state())
    first, second = (t.step(scenes, (scenes[0], mined))["loss"] for t in (trainer, other))
    assert torch.equal(first, second) and other.steps == 2
    for a, b in zip(
        trainer.teacher.state_dict().values(), other.teacher.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)


def test_the_detector_unshuffles_what_its_backbone_saw():
    model, (points, _) = small_detector().eval(), small_scenes()
    perms = random_quadrants(3, torch.Generator().manual_seed(2))
    identity = torch.arange(4).expand(3, 4)
    assert torch.equal(model(points, identity), model(points))
    # With a backbone that looks at single blocks, shuffled and plain scenes give equal features.
    model.backbone = nn.Conv2d(2, 16, 4, stride=4)
    assert torch.allclose(model(points, perms), model(points), atol=1e-5)


def test_the_detector_reads_the_boxes_that_its_loss_wants():
    """Outputs with the wanted values have no offset loss, and are read as the targets."""
    model, (points, targets) = small_detector(headings=True), small_scenes()
    targets.boxes[..., 6] = torch.tensor([0.4, -0.7, 1.2])
    outputs = torch.full((3, 7, 8, 8), -12.0)
    place = (targets.boxes[..., :2] - model.corner) / model.cell
    for scene in range(3):
        for (x, y), box in zip(place[scene].tolist(), targets.boxes[scene], strict=True):
            column, line = int(x), int(y)
            twice = 2 * box[6]
            wanted = [12.0, -12, 12, x - column - 0.5, y - line - 0.5, twice.sin(), twice.cos()]
            outputs[scene, :, line, column] = torch.tensor(wanted)
    model.forward = lambda points, perm=None: outputs
    losses = model.loss(points, targets)
    assert losses["offset"] < 1e-5 and losses["heading"] < 1e-5 and losses["heat"] < 0.01
    found, candidates = model.detect(points)
    kept = found.scores[..., 0] > 0
    assert (kept.sum(1) == 3).all()
    iou = rotated_iou_bev(found.boxes, targets.boxes) * kept[..., None]
    assert (iou.amax(1) > 0.999).all() and (candidates.scores[..., 0] > 0).sum() == 9


def test_weights_scale_what_a_box_teaches_and_zero_is_absent():
    model, (points, targets) = small_detector().eval(), small_scenes()
    one = Targets(*(part[:, :1] for part in targets))
    padded = targets._replace(weights=torch.tensor([[1.0, 0, 0]] * 3))
    half = one._replace(weights=one.weights / 2)
    losses = {
        name: model.loss(points, t) for name, t in (("one", one), ("pad", padded), ("half", half))
    }
    for name, value in losses["one"].items():
        assert torch.allclose(value, losses["pad"][name])
    assert torch.allclose(losses["half"]["offset"], losses["one"]["offset"] / 2)
    assert losses["half"]["heat"] < losses["one"]["heat"]
    empty = Targets(*(part[:, :0] for part in targets))
    assert torch.isfinite(sum(model.loss(points, empty).values()))
    outside = one._replace(boxes=one.boxes + 100)
    assert torch.allclose(model.loss(points, outside)["heat"], model.loss(points, empty)["heat"])


@pytest.mark.usefixtures("plain_python")
def test_the_detector_compiles_runs_under_autocast_and_in_double():
    model, (points, targets) = small_detector().eval(), small_scenes()
    perms = random_quadrants(3, torch.Generator().manual_seed(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(points, perms), model(points, perms), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(points, perms).dtype == torch.bfloat16
        assert torch.isfinite(sum(model.loss(points, targets, perms).values()))
    double = copy.deepcopy(model).double()
    assert double(points.double(), perms).dtype == torch.float64
    assert torch.allclose(double(points.double()).float(), model(points), atol=1e-4)


def test_detector_state_round_trip():
    model, other = small_detector(), small_detector()
    nn.init.normal_(other.head.weight)
    other.load_state_dict(model.state_dict())
    points, _ = small_scenes()
    assert torch.equal(model(points), other(points))


# ---------------------------------------------------------------- the authors' numbers


def shuffled_and_put_back(case):
    perms, tensors = torch.tensor(case.settings["perms"]), case.tensors
    border = torch.tensor(case.settings["border"], dtype=torch.float64)
    border = torch.cat([border, torch.zeros(len(border), 2)], dim=1)
    results = {}
    for scene, perm in enumerate(perms):
        own = [tensors[name][scene] for name in ("x", "y", "z")]
        points = torch.stack([*own, torch.zeros(14, dtype=torch.float64)], dim=1)
        points = torch.cat([points, border])
        points[:, 3] = torch.arange(len(points))
        moved = shuffle_bev_points(points, perm)
        results[f"shuffled points of scene {scene}"] = moved
        results[f"numbers of the points kept in scene {scene}"] = moved[:, 3].long()
    shape = case.settings["spatial_shape"]
    results["indices put back"] = unshuffle_bev_indices(tensors["indices"], perms, shape)
    results["map put back"] = unshuffle_bev_map(tensors["map"], perms)
    return results


def thresholds_of_pools(case):
    pools = case.settings["pools"]
    return {
        f"high and low of pool {number}": torch.tensor(dual_threshold(torch.tensor(pool).double()))
        for number, pool in enumerate(pools)
    }


def levels_of_two_views(case):
    tensors, chosen = case.tensors, case.settings
    boxes, turn = tensors["boxes"], dict(flip_y=True, rotation=chosen["rotation"])
    turn["scale"] = chosen["scale"]
    view = transform_boxes(boxes, **turn)
    aside = boxes + torch.tensor([0.4, -0.3, 0, 0, 0, 0, 0], dtype=torch.float64)
    consistency = consistency_score(boxes, view[:-1] + tensors["jitter"], turn)
    level, weight = split_supervision(
        torch.stack([tensors["cls"], tensors["roi"], consistency], dim=1),
        torch.tensor(chosen["labels"]),
        torch.tensor(chosen["thresholds"], dtype=torch.float64),
        torch.tensor(chosen["n_points"]),
        no_middle=chosen["no_middle"],
    )
    return {
        "transformed boxes": view,
        "overlaps with the moved boxes": rotated_iou_bev(boxes, aside),
        "consistency": consistency,
        "levels": level,
        "weights": weight,
    }


class State(nn.Module):
    """A weight, a bias and a buffer."""

    def __init__(self, tensors, prefix):
        super().__init__()
        self.weight = nn.Parameter(tensors[f"{prefix}.weight"].clone())
        self.bias = nn.Parameter(tensors[f"{prefix}.bias"].clone())
        self.register_buffer("running_mean", tensors[f"{prefix}.running_mean"].clone())


def moving_average(case):
    teacher, student = (State(case.tensors, prefix) for prefix in ("teacher", "student"))
    results = {}
    for step in case.settings["steps"]:
        for value in student.state_dict().values():
            value.mul_(case.settings["factor"])
        ema_update(teacher, student, step)
        results[f"teacher.weight after step {step}"] = teacher.weight.detach().clone()
    results["teacher.bias at the end"] = teacher.bias
    results["teacher.running_mean at the end"] = teacher.running_mean
    return results


CASES = {
    "points shuffled, voxels and maps put back, two scenes": shuffled_and_put_back,
    "dual thresholds of three pools": thresholds_of_pools,
    "second view, consistency and levels": levels_of_two_views,
    "moving average of parameters and buffers": moving_average,
}


@pytest.mark.parametrize("case", list(load_reference("hssda")), ids=lambda case: case.name)
def test_the_authors_numbers(case, agree):
    agree(case, CASES[case.name](case))


# ---------------------------------------------------------------- second edition


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_teacher_follows_a_student_of_another_precision_in_its_own(dtype):
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    before = teacher.weight.detach().clone()
    ema_update(teacher, student.to(dtype), step=3)
    keep = ema_keep(3)
    expected = keep * before + (1 - keep) * student.weight.float()
    assert teacher.weight.dtype == torch.float32
    assert torch.allclose(teacher.weight, expected, atol=1e-6)


def test_tables_of_moves_are_kept_by_dtype_and_range_and_allow_gradients():
    perm = torch.tensor([2, 0, 3, 1])
    with torch.inference_mode():
        shuffle_bev_points(random_points(20), perm)
    points = random_points(200).requires_grad_()
    moved = shuffle_bev_points(points, perm)
    moved.sum().backward()
    inside = in_range(points.detach())
    assert torch.equal(points.grad, inside[:, None].expand(-1, 4).float())
    double = shuffle_bev_points(points.detach().double(), perm)
    assert double.dtype == torch.float64
    assert torch.allclose(double, moved.detach().double(), atol=1e-5)
    small = shuffle_bev_points(points.detach(), [2, 0, 3, 1], (0.0, 8.0), (-4.0, 4.0))
    assert len(small) < len(moved) and (small[:, 0] < 8).all()


@pytest.mark.parametrize("perm", ALL_PERMS)
def test_four_slices_and_one_gather_move_alike(perm):
    x = torch.randn(2, 3, 6, 8)
    expected = move_areas(x, perm)
    assert torch.equal(shuffle_bev_map(x, perm), expected)
    assert torch.equal(shuffle_bev_map(x, torch.tensor([perm] * 2)), expected)
    assert torch.equal(shuffle_bev_map(x.requires_grad_(), perm), expected)


# ---------------------------------------------------------------- bad input


BOXES, POINTS = torch.zeros(2, 7), torch.zeros(3, 4)


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: rotated_iou_bev(BOXES[:, :6], BOXES), r"boxes_a must be \(n, 7\)"),
            (lambda: rotated_iou_bev(BOXES, BOXES[0]), r"boxes_b must be \(n, 7\).*got \(7,\)"),
            (lambda: points_in_boxes(POINTS, BOXES[:, :5]), r"boxes must be \(n, 7\)"),
            (lambda: points_in_boxes(POINTS[:, :2], BOXES), "points must be"),
            (lambda: remove_points(POINTS, BOXES[0]), r"boxes must be \(n, 7\)"),
            (lambda: nms_bev(BOXES[:, :4], torch.ones(2)), r"boxes must be \(n, 7\)"),
            (lambda: transform_boxes(BOXES[0]), r"boxes must be \(n, 7\)"),
            (lambda: transform_boxes(BOXES, scale=0.0), "scale must be positive, got 0"),
            (lambda: consistency_score(BOXES, BOXES, {"turn": 1}), "flip_y, rotation and scale"),
            (lambda: consistency_score(BOXES[:, :6], BOXES, {}), r"boxes must be \(n, 7\)"),
            (lambda: global_view(torch.zeros(2, 5, 2)), "points must be"),
            (lambda: dual_threshold(torch.tensor([0.1, 1.2, 0.3])), r"scores must be in \[0, 1\]"),
            (lambda: dual_threshold(torch.tensor([0.1, torch.nan, 0.3])), r"in \[0, 1\]"),
            (lambda: dual_threshold(torch.rand(3, 2)), r"scores must be \(n\), got shape"),
            (
                lambda: split_supervision(torch.rand(2, 3) - 1, torch.zeros(2).long(), THRESHOLDS),
                r"scores must be in \[0, 1\]",
            ),
            (
                lambda: split_supervision(torch.rand(2, 2), torch.zeros(2).long(), THRESHOLDS),
                r"scores must be \(2, 3\), got",
            ),
            (
                lambda: split_supervision(torch.rand(2, 3), torch.ones(2).long(), THRESHOLDS),
                r"labels must be in 0\.\.0",
            ),
            (
                lambda: split_supervision(
                    torch.rand(2, 3), torch.zeros(2).long(), THRESHOLDS.flip(-1)
                ),
                "high >= low",
            ),
            (
                lambda: split_supervision(torch.rand(2, 3), torch.zeros(2).long(), THRESHOLDS[0]),
                r"thresholds must be \(classes, 3, 2\), got",
            ),
            (lambda: bev_areas(n=3), "n must be 2"),
            (lambda: bev_areas((1, 1)), "ranges must be"),
            (lambda: shuffle_bev_points(POINTS, [0, 1, 2, 2]), r"permutation of 0\.\.3"),
            (lambda: shuffle_bev_points(POINTS, [1, 2, 3, 4]), r"permutation of 0\.\.3"),
            (lambda: shuffle_bev_points(POINTS, [0, 1, 2]), r"\(4,\) or \(batch, 4\)"),
            (lambda: shuffle_bev_points(POINTS, torch.rand(4)), "integers"),
            (lambda: shuffle_bev_points(POINTS[:, :2], [0, 1, 2, 3]), "points must be"),
            (lambda: shuffle_bev_points(POINTS, [[0, 1, 2, 3]] * 3), r"perm \(batch, 4\) needs"),
            (lambda: shuffle_bev_map(torch.zeros(1, 1, 5, 4), [0, 1, 2, 3]), "must be even"),
            (lambda: unshuffle_bev_map(torch.zeros(1, 1, 4, 5), [0, 1, 2, 3]), "must be even"),
            (lambda: shuffle_bev_map(torch.zeros(4, 4), [0, 1, 2, 3]), r"x must be \(batch"),
            (lambda: shuffle_bev_map(torch.zeros(2, 1, 4, 4), [[0, 1, 2, 3]] * 3), "one row a map"),
            (lambda: shuffle_bev_map(torch.zeros(1, 1, 4, 4), [0, 0, 2, 3]), "permutation"),
            (
                lambda: unshuffle_bev_indices(torch.zeros(2, 3).long(), [0, 1, 2, 3], (4, 5)),
                "must be even",
            ),
            (
                lambda: unshuffle_bev_indices(torch.zeros(2, 2).long(), [0, 1, 2, 3], (4, 4)),
                r"indices must be \(n, 3 or more\)",
            ),
            (
                lambda: unshuffle_bev_indices(torch.full((2, 3), 4), [0, 1, 2, 3], (4, 4)),
                "indices must be below",
            ),
            (
                lambda: unshuffle_bev_indices(
                    torch.tensor([[2, 0, 0]]), [[0, 1, 2, 3]] * 2, (4, 4)
                ),
                "indices must be below",
            ),
            (lambda: ema_update(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0), "same state"),
            (lambda: ema_update(nn.Linear(2, 2), nn.Linear(2, 3), 0), "same state.*bias"),
            (
                lambda: PseudoLabeller(nn.Linear(2, 2), THRESHOLDS),
                "teacher must have a method detect",
            ),
            (
                lambda: HSSDATrainer(nn.Linear(2, 2), Fixed(KEPT), None, THRESHOLDS),
                "student must have a method loss",
            ),
            (lambda: HSSDATrainer(*[Fixed(KEPT)] * 2, None, THRESHOLDS), "model of its own"),
            (lambda: fixed_trainer(no_such=1), "no_such"),
            (lambda: BEVDetector([[0, 1, 1, 1]], (36, 32)), "divisible by 8"),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises((ValueError, TypeError), match=message):
            call()
