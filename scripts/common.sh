# What the scripts share; they source it from the repository's root with their own arguments.

SCRIPT=${SCRIPT:-$(basename "$0")} # Slurm runs a copy of another name

complain() { # MESSAGE: what the user can put right
  printf '%s: error: %s\n' "$SCRIPT" "$*" >&2
  exit 2
}

for word in "$@"; do # --help: the comment at the head of the script, and nothing else is done
  if [[ $word == --help || $word == -h ]]; then
    awk 'NR > 1 { if (!/^#/) exit; if (!/^#SBATCH/) { sub(/^# ?/, ""); print } }' "${HELP:-scripts/$SCRIPT}"
    exit
  fi
done

flags_only() { # ARGUMENTS that are passed on: flags, not words
  if [[ $# != 0 && $1 != -* ]]; then complain "$(printf %q "$1"): unexpected argument; expected flags, see --help"; fi
}

no_words() { # ARGUMENTS of a script that takes none
  if [[ $# != 0 ]]; then complain "$(printf %q "$1"): unexpected argument; expected none, see --help for its variables"; fi
}

nearly() { # KNOWN NAMES...: complains of a variable that is set and that is nearly one of the KNOWN ones
  local name
  for name in "${@:2}"; do
    [[ -z ${!name:-} ]] || complain "$name: unknown variable; expected $1 (unset it); all else is a flag, see --help"
  done
}

activate() { # the environment of setup.sh, or one that the user has activated
  if [[ -d .venv ]]; then source .venv/bin/activate; fi
  command -v torchrun >/dev/null || complain "no torch here: run scripts/setup.sh first"
}

suit() { # sets RANKS and SUITED to the number of processes and the precision that suit the machine
  RANKS=1 SUITED= # what the GPU is best at
  if ! command -v nvidia-smi >/dev/null; then
    RANKS=2 SUITED=bf16 # on the CPU two of one thread are faster than one of two
    # glibc keeps the memory of a step for the next one, instead of giving it back and asking again
    export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000
  fi
}

processes() { # N: sets RUN to what starts a Python script in N processes
  RUN=(python)
  if [[ $1 != 1 ]]; then
    RUN=(torchrun --standalone --nproc_per_node="$1")
    EQM_ERROR_FILE=$(mktemp) # what is wrong goes there, to be shown after torchrun's own report
    export EQM_ERROR_FILE
    trap 'cat "$EQM_ERROR_FILE" >&2; rm -f "$EQM_ERROR_FILE"' EXIT
  fi
}
