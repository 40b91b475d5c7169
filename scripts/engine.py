"""Puts EqM/ on the path of the scripts beside this module, and has it report errors of their imports in one line."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
sys.path.insert(0, str(ROOT / "EqM"))

import uncaught  # noqa: E402, F401
