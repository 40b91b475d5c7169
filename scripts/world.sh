#!/usr/bin/env bash
# A world to play in, on a machine without a GPU: episodes with actions, a causal model of them, roll-outs on held-out
# maps from one true frame, their scores, and a page to play in a browser. Run it again to continue; for other values, set
# another EXP.
#
#   EXP=world                 results and the page go to results/$EXP, samples to samples/$EXP-4, scores to samples/$EXP-4.json
#   DATA=datasets/world       the data set, made if it is missing
#   SCHEDULE="2:500:32 4:900:16"   frames, last step and clips per step of each phase; default: those of the recipe
#   EVALUATIONS="4"           of the network for each frame; several are compared
#   CLIPS=64, FRAMES=129      held-out episodes, each continued by two walks; frames of a sample with the given one, at most 129
#   SEED=0                    of training and sampling; the data set has its own
#   GPUS, PRECISION           processes, bf16 or fp32; default: what suits the machine
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/experiment.sh || exit
no_words "$@"
EXP=${EXP:-world} DATA=${DATA:-datasets/world} SCHEDULE=${SCHEDULE:-}
EVALUATIONS=${EVALUATIONS:-4} CLIPS=${CLIPS:-64} FRAMES=${FRAMES:-129} SEED=${SEED:-0}
counts CLIPS
must "expected 2 to 129 frames, as long as an episode" '[2-9]|[1-9][0-9]|1[01][0-9]|12[0-9]' FRAMES
must "not counts; expected one or more, as in '2 4'" '([1-9][0-9]* *)+' EVALUATIONS
must "not phases; expected FRAMES:LAST_STEP:CLIPS, as in '2:500:32 4:900:16'" '([0-9]+:[0-9]+:[0-9]+ *)*' SCHEDULE
seeds SEED
begin DATA SCHEDULE CLIPS FRAMES SEED
mkdir -p "results/$EXP" && echo "$SETTINGS" >"results/$EXP/settings"
python datasets/make_world.py --out="$DATA"
[[ -z $SCHEDULE ]] && PHASES=() || PHASES=(--frames-schedule="${SCHEDULE// /,}")
train @scripts/recipes/world.txt --data-path="$DATA" "${PHASES[@]}" --global-seed "$SEED"
for evaluations in $EVALUATIONS; do
  folder=samples/$EXP-$evaluations
  sample "$folder" --num-sampling-steps $((evaluations + 1)) --given="$DATA" --given-split val --given-frames 0 \
    --no-keep-background --num-frames "$FRAMES" --actions "$DATA/walks.npy" --num-samples $((2 * CLIPS)) \
    --samples-per-clip 2 --batch-size 64 --global-seed "$SEED"
  score "$folder.json" --metric world --samples="$folder"
done
page=results/$EXP/world.html
there "$page" || python scripts/export.py "$BEST" --html "$page"
echo "$SECONDS s; see samples/$EXP-${EVALUATIONS%% *}/sheet.png and the GIFs beside it, and play $page"
