"""Stochastic layer-wise shuffle: the wrapper, the selective scan below it, and the model."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.shuffles.layer_shuffle import (
    SHUFFLE_MAMBA_SIZES,
    BiMamba,
    DropPath,
    LayerShuffle,
    MambaBlock,
    ShuffleMamba,
    inverse_permutation,
    layer_shuffle,
    sample_permutation,
    selective_scan,
    shuffle_probs,
)

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
        (lambda: shuffle_probs(4, 1.5), r"rate must be a probability in \[0, 1\], got 1.5"),
        (lambda: shuffle_probs(4, math.nan), "rate must be a probability"),
        (lambda: shuffle_probs(4, 0.5, "cosine"), "schedule must be one of.*'cosine'"),
        (lambda: LayerShuffle(nn.Identity(), -0.1), "prob must be a probability.*-0.1"),
        (lambda: layer_shuffle(torch.zeros(1, 3, 2), running_sum, 2, False), "prob must be"),
        (lambda: layer_shuffle(torch.zeros(3, 2), running_sum, 0, True), r"got shape \(3, 2\)"),
        (
            lambda: layer_shuffle(
                torch.zeros(1, 3, 2), running_sum, 1, True, residual=torch.zeros(1, 4, 2)
            ),
            r"residual must have the shape of x, expected \(1, 3, 2\), got \(1, 4, 2\)",
        ),
        (
            lambda: layer_shuffle(
                torch.zeros(1, 3, 2), running_sum, 1, True, perm=torch.tensor([0, 1, 1])
            ),
            r"perm must be a permutation of range\(3\), got \[0, 1, 1\]",
        ),
        (
            lambda: layer_shuffle(torch.zeros(1, 3, 2), running_sum, 1, True, perm=torch.arange(4)),
            r"permutation of range\(3\), got shape \(4,\)",
        ),
        (
            lambda: layer_shuffle(
                torch.zeros(1, 3, 2), running_sum, 1, True, perm=torch.tensor([0.0, 1.0, 2.0])
            ),
            "of torch.float32",
        ),
        (lambda: BiMamba(0), "dim must be at least 1"),
        (lambda: BiMamba(8, state=0), "state must be at least 1"),
        (lambda: BiMamba(8, dt_rank=0), "dt_rank must be at least 1"),
        (lambda: BiMamba(8)(torch.zeros(1, 5, 7)), r"u must be \(batch, tokens, 8\)"),
        (lambda: DropPath(1.1), "prob must be a probability"),
        (lambda: small_model(img_size=9), "img_size must be divisible by patch 2, got 9"),
        (lambda: small_model(depth=0), "depth must be at least 1"),
        (lambda: small_model(shuffle_rate=-1.0), "rate must be a probability"),
        (lambda: small_model(drop_path=2.0), "drop_path must be a probability"),
        (lambda: small_model(schedule="up"), "schedule must be one of"),
        (lambda: small_model(init="zeros"), "init must be 'vim' or 'released', got 'zeros'"),
        (lambda: small_model()(torch.zeros(1, 1, 8, 7)), "divisible by patch 2"),
        (lambda: small_model()(torch.zeros(1, 8, 8)), "x must be"),
    ],
)
def test_message_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
