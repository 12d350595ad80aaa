"""REFace: masks and references, the condition, the differentiable chain, the loss, the swap."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.diffusion.reface import (
    FACE_IDS,
    MASK_TYPES,
    ConditionMixer,
    MaskFamily,
    OneTokenMapper,
    ddim_chain,
    ddim_coefficients,
    extend_input_layer,
    face_mask,
    id_retrieval,
    identity_loss,
    inpaint_input,
    load_reface_weights,
    make_reference,
    mix_conditions,
    noise_loss,
    perceptual_loss,
    random_offsets,
    reface_loss,
    released_table,
    swap,
    tps_warp_mask,
)
from shuffle_nb.diffusion.tiny_diffusion import (
    ddim_step,
    diffuse,
    scaled_linear_schedule,
    table_levels,
)
from shuffle_nb.foundations.costs import peak_memory
from shuffle_nb.foundations.reference import load_reference


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Oracle:
    """Knows the picture, and so the noise in whatever it is shown."""

    def __init__(self, z0, schedule=None):
        self.z0 = z0
        self.alphas_cumprod = (scaled_linear_schedule() if schedule is None else schedule).double()

    def __call__(self, z9, t, c):
        a = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (z9[:, : self.z0.shape[1]] - a.sqrt() * self.z0) / (1 - a).sqrt()


class Tiny(nn.Module):
    """A whole model of few weights: denoiser, schedule, conditions."""

    def __init__(self, channels=1, dim=4, dtype=torch.float32):
        super().__init__()
        self.register_buffer("alphas_cumprod", scaled_linear_schedule().to(dtype))
        self.mixer = ConditionMixer(dim, dim, dim, dim)
        self.net = nn.Conv2d(2 * channels + 1, channels, 3, padding=1)
        self.shift = nn.Linear(dim, channels)
        self.calls = []
        self.to(dtype)

    def forward(self, z9, t, c):
        self.calls.append(len(z9))
        level = self.alphas_cumprod[t].to(z9.dtype).view(-1, 1, 1, 1)
        return torch.tanh(self.net(z9) + level + self.shift(c)[..., None, None])

    def condition(self, ref, target):
        look, seen = (F.adaptive_avg_pool2d(x.mean(1), 2).flatten(1) for x in (ref, target))
        return self.mixer(look, seen, look, seen)

    def null_condition(self, n):
        return self.mixer.null.expand(n, -1)


def pixels(x):
    return x.flatten(1)


def batch(n=3, channels=1, size=8, dtype=torch.float32):
    x = torch.rand(n, channels, size, size, dtype=dtype) * 2 - 1
    m = torch.ones(n, 1, size, size, dtype=dtype)
    m[:, :, 2 : size - 2, 2 : size - 2] = 0
    return x, m, make_reference(x, m, augment=False)


# ---------------------------------------------------------------- input, masks


def test_nine_channels_in_their_order_and_the_mask_averaged():
    z, x = torch.randn(2, 2, 4, 8, 8)
    m = torch.ones(2, 1, 64, 64)
    m[..., :4, :8] = 0
    nine = inpaint_input(z, x, m)
    assert nine.shape == (2, 9, 8, 8)
    assert torch.equal(nine[:, :4], z) and torch.equal(nine[:, 4:8], x)
    assert nine[0, 8, 0, 0] == 0.5 and nine[0, 8, 1:].min() == 1


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 1, bias=False).double(),
        nn.Linear(4, 6),
    ],
)
def test_added_channels_start_at_zero_and_learn(layer):
    wide = extend_input_layer(layer, 5)
    shape = (3, 4, 6, 6) if isinstance(layer, nn.Conv2d) else (3, 4)
    x = torch.randn(shape, dtype=layer.weight.dtype)
    added = torch.randn(3, 5, *shape[2:], dtype=x.dtype)
    both = torch.cat([x, added], 1)
    assert torch.allclose(wide(both), layer(x), atol=1e-6)
    assert layer.weight.shape[1] == 4 and wide.weight.shape[1] == 9
    assert not wide.weight[:, 4:].any()
    wide(both).square().sum().backward()
    assert wide.weight.grad[:, 4:].abs().max() > 0
    assert "9" in repr(wide)


def test_output_at_the_start_does_not_depend_on_the_mask_input():
    model = Tiny()
    model.net = extend_input_layer(nn.Conv2d(1, 1, 3, padding=1), 2)
    x, m, ref = batch()
    cond, t = model.condition(ref, x), torch.tensor([5, 5, 5])
    outputs = [model(inpaint_input(x, kept, hole), t, cond) for kept, hole in ((x, m), (-x, 1 - m))]
    assert torch.equal(*outputs)


def test_face_mask_removes_the_given_labels_and_keeps_the_others():
    labels = torch.arange(19).reshape(1, 1, 19)
    for name, ids in MASK_TYPES.items():
        m = face_mask(labels, ids)
        assert m.shape == (1, 1, 1, 19), name
        assert m.flatten().tolist() == [0.0 if i in ids else 1.0 for i in range(19)]
    assert set(FACE_IDS) == {1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 17}
    assert set(MASK_TYPES["head"]) - set(FACE_IDS) == {3, 13, 14, 15}
    assert torch.equal(face_mask(labels), face_mask(labels, FACE_IDS))
    assert face_mask(labels, ()).min() == 1


@settings(deadline=None, max_examples=15)
@given(st.lists(st.floats(0.05, 1), min_size=1, max_size=5), st.integers(0, 100))
def test_frequencies_of_mask_types_are_the_probabilities_within_three_sigma(probs, seed):
    masks = torch.rand(len(probs), 1, 4, 4).round()
    family, n = MaskFamily(masks, probs), 4000
    m, index = family.sample(n, seeded(seed))
    assert torch.equal(m, masks[index])
    for place, prob in enumerate(probs):
        p = prob / sum(probs)
        # 3 sigma of one type; five types and fifteen draws: allow 4.5 sigma for the worst of all
        assert abs((index == place).double().mean() - p) <= 4.5 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_frequencies_of_uniform_types_stay_within_three_sigma():
    _, index = MaskFamily(torch.ones(3, 1, 2, 2)).sample(30_000, seeded())
    shares = index.bincount(minlength=3) / 30_000
    assert ((shares - 1 / 3).abs() < 3 * math.sqrt(2 / 9 / 30_000)).all()


def test_draws_take_a_generator_and_are_made_per_image():
    family = MaskFamily(torch.rand(3, 1, 4, 4), [1, 1, 0])
    state = torch.get_rng_state()
    first, second = (family.sample(50, seeded(4))[1] for _ in range(2))
    assert torch.equal(first, second) and set(first.tolist()) == {0, 1}
    assert torch.equal(torch.get_rng_state(), state)


def test_mask_family_state_dict_round_trip():
    family, other = (
        MaskFamily(torch.rand(2, 1, 3, 3), [0.9, 0.1]),
        MaskFamily(torch.rand(2, 1, 3, 3)),
    )
    other.load_state_dict(family.state_dict())
    assert torch.equal(other.masks, family.masks) and torch.equal(other.probs, family.probs)


# ---------------------------------------------------------------- thin-plate spline


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 1000))
def test_spline_without_offset_is_the_identity_and_corners_never_move(height, width, seed):
    m = torch.rand(3, 1, height, width, generator=seeded(seed), dtype=torch.float64)
    assert torch.allclose(tps_warp_mask(m, torch.zeros(3, 2)), m, atol=1e-10)
    offset = torch.rand(3, 2, generator=seeded(seed)) * 2 - 1
    bent = tps_warp_mask(m, offset)
    for row in (0, -1):
        for column in (0, -1):
            corner = (..., row, column)
            assert torch.allclose(bent[corner], m[corner], atol=1e-10)
    assert bent.min() >= 0 and bent.max() <= 1


def test_spline_moves_the_content_of_the_middle_by_the_offset():
    m = torch.zeros(1, 1, 41, 41)
    m[..., 20, 20] = 1  # a dot in the middle
    for dx, dy in ((0.2, 0.0), (0.0, -0.3), (0.25, 0.15)):
        bent = tps_warp_mask(F.max_pool2d(m, 3, 1, 1), torch.tensor([[dx, dy]]))[0, 0]
        mass = bent / bent.sum()
        x, y = (mass.sum(axis) @ torch.linspace(-1, 1, 41) for axis in (0, 1))
        # The middle point itself lands within a bump's slope of the offset.
        assert x.sign() == math.copysign(1, dx) or dx == 0
        assert abs(x - dx) < 0.1 and abs(y - dy) < 0.1


def test_the_bump_solves_the_spline_equations():
    """Against a spline solved from scratch for control points that are really moved."""
    points = torch.cartesian_prod(*[torch.tensor([-1.0, 0, 1], dtype=torch.float64)] * 2).flip(1)
    offset = torch.tensor([0.3, -0.2], dtype=torch.float64)
    squares = (points[:, None] - points).square().sum(-1)
    affine = torch.cat([torch.ones(9, 1).double(), points], 1)
    system = torch.cat(
        [
            torch.cat([torch.xlogy(squares, squares), affine], 1),
            torch.cat([affine.T, torch.zeros(3, 3).double()], 1),
        ]
    )
    wanted = torch.zeros(12, 2, dtype=torch.float64)
    wanted[:9] = points
    wanted[4] -= offset
    solution = torch.linalg.solve(system, wanted)
    ticks = torch.linspace(-1, 1, 9, dtype=torch.float64)
    places = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij")[::-1], -1)
    squares = (places[:, :, None] - points).square().sum(-1)
    basis = torch.cat([torch.xlogy(squares, squares), torch.ones(9, 9, 1).double(), places], -1)
    m = torch.rand(1, 1, 9, 9, dtype=torch.float64)
    expected = F.grid_sample(m, (basis @ solution)[None], padding_mode="border", align_corners=True)
    assert torch.allclose(tps_warp_mask(m, offset[None]), expected, atol=1e-10)


def test_offsets_have_the_stated_range_and_spread():
    offset = random_offsets(torch.ones(20_000, 1, 2, 2), seeded())
    assert offset.abs().max() <= 0.5 and offset.abs().max() > 0.45
    assert offset.mean(0).abs().max() < 0.01
    variance = (1 / 12) * (7 / 12)  # var(U) * E(s^2), s ~ U(1/2, 1)
    assert torch.allclose(offset.var(0), torch.full((2,), variance), rtol=0.05)


# ---------------------------------------------------------------- references


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(2, 12), st.integers(2, 12))
def test_reference_is_zero_exactly_where_the_mask_keeps(n, channels, height, width):
    x = torch.randn(n, channels, height, width)
    m = torch.rand(n, 1, height, width).round()
    r = make_reference(x, m, augment=False)
    assert not (r * m).any()
    assert torch.equal(r * (1 - m), x * (1 - m))
    assert make_reference(x, m, seeded()).shape == x.shape
    assert make_reference(x, m, seeded(), size=5).shape == (n, channels, 5, 5)


def test_without_strength_the_augmentation_is_the_identity_or_the_mirror():
    x, m, cut = batch(200, 2)
    options = dict(degrees=0.0, p_blur=0.0, p_elastic=0.0)
    still = make_reference(x, m, seeded(), flip=False, **options)
    assert torch.allclose(still, cut, atol=1e-4)
    maybe = make_reference(x, m, seeded(), **options)
    mirrored = torch.tensor(
        [torch.allclose(a, b.flip(-1), atol=1e-4) for a, b in zip(maybe, cut, strict=True)]
    )
    same = torch.tensor([torch.allclose(a, b, atol=1e-4) for a, b in zip(maybe, cut, strict=True)])
    assert (same ^ mirrored).all()
    assert abs(mirrored.float().mean() - 0.5) < 0.12


@pytest.mark.parametrize(("height", "width"), [(33, 33), (33, 65)])
def test_rotation_keeps_distances_on_pictures_of_any_shape(height, width):
    x = torch.zeros(40, 1, height, width)
    x[..., height // 2, width // 2 + 12] = 1
    turned = make_reference(
        F.max_pool2d(x, 3, 1, 1), 0 * x, seeded(), flip=False, p_blur=0.0, p_elastic=0.0
    )
    mass = turned / turned.sum((2, 3), keepdim=True)
    rows = (mass.sum(3) @ (torch.arange(height) - height // 2.0)).flatten()
    columns = (mass.sum(2) @ (torch.arange(width) - width // 2.0)).flatten()
    assert torch.allclose(
        (rows.square() + columns.square()).sqrt(), torch.full((40,), 12.0), atol=0.2
    )
    degrees = torch.rad2deg(torch.atan2(rows, columns)).abs()
    assert degrees.max() <= 20.5 and degrees.max() > 15


def test_blur_and_bend_touch_their_share_of_the_pictures():
    x, m, cut = batch(400, 1, 16)
    for options in (dict(p_blur=0.3, p_elastic=0.0), dict(p_blur=0.0, p_elastic=0.3)):
        r = make_reference(x, m, seeded(1), flip=False, degrees=0.0, **options)
        touched = ((r - cut).abs().amax((1, 2, 3)) > 1e-3).float().mean()
        assert abs(touched - 0.3) < 0.08


def test_augmentation_is_drawn_per_picture_from_the_generator_alone():
    x = torch.rand(1, 1, 9, 9).expand(6, -1, -1, -1)
    m = torch.zeros(6, 1, 9, 9)
    state = torch.get_rng_state()
    first, second = (make_reference(x, m, seeded(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    assert len({tuple(r.flatten().tolist()) for r in first}) == 6


# ---------------------------------------------------------------- condition


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(0, 20), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.1),
    st.floats(0.1, 10),
    st.integers(0, 2),
)
def test_mean_is_the_formula_ignores_a_common_factor_and_is_linear(weights, factor, which):
    features = list(torch.randn(3, 4, 5, dtype=torch.float64))
    c = mix_conditions(features, weights)
    by_hand = sum(w * f for w, f in zip(weights, features, strict=True)) / sum(weights)
    assert torch.allclose(c, by_hand)
    assert torch.allclose(mix_conditions(features, [factor * w for w in weights]), c)
    added = torch.randn(4, 5, dtype=torch.float64)
    more = [f + 3 * added if i == which else f for i, f in enumerate(features)]
    expected = c + 3 * weights[which] / sum(weights) * added
    assert torch.allclose(mix_conditions(more, weights), expected)


def test_one_hot_weights_return_exactly_that_branch():
    features = [torch.full((2, 3), torch.nan), torch.randn(2, 3), torch.full((2, 3), torch.inf)]
    assert torch.equal(mix_conditions(features, (0, 1, 0)), features[1])
    assert torch.equal(mix_conditions(features, (0, 7, 0)), features[1])


def test_mixer_is_the_formula_with_separate_heads():
    mixer = ConditionMixer(6, 5, 4, 3, mapper=OneTokenMapper(6, depth=2))
    parts = [torch.randn(2, width) for width in (6, 6, 5, 4)]
    f, g = mixer.mapper(parts[0]), mixer.mapper(parts[1])
    look = f @ mixer.source.weight.T + mixer.source.bias + g @ mixer.target.weight.T
    look = look + mixer.target.bias
    points = F.linear(parts[3], mixer.landmarks.weight, mixer.landmarks.bias)
    expected = (look + 10 * mixer.identity(parts[2]) + 0.05 * points) / 11.05
    assert torch.allclose(mixer(*parts), expected, atol=1e-6)
    assert torch.equal(mixer(*parts, weights=(0, 1, 0)), mixer.identity(parts[2]))
    assert mixer.source is not mixer.target and mixer.weights == (1.0, 10.0, 0.05)


def test_dropping_replaces_whole_conditions_at_the_stated_rate_in_training_only():
    mixer = ConditionMixer(2, 2, 2, 3)
    with torch.no_grad():
        mixer.null.fill_(9)
    cond = torch.randn(5000, 3)
    dropped = (mixer.drop(cond, seeded()) == 9).all(1)
    assert abs(dropped.float().mean() - 0.2) < 3 * math.sqrt(0.16 / 5000)
    kept = mixer.drop(cond, seeded())[~dropped]
    assert torch.equal(kept, cond[~dropped])
    assert mixer.eval().drop(cond) is cond
    mixer.train().drop(cond, seeded()).sum().backward()
    assert (mixer.null.grad == dropped.sum()).all()


def test_mapper_is_a_transformer_on_one_token():
    """Attention of one token to itself is out(value(x)), whatever queries and keys say."""
    mapper, x = OneTokenMapper(8, depth=2), torch.randn(3, 8)
    for weight in mapper.parameters():
        nn.init.normal_(weight, std=0.3)
    found = x
    for layer in mapper.layers:
        value = layer.norm1(found) @ layer.self_attn.in_proj_weight[16:].T
        value = value + layer.self_attn.in_proj_bias[16:]
        found = found + layer.self_attn.out_proj(value)
        found = found + layer.linear2(F.gelu(layer.linear1(layer.norm2(found))))
    torch.testing.assert_close(mapper(x), mapper.norm(found))
    torch.testing.assert_close(mapper.eval()(x), mapper.norm(found))
    assert len(OneTokenMapper(8).layers) == 5


def test_mixer_state_dict_round_trip():
    mixer, other = (ConditionMixer(3, 3, 3, 3, mapper=OneTokenMapper(3, 1)) for _ in range(2))
    other.load_state_dict(mixer.state_dict())
    parts = torch.randn(4, 2, 3)
    assert torch.equal(mixer(*parts), other(*parts))


# ---------------------------------------------------------------- schedule and chain


def test_schedule_is_the_product_of_the_increments():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    assert torch.allclose(scaled_linear_schedule().double(), expected, rtol=1e-6)
    assert scaled_linear_schedule()[-1].item() == pytest.approx(0.00466, abs=1e-5)


def test_the_papers_four_steps():
    schedule = scaled_linear_schedule()
    t, a_t, a_prev = ddim_coefficients(schedule, 4, 999)
    assert t.tolist() == [999, 749, 499, 249]
    assert torch.equal(a_t, schedule[t])
    assert torch.equal(a_prev, torch.cat([schedule[[749, 499, 249]], torch.ones(1)]))


@settings(deadline=None)
@given(st.integers(1, 1000), st.data())
def test_the_grid_falls_is_even_and_ends_at_the_clean_picture(num_times, data):
    t_start = data.draw(st.integers(0, num_times - 1))
    steps = data.draw(st.integers(1, t_start + 1))
    schedule = torch.linspace(0.999, 0.01, num_times) if num_times > 1 else torch.tensor([0.5])
    t, a_t, a_prev = ddim_coefficients(schedule, steps, t_start)
    grid = torch.linspace(t_start, -1, steps + 1, dtype=torch.float64)[:-1]
    assert t[0] == t_start and (t.diff() < 0).all() and t.min() >= 0
    assert (t - grid).abs().max() <= 0.5 + 1e-9
    assert a_prev[-1] == 1 and torch.equal(a_prev[:-1], a_t[1:])


def test_all_times_are_visited_with_as_many_steps():
    t, _, _ = ddim_coefficients(scaled_linear_schedule(), 1000, 999)
    assert torch.equal(t, torch.arange(999, -1, -1))


@pytest.mark.parametrize("steps", [1, 2, 4, 7, 50, 1000])
def test_with_the_true_noise_every_estimate_is_the_picture(steps):
    z0 = torch.rand(2, 3, 4, 4, dtype=torch.float64) * 2 - 1
    oracle = Oracle(z0)
    start = torch.randn_like(z0)
    estimates = ddim_chain(oracle, start, z0[:, :1], None, steps)
    assert estimates.shape == (steps, 2, 3, 4, 4)
    assert (estimates - z0).abs().max() < 1e-5


def test_noise_that_is_really_there_comes_off_in_one_step():
    z0, noise = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    a = scaled_linear_schedule().double()[700]
    z = a.sqrt() * z0 + (1 - a).sqrt() * noise
    stepped, estimate = ddim_step(z, noise, a, 0.5)
    assert torch.allclose(estimate, z0)
    assert torch.allclose(stepped, 0.5**0.5 * z0 + 0.5**0.5 * noise)


def test_one_step_is_the_one_step_estimate_and_the_last_estimate_the_sample():
    model, (x, m, ref) = Tiny(), batch()
    extra, cond = torch.cat([x * m, m], 1), model.condition(ref, x)
    noise = torch.randn_like(x)
    eps = model(torch.cat([noise, extra], 1), torch.full((3,), 999), cond)
    a = model.alphas_cumprod[-1]
    by_hand = (noise - (1 - a).sqrt() * eps) / a.sqrt()
    assert torch.allclose(ddim_chain(model, noise, extra, cond, 1)[0], by_hand, atol=1e-6)
    estimates = ddim_chain(model, noise, extra, cond, 5)
    assert torch.equal(estimates[-1], ddim_chain(model, noise, extra, cond, 5, return_all=False))
    assert torch.equal(estimates, ddim_chain(model, noise, extra, cond, 5))  # no dice


def test_the_chain_tells_the_network_the_times_of_its_own_table():
    told = []

    def model(z9, t, c):
        told.append(t.tolist())
        return z9[:, :1]

    table = ddim_coefficients(scaled_linear_schedule(), 4, 999)
    ddim_chain(model, torch.randn(2, 1, 2, 2), torch.zeros(2, 2, 2, 2), None, 4, table=table)
    assert told == [[999] * 2, [749] * 2, [499] * 2, [249] * 2]


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradcheck_of_the_chain(checkpoint):
    model = Tiny(dtype=torch.float64)
    z = torch.randn(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    extra = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    cond = torch.randn(1, 4, dtype=torch.float64, requires_grad=True)
    weight = model.net.weight

    def chain(z, extra, cond, weight):
        def run(z9, t, c):
            level = model.alphas_cumprod[t].view(-1, 1, 1, 1)
            mixed = F.conv2d(z9, weight, model.net.bias, padding=1)
            return torch.tanh(mixed + level + model.shift(c)[..., None, None])

        table = ddim_coefficients(model.alphas_cumprod, 3, 999)
        return ddim_chain(run, z, extra, cond, 3, checkpoint=checkpoint, table=table)

    assert torch.autograd.gradcheck(chain, (z, extra, cond, weight))


def test_recomputing_changes_memory_but_not_gradients():
    model = Tiny()
    model.net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 1, 3, padding=1)
    )
    x, m, ref = batch(8, size=16)
    extra, cond = torch.cat([x * m, m], 1), model.condition(ref, x).detach()
    gradients, memory = [], {}
    for checkpoint in (False, True):
        model.zero_grad()
        ddim_chain(model, x, extra, cond, 6, checkpoint=checkpoint).square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.net.parameters()]))
        for steps in (3, 6):
            memory[checkpoint, steps] = peak_memory(
                lambda z, s=steps, again=checkpoint: ddim_chain(
                    model, z, extra, cond, s, checkpoint=again
                ),
                x,
                backward=True,
            )
    assert torch.allclose(*gradients, atol=1e-6)
    assert memory[False, 6] > 1.6 * memory[False, 3]
    assert memory[True, 6] < 1.2 * memory[True, 3]
    assert memory[True, 6] < 0.6 * memory[False, 6]


def test_without_gradients_the_chain_keeps_nothing():
    model, (x, m, ref) = Tiny(), batch()
    extra, cond = torch.cat([x * m, m], 1), model.condition(ref, x).detach()
    with torch.no_grad():
        for checkpoint in (False, True):
            chain = ddim_chain(model, x, extra, cond, 4, checkpoint=checkpoint)
            assert not chain.requires_grad


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}])
def test_chain_compiles_without_graph_breaks(options):
    net = nn.Conv2d(3, 1, 3, padding=1)
    table = ddim_coefficients(scaled_linear_schedule(), 4, 999)

    def model(z9, t, c):
        return torch.tanh(net(z9) + c.mean(-1).view(-1, 1, 1, 1) + t.view(-1, 1, 1, 1) / 1000)

    def chain(z, extra, cond):
        return ddim_chain(model, z, extra, cond, 4, table=table, **options)

    inputs = torch.randn(2, 1, 4, 4), torch.randn(2, 2, 4, 4), torch.randn(2, 4)
    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    results = []
    for run in (chain, compiled):
        net.zero_grad()
        out = run(*inputs)
        out.square().sum().backward()
        results.append((out.detach(), net.weight.grad.clone()))
    for plain, fast in zip(*results, strict=True):
        assert torch.allclose(plain, fast, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("plain_python")
def test_chain_with_its_own_table_compiles_too():
    model, (x, m, ref) = Tiny(), batch(2)
    model.calls = type("Deaf", (), {"append": lambda self, n: None})()
    extra, cond = torch.cat([x * m, m], 1), model.condition(ref, x).detach()
    compiled = torch.compile(
        lambda z: ddim_chain(model, z, extra, cond, 3), fullgraph=True, backend="aot_eager"
    )
    assert torch.allclose(compiled(x), ddim_chain(model, x, extra, cond, 3), rtol=1e-4, atol=1e-4)


def test_chain_and_loss_under_autocast_stay_close_and_keep_float32_states():
    model, (x, m, ref) = Tiny(), batch()
    extra, cond = torch.cat([x * m, m], 1), model.condition(ref, x).detach()
    exact = ddim_chain(model, x, extra, cond, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = ddim_chain(model, x, extra, cond, 4)
        loss = reface_loss(model, pixels, x, m, ref, model.condition, generator=seeded())
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert loss["total"].isfinite()
    loss["total"].backward()


# ---------------------------------------------------------------- loss


def test_noise_loss_is_the_squared_error_and_zero_for_the_true_noise():
    z0 = torch.rand(5, 2, 4, 4, dtype=torch.float64)
    oracle = Oracle(z0)
    assert noise_loss(oracle, z0, z0, None, seeded()) < 1e-12

    seen = []

    def silent(z9, t, c):
        seen.append(t)
        return torch.zeros_like(z9[:, :2])

    silent.alphas_cumprod = oracle.alphas_cumprod
    z0 = torch.zeros(4000, 2, 1, 1, dtype=torch.float64)
    assert noise_loss(silent, z0, z0, None, seeded()) == pytest.approx(1, abs=0.06)
    assert seen[0].min() >= 0 and seen[0].max() <= 999
    assert abs(seen[0].double().mean() - 499.5) < 20


def test_identity_loss_by_hand_and_without_a_region():
    estimates = torch.randn(3, 2, 1, 4, 4)
    m = torch.ones(2, 1, 4, 4)
    assert identity_loss(pixels, estimates, m, torch.randn(2, 16)) == 0
    m[:, :, 1:3, 1:3] = 0
    identity = torch.randn(2, 16)
    by_hand = torch.stack(
        [
            1 - F.cosine_similarity(pixels(estimate * (1 - m)), identity, dim=1)
            for estimate in estimates
        ]
    )
    assert torch.allclose(identity_loss(pixels, estimates, m, identity), by_hand.mean())
    m[0] = 1  # one sample without a hole counts 0
    expected = by_hand[:, 1].sum() / by_hand.numel()
    assert torch.allclose(identity_loss(pixels, estimates, m, identity), expected)


def test_identity_is_measured_in_the_hole_only():
    x, m, ref = batch()
    outside = x + m * torch.randn_like(x)
    first, second = (identity_loss(pixels, e[None], m, pixels(ref)) for e in (x, outside))
    assert torch.equal(first, second)
    assert first < 1e-6


def test_perceptual_loss_averages_estimates_and_three_sizes():
    estimates, x = torch.randn(4, 2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    terms = [
        F.mse_loss(F.avg_pool2d(e, 2**i) if i else e, F.avg_pool2d(x, 2**i) if i else x)
        for e in estimates
        for i in range(3)
    ]
    assert len(terms) == 12
    assert torch.allclose(perceptual_loss(estimates, x), torch.stack(terms).mean())
    assert perceptual_loss(x[None], x) == 0
    shapes = []

    def count(a, b):
        shapes.append((a.shape, b.shape))
        return (a - b).abs().mean((1, 2, 3))

    perceptual_loss(estimates, x, count)
    assert [a[-1] for a, _ in shapes] == [8, 4, 2] and all(a == b for a, b in shapes)


def test_own_reference_and_perfect_network_give_identity_loss_zero():
    x, m, ref = batch(4, 2, dtype=torch.float64)
    losses = reface_loss(
        Oracle(x), pixels, x, m, ref, lambda r, t: None, swap_refs=False, generator=seeded()
    )
    assert losses["id"] < 1e-12 and losses["perc"] < 1e-12 and losses["eps"] < 1e-12
    swapped = reface_loss(Oracle(x), pixels, x, m, ref, lambda r, t: None, generator=seeded())
    assert swapped["id"] > 0.1


def test_the_chain_starts_from_the_picture_noised_to_the_last_time():
    model, (x, m, ref) = Tiny(), batch(dtype=torch.float64)
    starts = []

    def told(z9, t, c):
        starts.append((z9[:, :1], t))
        return z9[:, :1]

    told.alphas_cumprod = model.alphas_cumprod.double()
    for shown in (x, -x):  # the same noise on another picture
        given = (pixels, shown, m, ref, lambda ref, target: None, 2)
        reface_loss(told, *given, generator=seeded())
    (first, t), (second, _) = starts[1], starts[4]  # the noise term asks once before the chain
    assert t.tolist() == [999] * 3
    last = told.alphas_cumprod[-1]
    torch.testing.assert_close(first - second, 2 * last.sqrt() * x)
    assert (first + second).std().item() / 2 == pytest.approx((1 - last).sqrt().item(), rel=0.15)


def test_defaults_are_the_papers():
    def defaults(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in parameters if p.default is not p.empty}

    loss, sampler, reference = (defaults(f) for f in (reface_loss, swap, make_reference))
    assert (loss["steps"], loss["w_id"], loss["w_perc"]) == (4, 0.3, 0.1)
    assert loss["swap_refs"] is True
    assert (sampler["steps"], sampler["guidance"], sampler["paste"]) == (50, 3.5, False)
    strengths = {name: reference[name] for name in ("flip", "degrees", "p_blur", "p_elastic")}
    assert strengths == {"flip": True, "degrees": 20.0, "p_blur": 0.3, "p_elastic": 0.3}
    assert defaults(ConditionMixer)["p_drop"] == 0.2


def test_loss_is_the_weighted_sum_and_shows_its_terms():
    model, (x, m, ref) = Tiny(), batch(4)
    options = dict(generator=seeded())
    parts = reface_loss(model, pixels, x, m, ref, model.condition, 3, 0.7, 0.2, **options)
    assert set(parts) == {"total", "eps", "id", "perc"}
    total = parts["eps"] + 0.7 * parts["id"] + 0.2 * parts["perc"]
    assert torch.allclose(parts["total"], total)
    assert parts["total"].requires_grad and not parts["id"].requires_grad
    model.calls.clear()
    reface_loss(model, pixels, x, m, ref, model.condition, 3, 0.7, 0.2)
    assert model.calls == [4, 4, 4, 4]  # 1 + S passes


def test_chain_gets_the_references_of_other_pictures_in_reverse_order():
    model, (x, m, ref) = Tiny(), batch(4)
    asked = []

    def cond_fn(ref, target):
        asked.append((ref, target))
        return model.condition(ref, target)

    wanted = []

    def id_net(pictures):
        wanted.append(pictures)
        return pixels(pictures)

    reface_loss(model, id_net, x, m, ref, cond_fn, 2, sub=3)
    assert torch.equal(asked[0][0], ref) and torch.equal(asked[0][1], x)
    assert torch.equal(asked[1][0], ref[:3].flip(0)) and torch.equal(asked[1][1], x[:3])
    assert torch.equal(wanted[0], ref[:3].flip(0))  # phi(r'), then all estimates at once
    assert wanted[1].shape == (6, 1, 8, 8)


def test_loss_on_a_part_of_the_batch_and_without_a_chain():
    model, (x, m, ref) = Tiny(), batch(6)
    reface_loss(model, pixels, x, m, ref, model.condition, 2, sub=2)
    assert model.calls == [6, 2, 2]
    model.calls.clear()
    plain = reface_loss(model, pixels, x, m, ref, model.condition, w_id=0.0, w_perc=0.0)
    assert model.calls == [6]
    assert plain["id"] == 0 and torch.equal(plain["total"], plain["eps"])


def test_no_hole_and_nothing_but_a_hole():
    model, (x, m, ref) = Tiny(), batch()
    ones = reface_loss(model, pixels, x, 0 * m + 1, ref, model.condition)
    assert ones["id"] == 0 and ones["total"].isfinite()
    zeros = reface_loss(model, pixels, x, 0 * m, x, model.condition)
    assert zeros["id"] > 0 and zeros["total"].isfinite()
    shown = []

    def model_of_noise(z9, t, c):
        shown.append(z9)
        return z9[:, :1]

    model_of_noise.alphas_cumprod = model.alphas_cumprod
    reface_loss(model_of_noise, pixels, x, 0 * m, x, lambda r, t: None)
    assert not any(z9[:, 1:].any() for z9 in shown)  # pure generation: nothing of x is shown


def test_conditions_are_dropped_in_the_noise_term_only():
    model, (x, m, ref) = Tiny(), batch()
    seen = []
    forward = model.forward
    model.forward = lambda z9, t, c: seen.append(c) or forward(z9, t, c)
    model.drop_condition = lambda c, generator: torch.zeros_like(c)
    reface_loss(model, pixels, x, m, ref, model.condition, 2)
    assert not seen[0].any() and seen[1].any() and seen[2].any()


def test_latent_space_encodes_the_picture_and_decodes_every_estimate_once():
    model, (x, m, ref) = Tiny(channels=4), batch(3, 1, 8)
    calls = []

    def encode(x):
        calls.append(("encode", tuple(x.shape)))
        return F.pixel_unshuffle(x, 2)

    def decode(z):
        calls.append(("decode", tuple(z.shape)))
        return F.pixel_shuffle(z, 2)

    model.encode, model.decode = encode, decode
    losses = reface_loss(model, pixels, x, m, ref, model.condition, 3)
    losses["total"].backward()
    assert calls == [("encode", (3, 1, 8, 8))] * 2 + [("decode", (9, 4, 4, 4))]
    calls.clear()
    out = swap(model, x, x.flip(0), m, 3)
    assert out.shape == (3, 1, 8, 8)
    assert calls == [("encode", (3, 1, 8, 8)), ("decode", (3, 4, 4, 4))]


def test_every_weight_learns_and_the_generator_decides_everything():
    model, (x, m, ref) = Tiny(), batch(4)
    state = torch.get_rng_state()
    first, second = (
        reface_loss(model, pixels, x, m, ref, model.condition, generator=seeded(7))["total"]
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    first.backward()
    for name, weight in model.named_parameters():
        assert name == "mixer.null" or weight.grad.abs().max() > 0, name


def test_loss_passes_its_options_to_the_chain():
    model, (x, m, ref) = Tiny(), batch(4)
    table = ddim_coefficients(model.alphas_cumprod, 4, 999)
    values, gradients = [], []
    for chosen in ({}, {"checkpoint": True, "table": table}):
        model.zero_grad()
        loss = reface_loss(
            model, pixels, x, m, ref, model.condition, generator=seeded(1), **chosen
        )["total"]
        loss.backward()
        values.append(loss.detach())
        gradients.append(model.net.weight.grad.clone())
    assert torch.allclose(*values)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a row for each of 3 steps, got 4"):
        reface_loss(model, pixels, x, m, ref, model.condition, 3, table=table)


def test_autocast_does_not_round_the_places_that_pixels_are_read_from():
    x, m, _ = batch(4, size=64)
    offset = torch.rand(4, 2) - 0.5
    exact = tps_warp_mask(m, offset), make_reference(x, m, seeded())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = tps_warp_mask(m, offset), make_reference(x, m, seeded())
    for ours, wanted in zip(rough, exact, strict=True):
        torch.testing.assert_close(ours.float(), wanted)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_bends_and_references_compile_without_graph_breaks(backend):
    m, offset = (torch.rand(2, 1, 9, 12) > 0.5).float(), torch.rand(2, 2) - 0.5
    torch.compiler.reset()
    bend = torch.compile(tps_warp_mask, fullgraph=True, backend=backend)
    torch.testing.assert_close(bend(m, offset), tps_warp_mask(m, offset), rtol=1e-4, atol=1e-4)
    twist = torch.compile(make_reference, fullgraph=True, backend=backend)
    assert twist(m, m).shape == m.shape


@pytest.mark.usefixtures("plain_python")
def test_whole_loss_compiles_without_graph_breaks():
    model, (x, m, ref) = Tiny(), batch(4)
    model.calls = type("Deaf", (), {"append": lambda self, n: None})()
    table = ddim_coefficients(model.alphas_cumprod, 2, 999)

    def loss(x, m, ref):
        return reface_loss(model, pixels, x, m, ref, model.condition, 2, table=table)["total"]

    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, m, ref)
    value.backward()
    assert value.isfinite() and model.net.weight.grad.isfinite().all()


# ---------------------------------------------------------------- swap and retrieval


@pytest.mark.parametrize(("guidance", "evaluations"), [(1.0, 20), (3.5, 40)])
def test_swap_evaluates_the_denoiser_once_a_step_twice_with_guidance(guidance, evaluations):
    model, (x, m, _) = Tiny(), batch()
    swap(model, x.flip(0), x, m, 20, guidance)
    assert sum(model.calls) / len(x) == evaluations
    model.calls.clear()
    swap(model, x.flip(0), x, m, guidance=guidance)
    assert sum(model.calls) / len(x) == (50 if guidance == 1 else 100)


def test_guidance_is_the_extrapolation_from_null_to_condition():
    model, (x, m, _) = Tiny(), batch()
    with torch.no_grad():
        model.mixer.null.copy_(torch.randn(4))
    noise = torch.randn(x.shape, generator=seeded(2))
    cond = model.condition(make_reference(x.flip(0), m, augment=False), x)
    z9, t = inpaint_input(noise, x * m, m), torch.full((3,), 999)
    with_cond, without = model(z9, t, cond), model(z9, t, model.null_condition(3))
    a = model.alphas_cumprod[-1]
    _, expected = ddim_step(noise, without + 3.5 * (with_cond - without), a, 1.0)
    result = swap(model, x.flip(0), x, m, 1, 3.5, generator=seeded(2))
    assert torch.allclose(result, expected, rtol=1e-4, atol=1e-4)
    unguided = swap(model, x.flip(0), x, m, 1, 1.0, generator=seeded(2))
    assert torch.allclose(unguided, ddim_step(noise, with_cond, a, 1.0)[1], rtol=1e-4, atol=1e-4)


def test_swap_is_repeatable_pastes_on_request_and_uses_the_sources_own_mask():
    model, (x, m, _) = Tiny(), batch()
    first, second = (swap(model, x.flip(0), x, m, 5, generator=seeded()) for _ in range(2))
    assert torch.equal(first, second) and not first.requires_grad
    pasted = swap(model, x.flip(0), x, m, 5, paste=True, generator=seeded())
    assert torch.equal(pasted, m * x + (1 - m) * first)
    assert not torch.equal(first * m, x * m)
    other = swap(model, x.flip(0), x, m, 5, generator=seeded(), source_mask=0 * m)
    assert not torch.equal(first, other)


def test_what_lies_outside_the_sources_hole_does_not_matter():
    model, (x, m, _) = Tiny(), batch()
    source = torch.randn_like(x)
    changed = source + m * torch.randn_like(x)
    results = [swap(model, s, x, m, 3, generator=seeded()) for s in (source, changed)]
    assert torch.equal(*results)


def test_a_perfect_network_restores_the_target_from_pure_noise():
    x, m, _ = batch(dtype=torch.float64)
    oracle = Oracle(x)
    oracle.condition = lambda ref, target: torch.zeros(len(ref), 1)
    assert torch.allclose(swap(oracle, x, x, m, 7, 1.0, generator=seeded()), x, atol=1e-8)


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 8), st.integers(0, 100))
def test_retrieval_finds_the_nearest_by_cosine_and_all_of_them_at_last(people, seed):
    gallery = F.normalize(torch.randn(people, 16, generator=seeded(seed)), dim=1)
    truth = torch.randint(people, (30,), generator=seeded(seed))
    assert id_retrieval(5 * gallery[truth], 0.1 * gallery, truth) == 1
    noisy = torch.randn(30, 16, generator=seeded(seed + 1))
    shares = [id_retrieval(noisy, gallery, truth, k) for k in range(1, people + 1)]
    assert shares == sorted(shares) and shares[-1] == 1
    nearest = F.cosine_similarity(noisy[:, None], gallery[None], dim=-1).argmax(1)
    assert shares[0] == pytest.approx((nearest == truth).float().mean().item())


# ---------------------------------------------------------------- what users need


def test_swap_takes_another_time_grid_and_the_released_one_is_there():
    t, a_t, a_prev = released_table(scaled_linear_schedule(), 50)
    assert t.tolist() == list(range(981, 0, -20))
    assert torch.equal(a_prev[:-1], a_t[1:])
    assert a_prev[-1] == scaled_linear_schedule()[0]
    x, m, _ = batch()
    model, told = Tiny(), []
    model.register_forward_pre_hook(lambda module, args: told.append(int(args[1][0])))
    ours = swap(
        model, x, x, m, 50, 1.0, generator=seeded(), table=released_table(model.alphas_cumprod)
    )
    assert told == t.tolist()
    usual = swap(model, x, x, m, 50, 1.0, generator=seeded())
    assert not torch.allclose(ours, usual)
    assert torch.equal(
        usual,
        swap(
            model, x, x, m, 50, 1.0, generator=seeded(),
            table=ddim_coefficients(model.alphas_cumprod, 50, 999),
        ),
    )  # fmt: skip


def official_state(width: int = 8, depth: int = 5) -> dict[str, torch.Tensor]:
    """A made-up checkpoint under the names of the released one, with what is left alone."""
    state = {
        "learnable_vector": torch.randn(1, 1, width),
        "model.diffusion_model.input_blocks.0.0.weight": torch.randn(320, 9, 3, 3),
        "model.diffusion_model.out.2.bias": torch.randn(4),
        "first_stage_model.decoder.conv_in.weight": torch.randn(4, 4),
        "cond_stage_model.model.logit_scale": torch.randn(()),
        "cond_stage_model.mapper.resblocks.0.ln_1.weight": torch.randn(1024),
        "face_ID_model.facenet.input_layer.0.weight": torch.randn(2),
        "betas": torch.randn(3),
    }
    shapes = {
        "proj_out_source": (width, width),
        "proj_out_target": (width, width),
        "ID_proj_out": (width, 6),
        "landmark_proj_out": (width, 10),
        "cond_stage_model.final_ln2": (width,),
    }
    for block in range(depth):
        name = f"cond_stage_model.mapper2.resblocks.{block}"
        shapes |= {
            f"{name}.ln_1": (width,),
            f"{name}.ln_2": (width,),
            f"{name}.attn.c_qkv": (3 * width, width),
            f"{name}.attn.c_proj": (width, width),
            f"{name}.mlp.c_fc": (4 * width, width),
            f"{name}.mlp.c_proj": (width, 4 * width),
        }
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return state


def released_mapper(state, z, depth=5):
    """Their one-token Transformer, with softmax over the single token."""

    def linear(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    for block in range(depth):
        name = f"cond_stage_model.mapper2.resblocks.{block}"
        q, k, v = linear(f"{name}.attn.c_qkv", norm(f"{name}.ln_1", z)).chunk(3, -1)
        weights = (q[:, :, None] @ k[:, :, None].mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, 0]
        z = z + linear(f"{name}.attn.c_proj", weights * v)
        z = z + linear(
            f"{name}.mlp.c_proj", F.gelu(linear(f"{name}.mlp.c_fc", norm(f"{name}.ln_2", z)))
        )
    return norm("cond_stage_model.final_ln2", z)


@pytest.mark.parametrize("wrapped", [True, False])
def test_released_conditioning_is_loaded_under_its_official_names(wrapped):
    mixer, state = ConditionMixer(8, 6, 10, 8, mapper=OneTokenMapper(8)), official_state()
    rest = load_reface_weights(mixer, {"state_dict": state} if wrapped else state)
    assert sorted(rest) == ["input_blocks.0.0.weight", "out.2.bias"]
    assert torch.equal(mixer.identity.weight, state["ID_proj_out.weight"])
    assert torch.equal(mixer.landmarks.bias, state["landmark_proj_out.bias"])
    assert torch.equal(mixer.source.weight, state["proj_out_source.weight"])
    assert torch.equal(mixer.target.weight, state["proj_out_target.weight"])
    assert torch.equal(mixer.null, state["learnable_vector"][0, 0])
    z = torch.randn(3, 8)
    torch.testing.assert_close(mixer.mapper(z), released_mapper(state, z[:, None])[:, 0])


def test_a_release_that_does_not_fit_is_refused():
    mixer, state = ConditionMixer(8, 6, 10, 8, mapper=OneTokenMapper(8)), official_state()
    with pytest.raises(ValueError, match=r"lacks 1 weights, such as source\.bias"):
        load_reface_weights(mixer, {k: v for k, v in state.items() if k != "proj_out_source.bias"})
    with pytest.raises(ValueError, match="has in excess 12 weights"):
        load_reface_weights(mixer, official_state(depth=6))
    with pytest.raises(ValueError, match=r"identity\.weight must be \(8, 6\)"):
        load_reface_weights(mixer, state | {"ID_proj_out.weight": torch.zeros(8, 7)})


def test_the_released_sizes_fit():
    with torch.device("meta"):
        mixer = ConditionMixer(768, 512, 136, 768, mapper=OneTokenMapper(768))
    shapes = {name: tuple(p.shape) for name, p in mixer.state_dict().items()}
    assert shapes["identity.weight"] == (768, 512) and shapes["landmarks.weight"] == (768, 136)
    assert shapes["mapper.layers.4.linear2.weight"] == (768, 3072)


# ---------------------------------------------------------------- the authors' own numbers


class Bent:
    """The toy network of the reference cases."""

    alphas_cumprod = scaled_linear_schedule().double()

    def __init__(self, null=None):
        self.null = null

    def __call__(self, z9, t, c):
        z, masked, m = z9[:, :4], z9[:, 4:8], z9[:, 8:9]
        wave = 0.9 * torch.tanh(z + 0.5 * masked) + 0.2 * m - 0.3 * t.view(-1, 1, 1, 1) / 1000
        return wave + c[:, :, None, None]


def chain_of_the_authors(case):
    numbers, given = case.settings, case.tensors
    z, cond = given["z"].requires_grad_(), given["cond"].requires_grad_()
    extra = torch.cat([given["masked"], given["m"]], dim=1)
    model, steps = Bent(), numbers["steps"]
    estimates = ddim_chain(model, z, extra, cond, steps)
    last = ddim_chain(model, z, extra, cond, steps, return_all=False)
    last.square().sum().backward()

    def guided(z9, t, c):
        without = model(z9, t, given["null"].expand(len(z9), -1))
        return without + numbers["guidance"] * (model(z9, t, c) - without)

    table = ddim_coefficients(model.alphas_cumprod, steps, 999)

    def id_net(x):
        return x.flatten(1) @ given["id_matrix"].T

    return {
        "times": table[0],
        "abar at alphas_at": model.alphas_cumprod[torch.tensor(numbers["alphas_at"])],
        "estimates": estimates,
        "last estimate": last,
        "gradient w.r.t. z": z.grad,
        "gradient w.r.t. cond": cond.grad,
        "guided last estimate": ddim_chain(guided, z, extra, cond, steps, False, table=table),
        "identity term": identity_loss(id_net, estimates, given["m"], id_net(given["reference"])),
        "perceptual term": perceptual_loss(estimates, given["target"]),
    }


def input_of_the_authors(case):
    given, t = case.tensors, torch.tensor(case.settings["times"])
    levels = table_levels(scaled_linear_schedule().double())
    noisy = diffuse(given["z0"], given["noise"], t, levels)
    return {"input": inpaint_input(noisy, given["masked"], given["m"])}


def condition_of_the_authors(case):
    given, numbers = case.tensors, case.settings
    mixer = ConditionMixer(5, 4, 6, 3, weights=numbers["weights"]).double()
    names = {"source": "P_s", "target": "P_t", "identity": "P_id", "landmarks": "P_lm"}
    heads = {
        f"{ours}.{part}": given[f"{theirs}.{part}"]
        for ours, theirs in names.items()
        for part in ("weight", "bias")
    }
    mixer.load_state_dict(heads, strict=False)
    parts = [given[name] for name in names]
    c = mixer(*parts)
    c.square().sum().backward()
    grads = {
        f"gradient w.r.t. {theirs}.weight": getattr(mixer, ours).weight.grad
        for ours, theirs in names.items()
    }
    return {"c": c, "c with the other weights": mixer(*parts, weights=numbers["other"])} | grads


def masks_of_the_authors(case):
    given = case.tensors
    return {
        "bent masks": tps_warp_mask(given["m"], given["offset"]),
        "face mask": face_mask(given["labels"].long(), case.settings["face_ids"]),
    }


RECOMPUTE = {
    "three-step chain, its gradient, guidance, identity and perceptual terms": chain_of_the_authors,
    "noised nine-channel input": input_of_the_authors,
    "condition from four heads": condition_of_the_authors,
    "bent masks, rectangular": masks_of_the_authors,
}


@pytest.mark.parametrize("case", [*load_reference("reface")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))


# ---------------------------------------------------------------- bad input


def bad_loss(n=2, **options):
    x, m, ref = batch(n)
    model = Tiny()
    mask = options.pop("m", m)
    return reface_loss(model, pixels, x, mask, ref, model.condition, **options)


def bad_swap(**options):
    x, m, _ = batch()
    arguments = dict(source=x, target=x, mask=m, steps=2) | options
    return swap(Tiny(), **arguments)


def bad_chain(**options):
    x, m, _ = batch()
    return ddim_chain(Tiny(), x, torch.cat([x, m], 1), torch.zeros(3, 4), **options)


schedule = scaled_linear_schedule()
ones = torch.ones(2, 1, 4, 4)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inpaint_input(ones, ones[:1], ones), r"x_masked must be \(2, 1, 4, 4\)"),
        (
            lambda: inpaint_input(ones, ones, ones.expand(2, 2, 4, 4)),
            r"m must be \(2, 1, height, width\), got shape \(2, 2",
        ),
        (lambda: extend_input_layer(nn.Linear(2, 2), -1), "extra must be at least 0"),
        (lambda: extend_input_layer(nn.Conv2d(4, 4, 1, groups=2), 1), "not grouped"),
        (
            lambda: face_mask(torch.zeros(4, 4, dtype=torch.long)),
            r"labels must be .*got shape \(4, 4\)",
        ),
        (lambda: MaskFamily(torch.ones(4, 4)), r"types, 1, height, width"),
        (lambda: MaskFamily(torch.ones(0, 1, 4, 4)), "types must be at least 1, got 0"),
        (lambda: MaskFamily(ones * 2), r"masks must be in \[0, 1\], got 2"),
        (lambda: MaskFamily(ones, [1.0]), "probs must be 2 numbers"),
        (lambda: MaskFamily(ones, [1.0, -1.0]), "probs must be 2 numbers"),
        (lambda: MaskFamily(ones, [0.0, 0.0]), "probs must be 2 numbers"),
        (lambda: tps_warp_mask(ones, torch.zeros(2)), r"offset must be \(2, 2\)"),
        (lambda: tps_warp_mask(ones - 3, torch.zeros(2, 2)), r"m must be in \[0, 1\]"),
        (lambda: tps_warp_mask(ones[:, 0], torch.zeros(2, 2)), r"got shape \(2, 4, 4\)"),
        (lambda: make_reference(ones, ones[:1]), r"m must be \(2, 1, 4, 4\)"),
        (lambda: make_reference(ones, ones * torch.nan), r"m must be in \[0, 1\], got nan"),
        (lambda: make_reference(ones, ones > 0), "m must hold floating-point numbers, got torch.b"),
        (lambda: inpaint_input(ones, ones, ones > 0), "m must hold floating-point numbers"),
        (lambda: bad_swap(mask=torch.ones(3, 1, 8, 8) > 0), "mask must hold floating-point"),
        (
            lambda: bad_swap(table=ddim_coefficients(schedule, 4, 999)),
            "a row for each of 2 steps, got 4",
        ),
        (lambda: released_table(schedule, 0), "steps must be in 1..999, got 0"),
        (lambda: mix_conditions([ones] * 3, (0, 0, 0)), "not sum to zero"),
        (lambda: mix_conditions([ones] * 3, (1, -1, 2)), "not negative"),
        (lambda: mix_conditions([ones] * 3, (1, 1)), "weights must be 3 numbers"),
        (lambda: mix_conditions([ones, ones, ones[0]], (1, 1, 1)), "must have one shape"),
        (lambda: mix_conditions([ones], (math.inf,)), "weights must be finite"),
        (lambda: ConditionMixer(2, 2, 2, 2, weights=(0, 0, 0)), "not sum to zero"),
        (lambda: ConditionMixer(2, 2, 2, 2, weights=(1, 1)), "weights must be 3 numbers"),
        (lambda: ConditionMixer(2, 2, 2, 2, p_drop=1.5), r"p_drop must be in \[0, 1\]"),
        (lambda: OneTokenMapper(0), "dim must be at least 1, got 0"),
        (lambda: ddim_coefficients(schedule, 0, 999), r"steps must be in 1..1000, got 0"),
        (lambda: ddim_coefficients(schedule, 1001, 999), r"steps must be in 1..1000, got 1001"),
        (lambda: ddim_coefficients(schedule, 4, 1000), "t_start must be in 0..999"),
        (lambda: ddim_coefficients(schedule.flip(0), 4, 999), "fall strictly"),
        (lambda: ddim_coefficients(schedule - 0.1, 4, 999), "stay positive"),
        (lambda: bad_chain(steps=0), "steps must be in 1..1000, got 0"),
        (
            lambda: bad_chain(steps=3, table=ddim_coefficients(schedule, 4, 999)),
            "a row for each of 3 steps, got 4",
        ),
        (lambda: bad_loss(1), "needs? at least two samples, got 1"),
        (lambda: bad_loss(4, sub=1), "at least two samples, got 1"),
        (lambda: bad_loss(steps=0), "steps must be in 1..1000, got 0"),
        (lambda: bad_loss(steps=1001), "steps must be in 1..1000, got 1001"),
        (lambda: bad_loss(m=torch.full((2, 1, 8, 8), 1.5)), r"m must be in \[0, 1\]"),
        (lambda: bad_loss(m=torch.ones(2, 1, 4, 4)), r"m must be \(2, 1, 8, 8\)"),
        (lambda: bad_swap(mask=torch.full((3, 1, 8, 8), -0.5)), r"mask must be in \[0, 1\]"),
        (lambda: bad_swap(mask=torch.ones(3, 1, 4, 4)), r"mask must be \(3, 1, 8, 8\)"),
        (lambda: bad_swap(source=torch.ones(1, 1, 8, 8)), r"source must be \(3, 1, 8, 8\)"),
        (
            lambda: bad_swap(source_mask=torch.ones(1, 1, 8, 8)),
            r"source_mask must be \(3, 1, 8, 8\)",
        ),
        (lambda: bad_swap(steps=0), "steps must be in 1..1000"),
        (
            lambda: id_retrieval(torch.ones(2, 3), torch.ones(2, 4), torch.zeros(2).long()),
            r"gallery must be \(people, 3\)",
        ),
        (lambda: id_retrieval(torch.ones(2, 3), torch.eye(3), torch.zeros(3).long()), "truth"),
        (lambda: id_retrieval(torch.ones(1, 3), torch.eye(3), torch.tensor([3])), "in 0..2"),
        (lambda: id_retrieval(torch.ones(1, 3), torch.eye(3), torch.tensor([0]), 4), "in 1..3"),
    ],
)
def test_message_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
