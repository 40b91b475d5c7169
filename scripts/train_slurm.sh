#!/usr/bin/env bash
# Run train_progressive.sh on several machines of a Slurm cluster, with one torchrun on each. Two minutes before the time
# limit the script saves the run and queues the job again. The job keeps its id, and finds its runs by it.
#
#   DATA=datasets/ucf-101 EXP=ucf sbatch --nodes=4 scripts/train_slurm.sh [more flags of EqM/train.py]
#
#   GPUS=8        processes per machine; see train_progressive.sh --help for the other variables
#   PORT=29500    port of the first machine, on which the others find it
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
EQM_SCRIPT=train_slurm.sh # Slurm runs a copy of this script with another name, from another folder
CDPATH= cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}" && source scripts/common.sh || exit
[[ -n ${SLURM_JOB_ID:-} ]] || complain "not a job of Slurm; start it with: sbatch scripts/train_slurm.sh"
GPUS=${GPUS:-8}
counts GPUS
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export GPUS EQM_RANKS=$((GPUS * SLURM_NNODES))
export EQM_LAUNCH="srun --cpus-per-task=${SLURM_CPUS_PER_TASK:-1} torchrun --nnodes=$SLURM_NNODES --nproc_per_node=$GPUS"
EQM_LAUNCH+=" --max-restarts=3 --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID --rdzv-endpoint=$HEAD:${PORT:-29500}"
bash scripts/train_progressive.sh "$@" &
PHASES=$!
requeue() {
  scancel --signal=TERM "$SLURM_JOB_ID" # goes to the step, not to this script; srun would kill the step
  wait "$PHASES" || true
  scontrol requeue "$SLURM_JOB_ID" && exit
}
trap requeue USR1
wait "$PHASES"
