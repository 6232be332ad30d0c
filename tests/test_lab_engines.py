"""The queue's jobs on other machines: real Ray and Dask clusters of two nodes on loopback, one of which dies in the middle, and submitit's processes.

The jobs are notebooks that take a few seconds of sleep, so that two busy cores can afford them. CLUSTER_NOTEBOOK=nbs/tutorialQA.ipynb runs
eight smoke runs of that tutorial in this checkout instead, and CLUSTER_REPORT=FILE writes what was counted. Ray's twenty processes start within its own
fixed limits only on cores that nothing else uses: its test runs by `make clusters`, not in `make test`.
"""
import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from compute_layers.lab.commands import main
from compute_layers.lab.engines import Attempt, DaskEngine, Dispatcher, RayEngine, SlurmEngine, bacalhau_job
from compute_layers.lab.jobs import JobError, Queue
from test_lab_jobs import until
from test_lab_runs import GUARD, PARAMETERS, RUN, TRAIN, home, write_notebook  # noqa: F401  (home is a fixture)

ROOT = Path(__file__).resolve().parents[1]
LIGHT = """
import os, time
time.sleep({seconds})
descriptor = os.open(run.folder.parent / "ledger.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(descriptor, f"{{run.folder.name}}\\n".encode())
os.close(descriptor)
run.save_metrics({{"resumed": run.resumed}})
"""

RAY = """
import os, socket, sys, time
import psutil
import ray._private.node as nodes
import ray._private.services as services
from ray.cluster_utils import Cluster

def patient(*arguments, once=services.get_node):  # Ray gives a node 30 s to start its processes; two busy cores may need more
    deadline = time.monotonic() + 240
    while True:
        try:
            return once(*arguments)
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)

services.get_node = patient

def settled(family=psutil.Process()):  # a raylet gives its agents 15 s, fixed: let the dashboard's ten processes finish loading before
    def used():
        total = 0.0
        for process in family.children(recursive=True):
            try:
                total += sum(process.cpu_times()[:2])
            except psutil.Error:
                pass
        return total
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        before = used()
        time.sleep(3)
        if used() - before < 0.4:
            return

def start_when_quiet(self, start=nodes.Node.start_ray_processes):
    settled()
    start(self)

nodes.Node.start_ray_processes = start_when_quiet

def ports():  # of a node's agents: those that are named need not be waited for, 15 s at most
    taken = [socket.socket() for _ in range(4)]
    for one in taken:
        one.bind(("127.0.0.1", 0))
    numbers = [one.getsockname()[1] for one in taken]
    for one in taken:
        one.close()
    return dict(zip(("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port"), numbers))

cluster = Cluster(initialize_head=True, head_node_args={**ports(), "num_cpus": 2, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": int(sys.argv[1]), "object_store_memory": 80 * 2**20})
second = cluster.add_node(**ports(), num_cpus=2, object_store_memory=80 * 2**20)
cluster.wait_for_nodes(timeout=240)
print("up", flush=True)
for line in sys.stdin:
    if line.strip() == "remove":
        cluster.remove_node(second, allow_graceful=False)
        print("removed", flush=True)
    else:
        break
cluster.shutdown()
"""

DASK = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=2, host="127.0.0.1", dashboard_address=None) as cluster:
        print(cluster.scheduler_address, flush=True)
        for line in sys.stdin:
            if line.strip() == "remove":
                worker = list(cluster.workers.values())[1]
                worker.auto_restart = False
                worker.process.process._process.kill()  # the nanny's child, at once
                print("removed", flush=True)
            else:
                break
"""


class ClusterProcess:
    """A cluster that lives in a process of its own, and obeys: remove, or end."""

    def __init__(self, folder: Path, code: str, *arguments: str, **variables: str):
        (folder / "cluster.py").write_text(code)
        environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
        self.errors = open(folder / "cluster.log", "wb")
        self.process = subprocess.Popen([sys.executable, str(folder / "cluster.py"), *arguments], env=environment, text=True, start_new_session=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        with contextlib.suppress(OSError):  # before others while it starts, where that is allowed: Ray's agents have 15 s to be there
            Path(f"/proc/{self.process.pid}/autogroup").write_text("-20")

    def said(self, *words: str) -> str:
        for line in self.process.stdout:
            if line.startswith(words):
                return line.strip()
        raise AssertionError(f"the cluster did not come up: {Path(self.errors.name).read_text(errors='replace')[-2000:]}")

    def tell(self, word: str) -> None:
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(40)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def no_process_of(root: Path) -> bool:
    """Is every papermill and kernel of this checkout gone?"""
    import psutil

    for process in psutil.process_iter():
        try:
            if process.environ().get("COMPUTE_LAYERS_RUN_FOLDER", "").startswith(str(root)) and process.status() != psutil.STATUS_ZOMBIE:
                return False
        except psutil.Error:
            pass
    return True


@pytest.fixture
def eight(home):  # noqa: F811
    """A queue of eight jobs: light ones in a checkout of their own, or a tutorial in this one."""
    pytest.importorskip("papermill")
    named = os.environ.get("CLUSTER_NOTEBOOK")
    if named:
        for place in ("nbs", "data", "data.dvc"):
            (home / place).unlink() if (home / place).is_file() else (home / place).rmdir() if (home / place).is_dir() else None
            (home / place).symlink_to(ROOT / place)
    else:
        write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, LIGHT.format(seconds=3))
    queue = Queue(home)
    for seed in range(8):
        queue.add(named or "nbs/demo.ipynb", [("seed" if named else "steps", str(seed))], device="cpu")
    return queue


def run_and_remove_a_node(queue: Queue, engine, cluster: ClusterProcess) -> None:
    """All eight are handed over; when two are done, a node dies with what it does; every result is there, once."""
    began, dispatcher = time.monotonic(), Dispatcher(queue, engine)
    limit = 900 if os.environ.get("CLUSTER_NOTEBOOK") else 400
    until(lambda: dispatcher.look() is not None and len(queue.jobs("done")) >= 2, limit)
    handed = {job.id: dispatcher.attempts[job.id][0].number for job in queue.jobs("running")}
    assert handed, "the node was to die while jobs run"
    cluster.tell("remove")
    cluster.said("removed")
    until(lambda: dispatcher.look() is not None and not queue.jobs("queued", "running", "stopping"), limit)
    jobs = queue.jobs()
    assert [job.state for job in jobs] == ["done"] * 8, [(job.state, job.message) for job in jobs]
    folders = [queue.root / job.folder for job in jobs]
    assert len(set(folders)) == 8 and all((folder / "metrics.json").is_file() for folder in folders)
    assert {path for path in (queue.root / "runs").glob("*/run.json")} == {folder / "run.json" for folder in folders}
    at_risk = {queue.root / queue.job(number).folder for number in handed}  # their node may have died after the program's end and before the outcome was written
    for folder in folders:  # one success each, in the lab's own books …
        outcomes = [json.loads(path.read_text()) for path in folder.glob(".outcome-*")]
        ran = sum(said["status"] == 0 and said["ran"] for said in outcomes)  # an attempt that finds it done says so, and runs nothing
        found_done = any(said["status"] == 0 and not said["ran"] for said in outcomes)
        assert ran == 1 or (ran == 0 and found_done and folder in at_risk), (folder, outcomes)
    if (ledger := queue.root / "runs" / "ledger.txt").exists():  # what the programs did beside it: once, but for those whose node died after it and before their outcome
        lines = Counter(ledger.read_text().split())
        assert set(lines) == {folder.name for folder in folders}
        assert all(count == 1 or (queue.root / "runs" / name in at_risk and count == 2) for name, count in lines.items()), lines
    again = [job.id for job in jobs if job.tries > 1 or len(json.loads((queue.root / job.folder / "run.json").read_text()).get("resumed", []))]
    until(lambda: no_process_of(queue.root), 30)
    if report := os.environ.get("CLUSTER_REPORT"):
        with open(report, "a") as file:
            file.write(json.dumps({"engine": engine.name, "jobs": 8, "done": 8, "arrived_twice": 0, "lost": 0, "begun_again": len(again),
                                   "seconds": round(time.monotonic() - began, 1)}) + "\n")


@pytest.mark.cluster
def test_ray_loses_a_node(eight, tmp_path, monkeypatch):
    token, port = secrets.token_hex(32), free_port()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # before Ray is imported: it looks once
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    pytest.importorskip("ray")
    cluster = ClusterProcess(tmp_path, RAY, str(port), RAY_USAGE_STATS_ENABLED="0", RAY_DASHBOARD_STARTUP_TIMEOUT_S="400")
    try:
        cluster.said("up")
        run_and_remove_a_node(eight, RayEngine(f"http://127.0.0.1:{port}"), cluster)
    finally:
        cluster.end()


def test_a_ray_cluster_without_a_token_is_refused(monkeypatch):
    """Anything that answers its jobs to a stranger is an open door."""
    pytest.importorskip("ray")
    import http.server
    import threading

    class Open(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(JobError, match="RAY_AUTH_MODE=token"):
            RayEngine(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    with pytest.raises(JobError, match="no Ray cluster answers"):
        RayEngine(f"http://127.0.0.1:{free_port()}")


def test_dask_loses_a_worker(eight, tmp_path):
    pytest.importorskip("distributed")
    cluster = ClusterProcess(tmp_path, DASK)
    try:
        engine = DaskEngine(cluster.said("tcp://"))
        run_and_remove_a_node(eight, engine, cluster)
        engine.client.close()
    finally:
        cluster.end()


def test_submitit_runs_resumes_and_stops(home):  # noqa: F811
    """SLURM's engine with submitit's own processes: one job killed in the middle goes on from its checkpoint, one is stopped."""
    pytest.importorskip("submitit")
    psutil = pytest.importorskip("psutil")
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, TRAIN)
    queue = Queue(home)
    killed, stopped = queue.add("nbs/demo.ipynb", [("steps", "150")]), queue.add("nbs/demo.ipynb", [("steps", "100000")])
    dispatcher = Dispatcher(queue, SlurmEngine("local", home / "runs" / "slurm"))
    dispatcher.look()
    folders = {number: home / queue.job(number).folder for number in (killed, stopped)}
    until(lambda: all(list(folder.glob("checkpoints/*.safetensors")) for folder in folders.values()))
    queue.stop(stopped)
    for process in psutil.process_iter():  # the machine dies: everything of this job at once
        try:
            if process.environ().get("COMPUTE_LAYERS_RUN_FOLDER") == str(folders[killed]) or f'"job": {killed},' in " ".join(process.cmdline()):
                process.kill()
        except psutil.Error:
            pass
    until(lambda: dispatcher.look() is not None and not queue.jobs("queued", "running", "stopping"))
    assert (queue.job(killed).state, queue.job(stopped).state) == ("done", "stopped"), queue.jobs()
    assert json.loads((folders[killed] / "metrics.json").read_text())["resumed_from"] >= 20
    assert list(folders[stopped].glob("checkpoints/*.safetensors")) and not (folders[stopped] / "metrics.json").exists()
    until(lambda: no_process_of(home), 30)


def test_two_attempts_at_once_do_the_work_once(home):  # noqa: F811
    """What a partitioned network makes: the first attempt lives on, the second waits for it and then does nothing."""
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, LIGHT.format(seconds=2))
    attempts = [Attempt(1, number, str(home), "nbs/demo.ipynb", [("steps", "3")], "runs/one") for number in (1, 2)]
    children = [subprocess.Popen(attempt.command(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) for attempt in attempts]
    assert [child.wait(90) for child in children] == [0, 0]
    assert [attempt.outcome() for attempt in attempts] == [0, 0]
    assert (home / "runs" / "ledger.txt").read_text().split() == ["one"] and [path.name for path in (home / "runs").glob("*/demo*.ipynb")] == ["demo.ipynb"]


# The form of Bacalhau's own job files (its repository's testdata): what is there, and of which type.
_BACALHAU = {"Name": str, "Type": {"batch", "service", "ops", "daemon"}, "Namespace": str, "Count": int, "Tasks": [
    {"Name": str, "Engine": {"Type": {"docker", "wasm"}, "Params": {"Image": str, "Entrypoint": [str], "Parameters": [str]}},
     "?InputSources": [{"Target": str, "Source": {"Type": str, "Params": dict}}], "?Resources": {"GPU": str},
     "Publisher": {"Type": {"local", "s3", "ipfs"}}, "ResultPaths": [{"Name": str, "Path": str}]}]}


def faults(value, form, place="job") -> list[str]:
    """Where a value is not of the form."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{place} is no mapping"]
        known = {key.lstrip("?"): (key[0] == "?", part) for key, part in form.items()}
        found = [f"{place}.{key} is unknown" for key in value if key not in known]
        for key, (optional, part) in known.items():
            found += faults(value[key], part, f"{place}.{key}") if key in value else [] if optional else [f"{place}.{key} is missing"]
        return found
    if isinstance(form, list):
        return [] if not isinstance(value, list) else sum((faults(item, form[0], f"{place}[]") for item in value), []) if value else [f"{place} is empty"]
    if isinstance(form, set):
        return [] if value in form else [f"{place} is {value!r}"]
    return [] if isinstance(value, form) and not isinstance(value, bool) else [f"{place} is a {type(value).__name__}"]


def test_the_bacalhau_file_has_bacalhaus_form(home, capsys):  # noqa: F811
    yaml = pytest.importorskip("yaml")
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN)
    queue = Queue(home)
    number = queue.add("nbs/demo.ipynb", [("steps", "5")], device="gpu")
    described = bacalhau_job(queue.job(number), "image:1", inputs=[("/inputs", {"Type": "s3", "Params": {"Bucket": "b"}})])
    assert faults(described, _BACALHAU) == []
    assert faults({**described, "Count": "1", "Extra": 1, "Type": "job"}, _BACALHAU) == ["job.Extra is unknown", "job.Type is 'job'", "job.Count is a str"]
    assert main(["job", "bacalhau", str(number), "--image", "image:1"]) == 0
    written = yaml.safe_load(capsys.readouterr().out)
    assert faults(written, _BACALHAU) == [] and "compute_layers run nbs/demo.ipynb -p steps 5" in written["Tasks"][0]["Engine"]["Params"]["Parameters"][0]


def test_the_bacalhau_command_runs(home):  # noqa: F811
    """What the container would do, done here with /bin/sh: the run folder arrives in the outputs, and the exit status is the run's."""
    write_notebook(home / "nbs" / "demo.ipynb", GUARD, PARAMETERS, RUN, LIGHT.format(seconds=0))
    queue, outputs = Queue(home), home / "outputs"
    outputs.mkdir()
    number = queue.add("nbs/demo.ipynb", [("steps", "5")])
    engine = bacalhau_job(queue.job(number), "image:1", checkout=str(home))["Tasks"][0]["Engine"]["Params"]
    (home / "bin").mkdir()
    (home / "bin" / "compute_layers").write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; from compute_layers.lab.commands import main; sys.exit(main())' \"$@\"\n")
    (home / "bin" / "compute_layers").chmod(0o755)
    path = os.pathsep.join([str(home / "bin"), os.environ["PATH"]])
    done = subprocess.run([*engine["Entrypoint"], engine["Parameters"][0].replace("/outputs", str(outputs))], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    (metrics,) = outputs.glob("*/metrics.json")
    assert json.loads(metrics.read_text()) == {"resumed": False}


def test_mistakes_are_one_line(home, capsys):  # noqa: F811
    for arguments, said in ((["job", "work", "--engine", "dask"], "--address"), (["job", "bacalhau", "7", "--image", "x"], "no job 7")):
        assert main(arguments) == 1
        assert said in (error := capsys.readouterr().err) and error.count("\n") == 1
