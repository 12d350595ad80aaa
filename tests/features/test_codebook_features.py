"""Codebook features: the layer, its gradients and interventions, around any network."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.features import codebook_features, token_machine
from shuffle_nb.features import nearest_codes as module
from shuffle_nb.features.codebook_features import (
    CodebookLayer,
    CodebookTransformer,
    TokFSM,
    add_codebooks,
    evaluating,
    find_codebooks,
    first_transition_accuracy,
    init_codebooks,
    load_release,
    recon_loss,
    snap,
    straight_through,
    swap_codes,
)
from shuffle_nb.foundations.reference import load_reference

seeds = st.integers(0, 10_000)
similarities = st.sampled_from(["inner", "euclidean"])


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tiny_model(**options):
    return CodebookTransformer(6, 7, **({"num_codes": 32} | options))


def layer_and_input(seed=0, dtype=torch.float64, tokens=20, **options):
    torch.manual_seed(seed)
    options = {"dim": 12, "num_codes": 9, "k": 2, "groups": 3} | options
    layer = CodebookLayer(**options).to(dtype)
    return layer, normal(tokens, options["dim"], seed=seed + 1, dtype=dtype)


# --- snapping


@given(seeds, similarities, st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None)
def test_snap_takes_the_k_best_codes_by_definition(seed, similarity, k, groups):
    codes = normal(groups, 7, 5, seed=seed, dtype=torch.float64)
    z = normal(2, 3, groups * 5, seed=seed + 1, dtype=torch.float64)
    q, ids = snap(z, codes, k, similarity)
    chunks = z.view(2, 3, groups, 1, 5)
    if similarity == "inner":
        scores = (chunks * codes).sum(-1) / codes.norm(dim=-1)
    else:
        scores = -(chunks - codes).norm(dim=-1)
    assert torch.equal(ids, scores.topk(k, dim=-1).indices)
    chosen = codes[torch.arange(groups).view(-1, 1), ids]  # (2, 3, groups, k, 5)
    assert torch.allclose(q, chosen.mean(-2).flatten(-2))


@given(seeds, st.sampled_from([(), (4,), (2, 3), (2, 3, 4)]), st.integers(1, 3))
@settings(deadline=None)
def test_snap_allows_any_leading_dimensions(seed, batch, k):
    q, ids = snap(normal(*batch, 6, seed=seed), normal(8, 6, seed=seed), k)
    assert q.shape == (*batch, 6) and ids.shape == (*batch, k)


@given(seeds, similarities)
@settings(deadline=None)
def test_snapping_twice_is_snapping_once_for_codes_of_equal_norm(seed, similarity):
    codes = F.normalize(normal(12, 5, seed=seed, dtype=torch.float64), dim=-1)
    q, ids = snap(normal(30, 5, seed=seed + 1, dtype=torch.float64), codes, 1, similarity)
    again, same_ids = snap(q, codes, 1, similarity)
    assert torch.equal(q, again) and torch.equal(ids, same_ids)


@given(seeds, st.floats(0.01, 100), st.integers(0, 11))
@settings(deadline=None)
def test_length_of_a_code_changes_the_output_but_not_the_choice(seed, factor, which):
    codes = normal(12, 5, seed=seed, dtype=torch.float64)
    scaled = codes.clone()
    scaled[which] *= factor
    z = normal(40, 5, seed=seed + 1, dtype=torch.float64)
    (q, ids), (new_q, new_ids) = snap(z, codes), snap(z, scaled)
    assert torch.equal(ids, new_ids)
    hit = ids.squeeze(-1) == which
    assert torch.allclose(new_q[hit], factor * q[hit])
    assert torch.equal(new_q[~hit], q[~hit])


def test_length_of_a_code_matters_to_the_euclidean_choice():
    z, codes = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.1], [0.0, 1.0]])
    assert snap(z, codes, 1, "euclidean")[1].item() == 0
    assert snap(z, codes * torch.tensor([[100.0], [1.0]]), 1, "euclidean")[1].item() == 1
    assert snap(z, codes * torch.tensor([[100.0], [1.0]]), 1, "inner")[1].item() == 0


def test_a_code_of_length_zero_is_never_chosen_by_the_inner_product():
    codes = -torch.eye(3)
    codes[1] = 0
    z = torch.ones(4, 3)  # every other code scores below zero
    assert (snap(z, codes, 2)[1] != 1).all()
    assert snap(z, codes, 1)[0].isfinite().all()
    assert (snap(z, codes, 1, "euclidean")[1] == 1).all()


@given(seeds, st.integers(1, 3), st.sampled_from([5, 50, 8 * 37, 2 * 8 * 37]))
@settings(deadline=None, max_examples=25)
def test_pieces_of_tokens_and_groups_change_nothing(seed, k, limit):
    z, codes = normal(37, 12, seed=seed), normal(4, 8, 3, seed=seed)
    whole, before = snap(z, codes, k), dict(module.MAX_SCORES)
    module.MAX_SCORES["cpu"] = limit
    try:
        parts = snap(z, codes, k)
    finally:
        module.MAX_SCORES.update(before)
    assert torch.equal(whole[1], parts[1]) and torch.equal(whole[0], parts[0])


@given(seeds, similarities, st.integers(1, 3))
@settings(deadline=None, max_examples=25)
def test_one_token_at_a_time_is_all_at_once(seed, similarity, k):
    z = normal(9, 6, seed=seed, dtype=torch.float64)  # one token: scores are divided, not codes
    codes = normal(2, 8, 3, seed=seed + 1, dtype=torch.float64)
    q, ids = snap(z, codes, k, similarity)
    for token in range(9):
        alone, its_ids = snap(z[token], codes, k, similarity)
        assert torch.equal(alone, q[token]) and torch.equal(its_ids, ids[token])


def test_snap_differentiates_in_the_codes_alone():
    z, codes = normal(10, 4, dtype=torch.float64), normal(6, 4, seed=1, dtype=torch.float64)
    for k in (1, 3):
        assert torch.autograd.gradcheck(lambda c, k=k: snap(z, c, k)[0], codes.requires_grad_())
        assert not snap(z.requires_grad_(), codes.detach(), k)[0].requires_grad


# --- straight through


def test_straight_through_is_q_with_the_gradient_of_z():
    z, q = (normal(5, 3, seed=s).requires_grad_() for s in (0, 1))
    out = straight_through(z, q)
    upstream = normal(5, 3, seed=2)
    out.backward(upstream)
    assert torch.equal(out, q)
    assert torch.equal(z.grad, upstream) and torch.equal(q.grad, upstream)


def gradients(layer, x, upstream, with_recon=True):
    """Gradients at z (identity layer norm) and at the codes."""
    z = layer.normalise(x).detach().requires_grad_()
    layer.normalise = lambda _: z
    out = layer(x)
    layer.zero_grad()
    total = (out * upstream).sum()
    (total + layer.recon_loss if with_recon else total).backward()
    del layer.normalise
    return z, z.grad, layer.codes.grad


@given(seeds, st.sampled_from(["base", "aeloss", "vqvae", "fullaeloss"]), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_gradients_of_every_loss_are_the_formulas(seed, loss, k):
    layer, x = layer_and_input(seed, loss=loss, k=k, beta=0.4)
    upstream = normal(20, 12, seed=seed + 2, dtype=torch.float64)
    z, grad_z, grad_codes = gradients(layer, x, upstream)
    upstream = upstream.view(20, 3, 4)
    q = layer.combine(layer.last_ids).detach()
    pull = 2 * 0.4 * (z - q) if loss in ("vqvae", "fullaeloss") else 0
    assert torch.allclose(grad_z, upstream + pull)
    to_rows = (0 if loss == "vqvae" else upstream) + (0 if loss == "base" else 2 * (q - z) / 20)
    expected = torch.zeros_like(layer.codes)
    for token, group, slot in itertools.product(range(20), range(3), range(k)):
        expected[group, layer.last_ids[token, group, slot]] += to_rows[token, group] / k
    assert torch.allclose(grad_codes, expected)


def test_codes_that_are_not_chosen_get_exactly_no_gradient():
    layer, x = layer_and_input(tokens=3)
    (layer(x).sum() + layer.recon_loss).backward()
    chosen = torch.zeros(3, 9, dtype=torch.bool)
    chosen.scatter_(1, layer.last_ids.transpose(0, 1).flatten(1), True)
    assert not layer.codes.grad[~chosen].any() and layer.codes.grad[chosen].any(1).all()


@pytest.mark.parametrize("similarity", ["inner", "euclidean"])
@pytest.mark.parametrize("k", [1, 2])
def test_reconstruction_gradient_equals_finite_differences(k, similarity):
    layer, x = layer_and_input(k=k, similarity=similarity)

    def recon(codes):
        return torch.func.functional_call(_Recon(layer), {"layer.codes": codes}, (x,))

    assert torch.autograd.gradcheck(recon, layer.codes.detach().clone().requires_grad_())


class _Recon(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        self.layer(x)
        return self.layer.recon_loss


def test_reconstruction_loss_is_a_mean_over_tokens_and_a_sum_over_groups():
    layer, x = layer_and_input()
    q = layer(x).detach()
    z = layer.normalise(x).flatten(-2)
    assert torch.allclose(layer.recon_loss, (q - z).square().sum(-1).mean())
    layer(x.view(4, 5, 12))
    assert torch.allclose(layer.recon_loss, (q - z).square().sum(-1).mean())


def test_gradient_reaches_the_input_through_the_layer_norm():
    layer, x = layer_and_input(groups=1, k=1)
    x.requires_grad_()
    upstream = normal(20, 12, seed=9, dtype=torch.float64)
    layer(x).backward(upstream)
    expected = x.grad.clone()
    x.grad = None
    F.layer_norm(x, (12,)).backward(upstream)
    assert torch.allclose(expected, x.grad)


# --- the layer


@given(seeds, st.integers(1, 3))
@settings(deadline=None)
def test_output_rows_are_rows_of_codes_bit_for_bit(seed, groups):
    layer, x = layer_and_input(seed, torch.float32, k=1, groups=groups)
    for mode in (True, False):
        out = layer.train(mode)(x).view(20, groups, -1)
        for group in range(groups):
            assert torch.equal(out[:, group], layer.codes[group, layer.last_ids[:, group, 0]])


@given(seeds, st.floats(0.5, 100), st.floats(-50, 50))
@settings(deadline=None)
def test_scale_and_offset_of_the_input_change_nothing(seed, scale, offset):
    layer, x = layer_and_input(seed, groups=1, dim=12)
    layer(x)
    scores = layer.normalise(x) @ F.normalize(layer.codes[0], dim=-1).T
    best = scores.squeeze(1).topk(layer.k + 1).values
    clear = (best[:, :-1] - best[:, 1:]).min(1).values > 1e-3  # the layer norm's eps is not 0
    ids = layer.last_ids
    layer(scale * x + offset)
    assert torch.equal(ids[clear], layer.last_ids[clear])


@given(seeds, similarities, st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_a_grouped_layer_is_separate_layers_side_by_side(seed, similarity, k):
    grouped, x = layer_and_input(seed, similarity=similarity, k=k)
    with torch.no_grad():
        grouped.norm_weight.copy_(normal(3, 4, seed=seed + 3))
        grouped.norm_bias.copy_(normal(3, 4, seed=seed + 4))
    outs, ids, recon = [], [], 0
    for group, chunk in enumerate(x.chunk(3, dim=-1)):
        alone = CodebookLayer(4, 9, k, similarity=similarity).double()
        state = {n: v[group : group + 1] for n, v in grouped.state_dict().items()}
        alone.load_state_dict(state)
        outs.append(alone(chunk))
        ids.append(alone.last_ids)
        recon = recon + alone.recon_loss
    assert torch.allclose(grouped(x), torch.cat(outs, -1))
    assert torch.equal(grouped.last_ids, torch.cat(ids, -2))
    assert torch.allclose(grouped.recon_loss, recon)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3), (2, 3, 4), (0,)])
def test_shapes_of_output_and_ids(batch):
    layer = CodebookLayer(12, 9, k=2, groups=3)
    assert layer(normal(*batch, 12)).shape == (*batch, 12)
    assert layer.last_ids.shape == (*batch, 3, 2)
    assert layer.recon_loss.shape == () and layer.recon_loss.isfinite()


def test_a_disabled_layer_is_the_identity():
    layer, x = layer_and_input()
    layer(x)
    layer.enabled = False
    assert layer(x) is x and layer.last_ids is None and layer.recon_loss == 0


def test_without_reconstruction_loss_there_is_none():
    layer, x = layer_and_input(loss="base")
    layer(x)
    assert layer.recon_loss == 0


def test_counts_grow_in_training_only():
    layer, x = layer_and_input()
    layer.eval()(x)
    assert not layer.counts.any()
    layer.train()(x)
    layer(x)
    expected = torch.stack([layer.last_ids[:, g].flatten().bincount(minlength=9) for g in range(3)])
    assert torch.equal(layer.counts, 2 * expected)


def test_state_of_a_token_in_bits():
    assert CodebookLayer(128, 1000).bits == 10  # against 32 · 128 = 4096
    assert CodebookLayer(128, 1000, k=8, groups=4).bits == 4 * 8 * 10
    assert CodebookLayer(8, 128).bits == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 10, "groups": 3}, "dim must be divisible by groups"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"k": 0}, "k must be in 1..9, got 0"),
        ({"k": 10}, "k must be in 1..9, got 10"),
        ({"num_codes": 0}, "num_codes must be at least 1"),
        ({"similarity": "cosine"}, "similarity must be one of"),
        ({"loss": "mse"}, "loss must be one of"),
    ],
)
def test_layer_says_what_is_wrong(plain_python, options, message):
    with pytest.raises(ValueError, match=message):
        CodebookLayer(**({"dim": 12, "num_codes": 9} | options))


def test_layer_and_snap_name_the_expected_width(plain_python):
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 12\)"):
        CodebookLayer(12, 9)(torch.zeros(2, 11))
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 12\)"):
        CodebookLayer(12, 9)(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"z must be \(\.\.\., 6\)"):
        snap(torch.zeros(2, 5), torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"k must be in 1..4"):
        snap(torch.zeros(2, 6), torch.ones(4, 6), k=5)
    with pytest.raises(ValueError, match="codes must be"):
        snap(torch.zeros(2, 6), torch.ones(6))
    with pytest.raises(ValueError, match="similarity must be one of"):
        snap(torch.zeros(2, 6), torch.ones(4, 6), 1, "dot")


def test_state_dict_round_trip():
    layer, x = layer_and_input()
    layer(x)
    other = CodebookLayer(12, 9, 2, 3).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.counts, layer.counts)
    assert torch.equal(other(x), layer(x))


def test_a_used_layer_can_be_copied_and_pickled():
    layer, x = layer_and_input()
    out = layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.last_ids is None and torch.equal(clone(x), out)
    layer.disable_codes([0, 1])
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_codes_that_change_are_used_at_once():
    layer, x = layer_and_input()
    layer.eval().requires_grad_(False)
    layer(x)
    layer.codes.data.neg_()
    assert torch.equal(layer(x), snap(layer.normalise(x).flatten(-2), layer.codes, 2)[0])


@pytest.mark.parametrize("k", [1, 2])
def test_works_under_autocast(k):
    layer = CodebookLayer(12, 9, k=k, groups=3)
    linear = torch.nn.Linear(12, 12)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(linear(normal(20, 12)))
        loss = out.float().sum() + layer.recon_loss
    loss.backward()
    assert out.isfinite().all() and linear.weight.grad.isfinite().all()
    assert layer.codes.grad.any()


def test_works_in_bfloat16_and_float64():
    for dtype in (torch.bfloat16, torch.float64):
        layer = CodebookLayer(12, 9, k=2, groups=3).to(dtype)
        out = layer(normal(20, 12).to(dtype))
        out.sum().backward()
        assert out.dtype == dtype and layer.codes.grad.dtype == dtype


@pytest.mark.parametrize("options", [{}, {"k": 2, "groups": 3}, {"similarity": "euclidean"}])
def test_compiles_without_graph_breaks(plain_python, options):
    torch.compiler.reset()
    layer, x = layer_and_input(dtype=torch.float32, **({"k": 1, "groups": 1} | options))
    compiled = torch.compile(copy.deepcopy(layer), backend="aot_eager", fullgraph=True)
    for mode in (True, False):
        layer.train(mode), compiled.train(mode)
        assert torch.equal(layer(x), compiled(x))
        assert torch.equal(layer.last_ids, compiled.last_ids)
    layer.train()(x).sum().backward()
    compiled.train()(x).sum().backward()
    assert torch.allclose(layer.codes.grad, compiled.codes.grad)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), compiled.eval()(x))
    assert torch.equal(layer.counts, compiled.counts)


def test_the_transformer_compiles_without_graph_breaks(plain_python):
    torch.compiler.reset()
    model, tokens, graphs = tiny_model(), torch.randint(0, 6, (3, 7)), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(copy.deepcopy(model), backend=backend, fullgraph=True)
    for _ in range(3):
        assert torch.allclose(model(tokens), compiled(tokens), atol=1e-6)
        assert torch.allclose(model.recon_loss(), compiled.recon_loss())
    assert len(graphs) == 1  # compiled once, not at every step


# --- dead codes


@given(seeds, st.integers(9, 40))
@settings(deadline=None, max_examples=25)
def test_init_from_samples_inputs_without_replacement(seed, tokens):
    layer, x = layer_and_input(seed, tokens=tokens)
    layer(x)
    layer.init_from(x, torch.Generator().manual_seed(seed))
    z = layer.normalise(x)
    for group in range(3):
        same = (layer.codes[group].unsqueeze(1) == z[:, group]).all(-1)  # (codes, tokens)
        assert (same.sum(1) == 1).all() and (same.sum(0) <= 1).all()
    assert not layer.counts.any()


def test_init_from_few_inputs_uses_each_before_repeating():
    layer, x = layer_and_input(tokens=4)
    layer.init_from(x)
    assert all(len(codes.unique(dim=0)) == 4 for codes in layer.codes)


def test_a_code_for_each_input_reconstructs_exactly():
    layer, x = layer_and_input(k=1, tokens=9)
    layer.init_from(x)
    assert torch.allclose(layer(x), layer.normalise(x).flatten(-2))
    assert layer.recon_loss < 1e-20


def test_replace_dead_touches_only_codes_that_were_not_used():
    layer, x = layer_and_input(k=1, tokens=4)
    layer(x)
    used, before = layer.counts > 0, layer.codes.detach().clone()
    replaced = layer.replace_dead(x, generator=torch.Generator().manual_seed(0))
    assert replaced == (~used).sum() > 0
    assert torch.equal(layer.codes[used], before[used])
    z = layer.normalise(x)
    for group in range(3):
        for code in layer.codes[group][~used[group]]:
            assert (code == z[:, group]).all(-1).any()
    assert not layer.counts.any()


def test_noise_of_replaced_codes_scales_with_their_length():
    layer, x = layer_and_input(dim=400, groups=1, num_codes=50, k=1, tokens=50)
    exact, noisy = copy.deepcopy(layer), copy.deepcopy(layer)
    exact.replace_dead(x, generator=torch.Generator().manual_seed(0))
    noisy.replace_dead(x, 0.1, torch.Generator().manual_seed(0))
    length = exact.codes[0].norm(dim=-1)
    deviation = (noisy.codes - exact.codes)[0].std(-1) / length
    assert torch.allclose(deviation, torch.full_like(deviation, 0.1), rtol=0.25)


def test_seeding_is_repeatable_and_needs_inputs():
    layer, x = layer_and_input()
    twin = copy.deepcopy(layer)
    layer.init_from(x, torch.Generator().manual_seed(3))
    twin.init_from(x, torch.Generator().manual_seed(3))
    assert torch.equal(layer.codes, twin.codes)
    with pytest.raises(ValueError, match="at least one vector"):
        layer.init_from(x[:0])


def test_a_k_means_start_reconstructs_better_than_samples():
    layer, x = layer_and_input(k=1, tokens=400, num_codes=9)
    losses = []
    for kmeans in (False, True):
        layer.init_from(x, torch.Generator().manual_seed(0), kmeans)
        layer.eval()(x)
        losses.append(layer.recon_loss.item())
    assert losses[1] < 0.95 * losses[0]


def test_dead_codes_are_replaced_after_n_training_calls():
    layer, x = layer_and_input(k=1, tokens=4, replace_after=3)
    start = layer.codes.detach().clone()
    for _ in range(3):
        layer(x)
    assert torch.equal(layer.codes, start)
    used = layer.counts > 0
    layer.eval()(x)
    assert torch.equal(layer.codes, start)  # evaluation neither counts nor replaces
    layer.train()(x)
    assert torch.equal(layer.codes[used], start[used])
    moved = (layer.codes != start).any(-1)
    assert torch.equal(moved, ~used)
    assert layer.counts.sum() == 4 * 3  # counted afresh since then
    layer(x).sum().backward()  # replacing in place disturbs no gradient
    with pytest.raises(ValueError, match="replace_after must be at least 1"):
        CodebookLayer(4, 4, replace_after=-1)


@pytest.mark.parametrize("batch", [(5,), (2, 3)])
def test_heads_may_have_a_dimension_of_their_own(batch):
    layer, _ = layer_and_input()
    x = normal(*batch, 12, dtype=torch.float64)
    flat = layer(x)
    ids, loss = layer.last_ids, layer.recon_loss
    heads = layer(x.unflatten(-1, (3, 4)))
    assert torch.equal(heads.flatten(-2), flat)
    assert torch.equal(layer.last_ids, ids) and torch.equal(layer.recon_loss, loss)
    layer.init_from(x.unflatten(-1, (3, 4)), kmeans=True)


# --- interventions


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_the_identity_intervention_changes_nothing(k, training):
    layer, x = layer_and_input(k=k, dtype=torch.float32)
    layer.train(training)
    plain = layer(x)
    with layer.intervene(lambda ids: ids):
        assert torch.equal(layer(x), plain)


@pytest.mark.parametrize("training", [True, False])
def test_an_override_is_exact_in_both_modes(training):
    layer, x = layer_and_input(k=1)
    layer.train(training)
    with layer.intervene(torch.zeros_like):
        out = layer(x)
        assert not layer.last_ids.any()
    assert torch.equal(out, layer.codes[:, 0].flatten().expand(20, 12))
    assert layer(x).unique(dim=0).shape[0] > 1  # it ends with the block


def test_no_code_adds_nothing_but_still_divides_by_k():
    layer, x = layer_and_input(k=2)

    def keep_first(ids):
        ids[..., 1] = -1
        return ids

    with layer.intervene(keep_first):
        out = layer(x)
        assert (layer.last_ids[..., 1] == -1).all()
    first = layer.codes[torch.arange(3), layer.last_ids[..., 0]]
    assert torch.allclose(out, first.flatten(-2) / 2)
    layer.reset()
    with layer.intervene(lambda ids: torch.full_like(ids, -1)):
        assert not layer(x).any()
    assert not layer.counts.any()  # nothing was used


def test_interventions_nest_in_order():
    layer, x = layer_and_input(k=1)
    with layer.intervene(torch.zeros_like), layer.intervene(lambda ids: ids + 2):
        layer(x)
        assert (layer.last_ids == 2).all()
    with pytest.raises(RuntimeError, match="inside"), layer.intervene(torch.zeros_like):
        raise RuntimeError("inside")
    layer(x)
    assert layer.last_ids.any()  # an error ends the block too


@pytest.mark.parametrize(
    "change",
    [
        lambda ids: ids[..., :1],
        lambda ids: ids + 100,
        lambda ids: ids - 100,
        lambda ids: ids.float(),
        lambda ids: None,
    ],
)
def test_bad_interventions_are_refused(plain_python, change):
    layer, x = layer_and_input()
    with layer.intervene(change), pytest.raises(ValueError, match="an intervention must return"):
        layer(x)


@given(seeds, similarities)
@settings(deadline=None, max_examples=25)
def test_disabling_the_best_code_selects_the_second(seed, similarity):
    layer, x = layer_and_input(seed, k=1, groups=1, similarity=similarity, tokens=1)
    pair, _ = snap(layer.normalise(x).flatten(-2), layer.codes, 2, similarity), layer(x)
    first, second = pair[1].flatten().tolist()
    assert layer.last_ids.item() == first
    layer.disable_codes([first])
    layer(x)
    assert layer.last_ids.item() == second
    layer.reset()
    layer(x)
    assert layer.last_ids.item() == first


@given(seeds, st.sets(st.integers(0, 8), max_size=7))
@settings(deadline=None, max_examples=25)
def test_disabled_codes_are_never_returned(seed, forbidden):
    layer, x = layer_and_input(seed)
    layer.disable_codes(sorted(forbidden), group=1)
    layer(x)
    assert not forbidden & set(layer.last_ids[:, 1].flatten().tolist())
    free = CodebookLayer(12, 9, 2, 3).double()
    free.load_state_dict(layer.state_dict())
    free(x)
    assert torch.equal(free.last_ids[:, [0, 2]], layer.last_ids[:, [0, 2]])


def test_disabling_adds_up_and_leaves_k_codes(plain_python):
    layer, x = layer_and_input()
    layer.disable_codes(0)
    layer.disable_codes([1, 2, 3, 4])
    with pytest.raises(ValueError, match="at least k=2 codes must stay enabled, got 1"):
        layer.disable_codes([5, 6, 7])
    layer.disable_codes([5, 6])  # the refused call left nothing behind
    layer(x)
    assert set(layer.last_ids.flatten().tolist()) == {7, 8}
    layer.reset()
    layer.codes.data[2, :6] = 0  # codes of length zero are never chosen: they do not count
    with pytest.raises(ValueError, match="at least k=2 codes must stay enabled, got 1"):
        layer.disable_codes([7, 8])
    with pytest.raises(ValueError, match=r"ids must be in 0..8"):
        layer.disable_codes([9])
    with pytest.raises(ValueError, match=r"group must be in 0\.\.2"):
        layer.disable_codes([1], group=3)


def test_reset_forgets_everything():
    layer, x = layer_and_input()
    plain = layer(x)
    layer.disable_codes([0])
    with layer.intervene(torch.zeros_like):
        layer(x)
        layer.reset()
        assert torch.equal(layer(x), plain)
    layer.reset()
    assert not layer.counts.any() and not layer.disabled.any()


# --- the transformer


def test_the_transformer_is_causal():
    model = tiny_model().eval()
    tokens = torch.randint(0, 6, (2, 7))
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 6
    with torch.no_grad():
        assert torch.allclose(model(tokens)[:, :4], model(changed)[:, :4], atol=1e-6)
        assert not torch.allclose(model(tokens)[:, 4:], model(changed)[:, 4:])


def test_codebooks_have_names_groups_and_places():
    books = tiny_model(layers=3, heads=4, k=2).codebooks()
    assert list(books) == ["attn0", "mlp0", "attn1", "mlp1", "attn2", "mlp2"]
    assert [books[name].groups for name in ("attn0", "mlp0")] == [4, 1]
    assert all(layer.k == 2 and layer.num_codes == 32 for layer in books.values())
    assert recon_loss(torch.nn.Linear(2, 2)) == 0


def test_the_codebook_sits_before_the_output_projection():
    model, seen = tiny_model(), {}
    block = model.blocks[0]
    block.project.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    model(torch.randint(0, 6, (2, 7)))
    book = block.project.input_codebook
    heads = [book.codes[h, book.last_ids[..., h, 0]] for h in range(2)]
    assert torch.equal(seen["x"], torch.cat(heads, -1))


def test_recon_loss_sums_the_layers():
    model = tiny_model()
    model(torch.randint(0, 6, (2, 7)))
    total = sum(layer.recon_loss for layer in model.codebooks().values())
    assert torch.allclose(model.recon_loss(), total)


def test_the_first_mlp_sees_the_token_alone():
    model = tiny_model().eval()
    model(torch.tensor([[5, 0, 1, 2], [5, 3, 4, 2]]))
    ids = model.codebooks()["mlp0"].last_ids
    assert torch.equal(ids[0, -1], ids[1, -1])


def test_one_step_of_training_moves_every_part():
    model, tokens = tiny_model(), torch.randint(0, 6, (16, 7))
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    (loss + model.recon_loss()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "dim must be divisible by heads"),
        ({"k": 33}, "k must be in 1..32"),
    ],
)
def test_transformer_says_what_is_wrong(plain_python, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**options)


def test_transformer_refuses_long_sequences(plain_python):
    with pytest.raises(ValueError, match="at most max_len=7 long, got 8"):
        tiny_model()(torch.zeros(1, 8, dtype=torch.long))


@pytest.mark.parametrize("kmeans", [False, True])
def test_init_codebooks_takes_what_arrives_front_to_back(kmeans):
    model, tokens, seen = tiny_model(num_codes=14), torch.randint(0, 6, (2, 7)), {}
    books = model.codebooks()
    books["mlp1"].enabled = False
    init_codebooks(model, tokens, generator=torch.Generator().manual_seed(0), kmeans=kmeans)
    book = books["mlp1"]
    book.register_forward_pre_hook(lambda layer, args: seen.update(z=layer.normalise(args[0])))
    with evaluating(model):
        model(tokens)
    nearest = torch.cdist(book.codes[0], seen["z"].view(14, 16)).min(1).values
    assert (nearest < 1e-4).all()  # as many codes as vectors: samples and centres are vectors
    assert model.training and all(layer.enabled for layer in books.values())
    assert [len(layer._forward_pre_hooks) for layer in books.values()] == [0, 0, 0, 1]


# --- around any network


class Block(torch.nn.Module):
    """Laid out as a block of GPT-NeoX: attention gives a tuple, the MLP a tensor."""

    class Attention(torch.nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.query_key_value = torch.nn.Linear(dim, 3 * dim)
            self.dense = torch.nn.Linear(dim, dim)

        def forward(self, x):
            return self.dense(self.query_key_value(x).chunk(3, -1)[2]), None

    def __init__(self, dim):
        super().__init__()
        self.attention = self.Attention(dim)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(dim, 8), torch.nn.GELU(), torch.nn.Linear(8, dim)
        )

    def forward(self, x):
        return x + self.attention(x)[0] + self.mlp(x)


def stand_in(dim=12, layers=2, places=True):
    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_in = torch.nn.Embedding(7, dim)
            self.layers = torch.nn.ModuleList(Block(dim) for _ in range(layers))

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gpt_neox, self.embed_out = Body(), torch.nn.Linear(dim, 7)

        def forward(self, tokens):
            x = self.gpt_neox.embed_in(tokens)
            for layer in self.gpt_neox.layers:
                x = layer(x)
            return self.embed_out(x)

    model = Model()
    if places:
        heads = "gpt_neox.layers.*.attention.dense"
        add_codebooks(model, heads, dim=dim, num_codes=9, where="input", groups=3, k=2)
        add_codebooks(model, "gpt_neox.layers.*.mlp", dim=dim, num_codes=9)
    return model


def test_codebooks_are_found_added_and_trained():
    model, tokens = stand_in(), torch.randint(0, 7, (4, 5))
    books = find_codebooks(model)
    assert len(books) == 4 and "gpt_neox.layers.1.attention.dense.input_codebook" in books
    init_codebooks(model, tokens, kmeans=True)
    (model(tokens).square().mean() + recon_loss(model)).backward()
    assert all(layer.codes.grad.any() for layer in books.values())
    names = dict(model.named_parameters())
    assert all(f"{name}.codes" in names for name in books)


def test_each_codebook_acts_once_at_its_place():
    model, tokens = stand_in(layers=1), torch.randint(0, 7, (4, 5))
    block = model.gpt_neox.layers[0]
    with evaluating(model):
        x = model.gpt_neox.embed_in(tokens)
        value = block.attention.query_key_value(x).chunk(3, -1)[2]
        dense, mlp = block.attention.dense, block.mlp
        heads = F.linear(dense.input_codebook(value), dense.weight, dense.bias)
        inside = mlp[2](mlp[1](mlp[0](x)))
        wanted = model.embed_out(x + heads + mlp.output_codebook(inside))
        assert torch.allclose(model(tokens), wanted, atol=1e-6)
    for layer in find_codebooks(model).values():
        layer.reset()
    model(tokens)
    for layer in find_codebooks(model).values():  # a codebook that acts twice counts twice
        assert layer.counts.sum() == tokens.numel() * layer.groups * layer.k


def test_switched_off_codebooks_leave_the_network_as_it_was():
    torch.manual_seed(0)
    plain = stand_in(places=False)
    model, tokens = copy.deepcopy(plain), torch.randint(0, 7, (4, 5))
    added = add_codebooks(model, ["gpt_neox.layers.*.attention", "embed_out"], dim=12, num_codes=9)
    for layer in added.values():
        layer.enabled = False
    assert torch.equal(model(tokens), plain(tokens))
    layer.enabled = True  # at embed_out, whose width is 7
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 12\)"):
        model(tokens)


def test_a_copy_has_codebooks_of_its_own():
    model, tokens = stand_in(), torch.randint(0, 7, (4, 5))
    twin = pickle.loads(pickle.dumps(tiny_model())) and copy.deepcopy(model)
    assert torch.equal(model(tokens), twin(tokens))
    for layer in find_codebooks(twin).values():
        layer.codes.data.neg_()
    assert not torch.equal(model(tokens), twin(tokens))


def test_codes_of_a_wrapped_network_are_swapped():
    model = stand_in().eval()
    source, target = torch.randint(0, 7, (2, 3, 5))
    name = "gpt_neox.layers.1.mlp.output_codebook"
    swap_codes(model, source, target, name, position=2)
    after = find_codebooks(model)[name].last_ids
    model(target)
    assert torch.equal(after[:, 2], find_codebooks(model)[name].last_ids[:, 2])


def test_an_output_with_logits_is_read_as_hugging_face_models_give_it():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    model, (source, target) = stand_in().eval(), torch.randint(0, 7, (2, 3, 5))
    name = "gpt_neox.layers.1.mlp.output_codebook"
    plain = swap_codes(model, source, target, name)
    model.register_forward_hook(lambda _, args, logits: Output(logits))
    assert torch.equal(swap_codes(model, source, target, name), plain)


def test_adding_says_what_is_wrong(plain_python):
    model, options = stand_in(), {"dim": 12, "num_codes": 9}
    with pytest.raises(ValueError, match="names must be those of submodules, got 'mlp'"):
        add_codebooks(model, "mlp", **options)
    with pytest.raises(ValueError, match="places without output_codebook"):
        add_codebooks(model, "gpt_neox.layers.0.mlp", **options)
    with pytest.raises(ValueError, match="where must be one of"):
        add_codebooks(model, "embed_out", where="middle", **options)
    with pytest.raises(ValueError, match="names must be the first part of"):
        add_codebooks(model, "gpt_neox.layers.0.mlp", where="input", **options)


def released(model):
    """The state dict that the authors' package would save for this network."""
    state = {}
    for name, value in model.state_dict().items():
        if "_codebook." not in name:
            name = name.replace(".mlp.", ".mlp.module_layer.")
            state[f"model.{name}"] = value
    for name, layer in find_codebooks(model).items():
        place = name.replace(".dense.input_codebook", "").replace(".output_codebook", "")
        for group in range(layer.groups):
            part = f"model.{place}.codebook_layer"
            part += f".codebook.{group}" if layer.groups > 1 else ""
            state[f"{part}.codebook.weight"] = layer.codes[group].detach()
            state[f"{part}.ln.weight"] = layer.norm_weight[group].detach()
            state[f"{part}.ln.bias"] = layer.norm_bias[group].detach()
    return state


def test_a_released_checkpoint_is_read():
    model, tokens = stand_in(), torch.randint(0, 7, (4, 5))
    for layer in find_codebooks(model).values():
        layer.norm_bias.data.normal_()
    state = released(model) | {"model.gpt_neox.layers.0.attention.bias": torch.ones(1)}
    other = stand_in()
    assert not torch.equal(other(tokens), model(tokens))
    assert load_release(other, state) == ["gpt_neox.layers.0.attention.bias"]
    assert torch.equal(other(tokens), model(tokens))


def test_a_release_of_many_heads_is_read_in_the_order_of_their_numbers():
    model, place = stand_in(24, 1, places=False), "gpt_neox.layers.0.attention.dense"
    other = copy.deepcopy(model)
    books = [
        add_codebooks(m, place, dim=24, num_codes=5, where="input", groups=12)
        for m in (model, other)
    ]
    load_release(other, released(model))  # as text, head 10 comes before head 2
    (ours,), (theirs,) = (found.values() for found in books)
    assert torch.equal(theirs.codes, ours.codes)


def test_a_release_that_does_not_fit_is_refused(plain_python):
    model = stand_in()
    state = released(model)
    some = {n: v for n, v in state.items() if "layers.1.mlp.codebook_layer" not in n}
    with pytest.raises(ValueError, match=r"lacks 3 weights, such as gpt_neox\.layers\.1\.mlp"):
        load_release(stand_in(), some)
    with pytest.raises(ValueError, match="state lacks 2 weights, such as embed_out"):
        load_release(stand_in(), {n: v for n, v in state.items() if "embed_out" not in n})
    with pytest.raises(ValueError, match=r"has in excess .*codebook_layer"):
        load_release(stand_in(places=False), state)
    name = "model.gpt_neox.layers.0.mlp.codebook_layer.codebook.weight"
    with pytest.raises(ValueError, match=r"mlp.output_codebook.codes must be \(1, 9, 12\), got"):
        load_release(stand_in(), state | {name: torch.zeros(10, 12)})


# --- against the authors' code


def reference_layer(case):
    options = {key: case.settings[key] for key in ("k", "groups", "similarity", "loss")}
    options |= {"beta": case.settings["beta"]} if "beta" in case.settings else {}
    given = case.tensors
    groups, n, width = given["codes"].shape
    layer = CodebookLayer(groups * width, n, **options).double()
    for name in ("codes", "norm_weight", "norm_bias"):
        getattr(layer, name).data = given[name].clone()
    return layer


def with_gradients(case):
    layer, x = reference_layer(case), case.tensors["x"].clone().requires_grad_()
    out = layer(x)
    ((out * case.tensors["weight"]).sum() + layer.recon_loss).backward()
    found = {"output": out, "ids": layer.last_ids, "gradient w.r.t. x": x.grad}
    for name, part in (("the codes", "codes"), ("norm_weight", "norm_weight")):
        found[f"gradient w.r.t. {name}"] = getattr(layer, part).grad
    return found | {"gradient w.r.t. norm_bias": layer.norm_bias.grad}


def after_training(case):
    layer, settings_ = reference_layer(case), case.settings
    x, target = case.tensors["x"], case.tensors["target"]
    descent = torch.optim.AdamW(layer.parameters(), lr=settings_["lr"], weight_decay=0.01)
    losses = []
    for _ in range(settings_["steps"]):
        task = (layer(x) - target).square().mean()
        descent.zero_grad()
        (task + layer.recon_loss).backward()
        descent.step()
        losses.append(task.detach())
    layer.eval()
    found = {
        "task losses": torch.stack(losses),
        "codes afterwards": layer.codes,
        "norm_weight afterwards": layer.norm_weight,
    }

    def look(name):
        found[f"output{name}"], found[f"ids{name}"] = layer(x), layer.last_ids

    look("")
    layer.disable_codes(settings_["disabled"])
    look(", codes disabled")
    layer.reset()
    bad = torch.tensor(settings_["disabled"])
    with layer.intervene(lambda ids: ids.masked_fill(torch.isin(ids, bad), -1)):
        look(", slots ablated")
    return found


RECOMPUTE = {
    "three codes of nine, aeloss": with_gradients,
    "three groups, two codes each, fullaeloss": with_gradients,
    "euclidean, one code, vqvae with beta 0.4, batch of one": with_gradients,
    "four steps of AdamW, then codes disabled and ablated": after_training,
}


@pytest.mark.parametrize("case", [*load_reference("codebook_features")], ids=lambda c: c.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))


# --- swapping codes


def test_overriding_everything_leaves_the_last_token_alone():
    model = tiny_model().eval()
    source, target = torch.tensor([[5, 0, 1, 2]]), torch.tensor([[5, 4, 3, 2]])
    names = list(model.codebooks())
    with torch.no_grad():
        wanted = model(target)[:, -1]
    assert torch.allclose(swap_codes(model, source, target, names), wanted, atol=1e-5)
    other_past = torch.tensor([[5, 3, 3, 2]])
    swapped = swap_codes(model, other_past, target, names)
    assert torch.allclose(swapped, wanted, atol=1e-5)
    other_last = torch.tensor([[5, 0, 1, 1]])
    assert not torch.allclose(swap_codes(model, other_last, target, names), wanted, atol=1e-5)


def test_swapping_nothing_or_oneself_changes_nothing():
    model = tiny_model()
    source, target = torch.randint(0, 6, (2, 4, 5))
    with evaluating(model):
        own = model(source)[:, -1]
    assert torch.equal(swap_codes(model, source, target, []), own)
    assert torch.equal(swap_codes(model, source, source, list(model.codebooks())), own)
    assert model.training


def test_swapping_acts_on_one_position_of_the_named_codebooks():
    model = tiny_model().eval()
    source, target = torch.randint(0, 6, (2, 3, 5))
    books = model.codebooks()
    model(source)
    before = books["mlp1"].last_ids
    model(target)
    codes = books["mlp1"].last_ids
    logits = swap_codes(model, source, target, "mlp1", position=2)
    after = books["mlp1"].last_ids
    assert torch.equal(after[:, 2], codes[:, 2])
    assert torch.equal(after[:, [0, 1, 3, 4]], before[:, [0, 1, 3, 4]])
    assert logits.shape == (3, 6)
    assert not any(layer._interventions for layer in books.values())


def test_swap_says_what_is_wrong(plain_python):
    model, tokens = tiny_model(), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"names must be one of .*got 'mlp9'; did you mean"):
        swap_codes(model, tokens, tokens, ["mlp9"])
    with pytest.raises(ValueError, match=r"target_tokens must be \(2, length\), got"):
        swap_codes(model, tokens, tokens[:1], ["mlp1"])
    model.codebooks()["mlp1"].enabled = False
    with pytest.raises(ValueError, match="codebooks that are enabled"):
        swap_codes(model, tokens, tokens, ["mlp1"])


# --- trained on the machine


def test_what_the_set_ups_hold_is_found_here_too():
    names = ["TokFSM", "first_transition_accuracy", "code_purity", "code_f1", "neuron_f1"]
    for name in [*names, "js_divergence"]:
        assert getattr(codebook_features, name) is getattr(token_machine, name)


def test_accuracy_leaves_the_model_in_its_mode():
    fsm = TokFSM(25, 3, 5)
    model = CodebookTransformer(fsm.vocab, 7)
    assert 0 <= first_transition_accuracy(model, fsm) <= 1
    assert model.training
    assert not any(layer.counts.any() for layer in model.codebooks().values())
