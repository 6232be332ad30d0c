"""Learning without forgetting: merged adapters say the same, springs rest at their anchor, replay is the same on every resume."""

import copy

import pytest
import torch
from torch import nn

from compute_layers.brain.model import Attention, Block, Brain, brain_config
from compute_layers.brain.words import Words
from compute_layers.game import levels
from compute_layers.game.picture import draw
from compute_layers.skills import MINIMAL_PAIRS, MOVES, SKILLS
from compute_layers.skills.ledger import examine_skills
from compute_layers.skills.questions import vocabulary_texts
from compute_layers.skills.retention import ElasticPenalty, FamilyLesson, HeldLesson, MixedLesson, add_adapters, examine_pairs, fisher, merge_adapters
from compute_layers.skills.school import GROWN, all_texts

OLD, NEW = ("gold_left_right", "agent_is_left", "agent_is_right"), ("do_as_told",)


@pytest.fixture
def brain():
    """A small brain whose zeroed layers are awake."""
    words = Words.from_texts(vocabulary_texts() + [text for name in OLD + NEW for text in SKILLS[name].texts()] + list(MOVES))
    torch.manual_seed(0)
    made = Brain(brain_config("smoke", edits=True), words)
    for module in made.modules():
        if isinstance(module, Block):
            nn.init.normal_(module.narrow.weight, std=0.1)
        if isinstance(module, Attention):
            nn.init.normal_(module.out.weight, std=0.1)
    return made


def outputs(brain):
    """Logits of a question and a painting, in four rooms."""
    pictures = torch.as_tensor(draw(levels.bare(0, 4), 32))
    asked = brain.words.prompts(["is the gold left or right"] * 4)
    memory = brain.see(pictures)
    return torch.cat([brain.read(memory, asked[:, None]).flatten(), brain.paint(memory, asked, pictures).flatten()]).detach()


def lesson(brain, names, **options):
    return FamilyLesson(brain.words, [SKILLS[name] for name in names], seed=3, size=32, own_rooms=4, **options)


def test_merged_adapters_say_the_same_under_the_old_names(brain):
    before, names = outputs(brain), {name: value.shape for name, value in brain.state_dict().items()}
    trained = add_adapters(brain, rank=3)
    torch.testing.assert_close(outputs(brain), before, atol=1e-5, rtol=1e-5)  # a fresh adapter changes nothing
    frozen = {name: value.clone() for name, value in brain.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for step in range(3):
        lesson(brain, NEW)(brain, step)[0].backward()
        optimizer.step(), optimizer.zero_grad()
    assert all(torch.equal(dict(brain.named_parameters())[name], value) for name, value in frozen.items())
    adapted = outputs(brain)
    assert not torch.allclose(adapted, before, atol=1e-3)
    merge_adapters(brain)
    torch.testing.assert_close(outputs(brain), adapted, atol=2e-4, rtol=1e-4)
    assert {name: value.shape for name, value in brain.state_dict().items()} == names
    assert all(parameter.requires_grad for parameter in brain.parameters())


def test_new_words_learn_beside_adapters_and_old_ones_do_not(brain):
    first = len(brain.words) - 2
    add_adapters(brain, rank=2, words_from=first)
    lesson(brain, NEW)(brain, 0)[0].backward()
    for table in (brain.word_embedding.weight, brain.next_word.weight):
        assert not table.grad[:first].any()
    assert brain.next_word.weight.grad[first:].any()
    with pytest.raises(ValueError, match="adapters already"):
        add_adapters(brain)
    merge_adapters(brain)
    brain.zero_grad()
    lesson(brain, NEW)(brain, 0)[0].backward()
    assert brain.next_word.weight.grad[:first].any(), "the hook is gone"


def test_springs_rest_at_the_anchor_and_pull_away_from_it(brain):
    stiffness = fisher(brain, lesson(brain, OLD), steps=2)
    assert all((value >= 0).all() for value in stiffness.values()) and stiffness["next_word.weight"].any()
    penalty = ElasticPenalty(brain, stiffness, strength=2.0)
    assert penalty(brain).item() == 0
    far = []
    for distance in (0.01, 0.02, 0.04):
        moved = copy.deepcopy(brain)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += distance
        far.append(penalty(moved).item())
    assert 0 < far[0] and far[1] == pytest.approx(4 * far[0], rel=1e-3) and far[2] == pytest.approx(16 * far[0], rel=1e-3)
    held, plain = HeldLesson(lesson(brain, NEW), penalty)(moved, 0)[0], lesson(brain, NEW)(moved, 0)[0]
    assert held.item() == pytest.approx(plain.item() + far[2], rel=1e-5)
    with pytest.raises(ValueError, match="no parameters called nowhere"):
        ElasticPenalty(brain, {"nowhere": torch.ones(1)}, 1.0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_replay_is_decided_by_the_step_alone(brain, share):
    mixed = MixedLesson(lesson(brain, NEW), lesson(brain, OLD, geometry=1.0), share)
    turns = [mixed.turn(step) for step in range(40)]
    assert sum(old for old, _ in turns) == share * 40
    for who in (True, False):  # each lesson counts its own turns
        counts = [count for old, count in turns if old == who]
        assert counts == list(range(len(counts)))
    forth = [mixed(brain, step)[0].item() for step in range(4)]
    back = [MixedLesson(lesson(brain, NEW), lesson(brain, OLD, geometry=1.0), share)(brain, step)[0].item() for step in (3, 2, 1, 0)]
    assert forth == back[::-1]


def test_pairs_are_judged_by_the_side_that_fails(brain):
    """A brain that has learned nothing passes no pair; one that ignores the difference can't pass."""
    chosen = [pair for pair in MINIMAL_PAIRS if pair[0] in OLD + NEW and pair[2] in OLD + NEW]
    scores = examine_pairs(brain, chosen, n=12)
    assert len(scores) == len(chosen) and not any(score.passed for score in scores)
    told = [score for score in scores if score.skills == ("do_as_told", "do_as_told")]
    assert told and all(score.trivial == 0 and score.asked == (12, 12) for score in told)
    brain.complete = lambda memory, prompts: brain.words.answers(["yes"] * len(memory))[:, None]
    side = next(score for score in examine_pairs(brain, chosen, n=40) if score.skills == ("agent_is_left", "agent_is_right"))
    assert 0 < side.trivial <= 0.6 and not side.passed


def test_examinations_by_several_processes_say_the_same():
    torch.manual_seed(0)
    brain = Brain(brain_config("smoke", **GROWN), Words.from_texts(all_texts()))
    skills = [SKILLS[name] for name in ("facing", "draw_room")]
    assert examine_skills(brain, skills, n=8, progress=False) == examine_skills(brain, skills, n=8, progress=False, workers=2)
