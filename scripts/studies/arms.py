"""The arms (training recipes) of study.py, and how to train and sample them.

Other studies use the recommended arm.
"""

import math
from dataclasses import dataclass

import lab
from models import model_config

lab.refuse_to_run(__name__, "scripts/studies/study.py")

VERSION = 2  # of the arms and of the columns of study.csv; study.py refuses rows of other versions
# {pace of the shapes: seconds of the videos, in which they travel the same distance}. "" moves by
# 0.51 patches per temporal patch, and its videos are long enough for 32 frames.
PACES = {"": 1.4, "slow": 2.8, "fast": 0.7}
TOKENS = 2048  # per training step, for all arms
PATH_LENGTH, GUIDANCE = 0.498, 1.5  # of sampling; path length = evaluations x step size
VALIDATIONS = 8  # per run, in addition to the end of each phase


@dataclass(frozen=True)
class Arm:
    name: str
    questions: str
    flags: str = ""  # of train.py, in addition to the flags of all arms
    phases: tuple = ((16, 1.0),)  # (num_frames, share of the compute) of each phase
    mix: float = 0.0  # --mix of train.py
    seeds: int = 3  # number of seeds with full compute
    shares: tuple = ()  # other shares of the compute; each is a separate run, for SHARE_SEEDS seeds
    lengths: tuple = (16,)  # num_frames of samples at full compute; other shares sample 16 frames
    pace: str = ""  # of the shapes, a key of PACES


ROTARY = "--use-rope --rope-theta 100"
TABLE = ROTARY + " --position-table space"
# of positions in space; 0 with the spatial frequencies of the others; 0.5 with more frames, too
SPEEDS = {
    f"speed {speed}": f"{TABLE} --rope-speed {speed or '1e-9'}" for speed in (0, 0.25, 0.5, 1, 2)
}
MOVING = SPEEDS["speed 0.5"]
POSITIONS = {
    "fixed": "",
    "rotary": ROTARY,
    "table": TABLE,
    "moving": MOVING,
}
INTERVALS = " --frame-interval 1 2"
LENGTHS = (16, 24, 32)
CURRICULUM = {
    "phases": ((4, 1 / 3), (8, 1 / 3), (16, 1 / 3)),
    "lengths": LENGTHS,
}
SHARES = (0.4, 0.6)  # "16 table" has 1.6 instead, because it does not learn the motion at 1.0
SHARE_SEEDS = 3

ARMS = [
    Arm("16 fixed", "A", seeds=5),
    Arm("16 rotary", "A", ROTARY, seeds=5),
    Arm("16 table", "AC", TABLE, seeds=5, shares=(1.6,)),
    Arm("16 moving", "A", MOVING, seeds=5),
    Arm("16 moving intervals", "BC", MOVING + INTERVALS, shares=SHARES),
    Arm("4-8-16", "B", ROTARY + INTERVALS, **CURRICULUM),
    Arm("4-8-16 table", "B", TABLE + INTERVALS, **CURRICULUM),
    Arm("4-8-16 mix", "B", ROTARY + INTERVALS, mix=0.2, **CURRICULUM),
    Arm("4-8-16 table mix", "B", TABLE + INTERVALS, mix=0.2, **CURRICULUM),
    Arm("4-8-16 moving", "BC", MOVING + INTERVALS, shares=SHARES, **CURRICULUM),
    *(Arm(f"16 {name}", "D", flags, seeds=5, lengths=LENGTHS) for name, flags in SPEEDS.items()),
]
for pace in ("slow", "fast"):
    ARMS += [
        Arm(f"16 fixed {pace}", "D", seeds=5, pace=pace),
        Arm(f"16 table {pace}", "D", TABLE, seeds=2, pace=pace),  # does not win
        Arm(f"16 moving {pace}", "D", MOVING, seeds=5, pace=pace),
        Arm(f"16 speed 1 {pace}", "D", SPEEDS["speed 1"], seeds=5, pace=pace),
    ]
BY_NAME = {arm.name: arm for arm in ARMS}
RECOMMENDED = BY_NAME["4-8-16 moving"]


@dataclass(frozen=True)
class Size:
    """The sizes of models, runs and samples. The full compute is `steps` steps of 16 frames."""

    name: str = "full"
    steps: int = 2000
    depth: int = 4
    width: int = 128
    heads: int = 4
    videos: int = 60  # per class
    clips: int = 96  # number of samples per row of the csv
    val_clips: int = 64
    points: int = 16  # --num-sampling-steps
    most_seeds: int = 5


FULL = Size()
MINIATURE = Size(
    name="miniature",
    steps=4,
    depth=1,
    width=96,
    videos=2,
    clips=4,
    val_clips=2,
    points=3,
    most_seeds=1,
)
BASE = (  # flags of train.py
    "--model EqM-Ti/2 --image-size 16 --temporal-patch-size 4 --vae none --no-flip --num-workers 0 "
    "--precision bf16 --optimizer muon --lr 0.002 --muon-lr 0.01 --weight-decay 0.1 "
    "--warmup-steps 20 --lr-decay 0.4 --ema-decay 0.99 --gamma-shift 3"
)


def config_of(size):
    """The EqMConfig for counting FLOPs, which do not depend on the positions."""
    return model_config(
        "EqM-Ti/2",
        depth=size.depth,
        hidden_size=size.width,
        num_heads=size.heads,
        input_size=16,
        in_channels=3,
        temporal_patch_size=4,
        num_classes=12,
    )


def plan(arm, share, size):
    """[(num_frames, last step, clips per step)] of a run, and its FLOPs."""
    return plan_phases(
        config_of(size),
        shares=arm.phases,
        mix=arm.mix,
        steps=share * size.steps,
    )


def plan_phases(config, shares, mix, steps):
    """As `plan`, from (num_frames, share of the compute) of each phase.

    With a mix, the FLOPs are their expected value. The compute is that of so many steps of the last
    phase.
    """
    last, _ = shares[-1]
    clips = steps * TOKENS // math.prod(config.grid(last))
    compute = clips * config.training_flops(last)
    phases = []
    last_step = 0
    flops = 0
    earlier = []
    for num_frames, part in shares:
        batch_size = TOKENS // math.prod(config.grid(num_frames))
        per_clip = config.training_flops(num_frames)
        mixed = sum(earlier) / len(earlier) if earlier else per_clip
        per_step = batch_size * ((1 - mix) * per_clip + mix * mixed)
        steps = max(1, round(part * compute / per_step))
        last_step += steps
        flops += steps * per_step
        earlier.append(per_clip)
        phases.append((num_frames, last_step, batch_size))
    return phases, flops


def phase_flags(phases, mix):
    """The flags of train.py for phases of `plan`, as text."""
    if len(phases) == 1:
        ((num_frames, last_step, batch_size),) = phases
        flags = f"--num-frames {num_frames} --max-steps {last_step}"
        return f"{flags} --global-batch-size {batch_size}"
    schedule = ",".join(f"{frames}:{step}:{clips}" for frames, step, clips in phases)
    return f"--frames-schedule {schedule} --mix {mix}"


def validation_flags(phases):
    _, last_step, _ = phases[-1]
    return f"--val-every {max(1, last_step // VALIDATIONS)}"


def recipe_flags(arm, seed, share, size):
    """The flags of train.py that determine a run, without paths."""
    phases, _ = plan(arm, share, size)
    flags = [
        f"--video {BASE}",
        f"--depth {size.depth} --hidden-size {size.width} --num-heads {size.heads}",
        f"--global-seed {seed}",
        phase_flags(phases, arm.mix),
        arm.flags,
        f"--val-frames 16 --val-clips {size.val_clips}",
        validation_flags(phases),
    ]
    return " ".join(flags).split()


def sampling_flags(size):
    """The flags of sample_gd.py that all studies use, as text."""
    step_size = PATH_LENGTH / (size.points - 1)
    return (
        f"--sampler ngd --num-sampling-steps {size.points} --cfg-scale {GUIDANCE} "
        f"--stepsize {step_size:.4g} --precision {lab.PRECISION}"
    )


def sampling_flops(num_frames, size):
    """The FLOPs of sampling `size.clips` clips with guidance."""
    evaluations = 2 * (size.points - 1)
    return float(size.clips * evaluations * config_of(size).flops(num_frames))


def size_of(args):
    return MINIATURE if args.miniature else FULL


def training(args, arm, seed, flags, share=1.0):
    """The fields `training` and `last_step` of a lab.Run. flags: of train.py, beside the arm's."""
    size = size_of(args)
    # The last --precision counts: a CPU without fast bf16 follows the same recipe in fp32
    recipe = recipe_flags(
        arm,
        seed=seed,
        share=share,
        size=size,
    )
    flags = [*recipe, "--precision", lab.PRECISION, *flags]
    if args.compile:
        flags.append("--compile")
    phases, _ = plan(arm, share, size)
    _, last_step, _ = phases[-1]
    return {"training": flags, "last_step": last_step}
