#!/usr/bin/env bash
# Everything that has to hold before a change lands: style and tests. More words go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/python -m pytest "$@"
