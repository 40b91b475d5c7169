"""Models of Moving Shapes for all studies: their sizes, recipes of equal compute, and samples."""

import math
from dataclasses import dataclass
from pathlib import Path

import lab
from models import model_config
from samplers import SOLVERS

lab.refuse_to_run(__name__, "scripts/studies/study.py")

TOKENS = 2048  # per training step, for all arms
PATH_LENGTH = 0.498  # of a descent: evaluations x step size
GUIDANCE = 1.5
USUAL = 15  # evaluations of a sample
VALIDATIONS = 8  # per run, in addition to the end of each phase
ROTARY = "--use-rope --rope-theta 100"
TABLE = ROTARY + " --position-table space"
MOVING = TABLE + " --rope-speed 0.5"
POSITIONS = {
    "fixed": "",
    "rotary": ROTARY,
    "table": TABLE,
    "moving": MOVING,
}
INTERVALS = " --frame-interval 1 2"
BASE = (  # flags of train.py
    "--model EqM-Ti/2 --image-size 16 --temporal-patch-size 4 --vae none --no-flip --num-workers 0 "
    "--precision bf16 --optimizer muon --lr 0.002 --muon-lr 0.01 --weight-decay 0.1 "
    "--warmup-steps 20 --lr-decay 0.4 --ema-decay 0.99 --gamma-shift 3"
)
CURRICULUM = ((4, 1 / 3), (8, 1 / 3), (16, 1 / 3))
BOTH_RIGHT = lab.Column("both right (%)", "both_accuracy")


@dataclass(frozen=True)
class Arm:
    """A training recipe: an arm of study.py. The others use the recommended one."""

    flags: str = MOVING + INTERVALS  # of train.py, in addition to BASE
    phases: tuple = CURRICULUM  # (num_frames, share of the compute) of each phase
    mix: float = 0.0  # --mix of train.py


@dataclass(frozen=True)
class Size:
    """The sizes of models, runs and samples. The full compute is `steps` steps of 16 frames."""

    steps: int = 2000
    depth: int = 4
    width: int = 128
    videos: int = 60  # per class
    clips: int = 288  # samples of a primary endpoint
    fewer: int = 96  # other samples, and real clips that they are compared with
    few: int = 48  # long samples
    val_clips: int = 64


FULL = Size()
MINIATURE = Size(
    steps=4,
    depth=1,
    width=96,
    videos=2,
    clips=4,
    fewer=4,
    few=4,
    val_clips=2,
)


def size_of(args):
    return MINIATURE if args.miniature else FULL


def config_of(size):
    """The EqMConfig for counting FLOPs, which do not depend on the positions."""
    return model_config(
        "EqM-Ti/2",
        depth=size.depth,
        hidden_size=size.width,
        num_heads=4,
        input_size=16,
        in_channels=3,
        temporal_patch_size=4,
        num_classes=12,
    )


def plan(config, shares, mix, steps):
    """[(num_frames, last step, clips per step)] of a run, and its FLOPs.

    shares: (num_frames, share of the compute) of each phase. The compute is that of so many steps
    of the last phase. With a mix, the FLOPs are their expected value.
    """
    last, _ = shares[-1]
    clips = steps * TOKENS // config.num_tokens(last)
    compute = clips * config.training_flops(last)
    phases = []
    last_step = 0
    flops = 0
    earlier = []
    for num_frames, part in shares:
        batch_size = TOKENS // config.num_tokens(num_frames)
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
    schedule = ",".join(f"{frames}:{step}:{clips}" for frames, step, clips in phases)
    num_frames, last_step, batch_size = phases[-1]
    flags = f"--frames-schedule {schedule}"
    if len(phases) == 1:
        flags = f"--num-frames {num_frames} --max-steps {last_step}"
        flags += f" --global-batch-size {batch_size}"
    return f"{flags} --mix {mix} --val-every {max(1, last_step // VALIDATIONS)}"


def sampling(way, evaluations):
    """Flags of sample_gd.py, as text, for so many evaluations.

    way: a solver, or the path length of a descent. Heun's method takes an odd number of
    evaluations, so Euler's does for others.
    """
    if way not in SOLVERS:
        step_size = way / evaluations
        return f"--sampler ngd --num-sampling-steps {evaluations + 1} --stepsize {step_size:.4g}"
    if way == "heun" and evaluations % 2:
        return f"--sampler heun --num-sampling-steps {(evaluations + 3) // 2}"
    return f"--sampler euler --num-sampling-steps {evaluations + 1}"


def make_task(
    way, count, evaluations=USUAL, frames=16, guidance=GUIDANCE, more="", metrics=("motion",)
):
    """(flags of sample_gd.py, metrics) of `count` clips. more: flags that override others."""
    flags = f"--num-frames {frames} --num-samples {count} --cfg-scale {guidance} "
    return f"{flags}{sampling(way, evaluations)} {more}".split(), metrics


def train_words(size, seed, phases, more, precision=lab.PRECISION):
    """Flags of train.py, as words, but for the data. phases: of `phase_flags`; more: flags that
    override others, as text.
    """
    # The last --precision counts: a CPU without fast bf16 follows the same recipe in fp32
    return (
        f"--video {BASE} --depth {size.depth} --hidden-size {size.width} --num-heads 4 "
        f"--global-seed {seed} {phases} --val-frames 16 --val-clips {size.val_clips} "
        "--cache-frames "  # the same clips in two thirds of the time
        f"--precision {precision} {more}"
    ).split()


def data_of(args, name="moving", flags=("--seconds", 1.4)):
    """The `data` of a lab.Run: training videos, and test videos for `Size.clips` clips.

    flags: of make_moving_shapes.py.
    """
    size = size_of(args)
    folder = Path(args.out, f"runs/{name}-shapes")
    return lab.data_sets(folder, size.videos, max(2, size.clips // 12), flags)


def shapes_run(args, table, about, tasks, flags="", arm=Arm(), more=None, precision=lab.PRECISION):
    """The lab.Run of a model of Moving Shapes with the seed in `about`.

    table: the name of the json file; flags: of train.py, in addition to those of the arm; more: for
    the row.
    """
    size = size_of(args)
    seed = about["seed"]
    phases, flops = plan(
        config_of(size),
        shares=arm.phases,
        mix=arm.mix,
        steps=size.steps,
    )
    _, last_step, _ = phases[-1]
    data = data_of(args)
    videos, test = data
    training = train_words(
        size,
        seed,
        phases=phase_flags(phases, arm.mix),
        more=f"{arm.flags} {flags}",
        precision=precision,
    )
    training += ["--data-path", videos]
    common = f"--seed {seed} --precision {precision} --batch-size 32".split()
    real = ["--num-real", size.fewer]
    on_test = ["--data-path", test, "--split", "all"]
    return lab.Run(
        out=Path(args.out, f"{table}.json"),
        about=about | ({"size": "miniature"} if args.miniature else {}),
        data=data,
        training=training + ["--compile"] * args.compile,
        last_step=last_step,
        tasks={name: (words + common, metrics) for name, (words, metrics) in tasks.items()},
        metrics={
            "motion": [*on_test, *real],
            "nearest": ["--data-path", videos, *real],
            "consistency": ["--data-path", videos, *real],
            "prediction": ["--data-path", test],
        },
        more={"flops": flops, "precision": precision} | (more or {}),
    )


def scores_by_seed(rows, about, column):
    """lab.by_seed, but no clip of a model that diverged is right: such a share is 0, not NaN."""
    numbers = lab.by_seed(rows, about, column)
    if column.value != BOTH_RIGHT.value:
        return numbers
    return {seed: 0.0 if math.isnan(number) else number for seed, number in numbers.items()}
