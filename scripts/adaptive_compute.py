"""What does it buy to stop each sample when its field is small? Accuracy against evaluations, for Moving Shapes.

    python scripts/adaptive_compute.py --ckpt results/quickstart/*f16*/checkpoints/best.pt \
        --data-path datasets/moving-shapes

Three families, from the same noise: 250 points cut short, as many evaluations in larger steps (their sum is that of
250), and thresholds for the root mean square of the field (--stop-below), with small and with large steps. The
threshold that is recommended is chosen on one seed and measured on another. Writes results/adaptive_compute.json, .md
and figures/adaptive_compute.png; about an hour on one CPU core.
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
GUIDANCE, MOMENTUM = 1.5, 0.3  # ngd in bf16, as in the quickstart
CUT_SHORT = (120, 130, 140, 150, 249)  # evaluations
LARGER_STEPS = (15, 30, 45, 60, 90)  # evaluations, that share a way of 249 * STEP_SIZE
THRESHOLDS = (2.0, 1.5, 1.0, 0.7, 0.5)
GOAL = 0.6  # of the evaluations of 250 points


def parse_args():
    parser = ArgumentParser(description="Accuracy of samples against the evaluations spent on them.")
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="a model of Moving Shapes")
    parser.add_argument("--data-path", required=True, metavar="DIR", help="its data set, for the true directions")
    parser.add_argument("--num-frames", type=COUNT, default=16, metavar="N", help="frames per clip")
    parser.add_argument("--num-samples", type=COUNT, default=144, metavar="N", help="clips, the classes in turn")
    parser.add_argument("--out", default="results", metavar="DIR", help="where the table and the figure go")
    return parser.parse_args()


class Study:
    """The model, and what it takes to sample and score it."""

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
            motion.truths(Path(args.data_path) / "shapes.json", self.data["classes"][label], self.data["image_size"],
                          self.time_scale)
            for label in self.labels
        ]  # fmt: skip

    def sample(self, seed, num_steps, step_size, stop_below=None):
        """(videos uint8 (N, T, H, W, 3), evaluations (N,)) of the noise of a seed."""
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
        """One line of the table; reference are the videos of 250 points from the same noise."""
        videos, evaluations = self.sample(seed, num_steps, step_size, stop_below)
        reference = videos if reference is None else reference
        score = motion.summarize([motion.track(video) for video in videos.numpy()], self.truths)
        spent = evaluations.double()
        row = {
            "family": family,
            "seed": seed,
            "step_size": step_size,
            "stop_below": stop_below,
            "mean_evaluations": spent.mean().item(),
            "least_evaluations": spent.min().item(),
            "most_evaluations": spent.max().item(),
            "distance": (videos.float() - reference.float()).square().mean().sqrt().item(),  # grey levels
            **score,
        }
        say(f"{describe(row)}: {row['mean_evaluations']:.1f} evaluations, {row['direction_accuracy']:.1%} right")
        return row, videos


def describe(row):
    limit = f", stop below {row['stop_below']:g}" if row["stop_below"] else ""
    return f"{row['family']}, steps of {row['step_size']:.4g}{limit}, seed {row['seed']}"


def measure(study):
    """All rows: the three families on seed 0, then 250 points and the chosen threshold on seed 1."""
    rows, way = [], (POINTS - 1) * STEP_SIZE
    full, reference = study.row("cut short", 0, None, POINTS, STEP_SIZE)
    for count in CUT_SHORT[:-1]:
        rows.append(study.row("cut short", 0, reference, count + 1, STEP_SIZE)[0])
    rows.append(full)
    for count in LARGER_STEPS:
        rows.append(study.row("larger steps", 0, reference, count + 1, way / count)[0])
    for step_size in (STEP_SIZE, LARGE_STEP_SIZE):
        for limit in THRESHOLDS:
            rows.append(study.row("threshold", 0, reference, POINTS, step_size, limit)[0])
    chosen = choose(rows, full)
    if chosen is None:
        return rows, None, []
    again, reference = study.row("cut short", 1, None, POINTS, STEP_SIZE)
    return rows, chosen, [again, study.row("threshold", 1, reference, POINTS, STEP_SIZE, chosen)[0]]


def choose(rows, full):
    """The threshold (small steps) of the least distance from 250 points, within the goal and no less accurate.

    None if there is no such threshold.
    """
    fit = [
        row
        for row in rows
        if row["family"] == "threshold"
        and row["step_size"] == STEP_SIZE
        and row["mean_evaluations"] <= GOAL * full["mean_evaluations"]
        and row["direction_accuracy"] >= full["direction_accuracy"]
    ]
    return min(fit, key=lambda row: row["distance"])["stop_below"] if fit else None


def table(rows):
    titles = "| | step | R | evaluations | direction right (95%) | speed / true | away from 250 points |"
    lines = [titles, "|---" * 7 + "|"]
    for row in rows:
        low, high = row["direction_interval95"]
        limit = f"{row['stop_below']:g}" if row["stop_below"] else ""
        speed = "-" if row["speed_ratio"] is None else f"{row['speed_ratio']:.2f}"
        accuracy = f"{row['direction_accuracy']:.1%} ({100 * low:.1f} - {100 * high:.1f})"
        spent = f"{row['mean_evaluations']:.1f} ({row['least_evaluations']:.0f} - {row['most_evaluations']:.0f})"
        cells = [row["family"], f"{row['step_size']:.4f}", limit, spent, accuracy, speed, f"{row['distance']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(path, rows):
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
        spent = [row["mean_evaluations"] for row in part]
        right = np.array([row["direction_accuracy"] for row in part])
        ends = np.array([row["direction_interval95"] for row in part]).T
        label = f"{family}, step {step_size}" if step_size else family
        error = np.clip([right - ends[0], ends[1] - right], 0, None) * 100
        top.errorbar(spent, 100 * right, error, marker="o", color=color, label=label, capsize=3)
        bottom.plot(spent, [row["distance"] for row in part], marker="o", color=color)
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
        study = Study(args)
    except UserError as error:
        fail(error)
    rows, chosen, held_out = measure(study)
    out = Path(args.out)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    result = {"rows": rows, "chosen": chosen, "held_out": held_out}
    (out / "adaptive_compute.json").write_text(json.dumps(result, indent=1) + "\n")
    text = f"Seed 0, {args.num_samples} clips a row:\n\n{table(rows)}\n\n"
    if chosen is None:
        text += f"No R is as accurate as 250 points with at most {GOAL:.0%} of the evaluations.\n"
    else:
        text += f"R = {chosen:g}, chosen on seed 0, on seed 1:\n\n{table(held_out)}\n"
    (out / "adaptive_compute.md").write_text(text)
    draw(out / "figures" / "adaptive_compute.png", rows)
    say(text)


if __name__ == "__main__":
    main()
