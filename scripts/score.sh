#!/usr/bin/env bash
# Sample a checkpoint and score the samples, or repeat the scores of a manifest.
#
#   bash scripts/score.sh                                    the demo's motion on Moving Shapes; a minute on a CPU
#   CKPT=FILE DATA=datasets/ucf-101 METRIC="fvd consistency" SAMPLES=2048 DETECTOR=i3d_torchscript.pt \
#     bash scripts/score.sh --cfg-scale 1 [more flags of EqM/sample_gd.py]
#   CKPT=FILE DATA=datasets/ucf-101 METRIC=prediction GIVEN=0-7 SAMPLES_PER_CLIP=8 bash scripts/score.sh
#   MANIFEST=results/demo/motion-16.json bash scripts/score.sh   samples again, scores, compares; status 1 if it differs
#
#   CKPT=results/demo       a checkpoint, or a folder of scripts/export.py
#   DATA                    folder of the real videos; default: datasets/moving-shapes, or that of MANIFEST
#   METRIC=motion           one or more of motion fvd fid consistency nearest classifier, or prediction
#   FRAMES=16, SAMPLES=96   how many frames and samples
#   REAL                    number of real clips; default: as evaluate.py says; of prediction: 256
#   SPLIT=val               prediction: the split whose clips are continued
#   GIVEN=0-7               prediction: the frames that are given
#   SAMPLES_PER_CLIP=1      prediction: samples of each clip
#   VAL_FRACTION=0.05       share of the videos in val, as in training
#   DETECTOR                a TorchScript file, for fvd and fid
#   MANIFEST                scores to repeat; CKPT, DATA and DETECTOR may name other places
#   OUT                     folder of the samples and their scores; default: samples/score, or samples/again with MANIFEST
#   GPUS=1                  processes
#
# Samples of another run are not replaced unless --overwrite says so. Paths are relative to the repository.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
flags_only "$@"
nearly "CKPT DATA METRIC FRAMES SAMPLES REAL SPLIT GIVEN SAMPLES_PER_CLIP VAL_FRACTION DETECTOR MANIFEST OUT GPUS" \
  EXP METRICS FRAME NUM_FRAMES SAMPLE NUM_SAMPLES NUM_REAL GIVEN_FRAMES DATA_PATH CHECKPOINT FOLDER

CKPT=${CKPT:-} DATA=${DATA:-} DETECTOR=${DETECTOR:-} MANIFEST=${MANIFEST:-} METRIC=${METRIC:-motion} REAL=${REAL:-}
FRAMES=${FRAMES:-16} SAMPLES=${SAMPLES:-96} SPLIT=${SPLIT:-val} GIVEN=${GIVEN:-0-7} GPUS=${GPUS:-1}
SAMPLES_PER_CLIP=${SAMPLES_PER_CLIP:-1} VAL_FRACTION=${VAL_FRACTION:-0.05}
read -ra METRICS <<<"$METRIC"
for metric in "${METRICS[@]}"; do # before anything is sampled
  case $metric in
    motion | consistency | nearest | classifier) ;;
    fvd | fid) [[ -n $DETECTOR || -n $MANIFEST ]] || complain "METRIC=$metric needs DETECTOR, a TorchScript file" ;;
    prediction) [[ ${#METRICS[@]} == 1 ]] || complain "METRIC=prediction takes samples of its own; score it alone" ;;
    *) complain "METRIC=$(printf %q "$metric"); expected motion fvd fid consistency nearest classifier prediction" ;;
  esac
done
activate
processes "$GPUS"

if [[ -n $MANIFEST ]]; then
  OUT=${OUT:-samples/again}
  WORDS=$(PYTHONPATH=EqM python -c 'import sys
from runtime.cli import one_line_errors
from scoring.manifest import sampling_words

sys.argv[0] = "score.sh"
with one_line_errors():
    print(*sampling_words(sys.argv[1]), sep="\n")' "$MANIFEST")
  mapfile -t AGAIN <<<"$WORDS"
  CONTINUED= && [[ $WORDS == *--given-split=* ]] && CONTINUED=$DATA # prediction: its clips are also given
  "${RUN[@]}" EqM/sample_gd.py "${AGAIN[@]}" ${CKPT:+--ckpt="$CKPT"} ${CONTINUED:+--given="$CONTINUED"} \
    --folder="$OUT" --no-previews --no-overwrite "$@"
  "${RUN[@]}" EqM/evaluate.py --manifest="$MANIFEST" --samples="$OUT" --out="$OUT/again.json" \
    ${DATA:+--data-path="$DATA"} ${DETECTOR:+--detector="$DETECTOR"}
  exit
fi

OUT=${OUT:-samples/score} DATA=${DATA:-datasets/moving-shapes} KIND=()
if [[ $METRIC == prediction ]]; then
  SAMPLES=$((${REAL:-256} * SAMPLES_PER_CLIP)) REAL=
  KIND=(--given="$DATA" --given-split="$SPLIT" --val-fraction="$VAL_FRACTION" --given-frames="$GIVEN")
  KIND+=(--samples-per-clip="$SAMPLES_PER_CLIP" --no-keep-background)
fi
"${RUN[@]}" EqM/sample_gd.py --video --ckpt="${CKPT:-results/demo}" --num-frames "$FRAMES" --num-samples="$SAMPLES" \
  --folder="$OUT" --no-overwrite "${KIND[@]}" "$@"
for metric in "${METRICS[@]}"; do
  MORE=(${REAL:+--num-real="$REAL"})
  [[ $metric == classifier ]] && MORE=()
  [[ $metric == f[iv]d ]] && MORE+=(--detector="$DETECTOR")
  "${RUN[@]}" EqM/evaluate.py --metric="$metric" --samples="$OUT" --data-path="$DATA" --out="$OUT/$metric.json" \
    --val-fraction="$VAL_FRACTION" "${MORE[@]}"
done
