"""Write the report of study.py: study.md and its figures, from the rows of study.csv."""

import itertools
import math
from contextlib import contextmanager
from functools import partial
from operator import itemgetter

import numpy as np

from arms import (
    ARMS,
    BASE,
    BY_NAME,
    GUIDANCE,
    LENGTHS,
    PACES,
    RECOMMENDED,
    SHARE_SEEDS,
    TOKENS,
    VERSION,
    plan,
)
from lab import (
    Column,
    Difference,
    by_seed,
    difference,
    difference_lines,
    mean_and_error,
    refuse_to_run,
    student_p,
    table,
    write_results,
)
from scoring.plots import COLORS, MARKERS, plt, save_figure
from scoring.stats import half95

refuse_to_run(__name__, "scripts/studies/study.py")

SCRIPT = "python scripts/studies/study.py"
FIXED = "16 fixed"
ROTARY = "16 rotary"
TABLE = "16 table"
MOVING = "16 moving"
CURRICULA = "4-8-16", "4-8-16 mix", "4-8-16 table", "4-8-16 table mix", "4-8-16 moving"
PAIRS_A = (
    (TABLE, FIXED),
    (MOVING, FIXED),
    (ROTARY, FIXED),
    (TABLE, ROTARY),
    (MOVING, TABLE),
)
PAIRS_B = (
    ("4-8-16 table", "4-8-16"),
    ("4-8-16 table mix", "4-8-16 mix"),
    ("4-8-16 mix", "4-8-16"),
    ("4-8-16 table mix", "4-8-16 table"),
    ("4-8-16 moving", "4-8-16 table"),
    ("4-8-16 moving", "16 moving intervals"),
)
# the arms that question C compares
START = "16 moving intervals"
CURRICULUM = RECOMMENDED.name
# words: column of the csv
COMPARED = {"Loss": "loss_16", "Direction accuracy (0 to 1)": "direction"}
GOAL = 0.9  # direction accuracy at which motion counts as learned

# From rows to numbers -----------------------------------------------------------------------------


def values_of(rows, name, column="direction", share=1.0, frames=16):
    """{seed: value of a column} of an arm, without missing values: of its samples, or "loss_16" of
    its training's end.

    loss_16 is the validation loss at 16 frames; infinite if the run diverged. frames: of the
    samples.
    """
    about = {"arm": name, "share": share}
    about |= {"kind": "train"} if column == "loss_16" else {"kind": "sample", "frames": frames}
    return by_seed(sorted(rows, key=itemgetter("step")), about, Column(column, 1, 3))


def compute_to(goal, shares, values):
    """The share of the compute at which values first reach the goal, interpolated.

    NaN if the first or none does.
    """
    for (before, low), (after, high) in itertools.pairwise(zip(shares, values, strict=True)):
        if high >= goal > values[0]:
            return before + (after - before) * (goal - low) / (high - low)
    return math.nan


def share_text(share):
    return "an unmeasured share" if math.isnan(share) else f"{share:.0%}"


def curve(rows, name):
    """(shares of the compute, {seed: direction accuracy at each share}), for complete seeds."""
    shares = sorted((1.0, *BY_NAME[name].shares))
    by_share = [values_of(rows, name, share=share) for share in shares]
    accuracies = {}
    for seed in range(SHARE_SEEDS):
        if all(seed in values for values in by_share):
            accuracies[seed] = [values[seed] for values in by_share]
    return shares, accuracies


# Tables and figures -------------------------------------------------------------------------------


def differences(rows, pairs):
    """Lines about loss and direction accuracy of pairs of arms."""
    compared = []
    for pair, (what, column) in itertools.product(pairs, COMPARED.items()):
        values = {name: values_of(rows, name, column) for name in pair}
        compared.append(difference(values, pair, what))
    return [*difference_lines(compared), ""]


def ratio(what, ratios):
    """A Difference with the geometric mean of two arms' ratios, one per seed.

    Without significance for one seed.
    """
    logs = [math.log(value) for value in ratios]
    mean, error = mean_and_error(logs)
    each = "; ".join(f"{value:.2f}" for value in ratios)
    text = f"- {what}: the geometric mean is {math.exp(mean):.2f} (each seed: {each}"
    if error is None:
        return Difference(f"{text}).")
    half = half95(logs)
    low = math.exp(mean - half)
    high = math.exp(mean + half)
    return Difference(f"{text}; 95% {low:.2f} to {high:.2f}", mean, student_p(logs))


def spread_cell(values, digits=3, unit=1):
    """Mean and standard error over seeds, and the value of each seed; "-" without values.

    unit: 100 for percent.
    """
    numbers = [unit * value for value in values.values()]
    each = ", ".join(f"{number:.{digits}f}" for number in numbers)
    mean, error = mean_and_error([number for number in numbers if number < math.inf])
    if mean is None:
        return f"({each})" if numbers else "-"
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean:.{digits}f}{spread} ({each})"


def arm_table(rows, runs):
    """Lines of markdown: loss, direction accuracy and speed at 16 frames of each (arm, share)."""
    cells = []
    for name, share in runs:
        values = partial(values_of, rows, name, share=share)
        cells.append(
            [
                name,
                f"{100 * share:.0f}",
                spread_cell(values("loss_16")),
                spread_cell(values("direction"), digits=0, unit=100),
                spread_cell(values("speed"), digits=2),
            ]
        )
    return table(
        ["arm", "compute (%)", "validation loss", "direction accuracy (%)", "speed / true"], cells
    )


def full_table(rows, names):
    """As `arm_table`, at full compute."""
    return arm_table(rows, [(name, 1.0) for name in names])


def length_table(rows, names):
    """Lines of markdown: direction accuracy, speed and seams of each arm at 16, 24, 32 frames."""
    cells = []
    for name, frames in itertools.product(names, LENGTHS):
        values = partial(values_of, rows, name, frames=frames)
        cells.append(
            [
                name,
                str(frames),
                spread_cell(values("direction"), digits=0, unit=100),
                spread_cell(values("speed"), digits=2),
                spread_cell(values("seam"), digits=2),
            ]
        )
    return table(
        ["arm", "frames", "direction accuracy (%)", "speed / true", "seam score (1 = no seam)"],
        cells,
    )


def mean_of(values):
    return np.mean(list(values.values()))


@contextmanager
def figure(study, letter, message, xlabel, lines):
    """The axes of a figure of direction accuracy.

    Saves the figure and adds it to the lines of markdown.
    """
    path = study.out / f"study-{letter}.png"
    canvas, axes = plt.subplots(figsize=(9.5, 6.5))
    yield axes
    axes.set(xlabel=xlabel, ylabel="direction accuracy (%)", ylim=(0, 103))
    axes.set_title(message, loc="left")
    axes.legend()
    save_figure(canvas, path)
    lines += [f"![{' '.join(message.split())}]({path.name})", ""]


def draw_shares(axes, by_x, label, number):
    """Plot direction accuracy {x: {seed: accuracy}}: the mean as a line, seeds as dots."""
    color = COLORS[number]
    means = {x: 100 * mean_of(values) for x, values in by_x.items() if values}
    axes.plot(
        means.keys(),
        means.values(),
        label=label,
        color=color,
        marker=MARKERS[number],
        markersize=9,
        linewidth=2,
    )
    for x in means:
        dots = [100 * value for value in by_x[x].values()]
        axes.scatter([x] * len(dots), dots, color=color, alpha=0.45, s=30)


# The questions. Each function returns lines of markdown; its docstring is the heading. ------------


def answer_a(study, rows):
    """Which positions? 16 frames from the start, equal steps"""
    return differences(rows, PAIRS_A) + full_table(rows, (FIXED, ROTARY, TABLE, MOVING))


def answer_b(study, rows):
    """Which positions for 4, 8, then 16 frames, with and without --mix?"""
    lines = differences(rows, PAIRS_B) + full_table(rows, CURRICULA)
    lines += length_table(rows, CURRICULA)
    longer = {}
    for name in CURRICULA:
        accuracies = values_of(rows, name, frames=24)
        if accuracies:
            longer[name] = mean_of(accuracies)
    if CURRICULUM not in longer:
        return lines
    message = (
        f"24 frames, longer than in training: {longer.pop(CURRICULUM):.0%} direction accuracy\n"
        f"({CURRICULUM})"
    )
    if longer:
        message += f", {min(longer.values()):.0%} to {max(longer.values()):.0%} for the others"
    with figure(
        study,
        letter="B",
        message=message,
        xlabel="sampled frames",
        lines=lines,
    ) as axes:
        for number, name in enumerate(CURRICULA):
            by_length = {frames: values_of(rows, name, frames=frames) for frames in LENGTHS}
            draw_shares(axes, by_length, label=name, number=number)
        axes.axvspan(16.5, 33, color="gray", alpha=0.1, label="longer than in training")
        axes.set(xticks=LENGTHS, xlim=(15, 33))
    return lines


def answer_c(study, rows):
    """How much compute until the motion is correct?"""
    names = TABLE, START, CURRICULUM
    curves = {name: curve(rows, name) for name in names}
    lines = []
    reached = {}  # {arm: {"mean" or seed: result of compute_to}}
    for name, (shares, accuracies) in curves.items():
        if not accuracies:
            lines.append(f"- {name}: not run yet.")
            continue
        values = {"mean": np.mean(list(accuracies.values()), axis=0)} | accuracies
        reached[name] = {seed: compute_to(GOAL, shares, points) for seed, points in values.items()}
        mean, *each = map(share_text, reached[name].values())
        lines.append(
            f"- {name}: the mean over seeds reaches {GOAL:.0%} direction accuracy at {mean} of "
            f"the compute (each seed: {'; '.join(each)})."
        )
    compared = []
    for base in (START, TABLE):
        ratios = compute_ratios(reached.get(CURRICULUM, {}), reached.get(base, {}))
        if ratios:
            compared.append(ratio(f"Ratio of these computes, {CURRICULUM} / {base}", ratios))
    early = f"{CURRICULUM} at 60%"
    full = f"{START} at 100%"
    losses = {
        early: values_of(
            rows,
            CURRICULUM,
            column="loss_16",
            share=0.6,
        ),
        full: values_of(rows, START, column="loss_16"),
    }
    compared.append(difference(losses, (early, full), "Loss"))
    lines += [*difference_lines(compared), ""]
    lines += arm_table(rows, [(name, share) for name in names for share in curves[name][0]])
    if len(reached) == len(names):
        lines += draw_curves(study, curves, {name: reached[name]["mean"] for name in names})
    return lines


def compute_ratios(computes, others):
    """The ratios of two arms' computes {seed: share}, for the seeds that reach the goal in both."""
    ratios = []
    for seed in range(SHARE_SEEDS):
        ratio = computes.get(seed, math.nan) / others.get(seed, math.nan)
        if math.isfinite(ratio):
            ratios.append(ratio)
    return ratios


def draw_curves(study, curves, reached):
    """Lines of markdown: the figure of question C. reached: {arm: share of the compute}."""
    texts = {name: share_text(share) for name, share in reached.items()}
    message = (
        f"{GOAL:.0%} direction accuracy at {texts[CURRICULUM]} of the compute ({CURRICULUM}),\n"
        f"at {texts[START]} ({START}), at {texts[TABLE]} ({TABLE})"
    )
    xlabel = f"compute of a complete run (% of {study.size.steps:,} steps of 16 frames)"
    lines = []
    with figure(
        study,
        letter="C",
        message=message,
        xlabel=xlabel,
        lines=lines,
    ) as axes:
        for number, (name, (shares, accuracies)) in enumerate(curves.items()):
            by_share = {}
            for share, *points in zip(shares, *accuracies.values(), strict=True):
                by_share[100 * share] = dict(enumerate(points))
            draw_shares(axes, by_share, label=name, number=number)
        axes.axhline(100 * GOAL, color="gray", linestyle="--", label=f"{GOAL:.0%}")
    return lines


def answer_d(study, rows):
    """Which --rope-speed, for which motion? 16 frames from the start, equal steps"""
    lines = []
    for pace in PACES:
        names = [arm.name for arm in ARMS if (arm.questions, arm.pace) == ("D", pace)]
        if not pace:
            names = [FIXED, TABLE, MOVING, *names]
        fixed, table, moving, *rest = names
        pairs = [(name, fixed) for name in (table, moving, *rest)]
        pairs += [(name, moving) for name in rest]
        # each comparison counts in one table only
        pairs = [pair for pair in pairs if pair not in PAIRS_A]
        lines += differences(rows, pairs) + full_table(rows, names)
        if not pace:
            lines += length_table(rows, rest)
    return lines


def write_report(study):
    """Write study.md and its figures from the rows of a study."""
    rows = study.rows
    size = study.size
    spent = sum(row["seconds"] for row in study.last_rows()) / 3600
    versions = sorted({row["code"][:10] or "unknown" for row in rows})
    machines = sorted({row["machine"] or "unknown" for row in rows})
    _, flops = plan(BY_NAME[ROTARY], 1.0, size)
    real = [row["real_direction"] for row in rows if row["real_direction"] is not None]
    compiled = " with --compile" if all(row["compiled"] for row in rows) else ""
    lines = [
        "# Which positions are best, and does a frame curriculum pay?",
        "",
        f"`{SCRIPT} --report` wrote this page from `study.csv` ({len(rows)} rows, version "
        f"{VERSION}, size {size.name}). `{SCRIPT}` measured the rows: {spent:.1f} hours of "
        f"training{compiled} and sampling, on {', '.join(machines)}; code {', '.join(versions)}. "
        "[study-first-edition.md](study-first-edition.md) answers other questions with earlier "
        "code.",
        "",
        "An *arm* is a training recipe.",
        "",
        "- **Data and model**: Moving Shapes, 16 x 16 px, 1.4 s. Depth "
        f"{size.depth}, width {size.width}, {size.heads} heads, spatial patch 2, temporal patch "
        "4, bf16.",
        f"- **Compute**: every step has {TOKENS} tokens. 100% compute is {flops / 1e12:.3g} TFLOP: "
        f"{size.steps} steps of 8 clips of 16 frames. The learning rate decays to zero at the end "
        "of each run.",
        f"- **Flags of all arms**: `{BASE}`.",
        "- **Positions**: *fixed* is the default. *rotary* adds `--use-rope --rope-theta 100`. "
        "*table* also adds `--position-table space`. *moving* also adds `--rope-speed 0.5`, about "
        "the speed of all shapes (0.51 patches per temporal patch). *4-8-16* without one of these "
        "words is rotary.",
        "- **Frames**: *16* trains on 16 frames from the start. *4-8-16* gives a third of the "
        "compute to each of 4, 8 and 16 frames, and draws the frame interval from 1 to 2. With "
        "*mix*, a fifth of the later steps train on earlier frames. *16 moving intervals* also "
        "draws the interval, so it differs from *4-8-16 moving* only in its number of frames.",
        "- **Speeds**: *speed N* is *table* with `--rope-speed N`. *speed 0* has the spatial "
        "frequencies of the other speeds. *speed 0.5* is *moving* again, by later code. Shapes "
        "move half as fast with *slow* and twice as fast with *fast*.",
        "- **Validation loss**: arms with frame intervals of 1 to 2 validate on such clips. "
        "Compare their losses with each other, not with those in A.",
        f"- **Samples**: {size.clips} clips per run and length, 0.04 s per frame, `ngd`, "
        f"{size.points - 1} evaluations, guidance {GUIDANCE:g}, averaged weights of the last step.",
        "- **Direction accuracy**: the share of samples with the motion of their class, measured "
        "by a tracker. Chance is 25%; real clips reach at least "
        f"{min(real, default=math.nan):.0%}.",
        "- **Cells**: mean ± standard error over seeds, with each seed in brackets. A dash means "
        "that nothing was run, or that no direction was correct, so there is no speed. "
        "Differences are paired by seed, with Student's 95% interval and p value. A difference is "
        "significant if its p value, adjusted by Holm's method for the comparisons that are "
        "listed above the same table, is at most 0.05.",
        "",
    ]
    for letter, answer in {"A": answer_a, "B": answer_b, "C": answer_c, "D": answer_d}.items():
        lines += [
            f"## {letter}. {' '.join(answer.__doc__.split())}",
            "",
            f"`{SCRIPT} --only {letter}`",
            "",
            *answer(study, rows),
        ]
    write_results(study.out, "study", lines)
