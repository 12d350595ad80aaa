"""The token machine: what it draws, the network that learns it, the instruments."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shuffle_nb.features.token_machine import (
    TokenTransformer,
    TokFSM,
    code_f1,
    code_purity,
    divergence_within,
    evaluating,
    first_transition_accuracy,
    gap_and_accuracy,
    insert_parts,
    js_divergence,
    js_to_target,
    last_vectors,
    neuron_f1,
    next_state_probabilities,
    next_token_loss,
    swap_vectors,
)

seeds = st.integers(0, 10_000)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- the machine


@given(st.integers(1, 30), st.data())
@settings(deadline=None, max_examples=40)
def test_transitions_are_uniform_over_distinct_successors(num_states, data):
    edges = data.draw(st.integers(1, num_states))
    base = data.draw(st.integers(2, 12))
    fsm = TokFSM(num_states, edges, base, seed=data.draw(seeds))
    assert torch.allclose(fsm.transition.sum(1), torch.ones(num_states))
    assert ((fsm.transition > 0).sum(1) == edges).all()
    assert base**fsm.digits >= num_states and (
        fsm.digits == 1 or base ** (fsm.digits - 1) < num_states
    )
    tokens, states = fsm.sample(4, 3)
    assert tokens.shape == (4, 1 + 3 * fsm.digits) and states.shape == (4, 3)
    assert (tokens[:, 0] == fsm.bos).all() and (tokens[:, 1:] < base).all()
    assert (fsm.transition[states[:, :-1], states[:, 1:]] > 0).all()
    value = 0
    for digit in tokens[:, 1:].view(4, 3, fsm.digits).unbind(-1):
        value = value * base + digit
    assert torch.equal(value, states)


def test_the_paper_s_machine():
    fsm = TokFSM()
    assert (fsm.num_states, fsm.edges, fsm.base, fsm.digits, fsm.vocab) == (100, 10, 10, 2, 11)
    assert torch.equal(TokFSM().transition, fsm.transition)
    assert not torch.equal(TokFSM(seed=43).transition, fsm.transition)
    trigrams = {(s, t // 10) for s in range(100) for t in fsm.successors[s].tolist()}
    assert 100 * 4 < len(trigrams) < 1000  # counted: several successors share a first digit
    assert math.comb(10, 1) * 100 >= len(trigrams)


def test_sampling_follows_the_generator_and_the_transitions():
    fsm = TokFSM(25, 3, 5)
    draws = [fsm.sample(4000, 2, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(draws[0][0], draws[1][0])
    states = draws[0][1]
    joint = torch.zeros(25, 25).index_put((states[:, 0], states[:, 1]), torch.tensor(1.0), True)
    observed = joint / joint.sum(1, keepdim=True)
    assert (observed - fsm.transition).abs().max() < 0.15


def test_machine_says_what_is_wrong(plain_python):
    for edges in (0, 11):
        with pytest.raises(ValueError, match=r"edges must be in 1\.\.10"):
            TokFSM(10, edges)
    with pytest.raises(ValueError, match="base must be at least 2"):
        TokFSM(10, 2, base=1)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        TokFSM(10, 2).sample(0, 1)


class Oracle(torch.nn.Module):
    """Knows the machine: exact next-digit probabilities from the last whole state."""

    def __init__(self, fsm, wrong=False):
        super().__init__()
        self.fsm, self.nothing = fsm, torch.nn.Parameter(torch.zeros(()))
        self.next = fsm.transition.roll(1, 1) if wrong else fsm.transition

    def forward(self, tokens):
        digits = self.fsm.digits
        whole, rest = divmod(tokens.shape[1] - 1, digits)
        last = tokens[:, 1 + (whole - 1) * digits : 1 + whole * digits]
        state = (last * self.fsm.base ** torch.arange(digits - 1, -1, -1)).sum(1)
        begun = tokens[:, tokens.shape[1] - rest :] if rest else tokens[:, :0]
        chance = self.next[state]  # (batch, states)
        fits = (self.fsm.spelling[:, :rest] == begun.unsqueeze(1)).all(-1)
        digit = F.one_hot(self.fsm.spelling[:, rest], self.fsm.vocab).float()
        return (((chance * fits) @ digit) + 1e-12).log().unsqueeze(1)


@pytest.mark.parametrize("options", [(25, 3, 5), (10, 4, 10), (30, 5, 3)])
def test_next_state_probabilities_of_an_oracle_are_the_transitions(options):
    fsm = TokFSM(*options)
    oracle = Oracle(fsm)
    chances = next_state_probabilities(lambda t: oracle(t)[:, -1], fsm, fsm.contexts())
    assert torch.allclose(chances, fsm.transition, atol=1e-5)
    assert first_transition_accuracy(oracle, fsm) == 1.0
    wrong = first_transition_accuracy(Oracle(fsm, wrong=True), fsm)
    rolled = fsm.transition.roll(1, 1)
    assert wrong == pytest.approx(
        ((rolled > 0) & (fsm.transition > 0)).sum().item() / fsm.num_states / fsm.edges
    )


# --- reading


def test_purity_by_hand():
    assert code_purity(torch.tensor([7, 7, 7, 9]), torch.tensor([0, 1, 1, 2])) == 0.5
    assert code_purity(torch.tensor([1, 2, 2]), torch.tensor([0, 1, 1])) == 1.0
    two_slots = torch.tensor([[1, 2], [1, 3]])
    assert code_purity(two_slots, torch.tensor([0, 1])) == pytest.approx(2 / 3)


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_renaming_codes_changes_no_score(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 6, (40,), generator=generator)
    labels = torch.randint(0, 4, (40,), generator=generator)
    names = torch.randperm(50, generator=generator)[:6]
    assert code_purity(ids, labels) == code_purity(names[ids], labels)
    truth = F.one_hot(labels, 4).bool()
    for label, found in enumerate(code_f1(ids, labels).tolist()):
        options = [(ids == code) for code in range(6)]
        fit = [f1_by_hand(fires[::2], truth[::2, label]) for fires in options]
        held = [f1_by_hand(fires[1::2], truth[1::2, label]) for fires in options]
        best = [h for f, h in zip(fit, held, strict=True) if f == max(fit)]
        assert any(found == pytest.approx(h) for h in best)


def f1_by_hand(fires, truth):
    hits = (fires & truth).sum().item()
    return 2 * hits / max(1, fires.sum().item() + truth.sum().item())


@given(seeds)
@settings(deadline=None, max_examples=30)
def test_neuron_f1_is_the_best_threshold_in_either_direction(seed):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randint(0, 6, (24, 3), generator=generator).float()  # with ties
    labels = torch.randint(0, 3, (24,), generator=generator)
    truth = F.one_hot(labels, 3).bool()
    detectors = [
        side
        for unit in range(3)
        for threshold in h[::2, unit].unique()
        for side in (h[:, unit] >= threshold, h[:, unit] <= threshold)
    ]
    for label, found in enumerate(neuron_f1(h, labels).tolist()):
        fit = [f1_by_hand(fires[::2], truth[::2, label]) for fires in detectors]
        best = [fires for f, fires in zip(fit, detectors, strict=True) if f == max(fit)]
        held = [f1_by_hand(fires[1::2], truth[1::2, label]) for fires in best]
        assert any(found == pytest.approx(value) for value in held)


def test_a_code_a_label_is_a_perfect_detector():
    labels = torch.arange(5).repeat_interleave(2).repeat(3)
    assert code_f1(labels + 3, labels).tolist() == [1.0] * 5
    assert neuron_f1(F.one_hot(labels).float(), labels).tolist() == [1.0] * 5
    assert neuron_f1(-F.one_hot(labels).float(), labels).tolist() == [1.0] * 5


# --- divergence


@given(seeds, st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None)
def test_divergence_is_symmetric_and_bounded(seed, dtype):
    p, q = (3 * normal(2, 10, 6, seed=seed, dtype=dtype)).softmax(-1)
    js = js_divergence(p, q)
    assert js.shape == (10,) and torch.equal(js, js_divergence(q, p))
    assert ((js > 0) & (js <= math.log(2))).all()
    assert (js_divergence(p, p) == 0).all()


def test_divergence_by_hand():
    p, q = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.5])
    assert js_divergence(p, q).item() == pytest.approx(math.log(2))
    half = torch.tensor([0.5, 0.5, 0.0])  # middle (3/4, 1/4): KLs ln 4/3 and ½ln 2/3 + ½ln 2
    by_hand = (math.log(4 / 3) + 0.5 * math.log(2 / 3) + 0.5 * math.log(2)) / 2
    assert js_divergence(p, half).item() == pytest.approx(by_hand, abs=1e-6)


# --- what is known of the machine


def test_the_best_loss_is_the_entropy_of_the_walks():
    fsm = TokFSM(25, 3, 5)
    assert fsm.best_loss(1) == pytest.approx(math.log(25) / 2)
    assert fsm.best_loss(3) == pytest.approx((math.log(25) + 2 * math.log(3)) / 6)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        fsm.best_loss(0)


@pytest.mark.parametrize("options", [(25, 3, 5), (36, 3, 6), (30, 5, 3)])
def test_begun_inputs_and_what_follows_them(options):
    fsm = TokFSM(*options)
    inputs, follows = fsm.begun()
    assert inputs.shape == (len(follows), fsm.digits + 2) and (inputs[:, 0] == fsm.bos).all()
    assert len(inputs.unique(dim=0)) == len(inputs)
    assert torch.allclose(follows.sum(1), torch.ones(len(follows), dtype=torch.float64))
    spelled = fsm.spelling.tolist()
    for tokens, chances in zip(inputs.tolist(), follows, strict=True):
        state, digit = spelled.index(tokens[1:-1]), tokens[-1]
        after = [spelled[s][1] for s in fsm.successors[state].tolist() if spelled[s][0] == digit]
        counted = torch.tensor(after).bincount(minlength=fsm.vocab) / len(after)
        assert after and torch.allclose(chances, counted.double())


def test_states_of_one_digit_cannot_be_begun():
    with pytest.raises(ValueError, match="at least 2 digits to begin one, got 1"):
        TokFSM(5, 2, 10).begun()


# --- the network


def test_the_network_is_causal_and_measures_its_own_loss():
    model, tokens = TokenTransformer(6, 7).eval(), torch.randint(0, 6, (2, 7))
    changed = tokens.clone()
    changed[:, 4:] = (tokens[:, 4:] + 1) % 6
    with torch.no_grad():
        logits = model(tokens)
        assert torch.allclose(logits[:, :4], model(changed)[:, :4], atol=1e-6)
        assert not torch.allclose(logits[:, 4:], model(changed)[:, 4:])
        chances = logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:].unsqueeze(2))
        assert torch.allclose(next_token_loss(model, tokens), -chances.mean(), atol=1e-6)


def test_the_network_says_what_is_wrong(plain_python):
    with pytest.raises(ValueError, match="dim must be divisible by heads"):
        TokenTransformer(6, 7, heads=3)
    with pytest.raises(ValueError, match="at most max_len=7 long, got 8"):
        TokenTransformer(6, 7)(torch.zeros(1, 8, dtype=torch.long))


def test_the_gap_is_the_loss_above_the_entropy_of_the_walks():
    fsm = TokFSM(25, 3, 5)
    model, (tokens, _) = TokenTransformer(fsm.vocab, 7), fsm.sample(30, 3)
    found = gap_and_accuracy(model, fsm, tokens)
    with evaluating(model):
        loss = next_token_loss(model, tokens).item()
    assert found["gap"] == pytest.approx(loss - fsm.best_loss(3)) and found["gap"] > 0
    assert found["accuracy"] == first_transition_accuracy(model, fsm)
    assert model.training


def test_evaluating_restores_the_mode_after_an_error():
    model = TokenTransformer(6, 7)
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("inside")
    assert model.training and torch.is_grad_enabled()


# --- vectors inside


def model_and_parts():
    model = TokenTransformer(6, 7).eval()
    return model, [part for block in model.blocks for part in (block.project, block.mlp)]


def test_last_vectors_are_those_of_the_part():
    model, tokens = TokenTransformer(6, 7), torch.randint(0, 6, (3, 5))
    block = model.blocks[0]
    with torch.no_grad():
        x = model.embed(tokens) + model.place.weight[:5]
        wanted = block.mlp(block.mlp_norm(x))[:, -1]
    found = last_vectors(model.train(), block.mlp, tokens)
    assert torch.allclose(found, wanted, atol=1e-6) and not found.requires_grad
    assert model.training and not block.mlp._forward_hooks
    with pytest.raises(ValueError, match="a module that the model calls"):
        last_vectors(model, copy.deepcopy(block.mlp), tokens)


def test_swapping_all_vectors_leaves_the_last_token_alone():
    model, parts = model_and_parts()
    source, target = torch.tensor([[5, 0, 1, 2]]), torch.tensor([[5, 4, 3, 2]])
    with torch.no_grad():
        own, wanted = model(source)[:, -1], model(target)[:, -1]
    assert torch.equal(swap_vectors(model, source, target, []), own)
    assert torch.allclose(swap_vectors(model, source, source, parts), own, atol=1e-6)
    assert torch.allclose(swap_vectors(model, source, target, parts), wanted, atol=1e-5)
    assert not torch.allclose(own, wanted, atol=1e-3)
    assert not any(part._forward_hooks for part in parts)


@pytest.mark.parametrize("only", [3, "widest"])
def test_swapping_one_coordinate_writes_that_one(only):
    model, parts = model_and_parts()
    source, target = torch.randint(0, 6, (2, 4, 5))
    own, other = (last_vectors(model, parts[-1], tokens) for tokens in (source, target))
    swap = swap_vectors(model, source, target, [parts[-1]], only)
    place = (other - own).abs().argmax(1) if only == "widest" else torch.full((4,), only)
    edited = own.scatter(1, place.unsqueeze(1), other.gather(1, place.unsqueeze(1)))
    hook = parts[-1].register_forward_hook(
        lambda _, args, out: torch.cat([out[:, :-1], edited.unsqueeze(1)], 1)
    )
    with evaluating(model):
        assert torch.allclose(model(source)[:, -1], swap, atol=1e-5)
    hook.remove()
    with pytest.raises(ValueError, match="only must be one of"):
        swap_vectors(model, source, target, parts, "largest")


def test_js_to_target_is_that_of_every_pair():
    fsm = TokFSM(9, 2, 3)
    model, follows = TokenTransformer(fsm.vocab, 7), fsm.first_digits()
    parts, contexts = [model.blocks[1].mlp], fsm.contexts()
    found = js_to_target(model, fsm, swap_vectors, parts, "widest")
    pairs = [(a, b) for a in range(9) for b in range(9) if a != b]
    assert found.shape == (len(pairs),)
    for (a, b), js in zip(pairs[::10], found[::10], strict=True):
        logits = swap_vectors(model, contexts[[a]], contexts[[b]], parts, "widest")
        alone = js_divergence(logits[0].double().softmax(-1), follows[b])
        assert js.item() == pytest.approx(alone.item(), abs=1e-6)


# --- parts at any place


class Times(torch.nn.Module):
    """A part with a parameter, so that its device and its place in the model can be seen."""

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x


def test_a_part_acts_on_what_leaves_or_enters_a_place():
    model, tokens = TokenTransformer(6, 7), torch.randint(0, 6, (3, 5))
    other = copy.deepcopy(model)
    added = insert_parts(model, ["blocks.0.to_qkv"], "halved", lambda: Times(0.5))
    added |= insert_parts(model, "blocks.*.project", "twice", lambda: Times(2.0), "input")
    assert list(added) == [
        "blocks.0.to_qkv.halved",
        "blocks.0.project.twice",
        "blocks.1.project.twice",
    ]
    assert {f"{name}.factor" for name in added} <= set(dict(model.named_parameters()))
    with torch.no_grad():
        for part in (other.blocks[0].to_qkv.weight, other.blocks[0].to_qkv.bias):
            part.mul_(0.5)
        for block in other.blocks:
            block.project.weight.mul_(2.0)
        assert torch.allclose(model(tokens), other(tokens), atol=1e-6)
    twin = copy.deepcopy(model)
    twin.blocks[0].to_qkv.halved.factor.data.fill_(3.0)  # a copy has parts of its own
    assert model.blocks[0].to_qkv.halved.factor.item() == 0.5
    assert not torch.allclose(twin(tokens), model(tokens))


def test_a_part_behind_a_sequential_acts_once():
    chain = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())
    model, x = torch.nn.ModuleDict({"chain": chain}), normal(4, 3)
    before = chain(x)
    insert_parts(model, "chain", "twice", lambda: Times(2.0))
    assert torch.equal(chain(x), 2 * before)


def test_insert_parts_says_what_is_wrong(plain_python):
    model = TokenTransformer(6, 7)
    insert_parts(model, "head", "part", torch.nn.Identity)
    with pytest.raises(ValueError, match="names must be those of submodules, got 'mlp'"):
        insert_parts(model, "mlp", "part", torch.nn.Identity)
    with pytest.raises(ValueError, match="names must find places without part, got 'head'"):
        insert_parts(model, "head", "part", torch.nn.Identity)
    with pytest.raises(ValueError, match=r"the first part of 'blocks\.0\.mlp' for its input"):
        insert_parts(model, "blocks.0.mlp", "part", torch.nn.Identity, "input")
    with pytest.raises(ValueError, match="where must be one of"):
        insert_parts(model, "head", "part", torch.nn.Identity, "middle")


# --- what codes share


def test_divergence_within_is_the_mean_over_pairs_with_one_code():
    follows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    first, second = torch.cartesian_prod(torch.arange(4), torch.arange(4)).T
    apart = js_divergence(follows[first], follows[second]).view(4, 4)
    assert divergence_within(torch.tensor([3, 5, 3, 5]), follows) == pytest.approx(
        (apart[0, 2] + apart[1, 3]).item() / 2
    )
    any_two = apart[tuple(torch.triu_indices(4, 4, 1))].mean().item()
    assert divergence_within(torch.zeros(4, dtype=torch.long), follows) == pytest.approx(any_two)


def test_first_digits_are_those_of_the_successors():
    fsm = TokFSM(36, 3, 6)
    chances = fsm.first_digits()
    assert chances.shape == (36, 7) and torch.allclose(chances.sum(1), torch.ones(36).double())
    for state in (0, 17):
        digits = fsm.spelling[fsm.successors[state], 0].bincount(minlength=7)
        assert torch.allclose(chances[state], digits.double() / 3)
