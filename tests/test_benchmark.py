"""benchmark.sh with scripts that only pretend to train: which commands, each once, and going on after a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
STUB = r"""#!/usr/bin/env bash
# Stands in for `python`: writes what a run leaves behind, and to starts.txt and ends.txt which ran.
while (($#)); do case $1 in
  --env-id) task=$2; shift ;; --seed) seed=$2; shift ;; --exp-name) exp=$2; shift ;; --run-dir) dir=$2; shift ;;
  --offline-checkpoint) checkpoint=$2; shift ;; --resume) resume=1 ;; *.py) exp=${exp:-${1%.py}} ;;
esac; shift; done
[[ -n ${resume:-} ]] || exit 4
name=${task}__${exp}__$seed
echo "$name $OMP_NUM_THREADS" >>starts.txt
trap 'echo "$name stopped" >>starts.txt; exit 0' TERM
for i in $(seq ${SLOW:-0}); do sleep 0.05; done
if [[ -n ${checkpoint:-} && ! -e $checkpoint ]]; then echo "error: no $checkpoint" >&2; exit 2; fi
if [[ $name == *"${FAIL:-nothing}"* ]]; then echo "error: it was asked to fail" >&2; exit 3; fi
trap "" INT TERM # an end is told and counted, or neither
mkdir -p "$dir/$name"
touch "$dir/$name/offline.pt"
echo "$name" >>ends.txt
printf '{\n  "final_score": 12.345,\n  "seed": 1\n}' >"$dir/$name/summary.json"
"""
ARGS = [
    "--tasks",
    "hopper-medium walker2d-medium",
    "--seeds",
    "1 2",
    "--scripts",
    "cal_ql jsrl_gated:open iql_finetune",
]
ARGS += ["--offline-steps", "100", "--online-steps", "50", "--run-dir", "runs/test", "--workers", "3"]
NAMES = {f"{task}-medium__{exp}__{seed}" for task in ("hopper", "walker2d") for seed in (1, 2)
         for exp in ("offline", "cal_ql", "jsrl_gated_open", "iql_finetune")}  # fmt: skip
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "flock", "xargs"))), reason="needs bash and util-linux"
)


@pytest.fixture
def bench(tmp_path):
    """A copy of benchmark.sh whose `python` is the stub; call it with arguments, or start it in the background."""
    shutil.copy(ROOT / "benchmark.sh", tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(STUB)
    (tmp_path / "bin" / "python").chmod(0o755)

    class Bench:
        folder = tmp_path

        def start(self, *args, **env) -> subprocess.Popen:
            env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"} | env
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            # A shell cannot trap a signal that it was started to ignore, as background jobs are with SIGINT.
            pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            return subprocess.Popen([str(tmp_path / "benchmark.sh"), *args], cwd="/", env=env, **pipes)

        def __call__(self, *args, **env) -> tuple[int, str]:
            process = self.start(*args, **env)
            output = process.communicate(timeout=100)[0]
            return process.returncode, output

        def lines(self, name: str) -> list[str]:
            path = tmp_path / name
            return path.read_text().splitlines() if path.exists() else []

    return Bench()


def wait_for(condition, timeout=60):
    end = time.time() + timeout
    while not condition():
        assert time.time() < end, "timed out"
        time.sleep(0.05)


def test_dry_run_lists_the_commands(bench):
    code, output = bench(*ARGS, "--dry-run", "--", "--dataset", "stand-in")
    common, tail = "--offline-steps 100 --run-dir runs/test", "--dataset stand-in"
    start = "--offline-checkpoint runs/test/{run}/offline.pt"
    line = "python {}.py --env-id {} --seed {} {}" + f"{common} --resume --online-steps " + "{}" + f" {tail}"
    tasks = "hopper-medium", "walker2d-medium"
    offline = [  # of all tasks first, so that several workers do not need the same stand-in at once
        line.format("iql_finetune", task, seed, "--exp-name offline ", "2") for seed in (1, 2) for task in tasks
    ]
    expected = [
        line.format(script, task, seed, exp, more)
        for script, exp, more in (
            ("cal_ql", "", "50"),
            ("jsrl_gated", "--exp-name jsrl_gated_open ", f"50 --gate open --anchor-open 0 {start}"),
            ("iql_finetune", "", f"50 {start}"),
        )
        for task in tasks
        for seed in (1, 2)
    ]
    runs = [f"{task}__offline__{seed}" for task in tasks for seed in (1, 2)]
    expected = [words.replace("{run}", runs[i % 4]) for i, words in enumerate(expected)]
    assert code == 0 and output.splitlines() == offline + expected
    words = ARGS[: ARGS.index("--offline-steps")]
    _, readme = bench("--preset", "readme", *words, "--dry-run", "--", "--no-cuda", "--preset", "full")
    tail = "--dataset stand-in --no-cuda --preset full"
    assert all(f"{line} ".endswith(f" {tail} ") and "runs/readme" in line for line in readme.splitlines())
    assert not (bench.folder / "runs").exists()  # nothing was touched


def test_every_listed_flag_is_one_of_its_script(bench):
    """All variants of the full preset, checked against the fields of the scripts' Args."""
    _, output = bench("--preset", "full", "--dry-run")
    lines = output.splitlines()
    assert len(lines) == 26 * 5 * (1 + 15) and len(set(lines)) == len(lines)
    for line in [line for line in lines if "hopper-medium " in line and "--seed 1 " in line]:
        _, script, *words = line.split()
        source = (ROOT / script).read_text() if (ROOT / script).exists() else None
        for word in words:
            if source and word.startswith("--"):
                field = word[2:].removeprefix("no-").replace("-", "_")
                assert f"\n    {field}: " in source, (script, word)


def test_runs_all_once_and_skips_complete_ones(bench):
    code, output = bench(*ARGS)
    assert code == 0, output
    assert "16 runs, 0 complete, 3 at a time" in output and "all 16 runs complete" in output
    assert "[16/16]" in output and "score 12.3" in output and "min left" in output
    assert sorted(bench.lines("starts.txt")) == sorted(f"{name} 1" for name in NAMES)
    code, output = bench(*ARGS)
    assert code == 0 and "16 runs, 16 complete" in output and len(bench.lines("starts.txt")) == 16
    assert bench(*ARGS, "--dry-run") == (0, "")
    code, output = bench(*ARGS, "--online-steps", "60")  # complete runs, but of other settings
    assert code == 2 and "complete, but by another command" in output
    assert bench(*ARGS, "--online-steps", "60", "--dry-run") == (code, output)


@pytest.mark.parametrize("steps, code", [("100", 0), ("99", 2)])
def test_a_complete_run_made_by_hand_counts_if_its_steps_are_those_asked_for(bench, steps, code):
    folder = bench.folder / "runs/test/hopper-medium__cal_ql__1"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(
        json.dumps({"offline_steps": int(steps), "online_steps": 50, "seed": 1}, indent=2)
    )
    (folder / "summary.json").touch()
    found = bench(*ARGS, "--scripts", "cal_ql", "--dry-run")
    assert found[0] == code and ("with other numbers of steps" in found[1]) == (code == 2)
    assert code or found[1].count("\n") == 3


def test_failed_run_is_told_and_stops_nothing(bench):
    code, output = bench(*ARGS, FAIL="hopper-medium__offline__1")
    assert code == 1 and "3 of 16 runs not complete:" in output  # it, and the two that need its offline.pt
    log = "runs/test/logs/hopper-medium__offline__1.log"
    assert f"{log}: error: it was asked to fail" in output.split("runs not complete:")[1]
    assert "FAILED (3), see " + log in output and len(bench.lines("ends.txt")) == 13
    code, output = bench(*ARGS)
    assert code == 0 and set(bench.lines("ends.txt")) == NAMES and len(bench.lines("ends.txt")) == 16


def test_only_what_needs_an_offline_phase_waits_for_it(bench):
    """Two offline phases and three workers: the third takes what needs none, then waits for the first's end."""
    words = ["--tasks", "hopper-medium", "--workers", "3", "--scripts"]
    code, output = bench(*ARGS, *words, "cal_ql iql_finetune", SLOW="20")
    assert code == 0, output
    starts, ends = bench.lines("starts.txt"), bench.lines("ends.txt")
    assert set(starts[:3]) == {f"hopper-medium__{run} 1" for run in ("offline__1", "offline__2", "cal_ql__1")}
    code, output = bench(*ARGS, *words, "iql_finetune", "--run-dir", "runs/more", SLOW="20")
    assert code == 0, output
    starts, ends = (bench.lines(name)[len(lines) :] for name, lines in (("starts.txt", starts), ("ends.txt", ends)))
    assert set(starts[:2]) == {f"hopper-medium__offline__{seed} 1" for seed in (1, 2)}
    assert set(ends[:2]) == {f"hopper-medium__offline__{seed}" for seed in (1, 2)} and len(ends) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_killed_and_started_again(bench, number):
    process = bench.start(*ARGS, SLOW="20")
    wait_for(lambda: len(bench.lines("ends.txt")) >= 7 and len(bench.lines("starts.txt")) >= 10)
    time.sleep(0.5)  # three online runs, of a second each, are under way, and six are left
    started = len(bench.lines("starts.txt"))
    process.send_signal(number)
    process.wait(timeout=30)
    told = process.communicate(timeout=30)[0]  # when the last of its processes has ended
    assert len(bench.lines("ends.txt")) < 16 and ": stopped" in told, told
    assert all("stopped" in line for line in bench.lines("starts.txt")[started:]), "nothing new is begun"
    code, output = bench(*ARGS, SLOW="1")
    assert code == 0 and "all 16 runs complete" in output
    assert sorted(bench.lines("ends.txt")) == sorted(NAMES)  # each came to its end once


def test_two_at_once(bench):
    process = bench.start(*ARGS, SLOW="20")
    wait_for(lambda: bench.lines("starts.txt"))
    code, output = bench(*ARGS)
    assert code == 2 and "another benchmark.sh is at work in runs/test" in output
    process.communicate(timeout=100)
    assert process.returncode == 0 and len(bench.lines("starts.txt")) == 16


@pytest.mark.parametrize(
    "args, message",
    [
        (["--scripts", "sac"], "unknown script sac; there are: "),
        (["--preset", "huge"], "unknown preset huge"),
        (["--preset", "FULL"], "unknown preset FULL"),
        (["--workers", "0"], "steps and workers must be at least 1"),
        (["--online-steps", "0"], "steps and workers must be at least 1"),
        (["--wrokers", "2"], "unknown option --wrokers"),
        (["--seeds", "one"], "one is not a whole number"),
        (["--seeds", "01"], "01 is not a whole number"),
        (["--online-steps", "10 20"], "10 20 is not a whole number"),
        (["--workers"], "--workers needs a value"),
        (["--tasks", "--dry-run"], "--tasks needs a value"),
        (["--", "--dataset", "stand-in", "--seed", "5"], "--seed stands after --"),
        (["--", "--exp_name=x"], "--exp-name=x stands after --"),
        (["--tasks", ""], "--tasks needs a value"),
        (["--online-steps", "", "--dry-run"], "--online-steps needs a value"),
        (["--seeds", "1 2 1"], "two runs would share the folder halfcheetah-medium__cal_ql__1"),
        (["--tasks", "a/hopper.hdf5 b/hopper.hdf5"], "two runs would share the folder hopper__cal_ql__1"),
    ],
)
def test_bad_usage(bench, args, message):
    code, output = bench(*args)
    assert code == 2 and output.startswith(f"error: {message}") and output.count("\n") == 1


SLURM = {  # of SLURM what benchmark.sh calls: jobs get the numbers 1, 2, ..., of which that of $REFUSE is refused
    "sbatch": """#!/usr/bin/env bash
job=$(($(cat jobs 2>/dev/null || echo 0) + 1))
[[ $job == "${REFUSE:-}" ]] && { echo "sbatch: error: no" >&2; exit 1; }
echo $job >jobs
echo "$@" >>sbatch.txt
cat >job_$job.sh
echo $job
""",
    "scontrol": "#!/usr/bin/env bash\necho 'MaxArraySize            = 3'\n",
    "squeue": "#!/usr/bin/env bash\n",
}


@pytest.fixture
def fake_slurm(bench):
    for name, text in SLURM.items():
        (bench.folder / "bin" / name).write_text(text)
        (bench.folder / "bin" / name).chmod(0o755)
    return bench


def test_job_arrays_start_one_after_another(fake_slurm):
    """Four offline runs and twelve online, at most three to an array: one at a time keeps to --workers."""
    code, output = fake_slurm(*ARGS, "--slurm")
    assert code == 0 and output.split()[-7:] == ["submitted:", "1", "2", "3", "4", "5", "6"]
    lines = fake_slurm.lines("sbatch.txt")
    assert [line.split("--array=")[1].split()[0] for line in lines] == ["0-2%3", "0-0%3"] + ["0-2%3"] * 4
    assert "--dependency" not in lines[0]
    assert [line.split("--dependency=")[1].split()[0] for line in lines[1:]] == [f"afterany:{i}" for i in range(1, 6)]
    path = f"{fake_slurm.folder / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "SLURM_ARRAY_TASK_ID": "2", "BENCHMARK_PID": "999999999"}
    subprocess.run(["bash", "job_3.sh"], cwd=fake_slurm.folder, env=environment, check=False)
    assert fake_slurm.lines("starts.txt") == ["walker2d-medium__cal_ql__1 1"]  # the third of the online runs


@pytest.mark.parametrize("refused, queued", [("1", "nothing"), ("2", "1"), ("4", "1 2 3")])
def test_a_submission_that_is_refused_is_told_with_what_is_queued(fake_slurm, refused, queued):
    code, output = fake_slurm(*ARGS, "--slurm", REFUSE=refused)
    assert code == 2 and output.splitlines()[-1].endswith(f"scancel what it had queued before you try again: {queued}")


def speed(*words: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = ["./benchmark.sh", "speed", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, text=True)


@pytest.mark.parametrize(
    "option, word, complaint",
    [
        ("modes", "eager,compile", "invalid choice"),
        ("scripts", "sac", "invalid choice"),
        ("precisions", "low", "invalid choice"),
        ("threads", "two", "valid parse"),
        pytest.param("modes", "graph", "needs a CUDA device",
                     marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
    ],
)  # fmt: skip
def test_speed_refuses_what_it_does_not_know(option, word, complaint):
    done = speed(f"--{option}", word)
    assert done.returncode == 2 and f"--{option}" in done.stderr and complaint in done.stderr


def test_speed_measures():
    words = "--scripts iql_finetune --modes eager --threads 1 --precisions highest --seconds 0.2 --online-steps 60"
    done = speed("--json", *words.split())
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    assert row["script"] == "iql_finetune" and "error" not in row
    # Three matmuls a layer (forward, and two backward) of each network that is trained, one of the two targets; the
    # actor, V and two critics have layers of d x 256, 256 x 256, 256 x k.
    assert 0.3 < row["gflop_per_update"] < 0.8
    assert row["updates_per_s"] > 1 and row["steps_per_s"] > 1
    assert row["share_of_limit"] == pytest.approx(row["updates_per_s"] / row["limit_updates_per_s"])
