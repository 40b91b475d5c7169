"""The report of study.py: from study.csv to results/study.md and its figures."""

import math

import matplotlib
import numpy as np

from arms import (  # fmt: skip
    BOTH,
    BY_NAME,
    GUIDANCE,
    LENGTHS,
    LR,
    MUON_LR,
    QUESTIONS,
    TOKENS,
    TUNE_SEED,
    TUNE_SHARE,
    VERSION,
    last_rows,
    phases_of,
)
from models import model_config
from runtime.atomic import atomic_write
from runtime.cli import say
from scoring import motion

matplotlib.use("Agg")  # no window, no display
from matplotlib import pyplot as plt  # noqa: E402

SCHEDULES = "16", "8-16", "4-8-16 short", "4-8-16 even", "4-8-16 mix", "4-8-16 long"
SCALES = "none", "linear", "ntk", "riflex"  # --rope-scale; the last two are only reported, as it has lost them
BUMPS = "4-8-16 even", "4-8-16 rewarmup", "4-8-16 mix"

# ----------------------------------------------------------------------------------------------------------------------
# From rows to numbers

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # number of values -> 97.5% quantile of Student's t


def final_rows(rows, name, share=1.0):
    """{seed: row of the last step} of an arm's runs, without those that tune the learning rate."""
    wanted = {"arm": name, "share": share, "kind": "train"}
    own = [row for row in rows if wanted.items() <= row.items() and row["seed"] != TUNE_SEED]
    return {row["seed"]: row for row in sorted(own, key=lambda row: row["step"])}


def sample_rows(rows, name, frames, share=1.0, time_scale=None, rope_scale="none"):
    """{seed: row of the samples} of an arm's runs."""
    wanted = {"arm": name, "kind": "sample", "frames": frames, "share": share}
    wanted |= {"time_scale": time_scale, "rope_scale": rope_scale}
    return {row["seed"]: row for row in rows if wanted.items() <= row.items()}


def values_of(by_seed, name):
    """{seed: value of a column}, without missing values."""
    return {seed: row[name] for seed, row in sorted(by_seed.items()) if row[name] is not None}


def half_width(values):
    """Half the width of the 95% interval of the mean (Student's t); None for fewer than two values."""
    _, error = motion.mean_and_error(values)
    return None if error is None else T95.get(len(values), 2.57) * error


def pooled(by_seed):
    """(share of right directions over all seeds, its Wilson interval, number of clips), or None without clips."""
    clips = sum(row["clips"] for row in by_seed.values())
    right = sum(row["right"] for row in by_seed.values())
    return (right / clips, motion.wilson(right, clips), clips) if clips else None


def difference(first, second, what, values, others):
    """A sentence about the paired difference of {seed: value} of two arms."""
    seeds = sorted(values.keys() & others.keys())
    if not seeds:
        return f"{what}, {first} against {second}: not run yet."
    gaps = [values[seed] - others[seed] for seed in seeds]
    mean, half = float(np.mean(gaps)), half_width(gaps)
    if half is None:
        return f"{what}: {first} minus {second} is {mean:+.3f} (one seed, so no interval)."
    verdict = "the interval holds 0: not told apart" if abs(mean) <= half else "higher" if mean > 0 else "lower"
    ends = f"95% {mean - half:+.3f} to {mean + half:+.3f}"
    return f"{what}: {first} minus {second} is {mean:+.3f} ({ends}, {len(seeds)} seeds): {verdict}."


def mean_cell(values, digits=3):
    """Mean and standard error of {seed: value}, and the number of seeds."""
    mean, error = motion.mean_and_error(list(values.values()))
    if mean is None:
        return "not run"
    spread = "" if error is None else f" ± {error:.{digits}f}"
    return f"{mean:.{digits}f}{spread} ({len(values)})"


def value_cell(by_seed, name):
    """`mean_cell` of a column; a dash if no row has a value, such as the speed if no clip has the right direction."""
    values = values_of(by_seed, name)
    return "-" if by_seed and not values else mean_cell(values, 2)


def share_cell(by_seed):
    found = pooled(by_seed)
    if found is None:
        return "not run"
    share, (low, high), clips = found
    return f"{share:.1%} ({100 * low:.1f} - {100 * high:.1f}; {clips} clips)"


def table(titles, rows):
    return [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(row)} |" for row in rows), ""]


def arm_row(rows, name, share, frames):
    """Table cells of an arm: its compute and time, its validation loss and samples at `frames` frames."""
    ends, made = final_rows(rows, name, share), sample_rows(rows, name, frames, share, BY_NAME[name].time_scales[0])
    flops, seconds, val_seconds = (values_of(ends, key) for key in ("flops", "seconds", "val_seconds"))
    times = [(seconds[seed] - val_seconds[seed]) / 60 for seed in seconds.keys() & val_seconds.keys()]
    minutes = f"{np.median(times):.1f} ({len(times)})" if times else "not run"
    spent = f"{np.mean(list(flops.values())) / 1e12:.1f}" if flops else "-"
    cells = [name, f"{share:.0%}", spent, minutes, mean_cell(values_of(ends, f"loss_{frames}"))]
    return [*cells, share_cell(made), value_cell(made, "speed"), value_cell(made, "area")]


ARM_TITLES = ["arm", "compute", "TFLOP", "minutes without validation", "validation loss", "direction right (95%)",
              "speed / true", "area / true"]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Figures

COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9"  # Okabe and Ito, safe for colour blindness
MARKERS = "o", "s", "^", "D", "v", "P"
plt.rcParams.update({"font.size": 15, "axes.grid": True, "grid.alpha": 0.3, "lines.linewidth": 2, "savefig.dpi": 80})


def line_style(number):
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 8}


def draw_shares(axes, xs, by_seeds, **look):
    """Plot the share of right directions in percent over x: of all seeds with Wilson's interval, and of each seed.

    Returns whether there was anything to plot.
    """
    points = [(x, by_seed, pooled(by_seed)) for x, by_seed in zip(xs, by_seeds, strict=True) if by_seed]
    if points:
        shares = np.array([[share, share - low, high - share] for _, _, (share, (low, high), _) in points]).T * 100
        axes.errorbar([x for x, _, _ in points], shares[0], np.clip(shares[1:], 0, None), capsize=4, **look)
        for x, by_seed, _ in points:
            dots = [100 * row["direction"] for row in by_seed.values()]
            axes.scatter([x] * len(dots), dots, color=look["color"], alpha=0.4, s=20)
    return bool(points)


def draw_means(axes, xs, by_seeds, name, **look):
    """Plot the means of a column over x, with the 95% interval of the mean for two or more seeds.

    Returns whether there was anything to plot.
    """
    points = [(x, list(values_of(by_seed, name).values())) for x, by_seed in zip(xs, by_seeds, strict=True)]
    points = [(x, values) for x, values in points if values]
    if points:
        means = [np.mean(values) for _, values in points]
        halves = [half_width(values) or 0 for _, values in points]
        axes.errorbar([x for x, _ in points], means, halves, capsize=4, **look)
    return bool(points)


def draw_curve(axes, rows, name, share, number):
    """Plot the validation loss at 16 frames during the runs of an arm, a thin line per seed."""
    for seed in final_rows(rows, name, share):
        wanted = {"arm": name, "share": share, "seed": seed, "kind": "train"}
        run = sorted((row for row in rows if wanted.items() <= row.items()), key=lambda row: row["step"])
        run = [row for row in run if row["loss_16"] is not None and row["loss_16"] < math.inf]
        places = [row["flops"] / 1e12 for row in run]
        axes.plot(places, [row["loss_16"] for row in run], color=COLORS[number % len(COLORS)], alpha=0.35, linewidth=1)


def save_figure(study, name, figure, drawn):
    """Write a figure, or delete an older one if nothing is drawn. Returns the lines of markdown that show it."""
    path = study.out / "figures" / f"study-{name}.png"
    if drawn:
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            if handles:
                axes.legend(handles, labels, fontsize=12)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    else:
        path.unlink(missing_ok=True)
    plt.close(figure)
    return [f"![{name}](figures/{path.name})", ""] if drawn else []


def draw_compute(study, name, panels):
    """Plot the loss at 16 frames (top) and the right directions (bottom) over the compute.

    panels: {title: names of arms}, a column of the figure each.
    """
    panels = {title: names for title, names in panels.items() if any(final_rows(study.rows, name) for name in names)}
    columns = max(1, len(panels))
    figure, grid = plt.subplots(2, columns, figsize=(1 + 6 * columns, 9), layout="constrained", squeeze=False)
    drawn = False
    for (title, names), (top, bottom) in zip(panels.items(), grid.T, strict=False):
        for number, arm in enumerate(names):
            shares = [share for share in BOTH if share in BY_NAME[arm].shares]
            ends = [final_rows(study.rows, arm, share) for share in shares]
            made = [sample_rows(study.rows, arm, 16, share) for share in shares]
            aside = 0.3 * (number - (len(names) - 1) / 2)  # or equal compute would hide one behind the other
            places = [phases_of(BY_NAME[arm], share, study.size)[1] / 1e12 + aside for share in shares]
            drawn |= draw_means(top, places, ends, "loss_16", label=arm, **line_style(number))
            draw_curve(top, study.rows, arm, 1.0, number)
            drawn |= draw_shares(bottom, places, made, label=arm, **line_style(number))
        top.set(title=title, ylabel="validation loss, 16 frames")
        bottom.set(xlabel="training compute, TFLOP", ylabel="direction right, %", ylim=(-3, 103))
        ends = [loss for arm in names for loss in losses(study, arm).values()]
        if ends:
            top.set_ylim(0.9 * min(ends), 4 * min(ends))  # the first steps are far above
        bottom.axhline(25, color="gray", linestyle=":", label="chance")
        bottom.set_xlim(top.get_xlim())
    return save_figure(study, name, figure, drawn)


# ----------------------------------------------------------------------------------------------------------------------
# The questions: lines of markdown each


def losses(study, name, share=1.0, frames=16):
    return values_of(final_rows(study.rows, name, share), f"loss_{frames}")


def directions(study, name, share=1.0, frames=16):
    return values_of(sample_rows(study.rows, name, frames, share, BY_NAME[name].time_scales[0]), "direction")


def answer_a(study):
    names = "16", "fixed-16"
    found = {"Validation loss at 16 frames": losses, "Share of right directions": directions}
    lines = [
        "- " + difference("rotary", "fixed", what, *(values(study, name) for name in names))
        for what, values in found.items()
    ]
    lines.append("")
    lines += table(ARM_TITLES, [arm_row(study.rows, name, 1.0, 16) for name in names])
    return lines + draw_compute(study, "A", {"rotary (16) and fixed positions": names})


def answer_b(study):
    lines = []
    for patch, base in ((4, "16"), (2, "patch 2: 16"), (1, "patch 1: 16")):
        for name in [arm.name for arm in BY_NAME.values() if "B" in arm.questions and arm.patch == patch]:
            if name == base:
                continue
            lines.append(difference(name, base, "Loss at 16 frames", losses(study, name), losses(study, base)))
            lines.append(difference(name, base, "Directions right", directions(study, name), directions(study, base)))
            if 0.6 in BY_NAME[name].shares:
                lines += [goal_sentence(study, name, base)]
        even, skip = ("4-8-16 even", "8-16") if patch == 4 else (f"patch {patch}: 4-8-16", f"patch {patch}: 8-16")
        what = f"What the 4-frame phase is worth at temporal patch {patch}, loss"
        lines += [difference(even, skip, what, losses(study, even), losses(study, skip)), ""]
    arms = [arm for arm in BY_NAME.values() if "B" in arm.questions]
    lines = ["- " + line if line else "" for line in lines]
    lines += table(ARM_TITLES, [arm_row(study.rows, arm.name, share, 16) for arm in arms for share in arm.shares])
    panels = {"temporal patch 4": SCHEDULES}
    panels |= {f"temporal patch {n}": [f"patch {n}: {word}" for word in ("16", "8-16", "4-8-16")] for n in (2, 1)}
    return lines + draw_compute(study, "B", panels) + answer_bump(study)


def goal_sentence(study, name, base):
    """A sentence about the goal: with 60% of the compute no higher a loss than the base with all of it."""
    early, whole = losses(study, name, 0.6), losses(study, base)
    line = difference(f"{name} at 60%", f"{base} at 100%", "Goal (at most 0)", early, whole)
    seeds = early.keys() & whole.keys()
    if not seeds:
        return line
    met = np.mean([early[seed] - whole[seed] for seed in seeds]) <= 0
    return f"{line} The goal is {'met' if met else 'missed'} in the mean."


def answer_bump(study):
    """Whether the loss rises when the number of frames changes, and for how long."""
    lines = ["### The bump at a switch", ""]
    lines += ["Validation loss as a share of a zero predictor's, at the frames of the phase: before a switch those of "
              "the phase that ends, after it those of the new one. Gone: the first validation that is no higher than "
              "the one before the switch. Of seed 0, which validates 200 times; the averaged weights lag by some 100 "
              "steps (--ema-decay 0.99), the raw ones are noisy.", ""]  # fmt: skip
    cells, drawn = [], False
    figure, panels = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained", sharey=True)
    for number, name in enumerate(BUMPS):
        phases, _ = phases_of(BY_NAME[name], 1.0, study.size)
        for axes, (before, after) in zip(panels, zip(phases, phases[1:], strict=False), strict=True):
            for weights, key, line in (("averaged", "loss", "-"), ("raw", "loss_raw", ":")):
                found = bump(study.rows, name, before, after, key)
                cells.append([name, f"{before[0]} to {after[0]}", weights, *bump_cells(found)])
                if found:
                    early = found["places"] <= 0.3
                    axes.plot(100 * found["places"][early], found["ratios"][early], line, color=COLORS[number],
                              label=f"{name}, {weights}")  # fmt: skip
                    drawn = True
            axes.set(title=f"{before[0]} to {after[0]} frames", xlabel="share of the new phase, %", xlim=(-0.5, 30))
            axes.axvline(2, color="gray", linestyle="--")
            axes.axhline(1, color="gray", linestyle="--")
    panels[0].set(ylabel="loss / loss before the switch")
    titles = ["arm", "switch", "weights", "highest loss / before", "gone after, share of the phase", "goal of 2%"]
    return lines + table(titles, cells) + save_figure(study, "B-bump", figure, drawn)


def bump(rows, name, before, after, key="loss"):
    """The loss after a switch of phases, relative to that before it; None if it was not measured.

    Returns a dict: "places" (n,), as shares of the new phase; "ratios" (n,), the relative loss there; "gone", the first
    place where it is at most 1 (inf if none); "highest", the maximum of the ratios.
    """
    wanted = {"arm": name, "seed": 0, "share": 1.0, "kind": "train"}
    run = [row for row in rows if wanted.items() <= row.items() and row["loss_rel"] is not None]
    shares = {row["step"]: row[key] / row["loss"] * row["loss_rel"] for row in run}  # of a zero predictor's loss
    start, length = before[1], after[1] - before[1]
    new = sorted(step for step in shares if start < step <= after[1])
    if start not in shares or not new:
        return None
    places = np.array([(step - start) / length for step in new])
    ratios = np.array([shares[step] / shares[start] for step in new])
    gone = places[ratios <= 1]
    return {"places": places, "ratios": ratios, "gone": gone[0] if len(gone) else math.inf, "highest": ratios.max()}


def bump_cells(found):
    if not found:
        return ["not run"] * 3
    gone = found["gone"]
    shown = "never" if gone == math.inf else f"{gone:.1%}"
    return [f"{found['highest']:.2f}", shown, "met" if gone <= 0.02 else "missed"]


def answer_c(study):
    names = {"4": 4, "8": 8, "16": 16, "4-8-16 even": 16}
    lines = []
    for name, trained in names.items():
        other = [frames for frames in LENGTHS if frames != trained]
        own, found = pooled(sample_rows(study.rows, name, trained)), {}
        for frames in other:
            found[frames] = pooled(sample_rows(study.rows, name, frames))
        if own is None or not any(found.values()):
            lines.append(f"- Trained last on {trained} frames ({name}): not run yet.")
            continue
        held = [n for n, part in found.items() if part and part[1][1] >= own[1][0]]  # the intervals meet
        lost = [n for n, part in found.items() if part and n not in held]
        lines.append(f"- Trained last on {trained} frames ({name}), {own[0]:.0%} of the directions right there: no "
                     f"worse, within the intervals, at {listed(held)} frames, worse at {listed(lost)}.")  # fmt: skip
    titles = ["arm", "sampled frames", "direction right (95%)", "speed / true"]
    titles += ["seam score (1 = none)", "largest drift"]
    cells = [length_row(study, name, frames, "none") for name in names for frames in LENGTHS]
    lines += ["", *table(titles, cells)]
    lines += answer_intervals(study)
    figure, panels = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    drawn = False
    for number, (name, trained) in enumerate(names.items()):
        made = [sample_rows(study.rows, name, frames) for frames in LENGTHS]
        label = f"trained on {trained}" if name.isdecimal() else f"trained on {name}"
        drawn |= draw_shares(panels[0], LENGTHS, made, label=label, **line_style(number))
        draw_means(panels[1], LENGTHS, made, "seam", label=label, **line_style(number))
    panels[0].set(ylabel="direction right, %", ylim=(-3, 103))
    panels[1].set(ylabel="seam score (1 = no seam)")
    for axes in panels:
        axes.set(xlabel="sampled frames", xticks=[4, 8, 12, 16, 24, 32])
    return lines + save_figure(study, "C", figure, drawn) + answer_scale(study)


def answer_intervals(study):
    """Whether training on larger frame intervals helps with more frames, without --rope-scale."""
    lines = ["Trained on frames that are 1 to 3 apart (intervals 1-3: its 2 temporal patches are as far apart as any "
             "of the 4 of 16 frames) or 1 to 2 (4-8-16 intervals: as any of the 7 of 28 frames), beside those trained "
             "on frames that are 1 apart; all are sampled at 0.04 s per frame, without scaling:", ""]  # fmt: skip
    groups, cells = {("8", "intervals 1-3"): (8, 16, 24), ("4-8-16 even", "4-8-16 intervals"): (16, 24, 32)}, []
    for arms, lengths in groups.items():
        for frames in lengths:
            for arm in arms:
                scale = BY_NAME[arm].time_scales[0]  # None: as trained, which is 0.04 s for the plain ones
                made = sample_rows(study.rows, arm, frames, time_scale=scale)
                cells.append([arm, str(frames), share_cell(made), value_cell(made, "speed")])
    return lines + table(["arm", "sampled frames", "direction right (95%)", "speed / true"], cells)


def listed(values):
    return ", ".join(map(str, values)) or "none"


def length_row(study, name, frames, method):
    made = sample_rows(study.rows, name, frames, rope_scale=method)
    cells = [value_cell(made, key) for key in ("speed", "seam", "drift")]
    return [name, str(frames) + ("" if method == "none" else f", {method}"), share_cell(made), *cells]


def answer_scale(study):
    """Rotary time positions beyond the trained length."""
    lines, cells, drawn = ["### --rope-scale when sampling", ""], [], False
    figure, panels = plt.subplots(1, 3, figsize=(16, 5.5), layout="constrained", sharey=True)
    for axes, name in zip(panels, ("4", "8", "16"), strict=True):
        lengths = BY_NAME[name].scaled
        for number, method in enumerate(SCALES):
            made = [sample_rows(study.rows, name, frames, rope_scale=method) for frames in lengths]
            drawn |= draw_shares(axes, lengths, made, label=method, **line_style(number))
            cells += [length_row(study, name, frames, method) for frames in lengths]
        for frames in lengths:
            lines.append(best_scale_sentence(study, name, frames))
        axes.set(title=f"trained on {name} frames", xlabel="sampled frames", xticks=lengths)
    panels[0].set(ylabel="direction right, %", ylim=(-3, 103))
    titles = ["arm", "sampled frames", "direction right (95%)", "speed / true", "seam score", "largest drift"]
    return lines + [""] + table(titles, cells) + save_figure(study, "C-scale", figure, drawn)


def best_scale_sentence(study, name, frames):
    """A sentence: whether a --rope-scale is better than none, on the seeds that have both."""
    place = f"- Trained on {name}, sampled at {frames} frames"
    plain = directions(study, name, 1.0, frames)
    found = {}
    for method in SCALES[1:]:
        made = sample_rows(study.rows, name, frames, rope_scale=method)
        if seeds := made.keys() & plain.keys():
            none = {seed: sample_rows(study.rows, name, frames)[seed] for seed in seeds}
            found[method] = pooled({seed: made[seed] for seed in seeds}), pooled(none)
    if not found:
        return f"{place}: not run yet."
    best = max(found, key=lambda method: found[method][0][0])
    (share, (low, high), clips), (none, (none_low, none_high), _) = found[best]
    verdict = "the intervals are apart" if low > none_high or high < none_low else "the intervals meet: not told apart"
    return f"{place}: best is {best} with {share:.1%} right, none has {none:.1%} ({clips} clips each): {verdict}."


def answer_d(study):
    arm, lines, cells = BY_NAME["intervals 1-3"], [], []
    figure, axes = plt.subplots(figsize=(8, 6), layout="constrained")
    places, truths, found, halves = [], [], [], []
    for scale in arm.time_scales:
        made = sample_rows(study.rows, arm.name, 8, time_scale=scale)
        speeds = values_of(made, "speed")
        cells.append([f"{scale:g}", share_cell(made), mean_cell(speeds, 3)])
        if speeds:
            true = next(iter(values_of(made, "true_speed").values()))
            mean, half = np.mean(list(speeds.values())), half_width(list(speeds.values()))
            places, truths = [*places, scale], [*truths, true]
            found, halves = [*found, mean * true], [*halves, (half or 0) * true]
            held = "within" if abs(mean - 1) <= 0.1 else "not within"
            ends = "" if half is None else f", 95% {mean - half:.3f} to {mean + half:.3f}"
            lines.append(f"- At {scale:g} s per frame the displacement is {mean:.3f} of the true one ({len(speeds)} "
                         f"seeds{ends}): {held} 10%.")  # fmt: skip
        else:
            lines.append(f"- At {scale:g} s per frame: not run yet.")
    axes.plot(places, truths, color="black", linestyle="--", label="true")
    axes.fill_between(places, [0.9 * x for x in truths], [1.1 * x for x in truths], color="gray", alpha=0.2)
    axes.errorbar(places, found, halves, capsize=4, label="generated (95%)", **line_style(0))
    axes.set(xlabel="time scale, seconds per frame", ylabel="displacement, px per frame", ylim=(0, None))
    lines += ["", *table(["seconds per frame", "direction right (95%)", "displacement / true"], cells)]
    return lines + save_figure(study, "D", figure, bool(places))


FACTORS = (
    "theta 1000", "theta 10000", "split 16,8,8", "split 4,14,14", "QK norm", "AdamW", "patch 2: 16", "patch 1: 16",
)  # fmt: skip
SHIFTS, SHIFTED = (1, 2, 3, 5), (4, 16)  # gamma shifts, of these frames


def answer_e(study):
    lines, names = [], ["16", *FACTORS]
    for name in FACTORS:
        lines.append("- " + difference(name, "16", "Loss at 16 frames", losses(study, name), losses(study, "16")))
    for frames in SHIFTED:
        lines.append("- " + best_shift_sentence(study, frames))
    lines += ["", "The base, 16, has theta 100, channels 10, 10, 10 of a head of 32, temporal patch 4, no QK norm, "
              "Muon, gamma shift 3.", ""]  # fmt: skip
    lines += table(ARM_TITLES, [arm_row(study.rows, name, 1.0, 16) for name in names])
    cells = []
    for frames in SHIFTED:
        cells += [[str(frames), str(shift), *arm_row(study.rows, shifted(frames, shift), 1.0, frames)[4:]]
                  for shift in SHIFTS]  # fmt: skip
    lines += table(["frames", "gamma shift", *ARM_TITLES[4:]], cells)
    figure, panels = plt.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    drawn = False
    for place, name in enumerate(FACTORS):
        own, base = losses(study, name), losses(study, "16")
        gaps = {seed: {"gap": own[seed] - base[seed]} for seed in own.keys() & base.keys()}
        values = [row["gap"] for row in gaps.values()]
        if values:
            panels[0].errorbar(np.mean(values), place, xerr=half_width(values) or 0, capsize=4, **line_style(0))
            panels[0].scatter(values, [place] * len(values), color="black", s=20, zorder=3)
            drawn = True
    panels[0].set_yticks(range(len(FACTORS)), FACTORS)
    panels[0].axvline(0, color="gray", linestyle="--")
    panels[0].set(xlabel='validation loss minus that of "16" (95%)')
    for number, frames in enumerate(SHIFTED):
        made = [sample_rows(study.rows, shifted(frames, shift), frames) for shift in SHIFTS]
        drawn |= draw_shares(panels[1], SHIFTS, made, label=f"{frames} frames", **line_style(number))
    panels[1].set(xlabel="gamma shift", ylabel="direction right, %", xticks=SHIFTS, ylim=(-3, 103))
    return lines + save_figure(study, "E", figure, drawn)


def shifted(frames, shift):
    return str(frames) if shift == 3 else f"{frames} frames, gamma shift {shift}"


def best_shift_sentence(study, frames):
    found = {shift: pooled(sample_rows(study.rows, shifted(frames, shift), frames)) for shift in SHIFTS}
    found = {shift: part for shift, part in found.items() if part}
    if len(found) < len(SHIFTS):
        return f"Gamma shift at {frames} frames: not run yet ({len(found)} of {len(SHIFTS)})."
    best = max(found, key=lambda shift: found[shift][0])
    alike = [shift for shift in found if shift != best and found[shift][1][1] >= found[best][1][0]]
    return (f"Gamma shift at {frames} frames: most directions are right with {best} ({found[best][0]:.1%}); within the "
            f"intervals as good: {listed(alike)}.")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# UCF-101, estimated

PEAK, UTILISATIONS = 989e12, (0.2, 0.4)  # FLOP/s of an H100 in bf16, dense; shares of it that training reaches
UCF_PHASES = ((4, 50_000, 256), (8, 50_000, 128), (16, 50_000, 64))  # frames, steps, clips: those of the README


def answer_f(study):
    """FLOPs of the README's schedule, and the time that they take on 8 GPUs."""
    settings = {"input_size": 32, "in_channels": 4, "num_classes": 101, "use_rope": True}
    cells, hours_at = [], [f"hours (GPU hours) at {share:.0%}" for share in UTILISATIONS]
    for model in ("EqM-S/4", "EqM-B/2", "EqM-XL/2"):
        config = model_config(model, num_frames=16, **settings)
        spent = [steps * clips * config.training_flops(frames) for frames, steps, clips in UCF_PHASES]
        alone = sum(spent) / (64 * config.training_flops(16))
        hours = [sum(spent) / (8 * PEAK * share) / 3600 for share in UTILISATIONS]
        split = " / ".join(f"{part / sum(spent):.0%}" for part in spent)
        cells.append([model, f"{sum(spent) / 1e18:.2f}", split, *(f"{hour:.2g} ({8 * hour:.2g})" for hour in hours),
                      f"{alone:,.0f}"])  # fmt: skip
    schedule, last = [], 0
    for frames, steps, clips in UCF_PHASES:
        last += steps
        schedule.append(f"{frames}:{last}:{clips}")
    lines = ["Latents of 32 x 32, the README's phases of 50,000 steps of 256, 128 and 64 clips; 8 GPUs "
             f"of {PEAK / 1e12:.0f} TFLOP/s (H100, bf16, dense). Not run: hours follow from the counted FLOPs and the "
             "utilisation alone.", "",
             *table(["model", "EFLOP", "4 / 8 / 16 frames", *hours_at,
                     "steps of 64 clips of 16 frames for the same"], cells),
             "```bash", 'torchrun --nproc_per_node=8 EqM/train.py --video --use-rope --model "EqM-S/4" \\',
             "  --data-path datasets/ucf-101-latents --results-dir results/ucf --precision bf16 --resume \\",
             f"  --frames-schedule {','.join(schedule)}", "```", ""]  # fmt: skip
    for name in ("4-8-16 even", "4-8-16 long"):
        lines.append(f"- On Moving Shapes: {goal_sentence(study, name, '16')}")
    lines.append(f"- {pace_sentence(study.rows, '4-8-16 even')}")
    lines.append("- Nothing here says that a result on Moving Shapes carries over to UCF-101.")
    return [*lines, ""]


def pace_sentence(rows, name):
    """A sentence: seconds per FLOP of an arm, relative to the arm "16" on the same machine."""
    ratios = {}
    for seed, row in final_rows(rows, name).items():
        other = final_rows(rows, "16").get(seed)
        if other and None not in (row["seconds"], other["seconds"]) and row["machine"] == other["machine"]:
            paces = [(one["seconds"] - one["val_seconds"]) / one["flops"] for one in (row, other)]
            ratios[seed] = paces[0] / paces[1]
    return f"Seconds per counted FLOP, {name} / 16: {mean_cell(ratios, 2)}."


# ----------------------------------------------------------------------------------------------------------------------
# The report

ANSWERS = {
    "A": ("Rotary or fixed positions, 16 frames, equal steps", answer_a),
    "B": ("4, 8, then 16 frames, or 16 from the start, at equal compute", answer_b),
    "C": ("Trained at 4, 8, 16 frames, sampled at 4 to 32", answer_c),
    "D": ("Does the displacement per frame follow the time scale?", answer_d),
    "E": ("One factor at a time", answer_e),
    "F": ("What it would take on UCF-101, on paper", answer_f),
}


def write_report(study):
    """Write study.md and its figures from the rows of a study."""
    spent = sum(row["seconds"] for row in last_rows(study.rows)) / 3600
    versions, machines = ({row[name] or "unknown" for row in study.rows} for name in ("code", "machine"))
    lines = ["# Does a frame curriculum with rotary positions pay?", "",
             f"Written by `python scripts/study/study.py --report` from `study.csv` ({len(study.rows)} rows, version "
             f"{VERSION}, size {study.size.name}), which `python scripts/study/study.py` measures. {spent:.1f} "
             f"hours of training and sampling so far, on {listed(sorted(machines))}; code "
             f"{listed(sorted(v[:10] for v in versions))}.", "",
             *about_lines(study), *tuning_lines(study)]  # fmt: skip
    for letter, (title, answer) in ANSWERS.items():
        command = f"`python scripts/study/study.py --only {letter}`" if letter in QUESTIONS else "No run."
        lines += [f"## {letter}. {title}", "", command, "", *answer(study)]
    path = study.out / "study.md"
    with atomic_write(path) as file:
        file.write("\n".join(lines).encode())
    say(f"{path}; figures in {study.out / 'figures'}")


def about_lines(study):
    """Lines of markdown: what all arms have in common, how the numbers are computed."""
    size = study.size
    flops = phases_of(BY_NAME["16"], 1.0, size)[1] / 1e12
    return [
        f"Moving Shapes, 16 x 16 px, 1.4 s; depth {size.depth}, width {size.width}, {size.heads} heads, spatial patch "
        f"2; {TOKENS} tokens a step for every arm. 100% compute is {flops:.3g} TFLOP: {size.steps} steps of 8 clips of "
        f"16 frames at temporal patch 4. Runs of 60% decay their learning rate by their own end. Samples: {size.clips} "
        f"clips a run, `ngd`, {size.points - 1} evaluations, guidance {GUIDANCE:g}, averaged weights of the last step. "
        "A share of directions is over the clips of all seeds, with Wilson's 95% interval, which takes clips for "
        "independent; other numbers are mean ± standard error over seeds, in brackets how many; differences are paired "
        "by seed, with Student's 95% interval. Minutes are medians over seeds, of a shared machine at different hours, "
        "so they are no comparison; compute is. Chance is 25% for a direction; real clips have "
        f"{share_text(study.rows)} right.",
        "",
    ]


def share_text(rows):
    values = [row["real_direction"] for row in rows if row["real_direction"] is not None]
    return f"at least {min(values):.1%}" if values else "not yet known how many"


def tuning_lines(study):
    """Lines of markdown: the learning rates that were tried, and which was chosen."""
    if len(study.size.factors) == 1:
        return []
    cells, edges = [], []
    for name in dict.fromkeys(arm.tuned_as for arm in BY_NAME.values()):
        found, taken = study.tuning(name), study.factor(name)
        shown = ["not run" if factor not in found else f"{found[factor]:.4f}" for factor in study.size.factors]
        cells.append([name, *shown, "not run" if taken is None else f"{taken:g}"])
        if taken in (min(study.size.factors), max(study.size.factors)):
            edges.append(name)
    lines = ["## Learning rates", "",
             f"Factors of Muon {MUON_LR:g} and AdamW {LR:g}; one run each of {TUNE_SHARE:.0%} compute, seed "
             f"{TUNE_SEED}; validation loss at the frames trained last. Arms that are not here take the rate of their "
             "base.", "",
             *table(["arm", *(f"x {factor:g}" for factor in study.size.factors), "taken"], cells)]  # fmt: skip
    if edges:
        lines += [f"At the edge of the grid, so a better one may lie outside: {', '.join(edges)}.", ""]
    return lines
