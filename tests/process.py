"""Commands in their own processes."""

import os
import signal
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

from runtime import distributed

ENGINE = Path(distributed.__file__).parents[1]


def spawn(*words, environment=(), **settings):
    """Start a command as a process of one thread, in its own session like a job of a shell.

    Its errors go where its output goes, into a pipe. Settings of subprocess.Popen change that.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | dict(environment)
    return subprocess.Popen([str(word) for word in words], env=environment, **pipes | settings)


def python(code, **environment):
    """Start Python code as a script named train.py."""
    code = f"import sys; sys.argv[0] = '/some/where/train.py'\n{code}"
    environment = {"PYTHONPATH": str(ENGINE)} | environment
    return spawn(sys.executable, "-c", code, environment=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


def write_commands(folder, commands):
    """Write {name: its code in bash} as commands into a folder."""
    for name, code in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run_ranks(code, count, folder):
    """Run Python code on so many ranks. Returns what each rank wrote to its file OUT."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    files = [folder / f"{count}-{rank}.pt" for rank in range(count)]
    ranks = [python(code, RANK=str(k), LOCAL_RANK=str(k), OUT=str(file), **place) for k, file in enumerate(files)]
    for process in ranks:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    return [torch.load(file, weights_only=True) for file in files]
