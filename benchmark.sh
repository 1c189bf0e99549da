#!/usr/bin/env bash
# Tasks x scripts x seeds, side by side on this machine or as SLURM job arrays; then: python report.py RUN_DIR
#
#   ./benchmark.sh                      preset quick: 50k + 25k steps into runs/quick, 60 core-hours: a night on 8 cores
#   ./benchmark.sh --preset readme      the runs of the README's main table, three seeds of each, 40 core-hours
#   ./benchmark.sh --preset full        1M + 1M steps, 5 seeds, every task family, every variant (a cluster's work)
#   ./benchmark.sh --tasks "hopper-medium" --scripts "jsrl_gated jsrl_gated:open" --seeds "1 2" --online-steps 20000
#   ./benchmark.sh --dry-run            print what is left to run, one command a line
#   ./benchmark.sh --slurm --workers 8  the same as job arrays, at most 8 at a time; --sbatch "--gres=gpu:1 --time=8:00:00"
#   ./benchmark.sh speed [--json]       updates/s and steps/s of each script; [--scripts ...] [--threads "1 2"]
#
# Options: --preset quick|readme|full --tasks --scripts --seeds --offline-steps --online-steps --workers --run-dir --dry-run
#          --slurm --sbatch "OPTIONS"; whatever follows -- goes to every command (-- --dataset stand-in --no-cuda).
# Each offline phase (IQL) is trained once per task and seed, as `offline`, and shared through --offline-checkpoint;
# cal_ql trains its own. Runs that are complete (summary.json) are skipped, others continued with --resume: stop this at
# any time and start it again. Logs: RUN_DIR/logs. Exit code 0: all complete, 1: some failed, 2: bad usage.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # huge pages: a tenth faster on a CPU, the same bits

declare -A FLAGS=( # variant -> flags beside its script's defaults; script:word runs under the name script_word
  [iql_finetune]="" [iql_finetune:mixed]="--online-share 0.5"
  [jsrl_gated]="" [jsrl_gated:open]="--gate open --anchor-open 0" [jsrl_gated:no_gate]="--gate open"
  [jsrl_gated:curriculum]="--gate curriculum" [jsrl_gated:random]="--gate random" [jsrl_gated:no_promote]="--no-promote"
  [sft_reset]="" [sft_reset:online]="--evaluator online" [sft_reset:offline]="--evaluator offline"
  [sft_reset:noreset]="--reset-every 0" [sft_reset:forget]="--reset-share 1"
  [cal_ql]="" [cal_ql:no_calibrate]="--no-calibrate"
)

preset() {
  EXTRA=()
  case $1 in
    quick)
      TASKS="hopper-medium walker2d-medium halfcheetah-medium walker2d-expert pointmaze-medium" SEEDS="1 2 3"
      SCRIPTS="cal_ql jsrl_gated sft_reset iql_finetune jsrl_gated:open" OFFLINE_STEPS=50000 ONLINE_STEPS=25000 ;;
    readme)
      TASKS="hopper-medium walker2d-medium halfcheetah-medium walker2d-expert" SEEDS="1 2 3"
      SCRIPTS="jsrl_gated sft_reset iql_finetune jsrl_gated:open jsrl_gated:curriculum sft_reset:online sft_reset:noreset"
      OFFLINE_STEPS=200000 ONLINE_STEPS=50000
      EXTRA=(--dataset stand-in --compile --matmul-precision medium --eval-every 2500) ;;
    full)
      TASKS=$(echo {hopper,walker2d,halfcheetah}-medium{,-replay,-expert} antmaze-umaze{,-diverse} \
        antmaze-{medium,large}-{play,diverse} {pen,door,hammer,relocate}-{human,cloned} kitchen-{complete,partial,mixed})
      SCRIPTS="cal_ql cal_ql:no_calibrate jsrl_gated jsrl_gated:open jsrl_gated:no_gate jsrl_gated:curriculum"
      SCRIPTS+=" jsrl_gated:random jsrl_gated:no_promote sft_reset sft_reset:online sft_reset:offline"
      SCRIPTS+=" sft_reset:noreset sft_reset:forget iql_finetune iql_finetune:mixed"
      SEEDS="1 2 3 4 5" OFFLINE_STEPS=1000000 ONLINE_STEPS=1000000 ;;
    *) fail "unknown preset $1; there are quick, readme and full" ;;
  esac
  RUN_DIR=runs/$1
}

fail() {
  echo "error: $*" >&2
  exit 2
}

folder() { # TASK EXP_NAME SEED: sets NAME to the run folder's name
  NAME=${1//\//_}__$2__$3
  if [[ $1 == *.hdf5 ]]; then NAME=$(basename "$1" .hdf5)__$2__$3; fi
}

line() { # TASK EXP_NAME SEED SCRIPT [FLAG]...: what a list holds of one run, its folder's name, a tab, its command
  local named=(--exp-name "$2")
  [[ $2 == "$4" ]] && named=()
  folder "$1" "$2" "$3"
  printf '%s\tpython %s.py' "$NAME" "$4"
  printf ' %q' --env-id "$1" --seed "$3" "${named[@]}" --offline-steps "$OFFLINE_STEPS" --run-dir "$RUN_DIR" \
    --resume "${@:5}" "${EXTRA[@]}"
  printf '\n'
}

offline_runs() { # two online steps, because a run must have some; they do not touch offline.pt
  local task seed
  [[ " $SCRIPTS " =~ \ (iql_finetune|jsrl_gated|sft_reset) ]] || return 0
  for task in $TASKS; do for seed in $SEEDS; do line "$task" offline "$seed" iql_finetune --online-steps 2; done; done
}

online_runs() {
  local task seed script flags
  for script in $SCRIPTS; do for task in $TASKS; do for seed in $SEEDS; do
    read -ra flags <<<"--online-steps $ONLINE_STEPS ${FLAGS[$script]}"
    folder "$task" offline "$seed"
    [[ $script == cal_ql* ]] || flags+=(--offline-checkpoint "$RUN_DIR/$NAME/offline.pt")
    line "$task" "${script/:/_}" "$seed" "${script%:*}" "${flags[@]}"
  done; done; done
}

left() { # LIST: its lines whose run is not complete
  local name command
  while IFS=$'\t' read -r name command; do
    [[ -e $RUN_DIR/$name/summary.json ]] || printf '%s\t%s\n' "$name" "$command"
  done <"$1"
}

# shellcheck disable=SC2329  # this and the next are called through xargs, and by SLURM
run_one() { # LINE: run it to its end under its lock, so that no two processes ever work on one run folder
  local name=${1%%$'\t'*} command=${1#*$'\t'} asked="" warned="" status=0 pid
  exec 9>"$RUN_DIR/logs/$name.lock" # inherited by the command: held as long as that lives, even if this shell is killed
  flock 9
  [[ -e $RUN_DIR/$name/summary.json ]] && return
  [[ -z ${BENCHMARK_PID:-} ]] || kill -0 "$BENCHMARK_PID" 2>/dev/null || return 0 # benchmark.sh is gone: start nothing more
  echo "$command" >"$RUN_DIR/logs/$name.command"
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TQDM_MININTERVAL=${TQDM_MININTERVAL:-30}
  trap 'asked=1' TERM                               # the command gets it too, saves and ends
  trap 'asked=1 warned=1; kill -USR1 "$pid"' USR1   # SLURM's warning comes to this shell alone
  bash -c "exec $command" >>"$RUN_DIR/logs/$name.log" 2>&1 </dev/null &
  pid=$!
  while wait "$pid" || status=$?; kill -0 "$pid" 2>/dev/null; do status=0; done # a signal ends a wait ...
  [[ -z $asked ]] || status=0                                                   # ... with a status of its own
  if [[ -n $warned && ! -e $RUN_DIR/$name/summary.json ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  return "$status"
}

# shellcheck disable=SC2329
run_and_tell() { # LINE: run_one with a line of progress
  local name=${1%%$'\t'*} status=0 complete eta="" result
  run_one "$1" || status=$?
  complete=$((TOTAL - $(left "$RUN_DIR/logs/runs.tsv" | wc -l)))
  if ((complete > COMPLETE)); then
    eta=$(((EPOCHSECONDS - BEGAN) * (TOTAL - complete) / (complete - COMPLETE) / 60))
    eta=$(printf ', about %d h %02d min left' $((eta / 60)) $((eta % 60)))
  fi
  result="FAILED ($status), see $RUN_DIR/logs/$name.log"
  ((status)) || result="stopped"
  [[ -e $RUN_DIR/$name/summary.json ]] &&
    result="score $(sed -n 's/.*"final_score": \(.*\..\).*,/\1/p' "$RUN_DIR/$name/summary.json")"
  echo "[$complete/$TOTAL] $name: $result$eta"
  return $((status > 0))
}

run_here() { # LIST: what is left of it, WORKERS at a time
  set -m # a process group of its own, so that stopping it takes the workers along
  # shellcheck disable=SC2016
  xargs -r -d '\n' -n 1 -P "$WORKERS" bash -c 'run_and_tell "$1"' _ < <(left "$1") 8>&- &
  group=$!
  set +m
  trap 'kill -TERM -- -$group; echo "stopping: each run saves at the end of its episode; start again to continue"; exit 130' \
    INT TERM
  wait $group || true # a failed run is told at the end
  trap - INT TERM
}

submit() { # LIST ID: what is left of it as job arrays, each of at most SLURM's MaxArraySize, that start one after another,
  # the first after job ID; prints their ids. afterany, not afterok: where one offline phase failed, its own dependents
  # say so and the others run.
  local most first last list=$1 id=$2
  most=$(scontrol show config | awk '$1 == "MaxArraySize" {print $3}') && ((most > 0)) || return
  mapfile -t lines < <(left "$list")
  for ((first = 0; first < ${#lines[@]}; first += most)); do
    last=$((first + most < ${#lines[@]} ? most : ${#lines[@]} - first))
    # shellcheck disable=SC2086  # SBATCH is words
    id=$(sbatch --parsable --requeue --job-name="$JOB" --array="0-$((last - 1))%$WORKERS" --signal=B:USR1@600 --chdir="$PWD" \
      --open-mode=append --output="$RUN_DIR/logs/slurm-%A_%a.log" ${id:+"--dependency=afterany:$id"} $SBATCH <<EOF
#!/usr/bin/env bash
unset BENCHMARK_PID
RUN_DIR=$(printf %q "$RUN_DIR")
$(declare -f run_one)
$(declare -p lines)
run_one "\${lines[$first + SLURM_ARRAY_TASK_ID]}"
EOF
    ) || return
    echo "$id"
  done
}

speed() {
  python - "$@" <<'EOF'
"""Offline updates/s and online environment steps/s of each script, and the share of the machine's own limit."""
import argparse, atexit, contextlib, dataclasses, importlib, io, itertools, json, os, shutil, sys, tempfile, time
from functools import partial

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

KNOWN = {"scripts": "iql_finetune jsrl_gated sft_reset cal_ql", "modes": "eager compile graph compile+graph",
         "precisions": "highest high medium"}
parser = argparse.ArgumentParser("benchmark.sh speed", description=__doc__)
parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
parser.add_argument("--scripts", default=KNOWN["scripts"])
parser.add_argument("--threads", default="1 2", type=lambda words: [int(word) for word in words.split()],
                    help="of PyTorch on the CPU")
parser.add_argument("--modes", default=KNOWN["modes"], help="graph: with CUDA only")
parser.add_argument("--precisions", default="highest medium", help="--matmul-precision; highest is float32")
parser.add_argument("--seconds", type=float, default=5, help="of each offline measurement")
parser.add_argument("--online-steps", type=int, default=1500, help="of each online measurement, the last two thirds timed")
cli = parser.parse_args()
for option, known in KNOWN.items():
    if unknown := set(getattr(cli, option).split()) - set(known.split()):
        parser.error(f"--{option}: unknown {' '.join(sorted(unknown))}; there are: {known}")
sys.path.insert(0, os.getcwd())
OBS, ACTION, N = 11, 3, 100_000  # hopper's sizes
CUDA = torch.cuda.is_available()
MODES = [mode for mode in cli.modes.split() if CUDA or "graph" not in mode]
if not MODES:
    parser.error("--modes: a graph needs a CUDA device, and there is none here; there are: eager compile")
DEVICE = torch.device("cuda" if CUDA else "cpu")


def rate(fn, per_call, seconds):
    """Calls of `fn` per second, times `per_call`, after five calls of warm-up (compilation, capture)."""
    for _ in range(5):
        fn()
    sync, calls, began = torch.cuda.synchronize if CUDA else lambda: None, 0, time.perf_counter()
    sync()
    while time.perf_counter() - began < seconds:
        fn()
        calls += 1
        sync()
    return per_call * calls / (time.perf_counter() - began)


def offline(script, args, mode):
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
    update = partial(script.run_updates, agent, buffer, 50 if "graph" in mode else 10)
    update = script.CudaGraph(update) if "graph" in mode else update
    return rate(update, 50 if "graph" in mode else 10, cli.seconds), counter.get_total_flops()


def online(script, args):
    """Environment steps/s of `train`'s online phase in Hopper-v4, from when its buffer is a third full to the end."""
    times, add = [], script.ReplayBuffer.add
    script.ReplayBuffer.add = lambda *a, **k: (times.append(time.perf_counter()), add(*a, **k))[1]
    out = io.StringIO()
    try:
        with tempfile.TemporaryDirectory() as args.run_dir, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            script.train(args)
    finally:
        script.ReplayBuffer.add = add
    third = len(times) // 3
    return (len(times) - third) / (times[-1] - times[third])


def toy_dataset():
    """2,000 steps of a random policy in Hopper-v4, as a local Minari dataset."""
    import gymnasium as gym, minari
    from minari.data_collector import EpisodeBuffer

    os.environ["MINARI_DATASETS_PATH"] = folder = tempfile.mkdtemp(prefix="speed-")
    atexit.register(shutil.rmtree, folder)
    env, buffers, n = gym.make("Hopper-v4"), [], 0
    env.action_space.seed(0)
    while n < 2_000:
        obs, over, rows = [env.reset(seed=n)[0]], False, []
        while not over:
            action = env.action_space.sample()
            o, reward, terminated, truncated, _ = env.step(action)
            obs.append(o)
            rows.append((action, reward, terminated, truncated))
            over, n = terminated or truncated, n + 1
        actions, rewards, terminations, truncations = map(list, zip(*rows))
        buffers.append(EpisodeBuffer(id=len(buffers), observations=np.array(obs), actions=np.array(actions),
                                     rewards=rewards, terminations=terminations, truncations=truncations))
    with contextlib.redirect_stderr(io.StringIO()):
        minari.create_dataset_from_buffers("o2o/hopper/speed-v0", buffers, env=env, ref_min_score=-20.3, ref_max_score=3234.3)


def main():
    import warnings

    warnings.simplefilter("ignore")
    toy_dataset()
    rows = []
    for n, precision in itertools.product([1] if CUDA else cli.threads, cli.precisions.split()):
        os.environ["OMP_NUM_THREADS"] = str(n)
        torch.set_num_threads(n)
        torch.set_float32_matmul_precision(precision)
        a, b = (torch.randn(256, 256, device=DEVICE) for _ in range(2))
        limit = 2 * 256**3 * rate(lambda: [a @ b for _ in range(50)], 50, min(cli.seconds, 2))
        for name, mode in itertools.product(cli.scripts.split(), MODES):
            script = importlib.import_module(name)
            args = script.Args(
                env_id="o2o/hopper/speed-v0", cuda=CUDA, offline_steps=50, online_steps=cli.online_steps,
                eval_every=10**6, eval_episodes=1, save_every=10**6, compile="compile" in mode, cuda_graph="graph" in mode,
                matmul_precision=precision)
            for name_of_wait in {"warmup_steps", "window"} & set(vars(args)):  # before the phase that is timed
                setattr(args, name_of_wait, 2)
            domain = args.domain_values["any"] | args.domain_values["locomotion"]  # which train() finds itself
            row = {"script": name, "mode": mode, "threads": n, "precision": precision}
            try:
                row["updates_per_s"], flops = offline(script, dataclasses.replace(args, **domain), mode)
                torch.set_num_threads(n)
                row["steps_per_s"] = online(script, args)
                row |= {"gflop_per_update": flops / 1e9, "limit_updates_per_s": limit / flops}
                row["share_of_limit"] = row["updates_per_s"] * flops / limit
            except (Exception, SystemExit) as error:  # one that cannot run does not hide the others
                row["error"] = repr(error)[:200]
            rows.append(row)
            print(f"{name} {mode} threads={n} {precision}: {row.get('updates_per_s', float('nan')):.0f} updates/s, "
                  f"{row.get('steps_per_s', float('nan')):.0f} steps/s {row.get('error', '')}", file=sys.stderr)
    if cli.json:
        return print(json.dumps(rows, indent=2))
    print(f"\nPyTorch {torch.__version__} on {torch.cuda.get_device_name() if CUDA else 'CPU'}; limit: FLOPs/s of a "
          "256x256x256 matmul timed in the same run, at the same threads and precision\n")
    print("| script | mode | threads | precision | offline updates/s | online steps/s | GFLOP/update | limit updates/s | share |")
    print("|-|-|-|-|-|-|-|-|-|")
    for row in rows:
        numbers = [f"{row.get(key, float('nan')):.{digits}f}" for key, digits in (
            ("updates_per_s", 0), ("steps_per_s", 0), ("gflop_per_update", 2), ("limit_updates_per_s", 0), ("share_of_limit", 2))]
        print("|", " | ".join([row["script"], row["mode"], str(row["threads"]), row["precision"], *numbers]), "|")


main()
EOF
}

# ---- command line ----
[[ ${1:-} == speed ]] && { speed "${@:2}"; exit; }
WORKERS=$(nproc) DRY_RUN="" SLURM="" SBATCH="--gres=gpu:1 --cpus-per-task=2" own=" $* "
preset quick
[[ "${own%% -- *} " =~ \ --preset\ ([^ ]+) ]] && preset "${BASH_REMATCH[1]}" # first, so that other options win over it
while (($#)); do
  case $1 in
    --preset) ;;
    --tasks) TASKS=${2:-} ;;
    --scripts) SCRIPTS=${2:-} ;;
    --seeds) SEEDS=${2:-} ;;
    --offline-steps) OFFLINE_STEPS=${2:-} ;;
    --online-steps) ONLINE_STEPS=${2:-} ;;
    --workers) WORKERS=${2:-} ;;
    --run-dir) RUN_DIR=${2:-} ;;
    --sbatch) SBATCH=${2:-} ;;
    --dry-run) DRY_RUN=1; shift; continue ;;
    --slurm) SLURM=1; shift; continue ;;
    --) EXTRA+=("${@:2}"); break ;;
    -h | --help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit ;;
    *) fail "unknown option $1; see --help" ;;
  esac
  [[ -n ${2:-} ]] || [[ $1 == --sbatch && -v 2 ]] || fail "$1 needs a value; see --help"
  shift 2
done
for script in $SCRIPTS; do [[ -v FLAGS[$script] ]] || fail "unknown script $script; there are: ${!FLAGS[*]}"; done
for number in $OFFLINE_STEPS $ONLINE_STEPS $WORKERS $SEEDS; do
  [[ $number =~ ^(0|[1-9][0-9]*)$ ]] || fail "$number is not a whole number (steps, workers and seeds are)"
done
for number in $OFFLINE_STEPS $ONLINE_STEPS $WORKERS; do
  ((number > 0)) || fail "steps and workers must be at least 1"
done

# ---- the lists ----
twice=$({ offline_runs; online_runs; } | cut -f 1 | sort | uniq -d | head -n 1)
[[ -z $twice ]] || fail "two runs would share the folder $twice; give each task, script and seed once"
if [[ -n $DRY_RUN ]]; then
  for list in offline_runs online_runs; do left <($list) | cut -f 2-; done
  exit
fi
mkdir -p "$RUN_DIR/logs"
exec 8>"$RUN_DIR/logs/benchmark.lock"
flock -n 8 || fail "another benchmark.sh is at work in $RUN_DIR; stop it, wait for it, or give another --run-dir"
offline_runs >"$RUN_DIR/logs/offline.tsv"
online_runs >"$RUN_DIR/logs/online.tsv"
cat "$RUN_DIR"/logs/{offline,online}.tsv >"$RUN_DIR/logs/runs.tsv"
while IFS=$'\t' read -r name command; do
  [[ ! -e $RUN_DIR/$name/summary.json || ! -e $RUN_DIR/logs/$name.command ]] ||
    [[ $(<"$RUN_DIR/logs/$name.command") == "$command" ]] ||
    fail "$RUN_DIR/$name is complete, but by another command (see logs/$name.command); give another --run-dir"
done <"$RUN_DIR/logs/runs.tsv"

# ---- SLURM: the offline phases as one array, all else as another that waits for it ----
if [[ -n $SLURM ]]; then
  command -v sbatch >/dev/null || fail "--slurm: no sbatch here"
  JOB=cleano2o:$(realpath "$RUN_DIR")
  [[ -z $(squeue --noheader --name "$JOB") ]] || fail "runs of $RUN_DIR are in the queue already (squeue --name $JOB)"
  if ids=$(submit "$RUN_DIR/logs/offline.tsv" "") && ids+=$'\n'$(submit "$RUN_DIR/logs/online.tsv" "${ids##*$'\n'}"); then
    echo "submitted:" "${ids//$'\n'/ }"
    exit
  fi
  ids=${ids//$'\n'/ }
  fail "sbatch refused (see above); scancel what it had queued before you try again: ${ids:-nothing}"
fi

# ---- this machine ----
TOTAL=$(wc -l <"$RUN_DIR/logs/runs.tsv") BEGAN=$EPOCHSECONDS BENCHMARK_PID=$$
COMPLETE=$((TOTAL - $(left "$RUN_DIR/logs/runs.tsv" | wc -l)))
export RUN_DIR TOTAL COMPLETE BEGAN BENCHMARK_PID
export -f run_and_tell run_one left
echo "$TOTAL runs, $COMPLETE complete, $WORKERS at a time; logs in $RUN_DIR/logs"
run_here "$RUN_DIR/logs/offline.tsv"
run_here "$RUN_DIR/logs/online.tsv"

failed=$(left "$RUN_DIR/logs/runs.tsv")
[[ -n $failed ]] || { echo "all $TOTAL runs complete; now: python report.py $RUN_DIR"; exit; }
echo "$(wc -l <<<"$failed") of $TOTAL runs failed:"
while IFS=$'\t' read -r name command; do
  echo "  $RUN_DIR/logs/$name.log: $(tail -c 2000 "$RUN_DIR/logs/$name.log" 2>/dev/null | tr '\r' '\n' | grep -av '^$' | tail -n 1)"
done <<<"$failed"
exit 1
