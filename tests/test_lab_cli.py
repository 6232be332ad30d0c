"""The command line follows the usual habits: help, exit codes, JSON, completion, quiet in logs, and no network."""
import argparse
import json
import os
import re
import subprocess
import sys

import pytest

from compute_layers.lab.commands import _parser, main
from compute_layers.lab.jobs import Queue
from compute_layers.lab.runs import new_run
from test_lab_runs import GUARD, PARAMETERS, RUN, TRAIN, cli, home, write_notebook  # noqa: F401  (home is a fixture)


def leaves(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    """Every command with its parser."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    found = [(path, parser)] if path else []
    for action in below:
        for name, part in action.choices.items():
            found += leaves(part, (*path, name))
    return found


COMMANDS = leaves(_parser())
REPORTING = {("job", "run"), ("run",), ("weights", "verify"), ("runs",), ("compare",), ("doctor",), ("trash", "list"), ("job", "list"), ("job", "queue"), ("job", "bacalhau"), ("journal", "check")}


@pytest.mark.parametrize("path", [path for path, _ in COMMANDS], ids=" ".join)
def test_every_command_explains_itself(path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])
    assert ended.value.code == 0
    assert "usage: compute_layers " + " ".join(path) in capsys.readouterr().out


def test_every_argument_is_explained_and_reports_come_as_json():
    for path, parser in COMMANDS:
        options = {option for action in parser._actions for option in action.option_strings}
        assert ("--json" in options) == (path in REPORTING), path


def test_exit_codes(home, capsys):  # noqa: F811
    assert main(["runs"]) == 0 and main(["compare", "nowhere", "here"]) == 1
    for wrong in ([], ["nothing"], ["runs", "--nothing"], ["journal", "new", "x"]):
        with pytest.raises(SystemExit) as ended:
            main(wrong)
        assert ended.value.code == 2
    capsys.readouterr()


def test_reports_as_json(home, capsys):  # noqa: F811
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN)
    one, two = new_run("demo", {"lr": 0.1}), new_run("demo", {"lr": 0.2})
    one.save_metrics({"accuracy": 0.5}), two.save_metrics({"accuracy": 0.75})
    Queue(home).add("nbs/demo.ipynb", [("steps", "5")])

    def said(*arguments: str):
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    assert [row["metrics.accuracy"] for row in said("runs")] == [0.5, 0.75]
    difference = said("compare", str(one.folder), str(two.folder))
    assert difference["parameters"]["lr"] == {"first": 0.1, "second": 0.2} and difference["results"]["accuracy"]["second"] == 0.75
    assert said("doctor") == [] or isinstance(said("doctor"), list)
    assert said("job", "list")[0]["notebook"] == "nbs/demo.ipynb" and said("job", "queue")[0]["state"] == "queued"
    main(["discard", str(two.folder)])
    capsys.readouterr()
    assert said("trash", "list")[0]["came_from"] == f"runs/{two.folder.name}"


def test_a_run_in_a_log_and_as_json(home):  # noqa: F811
    """Nothing rewrites a line where nobody looks; the standard output holds JSON alone."""
    pytest.importorskip("papermill")
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, TRAIN)
    closed = {name: "http://127.0.0.1:9" for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")}  # and nothing needs a network
    out, err = cli("run", "nbs/demo.ipynb", "-p", "steps", "30", "--no-html", "--json", env={**os.environ, **closed}).communicate(timeout=120)
    told = json.loads(out)
    assert told["status"] == 0 and told["metrics"]["accuracy"] == {"left_right": 0.991}, err
    assert "\r" not in err and "\033" not in err and re.search(r"^cell \d+ of 5", err, re.M)
    assert len(err.splitlines()) < 12


@pytest.mark.parametrize("dead", [2, 3])
def test_a_kernel_that_does_not_come_up_is_started_again(home, dead):  # noqa: F811
    """Two that start at once can be given the same port. Nothing has run then, so a run needn't fail for it; one that never comes up does."""
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, "run.save_metrics({'accuracy': 0.5})")
    kernel, began = home / "jupyter" / "kernels" / "python3", home / "began"
    kernel.mkdir(parents=True)
    (home / "kernel.py").write_text(
        "import os, sys\n"
        f"open({str(began)!r}, 'a').write('x')\n"
        f"if os.path.getsize({str(began)!r}) <= {dead}: sys.exit('Address already in use')\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'ipykernel_launcher', *sys.argv[1:]])\n")
    (kernel / "kernel.json").write_text(json.dumps({"argv": [sys.executable, str(home / "kernel.py"), "-f", "{connection_file}"], "display_name": "Python 3", "language": "python"}))
    run = cli("run", "nbs/demo.ipynb", "--no-html", env={**os.environ, "JUPYTER_PATH": str(home / "jupyter")})
    _, err = run.communicate(timeout=180)
    assert began.read_text() == "x" * 3 and err.count("once more") == 2
    assert (run.returncode == 0) == (dead == 2) and len(list(home.glob("runs/*/metrics.json"))) == (dead == 2)


def test_a_reader_that_has_seen_enough(home):  # noqa: F811
    for number in range(3):
        new_run("demo", {f"a{k}": k for k in range(400)})
    command = f"{sys.executable} -c 'import sys; from compute_layers.lab.commands import main; sys.exit(main([\"runs\", \"--json\"]))' | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[" and done.stderr == ""


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, tmp_path, capsys):
    """Each script holds every command; bash's is tried in bash."""
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for path, _ in COMMANDS:
        assert path[-1] in script
    if shell != "bash":
        assert script.startswith("#compdef compute_layers") if shell == "zsh" else "complete -c compute_layers" in script
        return
    (tmp_path / "completion.sh").write_text(script)
    ask = ('source "$1"; COMP_WORDS=(compute_layers job re); COMP_CWORD=2; COMP_LINE="compute_layers job re"; COMP_POINT=${#COMP_LINE}; '
           'eval "$(complete -p compute_layers | sed -E "s/.*-F ([^ ]+).*/\\1 compute_layers re job/")"; echo "${COMPREPLY[@]}"')
    done = subprocess.run(["bash", "-c", ask, "bash", str(tmp_path / "completion.sh")], capture_output=True, text=True, timeout=30)
    assert set(done.stdout.split()) == {"resume", "retry"}, done.stderr
