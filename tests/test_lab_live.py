"""Runs as DVC's experiments in a scratch repository of git and DVC, and as a Trackio page; nothing needs a network."""
import json
import os
import subprocess
import sys

import pytest

from compute_layers.lab.commands import main
from compute_layers.lab.live import LiveView
from compute_layers.lab.runs import new_run
from test_lab_runs import home  # noqa: F401  (a fixture)


def tool(*command: str) -> str:
    "A command that must work, with every way out of this machine closed."
    closed = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **closed, "DVC_NO_ANALYTICS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout


def a_run(rate: float):
    run = new_run("demo", {"lr": rate, "preset": "smoke"}, seeds=[0])
    run.save_curve("loss", [{"step": step, "loss": rate / step, "lr": rate} for step in (10, 20, 30)])
    run.save_metrics({"accuracy": {"near": 0.5 + rate, "far": 0.25}, "kind": "a text"})
    return run


def test_dvc_sees_metrics_plots_and_experiments(home):  # noqa: F811
    pytest.importorskip("dvclive")
    dvc = [sys.executable, "-m", "dvc"]
    (home / ".gitignore").write_text("/runs/\n")
    (home / "data.dvc").unlink()  # `home` has no data, and DVC would miss them
    for command in (["git", "init", "-q"], ["git", "config", "user.name", "t"], ["git", "config", "user.email", "t@example.org"],
                    [*dvc, "init", "-q"], ["git", "add", "-A"], ["git", "commit", "-qm", "one"]):
        tool(*command)
    one, two = a_run(0.1), a_run(0.2)
    assert main(["experiment", str(one.folder), "--save"]) == 0
    (shown,) = json.loads(tool(*dvc, "metrics", "show", "--json")).values()
    (metrics,) = shown["data"].values()
    assert metrics["data"]["accuracy"] == {"near": 0.6, "far": 0.25} and metrics["data"]["loss"]["loss"] == 0.1 / 30
    tool(*dvc, "plots", "show", "-o", "page")
    assert "loss" in (home / "page" / "index.html").read_text()
    assert "0.01" in (home / "dvclive" / "plots" / "metrics" / "loss" / "loss.tsv").read_text()

    assert main(["experiment", str(two.folder), "--save"]) == 0
    table = tool(*dvc, "exp", "show", "--csv")
    assert one.folder.name in table and two.folder.name in table and "0.7" in table
    difference = json.loads(tool(*dvc, "exp", "diff", one.folder.name, two.folder.name, "--json"))
    assert round(difference["metrics"]["dvclive/metrics.json"]["accuracy.near"]["diff"], 6) == 0.1
    assert difference["params"]["dvclive/params.yaml"]["lr"] == {"old": 0.1, "new": 0.2, "diff": 0.1}
    tool(*dvc, "exp", "apply", one.folder.name)  # and the first comes back
    assert "lr: 0.1" in (home / "dvclive" / "params.yaml").read_text()


def test_a_folder_of_somebody_else_is_left_alone(home, capsys):  # noqa: F811
    pytest.importorskip("dvclive")
    (home / "dvclive").mkdir()
    (home / "dvclive" / "precious").touch()
    assert main(["experiment", str(a_run(0.1).folder)]) == 1
    assert "move it away" in capsys.readouterr().err and (home / "dvclive" / "precious").exists()


def test_trackio_shows_a_run_without_a_network(home):  # noqa: F811
    """In a process of its own, for trackio starts a server; the numbers are read back with its command."""
    pytest.importorskip("trackio")
    code = ("from compute_layers.lab.runs import new_run\nfrom compute_layers.lab.live import LiveView\nrun = new_run('demo', {'lr': 0.1})\n"
            "with LiveView(run, dvclive=False, trackio=True) as view:\n    for step in (10, 20, 30):\n        view({'step': step, 'loss': 1 / step})\n"
            "assert not view.silent\nprint('DONE', run.folder.name)")
    out = tool(sys.executable, "-c", code)
    name = out.split("DONE ")[1].split()[0]
    os.environ["TRACKIO_DIR"] = str(home / "runs" / "trackio")
    try:
        listed = tool(sys.executable, "-m", "trackio.cli", "get", "run", "--project", "demo", "--run", name, "--json")
    finally:
        del os.environ["TRACKIO_DIR"]
    assert "loss" in listed and (home / "runs" / "trackio").is_dir()


def test_the_core_needs_neither(home):  # noqa: F811
    code = "import sys, compute_layers.lab.runs, compute_layers.lab.train, compute_layers.lab.live, compute_layers.lab.commands; print([m for m in ('dvclive', 'trackio', 'dvc', 'ray', 'distributed', 'submitit', 'optuna', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
    with LiveView(new_run("x", {}), dvclive=False) as view:
        view({"step": 1, "loss": 2.0})
