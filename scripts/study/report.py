"""The report of study.py: from study.csv to results/study.md and its figures."""


import matplotlib
import numpy as np

from arms import ARMS, VERSION
from runtime.atomic import atomic_write
from runtime.cli import say
from scoring import motion

matplotlib.use("Agg")  # no window, no display

# ----------------------------------------------------------------------------------------------------------------------
# From rows to numbers

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # number of values -> 97.5% quantile of Student's t


def final_rows(rows, name, share=1.0):
    """{seed: row of the last step} of an arm's runs."""
    wanted = {"arm": name, "share": share, "kind": "train"}
    own = [row for row in rows if wanted.items() <= row.items()]
    return {row["seed"]: row for row in sorted(own, key=lambda row: row["step"])}


def sample_rows(rows, name, frames=16, share=1.0):
    """{seed: row of the samples} of an arm's runs."""
    wanted = {"arm": name, "kind": "sample", "frames": frames, "share": share}
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
    ends, made = final_rows(rows, name, share), sample_rows(rows, name, frames, share)
    flops, seconds, val_seconds = (values_of(ends, key) for key in ("flops", "seconds", "val_seconds"))
    times = [(seconds[seed] - val_seconds[seed]) / 60 for seed in seconds.keys() & val_seconds.keys()]
    minutes = f"{np.median(times):.1f} ({len(times)})" if times else "not run"
    spent = f"{np.mean(list(flops.values())) / 1e12:.1f}" if flops else "-"
    cells = [name, f"{share:.0%}", spent, minutes, mean_cell(values_of(ends, f"loss_{frames}"))]
    return [*cells, share_cell(made), value_cell(made, "speed"), value_cell(made, "area")]


ARM_TITLES = ["arm", "compute", "TFLOP", "minutes without validation", "validation loss", "direction right (95%)",
              "speed / true", "area / true"]  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# The report


def write_report(study):
    """Write study.md from the rows of a study."""
    cells = [arm_row(study.rows, arm.name, share, 16) for arm in ARMS for share in (1.0, *arm.shares)]
    lines = [f"# Positions and curricula, version {VERSION}", "", *table(ARM_TITLES, cells)]
    path = study.out / "study.md"
    with atomic_write(path) as file:
        file.write("\n".join(lines).encode())
    say(f"{path}")
