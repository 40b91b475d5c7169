"""Why does EqM win? Six arms that differ in target, weight and whether gamma is told.

    python scripts/studies/control.py --tune                   8 configurations of each arm, 2 seeds
    python scripts/studies/control.py --arms eqm flow told-w   the main runs of these arms

Each arm trains on the recommended curriculum of study.py, with the configuration and the sampler
that did best on the tuning seeds, which do not count. All arms are tuned with the same
configurations. The co-primary endpoints are fixed: clips whose direction and shape are both right,
at 16 and at 32 frames, with 15 evaluations; told-w against eqm, and flow against eqm, by Holm over
the four. Two arms are equal if the 95% interval lies within EQUAL points.

A run takes about 5 minutes of two cores. The script writes control.md and .json in
results/studies/objectives, with --tune control_tuning.md and .json. Models, samples and scores are
in its folder control (see lab.py).
"""

import itertools
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lab
from arms import PATH_LENGTH
from objectives import BOTH_RIGHT, USUAL, ShapesRun, make_task, num_clips
from runtime.cli import UserError, one_line_errors
from samplers import SOLVERS


@dataclass(frozen=True)
class Configuration:
    """What is tuned. learning_rate: a factor of both rates; clip_grad: 0 = off."""

    learning_rate: float
    clip_grad: float
    gamma_shift: float
    solver_shift: float
    guidance: float

    def training_flags(self):
        return (
            f"--lr {0.002 * self.learning_rate:g} --muon-lr {0.01 * self.learning_rate:g} "
            f"--clip-grad {self.clip_grad:g} --gamma-shift {self.gamma_shift:g}"
        )


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
    flags: str  # of train.py
    seeds: int
    ways: tuple = SOLVERS  # of sampling
    tuned_as: str = ""  # the arm whose configuration it takes; "" = its own


WAYS = {"ngd": PATH_LENGTH, "euler": "euler", "heun": "heun"}  # as in objectives.sampling
ARMS = {
    "eqm": Arm("--objective eqm", seeds=16, ways=("ngd", *SOLVERS)),
    "flow": Arm("--objective flow", seeds=16),
    "told-w": Arm("--objective told-w", seeds=16),
    "blind-w": Arm("--objective blind-w", seeds=8),
    "told-c": Arm("--objective told-c", seeds=8),
    "blind": Arm("--objective blind", seeds=3),
    "told-4": Arm("--objective told-4", seeds=3, tuned_as="flow"),
    "flow-logit-normal": Arm(
        "--objective flow --gamma-draw logit-normal", seeds=3, tuned_as="flow"
    ),
    "told-w-logit-normal": Arm(
        "--objective told-w --gamma-draw logit-normal", seeds=3, tuned_as="told-w"
    ),
}
CONFIGURATIONS = draw_configurations(8)
TUNING_SEEDS = (100, 101)
PRIMARY_FRAMES = (16, 32)
COUNTS = (2, 4, 8, 30)  # other numbers of evaluations
PRIMARY = (("told-w", "eqm"), ("flow", "eqm"))
SECONDARY = (("blind-w", "eqm"), ("told-c", "eqm"), ("blind", "eqm"))
EQUAL = {16: 3, 32: 8}  # points
RMSE_RATIO = lab.Column("rmse_ratio", 1, 2)


def frames_task(num_frames):
    return f"{num_frames} frames, {USUAL} evaluations"


def count_task(count):
    return f"16 frames, {count} evaluations"


class ControlRun(ShapesRun):
    """A model of an arm with a configuration and a seed."""

    def __init__(self, args, name, number, seed, tasks, table):
        super().__init__(
            args,
            study="control",
            about={
                "objective": name,
                "configuration": number,
                "seed": seed,
            },
            flags=f"{ARMS[name].flags} {CONFIGURATIONS[number].training_flags()}",
            tasks=tasks,
            table=table,
        )

    def row(self):
        return super().row() | {"settings": asdict(CONFIGURATIONS[self.about["configuration"]])}


def way_task(way, configuration, evaluations, count, **settings):
    """The task of a way to sample: (flags of sample_gd.py, metrics)."""
    shift = f"--solver-shift {configuration.solver_shift:g}" if way in SOLVERS else ""
    settings = {"guidance": configuration.guidance} | settings
    return make_task(
        WAYS[way],
        evaluations=evaluations,
        count=count,
        more=shift,
        **settings,
    )


def takes(way, evaluations):
    """Whether a way can take so many evaluations; Heun's method takes an odd number."""
    return way != "heun" or evaluations % 2 == 1


def tuning_run(args, name, number, seed):
    """The run that measures all ways to sample an arm with a configuration."""
    _, clips = num_clips(args)
    configuration = CONFIGURATIONS[number]
    tasks = {}
    for way in ARMS[name].ways:
        for num_frames in PRIMARY_FRAMES:
            tasks[f"{frames_task(num_frames)}, {way}"] = way_task(
                way, configuration, evaluations=USUAL, count=clips, num_frames=num_frames
            )
        for count in COUNTS:
            if takes(way, count):
                tasks[f"{count_task(count)}, {way}"] = way_task(
                    way, configuration, evaluations=count, count=clips
                )
    return ControlRun(args, name, number, seed, tasks=tasks, table="control_tuning")


def main_run(args, name, seed, tuning):
    """The run of an arm with what tuning chose. tuning: the rows of the tuning runs."""
    clips, fewer = num_clips(args)
    tuned_as = ARMS[name].tuned_as or name
    number, way = choose(tuning, tuned_as)
    configuration = CONFIGURATIONS[number]
    tasks = {}
    for num_frames in (*PRIMARY_FRAMES, 24):
        metrics = ("motion", "nearest") if num_frames == 16 else ("motion",)
        tasks[frames_task(num_frames)] = way_task(
            way,
            configuration,
            evaluations=USUAL,
            count=clips if num_frames in PRIMARY_FRAMES else fewer,
            num_frames=num_frames,
            metrics=metrics,
        )
    tasks["16 frames, no guidance"] = way_task(
        way, configuration, evaluations=USUAL, count=fewer, guidance=1
    )
    for count in COUNTS:
        tasks[count_task(count)] = way_task(
            choose_way(tuning, tuned_as, number, count_task(count)),
            configuration,
            evaluations=count,
            count=fewer,
        )
    return ControlRun(args, name, number, seed, tasks=tasks, table="control")


def tuned_values(rows, name, number, task):
    """The share of right clips of a tuning task, in percent, for each tuning seed."""
    column = replace(BOTH_RIGHT, task=task)
    about = {"objective": name, "configuration": number}
    return list(lab.by_seed(rows, about, column).values())


def tuned_mean(rows, name, number, way):
    """The mean over tuning seeds and primary lengths; None if a run is missing."""
    values = []
    for num_frames in PRIMARY_FRAMES:
        task = f"{frames_task(num_frames)}, {way}"
        values += tuned_values(rows, name, number, task)
    complete = len(values) == len(PRIMARY_FRAMES) * len(TUNING_SEEDS)
    return sum(values) / len(values) if complete else None


def choose(rows, name):
    """(number of the configuration, way) of an arm that did best on the tuning seeds.

    Raises UserError if tuning runs are missing.
    """
    means = {}
    for number, way in itertools.product(range(len(CONFIGURATIONS)), ARMS[name].ways):
        means[number, way] = tuned_mean(rows, name, number, way)
    if None in means.values():
        raise UserError(f"--arms {name}: its tuning is not complete; run with --tune first")
    return max(means, key=means.get)


def choose_way(rows, name, number, task):
    """The way that did best on the tuning seeds in a task, with the chosen configuration."""
    means = {}
    for way in ARMS[name].ways:
        values = tuned_values(rows, name, number, f"{task}, {way}")
        if values:
            means[way] = sum(values) / len(values)
    return max(means, key=means.get)


def tuning_markdown(rows):
    lines = lab.heading(
        "Tuning of the control",
        "`scripts/studies/control.py --tune` wrote this table. Cells: directions and shapes both "
        f"right (%), the mean over {len(PRIMARY_FRAMES)} lengths and {len(TUNING_SEEDS)} seeds; "
        "bold: chosen.",
    )
    cells = []
    for name, arm in ARMS.items():
        if arm.tuned_as:
            continue
        best = best_so_far(rows, name)
        for number, configuration in enumerate(CONFIGURATIONS):
            texts = []
            for way in arm.ways:
                mean = tuned_mean(rows, name, number, way)
                if mean is not None:
                    mark = "**" if (number, way) == best else ""
                    texts.append(f"{way} {mark}{mean:.1f}{mark}")
            settings = [f"{value:g}" for value in asdict(configuration).values()]
            cells.append([name, *settings, "; ".join(texts) or "-"])
    titles = ["arm", "learning rate x", "clip", "training shift", "solver shift", "guidance"]
    return lines + lab.table([*titles, "both right (%)"], cells)


def best_so_far(rows, name):
    try:
        return choose(rows, name)
    except UserError:
        return None


def values_of(rows, task, column=BOTH_RIGHT):
    """{arm: {seed: value}} of a task."""
    column = replace(column, task=task)
    return {name: lab.by_seed(rows, {"objective": name}, column) for name in ARMS}


def markdown(rows):
    lines = lab.heading(
        "Why EqM wins",
        "`scripts/studies/control.py` wrote these tables. Cells: directions and shapes both right "
        f"(%), the mean over seeds, and the range. {USUAL} evaluations unless said otherwise.",
    )
    tasks = dict.fromkeys(itertools.chain.from_iterable(row["values"] for row in rows))
    tasks.pop("", None)
    values = {task: values_of(rows, task) for task in tasks}
    lines += lab.seed_table(ARMS, dict.fromkeys(tasks, BOTH_RIGHT), values)
    title = "RMSE to the nearest training clip / of held-out clips"
    ratios = {title: values_of(rows, frames_task(16), RMSE_RATIO)}
    lines += lab.seed_table(ARMS, {title: RMSE_RATIO}, ratios)
    primary = []
    for num_frames, pair in itertools.product(PRIMARY_FRAMES, PRIMARY):
        task = frames_task(num_frames)
        primary.append(lab.difference(values_of(rows, task), pair, what=task, digits=2))
    lines += ["", "## Co-primary endpoints", "", *lab.difference_lines(primary)]
    bounds = " and ".join(f"{points} points at {frames} frames" for frames, points in EQUAL.items())
    lines += ["", f"Two arms are equal if the interval lies within {bounds}.", ""]
    secondary = []
    for task, pair in itertools.product(tasks, (*PRIMARY, *SECONDARY)):
        is_primary = pair in PRIMARY and task in map(frames_task, PRIMARY_FRAMES)
        if not is_primary:
            secondary.append(lab.difference(values[task], pair, what=task, digits=2))
    return [*lines, "## Secondary", "", *lab.difference_lines(secondary)]


def parse_args():
    most = max(arm.seeds for arm in ARMS.values())
    parser = lab.study_parser(__doc__, "objectives", seeds=[*range(most)])
    parser.add_argument(
        "--tune",
        action="store_true",
        help="try all configurations on the tuning seeds, instead of the main runs",
    )
    parser.add_argument(
        "--arms",
        choices=ARMS,
        nargs="+",
        default=[*ARMS],
        metavar="ARM",
        help=f"of {', '.join(ARMS)}; default: all",
    )
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    tuning = lab.read_rows(Path(args.out, "control_tuning.json"))
    runs = []
    if args.tune:
        tuned = [name for name in args.arms if not ARMS[name].tuned_as]
        for number, seed, name in itertools.product(
            range(len(CONFIGURATIONS)), TUNING_SEEDS, tuned
        ):
            runs.append(tuning_run(args, name, number, seed))
    else:
        for seed, name in itertools.product(args.seeds, args.arms):
            if seed < ARMS[name].seeds:
                runs.append(main_run(args, name, seed, tuning))
    lab.run_all(runs)
    rows = lab.read_rows(runs[0].out)
    lines = tuning_markdown(rows) if args.tune else markdown(rows)
    lab.write_results(args.out, runs[0].out.stem, lines)


if __name__ == "__main__":
    main()
