#!/usr/bin/env bash
# Check that this machine computes the same as a CPU and that every way of training works, and measure its speed. We expect
# this to take 10 minutes on one large GPU. It writes results/gpu.md. If a check fails, a line names it and the status is 1.
#
#   bash scripts/gpu_check.sh [GPUS] [--out FILE]      default: all GPUs of this machine
#
# Without a GPU it runs tiny sizes in 2 processes, for 2 minutes, and writes a file only with --out.
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/common.sh || exit
bash scripts/setup.sh dev
.venv/bin/python scripts/gpu_check.py "$@"
