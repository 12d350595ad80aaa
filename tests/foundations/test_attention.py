"""One attention: the formula, any cut into chunks, and what is refused."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations.attention import (
    Attention,
    CausalTransformer,
    KeyValueCache,
    attend,
)


def reference(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Loop over batch, head and query: softmax over the keys that the query may see."""
    width = layer.dim // layer.num_heads
    query, key, value = layer.qkv(x).chunk(3, dim=-1)
    mixed = torch.zeros_like(query)
    for b in range(x.shape[0]):
        for head in range(layer.num_heads):
            part = slice(head * width, (head + 1) * width)
            for place in range(x.shape[1]):
                seen = place + 1 if layer.causal else x.shape[1]
                scores = key[b, :seen, part] @ query[b, place, part] / math.sqrt(width)
                mixed[b, place, part] = scores.softmax(0) @ value[b, :seen, part]
    return layer.project(mixed)


def layer_of(dim=8, num_heads=2, causal=True, dtype=torch.float64) -> Attention:
    torch.manual_seed(0)
    return Attention(dim, num_heads, causal).to(dtype).eval()


def inputs(batch, tokens, dim=8, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(batch, tokens, dim, generator=torch.Generator().manual_seed(1)).to(dtype)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.booleans())
def test_it_is_the_formula(batch, tokens, num_heads, causal):
    layer = layer_of(num_heads=num_heads, causal=causal)
    x = inputs(batch, tokens)
    assert torch.allclose(layer(x), reference(layer, x), atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.integers(1, 3), st.integers(0, 3))
@torch.no_grad()
def test_every_cut_into_chunks_equals_the_full_pass(sizes, batch, spare):
    layer, x = layer_of(), inputs(batch, sum(sizes))
    cache = KeyValueCache(sum(sizes) + spare)
    pieces = [layer(chunk, cache) for chunk in x.split(sizes, dim=1)]
    assert torch.allclose(torch.cat(pieces, dim=1), layer(x), atol=1e-12)
    assert cache.length == sum(sizes)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02), (torch.float16, 2e-3)]
)
@torch.no_grad()
def test_other_types_with_a_warm_cache(dtype, tolerance):
    layer, x = layer_of(dtype=dtype), inputs(2, 7, dtype=dtype)
    cache = KeyValueCache(7)
    pieces = torch.cat([layer(chunk, cache) for chunk in x.split([3, 1, 3], dim=1)], dim=1)
    assert pieces.dtype == dtype
    exact = copy.deepcopy(layer).double()(x.double())
    assert (pieces.double() - exact).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_autocast_with_a_warm_cache(dtype):
    layer, x = layer_of(dtype=torch.float32), inputs(2, 6, dtype=torch.float32)
    cache = KeyValueCache(6)
    with torch.autocast("cpu", dtype=dtype):
        pieces = torch.cat([layer(chunk, cache) for chunk in x.split([4, 2], dim=1)], dim=1)
    assert pieces.dtype == dtype
    assert torch.allclose(pieces.float(), layer(x), atol=0.02)


def test_gradients():
    layer, x = layer_of(), inputs(1, 4).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    chunk = torch.randn(1, 1, 2, 4, dtype=torch.float64, requires_grad=True)
    past = torch.randn(1, 1, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: attend(q, k, k, causal=True), (chunk, past))


@torch.no_grad()
def test_a_cleared_cache_starts_again_in_the_same_memory():
    layer, x = layer_of(), inputs(2, 5)
    cache = KeyValueCache(5)
    first = layer(x, cache)
    memory = cache.key.data_ptr()
    cache.clear()
    assert torch.equal(layer(x, cache), first) and cache.key.data_ptr() == memory


@pytest.mark.usefixtures("plain_python")
@torch.no_grad()
def test_compiled_without_a_graph_break():
    layer, x = layer_of(dtype=torch.float32), inputs(2, 8, dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
    cache = KeyValueCache(8)
    sizes = [3, 1, 1, 1, 2]
    pieces = torch.cat([compiled(chunk, cache) for chunk in x.split(sizes, dim=1)], dim=1)
    assert torch.allclose(pieces, layer(x), atol=1e-6)


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize("causal", [False, True])
def test_exported_with_any_batch_and_length(causal):
    layer = layer_of(causal=causal)
    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens", min=2)
    shapes = {"x": {0: batch, 1: tokens}}
    program = torch.export.export(layer, (inputs(2, 5),), dynamic_shapes=shapes).module()
    for size in ((1, 5), (4, 5), (3, 9)):
        x = inputs(*size)
        assert torch.allclose(program(x), layer(x), atol=1e-12)


def test_state_dicts_of_other_attentions_map():
    theirs = nn.MultiheadAttention(8, 2, batch_first=True).double()
    ours = layer_of(causal=False)
    names = {"qkv.weight": "in_proj_weight", "qkv.bias": "in_proj_bias"}
    names |= {f"project.{part}": f"out_proj.{part}" for part in ("weight", "bias")}
    state = theirs.state_dict()
    ours.load_state_dict({ours_: state[name] for ours_, name in names.items()})
    x = inputs(2, 5)
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-12)


def filled(places=3, max_length=4):
    cache = KeyValueCache(max_length)
    with torch.no_grad():
        layer_of()(inputs(2, places), cache)
    return cache


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(8, 3), "dim must be divisible by num_heads 3, got 8"),
        (lambda: Attention(8, 0), "num_heads must be .*at least 1, got 0"),
        (lambda: Attention(0, 1), "dim must be .*at least 1, got 0"),
        (lambda: KeyValueCache(0), "max_length must be .*at least 1, got 0"),
        (lambda: layer_of()(inputs(2, 3, dim=4)), r"x must be \(batch, tokens, 8\), got.*2, 3, 4"),
        (lambda: layer_of(causal=False)(inputs(2, 3), KeyValueCache(3)), "cache must be None"),
        (lambda: layer_of()(inputs(2, 2), filled()), "holds 3 of at most 4 places, got 2 more"),
        (lambda: layer_of()(inputs(3, 1), filled()), r"a chunk must be \(2, 2, places, 4\)"),
        (lambda: layer_of(dtype=torch.float32)(inputs(2, 1).float(), filled()), "of torch.float64"),
        (lambda: attend(*torch.ones(3, 2, 4).split([1, 1, 1]), causal=True), None),
        (
            lambda: attend(torch.ones(3, 4), torch.ones(2, 4), torch.ones(2, 4), causal=True),
            "query must hold at most 2 places",
        ),
    ],
)
def test_bad_input(call, message):
    with torch.no_grad():
        if message is None:
            call()
            return
        with pytest.raises(ValueError, match=message):
            call()


def test_a_cache_refuses_gradients_and_stays_as_it_was():
    cache = KeyValueCache(4)
    with pytest.raises(ValueError, match=r"under torch\.no_grad"):
        layer_of()(inputs(1, 2), cache)
    assert cache.length == 0 and cache.key is None


def decoder_of(max_positions=6, depth=2) -> CausalTransformer:
    torch.manual_seed(0)
    model = CausalTransformer(8, depth, 2, max_positions).double().eval()
    nn.init.normal_(model.positions)
    return model


def test_the_decoder_is_positions_then_attention_and_mlp_each_beside_a_shortcut():
    model, x = decoder_of(), inputs(2, 5)
    by_hand = x + model.positions[:5]
    for norm, attention, mlp in zip(model.norms, model.attentions, model.mlps, strict=True):
        by_hand = by_hand + reference(attention, norm(by_hand))
        before, first, _, second = mlp
        by_hand = by_hand + second(nn.functional.gelu(first(before(by_hand))))
    assert torch.allclose(model(x), by_hand, atol=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1], [6]])
@torch.no_grad()
def test_chunks_through_a_decoder_with_caches_equal_the_whole(sizes):
    model, x = decoder_of(), inputs(2, 6)
    caches = model.new_caches()
    chunks = [model(chunk, caches) for chunk in x.split(sizes, dim=1)]
    assert torch.allclose(torch.cat(chunks, dim=1), model(x), atol=1e-12)


def test_a_decoder_refuses_no_blocks_and_more_positions_than_it_has():
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        CausalTransformer(8, 0, 2, 6)
    with pytest.raises(ValueError, match=r"positions of x must be in 1..6, got 7"):
        decoder_of()(inputs(1, 7))
    model = decoder_of()
    caches = model.new_caches()
    with torch.no_grad():
        model(inputs(1, 4), caches)
        with pytest.raises(ValueError, match=r"positions of x must be in 1..2, got 3"):
            model(inputs(1, 3), caches)
