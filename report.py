"""Run folders -> tables, learning curves and per-seed values, beside the reported numbers.

    python report.py runs/quick                       # writes runs/quick/report/
    python report.py runs/quick --out results --readme README.md    # also puts the tables between README's markers
    python report.py runs/new results --out results --readme README.md    # adds runs to an earlier report, whose run
                                                                          # folders may be gone
    python report.py runs/quick --scripts sft_reset iql_finetune --out runs/quick/sft       # of these scripts alone

Every table is made from the out folder's per_seed.csv (and --reported), the figures from its curves.csv, too. Means,
interquartile means (IQM) and 95 % percentile intervals from a stratified bootstrap (runs drawn anew within each task),
as Agarwal et al. 2021, "Deep RL at the Edge of the Statistical Precipice", by scipy. Never averaged, but listed apart:
runs that are incomplete, that differ in settings from the others, that are there twice, or whose curve contradicts
their summary; and those of an earlier report whose `apart`, in its per_seed.csv, begins with "superseded".
"""

import ast
import csv
import functools
import hashlib
import json
import os
import shlex
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats

METRICS = ("offline_score", "final_score", "lowest_score", "drop", "degradation_area", "regret", "steps_to_gain")
PROTOCOL = ("offline_steps", "online_steps", "utd_ratio", "eval_every", "eval_episodes")  # of all runs in a table
COLUMNS = ("task", "dataset_id", "script", "algorithm", "seed", *METRICS, *PROTOCOL, "versions", "device", "eval_env")
COLUMNS += ("commit", "code", "seconds", "updates_per_second", "run", "apart")
ABOUT = ["resume", "dataset_id", "script"]  # in args.json, but not to be repeated in a command
RESETS = "evaluator/resets"
HELD = ("gate/deployed", RESETS)  # logged now and then; keep their value in between
CURVES = ("online/normalized_score", "online/learner_score", *HELD)  # what the figures are drawn from
INDIFFERENT = "env_id seed exp_name run_dir dataset offline_checkpoint save_every cuda compile cuda_graph track "
INDIFFERENT = ABOUT + (INDIFFERENT + "wandb_project_name wandb_entity capture_video torch_deterministic").split()
# Why a run is set apart whatever the others are; the last is written by hand into an earlier report's per_seed.csv.
UNUSABLE = ("incomplete", "its learning curve and its summary.json disagree", "superseded")
PAIRS = [(script, other) for script in ("jsrl_gated", "sft_reset") for other in ("jsrl_gated_open", "iql_finetune")]
PAIRS += [("jsrl_gated", "jsrl_gated_no_gate"), ("sft_reset", "sft_reset_online"), ("sft_reset", "sft_reset_noreset")]
ORDER = ["jsrl_gated", "sft_reset", "cal_ql", "cal_ql_fast", "iql_finetune", "jsrl_gated_open"]  # of rows; then others
COLORS = dict(zip(ORDER, ("#0072B2", "#D55E00", "#009E73", "#8FD0B5", "#333333", "#56B4E9"), strict=True))
MORE_COLORS = ("#CC79A7", "#E69F00", "#8B5A2B", "#7F3FBF", "#B0A000", "#888888")
FROM_IQL = {"offline"} | {name for pair in PAIRS for name in pair}
# Of IQL, which the scripts of a pair start from: a comparison is of runs that have the same. That they start from one
# offline.pt is benchmark.sh's doing; their offline scores may differ where they ran on other machines.
SHARED = ("hidden", "batch_size", "gamma", "tau", "learning_rate", "expectile", "beta", "dropout", "reward_scale")
SHARED += ("reward_bias", "normalize_obs")
REPORTED_AS = {"iql_finetune": "IQL", "cal_ql": "Cal-QL"}


@dataclass
class Args:
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]  # folders of run folders, or of an earlier report
    out: Path | None = None  # where tables, plots and per-seed values go; default: report/ in the first of `runs`
    reported: Path = Path(__file__).resolve().parent / "results" / "reported.csv"  # published numbers
    readme: Path | None = None  # file to update between its markers
    scripts: tuple[str, ...] = ()  # report these alone (sft_reset, sft_reset_online, ...), with the offline phases


# ---- run folders -> rows ----
def read_scalars(folder: Path) -> dict[str, np.ndarray]:
    """TensorBoard scalars of a run, tag -> (n, 2) steps and values; what a resumed run did twice appears once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for part in sorted({path.parent for path in folder.rglob("events.out.tfevents.*")}):
        events = EventAccumulator(str(part), size_guidance={"scalars": 0}).Reload()
        for tag in events.Tags()["scalars"]:
            points = {event.step: event.value for event in events.Scalars(tag)}
            scalars[tag] = np.array(sorted(points.items())).reshape(-1, 2)
    return scalars


def read_args(folder: Path) -> tuple[dict, dict, str]:
    """args.json, the defaults in the Args of the run's own copy of its script (what is computed: its text), and that
    script's name."""
    args, defaults, script = json.loads((folder / "args.json").read_text()), {}, "?.py"
    for path in folder.glob("*.py"):
        found = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "Args"]
        script = path.name
        for field in found[0].body if found else []:
            if isinstance(field, ast.AnnAssign) and field.value is not None:
                try:
                    defaults[field.target.id] = ast.literal_eval(field.value)
                except ValueError:  # computed, as that of cuda
                    defaults[field.target.id] = ast.unparse(field.value)
    return args, defaults, script


def code_of(script: bytes) -> str:
    """Hash of a script's statements: a comment, a docstring or a line break makes no new version."""
    tree = ast.parse(script)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha1(ast.unparse(tree).encode()).hexdigest()[:7]


def command(args: dict, defaults: dict, script: str) -> str:
    """The command that ran it: every value that is not the script's default, those of the task's domain included."""
    words = ["python", script]
    for name, value in args.items():
        if name in ABOUT or value is None or (name in defaults and defaults[name] == value):
            continue
        flag, default = name.replace("_", "-"), defaults.get(name, "unknown")
        switch = isinstance(value, bool) and default is not None  # the domain's take a word: True
        words += [f"--{flag}" if value else f"--no-{flag}"] if switch else [f"--{flag}", str(value)]
    return shlex.join(words)


def read_runs(folders: tuple[Path, ...]) -> list[dict]:
    """One dict a run: COLUMNS, and scalars, settings, the names of those that are the domain's, and command."""
    rows = []
    for path in sorted(path.parent for folder in folders for path in folder.glob("*/args.json")):
        try:
            args, defaults, script = read_args(path)
            summary = json.loads((path / "summary.json").read_text()) if (path / "summary.json").exists() else {}
            row = {key: summary.get(key, args.get(key)) for key in COLUMNS} | {"apart": ""}
            row |= {"task": args["env_id"], "script": args["exp_name"], "algorithm": script.removesuffix(".py")}
            if summary:
                summary |= {key: float(summary[key]) for key in ("final_score", "lowest_score", "offline_score")}
        except (LookupError, SyntaxError, TypeError, ValueError) as error:
            fail(f"cannot read {path} ({error!r}); delete it, or restore args.json, summary.json and the script in it")
        versions = {name: number.split("+")[0] for name, number in summary.get("versions", {}).items()}
        row["run"] = f"{row['dataset_id']}/{path.name}"  # the same folder name may be of official data and a stand-in
        row |= {"code": code_of(b"".join(p.read_bytes() for p in path.glob("*.py")))}
        row |= {"versions": " ".join(f"{name} {number}" for name, number in versions.items())}
        row["settings"] = {k: v for k, v in args.items() if k not in INDIFFERENT}
        row["domain"] = [k for k in row["settings"] if defaults.get(k) is None]
        row |= {"command": command(args, defaults, script), "scalars": read_scalars(path)}
        scores = row["scalars"].get("online/normalized_score", np.zeros((0, 2)))
        if not summary:
            step = f"{scores[-1, 0]:.0f} of {args['online_steps']} online steps" if len(scores) else "offline phase"
            row["apart"] = f"{UNUSABLE[0]}: {step}"
        elif (
            not len(scores)
            or abs(scores[-1, 1] - row["final_score"]) + abs(scores[:, 1].min() - row["lowest_score"]) > 0.01
        ):
            row["apart"] = UNUSABLE[1]
        rows.append(row)
    return rows


def read_report(folder: Path) -> list[dict]:
    """The rows of an earlier report as `read_runs` gives them, but of the scalars only what figures are drawn from."""
    curves, settings = defaultdict(lambda: defaultdict(list)), json.loads((folder / "settings.json").read_text())
    with open(folder / "curves.csv", newline="") as file:
        for point in csv.DictReader(file):
            curves[point["run"]][point["tag"]].append((float(point["step"]), float(point["value"])))
    with open(folder / "per_seed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {key: int(row[key]) for key in PROTOCOL} | settings[row["run"]]
        row["seed"], row["scalars"] = int(row["seed"]), {k: np.array(v) for k, v in curves[row["run"]].items()}
        row["apart"] = row["apart"] if row["apart"].startswith(UNUSABLE) else ""  # the rest is judged anew
    return rows


def merged(fresh: list[dict], earlier: list[dict]) -> list[dict]:
    """Run folders take the place of what was reported of them, unless they have become runs of other settings or are
    no longer complete, or that was superseded by another version. Run folders of one name get numbers."""
    old, rows, times = defaultdict(list), [], Counter()
    for row in earlier:
        row["run"] = row["run"].split(" (")[0]
        old[row["run"]].append(row)
    for row in fresh:
        there = old[row["run"]]
        if row["apart"] and any(not before["apart"] for before in there):
            print(f"{row['run']}: {row['apart']}; what was reported of it stays")
            continue
        rows.append(row)
        stay = []
        for before in there:
            keys = (*PROTOCOL, "settings") + ("code",) * before["apart"].startswith(UNUSABLE[2])
            if any(before[key] != row[key] for key in keys) and not before["apart"].startswith(UNUSABLE[0]):
                stay.append(before)
        old[row["run"]] = stay
        if stay:
            print(f"{row['run']}: of other settings or code than what was reported of it, which is kept beside it")
    rows += [row for run in old.values() for row in run]
    rows.sort(key=lambda row: (row["task"], row["script"], row["seed"]))
    for row in rows:
        name = row["run"]
        times[name] += 1
        row["run"] += f" ({times[name]})" if times[name] > 1 else ""
    return rows


def physics(versions: str) -> dict[str, str]:
    """What the environments are made of, of all the versions; PyTorch's and numpy's are marked where they differ."""
    words = versions.split()
    return {name: words[words.index(name) + 1] for name in ("gymnasium", "mujoco", "minari") if name in words}


def set_apart(rows: list[dict]) -> None:
    """Fill `apart` of every run that must not be averaged with the majority of its kind, with the reason."""

    def check(group: list[dict], settings) -> None:
        """Set apart those whose settings(row) are not the commonest (of equally common ones, those of longer runs)."""
        kinds = Counter(json.dumps(settings(row), sort_keys=True) for row in group)
        usual = json.loads(max(kinds, key=lambda kind: (kinds[kind], json.loads(kind).get("online_steps") or 0, kind)))
        for row in group:
            mine = json.loads(json.dumps(settings(row)))
            odd = [f"{k} {mine.get(k)}, others {usual.get(k)}" for k in usual | mine if mine.get(k) != usual.get(k)]
            row["apart"] = "different settings: " + "; ".join(odd) if odd else ""

    def groups(*keys: str):
        left = [row for row in rows if not row["apart"]]
        for value in dict.fromkeys(tuple(row[key] for key in keys) for row in left):
            yield [row for row in left if tuple(row[key] for key in keys) == value]

    fine = [row for row in rows if not row["apart"]]
    for part in (
        [row for row in fine if row["script"] != "offline"],
        [row for row in fine if row["script"] == "offline"],
    ):
        if part:
            check(part, lambda row: {key: row[key] for key in PROTOCOL} | physics(row["versions"]))
    usual = next((row["offline_steps"] for row in fine if row["script"] != "offline" and not row["apart"]), None)
    for row in fine:
        if row["script"] == "offline" and not row["apart"] and usual not in (None, row["offline_steps"]):
            row["apart"] = f"different settings: offline_steps {row['offline_steps']}, others {usual}"
    # A default of None is the domain's to fill: such a value may differ between tasks, but not within one.
    for same in groups("script"):
        check(same, lambda row: {k: v for k, v in row["settings"].items() if k not in row["domain"]})
    for same in groups("task", "dataset_id", "script"):
        check(same, lambda row: row["settings"] | {"eval_env": row["eval_env"]})
    for same in groups("task", "dataset_id"):
        if compared := [row for row in same if row["script"] in FROM_IQL]:
            keys = [key for key in SHARED if all(key in row["settings"] for row in compared)]
            check(compared, lambda row, keys=keys: {key: row["settings"][key] for key in keys})
    for same in groups("task", "dataset_id", "script", "seed"):
        for row in same[1:]:
            row["apart"] = f"there twice: the other is {same[0]['run']}"


def write_csv(rows: list[dict], path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_curves(rows: list[dict], path: Path) -> None:
    """What the figures are drawn from; of a value that is held, only where it changes."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("run", "tag", "step", "value"))
        for row in rows:
            for tag in (tag for tag in CURVES if tag in row["scalars"]):
                curve = row["scalars"][tag]
                if tag in HELD:
                    curve = curve[np.diff(curve[:, 1], prepend=np.nan) != 0]
                writer.writerows((row["run"], tag, f"{step:.0f}", f"{value:.6g}") for step, value in curve)


def read_csv(path: Path) -> list[dict]:
    """Rows of per_seed.csv; numbers as floats, nan where there is none. The order is that of the tables."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {key: float(row[key] or "nan") for key in METRICS}
    place = {script: i for i, script in enumerate(ORDER)}
    return sorted(rows, key=lambda row: (row["task"], row["dataset_id"], place.get(row["script"], 99), row["script"]))


# ---- statistics: a sample is the array of one task's runs ----
def mean(*samples, axis=-1):
    return np.mean([sample.mean(axis=axis) for sample in samples], axis=0)


def iqm(*samples, axis=-1):
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def improvement(*samples, axis=-1):
    """P(x > y), ties half, of the first half of the samples over the second, mean over tasks (Agarwal et al. 2021)."""
    n = len(samples) // 2
    pairs = zip(samples[:n], samples[n:], strict=True)
    u = [
        stats.mannwhitneyu(x, y, axis=axis, method="asymptotic").statistic / x.shape[axis] / y.shape[axis]
        for x, y in pairs
    ]
    return np.mean(u, axis=0)


def ratio(*samples, axis=-1):
    """Mean of the first half of the samples over that of the second."""
    n = len(samples) // 2
    return mean(*samples[:n], axis=axis) / mean(*samples[n:], axis=axis)


def interval(statistic, samples: list[np.ndarray]) -> tuple[float, float, float]:
    """Value and 95 % interval; nan where a task has only one run, infinite where a ratio's resamples are."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*samples))
        if min(len(sample) for sample in samples) < 2:
            return value, np.nan, np.nan
        drawn = stats.bootstrap(samples, statistic, n_resamples=2000, method="percentile", rng=np.random.default_rng(0))
    return value, *map(float, drawn.confidence_interval)


def show(numbers: tuple[float, float, float], digits: int = 1, unit: str = "") -> str:
    if not np.isfinite(numbers[0]):
        return "-"
    rounded = (round(number, digits) + 0.0 for number in numbers)  # + 0.0: no minus before a zero
    value, low, high = (f"{number:.{digits}f}" for number in rounded)
    return f"{value}{unit} [{low}, {high}]" if np.isfinite(numbers[1:]).all() else f"{value}{unit}"


def select(rows: list[dict], metric: str, **where) -> np.ndarray:
    return np.array([row[metric] for row in rows if all(row[key] == value for key, value in where.items())])


# ---- tables ----
def table(head: list[str], body: list[list]) -> str:
    lines = [head, ["-"] * len(head), *body]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def label(task: str, dataset_id: str) -> str:
    return f"{task} (STAND-IN {dataset_id.rpartition('-')[2]})" if dataset_id.startswith("o2o/") else task


def kept(rows: list[dict]) -> list[dict]:
    return [row for row in rows if not row["apart"] and row["script"] != "offline"]


def unique(rows: list[dict], *keys: str) -> list[tuple]:
    return list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))


def gained(values: np.ndarray) -> str:
    """Mean of steps_to_gain over the runs that have one, and how many have."""
    n = int(np.isfinite(values).sum())
    return f"{np.nanmean(values):,.0f} ({n} of {len(values)})" if n else f"never (0 of {len(values)})"


def marks(rows: list[dict], compared: list[dict]) -> str:
    """Whether these runs of one script have differing code, or those they are compared with differing machines."""
    machines = {(row["versions"], row["device"]) for row in compared}
    return "†" * (len({row["code"] for row in rows}) > 1 or len(machines) > 1)


def protocol(rows: list[dict]) -> str:
    """What all runs of the tables share."""
    rows, words = kept(rows), []
    for key in (*PROTOCOL, "eval_env", "versions", "device", "commit"):
        values = {row[key][:7] + row[key][40:] if key == "commit" else row[key] for row in rows}  # or -dirty
        listed = ", ".join(sorted(f"{int(value):,}" if key in PROTOCOL else value for value in values))
        many = f"{len(values)} different, see per_seed.csv"
        words.append(f"{key.replace('_', ' ')} {listed if len(values) < 4 or key == 'eval_env' else many}")
    return f"{len(rows)} runs; " + "; ".join(words) + "."


def published(task: str, script: str, online_steps: int, reported: list[dict]) -> str:
    """Confirmed published online result: the one of as many online steps as ours, else that of the most."""
    found = [r for r in reported if r["phase"] == "online" and r["task"] == task and r["trust"] != "recall"]
    found = [r for r in found if r["algorithm"] == REPORTED_AS.get(script)]
    if not found:
        return "-"
    best = max(
        found, key=lambda r: (int(r["online_steps"]) == online_steps, int(r["online_steps"]), r["offline_score"] != "")
    )
    steps, source = int(best["online_steps"]), best["source"].split(",")[0]
    note = f", {best['note']}" if best["note"] else ""
    return f"{best['offline_score'] or '?'} → {best['score']} at {steps:,} ({source}{note})"


def main_table(rows: list[dict], reported: list[dict], every_metric: bool = False) -> str:
    body = []
    for task, dataset_id, script in unique(kept(rows), "task", "dataset_id", "script"):
        mine = [r for r in kept(rows) if (r["task"], r["dataset_id"], r["script"]) == (task, dataset_id, script)]
        value = {metric: interval(mean, [select(mine, metric)]) for metric in METRICS[:-1]}
        cells = [label(task, dataset_id), script, f"{len(mine)}{marks(mine, mine)}"]
        cells += [show(value["offline_score"]), show(value["final_score"])]
        if every_metric:
            middle = show(interval(iqm, [select(mine, "final_score")])) if len(mine) > 3 else "-"  # of fewer: the mean
            cells += [middle, show(value["lowest_score"])]
        cells += [show(value["drop"]), show(value["degradation_area"]), show(value["regret"], 2)]
        cells += [gained(select(mine, "steps_to_gain"))]
        body.append([*cells, published(task, script, int(float(mine[0]["online_steps"])), reported)])
    head = ["task", "script", "seeds", "offline", "→ final"] + ["final IQM", "lowest"] * every_metric
    head += ["drop", "degradation area", "regret", "steps to gain"]
    return table([*head, "reported"], body)


def shared_tasks(rows: list[dict], scripts: list[str]) -> list[tuple]:
    """(task, dataset_id) that every one of the scripts has runs of."""
    have = [{(r["task"], r["dataset_id"]) for r in kept(rows) if r["script"] == script} for script in scripts]
    return sorted(set.intersection(*have)) if have else []


def samples_of(rows: list[dict], script: str, metric: str, tasks: list[tuple]) -> list[np.ndarray]:
    return [select(kept(rows), metric, script=script, task=task, dataset_id=d) for task, d in tasks]


def unversioned(task: str, dataset_id: str) -> tuple[str, str]:
    return task, dataset_id.rpartition("-v")[0]


def common(rows: list[dict], scripts) -> list[dict]:
    """The scripts' runs of tasks and seeds that every one of them has, on the newest version of each dataset."""
    rows = [row for row in kept(rows) if row["script"] in scripts]
    times = Counter((row["task"], row["dataset_id"], row["seed"]) for row in rows)
    rows = [row for row in rows if times[row["task"], row["dataset_id"], row["seed"]] == len(scripts)]
    by_version = sorted(unique(rows, "task", "dataset_id"), key=lambda data: (len(data[1]), data))  # -v10 after -v9
    newest = {unversioned(*data): data for data in by_version}
    return [row for row in rows if (row["task"], row["dataset_id"]) in newest.values()]


def aggregate_table(rows: list[dict]) -> str:
    """Over the tasks, of the scripts that have most of them and three quarters of the runs that one has of most: on the
    tasks and seeds that all of these have."""
    scripts = [script for (script,) in unique(kept(rows), "script")]
    scripts.sort(key=lambda script: ORDER.index(script) if script in ORDER else 99)
    count = {script: len({unversioned(*data) for data in shared_tasks(rows, [script])}) for script in scripts}
    scripts = [script for script in scripts if count[script] == max(count.values())]
    runs = Counter(row["script"] for row in kept(rows) if row["script"] in scripts)
    scripts = [script for script in scripts if runs[script] >= 0.75 * max(runs.values())]
    rows = common(rows, scripts)
    tasks, body = shared_tasks(rows, scripts), []
    if not tasks:
        return "The scripts have no task and seed in common.\n"
    for script in scripts:
        name = script + marks([row for row in rows if row["script"] == script], rows)
        cells = [name, f"{len(tasks)}", sum(map(len, samples_of(rows, script, "drop", tasks)))]
        for statistic, metric in ((mean, "offline_score"), (mean, "final_score"), (iqm, "final_score")):
            cells.append(show(interval(statistic, samples_of(rows, script, metric, tasks))))
        for metric, digits in (("drop", 1), ("degradation_area", 1), ("regret", 2)):
            cells.append(show(interval(mean, samples_of(rows, script, metric, tasks)), digits))
        body.append(cells)
    head = ["script", "tasks", "runs", "offline", "→ final", "final IQM", "drop", "degradation area", "regret"]
    return table(head, body)


def headline_table(rows: list[dict]) -> str:
    """The claims of the two papers as measured here, on the tasks and seeds that both of a pair have. A run that never
    gains counts with its whole online phase in the ratio of steps_to_gain, over the tasks where either script has a run
    that gains."""
    body = []
    for names in PAIRS:
        pair = common(rows, names)
        tasks = unique(pair, "task", "dataset_id")
        if not tasks:
            continue
        drops = [samples_of(pair, name, "drop", tasks) for name in names]
        less = interval(lambda *s, axis=-1: 100 * (1 - ratio(*s, axis=axis)), drops[0] + drops[1])  # of no drop: "-"
        length = float(kept(rows)[0]["online_steps"])
        steps = [samples_of(pair, name, "steps_to_gain", tasks) for name in names]
        moved = [i for i in range(len(tasks)) if np.isfinite(np.append(steps[0][i], steps[1][i])).any()]
        never = tuple(any(np.isnan(part[i]).any() for i in moved) for part in steps)
        steps = [[np.where(np.isnan(part[i]), length, part[i]) for i in moved] for part in steps]
        faster, many = "neither gains", f"{len(moved)} task{'s' * (len(moved) > 1)}"
        if moved:
            least = {(False, True): "at least ", (True, False): "at most "}.get(never, "")
            faster = f"{least}{show(interval(ratio, steps[1] + steps[0]), 2, 'x')}, {many}"
        higher = [samples_of(pair, name, "final_score", tasks) for name in names]
        cells = [name + marks([row for row in pair if row["script"] == name], pair) for name in names]
        cells += [len(tasks), len(pair) // 2, f"{mean(*drops[1]):.1f} → {mean(*drops[0]):.1f}", show(less, 1, " %")]
        body.append([*cells, faster, show(interval(improvement, higher[0] + higher[1]), 2),
                     show(interval(improvement, drops[1] + drops[0]), 2)])  # fmt: skip
    head = ["script", "against", "tasks", "runs each", "mean drop", "drop reduced by", "steps to gain, times fewer"]
    return table([*head, "P(higher final)", "P(smaller drop)"], body) if body else ""


def offline_table(rows: list[dict], reported: list[dict]) -> str:
    """Scores after the offline phase beside published ones; IQL is the same phase in three of the scripts, each variant
    of cal_ql.py has its own."""
    fine, body = [row for row in rows if not row["apart"]], []
    own = sorted({row["script"] for row in fine if row["algorithm"] == "cal_ql"})
    for task, dataset_id in unique(fine, "task", "dataset_id"):
        here = [row for row in fine if (row["task"], row["dataset_id"]) == (task, dataset_id)]
        cells = [label(task, dataset_id), f"{int(float(here[0]['offline_steps'])):,}"]
        iql = [row for row in here if row["script"] in FROM_IQL]
        # Of a seed the run that trained the phase, if it is here; a variant only where no run has its script's own name
        iql.sort(key=lambda row: (row["script"] == "offline", row["script"] == row["algorithm"]))
        for mine in (iql, *([row for row in here if row["script"] == script] for script in own)):
            seeds = {row["seed"]: row["offline_score"] for row in mine}
            cells.append(f"{show(interval(mean, [np.array(list(seeds.values()))]))} ({len(seeds)})" if seeds else "-")
        for algorithm in ("IQL", "CQL"):
            found = [r for r in reported if (r["task"], r["algorithm"], r["phase"]) == (task, algorithm, "offline")]
            notes = [f"{r['score']} {r['source'].split(',')[0]}" + "‡" * (r["trust"] == "recall") for r in found]
            cells.append("; ".join(notes) or "-")
        body.append(cells)
    head = ["task", "offline steps", *(f"{name} (seeds)" for name in ("IQL", *own)), "reported IQL", "reported CQL"]
    return table(head, body)


def reported_table(rows: list[dict], reported: list[dict]) -> str:
    tasks = {row["task"] for row in rows}
    found = [r for r in reported if r["task"] in tasks and r["phase"] == "online"]
    keys = ("task", "reported_on", "algorithm", "offline_score", "online_steps", "score", "std", "seeds", "source")
    body = [[r[key] or "-" for key in keys[:-1]] + [r["source"] + "‡" * (r["trust"] == "recall")] for r in found]
    return table([*keys], body) if found else "None for these tasks.\n"


def apart_list(rows: list[dict]) -> str:
    lines = [f"- {row['run']}: {row['apart']}" for row in rows if row["apart"]]
    return "\n".join(lines) + "\n" if lines else "None.\n"


NOTES = """
Score: 0 is a random policy, 100 an expert. Values are means over seeds with 95 % stratified-bootstrap intervals in
brackets; of three runs that is the least and the largest, which hold the true mean three times in four, of three on
each of five tasks some five times in six. IQM: without the lowest and the highest quarter of the runs, rounded down.
STAND-IN: trained on our own stand-in for the official dataset, not comparable with a reported number. Reported: after
1M offline steps, on the original datasets. Two scripts are compared on the tasks and seeds that both have, those of the
table over the tasks on what all of them have; P: the chance that a run of the first does better than one of the second
on the same task, a tie counting half.
Steps to gain: mean over the runs that gained 10 points, in three evaluations in a row, and how many did; in the ratio
of two scripts, which is over the tasks where one of them gains, a run that never does counts with its whole online
phase: a bound, where all of the other's do. †: with more than one version of the script (column `code` of
per_seed.csv); or where what is compared is with more than one of PyTorch or numpy, or on both CPU and GPU. ‡: from
memory, not confirmed.
"""
CAPTION = """
Bold: score of what is deployed, mean over seeds, with its interval as a band. Thin: the learner alone. Dashed: after
the offline phase; black is IQL's, in a script's color its own. Below: share of an episode that the explorer of
`jsrl_gated.py` gets where it is deployed, mean over seeds, and resets of the learner of `sft_reset.py`.
"""


def readme_block(rows: list[dict], reported: list[dict], out: str = "results") -> str:
    """What stands between the README's markers for the folder `out`."""
    n = sum(bool(row["apart"]) for row in rows)
    parts = [protocol(rows), headline_table(rows), main_table(rows, reported), NOTES.strip(), aggregate_table(rows)]
    parts += [offline_table(rows, reported)]
    parts += [f"{n} runs are listed apart, with the reason, in [{out}/table.md]({out}/table.md)." if n else ""]
    parts += [f"![learning curves]({out}/curves.png)", CAPTION.strip()]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def all_tables(rows: list[dict], reported: list[dict]) -> str:
    sections = {
        "Headline": headline_table(rows) or "No pair measured.\n",
        "Per task": main_table(rows, reported, every_metric=True) + NOTES,
        "Over the tasks, scripts that have most of them": aggregate_table(rows),
        "Offline": offline_table(rows, reported),
        "Reported online": reported_table(rows, reported),
        "Listed apart": apart_list(rows),
    }
    return f"# Results\n\n{protocol(rows)}\n\n" + "\n".join(f"## {k}\n\n{v.strip()}\n" for k, v in sections.items())


def around(path: Path, out: str) -> tuple[str, str]:
    """What stands before and after the tables of the folder `out` in the file, markers included."""
    begin, end = f"<!-- {out} -->", f"<!-- /{out} -->"
    head, begun, rest = path.read_text().partition(begin)
    _, ended, tail = rest.partition(end)
    if not begun or not ended:
        fail(f"{path} has no lines {begin} and {end} to put the tables between")
    return f"{head}{begin}\n", f"{end}{tail}"


# ---- curves ----
def on_grid(rows: list[dict], tag: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all rows have a value of `tag` at, and the values there, (runs, steps)."""
    curves = [row["scalars"][tag] for row in rows if tag in row["scalars"]]
    if not curves:
        return np.zeros(0), np.zeros((0, 0))
    steps = functools.reduce(np.intersect1d, [curve[:, 0] for curve in curves])
    return steps, np.array([curve[np.isin(curve[:, 0], steps), 1] for curve in curves])


def held(rows: list[dict], tag: str, grid: np.ndarray) -> np.ndarray:
    """Mean over runs at `grid` of the scalar that is logged now and then and keeps its value in between; nan: none."""
    values = []
    for curve in (row["scalars"][tag] for row in rows if tag in row["scalars"]):
        last = np.searchsorted(curve[:, 0], grid, side="right") - 1
        values.append(np.where(last < 0, 0.0, curve[np.maximum(last, 0), 1]))
    return np.mean(values, axis=0) if values else np.full(len(grid), np.nan)


def reset_steps(rows: list[dict]) -> list[float]:
    """When any of the runs' learners were reset."""
    curves = [row["scalars"][RESETS] for row in rows if RESETS in row["scalars"]]
    return [step for curve in curves for step in curve[np.diff(curve[:, 1], prepend=0) > 0, 0]]


def draw_task(axes, rows: list[dict], color: dict[str, str]) -> None:
    """One task: scores in the first of `axes`; in the second, if there is one, the share of an episode that the
    explorer gets where deployed, if there is a gate, and the resets, otherwise in a line for each script."""
    top, lowest = axes[0], axes[-1]
    gated = any("gate/deployed" in row["scalars"] for row in rows)
    resets = {script: reset_steps([row for row in rows if row["script"] == script]) for script in color}
    resets = {script: steps for script, steps in resets.items() if steps}
    length = max(row["scalars"]["online/normalized_score"][-1, 0] for row in rows)
    grid = np.linspace(0, length, 200)
    for i, script in enumerate(color):
        mine = [row for row in rows if row["script"] == script]
        if not mine:
            continue
        steps, scores = on_grid(mine, "online/normalized_score")
        middle = scores.mean(0)
        if len(mine) > 1:
            drawn = stats.bootstrap(
                [scores], np.mean, axis=0, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
            )
            top.fill_between(steps, *drawn.confidence_interval, color=color[script], alpha=0.15, lw=0)
        top.plot(steps, middle, color=color[script], lw=max(4.6 - 1.4 * i, 1.6))  # the next does not hide it
        learner_steps, learner = on_grid(mine, "online/learner_score")
        if len(learner) and not (learner.shape == scores.shape and np.allclose(learner, scores)):
            top.plot(learner_steps, learner.mean(0), color=color[script], lw=0.7, alpha=0.9)
        for bottom in axes[1:]:
            bottom.plot(grid, held(mine, "gate/deployed", grid), color=color[script], lw=1.5)
    starts = {}  # color -> offline scores
    for row in rows:
        own = row["algorithm"] == "cal_ql"  # has an offline phase of its own, the others share theirs
        starts.setdefault(color[row["script"]] if own else "black", []).append(float(row["offline_score"]))
    for line, values in starts.items():
        top.axhline(np.mean(values), color=line, ls="--", lw=1)
    seeds = sorted({int(row["seed"]) for row in rows})
    name = f"{label(rows[0]['task'], rows[0]['dataset_id'])}, seed{'s' * (len(seeds) > 1)} "
    runs = Counter(row["script"] for row in rows)
    fewer = [f"{script} {n} run{'s' * (n > 1)}" for script, n in runs.items() if n < len(seeds)]
    top.set_title(name + ", ".join(map(str, seeds)), fontsize=10)
    top.text(0.5, 0.985, ", ".join(fewer), transform=top.transAxes, ha="center", va="top", fontsize=8)
    top.grid(alpha=0.25)
    top.set_ylabel("normalised score", fontsize=9)
    for bottom in axes[1:]:
        for line, (script, steps) in enumerate(resets.items()):
            height = np.full(len(steps), -0.22 if gated else -line)
            bottom.plot(steps, height, "|", color=color[script], ms=7, mew=1.2, clip_on=False)
        bottom.set(ylim=(-0.4, 1.08) if gated else (0.4 - max(len(resets), 1), 0.6), yticks=[0, 1] if gated else [])
        bottom.set_ylabel("gate" if gated else "resets" if resets else "", fontsize=9)
    lowest.set(xlim=(0, length), xlabel="online steps")
    lowest.xaxis.set_major_formatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1e3:g}k")


def colors(rows: list[dict]) -> dict[str, str]:
    """The color of each script, in the order of the legend, the same in all figures."""
    scripts = sorted({row["script"] for row in rows})
    scripts.sort(key=lambda script: ORDER.index(script) if script in ORDER else len(ORDER))
    others = [script for script in scripts if script not in COLORS]
    known = COLORS | {script: MORE_COLORS[i % len(MORE_COLORS)] for i, script in enumerate(others)}
    return {script: known[script] for script in scripts}


def draw(rows: list[dict], path: Path, color: dict[str, str], columns: int = 3) -> None:
    """A panel a task: mean deployed score with its 95 % band, learner alone thin, offline score dashed."""
    color = {script: value for script, value in color.items() if any(row["script"] == script for row in rows)}
    tasks = unique(rows, "task", "dataset_id")
    columns = min(columns, len(tasks))
    lines = -(-len(tasks) // columns)
    width, height = 4.6 * columns + 0.3, 3.9 * lines + 0.9  # inches
    figure = Figure(figsize=(width, height))
    edges = {"left": 0.7 / width, "right": 1 - 0.2 / width, "bottom": 0.55 / height, "top": 1 - 1.15 / height}
    grid = figure.add_gridspec(lines, columns, hspace=0.32, wspace=0.2, **edges)
    logged = {tag for row in rows for tag in row["scalars"]}
    heights = (4, 1) if logged & {"gate/deployed", RESETS} else (1,)
    for panel, (task, dataset_id) in enumerate(tasks):
        pair = grid[panel // columns, panel % columns].subgridspec(len(heights), 1, height_ratios=heights, hspace=0.08)
        axes = pair.subplots(sharex=True, squeeze=False)
        draw_task(axes[:, 0], [r for r in rows if (r["task"], r["dataset_id"]) == (task, dataset_id)], color)
    handles = [Line2D([], [], color=color[script], lw=2, label=script) for script in color]
    handles.append(Line2D([], [], color="black", ls="--", lw=1, label="offline score"))
    if "online/learner_score" in logged:
        handles.append(Line2D([], [], color="grey", lw=0.7, label="learner alone"))
    if RESETS in logged:
        handles.append(Line2D([], [], color="grey", ls="", marker="|", label="reset"))
    figure.legend(handles=handles, loc="upper center", ncols=4 if columns > 1 else 3, fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def main(args: Args) -> None:
    for path in filter(None, (args.reported, args.readme)):
        if not path.is_file():
            fail(f"there is no {path}; --reported and --readme name files that are there")
    if not args.runs:
        fail("give folders of run folders, or of an earlier report; see --help")
    earlier, out = [], args.out or args.runs[0] / "report"
    if args.readme:
        name = os.path.relpath(out, args.readme.parent)
        before, after = around(args.readme, name)
    for folder in args.runs:
        if (folder / "per_seed.csv").exists():
            try:
                earlier += read_report(folder)
            except (OSError, LookupError, ValueError) as error:
                fail(f"cannot read the report in {folder} ({error!r}); give the run folders, or restore it from git")
        elif not any(folder.glob("*/args.json")):
            fail(f"no run folders in {folder}; give what was --run-dir, or the folder of an earlier report")
    found = merged(read_runs(args.runs), earlier)
    there = sorted({row["script"] for row in found})
    for script in args.scripts:
        if script not in there:
            fail(f"no runs of {script} there; there are: {', '.join(there)}")
    chosen = [row for row in found if not args.scripts or row["script"] in (*args.scripts, "offline")]
    if len(chosen) < len(found) and out.resolve() in [folder.resolve() for folder in args.runs]:
        fail(f"--scripts would remove the other scripts' runs from {out}; give another --out")
    found = chosen
    set_apart(found)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(found, out / "per_seed.csv")
    write_curves(found, out / "curves.csv")
    kept_settings = {row["run"]: {key: row[key] for key in ("settings", "domain", "command")} for row in found}
    (out / "settings.json").write_text(json.dumps(kept_settings, indent=1) + "\n")
    in_turn = sorted(found, key=lambda row: (row["task"], row["script"] != "offline"))  # offline phases first
    (out / "commands.txt").write_text("".join(f"{row['command']}\n" for row in in_turn))
    for row, written in zip(found, read_report(out), strict=True):
        row["scalars"] = written["scalars"]  # as rounded there: the same files give the same pictures
    rows = read_csv(out / "per_seed.csv")
    with open(args.reported, newline="") as file:
        reported = list(csv.DictReader(file))
    (out / "table.md").write_text(all_tables(rows, reported))
    if args.readme:
        args.readme.write_text(before + readme_block(rows, reported, name) + after)
    drawn = [row for row in kept(found) if "online/normalized_score" in row["scalars"]]
    if drawn:
        draw(drawn, out / "curves.png", colors(drawn))
    tasks = unique(drawn, "task", "dataset_id")
    for task, dataset_id in tasks:
        names = [task, dataset_id] if sum(other == task for other, _ in tasks) > 1 else [task]
        shown = [r for r in drawn if (r["task"], r["dataset_id"]) == (task, dataset_id)]
        draw(shown, out / f"curves_{'_'.join(names).replace('/', '_')}.png", colors(drawn))
    print(headline_table(rows) + "\n" + main_table(rows, reported))
    n = sum(bool(row["apart"]) for row in rows)
    print(f"{len(kept(rows))} runs in the tables, {n} apart; see {out / 'table.md'}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
