"""SPLASH: what a query sees of a stream, features of late nodes, their selection, and SLIM."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import OneByOne, as_lists, close_lists, random_stream
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
    propagate_unseen,
    random_features,
    recent_neighbors,
    representation,
    select_augmentation,
    time_encoding,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)


# ---------------------------------------------------------------- what a query sees


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
    ages = (9 * torch.rand(4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: time_encoding(t, 3, dtype=torch.float64), ages)


def test_random_features_are_for_seen_nodes_only():
    seen = torch.tensor([True, False, True])
    x = random_features(3, 5, seen, torch.Generator().manual_seed(1))
    assert (x[1] == 0).all() and (x[[0, 2]] != 0).all()
    assert torch.equal(x, random_features(3, 5, seen, torch.Generator().manual_seed(1)))


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
        (lambda: degree_encoding(TWO, 5), "even"),
        (lambda: time_encoding(ONES, 0), "dim must be at least 1"),
        (lambda: random_features(3, 2, torch.ones(2).bool()), r"seen must be \(3\)"),
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
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
