"""The diffusion family's set-up: data, network, loss, sampler, training, weights, quality."""

import copy
import math
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from sklearn.datasets import load_digits
from torch import nn

from shuffle_nb.diffusion import tiny_diffusion
from shuffle_nb.diffusion.tiny_diffusion import (
    SHIPPED,
    EDMPrecond,
    TinyDiT,
    TinyDiTBlock,
    TinyUNet,
    UNetBlock,
    bent_grid,
    cosine_levels,
    ddim_step,
    diffuse,
    digit_classifier,
    digit_features,
    digit_images,
    edm_coefficients,
    edm_loss,
    edm_sigmas,
    edm_weight,
    frechet_distance,
    frechet_floor,
    group_norm,
    ink_attributes,
    learning_rate,
    load_tiny_dit,
    load_tiny_edm,
    load_weights,
    make_base_weights,
    make_weights,
    noise_images,
    noise_loss,
    predict_image,
    require_mask,
    sample_ddim,
    sample_euler,
    sample_heun,
    sample_stochastic,
    save_weights,
    scaled_linear_schedule,
    table_levels,
    train_recogniser,
    train_tiny_dit,
    train_tiny_edm,
    turns,
    unet_entries,
    waves,
)
from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.datasets import digits
from shuffle_nb.foundations.reference import load_reference

NAMES = [
    *["enc.8_conv", "enc.8_b0", "enc.4_down", "enc.4_b0"],
    *["dec.4_in0", "dec.4_b0", "dec.4_b1", "dec.8_up", "dec.8_b0", "dec.8_b1"],
]
SIGMAS = (0.05, 0.5, 5.0)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def awake(module: nn.Module, size: float = 0.05) -> nn.Module:
    """Move all weights a little: nothing is zero any more, every path counts."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape).to(parameter))
    return module


def small_unet(**options) -> TinyUNet:
    return awake(TinyUNet(**{"ch": 8, **options}))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def gaussian_denoiser(x, sigma):
    """The exact denoiser of data that are N(0, 0.25) in each pixel."""
    return 0.25 / (sigma**2 + 0.25) * x


@pytest.fixture(scope="module")
def trained():
    """A small model after a short training, shared by the tests that only look at it."""
    return train_tiny_edm(seed=0, ch=8, steps=60)


# ---------------------------------------------------------------- data


def test_digits_are_scaled_and_keep_their_order():
    images, labels = digit_images()
    raw = load_digits()
    assert images.shape == (1797, 1, 8, 8) and images.dtype == torch.float32
    assert images.mean().item() == pytest.approx(0, abs=1e-6)
    assert images.std(correction=0).item() == pytest.approx(0.5, abs=1e-6)
    assert labels.tolist() == raw.target.tolist() and labels.dtype == torch.long
    expected = (raw.images - raw.images.mean()) / raw.images.std() * 0.5  # one mean, one std
    assert np.allclose(images[:, 0], expected, atol=1e-5)


# ---------------------------------------------------------------- preconditioning


def test_coefficients_are_those_of_the_formulas():
    c_skip, c_out, c_in, c_noise = edm_coefficients(torch.tensor([0.5, 2.0]).double())
    assert c_skip.tolist() == pytest.approx([0.5, 0.25 / 4.25])
    assert c_out.tolist() == pytest.approx([0.25 / math.sqrt(0.5), 1 / math.sqrt(4.25)])
    assert c_in.tolist() == pytest.approx([1 / math.sqrt(0.5), 1 / math.sqrt(4.25)])
    assert c_noise.tolist() == pytest.approx([math.log(0.5) / 4, math.log(2) / 4])


@given(st.floats(1e-3, 100), st.floats(0.1, 2))
def test_input_and_target_of_the_network_have_variance_one(sigma, sigma_data):
    c_skip, c_out, c_in, _ = edm_coefficients(torch.tensor(sigma).double(), sigma_data)
    assert (c_in**2 * (sigma_data**2 + sigma**2)).item() == pytest.approx(1)
    # What F should say is (y - c_skip (y + sigma n)) / c_out, y and n independent.
    target = ((1 - c_skip) ** 2 * sigma_data**2 + (c_skip * sigma) ** 2) / c_out**2
    assert target.item() == pytest.approx(1)
    weight = edm_weight(torch.tensor(sigma).double(), sigma_data)
    assert (weight * c_out**2).item() == pytest.approx(1)


def test_noised_digits_have_unit_variance_after_c_in():
    images, _ = digit_images()
    for sigma in SIGMAS:
        noised = images + sigma * torch.randn(images.shape, generator=seeded())
        c_in = edm_coefficients(torch.tensor(sigma))[2]
        assert (c_in * noised).var().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("ch", [8, 16])
def test_an_untrained_model_returns_c_skip_x(ch):
    model = EDMPrecond(TinyUNet(ch))
    x = torch.randn(3, 1, 8, 8)
    for sigma in SIGMAS:
        c_skip = edm_coefficients(torch.tensor(sigma))[0]
        assert torch.equal(model(x, sigma), c_skip * x)
        assert torch.equal(model(x, sigma, skip_scale=[0.3, 0.0, 2.0, -1.0]), c_skip * x)


def test_the_denoiser_is_its_formula():
    model = EDMPrecond(small_unet(), sigma_data=0.4)
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 7.0])
    wide = sigma[:, None, None, None]
    total = wide**2 + 0.16
    raw = model.unet(x / total.sqrt(), sigma.log() / 4)
    expected = 0.16 / total * x + 0.4 * wide / total.sqrt() * raw
    assert torch.allclose(model(x, sigma), expected, atol=1e-6)


def test_one_level_for_all_is_that_level_for_each():
    model = EDMPrecond(small_unet()).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = model(x, torch.full((3,), 0.7, dtype=torch.float64))
    levels = [0.7, torch.tensor(0.7).double(), torch.tensor([0.7]).double()]
    levels += [torch.full((3, 1, 1, 1), 0.7).double(), torch.full((1, 1, 1, 1), 0.7).double()]
    for sigma in levels:
        assert torch.allclose(model(x, sigma), expected, atol=1e-7)
    mixed = torch.tensor([0.1, 0.7, 3.0])
    assert torch.allclose(model(x, mixed)[1], expected[1], atol=1e-7)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("ch", "parameters"), [(16, 168_433), (12, 95_221), (8, 42_745)])
def test_parameters(ch, parameters):
    assert count(TinyUNet(ch)) == parameters


def test_labels_add_one_bias_free_layer():
    assert count(TinyUNet(16, label_dim=10)) == 168_433 + 10 * 64


def test_entries_have_the_widths_and_skips_of_the_plan():
    unet = TinyUNet(16)
    assert unet.entry_names() == NAMES
    widths = [(e.in_channels, e.out_channels) for e in unet.entries]
    assert widths == [
        *[(1, 16), (16, 16), (16, 16), (16, 32)],
        *[(32, 32), (32 + 32, 32), (32 + 16, 32), (32, 32), (32 + 16, 16), (16 + 16, 16)],
    ]
    assert unet.skip_sources == {
        "dec.4_b0": "enc.4_b0",
        "dec.4_b1": "enc.4_down",
        "dec.8_b0": "enc.8_b0",
        "dec.8_b1": "enc.8_conv",
    }
    kinds = [entry.kind for entry in unet.entries]
    assert kinds == ["conv", "block", "down", "block"] + ["block"] * 3 + ["up"] + ["block"] * 2


def test_outputs_of_the_entries_have_the_shapes_of_the_plan():
    _, features = small_unet(ch=16)(torch.randn(2, 1, 8, 8), torch.zeros(2), return_features=True)
    assert list(features) == NAMES
    shapes = [tuple(feature.shape[1:]) for feature in features.values()]
    assert shapes == [
        *[(16, 8, 8), (16, 8, 8), (16, 4, 4), (32, 4, 4)],
        *[(32, 4, 4), (32, 4, 4), (32, 4, 4), (32, 8, 8), (16, 8, 8), (16, 8, 8)],
    ]


def test_multiply_adds_of_the_convolutions():
    """The numbers by which feature inheritance counts its savings."""
    unet, x = TinyUNet(16), torch.randn(1, 1, 8, 8)
    emb = unet.embed(torch.zeros(1))
    macs, h, outputs = {}, x, {}
    for entry in unet.entries:
        skip = outputs.get(entry.skip)
        flops = count_flops(lambda h, e=entry, s=skip: unet.run_entry(e.name, h, emb, s), h)
        linear = 0 if entry.kind == "conv" else 2 * 64 * 2 * entry.out_channels
        macs[entry.name] = (flops - linear) // 2
        h = outputs[entry.name] = unet.run_entry(entry.name, h, emb, skip)
    assert sum(macs.values()) == 4_064_256
    shares = [round(value / 4_064_256, 3) for value in macs.values()]
    assert shares == [0.002, 0.073, 0.018, 0.056, 0.073, 0.117, 0.097, 0.290, 0.157, 0.117]


def test_skips_of_a_large_plan_are_those_of_the_published_network():
    """ImageNet at 64 pixels: 16 concatenations, skip channels deep to shallow."""
    entries = unet_entries(192, (1, 2, 3, 4), 3, 3, 64)
    width = {entry.name: entry.out_channels for entry in entries}
    skips = [width[entry.skip] for entry in entries if entry.skip]
    assert skips == [768] * 3 + [576] * 4 + [384] * 4 + [192] * 5


def test_the_full_scale_preset_runs_with_labels():
    unet = TinyUNet(64, (1, 2, 2), 2, in_channels=3, label_dim=10, resolution=32)
    assert count(unet) == 6_904_195
    images = torch.randn(2, 3, 32, 32)
    denoised, features = EDMPrecond(awake(unet))(
        images, torch.tensor([0.3, 3.0]), torch.tensor([1, 9]), return_features=True
    )
    assert denoised.shape == images.shape and denoised.isfinite().all()
    assert len(features) == 9 + 12 and len(unet.skip_sources) == 9
    assert features["dec.8_in0"].shape == (2, 128, 8, 8)


@settings(deadline=None, max_examples=15)
@given(
    st.sampled_from([4, 8, 12]),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 3),
    st.integers(0, 4),
)
def test_every_size_runs_and_reads_each_skip_once(ch, mult, num_blocks, in_channels, label_dim):
    side = 2 * 2 ** (len(mult) - 1)
    unet = small_unet(
        ch=ch, mult=mult, num_blocks=num_blocks, in_channels=in_channels, label_dim=label_dim,
        resolution=side,
    )  # fmt: skip
    x = torch.randn(2, in_channels, side, side)
    label = torch.tensor([0, label_dim - 1]) if label_dim else None
    assert unet(x, torch.zeros(1), label).shape == x.shape
    encoder = [name for name in unet.entry_names() if name.startswith("enc")]
    assert list(unet.skip_sources.values()) == encoder[::-1]
    assert len(unet.entry_names()) == len(set(unet.entry_names()))


@pytest.mark.parametrize("kind", ["block", "down", "up"])
def test_a_block_is_its_formula(kind):
    block = awake(UNetBlock(8, 12, 16, kind)).double()
    x, emb = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 16).double()
    change = {
        "block": lambda t: t,
        "down": lambda t: F.avg_pool2d(t, 2),
        "up": lambda t: t.repeat_interleave(2, 2).repeat_interleave(2, 3),
    }[kind]
    norm0 = F.group_norm(x, 2, block.gn0.weight, block.gn0.bias, 1e-5)
    h = F.conv2d(change(F.silu(norm0)), block.conv0.weight, block.conv0.bias, padding=1)
    scale, shift = block.affine(emb)[..., None, None].chunk(2, dim=1)
    h = F.silu(F.group_norm(h, 3, block.gn1.weight, block.gn1.bias, 1e-5) * (1 + scale) + shift)
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    expected = h + F.conv2d(change(x), block.skip.weight, block.skip.bias)
    assert torch.allclose(block(x, emb), expected, atol=1e-10)


def test_a_new_block_is_its_residual_path():
    block = UNetBlock(8, 8, 16)
    x = torch.randn(2, 8, 4, 4)
    assert isinstance(block.skip, nn.Identity)
    assert torch.equal(block(x, torch.randn(2, 16)), x)
    assert isinstance(UNetBlock(8, 12, 16).skip, nn.Conv2d)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (36, 9), (128, 32), (192, 32)])
def test_groups_of_the_norm(channels, groups):
    norm = group_norm(channels)
    assert (norm.num_groups, norm.eps, norm.affine) == (groups, 1e-5, True)


def test_the_embedding_is_cosines_then_sines_then_two_layers():
    unet = small_unet()
    c_noise = torch.tensor([-0.7, 0.0, 1.1])
    frequencies = torch.tensor([10_000 ** (-k / 4) for k in range(4)])
    angles = c_noise[:, None] * frequencies
    wave = torch.cat([angles.cos(), angles.sin()], 1)
    expected = F.silu(unet.embed.map1(F.silu(unet.embed.map0(wave))))
    assert torch.allclose(unet.embed(c_noise), expected, atol=1e-6)
    assert torch.allclose(unet.embed(torch.tensor(0.0)), expected[1:2], atol=1e-6)


def test_labels_are_integers_or_one_hot_rows_and_enter_before_the_last_activation():
    unet = small_unet(label_dim=5)
    label, c_noise = torch.tensor([4, 0, 2]), torch.tensor([0.1, 0.2, 0.3])
    one_hot = F.one_hot(label, 5)
    wave = torch.cat(
        [f(c_noise[:, None] * 10_000.0 ** -(torch.arange(4) / 4)) for f in (torch.cos, torch.sin)],
        1,
    )
    before = unet.embed.map1(F.silu(unet.embed.map0(wave)))
    expected = F.silu(before + one_hot.float() @ unet.embed.map_label.weight.T)
    for given_label in (label, one_hot, one_hot.float()):
        assert torch.allclose(unet.embed(c_noise, given_label), expected, atol=1e-6)
    assert torch.allclose(unet.embed(c_noise), F.silu(before), atol=1e-6)  # no label: nothing
    assert unet.embed.map_label.bias is None
    x = torch.randn(3, 1, 8, 8)
    assert torch.allclose(
        unet(x, c_noise[:1], label), unet(x, c_noise[:1].repeat(3), label), atol=1e-6
    )


def test_running_entry_by_entry_is_the_forward_pass():
    unet = small_unet()
    x, c_noise = torch.randn(3, 1, 8, 8), torch.randn(3)
    expected, features = unet(x, c_noise, return_features=True)
    emb, h, outputs = unet.embed(c_noise), x, {}
    for name in unet.entry_names():
        h = outputs[name] = unet.run_entry(name, h, emb, outputs.get(unet.skip_sources.get(name)))
        assert torch.equal(h, features[name])
    assert torch.equal(unet.read_out(h), expected)
    assert torch.equal(unet(x, c_noise), expected)


def test_the_way_up_comes_first_and_the_skip_second():
    unet = small_unet()
    emb = unet.embed(torch.zeros(1))
    h, skip = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    expected = unet.dec["4_b0"](torch.cat([h, skip], 1), emb)
    assert torch.equal(unet.run_entry("dec.4_b0", h, emb, skip), expected)
    assert not torch.equal(unet.run_entry("dec.4_b0", skip, emb, h), expected)


def test_whoever_stops_asking_stops_the_network():
    unet, ran = small_unet(), []
    for part in (unet.enc, unet.dec):
        for layer in part.values():
            layer.register_forward_hook(lambda layer, *rest: ran.append(layer))
    x = torch.randn(1, 1, 8, 8)
    for name, _ in unet.walk(x, unet.embed(torch.zeros(1))):
        if name == "dec.4_b0":
            break
    assert len(ran) == 6


def test_skips_of_ones_change_no_bit_and_every_form_of_a_coefficient_is_alike():
    unet = small_unet()
    x, c_noise = torch.randn(3, 1, 8, 8), torch.randn(3)
    assert torch.equal(unet(x, c_noise, skip_scale=[1.0] * 4), unet(x, c_noise))
    numbers = [0.5, 0.6, 0.7, 0.8]
    expected = unet(x, c_noise, skip_scale=numbers)
    assert not torch.equal(expected, unet(x, c_noise))
    forms = [
        torch.tensor(numbers),
        [torch.tensor(number) for number in numbers],
        [torch.full((3, 1, 1, 1), number) for number in numbers],
        torch.tensor(numbers).reshape(4, 1, 1, 1, 1).expand(4, 3, 1, 1, 1),
    ]
    for form in forms:
        assert torch.equal(unet(x, c_noise, skip_scale=form), expected)
    rows = torch.rand(4, 3, 1, 1, 1)
    mixed = unet(x, c_noise, skip_scale=list(rows))
    for row in range(3):
        alone = unet(x, c_noise, skip_scale=rows[:, row, 0, 0, 0])
        assert torch.allclose(mixed[row], alone[row], atol=1e-6)


@pytest.mark.parametrize("index", range(4))
def test_coefficients_go_from_the_deepest_skip_to_the_shallowest(index):
    unet = small_unet()
    x, c_noise = torch.randn(2, 1, 8, 8), torch.randn(2)
    scale = [1.0] * 4
    scale[index] = 0.5
    _, plain = unet(x, c_noise, return_features=True)
    _, scaled = unet(x, c_noise, skip_scale=scale, return_features=True)
    first = NAMES.index(list(unet.skip_sources)[index])
    same = [torch.equal(plain[name], scaled[name]) for name in NAMES]
    assert same == [True] * first + [False] * (10 - first)


def test_without_skips_the_output_depends_on_the_input_through_the_bottom_only():
    unet = small_unet()
    x, c_noise = torch.randn(2, 1, 8, 8), torch.randn(2)
    bottom = {}
    handle = unet.enc["4_b0"].register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
    try:
        bottom = unet(x, c_noise, skip_scale=[0.0] * 4), unet(x + 1, c_noise, skip_scale=[0.0] * 4)
    finally:
        handle.remove()
    assert torch.equal(*bottom)
    assert not torch.equal(unet(x, c_noise), unet(x + 1, c_noise))


def test_gradients_through_the_whole_denoiser():
    unet = awake(TinyUNet(4, (1, 1), 1, resolution=4), 0.3).double()
    model = EDMPrecond(unet)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    scale = torch.rand(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *a: model(a[0], a[1], skip_scale=a[2]), (x, sigma, scale)
    )


def test_float64_half_and_autocast():
    model = EDMPrecond(small_unet(label_dim=3))
    x, sigma, label = torch.randn(2, 1, 8, 8), torch.tensor([0.05, 20.0]), torch.tensor([0, 2])
    expected = model(x, sigma, label)
    exact = copy.deepcopy(model).double()(x.double(), sigma, label)
    assert exact.dtype == torch.float64 and torch.allclose(exact.float(), expected, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(x, sigma, label)
        loss = edm_loss(model, x, label)
    assert torch.allclose(mixed.float(), expected, atol=0.1) and loss.isfinite()
    low = copy.deepcopy(model).bfloat16()(x.bfloat16(), sigma, label)
    assert low.dtype == torch.bfloat16 and torch.allclose(low.float(), expected, atol=0.3)


@pytest.mark.usefixtures("plain_python")
def test_compiled_without_graph_breaks():
    model = EDMPrecond(small_unet(label_dim=3))
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.05, 20.0])
    label, scale = torch.tensor([0, 2]), torch.tensor([0.5, 0.6, 0.7, 0.8])

    def call(x, sigma, label, scale):
        return model(x, sigma, label, skip_scale=scale, return_features=True)

    denoised, features = torch.compile(call, fullgraph=True, backend="aot_eager")(
        x, sigma, label, scale
    )
    expected, expected_features = call(x, sigma, label, scale)
    assert torch.allclose(denoised, expected, atol=1e-5)
    assert list(features) == list(expected_features)
    loss = torch.compile(edm_loss, fullgraph=True, backend="aot_eager")(model, x, label)
    loss.backward()
    assert loss.isfinite() and model.unet.enc["8_conv"].weight.grad is not None


def test_state_dict_round_trip():
    unet, other = small_unet(label_dim=2), small_unet(label_dim=2)
    other.load_state_dict(unet.state_dict())
    x, c_noise = torch.randn(2, 1, 8, 8), torch.randn(2)
    assert torch.equal(unet(x, c_noise), other(x, c_noise))
    assert not any("frequencies" in name for name in unet.state_dict())
    parts = {name.split(".")[0] for name in unet.state_dict()}
    assert parts == {"embed", "enc", "dec", "out_norm", "out_conv"}


# ---------------------------------------------------------------- loss


def test_loss_of_an_untrained_model_is_one():
    images, _ = digit_images()
    model, generator = EDMPrecond(TinyUNet(8)), seeded()
    losses = [edm_loss(model, images[:1280], generator=generator).item() for _ in range(4)]
    assert sum(losses) / 4 == pytest.approx(1, abs=0.02)


def test_noise_levels_are_log_normal_and_noise_is_of_that_size():
    noised, sigma = noise_images(torch.full((20_000, 1, 2, 2), 3.0), seeded())
    assert sigma.shape == (20_000, 1, 1, 1)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=0.03)
    assert sigma.log().std().item() == pytest.approx(1.2, abs=0.03)
    unit = (noised - 3) / sigma
    assert unit.mean().item() == pytest.approx(0, abs=0.02)
    assert unit.std().item() == pytest.approx(1, abs=0.02)
    _, other = noise_images(torch.zeros(20_000, 1, 1, 1), seeded(), mean=0.5, std=0.1)
    assert other.log().mean().item() == pytest.approx(0.5, abs=0.01)
    assert other.log().std().item() == pytest.approx(0.1, abs=0.01)


def test_loss_is_the_weighted_square_and_a_generator_repeats_it():
    model = EDMPrecond(small_unet())
    images = torch.randn(5, 1, 8, 8)
    noised, sigma = noise_images(images, seeded(3))
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    expected = weight * (model(noised, sigma) - images) ** 2
    state = torch.get_rng_state()
    each = edm_loss(model, images, generator=seeded(3), reduction="none")
    assert torch.allclose(each, expected, rtol=1e-5)
    assert torch.allclose(edm_loss(model, images, generator=seeded(3)), expected.mean())
    assert torch.equal(torch.get_rng_state(), state)


def test_loss_passes_labels_on():
    model = EDMPrecond(small_unet(label_dim=4))
    images = torch.randn(3, 1, 8, 8)
    values = [
        edm_loss(model, images, label, generator=seeded()).item()
        for label in (None, torch.tensor([0, 1, 2]), torch.tensor([3, 1, 2]))
    ]
    assert len(set(values)) == 3


# ---------------------------------------------------------------- sampler


def test_sigmas_are_the_formula():
    sigmas = edm_sigmas(5, 0.01, 20)
    ends = 20 ** (1 / 7), 0.01 ** (1 / 7)
    expected = [(ends[0] + i / 4 * (ends[1] - ends[0])) ** 7 for i in range(5)]
    assert sigmas.tolist() == pytest.approx([*expected, 0])
    assert edm_sigmas(1).tolist() == pytest.approx([80, 0])
    assert edm_sigmas(18)[[0, -2]].tolist() == pytest.approx([80, 0.002])


@given(st.integers(1, 60), st.floats(1e-3, 0.1), st.floats(1, 100), st.floats(1, 9))
def test_sigmas_fall_from_smax_to_smin_and_then_to_zero(n, smin, smax, rho):
    sigmas = edm_sigmas(n, smin, smax, rho)
    assert len(sigmas) == n + 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert sigmas[0].item() == pytest.approx(smax, rel=1e-5)
    if n > 1:
        assert sigmas[-2].item() == pytest.approx(smin, rel=1e-4)


def gaussian_std(sampler, n):
    """The ODE is linear here, so a start of 1 ends at the standard deviation of the samples."""
    start = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    return sampler(gaussian_denoiser, start, edm_sigmas(n)).item()


def test_samplers_reach_the_data_of_an_exact_denoiser():
    heun = [gaussian_std(sample_heun, n) for n in (10, 20, 40, 80)]
    euler = [gaussian_std(sample_euler, n) for n in (10, 20, 40, 80)]
    assert heun[2] == pytest.approx(0.5, abs=0.01)
    assert heun == sorted(heun, reverse=True) and heun[-1] > 0.499  # from above
    assert euler == sorted(euler) and euler[-1] < 0.5  # from below
    assert euler[0] < 0.45 and euler[-1] > 0.48


def test_samples_of_an_exact_denoiser_have_the_right_spread():
    z = torch.randn(4000, 1, 2, 2, generator=seeded())
    assert sample_heun(gaussian_denoiser, z, edm_sigmas(40)).std().item() == pytest.approx(
        0.5, abs=0.01
    )


def test_steps_are_those_of_euler_and_heun():
    """Two levels, a denoiser that always says 1: every slope is (x - 1) / sigma."""
    z, sigmas = torch.full((1, 1, 1, 1), 3.0), torch.tensor([2.0, 1.0, 0.0])

    def doubtful(x, sigma):
        return x * sigma / 4

    # Euler: 6 -> 6 - (6 - 3) / 2 = 4.5; then onto D = 4.5 / 4.
    assert sample_euler(doubtful, z, sigmas).item() == pytest.approx(1.125)
    # Heun: slope 1.5 at 6, slope (4.5 - 1.125) / 1 at 4.5, mean 2.4375; then onto D.
    assert sample_heun(doubtful, z, sigmas).item() == pytest.approx((6 - 2.4375) / 4)
    one = torch.tensor([2.0, 0.0])
    for sampler in (sample_euler, sample_heun):
        assert sampler(doubtful, z, one).item() == pytest.approx(3)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_evaluations_of_the_denoiser_and_their_levels(n):
    z, sigmas = torch.randn(2, 1, 8, 8), edm_sigmas(n)
    for sampler, expected in ((sample_euler, n), (sample_heun, 2 * n - 1)):
        levels = []

        def net(x, sigma, levels=levels, **options):
            levels.append(float(sigma))
            assert options == {"label": 5}
            return gaussian_denoiser(x, sigma)

        assert sampler(net, z, sigmas, label=5).shape == z.shape
        assert len(levels) == expected and min(levels) > 0
        assert set(levels) == set(sigmas[:-1].tolist())


def test_sampling_leaves_noise_and_gradients_alone():
    model, z = EDMPrecond(small_unet()), torch.randn(2, 1, 8, 8)
    before = z.clone()
    for sampler in (sample_euler, sample_heun):
        drawn = sampler(model, z, edm_sigmas(3, smax=20), skip_scale=[0.9] * 4)
        assert torch.equal(z, before) and not drawn.requires_grad
        assert sampler(model.double(), z.double(), edm_sigmas(3)).dtype == torch.float64
        model.float()


# ---------------------------------------------------------------- training


def test_learning_rate_rises_over_50_steps_and_falls_to_a_twentieth():
    rates = [learning_rate(step, 1000) for step in range(1000)]
    assert rates[:2] == pytest.approx([2e-3 / 50, 4e-3 / 50])
    assert rates[49] == pytest.approx(2e-3) and max(rates) == pytest.approx(2e-3)
    assert rates[50:] == sorted(rates[50:], reverse=True)
    assert learning_rate(525, 1000) == pytest.approx(2e-3 * 0.525)
    assert learning_rate(1000, 1000) == pytest.approx(1e-4)
    assert learning_rate(9, 10) == pytest.approx(2e-3 / 5)


def test_sixty_steps_are_enough_to_see_it_learn(trained):
    model, losses = trained
    assert len(losses) == 60
    assert losses[0] == pytest.approx(1, abs=0.15)
    assert sum(losses[-10:]) / 10 < 0.93
    assert isinstance(model, EDMPrecond) and not model.training
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in model.parameters())


def test_a_seed_repeats_the_training_and_the_callers_stream_is_untouched():
    images = digit_images()[0][:128]
    state = torch.get_rng_state()
    options = dict(ch=4, steps=3, images=images, batch_size=32)
    (first, one), (second, two) = (train_tiny_edm(5, **options) for _ in range(2))
    assert one == two
    assert all(map(torch.equal, first.parameters(), second.parameters()))
    assert train_tiny_edm(6, **options)[1] != one
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_returned_is_the_moving_average(monkeypatch):
    """Every weight moves by 1 in each step here, so the average is known."""

    class Counter(torch.optim.SGD):
        def __init__(self, parameters, lr, **options):
            super().__init__(parameters, lr)
            self.start = [p.detach().clone() for p in self.param_groups[0]["params"]]
            assert options == {"betas": (0.9, 0.99), "fused": True}

        def step(self):
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter.add_(1)

    steps, average = 4, 0.0
    for step in range(steps):
        decay = min(0.995, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * (step + 1)
    monkeypatch.setattr(torch.optim, "Adam", Counter)
    options = dict(ch=4, images=digit_images()[0][:64], batch_size=16)
    moved, _ = train_tiny_edm(0, steps=steps, **options)
    assert moved.unet.out_conv.weight.mean().item() == pytest.approx(average, rel=1e-5)


def test_training_takes_other_images_labels_and_sizes():
    images, labels = torch.randn(24, 3, 4, 4), torch.arange(24) % 3
    model, losses = train_tiny_edm(
        ch=4, steps=2, images=images, labels=labels, mult=(1, 1), num_blocks=2, batch_size=8,
        amp=True,
    )  # fmt: skip
    assert len(losses) == 2
    assert model.unet.label_dim == 3 and model.unet.in_channels == 3
    assert model(images, 1.0, labels).shape == images.shape


# ---------------------------------------------------------------- weights


def test_weights_are_rounded_to_16_bits_and_checked(tmp_path):
    model, file = small_unet(label_dim=2), tmp_path / "new" / "w.safetensors"
    checksum = save_weights(model, file)
    assert len(checksum) == 64
    loaded = load_weights(small_unet(label_dim=2), str(file), checksum)
    assert not loaded.training
    for name, value in loaded.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, model.state_dict()[name].half().float())
    exact = load_weights(small_unet(label_dim=2).double(), file, checksum)
    assert exact.embed.map0.weight.dtype == torch.float64
    assert save_weights(loaded, tmp_path / "again") == checksum  # rounding twice changes nothing


def test_other_numbers_than_floating_ones_are_kept(tmp_path):
    model = nn.BatchNorm1d(3)
    model.num_batches_tracked.fill_(70_001)
    checksum = save_weights(model, tmp_path / "w")
    assert load_weights(nn.BatchNorm1d(3), tmp_path / "w", checksum).num_batches_tracked == 70_001


def test_a_bare_name_is_looked_up_beside_the_module(tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    model = nn.Linear(2, 2)
    checksum = save_weights(model, tmp_path / "shipped" / "w.safetensors")
    monkeypatch.setattr(tiny_diffusion, "files", lambda package: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert load_weights(nn.Linear(2, 2), "w.safetensors", checksum)
    with pytest.raises(ValueError, match=r"here.w.safetensors is missing"):
        load_weights(nn.Linear(2, 2), "here/w.safetensors", checksum)


def test_rounding_to_16_bits_hardly_changes_the_denoiser(trained, tmp_path):
    model, _ = trained
    checksum = save_weights(model, tmp_path / "w")
    rounded = load_weights(EDMPrecond(TinyUNet(8)), tmp_path / "w", checksum)
    images, _ = digit_images()
    with torch.no_grad():
        for sigma in SIGMAS:
            noised = images[:256] + sigma * torch.randn(256, 1, 8, 8, generator=seeded())
            assert (model(noised, sigma) - rounded(noised, sigma)).abs().max() < 2e-3


@pytest.mark.parametrize("ch", [16, 8])
def test_shipped_weights_load_and_denoise(ch):
    state = torch.get_rng_state()
    model = load_tiny_edm(ch)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and count(model) == {16: 168_433, 8: 42_745}[ch]
    images, _ = digit_images()
    with torch.no_grad():
        loss = edm_loss(model, images, generator=seeded()).item()
    assert loss < {16: 0.39, 8: 0.46}[ch]


def test_a_shipped_file_that_is_missing_or_altered_is_refused(tmp_path, monkeypatch):
    name = "tiny_edm_ch8.safetensors"
    content = files("shuffle_nb.diffusion").joinpath(name).read_bytes()
    monkeypatch.setattr(tiny_diffusion, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_tiny_edm(8)
    (tmp_path / name).write_bytes(content[:-2] + b"!!")
    with pytest.raises(ValueError, match=f"{name} is corrupt: expected SHA-256 {SHIPPED[8]}"):
        load_tiny_edm(8)


def test_shipped_files_are_small():
    folder = files("shuffle_nb.diffusion")
    sizes = [len(folder.joinpath(f"tiny_edm_ch{ch}.safetensors").read_bytes()) for ch in SHIPPED]
    assert sum(sizes) < 450_000


def test_shipped_weights_sample_digits():
    """Far closer to digits than noise of the same spread, and most are named with confidence."""
    z = torch.randn(500, 1, 8, 8, generator=seeded(7))
    drawn = sample_heun(load_tiny_edm(16), z, edm_sigmas(6, smax=20))
    real = digit_features(digit_images()[0])
    distance = frechet_distance(digit_features(drawn), real)
    assert distance < 60 < frechet_distance(digit_features(0.5 * z), real)


def test_making_the_weights_is_one_call(tmp_path, capsys):
    threads = torch.get_num_threads()
    checksums = make_weights(tmp_path, steps=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "tiny_edm_ch16.safetensors",
        "tiny_edm_ch8.safetensors",
    ]
    printed = capsys.readouterr().out
    assert set(checksums) == set(SHIPPED)
    assert all(checksum in printed for checksum in checksums.values())
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="exists already"):
        make_weights(tmp_path, steps=1)
    expected = train_tiny_edm(0, 8, 1)[0]
    loaded = load_weights(
        EDMPrecond(TinyUNet(8)), tmp_path / "tiny_edm_ch8.safetensors", checksums[8]
    )
    rounded = expected.half().float()
    assert all(map(torch.equal, loaded.parameters(), rounded.parameters()))


# ---------------------------------------------------------------- quality


def test_the_classifier_knows_digits_it_has_not_seen():
    images, labels = digit_images()
    unseen = torch.randperm(1797, generator=seeded())[1437:]
    named = digit_classifier()(images[unseen]).argmax(1)
    assert (named == labels[unseen]).float().mean() > 0.93


def test_features_are_made_once_also_where_gradients_are_off():
    images, _ = digit_images()
    digit_classifier.cache_clear()
    state = torch.get_rng_state()
    with torch.no_grad():
        first = digit_features(images[:9], epochs=1)
    with torch.inference_mode():
        other = digit_features(images[:9], seed=1, epochs=1)
    assert first.shape == (9, 64) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(digit_features(images[:9], epochs=1), first)
    assert digit_classifier.cache_info().misses == 2
    digit_classifier.cache_clear()
    assert torch.equal(digit_features(images[:9], epochs=1), first)  # trained anew, the same
    assert digit_features(images[:9].double(), epochs=1).dtype == torch.float64


def test_features_follow_gradients_to_the_images():
    images = digit_images()[0][:2].requires_grad_()
    digit_features(images, epochs=1).sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(not parameter.requires_grad for parameter in digit_classifier(epochs=1).parameters())


def test_distance_of_a_sample_to_itself_and_to_a_translation():
    sample = torch.randn(300, 12, generator=seeded()) @ torch.randn(12, 12, generator=seeded(1))
    move = torch.randn(12, generator=seeded(2))
    assert frechet_distance(sample, sample) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(sample, sample + move) == pytest.approx(
        move.square().sum().item(), rel=1e-4
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 8), st.integers(12, 40), st.integers(12, 40), st.integers(0, 99))
def test_distance_is_the_formula(width, n, m, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, width)), 1 + 2 * rng.normal(size=(m, width))
    cov_a, cov_b = (np.atleast_2d(np.cov(sample.T)) for sample in (a, b))
    root = sqrtm(cov_a)
    cross = sqrtm(root @ cov_b @ root).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * cross)
    found = frechet_distance(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(expected, rel=1e-8)
    assert found == pytest.approx(frechet_distance(torch.from_numpy(b), torch.from_numpy(a)))


def test_distance_of_samples_with_fewer_rows_than_features():
    """Two points each, on two axes: means 1 apart on both, variances 2, nothing shared."""
    a, b = torch.zeros(2, 5), torch.zeros(2, 5)
    a[:, 0], b[:, 1] = torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 1 + 2 + 2)


def test_distance_does_not_change_under_rotation():
    a, b = torch.randn(50, 6), 0.3 + torch.randn(80, 6) * 2
    rotation, _ = torch.linalg.qr(torch.randn(6, 6))
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(
        frechet_distance(a, b), rel=1e-4
    )


def test_the_floor_is_real_against_real_and_falls_with_the_number():
    real = digit_features(digit_images()[0])
    few, many = frechet_floor(real, 200), frechet_floor(real, 898)
    assert len(few) == 3 and 0 < max(many) < min(few)
    order = torch.randperm(1797, generator=seeded(2))
    assert frechet_floor(real, 600, seeds=[2]) == [
        frechet_distance(real[order[:600]], real[order[600:]])
    ]
    noise = 0.5 * torch.randn(898, 1, 8, 8, generator=seeded())
    assert frechet_distance(digit_features(noise), real) > 20 * max(many)


# ---------------------------------------------------------------- times and levels of any type


def test_waves_are_the_formula_and_count_in_32_bits():
    places, dim = torch.tensor([0.0, 0.7, 997.0], dtype=torch.float64), 12
    rates = torch.tensor([10_000.0 ** -(k / 6) for k in range(6)], dtype=torch.float64)
    expected = torch.cat([(places[:, None] * rates).sin(), (places[:, None] * rates).cos()], 1)
    torch.testing.assert_close(waves(places, dim), expected)
    torch.testing.assert_close(
        waves(places, dim, cosine_first=True), torch.cat(expected.chunk(2, 1)[::-1], 1)
    )
    for kind in (torch.int32, torch.int64, torch.bfloat16, torch.float16):
        values = torch.tensor([1, 3, 64]).to(kind)
        assert torch.equal(waves(values, dim), waves(values.float(), dim)), kind


@pytest.mark.parametrize("load", [load_tiny_dit, load_tiny_edm])
def test_whole_number_times_mean_what_float_times_mean(load):
    model, x = load(), torch.randn(2, 1, 8, 8)
    assert torch.equal(model(x, torch.tensor([1, 1])), model(x, torch.tensor([1.0, 1.0])))


@pytest.mark.parametrize("load", [load_tiny_dit, load_tiny_edm])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_takes_times_of_any_type(load, kind):
    model, x, t = load().to(kind), torch.randn(4, 1, 8, 8).to(kind), torch.rand(4) + 0.01
    exact = load()(x.float(), t)
    for times in (t, t.double()):
        out = model(x, times)
        assert out.dtype == kind
        assert (out - exact).abs().max() < 0.15
    assert model(x, torch.tensor([1, 1, 1, 1])).dtype == kind


def test_half_precision_times_lose_nothing_beyond_their_own_rounding():
    """A thousand times the time does not fit into 8 bits: the model widens before it multiplies."""
    t, base = torch.rand(256).bfloat16(), load_tiny_dit()
    assert torch.equal(base.time(t)[0], base.time(t.float())[0])


def test_the_denoiser_exports_with_a_dynamic_batch():
    from torch.export import Dim, export

    n, model = Dim("n", min=2, max=64), awake(EDMPrecond(TinyUNet(8)))
    sizes = ({0: n}, {0: n})
    program = export(model, (torch.randn(3, 1, 8, 8), torch.ones(3)), dynamic_shapes=sizes)
    for count in (2, 5):
        x, sigma = torch.randn(count, 1, 8, 8), torch.rand(count) + 0.1
        torch.testing.assert_close(program.module()(x, sigma), model(x, sigma))


# ---------------------------------------------------------------- labels that are left out


def test_labels_are_left_out_at_their_rate_in_training_only():
    unet = small_unet(label_dim=3, label_dropout=0.25)
    label, c_noise = torch.zeros(4000, dtype=torch.long), torch.zeros(1)
    unet.embed.eval()
    with_label, without = unet.embed(c_noise, label)[:1], unet.embed(c_noise)
    unet.embed.train()
    rows = unet.embed(c_noise, label)
    left_out = torch.isclose(rows, without, atol=1e-6).all(1)
    assert torch.isclose(rows[~left_out], with_label, atol=1e-6).all()
    assert abs(left_out.float().mean() - 0.25) < 0.03
    labels = torch.arange(128) % 2
    images = torch.randn(128, 1, 8, 8)
    model, _ = train_tiny_edm(0, 8, 2, images=images, labels=labels, label_dropout=0.5)
    assert model.unet.embed.label_dropout == 0.5


# ---------------------------------------------------------------- the stochastic sampler


def plain_stochastic(net, z, sigmas, churn, low, high, size, noises):
    """Algorithm 2 of EDM, line by line, with given noises."""
    x, n = z * sigmas[0], len(sigmas) - 1
    for i in range(n):
        t = sigmas[i]
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= t <= high else 0.0
        t_hat = t + gamma * t
        if gamma > 0:
            x = x + (t_hat**2 - t**2).sqrt() * size * noises.pop(0)
        d = (x - net(x, t_hat)) / t_hat
        following = x + (sigmas[i + 1] - t_hat) * d
        if i + 1 < n:
            d2 = (following - net(following, sigmas[i + 1])) / sigmas[i + 1]
            following = x + (sigmas[i + 1] - t_hat) * (0.5 * d + 0.5 * d2)
        x = following
    return x


@pytest.mark.parametrize(
    ("churn", "low", "high", "size"), [(3.0, 0.05, 50, 1.003), (40.0, 0.0, 9.0, 1.0), (1, 2, 1, 1)]
)
def test_stochastic_sampler_is_the_papers_algorithm(churn, low, high, size):
    z, sigmas = torch.randn(2, 1, 3, 4, dtype=torch.float64), edm_sigmas(7, smax=20).double()
    draw = seeded(5)
    noises = [torch.randn(z.shape, generator=draw, dtype=z.dtype) for _ in range(7)]
    expected = plain_stochastic(oracle_net, z, sigmas, churn, low, high, size, noises)
    found = sample_stochastic(oracle_net, z, sigmas, churn, low, high, size, seeded(5))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_without_churn_it_is_heun_and_with_churn_the_spread_stays_right():
    z, sigmas = torch.randn(4000, 1, 1, 1), edm_sigmas(40)
    calm = sample_stochastic(gaussian_denoiser, z, sigmas, churn=0)
    torch.testing.assert_close(calm, sample_heun(gaussian_denoiser, z, sigmas))
    stirred = sample_stochastic(
        gaussian_denoiser, z, sigmas, churn_noise=1.0, churn_min=0, generator=seeded()
    )
    assert abs(stirred.std() - 0.5) < 0.03
    assert (stirred - calm).abs().mean() > 0.1


# ---------------------------------------------------------------- the other notation


def test_diffusion_and_its_inverse_under_both_schedules():
    x, noise = torch.randn(2, 5, 1, 8, 8)
    t = 0.98 * torch.rand(5)
    torch.testing.assert_close(predict_image(diffuse(x, noise, t), noise, t), x, atol=1e-4, rtol=0)
    assert torch.equal(diffuse(x, noise, torch.zeros(5)), x)
    torch.testing.assert_close(diffuse(x, noise, torch.ones(5)), noise, atol=1e-6, rtol=0)
    levels, steps = table_levels(scaled_linear_schedule()), torch.tensor([0, 3, 400, 800, 999])
    noisy = diffuse(x, noise, steps, levels)
    torch.testing.assert_close(predict_image(noisy, noise, steps, levels), x, atol=1e-4, rtol=1e-4)
    signal, spread = levels(steps)
    torch.testing.assert_close(signal**2 + spread**2, torch.ones(5))
    assert diffuse(x.bfloat16(), noise.bfloat16(), t).dtype == torch.bfloat16


def test_a_ddim_step_is_one_of_euler_in_the_other_notation():
    z, eps = torch.randn(2, 7, dtype=torch.float64)
    for a_t, a_prev in ((0.2, 0.5), (0.6, 1.0)):
        now, then = (math.sqrt((1 - a) / a) for a in (a_t, a_prev))
        expected = math.sqrt(a_prev) * (z / math.sqrt(a_t) + (then - now) * eps)
        torch.testing.assert_close(ddim_step(z, eps, a_t, a_prev)[0], expected)
    t = torch.tensor([0.3])
    signal, spread = cosine_levels(t)
    torch.testing.assert_close(spread / signal, (torch.pi * t / 2).tan())


def test_noise_loss_is_the_squared_error_of_the_noise():
    images, t = torch.randn(6, 1, 8, 8), torch.full((6,), 0.5)
    seen, told = [], torch.ones(6)

    def model(noisy, t, *condition):
        seen.append((noisy, t, condition))
        return torch.zeros_like(noisy)

    loss = noise_loss(model, images, told, t=t, generator=seeded(3))
    noise = torch.randn(images.shape, generator=seeded(3))
    torch.testing.assert_close(loss, noise.square().mean())
    noisy, times, condition = seen[0]
    torch.testing.assert_close(noisy, diffuse(images, noise, t))
    assert times is t and condition[0] is told
    noise_loss(model, images)
    assert seen[1][1].min() >= 0.01 and seen[1][1].max() <= 0.99


# ---------------------------------------------------------------- the small Transformer


def test_patches_become_tokens_and_an_untrained_transformer_predicts_nothing():
    base, x = TinyDiT(dim=16, depth=1), torch.randn(2, 1, 8, 8)
    assert base.embed(x).shape == (2, 16, 16)
    assert base.places.unique(dim=0).shape == (16, 16)
    assert not base(x, torch.rand(2)).any()
    pixels = torch.arange(64.0).view(1, 1, 8, 8)  # a pixel of the output is that of its own patch
    assert torch.equal(F.fold(F.unfold(pixels, 2, stride=2), 8, 2, stride=2), pixels)


def test_its_block_is_adaptive_attention_and_mlp():
    block = TinyDiTBlock(8, 2).double()
    x, t_mod = torch.randn(2, 4, 8).double(), torch.randn(2, 48).double()
    a, b, g, a2, b2, g2 = (block.table + t_mod.view(2, 6, 8))[:, :, None].unbind(1)
    q, k, v = block.qkv(F.layer_norm(x, (8,), eps=1e-6) * (1 + b) + a).chunk(3, dim=2)
    heads = [
        torch.softmax(q[:, :, h] @ k[:, :, h].mT / 2, -1) @ v[:, :, h]
        for h in (slice(0, 4), slice(4, 8))
    ]
    expected = x + g * block.proj(torch.cat(heads, 2))
    expected = expected + g2 * block.mlp(F.layer_norm(expected, (8,), eps=1e-6) * (1 + b2) + a2)
    torch.testing.assert_close(block(x, t_mod), expected)


def test_the_shipped_transformer_loads_and_has_learned():
    base, images = load_tiny_dit(), digits(0).test_images * 2 - 1
    with torch.no_grad():
        losses = [noise_loss(base, images).item() for _ in range(3)]
    assert sum(losses) / 3 < 0.25
    assert not base.training


def test_sampling_finds_the_picture_that_the_model_has_in_mind():
    picture = torch.rand(2, 1, 4, 4).double() * 2 - 1
    calls = []

    def knows(x, t):
        calls.append(t)
        signal, spread = (share.view(-1, 1, 1, 1) for share in cosine_levels(t))
        return (x - signal * picture) / spread

    found = sample_ddim(knows, torch.randn(2, 1, 4, 4).double(), 5)
    torch.testing.assert_close(found, picture, atol=1e-6, rtol=0)
    assert [t.shape for t in calls] == [(2,)] * 5 and calls[0][0] > calls[-1][0] > 0
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        sample_ddim(knows, torch.randn(2, 1, 4, 4), 0)


def test_its_training_is_repeatable_and_leaves_the_global_stream_alone():
    images = digits(0).train_images[:64] * 2 - 1
    options = dict(steps=3, batch_size=16, dim=16, depth=2, device="cpu")
    state = torch.get_rng_state()
    (one, history), (two, _) = (train_tiny_dit(images, seed=1, **options) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert history.steps == 3 and not one.training
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_weights_of_the_transformer_are_never_overwritten(tmp_path, monkeypatch):
    file = tmp_path / "base.safetensors"
    file.write_text("mine")
    monkeypatch.setattr(tiny_diffusion, "train_tiny_dit", lambda *a, **k: (TinyDiT(), None))
    with pytest.raises(ValueError, match=r"base\.safetensors"):
        make_base_weights(torch.zeros(50, 1, 8, 8), file)
    assert file.read_text() == "mine"
    assert len(make_base_weights(torch.zeros(50, 1, 8, 8), tmp_path / "new.safetensors")) == 64


# ---------------------------------------------------------------- masks, bends, a recogniser


def test_a_grid_that_is_neither_turned_nor_bent_reads_every_pixel_where_it_is():
    x = torch.rand(2, 1, 5, 7, dtype=torch.float64)
    still = turns(torch.full((2,), 0.5), None, 30.0, 5 / 7).double()
    for offset in (None, torch.zeros(2, 2)):
        grid = bent_grid(still, offset, 5, 7)
        torch.testing.assert_close(F.grid_sample(x, grid, align_corners=True), x)
    mirrored = turns(torch.full((2,), 0.5), torch.tensor([0.4, 0.6]), 30.0)
    assert torch.equal(mirrored, torch.stack([torch.diag(torch.tensor([-1.0, 1])), torch.eye(2)]))


def test_a_recogniser_learns_repeatably_and_leaves_the_global_stream_alone():
    data = digits(0)
    state = torch.get_rng_state()
    given = (data.train_images[:256], data.train_labels[:256], nn.Identity(), 60)
    one, two = (train_recogniser(*given, seed=3, device="cpu") for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one(data.test_images), two(data.test_images))
    assert not any(weight.requires_grad for weight in one.parameters()) and not one.training
    found = one(data.test_images) @ F.normalize(one.classes.weight).T
    assert (found.argmax(1) == data.test_labels).float().mean() > 0.7


def test_attributes_say_where_the_ink_is_and_how_much():
    x = torch.full((1, 1, 5, 5), -1.0)
    x[..., 0, 4] = 1  # one black pixel, top right
    expected = torch.tensor([[1.0, -1.0, 1 / 25, 1.0]])
    torch.testing.assert_close(ink_attributes(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"m": torch.ones(2, 1, 4, 5)}, r"m must be \(2, 1, 4, 4\), got shape"),
        ({"m": torch.ones(2, 1, 4, 4).bool()}, "m must hold floating-point numbers, got torch.b"),
        ({"m": None, "hole": torch.full((2, 1, 4, 4), 2.0)}, r"hole must be in \[0, 1\], got 2"),
    ],
)
def test_what_is_no_mask_is_told(masks, message):
    with pytest.raises(ValueError, match=message):
        require_mask(torch.ones(2, 3, 4, 4), **masks)


# ---------------------------------------------------------------- the authors' own numbers


def oracle_net(x, sigma):
    """The network of the reference cases: a shrunken input with a bent part."""
    return 0.25 / (sigma**2 + 0.25) * x + 0.2 * x.sin() / (1 + sigma)


def blocks_of_the_authors(case):
    x, emb = (case.tensors[name].requires_grad_() for name in ("x", "emb"))
    results, total = {}, 0
    built = {}
    for kind, (before, after) in case.settings["kinds"].items():
        block = built[kind] = UNetBlock(before, after, case.settings["emb_dim"], kind).double()
        theirs = {"gn0": "norm0", "gn1": "norm1"}
        block.load_state_dict(
            {
                name: case.tensors[f"{kind}.{theirs.get(part, part)}.{rest}"]
                for name in block.state_dict()
                for part, rest in [name.split(".")]
            }
        )
        out = results[f"output, {kind}"] = block(x, emb)
        total = total + out.square().sum()
    total.backward()
    return results | {
        "gradient w.r.t. x": x.grad,
        "gradient w.r.t. emb": emb.grad,
        "gradient w.r.t. the down block's conv0.weight": built["down"].conv0.weight.grad,
        "gradient w.r.t. the up block's affine.weight": built["up"].affine.weight.grad,
        "gradient w.r.t. the up block's skip.weight": built["up"].skip.weight.grad,
    }


def network_of_the_authors(case):
    model = EDMPrecond(TinyUNet(case.settings["ch"], label_dim=3)).double()
    names = {"map0": "map_layer0", "map1": "map_layer1", "gn0": "norm0", "gn1": "norm1"}

    def theirs(name):
        name = name.replace("8_", "8x8_").replace("4_", "4x4_").replace("_b", "_block")
        parts = [names.get(part, part) for part in name.split(".")]
        return ".".join(part for part in parts if part not in ("unet", "embed"))

    model.load_state_dict({name: case.tensors[theirs(name)] for name in model.state_dict()})
    x = case.tensors["x"].requires_grad_()
    sigma = torch.tensor(case.settings["sigma"], dtype=torch.float64)
    label = torch.tensor(case.settings["label"])
    denoised, features = model(x, sigma, label, return_features=True)
    denoised.square().sum().backward()
    return {
        "D": denoised,
        **{
            f"output of {name}": features[name]
            for name in ("enc.4_down", "dec.4_in0", "dec.4_b1", "dec.8_up")
        },
        "gradient w.r.t. x": x.grad,
        "gradient w.r.t. the first convolution": model.unet.enc["8_conv"].weight.grad,
        "gradient w.r.t. map_label.weight": model.unet.embed.map_label.weight.grad,
        "D without label": model(x, 0.7),
    }


def numbers_of_the_authors(case):
    names = ("c_skip", "c_out", "c_in", "c_noise")
    sigma = torch.tensor(case.settings["sigma"], dtype=torch.float64)
    r, y, n, a, b = (case.tensors[name] for name in ("r", "y", "n", "a", "b"))
    s = (1.2 * r - 1.2).exp().view(-1, 1, 1, 1)
    error = edm_weight(s) * (oracle_net(y + s * n, s) - y).square()
    return dict(zip(names, edm_coefficients(sigma), strict=True)) | {
        "weight": edm_weight(sigma),
        "weighted error": error,
        "mean of it": error.mean(),
        "Frechet distance": frechet_distance(a, b),
    }


def samplers_of_the_authors(case):
    numbers, z = case.settings, case.tensors["z"]
    sigmas = edm_sigmas(numbers["n"], numbers["smin"], numbers["smax"], numbers["rho"])
    return {
        "sigmas": sigmas,
        "Heun": sample_heun(oracle_net, z, sigmas),
        "Euler": sample_euler(oracle_net, z, sigmas),
        "Heun, default levels": sample_heun(oracle_net, z, edm_sigmas(18)),
    }


RECOMPUTE = {
    "blocks: plain, down, up, rectangular": blocks_of_the_authors,
    "whole network under the preconditioning, labels, two noise levels": network_of_the_authors,
    "coefficients, loss and Frechet distance": numbers_of_the_authors,
    "samplers, five levels": samplers_of_the_authors,
}


@pytest.mark.parametrize("case", [*load_reference("tiny_diffusion")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))


# ---------------------------------------------------------------- bad input


X = torch.zeros(2, 1, 8, 8)


def called(unet=None, x=X, c_noise=None, **options):
    unet = unet or TinyUNet(8)
    return unet(x, torch.zeros(2) if c_noise is None else c_noise, **options)


def run_entry(name, skip=None):
    unet = TinyUNet(8)
    return unet.run_entry(name, torch.zeros(2, 16, 4, 4), unet.embed(torch.zeros(1)), skip)


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda: TinyUNet(0), "ch must be at least 1, got 0"),
            (lambda: TinyUNet(7), "ch must be even"),
            (lambda: TinyUNet(6), "channels must fill"),
            (lambda: TinyUNet(8, num_blocks=0), "num_blocks must be at least 1"),
            (lambda: TinyUNet(8, in_channels=0), "in_channels must be at least 1"),
            (lambda: TinyUNet(8, label_dim=-1), "label_dim must not be negative, got -1"),
            (lambda: TinyUNet(8, mult=()), "mult must hold one positive factor"),
            (lambda: TinyUNet(8, mult=(1, 0)), "mult must hold one positive factor"),
            (lambda: TinyUNet(8, resolution=9), "resolution must be divisible by 2 .*got 9"),
            (lambda: TinyUNet(8, (1, 1, 1), resolution=6), "divisible by 4 for 3 levels"),
            (lambda: group_norm(2), "got 2"),
            (lambda: group_norm(132), "got 132"),
            (
                lambda: UNetBlock(8, 8, 16, "sideways"),
                r"kind must be one of \['block', 'down', 'up'\], got 'sideways'",
            ),
            (lambda: called(x=torch.zeros(2, 3, 8, 8)), r"x must be \(batch, 1, 8, 8\)"),
            (lambda: called(x=torch.zeros(2, 1, 4, 4)), r"got shape \(2, 1, 4, 4\)"),
            (lambda: called(x=torch.zeros(1, 8, 8)), r"got shape \(1, 8, 8\)"),
            (lambda: called(c_noise=torch.zeros(3)), "one for each of 2 images"),
            (lambda: called(c_noise=torch.zeros(2, 1)), r"c_noise .* got shape \(2, 1\)"),
            (lambda: called(label=torch.tensor([0, 1])), "built with label_dim=0"),
            (
                lambda: called(TinyUNet(8, label_dim=3), label=torch.tensor([0, 3])),
                r"label must be in 0\.\.2, got 0 to 3",
            ),
            (
                lambda: called(TinyUNet(8, label_dim=3), label=torch.tensor([-1, 2])),
                r"label must be in 0\.\.2, got -1",
            ),
            (
                lambda: called(TinyUNet(8, label_dim=3), label=torch.tensor([0.0, 1.0])),
                "label must be whole numbers, got torch.float32",
            ),
            (
                lambda: called(TinyUNet(8, label_dim=3), label=torch.zeros(2, 4)),
                r"label must be \(batch, 3\)",
            ),
            (lambda: TinyUNet(8, label_dim=3, label_dropout=1.5), r"label_dropout must be in \[0"),
            (lambda: TinyDiT(dim=18), "dim must be divisible by 4"),
            (lambda: TinyDiT(dim=48, num_heads=5), "dim must be divisible by num_heads 5"),
            (lambda: TinyDiT(size=9), "size must be divisible by patch 2"),
            (lambda: TinyDiT(dim=8).embed(torch.zeros(1, 1, 9, 9)), r"image must be \(batch, 1, 8"),
            (
                lambda: sample_stochastic(gaussian_denoiser, X, edm_sigmas(3), churn=math.nan),
                "churn must be finite",
            ),
            (lambda: called(TinyUNet(8, label_dim=3), label=torch.tensor([0])), "have 2 rows"),
            (lambda: called(skip_scale=[1.0] * 3), "expected 4 coefficients, one per skip.*got 3"),
            (lambda: called(skip_scale=[torch.ones(2)] * 4), r"\(batch, 1, 1, 1\), got \(2,\)"),
            (lambda: run_entry("4_in0"), r"name must be one of .*dec.4_in0.*got '4_in0'"),
            (lambda: run_entry("enc.4_in0"), "got 'enc.4_in0'"),
            (lambda: run_entry("out_conv.weight"), "got 'out_conv.weight'"),
            (lambda: run_entry("dec.4_b0"), "skip of dec.4_b0 must be the output of enc.4_b0"),
            (
                lambda: run_entry("dec.4_in0", torch.zeros(2, 16, 4, 4)),
                "skip of dec.4_in0 must be None",
            ),
            (lambda: EDMPrecond(TinyUNet(8), 0.0), "sigma_data must be positive and finite, got 0"),
            (lambda: EDMPrecond(TinyUNet(8))(X, -1.0), "sigma must be positive and finite, got -1"),
            (lambda: EDMPrecond(TinyUNet(8))(X, 0.0), "sigma must be positive and finite, got 0"),
            (
                lambda: EDMPrecond(TinyUNet(8))(X, float("nan")),
                "sigma must be positive and finite, got nan",
            ),
            (lambda: EDMPrecond(TinyUNet(8))(X, torch.ones(3)), "one for each of 2 images"),
            (lambda: EDMPrecond(TinyUNet(8))(X, torch.ones(1, 2)), r"got shape \(1, 2\)"),
            (
                lambda: edm_loss(gaussian_denoiser, X, reduction="sum"),
                r"reduction must be one of \['mean', 'none'\], got 'sum'",
            ),
            (lambda: edm_sigmas(0), "n must be at least 1, got 0"),
            (lambda: edm_sigmas(3, 0.0), "0 < smin <= smax"),
            (lambda: edm_sigmas(3, 2.0, 1.0), "got 2.0, 1.0"),
            (lambda: edm_sigmas(3, rho=0.0), "0 < rho"),
            (lambda: sample_euler(gaussian_denoiser, X, torch.tensor([1.0])), "end with 0"),
            (lambda: sample_heun(gaussian_denoiser, X, torch.tensor([1.0, 0.5])), "end with 0"),
            (lambda: sample_heun(gaussian_denoiser, X, torch.tensor([1.0, 2.0, 0.0])), "must fall"),
            (lambda: sample_euler(gaussian_denoiser, X, torch.ones(2, 2)), "must fall"),
            (lambda: train_tiny_edm(steps=0), "steps must be at least 1, got 0"),
            (lambda: train_tiny_edm(steps=1, device="gpu"), "device"),
            (lambda: load_tiny_edm(12), r"ch must be one of \[8, 16\], got 12"),
            (lambda: load_weights(nn.Linear(1, 1), "nowhere.safetensors", ""), "is missing"),
            (lambda: digit_features(torch.zeros(1, 8, 8)), r"x must be \(batch, 1, 8, 8\)"),
            (lambda: frechet_distance(torch.zeros(1, 3), torch.zeros(4, 3)), "at least 2 samples"),
            (
                lambda: frechet_distance(torch.zeros(4, 3), torch.zeros(4, 2)),
                r"\(4, 3\) and \(4, 2\)",
            ),
            (
                lambda: frechet_distance(torch.zeros(4, 3), torch.full((4, 3), math.nan)),
                "b must be",
            ),
            (lambda: frechet_floor(torch.zeros(9, 3), 8), r"num must be in 2\.\.7, got 8"),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()

    def test_files_of_weights(self, tmp_path):
        model, file = nn.Linear(2, 3), tmp_path / "w.safetensors"
        checksum = save_weights(model, file)
        with pytest.raises(ValueError, match="exists already, and is never overwritten"):
            save_weights(model, file)
        with pytest.raises(ValueError, match="weights of another model"):
            load_weights(nn.Linear(3, 3), file, checksum)
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"corrupt: expected SHA-256 {checksum}, got"):
            load_weights(model, file, checksum)
        huge = nn.Linear(1, 1)
        nn.init.constant_(huge.weight, 1e5)
        with pytest.raises(ValueError, match="finite numbers up to 65,504, weight does not"):
            save_weights(huge, tmp_path / "huge")
        assert not (tmp_path / "huge").exists()

    def test_a_loss_that_is_not_finite_stops_the_training(self):
        images = torch.full((8, 1, 8, 8), math.nan)
        with pytest.raises(FloatingPointError, match="the loss is nan by step 0 of 1"):
            train_tiny_edm(ch=4, steps=1, images=images, batch_size=8)
