"""Do students sample in two to four evaluations what their teacher samples in 15 guided ones?

    python scripts/studies/few.py --tune       configurations of two arms, on another seed
    python scripts/studies/few.py              5 seeds of all arms

A student trains on samples of a teacher, each with its own noise (docs/few-steps.md). The teachers
follow the recommended curriculum of study.py, and also learn to complete given frames and to heal
regions. The other arms change one thing each: see ARMS. The arms "pairs" and "independent noise"
are tuned with the same configurations; the others take those of "pairs". The endpoints are fixed:
clips whose direction and shape are both right, by 1, 2 and 4 evaluations of the student without
guidance, minus 15 guided ones of its teacher. Holm's correction is over the endpoints of an arm, so
it does not depend on how many arms are done.

"The second round" trains on samples of the students "pairs", so for twice as many steps in all.
"told" has the settings of "pairs", except that clipping is in units of eqm's gradients (see
control.py).

A teacher takes about 23 minutes of one core with its samples, a student 10. The script writes
few.md and .json in results/studies/few, with --tune few_tuning.md and .json. Models, samples and
scores are in its folder runs (see lab.py).
"""

import itertools
import json
from collections import Counter
from dataclasses import asdict, dataclass

import lab

# isort: split
import numpy as np
import torch

import checkpoint
import disturb
from control import loss_scale
from make_moving_shapes import COLORS
from runtime.atomic import write_file
from runtime.cli import UserError, one_line_errors
from runtime.rng import normal
from samplers import SOLVERS
from shapes import (
    BOTH_RIGHT,
    GUIDANCE,
    PATH_LENGTH,
    USUAL,
    config_of,
    data_of,
    make_task,
    scores_by_seed,
    shapes_run,
    size_of,
)
from shapes_tracker import look, track
from vae import VAE
from video.clips import Clips
from video.samples import class_names, read_samples
from video.source import open_source

RECIPE = lab.ROOT / "scripts/recipes/few.txt"
BATCH = 12  # clips per step, as in the recipe
SKILLS = "--forcing 0.5 --forcing-regions 0.1"  # of teachers, and of real clips among pairs
FRAMES = (16, 24, 32)
COUNTS = (1, 2, 4, 8, USUAL)  # evaluations
GIVEN_COUNTS = (4, USUAL)
MAIN = 4  # evaluations of a student
CLOSER = (1, 2, MAIN, USUAL)  # evaluations at which recall and copies are measured, too
CELLS = 3  # recall: rows and columns of start positions
PAIRS = "pairs"  # the samples of a model that students train on
CHEAP = "pairs by 8 Euler steps"
TRACKED = "pairs that the tracker accepts"
PAIRS_SEED = 1000  # plus the seed of the run: other noise than that of scored samples
SECOND_SEED = 2000  # the same, of the second round
REAL_SHARE = 0.3  # of the clips
# passes of the network for a sample of a teacher, and of a student
PASSES = {PAIRS: 2 * USUAL, TRACKED: 2 * USUAL, CHEAP: 2 * 8}
PASSES_AGAIN = 8
TOLD = f"--clip-grad {loss_scale('told-w'):g}"


@dataclass(frozen=True)
class Teacher:
    flags: str  # of train.py
    way: float | str  # path length of the descent, or solver


@dataclass(frozen=True)
class Arm:
    flags: str = ""  # of train.py, in addition to the recipe
    teacher: str = "teacher"
    pairs: str = PAIRS  # the samples that it trains on
    has_real: bool = False
    tuned_as: str = "pairs"


TEACHERS = {
    "teacher": Teacher(f"{SKILLS} --gamma-shift 1", PATH_LENGTH),
    "told teacher": Teacher(f"--forcing 0.5 --objective told-w --gamma-shift 1 {TOLD}", "heun"),
}
ARMS = {
    "pairs": Arm(),
    "independent noise": Arm("--pairs independent", tuned_as="independent noise"),
    "real clips": Arm(f"{SKILLS} --frame-interval 1 2", has_real=True),
    "accepted pairs": Arm(pairs=TRACKED),
    "no pure noise": Arm("--pure-noise 0"),
    "cheap pairs": Arm(pairs=CHEAP),
    "second round": Arm(teacher="pairs"),
    "told": Arm(TOLD, teacher="told teacher"),
}
TUNED = [name for name, arm in ARMS.items() if arm.tuned_as == name]
TUNING_SEEDS = (100,)


@dataclass(frozen=True)
class Configuration:
    """What is tuned. learning_rate: a factor of both rates of the recipe."""

    learning_rate: float
    gamma_shift: float

    def training_flags(self):
        return (
            f"--lr {0.001 * self.learning_rate:g} --muon-lr {0.005 * self.learning_rate:g} "
            f"--gamma-shift {self.gamma_shift:g}"
        )


CONFIGURATIONS = [
    Configuration(rate, shift) for rate, shift in itertools.product((0.5, 1, 2), (1, 3))
]


@dataclass(frozen=True)
class Size:
    pairs: int = 1152
    steps: int = 600  # of a student


def student_size(args):
    return Size(pairs=12, steps=2) if args.miniature else Size()


# Runs ---------------------------------------------------------------------------------------------


def task_of(frames, count):
    return f"{frames} frames, {count} evaluations"


def given_task(count):
    return f"8 of 16 given, {count} evaluations"


@dataclass(eq=False)
class Model(lab.Run):
    """A teacher. Its row also has what this script measures: healing and recall."""

    guidance: float = GUIDANCE
    num_clips: int = 0  # of the values that this script measures

    def row(self):
        row = super().row()
        values = row["values"]
        usual = task_of(16, USUAL)
        if usual in values:  # not in tuning
            _, test = self.data
            for task in [task_of(16, count) for count in CLOSER if count in COUNTS]:
                values[task]["recall"] = recall(self.path(task).parent, test, self.num_clips)
            values[disturb.LEFT] = heal(self, self.path(usual).parent)
        return row


@dataclass(eq=False)
class Student(Model):
    """A run that needs the samples of another one, its teacher."""

    teacher: Model | None = None
    pairs: str = PAIRS
    cost: float = 0.0  # FLOPs of all pairs and students over those of the teacher's training

    def make_data(self):
        super().make_data()
        with lab.file_lock(self.teacher.folder / "lock"):
            if self.teacher.checkpoint() is None and self.teacher.has_row:
                raise UserError(
                    f"{self.teacher.folder}: the model of a row in {self.teacher.out} is gone; to "
                    "add arms, train all of them in another folder (--out)"
                )
            if self.teacher.checkpoint() is None or not self.teacher.is_sampled:
                self.teacher.run()
            accepted = self.teacher.path(TRACKED).parent
            if self.pairs == TRACKED and not self.teacher.path(TRACKED).exists():
                select_right(self.teacher.path(PAIRS).parent, accepted)

    def train(self):
        if "--ckpt" not in self.training:  # the teacher has it now
            self.training += ["--ckpt", self.teacher.checkpoint()]
        return super().train()

    def row(self):
        row = super().row()
        row["values"][""]["cost"] = self.cost
        return row


def scored_tasks(args, way, guidance):
    """{name: (flags of sample_gd.py, metrics)} of any arm; `way` is for USUAL evaluations."""
    size = size_of(args)
    _, test = data_of(args)
    tasks = {}
    for frames, count in itertools.product(FRAMES, COUNTS):
        is_closer = frames == 16 and count in CLOSER
        one = way if count == USUAL else "euler"
        tasks[task_of(frames, count)] = make_task(
            one,
            size.clips,
            evaluations=count,
            frames=frames,
            guidance=guidance,
            more=f"--window {frames} {even_steps(one)}",
            metrics=("motion", "nearest") if is_closer else ("motion",),
        )
    given = f"--given {test} --given-split all --given-frames 0-7 --no-keep-background"
    for count in GIVEN_COUNTS:
        one = way if count == USUAL else "euler"
        tasks[given_task(count)] = make_task(
            one,
            size.clips,
            evaluations=count,
            guidance=guidance,
            more=f"{given} {even_steps(one)}",
            metrics=("prediction",),
        )
    return tasks


def even_steps(way):
    """Flags, so that the steps of a solver don't follow the shift of the training, as those of an
    objective without equilibria would.
    """
    return "--solver-shift 1" if way in SOLVERS else ""


def add_pairs(args, run, seed, ways):
    """Let a run make samples to train on. ways: {task: (way, evaluations)}; seed: of the noise."""
    for task, (way, evaluations) in ways.items():
        words, _ = make_task(
            way, student_size(args).pairs, evaluations=evaluations, guidance=run.guidance
        )
        more = f"--seed {seed} --precision {lab.PRECISION} --batch-size 32"
        run.tasks[task] = (words + more.split(), ())


def teacher_run(args, name, seed):
    teacher = TEACHERS[name]
    run = shapes_run(
        args,
        table=table_of(args),
        about={"arm": name, "seed": seed},
        tasks={} if args.tune else scored_tasks(args, teacher.way, GUIDANCE),
        flags=teacher.flags,
    )
    run = Model(**vars(run), num_clips=size_of(args).clips)
    ways = {PAIRS: (teacher.way, USUAL), CHEAP: ("euler", 8)}
    add_pairs(args, run, PAIRS_SEED + seed, ways)
    return run


def table_of(args):
    return "few_tuning" if args.tune else "few"


def model_run(args, name, seed, tuning):
    """The run of a teacher, or of an arm with what tuning chose. tuning: its rows."""
    if name in TEACHERS:
        return teacher_run(args, name, seed)
    number = choose(tuning, ARMS[name].tuned_as)
    student = student_run(
        args,
        name,
        number=number,
        about={"arm": name, "seed": seed},
        tasks=scored_tasks(args, "euler", 1),
        teacher=model_run(args, ARMS[name].teacher, seed, tuning),
    )
    if name == "pairs":  # the teacher of the second round
        add_pairs(args, student, SECOND_SEED + seed, {PAIRS: ("euler", PASSES_AGAIN)})
    return student


def tuning_run(args, name, seed, number):
    """The run of an arm with one of CONFIGURATIONS."""
    tasks = scored_tasks(args, "euler", 1)
    return student_run(
        args,
        name,
        number=number,
        about={"arm": name, "seed": seed, "configuration": number},
        tasks={task: tasks[task] for task in (task_of(16, 2), task_of(16, MAIN))},
        teacher=teacher_run(args, ARMS[name].teacher, seed),
    )


def student_run(args, name, number, about, tasks, teacher):
    """The run of an arm with one of CONFIGURATIONS and the run of its teacher."""
    arm = ARMS[name]
    seed = about["seed"]
    run = shapes_run(args, table=table_of(args), about=about, tasks=tasks)
    videos, _ = run.data
    steps = student_size(args).steps
    real = []
    if arm.has_real:
        # as many pairs as the other arms, and real clips besides
        steps = round(steps / (1 - REAL_SHARE))
        real = ["--real-data", videos, "--pairs-share", 1 - REAL_SHARE]
    last_step = teacher.last_step + steps
    training = [f"@{RECIPE}", "--video", "--num-frames", 16, "--pairs", "--no-flip"]
    training += ["--data-path", teacher.path(arm.pairs).parent, "--max-steps", last_step]
    training += ["--global-seed", seed, "--precision", lab.PRECISION, "--val-every", steps, *real]
    training += CONFIGURATIONS[number].training_flags().split() + arm.flags.split()
    training += ["--compile"] * args.compile
    of_clip = config_of(size_of(args)).training_flops(16)
    flops = steps * BATCH * of_clip
    passes = PASSES[arm.pairs]
    cost = 0.0
    trained = teacher.more["flops"]
    if isinstance(teacher, Student):
        passes = PASSES_AGAIN
        cost = teacher.cost
        trained = teacher.teacher.more["flops"]
    # a training step takes about three times a pass of the network
    of_pairs = student_size(args).pairs * passes * of_clip / 3
    more = run.more | {"settings": asdict(CONFIGURATIONS[number]), "flops": flops}
    return Student(
        **vars(run) | {"training": training, "last_step": last_step, "more": more},
        guidance=1.0,
        num_clips=size_of(args).clips,
        teacher=teacher,
        pairs=arm.pairs,
        cost=cost + (flops + of_pairs) / trained,
    )


# What this script measures itself -----------------------------------------------------------------


def is_right(clip, name):
    """Whether a clip moves and looks as its class, such as "CircleLeft", says."""
    shown = track(clip)
    return name == f"{shown.shape}{shown.direction}"


@lab.one_thread()
def select_right(folder, out):
    """Write the samples of a folder that are right to another folder, with their indices."""
    about, clips, labels = read_samples(f"{folder}", folder)
    names = class_names(about["classes"], labels)
    rows = [row for row, clip in enumerate(clips) if is_right(clip, names[row])]
    if len(rows) < 2:
        raise UserError(f"{folder}: the tracker accepts {len(rows)} of its samples, expected some")
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / "samples.npz", arr_0=clips[rows], labels=labels[rows])
    write_file(out / "samples.json", json.dumps(about | {"indices": rows}).encode())


@torch.no_grad()
def heal(run, folder):
    """{"both_accuracy": share of right clips} after noise replaced the left half of every frame and
    the model descended again. folder: the clips, which are samples of the model.
    """
    model, config, _ = checkpoint.load_model(run.checkpoint())
    if not model.config.learns.has_equilibria:
        return {}
    about, clips, labels = read_samples(f"{folder}", folder)
    names = class_names(about["classes"], labels)
    right = 0
    for first in range(0, len(clips), disturb.BATCH):
        rows = range(first, min(first + disturb.BATCH, len(clips)))
        pixels = torch.from_numpy(np.array(clips[rows.start : rows.stop]))
        x = VAE("none").encode(pixels.permute(0, 4, 1, 2, 3))  # (B, C, T, H, W)
        noise = normal(0, "disturb", 0, rows, x.shape[1:])
        mask = disturb.regions(x.shape, first)[disturb.LEFT]
        x = disturb.descend(
            model,
            torch.where(mask, noise, x),
            labels=torch.from_numpy(np.array(labels[rows.start : rows.stop])),
            evaluations=disturb.AGAIN,
            training={
                "cfg_scale": run.guidance,
                "stepsize": PATH_LENGTH / USUAL,
                "mu": config["training"]["mu"],
            },
        )
        healed = VAE("none").decode(x).numpy()
        right += sum(is_right(clip, names[row]) for row, clip in zip(rows, healed, strict=True))
    return {"both_accuracy": right / len(clips)}


def places_of(clips):
    """Counter of the (color, row, column) where the object of a clip is at first.

    Clips without one object do not count.
    """
    places = Counter()
    colors = {name: np.array(color) for name, color in COLORS.items()}
    for clip in clips:
        try:
            centers, _, _, color = look(clip)
        except ValueError:
            continue
        nearest = min(colors, key=lambda name: np.linalg.norm(colors[name] - color))
        column, row = (centers[0] * CELLS // clip.shape[1]).astype(int).tolist()
        places[nearest, row, column] += 1
    return places


def overlap(places, real):
    """The share of the real clips that other clips cover: sum over places of the smaller share.

    places, real: (Counter, number of clips).
    """
    counts, total = places
    real_counts, real_total = real
    return sum(min(counts[key] / total, real_counts[key] / real_total) for key in real_counts)


def recall(folder, test, num_clips):
    """How much of the colors and start positions of real clips the samples in a folder cover.

    Samples that do not show one object do not count, so this is not another accuracy.
    """
    _, clips, _ = read_samples(f"{folder}", folder)
    size = clips.shape[2]
    source = open_source(str(test), size)
    stream = Clips(
        source,
        source.videos(),
        clips.shape[1],
        flip=False,
        stream="recall",
    )
    real = [stream[index]["clip"].permute(1, 2, 3, 0).numpy() for index in range(num_clips)]
    places = places_of(clips)
    return overlap((places, max(1, places.total())), (places_of(real), len(real)))


# Tuning -------------------------------------------------------------------------------------------


def tuned_mean(rows, name, number):
    """The share of right clips (%) with MAIN evaluations, the mean over the tuning seeds; None if a
    run is missing.
    """
    of_arm = lab.rows_with({"arm": name, "configuration": number}, rows)
    values = [BOTH_RIGHT.of(task_of(16, MAIN)).number(row) or 0.0 for row in of_arm]
    return sum(values) / len(values) if len(values) == len(TUNING_SEEDS) else None


def choose(rows, name):
    """The number of the configuration of an arm that did best.

    Raises UserError if a run is missing.
    """
    means = {number: tuned_mean(rows, name, number) for number in range(len(CONFIGURATIONS))}
    if None in means.values():
        raise UserError(f"--arms: the tuning of {name} is not complete; run with --tune first")
    return max(means, key=means.get)


def tuning_markdown(rows):
    lines = lab.heading(
        "Tuning of students",
        "`scripts/studies/few.py --tune` wrote this table. Cells: directions and shapes both right "
        f"(%) with {MAIN} evaluations, of {len(TUNING_SEEDS)} seed.",
    )
    cells = []
    for name, (number, configuration) in itertools.product(TUNED, enumerate(CONFIGURATIONS)):
        mean = tuned_mean(rows, name, number)
        settings = [f"{value:g}" for value in asdict(configuration).values()]
        cells.append([name, *settings, "-" if mean is None else f"{mean:.1f}"])
    return lines + lab.table(["arm", "learning rate x", "training shift", "both right (%)"], cells)


# Tables -------------------------------------------------------------------------------------------

GAIN = lab.Column("PSNR gain, 8 of 16 given (dB)", "psnr_gain", 1, task=given_task(MAIN))
HEALS = lab.Column("left half heals (%)", "both_accuracy", task=disturb.LEFT)
RECALL = lab.Column("recall (%)", "recall", task=task_of(16, MAIN))
OTHERS = (
    GAIN,
    HEALS,
    RECALL,
    lab.Column(f"recall, {USUAL} evaluations (%)", "recall", task=task_of(16, USUAL)),
    lab.Column("RMSE to the nearest training clip", "rmse", 1, 2, task=task_of(16, MAIN)),
    lab.Column("FLOPs / the teacher's training", "cost", 1, 2),
)


def markdown(rows):
    lines = lab.heading(
        "Students",
        "`scripts/studies/few.py` wrote these tables. Cells: directions and shapes both right (%), "
        "the mean over seeds, and the range. Teachers are guided, so each of their evaluations "
        "takes two passes of the network. Students are not.",
    )
    arms = {name: {"arm": name} for name in (*TEACHERS, *ARMS)}
    for frames in FRAMES:
        columns = []
        for count in COUNTS:
            columns.append(lab.Column(f"{count}", "both_accuracy", task=task_of(frames, count)))
        lines += [f"## {frames} frames, by evaluations", "", *lab.arm_table(rows, arms, columns)]
    lines += [f"## Other endpoints, {MAIN} evaluations", "", *lab.arm_table(rows, arms, OTHERS)]
    for name in [name for name in ARMS if lab.rows_with(arms[name], rows)]:
        lines += [f"## {name.capitalize()}, differences", ""]
        teacher = ARMS[name].teacher if ARMS[name].teacher in TEACHERS else "teacher"
        cases = []
        of_pairs = []
        for what, of_student, of_teacher in endpoints():
            values = {
                name: scores_by_seed(rows, arms[name], of_student),
                teacher: scores_by_seed(rows, arms[teacher], of_teacher),
                "pairs": scores_by_seed(rows, arms["pairs"], of_student),
            }
            cases.append((values, (name, teacher), what, 2))
            of_pairs.append((values, (name, "pairs"), what, 2))
        lines += [f"Teachers with {USUAL} evaluations:", "", *lab.compare(cases), ""]
        if name != "pairs":
            lines += ["Students with as many:", "", *lab.compare(of_pairs), ""]
    return lines


def endpoints():
    """[(what is compared, the student's Column, the teacher's Column)]"""
    compared = []
    for frames, count in ((16, 1), (16, 2), (16, MAIN), (24, MAIN), (32, MAIN)):
        compared.append((task_of(frames, count), right_at(frames, count), right_at(frames, USUAL)))
    what = f"{MAIN} evaluations"
    compared.append((f"{GAIN.title}, {what}", GAIN, GAIN.of(given_task(USUAL))))
    compared.append((HEALS.title, HEALS, HEALS))
    compared.append((f"{RECALL.title}, {what}", RECALL, RECALL.of(task_of(16, USUAL))))
    return compared


def right_at(frames, count):
    return BOTH_RIGHT.of(task_of(frames, count))


def parse_args():
    parser = lab.study_parser(__doc__, "few", seeds=[*range(5)], tunes=True, arms=ARMS)
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if args.tune:
        numbers = range(len(CONFIGURATIONS))
        tuned = [name for name in TUNED if name in args.arms]
        runs = []
        for seed, number, name in itertools.product(TUNING_SEEDS, numbers, tuned):
            runs.append(tuning_run(args, name, seed, number))
        lab.run_study(args, runs, tuning_markdown)
        return
    teachers = [ARMS[name].teacher for name in args.arms]
    cases = itertools.product(args.seeds, dict.fromkeys((*teachers, *args.arms)))
    runs = lab.tuned_runs(args, "few_tuning", cases, model_run)
    lab.run_study(args, runs, markdown)


if __name__ == "__main__":
    main()
