"""report.py on run folders made by hand: the numbers, what is listed apart, and that the README shows results/."""

import csv
import importlib
import json
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import tyro
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import report

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """class Args:
    env_id: str = "hopper-medium"
    seed: int = 1
    exp_name: str = "NAME"
    run_dir: str = "runs"
    offline_steps: int = 1_000_000
    utd_ratio: int = 1
    tolerance: float = 2.0
    expectile: float | None = None
    cuda: bool = torch.cuda.is_available()
"""
VERSIONS = {"torch": "2.13.0+cpu", "mujoco": "3.3.7"}


def make_run(folder, task="hopper-medium", script="iql_finetune", seed=1, scores=(50.0, 40.0, 60.0), learner=None,
             scalars=None, complete=True, versions=VERSIONS, dataset_id=None, summary=None, **settings):  # fmt: skip
    """A run folder as the scripts leave it, evaluated every 5,000 steps; `settings` go to args.json."""
    path = folder / f"{task}__{script}__{seed}"
    path.mkdir(parents=True)
    online_steps, base = 5_000 * (len(scores) - 1), script.split("_")[0]
    file = {"jsrl": "jsrl_gated", "sft": "sft_reset", "cal": "cal_ql"}.get(base, "iql_finetune")
    (path / f"{file}.py").write_text(SCRIPT.replace("NAME", file))
    args = {"env_id": task, "seed": seed, "exp_name": script, "run_dir": str(folder), "offline_steps": 100_000}
    args |= {"online_steps": online_steps, "utd_ratio": 1, "eval_every": 5_000, "eval_episodes": 10, "tolerance": 2.0}
    args |= {"expectile": 0.7, "cuda": False, "offline_checkpoint": None} | settings
    args["dataset_id"] = dataset_id or f"o2o/{task.replace('-', '/', 1)}-v0"
    (path / "args.json").write_text(json.dumps(args))
    loss = [max(scores[0] - score, 0.0) for score in scores]
    gain = [i for i in range(len(scores) - 2) if min(scores[i : i + 3]) > scores[0] + 10]
    written = {
        "env_id": task,
        "dataset_id": args["dataset_id"],
        "eval_env": "Hopper-v4",
    }
    written |= {"algorithm": script, "seed": seed, "offline_score": scores[0], "final_score": scores[-1]}
    written |= {"lowest_score": min(scores), "drop": max(loss), "degradation_area": sum(loss) / len(loss)}
    written |= {"regret": 1 - sum(scores) / len(scores) / 100, "steps_to_gain": 5_000 * gain[0] if gain else None}
    written |= {"seconds": 10.0, "versions": versions, "device": "cpu", "commit": "abc"} | (summary or {})
    if complete:
        (path / "summary.json").write_text(json.dumps(written))
    steps = range(0, online_steps + 1, 5_000)
    tags = {"online/normalized_score": scores, "online/learner_score": learner if learner is not None else scores}
    tags = {tag: zip(steps, values, strict=True) for tag, values in tags.items()} | (scalars or {})
    writer = EventFileWriter(str(path / "online"))
    for tag, points in tags.items():
        for step, value in points:
            event = Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))
            writer.add_event(event)
    writer.close()
    return path


def run_report(*folders, out, readme=None):
    report.main(report.Args(tuple(folders), out, readme=readme))
    return report.read_csv(out / "per_seed.csv"), (out / "table.md").read_text()


def reported_rows() -> list[dict]:
    with open(report.Args.reported, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def no_plots(request, monkeypatch):
    if request.function is not test_curves:
        monkeypatch.setattr(report, "draw", lambda *_: None)


def cells(text: str, *words: str) -> list[str]:
    """The cells of the first table line that has all the words as cells."""
    for line in text.splitlines():
        found = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and set(words) <= set(found):
            return found
    raise AssertionError(f"no line with {words} in\n{text}")


def test_numbers_are_those_worked_by_hand(tmp_path):
    runs = tmp_path / "runs"
    make_run(runs, seed=1, scores=(50, 40, 61, 62, 63))  # drop 10, area 10/5, gains at 10,000
    make_run(runs, seed=2, scores=(52, 32, 52, 52, 57))  # drop 20, area 20/5, never gains
    rows, text = run_report(runs, out=tmp_path / "out")
    assert [(row["apart"], row["eval_env"]) for row in rows] == [("", "Hopper-v4")] * 2
    line = cells(report.main_table(rows, []), "hopper-medium (STAND-IN v0)", "iql_finetune")
    # With two runs the bootstrap's 2.5 % and 97.5 % percentiles are the smaller and the larger.
    assert line[2:8] == ["2", "51.0 [50.0, 52.0]", "60.0 [57.0, 63.0]", "15.0 [10.0, 20.0]", "3.0 [2.0, 4.0]",
                         "0.48 [0.45, 0.51]"]  # fmt: skip
    assert line[8] == "10,000 (1 of 2)" and line[9] == "-"
    assert "Headline" in text and "2 runs; offline steps 100,000; online steps 20,000" in text
    assert "versions torch 2.13.0 mujoco 3.3.7; device cpu; commit abc." in text


def test_statistics_over_tasks():
    a, b = np.array([1.0, 2.0, 3.0, 10.0]), np.array([5.0, 7.0])
    assert report.mean(a, b) == 5.0  # mean of 4 and 6: each task counts once
    assert report.iqm(a, b) == np.mean([2, 3, 5, 7])  # a quarter of 6 runs is 1, cut off at each end
    assert report.improvement(a, b) == (0 + 0 + 0 + 2) / 8
    assert report.improvement(a, a) == 0.5
    assert report.ratio(a, b) == 4 / 6
    value, low, high = report.interval(report.mean, [a, b])
    assert value == 5.0 and 2.9 < low < value < high < 8.1
    assert report.show(report.interval(report.mean, [np.array([3.0])])) == "3.0"  # one run: no interval


def test_where_neither_script_drops_there_is_no_ratio(tmp_path):
    for script in ("jsrl_gated", "iql_finetune"):
        make_run(tmp_path / "runs", script=script, scores=(50, 51, 52))
    _, text = run_report(tmp_path / "runs", out=tmp_path / "out")
    assert cells(text, "jsrl_gated", "iql_finetune")[2:7] == ["1", "1", "0.0 → 0.0", "-", "neither gains"]


def test_runs_of_more_than_one_version_of_a_script_are_marked(tmp_path):
    for seed in (1, 2):
        path = make_run(tmp_path / "runs", seed=seed)
    rows, _ = run_report(tmp_path / "runs", out=tmp_path / "one")
    assert cells(report.main_table(rows, []), "iql_finetune")[2] == "2"
    script, text = path / "iql_finetune.py", (path / "iql_finetune.py").read_text()
    script.write_text(f'"""A docstring."""\n\n# a comment\n{text}')
    rows, _ = run_report(tmp_path / "runs", out=tmp_path / "same")
    assert cells(report.main_table(rows, []), "iql_finetune")[2] == "2", "nothing that it does has changed"
    script.write_text(text + "changed = True\n")
    rows, text = run_report(tmp_path / "runs", out=tmp_path / "two")
    assert cells(report.main_table(rows, []), "iql_finetune")[2] == "2†" and "†: with more than one version" in text


@pytest.mark.parametrize("other", [{"versions": VERSIONS | {"torch": "2.11.0"}}, {"summary": {"device": "cuda"}}])
def test_runs_with_other_versions_of_torch_or_on_another_device_are_marked(tmp_path, other):
    make_run(tmp_path / "runs", seed=1)
    make_run(tmp_path / "runs", seed=2, **other)
    rows, text = run_report(tmp_path / "runs", out=tmp_path / "out")
    assert cells(report.main_table(rows, []), "iql_finetune")[2] == "2†"
    assert ("torch 2.11.0" if "versions" in other else "device cpu, cuda") in text


def test_headline(tmp_path):
    """Drops of 1 and 3 against 8 and 8: 75 % less. Gains at 10,000 twice, at 10,000 and never (20,000): over 1.5x."""
    for seed, drop in ((1, 1), (2, 3)):
        make_run(tmp_path / "runs", script="jsrl_gated", seed=seed, scores=(50, 50 - drop, 61, 61, 61))
    make_run(tmp_path / "runs", seed=1, scores=(50, 42, 61, 61, 61))
    make_run(tmp_path / "runs", seed=2, scores=(50, 42, 50, 50, 50))
    make_run(tmp_path / "runs", seed=3, scores=(50, 0, 0, 0, 0))  # a seed and a task that jsrl_gated does not have
    make_run(tmp_path / "runs", task="walker2d-medium", seed=1, scores=(50, 0, 0, 0, 0))
    _, text = run_report(tmp_path / "runs", out=tmp_path / "out")
    line = cells(text, "jsrl_gated", "iql_finetune")
    assert line[2:6] == ["1", "2", "8.0 → 2.0", "75.0 % [62.5, 87.5]"]
    assert line[6:] == ["at least 1.50x [1.00, 2.00], 1 task", "0.75 [0.50, 1.00]", "1.00 [1.00, 1.00]"]


@pytest.mark.parametrize(
    "mine, other, ratio",
    [
        ((50, 61, 61, 61, 61), (50, 50, 50, 61, 61), "at least 4.00x"),  # from 5,000 on; never has 20,000
        ((50, 50, 50, 61, 61), (50, 61, 61, 61, 61), "at most 0.25x"),
        ((50, 50, 61, 61, 61), (50, 61, 61, 61, 61), "0.50x"),
    ],
)
def test_headline_says_where_a_ratio_is_a_bound(tmp_path, mine, other, ratio):
    for script, scores in (("jsrl_gated", mine), ("iql_finetune", other)):
        make_run(tmp_path / "runs", script=script, scores=scores)
    _, text = run_report(tmp_path / "runs", out=tmp_path / "out")
    assert cells(text, "jsrl_gated", "iql_finetune")[6] == f"{ratio}, 1 task"


def test_headline_marks_scripts_of_more_than_one_version(tmp_path):
    for seed in (1, 2):
        path = make_run(tmp_path / "runs", script="jsrl_gated", seed=seed)
        make_run(tmp_path / "runs", seed=seed)
    (path / "jsrl_gated.py").write_text((path / "jsrl_gated.py").read_text() + "changed = True\n")
    _, text = run_report(tmp_path / "runs", out=tmp_path / "out")
    assert cells(text, "jsrl_gated†", "iql_finetune")


def test_scripts_that_have_fewer_tasks_do_not_empty_the_table_over_tasks(tmp_path):
    for task in ("hopper-medium", "walker2d-medium"):
        for script in ("jsrl_gated", "iql_finetune"):
            make_run(tmp_path / "runs", task=task, script=script)
    make_run(tmp_path / "runs", script="jsrl_gated_no_gate")
    rows, _ = run_report(tmp_path / "runs", out=tmp_path / "out")
    table = report.aggregate_table(rows)
    assert cells(table, "jsrl_gated")[1:3] == cells(table, "iql_finetune")[1:3] == ["2", "2"]
    assert "jsrl_gated_no_gate" not in table


def test_listed_apart_and_never_averaged(tmp_path):
    runs = tmp_path / "runs"
    for seed in (1, 2, 3):
        make_run(runs, seed=seed)
    make_run(runs, seed=4, complete=False)
    make_run(runs, seed=5, scores=(50, 40, 60, 70, 80, 90))  # more online steps
    make_run(runs, seed=6, versions=VERSIONS | {"mujoco": "3.2.0"})
    make_run(runs, seed=7, tolerance=9.0)
    make_run(runs, seed=8, expectile=0.9)
    make_run(runs, seed=9, utd_ratio=4)
    make_run(runs, seed=10, summary={"final_score": 99.0})
    make_run(tmp_path / "again", seed=1)
    make_run(runs, task="pen-human", expectile=0.8)  # another domain's value: no reason
    make_run(runs, task="walker2d-medium", tolerance=9.0)  # not a domain's value: one
    rows, text = run_report(runs, tmp_path / "again", out=tmp_path / "out")
    reasons = {(row["task"], row["seed"]): row["apart"] for row in rows if row["apart"]}
    hopper = {int(seed): reason for (task, seed), reason in reasons.items() if task == "hopper-medium"}
    assert hopper[4] == "incomplete: 10000 of 10000 online steps"
    assert "online_steps 25000, others 10000" in hopper[5]
    assert hopper[6] == "different settings: mujoco 3.2.0, others 3.3.7"
    assert hopper[7] == "different settings: tolerance 9.0, others 2.0"
    assert hopper[8] == "different settings: expectile 0.9, others 0.7"
    assert "utd_ratio 4, others 1" in hopper[9]
    assert hopper[10] == "its learning curve and its summary.json disagree"
    assert hopper[1].startswith("there twice")
    assert ("pen-human", "1") not in reasons and "tolerance" in reasons["walker2d-medium", "1"]
    line = cells(report.main_table(rows, []), "hopper-medium (STAND-IN v0)")
    assert line[2] == "3" and line[4] == "60.0 [60.0, 60.0]"
    for reason in reasons.values():
        assert reason in text


def test_official_and_stand_in_are_two_rows(tmp_path):
    make_run(tmp_path / "a", task="hopper-medium")
    make_run(tmp_path / "b", task="hopper-medium", dataset_id="hopper-medium-v2", scores=(70, 70, 70))
    rows, _ = run_report(tmp_path / "a", tmp_path / "b", out=tmp_path / "out")
    table = report.main_table(rows, [])
    assert cells(table, "hopper-medium (STAND-IN v0)")[4] == "60.0" and cells(table, "hopper-medium")[4] == "70.0"


@pytest.mark.parametrize("versions", (("v0", "v1"), ("v9", "v10")))
def test_two_versions_of_a_stand_in_are_one_task_on_the_newer_where_both_scripts_have_it(tmp_path, versions):
    for version, drop in zip(versions, (30.0, 10.0), strict=True):
        for script, lowest in (("jsrl_gated", 50.0), ("iql_finetune", 50.0 - drop)):
            for seed in (1, 2):
                run = {"script": script, "seed": seed, "scores": (50.0, lowest, 60.0)}
                make_run(tmp_path / version, dataset_id=f"o2o/hopper/medium-{version}", **run)
    rows, _ = run_report(*(tmp_path / version for version in versions), out=tmp_path / "out")
    assert cells(report.headline_table(rows), "jsrl_gated", "iql_finetune")[2:5] == ["1", "2", "10.0 → 0.0"]
    assert cells(report.aggregate_table(rows), "iql_finetune")[1:3] == ["1", "2"]
    table = report.main_table(rows, [])
    assert all(cells(table, f"hopper-medium (STAND-IN {version})", "iql_finetune") for version in versions)


def test_reported_numbers_beside_ours(tmp_path):
    make_run(tmp_path, task="pen-cloned", dataset_id="D4RL/pen/cloned-v2")
    make_run(tmp_path, task="kitchen-mixed", script="cal_ql", dataset_id="D4RL/kitchen/mixed-v2")
    make_run(tmp_path, task="hopper-medium", script="offline", scores=(66, 66, 66))
    rows, text = run_report(tmp_path, out=tmp_path / "out")
    assert cells(text, "pen-cloned", "iql_finetune")[-1] == "84.19 → 102.02 at 1,000,000 (CORL)"
    assert cells(text, "kitchen-mixed", "cal_ql")[-1] == "-"  # what is only remembered is not compared with
    assert "Cal-QL paper, main table‡" in cells(text, "kitchen-mixed", "Cal-QL")[-1]
    offline = cells(text.split("## Offline")[1], "hopper-medium (STAND-IN v0)")
    assert offline[1:4] == ["100,000", "66.0 (1)", "-"]
    assert offline[4] == "67.53 CORL; 56.78 JAX-CORL; 66.3 IQL paper‡"
    assert "## Reported online\n\nNone for these tasks." in report.all_tables([rows[0]], reported_rows())
    reported = reported_rows()
    assert {row["trust"] for row in reported} == {"file", "text", "derived", "recall"}
    assert all(row["source"] and row["reported_on"] and float(row["score"]) < 200 for row in reported)


def test_resumed_run_is_read_once(tmp_path):
    """Scalars logged again after a resume replace those logged before."""
    path = make_run(tmp_path)
    writer = EventFileWriter(str(path / "online"), filename_suffix=".resumed")
    for step, value in ((5_000, 40.0), (10_000, 60.0)):
        tag = "online/normalized_score"
        writer.add_event(Event(step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)])))
    writer.close()
    curve = report.read_scalars(path)["online/normalized_score"]
    np.testing.assert_allclose(curve, [[0, 50], [5_000, 40], [10_000, 60]])


def test_commands_reproduce_the_run(tmp_path):
    make_run(tmp_path, script="jsrl_gated_open", gate="open", calibrate=False, offline_checkpoint="a b/offline.pt")
    make_run(tmp_path, script="offline")
    run_report(tmp_path, out=tmp_path / "out")
    first, line = (tmp_path / "out" / "commands.txt").read_text().splitlines()
    assert "--exp-name offline" in first  # what the others start from
    assert line.startswith("python jsrl_gated.py --exp-name jsrl_gated_open --run-dir ")
    assert "--offline-steps 100000" in line and "--no-calibrate" in line and "--gate open" in line
    assert "--offline-checkpoint 'a b/offline.pt'" in line and "--no-cuda" in line
    assert "--tolerance" not in line and "--seed" not in line  # the script's own defaults


@pytest.mark.parametrize("name", ["jsrl_gated", "sft_reset", "cal_ql", "iql_finetune"])
def test_a_script_takes_its_own_command(name, tmp_path):
    """With every switch turned, and either value where the default is the domain's."""
    module = importlib.import_module(name)
    for word in (True, False):
        args = module.Args(**module.Args.domain_values["any"], env_id="walker2d-medium", seed=3)
        for field in fields(args):
            if field.type is bool and field.name not in report.ABOUT:
                setattr(args, field.name, not field.default)
            elif field.type == bool | None:
                setattr(args, field.name, word)
        path = tmp_path / str(word)
        path.mkdir()
        (path / "args.json").write_text(json.dumps(vars(args) | {"dataset_id": "o2o/walker2d/medium-v0"}))
        shutil.copy(ROOT / f"{name}.py", path)
        words = shlex.split(report.command(*report.read_args(path)))
        assert words[:2] == ["python", f"{name}.py"] and tyro.cli(module.Args, args=words[2:]) == args


def test_iql_is_scored_where_its_offline_phase_was_trained(tmp_path):
    """Another machine's evaluation of the same offline.pt may differ."""
    for script, score in (("jsrl_gated", 40.0), ("offline", 50.0), ("sft_reset", 60.0)):
        make_run(tmp_path, script=script, scores=(score, score))
    rows, _ = run_report(tmp_path, out=tmp_path / "out")
    assert cells(report.offline_table(rows, []), "hopper-medium (STAND-IN v0)")[2] == "50.0 (1)"


def test_scripts_are_compared_over_the_tasks_on_the_seeds_that_all_have(tmp_path):
    """A script that few seeds of a task were run with is left out, rather than taken as the mean of other runs."""
    for script, seeds in {"iql_finetune": (1, 2, 3, 4), "jsrl_gated": (1, 2, 3), "cal_ql": (1,)}.items():
        for seed in seeds:
            make_run(tmp_path, script=script, seed=seed, scores=(50, 50, 50.0 + seed), summary={"device": "c" * seed})
    rows, _ = run_report(tmp_path, out=tmp_path / "out")
    text = report.aggregate_table(rows)
    assert "cal_ql" not in text
    for script in ("iql_finetune†", "jsrl_gated†"):
        assert cells(text, script)[2] == "3" and cells(text, script)[4].startswith("52.0 [")


def test_offline_table_goes_by_script_and_settings_not_by_name(tmp_path):
    make_run(tmp_path, script="cal_ql_renamed", scores=(1.0, 1.0))
    make_run(tmp_path, script="iql_finetune", scores=(50.0, 50.0))
    make_run(tmp_path, script="iql_finetune_other", scores=(10.0, 10.0), expectile=0.5)
    make_run(tmp_path, script="offline", scores=(90.0, 90.0), offline_steps=200_000)
    rows, text = run_report(tmp_path, out=tmp_path / "out")
    found = report.offline_table(rows, [])
    assert cells(found, "task")[2:4] == ["IQL (seeds)", "cal_ql_renamed (seeds)"]
    assert cells(found, "hopper-medium (STAND-IN v0)")[1:4] == ["100,000", "50.0 (1)", "1.0 (1)"]
    assert "offline_steps 200000, others 100000" in text


def test_pairs_that_start_from_another_iql_are_not_compared(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, script="jsrl_gated", seed=seed)
        make_run(tmp_path, script="iql_finetune", seed=seed, batch_size=256)
        make_run(tmp_path, script="jsrl_gated_open", seed=seed, expectile=0.9)
    rows, text = run_report(tmp_path, out=tmp_path / "out")
    assert cells(report.headline_table(rows), "jsrl_gated")[1] == "iql_finetune"
    assert "jsrl_gated_open" not in report.headline_table(rows) and "expectile 0.9, others 0.7" in text


def test_a_reduction_of_no_drop_is_not_a_number(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path, script="jsrl_gated", seed=seed, scores=(50, 48))
        make_run(tmp_path, script="iql_finetune", seed=seed, scores=(50, 50))
        make_run(tmp_path, script="jsrl_gated_open", seed=seed, scores=(50, 45 if seed == 1 else 50))
    rows, _ = run_report(tmp_path, out=tmp_path / "out")
    assert cells(report.headline_table(rows), "iql_finetune")[4:6] == ["0.0 → 2.0", "-"]
    assert cells(report.headline_table(rows), "jsrl_gated_open")[4:6] == ["2.5 → 2.0", "20.0 %"]  # no bound below


def test_nothing_is_written_that_would_lose_rows_or_before_the_readme_is_found_fit(tmp_path, capsys):
    out = tmp_path / "out"
    for script in ("iql_finetune", "jsrl_gated"):
        make_run(tmp_path / "runs", script=script)
    run_report(tmp_path / "runs", out=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    make_run(tmp_path / "runs", script="jsrl_gated", seed=2)
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(SystemExit):
        run_report(tmp_path / "runs", out=out, readme=tmp_path / "README.md")
    assert "has no lines <!-- out -->" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report.main(report.Args((tmp_path / "runs", out), out, scripts=("jsrl_gated",)))
    assert "--scripts would remove the other scripts' runs" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_readme_is_updated_between_its_markers(tmp_path):
    make_run(tmp_path / "runs")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    rows, _ = run_report(tmp_path / "runs", out=tmp_path / "results", readme=readme)
    block = report.readme_block(rows, reported_rows())
    assert readme.read_text() == f"before\n<!-- results -->\n{block}<!-- /results -->\nafter\n"
    assert "hopper-medium (STAND-IN v0)" in block and "results/curves.png" in block
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/README.md").write_text(readme.read_text())
    maze = tmp_path / "results/maze"
    with pytest.raises(SystemExit) as error:
        run_report(tmp_path / "runs", out=maze, readme=readme)
    assert error.value.code == 2, "another folder has markers of its own"
    with pytest.raises(SystemExit) as error:
        run_report(tmp_path / "runs", out=tmp_path / "elsewhere", readme=tmp_path / "docs/README.md")
    assert error.value.code == 2, "a folder that is not below the README's is one clear line"
    readme.write_text("<!-- results/maze -->\n<!-- /results/maze -->")
    run_report(tmp_path / "runs", out=maze, readme=readme)
    assert "results/maze/curves.png" in readme.read_text()
    readme.write_text("no markers")
    with pytest.raises(SystemExit) as error:
        run_report(tmp_path / "runs", out=tmp_path / "results", readme=readme)
    assert error.value.code == 2 and readme.read_text() == "no markers"


def test_runs_are_added_to_an_earlier_report(tmp_path, capsys):
    """Two reports, the second with the first for its earlier runs, give what one report of all run folders gives."""
    for seed in (1, 2):
        make_run(tmp_path / "old", seed=seed, scalars={"gate/deployed": [(0, 0.0), (10, 0.0), (20, 0.2)]})
    make_run(tmp_path / "old", seed=3, complete=False)
    make_run(tmp_path / "old", seed=4, tolerance=9.0)  # the odd one, until there are more of its kind
    for seed in (5, 6, 7):
        make_run(tmp_path / "new", seed=seed, tolerance=9.0, scores=(51, 49, 47))
    run_report(tmp_path / "old", out=tmp_path / "first")
    assert (tmp_path / "first/curves.csv").read_text().count("gate/deployed") == 2 * 2, "held values: their changes"
    run_report(tmp_path / "old", tmp_path / "new", out=tmp_path / "at_once")
    rows, _ = run_report(tmp_path / "new", tmp_path / "first", out=tmp_path / "first")
    assert [row["seed"] for row in rows if not row["apart"]] == ["4", "5", "6", "7"]
    for name in ("per_seed.csv", "curves.csv", "settings.json", "commands.txt", "table.md"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "at_once" / name).read_text(), name

    make_run(tmp_path / "again", seed=3, scores=(70, 70, 70), tolerance=9.0)  # the one that was incomplete
    rows, _ = run_report(tmp_path / "again", tmp_path / "first", out=tmp_path / "first")
    assert [row["final_score"] for row in rows if row["seed"] == "3"] == [70] and len(rows) == 7

    table = tmp_path / "first/per_seed.csv"
    rows = list(csv.DictReader(table.open(newline="")))
    rows[0]["apart"] = "superseded: an earlier version"
    report.write_csv(rows, table)
    rows, _ = run_report(tmp_path / "again", tmp_path / "first", out=tmp_path / "first")
    assert [row["seed"] for row in rows if row["apart"].startswith("superseded")] == ["1"]

    make_run(tmp_path / "restarted", seed=3, complete=False, tolerance=9.0)
    make_run(tmp_path / "official", seed=3, dataset_id="hopper-medium-v2", scores=(80, 80, 80), tolerance=9.0)
    capsys.readouterr()
    rows, _ = run_report(tmp_path / "restarted", tmp_path / "official", tmp_path / "first", out=tmp_path / "first")
    assert "hopper-medium__iql_finetune__3: incomplete" in (out := capsys.readouterr().out) and "stays" in out
    assert [row["final_score"] for row in rows if row["seed"] == "3"] == [80, 70] and len(rows) == 8


def test_a_run_of_other_settings_does_not_take_the_place_of_a_reported_one(tmp_path, capsys):
    for seed in (1, 2, 3):
        make_run(tmp_path / "full", seed=seed)
    run_report(tmp_path / "full", out=tmp_path / "results")
    make_run(tmp_path / "trial", seed=1, scores=(50, 40))  # fewer steps
    for _ in range(2):  # reported again, nothing is there twice
        rows, _ = run_report(tmp_path / "trial", tmp_path / "results", out=tmp_path / "results")
        assert "of other settings or code than what was reported of it, which is kept" in capsys.readouterr().out
        assert sorted(row["seed"] for row in rows if not row["apart"]) == ["1", "2", "3"]
        assert [row["apart"][:18] for row in rows if row["apart"]] == ["different settings"] and len(rows) == 4


def test_a_run_marked_as_superseded_stays_apart_from_that_of_the_present_version(tmp_path):
    for seed in (1, 2):
        make_run(tmp_path / "runs", seed=seed)
    rows, _ = run_report(tmp_path / "runs", out=tmp_path / "results")
    rows[0] |= {"apart": "superseded: an earlier version", "code": "older"}
    report.write_csv(rows, tmp_path / "results/per_seed.csv")
    make_run(tmp_path / "present", seed=1, scores=(70, 70, 70))
    for _ in range(2):  # reported again, nothing is there twice
        rows, _ = run_report(tmp_path / "present", tmp_path / "results", out=tmp_path / "results")
        found = {row["final_score"]: row["apart"] for row in rows if row["seed"] == "1"}
        assert len(rows) == 3 and found.pop(70) == "" and list(found.values()) == ["superseded: an earlier version"]


@pytest.mark.parametrize("order", [("trial", "full"), ("full", "trial")])
def test_of_two_runs_of_a_seed_that_of_the_settings_of_the_others_stays(tmp_path, order):
    for seed in (1, 2, 3):
        make_run(tmp_path / "full", seed=seed)
    make_run(tmp_path / "trial", seed=1, scores=(50, 40))
    rows, _ = run_report(*(tmp_path / name for name in order), out=tmp_path / "out")
    assert sorted(row["seed"] for row in rows if not row["apart"]) == ["1", "2", "3"]


def test_without_out_nothing_but_the_run_folder_is_written_to(tmp_path, monkeypatch):
    make_run(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report.main(report.Args((tmp_path / "runs",)))
    assert (tmp_path / "runs/report/per_seed.csv").exists() and not list((tmp_path / "elsewhere").iterdir())


def test_two_runs_of_one_folder_name_keep_their_own_curves(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", scores=(70, 70, 70))
    make_run(tmp_path / "c", scores=(80, 80, 80), dataset_id="hopper-medium-v2")
    run_report(*(tmp_path / name for name in "abc"), out=tmp_path / "first")
    rows, _ = run_report(tmp_path / "first", out=tmp_path / "second")
    assert sorted(bool(row["apart"]) for row in rows) == [False, False, True]
    for name in ("per_seed.csv", "curves.csv", "settings.json"):
        assert (tmp_path / "first" / name).read_text() == (tmp_path / "second" / name).read_text(), name
    curves = {row["run"]: row["scalars"] for row in report.read_report(tmp_path / "second")}
    last = sorted(scalars["online/normalized_score"][-1, 1] for scalars in curves.values())
    assert last == [60, 70, 80] and all(len(c["online/normalized_score"]) == 3 for c in curves.values())


def test_no_run_folders(tmp_path, capsys):
    """A mistyped folder beside a good one would leave its rows out, and an earlier report in --out lose them."""
    make_run(tmp_path / "runs")
    for folders in ((tmp_path / "none",), (tmp_path / "runs", tmp_path / "none")):
        with pytest.raises(SystemExit) as error:
            report.main(report.Args(folders, tmp_path / "out"))
        assert error.value.code == 2 and f"no run folders in {tmp_path / 'none'}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_the_scripts_asked_for(tmp_path, capsys):
    for script in ("cal_ql", "iql_finetune", "offline"):
        make_run(tmp_path / "runs", script=script)
    report.main(report.Args((tmp_path / "runs",), tmp_path / "out", scripts=("cal_ql",)))
    rows = report.read_csv(tmp_path / "out/per_seed.csv")
    assert [row["script"] for row in rows] == ["cal_ql", "offline"]
    with pytest.raises(SystemExit) as error:
        report.main(report.Args((tmp_path / "runs",), tmp_path / "none", scripts=("cal_ql", "sft_reset")))
    assert error.value.code == 2 and not (tmp_path / "none").exists()
    assert "no runs of sft_reset there; there are: cal_ql, iql_finetune, offline" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["reported", "readme", "summary.json", "args.json"])
def test_what_cannot_be_read_is_one_line_before_anything_is_written(tmp_path, capsys, wrong):
    run, paths = make_run(tmp_path / "runs"), {}
    if "." in wrong:
        (run / wrong).write_text("")
    else:
        paths[wrong] = tmp_path / "nowhere"
    with pytest.raises(SystemExit) as error:
        report.main(report.Args((tmp_path / "runs",), tmp_path / "out", **paths))
    assert error.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


DAMAGE = [("curves.csv", None), ("settings.json", None), ("settings.json", ""), ("settings.json", "{}")]


@pytest.mark.parametrize(("name", "text"), DAMAGE)
def test_a_damaged_report_is_one_clear_line_and_stays_as_it_is(tmp_path, capsys, name, text):
    make_run(tmp_path / "runs")
    run_report(tmp_path / "runs", out=tmp_path / "out")
    (tmp_path / "out" / name).unlink() if text is None else (tmp_path / "out" / name).write_text(text)
    before = (tmp_path / "out/per_seed.csv").read_text()
    with pytest.raises(SystemExit) as error:
        run_report(tmp_path / "out", out=tmp_path / "out")
    assert error.value.code == 2 and "cannot read the report in" in capsys.readouterr().err
    assert (tmp_path / "out/per_seed.csv").read_text() == before


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/**/per_seed.csv")), ids=lambda path: path.parent.name)
def test_tables_equal_the_results(path):
    """What a table.md shows is what the per_seed.csv beside it gives."""
    assert (path.parent / "table.md").read_text() == report.all_tables(report.read_csv(path), reported_rows())


def test_readme_equals_the_results():
    block = report.readme_block(report.read_csv(ROOT / "results/per_seed.csv"), reported_rows())
    assert f"<!-- results -->\n{block}<!-- /results -->" in (ROOT / "README.md").read_text()


def test_curves(tmp_path):
    """One picture for all tasks and one a task, whatever subset of scalars a script logs."""
    gate = {"gate/deployed": [(0, 0.0), (4_000, 0.2), (9_000, 0.6)]}
    resets = {"evaluator/resets": [(1_000, 0), (6_000, 1)]}
    for seed in (1, 2):
        make_run(tmp_path / "runs", script="jsrl_gated", seed=seed, learner=(50, 20, 70), scalars=gate)
        make_run(tmp_path / "runs", script="sft_reset", seed=seed, scalars=resets)
    make_run(tmp_path / "runs", task="walker2d-medium", script="cal_ql")
    run_report(tmp_path / "runs", out=tmp_path / "out")
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["curves.png", "curves_hopper-medium.png", "curves_walker2d-medium.png"]

    run_report(tmp_path / "out", out=tmp_path / "from_report")
    for name in pictures:
        assert (tmp_path / "from_report" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_figures_say_which_script_has_fewer_runs(tmp_path):
    for script, seed in (("jsrl_gated", 1), ("jsrl_gated", 2), ("cal_ql", 1)):
        make_run(tmp_path / "runs", script=script, seed=seed)
    run_report(tmp_path / "runs", out=tmp_path / "out")
    rows, axes = report.read_report(tmp_path / "out"), Figure().subplots()
    report.draw_task([axes], rows, report.colors(rows))
    assert axes.get_title().endswith("seeds 1, 2") and [text.get_text() for text in axes.texts] == ["cal_ql 1 run"]


def test_a_script_has_one_color_in_all_figures(tmp_path, monkeypatch):
    variants = {"hopper-medium": ("sft_reset_online", "sft_reset"), "walker2d-medium": ("sft_reset_noreset", "cal_ql")}
    for task, scripts in variants.items():
        for script in scripts:
            make_run(tmp_path / "runs", task=task, script=script)
    given = []
    monkeypatch.setattr(report, "draw", lambda rows, path, color: given.append(color))
    report.main(report.Args((tmp_path / "runs",), out=tmp_path / "out"))
    assert len(given) == 3 and given[0] == given[1] == given[2] and len(set(given[0].values())) == 4
    assert list(given[0]) == ["sft_reset", "cal_ql", "sft_reset_noreset", "sft_reset_online"], "the order of the legend"
