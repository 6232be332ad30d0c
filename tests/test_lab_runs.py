"""Run folders, the parameter guard and the command line, with real papermill runs."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compute_layers.lab import commands
from compute_layers.lab.runs import claim_folder, data_hash, new_run, parameter_guard, repo_root

GUARD = "from compute_layers.lab.runs import new_run, parameter_guard\nguard = parameter_guard(globals())"
PARAMETERS = "steps = 100  # how long\nlr: float = 1e-3\npreset = 'smoke'"
RUN = "parameters = guard.check()\nrun = new_run('demo', parameters, seeds=[7])\nprint(run.folder, run.resumed)"
TRAIN = """
import time, torch
from torch import nn
from compute_layers.lab.train import train
torch.manual_seed(0)
model = nn.Linear(2, 1)
def loss_fn(model, step):
    time.sleep(0.01)
    return (model(torch.ones(4, 2)) - 1).square().mean(), {"samples": 4}
history = train(model, loss_fn, steps=steps, lr=lr, threads=1, log_every=10, checkpoints=run.path("checkpoints"), checkpoint_every=20, resume=run.resumed)
run.save_curve("loss", history.rows)
run.save_metrics({"accuracy": {"left_right": 0.991}, "resumed_from": history.resumed_from})
"""


def write_notebook(path: Path, *sources: str, tagged: int | None = 1) -> Path:
    cells = [{"cell_type": "code", "id": f"c{index}", "execution_count": None, "outputs": [], "source": source,
              "metadata": {"tags": ["parameters"]} if index == tagged else {}} for index, source in enumerate(sources)]
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": cells}))
    return path


def papermill(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("papermill")
    environment = {key: value for key, value in os.environ.items() if key not in ("IN_TEST", "COMPUTE_LAYERS_RUN_FOLDER")}
    command = [sys.executable, "-m", "papermill", "-k", "python3", "--no-progress-bar", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A small checkout of its own, so that nothing is written into the real one."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = compute_layers\n")
    (tmp_path / "data.dvc").write_text("outs:\n- md5: 0123abcd.dir\n  path: data\n")
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("IN_TEST", "COMPUTE_LAYERS_RUN_FOLDER", "COMPUTE_LAYERS_RESUME", "COMPUTE_LAYERS_COMMAND"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_a_run_folder_is_never_overwritten(home):
    runs = [new_run("demo", {"lr": 0.1}) for _ in range(3)]
    names = [run.folder.name for run in runs]
    assert names[1] == names[0] + "-2" and names[2] == names[0] + "-3" and runs[0].folder.parent == home / "runs"
    runs[0].save_metrics({"a": 1})
    assert not (runs[1].folder / "metrics.json").exists()
    record = json.loads((runs[0].folder / "run.json").read_text())
    assert record["data"] == data_hash() == "0123abcd.dir" and record["commit"] is None and record["versions"]["torch"]


def test_many_processes_get_many_folders(tmp_path):
    code = f"from compute_layers.lab.runs import claim_folder\nfor _ in range(20): print(claim_folder({str(tmp_path / 'x')!r}))"
    children = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = [line for child in children for line in child.communicate()[0].split()]
    assert len(folders) == len(set(folders)) == 40 and all(Path(folder).is_dir() for folder in folders)
    assert claim_folder(tmp_path / "x").name == "x-41"


def test_commit_and_dirty_diff_are_recorded(home):
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=home, check=True)
    (home / ".git" / "info" / "exclude").write_text("/runs/\n")
    clean = json.loads(new_run("a", {}).path("run.json").read_text())
    assert len(clean["commit"]) == 40 and clean["diff"] is None
    (home / "settings.ini").write_text("[DEFAULT]\nlib_name = compute_layers\nchanged = yes\n")
    (home / "new.py").write_text("")
    run = new_run("b", {})
    patch = (run.folder / "diff.patch").read_text()
    assert json.loads(run.path("run.json").read_text())["diff"] == "diff.patch" and "+changed = yes" in patch and "# untracked: new.py" in patch


def test_in_a_notebook_test_the_folder_is_temporary(home, monkeypatch):
    monkeypatch.setenv("IN_TEST", "1")
    assert not new_run("demo", {}).folder.is_relative_to(home) and not (home / "runs").exists()


def test_the_lab_needs_no_torch_to_keep_books():
    code = "import sys, compute_layers.lab.commands, compute_layers.lab.journal, compute_layers.lab.runs; print('torch' in sys.modules, 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == ["False", "False"]


def test_papermill_decides_the_folder_and_unknown_names_are_errors(home):
    notebook = write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN)
    (home / "runs" / "mine").mkdir(parents=True)
    good = papermill("nbs/demo.ipynb", "runs/mine/demo.ipynb", "-p", "steps", "5", cwd=home)
    assert good.returncode == 0, good.stderr
    record = json.loads((home / "runs" / "mine" / "run.json").read_text())
    assert record["parameters"] == {"steps": 5, "lr": 1e-3, "preset": "smoke"} and record["seeds"] == [7]
    assert record["command"] == "papermill -k python3 --no-progress-bar nbs/demo.ipynb runs/mine/demo.ipynb -p steps 5"

    bad = papermill(str(notebook), "runs/bad.ipynb", "-p", "step", "5", cwd=home)
    assert bad.returncode != 0
    assert "unknown parameter 'step' (did you mean 'steps'?). Known parameters: steps, lr, preset" in bad.stderr


def test_an_output_beside_other_files_is_no_run_folder(home, monkeypatch):
    monkeypatch.setattr("compute_layers.lab.runs.papermill_output", lambda: home / "out.ipynb")
    assert new_run("demo", {}).folder.parent == home / "runs"
    (home / "fresh").mkdir()
    (home / "fresh" / "stdout.log").touch()
    monkeypatch.setattr("compute_layers.lab.runs.papermill_output", lambda: home / "fresh" / "out.ipynb")
    assert [new_run("demo", {}).folder.name for _ in range(2)] == ["fresh", "fresh-2"]


def test_a_lost_parameters_tag_is_an_error(home):
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, tagged=None)
    done = papermill("nbs/demo.ipynb", "out.ipynb", "-p", "steps", "5", cwd=home)
    assert done.returncode != 0 and "tag 'parameters'" in done.stderr


def test_the_guard_in_a_session_where_cells_are_run_again():
    session = {"In": ["", GUARD]}
    guard = parameter_guard(session)
    session |= {"steps": 3, "lr": 1.0}
    session["In"] += ["# Parameters\nsteps = 3\nlr = 1.0", "guard.check()"]  # the tagged cell may begin like papermill's
    assert guard.check() == {"steps": 3, "lr": 1.0}
    session |= {"model": 1}
    session["In"] += ["model = 1", "%timeit 1\nguard.check()"]
    assert guard.check() == {"steps": 3, "lr": 1.0}


def cli(*arguments: str, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from compute_layers.lab.commands import main; sys.exit(main())", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_run_stop_and_resume_from_the_command_line(home):
    pytest.importorskip("papermill")
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, TRAIN)
    child = cli("run", "nbs/demo.ipynb", "-p", "steps", "250", "-p", "lr", "0.02", "--no-html")
    deadline = time.monotonic() + 60
    while not list(home.glob("runs/*/checkpoints/*.safetensors")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 143, err
    (folder,) = home.glob("runs/*")
    assert f"--resume runs/{folder.name}" in err
    assert "TrainingStopped" in (folder / "demo.ipynb").read_text()  # papermill lived to write it
    stopped_at = max(int(path.stem.split("-")[1]) for path in (folder / "checkpoints").glob("*.safetensors"))
    assert 0 < stopped_at < 250 and not (folder / ".progress").exists()

    out, err = cli("run", "nbs/demo.ipynb", "--resume", str(folder), "--no-html").communicate(timeout=60)  # with the run's own parameters
    assert "accuracy.left_right   99.10%" in out and f"report: runs/{folder.name}/demo-part2.ipynb" in out, err
    record = json.loads((folder / "run.json").read_text())
    assert record["parameters"] == {"steps": 250, "lr": 0.02, "preset": "smoke"} and len(record["resumed"]) == 1
    assert record["command"] == "compute_layers run nbs/demo.ipynb -p steps 250 -p lr 0.02"
    assert record["resumed"][0]["command"] == f"compute_layers run nbs/demo.ipynb --resume runs/{folder.name}"
    assert json.loads((folder / "metrics.json").read_text())["resumed_from"] == stopped_at
    steps = [int(line.split(",")[0]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]
    assert steps == list(range(10, 251, 10))  # whole curves
    assert [path.name for path in home.glob("runs/*")] == [folder.name]


def test_a_run_folder_holds_all_that_happened(home):
    pytest.importorskip("papermill")
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, TRAIN)
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], cwd=home, check=True)
    (home / ".git" / "info" / "exclude").write_text("/runs/\n")
    (home / "settings.ini").write_text("[DEFAULT]\nlib_name = compute_layers\nchanged = yes\n")
    child = cli("run", "nbs/demo.ipynb", "-p", "steps", "30", "--no-html")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    (folder,) = home.glob("runs/*")
    assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {
        "demo.ipynb", "demo.log", "run.json", "diff.patch", "metrics.json", "loss.csv", "checkpoints"}
    record = json.loads((folder / "run.json").read_text())
    assert record["parameters"] == {"steps": 30, "lr": 1e-3, "preset": "smoke"} and record["seeds"] == [7]
    assert record["commit"] == subprocess.run(["git", "rev-parse", "HEAD"], cwd=home, capture_output=True, text=True).stdout.strip()
    assert record["diff"] == "diff.patch" and "+changed = yes" in (folder / "diff.patch").read_text() and record["data"] == "0123abcd.dir"
    assert {"cpu", "cores", "gpu", "system"} <= set(record["device"]) and {"python", "torch", "numpy", "compute_layers"} <= set(record["versions"])
    assert record["started"] < record["ended"] and record["command"] == "compute_layers run nbs/demo.ipynb -p steps 30"
    assert str(folder.relative_to(home)) in (folder / "demo.log").read_text()  # what the cells printed
    assert json.loads((folder / "metrics.json").read_text())["accuracy"] == {"left_right": 0.991}


def test_a_failing_notebook_fails_and_shows_why(home):
    pytest.importorskip("papermill")
    write_notebook(home / "nbs" / "demo.ipynb", "print('so far')", "x = 1", "raise KeyError('a reason')")
    child = cli("run", "nbs/demo.ipynb", "--no-html")
    out, err = child.communicate(timeout=60)
    assert child.returncode == 1 and "a reason" in err and "report" not in out


@pytest.mark.parametrize("arguments, message", [
    (["run", "nbs/demo.ipynb", "-p", "setps", "5"], "unknown parameter 'setps' (did you mean 'steps'?). nbs/demo.ipynb knows: steps, lr, preset"),
    (["run", "nbs/none.ipynb"], "none.ipynb"),
    (["run", "nbs/demo.ipynb", "--resume", "runs/none"], "runs/none holds no run to resume"),
    (["run", "nbs/demo.ipynb", "--name", "a/b"], "a/b"),
    (["promote", "runs/none", "tiny"], "there is no such folder"),
    (["weights", "verify", "data/weights/none"], "dvc pull"),
    (["journal", "new", "x", "--question", "q", "--prediction", " ", "--probability", "0.5"], "no prediction"),
    (["journal", "close", "none", "runs/none", "--verdict", "mixed"], "0 journal entries"),
])
def test_mistakes_are_answered_in_one_line(home, capsys, arguments, message):
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN)
    assert commands.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error.replace(f"{home}/", "") and error.count("\n") == 1 and not (home / "runs").exists()


def test_the_repo_root_is_found_from_below(home):
    (home / "a" / "b").mkdir(parents=True)
    assert repo_root(home / "a" / "b") == home
    assert repo_root("/") == Path(__file__).resolve().parents[1]


def test_a_gpu_is_named_before_torch_is_imported(tmp_path):
    """`new_run` comes first in a notebook; run.json must name the card all the same."""
    pretended = tmp_path / "nvidia-smi"
    pretended.write_text("#!/bin/sh\necho 'NVIDIA Pretended 80GB'\n")
    pretended.chmod(0o755)
    code = "import sys; from compute_layers.lab.runs import describe_device; print('torch' in sys.modules, describe_device()['gpu'])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}).stdout
    assert said.split(maxsplit=1) == ["False", "NVIDIA Pretended 80GB\n"]
