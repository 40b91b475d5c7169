#!/usr/bin/env bash
# Hit a run of two ranks N times (20) with SIGKILL, half as often with SIGTERM, at random moments, and compare what it
# ends with to a run that nothing has disturbed. 10 minutes on 2 CPU cores; the table goes to results/faults.md.
#
#   bash scripts/faults.sh [N]
set -euo pipefail
cd "$(dirname "$0")/.."
[[ -d .venv ]] && source .venv/bin/activate

HITS=${1:-20}
python tests/faults/faults.py --kills "$HITS" --stops "$((HITS / 2))" --out results/faults.md
