"""Commands in their own processes: their start, their end, and the processes that they start
themselves.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from runtime import distributed

ENGINE = Path(distributed.__file__).parents[1]
# for shell scripts, which also work if the environment of the tests is neither active nor in .venv
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
GONE_WITHIN = 45  # seconds; torchrun gives ranks 30 s to end


def spawn(*words, environment=(), **settings):
    """Start a command as a process of one thread, in its own session like a job of a shell.

    Its errors go where its output goes, into a pipe. Settings of subprocess.Popen change that.
    """
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | settings
    one_thread = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [str(word) for word in words],
        env=os.environ | one_thread | dict(environment),
        start_new_session=True,
        preexec_fn=obey_interrupts,
        **settings,
    )


def obey_interrupts():
    """Undo that background jobs ignore SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def python(code, **environment):
    """Start Python code as a script named train.py."""
    code = f"import sys; sys.argv[0] = '/some/where/train.py'\n{code}"
    return spawn(sys.executable, "-c", code, environment={"PYTHONPATH": str(ENGINE)} | environment)


def write_commands(folder, commands):
    """Write {name: its code in bash} as commands into a folder."""
    for name, code in commands.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{code}\n")
        (folder / name).chmod(0o755)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def fork(function, *arguments):
    """Start a call in a fork of this process. Returns the process."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def run_ranks(function, count=2, status=0):
    """Call a function on so many ranks, forks of this process: the import of torch takes longest.

    The first must end with this status; with 0, all must. Returns what the calls returned and what
    they printed.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/output", "a+") as output:
        files = [Path(folder, f"{rank}.pt") for rank in range(count)]
        processes = []
        for rank, file in enumerate(files):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(fork(run_rank, function, environment, output, file))
        for process in processes:
            process.join(600)
            if process.exitcode:
                break  # the others may wait for it
        for process in processes:
            process.kill()
            process.join()
        output.seek(0)
        printed = output.read()
        checked = processes[:1] if status else processes
        assert all(process.exitcode == status for process in checked), printed
        return [torch.load(file) for file in files if file.exists()], printed


def run_rank(function, environment, output, file):
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(output.fileno(), number)
    sys.stdout = output
    sys.stderr = output
    torch.save(function(), file)


# The end of a process -----------------------------------------------------------------------------


def wait_until(condition, process):
    """Wait until a condition holds, which must be within 10 minutes and before the process ends."""
    until = time.monotonic() + 600
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            kill_all(process)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


def end(process, status=0, timeout=GONE_WITHIN):
    """What a process that ends with this status has printed. None: any status but 0."""
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        kill_all(process)
    is_expected = process.returncode != 0 if status is None else process.returncode == status
    assert is_expected, output
    return output


def table():
    """{pid: parent's pid} of all processes that live (a zombie does not)."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            _, _, status = (place / "stat").read_text().rpartition(")")
            state, parent, *_ = status.split()
            if state not in "ZX":
                parents[int(place.name)] = int(parent)
    return parents


def descendants(pid):
    """Children, their children and so on, in this order."""
    parents = table()
    family = [pid]
    for member in family:
        family += [child for child, parent in parents.items() if parent == member]
    return family[1:]


def ranks(launcher):
    """The processes that a torchrun has started, its ranks."""
    return [pid for pid, parent in table().items() if parent == launcher.pid]


def wait_gone(pids):
    """Wait until none of the processes lives."""
    until = time.monotonic() + GONE_WITHIN
    while alive := set(pids) & table().keys():
        assert time.monotonic() < until, f"{alive} still live after {GONE_WITHIN} s"
        time.sleep(0.05)


def kill(pid, number=signal.SIGKILL):
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_all(process):
    """SIGKILL for a process that still runs, and for all that it has started."""
    if process.poll() is None:
        for pid in [process.pid, *descendants(process.pid)]:
            kill(pid)
