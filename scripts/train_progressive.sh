#!/usr/bin/env bash
# Encode all videos once, then train on 4 frames, continue with 8, then with 16: three phases of one model. Run the same
# command again after an interruption: finished phases are skipped, the unfinished one continues from its last checkpoint.
#
#   DATA=datasets/ucf-101 GPUS=8 bash scripts/train_progressive.sh [more flags of EqM/train.py]
#
#   EXP=progressive_rope_training    everything goes to results/$EXP
#   GPUS=8                           processes; on a machine without GPUs, of the CPU
#   MODEL=EqM-S/4
#   FRAMES_1=4, FRAMES_2=8, FRAMES_3=16; STEPS_1=50000, STEPS_2=100000, STEPS_3=150000, which are global;
#   BATCH_1=256, BATCH_2=128, BATCH_3=64 clips a step
#   RECIPE=ours                      AdamW at 1e-4, uniform gamma, frames 1 or 2 apart, FORCING=0.75
#          small                     the same with Muon and gamma shift 3, for models of a few million parameters
#          published                 as in the paper, but with our positions: no forcing, frames 1 apart, guidance 4
#   LR_DECAY=0                       share of all steps over which the learning rate falls to 0, at the end
#   FORCING                          share of the clips that teach to complete given frames; default: see RECIPE
#   COMPILE                          1 or 0: torch.compile; default: 1 on a GPU
#   CACHE=1                          encode the videos once, into LATENTS=$DATA-latents; 0: at every step
#   VAE=ema, IMAGE_SIZE=256, FLIPS=1 of the cache; FLIPS=1: mirrored frames as well, which doubles it
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100   seconds that ranks have to save and end after a signal
#   ONE_RUN=0                        1: all three in one run of train.py (--frames-schedule): no start and no scan of the
#                                    data between them
#
# Paths are relative to the repository. Your flags come after those of the recipe and take precedence.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
flags_only "$@"
nearly "DATA GPUS EXP MODEL FRAMES_1 STEPS_1 BATCH_1 ... RECIPE LR_DECAY FORCING COMPILE CACHE LATENTS VAE IMAGE_SIZE FLIPS" \
  GPU NGPUS NUM_GPUS DATA_PATH EXPERIMENT STEPS STEP_1 STEP_2 STEP_3 BATCH BATCH_SIZE FRAME_1 LATENT

GPUS=${GPUS:-8} MODEL=${MODEL:-EqM-S/4} DATA=${DATA:-datasets/ucf-101} EXP=${EXP:-progressive_rope_training}
# Phases of equal compute did best of the schedules tried (results/study-first-edition.md, B)
FRAMES_1=${FRAMES_1:-4} STEPS_1=${STEPS_1:-50000} BATCH_1=${BATCH_1:-256}
FRAMES_2=${FRAMES_2:-8} STEPS_2=${STEPS_2:-100000} BATCH_2=${BATCH_2:-128}
FRAMES_3=${FRAMES_3:-16} STEPS_3=${STEPS_3:-150000} BATCH_3=${BATCH_3:-64}
LR_DECAY=${LR_DECAY:-0} # of all phases, so that the last steps of an earlier phase may be part of it
# The paper has AdamW at 1e-4 without weight decay, uniform gamma and label dropout 0.1, the defaults of train.py. Ours
# also shows twice the distances in time, so that longer clips can be sampled, and completes given frames. Muon and gamma
# shift 3 did best with models of 1.3 M parameters (the same, E).
RECIPE=${RECIPE:-ours} SHARE=0.75
case $RECIPE in
  ours) FLAGS=(--frame-interval 1 2) ;;
  small) FLAGS=(--frame-interval 1 2 --optimizer muon --gamma-shift 3) ;;
  published) FLAGS=(--cfg-scale 4) SHARE=0 ;;
  *) complain "RECIPE=$(printf %q "$RECIPE"): unknown recipe; expected ours, small or published" ;;
esac
# A new model gets the positions that did best in results/study.md; one that has a checkpoint keeps its own, and its FORCING
[[ ${ONE_RUN:-0} == 1 ]] && FIRST=f$FRAMES_1-$FRAMES_2-$FRAMES_3 || FIRST=f$FRAMES_1 # of the run that it began with
CKPTS=("results/$EXP"/*-"${MODEL/\//-}-$FIRST-rope"/checkpoints/*.pt)
if [[ -f ${CKPTS[0]} ]]; then
  SHARE=$(grep -ohs '"forcing": [0-9.e-]*' "results/$EXP"/*/config.json | tail -n 1) || SHARE=0 # it began without
else
  FLAGS+=(--position-table space --rope-speed 0.5)
fi
FLAGS+=(--forcing "${FORCING:-${SHARE##* }}" --lr-decay "$LR_DECAY")
command -v nvidia-smi >/dev/null && ON_GPU=1 || ON_GPU=0
COMPILE=${COMPILE:-$ON_GPU} # which gains nothing on a CPU and can't train an energy
[[ $COMPILE == 1 && " $* " != *" --ebm"[\ =]* ]] && FLAGS+=(--compile)
# When a signal stops the run, torchrun kills ranks that take longer: for a step and two saves, one of which may be under way
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}

run() { # COMMAND: passes a signal to this script on to the run, which saves and ends before the script does
  local status=0 signalled=0
  "$@" &
  local child=$!
  trap 'signalled=1; kill -TERM "$child"' TERM USR1
  # A terminal sends it to torchrun as well. Python does not hear it: bash lets what is in its background ignore it
  trap 'signalled=1; [[ ${RUN[0]} != python ]] || kill -TERM "$child"' INT
  wait "$child" || status=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ends the wait, not the child
    status=0
    wait "$child" || status=$?
  done
  trap - TERM INT USR1
  if [[ $signalled == 1 ]]; then
    echo "train_progressive.sh: interrupted; the same command continues"
    exit 143
  fi
  return "$status"
}

CACHE=${CACHE:-1} LATENTS=${LATENTS:-$DATA-latents} VAE=${VAE:-ema} IMAGE_SIZE=${IMAGE_SIZE:-256} FLIPS=${FLIPS:-1}
if [[ $CACHE == 1 && ! -f $DATA/latents.json ]]; then
  if [[ " $* " == *" --vae"[\ =]* || " $* " == *" --image-size"[\ =]* ]]; then
    complain "the cache is made with VAE and IMAGE_SIZE, not --vae and --image-size; set these, or CACHE=0 to train" \
      "without a cache"
  fi
else
  CACHE=0
fi
activate
processes "$GPUS"
if [[ $CACHE == 1 ]]; then
  [[ $FLIPS == 1 ]] && MIRRORED=--with-flips || MIRRORED=
  run "${RUN[@]}" EqM/cache_latents.py --data-path="$DATA" --out="$LATENTS" \
    --vae="$VAE" --image-size="$IMAGE_SIZE" $MIRRORED
  DATA=$LATENTS
fi

train() { # FLAGS
  run "${RUN[@]}" EqM/train.py \
    --video --use-rope --model="$MODEL" --data-path="$DATA" --results-dir="results/$EXP" --resume "${FLAGS[@]}" "$@"
}

if [[ ${ONE_RUN:-0} == 1 ]]; then
  train --frames-schedule="$FRAMES_1:$STEPS_1:$BATCH_1,$FRAMES_2:$STEPS_2:$BATCH_2,$FRAMES_3:$STEPS_3:$BATCH_3" "$@"
  exit
fi

checkpoint() { # STEP: prints the name of the file that the phase ending at this step wrote
  if [[ ! $1 =~ ^[0-9]+$ ]]; then
    complain "a phase ends at step $(printf %q "$1"); STEPS_1 and STEPS_2 must be numbers"
  fi
  local files=("results/$EXP"/*/checkpoints/"$(printf %07d "$((10#$1))")".pt)
  if [[ ${#files[@]} -ne 1 || ! -f ${files[0]} ]]; then complain "expected one file, got $(printf %q "${files[*]}")"; fi
  echo "${files[0]}"
}

CKPT=
for phase in 1 2 3; do
  frames=FRAMES_$phase steps=STEPS_$phase batch=BATCH_$phase
  train --num-frames="${!frames}" --global-batch-size="${!batch}" --lr-decay-end="$STEPS_3" --max-steps="${!steps}" \
    ${CKPT:+--ckpt="$CKPT"} "$@"
  if [[ $phase != 3 ]]; then CKPT=$(checkpoint "${!steps}"); fi
done
