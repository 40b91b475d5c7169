#!/usr/bin/env bash
# Kill runs, stop them, and feed them damaged files.
#
#   bash scripts/faults.sh             run the tests in tests/faults
#   bash scripts/faults.sh N [FLAGS of train.py]   kill a run of two ranks N times with SIGKILL, stop it half as often with
#       SIGTERM, at random moments, and compare it with an undisturbed run. Writes results/faults.md (or faults-FLAGS.md)
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/common.sh || exit
[[ ${1:-1} =~ ^[1-9][0-9]*$ ]] || complain "$(printf %q "$1"): not a number; expected a number first, or nothing"
bash scripts/setup.sh dev
[[ $# != 0 ]] || exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal tests/faults
OUT="results/faults$(printf %s "${@:2}" | sed 's/--/-/g; s/\//-/g').md"
export PYTHONPATH=EqM:datasets:scripts:tests
.venv/bin/python tests/faults/faults.py --kills "$1" --stops "$(($1 / 2))" --out "$OUT" -- "${@:2}"
