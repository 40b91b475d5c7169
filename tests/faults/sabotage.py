"""Runs a script in which one thing goes wrong: python sabotage.py WHAT SCRIPT [FLAGS]."""

import os
import runpy
import signal
import sys

import torch


def killed_in_save(count=2):
    """SIGKILL when half of the count-th checkpoint is written."""
    save, saves = torch.save, []

    def half(state, file):
        saves.append(file.name)
        save(state, file)
        if len(saves) == count:
            file.flush()
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half


def nan_on_rank_1():
    """The second rank's loss is NaN from the third step on."""
    import transport

    loss, calls = transport.loss, []

    def spoiled(*arguments):
        calls.append(1)
        return loss(*arguments) * (float("nan") if len(calls) > 2 and os.environ.get("RANK") == "1" else 1)

    transport.loss = spoiled


if __name__ == "__main__":
    _, what, script, *_ = sys.argv
    del sys.argv[:2]
    sys.path.insert(0, os.path.dirname(script))
    globals()[what]()
    runpy.run_path(script, run_name="__main__")
