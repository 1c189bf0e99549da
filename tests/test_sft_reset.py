"""sft_reset.py: who acts, when the new Q is stable, what a policy is worth, and resets."""

import copy
import io
import math
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sft_reset
from sft_reset import (
    CONTROL,
    FORMER,
    LATEST,
    NO_ONE,
    PROBE,
    PROPOSED,
    RETAINED,
    SELECTED,
    WHOLE_CONTROL,
    Agent,
    Args,
    CudaGraph,
    Evaluator,
    Explorer,
    ReplayBuffer,
    combine,
    expect,
    ratio,
    reset,
    train,
    within,
)

OBS, ACTION = 3, 2


def make(**options):
    """An offline agent, a learner and their evaluator, as the online phase begins, and a buffer."""
    torch.manual_seed(0)
    np.random.seed(0)
    values = {"hidden": 8, "batch_size": 16, "expectile": 0.7, "beta": 3.0, "dropout": 0.0, "hold": 0.2}
    args = Args(**values | {"segment_steps": 5, "window": 4, "reset_every": 0} | options)
    rng, n = np.random.default_rng(0), 200
    data = {key: rng.normal(size=(n, OBS)).astype(np.float32) for key in ("obs", "next_obs")}
    data["action"] = rng.uniform(-1, 1, (n, ACTION)).astype(np.float32)
    data |= {"reward": np.ones(n, np.float32), "return_to_go": np.ones(n, np.float32)}
    data |= {"terminated": np.zeros(n, np.float32), "truncated": (np.arange(n) % 50 == 49).astype(np.float32)}
    buffer = ReplayBuffer(data, 100, torch.device("cpu"))
    for i in range(40):
        buffer.add(data["obs"][i], data["action"][i], data["next_obs"][i], 1.0, False)
    agent = Agent(OBS, ACTION, args)
    learner = Explorer(OBS, ACTION, args)
    task = SimpleNamespace(data=data, domain="locomotion", reward_scale=1.0, ref_min=10.0, ref_max=110.0, episodes=4)
    evaluator = Evaluator(learner, task, args)
    evaluator.begin(agent, list(data["obs"][:64]), 30.0)
    learner.warm_start(agent)
    return agent, learner, evaluator, buffer


def row(gain=0.0, promised=(0.0, 0.0), acted=True, probe=True, error=0.0, td_error=0.0, weight=1.0):
    """A segment of `weight` discounted steps: what `Evaluator.records` keeps of it."""
    promises = dict(zip(("promised_by_retained", "promised_by_learner"), promised, strict=True))
    errors = {"critic_error": error, "fitted_error": error, "td_error": td_error}
    role = PROBE if probe else SELECTED if acted else CONTROL
    return {"weight": weight, "acted": weight * acted, "gain": gain, "role": role} | promises | errors


ALONE = {"acted": False, "probe": False}
BATCHES = make()[3]


def judged(evaluator, learner, records, step=1, values=None, over=False):
    evaluator.records, evaluator.segments = [dict(r) for r in records], len(records)
    evaluator.values, evaluator.alone = values or [1.0] * (evaluator.args.window + 1), NO_ONE
    return evaluator.judge(learner, BATCHES, step, over)


# ---- as the online phase begins ----


@pytest.mark.parametrize("domain, terminated, may_fall", [
    ("locomotion", 1, True), ("locomotion", 0, False), ("antmaze", 1, False), ("kitchen", 1, False),
])  # fmt: skip
def test_units_of_values_and_where_episodes_can_end_in_a_fall(domain, terminated, may_fall):
    learner = make(gamma=0.99)[1]
    data = {"reward": np.full(200, 2.0), "terminated": np.full(200, terminated)}
    task = SimpleNamespace(data=data, domain=domain, reward_scale=4.0, ref_min=10.0, ref_max=60.0, episodes=4)
    evaluator = Evaluator(learner, task, learner.args)
    assert evaluator.may_fall is may_fall and evaluator.scale == pytest.approx(200)  # |r| over 100 steps
    # A value of 100 discounted steps is 50 true ones of rewards that are 4 times as large, and 50 points are 100 %.
    expected = 50 / 100 / 4 * 2 if domain == "locomotion" else math.nan
    assert evaluator.per_value == pytest.approx(expected, nan_ok=True)


def test_fitted_q_evaluation_is_of_either_policy_with_each_networks_own_target():
    _, learner, evaluator, _ = make(gamma=0.9)
    with torch.no_grad():
        for part in (learner.actor, evaluator.fitted, evaluator.fitted_targets):
            for weight in part.parameters():
                weight += 0.3 * torch.randn_like(weight)
    rng = np.random.default_rng(1)
    batch = {"obs": rng.normal(size=(16, OBS)), "next_obs": rng.normal(size=(16, OBS)), "reward": rng.normal(size=16)}
    batch |= {"action": rng.uniform(-1, 1, (16, ACTION)), "terminated": np.arange(16) % 3 == 0}
    batch = {key: torch.from_numpy(value.astype(np.float32)) for key, value in batch.items()}
    expected = []
    for i, policy in enumerate((evaluator.retained, learner)):
        next_q = evaluator.fitted_targets[i](batch["next_obs"], policy.policy(batch["next_obs"]))  # (2, n)
        backup = batch["reward"] + 0.9 * torch.where(batch["terminated"] == 1, 0.0, next_q)
        q = evaluator.fitted[i](batch["obs"], batch["action"])
        loss = sum((q[k] - backup[k].detach()).square().mean() for k in (0, 1)) / 2
        expected += torch.autograd.grad(loss, list(evaluator.fitted[i].parameters()))
    found = evaluator.fit(learner, SimpleNamespace(sample=lambda n, online_share: batch), 1)
    assert torch.isfinite(found["fitted_loss"])
    for weight, gradient in zip(evaluator.fitted.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-5)


def test_values_that_are_not_finite_stop_the_run(toy_args, monkeypatch, capsys):
    monkeypatch.setattr(Evaluator, "fit", lambda *_: {"fitted_loss": torch.tensor(math.nan)})
    with pytest.raises(SystemExit) as stopped:
        train(Args(**toy_args))
    assert stopped.value.code == 2 and "fitted_loss nan" in capsys.readouterr().err


# ---- who acts ----


@pytest.mark.parametrize(
    ("stable", "margins", "gains", "turn"),
    [
        (False, [math.inf, 0.0], [9.0, 9.0], 0),  # nothing measured yet: the retained policy acts
        (False, [0.5, 0.0], [0.6, -1.0], 1),  # not stable: the offline Q selects
        (False, [0.5, 0.0], [0.5, 9.0], 0),  # a tie with the margin goes to the retained policy
        (True, [0.0, 0.5], [9.0, 0.4], 0),  # stable: the new Q selects
        (True, [math.inf, 0.5], [-9.0, 0.6], 1),
        (True, [0.0, 0.0], [1.0, 0.0], 0),  # equal values go to the retained policy
    ],
)
def test_the_learner_acts_only_above_the_margin(stable, margins, gains, turn):
    evaluator = make()[2]
    evaluator.stable, evaluator.margins = stable, margins
    assert evaluator.turn(gains) == turn
    assert evaluator.turn(gains, "probe") == 1 and evaluator.turn(gains, "control") == 0


@pytest.mark.parametrize(("name", "turns"), [("offline", [1, 1]), ("online", [0, 0]), ("frozen-until-stable", [1, 0])])
def test_ablations_choose_whose_q_selects(name, turns):
    evaluator = make(evaluator=name)[2]
    evaluator.margins = [0.0, 0.0]
    for stable, turn in zip((False, True), turns, strict=True):
        evaluator.stable = stable
        assert evaluator.turn([1.0, -1.0]) == turn


def test_softmax_samples_in_training_and_is_greedy_where_deployed():
    evaluator = make(selection="softmax")[2]
    evaluator.stable, evaluator.margins = True, [0.0, 0.0]
    share = np.mean([evaluator.turn([0.0, 0.1], "select") for _ in range(2000)])
    assert share == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)  # 0.1 above the margin, temperature 0.1
    before = np.random.get_state()[1].copy()
    assert evaluator.turn([0.0, 0.1]) == 1 and (np.random.get_state()[1] == before).all()


def test_a_learner_equal_to_the_retained_policy_never_acts():
    agent, learner, evaluator, _ = make()
    with torch.no_grad():
        torch._foreach_copy_(list(learner.actor.parameters()), list(agent.actor.parameters()))
    evaluator.margins = [0.0, 0.0]
    obs = np.ones(OBS, np.float32)
    actions, gains = evaluator.propose(learner, obs)
    assert (actions[0] == actions[1]).all() and gains[:2] == [0.0, 0.0] and evaluator.turn(gains) == 0


def test_the_more_doubtful_critic_promises():
    _, learner, evaluator, _ = make()
    with torch.no_grad():
        learner.actor.net[-1].bias += 1.0
    obs = np.ones(OBS, np.float32)
    actions, gains = evaluator.propose(learner, obs)
    x, a = torch.ones(2, OBS), torch.from_numpy(actions)
    for i, pair in enumerate((evaluator.retained, learner)):
        q = pair.target_critic(x, a).detach()
        assert gains[i] == pytest.approx((q[:, 1] - q[:, 0]).min().item(), abs=1e-6)
        assert gains[2 + i] == pytest.approx(q[:, i].mean().item(), abs=1e-6)


def test_margin_is_what_promises_exceeded_gains_by_and_grows_with_it():
    _, learner, evaluator, _ = make(td_limit=-1.0)  # never stable
    controls = [row(gain=g, **ALONE) for g in (1.0, 3.0, 1.0, 3.0)]  # the fitted Q is off by 2 a step: no gain
    good = [row(gain=g, promised=(1.5, 0.5)) for g in (3.0, 2.0, 3.0, 2.0)]  # gains of 1, 0, 1, 0
    judged(evaluator, learner, controls + good)
    error = math.hypot(math.sqrt(4 / 3 * 4 * 0.25) / 4, math.sqrt(4 / 3 * 4) / 4)  # theirs and the controls'
    assert evaluator.margins == pytest.approx([1.0 + error, 0.0 + error])
    judged(evaluator, learner, controls + [row(gain=g - 1, promised=(1.5, 0.5)) for g in (3.0, 2.0, 3.0, 2.0)])
    assert evaluator.margins == pytest.approx([2.0 + error, 1.0 + error])
    judged(evaluator, learner, controls + good[:1])
    assert evaluator.margins == [math.inf, math.inf]  # one segment measures nothing


def test_after_selections_that_lost_the_retained_policy_acts_alone_until_they_are_old():
    _, learner, evaluator, _ = make(bound_errors=1e9)  # never replaced
    controls, probes = [row(**ALONE)] * 4, [row(gain=1.0, promised=(1.0, 1.0))] * 4
    for gain, margin in ((-1.0, math.inf), (1.0, 0.0)):
        selected = [row(gain=gain, promised=(gain, gain), probe=False)] * 4
        judged(evaluator, learner, controls + probes + selected)
        assert evaluator.margins == [margin, margin]
    lost = [row(gain=-1.0, promised=(-1.0, -1.0), probe=False)] * 4
    judged(evaluator, learner, lost + [row(**ALONE)] * 17 + probes)
    assert evaluator.margins == [0.0, 0.0]  # five windows of four later


@pytest.mark.parametrize("name, deployed", [("frozen-until-stable", 0), ("offline", 0), ("online", 1)])
def test_what_is_deployed_is_the_retained_policy_if_any_is_retained(name, deployed):
    _, learner, evaluator, _ = make(bound_errors=1e9, evaluator=name)
    learner.actor.net[-1].bias.data += 1.0
    obs = np.ones(OBS, np.float32)
    actions, gains = evaluator.propose(learner, obs)
    judged(evaluator, learner, [row(**ALONE)] * 4 + [row(gain=1.0)] * 4 + [row(gain=1.0, probe=False)] * 4)
    evaluator.margins = [min(gains[:2]) - 1] * 2
    assert evaluator.turn(gains) == 1, "in training the learner is selected"
    assert (actions[0] != actions[1]).all() and (evaluator.act(learner, obs) == actions[deployed]).all()


def test_the_learner_is_let_go_while_stable_and_held_while_not():
    _, learner, evaluator, _ = make(hold=0.4, **LIMITS)
    for gain, error, factor, end in ((1.0, 0.0, 0.97, 0.25), (-1.0, 0.0, 0.97, 0.25), (1.0, 9.0, 1.1, 1.0)):
        evaluator.hold, records = 0.5, [row(**ALONE)] * 4 + [row(gain=gain, error=error * evaluator.scale)] * 4
        log = judged(evaluator, learner, records)
        assert log["hold"] == pytest.approx(0.5 * factor) and float(learner.anchor) == pytest.approx(0.2 * factor)
        for _ in range(50):  # never less than a quarter, and no more than all
            log = judged(evaluator, learner, records)
        assert log["hold"] == end and float(learner.anchor) == pytest.approx(0.4 * end)


def test_gains_are_logged_where_they_are_known(monkeypatch):
    _, learner, evaluator, _ = make()
    names = {"score_gain", "score_gain_error", "learner_gain", "learner_gain_error"}
    assert names.isdisjoint(judged(evaluator, learner, [row(**ALONE)] * 4))
    monkeypatch.setattr(evaluator, "score_gain", lambda i: (3.0, 2.0))
    log = judged(evaluator, learner, [row(**ALONE)] * 4 + [row(gain=gain) for gain in (1.0, 3.0)] * 2)
    assert [log[name] for name in sorted(names)] == pytest.approx([2.0, math.sqrt(4 / 3 * 4) / 4, 3.0, 2.0])


# ---- stability ----


def test_within_asks_for_everything_that_has_a_limit():
    limits = {"td_error": 0.1, "drift": 0.2}
    assert within({"td_error": 0.1, "drift": 0.2, "more": 9.0}, limits, 1.0)
    assert not within({"td_error": 0.1}, limits, 1.0)
    assert not within({"td_error": math.nan, "drift": 0.0}, limits, 1.0)
    assert within({"td_error": 0.2, "drift": 0.4}, limits, 2.0)


def series(evaluator, learner, errors, td_error=0.01, values=None):
    """Whether the new Q is stable after each probe; errors are in units of a limit of 1."""
    found, records = [], [row(**ALONE) for _ in range(4)]
    for error in errors:
        records.append(row(error=error * evaluator.scale, td_error=td_error))
        judged(evaluator, learner, records, values=values)
        found.append(evaluator.stable)
    return found


LIMITS = {"td_limit": 0.1, "drift_limit": 0.1, "calibration_limit": 1.0}


def test_stable_after_good_probes_and_until_twice_the_limit():
    _, learner, evaluator, _ = make(**LIMITS)
    assert series(evaluator, learner, [0.5] * 4) == [False, True, True, True]  # two probes measure, half a window
    evaluator.stable = False
    assert series(evaluator, learner, [-9.0] * 4) == [False, True, True, True]  # it promised less than was obtained
    judged(evaluator, learner, [row(**ALONE)] * 2 + [row(error=1.5 * evaluator.scale)] * 4)
    assert evaluator.stable
    judged(evaluator, learner, [row(**ALONE)] * 2 + [row(error=2.5 * evaluator.scale)] * 4)
    assert not evaluator.stable  # a relapse
    judged(evaluator, learner, [row(**ALONE)] * 2 + [row(error=1.5 * evaluator.scale)] * 4)
    assert not evaluator.stable  # the way back is the strict limit
    judged(evaluator, learner, [row(**ALONE)] * 2 + [row(error=0.5 * evaluator.scale)] * 4)
    assert evaluator.stable


@pytest.mark.parametrize(
    "bad", [{"td_error": 0.3}, {"values": [1.0, 1.0, 1.0, 1.0, 1.3]}, {"errors": [3.0, -3.0] * 4}], ids=str
)
def test_one_bad_measure_is_enough_to_never_be_stable(bad):
    _, learner, evaluator, _ = make(**LIMITS)
    errors = bad.pop("errors", [0.1] * 8)  # -3 and 3 have mean 0: what fails is the standard error
    assert series(evaluator, learner, errors, **bad) == [False] * 8


def test_no_probe_before_td_error_and_drift_are_small():
    _, learner, evaluator, _ = make(probe_rate=1.0, **LIMITS)
    judged(evaluator, learner, [row(td_error=0.3, **ALONE)] * 6)
    assert evaluator.kind == "select"
    judged(evaluator, learner, [row(td_error=0.01, **ALONE)] * 6)
    assert evaluator.kind == "probe"


def test_a_probe_goes_on_to_the_end_of_its_episode_while_all_is_well():
    _, learner, evaluator, _ = make(probe_rate=0.0, **LIMITS)
    for td_error, over, kind in [(0.01, False, "probe"), (0.3, False, "select"), (0.01, True, "select")]:
        evaluator.kind = "probe"
        judged(evaluator, learner, [row(td_error=td_error, **ALONE)] * 6, over=over)
        assert evaluator.kind == kind


# ---- what a policy is worth ----


def test_ratio_of_sums_and_its_error():
    mean, error = ratio(np.array([2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    assert mean == pytest.approx(1.5)  # residuals 0.5, 1.0, -1.5
    assert error == pytest.approx(math.sqrt(3 / 2 * 3.5) / 6)
    assert ratio(np.array([2.0]), np.array([1.0])).tolist() == [2.0, math.inf]
    assert ratio(np.array([]), np.array([])).tolist() == [0.0, math.inf]


def test_estimates_that_agree_are_combined_by_inverse_variance():
    mean, error = combine([(10.0, 1.0), (11.0, 2.0), (10.0, 2.0)])
    assert mean == pytest.approx((10 + 11 / 4 + 10 / 4) / 1.5)
    assert error == pytest.approx(math.sqrt(1 / 1.5))


def test_estimates_that_disagree_widen_the_error():
    mean, error = combine([(0.0, 1.0), (10.0, 1.0)])
    assert mean == pytest.approx(5.0)
    assert error == pytest.approx(math.sqrt(50 / 2))  # chi2 = 25 + 25, one degree of freedom
    assert combine([(1.0, 1.0), (5.0, math.inf)]) == pytest.approx((1.0, 1.0))  # what is not known counts nothing


def test_end_segment_keeps_gain_errors_and_promises():
    _, learner, evaluator, _ = make(gamma=0.5)
    obs = np.random.default_rng(1).normal(size=(4, OBS)).astype(np.float32)
    action, gains = np.full(ACTION, 0.3, np.float32), [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0], [9.0, 1.0, 2.0, 3.0]]
    for terminated in (False, True):
        evaluator.kind = "probe"
        evaluator.segment = [
            (obs[i], action, obs[i + 1], 1.0 + i, terminated and i == 2, 1, gains[i]) for i in range(3)
        ]
        evaluator.end_segment(learner)
        kept = evaluator.records[-1]
        rest, obtained = 0.0 if terminated else 0.125, 1 + 0.5 * 2 + 0.25 * 3
        assert (kept["weight"], kept["acted"], kept["role"]) == (1.75, 1.75, PROBE)
        assert (kept["promised_by_retained"], kept["promised_by_learner"]) == (1 + 2.5 + 2.25, 2 + 3 + 0.25)
        ends = torch.from_numpy(obs[[0, 3]])
        v = expect(evaluator.fitted[0], evaluator.retained, ends).mean(0)
        assert kept["gain"] == pytest.approx(obtained + rest * v[1] - v[0], abs=1e-5)
        q = expect(learner.target_critic, learner, ends).mean(0)
        assert kept["critic_error"] == pytest.approx(4.0 - obtained - rest * q[1], abs=1e-5)
        f = expect(evaluator.fitted[1], learner, ends).mean(0)
        assert kept["fitted_error"] == pytest.approx(f[0] - obtained - rest * f[1], abs=1e-5)
    assert evaluator.segment == [] and evaluator.probe_steps == 6

    roles = {("select", NO_ONE, 0.0): SELECTED, ("select", NO_ONE, math.inf): CONTROL}
    roles |= {("control", NO_ONE, 0.0): CONTROL, ("control", RETAINED, 0.0): WHOLE_CONTROL}
    for (evaluator.kind, evaluator.alone, margin), role in roles.items():
        evaluator.margins = [margin, margin]
        evaluator.segment = [(obs[0], action, obs[1], 1.0, False, 0, gains[0])]
        evaluator.end_segment(learner)
        assert evaluator.records[-1]["role"] == role


@pytest.mark.parametrize(
    ("learner_value", "gain", "stable", "proposed"),
    [
        ((11.0, 0.4), 1.0, True, True),
        ((11.0, 0.5), 1.0, True, False),  # lower bound 10: a tie goes to the retained pair
        ((11.0, 0.6), 1.0, True, False),
        ((11.0, 0.4), -1.0, True, False),
        ((11.0, 0.4), 1.0, False, False),
        ((11.0, 0.4, -0.9, 1.0), 1.0, True, True),
        ((11.0, 0.4, -1.1, 1.0), 1.0, True, False),  # whole episodes returned less
        ((9.0, 0.4, 1.1, 1.0), 1.0, True, False),  # they returned more: their own weights are proposed, not these
    ],
)
def test_proposed_with_a_lower_bound_above(monkeypatch, learner_value, gain, stable, proposed):
    agent, learner, evaluator, _ = make(bound_errors=2.0, **LIMITS)
    answers, score_gain = iter([(10.0, 0.1), learner_value[:2]]), learner_value[2:]  # of the retained pair first
    monkeypatch.setattr("sft_reset.combine", lambda _: next(answers))
    monkeypatch.setattr(evaluator, "score_gain", lambda i: score_gain or (math.nan, math.inf))
    records = [row(**ALONE)] * 4 + [row(gain=gain, error=0.0 if stable else 9 * evaluator.scale)] * 4
    learner.actor.net[-1].bias.data += 1.0
    judged(evaluator, learner, records)
    assert evaluator.proving == proposed and evaluator.replaced == 0
    copied = torch.equal(evaluator.pairs[PROPOSED].actor.net[-1].bias, learner.actor.net[-1].bias)
    kept = torch.equal(evaluator.retained.actor.net[-1].bias, agent.actor.net[-1].bias)
    assert copied == proposed and kept


@pytest.mark.parametrize(
    ("trials", "value", "per_value", "td_error", "fresh"),
    [
        ([51.0, 52.0, 53.0], 11.4, 2.0, 0.0, True),  # lower bound 11.2: 2.4 points, and the copy returned 2 more
        ([51.0, 52.0, 53.0], 11.1, 2.0, 0.0, False),
        ([51.0, 52.0], 11.4, 2.0, 0.0, False),  # it may still show it
        ([49.0, 50.0, 51.0], 9.9, 2.0, 0.0, False),  # the bound promises nothing
        ([51.0, 52.0, 53.0], 11.4, math.nan, 0.0, False),  # a goal task, where a value is no score
        ([51.0, 52.0, 53.0], 11.4, 2.0, 0.2, False),  # promised by a Q that is not stable
    ],
)
def test_a_copy_in_doubt_gives_way_to_a_learner_that_promises_more(
    monkeypatch, trials, value, per_value, td_error, fresh
):
    _, learner, evaluator, _ = make(bound_errors=2.0, **LIMITS)
    evaluator.per_return, evaluator.per_value = 1.0, per_value
    evaluator.prove(learner)
    evaluator.returns[:2] = [49.0, 50.0, 51.0], trials
    answers = iter([(10.0, 0.1), (value, 0.1)])
    monkeypatch.setattr("sft_reset.combine", lambda _: next(answers))
    learner.actor.net[-1].bias.data += 1.0
    judged(evaluator, learner, [row(**ALONE)] * 4 + [row(gain=1.0, td_error=td_error)] * 4)
    assert evaluator.proving and evaluator.returns[PROPOSED] == ([] if fresh else trials)
    assert torch.equal(evaluator.pairs[PROPOSED].actor.net[-1].bias, learner.actor.net[-1].bias) == fresh


def end_episode(evaluator, learner, episode_return):
    evaluator.end_episode(learner, 1_000, episode_return)


def test_score_gain_is_the_difference_of_whole_episodes():
    evaluator = make(window=4)[2]
    evaluator.per_return = 0.5
    for own, latest in (([40.0, 50.0], [70.0, 74.0]), ([40.0, 50.0, 60.0], [70.0])):
        evaluator.returns[RETAINED], evaluator.returns[LATEST] = own, latest
        assert not math.isfinite(evaluator.score_gain(LATEST)[1]), "too few"
    evaluator.returns[RETAINED], evaluator.returns[LATEST] = [40.0, 50.0, 60.0], [70.0, 74.0]
    error = math.hypot(10 / math.sqrt(3), math.sqrt(8) / math.sqrt(2))
    assert evaluator.score_gain(LATEST) == pytest.approx((11.0, error / 2))
    assert evaluator.predicted_score() == pytest.approx(0.5 * (72.0 - 10.0)), "what it returned"
    evaluator.returns[LATEST], evaluator.per_value, evaluator.value_gain = [70.0], 2.0, 4.0
    assert evaluator.predicted_score() == pytest.approx(30.0 + 8.0)


def test_now_and_then_an_episode_is_the_learners_once_its_q_is_stable():
    learner, evaluator = make(whole_rate=0.2, window=4)[1:3]
    evaluator.returns[RETAINED] = [1.0] * 3
    for stable, known, share in ((False, [], 0.0), (True, [], 0.4), (True, [1.0], 0.4), (True, [1.0, 1.0], 0.2)):
        evaluator.stable, evaluator.returns[LATEST], alone = stable, known, []
        for _ in range(500):
            evaluator.kind = "select"
            evaluator.next_episode(learner)
            assert (evaluator.alone, evaluator.kind) in ((NO_ONE, "select"), (LATEST, "probe"))
            alone.append(evaluator.alone == LATEST)
        assert np.mean(alone) == pytest.approx(share, abs=0.06)


def test_returns_of_the_learners_whole_episodes_are_kept_while_they_are_recent_and_of_it():
    _, learner, evaluator, _ = make(probe_rate=1.0, whole_rate=1.0, reset_every=50, bound_errors=1e9, **LIMITS)
    records = [row(**ALONE)] * 4 + [row()] * 4
    evaluator.returns[RETAINED] = [100.0] * 3

    def episode(episode_return, healthy=True, step=1):
        for over in (False, True):
            evaluator.records, evaluator.segments, evaluator.values = records, 8, [1.0] * 4 + [1.0 if healthy else 99.0]
            evaluator.judge(learner, BATCHES, step, over)
        evaluator.end_episode(learner, step, episode_return)

    episode(5.0)
    assert evaluator.returns[LATEST] == [] and (evaluator.alone, evaluator.kind) == (LATEST, "probe"), (
        "first the retained one's"
    )
    for episode_return in (6.0, 7.0, 8.0):
        episode(episode_return)
    assert evaluator.returns[LATEST] == [7.0, 8.0] and evaluator.alone == LATEST
    episode(9.0, healthy=False)
    assert evaluator.returns[3:] == [[7.0, 8.0], [9.0]], "its drift ended it before its episode did"
    episode(9.0)
    assert evaluator.alone == LATEST
    episode(9.0, step=50)
    assert evaluator.resets == 1 and evaluator.returns[3:] == [[], [9.0]], "they were of the learner before its reset"
    evaluator.returns[LATEST], evaluator.returns[PROPOSED] = [7.0, 8.0], [31.0, 32.0, 33.0]
    evaluator.replace(learner, by=PROPOSED)
    assert evaluator.returns[3:] == [[32.0, 33.0], []], "its own may be of a learner older than the copy"


@pytest.mark.parametrize(
    ("episode_return", "latest", "proposed"),
    [
        (57.6, [], True),  # the upper quartile of the retained policy's is 57.5
        (57.5, [], False),
        (57.5, [52.0, 54.0], False),  # a gain of 2 in the mean of the three is in doubt
        (53.0, [80.0, 81.0], True),  # their mean gains: what is not below the retained policy's will do
        (52.5, [80.0, 81.0], False),
    ],
)
def test_the_weights_of_a_whole_episode_that_returned_more_than_most_are_proposed(episode_return, latest, proposed):
    for option, alone in (
        ("frozen-until-stable", LATEST),
        ("frozen-until-stable", NO_ONE),
        ("offline", LATEST),
        ("online", LATEST),
    ):
        _, learner, evaluator, _ = make(evaluator=option, window=6)
        evaluator.returns[RETAINED] = [40.0, 50.0, 55.0, 65.0]
        evaluator.returns[LATEST], evaluator.stable, evaluator.args.whole_rate = list(latest), True, 1.0
        learner.actor.net[-1].bias.data += 1.0
        before = learner.actor.net[-1].bias.clone()
        evaluator.next_episode(learner)
        assert evaluator.alone == LATEST
        evaluator.alone = alone
        learner.actor.net[-1].bias.data += 1.0
        end_episode(evaluator, learner, episode_return)
        expected = proposed and (option, alone) == ("frozen-until-stable", LATEST)
        assert evaluator.proving == expected == (evaluator.kind == "trial")
        copied = torch.equal(evaluator.pairs[PROPOSED].actor.net[-1].bias, before)
        assert copied == expected, "as it was when the episode began, not what it has become since"


@pytest.mark.parametrize(
    ("episode_return", "trials", "taken"),
    [(66.0, [60.0], True), (65.0, [60.0], False), (66.0, [], True), (66.0, [70.0], False), (71.0, [70.0, 60.0], True)],
)
def test_an_open_proposal_gives_way_to_weights_that_returned_more_than_all(episode_return, trials, taken):
    _, learner, evaluator, _ = make()
    evaluator.returns[:2], evaluator.proving, evaluator.alone = [[40.0, 50.0, 55.0, 65.0], list(trials)], True, LATEST
    evaluator.pairs[LATEST].actor.net[-1].bias.data += 1.0
    end_episode(evaluator, learner, episode_return)
    assert evaluator.proving and evaluator.kind == "trial" and evaluator.returns[PROPOSED] == ([] if taken else trials)
    biases = [evaluator.pairs[i].actor.net[-1].bias for i in (1, 3)]
    assert torch.equal(*biases) == taken


def test_a_stable_q_needs_no_margin_and_is_not_stable_where_what_it_selects_returns_less():
    _, learner, evaluator, _ = make(**LIMITS)
    for td_error, mixed, margin in [
        (0.3, [50.0, 52.0], 2.0),  # not stable
        (0.1, [50.0, 52.0], 0.0),
        (0.1, [], 0.0),
        (0.1, [38.0, 40.0], 0.0),  # 50 +- 5.8, 39 +- 1: within two standard errors
        (0.1, [37.0, 38.0], 2.0),
    ]:
        evaluator.returns[RETAINED], evaluator.returns[NO_ONE] = [40.0, 50.0, 60.0], mixed
        records = [row(td_error=td_error, **ALONE)] * 8 + [row(promised=(3.0, 3.0), gain=1.0, td_error=td_error)] * 8
        judged(evaluator, learner, records)
        assert evaluator.stable == (margin == 0.0) and evaluator.margins[1] == pytest.approx(margin, abs=1e-6)


def test_a_learner_whose_whole_episodes_gain_acts_in_every_state():
    _, learner, evaluator, _ = make(**LIMITS)
    evaluator.returns[RETAINED] = [49.0, 50.0, 51.0]
    for td_error, latest, gain, margin in [
        (0.1, [52.0, 54.0], 1.0, -math.inf),  # by 3, known to 1.2
        (0.1, [50.0, 52.0], 1.0, 0.0),
        (0.1, [54.0], 1.0, 0.0),  # not enough of them
        (0.3, [52.0, 54.0], 1.0, 2.0),  # not stable
        (0.1, [52.0, 54.0], -1.0, math.inf),  # what it selected lost
    ]:
        evaluator.returns[LATEST] = latest
        selected = [row(promised=(3.0, 3.0), gain=gain, td_error=td_error, probe=False)] * 8
        probes = [row(promised=(3.0, 3.0), gain=gain, td_error=td_error)] * 8
        log = judged(evaluator, learner, [row(td_error=td_error, **ALONE)] * 8 + selected + probes)
        assert evaluator.margins[1] == pytest.approx(margin, abs=1e-6) and math.isfinite(log["margin"])
        assert evaluator.turn([-9.0, -9.0]) == (margin == -math.inf)


def test_after_a_fall_the_learner_is_held_by_twice_as_much_until_episodes_lose_nothing():
    _, learner, evaluator, _ = make(hold=0.4, **LIMITS)
    records = [row(**ALONE)] * 8 + [row()] * 8
    for mixed, first, last in [  # the retained policy's: 50 +- 5.8
        ([50.0, 52.0], 0.3 * 0.97, 0.25),
        ([37.0, 38.0], 0.5, 1.0),  # held by 0.25 when it fell
        ([41.0, 42.0], 0.97, 0.5),  # in doubt
        ([37.0, 38.0], 1.0, 1.0),
        ([41.0, 42.0], 1.0, 1.0),
        ([50.0, 52.0], 0.97, 0.25),
    ]:
        evaluator.hold = 0.3 if first == 0.3 * 0.97 else evaluator.hold
        evaluator.returns[RETAINED], evaluator.returns[NO_ONE] = [40.0, 50.0, 60.0], mixed
        held = [judged(evaluator, learner, records)["hold"] for _ in range(60)]
        assert (held[0], held[-1]) == pytest.approx((first, last))
    evaluator.returns[PROPOSED] = [50.0, 51.0, 52.0]
    evaluator.replace(learner, by=PROPOSED)
    assert [judged(evaluator, learner, records)["hold"] for _ in range(60)][-1] == 0.25
    for latest, last in (([52.0, 54.0], 0.25 * 0.97**60), ([50.0, 52.0], 0.25)):  # by 2 and 0 +- 1.2
        evaluator.returns[LATEST] = latest
        assert [judged(evaluator, learner, records)["hold"] for _ in range(60)][-1] == pytest.approx(last)
    evaluator.hold, evaluator.returns[NO_ONE] = 0.1, [37.0, 38.0]
    assert judged(evaluator, learner, records)["hold"] == 0.5
    evaluator.returns = [[1.0] * 3, [], [], [], [1.0] * 2]  # successes alone
    assert [judged(evaluator, learner, records)["hold"] for _ in range(60)][-1] == 0.25


def test_after_a_replacement_q_is_still_stable_and_gains_are_measured_anew():
    _, learner, evaluator, _ = make(hold=0.4, **LIMITS)
    records = [row(**ALONE)] * 8 + [row(gain=1.0)] * 8
    judged(evaluator, learner, records)
    assert evaluator.stable and math.isfinite(evaluator.value_gain) and math.isfinite(evaluator.margins[1])
    evaluator.returns[PROPOSED] = [31.0]
    evaluator.replace(learner, by=PROPOSED)
    judged(evaluator, learner, evaluator.records)
    assert evaluator.stable and not math.isfinite(evaluator.value_gain) and evaluator.margins[0] == math.inf
    log = judged(evaluator, learner, evaluator.records + [row(gain=3.0, **ALONE)] * 2 + [row(gain=5.0)] * 2)
    assert log["learner_gain"] == pytest.approx(2.0), "of segments since then alone"


def prove(evaluator, learner, retained, proposed):
    """Scripted returns until it is decided: who acted in each episode, 0 or 1, or -1 where it was no one's."""
    returns, actors = {0: cycle(retained), 1: cycle(proposed), -1: cycle([0.0])}, []
    end_episode(evaluator, learner, 0.0)
    while evaluator.proving or len(evaluator.returns[RETAINED]) < 3:
        assert evaluator.kind == {RETAINED: "control", PROPOSED: "trial"}.get(evaluator.alone, evaluator.kind)
        actors.append(evaluator.alone)
        end_episode(evaluator, learner, next(returns[evaluator.alone]))
    assert evaluator.kind != "trial"
    return actors


@pytest.mark.parametrize(
    ("proposed", "replaced", "episodes"),
    [
        ([60.0, 61.0, 62.0], 1, [1, 0, 1, 0, 1]),
        ([40.0], 0, [1]),
        ([51.0, 52.0, 46.0], 0, [1, 0, 1, 0, 1]),  # no better than a retained policy of 49.8 on average
        ([52.0, 47.0], 0, [1, 0, 1]),  # 49.5 to 49.75
        ([90.0, 20.0, 48.0], 0, [1, 0, 1, 0, 1]),  # 52.7 to 49.8, but in doubt by more than 0.3
        ([50.5, 49.5, 90.0], 0, [1, 0, 1, 0] + [1, -1] * 7 + [1]),  # undecided, until it was asked ten times
    ],
)
def test_a_proposal_replaces_the_pair_only_after_whole_episodes_that_show_it(proposed, replaced, episodes):
    _, learner, evaluator, _ = make()
    evaluator.alone, evaluator.segments = NO_ONE, 100
    assert prove(evaluator, learner, [49.0, 50.0, 51.0], []) == [0] * 3  # the retained policy first
    evaluator.pairs[PROPOSED].actor.net[-1].bias.data += 1.0
    evaluator.proving = True
    assert prove(evaluator, learner, [49.0, 50.0, 51.0], proposed) == episodes
    assert not evaluator.proving and evaluator.replaced == replaced and evaluator.returns[PROPOSED] == []
    assert evaluator.next_proposal == 104
    if replaced:
        proved = evaluator.pairs[PROPOSED].actor.net[-1].bias
        assert torch.equal(evaluator.retained.actor.net[-1].bias, proved)
        assert evaluator.returns[RETAINED] == proposed
        assert torch.equal(learner.anchor_net[-1].bias, proved)
        assert evaluator.margins == [math.inf, math.inf]
        assert evaluator.renewed == 1_000, "no reset for as long again"
        assert evaluator.score == pytest.approx(51.0)
    else:
        assert evaluator.renewed == 0


@pytest.mark.parametrize(
    ("proposed", "replaced", "n"),
    [([60.0, 61.0, 62.0], 1, 3), ([57.0, 56.0, 55.0], 1, 6), ([55.0, 54.0, 53.0], 1, 9), ([53.6, 60.0], 0, 1)],
)
def test_where_episodes_can_end_in_a_fall_a_small_gain_takes_more_of_them(proposed, replaced, n):
    """The retained policy returns 40 above a random one: more than 40 / (n + 1) must be gained, which 3.6 never is."""
    _, learner, evaluator, _ = make()
    evaluator.alone, evaluator.may_fall = NO_ONE, True
    prove(evaluator, learner, [49.0, 50.0, 51.0], [])
    evaluator.proving = True
    assert prove(evaluator, learner, [49.0, 50.0, 51.0], proposed).count(1) == n
    assert evaluator.replaced == replaced


@pytest.mark.parametrize(("later", "restored", "n"), [(40.0, 1, 10), (49.5, 1, 10), (50.5, 0, 10), (55.0, 0, 4)])
def test_a_replacement_is_undone_where_ten_episodes_say_that_it_was_wrong(later, restored, n):
    """It returns `later` after its trial, in which it returned 61 on average and the former one 50; the trial, which
    chose it, does not count. That four times 55 is more than the former one's five, all below, is in doubt by 0.007."""
    _, learner, evaluator, _ = make()
    evaluator.alone = NO_ONE
    prove(evaluator, learner, [49.0, 50.0, 51.0], [])
    offline = copy.deepcopy(evaluator.retained.actor.state_dict())
    evaluator.pairs[PROPOSED].actor.net[-1].bias.data += 1.0
    evaluator.proving = True
    prove(evaluator, learner, [49.0, 51.0], [60.0, 61.0, 62.0])
    assert evaluator.returns == [[60.0, 61.0, 62.0], [], [49.0, 50.0, 51.0, 49.0, 51.0], [61.0, 62.0], []]
    whose = []
    while evaluator.returns[FORMER] and len(whose) < 50:
        assert not torch.equal(evaluator.retained.actor.net[-1].bias, offline["net.4.bias"])
        assert evaluator.kind != "trial"
        whose.append(evaluator.alone)
        end_episode(evaluator, learner, {RETAINED: later, NO_ONE: 0.0}[evaluator.alone])
    assert whose == [RETAINED, NO_ONE] * (n - 1) + [RETAINED]
    assert (evaluator.replaced, evaluator.restored, evaluator.alone) == (1, restored, NO_ONE)
    same = all(torch.equal(value, offline[key]) for key, value in evaluator.retained.actor.state_dict().items())
    assert same == bool(restored) == torch.equal(learner.anchor_net[-1].bias, offline["net.4.bias"])
    kept = [49.0, 50.0, 51.0, 49.0, 51.0] if restored else [60.0, 61.0, 62.0] + [later] * n
    assert evaluator.returns[:4] == [kept, [], [], [61.0, 62.0]]
    assert evaluator.score == pytest.approx(np.mean(kept) - 10.0)


def test_a_replacement_that_took_ten_episodes_is_judged_by_ten_others():
    _, learner, evaluator, _ = make()
    evaluator.returns[:2] = [49.0, 50.0, 51.0, 49.5, 50.5], [52.0, 48.0, 53.0, 50.2, 54.0, 50.7, 55.0, 50.6, 56.0]
    evaluator.proving, evaluator.alone = True, PROPOSED
    end_episode(evaluator, learner, 56.0)
    assert evaluator.replaced == 1 and len(evaluator.returns[RETAINED]) == 10 and evaluator.alone == RETAINED
    for others in range(1, 11):
        assert evaluator.returns[FORMER] and evaluator.restored == 0
        evaluator.alone = RETAINED
        end_episode(evaluator, learner, 52.0 if others % 2 else 46.0)
    assert evaluator.returns[FORMER] == [] and evaluator.restored == 1


def test_a_single_fall_does_not_decide():
    """A t test of these returns is in doubt."""
    _, learner, evaluator, _ = make()
    prove(evaluator, learner, [44.0, 15.0, 45.0], [])
    evaluator.proving = True
    assert prove(evaluator, learner, [44.0, 44.5], [46.0, 47.0, 46.5]) == [1, 0, 1, 0, 1] and evaluator.replaced == 1


# ---- frozen copies, resets, resume ----


def train_a_little(learner, evaluator, buffer):
    for _ in range(3):
        learner.update(buffer.sample(16, 0.5))
    evaluator.fit(learner, buffer, 2)


def test_the_retained_pair_is_bit_equal_after_updates_and_resets():
    _, learner, evaluator, buffer = make()
    before = copy.deepcopy(evaluator.retained.state_dict())
    train_a_little(learner, evaluator, buffer)
    reset(learner, buffer.sample(16))
    train_a_little(learner, evaluator, buffer)
    after = evaluator.retained.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if torch.is_tensor(before[key]))
    evaluator.pairs[PROPOSED].load_state_dict(learner.state_dict())
    evaluator.returns[PROPOSED] = [31.0, 32.0, 33.0]
    evaluator.replace(learner, by=PROPOSED)
    before = [p.clone() for p in evaluator.retained.parameters()]
    train_a_little(learner, evaluator, buffer)
    assert all(torch.equal(p, q) for p, q in zip(before, evaluator.retained.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(before[-4:], list(learner.parameters())[-4:], strict=True))


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_reset_is_in_place_and_complete(share):
    _, learner, evaluator, buffer = make(reset_share=share)
    train_a_little(learner, evaluator, buffer)
    state = [v for s in learner.optimizer.state.values() for v in s.values()]
    tensors = [*learner.parameters(), *state]
    addresses, before = [t.data_ptr() for t in tensors], [p.clone() for p in learner.actor.parameters()]
    assert any(v.any() for v in state)
    reset(learner, buffer.sample(16))
    again = [*learner.parameters(), *(v for s in learner.optimizer.state.values() for v in s.values())]
    assert [t.data_ptr() for t in again] == addresses
    assert not any(v.any() for v in state)
    after = list(learner.actor.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
    kept = torch.corrcoef(torch.stack([before[3].ravel(), after[3].ravel()]))[0, 1]  # of the hidden layer's 64 weights
    assert (kept > 0.5) if share < 1 else abs(kept) < 0.4
    assert all(torch.equal(p, q) for p, q in zip(learner.sources, learner.targets, strict=True))
    learner.update(buffer.sample(16, 0.5))  # Adam begins anew: its first step is the learning rate long
    assert max(v.max() for v in (s["step"] for s in learner.optimizer.state.values())) == 1


def test_a_reset_keeps_the_level_of_values():
    """The linear fit of the old values to the new ones is the identity."""
    learner, _, buffer = make(reset_share=0.5)[1:]
    with torch.no_grad():
        for net, level in zip(learner.critic.nets, (100.0, -50.0), strict=True):
            net[-1].bias.add_(level)
    batch = buffer.sample(64)
    old = learner.critic(batch["obs"], batch["action"]).detach()
    reset(learner, batch)
    new = learner.critic(batch["obs"], batch["action"]).detach()
    for x, y, target in zip(new, old, learner.target_critic(batch["obs"], batch["action"]), strict=True):
        assert not torch.allclose(x, y, atol=1e-3) and torch.equal(x, target)
        assert float(x.mean()) == pytest.approx(float(y.mean()), abs=1e-3)
        design = torch.stack([torch.ones(64), x - x.mean()], 1)
        slope = torch.linalg.lstsq(design.double(), (y - y.mean()).double().unsqueeze(1)).solution.ravel()
        assert slope.tolist() == pytest.approx([0.0, 1.0], abs=1e-2)


@pytest.mark.parametrize("over", [False, True])
def test_what_an_episode_returned_is_not_the_reset_learners(over):
    """Whether it is reset within its episode or where that ends."""
    _, learner, evaluator, _ = make(reset_every=50, bound_errors=1e9, probe_rate=1.0, **LIMITS)
    evaluator.returns[RETAINED], evaluator.alone, evaluator.kind = [10.0, 11.0, 12.0], LATEST, "probe"
    evaluator.records, evaluator.segments = [row(**ALONE)] * 4 + [row()] * 4, 8
    evaluator.values = [1.0] * 5
    evaluator.judge(learner, BATCHES, 50, over)
    evaluator.end_episode(learner, 50, 50.0)  # above all of the retained policy's
    assert evaluator.resets == 1 and evaluator.returns[3:] == [[], [50.0]] and not evaluator.proving


def test_a_reset_needs_no_batch_of_many():
    _, learner, evaluator, _ = make(reset_every=50, batch_size=1)
    judged(evaluator, learner, [row()] * 8, step=50)
    assert evaluator.resets == 1 and all(p.isfinite().all() for p in learner.parameters())


def test_after_a_trial_actions_are_selected():
    learner, evaluator = make()[1:3]
    evaluator.returns[RETAINED], evaluator.alone, evaluator.kind = [1.0] * 3, PROPOSED, "trial"
    evaluator.next_episode(learner)
    assert evaluator.kind == "select"


def test_a_reset_waits_until_an_open_proposal_is_decided():
    _, learner, evaluator, _ = make(reset_every=10, bound_errors=1e9, **LIMITS)
    good = [row(**ALONE)] * 4 + [row(gain=1.0)] * 4
    judged(evaluator, learner, good, step=9)
    assert evaluator.resets == 0 and evaluator.stable
    evaluator.proving = True
    judged(evaluator, learner, good, step=15)
    assert evaluator.resets == 0  # due
    evaluator.proving = False
    judged(evaluator, learner, good, step=15)
    assert (evaluator.resets, evaluator.renewed) == (1, 15)
    assert evaluator.recovering and not evaluator.stable and evaluator.margins == [math.inf] * 2
    assert evaluator.records == good[:4] and evaluator.values == []  # nothing of the old learner is left
    judged(evaluator, learner, good, step=16)
    assert evaluator.stable and not evaluator.recovering
    judged(evaluator, learner, good, step=25)
    assert evaluator.resets == 2


def test_recovery_ends_even_if_the_new_q_is_never_stable():
    _, learner, evaluator, _ = make(reset_every=10, **LIMITS)
    bad = [row(td_error=9.0, **ALONE)] * 8
    for step in range(1, 20):
        judged(evaluator, learner, bad, step=step)
        assert evaluator.recovering == (10 <= step < 15), step
        assert evaluator.kind == "select" and evaluator.margins == [math.inf] * 2


def test_state_survives_a_weights_only_file_in_the_middle_of_a_recovery():
    _, learner, evaluator, buffer = make(reset_every=10, **LIMITS)
    train_a_little(learner, evaluator, buffer)
    evaluator.returns[PROPOSED] = [31.0, 32.0, 33.0]
    evaluator.replace(learner, by=PROPOSED)
    obs = np.ones(OBS, np.float32)
    evaluator.segment = [
        (obs, np.zeros(ACTION, np.float32), obs, 1.0, False, 0, evaluator.propose(learner, obs)[1])
    ] * 5
    evaluator.end_segment(learner)
    evaluator.judge(learner, buffer, 12, False)
    evaluator.history.append([1.0, 2.0])
    assert evaluator.recovering and evaluator.replaced == 1
    file = io.BytesIO()
    torch.save({"learner": learner.state_dict(), "evaluator": evaluator.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    _, other_learner, other, other_buffer = make(reset_every=10, **LIMITS)
    other_learner.load_state_dict(saved["learner"])
    other.load_state_dict(saved["evaluator"])
    ours, theirs = ([*x.get_extra_state().items()] for x in (evaluator, other))
    plain = repr([item for item in ours if item[0] != "optimizer"])  # as text, where nan is equal to nan
    assert plain == repr([item for item in theirs if item[0] != "optimizer"]) and len(ours) > 20
    for e, b, model in ((evaluator, buffer, learner), (other, other_buffer, other_learner)):
        torch.manual_seed(5)
        train_a_little(model, e, b)
    for a, b in ((evaluator, other), (learner, other_learner)):
        assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert (evaluator.act(learner, obs) == other.act(other_learner, obs)).all()


def test_summary_compares_predictions_with_evaluations():
    evaluator = make()[2]
    evaluator.history, evaluator.segments, evaluator.stable_segments = [[1, 2], [2, 4], [3, 3]], 4, 1
    summary = evaluator.summary()
    assert summary["rank_correlation"] == pytest.approx(0.5)
    assert summary["prediction_bias"] == pytest.approx(-1.0) and summary["stable_share"] == 0.25
    evaluator.history = [[1.0, 2.0]]
    assert evaluator.summary()["rank_correlation"] is None


# ---- whole runs ----

FAST = {"segment_steps": 5, "window": 4, "recovery_ratio": 2, "save_every": 20}
EASY = FAST | {"td_limit": 1e9, "drift_limit": 1e9, "calibration_limit": 1e9, "probe_rate": 0.5}


class Crash(Exception):
    pass


def test_resumed_in_a_recovery_and_after_replacements_it_is_the_same_run(toy_args, tmp_path, monkeypatch):
    # A reset half-way through an episode; bounds so low that learners are retained on a whim.
    args = toy_args | EASY | {"online_steps": 700, "reset_every": 33, "bound_errors": -1e3, "replace_confidence": 1e-9}
    args["eval_episodes"] = 1
    whole = train(Args(**args | {"run_dir": str(tmp_path / "whole")}))
    assert whole["resets"] > 1 and whole["replaced"] > 0 and 0 < whole["stable_share"] < 1 and whole["probe_steps"] > 0
    original = Evaluator.judge

    def crashing(self, learner, *where):
        log = original(self, learner, *where)
        if self.recovering and self.replaced:
            raise Crash
        return log

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "judge", crashing)
        with pytest.raises(Crash):
            train(Args(**args))
    resumed = train(Args(**args | {"resume": True}))
    same = [key for key in whole if key not in ("seconds", "updates_per_second")]
    assert {key: whole[key] for key in same} == {key: resumed[key] for key in same}
    files = [next(Path(d).glob("*/online.pt")) for d in (tmp_path / "whole", args["run_dir"])]
    a, b = (torch.load(file, weights_only=True) for file in files)
    for part in ("learner", "evaluator"):
        tensors = [key for key, value in a[part].items() if torch.is_tensor(value)]
        assert all(torch.equal(a[part][key], b[part][key]) for key in tensors)


def test_a_run_that_is_never_stable_goes_on_as_the_retained_policy_and_says_so(toy_args, capsys):
    summary = train(Args(**toy_args | FAST | {"td_limit": 0.0, "reset_every": 50}))
    assert "never stable" in capsys.readouterr().out
    assert summary["final_score"] == summary["lowest_score"] == summary["offline_score"]
    assert (summary["stable_share"], summary["replaced"], summary["probe_steps"]) == (0.0, 0, 0)
    assert summary["resets"] == 2


def spied(monkeypatch) -> list[dict]:
    """What `train` does in each online step, in the order of the steps; filled while it runs."""
    steps, originals = [], (Evaluator.propose, sft_reset.run_updates, ReplayBuffer.add, Evaluator.fit)

    def propose(self, learner, obs, noise=0.0):
        actions, gains = originals[0](self, learner, obs, noise)
        if noise or self.kind == "probe":  # not the deployed policy's in an evaluation
            steps.append({"kind": self.kind, "noise": noise, "segments": self.segments, "recovering": self.recovering})
            steps[-1] |= {"actions": actions, "alone": self.alone, "copy": self.pairs[self.alone], "learner": learner}
            steps[-1] |= {"shares": [], "fits": []}
        return actions, gains

    def run_updates(agent, buffer, n, online_share=None):
        if isinstance(agent, Explorer):
            steps[-1]["shares"] += [online_share] * n
        return originals[1](agent, buffer, n, online_share)

    def add(self, obs, action, *rest):
        step = steps[-1]
        step["action"], step["of_copy"], step["of_learner"] = action, step["copy"].act(obs), step["learner"].act(obs)
        originals[2](self, obs, action, *rest)

    def fit(self, learner, buffer, n):
        steps[-1]["fits"].append(n)
        return originals[3](self, learner, buffer, n)

    monkeypatch.setattr(Evaluator, "propose", propose)
    monkeypatch.setattr(sft_reset, "run_updates", run_updates)
    monkeypatch.setattr(ReplayBuffer, "add", add)
    monkeypatch.setattr(Evaluator, "fit", fit)
    return steps


def test_who_acts_and_what_is_learned_in_each_step(toy_args, monkeypatch):
    steps = spied(monkeypatch)
    args = toy_args | EASY | {"online_steps": 900, "reset_every": 200, "bound_errors": -1e3, "replace_confidence": 1e-9}
    args["probe_rate"] = 0.05
    train(Args(**args | {"recovery_ratio": 3, "segment_steps": 10, "eval_episodes": 1}))
    assert len(steps) == 900 and {step["kind"] for step in steps} == {"control", "probe", "trial", "select"}
    for step in steps:
        assert step["noise"] == (step["kind"] != "probe"), "probes are acted as deployed"  # [D1]
        if step["alone"] in (PROPOSED, LATEST):
            assert (step["action"] == step["of_copy"]).all(), "a frozen copy of the learner acts"  # [D1] [D7]
        elif step["kind"] != "select":
            assert (step["action"] == step["actions"][int(step["kind"] == "probe")]).all()
        updates = 0 if step["segments"] < 4 else 3 if step["recovering"] else 1
        assert step["shares"] == [0.5] * updates  # [D3] [D9]
        assert step["fits"] in ([], [10 // 5])
    trials = [step for step in steps if step["kind"] == "trial"]
    assert {step["alone"] for step in trials} == {PROPOSED}
    for copies in (trials, [step for step in steps if step["alone"] == LATEST]):
        assert any((step["of_copy"] != step["of_learner"]).any() for step in copies), "not the learner as it is by then"
    assert any(step["recovering"] for step in steps) and sum(map(len, (step["fits"] for step in steps))) > 20


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"evaluator": "offline", "bound_errors": -1e3}, "select"),
        ({"evaluator": "online", "bound_errors": -1e3}, "select"),
        ({"selection": "softmax"}, "select"),
        ({"reset_every": 0, "bound_errors": 1e3}, "select"),
    ],
    ids=str,
)
def test_variants_run(toy_args, monkeypatch, options, kind):
    steps = spied(monkeypatch)
    args = toy_args | EASY | {"online_steps": 300, "reset_every": 80}
    summary = train(Args(**args | options))
    assert summary["resets"] == 0 if options.get("reset_every") == 0 else summary["resets"] > 0
    assert kind in (kinds := {step["kind"] for step in steps})
    if "evaluator" in options:
        assert summary["replaced"] == 0 and "trial" not in kinds
        checkpoint = torch.load(next(Path(args["run_dir"]).glob("*/checkpoint.pt")), weights_only=True)
        as_before = set(checkpoint["progress"]["scores"]) == {summary["offline_score"]}
        assert as_before == (options["evaluator"] == "offline")


def test_segments_of_the_retained_policy_alone_are_drawn_once_there_is_a_margin():
    learner, evaluator = make(control_share=1.0, probe_rate=0.0)[1:3]
    known = [row(**ALONE)] * 4 + [row(probe=False)] * 4
    for records, kind in (([row(**ALONE)] * 8, "select"), (known, "control")):
        judged(evaluator, learner, records)
        assert evaluator.kind == kind


def test_whole_episodes_of_the_retained_policy_age_no_probes():
    """While a proposed copy is tried, its opponent's episodes push no probes out of the window."""
    learner, evaluator = make()[1:3]
    probes, alone = [row()] * 4, row(**ALONE)
    for role, stable in ((CONTROL, False), (WHOLE_CONTROL, True)):
        judged(evaluator, learner, [*probes, *[alone | {"role": role}] * 40])
        assert evaluator.stable == stable


def test_a_learner_that_promises_more_is_proposed_once_before_its_reset():
    learner, evaluator = make(reset_every=50, td_limit=-1.0)[1:3]  # never stable
    retained, better = [row(**ALONE)] * 8, [row(gain=100.0)] * 8
    evaluator.returns[RETAINED] = [1.0, 2.0, 3.0]
    judged(evaluator, learner, retained + better, step=49)
    assert not evaluator.proving and evaluator.resets == 0, "not due, and not stable"
    weights = copy.deepcopy(list(learner.actor.parameters()))
    judged(evaluator, learner, retained + better, step=50)
    assert evaluator.proving and evaluator.resets == 0, "it waits"
    assert all(map(torch.equal, weights, evaluator.pairs[PROPOSED].actor.parameters()))
    evaluator.proving = False  # refused
    judged(evaluator, learner, retained + better, step=51)
    assert not evaluator.proving and evaluator.resets == 1, "once"
    judged(evaluator, learner, retained + better, step=101)
    assert evaluator.proving and evaluator.resets == 1, "and once before the next"
    for worse in (make(reset_every=50), make(reset_every=50, evaluator="offline")):
        learner, evaluator = worse[1:3]
        gain = -100.0 if evaluator.args.evaluator != "offline" else 100.0
        judged(evaluator, learner, retained + [row(gain=gain)] * 8, step=50)
        assert not evaluator.proving and evaluator.resets == 1


def test_there_is_no_prediction_without_recent_probes():
    learner, evaluator = make()[1:3]
    judged(evaluator, learner, [row(**ALONE)] * 8 + [row()] * 8)
    assert math.isfinite(evaluator.predicted_score())
    judged(evaluator, learner, [row()] * 8 + [row(**ALONE)] * 40)
    assert not math.isfinite(evaluator.predicted_score())
    judged(evaluator, learner, [row(**ALONE)] * 8 + [row()] * 8)
    evaluator.returns[PROPOSED] = [31.0, 32.0, 33.0]
    evaluator.replace(learner, by=PROPOSED)
    assert not math.isfinite(evaluator.value_gain), "that was of the learner as it is now, not of the copy"
    assert evaluator.predicted_score() == pytest.approx(22.5), "by the copy's latest episodes, 32.5 - 10"


def test_with_graphs_the_same_is_proposed(monkeypatch):
    """What stands for a graph here runs on the CPU as it is."""
    monkeypatch.setattr(sft_reset, "CudaGraph", lambda fn: fn)
    learner, evaluator = make()[1:3]
    obs, found = np.ones(OBS, np.float32), {}
    for graph in (False, True):
        evaluator.args.cuda_graph = graph
        for noise in (0.0, 1.0, 0.0, 1.0):
            torch.manual_seed(0)
            actions, gains = evaluator.propose(learner, obs, noise)
            found.setdefault(noise, []).append([*actions.flatten().tolist(), *gains])
    assert set(evaluator.graphs) == {0.0, 1.0}
    assert all(one == numbers[0] for numbers in found.values() for one in numbers) and found[0.0] != found[1.0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_goes_on_after_a_reset():
    with torch.device("cuda"):
        args = Args(hidden=8, expectile=0.7, beta=3.0, dropout=0.0)
        learner = Explorer(OBS, ACTION, args)
        batch = {"obs": torch.randn(16, OBS), "next_obs": torch.randn(16, OBS), "action": torch.zeros(16, ACTION)}
        batch |= {"reward": torch.ones(16), "terminated": torch.zeros(16)}
    update = CudaGraph(lambda: learner.update(batch))
    for _ in range(6):
        update()
    reset(learner, batch)
    before = [p.clone() for p in learner.trained]
    update()
    assert not any(torch.equal(p, q) for p, q in zip(before, learner.trained, strict=True))
    assert all(float(s["step"]) == 1 for s in learner.optimizer.state.values())
