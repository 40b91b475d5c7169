"""World models: which objective learns one, and what helps against drift?

    python scripts/studies/worlds.py --tune     4 settings of each objective, with a seed that does
                                                not count
    python scripts/studies/worlds.py            the main runs: objectives and ideas, three seeds

All models but one follow the recipe and the phases of world.sh, at equal compute. Each objective
has the training shift, the learning rate and the sampling shift that did best in tuning, which are
also those of the ideas: of eqm, some noise in the context, a longer context, a context that the
model makes itself, more compute, and a student (docs/few-steps.md), which trains on samples of the
eqm with its seed. Samples continue a true frame of a held-out map by 64 others, and by 256. The
endpoints are fixed: moved, blocked, determined and sharp of evaluate.py --metric world, over 64
frames with 4 evaluations per frame, and drift over 256 frames with 2. Tuning decides by the mean of
the first four.

A run takes about 12 minutes of one core. The script writes worlds.md and .json in
results/studies/worlds, with --tune worlds_tuning.md and .json. Models, samples and scores are in
its folder runs (see lab.py).
"""

import itertools
import shlex
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import few
import lab
from lab import Column
from models import model_config
from runtime.cli import UserError, one_line_errors
from schedule import Phase, parse_schedule

RECIPE = lab.ROOT / "scripts/recipes/world.txt"
TINY_MODEL = "--depth 1 --hidden-size 96"  # with --miniature
OBJECTIVES = ("eqm", "flow", "told-w")
CONTEXT = 16  # of the recipe
EVALUATIONS = (1, 2, 4, 8)  # of a frame
USUAL = 4
PAIRS_EVALUATIONS = 8
STUDENT_BATCH = 8  # clips per step
SOLVER_SHIFTS = (1, 3)  # of the steps in sampling
TUNING_SEED = 100
SHORT = 64  # generated frames
LONG = 256
LONG_EVALUATIONS = 2


@dataclass(frozen=True)
class Settings:
    """What is tuned in training."""

    gamma_shift: float
    muon_lr: float

    @property
    def name(self):
        return f"shift {self.gamma_shift:g}, muon-lr {self.muon_lr:g}"


TUNED = [
    Settings(gamma_shift=shift, muon_lr=rate)
    for shift, rate in itertools.product((6, 3), (0.02, 0.01))
]


@dataclass(frozen=True)
class Arm:
    objective: str
    flags: str = ""  # of train.py
    context: int = CONTEXT
    compute: float = 1.0  # relative to the recipe's
    seeds: int = 3
    own_context: float = 0.0


ARMS = {name: Arm(name) for name in OBJECTIVES}
ARMS |= {
    "eqm, context noise 0.2": Arm("eqm", "--context-noise 0.2"),
    "eqm, context 32": Arm("eqm", context=32),
    "eqm, own context 0.5": Arm("eqm", own_context=0.5),
    "eqm, 4 times the compute": Arm("eqm", compute=4.0, seeds=1),
}
STUDENT = "eqm, student"
COMPARED = (
    ("flow", "eqm"),
    ("told-w", "eqm"),
    ("eqm, context noise 0.2", "eqm"),
    ("eqm, context 32", "eqm"),
    ("eqm, own context 0.5", "eqm"),
    ("eqm, 4 times the compute", "eqm"),
    (STUDENT, "eqm"),
)
MEASURES = {  # of the metric: title
    "moved": "transitions right: moved (%)",
    "blocked": "blocked (%)",
    "determined": "tiles that the past determines (%)",
    "sharp": "sharp tiles (%)",
}
DRIFT = (
    Column("shares of tiles, distance to real ones (%)", "shares"),
    Column("remembered above chance (%)", "above_chance"),
)


def task_name(frames, evaluations):
    return f"{frames} frames, {evaluations} evaluations"


MAIN_TASK = task_name(SHORT, USUAL)
LONG_TASK = task_name(LONG, LONG_EVALUATIONS)


@dataclass(frozen=True)
class Size:
    """The sizes of the data and of the runs."""

    episodes: int = 2000
    held_out: int = 64
    frames: int = 129
    short: int = SHORT
    long: int = LONG
    phases: tuple = ()  # () = those of the recipe
    pairs: int = 1024  # samples that a student trains on
    steps: int = 600  # of a student


FULL = Size()
MINIATURE = Size(
    episodes=4,
    held_out=2,
    frames=17,
    short=4,
    long=6,
    phases=(Phase(2, 2, 2), Phase(4, 4, 2)),
    pairs=4,
    steps=2,
)


def size_of(args):
    return MINIATURE if args.miniature else FULL


def recipe_phases():
    """The Phases of the recipe."""
    words = shlex.split(RECIPE.read_text(), comments=True)
    return parse_schedule(words[words.index("--frames-schedule") + 1])


def phases_of(args, arm):
    """The Phases of an arm. If a step costs more, there are fewer. With a longer context, half of
    the last phase has longer clips, but as many tokens per step.
    """
    phases = size_of(args).phases or recipe_phases()
    factor = arm.compute * (3 / 4 if arm.own_context else 1)  # 4 passes in place of 3
    phases = [replace(phase, last_step=int(phase.last_step * factor)) for phase in phases]
    if arm.context == CONTEXT:
        return phases
    *first, last = phases
    middle = (first[-1].last_step + last.last_step) // 2
    longer = Phase(2 * last.num_frames, last.last_step, last.batch_size // 2)
    return [*first, replace(last, last_step=middle), longer]


def config_of(context):
    return model_config(
        "EqM-Ti/4",
        depth=4,
        hidden_size=128,
        num_heads=4,
        input_size=20,
        in_channels=3,
        temporal_patch_size=1,
        use_rope=True,
        causal=True,
        context=context,
    )


def count_flops(phases, arm):
    """The FLOPs of an arm in all phases, without --mix."""
    config = config_of(arm.context)
    flops = 0
    before = 0
    for phase in phases:
        steps = phase.last_step - before
        of_clip = config.training_flops(phase.num_frames, own_context=arm.own_context)
        flops += steps * phase.batch_size * of_clip
        before = phase.last_step
    return flops


def make_run(args, name, settings, seed, tasks, table):
    """The lab.Run of an arm with Settings.

    tasks: {name: (frames, evaluations, shift of the steps in sampling)}, each a walk on each
    held-out map from its first frame.
    """
    size = size_of(args)
    arm = ARMS[name]
    phases = phases_of(args, arm)
    folder = Path(args.out, "runs/world")
    test = folder.with_name("world-test")
    flags_of = {}
    for task, (frames, evaluations, shift) in tasks.items():
        flags = (
            f"--num-frames {1 + frames} --num-sampling-steps {evaluations + 1} --solver-shift "
            f"{shift} --given {test} --given-split val --given-frames 0 --no-keep-background "
            f"--actions {test}/walks.npy --num-samples {size.held_out} --seed {seed} "
            f"--precision {lab.PRECISION} --batch-size 64"
        )
        flags_of[task] = (flags.split(), ("world",))
    schedule = ",".join(map(str, phases))
    training = (
        f"--video --frames-schedule {schedule} --objective {arm.objective} --sampler euler "
        f"--gamma-shift {settings.gamma_shift:g} --muon-lr {settings.muon_lr:g} "
        f"--context {arm.context} --own-context {arm.own_context:g} {arm.flags} "
        f"--global-seed {seed} --precision {lab.PRECISION} --data-path {folder} "
        f"{TINY_MODEL if args.miniature else ''}"
    )
    making = f"--episodes {size.episodes} --held-out {size.held_out} --frames {size.frames}"
    testing = f"--episodes 1 --held-out {size.held_out} --frames {1 + size.long} --seed 1"
    return lab.Run(
        out=Path(args.out, f"{table}.json"),
        about={"arm": name, "settings": settings.name, "seed": seed}
        | ({"size": "miniature"} if args.miniature else {}),
        data={folder: making.split(), test: testing.split()},
        maker="datasets/make_world.py",
        training=[f"@{RECIPE}", *training.split(), *["--compile"] * args.compile],
        last_step=phases[-1].last_step,
        tasks=flags_of,
        metrics={"world": ["--data-path", test]},
        more={"flops": count_flops(phases, arm)},
    )


def tuning_task(shift):
    return f"{task_name(SHORT, USUAL)}, solver shift {shift}"


def tuning_run(args, name, settings):
    frames = size_of(args).short
    tasks = {tuning_task(shift): (frames, USUAL, shift) for shift in SOLVER_SHIFTS}
    return make_run(
        args,
        name,
        settings,
        seed=TUNING_SEED,
        tasks=tasks,
        table="worlds_tuning",
    )


def main_run(args, name, seed, tuning):
    """The run of an arm with what tuning chose. tuning: the rows of the tuning runs."""
    if name == STUDENT:
        return student_run(args, seed, tuning)
    size = size_of(args)
    settings, shift = choose(tuning, ARMS[name].objective)
    tasks = {task_name(SHORT, count): (size.short, count, shift) for count in EVALUATIONS}
    tasks[LONG_TASK] = (size.long, LONG_EVALUATIONS, shift)
    run = make_run(
        args,
        name,
        settings=settings,
        seed=seed,
        tasks=tasks,
        table="worlds",
    )
    if name == "eqm":  # the teacher
        data, _ = run.data
        flags = (
            f"--num-frames {1 + CONTEXT} --num-samples {size.pairs} --solver-shift {shift} "
            f"--num-sampling-steps {PAIRS_EVALUATIONS + 1} --actions {data}/walks.npy "
            f"--seed {few.PAIRS_SEED + seed} --precision {lab.PRECISION} --batch-size 64"
        )
        run.tasks[few.PAIRS] = (flags.split(), ())
    return run


def student_run(args, seed, tuning):
    """The run of a student of the eqm with this seed."""
    size = size_of(args)
    teacher = main_run(args, "eqm", seed, tuning)
    last_step = teacher.last_step + size.steps
    folder = teacher.path(few.PAIRS).parent
    training = (
        f"@{few.RECIPE} --video --num-frames {1 + CONTEXT} --pairs --no-flip --data-path {folder} "
        f"--max-steps {last_step} --global-batch-size {STUDENT_BATCH} --global-seed {seed} "
        f"--precision {lab.PRECISION} --val-every {size.steps}"
    )
    config = config_of(CONTEXT)
    flops = size.steps * STUDENT_BATCH * config.training_flops(1 + CONTEXT)
    flops += size.pairs * config.stream_flops(1 + CONTEXT, PAIRS_EVALUATIONS)
    return few.Student(
        out=teacher.out,
        about=teacher.about | {"arm": STUDENT},
        data=teacher.data,
        maker=teacher.maker,
        training=training.split() + ["--compile"] * args.compile,
        last_step=last_step,
        tasks={task: words for task, words in teacher.tasks.items() if task != few.PAIRS},
        metrics=teacher.metrics,
        more={"flops": flops},
        teacher=teacher,
        cost=flops / teacher.more["flops"],
    )


def choose(rows, objective):
    """(Settings, shift of the steps in sampling) of an objective that did best in tuning.

    Nothing of a model that diverged is right. Raises UserError if a run is missing.
    """
    scores = {}
    for settings in TUNED:
        about = {"arm": objective, "settings": settings.name}
        of_run = lab.rows_with(about, rows)
        if not of_run:
            raise UserError(f"--arms {objective}: not tuned completely; run with --tune first")
        for shift in SOLVER_SHIFTS:
            values = of_run[0]["values"].get(tuning_task(shift), {})
            score = statistics.mean(values.get(measure) or 0.0 for measure in MEASURES)
            scores[settings, shift] = score
    return max(scores, key=scores.get)


def columns_of(task):
    return [Column(title, measure, task=task) for measure, title in MEASURES.items()]


def tuning_markdown(rows):
    lines = lab.heading(
        "World models: tuning",
        f"`scripts/studies/worlds.py --tune` wrote these tables: one seed, {USUAL} evaluations per "
        f"frame, {SHORT} frames.",
    )
    arms = {
        f"{name}, {settings.name}": {"arm": name, "settings": settings.name}
        for name, settings in itertools.product(OBJECTIVES, TUNED)
    }
    for shift in SOLVER_SHIFTS:
        table = lab.arm_table(rows, arms, columns_of(tuning_task(shift)))
        lines += [f"## Solver shift {shift}", "", *table]
    return lines


def markdown(rows):
    """Lines of a table per task."""
    lines = lab.heading(
        "World models",
        "`scripts/studies/worlds.py` wrote these tables. Cells: the mean over seeds (range).",
    )
    arms = {name: {"arm": name} for name in (*ARMS, STUDENT)}
    for task in lab.tasks_of(rows):
        if task != few.PAIRS:
            columns = columns_of(task) + [column.of(task) for column in DRIFT]
            lines += [f"## {task}", "", *lab.arm_table(rows, arms, columns)]
    differences = []
    for column in columns_of(MAIN_TASK) + [column.of(LONG_TASK) for column in DRIFT]:
        values = lab.by_arm(rows, arms, column)
        title = f"{column.task}, {column.title}"
        differences += [(values, pair, title, 2) for pair in COMPARED]
    return [*lines, "## Differences", "", *lab.compare(differences)]


def parse_args():
    parser = lab.study_parser(__doc__, "worlds", seeds=[0, 1, 2], tunes=True, arms=[*ARMS, STUDENT])
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if args.tune:
        names = [name for name in OBJECTIVES if name in args.arms]
        cases = itertools.product(TUNED, names)
        runs = [tuning_run(args, name, settings) for settings, name in cases]
        lab.run_study(args, runs, tuning_markdown)
        return
    cases = [
        (seed, name)
        for seed, name in itertools.product(args.seeds, args.arms)
        if name == STUDENT or seed < ARMS[name].seeds
    ]
    runs = lab.tuned_runs(args, "worlds_tuning", cases, main_run)
    lab.run_study(args, runs, markdown)


if __name__ == "__main__":
    main()
