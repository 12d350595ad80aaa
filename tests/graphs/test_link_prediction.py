"""Link prediction: the graph of digits and junk. (Graphs, scores: test_neural_common_neighbor.)"""

import torch

from shuffle_nb.graphs.link_prediction import CSRGraph, digit_graph, hits_at_k, sample_non_edges


def test_digits_and_junk_are_as_told():
    x, digit_links, junk_links = digit_graph()
    assert x.shape == (860, 2) and x.dtype == torch.float32
    assert digit_links.shape == (2, 2044) and junk_links.shape == (2, 3600)
    assert torch.equal(x[:, 1], (torch.arange(860) >= 500).float())
    assert (x[500:, 0] == 0).all() and abs(x[:500, 0].std() - 1) < 0.01
    assert digit_links.max() < 500 and (digit_links[0] < digit_links[1]).all()
    junk = CSRGraph.from_edge_index(junk_links, 860)
    assert (junk.degree[500:] == 10).all() and len(junk.indices) == 7200
    digits = CSRGraph.from_edge_index(digit_links, 860)
    assert (digits.degree[:500] >= 6).all() and len(digits.indices) == 4088
    again = digit_graph()
    assert all(map(torch.equal, (x, digit_links, junk_links), again))


def test_near_digits_are_linked_more_often_than_others_by_their_component():
    x, links, _ = digit_graph()
    graph, nodes = CSRGraph.from_edge_index(links, len(x)), torch.arange(500)
    others = sample_non_edges(graph, links.shape[1], torch.Generator().manual_seed(0), nodes)
    near, far = (-(x[edge[0], 0] - x[edge[1], 0]).abs() for edge in (links, others))
    assert hits_at_k(near, far, len(far) // 2) > 0.7


def test_a_graph_moves_whole():
    graph = CSRGraph.from_edge_index(torch.tensor([[0, 1], [1, 2]]), 4).to("cpu")
    assert graph.degree.tolist() == [1, 2, 1, 0] and graph.keys.tolist() == [1, 4, 6, 9]
