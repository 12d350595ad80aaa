"""Convergent learning: correlations of units, matchings, sparse maps, clusters, small nets."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.features import convergent_learning
from shuffle_nb.features.convergent_learning import (
    RunningCorrelation,
    activations,
    bipartite_match,
    cluster_mixing,
    joint_affinity,
    layer_correlations,
    linear_r2,
    live_units,
    mutual_information,
    percentile_edges,
    permutation_cycles,
    semi_match,
    small_cnn,
    sparse_prediction,
    spectral_clusters,
    standardise,
    train_nets,
    training,
    unit_correlation,
    whitened_random_basis,
)
from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.datasets import load_images
from shuffle_nb.foundations.reference import load_reference

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rectified(*shape, seed=0):
    return normal(*shape, seed=seed).relu()


# ---------------------------------------------------------------- correlation


@SMALL
@given(SEEDS, st.integers(3, 40), st.integers(1, 6), st.integers(1, 6))
def test_correlation_is_numpys(seed, samples, n_x, n_y):
    x, y = normal(samples, n_x, seed=seed), normal(samples, n_y, seed=seed + 1)
    expected = np.corrcoef(x.numpy(), y.numpy(), rowvar=False)
    assert np.allclose(unit_correlation(x, y), expected[:n_x, n_x:], atol=1e-12)
    own = np.atleast_2d(expected)[:n_x, :n_x]
    assert np.allclose(unit_correlation(x), own, atol=1e-12)
    assert unit_correlation(x, y).abs().max() <= 1


def test_each_position_of_a_map_is_a_sample():
    x, y = rectified(3, 4, 2, 5), rectified(3, 6, 2, 5, seed=1)
    flat_x, flat_y = (maps.movedim(1, -1).flatten(0, 2) for maps in (x, y))
    assert torch.allclose(unit_correlation(x, y), unit_correlation(flat_x, flat_y), atol=1e-12)
    assert torch.allclose(unit_correlation(x, flat_y), unit_correlation(x, y), atol=1e-12)


def test_dead_units_are_zero_and_nan_stays_with_its_unit():
    x = rectified(50, 5)
    x[:, 1], x[:, 3] = 0.1, 0
    corr = unit_correlation(x)
    assert not corr[[1, 3]].any() and not corr[:, [1, 3]].any() and corr.isfinite().all()
    assert live_units(x).tolist() == [True, False, True, False, True]
    x[7, 2] = torch.nan
    corr = unit_correlation(x)
    assert corr[2, 0].isnan() and corr[0, 2].isnan() and corr[0, 4].isfinite()


@pytest.mark.parametrize("value", [0.1, 123.456, -1e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_is_dead_whatever_its_size(value, dtype):
    x = torch.full((9999, 2), value, dtype=dtype)
    x[:, 1] += normal(9999).to(dtype)
    corr = unit_correlation(x)
    assert corr[0].tolist() == [0, 0] and corr[1, 1] == pytest.approx(1, abs=1e-5)
    assert not live_units(x)[0]


def test_float32_keeps_its_digits_over_a_long_sum():
    x = torch.rand(500_000, 3, generator=torch.Generator().manual_seed(0)) + 5
    x[:, 2] += x[:, 0]
    assert (unit_correlation(x) - unit_correlation(x.double())).abs().max() < 3e-6


def test_one_sample_leaves_all_units_dead():
    assert not unit_correlation(normal(1, 3)).any()
    running = RunningCorrelation()
    running.update(normal(1, 3))
    assert not running.compute().any()


def test_layout_does_not_matter():
    x, y = rectified(4, 6, 3, 3), rectified(4, 5, 3, 3, seed=1)
    for change in (
        lambda z: z.to(memory_format=torch.channels_last),
        lambda z: torch.stack([z, z], -1)[..., 0],
    ):
        assert torch.allclose(unit_correlation(change(x), change(y)), unit_correlation(x, y))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(dtype):
    x = rectified(200, 6).to(dtype)
    corr = unit_correlation(x)
    assert corr.dtype == torch.float32
    assert torch.allclose(corr.double(), unit_correlation(x.double()), atol=1e-5)


def test_autocast_leaves_correlations_alone():
    x = rectified(200, 6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        corr = unit_correlation(x)
    assert torch.equal(corr, unit_correlation(x))


def test_one_graph(plain_python, monkeypatch):
    monkeypatch.setattr(convergent_learning, "BLOCK", 20)  # several blocks
    compiled = torch.compile(unit_correlation, fullgraph=True, backend="aot_eager")
    for shape in ((30, 5), (4, 5, 3, 3)):
        x, y = rectified(*shape), rectified(*shape, seed=1)
        assert torch.allclose(compiled(x, y), unit_correlation(x, y), atol=1e-12)


def test_gradients():
    x, y = normal(8, 3).requires_grad_(), normal(8, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(unit_correlation, (x, y))
    dead = torch.cat([x.detach(), torch.ones(8, 1)], 1).requires_grad_()
    unit_correlation(dead, y).sum().backward()
    assert dead.grad.isfinite().all()


@SMALL
@given(SEEDS, st.floats(-1e6, 1e6), st.integers(1, 30))
def test_streams_give_the_same(seed, offset, batch):
    x, y = rectified(60, 4, seed=seed) + offset, rectified(60, 3, seed=seed + 1)
    running = RunningCorrelation()
    for parts in zip(x.split(batch), y.split(batch), strict=True):
        running.update(*parts)
    assert torch.allclose(running.compute(), unit_correlation(x, y), atol=1e-6)


def test_streams_of_maps_and_of_one_net():
    x = rectified(6, 4, 2, 3).float()
    x[:, 2] = 0.3
    running = RunningCorrelation()
    for part in x.split(2):
        running.update(part)
    assert torch.allclose(running.compute(), unit_correlation(x.double()), atol=1e-6)
    assert not running.compute()[2].any()


def test_cost_of_correlations_is_the_formula():
    for samples, n_x, n_y in ((50, 4, 6), (200, 8, 6)):
        x, y = normal(samples, n_x), normal(samples, n_y)
        assert count_flops(unit_correlation, x, y) == 2 * samples * n_x * n_y


# ---------------------------------------------------------------- matching


def brute_force(corr):
    wide = corr if corr.shape[0] <= corr.shape[1] else corr.T
    rows = range(len(wide))
    orders = itertools.permutations(range(wide.shape[1]), len(wide))
    return max(sum(wide[i, j].item() for i, j in zip(rows, o, strict=True)) for o in orders)


def greedy(corr):
    left, total = corr.clone(), 0.0
    for _ in range(min(corr.shape)):
        row, col = divmod(left.argmax().item(), corr.shape[1])
        total += corr[row, col].item()
        left[row], left[:, col] = -9, -9
    return total


@SMALL
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_assignment_is_the_best_there_is(seed, n_x, n_y):
    corr = 2 * torch.rand(n_x, n_y, generator=torch.Generator().manual_seed(seed)) - 1
    row, col, value = bipartite_match(corr)
    assert len(row) == min(n_x, n_y) and (row.diff() > 0).all() and len(col.unique()) == len(col)
    assert torch.equal(value, corr[row, col])
    assert value.sum().item() == pytest.approx(brute_force(corr), abs=1e-5)
    assert value.sum().item() >= greedy(corr) - 1e-5
    assert (semi_match(corr)[1][row] >= value).all()
    kept = bipartite_match(corr, allow_negative=False)[2]
    assert (kept > 0).all() and kept.sum().item() == pytest.approx(
        brute_force(corr.clamp(min=0)), abs=1e-5
    )


@SMALL
@given(SEEDS)
def test_order_scale_and_offset_of_units_do_not_matter(seed):
    x, order = rectified(80, 7, seed=seed), torch.randperm(7)
    other = 3 * x[:, order] * (1 + torch.rand(7)) + torch.rand(7)
    assert torch.allclose(unit_correlation(x, other), unit_correlation(x)[:, order], atol=1e-12)
    row, col, value = bipartite_match(unit_correlation(x, other))
    assert torch.equal(order[col], row)
    assert torch.allclose(value, torch.ones(7).double(), atol=1e-12)
    y = rectified(80, 5, seed=seed + 1)
    values = [bipartite_match(unit_correlation(z, y))[2].sum() for z in (x, x[:, order])]
    assert torch.allclose(*values)


def test_a_net_matches_itself_and_dead_units_match_nothing():
    x = rectified(80, 6)
    x[:, 4] = 0
    row, col, value = bipartite_match(unit_correlation(x))
    live = live_units(x)
    assert torch.equal(row[live], col[live]) and value[4] == 0
    assert torch.allclose(value[live], torch.ones(5).double(), atol=1e-12)


def test_a_forbidden_pair_is_not_taken():
    corr = unit_correlation(rectified(80, 6)).fill_diagonal_(-torch.inf)
    row, col, value = bipartite_match(corr)
    assert (row != col).all() and value.isfinite().all()


def test_values_of_a_matching_have_gradients():
    corr = torch.rand(3, 4, requires_grad=True)
    row, col, value = bipartite_match(corr)
    value.sum().backward()
    assert corr.grad.sum() == 3 and (corr.grad[row, col] == 1).all()


@SMALL
@given(st.permutations(range(8)))
def test_cycles_part_all_places(order):
    cycles = permutation_cycles(order)
    assert sorted(itertools.chain(*cycles)) == list(range(8))
    for cycle in cycles:
        assert cycle[0] == min(cycle)
        assert [order[i] for i in cycle] == cycle[1:] + cycle[:1]


def test_no_cycles_of_nothing():
    assert permutation_cycles(torch.empty(0, dtype=torch.long)) == []


# ---------------------------------------------------------------- mutual information


@SMALL
@given(SEEDS, st.integers(2, 12))
def test_information_is_symmetric_and_that_of_a_unit_with_itself_its_entropy(seed, bins):
    x, y = rectified(300, seed=seed), rectified(300, seed=seed + 1)
    there, back = mutual_information(x, y, bins), mutual_information(y, x, bins)
    assert there == pytest.approx(back, abs=1e-12)
    assert mutual_information(x, y, bins, correct_bias=False) >= -1e-12
    edges = percentile_edges(x, bins)
    counts = np.histogram(x, [-1e-9, *edges.unique().tolist()])[0] / 300
    entropy = -sum(p * np.log(p) for p in counts if p)
    assert mutual_information(x, x, bins, correct_bias=False) == pytest.approx(entropy, abs=1e-9)


def test_independent_units_tell_nothing_after_the_correction():
    x, y = rectified(20_000), rectified(20_000, seed=1)
    assert mutual_information(x, y, correct_bias=False) > 1e-3
    assert abs(mutual_information(x, y)) < 1e-3
    assert mutual_information(x, x) > 1


def test_information_sees_what_correlation_does_not():
    x = normal(5000)
    assert abs(unit_correlation(x[:, None], x.square()[:, None])) < 0.1
    assert mutual_information(x + 9, x.square()) > 0.8


def test_constant_and_negative_values_share_a_bin():
    x = rectified(100)
    assert mutual_information(torch.zeros(100).double(), x) == pytest.approx(0, abs=1e-12)
    assert mutual_information(x - (x == 0).double(), x) == mutual_information(x, x)


# ---------------------------------------------------------------- linear maps


def test_standardise():
    x = 3 * normal(50, 4) + 2
    x[:, 2] = 5
    z, mean, std = standardise(x)
    assert torch.allclose(z.mean(0), torch.zeros(4).double(), atol=1e-12)
    assert torch.allclose(z.square().mean(0), torch.tensor([1.0, 1, 0, 1]).double())
    assert torch.allclose(standardise(x[:5], mean, std)[0], z[:5])


@SMALL
@given(SEEDS)
def test_an_exact_map_is_found(seed):
    x, weight = normal(40, 5, seed=seed), normal(5, 3, seed=seed + 1)
    found = sparse_prediction(x, x @ weight + 2, 0.0)
    assert found.loss < 1e-20 and torch.allclose(found.weight, weight, atol=1e-9)
    assert torch.allclose(found(x), x @ weight + 2)
    order = torch.randperm(5)
    sparse = sparse_prediction(x, x[:, order], 0.01)
    assert (sparse.nonzeros == 1).all()
    assert torch.equal(sparse.weight.argmax(0), order)


def test_least_squares_of_minimum_norm():
    x = normal(20, 3)
    found = sparse_prediction(torch.cat([x, x], 1), x[:, :1], 0.0)
    expected = torch.tensor([0.5, 0, 0, 0.5, 0, 0]).double()
    assert torch.allclose(found.weight[:, 0], expected, atol=1e-9)


def test_a_large_penalty_leaves_nothing():
    x, y = normal(40, 5), normal(40, 3, seed=1)
    largest = ((x - x.mean(0)).T @ (y - y.mean(0)) / 40).abs().max().item()
    found = sparse_prediction(x, y, largest)
    assert not found.weight.any() and not found.nonzeros.any()
    assert found.loss == pytest.approx(y.var(0, correction=0).mean().item())
    assert sparse_prediction(x, y, 0.9 * largest).weight.any()


@pytest.mark.parametrize("lam", [0.003, 0.05, 0.3])
def test_sparse_maps_are_those_of_coordinate_descent(lam):
    from sklearn.linear_model import Lasso

    x = rectified(200, 12) @ (torch.eye(12) + 0.3 * torch.rand(12, 12)).double()
    y = (x @ normal(12, 4, seed=1)).relu() + 0.1 * normal(200, 4, seed=2)
    found = sparse_prediction(x, y, lam)
    for unit in range(4):
        lasso = Lasso(lam, tol=1e-12, max_iter=100_000).fit(x.numpy(), y[:, unit].numpy())
        assert np.allclose(found.weight[:, unit], lasso.coef_, atol=1e-6)
        assert found.nonzeros[unit] == (lasso.coef_ != 0).sum()


def test_units_that_are_nearly_alike_take_few_steps_too():
    groups = normal(1000, 8)[:, torch.arange(64) // 8]
    x = standardise(0.1 * normal(1000, 64, seed=1) + 0.9 * groups)[0]
    y = standardise(x @ normal(64, 4, seed=2) + normal(1000, 4, seed=3))[0]
    found, best = (sparse_prediction(x, y, 0.03, max_iter=count) for count in (1000, 100_000))
    assert torch.allclose(found.weight, best.weight, atol=1e-5)


def test_maps_and_other_samples_for_the_loss():
    x, y = rectified(4, 5, 2, 3).float(), rectified(4, 2, 2, 3, seed=1).float()
    found = sparse_prediction(x, y, 0.02, x_val=x[:1], y_val=y[:1])
    flat_x, flat_y = (z[:1].movedim(1, -1).flatten(0, 2) for z in (x, y))
    assert found.weight.dtype == torch.float32
    assert found.loss == pytest.approx((found(flat_x) - flat_y).square().mean().item(), rel=1e-5)


def test_linear_r2_of_what_is_linear_and_of_noise():
    x = normal(400, 5)
    assert linear_r2(x, x @ normal(5, 4, seed=1)) > 0.999
    assert linear_r2(x, normal(400, 4, seed=2)) < 0.05


# ---------------------------------------------------------------- clusters and bases


@SMALL
@given(SEEDS, st.lists(st.integers(2, 5), min_size=1, max_size=4))
def test_blocks_are_recovered(seed, sizes):
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    truth = truth[torch.randperm(len(truth), generator=torch.Generator().manual_seed(seed))]
    affinity = (truth[:, None] == truth).double()
    labels = spectral_clusters(affinity, len(sizes), seed % 100)
    assert torch.equal(labels[:, None] == labels, truth[:, None] == truth)


def test_a_unit_without_ties_is_no_trouble():
    affinity = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2), torch.zeros(1, 1))
    labels = spectral_clusters(affinity, 2)
    assert len(set(labels[:3].tolist())) == 1 and labels[0] != labels[3] == labels[4]


def test_mixing():
    labels = torch.tensor([0, 0, 1, 1, 2])
    assert cluster_mixing(labels, torch.tensor([0, 1, 0, 0, 1])) == pytest.approx(1 / 3)
    assert cluster_mixing(labels, torch.zeros(5, dtype=torch.long)) == 0


def test_joint_affinity_holds_four_blocks():
    x, y = rectified(50, 3), rectified(50, 2, seed=1)
    joint = joint_affinity(x, y)
    assert torch.allclose(joint, joint.T)
    assert torch.allclose(joint[:3, 3:], unit_correlation(x, y).abs(), atol=1e-12)
    assert torch.allclose(joint[3:, 3:], unit_correlation(y).abs(), atol=1e-12)


@SMALL
@given(SEEDS)
def test_a_whitened_basis_spans_the_same_and_is_uncorrelated(seed):
    x = normal(60, 4, seed=seed) @ (torch.eye(4, 6) + 0.2 * torch.ones(4, 6)).double() + 1
    white = whitened_random_basis(x, seed % 100)
    assert white.shape == (60, 4)
    assert torch.allclose(white.T @ white / 60, torch.eye(4).double(), atol=1e-9)
    assert sparse_prediction(white, x, 0.0).loss < 1e-18
    assert not torch.allclose(white, whitened_random_basis(x, seed % 100 + 1))


# ---------------------------------------------------------------- nets


@pytest.fixture(scope="module")
def images():
    return load_images("digits", num_train=1200)


def test_nets_are_repeatable_and_leave_the_global_stream_alone(images):
    state = torch.get_rng_state()
    x, y = images.train_images, images.train_labels
    first, other = train_nets([3, 4], x, y, steps=4, batch_size=16)
    again = train_nets([3], x, y, steps=4, batch_size=16)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.out.weight, again.out.weight) and not first.training
    assert not torch.equal(first.out.weight, other.out.weight)


def test_training_is_the_plain_loop(images):
    x, y = images.train_images, images.train_labels
    net = train_nets([5], x, y, steps=3, batch_size=8)[0]
    torch.manual_seed(5)
    plain = small_cnn()
    generator = torch.Generator().manual_seed(5)
    adam = torch.optim.Adam(plain.parameters(), lr=3e-3)
    for _ in range(3):
        rows = torch.randint(len(x), (8,), generator=generator)
        adam.zero_grad()
        nn.functional.cross_entropy(plain(x[rows]), y[rows]).backward()
        adam.step()
    assert torch.allclose(net.out.weight, plain.out.weight, atol=1e-6)


def test_fewer_steps_see_the_same_first_batches(images):
    x, y = images.train_images, images.train_labels
    few, many = (training(0, x, y, steps)[2] for steps in (2, 50))
    assert all(torch.equal(few(step)[0], many(step)[0]) for step in range(2))


def test_activations_are_what_the_layers_give_out(images):
    x, net = images.test_images[:9], small_cnn().train()
    found = activations(net, x, batch_size=4)
    assert {name: tuple(part.shape[1:]) for name, part in found.items()} == {
        "conv1": (16, 8, 8),
        "conv2": (32, 4, 4),
        "fc": (64,),
    }
    assert torch.allclose(net.out(found["fc"]), net(x), atol=1e-6)
    assert all((part >= 0).all() and not part.requires_grad for part in found.values())
    assert net.training and not any(module._forward_hooks for module in net.modules())
    other = nn.Sequential(nn.Linear(4, 3), nn.Tanh())
    assert activations(other, torch.rand(2, 4), ["1"])["1"].shape == (2, 3)


def test_a_deeper_net_for_larger_colour_images():
    net = small_cnn(3, 32, 7, widths=(4, 5, 6), hidden=9)
    found = activations(net, torch.rand(2, 3, 32, 32), ["conv3", "fc"])
    assert found["conv3"].shape == (2, 6, 8, 8) and found["fc"].shape == (2, 9)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(compiled(x), net(x), atol=1e-6)


def test_a_public_set_is_read_from_a_folder(tmp_path):
    """What scale="full" does, on a folder in the format of CIFAR-10's columns."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (tmp_path / split / kind).mkdir(parents=True)
            for number in range(4):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / kind / f"{number}.png")
    data = load_images(str(tmp_path))
    nets = train_nets(
        [0, 1], data.train_images, data.train_labels, steps=2, batch_size=4, widths=(4, 5, 6)
    )
    assert nets[0].out.out_features == 2
    layers = ["conv1", "conv2", "conv3", "fc"]
    x = data.test_images.repeat(200, 1, 1, 1)  # more than a batch
    streamed = layer_correlations(*nets, x, layers)
    first, second = (activations(net, x, layers) for net in nets)
    for layer in layers:
        corr = unit_correlation(first[layer], second[layer]).double()
        assert torch.allclose(streamed[layer], corr, atol=1e-5)


# ---------------------------------------------------------------- the authors' numbers


def of_matching(case):
    corr = case.tensors["corr"]
    index, best = semi_match(corr)
    _, col, value = bipartite_match(corr)
    _, other, other_value = bipartite_match(corr.clone().fill_diagonal_(-torch.inf))
    results = {
        "assignment column of each row": col,
        "assignment values": value,
        "assignment column of each row, diagonal ignored": other,
        "assignment values, diagonal ignored": other_value,
        "semi-match column of each row": index,
        "semi-match values": best,
    }
    for order, ending in ((col, ""), (case.settings["order"], " of the given permutation")):
        cycles = permutation_cycles(order)
        results[f"cycle order{ending}"] = list(itertools.chain(*cycles))
        results[f"cycle lengths{ending}"] = [len(cycle) for cycle in cycles]
    return results


def of_information(case):
    x, y = (case.tensors[name].relu() for name in "xy")
    bins = case.settings["bins"]
    edges = [percentile_edges(z, bins) for z in (x, y)]
    i, j = (torch.bucketize(z, e[:-1], right=True) for z, e in zip((x, y), edges, strict=True))
    counts = torch.bincount(bins * i + j, minlength=bins**2).view(bins, bins)
    return {
        "edges of x (quantiles; the zero bin lies below the first)": edges[0],
        "edges of y": edges[1],
        "joint histogram": counts,
        "mutual information, uncorrected, nats": [mutual_information(x, y, bins, False)],
        "mutual information, corrected (card form)": [mutual_information(x, y, bins)],
        "mutual information of x with itself, uncorrected": [mutual_information(x, x, bins, False)],
    }


def of_correlation(case):
    x, y = (case.tensors[name].relu() for name in "xy")
    x[:, case.settings["dead channel of x"]] = case.settings["dead value"]
    return {
        "unit_correlation(x, y)": unit_correlation(x, y),
        "unit_correlation(x)": unit_correlation(x),
        "joint_affinity(x, y)": joint_affinity(x, y),
    }


def of_sparse(case):
    x, y = case.tensors["x"], case.tensors["y"]
    results = {}
    for lam in case.settings["lams"]:
        found = sparse_prediction(x, y, lam, max_iter=20_000, tol=1e-12)
        results[f"weight, lam {lam}"], results[f"bias, lam {lam}"] = found.weight, found.bias
        results[f"loss, lam {lam}"] = [found.loss]
        results[f"nonzeros per target, lam {lam}"] = found.nonzeros
    held_out = {"x_val": case.tensors["x_val"], "y_val": case.tensors["y_val"]}
    found = sparse_prediction(x, y, 0.02, max_iter=20_000, tol=1e-12, **held_out)
    return results | {"validation loss, lam 0.02": [found.loss]}


BY_KIND = {
    "matching": of_matching,
    "mi": of_information,
    "correlation": of_correlation,
    "sparse": of_sparse,
}


CASES = [*load_reference("convergent_learning")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_the_authors(case, agree):
    agree(case, BY_KIND[case.settings["kind"]](case))


# ---------------------------------------------------------------- bad input

X = torch.rand(6, 3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: unit_correlation(torch.rand(3)), r"x must be .*got shape \(3,\)"),
        (lambda: unit_correlation(torch.rand(0, 3)), "not empty"),
        (lambda: unit_correlation(X, torch.rand(5, 3)), "must share samples, got 6 and 5"),
        (lambda: unit_correlation(X, torch.rand(6, 3, 2)), r"y must be .*\(6, 3, 2\)"),
        (lambda: RunningCorrelation().compute(), "call update first"),
        (lambda: semi_match(torch.full((2, 2), torch.nan)), "got NaN"),
        (lambda: bipartite_match(torch.full((2, 2), torch.nan)), "got NaN"),
        (lambda: bipartite_match(torch.rand(0, 2)), r"got shape \(0, 2\)"),
        (lambda: permutation_cycles([0, 2, 2]), "1 is missing"),
        (lambda: mutual_information(torch.rand(4), torch.rand(5)), r"y must be \(4\)"),
        (lambda: percentile_edges(torch.tensor([1.0, torch.nan])), "x must be finite"),
        (lambda: percentile_edges(torch.rand(4), bins=0), "bins must be at least 1"),
        (lambda: sparse_prediction(X, X, -0.1), r"lam must be in \[0, inf\).*got lam = -0.1"),
        (lambda: sparse_prediction(X, X, 0.1, x_val=X), "x_val come with y_val"),
        (lambda: sparse_prediction(X.log() / 0, X, 0.1), "x must be finite"),
        (lambda: sparse_prediction(X, X, 0.1, x_val=X[:, :2], y_val=X), "x_val"),
        (lambda: linear_r2(X[:1], X[:1]), "samples of a half must be at least 1, got 0"),
        (lambda: spectral_clusters(torch.ones(3, 3), 4), r"k must be in 1\.\.3, got 4"),
        (lambda: spectral_clusters(torch.rand(3, 3).triu(), 2), "symmetric and not negative"),
        (lambda: spectral_clusters(torch.rand(3, 2), 2), r"affinity must be \(3, 3\)"),
        (lambda: cluster_mixing(torch.arange(3), torch.arange(2)), r"net_ids must be \(3\)"),
        (lambda: whitened_random_basis(torch.ones(5, 2)), "a unit that varies"),
        (lambda: small_cnn(size=6), "size must be divisible by all pooling together 4, got 6"),
        (lambda: train_nets([0], torch.rand(2, 1, 8, 8), torch.zeros(3).long()), r"x must be \(3"),
        (
            lambda: train_nets([0], torch.rand(2, 1, 8, 8), torch.zeros(2).long(), 0),
            "steps must be",
        ),
        (lambda: activations(small_cnn(), torch.rand(1, 1, 8, 8), ["conv9"]), "did you mean"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()


def test_another_number_of_units_is_refused(plain_python):
    running = RunningCorrelation()
    running.update(X)
    with pytest.raises(ValueError, match="x, by unit, must be"):
        running.update(torch.rand(6, 4))
