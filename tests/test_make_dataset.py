"""Stand-in datasets: what is in them, that they are whole or absent, and that the kept policies match D4RL's returns.

`python tests/test_make_dataset.py` rewrites the table of policies/README.md from the policy files.
"""

import itertools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import minari
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import make_dataset  # noqa: E402
from make_dataset import POLICY_DIR, REFERENCE, TARGETS, Collect, Policy, collect  # noqa: E402

README = POLICY_DIR / "README.md"
TABLE = ("<!-- table -->\n", "<!-- end of table -->\n")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty Minari folder; it does not exist yet."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "stand-ins"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where the locks are, which real builds have too
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "stand-ins"


@pytest.fixture
def one_process(monkeypatch):
    """Rollouts in this process, where no worker has to be started and patches are seen."""
    monkeypatch.setattr(make_dataset, "in_order", lambda job, workers: (job(i) for i in itertools.count()))


def leaves(episode):
    obs = episode.observations if isinstance(episode.observations, dict) else {"": episode.observations}
    return [*obs.values(), episode.actions, episode.rewards, episode.terminations, episode.truncations]


def check_flags(dataset, steps):
    """Exactly `steps` transitions, T + 1 observations, an end at every last step and at no other."""
    assert dataset.total_steps == steps == sum(len(e.rewards) for e in dataset)
    for episode in dataset:
        *obs, actions, rewards, terminated, truncated = leaves(episode)
        assert len(actions) == len(rewards) == len(terminated) == len(truncated)
        assert all(len(o) == len(rewards) + 1 for o in obs)
        assert (terminated | truncated).tolist() == [False] * (len(rewards) - 1) + [True]


def test_random_hopper_is_a_whole_minari_dataset_whatever_the_workers(root, monkeypatch, capsys):
    plot = root.parent / "plots" / "returns.png"
    dataset_id = collect(Collect(env_id="hopper-random", steps=2_000, workers=2, plot=plot))
    assert dataset_id == "o2o/hopper/random-v1" and list(minari.list_local_datasets()) == [dataset_id]
    assert [path.name for path in root.iterdir()] == ["o2o"]  # no hidden leftovers
    assert plot.read_bytes().startswith(b"\x89PNG")

    dataset = minari.load_dataset(dataset_id)
    metadata = dataset.storage.metadata
    assert (metadata["ref_min_score"], metadata["ref_max_score"]) == REFERENCE["hopper"]
    assert metadata["description"].startswith("STAND-IN for D4RL's hopper-random, not D4RL's data")
    assert metadata["author"] == {"CleanO2O"} and metadata["algorithm_name"] == "uniformly random actions"
    assert minari.get_normalized_score(dataset, np.array([3234.3])) == pytest.approx(1.0)
    check_flags(dataset, 2_000)
    episodes = list(dataset)
    assert len(episodes) > 50 and all(e.terminations[-1] and not e.truncations[-1] for e in episodes[:-1])
    assert episodes[-1].truncations[-1] and not episodes[-1].terminations[-1]  # cut by --steps
    actions = np.concatenate([e.actions for e in episodes])
    assert np.abs(actions).max() <= 1 and np.abs(actions.mean(0)).max() < 0.1
    assert actions.std() == pytest.approx(3**-0.5, rel=0.05)  # uniform on [-1, 1]

    env, seed = dataset.recover_environment(), next(dataset.storage.get_episode_metadata([3]))["seed"]
    obs = [env.reset(seed=seed)[0]]
    for action, reward in zip(episodes[3].actions, episodes[3].rewards, strict=True):
        next_obs, got, *_ = env.step(action)
        obs.append(next_obs)
        assert got == reward
    assert env.spec.id == "Hopper-v4" and np.array_equal(obs, episodes[3].observations)

    file = root / dataset_id / "data" / "main_data.hdf5"
    before = file.stat().st_mtime_ns
    capsys.readouterr()
    assert collect(Collect(env_id="hopper-random", steps=10)) == dataset_id
    assert "is there with 2,000 steps" in capsys.readouterr().out and file.stat().st_mtime_ns == before

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root.parent / "alone"))
    alone = list(minari.load_dataset(collect(Collect(env_id="hopper-random", steps=2_000, workers=1))))
    assert len(alone) == len(episodes)
    for a, b in zip(alone, episodes, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_pointmaze_ends_at_the_goal_or_at_the_time_limit(root, one_process):
    dataset = minari.load_dataset(collect(Collect(env_id="pointmaze-umaze", steps=2_000)))
    assert dataset.spec.dataset_id == "o2o/pointmaze/umaze-v1"
    assert (dataset.storage.metadata["ref_min_score"], dataset.storage.metadata["ref_max_score"]) == (0, 1)
    env = dataset.recover_environment()
    assert env.spec.id == "PointMaze_UMaze-v3" and env.spec.kwargs["continuing_task"] is False
    assert env.spec.max_episode_steps == 300
    check_flags(dataset, 2_000)
    episodes, goals = list(dataset), set()
    for episode in episodes:
        assert set(episode.observations) == {"achieved_goal", "desired_goal", "observation"}
        goal, position = episode.observations["desired_goal"], episode.observations["achieved_goal"]
        assert (goal == goal[0]).all() and np.array_equal(position, episode.observations["observation"][:, :2])
        at_goal = np.linalg.norm(position[1:] - goal[1:], axis=1) <= 0.45
        assert np.array_equal(episode.terminations, at_goal) and np.array_equal(episode.rewards, at_goal)
        goals.add(tuple(goal[0]))
    assert len(goals) == len(episodes) and sum(e.terminations[-1] for e in episodes) > len(episodes) / 2
    assert all(len(e.rewards) == 300 for e in episodes[:-1] if not e.terminations[-1])


def test_maze_controller_is_imperfect_and_finds_the_goal_without_random_turns(monkeypatch):
    def successes():
        episodes = [make_dataset.rollout("pointmaze", "umaze", 0, index) for index in range(25)]
        return np.array([e["terminations"][-1] for e in episodes]), np.mean([len(e["rewards"]) for e in episodes])

    sloppy, sloppy_length = successes()
    monkeypatch.setattr(make_dataset, "WRONG_TURNS", 0.0)
    straight, straight_length = successes()
    assert 0.6 < sloppy.mean() < 1 and straight.all() and straight_length < 0.75 * sloppy_length


@pytest.fixture
def fake_policies(tmp_path, monkeypatch):
    """Small untrained hopper-medium and hopper-expert in a folder of their own."""
    folder = tmp_path / "policies"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for kind in ("medium", "expert"):
        shapes = {"w0": (11, 4), "b0": 4, "w1": (4, 3), "b1": 3, "w2": (4, 3), "b2": 3}
        params = {key: rng.standard_normal(shape, dtype=np.float32) for key, shape in shapes.items()}
        np.savez(folder / f"hopper-{kind}.npz", **params, step=1, seed=0, noise=0.0, mean=1.0, std=0.0)
    monkeypatch.setattr(make_dataset, "POLICY_DIR", folder)
    Policy.load.cache_clear()
    yield
    Policy.load.cache_clear()


def test_medium_expert_is_half_medium_then_half_expert(root, one_process, fake_policies):
    assert "hopper-medium-expert" in make_dataset.available()
    assert "walker2d-medium-expert" not in make_dataset.available()
    episodes = list(minari.load_dataset(collect(Collect(env_id="hopper-medium-expert", steps=301))))
    (medium, about), (expert, _) = Policy.load("hopper-medium"), Policy.load("hopper-expert")
    assert about == {"step": 1, "seed": 0, "noise": 0.0, "mean": 1.0, "std": 0.0}
    ends = np.cumsum([len(e.rewards) for e in episodes])
    assert 150 in ends and ends[-1] == 301  # neither half runs into the other
    for episode, end in zip(episodes, ends, strict=True):
        policy = medium if end <= 150 else expert
        expected = [policy(obs, np.random.default_rng(0), 0.0) for obs in episode.observations[:-1]]
        np.testing.assert_allclose(episode.actions, expected, rtol=1e-5)
        assert episode.terminations[-1] or end in (150, 301)


def test_policy_is_tanh_of_the_layers():
    params = {"w0": [[1, -2], [0.5, 1]], "b0": [0.1, 0.2], "w1": [[0.3], [2]], "b1": [-0.5]}
    params |= {"w2": [[1], [1]], "b2": [5]}
    policy = Policy({key: np.array(value, np.float32) for key, value in params.items()})
    obs = np.array([2.0, -1.0])  # hidden: relu(2 - 0.5 + 0.1, -4 - 1 + 0.2) = (1.6, 0); mean: 0.48 - 0.5 = -0.02
    step = 1 / 4096  # that actions are rounded to
    assert policy(obs, np.random.default_rng(0), noise=0.0) == pytest.approx([np.tanh(-0.02)], abs=step / 2)
    draw = np.random.default_rng(7).standard_normal(1)  # log std 6.6 is clipped to 2
    expected = np.tanh(-0.02 + 0.1 * np.exp(2) * draw)
    action = policy(obs, np.random.default_rng(7), noise=0.1)
    assert action == pytest.approx(expected, abs=step / 2) and action.dtype == np.float32 and action % step == 0


V1 = {  # what -v1 in a stand-in's id means: whoever has to change these changes that, too
    "halfcheetah-medium": "f88488646b3f61d13e8cc207aaeb6876a3c73f87ec6a5fbb75cfecf23e698e8c 1000",
    "hopper-medium": "798637018431c85b7c34f6501fd065243965d025dacbf10afc0497cc81356e3c 474",
    "pointmaze-umaze": "cf29772d7c62261d5df6136e5dae74d533274d7458d34822e344cf64b5887142 300",
}


@pytest.mark.parametrize("task", V1)
def test_an_episode_has_the_same_bits_on_every_processor(task):
    """On this one, and as far as it can play one of 2008: OpenBLAS with that one's kernels, numpy without AVX."""
    code = "import hashlib, make_dataset; e = make_dataset.rollout(*'{}'.split('-'), 0, 1); print(hashlib.sha256("
    code += "e['rewards'].tobytes() + e['actions'].tobytes()).hexdigest(), len(e['rewards']))"
    old = {"OPENBLAS_CORETYPE": "Nehalem", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}
    command = [sys.executable, "-c", code.format(task)]
    here, there = (
        subprocess.run(command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=True).stdout
        for env in ({}, old)
    )
    assert here.strip() == there.strip() == V1[task]


def test_an_error_while_writing_leaves_nothing(root, one_process, monkeypatch):
    create = minari.create_dataset_from_buffers

    def fail_late(*args, **kwargs):
        create(*args, **kwargs)
        raise OSError("disk full")

    monkeypatch.setattr(minari, "create_dataset_from_buffers", fail_late)
    with pytest.raises(OSError, match="disk full"):
        collect(Collect(env_id="hopper-random", steps=100))
    assert list(root.iterdir()) == [] and os.environ["MINARI_DATASETS_PATH"] == str(root)


def test_sigkill_leaves_no_dataset_and_no_obstacle(root, one_process):
    code = """if True:
        import itertools, os, minari, make_dataset
        create = minari.create_dataset_from_buffers
        minari.create_dataset_from_buffers = lambda *a, **k: (create(*a, **k), os.kill(os.getpid(), 9))
        make_dataset.in_order = lambda job, workers: (job(i) for i in itertools.count())
        make_dataset.collect(make_dataset.Collect(env_id="hopper-random", steps=100))
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert any(root.iterdir()) and minari.list_local_datasets() == {}  # it had begun to write
    dataset_id = collect(Collect(env_id="hopper-random", steps=100))
    assert list(minari.list_local_datasets()) == [dataset_id] and minari.load_dataset(dataset_id).total_steps == 100


def test_a_faster_process_is_no_error(root, one_process, monkeypatch):
    create = minari.create_dataset_from_buffers

    def overtaken(*args, **kwargs):
        create(*args, **kwargs)
        (root / "o2o/hopper/random-v1/data").mkdir(parents=True)

    monkeypatch.setattr(minari, "create_dataset_from_buffers", overtaken)
    assert collect(Collect(env_id="hopper-random", steps=100)) == "o2o/hopper/random-v1"
    assert [path.name for path in root.iterdir()] == ["o2o"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"env_id": "hopper-randon"}, "Nearest: hopper-random"),
        ({"env_id": "hopper-medium-replay"}, "replay buffers were not kept"),
        ({"env_id": "ant-expert"}, "pointmaze-umaze"),
        ({"env_id": "pointmaze"}, "pointmaze-umaze"),
        ({"env_id": ""}, "halfcheetah-random"),
        ({"env_id": "hopper-random", "steps": 0}, "--steps 0"),
        ({"env_id": "hopper-random", "workers": 0}, "--workers 0"),
        ({"env_id": "hopper-random", "seed": -1}, "--seed -1"),
    ],
)
def test_a_bad_request_is_one_line_and_exit_code_2(root, capsys, wrong, words):
    with pytest.raises(SystemExit) as stop:
        collect(Collect(**wrong))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1
    assert not root.exists()


def test_several_processes_build_it_once(root, monkeypatch):
    """And one whose progress bar is off ends as well."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    command = [sys.executable, "make_dataset.py", "collect", "--env-id", "hopper-random", "--steps", "2_000"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate(timeout=120)[0] for process in both)
    assert "2,000 steps in" not in said[0] and "is there with 2,000 steps" in said[0]
    assert "2,000 steps in" in said[1] and minari.load_dataset("o2o/hopper/random-v1").total_steps == 2_000


def test_command_line(root):
    def run(*words):
        return subprocess.run([sys.executable, "make_dataset.py", *words], cwd=ROOT, capture_output=True, text=True)

    result = run("collect", "--env-id", "hopper-medium-replay")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "hopper-random" in result.stderr
    result = run("collect", "--env-id", "pointmaze-umaze", "--steps", "50", "--workers", "1")
    assert result.returncode == 0 and "o2o/pointmaze/umaze-v1: 50 steps" in result.stdout, result.stderr
    assert minari.load_dataset("o2o/pointmaze/umaze-v1").total_steps == 50


def policy_names():
    return sorted(path.stem for path in POLICY_DIR.glob("*.npz"))


def test_kept_policies_match_d4rl_and_the_readme():
    assert policy_names()
    for name in policy_names():
        env, kind = name.split("-")
        policy, about = Policy.load(name)
        assert abs(about["mean"] / TARGETS[env][kind] - 1) < 0.10
        assert about["noise"] == make_dataset.NOISE[kind] and about["std"] > 0 and about["step"] > 0
        obs_dim, action_dim = {"hopper": (11, 3), "walker2d": (17, 6), "halfcheetah": (17, 6)}[env]
        action = policy(np.zeros(obs_dim), np.random.default_rng(0), noise=1.0)
        assert action.shape == (action_dim,) and action.dtype == np.float32 and np.abs(action).max() <= 1
    assert README.read_text().split(TABLE[0])[1].split(TABLE[1])[0] == table(), "run python tests/test_make_dataset.py"


def table():
    """The provenance table of policies/README.md."""
    rows = ["| file | environment steps | seed | noise | return | D4RL's mean |", "|-|-|-|-|-|-|"]
    for name in policy_names():
        (env, kind), about = name.split("-"), Policy.load(name)[1]
        mean, std, target = about["mean"], about["std"], TARGETS[env][kind]
        rows.append(
            f"| {name}.npz | {about['step']:,} | {about['seed']} | {about['noise']} | {mean:.0f} +- {std:.0f} "
            f"| {target:.0f} ({mean / target - 1:+.1%}) |"
        )
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    before, rest = README.read_text().split(TABLE[0])
    README.write_text(before + TABLE[0] + table() + TABLE[1] + rest.split(TABLE[1])[1])
