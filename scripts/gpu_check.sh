#!/usr/bin/env bash
# Check that this machine computes the same as a CPU and that every way of training works, and measure its speed. This
# runs tests/gpu_checks.py, which takes 10 minutes on one large GPU, and writes results/gpu.md. If a check fails, a line
# names it and the status is 1.
#
#   bash scripts/gpu_check.sh             use all GPUs of this machine
#   bash scripts/gpu_check.sh GPUS        use this many
#   bash scripts/gpu_check.sh --out FILE  write another file
#
# Without a GPU it runs tiny sizes in 2 processes, for 2 minutes. This shows only that the script works, and writes a
# file only with --out. Paths are relative to the repository. It has no variables.
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
bash scripts/setup.sh dev
.venv/bin/python scripts/gpu_check.py "$@"
