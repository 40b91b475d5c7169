#!/usr/bin/env bash
# Real people on a machine without a GPU: Weizmann's actions, a VAE trained on them, a latent cache, a model trained on
# 4, then 8, then 16 frames, samples, continuations of given frames, and their scores. Run it again to continue.
#
#   git clone https://github.com/sergeytulyakov/mocogan datasets/mocogan && bash scripts/weizmann.sh
#
#   HOURS=2                     about how long it trains: 2 took 134 minutes on 2 shared CPU cores
#   EXP=weizmann                results go to results/$EXP, samples to samples/$EXP-f16 and so on
#   SOURCE=datasets/mocogan     the repository that holds the strips
#   DATA=datasets/weizmann      the data set made from the strips, if it is missing
#   HOLD_OUT="7 8"              persons that do not train
#   GPUS, PRECISION             processes, bf16 or fp32; default: what suits the machine
#   SAMPLES=96, LONG=16, REAL=64   samples of 16 frames, of 64 frames, held-out clips to continue
#   CLASSIFIER_STEPS=250        training steps of the classifier of actions
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/experiment.sh || exit
no_words "$@"
HOURS=${HOURS:-2} EXP=${EXP:-weizmann} SOURCE=${SOURCE:-datasets/mocogan} DATA=${DATA:-datasets/weizmann}
HOLD_OUT=${HOLD_OUT:-7 8} SAMPLES=${SAMPLES:-96} LONG=${LONG:-16} REAL=${REAL:-64} CLASSIFIER_STEPS=${CLASSIFIER_STEPS:-250}
counts SAMPLES LONG REAL CLASSIFIER_STEPS
steps VAE_STEPS=5000 STEPS_1=2400 STEPS_2=4800 STEPS_3=8000
begin HOURS DATA HOLD_OUT VAE_STEPS STEPS_1 STEPS_2 STEPS_3 SAMPLES LONG REAL CLASSIFIER_STEPS
complete "$DATA" || python datasets/prepare_weizmann.py --source="$SOURCE" --out="$DATA" --hold-out $HOLD_OUT
HELD=$(awk -F "person|[.]" '{ print $2 }' "$DATA/ucfTrainTestlist/testlist01.txt" | sort -nu) # Bend/person7.mkv
[[ $HELD == "$(printf '%s\n' $HOLD_OUT | sort -nu)" ]] ||
  complain "HOLD_OUT=$(printf %q "$HOLD_OUT"): $DATA holds out $(echo $HELD); set another DATA"
MORE=$DATA-more # seven copies of each training video in other colors and places, for training only
complete "$MORE" || python datasets/augment.py --data-path="$DATA" --out="$MORE" --copies 7
mkdir -p "results/$EXP" && echo "$SETTINGS" >"results/$EXP/settings"
train_vae
"${RUN[@]}" EqM/cache_latents.py --data-path="$MORE" --out="results/$EXP/latents" --vae="$VAE" --image-size 64 --with-flips
train @scripts/recipes/weizmann.txt --data-path="results/$EXP/latents" \
  --frames-schedule "4:$STEPS_1:32,8:$STEPS_2:16,16:$STEPS_3:8" # 2,048 tokens per step
# Samples of 16 frames, and of 64, made in windows
sample "samples/$EXP-f16" --num-frames 16 --num-samples "$SAMPLES" --batch-size 8
sample "samples/$EXP-f64" --num-frames 64 --num-samples "$LONG" --batch-size 8
# Continuations of clips of the held-out people
while read -r clip _; do
  mkdir -p "results/$EXP/held-out/${clip%/*}"
  cp "$DATA/$clip" "results/$EXP/held-out/$clip"
done <"$DATA/ucfTrainTestlist/testlist01.txt"
sample "samples/$EXP-continued" --num-frames 32 --given="results/$EXP/held-out" --given-frames 0-7 \
  --num-samples "$(wc -l <"$DATA/ucfTrainTestlist/testlist01.txt")" --batch-size 4
# Scores of continuations from 8 frames (8 samples of each clip) and from 4 (10), as the VAE decodes them and with the
# background kept; whether the model memorizes; whether samples show the requested action
predict() { # NAME FRAMES CLIPS SAMPLES_PER_CLIP --[no-]keep-background
  sample "samples/$EXP-$1" --num-frames 16 --given="$DATA" --given-split val --given-frames="$2" --num-samples="$(($3 * $4))" \
    --samples-per-clip="$4" "$5" --no-previews
  score "samples/$EXP-$1.json" --metric prediction --samples="samples/$EXP-$1" ${5##--no-*} # nothing for --no-
}
predict 8of16-decoded 0-7 "$REAL" 8 --no-keep-background
predict 8of16-background 0-7 "$REAL" 8 --keep-background
predict 4of16-decoded 0-3 "$(((REAL + 3) / 4))" 10 --no-keep-background
predict 4of16-background 0-3 "$(((REAL + 3) / 4))" 10 --keep-background
score "samples/$EXP-nearest.json" --metric nearest --samples="samples/$EXP-f16"
score "samples/$EXP-classifier.json" --metric classifier --samples="samples/$EXP-f16" --classifier-steps="$CLASSIFIER_STEPS"
python scripts/gallery.py "samples/$EXP-f16" --data-path="$DATA"
for kind in f64 continued; do python scripts/gallery.py "samples/$EXP-$kind"; done
python scripts/studies/people.py "$EXP" --out "samples/$EXP-scores"
echo "$SECONDS s; see samples/$EXP-f16/sheet.png, samples/$EXP-f16/gallery.html and samples/$EXP-scores/people.md"
