#!/usr/bin/env bash
# Train on several machines of a Slurm cluster, with one torchrun on each. Two minutes before the time limit the script
# saves the run and queues the job again. The job keeps its id, and finds its run by it.
#
#   sbatch --nodes=4 scripts/train_slurm.sh --video --num-frames 4 --use-rope --model EqM-S/4 --compile \
#     --data-path datasets/ucf-101-latents --results-dir results/EXP --max-steps 50000
#
#   GPUS=8        processes per machine
#   PORT=29500    port of the first machine, on which the others find it
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100   seconds that ranks have to save and end after a signal
#
# All machines need the same repository, data and results, so put these on a shared disk.
#SBATCH --job-name=eqm-video
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" # Slurm runs a copy of this script from another folder
SCRIPT=train_slurm.sh
source scripts/common.sh
flags_only "$@"
GPUS=${GPUS:-8} PORT=${PORT:-29500}
activate
check_gpus
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # for a step and two saves
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$GPUS" --max-restarts=3 \
  --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$HEAD:$PORT" \
  EqM/train.py --resume "$@" &
STEP=$!

requeue() {
  scancel --signal=TERM "$SLURM_JOB_ID" # goes to the step, not to this script; srun would kill the step
  wait "$STEP" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1
wait "$STEP"
