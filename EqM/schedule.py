"""The phases of a run: how many frames a clip has, up to which global step, and how many clips a step takes."""

import argparse
import re
from dataclasses import dataclass, replace

from runtime.distributed import UserError


@dataclass(frozen=True)
class Phase:
    num_frames: int
    last_step: int  # global
    batch_size: int | None  # clips per step, over all ranks; None = as many tokens as the first phase has

    def __str__(self):
        return f"{self.num_frames}:{self.last_step}:{self.batch_size}"


def parse_schedule(text):
    """The phases of "4:20000:256,8:30000:128,16:40000:64": frames, global step of the end and, if given, batch.

    A `type=` for argparse: raises ArgumentTypeError.
    """
    wanted = "wanted FRAMES:LAST_STEP or FRAMES:LAST_STEP:BATCH, separated by commas"
    phases = []
    for part in text.split(","):
        fields = part.split(":")
        if len(fields) not in (2, 3) or not all(re.fullmatch("[0-9]{1,11}", field) for field in fields):
            raise argparse.ArgumentTypeError(f"found {part!r}, {wanted}")
        frames, last_step, batch = (*map(int, fields), None)[:3]
        if 0 in (frames, last_step, batch):
            raise argparse.ArgumentTypeError(f"found {part!r}, wanted numbers of at least 1")
        if phases and last_step <= phases[-1].last_step:
            raise argparse.ArgumentTypeError(f"{part} ends before the phase before it: steps are global and rise")
        phases.append(Phase(frames, last_step, batch))
    return phases


def fill_batches(phases, batch_size, tokens, parts):
    """The phases with a batch size each; those without get as many tokens per step as batch_size clips of the first.

    tokens(num_frames) is the number of tokens of a clip. Raises UserError unless each batch is a multiple of `parts`
    (ranks x micro-batches).
    """
    per_step = (phases[0].batch_size or batch_size) * tokens(phases[0].num_frames)
    filled = []
    for phase in phases:
        size = phase.batch_size or per_step / tokens(phase.num_frames)
        if size % parts:
            raise UserError(
                f"--frames-schedule: the phase of {phase.num_frames} frames has {size:g} clips a step, which is no "
                f"multiple of {parts} (ranks x --grad-accum): give it a batch, or change --global-batch-size"
            )
        filled.append(replace(phase, batch_size=int(size)))
    return filled


def current_phase(phases, first_step):
    """The phase that began at first_step, or that a checkpoint of that step goes on with."""
    return next(phase for phase in phases if phase.last_step > first_step)
