"""Plots of samples and their scores: PNG files, readable at half size."""

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no window, no display
from matplotlib import pyplot as plt  # noqa: E402

plt.rcParams.update({"font.size": 14, "axes.grid": True, "grid.alpha": 0.3, "savefig.dpi": 100})
MAX_LINES = 32  # samples with a line of their own


def plot_evaluations(path, evaluations, budget):
    """Histogram of the number of evaluations (N,) of each sample, at most `budget`."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    edges = np.unique(np.linspace(0, budget + 1, min(budget + 2, 51)).round())
    axes.hist(evaluations, edges)
    axes.axvline(evaluations.mean(), color="black", linestyle="--", label=f"mean {evaluations.mean():.1f}")
    axes.set(xlabel="evaluations of the network", ylabel="samples", xlim=(0, budget + 1))
    axes.legend()
    save_figure(figure, path)


def plot_energies(path, energies, sampler):
    """Energies (N, num_steps), NaN after a sample has stopped: a line per sample (at most MAX_LINES), and the mean."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps = np.arange(energies.shape[1])
    axes.plot(steps, energies[:MAX_LINES].T, color="tab:blue", alpha=0.3, linewidth=1)
    running = ~np.isnan(energies).all(axis=0)
    axes.plot(steps[running], np.nanmean(energies[:, running], axis=0), color="black", label="mean of running samples")
    axes.set(xlabel=f"step of {sampler}", ylabel="energy")
    axes.legend()
    save_figure(figure, path)


def plot_consistency(path, by_position, temporal_patch_size):
    """Change and sharpness by position in the clip, generated and real, with the 95% intervals of their means.

    by_position comes from consistency.summarize; dotted lines mark the first frames of temporal patches.
    """
    figure, panels = plt.subplots(2, 1, figsize=(9, 8), layout="constrained", sharex=True)
    titles = {"change": "change from the frame before", "sharpness": "sharpness"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for kind, color in (("real", "black"), ("generated", "tab:blue")):
            values = by_position[kind][name]
            first = 1 if name == "change" else 0  # a change belongs to the later of its frames
            frames = np.arange(first, first + len(values["mean"]))
            axes.plot(frames, values["mean"], color=color, marker="o", markersize=4, label=kind)
            axes.fill_between(frames, values["low"], values["high"], color=color, alpha=0.2, linewidth=0)
        num_frames = len(by_position["real"]["sharpness"]["mean"])
        for frame in range(temporal_patch_size, num_frames, temporal_patch_size):
            label = "first frame of a temporal patch" if frame == temporal_patch_size else None
            axes.axvline(frame, color="tab:red", linestyle=":", label=label)
        axes.set(ylabel=f"{title}\n(grey levels, rms)")
        axes.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    panels[1].set(xlabel="frame")
    save_figure(figure, path)


def plot_prediction(path, result, num_frames):
    """PSNR and SSIM of each predicted frame and of the baselines, with 95% intervals; given frames are shaded.

    result comes from prediction.compare.
    """
    figure, panels = plt.subplots(2, 1, figsize=(9, 8), layout="constrained", sharex=True)
    count, frames = result["samples_per_clip"], result["predicted_frames"]
    own = f"mean of {count}" if count > 1 else "predicted"
    kinds = {"": ("tab:blue", own), "_repeated": ("black", "given frame repeated")}
    kinds |= {"_best": ("tab:green", f"best of {count}")} if count > 1 else {}
    kinds |= {"_average": ("tab:orange", f"the average of {count}")} if "psnr_average" in result else {}
    kinds |= {"_moved": ("tab:purple", "and moved truly")} if "psnr_moved" in result else {}
    given = [frame for frame in range(num_frames) if frame not in frames]
    for axes, (name, title) in zip(panels, {"psnr": "PSNR (dB)", "ssim": "SSIM"}.items(), strict=True):
        for kind, (color, label) in kinds.items():
            values = np.full((2, num_frames), np.nan)
            values[:, frames] = [result[f"{name}{kind}_by_frame"][part] for part in ("mean", "half95")]
            axes.plot(np.arange(num_frames), values[0], color=color, marker="o", markersize=4, label=label)
            ends = values[0] - values[1], values[0] + values[1]
            axes.fill_between(np.arange(num_frames), *ends, color=color, alpha=0.2, linewidth=0)
        for frame in given:
            axes.axvspan(frame - 0.5, frame + 0.5, color="#ffe8d1", label="given" if frame == given[0] else None)
        axes.set(ylabel=title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    panels[1].set(xlabel="frame")
    save_figure(figure, path)


def save_figure(figure, path):
    figure.savefig(path)
    plt.close(figure)
