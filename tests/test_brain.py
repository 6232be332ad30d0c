"""The brain as a whole: every size builds and learns, and the shipped weights answer as well as their journal entry says."""

import pytest
import torch
import torch.nn.functional as F

from compute_layers import brain as brains
from compute_layers.brain.model import SIZES, Brain, brain_config
from compute_layers.brain.words import Words
from compute_layers.game import levels
from compute_layers.game.picture import draw
from compute_layers.lab.train import make_optimizer
from compute_layers.skills.lessons import QuestionLesson, examine, reconstruction_error
from compute_layers.skills.questions import vocabulary_texts


@pytest.mark.parametrize("size", SIZES)
def test_every_size_builds_and_takes_a_step(size):
    """The journal's 224×224 brain too: one picture, one question, every parameter that took part has moved."""
    torch.manual_seed(0)
    words = Words.from_texts(vocabulary_texts())
    brain = Brain(brain_config(size), words)
    lesson = QuestionLesson(words, batch=1, each=1, painted=1.0)
    optimizer = make_optimizer(brain, lr=1e-4)
    before = {name: parameter.detach().abs().sum().item() for name, parameter in brain.named_parameters()}
    loss, _ = lesson(brain, 0)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert torch.isfinite(lesson(brain, 0)[0])
    moved = [name for name, parameter in brain.named_parameters() if parameter.detach().abs().sum().item() != before[name]]
    assert {"stem_in.weight", "stem_out.weight", "next_word.weight", "pixels.weight", "patch_geometry.weight", "pose_geometry.weight"} <= set(moved)


def test_the_shipped_brain_answers_and_paints():
    """A floor, far under the measured scores, on few rooms: it fails when other weights or another game sit behind the name."""
    tiny = brains.load("tiny")
    scores, _ = examine(tiny, n=400, progress=False)
    assert min(score.accuracy for score in scores) > 0.95, scores
    assert reconstruction_error(tiny, n=100) < 0.004


def test_the_environment_and_the_brain_speak_the_same_pictures():
    """uint8 channels-last as the environment gives them, and floats channels-first, give the same answers."""
    tiny = brains.load("tiny")
    pictures = draw(levels.bare(levels.HELD_OUT_SEED, 16))
    floats = torch.as_tensor(pictures).permute(0, 3, 1, 2).float() / 255
    assert tiny.answer(pictures, "are you near the gold") == tiny.answer(floats, "are you near the gold")
    painted = tiny.reconstruct(floats)
    assert painted.shape == (16, 3, 64, 64) and painted.min() >= 0 and painted.max() <= 1
    assert F.mse_loss(painted, floats) < 0.004
