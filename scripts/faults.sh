#!/usr/bin/env bash
# Kill a run of two ranks N times (20) with SIGKILL, stop it half as often with SIGTERM, at random moments, and compare
# its end with that of an undisturbed run. 10 minutes on 2 CPU cores; the table goes to results/faults.md.
#
#   bash scripts/faults.sh [N]
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -d .venv ]] && source .venv/bin/activate

HITS=${1:-20}
python tests/faults/faults.py --kills "$HITS" --stops "$((HITS / 2))" --out results/faults.md
