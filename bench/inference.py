"""How many rooms does it take to infer the next move from what the eyes found? No speed, so no part of `make bench`: `python bench/inference.py`, ten minutes of one core.

A small net (a linear layer, and one of squared rectified units, as in `Brain.told`) is given what the eyes of the shipped brain found in each room, and nothing else.

`python bench/inference.py legs`, half an hour of one core: only rooms where the way turns, and three hidden layers, as in `BrainConfig.infers_deeply`. What is it worth to be told every leg of the way, and not only where it turns first? Its numbers go into a run folder.
"""
from __future__ import annotations

import argparse
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compute_layers import brain
from compute_layers.brain.model import Brain, _bearing, doubled
from compute_layers.game import levels
from compute_layers.lab.runs import new_run
from compute_layers.lab.train import progress_bar
from compute_layers.skills import SKILLS, Skill
from compute_layers.skills.skill import seen_otherwise

ASKED = ("next_move", "next_move_walls")
ROOMS, HARD, TEST = (4000, 12000, 24000, 96000), 50000, 3000
SEED = 6


class Net(nn.Module):
    """What is told, in little."""

    def __init__(self, numbers: int, width: int, answers: int):
        super().__init__()
        self.linear, self.enter, self.leave = nn.Linear(numbers, answers), nn.Linear(numbers, width), nn.Linear(width, answers)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.leave(0.1 * F.relu(self.enter(x)).square())


@torch.no_grad()
def look(
    eyes: Brain,
    skill: Skill,
    n: int,  # rooms, at least
    seed: int,
    hard: bool = False,  # only the rare hard ones
    batch: int = 100,
) -> tuple[Tensor, Tensor, Tensor]:  # (N, F) what was found, (N, V) which answers are right, (N,) can the picture decide it?
    """What the eyes find in rooms of a skill."""
    seen, bar, first, kept = [], progress_bar(total=n, desc=skill.name, unit="room"), 0, 0
    while kept < n:
        scene = skill.scene(seed, batch, first=first, size=eyes.config.size, hard=hard)
        first += batch
        if not len(scene):
            continue
        task = skill.make(scene)
        rows = task.sure if hard else torch.ones_like(task.sure)
        seen.append((eyes.finds(eyes.see(task.canvases[rows])), task.right[rows], task.sure[rows]))
        kept += int(rows.sum())
        bar.update(int(rows.sum()))
    bar.close()
    return tuple(map(torch.cat, zip(*seen)))


def learn(
    found: Tensor,
    right: Tensor,
    test: tuple[Tensor, Tensor, Tensor],
    width: int = 256,
    steps: int = 6000,
) -> float:  # share of the test's rooms
    """Teach a new net, and examine it in other rooms."""
    torch.manual_seed(0)
    mean, deviation = found.mean(0), found.std(0) + 1e-3
    net = Net(found.shape[1], width, right.shape[1])
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        rows = torch.randint(len(found), (256,))
        wanted = right[rows] / right[rows].sum(1, keepdim=True)
        loss = -(wanted * net((found[rows] - mean) / deviation).log_softmax(-1)).sum(1).mean()
        optimizer.zero_grad(), loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step(), schedule.step()
    found, right, sure = test
    with torch.no_grad():
        said = net((found - mean) / deviation).argmax(1, keepdim=True)
    return right.gather(1, said)[:, 0][sure].float().mean().item()


def legs(
    turns: Tensor,  # (B, 2, 2) where the way turns, from `Brain.turns`; the gold where it doesn't
    pose: Tensor,  # (B, POSE_GEOMETRY)
) -> Tensor:  # (B, 83)
    """Each of the three legs of the way: from where to where, how long, at which angle to the agent and to the leg before; angles and lengths in waves, too."""
    points = torch.stack([pose[:, :2], turns[:, 0], turns[:, 1], pose[:, 4:6]], 1)
    leg = points[:, 1:] - points[:, :-1]
    length, way = leg.norm(dim=-1), F.normalize(leg, dim=-1, eps=1e-4)
    angles = torch.cat([_bearing(pose[:, None, 2:4], way), _bearing(way[:, :-1], way[:, 1:])], 1)  # (B, 5, 2)
    far = torch.stack([(math.pi * length).cos(), (math.pi * length).sin()], -1)
    return torch.cat([leg.flatten(1), length, angles.flatten(1), doubled(angles), doubled(far)], 1)


@torch.no_grad()
def look_at_bent(
    eyes: Brain,
    n: int,  # rooms where the way turns, at least
    seed: int,
    views: int,  # of each, turned and mirrored: 1 to 8
) -> tuple[Tensor, Tensor, Tensor]:  # what is told, what is told of the legs, and which moves are right
    """As `look`, where the way turns and the picture can decide it."""
    skill, seen, bar, first, kept = SKILLS["next_move_walls"], [], progress_bar(total=n, desc="bent ways", unit="room"), 0, 0
    while kept < n:
        task = skill.make(skill.scene(seed, 400, first=first, size=eyes.config.size, hard=True))
        first += 400
        task.canvases, task.right, task.variant, task.sure = (part[task.sure] for part in (task.canvases, task.right, task.variant, task.sure))
        for view in range(views):
            shown = seen_otherwise(task, skill.mirrored, view % 4, view >= 4)
            memory = eyes.see(shown.canvases)
            seen.append((eyes.finds(memory), legs(eyes.turns(memory), eyes.landmarks(memory)[:, -1]), shown.right))
        kept += len(task.right)
        bar.update(len(task.right))
    bar.close()
    return tuple(map(torch.cat, zip(*seen)))


def learn_deeply(
    found: Tensor,
    right: Tensor,
    test: tuple[Tensor, Tensor],
    seed: int,
    width: int = 256,
    steps: int = 6000,
) -> float:  # share of the test's rooms
    """Teach a new net of three hidden layers, and examine it in other rooms."""
    torch.manual_seed(seed)
    mean, deviation = found.mean(0), found.std(0).clamp(min=0.05)
    net = nn.Sequential(nn.Linear(found.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, right.shape[1]))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
    wanted = right / right.sum(1, keepdim=True)
    for _ in range(steps):
        rows = torch.randint(len(found), (512,))
        loss = -(wanted[rows] * net((found[rows] - mean) / deviation).log_softmax(-1)).sum(1).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    with torch.no_grad():
        said = net((test[0] - mean) / deviation).argmax(1, keepdim=True)
    return test[1].gather(1, said).mean().item()


def main_legs() -> None:
    """Rooms where the way turns, with and without the legs of the way."""
    torch.set_num_threads(1)
    eyes = brain.load("raised")
    told, way, right = look_at_bent(eyes, 4000, SEED + 2, views=8)
    told_test, way_test, right_test = look_at_bent(eyes, 1400, levels.HELD_OUT_SEED + 26, views=1)
    print(f"{len(right):,} views to learn from, {len(right_test):,} other rooms; the commonest move is right in {right_test.float().mean(0).max():.3f} of these")
    rates, run = {}, new_run("legs", {}, seeds=[0, 1, 2])
    for name, (found, then) in {"what the brain is told": (told, told_test), "and of every leg": (torch.cat([told, way], 1), torch.cat([told_test, way_test], 1)), "of the legs alone": (way, way_test)}.items():
        rates[name] = [learn_deeply(found, right.float(), (then, right_test.float()), seed) for seed in range(3)]
        print(f"{name}: " + ", ".join(f"{rate:.4f}" for rate in rates[name]), flush=True)
    run.save_metrics({name.replace(" ", "_"): [round(rate, 4) for rate in those] for name, those in rates.items()})


def main() -> None:
    torch.set_num_threads(1)
    eyes = brain.load("raised")
    for name in ASKED:
        skill = SKILLS[name]
        test = look(eyes, skill, TEST, levels.HELD_OUT_SEED + 25)
        found, right, sure = look(eyes, skill, max(ROOMS), SEED)
        for n in ROOMS:
            print(f"{name}: {learn(found[:n][sure[:n]], right[:n][sure[:n]].float(), test):.4f} after {n:,} rooms", flush=True)
        if name == "next_move_walls":
            more, answers, _ = look(eyes, skill, HARD, SEED + 1, hard=True)
            both = torch.cat([found[sure], more]), torch.cat([right[sure], answers]).float()
            print(f"{name}: {learn(*both, test, width=512, steps=12000):.4f} with {HARD:,} rooms more in which the way turns, and twice the net", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("rooms", "legs"), default="rooms", help="how many rooms it takes (default), or what the legs of the way are worth")
    main_legs() if parser.parse_args().what == "legs" else main()
