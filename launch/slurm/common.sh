# shellcheck shell=bash
# Sourced by the scripts in this directory: runs stages as job steps. A preempted job saves a checkpoint, requeues itself
# and resumes.
#
# Settings are environment variables, which sbatch passes on:
#   RAREC_HOME            directory that relative paths refer to; default: the directory that sbatch was called in
#   RAREC_VENV            Python environment to activate; default: .venv
#   RAREC_ACCELERATE      file for `accelerate launch`, as in configs/accelerate/; each script has a default
#   RAREC_RANKS_PER_NODE  processes on each node; default: one per GPU, and one where no GPU is requested
#   RAREC_STAGES          stages to run, in order; default: train
#   RAREC_PORT            port of the first rank; default: derived from the job's number
#   RAREC_GRACE           seconds that a preempted job has for saving; default: 100, less than the 120 of --signal
#
# The scripts set `files`, the directory that contains rarec's configs/ and launch/, and `preempted`.

job="$SLURM_JOB_ID" # in an array's last task this is the number of the whole array
[[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"

# Runs every stage of RAREC_STAGES; a failing stage ends the job with its exit code. Arguments: CONFIG [OVERRIDE ...]
run_stages() {
  local stage
  for stage in ${RAREC_STAGES:-train}; do
    if [[ -f "$files/launch/$stage.py" ]]; then
      launch "$stage" "$@"
    else
      step 1 rarec "$stage" "$@"
    fi
  done
}

# Runs a stage under one `accelerate launch` per node. With run.num_processes, rarec refuses any other number of ranks.
launch() {
  local script="$files/launch/$1.py" config="$2" nodes="$SLURM_JOB_NUM_NODES" address ranks deepspeed
  ranks=$((nodes * ${RAREC_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}))
  address="$(first_address)"
  mapfile -t deepspeed < <(deepspeed_option)
  # shellcheck disable=SC2016 # expanded on the node
  step "$nodes" bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file "$RAREC_ACCELERATE" "${deepspeed[@]}" --num_machines "$nodes" --num_processes "$ranks" \
    --main_process_ip "$address" --main_process_port "${RAREC_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" \
    --deepspeed_multinode_launcher standard "$script" --config "$config" "${@:3}" "run.num_processes=$ranks"
}

# Prints the option that names DeepSpeed's file, where the relative path in RAREC_ACCELERATE does not exist here.
deepspeed_option() {
  local file
  file="$(sed -n 's/^ *deepspeed_config_file: *//p' "$RAREC_ACCELERATE")"
  if [[ -n "$file" && ! -f "$file" && -f "$files/$file" ]]; then
    printf '%s\n' --deepspeed_config_file "$files/$file"
  fi
}

# Prints the address at which SLURM itself reaches the job's first node: a node's name need not be a host's name.
first_address() {
  local first address
  first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
  address="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
  echo "${address:-$first}"
}

# Runs one task on each node, with all of the job's resources there. Arguments: NODES COMMAND ...
step() {
  local running status=0
  # The signal that asks for a checkpoint reaches all processes. Those without a handler, such as the launcher, would be
  # killed, so it is ignored here; training installs its own handler.
  # shellcheck disable=SC2016 # expanded on the node
  srun --nodes="$1" --ntasks="$1" --mpi=none --cpu-bind=none --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1; exec "$@"' step "${@:2}" &
  running=$!
  while kill -0 "$running" 2>/dev/null; do
    if [[ -n "$preempted" ]]; then
      ((SECONDS - preempted < ${RAREC_GRACE:-100})) || requeue "it does not end in time"
      scancel --signal=USR1 "$job" || true # repeated: training may not have installed its handler yet
      sleep 2
    fi
    sleep 1
  done
  wait "$running" || status=$?
  ((status == 0)) || exit "$status"
  [[ -z "$preempted" ]] || requeue "a checkpoint is saved"
}

requeue() {
  echo "preempted, $1: the job is requeued and resumes from its newest checkpoint"
  scontrol requeue "$job"
  exit
}
