"""The run folder, and what is logged into it."""

import ast
import fnmatch
import importlib
import json
import math
import re
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, TOY_ID
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_env import ToyEnv

import iql_finetune as iql

README = ROOT / "README.md"


def run_folder(args: dict, name: str = "iql_finetune") -> Path:
    return Path(args["run_dir"], f"o2o_toy_medium-v0__{name}__1")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = {}
    for phase in ("offline", "online"):
        events = EventAccumulator(str(folder / phase), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            assert tag not in found, f"{tag} in two places"
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def test_run_folder(toy_args):
    iql.train(iql.Args(**toy_args))
    folder = run_folder(toy_args)
    assert [path.name for path in Path(toy_args["run_dir"]).iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [
        "args.json", "checkpoint.pt", "iql_finetune.py", "offline", "offline.pt", "online", "online.pt", "summary.json",
    ]  # fmt: skip
    assert (folder / "iql_finetune.py").read_text() == (ROOT / "iql_finetune.py").read_text()
    for phase in ("offline", "online"):
        assert [path.name.startswith("events") for path in (folder / phase).iterdir()] == [True]


class Witness(gym.Wrapper):
    """Keeps what a training environment was asked and answered; an episode's return is its length."""

    def __init__(self, env):
        super().__init__(env)
        self.rows, self.starts, self.lengths = [], [], []

    def reset(self, **how):
        self.obs, info = self.env.reset(**how)
        self.starts.append(self.obs.tobytes())
        self.lengths.append(0)
        return self.obs, info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.rows.append([*self.obs, *action, *obs, 2 * reward - 0.5, terminated])
        self.obs, self.lengths[-1] = obs, self.lengths[-1] + 1
        return obs, reward, terminated, truncated, info | {"gain": 1.0}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_what_is_learned_from_and_logged_is_what_happened_online(script, toy_args, monkeypatch):
    module, seen = importlib.import_module(script.stem), []
    make_env = module.Task.make_env

    def watched(task, *video_dir):
        env = make_env(task, *video_dir)
        if not video_dir:  # the training environment; evaluations have one of their own
            seen.append(env := Witness(env))
        return env

    monkeypatch.setattr(module.Task, "make_env", watched)
    module.train(module.Args(**toy_args | {"reward_scale": 2.0, "reward_bias": -0.5, "online_steps": 240}))
    (env,), folder = seen, run_folder(toy_args, script.stem)
    rows = torch.load(folder / "checkpoint.pt", weights_only=True)["buffer"]["online"][:, :8].numpy()
    np.testing.assert_allclose(rows, np.array(env.rows)[: len(rows)], atol=1e-5)
    assert len(rows) == 240 or (script.stem == "cal_ql" and len(rows) > 190)  # an episode cut short is left out [D3]
    lengths = [length for length in env.lengths if length]
    assert len(set(env.starts)) == len(env.starts) and 50 in lengths, "other starts each; one was cut by its time limit"
    logged = [value for _, value in scalars(folder)["online/episodic_return"]]
    assert logged == lengths[: len(logged)] and len(logged) >= len(lengths) - 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_gradient_steps_per_environment_step(script, toy_args, monkeypatch):
    module, asked = importlib.import_module(script.stem), []
    run_updates = module.run_updates

    def count(agent, buffer, n, online_share=None):
        asked.append(n)
        return run_updates(agent, buffer, n, online_share)

    monkeypatch.setattr(module, "run_updates", count)
    early = {"jsrl_gated": {"warmup_steps": 40}, "sft_reset": {"window": 4, "segment_steps": 5}}.get(script.stem, {})
    module.train(module.Args(**toy_args | early | {"utd_ratio": 3, "online_steps": 240}))
    offline, online = sum(n for n in asked if n != 3), sum(n == 3 for n in asked)
    assert offline == 40 and 50 < online <= 240


@pytest.mark.parametrize("name", ["jsrl_gated", "sft_reset"])
def test_learner_score_is_of_the_learner_alone(name, toy_args, monkeypatch):
    module = importlib.import_module(name)

    def score(act, *_):
        alone = isinstance(getattr(act, "__self__", None), module.Explorer)
        return dict.fromkeys(("return", "normalized_score"), 7.0 if alone else 50.0)

    monkeypatch.setattr(module, "evaluate", score)
    module.train(module.Args(**toy_args))
    found = scalars(run_folder(toy_args, name))
    for tag, value in {"online/normalized_score": 50, "online/learner_score": 7}.items():
        assert dict(found[tag])[120] == value == dict(found[tag])[20]


@pytest.mark.parametrize("name, part", [("jsrl_gated", "gate"), ("sft_reset", "evaluator")])
def test_an_episode_that_ends_online_shows_that_one_can(name, part, toy_args, monkeypatch):
    module = importlib.import_module(name)
    load_task = module.load_task

    def no_end_in_the_data(args):
        task = load_task(args)
        task.data["terminated"][:] = 0
        return task

    monkeypatch.setattr(module, "load_task", no_end_in_the_data)
    monkeypatch.setattr(ToyEnv, "terminated", staticmethod(lambda x: True))
    short = {"offline_steps": 5, "online_steps": 200, "eval_every": 200, "eval_episodes": 1}
    module.train(module.Args(**toy_args | short))
    state = torch.load(run_folder(toy_args, name) / "online.pt", weights_only=True)[part]
    assert state.get("_extra_state", state)["may_fall"] is True


def test_scalars_and_their_steps(toy_args):
    summary = iql.train(iql.Args(**toy_args))
    found = scalars(run_folder(toy_args))
    steps = {tag: [step for step, _ in points] for tag, points in found.items()}
    losses = {"value_loss", "critic_loss", "actor_loss"}
    assert {tag.split("/")[-1] for tag in found if tag.startswith("offline/losses/")} == losses
    assert {tag.split("/")[-1] for tag in found if tag.startswith("online/losses/")} == losses
    for tag in ["offline/normalized_score", "offline/return", "offline/losses/value_loss"]:
        assert steps[tag] == [20, 40], "offline: gradient steps"
    assert steps["online/normalized_score"] == [0, 20, 40, 60, 80, 100, 120], "online: environment steps, from 0"
    assert steps["online/losses/critic_loss"] == [20, 40, 60, 80, 100, 120]
    assert steps["charts/SPS"] == [20, 40, 60, 80, 100, 120]
    episodes = steps["online/episodic_return"]
    assert episodes == sorted(set(episodes)) and all(
        1 <= b - a <= 50 for a, b in zip([0, *episodes], episodes, strict=False)
    )
    assert all(math.isfinite(value) for points in found.values() for _, value in points)
    assert found["online/normalized_score"][0][1] == found["offline/normalized_score"][-1][1]
    scores = [value for _, value in found["online/normalized_score"]]
    assert summary["offline_score"] == pytest.approx(scores[0], rel=1e-5)
    assert summary["final_score"] == pytest.approx(scores[-1], rel=1e-5)
    assert summary["lowest_score"] == pytest.approx(min(scores), rel=1e-5)


def test_args_json_holds_resolved_values(toy_args, capsys):
    iql.train(iql.Args(**toy_args | {"beta": 5.0}))
    found = json.loads((run_folder(toy_args) / "args.json").read_text())
    resolved = {"expectile": 0.7, "beta": 5.0, "dropout": 0.0, "reward_bias": 0.0, "normalize_obs": False}
    assert {name: found[name] for name in resolved} == resolved
    assert found["reward_scale"] > 0
    assert {name: found[name] for name in toy_args} == toy_args
    out = capsys.readouterr().out
    for name, value in (resolved | {"reward_scale": found["reward_scale"]}).items():
        pairs = re.findall(rf"\b{name}\W+([\w.-]+)", out.split('"versions"')[0].split("{")[0])
        assert pairs == [str(value)], f"{name} is to be printed once, as resolved"


def test_summary(toy_args):
    summary = iql.train(iql.Args(**toy_args))
    assert json.loads((run_folder(toy_args) / "summary.json").read_text()) == summary
    assert summary.keys() >= {
        "env_id", "dataset_id", "algorithm", "seed", "offline_score", "final_score", "lowest_score", "drop", "regret",
        "degradation_area", "steps_to_gain", "offline_steps", "online_steps", "seconds", "updates_per_second",
        "versions", "commit",
    }  # fmt: skip
    assert (summary["env_id"], summary["dataset_id"], summary["seed"]) == (TOY_ID, TOY_ID, 1)
    assert (summary["offline_steps"], summary["online_steps"]) == (40, 120)
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", summary["commit"])
    assert summary["updates_per_second"] == pytest.approx(160 / summary["seconds"])
    assert "iql" in summary["algorithm"]


def documented() -> set[str]:
    """Tags in backticks in the first column of README's tables; `*` stands for any word."""
    cells = re.findall(r"^\|([^|]*)\|", README.read_text(), flags=re.M)
    tags = {tag for cell in cells for tag in re.findall(r"`([\w*]+(?:/[\w*]+)+)`", cell)}
    return {tag for tag in tags if tag.split("/")[0] in ("offline", "online", "charts", "gate", "evaluator")}


@pytest.mark.skipif(not README.exists(), reason="no README.md")
def test_emitted_tags_are_those_documented(toy_args):
    emitted, glossary = {}, documented()
    assert len(glossary) > 5
    for script in SCRIPTS:
        module = importlib.import_module(script.stem)
        gate = {"warmup_steps": 40, "online_steps": 400} if script.stem == "jsrl_gated" else {}  # long enough to move
        module.train(module.Args(**toy_args | {"eval_every": 40, "eval_episodes": 1} | gate))
        for tag in scalars(run_folder(toy_args, script.stem)):
            emitted.setdefault(tag, script.stem)
    unknown = {tag: by for tag, by in emitted.items() if not any(fnmatch.fnmatch(tag, known) for known in glossary)}
    assert unknown == {}, "not in README's glossary"
    nodes = (node for script in SCRIPTS for node in ast.walk(ast.parse(script.read_text())))
    literals = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words = " ".join(literal for literal in literals if " " not in literal)  # names, not sentences
    unheard = [known for known in glossary if not fnmatch.filter(emitted, known)]
    stems = {known: known.split("/")[-1].strip("*_") for known in unheard}  # a short run does not come to emit all
    assert [known for known, stem in stems.items() if not re.search(rf"\b_?{stem}_?\b", words)] == [], "in no script"


def test_weights_and_biases_only_when_asked_for(toy_args, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or types.SimpleNamespace(id="abc"))
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    short = {"offline_steps": 5, "online_steps": 5, "eval_every": 5, "eval_episodes": 1}
    iql.train(iql.Args(**toy_args | short))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    names = {"track": True, "wandb_project_name": "project", "wandb_entity": "entity", "exp_name": "tracked"}
    iql.train(iql.Args(**toy_args | short | names))
    assert len(calls) == 1
    assert (calls[0]["project"], calls[0]["entity"], calls[0]["sync_tensorboard"]) == ("project", "entity", True)
    assert calls[0]["name"] == "o2o_toy_medium-v0__tracked__1" and calls[0]["config"]["seed"] == 1
    iql.train(iql.Args(**toy_args | short | names | {"resume": True}))
    assert [(call["id"], call["resume"]) for call in calls] == [(None, "allow"), ("abc", "allow")]


def test_videos_of_evaluations(toy_args):
    short = {"offline_steps": 5, "online_steps": 5, "eval_every": 5, "eval_episodes": 2, "capture_video": True}
    iql.train(iql.Args(**toy_args | short))
    assert len(list((run_folder(toy_args) / "videos" / "from_0").glob("*.mp4"))) == 3 * 2, "the last one, too"
