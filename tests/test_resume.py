"""A run that was killed and resumed ends with the numbers of one that was not, to the last bit."""

import importlib
import json
import os
import random
import shlex
import signal
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import iql_finetune as iql

SCRIPT = ROOT / "iql_finetune.py"
whole_runs: dict[str, Path] = {}


class Crash(BaseException):
    """Stands for a SIGKILL at an exact line."""


def run_folder(args: dict) -> Path:
    return Path(args["run_dir"], f"o2o_toy_medium-v0__{args.get('exp_name', 'iql_finetune')}__{args.get('seed', 1)}")


def whole(args: dict, tmp_path_factory) -> Path:
    """Folder of the same run, never interrupted."""
    args = args | {"run_dir": str(tmp_path_factory.mktemp("whole"))}
    key = json.dumps({name: value for name, value in args.items() if name != "run_dir"})
    if key not in whole_runs:
        iql.train(iql.Args(**args))
        whole_runs[key] = run_folder(args)
    return whole_runs[key]


def differences(a, b, at: str = "") -> list[str]:
    """Where two nested states differ in as much as one bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        return [line for key in a for line in differences(a[key], b[key], f"{at}/{key}")]
    if isinstance(a, list | tuple):
        return [line for i, (x, y) in enumerate(zip(a, b, strict=True)) for line in differences(x, y, f"{at}/{i}")]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [at]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """TensorBoard's view: steps and values of every tag, in the order in which they are shown."""
    found = {}
    for phase in ("offline", "online"):
        events = EventAccumulator(str(folder / phase), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[f"{phase}: {tag}"] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def assert_equal_runs(folder: Path, other: Path) -> None:
    for name in ("online.pt", "offline.pt"):
        a, b = (torch.load(path / name, weights_only=True) for path in (folder, other))
        assert differences(a, b, name) == []
        assert len([value for value in a["agent"].values() if isinstance(value, torch.Tensor)]) > 10
    a, b = (torch.load(path / "checkpoint.pt", weights_only=True) for path in (folder, other))
    assert differences(a["buffer"], b["buffer"]) == []
    a, b = (json.loads((path / "summary.json").read_text()) for path in (folder, other))
    for name in ("offline_score", "final_score", "lowest_score", "drop", "regret", "degradation_area", "steps_to_gain"):
        assert a[name] == b[name], name


def assert_equal_logs(folder: Path, other: Path) -> None:
    """Every point once, none lost, the same values."""
    a, b = scalars(folder), scalars(other)
    assert a.keys() == b.keys()
    for tag in a:
        assert [step for step, _ in a[tag]] == [step for step, _ in b[tag]], f"{tag}: points lost or doubled"
        if "SPS" not in tag:
            assert a[tag] == b[tag], tag


def next_second() -> None:
    """TensorBoard reads its files in the order of their names, which begin with the second they were made in."""
    time.sleep(1.01 - time.time() % 1)


def wait_for(condition, process, timeout: float = 600) -> None:
    began = time.monotonic()
    while not condition():
        assert process.exitcode is None, f"ended before it could be interrupted:\n{process.log.read_text()}"
        assert time.monotonic() - began < timeout, "never came to where it should be interrupted"
        time.sleep(0.005)


def written_since(path: Path, moment: float):
    return lambda: path.exists() and path.stat().st_mtime > moment


def checkpoint_of(folder: Path, phase: str, moment: float):
    """Whether this phase has left a new checkpoint."""

    def found() -> bool:
        checkpoint, ended = folder / "checkpoint.pt", folder / "offline.pt"
        if phase == "online":
            return ended.exists() and checkpoint.stat().st_mtime > max(moment, ended.stat().st_mtime)
        return written_since(checkpoint, moment)()

    return found


LONG = {"offline_steps": 400, "online_steps": 500, "eval_every": 100, "save_every": 25, "eval_episodes": 1}


def test_killed_at_random_moments_of_both_phases(cli, toy_args, tmp_path_factory):
    """SIGKILL five times, each time with --resume from the beginning of the command line on."""
    args, rng = toy_args | LONG, random.Random()
    folder, phases = run_folder(args), []
    for target in ("offline", "offline", "online", "online", "online"):
        next_second()
        began = time.time()
        process = cli.start(SCRIPT, args | {"resume": True})
        wait_for(checkpoint_of(folder, target, began), process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        phases.append("online" if (folder / "offline.pt").exists() else "offline")
    assert phases.count("online") >= 3 and "offline" in phases
    assert not (folder / "summary.json").exists()
    next_second()
    code, output = cli(SCRIPT, args | {"resume": True})
    assert code == 0, output
    reference = whole(args, tmp_path_factory)
    assert_equal_runs(folder, reference)
    assert_equal_logs(folder, reference)


def crash_at(monkeypatch, owner, name: str, count: int) -> None:
    """The count-th call of `owner.name` from now on never comes."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            raise Crash
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


MOMENTS = {
    "before the first checkpoint": [(iql.Agent, "update", 10)],
    "while the first checkpoint is written": [(os, "fsync", 1)],
    "before the second checkpoint gets its name": [(os, "replace", 2)],
    "as offline.pt gets its name": [(iql, "save_file", 1)],
    "in the evaluation between the phases": [(iql, "evaluate", 5)],
    "after the first online evaluation": [(iql.ReplayBuffer, "add", 1)],
    "in an online episode": [(iql.ReplayBuffer, "add", 33)],
    "in an online update": [(iql.Agent, "update", 150)],
    "at the last online step": [(iql.ReplayBuffer, "add", 120)],
    "before summary.json": [(iql, "degradation", 1)],
    "three times": [(iql.Agent, "update", 70), (iql.ReplayBuffer, "add", 50), (iql.ReplayBuffer, "add", 30)],
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_an_exact_moment(toy_args, tmp_path_factory, monkeypatch, moment):
    args = toy_args | {"offline_steps": 80, "eval_episodes": 1}
    reference, folder = whole(args, tmp_path_factory), run_folder(args)
    for owner, name, count in MOMENTS[moment]:
        with monkeypatch.context() as patch:
            add_scalar = SummaryWriter.add_scalar
            patch.setattr(SummaryWriter, "add_scalar", lambda self, *a, f=add_scalar: (f(self, *a), self.flush()))
            crash_at(patch, owner, name, count)
            with pytest.raises(Crash):
                iql.train(iql.Args(**args | {"resume": True}))
        random.seed(), np.random.seed(), torch.seed()
        next_second()
    iql.train(iql.Args(**args | {"resume": True}))
    assert_equal_runs(folder, reference)
    assert_equal_logs(folder, reference)


def test_no_offline_step_is_missed_where_checkpoints_are_to_be_rarer_than_before(toy_args, monkeypatch):
    args = toy_args | {"offline_steps": 200, "online_steps": 2, "eval_every": 100, "eval_episodes": 1, "save_every": 25}
    with monkeypatch.context() as patch, pytest.raises(Crash):
        crash_at(patch, iql, "save_file", 5)  # args.json, then checkpoints after 25, 50 and 75 updates
        iql.train(iql.Args(**args))
    updates, update = [], iql.Agent.update
    monkeypatch.setattr(iql.Agent, "update", lambda *a: (updates.append(1), update(*a))[1])
    next_second()
    iql.train(iql.Args(**args | {"save_every": 50, "resume": True}))
    assert len(updates) == 200 - 75 + 1, "and one online, after the first step"
    checkpoint = torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)
    assert checkpoint["progress"]["offline_step"] == 200


def test_everything_logged_before_a_checkpoint_is_on_the_disk_with_it(toy_args, monkeypatch):
    """What a killed process had not yet written is logged again only if it came after the checkpoint."""
    seen, save_file = [], iql.save_file

    def saving(path, content):
        save_file(path, content)
        if path.name == "checkpoint.pt":
            points = scalars(run_folder(toy_args)).get("offline: offline/normalized_score", [])
            seen.append((content["progress"]["offline_step"], [step for step, _ in points]))

    monkeypatch.setattr(iql, "save_file", saving)
    iql.train(iql.Args(**toy_args | {"offline_steps": 120, "online_steps": 10}))
    assert (40, [20, 40]) in seen and (80, [20, 40, 60, 80]) in seen, seen


def test_stopped_by_signals_and_continued_as_it_says(cli, toy_args, tmp_path_factory):
    args = toy_args | LONG
    folder, words = run_folder(args), None
    for number, file in ((signal.SIGTERM, "checkpoint.pt"), (signal.SIGUSR1, "offline.pt")):
        next_second()
        began = time.time()
        process = cli.start(SCRIPT, args if words is None else words)
        wait_for(written_since(folder / file, began), process)
        os.kill(process.pid, number)
        process.join(600)
        output = process.log.read_text()
        assert process.exitcode == 0, output
        assert "Traceback" not in output and not (folder / "summary.json").exists()
        line = next(line for line in output.splitlines() if "continue with: " in line)
        interpreter, script, *words = shlex.split(line.split("continue with: ")[1])
        assert (interpreter, script) == ("python", str(SCRIPT))
    next_second()
    code, output = cli(SCRIPT, words)
    assert code == 0, output
    reference = whole(args, tmp_path_factory)
    assert_equal_runs(folder, reference)
    assert_equal_logs(folder, reference)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_signal_stops_every_script_at_the_end_of_its_episode(script, toy_args, monkeypatch):
    module, added = importlib.import_module(script.stem), []
    add = module.ReplayBuffer.add

    def add_and_stop(*row):
        added.append(1)
        if len(added) == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        add(*row)

    monkeypatch.setattr(module.ReplayBuffer, "add", add_and_stop)
    args = toy_args | {"exp_name": script.stem, "online_steps": 200, "save_every": 10_000}
    with pytest.raises(SystemExit) as stopped:
        module.train(module.Args(**args))
    progress = torch.load(run_folder(args) / "checkpoint.pt", weights_only=True)["progress"]
    assert stopped.value.code == 0 and 20 <= progress["online_step"] < 20 + 50 and progress["episode"] >= 1
    module.train(module.Args(**args | {"resume": True}))
    assert json.loads((run_folder(args) / "summary.json").read_text())["online_steps"] == 200


def test_resuming_a_finished_run_changes_nothing(toy_args):
    first = iql.train(iql.Args(**toy_args))
    folder = run_folder(toy_args)
    before = {name: torch.load(folder / name, weights_only=True) for name in ("offline.pt", "online.pt")}
    points = scalars(folder)
    next_second()
    second = iql.train(iql.Args(**toy_args | {"resume": True}))
    for name, content in before.items():
        assert differences(content, torch.load(folder / name, weights_only=True)) == [], name
    assert scalars(folder) == points
    times = ("seconds", "updates_per_second")
    assert {k: v for k, v in first.items() if k not in times} == {k: v for k, v in second.items() if k not in times}


def test_checkpoint_holds_everything_and_is_safe_to_load(toy_args):
    iql.train(iql.Args(**toy_args))
    saved = torch.load(run_folder(toy_args) / "checkpoint.pt", weights_only=True)
    assert saved["progress"]["offline_step"] == 40 and saved["progress"]["online_step"] == 120
    assert len(saved["buffer"]["online"]) == 120
    assert {"agent", "buffer", "progress", "rng"} <= saved.keys()
    names = {name.split(".")[0] for name in saved["agent"]}
    assert {"actor", "critic", "value", "target_critic"} <= names
    fresh = iql.Agent(2, 2, iql.Args(hidden=16, dropout=0.0, expectile=0.7, beta=3.0))
    fresh.load_state_dict(saved["agent"])
    steps = {float(state["step"]) for state in fresh.optimizer.state.values()}
    assert steps == {40.0 + 119.0}, "Adam's moments are not restored"


# ---- an offline phase taken from another run ----


def from_offline_checkpoint(args: dict) -> tuple[Path, Path]:
    iql.train(iql.Args(**args))
    other = args | {"exp_name": "online_only", "offline_checkpoint": str(run_folder(args) / "offline.pt")}
    iql.train(iql.Args(**other))
    return run_folder(args), run_folder(other)


def test_offline_checkpoint_starts_from_the_same_agent(toy_args):
    folder, other = from_offline_checkpoint(toy_args)
    a, b = (torch.load(path / "offline.pt", weights_only=True) for path in (folder, other))
    assert differences(a, b) == [], "networks or optimiser differ where the online phase begins"
    a, b = (json.loads((path / "summary.json").read_text()) for path in (folder, other))
    assert a["offline_score"] == b["offline_score"]


@pytest.mark.parametrize("name", ["jsrl_gated", "sft_reset"])
def test_offline_phase_of_iql_is_taken_over_by_the_methods_that_begin_with_it(toy_args, name):
    iql.train(iql.Args(**toy_args))
    module, start = importlib.import_module(name), run_folder(toy_args) / "offline.pt"
    module.train(module.Args(**toy_args | {"offline_checkpoint": str(start)}))
    folders = run_folder(toy_args), run_folder(toy_args | {"exp_name": name})
    a, b = (torch.load(folder / "offline.pt", weights_only=True) for folder in folders)
    assert differences(a, b) == []
    a, b = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    assert a["offline_score"] == b["offline_score"]
    assert b["updates_per_second"] * b["seconds"] == pytest.approx(toy_args["online_steps"])
    assert a["updates_per_second"] * a["seconds"] == pytest.approx(toy_args["offline_steps"] + toy_args["online_steps"])


def test_offline_checkpoint_leaves_the_learning_rate_as_asked_for(toy_args):
    iql.train(iql.Args(**toy_args))
    other = {"exp_name": "faster", "learning_rate": 0.01}
    other["offline_checkpoint"] = str(run_folder(toy_args) / "offline.pt")
    iql.train(iql.Args(**toy_args | other))
    saved = torch.load(run_folder(toy_args | other) / "online.pt", weights_only=True)["agent"]["_extra_state"]
    assert [group["lr"] for group in saved["param_groups"]] == [0.01]
    assert float(saved["state"][0]["step"]) > toy_args["online_steps"], "moments are kept"


def test_offline_checkpoint_equals_continuing(toy_args):
    folder, other = from_offline_checkpoint(toy_args)
    assert_equal_runs(folder, other)


class Dying(gym.Wrapper):
    """An environment that ends the process at its 155th step."""

    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 155:
            raise Crash
        return self.env.step(action)


@pytest.mark.parametrize("script, candidate", [*((s, False) for s in SCRIPTS), (ROOT / "jsrl_gated.py", True)])
def test_every_script_resumes_online_to_the_same_numbers(script, candidate, toy_args, tmp_path, monkeypatch):
    module = importlib.import_module(script.stem)
    args = toy_args | {"online_steps": 240, "save_every": 60}
    args |= {"warmup_steps": 40} if script.stem == "jsrl_gated" else {}  # the gate is to move
    if candidate:  # a copy of the explorer is tested from the third episode on, and becomes the guide after two
        end = module.Gate.end

        def proposing(gate, *episode):
            log = end(gate, *episode)
            gate.candidate = gate.candidate or len(gate.guide) == 2
            return log

        monkeypatch.setattr(module.Gate, "end", proposing)
        monkeypatch.setattr(module.Gate, "judge", lambda gate: int(len(gate.tested) == 2))
    whole = module.train(module.Args(**args | {"run_dir": str(tmp_path / "whole")}))
    make_env = module.Task.make_env
    with monkeypatch.context() as patch:  # the evaluation environment is made with an argument
        patch.setattr(module.Task, "make_env", lambda task, *to: make_env(task, *to) if to else Dying(make_env(task)))
        with pytest.raises(Crash):
            module.train(module.Args(**args))
    saved = torch.load(next(Path(args["run_dir"]).glob("*/checkpoint.pt")), weights_only=True)["progress"]
    assert 60 <= saved["online_step"] < 154, "killed within an episode, later than saved"
    resumed = module.train(module.Args(**args | {"resume": True}))
    same = [key for key in whole if key not in ("seconds", "updates_per_second")]
    assert {key: whole[key] for key in same} == {key: resumed[key] for key in same}
    folders = tmp_path / "whole", Path(args["run_dir"])
    one, other = (torch.load(next(folder.glob("*/online.pt")), weights_only=True) for folder in folders)
    if script.stem == "jsrl_gated":
        assert one["gate"] == other["gate"]
        assert len(one["gate"]["tested"]) >= 2 if candidate else one["gate"]["trial"] and one["gate"]["results"]
    for part in set(one) & {"agent", "explorer", "guide", "proven", "learner", "evaluator"}:
        tensors = [key for key, value in one[part].items() if torch.is_tensor(value)]
        assert tensors and all(torch.equal(one[part][key], other[part][key]) for key in tensors)
