"""The algorithm of cal_ql.py and what its online episodes leave in the buffer."""

import copy
import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_data import goal_dataset
from torch.distributions import Normal

import cal_ql

OBS, ACT = 3, 2


def make_args(**kwargs):
    """As `load_task` leaves them: no domain value is None."""
    args = cal_ql.Args(**{"cuda": False, "hidden": 7, "n_actions": 3} | kwargs)
    for name, value in (args.domain_values["any"] | args.domain_values["locomotion"]).items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    return args


def update(agent, batch, noise):
    """One with this noise."""
    agent.draw_noise = lambda like: noise
    return agent.update(batch)


def make_agent(obs_dim=OBS, action_dim=ACT, seed=0, **kwargs):
    """In float64, with weights so large that all its terms matter, and a target network of its own."""
    torch.manual_seed(seed)
    agent = cal_ql.Agent(obs_dim, action_dim, make_args(**kwargs)).double()
    with torch.no_grad():
        for p in agent.parameters():
            p.normal_(0, 0.5)
    return agent


def make_batch(n: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"obs": (n, OBS), "action": (n, ACT), "next_obs": (n, OBS), "reward": (n,), "return_to_go": (n,)}
    batch = {key: torch.randn(shape, generator=generator, dtype=torch.float64) for key, shape in shapes.items()}
    batch["action"] = batch["action"].clamp(-1, 1)
    return batch | {"terminated": (torch.arange(n) % 3 == 0).double()}


# ---- the papers written down a second time: one action of one state after the other, nothing shared ----


def q_value(critic, index, s, a):
    x = torch.cat([s, a])
    for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
        x = (torch.relu(x) if i else x) @ weight[index] + bias[index, 0]
    return x[0]


def policy_sample(actor, s, noise):
    layers = [layer for layer in actor.net if isinstance(layer, torch.nn.Linear)]
    for i, layer in enumerate(layers):
        s = layer.weight @ (torch.relu(s) if i else s) + layer.bias
    mean, raw_log_std = s[: len(s) // 2], s[len(s) // 2 :]
    std = torch.clamp(actor.log_std_scale * raw_log_std + actor.log_std_shift, -20, 2).exp()
    u = mean + std * noise
    log_cosh = torch.logaddexp(u, -u) - math.log(2)  # 1 - tanh(u)^2 = 1 / cosh(u)^2
    return torch.tanh(u), (Normal(mean, std).log_prob(u) + 2 * log_cosh).sum()


def reference(agent, batch, noise, args):
    """The losses by name, the gap of each critic, and how often the return-to-go was above a policy action's value."""
    n, weight, alpha = len(batch["obs"]), args.conservative_weight, agent.log_alpha.exp().item()
    of_gap = range(0, n, args.gap_every)
    critic_losses, gaps, actor_loss, alpha_loss, bounded = [0.0, 0.0], [0.0, 0.0], 0.0, 0.0, 0
    alpha_prime = min(agent.log_alpha_prime.exp().item(), 1e6)
    for i in range(n):
        s, next_s = batch["obs"][i], batch["next_obs"][i]
        with torch.no_grad():
            candidates = []
            for z in noise["backup"][i]:
                a = policy_sample(agent.actor, next_s, z)[0]
                candidates.append(min(q_value(agent.target_critic, c, next_s, a) for c in (0, 1)))
            y = batch["reward"][i] + (0 if batch["terminated"][i] else args.gamma * max(candidates))
            sampled = [(a, -ACT * math.log(2), False) for a in noise["random"][i]]
            sampled += [(*policy_sample(agent.actor, s, z), True) for z in noise["policy"][i]]
            sampled += [(*policy_sample(agent.actor, next_s, z), True) for z in noise["next_policy"][i]]
        for c in (0, 1):
            q_data, terms = q_value(agent.critic, c, s, batch["action"][i]), []
            for a, log_density, of_policy in sampled:
                q = q_value(agent.critic, c, s, a)
                if of_policy and args.calibrate and q < batch["return_to_go"][i]:
                    q, bounded = batch["return_to_go"][i], bounded + (i in of_gap)
                terms.append(q - log_density if args.importance_sampling else q)
            terms += [] if args.importance_sampling else [q_data]
            gap = torch.log(sum(term.exp() for term in terms)) - q_data
            gap = gap if gap > args.gap_min else torch.tensor(args.gap_min, dtype=torch.float64)
            gaps[c] = gaps[c] + gap / len(of_gap) * (i in of_gap)
            critic_losses[c] = critic_losses[c] + (q_data - y) ** 2 / n
        a, log_prob = policy_sample(agent.actor, s, noise["actor"][i, 0])
        values = [q_value(agent.critic, c, s, a) for c in (0, 1)]
        actor_loss = actor_loss + (alpha * log_prob - min(values)) / n
        alpha_loss = alpha_loss - agent.log_alpha * (log_prob.item() - ACT) / n
    alpha_prime_loss = torch.zeros((), dtype=torch.float64)
    for c in (0, 1):
        if args.lagrange:
            critic_losses[c] = critic_losses[c] + alpha_prime * weight * (gaps[c] - args.target_gap)
            excess = weight * (gaps[c].item() - args.target_gap)
            alpha_prime_loss = alpha_prime_loss - torch.exp(agent.log_alpha_prime) * excess / 2
        else:
            critic_losses[c] = critic_losses[c] + weight * gaps[c]
    losses = {"critic_loss": sum(critic_losses), "actor_loss": actor_loss, "alpha_loss": alpha_loss}
    return losses | {"alpha_prime_loss": alpha_prime_loss}, gaps, bounded


def networks(agent) -> dict[str, list]:
    """Parameters that each loss trains, and it alone."""
    owners = {"critic_loss": agent.critic.parameters(), "actor_loss": agent.actor.parameters()}
    owners |= {"alpha_loss": [agent.log_alpha], "alpha_prime_loss": [agent.log_alpha_prime]}
    return {name: list(parameters) for name, parameters in owners.items()}


SWITCHES = ("lagrange", "calibrate", "max_target_backup", "importance_sampling")
ALL_SWITCHES = [dict(zip(SWITCHES, values, strict=True)) for values in itertools.product((False, True), repeat=4)]


@pytest.mark.parametrize("clipped, every", [(False, 1), (True, 1), (False, 2)])
@pytest.mark.parametrize("switches", ALL_SWITCHES, ids=lambda s: "+".join(k for k in s if s[k]) or "plain")
def test_losses_and_gradients_are_those_of_an_independent_implementation(switches, clipped, every):
    more = {"gap_min": 3.0 if clipped else -math.inf, "gap_every": every}
    agent, sampled = make_agent(critic_layers=3, target_gap=1.0, **more, **switches), 48 // every
    batch = make_batch(4)
    with torch.no_grad():  # between the critics, so that it is above some values and below others
        batch["return_to_go"] = agent.critic(batch["obs"], batch["action"].unsqueeze(1)).mean((0, 2))
    noise, before = agent.draw_noise(batch["obs"]), copy.deepcopy(agent)
    expected, gaps, bounded = reference(before, batch, noise, agent.args)
    losses = update(agent, batch, noise)

    assert 0 < bounded < sampled if switches["calibrate"] else bounded == 0
    with torch.no_grad():
        _, log_prob = cal_ql.squash(*before.actor(batch["obs"]), noise["actor"])
        data_q = before.critic(batch["obs"], batch["action"].unsqueeze(1)).mean()
    seen = {"cql_gap_0": gaps[0], "cql_gap_1": gaps[1], "alpha": before.log_alpha.exp(), "entropy": -log_prob.mean()}
    seen |= {"alpha_prime": before.log_alpha_prime.exp(), "data_q": data_q}
    if switches["calibrate"]:
        seen["bound_rate"] = torch.tensor(bounded / sampled, dtype=torch.double)
    assert set(losses) == {*expected, *seen, "bound_rate"}
    for name, value in (expected | seen).items():
        assert losses[name].shape == () and not losses[name].requires_grad
        torch.testing.assert_close(losses[name], value.detach(), rtol=1e-10, atol=1e-12)
    trained, names = networks(agent), dict(zip(agent.parameters(), dict(agent.named_parameters()), strict=True))
    for name, parameters in networks(before).items():
        if name == "alpha_prime_loss" and not switches["lagrange"]:
            assert agent.log_alpha_prime.grad is None
            continue
        gradients = torch.autograd.grad(expected[name], parameters)
        for parameter, gradient in zip(trained[name], gradients, strict=True):
            message = f"{name}: {names[parameter]}"
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-11, msg=message)


def test_clipping_a_gap_clips_some_states_only():
    batch, free = make_batch(8), make_agent()
    noise = free.draw_noise(batch["obs"])
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(8)]
    gaps = [float(free.loss(single[i], {k: z[i : i + 1] for k, z in noise.items()})["cql_gap_0"]) for i in range(8)]
    middle = sum(sorted(gaps)[3:5]) / 2
    expected = sum(max(gap, middle) for gap in gaps) / 8
    assert float(make_agent(gap_min=middle).loss(batch, noise)["cql_gap_0"]) == pytest.approx(expected, rel=1e-12)


# ---- by hand ----
# One observation s, one action a, Q = (2s + 4a, s - a), a target network equal to it, policy tanh(Normal(0, 1)); one
# sampled action of each kind. Noise log 2 makes the action 0.6, since tanh(log 2) = (4 - 1) / (4 + 1), and noise -log 2
# makes -0.6, both of log-density -log(2 pi) / 2 - log(2)^2 / 2 - log(1 - 0.36); noise 0 makes 0, -log(2 pi) / 2.
LOG_PROB, LOG_PROB_0 = -0.7128779375, -0.9189385332
HAND = {  # row 1: s = 1, the data's a = 0.5, goes on; row 2: s = 0, a = -0.5, ends
    "obs": [[1.0], [0.0]], "action": [[0.5], [-0.5]], "next_obs": [[2.0], [2.0]],
    "reward": [1.0, -1.0], "terminated": [0.0, 1.0], "return_to_go": [1.0, -3.0],
}  # fmt: skip
LOG_2 = math.log(2)
HAND_NOISE = {  # actions: random -0.5, 1; policy 0.6, 0; next_policy -0.6, 0; backup 0.6, 0; actor -0.6, 0
    "random": [-0.5, 1.0], "policy": [LOG_2, 0.0], "next_policy": [-LOG_2, 0.0], "backup": [LOG_2, 0.0],
    "actor": [-LOG_2, 0.0],
}  # fmt: skip
# Q of critic 1 for (data, random, pi(s), pi(s')): row 1: 4, 0, 4.4, -0.4; row 2: -2, 4, 0, 0.
# Q of critic 2:                                   row 1: 0.5, 1.5, 0.4, 1.6; row 2: 0.5, -1, 0, 0.
# Return-to-go 1 raises -0.4 to 1 and 0.4 to 1 in row 1; -3 raises nothing. The random action's log-density is -log 2.
# Gap = log(2 e^random + (e^pi(s) + e^pi(s')) / density) - data; plain: log(e^data + e^random + ...) - data.
GAPS = {  # (calibrate, importance_sampling): critic 1 in rows 1 and 2, critic 2 in rows 1 and 2
    (False, True): ((1.1329425108, 6.7380349769), (2.5960273620, 1.2490286109)),
    (True, True): ((1.1572878011, 6.7380349769), (2.7032233424, 1.2490286109)),
    (False, False): ((0.9252178370, 6.0383646064), (2.0317319852, 0.8904359509)),
    (True, False): ((0.9399789006, 6.0383646064), (2.1247935549, 0.8904359509)),
}
# Backups: row 1: 1 + 0.9 min(2*2 + 4*0.6, 2 - 0.6) = 1 + 0.9 * 1.4 = 2.26; row 2: -1.
BELLMAN = ((4 - 2.26) ** 2 + (-2 + 1) ** 2) / 2, ((0.5 - 2.26) ** 2 + (0.5 + 1) ** 2) / 2


def hand_agent(**kwargs):
    agent = cal_ql.Agent(1, 1, make_args(hidden=2, n_actions=1, critic_layers=1, gamma=0.9, **kwargs)).double()
    with torch.no_grad():
        for p in agent.actor.parameters():
            p.zero_()
        for critic in (agent.critic, agent.target_critic):  # relu(x) - relu(-x) = x, for x = 2s + 4a and s - a
            first = [[[2, -2], [4, -4]], [[1, -1], [-1, 1]]]
            critic.weights[0].copy_(torch.tensor(first))
            critic.weights[1].copy_(torch.tensor([[[1], [-1]]] * 2))
        agent.log_alpha.fill_(0.5)
    return agent


def hand_batch(rows=slice(None)):
    batch = {key: torch.tensor(value, dtype=torch.float64)[rows] for key, value in HAND.items()}
    return batch, {key: torch.tensor(z, dtype=torch.float64).view(2, 1, 1)[rows] for key, z in HAND_NOISE.items()}


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("importance_sampling", [False, True])
@pytest.mark.parametrize("row", [0, 1])
def test_gaps_by_hand(calibrate, importance_sampling, row):
    agent = hand_agent(calibrate=calibrate, importance_sampling=importance_sampling)
    losses = update(agent, *hand_batch(slice(row, row + 1)))
    expected = [gaps[row] for gaps in GAPS[calibrate, importance_sampling]]
    assert [float(losses["cql_gap_0"]), float(losses["cql_gap_1"])] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("lagrange", [False, True])
def test_losses_by_hand(lagrange):
    agent = hand_agent(lagrange=lagrange, conservative_weight=5.0, target_gap=0.8)
    losses = {name: float(value) for name, value in update(agent, *hand_batch()).items()}
    gaps = [sum(gaps) / 2 for gaps in GAPS[True, True]]
    assert [losses["cql_gap_0"], losses["cql_gap_1"]] == pytest.approx(gaps, rel=1e-9)
    penalty = sum(math.e * 5 * (gap - 0.8) if lagrange else 5 * gap for gap in gaps)  # log alpha' starts at 1
    assert losses["critic_loss"] == pytest.approx(sum(BELLMAN) + penalty, rel=1e-9)
    assert losses["alpha_prime_loss"] == pytest.approx(-penalty / 2 if lagrange else 0.0, rel=1e-9)
    # Row 1 acts -0.6: Q = (-0.4, 1.6); row 2 acts 0: Q = (0, 0). Temperature e^0.5, entropy target -1.
    log_prob, q = (LOG_PROB + LOG_PROB_0) / 2, -0.4 / 2
    assert losses["actor_loss"] == pytest.approx(math.exp(0.5) * log_prob - q, rel=1e-9)
    assert losses["alpha_loss"] == pytest.approx(-0.5 * (log_prob - 1), rel=1e-9)


def test_max_target_backup_picks_the_action_of_the_highest_smaller_value():
    batch, noise = hand_batch(slice(0, 1))
    agent = hand_agent(conservative_weight=0.0, max_target_backup=True)
    noise["backup"] = torch.tensor([-LOG_2, 0.0, LOG_2], dtype=torch.float64).view(1, 3, 1)
    # At s' = 2: Q of -0.6, 0, 0.6 is (1.6, 2.6), (4, 2), (6.4, 1.4): the smaller are 1.6, 2, 1.4. Best: 2.
    backup = 1 + 0.9 * 2
    expected = (4 - backup) ** 2 + (0.5 - backup) ** 2
    assert float(agent.loss(batch, noise)["critic_loss"]) == pytest.approx(expected, rel=1e-12)


# ---- one update ----


def test_target_moves_by_exactly_tau_after_the_step():
    agent = make_agent(tau=0.25)
    before = [p.clone() for p in agent.target_critic.parameters()]
    critic_before = [p.detach().clone() for p in agent.critic.parameters()]
    agent.update(make_batch(16))
    assert all(not torch.equal(p, q) for p, q in zip(agent.critic.parameters(), critic_before, strict=True))
    for old, target, new in zip(before, agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
        torch.testing.assert_close(target, 0.75 * old + 0.25 * new.detach(), rtol=1e-14, atol=1e-14)
        assert target.grad is None and not target.requires_grad


def test_each_loss_reaches_its_own_network_only():
    agent = make_agent(lagrange=True, calibrate=True)
    losses = agent.loss(make_batch(16), agent.draw_noise(torch.zeros(16, OBS).double()))
    trained = networks(agent)
    assert sum(map(len, trained.values())) == sum(p.requires_grad for p in agent.parameters())
    for name in trained:
        for other, parameters in trained.items():
            gradients = torch.autograd.grad(losses[name], parameters, retain_graph=True, allow_unused=True)
            reached = [gradient is not None and bool(gradient.any()) for gradient in gradients]
            assert all(reached) if name == other else not any(reached), (name, other)


def test_actor_and_critics_have_their_learning_rates():
    agent = make_agent(lagrange=True, actor_learning_rate=1e-3, critic_learning_rate=1e-2)
    before = copy.deepcopy(agent)
    agent.update(make_batch(16))
    for name, rate in {"actor": 1e-3, "critic": 1e-2, "log_alpha": 1e-3, "log_alpha_prime": 1e-2}.items():
        new, old = getattr(agent, name), getattr(before, name)
        pairs = (
            zip(new.parameters(), old.parameters(), strict=True) if isinstance(new, torch.nn.Module) else [(new, old)]
        )
        step = max(float((p - q).detach().abs().max()) for p, q in pairs)
        assert step == pytest.approx(rate, rel=1e-3), name  # Adam's first step is its learning rate


@pytest.mark.parametrize(("target_gap", "rises"), [(0.0, True), (100.0, False)])
def test_multiplier_rises_while_the_gap_is_above_its_target(target_gap, rises):
    agent = hand_agent(lagrange=True, target_gap=target_gap)
    before = float(agent.log_alpha_prime)
    update(agent, *hand_batch())
    assert (float(agent.log_alpha_prime) > before) == rises


@pytest.mark.parametrize(("log_std", "rises"), [(-3.0, True), (0.0, False)])
def test_temperature_rises_while_the_entropy_is_below_its_target(log_std, rises):
    agent = hand_agent()
    with torch.no_grad():
        agent.actor.log_std_shift.fill_(log_std)
    before = float(agent.log_alpha)
    update(agent, *hand_batch())
    assert (float(agent.log_alpha) > before) == rises


def test_conservatism_lowers_sampled_actions_and_calibration_limits_it():
    """While the data's value is held at 1 by its backup, that of the policy's actions is pushed further and further
    below it; with return-to-go 1 it is no longer pushed from there."""
    values = {}
    for calibrate in (False, True):
        agent = make_agent(calibrate=calibrate, critic_learning_rate=1e-2, actor_learning_rate=0.0, hidden=16)
        batch = make_batch(32) | {"reward": torch.ones(32).double(), "terminated": torch.ones(32).double()}
        batch["return_to_go"] = batch["reward"]
        for _ in range(150):
            agent.update(batch)
        with torch.no_grad():
            noise = agent.draw_noise(batch["obs"])["policy"]
            action, _ = cal_ql.squash(*agent.actor(batch["obs"]), noise)
            values[calibrate] = float(agent.critic(batch["obs"], action).mean())
    assert values[False] < values[True] - 1


def test_critic_in_blocks_with_a_shared_first_layer_is_the_plain_network():
    torch.manual_seed(0)
    critic = cal_ql.StackedCritic(OBS, ACT, 8, 3).double()
    obs, action = torch.randn(150, OBS).double(), torch.randn(150, 11, ACT).double().requires_grad_()
    values = critic(obs, action)
    x = torch.cat([obs.unsqueeze(1).expand(150, 11, OBS), action], -1)
    plain = []
    for c in (0, 1):
        y = x
        for i, (weight, bias) in enumerate(zip(critic.weights, critic.biases, strict=True)):
            y = (y.relu() if i else y) @ weight[c] + bias[c, 0]
        plain.append(y.squeeze(-1))
    torch.testing.assert_close(values, torch.stack(plain), rtol=1e-10, atol=1e-12)
    parameters, weights = [*critic.parameters(), action], torch.randn(2, 150, 11).double()
    for a, b in zip(
        torch.autograd.grad((values * weights).sum(), parameters),
        torch.autograd.grad((torch.stack(plain) * weights).sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    frozen = torch.autograd.grad(critic(obs, action, frozen=True).sum(), parameters, allow_unused=True)
    assert [gradient is not None for gradient in frozen] == [False] * (len(parameters) - 1) + [True]


def test_compiled_losses_are_the_same_and_leave_the_critics_as_they_are():
    agent, batch, graphs = make_agent(), make_batch(6), []
    noise = agent.draw_noise(batch["obs"])
    compiled = torch.compile(agent.loss, backend=lambda graph, _: graphs.append(graph) or graph)
    torch.testing.assert_close(compiled(batch, noise), agent.loss(batch, noise))
    called = {node.target for graph in graphs for node in graph.graph.nodes}
    assert torch.tanh in called and torch.baddbmm not in called


def test_initial_networks_are_orthogonal_with_small_outputs():
    agent = cal_ql.Agent(OBS, ACT, make_args(hidden=8, critic_layers=2))
    for weight in (agent.critic.weights[1][0], agent.critic.weights[1][1], agent.actor.net[2].weight.T):
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(8), rtol=0, atol=1e-5)
    assert not torch.equal(agent.critic.weights[0][0], agent.critic.weights[0][1])
    assert agent.critic.weights[-1].abs().max() <= 0.01 and agent.actor.net[-1].weight.abs().max() <= 0.01
    assert all(torch.equal(p, q) for p, q in zip(agent.sources, agent.targets, strict=True))


@pytest.mark.parametrize("max_target_backup", [False, True])
def test_noise_has_the_documented_shapes_and_ranges(max_target_backup):
    agent = make_agent(max_target_backup=max_target_backup)
    noise = agent.draw_noise(torch.zeros(500, OBS).double())
    shapes = {"random": 3, "policy": 3, "next_policy": 3, "backup": 3 if max_target_backup else 1, "actor": 1}
    assert {key: tuple(z.shape) for key, z in noise.items()} == {key: (500, k, ACT) for key, k in shapes.items()}
    assert all(z.dtype == torch.float64 for z in noise.values())
    assert noise["random"].min() < -0.9 and noise["random"].max() > 0.9 and noise["random"].abs().max() <= 1
    assert all(abs(float(z.std()) - 1) < 0.1 for key, z in noise.items() if key != "random")


def test_acting():
    agent = cal_ql.Agent(OBS, ACT, make_args())
    with torch.no_grad():
        agent.actor.net[-1].bias[:ACT] = torch.tensor([0.5, -20.0])
    obs = np.zeros(OBS, np.float32)
    action = agent.act(obs)
    assert action.dtype == np.float32 and action == pytest.approx(np.tanh([0.5, -20.0]))
    state = torch.get_rng_state()
    agent.act(obs)
    assert torch.equal(torch.get_rng_state(), state)  # an evaluation leaves the training's randomness alone
    draws = np.array([agent.act(obs, noise=1.0) for _ in range(200)])
    assert abs(draws).max() <= 1 and np.arctanh(draws[:, 0]).std() == pytest.approx(math.exp(-1), rel=0.2)


# ---- online episodes ----

GOAL_TASK = SimpleNamespace(transform_reward=lambda reward: 10 * reward - 5, domain="antmaze")


def test_returns_to_go_of_a_finished_episode():
    assert cal_ql.returns_to_go([-5.0, -5.0, 5.0], False, True, GOAL_TASK, 0.5) == [-5 - 2.5 + 1.25, -5 + 2.5, 5.0]
    assert cal_ql.returns_to_go([-5.0] * 3, True, False, GOAL_TASK, 0.99) == pytest.approx([-500.0] * 3)
    kitchen = SimpleNamespace(domain="kitchen")
    goes_on = cal_ql.returns_to_go([0.0, 1.0, 2.0], False, False, kitchen, 0.5)
    assert goes_on == [1.5, 3.0, 4.0]  # 2 in each step from then on
    assert cal_ql.returns_to_go([0.0, 1.0, 2.0], False, True, kitchen, 0.5) == [1.0, 2.0, 2.0]


def test_episodes_enter_the_buffer_when_finished_and_as_many_updates_follow(toy_args, monkeypatch):
    buffers, updates, run_updates = [], [], cal_ql.run_updates

    def spy(agent, buffer, n, online_share=None):
        buffers.append(buffer)
        updates.append((buffer.added, n, online_share))
        return run_updates(agent, buffer, n, online_share)

    monkeypatch.setattr(cal_ql, "run_updates", spy)
    cal_ql.train(cal_ql.Args(**toy_args | {"n_actions": 2, "online_steps": 120, "mixing_ratio": 0.25}))
    buffer, online = buffers[0], [update for update in updates if update[2] is not None]
    assert all(added == 0 for added, _, share in updates if share is None)  # offline
    assert {share for _, _, share in online} == {0.75} and {n for _, n, _ in online} == {1}
    # Each number of transitions that the updates saw is a multiple of whole episodes, seen by as many as the last had.
    seen = [(added, len(list(group))) for added, group in itertools.groupby(added for added, _, _ in online)]
    lengths = np.diff([0, *[added for added, _ in seen]])
    assert [n for _, n in seen] == list(lengths) and lengths.max() <= 50 and 70 <= buffer.added <= 120

    columns = buffer.rows[buffer.n_dataset : buffer.n_dataset + buffer.added].split(buffer.widths, 1)
    obs, _, next_obs, reward, _, return_to_go = (column.numpy().astype(np.float64) for column in columns)
    assert reward[:, 0] == pytest.approx(-np.linalg.norm(next_obs, axis=1), rel=1e-5)  # the toy task's
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            expected = sum(0.99 ** (i - t) * reward[i, 0] for i in range(t, start + length))
            assert return_to_go[t, 0] == pytest.approx(expected, rel=1e-4)
            assert t + 1 == start + length or np.array_equal(obs[t + 1], next_obs[t])
        start += length


def test_online_episodes_that_fail_to_reach_their_goal_count_as_failing_for_ever(toy_args, monkeypatch):
    goal_dataset()
    direction = [1.0]

    def act(agent, obs, t=0, noise=0.0):
        if obs[0] == 0:  # an episode begins
            direction[0] = -direction[0]
        return np.full(1, direction[0], np.float32)

    monkeypatch.setattr(cal_ql.Agent, "act", act)
    options = {"env_id": "toy/pointmaze/mini-v0", "n_actions": 2, "online_steps": 40, "eval_every": 40}
    cal_ql.train(cal_ql.Args(**toy_args | options))
    folder = Path(toy_args["run_dir"], "toy_pointmaze_mini-v0__cal_ql__1")
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)["buffer"]["online"][:, -1]
    assert {round(float(value), 2) for value in saved} == {-500.0, -0.05, 5.0}  # of -5 a step, and of -5 and 5


@pytest.mark.parametrize("optimistic", [True, False])
def test_values_start_at_the_largest_return_of_the_dataset_or_at_0(optimistic, toy_args, monkeypatch):
    seen, run_updates = [], cal_ql.run_updates

    def spy(agent, buffer, n, online_share=None):
        data = dict(zip(buffer.keys, buffer.rows[: buffer.n_dataset].split(buffer.widths, 1), strict=True))
        with torch.no_grad():
            for critic in (agent.critic, agent.target_critic):
                seen.append((critic(data["obs"], data["action"].unsqueeze(1)), data["return_to_go"].max()))
        return run_updates(agent, buffer, n, online_share)

    monkeypatch.setattr(cal_ql, "run_updates", spy)
    options = {"n_actions": 2, "reward_bias": 10.0, "optimistic": optimistic}
    cal_ql.train(cal_ql.Args(**toy_args | options))
    for values, largest in seen[:2]:  # of the first update
        assert largest > 100 and values.numpy() == pytest.approx(float(largest) if optimistic else 0.0, abs=1)


def test_the_score_of_a_setting_of_ours_is_printed_as_such(toy_args, capsys):
    cal_ql.train(cal_ql.Args(**toy_args | {"n_actions": 2, "offline_steps": 10, "online_steps": 10, "eval_every": 10}))
    assert "OUR setting" in capsys.readouterr().out
