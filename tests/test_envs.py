"""The Gymnasium environments: the checkers of Gymnasium and Stable-Baselines3, faults, wrappers, and bytes that must agree."""

import importlib.metadata
import os
import subprocess
import sys

os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import compute_layers.game as game

IDS = ("compute_layers/GoldRoom-v0", "compute_layers/GoldRoomWalls-v0")
OBSERVATIONS = ({}, {"view": "ego"}, {"obs": "state"}, {"antialias": False, "size": 48})
LEVEL = {"agent": [0.3, 0.5], "heading": 0.0, "gold": [[0.5, 0.5]], "walls": [[0, 0, 0.0625, 1, 0]]}
EXIT = {"agent": [0.85, 0.5], "heading": 0.0, "gold": [[0.2, 0.2]], "walls": [[0.9375, 0, 0.0625, 0.4, 0], [0.9375, 0.6, 0.0625, 0.4, 0]]}


def vector(name, n, **parameters):
    parameters.setdefault("oracle_steps", False)
    return gymnasium.make_vec(name, num_envs=n, vectorization_mode="vector_entry_point", **parameters)


# ---------------------------------------------------------------- registration


def run_python(program):
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)


def test_importing_the_game_registers_and_stays_light():
    done = run_python(
        "import sys, compute_layers.game, gymnasium\n"
        "assert {'compute_layers/GoldRoom-v0', 'compute_layers/GoldRoomWalls-v0'} <= set(gymnasium.registry)\n"
        "print([m for m in ('torch', 'pygame', 'matplotlib') if m in sys.modules])"
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_the_entry_point_registers_without_importing_the_game():
    done = run_python(
        "import importlib.metadata, sys, gymnasium\n"
        "for point in importlib.metadata.entry_points(group='gymnasium.envs'):\n"
        "    if point.value.startswith('compute_layers'): point.load()()\n"
        "assert 'numba' not in sys.modules\n"
        "print(gymnasium.make('compute_layers/GoldRoom-v0', oracle_steps=False).reset(seed=0)[0].shape)"
    )
    assert done.stdout.strip() == "(64, 64, 3)", done.stderr


def test_gymnasium_can_do_the_import_by_itself():
    done = run_python("import gymnasium; print(gymnasium.make('compute_layers.game:compute_layers/GoldRoomWalls-v0').spec.id)")
    assert done.stdout.strip() == "compute_layers/GoldRoomWalls-v0", done.stderr


@pytest.mark.parametrize("name, limit", ((IDS[0], 128), (IDS[1], 512)))
def test_time_limits(name, limit):
    env = gymnasium.make(name, oracle_steps=False)
    env.reset(seed=0)
    for t in range(1, limit + 1):
        _, _, terminated, truncated, _ = env.step(0)
        assert (terminated, truncated) == (False, t == limit)
    envs = vector(name, 2)
    envs.reset(seed=0)
    for t in range(1, limit + 1):
        _, _, terminated, truncated, _ = envs.step(np.zeros(2, int))
        assert (terminated.any(), truncated.all()) == (False, t == limit)


def test_the_time_limit_can_be_changed_for_both():
    env = gymnasium.make(IDS[0], max_episode_steps=3, oracle_steps=False)
    envs = vector(IDS[0], 1, max_episode_steps=3)
    env.reset(seed=0), envs.reset(seed=0)
    assert [env.step(0)[3] for _ in range(3)] == [bool(envs.step(np.zeros(1, int))[3][0]) for _ in range(3)] == [False, False, True]


# ---------------------------------------------------------------- checkers and wrappers


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("parameters", OBSERVATIONS, ids=str)
def test_gymnasium_check_env(name, parameters):
    check_env(gymnasium.make(name, **parameters).unwrapped)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("parameters", OBSERVATIONS[:3], ids=str)
def test_stable_baselines_check_env(name, parameters):
    pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.env_checker import check_env as check

    check(gymnasium.make(name, render_mode="rgb_array", render_size=64, **parameters).unwrapped)


@pytest.mark.filterwarnings("ignore")
def test_stable_baselines_ppo_learns_a_few_steps():
    stable_baselines3 = pytest.importorskip("stable_baselines3")
    import torch

    torch.set_num_threads(1)
    env = gymnasium.make(IDS[0], obs="state", oracle_steps=False)
    model = stable_baselines3.PPO("MlpPolicy", env, n_steps=64, batch_size=32, n_epochs=1, device="cpu", seed=0)
    model.learn(128)
    pictures = gymnasium.make(IDS[0], oracle_steps=False)
    stable_baselines3.PPO("CnnPolicy", pictures, n_steps=16, batch_size=16, n_epochs=1, device="cpu", seed=0).learn(16)


def test_record_video_and_statistics(tmp_path):
    pytest.importorskip("moviepy")
    env = gymnasium.make(IDS[0], render_mode="rgb_array", render_size=64, max_episode_steps=5, oracle_steps=False)
    env = gymnasium.wrappers.RecordVideo(gymnasium.wrappers.RecordEpisodeStatistics(env), str(tmp_path), episode_trigger=lambda _: True)
    env.reset(seed=0)
    for _ in range(5):
        info = env.step(0)[4]
    env.close()
    assert info["episode"]["l"] == 5 and list(tmp_path.glob("*.mp4"))


def test_vector_statistics():
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(vector(IDS[0], 3, max_episode_steps=4))
    envs.reset(seed=0)
    for _ in range(4):
        infos = envs.step(np.zeros(3, int))[4]
    assert (infos["episode"]["l"] == 4).all()


@pytest.mark.parametrize("mode", ("rgb_array", "human"))
def test_rendering(mode):
    if mode == "human":
        pytest.importorskip("pygame")
    env = gymnasium.make(IDS[1], render_mode=mode, render_size=96, oracle_steps=False)
    env.reset(seed=0)
    env.step(1)
    frame = env.render()
    assert frame is None if mode == "human" else frame.shape == (96, 96, 3) and len(np.unique(frame)) > 2
    env.close()
    env.close()
    if mode == "rgb_array":
        envs = vector(IDS[1], 3, render_mode=mode, render_size=96)
        envs.reset(seed=0)
        assert [f.shape for f in envs.render()] == [(96, 96, 3)] * 3


def test_a_missing_pygame_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = gymnasium.make(IDS[0], render_mode="human", oracle_steps=False)
    with pytest.raises(gymnasium.error.DependencyNotInstalled, match=r"compute_layers\[human\]"):
        env.reset(seed=0)


# ---------------------------------------------------------------- what info says


@pytest.mark.parametrize("name", IDS)
def test_info_follows_the_oracle(name):
    oracle = pytest.importorskip("compute_layers.game.oracle")
    env = gymnasium.make(name)
    for seed in range(6):
        _, info = env.reset(seed=seed)
        assert set(info) == {"agent", "heading", "gold", "oracle_steps"}
        actions, steps = oracle.plan(env.unwrapped.world)
        assert info["oracle_steps"] == steps[0]
        for t in range(int(steps[0])):
            _, _, terminated, _, info = env.step(int(actions[0, t]))
            assert info["oracle_steps"] == oracle.oracle_steps(env.unwrapped.world)[0]
            assert info["oracle_steps"] == steps[0] - t - 1 or name == IDS[1]  # around walls a plan made anew may be another
        if steps[0] > 0:
            assert terminated and info["oracle_steps"] == 0 and info["gold"] == []


def test_vector_infos_equal_single_infos():
    env, envs = gymnasium.make(IDS[1]), vector(IDS[1], 2, oracle_steps=True)
    _, info = env.reset(seed=4)
    _, infos = envs.reset(seed=4)
    for action in (1, 1, 3, 3, 1, 2):
        assert (infos["agent"][0] == info["agent"]).all() and infos["heading"][0] == info["heading"]
        assert infos["oracle_steps"][0] == info["oracle_steps"] and infos["_agent"].all()
        gold = infos["gold"][0]
        assert gold[~np.isnan(gold[:, 0])].tolist() == info["gold"]
        info, infos = env.step(action)[4], envs.step(np.array([action] * 2))[4]


# ---------------------------------------------------------------- bytes that must agree


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("size, antialias", ((64, True), (64, False), (224, True), (224, False), (37, True)))
def test_region_repaint_equals_whole_repaint(name, size, antialias):
    envs = vector(name, 24, size=size, antialias=antialias, copy=False, max_episode_steps=60, max_offset=0.2) if name == IDS[0] else vector(
        name, 24, size=size, antialias=antialias, copy=False, max_episode_steps=60)
    pictures, _ = envs.reset(seed=100)
    chance, eaten, whole = np.random.default_rng(0), 0, np.empty((24, size, size, 3), np.uint8)
    for t in range(150):
        actions = chance.choice(5, 24, p=(0.05, 0.5, 0.15, 0.15, 0.15))
        _, rewards, *_ = envs.step(actions)
        eaten += rewards.sum()
        game.draw(envs.unwrapped.world, size, antialias=antialias, out=whole)
        assert (pictures == whole).all(), f"step {t}"
    assert eaten > 5  # gold was eaten on the way


@pytest.mark.parametrize("name", IDS)
@pytest.mark.parametrize("mode", (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP))
@pytest.mark.parametrize("parameters", OBSERVATIONS, ids=str)
def test_vector_equals_single(name, mode, parameters):
    shared = {"oracle_steps": False, "max_episode_steps": 12, **parameters}
    own = vector(name, 4, autoreset_mode=mode, **shared)
    loop = gymnasium.make_vec(name, 4, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode}, **shared)
    assert own.metadata["autoreset_mode"] == mode
    assert own.single_observation_space == loop.single_observation_space and own.action_space == loop.action_space
    a, b = own.reset(seed=[3, 1, 4, 15]), loop.reset(seed=[3, 1, 4, 15])
    assert (a[0] == b[0]).all()
    chance = np.random.default_rng(1)
    for _ in range(50):
        actions = chance.integers(0, 5, 4)
        a, b = own.step(actions), loop.step(actions)
        for k in range(4):
            assert a[k].dtype == b[k].dtype and (a[k] == b[k]).all()
        assert (a[4]["agent"] == b[4]["agent"]).all() and (a[4]["heading"] == b[4]["heading"]).all()
        assert ("final_obs" in a[4]) == ("final_obs" in b[4])
        if "final_obs" in a[4]:
            assert (a[4]["_final_obs"] == b[4]["_final_obs"]).all()
            for x, y in zip(a[4]["final_obs"], b[4]["final_obs"]):
                assert (x is None and y is None) or (x == y).all()
            done = a[4]["_final_info"]
            assert (a[4]["final_info"]["agent"][done] == b[4]["final_info"]["agent"][done]).all()


def test_disabled_autoreset_and_masks():
    envs = vector(IDS[0], 3, autoreset_mode="Disabled", max_episode_steps=2)
    envs.reset(seed=0)
    envs.step(np.zeros(3, int))
    before = envs.step(np.ones(3, int))[4]["agent"]
    with pytest.raises(ValueError, match=r"rooms \[0, 1, 2\] are done"):
        envs.step(np.zeros(3, int))
    _, infos = envs.reset(options={"reset_mask": np.array([True, False, True])})
    assert (infos["agent"][1] == before[1]).all() and (infos["agent"][0] != before[0]).any()
    with pytest.raises(ValueError, match="reset_mask"):
        envs.reset(options={"reset_mask": [True, False, True]})


def test_zero_copy_only_on_request():
    for copy in (True, False):
        envs = vector(IDS[0], 2, copy=copy)
        one, two = envs.reset(seed=0)[0], envs.step(np.ones(2, int))[0]
        assert np.shares_memory(one, two) != copy


def test_without_a_seed_no_held_out_level_is_played():
    env = gymnasium.make(IDS[0], oracle_steps=False)
    env.reset()
    envs = vector(IDS[0], 5)
    envs.reset()
    assert env.unwrapped.rooms.seeds[0] < game.levels.HELD_OUT_SEED and (envs.unwrapped.rooms.seeds < game.levels.HELD_OUT_SEED).all()
    assert len(set(envs.unwrapped.rooms.seeds)) == 5


def test_resets_walk_through_the_levels_of_the_seed():
    env = gymnasium.make(IDS[1], oracle_steps=False)
    frames = [env.reset(seed=9)[0], env.reset()[0], env.reset(options={"level": LEVEL})[0], env.reset()[0]]
    wanted = game.draw(game.levels.walls(9, 3))
    assert (frames[0] == wanted[0]).all() and (frames[1] == wanted[1]).all() and (frames[3] == wanted[2]).all()


def test_explicit_levels_with_more_of_everything():
    walls = [[0.1 * k, 0.9, 0.05, 0.05, 0.3] for k in range(9)]
    crowded = {**LEVEL, "gold": [[0.5, 0.5], [0.6, 0.6], [0.7, 0.7]], "walls": walls}
    envs = vector(IDS[0], 3)
    envs.reset(seed=0)
    frames, infos = envs.reset(options={"level": [LEVEL, crowded, EXIT]})
    assert (frames == game.draw(game.from_levels([LEVEL, crowded, EXIT]))).all()
    assert (~np.isnan(infos["gold"][:, :, 0])).sum(1).tolist() == [1, 3, 1]
    frames, _ = envs.reset()  # back to the levels of the seed: no explicit wall is left behind
    assert (frames[0] == game.draw(game.levels.bare(0, 2))[1]).all()
    with pytest.raises(ValueError, match="places for 2 pieces of gold"):
        gymnasium.make(IDS[0], obs="state", oracle_steps=False).reset(options={"level": crowded})


def test_state_is_the_documented_vector():
    env = gymnasium.make(IDS[0], obs="state", oracle_steps=False)
    state, _ = env.reset(options={"level": {**LEVEL, "heading": np.pi / 2, "gold": [[0.5, 0.6]]}})
    numbers = dict(zip(game.envs.STATE_FIELDS, state.tolist()))
    wanted = {
        "agent_x": 0.3, "agent_y": 0.5, "cos_heading": 0, "sin_heading": 1, "gold0_here": 1, "gold0_dx": 0.2, "gold0_dy": 0.1,
        "gold0_ahead": 0.1, "gold0_right": -0.2, "gold1_here": 0, "wall0_here": 1, "wall0_width": 0.0625, "wall0_height": 1,
        "wall0_cos": 1, "wall0_sin": 0, "wall1_here": 0, "wall1_cos": 0,
    }
    for name, value in wanted.items():
        assert abs(numbers[name] - value) < 1e-6, name
    assert state.dtype == np.float32 and env.observation_space.contains(state)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("action", (5, -1, 1.5, None, "forward", np.array([1]), np.array([0, 1])), ids=repr)
def test_bad_actions(action):
    env = gymnasium.make(IDS[0], oracle_steps=False)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="outside the space"):
        env.unwrapped.step(action)


@pytest.mark.parametrize(
    "actions, words",
    (
        (np.array([0, 5]), "action 5 is outside the space"),
        (np.array([0, -1]), "action -1 is outside the space"),
        (np.array([0]), r"shape \(2,\)"),
        (np.array([[0, 1]]), r"shape \(2,\)"),
        (np.array([0.0, 1.0]), "whole numbers"),
    ),
    ids=str,
)
def test_bad_vector_actions(actions, words):
    envs = vector(IDS[0], 2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=words):
        envs.step(actions)


@pytest.mark.parametrize(
    "change, words",
    (
        ({"agent": [float("nan"), 0.5]}, "agent holds NaN"),
        ({"agent": [0.5]}, r"agent must have shape \(2,\)"),
        ({"agent": [0.05, 0.5]}, "stands in wall 0"),
        ({"heading": float("inf")}, "heading holds NaN or infinity"),
        ({"heading": "north"}, "heading must be numbers"),
        ({"gold": [[1.2, 0.5]]}, "gold lies outside the room"),
        ({"gold": [0.5, 0.5]}, "gold must have shape"),
        ({"walls": [[0.5, 0.5, -0.1, 0.1, 0]]}, "positive width and height"),
        ({"walls": [[0.5, 0.5, 0.1, 0.1]]}, "walls must have shape"),
        ({"goal": []}, "unknown fields"),
    ),
    ids=str,
)
def test_bad_levels(change, words):
    env, envs = gymnasium.make(IDS[0], oracle_steps=False), vector(IDS[1], 2)
    with pytest.raises(ValueError, match=words):
        env.reset(options={"level": {**LEVEL, **change}})
    with pytest.raises(ValueError, match=words):
        envs.reset(seed=0, options={"level": {**LEVEL, **change}})


@pytest.mark.parametrize(
    "parameters, words",
    (
        ({"size": -64}, "size must be"),
        ({"size": 0}, "size must be"),
        ({"size": 64.0}, "size must be"),
        ({"obs": "pixels"}, "obs must be one of"),
        ({"view": "side"}, "view must be one of"),
        ({"render_mode": "ansi"}, "render_mode must be"),
        ({"render_size": 0}, "render_size must be"),
        ({"max_offset": 0.01}, "max_offset must lie between"),
    ),
    ids=str,
)
def test_bad_parameters(parameters, words):
    with pytest.raises(ValueError, match=words):
        game.GoldRoom(**parameters)
    with pytest.raises(ValueError, match=words):
        game.GoldRoomVector(2, **parameters)


def test_bad_parameters_of_walls_and_vectors():
    for parameters, words in (({"max_walls": 3}, "max_walls"), ({"max_gold": 0}, "max_gold")):
        with pytest.raises(ValueError, match=words):
            game.GoldRoomWalls(**parameters)
    for parameters, words in (({"num_envs": 0}, "num_envs"), ({"num_envs": 2, "max_episode_steps": 0}, "max_episode_steps")):
        with pytest.raises(ValueError, match=words):
            game.GoldRoomVector(**parameters)
    for seed in (-1, 1.5, 2**63):
        with pytest.raises(ValueError, match="seed must be"):
            game.GoldRoom(oracle_steps=False).reset(seed=seed)
    with pytest.raises(ValueError, match="a list of 2"):
        game.GoldRoomVector(2, oracle_steps=False).reset(seed=[1, 2, 3])


def test_stepping_before_reset():
    with pytest.raises(gymnasium.error.ResetNeeded):
        game.GoldRoom().step(0)
    with pytest.raises(gymnasium.error.ResetNeeded):
        game.GoldRoomVector(2).step(np.zeros(2, int))


@pytest.mark.parametrize("parameters", OBSERVATIONS, ids=str)
def test_an_agent_may_leave_through_the_exit(parameters):
    env = gymnasium.make(IDS[0], **parameters)
    env.reset(options={"level": EXIT})
    for t in range(128):
        seen, reward, terminated, truncated, info = env.step(1)
        assert not terminated and reward == 0 and env.observation_space.contains(seen)
    assert truncated and info["agent"][0] > 8
    if parameters == {}:
        assert not ((seen == (0, 255, 0)).all(-1)).any()  # the agent is out of the picture
