"""Iterative feature merging: Gram, merge and groups, whole networks, folding, the plain rivals."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from shuffle_nb.features.iterative_feature_merging import (
    balance_channels,
    by_channel,
    channel_distance,
    channel_gram,
    count_flops,
    feature_complexity,
    fold_batchnorm,
    fold_batchnorms,
    iterative_feature_merging,
    layers_of,
    merge_channels,
    merge_groups,
    merge_vgg,
    prune_channels,
    with_layers,
)
from shuffle_nb.foundations.costs import compare_costs
from shuffle_nb.foundations.costs import count_flops as count_calls
from shuffle_nb.foundations.reference import load_reference

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)
MERGED = load_reference("iterative_feature_merging")


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_layers(*sizes, seed=0):
    """Layers with biases; sizes from the input to the output."""
    pairs = enumerate(itertools.pairwise(sizes))
    return [[normal(m, n, seed=seed + k), normal(m, seed=seed + k + 99)] for k, (n, m) in pairs]


def run(layers, x, activation=F.relu):
    for w, b in layers[:-1]:
        x = activation(F.linear(x, w, b))
    return F.linear(x, *layers[-1])


def planted(share=0.5, n=9, copies=3, seed=0):
    """Some channels stand there twice; `share` of what reads them stays with the first."""
    (w, b), (v, c) = random_layers(4, n, 3, seed=seed)
    v = torch.cat([v[:, :copies] * share, v[:, copies:], v[:, :copies] * (1 - share)], 1)
    return [[torch.cat([w, w[:copies]]), torch.cat([b, b[:copies]])], [v, c]]


def as_written(layers, beta, lowest, averaged=False):
    """The method without any shortcut: everything is recomputed for every merge."""
    counts = [[1] * len(w) for w, _ in layers[:-1]]
    groups = [[[k] for k in range(len(w))] for w, _ in layers[:-1]]
    merging, history = True, []
    while merging:
        merging = False
        for depth, least in enumerate(lowest):
            n = len(counts[depth])
            w, v = layers[depth][0], by_channel(layers[depth + 1][0], n)
            if averaged:
                w = w / torch.tensor(counts[depth]).to(w).reshape(-1, *[1] * (w.ndim - 1))
            d = channel_distance(channel_gram([w], [v]))
            pairs = [(d[i, j].item(), i, j) for i in range(n) for j in range(i + 1, n)]
            near, i, j = min(pairs, default=(math.inf, 0, 0))
            if n > max(1, least) and near <= beta * d.max():
                layers, counts[depth] = merge_channels(layers, depth, i, j, counts[depth])
                joined = groups[depth][i] + groups[depth][j]
                groups[depth] = [g for k, g in enumerate(groups[depth]) if k not in (i, j)]
                groups[depth].append(joined)
                history.append((depth, i, j))
                merging = True
    return layers, groups, history


def apart(one, two):
    """Largest difference of two lists of layers."""
    pairs = zip(itertools.chain(*one), itertools.chain(*two), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


# ---------------------------------------------------------------- Gram and distance


@SMALL
@given(SEEDS, st.integers(1, 9), st.integers(1, 5))
def test_distance_is_that_of_all_weights_around_a_channel(seed, n, m):
    w, v = normal(n, m, 2, seed=seed), normal(3, n, 2, 2, seed=seed + 1)
    rows = torch.cat([w.flatten(1), v.movedim(1, 0).flatten(1)], 1)
    d = channel_distance(channel_gram([w], [v]))
    assert torch.allclose(d, torch.cdist(rows, rows) ** 2, atol=1e-9)
    assert (d >= 0).all() and torch.allclose(d, d.T, atol=1e-12)
    assert not d.diagonal().any()


def test_vectors_do_not_count_and_the_result_is_float64():
    w = normal(4, 3)
    gram = channel_gram([w.half(), normal(4)], [])
    assert gram.dtype == torch.float64
    assert torch.equal(gram, channel_gram([w.half()]))


def test_exact_copies_are_at_distance_zero_even_in_float32():
    w = normal(5, 300).float()
    d = channel_distance(channel_gram([torch.cat([w, w])]))
    assert d.diagonal(5).max() < 1e-12


def test_gradients_of_gram_and_merge():
    w, b, v = (normal(*shape).requires_grad_() for shape in ((4, 3), (4,), (2, 4)))

    def outputs(w, b, v):
        merged, _ = merge_channels([[w, b], [v, None]], 0, 1, 3, [1, 3, 1, 2])
        grouped = merge_groups([[w, b], [v, None]], 0, [[0, 2], [1], [3]])
        return merged[0][0], merged[1][0], grouped[0][1], grouped[1][0], channel_gram([w], [v])

    assert torch.autograd.gradcheck(outputs, (w, b, v))


@pytest.mark.usefixtures("plain_python")
def test_compiled_without_graph_breaks():
    layers = random_layers(4, 6, 3)

    def core(w, b, v, c):
        merged, _ = merge_channels([[w, b], [v, c]], 0, 1, 4, [1.0] * 6)
        d = channel_distance(channel_gram([merged[0][0]], [merged[1][0]]))
        return d, merge_groups([[w, b], [v, c]], 0, [[0, 5], [1, 2, 3], [4]])[0][0]

    flat = [x for layer in layers for x in layer]
    compiled = torch.compile(core, fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(*flat), core(*flat), strict=True):
        assert torch.allclose(one, two)


def test_nothing_is_rounded_under_autocast():
    layers = [[x.float() for x in layer] for layer in random_layers(4, 8, 3)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = iterative_feature_merging(layers, targets=[4])
    outside = iterative_feature_merging(layers, targets=[4])
    assert inside.groups == outside.groups and apart(inside.model, outside.model) == 0


# ---------------------------------------------------------------- one merge, and groups


@SMALL
@given(SEEDS, st.sampled_from([0.0, 0.1, 1.0]), st.floats(-2, 2))
def test_merging_equal_channels_is_exact_for_every_split(seed, slope, share):
    layers = planted(share, n=5, copies=1, seed=seed)
    merged, counts = merge_channels(layers, 0, 0, 5, [1] * 6)
    x = normal(7, 4, seed=seed)
    for activation in (lambda x: F.leaky_relu(x, slope), lambda x: x):
        assert torch.allclose(run(layers, x, activation), run(merged, x, activation), atol=1e-12)
    assert counts == [1, 1, 1, 1, 2]
    assert torch.allclose(merged[0][1][-1], 2 * layers[0][1][0])  # biases are added


def test_gelu_does_not_tolerate_it():
    layers = planted(n=5, copies=1)
    merged, _ = merge_channels(layers, 0, 0, 5, [1] * 6)
    x = normal(7, 4)
    assert (run(layers, x, F.gelu) - run(merged, x, F.gelu)).abs().max() > 0.01


def test_a_third_copy_is_exact_with_counts():
    (w, b), (v, c) = random_layers(4, 5, 3)
    three = [[torch.cat([w, w[:1], w[:1]]), torch.cat([b, b[:1], b[:1]])]]
    three += [[torch.cat([v, normal(3, 2, seed=8)], 1), c]]
    once, counts = merge_channels(three, 0, 0, 5, [1] * 7)
    twice, counts = merge_channels(once, 0, 4, 5, counts)  # w, and 2w after it
    assert counts == [1, 1, 1, 1, 3]
    assert torch.allclose(twice[0][0][-1], 3 * w[0])
    x = normal(6, 4)
    assert torch.allclose(run(three, x), run(twice, x), atol=1e-12)
    assert iterative_feature_merging(three, beta=1e-9).widths == [7]  # the split is uneven
    three[0] = [torch.cat([w[:1] / 9, w[1:], w[:1] / 9, w[:1] / 9]), three[0][1]]
    three[1] = [torch.cat([v, v[:, :1], v[:, :1]], 1), c]
    assert iterative_feature_merging(three, beta=1e-9).widths == [6]  # 2w is at |w|^2 from w
    result = iterative_feature_merging(three, targets=[5])
    assert torch.allclose(run(result.model, x), run(three, x), atol=1e-12)


@SMALL
@given(SEEDS, st.integers(2, 8), st.data())
def test_the_order_of_merges_leaves_no_trace_but_the_groups(seed, n, data):
    layers = random_layers(3, n, 4, 2, seed=seed)
    groups, counts, merged = [[k] for k in range(n)], [1] * n, layers
    while len(groups) > data.draw(st.integers(1, n)):
        pair = st.lists(st.integers(0, len(groups) - 1), min_size=2, max_size=2, unique=True)
        i, j = data.draw(pair)
        merged, counts = merge_channels(merged, 0, i, j, counts)
        joined = groups[i] + groups[j]
        groups = [g for k, g in enumerate(groups) if k not in (i, j)] + [joined]
    assert counts == [len(group) for group in groups]
    assert apart(merged, merge_groups(layers, 0, groups)) < 1e-12


def test_biases_may_be_missing_and_inputs_stay():
    layers = [[normal(4, 3), None], [normal(2, 4).T.contiguous().T, None]]
    before = copy.deepcopy(layers)
    merged, _ = merge_channels(layers, 0, 0, 1, [1] * 4)
    assert merged[0][1] is None and merged[1][1] is None
    iterative_feature_merging(layers, targets=[2], balance=True)
    for one, two in zip(layers, before, strict=True):
        assert torch.equal(one[0], two[0])


# ---------------------------------------------------------------- the whole method


CONV = [[normal(6, 2, 3, 3), normal(6)], [normal(5, 6, 1, 1), normal(5)], [normal(3, 20), None]]


@pytest.mark.parametrize("beta", [0.02, 0.2, 0.5, 1.0, math.inf])
@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("case", ["two", "three", "convolutions"])
def test_kept_gram_matrices_do_what_recomputed_ones_do(case, averaged, beta):
    sizes = {"two": (5, 9, 7, 3), "three": (3, 6, 5, 4, 2)}
    layers = CONV if case == "convolutions" else random_layers(*sizes[case])
    ours = {"beta": beta} if beta <= 1 else {"targets": [2] * (len(layers) - 1)}
    lowest = [2 if beta > 1 else 1] * (len(layers) - 1)
    result = iterative_feature_merging(layers, averaged=averaged, **ours)
    merged, groups, history = as_written(layers, beta, lowest, averaged)
    assert result.groups == groups
    assert [step[:3] for step in result.history] == history
    expected = [x for layer in merged for x in layer if x is not None]
    found = [x for layer in result.model for x in layer if x is not None]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(found, expected, strict=True))


def test_ties_go_to_the_lowest_pair():
    layers = [[torch.zeros(5, 3), torch.zeros(5)], [torch.zeros(2, 5), None]]
    result = iterative_feature_merging(layers, targets=[2])
    assert [step[1:3] for step in result.history] == [(0, 1)] * 3
    assert result.groups == [[[2, 3], [4, 0, 1]]]
    assert as_written(layers, 1, [2])[1] == result.groups
    assert iterative_feature_merging(layers, beta=0.1).widths == [1]  # 0 <= 0 merges


@SMALL
@given(SEEDS, st.floats(0.01, 1), st.sampled_from([0.1, 0.5, 1.0]), st.integers(1, 4))
def test_groups_are_a_partition_and_options_are_kept(seed, beta, max_ratio, least):
    layers = random_layers(4, 9, 5, 3, seed=seed)
    result = iterative_feature_merging(layers, beta, max_ratio, least)
    for (w, _), groups, width, n in zip(
        result.model, result.groups, result.widths, (9, 5), strict=False
    ):
        assert len(w) == len(groups) == width >= least
        assert sorted(itertools.chain(*groups)) == list(range(n))
        assert n - width <= math.ceil(max_ratio * n)
    merges = [step[0] for step in result.history]
    assert [merges.count(k) for k in (0, 1)] == [9 - result.widths[0], 5 - result.widths[1]]
    assert all(0 <= near <= beta * far for *_, near, far in result.history)


def test_rounds_merge_one_pair_a_layer():
    history = iterative_feature_merging(random_layers(4, 9, 7, 3), targets=[3, 4]).history
    assert [step[0] for step in history] == [0, 1, 0, 1, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("copies", [1, 3, 6])
def test_planted_copies_are_found_by_a_tiny_beta(dtype, limit, copies):
    layers = [[x.to(dtype) for x in layer] for layer in planted(0.5, copies=copies)]
    result = iterative_feature_merging(layers, beta=1e-9)
    assert result.widths == [9]
    pairs = [sorted(group) for group in result.groups[0] if len(group) > 1]
    assert sorted(pairs) == [[k, 9 + k] for k in range(copies)]
    x = normal(20, 4).to(dtype)
    assert (run(layers, x) - run(result.model, x)).abs().max() < limit
    assert result.model[0][0].dtype == dtype


@SMALL
@given(SEEDS, st.floats(0.35, 0.48))
def test_uneven_copies_are_found_by_targets_only(seed, share):
    layers = planted(share, seed=seed)
    assert iterative_feature_merging(layers, beta=1e-9).widths == [12]
    if min(step[3] for step in iterative_feature_merging(layers, targets=[11]).history) < 0.05:
        return  # another pair happens to be near
    result, x = iterative_feature_merging(layers, targets=[9]), normal(20, 4)
    assert (run(layers, x) - run(result.model, x)).abs().max() < 1e-12 or share < 0.4


def test_width_never_rises_with_beta_on_planted_copies():
    layers = planted(0.5, copies=4)
    widths = [iterative_feature_merging(layers, beta).widths[0] for beta in (1e-9, 1e-3, 0.2, 1)]
    assert widths[0] == 9 and widths == sorted(widths, reverse=True)


@SMALL
@given(SEEDS)
def test_order_of_the_channels_does_not_matter(seed):
    layers = random_layers(4, 8, 6, 3, seed=seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    (w, b), (v, c), last = layers
    mixed = [[w[order], b[order]], [v[:, order], c], last]
    one, two = (iterative_feature_merging(x, targets=[4, 3]) for x in (layers, mixed))
    back = [sorted(order[k].item() for k in group) for group in two.groups[0]]
    assert sorted(map(sorted, one.groups[0])) == sorted(back)
    x = normal(5, 4, seed=seed)
    assert torch.allclose(run(one.model, x), run(two.model, x), atol=1e-10)


def test_a_vanishing_beta_changes_nothing():
    layers = random_layers(4, 8, 6, 3)
    result = iterative_feature_merging(layers, beta=1e-12)
    assert result.widths == [8, 6] and result.history == []
    assert apart(layers, result.model) == 0


def test_one_channel_is_never_merged():
    layers = random_layers(4, 1, 3)
    assert iterative_feature_merging(layers, beta=1.0).widths == [1]
    assert iterative_feature_merging(random_layers(4, 2, 3), beta=0.99).widths == [2]


def test_max_ratio_counts_as_the_authors_do():
    layers = random_layers(4, 5, 3)
    assert iterative_feature_merging(layers, beta=1.0, max_ratio=0.5).widths == [2]  # 3 merges


# ---------------------------------------------------------------- balance


@SMALL
@given(SEEDS)
def test_balance_keeps_the_function_and_finds_scaled_copies(seed):
    layers = planted(0.5, n=6, copies=1, seed=seed)
    (w, b), (v, c) = layers
    w, b, v = w.clone(), b.clone(), v.clone()
    w[-1], b[-1], v[:, -1] = 3 * w[-1], 3 * b[-1], v[:, -1] / 3
    scaled, x = [[w, b], [v, c]], normal(9, 4, seed=seed)
    assert iterative_feature_merging(scaled, beta=1e-9).widths == [7]
    result = iterative_feature_merging(scaled, beta=1e-9, balance=True)
    assert result.widths == [6]
    assert torch.allclose(run(result.model, x), run(scaled, x), atol=1e-10)
    unmerged = iterative_feature_merging(scaled, targets=[7], balance=True).model
    assert torch.allclose(run(unmerged, x), run(scaled, x), atol=1e-10)
    assert torch.allclose(unmerged[0][0].norm(dim=1), unmerged[1][0].norm(dim=0))


def test_balance_leaves_dead_channels_alone():
    layers = random_layers(4, 5, 3)
    layers[0][0][2], layers[1][0][:, 3] = 0, 0
    balanced = balance_channels(layers)
    for k in (2, 3):
        assert torch.equal(balanced[0][0][k], layers[0][0][k])
        assert torch.equal(balanced[1][0][:, k], layers[1][0][:, k])
    assert all(x.isfinite().all() for layer in balanced for x in layer)


# ---------------------------------------------------------------- networks


def small_cnn(norm=True):
    torch.manual_seed(1)
    norms = [nn.BatchNorm2d(6), nn.BatchNorm1d(8)] if norm else [nn.Identity(), nn.Identity()]
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=not norm), norms[0], nn.LeakyReLU(0.1),
        nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.AvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.5), nn.Linear(5 * 4, 8), norms[1], nn.ReLU(), nn.Linear(8, 3),
    )  # fmt: skip
    with torch.no_grad():
        for bn in norms if norm else []:
            bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2)
            bn.weight.uniform_(-1.5, 1.5), bn.bias.uniform_(-1, 1)
    return net.eval()


def test_a_network_becomes_really_smaller():
    net = small_cnn(norm=False)
    state = copy.deepcopy(net.state_dict())
    result = iterative_feature_merging(net, targets=[4, 3, 5])
    assert result.widths == [4, 3, 5]
    sizes = [(type(m), tuple(m.weight.shape)) for m in result.model if hasattr(m, "weight")]
    assert sizes == [
        (nn.Conv2d, (4, 2, 3, 3)), (nn.Conv2d, (3, 4, 3, 3)),
        (nn.Linear, (5, 12)), (nn.Linear, (3, 5)),
    ]  # fmt: skip
    assert (result.model[4].in_channels, result.model[9].in_features) == (4, 12)
    x = torch.randn(2, 2, 8, 8)
    assert result.model(x).shape == (2, 3) and not result.model.training
    assert torch.allclose(result.model(x)[:1], result.model(x[:1]), atol=1e-6)
    assert result.model(x[:0]).shape == (0, 3)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    result.model(x).sum().backward()  # it can be trained further
    assert all(p.grad is not None for p in result.model.parameters())


def test_planted_copies_in_a_convolutional_network():
    net = small_cnn(norm=False).double()
    layers, extra = layers_of(net), []
    for depth in range(3):
        (w, b), (v, c) = layers[depth], layers[depth + 1]
        columns = by_channel(v, len(w)).clone()
        columns[:, 0] /= 2
        columns = torch.cat([columns, columns[:, :1]], 1)
        layers[depth] = [torch.cat([w, w[:1]]), torch.cat([b, b[:1]])]
        layers[depth + 1] = [columns.reshape(len(v), -1, *v.shape[2:]), c]
        extra.append([0, len(w)])
    wide, x = with_layers(net, layers), normal(3, 2, 8, 8)
    assert torch.allclose(wide(x), net(x), atol=1e-12)
    result = iterative_feature_merging(wide, targets=[6, 5, 8])
    assert [groups[-1] for groups in result.groups] == extra
    assert (result.model(x) - net(x)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_types_are_kept(dtype):
    net = small_cnn(norm=False).to(dtype)
    smaller = iterative_feature_merging(net, targets=[3, 3, 4]).model
    assert {p.dtype for p in smaller.parameters()} == {dtype}
    again = iterative_feature_merging(small_cnn(norm=False), targets=[3, 3, 4]).model
    assert (
        torch.allclose(smaller[0].weight.float(), again[0].weight, atol=2e-2) or dtype.itemsize < 4
    )


def test_parameters_of_the_small_digits_network():
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    assert sum(p.numel() for p in net.parameters()) == 50_826
    smaller = iterative_feature_merging(net, targets=[76, 38]).model
    assert sum(p.numel() for p in smaller.parameters()) == 8_256
    assert count_flops(net, (64,)) == 2 * (64 * 256 + 256 * 128 + 128 * 10)
    left = feature_complexity(net, beta=0.9)
    assert list(left) == ["0", "2"] and left["0"] < 256
    assert left == dict(zip("02", iterative_feature_merging(net, 0.9).widths, strict=True))


@pytest.mark.parametrize("affine", [True, False])
def test_folding_is_convolution_and_norm(affine):
    net = small_cnn()
    x = torch.randn(4, 2, 8, 8)
    folded = fold_batchnorms(net)
    assert not any("Norm" in type(module).__name__ for module in folded)
    assert (folded(x) - net(x)).abs().max() < 1e-5
    assert (folded.double()(x.double()) - net.double()(x.double())).abs().max() < 1e-5
    conv, bn = nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4, affine=affine).eval()
    x = torch.randn(2, 3, 5, 5)
    bn.running_mean.uniform_(-1, 1), bn.running_var.uniform_(0.5, 2)
    assert (fold_batchnorm(conv, bn)(x) - bn(conv(x))).abs().max() < 1e-6
    assert conv.training and torch.equal(bn.running_mean, bn.running_mean.clone())


def test_merging_after_folding_is_exact_for_equal_channels_with_their_norms():
    torch.manual_seed(0)
    conv, bn, last = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)
    with torch.no_grad():
        conv.weight[2], conv.bias[2] = conv.weight[0], conv.bias[0]
        bn.running_mean.copy_(torch.tensor([0.3, 0.1, 0.3]))
        bn.running_var.copy_(torch.tensor([2.0, 1.0, 2.0]))
    net = nn.Sequential(conv, bn, nn.ReLU(), last).double().eval()
    folded, x = fold_batchnorms(net), normal(5, 4)
    merged, _ = merge_channels(layers_of(folded), 0, 0, 2, [1] * 3)
    assert torch.allclose(run(merged, x), net(x), atol=1e-7)


@pytest.mark.parametrize("score", ["norm", "product", "random"])
def test_pruning_keeps_the_largest_of_the_untouched_network(score):
    net = small_cnn(norm=False)
    generator = torch.Generator().manual_seed(4)
    smaller = prune_channels(net, [4, 2, 5], score, generator)
    layers, found = layers_of(net), layers_of(smaller)
    made = layers[0][0].flatten(1).norm(dim=1)
    value = {"norm": made, "product": made * layers[1][0].movedim(1, 0).flatten(1).norm(dim=1)}
    if score != "random":
        kept = value[score].topk(4).indices.sort().values
        assert torch.equal(found[0][0], layers[0][0][kept])
        assert torch.equal(found[0][1], layers[0][1][kept])
    again = prune_channels(net, [4, 2, 5], score, generator.manual_seed(4))
    assert torch.equal(again[0].weight, smaller[0].weight)
    assert apart(layers_of(prune_channels(net, [6, 5, 8], score)), layers) == 0
    assert smaller(torch.randn(2, 2, 8, 8)).shape == (2, 3)


# ---------------------------------------------------------------- what it costs


def test_flops_of_a_gram_matrix():
    w, v = normal(20, 7), normal(3, 20)
    assert count_calls(channel_gram, [w], [v]) == 2 * 20 * 20 * (7 + 3)


@pytest.mark.parametrize("sizes", [(16, 24, 12, 4), (16, 128, 64, 4)])
def test_kept_gram_matrices_are_no_slower(sizes):
    layers = random_layers(*sizes)
    targets = [n // 4 for n in sizes[1:-1]]
    methods = {
        "plain": lambda: as_written_fast(layers, targets),
        "ours": lambda: iterative_feature_merging(layers, targets=targets),
    }
    costs = compare_costs(methods, rounds=5, min_seconds=0.05)
    assert sorted(costs.ratios("plain", to="ours"))[2] > 0.6


def as_written_fast(layers, targets):
    """As written, with the closest pair found by PyTorch."""
    counts = [[1] * len(w) for w, _ in layers[:-1]]
    while [len(c) for c in counts] != targets:
        for depth, width in enumerate(targets):
            n = len(counts[depth])
            if n > width:
                gram = channel_gram([layers[depth][0]], [by_channel(layers[depth + 1][0], n)])
                d = channel_distance(gram) + torch.full_like(gram, math.inf).tril()
                i, j = divmod(int(d.argmin()), n)
                layers, counts[depth] = merge_channels(layers, depth, i, j, counts[depth])
    return layers


# ---------------------------------------------------------------- full scale


def test_a_convolutional_network_on_public_images_from_a_local_folder(tmp_path):
    hub = pytest.importorskip("datasets")
    colours = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8)
    for split, count in (("train", 24), ("test", 8)):
        table = {
            "image": [Image.fromarray(colour) for colour in colours[:count]],
            "label": [k % 4 for k in range(count)],
        }
        hub.Dataset.from_dict(table).to_parquet(str(tmp_path / f"{split}.parquet"))
    plan, betas = (4, "M", 6, 5), (1e-9, 0.5, 1.0)
    rows = merge_vgg(str(tmp_path), betas, plan, steps=2, lr=1e-3, device="cpu")
    assert [row[0] for row in rows] == list(betas)
    assert [row[4] for row in rows][::2] == [[4, 6, 5], [1, 1, 1]]
    assert all(0 <= row[1] <= 1 for row in rows)
    convolutions = 64 * 4 * 27 + 16 * 6 * 36 + 16 * 5 * 54
    assert rows[0][2] == 2 * (convolutions + 5 * 4)
    assert rows[0][3] == 4 * 28 + 6 * 37 + 5 * 55 + 4 * 6
    for before, after in itertools.pairwise(rows):
        assert after[2] <= before[2] and after[3] <= before[3]


# ---------------------------------------------------------------- bad input


RELU = nn.ReLU()
SHARED = nn.Linear(4, 4)
BAD_NETWORKS = {
    "GELU": (nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2)), "ReLU.*got GELU.* '1'"),
    "tanh": (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), "IFM needs ReLU"),
    "norm": (
        nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)),
        "'1' is BatchNorm1d.*fold it first",
    ),
    "groups": (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), RELU, nn.Conv2d(4, 2, 1)), "groups=1"),
    "no flatten": (nn.Sequential(nn.Conv2d(4, 4, 1), RELU, nn.Linear(4, 2)), "flattened"),
    "flat too late": (
        nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(8, 2)),
        "must read the 4 channels",
    ),
    "flat partly": (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.Linear(4, 2)),
        "IFM needs.*Flatten",
    ),
    "pooled vector": (
        nn.Sequential(nn.Linear(3, 4), nn.MaxPool2d(2), nn.Linear(4, 2)),
        "got MaxPool2d",
    ),
    "other width": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(5, 2, 1)), r"\(out, 4, ...\), got"),
    "twice": (nn.Sequential(SHARED, RELU, SHARED), "each used once"),
    "one layer": (nn.Sequential(nn.Linear(3, 4), RELU), "two layers or more"),
    "no Sequential": (nn.Linear(3, 4), "must be a Sequential or layers, got Linear"),
}


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(("model", "message"), BAD_NETWORKS.values(), ids=BAD_NETWORKS)
def test_networks_that_cannot_be_merged(model, message):
    with pytest.raises(ValueError, match=message):
        iterative_feature_merging(model)


BAD_OPTIONS = {
    "beta 0": ({"beta": 0.0}, r"beta must be in \(0, 1\], got 0"),
    "beta 2": ({"beta": 2.0}, "beta must be"),
    "beta nan": ({"beta": math.nan}, "beta must be"),
    "ratio": ({"max_ratio": 1.5}, r"max_ratio must be in \(0, 1\], got 1.5"),
    "least": ({"min_channels": 0}, "min_channels must be at least 1"),
    "target 0": ({"targets": [0, 3]}, r"targets\[0\] must be in 1..6, got 0"),
    "target 9": ({"targets": [4, 9]}, r"targets\[1\] must be in 1..5, got 9"),
    "one target": ({"targets": [4]}, "targets must hold 2 widths"),
    "half a channel": ({"targets": [4, 2.5]}, "whole number"),
}


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        iterative_feature_merging(random_layers(4, 6, 5, 3), **options)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200])
def test_weights_that_are_no_numbers(value):
    layers = random_layers(4, 6, 3)
    layers[0][0][1, 1] = value
    with pytest.raises(ValueError, match="layer 0 must be finite"):
        iterative_feature_merging(layers)


@pytest.mark.usefixtures("plain_python")
def test_other_bad_arguments():
    layers = random_layers(4, 6, 3)
    bad = {
        r"named once, got \[\[1, 1\]": lambda: merge_channels(layers, 0, 1, 1, [1] * 6),
        "named once": lambda: merge_channels(layers, 0, 1, 7, [1] * 6),
        r"0..5 must be named once": lambda: merge_groups(layers, 0, [[0, 1], [2, 3]]),
        "depth must be in 0..0, got 1": lambda: merge_channels(layers, 1, 0, 1, [1] * 3),
        "share one number of channels": lambda: channel_gram([normal(3, 2)], [normal(2, 4)]),
        "no such tensor": lambda: channel_gram([normal(3)]),
        "gram must be": lambda: channel_distance(normal(3, 2)),
        "score must be one of.*'norm'": lambda: prune_channels(layers, [3], "norms"),
        r"widths\[0\] must be in 1..6": lambda: prune_channels(layers, [7]),
        "running statistics of 4": lambda: fold_batchnorm(nn.Linear(2, 4), nn.BatchNorm1d(3)),
        "running statistics": lambda: fold_batchnorm(
            nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)
        ),
        "right after": lambda: fold_batchnorms(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3))),
        "bias of layer 0": lambda: iterative_feature_merging(
            [[normal(3, 2), normal(4)], [normal(2, 3), None]]
        ),
        "number of layers must be": lambda: iterative_feature_merging(layers[:1]),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- the authors' numbers


def given_layers(case):
    layers = []
    while f"W{len(layers)}" in case.tensors:
        k = len(layers)
        layers.append([case.tensors[f"W{k}"], case.tensors.get(f"b{k}")])
    return layers


def run_any(layers, x):
    """Convolutions with padding 1, then a global average, then Linear."""
    for w, b in layers[:-1]:
        x = F.relu(F.conv2d(x, w, b, padding=1) if w.ndim == 4 else F.linear(x, w, b))
    return F.linear(x.mean((2, 3)) if x.ndim == 4 else x, *layers[-1])


def whole(case):
    layers, options = given_layers(case), ("beta", "max_ratio")
    result = iterative_feature_merging(layers, **{name: case.settings[name] for name in options})
    found = {"widths": torch.tensor(result.widths)}
    found["network output before"] = run_any(layers, case.tensors["x"])
    found["network output after"] = run_any(result.model, case.tensors["x"])
    for k, (w, b) in enumerate(result.model):
        found |= {f"W{k} after merging": w, f"b{k} after merging": b}
    for k, groups in enumerate(result.groups):
        gram = channel_gram([layers[k][0]], [layers[k + 1][0]])
        found[f"squared distances of layer {k} before merging"] = channel_distance(gram)
        concatenated = torch.tensor(list(itertools.chain(*groups)))
        found[f"groups of layer {k}, concatenated"] = concatenated
        found[f"group sizes of layer {k}"] = torch.tensor([len(group) for group in groups])
    return found


def one_merge(case):
    layers, names = given_layers(case), ("i", "j", "counts")
    ((w, b), (v, _)), counts = merge_channels(layers, 0, *(case.settings[name] for name in names))
    return {"W0 after": w, "b0 after": b, "W1 after": v, "counts after": torch.tensor(counts)}


def card_form(case):
    tensors = case.tensors
    conv, bn = nn.Conv2d(3, 3, 2).double(), nn.BatchNorm2d(3, eps=1e-5).double()
    state = {name.split(".")[1]: value for name, value in tensors.items() if "conv." in name}
    conv.load_state_dict(state)
    state = {name.split(".")[1]: value for name, value in tensors.items() if "bn." in name}
    bn.load_state_dict(state | {"num_batches_tracked": torch.tensor(0)})
    folded = fold_batchnorm(conv, bn)
    net = given_layers(case)
    (w, b), (v, c) = net
    halved = torch.cat([v, v[:, 1:2] / 2], 1)
    halved[:, 1] /= 2
    wide = [[torch.cat([w, w[1:2]]), torch.cat([b, b[1:2]])], [halved, c]]
    result = iterative_feature_merging(wide, beta=1e-9)
    assert result.groups == iterative_feature_merging(wide, targets=[4]).groups
    balanced = balance_channels(net)
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    kept = {
        score: [w.tolist().index(row) for row in prune_channels(net, [2], score)[0][0].tolist()]
        for score in ("norm", "product")
    }
    outputs = run(wide, tensors["x"])
    assert torch.allclose(outputs, run(result.model, tensors["x"]), atol=1e-12)
    return {
        "folded weight": folded.weight,
        "folded bias": folded.bias,
        "squared distances with the planted duplicate": channel_distance(
            channel_gram([wide[0][0]], [wide[1][0]])
        ),
        "W0 after merging the duplicate": result.model[0][0],
        "b0 after merging the duplicate": result.model[0][1],
        "W1 after merging the duplicate": result.model[1][0],
        "network output, the same before and after": outputs,
        "balanced W0": balanced[0][0],
        "balanced b0": balanced[0][1],
        "balanced W1": balanced[1][0],
        "channels kept by score norm, ascending": torch.tensor(kept["norm"]),
        "channels kept by score product, ascending": torch.tensor(kept["product"]),
        "count_flops of the planted net, input (4,)": torch.tensor([count_flops(plain, (4,))]),
    }


REFERENCE = {
    "MLP with two hidden layers, several rounds": whole,
    "convolutions, at most half of the channels merged": whole,
    "one merge with multiplicities 3 and 2": one_merge,
    "folding, planted duplicate, balance, pruning": card_form,
}


@pytest.mark.parametrize("case", list(MERGED), ids=lambda case: case.name)
def test_the_authors_numbers(case, agree):
    agree(case, REFERENCE[case.name](case))
