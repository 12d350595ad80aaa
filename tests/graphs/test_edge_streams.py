"""Edge streams: the ring of recent edges, planted streams, places from walks, public streams."""

import math
import sys
from pathlib import Path

import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from streams import OneByOne, as_lists, close_lists, random_stream

from shuffle_nb.graphs.edge_streams import (
    EdgeStream,
    RecentNeighbors,
    _walks,
    community_stream,
    load_jodie,
    partner_stream,
    positional_features,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)


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


def test_a_public_stream_is_read_from_its_file(tmp_path, plain_python, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.datasets", None)
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
    with pytest.raises(FileNotFoundError, match=r"mine\.csv"):
        load_jodie(str(tmp_path / "mine.csv"))


def test_a_public_stream_is_fetched_to_where_it_is_read(tmp_path, monkeypatch):
    from torch_geometric import datasets

    def download(self):
        rows = ["header", "0,0,0.0,0,0.5", "1,0,2.0,1,0.25"]
        Path(self.raw_dir, f"{self.name}.csv").write_text("\n".join(rows) + "\n")

    monkeypatch.setattr(datasets.JODIEDataset, "download", download)
    task = load_jodie("mooc", tmp_path)
    assert task.stream.dst.tolist() == [2, 2] and task.labels.tolist() == [0, 1]


# ---------------------------------------------------------------- bad input


TWO, ONES = torch.tensor([0, 1]), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EdgeStream(TWO, TWO, ONES.cumsum(0).flip(0)), "t must be sorted, got 2 before 1"),
        (lambda: EdgeStream(TWO, TWO, torch.tensor([0, math.nan])), "t must be finite, got nan"),
        (lambda: EdgeStream(TWO, TWO[:1], ONES), r"dst must be \(2\), got shape \(1,\)"),
        (lambda: EdgeStream(TWO - 1, TWO, ONES), "src must be in 0.*got -1 to 0"),
        (lambda: EdgeStream(TWO, TWO, ONES, weight=ONES[:1]), "weight must be"),
        (lambda: RecentNeighbors(3, 0), "k must be at least 1, got 0"),
        (lambda: RecentNeighbors(1, 2).insert(TWO, TWO, ONES), r"src must be in 0\.\.0"),
        (lambda: RecentNeighbors(3, 2).insert(TWO, TWO, -ONES.cumsum(0)), "t must be sorted"),
        (lambda: RecentNeighbors(3, 2).query(TWO + 2, ONES), r"nodes must be in 0\.\.2"),
        (
            lambda: positional_features(*cliques()[:2], 13, 2, TWO.new_ones(13).bool(), "svd"),
            "ppmi",
        ),
        (
            lambda: positional_features(TWO, TWO, 2, 2, TWO.bool()),
            "src and dst must be edges between seen nodes",
        ),
        (lambda: community_stream(move=2.0), r"move must be in \[0, 1\]"),
        (lambda: community_stream(edges=20).parts(0.9, 0.1), "test must be at least 1, got 0"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
