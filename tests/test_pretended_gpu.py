"""What a machine without a GPU can check of code for one: nothing is mixed that lies in two places, see `pretend`."""
import numpy as np
import pytest
import torch

from compute_layers.brain.model import Brain, brain_config
from compute_layers.brain.words import Words
from compute_layers.lab.ahead import Ahead
from compute_layers.rl.curriculum import Ladder, Lessons, rungs
from compute_layers.rl.evaluate import play
from compute_layers.rl.imitation import ImitationConfig, imitate
from compute_layers.rl.policies import Policy, PolicyConfig
from compute_layers.rl.ppo import PPOConfig, ppo
from compute_layers.rl.rollout import Rooms
from compute_layers.skills import MINIMAL_PAIRS, SKILLS
from compute_layers.skills.ledger import examine_skills
from compute_layers.skills.raising import RaiseLesson, ReaderLesson, fit_hand, teach_glance, teach_meanings, teach_route
from compute_layers.skills.retention import examine_pairs
from compute_layers.skills.school import GROWN, all_texts
from pretend import Pretended, pretended_gpu


def test_the_pretended_gpu_refuses_what_a_real_one_refuses():
    with pretended_gpu():
        there, here = torch.zeros(3, device="cuda"), torch.ones(3)
        assert there.device.type == "cuda" and (there + 1).is_cuda and (there + here.to("cuda")).is_cuda and not there.cpu().is_cuda
        assert (there[0] + here[0]).is_cuda  # a single number may come from the CPU
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="indices"):
            here[torch.tensor([0], device="cuda")]
        for reads in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="numpy"):
                reads()
        chance = torch.Generator("cuda").manual_seed(0)
        assert torch.rand(2, generator=chance, device="cuda").is_cuda
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(2, generator=chance)
        layer = torch.nn.Linear(3, 3).to("cuda")
        with pytest.raises(RuntimeError, match="same device"):
            layer(here)
        layer(there).sum().backward()
        assert isinstance(layer.weight, torch.nn.Parameter) and layer.weight.grad.is_cuda
    assert type(torch.zeros(1)) is torch.Tensor


def test_a_brain_is_raised_on_it():
    """A step of everything, what is taught alone, the hand, the ledger and the pairs: the smallest brain that has every part."""
    torch.manual_seed(0)
    skills, words = list(SKILLS.values()), Words.from_texts(all_texts())
    brain = Brain(brain_config("smoke", **GROWN), words)
    number = dict(size=32, plain=4, bare=4, painted=2, drawn_rooms=2, own_rooms=2, recalled_rooms=2, workers=0)
    here, _ = RaiseLesson(words, skills, **number)(brain, 3)
    some = [SKILLS[name] for name in ("gold_count", "draw_way", "recall_line", "next_move_walls")]
    known = examine_skills(brain, some, n=4, progress=False)
    with pretended_gpu():
        brain = brain.to("cuda")
        loss, report = RaiseLesson(words, skills, device="cuda", **number)(brain, 3)
        assert isinstance(loss, Pretended) and abs(loss.item() - here.item()) < 1e-4 * here.item()  # the same rooms, words and answers
        loss.backward()
        assert examine_skills(brain, some, n=4, progress=False) == known  # one thread: the pretence does not reach others
        assert len(examine_pairs(brain, MINIMAL_PAIRS[:1], n=2)) == 1
        teach_meanings(brain, skills, steps=1, requests=4, progress=False), fit_hand(brain, some, rooms=200, batch=100, progress=False)
        teach_glance(brain, steps=1, rooms=4, progress=False), teach_route(brain, steps=1, rooms=4, progress=False)
        assert ReaderLesson(brain, some[:1], rooms=10, inferred=2, each=2, batch=5, progress=False)(brain, 0)[0].is_cuda


def test_made_ahead_comes_in_one_piece():
    with pretended_gpu():
        tree = Ahead(lambda step: {"a": torch.full((2, 3), step), "b": [torch.tensor(True), "text"]}, "cuda", workers=0)(7)
        assert tree["a"].is_cuda and tree["a"].tolist() == [[7] * 3] * 2 and tree["b"][0].is_cuda and tree["b"][1] == "text"


def test_policies_learn_from_pixels_on_it():
    """Shown the way, then by reward on a ladder: rooms on the CPU, the policy there, the pictures painted here or there."""
    torch.manual_seed(0)
    with pretended_gpu():
        policy = Policy(PolicyConfig("ego", 32, channels=(4, 4), looked=16)).to("cuda")
        for painter in (None, "cuda"):
            *_, row = imitate(Rooms(16, "near", 0, "ego", 32, threads=2, device=painter), policy, ImitationConfig(frames=32, rooms=16, only_hope=True), 0)
            assert row["frames"] == 32
            lessons = Lessons(16, Ladder(rungs("near"), seed=0), "near", 0, "ego", 32, threads=2, device=painter)
            *_, row = ppo(lessons, policy, PPOConfig(frames=512, steps=16, minibatch=128, epochs=1), 0)
            assert row["frames"] == 512 and np.isfinite(row["value_loss"])
        assert 0 <= play(policy, n=4).rate <= 1
