"""One line, no traceback, if Ctrl+C or a missing package ends a script while it imports.

Scripts import this module before all packages; it needs the standard library only. EQM_TRACEBACK=1
shows the traceback.
"""

import multiprocessing
import os
import sys

LINES = {
    KeyboardInterrupt: "stopped by SIGINT: run the same command again",
    ModuleNotFoundError: "{}: run 'bash scripts/setup.sh', then 'source .venv/bin/activate'",
}


def _report(kind, error, trace):
    if kind not in LINES or os.environ.get("EQM_TRACEBACK") == "1":
        sys.__excepthook__(kind, error, trace)
    elif multiprocessing.parent_process() is None and os.environ.get("RANK", "0") == "0":
        print(
            f"{os.path.basename(sys.argv[0])}: error: {LINES[kind].format(error)}", file=sys.stderr
        )


sys.excepthook = _report
