"""Adaptive compute on Moving Shapes: accuracy of samples against evaluations of the network.

    python scripts/adaptive_compute.py --ckpt results/quickstart/*f16*/checkpoints/best.pt \
        --data-path datasets/moving-shapes

Three families, all from the same noise: the 250 points cut short, fewer evaluations in larger steps (with the same sum
of steps), and thresholds for the root mean square of the field (--stop-below), with small and with large steps. The
recommended threshold is chosen on one seed and measured on another. Writes results/adaptive_compute.json, .md and
figures/adaptive_compute.png; takes about an hour on one CPU core.
"""

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
import checkpoint
import generation
from checkpoint import trained_time_scale
from runtime.cli import COUNT, ArgumentParser, UserError, check_writable, fail, say
from runtime.rng import normal
from scoring import motion
from vae import load_vae

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

POINTS, STEP_SIZE, LARGE_STEP_SIZE = 250, 0.002, 0.008
GUIDANCE, MOMENTUM = 1.5, 0.3  # of ngd in bf16, as in the quickstart
CUT_SHORT = (120, 130, 140, 150, 249)  # evaluations
LARGER_STEPS = (15, 30, 45, 60, 90)  # evaluations; the sum of the steps stays 249 * STEP_SIZE
THRESHOLDS = (2.0, 1.5, 1.0, 0.7, 0.5)
GOAL = 0.6  # a threshold may take at most this share of the evaluations of 250 points


def parse_args():
    parser = ArgumentParser(description="Accuracy of Moving Shapes samples against evaluations of the network.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint of a model of Moving Shapes")
    parser.add_argument("--data-path", required=True, metavar="DIR", help="its data set, for the true motion")
    parser.add_argument("--num-frames", type=COUNT, default=16, metavar="N", help="frames per clip")
    parser.add_argument("--num-samples", type=COUNT, default=144, metavar="N", help="clips, the classes in turn")
    parser.add_argument("--out", default="results", metavar="DIR", help="folder for the tables and the figure")
    return parser.parse_args()


class Experiment:
    """The model, what is sampled from it, and the truth that scores it."""

    def __init__(self, args):
        self.model, config, _ = checkpoint.load_model(args.ckpt, video=True)
        self.data, self.num_samples, self.num_frames = config["data"], args.num_samples, args.num_frames
        try:
            self.model.config.check_num_frames(args.num_frames)
        except ValueError as error:
            raise UserError(f"--num-frames {args.num_frames}: {error}") from error
        self.vae = load_vae(self.data["vae"])
        self.labels = torch.arange(args.num_samples) % len(self.data["classes"])
        self.time_scale = trained_time_scale(self.data)
        self.truths = [
            motion.read_truth(Path(args.data_path) / "shapes.json", self.data["classes"][label],
                              self.data["image_size"], self.time_scale)
            for label in self.labels
        ]  # fmt: skip

    def sample(self, seed, num_steps, step_size, stop_below=None):
        """(videos uint8 (N, T, H, W, 3), evaluations (N,)), from the noise of this seed."""
        config = self.model.config
        shape = (config.in_channels, self.num_frames, config.input_size, config.input_size)
        latents, evaluations, _ = generation.generate(
            self.model,
            normal(seed, "sample", 0, range(self.num_samples), shape),
            self.labels,
            torch.full((self.num_samples,), self.time_scale),
            null_label=config.num_classes,
            guidance=GUIDANCE,
            method="ngd",
            num_steps=num_steps,
            step_size=step_size,
            momentum=MOMENTUM,
            stop_below=stop_below,
            precision="bf16",
        )
        return self.vae.decode(latents), evaluations

    def row(self, family, seed, reference, num_steps, step_size, stop_below=None):
        """(row of the table, videos); reference is the videos of 250 points from the same noise, None for itself."""
        videos, evaluations = self.sample(seed, num_steps, step_size, stop_below)
        reference = videos if reference is None else reference
        score = motion.summarize([motion.track(video) for video in videos.numpy()], self.truths)
        evaluations = evaluations.double()
        row = {
            "family": family,
            "seed": seed,
            "step_size": step_size,
            "stop_below": stop_below,
            "mean_evaluations": evaluations.mean().item(),
            "least_evaluations": evaluations.min().item(),
            "most_evaluations": evaluations.max().item(),
            "distance": (videos.float() - reference.float()).square().mean().sqrt().item(),  # rms, in grey levels
            **score,
        }
        say(f"{row_title(row)}: {row['mean_evaluations']:.1f} evaluations, {row['direction_accuracy']:.1%} right")
        return row, videos


def row_title(row):
    limit = f", stop below {row['stop_below']:g}" if row["stop_below"] else ""
    return f"{row['family']}, steps of {row['step_size']:.4g}{limit}, seed {row['seed']}"


def run_experiment(experiment):
    """(rows of the three families on seed 0, the chosen threshold, rows of 250 points and that threshold on seed 1)."""
    rows, sum_of_steps = [], (POINTS - 1) * STEP_SIZE
    full, reference = experiment.row("cut short", 0, None, POINTS, STEP_SIZE)
    for count in CUT_SHORT[:-1]:
        rows.append(experiment.row("cut short", 0, reference, count + 1, STEP_SIZE)[0])
    rows.append(full)
    for count in LARGER_STEPS:
        rows.append(experiment.row("larger steps", 0, reference, count + 1, sum_of_steps / count)[0])
    for step_size in (STEP_SIZE, LARGE_STEP_SIZE):
        for limit in THRESHOLDS:
            rows.append(experiment.row("threshold", 0, reference, POINTS, step_size, limit)[0])
    chosen = choose_threshold(rows, full)
    if chosen is None:
        return rows, None, []
    full, reference = experiment.row("cut short", 1, None, POINTS, STEP_SIZE)
    return rows, chosen, [full, experiment.row("threshold", 1, reference, POINTS, STEP_SIZE, chosen)[0]]


def choose_threshold(rows, full):
    """The threshold (small steps) closest to 250 points, within GOAL and no less accurate; None if there is none."""
    fit = [
        row
        for row in rows
        if row["family"] == "threshold"
        and row["step_size"] == STEP_SIZE
        and row["mean_evaluations"] <= GOAL * full["mean_evaluations"]
        and row["direction_accuracy"] >= full["direction_accuracy"]
    ]
    return min(fit, key=lambda row: row["distance"])["stop_below"] if fit else None


def markdown_table(rows):
    titles = "| | step | R | evaluations | direction right (95%) | speed / true | away from 250 points |"
    lines = [titles, "|---" * 7 + "|"]
    for row in rows:
        low, high = row["direction_interval95"]
        limit = f"{row['stop_below']:g}" if row["stop_below"] else ""
        speed = "-" if row["speed_ratio"] is None else f"{row['speed_ratio']:.2f}"
        accuracy = f"{row['direction_accuracy']:.1%} ({100 * low:.1f} - {100 * high:.1f})"
        evaluations = f"{row['mean_evaluations']:.1f} ({row['least_evaluations']:.0f} - {row['most_evaluations']:.0f})"
        family, step_size, distance = row["family"], f"{row['step_size']:.4f}", f"{row['distance']:.1f}"
        cells = [family, step_size, limit, evaluations, accuracy, speed, distance]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_rows(path, rows):
    plt.rcParams.update({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3})
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 9), sharex=True, layout="constrained")
    families = {
        "tab:gray": ("cut short", STEP_SIZE),
        "tab:orange": ("larger steps", None),
        "tab:blue": ("threshold", STEP_SIZE),
        "tab:green": ("threshold", LARGE_STEP_SIZE),
    }
    for color, (family, step_size) in families.items():
        part = [row for row in rows if row["family"] == family and step_size in (None, row["step_size"])]
        part.sort(key=lambda row: row["mean_evaluations"])
        evaluations = [row["mean_evaluations"] for row in part]
        right = np.array([row["direction_accuracy"] for row in part])
        ends = np.array([row["direction_interval95"] for row in part]).T
        label = f"{family}, step {step_size}" if step_size else family
        error = np.clip([right - ends[0], ends[1] - right], 0, None) * 100
        top.errorbar(evaluations, 100 * right, error, marker="o", color=color, label=label, capsize=3)
        bottom.plot(evaluations, [row["distance"] for row in part], marker="o", color=color)
        for row in part:
            if row["stop_below"]:
                place = (row["mean_evaluations"], row["distance"])
                bottom.annotate(f"{row['stop_below']:g}", place, (4, 4), textcoords="offset points", fontsize=10)
    top.axvline(GOAL * (POINTS - 1), color="black", linestyle=":", label="60% of 249")
    bottom.axvline(GOAL * (POINTS - 1), color="black", linestyle=":")
    top.set(ylabel="direction right, %", ylim=(0, 102))
    bottom.set(ylabel="distance from 250 points,\ngrey levels (rms)", xlabel="mean evaluations per sample")
    top.legend(fontsize=11, loc="lower right")
    figure.savefig(path, dpi=100)


def main():
    args = parse_args()
    try:
        check_writable("--out", args.out)
        experiment = Experiment(args)
    except UserError as error:
        fail(error)
    rows, chosen, held_out = run_experiment(experiment)
    out = Path(args.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "chosen": chosen, "held_out": held_out}
    (out / "adaptive_compute.json").write_text(json.dumps(result, indent=1) + "\n")
    text = f"Seed 0, {args.num_samples} clips a row:\n\n{markdown_table(rows)}\n\n"
    if chosen is None:
        text += f"No R is as accurate as 250 points with at most {GOAL:.0%} of the evaluations.\n"
    else:
        text += f"R = {chosen:g}, chosen on seed 0, on seed 1:\n\n{markdown_table(held_out)}\n"
    (out / "adaptive_compute.md").write_text(text)
    plot_rows(out / "figures" / "adaptive_compute.png", rows)
    for line in text.splitlines():
        say(line)


if __name__ == "__main__":
    main()
