"""Python code in a process of its own, as a script named train.py would run it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from runtime import distributed

ENGINE = Path(distributed.__file__).parents[1]


def python(code, **environment):
    command = [sys.executable, "-c", f"import sys; sys.argv[0] = '/some/where/train.py'\n{code}"]
    environment = os.environ | {"PYTHONPATH": str(ENGINE), "OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
    )


def run_ranks(code, count, folder):
    """What the ranks have written to their file OUT."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    files = [folder / f"{count}-{rank}.pt" for rank in range(count)]
    ranks = [
        python(code, RANK=str(rank), LOCAL_RANK=str(rank), OUT=str(file), **place) for rank, file in enumerate(files)
    ]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return [torch.load(file, weights_only=True) for file in files]
