#!/usr/bin/env bash
# Style checks and tests, on all cores. Arguments are passed to pytest. Kills and damaged files: scripts/faults.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
