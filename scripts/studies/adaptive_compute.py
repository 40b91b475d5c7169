"""Compare ways to sample with fewer network evaluations, including --stop-below, on Moving Shapes.

    python scripts/studies/adaptive_compute.py --ckpt results/quickstart/*f16*/checkpoints/best.pt \
        --data-path datasets/moving-shapes

Three methods start from the same noise. "cut short" stops the path of 249 evaluations early. "larger steps" covers the
same path length in fewer evaluations. "threshold" stops each sample once the root mean square of its field is small
(--stop-below), with small and with large steps. The script chooses the threshold on one seed and measures it on
another. It takes about an hour on one CPU core; run the same command to continue after an interruption. It writes
results/adaptive_compute.md and .json, and results/figures/adaptive_compute.png. Samples and scores are in
results/adaptive-compute.
"""

import csv
import hashlib
import os
from pathlib import Path

import numpy as np

import lab
from runtime.cli import COUNT, fail, one_line_errors
from scoring.plots import COLORS, MARKERS, plt, save_figure

GOAL = 0.6  # largest share of the full path's evaluations that the chosen threshold may need
SMALL, LARGE = 0.002, 0.008  # step sizes
# Evaluations of the full path, of paths cut short and of larger steps; thresholds
FULL, TINY = (249, (120, 130, 140, 150), (15, 30, 45, 60, 90), (2, 1.5, 1, 0.7, 0.5)), (4, (2,), (2,), (100,))
CURVES = ("cut short", SMALL), ("larger steps", None), ("threshold", SMALL), ("threshold", LARGE)


class Samplings(lab.Run):
    """Samples of a checkpoint, made by several methods, and their scores."""

    def __init__(self, args):
        self.flags = ["--num-frames", args.num_frames, "--num-samples", args.num_samples, "--precision", "bf16"]
        self.flags += ["--sampler", "ngd", "--mu", 0.3, "--cfg-scale", 1.5]  # the quickstart's sampler
        about = [os.path.realpath(args.ckpt), os.stat(args.ckpt).st_mtime_ns, self.flags]
        digest = hashlib.sha256(str(about).encode()).hexdigest()[:8]  # a folder per model and flags
        metrics = {"motion": ["--data-path", args.data_path, "--num-real", 2]}
        super().__init__(Path(args.out, "adaptive-compute", digest), metrics=metrics, ckpt=args.ckpt)

    def rows(self, seed, cases):
        """A row per case: (method, evaluations, step size, threshold or None). The first case is the reference."""
        names = [f"{family} {count} {size:.4g} {limit} seed {seed}" for family, count, size, limit in cases]
        for name, (_, count, size, limit) in zip(names, cases, strict=True):
            flags = ["--seed", seed, "--num-sampling-steps", count + 1, "--stepsize", size, "--stop-below", limit or 0]
            self.tasks[name] = [*self.flags, *flags], ["motion"]
        lab.run_all([self])
        rows, videos = [], [np.load(self.path(name, "samples.npz"))["arr_0"].astype(float) for name in names]
        for name, own, (family, count, size, limit) in zip(names, videos, cases, strict=True):
            spent = [float(count)]
            if limit:
                with open(self.path(name, "evaluations.csv"), newline="") as file:
                    spent = [float(row["evaluations"]) for row in csv.DictReader(file)]
            rows.append({
                "family": family, "seed": seed, "step_size": size, "stop_below": limit,
                "mean_evaluations": float(np.mean(spent)), "least_evaluations": min(spent),
                "most_evaluations": max(spent), "distance": float(np.sqrt(np.mean((own - videos[0]) ** 2))),
                **self.scores(name, "motion")["result"]["generated"],
            })  # fmt: skip
        return rows


def run_experiment(samplings, evaluations, cut_short, larger_steps, thresholds):
    """Return the rows of seed 0, the chosen threshold, and the rows of seed 1 for it and for the full path."""
    full, length = ("cut short", evaluations, SMALL, None), evaluations * SMALL
    cases = [("cut short", count, SMALL, None) for count in cut_short]
    cases += [("larger steps", count, length / count, None) for count in larger_steps]
    cases += [("threshold", evaluations, size, limit) for size in (SMALL, LARGE) for limit in thresholds]
    best, *rows = samplings.rows(0, [full, *cases])
    small = (row for row in rows if (row["family"], row["step_size"]) == ("threshold", SMALL))
    fit = [row for row in small if row["mean_evaluations"] <= GOAL * evaluations
           and row["direction_accuracy"] >= best["direction_accuracy"]]  # fmt: skip
    # The threshold whose samples are closest to those of the full path
    chosen = min(fit, key=lambda row: row["distance"])["stop_below"] if fit else None
    held_out = samplings.rows(1, [full, ("threshold", evaluations, SMALL, chosen)]) if fit else []
    rows.insert(len(cut_short), best)
    return {"rows": rows, "chosen": chosen, "held_out": held_out}


def markdown(content):
    lines = [
        "# Adaptive compute", "",
        "`scripts/studies/adaptive_compute.py` wrote these tables. Distance is the root mean square difference from "
        "the clips of the full path (the row with distance 0.0), which start from the same noise.", "",
        f"Seed 0, {content['rows'][0]['clips']} clips per row:", "", *table(content["rows"]),
    ]  # fmt: skip
    if content["chosen"] is None:
        return [*lines, f"No threshold R is as accurate as the full path with at most {GOAL:.0%} of its evaluations."]
    return [*lines, f"Seed 1, with the R chosen on seed 0, {content['chosen']:g}:", "", *table(content["held_out"])]


def table(rows):
    cells = []
    for row in rows:
        low, high = row["direction_interval95"]
        cells.append([
            row["family"], f"{row['step_size']:.4f}", f"{row['stop_below']:g}" if row["stop_below"] else "",
            f"{row['mean_evaluations']:.1f} ({row['least_evaluations']:.0f} - {row['most_evaluations']:.0f})",
            f"{100 * row['direction_accuracy']:.1f} ({100 * low:.1f} - {100 * high:.1f})",
            lab.cell(row, "speed_ratio", 2), f"{row['distance']:.1f}",
        ])  # fmt: skip
    titles = "method", "step size", "R", "evaluations", "direction accuracy (%)", "speed / true"
    return lab.table([*titles, "distance (gray levels)"], cells)


def plot_rows(path, rows):
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 9), sharex=True)
    for color, marker, (family, step_size) in zip(COLORS, MARKERS, CURVES, strict=False):
        part = [row for row in rows if row["family"] == family and step_size in (None, row["step_size"])]
        part.sort(key=lambda row: row["mean_evaluations"])
        names = "mean_evaluations", "distance", "direction_accuracy"
        evaluations, distances, right = np.array([[row[name] for name in names] for row in part]).T
        low, high = np.array([row["direction_interval95"] for row in part]).T
        error = 100 * np.clip([right - low, high - right], 0, None)
        label = f"{family}, step {step_size}" if step_size else family
        top.errorbar(evaluations, 100 * right, error, marker=marker, color=color, label=label, capsize=3)
        bottom.plot(evaluations, distances, marker=marker, color=color)
        for row, *place in zip(part, evaluations, distances, strict=True):
            if row["stop_below"]:
                bottom.annotate(f"{row['stop_below']:g}", place, (4, 4), textcoords="offset points", fontsize=10)
    for axes in (top, bottom):
        axes.axvline(GOAL * FULL[0], color="black", linestyle=":", label="60% of 249")
    top.set(ylabel="direction accuracy (%)", ylim=(0, 102))
    bottom.set(ylabel="distance from 249 evaluations\n(gray levels, rms)", xlabel="mean evaluations per sample")
    top.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def parse_args():
    parser = lab.study_parser(__doc__, trains=False)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a model trained on Moving Shapes")
    parser.add_argument("--data-path", required=True, metavar="DIR", help="its data set, which has the true motion")
    parser.add_argument("--num-frames", type=COUNT, default=16, help="frames per clip")
    parser.add_argument("--num-samples", type=COUNT, default=144, help="number of clips; the classes take turns")
    return parser.parse_args()


@one_line_errors()
def main():
    args = parse_args()
    if not os.path.exists(args.ckpt):
        fail(f"--ckpt {args.ckpt}: no such file; expected a checkpoint")
    content = run_experiment(Samplings(args), *(TINY if args.miniature else FULL))
    plot_rows(Path(args.out, "figures", "adaptive_compute.png"), content["rows"])
    lab.write_results(args.out, "adaptive_compute", markdown(content), content)


if __name__ == "__main__":
    main()
