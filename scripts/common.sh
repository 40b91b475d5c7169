# Functions that the scripts share. A script sources this file from the repository's root, with its own arguments.

case $0 in
  *common.sh)
    echo "common.sh: error: this is a library; run one of the other scripts" >&2
    exit 2
    ;;
esac

SCRIPT=${SCRIPT:-$(basename "$0")} # Slurm runs a copy with another name
export EQM_ADVICE="run the same command again" # what a stopped training tells the user

complain() { # MESSAGE: print a mistake of the user, and exit
  printf '%s: error: %s\n' "$SCRIPT" "$*" >&2
  exit 2
}

for word in "$@"; do # --help prints the comment at the top of the script, and does nothing else
  if [[ $word == --help || $word == -h ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "${HELP:-scripts/$SCRIPT}"
    exit
  fi
done

flags_only() { # ARGUMENTS: the first one must be a flag
  if [[ $# != 0 && $1 != -* ]]; then complain "$(printf %q "$1"): unexpected argument; expected flags, see --help"; fi
}

no_words() { # ARGUMENTS: there must be none
  if [[ $# != 0 ]]; then complain "$(printf %q "$1"): unexpected argument; expected none, see --help for variables"; fi
}

nearly() { # "KNOWN NAMES" NAMES...: none of NAMES, which look like known ones, may be set
  local name
  for name in "${@:2}"; do
    [[ -z ${!name:-} ]] || complain "$name: unknown variable; expected $1; unset it, or give a flag, see --help"
  done
}

must() { # "WHAT IS WRONG" PATTERN NAMES of variables: each must match the pattern
  local name
  for name in "${@:3}"; do
    [[ ${!name} =~ ^($2)$ ]] || complain "$name=$(printf %q "${!name}"): $1"
  done
}

counts() { # NAMES of variables: each must be a whole number of at least 1; removes leading zeros
  local name
  must "not a count; expected a whole number of at least 1" '0*[1-9][0-9]{0,9}' "$@"
  for name in "$@"; do printf -v "$name" %d "$((10#${!name}))"; done
}

check_exp() { # EXP is a path relative to results/ and samples/; studies lead out of them with ..
  [[ $EXP != /* ]] || complain "EXP=$(printf %q "$EXP"): not inside results/; expected a name without a leading /"
}

check_seed() { must "not a seed; expected a whole number of at least 0" "[0-9]{1,9}" SEED; }

check_gpus() { # GPUS must be a number of processes that this machine has GPUs for; without a GPU, any
  counts GPUS
  local found
  found=$(nvidia-smi -L 2>/dev/null | awk '/^GPU / { count++ } END { print count + 0 }') || found=0
  if [[ $found != 0 && $GPUS -gt $found ]]; then complain "GPUS=$GPUS: this machine has $found; set GPUS=$found"; fi
}

activate() { # use the environment that setup.sh makes, or the active one
  if [[ -d .venv ]]; then source .venv/bin/activate; fi
  command -v torchrun >/dev/null ||
    complain "no torch found: run 'bash scripts/setup.sh' first, or activate your own environment"
}

suit() { # set GPUS and PRECISION to what suits this machine, unless they are set, and MIXED to the flag
  local gpus=1 precision= # train.py knows the best precision of a GPU
  if ! command -v nvidia-smi >/dev/null; then
    gpus=2 # on a CPU, two processes of one thread are faster than one of two
    precision=fp32
    if grep -qs avx512 /proc/cpuinfo; then precision=bf16; fi # on other CPUs, bf16 takes ten times as long
    # Have glibc keep the memory of a step for the next one: returning it and asking again takes time
    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000
  fi
  GPUS=${GPUS:-$gpus} PRECISION=${PRECISION:-$precision}
  MIXED=(${PRECISION:+--precision="$PRECISION"})
}

processes() { # set RUN to the command that starts a Python script in GPUS processes
  check_gpus
  RUN=(python)
  if [[ $GPUS != 1 ]]; then
    RUN=(torchrun --standalone --nproc_per_node="$GPUS")
    EQM_ERROR_FILE=$(mktemp) # errors go there, so that they come after torchrun's own report
    export EQM_ERROR_FILE
    trap 'cat "$EQM_ERROR_FILE" >&2; rm -f "$EQM_ERROR_FILE"' EXIT
  fi
}

newest() { # set FOUND to the last of these paths, RESUME to --resume if it exists
  FOUND=${*: -1}
  [[ -e $FOUND ]] && RESUME=(--resume) || RESUME=()
}

# What weizmann.sh and sprites.sh share: HOURS of training, a small VAE, files that are made only once

check_hours() { # HOURS must be a number; default: 2
  HOURS=${HOURS:-2}
  must "not a number; expected one such as 0.5" '[0-9]*\.?[0-9]+' HOURS
}

begin() { # NAMES of variables that determine the results, besides HOURS: refuse to continue results/$EXP with other
  # values; set up the environment, SETTINGS, GPUS, MIXED and RUN
  check_exp
  local name
  SETTINGS="HOURS=$HOURS"
  for name in "$@"; do
    if [[ -n ${!name} ]]; then SETTINGS+=" $name=$(printf %q "${!name}")"; fi
  done
  if [[ -f results/$EXP/settings && $(<"results/$EXP/settings") != "$SETTINGS" ]]; then
    complain "EXP=$EXP: made with $(<"results/$EXP/settings"), got $SETTINGS; set another EXP"
  fi
  suit
  processes
  bash scripts/setup.sh
  activate
}

steps() { # PER_HOUR: the steps of HOURS, at least 3
  awk -v hours="$HOURS" -v each="$1" 'BEGIN { steps = int(hours * each); print steps < 3 ? 3 : steps }'
}

train_vae() { # FLAGS: train a small VAE on 64 x 64 px frames of DATA, to 16 x 16 latents; set VAE to its folder
  newest "results/$EXP"/*-VAE-64px-f4-*
  "${RUN[@]}" EqM/train_vae.py --data-path="$DATA" --image-size 64 --downsample 4 --max-steps="$VAE_STEPS" \
    --global-batch-size 16 --results-dir="results/$EXP" --num-workers 0 --cache-frames "${RESUME[@]}" "${MIXED[@]}" "$@"
  newest "results/$EXP"/*-VAE-64px-f4-*/vae
  VAE=$FOUND
}

complete() { [[ -f $1/ucfTrainTestlist/trainlist01.txt ]]; } # DIR: a data set with all its videos; the list comes last

there() { [[ $1 -nt $BEST ]]; } # FILE: it was made from the model BEST

sample() { # FOLDER FLAGS of sample_gd.py: sample the model BEST, unless that is done; samples.json is written last
  there "$1/samples.json" || "${RUN[@]}" EqM/sample_gd.py --video --ckpt="$BEST" --folder="$1" "${MIXED[@]}" "${@:2}"
}

score() { # FILE FLAGS of evaluate.py: write FILE, unless that is done
  there "$1" || "${RUN[@]}" EqM/evaluate.py --data-path="$DATA" --num-workers "${READERS:-0}" --out="$1" "${@:2}"
}

find_model() { # set CKPT to the newest model of results/$EXP, or to that folder if it is an export
  check_exp
  local file folder known=
  for file in "results/$EXP"/*/checkpoints/best.pt "results/$EXP/model.safetensors"; do
    if [[ -f $file && (-z $CKPT || $file -nt $CKPT) ]]; then CKPT=$file; fi
  done
  CKPT=${CKPT%/model.safetensors}
  if [[ -z $CKPT ]]; then
    for folder in results/*/; do
      for file in "$folder"*/checkpoints/best.pt "${folder}model.safetensors"; do
        if [[ -f $file ]]; then known+=" $(printf %q "$(basename "$folder")")" && break; fi
      done
    done
    complain "EXP=$(printf %q "$EXP"): no model in results/; expected one of:${known:- (none yet)}; or set CKPT"
  fi
}
