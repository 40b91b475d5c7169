#!/usr/bin/env bash
# From a fresh clone to videos: environment, data, three RoPE phases (4, 8, 16 frames), samples of 16, 7 and
# 24 frames, and their scores by a motion tracker. 8 to 14 minutes on 2 CPU cores. Run again, it continues from its last
# checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."
BEGAN=$SECONDS

export EXP=${EXP:-quickstart}
export DATA=${DATA:-datasets/moving-shapes}
if command -v nvidia-smi >/dev/null; then
  RANKS=1 PRECISION=${PRECISION:-} # what the GPU is best at
else
  RANKS=2 PRECISION=${PRECISION:-bf16} # on the CPU two of one thread are faster than one of two
fi
export GPUS=${GPUS:-$RANKS} MODEL=${MODEL:-EqM-Ti/2}
export STEPS_1=${STEPS_1:-1400} STEPS_2=${STEPS_2:-2700} STEPS_3=${STEPS_3:-3900} # global; as much compute in each phase
export BATCH_1=${BATCH_1:-32} BATCH_2=${BATCH_2:-16} BATCH_3=${BATCH_3:-8}      # 2,048 tokens a step
export LR_DECAY=${LR_DECAY:-0.4} RECIPE=small COMPILE=0 # which takes longer than it saves here
export CACHE=0 # pixels need no encoding
VIDEOS=${VIDEOS:-60} # per class
SAMPLES=${SAMPLES:-48} SAMPLING_STEPS=${SAMPLING_STEPS:-60} FRAMES=${FRAMES:-16 7 24}
WORKERS=${WORKERS:-1}

bash scripts/setup.sh
.venv/bin/python datasets/make_moving_shapes.py --out="$DATA" --videos-per-class="$VIDEOS" --seconds 1.4

bash scripts/train_progressive.sh \
  --depth 4 --hidden-size 128 --num-heads 4 --rope-theta 100 \
  --temporal-patch-size 4 --image-size 16 --vae none --no-flip \
  --num-workers="$WORKERS" ${PRECISION:+--precision="$PRECISION"} \
  --lr 2e-3 --warmup-steps 20 --ema-decay 0.99 \
  --log-every 50 --val-every 1000 --sample-every 0

OUT=samples/$EXP CKPT= FRAMES=$FRAMES SAMPLES=$SAMPLES bash scripts/sample.sh \
  ${PRECISION:+--precision="$PRECISION"} --sampler ngd --num-sampling-steps="$SAMPLING_STEPS" --stepsize 0.008 --cfg-scale 1.5 \
  --batch-size 8 # 48 samples: 3 batches for each of two ranks

for frames in $FRAMES; do
  .venv/bin/python EqM/evaluate.py --metric motion --samples="samples/$EXP-f$frames" --data-path="$DATA" \
    --out="samples/$EXP-f$frames/motion.json"
done
echo "$((SECONDS - BEGAN)) s; see samples/$EXP-f16/sheet.png and the GIFs beside it"
