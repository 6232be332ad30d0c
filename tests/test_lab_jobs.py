"""Jobs on real processes: a queue, a worker that is killed, a job that is stopped and goes on, and nothing left behind."""
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from compute_layers.lab.commands import main
from compute_layers.lab.jobs import Gpu, Queue, Worker, progress_of
from test_lab_runs import GUARD, PARAMETERS, RUN, TRAIN, cli, home, write_notebook  # noqa: F401  (home is a fixture)


def until(condition, seconds: float = 90) -> None:
    """Wait for something, not for ever."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.fixture
def queue(home):  # noqa: F811
    pytest.importorskip("papermill")
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, TRAIN)
    queue = Queue(home)
    yield queue
    for job in queue.jobs("running", "stopping"):
        os.killpg(job.pid, signal.SIGKILL)


def test_killed_worker_stopped_and_resumed_job(queue, home, capsys):  # noqa: F811
    """The whole way: queued, its worker killed, stopped by a new one, resumed, done; and no process stays."""
    psutil = pytest.importorskip("psutil")
    look_in = "\ndef look_in(row):\n    row['accuracy_near'] = 0.97\n"
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, look_in + TRAIN.replace("log_every=10", "log_every=10, on_log=look_in"))
    assert main(["job", "run", "nbs/demo.ipynb", "-p", "steps=400", "--device", "cpu", "--no-worker"]) == 0
    worker = cli("job", "work")
    until(lambda: queue.job(1).folder and list((home / queue.job(1).folder).glob("checkpoints/*.safetensors")))
    worker.kill()
    worker.communicate()
    pid, folder = queue.job(1).pid, home / queue.job(1).folder
    family = [process.pid for process in psutil.Process(pid).children(recursive=True)] + [pid]
    assert queue.job(1).state == "running" and psutil.pid_exists(pid)  # it does not need its worker
    second = Worker(queue)  # a new one finds it
    assert second.look() == [] and queue.job(1).pid == pid
    main(["job", "list"])
    assert "running" in (shown := capsys.readouterr().out) and "steps=400" in shown
    until(lambda: "near 97%" in (shown := progress_of(queue.job(1), home)) and "loss=" in shown)  # from inside the notebook: the step, the loss, the time left, and, a little later, the scores
    shown = progress_of(queue.job(1), home)
    assert re.search(r"\d+/400 \[\d\d:\d\d<", shown) and re.search(r"step \d+: near 97%", shown), shown

    follower = cli("job", "logs", "-f", "1")
    queue.stop(1)
    until(lambda: second.look() is not None and queue.job(1).state == "stopped")
    until(lambda: not [p for p in family if psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE], 30)
    followed, _ = follower.communicate(timeout=60)  # it ends with the job
    assert follower.returncode == 0 and "Executing" in followed and "TrainingStopped" in followed
    done = max(int(path.stem.split("-")[1]) for path in (folder / "checkpoints").glob("*.safetensors"))
    assert 0 < done < 400 and "TrainingStopped" in (folder / "demo.ipynb").read_text()

    assert main(["job", "resume", "1", "--no-worker"]) == 0
    second.work(until_empty=True, every=0.1)
    assert queue.job(1).state == "done", queue.job(1)
    assert json.loads((folder / "metrics.json").read_text())["resumed_from"] == done
    main(["job", "logs", "1"])
    assert "Executing" in capsys.readouterr().out
    assert [path.name for path in home.glob("runs/*") if path.is_dir()] == [folder.name]


def test_a_notebook_that_fails_and_mistakes(queue, home, capsys):  # noqa: F811
    """A failing notebook is failed, with its folder named; mistakes are one line."""
    write_notebook(home / "nbs" / "bad.ipynb", "x = 1", "steps = 1", "raise KeyError('a reason')")
    number = queue.add("nbs/bad.ipynb", device="cpu")
    Worker(queue).work(until_empty=True, every=0.1)
    assert queue.job(number).state == "failed" and "status" in queue.job(number).message
    assert "a reason" in (home / queue.job(number).folder / "job.log").read_text()
    for arguments, said in ((["job", "run", "nbs/demo.ipynb", "-p", "steps"], "NAME=VALUE"), (["job", "run", "nbs/none.ipynb"], "no such notebook"),
                            (["job", "run", "settings.ini"], "cannot be read as a notebook"), (["job", "stop", "7"], "no job 7"), (["job", "run", "nbs/demo.ipynb", "-p", "stesp=1"], "did you mean 'steps'")):
        assert main(arguments) == 1
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1


COUNTS = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND), b"x"))
open(sys.argv[1] + ".up", "w")
time.sleep(60)
"""


def test_a_job_is_told_once_to_stop(queue, home):  # noqa: F811
    """A step may take a while; `compute_layers run` takes a second SIGTERM as the wish to kill it without a checkpoint."""
    told = home / "told"
    hot = [Gpu("A", 70_000, 80_000, 95)]
    worker = Worker(queue, lambda: [], command=lambda job: [sys.executable, "-c", COUNTS, str(told)])
    queue.add("nbs/demo.ipynb", device="cpu")
    worker.look()
    until(lambda: told.with_name("told.up").exists(), 20)
    queue.change(1, slot="A")
    worker.gpus = lambda: hot
    for _ in range(3):  # too hot at three looks, then stopped twice
        worker.look()
    assert queue.job(1).message.startswith("put off")
    for _ in range(2):
        queue.stop(1)
        worker.look()
    until(lambda: told.exists(), 20)
    time.sleep(0.3)
    assert told.read_text() == "x" and queue.job(1).state == "stopping"


def test_what_a_killed_job_leaves_is_ended(queue, home):  # noqa: F811
    """Its papermill and its kernel live in a group of their own: they would train on, in a slot that is given to another."""
    import psutil

    code = ("import os, subprocess, sys, time\nenvironment = {**os.environ, 'COMPUTE_LAYERS_RUN_FOLDER': sys.argv[1]}\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], env=environment, start_new_session=True)\n"
            "open(sys.argv[1] + '/child', 'w').write(str(child.pid)); time.sleep(60)")
    worker = Worker(queue, lambda: [], command=lambda job: [sys.executable, "-c", code, str(home / queue.job(job.id).folder)])
    queue.add("nbs/demo.ipynb", device="cpu")
    worker.look()
    note = home / queue.job(1).folder / "child"
    until(lambda: note.exists() and note.read_text(), 20)
    child = int(note.read_text())
    queue.stop(1)
    os.kill(queue.job(1).pid, signal.SIGKILL)
    until(lambda: worker.look() is not None and queue.job(1).state == "stopped", 60)
    until(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE, 10)


def test_a_job_that_gets_on_outlives_many_deaths(queue, home):  # noqa: F811
    """Three deaths in a row without a checkpoint are enough; with one, a reboot a night for a week is not."""
    code = ("import pathlib, sys, time; folder = pathlib.Path(sys.argv[1]) / 'checkpoints'; folder.mkdir(exist_ok=True); time.sleep(0.05)\n"
            "(folder / f'step-{time.time_ns()}.safetensors').write_bytes(b'x') if sys.argv[2] == 'on' else None")
    for number, kind in ((1, "on"), (2, "stuck")):
        worker = Worker(queue, lambda: [], command=lambda job: [sys.executable, "-c", code, str(home / queue.job(job.id).folder), kind])
        queue.add("nbs/demo.ipynb", device="cpu")
        for _ in range(4):
            worker.look()
            until(lambda: all(child.poll() is not None for child in worker.children), 20)
        worker.look()
        assert queue.job(number).state == ("failed" if kind == "stuck" else "running"), queue.job(number)
        until(lambda: all(child.poll() is not None for child in worker.children), 20)
        queue.change(number, state="stopped", pid=None, slot=None)


def test_a_folder_that_is_gone_costs_one_job(queue, home, capsys):  # noqa: F811
    """A run in use is not thrown away; and where one is gone all the same, the others go on."""
    from compute_layers.lab.runs import held_lock

    sleeper = Worker(queue, lambda: [], cpu_slots=2, command=lambda job: [sys.executable, "-c", "import time; time.sleep(60)"])
    for _ in range(2):
        queue.add("nbs/demo.ipynb", device="cpu")
    (home / "runs" / "mine").mkdir()
    with held_lock(home / "runs" / "mine" / ".lock"):
        assert main(["discard", "runs/mine"]) == 1
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err and (home / "runs" / "mine").is_dir()
    assert main(["discard", "runs/jobs.sqlite"]) == 1 and "the queue" in capsys.readouterr().err
    queue.change(1, folder="runs/gone")
    said = sleeper.look()
    assert queue.job(1).state == "failed" and "job retry 1" in queue.job(1).message and queue.job(2).state == "running", said


def test_resume_sees_to_a_worker_and_damage_is_said(queue, home, capsys, monkeypatch):  # noqa: F811
    from compute_layers.lab import commands

    begun = []
    monkeypatch.setattr(commands, "_see_to_a_worker", begun.append)
    queue.add("nbs/demo.ipynb", [("steps", "5")], device="cpu")
    assert main(["job", "stop", "1"]) == main(["job", "resume", "1"]) == 0 and len(begun) == 1
    assert capsys.readouterr().out.splitlines() == ["job 1: stopped before it began", "job 1: resumed"]
    assert main(["job", "run", "nbs/demo.ipynb", "-p", "steps", "7", "-p", "lr=0.1", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"job": 2} and queue.job(2).parameters == [("steps", "7"), ("lr", "0.1")]
    for path in (home / "runs").glob("jobs.sqlite*"):
        path.unlink()
    (home / "runs" / "jobs.sqlite").write_bytes(b"no queue" * 500)
    assert main(["job", "list"]) == 1 and "move it away" in capsys.readouterr().err
    assert main(["doctor"]) == 1 and "the queue of jobs is damaged" in capsys.readouterr().out
    (home / "runs" / "jobs.sqlite").unlink()


def test_many_writers_lose_nothing(queue, home):  # noqa: F811
    """Six processes add and stop jobs at once; every change is there."""
    code = ("import sys; from compute_layers.lab.jobs import Queue\nqueue = Queue(sys.argv[1])\n"
            "for _ in range(10):\n    number = queue.add('nbs/demo.ipynb', [('steps', '5')])\n    queue.stop(number)\n")
    writers = [subprocess.Popen([sys.executable, "-c", code, str(home)]) for _ in range(6)]
    assert [writer.wait() for writer in writers] == [0] * 6
    assert len(queue.jobs()) == 60 and {job.state for job in queue.jobs()} == {"stopped"}
    assert len({job.id for job in queue.jobs()}) == 60


def test_memory_is_looked_at_before_a_job_starts(queue):
    """A GPU that is too full waits; "any" does not go to the CPU while some GPU is large enough for it."""
    cards = [Gpu("A", 1_000, 80_000, 40)]
    worker = Worker(queue, lambda: cards, command=lambda job: [sys.executable, "-c", "import time; time.sleep(30)"])
    number = queue.add("nbs/demo.ipynb", memory=20_000)
    assert worker.look() == [] and queue.job(number).state == "queued"
    cards[0] = Gpu("A", 79_000, 80_000, 40)
    assert "on A" in worker.look()[0]
    queue.stop(number)
    until(lambda: worker.look() is not None and queue.job(number).state == "stopped", 20)


def test_a_made_up_nvml(monkeypatch):
    """What NVML says becomes GPUs; one that is lost is left out, and the others are still seen; without a driver there is none."""
    import types

    from compute_layers.lab.jobs import read_gpus

    class NVMLError(Exception):
        pass

    lost = set()

    def handle_of(index):
        if index in lost:
            raise NVMLError("GPU is lost")
        return index

    closed = []
    fake = types.SimpleNamespace(
        NVMLError=NVMLError, NVML_TEMPERATURE_GPU=0, nvmlInit=lambda: None, nvmlShutdown=lambda: closed.append(1), nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=handle_of, nvmlDeviceGetUUID=lambda card: b"GPU-0" if card == 0 else "GPU-1", nvmlDeviceGetTemperature=lambda card, kind: 60 + card,
        nvmlDeviceGetMemoryInfo=lambda card: types.SimpleNamespace(free=(card + 1) << 30, total=8 << 30),
        nvmlDeviceGetComputeRunningProcesses=lambda card: [types.SimpleNamespace(pid=77)] * card)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    assert read_gpus() == [Gpu("GPU-0", 1024, 8192, 60), Gpu("GPU-1", 2048, 8192, 61, (77,))]
    lost.add(0)
    assert [gpu.uuid for gpu in read_gpus()] == ["GPU-1"] and len(closed) == 2

    def unsupported(card):
        raise NVMLError("Not Supported")

    fake.nvmlDeviceGetComputeRunningProcesses = unsupported  # who uses a card is not told everywhere: the card is still there
    assert read_gpus() == [Gpu("GPU-1", 2048, 8192, 61)]
    fake.nvmlDeviceGetCount = lambda: unsupported(0)  # the whole driver is gone
    assert read_gpus() == []

    def no_driver():
        raise NVMLError("Driver Not Loaded")

    fake.nvmlInit = no_driver
    assert read_gpus() == []


def test_a_job_whose_gpu_vanishes_goes_on_where_it_said(queue):
    """Both GPUs fall off the bus: the job for any device goes on on the CPU in the same folder, the one for a GPU waits for another."""
    cards = [Gpu("A", 9_000, 10_000, 40), Gpu("B", 9_000, 10_000, 40)]
    worker = Worker(queue, lambda: cards, command=lambda job: [sys.executable, "-c", "import time; time.sleep(60)"])
    anywhere, on_gpu = queue.add("nbs/demo.ipynb"), queue.add("nbs/demo.ipynb", device="gpu")
    worker.look()
    assert {queue.job(anywhere).slot, queue.job(on_gpu).slot} == {"A", "B"}
    folder = queue.job(anywhere).folder
    worker.look()
    assert (queue.root / folder / "gpu.csv").read_text().splitlines()[1].endswith(",40,9000")  # temperature and memory are logged
    cards.clear()
    until(lambda: worker.look() is not None and queue.job(anywhere).slot == "cpu", 30)
    assert (queue.job(anywhere).state, queue.job(anywhere).folder) == ("running", folder) and queue.job(on_gpu).state == "queued"
    cards.append(Gpu("C", 9_000, 10_000, 40))
    until(lambda: worker.look() is not None and queue.job(on_gpu).slot == "C", 30)
    for number in (anywhere, on_gpu):
        queue.stop(number)
    until(lambda: worker.look() is not None and not queue.jobs("running", "stopping"), 30)
