#!/usr/bin/env bash
# Check the style and run the tests, on up to 8 cores. scripts/faults.sh tests kills and damaged files.
#
#   bash scripts/test.sh [arguments of pytest, such as tests/test_rope.py or -k name]
[ -n "${BASH_VERSION:-}" ] || { echo "${0##*/}: error: needs bash; run: bash $0" >&2; exit 2; }
CDPATH= cd "$(dirname "$0")/.." && source scripts/common.sh || exit
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile "$@"
