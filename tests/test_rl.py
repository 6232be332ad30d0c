"""Reinforcement learning: memory, going on where it was, the watchman, and what is refused."""

import itertools
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from compute_layers.game import envs, levels, picture
from compute_layers.game.fast import STATE_SIZE, STATE_WALLS_AT
from compute_layers.lab.weights import WeightsError
from compute_layers.rl.curriculum import Ladder, Lessons, Replay
from compute_layers.rl.dqn import DQNConfig, dqn
from compute_layers.rl.evaluate import film, interquartile_mean, median_room, play, save_film
from compute_layers.rl.eyes import Eyes, Through
from compute_layers.rl.grpo import GRPOConfig, grpo, play_groups
from compute_layers.rl.imitation import ImitationConfig, imitate, right_actions
from compute_layers.rl.policies import Policy, PolicyConfig, load_policy, save_policy
from compute_layers.rl.ppo import PPOConfig, TrainingWarning, Watchman, ppo
from compute_layers.rl.preferences import Taste, film_pairs, optimise
from compute_layers.rl.reinforce import ReinforceConfig, reinforce
from compute_layers.rl.rollout import STAGES, Act, Episodes, Rollout, Rooms, Stage, collect
from compute_layers.rl.sight import SIGHT_SIZE, look


@pytest.fixture(autouse=True)
def one_thread():
    "Small products are fastest on one."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def uniform(observations):
    "Plays at random and values nothing."
    return Act(torch.zeros(len(observations), 5), torch.zeros(len(observations)))


# -- rollouts -----------------------------------------------------------------------------------------------------------


GROWTH = """
import gc, os, psutil, torch
from dataclasses import replace
from compute_layers.rl.policies import Policy, PolicyConfig
from compute_layers.rl.ppo import PPOConfig, ppo
from compute_layers.rl.rollout import STAGES, Rooms
torch.set_num_threads(1)
policy, here = Policy(PolicyConfig("ego", 16, channels=(2, 2), looked=4)), psutil.Process()
config = PPOConfig(frames=1100 * 16 * 2, steps=2, minibatch=32, epochs=1)
for update, _ in enumerate(ppo(Rooms(16, replace(STAGES["near"], steps=8), obs="ego", size=16), policy, config)):
    if update in (99, 1099):
        gc.collect()
        print(update, here.memory_info().rss)
"""


def test_memory_does_not_grow_over_a_thousand_updates():
    """In a process of its own, by what it holds now. Pictures of 1,000 updates would be 25 MB, their graphs far more."""
    said = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout.split()
    assert said[::2] == ["99", "1099"]
    assert int(said[3]) - int(said[1]) < 8 * 2**20


def test_a_room_ends_in_one_way_and_begins_again():
    rooms, episodes = Rooms(200, replace(STAGES["near"], max_offset=0.15, steps=6), seed=4), Episodes.of(200)
    rollout = collect(rooms, uniform, Rollout.allocate(24, rooms.observe()), torch.Generator().manual_seed(0), episodes)
    assert not (rollout.terminated & rollout.truncated).any() and rollout.terminated.any() and rollout.truncated.any()
    assert torch.equal(rollout.rewards > 0, rollout.terminated)  # one piece of gold: eating it is the end
    ended = episodes.take()
    assert ended["episodes"] == int(rollout.done.sum()) and ended["length"] <= 6
    lengths = rollout.done.int().cumsum(0)
    assert lengths.max() >= 4  # a room that truncates every 6 steps has begun again


def test_gold_on_the_last_step_is_an_end_and_not_a_time_out():
    stage = replace(STAGES["near"], steps=1)
    rooms = Rooms(1, stage)
    rooms.enter(levels.bare(0, 1))
    rooms.world.gold[0, 0] = rooms.world.agent[0] + 0.07 * np.array([np.cos(rooms.world.heading[0]), np.sin(rooms.world.heading[0])])
    outcome = rooms.step(np.array([1]))
    assert outcome.terminated[0] and not outcome.truncated[0] and outcome.rewards[0] == 1 and not len(outcome.cut)


@pytest.mark.parametrize("obs", ["state", "sight", "ego", "top"])
def test_the_number_of_threads_changes_nothing(obs):
    alone, shared = (Lessons(17, Ladder(), "walls_two_gold", 3, obs, 16, threads) for threads in (1, 4))
    rng = np.random.default_rng(0)
    for _ in range(50):
        actions = rng.integers(0, 5, 17)
        for one, other in zip(alone.step(actions), shared.step(actions)):
            np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(alone.observe(), shared.observe())
    np.testing.assert_array_equal(right_actions(alone), right_actions(shared))
    assert Rooms(2, threads=8).step(np.zeros(2)).rewards.shape == (2,)  # more threads than rooms


def test_a_run_ends_by_the_clock_with_a_learning_rate_that_has_fallen(monkeypatch):
    """The clock is ours: a tenth of a second each time it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(sys.modules["compute_layers.rl.ppo"].time, "monotonic", lambda: next(ticks) / 10)
    torch.manual_seed(0)
    endless = PPOConfig(frames=10**9, minibatch=256)
    rows = list(ppo(Rooms(16), Policy(PolicyConfig()), endless, minutes=0.02))
    assert 1 < len(rows) < 13 and rows[-1]["frames"] == 256 * len(rows) and rows[-1]["lr"] < rows[0]["lr"]
    assert len(list(ppo(Rooms(16), Policy(PolicyConfig()), endless, minutes=1e-9))) == 1
    *_, row = imitate(Rooms(16), Policy(PolicyConfig()), ImitationConfig(frames=10**9, rooms=16), minutes=0.02)
    assert 16 < row["frames"] <= 16 * 13


def test_nothing_is_learned_where_nothing_can_be_done():
    """Gold behind a wall without a way: the oracle stands still, and a student that learned from it would, too."""
    world = STAGES["near"].rooms(0, 4)
    world.walls[:, 0] = (0.0, 0.0, 1.0, 1.0, 0.0)  # all wall
    torch.manual_seed(0)
    policy = Policy(PolicyConfig())
    before = [p.clone() for p in policy.parameters()]
    rooms = Rooms(4, worlds=lambda k: world.take(slice(0, k)))
    assert not right_actions(rooms).any()
    list(imitate(rooms, policy, ImitationConfig(frames=8, rooms=4, student=0.0, only_hope=True)))
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters()))


def test_no_room_is_played_twice_and_none_is_of_the_examination():
    rooms, seen = Rooms(16, seed=11), set()
    for _ in range(64):
        rooms.step(np.zeros(16, int))
        seen |= {tuple(place) for place in rooms.world.gold[:, 0]}
    assert len(seen) == 16 * 3
    for seed in (-1, levels.HELD_OUT_SEED):
        with pytest.raises(ValueError, match="examinations"):
            Rooms(2, seed=seed)


@pytest.mark.parametrize("wrong, says", [(dict(n=0), "at least 1"), (dict(n=2, obs="smell"), "state, sight, ego, top"), (dict(n=2, stage="attic"), "near, room, walls")])
def test_what_cannot_be_is_refused_by_name(wrong, says):
    with pytest.raises(ValueError, match=says):
        Rooms(**wrong)


# -- going on where it was ------------------------------------------------------------------------------------------------


SICK = pytest.param("state", 8, 0.3, marks=pytest.mark.filterwarnings("ignore::compute_layers.rl.ppo.TrainingWarning"))


@pytest.mark.parametrize("obs, inputs, lr", [("state", 8, 2e-3), ("ego", 24, 2e-3), SICK])
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, obs, inputs, lr):
    config = PPOConfig(frames=8 * 16 * 8, steps=16, minibatch=64, epochs=2, lr=lr)

    def fresh():
        torch.manual_seed(3)
        return Rooms(8, replace(STAGES["near"], steps=11), seed=2, obs=obs, size=inputs), Policy(PolicyConfig(obs, inputs, channels=(4, 8), looked=16))

    rooms, whole = fresh()
    rows = list(ppo(rooms, whole, config, seed=5))
    rooms, half = fresh()
    run = ppo(rooms, half, config, seed=5, checkpoints=tmp_path, checkpoint_every=2)
    for _ in range(5):  # stopped after the fifth update: the checkpoint is of the fourth
        next(run)
    rooms, other = fresh()
    torch.nn.init.zeros_(other.logits.weight)
    rest = list(ppo(rooms, other, config, seed=5, checkpoints=tmp_path, resume=True))
    assert [row["frames"] for row in rest] == [row["frames"] for row in rows[4:]]
    if lr == 0.3:  # a sick run: what was said before the stop is not said again after it
        assert any(row["warnings"] for row in rows[:4]) and not any(row["warnings"] for row in rows[4:])
    for mine, theirs in zip(rest, rows[4:]):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    with pytest.raises(ValueError, match="other numbers"):
        next(ppo(*fresh(), replace(config, lr=1e-4), seed=5, checkpoints=tmp_path, resume=True))


@pytest.mark.parametrize("config", [
    GRPOConfig(frames=2500, groups=4, tries=4, minibatch=64, guide="weighted", reference_weight=0.1),
    GRPOConfig(frames=2500, groups=4, tries=4, minibatch=64, guide="clone"),
    ImitationConfig(frames=16 * 40, rooms=16, noise=0.3, greedy=0.5, balance=True, value_weight=0.5),
    ReinforceConfig(frames=1200),
    DQNConfig(frames=16 * 4 * 10, memory=400, begin=128, batch=64, renew=7),
    PPOConfig(frames=8 * 16 * 16, steps=16, minibatch=64, epochs=2),
], ids=["GRPO with a reference", "GRPO with cloned guides", "DAgger", "REINFORCE", "DQN", "a taste is optimised"])
def test_other_rules_go_on_exactly(tmp_path, config):
    def learn(policy, numbers=config, **keywords):
        rooms = Rooms(16, replace(STAGES["near"], steps=11), seed=2)
        if isinstance(config, PPOConfig):
            torch.manual_seed(4)
            return optimise(rooms, policy, [Taste()], fresh(), numbers, price=0.1, seed=5, **keywords)
        rule = {GRPOConfig: grpo, ReinforceConfig: reinforce, ImitationConfig: partial(imitate, every=5), DQNConfig: partial(dqn, every=4)}[type(config)]
        return rule(rooms, policy, numbers, seed=5, **keywords)

    def fresh():
        torch.manual_seed(3)
        return Policy(PolicyConfig())

    whole, half, other = fresh(), fresh(), fresh()
    rows = list(learn(whole))
    run = learn(half, checkpoints=tmp_path, checkpoint_every=2)
    for _ in range(5):  # stopped after the fifth row: the checkpoint is of the fourth
        next(run)
    rest = list(learn(other, checkpoints=tmp_path, resume=True))
    assert len(rows) > 5 and [row["frames"] for row in rest] == [row["frames"] for row in rows[4:]]
    for mine, theirs in zip(rest, rows[4:]):
        assert {k: v for k, v in mine.items() if k != "seconds"} == {k: v for k, v in theirs.items() if k != "seconds"}
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert not list(learn(fresh(), checkpoints=tmp_path, resume=True))  # it is over
    with pytest.raises(ValueError, match="other numbers"):
        next(learn(fresh(), replace(config, lr=1e-4), checkpoints=tmp_path, resume=True))


def test_who_has_spent_the_budget_does_not_go_on(tmp_path):
    torch.manual_seed(4)
    policy, reference, taste = Policy(PolicyConfig()), Policy(PolicyConfig()), Taste()
    learn = lambda **keywords: optimise(Rooms(16, "near", seed=2), policy, [taste], reference, PPOConfig(frames=16 * 16 * 6, steps=16, minibatch=64), budget=0.0, checkpoints=tmp_path, **keywords)  # noqa: E731
    assert len(list(learn())) == 1 and not list(learn(resume=True))


# -- the watchman ----------------------------------------------------------------------------------------------------------


def what_is_said(config: PPOConfig, rooms: Rooms, shape: dict | None = None) -> str:
    "The warnings of a short run."
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", TrainingWarning)
        list(ppo(rooms, Policy(PolicyConfig(**(shape or {}))), config))
    return " | ".join(str(w.message) for w in said if issubclass(w.category, TrainingWarning))


def test_a_healthy_run_is_left_in_peace():
    assert what_is_said(PPOConfig(frames=30_000), Rooms(64)) == ""


def test_a_learning_rate_that_is_too_high_is_named():
    said = what_is_said(PPOConfig(frames=20_000, lr=0.3, anneal=False, grad_clip=None), Rooms(64, replace(STAGES["near"], max_offset=0.15)))
    assert "KL divergence exploded" in said and "lower lr" in said


def test_an_entropy_that_collapses_is_named():
    said = what_is_said(PPOConfig(frames=30_000, entropy_weight=-1.0), Rooms(64))
    assert "entropy has collapsed" in said and "raise entropy_weight" in said


def test_a_value_loss_that_diverges_is_named():
    said = what_is_said(PPOConfig(frames=10_000, lr=1.0, anneal=False, grad_clip=None), Rooms(64, replace(STAGES["near"], max_offset=0.15)))
    assert "value loss diverges" in said and "set grad_clip" in said


def test_a_value_loss_that_grows_with_the_returns_is_healthy():
    watchman = Watchman(actions=2)
    for k in range(40):  # CartPole: the better it plays, the larger both are
        row = dict(frames=k, entropy=0.6, approx_kl=0.01, value_loss=0.05 * 1.2**k, **{"return": 10.0 + 5 * k})
        assert watchman.look(row) == []
    assert "diverges" in watchman.look({**row, "value_loss": 1e6})[0]


# -- evaluation --------------------------------------------------------------------------------------------------------------


def test_every_player_gets_the_same_rooms_and_the_order_of_chunks_is_nothing():
    policy = Policy(PolicyConfig())
    a, b = play(policy, n=60, chunk=60), play(policy, n=60, chunk=7)
    assert (a.success == b.success).all() and (a.steps == b.steps).all() and (a.oracle_steps == b.oracle_steps).all()
    assert (a.oracle_steps == play("random", n=60).oracle_steps).all()
    assert (a.steps[~a.success] == 32).all()


def test_failures_come_last_in_the_order_of_episodes():
    played = play("random", n=101)
    assert not played.success[median_room(played)]
    perfect = play("oracle", n=101)
    assert perfect.steps[median_room(perfect)] == np.median(perfect.steps)


def test_the_interval_is_wide_for_seeds_that_differ_and_bad_scores_are_refused():
    assert interquartile_mean([0.1, 0.5, 0.9]).high - interquartile_mean([0.1, 0.5, 0.9]).low > 0.3
    assert interquartile_mean([[0.5, 0.9]] * 3).value == pytest.approx(0.7)
    with pytest.raises(ValueError, match="finite"):
        interquartile_mean([0.5, float("nan")])


def test_a_film_is_written(tmp_path):
    frames = film("oracle", room=3, size=32)
    assert frames.shape[1:] == (32, 32, 3) and save_film(frames, tmp_path / "a.gif").stat().st_size > 100
    with pytest.raises(ValueError, match=".gif or .mp4"):
        save_film(frames, tmp_path / "a.avi")


# -- policies, eyes, imitation, groups ------------------------------------------------------------------------------------------


def test_a_policy_comes_back_from_the_disk_and_a_brain_is_not_one(tmp_path):
    torch.manual_seed(1)
    policy = Policy(PolicyConfig("top", 32, eyes=dict(size=32, channels=4)))
    pictures = torch.from_numpy(picture.draw(levels.bare(0, 3), 32))
    again = load_policy(save_policy(policy, tmp_path / "weights"))
    torch.testing.assert_close(again(pictures).logits, policy(pictures).logits)
    with pytest.raises(WeightsError, match="config.json"):
        load_policy(tmp_path)
    with pytest.raises(ValueError, match="obs must be"):
        PolicyConfig("smell")


def test_frozen_eyes_do_not_learn_and_their_numbers_are_as_good_as_the_picture():
    torch.manual_seed(0)
    policy = Policy(PolicyConfig("top", 32, eyes=dict(size=32, channels=4)))
    before = {name: value.clone() for name, value in policy.eyes.state_dict().items()}
    rooms = Rooms(32, obs="top", size=32)
    pictures = torch.from_numpy(rooms.observe().copy())
    torch.testing.assert_close(policy(pictures).logits, policy(policy.eyes.geometry(pictures)).logits)
    list(ppo(Through(rooms, policy.eyes), policy, PPOConfig(frames=2048, steps=16)))
    assert all(torch.equal(value, policy.eyes.state_dict()[name]) for name, value in before.items())
    with pytest.raises(ValueError, match="eyes of size"):
        Through(Rooms(2, obs="ego", size=32), Eyes())


def test_a_student_that_is_shown_the_way_agrees_more_and_more():
    torch.manual_seed(0)
    rows = list(imitate(Rooms(64), Policy(PolicyConfig()), ImitationConfig(frames=16_000)))
    assert rows[-1]["agreement"] > rows[0]["agreement"] + 0.1


def test_groups_play_the_same_levels_and_rooms_must_fit():
    config = GRPOConfig(frames=3000, groups=8, tries=8)
    rows = list(grpo(Rooms(64), Policy(PolicyConfig()), config))
    assert rows[-1]["frames"] >= 3000 and 0 <= rows[0]["silent"] <= 1
    with pytest.raises(ValueError, match="8 groups of 8 tries need 64 rooms, got 60"):
        next(grpo(Rooms(60), Policy(PolicyConfig()), config))


# -- curricula, sight ------------------------------------------------------------------------------------------------------------


def test_a_ladder_gives_every_lesson_its_own_time_and_goes_up_with_success():
    stages = (Stage("close", 5, max_offset=0.15, exits=False), Stage("far", 9, max_offset=0.9, exits=False), STAGES["walls_two_gold"])
    ladder = Ladder(stages, enough=0.5, memory=16)
    rooms = Lessons(32, ladder, "walls_two_gold", seed=3)
    assert rooms.observe().shape == (32, SIGHT_SIZE)
    ends = []
    for _ in range(5):
        ends.append(rooms.step(np.zeros(32, int)))  # nobody moves: every lesson of 5 steps runs out
    assert not ends[3].truncated.any() and ends[4].truncated.all() and ladder.rung == 0
    ladder.ended(np.zeros(16, int), np.arange(16), np.ones(16, bool), None)
    assert ladder.rung == 1
    for _ in range(5):
        rooms.step(np.zeros(32, int))
    assert (rooms.lesson == 1).sum() > 20 and not ends[4].terminated.any()
    with pytest.raises(ValueError, match="does not fit into stage 'near'"):
        Lessons(4, Ladder(stages), "near")
    with pytest.raises(ValueError, match="enough must lie"):
        Ladder(enough=0)


def test_replay_hears_the_regret_of_the_level_that_was_played():
    replay = Replay("near", store=64)
    rooms = Lessons(4, replay, "near", seed=1)
    rollout = Rollout.allocate(40, rooms.observe())
    levels_at_start = rooms.level.copy()
    collect(rooms, uniform, rollout, torch.Generator().manual_seed(0))
    gain = torch.zeros(40, 4)
    first_end = [int(rollout.done[:, i].int().argmax()) for i in range(4)]
    gain[0, 2] = 3.0  # in the first episode of room 2, one step was a surprise
    gain[1, 3] = -5.0  # what went worse than foreseen is no regret
    rooms.told(rollout, gain)
    known = dict(zip(replay.indices.tolist(), replay.scores.tolist()))
    assert known[levels_at_start[2]] == pytest.approx(3.0 / (first_end[2] + 1))
    assert all(score == 0 for index, score in known.items() if index >= 0 and index != levels_at_start[2])


def test_sight_does_not_depend_on_where_north_is():
    world = levels.walls(9, 40)
    turned = world.copy()  # the room on its side: x becomes 1 - y, y becomes x
    for name in ("agent", "gold"):
        array = getattr(world, name)
        getattr(turned, name)[...] = np.stack([1 - array[..., 1], array[..., 0]], -1)
    turned.walls[..., 0], turned.walls[..., 1] = 1 - world.walls[..., 1], world.walls[..., 0]
    turned.walls[..., 4] = world.walls[..., 4] + np.pi / 2
    turned.heading[:] = world.heading + np.pi / 2
    absent = world.walls[..., 2] == 0
    turned.walls[absent] = 0
    np.testing.assert_allclose(look(turned), look(world), atol=1e-5)


def test_rows_see_a_wall_as_the_agent_does(tmp_path):
    """A room that is turned around its middle, agent and all, looks the same to the rows; what is kept is what plays."""
    world = levels.walls(seed=5, n=12)
    states, policy = torch.from_numpy(envs.state(world)), Policy(PolicyConfig("state", STATE_SIZE, rows=16))
    turned = type(world)(*(np.array(part) for part in (world.agent, world.heading, world.gold, world.gold_here, world.walls)))
    for points in (turned.agent, turned.gold, turned.walls):
        points[..., 0], points[..., 1] = 1 - points[..., 1].copy(), points[..., 0].copy()
    turned.heading[:], turned.walls[..., 4] = world.heading + np.pi / 2, world.walls[..., 4] + np.pi / 2
    other = torch.from_numpy(envs.state(turned))
    assert not torch.allclose(states, other, atol=1e-2)
    rows = policy.trunk[0]
    torch.testing.assert_close(rows(other * 8)[:, STATE_WALLS_AT:], rows(states * 8)[:, STATE_WALLS_AT:], atol=1e-4, rtol=0)
    save_policy(policy, tmp_path / "kept")
    assert torch.equal(load_policy(tmp_path / "kept")(states).logits, policy(states).logits)
    for wrong in (dict(obs="sight"), dict(obs="state", inputs=8)):
        with pytest.raises(ValueError, match="rows are for rooms with walls"):
            PolicyConfig(rows=16, **wrong)


# -- behind a brain, preferences --------------------------------------------------------------------------------------------------


def test_taste_is_refused_where_its_rater_is_blind():
    with pytest.raises(ValueError, match="obs='state'"):
        film_pairs(Rooms(4, obs="ego", size=16), Policy(PolicyConfig("ego", 16, channels=(2, 2), looked=4)), 4)


def test_a_price_on_the_nats_keeps_a_policy_near_its_reference():
    torch.manual_seed(0)
    reference, taste = Policy(PolicyConfig()), Taste()
    gone = {}
    for price in (0.0, 3.0):
        policy = Policy(PolicyConfig())
        policy.load_state_dict(reference.state_dict())
        gone[price] = list(optimise(Rooms(32), policy, [taste], reference, PPOConfig(frames=16_384, lr=1e-3, entropy_weight=0.0), price=price))[-1]["nats"]
    assert gone[3.0] < 0.5 * gone[0.0]


def test_a_guide_that_dawdles_still_wins():
    """It turns left and back again, then does as the oracle does; where there is no time for that, it goes at once."""
    rooms, dice = Rooms(40, "near", 1), torch.Generator().manual_seed(0)
    world, policy = rooms.stage.rooms(1, 20, 0), Policy(PolicyConfig())
    at_once, late = (play_groups(rooms, policy, world, 2, 0.97, dice, guided=True, dawdle=dawdle) for dawdle in (0, 3))
    guided = at_once.guided.numpy()
    assert guided.sum() == 20 and at_once.won[guided].all() and late.won[guided].all()
    lengths = [np.bincount(tries.which.numpy(), minlength=40)[guided] for tries in (at_once, late)]
    np.testing.assert_array_equal(lengths[1], np.where(lengths[0] + 6 <= 32, lengths[0] + 6, lengths[0]))
    with pytest.raises(ValueError, match="needs a guide"):
        GRPOConfig(dawdle=1)
