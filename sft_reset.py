"""Offline IQL, then an online learner that is trained, probed and reset while the best policy so far goes on acting.

    python sft_reset.py --env-id hopper-medium

After Zhao, Li, Lin, "An Improved Stable Fine-Tuning framework for offline-to-online RL" (2025). Only its abstract was
public to us: keep the offline evaluation network for action selection until the new one is stable, evaluate policies
comprehensively, reset parameters periodically. How to do these three is our reading.

Deployed is the retained pair, a frozen policy and its Q: IQL's at first. The learner, SAC, starts from it. In training
the evaluator picks between the actions of both; now and then the learner acts alone. From what the Qs promised and what
was obtained it judges whether the new Q is stable and what the learner is worth. A learner that looks better is copied;
once the copy has proved it in whole episodes, it is the retained pair.

How to read it: `Agent` is IQL (equation numbers of arXiv 2110.06169), `Explorer` the learner, `Retention` decides by
whole episodes who is retained, `Evaluator` by segments of them who acts, and `train`, the last function, is the run
from top to bottom. Metrics: README.md. IQL departs from its authors' as in iql_finetune.py ([D1] to [D5], [D7] to [D9]
there). Our choices, some of which rest on runs in results/README.md:
[D1] Episodes are cut into segments. In most of them the evaluator selects, action by action, and the learner's actions
     have its noise. In probes the learner acts alone and without noise, as it would be deployed, to the end of the
     episode: a Q that has not seen what the learner's actions lead to overrates them, and yet looks calibrated, and a
     fall may come hundreds of steps after its cause. A probe begins, and goes on, only while TD error and drift keep to
     twice their limits [D5]. Once the new Q is stable, some whole episodes are the learner's, too, with its weights as
     they are at the start (its Q's promises there are of the action that it would take by then): what it does in states
     that the retained policy has led to says little of what it would do by itself.
[D2] The learner is SAC from the offline policy's mean action, at a fixed small temperature.
[D3] Its critics start as IQL's. Batches are half dataset, half online. No update before a window of segments.
[D4] Selection. The learner acts in a state where both critics of the selecting Q promise more than a margin above the
     retained action. The margin is by how much promises exceeded the gains obtained in recent segments, plus its
     standard error. It is 0 once the new Q is stable, as a learner that seldom acts seldom learns, and the learner acts
     in every state while its latest whole episodes gain: return more than the retained policy's by more than their
     standard error. Where the latest selections lost by more than their standard error, the retained policy acts alone
     until they are five windows old. What is deployed only gains by replacement [D7].
[D5] Stability. The new Q is stable once three measures are small over a window: its TD error, its drift at fixed
     states, and by how much its promises in probes exceed what they obtain in a segment, with a standard error added.
     It stays so until one of them exceeds twice its limit, or is not known for want of recent probes. It is not stable,
     either, where the latest episodes that were no one's by plan returned less than the retained policy's own by more
     than two standard errors. Until then the retained Q selects, by the same rule. To promise less than is obtained
     does no harm. All standard errors here take segments for independent, those of one episode, too.
[D6] A gain obtained is a sum of TD errors of the retained policy's fitted Q. Whatever is wrong with that Q shows in the
     segments of the retained policy alone and is subtracted.
[D7] Replacement.
     - A policy's value is the inverse-variance mean of three estimates, as if they were independent: its critic at
       start states, fitted Q evaluation there, and that of the retained policy plus the gains obtained.
     - A learner is proposed by value: its Q is stable, its lower bound is above the retained pair's estimate, and
       nothing says that it lost. Or by its latest whole episode, as discounted values see little of where one ends and
       a learner may soon lose what it can: the very weights that acted there, if it returned more than the upper
       quartile of the retained policy's, or than their mean while the learner's whole episodes gain.
     - Then a frozen copy acts alone in every other episode. It is retained once it has three, returned more on average
       and a one-sided rank test (Mann-Whitney) says that it is better. It is refused as soon as it does not return more
       on average, is in doubt by more than 0.3 after three, or still in doubt after ten. 8 % of equal copies pass.
     - Where an episode can end early, and that is a failure, a gain also has to exceed what a fall could cost that its
       n episodes do not show: the retained return above a random policy's, over n + 1. A copy is refused as soon as it
       gains less than ten would need.
     - A copy on trial gives way to weights whose whole episode returned more than any of its own and of the retained
       policy's, and to a learner with a stable Q whose values promise more than it has shown in three. After a trial is
       a window of segments before values may propose again.
     - The replaced policy is kept. Every other episode is one of the new one's, whole, until it has ten since its
       trial, or the test leaves no doubt (0.01); if the former one's returned more on average, it is restored.
[D8] A learner that may rarely act gets few data to correct what it overrates. So its policy loss holds it to the
     retained policy, as TD3+BC (Fujimoto, Gu 2021) does to the data: ever less while it is stable, more while it is
     not. Unless its whole episodes gain [D4], never less than a quarter, nor than twice what it was held by when
     episodes began to return less; that sinks again while they return no less. On goal tasks the weight is a tenth: of
     their |Q|, the steps to come, an action changes little.
[D9] A reset is due `--reset-every` steps after the last, or after a replacement: a learner that has just proved better
     is not in a local optimum. Where it is due, a learner whose lower bound promises a gain, and which has not lost, is
     proposed a last time, stable or not, and the reset waits until an open proposal is decided. Then all weights are
     drawn a fifth of the way to fresh ones (shrink and perturb: Ash, Adams 2020), with more updates a step until the
     new Q is stable or half of the time to the next reset is over. The plain reading of the abstract, all fresh, is
     `--reset-share 1`. The level of the shrunk critics is put back, as far as it goes linearly: TD learning takes at
     most tau (1 - gamma) an update off an error in the level of all values.
[D10] To compare with: `--evaluator offline` never lets the new Q select, `online` lets it from the start, without
     margin or hold, and deploys the mixture. Neither proposes or replaces anything.
"""

import contextlib
import copy
import difflib
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal, NoReturn
from unittest.mock import patch

import gymnasium as gym
import gymnasium_robotics  # noqa: F401, registers its environments
import h5py
import minari
import numpy as np
import pooch
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium"  # task: a short name, a full Minari id, or the path of a D4RL .hdf5 file
    eval_env: str | None = None  # Gymnasium environment of a .hdf5 file given by its path
    dataset: Literal["auto", "official", "stand-in"] = "auto"  # auto: official, a stand-in if it cannot be reached
    seed: int = 1  # of networks, batches, exploration and environments
    exp_name: str = "sft_reset"  # the run folder is run_dir/env_id__exp_name__seed
    run_dir: str = "runs"  # where run folders go
    cuda: bool = torch.cuda.is_available()  # train on the GPU
    torch_deterministic: bool = True  # deterministic kernels only
    offline_steps: int = 1_000_000  # gradient steps before the first environment step
    online_steps: int = 1_000_000  # environment steps after that
    utd_ratio: int = 1  # gradient steps per environment step
    batch_size: int = 256  # transitions per gradient step
    gamma: float = 0.99  # discount
    tau: float = 0.005  # share of the new weights that a target network takes over at each update
    learning_rate: float = 3e-4  # of Adam, for all networks
    hidden: int = 256  # units in each hidden layer
    buffer_size: int = 1_000_000  # online transitions kept
    eval_every: int = 5_000  # gradient steps (offline), environment steps (online)
    eval_episodes: int = 10  # per evaluation
    offline_checkpoint: str | None = None  # start online from the offline.pt of another run of the same task
    save_every: int = 10_000  # steps between checkpoints
    resume: bool = False  # continue the run folder from its checkpoint; starts anew where there is none
    track: bool = False  # also log to Weights & Biases
    wandb_project_name: str = "cleano2o"  # where --track logs to
    wandb_entity: str | None = None  # user or team there
    capture_video: bool = False  # film the evaluation episodes (needs moviepy)
    compile: bool = False  # torch.compile the losses
    cuda_graph: bool = False  # replay updates as one captured CUDA graph
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # medium: bfloat16 where the processor has it
    temperature: float = 0.02  # alpha of SAC, for rewards of about 1 a step [D2]
    initial_std: float = 0.1  # of SAC's action, before the tanh
    evaluator: Literal["frozen-until-stable", "offline", "online"] = "frozen-until-stable"  # whose Q selects [D5] [D10]
    selection: Literal["greedy", "softmax"] = "greedy"  # softmax: in training, by chance where the promises are close
    segment_steps: int = 100  # at most; episodes end them too [D1]
    probe_rate: float = 0.15  # chance that a segment begins a probe where one may [D1]
    whole_rate: float = 0.3  # chance that an episode is wholly the learner's, once its Q is stable [D1]
    control_share: float = 0.1  # of the segments, of the retained policy alone, once there is a margin
    window: int = 10  # segments of a kind that a judgement looks back on, twice as many controls; half will do
    td_limit: float = 0.05  # mean TD error, in units of the mean absolute reward's value [D5]
    drift_limit: float = 0.05  # of values over a window, same unit
    calibration_limit: float = 0.15  # of what Q promises beyond k-step returns in probes, same unit
    bound_errors: float = 1.0  # standard errors from an estimate to its lower bound [D7]
    replace_confidence: float = 0.95  # that a learner is better, in whole episodes, before it replaces the pair [D7]
    reset_every: int = 20_000  # environment steps; 0: never [D9]
    reset_share: float = 0.2  # of fresh weights after a reset; 1 forgets everything
    recovery_ratio: int = 4  # times utd_ratio, from a reset until stable
    # None below: the value of the task's domain.
    expectile: float | None = None  # tau in Eq. 5: 0.5 is SARSA, 1 the maximum over the data's actions
    beta: float | None = None  # inverse temperature in Eq. 7: 0 is behaviour cloning
    dropout: float | None = None  # in the actor
    reward_scale: float | None = None  # r -> scale * r + bias, online too; 0: 1000 / return range of the dataset
    reward_bias: float | None = None  # added to the scaled reward
    normalize_obs: bool | None = None  # by mean and standard deviation of the dataset
    hold: float | None = None  # most weight of the distance to the retained policy in the learner's loss, of |Q| [D8]
    # Locomotion, kitchen: the authors', offline. Antmaze, adroit: CORL's, which has the online numbers to compare with.
    domain_values: ClassVar[dict[str, dict]] = {
        "locomotion": {"expectile": 0.7, "beta": 3.0, "reward_scale": 0.0},
        "antmaze": {"expectile": 0.9, "beta": 10.0, "reward_bias": -1.0, "normalize_obs": True, "hold": 0.02},
        "adroit": {"expectile": 0.8, "beta": 3.0, "dropout": 0.1, "normalize_obs": True},
        "kitchen": {"expectile": 0.7, "beta": 0.5, "dropout": 0.1},
        "pointmaze": {"expectile": 0.9, "beta": 10.0, "reward_bias": -1.0, "hold": 0.02},
        "any": {"dropout": 0.0, "reward_scale": 1.0, "reward_bias": 0.0, "normalize_obs": False, "hold": 0.2},
    }


LOCOMOTION = "random medium expert medium-replay medium-expert full-replay"
ANTMAZE = "umaze umaze-diverse medium-play medium-diverse large-play large-diverse"
ENVS = {  # D4RL's environments: domain, return of a random and of an expert policy (scores 0 and 100), datasets
    "halfcheetah": ("locomotion", -280.178953, 12135.0, "halfcheetah-{}-v2", LOCOMOTION),
    "hopper": ("locomotion", -20.272305, 3234.3, "hopper-{}-v2", LOCOMOTION),
    "walker2d": ("locomotion", 1.629008, 4592.3, "walker2d-{}-v2", LOCOMOTION),
    "antmaze": ("antmaze", 0.0, 1.0, "D4RL/antmaze/{}-v1", ANTMAZE),
    "pointmaze": ("pointmaze", 0.0, 1.0, "D4RL/pointmaze/{}-v2", "umaze medium large open"),
    "pen": ("adroit", 96.262799, 3076.8331017826877, "D4RL/pen/{}-v2", "human cloned expert"),
    "hammer": ("adroit", -274.856578, 12794.134825156867, "D4RL/hammer/{}-v2", "human cloned expert"),
    "door": ("adroit", -56.512833, 2880.5693087298737, "D4RL/door/{}-v2", "human cloned expert"),
    "relocate": ("adroit", -6.425911, 4233.877797728884, "D4RL/relocate/{}-v2", "human cloned expert"),
    "kitchen": ("kitchen", 0.0, 4.0, "D4RL/kitchen/{}-v2", "complete partial mixed"),
}
TASKS = {f"{env}-{kind}": row[3].format(kind) for env, row in ENVS.items() for kind in row[4].split()}
GOAL_DOMAINS = ("antmaze", "pointmaze")  # the return of an episode is its success, 0 or 1
# Steps of the episodes that D4RL's reference scores are of; environments that Minari's datasets name have up to 625
HORIZONS = {"pen": 100, "hammer": 200, "door": 200, "relocate": 200, "kitchen": 280}
HDF5_ENVS = {"halfcheetah": "HalfCheetah-v4", "hopper": "Hopper-v4", "walker2d": "Walker2d-v4"}  # recorded in gym's -v2
HDF5_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2/"


def fail(message: str) -> NoReturn:
    """Bad input: one line that says what is wrong and what to do about it, exit code 2."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, below any progress bar
    sys.exit(2)


class EndAtGoal(gym.Wrapper):
    """Reaching the goal terminates the episode, as in D4RL's antmaze, and is its return; Minari's mazes may go on."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or bool(info["success"]), truncated, info | {"gain": float(info["success"])}


class CountSubtasks(gym.Wrapper):
    """The return is the number of subtasks solved in the episode, as in D4RL's kitchen. Learned from are the rewards of
    D4RL's dataset, Minari's dataset and its environment: in every step one for each subtask that is solved then."""

    def step(self, action):
        before = len(self.unwrapped.episode_task_completions)
        obs, reward, terminated, truncated, info = self.env.step(action)
        gain = float(len(info["episode_task_completions"]) - before)
        return obs, reward, terminated, truncated, info | {"gain": gain}


def dropped(obs: np.ndarray) -> np.ndarray:
    """Whether the pen, whose height is number 26 of its observations, has left the hand."""
    return obs[..., 26] < 0.075


class EndAtDrop(gym.Wrapper):
    """A dropped pen terminates the episode, as in D4RL; in Gymnasium-Robotics it lies there and costs 5 a step."""

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or bool(dropped(obs)), truncated, info


WRAPPERS = dict.fromkeys(GOAL_DOMAINS, EndAtGoal) | {"kitchen": CountSubtasks}  # domains whose return sums no rewards


@dataclass
class Task:
    """A dataset as the agent sees it, one row a transition, and its environment."""

    dataset_id: str
    env_spec: gym.envs.registration.EnvSpec
    domain: str
    ref_min: float
    ref_max: float
    return_range: float  # between the worst and the best episode of the dataset; of domains in WRAPPERS, that can be
    reward_scale: float
    reward_bias: float
    obs_mean: np.ndarray
    obs_std: np.ndarray
    data: dict[str, np.ndarray]  # obs, action, next_obs, reward, terminated, truncated, return_to_go
    episodes: int  # of the dataset

    def transform_reward(self, reward):
        return self.reward_scale * reward + self.reward_bias

    def transform_obs(self, obs):
        return ((flatten_obs(obs) - self.obs_mean) / self.obs_std).astype(np.float32)

    def score(self, episode_return: float) -> float:
        return 100 * (episode_return - self.ref_min) / (self.ref_max - self.ref_min)

    def make_env(self, video_dir: Path | None = None) -> gym.Env:
        """Observations as in `data`, actions in [-1, 1], rewards not transformed; info["gain"] is what a step adds to
        the return that scores are of, where that is not the reward."""
        env = gym.make(self.env_spec, **({"render_mode": "rgb_array"} if video_dir else {}))
        env = gym.wrappers.RecordVideo(env, str(video_dir), episode_trigger=lambda _: True) if video_dir else env
        env = EndAtDrop(env) if "HandPen" in self.env_spec.id else env
        env = WRAPPERS.get(self.domain, lambda env: env)(env)
        box = gym.spaces.Box(-np.inf, np.inf, self.obs_mean.shape, np.float32)
        return gym.wrappers.RescaleAction(gym.wrappers.TransformObservation(env, self.transform_obs, box), -1.0, 1.0)


def flatten_obs(obs):
    """A goal dict (one observation or many) as one vector; kitchen's goal, a dict, never varies and is left out."""
    if not isinstance(obs, dict):
        return obs
    keys = ("achieved_goal", "observation", "desired_goal")
    try:
        return obs["observation"] if isinstance(obs[keys[2]], dict) else np.concatenate([obs[key] for key in keys], -1)
    except KeyError:
        found = f"observations are a dict of {', '.join(obs)}"
        fail(f"{found}; only vectors and dicts with {', '.join(keys)} are supported")


def read_hdf5(path: Path, max_episode_steps: int) -> dict[str, np.ndarray]:
    """A D4RL file. Without `next_observations` the one after a time-out is not to be had, and that transition is not
    `known`; without `timeouts` the steps are counted."""
    with h5py.File(path) as file:
        obs, terminated = file["observations"][:], file["terminals"][:].astype(bool)
        data = {"obs": obs, "action": file["actions"][:], "reward": file["rewards"][:], "terminated": terminated}
        has_next, step = "next_observations" in file, np.arange(len(terminated))
        data["next_obs"] = file["next_observations"][:] if has_next else np.roll(obs, -1, 0)
        step -= np.maximum.accumulate(step * np.append(True, terminated[:-1]))  # since the latest terminal one
        truncated = file["timeouts"][:].astype(bool) if "timeouts" in file else (step + 1) % max_episode_steps == 0
    truncated[-1:] = True  # the file may end in the middle of an episode
    truncated &= ~terminated
    return data | {"truncated": truncated, "known": ~truncated | has_next}


def read_minari(dataset: minari.MinariDataset) -> dict[str, np.ndarray]:
    """A Minari dataset: its episodes have one observation more than steps, so every next observation is known. Those of
    pointmaze are cut from one run, where the goal is reached, and begin with the goal of the one before: the next one's
    takes its place, in antmaze, too, where it is the same."""
    keys, rows = ("obs", "action", "next_obs", "reward", "terminated", "truncated"), []
    for episode in dataset.iterate_episodes():
        goal = episode.observations.get("desired_goal") if isinstance(episode.observations, dict) else None
        if isinstance(goal, np.ndarray):
            goal[0] = goal[1]
        obs, terminated = flatten_obs(episode.observations), episode.terminations
        truncated = ~terminated & (np.arange(len(episode)) == len(episode) - 1)
        rows.append((obs[:-1], episode.actions, obs[1:], episode.rewards, terminated, truncated))
    return dict(zip(keys, map(np.concatenate, zip(*rows, strict=True)), strict=True))


def end_at(ends: np.ndarray, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Episodes up to the first transition that `ends` them, as `EndAtGoal` and `EndAtDrop` do online: Minari's antmaze
    data stay at the goal for half of their steps and are paid for each."""
    last = data["terminated"] | data["truncated"]
    first = np.append(True, last[:-1])
    earlier = np.cumsum(ends) - ends  # in the whole file
    keep = earlier == earlier[first][np.cumsum(first) - 1]
    data = data | {"terminated": data["terminated"] | ends, "truncated": data["truncated"] & ~ends}
    return {key: column[keep] for key, column in data.items()}


def recover_env(dataset: minari.MinariDataset) -> gym.Env:
    """The environment that it names for evaluation. But AntMaze's U is the mirror image there (Minari's issue 304), in
    which nothing learned from the data holds: then the maze of the data, or its start and goal mirrored into that."""
    env = dataset.recover_environment(eval_env=True)
    of_data, named = (spec.kwargs.get("maze_map", []) if spec else [] for spec in (dataset.env_spec, env.spec))
    mirrored = [row[::-1] for row in named]
    walls, *others = ([[cell == 1 for cell in row] for row in maze] for maze in (of_data, named, mirrored))
    if [maze == walls for maze in others] != [False, True]:
        return env
    return gym.make(env.spec, maze_map=of_data if any("g" in row for row in of_data) else mirrored)


def download(dataset_id: str, path: Path) -> None:
    """Fetch an official dataset, with a progress bar, under a temporary name that becomes `path` when it is whole."""
    if path.suffix == ".hdf5":
        downloader = pooch.HTTPDownloader(progressbar=True, timeout=10)
        pooch.retrieve(HDF5_URL + path.name, None, path.name, path.parent, downloader=downloader)
        return
    server = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    urllib.request.urlopen(server, timeout=10).close()  # minari would retry for half a minute
    with tempfile.TemporaryDirectory(prefix=".download-", dir=minari.storage.get_dataset_path()) as part:
        with patch.dict(os.environ, MINARI_DATASETS_PATH=part):
            minari.download_dataset(dataset_id)
        try:
            os.renames(Path(part, dataset_id), path)  # and makes the folders on the way to it
        except OSError:
            if not (path / "data").exists():  # otherwise another process was faster
                raise


def find_dataset(args: Args) -> tuple[str, Path, str]:
    """Id, local path and environment (first word of the task) of the dataset: local, else official, else stand-in."""
    name, path = args.env_id, Path(args.env_id)
    name = next((short for short, full in TASKS.items() if full == name), name)  # hopper-medium-v2: hopper-medium
    if path.suffix == ".hdf5":
        if not path.exists() or not args.eval_env:
            fail(f"{path}: no such file" if args.eval_env else f"{path} needs --eval-env, for instance Hopper-v4")
        if args.dataset == "stand-in":
            fail(f"there is no stand-in for a file; leave out --dataset stand-in, or give a short name, not {path}")
        env = re.split("[-_]", args.eval_env.lower())[0]
        return path.stem, path, env.removeprefix("adroithand").removeprefix("franka")
    if args.eval_env:
        fail(f"--eval-env is of a .hdf5 file given by its path; {args.env_id} has its own")
    if "/" not in args.env_id and name not in TASKS:
        near = ", ".join(difflib.get_close_matches(name, TASKS, 3, 0.2))
        fail(f"unknown task {args.env_id}; nearest: {near}; or a full Minari id, or the path of a .hdf5 file")
    if path.is_absolute() or ".." in path.parts:
        fail(f"{path} is no Minari id, and of files only .hdf5 ones are given by their path")
    dataset_id = TASKS.get(name, str(path))
    env, kind = dataset_id.split("/")[-2:] if "/" in args.env_id else name.split("-", 1)
    folder = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()
    file = f"{env}_{kind.replace('-', '_')}-v2.hdf5"  # as D4RL names it: hopper_medium_replay-v2.hdf5
    path = minari.storage.get_dataset_path(dataset_id) if "/" in dataset_id else folder / file
    try:
        if args.dataset != "stand-in":
            if not (path / "data" if "/" in dataset_id else path).exists():
                download(dataset_id, path)
            return dataset_id, path, env
    except Exception as error:  # whatever server, network and libraries raise: it is not to be had
        print(f"cannot fetch {dataset_id}: {error!r:.300}")
    if args.dataset == "stand-in" and "/" in args.env_id:
        fail(f"there is no stand-in for {args.env_id}; leave out --dataset stand-in, or give a short name")
    if args.dataset == "official" or "/" in args.env_id:
        known = difflib.get_close_matches(dataset_id, TASKS.values(), 3)
        near = f"; nearest: {', '.join(known)}" if known and dataset_id not in known else ""
        fail(f"{dataset_id} is not at {path}: put it there, or use a short name and --dataset stand-in{near}")
    stand_in, maker = f"o2o/{env}/{kind}-v1", Path(__file__).with_name("make_dataset.py")
    path, command = minari.storage.get_dataset_path(stand_in), [sys.executable, maker, "collect", "--env-id", name]
    if not path.exists() and (not maker.exists() or subprocess.run(command).returncode):
        fail(f"no stand-in {stand_in}: make_dataset.py and policies/ must lie beside this script and have this task")
    print(f"!!! training on the STAND-IN {stand_in}: its scores are not comparable with those on {dataset_id} !!!")
    return stand_in, path, env


def returns_to_go(rewards: list[float], failed: bool, terminated: bool, task: Task, gamma: float) -> list[float]:
    """Of an episode of transformed rewards. One that failed to reach its goal counts as failing for ever after, one of
    dense rewards cut by its time limit as earning nothing more: off by gamma^k of the value there, k steps before; but
    in the kitchen as staying as it is."""
    if failed:
        return [task.transform_reward(0.0) / (1 - gamma)] * len(rewards)
    returns, g = [], rewards[-1] / (1 - gamma) if task.domain == "kitchen" and not terminated else 0.0
    for reward in reversed(rewards):
        returns.append(g := reward + gamma * g)
    return returns[::-1]


def load_task(args: Args) -> Task:
    """The task with its data checked, described and transformed; `args` gets the domain's value where it has None."""
    dataset_id, path, env = find_dataset(args)
    cure = "give a whole file" if args.env_id.endswith(".hdf5") else f"delete {path} to have it fetched again"
    try:
        if path.suffix == ".hdf5":
            world, meta = gym.make(gym.spec(args.eval_env or HDF5_ENVS[env])), {}
            data = read_hdf5(path, HORIZONS.get(env, world.spec.max_episode_steps))
        else:
            dataset = minari.MinariDataset(path / "data")
            world, meta = recover_env(dataset), dataset.storage.metadata
            data = read_minari(dataset)
    except Exception as error:  # whatever h5py, minari and the environment raise
        fail(f"cannot read {path} or make its environment ({error!r:.300}); {cure}")
    box, obs, n = world.action_space, flatten_obs(world.reset(seed=0)[0]), len(data["obs"])
    if not isinstance(box, gym.spaces.Box) or not box.is_bounded():
        fail(f"{dataset_id}: actions are {box}; only continuous, bounded ones are supported")
    if np.ndim(obs) != 1 or len(box.shape) != 1:
        fail(f"{dataset_id}: observations are {np.shape(obs)}, actions {box.shape}; only vectors of both are supported")
    shapes = {"obs": obs.shape, "next_obs": obs.shape, "action": box.shape, "reward": (), "terminated": ()}
    for key, shape in shapes.items():
        numbers = data[key].dtype.kind in "fiub"
        if n == 0 or data[key].shape != (n, *shape) or not (numbers and np.isfinite(data[key]).all()):
            needed = f"{(n or 'steps', *shape)} numbers, none of them NaN or infinite"
            fail(f"{dataset_id}: {key} has shape {data[key].shape}, {world.spec.id} needs {needed}; {cure}")

    domain, ref_min, ref_max, *_ = ENVS.get(env, ("locomotion", meta.get("ref_min_score"), meta.get("ref_max_score")))
    if domain in GOAL_DOMAINS:
        if not np.isin(data["reward"], (0, 1)).all():
            fail(f"{dataset_id}: rewards are not 0 or 1; a goal task needs its sparse dataset")
        data = end_at(data["reward"] > 0, data)
    if "HandPen" in world.spec.id:
        data = end_at(dropped(data["next_obs"]), data)
    last, n = data["terminated"] | data["truncated"], len(data["obs"])
    first = np.append(0, np.flatnonzero(last)[:-1] + 1)
    combine = np.maximum if domain == "kitchen" else np.add  # the most subtasks solved at once; see CountSubtasks
    returns = combine.reduceat(data["reward"], first, dtype=np.float64)
    worst, best = float(returns.min()), float(returns.max())
    ref_min, ref_max = (worst, best) if ref_max is None else (ref_min, ref_max)
    if meta.get("ref_max_score") is None and not (path.suffix == ".hdf5" and env in ENVS):
        print(f"{dataset_id} has no reference scores; 0 and 100 are returns of {ref_min:.1f} and {ref_max:.1f}")
    spread = ref_max - ref_min if domain in WRAPPERS else max(best - worst, 1e-6)
    resolved = args.domain_values["any"] | args.domain_values[domain]
    vars(args).update({name: value for name, value in resolved.items() if getattr(args, name) is None})
    if ref_min == ref_max or (best == worst and not args.reward_scale):
        found = f"returns are {worst:.1f} to {best:.1f}, reference scores {ref_min:.1f} to {ref_max:.1f}"
        cure = "give --reward-scale, and a ref_min_score and a larger ref_max_score in its metadata"
        fail(f"{dataset_id}: {found}, which is no scale for rewards and scores; {cure}")
    scale = args.reward_scale = float(args.reward_scale or 1000 / spread)
    print("  ".join(f"{name} {getattr(args, name)}" for name in resolved))
    mean, std = 0 * obs, 0 * obs + 1
    if args.normalize_obs:  # summed in float64: in float32 a million rows cost digits
        mean, std = data["obs"].mean(0, dtype=np.float64), data["obs"].std(0, dtype=np.float64) + 1e-3
    of_rewards = ref_min, ref_max, spread, scale, args.reward_bias
    spec = copy.deepcopy(world.spec)
    spec.max_episode_steps = HORIZONS.get(env, spec.max_episode_steps)
    task = Task(dataset_id, spec, domain, *of_rewards, mean, std, data, len(first))
    ends = ", ".join(f"{data[key].sum():,} {key}" for key in ("terminated", "truncated"))
    about = f"{n:,} transitions, {len(first):,} episodes ({ends}), return mean {returns.mean():.1f}, min {worst:.1f}"
    print(f"{dataset_id}: {about}, max {best:.1f}, normalised mean {task.score(returns.mean()):.1f}")
    data["reward"] = task.transform_reward(data["reward"])
    failed = (returns <= 0) & (domain in GOAL_DOMAINS)
    episodes = zip(np.split(data["reward"], first[1:]), failed, data["terminated"][last], strict=True)
    data["return_to_go"] = np.hstack([returns_to_go(r.tolist(), *how, task, args.gamma) for r, *how in episodes])
    data["action"] = np.clip(2 * (data["action"] - box.low) / (box.high - box.low) - 1, -1 + 1e-5, 1 - 1e-5)
    data["obs"], data["next_obs"] = task.transform_obs(data["obs"]), task.transform_obs(data["next_obs"])
    known = data.pop("known", True) | data["terminated"]  # after a terminal one nothing comes
    task.data = {key: value[known].astype(np.float32) for key, value in data.items()}
    return task


class ReplayBuffer:
    """Dataset and online transitions as rows of one matrix on the training device, so that a batch is one gather and
    then views. The first rows are the dataset's, the others a ring of the latest online transitions."""

    keys = ("obs", "action", "next_obs", "reward", "terminated", "return_to_go")

    def __init__(self, data: dict[str, np.ndarray], capacity: int, device: torch.device):
        rows = np.concatenate([data[key].reshape(len(data[key]), -1) for key in self.keys], 1)
        self.widths = [data[key].shape[1] for key in self.keys[:3]] + [1] * 3
        self.n_dataset, self.capacity, self.added = len(rows), capacity, 0
        self.rows = torch.zeros(len(rows) + capacity, rows.shape[1], device=device)
        self.rows[: len(rows)] = torch.from_numpy(rows)
        self.n_online = torch.zeros((), dtype=torch.float64, device=device)  # a tensor: read inside CUDA graphs

    def add(self, obs, action, next_obs, reward, terminated, return_to_go=0.0) -> None:
        row = np.concatenate([obs, action, next_obs, [reward, terminated, return_to_go]], dtype=np.float32)
        self.rows[self.n_dataset + self.added % self.capacity] = torch.from_numpy(row).to(self.rows.device)
        self.added += 1
        self.n_online.fill_(min(self.added, self.capacity))

    def sample(self, n: int, online_share: float | None = None) -> dict[str, Tensor]:
        """n transitions, (n, dim) or (n,) each: from all rows alike, or a fixed share of them from the online ones."""
        u = torch.rand(n, dtype=torch.float64, device=self.rows.device)
        index = u * (self.n_dataset + self.n_online)
        if online_share is not None:
            online = torch.arange(n, device=u.device) < round(n * online_share)
            index = torch.where(online, self.n_dataset + u * self.n_online, u * self.n_dataset)
        columns = self.rows[index.long()].split(self.widths, 1)
        return dict(zip(self.keys, columns[:3] + tuple(c.squeeze(1) for c in columns[3:]), strict=True))

    def state_dict(self) -> dict:
        return {"added": self.added, "online": self.rows[self.n_dataset :][: self.added].clone()}

    def load_state_dict(self, state: dict) -> None:
        self.added, n = state["added"], len(state["online"])
        self.rows[self.n_dataset : self.n_dataset + n] = state["online"]
        self.n_online.fill_(n)


def mlp(n_in: int, hidden: int, n_out: int, dropout: float = 0.0) -> nn.Sequential:
    drop = [nn.Dropout(dropout)] if dropout else []
    relu = nn.ReLU(inplace=True)
    hiddens = [nn.Linear(n_in, hidden), relu, *drop, nn.Linear(hidden, hidden), relu, *drop]
    return nn.Sequential(*hiddens, nn.Linear(hidden, n_out))


class GaussianActor(nn.Module):
    """Normal(tanh(net(s)), exp(log_std)), its log_std the same in every state; samples are not squashed."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, dropout: float):
        super().__init__()
        self.net = mlp(obs_dim, hidden, action_dim, dropout)
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (n, action_dim) and log standard deviation (action_dim,)."""
        return torch.tanh(self.net(obs)), self.log_std.clamp(-5, 2)

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        mean, log_std = self(obs)
        z = (action - mean) * torch.exp(-log_std)
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


class Critic(nn.Module):
    """Independent Q(s, a) networks, their values stacked on dim 0: (n_critics, n)."""

    def __init__(self, obs_dim: int, action_dim: int, hidden: int, n_critics: int = 2):
        super().__init__()
        self.nets = nn.ModuleList(mlp(obs_dim + action_dim, hidden, 1) for _ in range(n_critics))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([obs, action], -1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])


class CudaGraph:
    """`fn` as one captured graph: called as it is three times (warm-up), then captured, then replayed. A graph freezes
    Python numbers and addresses: after a change of batch size, loss weight or optimiser storage, make a new one. The
    tensors that it is called with are copied to where it reads them; what it returns the next replay overwrites."""

    def __init__(self, fn):
        self.fn, self.calls, self.inputs = fn, 0, None
        self.graph, self.stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def __call__(self, *inputs: Tensor):
        self.calls += 1
        self.inputs = self.inputs or [x.cuda() for x in inputs]
        for own, x in zip(self.inputs, inputs, strict=True):
            own.copy_(x)
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.result = self.fn(*self.inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return self.result
        if self.calls == 4:
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.result = self.fn(*self.inputs)
        self.graph.replay()
        return self.result


def in_state(fn, obs: np.ndarray, noise: float, device: torch.device, graphs: dict | None) -> np.ndarray:
    """`fn(obs, noise)` in one state; where there are `graphs`, by a captured one for each noise, which they keep."""
    x = torch.from_numpy(obs)
    if graphs is None:
        return fn(x.to(device), noise).cpu().numpy()
    if noise not in graphs:
        graphs[noise] = CudaGraph(partial(fn, noise=noise))
    return graphs[noise](x).cpu().numpy()


class Agent(nn.Module):
    """IQL: values that never ask for an action outside the data, and the policy extracted from them."""

    algorithm = "iql"  # scripts with the same one share their offline.pt

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.args = args
        self.actor = GaussianActor(obs_dim, action_dim, args.hidden, args.dropout)
        self.critic = Critic(obs_dim, action_dim, args.hidden)
        self.value = mlp(obs_dim, args.hidden, 1)
        self.trained = list(self.parameters())
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.sources, self.targets = list(self.critic.parameters()), list(self.target_critic.parameters())
        self.graphs = {}  # of `policy`, by its noise
        self.optimizer = torch.optim.Adam(self.trained, args.learning_rate, fused=True, capturable=args.cuda)

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        args, obs, action = self.args, batch["obs"], batch["action"]
        with torch.no_grad():
            target_q = self.target_critic(obs, action).amin(0)
            next_v = self.value(batch["next_obs"]).squeeze(-1)

        # V: upper expectile of Q over the data's actions (Eq. 5)
        advantage = target_q - self.value(obs).squeeze(-1)
        asymmetry = (args.expectile - (advantage < 0).to(advantage.dtype)).abs()
        value_loss = (asymmetry * advantage.square()).mean()

        # Q: backup through V, never through an action outside the data (Eq. 6)
        backup = batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_v
        critic_loss = (self.critic(obs, action) - backup).square().mean()

        # Policy: the data's actions, each weighted by its exponential advantage (Eq. 7)
        weight = torch.exp(args.beta * advantage.detach()).clamp(max=100)
        actor_loss = -(weight * self.actor.log_prob(obs, action)).mean()
        return {"value_loss": value_loss, "critic_loss": critic_loss, "actor_loss": actor_loss}

    def update(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """One gradient step of all networks on a batch of `ReplayBuffer.sample`; returns detached scalars."""
        self.actor.train()
        losses = self.loss(batch)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()  # the networks are disjoint: one backward, one step
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.targets, self.sources, self.args.tau)
        return {name: loss.detach() for name, loss in losses.items()}

    def policy(self, obs: Tensor, noise: float = 0.0) -> Tensor:
        """Actions in [-1, 1]: the mean, plus `noise` times the policy's own noise."""
        mean, log_std = self.actor.eval()(obs)
        action = mean + noise * torch.exp(log_std) * torch.randn_like(mean) if noise else mean
        return action.clamp(-1, 1)

    @torch.no_grad()
    def act(self, obs: np.ndarray, t: int = 0, noise: float = 0.0) -> np.ndarray:
        """`policy` in one state, at step t of an episode."""
        return in_state(self.policy, obs, noise, self.targets[0].device, self.graphs if self.args.cuda_graph else None)

    def get_extra_state(self) -> dict:  # part of state_dict
        return self.optimizer.state_dict()

    def set_extra_state(self, state: dict) -> None:
        own = self.optimizer.state_dict()["param_groups"]  # learning rate and device are those asked for now
        self.optimizer.load_state_dict(state | {"param_groups": own})


def copy_weights(source: nn.Module, *targets: nn.Module) -> None:
    for target in targets:
        torch._foreach_copy_([p.data for p in target.parameters()], [p.data for p in source.parameters()])


class Explorer(Agent):
    """SAC (Haarnoja et al. 2018) at a fixed temperature; the policy is tanh(Normal(net(s), exp(log_std))), its log_std
    the same in every state. The update is Agent's; a value network it has none."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        nn.Module.__init__(self)
        self.args = args
        self.actor = GaussianActor(obs_dim, action_dim, args.hidden, dropout=0.0)
        nn.init.constant_(self.actor.log_std, math.log(args.initial_std))
        self.critic = Critic(obs_dim, action_dim, args.hidden)
        self.trained = list(self.parameters())
        self.anchor_net = copy.deepcopy(self.actor.net).requires_grad_(False)
        self.register_buffer("anchor", torch.zeros(()))  # a tensor: read inside CUDA graphs
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.sources, self.targets = list(self.critic.parameters()), list(self.target_critic.parameters())
        self.graphs = {}  # of `policy`, by its noise
        self.optimizer = torch.optim.Adam(self.trained, args.learning_rate, fused=True, capturable=args.cuda)

    def warm_start(self, agent: Agent) -> None:
        """Take over the offline policy's mean action and Q [D3]."""
        copy_weights(agent.actor.net, self.actor.net, self.anchor_net)
        copy_weights(agent.target_critic, self.critic, self.target_critic)

    def sample(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """An action (n, action_dim) and its log-probability (n,)."""
        mean, log_std = self.actor.net(obs), self.actor.log_std.clamp(-5, 2)
        z = torch.randn_like(mean)
        u = mean + torch.exp(log_std) * z
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))  # log of tanh'(u)
        return torch.tanh(u), (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi) - log_slope).sum(-1)

    @torch.compiler.disable  # compiled for a CPU, it stores bool masks of its ReLUs, slower than all the rest together
    def frozen_critic(self, obs: Tensor, action: Tensor) -> Tensor:
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        return torch.func.functional_call(self.critic, frozen, (obs, action))

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        args, obs = self.args, batch["obs"]

        # Q: backup through the policy's own next action and its entropy
        with torch.no_grad():
            next_action, next_log_prob = self.sample(batch["next_obs"])
            next_v = self.target_critic(batch["next_obs"], next_action).amin(0) - args.temperature * next_log_prob
            backup = batch["reward"] + args.gamma * (1 - batch["terminated"]) * next_v
        critic_loss = (self.critic(obs, batch["action"]) - backup).square().mean()

        # Policy: the lower Q of critics held fixed, the entropy, and closeness to the policy it is anchored to [D8]
        action, log_prob = self.sample(obs)
        q = self.frozen_critic(obs, action).amin(0)
        distance = (action - torch.tanh(self.anchor_net(obs))).square().mean(-1)
        actor_loss = (args.temperature * log_prob - q + self.anchor * q.detach().abs().mean() * distance).mean()
        return {"critic_loss": critic_loss, "actor_loss": actor_loss}

    def policy(self, obs: Tensor, noise: float = 0.0) -> Tensor:
        """Actions in [-1, 1]: the tanh of the mean, or samples where there is `noise`."""
        return self.sample(obs)[0] if noise else torch.tanh(self.actor.net(obs))


def ratio(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """sum(values) / sum(weights) and its standard error, one segment an entry; not known from fewer than two."""
    mean, n = values.sum() / max(weights.sum(), 1e-9), len(values)
    error = math.sqrt(n / (n - 1) * ((values - mean * weights) ** 2).sum()) / weights.sum() if n > 1 else math.inf
    return np.array([mean, error])


def combine(estimates: list) -> tuple[float, float]:
    """Inverse-variance mean of (estimate, standard error) pairs and its standard error, widened by as much as they
    disagree (Birge's ratio) [D7]."""
    mean, error = np.array(estimates).T
    weight = 1 / np.maximum(error, 1e-6) ** 2
    best = (weight * mean).sum() / weight.sum()
    disagreement = (weight * (mean - best) ** 2).sum() / (len(mean) - 1)
    return float(best), math.sqrt(max(1.0, disagreement) / weight.sum())


def within(measured: dict[str, float], limits: dict[str, float], factor: float) -> bool:
    """Whether everything that has a limit was measured and keeps to `factor` times it [D5]."""
    return all(measured.get(name, math.inf) <= factor * limit for name, limit in limits.items())


@torch.no_grad()
def reset(learner: Explorer, batch: dict[str, Tensor]) -> None:
    """Draw all weights towards fresh ones, in place, so that a captured graph goes on with the new weights. Then fit
    what each critic says of a batch of `ReplayBuffer.sample` to what it said before [D9]."""
    before = learner.critic(batch["obs"], batch["action"])
    with learner.anchor.device:
        fresh = Explorer(batch["obs"].shape[-1], batch["action"].shape[-1], learner.args)
    torch._foreach_lerp_(learner.trained, fresh.trained, learner.args.reset_share)
    after = learner.critic(batch["obs"], batch["action"])
    for net, old, new in zip(learner.critic.nets, before, after, strict=True):
        variance, covariance = torch.cov(torch.stack([new, old]))[0]
        slope = covariance / variance.clamp(min=1e-12)
        net[-1].weight.mul_(slope)
        net[-1].bias.sub_(new.mean()).mul_(slope).add_(old.mean())
    torch._foreach_copy_(learner.targets, learner.sources)
    for state in learner.optimizer.state.values():
        torch._foreach_zero_(list(state.values()))


@torch.no_grad()
def expect(critic: nn.Module, policy: nn.Module, obs: Tensor) -> np.ndarray:
    """What each network of a critic says of a policy's own actions: (n_critics, n)."""
    return critic(obs, policy.actor(obs)[0]).cpu().double().numpy()


RETAINED, PROPOSED, FORMER, LATEST = range(4)  # index `Retention.pairs` and, with NO_ONE, `Retention.returns`
NO_ONE = -1
PROBE, SELECTED, CONTROL, WHOLE_CONTROL = 1, 0, -1, -2  # roles of segments; below SELECTED the retained one acted alone


class Retention(nn.Module):
    """Which policy is retained: whole episodes decide [D7]."""

    def __init__(self, learner: Explorer, task: Task, args: Args):
        super().__init__()
        self.args = args
        self.per_return, self.ref_min = 100 / (task.ref_max - task.ref_min), task.ref_min
        self.ends_fail = task.domain not in WRAPPERS  # elsewhere to terminate is good
        self.may_fall = self.ends_fail and bool(task.data["terminated"].any())
        # Of a learner's form, but no update reaches them: the retained pair, the one proposed, the former one (replaced
        # last) and the learner as it was when its latest whole episode began.
        self.pairs = nn.ModuleList(copy.deepcopy(learner).requires_grad_(False) for _ in range(4))
        # From here on what is a number, a string or a list is saved with the networks.
        # Of whole episodes of each of `pairs` alone, the last being the learner's latest ones; then of the latest that
        # were no one's by plan: there the learner acts alone too where a probe begins with the episode.
        self.returns = [[], [], [], [], []]
        self.alone = RETAINED  # whose the whole episode is
        self.kind = "control"  # of the segment: select, probe, control; trial: the proposed one's episode, no segment
        self.stable = False  # the new Q [D5]
        self.proving, self.parting = False, False  # a copy is tried; its learner's reset is due
        self.segments, self.next_proposal = 0, args.window  # ended so far; from then on values may propose
        self.replaced = self.restored = self.renewed = 0  # `renewed`: the step of the latest replacement or reset
        self.tried = 0  # how many of the retained policy's episodes are of its trial
        self.score = math.nan  # of the retained policy; not known before `begin`

    @property
    def retained(self) -> Explorer:
        return self.pairs[RETAINED]

    def score_of(self, i: int) -> float:
        return float(self.per_return * (np.mean(self.returns[i]) - self.ref_min))

    def score_gain(self, i: int) -> tuple[float, float]:
        """By how much the latest episodes of `returns[i]` returned more than the retained policy's, and its standard
        error, both in units of the score; nan, inf: too few to say."""
        own, latest = self.returns[RETAINED], self.returns[i]
        if len(own) < 3 or len(latest) < self.args.window // 2:
            return math.nan, math.inf
        error = math.hypot(*(np.std(returns, ddof=1) / math.sqrt(len(returns)) for returns in (own, latest)))
        return self.score_of(i) - self.score_of(RETAINED), float(self.per_return * error)

    def prove(self, proposed: Explorer) -> None:
        """A frozen copy of the learner, as it is or was, is proposed: whole episodes prove it. Else never [D10]."""
        if self.args.evaluator == "frozen-until-stable":
            copy_weights(proposed, self.pairs[PROPOSED])
            self.proving, self.returns[PROPOSED] = True, []

    def end_episode(self, learner: Explorer, step: int, episode_return: float) -> None:
        """Whether the former policy is restored, another one proposed, the one proposed retained or refused."""
        from scipy.stats import mannwhitneyu  # here, so that all scripts import the same on top

        rank_test = partial(mannwhitneyu, alternative="greater")
        self.returns[self.alone].append(float(episode_return))
        for i in (LATEST, NO_ONE):
            self.returns[i] = self.returns[i][-self.args.window // 2 :]

        # Restored: where the new policy's episodes since its trial, which chose it, say that it was wrong
        own, former = self.returns[RETAINED][self.tried :], self.returns[FORMER]
        if former and own and (len(own) >= 10 or rank_test(own, former).pvalue <= 0.01):
            if np.mean(own) < np.mean(former):
                self.replace(learner, by=FORMER)
            self.score, self.returns[FORMER] = self.score_of(RETAINED), []

        # Proposed: the very weights of a whole episode that returned more than usual
        own = self.returns[RETAINED]
        if self.alone == LATEST:
            score_gain, error = self.score_gain(LATEST)
            usual = np.mean(own) if score_gain > error else np.quantile(own, 0.75)
            if episode_return > (max(own + self.returns[PROPOSED]) if self.proving else usual):
                self.prove(self.pairs[LATEST])

        # Retained, or refused: by the episodes of the copy that is tried
        tried = self.returns[PROPOSED]
        if tried:
            gain = float(np.mean(tried) - np.mean(own))
            p_value = rank_test(tried, own).pvalue if len(tried) >= 3 else 0.0
            fall = max(float(np.mean(own)) - self.ref_min, 0.0) if self.may_fall else 0.0
            sure = len(tried) >= 3 and p_value <= 1 - self.args.replace_confidence
            better = sure and gain > fall / (len(tried) + 1)
            if better or gain <= fall / (10 + 1) or p_value > 0.3 or len(tried) == 10:
                self.next_proposal = self.segments + self.args.window
                if better:
                    self.replace(learner, by=PROPOSED)
                    self.renewed, self.parting = step, False
                self.proving, self.returns[PROPOSED] = False, []
        self.next_episode(learner)

    def next_episode(self, learner: Explorer) -> None:
        """Whether it is wholly one policy's: the retained one's three times at first, and every other time after a
        replacement, until that is settled; while a learner is proving, its copy's every other time, and the retained
        one's between until five are known of it; else, once its Q is stable, the learner's own now and then, and twice
        as often until enough of them are known."""
        known, last, self.alone = len(self.returns[RETAINED]), self.alone, NO_ONE
        whole_rate = self.args.whole_rate * (1 if len(self.returns[LATEST]) >= self.args.window // 2 else 2)
        if known < 3:
            self.alone = RETAINED
        elif self.proving and last != PROPOSED:
            self.alone = PROPOSED
        elif last != RETAINED and (self.returns[FORMER] or (self.proving and known < 5)):
            self.alone = RETAINED
        elif self.stable and np.random.rand() < whole_rate:
            self.alone = LATEST
            copy_weights(learner, self.pairs[LATEST])
        kinds = {RETAINED: "control", PROPOSED: "trial", LATEST: "probe"}
        self.kind = kinds.get(self.alone, "select" if self.kind == "trial" else self.kind)

    def replace(self, learner: Explorer, by: int) -> None:
        """The proposed or the former pair is retained from now on."""
        self.replaced, self.restored = self.replaced + (by == PROPOSED), self.restored + (by == FORMER)
        if by == PROPOSED:
            copy_weights(self.retained, self.pairs[FORMER])
            self.returns[FORMER], self.tried = self.returns[RETAINED], len(self.returns[PROPOSED])
            # What the learner returned before is not of now; its copy's are the nearest
            self.returns[LATEST] = self.returns[PROPOSED][-self.args.window // 2 :]
        copy_weights(self.pairs[by], self.retained)
        copy_weights(self.retained.actor.net, learner.anchor_net)
        self.score, self.returns[RETAINED], self.returns[by] = self.score_of(by), self.returns[by], []
        self.returns[NO_ONE] = []


class Evidence:
    """The segments on record as columns, one entry a segment, and which of them a judgement looks back on."""

    def __init__(self, records: list[dict[str, float]], window: int):
        self.columns = {name: np.array([row[name] for row in records]) for name in records[0]}
        self.weight, self.acted, gain, role = (self.columns[name] for name in ("weight", "acted", "gain", "role"))
        present = np.isfinite(gain)  # over the policy that is retained now
        recent = np.cumsum(role[::-1] > WHOLE_CONTROL)[::-1] <= 5 * window  # by its whole episodes nothing gets older
        self.enough = window // 2
        self.controls = np.flatnonzero(present & (role < SELECTED))[-2 * window :]
        self.mixed = np.flatnonzero(present & (self.acted > 0))[-2 * window :]
        self.probes = np.flatnonzero(recent & (role == PROBE))[-window:]
        self.selected = np.flatnonzero(recent & present & (role == SELECTED))[-window:]
        self.measured = self.probes[present[self.probes]]
        # The retained policy gains nothing over itself: what its segments show is the fitted Q's error [D6]
        bias, self.doubt = self.mean("gain", self.controls)
        self.net = gain - bias * self.weight

    def mean(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Of a column, per discounted step, and its standard error."""
        return ratio(self.columns[name][rows], self.weight[rows])

    def knows(self, rows: np.ndarray) -> bool:
        return min(len(self.controls), len(rows)) >= self.enough

    def gain(self, rows: np.ndarray) -> tuple[float, float]:
        """What these segments gained over the retained policy, per discounted step, and its standard error; nan, inf:
        too few to say."""
        if not self.knows(rows):
            return math.nan, math.inf
        obtained, error = ratio(self.net[rows], self.weight[rows])
        return float(obtained), math.hypot(error, self.doubt)

    def margin(self, name: str) -> float:
        """By how much the promises in a column exceeded what was gained, per step in which the learner acted, plus its
        standard error [D4]."""
        rows = self.mixed
        excess, error = ratio(self.columns[name][rows] - self.net[rows], self.acted[rows])
        doubt = self.doubt * self.weight[rows].sum() / self.acted[rows].sum()
        return float(max(excess, 0.0) + math.hypot(error, doubt))


class Evaluator(Retention):
    """Who acts, retained pair or learner, and how good each is: in lists of two the first is of the retained pair. It
    decides between segments of one episode, from what the last ones promised and obtained."""

    def __init__(self, learner: Explorer, task: Task, args: Args):
        super().__init__(learner, task, args)
        self.horizon = 1 / (1 - args.gamma)  # effective
        self.scale = float(np.abs(task.data["reward"]).mean()) * self.horizon + 1e-6  # the unit of the limits
        steps = len(task.data["reward"]) / task.episodes
        points = float(steps / self.horizon / task.reward_scale * self.per_return)
        self.per_value = points if self.ends_fail else math.nan  # elsewhere a value counts steps, not successes
        self.fitted = nn.ModuleList(copy.deepcopy(learner.critic) for _ in range(2))
        self.fitted_targets = copy.deepcopy(self.fitted).requires_grad_(False)
        trained = self.fitted.parameters()
        self.optimizer = torch.optim.Adam(trained, args.learning_rate, fused=True, capturable=args.cuda)
        self.graphs = {}  # of `promises`, by the noise
        self.register_buffer("starts", torch.zeros(64, learner.actor.net[0].in_features))  # what episodes begin with
        # Saved, too, as above, but for `segment`: a run is saved between episodes
        self.hold, self.least_hold = 1.0, 0.25  # shares of --hold that the learner is held by [D8]
        self.recovering, self.resets = False, 0  # from a reset [D9]
        self.stable_segments = self.probe_steps = 0
        self.records, self.segment, self.values, self.history = [], [], [], []
        self.margins = [math.inf, math.inf]
        self.value_gain = math.nan  # of the learner over the retained policy; nan: not known

    def begin(self, agent: Agent, starts: list[np.ndarray], score: float) -> None:
        """The online phase begins: what was trained so far, of this score, is retained."""
        self.score = float(score)
        self.retained.warm_start(agent)
        copy_weights(agent.critic, *self.fitted, *self.fitted_targets)
        self.starts.copy_(torch.from_numpy(np.stack(starts)))

    @property
    def active(self) -> int:
        """Whose Q selects."""
        return {"offline": 0, "online": 1}.get(self.args.evaluator, int(self.stable))

    def promises(self, learner: Explorer, obs: Tensor, noise: float) -> Tensor:
        """Both actions in one state, flat. Then the gain of the learner's over the retained one that the more doubtful
        critic of either Q promises, and what either Q expects of its own policy's action: four numbers."""
        actions = torch.stack([self.retained.policy(obs), learner.policy(obs, noise)])
        states, pairs = torch.stack([obs, obs]), (self.retained, learner)
        q = torch.stack([pair.target_critic(states, actions) for pair in pairs])  # pair, critic, action
        return torch.cat([actions.flatten(), (q[..., 1] - q[..., 0]).amin(1), q.mean(1).diagonal()])

    @torch.no_grad()
    def propose(self, learner: Explorer, obs: np.ndarray, noise: float = 0.0) -> tuple[np.ndarray, list[float]]:
        """Both actions (2, action_dim), and the four numbers of `promises`."""
        graphs = self.graphs if self.args.cuda_graph else None
        numbers = in_state(partial(self.promises, learner), obs, noise, self.starts.device, graphs)
        return numbers[:-4].reshape(2, -1), numbers[-4:].tolist()

    def turn(self, gains: list[float], kind: str = "deployed") -> int:
        """Who acts, from what the Qs promise [D4]; a softmax of two is greedy with logistic noise."""
        softmax = self.args.selection == "softmax" and kind == "select"
        noise = np.random.logistic(scale=0.1) if softmax else 0.0
        selected = gains[self.active] > self.margins[self.active] + noise
        return {"probe": 1, "control": 0}.get(kind, int(selected))

    def act(self, learner: Explorer, obs: np.ndarray, t: int = 0) -> np.ndarray:
        """The deployed action: deterministic, and leaves no trace."""
        if self.args.evaluator != "online":
            return self.retained.act(obs)
        actions, gains = self.propose(learner, obs)
        return actions[self.turn(gains)]

    def end_segment(self, learner: Explorer) -> None:
        """Keep what `self.segment` promised and obtained, as a row of `self.records` [D5] [D6]."""
        columns = [np.array(column, np.float32) for column in zip(*self.segment, strict=True)]
        obs, action, next_obs = (torch.from_numpy(column).to(self.starts.device) for column in columns[:3])
        reward, terminated, acted, gains = (column.astype(float) for column in columns[3:])
        own, gamma, ends = int(self.kind == "probe"), self.args.gamma, torch.stack([obs[0], next_obs[-1]])
        pair, discount = (self.retained, learner)[own], gamma ** np.arange(len(reward))
        obtained, rest = discount @ reward, gamma ** len(reward) * (1 - terminated[-1])
        backup = reward + gamma * (1 - terminated) * expect(learner.target_critic, learner, next_obs).mean(0)
        with torch.no_grad():
            td_error = np.abs(backup - learner.target_critic(obs, action).mean(0).cpu().numpy())
        row = {"weight": discount.sum(), "acted": discount @ acted}
        row["promised_by_retained"], row["promised_by_learner"] = (discount * acted) @ gains[:, :2]
        row["gain"] = obtained + expect(self.fitted[0], self.retained, ends).mean(0) @ [-1, rest]
        row["critic_error"] = gains[0, 2 + own] - obtained - rest * expect(pair.target_critic, pair, ends).mean(0)[1]
        row["fitted_error"] = expect(self.fitted[own], pair, ends).mean(0) @ [1, -rest] - obtained
        row["td_error"] = td_error.mean() / self.scale
        alone = self.kind == "control" or self.margins[self.active] == math.inf  # only the retained policy could act
        row["role"] = PROBE if own else WHOLE_CONTROL if self.alone == RETAINED else CONTROL if alone else SELECTED
        row = {name: float(number) for name, number in row.items()}
        self.records = [*self.records[-50 * self.args.window :], row]
        value = float(expect(learner.target_critic, learner, self.starts).mean() / self.scale)
        self.values = [*self.values[-self.args.window :], value]
        self.probe_steps, self.segments, self.segment = self.probe_steps + own * len(reward), self.segments + 1, []

    def fit(self, learner: Explorer, buffer: ReplayBuffer, n: int) -> dict[str, Tensor]:
        """n gradient steps of fitted Q evaluation of both policies, going on from the values so far; returns the last
        loss. Each network has its own target, so that the spread of the two means something [D7]."""
        for _ in range(n):
            batch, loss = buffer.sample(self.args.batch_size, 0.5), 0.0
            for policy, critic, target in zip((self.retained, learner), self.fitted, self.fitted_targets, strict=True):
                with torch.no_grad():
                    next_v = target(batch["next_obs"], policy.actor(batch["next_obs"])[0])
                backup = batch["reward"] + self.args.gamma * (1 - batch["terminated"]) * next_v
                loss = loss + (critic(batch["obs"], batch["action"]) - backup).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            sources, targets = list(self.fitted.parameters()), list(self.fitted_targets.parameters())
            with torch.no_grad():
                torch._foreach_lerp_(targets, sources, self.args.tau)
        return {"fitted_loss": loss.detach()}

    def judge(self, learner: Explorer, buffer: ReplayBuffer, step: int, over: bool) -> dict[str, float]:
        """After a segment, which may end its episode: stability, margins, estimates, proposal, reset, and what the next
        segment is for; returns what to log."""
        args, evidence = self.args, Evidence(self.records, self.args.window)
        due = bool(args.reset_every) and step - self.renewed >= args.reset_every
        log, healthy = self.test_stability(evidence, step)
        log["learner_share"] = evidence.acted[-1] / evidence.weight[-1]

        # What the latest probes gained: in score, by whole episodes, and in value, by segments
        by_score, by_value = self.score_gain(LATEST), evidence.gain(evidence.measured)
        for name, (gain, error) in {"score_gain": by_score, "learner_gain": by_value}.items():
            log |= {name: gain, f"{name}_error": error} if math.isfinite(error) else {}
        better, lost = by_score[0] > by_score[1], by_value[0] < 0 or by_score[0] < -by_score[1]
        self.set_margins(evidence, better)

        # Propose a learner whose values promise that it is better [D7]; a last time before its reset [D9]
        self.value_gain = math.nan
        if evidence.knows(evidence.measured):
            log |= self.evaluate_policies(learner, evidence)
            self.value_gain = log["learner_value"] - log["retained_value"]
            promised = log["learner_lower"] - log["retained_value"]
            ready = (due and not self.parting) or (self.stable and self.segments >= self.next_proposal)
            shown = self.score_of(PROPOSED) - self.score_of(RETAINED) if len(self.returns[PROPOSED]) >= 3 else math.inf
            outgrown = self.stable and self.per_value * promised > shown  # the learner, the copy of it that is tried
            if promised > 0 and not lost and (outgrown or (ready and not self.proving)):
                self.prove(learner)
                self.parting = due
        if due and not self.proving:
            self.reset_learner(learner, buffer, step)
            healthy = False

        # Let the learner go while it is stable, hold it while it is not [D8]
        least = 0.0 if better else self.least_hold
        self.hold = min(max(self.hold * (0.97 if self.stable else 1.1), least), 1.0)
        learner.anchor.fill_(0.0 if args.evaluator == "online" else args.hold * self.hold)
        if args.evaluator == "online":
            self.margins[1] = 0.0  # the new Q has its way [D10]
        self.next_segment(healthy, over)
        log |= {"margin": float(np.clip(self.margins[self.active], -self.scale, self.scale)), "hold": self.hold}
        names = "stable", "recovering", "probe_steps", "proving", "replaced", "restored", "resets"
        return log | {name: getattr(self, name) for name in names}

    def test_stability(self, evidence: Evidence, step: int) -> tuple[dict[str, float], bool]:
        """Of the new Q: what its test measures, and whether TD error and drift are small enough for probes [D5]."""
        args, window, log = self.args, self.args.window, {}
        if len(self.values) > window:
            log["td_error"] = evidence.columns["td_error"][-window:].mean()
            log["drift"] = abs(self.values[-1] - self.values[-1 - window])
        if len(evidence.probes) >= evidence.enough:
            excess = evidence.columns["critic_error"][evidence.probes] / self.scale
            mean, error = ratio(excess, np.ones(len(excess)))
            log["calibration"] = max(mean, 0.0) + error
        limits = {"td_error": args.td_limit, "drift": args.drift_limit}
        healthy = within(log, limits, 2.0)
        passed = within(log, limits | {"calibration": args.calibration_limit}, 2.0 if self.stable else 1.0)
        gain, error = self.score_gain(NO_ONE)
        fell = gain < -2 * error
        if self.stable and fell:  # held by more from now on [D8]
            self.least_hold = min(2 * max(self.hold, 0.25), 1.0)
        elif self.stable and gain >= -error:
            self.least_hold = max(0.97 * self.least_hold, 0.25)
        self.stable = passed and not fell
        self.stable_segments += self.stable
        self.recovering = self.recovering and not self.stable and step - self.renewed < args.reset_every // 2
        return log, healthy

    def set_margins(self, evidence: Evidence, better: bool) -> None:
        """What each Q has to promise before the learner acts [D4]; `better`: its whole episodes gain."""
        self.margins = [math.inf, math.inf]
        if evidence.knows(evidence.mixed):
            self.margins = [evidence.margin("promised_by_retained"), evidence.margin("promised_by_learner")]
        if self.stable:
            self.margins[1] = -math.inf if better else 0.0
        gain, error = evidence.gain(evidence.selected)
        if gain < -error:
            self.margins = [math.inf, math.inf]

    def evaluate_policies(self, learner: Explorer, evidence: Evidence) -> dict[str, float]:
        """Both policies' values at start states, from three sources each, and their standard errors [D7]."""
        log, base = {}, expect(self.fitted[0], self.retained, self.starts).mean()
        sides = ("retained", self.retained, evidence.controls), ("learner", learner, evidence.measured)
        for i, (policy_name, policy, rows) in enumerate(sides):
            sources = {"obtained": self.horizon * evidence.mean("gain", rows) + [base, 0.0]}
            for name, critic in {"critic": policy.target_critic, "fitted": self.fitted[i]}.items():
                value, error = expect(critic, policy, self.starts).mean(1), evidence.mean(f"{name}_error", rows)
                sources[name] = [value.mean(), value.std() + self.horizon * np.abs(error).sum()]
            log[f"{policy_name}_value"], log[f"{policy_name}_error"] = combine(list(sources.values()))
            for name, (value, error) in sources.items():
                log |= {f"{policy_name}_{name}": value, f"{policy_name}_{name}_error": error}
        log["learner_lower"] = log["learner_value"] - self.args.bound_errors * log["learner_error"]
        return log

    def reset_learner(self, learner: Explorer, buffer: ReplayBuffer, step: int) -> None:
        """The learner's weights, and everything that was known of them [D9]."""
        reset(learner, buffer.sample(max(self.args.batch_size, 2), 0.5))
        self.records, self.values = [row for row in self.records if row["role"] < SELECTED], []
        self.margins, self.value_gain = [math.inf, math.inf], math.nan
        self.hold, self.least_hold, self.returns[LATEST:] = 1.0, 0.25, [[], []]
        if self.alone == LATEST:  # nor is its episode the new weights'
            self.alone = NO_ONE
        self.stable, self.recovering, self.parting = False, True, False
        self.renewed, self.resets = step, self.resets + 1

    def next_segment(self, healthy: bool, over: bool) -> None:
        """Its kind: a probe where one may begin or goes on, control, or selected [D1]; `end_episode` may change it."""
        draw = np.random.rand()
        control = self.margins[self.active] < math.inf and draw > 1 - self.args.control_share
        probe = healthy and (draw < self.args.probe_rate or (self.kind == "probe" and not over))
        self.kind = "probe" if probe else "control" if control else "select"
        if not over and self.alone == RETAINED:
            self.kind = "control"
        elif not over and self.alone == LATEST and not probe:
            self.alone = NO_ONE

    def replace(self, learner: Explorer, by: int) -> None:
        """What was measured against the last policy is forgotten, too."""
        super().replace(learner, by)
        if by == PROPOSED:
            for critics in (self.fitted, self.fitted_targets):
                copy_weights(critics[1], critics[0])
        self.margins, self.value_gain, self.least_hold = [math.inf, math.inf], math.nan, 0.25
        for row in self.records:
            row["gain"] = math.nan

    def predicted_score(self) -> float:
        """The learner's score as policy evaluation sees it: by its latest whole episodes, if there are any to speak of,
        else that of the retained policy and the gain in value over it."""
        if math.isfinite(self.score_gain(LATEST)[1]):
            return self.score_of(LATEST)
        return float(self.score + self.per_value * self.value_gain)

    def summary(self) -> dict:
        """For summary.json; rank correlation and bias are those of the learner's predicted scores."""
        from scipy.stats import spearmanr  # here, so that all scripts import the same on top

        predicted, true = np.array(self.history).reshape(-1, 2).T
        known = len(predicted) > 2 and np.ptp(predicted) > 0 and np.ptp(true) > 0
        prediction = {"rank_correlation": float(spearmanr(predicted, true).statistic) if known else None}
        prediction["prediction_bias"] = float(np.mean(predicted - true)) if self.history else None
        prediction["stable_share"] = self.stable_segments / max(self.segments, 1)
        return prediction | {name: getattr(self, name) for name in ("probe_steps", "replaced", "restored", "resets")}

    def get_extra_state(self) -> dict:  # part of state_dict
        types = bool | int | float | str | list
        plain = {key: value for key, value in vars(self).items() if isinstance(value, types) and key != "segment"}
        return plain | {"optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        vars(self).update({key: value for key, value in state.items() if key != "optimizer"})


def run_updates(agent: nn.Module, buffer: ReplayBuffer, n: int, online_share: float | None = None) -> dict[str, Tensor]:
    for _ in range(n):
        losses = agent.update(buffer.sample(agent.args.batch_size, online_share))
    return losses


def evaluate(act, env: gym.Env, task: Task, args: Args) -> dict[str, float]:
    """Mean return (see WRAPPERS) and score of `act(obs, t)`, over the same seeded episodes each time."""
    returns = []
    for episode in range(args.eval_episodes):
        obs, _ = env.reset(seed=1_000_000 + 1_000 * args.seed + episode)
        t, total, over = 0, 0.0, False
        while not over:
            obs, reward, terminated, truncated, info = env.step(act(obs, t))
            t, total, over = t + 1, total + info.get("gain", reward), terminated or truncated
        returns.append(total)
    if args.capture_video:
        env.get_wrapper_attr("stop_recording")()  # writes the film, which would wait for the next evaluation
    mean = float(np.mean(returns))
    return {"return": mean, "normalized_score": task.score(mean)}


def degradation(offline_score: float, steps: list[int], scores: list[float]) -> dict:
    """What fine-tuning cost and gained over the online evaluations; the formulas are in README.md."""
    drops = [max(offline_score - score, 0.0) for score in scores]
    gains = [step for i, step in enumerate(steps[:-2]) if min(scores[i : i + 3]) > offline_score + 10]
    found = {"offline_score": offline_score, "final_score": scores[-1], "lowest_score": min(scores), "drop": max(drops)}
    found |= {"degradation_area": sum(drops) / len(drops)}
    found |= {"regret": min(max(1 - sum(scores) / len(scores) / 100, 0.0), 1.0)}
    return found | {"steps_to_gain": min(gains, default=None)}


def save_file(path: Path, content: dict) -> None:
    """Written under a temporary name, flushed to the disk and renamed: whole or not there; .json as text."""
    with open(path.with_suffix(".part"), "wb") as file:
        if path.suffix == ".json":
            file.write(json.dumps(content, indent=2).encode())
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".part"), path)


def load_file(path: Path, **expected) -> dict:
    """A file of `save_file`, which must agree with `expected`."""
    try:
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch, zip and pickle raise whatever the damage leads to
        fail(f"cannot read {path} ({error!r:.100}); give another, or start anew without it")
    for key, value in expected.items():
        if content.get(key) != value:
            fail(f"{path} is of another run: {key} is {content.get(key)}, here {value}; start with the same, or anew")
    return content


class Run:
    """The run folder: args.json, this script, TensorBoard logs, checkpoint.pt, offline.pt, online.pt, summary.json."""

    def __init__(self, args: Args):
        counts = "offline_steps online_steps eval_every eval_episodes save_every utd_ratio batch_size buffer_size"
        counts += " hidden segment_steps recovery_ratio n_actions gap_every critic_layers actor_layers"
        shares = "tau dropout expectile online_share mixing_ratio replace_confidence reset_share probe_rate"
        shares += " control_share whole_rate"
        amounts = "warmup_steps temperature anchor anchor_open tolerance hold reset_every beta conservative_weight"
        rules = (
            (counts, "be at least 1", lambda v: v >= 1),
            (shares, "lie in [0, 1]", lambda v: 0 <= v <= 1),
            (amounts, "be at least 0", lambda v: v >= 0),
            ("window", "be at least 4", lambda v: v >= 4),
            ("confidence", "lie in [0.5, 1)", lambda v: 0.5 <= v < 1),
            ("gamma", "lie between 0 and 1", lambda v: 0 < v < 1),
            ("learning_rate critic_learning_rate actor_learning_rate initial_std", "be above 0", lambda v: v > 0),
            ("seed", "lie in [0, 2^32)", lambda v: 0 <= v < 2**32),
        )
        for names, rule, holds in rules:
            for name in names.split():
                value = getattr(args, name, None)  # not every script has every one, and None is the task's own
                if value is not None and not holds(value):
                    fail(f"--{name.replace('_', '-')} is {value}; it must {rule}")
        for flag, package in {"track": "wandb", "capture_video": "moviepy"}.items():
            try:
                if getattr(args, flag):
                    importlib.import_module(package)
            except ImportError:
                fail(f"--{flag.replace('_', '-')} needs {package}, which is not installed: pip install {package}")
        if (args.cuda or args.cuda_graph) and not torch.cuda.is_available():
            fail("--cuda and --cuda-graph need a CUDA device, and there is none here; leave them out")
        if args.cuda_graph and not args.cuda:
            fail("--cuda-graph needs --cuda")
        name = Path(args.env_id).stem if args.env_id.endswith(".hdf5") else args.env_id.replace("/", "_")
        self.args, self.dir = args, Path(args.run_dir, f"{name}__{args.exp_name}__{args.seed}")
        if any(path.is_file() for path in (self.dir, *self.dir.parents)):
            fail(f"{self.dir} cannot be made, there is a file in its way; give another --run-dir")
        if self.dir.exists() and not args.resume:
            fail(f"{self.dir} exists; continue it with --resume, or give another --exp-name, --seed or --run-dir")
        self.progress = {"offline_step": 0, "online_step": 0, "episode": 0, "seconds": 0.0, "scores": [], "steps": []}

    def start(self, task: Task, **parts) -> None:
        """Create the folder; or put `parts`, progress and random generators back to where its checkpoint has them."""
        args, progress, self.parts, checkpoint = self.args, self.progress, parts, self.dir / "checkpoint.pt"
        settings = {name: value for name, value in vars(args).items() if name != "resume"}
        settings |= {"dataset_id": task.dataset_id, "script": Path(__file__).stem}
        # What a checkpoint must agree with, all that can change a number; with --, no name of a part
        free = ["save_every", "run_dir", "dataset", "track", "wandb_project_name", "wandb_entity", "capture_video"]
        self.settings = {f"--{name}": value for name, value in settings.items() if name not in free}
        if checkpoint.exists():
            saved = load_file(checkpoint, **self.settings)
            progress.update(saved["progress"])
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            restore = (random.setstate, np.random.set_state, torch.set_rng_state, torch.cuda.set_rng_state_all)
            for set_state, state in zip(restore, saved["rng"], strict=True):
                set_state(state)
        git = ["git", "-C", Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        found = subprocess.run(git, capture_output=True, text=True).stdout if shutil.which("git") else ""
        self.commit = found.strip() or None
        if args.capture_video:
            try:
                env = gym.make(task.env_spec, render_mode="rgb_array")
                env.reset(seed=0)
                env.render()
                env.close()
            except Exception as error:  # whatever environment, MuJoCo and OpenGL raise
                cure = "without a screen, set MUJOCO_GL=egl or MUJOCO_GL=osmesa"
                fail(f"--capture-video: cannot render {task.env_spec.id} ({error!r:.100}); {cure}")
        if args.track:
            import wandb

            names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": self.dir.name}
            known = {"id": progress.get("wandb_id"), "resume": "allow"}  # what is resumed goes on there, too
            try:
                progress["wandb_id"] = wandb.init(**names, **known, config=settings, sync_tensorboard=True).id
            except Exception as error:  # whatever it and the network raise
                fail(f"--track: {error}; run wandb login, or set WANDB_MODE=offline")
        try:
            self.dir.mkdir(parents=True, exist_ok=args.resume)  # the same command, twice at once, ends here
        except OSError as error:
            fail(f"{self.dir} cannot be made ({error.strerror}); give another --run-dir")
        save_file(self.dir / "args.json", settings)
        with contextlib.suppress(shutil.SameFileError):  # the copy itself, run again
            shutil.copy(__file__, self.dir)
        purge = {"offline": progress["offline_step"] + 1, "online": progress["online_step"] + bool(progress["steps"])}
        self.writers = {phase: SummaryWriter(self.dir / phase, purge_step=step) for phase, step in purge.items()}
        for writer in self.writers.values():
            writer.add_text("dataset_id", task.dataset_id)
        self.began, self.saved_at, self.stop = time.time() - progress["seconds"], progress["online_step"], False
        for number in (signal.SIGTERM, signal.SIGUSR1):  # what SLURM sends before it takes the machine away
            signal.signal(number, lambda *_: setattr(self, "stop", True))

    def log(self, phase: str, step: int, values: dict, losses: dict[str, Tensor] | None = None) -> None:
        """TensorBoard scalars at `step`: gradient steps offline, environment steps online, whose scores are kept."""
        tags = {name if "/" in name else f"{phase}/{name}": value for name, value in values.items()}
        tags |= {f"{phase}/losses/{name}": loss for name, loss in (losses or {}).items()}
        for tag, value in tags.items():
            self.writers[phase].add_scalar(tag, value, step)
        if phase == "online" and "normalized_score" in values:
            self.progress["steps"].append(step)
            self.progress["scores"].append(values["normalized_score"])

    def check(self, phase: str, step: int, losses: dict[str, Tensor]) -> None:
        """Stop at once where a loss is not finite."""
        if not all(math.isfinite(loss) for loss in losses.values()):
            bad = ", ".join(f"{name} {float(loss)}" for name, loss in losses.items())
            fail(f"{phase} step {step}: {bad}; the last good state is {self.dir / 'checkpoint.pt'}, if it is there")

    def save(self) -> None:
        """Everything that a bit-exact continuation needs; ends the process where a signal has asked for it."""
        for writer in self.writers.values():
            writer.flush()
        self.progress["seconds"], self.saved_at = time.time() - self.began, self.progress["online_step"]
        kind, keys, *rest = np.random.get_state()
        rng = [random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state()]
        rng.append([torch.cuda.get_rng_state()] if self.args.cuda else [])  # of the GPU used; a machine may have more
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_file(self.dir / "checkpoint.pt", self.settings | parts | {"progress": self.progress, "rng": rng})
        if self.stop:
            print(f"stopped and saved; continue with: {shlex.join(['python', *sys.argv, '--resume'])}")
            sys.exit(0)

    def finish(self, task: Task, **more) -> dict:
        """Save the end, write summary.json and return it."""
        self.stop = False
        self.save()
        args, progress = self.args, self.progress
        updates = args.online_steps * args.utd_ratio + (0 if args.offline_checkpoint else args.offline_steps)
        summary = {name: getattr(args, name) for name in ("env_id", "seed", "offline_steps", "online_steps")}
        summary |= {"algorithm": Path(__file__).stem, "exp_name": args.exp_name}
        summary |= {"dataset_id": task.dataset_id, "eval_env": task.env_spec.id}
        summary |= degradation(progress["offline_score"], progress["steps"], progress["scores"]) | more
        summary |= {"seconds": progress["seconds"], "updates_per_second": updates / progress["seconds"]}
        summary |= {"versions": {name: version(name) for name in ("torch", "gymnasium", "mujoco", "minari", "numpy")}}
        summary |= {"device": "cuda" if args.cuda else "cpu", "commit": self.commit}
        save_file(self.dir / "summary.json", summary)
        print(json.dumps(summary, indent=2))
        return summary


def train(args: Args) -> dict:
    """The whole run; returns what it writes to summary.json."""
    # ---- setup ----
    run = Run(args)
    task = load_task(args)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic CUDA kernels need
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a kernel more for each tensor, which nothing needs
    threads = os.environ.get("OMP_NUM_THREADS", "1")  # one core a run, so that seeds run side by side
    torch.set_num_threads(max(int(threads), 1) if threads.isdecimal() else 1)
    torch.set_flush_denormal(True)  # what is left of Adam's moments of idle weights would be slow
    torch.set_float32_matmul_precision(args.matmul_precision)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if args.cuda else "cpu")
    buffer = ReplayBuffer(task.data, min(args.buffer_size, args.online_steps), device)
    with device:
        agent = Agent(task.data["obs"].shape[1], task.data["action"].shape[1], args)
        learner = Explorer(task.data["obs"].shape[1], task.data["action"].shape[1], args)
        evaluator = Evaluator(learner, task, args)
    identity = {"algorithm": agent.algorithm, "dataset_id": task.dataset_id}
    same = "hidden", "gamma", "dropout", "reward_scale", "reward_bias", "normalize_obs"  # dropout: not in cal_ql
    identity |= {name: vars(args).get(name) for name in same}
    if args.offline_checkpoint:
        pretrained = load_file(Path(args.offline_checkpoint), phase="offline", **identity)
        agent.load_state_dict(pretrained["agent"])
        args.offline_steps = run.progress["offline_step"] = pretrained["offline_steps"]
    run.start(task, agent=agent, buffer=buffer, learner=learner, evaluator=evaluator)
    progress = run.progress
    films = run.dir / "videos" / f"from_{progress['offline_step'] + progress['online_step']}"  # each counts from 0
    eval_env = task.make_env(films if args.capture_video else None)

    # ---- offline ----
    if args.compile:
        agent.loss = torch.compile(agent.loss)
    done, every = progress["offline_step"], (args.eval_every, args.save_every)
    chunk = math.gcd(50, args.offline_steps, *every, done)  # updates per call, or per graph replay
    update = partial(run_updates, agent, buffer, chunk)
    update = CudaGraph(update) if args.cuda_graph else update
    bar = tqdm(range(done + chunk, args.offline_steps + 1, chunk), "offline", unit_scale=chunk)
    for step in bar:
        losses = update()
        run.check("offline", step, losses)
        progress["offline_step"] = step
        if step % args.eval_every == 0 or step == args.offline_steps:
            result = evaluate(agent.act, eval_env, task, args)
            run.log("offline", step, result, losses)
            bar.set_postfix(score=f"{result['normalized_score']:.1f}")
        if run.stop or step % args.save_every == 0:
            run.save()
    if not progress["steps"]:  # not where a resumed run is online already
        offline = {"phase": "offline", "offline_steps": args.offline_steps, "agent": agent.state_dict()}
        save_file(run.dir / "offline.pt", identity | offline)
        result = evaluate(agent.act, eval_env, task, args)
        progress["offline_score"] = result["normalized_score"]
        torch.manual_seed(args.seed)  # online as a run that starts from this offline.pt

    # ---- online ----
    if args.compile:
        learner.loss = torch.compile(learner.loss)
    env, update = task.make_env(), partial(run_updates, learner, buffer, args.utd_ratio, 0.5)  # [D3]
    update = CudaGraph(update) if args.cuda_graph else update
    if not progress["steps"]:
        run.log("online", 0, result | {"learner_score": result["normalized_score"]})
        evaluator.begin(agent, [env.reset(seed=2_000_000 + i)[0] for i in range(64)], result["normalized_score"])
        learner.warm_start(agent)
    fit = partial(evaluator.fit, learner, buffer, max(args.segment_steps // 5, 1))
    fit = CudaGraph(fit) if args.cuda_graph else fit
    over, began, first = True, time.time(), progress["online_step"] + 1
    bar = tqdm(range(first, args.online_steps + 1), "online")
    for step in bar:
        if over:
            # the start state of this episode, which no other seed has
            (obs, _), episode_return = env.reset(seed=args.seed + 2**32 * progress["episode"]), 0.0
        actions, gains = evaluator.propose(learner, obs, noise=float(evaluator.kind != "probe"))  # [D1]
        turn, losses = evaluator.turn(gains, evaluator.kind), {}
        updates = args.recovery_ratio if evaluator.recovering else 1
        for _ in range(updates if evaluator.segments >= args.window else 0):
            losses = update()  # launched before the environment steps: a GPU works meanwhile
        copied = evaluator.alone in (PROPOSED, LATEST)  # [D1] [D7]
        action = evaluator.pairs[evaluator.alone].act(obs) if copied else actions[turn]
        next_obs, reward, terminated, truncated, info = env.step(action)
        row = (obs, action, next_obs, task.transform_reward(reward), terminated)
        buffer.add(*row)
        if evaluator.kind != "trial":
            evaluator.segment.append((*row, turn, gains))
        obs, over, episode_return = next_obs, terminated or truncated, episode_return + info.get("gain", reward)
        run.check("online", step, losses)
        progress["online_step"] = step
        if evaluator.segment and (over or len(evaluator.segment) == args.segment_steps):
            evaluator.end_segment(learner)
            run.check("online", step, fit())
            log = evaluator.judge(learner, buffer, step, over)
            run.log("online", step, {f"evaluator/{name}": value for name, value in log.items()})
        if step % args.eval_every == 0 or step == args.online_steps:
            result = evaluate(partial(evaluator.act, learner), eval_env, task, args)
            result["learner_score"] = evaluate(learner.act, eval_env, task, args)["normalized_score"]
            predicted = evaluator.predicted_score()
            if math.isfinite(predicted):
                result["predicted_score"] = predicted
                evaluator.history.append([predicted, float(result["learner_score"])])
            run.log("online", step, result | {"charts/SPS": (step + 1 - first) / (time.time() - began)}, losses)
            bar.set_postfix(score=f"{result['normalized_score']:.1f}", learner=f"{result['learner_score']:.1f}")
        if over:
            run.log("online", step, {"episodic_return": episode_return})
            evaluator.may_fall = evaluator.may_fall or bool(terminated and evaluator.ends_fail)
            evaluator.end_episode(learner, step, episode_return)
            progress["episode"] += 1
            if run.stop or step - run.saved_at >= args.save_every:
                run.save()
    if not evaluator.stable_segments:
        print("the new Q was never stable; evaluator/* shows which test it failed")

    # ---- finish ----
    parts = {"agent": agent.state_dict(), "learner": learner.state_dict(), "evaluator": evaluator.state_dict()}
    save_file(run.dir / "online.pt", identity | {"phase": "online"} | parts)
    return run.finish(task, **evaluator.summary())


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
