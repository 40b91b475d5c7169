"""The report of study.py: from the rows of study.csv to study.md and its figures, whose titles say what they show."""

import itertools
import math
from contextlib import contextmanager

import numpy as np

from arms import BASE, BY_NAME, GUIDANCE, LENGTHS, RECOMMENDED, SHARE_SEEDS, TOKENS, VERSION, plan
from lab import half_width, mean_and_error, table, write_results
from scoring.plots import COLORS, MARKERS, plt, save_figure

SCRIPT = "python scripts/studies/study.py"
FIXED, ROTARY, TABLE, MOVING = "16 fixed", "16 rotary", "16 table", "16 moving"
CURRICULA = "4-8-16", "4-8-16 mix", "4-8-16 table", "4-8-16 table mix", "4-8-16 moving"
PAIRS_A = (TABLE, FIXED), (MOVING, FIXED), (ROTARY, FIXED), (TABLE, ROTARY), (MOVING, TABLE)
PAIRS_B = (
    ("4-8-16 table", "4-8-16"), ("4-8-16 table mix", "4-8-16 mix"), ("4-8-16 mix", "4-8-16"),
    ("4-8-16 table mix", "4-8-16 table"), ("4-8-16 moving", "4-8-16 table"), ("4-8-16 moving", "16 moving intervals"),
)  # fmt: skip
START, CURRICULUM = "16 moving intervals", RECOMMENDED.name  # whose compute to motion C compares
RIGHT = 0.9  # share of right directions at which motion counts as learned

# ----------------------------------------------------------------------------------------------------------------------
# From rows to numbers


def losses(rows, name, share=1.0):
    """{seed: validation loss at 16 frames at the end of the run} of an arm; infinite for a run that diverged."""
    own = [row for row in rows if (row["kind"], row["arm"], row["share"]) == ("train", name, share)]
    return {row["seed"]: row["loss_16"] for row in sorted(own, key=lambda row: (row["seed"], row["step"]))}


def scores(rows, name, frames=16, share=1.0, column="direction"):
    """{seed: value of a column of the samples} of an arm, without missing values."""
    asked = {"arm": name, "kind": "sample", "frames": frames, "share": share}
    own = {row["seed"]: row[column] for row in rows if asked.items() <= row.items() and row[column] is not None}
    return dict(sorted(own.items()))


def difference(first, second, what, values, others):
    """A line about the paired difference of {seed: value} of two arms, over the seeds where both are finite."""
    gaps = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    if not gaps:
        return f"- {what}, {first} against {second}: not run yet."
    mean, half = np.mean(gaps), half_width(gaps)
    line = f"- {what}: {first} minus {second} is {mean:+.3f}"
    if half is None:
        return f"{line} (one seed, so no interval)."
    verdict = "the interval holds 0: not told apart" if abs(mean) <= half else "higher" if mean > 0 else "lower"
    return f"{line} (95% {mean - half:+.3f} to {mean + half:+.3f}, {len(gaps)} seeds): {verdict}."


def compute_to(goal, shares, values):
    """Bounds (low, high) of the share of the compute at which values first reach the goal, equal if interpolated.

    (0, smallest share): they are there at the smallest share already. (largest share, inf): not even at the largest.
    """
    if values[0] >= goal:
        return 0.0, shares[0]
    for (before, low), (after, high) in itertools.pairwise(zip(shares, values, strict=True)):
        if high >= goal:
            share = before + (after - before) * (goal - low) / (high - low)
            return share, share
    return shares[-1], math.inf


def curve(rows, name):
    """(shares of the compute, {seed: its share of right directions at each}), of seeds that have all."""
    shares = sorted((1.0, *BY_NAME[name].shares))
    found = [scores(rows, name, share=share) for share in shares]
    seeds = [seed for seed in range(SHARE_SEEDS) if all(seed in values for values in found)]
    return shares, {seed: [values[seed] for values in found] for seed in seeds}


def share_text(bounds):
    low, high = bounds
    return f"{low:.0%}" if low == high else f"more than {low:.0%}" if low else f"{high:.0%} or less"


def ratio_text(bounds, other_bounds):
    """The ratio of two results of `compute_to`, as a bound where one of them is a bound."""
    (low, high), (other_low, other_high) = bounds, other_bounds
    low = round(low / other_high, 6)
    high = round(high / other_low, 6) if other_low else math.inf
    if low == high:
        return f"{low:.2f}"
    if high < math.inf:
        return f"at most {math.ceil(100 * high) / 100:.2f}"
    return f"at least {math.floor(100 * low) / 100:.2f}" if low else "both are bounds, so it is not known"


# ----------------------------------------------------------------------------------------------------------------------
# Tables and figures


def differences(rows, pairs):
    """Lines about loss and directions of pairs of arms."""
    columns = {"Loss": losses, "Directions right": scores}
    cases = itertools.product(pairs, columns.items())
    return [*(difference(*pair, what, *(values(rows, name) for name in pair)) for pair, (what, values) in cases), ""]


def spread_cell(values, digits=3, unit=1):
    """Mean and standard error over seeds, and the value of each seed, "-" without any; unit 100 for percent."""
    values = [unit * value for value in values.values()]
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    mean, error = mean_and_error([value for value in values if value < math.inf])
    if mean is None:
        return f"({each})" if values else "-"
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean:.{digits}f}{spread}{'%' if unit == 100 else ''} ({each})"


def arm_table(rows, runs):
    """Lines of markdown: loss, directions and speed of (arm, share of the compute) at 16 frames."""
    cells = []
    for name, share in runs:
        loss, right = losses(rows, name, share), scores(rows, name, share=share)
        speed = scores(rows, name, share=share, column="speed")
        cells.append([name, f"{share:.0%}", spread_cell(loss), spread_cell(right, 0, 100), spread_cell(speed, 2)])
    return table(["arm", "compute", "validation loss", "directions right", "speed / true"], cells)


def mean_of(values):
    return np.mean(list(values.values()))


@contextmanager
def figure(study, letter, message, xlabel, lines):
    """The axes of a figure of shares of right directions, which is saved and shown by lines of markdown."""
    path = study.out / "figures" / f"study-{letter}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas, axes = plt.subplots(figsize=(9.5, 6.5))
    yield axes
    axes.set(xlabel=xlabel, ylabel="directions right, %", ylim=(0, 103))
    axes.set_title(message, loc="left")
    axes.legend()
    save_figure(canvas, path)
    lines += [f"![{' '.join(message.split())}](figures/{path.name})", ""]


def style(number):
    return {"color": COLORS[number], "marker": MARKERS[number]}


def draw_shares(axes, xs, by_x, label, number):
    """Plot shares of right directions over x: the mean of {seed: share} as a line, each seed as a dot."""
    points = [(x, values) for x, values in zip(xs, by_x, strict=True) if values]
    means = [100 * mean_of(values) for _, values in points]
    axes.plot([x for x, _ in points], means, label=label, markersize=9, linewidth=2, **style(number))
    for x, values in points:
        dots = [100 * value for value in values.values()]
        axes.scatter([x] * len(dots), dots, color=COLORS[number], alpha=0.45, s=30)


# ----------------------------------------------------------------------------------------------------------------------
# The questions, whose titles are the docstrings: lines of markdown each


def answer_a(study, rows):
    """16 frames from the start, equal steps: which positions"""
    names = FIXED, ROTARY, TABLE, MOVING
    lines = differences(rows, PAIRS_A) + arm_table(rows, [(name, 1.0) for name in names])
    ends = {name: (losses(rows, name), scores(rows, name)) for name in names}
    if all(right for _, right in ends.values()):
        found = ", ".join(f"{mean_of(right):.0%} ({name.split()[1]})" for name, (_, right) in ends.items())
        message = f"16 frames from the start: of the directions are right\n{found}; a dot is a seed"
        with figure(study, "A", message, "validation loss, 16 frames (left is better)", lines) as axes:
            for number, (name, (loss, right)) in enumerate(ends.items()):
                dots = [(loss[seed], 100 * right[seed]) for seed in right]
                axes.scatter(*zip(*dots, strict=True), s=110, label=name, **style(number))
    return lines


def answer_b(study, rows):
    """4, 8, then 16 frames: which positions, with and without earlier frames mixed in"""
    lines = differences(rows, PAIRS_B) + arm_table(rows, [(name, 1.0) for name in CURRICULA])
    cells = []
    for name, frames in itertools.product(CURRICULA, LENGTHS):
        right, speed, seam = (scores(rows, name, frames, column=key) for key in ("direction", "speed", "seam"))
        cells.append([name, str(frames), spread_cell(right, 0, 100), spread_cell(speed, 2), spread_cell(seam, 2)])
    lines += table(["arm", "sampled frames", "directions right", "speed / true", "seam score (1 = no seam)"], cells)
    longer = {name: mean_of(right) for name in CURRICULA if (right := scores(rows, name, 24))}
    if CURRICULUM in longer:
        message = f"24 frames, never trained: {longer.pop(CURRICULUM):.0%} of the directions are right\n({CURRICULUM})"
        message += f", {min(longer.values()):.0%} to {max(longer.values()):.0%} with the others" if longer else ""
        with figure(study, "B", message, "sampled frames", lines) as axes:
            for number, name in enumerate(CURRICULA):
                draw_shares(axes, LENGTHS, [scores(rows, name, frames) for frames in LENGTHS], name, number)
            axes.axvspan(16.5, 33, color="gray", alpha=0.1, label="never trained")
            axes.set(xticks=LENGTHS, xlim=(15, 33))
    return lines


def answer_c(study, rows):
    """Compute to motion: complete runs with shares of the compute"""
    names = TABLE, START, CURRICULUM
    curves = {name: curve(rows, name) for name in names}
    lines, found = [], {}  # found: results of compute_to, of the mean over seeds and of each seed
    for name, (shares, by_seed) in curves.items():
        if not by_seed:
            lines.append(f"- {name}: not run yet.")
            continue
        values = {"mean": np.mean(list(by_seed.values()), axis=0)} | by_seed
        found[name] = {seed: compute_to(RIGHT, shares, points) for seed, points in values.items()}
        mean, *each = map(share_text, found[name].values())
        lines.append(f"- {name}: {RIGHT:.0%} of the directions, in the mean over seeds, are right at {mean} of the "
                     f"compute (each seed: {'; '.join(each)}).")  # fmt: skip
    for base in (START, TABLE):
        if both := [seed for seed in found.get(CURRICULUM, ()) if seed in found.get(base, ())]:
            mean, *each = (ratio_text(found[CURRICULUM][seed], found[base][seed]) for seed in both)
            lines.append(f"- Compute to motion, {CURRICULUM} / {base}: {mean} (each seed: {'; '.join(each)}).")
    early, full = losses(rows, CURRICULUM, 0.6), losses(rows, START)
    lines += [difference(f"{CURRICULUM} at 60%", f"{START} at 100%", "Loss", early, full), ""]
    lines += arm_table(rows, [(name, share) for name in names for share in curves[name][0]])
    if len(found) == len(names):
        texts = {name: share_text(found[name]["mean"]) for name in found}
        message = f"{RIGHT:.0%} of the directions are right at {texts[CURRICULUM]} of the compute ({CURRICULUM}),\n"
        message += f"from the start at {texts[START]} ({START}), {texts[TABLE]} ({TABLE})"
        xlabel = f"compute of a complete run, % of {study.size.steps:,} steps of 16 frames"
        with figure(study, "C", message, xlabel, lines) as axes:
            for number, (name, (shares, by_seed)) in enumerate(curves.items()):
                points = [dict(zip(by_seed, values, strict=True)) for values in zip(*by_seed.values(), strict=True)]
                draw_shares(axes, [100 * share for share in shares], points, name, number)
            axes.axhline(100 * RIGHT, color="gray", linestyle="--", label=f"{RIGHT:.0%}")
    return lines


def write_report(study):
    """Write study.md and its figures from the rows of a study."""
    rows, size = study.rows, study.size
    spent = sum(row["seconds"] for row in study.last_rows()) / 3600
    versions, machines = (sorted({row[name] or "unknown" for row in rows}) for name in ("code", "machine"))
    flops = plan(BY_NAME[ROTARY], 1.0, size)[1] / 1e12
    real = [row["real_direction"] for row in rows if row["real_direction"] is not None]
    lines = [
        "# What should positions be, and does a frame curriculum pay?",
        "",
        f"Written by `{SCRIPT} --report` from `study.csv` ({len(rows)} rows, version {VERSION}, size {size.name}), "
        f"which `{SCRIPT}` measures: {spent:.1f} hours of "
        f"training{' with --compile' if all(row['compiled'] for row in rows) else ''} and sampling, on "
        f"{', '.join(machines)}; code {', '.join(version[:10] for version in versions)}. The first edition, of other "
        "questions and with earlier code, is [study-first-edition.md](study-first-edition.md).",
        "",
        f"Moving Shapes, 16 x 16 px, 1.4 s; depth {size.depth}, width {size.width}, {size.heads} heads, spatial patch "
        f"2, temporal patch 4, bf16; {TOKENS} tokens a step for every arm. 100% compute is {flops:.3g} TFLOP: "
        f"{size.steps} steps of 8 clips of 16 frames. 4-8-16 gives a third of the compute to each of 4, 8 and 16 "
        "frames and draws the frame interval from 1 to 2; with mix a fifth of the later steps train on earlier frames. "
        "The learning rate of every run decays to zero by its own end. Flags of all arms: "
        f"`{' '.join(map(str, BASE))}`. Rotary arms have `--rope-theta 100`, those with a table `--position-table "
        "space`, moving ones `--rope-speed 0.5` as well: about the speed of all shapes, 0.51 patches per temporal "
        "patch. 16 moving intervals differs from 4-8-16 moving in its schedule only. Arms whose frames are 1 to 2 "
        "apart validate on such clips, so their losses compare with each other, not with those of A.",
        "",
        f"Samples: {size.clips} clips a run and length, 0.04 s per frame, `ngd`, {size.points - 1} evaluations, "
        f"guidance {GUIDANCE:g}, averaged weights of the last step. A direction is right if a tracker finds the motion "
        f"that the class asks for; chance is 25%, of real clips at least {min(real, default=math.nan):.0%} are right. "
        "Numbers are mean ± standard error over seeds, in brackets those of each seed; a dash is what was not run, "
        "and the speed where no direction is right. Differences are paired by seed, with Student's 95% interval over "
        "seeds.",
        "",
    ]
    for letter, answer in {"A": answer_a, "B": answer_b, "C": answer_c}.items():
        lines += [f"## {letter}. {answer.__doc__}", "", f"`{SCRIPT} --only {letter}`", "", *answer(study, rows)]
    write_results(study.out, "study", lines)
