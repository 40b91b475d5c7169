#!/usr/bin/env bash
# Train a student, which samples in few evaluations, on samples of a teacher; sample and score both (docs/few-steps.md).
# Run it again to continue.
#
#   bash scripts/few.sh                              a student of results/demo, in minutes on 2 CPU cores
#   CKPT=results/EXP/002-EqM-S-4-f16-rope/checkpoints/best.pt EXP=mine DATA=DIR METRIC=consistency bash scripts/few.sh
#
#   CKPT=results/demo               the teacher: a checkpoint, or a folder of scripts/export.py
#   EXP=few                         results go to results/$EXP, samples and scores to samples/$EXP-*
#   PAIRS=1152                      samples of the teacher to train on
#   EPOCHS=7                        how often the student sees each of them
#   RECIPE=scripts/recipes/few.txt  other flags of train.py
#   REAL                            a data set whose clips make up 30% of the training; default: none
#   DATA=datasets/moving-shapes     the data set for scores; this one is made if it is missing
#   METRIC=motion                   or consistency, nearest, classifier, census: a metric of evaluate.py
#   SAMPLES=192                     samples of each score
#   EVALUATIONS="1 2 4 8"           of the student; the teacher samples as it is used to
#   SEED=0                          of the student and of the samples that are scored; the pairs have the next one
#   GPUS, PRECISION                 processes, bf16 or fp32; default: what suits the machine
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/experiment.sh || exit
no_words "$@"
CKPT=${CKPT:-results/demo} EXP=${EXP:-few} PAIRS=${PAIRS:-1152} EPOCHS=${EPOCHS:-7} RECIPE=${RECIPE:-scripts/recipes/few.txt}
REAL=${REAL:-} DATA=${DATA:-datasets/moving-shapes} METRIC=${METRIC:-motion} SAMPLES=${SAMPLES:-192}
EVALUATIONS=${EVALUATIONS:-1 2 4 8} SEED=${SEED:-0}
counts PAIRS EPOCHS SAMPLES
must "not counts; expected one or more, as in '2 4'" '([1-9][0-9]* *)+' EVALUATIONS
seeds SEED
must "not a metric; see --help" "motion|consistency|nearest|classifier|census" METRIC
[[ $CKPT/ != "results/$EXP/"* ]] || complain "EXP=$(printf %q "$EXP"): holds the teacher CKPT; set another EXP"
[[ -e $CKPT ]] || complain "CKPT=$(printf %q "$CKPT"): not found; expected a checkpoint or an exported folder"
[[ -f $RECIPE ]] || complain "RECIPE=$(printf %q "$RECIPE"): no such file; expected flags of train.py"
[[ -z $REAL || -d $REAL ]] || complain "REAL=$(printf %q "$REAL"): no such folder; expected videos"
[[ -d $DATA || $DATA == datasets/moving-shapes ]] || complain "DATA=$(printf %q "$DATA"): no such folder; expected videos"
begin CKPT PAIRS EPOCHS RECIPE REAL DATA SAMPLES SEED
mkdir -p "results/$EXP" && echo "$SETTINGS" >"results/$EXP/settings"
shapes
BEST=$CKPT OUT=samples/$EXP
sample "$OUT-pairs" --num-samples "$PAIRS" --seed $((SEED + 1)) --batch-size 32 --no-previews --save-latents
sample "$OUT-teacher" --num-samples "$SAMPLES" --seed "$SEED" --batch-size 32
train @"$RECIPE" --data-path="$OUT-pairs" --pairs --ckpt="$CKPT" --epochs "$EPOCHS" --global-seed "$SEED" \
  ${REAL:+--real-data="$REAL"}
FOLDERS=("$OUT-teacher")
for count in $EVALUATIONS; do
  sample "$OUT-$count" --num-samples "$SAMPLES" --seed "$SEED" --batch-size 32 --num-sampling-steps $((count + 1))
  FOLDERS+=("$OUT-$count")
done
python EqM/evaluate.py --metric "$METRIC" --samples "${FOLDERS[@]}" --data-path="$DATA" --out="$METRIC.json" --num-workers 0
python scripts/gallery.py "${FOLDERS[@]}" --rows 2 --png "$OUT.png"
echo "$SECONDS s; see $OUT.png and $METRIC.json in ${FOLDERS[*]}"
