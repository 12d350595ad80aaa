"""SPEN: ego networks of all nodes at once, equivariant maps, layers, networks, what they see."""

import sys

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.foundations.costs import count_flops, peak_memory
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.graphs import subgraph_permutation_equivariant as spen
from shuffle_nb.graphs.subgraph_permutation_equivariant import (
    GIN,
    SPEN,
    EquivariantLinear,
    GlobalPEN,
    SubgraphBatch,
    bucketed,
    ego_subgraphs,
    load_tu,
    num_maps,
    take_graphs,
    whole_graphs,
    wl_equivalent,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)
MAPS = {(a, b): getattr(spen, f"equivariant_maps_{a}to{b}") for a in (2, 1) for b in (2, 1, 0)}
DOUBLE = torch.float64


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE)


def edges_of(graph):
    edges = torch.tensor(list(graph.edges), dtype=torch.long).reshape(-1, 2).T
    return edges, len(graph)


def random_graph(seed, n=9, p=0.3):
    return nx.gnp_random_graph(n, p, seed=seed % 2**32)


def prefix(*sizes, m):
    return torch.arange(m) < torch.tensor(sizes)[:, None]


def renamed(x, order):
    """P X P^T, or P x."""
    for dim in range(2, x.ndim):
        x = x.index_select(dim, order)
    return x


# ---------------------------------------------------------------- ego networks


@SMALL
@given(SEEDS, st.integers(1, 4), st.booleans())
def test_ego_networks_are_those_of_networkx(seed, k, root_channel):
    graph = random_graph(seed)
    features, (edges, n) = normal(9, 2, seed=seed), edges_of(graph)
    weights = normal(edges.shape[1], 3, seed=seed + 1)
    egos = ego_subgraphs(edges, n, k, features, weights, root_channel=root_channel)
    weight_of = {frozenset(e.tolist()): w for e, w in zip(edges.T, weights, strict=True)}
    assert egos.root.tolist() == list(range(n)) and egos.graph.eq(0).all()
    for v in range(n):
        ego = nx.ego_graph(graph, v, k)
        members = [v, *sorted(set(ego) - {v})]
        m = len(members)
        assert egos.mask[v].tolist() == [True] * m + [False] * (egos.mask.shape[1] - m)
        assert egos.nodes[v].tolist() == members + [-1] * (egos.mask.shape[1] - m)
        expected = torch.zeros(6 + root_channel, *egos.x.shape[2:], dtype=DOUBLE)
        for i, a in enumerate(members):
            expected[-2:, i, i] = features[a]
            for j, b in enumerate(members):
                if ego.has_edge(a, b):
                    expected[0, i, j] = 1
                    expected[1:4, i, j] = weight_of[frozenset((a, b))]
        if root_channel:
            expected[4, 0, 0] = 1
        assert torch.equal(egos.x[v], expected)


def test_edges_are_symmetrised_and_merged_and_loops_dropped():
    plain = ego_subgraphs(torch.tensor([[0, 1], [1, 2]]), 4)
    messy = ego_subgraphs(torch.tensor([[1, 0, 1, 2, 3], [0, 1, 2, 1, 3]]), 4)
    assert all(torch.equal(a, b) for a, b in zip(plain, messy, strict=True))
    assert plain.mask.sum(1).tolist() == [2, 3, 2, 1]
    weights = torch.tensor([[1.0], [3.0], [5.0], [5.0], [9.0]])
    egos = ego_subgraphs(torch.tensor([[1, 0, 1, 2, 3], [0, 1, 2, 1, 3]]), 4, edge_attr=weights)
    assert egos.x[0, 1, :2, :2].tolist() == [[0, 2], [2, 0]]


@pytest.mark.parametrize("n", [1, 3])
def test_a_graph_without_edges_is_lone_nodes(n):
    egos = ego_subgraphs(torch.zeros(2, 0, dtype=torch.long), n, 3)
    assert egos.x.shape == (n, 2, 1, 1) and egos.mask.all()
    assert egos.x[:, 0].eq(0).all() and egos.x[:, 1].eq(1).all()
    assert SPEN(2)(egos, n).isfinite().all()


def test_a_union_is_its_graphs_side_by_side_and_padding_adds_nothing():
    graphs = [random_graph(seed, n) for seed, n in ((1, 5), (2, 9), (3, 1))]
    edges, n = edges_of(nx.disjoint_union_all(graphs))
    batch = torch.repeat_interleave(torch.tensor([5, 9, 1]))
    union = ego_subgraphs(edges, n, 2, batch=batch, pad_to=12)
    model = SPEN(2, 4, k=2).double()
    model_of = union._replace(x=union.x.double())
    together = model(model_of, n, 3)
    for i, graph in enumerate(graphs):
        own = model.cut(*edges_of(graph), dtype=DOUBLE)
        alone = model(own, len(graph))
        assert torch.allclose(together[i], alone[0], atol=1e-12)
        part = take_graphs(model_of, torch.tensor([i]))
        assert torch.allclose(model(part, len(graph)), alone, atol=1e-12)
        assert torch.equal(part.nodes[:, : own.nodes.shape[1]], own.nodes)
    chosen = take_graphs(model_of, torch.tensor([2, 0]))
    assert torch.allclose(model(chosen, 6, 2), together[[2, 0]], atol=1e-12)


def test_buckets_hold_every_subgraph_once_and_give_the_same_network():
    edges, n = edges_of(random_graph(4, 30, 0.15))
    model = SPEN(2, 4).double()
    egos = model.cut(edges, n, dtype=DOUBLE)
    sizes = [2, 3, 5, 8, 40]
    buckets = bucketed(egos, sizes)
    rows = torch.cat([index for index, _ in buckets])
    assert sorted(rows.tolist()) == list(range(n))
    for index, part in buckets:
        size = part.x.shape[-1]
        count = egos.mask[index].sum(1)
        below = max((s for s in [0, *sizes] if s < size), default=0)
        assert (count > below).all() and (count <= size).all() and part.mask.sum(1).equal(count)
    assert torch.allclose(model(buckets, n), model(egos, n), atol=1e-12)
    assert torch.allclose(model.nodes(buckets, n), model.nodes(egos, n), atol=1e-12)


GEOMETRIC = {  # nodes -> whole, ragged, padded, bucketed entries a channel
    100: (10_000, 4_974, 19_600, 5_896),
    200: (40_000, 10_174, 39_200, 11_908),
    400: (160_000, 19_858, 90_000, 22_896),
}


@pytest.mark.parametrize("n", GEOMETRIC)
def test_entries_grow_like_the_nodes_where_the_degree_is_fixed(n):
    graph = nx.random_geometric_graph(n, (6 / (torch.pi * n)) ** 0.5, seed=0)
    egos = ego_subgraphs(*edges_of(graph))
    wide = ego_subgraphs(*edges_of(graph), pad_to=24)
    buckets = bucketed(wide, [2, 4, 6, 8, 10, 12, 16, 24])
    in_buckets = sum(part.x[:, 0].numel() for _, part in buckets)
    ragged = egos.mask.sum(1).square().sum().item()
    assert GEOMETRIC[n] == (n * n, ragged, egos.x[:, 0].numel(), in_buckets)
    assert in_buckets <= 1.25 * ragged and 49 < ragged / n < 51


def test_no_table_of_all_pairs_of_nodes_is_built():
    def peak(n):
        return peak_memory(lambda edges: ego_subgraphs(edges, n), edges_of(nx.cycle_graph(n))[0])

    assert 1.8 < peak(4_000) / peak(2_000) < 2.2


def test_cutting_is_not_slower_than_one_ego_network_after_the_other():
    from shuffle_nb.foundations.costs import compare_costs

    graph = nx.gnp_random_graph(60, 0.1, seed=0)
    edges, n = edges_of(graph)

    def one_by_one():
        for v in graph:
            nx.ego_graph(graph, v, 1)

    ways = {"all at once": lambda: ego_subgraphs(edges, n), "one by one": one_by_one}
    ratios = compare_costs(ways, min_seconds=0.02).ratios("one by one", to="all at once")
    assert sorted(ratios)[4] > 1


# ---------------------------------------------------------------- maps


@pytest.mark.parametrize(("a", "b"), MAPS)
def test_maps_commute_with_renaming(a, b):
    x, mask = normal(3, 2, *[5] * a), torch.ones(3, 5, dtype=torch.bool)
    order = torch.tensor([3, 0, 4, 1, 2])
    found = MAPS[a, b](renamed(x, order), mask)
    expected = MAPS[a, b](x, mask)
    for dim in range(3, 3 + b):
        expected = expected.index_select(dim, order)
    assert found.shape == (3, 2, num_maps(a, b), *[5] * b)
    assert torch.allclose(found, expected, atol=1e-12)


RANKS = {
    (2, 2): (1, 8, 14, 15, 15),
    (2, 1): (1, 4, 5, 5, 5),
    (1, 2): (1, 4, 5, 5, 5),
    (1, 1): (1, 2, 2, 2, 2),
    (2, 0): (1, 2, 2, 2, 2),
    (1, 0): (1, 1, 1, 1, 1),
}


@pytest.mark.parametrize(("a", "b"), RANKS)
def test_maps_are_independent(a, b):
    for m, rank in enumerate(RANKS[a, b], 1):
        units = torch.eye(m**a, dtype=DOUBLE).view(m**a, 1, *[m] * a)
        maps = MAPS[a, b](units, torch.ones(m**a, m, dtype=torch.bool))
        assert torch.linalg.matrix_rank(maps[:, 0].transpose(0, 1).flatten(1)) == rank


def test_maps_are_complete():
    size, equations = 16, []
    eye = torch.eye(size, dtype=DOUBLE)
    for order in ([1, 0, 2, 3], [1, 2, 3, 0]):
        P = torch.eye(4, dtype=DOUBLE)[order]
        PP = torch.kron(P, P)
        equations.append(torch.kron(eye, PP.T.contiguous()) - torch.kron(PP, eye))
    assert size**2 - torch.linalg.matrix_rank(torch.cat(equations)) == 15


@pytest.mark.parametrize(("a", "b"), MAPS)
@pytest.mark.parametrize("junk", [7.0, float("nan")])
def test_padding_counts_for_nothing_and_comes_back_as_zero(a, b, junk):
    mask = prefix(3, 1, 5, m=5)
    real = mask if a == 1 else mask[:, :, None] & mask[:, None]
    x = normal(3, 2, *[5] * a).masked_fill(~real[:, None], junk)
    found = MAPS[a, b](x, mask)
    for i, size in enumerate((3, 1, 5)):
        cut = (slice(0, size),)
        alone = MAPS[a, b](x[(slice(i, i + 1), slice(None), *cut * a)], prefix(size, m=size))
        inside = (i, slice(None), slice(None), *cut * b)
        assert torch.allclose(found[inside], alone[0], atol=1e-12)
        rest = found[i].clone()
        rest[inside[1:]] = 0
        assert rest.eq(0).all()


# ---------------------------------------------------------------- layers


def maps_of(x, mask, a, b):
    if a:
        return MAPS[a, b](x, mask)
    if b == 0:
        return x[:, :, None]
    real = mask if b == 1 else mask[:, :, None] & mask[:, None]
    m = mask.shape[1]
    parts = [torch.ones(m, dtype=x.dtype)] if b == 1 else [torch.eye(m), torch.ones(m, m)]
    maps = torch.stack([x.view(*x.shape, *[1] * b) * part.to(x) for part in parts], 2)
    return maps * real[:, None, None]


ORDERS = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (2, 1), (2, 1, 0)]


@pytest.mark.parametrize("ins", ORDERS)
@pytest.mark.parametrize("outs", ORDERS)
def test_weighing_first_gives_the_weighted_sum_of_all_maps(ins, outs):
    mask = prefix(3, 1, 4, m=4)
    x = {0: normal(3, 2), 1: normal(3, 3, 4), 2: normal(3, 2, 4, 4)}
    layer = EquivariantLinear({a: x[a].shape[1] for a in ins}, dict.fromkeys(outs, 3)).double()
    for bias in layer.bias.values():
        torch.nn.init.normal_(bias)
    found = layer({a: x[a] for a in ins}, mask)
    assert list(found) == list(outs)
    for b in outs:
        expected = sum(
            torch.einsum("bcp...,ocp->bo...", maps_of(x[a], mask, a, b), layer.weight[f"{a}{b}"])
            for a in ins
        )
        bias = layer.bias[str(b)]
        constant = bias[0].view(-1, *[1] * b)
        if b == 2:
            constant = constant + bias[1].view(-1, 1, 1) * torch.eye(4)
        real = {0: 1, 1: mask[:, None], 2: (mask[:, :, None] & mask[:, None])[:, None]}[b]
        assert torch.allclose(found[b], expected + constant * real, atol=1e-12)


@SMALL
@given(SEEDS)
def test_a_random_layer_commutes_with_renaming(seed):
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    layer = EquivariantLinear({1: 2, 2: 3}, {0: 2, 1: 2, 2: 2}).double()
    features = {1: normal(2, 2, 6, seed=seed), 2: normal(2, 3, 6, 6, seed=seed)}
    mask = torch.ones(2, 6, dtype=torch.bool)
    plain = layer(features, mask)
    moved = layer({a: renamed(x, order) for a, x in features.items()}, mask)
    for b, y in plain.items():
        assert torch.allclose(moved[b], renamed(y, order), atol=1e-12)


def test_one_order_in_and_out_may_be_a_plain_tensor():
    x, mask = torch.randn(2, 3, 4, 4), prefix(4, 2, m=4)
    layer = EquivariantLinear({2: 3}, {2: 5})
    assert torch.equal(layer(x, mask), layer({2: x}, mask)[2])
    assert set(EquivariantLinear({2: 3}, {1: 5, 0: 1})(x, mask)) == {0, 1}


def test_layers_learn_and_start_as_the_card_says():
    layer = EquivariantLinear({2: 40}, {2: 50})
    assert layer.weight["22"].shape == (50, 40, 15) and layer.bias["2"].shape == (2, 50)
    assert layer.weight["22"].std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.03)
    assert all(bias.eq(0).all() for bias in layer.bias.values())
    assert not EquivariantLinear({2: 4}, {2: 5}, bias=False).bias
    both = EquivariantLinear({1: 30, 2: 60}, {1: 90})
    assert both.weight["21"].std().item() == pytest.approx((2 / 360) ** 0.5, rel=0.03)


@pytest.mark.parametrize("m", [1, 4])
def test_gradients_are_exact(m):
    layer = EquivariantLinear({1: 1, 2: 2}, {0: 1, 1: 1, 2: 2}).double()
    mask = prefix(m, max(1, m - 1), m=m)

    def call(v, x, *weights):
        return tuple(layer({1: v, 2: x}, mask).values())

    inputs = normal(2, 1, m).requires_grad_(), normal(2, 2, m, m).requires_grad_()
    assert torch.autograd.gradcheck(call, (*inputs, *layer.parameters()))


def test_only_x_itself_costs_a_product_for_every_entry():
    for c, h, m in ((3, 5, 7), (3, 5, 14)):
        layer, mask = EquivariantLinear({2: c}, {2: h}), torch.ones(2, m, dtype=torch.bool)
        products = count_flops(layer, torch.randn(2, c, m, m), mask) // 2
        assert products == 2 * (2 * m * m * c * h + 9 * m * c * h + 4 * c * h)


def test_a_layer_keeps_less_than_the_stacked_maps():
    layer, mask = EquivariantLinear({2: 8}, {2: 8}), torch.ones(4, 20, dtype=torch.bool)
    x = torch.randn(4, 8, 20, 20)
    stacked = peak_memory(MAPS[2, 2], x, mask)
    assert 3 * peak_memory(lambda x: layer(x, mask), x, backward=True) < stacked


# ---------------------------------------------------------------- networks


def test_parameters():
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(EquivariantLinear({2: 7}, {2: 5})) == 15 * 7 * 5 + 2 * 5
    assert count(SPEN(2)) == count(GlobalPEN(2)) == 512 + 3_872 + 1_296 + 1_122 == 6_802
    assert count(GIN(1)) == 4_346


@SMALL
@given(SEEDS, st.integers(1, 3))
def test_names_of_nodes_do_not_matter(seed, k):
    edges, n = edges_of(random_graph(seed))
    new = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    features, model = normal(n, 2, seed=seed), SPEN(4, 4, k=k).double()
    moved = torch.empty_like(features)
    moved[new] = features
    first = model.cut(edges, n, node_features=features)
    second = model.cut(new[edges], n, node_features=moved)
    assert torch.allclose(model(first, n), model(second, n), atol=1e-11)
    assert torch.allclose(model.nodes(first, n), model.nodes(second, n)[new], atol=1e-11)


def test_as_wide_as_the_graph_and_unmarked_it_is_the_global_network():
    edges, n = edges_of(nx.karate_club_graph())
    whole, local = GlobalPEN(1, 4).double(), SPEN(1, 4).double()
    local.load_state_dict(whole.state_dict())
    egos = ego_subgraphs(edges, n, n, root_channel=False, dtype=DOUBLE)
    x, mask = whole_graphs(edges, torch.zeros(n, dtype=torch.long))
    assert torch.allclose(local.nodes(egos, n), whole.nodes(x[:, :1].double(), mask)[0], atol=1e-10)
    assert torch.allclose(local(egos, n), whole(x[:, :1].double(), mask), atol=1e-10)


def test_whole_graphs_are_adjacency_identity_and_mask():
    graphs = [random_graph(1, 4), random_graph(2, 7), random_graph(3, 1)]
    edges, _ = edges_of(nx.disjoint_union_all(graphs))
    x, mask = whole_graphs(edges, torch.repeat_interleave(torch.tensor([4, 7, 1])))
    assert x.shape == (3, 2, 7, 7) and mask.sum(1).tolist() == [4, 7, 1]
    for i, graph in enumerate(graphs):
        m = len(graph)
        assert x[i, 0, :m, :m].numpy().tolist() == nx.to_numpy_array(graph).tolist()
        assert torch.equal(x[i, 1, :m, :m], torch.eye(m)) and x[i].sum() == x[i, :, :m, :m].sum()
    model = GlobalPEN(2, 4).double()
    together = model(x.double(), mask)
    alone = model(x[:1, :, :4, :4].double(), mask[:1, :4])
    assert torch.allclose(together[:1], alone, atol=1e-12)


def test_nan_stays_in_its_graph():
    edges = torch.tensor([[0, 1, 3], [1, 2, 4]])
    features = torch.zeros(5, 1)
    features[3] = float("nan")
    batch = torch.tensor([0, 0, 0, 1, 1])
    model = SPEN(3, 4)
    found = model(model.cut(edges, 5, node_features=features, batch=batch), 5, 2)
    assert found[0].isfinite().all() and found[1].isnan().all()


def test_a_graph_that_holds_no_nodes_has_finite_logits():
    egos = ego_subgraphs(torch.tensor([[0], [1]]), 2, batch=torch.tensor([2, 2]))
    assert SPEN(2)(egos, 2, 4).isfinite().all()


def strided(x):
    return torch.stack([x, x], -1)[..., 0]


def test_views_and_an_empty_batch():
    model, egos = SPEN(2, 4), ego_subgraphs(*edges_of(nx.karate_club_graph()))
    loose = SubgraphBatch(*map(strided, egos))
    assert not loose.x.is_contiguous()
    assert torch.allclose(model(loose, 34), model(egos, 34), atol=1e-6)
    layer = EquivariantLinear({2: 2}, {0: 1, 1: 3, 2: 4})
    empty = layer({2: torch.zeros(0, 2, 5, 5)}, torch.zeros(0, 5, dtype=torch.bool))
    assert [tuple(y.shape) for y in empty.values()] == [(0, 1), (0, 3, 5), (0, 4, 5, 5)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    model, egos = SPEN(2, 4), ego_subgraphs(*edges_of(random_graph(3, 12)))
    plain = model(egos, 12)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.allclose(model(egos, 12).float(), plain, atol=0.1)
        x, mask = whole_graphs(edges_of(random_graph(3, 12))[0], torch.zeros(12).long())
        assert GlobalPEN(2, 4)(x, mask).isfinite().all()
        graph = torch.zeros(12).long()
        assert GIN(1)(torch.ones(12, 1), edges_of(random_graph(3, 12))[0], graph).isfinite().all()
    halved = model.to(dtype)(egos._replace(x=egos.x.to(dtype)), 12)
    assert halved.dtype == dtype and torch.allclose(halved.float(), plain, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_nodes_are_counted_right_in_half_precision(dtype):
    edges, n = edges_of(nx.circulant_graph(1_000, [1, 2, 3]))
    model, gin, graph = SPEN(2), GIN(1), torch.zeros(1_000, dtype=torch.long)
    egos, both = model.cut(edges, n), torch.cat([edges, edges.flip(0)], 1)
    for call in (lambda: model(egos, n), lambda: gin(torch.ones(n, 1), both, graph)):
        with torch.no_grad():
            plain = call()
            with torch.autocast("cpu", dtype=dtype):
                assert torch.allclose(call().float(), plain, rtol=0.05, atol=0.05)


def test_large_graphs_do_not_overflow_half_precision():
    whole, ones = torch.ones(1, 2, 600, 600).half(), prefix(600, m=600)
    assert GlobalPEN(2, 4).half()(whole, ones).isfinite().all()
    x, mask = torch.full((1, 1, 400, 400), 100.0, dtype=torch.float16), prefix(400, m=400)
    assert MAPS[2, 0](x, mask).isfinite().all()


def test_one_graph_for_the_compiler(plain_python):
    edges, n = edges_of(nx.karate_club_graph())
    model = SPEN(2, 4)
    egos = model.cut(edges, n)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(egos, n), model(egos, n), atol=1e-6)
    compiled(egos, n).sum().backward()
    both = torch.cat([edges, edges.flip(0)], 1)
    gin, graph = GIN(1), torch.zeros(n, dtype=torch.long)
    compiled = torch.compile(gin, fullgraph=True, backend="aot_eager")
    inputs = torch.ones(n, 1), both, graph
    assert torch.allclose(compiled(*inputs), gin(*inputs), atol=1e-6)
    layer = EquivariantLinear({1: 2, 2: 2}, {0: 1, 1: 2, 2: 2})
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    features = {1: torch.randn(34, 2, 18), 2: egos.x}
    for b, y in layer(features, egos.mask).items():
        assert torch.allclose(compiled(features, egos.mask)[b], y, atol=1e-5)


def test_it_learns_and_the_stars_do_not():
    def losses(stars):
        torch.manual_seed(0)
        graphs = [nx.circulant_graph(8, [1, 2]), nx.circulant_graph(8, [1, 3])]  # no triangles
        edges, n = edges_of(nx.disjoint_union_all(graphs))
        egos = ego_subgraphs(edges, n, batch=torch.tensor([0, 1]).repeat_interleave(8))
        if stars:
            egos.x[:, 0, 1:, 1:] = 0
        model, label = SPEN(2, 4), torch.tensor([0, 1])
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(60):
            loss = torch.nn.functional.cross_entropy(model(egos, n, 2), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert losses(stars=False) < 0.05 and losses(stars=True) > 0.6


# ---------------------------------------------------------------- what is told apart

K4 = nx.complete_graph(4)


def product(g, h):
    return nx.convert_node_labels_to_integers(nx.cartesian_product(g, h))


STEPS = (0, 1), (1, 0), (1, 1)
TORUS = [(v, 4 * ((v // 4 + i) % 4) + (v + j) % 4) for v in range(16) for i, j in STEPS]
PAIRS = {
    "hexagon": (nx.cycle_graph(6), nx.disjoint_union(nx.cycle_graph(3), nx.cycle_graph(3))),
    "prism": (nx.circular_ladder_graph(5), nx.petersen_graph()),
    "C8": (nx.circulant_graph(8, [1, 2]), product(K4, nx.complete_graph(2))),
    "Shrikhande": (nx.Graph(TORUS), product(K4, K4)),
}
SEEN = {("hexagon", 1), ("hexagon", 2), ("prism", 2), ("C8", 1)}


def gaps(pair, k):
    for seed in range(5):
        torch.manual_seed(seed)
        model = SPEN(2, k=k).double()
        a, b = (model(model.cut(*edges_of(g), dtype=DOUBLE), len(g)) for g in PAIRS[pair])
        yield (a - b).abs().max().item()


# Not C8 at k = 2, where every ball is the whole graph: 0 or 2e-6, by the layers.
ASKED = sorted({(pair, k) for pair in PAIRS for k in (1, 2)} - {("C8", 2)})


@pytest.mark.parametrize(("pair", "k"), ASKED)
def test_which_pairs_are_told_apart(pair, k):
    largest = max(gaps(pair, k))
    assert largest > 1e-3 if (pair, k) in SEEN else largest < 1e-12


@pytest.mark.parametrize("pair", PAIRS)
def test_one_weisfeiler_leman_and_whole_graphs_are_blind_to_all(pair):
    graphs = PAIRS[pair]
    assert wl_equivalent(*map(edges_of, graphs))
    torch.manual_seed(0)
    model = GlobalPEN(2).double()
    logits = []
    for graph in graphs:
        edges, n = edges_of(graph)
        x, mask = whole_graphs(edges, torch.zeros(n, dtype=torch.long))
        logits.append(model(x.double(), mask))
    assert torch.allclose(*logits, atol=1e-12)


@SMALL
@given(SEEDS)
def test_colours_are_those_of_networkx(seed):
    g, h = random_graph(seed, 6, 0.4), random_graph(seed + 1, 6, 0.4)
    for graph in (g, h):
        nx.set_node_attributes(graph, "", "colour")
    hashes = [nx.weisfeiler_lehman_graph_hash(x, None, "colour", iterations=6) for x in (g, h)]
    assert wl_equivalent(edges_of(g), edges_of(h)) == (hashes[0] == hashes[1])
    order = torch.randperm(6)
    edges, n = edges_of(g)
    assert wl_equivalent((edges, n), (order[edges], n))


def test_one_round_sees_degrees_and_sizes_must_agree():
    path, star = edges_of(nx.path_graph(4)), edges_of(nx.star_graph(3))
    assert not wl_equivalent(path, star, 1)
    assert not wl_equivalent(path, edges_of(nx.path_graph(5)))
    legs = edges_of(nx.Graph([(0, 1), (1, 2), (2, 3), (3, 4), (2, 5)]))
    other = edges_of(nx.Graph([(0, 1), (1, 2), (2, 3), (3, 4), (1, 5)]))
    assert wl_equivalent(legs, other, 1) and not wl_equivalent(legs, other, 2)


def test_gin_has_one_output_for_all_regular_graphs():
    graphs = [nx.random_regular_graph(4, n, seed=n) for n in (9, 12, 15)]
    edges, n = edges_of(nx.disjoint_union_all(graphs))
    graph = torch.repeat_interleave(torch.tensor([9, 12, 15]))
    logits = GIN(1)(torch.ones(n, 1), torch.cat([edges, edges.flip(0)], 1), graph, 3)
    assert (logits.amax(0) - logits.amin(0)).max() < 1e-5


# ---------------------------------------------------------------- bad input

EDGES = torch.tensor([[0, 1], [1, 2]])
X, MASK = torch.zeros(2, 3, 4, 4), prefix(4, 2, m=4)


def layer():
    return EquivariantLinear({2: 3}, {2: 2})


def egos():
    return ego_subgraphs(EDGES, 3)


BAD = {
    "k": (lambda: ego_subgraphs(EDGES, 3, 0), "k must be at least 1, got 0"),
    "k of SPEN": (lambda: SPEN(2, k=0), "k must be at least 1, got 0"),
    "empty graph": (lambda: ego_subgraphs(EDGES[:, :0], 0), "num_nodes must be at least 1, got 0"),
    "node id": (lambda: ego_subgraphs(EDGES, 2), r"edge_index must be in 0\.\.1, got 0 to 2"),
    "negative id": (lambda: ego_subgraphs(EDGES - 1, 3), r"edge_index must be in 0\.\.2, got -1"),
    "float edges": (lambda: ego_subgraphs(EDGES.float(), 3), "edge_index must be whole numbers"),
    "edges of three": (
        lambda: ego_subgraphs(EDGES.new_zeros(3, 2), 3),
        "edge_index must be .2, ed",
    ),
    "features": (lambda: ego_subgraphs(EDGES, 3, 1, torch.zeros(2, 1)), "node_features must be .3"),
    "edge features": (
        lambda: ego_subgraphs(EDGES, 3, edge_attr=torch.zeros(3, 1)),
        "edge_attr must be .2, features",
    ),
    "batch": (lambda: ego_subgraphs(EDGES, 3, batch=torch.zeros(2).long()), "batch must be .3"),
    "edge across": (
        lambda: ego_subgraphs(EDGES, 3, batch=torch.tensor([0, 0, 1])),
        r"both ends of an edge into one graph, not of \[1, 2\]",
    ),
    "pad_to": (lambda: ego_subgraphs(EDGES, 3, pad_to=2), "pad_to must be at least 3.*got 2"),
    "mask with a hole": (
        lambda: layer()(X, torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]]).bool()),
        r"mask must be True for the first nodes.*got \[1, 0, 1, 0\]",
    ),
    "mask of nobody": (lambda: MAPS[2, 2](X, prefix(4, 0, m=4)), r"got \[0, 0, 0, 0\]"),
    "not square": (lambda: MAPS[2, 1](X[:, :, :3], MASK), "x must be .2, channels, 4, 4.*3, 4"),
    "another batch": (lambda: MAPS[1, 1](X[:1, :, 0], MASK), "x must be .2, channels, 4"),
    "layer, not square": (
        lambda: layer()(X[..., :3], MASK),
        r"shape \(2, 3, 4, 4\), got \(2, 3, 4, 3",
    ),
    "channels": (lambda: layer()(X[:, :2], MASK), "order 2: expected 3 channels.*got .2, 2, 4, 4"),
    "channels of SPEN": (lambda: SPEN(3)(egos(), 3), "expected 3 channels"),
    "orders": (
        lambda: layer()({1: X[..., 0]}, MASK),
        r"features must hold orders \[2\], got \[1\]",
    ),
    "one for two": (
        lambda: EquivariantLinear({1: 1, 2: 1}, {1: 1})(X, MASK),
        r"orders \[1, 2\], got one tensor",
    ),
    "order 3": (lambda: EquivariantLinear({3: 1}, {2: 1}), "in_reps must map orders 0, 1 or 2"),
    "no output": (lambda: EquivariantLinear({2: 1}, {}), "out_reps must map orders"),
    "no channels": (lambda: EquivariantLinear({2: 0}, {2: 1}), r"in_reps\[2\] must be at least 1"),
    "no layers": (lambda: SPEN(2, num_layers=0), "num_layers must be at least 1, got 0"),
    "too few nodes": (lambda: SPEN(2)(egos(), 2), r"root must be in 0\.\.1, got 0 to 2"),
    "too few graphs": (
        lambda: SPEN(2)(egos()._replace(graph=torch.tensor([0, 0, 1])), 3),
        r"graph must be in 0\.\.0, got 0 to 1",
    ),
    "small buckets": (
        lambda: bucketed(egos(), [1, 2]),
        r"sizes must ascend, and reach 3.*\[1, 2\]",
    ),
    "buckets": (lambda: bucketed(egos(), [3, 2]), r"sizes must ascend.*got \[3, 2\]"),
    "no buckets": (lambda: bucketed(egos(), []), "sizes must ascend"),
    "unknown graph": (lambda: take_graphs(egos(), torch.tensor([1])), r"graphs must be in 0\.\.0"),
    "a graph twice": (lambda: take_graphs(egos(), torch.tensor([0, 0])), r"twice, got \[0, 0\]"),
    "a vector for a matrix": (lambda: MAPS[2, 2](X[:, :, 0], MASK), "x must be .2, channels, 4, 4"),
    "a matrix for a vector": (lambda: MAPS[1, 1](X, MASK), "x must be .2, channels, 4., got"),
    "graphs out of order": (
        lambda: whole_graphs(EDGES[:, :0], torch.tensor([0, 1, 0])),
        r"batch must ascend, got \[0, 1, 0\]",
    ),
    "iterations": (lambda: wl_equivalent((EDGES, 3), (EDGES, 3), 0), "iterations must be at least"),
    "WL ids": (lambda: wl_equivalent((EDGES, 3), (EDGES, 2)), r"edge_index must be in 0\.\.1"),
    "GIN ids": (
        lambda: GIN(1)(torch.ones(2, 1), EDGES, torch.zeros(2).long()),
        r"edge_index must be in 0\.\.1",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_a_sentence(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- public sets


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.data", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch_geometric"):
        load_tu("MUTAG")


def test_a_local_set_in_the_public_format(tmp_path):
    raw = tmp_path / "TINY" / "raw"
    raw.mkdir(parents=True)
    files = {
        "A": "1, 2\n2, 1\n2, 3\n3, 2\n4, 5\n5, 4\n",
        "graph_indicator": "1\n1\n1\n2\n2\n",
        "graph_labels": "1\n-1\n",
        "node_labels": "0\n1\n0\n2\n0\n",
    }
    for name, text in files.items():
        (raw / f"TINY_{name}.txt").write_text(text)
    edges, graph, features, label = load_tu("TINY", str(tmp_path))
    assert edges.tolist() == [[0, 1, 1, 2, 3, 4], [1, 0, 2, 1, 4, 3]]
    assert graph.tolist() == [0, 0, 0, 1, 1] and label.tolist() == [1, 0]
    assert features.argmax(1).tolist() == [0, 1, 0, 2, 0]
    model = SPEN(2 + features.shape[1], 4)
    egos = model.cut(edges, 5, node_features=features, batch=graph)
    assert model(egos, 5, 2).shape == (2, 2)


# ---------------------------------------------------------------- the independent numbers


def weights_into(layer, tensors, name=""):
    with torch.no_grad():
        for part in ("weight", "bias"):
            for key, parameter in getattr(layer, part).items():
                parameter.copy_(tensors[f"{name}{part} {key}"])


def of_maps(case):
    x, v, mask = case.tensors["x"], case.tensors["v"], case.tensors["mask"].bool()
    found = {f"{a}to{b}": MAPS[a, b](x if a == 2 else v, mask) for a, b in MAPS}
    all_maps = found.pop("2to2")
    found["2to2, everything"] = all_maps
    for begin in (1, 6, 11):
        name = f"2to2 maps {begin}-{begin + 4}, subgraph 0, its 3 x 3 real entries"
        found[name] = all_maps[0, 0, begin - 1 : begin + 4, :3, :3]
    return found


def of_linear(case):
    t, reps = case.tensors, ("in_reps", "out_reps")
    layer = EquivariantLinear(
        *({int(k): c for k, c in case.settings[name].items()} for name in reps)
    ).double()
    weights_into(layer, t)
    found = layer({1: t["v"], 2: t["x"]}, t["mask"].bool())
    return {f"order {b}": y for b, y in found.items()}


def of_egos(case):
    n, k = case.settings["num_nodes"], case.settings["k"]
    egos = ego_subgraphs(case.tensors["edges"].T, n, k)
    return {"x": egos.x, "mask": egos.mask, "nodes": egos.nodes, "root": egos.root}


def of_network(case):
    t, s = case.tensors, case.settings
    model = SPEN(3, s["hidden"], s["num_layers"], s["k"], s["num_classes"]).double()
    parts = {"L0 ": model.layers[0], "L1 ": model.layers[1], "final ": model.final}
    for name, part in parts.items():
        weights_into(part, t, name)
    with torch.no_grad():
        for name, linear in (("H0", model.head[0]), ("H1", model.head[2])):
            linear.weight.copy_(t[f"{name} weight"])
            linear.bias.copy_(t[f"{name} bias"])
    egos = model.cut(t["edges"].T, s["num_nodes"], node_features=t["node_features"])
    nodes = model.nodes(egos, s["num_nodes"])
    return {"node features [a || b]": nodes, "logits": model(egos, s["num_nodes"])}


RESULTS = {
    "all maps, three real nodes padded to four, and a lone node": of_maps,
    "linear layer from node and pair features to all three orders": of_linear,
    "ego networks of two hops": of_egos,
    "whole network on one graph": of_network,
}


@pytest.mark.parametrize("name", RESULTS)
def test_agrees_with_the_independent_computation(name, agree):
    case = load_reference("subgraph_permutation_equivariant")[name]
    agree(case, RESULTS[name](case))


def test_every_reference_case_is_tested():
    cases = [case.name for case in load_reference("subgraph_permutation_equivariant")]
    assert cases == list(RESULTS)
