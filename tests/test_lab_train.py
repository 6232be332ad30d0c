"""Checkpoints and the training loop under fire: killed at random moments, terminated, fed with NaN."""
import json
import multiprocessing
import os
import random
import signal
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from compute_layers.lab.checkpoint import CheckpointError, checkpoint_files, latest_checkpoint, load_checkpoint, save_checkpoint
from compute_layers.lab.train import TrainingDiverged, TrainingStopped, default_threads, learning_rate, train

STEPS = 240


def make_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(1, 32), nn.BatchNorm1d(32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 1))


def loss_of(model, step):
    numbers = torch.Generator().manual_seed(step)
    x = torch.rand(64, 1, generator=numbers) * 6 - 3
    x = x + 0.01 * torch.randn(64, 1) + 0.01 * random.random()  # the global generators matter too
    loss = (model(x) - x.sin()).square().mean()
    return loss, {"samples": 64, "rmse": loss.detach().sqrt()}


def slow_loss(model, step):
    time.sleep(0.003)
    return loss_of(model, step)


def options(folder):
    return dict(steps=STEPS, lr=1e-2, ema=0.98, threads=1, checkpoints=folder, checkpoint_every=7, log_every=10, progress=False)


def train_in_child(folder):
    train(make_net(), slow_loss, resume=True, **options(folder))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    model = make_net()
    history = train(model, loss_of, **options(tmp_path_factory.mktemp("unbroken")))
    return model, history


@pytest.fixture(scope="module")
def children():
    "A clean server process that has imported torch once and forks a child for every run."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "pytest", "compute_layers.lab.train"])  # the slow imports, once
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))  # Python 3.11 forgets to pass sys.path on
        context.Process(target=int).start()
    return context


def assert_same(model, history, unbroken):
    for (name, value), other in zip(model.state_dict().items(), unbroken[0].state_dict().values()):
        assert torch.equal(value, other), name
    for name, value in unbroken[1].ema_state.items():
        assert torch.equal(history.ema_state[name], value), name
    for key in ("step", "loss", "lr", "grad_norm", "samples", "rmse"):
        assert history.column(key) == unbroken[1].column(key), key


def test_killed_at_random_moments_and_resumed(tmp_path, unbroken, children):
    """Runs are killed again and again until each is done; every one ends with the weights of the unbroken run, and no checkpoint is unreadable."""
    wanted = int(os.environ.get("KILLS", 6))  # KILLS=50: as often as the journal reports
    moments, kills, runs, unreadable, different = random.Random(), 0, 0, 0, 0
    while kills < wanted:
        folder, runs = tmp_path / str(runs), runs + 1
        while kills < wanted:
            child = children.Process(target=train_in_child, args=(folder,))
            child.start()
            before = checkpoint_files(folder)[-1:]
            deadline = time.monotonic() + 60
            while child.is_alive() and time.monotonic() < deadline:  # wait until it makes progress …
                if checkpoint_files(folder)[-1:] != before:
                    break
                time.sleep(0.005)
            child.join(moments.uniform(0, 0.25))  # … and then strike at any moment
            if not child.is_alive():
                assert child.exitcode == 0
                break
            child.kill()
            child.join()
            kills += 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a damaged checkpoint would be passed over with a warning: here it counts
                try:
                    assert latest_checkpoint(folder) is not None
                    for path in checkpoint_files(folder):
                        load_checkpoint(path)
                except (CheckpointError, UserWarning):
                    unreadable += 1
        model = make_net()
        history = train(model, loss_of, resume=True, **options(folder))
        try:
            assert_same(model, history, unbroken)
        except AssertionError:
            different += 1
    if report := os.environ.get("KILLS_REPORT"):
        with open(report, "w") as file:
            json.dump({"kills": kills, "runs": runs, "unreadable_checkpoints": unreadable, "runs_with_other_weights": different}, file)
    assert kills == wanted and unreadable == different == 0


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, unbroken):
    def cut(model, step):
        if step == 100:
            raise KeyError("power cut")
        return loss_of(model, step)

    with pytest.raises(KeyError):
        train(make_net(), cut, **options(tmp_path))
    newest = checkpoint_files(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    model = make_net()
    with pytest.warns(UserWarning, match=newest.name):
        history = train(model, loss_of, resume=True, **options(tmp_path))
    assert history.resumed_from == 91
    assert_same(model, history, unbroken)


def test_only_damaged_checkpoints_is_an_error_not_a_fresh_start(tmp_path):
    save_checkpoint(tmp_path, 5, {"x": torch.zeros(3)}, {}).write_bytes(b"short")
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match="none of its 1"):
        train(make_net(), loss_of, resume=True, **options(tmp_path))


def test_every_byte_of_a_checkpoint_is_watched(tmp_path):
    path = save_checkpoint(tmp_path, 3, {"a": torch.arange(4.0), "b": torch.ones(2, dtype=torch.bfloat16)}, {"k": [1, "ü", 0.1]})
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load_checkpoint(path)


def test_sigterm_in_another_process_leaves_a_checkpoint(tmp_path, unbroken, children):
    child = children.Process(target=train_in_child, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 20
    while not checkpoint_files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    child.terminate()
    child.join(20)
    assert child.exitcode == 1  # TrainingStopped, not "killed by signal 15"
    assert latest_checkpoint(tmp_path).step < STEPS
    model = make_net()
    assert_same(model, train(model, loss_of, resume=True, **options(tmp_path)), unbroken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signals_finish_the_step_and_give_the_handler_back(tmp_path, number):
    def asks(model, step):
        if step == 30:
            os.kill(os.getpid(), number)
        return loss_of(model, step)

    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match="after step 31 of") as stopped:
        train(make_net(), asks, **options(tmp_path))
    assert stopped.value.step == 31 and load_checkpoint(stopped.value.checkpoint).step == 31
    assert signal.getsignal(number) == before


def test_nan_stops_the_run_and_never_enters_a_checkpoint(tmp_path):
    def breaks(model, step):
        loss, report = loss_of(model, step)
        return (loss * float("inf") if step == 40 else loss), report

    with pytest.raises(TrainingDiverged, match="step 40: .*checkpoint-00000035") as diverged:
        train(make_net(), breaks, **options(tmp_path))
    assert diverged.value.checkpoint == checkpoint_files(tmp_path)[-1]
    for path in checkpoint_files(tmp_path):
        assert all(value.isfinite().all() for value in load_checkpoint(path).tensors.values() if value.is_floating_point())


def test_weights_broken_behind_the_loss_are_caught_at_the_checkpoint(tmp_path):
    def vandal(model, step):
        if step == 20:  # the last step before a checkpoint; its loss does not see the damage
            with torch.no_grad():
                model[4].bias.fill_(float("nan"))
            return model[0].weight.square().mean(), {}
        return loss_of(model, step)

    with pytest.raises(TrainingDiverged, match="model/4.bias"):
        train(make_net(), vandal, **options(tmp_path))
    assert [load_checkpoint(path).step for path in checkpoint_files(tmp_path)] == [7, 14]


def test_other_settings_or_another_model_cannot_resume(tmp_path):
    train(make_net(), loss_of, **(options(tmp_path) | {"steps": 14, "settings": {"batch": 64}}))
    with pytest.raises(ValueError, match=r"(?s)steps: 14 then, 20 now.*settings: \{'batch': 64\} then, \{\} now"):
        train(make_net(), loss_of, resume=True, **(options(tmp_path) | {"steps": 20}))
    with pytest.raises(ValueError, match=r"tensor 4.bias: \(1,\) then, absent now"):
        train(make_net()[:4], loss_of, resume=True, **(options(tmp_path) | {"steps": 14, "settings": {"batch": 64}}))
    with pytest.raises(FileExistsError, match="resume=True"):
        train(make_net(), loss_of, **options(tmp_path))


def test_a_run_may_be_shortened_before_its_rate_falls(tmp_path):
    """Stopped and resumed with another number of steps it ends as a run of that length from the start; later that is refused."""

    def stopped_at(last: int):
        def loss(model, step):
            if step == last:
                os.kill(os.getpid(), signal.SIGTERM)
            return loss_of(model, step)
        return loss

    rest = {"lr": 1e-2, "warmup": 5, "progress": False}
    whole = make_net()
    train(whole, loss_of, steps=60, **rest)
    short = make_net()
    with pytest.raises(TrainingStopped):
        train(short, stopped_at(29), steps=100, checkpoints=tmp_path / "a", **rest)
    short = make_net()
    train(short, loss_of, steps=60, checkpoints=tmp_path / "a", resume=True, **rest)
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), short.state_dict().values()))
    with pytest.raises(TrainingStopped):
        train(make_net(), stopped_at(69), steps=100, checkpoints=tmp_path / "b", **rest)
    with pytest.raises(ValueError, match="steps: 100 then, 80 now .and the learning rates up to step 70 differ"):
        train(make_net(), loss_of, steps=80, checkpoints=tmp_path / "b", resume=True, **rest)


def test_frozen_parameters_stay_and_unused_ones_do_no_harm(tmp_path):
    model = make_net()
    model[0].weight.requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: model[4](model[3](model[2](model[1](model[0](x)))))
    before = model[0].weight.clone()
    train(model, loss_of, **(options(tmp_path) | {"steps": 14}))
    assert torch.equal(model[0].weight, before)
    again = train(model, loss_of, resume=True, **(options(tmp_path) | {"steps": 14}))
    assert again.resumed_from == 14


def test_tied_weights_are_averaged_under_both_names(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.outside = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.outside.weight = self.inside.weight

    def loss(model, step):
        return (model.outside(model.inside(torch.ones(1, 4))) - 1).square().mean(), {}

    settings = dict(steps=20, lr=1e-2, ema=0.9, progress=False, checkpoints=tmp_path, threads=1)
    model = Tied()
    averages = train(model, loss, **settings).ema_state
    assert torch.equal(averages["inside.weight"], averages["outside.weight"])
    assert not torch.equal(averages["inside.weight"], model.inside.weight)
    again = Tied()
    assert train(again, loss, resume=True, **settings).resumed_from == 20
    assert torch.equal(again.outside.weight, model.outside.weight) and again.outside.weight is again.inside.weight


def test_the_schedule():
    rates = [learning_rate(step, 1000, 1.0, 100, 0.4) for step in range(1000)]
    assert rates[0] == 0.01 and rates[99:600] == [1.0] * 501 and max(rates) == 1.0
    assert all(a > b for a, b in zip(rates[600:], rates[601:])) and 0 < rates[-1] < 0.01
    assert [learning_rate(s, 10, 1.0, 0, 0.0) for s in range(10)] == [1.0] * 10
    assert learning_rate(0, 1, 1.0) > 0


def test_threads_on_purpose(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads("cpu") == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= default_threads("cpu") <= 8
    seen = []
    before = torch.get_num_threads()
    train(make_net(), lambda model, step: (seen.append(torch.get_num_threads()), loss_of(model, step))[1], steps=1, lr=0.1, threads=2, progress=False)
    assert seen == [2] and torch.get_num_threads() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path):
    def loss_on_gpu(model, step):
        numbers = torch.Generator("cuda").manual_seed(step)
        x = torch.rand(64, 1, generator=numbers, device="cuda") * 6 - 3
        loss = (model(x) - x.sin()).square().mean()
        return (loss * float("nan") if step == breaks_at else loss), {"samples": 64}

    breaks_at = 23
    settings = options(tmp_path) | {"device": "cuda"}
    with pytest.raises(TrainingDiverged, match="step 23: .*checkpoint-00000021"):
        train(make_net(), loss_on_gpu, **settings)
    breaks_at = -1
    history = train(make_net(), loss_on_gpu, resume=True, **settings)
    assert history.resumed_from == 21 and history.rows[-1]["loss"] < 0.1
