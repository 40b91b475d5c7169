#!/usr/bin/env bash
# Sample the demo model of this repository, the newest model of an experiment, or a checkpoint.
#
#   bash scripts/sample.sh                                  results/demo -> samples/demo-f16; seconds on a CPU
#   EXP=quickstart FRAMES="16 7 24" bash scripts/sample.sh [more flags of EqM/sample_gd.py]
#   CKPT=results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt bash scripts/sample.sh --cfg-scale 2
#
#   EXP=demo        an experiment in results/
#   CKPT            a checkpoint; default: the newest best.pt of EXP
#   FRAMES=16       one or more numbers of frames
#   SAMPLES=16      number of samples for each of FRAMES
#   OUT             folder of the samples, plus -f16 and so on; default: samples/$EXP, or samples/model with CKPT
#   GPUS=1          processes
#
# The sampler has the settings of the training; --sampler, --num-sampling-steps, --stepsize and --cfg-scale change them.
# Samples of another run are replaced only with --overwrite. Paths are relative to the repository.
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/common.sh || exit
GPUS=${GPUS:-1} CKPT=${CKPT:-} SAMPLES=${SAMPLES:-16}
read -ra FRAMES <<<"${FRAMES:-16}"
[[ -n $CKPT ]] && EXP=${EXP:-model} || EXP=${EXP:-demo}
OUT=${OUT:-samples/$EXP}
[[ ${#FRAMES[@]} == 1 ]] && OUT=$OUT-f${FRAMES[0]} # sample_gd.py itself adds that for several lengths
[[ -n $CKPT ]] || find_model
activate
"${RUN[@]}" EqM/sample_gd.py \
  --video --num-frames "${FRAMES[@]}" --ckpt="$CKPT" --num-samples="$SAMPLES" --folder="$OUT" --no-overwrite "$@"
