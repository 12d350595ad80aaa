"""RelaCtrl: the two-dimensional shuffle, the mixer, the controlled network, relevance scores."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shuffle_nb.diffusion.relactrl import PIXART_GROUPS as OFFICIAL_GROUPS
from shuffle_nb.diffusion.relactrl import PIXART_POSITIONS as OFFICIAL_POSITIONS
from shuffle_nb.diffusion.relactrl import (
    CopiedBlock,
    RelaCtrl,
    RelevanceControlBlock,
    ShuffleAttention,
    TwoDimShuffleMixer,
    allocate_groups,
    count_params,
    group_sizes,
    load_relactrl_weights,
    mixer_flops,
    relevance_score,
    select_layers,
    shuffle_2d,
    unshuffle_2d,
)
from shuffle_nb.diffusion.tiny_diffusion import TinyDiT, load_tiny_dit, noise_loss
from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.reference import load_reference

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)


def plain_attention(layer: ShuffleAttention, z: torch.Tensor) -> torch.Tensor:
    """Multi-head attention of (windows, tokens, dim) as in a textbook."""
    windows, tokens, dim = z.shape
    heads = layer.num_heads
    query, key, value = (
        part.reshape(windows, tokens, heads, dim // heads).transpose(1, 2)
        for part in F.linear(z, layer.qkv.weight, layer.qkv.bias).chunk(3, dim=-1)
    )
    weights = (query @ key.mT / (dim // heads) ** 0.5).softmax(-1)
    mixed = (weights @ value).transpose(1, 2).reshape(windows, tokens, dim)
    return F.linear(mixed, layer.proj.weight, layer.proj.bias)


def plain_mix(mixer: TwoDimShuffleMixer, u: torch.Tensor) -> torch.Tensor:
    """The published recipe with its loops, on the global random stream."""
    batch, length, dim = u.shape
    out = torch.empty_like(u)
    channel_order = torch.randperm(dim)
    start = 0
    for layer in mixer.attentions:
        channels = channel_order[start : start + layer.dim]
        start += layer.dim
        flat = u[:, :, channels].reshape(batch, -1)
        order = torch.randperm(length * layer.dim)
        pieces = []
        for piece in flat[:, order].chunk(mixer.segments, dim=1):
            z = piece.reshape(batch, length // mixer.segments, layer.dim)
            pieces.append(plain_attention(layer, z).reshape(batch, -1))
        restored = torch.cat(pieces, dim=1)[:, order.argsort()]
        out[:, :, channels] = restored.view(batch, length, layer.dim)
    return out


def trained_like(base: TinyDiT) -> TinyDiT:
    """Give the zero-initialised head weights, as training would."""
    nn.init.normal_(base.out.weight, std=0.1)
    return base


def small_base(**options) -> TinyDiT:
    return trained_like(TinyDiT(**(dict(dim=16, depth=4, num_heads=2) | options)))


def small_control(base: TinyDiT, positions=(0, 2), **options) -> RelaCtrl:
    return RelaCtrl(base, positions, 2, multiple=4, num_heads=2, **options)


def batch_of(size: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(size, 1, 8, 8), torch.rand(size), torch.randn(size, 1, 8, 8).sign()


def fill(model: RelaCtrl) -> RelaCtrl:
    """Move the zero projections away from zero."""
    for control in model.controls:
        nn.init.normal_(control.before_proj.weight, std=0.2)
        nn.init.normal_(control.after_proj.weight, std=0.2)
    return model


# ---------------------------------------------------------------- the shuffle of scalars


@settings(deadline=None)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 1000))
def test_unshuffle_is_the_exact_inverse_and_values_are_kept(shape, dtype, seed):
    batch, segments, pieces, dim = shape
    length = segments * pieces
    x = torch.randint(0, 100, (batch, length, dim)).to(dtype)
    perm = torch.randperm(length * dim, generator=torch.Generator().manual_seed(seed))
    z = shuffle_2d(x, perm, segments)
    assert z.shape == (batch * segments, pieces, dim) and z.dtype == dtype
    assert torch.equal(unshuffle_2d(z, perm, batch, length), x)
    kept = z.reshape(batch, -1).sort(dim=1).values
    assert torch.equal(kept, x.flatten(1).sort(dim=1).values)


def test_the_formula_index_by_index():
    x, perm = torch.randn(2, 6, 5), torch.randperm(30)
    z = shuffle_2d(x, perm, 3)
    for b in range(2):
        for s in range(3):
            for m in range(2):
                for k in range(5):
                    assert z[b * 3 + s, m, k] == x[b].flatten()[perm[s * 10 + m * 5 + k]]


def test_the_identity_permutation_gives_plain_windows():
    x = torch.randn(2, 8, 3)
    assert torch.equal(shuffle_2d(x, torch.arange(24), 4), x.reshape(8, 2, 3))


def test_shuffle_passes_gradients_to_where_the_values_came_from():
    x, perm = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randperm(12)
    assert torch.autograd.gradcheck(lambda x: shuffle_2d(x, perm, 2), x)
    z = shuffle_2d(x, perm, 2).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: unshuffle_2d(z, perm, 2, 4), z)
    assert torch.autograd.gradgradcheck(lambda z: unshuffle_2d(z, perm, 2, 4) ** 2, z)


# ---------------------------------------------------------------- group sizes


@pytest.mark.parametrize(
    ("dim", "groups", "multiple", "expected"),
    [
        (1152, 2, 32, [576, 576]),
        (1152, 4, 32, [288] * 4),
        (1152, 6, 32, [192] * 6),
        (256, 6, 32, [32, 32, 32, 32, 64, 64]),
        (48, 3, 16, [16, 16, 16]),
        (14, 3, 2, [4, 6, 4]),
        (48, 1, 32, None),
        (96, 4, 32, None),
        (96, 3, 32, [32, 32, 32]),
    ],
)
def test_group_sizes_of_the_rule(dim, groups, multiple, expected):
    if expected is not None:
        assert group_sizes(dim, groups, multiple) == expected
        return
    with pytest.raises(ValueError, match="cannot sum to dim"):
        group_sizes(dim, groups, multiple)


@given(st.integers(1, 12), st.integers(1, 20), st.sampled_from([1, 2, 8, 16, 32]))
def test_group_sizes_are_multiples_nearly_even_and_sum_to_dim(groups, more, multiple):
    dim = (groups + more) * multiple
    sizes = group_sizes(dim, groups, multiple)
    assert len(sizes) == groups and sum(sizes) == dim
    assert all(size % multiple == 0 and size >= multiple for size in sizes)
    assert max(sizes) - min(sizes) <= 2 * multiple


# ---------------------------------------------------------------- attention and mixer


def test_attention_with_one_segment_and_no_shuffle_is_ordinary_attention():
    layer = ShuffleAttention(8, num_heads=2, segments=1, shuffle=False).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), plain_attention(layer, x))


def test_attention_is_shuffle_attend_and_back():
    layer, x, perm = ShuffleAttention(8).double(), torch.randn(2, 8, 8).double(), torch.randperm(64)
    expected = unshuffle_2d(plain_attention(layer, shuffle_2d(x, perm)), perm, 2, 8)
    torch.testing.assert_close(layer(x, perm), expected)


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(48, 3, 16), (256, 6, 32), (14, 3, 2), (24, 1, 8), (40, 4, 8)]),
    st.integers(1, 3),
    st.sampled_from([(4, 1), (4, 2), (8, 4), (6, 3)]),
    st.integers(0, 100),
)
def test_the_mixer_is_the_published_recipe_with_its_loops(group_options, batch, lengths, seed):
    dim, groups, multiple = group_options
    length, segments = lengths
    mixer = TwoDimShuffleMixer(dim, groups, segments, num_heads=2, multiple=multiple).double()
    u = torch.randn(batch, length, dim, dtype=torch.float64)
    torch.manual_seed(seed)
    expected = plain_mix(mixer, u)
    torch.manual_seed(seed)
    torch.testing.assert_close(mixer.mix(u), expected)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("dim_groups_multiple", [(48, 3, 16), (256, 6, 32), (14, 3, 2)])
def test_the_mixer_equals_its_own_attentions_group_by_group(shuffle, dim_groups_multiple):
    dim, groups, multiple = dim_groups_multiple
    mixer = TwoDimShuffleMixer(dim, groups, 2, 2, shuffle=shuffle, multiple=multiple)
    u = torch.randn(2, 8, dim)
    channel_perm, token_perms = mixer.draw_permutations(8)
    fixed = (channel_perm, token_perms) if shuffle else ()
    order = channel_perm if shuffle else torch.arange(dim)
    expected = torch.empty_like(u)
    for layer, channels, perm in zip(
        mixer.attentions, order.split(mixer.sizes), token_perms, strict=True
    ):
        expected[:, :, channels] = layer(u[:, :, channels], perm if shuffle else None)
    torch.testing.assert_close(mixer.mix(u, *fixed), expected)


def test_one_segment_one_group_no_shuffle_is_the_adaptive_attention_residual():
    mixer = TwoDimShuffleMixer(16, 1, segments=1, shuffle=False, multiple=16).double()
    c, t_mod = torch.randn(2, 6, 16).double(), torch.randn(2, 96).double()
    shift, scale, gate = (mixer.table + t_mod.view(2, 6, 16))[:, :3, None].unbind(1)
    u = F.layer_norm(c, (16,), eps=1e-6) * (1 + scale) + shift
    expected = c + gate * plain_attention(mixer.attentions[0], u)
    torch.testing.assert_close(mixer(c, t_mod), expected)


@pytest.mark.parametrize("shuffle", [True, False])
def test_with_attention_as_identity_the_residual_is_gate_times_input(shuffle, monkeypatch):
    monkeypatch.setattr(ShuffleAttention, "attend", lambda self, z: z)
    mixer = TwoDimShuffleMixer(256, 6, shuffle=shuffle)
    c, t_mod = torch.randn(3, 8, 256), torch.randn(3, 6 * 256)
    shift, scale, gate = (mixer.table + t_mod.view(3, 6, 256))[:, :3, None].unbind(1)
    u = F.layer_norm(c, (256,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(mixer(c, t_mod), c + gate * u)


def test_only_three_of_the_six_modulations_are_used():
    mixer = TwoDimShuffleMixer(16, 1, multiple=16)
    mixer(torch.randn(2, 8, 16), torch.randn(2, 96)).sum().backward()
    used = mixer.table.grad.abs().sum(1) > 0
    assert used.tolist() == [True] * 3 + [False] * 3


def test_gradients_of_the_mixer_in_float64():
    mixer = TwoDimShuffleMixer(8, 2, 2, num_heads=2, multiple=4).double()
    channel_perm, token_perms = mixer.draw_permutations(4)
    c = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    t_mod = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)

    def call(c, t_mod, *weights):
        return mixer(c, t_mod, channel_perm, token_perms)

    assert torch.autograd.gradcheck(call, (c, t_mod, *mixer.parameters()))


# ---------------------------------------------------------------- randomness


def mixer_and_state(**options):
    mixer = TwoDimShuffleMixer(16, 2, multiple=8, num_heads=2, **options)
    return mixer, torch.randn(2, 8, 16), torch.randn(2, 96)


@pytest.mark.parametrize("training", [True, False])
def test_permutations_are_drawn_at_every_call_in_evaluation_too(training):
    mixer, c, t_mod = mixer_and_state()
    mixer.train(training)
    assert not torch.equal(mixer(c, t_mod), mixer(c, t_mod))
    fixed = mixer.draw_permutations(8)
    assert torch.equal(mixer(c, t_mod, *fixed), mixer(c, t_mod, *fixed))


def test_a_generator_repeats_seeds_differ_and_the_global_stream_stays():
    mixer, c, t_mod = mixer_and_state()
    state = torch.get_rng_state()
    first, again, other = (
        mixer(c, t_mod, generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_draw_order_is_channels_then_groups():
    mixer = TwoDimShuffleMixer(256, 6)
    generator = torch.Generator().manual_seed(3)
    channel_perm, token_perms = mixer.draw_permutations(4, torch.Generator().manual_seed(3))
    assert torch.equal(channel_perm, torch.randperm(256, generator=generator))
    for perm, size in zip(token_perms, mixer.sizes, strict=True):
        assert torch.equal(perm, torch.randperm(4 * size, generator=generator))


def test_channel_permutation_alone_may_be_fixed():
    mixer, c, t_mod = mixer_and_state()
    channel_perm, token_perms = mixer.draw_permutations(8, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    torch.randperm(16, generator=generator)  # what the fixed one would have taken
    expected = mixer(c, t_mod, channel_perm, token_perms)
    assert torch.equal(mixer(c, t_mod, channel_perm, generator=generator), expected)


def test_without_shuffle_nothing_is_random():
    mixer, c, t_mod = mixer_and_state(shuffle=False)
    assert torch.equal(mixer(c, t_mod), mixer(c, t_mod))


def test_the_mean_over_permutations_converges_as_one_over_n():
    mixer, c, t_mod = mixer_and_state()
    mixer, c, t_mod = mixer.double(), c.double(), t_mod.double()
    with torch.no_grad():
        outputs = torch.stack([mixer(c, t_mod) for _ in range(1024)])
    variance = [outputs.unflatten(0, (-1, n)).mean(1).var(0).mean() for n in (1, 4, 16)]
    assert variance[0] / variance[1] == pytest.approx(4, rel=0.25)
    assert variance[0] / variance[2] == pytest.approx(16, rel=0.5)


def test_drop_path_skips_whole_samples_and_keeps_the_mean():
    mixer = TwoDimShuffleMixer(16, 1, multiple=16, shuffle=False, drop_path=0.25)
    c, t_mod = torch.randn(1, 8, 16).expand(4000, 8, 16), torch.randn(1, 96).expand(4000, 96)
    with torch.no_grad():
        change = mixer(c, t_mod) - c
        whole = mixer.eval()(c[:1], t_mod[:1]) - c[:1]
    dropped = (change == 0).flatten(1).all(1)
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(change[~dropped], (whole / 0.75).expand_as(change[~dropped]))


# ---------------------------------------------------------------- who reaches whom


def token_reach(function, length: int, dim: int) -> torch.Tensor:
    """Which output token depends on which input token, from the Jacobian."""
    x = torch.randn(1, length, dim, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(function, x)[0, :, :, 0]  # (L, d, L, d)
    return jacobian.abs().amax((1, 3)) > 0


def test_reach_of_one_layer_with_and_without_shuffle():
    t_mod = torch.randn(1, 96, dtype=torch.float64)
    mixer = TwoDimShuffleMixer(16, 1, multiple=16).double()
    fixed = mixer.draw_permutations(16)
    assert token_reach(lambda c: mixer(c, t_mod, *fixed), 16, 16).float().mean() > 0.95
    for groups in (1, 2):
        plain = TwoDimShuffleMixer(16, groups, shuffle=False, multiple=8).double()
        reach = token_reach(lambda c, plain=plain: plain(c, t_mod), 16, 16)
        assert torch.equal(reach, torch.block_diag(*[torch.ones(4, 4)] * 4).bool())


def test_without_shuffle_groups_are_blind_to_each_other_before_the_norm_couples_them():
    mixer = TwoDimShuffleMixer(16, 2, segments=1, shuffle=False, multiple=8).double()
    u = torch.randn(1, 4, 16, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(mixer.mix, u)[0, :, :, 0]  # (L, d, L, d)
    assert jacobian[:, :8, :, 8:].abs().max() == 0 == jacobian[:, 8:, :, :8].abs().max()
    fixed = TwoDimShuffleMixer(16, 2, segments=1, multiple=8).double()
    perms = fixed.draw_permutations(4)
    jacobian = torch.autograd.functional.jacobian(lambda u: fixed.mix(u, *perms), u)[0, :, :, 0]
    assert jacobian[:, :8, :, 8:].abs().max() > 0


# ---------------------------------------------------------------- parameters and FLOPs


@pytest.mark.parametrize(("groups", "expected"), [(6, 3_552_768), (4, 3_995_136), (2, 5_322_240)])
def test_parameters_of_one_block(groups, expected):
    with torch.device("meta"):
        block = RelevanceControlBlock(1152, groups, first=False)
    assert count_params(block) == expected
    sizes = group_sizes(1152, groups)
    formula = sum(4 * s**2 + 4 * s for s in sizes) + 6 * 1152 + 2 * (1152**2 + 1152)
    assert count_params(block) == formula


class PixArtBlock(nn.Module):
    """The parameters of a PixArt block: attention, attention to the text, MLP, modulation."""

    def __init__(self, dim: int):
        super().__init__()
        self.attention = nn.ModuleList([nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)])
        linears = (nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim))
        self.text = nn.ModuleList(linears)
        self.mlp = nn.ModuleList([nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)])
        self.table = nn.Parameter(torch.empty(6, dim))


class PixArt(nn.Module):
    dim = 1152

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(PixArtBlock(self.dim) for _ in range(28))


def test_places_and_groups_of_the_release_and_how_its_mixer_starts():
    assert OFFICIAL_POSITIONS == (0, 2, 3, 4, 5, 6, 7, 8, 9, 18, 19)
    assert OFFICIAL_GROUPS == (6, 2, 6, 4, 2, 2, 4, 4, 6, 6, 6)
    mixer = TwoDimShuffleMixer()
    assert mixer.sizes == [192] * 6 and mixer.segments == 4 and mixer.shuffle
    assert mixer.table.std().item() == pytest.approx(1152**-0.5, rel=0.05)


def test_parameters_of_the_whole_branch_and_of_the_copy():
    with torch.device("meta"):
        branch = RelaCtrl(PixArt(), OFFICIAL_POSITIONS, OFFICIAL_GROUPS)
        copies = nn.ModuleList([CopiedBlock(PixArtBlock(1152), 1152, k == 0) for k in range(13)])
    assert count_params(branch) == 45_715_968
    # In PixArt-delta only the first copied block has a projection before it.
    copied = count_params(copies) - 12 * count_params(copies[0].before_proj)
    assert copied == 294_917_760
    assert 0.150 < count_params(branch) / copied < 0.160


def test_parameters_of_the_small_arms():
    base = TinyDiT()
    assert count_params(RelaCtrl(TinyDiT(), (0, 1), 3, multiple=16)) == 16_512
    full = RelaCtrl(
        base, range(5), None, block_factory=lambda p, first: CopiedBlock(base.blocks[p], 48, first)
    )
    assert count_params(full) == 165_360


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(48, 3, 16), (256, 6, 32), (64, 2, 32)]), st.sampled_from([1, 2, 4]))
def test_counted_flops_are_those_of_the_formula(group_options, segments):
    dim, groups, multiple = group_options
    mixer = TwoDimShuffleMixer(dim, groups, segments, multiple=multiple)
    counted = count_flops(mixer, torch.randn(1, 16, dim), torch.randn(1, 6 * dim))
    assert counted == mixer_flops(16, dim, groups, segments, multiple)


def test_counted_flops_on_the_path_of_matrix_products_and_the_two_savings():
    mixer = TwoDimShuffleMixer(64, 2)
    with sdpa_kernel(SDPBackend.MATH):
        counted = count_flops(mixer, torch.randn(1, 16, 64), torch.randn(1, 384))
    assert counted == mixer_flops(16, 64, 2)
    full = 8 * 4096 * 1152**2 + 4 * 4096**2 * 1152
    linear, attention = 8 * 4096 * 1152**2, 4 * 4096**2 * 1152
    assert mixer_flops(4096, 1152, 6) == linear // 6 + attention // 4
    assert mixer_flops(4096, 1152, 1, 1) == full


# ---------------------------------------------------------------- the controlled network


@pytest.mark.parametrize("hold_skip", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_at_the_start_the_controlled_model_is_the_base(hold_skip, training):
    base = small_base()
    model = small_control(base, hold_skip=hold_skip).train(training)
    x, t, control = batch_of()
    assert torch.equal(model(x, t, control), base(x, t))
    assert torch.equal(model(x, t, 100 * control), base(x, t))


def test_at_the_start_only_after_projections_learn():
    model = small_control(small_base())
    x, t, control = batch_of()
    model(x, t, control).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith("base."):
            assert parameter.grad is None and not parameter.requires_grad
        elif "after_proj" in name:
            assert parameter.grad.abs().sum() > 0
        else:
            assert parameter.grad is None or parameter.grad.abs().max() == 0


def test_the_network_step_by_step():
    base = small_base()
    model = fill(small_control(base, positions=(0, 1)))
    x, t, control = batch_of()
    fixed = model.draw_permutations(16)
    perms = list(zip(*fixed.values(), strict=True))
    temb, t_mod = base.time(t)
    first, second = model.controls
    h, c = base.blocks[0](base.embed(x), t_mod), base.embed(control)
    c = first.mixer(h + first.before_proj(c), t_mod, *perms[0])
    h = base.blocks[1](h + first.after_proj(c), t_mod)
    c = second.mixer(c + second.before_proj(h), t_mod, *perms[1])
    h = base.blocks[2](h + second.after_proj(c), t_mod)
    h = base.blocks[3](h, t_mod)
    torch.testing.assert_close(model(x, t, control, **fixed), base.head(h, temb))


def test_hold_skip_adds_the_last_injection_again():
    base = small_base()
    model = fill(small_control(base, positions=(0,), hold_skip=True))
    x, t, control = batch_of()
    fixed = model.draw_permutations(16)
    temb, t_mod = base.time(t)
    h, c = base.blocks[0](base.embed(x), t_mod), base.embed(control)
    perms = (fixed["channel_perms"][0], fixed["token_perms"][0])
    _, s = model.controls[0](h, c, t_mod, *perms)
    for block in base.blocks[1:]:
        h = block(h + s, t_mod)
    torch.testing.assert_close(model(x, t, control, **fixed), base.head(h, temb))


def test_skipping_drops_one_injection_and_lets_the_state_flow_on():
    base = small_base()
    model = fill(small_control(base, positions=(0, 2)))
    x, t, control = batch_of()
    fixed = model.draw_permutations(16)
    whole = model(x, t, control, **fixed)
    skipped = model(x, t, control, skip_position=0, **fixed)
    assert not torch.allclose(whole, skipped)
    silent = model.controls[0].after_proj
    nn.init.zeros_(silent.weight), nn.init.zeros_(silent.bias)
    torch.testing.assert_close(model(x, t, control, **fixed), skipped)
    # The state of the first block still matters: the second continues it.
    nn.init.zeros_(model.controls[0].mixer.table)
    assert not torch.allclose(model(x, t, control, **fixed), skipped)


def test_the_control_matters_once_projections_are_not_zero():
    model = fill(small_control(small_base()))
    x, t, control = batch_of()
    fixed = model.draw_permutations(16)
    assert not torch.allclose(model(x, t, control, **fixed), model(x, t, -control, **fixed))


def test_a_generator_serves_the_whole_network():
    model = fill(small_control(small_base()))
    x, t, control = batch_of()
    fixed = model.draw_permutations(16, torch.Generator().manual_seed(4))
    drawn = model(x, t, control, generator=torch.Generator().manual_seed(4))
    assert torch.equal(drawn, model(x, t, control, **fixed))


def test_the_base_stays_frozen_and_in_evaluation_mode():
    base = small_base()
    model = small_control(base).train()
    assert not base.training and model.controls.training
    before = {name: value.clone() for name, value in base.state_dict().items()}
    descent = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        noise_loss(model, batch_of()[0], batch_of()[2]).backward()
        descent.step()
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())


def test_a_copied_block_starts_as_the_block_it_copies_and_leaves_it_alone():
    base = small_base().requires_grad_(False)
    control = CopiedBlock(base.blocks[1], 16, first=True)
    x, c, t_mod = torch.randn(2, 16, 16), torch.randn(2, 16, 16), torch.randn(2, 96)
    state, injection = control(x, c, t_mod)
    torch.testing.assert_close(state, base.blocks[1](x, t_mod))
    assert not injection.any()
    assert all(p.requires_grad for p in control.parameters())
    assert not any(p.requires_grad for p in base.parameters())


@pytest.mark.usefixtures("plain_python")
def test_compiled_without_graph_breaks_and_under_autocast():
    model = fill(small_control(small_base()))
    x, t, control = batch_of()
    fixed = model.draw_permutations(16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(x, t, control, **fixed), model(x, t, control, **fixed), atol=1e-5, rtol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, t, control, **fixed)
        assert model.controls[0].after_proj(torch.randn(1, 2, 16)).dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(x, t, control, **fixed), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = fill(small_control(small_base())).to(dtype)
    x, t, control = (part.to(dtype) for part in batch_of())
    assert model(x, t, control).dtype == dtype


def test_state_dict_round_trip():
    model, other = fill(small_control(small_base())), small_control(small_base())
    other.load_state_dict(model.state_dict())
    x, t, control = batch_of()
    fixed = model.draw_permutations(16)
    assert torch.equal(model(x, t, control, **fixed), other(x, t, control, **fixed))


# ---------------------------------------------------------------- relevance


def test_the_worked_example_of_four_positions():
    score = relevance_score([10, 14, 12, 20], [1, 0.5, 2, 3])
    torch.testing.assert_close(score, torch.tensor([0.1, 0.2, 0.4, 1.0]))
    assert select_layers(score, 2) == [2, 3]
    assert select_layers(score, 4) == [0, 1, 2, 3]


@given(
    st.lists(st.integers(0, 1000), min_size=2, max_size=8, unique=True),
    st.randoms(use_true_random=False),
    st.floats(0.1, 10),
    st.floats(-5, 5),
)
def test_relevance_is_in_the_unit_interval_and_ignores_scale_and_offset(quality, rng, a, b):
    quality = torch.tensor(quality, dtype=torch.float64)
    error = quality[rng.sample(range(len(quality)), len(quality))]
    score = relevance_score(quality, error)
    assert score.min() >= 0 and score.max() <= 1
    torch.testing.assert_close(relevance_score(a * quality + b, error), score)
    torch.testing.assert_close(relevance_score(quality, a * error + b), score)


def test_groups_by_rank():
    eleven = torch.linspace(1, 0, 11)
    assert allocate_groups(eleven) == [2] * 3 + [4] * 3 + [6] * 5
    assert allocate_groups(eleven.flip(0)) == [6] * 5 + [4] * 3 + [2] * 3
    assert allocate_groups([0.1, 0.2, 0.4, 1.0]) == [6, 6, 4, 2]
    assert allocate_groups([1.0, 0.0]) == [6, 6]
    assert allocate_groups([0.5, 0.9, 0.1], choices=(1,)) == [1, 1, 1]


# ---------------------------------------------------------------- what users need


@pytest.mark.parametrize("hold_skip", [False, True])
def test_without_control_the_base_runs_alone(hold_skip):
    model = fill(small_control(small_base(), hold_skip=hold_skip))
    x, t, control = batch_of()
    assert torch.equal(model(x, t), model.base(x, t))
    assert torch.equal(model(x, t, None), model.base(x, t))
    assert not torch.allclose(model(x, t, control), model(x, t))


def test_whole_number_and_half_precision_times():
    model = RelaCtrl(load_tiny_dit(), (0, 2), 3, multiple=16, shuffle=False)
    fill(model)
    x, _, control = batch_of()
    whole, real = (model(x, torch.tensor([0, 1]).to(kind), control) for kind in (int, torch.float))
    assert torch.equal(whole, real)
    halves = model.bfloat16()(x.bfloat16(), torch.rand(2), control.bfloat16())
    assert halves.dtype == torch.bfloat16


@pytest.mark.parametrize("explicit", [True, False])
def test_checkpointing_changes_memory_but_neither_output_nor_gradients(explicit):
    x, t, control = batch_of()
    found = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        base = small_base()
        model = fill(small_control(base, checkpoint=checkpoint)).train()
        torch.manual_seed(4)
        draw = torch.Generator().manual_seed(5) if explicit else None
        out = model(x, t, control, generator=draw)
        out.square().sum().backward()
        found.append([out, *(p.grad for p in model.controls.parameters())])
        assert any(grad.any() for grad in found[-1][1:])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)


def official_state(model: RelaCtrl, **extra) -> dict[str, torch.Tensor]:
    """A made-up checkpoint under the names of the released one, the base's weights beside it."""
    renamed = {}
    for name in model.controls.state_dict():
        block, _, rest = name.partition(".")
        rest = rest.replace("mixer.table", "process.scale_shift_table")
        rest = rest.replace("mixer.attentions.", "process.experts_attn.")
        for part in ("qkv", "proj"):
            if "experts_attn" in rest:
                rest = rest.replace(f".{part}.", f".attn.{part}.")
        shape = model.controls.state_dict()[name].shape
        renamed[f"controlnet.{block}.{rest}"] = torch.randn(shape)
    return renamed | {"base_model.blocks.0.attn.qkv.weight": torch.zeros(3)} | extra


@pytest.mark.parametrize("wrapped", [True, False])
def test_released_names_are_mapped_and_the_base_is_left_alone(wrapped):
    model = small_control(small_base())
    before = {name: p.clone() for name, p in model.base.named_parameters()}
    state = official_state(model)
    expected = {
        "controlnet.1.process.experts_attn.0.attn.qkv.weight": model.controls[1]
        .mixer.attentions[0]
        .qkv.weight,
        "controlnet.0.process.scale_shift_table": model.controls[0].mixer.table,
        "controlnet.0.before_proj.bias": model.controls[0].before_proj.bias,
    }
    assert load_relactrl_weights(model, {"state_dict": state} if wrapped else state) is model
    assert model.hold_skip
    for name, parameter in expected.items():
        assert torch.equal(parameter, state[name]), name
    for name, parameter in model.base.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_release_has_the_shapes_of_the_published_code():
    """The whole branch at full width, without memory: 11 blocks, names as their code makes them."""
    with torch.device("meta"):
        pixart = nn.Module()
        pixart.dim, pixart.blocks = 1152, nn.ModuleList(nn.Identity() for _ in range(28))
        model = RelaCtrl(pixart, OFFICIAL_POSITIONS, OFFICIAL_GROUPS)
        state = official_state(model)
        load_relactrl_weights(model, state)
    assert state["controlnet.1.process.experts_attn.1.attn.qkv.weight"].shape == (1728, 576)
    assert state["controlnet.10.process.experts_attn.5.attn.proj.bias"].shape == (192,)
    assert sum(name.startswith("controlnet.") for name in state) == sum(
        5 + 4 * g for g in OFFICIAL_GROUPS
    )


def test_a_release_that_does_not_fit_is_refused():
    model = small_control(small_base())
    state = official_state(model)
    lost = {k: v for k, v in state.items() if k != "controlnet.1.after_proj.bias"}
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as 1\.after_proj\.bias"):
        load_relactrl_weights(model, lost)
    with pytest.raises(ValueError, match=r"has in excess 1 weights, such as 7\.mixer\.table"):
        more = {"controlnet.7.process.scale_shift_table": torch.zeros(6, 16)}
        load_relactrl_weights(model, state | more)
    with pytest.raises(ValueError, match=r"0\.mixer\.table must be \(6, 16\)"):
        wide = {"controlnet.0.process.scale_shift_table": torch.zeros(6, 32)}
        load_relactrl_weights(model, state | wide)


# ---------------------------------------------------------------- the authors' own numbers


def permutation(pair, size):
    return (pair[0] * torch.arange(size) + pair[1]) % size


def group_of_the_authors(case):
    layer = ShuffleAttention(12, case.settings["heads"], case.settings["segments"]).double()
    names = ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias")
    layer.load_state_dict({name: case.tensors[f"attn.{name}"] for name in names})
    x = case.tensors["x"].requires_grad_()
    output = layer(x, permutation(case.settings["perm"], 240))
    output.square().sum().backward()
    grads = {f"gradient w.r.t. {name}": layer.get_parameter(name).grad for name in names[:3]}
    return {"output": output, "gradient w.r.t. x": x.grad} | grads


def mixer_of_the_authors(case):
    mixer = TwoDimShuffleMixer(96, groups=2).double()
    assert mixer.sizes == case.settings["group_sizes"]
    state = {"table": case.tensors["scale_shift_table"]}
    for name in mixer.state_dict():
        if name != "table":
            group, part = name.split(".", 2)[1:]
            state[name] = case.tensors[f"experts_attn.{group}.attn.{part}"]
    mixer.load_state_dict(state)
    c, t_mod = (case.tensors[name].requires_grad_() for name in ("c", "t_mod"))
    channel_perm = permutation(case.settings["channel_perm"], 96)
    token_perms = [
        permutation(pair, 8 * size)
        for pair, size in zip(case.settings["token_perms"], mixer.sizes, strict=True)
    ]
    mixer.check_permutations(8, channel_perm, token_perms)
    output = mixer(c, t_mod, channel_perm, token_perms)
    output.square().sum().backward()
    return {
        "output": output,
        "gradient w.r.t. c": c.grad,
        "gradient w.r.t. t_mod": t_mod.grad,
        "gradient w.r.t. table": mixer.table.grad,
        "gradient w.r.t. the second group's qkv.weight": mixer.attentions[1].qkv.weight.grad,
    }


class BaseOfTheCase(nn.Module):
    """The bent linear maps that the reference case uses as a base."""

    dim = 64

    def __init__(self, tensors):
        super().__init__()
        self.tensors, self.blocks = tensors, nn.ModuleList()
        for index in range(5):
            self.blocks.append(BentBlock(tensors[f"base.{index}"]))

    def embed(self, x):
        return x

    def time(self, temb):
        return temb, temb @ self.tensors["time_to_mod"].T

    def head(self, x, temb):
        return x @ self.tensors["head"].T * (1 + temb[:, :1, None])


class BentBlock(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x, t_mod):
        return x + torch.tanh(x @ self.weight.T) * (1 + t_mod[:, None, :64])


def network_of_the_authors(case):
    base, numbers, results = BaseOfTheCase(case.tensors), case.settings, {}
    control = case.tensors["control"].requires_grad_()
    perms = {
        "channel_perms": [permutation(pair, 64) for pair in numbers["channel_perms"]],
        "token_perms": [[permutation(p, 256) for p in pairs] for pairs in numbers["token_perms"]],
    }
    for hold, name in ((False, "output, injected once"), (True, "output, injection held")):
        model = RelaCtrl(base, numbers["positions"], 2, hold).double()
        load_relactrl_weights(model, case.tensors).hold_skip = hold
        # The case's base takes an embedding for a time, and states for pictures.
        with plain_calls():
            results[name] = model(case.tensors["x"], case.tensors["temb"], control, **perms)
    results["output, injection held"].square().sum().backward()
    return results | {
        "gradient w.r.t. control": control.grad,
        "gradient w.r.t. the first block's before_proj.weight": model.controls[
            0
        ].before_proj.weight.grad,
        "gradient w.r.t. the last block's before_proj.weight": model.controls[
            2
        ].before_proj.weight.grad,
    }


@contextmanager
def plain_calls():
    """Without the run-time shape checks: a base may take other things than pictures and times."""
    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def numbers_of_the_authors(case):
    numbers = case.settings
    results = {
        f"group_sizes({dim}, {groups})": torch.tensor(group_sizes(dim, groups))
        for dim, groups in numbers["sizes"]
    }
    score = relevance_score(
        *(torch.tensor(numbers[name], dtype=torch.float64) for name in ("quality", "control_error"))
    )
    results |= {
        "relevance": score,
        "selected": torch.tensor(select_layers(score, 3)),
        "groups": torch.tensor(allocate_groups(score, (2, 4, 6))),
    }
    for length, dim, groups, pieces in numbers["cost"]:
        told = f"({length}, {dim}, {groups}, {pieces})"
        results[f"mixer_flops{told}"] = mixer_flops(length, dim, groups, pieces)
        block = RelevanceControlBlock(dim, groups, first=False)
        results[f"parameters of a block ({dim}, {groups})"] = count_params(block)
    return results


RECOMPUTE = {
    "shuffled attention of one group": group_of_the_authors,
    "mixer with two unequal groups": mixer_of_the_authors,
    "three control blocks on a base of five, injection held and not held": network_of_the_authors,
    "group sizes, relevance, cost": numbers_of_the_authors,
}


@pytest.mark.parametrize("case", [*load_reference("relactrl")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))


# ---------------------------------------------------------------- bad input


def block_of(dim: int = 64, groups: int = 2, **options) -> TwoDimShuffleMixer:
    return TwoDimShuffleMixer(dim, groups, **options)


def longs(*values: int) -> torch.Tensor:
    return torch.tensor(values)


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: shuffle_2d(torch.zeros(1, 6, 2), torch.arange(12), 4),
                "tokens must be divisible by segments 4, got 6",
            ),
            (lambda: shuffle_2d(torch.zeros(1, 4, 2), torch.arange(8), 0), "segments"),
            (
                lambda: shuffle_2d(torch.zeros(1, 4, 2), torch.arange(7)),
                r"perm must be \(8\), got shape \(7,\)",
            ),
            (lambda: shuffle_2d(torch.zeros(1, 4, 2), torch.arange(8.0)), "int64"),
            (lambda: unshuffle_2d(torch.zeros(4, 1, 2), torch.arange(8), 1, 5), r"1\*5 tokens"),
            (lambda: ShuffleAttention(10), "dim must be divisible by num_heads 4, got 10"),
            (lambda: ShuffleAttention(8)(torch.zeros(1, 4, 4)), r"x must be \(batch, length, 8\)"),
            (lambda: ShuffleAttention(8)(torch.zeros(1, 6, 8)), "divisible by segments 4, got 6"),
            (
                lambda: ShuffleAttention(8)(torch.zeros(1, 4, 8), longs(0)),
                r"perm must be \(32\), got shape \(1,\)",
            ),
            (
                lambda: ShuffleAttention(8, shuffle=False)(torch.zeros(1, 4, 8), torch.arange(32)),
                "switched off",
            ),
            (lambda: group_sizes(64, 0), "at least 1, got 0"),
            (lambda: group_sizes(64, 3), "cannot sum to dim"),
            (lambda: group_sizes(65, 2), "cannot sum to dim"),
            (lambda: block_of(64, 3), "cannot sum to dim"),
            (lambda: block_of(drop_path=1.0), "drop_path"),
            (lambda: block_of()(torch.zeros(1, 4, 32), torch.zeros(1, 384)), "c must be"),
            (
                lambda: block_of()(torch.zeros(1, 4, 64), torch.zeros(1, 64)),
                r"t_mod must be .*\(1, 384\), got shape \(1, 64\)",
            ),
            (lambda: block_of()(torch.zeros(2, 4, 64), torch.zeros(1, 384)), "t_mod"),
            (
                lambda: block_of()(torch.zeros(1, 6, 64), torch.zeros(1, 384)),
                "divisible by segments 4",
            ),
            (
                lambda: block_of()(torch.zeros(1, 4, 64), torch.zeros(1, 384), torch.arange(32)),
                r"channel_perm must be \(64\), got shape \(32,\)",
            ),
            (
                lambda: block_of()(
                    torch.zeros(1, 4, 64), torch.zeros(1, 384), None, [torch.arange(128)]
                ),
                "token_perms must hold 2 permutations, got 1",
            ),
            (
                lambda: block_of()(torch.zeros(1, 4, 64), torch.zeros(1, 384), None, []),
                "token_perms must hold 2 permutations, got 0",
            ),
            (
                lambda: block_of().check_permutations(4, torch.arange(64), []),
                "token_perms must hold 2 permutations, got 0",
            ),
            (
                lambda: block_of().check_permutations(
                    4, torch.arange(64), [torch.arange(128), longs(*[0] * 128)]
                ),
                r"token_perms\[1\] must be a permutation",
            ),
            (
                lambda: block_of().check_permutations(4, longs(*[1] * 64), []),
                "channel_perm must be a permutation",
            ),
            (
                lambda: block_of(shuffle=False)(
                    torch.zeros(1, 4, 64), torch.zeros(1, 384), torch.arange(64)
                ),
                "switched off",
            ),
            (lambda: small_control(small_base(), positions=(3,)), r"in 0..2, got \[3\]"),
            (lambda: small_control(small_base(), positions=(-1,)), "in 0..2"),
            (lambda: small_control(small_base(), positions=()), "in 0..2"),
            (lambda: small_control(small_base(), positions=(1, 1)), r"repeated, got \[1, 1\]"),
            (lambda: small_control(small_base(), positions=(1, 0)), "must increase"),
            (lambda: RelaCtrl(small_base(), (0, 1), [2], multiple=4), "groups must be one number"),
            (lambda: RelaCtrl(small_base(), (0, 1), None), "groups must be one number"),
            (
                lambda: small_control(small_base())(*batch_of(), skip_position=1),
                r"skip_position must be one of \[0, 2\], got 1",
            ),
            (
                lambda: small_control(small_base())(*batch_of(), channel_perms=[torch.arange(16)]),
                "channel_perms must hold one entry for each of 2",
            ),
            (lambda: mixer_flops(6, 64, 2), "L must be divisible by segments 4, got 6"),
            (lambda: relevance_score([1, 2], [1, 2, 3]), r"control_error must be \(2\)"),
            (lambda: relevance_score([1, 1], [1, 2]), "undefined: quality is 1"),
            (lambda: relevance_score([1, 2], [3, 3]), "undefined: control_error is 3"),
            (lambda: relevance_score([1, float("nan")], [1, 2]), "quality must be finite"),
            (lambda: relevance_score([], []), "quality must hold one number a position"),
            (lambda: select_layers([0.1, 0.2], 0), r"k must be in 1..2, got 0"),
            (lambda: select_layers([0.1, 0.2], 3), r"k must be in 1..2, got 3"),
            (lambda: allocate_groups([0.1], choices=()), "choices"),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()
