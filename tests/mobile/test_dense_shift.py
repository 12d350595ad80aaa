"""DenseShift: weights, gradients, layers, predecessors, codes, products by addition, freezing."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations.costs import count_flops, peak_memory
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.mobile.dense_shift import (
    DenseShiftConv2d,
    DenseShiftLinear,
    FreezeTracker,
    PowerOfTwoLinear,
    S3Linear,
    binarize01,
    dense_shift_levels,
    dense_shift_weight,
    flip_rate,
    pack_codes,
    power_of_two_weight,
    s3_weight,
    shift_as_written,
    shift_multiply,
    sign_pm1,
    straight_through,
    to_dense_shift,
    unpack_codes,
    weight_as_written,
)

SMALL = settings(deadline=None, max_examples=25)
SEEDS = st.integers(0, 2**32)
BITS = [2, 3, 4, 5]


def latents(*shape, bits=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2 ** (bits - 1), *shape, generator=generator, dtype=dtype)
    return drawn[0].requires_grad_(), drawn[1:].clone().requires_grad_()


def run_of_ones(bits):
    """The length of the run that ends at the last place, counted from there."""
    return sum(1 for _ in itertools.takewhile(bool, reversed(bits)))


# ---------------------------------------------------------------- levels and weights


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_all_signed_powers_of_two(bits):
    levels = dense_shift_levels(bits)
    assert (
        len(levels) == 2**bits
        and (levels.diff() > 0).all()
        and torch.equal(levels, -levels.flip(0))
    )
    assert torch.equal(levels.abs().log2(), levels.abs().log2().round())
    assert levels.abs().min() == 1 and levels.max() == 2 ** (2 ** (bits - 1) - 1)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("form", [dense_shift_weight, weight_as_written])
def test_truth_table(bits, form):
    count = 2 ** (bits - 1) - 1
    table = list(itertools.product([0, 1], repeat=count))
    scales = torch.tensor(table).T * 2.0 - 1
    expected = torch.tensor([2.0 ** run_of_ones(row) for row in table])
    assert len(table) == 2**count
    assert torch.equal(form(torch.ones(len(table)), scales), expected)
    assert torch.equal(form(-torch.ones(len(table)), scales), -expected)


def test_truth_table_of_five_bits_by_sampling():
    bits = torch.rand(15, 4000) < 0.9
    expected = torch.tensor([2.0 ** run_of_ones(row) for row in bits.T.tolist()])
    w = dense_shift_weight(torch.ones(4000), bits * 2.0 - 1)
    assert torch.equal(w, expected) and w.max() == 2**15


def test_ties_at_zero():
    zero = torch.zeros(3)
    assert torch.equal(dense_shift_weight(zero, torch.zeros(3, 3)), torch.ones(3))
    assert torch.equal(dense_shift_weight(-zero, torch.ones(3, 3)), torch.full((3,), 8.0))
    assert torch.equal(sign_pm1(torch.tensor([0.0, -0.0, -1e-30])), torch.tensor([1.0, 1.0, -1.0]))
    assert torch.equal(binarize01(torch.tensor([0.0, -0.0, 1e-40])), torch.tensor([0.0, 0.0, 1.0]))


def test_frequencies_of_random_bits():
    layer = DenseShiftLinear(300, 300)
    sizes = layer.weight.detach().abs()
    shares = [(sizes == 2**s).double().mean().item() for s in range(4)]
    assert shares == pytest.approx([1 / 2, 1 / 4, 1 / 8, 1 / 8], abs=0.005)
    assert sizes.mean().item() == pytest.approx(2.5, abs=0.03)


@SMALL
@given(SEEDS, st.sampled_from(BITS), st.sampled_from([1e-6, 1.0, 1e4]))
def test_weights_are_levels_and_know_no_positive_scale(seed, bits, scale):
    sign, scales = latents(40, bits=bits, seed=seed)
    w = dense_shift_weight(sign, scales)
    assert (w != 0).all() and torch.isin(w, dense_shift_levels(bits).double()).all()
    assert torch.equal(dense_shift_weight(scale * sign, scale * scales), w)
    assert torch.equal(dense_shift_weight(sign, -scales.abs()), sign_pm1(sign))
    assert torch.equal(w, weight_as_written(sign, scales))


# ---------------------------------------------------------------- gradients


@SMALL
@given(SEEDS, st.sampled_from(BITS), st.sampled_from(["sqrt", "direct"]))
def test_gradients_are_those_of_the_formula(seed, bits, surrogate):
    sign, scales = latents(6, 5, bits=bits, seed=seed)
    g = torch.randn(6, 5, dtype=torch.float64)
    slopes = [
        torch.autograd.grad(form(sign, scales, surrogate), (sign, scales), g)
        for form in (dense_shift_weight, weight_as_written)
    ]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@SMALL
@given(SEEDS)
def test_closed_form_of_three_bits(seed):
    sign, scales = latents(50, seed=seed)
    g = torch.randn(50, dtype=torch.float64)
    by_sign, by_scale = torch.autograd.grad(dense_shift_weight(sign, scales), (sign, scales), g)
    b1, b2, b3 = (scales > 0).double()
    s = ((b1 + 1) * b2 + 1) * b3
    along = g * sign_pm1(sign) / (2 * (s + 1).sqrt())
    torch.testing.assert_close(by_sign, g * (s + 1).sqrt())
    expected = torch.stack([b3 * b2, b3 * (b1 + 1), (b1 + 1) * b2 + 1]) * along
    torch.testing.assert_close(by_scale, expected)


def test_direct_gradient_is_that_of_the_weight_itself():
    sign, scales = latents(50)
    g = torch.randn(50, dtype=torch.float64)
    s = shift_as_written(scales)
    plain = sign_pm1(sign) * 2**s
    slopes = torch.autograd.grad(plain, (sign, scales), g)
    ours = torch.autograd.grad(dense_shift_weight(sign, scales, "direct"), (sign, scales), g)
    assert all(torch.allclose(*both) for both in zip(slopes, ours, strict=True))


def test_the_two_line_form_is_exact_on_powers_of_two():
    sign, scales = latents(1000, bits=4, dtype=torch.float32)
    w = dense_shift_weight(sign, scales).detach()
    u = w.sign() * (w.abs().log2() + 1).sqrt()
    assert torch.equal(u + (w - u).detach(), w)
    assert torch.equal(straight_through(w, u), w)


def test_straight_through_keeps_value_gradient_and_nan():
    soft = torch.tensor([1e8, 1e-8, math.nan], requires_grad=True)
    found = straight_through(torch.tensor([0.1, 0.2, 0.3]), soft**2)
    assert torch.equal(found[:2], torch.tensor([0.1, 0.2])) and found[2].isnan()
    found.sum().backward()
    assert torch.equal(soft.grad[:2], 2 * soft.detach()[:2])


def test_no_gradient_for_frozen_shifts_and_none_of_gradients():
    sign, scales = latents(5)
    w = dense_shift_weight(sign, scales.detach())
    (slope,) = torch.autograd.grad(w.sum(), sign, create_graph=True)
    assert (slope >= 1).all()
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        slope.sum().backward()


# ---------------------------------------------------------------- layers


def test_linear_layer_is_linear_with_the_weight():
    layer = DenseShiftLinear(7, 5, bits=4, bias=True)
    layer.bias.data.normal_()
    x = torch.randn(2, 3, 7)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.w_sign.shape == (5, 7) and layer.scales.shape == (7, 5, 7)
    assert torch.equal(layer.sign() * 2.0 ** layer.shift(), layer.weight)
    assert layer.shift().dtype == torch.int64 and not layer.sign().requires_grad
    assert DenseShiftLinear(7, 5).bias is None
    assert {name for name, _ in layer.named_parameters()} == {"w_sign", "scales", "bias"}


@pytest.mark.parametrize(
    "options",
    [
        dict(kernel_size=3),
        dict(kernel_size=(1, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 1), groups=2),
        dict(kernel_size=3, padding="same", dilation=2, bias=True, bits=2),
        dict(kernel_size=3, padding=1, groups=4, bits=5),
    ],
)
def test_convolution_has_the_shapes_of_torch(options):
    layer = DenseShiftConv2d(4, 8, **options)
    plain = {k: v for k, v in options.items() if k != "bits"}
    theirs = nn.Conv2d(4, 8, **plain | {"bias": options.get("bias", False)})
    theirs.weight.data = layer.weight.detach()
    if theirs.bias is not None:
        theirs.bias.data.zero_()
    x = torch.randn(2, 4, 9, 11)
    assert torch.equal(layer(x), theirs(x))
    assert count_flops(layer, x) == count_flops(theirs, x)


def test_first_latents_are_close_to_zero():
    layer = DenseShiftConv2d(32, 64, 3, init_std=0.02)
    for parameter in (layer.w_sign, layer.scales):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.02)
    torch.manual_seed(3)
    first = DenseShiftLinear(3, 4)
    torch.manual_seed(3)
    assert torch.equal(first.scales, DenseShiftLinear(3, 4).scales)


def test_a_power_of_two_before_batch_norm_changes_nothing():
    torch.manual_seed(0)
    layer, x = DenseShiftLinear(6, 5).double(), torch.randn(20, 6, dtype=torch.float64)
    y = layer(x)
    outputs = [F.batch_norm(2.0**j * y, None, None, training=True, eps=1e-300) for j in (0, 3, 7)]
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_sizes(bits):
    for side in (16, 32):
        layer = DenseShiftLinear(side, side, bits)
        assert sum(p.numel() for p in layer.parameters()) == 2 ** (bits - 1) * side**2
        assert len(pack_codes(layer.weight, bits)) == math.ceil(bits * side**2 / 8)
        assert count_flops(layer, torch.zeros(3, side)) == 2 * 3 * side**2


def test_a_network_is_turned_all_but_both_ends():
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(4 * 36, 6),
        nn.Linear(6, 3),
    ).double()
    assert to_dense_shift(network, bits=2, init_std=0.5) is network
    kinds = [type(layer) for layer in network.modules() if not list(layer.children())]
    assert kinds == [nn.Conv2d, DenseShiftConv2d, nn.ReLU, nn.Flatten, DenseShiftLinear, nn.Linear]
    assert network[1][0].bias is None and network[3].bias is not None and network[3].bits == 2
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    network(x).sum().backward()
    assert network[1][0].scales.grad is not None and network(x).dtype == torch.float64


def test_it_learns():
    torch.manual_seed(0)
    x = torch.randn(256, 6)
    target = x @ dense_shift_levels(3)[torch.randint(0, 8, (6, 3))]
    layer = DenseShiftLinear(6, 3, init_std=1e-2)
    optimiser = torch.optim.Adam(layer.parameters(), 5e-3)
    losses = []
    for _ in range(300):
        loss = F.mse_loss(layer(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert min(losses) < 0.1 * losses[0]


# ---------------------------------------------------------------- predecessors


def test_levels_of_s3():
    torch.manual_seed(0)
    layer = S3Linear(60, 60)
    assert layer.weight.unique().tolist() == [-4, -2, -1, 0, 1, 2, 4]
    assert S3Linear(60, 60, bits=2).weight.unique().tolist() == [-1, 0, 1]
    x = torch.randn(4, 60)
    assert torch.equal(layer(x), F.linear(x, layer.weight))
    assert (layer.weight == 0).double().mean().item() == pytest.approx(0.5, abs=0.05)


def test_s3_gives_no_gradient_to_the_sign_of_a_zero():
    sign, switch = torch.randn(100, requires_grad=True), torch.randn(100, requires_grad=True)
    w = s3_weight(sign, switch, torch.zeros(0, 100))
    w.sum().backward()
    assert torch.equal(sign.grad, (switch > 0).float())
    assert torch.equal(switch.grad, sign_pm1(sign).detach())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", [True, False])
def test_rounding_takes_the_largest_levels(bits, zero):
    torch.manual_seed(0)
    layer = PowerOfTwoLinear(200, 100, bits, zero)
    w = layer.weight.detach()
    if bits < 5:  # sixteen halvings below the largest there is hardly a weight
        assert (w == 0).any() == zero
    assert (torch.frexp(w[w != 0]).mantissa.abs() == 0.5).all()
    assert len(w.unique()) <= 2**bits and len(w[w > 0].unique()) <= 2 ** (bits - 1) - zero
    assert w.abs().max().log2() == layer.latent.abs().max().log2().round()
    layer.weight.sum().backward()
    assert torch.equal(layer.latent.grad, torch.ones(100, 200))


def test_rounding_by_hand():
    w = torch.tensor([[0.9, -0.4, 0.26, 0.1, 0.0, -0.01]])
    assert power_of_two_weight(w, 3).tolist() == [[1, -0.5, 0.25, 0, 0, 0]]
    assert power_of_two_weight(w, 3, zero=False).tolist() == [[1, -0.5, 0.25, 0.125, 0.125, -0.125]]
    assert power_of_two_weight(torch.zeros(2, 2), 3).isfinite().all()
    both = torch.stack([w, 8 * w])
    assert torch.equal(power_of_two_weight(both)[1], 8 * power_of_two_weight(w))


# ---------------------------------------------------------------- codes


@SMALL
@given(SEEDS, st.sampled_from(BITS), st.lists(st.integers(0, 7), min_size=1, max_size=3))
def test_codes_return(seed, bits, shape):
    torch.manual_seed(seed)
    w = dense_shift_levels(bits)[torch.randint(0, 2**bits, shape)]
    packed = pack_codes(w, bits)
    assert packed.dtype == torch.uint8 and len(packed) == math.ceil(bits * w.numel() / 8)
    assert torch.equal(unpack_codes(packed, bits, tuple(shape)), w)


def test_codes_by_hand():
    packed = pack_codes(torch.tensor([1.0, -8.0, 4.0]), 3)  # 000, 111, 010, from the right
    assert [f"{byte:08b}" for byte in packed.tolist()] == ["10111000", "00000000"]
    w = torch.tensor([1.0, -8.0, 4.0]).half()
    assert torch.equal(pack_codes(w, 3), packed)


# ---------------------------------------------------------------- products by addition

WORDS = {torch.float32: torch.int32, torch.float16: torch.int16}


def same_bits(a, b):
    word = WORDS[a.dtype]
    return ((a.view(word) == b.view(word)) | (a.isnan() & b.isnan())).all()


def every_half():
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)


@pytest.mark.parametrize("shift", range(16))
@pytest.mark.parametrize("sign", [1, -1])
def test_every_half_and_every_exponent_of_a_float(shift, sign):
    few = torch.arange(-(2**15), 2**15, dtype=torch.int32)
    singles = torch.cat([(few << 16 | low).view(torch.float32) for low in (0, 1, 0x5A5A, 0xFFFF)])
    for x in (every_half(), singles):
        found = shift_multiply(x, torch.tensor(shift), torch.tensor(sign))
        assert found.dtype == x.dtype and same_bits(found, x * (sign * 2.0**shift))


@SMALL
@given(SEEDS, st.sampled_from([torch.float32, torch.float16]))
def test_a_layer_by_addition(seed, dtype):
    torch.manual_seed(seed)
    layer, x = DenseShiftLinear(9, 4), torch.randn(5, 9).to(dtype)
    products = shift_multiply(x[:, None], layer.shift(), layer.sign())
    expected = x[:, None] * layer.weight.detach().to(dtype)
    assert torch.equal(products, expected) and torch.equal(products.sum(-1), expected.sum(-1))


def test_whole_numbers_add_up_exactly_in_any_order():
    layer, x = DenseShiftLinear(64, 10), torch.randint(-127, 128, (50, 64))
    by_shift = (torch.where(layer.sign() > 0, x[:, None], -x[:, None]) << layer.shift()).sum(-1)
    assert torch.equal(by_shift.float(), layer(x.float()))
    products = shift_multiply(x.float()[:, None], layer.shift(), layer.sign())
    assert torch.equal(products.sum(-1), layer(x.float()))


def test_a_convolution_by_addition():
    layer, x = DenseShiftConv2d(3, 4, 3, padding=1), torch.randint(0, 256, (2, 3, 6, 5)).float()
    columns = F.unfold(x, 3, padding=1)[:, None]  # (batch, 1, inputs, places)
    shift, sign = (part.flatten(1)[..., None] for part in (layer.shift(), layer.sign()))
    products = shift_multiply(columns, shift, sign)
    assert torch.equal(products.sum(2).view(2, 4, 6, 5), layer(x))


def test_integers_of_any_kind_strides_and_no_numbers():
    x = torch.randn(4, 6).T
    for kind in (torch.int8, torch.int16, torch.int64):
        shift, sign = torch.full((4,), 7, dtype=kind), torch.full((1,), -1, dtype=kind)
        assert torch.equal(shift_multiply(x, shift, sign), -128 * x)
    empty = torch.zeros(0, 3)
    assert shift_multiply(empty, torch.zeros(3, dtype=torch.long), torch.ones(3)).shape == (0, 3)
    grown = torch.randn(3, requires_grad=True)
    assert not shift_multiply(grown, torch.tensor(1), torch.tensor(1)).requires_grad


# ---------------------------------------------------------------- freezing


def test_flips_by_hand():
    a, b = torch.tensor([1.0, 2.0, -4.0, 1.0]), torch.tensor([1.0, -2.0, -4.0, 2.0])
    assert flip_rate(a, b) == 0.5 and flip_rate(a, a) == 0
    assert flip_rate(a.sign(), b.sign()) == 0.25 and flip_rate(a.abs(), b.abs()) == 0.25


def test_frozen_are_those_that_never_changed():
    first, second = torch.ones(4), torch.ones(2)
    tracker = FreezeTracker([first, second])
    assert tracker.frozen_fraction == 1 and tracker.rates == []
    assert tracker.update([torch.tensor([1.0, -1, 1, 1]), second]) == pytest.approx(1 / 6)
    first.fill_(7)  # what was given is not kept
    tracker.update([torch.ones(4), torch.tensor([2.0, 1])])  # one flips back, and still counts
    assert tracker.rates == pytest.approx([1 / 6, 2 / 6])
    assert tracker.frozen_fraction == pytest.approx(4 / 6)


@pytest.mark.parametrize("scale", [2.0**-4, 2.0**10])
def test_only_the_ratio_of_start_and_rate_matters_to_adam(scale):
    """Steps of Adam scale with its rate, and weights know no positive scale."""
    x, y = torch.randn(40, 8), torch.randint(0, 3, (40,))

    def trained(scale):
        torch.manual_seed(1)
        layer, norm = DenseShiftLinear(8, 3, init_std=2**-9 * scale), nn.BatchNorm1d(3)
        groups = [
            {"params": layer.parameters(), "lr": 2**-8 * scale},
            {"params": norm.parameters()},
        ]
        adam = torch.optim.Adam(groups, lr=0.01)
        for _ in range(30):
            adam.zero_grad()
            F.cross_entropy(norm(layer(x)), y).backward()
            adam.step()
        return layer

    one, other = trained(1.0), trained(scale)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.scales * scale, other.scales)


# ---------------------------------------------------------------- dtypes, compiler, bad numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_exact_too(dtype):
    layer = DenseShiftLinear(40, 30, bits=4)
    w = layer.weight.detach()
    with torch.no_grad():
        for parameter in layer.parameters():  # too close to zero for half precision otherwise
            parameter.mul_(1000)
    assert torch.equal(layer.to(dtype).weight, w.to(dtype))
    layer(torch.randn(2, 40).to(dtype)).sum().backward()
    assert layer.scales.grad.dtype == dtype and layer.scales.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_keeps_the_weights_exact(dtype):
    layer, x = DenseShiftConv2d(3, 4, 3, bits=4), torch.randint(0, 16, (2, 3, 5, 5)).float()
    with torch.autocast("cpu", dtype=dtype):
        found = layer(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), layer(x), rtol=1e-2, atol=0.5)
    found.float().sum().backward()
    assert layer.w_sign.grad.dtype == torch.float32


@pytest.mark.parametrize("surrogate", ["sqrt", "direct"])
def test_one_graph(surrogate, plain_python):
    layer, x = DenseShiftLinear(6, 5, surrogate=surrogate), torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    slopes = [
        torch.autograd.grad(f(x).square().sum(), layer.parameters()) for f in (layer, compiled)
    ]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)
    convolution = DenseShiftConv2d(2, 4, 3)
    maps = torch.randn(1, 2, 6, 6)
    whole = torch.compile(convolution, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(maps), convolution(maps))
    product = torch.compile(shift_multiply, fullgraph=True, backend="aot_eager")
    assert torch.equal(product(x[:, None], layer.shift(), layer.sign()), x[:, None] * layer.weight)


def test_nan_and_infinity_do_not_hide_behind_a_comparison():
    sign, scales = latents(4)
    for bad in (math.nan, math.inf):
        with torch.no_grad():
            spoiled, spread = sign.clone(), scales.clone()
            spoiled[0], spread[0, 1], spread[2, 2] = bad, bad, bad
        for form in (dense_shift_weight,):
            w = form(spoiled, spread)
            assert w[0].isnan() and w[2].isnan() and w[3].isfinite()
    spread = scales.detach().clone()
    spread[2, 1] = math.nan
    assert dense_shift_weight(sign, spread)[1].isnan()
    layer = DenseShiftLinear(3, 2)
    assert layer(torch.tensor([[1.0, math.nan, 0.0]])).isnan().all()
    assert shift_multiply(torch.tensor([math.nan]), torch.tensor(3), torch.tensor(1)).isnan()


def test_batches_of_none_and_one_and_strides():
    layer, convolution = DenseShiftLinear(6, 5), DenseShiftConv2d(2, 3, 3)
    assert layer(torch.zeros(0, 6)).shape == (0, 5) and layer(torch.zeros(6)).shape == (5,)
    assert convolution(torch.zeros(0, 2, 5, 5)).shape == (0, 3, 3, 3)
    x = torch.randn(6, 4).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()))
    sign, scales = latents(7, 5)
    sign, scales = sign.T, scales.mT
    assert torch.equal(dense_shift_weight(sign, scales), weight_as_written(sign, scales))
    slopes = [
        torch.autograd.grad(f(sign, scales).sum(), (sign, scales))
        for f in (dense_shift_weight, weight_as_written)
    ]
    assert all(torch.allclose(*both) for both in zip(*slopes, strict=True))
    state = layer.state_dict()
    other = DenseShiftLinear(6, 5)
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)


def test_less_memory_than_the_formula():
    for bits in (2, 3, 4):
        sign, scales = latents(128, 128, bits=bits, dtype=torch.float32)
        for backward in (False, True):
            written, ours = (
                peak_memory(form, sign, scales, backward=backward)
                for form in (weight_as_written, dense_shift_weight)
            )
            assert ours < written


# ---------------------------------------------------------------- bad input


LAYER = dict(in_features=4, out_features=3)
tracker = FreezeTracker([torch.zeros(3)])


def product(shift, sign=torch.tensor(1)):  # noqa: B008
    return shift_multiply(torch.ones(2), shift, sign)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense_shift_levels(6), r"bits must be in 2\.\.5, got 6"),
        (lambda: DenseShiftLinear(**LAYER, bits=1), r"bits must be in 2\.\.5, got 1"),
        (lambda: DenseShiftLinear(**LAYER, bits=2.5), "bits must be a whole number, got 2.5"),
        (lambda: DenseShiftLinear(**LAYER, init_std=0.0), "init_std must be positive"),
        (lambda: DenseShiftLinear(**LAYER, surrogate="sqr"), "did you mean 'sqrt'"),
        (lambda: DenseShiftLinear(0, 3), "in_features must be at least 1, got 0"),
        (lambda: DenseShiftLinear(**LAYER)(torch.zeros(2, 5)), r"x must be \(\.\.\., 4\), got"),
        (lambda: DenseShiftConv2d(3, 4, 3, groups=2), "divisible by groups 2, got 3"),
        (lambda: DenseShiftConv2d(3, 4, 0), "kernel_size must be at least 1, got 0"),
        (lambda: DenseShiftConv2d(3, 4, 3)(torch.zeros(1, 2, 8, 8)), "3 channels, got 2"),
        (lambda: DenseShiftConv2d(3, 4, 3)(torch.zeros(3, 8, 8)), "batch, channels, height"),
        (
            lambda: dense_shift_weight(torch.zeros(4), torch.zeros(2, 4)),
            r"expected K = 2.*scale variables, one of 1, 3, 7, 15; got shape \(2, 4\)",
        ),
        (lambda: dense_shift_weight(torch.zeros(4), torch.tensor(1.0)), r"got shape \(\)"),
        (lambda: dense_shift_weight(torch.zeros(4), torch.zeros(3, 5)), r"sign must be \(5\)"),
        (lambda: dense_shift_weight(torch.zeros(4), torch.zeros(3, 4), "exp"), "surrogate must be"),
        (lambda: S3Linear(4, 3, bits=4), r"bits must be in 2\.\.3, got 4"),
        (lambda: S3Linear(4, 3, init_std=-1.0), "init_std must be positive"),
        (lambda: S3Linear(4, 3)(torch.zeros(2, 3)), r"x must be \(\.\.\., 4\)"),
        (lambda: PowerOfTwoLinear(4, 3, bits=9), r"bits must be in 2\.\.5"),
        (lambda: pack_codes(torch.tensor([1.0, 0.0]), 3), "levels of 3 bits alone"),
        (lambda: pack_codes(torch.tensor([1.0, 3.0]), 3), "levels of 3 bits alone"),
        (lambda: pack_codes(torch.tensor([16.0]), 3), "levels of 3 bits alone"),
        (lambda: pack_codes(torch.tensor([0.5]), 3), "levels of 3 bits alone"),
        (lambda: pack_codes(torch.tensor([math.nan]), 3), "levels of 3 bits alone"),
        (
            lambda: unpack_codes(torch.zeros(4, dtype=torch.uint8), 3, (11,)),
            r"codes must be \(5\), got shape \(4,\)",
        ),
        (
            lambda: shift_multiply(torch.zeros(2).double(), torch.tensor(1), torch.tensor(1)),
            "x must be float32 or float16, got torch.float64",
        ),
        (lambda: product(torch.tensor(16)), r"shift must be in 0\.\.15, got 16"),
        (lambda: product(torch.tensor(-1)), r"shift must be in 0\.\.15, got -1"),
        (lambda: product(torch.tensor(1.0)), "shift must be whole numbers"),
        (lambda: product(torch.tensor(1), torch.tensor(0)), r"sign must be \+1 or -1, got sizes 0"),
        (lambda: flip_rate(torch.zeros(3), torch.zeros(4)), r"w_b must be \(3\), got"),
        (lambda: flip_rate(torch.zeros(0), torch.zeros(0)), "number of weights must be at least 1"),
        (lambda: tracker.update([torch.zeros(2)]), r"have shapes \[\(3,\)\], got \[\(2,"),
        (lambda: tracker.update([]), r"shapes \[\(3,\)\], got \[\]"),
        (lambda: FreezeTracker([]), "number of weights must be at least 1"),
        (
            lambda: to_dense_shift(
                nn.Sequential(
                    nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3, padding_mode="reflect"), nn.Linear(2, 2)
                )
            ),
            r"padding_mode must be one of \['zeros'\], got 'reflect'",
        ),
    ],
)  # fmt: skip
def test_message_says_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- reference values


def fill(layer, given, scales):
    layer = layer.double()
    layer.w_sign.data, layer.scales.data = given["w_sign"].clone(), torch.stack(scales)
    return layer


def grouped_convolution(case):
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
    options = {k: case.settings[k] for k in (*names, "groups", "bits", "surrogate")}
    given = case.tensors
    layer = fill(
        DenseShiftConv2d(**options, bias=True), given, [given["t1"], given["t2"], given["t3"]]
    )
    layer.bias.data = given["bias"].clone()
    x = given["x"].requires_grad_()
    output, w = layer(x), layer.weight.detach()
    output.square().sum().backward()
    start = "gradient of sum(output**2) w.r.t."
    return {
        "weight": w,
        "count of |weight| = 1, 2, 4, 8": torch.stack([(w.abs() == 2**s).sum() for s in range(4)]),
        "output": output,
        f"{start} x": x.grad,
        f"{start} w_sign": layer.w_sign.grad,
        f"{start} bias": layer.bias.grad,
    } | {f"{start} t{k + 1}": layer.scales.grad[k] for k in range(3)}


def twelve_steps(case):
    given = case.tensors
    layer = fill(DenseShiftLinear(3, 4), given, [given["t1"], given["t2"], given["t3"]])
    results, losses = {"weight at the start": layer.weight.detach()}, []
    adam = torch.optim.Adam(layer.parameters(), case.settings["lr"])
    for _ in range(case.settings["steps"]):
        loss = F.mse_loss(layer(given["x"]) / case.settings["output_divisor"], given["y"])
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.detach())
    results |= {"losses before each step": torch.stack(losses)}
    results |= {"weight after the steps": layer.weight, "w_sign after the steps": layer.w_sign}
    return results | {f"t{k + 1} after the steps": layer.scales[k] for k in range(3)}


def both_surrogates(case):
    given, results = case.tensors, {}
    for bits in (2, 4):
        sign, scales = given["sign"].requires_grad_(), given[f"scales{bits}"].requires_grad_()
        results[f"levels, {bits} bits"] = dense_shift_levels(bits)
        for surrogate in ("sqrt", "direct"):
            w = dense_shift_weight(sign, scales, surrogate)
            slopes = torch.autograd.grad((w * given["v"]).sum(), (sign, scales))
            results[f"gradient w.r.t. sign, {bits} bits, {surrogate}"] = slopes[0]
            results[f"gradient w.r.t. scales, {bits} bits, {surrogate}"] = slopes[1]
        results[f"weight, {bits} bits"] = w
    return results


def codes_and_products(case):
    given = case.tensors
    w, x = given["weight"].float(), given["x"].float()
    shift, sign = w.abs().log2().long(), w.sign()
    latents = [given[f"s3_{name}"] for name in ("sign", "v", "t1", "t2")]
    return {
        "packed bytes": pack_codes(w, 3),
        "x * weight by exponent addition": shift_multiply(x, shift, sign),
        "flip rate of weight against other": [flip_rate(w, given["other"].float())],
        "S3 weight": s3_weight(latents[0], latents[1], torch.stack(latents[2:])),
    }


RECOMPUTE = {
    "convolution, groups, stride, dilation, bias": grouped_convolution,
    "linear layer, twelve Adam steps from tiny latents": twelve_steps,
    "two and four bits, zeros in the latents, both surrogates": both_surrogates,
    "packed codes, exponent addition, the predecessor's levels": codes_and_products,
}


@pytest.mark.parametrize("case", [*load_reference("dense_shift")], ids=lambda case: case.name)
def test_against_the_authors_numbers(case, agree):
    agree(case, RECOMPUTE[case.name](case))
