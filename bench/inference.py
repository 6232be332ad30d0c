"""How many rooms does it take to infer the next move from what the eyes found? No speed, so no part of `make bench`: `python bench/inference.py`, ten minutes of one core.

A small net (a linear layer, and one of squared rectified units, as in `Brain.told`) is given what the eyes of the shipped brain found in each room, and nothing else.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compute_layers import brain
from compute_layers.brain.model import Brain
from compute_layers.game import levels
from compute_layers.lab.train import progress_bar
from compute_layers.skills import SKILLS, Skill

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
    main()
