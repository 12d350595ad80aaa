"""Stochastic layer-wise shuffle: the wrapper, the selective scan below it, and the model."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.shuffles.layer_shuffle import (
    SHUFFLE_MAMBA_SIZES,
    BiMamba,
    DropPath,
    LayerShuffle,
    MambaBlock,
    ShuffleMamba,
    _released_names,
    inverse_permutation,
    layer_shuffle,
    load_released,
    sample_permutation,
    selective_scan,
    shuffle_probs,
)
from shuffle_nb.shuffles.selective_scan import resize_positions

PROBABILITIES = st.floats(0, 1, allow_nan=False)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_perm(tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(tokens, generator=seeded(seed))


def running_sum(x):
    return x.cumsum(1)


def small_model(**options) -> ShuffleMamba:
    settings = dict(img_size=8, patch_size=2, depth=3, dim=16, in_chans=1, num_classes=5, state=4)
    return ShuffleMamba(**(settings | options))


# ---------------------------------------------------------------- shuffle, run, restore


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 1000))
def test_unshuffle_of_shuffle_is_exact(tokens, seed):
    perm = random_perm(tokens, seed)
    inverse = inverse_permutation(perm)
    assert torch.equal(inverse, perm.argsort())
    x = torch.randn(2, tokens, 3)
    assert torch.equal(x[:, perm][:, inverse], x)
    assert torch.equal(layer_shuffle(x, lambda x: x, 1.0, True, perm=perm), x)


def test_the_worked_example():
    x = torch.arange(1.0, 5).reshape(1, 4, 1)
    perm = torch.tensor([2, 0, 3, 1])
    assert layer_shuffle(x, running_sum, 0.0, True, perm=perm).flatten().tolist() == [4, 10, 3, 8]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_layers_that_mind_no_order_do_not_notice(seed):
    x, perm = torch.randn(2, 7, 8), random_perm(7, seed)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layers = [
        nn.Linear(8, 5),
        nn.LayerNorm(8),
        nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
        lambda x: attention(x, x, x, need_weights=False)[0],
    ]
    for layer in layers:
        assert torch.allclose(layer_shuffle(x, layer, 1.0, True, perm=perm), layer(x), atol=1e-6)


def test_identity_permutation_is_bit_equal():
    x, mixer = torch.randn(2, 7, 8), BiMamba(8, state=4)
    assert torch.equal(layer_shuffle(x, mixer, 1.0, True, perm=torch.arange(7)), mixer(x))


def test_both_streams_are_permuted_and_restored():
    h, r, perm = torch.randn(2, 5, 3), torch.randn(2, 5, 3), random_perm(5)
    seen = []

    def layer(h, r):
        seen.append((h, r))
        return h * 2, h + r

    twice, total = layer_shuffle(h, layer, 1.0, True, residual=r, perm=perm)
    assert torch.equal(seen[0][0], h[:, perm]) and torch.equal(seen[0][1], r[:, perm])
    assert torch.equal(twice, h * 2) and torch.equal(total, h + r)
    forgetful = layer_shuffle(h, lambda h: h + r, 1.0, True, perm=perm)
    assert not torch.allclose(forgetful, h + r)


def test_one_permutation_serves_the_whole_batch_and_moves_the_first_token_too():
    x = torch.arange(6.0).reshape(1, 6, 1).repeat(4, 1, 1)
    seen, firsts = [], set()
    for seed in range(20):
        layer_shuffle(x, lambda x: seen.append(x) or x, 1.0, True, generator=seeded(seed))
        assert (seen[-1] == seen[-1][:1]).all()
        firsts.add(seen[-1][0, 0, 0].item())
    assert len(firsts) > 3


def test_gradients_reach_every_token_and_are_those_of_the_formula():
    x = torch.randn(1, 6, 4, dtype=torch.float64, requires_grad=True)
    mixer, perm = BiMamba(4, state=2).double(), random_perm(6)
    shuffled = layer_shuffle(x, mixer, 1.0, True, perm=perm)
    (gradient,) = torch.autograd.grad(shuffled[:, 2].sum(), x)
    assert (gradient.abs().sum(-1) > 0).all()
    assert torch.autograd.gradcheck(lambda x: layer_shuffle(x, mixer, 1.0, True, perm=perm), x)


def test_evaluation_and_probability_zero_draw_nothing():
    x, wrapped = torch.randn(1, 5, 2), LayerShuffle(nn.Flatten(2), 1.0).eval()
    before = torch.get_rng_state()
    assert torch.equal(wrapped(x), x)
    assert torch.equal(wrapped(x, perm=random_perm(5)), x)
    assert torch.equal(layer_shuffle(x, running_sum, 0.0, True), running_sum(x))
    layer_shuffle(x, running_sum, 0.3, True, perm=random_perm(5))  # given, not drawn
    assert sample_permutation(5, 0.0) is None
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_makes_shuffles_repeatable_and_leaves_the_global_stream_alone():
    x, before = torch.randn(1, 9, 2), torch.get_rng_state()
    first, second = (
        layer_shuffle(x, running_sum, 1.0, True, generator=seeded(5)) for _ in range(2)
    )
    assert torch.equal(first, second) and not torch.allclose(first, running_sum(x))
    assert torch.equal(torch.get_rng_state(), before)


def test_how_often_it_happens_follows_the_probability():
    generator = seeded(0)
    drawn = [sample_permutation(4, 0.3, generator=generator) for _ in range(4000)]
    shuffles = [tuple(perm.tolist()) for perm in drawn if perm is not None]
    assert len(shuffles) / 4000 == pytest.approx(0.3, abs=0.03)
    counts = torch.tensor([shuffles.count(order) for order in set(shuffles)])
    assert len(counts) == 24 and counts.min() > 25  # every order, about equally often: 50 each


def test_the_wrapper_passes_residual_and_settings_on():
    h, r, perm = torch.randn(1, 5, 8), torch.randn(1, 5, 8), random_perm(5)
    wrapped = LayerShuffle(MambaBlock(8, state=4), 1.0)
    for found, expected in zip(
        wrapped(h, r, perm=perm),
        layer_shuffle(h, wrapped.layer, 1.0, True, residual=r, perm=perm),
        strict=True,
    ):
        assert torch.equal(found, expected)
    alone = LayerShuffle(BiMamba(8, state=4), 1.0)
    assert alone(h, generator=seeded(1)).shape == h.shape
    assert set(dict(alone.named_parameters())) == {
        f"layer.{name}" for name, _ in alone.layer.named_parameters()
    }


# ---------------------------------------------------------------- probabilities


@given(st.integers(2, 60), PROBABILITIES)
def test_schedules(depth, rate):
    linear = shuffle_probs(depth, rate)
    assert linear[0] == 0 and linear[-1] == pytest.approx(rate)
    assert linear == sorted(linear) and all(0 <= p <= 1 for p in linear)
    assert shuffle_probs(depth, rate, "reverse") == linear[::-1]
    assert shuffle_probs(depth, rate, "none") == [0] * depth
    for schedule in ("linear", "reverse", "constant"):
        expected = pytest.approx(rate * depth / 2)
        assert sum(shuffle_probs(depth, rate, schedule)) == expected


def test_one_layer_and_the_base_model():
    assert shuffle_probs(1, 0.7) == shuffle_probs(1, 0.7, "reverse") == [0]
    assert sum(shuffle_probs(24, 0.5)) == pytest.approx(6)


def test_reversal_turns_a_forward_scan_into_the_backward_one():
    u, delta = torch.randn(2, 2, 6, 9)
    delta, A = F.softplus(delta - 1), -torch.rand(6, 4)
    B, C = torch.randn(2, 2, 4, 9)
    backwards = selective_scan(*(x.flip(-1) for x in (u, delta)), A, B.flip(-1), C.flip(-1))

    def layer(tokens):  # (B, T, u and delta and B and C): everything travels with its token
        parts = tokens.mT.split([6, 6, 4, 4], dim=1)
        return selective_scan(parts[0], parts[1], A, parts[2], parts[3]).mT

    tokens = torch.cat([u, delta, B, C], dim=1).mT
    found = layer_shuffle(tokens, layer, 1.0, True, perm=torch.arange(8, -1, -1))
    assert torch.allclose(found.mT, backwards.flip(-1), atol=1e-6)


# ---------------------------------------------------------------- the mixer


def mixer_by_definition(mixer: BiMamba, u: torch.Tensor) -> torch.Tensor:
    """Each direction on its own, after the equations, with the loop."""
    x, z = mixer.in_proj(u).mT.chunk(2, dim=1)
    inner, kernel = mixer.inner, mixer.conv.kernel_size[0]
    outputs = []
    for way in range(2):
        x_, z_ = (v.flip(-1) if way else v for v in (x, z))
        rows = slice(way * inner, (way + 1) * inner)
        weight, bias = mixer.conv.weight[rows], mixer.conv.bias[rows]
        x_ = F.conv1d(x_, weight, bias, padding=kernel - 1, groups=inner)[..., : u.shape[1]]
        x_ = F.silu(x_)
        sizes = [mixer.rank, mixer.state, mixer.state]
        step, B, C = (mixer.x_proj[way] @ x_).split(sizes, dim=1)
        delta, A = mixer.dt_weight[way] @ step, -mixer.A_log[way].exp()
        y = selective_scan(
            x_, delta, A, B, C, mixer.D[way], z_, mixer.dt_bias[way], True, method="loop"
        )
        outputs.append(y.flip(-1) if way else y)
    return mixer.out_proj(sum(outputs).mT / 2)


@pytest.mark.parametrize(
    "options", [{}, {"state": 5}, {"conv": 3}, {"conv": 1}, {"expand": 3}, {"dt_rank": 4}]
)
def test_the_mixer_is_the_equations(options):
    mixer = BiMamba(12, **options).double()
    for tokens in (1, 2, 13):
        u = torch.randn(2, tokens, 12, dtype=torch.float64)
        assert torch.allclose(mixer(u), mixer_by_definition(mixer, u), atol=1e-12)


def test_reversal_swaps_the_two_directions():
    mixer, swapped, u = BiMamba(8, state=4), BiMamba(8, state=4), torch.randn(2, 9, 8)
    shared = ("in_proj.weight", "out_proj.weight")
    swapped.load_state_dict(
        {
            name: value if name in shared else value.unflatten(0, (2, -1)).flip(0).flatten(0, 1)
            for name, value in mixer.state_dict().items()
        }
    )
    found = layer_shuffle(u, swapped, 1.0, True, perm=torch.arange(8, -1, -1))
    assert torch.allclose(found, mixer(u), atol=1e-6)
    assert not torch.allclose(swapped(u), mixer(u), atol=1e-3)


def test_the_mixer_sees_both_ways():
    mixer = BiMamba(8, state=4).double()
    u = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    for token in (0, 4, 8):
        (gradient,) = torch.autograd.grad(mixer(u)[0, token].sum(), u)
        assert (gradient.abs().sum(-1) > 0).all()


def test_gradients_of_the_mixer():
    mixer = BiMamba(4, state=2).double()
    u = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, u)
    expected = torch.autograd.grad(mixer_by_definition(mixer, u).square().sum(), mixer.parameters())
    found = torch.autograd.grad(mixer(u).square().sum(), mixer.parameters())
    for exact, ours in zip(expected, found, strict=True):
        assert torch.allclose(ours, exact, atol=1e-10)


def test_initial_values():
    mixer = BiMamba(64)
    assert mixer.rank == 4 and BiMamba(65, state=2).rank == 5
    assert torch.equal(mixer.A_log[1, 7], torch.arange(1.0, 17).log())
    assert (mixer.D == 1).all()
    assert mixer.dt_weight.abs().max() <= 0.5  # R^-0.5
    steps = F.softplus(mixer.dt_bias)
    assert 9e-4 < steps.min() < 3e-3 and 0.05 < steps.max() < 0.101


# ---------------------------------------------------------------- block and model


@pytest.mark.parametrize(("dim", "rms_norm"), [(16, True), (48, True), (100, True), (48, False)])
def test_parameters_of_a_block_follow_the_formula(dim, rms_norm):
    rank = math.ceil(dim / 16)
    count = sum(p.numel() for p in MambaBlock(dim, rms_norm=rms_norm).parameters())
    assert count == 6 * dim**2 + 8 * dim * rank + 221 * dim + (0 if rms_norm else dim)


def test_parameters_of_the_base_model():
    with torch.device("meta"):
        model = ShuffleMamba(224, 16, **SHUFFLE_MAMBA_SIZES["base"])

    def count(part):
        return sum(p.numel() for p in part.parameters())

    assert [count(block) for block in model.blocks] == [4_003_584] * 24
    assert count(model.patches) == 590_592 and model.positions.numel() == 151_296
    assert model.class_token.numel() == count(model.norm) == 768
    assert count(model.head) == 769_000
    assert count(model) == 97_598_440


def test_the_block_adds_then_norms():
    block = MambaBlock(8, state=4).double()
    h, r = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    out, total = block(h, r)
    assert torch.equal(total, h + r)
    normed = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * block.norm.weight
    assert torch.allclose(out, block.mixer(normed), atol=1e-12)
    assert torch.equal(block(h)[1], h)  # the first block: r = h
    layer_norm = MambaBlock(8, state=4, rms_norm=False)
    assert isinstance(layer_norm.norm, nn.LayerNorm) and layer_norm.norm.eps == 1e-5


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000))
def test_only_the_mixer_minds_the_order(seed):
    """Two copies around the mixer equal four around the whole block."""
    block = MambaBlock(8, state=4)
    h, r = torch.randn(2, 2, 7, 8)
    perm = sample_permutation(7, 1.0, generator=seeded(seed))
    around_the_block = layer_shuffle(h, block, 1.0, True, residual=r, perm=perm)
    around_the_mixer = block(h, r, 1.0, seeded(seed))
    for ours, theirs in zip(around_the_mixer, around_the_block, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_the_residual_stays_in_single_precision():
    block = MambaBlock(16, state=4).bfloat16()
    h, r = block(torch.randn(1, 5, 16).bfloat16())
    assert h.dtype == torch.bfloat16 and r.dtype == torch.float32
    assert block(h, r)[1].dtype == torch.float32


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_evaluation_is_bit_equal_to_the_plain_model_and_draws_nothing(rate):
    plain = small_model(shuffle_rate=0.0, drop_path=0.3).eval()
    model = small_model(shuffle_rate=rate, drop_path=0.3).eval()
    model.load_state_dict(plain.state_dict())
    x, before = torch.rand(3, 1, 8, 8), torch.get_rng_state()
    assert torch.equal(model(x), plain(x))
    assert torch.equal(torch.get_rng_state(), before)


def plain_forward(model: ShuffleMamba, x: torch.Tensor) -> torch.Tensor:
    """Vision Mamba without a word about shuffling."""
    patches = F.conv2d(x, model.patches.weight, model.patches.bias, stride=model.patches.stride)
    tokens = patches.flatten(2).mT
    h = torch.cat([model.class_token.expand(len(x), 1, -1), tokens], 1) + model.positions
    r = None
    for block in model.blocks:
        r = h if r is None else r + block.drop_path(h)
        h = block.mixer(block.norm(r))
    # DropPath draws one number a sample: dropping the whole or only the first token is the same
    return model.head(model.norm(r + model.drop_path(h))[:, 0])


def test_training_at_rate_zero_is_the_plain_model_drop_path_included():
    model, x = small_model(shuffle_rate=0.0, drop_path=0.5), torch.rand(6, 1, 8, 8)
    torch.manual_seed(3)
    ours = model(x)
    torch.manual_seed(3)
    assert torch.allclose(ours, plain_forward(model, x), atol=1e-6)
    assert not torch.allclose(ours, model.eval()(x), atol=1e-4)
    assert torch.allclose(model(x), plain_forward(model, x), atol=1e-6)


def test_training_shuffles_and_a_generator_repeats_it():
    model, x = small_model(shuffle_rate=1.0, drop_path=0.0), torch.rand(2, 1, 8, 8)
    first, again = (model(x, generator=seeded(4)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, model(x, generator=seeded(6)), atol=1e-6)
    assert not torch.allclose(first, model.eval()(x), atol=1e-6)


def test_probabilities_and_drop_rates_grow_with_depth():
    model = small_model(depth=4, shuffle_rate=0.6, drop_path=0.3)
    assert model.probs == pytest.approx([0, 0.2, 0.4, 0.6])
    assert [b.drop_path.prob for b in model.blocks] == pytest.approx([0, 0, 0.1, 0.2])
    assert model.drop_path.prob == 0.3
    assert small_model(schedule="reverse", shuffle_rate=1.0).probs == [1, 0.5, 0]
    assert small_model(depth=1)(torch.rand(2, 1, 8, 8)).shape == (2, 5)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    x = torch.ones(4000, 3, 2)
    y = DropPath(0.25)(x)
    assert torch.equal(y, y[:, :1, :1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.25).eval()(x), x)
    assert not DropPath(1.0)(x).any()


def test_both_initialisations():
    vim, released = (small_model(dim=64, init=init) for init in ("vim", "released"))
    assert vim.blocks[0].mixer.dt_bias.abs().min() > 0.5  # steps of 0.001 to 0.1
    assert not released.blocks[0].mixer.dt_bias.any()
    mixer = released.blocks[1].mixer
    narrow = (mixer.in_proj.weight, mixer.x_proj, mixer.dt_weight)
    for weight in (vim.head.weight, vim.positions, *narrow):
        assert weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert not vim.head.bias.any() and not vim.class_token.any() and not vim.patches.bias.any()
    assert vim.patches.weight.std().item() == pytest.approx(0.5, rel=0.2)  # fan-in 4
    for model in (vim, released):  # kaiming_uniform(a = sqrt 5) / sqrt(L)
        bound = 128**-0.5 / math.sqrt(3)
        assert 0.9 * bound < model.blocks[2].mixer.out_proj.weight.abs().max() <= bound


def test_pictures_of_another_size_get_resized_positions():
    model = small_model().eval()
    assert model(torch.rand(2, 1, 12, 16)).shape == (2, 5)
    x = torch.rand(1, 1, 8, 8)
    with torch.no_grad():
        model.positions[:, 1:] = 3.0  # constant positions stay constant at any size
    tokens = model.embed(torch.rand(1, 1, 16, 16))
    assert tokens.shape == (1, 65, 16)
    flat = model.embed(torch.zeros(1, 1, 16, 16))
    assert torch.allclose(flat[:, 1:], torch.full_like(flat[:, 1:], 3.0), atol=1e-5)
    assert torch.equal(model.embed(x)[:, :1], model.class_token + model.positions[:, :1])


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("training", [False, True])
def test_compiled_without_graph_breaks(training):
    model, x = small_model(shuffle_rate=1.0, drop_path=0.0).train(training), torch.rand(2, 1, 8, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    out = compiled(x)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not training:
        assert torch.allclose(out, model(x), atol=1e-5)
        return
    drawn = torch.stack([compiled(x) for _ in range(4)])  # the coin falls inside the graph
    assert (drawn.std(0) > 0).all()
    model.probs = [0.0] * 3
    torch.compiler.reset()
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


@pytest.mark.usefixtures("plain_python")
def test_a_compiled_shuffle_happens_as_often_as_it_should():
    def which(x, prob):
        return layer_shuffle(x, lambda x: x.cumsum(1), prob, True)

    compiled = torch.compile(which, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 12, 1)
    plain = x.cumsum(1)
    share = sum(not torch.equal(compiled(x, 0.25), plain) for _ in range(400)) / 400
    assert share == pytest.approx(0.25, abs=0.08)


def test_autocast_and_double():
    model, x = small_model(), torch.rand(2, 1, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, generator=seeded(0))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    exact = model.eval()(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(model(x).float(), exact, atol=0.05)
    double = model.double()(x.double())
    assert double.dtype == torch.float64 and torch.allclose(double.float(), exact, atol=1e-5)


def test_state_dict_round_trip():
    model, other = small_model().eval(), small_model().eval()
    other.load_state_dict(model.state_dict())
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(model(x), other(x))


# ---------------------------------------------------------------- bad input


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shuffle_probs(0, 0.5), "depth must be at least 1, got 0"),
        (lambda: shuffle_probs(4, 1.5), r"rate must be in \[0, 1\], got 1.5"),
        (lambda: shuffle_probs(4, math.nan), "rate must be in .*got nan"),
        (lambda: shuffle_probs(4, 0.5, "cosine"), "schedule must be one of.*'cosine'"),
        (lambda: LayerShuffle(nn.Identity(), -0.1), "prob must be in .*-0.1"),
        (lambda: layer_shuffle(torch.zeros(1, 3, 2), running_sum, 2, False), "prob must be"),
        (lambda: layer_shuffle(torch.zeros(3, 2), running_sum, 0, True), r"got shape \(3, 2\)"),
        (
            lambda: layer_shuffle(
                torch.zeros(1, 3, 2), running_sum, 1, True, residual=torch.zeros(1, 4, 2)
            ),
            r"residual must be \(1, 3, 2\), got shape \(1, 4, 2\)",
        ),
        (
            lambda: layer_shuffle(
                torch.zeros(1, 3, 2), running_sum, 1, True, perm=torch.tensor([0, 1, 1])
            ),
            r"perm must be a permutation of range\(3\), but 2 is missing",
        ),
        (
            lambda: layer_shuffle(torch.zeros(1, 3, 2), running_sum, 1, True, perm=torch.arange(4)),
            r"perm must be \(3\), got shape \(4,\)",
        ),
        (
            lambda: layer_shuffle(
                torch.zeros(1, 3, 2), running_sum, 1, True, perm=torch.tensor([0.0, 1.0, 2.0])
            ),
            "perm must be whole numbers, got torch.float32",
        ),
        (lambda: BiMamba(0), "dim must be at least 1"),
        (lambda: BiMamba(8, state=0), "state must be at least 1"),
        (lambda: BiMamba(8, dt_rank=0), "dt_rank must be at least 1"),
        (lambda: BiMamba(8)(torch.zeros(1, 5, 7)), r"u must be \(batch, tokens, 8\)"),
        (lambda: DropPath(1.1), r"prob must be in \[0, 1\], got 1.1"),
        (lambda: small_model(img_size=9), "img_size must be divisible by patch 2, got 9"),
        (lambda: small_model(depth=0), "depth must be at least 1"),
        (lambda: small_model(shuffle_rate=-1.0), "rate must be in"),
        (lambda: small_model(drop_path=2.0), "drop_path must be in"),
        (lambda: small_model(schedule="up"), "schedule must be one of"),
        (
            lambda: small_model(init="zeros"),
            "init must be one of .*'vim', 'released'.*'zeros'",
        ),
        (lambda: small_model()(torch.zeros(1, 1, 8, 7)), "divisible by patch 2"),
        (lambda: small_model()(torch.zeros(1, 8, 8)), r"x must be .*got shape \(1, 8, 8\)"),
        (lambda: small_model()(torch.zeros(1, 3, 8, 8)), r"x must be \(batch, 1, height, width\)"),
        (lambda: small_model(num_classes=-1), "num_classes must be in 0..*got -1"),
        (lambda: small_model(stride=0), "stride must be at least 1, got 0"),
        (lambda: small_model(stride=4), "divisible by patch 2 in steps of 4, got 8"),
        (lambda: resize_positions(torch.zeros(1, 4, 2), (2, 2)), "a square grid, got 4"),
    ],
)
def test_message_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- the authors' numbers


def gradients(outputs, inputs):
    return torch.autograd.grad(sum(y.square().sum() for y in outputs), inputs)


def shuffle_around_a_layer(case):
    x, r = (case.tensors[name].clone().requires_grad_() for name in ("x", "r"))
    perm = torch.tensor(case.settings["perm"])

    def layer(h, r):
        return (h * (r + 0.5)).cumsum(1), r + h.flip(1).cumsum(1).flip(1)

    shuffled = layer_shuffle(x, layer, 1.0, True, residual=r, perm=perm)
    plain = layer_shuffle(x, layer, 1.0, False, residual=r)
    grad_x, grad_r = gradients(shuffled, (x, r))
    return {
        "output": shuffled[0], "residual": shuffled[1],
        "output, plain": plain[0], "residual, plain": plain[1],
        "gradient w.r.t. x": grad_x, "gradient w.r.t. r": grad_r,
    }  # fmt: skip


def released_model(weights, **options) -> ShuffleMamba:
    """Our model with weights under the authors' names."""
    model = ShuffleMamba(**options).double()
    load_released(model, weights)
    return model


def mixer_and_block(case):
    weights = {f"layers.0.mixer.{name}": value for name, value in case.tensors.items()}
    weights["layers.0.norm.weight"] = weights.pop("layers.0.mixer.norm.weight")
    h, r = (weights.pop(f"layers.0.mixer.{name}") for name in "hr")
    model = ShuffleMamba(2, 1, 1, 6, 1, num_classes=0, state=4, dt_rank=2).double()
    others = {
        "patch_embed.proj.weight": torch.zeros(6, 1, 1, 1), "patch_embed.proj.bias": torch.zeros(6),
        "cls_token": torch.zeros(1, 1, 6), "pos_embed": torch.zeros(1, 5, 6),
        "norm_f.weight": torch.ones(6),
    }  # fmt: skip
    load_released(model, weights | others)
    block = model.blocks[0]
    h.requires_grad_()
    mixed = block.mixer(h)
    out, total = block.train()(h, r, perm=torch.tensor(case.settings["perm"]))
    return {
        "mixer output": mixed, "gradient w.r.t. h": gradients([mixed], h)[0],
        "block output": out, "block residual": total,
    }  # fmt: skip


def whole_network(case):
    weights = dict(case.tensors)
    x = weights.pop("x").requires_grad_()
    model = released_model(
        weights, img_size=6, patch_size=3, depth=3, dim=6, in_chans=2, num_classes=4,
        drop_path=0.0, state=4, dt_rank=2,
    )  # fmt: skip
    found = {"logits, eval": model.eval()(x)}
    h, r = model.train().embed(x), None
    for block, perm in zip(model.blocks, case.settings["perms"], strict=True):
        h, r = block(h, r, perm=None if perm is None else torch.tensor(perm))
    logits = model.head(model.norm(r[:, 0] + h[:, 0]))
    return found | {
        "logits, training": logits, "gradient w.r.t. x": gradients([logits], x)[0]
    }  # fmt: skip


def the_scan(case):
    t = case.tensors
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    inputs = [t[name].clone().requires_grad_() for name in names]
    y = selective_scan(*inputs, delta_softplus=True)
    two = selective_scan(t["u"], t["delta_positive"], t["A"], t["B2"], t["C2"])
    grads = zip(names, gradients([y], inputs), strict=True)
    return {"output": y, "output, two groups": two} | {f"gradient w.r.t. {n}": g for n, g in grads}


RECOMPUTE = {
    "shuffle around an order-dependent layer": shuffle_around_a_layer,
    "selective scan, all options and two groups": the_scan,
    "bidirectional mixer, and a block with a shuffle": mixer_and_block,
    "whole network, eval and training": whole_network,
}


@pytest.mark.parametrize("case", [*load_reference("layer_shuffle")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))


# ---------------------------------------------------------------- the authors' checkpoints


def made_up_release(model: ShuffleMamba) -> dict:
    """Random weights under the names and in the shapes of the released code."""
    dim, inner = model.head.in_features, model.blocks[0].mixer.inner
    rank, state = model.blocks[0].mixer.rank, model.blocks[0].mixer.state
    mixer = {"in_proj.weight": (2 * inner, dim), "out_proj.weight": (dim, inner)}
    for way in ("", "_b"):
        mixer |= {
            f"conv1d{way}.weight": (inner, 1, 4), f"conv1d{way}.bias": (inner,),
            f"x_proj{way}.weight": (rank + 2 * state, inner),
            f"dt_proj{way}.weight": (inner, rank), f"dt_proj{way}.bias": (inner,),
            f"A{way}_log": (inner, state), f"D{way}": (inner,),
        }  # fmt: skip
    shapes = {
        "patch_embed.proj.weight": model.patches.weight.shape,
        "patch_embed.proj.bias": (dim,), "cls_token": (1, 1, dim),
        "pos_embed": model.positions.shape, "norm_f.weight": (dim,),
        "head.weight": (model.head.out_features, dim), "head.bias": (model.head.out_features,),
    }  # fmt: skip
    for layer in range(len(model.blocks)):
        shapes[f"layers.{layer}.norm.weight"] = (dim,)
        shapes |= {f"layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
    return {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}


def test_released_weights_land_where_they_belong():
    model = small_model()
    weights = made_up_release(model)
    load_released(model, {"model": weights, "epoch": 299})
    mixer = model.blocks[2].mixer
    for way, ending in enumerate(("", "_b")):
        theirs = {n: weights[f"layers.2.mixer.{n}"] for n in (f"A{ending}_log", f"D{ending}")}
        assert torch.equal(mixer.A_log[way], theirs[f"A{ending}_log"])
        assert torch.equal(mixer.D[way], theirs[f"D{ending}"])
        half = slice(way * mixer.inner, (way + 1) * mixer.inner)
        assert torch.equal(
            mixer.conv.weight[half], weights[f"layers.2.mixer.conv1d{ending}.weight"]
        )
        assert torch.equal(mixer.x_proj[way], weights[f"layers.2.mixer.x_proj{ending}.weight"])
        assert torch.equal(mixer.dt_bias[way], weights[f"layers.2.mixer.dt_proj{ending}.bias"])
    assert torch.equal(model.norm.weight, weights["norm_f.weight"])
    assert torch.equal(model.positions, weights["pos_embed"])
    assert "model" not in weights and len(weights) == 58  # the caller's dictionary is left alone


def test_released_weights_for_another_picture_size_and_without_a_head():
    weights = made_up_release(small_model())
    larger = small_model(img_size=12, num_classes=0)
    load_released(larger, weights)
    assert larger.positions.shape == (1, 37, 16)
    assert torch.equal(larger.positions[:, 0], weights["pos_embed"][:, 0])
    assert larger(torch.rand(2, 1, 12, 12)).shape == (2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("layers.1.mixer.A_b_log"),
            "lacks 1 weights, such as blocks.1.mixer.A_log",
        ),
        (lambda w: w.update(neck=torch.zeros(1)), "has in excess 1 weights, such as neck"),
        (
            lambda w: w.update({"norm_f.weight": torch.ones(8)}),
            r"norm.weight must be \(16\), got shape \(8,\)",
        ),
        (lambda w: w.update(pos_embed=torch.ones(1, 18, 16)), "a square grid, got 18"),
    ],
)
def test_released_weights_that_do_not_fit(change, message):
    model = small_model()
    weights = made_up_release(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_released(model, weights)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())  # all or nothing


# ---------------------------------------------------------------- gradient checkpointing


def gradient_of(module, run) -> torch.Tensor:
    module.zero_grad()
    torch.manual_seed(5)
    run().square().sum().backward()
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("prob", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_a_checkpointed_block_repeats_the_permutation_of_its_generator(prob, seed):
    block, (x, r) = MambaBlock(16, drop_path=0.3, state=4), torch.randn(2, 2, 9, 16)
    plain = gradient_of(block, lambda: block(x, r, prob, seeded(seed))[0])
    again = gradient_of(
        block, lambda: checkpoint(block, x, r, prob, seeded(seed), use_reentrant=False)[0]
    )
    assert torch.equal(plain, again)


@pytest.mark.parametrize("generator", [True, False])
def test_checkpointing_changes_no_gradient(generator):
    model, x = small_model(shuffle_rate=1.0, drop_path=0.3), torch.rand(3, 1, 8, 8)

    def draw():
        return seeded(3) if generator else None

    plain = gradient_of(model, lambda: model(x, draw()))
    whole = gradient_of(model, lambda: checkpoint(model, x, draw(), use_reentrant=False))
    model.checkpointing = True
    assert torch.equal(plain, gradient_of(model, lambda: model(x, draw())))
    assert torch.equal(plain, whole)


def test_two_passes_before_a_backward_keep_their_own_permutations():
    wrapped, generator = LayerShuffle(BiMamba(8, state=4), 1.0), seeded(1)
    x, y = (torch.randn(2, 6, 8, requires_grad=True) for _ in "xy")

    def both(run):
        generator.manual_seed(1)
        return run(x) + 2 * run(y)

    plain = gradient_of(wrapped, lambda: both(lambda x: wrapped(x, generator=generator)))
    again = gradient_of(
        wrapped,
        lambda: both(lambda x: checkpoint(wrapped, x, None, generator, use_reentrant=False)),
    )
    assert torch.allclose(plain, again, rtol=0, atol=1e-5 * plain.abs().max())


def test_a_draw_that_cannot_be_repeated_says_so():
    """Reentrant checkpointing keeps no graph; data that want no gradient leave no node."""
    block = MambaBlock(8, state=4)
    h = torch.randn(1, 5, 8, requires_grad=True)
    out = checkpoint(block, h, None, 1.0, seeded(0), use_reentrant=True)[0]
    with pytest.raises(ValueError, match=r"generator cannot repeat its draw.*pass perm="):
        out.sum().backward()
    wrapped = LayerShuffle(BiMamba(8, state=4), 1.0)
    out = checkpoint(wrapped, h.detach(), None, seeded(0), use_reentrant=False)
    with pytest.raises(ValueError, match="got 0 draws"):
        out.sum().backward()


# ---------------------------------------------------------------- what users miss


def test_features_without_a_head():
    model, x = small_model(num_classes=0).eval(), torch.rand(2, 1, 8, 8)
    assert isinstance(model.head, nn.Identity)
    assert model(x).shape == (2, 16) and torch.equal(model(x), model.forward_features(x))
    with_head = small_model().eval()
    assert torch.equal(with_head(x), with_head.head(with_head.forward_features(x)))


def test_what_the_authors_do_not_decay():
    """By their rule: fewer than two axes in THEIR shapes, or the class token and the positions."""
    model = small_model()
    kept = model.no_weight_decay() | {n for n, p in model.named_parameters() if p.ndim < 2}
    theirs = made_up_release(model)
    for name in model.state_dict():
        names = _released_names(name)
        decays = theirs[names[0]].ndim > 1 and names[0] not in ("pos_embed", "cls_token")
        assert (name not in kept) == decays, name


def test_overlapping_patches():
    model = small_model(stride=1).eval()
    assert model.grid == 7 and model.positions.shape == (1, 50, 16)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 5)
    assert model(torch.rand(2, 1, 9, 5)).shape == (2, 5)
    assert small_model(img_size=9, patch_size=3, stride=2).grid == 4


def test_weights_of_another_picture_size_are_resized_not_refused():
    model, larger = small_model(), small_model(img_size=12)
    weights = model.state_dict()
    larger.load_state_dict(weights)
    assert torch.equal(larger.positions, resize_positions(model.positions, (6, 6)))
    assert weights["positions"].shape == (1, 17, 16)  # the caller's dictionary stays
    holder, target = nn.ModuleDict({"net": model}), nn.ModuleDict({"net": larger})
    target.load_state_dict(holder.state_dict())  # also inside another module


def released_step(model: ShuffleMamba, x: torch.Tensor) -> torch.Tensor:
    """A training pass with random numbers in the released code's order: coin, order, DropPath."""

    def drop_path(x, prob):
        if prob == 0:
            return x
        keep = (1 - prob) + torch.rand(len(x), 1, 1)
        return x / (1 - prob) * keep.floor()

    h, r = model.embed(x), None
    for block, prob in zip(model.blocks, model.probs, strict=True):
        perm = torch.arange(h.shape[1])
        if torch.rand(1).item() < prob:
            perm = torch.randperm(h.shape[1])
        h = h[:, perm]
        r = h if r is None else r[:, perm] + drop_path(h, block.drop_path.prob)
        h = block.mixer(block.norm(r))
        h, r = h[:, perm.argsort()], r[:, perm.argsort()]
    r = r + drop_path(h, model.drop_path.prob)
    return model.head(model.norm(r)[:, 0])


def test_seeds_of_the_released_code_are_reproduced():
    model, x = small_model(shuffle_rate=0.7, drop_path=0.4), torch.rand(6, 1, 8, 8)
    for seed in range(6):
        torch.manual_seed(seed)
        ours = model(x)
        end = torch.get_rng_state()
        torch.manual_seed(seed)
        assert torch.allclose(ours, released_step(model, x), atol=1e-5)
        assert torch.equal(torch.get_rng_state(), end)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rms_norm", [True, False])
def test_every_operation_has_a_form_in_onnx(rms_norm):
    model = small_model(depth=1, rms_norm=rms_norm).eval()
    try:
        torch.onnx.export(
            model, (torch.rand(1, 1, 8, 8),), io.BytesIO(), dynamo=False, opset_version=18
        )
    except torch.onnx.OnnxExporterError as error:  # raised when all is converted, to write it
        assert "onnx is not installed" in str(error)


@pytest.mark.usefixtures("plain_python")
def test_export_holds_one_operation_for_each_scan():
    model = small_model().eval()
    program = torch.export.export(model, (torch.rand(2, 1, 8, 8),))
    assert sum("selective_scan" in str(node.target) for node in program.graph.nodes) == 3
