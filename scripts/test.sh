#!/usr/bin/env bash
# Style checks and tests, on all cores. Kills and damaged files: scripts/faults.sh.
#
#   bash scripts/test.sh [words and flags of pytest, such as tests/test_rope.py or -k name]
#
# It has no variables.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/common.sh
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
