"""Nearest codes: k-means, and centres in the place of vectors. The search is tested with `snap`."""

import pytest
import torch

from shuffle_nb.features.nearest_codes import (
    SIMILARITIES,
    Centres,
    draw_rows,
    k_means,
    mean_of_codes,
    nearest_codes,
    scoring,
    snap,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("similarity", SIMILARITIES)
@pytest.mark.parametrize("tokens", [2, 200])  # few: scores are divided, many: codes are
def test_the_search_is_the_definition(similarity, tokens):
    z, codes = normal(tokens, 2, 5), normal(2, 9, 5, seed=1)
    ids = nearest_codes(z, codes, *scoring(codes, similarity), k=3)
    apart = (z.unsqueeze(2) - codes).norm(dim=-1)
    along = (z.unsqueeze(2) * codes).sum(-1) / codes.norm(dim=-1)
    scores = along if similarity == "inner" else -apart
    assert torch.equal(ids, scores.topk(3, dim=-1).indices)
    mean = codes[torch.arange(2).view(-1, 1), ids].mean(-2)
    assert torch.allclose(mean_of_codes(codes, ids), mean, atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_snap_is_the_search_and_the_mean(similarity):
    z, codes = normal(20, 10), normal(2, 9, 5, seed=1)
    q, ids = snap(z, codes, 3, similarity)
    found = nearest_codes(z.unflatten(1, (2, 5)), codes, *scoring(codes, similarity), k=3)
    assert torch.equal(ids, found)
    assert torch.equal(q, mean_of_codes(codes, found).flatten(1))
    alone, its_ids = snap(z[:, :5], codes[0], 3, similarity)  # a table without groups
    assert torch.equal(alone, q[:, :5]) and torch.equal(its_ids, ids[:, 0])


def test_an_unknown_similarity_is_refused(plain_python):
    with pytest.raises(ValueError, match="similarity must be one of"):
        scoring(torch.ones(1, 2, 3), "cosine")


def test_rows_are_drawn_without_replacement_until_all_are_drawn():
    x = torch.arange(5.0).unsqueeze(1)
    drawn = draw_rows(x, 12, torch.Generator().manual_seed(0)).flatten()
    assert sorted(drawn[:5].tolist()) == sorted(drawn[5:10].tolist()) == [0, 1, 2, 3, 4]
    assert len(drawn) == 12 and len(draw_rows(x, 0)) == 0
    with pytest.raises(ValueError, match="at least one vector"):
        draw_rows(x[:0], 1)


def test_noise_of_drawn_rows_scales_with_their_length():
    x = normal(5, 4000) * torch.tensor([[0.1], [1.0], [10.0], [1.0], [5.0]])
    exact = draw_rows(x, 5, torch.Generator().manual_seed(0))
    noisy = draw_rows(x, 5, torch.Generator().manual_seed(0), noise=0.1)
    deviation = (noisy - exact).std(-1) / exact.norm(dim=-1)
    assert torch.allclose(deviation, torch.full_like(deviation, 0.1), rtol=0.1)


def test_k_means_finds_separate_clusters():
    middles = 10 * torch.eye(4)
    x = (middles.repeat_interleave(25, 0) + 0.1 * normal(100, 4))[torch.randperm(100)]
    found = [k_means(x, 4, torch.Generator().manual_seed(s)) for s in range(8)]
    error = [torch.cdist(x, centres).min(1).values.square().mean().item() for centres in found]
    assert min(error) < 0.06  # 4 · 0.1²
    best = found[error.index(min(error))]
    assert (torch.cdist(best, middles).min(1).values < 0.1).all()


def test_k_means_never_gets_worse_with_rounds():
    x, errors = normal(300, 3), []
    for rounds in (0, 1, 5, 20):
        centres = k_means(x, 7, torch.Generator().manual_seed(0), rounds)
        errors.append(torch.cdist(x, centres).min(1).values.square().mean().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@pytest.mark.parametrize("groups", [1, 3])
def test_centres_replace_each_group_by_its_nearest(groups):
    layer = Centres(4, groups, torch.Generator().manual_seed(0))
    first, later = normal(50, 2, 6), normal(7, 6, seed=1)
    assert layer(first).shape == first.shape and layer.codes.shape == (groups, 4, 6 // groups)
    codes, out = layer.codes, layer(later)
    assert layer.codes is codes and layer.last_ids.shape == (7, groups, 1)
    for group, (part, chunk) in enumerate(
        zip(out.chunk(groups, -1), later.chunk(groups, -1), strict=True)
    ):
        nearest = torch.cdist(chunk, codes[group]).argmin(1)
        assert torch.equal(part, codes[group, nearest])
        assert torch.equal(layer.last_ids[:, group, 0], nearest)


def test_as_many_centres_as_vectors_are_the_vectors():
    x = normal(9, 4)
    assert torch.allclose(Centres(9)(x), x)


def test_centres_say_what_is_wrong(plain_python):
    with pytest.raises(ValueError, match="n must be at least 1"):
        Centres(0)
    with pytest.raises(ValueError, match="dim must be divisible by groups"):
        Centres(4, groups=4)(torch.zeros(3, 6))
