"""The recorded episodes of the game that this one continues are followed, step by step and picture by picture."""
from __future__ import annotations

import json
import math
from pathlib import Path

import gymnasium
import matplotlib.image
import numpy as np
import pytest
import torch

import compute_layers.game  # noqa: F401  registers the environments
from compute_layers.game import physics, picture
from compute_layers.game.world import ACTIONS, from_levels

FOLDER = Path(__file__).parent / "conformance"
EPISODES = json.loads((FOLDER / "traces.json").read_text())["episodes"]
POSITION, HEADING = 1.5 / 224, 1e-4
FRAME, FRAMES_ON_AVERAGE = 0.98, 0.99


def turned(heading: float, recorded: float) -> float:
    """The difference of two headings, the short way round."""
    return abs((heading - recorded + math.pi) % (2 * math.pi) - math.pi)


def recorded_states(episode: dict) -> list[dict]:
    """A level for the start and for the state after each action, with the gold that is left there.

    The states tell how many pieces were collected, not which: those are the ones in reach of the new position.
    """
    gold, states = [list(g) for g in episode["start"]["gold"]], []
    states.append({**episode["start"], "gold": list(gold)})
    for x, y, heading, collected in episode["states"]:
        nearest = sorted(gold, key=lambda g: math.hypot(g[0] - x, g[1] - y))
        gold = [g for g in gold if g not in nearest[: int(collected)]]
        states.append({**episode["start"], "agent": [x, y], "heading": heading, "gold": list(gold)})
    assert gold == [list(g) for g in episode["gold_left"]]
    return states


def frame(name: str) -> np.ndarray:
    """A recorded picture, (224, 224, 3) uint8."""
    return (matplotlib.image.imread(FOLDER / "frames" / f"{name}.png")[..., :3] * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def environment():
    with gymnasium.make("compute_layers/GoldRoom-v0", size=224, antialias=False) as made:
        yield made


def test_the_recording_is_whole():
    assert len(EPISODES) == 24 and {e["kind"] for e in EPISODES} == {"bare", "walls"}
    assert len(list((FOLDER / "frames").glob("*.png"))) == 24
    assert sum(len(e["actions"]) for e in EPISODES) == sum(len(e["states"]) for e in EPISODES) == 1440
    assert any(s[3] for e in EPISODES for s in e["states"])


@pytest.mark.parametrize("number", range(len(EPISODES)))
def test_each_step_through_gymnasium(environment, number):
    episode = EPISODES[number]
    states = recorded_states(episode)
    for before, after, action, row in zip(states, states[1:], episode["actions"], episode["states"]):
        _, info = environment.reset(options={"level": before})
        assert np.allclose(info["agent"], before["agent"]) and len(info["gold"]) == len(before["gold"])
        _, reward, terminated, truncated, info = environment.step(ACTIONS.index(action))
        assert np.hypot(*(info["agent"] - after["agent"])) <= POSITION, (number, action, before)
        assert turned(info["heading"], after["heading"]) <= HEADING
        assert reward == row[3] and info["gold"] == after["gold"]
        assert not truncated and terminated == (not after["gold"])


def test_each_frame_through_gymnasium(environment):
    equal = {}
    for number, episode in enumerate(EPISODES[:12]):
        states = recorded_states(episode)
        for name, state in (("start", states[0]), ("end", states[-1])):
            observation, _ = environment.reset(options={"level": state})
            equal[f"{number:03d}_{name}"] = (observation == frame(f"{number:03d}_{name}")).all(-1).mean()
    worst = min(equal, key=equal.get)
    print(f"worst frame {worst}: {equal[worst]:.4f}, mean {np.mean(list(equal.values())):.4f}")
    assert equal[worst] >= FRAME, worst
    assert np.mean(list(equal.values())) >= FRAMES_ON_AVERAGE


@pytest.mark.parametrize("where", ["numpy", "cpu"] + (["cuda"] if torch.cuda.is_available() else []))
def test_all_steps_and_frames_in_one_batch(where):
    """Every recorded state is a room, and one call plays them all."""
    before, after, actions, collected, frames, shown = [], [], [], [], [], []
    for number, episode in enumerate(EPISODES):
        states = recorded_states(episode)
        before += states[:-1]
        after += states[1:]
        actions += [ACTIONS.index(a) for a in episode["actions"]]
        collected += [s[3] for s in episode["states"]]
        if number < 12:
            shown += [states[0], states[-1]]
            frames += [frame(f"{number:03d}_start"), frame(f"{number:03d}_end")]
    world, rooms, actions = from_levels(before), from_levels(shown), np.array(actions)
    if where != "numpy":
        world, rooms, actions = world.to(where), rooms.to(where), torch.as_tensor(actions, device=where)
    world, eaten = physics.step(world, actions)
    world, eaten = world.numpy(), eaten if where == "numpy" else eaten.cpu().numpy()
    truth = from_levels(after)
    distance = np.hypot(*(world.agent - truth.agent).T)
    print(f"worst position {distance.max() * 224:.3f}/224")
    assert distance.max() <= POSITION
    assert max(turned(a, b) for a, b in zip(world.heading, truth.heading)) <= HEADING
    assert (eaten == np.array(collected)).all() and (world.gold_here.sum(1) == truth.gold_here.sum(1)).all()
    pictures = picture.draw(rooms, size=224, antialias=False)
    pictures = pictures if where == "numpy" else pictures.cpu().numpy()
    equal = (pictures == np.stack(frames)).all(-1).mean((1, 2))
    assert equal.min() >= FRAME and equal.mean() >= FRAMES_ON_AVERAGE
