"""What do the rows of a policy that plays from the bare state know of rays? No speed, so no part of `make bench`: `python bench/rows.py runs/…-tutorialCurriculum`, a minute of one core.

The run is one with `-p obs state -p only walls -p ways ladder`. From what its policies make of a room in two places, the sixteen rays of `rl.sight` and whether the way to the nearer gold is clear are read by least squares, in rooms with seeds of their own.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compute_layers.lab.weights import fit_weights, read_weights
from compute_layers.rl.policies import Policy, load_policy
from compute_layers.rl.rollout import Rooms
from compute_layers.rl.sight import RAYS, SIGHT_FIELDS, look

WANTED = {"rays": [SIGHT_FIELDS.index(f"ray{r}") for r in range(RAYS)], "clear": [SIGHT_FIELDS.index("gold0_clear")]}


def met(seed: int, rooms: int) -> tuple[Tensor, Tensor]:
    """States that random play comes to, ten of each room, and what sight says of them."""
    game, chance, states, seen = Rooms(rooms, "walls_two_gold", seed, "state"), np.random.default_rng(seed), [], []
    for step in range(60):
        game.step(chance.integers(0, game.actions, rooms))
        if step % 6 == 5:
            states.append(game.observe().copy()), seen.append(look(game.world))
    return torch.from_numpy(np.concatenate(states)), torch.from_numpy(np.concatenate(seen))


def explained(known: Tensor, wanted: Tensor, known_elsewhere: Tensor, wanted_elsewhere: Tensor) -> float:
    """The share of the variance elsewhere that a linear reading explains; negative: it is worse than the mean."""
    x, elsewhere = (torch.cat([part, torch.ones(len(part), 1)], 1).double() for part in (known, known_elsewhere))
    weights = torch.linalg.solve(x.T @ x + 1e-4 * torch.eye(x.shape[1]).double(), x.T @ wanted.double())
    left = ((elsewhere @ weights - wanted_elsewhere) ** 2).sum()
    return 1 - float(left / ((wanted_elsewhere - wanted_elsewhere.mean(0)) ** 2).sum())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder")
    run = parser.parse_args().run
    pieces = sorted(rows.parent for rows in run.glob("pieces/walls_two_gold-ladder-seed-*/rows.json"))
    if not pieces or not (shape := load_policy(run / "weights").config).rows:
        raise SystemExit(f"{run} holds no policies with rows that climbed the ladder: run tutorialCurriculum with -p obs state -p only walls -p ways ladder")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    untaught, (states, seen), (others, their) = Policy(shape), met(11, 600), met(12, 300)

    def say(name: str, of) -> None:
        with torch.no_grad():
            print(f"{name}: " + ", ".join(f"{what} {explained(of(states), seen[:, at], of(others), their[:, at]):.3f}" for what, at in WANTED.items()), flush=True)

    say("the 63 numbers", lambda x: x)
    for name, policy in [("untaught", untaught), *((piece.name, fit_weights(Policy(shape), read_weights(piece)[0])) for piece in pieces)]:
        say(f"{name}, rows", lambda x: policy.trunk[0](policy.prepare(x)))
        say(f"{name}, last layer", lambda x: policy.trunk(policy.prepare(x)))
