"""Offline updates/s and online environment steps/s of each script, and the share of the machine's own limit.

    ./benchmark.sh speed --scripts iql_finetune cal_ql --modes eager compile --threads 1

The limit is what a 256x256x256 matmul, timed in the same run at the same threads and precision, leaves for the matmuls
of one update. Hopper's sizes, and Hopper-v4 online; on the CUDA device if there is one.
"""

import atexit
import contextlib
import importlib
import io
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer
from torch.utils.flop_counter import FlopCounterMode

OBS, ACTION, N = 11, 3, 100_000  # hopper's sizes
ENV_ID = "o2o/hopper/speed-v0"
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

Script = Literal["iql_finetune", "jsrl_gated", "sft_reset", "cal_ql"]
Mode = Literal["eager", "compile", "graph", "compile+graph"]
Precision = Literal["highest", "high", "medium"]


@dataclass
class Args:
    scripts: tuple[Script, ...] = ("iql_finetune", "jsrl_gated", "sft_reset", "cal_ql")
    modes: tuple[Mode, ...] = ("eager", "compile", "graph", "compile+graph") if CUDA else ("eager", "compile")
    precisions: tuple[Precision, ...] = ("highest", "medium")  # --matmul-precision; highest is float32
    threads: tuple[int, ...] = (1, 2)  # of PyTorch; not used with CUDA
    seconds: float = 5.0  # of each offline measurement
    online_steps: int = 1500  # of each online measurement, the last two thirds timed
    json: bool = False  # one JSON list instead of a table


def rate(fn: Callable, per_call: int, seconds: float) -> float:
    """Calls of `fn` per second, times `per_call`, after five calls of warm-up (compilation, capture)."""
    for _ in range(5):
        fn()
    sync, calls = torch.cuda.synchronize if CUDA else lambda: None, 0
    sync()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        fn()
        calls += 1
        sync()
    return per_call * calls / (time.perf_counter() - began)


def offline(script: ModuleType, args, mode: Mode, seconds: float) -> tuple[float, int]:
    """Updates/s as in `train`'s offline phase, and the matmul FLOPs of one of them."""
    rng, dims = np.random.default_rng(0), {"obs": OBS, "next_obs": OBS, "action": ACTION}
    data = {key: rng.uniform(-1, 1, (N, dims[key]) if key in dims else N) for key in script.ReplayBuffer.keys}
    data = {key: value.astype(np.float32) for key, value in data.items()} | {"terminated": np.zeros(N, np.float32)}
    buffer = script.ReplayBuffer(data, 1_000, DEVICE)
    with DEVICE:
        agent = script.Agent(OBS, ACTION, args)
    with FlopCounterMode(display=False) as counter:
        agent.update(buffer.sample(args.batch_size))
    agent.loss = torch.compile(agent.loss) if "compile" in mode else agent.loss
    chunk = 50 if "graph" in mode else 10
    update = partial(script.run_updates, agent, buffer, chunk)
    update = script.CudaGraph(update) if "graph" in mode else update
    return rate(update, chunk, seconds), counter.get_total_flops()


def online(script: ModuleType, args) -> float:
    """Environment steps/s of `train`'s online phase, of its last two thirds."""
    times, check = [], script.Run.check  # of steps with an update; cal_ql makes an episode's updates in a row, as many

    def timed(run, phase: str, step: int, losses: dict) -> None:
        check(run, phase, step, losses)
        if phase == "online" and "critic_loss" in losses:
            times.append(time.perf_counter())

    script.Run.check = timed
    out = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as args.run_dir:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                script.train(args)
    finally:
        script.Run.check = check
    third = len(times) // 3
    return (len(times) - 1 - third) / (times[-1] - times[third])


def toy_dataset() -> None:
    """2,000 steps of a random policy in Hopper-v4, as a local Minari dataset that is deleted at the end."""
    os.environ["MINARI_DATASETS_PATH"] = folder = tempfile.mkdtemp(prefix="speed-")
    atexit.register(shutil.rmtree, folder)
    env, buffers, n = gym.make("Hopper-v4"), [], 0
    env.action_space.seed(0)
    while n < 2_000:
        obs, over, rows = [env.reset(seed=n)[0]], False, []
        while not over:
            action = env.action_space.sample()
            next_obs, reward, terminated, truncated, _ = env.step(action)
            obs.append(next_obs)
            rows.append((action, reward, terminated, truncated))
            over, n = terminated or truncated, n + 1
        names = "actions", "rewards", "terminations", "truncations"
        columns = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
        buffers.append(EpisodeBuffer(id=len(buffers), observations=np.array(obs), **columns))
    with contextlib.redirect_stderr(io.StringIO()):
        minari.create_dataset_from_buffers(ENV_ID, buffers, env=env, ref_min_score=-20.3, ref_max_score=3234.3)


def measure(cli: Args, name: Script, mode: Mode, threads: int, precision: Precision, limit: float) -> dict:
    """One row of the table; `limit` is the machine's, in FLOP/s."""
    script = importlib.import_module(name)
    settings = dict(env_id=ENV_ID, cuda=CUDA, compile="compile" in mode, cuda_graph="graph" in mode)
    settings |= dict(offline_steps=50, online_steps=cli.online_steps, matmul_precision=precision)
    args = script.Args(**settings, eval_every=10**6, eval_episodes=1, save_every=10**6)
    for wait in {"warmup_steps", "window"} & set(vars(args)):  # before the phase that is timed
        setattr(args, wait, 2)
    domain = args.domain_values["any"] | args.domain_values["locomotion"]  # which train() finds itself
    row = {"script": name, "mode": mode, "threads": threads, "precision": precision}
    try:
        row["updates_per_s"], flops = offline(script, replace(args, **domain), mode, cli.seconds)
        torch.set_num_threads(threads)
        row["steps_per_s"] = online(script, args)
        row |= {"gflop_per_update": flops / 1e9, "limit_updates_per_s": limit / flops}
        row["share_of_limit"] = row["updates_per_s"] * flops / limit
    except (Exception, SystemExit) as error:  # one that cannot run does not hide the others
        row["error"] = repr(error)[:200]
    return row


def main(cli: Args) -> None:
    if not CUDA and any("graph" in mode for mode in cli.modes):
        print("error: --modes: a graph needs a CUDA device, and there is none here", file=sys.stderr)
        sys.exit(2)
    warnings.simplefilter("ignore")
    toy_dataset()
    rows = []
    for threads, precision in itertools.product((1,) if CUDA else cli.threads, cli.precisions):
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(256, 256, device=DEVICE) for _ in range(2))
        limit = 2 * 256**3 * rate(lambda a=a, b=b: [a @ b for _ in range(50)], 50, min(cli.seconds, 2))
        for name, mode in itertools.product(cli.scripts, cli.modes):
            rows.append(row := measure(cli, name, mode, threads, precision, limit))
            done = row.get("error") or f"{row['updates_per_s']:.0f} updates/s, {row['steps_per_s']:.0f} steps/s"
            print(f"{name} {mode} threads={threads} {precision}: {done}", file=sys.stderr)
    if cli.json:
        print(json.dumps(rows, indent=2))
        return
    print(f"\nPyTorch {torch.__version__} on {torch.cuda.get_device_name() if CUDA else 'CPU'}\n")
    columns = "script", "mode", "threads", "precision", "offline updates/s", "online steps/s", "GFLOP/update"
    print("|", " | ".join([*columns, "limit updates/s", "share"]), "|")
    print("|-|-|-|-|-|-|-|-|-|")
    digits = dict(updates_per_s=0, steps_per_s=0, gflop_per_update=2, limit_updates_per_s=0, share_of_limit=2)
    for row in rows:
        words = [str(row[key]) for key in ("script", "mode", "threads", "precision")]
        numbers = [f"{row.get(key, float('nan')):.{n}f}" for key, n in digits.items()]
        print("|", " | ".join(words + numbers), "|")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
