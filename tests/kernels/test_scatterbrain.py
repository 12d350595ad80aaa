"""Scatterbrain: features, supports, both attentions against the whole table."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.kernels.scatterbrain import (
    ScatterbrainLocalAttention,
    ScatterbrainLSHAttention,
    cluster_mask,
    local_support,
    orthogonal_gaussian,
    scatterbrain_dense,
    smyrf_clusters,
    softmax_features,
    xbox_plus,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def three(T=7, S=9, E=4, D=3, B=2, H=2, seed=0, dtype=torch.float64):
    sizes = ((B, T, H, E), (B, S, H, E), (B, S, H, D))
    return [normal(*size, seed=seed + i, dtype=dtype) for i, size in enumerate(sizes)]


def heads(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def softmax_attention(q, k, v, t, real=None):
    q, k, v = heads(q, k, v)
    logits = t * q @ k.mT
    if real is not None:
        logits = logits.masked_fill(~real[:, None, None], -math.inf)
    return (logits.softmax(-1) @ v).transpose(1, 2)


def local(dim=4, window=3, n_features=6, **options):
    return ScatterbrainLocalAttention(dim, window, n_features, **options).double()


def lsh(dim=4, n_hashes=3, cluster=4, n_features=6, **options):
    return ScatterbrainLSHAttention(dim, n_hashes, cluster, n_features, **options).double()


BOTH = pytest.mark.parametrize("build", [local, lsh])


# ---------------------------------------------------------------- features


@pytest.mark.parametrize(("rows", "dim"), [(6, 3), (7, 3), (2, 5), (1, 1)])
def test_rows_are_orthogonal_in_blocks(rows, dim):
    W = orthogonal_gaussian(rows, dim, generator=torch.Generator().manual_seed(0))
    assert W.shape == (rows, dim) and W.dtype == torch.float32
    for block in W.split(dim):
        gram = block @ block.T
        assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-5)
    assert torch.allclose(orthogonal_gaussian(6, 4, scaling=1).norm(dim=1), torch.tensor(2.0))


def estimate(q, k, W, **options):
    (phi_q, log_q), (phi_k, log_k) = (
        softmax_features(x, W, is_query, **options) for x, is_query in ((q, True), (k, False))
    )
    return phi_q @ phi_k.mT * torch.exp(log_q + log_k)


@pytest.mark.parametrize("cosh", [True, False])
def test_features_are_the_formula(cosh):
    q, k, W = normal(2, 5, 4), normal(2, 6, 4, seed=1), normal(3, 4, seed=2)

    def plain(x):
        u = 0.7**0.5 * x @ W.T
        u = torch.cat([u, -u], -1) if cosh else u
        return (u - 0.35 * x.square().sum(-1, keepdim=True)).exp() / u.shape[-1] ** 0.5

    found = estimate(q, k, W, temp=0.7, cosh=cosh)
    assert torch.allclose(found, plain(q) @ plain(k).mT)


def blocks_of_rows(count, d, sign=True):
    """Many independent draws of d orthogonal rows at once."""
    Q, R = torch.linalg.qr(torch.randn(count, d, d, dtype=torch.float64))
    if sign:
        Q = Q * R.diagonal(dim1=-2, dim2=-1).sign()[:, None, :]
    return Q.mT * torch.randn(count, d, d, dtype=torch.float64).norm(dim=-1, keepdim=True)


def test_estimates_have_the_right_mean_for_64_pairs():
    d, draws = 8, 400
    pairs = torch.nn.functional.normalize(normal(2, 64, d, seed=5), dim=-1)
    W = torch.stack([orthogonal_gaussian(d, d) for _ in range(40)]).double()
    assert W.std() == pytest.approx(1, abs=0.1)
    z = pairs.sum(0)
    cosh = torch.cosh(
        torch.einsum("pnrd,pd->pnr", blocks_of_rows(64 * draws, d).unflatten(0, (64, draws)), z)
    )
    guess = cosh.mean(-1) * math.exp(-1)
    exact = (pairs[0] * pairs[1]).sum(-1).exp()
    scores = (guess.mean(1) - exact) / (guess.std(1) / draws**0.5)
    assert abs(scores.mean()) < 0.4 and 0.75 < scores.std() < 1.25


def test_variances_are_those_of_the_formulas():
    q, k = 0.4 * normal(4, seed=1), 0.4 * normal(4, seed=2)
    z, product = (q + k).square().sum(), q @ k
    w = torch.randn(100_000, 3, 4, dtype=torch.float64) @ (q + k)
    norm = torch.exp(-(q @ q + k @ k) / 2)
    positive = (1 - torch.exp(-z)) * torch.exp(z + 2 * product) / 3
    errors = (w.exp().mean(1) * norm - product.exp()).square().mean()
    assert errors == pytest.approx(positive.item(), rel=0.1)
    errors = (w.cosh().mean(1) * norm - product.exp()).square().mean()
    assert errors == pytest.approx((positive * (1 - torch.exp(-z)) / 2).item(), rel=0.1)


def test_padded_keys_leave_before_the_maximum():
    x, W = normal(1, 5, 4), normal(3, 4, seed=1)
    mask = torch.tensor([[True, True, False, True, False]])
    alone = softmax_features(x[:, mask[0]], W, False)
    x[:, 2], x[:, 4] = 1e3, math.nan
    phi, log_scale = softmax_features(x, W, False, eps=0.1, mask=mask)
    assert (phi[:, ~mask[0]] == 0).all()
    assert torch.allclose(phi[:, mask[0]], alone[0] + 0.1 / 6**0.5)
    assert torch.equal(log_scale, alone[1])


# ---------------------------------------------------------------- supports


@SMALL
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20))
def test_the_window_is_clipped_at_both_ends(T, S, w):
    support = local_support(T, S, w)
    for i in range(T):
        inside = range(i - w // 2, i - w // 2 + w)
        assert support[i].tolist() == [j in inside for j in range(S)]


@SMALL
@given(SEEDS, st.integers(1, 6), st.integers(1, 6))
def test_the_lift_keeps_products_and_evens_lengths(seed, T, S):
    q, k = normal(2, T, 3, seed=seed), 2 * normal(2, S, 3, seed=seed + 1)
    lifted_q, lifted_k = xbox_plus(q, k)
    assert torch.allclose(lifted_q @ lifted_k.mT, q @ k.mT, atol=1e-6)
    lengths = torch.cat([lifted_q, lifted_k], 1).square().sum(-1)
    M = q.square().sum(-1).amax(-1) + k.square().sum(-1).amax(-1)
    assert torch.allclose(lengths, M[:, None].expand_as(lengths))


def test_clusters_are_cut_from_both_orders():
    q, k = normal(2, 10, 3), normal(2, 9, 3, seed=1)
    q_pos, k_pos = smyrf_clusters(q, k, 2, 4, torch.Generator().manual_seed(0))
    again = smyrf_clusters(q, k, 2, 4, torch.Generator().manual_seed(0))
    assert torch.equal(q_pos, again[0]) and q_pos.shape == (2, 2, 10) and k_pos.shape == (2, 2, 9)
    expected = torch.zeros(2, 10, 9, dtype=torch.bool)
    for h in range(2):
        for b in range(2):
            for start in (0, 4, 8):
                rows, columns = q_pos[h, b, start : start + 4], k_pos[h, b, start : start + 4]
                expected[b, rows[:, None], columns] = True
    assert torch.equal(cluster_mask(q_pos, k_pos, 4), expected)


# ---------------------------------------------------------------- the whole table


def test_on_the_support_exact_and_off_it_the_estimate():
    q, k, W = normal(6, 4), normal(8, 4, seed=1), normal(3, 4, seed=2)
    support = normal(6, 8, seed=3) > 0
    table = torch.where(support, (q @ k.T / 2).exp(), estimate(q, k, W))
    found = scatterbrain_dense(q, k, torch.eye(8).double(), support, W)
    assert torch.allclose(found, table / table.sum(1, keepdim=True))
    order = torch.randperm(8)
    v = normal(8, 2, seed=4)
    moved = scatterbrain_dense(q, k[order], v[order], support[:, order], W)
    assert torch.allclose(moved, scatterbrain_dense(q, k, v, support, W))


def test_empty_support_is_performer_and_full_is_softmax():
    q, k, v, W = normal(6, 4), normal(8, 4, seed=1), normal(8, 2, seed=2), normal(3, 4, seed=3)
    none, every = torch.zeros(6, 8).bool(), torch.ones(6, 8).bool()
    guess = estimate(q, k, W)
    performer = guess @ v / guess.sum(1, keepdim=True)
    assert torch.allclose(scatterbrain_dense(q, k, v, none, W), performer)
    assert torch.allclose(scatterbrain_dense(q, k, v, every, W), (q @ k.T / 2).softmax(1) @ v)


@SMALL
@given(SEEDS)
def test_replacing_entries_never_makes_the_table_worse(seed):
    q, k, W = normal(6, 4, seed=seed), normal(8, 4, seed=seed + 1), normal(3, 4, seed=seed + 2)
    exact, guess = (q @ k.T / 2).exp(), estimate(q, k, W)
    support = normal(6, 8, seed=seed + 3) > 0
    better = torch.where(support, exact, guess)
    assert (better - exact).norm() <= (guess - exact).norm() + 1e-12


def test_gradients_of_the_table():
    q, k, v, W = normal(3, 4), normal(5, 4, seed=1), normal(5, 2, seed=2), normal(3, 4, seed=3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    support = normal(3, 5, seed=4) > 0
    assert torch.autograd.gradcheck(lambda *x: scatterbrain_dense(*x, support, W), inputs)


# ---------------------------------------------------------------- the fast ones


@SMALL
@given(SEEDS, st.integers(1, 20), st.integers(1, 20), st.integers(1, 45))
def test_blocks_equal_the_table(seed, T, S, window):
    q, k, v = three(T, S, seed=seed)
    attention = local(window=window)
    out, weights = attention(q, k, v, need_weights=True)
    dense = scatterbrain_dense(*heads(q, k, v), local_support(T, S, window), attention.W)
    assert torch.allclose(out, dense.transpose(1, 2), atol=1e-9)
    assert torch.allclose(weights.sum(-1), torch.ones(2, 2, T).double())
    assert (weights >= 0).all()
    assert torch.allclose(weights @ v.transpose(1, 2), out.transpose(1, 2), atol=1e-9)


@SMALL
@given(SEEDS, st.integers(1, 4), st.integers(1, 5), st.integers(9, 20), st.integers(0, 3))
def test_clusters_equal_the_table_of_their_union(seed, n_hashes, cluster, T, fewer):
    S = T - fewer if -(-T // cluster) == -(-(T - fewer) // cluster) else T
    q, k, v = three(T, S, seed=seed)
    torch.manual_seed(seed)  # features and hashes are those of the example, too
    attention = lsh(n_hashes=n_hashes, cluster=cluster)
    out, weights = attention(q, k, v, need_weights=True)
    orders = smyrf_clusters(*heads(q, k), n_hashes, cluster, directions=attention.directions)
    dense = scatterbrain_dense(*heads(q, k, v), cluster_mask(*orders, cluster), attention.W)
    # What the hashes cover is subtracted from the whole mass; few features differ by e^20 here,
    # and the difference keeps 8 digits of 16, in 1 of 1,000 examples 6.
    assert torch.allclose(out, dense.transpose(1, 2), atol=1e-4)
    assert torch.allclose(weights @ v.transpose(1, 2), out.transpose(1, 2), atol=1e-9)


@pytest.mark.parametrize("temp", [None, 0.2])
def test_a_window_over_everything_is_softmax(temp):
    q, k, v = three()
    t = 0.5 if temp is None else temp
    assert torch.allclose(local(window=18, temp=temp)(q, k, v), softmax_attention(q, k, v, t))


@BOTH
def test_padding_counts_nothing(build):
    q, k, v = three(8, 8)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[0, 5:] = False
    attention = build()
    out = attention(q, k, v, real)
    if build is local:
        assert torch.allclose(out[:1], attention(q[:1], k[:1, :5], v[:1, :5]))
    for x in (k, v):
        x[0, 5], x[0, 6:] = math.nan, 1e6
    found, weights = attention(q, k, v, real, need_weights=True)
    assert torch.allclose(found, out)
    assert (weights[0, ..., 5:] == 0).all()
    assert torch.allclose(weights @ v.nan_to_num().transpose(1, 2), out.transpose(1, 2))
    assert torch.allclose(attention(q, k.nan_to_num(), v.nan_to_num(), torch.ones(2, 8).bool()),
                          attention(q, k.nan_to_num(), v.nan_to_num()))  # fmt: skip
    nothing = attention(q, k, v, torch.zeros(2, 8, dtype=torch.bool))
    assert (nothing == 0).all()


@BOTH
def test_gradients(build):
    q, k, v = three(6, 6, B=1)
    real = torch.tensor([[True] * 5 + [False]])
    inputs = [x.requires_grad_() for x in (q, k, v)]
    attention = build(cluster=3) if build is lsh else build()
    assert torch.autograd.gradcheck(lambda *x: attention(*x, real), inputs)


@pytest.mark.parametrize("size", [1.0, 10.0, 30.0])
def test_a_covering_window_is_softmax_for_huge_logits(size):
    q, k, v = three(24, 24, 16, dtype=torch.float32)
    k = size * torch.nn.functional.normalize(k, dim=-1)
    q = -k
    attention = ScatterbrainLocalAttention(16, 48)
    out, weights = attention(q, k, v, need_weights=True)
    assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(out, softmax_attention(q, k, v, 0.25), atol=2e-5)


@BOTH
@pytest.mark.parametrize("scale", [0.0, 30.0, 1e3])
def test_huge_logits_stay_finite_with_finite_gradients(build, scale):
    q, k, v = three(8, 8, 16, dtype=torch.float32)
    q = (scale**0.5 * q).requires_grad_()
    k = scale**0.5 * k
    attention = build(16, n_features=8).float()
    out = attention(q, k, v)
    out.square().sum().backward()
    assert out.isfinite().all() and q.grad.isfinite().all()
    assert out.abs().max() < 10 * v.abs().max()


@BOTH
def test_nan_stays_visible_and_another_layout_changes_nothing(build):
    q, k, v = three(8, 8)
    attention = build()
    strided = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    assert torch.allclose(attention(*strided), attention(q, k, v))
    assert torch.allclose(attention(q[:1], k[:1], v[:1]), attention(q, k, v)[:1])
    k[0, 3, 0, 0] = math.nan
    out = attention(q, k, v)
    assert out[0, :, 0].isnan().all() and out[1].isfinite().all()


@BOTH
def test_empty_batches_and_no_queries(build):
    attention = build()
    q, k, v = three(8, 8, B=0)
    assert attention(q, k, v).shape == (0, 8, 2, 3)
    q, k, v = three(0, 8)
    if build is local:
        out, weights = attention(q, k, v, need_weights=True)
        assert out.shape == (2, 0, 2, 3) and weights.shape == (2, 2, 0, 8)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(build, dtype):
    q, k, v = (x.to(dtype) for x in three(8, 8))
    attention = build().float()
    found, full = attention(q, k, v), attention(q.float(), k.float(), v.float())
    assert found.dtype == dtype and torch.allclose(found.float(), full, atol=2e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(q.float(), k.float(), v.float()), full)


@BOTH
def test_one_graph(build, plain_python):
    q, k, v = (x.float() for x in three(8, 8))
    real = torch.tensor([[True] * 6 + [False] * 2, [True] * 8])
    attention = build().float()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(q, k, v, real), attention(q, k, v, real), atol=1e-6)


@BOTH
def test_dropout_is_unbiased_and_off_in_evaluation(build):
    q, k, v = three(8, 8)
    attention = build(dropout=0.5)
    assert not torch.equal(attention(q, k, v), attention(q, k, v))
    mean = sum(attention(q, k, v) for _ in range(400)) / 400
    still = attention.eval()(q, k, v)
    assert torch.equal(still, attention(q, k, v))
    assert (mean - still).abs().max() < 0.2


def test_draws_belong_to_the_module():
    first = lsh(generator=torch.Generator().manual_seed(3))
    second = lsh(generator=torch.Generator().manual_seed(3))
    assert torch.equal(first.W, second.W) and torch.equal(first.directions, second.directions)
    before = first.W.clone()
    first.redraw(torch.Generator().manual_seed(4))
    assert not torch.equal(first.W, before) and first.W.dtype == torch.float64
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.W, second.W)
    widths = {E: ScatterbrainLocalAttention(E, 3).W.shape[0] * 2 for E in (1, 2, 5, 32)}
    assert widths == {1: 2, 2: 2, 5: 8, 32: 110}


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most numbers that one operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


@pytest.mark.parametrize("n", [1024, 4096])
def test_memory_is_linear(n):
    q, k, v = three(n, n, 32, 32, B=1, H=1, dtype=torch.float32)
    with torch.no_grad(), Largest() as largest:
        ScatterbrainLocalAttention(32, 64, 32)(q, k, v)
    assert largest.numbers < n * (4 * 64 + 4 * 32 + 4 * 32)
    with torch.no_grad(), Largest() as largest:
        ScatterbrainLSHAttention(32, 4, 16, 32)(q, k, v)
    assert largest.numbers < n * (4 * 64 + 4 * 32 + 4 * 32)


# ---------------------------------------------------------------- the authors' numbers


def of_features(case):
    found, W = {}, case.tensors["W"]
    temp, eps = case.settings["temp"], case.settings["eps"]
    variants = {
        "cosh": {}, "cosh, temp, eps": {"temp": temp, "eps": eps},
        "plain": {"temp": temp, "cosh": False},
    }  # fmt: skip
    for who, name in (("query", "q"), ("key", "k")):
        for variant, options in variants.items():
            phi, log_scale = softmax_features(case.tensors[name], W, who == "query", **options)
            told = "plain (cosh=False)" if variant == "plain" else variant
            found |= {f"{who} features, {told}": phi, f"{who} log scale, {told}": log_scale}
    return found


def with_gradients(attention, case, real=None):
    q, k, v = (case.tensors[name].requires_grad_() for name in "qkv")
    out = attention(q, k, v, real)
    out.square().sum().backward()
    slopes = {f"gradient of sum(output**2) w.r.t. {n}": case.tensors[n].grad for n in "qkv"}
    weights = attention(q, k, v, real, need_weights=True)[1]
    return {"output": out, "weights [B,H,T,S]": weights, **slopes}


def of_local(case):
    W, given_ = case.tensors["W"], case.settings
    attention = local(W.shape[1], given_["window"], given_["n_features"], temp=given_["temp"])
    attention.W.copy_(W)
    S = case.tensors["k"].shape[1]
    real = None
    if given_.get("key_lengths"):
        real = torch.arange(S) < torch.tensor(given_["key_lengths"])[:, None]
    found = with_gradients(attention, case, real)
    q, k = heads(case.tensors["q"], case.tensors["k"])
    support = local_support(q.shape[2], S, given_["window"])
    guess = estimate(q, k, W, temp=given_["temp"])
    table = torch.where(support, (attention.temp * q @ k.mT).exp(), guess)
    table = table if real is None else table * real[:, None, None]
    return found | {"unnormalised matrix [B,H,T,S]": table}


def of_lsh(case):
    W, given_ = case.tensors["W"], case.settings
    n_hashes, size = given_["n_hashes"], given_["cluster_size"]
    attention = lsh(W.shape[1], n_hashes, size, given_["n_features"])
    attention.W.copy_(W)
    attention.directions.copy_(case.tensors["hash_directions"])
    found = with_gradients(attention, case)
    q, k = heads(case.tensors["q"], case.tensors["k"])
    lifted_q, lifted_k = xbox_plus(q, k)
    orders = smyrf_clusters(q, k, n_hashes, size, directions=attention.directions)
    return found | {
        "query positions [n_hashes,B*H,T]": orders[0].flatten(1, 2),
        "key positions [n_hashes,B*H,S]": orders[1].flatten(1, 2),
        "support [B,H,T,S]": cluster_mask(*orders, size),
        "lifted queries [B,H,T,E+2]": lifted_q,
        "lifted keys [B,H,S,E+2]": lifted_k,
    }


KINDS = {"features": of_features, "local": of_local, "smyrf": of_lsh}


@pytest.mark.parametrize("case", list(load_reference("scatterbrain")), ids=lambda case: case.name)
def test_against_the_authors(case, agree):
    agree(case, KINDS[case.settings["kind"]](case))


# ---------------------------------------------------------------- bad input

Q = torch.zeros(1, 4, 2, 4)
ATTENTION = ScatterbrainLocalAttention(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: orthogonal_gaussian(3, 3, scaling=2), "scaling must be 0 or 1, got 2"),
        (lambda: orthogonal_gaussian(0, 3), "must be at least 1, got 0"),
        (lambda: softmax_features(Q, torch.zeros(3, 5), True), r"x must be \(\.\.\., n, 5\)"),
        (lambda: softmax_features(Q[:, :, :0], torch.zeros(3, 4), False), "keys must be"),
        (lambda: softmax_features(Q, torch.zeros(3, 4), True, eps=-1.0), "eps must be positive"),
        (lambda: softmax_features(Q, torch.zeros(3, 4), True, temp=0.0), "temp must be positive"),
        (lambda: local_support(3, 3, 0), "window must be >= 1"),
        (lambda: smyrf_clusters(Q[0], Q[0], 2, 0), "cluster must be at least 1, got 0"),
        (
            lambda: smyrf_clusters(Q[0, 0], torch.zeros(3, 4), 2, 1),
            "different number of clusters: 2 and 3 in clusters of 1",
        ),
        (
            lambda: scatterbrain_dense(Q, Q, Q, torch.zeros(2, 2), torch.zeros(3, 4)),
            "mask must be bool",
        ),
        (lambda: ScatterbrainLocalAttention(4, 0), "window must be >= 1"),
        (lambda: ScatterbrainLocalAttention(4, 3, 5), "n_features must be an even number >= 2"),
        (lambda: ScatterbrainLocalAttention(4, 3, dropout=1.5), r"dropout must be in \[0, 1\]"),
        (lambda: ScatterbrainLSHAttention(4, 0, 3), "n_hashes must be at least 1"),
        (lambda: ATTENTION(Q, Q[..., :3], Q), "q and k must share the last dimension"),
        (lambda: ATTENTION(Q, Q, Q[:, :3]), "v must have the same length as k"),
        (lambda: ATTENTION(Q, Q[:, :, :1], Q), r"k must be \(1, S, 2, E\)"),
        (lambda: ATTENTION(Q, Q[:, :0], Q[:, :0]), "keys must be at least 1"),
        (lambda: ATTENTION(Q[0], Q, Q), r"q must be \(B, T, H, 4\)"),
        (lambda: ATTENTION(*[Q[..., :3]] * 3), r"q must be \(B, T, H, 4\)"),
        (lambda: ATTENTION(Q, Q, Q, torch.ones(1, 4)), "key_padding_mask must be bool"),
        (lambda: ATTENTION(Q, Q, Q, torch.ones(1, 3).bool()), r"key_padding_mask must be \(1, 4\)"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
