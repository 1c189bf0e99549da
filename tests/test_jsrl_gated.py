"""jsrl_gated.py: the explorer's losses and warm start by hand, and every decision of the gate."""

import copy
import math
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import jsrl_gated as jsrl

SCORED = {"ref_min": 0.0, "ref_max": 100.0, "return_range": 40.0, "score": lambda r: r}
TASK, FALLS = (SimpleNamespace(domain="locomotion", data={"terminated": np.array([0.0, n])}, **SCORED) for n in (0, 1))
GUIDE = (49, 50, 51, 50, 50)


def make_gate(task=TASK, **args) -> jsrl.Gate:
    return jsrl.Gate(jsrl.Args(**{"warmup_steps": 50, "estimator": "returns", "promote": False} | args), task)


def play(gate: jsrl.Gate, explorer: list[float], guide=GUIDE, steps: int = 10) -> list[tuple[float, int, float]]:
    """Episodes until the explorer's scripted returns are used up: (level acted, decision, level after) of each."""
    guide, explorer, history, step = cycle(guide), list(explorer), [], 0
    while explorer:
        level = gate.next_level()
        total = explorer.pop(0) if level else next(guide)
        step += steps
        log = gate.end(step, level, [0.0] * steps, [total / steps] * steps)
        history.append((level, log["gate/decision"], gate.level))
    return history


def decisions(history) -> list[int]:
    return [decision for level, decision, _ in history if level]


def opened(**args) -> jsrl.Gate:
    gate = make_gate(**args)
    play(gate, [60] * 11)
    assert gate.level == 1
    return gate


# ---- gate ----


@pytest.mark.parametrize("shift", [0, -1_000])
def test_a_better_explorer_opens_in_steps_of_doubled_size_three_episodes_each(shift):
    history = play(make_gate(), [60 + shift] * 11, [g + shift for g in GUIDE])
    levels = [0.2] * 3 + [0.6] * 3 + [1.0] * 5
    assert [level for level, _, _ in history][5:] == levels  # five of the guide first
    assert decisions(history) == [0, 0, 1] * 3 + [0, 0]
    assert [level for _, _, level in history][5:] == [0, 0, *levels[:-2]]  # confirmed, hence deployed


@pytest.mark.parametrize("shift", [0, -1_000])
def test_a_collapse_closes_within_three_episodes(shift):
    gate = make_gate()
    history = play(gate, [60 + shift] * 12 + [shift] * 3, [g + shift for g in GUIDE])
    assert decisions(history)[-3:] == [0, 0, -1] and gate.level == 0 and gate.trial == 0 and gate.wait == 1


def test_a_small_loss_closes_part_of_the_way():
    gate = opened()
    play(gate, [44] * 6)  # 6 points lost, 2 tolerated: a third
    assert 0 < gate.level <= 0.4


def test_high_variance_decides_nothing():
    gate = make_gate()
    assert decisions(play(gate, [20, 90, 10, 95, 15, 90])) == [0] * 6 and gate.level == 0


def test_ties_open():
    gate = make_gate()
    assert decisions(play(gate, [50] * 9, [50])) == [0, 0, 1] * 3 and gate.level == 1


def test_one_outlier_neither_closes_nor_opens():
    gate = opened()
    assert not any(decisions(play(gate, [0, 60, 60, 60, 60]))) and gate.level == 1
    gate = make_gate()
    assert not any(decisions(play(gate, [200, 40, 40]))) and gate.level == 0


def test_a_collapse_refutes_even_where_the_mean_of_all_results_opens():
    gate = make_gate()
    play(gate, [51] * 4)  # 0.2 is confirmed, 0.6 is tried
    gate.results = [[[0.0] * 10, [total / 10] * 10, 0] for total in [90] * 6 + [44, 45, 46]]
    log = gate.end(1_000, 0.6, [0.0] * 10, [4.6] * 10)
    assert log["gate/lower"] > log["gate/reference"] and log["gate/decision"] == -1 and gate.level == 0.2


def test_a_refuted_trial_leaves_the_deployed_level_and_comes_back_later_and_smaller():
    gate = make_gate()
    history = play(gate, [60, 60, 60, 20, 20, 60, 60, 60, 60])
    assert decisions(history) == [0, 0, 1, 0, -1, 0, 0, 0, 1]
    assert [level for level, _, _ in history][5:] == [0.2, 0.2, 0.2, 0.6, 0.6, 0.2, 0.4, 0.4, 0.4]
    assert [level for _, _, level in history][7:] == [0.2] * 6 + [0.4]  # deployed all along


def test_after_a_step_shortened_by_the_room_left_the_next_is_half_of_it():
    gate = make_gate()
    play(gate, [60] * 6 + [20, 20])  # 0.6 is confirmed, 1.0 refuted
    assert (gate.level, gate.trial, gate.notch) == (0.6, 0.6, pytest.approx(0.2))
    play(gate, [60] * 3)
    assert gate.trial == 0.8


def test_equal_returns_are_ties_whatever_the_fit_rounds():
    """Guide and explorer succeed always, in episodes of all lengths, and V says nothing."""
    rng, gate = np.random.default_rng(0), make_gate(estimator="advantage")
    proven, losing = [], []
    for episode in range(60):
        n, level = int(rng.integers(30, 200)), gate.next_level()
        log = gate.end(100 * episode, level, list(rng.normal(-50, 10, n)), [0.0] * (n - 1) + [100.0])
        if level and len(gate.results) >= 2:
            proven, losing = [*proven, bool(log["gate/proven"])], [*losing, gate.losing]
    assert len(proven) > 10 and all(proven) and not any(losing) and gate.level == 1


def test_a_dead_explorer_settles_closed():
    gate, waits, acted = make_gate(), [], []
    for _ in range(60):
        before = gate.patience
        acted.append(play_one(gate, dead=True) > 0)
        waits += [gate.patience] if gate.patience > before else []
    assert gate.level == 0 and waits == sorted(waits) and waits[-1] > 8
    assert sum(acted) <= 15 and sum(acted[30:]) <= 4  # rarer and rarer, but it is asked again
    assert sum(acted[20:]) > 0


def mean_guide(gate: jsrl.Gate) -> float:
    return np.mean([sum(gains) for _, gains in gate.guide])


def test_a_clearly_better_explorer_becomes_the_guide_once_its_copy_has_shown_it():
    gate = make_gate(promote=True)
    play(gate, [60] * 10)
    assert gate.level == 1 and not gate.candidate  # four episodes at level 1
    play(gate, [60])
    assert gate.candidate and gate.level == gate.next_level() == 0 and mean_guide(gate) == 50
    assert gate.deployed == 1  # the copy, as its explorer was
    history = play(gate, [60, 60, 60, 55, 55, 55, 55], guide=[60])  # at last better than the first guide only
    assert [level for level, _, _ in history] == [0, 0, 0] + [1] * 7  # the copy alone first
    assert mean_guide(gate) == 60 and gate.level < 1
    gate = make_gate(promote=True)
    play(gate, [51] * 30)  # better by less than the tolerance of 2
    assert gate.level == 1 and not gate.candidate and mean_guide(gate) == 50


@pytest.mark.parametrize(("returns", "episodes"), [([42], 3), ([40, 70], 10)])  # worse; undecided
def test_a_copy_that_does_not_show_it_is_dropped(returns, episodes):
    gate = make_gate(promote=True)
    play(gate, [60] * 11)
    history = play(gate, [60] * 3, guide=returns)
    assert [level for level, _, _ in history] == [0] * episodes + [1] * 3
    assert not gate.candidate and not gate.tested and mean_guide(gate) == 50 and gate.level == 1


def test_with_a_dropped_copy_goes_the_bound_that_it_was_made_for():
    gate = make_gate(promote=True)
    play(gate, [60] * 6 + [70] * 5)
    assert gate.candidate and max(bound for _, bound in gate.confirmed) > 12
    play(gate, [60] * 3, guide=[50])  # by 10 better than the guide, as before its best moment
    assert not gate.candidate and mean_guide(gate) == 50 and gate.level == 1


def test_a_copy_is_made_of_what_the_latest_four_have_gained():
    gate = make_gate(promote=True)
    play(gate, [50] * 12)
    gate.results = [[[0.0] * 10, [total / 10] * 10, 0] for total in [50, 49, 51, 50, 49, 51, 56, 55, 57]]
    log = gate.end(1_000, 1.0, [0.0] * 10, [5.6] * 10)
    assert log["gate/lower"] < 52 and gate.candidate


def test_a_copy_is_deployed_but_for_as_long_as_its_own_episodes_return_less():
    gate, acted = make_gate(promote=True), []
    play(gate, [60] * 11)
    guide, proven = (SimpleNamespace(act=lambda obs, name=name: acted.append(name)) for name in "gp")
    for total in (40, 75, 20, 75):
        gate.act(guide, proven, None, 0)
        log = gate.end(1_000, 0, [0.0] * 10, [total / 10] * 10)
        assert gate.candidate and log["gate/deployed"] == gate.deployed == float(total == 75)
    assert acted == ["p", "g", "p", "g"]


def test_where_episodes_can_end_in_a_fall_a_gain_below_what_few_of_them_hide_is_not_deployed():
    goals = [SimpleNamespace(**vars(FALLS) | {"domain": domain}) for domain in ("antmaze", "kitchen")]
    assert [make_gate(task).may_fall for task in (TASK, FALLS, *goals)] == [False, True, True, True]
    gate = make_gate(FALLS)
    gate.guide = [[[0.0] * 10, [total / 10] * 10] for total in (40.0, 60.0)]
    assert [gate.hidden_loss(level, n) for level, n in ((1.0, 4), (0.5, 4), (1.0, 0))] == [10, 5, 50]
    assert make_gate(TASK).may_fall is False and opened().hidden_loss(1.0, 4) == 0

    gate = opened(task=FALLS)  # the guide's mean is 50, results count up to ten: gains of 50 / 11 and more
    for total, deployed in ((54, 0), (55, 1), (54, 0)):
        play(gate, [total] * 10)
        assert gate.level == 1 and gate.deployed == deployed
    play(gate, [60] * 9 + [49])
    assert gate.deployed == 1
    play(gate, [49] * 3)
    assert gate.deployed == 0, "the latest results are below the guide's"


def test_successes_alone_open_levels_of_which_nothing_is_deployed_where_an_episode_can_miss_its_goal():
    """Where guide and explorer always succeed there is no noise, and nothing to gain that a miss would not cost."""
    task = SimpleNamespace(**vars(TASK) | {"domain": "pointmaze"})
    gate = make_gate(task)
    assert decisions(play(gate, [100] * 9, [100])) == [0, 0, 1] * 3 and gate.level == 1 and gate.deployed == 0
    gate = make_gate(task)
    play(gate, [100] * 30, [0, 100, 100, 100])
    assert gate.level == 1 and gate.deployed == 1, "25 points, and one miss in eleven episodes would cost 7"


def test_a_copy_becomes_the_guide_where_it_gains_more_than_a_fall_that_its_episodes_hide():
    for total, promoted, episodes in ((53, -1, 10), (56, 1, 8), (65, 1, 3)):  # 50 / (n + 1) of 56 - 50: n = 8
        gate = make_gate(FALLS, promote=True)
        play(gate, [75] * 11)
        assert gate.candidate
        ends = []
        while gate.candidate:
            ends.append(gate.end(1_000, 0, [0.0] * 10, [total / 10] * 10)["gate/promoted"])
            assert gate.deployed == float(total - 50 >= 50 / (len(ends) + 1)) or not gate.candidate
        assert (ends[-1], len(ends)) == (promoted, episodes)


def test_an_explorer_is_proven_by_an_episode_that_returns_no_less_than_the_guides_mean():
    gate = opened()  # the guide's mean is 50
    end = lambda level, total, n=10: gate.end(1_000, level, [0.0] * n, [total / n] * n)["gate/proven"]  # noqa: E731
    assert [bool(end(1.0, total)) for total in (50, 49.9, 10, 51)] == [True, False, False, True]
    assert not end(0.0, 60), "the guide's own"
    gate.trial = 0.2
    assert not end(0.2, 60, n=8), "over before the explorer's turn"


def play_one(gate: jsrl.Gate, dead: bool) -> float:
    level, rng = gate.next_level(), np.random.default_rng(len(gate.guide))
    total = 50 * (1 - level) if level and dead else 50 + rng.normal()
    gate.end(1_000_000 if len(gate.guide) >= 4 else 0, level, [0.0] * 10, [total / 10] * 10)
    return level


def test_the_guide_is_deployed_for_as_long_as_the_explorer_loses():
    gate = opened()
    assert gate.deployed == 1
    play(gate, [60, 20])  # amid ten of 60, but the mean of the last four is 50
    assert gate.deployed == gate.level == 1
    play(gate, [42])
    assert gate.level == 1 and gate.deployed == 0  # it is 45.5, and its bounds are wide
    play(gate, [58, 60])
    assert gate.deployed == 0
    play(gate, [60])
    assert gate.deployed == 1
    gate = opened()
    play(gate, [49.5] * 10)  # tolerated while it explores, not deployed
    assert gate.level == 1 and gate.deployed == 0
    gate = make_gate()
    play(gate, [50] * 6 + [30, 30])  # two levels open, the third trial is as bad as can be
    assert gate.level == 0.6 and gate.deployed == 0
    gate = make_gate(gate="open")
    play(gate, [10] * 3)
    assert gate.deployed == 1


def test_the_reference_is_the_best_bound_up_to_the_trials_level():
    gate = make_gate()
    play(gate, [60])
    gate.level, gate.confirmed = 0.4, [[0.0, 0.0], [0.2, 3.0], [0.4, 1.0], [1.0, 9.0]]
    for trial, bound in ((0.6, 3.0), (1.0, 9.0)):
        gate.trial, gate.results = trial, [[[0.0] * 10, [5.0] * 10, 0]] * 3
        assert gate.end(100, trial, [0.0] * 10, [5.0] * 10)["gate/reference"] == pytest.approx(50 + bound)


def returns_only(gate: jsrl.Gate) -> dict:
    pair = [sum(gains) for _, gains, _ in gate.results], [sum(gains) for _, gains in gate.guide]
    return {"returns": pair, "advantage": pair}


@pytest.mark.parametrize("loss, sd, opens", [(0, 2, 0.85), (0, 8, 0.25), (-5, 5, 0.9), (10, 5, 0), (30, 8, 0)])
def test_stationary_explorers_in_1250_gates(loss, sd, opens, monkeypatch):
    """`loss`: points worse than the guide, of which 2 are tolerated; `sd`: of an episode. No worse: open in the end,
    where noise allows. Worse: it is not, and what is deployed loses no more than tolerated, with about the confidence
    of a look."""
    rng, at_end, deployed = np.random.default_rng(0), [], []
    monkeypatch.setattr(jsrl.Gate, "samples", returns_only)
    for _ in range(250):
        gate = make_gate()
        for episode in range(120):
            level = gate.next_level()
            gate.end(10 * (episode + 1), level, [0.0], [rng.normal(50 - level * loss, sd)])
            deployed += [gate.deployed * loss] if episode >= 60 else []
        at_end.append(gate.level)
    deployed, share = np.array(deployed), np.mean(np.array(at_end) == 1)
    if loss <= 0:
        assert share > opens
    else:
        assert share == 0 and np.mean(deployed) < gate.tolerance / 2
        assert np.mean(deployed > gate.tolerance) < 1.5 * (1 - gate.args.confidence)


def test_switch_steps_follow_the_guides_own_episodes():
    gate = make_gate(warmup_steps=10_000)
    for length in (180, 200, 1_000):
        gate.end(length, 0.0, [0.0] * length, [1.0] * length)
    assert [gate.switch_step(level) for level in (0.1, 0.5, 1)] == [180, 100, 0]
    assert [t for t in range(1_000) if gate.explores(t, 0.5)] == list(range(100, 1_000))
    assert not any(gate.explores(t, 0.0) for t in range(1_000))


def test_random_switching_gives_each_its_share():
    gate = make_gate(switch="random")
    gate.length = 1_000.0
    acts = [gate.explores(t, 0.3, 0.1) for t in range(1_000)]
    assert abs(np.mean(acts) - 0.3) <= 0.05 and all(len(set(acts[i : i + 50])) == 1 for i in range(0, 1_000, 50))
    assert all(gate.explores(t, 1.0) for t in range(1_000)) and not any(gate.explores(t, 0.0) for t in range(1_000))


def test_advantage_cancels_what_the_guide_did_before_the_switch():
    """Half of the guide's noise is before the switch, and what comes after is foretold by V; no bias from either."""
    rng, gate, widths, errors = np.random.default_rng(0), make_gate(estimator="advantage", warmup_steps=10_000), [], []
    for episode in range(40):
        level, luck = gate.next_level(), rng.normal(0, 5, 2)
        switch = gate.switch_step(level)
        gains = np.repeat((25 + luck) / 5, 5) + rng.normal(0, 0.1, 10)
        gains[switch:] += level
        values = np.repeat([luck[1], luck[1]], 5)
        log = gate.end(1_000 * (episode + 1), level, values.tolist(), gains.tolist())
        if "gate/width_advantage" in log and level < 1:
            widths.append(log["gate/width_advantage"] / log["gate/width_returns"])
            errors.append(log["gate/calibration"])
    assert len(widths) >= 2 and np.mean(widths) < 0.8 and np.abs(errors).max() < 2


def test_gains_are_points_of_normalised_score():
    gate = make_gate(
        SimpleNamespace(domain="kitchen", ref_min=0.0, ref_max=4.0, return_range=4.0, score=lambda r: 25 * r, data={})
    )
    gate.end(1, 0.0, [0.0] * 5, [0.0, 0.0, 1.0, 0.0, 2.0])
    assert gate.guide[0][1] == [0, 0, 25, 0, 50] and gate.tolerance == 100 * jsrl.Args.tolerance


def test_bounds():
    estimate, lower, upper = jsrl.bounds([3.0, 5.0], [0.0, 2.0], 0.9)  # both variances 2, two degrees of freedom
    assert (estimate, upper - estimate, estimate - lower) == pytest.approx((3, 1.885618 * math.sqrt(2), upper - 3))
    for sample, guide, variance in (([3.0, 3.0], [0.0, 2.0], 1), ([0.0, 2.0], [3.0, 3.0], 2)):  # pooled 1, own 0 and 2
        estimate, lower, upper = jsrl.bounds(sample, guide, 0.9)
        assert [upper - estimate, estimate - lower] == pytest.approx([1.885618 * math.sqrt(variance)] * 2)


def sampled(returns, values, explorer=9.0):
    """Results by the advantage of a gate whose guide had episodes of one step, the explorer one of return 9."""
    gate = make_gate()
    gate.guide = [[[value], [total]] for value, total in zip(values, returns, strict=True)]
    gate.length, gate.trial, gate.results = 1.0, 1.0, [[[values[0]], [explorer], 0]]
    return gate.samples()["advantage"]


def test_advantages_by_hand():
    """Returns 0, 4, 8, 12: each guide episode against the mean of the three others, the explorer's against 6."""
    apart = [-8, -8 / 3, 8 / 3, 8]
    own, guide = sampled([0.0, 4.0, 8.0, 12.0], [0.0] * 4)
    assert own == pytest.approx([3]) and guide == pytest.approx(apart)
    own, guide = sampled([0.0, 4.0, 8.0, 12.0], [0.0, 2.0, 4.0, 6.0])  # V foretells all: the fit with it is taken
    assert own == pytest.approx([9]) and guide == pytest.approx([0] * 4, abs=1e-6)
    own, guide = sampled([0.0, 4.0, 8.0, 12.0], [1.0, -5.0, 5.0, -1.0])  # V misleads: the fit without it
    assert own == pytest.approx([3]) and guide == pytest.approx(apart)


def test_a_deployed_level_closes_at_half_the_tolerance():
    gate = opened()
    play(gate, [48.5] * 11)  # 1.5 lost, 2 tolerated
    assert gate.level < 1
    gate = make_gate()
    assert -1 not in decisions(play(gate, [48.5] * 11)), "a trial is not refuted by that"


def test_patience_falls_with_every_level_that_opens():
    gate = make_gate()
    gate.patience = 6
    play(gate, [60] * 3)
    assert gate.level == 0.2 and gate.patience == 4


def test_the_guides_sample_grows_with_that_of_a_trial_in_doubt():
    gate = make_gate()
    gate.guide, gate.length, gate.trial = [[[0.0] * 10, [5.0] * 10]] * 3, 10.0, 0.2
    gate.results = [[[0.0] * 10, [5.0] * 10, 8]] * 3
    assert gate.next_level() == 0.2
    gate.results = gate.results + gate.results[:1]
    assert gate.next_level() == 0
    gate.level = 0.2  # deployed already: nothing to decide
    assert gate.next_level() == 0.2


def test_an_episode_that_ends_before_the_switch_is_no_result():
    gate = make_gate()
    play(gate, [60])
    before = len(gate.results)
    gate.end(1_000, 0.2, [0.0] * 8, [5.0] * 8)  # the switch is at step 8 of 0, 1, ..., 7
    assert len(gate.results) == before
    gate.end(1_000, 0.2, [0.0] * 9, [5.0] * 9)
    assert len(gate.results) == before + 1


def test_within_a_trial_guide_and_explorer_are_looked_at_from_one_switch_on():
    gate, end = make_gate(), lambda level, n: gate.end(0, level, [0.0] * n, [50 / n] * n)
    for n in (50, 100, 150):
        end(0.0, n)
    gate.trial, switch = 0.2, gate.switch_step(0.2)
    for level, n in ((0.2, 90), (0.0, 300), (0.2, 90)):
        end(level, n)
    assert switch == 80 and [t for _, _, t in gate.results] == [80, 80]
    assert len(gate.samples()["returns"][1]) == 3, "of the guide those longer than 80 steps, not than 100"
    gate.results = []
    end(0.0, 300)
    assert gate.length == 150, "the median of all five, for the next trial"


def test_segments_all_over_the_episode_are_a_result_where_the_explorer_had_one():
    gate = make_gate(switch="random")
    gate.end(0, 0.0, [0.0] * 1_000, [0.05] * 1_000)
    for offset, results in ((0.5, 0), (0.1, 1)):  # of 50 steps each, the first of which is the guide's, the explorer's
        gate.end(0, 0.2, [0.0] * 40, [1.0] * 40, offset)
        assert len(gate.results) == results


def test_copies_are_of_explorers_at_level_1_after_an_episode_no_worse_than_their_mean():
    gate = make_gate(promote=True)
    play(gate, [60])
    gate.level = gate.trial = 0.6
    gate.wait, gate.results = 99, [[[0.0] * 10, [6.0] * 10, 4]] * 6
    play_at = lambda level, total: gate.end(1_000, level, [0.0] * 10, [total / 10] * 10)  # noqa: E731
    play_at(0.6, 60)
    assert not gate.candidate
    gate.level = gate.trial = 1.0
    play_at(1.0, 52)
    assert not gate.candidate, "a fall may begin here"
    play_at(1.0, 60)
    assert gate.candidate


def test_gate_kinds():
    for kind, level in {"open": 1, "closed": 0, "random": 1}.items():
        gate = make_gate(gate=kind)
        for step in range(8):
            gate.end(20 * step, gate.next_level(), [0.0] * 10, [5.0] * 10)
        assert gate.level == level and (0 < gate.trial < 1 if kind == "random" else gate.trial == level)
        assert kind != "random" or gate.results == [], "of other trials"
    gate = make_gate(gate="curriculum")
    levels = [level for level, _, _ in play(gate, [52] * 10 + [30] * 15)]
    assert levels == [0] * 5 + [0.1] * 5 + [0.2] * 5 + [0.3] * 15  # stays where it gets worse, and never closes
    gate = make_gate(gate="curriculum")
    play(gate, [52])
    gate.results = [[[0.0] * 10, [total / 10] * 10, 9] for total in [56] * 6 + [46] * 3]
    log = gate.end(1_000, 0.1, [0.0] * 10, [4.6] * 10)
    assert log["gate/estimate"] == pytest.approx(52) and gate.level == 0.2, "the mean counts, not the latest four"
    gate = make_gate(gate="curriculum")
    play(gate, [52] * 60)
    assert gate.level == gate.trial == 1


def test_gate_state_is_complete_and_loads_weights_only(tmp_path):
    gate = make_gate()
    play(gate, [60, 61, 20, 25, 60])
    torch.save(gate.state_dict(), tmp_path / "gate.pt")
    other = make_gate()
    other.load_state_dict(torch.load(tmp_path / "gate.pt", weights_only=True))
    script = [60, 40, 70, 55, 30, 20, 80, 60]
    assert play(gate, script) == play(other, script) and gate.state_dict() == other.state_dict()


# ---- explorer ----


def make_agents(**args) -> tuple[jsrl.Agent, jsrl.Explorer, jsrl.ReplayBuffer]:
    args = jsrl.Args(**{"hidden": 16, "dropout": 0.1, "batch_size": 8} | args)
    agent, explorer = jsrl.Agent(3, 2, args), jsrl.Explorer(3, 2, args)
    shapes = {"obs": (20, 3), "action": (20, 2), "next_obs": (20, 3)} | dict.fromkeys(("reward", "return_to_go"), 20)
    data = {key: np.random.uniform(-1, 1, shape).astype(np.float32) for key, shape in shapes.items()}
    buffer = jsrl.ReplayBuffer(data | {"terminated": np.zeros(20, np.float32)}, 10, torch.device("cpu"))
    return agent, explorer, buffer


def test_warm_start_acts_as_the_guide_and_values_as_the_guide():
    agent, explorer, buffer = make_agents()
    explorer.warm_start(agent)
    for _ in range(5):
        obs = np.random.normal(size=3).astype(np.float32)
        np.testing.assert_array_equal(explorer.act(obs), agent.act(obs))
        assert (explorer.act(obs, noise=1.0) != explorer.act(obs)).all()
    batch = buffer.sample(20, 0.0)
    guide_q = agent.target_critic(batch["obs"], batch["action"])
    for critic in (explorer.critic, explorer.target_critic):
        assert torch.equal(critic(batch["obs"], batch["action"]), guide_q)


def test_updates_leave_the_guide_alone_and_move_the_target_by_tau():
    agent, explorer, buffer = make_agents(tau=0.1)
    guide = copy.deepcopy(agent).requires_grad_(False)
    explorer.warm_start(guide)
    before, target = copy.deepcopy(list(guide.parameters())), copy.deepcopy(explorer.targets)
    net = copy.deepcopy(explorer.anchor_net)
    explorer.update(buffer.sample(8, 0.0))
    assert all(torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), explorer.anchor_net.parameters(), strict=True))
    for old, new, source in zip(target, explorer.targets, explorer.sources, strict=True):
        torch.testing.assert_close(new, old + 0.1 * (source - old))
    assert not torch.equal(explorer.actor.net[0].weight, net[0].weight)


class TwoQ(torch.nn.Module):
    """Q1 = a * w, Q2 = a * w + 1, of the first action dimension."""

    def __init__(self, w: float):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(w))

    def forward(self, obs, action):
        q = self.w * action[:, 0]
        return torch.stack([q, q + 1])


def test_sac_losses_by_hand(monkeypatch):
    """Two rows; noise 0, so that the action is tanh(mean) = 0.5 and log pi is known."""
    args = jsrl.Args(hidden=4, dropout=0.0, gamma=0.5, temperature=0.1, initial_std=1.0)
    explorer = jsrl.Explorer(1, 1, args)
    for p in explorer.actor.net.parameters():
        p.data.zero_()
    explorer.actor.net[-1].bias.data.fill_(math.atanh(0.5))
    explorer.critic, explorer.target_critic = TwoQ(2.0), TwoQ(4.0).requires_grad_(False)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    batch = {
        "obs": torch.zeros(2, 1), "next_obs": torch.zeros(2, 1), "action": torch.tensor([[0.5], [-0.5]]),
        "reward": torch.tensor([1.0, 2.0]), "terminated": torch.tensor([0.0, 1.0]),
    }  # fmt: skip
    log_pi = -0.5 * math.log(2 * math.pi) - math.log(1 - 0.25)
    backup = [1 + 0.5 * (min(2.0, 3.0) - 0.1 * log_pi), 2.0]  # the second row is terminal
    errors = [1.0 - backup[0], -1.0 - backup[1], 2.0 - backup[0], 0.0 - backup[1]]
    losses = explorer.loss(batch)
    assert losses["critic_loss"].item() == pytest.approx(sum(e**2 for e in errors) / 4, abs=1e-5)
    assert losses["actor_loss"].item() == pytest.approx(0.1 * log_pi - 1.0, abs=1e-5)

    explorer.anchor.fill_(0.4)  # a guide that does 0 is 0.5 away; |Q| is 1
    for p in explorer.anchor_net.parameters():
        p.data.zero_()
    losses = explorer.loss(batch)
    assert losses["actor_loss"].item() == pytest.approx(0.1 * log_pi - 1.0 + 0.4 * 0.25, abs=1e-5)

    losses["actor_loss"].backward()
    assert explorer.critic.w.grad is None  # the policy's loss does not train the critics
    losses = explorer.loss(batch)
    explorer.actor.net[-1].bias.grad = None
    losses["critic_loss"].backward()
    assert explorer.critic.w.grad is not None and explorer.actor.net[-1].bias.grad is None


def test_log_prob_is_that_of_the_squashed_normal():
    _, explorer, _ = make_agents(initial_std=0.5)
    action, log_prob = explorer.sample(torch.randn(50, 3, generator=torch.Generator().manual_seed(0)))
    assert action.abs().max() < 1
    torch.manual_seed(3)
    obs = torch.randn(6, 3)
    torch.manual_seed(4)
    action, log_prob = explorer.sample(obs)
    normal = torch.distributions.Normal(explorer.actor.net(obs), torch.exp(explorer.actor.log_std))
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform())
    torch.testing.assert_close(log_prob, squashed.log_prob(action).sum(-1), rtol=1e-3, atol=1e-3)


# ---- whole runs ----


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("outcome", [1, -1])  # of the copy that is tried: it becomes the guide, it is dropped
def test_who_acts_what_is_learned_and_what_is_copied_in_each_step(toy_args, monkeypatch, outcome):
    parts, steps = {}, [{}]
    begun, events = [], {}  # explorers as episodes begin; what an episode's end decided: index of the step after it

    def spy(owner, name, before=lambda *_, **__: None, after=lambda result, *_: result):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            before(*args, **kwargs)
            return after(original(*args, **kwargs), *args)

        monkeypatch.setattr(owner, name, wrapped)

    def lead():
        return parts["proven"] if parts["gate"].candidate else parts["guide"]

    def force(log, gate, *episode):
        if len(gate.results) > 1 and not events:  # the explorer has acted, and not only as the guide does
            gate.candidate, gate.trial, gate.results, events["copied"] = True, 0.0, [], len(steps) - 1
            log["gate/proven"] = True
        elif gate.candidate and len(gate.tested) == 2:
            gate.candidate, gate.tested, log["gate/promoted"], events["judged"] = False, [], outcome, len(steps) - 1
        return log

    def learn(agent, buffer, n, online_share=None):
        if agent is parts["explorer"]:
            guide, proven = (parts[name].actor.net for name in ("guide", "proven"))
            steps[-1] |= {"share": online_share, "anchored": same(lead().actor.net, agent.anchor_net)}
            steps[-1] |= {"copied": len(begun) > 1 and same(proven, begun[-2].net), "promoted": same(guide, proven)}
            steps[-1]["first"] = same(guide, parts["agent"].actor.net)

    def compare(act, *_):
        if len(steps) > 1 and "deployed" not in steps[-1]:  # the first evaluation at this step
            obs = np.zeros(parts["agent"].value[0].in_features, np.float32)
            actors = [parts[name] for name in ("guide", "proven")]
            pairs = [(act(obs, t), parts["gate"].act(*actors, obs, t)) for t in (0, 10_000)]
            steps[-1]["deployed"] = all(map(np.array_equal, *zip(*pairs, strict=True)))

    spy(jsrl.Run, "start", before=lambda run, task, **given: parts.update(given))
    spy(jsrl.Gate, "end", after=force)
    spy(jsrl.Gate, "explores", after=lambda turn, *_: steps[-1].update(explores=turn) or turn)
    spy(jsrl.Gate, "next_level", before=lambda gate: begun.append(copy.deepcopy(parts["explorer"].actor)))
    for kind in (jsrl.Agent, jsrl.Explorer):
        spy(kind, "act", before=lambda self, obs, t=0, noise=0.0: steps[-1].update(
            by=self, noise=noise, held=same(self.actor, begun[-1]) if noise else True))  # fmt: skip
    spy(jsrl, "run_updates", before=learn)
    spy(jsrl, "evaluate", before=compare)
    spy(jsrl.ReplayBuffer, "add", before=lambda *_: steps[-1].update(lead=lead(), warm=parts["gate"].warm),
        after=lambda *_: steps.append({}))  # fmt: skip
    jsrl.train(jsrl.Args(**toy_args | {"warmup_steps": 40, "online_steps": 400, "eval_episodes": 1}))

    taken, evaluated = ([step for step in steps if key in step] for key in ("lead", "deployed"))
    assert len(taken) == 400
    for step in taken:
        assert (step["by"] is step["lead"], step["noise"]) == ((False, 1.0) if step["explores"] else (True, 0.0))
        assert step["by"] is not parts["explorer"] and step["held"]  # a copy of it, made when the episode began
        assert step.get("share") == (0.5 if step["warm"] else None) and step.get("anchored", True)
    assert {step["lead"] for step in taken} == {parts["guide"], parts["proven"]}
    assert {step["explores"] for step in taken} == {step["warm"] for step in taken} == {True, False}
    assert steps[events["copied"]]["copied"] and not steps[events["copied"]]["promoted"]
    after = steps[events["judged"]]
    assert after["promoted"] and after["first"] == (outcome == -1)  # a copy that was dropped cannot be deployed later
    assert len(evaluated) > 5 and all(step["deployed"] for step in evaluated)


@pytest.mark.parametrize("kind", ["open", "random", "curriculum"])
def test_without_bounds_the_explorer_is_deployed_as_it_is(toy_args, monkeypatch, kind):
    parts, actions, start, evaluate = {}, [], jsrl.Run.start, jsrl.evaluate

    def keep(run, task, **given):
        parts.update(given)
        start(run, task, **given)

    def compare(act, *rest):
        if isinstance(act, partial) and parts["gate"].level:  # the deployed policy, at the end of an episode
            obs = np.ones(2, np.float32)
            actions.append([act(obs, 10_000), *(parts[name].act(obs) for name in ("explorer", "guide"))])
        return evaluate(act, *rest)

    monkeypatch.setattr(jsrl.Run, "start", keep)
    monkeypatch.setattr(jsrl, "evaluate", compare)
    jsrl.train(jsrl.Args(**toy_args | {"warmup_steps": 40, "online_steps": 400, "gate": kind}))
    assert actions and all(np.array_equal(deployed, explorer) for deployed, explorer, _ in actions)
    assert not np.array_equal(*actions[-1][1:]), "the explorer has not learned"


@pytest.mark.parametrize(
    ("options", "anchor"),
    [
        ({"gate": "closed"}, 0.4),
        ({"gate": "open"}, 0.05),
        ({"gate": "open", "anchor_open": 0.0}, 0.0),
        ({"gate": "curriculum", "switch": "random"}, None),
        ({"gate": "random", "estimator": "returns"}, None),
        ({"explorer": "iql"}, None),
        ({"warm_start": False}, 0.0),
    ],
    ids=str,
)
def test_variants_run(toy_args, options, anchor):
    folder = Path(toy_args["run_dir"])
    summary = jsrl.train(jsrl.Args(**toy_args | {"warmup_steps": 40, "online_steps": 240} | options))
    content = torch.load(next(folder.glob("*/online.pt")), weights_only=True)
    assert math.isfinite(summary["final_score"]) and content["gate"]["warm"]
    assert set(content) >= {"guide", "explorer", "proven", "gate"}  # what is deployed is made of these
    if options.get("gate") == "closed":
        assert content["gate"]["level"] == 0 and summary["drop"] == 0
    if anchor is not None:
        assert float(content["explorer"]["anchor"]) == pytest.approx(anchor)
