"""The micro zoo: what the card counts, what a network must bear, budgets."""

import pytest
import torch
from torch import nn

from shuffle_nb.mobile.micro_zoo import (
    Attention,
    SqueezeExcite,
    count_parameters,
    encoder,
    micro_zoo,
    scale_to_budget,
    scaled_zoo,
    zoo_variants,
)


def close(a, b, atol):
    return torch.allclose(a, b, atol=atol)


COUNTS = {
    "squeeze-fire": 9_658,
    "plain-pyramid": 10_078,
    "mixer-p4": 5_410,
    "mixer-p2": 4_458,
    "depthwise-se": 6_786,
    "conv-transformer": 5_922,
    "transformer": 10_786,
    "mlp": 6_418,
    "group-shuffle": 4_186,
    "mixer-p2-se": 5_562,
    "depthwise": 4_106,
}


def test_parameters_of_the_zoo():
    assert {name: count_parameters(build(10)) for name, (build, _) in micro_zoo().items()} == COUNTS


@pytest.mark.parametrize("name", COUNTS)
def test_a_network(name, plain_python):
    torch.manual_seed(0)
    build, attributes = micro_zoo()[name]
    model, x = build(7).eval(), torch.randn(3, 1, 16, 16)
    logits = model(x)
    assert logits.shape == (3, 7)
    assert close(model(x[:1]), logits[:1], 1e-5) and model(x[:0]).shape == (0, 7)
    assert close(model(x.mT.contiguous().mT), logits, 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert close(model(x).float(), logits, 0.1)
    assert close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), logits, 1e-5)
    assert model.double()(x.double()).dtype == torch.float64
    assert build(5, width=1.5, in_channels=3, side=32)(torch.randn(2, 3, 32, 32)).shape == (2, 5)
    assert set(attributes) == {"isotropic", "attention", "squeeze_excite"}
    has_attention = any(isinstance(m, Attention) for m in model.modules())
    has_gates = any(isinstance(m, SqueezeExcite) for m in model.modules())
    assert (attributes["attention"], attributes["squeeze_excite"]) == (has_attention, has_gates)
    same = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert attributes["isotropic"] == (len(same) == 1 and name not in ("conv-transformer",))


def test_variants_exchange_one_part():
    counts = {name: count_parameters(build(10)) for name, (build, _) in zoo_variants().items()}
    assert counts == {
        "transformer (depthwise)": 6_466,
        "transformer (none)": 5_890,
        "conv-transformer (depthwise)": 3_762,
        "conv-transformer (none)": 3_474,
        "mixer-p4 (finer)": 4_930,
    }


@pytest.mark.parametrize("mixing", ["attention", "depthwise", "none"])
def test_only_mixing_lets_tokens_talk(mixing):
    layers = nn.Sequential(*encoder(8, 3, mixing)).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(layers(x)[0, 0].sum(), x)
    reached = slope[0].abs().sum(1).nonzero().flatten().tolist()
    assert reached == {"attention": list(range(9)), "depthwise": [0, 1, 3, 4], "none": [0]}[mixing]


def test_widths_meet_a_budget():
    for build, _ in micro_zoo().values():
        width, model = scale_to_budget(lambda w, b=build: b(100, w, 3, 32), 200_000)
        assert abs(count_parameters(model) / 200_000 - 1) <= 0.05 and width > 1
    width, model = scale_to_budget(lambda w: nn.Linear(max(1, round(100 * w)), 1, bias=False), 25)
    assert count_parameters(model) == 25 and width == pytest.approx(0.25, abs=0.01)
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert count_parameters(frozen) == 8


def test_a_scaled_zoo_keeps_names_and_meets_the_budget():
    zoo = scaled_zoo(target=200_000, side=16)
    assert list(zoo) == list(micro_zoo())
    for build, _ in zoo.values():
        model = build(4)
        assert abs(count_parameters(model) / 200_000 - 1) <= 0.05
        assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scale_to_budget(lambda w: nn.Linear(3, 3), 100), "within 5% .* nearest is 12"),
        (
            lambda: micro_zoo()["mlp"][0](10, side=18),
            "side must be divisible by patches of 4, got 18",
        ),
        (lambda: encoder(8, 3, "conv"), "mixing must be one of"),
    ],
)
def test_message_says_what_was_expected(call, message, plain_python):
    with pytest.raises(ValueError, match=message):
        call()
