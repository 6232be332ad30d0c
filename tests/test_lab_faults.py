"""What goes wrong at night, on real processes: a full disk, two jobs in one folder, a clock set back, a GPU that fails, a killed kernel."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from compute_layers.lab.checkpoint import DiskFull, checkpoint_files, latest_checkpoint, load_checkpoint, save_checkpoint
from compute_layers.lab.train import FolderBusy, TrainingStopped, train
from test_lab_runs import GUARD, PARAMETERS, RUN, TRAIN, cli, home, write_notebook  # noqa: F401  (home is a fixture)
from test_lab_train import children, loss_of, make_net  # noqa: F401  (children is a fixture)

OPTIONS = dict(steps=60, lr=1e-2, warmup=5, threads=1, checkpoint_every=5, progress=False)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of two megabytes. Skipped where none can be mounted (that takes root)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_loses_nothing(small_disk):
    """The guard speaks before the disk is full; without it the write fails, and the older checkpoint is whole either way."""
    kept = save_checkpoint(small_disk, 5, {"w": torch.randn(100_000)}, {}, reserve=0)
    with pytest.raises(DiskFull, match="make room"):
        save_checkpoint(small_disk, 10, {"w": torch.randn(100_000)}, {}, reserve=2 * 2**20)
    (small_disk / "ballast").write_bytes(bytes(1_500_000))
    with pytest.raises(OSError):
        save_checkpoint(small_disk, 15, {"w": torch.randn(100_000)}, {}, reserve=-(2**40))  # the guard asleep: the disk itself refuses
    assert checkpoint_files(small_disk) == [kept] and load_checkpoint(kept).step == 5
    assert not list(small_disk.glob(".checkpoint-*"))  # and no half a file is left


def test_a_run_stops_before_the_disk_is_full_and_goes_on_after(tmp_path, monkeypatch):
    """A run that cannot write stops with its newest checkpoint named, and ends like an unbroken one when there is room again."""
    whole, model = make_net(), make_net()
    train(whole, loss_of, **OPTIONS)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000 if len(checkpoint_files(path)) > 1 else usage.free))
    with pytest.raises(TrainingStopped, match="checkpoint-00000010") as stopped:
        train(model, loss_of, checkpoints=tmp_path / "run", **OPTIONS)
    assert stopped.value.step == 15
    monkeypatch.undo()
    model = make_net()
    train(model, loss_of, checkpoints=tmp_path / "run", resume=True, **OPTIONS)
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), model.state_dict().values()))


def test_two_jobs_never_write_one_folder(tmp_path):
    """The second is refused by name; a killed job's folder is free at once."""
    code = ("import sys, time, torch; sys.path[:0] = sys.argv[2:]\n"
            "from test_lab_train import children, loss_of, make_net  # noqa: F401  (children is a fixture)\nfrom compute_layers.lab.train import train\n"
            "def slow(model, step):\n    time.sleep(0.2)\n    return loss_of(model, step)\n"
            "train(make_net(), slow, steps=10_000, lr=1e-2, threads=1, checkpoints=sys.argv[1], checkpoint_every=1, progress=False, resume=True)\n")
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *filter(None, sys.path)])
    deadline = time.monotonic() + 60
    while not checkpoint_files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    try:
        with pytest.raises(FolderBusy, match=str(child.pid)):
            train(make_net(), loss_of, checkpoints=tmp_path, resume=True, **OPTIONS)
    finally:
        child.kill()
        child.wait()
    assert latest_checkpoint(tmp_path) is not None
    with pytest.raises(ValueError, match="steps: 10000 then, 60 now"):  # free again, and another run as ever
        train(make_net(), loss_of, checkpoints=tmp_path, resume=True, **OPTIONS)


def test_a_clock_set_back_changes_nothing(tmp_path):
    """The newest checkpoint is that of the highest step, whatever the files' dates say."""
    for step in (10, 20, 30):
        path = save_checkpoint(tmp_path, step, {"w": torch.full((2,), float(step))}, {})
        os.utime(path, (1_000_000 - step, 1_000_000 - step))
    assert latest_checkpoint(tmp_path).step == 30
    assert [load_checkpoint(path).step for path in checkpoint_files(tmp_path)] == [10, 20, 30]


def test_a_gpu_that_fails_in_mid_step(tmp_path):
    """CUDA's errors come as RuntimeError out of any line; what was checkpointed is whole, and the run ends as if nothing had been."""
    whole = make_net()
    train(whole, loss_of, **OPTIONS)

    def falls_off_the_bus(model, step):
        loss, report = loss_of(model, step)
        if step == 33:
            loss.backward()  # half of a step is done
            raise RuntimeError("CUDA error: GPU is lost")
        return loss, report

    with pytest.raises(RuntimeError, match="GPU is lost"):
        train(make_net(), falls_off_the_bus, checkpoints=tmp_path, **OPTIONS)
    model = make_net()
    history = train(model, loss_of, checkpoints=tmp_path, resume=True, **OPTIONS)
    assert history.resumed_from == 30
    assert all(torch.equal(one, other) for one, other in zip(whole.state_dict().values(), model.state_dict().values()))


def test_a_notebook_killed_in_mid_cell(home):
    """SIGKILL for the kernel: the command fails and says so, and the run goes on from its checkpoint."""
    psutil = pytest.importorskip("psutil")
    pytest.importorskip("papermill")
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, TRAIN)
    child = cli("run", "nbs/demo.ipynb", "-p", "steps", "200", "--no-html")
    deadline = time.monotonic() + 60
    while not list(home.glob("runs/*/checkpoints/*.safetensors")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    kernels = [process for process in psutil.Process(child.pid).children(recursive=True) if any("ipykernel" in part for part in process.cmdline())]
    assert kernels
    for kernel in kernels:
        kernel.send_signal(signal.SIGKILL)
    out, err = child.communicate(timeout=120)
    assert child.returncode not in (0, None) and "failed" in err
    assert not [process for process in psutil.process_iter() if process.pid in {kernel.pid for kernel in kernels} and process.status() != psutil.STATUS_ZOMBIE]
    (folder,) = home.glob("runs/*")
    assert latest_checkpoint(folder / "checkpoints") is not None
    out, err = cli("run", "nbs/demo.ipynb", "--resume", str(folder), "--no-html").communicate(timeout=120)
    assert json.loads((folder / "metrics.json").read_text())["resumed_from"] >= 20, err


def meets(fault: str, folder: str) -> None:
    """What a process does to which the fault happens, after step 30 of 60. Runs in a process of its own."""
    real, behind = time.time, [0.0]

    def loss(model, step):
        loss, report = loss_of(model, step)
        if fault == "clock":  # every second checkpoint is older than the one before, by a day
            time.time = lambda: real() - behind[0]
            for path in checkpoint_files(folder)[-1:]:
                behind[0] += 86_400
                os.utime(path, (time.time(), time.time()))
        if step >= 33:
            if fault == "nan":
                return loss * float("nan"), report
            if fault == "cuda":
                loss.backward()  # half of a step is done
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if fault in ("clock", "flipped", "cut"):
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
        return loss, report

    train(make_net(), loss, checkpoints=folder, keep=100, **OPTIONS)


def goes_on(folder: str, final: str) -> None:
    """The next process: resumes, and leaves its weights."""
    model = make_net()
    train(model, loss_of, checkpoints=folder, resume=True, keep=100, **OPTIONS)
    save_checkpoint(final, 60, model.state_dict(), {}, reserve=0)


@pytest.mark.parametrize("fault", ["nan", "cuda", "clock", "sigterm", "flipped", "cut", "disk"])
def test_a_process_meets_and_the_next_one_ends_as_if_it_had_not(fault, tmp_path, children, request):  # noqa: F811
    """The faulty process fails, whatever it left is whole and finite, and the weights at the end are those of an unbroken run."""
    whole = make_net()
    train(whole, loss_of, **OPTIONS)
    disk = request.getfixturevalue("small_disk") if fault == "disk" else None
    folder = (disk or tmp_path) / "run"
    if disk:  # room for the reserve and five checkpoints or so
        subprocess.run(["mount", "-o", "remount,size=72m", disk], check=True)
        one = save_checkpoint(tmp_path / "size", 1, make_net().state_dict(), {}).stat().st_size
        (disk / "ballast").write_bytes(bytes(8 * 2**20 - 30 * one))
    child = children.Process(target=meets, args=(fault, str(folder)))
    child.start()
    child.join(400)
    assert child.exitcode not in (0, None)
    files = checkpoint_files(folder)
    assert 1 <= len(files) <= (11 if disk else 7) and not list(folder.glob(".checkpoint-*"))
    if fault in ("flipped", "cut"):
        data = bytearray(files[-1].read_bytes())
        data[len(data) // 2] ^= 4
        files[-1].write_bytes(data if fault == "flipped" else data[: len(data) // 2])
        files = files[:-1]
    for path in files:
        assert all(value.isfinite().all() for value in load_checkpoint(path).tensors.values() if value.is_floating_point())
    if disk:
        assert shutil.disk_usage(disk).free >= 60 * 2**20  # it stopped before it was full
        (disk / "ballast").unlink()
    child = children.Process(target=goes_on, args=(str(folder), str(tmp_path / "final")))
    child.start()
    child.join(400)
    assert child.exitcode == 0
    final = latest_checkpoint(tmp_path / "final").tensors
    assert all(torch.equal(final[name], value) for name, value in whole.state_dict().items())
