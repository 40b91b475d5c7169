# What all scripts share. A script changes to the repository's root, then sources this file with its own arguments.
set -euo pipefail
SCRIPT=${EQM_SCRIPT:-$(basename "$0")}         # Slurm runs a copy with another name
export EQM_ADVICE="run the same command again" # what a stopped training tells the user

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then # print the comment at the top of the script, nothing else
  awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "${EQM_HELP:-scripts/$SCRIPT}"
  exit
fi

complain() { printf '%s: error: %s\n' "$SCRIPT" "$*" >&2; exit 2; } # MESSAGE about a mistake of the user
no_words() { [[ $# == 0 ]] || complain "$(printf %q "$1"): unexpected argument; expected none, see --help"; } # ARGUMENTS

must() { # "WHAT IS WRONG" PATTERN NAMES of variables: each must match the pattern
  local name
  for name in "${@:3}"; do
    [[ ${!name} =~ ^($2)$ ]] || complain "$name=$(printf %q "${!name}"): $1"
  done
}

seeds() { must "not a seed; expected a whole number of at least 0" '0|[1-9][0-9]{0,8}' "$@"; }              # NAMES of variables
counts() { must "not a count; expected a whole number of at least 1" '[1-9][0-9]{0,9}' "$@"; } # NAMES of variables

find_model() { # set CKPT to the newest best.pt of results/$EXP, or to that folder if it is an export
  local file
  for file in "results/$EXP"/*/checkpoints/best.pt "results/$EXP/model.safetensors"; do
    if [[ -f $file && (-z $CKPT || $file -nt $CKPT) ]]; then CKPT=$file; fi
  done
  CKPT=${CKPT%/model.safetensors}
  [[ -n $CKPT ]] || complain "EXP=$(printf %q "$EXP"): no model; set EXP to a folder of results/, or set CKPT." \
    "Folders: $(cd results 2>/dev/null && printf '%q ' */)"
}

shapes() { # make DATA if it is the default and missing, as quickstart.sh does
  [[ -d $DATA || $DATA != datasets/moving-shapes ]] || python datasets/make_moving_shapes.py --out="$DATA" --seconds 1.4
}

activate() { # use the environment of setup.sh or the active one; set RUN to what starts a script in GPUS processes
  counts GPUS
  if [[ -d .venv ]]; then source .venv/bin/activate; fi
  command -v torchrun >/dev/null || complain "no torch found: run 'bash scripts/setup.sh' first"
  RUN=(python)
  if [[ -n ${EQM_LAUNCH:-} ]]; then
    read -ra RUN <<<"$EQM_LAUNCH" # train_slurm.sh
  elif [[ $GPUS != 1 ]]; then
    RUN=(torchrun --standalone --nproc_per_node="$GPUS")
    EQM_ERROR_FILE=$(mktemp) && export EQM_ERROR_FILE # for errors, so that they come after torchrun's own report
    trap 'cat "$EQM_ERROR_FILE" >&2; rm -f "$EQM_ERROR_FILE"' EXIT
  fi
}
