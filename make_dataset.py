"""Stand-in datasets for the days when the official ones cannot be reached, and the behaviour policies they come from.

    python make_dataset.py train --env hopper                train SAC, keep the checkpoints whose returns match D4RL's
    python make_dataset.py collect --env-id hopper-medium    roll a kept policy out: Minari dataset o2o/hopper/medium-v1

Stand-ins follow D4RL's recipe but are not D4RL's data: their ids begin with `o2o/` and their descriptions say so.
What is in one depends on --env-id, --steps and --seed alone, to the bit, not on the number of workers nor on the
processor, with MuJoCo, Gymnasium and numpy as pinned.
"""

import contextlib
import difflib
import fcntl
import functools
import io
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NoReturn
from unittest import mock

import gymnasium as gym
import numpy as np

POLICY_DIR = Path(__file__).resolve().parent / "policies"
ENVS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4"}
# Mean episode return of D4RL's -v2 datasets, which a stand-in's behaviour policy must match within 10 %.
TARGETS = {
    "hopper": {"random": 18.40, "medium": 1422.06, "expert": 3511.36, "medium-expert": 2089.88},
    "walker2d": {"random": 1.87, "medium": 2852.09, "expert": 4920.51, "medium-expert": 3796.57},
    "halfcheetah": {"random": -288.80, "medium": 4770.34, "expert": 10656.43, "medium-expert": 7713.38},
}
# Returns of D4RL's random and expert policies: normalised score = 100 * (return - random) / (expert - random).
REFERENCE = {"hopper": (-20.272305, 3234.3), "walker2d": (1.629008, 4592.3), "halfcheetah": (-280.178953, 12135.0)}
# Share of SAC's own exploration noise with which a kind is collected. D4RL's experts are nearly deterministic (their
# returns spread by 3-9 %), which SAC's noise is not after the few steps that fit on a small machine.
NOISE = {"medium": 1.0, "expert": 0.3}
MAZES = {"umaze": "PointMaze_UMaze-v3", "medium": "PointMaze_Medium-v3", "large": "PointMaze_Large-v3"}
# D4RL's action noise on its maze controller and, our addition, the share of random turns. The noise alone never fails;
# with random turns 15 to 30 % of the episodes run out of time, and most others take detours that offline RL can avoid.
MAZE_NOISE, WRONG_TURNS = 0.5, 0.5


class Policy:
    """The squashed-Gaussian SAC actor in numpy: one observation in, one action out.

    The last bits of a matmul, exp or tanh are each processor's own, and a trajectory soon differs with them. So
    actions are computed in float64 and rounded to 1/4096, far coarser than those bits: the same everywhere.
    """

    def __init__(self, params: dict[str, np.ndarray]):
        self.params = params
        self.n_hidden = sum(key.startswith("w") for key in params) - 2

    @classmethod
    def from_sbx(cls, model) -> "Policy":
        layers = model.policy.actor_state.params["params"]
        pairs = [(np.asarray(layer["kernel"]), np.asarray(layer["bias"])) for _, layer in sorted(layers.items())]
        return cls({f"{k}{i}": x for i, pair in enumerate(pairs) for k, x in zip("wb", pair, strict=True)})

    @classmethod
    @functools.cache
    def load(cls, name: str) -> tuple["Policy", dict[str, float]]:
        """A kept policy, and what is known of it: step, seed, noise, mean and std of 100 returns."""
        with np.load(POLICY_DIR / f"{name}.npz") as file:
            params = {key: file[key].astype(np.float64) for key in file.files if key[1:].isdigit()}
            return cls(params), {key: file[key].item() for key in file.files if key not in params}

    def __call__(self, obs: np.ndarray, rng: np.random.Generator, noise: float) -> np.ndarray:
        p, x = self.params, obs
        for i in range(self.n_hidden):
            x = np.maximum(x @ p[f"w{i}"] + p[f"b{i}"], 0)
        i = self.n_hidden
        mean, log_std = x @ p[f"w{i}"] + p[f"b{i}"], x @ p[f"w{i + 1}"] + p[f"b{i + 1}"]
        std = np.exp(np.clip(log_std, -20, 2))
        action = np.tanh(mean + noise * std * rng.standard_normal(mean.shape))
        return (np.rint(4096 * action) / 4096).astype(np.float32)


def returns_of(policy: Policy, env: gym.Env, noise: float, episodes: int, seed: int) -> np.ndarray:
    """Undiscounted returns of `episodes` seeded episodes, shape (episodes,)."""
    rng, returns = np.random.default_rng(seed), np.zeros(episodes)
    for i in range(episodes):
        (obs, _), over = env.reset(seed=seed + i), False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(policy(obs, rng, noise))
            returns[i] += reward
            over = terminated or truncated
    return returns


@dataclass
class Train:
    """Train SAC (sbx, JAX) and keep the checkpoint nearest to each of D4RL's mean returns."""

    env: Literal["hopper", "walker2d", "halfcheetah"] = "hopper"
    kinds: tuple[str, ...] = ("medium", "expert")  # stop when every one of them is matched within 3 %
    steps: int = 3_000_000  # environment steps, one gradient step each
    seed: int = 0
    eval_every: int = 10_000
    out: Path = POLICY_DIR


def train(args: Train) -> None:
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    from sbx import SAC  # a development dependency: whoever only collects does not need JAX

    env, eval_env = gym.make(ENVS[args.env]), gym.make(ENVS[args.env])
    # CleanRL's SAC learning rates; 128 units and 128 steps per compiled call, because they are 3x faster on one core.
    model = SAC("MlpPolicy", env, learning_rate=3e-4, qf_learning_rate=1e-3, learning_starts=5_000, train_freq=128,
                gradient_steps=128, policy_kwargs={"net_arch": [128, 128]}, seed=args.seed)  # fmt: skip
    error = dict.fromkeys(args.kinds, 0.10)  # relative distance to the target of the best checkpoint so far
    while model.num_timesteps < args.steps:
        model.learn(args.eval_every, reset_num_timesteps=False)  # up to the next whole 128
        policy, step = Policy.from_sbx(model), model.num_timesteps
        for kind in args.kinds:
            target = TARGETS[args.env][kind]
            returns = returns_of(policy, eval_env, NOISE[kind], 10, seed=10_000)
            result = f"{returns.mean():.0f} +- {returns.std():.0f}"
            print(f"{args.env} step {step} {kind} {result} target {target:.0f}", flush=True)
            if error[kind] <= 0.03 or abs(returns.mean() / target - 1) > 0.15:
                continue
            returns = returns_of(policy, eval_env, NOISE[kind], 100, seed=20_000)
            if (distance := abs(returns.mean() / target - 1)) < error[kind]:
                error[kind] = distance
                meta = {"step": step, "seed": args.seed, "noise": NOISE[kind]}
                meta |= {"mean": returns.mean(), "std": returns.std()}  # over 100 episodes
                np.savez(args.out / f"{args.env}-{kind}.npz", **policy.params, **meta)
                print(f"kept {args.env}-{kind}: {meta}", flush=True)
        if all(e <= 0.03 for e in error.values()):
            return


class WaypointController:
    """D4RL's maze behaviour: the shortest path over the cells, a PD controller to the next one, Gaussian noise."""

    def __init__(self, maze, rng: np.random.Generator):
        self.maze, self.rng, self.cell = maze, rng, None

    def __call__(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        position, velocity = np.split(obs["observation"], 2)
        if self.cell is None:
            self.cell, self.waypoint = tuple(self.maze.cell_xy_to_rowcol(position)), position
            self.goal = tuple(self.maze.cell_xy_to_rowcol(obs["desired_goal"]))
            self.distance, queue = {self.goal: 0}, [self.goal]
            for cell in queue:  # breadth first: the queue grows while it is read
                new = [n for n in self.neighbours(cell) if n not in self.distance]
                self.distance |= dict.fromkeys(new, self.distance[cell] + 1)
                queue += new
        if self.cell != self.goal and np.linalg.norm(position - self.waypoint) < 0.1:
            cells, wrong = self.neighbours(self.cell), self.rng.random() < WRONG_TURNS
            self.cell = cells[self.rng.integers(len(cells))] if wrong else min(cells, key=self.distance.get)
            self.waypoint = self.maze.cell_rowcol_to_xy(self.cell) + self.rng.uniform(-0.1, 0.1, 2)
        target = obs["desired_goal"] if self.cell == self.goal else self.waypoint
        action = 10 * (target - position) - velocity + MAZE_NOISE * self.rng.standard_normal(2)
        return np.clip(action, -1, 1).astype(np.float32)

    def neighbours(self, cell: tuple[int, int]) -> list[tuple[int, int]]:
        around = [(cell[0] + i, cell[1] + j) for i, j in ((1, 0), (-1, 0), (0, 1), (0, -1))]
        return [(i, j) for i, j in around if self.maze.maze_map[i][j] != 1]


@functools.cache
def make_env(env: str, kind: str) -> gym.Env:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # advice on versions and other tasks
        warnings.simplefilter("ignore")
        if env in ENVS:
            return gym.make(ENVS[env])
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        # D4RL's maze2d goes on after the goal is reached; here reaching it terminates the episode, with a reward of 1.
        world = gym.make(MAZES[kind], continuing_task=False, reward_type="sparse")
        Path(world.unwrapped.tmp_xml_file_path).unlink(missing_ok=True)  # which it would leave behind
        return world


def rollout(env: str, kind: str, seed: int, index: int) -> dict:
    """Episode `index`, a function of the arguments alone, in Minari's layout: T actions and rewards, T + 1 obs."""
    world, rng = make_env(env, kind), np.random.default_rng([seed, index, *kind.encode()])
    if env == "pointmaze":
        act = WaypointController(world.unwrapped.maze, rng)
    elif kind == "random":
        low, high = world.action_space.low, world.action_space.high
        act = lambda obs: rng.uniform(low, high).astype(np.float32)  # noqa: E731
    else:
        policy, about = Policy.load(f"{env}-{kind}")
        act = functools.partial(policy, rng=rng, noise=about["noise"])
    reset_seed, terminated, truncated = int(rng.integers(2**31)), False, False
    obs, actions, rewards = [world.reset(seed=reset_seed)[0]], [], []
    while not (terminated or truncated):
        actions.append(act(obs[-1]))
        next_obs, reward, terminated, truncated, _ = world.step(actions[-1])
        obs.append(next_obs)
        rewards.append(float(reward))
    flags = np.zeros((2, len(rewards)), dtype=bool)
    flags[:, -1] = terminated, truncated
    columns = {k: np.stack([o[k] for o in obs]) for k in obs[0]} if isinstance(obs[0], dict) else np.stack(obs)
    episode = {"seed": reset_seed, "observations": columns, "actions": np.stack(actions), "rewards": np.array(rewards)}
    return episode | {"terminations": flags[0], "truncations": flags[1]}


def in_order(job: Callable[[int], dict], workers: int) -> Iterator[dict]:
    """job(0), job(1), ... without end, computed at most two a worker ahead."""
    # One thread each: together they fill the cores, and a sum split over threads would differ in its last bits.
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1"):
        pool = multiprocessing.get_context("spawn").Pool(workers, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with pool:
        ahead = deque()
        for index in itertools.count():
            ahead.append(pool.apply_async(job, (index,)))
            if index >= 2 * workers:
                yield ahead.popleft().get(timeout=600)  # a worker that the system killed must not hang us for ever


def shortened(x, surplus: int):
    """An episode, a nested dict of arrays, without its last transitions."""
    if isinstance(x, dict):
        return {key: shortened(value, surplus) for key, value in x.items()}
    return x[:-surplus] if isinstance(x, np.ndarray) else x


def save(dataset_id: str, env: gym.Env, episodes: list[dict], **about) -> None:
    """Write the dataset to a hidden folder beside its place, and rename it when it is whole."""
    import minari
    from minari.storage import get_dataset_path

    final, namespace = get_dataset_path(dataset_id), dataset_id.rsplit("/", 1)[0]
    buffers = [minari.data_collector.EpisodeBuffer(**episode) for episode in episodes]
    with tempfile.TemporaryDirectory(prefix=".o2o-", dir=get_dataset_path()) as hidden, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Minari's advice on optional fields
        with mock.patch.dict(os.environ, MINARI_DATASETS_PATH=hidden):  # Minari takes its folder from there only
            minari.create_dataset_from_buffers(dataset_id, buffers, env=env.spec, author="CleanO2O", **about)
        with contextlib.suppress(ValueError):  # there already
            minari.namespace.create_namespace(namespace, "Stand-ins for D4RL's datasets, built by make_dataset.py")
        try:
            os.replace(Path(hidden) / dataset_id, final)
        except OSError:
            if not final.exists():  # otherwise another process was faster
                raise


def plot(returns: np.ndarray, d4rl: float | None, title: str, path: Path) -> None:
    """Histogram of episode returns, with the mean of D4RL's dataset as a line."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4))).subplots()
    axes.hist(returns, bins=60)
    axes.axvline(returns.mean(), color="black", label=f"mean {returns.mean():.1f}")
    if d4rl is not None:
        axes.axvline(d4rl, color="red", linestyle="--", label=f"D4RL's mean {d4rl:.1f}")
    axes.set(xlabel="episode return", ylabel="episodes", title=title)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def available() -> list[str]:
    """Tasks that a stand-in can be built for: the random and scripted ones, and those whose policies are here."""
    names = [f"pointmaze-{kind}" for kind in MAZES] + [f"{env}-random" for env in ENVS]
    names += [path.stem for path in POLICY_DIR.glob("*.npz")]
    names += [f"{env}-medium-expert" for env in ENVS if {f"{env}-medium", f"{env}-expert"} <= set(names)]
    return sorted(names)


def fail(message: str) -> NoReturn:
    print(f"make_dataset.py: {message}", file=sys.stderr)
    raise SystemExit(2)


@dataclass
class Collect:
    """Roll a behaviour policy out into a Minari dataset, o2o/ENV/KIND-v1, in Minari's own folder."""

    env_id: str = "hopper-medium"  # ENV-KIND: hopper-{random,medium,expert,medium-expert}, ..., pointmaze-{umaze,...}
    steps: int = 1_000_000  # transitions in the dataset; medium-expert takes half of them from each policy
    seed: int = 0
    workers: int = os.cpu_count() or 1  # processes
    plot: Path | None = None  # save a histogram of the episode returns here, beside D4RL's mean


def collect(args: Collect) -> str:
    """Build the dataset unless it is there; return its Minari id. A bad request ends in one line and exit code 2."""
    if args.env_id not in (names := available()):
        near = ", ".join(difflib.get_close_matches(args.env_id, names, 3)) or "none"
        why = "replay buffers were not kept" if args.env_id.endswith("-replay") else "no such behaviour policy here"
        fail(f"no stand-in for --env-id {args.env_id}: {why}. Nearest: {near}. There are: {', '.join(names)}")
    if args.steps < 1 or args.workers < 1 or args.seed < 0:
        fail(f"--steps {args.steps} and --workers {args.workers} must be at least 1, --seed {args.seed} at least 0")
    import minari
    from minari.storage import get_dataset_path
    from tqdm import tqdm

    env, kind = args.env_id.split("-", 1)
    dataset_id, d4rl, began = f"o2o/{env}/{kind}-v1", TARGETS.get(env, {}).get(kind), time.time()
    lock = open(Path(tempfile.gettempdir(), f"{dataset_id.replace('/', '_')}-{os.getuid()}.lock"), "w")  # noqa: SIM115
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this function returns; no worker inherits it
    except OSError:
        print(f"another process is building {dataset_id}; waiting for it", flush=True)
        fcntl.lockf(lock, fcntl.LOCK_EX)
    if (final := get_dataset_path(dataset_id)).exists():
        dataset = minari.load_dataset(dataset_id)
        print(f"{dataset_id} is there with {dataset.total_steps:,} steps (to build it anew, delete {final})")
        if args.plot:
            plot(np.array([episode.rewards.sum() for episode in dataset]), d4rl, dataset_id, args.plot)
        return dataset_id
    kinds, episodes = ["medium", "expert"] if kind == "medium-expert" else [kind], []
    bar = tqdm(total=args.steps, desc=dataset_id, unit="step", unit_scale=True, mininterval=1)
    steps = 0
    for part, one in enumerate(kinds, start=1):
        with contextlib.closing(in_order(functools.partial(rollout, env, one, args.seed), args.workers)) as stream:
            while (missing := args.steps * part // len(kinds) - steps) > 0:
                episode = next(stream)
                if (surplus := len(episode["rewards"]) - missing) > 0:
                    episode = shortened(episode, surplus)
                    episode["truncations"][-1] = True
                episodes.append(episode)
                steps += len(episode["rewards"])
                bar.update(len(episode["rewards"]))
    bar.close()
    if env == "pointmaze":
        source = f"waypoint controller, action noise {MAZE_NOISE}, {WRONG_TURNS:.0%} random turns, ends at the goal"
    else:
        files = [f"policies/{env}-{one}.npz {Policy.load(f'{env}-{one}')[1]}" for one in kinds if one != "random"]
        source = "SAC, " + ", then ".join(files) if files else "uniformly random actions"
    versions = ", ".join(f"{name} {version(name)}" for name in ("gymnasium", "mujoco", "numpy"))
    save(
        dataset_id,
        make_env(env, kind),
        episodes,
        algorithm_name=source.split(",")[0],
        ref_min_score=REFERENCE.get(env, (0.0, 1.0))[0],
        ref_max_score=REFERENCE.get(env, (0.0, 1.0))[1],
        description=f"STAND-IN for D4RL's {args.env_id}, not D4RL's data: {args.steps:,} steps, seed {args.seed}, "
        f"from {source}; {versions}; built by make_dataset.py",
    )
    returns = np.array([episode["rewards"].sum() for episode in episodes])
    ends = ", ".join(f"{sum(e[end][-1] for e in episodes)} {end}" for end in ("terminations", "truncations"))
    print(f"{dataset_id}: {args.steps:,} steps in {time.time() - began:.0f} s, {len(episodes)} episodes, {ends}")
    print(f"{dataset_id}: return {returns.mean():.2f} +- {returns.std():.2f}, D4RL's dataset has {d4rl}")
    if args.plot:
        plot(returns, d4rl, dataset_id, args.plot)
    return dataset_id


if __name__ == "__main__":
    import tyro

    for number in (signal.SIGINT, signal.SIGTERM):  # leave through every `with`: nothing half-written stays
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    command = tyro.cli(Train | Collect, description=__doc__)
    train(command) if isinstance(command, Train) else collect(command)
