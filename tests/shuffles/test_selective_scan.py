"""The selective scan: the recurrence, two fast ways to run it, their gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.shuffles import layer_shuffle
from shuffle_nb.shuffles import selective_scan as module
from shuffle_nb.shuffles.selective_scan import resize_positions, scan, selective_scan


def scan_inputs(batch=2, channels=6, length=9, states=4, groups=(), dtype=torch.float32):
    u, delta = torch.randn(2, batch, channels, length, dtype=dtype)
    rates = -torch.rand(channels, states, dtype=dtype) * 4
    B, C = torch.randn(2, batch, *groups, states, length, dtype=dtype)
    return u, F.softplus(delta - 1), rates, B, C


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradients(y, inputs):
    return torch.autograd.grad(y.square().sum(), inputs)


# ---------------------------------------------------------------- the authors' numbers


def all_options_and_two_groups(case):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    results = {}
    for method in ("loop", "parallel"):
        inputs = [case.tensors[name].clone().requires_grad_() for name in names]
        y = selective_scan(*inputs, delta_softplus=True, method=method)
        grads = gradients(y, inputs)
        case.compare(output=y)
        results = {f"gradient w.r.t. {n}": g for n, g in zip(names, grads, strict=True)}
        t = case.tensors
        two = selective_scan(t["u"], t["delta_positive"], t["A"], t["B2"], t["C2"], method=method)
        results |= {"output": y, "output, two groups": two}
        case.compare(results)
    return results


def test_against_the_reference_of_the_mamba_repository(agree):
    from shuffle_nb.foundations.reference import load_reference

    case = load_reference("layer_shuffle")["selective scan, all options and two groups"]
    agree(case, all_options_and_two_groups(case))


# ---------------------------------------------------------------- the recurrence


def scan_by_definition(u, delta, A, B, C):
    """Index by index, from the formula."""
    y = torch.zeros_like(u)
    batch, channels, length = u.shape
    for b in range(batch):
        for c in range(channels):
            state = torch.zeros_like(A[0])
            for t in range(length):
                decay = torch.exp(delta[b, c, t] * A[c])
                state = decay * state + delta[b, c, t] * u[b, c, t] * B[b, :, t]
                y[b, c, t] = (state * C[b, :, t]).sum()
    return y


@pytest.mark.parametrize("method", ["loop", "parallel"])
def test_the_scan_is_the_recurrence(method):
    inputs = scan_inputs(batch=2, channels=3, length=11, states=3, dtype=torch.float64)
    found = selective_scan(*inputs, method=method)
    assert torch.allclose(found, scan_by_definition(*inputs), atol=1e-12)


@pytest.fixture(params=[True, False], ids=["chain", "tree"])
def way(request, monkeypatch):
    """Run the blocks by the chain, then by the tree, whatever the size."""
    monkeypatch.setattr(module, "_in_turn", lambda value: request.param)
    return request.param


SHAPES = st.tuples(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.integers(1, 9), st.integers(1, 3)
)


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.sampled_from([1, 2, 3, 8, 1000]), st.booleans(), st.booleans())
def test_loop_and_parallel_agree_with_their_gradients(shape, block, grouped, chain):
    batch, channels, length, states, groups = shape
    groups = (groups,) if grouped else ()
    channels *= math.prod(groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_block_length", lambda u, n: min(len(u), block))
        patch.setattr(module, "_in_turn", lambda value: chain)
        for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
            inputs = scan_inputs(batch, channels, length, states, groups, dtype)
            inputs = [x.requires_grad_() for x in inputs]
            loop, parallel = (selective_scan(*inputs, method=m) for m in ("loop", "parallel"))
            assert parallel.dtype == dtype and relative(parallel, loop) < bound
            weight = torch.randn_like(loop)
            for exact, found in zip(
                *(torch.autograd.grad((y * weight).sum(), inputs) for y in (loop, parallel)),
                strict=True,
            ):
                assert torch.allclose(
                    found, exact, rtol=0, atol=10 * bound * (exact.abs().max() + 1)
                )


def test_the_choice_between_chain_and_tree():
    """Short or wide: one token after the other. Long and narrow: the tree."""
    assert module._in_turn(torch.empty(32, 1, 1, 4, 8))
    assert not module._in_turn(torch.empty(33, 1, 1, 4, 8))
    assert module._in_turn(torch.empty(197, 1, 2, 16, 128))
    assert not module._in_turn(torch.empty(197, 1, 1, 16, 255))
    assert not module._in_turn(torch.empty(8, 1, 2, 16, 128, device="meta"))  # no CPU: the tree


def test_long_sequences_cross_the_real_blocks(way):
    inputs = [x.requires_grad_() for x in scan_inputs(2, 96, 700, 16)]
    assert module._block_length(inputs[0].permute(2, 0, 1), 16) < 350
    loop, parallel = (selective_scan(*inputs, method=m) for m in ("loop", "parallel"))
    assert relative(parallel, loop) < 1e-5
    for found, exact in zip(gradients(parallel, inputs), gradients(loop, inputs), strict=True):
        assert relative(found, exact) < 1e-4


@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_gradients_of_the_scan(block, way, monkeypatch):
    monkeypatch.setattr(module, "_block_length", lambda u, n: min(len(u), block))
    inputs = [x.requires_grad_() for x in scan_inputs(1, 2, 7, 2, dtype=torch.float64)]
    assert torch.autograd.gradcheck(selective_scan, inputs)


def test_second_derivatives_come_from_the_loop_and_the_parallel_scan_says_that_it_has_none():
    inputs = [x.requires_grad_() for x in scan_inputs(1, 1, 3, 2, dtype=torch.float64)]
    assert torch.autograd.gradgradcheck(lambda *x: selective_scan(*x, method="loop"), inputs)
    y = selective_scan(*inputs)
    (first,) = torch.autograd.grad(y.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(first.sum(), inputs[1])


@pytest.mark.usefixtures("plain_python")
def test_the_operation_keeps_the_rules_of_custom_operations():
    u, delta, A, B, C = scan_inputs(1, 4, 5, 2)
    time_first = [module._time_first(x, 1) for x in (u, delta, B, C)]
    arguments = (*time_first[:2], A.T[None].contiguous(), *time_first[2:])
    torch.library.opcheck(module._scan_operation, [x.requires_grad_() for x in arguments])


def test_limits_of_the_scan():
    u, delta, A, B, C = scan_inputs()
    D = torch.randn(6)
    skip = selective_scan(u, torch.zeros_like(delta), A, B, C, D)
    assert torch.allclose(skip, D[:, None] * u)  # delta 0: the token is skipped
    ones = torch.ones(2, 1, 9)
    total = selective_scan(u, torch.ones_like(u), torch.zeros(6, 1), ones, ones)
    assert torch.allclose(total, u.cumsum(-1), atol=1e-5)
    forgets = selective_scan(u, torch.ones_like(u), torch.full((6, 1), -1e4), ones, ones)
    assert torch.equal(forgets, u)  # all decays underflow to 0


@pytest.mark.parametrize("method", ["loop", "parallel"])
def test_no_sequences(method):
    """An empty batch gives an empty result, and gradients of the right shapes."""
    zeros, rates = torch.zeros, -torch.rand(4, 3)
    inputs = [zeros(0, 4, 50), zeros(0, 4, 50), rates, zeros(0, 3, 50), zeros(0, 3, 50)]
    inputs = [x.requires_grad_() for x in inputs]
    y = selective_scan(*inputs, method=method)
    assert y.shape == (0, 4, 50)
    grads = torch.autograd.grad(y.sum(), inputs)
    assert [g.shape for g in grads] == [x.shape for x in inputs] and not grads[2].any()
    grouped = [inputs[0], inputs[1], rates, zeros(0, 2, 3, 50), zeros(0, 2, 3, 50)]
    assert selective_scan(*grouped, zeros(4), inputs[0], zeros(4), True).shape == (0, 4, 50)


@pytest.mark.parametrize("method", ["loop", "parallel"])
def test_causal(method, way):
    u, delta, A, B, C = scan_inputs(length=40)
    changed = u.clone()
    changed[..., 21:] += 1
    before, after = (selective_scan(x, delta, A, B, C, method=method) for x in (u, changed))
    assert torch.equal(before[..., :21], after[..., :21])
    assert not torch.isclose(before[..., 21:], after[..., 21:]).all()


def test_strong_forgetting_is_safe_with_its_gradients(way):
    u, delta, A, B, C = (x.requires_grad_() for x in scan_inputs(length=300))
    y = selective_scan(u, 50 * delta, A, B, C)
    grads = torch.autograd.grad(y.sum(), (u, delta, A, B, C))
    assert all(x.isfinite().all() for x in (y, *grads))
    exact = selective_scan(*(x.double() for x in (u, 50 * delta, A, B, C)), method="loop")
    assert relative(y.double(), exact) < 1e-5


def test_the_options_of_the_scan():
    u, delta, A, B, C = scan_inputs(dtype=torch.float64)
    D, bias, z = torch.randn(6).double(), torch.randn(6).double(), torch.randn_like(u)
    found = selective_scan(u, delta, A, B, C, D, z, bias, True)
    steps = F.softplus(delta + bias[:, None])
    plain = scan_by_definition(u, steps, A, B, C)
    assert torch.allclose(found, (plain + D[:, None] * u) * F.silu(z), atol=1e-12)


def test_groups_are_separate_scans():
    u, delta, A, B, C = scan_inputs(channels=6, groups=(3,))
    together = selective_scan(u, delta, A, B, C)
    for group in range(3):
        part = slice(2 * group, 2 * group + 2)
        alone = selective_scan(u[:, part], delta[:, part], A[part], B[:, group], C[:, group])
        assert torch.allclose(together[:, part], alone, atol=1e-6)


def test_half_precision_is_scanned_in_single():
    low = [x.bfloat16() for x in scan_inputs(length=64)]
    found = selective_scan(*low)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, selective_scan(*(x.float() for x in low)).bfloat16())


def test_memory_of_a_training_pass_does_not_hold_the_states():
    """Beside inputs and gradients there is one work space and one state for each block."""
    inputs = scan_inputs(1, 64, 4096, 16)
    u = inputs[0].permute(2, 0, 1).unsqueeze(2)
    _, states = module._scan_forward(
        *(module._time_first(x, 1) for x in inputs[:2]),
        inputs[2].T[None].contiguous(),
        *(module._time_first(x, 1) for x in inputs[3:]),
    )
    assert states.numel() == 4096 // module._block_length(u, 16) * 64 * 16  # not 4096 * 64 * 16


@pytest.mark.usefixtures("plain_python")
def test_the_compiled_scan_is_the_scan():
    inputs = [x.requires_grad_() for x in scan_inputs(length=50)]
    compiled = torch.compile(selective_scan, fullgraph=True, backend="aot_eager")
    results = [f(*inputs) for f in (compiled, selective_scan)]
    assert torch.allclose(*results)
    for ours, exact in zip(*(gradients(y, inputs) for y in results), strict=True):
        assert torch.allclose(ours, exact)


def test_the_paper_still_exports_the_scan():
    assert layer_shuffle.selective_scan is selective_scan
    u = torch.randn(5, 2, 1, 3)
    B = torch.randn(5, 2, 1, 4)
    assert scan(u, u.exp(), -torch.rand(1, 4, 3), B, B).shape == u.shape


def test_positions_stretch_to_another_grid():
    positions = torch.randn(1, 10, 4)
    assert resize_positions(positions, (3, 3)) is positions
    larger = resize_positions(positions, (6, 5))
    assert larger.shape == (1, 31, 4) and torch.equal(larger[:, 0], positions[:, 0])
    flat = resize_positions(torch.full((1, 10, 4), 2.0), (4, 7))
    assert torch.allclose(flat, torch.full((1, 29, 4), 2.0))  # a constant stays one
    with pytest.raises(ValueError, match="a square grid, got 7"):
        resize_positions(torch.zeros(1, 7, 4), (3, 3))


# ---------------------------------------------------------------- bad input


def scan_with(**changes):
    names = ("u", "delta", "A", "B", "C")
    inputs = dict(zip(names, scan_inputs(), strict=True))
    return selective_scan(**(inputs | changes))


@pytest.mark.usefixtures("plain_python")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(method="fast"), "method must be one of.*'fast'"),
        (dict(u=torch.zeros(6, 9)), r"u must be \(batch, channels, time\)"),
        (dict(u=torch.zeros(2, 6, 0)), r"u must be at least one token long.*\(2, 6, 0\)"),
        (dict(delta=torch.zeros(2, 6, 8)), r"delta must be \(2, 6, 9\)"),
        (dict(A=torch.zeros(5, 4)), r"A must be \(6, states\)"),
        (dict(B=torch.zeros(2, 5, 9)), r"B must be \(2, \[groups,\] 4, 9\)"),
        (dict(B=torch.zeros(4, 9)), "B must be"),
        (dict(C=torch.zeros(2, 4, 8)), r"C must be \(2, 4, 9\), got shape \(2, 4, 8\)"),
        (
            dict(B=torch.zeros(2, 4, 4, 9), C=torch.zeros(2, 4, 4, 9)),
            "4 groups, which do not divide 6 channels",
        ),
        (dict(B=torch.zeros(2, 0, 4, 9), C=torch.zeros(2, 0, 4, 9)), "0 groups"),
        (dict(D=torch.zeros(5)), r"D must be \(6\), got shape \(5,\)"),
        (dict(z=torch.zeros(2, 6, 8)), r"z must be \(2, 6, 9\), got shape \(2, 6, 8\)"),
        (dict(delta_bias=torch.zeros(7)), r"delta_bias must be \(6\)"),
    ],
)
def test_message_says_what_was_expected(changes, message):
    with pytest.raises(ValueError, match=message):
        scan_with(**changes)
