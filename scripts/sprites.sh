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
#   SAMPLES=2592, PREDICTIONS=2664   samples, a multiple of 9; clips of held-out characters to predict
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/experiment.sh || exit
no_words "$@"
HOURS=${HOURS:-2} EXP=${EXP:-sprites} SEED=${SEED:-0} VAE=${VAE:-} OBJECTIVE=${OBJECTIVE:-eqm} READERS=1
SOURCE=${SOURCE:-datasets/sprites-sheets} DATA=${DATA:-datasets/sprites} SAMPLES=${SAMPLES:-2592}
PREDICTIONS=${PREDICTIONS:-2664}
counts SAMPLES PREDICTIONS
seeds SEED
must "unknown; expected eqm, flow or blind" "eqm|flow|blind" OBJECTIVE
[[ -z $VAE || -d $VAE ]] || complain "VAE=$(printf %q "$VAE"): no such folder; unset VAE to train one"
steps VAE_STEPS=2700 STEPS_1=750 STEPS_2=5500 WEAK=2500 # the checkpoint of step WEAK guides the samples
begin HOURS DATA SEED OBJECTIVE VAE VAE_STEPS STEPS_1 STEPS_2 WEAK SAMPLES PREDICTIONS
complete "$DATA" || python datasets/prepare_sprites.py --source="$SOURCE" --out="$DATA"
mkdir -p "results/$EXP" && echo "$SETTINGS" >"results/$EXP/settings"
[[ -n $VAE ]] || train_vae --latent-channels 8
"${RUN[@]}" EqM/cache_latents.py --data-path="$DATA" --out="results/$EXP/latents" --vae="$VAE" --image-size 64
[[ $OBJECTIVE == eqm ]] && MORE=() || MORE=(--objective "$OBJECTIVE" --sampler euler)
train @scripts/recipes/sprites.txt --data-path="results/$EXP/latents" --frames-schedule "4:$STEPS_1:32,8:$STEPS_2:16" \
  --ckpt-every "$WEAK" --global-seed "$SEED" "${MORE[@]}"
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
