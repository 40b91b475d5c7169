"""The phases of a run: frames per clip, the global step at the end, and clips per step."""

import argparse
import math
import re
from dataclasses import dataclass, replace

from runtime.cli import COUNT, SHARE, UserError, plural
from runtime.distributed import world_size
from runtime.rng import uniform

PHASE = "[1-9][0-9]{0,10}(:[1-9][0-9]{0,10}){1,2}"


@dataclass(frozen=True)
class Phase:
    num_frames: int
    last_step: int  # global
    # clips per step, over all ranks; None = as many tokens per step as in the first phase
    batch_size: int | None = None

    def __str__(self):
        return f"{self.num_frames}:{self.last_step}:{self.batch_size}"


def parse_schedule(text):
    """Return the phases of a text such as "4:20000:256,8:30000": frames, last step and, optionally,
    clips per step.

    A `type=` for argparse: raises ArgumentTypeError.
    """
    if not re.fullmatch(f"{PHASE}(,{PHASE})*", text):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected FRAMES:LAST_STEP or FRAMES:LAST_STEP:BATCH, numbers of at "
            "least 1, separated by commas"
        )
    phases = [Phase(*map(int, part.split(":"))) for part in text.split(",")]
    steps = [phase.last_step for phase in phases]
    if steps != sorted(set(steps)):
        raise argparse.ArgumentTypeError(
            f"got {text!r}: steps count over all phases, so they must increase"
        )
    return phases


def fill_batches(phases, batch_size, tokens, parts):
    """Return the phases with all batch sizes filled in, so that each has as many tokens per step as
    the first phase.

    The first phase defaults to batch_size. tokens(num_frames) is the number of tokens of a clip.
    Raises UserError unless each batch is a multiple of `parts` (ranks x micro-batches).
    """
    per_step = (phases[0].batch_size or batch_size) * tokens(phases[0].num_frames)
    filled = []
    for phase in phases:
        size = phase.batch_size or per_step / tokens(phase.num_frames)
        if size % parts:
            raise UserError(
                f"--frames-schedule: the phase of {plural(phase.num_frames, 'frame')} has "
                f"{size:g} clips per step; expected a multiple of {parts} (ranks x --grad-accum); "
                "add a batch size to it, or change --global-batch-size"
            )
        filled.append(replace(phase, batch_size=int(size)))
    return filled


def is_due(step, last_step, *periods):
    """Return whether a step is the last step of a phase or a multiple of one of the periods.

    Period 0 means never.
    """
    return step >= last_step or any(period and step % period == 0 for period in periods)


def current_phase(phases, first_step):
    """Return the phase that follows the global step first_step."""
    return next(phase for phase in phases if phase.last_step > first_step)


def frames_of_steps(phases, phase, step, first_step, mix, seed):
    """Yield the frames per clip of each step from step + 1 to the end of a phase from first_step.

    A share `mix` of the steps uses the frames of an earlier phase. The choice depends only on seed,
    phase and step.
    """
    earlier = [one.num_frames for one in phases if one.last_step <= first_step]
    for number in range(step + 1, phase.last_step + 1):
        num_frames = phase.num_frames
        if mix and earlier:
            chance = uniform(seed, "mix", first_step, [number]).item() / mix
            if chance < 1:
                num_frames = earlier[int(chance * len(earlier))]
        yield num_frames


# Flags --------------------------------------------------------------------------------------------


def add_flags(parser):
    """Add the flags of clip lengths, steps and batches to the parser of train.py."""
    add = parser.add_argument_group("phases").add_argument
    add("--num-frames", type=COUNT, help="frames per clip; default: 16, images have 1")
    add(
        "--frames-schedule",
        type=parse_schedule,
        metavar="F:STEP[:BATCH],...",
        help=(
            "phases in one run, such as 4:20000:256,8:30000:128: frames, global step at which the "
            "phase ends, clips per step (default: as many tokens as in the first phase)"
        ),
    )
    add(
        "--mix",
        type=SHARE,
        default=0.0,
        help="fraction of later phases' steps with an earlier clip length; 0 = off",
    )
    add(
        "--max-steps",
        type=COUNT,
        help="global step to end at, over all phases; default: see --epochs",
    )
    add("--epochs", type=COUNT, help="epochs of this phase; default: 1400 without --max-steps")
    add("--global-batch-size", type=COUNT, default=256, help="clips per step, over all ranks")
    add("--grad-accum", type=COUNT, default=1, help="micro-batches per step")
    add(
        "--lr-decay-end",
        type=COUNT,
        help=(
            "global step at which --lr-decay ends, if more phases follow this run; default: the "
            "end of this run"
        ),
    )


def clip_lengths(args):
    """The lengths of the training clips in frames, from --frames-schedule or --num-frames."""
    if args.frames_schedule:
        return [phase.num_frames for phase in args.frames_schedule]
    return [args.num_frames]


def frames_flag(args):
    """The flag that gives `clip_lengths`."""
    return "--frames-schedule" if args.frames_schedule else "--num-frames"


def check_flags(args):
    """Raise UserError for phases, batches or steps that contradict each other."""
    if args.mix and not args.frames_schedule:
        raise UserError(
            f"--mix {args.mix}: needs earlier phases; add --frames-schedule, or remove it"
        )
    if args.lr_decay_end and args.lr_decay_end < (args.max_steps or math.inf):
        raise UserError(
            f"--lr-decay-end {args.lr_decay_end}: expected at least the last step of --max-steps "
            "or --frames-schedule"
        )
    if args.frames_schedule:
        return
    parts = world_size() * args.grad_accum
    if args.global_batch_size % parts:
        ranks = f"{plural(world_size(), 'rank')} x --grad-accum {args.grad_accum}"
        raise UserError(
            f"--global-batch-size {args.global_batch_size}: not a multiple of {ranks}; use a "
            f"multiple of {parts}"
        )
    check_disp(args, args.global_batch_size)


def check_disp(args, batch_size):
    """Raise UserError if --disp would compare clips, but each rank has one at a time."""
    if args.disp and batch_size == world_size() * args.grad_accum:
        raise UserError(
            "--disp: compares clips, but each rank has one at a time; raise --global-batch-size, "
            "or the batch sizes of --frames-schedule"
        )
