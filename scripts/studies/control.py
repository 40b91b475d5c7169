"""Why does EqM win? Six arms that differ in target, weight and whether gamma is told.

    python scripts/studies/control.py --tune                   8 configurations of each arm, 2 seeds
    python scripts/studies/control.py --arms eqm flow told-w   the main runs of these arms

Each arm trains on the recommended curriculum of study.py, with the configuration and the sampler
that did best on the tuning seeds, which do not count. All arms are tuned with the same
configurations. No earlier study had the main seeds. The co-primary endpoints are fixed: clips whose
direction and shape are both right, at 16 and at 32 frames, with 15 evaluations; told-w against eqm,
and flow against eqm, by Holm over the four. Two arms are equal if the 95% interval lies within
EQUAL points.

flow-as-told-w is flow with the configuration and the sampler of told-w, so that these two differ by
the weight alone. Runs with the same seed are compared only if they have the same precision.

With the same seed, all arms have the same data, noise and gammas, but those that are told gamma
start from other weights than the others, because they draw those of its MLP first. Forced arms that
are told gamma train on given frames in whole temporal patches, as they must, so more often on those
that are measured.

A run takes 8 to 14 minutes of one core. The script writes control.md, .json and .png in
results/studies/objectives, with --tune control_tuning.md and .json. Models, samples and scores are
in its folder runs (see lab.py). control_sprites.py repeats three of the arms on Sprites.
"""

import itertools
import random
import statistics
import time
from argparse import Namespace
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import lab
from runtime.cli import UserError, one_line_errors
from samplers import SOLVERS
from scoring.stats import half95
from shapes import (
    BOTH_RIGHT,
    PATH_LENGTH,
    USUAL,
    data_of,
    make_task,
    scores_by_seed,
    shapes_run,
    size_of,
)
from transport import MEAN_SQUARED_DECAY, OBJECTIVES


@dataclass(frozen=True)
class Configuration:
    """What is tuned. learning_rate: a factor of both rates; clip_grad: of eqm's gradients (see
    `loss_scale`), 0 = off.
    """

    learning_rate: float
    clip_grad: float
    gamma_shift: float
    solver_shift: float
    guidance: float

    def training_flags(self, objective):
        """Flags of train.py. objective: its name."""
        clip_grad = self.clip_grad * loss_scale(objective)
        return (
            f"--lr {0.002 * self.learning_rate:g} --muon-lr {0.01 * self.learning_rate:g} "
            f"--clip-grad {clip_grad:g} --gamma-shift {self.gamma_shift:g}"
        )


def loss_scale(objective):
    """The loss of a network that predicts zero, relative to eqm's.

    Gradients grow with the loss, so the same --clip-grad would shorten most of eqm's and few of
    told-w's. objective: its name.
    """
    return OBJECTIVES[objective].zero_loss(0) / MEAN_SQUARED_DECAY


def draw_configurations(count, seed=65):
    """Draw from a prior that was fixed before the first run, the same for each arm."""
    draw = random.Random(seed)
    configurations = []
    for _ in range(count):
        configurations.append(
            Configuration(
                learning_rate=draw.choice([0.5, 1, 2]),
                clip_grad=draw.choice([1, 0]),
                gamma_shift=draw.choice([0.5, 1, 2]),
                solver_shift=draw.choice([0.5, 1, 2, 3]),
                guidance=draw.choice([1, 1.5, 2]),
            )
        )
    return configurations


@dataclass(frozen=True)
class Arm:
    objective: str
    flags: str = ""  # of train.py, in addition
    seeds: int = 3
    ways: tuple = SOLVERS  # of sampling
    tuned_as: str = ""  # the arm whose configuration it takes; "" = its own
    is_forced: bool = False  # trained with given frames, and only measured with these


FORCED = "--forcing 0.75"
LOGIT_NORMAL = "--gamma-draw logit-normal"
ARMS = {
    "eqm": Arm("eqm", seeds=16, ways=(PATH_LENGTH, *SOLVERS)),
    "flow": Arm("flow", seeds=16),
    "told-w": Arm("told-w", seeds=16),
    "blind-w": Arm("blind-w", seeds=8),
    "told-c": Arm("told-c", seeds=8),
    "blind": Arm("blind"),
    "told-4": Arm("told-4", tuned_as="flow"),
    # the first five can't be paired: told-w had another precision
    "flow-as-told-w": Arm("flow", seeds=13, tuned_as="told-w"),
    # three seeds were planned; five were added because these were far above flow
    "flow-logit-normal": Arm("flow", LOGIT_NORMAL, seeds=8, tuned_as="flow"),
    "told-w-logit-normal": Arm("told-w", LOGIT_NORMAL, tuned_as="told-w"),
    "eqm-forced": Arm("eqm", FORCED, tuned_as="eqm", is_forced=True),
    "flow-forced": Arm("flow", FORCED, tuned_as="flow", is_forced=True),
    "told-w-forced": Arm("told-w", FORCED, tuned_as="told-w", is_forced=True),
}
TUNED = [name for name, arm in ARMS.items() if not arm.tuned_as]
CONFIGURATIONS = draw_configurations(8)
TUNING_SEEDS = (100, 101)
SEEDS = range(200, 216)  # an arm takes the first ones
PRIMARY_FRAMES = (16, 32)
LENGTHS = (16, 24, 32)  # of the figure
COUNTS = (2, 4, 8, 30)  # other numbers of evaluations
PRIMARY = (("told-w", "eqm"), ("flow", "eqm"))
SECONDARY = (*PRIMARY, ("blind-w", "eqm"), ("told-c", "eqm"))
ADDED = {  # heading: pairs at all LENGTHS
    # the weight alone
    "Added when five seeds of the co-primary endpoints were known": (
        ("told-w", "flow-as-told-w"),
        ("flow-as-told-w", "eqm"),
    ),
    # the draw of gamma alone
    "Added when three seeds of *flow-logit-normal* were known": (
        ("flow-logit-normal", "flow"),
        ("flow-logit-normal", "eqm"),
    ),
}
FORCED_PAIRS = (("told-w-forced", "eqm-forced"), ("flow-forced", "eqm-forced"))
GIVEN = {  # task: flags of sample_gd.py
    "8 of 16 frames given": "--given-frames 0-7",
    "4 + 4 of 16 frames given": "--given-frames 0-3,12-15",
}
EQUAL = {16: 3, 32: 8}  # points
PRECISIONS = "bf16", "fp32"  # what is fastest depends on the machine
RMSE_RATIO = lab.Column(
    "RMSE to the nearest training clip / of held-out clips", "rmse_ratio", factor=1, digits=2
)
PSNR_GAIN = lab.Column("PSNR gain over repeating the last given frame (dB)", "psnr_gain", factor=1)


def frames_task(frames):
    return f"{frames} frames, {USUAL} evaluations"


def count_task(count):
    return f"16 frames, {count} evaluations"


def solver_task(frames):
    return f"{frames_task(frames)}, by a solver"


PRIMARY_TASKS = [*map(frames_task, PRIMARY_FRAMES)]


def tuning_task(name, way):
    """The name of a task of tuning, by one of the ways to sample."""
    return f"{name}, {way_name(way)}"


def way_name(way):
    return way if way in SOLVERS else "ngd"


def takes(way, evaluations):
    """Whether a way can take so many evaluations; Heun's method takes an odd number."""
    return way != "heun" or evaluations % 2 == 1


def way_task(number, way, count, more="", **settings):
    """The task of a way to sample with a configuration: (flags of sample_gd.py, metrics)."""
    configuration = CONFIGURATIONS[number]
    if way in SOLVERS:
        more += f" --solver-shift {configuration.solver_shift:g}"
    settings = {"guidance": configuration.guidance} | settings
    return make_task(way, count, more=more, **settings)


def precision_of(args, seed):
    """--precision of the runs of a seed: that of its run of eqm, with which they are compared, else
    what is fastest on this machine.
    """
    rows = lab.read_rows(Path(args.out, "control.json"))
    of_eqm = lab.rows_with({"objective": "eqm", "seed": seed}, rows)
    return of_eqm[0]["precision"] if of_eqm else lab.PRECISION


def make_run(args, name, number, seed, tasks, table):
    """The run of an arm with a configuration and a seed."""
    configuration = CONFIGURATIONS[number]
    arm = ARMS[name]
    flags = f"--objective {arm.objective} {arm.flags} {configuration.training_flags(arm.objective)}"
    return shapes_run(
        args,
        table=table,
        about={"objective": name, "configuration": number, "seed": seed},
        tasks=tasks,
        flags=flags,
        more={"settings": asdict(configuration)},
        precision=precision_of(args, seed),
    )


def tuning_run(args, name, number, seed, counts=()):
    """The run that measures all ways to sample an arm with a configuration.

    counts: other numbers of evaluations than the usual one, which are measured, too.
    """
    clips = size_of(args).fewer
    tasks = {}
    for way in ARMS[name].ways:
        usual = partial(way_task, number, way, clips)
        for frames in PRIMARY_FRAMES:
            tasks[tuning_task(frames_task(frames), way)] = usual(frames=frames)
        for count in counts:
            if takes(way, count):
                tasks[tuning_task(count_task(count), way)] = usual(evaluations=count)
    return make_run(
        args,
        name,
        number=number,
        seed=seed,
        tasks=tasks,
        table="control_tuning",
    )


def main_run(args, name, seed, tuning):
    """The run of an arm with what tuning chose. tuning: the rows of the tuning runs."""
    tuned_as = ARMS[name].tuned_as or name
    number, way = choose(tuning, tuned_as)
    if ARMS[name].is_forced:
        tasks = given_tasks(args, number, way)
    else:
        ways = {count: choose_way(tuning, tuned_as, number, count) for count in COUNTS}
        tasks = main_tasks(args, number, way, ways)
        if way not in SOLVERS:  # so that the objectives can be compared with like samplers
            solver = choose_solver(tuning, tuned_as, number)
            for frames in PRIMARY_FRAMES:
                clips = size_of(args).clips
                tasks[solver_task(frames)] = way_task(number, solver, clips, frames=frames)
    return make_run(
        args,
        name,
        number=number,
        seed=seed,
        tasks=tasks,
        table="control",
    )


def main_tasks(args, number, way, ways):
    """{name: (flags of sample_gd.py, metrics)} of an arm. ways: {number of evaluations: way}."""
    size = size_of(args)
    usual = partial(way_task, number, way)
    tasks = {
        frames_task(16): usual(size.clips, metrics=("motion", "nearest")),
        frames_task(32): usual(size.clips, frames=32),
        frames_task(24): usual(size.fewer, frames=24),
        "16 frames, no guidance": usual(size.fewer, guidance=1),
    }
    for count, best in ways.items():
        tasks[count_task(count)] = way_task(number, best, count=size.fewer, evaluations=count)
    return tasks


def given_tasks(args, number, way):
    """What main_tasks returns, of an arm that is forced: a clip per test video."""
    _, test = data_of(args)
    tasks = {}
    for task, flags in GIVEN.items():
        flags += f" --given {test} --given-split all --no-keep-background"
        count = size_of(args).clips
        tasks[task] = way_task(number, way, count, more=flags, metrics=("prediction",))
    return tasks


def tuned_mean(rows, case, tasks):
    """The share of right clips (%), the mean over tuning seeds and tasks; None if one is missing.

    case: (arm, number of the configuration, way). No clip of a model that diverged is right.
    """
    name, number, way = case
    of_arm = lab.rows_with({"objective": name, "configuration": number}, rows)
    values = []
    for task, row in itertools.product(tasks, of_arm):
        task = tuning_task(task, way)
        if task in row["values"]:
            values.append(BOTH_RIGHT.of(task).number(row) or 0.0)
    is_complete = len(values) == len(TUNING_SEEDS) * len(tasks)
    # rounded, so that ties are ties
    return round(sum(values) / len(values), 6) if is_complete else None


def choose(rows, name):
    """(number of the configuration, way) of an arm that did best on the tuning seeds.

    Raises UserError if tuning runs are missing.
    """
    means = {}
    for number, way in itertools.product(range(len(CONFIGURATIONS)), ARMS[name].ways):
        means[number, way] = tuned_mean(rows, (name, number, way), PRIMARY_TASKS)
    return best_of(means, name)


def choose_way(rows, name, number, count):
    """The way that did best on the tuning seeds with so many evaluations and a configuration.

    Raises UserError if it was not measured.
    """
    means = {}
    for way in ARMS[name].ways:
        if takes(way, count):
            means[way] = tuned_mean(rows, (name, number, way), [count_task(count)])
    return best_of(means, name)


def choose_solver(rows, name, number):
    """The solver that did best on the tuning seeds with a configuration."""
    means = {way: tuned_mean(rows, (name, number, way), PRIMARY_TASKS) for way in SOLVERS}
    return best_of(means, name)


def best_of(means, name):
    if None in means.values():
        raise UserError(f"--arms {name}: its tuning is not complete; run with --tune first")
    return max(means, key=means.get)


def tuning_markdown(rows):
    lines = lab.heading(
        "Tuning of the control",
        "`scripts/studies/control.py --tune` wrote this table. Cells: directions and shapes both "
        f"right (%), the mean over {len(PRIMARY_FRAMES)} lengths and {len(TUNING_SEEDS)} seeds; "
        f"bold: chosen. {len(rows)} of {len(TUNED) * len(CONFIGURATIONS) * len(TUNING_SEEDS)} runs "
        f"are done. clip: in units of eqm's gradients; 0 is off. {lab.made_with(rows)}",
    )
    cells = []
    for name in TUNED:
        best = best_so_far(rows, name)
        for number, configuration in enumerate(CONFIGURATIONS):
            texts = []
            for way in ARMS[name].ways:
                mean = tuned_mean(rows, (name, number, way), PRIMARY_TASKS)
                if mean is not None:
                    mark = "**" if (number, way) == best else ""
                    texts.append(f"{way_name(way)} {mark}{mean:.1f}{mark}")
            settings = [f"{value:g}" for value in asdict(configuration).values()]
            cells.append([name, *settings, "; ".join(texts) or "-"])
    titles = ["arm", "learning rate x", "clip", "training shift", "solver shift", "guidance"]
    return lines + lab.table([*titles, "both right (%)"], cells)


def best_so_far(rows, name):
    try:
        return choose(rows, name)
    except UserError:
        return None


def markdown(rows):
    seeds = Counter(row["objective"] for row in rows)
    counts = ", ".join(f"{name} {count}" for name, count in seeds.items())
    lines = lab.heading(
        "The control",
        "`scripts/studies/control.py` wrote these tables. Cells: directions and shapes both right "
        f"(%), the mean over seeds ({counts}), and the range. {USUAL} evaluations unless said "
        "otherwise. Tuning chose the sampler of each arm, also for each other number of "
        "evaluations. *By a solver* replaces a descent by the best solver. RMSE: to the nearest "
        "training clip, relative to that of held-out clips. Differences pair runs with the same "
        f"seed and precision. {lab.made_with(rows)}",
    )
    abouts = {name: {"objective": name} for name in ARMS}
    forced = [name for name, arm in ARMS.items() if arm.is_forced]
    others = [name for name in ARMS if name not in forced]
    columns = {task: BOTH_RIGHT.of(task) for task in lab.tasks_of(rows) if task not in GIVEN}
    columns[RMSE_RATIO.title] = RMSE_RATIO.of(frames_task(16))
    gains = {f"{task}: {PSNR_GAIN.title}": PSNR_GAIN.of(task) for task in GIVEN}
    values = {}
    for title, column in (columns | gains).items():
        values[title] = {}
        for name, about in abouts.items():
            values[title][name] = scores(rows, about, column)
    for frames in PRIMARY_FRAMES:
        if by_solver := values.get(solver_task(frames)):
            for name, usual in values[frames_task(frames)].items():
                by_solver[name] = by_solver[name] or usual
    for names, shown in ((others, columns), (forced, gains)):
        digits = {title: column.digits for title, column in shown.items()}
        lines += lab.seed_table(names, digits, values)
    primary = [*itertools.product(PRIMARY_TASKS, PRIMARY)]
    secondary = [*itertools.product(columns, SECONDARY)]
    secondary = [compared for compared in secondary if compared not in primary]
    secondary += itertools.product(gains, FORCED_PAIRS)
    lines += ["## Co-primary endpoints", "", *compare(values, primary), "", *equality(values), ""]
    lines += ["## Secondary", "", *compare(values, secondary), ""]
    for heading, pairs in ADDED.items():
        added = itertools.product(map(frames_task, LENGTHS), pairs)
        lines += [f"## {heading}", "", *compare(values, added), ""]
    return lines[:-1]


def scores(rows, about, column):
    """{(seed, precision): number} of an arm. Both are paired, because rounding changes results."""
    numbers = {}
    for precision in PRECISIONS:
        of_seeds = scores_by_seed(rows, about | {"precision": precision}, column)
        for seed, number in of_seeds.items():
            numbers[seed, precision] = number
    return numbers


def equality(values):
    """Lines that say which co-primary pairs are equal."""
    bounds = " and ".join(f"{points} points at {frames} frames" for frames, points in EQUAL.items())
    lines = [f"Two arms are equal if the interval lies within {bounds}:", ""]
    for (frames, points), pair in itertools.product(EQUAL.items(), PRIMARY):
        gaps, _ = lab.gaps_of(values.get(frames_task(frames), {}), pair)
        if len(gaps) > 1:
            is_equal = abs(statistics.mean(gaps)) + half95(gaps) <= points
            verdict = "equal" if is_equal else "not shown to be equal"
            lines.append(f"- {frames} frames, {' and '.join(pair)}: {verdict}.")
    return lines


def compare(values, compared):
    """Lines about (title of a column, pair of arms), by Holm over all of them."""
    return lab.compare([(values.get(title, {}), pair, title, 2) for title, pair in compared])


def draw(rows, path):
    """Draw the clips of each length that are right, of the tuned arms, with 95% intervals over
    seeds. An arm with a single seed has no interval, and is not drawn.
    """
    from scoring import plots  # matplotlib loads slowly

    figure, axes = plots.plt.subplots()
    styles = zip(TUNED, plots.COLORS, plots.MARKERS, strict=False)
    for index, (name, color, marker) in enumerate(styles):
        points = []
        for frames in LENGTHS:
            column = BOTH_RIGHT.of(frames_task(frames))
            shares = [*scores_by_seed(rows, {"objective": name}, column).values()]
            if len(shares) > 1:
                x = frames + 0.3 * (index - (len(TUNED) - 1) / 2)  # intervals don't overlap
                points.append((x, statistics.mean(shares), half95(shares)))
        if points:
            axes.errorbar(*zip(*points, strict=True), color=color, marker=marker, label=name)
    axes.set(xlabel="frames", ylabel="both right (%)", xticks=LENGTHS)
    axes.set_ylim(top=101)  # intervals of few seeds go beyond 100%
    axes.legend()
    plots.save_figure(figure, path)


def tune(args):
    """Measure all configurations; then, of the best one, the ways for other numbers of
    evaluations.
    """
    began = time.monotonic()
    names = [name for name in TUNED if name in args.arms]
    runs = []
    for number, seed, name in itertools.product(range(8), TUNING_SEEDS, names):
        runs.append(tuning_run(args, name, number, seed))
    lab.run_study(args, runs, tuning_markdown)
    rows = runs[0].rows()
    runs = []
    for name, seed in itertools.product(names, TUNING_SEEDS):
        if best := best_so_far(rows, name):
            number, _ = best
            runs.append(tuning_run(args, name, number, seed, COUNTS))
    if runs:
        minutes = args.minutes - (time.monotonic() - began) / 60
        lab.run_study(Namespace(**vars(args) | {"minutes": minutes}), runs, tuning_markdown)


def parse_args():
    parser = lab.study_parser(__doc__, "objectives", seeds=[*SEEDS], tunes=True, arms=ARMS)
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if args.tune:
        tune(args)
        return
    cases = []
    for seed, name in itertools.product(args.seeds, args.arms):
        if seed in SEEDS[: ARMS[name].seeds]:
            cases.append((seed, name))
    runs = lab.tuned_runs(args, "control_tuning", cases, main_run)
    lab.run_study(args, runs, markdown)
    rows = runs[0].rows()
    if rows and not args.list:
        draw(rows, Path(args.out, "control.png"))


if __name__ == "__main__":
    main()
