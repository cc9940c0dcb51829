# ---- from here on the same for every run: launch/slurm_job.sh ----------------------------------
# Starts one torchrun on each node, hands SLURM's word that time is up to the workers, and decides
# what the end of the training means for the job: over, or again.

say() { echo "$(date '+%F %T') job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}: $*"; }

# One value of the run's status.json; empty where there is none.
status() {
  sed -nE 's/.*"'"$1"'": *"?([^",}]*).*/\1/p' "$RUN_DIR/status.json" 2>/dev/null | head -n 1
}

is_finished() {
  local steps
  steps=$(status train_steps)
  [ "$(status state)" = finished ] && [ "${steps:-0}" -ge "$TRAIN_STEPS" ]
}

newest_checkpoint() {
  find "$RUN_DIR/checkpoints" -maxdepth 1 -regex '.*/step_[0-9]+' 2>/dev/null | sort | tail -n 1
}

# Runs on each node. SLURM's signals may reach this shell alone (where it tracks processes by
# control groups) or everything below it, and torchrun would end from USR1. So torchrun ignores
# USR1 and the workers, its children, get it from here; on TERM too, for which torchrun would leave
# them 30 s.
on_node() {
  trap '' USR1 # inherited by torchrun, and by its workers until they have a handler of their own
  "${TORCHRUN[@]}" --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$SLURM_JOB_ID" \
    --node-rank="$SLURM_NODEID" "${TRAINING[@]}" &
  agent=$!
  trap 'kill -USR1 $(cat /proc/$agent/task/*/children 2>/dev/null) 2>/dev/null' USR1 TERM
  while kill -0 "$agent" 2>/dev/null; do wait "$agent"; done # a signal ends `wait` early
  wait "$agent"
}

# Ends this start of the job, because of $1: SLURM queues it again, or it leaves with exit status
# $2. A dead node or a save that took too long is worth another try; but what keeps every start from
# reaching its first checkpoint, a mistake or too short a time, would cost walltime after walltime.
start_again() {
  local failures
  if [ "$(newest_checkpoint)" != "$checkpoint" ]; then
    rm -f "$FAILURES"
  else
    failures=$(($(cat "$FAILURES" 2>/dev/null || echo 0) + 1))
    echo "$failures" >"$FAILURES"
    if ((failures >= MAX_FAILURES)); then
      say "$1; start $failures in a row without a new checkpoint," \
        "cluster.max_failures=$MAX_FAILURES: given up"
      exit "$2"
    fi
  fi
  if ((${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
    say "$1; not requeued, as cluster.max_requeues=$MAX_REQUEUES. A new job goes on from there."
    exit "$2"
  fi
  say "$1; back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || say "SLURM refuses to requeue the job"
  sleep 30 # SLURM ends this shell
  exit "$2"
}

# Tells the workers to save and leave; again and again, for one that still imports ignores it.
stop_workers() {
  say "SLURM says that time is up; the workers are told to save and stop"
  while kill -0 "$step" 2>/dev/null; do
    scancel --signal=USR1 "$SLURM_JOB_ID" # reaches the workers' step, not this shell
    if (($(date +%s) >= JOB_END - 10)); then
      start_again "not saved in time, what came after the last checkpoint is lost" 1
    fi
    sleep 2
  done
}

# When SLURM ends the job, in Unix seconds. Without a limit, or where squeue does not answer, a time
# far away; `date` itself makes last midnight of no answer, which would stop the run at once.
end_of_job() {
  local end
  end=$(squeue -h -j "$SLURM_JOB_ID" -o %e 2>/dev/null)
  if [[ $end != [0-9]*T* ]] || ! date -d "$end" +%s 2>/dev/null; then
    echo 9999999999
  fi
}

if is_finished; then
  say "nothing to do: the run has finished at step $(status step)"
  exit 0
fi

# Preempted without a grace time, or with a node of it dead, a job is requeued by SLURM itself, which
# asks no script; so for the last start SLURM has to be told beforehand.
if ((MAX_REQUEUES > 0 && ${SLURM_RESTART_COUNT:-0} >= MAX_REQUEUES)); then
  if scontrol update JobId="$SLURM_JOB_ID" Requeue=0; then
    say "the last start, as cluster.max_requeues=$MAX_REQUEUES: SLURM is told not to requeue the job"
  else
    say "the last start, as cluster.max_requeues=$MAX_REQUEUES; but SLURM may requeue the job itself"
  fi
fi

HEAD=${HEAD:-} # a line of cluster.setup may name the address by which the other nodes reach the first
if [ -z "$HEAD" ]; then
  HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  HEAD=$(scontrol show node "$HEAD" | sed -nE 's/.*NodeAddr=([^ ]+).*/\1/p')
fi
PORT=$((20000 + SLURM_JOB_ID % 10000))
JOB_END=${SLURM_JOB_END_TIME:-$(end_of_job)}
export SLURM_JOB_END_TIME=$JOB_END HEAD PORT
LOGS="$RUN_DIR/logs/slurm-$SLURM_JOB_ID-node*.log"
FAILURES=$RUN_DIR/slurm/failures
checkpoint=$(newest_checkpoint)
BEGAN=$(date +%s)
stop=
say "$SLURM_JOB_NUM_NODES nodes ($SLURM_JOB_NODELIST), $HEAD:$PORT; from ${checkpoint:-the start}"

trap 'stop=yes' USR1
"${SRUN[@]}" --output="$RUN_DIR/logs/slurm-%j-node%t.log" --open-mode=append \
  "${CONTAINER[@]}" bash -c "$(declare -p TORCHRUN TRAINING); $(declare -f on_node); on_node" &
step=$!
while kill -0 "$step" 2>/dev/null; do
  if [ -n "$stop" ]; then stop_workers; else wait "$step"; fi
done
wait "$step"
code=$?

say "training ended with status $code; the run is $(status state) at step $(status step)"
# torchrun, which a preempting SLURM sends SIGTERM as well, leaves with an error after a clean stop;
# but a start that failed may have left the word of the one before it
since=$(status time)
since=${since:-0}
if [ "$(status state)" = stopped ] && ((code == 0 || ${since%.*} >= BEGAN)); then
  start_again "stopped before its last step" 75 # EX_TEMPFAIL
fi
if ((code != 0)); then
  start_again "failed (the why is in $LOGS)" "$code"
fi
rm -f "$FAILURES"
exit 0
