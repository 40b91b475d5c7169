"""Votes of the ranks, about once per second: all stop, and all save, at the same step."""

import math
import signal
import time

import torch
import torch.distributed as dist

from runtime.distributed import SHARE_TIME, rank

SECONDS_PER_VOTE = 1.0
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP


class Interrupted(Exception):  # noqa: N818 (nothing went wrong)
    """A signal stops the run. Unfinished work is dropped; the resumed run repeats it."""


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 or SIGHUP, sent to any rank, stops all of them at the same step.

    `vote` starts a sum over the ranks before a step, and `resolve` reads it after the step, so no
    rank waits. Rank 0 measures how many steps it makes per second, and each vote carries that
    number, so all ranks skip the same steps. If steps suddenly take N times as long, one vote comes
    up to N seconds late. A second SIGINT ends the process at once. together: no rank may leave
    before the others know, as a sharded network needs all.
    """

    def __init__(self, together=False):
        self.name = None
        self.flags = None
        self.is_waiting = False
        self.together = together
        # in_step: between vote and resolve; steps: since the last vote; period: steps from one vote
        # to the next
        self.in_step = False
        self.steps = 0
        self.period = 0
        self.voted_at = time.monotonic()
        self.group = (
            dist.new_group(backend="gloo", timeout=SHARE_TIME) if dist.is_initialized() else None
        )
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
        """The next batch of an iterator, None at its end.

        Raises Interrupted at once; other ranks may not know.
        """
        batch, self.is_waiting = None, True  # for seconds, while loader processes start
        try:
            batch = next(batches, None) if self.name is None else None
        except Interrupted:
            pass  # `check` raises it, for a sharded network on all ranks
        finally:
            self.is_waiting = False
        self.check()
        return batch

    def vote(self, save=False):
        """Begin a step and, if one is due, start a vote on whether to stop and whether to save."""
        self.in_step = True
        seconds = time.monotonic() - self.voted_at
        if self.group is None or self.steps >= self.period:
            self._start(save, pace=SECONDS_PER_VOTE * self.steps / seconds if seconds else 0.0)

    def _start(self, save=False, pace=0.0):
        self.steps = 0
        self.voted_at = time.monotonic()
        self.flags = torch.tensor(
            [float(self.name is not None), float(save), pace if rank() == 0 else 0.0]
        )
        if self.group is not None:
            self.pending = dist.all_reduce(self.flags, group=self.group, async_op=True)

    def resolve(self):
        """Raise Interrupted, on all ranks, if any voted to stop.

        Returns whether any voted to save.
        """
        if not self.in_step:  # all ranks call this, so all vote
            self._start()
        self.steps += self.in_step
        self.in_step = False
        if self.flags is None:  # a step without a vote
            return False
        if self.group is not None:
            self.pending.wait()
        stop, save, pace = self.flags.tolist()
        # At most double: after a pause, a GPU accepts steps faster than it computes them
        self.flags = None
        self.period = min(math.ceil(pace), 2 * self.period + 1)
        # a single process, after the vote
        if stop or (self.group is None and self.name is not None):
            raise Interrupted
        return save > 0

    def check(self):
        """Raise Interrupted if this rank received a signal.

        Others may not know, unless `together`: see `resolve`.
        """
        if self.together:
            self.resolve()
        elif self.name is not None:
            raise Interrupted

    def barrier(self):
        """Wait for all ranks, longer than a step does: one may write a large file to slow disk."""
        if self.group is not None:
            dist.barrier(group=self.group)
