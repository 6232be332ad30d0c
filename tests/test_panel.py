"""The window into its mind: the machine behind it, and the panel itself in JupyterLab, in a real browser."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch

from compute_layers import window
from compute_layers.game.world import TURN
from compute_layers.window import MindPanel, PanelState

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 90  # for JupyterLab, a kernel and the weights to be there on a busy machine


# ---------------------------------------------------------------------------------------------------------------------
# without a screen


class Raised:
    "A brain that can do everything, by rule."

    class config:
        size, canvases = 64, 2

    def answer(self, images, prompts):
        return [f"I see {images.shape[1] if images.ndim == 5 else 1}"]

    def reconstruct(self, images):
        return torch.full((1, 3, 64, 64), 0.5)

    def draw(self, images, prompts):
        if prompts == "nonsense":
            raise ValueError("this brain does not know the word 'nonsense'")
        return torch.ones(1, 3, 64, 64)

    def act(self, images, prompts="as you like"):
        return torch.tensor([4 if prompts == "turn right" else 3])

    def value(self, images):
        return torch.tensor([0.25])


class Mute:
    "A brain that can do nothing."

    class config:
        size = 32

    def act(self, images, *prompts):
        raise NotImplementedError


@pytest.fixture(scope="module")
def tiny():
    from compute_layers import brain

    return brain.load("tiny")


def test_moves_change_the_room_and_what_is_seen(tiny):
    state = PanelState(tiny, seed=3)
    heading, before = state.world.heading[0], state.pictures()
    assert state.move("turn_right") == 0 and abs(state.world.heading[0] - heading - TURN) < 1e-9
    assert state.move(1) in (0, 1) and (state.steps, state.moves) == (2, 2)
    after = state.pictures()
    assert {"room", "attention", "reconstruction", "canvas0"} <= set(before)
    for name in ("room", "attention", "reconstruction", "canvas0"):
        assert after[name].dtype == np.uint8 and after[name].shape[2] == 3
        assert (before[name] != after[name]).any(), name
    for wrong in ("jump", 7, -1):
        with pytest.raises(ValueError, match="action"):
            state.move(wrong)
    for wrong in ({"kind": "attic"}, {"seed": -1}, {"seed": 1.5}, {"seed": True}):
        with pytest.raises(ValueError):
            state.new_room(**wrong)
    assert state.moves == 2


def test_the_oracle_plays_room_after_room(tiny):
    state = PanelState(tiny, kind="walls", seed=3)
    state.watch = False
    state.choose("oracle")
    assert state.let_play(150) == 150 and state.score >= 2 and state.seed > 3
    state.new_room(seed=3)
    while not state.over:
        state.let_play(1)
    steps = state.steps
    assert state.move("forward") == 0 and state.steps == steps and "new room" in state.message


def test_questions_and_bad_ones(tiny):
    state = PanelState(tiny, seed=3)
    assert "left" in state.ask("is the gold to your left or to your right") or "right" in state.answer
    for bad in ("", "   ", "xyzzy", "the " * 60):
        assert state.ask(bad) == "" and state.message, repr(bad)
    state.ask("is the xyzzy to your left or to your right")
    assert "xyzzy" in state.message
    state.new_room()
    assert state.message == ""


def test_what_a_brain_cannot_do_is_a_note():
    state = PanelState(Mute(), seed=1)
    assert state.ask("who are you") == "" and "cannot answer" in state.message
    assert state.draw("a house") is None and "cannot draw" in state.message
    assert state.command("go") == "" and "NotImplementedError" in state.message
    assert state.let_play(5) == 0 and "oracle" in state.message
    assert all(state.notes[name] for name in ("reconstruction", "value", "attention"))
    assert set(state.pictures()) == {"room", "canvas0"} and state.pictures()["canvas0"].shape == (32, 32, 3)


def test_what_a_raised_brain_can_do():
    state = PanelState(Raised(), seed=5)
    assert state.command("turn right") == "turn_right" and state.order == "turn right"
    heading = state.world.heading[0]
    assert state.let_play(2) == 2 and abs(state.world.heading[0] - heading - 2 * TURN) < 1e-9, "the order holds"
    assert (state.draw("snow") == 255).all() and "drawing" in state.pictures()
    assert state.draw("nonsense") is None and "nonsense" in state.message
    assert state.values == [0.25] * 4 and not state.notes["value"]
    for kept in range(1, 6):
        state.keep()
        assert len(state.kept) == min(kept, 3) and len(state.canvases()) == 2
    assert "2 canvases" in state.message and state.ask("how many") == "I see 2"
    state.draw("snow"), state.keep(drawing=True)
    assert (state.canvases()[0] == 255).all() and (state.pictures()["canvas2"] == 255).all(), "its own drawing is a canvas"
    state.brain = type("Larger", (Raised,), {"config": type("config", (), {"size": 96, "canvases": 2})})()
    assert state.canvases().shape == (2, 96, 96, 3), "another brain sees it in its own size"
    state.brain, state.drawing = Raised(), None
    state.keep(drawing=True)
    assert "no drawing" in state.message and len(state.kept) == 3, "nothing is lost for nothing"
    state.forget(), state.keep(), state.keep(), state.keep()
    assert [name for name in state.pictures() if name.startswith("canvas")] == ["canvas0", "canvas1", "canvas2", "canvas3"]
    state.forget()
    assert state.ask("how many") == "I see 1"


def test_brains_are_switched_in_the_middle_of_the_game(tiny):
    state = PanelState(Raised(), seed=5)
    state.move("forward")
    place = state.world.agent.copy()
    assert not state.use("no-such-weights") and "no-such-weights" in state.message and isinstance(state.brain, Raised)
    assert state.use("tiny") and state.weights == "tiny" and (state.world.agent == place).all() and state.values == []
    with pytest.raises(FileNotFoundError):
        PanelState("no-such-weights")


def test_attention_is_a_distribution_that_finds_the_agent(tiny):
    from compute_layers.game import levels, picture

    rooms = levels.bare(11, 16)
    maps = window.attention_map(tiny, picture.draw(rooms, 64))
    assert maps.shape == (16, 8, 8) and (maps >= 0).all() and torch.allclose(maps.sum((1, 2)), torch.ones(16), atol=1e-5)
    assert not tiny.eye_blocks[-1].self_attention._forward_pre_hooks, "the hook is gone"


def test_the_widget_answers_every_wish(tiny):
    pytest.importorskip("anywidget")
    panel = MindPanel(tiny, seed=3)
    wishes = [{"do": "move", "action": "forward"}, {"do": "move"}, {"do": "ask", "text": 3}, {"do": "room", "seed": "x"}, {"do": "play"}, {},
              {"do": "policy", "policy": "oracle"}, {"do": "play"}, {"do": "keep"}, {"do": "keep", "drawing": True}, {"do": "forget"}, {"do": "watch", "on": False}, {"do": "draw", "text": "xyzzy"}]
    for i, wish in enumerate(wishes, 1):
        panel.handle(wish)
        shown = panel.widget.state
        assert shown["counter"] == i and len(panel.widget.pixels) == sum(3 * size**2 for _, size in shown["pictures"])
        json.dumps(shown)
    assert shown["moves"] == 2


def test_no_live_panel_is_stored():
    notebook = json.loads((ROOT / "nbs" / "play.ipynb").read_text(encoding="utf8"))
    assert "widgets" not in notebook["metadata"], "execute it with IN_TEST=1"
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), "execute it with IN_TEST=1"
    for address in ("https://cdn", "import(", "http:"):
        assert address not in window._SCRIPT + window._STYLE


# ---------------------------------------------------------------------------------------------------------------------
# in a browser


def wait_for(condition, seconds: float = SECONDS, what: str = ""):
    "The first true value of `condition()`."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except (OSError, ValueError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain for {what or condition}")


def stop(process: subprocess.Popen) -> None:
    "End a process that was started as a group of its own."
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Page:
    "A page of headless Chromium, by its debugging protocol."

    def __init__(self, address: str):
        import websocket

        self.socket, self.number = websocket.create_connection(address, timeout=SECONDS, suppress_origin=True), 0

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while True:
            reply = json.loads(self.socket.recv())
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def run(self, script: str):
        "The value of a JavaScript expression; a promise is waited for."
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, name: str) -> str:
        return self.run(f"document.querySelector('.mind-panel [data-name={name}]').textContent")

    def state(self) -> dict:
        return json.loads(self.run("document.querySelector('.mind-panel')?.dataset.state ?? 'null'"))

    def click(self, name: str) -> None:
        "A real click of the mouse into the middle of a part of the panel."
        x, y = self.run(f"""(() => {{ const part = document.querySelector('.mind-panel [data-name={name}]');
            part.scrollIntoView({{block: 'center'}}); const box = part.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2]; }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def key(self, name: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory):
    "nbs/play.ipynb, opened in JupyterLab in Chromium, all its cells run."
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (the extra lab)")
    pytest.importorskip("anywidget", reason="anywidget is not installed (the extra lab)")
    pytest.importorskip("websocket", reason="websocket-client is not installed (JupyterLab brings it)")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    if chromium is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    folder = Path(tempfile.mkdtemp(prefix="panel"))  # a short path: sockets are made in it
    (folder / "nbs").mkdir()
    shutil.copy(ROOT / "nbs" / "play.ipynb", folder / "nbs")
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST" and not k.startswith("JUPYTER")}
    env |= {"HOME": str(folder), "JUPYTER_RUNTIME_DIR": str(folder / "runtime"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    log = (folder / "log.txt").open("w")
    lab = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=0", "--ip=127.0.0.1", "--expose-app-in-browser",
           "--LabApp.extension_manager=readonly", "--ServerApp.jpserver_extensions={'jupyter_lsp': False, 'jupyterlab_jupytext': False}",
           "--IdentityProvider.token=panel", f"--notebook-dir={folder / 'nbs'}"]
    browser = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--window-size=1280,1000",
               "--remote-debugging-port=0", f"--user-data-dir={folder / 'chromium'}", "about:blank"]
    processes = []
    try:
        for command in (lab, browser):
            processes.append(subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=log, start_new_session=True))
        port = wait_for(lambda: (folder / "chromium" / "DevToolsActivePort").read_text().split()[0], what="Chromium")
        server = wait_for(lambda: [json.loads(p.read_text()) for p in (folder / "runtime").glob("jpserver-*.json")], what="JupyterLab")[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        page = Page(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))
        page.call("Page.enable")
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)  # JupyterLab's commands act on what has the focus
        page.call("Page.navigate", url=f"{server['url']}doc/tree/play.ipynb?token=panel")
        ready = """(() => { const app = window.jupyterapp, opened = app && document.querySelector('.jp-Notebook .jp-Cell') && [...app.shell.widgets('main')][0];
            if (opened) app.shell.activateById(opened.id);
            return !!opened && app.commands.isEnabled('notebook:run-all-cells') && opened.sessionContext.session?.kernel?.status === 'idle'; })()"""
        wait_for(lambda: page.run(ready), what="the notebook")
        page.run("void jupyterapp.commands.execute('notebook:run-all-cells')")
        wait_for(page.state, what="the panel")
        yield page
    except AssertionError as error:
        raise AssertionError(f"{error}\n{(folder / 'log.txt').read_text()[-3000:]}") from error
    finally:
        for process in reversed(processes):
            stop(process)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_clicks_keys_questions_and_playing_in_jupyterlab(page: Page):
    before = page.state()
    page.click("forward")
    wait_for(lambda: page.state()["moves"] == 1, what="the click to move the agent")
    assert page.state()["agent"] != before["agent"]

    page.click("room")
    page.key("ArrowRight", 39)
    wait_for(lambda: page.state()["moves"] == 2, what="the arrow key to turn the agent")
    assert abs(page.state()["heading"] - before["heading"] - TURN) < 1e-3
    drawn = "(name) => [...document.querySelector(`.mind-panel [data-name=${name}]`).getContext('2d').getImageData(0, 0, 64, 64).data].some((v, i) => v !== 255)"
    assert all(page.run(f"({drawn})('{name}')") for name in ("room", "attention", "reconstruction", "canvas0"))

    page.click("prompt")
    page.call("Input.insertText", text="is the gold to your left or to your right")
    page.key("Enter", 13)
    assert {"left", "right"} & set(wait_for(lambda: page.text("answer"), what="the answer").split())
    assert page.state()["moves"] == 2

    page.run("document.querySelector('.mind-panel [data-name=prompt]').value = 'draw the line to the gold'")
    page.click("draw")
    blue = "[...document.querySelector('.mind-panel [data-name=drawing]').getContext('2d').getImageData(0, 0, 64, 64).data]"
    blue += ".some((v, i, all) => i % 4 === 2 && v > 150 && all[i - 1] < 100 && all[i - 2] < 100)"
    wait_for(lambda: page.run(blue), what="the drawn line")

    page.run("(() => { const who = document.querySelector('.mind-panel [data-name=policy]'); who.value = 'oracle'; who.onchange(); })()")
    page.click("play")
    wait_for(lambda: page.state()["moves"] >= 5, what="the oracle to play")
    first, start = page.state()["moves"], time.monotonic()
    time.sleep(2)
    rate = (page.state()["moves"] - first) / (time.monotonic() - start)
    page.click("stop")
    time.sleep(0.5)
    stopped = page.state()["moves"]
    time.sleep(0.5)
    assert page.state()["moves"] == stopped and rate > 0
    print(f"{rate:.1f} moves a second in the browser, set to 10")

    if picture := os.environ.get("PANEL_PICTURE"):  # how docs/pictures/panel.png was made
        page.click("draw")
        wait_for(lambda: page.run(blue), what="the drawn line")
        x, y, width, height = page.run("""(() => { const panel = document.querySelector('.mind-panel'); panel.scrollIntoView();
            const box = panel.getBoundingClientRect(); return [box.x, box.y, box.width, box.height]; })()""")
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        Path(picture).write_bytes(b64decode(page.call("Page.captureScreenshot", format="png", clip=clip)["data"]))
