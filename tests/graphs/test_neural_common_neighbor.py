"""Neural common neighbour: the graph, sets of neighbours, predictors, completion, training."""

import math
import pickle
import sys

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.graphs import neural_common_neighbor
from shuffle_nb.graphs.neural_common_neighbor import (
    CNCountPredictor,
    CSRGraph,
    GAEPredictor,
    NCNCPredictor,
    NCNPredictor,
    PureGCN,
    common_neighbors,
    hits_at_k,
    load_planetoid,
    mrr,
    neighbor_difference,
    pool_neighbors,
    remove_edges,
    sample_non_edges,
    sample_rows,
    score_edges,
    train_link_predictor,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_graph(seed, n=None, share=0.3):
    """A graph, its dense form, and pairs of different nodes; some nodes may be alone."""
    generator = torch.Generator().manual_seed(seed)
    n = n or int(torch.randint(2, 14, (), generator=generator))
    upper = (torch.rand(n, n, generator=generator) < share).triu(1)
    pairs = torch.stack([torch.randperm(n, generator=generator)[:2] for _ in range(7)], 1)
    return CSRGraph.from_edge_index(upper.nonzero().T, n), upper | upper.T, pairs


def as_sets(row, node, count):
    assert row.tolist() == sorted(row.tolist())
    sets = [node[row == b].tolist() for b in range(count)]
    assert all(one == sorted(set(one)) for one in sets)
    return [set(one) for one in sets]


def settled(predictor, seed=0):
    """Double precision, evaluation mode, every parameter away from its first value."""
    generator = torch.Generator().manual_seed(seed)
    predictor = predictor.double().eval()
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return predictor


# ---------------------------------------------------------------- the graph and its sets


@SMALL
@given(SEEDS)
def test_rows_are_sorted_neighbour_sets(seed):
    adj, dense, _ = random_graph(seed)
    assert adj.indptr.tolist() == [0, *dense.sum(1).cumsum(0).tolist()]
    assert torch.equal(torch.stack([adj.row, adj.indices]), dense.nonzero().T)
    assert torch.equal(adj.degree, dense.sum(1))
    assert torch.equal(adj.keys, dense.flatten().nonzero()[:, 0])
    again = CSRGraph.from_edge_index(torch.stack([adj.indices, adj.row]), adj.n, undirected=False)
    assert torch.equal(again.indices, adj.indices)


def test_links_given_twice_are_merged():
    adj = CSRGraph.from_edge_index(torch.tensor([[0, 1, 0, 2], [1, 0, 1, 0]]), 4)
    assert adj.indptr.tolist() == [0, 2, 3, 4, 4] and adj.indices.tolist() == [1, 2, 0, 0]


@SMALL
@given(SEEDS)
def test_common_and_other_neighbours_are_those_of_python_sets(seed):
    adj, dense, pairs = random_graph(seed)
    near = [set(dense[i].nonzero()[:, 0].tolist()) for i in range(adj.n)]
    both = as_sets(*common_neighbors(adj, pairs), 7)
    alone = as_sets(*neighbor_difference(adj, pairs), 7)
    for (i, j), common, rest in zip(pairs.T.tolist(), both, alone, strict=True):
        assert common == near[i] & near[j] and rest == near[i] - near[j]


@SMALL
@given(SEEDS, st.booleans())
def test_pooling_is_a_matrix_product(seed, weighted):
    adj, _, pairs = random_graph(seed)
    row, node = common_neighbors(adj, pairs)
    h, weight = normal(adj.n, 3, seed=seed), normal(len(row), seed=seed) if weighted else None
    matrix = torch.zeros(7, adj.n).double()
    matrix.index_put_((row, node), torch.ones(len(row)).double() if weight is None else weight)
    assert torch.allclose(pool_neighbors(h, row, node, 7, weight), matrix @ h)


def test_gradients_of_pooling_and_of_the_encoder_are_exact():
    adj, _, pairs = random_graph(3, n=9)
    row, node = common_neighbors(adj, pairs)
    h, weight = normal(9, 2).requires_grad_(), normal(len(row), seed=1).requires_grad_()
    pool = lambda h, weight: pool_neighbors(h, row, node, 7, weight)  # noqa: E731
    assert torch.autograd.gradcheck(pool, (h, weight))
    encoder = PureGCN(2, 3, 2, residual=True).double()
    assert torch.autograd.gradcheck(lambda x: encoder(x, adj), h)


@SMALL
@given(SEEDS)
def test_heuristics_are_pooled_numbers(seed):
    adj, dense, pairs = random_graph(seed, n=12)
    graph = networkx.from_numpy_array(dense.numpy())
    row, node = common_neighbors(adj, pairs)
    ends = pairs.T.tolist()
    count = pool_neighbors(torch.ones(12, 1).double(), row, node, 7)[:, 0]
    assert torch.equal(count, (dense.double() @ dense.double())[pairs[0], pairs[1]])
    degree = adj.degree.double()[:, None].clamp(min=2)
    for h, rule in (
        (1 / degree, networkx.resource_allocation_index),
        (1 / degree.log(), networkx.adamic_adar_index),
    ):
        expected = [value for _, _, value in rule(graph, ends)]
        assert pool_neighbors(h, row, node, 7)[:, 0].tolist() == pytest.approx(expected)


@SMALL
@given(SEEDS)
def test_removed_links_are_gone_in_both_directions_and_no_others(seed):
    adj, dense, pairs = random_graph(seed)
    left = remove_edges(adj, pairs)
    expected = dense.clone()
    expected[pairs[0], pairs[1]] = expected[pairs[1], pairs[0]] = False
    assert torch.equal(torch.stack([left.row, left.indices]), expected.nonzero().T)
    assert torch.equal(left.degree, expected.sum(1))
    assert torch.equal(CSRGraph(left.n, left.indptr, left.indices).keys, left.keys)


# ---------------------------------------------------------------- encoder and predictors


def test_encoder_is_the_normalised_matrix():
    adj, dense, _ = random_graph(5, n=10)
    encoder, x = PureGCN(4, 3).double(), normal(10, 4)
    a = dense.double() + torch.eye(10)
    s = a.sum(1).rsqrt()
    expected = (s[:, None] * a * s) @ encoder.linear(x)
    assert torch.allclose(encoder(x, adj), expected)
    last = PureGCN(4, 3, 2, jk=False).double()
    last.linear = encoder.linear
    assert torch.allclose(last(x, adj), (s[:, None] * a * s) @ expected)


EVERY = {
    "GAE": GAEPredictor,
    "GAE + CN": CNCountPredictor,
    "NCN": NCNPredictor,
    "NCNC": lambda h: NCNCPredictor(h, offset=0.2, scale=1.0, depth=1),
    "NCNC-2": lambda h: NCNCPredictor(h, offset=0.2, scale=1.0, depth=2, alpha=0.7),
}


@pytest.mark.parametrize("name", EVERY)
@SMALL
@given(seed=SEEDS)
def test_numbers_of_nodes_and_order_of_ends_mean_nothing(name, seed):
    adj, _, pairs = random_graph(seed)
    predictor, encoder = settled(EVERY[name](4)), settled(PureGCN(3, 4))
    x = normal(adj.n, 3, seed=seed)
    scores = score_edges(encoder, predictor, x, adj, pairs)
    assert torch.allclose(score_edges(encoder, predictor, x, adj, pairs.flip(0)), scores, atol=1e-9)
    new = torch.randperm(adj.n)
    links = torch.stack([new[adj.row], new[adj.indices]])
    moved = CSRGraph.from_edge_index(links, adj.n)
    x_moved = torch.empty_like(x).index_copy_(0, new, x)
    assert torch.allclose(score_edges(encoder, predictor, x_moved, moved, new[pairs]), scores)


def as_written(predictor, h, dense, i, j, depth):
    """One pair, with Python sets: equations (1) to (8)."""
    near = [set(row.nonzero()[:, 0].tolist()) for row in dense]
    tilde = h + predictor.x_branch(h)
    c = torch.zeros_like(h[0])
    for u in near[i] | near[j]:
        if u in near[i] and u in near[j]:
            c = c + tilde[u]
        elif depth > 0:
            end = j if u in near[i] else i
            with torch.no_grad():
                logit = as_written(predictor, tilde, dense, end, u, depth - 1)
                p0 = torch.sigmoid(predictor.scale * (logit - predictor.offset))
                odds = predictor.pt * p0
                q = predictor.alpha * odds / (odds + 1 - p0)
            c = c + q * tilde[u]
    z = predictor.beta * predictor.shared_branch(c) + predictor.pair_branch(h[i] * h[j])
    return predictor.head(z)[0]


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("split_size", [-1, 5])
def test_completion_is_the_recursion_as_written(depth, split_size):
    options = {"alpha": 0.8, "scale": 1.5, "offset": 0.1, "pt": 0.6, "split_size": split_size}
    adj, dense, pairs = random_graph(11, n=8, share=0.4)
    predictor, h = settled(NCNCPredictor(3, depth=depth, **options)), normal(8, 3)
    logits = predictor(h, adj, pairs)[:, 0]
    for (i, j), logit in zip(pairs.T.tolist(), logits, strict=True):
        assert torch.allclose(as_written(predictor, h, dense, i, j, depth), logit, atol=1e-9)


def test_depth_zero_and_alpha_zero_are_ncn():
    adj, _, pairs = random_graph(2, n=11)
    ncn, h = settled(NCNPredictor(4)), normal(11, 4)
    for options in ({"depth": 0}, {"alpha": 0.0}, {"alpha": 0.0, "depth": 2}):
        completed = NCNCPredictor(4, **options).double().eval()
        completed.load_state_dict(ncn.state_dict())
        assert torch.allclose(completed(h, adj, pairs), ncn(h, adj, pairs), atol=1e-9)


def test_without_doubt_the_sum_runs_over_the_union():
    adj, dense, _ = random_graph(4, n=10)
    pairs = torch.tensor([[0, 2, 5, 1], [3, 7, 6, 9]])
    predictor, h = settled(NCNCPredictor(4, offset=-math.inf, pt=1.0)), normal(10, 4)
    union = (dense[pairs[0]] | dense[pairs[1]]).double()
    lifted = predictor.lift(h)
    assert torch.allclose(predictor.pool(lifted, adj, pairs, 1), union @ lifted)
    row, node, weight = predictor.members(lifted, adj, pairs)
    assert (weight == 1).all() and len(row) == union.sum()
    assert (row.diff() >= 0).all() and (union[row, node] == 1).all()


def test_calibration_multiplies_the_odds():
    predictor, logit = NCNCPredictor(4, alpha=0.7, scale=2.0, offset=-0.5, pt=0.3), normal(50)
    p0 = torch.sigmoid(2 * (logit + 0.5))
    share = predictor.calibrate(logit) / 0.7
    assert torch.allclose(share / (1 - share), 0.3 * p0 / (1 - p0), rtol=1e-10, atol=0)


def test_no_gradient_passes_the_completion():
    adj, _, pairs = random_graph(2, n=11)
    predictor, h = settled(NCNCPredictor(4, offset=0.0)), normal(11, 4).requires_grad_()
    _, _, weight = predictor.members(predictor.lift(h), adj, pairs)
    assert len(weight) and not weight.requires_grad
    predictor(h, adj, pairs).sum().backward()
    assert predictor.beta.grad.abs() > 0 and h.grad.abs().sum() > 0


def test_a_hexagon_tells_ncn_from_gae():
    ring = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])
    adj, pairs = CSRGraph.from_edge_index(ring, 6), torch.tensor([[0, 0], [2, 3]])
    apart = {"GAE": [], "NCN": []}
    for seed in range(5):
        torch.manual_seed(seed)
        h = PureGCN(2, 8)(torch.ones(6, 2), adj)
        for name in apart:
            near, far = EVERY[name](8).eval()(h, adj, pairs)[:, 0].tolist()
            apart[name].append(abs(near - far))
    assert max(apart["GAE"]) < 1e-6 and max(apart["NCN"]) > 1e-2


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: NCNPredictor(64), 25_538),
        (lambda: NCNPredictor(256), 397_058),
        (lambda: NCNPredictor(8), 506),
        (lambda: NCNPredictor(64, use_xlin=False), 17_090),
        (lambda: NCNCPredictor(64), 25_538),
        (lambda: GAEPredictor(64), 8_641),
        (lambda: CNCountPredictor(64), 13_058),
        (lambda: PureGCN(5, 64, 3), 5 * 64 + 64 + 3),
    ],
)
def test_parameters(build, count):
    assert sum(p.numel() for p in build().parameters()) == count


def test_dropped_pool_entries_are_rescaled():
    adj, _, _ = random_graph(6, n=12, share=0.6)
    pairs = torch.tensor([[0], [1]]).expand(2, 4000)
    predictor, h = NCNPredictor(3, edge_dropout=0.4).double(), normal(12, 3)
    plain, noisy = predictor.eval().pool(h, adj, pairs, 0), predictor.train().pool(h, adj, pairs, 0)
    error = noisy.std(0) / 4000**0.5
    assert (noisy.std(0) > 0).all() and ((noisy.mean(0) - plain[0]).abs() < 4 * error).all()


# ---------------------------------------------------------------- sampling


def test_sampled_sums_are_unbiased_and_short_rows_exact():
    row = torch.tensor([0] * 9 + [1] * 3 + [3] * 6)
    node, h = torch.arange(18), normal(18)
    generator = torch.Generator().manual_seed(0)
    full = torch.zeros(4).double().index_add(0, row, h)
    sums = []
    for _ in range(4000):
        r, u, weight = sample_rows(row, node, 4, 4, generator)
        assert torch.bincount(r, minlength=4).tolist() == [4, 3, 0, 4]
        sums.append(torch.zeros(4).double().index_add(0, r, weight.double() * h[u]))
    sums = torch.stack(sums)
    error = sums.std(0) / 4000**0.5
    assert ((sums.mean(0) - full).abs() <= 4 * error + 1e-12).all()
    assert sums.std(0)[1] < 1e-12 and (sums.std(0)[[0, 3]] > 0.1).all()


def test_completion_with_sampled_residuals_follows_the_mode():
    adj, _, pairs = random_graph(8, n=13, share=0.6)
    options = {"alpha": 1.0, "offset": 0.0, "dropout": 0.0}
    predictor = settled(NCNCPredictor(3, train_residual_degree=1, **options))
    exact = NCNCPredictor(3, **options).double().eval()
    exact.load_state_dict(predictor.state_dict())
    h = normal(13, 3)
    assert torch.allclose(predictor(h, adj, pairs), exact(h, adj, pairs))
    draw = lambda: predictor.train().pool(predictor.lift(h), adj, pairs, 1)  # noqa: E731
    draws = torch.stack([draw() for _ in range(2000)])
    full = exact.pool(exact.lift(h), adj, pairs, 1)
    assert ((draws.mean(0) - full).abs() <= 4.5 * draws.std(0) / 2000**0.5 + 1e-9).all()


def test_non_edges_are_all_drawn_equally_and_no_others():
    adj, dense, _ = random_graph(3, n=7)
    generator = torch.Generator().manual_seed(0)
    for nodes in (None, torch.tensor([0, 2, 3, 6])):
        chosen = torch.arange(7) if nodes is None else nodes
        free = ~(dense | torch.eye(7, dtype=torch.bool))
        inside = torch.isin(torch.arange(7), chosen)
        free &= inside[:, None] & inside
        drawn = sample_non_edges(adj, 40_000, generator, nodes)
        found = torch.bincount(drawn[0] * 7 + drawn[1], minlength=49).view(7, 7)
        assert torch.equal(found > 0, free)
        expected = 40_000 / free.sum()
        assert ((found[free] - expected).abs() < 5 * expected**0.5).all()


# ---------------------------------------------------------------- metrics and training


def test_hits_are_strictly_above_the_kth():
    neg = torch.tensor([5.0, 3, 3, 1])
    pos = torch.tensor([6.0, 5, 4, 3, 0])
    assert [hits_at_k(pos, neg, k) for k in (1, 2, 3, 4)] == [0.2, 0.6, 0.6, 0.8]


def test_reciprocal_ranks_share_ties():
    neg = torch.tensor([5.0, 3, 3, 1])
    assert mrr(torch.tensor([6.0]), neg) == 1
    assert mrr(torch.tensor([3.0]), neg) == pytest.approx(1 / 3)  # ranks 2, 3, 4: one of these
    own = torch.tensor([[0.0, 2.0], [0.0, 0.5]])
    assert mrr(torch.tensor([1.0, 1.0]), own) == pytest.approx((0.5 + 1) / 2)


def two_cliques(size=8):
    graph = networkx.disjoint_union(*[networkx.complete_graph(size)] * 2)
    links = torch.tensor(list(graph.edges)).T
    return links, CSRGraph.from_edge_index(links, 2 * size)


def test_training_learns_cliques_and_repeats_itself():
    links, adj = two_cliques()
    x = torch.randn(16, 3)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        encoder, predictor = PureGCN(3, 8), NCNPredictor(8)
        losses = train_link_predictor(
            encoder, predictor, x, adj, links, epochs=30, batch_size=14, seed=3
        )
        found.append(losses)
    assert found[0] == found[1] and len(losses) == 30 and losses[-1] < 0.2 < losses[0]
    others = sample_non_edges(adj, 50, torch.Generator().manual_seed(0))
    scores = [score_edges(encoder, predictor, x, adj, edge) for edge in (links, others)]
    assert hits_at_k(*scores, 1) == 1 and encoder.training and predictor.training


class Watched(nn.Module):
    """A predictor that keeps the graphs and pairs that it was asked for."""

    def __init__(self):
        super().__init__()
        self.inner, self.seen = GAEPredictor(4), []

    def forward(self, x, adj, edge):
        self.seen.append((adj, edge))
        return self.inner(x, adj, edge)


@pytest.mark.parametrize(("remove", "left"), [(True, 46), (False, 56), ("random", 46)])
def test_target_links_are_hidden_from_encoder_and_predictor(remove, left):
    links, adj = two_cliques()
    graphs, predictor = [], Watched()

    class Encoder(PureGCN):
        def forward(self, x, adj):
            graphs.append(adj)
            return super().forward(x, adj)

    train_link_predictor(
        Encoder(3, 4), predictor, torch.randn(16, 3), adj, links,
        epochs=2, batch_size=10, remove_targets=remove,
    )  # fmt: skip
    assert len(predictor.seen) == 10 and len({id(adj) for adj in graphs}) == (10 if remove else 1)
    for (graph, edge), encoded in zip(predictor.seen, graphs, strict=True):
        assert graph is encoded
        assert left <= len(graph.indices) / 2 <= (56 if remove == "random" else left)
        positives, negatives = edge.split(10, 1)
        keys = positives[0] * 16 + positives[1]
        assert torch.isin(keys, adj.keys).all()
        assert torch.isin(keys, graph.keys).any() == (remove is not True)
        assert not torch.isin(negatives[0] * 16 + negatives[1], adj.keys).any()


def test_the_best_epoch_is_kept():
    links, adj = two_cliques()
    x, valid = torch.randn(16, 3), (links[:, :20], sample_non_edges(adj, 30))
    encoder, predictor = PureGCN(3, 8), NCNPredictor(8)
    scores = []

    def note(pos, neg, k):
        scores.append(hits_at_k(pos, neg, k))
        return scores[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neural_common_neighbor, "hits_at_k", note)
        train_link_predictor(
            encoder, predictor, x, adj, links, epochs=6, batch_size=14, valid=valid, k=2,
            lr=(0.5, 0.5),
        )  # fmt: skip
    kept = hits_at_k(*(score_edges(encoder, predictor, x, adj, edge) for edge in valid), 2)
    assert len(scores) == 6 and kept == max(scores)


# ---------------------------------------------------------------- types, modes, sizes


@pytest.mark.parametrize("name", EVERY)
def test_no_pairs_one_pair_and_pairs_in_strides(name):
    adj, _, pairs = random_graph(9, n=10)
    predictor, h = settled(EVERY[name](4)), normal(10, 4)
    logits = predictor(h, adj, pairs)
    assert predictor(h, adj, pairs[:, :0]).shape == (0, 1)
    assert torch.allclose(predictor(h, adj, pairs[:, :1]), logits[:1])
    strided = pairs.T.contiguous().T
    wide = torch.cat([h, h], 1)[:, :4]
    assert not (strided.is_contiguous() or wide.is_contiguous())
    assert torch.allclose(predictor(wide, adj, strided), logits)
    assert torch.allclose(predictor(h, adj, pairs.int()), logits)
    empty = CSRGraph.from_edge_index(pairs[:, :0], 10)
    assert predictor(h, empty, pairs).shape == (7, 1)
    assert PureGCN(4, 4).double()(h, empty).shape == (10, 4)
    assert not len(remove_edges(empty, pairs).indices)


def test_not_a_number_stays_where_it_is_seen():
    adj = CSRGraph.from_edge_index(torch.tensor([[0, 1, 3], [1, 2, 4]]), 6)
    h = torch.ones(6, 4).index_fill(0, torch.tensor([1]), math.nan)
    logits = NCNPredictor(4).eval()(h, adj, torch.tensor([[0, 3, 3], [2, 4, 5]]))
    assert logits.isnan()[:, 0].tolist() == [True, False, False]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(name, dtype):
    adj, _, pairs = random_graph(9, n=10)
    encoder, predictor = PureGCN(3, 8).eval(), EVERY[name](8).eval()
    x = torch.randn(10, 3, requires_grad=True)
    exact = predictor(encoder(x, adj), adj, pairs)
    with torch.autocast("cpu", dtype=dtype):
        found = predictor(encoder(x, adj), adj, pairs)
    found.sum().backward()
    assert torch.allclose(found.float(), exact, atol=0.1) and x.grad.isfinite().all()
    half = predictor.to(dtype)(encoder.to(dtype)(x.to(dtype), adj), adj, pairs)
    assert half.dtype == dtype and torch.allclose(half.float(), exact, atol=0.1)


def test_the_encoder_is_one_graph_and_predictors_compile(plain_python):
    adj, _, pairs = random_graph(9, n=10)
    encoder, predictor, x = PureGCN(3, 8).eval(), NCNCPredictor(8).eval(), torch.randn(10, 3)
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    h = encoder(x, adj)
    for graph in (adj, remove_edges(adj, pairs)):
        assert torch.allclose(compiled(x, graph), encoder(x, graph), atol=1e-6)
    compiled(x, adj).sum().backward()
    broken = torch.compile(predictor, backend="aot_eager")
    assert torch.allclose(broken(h, adj, pairs), predictor(h, adj, pairs), atol=1e-6)


# ---------------------------------------------------------------- public data


def write_planetoid(folder, name, n=520, d=5):
    """A graph in the files that the public sets come in: x, tx, allx, y, ty, ally, graph, index."""
    from scipy import sparse

    raw = folder / name / "raw"
    raw.mkdir(parents=True)
    x, y = np.eye(n, d, dtype=np.float32), np.eye(3, dtype=np.int32)[np.arange(n) % 3]
    graph = {i: [(i + 1) % n, (i - 1) % n, (i + 1) % n] for i in range(n)}
    graph[0] = [*graph[0], 0]  # a self loop, as some of these files have
    parts = {"x": sparse.csr_matrix(x[:3]), "allx": sparse.csr_matrix(x[: n - 10])}
    parts |= {
        "tx": sparse.csr_matrix(x[n - 10 :]),
        "y": y[:3],
        "ally": y[: n - 10],
        "ty": y[n - 10 :],
    }
    for part, value in (parts | {"graph": graph}).items():
        (raw / f"ind.{name.lower()}.{part}").write_bytes(pickle.dumps(value))
    (raw / f"ind.{name.lower()}.test.index").write_text("".join(f"{i}\n" for i in range(n - 10, n)))
    return x


def test_planetoid_from_a_folder(tmp_path):
    expected = write_planetoid(tmp_path, "Cora")
    x, links = load_planetoid("Cora", tmp_path)
    assert torch.equal(x, torch.from_numpy(expected))
    expected = sorted([(i, i + 1) for i in range(519)] + [(0, 519)])
    assert links.T.tolist() == list(map(list, expected))


def test_planetoid_without_its_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_geometric.datasets", None)
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    with pytest.raises(ModuleNotFoundError, match="Cora is read by PyTorch Geometric: pip install"):
        load_planetoid("Cora", tmp_path)


# ---------------------------------------------------------------- the authors' numbers


def parts_of(branch):
    linears = [layer for layer in branch if isinstance(layer, nn.Linear)]
    norms = [layer for layer in branch if isinstance(layer, nn.LayerNorm)]
    return linears, norms


def load_weights(model, tensors):
    """Copy the case's weights; returns name -> parameter."""
    pairs = {"w": None, "b": None, "a": None, "beta": getattr(model, "beta", None)}
    branches = {"fp": "pair_branch", "fc": "shared_branch", "fx": "x_branch", "g": "head"}
    for short, name in branches.items():
        if getattr(model, name, None) is None:
            continue
        linears, norms = parts_of(getattr(model, name))
        names = [f"{short}{k}" for k in range(len(linears))]
        if short == "g":
            names[-1] = "g_out"
        if short == "fc" and linears[0].in_features == 1 and "count0.w" in tensors:
            names[0] = "count0"
        for layer_name, linear in zip(names, linears, strict=True):
            pairs |= {f"{layer_name}.w": linear.weight, f"{layer_name}.b": linear.bias}
        if norms:
            last = {"fc": "fc1", "fx": "fx1", "fp": "fp0", "g": "g0"}[short]
            pairs |= {f"{last}.ln_w": norms[0].weight, f"{last}.ln_b": norms[0].bias}
    with torch.no_grad():
        for name, parameter in pairs.items():
            if parameter is not None:
                parameter.copy_(tensors[name].reshape(parameter.shape))
    return pairs


def load_encoder(encoder, tensors):
    for name, parameter in zip("wba", (*encoder.linear.parameters(), encoder.factors), strict=True):
        parameter.data.copy_(tensors[name])
    return encoder


def graph_of(case):
    return CSRGraph.from_edge_index(case.tensors["edges"].T, case.settings["num_nodes"])


def of_encoder(case):
    s = case.settings
    encoder = PureGCN(
        s["in_channels"], s["hidden_channels"], s["num_layers"], residual=s["residual"], jk=s["jk"]
    )
    encoder = load_encoder(encoder.double().eval(), case.tensors)
    x = case.tensors["x"].requires_grad_()
    output = encoder(x, graph_of(case))
    wanted = [x, encoder.linear.weight, encoder.factors]
    slopes = torch.autograd.grad(output.square().sum(), wanted)
    names = [f"gradient of sum(output**2) w.r.t. {name}" for name in "xwa"]
    return {"output": output, **dict(zip(names, slopes, strict=True))}


def of_completion(case):
    s, tensors = case.settings, case.tensors
    adj, pairs, h = graph_of(case), tensors["pairs"].T, tensors["h"].requires_grad_()
    options = {name: s[name] for name in ("alpha", "scale", "offset", "pt")}
    found = {}
    for depth in (0, 1, s["depth"]):
        predictor = NCNCPredictor(s["hidden_channels"], depth=depth, **options).double().eval()
        weights = load_weights(predictor, tensors)
        logits = predictor(h, adj, pairs)
        found[f"logits at depth {depth}"] = logits
    found["logits"] = logits
    found["calibrated"] = predictor.calibrate(tensors["logits_to_calibrate"])
    weights["h"] = h
    logits.square().sum().backward()
    for name in ("h", "fx0.w", "fc0.w", "fp0.w", "beta"):
        slope = weights[name].grad.reshape(tensors[name].shape)
        found[f"gradient of sum(logits**2) w.r.t. {name}"] = slope
    return {name: value for name, value in found.items() if name in case.expected}


def of_variants(case):
    s, tensors = case.settings, case.tensors
    adj, pairs, h = graph_of(case), tensors["pairs"].T, tensors["h"].requires_grad_()
    options = {name: s[name] for name in ("layer_norm", "tail_act", "two_layer_lin")}
    shape = (s["hidden_channels"], s["out_channels"])
    found = {}
    for name, predictor in {
        "NCN": NCNPredictor(*shape, use_xlin=s["use_xlin"], **options),
        "GAE": GAEPredictor(*shape, **options),
        "GAE + CN count": CNCountPredictor(*shape, **options),
    }.items():
        predictor = predictor.double().eval()
        load_weights(predictor, tensors)
        logits = predictor(h, adj, pairs)
        found[f"logits, {name}"] = logits
        (slope,) = torch.autograd.grad(logits.square().sum(), h)
        found[f"gradient of sum(logits**2) w.r.t. h, {name}"] = slope
        found[f"logits of the first pair alone, {name}"] = predictor(h, adj, pairs[:, :1])
    return found


def of_step(case):
    s, tensors = case.settings, case.tensors
    positives, negatives = tensors["positives"].T, tensors["negatives"].T
    adj = remove_edges(graph_of(case), positives)
    encoder = PureGCN(s["in_channels"], s["hidden_channels"]).double().eval()
    load_encoder(encoder, tensors)
    predictor = NCNPredictor(s["hidden_channels"]).double().eval()
    weights = load_weights(predictor, tensors)
    h = encoder(tensors["x"], adj)
    pos, neg = predictor(h, adj, positives), predictor(h, adj, negatives)
    loss = nn.functional.softplus(-pos).mean() + nn.functional.softplus(neg).mean()
    loss.backward()
    weights["w"] = encoder.linear.weight
    found = {"links left": torch.tensor([len(adj.indices) // 2]), "loss": loss[None]}
    found |= {"logits of the positives": pos, "logits of the negatives": neg}
    for name in ("w", "fx0.w", "fc0.w", "beta"):
        slope = weights[name].grad.reshape(tensors[name].shape)
        found[f"gradient of the loss w.r.t. {name}"] = slope
    return found


KINDS = {"encoder": of_encoder, "ncnc": of_completion, "variants": of_variants, "step": of_step}


@pytest.mark.parametrize(
    "case", list(load_reference("neural_common_neighbor")), ids=lambda c: c.name
)
def test_against_the_authors(case, agree):
    agree(case, KINDS[case.settings["what"]](case))


# ---------------------------------------------------------------- bad input


RING = CSRGraph.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), 4)
PAIR = torch.tensor([[0], [1]])


def train(**options):
    links = torch.tensor([[0, 1, 2], [1, 2, 0]])
    defaults = {"epochs": 1, "batch_size": 2}
    return train_link_predictor(
        PureGCN(2, 4), NCNPredictor(4), torch.zeros(4, 2), RING, links, **{**defaults, **options}
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CSRGraph.from_edge_index(PAIR, 1), r"edge_index must be in 0\.\.0, got 0 to 1"),
        (lambda: CSRGraph.from_edge_index(PAIR.T, 4), r"edge_index must be \(2, links\)"),
        (lambda: CSRGraph.from_edge_index(PAIR * 0, 4), "self loops, got one at node 0"),
        (lambda: CSRGraph.from_edge_index(PAIR, 4, undirected=False), "both directions"),
        (lambda: CSRGraph(2, torch.tensor([0, 1]), PAIR[0]), r"indptr must be \(3\)"),
        (lambda: CSRGraph(2, torch.tensor([0, 1, 3]), PAIR[1]), "indptr must rise from 0 to 1"),
        (
            lambda: CSRGraph(3, torch.tensor([0, 2, 3, 4]), torch.tensor([2, 1, 0, 0])),
            "indices must be sorted",
        ),
        (lambda: common_neighbors(RING, PAIR.T), r"edge must be \(2, pairs\), got shape \(1, 2\)"),
        (lambda: common_neighbors(RING, PAIR.float()), "edge must be whole numbers"),
        (lambda: neighbor_difference(RING, PAIR + 3), r"edge must be in 0\.\.3, got 3 to 4"),
        (lambda: remove_edges(RING, PAIR - 1), r"edge must be in 0\.\.3, got -1 to 0"),
        (lambda: NCNPredictor(4)(torch.zeros(3, 4), RING, PAIR), r"x must be \(4, 4\)"),
        (lambda: NCNPredictor(4)(torch.zeros(4, 5), RING, PAIR), r"x must be \(4, 4\)"),
        (lambda: PureGCN(2, 3)(torch.zeros(3, 2), RING), r"x must be \(4, 2\)"),
        (lambda: PureGCN(2, 3, dropout=1.5), r"dropout must be in \[0, 1\]"),
        (lambda: NCNCPredictor(4, pt=0.0), r"pt must be in \(0, 1\], got 0"),
        (lambda: NCNCPredictor(4, depth=-1), r"depth must be in 0\.\.\d+, got -1"),
        (lambda: NCNCPredictor(4, 2), "out_channels must be 1"),
        (lambda: NCNCPredictor(4, split_size=0), "split_size must be at least 1"),
        (lambda: sample_rows(PAIR[:, 0], PAIR[:, 0], 3, 0), "deg must be at least 1"),
        (lambda: sample_rows(PAIR.flip(0)[:, 0], PAIR[:, 0], 3, 1), "row must be sorted"),
        (
            lambda: pool_neighbors(torch.zeros(3, 2), PAIR.flip(0)[:, 0], PAIR[:, 0], 3),
            "row must be sorted",
        ),
        (lambda: pool_neighbors(torch.zeros(3, 2), PAIR[0], PAIR[0] + 3, 3), "node must be in"),
        (lambda: hits_at_k(torch.zeros(3), torch.zeros(4), 5), r"k must be in 1\.\.4, got 5"),
        (lambda: hits_at_k(torch.zeros(3), torch.zeros(4), 0), r"k must be in 1\.\.4, got 0"),
        (lambda: mrr(torch.zeros(3), torch.zeros(2, 4)), r"neg must be \(3, others\)"),
        (lambda: train(batch_size=4), r"batch_size must be in 1\.\.3, got 4"),
        (lambda: train(epochs=0), "epochs must be at least 1"),
        (lambda: train(remove_targets="all"), "remove_targets must be one of"),
        (
            lambda: sample_non_edges(RING, 3, nodes=torch.tensor([0, 1, 2])),
            "pairs without a link, but all 3 nodes are linked",
        ),
        (lambda: load_planetoid("Coar"), "did you mean 'Cora'"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
