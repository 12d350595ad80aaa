"""What the click-through family shares: planted data, scores, rivals, one trainer, real sets."""

import copy
import sys

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

from shuffle_nb.click_through.data import (
    CrossNetworkV1,
    CTRData,
    FactorizationMachine,
    JointEmbedding,
    LogisticRegression,
    PlainMLP,
    auc,
    check_ids,
    dense_parameters,
    epoch_batches,
    fit_ctr,
    fit_ctr_arms,
    gauc,
    load_ctr,
    logloss,
    mlp,
    offsets_of,
    pair_auc,
    pair_excess,
    pair_products,
    part_auc,
    planted_ctr,
    planted_pairs,
    rela_impr,
    table_ctr,
)

SMALL = {"n": 800, "cards": (6, 5, 4), "pairs": ((0, 1),), "triples": ((0, 1, 2),)}
SEQUENCES = {"seq_len": 6, "seq_types": 2, "topics": 3}
MODELS = (LogisticRegression, FactorizationMachine, CrossNetworkV1, PlainMLP)


# Planted data --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "ids", "clicks", "ceiling"),
    [(0, 1_474_812, 4_050, 0.898), (1, 1_462_871, 3_966, 0.896), (2, 1_414_691, 4_016, 0.888)],
)
def test_a_seed_gives_the_same_data_everywhere(seed, ids, clicks, ceiling):
    data = planted_ctr(seed=seed)
    assert (data.x.sum().item(), data.y.sum().item()) == (ids, clicks)
    test = data.split()[2]
    assert auc(test.y, test.logit) == pytest.approx(ceiling, abs=5e-4)


def test_types_and_shapes():
    data = planted_ctr(**SMALL, **SEQUENCES, second_task={})
    assert data.x.dtype == data.seq.dtype == torch.int64 and data.y.dtype == torch.float32
    assert data.logit.dtype == data.hit.dtype == torch.float64
    assert data.x.shape == (800, 3) and data.y.shape == data.logit.shape == (800, 2)
    assert data.seq.shape == (800, 2, 6) and data.hit.shape == (800, 2)
    assert data.offsets.tolist() == [0, 6, 11] and data.offsets.dtype == torch.int64
    assert all(mask.dtype == bool for mask in data.useful)
    assert planted_ctr(**SMALL).seq is None and planted_ctr(**SMALL).hit is None


@given(st.integers(0, 1000), st.floats(0.02, 0.98))
def test_the_share_of_clicks_is_the_one_asked_for(seed, ctr):
    data = planted_ctr(**SMALL, ctr=ctr, seed=seed)
    assert data.logit.sigmoid().mean().item() == pytest.approx(ctr, abs=1e-9)
    assert all((c >= 0).all() and (c < v).all() for c, v in zip(data.x.T, data.cards, strict=True))


@pytest.mark.parametrize("weight", ["w1", "w2", "w3"])
def test_a_weight_is_the_spread_of_its_term(weight):
    data = planted_ctr(**SMALL, **{"w1": 0, "w2": 0, "w3": 0, weight: 1.7})
    assert data.logit.std(unbiased=False).item() == pytest.approx(1.7)


def test_pairs_are_products_of_signs():
    data = planted_ctr(**SMALL, w1=0, w3=0, w2=1.0)
    table = torch.zeros(6, 5, dtype=torch.float64)
    table[data.x[:, 0], data.x[:, 1]] = data.logit[:, 0]
    relative = (table - data.logit.mean()).sign()
    assert table.unique().numel() == 2 and torch.linalg.matrix_rank(relative) == 1


def test_frequencies_have_a_long_tail_that_ids_do_not_tell():
    data = planted_ctr(n=20_000, cards=(50, 50), pairs=(), triples=(), zipf_a=1.0)
    counts = [column.bincount(minlength=50) for column in data.x.T]
    for count in counts:
        ranked = count.sort(descending=True).values.double()
        assert ranked[0] / ranked[9] == pytest.approx(10, rel=0.25)
    assert not torch.equal(counts[0].argsort(), counts[1].argsort())


def test_useless_ids_move_nothing():
    noisy = {"w1": 1.0, "noise_ids": 0.5, "noise_fields": (2,), "seed": 3}
    data = planted_ctr(**SMALL | {"triples": ()}, **noisy)
    assert not data.useful[2].any() and 0 < data.useful[0].sum() < 6
    useless = ~torch.from_numpy(data.useful[0])[data.x[:, 0]]
    useless &= ~torch.from_numpy(data.useful[1])[data.x[:, 1]]
    assert useless.sum() > 10 and data.logit[useless].unique().numel() == 1


def test_without_a_useful_id_the_logit_is_flat():
    assert planted_ctr(**SMALL, noise_ids=1.0).logit.unique().numel() == 1


def test_normal_latents_are_no_signs():
    drawn = {"w1": 0, "w3": 0, "latent": "normal"}
    assert planted_ctr(**SMALL, **drawn).logit.unique().numel() == 30


def test_sequences_pad_at_the_end_and_hit_their_topic():
    data = planted_ctr(
        **SMALL, **SEQUENCES, w1=0, w2=0, w3=0, w_seq=2.0, second_task={"w_seq": 1.0}
    )
    valid = data.seq > 0
    assert (valid[..., :-1] >= valid[..., 1:]).all() and data.seq.max() <= 5
    assert valid.sum(-1).min() >= 2 and valid.sum(-1).max() == 6
    for column, hit in ((0, 0), (1, 1)):  # each task follows its own sequence
        both = torch.stack([data.logit[:, column], data.hit[:, hit]])
        assert torch.corrcoef(both)[0, 1] > (0.999 if column == 0 else 0.3)
    seen = {}
    for target, row, hits in zip(data.x[:, 1].tolist(), data.seq, data.hit, strict=True):
        for kind in range(2):
            items = row[kind][row[kind] > 0] - 1
            if (items == target).all():  # an item is on its own topic
                assert hits[kind] == 1
                seen[target] = True
    assert seen


def test_a_row_without_a_step_hits_nothing():
    data = planted_ctr(**SMALL, seq_len=1)
    empty = data.seq[:, 0, 0] == 0
    assert empty.any() and (data.hit[empty] == 0).all()


def test_a_sequence_without_weight_changes_no_click_but_its_own_draws():
    plain, drawn = planted_ctr(**SMALL), planted_ctr(**SMALL, **SEQUENCES)
    assert torch.equal(plain.x, drawn.x) and torch.equal(plain.logit, drawn.logit)


def test_the_second_task_has_latents_of_its_own():
    crosses = {"pairs": ((0, 1),), "triples": ((0, 1, 2),)}
    one, two = planted_ctr(**SMALL), planted_ctr(**SMALL, second_task=crosses)
    assert torch.equal(one.logit, two.logit[:, :1])
    assert torch.corrcoef(two.logit.T)[0, 1].abs() < 0.9
    assert two.logit.sigmoid().mean(0) == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pairs": ((0, 3),)}, r"pairs must name 2 different fields of 0\.\.2 each, got \(0, 3\)"),
        ({"pairs": ((1, 1),)}, "pairs must name 2 different"),
        ({"pairs": ((0, 1, 2),)}, "pairs must name 2 different"),
        ({"triples": ((0, 1, -1),)}, "triples must name 3 different"),
        ({"ctr": 0.0}, "ctr must be between 0 and 1, got 0"),
        ({"ctr": float("nan")}, "ctr must be between 0 and 1, got nan"),
        ({"cards": (6, 1, 4)}, r"cards must hold fields of two ids or more, got \(6, 1, 4\)"),
        ({"cards": (6,), "pairs": (), "triples": (), "seq_len": 3}, "two fields for a sequence"),
        ({"w_seq": 1.0}, "w_seq must be 0 without a sequence, got 1"),
        ({"noise_ids": 1.5}, "noise_ids must be in"),
        ({"noise_fields": (3,)}, r"noise_fields must be in 0\.\.2, got 3"),
        ({"latent": "sing"}, "did you mean 'sign'"),
        ({"n": 0}, "n must be at least 1"),
        ({"second_task": {"w4": 1.0}}, "second_task's key must be one of"),
        ({"second_task": {"ctr": 2.0}}, "second_task's ctr must be between 0 and 1, got 2"),
        ({"second_task": {"pairs": ((0, 9),)}}, "second_task's pairs must name 2"),
        ({"second_task": {"w_seq": 1.0}}, "second_task's w_seq must be 0"),
    ],
)
def test_data_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        planted_ctr(**SMALL | wrong)


def test_a_split_cuts_every_column():
    data = planted_ctr(**SMALL, **SEQUENCES)
    parts = data.split(0.5, 0.25)
    assert [len(part.x) for part in parts] == [400, 200, 200]
    for name in ("x", "y", "logit", "seq", "hit"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(data, name))
    assert parts[2].cards == data.cards and parts[1].useful is data.useful


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.9, 0.1), (0.0, 0.5)])
def test_a_part_without_rows(shares):
    with pytest.raises(ValueError, match="must leave a row or more to each part"):
        planted_ctr(**SMALL).split(*shares)


def test_data_that_came_split_stays_so():
    data = copy.copy(planted_ctr(**SMALL))
    data.parts = (500, 100, 200)
    assert [len(part.x) for part in data.split(0.1, 0.1)] == [500, 100, 200]


# Scores --------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=2, max_size=60))
def test_auc_is_scikit_learns(rows):
    y, score = (np.array(column, float) for column in zip(*rows, strict=True))
    if len(set(y)) == 1:
        assert np.isnan(auc(y, score))
    else:
        assert auc(y, score) == pytest.approx(roc_auc_score(y, score), abs=1e-12)
        assert auc(y, -score) == pytest.approx(1 - auc(y, score), abs=1e-12)


def test_auc_takes_any_shape_and_type():
    y, score = torch.tensor([[0.0], [1.0], [1.0]]), torch.tensor([0.1, 0.9, 0.05]).bfloat16()
    assert auc(y, score) == auc([0, 1, 1], [0.1, 0.9, 0.05]) == 0.5
    assert np.isnan(auc(y, torch.tensor([0.1, float("nan"), 0.2])))


def test_group_auc_weighs_by_size_and_skips_one_class():
    y = [0, 1, 0, 1, 1, 1, 1]
    score = [0.1, 0.2, 0.9, 0.1, 0.5, 0.3, 0.2]
    group = [5, 5, 2, 2, 2, 7, 7]  # 1, 0 and no AUC
    assert gauc(y, score, group) == pytest.approx((1 * 2 + 0 * 3) / 5)
    assert np.isnan(gauc([1, 1], [0.1, 0.2], [0, 0]))


def test_log_loss_is_clipped_cross_entropy():
    y, prob = [0, 1, 1], [0.2, 0.7, 0.1]
    assert logloss(y, prob) == pytest.approx(log_loss(y, prob))
    assert logloss([1], [0.0]) == pytest.approx(-np.log(1e-7))


def test_relative_improvement_counts_from_guessing():
    assert rela_impr(0.75, 0.6) == pytest.approx(1.5) and rela_impr(0.7, 0.7) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([0, 1], [0.1]), "y and score must be of one size, got 2 and 1"),
        (lambda: auc([0, 2], [0.1, 0.2]), "y must hold 0 and 1 only"),
        (lambda: gauc([0, 1], [0.1, 0.2], [1]), "must be of one size, got 2, 2 and 1"),
        (lambda: logloss([0, 1], [0.1]), "y and prob must be of one size"),
        (lambda: logloss([0, 1], [0.1, 1.5]), "prob must be in"),
    ],
)
def test_scores_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_counting_finds_pairs_and_their_truth_is_known():
    data = planted_ctr(n=60_000, triples=(), w1=0.3)
    truth, excess = planted_pairs(data), pair_excess(data)
    assert truth.sum() == 6 and all(truth[pair] == 1 for pair in data.pairs)
    assert torch.equal(truth, truth.T) and torch.equal(excess, excess.T)
    assert pair_auc(excess, data) == 1 and pair_auc(-excess, data) == 0
    unplanted = excess[(truth == 0) & ~torch.eye(8, dtype=torch.bool)]
    assert unplanted.abs().mean() < 3 < 20 < excess[truth == 1].min()
    assert planted_pairs(planted_ctr()).sum() == 2 * (3 + 6)


# What the models share -----------------------------------------------------------------------


def test_ids_are_looked_up_in_the_field_they_stand_in():
    embed = JointEmbedding((3, 2), 4)
    x = torch.tensor([[2, 0], [0, 1]])
    assert embed(x).shape == (2, 2, 4)
    assert torch.equal(embed(x)[0, 1], embed.embedding.weight[3])
    assert list(embed.state_dict()) == ["embedding.weight"]
    assert embed(x[:0]).shape == (0, 2, 4) and embed(x[:1]).shape == (1, 2, 4)
    assert torch.equal(embed(x.T.contiguous().T), embed(x))
    assert JointEmbedding((1000, 1000), 8).embedding.weight.std().item() == pytest.approx(
        0.05, 0.05
    )


@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([[0, 2]], r"field 1: id 2 out of range \[0, 2\)"),
        ([[-1, 0]], r"field 0: id -1 out of range \[0, 3\)"),
        ([[0, 0, 0]], r"x must be \(batch, 2\), got shape \(1, 3\)"),
        ([0, 0], r"x must be \(batch, 2\)"),
        ([[0.0, 1.0]], "x must be whole numbers"),
    ],
)
@pytest.mark.parametrize("model", [lambda cards: JointEmbedding(cards, 2), *MODELS])
def test_bad_ids(plain_python, model, x, message):
    with pytest.raises(ValueError, match=message):
        model((3, 2))(torch.tensor(x))


def test_ids_are_not_read_while_a_graph_is_compiled(plain_python):
    check_ids(torch.zeros(0, 2, dtype=torch.long), (3, 2))
    embed = JointEmbedding((3, 2), 4)
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    x = torch.tensor([[2, 1], [0, 0]])
    assert torch.equal(compiled(x), embed(x))


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
def test_layers_of_an_mlp(norm):
    layers = mlp([4, 8, 8, 1], norm=norm, dropout=0.1)
    per_hidden = 3 if norm is None else 4
    assert len(layers) == 2 * per_hidden + 1 and isinstance(layers[-1], nn.Linear)
    assert isinstance(mlp([4, 8], last_activation=True)[-1], nn.ReLU)
    assert not layers[0].bias.any()
    std = mlp([200, 300, 1])[0].weight.std().item()
    assert std == pytest.approx((2 / 200) ** 0.5, rel=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mlp([4]), r"len\(sizes\) must be in 2"),
        (lambda: mlp([4, 0, 1]), r"sizes\[1\] must be at least 1, got 0"),
        (lambda: mlp([4, 1], norm="bath"), "did you mean 'batch'"),
        (lambda: mlp([4, 1], dropout=1.5), "dropout must be in"),
        (lambda: JointEmbedding((3, 0), 2), "cards must hold an id or more a field"),
        (lambda: JointEmbedding((3,), 0), "embedding_dim must be at least 1"),
        (lambda: CrossNetworkV1((3,), num_layers=0), "num_layers must be at least 1"),
    ],
)
def test_models_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("model", MODELS)
def test_rivals_give_one_logit_a_row(model):
    net, x = model((3, 2, 4)).double(), torch.tensor([[2, 1, 3], [0, 0, 1], [1, 1, 0]])
    logits = net(x)
    assert logits.shape == (3,) and logits.dtype == torch.float64
    assert net(x[:1]).shape == (1,) and net(x[:0]).shape == (0,)
    assert torch.allclose(torch.cat([net(x[:1]), net(x[1:])]), logits)
    logits.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_a_factorization_machine_sums_the_pairs():
    net, x = FactorizationMachine((3, 2, 4), k=5).double(), torch.tensor([[2, 1, 3]])
    (v,) = net.factors(x)
    expected = sum(v[i] @ v[j] for i in range(3) for j in range(i))
    assert net(x).item() == pytest.approx(expected.item(), abs=1e-12)


def test_parameters_outside_of_tables():
    counts = [dense_parameters(model((40, 40, 30, 30, 20, 20, 10, 10))) for model in MODELS]
    assert counts == [1, 1, 449, 8385]


# One trainer ---------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_goes_through_all_rows_once(rows, batch, seed):
    batches = epoch_batches(torch.arange(rows), batch=batch, seed=seed)
    per_epoch = -(-rows // batch)
    steps = range(3 * per_epoch)
    found = [batches(step)[0] for step in steps]
    assert all(torch.equal(found[step], batches(step)[0]) for step in reversed(steps))
    generator = torch.Generator().manual_seed(seed)
    expected = torch.cat([torch.randperm(rows, generator=generator) for _ in range(3)])
    assert torch.equal(torch.cat(found), expected)


def test_the_trainer_keeps_the_first_best_epoch():
    data = planted_ctr(**SMALL)
    torch.manual_seed(0)
    model = PlainMLP(data.cards)
    found = fit_ctr(model, data, epochs=6, batch=100, device="cpu")
    scores = [score for _, score in found["history"].evaluations]
    best = max(scores, key=lambda score: score["valid_auc"])
    assert [step for step, _ in found["history"].evaluations] == [6, 12, 18, 24, 30, 36]
    assert (found["valid_auc"], found["test_auc"]) == (best["valid_auc"], best["test_auc"])
    assert part_auc(model, data.split()[2]) == found["test_auc"]
    assert found["seconds"] > 0


def test_the_trainer_is_plain_adam_on_the_first_task():
    data = planted_ctr(**SMALL, second_task={})
    train = data.split()[0]
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(PlainMLP(data.cards, 4, (8,)))
    fit_ctr(models[0], data, epochs=1, seed=5, batch=256, weight_decay=1e-3, device="cpu")
    adam = torch.optim.Adam(models[1].parameters(), lr=1e-2, weight_decay=1e-3)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(5))
    for rows in order.split(256):
        loss = nn.functional.binary_cross_entropy_with_logits(
            models[1](train.x[rows]), train.y[rows, 0]
        )
        adam.zero_grad()
        loss.backward()
        adam.step()
    for ours, plain in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=1e-5)


def test_every_arm_meets_every_seed():
    def build(cards):
        return PlainMLP(cards, 4, (8,))

    options = {"epochs": 2, "device": "cpu"}
    arms = fit_ctr_arms(
        {"mlp": build, "longer": (build, {"epochs": 3}), "lr": LogisticRegression},
        [3, 4],
        data=lambda seed: planted_ctr(**SMALL, seed=seed),
        **options,
    )
    assert list(arms) == ["mlp", "longer", "lr"]
    assert [len(run.history.evaluations) for run in arms["longer"]] == [3, 3]
    assert [run.seed for run in arms["mlp"]] == [3, 4] and len(arms.scores("lr")) == 2
    data = planted_ctr(**SMALL, seed=4)
    torch.manual_seed(4)
    assert fit_ctr(build(data.cards), data, seed=4, **options)["test_auc"] == arms.scores("mlp")[1]
    test = data.split()[2]
    assert arms.bayes[1] == auc(test.y, test.logit)
    run = arms["mlp"][0]
    assert run.parameters == 12 * 8 + 8 + 9 and run.flops == 2 * (12 * 8 + 8)
    assert "the true logit" in str(arms) and "test AUC, seeds 3, 4" in arms._repr_html_()
    with pytest.raises(ValueError, match="did you mean 'mlp'"):
        arms.scores("mpl")


@pytest.mark.parametrize(
    ("arms", "seeds", "options", "message"),
    [
        ({}, [0], {}, "at least one arm"),
        ({"lr": LogisticRegression}, [], {}, "one or more different numbers"),
        ({"lr": LogisticRegression}, [1, 1], {}, "one or more different numbers"),
        ({"lr": LogisticRegression}, [1], {"seed": 2}, "must not hold 'seed'"),
        ({"lr": LogisticRegression}, [1], {"epochs": 0}, "epochs must be at least 1"),
    ],
)
def test_experiments_that_cannot_be(arms, seeds, options, message):
    with pytest.raises(ValueError, match=message):
        fit_ctr_arms(arms, seeds, data=lambda seed: planted_ctr(**SMALL), **options)


def test_the_set_ups_rivals_stand_where_they_stood():
    """Logistic regression reads the main effects only; the ceiling is far above it."""
    arms = fit_ctr_arms({"lr": LogisticRegression, "mlp": PlainMLP}, [0], device="cpu")
    assert 0.56 < arms.scores("lr")[0] < 0.66 < 0.75 < arms.scores("mlp")[0] < arms.bayes[0]
    assert isinstance(arms.data[0], CTRData)


# Real sets -----------------------------------------------------------------------------------

ROWS = {"train": 60, "valid": 12, "test": 8}


def write_csv(folder, make):
    for name, count in ROWS.items():
        make(count, name).to_csv(folder / f"{name}.csv", index=False)
    return folder


@pytest.fixture
def frappe(tmp_path):
    def rows(count, part):
        columns = {"label": np.arange(count) % 3 == 0, "user": np.arange(count) % 5}
        columns |= {"item": [f"app {i % 7}" for i in range(count)]}
        if part == "test":
            columns["user"] = np.arange(count) + 3
        return pandas.DataFrame(columns).astype({"label": int})

    return write_csv(tmp_path, rows)


def test_a_public_set_is_read_from_a_folder_in_the_same_format(frappe):
    data = load_ctr("frappe", folder=frappe)
    train, valid, test = data.split(0.1, 0.1)
    assert [len(part.x) for part in (train, valid, test)] == list(ROWS.values())
    assert data.names == ("user", "item") and data.cards == (6, 8)
    assert data.y.shape == (80, 1) and data.y.dtype == torch.float32
    assert train.x.min() == 1  # 0 stands for what the training part never held
    assert (test.x[:, 0] == 0).tolist() == [user > 4 for user in range(3, 11)]
    assert torch.equal(train.x[:12], valid.x)
    assert len(load_ctr("frappe", folder=frappe, max_rows=10).x) == 28
    found = fit_ctr(LogisticRegression(data.cards), data, epochs=1, device="cpu")
    assert 0 <= found["test_auc"] <= 1


def test_rare_ids_share_one(frappe):
    data = load_ctr("frappe", folder=frappe, min_count=9)
    assert data.cards == (6, 5) and (data.x[:60, 1] == 0).sum() == 24  # 3 of 7 apps come 8 times


@pytest.mark.parametrize("source", ["criteo", "criteo_x4"])
def test_numbers_become_ids(source, tmp_path):
    def rows(count, part):
        numbers = np.where(np.arange(count) % 5, np.arange(count) * 10.0 - 1, np.nan)
        columns = {"Label": np.arange(count) % 2, "I1": numbers, "C1": np.arange(count) % 2}
        return pandas.DataFrame(columns)

    data = load_ctr(source, folder=write_csv(tmp_path, rows), min_count=1)
    ids, missing = data.x[:60, 0], torch.arange(60) % 5 == 0
    assert data.names == ("I1", "C1") and ids[missing].unique().numel() == 1
    assert not set(ids[missing].tolist()) & set(ids[~missing].tolist())
    if source == "criteo_x4":  # 9 and 19 go to 4 and 8, 589 to 40
        expected = [int(np.log(10 * i - 1) ** 2) for i in range(60) if i % 5]
        groups = dict(zip(ids[~missing].tolist(), expected, strict=True))
        assert [groups[i] for i in ids[~missing].tolist()] == expected


def test_an_hour_becomes_three_fields_and_a_name_of_a_row_none(tmp_path):
    def rows(count, part):
        columns = {"id": np.arange(count), "click": np.arange(count) % 2}
        return pandas.DataFrame(columns | {"hour": 14102100 + np.arange(count) % 24})

    data = load_ctr("avazu_x4", folder=write_csv(tmp_path, rows))
    assert data.names == ("hour", "weekday", "is_weekend") and data.cards == (25, 2, 2)


def test_movielens_is_read_from_its_archive(tmp_path):
    lines = [f"{1 + i % 3}::{10 + i % 4}::{1 + i % 5}::{1000 - i}" for i in range(50)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines), encoding="latin-1")
    users = [f"{user}::{'MF'[user % 2]}::25::7::é{user}" for user in (1, 2, 3)]
    (tmp_path / "users.dat").write_text("\n".join(users), encoding="latin-1")
    data = load_ctr("movielens", folder=tmp_path)
    assert data.names == ("user", "movie", "gender", "age", "occupation", "zip")
    assert len(data.x) == 40 and data.parts == (32, 4, 4)  # a rating of 3 says nothing
    assert data.y.mean() == 0.5 and data.y[0] == 1 and data.y[1] == 1  # the oldest rows: 5, 4


def test_kuairand_has_three_tasks_and_what_each_user_did_before(tmp_path):
    rng = np.random.default_rng(0)
    log = pandas.DataFrame(rng.integers(0, 4, (200, 3)), columns=["user_id", "video_id", "tab"])
    log["hourmin"], log["time_ms"] = rng.integers(0, 2400, 200), rng.permutation(200)
    for name in ("is_click", "is_like", "long_view"):
        log[name] = rng.integers(0, 2, 200)
    log[:90].to_csv(tmp_path / "log_standard_1_pure.csv", index=False)
    log[90:].to_csv(tmp_path / "log_standard_2_pure.csv", index=False)
    data = load_ctr("kuairand", folder=tmp_path, seq_len=3)
    assert data.names == ("user_id", "video_id", "tab", "hour") and data.y.shape == (200, 3)
    log = log.sort_values("time_ms", ignore_index=True)
    video = dict(zip(log.video_id, data.x[:, 1].tolist(), strict=True))
    for row in range(200):
        earlier = log[:row][log[:row].user_id == log.user_id[row]]
        for task, name in enumerate(("is_click", "is_like", "long_view")):
            expected = [video[v] + 1 for v in earlier[earlier[name] == 1].video_id[-3:]]
            assert data.seq[row, task].tolist() == expected + [0] * (3 - len(expected))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda at: load_ctr("frape", folder=at), ValueError, "did you mean 'frappe'"),
        (lambda at: load_ctr("movielens"), ValueError, "folder must be given: movielens"),
        (lambda at: load_ctr("movielens", folder=at), RuntimeError, "must hold ratings.dat"),
        (lambda at: load_ctr("kuairand", folder=at), RuntimeError, r"must hold log_standard_\*"),
        (lambda at: load_ctr("frappe", folder=at), RuntimeError, "could not load the train split"),
        (lambda at: load_ctr("frappe", folder=at, max_rows=0), ValueError, "max_rows must be"),
        (lambda at: table_ctr("vine"), ValueError, "did you mean 'wine'"),
        (lambda at: table_ctr(bins=1), ValueError, "bins must be in 2"),
    ],
)
def test_sets_that_cannot_be_read(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_a_folder_without_a_label_is_refused_by_its_columns(tmp_path):
    write_csv(tmp_path, lambda count, part: pandas.DataFrame({"user": np.arange(count)}))
    with pytest.raises(ValueError, match=r"column label or click .* got columns \['user'\]"):
        load_ctr("frappe", folder=tmp_path)


def test_without_the_library_its_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'shuffle_nb\[data\]'"):
        load_ctr("criteo")


@pytest.mark.parametrize(
    ("name", "rows", "fields"),
    [("wine", 178, 13), ("breast_cancer", 569, 30), ("diabetes", 442, 10)],
)
def test_small_tables_need_no_download(name, rows, fields):
    data = table_ctr(name, seed=1)
    assert data.x.shape == data.values.shape == (rows, fields) and sum(data.parts) == rows
    assert (data.x >= 0).all() and (data.x < 8).all() and set(data.cards) == {8}
    assert data.values.min() > 0 and data.values.max() == 1
    rates = [part.y.mean().item() for part in data.split()]
    assert max(rates) - min(rates) < 0.04
    assert not torch.equal(table_ctr(name, seed=2).y, data.y)


def test_fields_begin_where_those_before_them_end():
    assert offsets_of((3, 4, 5)).tolist() == [0, 3, 7]
    assert torch.equal(JointEmbedding((3, 4, 5), 2).offsets, offsets_of((3, 4, 5)))


def test_one_pass_is_the_sum_over_pairs():
    v = torch.randn(6, 5, 3, dtype=torch.float64)
    pairs = sum((v[:, i] * v[:, j]).sum(1) for i in range(5) for j in range(i))
    assert torch.allclose(pair_products(v), pairs)
