"""Coordinate attention: formula, symmetries, counts, weights of the authors, bad input."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shuffle_nb.foundations.costs import peak_memory
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.mobile import coordinate_attention
from shuffle_nb.mobile.coordinate_attention import (
    CBAM,
    CoordinateAttention,
    InvertedResidualCA,
    MobileNetV2CA,
    SqueezeExcitation,
    coordinate_pool,
    from_official_state_dict,
    gates_as_written,
)

ACTIVATIONS = {"hard_swish": F.hardswish, "silu": F.silu, "relu6": F.relu6}
sides = st.integers(1, 9)
module_seeds = st.integers(0, 2**31 - 1)


def make(channels=16, seed=0, **options) -> CoordinateAttention:
    """A module whose every number, running statistics included, is random."""
    torch.manual_seed(seed)
    module = CoordinateAttention(channels, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.7)
        module.norm.running_mean.normal_()
        module.norm.running_var.uniform_(0.5, 2)
    return module


def by_formula(module, x, act=F.hardswish):
    """The formula with other operations: adaptive pools, convolutions, two products."""
    height, width = x.shape[2:]
    rows = F.adaptive_avg_pool2d(x, (height, 1))
    columns = F.adaptive_avg_pool2d(x, (1, width)).transpose(2, 3)
    f = act(module.norm(module.squeeze(torch.cat([rows, columns], 2))))
    g_h = module.row_gate(f[:, :, :height]).sigmoid()
    g_w = module.column_gate(f[:, :, height:]).sigmoid().transpose(2, 3)
    return g_h, g_w, x * g_w * g_h


def swapped(module: CoordinateAttention) -> CoordinateAttention:
    """The same module with the roles of rows and columns exchanged."""
    other = CoordinateAttention(module.channels, min_channels=module.squeeze.out_channels)
    state = module.state_dict()
    for kind in ("weight", "bias"):
        row, column = state[f"row_gate.{kind}"], state[f"column_gate.{kind}"]
        state[f"row_gate.{kind}"], state[f"column_gate.{kind}"] = column, row
    other.load_state_dict(state)
    return other.to(module.squeeze.weight.dtype).train(module.training)


# --- the formula


def test_pools_of_a_map_that_can_be_checked_by_hand():
    x = torch.tensor([[1.0, 2, 3], [4, 5, 6]]).reshape(1, 1, 2, 3)
    z_h, z_w = coordinate_pool(x)
    assert z_h.flatten().tolist() == [2, 5] and z_h.shape == (1, 1, 2, 1)
    assert z_w.flatten().tolist() == [2.5, 3.5, 4.5] and z_w.shape == (1, 1, 1, 3)


@given(
    st.integers(1, 3), st.integers(1, 40), sides, sides, st.booleans(), st.booleans(), module_seeds
)
@settings(max_examples=40, deadline=None)
def test_matches_the_formula(batch, channels, height, width, training, channels_last, seed):
    module = make(channels, seed).double().train(training and batch * (height + width) > 1)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    expected = by_formula(module, x)
    expected_state = {name: value.clone() for name, value in module.state_dict().items()}
    for grad in (True, False):
        module.load_state_dict(state)
        before = x.clone()
        with torch.set_grad_enabled(grad):
            y = module(x)
        assert torch.allclose(y, expected[2], atol=1e-12) and torch.equal(x, before)
        for name, value in module.state_dict().items():  # running statistics
            assert torch.allclose(value, expected_state[name], atol=1e-12)
    module.load_state_dict(state)
    for gate, wanted in zip(module.gates(x), expected, strict=False):
        assert gate.shape == wanted.shape and torch.allclose(gate, wanted, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_in_single_precision(training, memory_format):
    x = torch.randn(2, 64, 5, 7).to(memory_format=memory_format)
    weight = torch.randn_like(x)
    results = []
    for compute in (lambda m, x: by_formula(m, x)[2], lambda m, x: m(x)):
        module = make(64).train(training)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = compute(module, leaf)
        (y * weight).sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    for ours, wanted in zip(results[1], results[0], strict=True):
        assert torch.allclose(ours, wanted, atol=1e-5, rtol=1e-4)
    assert (results[1][0] - results[0][0]).abs().max() < 1e-6
    assert results[1][0].is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_each_activation(activation):
    module, x = make(activation=activation), torch.randn(2, 16, 5, 7)
    assert torch.allclose(module(x), by_formula(module, x, ACTIVATIONS[activation])[2], atol=1e-6)


def test_modes_keep_all_parameters_and_use_one_gate():
    x = torch.randn(2, 16, 5, 7)
    modules = {mode: make(mode=mode) for mode in ("hw", "h", "w")}
    g_h, g_w = modules["hw"].gates(x)
    for mode, expected in {"hw": x * (g_h * g_w), "h": x * g_h, "w": x * g_w}.items():
        assert torch.allclose(modules[mode](x), expected, atol=1e-7)
        assert len(modules[mode].gates(x)) == 2
        assert modules[mode].state_dict().keys() == modules["hw"].state_dict().keys()


def test_gradcheck():
    module = make(8).double()
    x = torch.randn(2, 8, 3, 4, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


# --- properties


@given(sides, sides, st.floats(0.1, 30), module_seeds)
@settings(max_examples=30, deadline=None)
def test_shape_type_and_size_are_kept(height, width, size, seed):
    module = make(8, seed)
    x = size * torch.randn(2, 8, height, width)
    y, (g_h, g_w) = module(x), module.gates(x)
    assert y.shape == x.shape and y.dtype == x.dtype and y.device == x.device
    assert (y.abs() <= x.abs()).all()
    assert all(((g >= 0) & (g <= 1)).all() for g in (g_h, g_w))


def test_gates_lie_strictly_between_zero_and_one():
    for gate in make(8).gates(torch.randn(2, 8, 5, 7)):
        assert ((gate > 0) & (gate < 1)).all()


@pytest.mark.parametrize("mode, share", [("hw", 4), ("h", 2), ("w", 2)])
def test_zero_weights_scale_by_a_known_share(mode, share):
    module, x = CoordinateAttention(16, mode=mode), torch.randn(2, 16, 5, 7)
    for part in (module.row_gate, module.column_gate):
        nn.init.zeros_(part.weight), nn.init.zeros_(part.bias)
    for training in (True, False):
        assert torch.equal(module.train(training)(x), x / share)


def test_the_gate_has_rank_one():
    module, x = make(8).double(), torch.randn(2, 8, 5, 7, dtype=torch.float64)
    gate = module(x) / x
    crossed = gate[..., :-1, :-1] * gate[..., 1:, 1:] - gate[..., :-1, 1:] * gate[..., 1:, :-1]
    assert crossed.abs().max() < 1e-12


@given(sides, sides, st.booleans(), module_seeds)
@settings(max_examples=30, deadline=None)
def test_rows_and_columns_may_be_shuffled(height, width, training, seed):
    module = make(8, seed).double().train(training)
    x = torch.randn(2, 8, height, width, dtype=torch.float64)
    rows, columns = torch.randperm(height), torch.randperm(width)
    g_h, g_w = module.gates(x)
    y = module(x)
    moved_h, moved_w = module.gates(x[:, :, rows])
    assert torch.allclose(moved_h, g_h[:, :, rows]) and torch.allclose(moved_w, g_w)
    assert torch.allclose(module(x[:, :, rows]), y[:, :, rows])
    moved_h, moved_w = module.gates(x[..., columns])
    assert torch.allclose(moved_h, g_h) and torch.allclose(moved_w, g_w[..., columns])
    assert torch.allclose(module(x[..., columns]), y[..., columns])


@pytest.mark.parametrize("training", [False, True])
def test_transposing_swaps_the_roles(training):
    module = make(16).double().train(training)
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    assert torch.allclose(swapped(module)(x.mT), module(x).mT)
    assert not torch.allclose(module(x.mT), module(x).mT)


def test_constant_maps_leave_an_se_with_two_sigmoids():
    module = make(16).double()
    x = torch.randn(2, 16, 1, 1, dtype=torch.float64).expand(2, 16, 5, 7)
    z = x.mean((2, 3), keepdim=True)
    f = F.hardswish(module.norm(module.squeeze(z)))
    expected = x * (module.row_gate(f).sigmoid() * module.column_gate(f).sigmoid())
    assert torch.allclose(module(x), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_pixel_reaches_its_row_and_its_column(memory_format):
    module = make(16)
    before = torch.rand(2, 16, 9, 13).to(memory_format=memory_format)
    after = before.clone(memory_format=torch.preserve_format)
    after[1, :, 3, 9] += 1
    changed = (module(before) != module(after)).any(1)
    cross = torch.zeros(2, 9, 13, dtype=torch.bool)
    cross[1, 3], cross[1, :, 9] = True, True
    assert not changed[~cross].any()
    assert changed[1, 3, [0, 12]].all() and changed[1, [0, 8], 9].all()
    channel_gated = SqueezeExcitation(16, hidden=12)
    assert (channel_gated(before) != channel_gated(after)).any(1)[1].all()


def test_training_couples_the_batch_only_through_the_statistics():
    module, x = make(8), torch.randn(3, 8, 5, 7)
    assert torch.allclose(module(x)[:1], module(x[:1]), atol=1e-6)
    module.train()
    assert not torch.allclose(module(x)[:1], module(x[:1]), atol=1e-3)


def test_one_shared_bottleneck_normalised_over_both_axes():
    module = make(8).train()
    x = torch.randn(2, 8, 5, 7)
    module(x)
    assert module.norm.num_batches_tracked == 1
    z_h, z_w = coordinate_pool(x)
    f = module.squeeze(torch.cat([z_h, z_w.mT], 2))
    normal = nn.BatchNorm2d(8).train()
    normal.running_mean.copy_(make(8).norm.running_mean)
    normal(f)
    assert torch.allclose(module.norm.running_mean, normal.running_mean, atol=1e-6)


# --- counts


@pytest.mark.parametrize("channels, expected", [(16, 440), (64, 1688), (256, 6680), (512, 25648)])
def test_parameters_of_the_module(channels, expected):
    assert sum(p.numel() for p in CoordinateAttention(channels).parameters()) == expected


def test_bottleneck_width_and_biases():
    for channels, options, m in ((960, {}, 30), (64, {}, 8), (64, dict(reduction=4), 16)):
        module = CoordinateAttention(channels, **options)
        assert module.squeeze.weight.shape == (m, channels, 1, 1)
        assert all(
            part.bias is not None for part in (module.squeeze, module.row_gate, module.column_gate)
        )


@pytest.mark.parametrize(
    "attention, parameters, multiply_adds",
    [("ca", 3_950_648, 306_666_368), ("se", 3_888_208, None), ("cbam", 3_889_808, None)],
)
def test_size_of_the_network(attention, parameters, multiply_adds):
    with torch.device("meta"):
        network, picture = MobileNetV2CA(attention=attention).eval(), torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in network.parameters()) == parameters
    if multiply_adds is not None:
        with FlopCounterMode(display=False) as counter:
            network(picture)
        assert counter.get_total_flops() == 2 * multiply_adds


def test_sixteen_attentions_inside_the_network():
    with torch.device("meta"):
        blocks = [m for m in MobileNetV2CA().modules() if isinstance(m, CoordinateAttention)]
    widths = [96] + [144] * 2 + [192] * 3 + [384] * 4 + [576] * 3 + [960] * 3
    assert [block.channels for block in blocks] == widths
    assert sum(p.numel() for block in blocks for p in block.parameters()) == 445_776


@pytest.mark.parametrize(
    "width, stem, last, head", [(0.1, 4, 32, 1280), (0.5, 16, 160, 1280), (1.4, 48, 448, 1792)]
)
def test_width_multiplier(width, stem, last, head):
    with torch.device("meta"):
        network = MobileNetV2CA(10, width=width)
    convolutions = [m for m in network.features if isinstance(m, nn.Conv2d)]
    assert [c.out_channels for c in convolutions] == [stem, head]
    assert convolutions[-1].in_channels == last
    assert network.classifier[1].weight.shape == (10, head)


def test_initial_weights_of_the_network():
    network = MobileNetV2CA()
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan = module.kernel_size[0] ** 2 * module.out_channels
            assert abs(module.weight.std() / (2 / fan) ** 0.5 - 1) < 0.05
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            assert not module.bias.any()
    assert abs(network.classifier[1].weight.std() - 0.01) < 1e-4


# --- neighbours and network


def test_squeeze_excitation_is_its_formula():
    module, x = SqueezeExcitation(32, hidden=6), torch.randn(2, 32, 5, 7)
    gate = module.expand(F.relu(module.reduce(x.mean((2, 3))))).sigmoid()
    assert torch.allclose(module(x), x * gate[:, :, None, None], atol=1e-6)
    assert SqueezeExcitation(32).reduce.out_features == 2
    assert SqueezeExcitation(8).reduce.out_features == 1


def test_cbam_is_its_formula():
    module, x = CBAM(32, hidden=6).train(), torch.randn(2, 32, 5, 7)
    mean, top = (module.expand(F.relu(module.reduce(z))) for z in (x.mean((2, 3)), x.amax((2, 3))))
    y = x * (mean + top).sigmoid()[:, :, None, None]
    planes = torch.stack([y.mean(1), y.amax(1)], 1)
    y = y * module.norm(F.conv2d(planes, module.local.weight, padding=3)).sigmoid()
    assert torch.allclose(module(x), y, atol=1e-6)
    assert module.local.bias is None and module.reduce.bias is not None


@pytest.mark.parametrize("attention", ["ca", "se", "cbam", "none"])
@pytest.mark.parametrize("expand, stride", [(1, 1), (6, 1), (6, 2)])
def test_inverted_residual(attention, expand, stride):
    block = InvertedResidualCA(8, 8, stride, expand, attention).eval()
    x = torch.randn(2, 8, 6, 10)
    y = block(x)
    assert y.shape == (2, 8, 6 // stride, 10 // stride)
    assert torch.allclose(y, block.layers(x) + (x if stride == 1 else 0))
    kinds = [type(layer) for layer in block.layers]
    has_attention = any(k in kinds for k in (CoordinateAttention, SqueezeExcitation, CBAM))
    assert has_attention == (expand > 1 and attention != "none")
    if attention == "ca" and expand > 1:  # after the activation, before the projection
        place = kinds.index(CoordinateAttention)
        assert kinds[place - 1] is nn.ReLU6 and kinds[place + 1] is nn.Conv2d
    assert kinds[-1] is nn.BatchNorm2d  # linear


@pytest.mark.parametrize("attention", ["ca", "se", "cbam", "none"])
def test_network_learns(attention):
    network = MobileNetV2CA(3, width=0.1, attention=attention, in_channels=1)
    x, labels = torch.randn(6, 1, 64, 48), torch.tensor([0, 1, 2] * 2)
    F.cross_entropy(network(x), labels).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert network.eval()(x).shape == (6, 3)


# --- weights of the authors


def official_module(channels=64, m=8) -> dict:
    """Random weights under the names and in the order of the authors' CoordAtt."""
    shapes = {"conv1.weight": (m, channels, 1, 1), "conv1.bias": (m,)}
    shapes |= {f"bn1.{kind}": (m,) for kind in ("weight", "bias", "running_mean", "running_var")}
    shapes |= {"bn1.num_batches_tracked": ()}
    for name in ("conv_h", "conv_w"):
        shapes |= {f"{name}.weight": (channels, m, 1, 1), f"{name}.bias": (channels,)}
    return {name: torch.rand(shape) if shape else torch.tensor(7) for name, shape in shapes.items()}


def official_network(width=1.0, num_classes=10) -> tuple[dict, MobileNetV2CA]:
    """Our weights under the names of the authors' network: features.i.conv.j, conv2, conv3."""
    ours = MobileNetV2CA(num_classes, width=width)
    named = {}
    features, inner = list(ours.features), {"squeeze": "conv1", "norm": "bn1"}
    inner |= {"row_gate": "conv2", "column_gate": "conv3"}
    parts = [("features.0.0", features[0]), ("features.0.1", features[1])]
    for block, layer in enumerate(features[3:-3], start=1):
        for place, part in enumerate(layer.layers):
            parts.append((f"features.{block}.conv.{place}", part))
    parts += [
        ("conv.0", features[-3]),
        ("conv.1", features[-2]),
        ("classifier.1", ours.classifier[1]),
    ]
    for prefix, part in parts:
        for name, value in part.state_dict().items():
            first, _, rest = name.partition(".")
            named[f"{prefix}.{inner[first]}.{rest}" if rest else f"{prefix}.{name}"] = value.clone()
    return named, ours


@pytest.mark.parametrize("channels, m", [(64, 8), (960, 30), (16, 8)])
def test_official_module_moves_in(channels, m):
    official = official_module(channels, m)
    module = CoordinateAttention(channels).eval()
    module.load_state_dict(from_official_state_dict(official))
    x = torch.randn(2, channels, 5, 7)
    f = F.conv2d(
        torch.cat([x.mean(3, keepdim=True), x.mean(2, keepdim=True).mT], 2),
        official["conv1.weight"], official["conv1.bias"],
    )  # fmt: skip
    statistics = (official["bn1.running_mean"], official["bn1.running_var"])
    f = F.hardswish(F.batch_norm(f, *statistics, official["bn1.weight"], official["bn1.bias"]))
    a_h = F.conv2d(f[:, :, :5], official["conv_h.weight"], official["conv_h.bias"]).sigmoid()
    a_w = F.conv2d(f[:, :, 5:].mT, official["conv_w.weight"], official["conv_w.bias"]).sigmoid()
    assert (module(x) - x * a_w * a_h).abs().max() < 1e-6


@pytest.mark.parametrize("width", [1.0, 0.35, 0.1])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_official_network_moves_in(width, prefix):
    official, ours = official_network(width)
    official = {prefix + name: value for name, value in official.items()}
    assert any("conv2.weight" in name for name in official)
    mapped = from_official_state_dict(official)
    assert list(mapped) == list(ours.state_dict())
    other = MobileNetV2CA(10, width=width)
    other.load_state_dict(mapped)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(other.eval()(x), ours.eval()(x))


def test_official_weights_without_counters_move_in():
    official = official_module()
    del official["bn1.num_batches_tracked"]
    module = CoordinateAttention(64)
    module.load_state_dict(from_official_state_dict(official))
    assert torch.equal(module.row_gate.weight, official["conv_h.weight"])


def test_official_weights_of_another_kind_are_refused(plain_python):
    with pytest.raises(ValueError, match=r"conv1\.weight"):
        from_official_state_dict({"fc.weight": torch.ones(2, 2)})
    wrong = official_module() | {"conv_h.weight": torch.ones(32, 8, 1, 1)}
    with pytest.raises(ValueError, match=r"conv_h.weight.*\(64, 8, 1, 1\).*\(32, 8, 1, 1\)"):
        from_official_state_dict(wrong)
    short = official_module()
    del short["conv_w.bias"]
    with pytest.raises(ValueError, match="must have 11 tensors, got 10"):
        from_official_state_dict(short)


# --- surroundings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    module, x = make(16), torch.randn(2, 16, 5, 7)
    wanted = module(x)
    y = module.to(dtype)(x.to(dtype))
    assert y.dtype == dtype
    assert torch.allclose(y.float(), wanted, atol=0.05 if dtype != torch.float64 else 1e-6)


def test_long_lines_do_not_overflow_in_half_precision():
    x = torch.full((1, 1, 2, 200), 1000.0, dtype=torch.float16)
    assert all((z == 1000).all() for z in coordinate_pool(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("build", [CoordinateAttention, SqueezeExcitation, CBAM])
def test_autocast_keeps_the_type_of_the_maps(dtype, training, build):
    module, x = build(16).train(training), torch.randn(2, 16, 9, 7).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
    assert y.dtype == dtype and y.shape == x.shape
    if training:
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("mode", ["hw", "h", "w"])
def test_maps_are_never_changed_in_place(mode):
    module, x = make(8, mode=mode), torch.randn(2, 8, 5, 7)
    before = x.clone()
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            module(x)
        assert torch.equal(x, before)


def test_compiles_in_one_graph(plain_python):
    torch._dynamo.reset()
    x = torch.randn(2, 16, 5, 7)
    for mode, training in (("hw", True), ("hw", False), ("w", False)):
        module, other = (make(16, mode=mode).train(training) for _ in range(2))
        compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
        leaf, other_leaf = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, compiled_y = module(leaf), compiled(other_leaf)
        assert torch.allclose(y, compiled_y, atol=1e-6)
        y.square().sum().backward(), compiled_y.square().sum().backward()
        assert torch.allclose(leaf.grad, other_leaf.grad, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(module(x), compiled(x), atol=1e-6)
    assert torch._dynamo.explain(make(16))(x).graph_break_count == 0


def test_views_and_single_rows():
    module = make(8)
    wide = torch.randn(2, 8, 10, 14)
    view = wide[:, :, ::2, ::2]
    assert torch.allclose(module(view), module(view.clone()), atol=1e-6)
    for shape in ((1, 8, 1, 1), (1, 8, 1, 9), (3, 8, 9, 1)):
        assert module(torch.randn(shape)).shape == shape


# --- bad input


@pytest.mark.parametrize("build", [CoordinateAttention, SqueezeExcitation, CBAM])
def test_wrong_maps_are_named(plain_python, build):
    module = build(16)
    with pytest.raises(ValueError, match=r"batch, channels, height, width.*\(16, 5, 7\)"):
        module(torch.randn(16, 5, 7))
    with pytest.raises(ValueError, match=r"16 channels, got 8"):
        module(torch.randn(2, 8, 5, 7))
    with pytest.raises(ValueError, match=r"floating-point.*int64"):
        module(torch.ones(2, 16, 5, 7, dtype=torch.long))


def test_pool_wants_four_dimensions(plain_python):
    with pytest.raises(ValueError, match=r"\(3, 4\)"):
        coordinate_pool(torch.randn(3, 4))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(reduction=0), "reduction must be at least 1, got 0"),
        (dict(min_channels=0), "min_channels must be at least 1, got 0"),
        (dict(mode="x"), r"mode must be one of \['hw', 'h', 'w'\], got 'x'"),
        (dict(activation="gelu"), "activation must be one of .*hard_swish.*got 'gelu'"),
    ],
)
def test_wrong_options_are_named(plain_python, options, message):
    with pytest.raises(ValueError, match=message):
        CoordinateAttention(16, **options)


def test_wrong_numbers_elsewhere(plain_python):
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        CoordinateAttention(0)
    for build in (SqueezeExcitation, CBAM):
        with pytest.raises(ValueError, match="hidden must be at least 1, got 0"):
            build(16, hidden=0)
        with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
            build(16, reduction=0)
    with pytest.raises(ValueError, match="stride must be 1 or 2, got 3"):
        InvertedResidualCA(8, 8, 3, 6)
    with pytest.raises(ValueError, match="expand must be at least 1, got 0"):
        InvertedResidualCA(8, 8, 1, 0)
    with pytest.raises(ValueError, match=r"attention must be one of .* got 'eca'"):
        MobileNetV2CA(attention="eca")
    with pytest.raises(ValueError, match="width must be positive and finite, got 0"):
        MobileNetV2CA(width=0)
    with pytest.raises(ValueError, match="reduction must be at least 1, got 0"):
        MobileNetV2CA(reduction=0)
    with pytest.raises(ValueError, match="must have 3 channels, got 1"):
        MobileNetV2CA(width=0.1)(torch.randn(1, 1, 32, 32))


def test_one_value_in_training_passes_torch_s_own_error():
    module = CoordinateAttention(8).train()
    assert module(torch.randn(1, 8, 1, 1)).shape == (1, 8, 1, 1)  # two lines of one position


# --- the fast path


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(2, 16, 40, 30), (1, 64, 23, 31)])
def test_large_maps_take_the_fast_path_to_the_same_numbers(shape, last):
    module = make(shape[1]).double()
    x = torch.randn(shape, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last) if last else x).requires_grad_()
    y = module(x)
    assert "GatedMap" in y.grad_fn.name()
    _, _, expected = by_formula(module, x)
    assert torch.allclose(y, expected, atol=1e-12)
    inputs = [x, *module.parameters()]
    ours, theirs = (torch.autograd.grad(z.square().sum(), inputs) for z in (y, expected))
    for found, wanted in zip(ours, theirs, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_gradients_of_gradients(monkeypatch):
    monkeypatch.setattr(coordinate_attention, "FEW", 0)
    module, x = make(4).double(), torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, x) and torch.autograd.gradgradcheck(module, x)


def test_training_keeps_less_than_the_formula_as_written():
    module, x = make(64), torch.randn(4, 64, 32, 32, requires_grad=True)

    def written(x):
        g_h, g_w = gates_as_written(module, x)
        return x * g_w * g_h

    assert peak_memory(written, x, backward=True) > 1.2 * peak_memory(module, x, backward=True)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_serves_maps_of_other_sizes():
    module = CoordinateAttention(16).eval()
    traced, x = torch.jit.trace(module, torch.randn(2, 16, 24, 17)), torch.randn(2, 16, 9, 40)
    assert torch.allclose(traced(x), module(x), atol=1e-6)


# --- the authors' own numbers

NAMES = {"conv1": "squeeze", "bn1": "norm", "conv_h": "row_gate", "conv_w": "column_gate"}


def load_attention(module, tensors):
    with torch.no_grad():
        for theirs, ours in NAMES.items():
            for part in ("weight", "bias"):
                getattr(getattr(module, ours), part).copy_(tensors[f"{theirs}.{part}"])
    return module


def load_in_order(module, tensors):
    weights = [tensor for name, tensor in tensors.items() if name != "x"]
    with torch.no_grad():
        for parameter, value in zip(module.parameters(), weights, strict=True):
            parameter.copy_(value)
    return module


def one_pass(case):
    module = load_attention(CoordinateAttention(10).double(), case.tensors)
    x = case.tensors["x"].requires_grad_()
    output = module(x)
    output.square().sum().backward()
    return {
        "output": output,
        "gradient w.r.t. x": x.grad,
        "gradient w.r.t. the F_1 weight": module.squeeze.weight.grad,
        "gradient w.r.t. the BN weight": module.norm.weight.grad,
        "gradient w.r.t. the F_h weight": module.row_gate.weight.grad,
        "gradient w.r.t. the F_w weight": module.column_gate.weight.grad,
        "running mean": module.norm.running_mean,
        "running variance": module.norm.running_var,
    }


def three_steps(case):
    s = case.settings
    module = CoordinateAttention(s["channels"], reduction=s["reduction"]).double()
    load_attention(module, case.tensors)
    options = {name: s[name] for name in ("lr", "momentum", "weight_decay")}
    descent, losses = torch.optim.SGD(module.parameters(), **options), []
    for _ in range(s["steps"]):
        descent.zero_grad()
        loss = (module(case.tensors["x"]) - case.tensors["target"]).square().mean()
        loss.backward()
        descent.step()
        losses.append(loss.detach())
    return {
        "losses": torch.stack(losses),
        "output in eval mode": module.eval()(case.tensors["x"]),
        "F_1 weight afterwards": module.squeeze.weight,
        "F_h weight afterwards": module.row_gate.weight,
        "F_w bias afterwards": module.column_gate.bias,
        "running mean": module.norm.running_mean,
        "running variance": module.norm.running_var,
    }


def block(case):
    module = load_in_order(InvertedResidualCA(8, 12, stride=2, expand=6).double(), case.tensors)
    x = case.tensors["x"].requires_grad_()
    output = module(x)
    output.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    convolutions = [g for n, g in gradients.items() if g.ndim == 4 and "gate" not in n]
    (rows,) = (g for n, g in gradients.items() if n.endswith("row_gate.weight"))
    return {
        "output": output,
        "gradient w.r.t. x": x.grad,
        "gradient w.r.t. the first pointwise weight": convolutions[0],
        "gradient w.r.t. the depthwise weight": convolutions[1],
        "gradient w.r.t. the row gate's weight": rows,
    }


def whole_network(case):
    network = load_in_order(MobileNetV2CA(num_classes=5, width=0.25).double(), case.tensors)
    network.classifier[0].p = 0.0
    in_training = network(case.tensors["x"])
    return {
        "logits in training mode": in_training,
        "logits in eval mode": network.eval()(case.tensors["x"]),
    }


RECOMPUTE = {
    "train mode, rectangular, gradients": one_pass,
    "reduction 4, batch of one, three steps of SGD, then eval": three_steps,
    "inverted residual with attention, stride 2": block,
    "whole MobileNetV2 with attention, width 0.25, eval": whole_network,
}


@pytest.mark.parametrize("case", [*load_reference("coordinate_attention")], ids=lambda c: c.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))


def test_a_checkpoint_may_wrap_its_weights():
    wrapped = {"state_dict": {f"module.{k}": v for k, v in official_weights().items()}}
    assert set(from_official_state_dict(wrapped)) == set(CoordinateAttention(64).state_dict())


def official_weights():
    sd = {}
    for name, shape in {
        "conv1": (8, 64),
        "bn1": (8,),
        "conv_h": (64, 8),
        "conv_w": (64, 8),
    }.items():
        sd[f"{name}.weight"] = torch.rand(*shape, *([1, 1] if len(shape) == 2 else []))
        sd[f"{name}.bias"] = torch.rand(shape[0])
        if name == "bn1":
            sd |= {"bn1.running_mean": torch.rand(8), "bn1.running_var": torch.rand(8)}
            sd["bn1.num_batches_tracked"] = torch.tensor(3)
    return sd
