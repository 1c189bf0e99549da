"""Tasks and data: which dataset a name means, how it is read, what becomes of it, where it comes from."""

import http.server
import importlib
import os
import re
import shutil
import socket
import threading
import time
import urllib.error
import warnings
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import OFFICIAL_HDF5, ROOT, TOY_ID, record, rollout
from minari.data_collector import EpisodeBuffer
from toy_env import BARE, TOY_GOAL, ToyEnv

import iql_finetune as iql

HOPPER = gym.make("Hopper-v4")
GAMMA = 0.9


def make_args(**kwargs):
    return iql.Args(**{"dataset": "official", "cuda": False, "gamma": GAMMA} | kwargs)


# ---- D4RL HDF5 ----


def hopper_episodes(*ends: str, length: int = 4, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Made-up episodes; each ends with "terminal", "timeout" or, where the file ends, with "nothing"."""
    rng, episodes = np.random.default_rng(seed), []
    for end in ends:
        flag = np.arange(length) == length - 1
        obs = rng.normal(size=(length + 1, 11)).astype(np.float32)
        episodes.append({
            "observations": obs[:-1], "next_observations": obs[1:],
            "actions": rng.uniform(-1, 1, (length, 3)).astype(np.float32),
            "rewards": rng.uniform(0, 1, length).astype(np.float32),
            "terminals": flag & (end == "terminal"), "timeouts": flag & (end == "timeout"),
        })  # fmt: skip
    return episodes


def write_hdf5(path: Path, episodes: list[dict[str, np.ndarray]], without=()) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key in episodes[0]:
            if key not in without:
                file[key] = np.concatenate([episode[key] for episode in episodes])
    return path


def hopper_task(episodes: list[dict[str, np.ndarray]], without=(), **kwargs):
    """The task made of a file where D4RL's hopper-medium is looked for."""
    path = write_hdf5(Path(os.environ["D4RL_DATASET_DIR"], "hopper_medium-v2.hdf5"), episodes, without)
    task = iql.load_task(make_args(env_id="hopper-medium", reward_scale=1.0, **kwargs))
    path.unlink()
    return task


def local_hopper(*ends: str, without=(), **kwargs):
    """The data of such a task, and its file's content."""
    episodes = hopper_episodes(*ends, **kwargs)
    task = hopper_task(episodes, without)
    return task.data, {key: np.concatenate([episode[key] for episode in episodes]) for key in episodes[0]}


def discounted(rewards) -> list[float]:
    total, found = 0.0, []
    for reward in reversed(list(rewards)):
        total = float(reward) + GAMMA * total
        found.insert(0, total)
    return found


def test_hdf5_with_next_observations_keeps_every_transition():
    data, file = local_hopper("terminal", "timeout", "nothing")
    np.testing.assert_array_equal(data["obs"], file["observations"])
    np.testing.assert_array_equal(data["next_obs"], file["next_observations"])
    np.testing.assert_allclose(data["action"], file["actions"], atol=2e-5)
    np.testing.assert_array_equal(data["reward"], file["rewards"])
    assert np.flatnonzero(data["terminated"]).tolist() == [3]
    assert np.flatnonzero(data["truncated"]).tolist() == [7, 11]
    expected = [value for start in (0, 4, 8) for value in discounted(file["rewards"][start : start + 4])]
    np.testing.assert_allclose(data["return_to_go"], expected, rtol=1e-5)
    assert {value.dtype for value in data.values()} == {np.dtype(np.float32)}


def test_hdf5_without_next_observations_drops_what_cannot_be_known():
    data, file = local_hopper("terminal", "timeout", "nothing", without=["next_observations"])
    kept = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]  # not 7, cut by its time limit, nor 11, where the file ends
    np.testing.assert_array_equal(data["obs"], file["observations"][kept])
    ongoing = [i for i, row in enumerate(kept) if row != 3]
    true_next = file["next_observations"][kept]
    np.testing.assert_array_equal(data["next_obs"][ongoing], true_next[ongoing])
    assert np.flatnonzero(data["terminated"]).tolist() == [3]
    expected = [value for start in (0, 4, 8) for value in discounted(file["rewards"][start : start + 4])]
    np.testing.assert_allclose(data["return_to_go"], np.array(expected)[kept], rtol=1e-5)


@pytest.mark.parametrize("without", [[], ["next_observations"]])
def test_episodes_are_counted_whose_last_transition_is_not_known_too(without):
    episodes = hopper_episodes("timeout", "timeout", "terminal", "nothing")
    assert hopper_task(episodes, without).episodes == 4


def test_a_constant_of_float32_is_normalised_to_nothing():
    episode = hopper_episodes("timeout", length=1000)[0]
    episodes = [
        episode | {key: np.full_like(episode[key], 12.3) for key in ("observations", "next_observations")}
    ] * 300
    task = hopper_task(episodes, normalize_obs=True)
    np.testing.assert_allclose(task.data["obs"], 0, atol=1e-6)
    np.testing.assert_allclose(task.obs_std, 1e-3, atol=1e-6)


def test_nothing_is_bootstrapped_across_episodes():
    """Whatever is not terminal has the observation of its own episode's next step as its next observation."""
    for without in ([], ["next_observations"]):
        data, file = local_hopper("terminal", "timeout", "timeout", "terminal", "nothing", without=without)
        truth = {obs.tobytes(): next_obs for obs, next_obs in zip(*both(file), strict=True)}
        assert len(data["obs"]) == (20 if not without else 17)
        for obs, next_obs, terminated in zip(data["obs"], data["next_obs"], data["terminated"], strict=True):
            if not terminated:
                np.testing.assert_array_equal(next_obs, truth[obs.tobytes()])


def both(file):
    return file["observations"], file["next_observations"]


def test_hdf5_without_timeouts_counts_the_steps(tmp_path):
    episodes = hopper_episodes("timeout", "terminal", "timeout", "nothing", length=5)
    path = write_hdf5(tmp_path / "a.hdf5", episodes, ["timeouts"])
    data = iql.read_hdf5(path, max_episode_steps=5)
    assert np.flatnonzero(data["truncated"]).tolist() == [4, 14, 19]
    assert np.flatnonzero(data["terminated"]).tolist() == [9], "terminal at the limit is terminated, not truncated"
    assert data["known"].all()
    path = write_hdf5(tmp_path / "b.hdf5", episodes, ["timeouts", "next_observations"])
    assert np.flatnonzero(~iql.read_hdf5(path, 5)["known"]).tolist() == [4, 14, 19]


def test_a_flag_on_both_counts_as_terminated(tmp_path):
    episodes = hopper_episodes("terminal", "terminal")
    episodes[0]["timeouts"] = episodes[0]["terminals"]
    data = iql.read_hdf5(write_hdf5(tmp_path / "a.hdf5", episodes), 1000)
    assert not data["truncated"].any() and data["terminated"].sum() == 2 and data["known"].all()


def test_actions_are_clipped_away_from_the_bounds():
    episodes = hopper_episodes("terminal")
    episodes[0]["actions"][:3] = [[1.0], [-1.0], [1.7]]
    write_hdf5(Path(os.environ["D4RL_DATASET_DIR"], "hopper_medium-v2.hdf5"), episodes)
    action = iql.load_task(make_args(env_id="hopper-medium", reward_scale=1.0)).data["action"]
    bound = np.float32(1 - 1e-5)
    assert action[:3].tolist() == [[bound] * 3, [-bound] * 3, [bound] * 3]
    assert np.isfinite(np.arctanh(action)).all()


def test_startup_line(capsys):
    _, file = local_hopper("terminal", "timeout", "nothing")
    returns = file["rewards"].reshape(3, 4).sum(1)
    line = next(line for line in capsys.readouterr().out.splitlines() if "hopper-medium-v2" in line)
    score = 100 * (returns.mean() + 20.272305) / (3234.3 + 20.272305)
    for part in ("12 transitions", "3 episodes", "1 terminated", "2 truncated", f"{returns.mean():.1f}"):
        assert part in line
    for part in (f"min {returns.min():.1f}", f"max {returns.max():.1f}"):
        assert part in line
    assert re.search(rf"normalised\D*{score:.1f}", line)


def test_own_hdf5_file(tmp_path):
    path = write_hdf5(tmp_path / "mine.hdf5", hopper_episodes("terminal", "nothing"))
    task = iql.load_task(make_args(env_id=str(path), eval_env="Hopper-v5"))
    assert task.dataset_id == "mine" and task.env_spec.id == "Hopper-v5" and task.domain == "locomotion"
    assert task.score(3234.3) == pytest.approx(100) and task.score(-20.272305) == pytest.approx(0)


def test_hdf5_folder_is_home_unless_said_otherwise(tmp_path, monkeypatch):
    path = write_hdf5(Path(os.environ["D4RL_DATASET_DIR"], "hopper_medium-v2.hdf5"), hopper_episodes("terminal"))
    assert iql.find_dataset(make_args(env_id="hopper-medium")) == ("hopper-medium-v2", path, "hopper")
    monkeypatch.delenv("D4RL_DATASET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".d4rl/datasets/hopper_medium-v2.hdf5"
    home.parent.mkdir(parents=True)
    path.rename(home)
    assert iql.find_dataset(make_args(env_id="hopper-medium"))[1] == home


# Mean return of D4RL's -v2 datasets, as published with them.
MEANS = {
    "hopper-random": 18.40, "hopper-medium": 1422.06, "hopper-expert": 3511.36, "hopper-medium-expert": 2089.88,
    "walker2d-random": 1.87, "walker2d-medium": 2852.09, "walker2d-expert": 4920.51, "walker2d-medium-expert": 3796.57,
    "halfcheetah-random": -288.80, "halfcheetah-medium": 4770.34, "halfcheetah-expert": 10656.43,
    "halfcheetah-medium-expert": 7713.38,
}  # fmt: skip


@pytest.mark.parametrize("name", MEANS)
def test_mean_return_of_the_official_file(name, monkeypatch):
    file = OFFICIAL_HDF5 / f"{name.replace('-', '_')}-v2.hdf5"
    if not file.exists():
        pytest.skip(f"no {file}")
    monkeypatch.setenv("D4RL_DATASET_DIR", str(OFFICIAL_HDF5))
    data = iql.load_task(make_args(env_id=name, reward_scale=1.0)).data
    episodes = data["terminated"].sum() + data["truncated"].sum()
    assert data["reward"].sum(dtype=np.float64) / episodes == pytest.approx(MEANS[name], rel=1e-3, abs=0.01)


# ---- Minari ----


def episode(obs, action, reward, terminated: bool, truncated: bool) -> EpisodeBuffer:
    """Flags of the last step only."""
    last = [i == len(reward) - 1 for i in range(len(reward))]
    flags = [terminated and x for x in last], [truncated and x for x in last]
    return EpisodeBuffer(None, None, None, obs, np.array(action, np.float32), list(map(float, reward)), *flags)


def test_minari_flat_observations():
    task = iql.load_task(make_args(env_id=TOY_ID, reward_scale=1.0))
    data, episodes, row = task.data, list(minari.load_dataset(TOY_ID).iterate_episodes()), 0
    ends = []
    for recorded in episodes:
        n = len(recorded.rewards)
        rows = slice(row, row + n)
        np.testing.assert_array_equal(data["obs"][rows], recorded.observations[:-1])
        np.testing.assert_array_equal(data["next_obs"][rows], recorded.observations[1:])
        np.testing.assert_allclose(data["action"][rows], recorded.actions / 2, atol=2e-5)  # from [-2, 2] to [-1, 1]
        np.testing.assert_allclose(data["reward"][rows], recorded.rewards, rtol=1e-6)
        np.testing.assert_allclose(data["return_to_go"][rows], discounted(recorded.rewards), rtol=1e-5)
        ends.append((bool(data["terminated"][row + n - 1]), bool(data["truncated"][row + n - 1])))
        row += n
    assert row == len(data["obs"])
    assert ends == [(bool(e.terminations[-1]), bool(e.truncations[-1])) for e in episodes]
    assert (True, False) in ends and (False, True) in ends
    assert data["terminated"].sum() + data["truncated"].sum() == len(episodes)
    assert np.array_equal(data["terminated"].astype(bool), ToyEnv.terminated(data["next_obs"]))


def test_minari_episode_that_ends_in_the_middle_is_truncated():
    spec = gym.spec("Hopper-v4")
    obs = np.random.default_rng(0).normal(size=(6, 11))
    parts = [
        episode(obs[:4], np.zeros((3, 3)), [1, 2, 3], False, False),
        episode(obs, np.zeros((5, 3)), [1] * 5, True, False),
    ]
    record("x/hopper/cut-v0", spec, parts)
    data = iql.load_task(make_args(env_id="x/hopper/cut-v0", reward_scale=1.0)).data
    assert np.flatnonzero(data["truncated"]).tolist() == [2] and np.flatnonzero(data["terminated"]).tolist() == [7]
    np.testing.assert_allclose(data["return_to_go"][:3], discounted([1, 2, 3]), rtol=1e-6)


def goal_dataset(name: str = "toy/pointmaze/mini-v0") -> None:
    """An episode that reaches its goal at the third step and stays; one that never does; one cut on the way back."""

    def obs(xs):
        n = len(xs)
        return {
            "observation": np.full((n, 1), 7.0),
            "achieved_goal": np.array(xs)[:, None],
            "desired_goal": np.ones((n, 1)),
        }

    record(name, TOY_GOAL, [
        episode(obs([0.0, 0.4, 0.8, 1.0, 1.0]), np.ones((4, 1)), [0, 0, 1, 1], False, True),
        episode(obs([0.0, -0.1, -0.2, -0.3]), -np.ones((3, 1)), [0, 0, 0], False, True),
        episode(obs([0.0, 1.0, 0.4]), np.ones((2, 1)), [1, 0], False, True),
    ])  # fmt: skip


def test_goal_observations_are_concatenated():
    goal_dataset()
    task = iql.load_task(make_args(env_id="toy/pointmaze/mini-v0"))
    assert np.allclose(task.data["obs"][:2], [[0.0, 7, 1], [0.4, 7, 1]])
    assert np.allclose(task.data["next_obs"][2], [1.0, 7, 1])
    assert task.make_env().reset(seed=0)[0].tolist() == [0.0, 0.0, 1.0]


def test_goal_tasks_end_at_the_goal(capsys):
    goal_dataset()
    args = make_args(env_id="toy/pointmaze/mini-v0")
    data = iql.load_task(args).data
    assert (args.reward_scale, args.reward_bias) == (1.0, -1.0)
    assert data["reward"].tolist() == [-1, -1, 0, -1, -1, -1, 0], "what comes after the goal is left out"
    assert np.flatnonzero(data["terminated"]).tolist() == [2, 6] and np.flatnonzero(data["truncated"]).tolist() == [5]
    expected = [-1 - GAMMA, -1, 0, *[-1 / (1 - GAMMA)] * 3, 0]
    np.testing.assert_allclose(data["return_to_go"], expected, rtol=1e-5)
    line = r"7 transitions, 3 episodes \(2 terminated, 1 truncated\).*max 1\.0.*normalised\D*66\.7"
    assert re.search(line, capsys.readouterr().out)


def test_a_goal_is_kept_where_a_file_without_next_observations_cuts_its_episodes(tmp_path):
    rng, reached = np.random.default_rng(0), np.arange(12) % 4 == 3
    with h5py.File(tmp_path / "maze.hdf5", "w") as file:
        file["observations"], file["actions"] = rng.normal(size=(12, 8)), rng.uniform(-1, 1, (12, 2))
        file["rewards"], file["terminals"], file["timeouts"] = reached.astype(float), np.zeros(12, bool), reached
    data = iql.load_task(make_args(env_id=str(tmp_path / "maze.hdf5"), eval_env="PointMaze_UMaze-v3")).data
    assert data["terminated"].tolist() == reached.tolist() and not data["truncated"].any()


def test_pointmaze_episodes_begin_with_their_own_goal():
    """Minari's are cut from one run: the first observation has the goal that was just reached (its issue 265)."""
    goals = np.array([0.0, 1.0, 1.0])[:, None]
    obs = {"observation": np.zeros((3, 1)), "achieved_goal": np.array([0.0, 0.5, 1.0])[:, None], "desired_goal": goals}
    record("toy/pointmaze/cut-v0", TOY_GOAL, [episode(obs, np.ones((2, 1)), [0, 1], False, True)])
    data = iql.load_task(make_args(env_id="toy/pointmaze/cut-v0")).data
    assert data["obs"].tolist() == [[0, 0, 1], [0.5, 0, 1]] and data["next_obs"][:, 2].tolist() == [1, 1]


U = [[1, 1, 1, 1, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]]
NAMED = [[1, 1, 1, 1, 1], [1, 0, 0, "r", 1], [1, 0, 1, 1, 1], [1, 0, 0, "g", 1], [1, 1, 1, 1, 1]]


def with_goals(maze: list, start: tuple, goal: tuple) -> list:
    maze = [list(row) for row in maze]
    maze[start[0]][start[1]], maze[goal[0]][goal[1]] = "r", "g"
    return maze


@pytest.mark.parametrize("of_data, named, found", [
    (U, NAMED, with_goals(U, (1, 1), (3, 1))),  # Minari's umaze-diverse: mirrored, start and goal with the maze
    (with_goals(U, (3, 1), (1, 1)), NAMED, with_goals(U, (3, 1), (1, 1))),  # its umaze: the goal of the data
    (U, with_goals(U, (1, 1), (3, 3)), with_goals(U, (1, 1), (3, 3))),  # the same walls: as named
])  # fmt: skip
def test_a_mirrored_maze_is_turned_to_that_of_the_data(of_data, named, found):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env, other = (gym.make("PointMaze_UMaze-v3", max_episode_steps=5, maze_map=maze) for maze in (of_data, named))
        env.action_space.seed(0)
        episodes = rollout(env, lambda obs: env.action_space.sample(), 2)
        record("D4RL/pointmaze/umaze-v2", env.spec, episodes, eval_env=other.spec)
    task = iql.load_task(make_args(env_id="pointmaze-umaze"))
    world = task.make_env()
    assert world.spec.kwargs["maze_map"] == found
    obs, _ = world.reset(seed=0)
    maze, (row, column) = world.unwrapped.maze, np.argwhere(np.array(found) == "g")[0]
    assert tuple(maze.cell_xy_to_rowcol(obs[6:])) == (row, column), "its goal is where its map has it"


def test_evaluation_environment_of_a_dataset_that_names_no_other():
    parts = [episode(np.zeros((3, 11)), np.zeros((2, 3)), [1, 2], False, True)]
    spaces = {"observation_space": HOPPER.observation_space, "action_space": HOPPER.action_space}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers("x/hopper/only-v0", parts, env=None, eval_env="Hopper-v4", **spaces)
    assert iql.load_task(make_args(env_id="x/hopper/only-v0", reward_scale=1.0)).env_spec.id == "Hopper-v4"


def test_environment_without_render_mode():
    rng = np.random.default_rng(0)
    obs, action = rng.uniform(-1, 1, (6, 2)).astype(np.float32), np.zeros((5, 2))
    record("x/bare/some-v0", BARE, [episode(obs, action, [reward] * 5, False, True) for reward in (1, 2)])
    task = iql.load_task(make_args(env_id="x/bare/some-v0"))
    obs, _ = task.make_env().reset(seed=0)
    assert obs.shape == (2,) and obs.dtype == np.float32


# ---- reference scores and transforms ----


def test_reference_scores_are_our_table_or_the_datasets_own(capsys):
    toy = iql.load_task(make_args(env_id=TOY_ID))
    own = minari.load_dataset(TOY_ID).storage.metadata
    assert (toy.ref_min, toy.ref_max) == (own["ref_min_score"], own["ref_max_score"])

    obs = np.zeros((3, 11))
    parts = [episode(obs, np.zeros((2, 3)), [1, 2], True, False), episode(obs, np.zeros((2, 3)), [5, 6], True, False)]
    record("x/hopper/own-v0", HOPPER.spec, parts, ref_min_score=1.0, ref_max_score=2.0)
    hopper = iql.load_task(make_args(env_id="x/hopper/own-v0"))
    assert (hopper.ref_min, hopper.ref_max) == (-20.272305, 3234.3)
    assert "no reference scores" not in capsys.readouterr().out

    record("x/unheard/of-v0", HOPPER.spec, parts)
    unheard = iql.load_task(make_args(env_id="x/unheard/of-v0"))
    assert (unheard.ref_min, unheard.ref_max) == (3.0, 11.0)
    assert "x/unheard/of-v0 has no reference scores" in capsys.readouterr().out
    assert unheard.score(11.0) == 100 and unheard.score(3.0) == 0


def test_domain_values_fill_only_what_is_none(capsys):
    args = make_args(env_id=TOY_ID, beta=7.0, reward_bias=0.25)
    task = iql.load_task(args)
    assert (args.beta, args.expectile, args.reward_bias, args.normalize_obs) == (7.0, 0.7, 0.25, False)
    returns = [e.rewards.sum() for e in minari.load_dataset(TOY_ID).iterate_episodes()]
    assert args.reward_scale == pytest.approx(1000 / np.ptp(returns), rel=1e-5)
    assert task.transform_reward(2.0) == pytest.approx(2 * args.reward_scale + 0.25)


@pytest.mark.parametrize("script, names", [("jsrl_gated", ("anchor", "anchor_open")), ("sft_reset", ("hold",))])
def test_on_goal_tasks_the_learner_is_held_by_a_tenth(script, names):
    values = importlib.import_module(script).Args.domain_values
    for domain, own in values.items():
        share, resolved = 0.1 if domain in iql.GOAL_DOMAINS else 1, values["any"] | own
        assert [resolved[name] for name in names] == pytest.approx([share * values["any"][name] for name in names])


@pytest.mark.parametrize("normalize", [False, True])
def test_one_transform_for_dataset_and_online_transitions(toy_args, normalize):
    """The toy's rewards follow from its next observations, so that every row of the buffer can be checked."""
    own = {"reward_scale": 2.0, "reward_bias": -0.5, "normalize_obs": normalize, "gamma": GAMMA}
    args = iql.Args(**toy_args | own)
    iql.train(args)
    task = iql.load_task(args)
    saved = torch.load(Path(args.run_dir, "o2o_toy_medium-v0__iql_finetune__1", "checkpoint.pt"), weights_only=True)
    columns = torch.split(saved["buffer"]["online"], [2, 2, 2, 1, 1, 1], 1)
    online = dict(zip(("obs", "action", "next_obs", "reward", "terminated"), map(np.asarray, columns[:5]), strict=True))
    assert len(online["obs"]) == args.online_steps
    raw = np.concatenate([e.observations[:-1] for e in minari.load_dataset(TOY_ID).iterate_episodes()])
    mean, std = (raw.mean(0), raw.std(0) + 1e-3) if normalize else (0, 1)
    np.testing.assert_allclose(task.data["obs"], (raw - mean) / std, atol=1e-5)
    for rows in (task.data, online):
        obs, next_obs = (rows[key] * std + mean for key in ("obs", "next_obs"))
        np.testing.assert_allclose(rows["reward"].ravel(), 2 * ToyEnv.reward(next_obs) - 0.5, atol=1e-4)
        assert np.array_equal(rows["terminated"].ravel() == 1, ToyEnv.terminated(next_obs))
        assert np.abs(rows["action"]).max() <= 1
        inner = np.abs(next_obs - obs - 0.2 * rows["action"]).max()  # [-1, 1] here is [-2, 2] there
        assert inner < 1e-4
    ended = online["terminated"].ravel()[:-1] == 1
    follows = (online["next_obs"][:-1] == online["obs"][1:]).all(1)
    assert not (ended & follows).any()
    cut = np.flatnonzero(~ended & ~follows)
    starts = np.append(0, np.flatnonzero(~follows) + 1)
    lengths = dict(zip(starts[1:] - 1, np.diff(starts), strict=True))
    assert all(lengths[i] == 50 for i in cut), "an episode that neither ended nor reached its time limit"


def test_kitchen_counts_each_subtask_once_in_episodes_as_long_as_d4rls(capsys):
    """Minari's pays all subtasks that are solved, in every step, for up to 450 steps. Learned from are its rewards."""
    subtasks = ["microwave", "kettle", "light switch", "slide cabinet"]
    flags = {"remove_task_when_completed": False, "terminate_on_tasks_completed": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = gym.make("FrankaKitchen-v1", max_episode_steps=450, tasks_to_complete=subtasks, **flags)
        real = gym.make(spec := real.spec, max_episode_steps=4)
        episodes = rollout(real, lambda obs: np.zeros(9), 2)
        episodes[0].rewards[:], episodes[1].rewards[:] = [0.0, 1.0, 2.0, 2.0], [0.0, 1.0, 1.0, 0.0]
        record("D4RL/kitchen/partial-v2", spec, episodes)
    args = make_args(env_id="kitchen-partial", eval_episodes=1)
    task = iql.load_task(args)
    assert "return mean 1.5, min 1.0, max 2.0, normalised mean 37.5" in capsys.readouterr().out
    assert (task.env_spec.max_episode_steps, task.return_range) == (280, 4.0)
    assert task.data["reward"].tolist() == [0, 1, 2, 2, 0, 1, 1, 0]
    np.testing.assert_allclose(task.data["return_to_go"], [17.1, 19, 20, 20, 1.71, 1.9, 1, 0], rtol=1e-6)

    env, position = task.make_env(), {"microwave": 22, "slide cabinet": 19}

    def solve(obs, t):
        for subtask, index in position.items():
            if t == index:  # any two different steps
                env.unwrapped.data.qpos[index] = real.unwrapped.goal[subtask][0]
        return np.zeros(9)

    (obs, _), steps = env.reset(seed=0), []
    for t in range(25):
        obs, reward, *_, info = env.step(solve(obs, t))
        steps.append((reward, info["gain"]))
    assert steps == [(0, 0)] * 19 + [(1, 1), (1, 0), (1, 0), (2, 1), (2, 0), (2, 0)]
    assert iql.evaluate(solve, env, task, args) == {"return": 2.0, "normalized_score": 50.0}


def test_a_dropped_pen_ends_the_episode_as_in_d4rl():
    """In Gymnasium-Robotics it lies there and costs 5 a step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        real = gym.make("AdroitHandPen-v1", max_episode_steps=60)
        rng = np.random.default_rng(0)
        episodes = rollout(real, lambda obs: rng.uniform(-1, 1, 24).astype(np.float32), 4)
        record("D4RL/pen/human-v2", real.spec, episodes)
    heights = [recorded.observations[1:, 26] for recorded in episodes]
    lengths = [int(np.argmax(height < 0.075)) + 1 if (height < 0.075).any() else 60 for height in heights]
    assert min(lengths) < 60, "none was dropped"
    task = iql.load_task(make_args(env_id="pen-human"))
    assert len(task.data["obs"]) == sum(lengths) and task.episodes == 4
    ends = np.cumsum(lengths) - 1
    assert np.flatnonzero(task.data["terminated"]).tolist() == [e for e, n in zip(ends, lengths, strict=True) if n < 60]
    assert np.flatnonzero(task.data["truncated"]).tolist() == [e for e, n in zip(ends, lengths, strict=True) if n == 60]
    i = int(np.argmin(lengths))
    env, actions = task.make_env(), np.clip(episodes[i].actions, -1 + 1e-5, 1 - 1e-5)
    env.reset(seed=i)
    steps = [env.step(action)[2:4] for action in actions[: lengths[i]]]
    assert steps == [(False, False)] * (lengths[i] - 1) + [(True, False)]


# ---- names ----

LOCOMOTION_KINDS = ["random", "medium", "expert", "medium-replay", "medium-expert", "full-replay"]
DOCUMENTED = {
    f"{env}-{kind}": f"{env}-{kind}-v2" for env in ("hopper", "walker2d", "halfcheetah") for kind in LOCOMOTION_KINDS
}
DOCUMENTED |= {f"antmaze-{kind}": f"D4RL/antmaze/{kind}-v1" for kind in (
    "umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse")}  # fmt: skip
DOCUMENTED |= {f"pointmaze-{kind}": f"D4RL/pointmaze/{kind}-v2" for kind in ("umaze", "medium", "large", "open")}
DOCUMENTED |= {f"{env}-{kind}": f"D4RL/{env}/{kind}-v2" for env in ("pen", "hammer", "door", "relocate")
               for kind in ("human", "cloned", "expert")}  # fmt: skip
DOCUMENTED |= {f"kitchen-{kind}": f"D4RL/kitchen/{kind}-v2" for kind in ("complete", "partial", "mixed")}


def test_every_name_resolves_to_the_documented_dataset(monkeypatch):
    fetched = []
    monkeypatch.setattr(iql, "download", lambda dataset_id, path: fetched.append((dataset_id, path)))
    assert iql.TASKS == DOCUMENTED
    for name, dataset_id in DOCUMENTED.items():
        found, path, env = iql.find_dataset(make_args(env_id=name))
        folder = os.environ["MINARI_DATASETS_PATH" if "/" in dataset_id else "D4RL_DATASET_DIR"]
        assert found == dataset_id and env == name.split("-")[0]
        file = name.replace("-", "_") + "-v2.hdf5"  # on the server and in d4rl's own folder
        assert path == Path(folder, dataset_id if "/" in dataset_id else file)
        assert fetched.pop() == (dataset_id, path)
    assert iql.find_dataset(make_args(env_id="hopper-medium-v2"))[0] == "hopper-medium-v2"
    assert iql.find_dataset(make_args(env_id="mujoco/hopper/medium-v0"))[::2] == ("mujoco/hopper/medium-v0", "hopper")


@pytest.mark.parametrize("eval_env, env", [
    ("Hopper-v4", "hopper"), ("AdroitHandPen-v1", "pen"), ("PointMaze_UMaze-v3", "pointmaze"),
    ("AntMaze_Medium_Diverse_GR-v4", "antmaze"), ("FrankaKitchen-v1", "kitchen"),
])  # fmt: skip
def test_a_file_is_of_the_domain_of_its_environment(tmp_path, eval_env, env):
    path = write_hdf5(tmp_path / "mine.hdf5", hopper_episodes("terminal"))
    assert iql.find_dataset(make_args(env_id=str(path), eval_env=eval_env)) == ("mine", path, env)


def test_table_of_reference_scores():
    """As D4RL's infos.py and Minari's metadata have them."""
    assert {env: row[1:3] for env, row in iql.ENVS.items()} == {
        "halfcheetah": (-280.178953, 12135.0), "hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3),
        "antmaze": (0.0, 1.0), "pointmaze": (0.0, 1.0), "pen": (96.262799, 3076.8331017826877),
        "hammer": (-274.856578, 12794.134825156867), "door": (-56.512833, 2880.5693087298737),
        "relocate": (-6.425911, 4233.877797728884), "kitchen": (0.0, 4.0),
    }  # fmt: skip


# ---- every family, in its real environment ----


def minari_family(name: str, env_id: str, limit: int = 12, **kwargs) -> None:
    """Some random steps in the real environment, under the official id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make(env_id, max_episode_steps=limit, **kwargs)
        env.action_space.seed(0)
        episodes = rollout(env, lambda obs: env.action_space.sample(), 3)
        record(DOCUMENTED[name], env.spec, episodes)


def survives(toy_args: dict, name: str, obs_dim: int, action_dim: int, domain: str) -> dict:
    args = iql.Args(
        **toy_args | {"env_id": name, "offline_steps": 3, "online_steps": 15, "eval_episodes": 1, "eval_every": 15}
    )
    summary = iql.train(args)
    task = iql.load_task(args)
    assert task.domain == domain
    d4rl = {"pen": 100, "hammer": 200, "door": 200, "relocate": 200, "kitchen": 280}  # its hands' and kitchen's limits
    assert task.env_spec.max_episode_steps == d4rl.get(name.split("-")[0], 12 if "/" in DOCUMENTED[name] else 1_000)
    assert task.data["obs"].shape[1] == obs_dim and task.data["action"].shape[1] == action_dim
    assert np.isfinite(list(task.data["obs"][0])).all() and np.abs(task.data["action"]).max() < 1
    obs, _ = task.make_env().reset(seed=0)
    assert obs.shape == (obs_dim,) and obs.dtype == np.float32
    assert None not in [getattr(args, key) for key in args.domain_values["any"] | args.domain_values[domain]]
    assert summary["dataset_id"] == DOCUMENTED[name] and np.isfinite(summary["final_score"])
    return summary


@pytest.mark.parametrize("env, obs_dim, action_dim", [("hopper", 11, 3), ("walker2d", 17, 6), ("halfcheetah", 17, 6)])
def test_locomotion_family(toy_args, env, obs_dim, action_dim):
    real = gym.make(
        {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}[env], max_episode_steps=12
    )
    real.action_space.seed(0)
    parts = []
    for e in rollout(real, lambda obs: real.action_space.sample(), 4):
        parts.append({
            "observations": e.observations[:-1], "next_observations": e.observations[1:], "actions": e.actions,
            "rewards": np.array(e.rewards), "terminals": np.array(e.terminations), "timeouts": np.array(e.truncations),
        })  # fmt: skip
    write_hdf5(Path(os.environ["D4RL_DATASET_DIR"], f"{env}_medium-v2.hdf5"), parts)
    survives(toy_args, f"{env}-medium", obs_dim, action_dim, "locomotion")


@pytest.mark.parametrize("name, env_id, obs_dim, action_dim", [
    ("pointmaze-umaze", "PointMaze_UMaze-v3", 8, 2), ("antmaze-umaze", "AntMaze_UMaze-v4", 31, 8),
    ("pen-human", "AdroitHandPen-v1", 45, 24), ("door-human", "AdroitHandDoor-v1", 39, 28),
    ("hammer-cloned", "AdroitHandHammer-v1", 46, 26), ("relocate-expert", "AdroitHandRelocate-v1", 39, 30),
    ("kitchen-complete", "FrankaKitchen-v1", 59, 9),
])  # fmt: skip
def test_minari_family(toy_args, name, env_id, obs_dim, action_dim):
    minari_family(name, env_id)
    domain = iql.ENVS[name.split("-")[0]][0]
    summary = survives(toy_args, name, obs_dim, action_dim, domain)
    if domain in ("antmaze", "pointmaze"):
        assert summary["final_score"] in (0.0, 100.0)


def test_real_pointmaze_success_is_the_score():
    """Straight to the goal in the open maze: every episode succeeds; standing still, none does."""
    minari_family("pointmaze-open", "PointMaze_Open-v3", limit=300)
    args = make_args(env_id="pointmaze-open", eval_episodes=2)
    task = iql.load_task(args)

    def straight(obs, t):
        achieved, velocity, goal = obs[:2], obs[4:6], obs[6:]
        return np.clip(10 * (goal - achieved) - 2 * velocity, -1, 1)

    env = task.make_env()
    assert iql.evaluate(straight, env, task, args) == {"return": 1.0, "normalized_score": 100.0}
    away = {"return": 0.0, "normalized_score": 0.0}
    assert iql.evaluate(lambda obs, t: np.clip(-10 * (obs[6:] - obs[:2]), -1, 1), env, task, args) == away


# ---- download and stand-ins ----


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with `content`, of which it sends no more than `limit` bytes."""

    content, limit = b"", None

    def do_GET(self):
        self.send_response(200 if self.path.endswith("hopper_medium-v2.hdf5") else 404)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: self.limit])

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    path = write_hdf5(tmp_path / "served.hdf5", hopper_episodes(*["terminal"] * 200))
    Server.content, Server.limit = path.read_bytes(), None
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    monkeypatch.setattr(iql, "HDF5_URL", f"http://127.0.0.1:{httpd.server_port}/")
    yield Server
    httpd.shutdown()
    httpd.server_close()


def test_download_arrives_whole_and_is_kept(server, capfd):
    folder = Path(os.environ["D4RL_DATASET_DIR"])
    task = iql.load_task(make_args(env_id="hopper-medium"))
    assert len(task.data["obs"]) == 800
    assert [path.name for path in folder.iterdir()] == ["hopper_medium-v2.hdf5"]
    assert (folder / "hopper_medium-v2.hdf5").read_bytes() == server.content
    assert "100%" in capfd.readouterr().err, "no progress bar"
    server.content = b"no second download"
    assert len(iql.load_task(make_args(env_id="hopper-medium")).data["obs"]) == 800


def test_connection_cut_in_the_middle_leaves_nothing(server, capsys):
    server.limit = len(server.content) // 2
    with pytest.raises(SystemExit) as stop:
        iql.load_task(make_args(env_id="hopper-medium"))
    assert stop.value.code == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]) == 1
    folder = Path(os.environ["D4RL_DATASET_DIR"])
    assert not folder.exists() or list(folder.iterdir()) == []
    server.limit = None
    assert len(iql.load_task(make_args(env_id="hopper-medium")).data["obs"]) == 800


def test_missing_on_the_server(server, capsys):
    with pytest.raises(SystemExit) as stop:
        iql.load_task(make_args(env_id="hopper-random"))
    assert stop.value.code == 2 and "hopper-random-v2" in capsys.readouterr().err


@pytest.fixture
def stand_in_maker(tmp_path, monkeypatch, server):
    """A copy of the script beside a make_dataset.py that leaves a dataset at once, and a note of how it was called."""
    maker = tmp_path / "project" / "make_dataset.py"
    maker.parent.mkdir()
    target = tmp_path / "minari" / "o2o/hopper/medium-v1"
    obs = np.random.default_rng(0).normal(size=(9, 11))
    source = record("x/source/of-v0", HOPPER.spec, [episode(obs, np.zeros((8, 3)), [1] * 8, True, False)] * 3)
    lines = ["import shutil, sys", f"shutil.copytree({str(source)!r}, {str(target)!r})"]
    maker.write_text("\n".join([*lines, "open('called', 'w').write(' '.join(sys.argv[1:]))"]))
    shutil.copy(ROOT / "iql_finetune.py", maker.parent)
    monkeypatch.setattr(iql, "__file__", str(maker.with_name("iql_finetune.py")))
    return tmp_path / "called"


@pytest.mark.parametrize("dataset", ["auto", "stand-in"])
def test_stand_in(stand_in_maker, dataset, monkeypatch, capsys):
    if dataset == "auto":
        monkeypatch.setattr(iql, "HDF5_URL", "http://127.0.0.1:9/")  # nobody listens there
    else:
        monkeypatch.setattr(iql, "download", lambda *_: pytest.fail("asked the network"))
    task = iql.load_task(make_args(env_id="hopper-medium", dataset=dataset, reward_scale=1.0))
    out = capsys.readouterr().out
    assert task.dataset_id == "o2o/hopper/medium-v1" and len(task.data["obs"]) == 24
    assert stand_in_maker.read_text() == "collect --env-id hopper-medium"
    assert "STAND-IN o2o/hopper/medium-v1" in out and "hopper-medium-v2" in out
    stand_in_maker.unlink()
    iql.load_task(make_args(env_id="hopper-medium", dataset="stand-in", reward_scale=1.0))
    assert not stand_in_maker.exists(), "made a second time although it is there"


def test_official_does_not_stand_in(stand_in_maker, monkeypatch, capsys):
    monkeypatch.setattr(iql, "HDF5_URL", "http://127.0.0.1:9/")
    with pytest.raises(SystemExit) as stop:
        iql.load_task(make_args(env_id="hopper-medium", dataset="official"))
    assert stop.value.code == 2 and not stand_in_maker.exists()
    assert "hopper-medium-v2" in capsys.readouterr().err


def test_server_that_never_answers_costs_ten_seconds(stand_in_maker, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(iql, "HDF5_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        began = time.monotonic()
        iql.find_dataset(make_args(env_id="hopper-medium", dataset="auto"))
        assert time.monotonic() - began < 20, "more than ten seconds and what a busy machine adds"
    assert stand_in_maker.exists()


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("faster", [False, True])
def test_minari_download_is_put_in_place_when_whole(monkeypatch, capsys, breaks, faster):
    def fake(dataset_id, **_):
        path = minari.storage.get_dataset_path(dataset_id) / "data"
        path.mkdir(parents=True)
        (path / "main_data.hdf5").write_text("half")
        if breaks:
            raise ConnectionError("lost")
        if faster:  # another process, with the same dataset
            shutil.copytree(path.parent, folder / dataset_id)

    class Answer:
        def close(self):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(iql.urllib.request, "urlopen", lambda *_, **__: Answer())
    monkeypatch.setattr(minari, "download_dataset", fake)
    folder = Path(os.environ["MINARI_DATASETS_PATH"])
    args = make_args(env_id="pen-human")
    if breaks:
        with pytest.raises(SystemExit):
            iql.find_dataset(args)
        assert "lost" in "".join(capsys.readouterr())
    else:
        assert iql.find_dataset(args)[1] == folder / "D4RL/pen/human-v2"
    assert (folder / "D4RL/pen/human-v2").exists() is not breaks
    assert [path for path in folder.iterdir() if path.name.startswith(".download")] == []


def test_unreachable_hub_without_a_stand_in(monkeypatch, capsys):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(iql.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(iql, "__file__", "/nowhere/iql_finetune.py")
    for env_id, dataset in [("pen-human", "auto"), ("pen-human", "official"), ("mujoco/hopper/medium-v0", "auto")]:
        with pytest.raises(SystemExit) as stop:
            iql.find_dataset(make_args(env_id=env_id, dataset=dataset))
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and sum(line.startswith("error:") for line in lines) == 1
