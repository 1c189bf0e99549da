"""The algorithm, buffer, networks and evaluation of iql_finetune.py."""

import copy
import json
import math
import random
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from toy_env import TOY, TOY_GOAL

import iql_finetune as iql

OBS, ACT = 3, 2
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def make_args(**kwargs):
    """As `load_task` leaves them: no domain value is None."""
    domain = {"expectile": 0.7, "beta": 3.0, "dropout": 0.0, "reward_scale": 1.0, "reward_bias": 0.0}
    return iql.Args(**{"hidden": 8, "cuda": False, "normalize_obs": False} | domain | kwargs)


def make_batch(n: int, dtype=torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"obs": (n, OBS), "action": (n, ACT), "next_obs": (n, OBS), "reward": (n,), "return_to_go": (n,)}
    batch = {key: torch.randn(shape, generator=generator, dtype=dtype) for key, shape in shapes.items()}
    batch["action"] = batch["action"].clamp(-1, 1)
    return batch | {"terminated": (torch.arange(n) % 3 == 0).to(dtype)}


@torch.no_grad()
def set_affine(net: torch.nn.Module, slope: float, bias: float) -> None:
    """Make `net` of one hidden unit slope * x[0] + bias, for x[0] >= 0."""
    layers = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)]
    for layer in layers:
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[:, 0] = 1.0
    layers[-1].weight.fill_(slope)
    layers[-1].bias.fill_(bias)


def hand_agent(**kwargs):
    """On one observation x >= 0 and one action: V = 2x + 1, Q = (x, 3x), target Q = (x + 4, 3x), mean 0, std 1."""
    agent = iql.Agent(1, 1, make_args(hidden=1, learning_rate=0.0, gamma=0.9, **kwargs))
    set_affine(agent.value, 2, 1)
    for net, slope, bias in zip(agent.critic.nets, (1, 3), (0, 0), strict=True):
        set_affine(net, slope, bias)
    for net, slope, bias in zip(agent.target_critic.nets, (1, 3), (4, 0), strict=True):
        set_affine(net, slope, bias)
    set_affine(agent.actor.net, 0, 0)
    return agent


def hand_batch():
    """States 1, 2, 4 go to 0, 1, 2 with rewards 1, -1, 5; the last is terminal."""
    columns = {"obs": [[1.0], [2.0], [4.0]], "action": [[0.5], [0.0], [-1.0]], "next_obs": [[0.0], [1.0], [2.0]]}
    columns |= {"reward": [1.0, -1.0, 5.0], "terminated": [0.0, 0.0, 1.0], "return_to_go": [0.0, 0.0, 0.0]}
    return {key: torch.tensor(value) for key, value in columns.items()}


# target Q = min(5, 3), min(6, 6), min(8, 12) = 3, 6, 8; V = 3, 5, 9; advantage = 0, 1, -1.
# V(s') = 1, 3, 5, so that the backups are 1 + 0.9, -1 + 2.7 and 5; the critics say 1, 2, 4 and 3, 6, 12.
HAND_CRITIC = ((1 - 1.9) ** 2 + (2 - 1.7) ** 2 + (4 - 5) ** 2 + (3 - 1.9) ** 2 + (6 - 1.7) ** 2 + (12 - 5) ** 2) / 6
HAND_LOG_PROB = [-0.5 * action**2 - 0.5 * math.log(2 * math.pi) for action in (0.5, 0.0, -1.0)]


def test_losses_by_hand():
    losses = hand_agent(expectile=0.7, beta=2.0).update(hand_batch())
    assert set(losses) == {"value_loss", "critic_loss", "actor_loss"}
    assert not any(loss.requires_grad for loss in losses.values())
    assert float(losses["value_loss"]) == pytest.approx((0.7 * 1**2 + 0.3 * (-1) ** 2) / 3)
    assert float(losses["critic_loss"]) == pytest.approx(HAND_CRITIC)
    weights = 1, math.exp(2), math.exp(-2)
    expected = -sum(w * log_prob for w, log_prob in zip(weights, HAND_LOG_PROB, strict=True)) / 3
    assert float(losses["actor_loss"]) == pytest.approx(expected)


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_expectile_weighs_too_low_values_more(expectile):
    batch = hand_batch()
    above = {key: value[1:2] for key, value in batch.items()}  # advantage 1: V too low
    below = {key: value[2:3] for key, value in batch.items()}  # advantage -1: V too high
    assert float(hand_agent(expectile=expectile).update(above)["value_loss"]) == pytest.approx(expectile)
    assert float(hand_agent(expectile=expectile).update(below)["value_loss"]) == pytest.approx(1 - expectile)


def test_weight_is_capped_at_100():
    row = {key: value[1:2] for key, value in hand_batch().items()}  # advantage 1
    assert float(hand_agent(beta=50.0).update(row)["actor_loss"]) == pytest.approx(-100 * HAND_LOG_PROB[1])
    assert float(hand_agent(beta=4.0).update(row)["actor_loss"]) == pytest.approx(-math.exp(4) * HAND_LOG_PROB[1])


def test_a_terminal_state_is_not_bootstrapped_and_a_cut_one_is():
    row = {key: value[2:] for key, value in hand_batch().items()}
    assert float(hand_agent().update(row)["critic_loss"]) == pytest.approx(((4 - 5) ** 2 + (12 - 5) ** 2) / 2)
    row["terminated"] = torch.zeros(1)
    backup = 5 + 0.9 * 5
    assert float(hand_agent().update(row)["critic_loss"]) == pytest.approx(((4 - backup) ** 2 + (12 - backup) ** 2) / 2)


def test_target_moves_by_exactly_tau_after_the_step():
    agent = iql.Agent(OBS, ACT, make_args(tau=0.25)).double()
    for target in agent.target_critic.parameters():
        target.add_(1.0)
    before = [p.clone() for p in agent.target_critic.parameters()]
    critic_before = [p.detach().clone() for p in agent.critic.parameters()]
    agent.update(make_batch(16, torch.float64))
    assert any(not torch.equal(p, q) for p, q in zip(agent.critic.parameters(), critic_before, strict=True))
    for old, target, new in zip(before, agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * new.detach(), rtol=1e-14, atol=1e-14)
        assert target.grad is None and not target.requires_grad


def reference_losses(agent, batch, args) -> dict[str, torch.Tensor]:
    """IQL written down a second time: three losses with nothing in common but the batch, in words of the paper."""
    obs, action, next_obs = batch["obs"], batch["action"], batch["next_obs"]
    pair = torch.cat([obs, action], dim=1)
    q_target = torch.minimum(*(net(pair)[:, 0] for net in agent.target_critic.nets)).detach()
    v = agent.value(obs)[:, 0]
    u = q_target - v
    expectile = torch.full_like(u, args.expectile)
    value_loss = torch.mean(torch.abs(expectile - (u.detach() < 0).to(u.dtype)) * u**2)

    y = batch["reward"] + args.gamma * (1.0 - batch["terminated"]) * agent.value(next_obs)[:, 0].detach()
    critic_loss = sum(torch.nn.functional.mse_loss(net(pair)[:, 0], y) for net in agent.critic.nets) / 2

    policy = torch.distributions.Normal(torch.tanh(agent.actor.net(obs)), agent.actor.log_std.clamp(-5, 2).exp())
    weight = torch.clamp(torch.exp(args.beta * (q_target - v.detach())), max=100.0)
    actor_loss = -torch.mean(weight * policy.log_prob(action).sum(1))
    return {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}


def parts(agent) -> dict[str, list[torch.nn.Parameter]]:
    nets = {"value_loss": agent.value, "critic_loss": agent.critic, "actor_loss": agent.actor}
    return {name: list(net.parameters()) for name, net in nets.items()}


@pytest.mark.parametrize("expectile, beta", [(0.7, 3.0), (0.9, 10.0)])
def test_losses_gradients_and_steps_equal_an_independent_implementation(expectile, beta):
    args = make_args(expectile=expectile, beta=beta, hidden=32)
    agent = iql.Agent(OBS, ACT, args).double()
    with torch.no_grad():
        agent.actor.log_std.copy_(torch.tensor([-0.5, 0.3]))
        for p in agent.target_critic.parameters():
            p.add_(0.1 * torch.randn_like(p))
    twin = copy.deepcopy(agent)
    optimizers = {name: torch.optim.Adam(params, args.learning_rate) for name, params in parts(twin).items()}
    for step in range(4):
        batch = make_batch(64, torch.float64, seed=step)
        expected = reference_losses(twin, batch, args)
        grads = {name: torch.autograd.grad(expected[name], params) for name, params in parts(twin).items()}
        for name, params in parts(twin).items():
            for p, grad in zip(params, grads[name], strict=True):
                p.grad = grad
            optimizers[name].step()
        with torch.no_grad():
            for target, p in zip(twin.target_critic.parameters(), twin.critic.parameters(), strict=True):
                target.copy_((1 - args.tau) * target + args.tau * p)

        losses = agent.update(batch)
        for name, params in parts(agent).items():
            torch.testing.assert_close(losses[name], expected[name].detach(), rtol=1e-10, atol=1e-12)
            for p, grad in zip(params, grads[name], strict=True):
                torch.testing.assert_close(p.grad, grad, rtol=1e-10, atol=1e-12)
    for p, q in zip(agent.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "change, moved",
    [("beta", {"actor_loss"}), ("expectile", {"value_loss"}), ("reward", {"critic_loss"})],
)
def test_gradients_reach_only_the_right_networks(change, moved):
    agent = iql.Agent(OBS, ACT, make_args())
    twin, batch = copy.deepcopy(agent), make_batch(32)
    agent.update(batch)
    if change == "reward":
        batch = batch | {"reward": batch["reward"] + 1}
    else:
        twin.args = make_args(**{change: 0.95})
    twin.update(batch)
    pairs = {name: zip(parts(agent)[name], parts(twin)[name], strict=True) for name in parts(agent)}
    changed = {name for name, both in pairs.items() if any(not torch.equal(p.grad, q.grad) for p, q in both)}
    assert changed == moved


def test_log_prob_is_that_of_a_normal_with_clipped_std():
    actor = iql.GaussianActor(OBS, ACT, 8, 0.0).double()
    batch = make_batch(10, torch.float64)
    for log_std, clipped in [((0.3, -1.0), (0.3, -1.0)), ((-9.0, 7.0), (-5.0, 2.0))]:
        with torch.no_grad():
            actor.log_std.copy_(torch.tensor(log_std))
        mean = torch.tanh(actor.net(batch["obs"]))
        normal = torch.distributions.Normal(mean, torch.tensor(clipped, dtype=torch.float64).exp())
        expected = normal.log_prob(batch["action"]).sum(-1)
        torch.testing.assert_close(actor.log_prob(batch["obs"], batch["action"]), expected)
        assert actor(batch["obs"])[1].tolist() == pytest.approx(clipped)


def test_critics_are_independent_and_stacked():
    critic = iql.Critic(OBS, ACT, 8, 3)
    batch = make_batch(5)
    q = critic(batch["obs"], batch["action"])
    assert q.shape == (3, 5)
    with torch.no_grad():
        next(critic.nets[1].parameters()).zero_()
    changed = (critic(batch["obs"], batch["action"]) != q).any(1)
    assert changed.tolist() == [False, True, False]


def test_act_is_deterministic_unless_asked_for_noise():
    agent = iql.Agent(OBS, ACT, make_args(dropout=0.5))
    obs, state = np.ones(OBS, np.float32), torch.get_rng_state()
    actions = [agent.act(obs) for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state), "evaluation drew from the training's random numbers"
    assert all(np.array_equal(action, actions[0]) for action in actions)
    mean = torch.tanh(agent.actor.eval().net(torch.from_numpy(obs))).detach().numpy()
    np.testing.assert_allclose(actions[0], mean, rtol=1e-6)
    with torch.no_grad():
        agent.actor.log_std.fill_(math.log(0.1))
    noisy = np.array([agent.act(obs, noise=1.0) for _ in range(2000)])
    np.testing.assert_allclose(noisy.mean(0), mean, atol=0.015)
    np.testing.assert_allclose(noisy.std(0), 0.1, rtol=0.1)
    with torch.no_grad():
        agent.actor.log_std.fill_(2.0)
    wide = np.array([agent.act(obs, noise=1.0) for _ in range(100)])
    assert wide.dtype == np.float32 and wide.min() == -1 and wide.max() == 1


def test_dropout_acts_in_updates():
    agent = iql.Agent(OBS, ACT, make_args(dropout=0.5, learning_rate=0.0, hidden=64))
    batch = make_batch(32)
    losses = [float(agent.update(batch)["actor_loss"]) for _ in range(2)]
    agent.act(np.ones(OBS, np.float32))
    losses += [float(agent.update(batch)["actor_loss"]) for _ in range(2)]
    assert len(set(losses)) == 4, "the same dropout mask, or none"


# ---- replay buffer ----


def make_buffer(n: int, capacity: int):
    """Dataset rows with rewards 0 .. n - 1."""
    data = {key: np.zeros((n, dim), np.float32) for key, dim in (("obs", OBS), ("action", ACT), ("next_obs", OBS))}
    data |= {key: np.zeros(n, np.float32) for key in ("terminated", "truncated", "return_to_go")}
    return iql.ReplayBuffer(data | {"reward": np.arange(n, dtype=np.float32)}, capacity, torch.device("cpu"))


def add(buffer, reward: float, terminated: bool = False) -> None:
    buffer.add(np.full(OBS, reward), np.full(ACT, reward), np.full(OBS, reward + 1), reward, terminated)


def contents(buffer) -> list[float]:
    return sorted(set(buffer.sample(5_000)["reward"].tolist()))


def test_buffer_returns_the_rows_it_was_given():
    buffer = make_buffer(1, 10)
    add(buffer, 7.0, terminated=True)
    batch = buffer.sample(50)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "obs": (50, OBS), "action": (50, ACT), "next_obs": (50, OBS), "reward": (50,), "terminated": (50,),
        "return_to_go": (50,),
    }  # fmt: skip
    online = batch["reward"] == 7
    assert 5 < online.sum() < 45
    assert (batch["obs"][online] == 7).all() and (batch["action"][online] == 7).all()
    assert (batch["next_obs"][online] == 8).all() and (batch["terminated"][online] == 1).all()
    assert (batch["obs"][~online] == 0).all() and (batch["terminated"][~online] == 0).all()
    assert buffer.sample(1)["reward"].shape == (1,)


def test_ring_keeps_the_latest_and_never_the_datasets_place():
    buffer = make_buffer(4, 3)
    assert contents(buffer) == [0, 1, 2, 3], "rows that were never filled must not be drawn"
    for i, online in enumerate([[100], [100, 101], [100, 101, 102], [101, 102, 103], [102, 103, 104]]):
        add(buffer, 100.0 + i)
        assert contents(buffer) == [0, 1, 2, 3, *online]


def test_online_share_is_exact_and_uniform():
    buffer = make_buffer(20, 50)
    for i in range(5):
        add(buffer, 100.0 + i)
    for n, share, expected in [(10, 0.3, 3), (256, 0.5, 128), (10, 0.0, 0), (10, 1.0, 10)]:
        assert [int((buffer.sample(n, share)["reward"] >= 100).sum()) for _ in range(20)] == [expected] * 20
    reward = torch.cat([buffer.sample(1000, 0.5)["reward"] for _ in range(20)])
    for i in range(5):
        assert abs(int((reward == 100 + i).sum()) - 2000) < 5 * math.sqrt(2000)
    for i in range(20):
        assert abs(int((reward == i).sum()) - 500) < 5 * math.sqrt(500)


def test_pooled_sampling_is_uniform_over_dataset_and_online():
    buffer = make_buffer(30, 100)
    for i in range(10):
        add(buffer, 100.0 + i)
    count = torch.bincount(buffer.sample(40_000)["reward"].long(), minlength=110)
    drawn = torch.cat([count[:30], count[100:]])
    assert drawn.sum() == 40_000
    assert (drawn - 1000).abs().max() < 5 * math.sqrt(1000)


def test_buffer_state_goes_through_a_file(tmp_path):
    buffer, other = make_buffer(4, 3), make_buffer(4, 3)
    for i in range(5):
        add(buffer, 100.0 + i)
    iql.save_file(tmp_path / "buffer.pt", buffer.state_dict())
    other.load_state_dict(iql.load_file(tmp_path / "buffer.pt"))
    for reward in (200.0, 201.0):
        add(buffer, reward)
        add(other, reward)
        torch.manual_seed(0)
        ours = buffer.sample(500)
        torch.manual_seed(0)
        theirs = other.sample(500)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# ---- evaluation ----


def toy_task(spec=TOY, domain="locomotion", dim=2):
    mean, std = np.zeros(dim), np.ones(dim)
    return iql.Task("toy", spec, domain, -10.0, 10.0, 20.0, 1.0, 0.0, mean, std, {}, 1)


def test_evaluation_is_seeded_and_touches_no_random_generator():
    task, args = toy_task(), make_args(eval_episodes=3)
    agent = iql.Agent(2, 2, args)
    env = task.make_env()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    first = iql.evaluate(agent.act, env, task, args)
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert iql.evaluate(agent.act, env, task, args) == first
    assert iql.evaluate(agent.act, env, task, make_args(eval_episodes=3, seed=2)) != first
    assert first["normalized_score"] == pytest.approx(100 * (first["return"] + 10) / 20)


def test_evaluation_counts_whole_episodes_and_their_steps():
    class Counting(gym.Env):
        """Episode k lasts k + 1 steps, reward 1 each; every second one ends by its time limit."""

        episode = -1

        def reset(self, *, seed=None, options=None):
            self.episode, self.t = self.episode + 1, 0
            return np.zeros(2, np.float32), {}

        def step(self, action):
            self.t += 1
            over = self.t == self.episode + 1
            return np.zeros(2, np.float32), 1.0, over and self.episode % 2 == 0, over and self.episode % 2 == 1, {}

    steps = []
    scores = iql.evaluate(lambda obs, t: steps.append(t), Counting(), toy_task(), make_args(eval_episodes=3))
    assert scores["return"] == 2.0 and steps == [0, 0, 1, 0, 1, 2]


def test_score_of_goal_tasks_is_the_share_of_successful_episodes():
    task, args = toy_task(TOY_GOAL, "antmaze", 3), make_args(eval_episodes=4)
    task.ref_min, task.ref_max = 0.0, 1.0
    env, forward = task.make_env(), np.ones(1, np.float32)
    onto_goal = iql.evaluate(lambda obs, t: forward * (t < 2), env, task, args)
    assert onto_goal == {"return": 1.0, "normalized_score": 100.0}, "staying on the goal counts once"
    assert iql.evaluate(lambda obs, t: forward, env, task, args)["return"] == 1.0, "passing the goal counts"
    assert iql.evaluate(lambda obs, t: -forward, env, task, args)["return"] == 0.0
    episodes = iter(range(4))

    def every_second(obs, t):
        every_second.forth = next(episodes) % 2 if t == 0 else every_second.forth
        return forward * every_second.forth

    assert iql.evaluate(every_second, env, task, args)["normalized_score"] == 50.0


def test_how_often_is_evaluated_does_not_change_training(toy_args):
    a, b = toy_args | {"eval_every": 20, "exp_name": "a"}, toy_args | {"eval_every": 40, "exp_name": "b"}
    for args in (a, b):
        iql.train(iql.Args(**args | {"eval_episodes": 1 if args is a else 2}))
    assert_same_weights(*(Path(args["run_dir"], f"o2o_toy_medium-v0__{args['exp_name']}__1") for args in (a, b)))


def weights(folder: Path) -> dict:
    state = torch.load(folder / "online.pt", weights_only=True)["agent"]
    return {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}


def assert_same_weights(a: Path, b: Path) -> None:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and len(a) > 10
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_same_seed_same_numbers(toy_args):
    folders, summaries = [], []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        summaries.append(iql.train(iql.Args(**toy_args | {"exp_name": name, "seed": seed})))
        folders.append(Path(toy_args["run_dir"], f"o2o_toy_medium-v0__{name}__{seed}"))
    assert_same_weights(folders[0], folders[1])
    a, b, c = ([summary[key] for key in ("offline_score", "final_score", "lowest_score")] for summary in summaries)
    assert a == b != c
    assert any(not torch.equal(weights(folders[0])[key], value) for key, value in weights(folders[2]).items())


@pytest.mark.parametrize("online_share", [None, 0.5])
def test_toy_run_improves(toy_args, online_share):
    """Score 0 is the random policy's return, 100 that of going straight to the goal; the data are at 71."""
    longer = {"offline_steps": 400, "online_steps": 400, "eval_every": 100, "eval_episodes": 5, "hidden": 32}
    share = {} if online_share is None else {"online_share": online_share}
    summary = iql.train(iql.Args(**toy_args | longer | share | {"learning_rate": 3e-3}))
    assert summary["offline_score"] > 75
    assert summary["final_score"] > 75


def test_learning_starts_from_less_than_it_ends_with(toy_args):
    task, args = iql.load_task(iql.Args(**toy_args)), make_args(eval_episodes=5, hidden=16)
    assert iql.evaluate(iql.Agent(2, 2, args).act, task.make_env(), task, args)["normalized_score"] < 50


def test_compiled_losses_train_the_same(toy_args, monkeypatch):
    """Captured by the compiler without a break; its code generation is left out, which takes half a minute."""
    compile_, captured = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda fn: captured.append(fn) or compile_(fn, backend="eager", fullgraph=True)
    )
    short = toy_args | {"offline_steps": 20, "online_steps": 20}
    iql.train(iql.Args(**short | {"exp_name": "compiled", "compile": True}))
    iql.train(iql.Args(**short | {"exp_name": "eager"}))
    assert len(captured) == 1
    a, b = (weights(Path(toy_args["run_dir"], f"o2o_toy_medium-v0__{name}__1")) for name in ("compiled", "eager"))
    for key in b:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


# ---- degradation ----


def test_degradation_by_hand():
    steps, scores = [0, 10, 20, 30, 40], [50.0, 30.0, 40.0, 70.0, 60.0]
    assert iql.degradation(50.0, steps, scores) == {
        "offline_score": 50.0,
        "final_score": 60.0,
        "lowest_score": 30.0,
        "drop": 20.0,
        "degradation_area": pytest.approx((20 + 10) / 5),
        "regret": pytest.approx(0.5),
        "steps_to_gain": None,
    }


def test_degradation_of_a_run_that_only_gains():
    found = iql.degradation(20.0, [0, 10, 20, 30, 40, 50], [20.0, 31.0, 30.0, 35.0, 140.0, 190.0])
    assert found["drop"] == 0 and found["degradation_area"] == 0 and found["lowest_score"] == 20
    assert found["steps_to_gain"] == 30, "30 is not above 20 + 10: the three that count begin at step 30"
    assert found["regret"] == pytest.approx(1 - 446 / 600)
    for steps, scores in (([0, 10, 20, 30], [20.0, 40.0, 40.0, 25.0]), ([0, 10, 20], [20.0, 40.0, 40.0])):
        assert iql.degradation(20.0, steps, scores)["steps_to_gain"] is None, "two in a row are too few"
    assert iql.degradation(150.0, [0, 10], [150.0, 120.0])["regret"] == 0
    assert iql.degradation(-30.0, [0, 10], [-30.0, -40.0])["regret"] == 1
    assert json.dumps(found)


# ---- CUDA graphs ----


def test_a_graph_of_its_own_for_each_noise(monkeypatch):
    """What stands for a graph here runs on the CPU as it is."""
    made = []
    monkeypatch.setattr(iql, "CudaGraph", lambda fn: made.append(fn) or fn)
    agent, twin = iql.Agent(OBS, ACT, make_args(cuda_graph=True)), iql.Agent(OBS, ACT, make_args())
    twin.load_state_dict(agent.state_dict())
    for obs in np.random.default_rng(0).normal(size=(3, OBS)).astype(np.float32):
        for noise in (0.0, 1.0):
            torch.manual_seed(0)
            action = agent.act(obs, noise=noise)
            torch.manual_seed(0)
            np.testing.assert_array_equal(action, twin.act(obs, noise=noise))
    assert len(made) == 2 and set(agent.graphs) == {0.0, 1.0} and not twin.graphs


@needs_cuda
def test_a_captured_action_is_the_action():
    args = make_args(cuda=True, cuda_graph=True)
    with torch.device("cuda"):
        agent, twin = iql.Agent(OBS, ACT, args), iql.Agent(OBS, ACT, make_args(cuda=True))
    twin.load_state_dict(agent.state_dict())
    for obs in np.random.default_rng(0).normal(size=(8, OBS)).astype(np.float32):
        np.testing.assert_allclose(agent.act(obs), twin.act(obs), atol=1e-6)
        draws = {tuple(agent.act(obs, noise=1.0)) for _ in range(8)}
        assert len(draws) > 2, "fresh noise in every replay; two of them may be clipped to the same action"


@needs_cuda
def test_a_graph_reads_what_it_is_called_with():
    graph = iql.CudaGraph(lambda x, y: 2 * x + y)
    for i in range(8):
        x, y = torch.tensor([float(i), 1.0]), torch.tensor([0.5, -float(i)])
        torch.testing.assert_close(graph(x, y).cpu(), 2 * x + y)


@needs_cuda
def test_graph_equals_eager():
    args = make_args(hidden=32, cuda=True)
    with torch.device("cuda"):
        agent = iql.Agent(OBS, ACT, args)
    twin = iql.Agent(OBS, ACT, args).cuda()
    twin.load_state_dict(agent.state_dict())
    batch = {key: value.cuda() for key, value in make_batch(64).items()}
    graph = iql.CudaGraph(lambda: agent.update(batch))
    for _ in range(8):
        losses = {name: loss.clone() for name, loss in graph().items()}
        expected = twin.update(batch)
        for name in losses:
            torch.testing.assert_close(losses[name], expected[name], rtol=1e-4, atol=1e-5)
    for p, q in zip(agent.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@needs_cuda
def test_one_replay_is_k_updates_on_fresh_batches():
    args = make_args(hidden=16, cuda=True, batch_size=8)
    with torch.device("cuda"):
        agent = iql.Agent(OBS, ACT, args)
    buffer = make_buffer(50, 10)
    for name in ("rows", "n_online"):
        setattr(buffer, name, getattr(buffer, name).cuda())
    graph = iql.CudaGraph(lambda: iql.run_updates(agent, buffer, 5))
    losses = []
    for calls in range(1, 8):
        losses.append(float(graph()["critic_loss"]))
        steps = {float(state["step"]) for state in agent.optimizer.state.values()}
        assert steps == {5.0 * calls}
    assert len(set(losses)) == 7, "the same batch in every replay"
