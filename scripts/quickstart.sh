#!/usr/bin/env bash
# From a fresh clone to videos: environment, data, a RoPE model trained on 4, then 8, then 16 frames, samples of 16, 7
# and 24 frames, and their scores by a motion tracker. Run it again to continue from its last checkpoint.
#
#   EXP=quickstart                  results go to results/$EXP, samples to samples/$EXP-f16 and so on
#   DATA=datasets/moving-shapes     made if it is missing, with VIDEOS=60 of each class
#   MODEL=EqM-Ti/2
#   GPUS, PRECISION                 processes, bf16 or fp32; default: what suits the machine
#   STEPS_1, STEPS_2, STEPS_3       global steps at which the phases end: 1000, 1680, 2200
#   BATCH_1, BATCH_2, BATCH_3       clips per step: 32, 16, 8
#   ONE_RUN=1                       0: one run per phase, which starts from the checkpoint of the previous phase
#   FORCING=0.5                     share of the clips that teach to complete given frames
#   LR_DECAY=0.4                    share of the steps, at the end, over which the learning rate falls to 0
#   SEED=0                          seed of every random draw of the training
#   SAMPLES=48, FRAMES="16 7 24"    samples of each length, lengths in frames
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
no_words "$@"

suit
check_gpus
export GPUS EXP=${EXP:-quickstart} DATA=${DATA:-datasets/moving-shapes} MODEL=${MODEL:-EqM-Ti/2}
export STEPS_1=${STEPS_1:-1000} STEPS_2=${STEPS_2:-1680} STEPS_3=${STEPS_3:-2200} # 840 and 1580: one seed was weak
export BATCH_1=${BATCH_1:-32} BATCH_2=${BATCH_2:-16} BATCH_3=${BATCH_3:-8}      # 2,048 tokens per step
export ONE_RUN=${ONE_RUN:-1} FORCING=${FORCING:-0.5} LR_DECAY=${LR_DECAY:-0.4} RECIPE=small
export COMPILE=0 CACHE=0 # compiling takes longer than it saves here; pixels need no encoding
[[ $ONE_RUN == 1 ]] && MIX=(--mix 0.1) || MIX=() # without it the model forgets half of what 4 frames taught it
SAMPLES=${SAMPLES:-48} FRAMES=${FRAMES:-16 7 24} VIDEOS=${VIDEOS:-60} SEED=${SEED:-0}

# Find mistakes before anything is installed
counts VIDEOS SAMPLES
check_seed
must "not counts; expected one or more, as in '16 7'" '([1-9][0-9]* *)+' FRAMES
must "expected bf16 or fp32" '(bf16|fp32)?' PRECISION
SCRIPT=$SCRIPT EQM_ONLY_CHECK=1 bash scripts/train_progressive.sh

bash scripts/setup.sh
.venv/bin/python datasets/make_moving_shapes.py --out="$DATA" --videos-per-class="$VIDEOS" --seconds 1.4

bash scripts/train_progressive.sh \
  --depth 4 --hidden-size 128 --num-heads 4 --rope-theta 100 \
  --temporal-patch-size 4 --image-size 16 --vae none --no-flip --forcing-regions 0.1 \
  --num-workers 0 --cache-frames "${MIX[@]}" "${MIXED[@]}" \
  --lr 2e-3 --warmup-steps 20 --ema-decay 0.99 --gamma-shift 2 --global-seed "$SEED" \
  --log-every 50 --val-every 100000 --val-clips 32 --sample-every 0 \
  --sampler ngd --num-sampling-steps 20 --stepsize 0.0262 --cfg-scale 1.5

OUT=samples/$EXP CKPT= FRAMES=$FRAMES SAMPLES=$SAMPLES bash scripts/sample.sh --overwrite "${MIXED[@]}" \
  --batch-size 8 # 48 samples are 3 batches for each of two ranks

FOLDERS=()
for frames in $FRAMES; do FOLDERS+=("samples/$EXP-f$frames"); done
OUT=motion.json && [[ ${#FOLDERS[@]} == 1 ]] && OUT=${FOLDERS[0]}/motion.json
.venv/bin/python EqM/evaluate.py --metric motion --samples "${FOLDERS[@]}" --data-path="$DATA" --out="$OUT" \
  --num-workers 0
echo "$SECONDS s; see samples/$EXP-f16/sheet.png and the GIFs beside it"
