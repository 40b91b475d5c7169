"""Training runs in the process of the test, for speed, with signals that come when they are told to."""

import os
import signal
import sys

import pytest

import train
from runtime import runs, signals

OFTEN = ["--log-every", 3, "--val-every", 2, "--ckpt-every", 4, "--sample-every", 5]
OFTEN += ["--num-samples", 1, "--num-sampling-steps", 3, "--keep-last", 2]


@pytest.fixture(autouse=True)
def usual_signals():
    """A training run takes over these signals; the tests want them back."""
    handlers = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_here(training, *flags, stop_after=None, stop_in=None):
    """The training run in this process, for speed; SIGTERM comes after so many steps, or in the first call of a
    function of train.py, of which only the first half is done then."""
    steps = []

    def step(run):
        train_step(run)
        steps.append(run.progress.step)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def looking(run, *arguments, **keywords):
        if keywords.get("stream") == "validation" or stop_in != "draw":
            os.kill(os.getpid(), signal.SIGTERM)
        return look(run, *arguments, **keywords)

    train_step = train.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, training.command_flags(*OFTEN, *flags))])
        patch.setattr(train, "step", step)
        if stop_in:
            look = getattr(train, stop_in)
            patch.setattr(train, stop_in, looking)
        try:
            train.main()
        finally:
            while runs._locks:  # the end of a process would do that
                runs._locks.pop().close()
    return len(steps)
