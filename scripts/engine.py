"""Puts EqM/ and datasets/ on the path of scripts; import errors take one line."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the repository
sys.path.insert(0, str(ROOT / "EqM"))
sys.path.append(str(ROOT / "datasets"))

import uncaught  # noqa: E402, F401


def refuse_to_run(name, instead):
    """End with one line and status 2 if Python runs a library as a script.

    name: the library's __name__.
    """
    if name == "__main__":
        script = os.path.basename(sys.argv[0])
        print(f"{script}: error: this is a library; run {instead} instead", file=sys.stderr)
        sys.exit(2)


refuse_to_run(__name__, "another script in scripts/")
