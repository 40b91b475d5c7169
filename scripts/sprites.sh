#!/usr/bin/env bash
# The Sprites benchmark on a machine without a GPU: compose its 11,664 clips, train a VAE, encode the clips, train a model
# on 4, then 8 frames, sample, predict clips from one frame, and score all of it. Run it again to continue.
#
#   git clone https://github.com/YingzhenLi/Sprites datasets/sprites-sheets && bash scripts/sprites.sh
#
#   HOURS=2                     about how long it trains on 2 CPU cores
#   EXP=sprites                 results go to results/$EXP, samples and scores to samples/$EXP-*
#   SOURCE=datasets/sprites-sheets   the repository that holds the sheets
#   DATA=datasets/sprites       the data set made from the sheets, if it is missing
#   SEED=0                      of the model and its samples
#   OBJECTIVE=eqm               flow or blind to compare with: see --objective of train.py
#   VAE                         a VAE to use instead of a new one, such as results/EXP/000-VAE-64px-f4-c8-16-32-64/vae
#   GPUS, PRECISION             processes, bf16 or fp32; default: what suits the machine
#   VAE_STEPS, STEPS_1, STEPS_2 steps; default: computed from HOURS
#   WEAK                        the step whose checkpoint guides the samples; default: computed from HOURS
#   SAMPLES=2592                a multiple of 9: as many of each class
#   PREDICTIONS=2664            clips of held-out characters to predict from their first frame
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
no_words "$@"

EXP=${EXP:-sprites} SEED=${SEED:-0} VAE=${VAE:-} OBJECTIVE=${OBJECTIVE:-eqm}
SOURCE=${SOURCE:-datasets/sprites-sheets} DATA=${DATA:-datasets/sprites}
SAMPLES=${SAMPLES:-2592} PREDICTIONS=${PREDICTIONS:-2664} READERS=1
counts SAMPLES PREDICTIONS
check_seed
must "unknown; expected eqm, flow or blind" "eqm|flow|blind" OBJECTIVE
OTHER=${OBJECTIVE#eqm}
[[ -z $VAE || -d $VAE ]] || complain "VAE=$(printf %q "$VAE"): no such folder; unset VAE to train one"
check_hours
VAE_STEPS=${VAE_STEPS:-$(steps 2700)} STEPS_1=${STEPS_1:-$(steps 750)} STEPS_2=${STEPS_2:-$(steps 5500)}
WEAK=${WEAK:-$(steps 2500)}
begin DATA SEED OBJECTIVE VAE VAE_STEPS STEPS_1 STEPS_2 WEAK SAMPLES PREDICTIONS

complete "$DATA" || python datasets/prepare_sprites.py --source="$SOURCE" --out="$DATA"
mkdir -p "results/$EXP"
echo "$SETTINGS" >"results/$EXP/settings"

[[ -n $VAE ]] || train_vae --latent-channels 8
"${RUN[@]}" EqM/cache_latents.py --data-path="$DATA" --out="results/$EXP/latents" --vae="$VAE" --image-size 64

# Patches of one frame, so a given frame has tokens of its own. Left and right are different classes: no mirrored clips
newest "results/$EXP"/*-EqM-S-4-*
"${RUN[@]}" EqM/train.py --video --use-rope --data-path="results/$EXP/latents" --results-dir="results/$EXP" "${RESUME[@]}" \
  --model EqM-S/4 --depth 6 --hidden-size 256 --num-heads 4 --temporal-patch-size 1 --position-table space --rope-theta 100 \
  --frames-schedule "4:$STEPS_1:32,8:$STEPS_2:16" --mix 0.1 --forcing 0.7 --no-flip --optimizer muon --lr 2e-3 \
  --warmup-steps 50 --lr-decay 0.8 --ema-decay 0.998 --gamma-shift 2 --global-seed "$SEED" --num-workers 0 \
  --log-every 50 --val-every 1000 --val-clips 64 --sample-every 0 --save-minutes 3 --ckpt-every "$WEAK" \
  --objective "$OBJECTIVE" --sampler "$([[ $OTHER ]] && echo euler || echo ngd)" --num-sampling-steps 24 \
  --stepsize 0.0217 --cfg-scale 1.5 "${MIXED[@]}"
newest "results/$EXP"/*-EqM-S-4-*/checkpoints/best.pt
BEST=$FOUND

COMMON=(--num-frames 8 --batch-size 32 --global-seed "$SEED" --no-previews)
sample "samples/$EXP-f8" "${COMMON[@]}" --num-samples "$SAMPLES" --cfg-scale 1.7 \
  --weak-ckpt "$(printf %s/%07d.pt "${BEST%/*}" "$WEAK")"
GIVEN=("${COMMON[@]}" --given-frames 0 --no-keep-background --cfg-scale 1) # guidance does not help predictions
sample "samples/$EXP-predicted" "${GIVEN[@]}" --num-samples "$PREDICTIONS" --given="$DATA" --given-split val

# For the picture: one held-out character in all nine classes
for clip in "$DATA"/*/"$(basename "$(head -n 1 "$DATA/ucfTrainTestlist/testlist01.txt")")"; do
  class=$(basename "$(dirname "$clip")")
  mkdir -p "results/$EXP/nine/$class" && cp "$clip" "results/$EXP/nine/$class"
done
sample "samples/$EXP-nine" "${GIVEN[@]}" --num-samples 9 --given="results/$EXP/nine"
python scripts/gallery.py "samples/$EXP-f8" "samples/$EXP-nine" --rows 9 --png "samples/$EXP.png"

RUN=(python) # these metrics compute in one process, which may use all cores
score "samples/$EXP-census.json" --metric census --samples="samples/$EXP-f8"
score "samples/$EXP-classifier.json" --metric classifier --samples="samples/$EXP-f8" --classifier-test val
score "samples/$EXP-predicted.json" --metric prediction --samples="samples/$EXP-predicted"
score "samples/$EXP-predicted-census.json" --metric census --samples="samples/$EXP-predicted"
python scripts/gallery.py "samples/$EXP-f8" --data-path="$DATA"
python scripts/studies/sprites.py "$EXP" --out "samples/$EXP-scores"
echo "$SECONDS s; see samples/$EXP.png, samples/$EXP-f8/gallery.html and samples/$EXP-scores/sprites.md"
