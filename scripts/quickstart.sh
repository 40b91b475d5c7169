#!/usr/bin/env bash
# From a fresh clone to videos: environment, data, a RoPE model trained on 4, then 8, then 16 frames, samples of 16, 7
# and 24 frames, and their scores by a motion tracker. Run it again to continue from its last checkpoint.
#
#   EXP=quickstart                  results go to results/$EXP, samples to samples/$EXP-f16 and so on
#   DATA=datasets/moving-shapes     Moving Shapes; made if they are missing, with VIDEOS=60 of each class
#   GPUS, PRECISION                 processes, bf16 or fp32; default: what suits the machine
#   STEPS_1=1000, STEPS_2=1680, STEPS_3=2200      global steps at which the phases end
#   BATCH_1=32, BATCH_2=16, BATCH_3=8             clips per step
#   ONE_RUN=1                       0: one run per phase, which starts from the checkpoint of the previous phase
#   MODEL, FORCING, LR_DECAY, GAMMA_SHIFT         flags of train.py; default: those of scripts/recipes/quickstart.txt
#   SEED=0                          seed of every random draw of the training
#   SAMPLES=48, FRAMES="16 7 24"    samples of each length, lengths in frames
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/experiment.sh || exit
no_words "$@"
EXP=${EXP:-quickstart} DATA=${DATA:-datasets/moving-shapes} VIDEOS=${VIDEOS:-60} SEED=${SEED:-0} ONE_RUN=${ONE_RUN:-1}
STEPS_1=${STEPS_1:-1000} STEPS_2=${STEPS_2:-1680} STEPS_3=${STEPS_3:-2200} # 840 and 1580: one seed was weak
BATCH_1=${BATCH_1:-32} BATCH_2=${BATCH_2:-16} BATCH_3=${BATCH_3:-8}        # 2,048 tokens per step
SAMPLES=${SAMPLES:-48} FRAMES=${FRAMES:-16 7 24}
MODEL=${MODEL:-} FORCING=${FORCING:-} LR_DECAY=${LR_DECAY:-} GAMMA_SHIFT=${GAMMA_SHIFT:-}
MORE=(${MODEL:+--model="$MODEL"} ${FORCING:+--forcing="$FORCING"} ${LR_DECAY:+--lr-decay="$LR_DECAY"}
  ${GAMMA_SHIFT:+--gamma-shift="$GAMMA_SHIFT"})
counts VIDEOS SAMPLES {STEPS,BATCH}_{1,2,3}
must "not counts; expected one or more, as in '16 7'" '([1-9][0-9]* *)+' FRAMES
seeds SEED
begin DATA VIDEOS MODEL FORCING LR_DECAY GAMMA_SHIFT SEED
python datasets/make_moving_shapes.py --out="$DATA" --videos-per-class="$VIDEOS" --seconds 1.4
mkdir -p "results/$EXP" && echo "$SETTINGS" >"results/$EXP/settings"
MORE+=("${MIXED[@]}" --global-seed "$SEED")
SCHEDULE="4:$STEPS_1:$BATCH_1 8:$STEPS_2:$BATCH_2 16:$STEPS_3:$BATCH_3"
if [[ $ONE_RUN == 1 ]]; then
  train @scripts/recipes/quickstart.txt --data-path="$DATA" --frames-schedule="${SCHEDULE// /,}" "${MORE[@]}"
else
  unset {STEPS,BATCH}_{1,2,3} MODEL FORCING LR_DECAY GAMMA_SHIFT ONE_RUN # which are flags of train_progressive.sh
  export GPUS EXP DATA SCHEDULE RECIPE=quickstart CACHE=0
  bash scripts/train_progressive.sh "${MORE[@]}" --mix 0 --no-compile
fi
export GPUS EXP FRAMES SAMPLES OUT=samples/$EXP CKPT=
bash scripts/sample.sh --overwrite "${MIXED[@]}" --batch-size 8 # 48 samples are 3 batches for each of two ranks
FOLDERS=()
for frames in $FRAMES; do FOLDERS+=("samples/$EXP-f$frames"); done
[[ ${#FOLDERS[@]} == 1 ]] && OUT=${FOLDERS[0]}/motion.json || OUT=motion.json
python EqM/evaluate.py --metric motion --samples "${FOLDERS[@]}" --data-path="$DATA" --out="$OUT" --num-workers 0
echo "$SECONDS s; see samples/$EXP-f16/sheet.png and the GIFs beside it"
