# What quickstart.sh, sprites.sh, weizmann.sh, few.sh and world.sh share: they train, sample and score a model on any machine.
source scripts/common.sh
trap 'exit 130' INT # a training that Ctrl-C stopped has saved, and must not be sampled

suit() { # set GPUS and PRECISION to what suits this machine, unless they are set, and MIXED to the flag
  local gpus=1 best= # train.py knows the best precision of a GPU
  if ! command -v nvidia-smi >/dev/null; then
    gpus=2 # on a CPU, two processes of one thread are faster than one of two
    # On other CPUs, bf16 is slower than fp32; -z: all as one line
    grep -qszE "amx_bf16|AuthenticAMD.*avx512_bf16" /proc/cpuinfo && best=bf16 || best=fp32
  fi
  GPUS=${GPUS:-$gpus} PRECISION=${PRECISION:-$best}
  counts GPUS
  MIXED=(${PRECISION:+--precision="$PRECISION"})
}

steps() { # NAME=PER_HOUR...: set the variable NAME to the steps of HOURS, at least 3
  must "not a number; expected one such as 0.5" '[0-9]*\.?[0-9]+' HOURS
  for each in "$@"; do
    printf -v "${each%=*}" %d "$(awk "BEGIN { steps = int($HOURS * ${each#*=}); print steps < 3 ? 3 : steps }")"
  done
}

begin() { # NAMES of variables that determine the results: refuse to continue results/$EXP with others; set up the rest
  SETTINGS=$(for name in "$@"; do [[ -z ${!name} ]] || printf ' %s=%q' "$name" "${!name}"; done)
  SETTINGS=${SETTINGS# }
  if [[ -f results/$EXP/settings && $(<"results/$EXP/settings") != "$SETTINGS" ]]; then
    complain "EXP=$EXP: made with $(<"results/$EXP/settings"), got $SETTINGS; set another EXP"
  fi
  suit
  bash scripts/setup.sh
  activate
}

train_vae() { # FLAGS: train a small VAE on 64 x 64 px frames of DATA, to 16 x 16 latents; set VAE to its folder
  "${RUN[@]}" EqM/train_vae.py --data-path="$DATA" --image-size 64 --downsample 4 --max-steps="$VAE_STEPS" --resume \
    --global-batch-size 16 --results-dir="results/$EXP" --num-workers 0 --cache-frames "${MIXED[@]}" "$@"
  VAE=$(printf '%s\n' "results/$EXP"/*-VAE-64px-f4-*/vae | tail -n 1)
}

train() { # FLAGS: train a model, or continue; set BEST to its best.pt
  "${RUN[@]}" EqM/train.py --video --results-dir="results/$EXP" --resume "${MIXED[@]}" "$@"
  BEST=$(printf '%s\n' "results/$EXP"/*-EqM-*/checkpoints/best.pt | tail -n 1)
}

complete() { [[ -f $1/ucfTrainTestlist/trainlist01.txt ]]; } # DIR: a data set with all its videos; the list comes last
there() { [[ $1 -nt $BEST ]]; }                              # FILE: it was made from the model BEST

sample() { # FOLDER FLAGS of sample_gd.py: sample the model BEST, unless that is done; samples.json is written last
  there "$1/samples.json" || "${RUN[@]}" EqM/sample_gd.py --video --ckpt="$BEST" --folder="$1" "${MIXED[@]}" "${@:2}"
}

score() { # FILE FLAGS of evaluate.py: write FILE, unless that is done
  there "$1" || "${RUN[@]}" EqM/evaluate.py --data-path="$DATA" --num-workers "${READERS:-0}" --out="$1" "${@:2}"
}
