#!/usr/bin/env bash
# Tasks x scripts x seeds, side by side on this machine or as SLURM job arrays; then: python report.py RUN_DIR
#
#   ./benchmark.sh                      preset quick: 50k + 25k steps into runs/quick, 35 core-hours: a night on 4 cores
#   ./benchmark.sh --preset readme      the runs of the README's main table and two variants of sft_reset, three seeds of
#                                       each, 30 core-hours (on a Xeon with AMX; on a first-generation EPYC twice as many)
#   ./benchmark.sh --preset full        1M + 1M steps, 5 seeds, D4RL's task families, all variants but cal_ql:fast (a cluster's)
#   ./benchmark.sh --tasks "hopper-medium" --scripts "jsrl_gated jsrl_gated:open" --seeds "1 2" --online-steps 20000
#   ./benchmark.sh --dry-run            print what is left to run, one command a line
#   ./benchmark.sh --slurm --workers 8  the same as job arrays, at most 8 at a time, with --sbatch in the place of
#                                       "--gres=gpu:1 --cpus-per-task=2"
#   ./benchmark.sh speed [--json]       updates/s and steps/s of each script; speed --help lists its options
#
# Options: --preset quick|readme|full --tasks --scripts --seeds --offline-steps --online-steps --workers --run-dir --dry-run
#          --slurm --sbatch "OPTIONS"; whatever follows -- goes to every command (-- --dataset stand-in --no-cuda).
# Each offline phase (IQL) is trained once per task and seed, as `offline`, and shared through --offline-checkpoint;
# cal_ql trains its own. Runs that are complete (summary.json) are skipped, others continued with --resume: stop this at
# any time and start it again. Ctrl-C, SIGTERM and SLURM's warning save; what is killed outright goes on from its latest
# checkpoint (--save-every). Paths count from this script's folder; .hdf5 files need a benchmark of their own, as all
# its runs get -- --eval-env. Logs: RUN_DIR/logs. Exit code 0: all complete, or submitted, 1: some failed, 2: bad usage
# or refused by sbatch, 130: stopped.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1} # huge pages: a tenth faster on a CPU, the same bits

declare -A FLAGS=( # variant -> flags beside its script's defaults; script:word runs under the name script_word
  [iql_finetune]="" [iql_finetune:mixed]="--online-share 0.5"
  [jsrl_gated]="" [jsrl_gated:open]="--gate open --anchor-open 0" [jsrl_gated:no_gate]="--gate open"
  [jsrl_gated:curriculum]="--gate curriculum" [jsrl_gated:random]="--gate random" [jsrl_gated:no_promote]="--no-promote"
  [sft_reset]="" [sft_reset:online]="--evaluator online" [sft_reset:offline]="--evaluator offline"
  [sft_reset:noreset]="--reset-every 0" [sft_reset:forget]="--reset-share 1"
  [cal_ql]="" [cal_ql:fast]="--gap-every 8 --matmul-precision medium" [cal_ql:no_calibrate]="--no-calibrate"
)

preset() {
  TASKS="hopper-medium walker2d-medium halfcheetah-medium hopper-expert pointmaze-medium" SEEDS="1 2 3" EXTRA=()
  case $1 in
    quick)
      SCRIPTS="cal_ql jsrl_gated sft_reset iql_finetune jsrl_gated:open" OFFLINE_STEPS=50000 ONLINE_STEPS=25000 ;;
    readme)
      SCRIPTS="cal_ql:fast jsrl_gated sft_reset iql_finetune jsrl_gated:open sft_reset:online sft_reset:noreset"
      OFFLINE_STEPS=50000 ONLINE_STEPS=50000 EXTRA=(--dataset stand-in) ;;
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
  for seed in $SEEDS; do for task in $TASKS; do line "$task" offline "$seed" iql_finetune --online-steps 2; done; done
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

each() { # LINE...: one below the other, nothing where there is none
  (($# == 0)) || printf '%s\n' "$@"
}

left() { # LIST: its lines whose run is not complete
  local name command
  while IFS=$'\t' read -r name command; do
    [[ -e $RUN_DIR/$name/summary.json ]] || printf '%s\t%s\n' "$name" "$command"
  done <"$1"
}

end_if_complete() {
  [[ -n $(left "$RUN_DIR/logs/runs.tsv") ]] || { echo "all $TOTAL runs complete; now: python report.py $RUN_DIR"; exit; }
}

# shellcheck disable=SC2329  # this and the next are called through xargs, and by SLURM
run_one() { # LINE: run it to its end under its lock, so that no two processes ever work on one run folder
  local name=${1%%$'\t'*} command=${1#*$'\t'} asked="" warned="" status=0 pid needed
  if [[ -n ${BENCHMARK_PID:-} && $command == *" --offline-checkpoint "* ]]; then # SLURM's arrays wait by themselves
    needed=${name%__*__*}__offline__${name##*__}
    # It has begun: its .command is no older than the list ...
    until [[ -e $RUN_DIR/$needed/summary.json || ! $RUN_DIR/logs/$needed.command -ot $RUN_DIR/logs/runs.tsv ]]; do
      kill -0 "$BENCHMARK_PID" 2>/dev/null || return 0
      sleep 1
    done
    flock -s "$RUN_DIR/logs/$needed.lock" true # ... and ended
  fi
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
  if [[ -n $warned && ! -e $RUN_DIR/$name/summary.json ]]; then scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"; fi
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

run_here() { # what is left, WORKERS at a time, begun in the order of the list: first the offline phases that others wait for
  set -m # a process group of its own, so that stopping it takes the workers along
  # shellcheck disable=SC2016
  xargs -r -d '\n' -n 1 -P "$WORKERS" bash -c 'run_and_tell "$1"' _ < <(exec 8>&-; left "$RUN_DIR/logs/runs.tsv") 8>&- &
  group=$!
  set +m
  trap 'kill -TERM -- -$group; echo "stopping: each run saves at the end of its episode; start again to continue"; exit 130' \
    HUP INT TERM
  wait $group || true # a failed run is told at the end
  trap - HUP INT TERM
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

# ---- command line ----
[[ ${1:-} == speed ]] && exec python speed.py "${@:2}"
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
  [[ -n ${2:-} && $2 != --* ]] || [[ $1 == --sbatch && -v 2 ]] || fail "$1 needs a value; see --help"
  shift 2
done
own="env-id|seed|exp-name|run-dir|offline-steps|online-steps|offline-checkpoint|resume"
for word in "${EXTRA[@]//_/-}"; do
  [[ ! $word =~ ^--($own)(=.*)?$ ]] || fail "$word stands after --, where every run would get it; see --help"
done
for script in $SCRIPTS; do [[ -v FLAGS[$script] ]] || fail "unknown script $script; there are: ${!FLAGS[*]}"; done
OFFLINE_STEPS=${OFFLINE_STEPS//_/} ONLINE_STEPS=${ONLINE_STEPS//_/} RUN_DIR=${RUN_DIR%/} # 50_000, runs/
for number in "$OFFLINE_STEPS" "$ONLINE_STEPS" "$WORKERS" $SEEDS; do
  [[ $number =~ ^(0|[1-9][0-9]*)$ ]] || fail "$number is not a whole number (steps, workers and seeds are)"
done
for number in "$OFFLINE_STEPS" "$ONLINE_STEPS" "$WORKERS"; do
  ((number > 0)) || fail "steps and workers must be at least 1"
done

# ---- the lists ----
mapfile -t offline < <(offline_runs)
mapfile -t online < <(online_runs)
runs=("${offline[@]}" "${online[@]}")
twice=$(each "${runs[@]}" | cut -f 1 | sort | uniq -d | sed -n 1p)
[[ -z $twice ]] || fail "two runs would share the folder $twice; give each task, script and seed once"
while IFS=$'\t' read -r name command; do
  [[ -e $RUN_DIR/$name/summary.json ]] || continue
  if [[ -e $RUN_DIR/logs/$name.command ]]; then
    [[ $(<"$RUN_DIR/logs/$name.command") == "$command" ]] ||
      fail "$RUN_DIR/$name is complete, but by another command (see logs/$name.command); give another --run-dir"
  else # made by hand
    [[ $command =~ --online-steps\ ([0-9]+) ]]
    grep -q "\"offline_steps\": $OFFLINE_STEPS," "$RUN_DIR/$name/args.json" &&
      grep -q "\"online_steps\": ${BASH_REMATCH[1]}," "$RUN_DIR/$name/args.json" ||
      fail "$RUN_DIR/$name is complete, but with other numbers of steps (see its args.json); give another --run-dir"
  fi
done < <(each "${runs[@]}")
if [[ -n $DRY_RUN ]]; then
  left <(each "${runs[@]}") | cut -f 2-
  exit
fi
mkdir -p "$RUN_DIR/logs"
exec 8>"$RUN_DIR/logs/benchmark.lock"
flock -n 8 || fail "another benchmark.sh is at work in $RUN_DIR; stop it, wait for it, or give another --run-dir"
each "${runs[@]}" >"$RUN_DIR/logs/runs.tsv"
TOTAL=${#runs[@]}

# ---- SLURM: the offline phases as one array, all else as another that waits for it ----
if [[ -n $SLURM ]]; then
  command -v sbatch >/dev/null || fail "--slurm: no sbatch here"
  JOB=cleano2o:$(realpath "$RUN_DIR")
  end_if_complete
  [[ -z $(squeue --noheader --name "$JOB") ]] || fail "runs of $RUN_DIR are in the queue already (squeue --name $JOB)"
  if ids=$(submit <(each "${offline[@]}") "") && ids+=$'\n'$(submit <(each "${online[@]}") "${ids##*$'\n'}"); then
    echo "logs in $RUN_DIR/logs; once they have ended, the same command with --dry-run lists what is left"
    echo "submitted:" "${ids//$'\n'/ }"
    exit
  fi
  ids=${ids//$'\n'/ }
  fail "sbatch refused (see above); scancel what it had queued before you try again: ${ids:-nothing}"
fi

# ---- this machine ----
BEGAN=$EPOCHSECONDS BENCHMARK_PID=$$
COMPLETE=$((TOTAL - $(left "$RUN_DIR/logs/runs.tsv" | wc -l)))
export RUN_DIR TOTAL COMPLETE BEGAN BENCHMARK_PID
export -f run_and_tell run_one left
echo "$TOTAL runs, $COMPLETE complete, $WORKERS at a time; logs in $RUN_DIR/logs"
run_here

end_if_complete
failed=$(left "$RUN_DIR/logs/runs.tsv")
echo "$(wc -l <<<"$failed") of $TOTAL runs not complete:"
while IFS=$'\t' read -r name command; do
  [[ -e $RUN_DIR/logs/$name.log ]] || { echo "  $name: not started"; continue; }
  echo "  $RUN_DIR/logs/$name.log: $(tail -c 2000 "$RUN_DIR/logs/$name.log" | tr '\r' '\n' | grep -av '^$\|it/s\|s/it' | tail -n 1)"
done <<<"$failed"
exit 1
