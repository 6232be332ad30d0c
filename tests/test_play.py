"""The window that people play in: without a screen, with posted keys."""

import os
import subprocess
import sys

import pytest

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
pytest.importorskip("pygame")

from compute_layers.game import play
from compute_layers.game.world import TURN


def test_keys_move_the_agent_and_the_title_counts():
    player = play.Player(walls=True, seed=1, size=96, fps=1000)
    pygame = player.window.pygame

    def press(*keys):
        for key in keys:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
        player.handle()

    heading = player.info["heading"]
    press(pygame.K_RIGHT, pygame.K_RIGHT, pygame.K_LEFT)
    assert abs(player.info["heading"] - heading - TURN) < 1e-9
    assert "Gold room 1.0 | score 0 | step 3 of 512" in pygame.display.get_caption()[0]
    press(pygame.K_SPACE)
    assert player.level == 1 and player.steps == 0
    level_1 = player.frame
    press(pygame.K_LEFT, pygame.K_r)
    assert (player.frame == level_1).all()
    press(pygame.K_n, pygame.K_q)
    assert player.level == 2 and player.run() == 0


def test_a_finished_episode_makes_way_for_the_next_level():
    player = play.Player(seed=1, size=64, fps=1000)
    player._begin(*player.env.reset(options={"level": {"agent": [0.5, 0.5], "heading": 0.0, "gold": [[0.6, 0.5]]}}))
    player.act(play.ACTIONS.index("forward"))
    assert player.over and player.score == 1
    player.rest = 2
    assert player.run(frames=4) == 1 and player.level == 1 and not player.over


def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "compute_layers.game.play", "--walls", "--view", "ego", "--size", "64", "--seed", "5", "--frames", "2"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "SDL_VIDEODRIVER": "dummy"},
    )
    assert done.stdout.strip().endswith("score 0") and done.returncode == 0, done.stderr
    assert subprocess.run([sys.executable, "-m", "compute_layers.game.play", "--size", "-1"], capture_output=True).returncode == 2


def test_a_mind_is_watched_and_the_arrows_rest():
    player = play.Player(seed=2, size=64, fps=play.MOVES_A_SECOND, watch="oracle")
    pygame, heading = player.window.pygame, player.info["heading"]
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_RIGHT))
    player.handle()
    assert player.steps == 0 and player.info["heading"] == heading
    assert "oracle plays" in pygame.display.get_caption()[0]
    assert player.run(frames=player.par + 1) == 1 and player.over and player.steps == player.par


def test_a_policy_is_watched():
    """A shipped one that sees pictures, in the rooms that it was taught in."""
    player = play.Player(seed=2, size=64, fps=play.MOVES_A_SECOND, watch="policy-ego")
    assert "policy-ego plays" in player.window.pygame.display.get_caption()[0]
    player.run(frames=40)
    assert 0 < player.steps <= 40


def test_nobody_of_that_name_is_said_in_one_line():
    done = subprocess.run([sys.executable, "-m", "compute_layers.game.play", "--watch", "nobody"], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "SDL_VIDEODRIVER": "dummy"})
    assert done.returncode == 1 and "nobody called 'nobody'" in done.stderr and "Traceback" not in done.stderr


def test_the_game_imports_no_mind():
    program = "import sys, compute_layers.game.play; print([m for m in sys.modules if m.startswith('compute_layers.') and m.split('.')[1] in ('rl', 'brain', 'minds')])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip().endswith("[]")
