"""Signals that stop a run: all ranks save at the same step and end."""

import signal

import torch
import torch.distributed as dist

from runtime.distributed import is_started

STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """The run was asked to stop; the work under way is dropped and done again after the resume."""


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP, sent to any rank, stops all of them at the same step.

    The ranks agree by a sum over a group of its own, on the CPU: `ask` starts it before a step and `settle` reads it
    after the step, so no rank waits. A second SIGINT ends the process at once.
    """

    def __init__(self):
        self.name, self.pending, self.is_waiting = None, None, False
        self.group = dist.new_group(backend="gloo") if is_started() else None
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.name = self.name or signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.is_waiting:
            self.is_waiting = False
            raise Interrupted

    def wait(self, batches):
        """The next of an iterator of batches, None at its end. Raises Interrupted at once if this rank is to stop.

        Others may not know: see `settle`. Loader processes take seconds to start, and a decoder may hang.
        """
        self.is_waiting = True
        try:
            self.check()
            return next(batches, None)
        finally:
            self.is_waiting = False

    def ask(self):
        if self.group is not None:
            self.flag = torch.tensor([float(self.name is not None)])
            self.pending = dist.all_reduce(self.flag, group=self.group, async_op=True)

    def agreed(self):
        """Whether any rank had been asked to stop when it came to `ask` (or here, without `ask`): the same on all."""
        if self.group is None:
            return self.name is not None
        if self.pending is None:
            self.ask()
        self.pending.wait()
        self.pending = None
        return self.flag.item() > 0

    def check(self):
        """Raise Interrupted if this rank was asked to stop; others may not know: see `settle`."""
        if self.name is not None:
            raise Interrupted

    def settle(self):
        """Raise Interrupted, on all ranks, if any was asked to stop."""
        if self.agreed():
            raise Interrupted
