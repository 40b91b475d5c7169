"""Plots: PNG files, readable at half size: the set-up of all figures, and figures of samples."""

import itertools
import math

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no window, no display
from matplotlib import pyplot as plt  # noqa: E402

plt.rcParams.update(
    {
        "font.size": 14,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "figure.figsize": (8, 5),
        "figure.constrained_layout.use": True,
    }
)
# Okabe and Ito: safe for color blindness
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9")
MARKERS = "o", "s", "^", "D", "v", "P", "X"
MAX_LINES = 32  # most samples with a line of their own


def save_figure(figure, path):
    figure.savefig(path, dpi=100)
    plt.close(figure)


def plot_evaluations(path, evaluations, budget):
    """A histogram of the number of evaluations (N,) of each sample, at most `budget`."""
    figure, axes = plt.subplots()
    width = math.ceil((budget + 1) / 50)
    axes.hist(evaluations, np.arange(0, budget + 1 + width, width))
    axes.axvline(
        evaluations.mean(), color="black", linestyle="--", label=f"mean {evaluations.mean():.1f}"
    )
    axes.set(
        xlabel="evaluations of the network",
        ylabel="samples",
        xlim=(0, budget + 1),
    )
    axes.legend()
    save_figure(figure, path)


def plot_energies(path, energies, sampler):
    """Energies (N, num_steps), NaN after a sample stops: a line per sample, and their mean.

    There are at most MAX_LINES lines of samples.
    """
    figure, axes = plt.subplots()
    axes.plot(
        energies[:MAX_LINES].T,
        color="tab:blue",
        alpha=0.3,
        linewidth=1,
    )
    steps = np.flatnonzero(~np.isnan(energies).all(axis=0))
    mean = np.nanmean(energies[:, steps], axis=0)
    axes.plot(steps, mean, color="black", label="mean of running samples")
    axes.set(xlabel=f"step of {sampler}", ylabel="energy")
    axes.legend()
    save_figure(figure, path)


def plot_prediction(path, result, num_frames, titles):
    """PSNR and SSIM by frame, with intervals, from a result of prediction.compare.

    titles: those of its kinds.
    """
    figure, panels = plt.subplots(2, figsize=(9, 8), sharex=True)
    count = result["samples_per_clip"]
    frames = result["predicted_frames"]
    given = [frame for frame in range(num_frames) if frame not in frames]
    labels = {"psnr": "PSNR (dB)", "ssim": "SSIM"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for (kind, title), color in zip(titles.items(), itertools.cycle(COLORS)):
            by_frame = result.get(f"{name}{kind}_by_frame")
            if not by_frame:
                continue
            # a line has gaps where frames are given
            mean, half = np.full((2, num_frames), np.nan)
            mean[frames] = by_frame["mean"]
            half[frames] = by_frame["half95"]
            axes.plot(
                mean,
                color=color,
                marker="o",
                markersize=4,
                label=title.format(count),
            )
            axes.fill_between(
                range(num_frames),
                mean - half,
                mean + half,
                color=color,
                alpha=0.2,
                linewidth=0,
            )
        for frame in given:
            axes.axvspan(
                frame - 0.5,
                frame + 0.5,
                color="#ffe8d1",
                label="given" if frame == given[0] else None,
            )
        axes.set(ylabel=label)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    panels[-1].set(xlabel="frame")
    save_figure(figure, path)
