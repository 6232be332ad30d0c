"""Every learning rule against an independent implementation on a fixed batch, to 1e-5."""

import math

import gymnasium
import numpy as np
import pytest
import torch

from compute_layers.rl.dqn import q_loss, td_targets
from compute_layers.rl.grpo import GroupBatch, GRPOConfig, group_advantages, grpo_loss
from compute_layers.rl.imitation import imitation_loss
from compute_layers.rl.ppo import Batch, PPOConfig, advantages, ppo_loss
from compute_layers.rl.preferences import preference_loss
from compute_layers.rl.reinforce import reinforce_loss
from compute_layers.rl.rollout import Act

STEPS, ROOMS, WIDTH, ACTIONS = 24, 6, 5, 4


@pytest.fixture(scope="module")
def peer():
    "Stable-Baselines3's PPO, with its buffer filled by a fixed batch."
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Still(gymnasium.Env):
        "Never stepped: only its spaces matter."
        observation_space = gymnasium.spaces.Box(-5, 5, (WIDTH,), np.float32)
        action_space = gymnasium.spaces.Discrete(ACTIONS)

        def reset(self, *, seed=None, options=None):
            return np.zeros(WIDTH, np.float32), {}

    def make(**settings):
        model = sb3.PPO("MlpPolicy", DummyVecEnv([Still] * ROOMS), n_steps=STEPS, batch_size=STEPS * ROOMS, n_epochs=1, seed=1, device="cpu", **settings)
        model.set_logger(configure(None, []))
        rng, buffer = np.random.default_rng(0), model.rollout_buffer
        buffer.reset()
        starts = np.ones(ROOMS, bool)
        for _ in range(STEPS):
            seen = rng.normal(size=(ROOMS, WIDTH)).astype(np.float32)
            actions = rng.integers(0, ACTIONS, ROOMS)
            with torch.no_grad():
                values, log_probs, _ = model.policy.evaluate_actions(torch.from_numpy(seen), torch.from_numpy(actions))
            # as if the policy had moved since: ratios differ from 1, and some are clipped
            log_probs = log_probs + torch.from_numpy(rng.normal(0, 0.2, ROOMS)).float()
            values = values.flatten() + torch.from_numpy(rng.normal(0, 0.3, ROOMS)).float()
            buffer.add(seen, actions[:, None], rng.normal(size=ROOMS).astype(np.float32), starts, values, log_probs)
            starts = rng.random(ROOMS) < 0.15
        last = torch.from_numpy(rng.normal(size=ROOMS)).float()
        buffer.compute_returns_and_advantage(last, starts)
        return model, last, starts

    return make


def whole(model, last, ends) -> tuple[torch.Tensor, Batch]:
    "Our advantages, and our batch, from their buffer."
    buffer = model.rollout_buffer
    rewards, values, starts = (torch.from_numpy(np.asarray(getattr(buffer, name), np.float32)) for name in ("rewards", "values", "episode_starts"))
    done = torch.cat([starts[1:], torch.from_numpy(ends).float()[None]]).bool()
    next_values = torch.cat([values[1:], last[None]]).masked_fill(done, 0.0)
    ours = advantages(rewards, values, next_values, done, model.gamma, model.gae_lambda)
    flat = [torch.from_numpy(buffer.observations).flatten(0, 1), torch.from_numpy(buffer.actions).long().flatten(),
            torch.from_numpy(buffer.log_probs).flatten(), values.flatten(), ours.flatten(), (ours + values).flatten()]
    return ours, Batch(*flat)


@pytest.mark.parametrize("value_clip", [None, 0.1])
@pytest.mark.parametrize("normalise", [True, False])
def test_advantages_and_losses_are_those_of_stable_baselines3(peer, normalise, value_clip):
    model, last, ends = peer(normalize_advantage=normalise, clip_range_vf=value_clip, learning_rate=1e-12, ent_coef=0.01, gamma=0.97, gae_lambda=0.9)
    ours, batch = whole(model, last, ends)
    np.testing.assert_allclose(ours.numpy(), model.rollout_buffer.advantages, atol=1e-5)
    np.testing.assert_allclose((ours + torch.from_numpy(model.rollout_buffer.values)).numpy(), model.rollout_buffer.returns, atol=1e-5)

    with torch.no_grad():
        logits = model.policy.get_distribution(batch.observations).distribution.logits
        values = model.policy.predict_values(batch.observations).flatten()
    config = PPOConfig(normalise_advantages=normalise, value_clip=value_clip, entropy_weight=0.01, clip=0.2)
    loss, report = ppo_loss(Act(logits, values), batch, config)
    model.train()  # one epoch of one batch at a learning rate of nothing: what it logs are the losses
    said = model.logger.name_to_value
    for mine, theirs in (("policy_loss", "policy_gradient_loss"), ("value_loss", "value_loss"), ("approx_kl", "approx_kl"), ("clip_fraction", "clip_fraction")):
        assert float(report[mine]) == pytest.approx(float(said[f"train/{theirs}"]), abs=1e-5), mine
    assert float(report["entropy"]) == pytest.approx(-float(said["train/entropy_loss"]), abs=1e-5)
    assert float(loss) == pytest.approx(float(said["train/loss"]), abs=1e-5)
    assert 0.05 < float(report["clip_fraction"]) < 0.95, "a batch in which nothing is clipped compares little"


def test_time_outs_are_bootstrapped_as_stable_baselines3_does():
    "It adds gamma V(last) to the reward and cuts there; ours puts V(last) into the next values: the same advantages."
    torch.manual_seed(0)
    rewards, values, last = torch.randn(9, 3), torch.randn(9, 3), torch.randn(3)
    done = torch.zeros(9, 3, dtype=torch.bool)
    done[4, 1] = True
    next_values = torch.cat([values[1:], last[None]])
    with_last = next_values.clone()
    with_last[4, 1] = 0.7
    theirs, cut = rewards.clone(), next_values.clone()
    theirs[4, 1] += 0.99 * 0.7
    cut[4, 1] = 0.0
    torch.testing.assert_close(advantages(rewards, values, with_last, done), advantages(theirs, values, cut, done), atol=1e-5, rtol=0)
    assert not torch.allclose(advantages(rewards, values, with_last, done), advantages(rewards, values, cut, done))


def test_without_gae_advantages_are_discounted_returns_minus_values():
    "As `PPOConfig(gae=False)` asks for them, λ = 1: number by number, in plain Python."
    rng = np.random.default_rng(8)
    rewards, values, following = rng.normal(size=(3, 9, 3))
    done = rng.random((9, 3)) < 0.2
    following[:-1] = np.where(done[:-1], following[:-1], values[1:])  # within an episode the next value is the next step's
    expected = np.empty((9, 3))
    for room in range(3):
        for first in range(9):
            total, weight = 0.0, 1.0
            for t in range(first, 9):
                total, weight = total + weight * rewards[t, room], weight * 0.97
                if done[t, room] or t == 8:
                    total += weight * following[t, room]  # what the value says of what comes then; 0 after an end
                    break
            expected[first, room] = total - values[first, room]
    ours = advantages(*(torch.from_numpy(part) for part in (rewards, values, following, done)), 0.97, 1.0)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_without_clipping_the_surrogate_is_importance_sampling():
    rng = np.random.default_rng(9)
    logits, actions, played, gain = rng.normal(size=(40, ACTIONS)), rng.integers(0, ACTIONS, 40), rng.normal(-1.4, 0.5, 40), rng.normal(size=40)
    total = 0.0
    for row, action, before, worth in zip(logits.tolist(), actions, played, gain):
        now = row[action] - math.log(sum(map(math.exp, row)))
        total -= math.exp(now - before) * worth
    nothing = torch.zeros(40, dtype=torch.double)
    batch = Batch(nothing, torch.from_numpy(actions), torch.from_numpy(played), nothing, torch.from_numpy(gain), nothing)
    config = PPOConfig(clip=0.0, normalise_advantages=False, entropy_weight=0.0)
    loss, report = ppo_loss(Act(torch.from_numpy(logits), nothing), batch, config)
    assert float(loss) == pytest.approx(total / 40, abs=1e-5)
    clipped, _ = ppo_loss(Act(torch.from_numpy(logits), nothing), batch, PPOConfig(clip=0.2, normalise_advantages=False, entropy_weight=0.0))
    assert abs(float(clipped - loss)) > 0.01, "a batch in which nothing would be clipped compares little"


def published_grpo(log_probs, old, reference, returns, lengths, groups, divide, beta, clip):
    "The formulas of TRL's documentation of GRPOTrainer, token by token, in plain Python. loss_type='bnpo'."
    tries, total, count, start = len(returns) // groups, 0.0, 0, 0
    for i, length in enumerate(lengths):
        group = returns[i // tries * tries : (i // tries + 1) * tries]
        mean = sum(group) / tries
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (tries - 1))
        advantage = (returns[i] - mean) / (deviation + 1e-4) if divide else returns[i] - mean
        for t in range(start, start + length):
            ratio = math.exp(log_probs[t] - old[t])
            gain = min(ratio * advantage, max(min(ratio, 1 + clip), 1 - clip) * advantage)
            apart = reference[t] - log_probs[t]
            total += -(gain - beta * (math.exp(apart) - apart - 1))
            count += 1
        start += length
    return total / count


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_is_what_trl_publishes(divide, beta):
    rng, groups, tries = np.random.default_rng(3), 4, 5
    lengths = rng.integers(1, 9, groups * tries)
    returns = rng.random(groups * tries) * (rng.random(groups * tries) < 0.6)
    returns[:tries] = 0.5  # a silent group
    m = int(lengths.sum())
    logits = torch.from_numpy(rng.normal(size=(m, ACTIONS)))
    actions = torch.from_numpy(rng.integers(0, ACTIONS, m))
    log_probs = logits.log_softmax(-1).gather(-1, actions[:, None])[:, 0]
    old, reference = (log_probs + torch.from_numpy(rng.normal(0, 0.25, m)) for _ in range(2))
    gain = group_advantages(torch.from_numpy(returns).view(groups, tries), divide).flatten()
    which = torch.from_numpy(np.repeat(np.arange(groups * tries), lengths))
    nothing = torch.zeros(m)
    batch = GroupBatch(nothing, actions, old, nothing, gain[which], nothing, reference, torch.zeros(m, dtype=torch.bool))
    loss, report = grpo_loss(Act(logits, nothing), batch, GRPOConfig(divide=divide, reference_weight=beta, entropy_weight=0.0))
    expected = published_grpo(log_probs.tolist(), old.tolist(), reference.tolist(), returns.tolist(), lengths.tolist(), groups, divide, beta, 0.2)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    assert float(report["clip_fraction"]) > 0.1


def test_a_guide_is_weighted_by_what_the_policy_would_have_done():
    "With mu = 1, the gradient of a guide's action that the policy gives 1 % is a hundredth of the naive one."
    logits = torch.tensor([[0.0, math.log(99.0)]], requires_grad=True)  # the guide's action 0 has 1 %
    own = logits.detach().log_softmax(-1)[:, 0]
    gradients = {}
    for guide, played in (("naive", own), ("weighted", torch.zeros(1))):
        nothing = torch.zeros(1)
        batch = GroupBatch(nothing, torch.zeros(1, dtype=torch.long), played, nothing, torch.ones(1), nothing, nothing, torch.ones(1, dtype=torch.bool))
        loss, _ = grpo_loss(Act(logits, nothing), batch, GRPOConfig(guide=guide, entropy_weight=0.0))
        gradients[guide] = float(torch.autograd.grad(loss, logits)[0][0, 0])
    assert gradients["weighted"] == pytest.approx(gradients["naive"] * 0.01, rel=1e-4) and gradients["naive"] < 0


def test_a_cloned_guide_is_copied_and_counts_for_nothing_else():
    "The surrogate over the policy's own actions, plus the cross-entropy of the guide's; its tries make no mean. In plain Python."
    rng = np.random.default_rng(10)
    returns, guided = rng.random((4, 5)), np.zeros((4, 5), bool)
    guided[:3, 0] = True  # one level has no plan
    gain = np.array([[r - sum(x for x, g in zip(row, led) if not g) / sum(not g for g in led) for r in row] for row, led in zip(returns.tolist(), guided)])
    ours = group_advantages(torch.from_numpy(returns), counted=torch.from_numpy(~guided))
    np.testing.assert_allclose(ours.numpy(), gain, atol=1e-5)
    logits, actions = rng.normal(size=(20, ACTIONS)), rng.integers(0, ACTIONS, 20)
    own = copied = 0.0
    old = np.empty(20)
    for i, (row, action, led) in enumerate(zip(logits.tolist(), actions, guided.flatten())):
        now = row[action] - math.log(sum(map(math.exp, row)))
        old[i] = now + rng.normal(0, 0.25)
        ratio, advantage = math.exp(now - old[i]), gain.flatten()[i]
        if led:
            copied -= now
        else:
            own -= min(ratio * advantage, max(min(ratio, 1.2), 0.8) * advantage)
    nothing = torch.zeros(20, dtype=torch.double)
    batch = GroupBatch(nothing, torch.from_numpy(actions), torch.from_numpy(old), nothing, ours.flatten(), nothing, nothing, torch.from_numpy(guided.flatten()))
    loss, _ = grpo_loss(Act(torch.from_numpy(logits), nothing), batch, GRPOConfig(guide="clone", clone_weight=0.3, entropy_weight=0.0))
    assert float(loss) == pytest.approx(own / 17 + 0.3 * copied / 3, abs=1e-5)


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("only_hope", [False, True])
def test_imitation_is_cross_entropy_number_by_number(balance, only_hope):
    rng = np.random.default_rng(11)
    logits, right, often = rng.normal(size=(50, ACTIONS)), rng.integers(0, ACTIONS, 50), np.array([40.0, 5.0, 20.0, 3.0])
    total = weights = 0.0
    for row, action in zip(logits.tolist(), right):
        if only_hope and action == 0:  # staying: there is no plan
            continue
        weight = often.sum() / often[action] if balance else 1.0
        total -= weight * (row[action] - math.log(sum(map(math.exp, row))))
        weights += weight
    ours = imitation_loss(torch.from_numpy(logits), torch.from_numpy(right), torch.from_numpy(often) if balance else None, only_hope)
    assert float(ours) == pytest.approx(total / weights, abs=1e-5)


def test_q_loss_is_huber():
    said, goal = torch.tensor([0.0, 1.0, -3.0]), torch.tensor([0.4, 1.0, 2.0])
    assert float(q_loss(said, goal)) == pytest.approx((0.5 * 0.4**2 + 0.0 + (5.0 - 0.5)) / 3, abs=1e-5)


def test_reinforce_is_the_score_function_of_torch_distributions():
    torch.manual_seed(2)
    logits, actions, worth = torch.randn(50, ACTIONS, requires_grad=True), torch.randint(0, ACTIONS, (50,)), torch.randn(50)
    loss, report = reinforce_loss(logits, actions, worth, entropy_weight=0.02)
    theirs = torch.distributions.Categorical(logits=logits)
    expected = -(theirs.log_prob(actions) * worth).mean() - 0.02 * theirs.entropy().mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], torch.autograd.grad(expected, logits)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("double", [False, True])
def test_q_targets_are_those_of_the_papers_number_by_number(double):
    "Mnih et al. 2015, and van Hasselt et al. 2016, equation 4, in plain Python."
    rng = np.random.default_rng(5)
    rewards, over = rng.random(40), rng.random(40) < 0.2
    online, target = rng.normal(size=(2, 40, ACTIONS))
    expected = []
    for r, end, mine, its in zip(rewards, over, online.tolist(), target.tolist()):
        then = its[max(range(ACTIONS), key=mine.__getitem__)] if double else max(its)
        expected.append(r if end else r + 0.9 * then)
    ours = td_targets(*(torch.from_numpy(part) for part in (rewards, over, online, target)), 0.9, double)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)
    other = td_targets(*(torch.from_numpy(part) for part in (rewards, over, online, target)), 0.9, not double)
    assert np.abs(other.numpy() - ours.numpy()).max() > 0.01, "a batch that cannot tell the two apart compares nothing"


def test_preferences_are_bradley_and_terry():
    rng = np.random.default_rng(6)
    worth, counted, first = rng.normal(size=(30, 2, 7)), rng.random((30, 2, 7)) < 0.8, (rng.random(30) < 0.5).astype(float)
    total = 0.0
    for w, c, f in zip(worth, counted, first):
        a, b = (sum(x for x, here in zip(w[k], c[k]) if here) for k in (0, 1))
        odds = math.exp(a) / (math.exp(a) + math.exp(b))
        total -= math.log(odds if f else 1 - odds)
    ours = preference_loss(torch.from_numpy(worth), torch.from_numpy(counted), torch.from_numpy(first))
    assert float(ours) == pytest.approx(total / 30, abs=1e-5)
