#!/usr/bin/env bash
# Train in phases: encode the videos once, train on 4 frames, then continue with 8, then with 16. After an interruption
# run the same command again: it continues the last phase that has a checkpoint.
#
#   DATA=datasets/ucf-101 GPUS=8 bash scripts/train_progressive.sh [more flags of EqM/train.py]
#
#   DATA=datasets/ucf-101   the folder of your videos, or a latent cache
#   GPUS=8                  processes; on a machine without GPUs, they share the CPU
#   EXP=progressive_rope_training   results go to results/$EXP
#   RECIPE=ours             flags of train.py: a name in scripts/recipes (ours, small, published), or a file of your own
#   SCHEDULE="4:50000:256 8:100000:128 16:150000:64"   phases: frames per clip, global step at the end, clips per step;
#                           equal compute did best (B in results/studies/positions/study-first-edition.md)
#   START                   image model that phase 1 starts from; add --model, --vae and --image-size to fit it
#   CACHE=1                 encode the videos into $DATA-latents; or a folder for the latents; 0: encode at every step
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100   seconds that processes have to save and end after a signal
#
# All else is a flag, such as --model EqM-B/4, and takes precedence over the recipe. By default, a phase validates and
# samples 20 times (--val-every, --sample-every), and --compile is on if there is a GPU (--no-compile).
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/common.sh || exit
for old in {FRAMES,STEPS,BATCH}_{1,2,3}=SCHEDULE MODEL=--model FORCING=--forcing LR_DECAY=--lr-decay LATENTS=CACHE \
  VAE=--vae IMAGE_SIZE=--image-size FLIPS=--no-flip COMPILE=--no-compile ONE_RUN="train.py --frames-schedule"; do
  name=${old%%=*}
  [[ -z ${!name:-} ]] || complain "$name: no longer a variable; unset it, and use ${old#*=}, see --help"
done
[[ ! " $* " =~ \ --(data-path|results-dir|frames-schedule|max-steps|global-batch-size|ckpt|inflate)[\ =] ]] ||
  complain "--${BASH_REMATCH[1]}: not a flag of this script; use DATA, EXP, SCHEDULE or START, or EqM/train.py itself"
DATA=${DATA:-datasets/ucf-101} GPUS=${GPUS:-8} EXP=${EXP:-progressive_rope_training} RECIPE=${RECIPE:-ours}
SCHEDULE=${SCHEDULE:-4:50000:256 8:100000:128 16:150000:64} START=${START:-} CACHE=${CACHE:-1} BEFORE=0 BEGUN=0
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100} # for a step and two saves
must "expected FRAMES:LAST_STEP:CLIPS of each phase" '([1-9][0-9]*(:[1-9][0-9]*){2} *)+' SCHEDULE
read -ra PHASES <<<"$SCHEDULE"
[[ -z $(printf '%s\n' "${PHASES[@]%%:*}" | sort | uniq -d) ]] || complain "SCHEDULE: two phases have the same frames"
[[ -f $RECIPE ]] || RECIPE=scripts/recipes/$RECIPE.txt
LAST=${SCHEDULE%:*} # frames:steps of all phases but the clips of the last one
TRAIN=(EqM/train.py --video --use-rope --results-dir="results/$EXP" --lr-decay-end="${LAST##*:}")
! command -v nvidia-smi >/dev/null || TRAIN+=(--compile)
FLAGS=("@$RECIPE" ${START:+--rope-speed=0} "$@") # the positions of an image model don't move
FROM=(${START:+--inflate="$START" --new-classes})

stop() { # SIGNAL STATUS: pass the signal on to the command, which saves and ends first
  kill -"$1" $(jobs -p) 2>/dev/null || true
  while [[ -n $(jobs -pr) ]]; do sleep 0.2; done
  echo "$SCRIPT: stopped; to continue, $EQM_ADVICE" && exit "$2"
}
set -m && trap 'stop INT 130' INT && trap 'stop TERM 143' TERM USR1 HUP # -m: Ctrl-C reaches this script only
run() { "$@" & wait $!; }

shopt -s extglob # a causal run has one more word in its name
activate # then find the mistakes of all phases, as the cache and phase 1 may take hours
WORLD_SIZE=${EQM_RANKS:-$GPUS} python "${TRAIN[@]}" "${FLAGS[@]}" "${FROM[@]}" --data-path="$DATA" \
  --frames-schedule="$(IFS=, && echo "${PHASES[*]}")" --dry-run >/dev/null
if [[ $CACHE != 0 && ! -f $DATA/latents.json ]]; then
  [[ $CACHE != 1 ]] || CACHE=$DATA-latents
  IFS=: read -r frames last clips <<<"${PHASES[0]}" # its flags, too, before the long work
  WORLD_SIZE=${EQM_RANKS:-$GPUS} python "${TRAIN[@]}" "${FLAGS[@]}" "${FROM[@]}" --data-path="$DATA" --num-frames="$frames" \
    --max-steps="$last" --global-batch-size="$clips" --dry-run >/dev/null
  run "${RUN[@]}" EqM/cache_latents.py --with-flips --skip-others "${FLAGS[@]}" --data-path="$DATA" --out="$CACHE"
  DATA=$CACHE
fi
for index in "${!PHASES[@]}"; do # the phases before the last one that has a checkpoint are done, and may be deleted
  SAVED=("results/$EXP"/[0-9]*-EqM-*-f"${PHASES[index]%%:*}"-rope?(-causal)/checkpoints/*.pt)
  [[ ! -f ${SAVED[0]} ]] || BEGUN=$index
done
for index in "${!PHASES[@]}"; do
  IFS=: read -r frames last clips <<<"${PHASES[index]}"
  every=$(((last - BEFORE + 19) / 20)) BEFORE=$last
  [[ $index -lt $BEGUN ]] || run "${RUN[@]}" "${TRAIN[@]}" --val-every="$every" --sample-every="$every" "${FLAGS[@]}" \
    --data-path="$DATA" --num-frames="$frames" --max-steps="$last" --global-batch-size="$clips" --resume "${FROM[@]}"
  RUNS=("results/$EXP"/[0-9]*-EqM-*-f"$frames"-rope?(-causal))
  FROM=(--ckpt="${RUNS[-1]}/checkpoints/$(printf %07d "$last").pt")
done
echo "$SCRIPT: done; sample the model with: EXP=$(printf %q "$EXP") bash scripts/sample.sh"
