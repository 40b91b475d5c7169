#!/usr/bin/env bash
# Encode all videos once, then train on 4 frames, continue with 8, then with 16: three phases of one model. After an
# interruption run the same command again. It continues the last phase that has a checkpoint.
#
#   DATA=datasets/ucf-101 GPUS=8 bash scripts/train_progressive.sh [more flags of EqM/train.py]
#
#   EXP=progressive_rope_training    results go to results/$EXP
#   GPUS=8                           processes; on a machine without GPUs they share the CPU
#   MODEL=EqM-S/4
#   START                            image model that phase 1 starts from; set MODEL, VAE and IMAGE_SIZE to fit it
#   FRAMES_1=4, FRAMES_2=8, FRAMES_3=16            frames per clip
#   STEPS_1=50000, STEPS_2=100000, STEPS_3=150000  global steps at which the phases end
#   BATCH_1=256, BATCH_2=128, BATCH_3=64           clips per step
#   RECIPE=ours                      AdamW at 1e-4, uniform gamma, frames 1 or 2 apart, FORCING=0.75
#          small                     also Muon, gamma shift 3 and a short sampler, for a few million parameters
#          published                 the paper's recipe with our positions: no forcing, frames 1 apart, guidance 4
#   LR_DECAY=0                       share of all steps, at the end, over which the learning rate falls to 0
#   FORCING                          share of the clips that teach to complete given frames; default: see RECIPE
#   COMPILE                          1 or 0: torch.compile; default: 1 on a GPU
#   CACHE=1                          encode the videos once, into LATENTS=$DATA-latents; 0: at every step
#   VAE=ema, IMAGE_SIZE=256, FLIPS=1 settings of the cache; FLIPS=1 adds mirrored frames, which doubles its size
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100   seconds that ranks have to save and end after a signal
#   ONE_RUN=0                        1: all phases in one run of train.py (--frames-schedule), which starts only once
#
# Paths are relative to the repository. Your flags come after the recipe's flags and take precedence. A phase validates
# and samples 20 times, unless you give --val-every or --sample-every. The model keeps the settings of its sampler
# (--sampler, --num-sampling-steps, --stepsize, --cfg-scale) for scripts/sample.sh, which takes the same flags.
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
flags_only "$@"
nearly "DATA GPUS EXP MODEL START FRAMES_1 STEPS_1 BATCH_1 ... RECIPE LR_DECAY FORCING COMPILE CACHE LATENTS"\
" VAE IMAGE_SIZE" \
  GPU NGPUS NUM_GPUS DATA_PATH EXPERIMENT STEPS STEP_1 STEP_2 STEP_3 BATCH BATCH_SIZE FRAME_1 LATENT INFLATE

GPUS=${GPUS:-8} MODEL=${MODEL:-EqM-S/4} DATA=${DATA:-datasets/ucf-101} EXP=${EXP:-progressive_rope_training}
START=${START:-}
# Phases of equal compute did best among the schedules we tried (results/studies/positions/study-first-edition.md, B)
FRAMES_1=${FRAMES_1:-4} STEPS_1=${STEPS_1:-50000} BATCH_1=${BATCH_1:-256}
FRAMES_2=${FRAMES_2:-8} STEPS_2=${STEPS_2:-100000} BATCH_2=${BATCH_2:-128}
FRAMES_3=${FRAMES_3:-16} STEPS_3=${STEPS_3:-150000} BATCH_3=${BATCH_3:-64}
CACHE=${CACHE:-1} LATENTS=${LATENTS:-$DATA-latents} VAE=${VAE:-ema} IMAGE_SIZE=${IMAGE_SIZE:-256} FLIPS=${FLIPS:-1}
[[ ! -f $DATA/latents.json ]] || CACHE=0 # DATA is a cache already
LR_DECAY=${LR_DECAY:-0} ONE_RUN=${ONE_RUN:-0}
command -v nvidia-smi >/dev/null && ON_GPU=1 || ON_GPU=0
COMPILE=${COMPILE:-$ON_GPU} # it gains nothing on a CPU and can't train an energy
# When a signal stops the run, torchrun kills slow ranks. They need time for a step and two saves, one already under way
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-100}
[[ -n ${PYTHONWARNINGS:-} ]] || export PYTHONWARNINGS=ignore:resource_tracker:UserWarning # printed after a kill

# The variables and flags that only this script can check
counts GPUS FRAMES_1 FRAMES_2 FRAMES_3 STEPS_1 STEPS_2 STEPS_3 BATCH_1 BATCH_2 BATCH_3
must "not a share; expected a number from 0 to 1" '0?\.[0-9]+|0|1(\.0*)?' LR_DECAY ${FORCING:+FORCING}
check_exp
must "unknown model; expected one such as EqM-S/4" 'EqM-[A-Za-z]+/[0-9]+' MODEL
must "not a switch; expected 0 or 1" '[01]' CACHE FLIPS COMPILE ONE_RUN
STEPS_0=0
for phase in 1 2 3; do
  steps=STEPS_$phase earlier=STEPS_$((phase - 1)) batch=BATCH_$phase
  [[ $((${!batch} % GPUS)) == 0 ]] || complain "$batch=${!batch}: not a multiple of GPUS=$GPUS; change one of them"
  [[ ${!steps} -gt ${!earlier} ]] ||
    complain "$steps=${!steps}: not above $earlier=${!earlier}; steps count over all phases, so they must increase"
done
if [[ $ONE_RUN == 0 && ($FRAMES_1 == "$FRAMES_2" || $FRAMES_2 == "$FRAMES_3" || $FRAMES_3 == "$FRAMES_1") ]]; then
  complain "FRAMES_1=$FRAMES_1 FRAMES_2=$FRAMES_2 FRAMES_3=$FRAMES_3: two phases are the same;" \
    "expected three different numbers, or ONE_RUN=1"
fi
replace() { # FLAG: set INSTEAD to the variables that set this flag of train.py
  INSTEAD=
  case $1 in
    --num-frames | --frames-schedule) INSTEAD="FRAMES_1, FRAMES_2 and FRAMES_3" ;;
    --max-steps | --epochs) INSTEAD="STEPS_1, STEPS_2 and STEPS_3" ;;
    --global-batch-size) INSTEAD="BATCH_1, BATCH_2 and BATCH_3" ;;
    --lr-decay) INSTEAD=LR_DECAY ;;
    --model) INSTEAD=MODEL ;;
    --inflate) INSTEAD=START ;;
    --data-path) INSTEAD=DATA ;;
    --results-dir) INSTEAD=EXP ;;
    --ckpt) [[ $ONE_RUN == 1 ]] || INSTEAD="ONE_RUN=1, as each phase has its own --ckpt" ;;
    --mix) [[ $ONE_RUN == 1 ]] || INSTEAD="ONE_RUN=1, as --mix needs all phases in one run" ;;
    --vae | --image-size) [[ $CACHE == 0 ]] || INSTEAD="VAE and IMAGE_SIZE for the cache, or CACHE=0 for none" ;;
  esac
}

for word in "$@"; do
  replace "${word%%=*}"
  [[ -z $INSTEAD ]] || complain "${word%%=*}: not a flag of this script; set $INSTEAD"
done
[[ -z ${EQM_ONLY_CHECK:-} ]] || exit 0 # quickstart.sh makes the data later
[[ -d $DATA ]] || complain "DATA=$(printf %q "$DATA"): no such folder; set DATA to the folder of your videos"

find_run() { # PHASE: set FOLDER to its newest run and SAVED to a checkpoint there; each is empty if there is none
  local frames=FRAMES_$1
  [[ $ONE_RUN == 1 ]] && frames=$FRAMES_1-$FRAMES_2-$FRAMES_3 || frames=${!frames}
  newest "results/$EXP"/[0-9]*-"${MODEL/\//-}-f$frames-rope"
  FOLDER=$FOUND
  newest "$FOLDER"/checkpoints/*.pt
  SAVED=$FOUND
  [[ -f $SAVED ]] || SAVED=
  [[ -d $FOLDER ]] || FOLDER=
}

BEGUN=0 # the last phase that has a checkpoint; the phases before it are done
for phase in 1 2 3; do
  find_run "$phase"
  [[ -z $SAVED ]] || BEGUN=$phase
done

# The paper has AdamW at 1e-4 without weight decay, uniform gamma and label dropout 0.1, the defaults of train.py. Our
# recipe adds clips of half the frame rate, so that longer clips can be sampled, and forcing, which completes given
# frames. Muon and gamma shifts of 2 and 3 did best with models of 1.3 M parameters (the same, E).
RECIPE=${RECIPE:-ours} SHARE=0.75
case $RECIPE in
  ours) FLAGS=(--frame-interval 1 2) ;;
  small)
    FLAGS=(--frame-interval 1 2 --optimizer muon --gamma-shift 3)
    FLAGS+=(--sampler ngd --num-sampling-steps 24 --stepsize 0.0217 --cfg-scale 1.5)
    ;;
  published) FLAGS=(--cfg-scale 4) SHARE=0 ;;
  *) complain "RECIPE=$(printf %q "$RECIPE"): unknown recipe; expected ours, small or published" ;;
esac
if [[ $BEGUN != 0 ]]; then # a checkpoint keeps its positions and its forcing
  SHARE=$(grep -ohs '"forcing": [0-9.e-]*' "results/$EXP"/*/config.json | tail -n 1) || SHARE=0 # older than the flag
  [[ -z $START ]] || grep -qs '"inflate": "' "results/$EXP"/*/config.json ||
    complain "START=$(printf %q "$START"): results/$EXP did not start from an image model; set EXP, or unset START"
elif [[ -z $START ]]; then # the positions that did best in results/studies/positions/README.md; an image model keeps its own
  FLAGS+=(--position-table space --rope-speed 0.5)
fi
FLAGS+=(--forcing "${FORCING:-${SHARE##* }}" --lr-decay "$LR_DECAY")
[[ $COMPILE == 1 && " $* " != *" --ebm"[\ =]* ]] && FLAGS+=(--compile)
INFLATE=() # only for phase 1
[[ -z $START ]] || INFLATE=(--inflate="$START" --new-classes)
TRAIN=(EqM/train.py --video --use-rope --model="$MODEL" --results-dir="results/$EXP" "${FLAGS[@]}")

run() { # ADVICE COMMAND: pass a signal to this script on to the command, which saves and ends first
  local status=0 signalled=0 child=
  trap 'signalled=143; ${child:+kill -TERM "$child"}' TERM USR1
  trap 'signalled=130' INT # a terminal sends it to the command as well
  (trap - INT && exec "${@:2}") & # bash ignores SIGINT in the background
  child=$!
  [[ $signalled != 143 ]] || kill -TERM "$child"
  while kill -0 "$child"; do sleep 0.2 || true; done 2>/dev/null # SIGINT during `wait` can lose the child's status
  wait "$child" 2>/dev/null || status=$? # without the report of bash on a kill
  trap - TERM INT USR1
  if [[ $signalled != 0 ]]; then
    # Otherwise the command's last line says it
    [[ $status =~ ^(0|130)$ ]] || echo "$SCRIPT: interrupted; to continue, $EQM_ADVICE"
    exit "$signalled"
  fi
  if [[ $status == 137 ]]; then
    echo "$SCRIPT: error: killed (often out of memory): $1; the same command continues" >&2
  fi
  return "$status"
}

activate
processes
SCHEDULE=$FRAMES_1:$STEPS_1:$BATCH_1,$FRAMES_2:$STEPS_2:$BATCH_2,$FRAMES_3:$STEPS_3:$BATCH_3
CACHED=()
[[ $CACHE == 0 ]] || CACHED=(--vae="$VAE" --image-size="$IMAGE_SIZE")
# Find the mistakes of all phases before the cache, which may take hours, and before phase 1. One run without a cache
# checks itself
if [[ $BEGUN == 0 && ($CACHE == 1 || $ONE_RUN == 0) ]]; then
  ERRORS=$(mktemp) status=0
  EQM_ERROR_FILE=$ERRORS WORLD_SIZE=$GPUS python "${TRAIN[@]}" --data-path="$DATA" --frames-schedule="$SCHEDULE" \
    "${CACHED[@]}" "${INFLATE[@]}" "$@" --dry-run >/dev/null || status=$?
  LINE=$(<"$ERRORS")
  rm "$ERRORS"
  read -ra words <<<"$LINE"
  for word in "${words[@]}"; do # name the variables of flags that the user did not give
    replace "${word%:}"
    [[ -z $INSTEAD || " $*" == *" ${word%:}"* ]] || LINE+="; to change ${word%:}, set $INSTEAD"
  done
  [[ -z $LINE ]] || printf '%s\n' "$LINE" >&2
  [[ $status == 0 ]] || exit "$status"
fi
if [[ $CACHE == 1 ]]; then
  [[ $FLIPS == 1 ]] && CACHED+=(--with-flips)
  [[ " $*" =~ .*\ --max-bad-fraction[=\ ]([^ ]+) ]] && CACHED+=(--max-bad-fraction="${BASH_REMATCH[1]}")
  run "free some memory" "${RUN[@]}" EqM/cache_latents.py --data-path="$DATA" --out="$LATENTS" "${CACHED[@]}"
  DATA=$LATENTS
fi

train() { # PHASE STEPS FLAGS: train a phase of so many steps
  local every=$(($2 > 20 ? $2 / 20 : 1))
  find_run "$1"
  run "lower BATCH_n or --num-workers" "${RUN[@]}" "${TRAIN[@]}" --data-path="$DATA" ${FOLDER:+--resume} \
    --val-every="$every" --sample-every="$every" "${@:3}"
}

if [[ $ONE_RUN == 1 ]]; then
  train 1 $((STEPS_3 / 3)) --frames-schedule="$SCHEDULE" "${INFLATE[@]}" "$@"
else
  DECAY_END=()
  [[ ! $LR_DECAY =~ [1-9] ]] || DECAY_END=(--lr-decay-end="$STEPS_3")
  [[ $BEGUN -lt 2 ]] || echo "$SCRIPT: phase $BEGUN has checkpoints, so the phases before it are done"
  for ((phase = BEGUN > 1 ? BEGUN : 1; phase <= 3; phase++)); do
    frames=FRAMES_$phase steps=STEPS_$phase batch=BATCH_$phase before=STEPS_$((phase - 1)) CKPT=
    if [[ $phase != 1 ]]; then
      find_run $((phase - 1))
      CKPT=$FOLDER/checkpoints/$(printf %07d "${!before}").pt
      if [[ ! -f $CKPT ]]; then # it may be deleted once the next phase has begun
        find_run "$phase"
        [[ -n $SAVED ]] || complain "$CKPT: not found; set $before to the step at which phase $((phase - 1)) ended"
        CKPT=$SAVED # if all checkpoints of the phase are damaged, train.py says so, and does not start from scratch
      fi
    fi
    [[ $phase == 1 ]] || INFLATE=()
    train "$phase" $((${!steps} - ${!before})) --num-frames="${!frames}" --global-batch-size="${!batch}" \
      --max-steps="${!steps}" "${DECAY_END[@]}" ${CKPT:+--ckpt="$CKPT"} "${INFLATE[@]}" "$@"
  done
fi
echo "$SCRIPT: done; sample the model with: EXP=$(printf %q "$EXP") bash scripts/sample.sh"
