"""Does a reader that is now and then taught with words in any order mishear less? No speed, so no part of `make bench`: `python bench/hearing.py`, a quarter of an hour of one core.

The reader of a raised brain is taught a little more, with all that was inferred fixed, with several seeds and shares of requests in any order; then it is examined in held-out wordings.
"""
from __future__ import annotations

import argparse
import copy

import torch
from torch import nn

from compute_layers import brain as brains
from compute_layers.game import levels
from compute_layers.lab.train import progress_bar
from compute_layers.skills import SKILLS
from compute_layers.skills.ledger import examine_skills, read_ledger, weights_by_need
from compute_layers.skills.raising import INFERENCE, READER, ReaderLesson

EXAMINED = ("gold_front_behind", "way_out", "way_out_side", "turn_from_gold", "gold_left_right", "agent_left_right", "gold_above_below", "which_path", "next_move")
SHARES, SEEDS, STEPS, LR, ROOMS, TEST = (0.0, 0.05, 0.15), (0, 1), 350, 3e-4, 1500, 500
SLOW = ("next_move", "next_move_walls")  # to judge: fewer rooms of these


def teach(brain: brains.Brain, lesson: ReaderLesson, share: float, seed: int) -> brains.Brain:
    """A copy that has read more."""
    brain = copy.deepcopy(brain)
    for name, parameter in brain.named_parameters():
        parameter.requires_grad_((part := name.partition(".")[0]) in READER and part not in INFERENCE)
    lesson.any_order, lesson.seed = share, 1000 + seed
    parameters = [p for p in brain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, LR)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS, pct_start=0.1)
    for step in progress_bar(range(STEPS), desc=f"{share:.0%} in any order, seed {seed}", unit="step"):
        loss, _ = lesson(brain, step)
        optimizer.zero_grad(), loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), schedule.step()
    return brain.requires_grad_(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", default="raised", help="a name in data/weights/, or a run folder")
    init = parser.parse_args().init
    torch.set_num_threads(1)
    pupil, ledger = brains.load(init), read_ledger(brains.weights_folder(init))
    needs = {name: min(weight, 0.035) if name in SLOW else weight for name, weight in weights_by_need(list(ledger.values()), 0.03).items()}
    reading = ReaderLesson(pupil, list(SKILLS.values()), rooms=ROOMS, steps=STEPS, seed=35, needs=[(0, needs)])
    reading.look()
    for share in SHARES:
        for seed in SEEDS:
            scores = examine_skills(teach(pupil, reading, share, seed), [SKILLS[name] for name in EXAMINED], n=TEST, seed=levels.HELD_OUT_SEED + 1, progress=False, workers=1)
            print(f"{share:.0%} in any order, seed {seed}: mean {sum(s.accuracy for s in scores) / len(scores):.4f}; " + ", ".join(f"{s.name} {s.accuracy:.3f}" for s in scores), flush=True)
