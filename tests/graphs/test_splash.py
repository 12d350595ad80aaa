"""SPLASH: what a query sees of a stream, features of late nodes, their selection, and SLIM."""

import math
from collections import deque

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.graphs.splash import (
    SLIM,
    EdgeStream,
    NodeFeatures,
    NodePropertyPredictor,
    RecentNeighbors,
    StreamIndex,
    augmentations,
    community_stream,
    degree_encoding,
    load_jodie,
    partner_stream,
    positional_features,
    propagate_unseen,
    random_features,
    recent_neighbors,
    representation,
    select_augmentation,
    time_encoding,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)


def random_stream(seed, edges=60, nodes=9, ties=True):
    """Edges with self loops, repeated pairs and, with ties, equal times."""
    generator = torch.Generator().manual_seed(seed)
    src, dst = torch.randint(nodes, (2, edges), generator=generator)
    t = torch.rand(edges, generator=generator, dtype=torch.float64).cumsum(0)
    return EdgeStream(src, dst, (4 * t).floor() if ties else t)


# ---------------------------------------------------------------- what a query sees


class OneByOne:
    """The most recent edges of each node, one edge at a time: the plain form."""

    def __init__(self, num_nodes, k):
        self.kept = [deque(maxlen=k) for _ in range(num_nodes)]

    def insert(self, i, j, t):
        self.kept[i].append((j, t))
        self.kept[j].append((i, t))

    def query(self, node, time):
        return [(j, time - t) for j, t in reversed(self.kept[node]) if t < time - 1e-7]


def as_lists(nbr, dt, mask):
    rows = zip(nbr.tolist(), dt.tolist(), mask.tolist(), strict=True)
    return [[(j, a) for j, a, m in zip(*row, strict=True) if m] for row in rows]


def close_lists(one, other):
    return [[j for j, _ in row] for row in one] == [[j for j, _ in row] for row in other] and (
        torch.allclose(*(torch.tensor([a for row in x for _, a in row]) for x in (one, other)))
    )


@SMALL
@given(SEEDS, st.integers(1, 6), st.integers(1, 25))
def test_blocks_of_edges_are_one_edge_at_a_time(seed, k, block):
    stream = random_stream(seed)
    ring, plain = RecentNeighbors(9, k), OneByOne(9, k)
    nodes = torch.arange(9)
    for start in range(0, 60, block):
        part = slice(start, start + block)
        ring.insert(stream.src[part], stream.dst[part], stream.t[part])
        for edge in range(start, min(start + block, 60)):
            plain.insert(stream.src[edge].item(), stream.dst[edge].item(), stream.t[edge].item())
        for time in (stream.t[part][-1].item(), stream.t[part][-1].item() + 0.5):
            found = as_lists(*ring.query(nodes, torch.full((9,), time, dtype=torch.float64)))
            assert close_lists(found, [plain.query(node, time) for node in range(9)])


@SMALL
@given(SEEDS, st.integers(1, 6), st.booleans())
def test_the_index_answers_each_query_as_at_its_own_time(seed, k, ties):
    stream = random_stream(seed, ties=ties)
    index = StreamIndex(stream, 9)
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randint(9, (40,), generator=generator)
    times = stream.t[-1] * torch.rand(40, generator=generator, dtype=torch.float64)
    times[:10] = stream.t[:10]
    nbr, dt, mask, edge = recent_neighbors(index, nodes, times, k)
    for query, (node, time) in enumerate(zip(nodes.tolist(), times.tolist(), strict=True)):
        plain, degree = OneByOne(9, k), 0
        for i, j, t in zip(*(x.tolist() for x in (stream.src, stream.dst, stream.t)), strict=True):
            if t < time - 1e-7:
                plain.insert(i, j, t)
                degree += (i == node) + (j == node)
        row = slice(query, query + 1)
        assert close_lists(as_lists(nbr[row], dt[row], mask[row]), [plain.query(node, time)])
        assert index.degree(nodes, times)[query] == degree
    assert torch.allclose(times[:, None].expand_as(dt)[mask] - stream.t[edge][mask], dt[mask])
    assert (nbr[~mask] == 0).all() and (dt[~mask] == 0).all()
    assert (mask.long().diff(dim=1) <= 0).all()  # the filled slots come first


def test_latest_first_and_among_equal_times_the_later_edge():
    stream = EdgeStream(torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3]), torch.tensor([1.0, 2, 2]))
    ring = RecentNeighbors(4, 3)
    ring.insert(stream.src, stream.dst, stream.t)
    nodes, times = torch.tensor([0, 0, 3]), torch.tensor([2.5, 2.0, 2.5])
    for found in (
        ring.query(nodes, times),
        recent_neighbors(StreamIndex(stream, 4), nodes, times, 3),
    ):
        nbr, _, mask = found[:3]
        assert nbr[0].tolist() == [3, 2, 1] and nbr[1][mask[1]].tolist() == [1]
        assert nbr[2].tolist() == [0, 0, 0] and mask[2].tolist() == [True, False, False]


def test_a_self_loop_counts_twice():
    stream = EdgeStream(torch.tensor([1]), torch.tensor([1]), torch.tensor([0.0]))
    ring = RecentNeighbors(2, 3)
    ring.insert(stream.src, stream.dst, stream.t)
    one = torch.tensor([1]), torch.tensor([1.0])
    assert ring.query(*one)[2].sum() == 2
    assert StreamIndex(stream, 2).degree(*one) == 2


def test_an_empty_block_and_no_queries():
    ring = RecentNeighbors(3, 2)
    none = torch.zeros(0, dtype=torch.long)
    ring.insert(none, none, torch.zeros(0))
    assert ring.query(none, torch.zeros(0))[0].shape == (0, 2)
    index = StreamIndex(random_stream(0), 9)
    assert recent_neighbors(index, none, torch.zeros(0), 4)[2].shape == (0, 4)


# ---------------------------------------------------------------- fixed codes


def test_degree_code():
    code = degree_encoding(torch.tensor([[0, 3], [700, 5]]), 8)
    assert code.shape == (2, 2, 8) and code.dtype == torch.float32
    assert code[0, 0].tolist() == [1.0] * 4 + [0.0] * 4
    assert torch.allclose(code[..., :4] ** 2 + code[..., 4:] ** 2, torch.ones(2, 2, 4))
    frequencies = [10 ** (-4 * m / 3) for m in range(4)]
    assert torch.allclose(code[0, 1, :4], torch.tensor([math.cos(3 * w) for w in frequencies]))
    two = degree_encoding(torch.tensor([3]), 2)
    assert torch.allclose(two, torch.tensor([[math.cos(3), math.sin(3)]]))


def test_time_code():
    assert (time_encoding(torch.zeros(3), 5) == 1).all()
    code = time_encoding(torch.tensor([2.0]), 4)
    assert torch.allclose(code, torch.tensor([[math.cos(2 * 10 ** (-3.0 * m)) for m in range(4)]]))
    far = torch.tensor([1e9 + 0.5], dtype=torch.float64)  # float32 has no digits left there
    assert abs(time_encoding(far, 3)[0, 0] - math.cos(1e9 + 0.5)) < 1e-6
    assert time_encoding(torch.tensor([0.3]), 1)[0, 0] == pytest.approx(math.cos(0.3))
    assert time_encoding(torch.zeros(2, 0), 3).shape == (2, 0, 3)


def test_random_features_are_for_seen_nodes_only():
    seen = torch.tensor([True, False, True])
    x = random_features(3, 5, seen, torch.Generator().manual_seed(1))
    assert (x[1] == 0).all() and (x[[0, 2]] != 0).all()
    assert torch.equal(x, random_features(3, 5, seen, torch.Generator().manual_seed(1)))


# ---------------------------------------------------------------- places


def cliques(size=6):
    """Two cliques with one bridge, as edges; the last node is never seen."""
    graph = nx.barbell_graph(size, 0)
    src, dst = torch.tensor(list(graph.edges)).T
    return src, dst, torch.arange(2 * size + 1) < 2 * size


@pytest.mark.parametrize("method", ["node2vec", "ppmi_svd"])
def test_places_tell_two_cliques_apart(method):
    src, dst, seen = cliques()
    x = positional_features(src, dst, 13, 4, seen, method)
    assert x.shape == (13, 4) and (x[12] == 0).all()
    assert torch.equal(x, positional_features(src, dst, 13, 4, seen, method))
    unit = F.normalize(x[:12], dim=1)
    alike = unit @ unit.T
    assert alike[:5, :5].mean() > alike[:5, 7:12].mean() + 0.1


def test_ppmi_against_loops():
    src, dst, seen = cliques(3)
    src, dst = torch.cat([src, src[:2]]), torch.cat([dst, dst[:2]])  # an edge twice weighs two
    graph = torch.zeros(6, 6, dtype=torch.float64)
    for i, j in zip(src.tolist(), dst.tolist(), strict=True):
        graph[i, j] += 1
        graph[j, i] += 1
    step = graph / graph.sum(1, keepdim=True)
    reach = sum(torch.linalg.matrix_power(step, r) for r in range(1, 4))
    meet = graph.sum(1)[:, None] * reach
    meet = (meet + meet.T) / 2
    chance = meet.sum(1)[:, None] * meet.sum(1)[None] / meet.sum()
    ppmi = (meet / chance).log().clamp(min=0)
    x = positional_features(src, dst, 7, 9, seen, "ppmi_svd", window=3)
    assert (x[:, 6:] == 0).all()  # fewer nodes than columns
    left, size, _ = torch.linalg.svd(ppmi)
    assert torch.allclose(x[:6, :6] @ x[:6, :6].T, ((left * size) @ left.T).float(), atol=1e-5)


def test_walks_follow_edges_and_seldom_turn_back():
    from shuffle_nb.graphs.splash import _walks

    a, b = torch.tensor(list(nx.complete_graph(5).to_directed().edges)).T
    key = (a * 5 + b).sort().values
    weight = torch.ones(len(key), dtype=torch.long)
    weight[key == 1] = 9  # from 0 to 1
    weight[key == 5] = 9
    walk = _walks(key // 5, key % 5, weight, 5, torch.Generator().manual_seed(0), walks=2000)
    assert walk.shape == (10_000, 10) and (walk[:, 1:] != walk[:, :-1]).all()
    first = walk[walk[:, 0] == 0]
    assert (first[:, 1] == 1).double().mean() == pytest.approx(9 / 12, abs=0.03)
    there = walk[(walk[:, 0] == 2) & (walk[:, 1] == 0)]  # back to 2 has 0.1, 1 has 9, others 1
    assert (there[:, 2] == 2).double().mean() == pytest.approx(0.1 / 11.1, abs=0.02)
    assert (there[:, 2] == 1).double().mean() == pytest.approx(9 / 11.1, abs=0.05)


# ---------------------------------------------------------------- propagation


def one_edge_at_a_time(x, count, src, dst, seen):
    x, count, after = x.clone(), count.clone(), []
    for i, j in zip(src.tolist(), dst.tolist(), strict=True):
        before = x[i].clone(), x[j].clone()
        for node, other in ((i, before[1]), (j, before[0])):
            if not seen[node]:
                x[node] = (count[node] * x[node] + other) / (count[node] + 1)
                count[node] += 1
        after.append(x.clone())
    return x, count, after


@SMALL
@given(SEEDS, st.integers(1, 70), st.integers(0, 9))
def test_propagation_in_blocks_is_one_edge_at_a_time(seed, block, num_seen):
    stream = random_stream(seed)
    seen = torch.arange(9) < num_seen
    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    count = torch.randint(3, (9,)).double() * ~seen
    x = torch.where((seen | (count > 0))[:, None], x, 0)
    found = propagate_unseen(x, count, stream.src, stream.dst, seen, block)
    plain = one_edge_at_a_time(x, count, stream.src, stream.dst, seen)
    assert torch.allclose(found[0], plain[0], atol=1e-12) and torch.equal(found[1], plain[1])
    assert torch.equal(found[0][seen], x[seen])


@SMALL
@given(SEEDS, st.integers(1, 9))
def test_features_at_a_time_are_those_of_the_edges_before(seed, num_seen):
    stream = random_stream(seed)
    seen = torch.arange(9) < num_seen
    x = torch.randn(9, 3).double() * seen[:, None]
    features = NodeFeatures(StreamIndex(stream, 9), x, seen)
    after = one_edge_at_a_time(x, torch.zeros(9).double(), stream.src, stream.dst, seen)[2]
    for edge in (0, 7, 31, 59):
        visible = int((stream.t < stream.t[edge] + 0.5 - 1e-7).sum())
        found = features(torch.arange(9), (stream.t[edge] + 0.5).expand(9))
        assert torch.allclose(found, after[visible - 1], atol=1e-12)
    assert torch.equal(features(torch.arange(9), torch.zeros(9)), x)
    still = NodeFeatures(StreamIndex(stream, 9), x, seen, propagate=False)
    assert torch.equal(still(torch.arange(9), torch.full((9,), 1e9)), x)


def test_an_unseen_node_takes_the_mean_of_seen_neighbours_in_any_order():
    x = torch.randn(6, 4)
    x[5] = 0
    seen = torch.arange(6) < 5
    partner = torch.tensor([0, 3, 3, 1, 4])
    late = torch.full((5,), 5)
    y, count = propagate_unseen(x, torch.zeros(6), late, partner, seen)
    assert torch.allclose(y[5], x[partner].mean(0), atol=1e-6) and count[5] == 5
    assert torch.equal(y[:5], x[:5]) and count[:5].sum() == 0
    other, _ = propagate_unseen(x, torch.zeros(6), partner.flip(0), late, seen)
    assert torch.allclose(other, y, atol=1e-6)


def test_propagation_is_differentiable_and_takes_half_precision():
    stream = random_stream(1, edges=20)
    seen = torch.arange(9) < 4
    x = (torch.randn(9, 2).double() * seen[:, None]).requires_grad_()
    zeros = torch.zeros(9).double()
    assert torch.autograd.gradcheck(
        lambda x: propagate_unseen(x, zeros, stream.src, stream.dst, seen, 5)[0], x
    )
    half = x.detach().half()
    found, _ = propagate_unseen(half, zeros.float(), stream.src, stream.dst, seen)
    assert found.dtype == torch.float16
    full, _ = propagate_unseen(half.float(), zeros.float(), stream.src, stream.dst, seen)
    assert torch.allclose(found.float(), full, atol=2e-3)


# ---------------------------------------------------------------- SLIM


def written(slim, x_node, x_nbr, dt, mask, edge_attr=None, weight=None):
    """Equations (6) to (9), query by query and slot by slot."""
    rows = []
    for q in range(len(x_node)):
        total, number = torch.zeros(slim.norm.normalized_shape, dtype=x_node.dtype), 0
        for m in mask[q].nonzero().flatten().tolist():
            parts = [x_nbr[q, m]] + ([edge_attr[q, m]] if edge_attr is not None else [])
            parts.append(time_encoding(dt[q, m], slim.time_dim, dtype=x_node.dtype))
            v = slim.edge_mlp(torch.cat(parts))
            total = total + v * (1 if weight is None else weight[q, m])
            number += 1
        own = slim.node_mlp(torch.cat([total / max(1, number), x_node[q]]))
        rows.append(slim.norm(own) + slim.skip_alpha * slim.skip_norm(total))
    return torch.stack(rows)


def an_input(Q=5, k=4, d=3, e=0, dtype=torch.float64):
    inputs = [torch.randn(Q, d), torch.randn(Q, k, d), 9 * torch.rand(Q, k)]
    inputs = [x.to(dtype) for x in inputs] + [torch.rand(Q, k) < 0.6]
    inputs[3][0] = False
    return inputs + ([torch.randn(Q, k, e).to(dtype), torch.rand(Q, k).to(dtype)] if e else [])


@pytest.mark.parametrize("e", [0, 2])
@pytest.mark.parametrize("skip", [0.0, 0.5, 1.0])
def test_slim_is_its_equations(e, skip):
    slim = SLIM(3, 4, 6, e, skip_alpha=skip).double().eval()
    inputs = an_input(e=e)
    assert torch.allclose(slim(*inputs), written(slim, *inputs), atol=1e-10)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    ours = torch.autograd.grad(slim(*inputs).square().sum(), [*leaves, *slim.parameters()])
    plain = torch.autograd.grad(
        written(slim, *inputs).square().sum(), [*leaves, *slim.parameters()]
    )
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-9)


@pytest.mark.parametrize("poison", [1e6, math.nan, math.inf])
def test_empty_slots_and_the_order_of_neighbours_do_not_matter(poison):
    slim = SLIM(3, 4, 6, 2).eval()
    x_node, x_nbr, dt, mask, edge_attr, weight = an_input(e=2, dtype=torch.float32)
    y = slim(x_node, x_nbr, dt, mask, edge_attr, weight)
    spoiled = [x.clone() for x in (x_nbr, dt, edge_attr, weight)]
    for x in spoiled:
        x[~mask] = poison
    z = slim(x_node, spoiled[0], spoiled[1], mask, spoiled[2], spoiled[3])
    assert torch.equal(y, z)
    order = torch.randperm(4)
    shuffled = [x[:, order] for x in (x_nbr, dt, mask, edge_attr, weight)]
    assert torch.allclose(slim(x_node, *shuffled), y, atol=1e-5)


def test_each_neighbour_twice_changes_next_to_nothing():
    slim = SLIM(3).eval()
    x_node, x_nbr, dt, mask = an_input(dtype=torch.float32)
    twice = [torch.cat([x, x], 1) for x in (x_nbr, dt, mask)]
    y, z = slim(x_node, x_nbr, dt, mask), slim(x_node, *twice)
    assert 0 < (y - z).abs().max() < 2e-3


def test_without_neighbours_the_node_speaks_alone():
    slim = SLIM(3, 4, 6, skip_alpha=0.7).eval()
    nn.init.normal_(slim.skip_norm.bias)
    x_node, x_nbr, dt, mask = an_input(dtype=torch.float32)
    alone = slim.norm(slim.node_mlp(torch.cat([torch.zeros(5, 6), x_node], 1)))
    alone = alone + 0.7 * slim.skip_norm.bias
    assert torch.allclose(slim(x_node, x_nbr, dt, mask & False), alone, atol=1e-6)
    assert torch.allclose(slim(x_node, x_nbr, dt, mask)[0], alone[0], atol=1e-6)
    assert torch.allclose(slim(x_node, x_nbr[:, :0], dt[:, :0], mask[:, :0]), alone, atol=1e-6)


def test_parameters():
    slim = SLIM(100)
    assert sum(p.numel() for p in slim.edge_mlp.parameters()) == 40_300
    assert sum(p.numel() for p in slim.parameters()) == 81_000
    for classes in (2, 7):
        model = NodePropertyPredictor(SLIM(100), classes)
        assert sum(p.numel() for p in model.head.parameters()) == 10_100 + 101 * classes


@pytest.mark.parametrize(("queries", "slots"), [(50, 10), (50, 40), (200, 40)])
def test_products_grow_with_the_filled_slots(queries, slots):
    d, time_dim, h = 5, 7, 6
    inputs = torch.randn(queries, d), torch.randn(queries, slots, d), torch.rand(queries, slots)
    mask = torch.arange(slots).expand(queries, slots) < slots // 2
    products = count_flops(SLIM(d, time_dim, h), *inputs, mask) // 2
    once = queries * h * h + queries * ((h + d) * h + 2 * h * h)
    assert products == queries * (slots // 2) * (d + time_dim + h) * h + once


def test_batch_of_one_empty_batch_and_views():
    model = NodePropertyPredictor(SLIM(3, 4, 6), 2).eval()
    x_node, x_nbr, dt, mask = an_input(dtype=torch.float32)
    y = model(x_node, x_nbr, dt, mask)
    assert torch.allclose(model(x_node[2:3], x_nbr[2:3], dt[2:3], mask[2:3]), y[2:3], atol=1e-6)
    assert model(x_node[:0], x_nbr[:0], dt[:0], mask[:0]).shape == (0, 2)
    strided = torch.stack([x_nbr, x_nbr], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(model(x_node, strided, dt.T.contiguous().T, mask), y)


def test_nan_stays_with_its_query():
    slim = SLIM(3, 4, 6).eval()
    x_node, x_nbr, dt, mask = an_input(dtype=torch.float32)
    mask[1, 0] = True
    x_nbr[1, 0] = math.nan
    bad = slim(x_node, x_nbr, dt, mask).isnan().any(1)
    assert bad.tolist() == [False, True, False, False, False]


def test_dropout_touches_node_features_alone():
    slim = SLIM(3, 4, 6, dropout=1.0)
    x_node, x_nbr, dt, mask = an_input(dtype=torch.float32)
    y = slim(x_node, x_nbr, dt, mask)
    assert torch.allclose(y, slim(0 * x_node, 0 * x_nbr, dt, mask), atol=1e-6)
    assert not torch.allclose(y, slim(x_node, x_nbr, dt + 1, mask), atol=1e-6)


@pytest.mark.parametrize("e", [0, 2])
def test_one_graph_autocast_and_half(e, plain_python):
    slim = SLIM(3, 4, 6, e).eval()
    inputs = an_input(e=e, dtype=torch.float32)
    inputs[1][~inputs[3]] = math.nan
    plain = slim(*inputs)
    compiled = torch.compile(slim, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*inputs), plain, atol=1e-5)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            assert torch.allclose(slim(*inputs).float(), plain, atol=0.15)
    halved = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
    halved[2] = inputs[2]
    assert slim.bfloat16()(*halved).dtype == torch.bfloat16


# ---------------------------------------------------------------- no leak


def test_what_happens_at_t_or_later_is_not_seen():
    task = community_stream(3, edges=600)
    now = 250.0
    torch.manual_seed(0)
    model = NodePropertyPredictor(SLIM(8, 8, 8), 4).eval()
    nodes, times = torch.arange(300), torch.full((300,), now, dtype=torch.float64)

    def answers(stream):
        index = StreamIndex(stream, 300)
        nbr, dt, mask, _ = recent_neighbors(index, nodes, times, 6)
        kinds = augmentations(index, 100.0, 8, "ppmi_svd").values()
        inputs = [(x(nodes, times), x(nbr, times[:, None]), dt.float(), mask) for x in kinds]
        return torch.stack([model(*one) for one in inputs])

    later = task.stream.t >= now
    src, dst = task.stream.src.clone(), task.stream.dst.clone()
    src[later], dst[later] = torch.randint(300, (2, int(later.sum())))
    y = answers(task.stream)
    assert torch.equal(y, answers(EdgeStream(src, dst, task.stream.t)))
    src[200] = (src[200] + 1) % 300
    assert not torch.equal(y, answers(EdgeStream(src, dst, task.stream.t)))


# ---------------------------------------------------------------- selection


def selection_of(task, dim=16, **options):
    index = StreamIndex(task.stream, task.num_nodes)
    known = torch.cat(task.parts()[:2])
    nodes, times = task.nodes[known], task.times[known]
    nbr, _, mask, _ = recent_neighbors(index, nodes, times, 20)

    def of(kind):
        def z(tau):
            x = augmentations(index, tau, dim, "ppmi_svd")[kind]
            return representation(x(nodes, times), x(nbr, times[:, None]), mask)

        return z

    reprs = {kind: of(kind) for kind in "RPS"}
    return select_augmentation(reprs, task.labels[known], times, **options)


def test_selection_finds_communities():
    task = community_stream(0)
    found = selection_of(task)
    assert found.name == "P" and all(len(losses) == 5 for losses in found.losses.values())
    assert found == selection_of(task)


def test_representation_is_the_mean_of_filled_slots():
    x_node, x_nbr, _, mask = an_input(dtype=torch.float32)
    x_nbr[~mask] = math.nan
    z = representation(x_node, x_nbr, mask)
    assert (z[0, :3] == 0).all() and torch.equal(z[:, 3:], x_node)
    for q in range(1, 5):
        if mask[q].any():
            assert torch.allclose(z[q, :3], x_nbr[q, mask[q]].mean(0))


# ---------------------------------------------------------------- streams


def test_communities_are_planted():
    task = community_stream(0)
    assert torch.equal(task.nodes, task.stream.src) and (task.stream.src != task.stream.dst).all()
    latest = torch.full((300,), -1)
    same = []
    for node, other, label in zip(
        task.nodes.tolist(), task.stream.dst.tolist(), task.labels, strict=True
    ):
        latest[node] = label
        if latest[other] >= 0:
            same.append(latest[other] == label)
    assert 0.8 < torch.stack(same).double().mean() < 0.95
    arrived = torch.zeros(300, dtype=torch.bool)
    train = task.parts()[0]
    arrived[task.stream.src[train]] = arrived[task.stream.dst[train]] = True
    assert 0.2 < 1 - arrived[task.nodes[task.parts()[2]]].double().mean() < 0.6
    again = community_stream(0)
    assert torch.equal(again.stream.dst, task.stream.dst)
    assert not torch.equal(community_stream(1).stream.dst, task.stream.dst)


def test_throw_away_partners_are_planted():
    task = partner_stream(0)
    dst = task.stream.dst
    assert task.num_nodes == int(dst.max()) + 1 and (task.stream.src < 80).all()
    first_time = torch.tensor([int((dst[:e] == dst[e]).sum() == 0) for e in range(len(dst))])
    once = torch.bincount(dst)[dst] == 1
    rate = [once[task.labels == label].double().mean().item() for label in (0, 1)]
    assert rate[1] > rate[0] + 0.2 and first_time.sum() > 1000
    fixed = partner_stream(0, turnover=0.0)
    regular = (fixed.stream.dst >= 80) & (fixed.stream.dst < 140)
    for label, share in ((0, 0.8), (1, 0.3)):
        found = regular[fixed.labels == label].double().mean()
        assert found == pytest.approx(share, abs=0.04)


def test_a_public_stream_is_read_from_its_file(tmp_path, plain_python):
    folder = tmp_path / "wikipedia" / "raw"
    folder.mkdir(parents=True)
    rows = ["user_id,item_id,timestamp,state_label,comma_separated_list_of_features"]
    rows += ["0,0,0.0,0,0.5,-1.0", "1,1,36.0,0,0.25,2.0", "0,1,77.0,1,0.0,3.0"]
    (folder / "wikipedia.csv").write_text("\n".join(rows) + "\n")
    for task in (load_jodie("wikipedia", tmp_path), load_jodie(str(folder / "wikipedia.csv"))):
        assert task.stream.src.tolist() == [0, 1, 0] and task.stream.dst.tolist() == [2, 3, 3]
        assert task.num_nodes == 4 and task.labels.tolist() == [0, 0, 1]
        assert task.stream.t.tolist() == [0, 36, 77] and task.stream.edge_attr.shape == (3, 2)
    with pytest.raises(ValueError, match="did you mean 'reddit'"):
        load_jodie("redit", tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"mooc\.csv is not here"):
        load_jodie("mooc", tmp_path)


# ---------------------------------------------------------------- the authors' numbers


def of_codes(case):
    dt, degree = case.tensors["dt"], case.tensors["degree"]
    return {
        "time code, alpha 10": time_encoding(dt, 5),
        "time code of size 4, alpha 3": time_encoding(dt, 4, alpha=3.0),
        "degree code": degree_encoding(degree, 6),
    }


def load_weights(slim, tensors, head=None):
    layers = {f"A{i}": slim.edge_mlp[2 * i] for i in range(3)}
    layers |= {f"B{i}": slim.node_mlp[2 * i] for i in range(3)}
    layers |= {"LN1": slim.norm, "LN2": slim.skip_norm}
    if head is not None:
        layers |= {"H0": head[0], "H1": head[-1]}
    with torch.no_grad():
        for name, layer in layers.items():
            layer.weight.copy_(tensors[f"{name}.w"])
            layer.bias.copy_(tensors[f"{name}.b"])


def of_slim(case):
    tensors, options = case.tensors, dict(case.settings)
    classes = options.pop("num_classes", None)
    slim = SLIM(**options, dropout=0.0).double()
    model = slim if classes is None else NodePropertyPredictor(slim, classes, 0.0).double()
    load_weights(slim, tensors, None if classes is None else model.head)
    names = ("x_node", "x_nbr", "dt", "mask", "edge_attr", "weight")
    inputs = {name: tensors[name] for name in names if name in tensors}
    inputs["mask"] = inputs["mask"].bool()
    for name in ("x_node", "x_nbr"):
        inputs[name].requires_grad_()
    y = model(**inputs)
    y.square().sum().backward()
    told = "output" if classes is None else "logits"
    gradients = {"x_node": inputs["x_node"], "x_nbr": inputs["x_nbr"]}
    gradients |= {"A0.w": slim.edge_mlp[0].weight, "B2.w": slim.node_mlp[4].weight}
    found = {f"gradient of sum({told}**2) w.r.t. {n}": x.grad for n, x in gradients.items()}
    return found | {"output": slim(**inputs), "logits": y} if classes else found | {"output": y}


def of_stream(case):
    tensors, settings = case.tensors, case.settings
    seen, first = tensors["seen"].bool(), settings["train_edges"]
    src, dst, t = (tensors[name] for name in ("src", "dst", "t"))
    x = tensors["x"] * seen[:, None]
    count = torch.zeros(settings["num_nodes"]).double()
    found = {}
    half, half_count = propagate_unseen(
        x, count, src[first : first + 4], dst[first : first + 4], seen
    )
    found["x after the first four edges"] = half
    x, count = propagate_unseen(half, half_count, src[first + 4 :], dst[first + 4 :], seen)
    found |= {"x at the end": x, "count at the end": count}
    ring = RecentNeighbors(settings["num_nodes"], settings["k"])
    ring.insert(src, dst, t)
    rows = as_lists(*ring.query(tensors["query_nodes"], tensors["query_times"]))
    padded = torch.full((len(rows), settings["k"], 2), -1.0).double()
    padded[..., 1] = 0
    for q, row in enumerate(rows):
        padded[q, : len(row)] = torch.tensor(row).double().view(-1, 2)
    found["visible neighbours, most recent first, -1 after the last"] = padded[..., 0]
    found["their age t - t_m, 0 after the last"] = padded[..., 1]
    found["number of visible neighbours"] = torch.tensor([len(row) for row in rows])
    return found


def of_selection(case):
    tensors = case.tensors
    zP = tensors["base"] + 1.5 * F.one_hot(tensors["labels"], tensors["base"].shape[1])
    reprs = {"R": tensors["zR"], "P": zP, "S": tensors["zS"]}
    ratios, l2 = case.settings["ratios"], case.settings["l2"]
    found = select_augmentation(reprs, tensors["labels"], tensors["times"], ratios, l2)
    results = {
        f"validation loss of {kind} at each ratio": torch.tensor(losses).double()
        for kind, losses in found.losses.items()
    }
    return results | {"chosen (0 R, 1 P, 2 S)": torch.tensor(["RPS".index(found.name)])}


@pytest.mark.parametrize("case", list(load_reference("splash")), ids=lambda case: case.name)
def test_against_the_reference(case, agree):
    if "A0.w" in case.tensors:
        agree(case, of_slim(case))
    elif "zR" in case.tensors:
        agree(case, of_selection(case))
    else:
        agree(case, (of_stream if "src" in case.tensors else of_codes)(case))


# ---------------------------------------------------------------- bad input


TWO, ONES = torch.tensor([0, 1]), torch.ones(2)
ASKED = torch.tensor([0, 1, 0, 1]), torch.tensor([1.0, 2, 3, 4])


def slim_with(**changes):
    inputs = dict(
        zip(("x_node", "x_nbr", "dt", "mask"), an_input(dtype=torch.float32), strict=True)
    )
    return SLIM(3, 4, 6, changes.pop("edge_dim", 0))(**(inputs | changes))


def select(reprs=None, labels=ASKED[0], times=ASKED[1], **options):
    options = {"ratios": (0.5,)} | options
    return select_augmentation(reprs or {"R": torch.ones(4, 2)}, labels, times, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EdgeStream(TWO, TWO, ONES.cumsum(0).flip(0)), "t must be sorted, got 2 before 1"),
        (lambda: EdgeStream(TWO, TWO, torch.tensor([0, math.nan])), "t must be finite, got nan"),
        (lambda: EdgeStream(TWO, TWO[:1], ONES), r"dst must be \(2\), got shape \(1,\)"),
        (lambda: EdgeStream(TWO - 1, TWO, ONES), "src must be in 0.*got -1 to 0"),
        (lambda: EdgeStream(TWO, TWO, ONES, weight=ONES[:1]), "weight must be"),
        (lambda: StreamIndex(EdgeStream(TWO, TWO, ONES), 1), r"src must be in 0\.\.0, got 0 to 1"),
        (
            lambda: StreamIndex(EdgeStream(TWO[:0], TWO[:0], ONES[:0]), 1),
            "edges must be at least 1",
        ),
        (
            lambda: StreamIndex(random_stream(0), 9).degree(TWO + 8, ONES),
            r"nodes must be in 0\.\.8",
        ),
        (lambda: recent_neighbors(StreamIndex(random_stream(0), 9), TWO, ONES, 0), "k must be at"),
        (lambda: RecentNeighbors(3, 0), "k must be at least 1, got 0"),
        (lambda: RecentNeighbors(1, 2).insert(TWO, TWO, ONES), r"src must be in 0\.\.0"),
        (lambda: RecentNeighbors(3, 2).insert(TWO, TWO, -ONES.cumsum(0)), "t must be sorted"),
        (lambda: RecentNeighbors(3, 2).query(TWO + 2, ONES), r"nodes must be in 0\.\.2"),
        (lambda: degree_encoding(TWO, 5), "even"),
        (lambda: time_encoding(ONES, 0), "dim must be at least 1"),
        (lambda: random_features(3, 2, torch.ones(2).bool()), r"seen must be \(3\)"),
        (
            lambda: positional_features(*cliques()[:2], 13, 2, TWO.new_ones(13).bool(), "svd"),
            "ppmi",
        ),
        (
            lambda: positional_features(TWO, TWO, 2, 2, TWO.bool()),
            "src and dst must be edges between seen nodes",
        ),
        (
            lambda: propagate_unseen(torch.ones(2, 2), ONES, TWO, TWO, TWO.bool(), 0),
            "block_size must be at least 1",
        ),
        (lambda: slim_with(mask=torch.ones(5, 4)), "mask must be boolean, got torch.float32"),
        (lambda: slim_with(x_nbr=torch.ones(5, 4, 2)), r"x_nbr must be \(5, k, 3\)"),
        (lambda: slim_with(dt=torch.ones(5, 3)), r"dt must be \(5, 4\)"),
        (lambda: slim_with(edge_dim=2), "edge_attr must have edge_dim = 2 features, got None"),
        (lambda: slim_with(edge_attr=torch.ones(5, 4, 2)), r"edge_attr must be \(5, 4, 0\)"),
        (lambda: SLIM(0), "node_dim must be at least 1"),
        (lambda: SLIM(3, dropout=1.5), r"dropout must be in \[0, 1\]"),
        (lambda: NodePropertyPredictor(SLIM(3), 0), "num_classes must be at least 1"),
        (lambda: select(ratios=(0.5, 1.0)), "ratios must be between 0 and 1"),
        (lambda: select(ratios=(0.1,)), "got 0.1, with 0 of 4 queries before it"),
        (lambda: select({"R": torch.ones(3, 2)}), r"reprs\['R'\] must be \(4, features\)"),
        (lambda: select({"R": torch.full((4, 2), math.nan)}), "must be finite"),
        (lambda: select(labels=ASKED[0][:3]), r"labels must be \(4\)|times must be \(3\)"),
        (lambda: community_stream(move=2.0), r"move must be in \[0, 1\]"),
        (lambda: community_stream(edges=20).parts(0.9, 0.1), "test must be at least 1, got 0"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
