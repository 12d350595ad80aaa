"""The training loop: repeatable, resumable bit for bit, and loud when a loss is not finite."""

import os
import signal
import subprocess
import sys
import textwrap

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
    load_checkpoint,
    pick_device,
    predict,
    save_checkpoint,
    seed_everything,
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

    def never(step):
        raise AssertionError("no batch is needed")

    assert run(again, never, checkpoint=tmp_path / "run.pt").losses == expected.losses
    assert same_weights(again, model)


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


def test_checkpoint_of_another_run_or_of_no_run_is_refused(tmp_path):
    run(network(), checkpoint=tmp_path / "run.pt")
    with pytest.raises(ValueError, match="belongs to another run"):
        run(network(), checkpoint=tmp_path / "run.pt", lr=0.5)
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"broken.pt is not a checkpoint"):
        run(network(), checkpoint=tmp_path / "broken.pt")
    assert (tmp_path / "broken.pt").read_bytes() == b"no checkpoint"


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


@settings(max_examples=20)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30), st.integers(1, 10))
def test_smoothing_is_the_mean_of_the_last_window(losses, window):
    smoothed = History(losses).smoothed(window)
    for step in range(len(losses)):
        part = losses[max(0, step + 1 - window) : step + 1]
        assert smoothed[step] == pytest.approx(sum(part) / len(part), abs=1e-9)


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
        (lambda: run(network(), optimizer="lion"), r"optimizer must be one of \['adam', 'adamw'"),
        (lambda: run(network(), schedule="warm"), "schedule must be one of"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
