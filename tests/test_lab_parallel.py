"""torchrun with two processes on the CPU (gloo): the loss curve of one process with the same global batch, checkpoints and a stop included."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from compute_layers.lab.checkpoint import checkpoint_files, latest_checkpoint

PROGRAM = """
import json, sys, time, torch
from torch import nn
from compute_layers.lab.parallel import process_group, rank_and_size, share, share_size
from compute_layers.lab.train import TrainingStopped, train

folder, out, steps, pause, wrapped = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]), sys.argv[5] == "ddp"

def batch_of(step):
    numbers = torch.Generator().manual_seed(step)
    x = torch.rand(64, 3, generator=numbers) * 2 - 1
    return x, (x.prod(1, keepdim=True) * 5).sin()

def main():
    with process_group("gloo") as device:
        rank, size = rank_and_size()
        torch.manual_seed(100 + rank)  # other first weights in each process, to be made the same
        if size == 1 or rank == 0:
            torch.manual_seed(100)
        model = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 1))
        net = nn.parallel.DistributedDataParallel(model) if wrapped and size > 1 else model

        def loss_fn(net, step):
            time.sleep(pause)
            x, y = batch_of(step)
            part = share(64)
            error = net(x[part]) - y[part]
            return error.square().mean(), {"samples": share_size(64), "error": error.detach().abs().mean()}

        history = train(net, loss_fn, steps=steps, lr=1e-2, warmup=5, ema=0.9, threads=1, device=device, precision="fp32", log_every=5, checkpoint_every=20, checkpoints=folder, resume=True, progress=False)
        if rank == 0:
            json.dump({"rows": history.rows, "from": history.resumed_from, "weights": [value.flatten().tolist() for value in model.state_dict().values()]}, open(out, "w"))

main()
"""


def start(program, processes: int, *arguments: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([sys.executable, *launcher, str(program), *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def alone(program, tmp_path, monkeypatch):
    """The same program in this process."""
    monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "alone"), str(tmp_path / "alone.json"), "100", "0", "plain"])
    exec(compile(PROGRAM, str(program), "exec"), {"__name__": "program"})
    return json.loads((tmp_path / "alone.json").read_text())


def assert_same_curve(one: dict, other: dict) -> None:
    assert [row["step"] for row in one["rows"]] == [row["step"] for row in other["rows"]] == list(range(5, 101, 5))
    for first, second in zip(one["rows"], other["rows"]):
        for key in ("loss", "error", "grad_norm", "lr", "samples"):
            assert second[key] == pytest.approx(first[key], rel=2e-4), (first["step"], key)
    for first, second in zip(one["weights"], other["weights"]):
        assert second == pytest.approx(first, abs=2e-4)
    assert one["rows"][-1]["loss"] < 0.75 * one["rows"][0]["loss"]  # a curve, not a line


def test_two_processes_stopped_and_resumed_have_the_curve_of_one(program, alone, tmp_path):
    """SIGTERM for one of the two: both finish the same step, the first writes a checkpoint; resumed, the curve is that of one process.

    The first part averages its gradients by itself, the second is wrapped by PyTorch's DistributedDataParallel: it must not be seen.
    """
    psutil = pytest.importorskip("psutil")
    child = start(program, 2, str(tmp_path / "run"), str(tmp_path / "out.json"), "100", "0.06", "plain")  # slowly: the signal must come in time on a busy machine
    deadline = time.monotonic() + 400
    while not checkpoint_files(tmp_path / "run") and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    workers = [process for process in psutil.Process(child.pid).children(recursive=True) if str(program) in process.cmdline()]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGTERM)  # not even the one that writes
    out = child.communicate(timeout=400)[0]
    assert child.returncode != 0 and "TrainingStopped" in out, out
    stopped = latest_checkpoint(tmp_path / "run").step
    assert 20 <= stopped < 100
    child = start(program, 2, str(tmp_path / "run"), str(tmp_path / "out.json"), "100", "0", "ddp")
    out = child.communicate(timeout=400)[0]
    assert child.returncode == 0, out
    together = json.loads((tmp_path / "out.json").read_text())
    assert together["from"] == stopped
    assert_same_curve(alone, together)
