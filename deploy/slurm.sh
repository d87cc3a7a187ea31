#!/bin/bash
# desisky-tune on Slurm, written for NERSC's Perlmutter: a Ray head and workers by srun, one per
# node, and a search on all of them. Nothing is downloaded: the nodes need no internet.
#
# Once, on a login node (which has internet):
#
#   module load python
#   python -m venv "$SCRATCH/desisky-tune/venv"
#   "$SCRATCH/desisky-tune/venv/bin/pip" install -c constraints.txt '.[cuda12]'
#   export DESISKY_DATA_DIR="$SCRATCH/desisky-tune/data"
#   "$SCRATCH/desisky-tune/venv/bin/desisky-tune" data fetch      # only for --data vac
#
# Edit the lines marked (1) and (2); then, with what `desisky-tune search` takes (but --runs and
# --address, which are this script's; a run without --name is called slurm-JOBID):
#
#   sbatch deploy/slurm.sh broadband --data vac --gpus 0.25 --name first
#
# The search's lines are in desisky-tune-JOBID.out; its run is in $RUNS (a folder that all nodes
# see; set it to have another). The exit code of the Slurm job is the search's. Two minutes before
# the time limit Slurm sends SIGTERM: the trials finish their rungs, and the job goes back to the
# queue and takes its run up from there, until the search is done (`scancel` ends that;
# DESISKY_TUNE_REQUEUE=0 does without). To go on with another run:
#
#   DESISKY_TUNE_COMMAND=resume sbatch deploy/slurm.sh "$SCRATCH/desisky-tune/runs/first"

#SBATCH --job-name=desisky-tune
#SBATCH --account=m0000_g
#       (1) your project's account for GPU nodes
#SBATCH --qos=regular
#SBATCH --constraint=gpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=128
#SBATCH --gpus-per-task=4
#SBATCH --gpu-bind=none
#SBATCH --time=02:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail

# (2) Where the installation, the data and the runs are; all nodes see $SCRATCH.
base=${DESISKY_TUNE_BASE:-$SCRATCH/desisky-tune}
RUNS=${RUNS:-$base/runs}
export DESISKY_DATA_DIR=${DESISKY_DATA_DIR:-$base/data}
# Feature tables, the compiled training core, JAX's programs: not in $HOME, which is slow here.
export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$base/cache}

# The run's name: a job that was requeued finds its run by it.
name=
words=("$@")
kept=() # what a resume takes as well
for ((i = 0; i < $#; i++)); do
  case ${words[i]} in
  --name) name=${words[i + 1]:-} ;;
  --name=*) name=${words[i]#--name=} ;;
  --runs | --runs=* | --address | --address=*)
    echo "${words[i]} is this script's: set RUNS in the environment to have another folder" >&2
    exit 2
    ;;
  --tensorboard | --mlflow | --wandb | --json | --debug) kept+=("${words[i]}") ;;
  esac
done

if type module >/dev/null 2>&1; then
  module load python
fi
# shellcheck disable=SC1091
source "$base/venv/bin/activate"

# A secret of this job alone, in a file that only you can read: neither `ps` nor the job's
# record shows it. Who reaches a port of this Ray without it is refused.
secrets=$base/secrets
logs=$base/logs
mkdir -p "$secrets" "$logs"
chmod 700 "$secrets"
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$secrets/$SLURM_JOB_ID
(umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH")

export RAY_USAGE_STATS_ENABLED=0
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# A site's proxy must not stand between the nodes.
unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY

# On the node's own disk, and short: the paths of Ray's sockets must stay below 107 characters.
temporary=/tmp/ray-$SLURM_JOB_ID
# Of this job, so that two on one node do not meet; below the range that Ray gives to workers.
port=$((6400 + SLURM_JOB_ID % 1000))
dashboard_port=$((8265 + SLURM_JOB_ID % 1000))
cpus=${SLURM_CPUS_PER_TASK:-1}
# Since Slurm 22.05 a step does not take this over from its job.
export SRUN_CPUS_PER_TASK=$cpus
gpus=${SLURM_GPUS_PER_TASK:-${SLURM_GPUS_ON_NODE:-0}}
gpus=${gpus##*:}

steps=()
finish() {
  for pid in "${steps[@]}"; do
    kill "$pid" 2>/dev/null || true
  done
  wait 2>/dev/null || true
  rm -f "$RAY_AUTH_TOKEN_PATH"
}
trap finish EXIT
trap 'exit 143' TERM

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
addresses=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address)
ip=${addresses%% *}

echo "Ray head on $head ($ip:$port), dashboard on its loopback port $dashboard_port:"
echo "  ssh -N -L 8265:127.0.0.1:$dashboard_port -J perlmutter.nersc.gov $head"
echo "  with RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH for its commands"

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --node-ip-address="$ip" --port="$port" \
  --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" \
  --num-cpus="$cpus" --num-gpus="$gpus" --temp-dir="$temporary" >"$logs/ray-$SLURM_JOB_ID-head.log" 2>&1 &
steps+=($!)

if ((SLURM_JOB_NUM_NODES > 1)); then
  # A worker tries for some time until the head answers.
  srun --overlap --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) \
    --exclude="$head" \
    ray start --block --address="$ip:$port" --num-cpus="$cpus" --num-gpus="$gpus" \
    >"$logs/ray-$SLURM_JOB_ID-workers.log" 2>&1 &
  steps+=($!)
fi

# The search starts when all nodes are there.
python - "$ip:$port" "$SLURM_JOB_NUM_NODES" <<'PYTHON'
import sys
import time

import ray

address, wanted = sys.argv[1], int(sys.argv[2])
deadline = time.monotonic() + 300
alive = 0
while True:
    try:
        if not ray.is_initialized():
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive >= wanted:
            break
    except (ConnectionError, RuntimeError) as error:
        reason = error
    if time.monotonic() > deadline:
        sys.exit(f"only {alive} of {wanted} Ray nodes after 300 s")
    time.sleep(1.5)
print(f"{alive} Ray nodes: {ray.cluster_resources().get('CPU', 0):g} CPUs, "
      f"{ray.cluster_resources().get('GPU', 0):g} GPUs")
PYTHON

if [[ ${DESISKY_TUNE_COMMAND:-search} == resume ]]; then
  command=(resume "$@" --address "$ip:$port")
else
  if [[ -z $name ]]; then
    name=slurm-$SLURM_JOB_ID
    words+=(--name "$name")
  fi
  if ((${SLURM_RESTART_COUNT:-0} > 0)) && [[ -e $RUNS/$name/search.json ]]; then
    command=(resume "$RUNS/$name" "${kept[@]}" --address "$ip:$port")
  else
    command=(search "${words[@]}" --address "$ip:$port" --runs "$RUNS")
  fi
fi

# In the background, so that this shell hears SIGTERM at once and can pass it on.
desisky-tune "${command[@]}" &
search=$!
trap 'kill -TERM "$search" 2>/dev/null || true' TERM
status=0
wait "$search" || status=$?
while kill -0 "$search" 2>/dev/null; do
  # `wait` came back because of a signal; the search still writes.
  status=0
  wait "$search" || status=$?
done

# 75: stopped from outside, to be resumed.
if ((status == 75)) && [[ ${DESISKY_TUNE_REQUEUE:-1} != 0 ]]; then
  if scontrol requeue "$SLURM_JOB_ID"; then
    echo "the search is not done: the job is back in the queue"
  else
    echo "the search is not done, and Slurm does not requeue this job: resume it as the first lines say" >&2
  fi
fi
exit "$status"
