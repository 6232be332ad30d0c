"""Pictures of rooms for a policy: painted by the compiled engine and sent to its device, or painted there from the rooms."""

from __future__ import annotations

import time
from itertools import cycle
from statistics import median

import numpy as np

from compute_layers.rl.rollout import Rooms, on
from bench.common import race, ratio, table

ROOMS = (128, 1024)
VIEWS = ("ego", "top")


def main(quick: bool = False) -> tuple[dict, str]:
    """Measure; the results and a Markdown text."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    settle = torch.cuda.synchronize if device == "cuda" else lambda: None
    chance, lines, results = np.random.default_rng(0), [], {"device": device}
    for rooms in ROOMS[: 1 if quick else None]:
        actions = [chance.integers(0, 5, rooms) for _ in range(32)]
        for view in VIEWS:
            games = {"sent": Rooms(rooms, "near", 1, view), "painted there": Rooms(rooms, "near", 1, view, device=device)}

            def player(game):
                turn = cycle(actions)

                def play() -> int:
                    game.step(next(turn))
                    on(game.observe(), device)
                    settle()
                    return rooms

                return play

            rates = race({name: player(game) for name, game in games.items()}, 3 if quick else 9, 0.05 if quick else 0.3, clock=time.perf_counter)  # a GPU's time is not the thread's
            both = {name: median(rate) for name, rate in rates.items()}
            results[f"{view}, {rooms} rooms"] = both | {"ratio": ratio(rates, "painted there", "sent")}
            lines.append([view, f"{rooms:,}", f"{both['sent']:,.0f}", f"{both['painted there']:,.0f}", f"{results[f'{view}, {rooms} rooms']['ratio']:.2g}"])
    heads = ["pictures 64×64", "rooms", "painted by the engine and sent, rooms/s", "painted on the device, rooms/s", "ratio"]
    text = f"A step of every room and its picture where the policy looks at it ({device}): the compiled engine paints what has changed with one thread and the picture is sent (on a CPU it stays where it is), or the room is sent and painted there by torch, whole (`Rooms(device=…)`). One thread, wall time, in turn.\n\n" + table(heads, lines)
    return results, text
