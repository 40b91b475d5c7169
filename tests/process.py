"""Python code in a process of its own, as a script named train.py would run it."""

import os
import subprocess
import sys
from pathlib import Path

from runtime import distributed

ENGINE = Path(distributed.__file__).parents[1]


def python(code, **environment):
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = '/some/where/train.py'\n{code}"]
    environment = os.environ | {"PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )
