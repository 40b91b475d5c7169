#!/usr/bin/env bash
# Sample the demo model that comes with the repository, or the newest model of an experiment, or a checkpoint.
#
#   bash scripts/sample.sh                                  results/demo -> samples/demo-f16; seconds on a CPU
#   EXP=quickstart FRAMES="16 7 24" bash scripts/sample.sh [more flags of EqM/sample_gd.py]
#   CKPT=results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt bash scripts/sample.sh
#
#   EXP, CKPT       an experiment in results/, or a checkpoint; default: results/demo
#   FRAMES=16       one or more numbers of frames
#   SAMPLES=16      how many
#   OUT             where to, with -f16 and so on after it; default: samples/$EXP, or samples/model with CKPT alone
#   GPUS=1          processes
#
# Samples of another run are not replaced unless --overwrite says so. Paths are relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
flags_only "$@"
nearly "EXP CKPT FRAMES SAMPLES OUT GPUS" FRAME NUM_FRAMES SAMPLE NUM_SAMPLES CLASS CLASSES CHECKPOINT FOLDER

GPUS=${GPUS:-1} EXP=${EXP:-} CKPT=${CKPT:-} SAMPLES=${SAMPLES:-16}
read -ra FRAMES <<<"${FRAMES:-16}"
if [[ -z $EXP && -z $CKPT ]]; then EXP=demo CKPT=results/demo; fi
if [[ -z $CKPT ]]; then
  for file in results/"$EXP"/*/checkpoints/best.pt; do
    if [[ -f $file && (-z $CKPT || $file -nt $CKPT) ]]; then CKPT=$file; fi
  done
  [[ -n $CKPT ]] || complain "no results/$(printf %q "$EXP")/*/checkpoints/best.pt; set EXP or CKPT"
fi
OUT=${OUT:-samples/${EXP:-model}}
[[ ${#FRAMES[@]} == 1 ]] && OUT=$OUT-f${FRAMES[0]} # as sample_gd.py names the folders of several lengths
activate
processes "$GPUS"

"${RUN[@]}" EqM/sample_gd.py \
  --video --num-frames "${FRAMES[@]}" --ckpt="$CKPT" --num-samples="$SAMPLES" --folder="$OUT" --no-overwrite "$@"
