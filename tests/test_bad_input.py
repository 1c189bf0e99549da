"""Bad input costs one line and exit code 2: no traceback, nothing half-written."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT, TOY_ID, record
from minari.data_collector import EpisodeBuffer
from toy_env import TOY, ToyEnv

import iql_finetune as iql


@pytest.fixture
def refuse(toy_args, capsys):
    """Run with these arguments; returns the one line of complaint."""

    def run(folder_stays: bool = False, **kwargs) -> str:
        args = toy_args | kwargs
        before = sorted(Path(args["run_dir"]).rglob("*"))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            iql.train(iql.Args(**args))
        out, err = capsys.readouterr()
        assert stop.value.code == 2
        lines = [line for line in (out + err).splitlines() if "error:" in line]
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 20, out + err
        assert "Traceback" not in out + err
        if not folder_stays:
            assert sorted(Path(args["run_dir"]).rglob("*")) == before, "a run folder half-written"
        return lines[0]

    return run


def run_folder(args: dict) -> Path:
    return Path(args["run_dir"], f"o2o_toy_medium-v0__iql_finetune__{args.get('seed', 1)}")


def hdf5(path: Path, n: int = 12, **columns) -> Path:
    """A file for Hopper, four episodes of n / 4 steps; `columns` replace its own, None leaves one out."""
    rng = np.random.default_rng(0)
    own = {
        "observations": rng.normal(size=(n, 11)), "next_observations": rng.normal(size=(n, 11)),
        "actions": rng.uniform(-1, 1, (n, 3)), "rewards": rng.uniform(size=n),
        "terminals": np.arange(n) % max(n // 4, 1) == max(n // 4, 1) - 1, "timeouts": np.zeros(n, bool),
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in (own | columns).items():
            if value is not None:
                file[key] = value
    return path


# ---- arguments ----


@pytest.mark.parametrize("name, nearest", [
    ("hoper-medium", "hopper-medium"), ("antmaze-medium", "antmaze-medium-play"), ("HalfCheetah-v4", "halfcheetah"),
    ("pen", "pen-human"), ("hopper-medium-v3", "hopper-medium"), ("", ""),
])  # fmt: skip
def test_unknown_task(refuse, name, nearest):
    line = refuse(env_id=name)
    assert name in line and nearest in line


@pytest.mark.parametrize("value", [0, -5])
@pytest.mark.parametrize("name", [
    "offline_steps", "online_steps", "utd_ratio", "batch_size", "buffer_size", "eval_every", "eval_episodes",
    "save_every",
])  # fmt: skip
def test_steps_below_one(refuse, name, value):
    line = refuse(**{name: value})
    assert f"--{name.replace('_', '-')}" in line and str(value) in line


@pytest.mark.parametrize("name, value", [
    ("gamma", 0.0), ("gamma", 1.0), ("gamma", 1.5), ("tau", -0.1), ("expectile", 2.0), ("online_share", 1.1),
    ("learning_rate", 0.0), ("learning_rate", -1.0), ("gamma", float("nan")), ("seed", -1), ("seed", 2**32),
    ("beta", -1.0),
])  # fmt: skip
def test_numbers_out_of_range(refuse, name, value):
    line = refuse(**{name: value})
    assert f"--{name.replace('_', '-')}" in line and str(value) in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("flags", [{"cuda": True}, {"cuda_graph": True}, {"cuda": True, "cuda_graph": True}])
def test_cuda_without_a_device(refuse, flags):
    assert "--cuda" in refuse(**flags)


@pytest.mark.parametrize("flag, package", [("track", "wandb"), ("capture_video", "moviepy")])
def test_packages_that_are_not_installed(refuse, monkeypatch, flag, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it raises ImportError
    line = refuse(**{flag: True})
    assert f"--{flag.replace('_', '-')}" in line and f"pip install {package}" in line


def test_a_file_where_runs_are_to_go(refuse, tmp_path):
    (tmp_path / "file").write_text("mine")
    for run_dir in (tmp_path / "file", tmp_path / "file" / "runs"):
        assert "file in its way" in refuse(run_dir=str(run_dir))
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_folder_that_cannot_be_made(refuse, monkeypatch):
    def mkdir(path, **_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    line = refuse()
    assert "Permission denied" in line and "--run-dir" in line


@pytest.mark.parametrize("name", ["/precious", "../precious/v0", "x/../../precious"])
def test_a_path_that_is_no_dataset_is_never_to_be_deleted(refuse, name):
    line = refuse(env_id=name)
    assert "delete" not in line and name in line


def test_eval_env_is_of_a_file(refuse):
    assert "--eval-env" in refuse(env_id="hopper-medium", eval_env="Hopper-v5")


def test_run_folder_that_exists_is_left_alone(refuse, toy_args):
    folder = run_folder(toy_args)
    folder.mkdir(parents=True)
    (folder / "precious.txt").write_text("mine")
    line = refuse()
    assert str(folder) in line and "--resume" in line
    assert [path.name for path in folder.iterdir()] == ["precious.txt"]


# ---- HDF5 files ----


def test_own_file_missing_or_without_its_environment(refuse, tmp_path):
    assert "nowhere.hdf5" in refuse(env_id=str(tmp_path / "nowhere.hdf5"), eval_env="Hopper-v4")
    assert "--eval-env" in refuse(env_id=str(hdf5(tmp_path / "mine.hdf5")))
    assert "Hoper" in refuse(env_id=str(tmp_path / "mine.hdf5"), eval_env="Hoper-v9")


def damage(path: Path, how: str) -> Path:
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"<html>404</html>" * 50, "truncated": content[: len(content) // 2]}[how])
    return path


@pytest.mark.parametrize("how", ["empty", "text", "truncated"])
@pytest.mark.parametrize("official", [False, True])
def test_damaged_hdf5(refuse, tmp_path, how, official):
    if official:
        path = damage(hdf5(Path(os.environ["D4RL_DATASET_DIR"], "hopper_medium-v2.hdf5"), 4000), how)
        line = refuse(env_id="hopper-medium")
        assert "delete" in line
    else:
        path = damage(hdf5(tmp_path / "mine.hdf5", 4000), how)
        line = refuse(env_id=str(path), eval_env="Hopper-v4")
    assert str(path) in line


@pytest.mark.parametrize("wrong", [{"rewards": None}, {"observations": None, "obs": np.zeros((12, 11))}])
def test_hdf5_without_a_column(refuse, tmp_path, wrong):
    name = next(key for key, value in wrong.items() if value is None)
    assert name in refuse(env_id=str(hdf5(tmp_path / "mine.hdf5", **wrong)), eval_env="Hopper-v4")


def poisoned(key: str, shape: tuple, value: float) -> dict:
    array = np.zeros(shape)
    array[5] = value
    return {key: array}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("key, shape, name", [
    ("observations", (12, 11), "obs"), ("next_observations", (12, 11), "next_obs"), ("actions", (12, 3), "action"),
    ("rewards", (12,), "reward"),
])  # fmt: skip
def test_nan_and_infinity(refuse, tmp_path, key, shape, name, value):
    line = refuse(env_id=str(hdf5(tmp_path / "mine.hdf5", **poisoned(key, shape, value))), eval_env="Hopper-v4")
    assert name in line and "mine" in line and "NaN" in line


@pytest.mark.parametrize("columns", [
    {"observations": np.zeros((12, 10)), "next_observations": np.zeros((12, 10))},
    {"next_observations": np.zeros((12, 10))},
    {"next_observations": np.zeros((11, 11))},
    {"observations": np.zeros((12, 11, 1))},
    {"observations": np.zeros((9, 11))},
    {"actions": np.zeros((12, 4))},
    {"actions": np.zeros(12)},
    {"actions": np.zeros((7, 3))},
    {"rewards": np.zeros((12, 1))},
    {"rewards": np.zeros(5)},
    {"rewards": np.zeros(())},
    {"terminals": np.zeros(5)},
    {"terminals": np.zeros((12, 1))},
    {"terminals": np.zeros(5), "timeouts": None},
    {"timeouts": np.zeros(13)},
], ids=lambda columns: ", ".join(f"{key} {np.shape(value)}" for key, value in columns.items()))  # fmt: skip
def test_wrong_shapes(refuse, tmp_path, columns):
    path = hdf5(tmp_path / "mine.hdf5", **columns)
    assert "mine" in refuse(env_id=str(path), eval_env="Hopper-v4")


def test_empty_hdf5(refuse, tmp_path):
    assert "mine" in refuse(env_id=str(hdf5(tmp_path / "mine.hdf5", 0)), eval_env="Hopper-v4")


def test_columns_that_are_no_numbers(refuse, tmp_path):
    for column in (np.array([b"one"] * 12), np.ones(12, complex)):
        line = refuse(env_id=str(hdf5(tmp_path / "mine.hdf5", rewards=column)), eval_env="Hopper-v4")
        assert "reward" in line and "numbers" in line


def test_a_users_own_file_is_never_to_be_deleted(refuse, tmp_path):
    """It cannot be "fetched again"."""
    path = str(hdf5(tmp_path / "mine.hdf5", **poisoned("rewards", (12,), np.nan)))
    assert "delete" not in refuse(env_id=path, eval_env="Hopper-v4")
    assert "delete" not in refuse(env_id=path, eval_env="Hoper-v9")


def test_discrete_actions(refuse, tmp_path):
    columns = {"observations": np.zeros((12, 4)), "next_observations": np.zeros((12, 4)), "actions": np.zeros(12, int)}
    assert "continuous" in refuse(env_id=str(hdf5(tmp_path / "mine.hdf5", **columns)), eval_env="CartPole-v1")
    flags = [False] * 4, [False] * 3 + [True]
    obs = np.zeros((5, 4), np.float32)
    record(
        "x/cartpole/some-v0",
        gym.spec("CartPole-v1"),
        [EpisodeBuffer(None, None, None, obs, np.zeros(4, int), [1.0] * 4, *flags)],
    )
    assert "continuous" in refuse(env_id="x/cartpole/some-v0")


# ---- Minari datasets ----


def test_a_maze_of_dense_rewards(refuse):
    env, n = gym.spec("PointMaze_UMazeDense-v3"), 4
    obs = {
        "observation": np.zeros((n + 1, 4)),
        "achieved_goal": np.zeros((n + 1, 2)),
        "desired_goal": np.ones((n + 1, 2)),
    }
    flags = [False] * n, [False] * (n - 1) + [True]
    episode = EpisodeBuffer(None, None, None, obs, np.zeros((n, 2), np.float32), [0.1, 0.2, 0.3, 0.4], *flags)
    record("x/pointmaze/umaze-dense-v0", env, [episode])
    line = refuse(env_id="x/pointmaze/umaze-dense-v0")
    assert "x/pointmaze/umaze-dense-v0" in line and "sparse" in line


@pytest.mark.parametrize("how", ["empty", "text", "truncated"])
@pytest.mark.parametrize("file", ["main_data.hdf5", "metadata.json"])
def test_damaged_minari(refuse, how, file):
    damage(Path(os.environ["MINARI_DATASETS_PATH"], TOY_ID, "data", file), how)
    assert TOY_ID in refuse()


@pytest.mark.parametrize("what", ["data", "data/main_data.hdf5", "data/metadata.json"])
def test_minari_with_a_part_missing(refuse, what):
    path = Path(os.environ["MINARI_DATASETS_PATH"], TOY_ID, what)
    path.rename(path.parent / "elsewhere")
    assert TOY_ID in refuse()


def test_minari_without_any_scale_for_a_score(refuse):
    env, flags = gym.spec("Hopper-v4"), ([False] * 4, [False] * 3 + [True])
    episode = EpisodeBuffer(None, None, None, np.zeros((5, 11)), np.zeros((4, 3), np.float32), [1.0] * 4, *flags)
    for name in ("x/own/some-v0", "x/hopper/some-v0"):  # hopper's reference scores are known, its rewards' scale is not
        record(name, env, [episode, episode])
        assert "--reward-scale" in refuse(env_id=name)
    record("x/own/more-v0", env, [episode, episode])
    assert "ref_max_score" in refuse(env_id="x/own/more-v0", reward_scale=1.0)


def test_empty_minari(refuse):
    folder = Path(os.environ["MINARI_DATASETS_PATH"], TOY_ID, "data")
    storage = minari.load_dataset(TOY_ID).storage
    with h5py.File(folder / "main_data.hdf5", "a") as file:
        for key in list(file):
            del file[key]
    storage.update_metadata({"total_episodes": 0, "total_steps": 0})
    assert TOY_ID in refuse()


def test_nan_in_minari(refuse):
    with h5py.File(Path(os.environ["MINARI_DATASETS_PATH"], TOY_ID, "data", "main_data.hdf5"), "a") as file:
        file["episode_3/observations"][1] = np.nan
    assert "NaN" in refuse()


def test_minari_whose_environment_is_not_installed(refuse):
    metadata = Path(os.environ["MINARI_DATASETS_PATH"], TOY_ID, "data", "metadata.json")
    metadata.write_text(metadata.read_text().replace("toy_env:ToyEnv", "not_installed:ToyEnv"))
    assert "not_installed" in refuse()


def test_unbounded_actions(refuse):
    """There is no way to bring them to [-1, 1]."""
    obs = np.zeros((5, 3), np.float32)
    episode = EpisodeBuffer(None, None, None, obs, np.zeros((4, 1), np.float32), [1.0] * 4, [False] * 4, [False] * 4)
    record("x/pendulum/some-v0", gym.spec("Pendulum-v1"), [episode])
    path = Path(os.environ["MINARI_DATASETS_PATH"], "x/pendulum/some-v0/data/metadata.json")
    path.write_text(
        path.read_text().replace("gymnasium.envs.classic_control.pendulum:PendulumEnv", "toy_env:UnboundedEnv")
    )
    assert "actions" in refuse(env_id="x/pendulum/some-v0")


def test_observations_that_are_no_vector(refuse):
    spec = gym.envs.registration.EnvSpec("x/Matrix-v0", "toy_env:MatrixEnv", max_episode_steps=4)
    flags = [False] * 4, [False] * 3 + [True]
    obs, action = np.zeros((5, 2, 3), np.float32), np.zeros((4, 2), np.float32)
    record("x/matrix/some-v0", spec, [EpisodeBuffer(None, None, None, obs, action, [1.0] * 4, *flags)])
    line = refuse(env_id="x/matrix/some-v0")
    assert "(2, 3)" in line and "vectors" in line
    with pytest.raises(SystemExit):
        iql.flatten_obs({"camera": obs, "joints": obs})


def test_part_of_an_id(refuse):
    """Its folder is there and holds other datasets, which nobody is told to delete."""
    line = refuse(env_id=TOY_ID.rpartition("/")[0])
    assert "delete" not in line and "is not at" in line
    assert "nearest: D4RL/antmaze/umaze-v1" in refuse(env_id="D4RL/antmaze/umaz-v1")


def test_reference_scores_that_are_no_scale(refuse):
    flags = [False, True], [False, False]
    obs, action = np.zeros((3, 2), np.float32), np.zeros((2, 2), np.float32)
    episodes = [EpisodeBuffer(None, None, None, obs, action, [r, r], *flags) for r in (1.0, 2.0)]
    record("x/toy/flat-v0", TOY, episodes, ref_min_score=5.0, ref_max_score=5.0)
    line = refuse(env_id="x/toy/flat-v0")
    assert "reference scores 5.0 to 5.0" in line and "ref_max_score" in line


def test_a_file_has_no_stand_in(refuse, tmp_path):
    path = hdf5(tmp_path / "mine.hdf5")
    assert "no stand-in" in refuse(env_id=str(path), eval_env="Hopper-v4", dataset="stand-in")


def test_an_environment_that_cannot_be_filmed(refuse, monkeypatch):
    def render(self):
        raise RuntimeError("an OpenGL platform library has not been loaded")

    monkeypatch.setattr(ToyEnv, "render", render)
    line = refuse(capture_video=True)
    assert "--capture-video" in line and "OpenGL" in line and "MUJOCO_GL" in line


def test_weights_and_biases_that_cannot_begin(refuse, monkeypatch):
    def init(**_):
        raise RuntimeError("No API key configured")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    line = refuse(track=True)
    assert "--track: No API key" in line and "wandb login" in line


@pytest.mark.parametrize("error", [ConnectionError("first line\nsecond line"), TimeoutError(), AssertionError()])
def test_whatever_the_server_and_its_libraries_raise(refuse, monkeypatch, error):
    def download(*_):
        raise error

    monkeypatch.setattr(iql, "download", download)
    assert "D4RL/pen/human-v2" in refuse(env_id="pen-human")


def test_full_id_has_no_stand_in(refuse):
    line = refuse(env_id="mujoco/hopper/medium-v0", dataset="stand-in")
    assert "no stand-in for mujoco/hopper/medium-v0" in line


def test_no_maker_beside_the_script(refuse, monkeypatch, tmp_path):
    monkeypatch.setattr(iql, "__file__", str(tmp_path / "iql_finetune.py"))
    assert "o2o/pen/human-v1" in refuse(env_id="pen-human", dataset="stand-in")


def test_maker_that_fails(refuse, monkeypatch, tmp_path):
    (tmp_path / "make_dataset.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(iql, "__file__", str(tmp_path / "iql_finetune.py"))
    assert "o2o/hopper/medium-v1" in refuse(env_id="hopper-medium", dataset="stand-in")


# ---- checkpoints ----


@pytest.fixture
def offline_pt(toy_args) -> Path:
    iql.train(iql.Args(**toy_args | {"exp_name": "first", "offline_steps": 5, "online_steps": 5, "eval_episodes": 1}))
    return Path(toy_args["run_dir"], "o2o_toy_medium-v0__first__1", "offline.pt")


def test_offline_checkpoint_of_something_else(refuse, offline_pt, tmp_path):
    content = torch.load(offline_pt, weights_only=True)
    for key, value in {"algorithm": "cal_ql", "dataset_id": "hopper-medium-v2"}.items():
        other = tmp_path / f"{key}.pt"
        torch.save(content | {key: value}, other)
        line = refuse(offline_checkpoint=str(other))
        assert str(other) in line and key in line and value in line
    for key, was, value in (
        ("hidden", 16, 24),
        ("dropout", 0.0, 0.1),
        ("normalize_obs", False, True),
        ("gamma", 0.99, 0.9),
    ):
        line = refuse(offline_checkpoint=str(offline_pt), **{key: value})
        assert key in line and str(was) in line and str(value) in line
    assert "reward_scale" in refuse(offline_checkpoint=str(offline_pt), reward_scale=5.0)
    for name in ("checkpoint.pt", "online.pt"):
        assert name in refuse(offline_checkpoint=str(offline_pt.with_name(name)))


@pytest.mark.parametrize("how", ["empty", "text", "truncated", "missing", "list"])
def test_offline_checkpoint_that_is_none(refuse, offline_pt, tmp_path, how):
    other = tmp_path / "other.pt"
    if how == "list":
        torch.save([1, 2, 3], other)
    elif how != "missing":
        other.write_bytes(offline_pt.read_bytes())
        damage(other, how)
    assert "other.pt" in refuse(offline_checkpoint=str(other))


def test_checkpoint_that_would_run_code_is_refused(refuse, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"agent": Evil()}, tmp_path / "evil.pt")
    refuse(offline_checkpoint=str(tmp_path / "evil.pt"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("how", ["empty", "text", "truncated"])
def test_damaged_checkpoint_on_resume(refuse, toy_args, how):
    iql.train(iql.Args(**toy_args | {"offline_steps": 5, "online_steps": 5}))
    path = damage(run_folder(toy_args) / "checkpoint.pt", how)
    assert str(path) in refuse(resume=True, offline_steps=5, online_steps=5)


def test_resume_with_other_arguments(refuse, toy_args):
    iql.train(iql.Args(**toy_args | {"offline_steps": 5, "online_steps": 5}))
    saved = (run_folder(toy_args) / "checkpoint.pt").read_bytes(), (run_folder(toy_args) / "args.json").read_text()
    for other in ({"learning_rate": 1e-3}, {"hidden": 24}, {"online_steps": 10}, {"expectile": 0.8}):
        line = refuse(**{"resume": True, "offline_steps": 5, "online_steps": 5} | other)
        assert next(iter(other)) in line and str(next(iter(other.values()))) in line and len(line) < 400
    now = (run_folder(toy_args) / "checkpoint.pt").read_bytes(), (run_folder(toy_args) / "args.json").read_text()
    assert now == saved
    same = {
        "resume": True,
        "offline_steps": 5,
        "online_steps": 5,
        "save_every": 1,
        "dataset": "official",
    }  # no other run
    same["run_dir"] = os.path.relpath(toy_args["run_dir"])  # none of it makes another run
    assert iql.train(iql.Args(**toy_args | same))["online_steps"] == 5


def test_the_same_command_twice_at_once(refuse, toy_args, monkeypatch):
    load_task = iql.load_task
    monkeypatch.setattr(iql, "load_task", lambda args: (run_folder(toy_args).mkdir(parents=True), load_task(args))[1])
    assert str(run_folder(toy_args)) in refuse(folder_stays=True) and not list(run_folder(toy_args).iterdir())


def test_resume_with_other_data_or_another_script(refuse, toy_args, monkeypatch):
    args = {"offline_steps": 5, "online_steps": 5}
    iql.train(iql.Args(**toy_args | args))
    checkpoint = run_folder(toy_args) / "checkpoint.pt"
    content = torch.load(checkpoint, weights_only=True)
    for key, value in {"dataset_id": "D4RL/toy/medium-v2", "script": "jsrl_gated"}.items():
        assert content[f"--{key}"] in (TOY_ID, "iql_finetune")
        torch.save(content | {f"--{key}": value}, checkpoint)
        line = refuse(resume=True, **args)
        assert key in line and value in line and content[f"--{key}"] in line


# ---- losses that are not finite ----


def test_nan_loss_offline_stops_with_step_and_checkpoint(refuse, toy_args):
    kwargs = {"learning_rate": 1e30, "offline_steps": 100, "save_every": 1, "eval_every": 100}
    line = refuse(folder_stays=True, **kwargs)
    assert "offline step" in line and "nan" in line.lower()
    checkpoint = run_folder(toy_args) / "checkpoint.pt"
    if checkpoint.exists():
        assert str(checkpoint) in line
        state = torch.load(checkpoint, weights_only=True)["agent"]
        assert all(torch.isfinite(value).all() for value in state.values() if isinstance(value, torch.Tensor))


def test_nan_loss_online_stops_at_once(refuse, toy_args, monkeypatch):
    add, added = iql.ReplayBuffer.add, []

    def breaking(self, obs, action, next_obs, reward, *rest, **more):
        added.append(reward)
        add(self, obs, action, next_obs, reward if len(added) < 90 else np.nan, *rest, **more)

    monkeypatch.setattr(iql.ReplayBuffer, "add", breaking)
    line = refuse(folder_stays=True, online_share=0.5, save_every=20)
    assert "online step 9" in line and "critic_loss nan" in line
    checkpoint = run_folder(toy_args) / "checkpoint.pt"
    assert str(checkpoint) in line
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["progress"]["online_step"] < 91
    assert not (run_folder(toy_args) / "summary.json").exists()


# ---- the command line itself ----


@pytest.mark.parametrize(
    "flags", [{"env_id": "hoper-medium"}, {"offline_steps": 0}, {"hidden": "many"}, {"dataset": "mine"}]
)
def test_command_line(cli, toy_args, flags):
    code, output = cli(ROOT / "iql_finetune.py", toy_args | flags)
    assert code == 2 and "Traceback" not in output
    assert not Path(toy_args["run_dir"]).exists()
    word = next(iter(flags)).replace("_", "-")
    assert word in output or str(next(iter(flags.values()))) in output
