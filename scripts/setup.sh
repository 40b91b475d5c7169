#!/usr/bin/env bash
# Make or update the environment in .venv. Running it again is quick and safe.
#
#   bash scripts/setup.sh          packages to run the code
#   bash scripts/setup.sh dev      also packages to test it
#
#   PYTHON=python3.12              another Python than python3 (3.11 or newer)
#   TORCH_INDEX=URL                install torch from another index. PyTorch's own index has small builds for CPUs, and
#                                  builds for each version of CUDA: see pytorch.org, "Get started"
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/common.sh || exit
[[ ${*:-dev} == dev ]] || complain "$(printf %q "$*"): unexpected argument; expected dev or nothing"
PYTHON=${PYTHON:-python3} TORCH_INDEX=${TORCH_INDEX:-} REQUIREMENTS=requirements${1:+-dev}.txt
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  complain "PYTHON=$(printf %q "$PYTHON"): missing or older than 3.11; set PYTHON to a newer one"
[[ -x .venv/bin/pip ]] || "$PYTHON" -m venv .venv
STAMP=.venv/installed-$REQUIREMENTS # says what is installed, so that a second run takes no time
NEEDED=$(cat requirements.txt "$REQUIREMENTS"; echo "$TORCH_INDEX")
if [[ $(cat "$STAMP" 2>/dev/null || true) != "$NEEDED" ]]; then
  if [[ -n $TORCH_INDEX ]]; then
    .venv/bin/pip install --quiet --index-url "$TORCH_INDEX" torch torchvision
  elif ! command -v nvidia-smi >/dev/null; then
    echo "setup.sh: no GPU found; pip may still pick a large build of torch: see TORCH_INDEX in --help"
  fi
  .venv/bin/pip install --quiet -r "$REQUIREMENTS"
  echo "$NEEDED" >"$STAMP"
fi
.venv/bin/python -c 'import torch
gpus = torch.cuda.device_count()
print("torch", torch.__version__, f"on {gpus} x {torch.cuda.get_device_name()}" if gpus else "without a GPU")'
