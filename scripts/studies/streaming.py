"""Make long videos patch by patch, or in windows? Causal models against bidirectional ones.

    python scripts/studies/streaming.py --tune     all settings, with a seed that does not count
                                                   and less compute
    python scripts/studies/streaming.py            the main runs: both ways, three seeds

Both ways train with the same data, seeds and compute, counted as `EqMConfig.flops` does: a causal
model also passes the clean clip, so it takes fewer steps. Bidirectional models train on clips of
which three of four are forced, and continue windows of 16 frames by 8; causal ones stream. Of each
way, the settings and the guidance count that did best in tuning, by the mean of both shares of
bouncing shapes. The endpoints are fixed:

- bouncing shapes, 256 frames: videos that turn at the borders only, and show one object to the end;
  CPU milliseconds per frame,
- moving shapes, 16 frames: directions and shapes both right, also with the guidance that was not
  chosen,
- moving shapes, 24 spans of 8 frames, each with a direction of its own: spans that move straight as
  asked (causal models only, as windows can't change the class). After the first runs, it showed
  that objects need some frames to turn. So spans in which the object mostly moves as asked were
  added, and more guidances.

A run takes about 10 minutes of one core, a main run of bouncing shapes 20. The script writes
streaming.md and .json in results/studies/streaming, with --tune streaming_tuning.md and .json.
Models, samples and scores are in its folder runs (see lab.py).
"""

import itertools
import math
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import lab
import shapes
from lab import Column
from runtime.cli import UserError, one_line_errors
from shapes_tracker import DIRECTIONS, MIN_TRAVEL, look, track
from video.samples import read_samples

LONG = "256 frames"
SHORT = "16 frames"
SHORT_OTHER = "16 frames, other guidance"
SPANS = "24 spans"
NUM_SPANS = 24
SPAN = 8  # frames
TURNS = ("Right", "Down", "Left", "Up")  # a square, so that the object stays in the frame
EVALUATIONS = 15  # per window or temporal patch
TUNING_EVALUATIONS = 8
GUIDANCES = (1, shapes.GUIDANCE)  # of which tuning chooses
SPAN_GUIDANCES = (1, shapes.GUIDANCE, 2)
MAX_SLANT = 0.5  # of a span: motion across the direction over motion along it, 27 degrees
TUNING_SEED = 100
FRAMES_OF_ALL = 256 * shapes.FULL.few  # of LONG


def with_guidance(text, guidance):
    return f"{text}, guidance {guidance:g}"


def span_columns():
    """The columns of spans, with each guidance."""
    columns = []
    titles = {"spans_moved": "spans that move as asked", "spans_straight": "straight"}
    for (value, title), guidance in itertools.product(titles.items(), SPAN_GUIDANCES):
        title = with_guidance(f"{title} (%)", guidance)
        columns.append(Column(title, value, task=with_guidance(SPANS, guidance)))
    return columns


COLUMNS = {
    "bouncing": (
        Column("turns at the borders only (%)", "turns_right", task=LONG),
        Column("one object to the end (%)", "one_object", task=LONG),
        Column("CPU ms per frame", "cpu_seconds", factor=1000 / FRAMES_OF_ALL, task=LONG),
    ),
    "moving": (
        Column("directions and shapes both right (%)", "both_accuracy", task=SHORT),
        Column("with the other guidance (%)", "both_accuracy", task=SHORT_OTHER),
        *span_columns(),
    ),
}
COMPUTE = {"bouncing": 4, "moving": 1}  # relative to the recipe of study.py; in tuning, 1
FORCED = ((8, 1 / 3), (16, 2 / 3))  # (num_frames, share of the compute), of bouncing shapes
MADE = {  # flags of make_moving_shapes.py
    "bouncing": ("--bounce", "--seconds", 16),
    "moving": ("--seconds", 1.4),
}


@dataclass(frozen=True)
class Settings:
    """How a model is trained. A causal one has a context, in frames."""

    gamma_shift: float
    patch: int = 4  # frames
    context: int = 0
    context_noise: float = 0
    mix: float = 0  # --mix of train.py

    @property
    def way(self):
        return "causal" if self.context else "windows"

    @property
    def name(self):
        """The settings in words, for rows and tables."""
        text = f"{self.way}, patch {self.patch}, shift {self.gamma_shift:g}"
        if self.context:
            text += f", context {self.context}"
        if self.context_noise:
            text += f", context noise {self.context_noise:g}"
        if self.mix:
            text += f", mix {self.mix:g}"
        return text

    def phases(self, data):
        """(num_frames, share of the compute) of each phase.

        Causal models need short clips, too, to learn how a video begins.
        """
        return FORCED if data == "bouncing" and not self.context else shapes.CURRICULUM

    def training_flags(self):
        flags = f"--gamma-shift {self.gamma_shift:g} --temporal-patch-size {self.patch}"
        if not self.context:
            return f"{flags} --forcing 0.75"
        return f"{flags} --causal --context {self.context} --context-noise {self.context_noise:g}"


WINDOWS = Settings(gamma_shift=3)
STREAM = Settings(gamma_shift=3, context=16)
TUNED = {  # each differs in one setting from the first
    "windows": [
        WINDOWS,
        replace(WINDOWS, gamma_shift=6),
        replace(WINDOWS, gamma_shift=1),
    ],
    "causal": [
        STREAM,
        replace(STREAM, gamma_shift=6),
        replace(STREAM, gamma_shift=1),
        replace(STREAM, context=8),
        replace(STREAM, context=4),
        replace(STREAM, context_noise=0.2),
        replace(STREAM, mix=0.3),
        replace(STREAM, patch=2),
        replace(STREAM, patch=1),
    ],
}


class StreamingRun(lab.Run):
    def values(self, task):
        """The metrics of a task. Those of spans are not in evaluate.py."""
        values = super().values(task)
        if task.startswith(SPANS):
            values |= measure_spans(self.path(task).parent)
        return values


def measure_spans(folder):
    """{name: share} of all spans in a sample folder whose object moves as their class says:
    straight and steadily, or on the whole.
    """
    about, videos, _ = read_samples(folder, folder)
    straight = []
    moved = []
    for video, labels in zip(videos, about["spans"], strict=True):
        patch = len(video) // len(labels)
        for start in range(0, len(video), SPAN):
            asked = about["classes"][labels[start // patch]]
            span = video[start : start + SPAN]
            direction = track(span).direction
            straight.append(direction is not None and asked.endswith(direction))
            moved.append(moves_mostly(span, asked))
    return {"spans_straight": statistics.mean(straight), "spans_moved": statistics.mean(moved)}


def moves_mostly(span, asked):
    """Whether the object of a span, uint8 (T, H, W, 3), is further in the direction that a class
    asks for in the last frame than in the first.
    """
    try:
        centers, *_ = look(span)
    except ValueError:  # no single object
        return False
    move = centers[-1] - centers[0]
    axis = int(abs(move[1]) > abs(move[0]))
    along = abs(move[axis])
    is_slanted = abs(move[1 - axis]) > MAX_SLANT * along
    direction = DIRECTIONS[axis][int(move[axis] > 0)]
    return along >= MIN_TRAVEL and not is_slanted and asked.endswith(direction)


def span_words(count):
    """Words of --classes: for each shape so many spans, in turning directions."""
    words = []
    for shape in ("Circle", "Square", "Triangle"):
        directions = itertools.islice(itertools.cycle(TURNS), count)
        words.append(",".join(f"{shape}{direction}*{SPAN}" for direction in directions))
    return " ".join(words)


def main_tasks(args, data, settings, guidance, evaluations=EVALUATIONS):
    """{name: (flags of sample_gd.py, metrics)} of a model."""
    size = shapes.size_of(args)
    make_task = partial(shapes.make_task, "euler", evaluations=evaluations, guidance=guidance)
    if data == "bouncing":
        long = "" if settings.context else "--window 16 --overlap 8"
        frames = 24 if args.miniature else 256
        return {LONG: make_task(count=size.few, frames=frames, more=long)}
    tasks = {SHORT: make_task(count=size.clips)}
    (other,) = {*GUIDANCES} - {guidance}
    tasks[SHORT_OTHER] = make_task(count=size.clips, guidance=other)
    if settings.context:
        words = span_words(4 if args.miniature else NUM_SPANS)
        frames = words.count("*") // 3 * SPAN
        for one in SPAN_GUIDANCES:
            tasks[with_guidance(SPANS, one)] = make_task(
                count=size.few,
                frames=frames,
                guidance=one,
                more=f"--classes {words}",
                metrics=(),
            )
    return tasks


def plan(size, data, compute, settings):
    """What `shapes.plan` returns. compute: relative to a bidirectional model of the recipe."""
    usual = shapes.config_of(size)
    config = replace(
        usual,
        temporal_patch_size=settings.patch,
        use_rope=True,
        causal=bool(settings.context),
        context=settings.context or None,
    )
    shares = settings.phases(data)
    last, _ = shares[-1]

    def flops_per_step(config):
        clips = shapes.TOKENS // config.num_tokens(last)
        return clips * config.training_flops(last)

    steps = compute * size.steps * flops_per_step(usual) / flops_per_step(config)
    return shapes.plan(config, shares, mix=settings.mix, steps=round(steps))


def tuning_run(args, settings):
    """The run that samples a model of bouncing shapes with each guidance."""
    tasks = {}
    for guidance in GUIDANCES:
        usual = main_tasks(args, "bouncing", settings, guidance, TUNING_EVALUATIONS)
        tasks[with_guidance(LONG, guidance)] = usual[LONG]
    return make_run(
        args,
        "bouncing",
        settings,
        name=settings.name,
        seed=TUNING_SEED,
        compute=1,
        tasks=tasks,
        table="streaming_tuning",
    )


def main_run(args, arm, seed, tuning):
    """The run of an arm (data, way) with what tuning chose. tuning: the rows of the tuning runs."""
    data, way = arm
    settings, guidance = choose(tuning, way)
    return make_run(
        args,
        data,
        settings,
        name=with_guidance(settings.name, guidance),
        seed=seed,
        compute=COMPUTE[data],
        tasks=main_tasks(args, data, settings, guidance),
        table="streaming",
    )


def make_run(args, data, settings, name, seed, compute, tasks, table):
    """The lab.Run of a model of bouncing or of moving shapes. name: of its settings, in rows."""
    size = shapes.size_of(args)
    phases, flops = plan(size, data, compute, settings)
    _, last_step, _ = phases[-1]
    videos = shapes.data_of(args, data, MADE[data])
    folder, test = videos
    flags = f"{shapes.MOVING}{shapes.INTERVALS} {settings.training_flags()}"
    training = shapes.train_words(size, seed, shapes.phase_flags(phases, settings.mix), flags)
    common = f"--seed {seed} --precision {lab.PRECISION} --batch-size 32".split()
    return StreamingRun(
        out=Path(args.out, f"{table}.json"),
        about={"data": data, "settings": name, "way": settings.way, "seed": seed}
        | ({"size": "miniature"} if args.miniature else {}),
        data=videos,
        training=[*training, "--data-path", folder] + ["--compile"] * args.compile,
        last_step=last_step,
        tasks={task: (words + common, metrics) for task, (words, metrics) in tasks.items()},
        metrics={"motion": ["--data-path", test, "--split", "all", "--num-real", size.fewer]},
        more={"flops": flops},
    )


def choose(rows, way):
    """(Settings, guidance) of a way that did best in tuning, by the mean of both shares.

    Raises UserError if runs are missing.
    """
    turns, one_object, _ = COLUMNS["bouncing"]
    scores = {}
    for settings, guidance in itertools.product(TUNED[way], GUIDANCES):
        about = {"settings": settings.name}
        task = with_guidance(LONG, guidance)
        shares = []
        for column in (turns, one_object):
            values = lab.by_seed(rows, about, column.of(task))
            if not values:
                raise UserError(f"{settings.name}: not tuned yet; run with --tune first")
            share = values[TUNING_SEED]
            shares.append(share if math.isfinite(share) else 0.0)  # it diverged: nothing is right
        scores[settings, guidance] = statistics.mean(shares)
    return max(scores, key=scores.get)


def tuning_markdown(rows):
    lines = lab.heading(
        "Patch by patch, or in windows: tuning",
        "`scripts/studies/streaming.py --tune` wrote this table: bouncing shapes, one seed, "
        f"{TUNING_EVALUATIONS} Euler steps per window or temporal patch.",
    )
    columns = []
    for guidance, column in itertools.product(GUIDANCES, COLUMNS["bouncing"]):
        title = with_guidance(column.title, guidance)
        columns.append(replace(column, title=title, task=with_guidance(LONG, guidance)))
    return lines + settings_table(rows, columns)


def settings_table(rows, columns):
    names = dict.fromkeys(row["settings"] for row in rows)
    return lab.arm_table(rows, {name: {"settings": name} for name in names}, columns)


def markdown(rows):
    """Lines of both tables."""
    lines = lab.heading(
        "Patch by patch, or in windows?",
        "`scripts/studies/streaming.py` wrote these tables. All models of a table have the same "
        f"compute. A window or a temporal patch takes {EVALUATIONS} Euler steps. Cells: the mean "
        "over seeds, and the range.",
    )
    for data, columns in COLUMNS.items():
        of_data = lab.rows_with({"data": data}, rows)
        lines += [f"## {data.capitalize()} shapes", "", *settings_table(of_data, columns)]
        ways = {way: {"way": way} for way in TUNED}
        compared = []
        for column in columns:
            values = lab.by_arm(of_data, ways, column)
            if all(len(of_way) > 1 for of_way in values.values()):
                compared.append((values, ("causal", "windows"), column.title, column.digits))
        lines += [*lab.compare(compared), ""]
    return lines


def parse_args():
    return lab.study_parser(__doc__, "streaming", seeds=[0, 1, 2], tunes=True).parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if args.tune:
        runs = [tuning_run(args, settings) for settings in itertools.chain(*TUNED.values())]
        lab.run_study(args, runs, tuning_markdown)
        return
    cases = itertools.product(args.seeds, itertools.product(COLUMNS, TUNED))
    runs = lab.tuned_runs(args, "streaming_tuning", cases, main_run)
    lab.run_study(args, runs, markdown)


if __name__ == "__main__":
    main()
