"""Bias loss: the variance, the weight made of it, the memory of global mode; and SkipblockNet."""

import math
import warnings
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations.costs import count_flops, peak_memory
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.mobile.bias_loss import (
    SKIPS,
    STAGES,
    BiasLoss,
    InvertedResidual,
    SkipBlock,
    SkipblockNet,
    SqueezeExcite,
    bias_loss,
    bias_weight,
    feature_variance,
    from_official_state_dict,
    normalize_variance,
    skipblocknet_m,
)
from shuffle_nb.mobile.mobile_blocks import rounded_channels

bias_loss_module = import_module("shuffle_nb.mobile.bias_loss")

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
SEEDS = st.integers(0, 10**6)
STRENGTHS = st.tuples(st.floats(0, 2), st.floats(0, 0.99))


def batch(shape=(8, 6, 3, 3), classes=5, seed=0, dtype=torch.float64):
    """Logits, targets and features whose variance differs from image to image."""
    generator = torch.Generator().manual_seed(seed)
    number = shape[0]
    factors = torch.arange(1, number + 1).view(-1, *[1] * (len(shape) - 1))
    features = (torch.randn(shape, generator=generator, dtype=torch.float64) * factors).to(dtype)
    logits = torch.randn(number, classes, generator=generator, dtype=torch.float64).to(dtype)
    return logits, torch.randint(0, classes, (number,), generator=generator), features


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------- the variance


@settings(deadline=None)
@given(SHAPES, SEEDS, st.sampled_from([torch.float32, torch.float64]))
def test_variance_is_unbiased_over_all_values_of_an_image(shape, seed, dtype):
    assume(math.prod(shape[1:]) > 1)
    _, _, features = batch(shape, seed=seed, dtype=dtype)
    found = feature_variance(features)
    expected = features.double().flatten(1).var(1)
    assert found.shape == (shape[0],) and found.dtype == dtype
    assert torch.allclose(found.double(), expected, rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_variance_stays_exact_on_long_rows_with_a_large_mean(offset):
    features = (2 * torch.randn(4, 960, 7, 7)).relu() + offset
    error = feature_variance(features).double() / features.double().flatten(1).var(1) - 1
    assert error.abs().max() < 1e-6 * (1 + offset)


def test_variance_by_hand_and_of_a_constant_image():
    features = torch.tensor([[5.0, 5, 5, 5], [0, 0, 2, 2]])
    assert feature_variance(features).tolist() == pytest.approx([0, 4 / 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    features = (200 * torch.randn(3, 64, 8, 8)).to(dtype)  # squares overflow float16
    found = feature_variance(features)
    assert found.dtype == torch.float32
    assert torch.allclose(found, features.double().flatten(1).var(1).float(), rtol=1e-4)


def test_layout_in_memory_does_not_matter_and_features_are_left_alone():
    features = torch.randn(3, 8, 5, 5)
    before = features.clone()
    last = features.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(feature_variance(last), feature_variance(features), rtol=1e-6)
    assert torch.equal(features, before)


# ---------------------------------------------------------------- the weight


def test_numbers_small_enough_to_check_by_hand():
    v = torch.tensor([1.0, 2, 3, 5])
    assert normalize_variance(v, mode="local").tolist() == [0, 0.25, 0.5, 1]
    assert normalize_variance(v).tolist() == [0, 0.25, 0.5, 1]
    assert normalize_variance(v, torch.tensor(0.0)).tolist() == [0.25, 0.5, 0.75, 1.25]
    assert normalize_variance(v, torch.tensor(0.0), "local").tolist() == [0, 0.25, 0.5, 1]
    expected = [math.exp(0.3 * x) - 0.3 for x in (0, 0.25, 0.5, 1)]
    assert bias_weight(normalize_variance(v)).tolist() == pytest.approx(expected)


def test_ratio_at_the_defaults():
    low, high = bias_weight(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
    assert low == pytest.approx(0.7)
    assert high == pytest.approx(1.04986, abs=1e-5)
    assert high / low == pytest.approx(1.49980, abs=1e-5)


def test_the_exponent_is_cut_off():
    weights = bias_weight(torch.tensor([60.0, 1e6], dtype=torch.float64))
    assert weights.tolist() == pytest.approx([math.exp(18) - 0.3, math.exp(20) - 0.3])


@settings(deadline=None)
@given(SEEDS, st.integers(2, 12), STRENGTHS)
def test_local_weights_fill_their_range_and_rise_with_the_variance(seed, number, strength):
    _, _, features = batch((number, 3, 2, 2), seed=seed)
    a, b = strength
    weights = BiasLoss(a, b, mode="local").weights(features)
    assert weights.min().item() == pytest.approx(1 - b, abs=1e-12)
    assert weights.max().item() == pytest.approx(math.exp(a) - b, abs=1e-12)
    by_variance = weights[feature_variance(features).argsort()]
    assert (by_variance.diff() >= 0).all()
    if a > 0.01:
        assert (by_variance.diff() > 0).all()


@settings(deadline=None)
@given(SEEDS, st.floats(0.1, 50), st.booleans(), st.floats(-20, 20))
def test_local_weights_ignore_scale_offset_and_order_within_an_image(seed, factor, turn, offset):
    _, _, features = batch(seed=seed)
    criterion = BiasLoss(mode="local")
    weights = criterion.weights(features)
    factor = -factor if turn else factor
    assert torch.allclose(criterion.weights(factor * features + offset), weights, atol=1e-9)
    generator = torch.Generator().manual_seed(seed)
    channels, pixels = torch.randperm(6, generator=generator), torch.randperm(3)
    assert torch.allclose(criterion.weights(features[:, channels][..., pixels]), weights)


@settings(deadline=None)
@given(SEEDS, st.sampled_from(["local", "global"]))
def test_permuting_the_batch_permutes_the_weights_and_keeps_the_loss(seed, mode):
    logits, target, features = batch(seed=seed)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    weights = BiasLoss(mode=mode).weights(features)
    assert torch.allclose(BiasLoss(mode=mode).weights(features[order]), weights[order])
    loss = bias_loss(logits, target, features, mode=mode)
    assert torch.allclose(bias_loss(logits[order], target[order], features[order], mode=mode), loss)


@pytest.mark.parametrize("mode", ["local", "global"])
@pytest.mark.parametrize("number", [1, 4])
def test_one_image_and_equal_images_are_finite_and_weigh_one_minus_beta(mode, number):
    logits, target, features = batch((1, 3, 2, 2))
    same = features.expand(number, -1, -1, -1)
    criterion = BiasLoss(mode=mode)
    criterion.weights(0.1 * batch()[2])  # a lower minimum must not blow the ratio up either
    assert torch.allclose(criterion.weights(same), torch.tensor(0.7, dtype=torch.float64))
    loss = criterion(logits.expand(number, -1), target.expand(number), same)
    assert torch.isfinite(loss)


def test_images_that_differ_by_rounding_only_count_as_equal():
    v = torch.tensor([1.0, 1.0 + 1e-7, 1.0])
    assert normalize_variance(v, torch.tensor(0.5)).tolist() == [0, 0, 0]


# ---------------------------------------------------------------- the loss


@settings(deadline=None)
@given(SEEDS, st.integers(1, 9), st.integers(2, 7), st.floats(0, 0.99))
def test_alpha_zero_is_cross_entropy_times_one_minus_beta(seed, number, classes, b):
    logits, target, features = batch((number, 2, 2, 2), classes, seed)
    plain = F.cross_entropy(logits, target, reduction="none")
    found = bias_loss(logits, target, features, 0, 0, reduction="none")
    assert torch.equal(found, plain)
    assert torch.allclose(bias_loss(logits, target, features, 0, b), (1 - b) * plain.mean())


def test_loss_is_the_formula_term_by_term():
    logits, target, features = batch()
    v = [image.flatten().var().item() for image in features]
    terms = []
    for i, variance in enumerate(v):
        z = math.exp(0.3 * (variance - min(v)) / (max(v) - min(v))) - 0.3
        terms.append(-z * logits[i].log_softmax(0)[target[i]].item())
    for reduction, expected in (("mean", sum(terms) / 8), ("sum", sum(terms)), ("none", terms)):
        found = bias_loss(logits, target, features, reduction=reduction)
        assert found.tolist() == pytest.approx(expected)
        module = BiasLoss(reduction=reduction)(logits, target, features)
        assert module.tolist() == pytest.approx(expected)


@settings(deadline=None, max_examples=10)
@given(SEEDS)
def test_gradient_is_that_of_cross_entropy_times_the_weight(seed):
    logits, target, features = batch(seed=seed)
    logits.requires_grad_(), features.requires_grad_()
    criterion = BiasLoss(mode="local")
    criterion(logits, target, features).backward()
    z = criterion.weights(features)[:, None]
    expected = z / 8 * (logits.softmax(1) - F.one_hot(target, 5))
    assert torch.allclose(logits.grad, expected)
    assert features.grad is None


def test_gradcheck():
    logits, target, features = batch((4, 3, 2, 2))
    assert torch.autograd.gradcheck(
        lambda x: bias_loss(x, target, features), logits.requires_grad_()
    )


def test_no_gradient_through_the_weight_when_features_make_the_logits():
    features = torch.randn(4, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 1, 2, 3])
    bias_loss(features.mean((2, 3)), target, features).backward()
    found, features.grad = features.grad, None
    constant = BiasLoss(mode="local").weights(features)
    plain = F.cross_entropy(features.mean((2, 3)), target, reduction="none")
    (constant * plain).mean().backward()
    assert torch.allclose(found, features.grad)


# ---------------------------------------------------------------- the memory of global mode


def test_first_batch_of_global_mode_equals_local_mode():
    logits, target, features = batch()
    first = BiasLoss()(logits, target, features)
    assert torch.allclose(first, BiasLoss(mode="local")(logits, target, features))
    assert torch.allclose(first, bias_loss(logits, target, features, mode="global"))


@settings(deadline=None)
@given(SEEDS, st.lists(st.floats(0.1, 10), min_size=1, max_size=5))
def test_running_minimum_is_updated_before_use_and_never_rises(seed, factors):
    _, _, features = batch(seed=seed)
    criterion, lowest = BiasLoss(), math.inf
    for factor in factors:
        v = (factor * features).flatten(1).var(1)
        before, lowest = lowest, min(lowest, v.min().item())
        weights = criterion.weights(factor * features)
        v_hat = (v - lowest) / (v.max() - v.min())
        assert torch.allclose(weights, torch.exp(0.3 * v_hat) - 0.3, rtol=1e-6)
        assert (weights >= 0.7 - 1e-9).all()
        assert criterion.running_min.item() == pytest.approx(lowest, rel=1e-6)
        assert criterion.running_min.item() <= before * (1 + 1e-6)


def test_top_weight_exceeds_the_local_range_after_a_lower_batch():
    _, _, features = batch()
    criterion = BiasLoss()
    criterion.weights(0.1 * features)
    assert criterion.weights(features).max() > math.exp(0.3) - 0.3 + 1e-3
    criterion.reset()
    assert criterion.running_min == math.inf
    assert criterion.weights(features).max().item() == pytest.approx(math.exp(0.3) - 0.3)


def test_evaluation_mode_reads_the_minimum_and_does_not_write_it():
    _, _, features = batch()
    criterion = BiasLoss()
    criterion.weights(features)
    stored = criterion.running_min.clone()
    criterion.eval()
    assert (criterion.weights(0.1 * features) >= 0.7 - 1e-9).all()
    assert torch.equal(criterion.running_min, stored)
    assert criterion.weights(2 * features).max() > math.exp(0.3) - 0.3
    assert torch.isfinite(BiasLoss().eval().weights(features)).all()


def test_local_mode_remembers_nothing():
    criterion = BiasLoss(mode="local")
    criterion.weights(batch()[2])
    assert criterion.running_min == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_continues_with_the_same_weights(dtype):
    _, _, features = batch(dtype=dtype)
    criterion, resumed = BiasLoss(), BiasLoss()
    criterion.weights(0.3 * features)
    assert criterion.running_min.dtype == dtype
    assert list(criterion.state_dict()) == ["running_min"]
    resumed.load_state_dict(criterion.state_dict())
    assert torch.equal(resumed.running_min, criterion.running_min)
    assert torch.equal(resumed.weights(features), criterion.weights(features))


def test_a_batch_of_nan_does_not_spoil_the_memory():
    _, _, features = batch()
    criterion = BiasLoss()
    criterion.weights(features)
    stored = criterion.running_min.clone()
    criterion.weights(torch.full_like(features, torch.nan))
    assert torch.equal(criterion.running_min, stored)


# ---------------------------------------------------------------- precision and compilation


def test_autocast_and_half_precision_give_a_float32_loss():
    logits, target, features = batch(dtype=torch.float32)
    expected = bias_loss(logits, target, features)
    criterion = BiasLoss()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion(logits.bfloat16(), target, features.bfloat16())
    assert found.dtype == torch.float32 and criterion.running_min.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("mode", ["local", "global"])
def test_compiled_loss_has_no_graph_break_and_keeps_its_memory(mode):
    logits, target, features = batch(dtype=torch.float32)
    plain, criterion = BiasLoss(mode=mode), BiasLoss(mode=mode)
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    for factor in (1.0, 0.5, 2.0):
        expected = plain(logits, target, factor * features)
        assert torch.allclose(compiled(logits, target, factor * features), expected, atol=1e-6)
    assert torch.equal(criterion.running_min, plain.running_min)
    function = torch.compile(bias_loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(function(logits, target, features), bias_loss(logits, target, features))


# ---------------------------------------------------------------- the network


def test_rounding_of_channels():
    cases = {1: 8, 12: 16, 18: 24, 36.8: 40, 91.2: 88, 184: 184, 240: 240}
    assert {channels: rounded_channels(channels) for channels in cases} == cases


@given(st.floats(1, 3000))
def test_rounded_channels_are_a_multiple_of_8_and_not_much_fewer(channels):
    found = rounded_channels(channels)
    assert found % 8 == 0 and found >= 8
    assert found >= 0.9 * channels and found <= max(8, channels + 8)


@pytest.mark.parametrize(
    ("num_classes", "parameters"), [(1000, 5_532_352), (100, 4_379_452), (10, 4_264_162)]
)
def test_parameters_of_the_network(num_classes, parameters):
    network = skipblocknet_m(num_classes)
    assert num_parameters(network) == parameters
    assert [num_parameters(skip) for skip in network.skips] == [8240, 4520]


def test_multiply_adds_at_224_pixels():
    network = skipblocknet_m().eval()
    assert count_flops(network, torch.zeros(1, 3, 224, 224)) == 2 * 236_622_048


def test_shapes_of_all_stages_at_224_pixels():
    network, seen = skipblocknet_m(7).eval(), []
    for part in (network.base, *network.stages, *network.skips, network.head):
        part.register_forward_hook(lambda *call: seen.append(tuple(call[-1].shape[1:])))
    with torch.no_grad():
        logits, features = network(torch.zeros(1, 3, 224, 224), return_features=True)
    assert seen == [
        (16, 112, 112), (40, 28, 28), (40, 28, 28), (80, 14, 14), (80, 14, 14), (160, 7, 7),
        (960, 7, 7),
    ]  # fmt: skip
    assert logits.shape == (1, 7) and features.shape == (1, 960, 7, 7)


def test_blocks_follow_the_layer_table():
    blocks = [block for stage in skipblocknet_m().stages for block in stage]
    rows = [row for stage in STAGES for row in stage]
    hidden = [64, 72, 72, 120, 240, 240, 200, 184, 184, 480, 672, 672, 960, 960]
    assert len(blocks) == len(rows) == 14
    for block, (kernel, _, out, squeeze, hard_swish, stride), width in zip(
        blocks, rows, hidden, strict=True
    ):
        widen, depthwise, gate, narrow = block.layers
        assert widen[0].out_channels == width and narrow[0].out_channels == out
        assert depthwise[0].kernel_size == (kernel, kernel) and depthwise[0].groups == width
        assert depthwise[0].stride == (stride, stride)
        assert isinstance(gate, SqueezeExcite) == squeeze
        assert isinstance(depthwise[2], nn.Hardswish) == hard_swish
        assert len(narrow) == 2  # no activation
        assert all(part[0].bias is None for part in (widen, depthwise, narrow))


def test_squeeze_excite_is_the_formula():
    gate, x = SqueezeExcite(72), torch.randn(2, 72, 3, 4)
    first, _, second, _ = gate.layers
    assert first.out_features == 24
    scale = F.hardsigmoid(second(first(x.mean((2, 3))).relu()))
    assert torch.allclose(gate(x), x * scale[:, :, None, None])


def test_inverted_residual_adds_its_input_only_where_shapes_agree():
    x = torch.randn(2, 16, 8, 8)
    for out, stride, added in ((16, 1, True), (16, 2, False), (24, 1, False)):
        block = InvertedResidual(16, 24, out, 3, stride).eval()
        expected = block.layers(x) + x if added else block.layers(x)
        assert torch.equal(block(x), expected)


def test_initial_weights():
    network = skipblocknet_m()
    depthwise = network.stages[2][4].layers[1][0]  # 960 channels, 5 x 5, not divided by groups
    assert depthwise.weight.std().item() == pytest.approx((2 / (25 * 960)) ** 0.5, rel=0.05)
    assert network.classifier[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not network.classifier[0].bias.any()


@settings(deadline=None, max_examples=20)
@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 9), st.sampled_from([3, 5]))
def test_skip_block_has_the_size_it_is_asked_for(height, width, size, kernel_size):
    block = SkipBlock(3, 8, 5, kernel_size).eval()
    with torch.no_grad():
        x = torch.randn(1, 3, height, width)
        assert block(x, size).shape == (1, 5, size, size)
        assert block(x, (size, 4)).shape == (1, 5, size, 4)
        # Values depend on the pooled map alone, and a constant image is constant off the rim.
        assert torch.allclose(block(F.adaptive_avg_pool2d(x, size), size), block(x, size))
        rim = kernel_size // 2
        constant = block(torch.ones(1, 3, height, width), 9)[..., rim : 9 - rim, rim : 9 - rim]
        assert torch.allclose(constant, constant[..., :1, :1].expand_as(constant), atol=1e-6)


def test_skip_block_has_a_shortcut_only_between_equal_channels():
    x = torch.randn(1, 4, 8, 8)
    same, other = SkipBlock(4, 8, 4).eval(), SkipBlock(4, 8, 6).eval()
    pooled = F.adaptive_avg_pool2d(x, 4)
    assert torch.equal(same(x, 4), pooled + same.layers(pooled))
    assert torch.equal(other(x, 4), other.layers(pooled))
    assert len(same.layers[2]) == 2  # the last norm has no activation behind it


@torch.no_grad()
def test_silent_skip_blocks_leave_the_network_without_them():
    network, without = skipblocknet_m(10).eval(), skipblocknet_m(10, use_skips=False).eval()
    for skip in network.skips:
        nn.init.normal_(skip.layers[-1][-1].bias)
    left = {k: v for k, v in network.state_dict().items() if not k.startswith("skips.")}
    without.load_state_dict(left)
    x = torch.randn(1, 3, 96, 96)
    assert not torch.allclose(network(x), without(x))
    for skip in network.skips:
        nn.init.zeros_(skip.layers[-1][-1].weight)
        nn.init.zeros_(skip.layers[-1][-1].bias)
    assert torch.equal(network(x), without(x))
    assert num_parameters(network) - num_parameters(without) == 8240 + 4520


@torch.no_grad()
def test_fixed_and_fitted_skip_sizes_agree_at_224_pixels():
    network, fixed = skipblocknet_m(10).eval(), skipblocknet_m(10, skip_sizes=(28, 14)).eval()
    fixed.load_state_dict(network.state_dict())
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(network(x), fixed(x))


@torch.no_grad()
@pytest.mark.parametrize("width", [0.35, 0.75, 1.4])
def test_any_width_and_image_size(width):
    network = SkipblockNet(4, width=width, in_channels=1).eval()
    logits, features = network(torch.randn(2, 1, 70, 45), return_features=True)
    assert logits.shape == (2, 4)
    assert features.shape == (2, 6 * rounded_channels(160 * width), 3, 2)
    first = rounded_channels(16 * width)
    for skip, (expansion, _) in zip(network.skips, SKIPS, strict=True):
        assert skip.in_channels == first
        assert skip.layers[0][0].out_channels == rounded_channels(first * expansion)


def test_network_trains_with_its_loss():
    network, criterion = SkipblockNet(3, width=0.35), BiasLoss()
    x, target = torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2, 0, 1, 2])
    logits, features = network(x, return_features=True)
    criterion(logits, target, features).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_network_gradients_in_float64():
    block = InvertedResidual(2, 8, 2, 3, 1, squeeze=True, hard_swish=True).double().eval()
    skip = SkipBlock(2, 4, 3).double().eval()
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(block, x)
    assert torch.autograd.gradcheck(lambda x: skip(x, (3, 2)), x)


@pytest.mark.usefixtures("plain_python")
def test_compiled_network_has_no_graph_break_and_runs_under_autocast():
    network = SkipblockNet(4, width=0.35).eval()
    x = torch.randn(2, 3, 64, 64)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), network(x), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert network(x).dtype == torch.bfloat16


@torch.no_grad()
def test_network_state_dict_round_trip():
    network, other = (SkipblockNet(4, width=0.35).eval() for _ in range(2))
    x = torch.randn(1, 3, 64, 64)
    assert not torch.equal(network(x), other(x))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(x), other(x))


# ---------------------------------------------------------------- bad input


def test_beta_of_one_warns_and_does_not_fail():
    with pytest.warns(UserWarning, match="beta = 1.0 >= 1"):
        weights = bias_weight(torch.tensor([0.0, 1.0]), beta=1.0)
    assert weights[0] == 0
    with pytest.warns(UserWarning, match="not a positive one"):
        criterion = BiasLoss(beta=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough: not at every step
        criterion.weights(torch.randn(3, 4))


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (dict(logits=torch.zeros(4)), r"logits must be \(N, K\).*\(4,\) and \(4,\)"),
            (dict(logits=torch.zeros(4, 3, 2)), r"got shapes \(4, 3, 2\)"),
            (dict(target=torch.zeros(3, dtype=torch.long)), r"target \(N,\).*\(4, 3\) and \(3,\)"),
            (dict(target=torch.zeros(4, 1, dtype=torch.long)), r"\(4, 3\) and \(4, 1\)"),
            (dict(features=torch.zeros(5, 2)), r"each of the 4 logits.*\(5, 2\)"),
            (dict(features=torch.zeros(4, 1, 1, 1)), "at least 2 values per sample"),
            (dict(features=torch.zeros(4)), "at least 2 values per sample"),
            (dict(alpha=-0.1), "alpha must not be negative, got -0.1"),
            (dict(mode="batch"), r"\['local', 'global'\], got 'batch'"),
            (dict(reduction="max"), r"\['none', 'mean', 'sum'\], got 'max'"),
        ],
    )
    def test_of_the_loss(self, change, message):
        inputs = dict(logits=torch.zeros(4, 3), target=torch.zeros(4, dtype=torch.long))
        inputs |= dict(features=torch.randn(4, 2, 2, 2)) | change
        with pytest.raises(ValueError, match=message):
            bias_loss(**inputs)
        options = {k: inputs.pop(k) for k in ("alpha", "mode", "reduction") if k in inputs}
        with pytest.raises(ValueError, match=message):
            BiasLoss(**options)(**inputs)

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: feature_variance(torch.zeros(3, 1)), r"per sample.*got shape \(3, 1\)"),
            (lambda: normalize_variance(torch.zeros(2, 2)), r"v must be \(N,\).*\(2, 2\)"),
            (lambda: normalize_variance(torch.zeros(0)), "N at least 1"),
            (lambda: normalize_variance(torch.ones(2), mode="x"), r"\['local', 'global'\]"),
            (lambda: bias_weight(torch.zeros(2), alpha=-1.0), "alpha"),
            (lambda: SkipBlock(3, 8, 8, kernel_size=4), "must be odd"),
            (lambda: SkipBlock(3, 8, 8)(torch.zeros(1, 4, 9, 9), 3), "3 channels|height"),
            (lambda: InvertedResidual(8, 8, 8, 2), "must be odd"),
            (lambda: InvertedResidual(8, 8, 8)(torch.zeros(8, 9, 9)), "8 channels|height"),
            (lambda: SkipblockNet(0), "num_classes must be at least 1, got 0"),
            (lambda: SkipblockNet(width=-1.0), "width must be positive and finite"),
            (lambda: SkipblockNet(width=0.35)(torch.zeros(1, 1, 64, 64)), "3 channels|height"),
            (
                lambda: SkipblockNet(width=0.35, skip_sizes=(28, 14)).eval()(
                    torch.zeros(1, 3, 64, 64)
                ),
                r"skip_sizes must match.*number 1 gives \(1, 16, 28, 28\)",
            ),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- what users met


def test_nearly_equal_images_after_a_flat_one_stay_finite():
    criterion, features = BiasLoss(), torch.randn(2, 64, 4, 4)
    features[1] = features[0] * 1.0005
    flat = torch.zeros(2, 64, 4, 4)
    flat[1] = torch.randn(64, 4, 4)
    logits, target = torch.zeros(2, 5), torch.tensor([0, 1])
    criterion(logits, target, flat)
    with pytest.warns(UserWarning, match="nearly equal"):
        loss = criterion(logits, target, features)
    assert loss.isfinite()


def test_an_empty_batch_is_refused():
    empty = torch.randn(0, 5), torch.zeros(0, dtype=torch.long), torch.randn(0, 4, 2, 2)
    with pytest.raises(ValueError, match=r"got shape \(0, 4, 2, 2\)"):
        BiasLoss()(*empty)


@pytest.mark.parametrize("piece", [130, 7])  # two images of 60 values at a time; less than one
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_pieces_give_the_variance_of_the_whole(dtype, piece, monkeypatch):
    features = torch.randn(9, 5, 4, 3, dtype=torch.float64).to(dtype)
    whole = bias_loss_module.feature_variance(features)
    monkeypatch.setattr(bias_loss_module, "PIECE", piece)
    assert torch.equal(bias_loss_module.feature_variance(features), whole)


def test_no_wide_copy_of_half_precision_maps():
    features = torch.randn(128, 960, 7, 7).bfloat16()

    def as_published(features):
        return features.detach().float().flatten(1).var(1)

    assert peak_memory(as_published, features) > 2 * peak_memory(feature_variance, features)


def official_weights(classes=7):
    network = skipblocknet_m(classes)
    return {f"module.theirs{i}": torch.rand_like(v.float()).to(v.dtype)
            for i, v in enumerate(network.state_dict().values())}  # fmt: skip


def test_released_weights_load_by_their_order():
    theirs = official_weights()
    assert len(theirs) == 354
    network = skipblocknet_m(7)
    network.load_state_dict(from_official_state_dict({"state_dict": theirs}))
    for ours, value in zip(network.state_dict().values(), theirs.values(), strict=True):
        assert torch.equal(ours, value)


def test_other_weights_are_refused():
    theirs = official_weights()
    name = list(theirs)[3]
    with pytest.raises(ValueError, match="must have 354 tensors, got 353"):
        from_official_state_dict({k: v for k, v in theirs.items() if k != name})
    with pytest.raises(ValueError, match="expected shape"):
        from_official_state_dict(theirs | {name: torch.zeros(3, 3)})
    with pytest.raises(ValueError, match="must have 354 tensors, got 0"):
        from_official_state_dict({})


# ---------------------------------------------------------------- the authors' own numbers


def four_batches(case):
    criterion, results = BiasLoss(0.3, 0.3, mode="global"), {}
    features = case.tensors["features"] * case.tensors["row_scale"].view(-1, 1, 1, 1)
    for step, factor in enumerate(case.settings["scale_of_batch"]):
        logits = (case.tensors["logits"] * (1 + 0.5 * step)).requires_grad_()
        loss = criterion(logits, case.tensors["target"], features * factor + 0.1 * step)
        results[f"loss {step + 1}"] = loss
    loss.backward()
    results["gradient of loss 4 w.r.t. its logits"] = logits.grad
    return results | {"running minimum at the end": criterion.running_min}


def five_steps(case):
    x = case.tensors["x"] * case.tensors["row_scale"].view(-1, 1, 1, 1)
    s, head = (case.tensors[name].requires_grad_() for name in ("s", "head"))
    options = {name: case.settings[name] for name in ("lr", "momentum")}
    strength = {name: case.settings[name] for name in ("alpha", "beta", "mode")}
    descent, losses = torch.optim.SGD([s, head], **options), []
    for _ in range(case.settings["steps"]):
        features = torch.tanh(x * s[None, :, None, None])
        logits = features.mean((2, 3)) @ head.T
        loss = bias_loss(logits, case.tensors["target"], features, **strength)
        descent.zero_grad()
        loss.backward()
        descent.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), "s afterwards": s, "head afterwards": head}


def in_order(module, case):
    weights = [tensor for name, tensor in case.tensors.items() if name != "x"]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), weights, strict=True):
            parameter.copy_(value)
    return module


def one_skip_block(case):
    block = in_order(SkipBlock(4, 6, 5, kernel_size=3).double(), case)
    x = case.tensors["x"].requires_grad_()
    output = block(x, size=(3, 5))
    output.square().sum().backward()
    convolutions = [p.grad for p in block.parameters() if p.ndim == 4]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    return {
        "output": output,
        "gradient w.r.t. x": x.grad,
        "gradient w.r.t. the first pointwise weight": convolutions[0],
        "gradient w.r.t. the depthwise weight": convolutions[1],
        "running mean of the last norm": norms[-1].running_mean,
        "running variance of the last norm": norms[-1].running_var,
    }


def whole_network(case):
    network = in_order(SkipblockNet(case.settings["num_classes"]).double(), case)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits = network(case.tensors["x"])
    logits.sum().backward()
    norms = [m for m in network.head.modules() if isinstance(m, nn.BatchNorm2d)]
    return {
        "logits": logits,
        "gradient of logits.sum() w.r.t. the first convolution": network.stem[0].weight.grad,
        "running mean of the head's norm": norms[-1].running_mean,
    }


RECOMPUTE = {
    "four batches, global running minimum": four_batches,
    "local mode, five steps of SGD through features and head": five_steps,
    "skip block, rectangular, training mode": one_skip_block,
    "whole SkipblockNet-M, 224 x 224, training mode": whole_network,
}


@pytest.mark.parametrize("case", [*load_reference("bias_loss")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))
