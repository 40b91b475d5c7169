"""Training runs in the process of the test, for speed, with signals that come when they are told to."""

import os
import signal
import sys

import pytest

import train
from runtime import runs, signals
from vae import VAE

OFTEN = ["--log-every", 3, "--val-every", 2, "--ckpt-every", 4, "--sample-every", 5]
OFTEN += ["--num-samples", 1, "--num-sampling-steps", 3, "--keep-last", 2]


@pytest.fixture(autouse=True)
def usual_signals():
    """A training run installs handlers; this restores the ones before it."""
    handlers = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_here(training, *flags, stop_after=None, stop_in=None):
    """The training run in this process, for speed; returns its number of steps.

    SIGTERM comes after so many steps, or in the first call of `validate` or `sample_ema` of train.py, or (latents_of)
    in the middle of the first validation.
    """
    steps, update_ema = [], train.update_ema

    def last_of_a_step(*arguments):
        update_ema(*arguments)
        steps.append(1)
        if len(steps) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    def interrupted(*arguments, **keywords):
        if stop_in != "latents_of" or "validation" in arguments:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, training.command_flags(*OFTEN, *flags))])
        patch.setattr(train, "update_ema", last_of_a_step)
        if stop_in:
            owner = VAE if stop_in == "latents_of" else train
            function = getattr(owner, stop_in)
            patch.setattr(owner, stop_in, interrupted)
        try:
            train.main()
        finally:
            while runs._locks:  # the end of a process would do that
                runs._locks.pop().close()
    return len(steps)
