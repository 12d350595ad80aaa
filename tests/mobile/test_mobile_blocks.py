"""What the mobile family shares: convolutions, round channels, first weights, averages."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.mobile.mobile_blocks import (
    Classifier,
    conv_norm,
    initialise_by_fan_out,
    is_channels_last,
    plane_mean,
    rename_by_order,
    require_maps,
    resnet18_parts,
    rounded_channels,
    shift_and_mirror,
    small_classifier,
)

sides = st.integers(1, 7)


@given(sides, sides, st.sampled_from([1, 3, 5, 7]))
def test_a_convolution_keeps_the_size(height, width, size):
    layers = nn.Sequential(*conv_norm(4, 6, size, nn.ReLU())).eval()
    assert layers(torch.randn(2, 4, height, width)).shape == (2, 6, height, width)
    assert layers[0].bias is None and len(layers) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((4, 6, 2), "odd and positive, got 2"), ((4, 6, 0), "got 0"), ((0, 6), "in_channels")],
)
def test_bad_convolutions(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv_norm(*arguments)


@given(st.floats(0.1, 4000), st.sampled_from([4, 8, 16]))
def test_channels_are_round_and_never_much_fewer(channels, divisor):
    rounded = rounded_channels(channels, divisor)
    assert rounded % divisor == 0 and rounded >= divisor
    assert rounded >= 0.9 * channels
    assert rounded <= max(divisor, channels + divisor)


def test_known_roundings():
    known = {8: 8, 12: 16, 18: 24, 19.2: 24, 20: 24, 36: 40, 3: 8}
    assert {channels: rounded_channels(channels) for channels in known} == known


def test_first_weights():
    convolution, linear = nn.Conv2d(64, 128, 5, groups=8), nn.Linear(200, 100)
    for layer in (convolution, linear):
        layer.apply(initialise_by_fan_out)
        assert not layer.bias.any()
    assert convolution.weight.std().item() == pytest.approx((2 / (25 * 128)) ** 0.5, rel=0.02)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.02)


@given(sides, sides, st.sampled_from([(2,), (3,), (2, 3)]), st.booleans())
def test_averages_in_any_memory_order(height, width, axes, last):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last) if last else x
    assert torch.allclose(plane_mean(x, axes), x.mean(axes, keepdim=True), atol=1e-14)


def test_half_precision_does_not_overflow():
    x = torch.full((1, 2, 300, 300), 10.0, dtype=torch.float16)
    assert torch.equal(plane_mean(x, (2, 3)), torch.full((1, 2, 1, 1), 10.0, dtype=torch.float16))


def test_memory_order_is_told():
    x = torch.randn(2, 3, 4, 5)
    assert not is_channels_last(x) and is_channels_last(x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 4, 5), r"shape \(3, 4, 5\)"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.long), "torch.int64"),
        (torch.zeros(1, 2, 3, 4), "must have 3 channels, got 2"),
    ],
)
def test_bad_maps(x, message):
    with pytest.raises(ValueError, match=message):
        require_maps(x, 3)


def small_network(sd=None):
    return nn.Sequential(*conv_norm(3, 4, 3), nn.Linear(4, 2))


def test_weights_move_in_by_their_order():
    wanted = small_network().state_dict()
    theirs = {f"module.theirs.{i}.{name}": value for i, (name, value) in enumerate(wanted.items())}
    for stored in (theirs, {"state_dict": theirs, "epoch": 3}):
        network = small_network()
        network.load_state_dict(rename_by_order(stored, small_network))
        for name, value in network.state_dict().items():
            assert torch.equal(value, wanted[name])


def test_counters_of_batches_may_be_missing():
    wanted = small_network().state_dict()
    theirs = {k: v for k, v in wanted.items() if "num_batches" not in k}
    network = small_network()
    network.load_state_dict(rename_by_order(theirs, small_network))
    assert torch.equal(network[0].weight, wanted["0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.weight": torch.ones(4, 4, 3, 3)}, r"0\.weight.*\(4, 3, 3, 3\), got \(4, 4, 3, 3\)"),
        ({"more": torch.ones(1)}, "must have 8 tensors, got 9"),
        ({"epoch": 3}, "'epoch'.* must be a tensor, got int"),
    ],
)
def test_other_weights_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        rename_by_order(small_network().state_dict() | change, small_network)


def test_resnet18_for_small_images():
    features, classifier = resnet18_parts(100)
    assert (
        sum(p.numel() for part in (features, classifier) for p in part.parameters()) == 11_220_132
    )
    maps = features(torch.randn(2, 3, 32, 32))
    assert maps.shape == (2, 512, 4, 4) and (maps >= 0).all()
    assert classifier(maps.mean((2, 3))).shape == (2, 100)


def test_a_classifier_gives_its_last_maps_on_demand():
    network, x = small_classifier((4, 6, 5), num_classes=3).eval(), torch.randn(2, 1, 8, 8)
    logits, features = network(x, return_features=True)
    assert isinstance(network, Classifier) and features.shape == (2, 5, 4, 4)
    assert torch.equal(logits, network.linear(features.mean((2, 3))))
    assert torch.equal(network(x), logits) and logits.shape == (2, 3)
    assert sum(p.numel() for p in small_classifier().parameters()) == 3778
    strides = [layer.stride[0] for layer in network.layers if isinstance(layer, nn.Conv2d)]
    assert strides == [1, 2, 1] and (features >= 0).all()


def test_shifts_and_mirrors_move_pixels_and_change_none():
    torch.manual_seed(0)
    images = torch.arange(8.0 * 6 * 5).reshape(8, 1, 6, 5)
    moved = shift_and_mirror(images, pixels=2)
    assert torch.equal(moved.flatten(1).sort().values, images.flatten(1))
    rows = moved[:, 0, 0].diff(dim=1)  # falling by one nearly everywhere where it is mirrored
    falling = (rows == -1).sum(1) > (rows == 1).sum(1)
    assert falling.any() and not falling.all()
    assert torch.equal(
        shift_and_mirror(images[:1].sum(3, keepdim=True), 0), images[:1].sum(3, True)
    )


def test_a_batch_is_shifted_each_way():
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 5, 5)
    image[..., 2, 2] = 1  # in the middle: mirroring leaves it there
    found = {
        tuple(shift_and_mirror(image, pixels=1)[0, 0].nonzero()[0].tolist()) for _ in range(99)
    }
    assert found == {(row, column) for row in (1, 2, 3) for column in (1, 2, 3)}
