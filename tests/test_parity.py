"""The two engines, numba on the CPU and torch on any device, play the same game: random worlds, walls at any angle."""
from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from compute_layers.game import facts, levels, oracle, physics, picture, tensors
from compute_layers.game.world import AGENT_RADIUS, World, wall_distance

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])  # the CPU is always checked
N = 256


def worlds(n: int = N) -> dict[str, World]:
    """Rooms of every kind, and walls turned by any angle in any place, which no level would have."""
    wild = levels.walls(21, n, max_gold=2)
    rng = np.random.default_rng(0)
    wild.walls[:, :, 4] = rng.uniform(-7, 7, (n, wild.walls.shape[1]))
    wild.walls[:, :, :2] = rng.uniform(-0.2, 1.2, (n, wild.walls.shape[1], 2))
    wild.heading[:] = rng.uniform(-20, 20, n)
    wild.agent[: n // 8] += rng.uniform(-1, 1, (n // 8, 2))  # some stand outside the room
    free = (wall_distance(wild.agent[:, None], wild.walls) >= AGENT_RADIUS).all((1, 2))
    return {
        "bare": levels.bare(20, n), "far": levels.bare(20, n, max_offset=1.0, exits=False), "walls": levels.walls(20, n),
        "right angles": levels.walls(20, n, right_angles=True), "wild": wild.take(free),
    }


KINDS = list(worlds(8))


@pytest.fixture(scope="module")
def many() -> dict[str, World]:
    return worlds()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make, options", [
    (levels.bare, {}), (levels.bare, {"max_offset": 0.1}), (levels.bare, {"max_offset": 1.0, "exits": False}),
    (levels.walls, {}), (levels.walls, {"right_angles": True}), (levels.walls, {"max_walls": 1, "max_gold": 1}), (levels.walls, {"max_walls": 0}),
])
def test_levels_are_the_same_bit_for_bit(device, make, options):
    for seed, first in ((0, 0), (levels.HELD_OUT_SEED, 12_345), (2**62 + 7, 3)):
        here, there = make(seed, 5000, first=first, **options), make(seed, 5000, first=first, device=device, **options)
        assert there.agent.device.type == device and there.agent.dtype == torch.float64
        for field in fields(World):
            assert (getattr(here, field.name) == getattr(there.numpy(), field.name)).all(), (field.name, seed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps(device, kind, many):
    here, there = many[kind], many[kind].to(device).copy()
    rng = np.random.default_rng(1)
    for _ in range(50):
        actions = rng.choice([0, 1, 1, 1, 2, 3, 4], len(here))
        here, ate = physics.step(here, actions)
        there, ate_there = physics.step(there, torch.as_tensor(actions, device=device))
        assert there.agent.device.type == device
        assert np.abs(here.agent - there.agent.cpu().numpy()).max() < 1e-9
        assert np.abs(here.heading - there.heading.cpu().numpy()).max() < 1e-9
        assert (ate == ate_there.cpu().numpy()).all() and (here.gold_here == there.gold_here.cpu().numpy()).all()


@pytest.mark.parametrize("device", DEVICES)
def test_single_precision_never_ends_in_a_wall(device, many):
    world = many["walls"].to(device, torch.float32)
    rng = np.random.default_rng(2)
    for _ in range(100):
        world, _ = physics.step(world, torch.as_tensor(rng.choice([1, 1, 1, 2, 3, 4], len(world)), device=device))
        assert world.agent.dtype == torch.float32
    assert wall_distance(world.agent[:, None], world.walls).amin().item() >= AGENT_RADIUS - 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures(device, kind, antialias, many):
    here = many[kind].take(slice(0, 48))
    there = here.to(device)
    path = np.concatenate([picture.gold_line(here), np.random.default_rng(3).uniform(-0.2, 1.2, (len(here), 3, 4))], 1)
    path[::3, 2] = np.nan
    path[1, 3] = 0.5  # a line of no length is a dot
    views = [
        ({}, {}), ({"size": 97}, {"size": 97}), ({"view": "ego"}, {"view": "ego"}), ({"zoom": 4.0, "centre": here.agent}, {"zoom": 4.0, "centre": there.agent}),
        ({"lines": path}, {"lines": torch.as_tensor(path, device=device)}), ({"without": ("agent", "walls")}, {"without": ("agent", "walls")}),
    ]
    for way_here, way_there in views:
        painted = picture.draw(there, antialias=antialias, **way_there)
        assert painted.device.type == device and painted.dtype == torch.uint8
        difference = np.abs(picture.draw(here, antialias=antialias, **way_here).astype(int) - painted.cpu().numpy())
        assert (difference > 0).mean() < 1e-4, way_here  # a pixel on an edge may round the other way
        assert difference.max() <= 1 or not antialias, way_here


@pytest.mark.parametrize("device", DEVICES)
def test_pictures_into_a_buffer_and_the_line_to_the_gold(device, many):
    here, there = many["walls"], many["walls"].to(device)
    buffer = torch.zeros((len(there), 32, 32, 3), dtype=torch.uint8, device=device)
    assert picture.draw(there, size=32, out=buffer) is buffer and buffer.any()
    line, line_there = picture.gold_line(here), picture.gold_line(there).cpu().numpy()
    assert np.allclose(line, line_there, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_facts(device, kind, many):
    here = many[kind].copy()
    here.gold_here[::5] = False
    here, there = facts.read(here), facts.read(here.to(device))
    for field in fields(here):
        ours, theirs = getattr(here, field.name), getattr(there, field.name)
        if isinstance(ours, facts.Fact):
            assert (ours.value == theirs.value.cpu().numpy()).all(), field.name
            ours, theirs = ours.margin, theirs.margin
        assert np.allclose(ours, theirs.cpu().numpy(), atol=1e-9, equal_nan=True), field.name


@pytest.mark.parametrize("device", DEVICES)
def test_oracle_in_bare_rooms(device, many):
    for kind in ("bare", "far"):
        here, there = many[kind], many[kind].to(device)
        actions, actions_there = oracle.plan(here, 64)[0], oracle.plan(there, 64)[0]
        assert actions_there.device.type == device
        moving = (actions == 1) | (actions == 2)
        straight = (np.diff(moving.astype(int), axis=1) != 0).sum(1) + moving[:, 0] <= 2  # turns, then steps, then the end
        assert straight.mean() > 0.98 and (actions == actions_there.cpu().numpy())[straight].all()
        assert (oracle.act(there).cpu().numpy() == oracle.act(here))[straight].all()
        # the others turn on the way; there the engines may choose another way, but both arrive
        for now in actions_there.T:
            there, _ = physics.step(there, now.clamp(min=0).long())
        assert not there.gold_here.any()


@pytest.mark.parametrize("device", DEVICES)
def test_oracle_around_walls(device, many):
    for kind in ("walls", "right angles", "wild"):
        here = many[kind].take(slice(0, 12))
        there = here.to(device)
        assert (oracle.plan(there)[0].cpu().numpy() == oracle.plan(here)[0]).all(), kind
        few, few_there = here.take(slice(0, 4)), there.take(slice(0, 4))
        assert (oracle.way_left(few) == oracle.way_left(few_there).cpu().numpy()).all(), kind
        assert (oracle.solvable(few) == oracle.solvable(few_there).cpu().numpy()).all(), kind


@pytest.mark.parametrize("device", DEVICES)
def test_a_plan_of_one_engine_wins_in_the_other(device, many):
    for make in (levels.bare, levels.walls):
        here = make(33, 200)
        actions, steps = oracle.plan(here, 128)
        there, plan = here.to(device).copy(), torch.as_tensor(actions, device=device).long()
        for now in plan[:, : steps.max()].T:
            physics.step(there, now.clamp(min=0), inplace=True)
        assert (~there.gold_here.any(1).cpu().numpy() == (steps >= 0)).all()


def test_edges_are_the_same_edges():
    """Nothing left, gold in reach already, agents far outside."""
    here = levels.walls(1, 6)
    here.gold_here[0] = False
    here.gold[1, 0], here.gold_here[1] = here.agent[1] + 0.01, [True, False]
    here.gold[2, 0] = here.agent[2] + 0.01
    here.agent[3] = 40.0, -3.0
    here.agent[4] = 1.2, 0.5
    for device in DEVICES:
        there = here.to(device)
        assert (oracle.plan(there)[0].cpu().numpy() == oracle.plan(here)[0]).all()
        assert (oracle.act(there).cpu().numpy() == oracle.act(here)).all()
        assert (oracle.solvable(there).cpu().numpy() == oracle.solvable(here)).all()
    steps = oracle.oracle_steps(here)
    assert steps[0] == 0 and steps[1] == 1 and steps[3] == -1


@pytest.mark.parametrize("make", [levels.bare, levels.walls])
def test_nothing_passes_through_the_host(make, monkeypatch):
    """Tensors of the device "meta" have shapes and no numbers: code that looked at one on the way would raise."""
    monkeypatch.setattr(tensors, "_ROUNDS", 2)
    monkeypatch.setattr(tensors, "_SWEEPS", 2)
    world = make(1, 40, device="meta")
    stepped, eaten = physics.step(world, torch.zeros(40, dtype=torch.long, device="meta"))
    seen = [eaten, *(getattr(stepped, field.name) for field in fields(World)), picture.draw(world, lines=picture.gold_line(world))]
    seen += [picture.draw(world, view="ego", antialias=False), picture.draw(world, zoom=2.0, centre=world.agent)]
    seen += [facts.read(world).turn.value, *oracle.plan(world), oracle.act(world), oracle.solvable(world), oracle.way_left(world)]
    assert {tensor.device.type for tensor in seen} == {"meta"}
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(eaten.any())  # so it would
