# shellcheck shell=bash
# Sourced by the scripts beside it: runs stages as job steps. A job that is preempted saves, requeues itself, goes on.
#
# Settings come through the environment, which sbatch passes on:
#   RAREC_HOME            the checkout, where relative paths begin; by default the directory that sbatch was called in
#   RAREC_VENV            environment to activate; by default .venv
#   RAREC_ACCELERATE      file for `accelerate launch`, as in configs/accelerate/; each script has a default
#   RAREC_RANKS_PER_NODE  processes on each node; by default one a GPU, and one where no GPU is asked for
#   RAREC_STAGES          stages to run, in their order; by default train
#   RAREC_PORT            where the first rank listens; by default made from the job's number
#   RAREC_GRACE           seconds that a preempted job has for saving; by default 100, to stay below --signal's 120

job="$SLURM_JOB_ID" # of an array's last task this is the whole array's
[[ -z "${SLURM_ARRAY_JOB_ID:-}" ]] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
preempted=""
trap 'preempted="$SECONDS"' USR1

cd "${RAREC_HOME:-$SLURM_SUBMIT_DIR}" || exit
# shellcheck source=/dev/null
source "${RAREC_VENV:-.venv}/bin/activate"

# Every stage of RAREC_STAGES; one that fails ends the job with its exit code. Arguments: CONFIG [OVERRIDE ...]
run_stages() {
  local stage
  for stage in ${RAREC_STAGES:-train}; do
    if [[ -f "launch/$stage.py" ]]; then
      launch "$stage" "$@"
    else
      step 1 rarec "$stage" "$@"
    fi
  done
}

# A stage under one `accelerate launch` a node. By run.num_processes, rarec refuses to run on any other number of ranks.
launch() {
  local script="launch/$1.py" config="$2" nodes="$SLURM_JOB_NUM_NODES" address ranks
  ranks=$((nodes * ${RAREC_RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}))
  address="$(first_address)"
  # shellcheck disable=SC2016 # expanded on the node
  step "$nodes" bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
    --config_file "$RAREC_ACCELERATE" --num_machines "$nodes" --num_processes "$ranks" \
    --main_process_ip "$address" --main_process_port "${RAREC_PORT:-$((20000 + SLURM_JOB_ID % 10000))}" \
    --deepspeed_multinode_launcher standard "$script" --config "$config" "${@:3}" "run.num_processes=$ranks"
}

# The address by which SLURM itself reaches the job's first node: a node's name need not be a host's.
first_address() {
  local first address
  first="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"
  address="$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')"
  echo "${address:-$first}"
}

# One task on each of so many nodes, with all that the job has there. Arguments: NODES COMMAND ...
step() {
  local running status=0
  # The signal that asks for a checkpoint reaches all processes, and would end those that know nothing of it, as the
  # launcher. Training takes it, for it has a handler of its own.
  # shellcheck disable=SC2016 # expanded on the node
  srun --nodes="$1" --ntasks="$1" --mpi=none --cpu-bind=none --kill-on-bad-exit=1 \
    bash -c 'trap "" USR1; exec "$@"' step "${@:2}" &
  running=$!
  while kill -0 "$running" 2>/dev/null; do
    if [[ -n "$preempted" ]]; then
      ((SECONDS - preempted < ${RAREC_GRACE:-100})) || begin_again "it does not end in time"
      scancel --signal=USR1 "$job" || true # again and again: training may only just begin to listen
      sleep 2
    fi
    sleep 1
  done
  wait "$running" || status=$?
  ((status == 0)) || exit "$status"
  [[ -z "$preempted" ]] || begin_again "it has saved"
}

begin_again() {
  echo "preempted, $1: the job is requeued, and goes on from its newest checkpoint"
  scontrol requeue "$job"
  exit
}
