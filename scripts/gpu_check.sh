#!/usr/bin/env bash
# Does this machine compute what a CPU computes, does training work on it in every way, and how fast is it? Runs
# tests/gpu_checks.py, 10 minutes on one large GPU; writes results/gpu.md, and ends with status 1 and a line that names what
# failed, if anything did.
#
#   bash scripts/gpu_check.sh             all GPUs of this machine
#   bash scripts/gpu_check.sh GPUS        so many of them
#   bash scripts/gpu_check.sh --out FILE  write elsewhere
#
# Without a GPU the same is done at tiny sizes, with 2 processes, in 2 minutes: this shows that the script works, no more.
# Nothing is written then, unless --out is given. Paths are relative to the repository. It has no variables.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
bash scripts/setup.sh dev
.venv/bin/python scripts/gpu_check.py "$@"
