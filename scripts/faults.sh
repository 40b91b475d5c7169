#!/usr/bin/env bash
# Runs that are killed, stopped and fed with damaged files, for real.
#
#   bash scripts/faults.sh       the tests in tests/faults
#   bash scripts/faults.sh N [FLAGS]
#                                kill a run of two ranks N times with SIGKILL, stop it half as often with SIGTERM, at
#                                random moments, and compare its end with that of an undisturbed run: results/faults.md
#                                (or faults-FLAGS.md). FLAGS are more flags of train.py, such as --shard
#
# It has no variables.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
if [[ ! ${1:-1} =~ ^[1-9][0-9]*$ ]]; then complain "$*: expected nothing, or a number first, see --help"; fi
flags_only "${@:2}"
bash scripts/setup.sh dev
if [[ $# == 0 ]]; then
  .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal tests/faults
else
  out="results/faults$(printf %s "${@:2}" | sed 's/--/-/g; s/\//-/g').md"
  PYTHONPATH=EqM:tests .venv/bin/python tests/faults/faults.py --kills "$1" --stops "$(($1 / 2))" --out "$out" -- "${@:2}"
fi
