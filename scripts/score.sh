#!/usr/bin/env bash
# Sample a model and score the samples.
#
#   bash scripts/score.sh                                    the demo's motion on Moving Shapes; a minute on a CPU
#   EXP=ucf DATA=datasets/ucf-101 METRIC="fvd consistency" SAMPLES=2048 DETECTOR=i3d_torchscript.pt \
#     bash scripts/score.sh --cfg-scale 1 [more flags of EqM/sample_gd.py]
#   CKPT=FILE DATA=datasets/ucf-101 METRIC=prediction GIVEN=0-7 SAMPLES_PER_CLIP=8 bash scripts/score.sh
#
#   EXP=demo                an experiment in results/
#   CKPT                    a checkpoint, or a folder of scripts/export.py; default: the newest best.pt of EXP
#   DATA                    folder of the real videos; default: datasets/moving-shapes, made if it is missing
#   METRIC=motion           one or more of motion fvd fid consistency nearest classifier census, or prediction
#   FRAMES=16, SAMPLES=96   frames per sample, number of samples
#   REAL                    number of real clips; default: the default of evaluate.py; for prediction: 256
#   SPLIT=val, GIVEN=0-7, SAMPLES_PER_CLIP=1   prediction: split and given frames of real clips, samples of each clip
#   VAL_FRACTION=0.05       share of the videos in val, the same as in training
#   DETECTOR                a TorchScript file, for fvd and fid
#   OUT, GPUS=1             folder of samples and scores, default: samples/score; processes
#
# Samples of another run are replaced only with --overwrite. Paths are relative to the repository.
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/common.sh || exit
CKPT=${CKPT:-} DATA=${DATA:-datasets/moving-shapes} METRIC=${METRIC:-motion} DETECTOR=${DETECTOR:-} REAL=${REAL:-}
FRAMES=${FRAMES:-16} SAMPLES=${SAMPLES:-96} SPLIT=${SPLIT:-val} GIVEN=${GIVEN:-0-7} GPUS=${GPUS:-1} EXP=${EXP:-demo}
OUT=${OUT:-samples/score} SAMPLES_PER_CLIP=${SAMPLES_PER_CLIP:-1} VAL_FRACTION=${VAL_FRACTION:-0.05} KIND=()
counts SAMPLES SAMPLES_PER_CLIP ${REAL:+REAL}
must "expected metrics; see --help" '((motion|fvd|fid|consistency|nearest|classifier|census) *)+|prediction' METRIC
[[ -n $DETECTOR || $METRIC != *f[iv]d* ]] || complain "METRIC=$METRIC: no detector; set DETECTOR to a TorchScript file"
[[ -n $CKPT ]] || find_model
activate
shapes
if [[ $METRIC == prediction ]]; then
  SAMPLES=$((${REAL:-256} * SAMPLES_PER_CLIP)) REAL=
  KIND=(--given="$DATA" --given-split="$SPLIT" --val-fraction="$VAL_FRACTION" --given-frames="$GIVEN" --no-keep-background
    --samples-per-clip="$SAMPLES_PER_CLIP")
fi
"${RUN[@]}" EqM/sample_gd.py --video --ckpt="$CKPT" --num-frames "$FRAMES" --num-samples="$SAMPLES" \
  --folder="$OUT" --no-overwrite "${KIND[@]}" "$@"
for metric in $METRIC; do
  MORE=(${REAL:+--num-real="$REAL"})
  [[ $metric != classifier ]] || MORE=()
  [[ $metric != f[iv]d ]] || MORE+=(--detector="$DETECTOR")
  "${RUN[@]}" EqM/evaluate.py --metric="$metric" --samples="$OUT" --data-path="$DATA" --out="$OUT/$metric.json" \
    --val-fraction="$VAL_FRACTION" "${MORE[@]}"
done
