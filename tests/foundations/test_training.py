"""The training loop: repeatable, resumable bit for bit, and loud when a loss is not finite."""

import io
import os
import random
import signal
import statistics
import subprocess
import sys
import textwrap
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from shuffle_nb.foundations import training
from shuffle_nb.foundations.training import (
    History,
    MiniBatches,
    fit,
    fit_arms,
    load_checkpoint,
    load_exactly,
    pick_device,
    predict,
    save_checkpoint,
    seed_everything,
    set_up,
)


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
    )


def squared_error(model, x, y):
    return (model(x) - y).square().mean()


X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=0.01)


def other_epsilon(parameters):
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0, fused=True, eps=1e-6)


def run(model, batches=None, **options):
    batches = batches or MiniBatches(X, Y, batch_size=6, seed=3)
    settings = dict(steps=9, lr=0.01, device="cpu", checkpoint_every=1)
    return fit(model, squared_error, batches, **(settings | options))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_every_epoch_holds_each_example_at_most_once(length, batch_size, seed):
    batch_size = min(batch_size, length)
    batches = MiniBatches(torch.arange(length), batch_size=batch_size, seed=seed)
    for epoch in range(2):
        steps = range(epoch * batches.per_epoch, (epoch + 1) * batches.per_epoch)
        drawn = torch.cat([batches(step)[0] for step in steps])
        assert len(drawn.unique()) == len(drawn) == batches.per_epoch * batch_size


def test_batches_are_a_pure_function_of_the_step():
    forward, jumping = (MiniBatches(torch.arange(50), batch_size=7, seed=2) for _ in range(2))
    in_order = [forward(step)[0] for step in range(30)]
    for step in (29, 3, 15, 3, 0, 28):
        assert torch.equal(jumping(step)[0], in_order[step])
    other = MiniBatches(torch.arange(50), batch_size=7, seed=3)
    assert not torch.equal(other(0)[0], in_order[0])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "one-cycle"])
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_a_resumed_run_is_bit_identical_to_a_whole_one(tmp_path, schedule, optimizer):
    options = dict(schedule=schedule, optimizer=optimizer, clip_norm=1.0)
    whole, stopped, resumed = network(), network(), network()
    expected = run(whole, **options)
    batches = MiniBatches(X, Y, batch_size=6, seed=3)

    def power_cut(step):
        if step == 4:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        run(stopped, power_cut, checkpoint=tmp_path / "run.pt", **options)
    history = run(resumed, checkpoint=tmp_path / "run.pt", **options)
    assert history.losses == expected.losses
    assert same_weights(resumed, whole)


def test_a_run_killed_outright_resumes_bit_identically(tmp_path):
    script = textwrap.dedent("""
        import os, signal, sys, torch
        from torch import nn
        from shuffle_nb.foundations.training import MiniBatches, fit
        X = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.3), nn.Linear(8, 1))
        batches = MiniBatches(X, batch_size=6)
        def maybe_die(step):
            if step == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            return batches(step)
        history = fit(model, lambda m, x: m(x).square().mean(), maybe_die, steps=8, lr=0.01,
                      device="cpu", checkpoint=sys.argv[1], checkpoint_every=2)
        print(history.losses, [p.sum().item() for p in model.parameters()])
    """)

    def call(name, dies_at):
        arguments = [sys.executable, "-c", script, str(tmp_path / name), str(dies_at)]
        return subprocess.run(arguments, capture_output=True, text=True, timeout=120)

    whole = call("whole.pt", 99)
    killed = call("killed.pt", 5)
    assert killed.returncode == -signal.SIGKILL
    assert len(load_checkpoint(tmp_path / "killed.pt")["history"]["losses"]) == 4
    resumed = call("killed.pt", 99)
    assert resumed.stdout == whole.stdout and whole.stdout
    assert resumed.stderr == ""  # no progress bar where nobody watches


def test_a_finished_run_is_not_run_again(tmp_path):
    model = network()
    expected = run(model, checkpoint=tmp_path / "run.pt")
    again = network()

    asked = []

    def batches(step):
        asked.append(step)
        return MiniBatches(X, Y, batch_size=6, seed=3)(step)

    assert run(again, batches, checkpoint=tmp_path / "run.pt").losses == expected.losses
    assert same_weights(again, model) and asked == [0]  # to see that it is the same data


def test_same_seed_same_numbers_other_seed_others():
    assert run(network(), seed=5).losses == run(network(), seed=5).losses
    assert run(network(), seed=5).losses != run(network(), seed=6).losses


def test_the_callers_random_stream_is_untouched():
    torch.manual_seed(9)
    state = torch.get_rng_state()
    model = network()
    torch.set_rng_state(state)
    run(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_it_stops_at_the_first_loss_that_is_not_finite(number):
    model = network()
    before = None

    def loss(model, x, y):
        nonlocal before
        value = squared_error(model, x, y)
        if value_is_bad := len(calls) == 3:
            before = {k: v.clone() for k, v in model.state_dict().items()}
        calls.append(1)
        return value * float(number) if value_is_bad else value

    calls = []
    with pytest.raises(FloatingPointError, match=f"loss is {number} at step 3 of 9.*smaller lr"):
        fit(model, loss, MiniBatches(X, Y, batch_size=6), steps=9, device="cpu")
    assert len(calls) == 4
    weights = model.state_dict()
    assert all(torch.equal(before[name], weights[name]) for name in before if "weight" in name)


@pytest.fixture
def reads_in_blocks(monkeypatch):
    """Read losses as on a GPU: 4 at a time, while the optimiser can hold a bad step back."""
    monkeypatch.setattr(training, "READ_AT_ONCE", ())
    monkeypatch.setattr(training, "READ_EVERY", 4)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", rmsprop])
@pytest.mark.parametrize("bad_step", [0, 1, 2, 3, 6, 8])
def test_a_bad_loss_that_is_read_later_leaves_the_weights_that_gave_it(
    reads_in_blocks, optimizer, bad_step
):
    weights, calls = [], []

    def loss(model, x, y):
        weights.append([p.detach().clone() for p in model.parameters()])
        calls.append(1)
        value = squared_error(model, x, y)
        return value * float("nan") if len(calls) == bad_step + 1 else value

    model = network()
    with pytest.raises(FloatingPointError, match=f"loss is nan at step {bad_step} of 9"):
        fit(
            model, loss, MiniBatches(X, Y, batch_size=6), steps=9, device="cpu",
            optimizer=optimizer, weight_decay=0.1, schedule="one-cycle", lr=0.05, clip_norm=1.0,
        )  # fmt: skip
    assert all(map(torch.equal, model.parameters(), weights[bad_step]))
    assert len(calls) <= 4 * (bad_step // 4 + 1)
    if optimizer is rmsprop:  # it cannot hold still, so it is read at every step
        assert len(calls) == bad_step + 1


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_reading_in_blocks_changes_no_number(reads_in_blocks, monkeypatch, tmp_path, optimizer):
    options = dict(optimizer=optimizer, evaluate=first_weight, evaluate_every=3)
    blocks, model = run(network(), checkpoint=tmp_path / "run.pt", **options), network()
    kept = load_checkpoint(tmp_path / "run.pt")
    monkeypatch.undo()
    at_once = run(model, **options)
    assert blocks.losses == at_once.losses and blocks.evaluations == at_once.evaluations
    assert all(torch.equal(kept["model"][n], v) for n, v in model.state_dict().items())


def test_a_loss_is_read_only_where_it_is_shown(reads_in_blocks, monkeypatch):
    reads = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda parts: reads.append(len(parts)) or stack(parts))
    run(network(), steps=10)
    assert reads == [4, 4, 2]


def test_a_run_that_stops_leaves_no_progress_bar_open(monkeypatch):
    closed = []

    class WatchedBar(training.tqdm):
        def close(self):
            closed.append(self.n)
            super().close()

    monkeypatch.setattr(training, "tqdm", WatchedBar)
    with pytest.raises(FloatingPointError) as stopped:
        fit(network(), squared_error, lambda step: (X / 0, Y), steps=2, device="cpu")
    assert closed == [0], stopped  # `stopped` keeps the bar alive: nothing else can have closed it


def test_bars_within_the_bar_of_an_experiment_go_when_they_are_done(monkeypatch):
    closed = {}

    class WatchedBar(training.tqdm):
        def __init__(self, **options):
            super().__init__(**options | {"disable": False, "file": io.StringIO()})

        def close(self):
            closed[self.desc] = self.leave
            super().close()

    monkeypatch.setattr(training, "tqdm", WatchedBar)
    fit_arms({"a": build}, [0], steps=2, device="cpu")
    assert closed == {"a, seed 0": False, "arms x seeds": True}
    run(network())
    assert closed["fit"] is True


def test_mixed_precision_trains_about_the_same():
    plain = run(network(), seed=1)
    mixed = run(network(), seed=1, amp=True)
    assert mixed.losses == pytest.approx(plain.losses, rel=0.1)
    assert mixed.losses != plain.losses


@pytest.mark.usefixtures("plain_python")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # PyTorch's own
def test_a_compiled_run_gives_the_same_losses():
    def line():
        torch.manual_seed(2)
        return nn.Linear(3, 1)

    plain, compiled = run(line()), run(line(), compile=True)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)


def test_a_batch_may_be_a_single_tensor_and_the_optimiser_a_function():
    history = fit(
        nn.Linear(3, 1),
        lambda model, x: model(x).square().mean(),
        lambda step: X,
        steps=3,
        optimizer=lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
        device="cpu",
    )
    assert history.steps == 3 and history.losses[-1] < history.losses[0]
    assert history.seconds > 0 and history.cpu_seconds > 0


def test_frozen_parameters_stay():
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    run(model, weight_decay=0.5)
    assert torch.equal(model[0].weight, before)


def wider() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(3, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 1)
    )


def less_dropout() -> nn.Module:
    model = network()
    model[3].p = 0.1
    return model


def frozen() -> nn.Module:
    model = network()
    model[0].requires_grad_(False)
    return model


OTHER_RUNS = [
    ({"lr": 0.5}, "run: lr 0.01 there, 0.5 here; choose"),
    ({"steps": 10}, "run: steps 9 there, 10 here; choose"),
    ({"seed": 1}, "run: seed 0 there, 1 here; choose"),
    ({"schedule": "cosine"}, "run: schedule 'constant' there, 'cosine' here; choose"),
    ({"clip_norm": 1.0}, "run: clip_norm None there, 1.0 here; choose"),
    ({"amp": True}, "run: amp False there, True here; choose"),
    ({"compile": True}, "run: compile False there, True here; choose"),
    ({"weight_decay": 0.1}, "run: optimizer's weight_decay 0.0 there, 0.1 here; choose"),
    ({"optimizer": "sgd"}, "optimizer 'AdamW' there, 'SGD' here.*optimizer's momentum None"),
    ({"optimizer": rmsprop}, "optimizer 'AdamW' there, 'RMSprop' here"),
    ({"optimizer": other_epsilon}, "run: optimizer's eps 1e-08 there, 1e-06 here; choose"),
    ({"model": wider}, "run: model '57 parameters, .*' there, '64 parameters, .*' here; choose"),
    ({"model": less_dropout}, "run: model '57 parameters"),
    ({"model": frozen}, "run: model '57 parameters"),
    ({"model": lambda: network().double()}, "model '57 parameters"),
    ({"batches": MiniBatches(X, Y, batch_size=5, seed=3)}, r"batch \[\[6, 3\], \[6, 1\]\] there"),
    ({"batches": MiniBatches(X, Y, batch_size=6, seed=4)}, "seed of batches 3 there, 4 here"),
    ({"batches": MiniBatches(X, Y[:, [0, 0]], batch_size=6, seed=3)}, "first batch '"),
    ({"batches": MiniBatches(X, X, batch_size=6, seed=3)}, "first batch '"),
    ({"batches": lambda step: (X[:6], Y[:6])}, "run: first batch '[0-9a-f]+' there, '"),
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "run.pt"
    run(network(), checkpoint=path)
    return path


@pytest.mark.parametrize(("changed", "message"), OTHER_RUNS)
def test_the_checkpoint_of_another_run_is_refused_by_name(finished, changed, message):
    options = dict(changed)
    model = options.pop("model", network)()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as refused:
        run(model, options.pop("batches", None), checkpoint=finished, **options)
    assert "choose another checkpoint or remove the file" in str(refused.value)
    assert len(str(refused.value)) < 700  # what differs, not all there is
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


def test_one_row_outside_the_first_batch_makes_other_data(finished):
    last = MiniBatches(torch.arange(20), batch_size=6, seed=3)
    unseen = sorted(set(range(20)) - set(last(0)[0].tolist()))[0]
    other = X.clone()
    other[unseen, 0] += 1
    with pytest.raises(ValueError, match=r"another run: data '\w+' there, '\w+' here; c"):
        run(network(), MiniBatches(other, Y, batch_size=6, seed=3), checkpoint=finished)


def test_a_fingerprint_sees_type_shape_and_every_byte():
    ones = torch.ones(4)
    others = [torch.ones(2, 2), ones.view(torch.int32), ones.bfloat16(), ones[:3], "ones"]
    prints = {training._fingerprint(thing) for thing in [ones, *others]}
    assert len(prints) == 6
    assert training._fingerprint(torch.ones(4, 2)[:, 0]) == training._fingerprint(ones)


def test_a_learning_rate_of_numpy_is_a_number(tmp_path):
    for rate in (np.float64(0.01), 0.01):  # the second run finds the first one's checkpoint
        assert run(network(), checkpoint=tmp_path / "run.pt", lr=rate).steps == 9


@pytest.mark.parametrize("content", [b"no checkpoint", b""])
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(tmp_path, content):
    (tmp_path / "broken.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken.pt is not a checkpoint"):
        run(network(), checkpoint=tmp_path / "broken.pt")
    assert (tmp_path / "broken.pt").read_bytes() == content


def test_a_folder_and_the_file_of_something_else_are_no_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint"):
        run(network(), checkpoint=tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is not a checkpoint: it holds a list"):
        run(network(), checkpoint=tmp_path / "list.pt")
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="belongs to another run"):
        run(network(), checkpoint=tmp_path / "weights.pt")


def test_a_batch_function_that_draws_is_not_disturbed_by_a_checkpoint(tmp_path):
    def noisy(step):
        return X + torch.randn(20, 3), Y

    plain = run(network(), noisy)
    assert run(network(), noisy, checkpoint=tmp_path / "run.pt").losses == plain.losses


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"settings": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_saving_leaves_nothing_beside_the_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "deep" / "run.pt", {"x": torch.ones(2), "n": 3})
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run.pt"]
    assert load_checkpoint(tmp_path / "deep" / "run.pt")["n"] == 3


@settings(max_examples=50)
@given(st.lists(st.floats(-10, 10), max_size=30), st.integers(1, 12))
def test_smoothing_is_the_median_around_each_step(losses, window):
    smoothed = History(losses).smoothed(window)
    assert len(smoothed) == len(losses)
    for step in range(len(losses)):
        part = losses[max(0, step - window // 2) : step + (window + 1) // 2]
        assert len(part) <= window and smoothed[step] == pytest.approx(statistics.median(part))


def test_smoothing_keeps_a_jump_in_its_place():
    losses = [5.0] * 30 + [1.0] * 30
    assert History(losses).smoothed() == losses


def first_weight(model) -> float:
    return model[0].weight[0, 0]


def test_evaluations_have_a_curve_of_their_own(tmp_path):
    seen = []
    model = network()
    history = run(model, evaluate=lambda m: seen.append(first_weight(m).item()) or seen[-1],
                  evaluate_every=4)  # fmt: skip
    assert history.evaluations == list(zip([4, 8, 9], seen, strict=True))
    assert seen[-1] == first_weight(model).item() and len(set(seen)) == 3
    only_at_the_end = run(network(), evaluate=first_weight)
    assert only_at_the_end.evaluations == history.evaluations[-1:]


def test_an_evaluation_changes_nothing_of_the_training():
    def noisy_score(model):
        assert not model.training and not torch.is_grad_enabled()
        assert not any(module.training for module in model.modules())
        model(X)
        return {"noise": torch.rand(()), "error": squared_error(model, X, Y)}

    modes = []

    def loss(model, x, y):
        model[1].eval()  # this arm freezes its normalisation
        modes.append([module.training for module in model.modules()])
        return squared_error(model, x, y)

    plain, watched = network(), network()
    batches = MiniBatches(X, Y, batch_size=6)
    options = dict(steps=9, lr=0.01, device="cpu")
    expected = fit(plain, loss, batches, **options)
    history = fit(watched, loss, batches, evaluate=noisy_score, evaluate_every=1, **options)
    assert history.losses == expected.losses and same_weights(plain, watched)
    assert [module.training for module in watched.modules()] == modes[-1]
    noises = {scores["noise"] for _, scores in history.evaluations}
    assert len(history.evaluations) == 9 and len(noises) == 1  # the same draw each time


def test_the_modes_come_back_when_an_evaluation_fails():
    model = network()
    with pytest.raises(ZeroDivisionError):
        run(model, evaluate=lambda model: 1 / 0)
    assert model.training and model[3].training


def test_evaluations_survive_an_interruption(tmp_path):
    options = dict(evaluate=first_weight, evaluate_every=2, checkpoint=tmp_path / "run.pt")
    expected = run(network(), evaluate=first_weight, evaluate_every=2)
    batches = MiniBatches(X, Y, batch_size=6, seed=3)

    def power_cut(step):
        if step == 5:
            raise KeyboardInterrupt
        return batches(step)

    with pytest.raises(KeyboardInterrupt):
        run(network(), power_cut, **options)
    assert run(network(), **options).evaluations == expected.evaluations


def test_a_finished_run_answers_to_the_evaluation_of_today(tmp_path):
    run(network(), checkpoint=tmp_path / "run.pt", evaluate=lambda model: -1.0)
    history = run(network(), checkpoint=tmp_path / "run.pt", evaluate=first_weight)
    assert history.evaluations == [(9, history.evaluations[-1][1])] != [(9, -1.0)]


def test_evaluations_and_checkpoints_are_not_training_time(monkeypatch, tmp_path):
    now = [0]

    def takes(seconds, value=0.0):
        now[0] += seconds
        return value

    clocks = SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: now[0])
    monkeypatch.setattr(training, "time", clocks)
    monkeypatch.setattr(training, "save_checkpoint", lambda *arguments: takes(1000))
    history = run(
        network(),
        lambda step: takes(1, (X, Y)),
        steps=5,
        evaluate=lambda model: takes(100),
        evaluate_every=2,
        checkpoint=tmp_path / "run.pt",
    )
    assert history.seconds == history.cpu_seconds == 5


def build(seed, width=8):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1))
    model[0].bias.requires_grad_(False)
    return model, squared_error, MiniBatches(X, Y, batch_size=5, seed=seed)


def fit_on_loss(loss):
    return fit(network(), loss, lambda step: X, steps=1, device="cpu")


def by_hand(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        squared_error(model, X, Y).backward()
        optimizer.step()


def three_arms(evaluate=None, **options):
    arms = {
        "three": build,
        "five": (partial(build, width=4), {"steps": 5, "schedule": "cosine"}),
        "by hand": lambda seed: (build(seed)[0], by_hand),
        "untrained": lambda seed: build(seed)[0],
    }
    error = evaluate or (lambda model: {"error": squared_error(model, X, Y), "one": 1})
    return fit_arms(arms, [4, 7], steps=3, lr=0.05, device="cpu", evaluate=error, **options)


def test_every_arm_is_trained_with_every_seed():
    arms = three_arms()
    assert {name: [run.seed for run in runs] for name, runs in arms.items()} == {
        name: [4, 7] for name in ("three", "five", "by hand", "untrained")
    }
    for seed, trained in zip([4, 7], arms["three"], strict=True):
        model, loss, batches = build(seed)
        history = fit(model, loss, batches, steps=3, lr=0.05, device="cpu", seed=seed)
        assert history.losses == trained.history.losses and same_weights(model, trained.model)
        assert trained.scores["error"] == squared_error(model, X, Y).item()
        assert (trained.trainable, trained.frozen) == (33, 8)
        # Forward 2 * 5 * (24 + 8); gradients of both weights, and of the input of the second.
        assert trained.flops_per_step == 2 * 5 * (2 * (24 + 8) + 8)
    assert [run.history.steps for run in arms["five"]] == [5, 5]
    by_hand_too, _, _ = build(7)
    by_hand(by_hand_too)
    assert same_weights(by_hand_too, arms["by hand"][1].model)
    assert arms["by hand"][1].history.cpu_seconds > 0 == arms["untrained"][1].history.cpu_seconds
    assert same_weights(build(7)[0], arms["untrained"][1].model)
    assert arms["untrained"][0].flops_per_step is None
    errors = arms.scores("untrained", "error")
    assert errors == [squared_error(build(seed)[0], X, Y).item() for seed in (4, 7)]


def test_an_arm_depends_on_its_seed_and_not_on_what_was_drawn_before():
    def unseeded(seed):
        return nn.Linear(3, 1)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = fit_arms({"a": unseeded, "b": unseeded}, [0, 1], device="cpu")
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    (again,) = fit_arms({"b": unseeded}, [1], device="cpu")["b"]
    assert same_weights(first["b"][1].model, again.model)
    assert same_weights(first["a"][1].model, again.model)
    assert not same_weights(first["a"][0].model, again.model)


def test_the_table_shows_what_each_arm_had_to_spend():
    arms = three_arms()
    text, html = str(arms), arms._repr_html_()
    for shown in (
        "trainable",
        "frozen",
        "steps",
        "CPU time",
        "error, seeds 4, 7",
        "three",
        "720 FLOPs",
    ):
        assert shown in text and shown in html, shown
    rows = {row[0]: row for row in arms.table.rows}
    assert rows["three"][1:5] == ["33", "8", "3", "720 FLOPs"]
    assert rows["five"][3] == "5"
    assert rows["by hand"][3] == "-" and rows["by hand"][4] == "-"
    assert rows["untrained"][3] == "0" and rows["untrained"][5] == "0 s"


def test_counting_operations_leaves_the_training_alone():
    """BatchNorm's means and dropout's draws would tell."""

    def normed(seed):
        return network(), squared_error, MiniBatches(X, Y, batch_size=6, seed=3)

    (trained,) = fit_arms({"one": normed}, [5], steps=9, lr=0.01, device="cpu")["one"]
    assert trained.scores is None
    model = network()
    assert run(model, seed=5).losses == trained.history.losses
    assert same_weights(model, trained.model)


def test_an_arm_of_its_own_may_tell_its_losses():
    arms = fit_arms({"own": lambda seed: (network(), lambda m: History([2.0, 1.0]))}, [0])
    assert arms["own"][0].history.losses == [2.0, 1.0] and arms["own"][0].history.seconds > 0


def test_finished_runs_of_an_experiment_are_kept(tmp_path):
    first = three_arms(checkpoint=tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["five-4.pt", "five-7.pt", "three-4.pt", "three-7.pt"]
    again = three_arms(checkpoint=tmp_path)
    assert [run.history.losses for run in again["five"]] == [
        run.history.losses for run in first["five"]
    ]
    assert again.scores("three", "error") == first.scores("three", "error")
    before = first["three"][0].history.cpu_seconds
    assert again["three"][0].history.cpu_seconds == pytest.approx(before, abs=1e-3)


def test_set_up_gives_the_device_one_thread_and_the_seeds():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert set_up("cpu", scale="full", seed=3) == torch.device("cpu")
        assert torch.get_num_threads() == 2
        drawn = torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
        set_up("cpu", seed=3)
        assert torch.get_num_threads() == 1
        assert drawn == (torch.rand(1), np.random.rand(), random.random())  # noqa: NPY002
    finally:
        torch.set_num_threads(threads)


def test_the_module_does_not_load_matplotlib():
    script = "import sys, shuffle_nb.foundations.training as t; print('matplotlib' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.stdout == "False\n", answer.stderr


def test_predict_restores_the_mode_and_keeps_order():
    model = network().train()
    whole = predict(model, X)
    assert model.training and not whole.requires_grad
    assert torch.allclose(predict(model, X, batch_size=3), whole, atol=1e-6)
    assert torch.equal(predict(lambda x: x[:, :1], X, batch_size=3), X[:, :1])


def test_devices_and_seeds():
    assert pick_device("cpu").type == "cpu"
    assert pick_device().type in {"cpu", "cuda", "mps"}
    first = torch.rand(2, generator=seed_everything(4)), torch.rand(2)
    again = torch.rand(2, generator=seed_everything(4)), torch.rand(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pick_device("gpu"), "device must be 'auto', 'cpu'.*got 'gpu'"),
        (lambda: pick_device("cuda:99"), "'cuda:99' is not available on this machine"),
        (lambda: MiniBatches(batch_size=2), "tensors must have the same, known length"),
        (lambda: MiniBatches(X, Y[:3], batch_size=2), r"got lengths \[20, 3\]"),
        (lambda: MiniBatches(X, batch_size=21), "batch_size must be in 1..20, got 21"),
        (lambda: run(network(), steps=0), "steps must be at least 1, got 0"),
        (lambda: run(network(), optimizer="lion"), r"optimizer must be one of \['adamw', 'adam'"),
        (lambda: run(network(), schedule="cosin"), "schedule must be one of.*mean 'cosine'"),
        (lambda: run(network(), evaluate_every=0), "evaluate_every must be at least 1, got 0"),
        (lambda: run(network(), checkpoint_every=0), "checkpoint_every must be at least 1, got 0"),
        (lambda: run(network(), clip_norm=0.0), "clip_norm must be positive and finite, got 0"),
        (lambda: run(network().requires_grad_(False)), "model must have a parameter that requires"),
        (
            lambda: fit_on_loss(lambda model, x: model(x)),
            r"loss must return a tensor of one number",
        ),
        (lambda: set_up(scale="large"), r"scale must be one of \['laptop', 'full'\], got 'large'"),
        (lambda: set_up(device="gpu"), "device must be 'auto'"),
        (lambda: run(network(), evaluate=lambda model: None), "a number.* got NoneType"),
        (lambda: run(network(), evaluate=lambda model: X), r"a number.* got \(20, 3\)"),
        (lambda: fit_arms({}, [0], steps=1), "arms must hold at least one arm, got none"),
        (lambda: fit_arms({"a": build}, [], steps=1), r"seeds must be one or more different.*\[\]"),
        (lambda: fit_arms({"a": build}, [1, 1], steps=1), r"different numbers, got \[1, 1\]"),
        (lambda: fit_arms({"a": build}, [1], steps=1, seed=2), r"must not hold \['seed'\]"),
        (
            lambda: fit_arms({"a": lambda seed: X}, [1], steps=1),
            "arm 'a' must return .* got Tensor",
        ),
        (lambda: fit_arms({"a": lambda seed: ()}, [1], steps=1), "must return .* got nothing"),
        (lambda: fit_arms({"a": lambda seed: (X, X)}, [1], steps=1), "got Tensor, Tensor"),
        (lambda: three_arms().scores("thre"), "arm must be one of .*mean 'three'"),
        (lambda: three_arms().scores("three", "loss"), "key must be one of"),
        (lambda: three_arms(lambda model: 1.0).scores("three", "loss"), "key must be None"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_of_a_release_fit_exactly_or_nothing_is_loaded():
    layer, zeros = nn.Linear(2, 3), torch.zeros(3, 2)
    before = layer.weight.clone()
    for state, message in (
        ({"weight": zeros}, "state lacks 1 weights, such as bias"),
        (
            {"weight": zeros, "bias": zeros[:, 0], "scale": zeros},
            "in excess 1 weights, such as scale",
        ),
        ({"weight": zeros, "bias": zeros}, r"bias must be \(3\), got shape \(3, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            load_exactly(layer, state)
    assert torch.equal(layer.weight, before)
    load_exactly(layer, {"bias": zeros[:, 0], "weight": zeros})
    assert not layer.weight.any()
