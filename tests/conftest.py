"""Every test gets an empty working folder with a toy Minari dataset in it; nothing here asks the network.

`toy_args`: keyword arguments of any script's `Args` for a run of a second or two on the toy task.
`cli`: a script as its own process, without the seconds that importing torch takes.
`record`, `rollout`: Minari datasets made by hand or from an environment.
"""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SCRIPTS = [path for name in ("jsrl_gated", "sft_reset", "cal_ql", "iql_finetune") for path in ROOT.glob(f"{name}.py")]
OFFICIAL_HDF5 = Path(os.environ.get("D4RL_DATASET_DIR", "~/.d4rl/datasets")).expanduser()  # where real files may lie

import minari  # noqa: E402
import toy_env  # noqa: E402
from minari.data_collector import EpisodeBuffer  # noqa: E402

TOY_ID = "o2o/toy/medium-v0"


def stack(items: list):
    """A list of observations as one array, dictionaries key by key."""
    return {key: stack([i[key] for i in items]) for key in items[0]} if isinstance(items[0], dict) else np.array(items)


def rollout(env: gym.Env, policy, episodes: int, seed: int = 0) -> list[EpisodeBuffer]:
    """Whole episodes of `policy(obs)`."""
    buffers = []
    for episode in range(episodes):
        obs, over = [env.reset(seed=seed + episode)[0]], False
        steps = []
        while not over:
            action = policy(obs[-1])
            next_obs, reward, terminated, truncated, _ = env.step(action)
            obs.append(next_obs)
            steps.append((action, float(reward), bool(terminated), bool(truncated)))
            over = terminated or truncated
        action, *rest = zip(*steps, strict=True)
        buffers.append(EpisodeBuffer(None, None, None, stack(obs), np.array(action), *map(list, rest)))
    return buffers


def record(dataset_id: str, spec: gym.envs.registration.EnvSpec, episodes: list[EpisodeBuffer], **references) -> Path:
    """Write `episodes` as a local Minari dataset; returns its folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(dataset_id, episodes, env=gym.make(spec), **references)
    return Path(os.environ["MINARI_DATASETS_PATH"], dataset_id)


def mean_return(episodes: list[EpisodeBuffer]) -> float:
    return float(np.mean([sum(episode.rewards) for episode in episodes]))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory) -> Path:
    """A Minari folder with the toy dataset: from straight to the origin to anywhere; score 0 random, 100 straight."""
    folder, rng, env = tmp_path_factory.mktemp("minari"), np.random.default_rng(0), gym.make(toy_env.TOY)
    straight = rollout(env, lambda x: -2 * x / np.linalg.norm(x), 20)
    anywhere = rollout(env, lambda x: rng.uniform(-2, 2, 2), 20)
    half = rollout(env, lambda x: np.clip(-x / np.linalg.norm(x) + rng.normal(0, 1.5, 2), -2, 2), 40, seed=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINARI_DATASETS_PATH", str(folder))
        score = {"ref_min_score": mean_return(anywhere), "ref_max_score": mean_return(straight)}
        record(TOY_ID, toy_env.TOY, half + anywhere[:10], **score)
    return folder


@pytest.fixture(autouse=True)
def sandbox(tmp_path, monkeypatch, toy_folder):
    """Data folders of this test alone; what `train` sets for its whole process is put back."""
    shutil.copytree(toy_folder, tmp_path / "minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def toy_args(tmp_path) -> dict:
    return {
        "env_id": TOY_ID, "dataset": "official", "run_dir": str(tmp_path / "runs"), "cuda": False,
        "hidden": 16, "batch_size": 32, "offline_steps": 40, "online_steps": 120,
        "eval_every": 20, "eval_episodes": 2, "save_every": 40,
    }  # fmt: skip


def flags(args: dict) -> list[str]:
    """`args` as command-line words."""
    words = []
    for name, value in args.items():
        name = name.replace("_", "-")
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


class Cli:
    """Processes that run a script as `python SCRIPT FLAGS` would, forked from one that has torch imported."""

    def __init__(self, folder: Path):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.folder, self.count, self.processes = folder, 0, []
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["iql_finetune", "toy_env"])

    def start(self, script: Path, args: dict | list[str]):
        self.count += 1
        log = self.folder / f"log{self.count}.txt"
        log.touch()
        argv = [str(script), *(flags(args) if isinstance(args, dict) else args)]
        target = (argv, dict(os.environ), str(self.folder), str(log))
        process = self.context.Process(target=toy_env.run_script, args=target)
        process.start()
        process.log = log
        self.processes.append(process)
        return process

    def __call__(self, script: Path, args: dict | list[str], timeout: float = 600) -> tuple[int, str]:
        """Exit code and output, of a run that ends by itself."""
        process = self.start(script, args)
        process.join(timeout)
        assert process.exitcode is not None, f"still running after {timeout} s:\n{process.log.read_text()}"
        return process.exitcode, process.log.read_text()


@pytest.fixture
def cli(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")  # put back afterwards
    runner = Cli(tmp_path)
    yield runner
    for process in runner.processes:
        if process.is_alive():
            process.kill()
        process.join()
