"""Token-Shuffle: the fold, the modules around it, and the model that samples through it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations.costs import count_flops
from shuffle_nb.foundations.reference import load_reference
from shuffle_nb.shuffles.token_shuffle import (
    MLPBlock,
    TokenShuffle,
    TokenShuffleAR,
    TokenUnshuffle,
    cfg_schedule,
    draw_codes,
    token_shuffle,
    token_unshuffle,
    transformer_flops,
)

GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)


def small_model(**options) -> TokenShuffleAR:
    settings = dict(vocab_size=11, dim=16, depth=2, num_heads=2, grid=(4, 6), num_classes=3)
    return TokenShuffleAR(**(settings | options)).eval()


def random_grid(model: TokenShuffleAR, batch: int = 2) -> torch.Tensor:
    height, width = model.grid
    return torch.randint(0, model.vocab_size, (batch, height * width))


# ---------------------------------------------------------------- the fold


@settings(deadline=None)
@given(GRIDS, st.integers(1, 5), st.sampled_from(DTYPES))
def test_unshuffle_is_the_exact_inverse_and_values_are_kept(sizes, channels, dtype):
    rows, columns, window = sizes
    grid = (rows * window, columns * window)
    x = torch.randint(0, 100, (2, grid[0] * grid[1], channels)).to(dtype)
    folded = token_shuffle(x, grid, window)
    assert folded.shape == (2, rows * columns, window**2 * channels)
    assert folded.dtype == dtype
    assert torch.equal(token_unshuffle(folded, grid, window), x)
    assert torch.equal(folded.flatten().sort().values, x.flatten().sort().values)


def test_the_worked_example_of_sixteen_tokens():
    folded = token_shuffle(torch.arange(16).reshape(1, 16, 1), (4, 4), 2)
    assert folded[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@settings(deadline=None)
@given(GRIDS, st.integers(1, 3))
def test_the_formula_index_by_index(sizes, channels):
    rows, columns, s = sizes
    width = columns * s
    y = torch.randn(1, rows * s * width, channels)
    z = token_shuffle(y, (rows * s, width), s)
    for i in range(rows):
        for j in range(columns):
            for p in range(s):
                for q in range(s):
                    fused = z[0, i * columns + j, (p * s + q) * channels :][:channels]
                    assert torch.equal(fused, y[0, (i * s + p) * width + j * s + q])


def test_window_one_is_the_identity():
    x = torch.randn(2, 15, 3)
    assert torch.equal(token_shuffle(x, (3, 5), 1), x)
    assert torch.equal(token_unshuffle(x, (3, 5), 1), x)


def test_channel_order_is_not_that_of_pixel_unshuffle():
    x = torch.arange(32).reshape(1, 16, 2)
    pixel = nn.functional.pixel_unshuffle(x.mT.reshape(1, 2, 4, 4), 2).flatten(2).mT
    ours = token_shuffle(x, (4, 4), 2)
    assert not torch.equal(ours, pixel)
    assert torch.equal(ours.unflatten(-1, (4, 2)).mT.flatten(2), pixel)


def test_moving_by_a_window_permutes_fused_tokens_and_by_a_pixel_does_not():
    x = torch.randn(1, 4, 6, 3)

    def fold(move):
        return token_shuffle(x.roll(move, dims=(1, 2)).reshape(1, 24, 3), (4, 6), 2)

    whole = fold((0, 2)).reshape(1, 2, 3, 12)
    assert torch.equal(whole, fold((0, 0)).reshape(1, 2, 3, 12).roll(1, dims=2))
    by_pixel = {tuple(t.tolist()) for t in fold((0, 1))[0]}
    assert not by_pixel & {tuple(t.tolist()) for t in fold((0, 0))[0]}


# ---------------------------------------------------------------- the modules


def test_linear_limit_keeps_the_first_channels_only():
    fold, unfold = TokenShuffle(12, 2, num_blocks=0), TokenUnshuffle(12, 2, num_blocks=0)
    with torch.no_grad():
        fold.compress.weight.copy_(torch.eye(3, 12))
        unfold.expand.weight.copy_(torch.eye(12, 3))
        fold.compress.bias.zero_(), unfold.expand.bias.zero_()
    x = torch.randn(2, 24, 12)
    survived = unfold(fold(x, (4, 6)), (4, 6))
    assert torch.equal(survived[..., :3], x[..., :3])
    assert not survived[..., 3:].any()


def test_window_one_with_identity_maps_is_the_identity():
    fold, unfold = TokenShuffle(6, 1, num_blocks=0), TokenUnshuffle(6, 1, num_blocks=0)
    with torch.no_grad():
        for linear in (fold.compress, unfold.expand):
            linear.weight.copy_(torch.eye(6))
            linear.bias.zero_()
    x = torch.randn(2, 15, 6)
    assert torch.allclose(unfold(fold(x, (3, 5)), (3, 5)), x, atol=1e-6)


def test_identity_folds_leave_the_logits_of_the_vanilla_model():
    vanilla = small_model(window=1)
    folded = small_model(window=1)
    folded.load_state_dict(vanilla.state_dict())
    folded.shuffle = TokenShuffle(16, 1, num_blocks=0)
    folded.unshuffle = TokenUnshuffle(16, 1, num_blocks=0)
    with torch.no_grad():
        for linear in (folded.shuffle.compress, folded.unshuffle.expand):
            linear.weight.copy_(torch.eye(16))
            linear.bias.zero_()
    tokens = random_grid(vanilla)
    cond = torch.tensor([0, 2])
    assert torch.allclose(folded(tokens, cond), vanilla(tokens, cond), atol=1e-6)


@pytest.mark.parametrize(("dim", "blocks"), [(16, 0), (16, 2), (48, 1), (64, 3)])
def test_parameters_of_the_two_modules_follow_the_formula(dim, blocks):
    mlps = blocks * (2 * dim**2 + 4 * dim)
    count = {
        module: sum(p.numel() for p in module(dim, 2, blocks).parameters())
        for module in (TokenShuffle, TokenUnshuffle)
    }
    assert count[TokenShuffle] == dim * dim // 4 + dim // 4 + mlps
    assert count[TokenUnshuffle] == dim * dim // 4 + dim + mlps


def test_mlp_block_is_the_formula():
    block = MLPBlock(6, expansion=2)
    norm, first, _, second = block.layers
    assert norm.eps == 1e-5 and first.out_features == 12
    x = torch.randn(2, 5, 6)
    by_hand = x + second(nn.functional.gelu(first(nn.functional.layer_norm(x, (6,)))))
    assert torch.allclose(block(x), by_hand, atol=1e-6)


def test_gradients_through_compress_fold_and_mix():
    fold = TokenShuffle(8, 2, num_blocks=1).double()
    unfold = TokenUnshuffle(8, 2, num_blocks=1).double()
    x = torch.randn(1, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unfold(fold(x, (2, 4)), (2, 4)), x)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("mode", ["shuffle", "mean"])
def test_logits_of_a_window_depend_on_strictly_earlier_windows_only(mode):
    model = small_model(mode=mode)
    embedded = []
    model.embedding.register_forward_hook(lambda *call: embedded.append(call[-1]))
    logits = token_shuffle(model(random_grid(model, 1), torch.tensor([1])), (4, 6))
    for index in range(model.num_windows):
        (gradient,) = torch.autograd.grad(
            logits[0, index].sum(), embedded[0], retain_graph=True, allow_unused=True
        )
        seen = token_shuffle(gradient, (4, 6))[0].abs().sum(-1)
        assert (seen[index:] == 0).all()
        assert (seen[:index] > 0).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 5))
def test_changing_later_windows_leaves_logits_bit_identical(index):
    model = small_model()
    tokens = random_grid(model, 1)
    windows = token_shuffle(tokens[..., None], model.grid)
    changed = windows.clone()
    changed[:, index:] = (changed[:, index:] + 1) % model.vocab_size
    changed = token_unshuffle(changed, model.grid)[..., 0]
    cond = torch.tensor([0])
    before, after = (token_shuffle(model(t, cond), model.grid) for t in (tokens, changed))
    assert torch.equal(before[:, : index + 1], after[:, : index + 1])


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 2}, {"mode": "mean"}])
def test_greedy_sampling_equals_teacher_forcing(options):
    model = small_model(**options).double()
    cond = torch.tensor([0, 1, 2])
    drawn = model.generate(cond, temperature=0)
    assert torch.equal(drawn, model(drawn, cond).argmax(-1))


def test_sampling_after_a_text_prefix_equals_teacher_forcing():
    model = small_model(text_vocab_size=7, max_prefix=5).double()
    cond, prefix = torch.tensor([0, 1]), torch.randint(0, 7, (2, 4))
    drawn = model.generate(cond, temperature=0, prefix=prefix)
    assert torch.equal(drawn, model(drawn, cond, prefix).argmax(-1))
    other = (prefix + 1) % 7
    assert not torch.equal(model(drawn, cond, other), model(drawn, cond, prefix))


@pytest.mark.parametrize(("window", "passes"), [(1, 24), (2, 6)])
def test_sampling_takes_one_pass_a_window_also_under_guidance(window, passes):
    model = small_model(window=window)
    calls = []
    model.transformer.register_forward_hook(lambda *call: calls.append(call[1][0].shape))
    model.generate(torch.tensor([0, 1]))
    assert len(calls) == passes
    calls.clear()
    model.generate(torch.tensor([0, 1]), guidance=2.0)
    assert len(calls) == passes and calls[0][0] == 4


def test_sampled_shares_follow_the_softmax():
    model = small_model(grid=(2, 2), num_classes=None)
    batch = 20_000
    drawn = model.generate(batch_size=batch, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(drawn[:1])[0].softmax(-1)  # one window: it depends on nothing
    for place in range(4):
        shares = drawn[:, place].bincount(minlength=11) / batch
        assert torch.allclose(shares, expected[place], atol=0.015)


def test_a_generator_makes_sampling_repeatable_and_leaves_the_global_stream_alone():
    model = small_model()
    state = torch.get_rng_state()
    first, second = (
        model.generate(torch.tensor([1]), generator=torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)


def test_top_k_one_is_greedy():
    model = small_model()
    cond = torch.tensor([0, 2])
    assert torch.equal(model.generate(cond, top_k=1), model.generate(cond, temperature=0))


@pytest.mark.parametrize("chunks", [(3, 3), (1, 4, 1), (2, 2, 2), (5, 1)])
def test_chunks_with_a_warm_cache_equal_the_full_pass(chunks):
    transformer = small_model().double().transformer
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    caches = transformer.new_caches()
    with torch.no_grad():
        parts = [transformer(chunk, caches) for chunk in x.split(chunks, dim=1)]
    assert torch.allclose(torch.cat(parts, dim=1), transformer(x), atol=1e-12)


@pytest.mark.parametrize("temperature", [1e-4, 1e-45, 1e-300])
def test_half_precision_at_a_small_temperature_is_greedy(temperature):
    model = small_model()
    model.head.weight.data.mul_(100)
    model.half()
    drawn = model.generate(torch.tensor([0]), temperature=temperature)
    assert torch.equal(drawn, model.generate(torch.tensor([0]), temperature=0))


def test_codes_of_half_precision_logits_are_drawn_in_single_precision():
    logits = torch.randn(4, 20_000, 64, generator=torch.Generator().manual_seed(0)).half()
    drawn = (
        draw_codes(x, 1.0, None, torch.Generator().manual_seed(1)) for x in (logits, logits.float())
    )
    assert torch.equal(*drawn)


def test_top_k_keeps_exactly_k_codes_also_where_logits_are_equal():
    model = small_model()
    model.head.weight.data.zero_()
    for k in (1, 3):
        assert model.generate(torch.zeros(50, dtype=torch.long), top_k=k).unique().numel() == k


@pytest.mark.usefixtures("plain_python")
def test_exports_with_a_dynamic_batch():
    model, batch = small_model(), torch.export.Dim("batch", min=2)
    inputs = random_grid(model), torch.tensor([0, 1])
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: batch}, {0: batch}))
    tokens, cond = random_grid(model, 5), torch.tensor([0, 1, 2, 0, 3])
    assert torch.allclose(exported.module()(tokens, cond), model(tokens, cond), atol=1e-5)


def test_guidance_of_one_is_the_conditional_and_of_zero_the_unconditional_model():
    model = small_model().double()
    cond = torch.tensor([0, 1])
    greedy = dict(temperature=0)
    assert torch.equal(model.generate(cond, guidance=1.0, **greedy), model.generate(cond, **greedy))
    assert torch.equal(
        model.generate(cond, guidance=0.0, **greedy),
        model.generate(torch.full_like(cond, 3), **greedy),
    )


def test_loss_is_the_mean_cross_entropy_of_all_tokens():
    model = small_model()
    tokens, cond = random_grid(model), torch.tensor([0, 1])
    log_p = model(tokens, cond).log_softmax(-1).gather(-1, tokens[..., None])
    assert torch.allclose(model.loss(tokens, cond), -log_p.mean(), atol=1e-6)
    with_z = model.loss(tokens, cond, z_loss=0.5) - model.loss(tokens, cond)
    assert torch.allclose(with_z, 0.5 * model(tokens, cond).logsumexp(-1).square().mean())


def test_dropping_every_class_is_the_unconditional_loss():
    model = small_model()
    tokens, cond = random_grid(model), torch.tensor([0, 1])
    assert torch.equal(model.loss(tokens, cond, drop_cond=1.0), model.loss(tokens))
    assert not torch.equal(model.loss(tokens, cond), model.loss(tokens))


@pytest.mark.usefixtures("plain_python")
def test_compiled_without_graph_breaks_and_under_autocast():
    model = small_model()
    tokens, cond = random_grid(model), torch.tensor([0, 1])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(tokens, cond), model(tokens, cond), atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens, cond).dtype == torch.bfloat16


def test_state_dict_round_trip():
    model, other = small_model(), small_model()
    other.load_state_dict(model.state_dict())
    tokens = random_grid(model)
    assert torch.equal(model(tokens), other(tokens))


# ---------------------------------------------------------------- schedules and costs


def test_guidance_schedules():
    assert cfg_schedule("constant", 3, 7.5) == [7.5, 7.5, 7.5]
    assert cfg_schedule("linear", 5, 5.0) == pytest.approx([1, 2, 3, 4, 5])
    assert cfg_schedule("half-linear", 8, 5.0) == pytest.approx([1, 1, 1, 1, 2, 3, 4, 5])


@given(st.sampled_from(["constant", "linear", "half-linear"]), st.integers(1, 64), st.floats(1, 20))
def test_schedules_have_one_weight_a_window_and_end_at_the_scale(kind, steps, scale):
    weights = cfg_schedule(kind, steps, scale)
    assert len(weights) == steps
    assert weights == sorted(weights)
    assert weights[-1] == pytest.approx(scale)
    if kind == "half-linear":
        assert all(w == 1 for w in weights[: min(steps // 2, steps - 1)])


def test_flops_of_the_formula_and_of_the_worked_number():
    assert transformer_flops(4096, 3072) == 24 * 4096 * 3072**2 + 4 * 4096**2 * 3072
    ratio = transformer_flops(4096, 3072) / transformer_flops(1024, 3072)
    assert ratio == pytest.approx(4.63, abs=0.01)
    # N >> 6 s^2 d: the ratio tends to s^4
    assert transformer_flops(4 * 10**8, 64) / transformer_flops(10**8, 64) == pytest.approx(
        16, 1e-3
    )


def test_flops_counted_in_the_transformer_are_those_of_the_formula():
    model = small_model(window=1, grid=(8, 8), dim=32)
    counted = count_flops(model.transformer, torch.randn(1, 64, 32))
    assert counted == transformer_flops(64, 32, depth=2)


# ---------------------------------------------------------------- bad input


@pytest.mark.usefixtures("plain_python")
class TestBadInput:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: token_shuffle(torch.zeros(1, 15, 2), (3, 5), 2),
                "height of grid must be divisible by window 2, got 3",
            ),
            (lambda: token_shuffle(torch.zeros(1, 15, 2), (4, 4), 2), r"\(batch, 16, channels\)"),
            (lambda: token_shuffle(torch.zeros(16, 2), (4, 4), 2), r"got shape \(16, 2\)"),
            (lambda: token_shuffle(torch.zeros(1, 16, 2), (4, 4), 0), "window must be at least 1"),
            (
                lambda: token_unshuffle(torch.zeros(1, 4, 6), (4, 4), 2),
                r"divisible by window\*\*2 4",
            ),
            (lambda: token_unshuffle(torch.zeros(1, 5, 8), (4, 4), 2), r"\(batch, 4, fused\)"),
            (lambda: TokenShuffle(10, 2), r"dim must be divisible by window\*\*2 4, got 10"),
            (lambda: TokenUnshuffle(10, 2), r"dim must be divisible by window\*\*2 4, got 10"),
            (lambda: TokenShuffle(8, 0), "window must be at least 1"),
            (lambda: TokenShuffle(8)(torch.zeros(1, 16, 4), (4, 4)), r", 8\), got shape"),
            (lambda: TokenUnshuffle(8)(torch.zeros(1, 4, 4), (4, 4)), r", 8\), got shape"),
            (lambda: TokenUnshuffle(8)(torch.zeros(1, 3, 8), (4, 4)), r"\(batch, 4, fused\)"),
            (lambda: MLPBlock(0), "dim"),
            (lambda: small_model(mode="max"), "mode must be one of .*'shuffle', 'mean'"),
            (lambda: small_model(grid=(3, 6)), "divisible by window 2"),
            (lambda: small_model(grid=(4, 7)), "width of grid"),
            (lambda: small_model(depth=0), "depth must be at least 1"),
            (lambda: small_model(dim=18), r"divisible by window\*\*2"),
            (lambda: small_model(num_heads=3), "divisible by num_heads 3"),
            (lambda: small_model(num_heads=0), "num_heads must be at least 1"),
            (
                lambda: small_model()(torch.zeros(2, 24, dtype=torch.long), torch.tensor([0])),
                r"cond must be \(2\), got shape \(1,\)",
            ),
            (
                lambda: small_model(text_vocab_size=3)(
                    torch.zeros(2, 24, dtype=torch.long), prefix=torch.zeros(1, 2, dtype=torch.long)
                ),
                r"prefix must be \(2, text\), got shape \(1, 2\)",
            ),
            (
                lambda: small_model().transformer(torch.zeros(1, 7, 16)),
                r"positions of x must be in 1..6, got 7",
            ),
            (lambda: small_model()(torch.zeros(1, 23, dtype=torch.long)), r"\(batch, 24\)"),
            (
                lambda: small_model()(torch.full((1, 24), 11)),
                r"tokens must be in 0..10, got 11 to 11",
            ),
            (lambda: small_model()(torch.full((1, 24), -1)), "tokens must be in 0..10"),
            (
                lambda: small_model()(torch.zeros(1, 24, dtype=torch.long), torch.tensor([4])),
                "cond must be in 0..3",
            ),
            (lambda: small_model().generate(), "cond or batch_size"),
            (lambda: small_model().generate(torch.tensor([0]), batch_size=1), "cond or batch_size"),
            (lambda: small_model().generate(batch_size=1, temperature=-1.0), "temperature"),
            (lambda: small_model().generate(batch_size=1, top_k=12), "top_k must be in 1..11"),
            (lambda: small_model().generate(batch_size=1, guidance=2.0), "guidance needs classes"),
            (
                lambda: small_model().generate(torch.tensor([0]), guidance=[1.0, 2.0]),
                "guidance needs 6 weights, got 2",
            ),
            (
                lambda: small_model(num_classes=None)(
                    torch.zeros(1, 24, dtype=torch.long), torch.tensor([0])
                ),
                "num_classes=None",
            ),
            (
                lambda: small_model()(
                    torch.zeros(1, 24, dtype=torch.long), prefix=torch.zeros(1, 2, dtype=torch.long)
                ),
                "text_vocab_size=None",
            ),
            (
                lambda: small_model(text_vocab_size=3, max_prefix=1)(
                    torch.zeros(1, 24, dtype=torch.long), prefix=torch.zeros(1, 2, dtype=torch.long)
                ),
                "length of prefix must be in 0..1, got 2",
            ),
            (lambda: cfg_schedule("cosine", 4, 2.0), "kind must be one of .*'half-linear'"),
            (lambda: cfg_schedule("linear", 0, 2.0), "num_steps must be at least 1"),
        ],
    )
    def test_message_says_what_was_expected(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


# ---------------------------------------------------------------- reference values


def load_blocks(blocks, tensors, names):
    """Copy the weights of residual MLP blocks; `names` are theirs, one a block."""
    with torch.no_grad():
        for block, name in zip(blocks, names, strict=True):
            norm, first, _, second = getattr(block, "layers", block)
            for layer, (weight, bias) in {
                norm: ("norm.weight", "norm.bias"),
                first: ("W1", "b1"),
                second: ("W2", "b2"),
            }.items():
                layer.weight.copy_(tensors[f"{name}.{weight}"])
                layer.bias.copy_(tensors[f"{name}.{bias}"])


def load_layer(layer, tensors, name):
    with torch.no_grad():
        layer.weight.copy_(tensors[f"{name}.weight"])
        layer.bias.copy_(tensors[f"{name}.bias"])


def both_ways(case):
    s = case.settings
    return {
        "folded": token_shuffle(case.tensors["x"], tuple(s["grid"]), s["window"]),
        "unfolded": token_unshuffle(case.tensors["z"], tuple(s["grid back"]), s["window back"]),
    }


def fold_with_blocks(case):
    s = case.settings
    fold = TokenShuffle(s["d"], s["window"], s["blocks"]).double()
    load_layer(fold.compress, case.tensors, "compress")
    load_blocks(fold.blocks, case.tensors, ["block0", "block1"])
    x = case.tensors["x"].requires_grad_()
    output = fold(x, tuple(s["grid"]))
    output.square().sum().backward()
    return {
        "output": output,
        "gradient w.r.t. x": x.grad,
        "gradient w.r.t. compress.weight": fold.compress.weight.grad,
        "gradient w.r.t. block0.W1": fold.blocks[0].layers[1].weight.grad,
        "gradient w.r.t. block1.norm.weight": fold.blocks[1].layers[0].weight.grad,
    }


def unfold_with_blocks(case):
    s = case.settings
    unfold = TokenUnshuffle(s["d"], s["window"], s["blocks"]).double()
    load_layer(unfold.expand, case.tensors, "expand")
    load_blocks(unfold.blocks, case.tensors, ["block0"])
    x = case.tensors["x"].requires_grad_()
    output = unfold(x, tuple(s["grid"]))
    output.square().sum().backward()
    return {
        "output": output,
        "gradient w.r.t. x": x.grad,
        "gradient w.r.t. expand.weight": unfold.expand.weight.grad,
        "gradient w.r.t. block0.W2": unfold.blocks[0].layers[3].weight.grad,
    }


def whole_model(case):
    s, t = case.settings, case.tensors
    model = TokenShuffleAR(
        s["V"], s["d"], 1, s["heads"], tuple(s["grid"]), s["window"], 1, s["classes"]
    ).double()
    attention = model.transformer.attentions[0]
    with torch.no_grad():
        model.embedding.weight.copy_(t["embedding"])
        model.classes.weight.copy_(t["start"])
        model.transformer.positions.copy_(t["positions"])
        for part in ("weight", "bias"):
            stacked = torch.cat([t[f"{name}.{part}"] for name in "qkv"])
            getattr(attention.qkv, part).copy_(stacked)
    for layer, name in {
        model.shuffle.compress: "compress",
        model.transformer.norms[0]: "attn.norm",
        attention.project: "project",
        model.unshuffle.expand: "expand",
        model.norm: "norm",
        model.head: "head",
    }.items():
        load_layer(layer, t, name)
    load_blocks(model.shuffle.blocks, t, ["fuse"])
    load_blocks(model.transformer.mlps, t, ["mlp"])
    load_blocks(model.unshuffle.blocks, t, ["unfuse"])
    logits = model(t["tokens"], t["cond"])
    loss = model.loss(t["tokens"], t["cond"])
    loss.backward()
    classes = torch.tensor([0, 2])
    return {
        "greedy generation": model.generate(classes, temperature=0),
        "greedy generation with guidance": model.generate(classes, temperature=0, guidance=1.8),
        "logits": logits,
        "loss": loss,
        "z-loss term": model.loss(t["tokens"], t["cond"], z_loss=1.0) - loss,
        "gradient of the loss w.r.t. embedding": model.embedding.weight.grad,
        "cfg_schedule": torch.tensor(cfg_schedule("linear", 5, 4.0), dtype=torch.float64),
        "transformer_flops": torch.tensor(transformer_flops(100, 48, 3)),
    }


RECOMPUTE = {
    "permutation, tall and wide grids, both ways": both_ways,
    "TokenShuffle with two blocks": fold_with_blocks,
    "TokenUnshuffle, window 3, batch of one": unfold_with_blocks,
    "autoregressive model: logits, loss, shift by one window": whole_model,
}


@pytest.mark.parametrize("case", [*load_reference("token_shuffle")], ids=lambda c: c.name)
def test_against_the_loops_of_the_formulas(case, agree):
    agree(case, RECOMPUTE[case.name](case))
