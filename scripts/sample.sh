#!/usr/bin/env bash
# Sample the newest model of an experiment.
#
#   EXP=quickstart FRAMES="16 7 24" bash scripts/sample.sh [more flags of EqM/sample_gd.py]
#
# Paths are relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -d .venv ]] && source .venv/bin/activate

GPUS=${GPUS:-1}
EXP=${EXP:-progressive_rope_training}
FRAMES=${FRAMES:-16} # one or more frame counts
SAMPLES=${SAMPLES:-16}
OUT=${OUT:-samples/$EXP} # videos go to $OUT-f16 and so on
CKPT=${CKPT:-}
if [[ -z $CKPT ]]; then
  for file in results/"$EXP"/*/checkpoints/best.pt; do
    if [[ -f $file && (-z $CKPT || $file -nt $CKPT) ]]; then CKPT=$file; fi
  done
fi
if [[ -z $CKPT ]]; then
  printf 'sample.sh: error: no results/%q/*/checkpoints/best.pt; set EXP or CKPT\n' "$EXP" >&2
  exit 2
fi

for frames in $FRAMES; do
  torchrun --standalone --nproc_per_node="$GPUS" EqM/sample_gd.py \
    --video --num-frames="$frames" --ckpt="$CKPT" \
    --num-samples="$SAMPLES" --folder="$OUT-f$frames" "$@"
done
