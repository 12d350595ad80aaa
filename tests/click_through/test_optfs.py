"""OptFS: gates, models, search, rewinding, retraining, the pruned table, bad input."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from shuffle_nb.click_through.data import auc
from shuffle_nb.click_through.optfs import (
    Batches,
    FeatureGates,
    GatedDeepFM,
    GatedEmbedding,
    GatedFM,
    OptFS,
    compress,
    search_step,
    temperature_schedule,
)
from shuffle_nb.foundations.costs import compare_costs, peak_memory
from shuffle_nb.foundations.reference import load_reference

CARDS = (5, 4, 6)
BACKBONES = {
    "FM": lambda **options: GatedFM(CARDS, 4, **options),
    "FM, linear": lambda **options: GatedFM(CARDS, 4, linear=True, **options),
    "DeepFM": lambda **options: GatedDeepFM(CARDS, 4, (8, 5), **options),
    "DeepFM, linear": lambda **options: GatedDeepFM(CARDS, 4, (8, 5), linear=True, **options),
}
backbones = pytest.mark.parametrize("build", BACKBONES.values(), ids=BACKBONES)


def ids(rows=32, cards=CARDS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(card, (rows,), generator=generator) for card in cards], 1)


def clicks(rows=32, seed=1):
    return torch.randint(2, (rows,), generator=torch.Generator().manual_seed(seed)).float()


def some_dropped(model):
    """Drop every third id, and harden."""
    logit = model.embedding.logit
    logit.data = torch.where(torch.arange(len(logit)) % 3 == 0, -0.2, 0.3).to(logit)
    model.embedding.hard = True
    return model


def searched(build=BACKBONES["FM, linear"], **options):
    options = dict(lam=1e-3, final_temperature=20.0, search_epochs=4, lr=1e-2) | options
    method = OptFS(build(), **options)
    method.search(Batches(ids(), clicks(), batch=8))
    return method


# ---------------------------------------------------------------- gates


@pytest.mark.parametrize("init_logit", [-3.0, -0.5, 0.0, 0.5, 4.0])
@backbones
def test_at_the_start_it_is_the_plain_model(build, init_logit):
    model, x = build(init_logit=init_logit), ids()
    plain = model.head(model.embedding.weight[x + model.offsets])
    torch.testing.assert_close(model(x), plain, rtol=1e-6, atol=1e-6)
    assert model.embedding.gates().sub(1).abs().max() < 1e-6
    assert model.embedding.ratio() == (1.0 if init_logit > 0 else 0.0)


@given(st.floats(1, 1e4), st.integers(2, 30))
def test_the_temperature_grows_by_one_factor(final, epochs):
    found = temperature_schedule(final, epochs)
    assert len(found) == epochs and found[0] == 1 and found[-1] == pytest.approx(final)
    steps = [later / sooner for sooner, later in pairwise(found)]
    assert steps == pytest.approx([final ** (1 / (epochs - 1))] * (epochs - 1))


@pytest.mark.parametrize("hard", [False, True])
def test_a_pair_carries_both_gates(hard):
    table = GatedEmbedding(7, 3).double()
    table.logit.data = torch.randn(7).double()
    table.temperature, table.hard = 3.0, hard
    e, g = table(torch.arange(7)[None])[0], table.gates()
    torch.testing.assert_close(e @ e.mT, torch.outer(g, g) * (table.weight @ table.weight.mT))


@backbones
def test_a_dropped_row_may_hold_anything_and_learns_nothing(build):
    model, x = some_dropped(build()).double(), ids()
    before, dropped = model(x), ~model.embedding.kept()
    model.embedding.weight.data[dropped] = 1e6
    assert torch.equal(model(x), before)
    model(x).square().sum().backward()
    assert not model.embedding.weight.grad[dropped].any()
    assert model.embedding.weight.grad[~dropped].any()
    assert model.embedding.logit.grad is None  # the step has no gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_soft_gates_end_as_hard_ones(dtype):
    gates = FeatureGates(400).to(dtype)
    logit = torch.linspace(-1, 1, 400, dtype=dtype)
    gates.logit.data, gates.temperature = logit, 1e4
    soft, gates.hard = gates.gates(), True
    assert (soft - gates.gates()).abs()[logit.abs() > 0.01].max() < 1e-6


def test_the_penalty_and_its_gradient():
    gates = FeatureGates(50).double()
    gates.logit.data, gates.temperature = torch.randn(50).double(), 2.5
    penalty, s = gates.penalty(), (2.5 * gates.logit).sigmoid()
    assert 0 < penalty < 50
    (found,) = torch.autograd.grad(penalty, gates.logit)
    torch.testing.assert_close(found, 2.5 * s * (1 - s))
    gates.hard = True
    assert gates.penalty() == penalty  # the price is that of the soft gate


@backbones
def test_gradients_in_double_precision(build):
    model, x, y = build().double(), ids(6), clicks(6).double()
    model.embedding.logit.data = torch.randn(15).double()
    model.embedding.temperature = 1.7
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def loss(*weights):
        named = dict(zip(names, weights, strict=True))
        bce = F.binary_cross_entropy_with_logits(torch.func.functional_call(model, named, (x,)), y)
        return bce + 0.01 * (1.7 * named["embedding.logit"]).sigmoid().sum()

    assert torch.autograd.gradcheck(loss, values)


@pytest.mark.parametrize("hard", [False, True])
def test_small_and_large_tables_take_two_ways_to_one_result(hard):
    table = GatedEmbedding(15, 4).double()
    table.logit.data, table.temperature, table.hard = torch.randn(15).double(), 3.0, hard
    few = ids(4) + torch.tensor([0, 5, 9])  # 12 ids: the gates of these alone are made
    many = few.repeat(2, 1)
    found = []
    for x, share in ((few, 1.0), (many, 0.5)):
        weights = [table.weight] if hard else [table.weight, table.logit]
        e = table(x)
        gradients = torch.autograd.grad(share * e.square().sum(), weights)
        found.append([e[:4], *gradients])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_an_embedding_of_global_ids_is_that_of_the_models_table():
    model, x = GatedFM(CARDS, 4), ids()
    e = model.embedding(x + model.offsets)
    torch.testing.assert_close(model(x), 0.5 * (e.sum(1) ** 2 - (e**2).sum(1)).sum(1))
    pairs = sum((e[:, f] * e[:, g]).sum(1) for f in range(3) for g in range(f))
    torch.testing.assert_close(model(x), pairs)


def test_the_linear_column_is_a_weight_an_id_under_its_gate():
    model, x = some_dropped(GatedFM(CARDS, 4, linear=True)), ids()
    model.embedding.weight.data[:, :-1] = 0
    model.embedding.weight.data[:, -1] = torch.randn(15)
    model.bias.data.fill_(0.7)
    gated = model.embedding.gates() * model.embedding.weight[:, -1]
    torch.testing.assert_close(model(x), 0.7 + gated[x + model.offsets].sum(1))
    assert "bias" not in GatedFM(CARDS, 4).state_dict()


# ---------------------------------------------------------------- search, rewind, retrain


def test_an_id_that_is_never_seen_is_dropped():
    """The price alone moves its gate: at most lr a step, so 50 steps and more at lr 0.01."""
    x = ids(64)
    x[:, 0] %= 4  # id 4 of field 0 is never seen
    method = OptFS(GatedFM(CARDS, 4), lam=1e-3, search_epochs=8, lr=1e-2)
    history = method.search(Batches(x, clicks(64), batch=4))
    assert history[-1]["logits"][4] < 0 and not method.model.embedding.kept()[4]
    alone = GatedFM(CARDS, 4)
    loss = F.binary_cross_entropy_with_logits(alone(x), clicks(64))
    (data, price) = (
        torch.autograd.grad(value, alone.embedding.logit)[0]
        for value in (loss, alone.embedding.penalty())
    )
    assert data[4] == 0 and price[4] > 0


def test_without_a_price_and_a_signal_all_ids_stay():
    method = searched(lam=0.0)
    assert method.model.embedding.ratio() == 1


def test_a_higher_price_keeps_fewer_ids():
    kept = [searched(lam=lam, search_epochs=20).model.embedding.ratio() for lam in (0, 3e-3, 1)]
    assert kept[0] >= kept[1] >= kept[2] and kept[0] > kept[2]


@backbones
def test_rewinding_brings_the_weights_back_bit_for_bit(build):
    model, seen = build(), {}

    class Watched(Batches):
        def __iter__(self):
            seen[len(seen)] = copy.deepcopy(model.state_dict())
            return super().__iter__()

    method = OptFS(model, lam=1e-3, search_epochs=4, rewind_epoch=2, lr=1e-2)
    method.search(Watched(ids(), clicks(), batch=8))
    logits = model.embedding.logit.detach().clone()
    method.rewind()
    state = model.state_dict()
    assert state.keys() == seen[2].keys()
    for name, weight in state.items():
        assert torch.equal(weight, logits if name == "embedding.logit" else seen[2][name]), name
    assert model.embedding.hard and not model.embedding.logit.requires_grad
    assert model.embedding.temperature == 200  # as the search left it


def test_rewinding_to_the_first_epoch_is_the_lottery_ticket():
    model = BACKBONES["DeepFM"]()
    before = copy.deepcopy(model.state_dict())
    method = OptFS(model, search_epochs=3, rewind_epoch=0, lr=1e-2)
    method.search(Batches(ids(), clicks(), batch=8))
    method.rewind()
    for name, weight in model.state_dict().items():
        assert name == "embedding.logit" or torch.equal(weight, before[name])


def test_what_search_tells():
    x, y = ids(), clicks()
    model = GatedFM(CARDS, 4)
    history = OptFS(model, search_epochs=3, lr=1e-2).search([(x, y)], valid=(x, y))
    assert [one["epoch"] for one in history] == [0, 1, 2]
    assert [one["temperature"] for one in history] == temperature_schedule(200, 3)
    fresh = copy.deepcopy(model)
    assert history[-1]["valid_auc"] == auc(y, fresh(x))
    assert torch.equal(history[-1]["logits"], model.embedding.logit)
    assert history[0]["logits"].requires_grad is False
    torch.manual_seed(0)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert OptFS(model, search_epochs=2).search([(x, y)])[0]["valid_auc"] is None


def test_retraining_freezes_the_gates_and_keeps_the_best_epoch():
    method = searched()
    model, x, y = method.model, ids(64, seed=3), clicks(64, seed=4)
    logits = model.embedding.logit.detach().clone()
    method.rewind()
    scores = method.retrain(Batches(ids(), clicks(), batch=8), (x, y), max_epochs=9, patience=2)
    assert torch.equal(model.embedding.logit, logits) and model.embedding.hard
    best = scores.index(max(scores))
    assert auc(y, model(x)) == max(scores)
    assert len(scores) == 9 or len(scores) == best + 3


def test_retraining_stops_at_once_with_the_official_patience():
    method = searched()
    method.rewind()
    y = torch.tensor([1.0, 0.0])
    same = ids(1).expand(2, 3)  # the same row clicked and not: its AUC is one half for ever
    scores = method.retrain(Batches(ids(), clicks()), (same, y), max_epochs=20, patience=1)
    assert scores == [0.5, 0.5]


def test_retraining_without_rewinding_serves_the_ablations():
    method = searched()
    weights = method.model.embedding.weight.detach().clone()
    scores = OptFS(method.model, lr=1e-9).retrain(Batches(ids(), clicks()), (ids(), clicks()), 1)
    assert len(scores) == 1 and method.model.embedding.hard
    torch.testing.assert_close(method.model.embedding.weight.detach(), weights, atol=1e-6, rtol=0)


def test_fit_is_the_three_in_turn():
    torch.manual_seed(1)
    first, second = (OptFS(BACKBONES["FM"](), 1e-3, 20.0, 4, lr=1e-2) for _ in range(2))
    second.model.load_state_dict(first.model.state_dict())
    valid = (ids(seed=5), clicks(seed=6))
    found = first.fit(Batches(ids(), clicks(), 8), valid, max_epochs=4, patience=2)
    batches = Batches(ids(), clicks(), 8)
    second.search(batches)
    second.rewind()
    assert found["retrain"] == second.retrain(batches, valid, 4, 2)
    assert len(found["search"]) == 4 and found["search"] is first.history
    for name, weight in second.model.state_dict().items():
        assert torch.equal(weight, first.model.state_dict()[name])


def test_decay_is_for_the_weights_only():
    """With no signal (the clicks are half and half on every id) the logits feel the price alone."""
    x, y = ids(1).expand(2, 3), torch.tensor([0.0, 1.0])
    ends = []
    for decay in (0.0, 0.1):
        torch.manual_seed(2)
        model = GatedFM(CARDS, 4)
        model.embedding.weight.data.mul_(0.0)
        method = OptFS(model, lam=1e-3, search_epochs=3, lr=1e-2, weight_decay=decay)
        ends.append(method.search([(x, y)])[-1]["logits"])
    assert torch.equal(*ends)


def test_batches_hold_every_row_once_an_epoch_in_a_new_order():
    batches = Batches(torch.arange(20)[:, None], torch.arange(20.0), batch=8, seed=3)
    epochs = [list(batches), list(batches)]
    for epoch in epochs:
        assert [len(y) for _, y in epoch] == [8, 8, 4]
        assert all(torch.equal(x[:, 0].float(), y) for x, y in epoch)
        assert torch.cat([y for _, y in epoch]).sort()[0].tolist() == list(range(20))
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])
    again = next(iter(Batches(torch.arange(20)[:, None], torch.arange(20.0), batch=8, seed=3)))
    assert torch.equal(again[1], epochs[0][0][1])


def test_a_backbone_of_the_users_own():
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = GatedEmbedding(15, 1)
            self.norm = torch.nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(self.embedding(x).sum(1)).squeeze(1)

    method = OptFS(Sum(), lam=1e-3, search_epochs=3, lr=1e-2)
    x = ids() + torch.tensor([0, 5, 9])
    found = method.fit(Batches(x, clicks(), 8), (x, clicks()), max_epochs=2)
    assert len(found["retrain"]) == 2 or found["retrain"][1] <= found["retrain"][0]
    small, _ = compress(method.model)
    assert torch.equal(small.eval()(x), method.model.eval()(x))


# ---------------------------------------------------------------- the pruned table


@backbones
def test_compressing_changes_nothing_but_the_size(build):
    model, x = some_dropped(build()), ids()
    small, remap = compress(model)
    kept, k = int(model.embedding.kept().sum()), model.embedding.weight.shape[1]
    torch.testing.assert_close(small(x), model(x), rtol=0, atol=1e-6)
    assert small.embedding.weight.shape == (kept + 1, k)
    assert remap.dtype == torch.int64 and remap.shape == (15,)
    assert (remap[~model.embedding.kept()] == kept).all()
    assert torch.equal(remap[model.embedding.kept()], torch.arange(kept))
    assert not small.embedding.weight[kept].any()
    of = [sum(p.numel() for p in m.parameters()) for m in (model, small)]
    assert of[0] - of[1] == 15 * k + 15 - (kept + 1) * k
    small.embedding.weight.data.fill_(3)
    assert not torch.equal(small(x), model(x))  # no memory is shared


@pytest.mark.parametrize("logit", [0.5, -0.5], ids=["all kept", "none kept"])
def test_compressing_all_or_nothing(logit):
    model = GatedFM(CARDS, 4)
    model.embedding.logit.data.fill_(logit)
    model.embedding.hard = True
    small, remap = compress(model)
    assert torch.equal(small(ids()), model(ids()))
    assert len(small.embedding.weight) == (16 if logit > 0 else 1)
    assert remap.tolist() == (list(range(15)) if logit > 0 else [0] * 15)


def test_the_zeros_stay_zero_when_the_small_table_is_trained():
    small, _ = compress(some_dropped(GatedFM(CARDS, 4, linear=True)))
    optimizer = torch.optim.Adam(small.parameters(), lr=0.1, weight_decay=0.1)
    before = small.embedding.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(small(ids()), clicks()).backward()
        optimizer.step()
    assert not small.embedding.weight[-1].any()
    assert not torch.equal(small.embedding.weight, before)
    copied = pickle.loads(pickle.dumps(small))
    assert torch.equal(copied(ids()), small(ids()))
    assert torch.equal(copy.deepcopy(small)(ids()), small(ids()))


# ---------------------------------------------------------------- types, sizes, layouts, devices


@backbones
def test_empty_single_and_transposed_batches(build):
    model, x = build(), ids()
    whole = model(x)
    assert model(x[:0]).shape == (0,)
    torch.testing.assert_close(model(x[:1]), whole[:1])
    apart = x.mT.contiguous().mT
    assert not apart.is_contiguous()
    assert torch.equal(model(apart), whole)
    assert torch.equal(model(x.int()), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hard", [False, True])
@backbones
def test_half_precision(build, hard, dtype):
    model, x = some_dropped(build()), ids()
    model.embedding.hard = hard
    expected = model(x)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)
    model = model.to(dtype)
    found = model(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
    small = compress(model)[0] if hard else model
    assert small(x).dtype == dtype


def test_nan_in_a_row_reaches_only_who_looks_it_up():
    model, x = GatedFM(CARDS, 4), ids()
    model.embedding.weight.data[0] = math.nan
    assert torch.equal(model(x).isnan(), x[:, 0] == 0)


def test_a_loss_that_is_not_finite_is_told():
    model = GatedFM(CARDS, 4)
    model.embedding.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan; try a smaller lr"):
        OptFS(model, search_epochs=2).search([(ids(), clicks())])


@backbones
def test_it_compiles_to_one_graph_that_survives_the_schedule(build, plain_python):
    model, x = build(), ids()
    compiled = torch.compile(model, fullgraph=True)
    for temperature in temperature_schedule(200, 12):
        model.embedding.temperature = temperature
        torch.testing.assert_close(compiled(x), model(x))
    model.embedding.hard = True
    torch.testing.assert_close(compiled(x), model(x))
    small, _ = compress(model)
    torch.testing.assert_close(torch.compile(small, fullgraph=True)(x), model(x))


def test_the_state_dict_holds_weights_and_logits_only():
    model = some_dropped(GatedFM(CARDS, 4, linear=True))
    assert set(model.state_dict()) == {"bias", "embedding.logit", "embedding.weight"}
    fresh = GatedFM(CARDS, 4, linear=True)
    fresh.load_state_dict(model.state_dict())
    fresh.embedding.hard = True
    assert torch.equal(fresh(ids()), model(ids()))


# ---------------------------------------------------------------- costs


def as_all_gates_first(model, x):
    """The plain way: gate every row of the table, then look up."""
    rows = model.embedding.gates()[:, None] * model.embedding.weight
    return model.head(F.embedding(x + model.offsets, rows))


@pytest.mark.parametrize("card", [100, 20_000])
def test_looking_up_first_costs_no_more_than_gating_the_table(card, plain_python):
    cards = (card,) * 5
    model, x = GatedFM(cards, 8), ids(512, cards)
    ways = {"table": lambda x: as_all_gates_first(model, x), "ours": model}
    torch.testing.assert_close(model(x), as_all_gates_first(model, x))
    for backward in (False, True):
        costs = compare_costs(ways, x, backward=backward, min_seconds=0.05)
        assert sorted(costs.ratios("table", to="ours"))[4] > 0.7
        memory = [peak_memory(way, x, backward=backward) for way in ways.values()]
        assert memory[1] < 1.1 * memory[0] + 200_000


# ---------------------------------------------------------------- bad input

BAD = {
    "final_temperature must be 1 or more and finite, got 0.5": dict(final_temperature=0.5),
    "final_temperature must be 1 or more and finite, got nan": dict(final_temperature=math.nan),
    "search_epochs must be in 2..1000000000, got 1": dict(search_epochs=1),
    "rewind_epoch must be in 0..4, got 5": dict(search_epochs=5, rewind_epoch=5),
    "rewind_epoch must be in 0..19, got -1": dict(rewind_epoch=-1),
    "lam must be 0 or more and finite, got -1": dict(lam=-1.0),
    "weight_decay must be 0 or more and finite, got inf": dict(weight_decay=math.inf),
    "lr must be positive and finite, got 0": dict(lr=0.0),
}


@pytest.mark.parametrize(("message", "options"), BAD.items(), ids=BAD)
def test_settings_out_of_range_are_refused(message, options, plain_python):
    with pytest.raises(ValueError, match=message):
        OptFS(GatedFM(CARDS, 4), **options)


def test_sizes_out_of_range_are_refused(plain_python):
    for message, make in {
        "num_features must be at least 1, got 0": lambda: GatedEmbedding(0, 3),
        "dim must be at least 1, got 0": lambda: GatedEmbedding(3, 0),
        "init_logit must be in -30..30, got nan": lambda: FeatureGates(3, math.nan),
        r"cards\[1\] must be at least 1, got 0": lambda: GatedFM((3, 0)),
        "cards must hold a field or more, got none": lambda: GatedFM(()),
        r"sizes\[1\] must be at least 1, got 0": lambda: GatedDeepFM(CARDS, 4, (0,)),
        "model must hold a GatedEmbedding as embedding": lambda: OptFS(torch.nn.Linear(2, 1)),
        "batch must be at least 1, got 0": lambda: Batches(ids(), clicks(), batch=0),
        "rows must be at least 1, got 0": lambda: Batches(ids()[:0], clicks()[:0]),
        r"y must be \(32\), got shape \(31,\)": lambda: Batches(ids(), clicks(31)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("wrong", [-1, 6])
def test_ids_out_of_range_are_refused(wrong):
    x = ids()
    x[3, 2] = wrong
    small, _ = compress(some_dropped(GatedFM(CARDS, 4)))
    for model in (GatedFM(CARDS, 4), small):
        with pytest.raises(ValueError, match=rf"field 2: id {wrong} out of range \[0, 6\)"):
            model(x)
    with pytest.raises(ValueError, match=r"ids must be in 0\.\.14"):
        GatedEmbedding(15, 4)(torch.tensor([[0, 15]]))


def test_other_shapes_and_types_are_refused(plain_python):
    with pytest.raises(ValueError, match=r"x must be \(batch, 3\), got shape \(32, 2\)"):
        GatedFM(CARDS, 4)(ids()[:, :2])
    with pytest.raises(ValueError, match=r"x must be whole numbers, got torch\.float32"):
        GatedFM(CARDS, 4)(ids().float())


def test_steps_in_the_wrong_order_are_refused():
    model = GatedFM(CARDS, 4)
    method = OptFS(model)
    with pytest.raises(RuntimeError, match="call search first"):
        method.rewind()
    with pytest.raises(RuntimeError, match="compress needs hard gates"):
        compress(model)
    with pytest.raises(RuntimeError, match="compress needs hard gates"):
        compress(compress(some_dropped(model))[0])
    with pytest.raises(ValueError, match="valid must hold clicks and no clicks"):
        method.retrain([(ids(), clicks())], (ids(), torch.ones(32)))
    once = iter([(ids(), clicks())])
    with pytest.raises(ValueError, match="batches must give a batch or more each time"):
        method.search(once)
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        method.retrain([(ids(), clicks())], (ids(), clicks()), patience=0)


def test_a_step_returns_the_loss_without_the_price():
    model = GatedFM(CARDS, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    expected = F.binary_cross_entropy_with_logits(model(ids()), clicks())
    found = search_step(model, optimizer, ids(), clicks(), lam=1.0)
    assert found == expected.detach() and not found.requires_grad


# ---------------------------------------------------------------- the authors' own numbers


class Watched:
    """Batches that note the loss of each before it is trained on."""

    def __init__(self, model, batches):
        self.model, self.batches, self.losses = model, batches, []

    def __iter__(self):
        for x, y in self.batches:
            with torch.no_grad():
                loss = F.binary_cross_entropy_with_logits(self.model(x), y)
            self.losses.append(loss.item())
            yield x, y


def one_pass(case, model):
    gates = model.embedding
    gates.hard, gates.temperature = case.settings["hard"], case.settings.get("temperature", 1.0)
    gates.weight.data, gates.logit.data = case.tensors["E"].clone(), case.tensors["c"].clone()
    logits = model(case.tensors["ids"] - model.offsets)
    logits.square().sum().backward()
    found = {"logits": logits, "gates": gates.gates()}
    return found | {"gradient of sum(logits**2) w.r.t. E": gates.weight.grad}


def soft_fm(case):
    s = case.settings
    model = GatedFM((3, 3, 3), s["embedding_dim"], init_logit=s["init_logit"]).double()
    found = one_pass(case, model)
    gates = model.embedding
    (price,) = torch.autograd.grad(gates.penalty(), gates.logit)
    found |= {"penalty": gates.penalty().reshape(1), "gradient of the penalty w.r.t. c": price}
    return found | {"gradient of sum(logits**2) w.r.t. c": gates.logit.grad}


def hard_deepfm(case):
    s, t = case.settings, case.tensors
    model = GatedDeepFM((3, 3, 3), s["embedding_dim"], s["hidden"], s["init_logit"]).double()
    linears = [layer for layer in model.mlp if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(linears):
        layer.weight.data, layer.bias.data = t[f"M{i}"].clone(), t[f"m{i}"].clone()
    found = one_pass(case, model)
    found["gradient of sum(logits**2) w.r.t. M0"] = linears[0].weight.grad
    found["kept (1 yes, 0 no)"] = model.embedding.kept().long()
    return found | {"kept ratio": torch.tensor([model.embedding.ratio()])}


def whole_method(case):
    s, t = case.settings, case.tensors
    model = GatedFM((3, 3, 3), s["embedding_dim"], init_logit=s["init_logit"]).double()
    model.embedding.weight.data = t["E"].clone()
    names = ("lam", "final_temperature", "search_epochs", "rewind_epoch", "lr", "weight_decay")
    method = OptFS(model, **{name: s[name] for name in names})
    batches = [(t[f"batch_{i}_ids"] - model.offsets, t[f"batch_{i}_y"].double()) for i in (0, 1)]
    valid = (t["valid_ids"] - model.offsets, t["valid_y"].double())
    searching, retraining = Watched(model, batches), Watched(model, batches)
    history = method.search(searching)
    found = {
        "temperature of each search epoch": torch.tensor([one["temperature"] for one in history]),
        "BCE before each search step, penalty left out": torch.tensor(searching.losses),
        "gate logits after the search": model.embedding.logit.detach().clone(),
        "E after the search": model.embedding.weight.detach().clone(),
        "kept after the search (1 yes, 0 no)": model.embedding.kept().long(),
    }
    assert history[0]["loss"] == pytest.approx(sum(searching.losses[:2]) / 2)
    method.rewind()
    found["E at the rewind point"] = model.embedding.weight.detach().clone()
    scores = method.retrain(retraining, valid, s["max_epochs"], s["patience"])
    found["BCE before each retraining step"] = torch.tensor(retraining.losses)
    found["valid AUC of each retraining epoch"] = torch.tensor(scores, dtype=torch.float64)
    found["E at the end"] = model.embedding.weight
    return found | {"logits of the valid rows at the end": model(valid[0])}


RECOMPUTE = {
    "FM, soft gates at temperature 2.5": soft_fm,
    "DeepFM, hard gates": hard_deepfm,
    "FM: search, rewind, retrain with Adam": whole_method,
}


@pytest.mark.parametrize("case", [*load_reference("optfs")], ids=lambda case: case.name)
def test_against_the_authors_code(case, agree):
    agree(case, RECOMPUTE[case.name](case))
