"""Prediction: real clips of which some frames are given, completed by a model and compared with what really came.

PSNR and SSIM (scikit-image's) of each predicted frame, of the mean and of the best of several samples of a clip, beside
repeating the last given frame. The best sample is chosen for each metric on its own, by its mean over the frames, as
MCVD (arXiv 2205.09853) does; on clips with one likely future the mean says more. Where the data are Moving Shapes, the
tracker of motion.py also says whether the whole clip, given and predicted frames, moves as it should.
"""

import itertools
from pathlib import Path

import numpy as np
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from runtime import distributed
from runtime.cli import say
from runtime.distributed import rank
from runtime.rng import generator
from scoring.motion import MIN_CONTRAST, read_truth, summarize, track
from video.given import as_ranges
from video.writers import write_sheet

RESAMPLES = 1000  # of the bootstrap over clips
MOST_PSNR = 60.0  # dB, of equal frames: rounding to 8 bits alone gives 59
SHOWN = 8  # clips on the sheet
METRICS = ("psnr", "ssim")


def score_prediction(stream, given, out, shapes_json=None):
    """Score a stream of (indices, real clips (n, T, H, W, 3), predicted (n, S, T, H, W, 3), class names, time scales).

    given: the numbers of the given frames. Writes a plot and a sheet beside `out`. With shapes_json, a path, the motion
    of the first sample of each clip is scored too. Returns (values, result), plain dicts for JSON, on rank 0 and (None,
    None) elsewhere.
    """
    rows, shown = [], []
    for indices, real, predicted, names, time_scales in stream:
        for index, clip, samples, name, scale in zip(indices, real, predicted, names, time_scales, strict=True):
            tracks = shapes_json and score_motion(samples[0], clip, read_truth(shapes_json, name, len(clip[0]), scale))
            rows.append((index, *score_clip(clip, samples, given), tracks))
            if index < SHOWN:
                shown.append((index, samples[0], clip, name))
    scores, repeated, tracks = distributed.gather_in_order(rows)
    shown = list(distributed.gather_in_order(shown))
    if rank() != 0:
        return None, None
    result = compare(np.stack(scores), np.stack(repeated))
    if shapes_json:
        result |= {"motion": summarize_motion(tracks)}
    T = len(shown[0][0])
    result |= {"given_frames": as_ranges(given), "predicted_frames": free_frames(given, T)}
    from scoring import plots  # matplotlib takes a while to load

    plots.plot_prediction(Path(out).with_suffix(".png"), result, T)
    write_pairs(Path(out).with_suffix(".sheet.png"), *shown, given)
    for line in result_lines(result):
        say(line)
    return values_of(result), result


def free_frames(given, num_frames):
    return [frame for frame in range(num_frames) if frame not in given]


def score_clip(real, samples, given):
    """(scores (2, S, F), scores (2, F) of repeating a given frame) of the F predicted frames; 2: PSNR in dB, SSIM.

    real (T, H, W, 3) and samples (S, T, H, W, 3) are uint8. The frame that is repeated is the last given one before or,
    if there is none, the first one after.
    """
    free = free_frames(given, len(real))
    last = [max((frame for frame in given if frame < t), default=min(given)) for t in free]
    scores = np.array([[frame_scores(sample[t], real[t]) for t in free] for sample in samples])  # (S, F, 2)
    repeated = np.array([frame_scores(real[before], real[t]) for before, t in zip(last, free, strict=True)])  # (F, 2)
    return scores.transpose(2, 0, 1), repeated.T


def frame_scores(frame, real):
    """(PSNR in dB, SSIM) of a frame uint8 (H, W, 3). SSIM as published (Wang et al. 2004): Gaussian windows, sigma 1.5,
    the mean over the color channels.
    """
    if np.array_equal(frame, real):
        return MOST_PSNR, 1.0
    psnr = peak_signal_noise_ratio(real, frame, data_range=255)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return min(psnr, MOST_PSNR), structural_similarity(real, frame, channel_axis=-1, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# From the scores of all clips to a result


def compare(scores, repeated):
    """A plain dict of scores (N, 2, S, F) and of those of repeating a given frame (N, 2, F)."""
    result = {"clips": len(scores), "samples_per_clip": scores.shape[2]}
    for number, name in enumerate(METRICS):
        own, other = scores[:, number], repeated[:, number]  # (N, S, F), (N, F)
        best = own[np.arange(len(own)), own.mean(axis=2).argmax(axis=1)]  # (N, F)
        columns = {"": own.mean(axis=1), "_best": best, "_repeated": other}
        for kind, values in columns.items():
            result[name + kind] = values.mean().item()
            result[f"{name}{kind}_interval95"] = bootstrap(values.mean(axis=1))
            result[f"{name}{kind}_by_frame"] = values.mean(axis=0).tolist()
        gain = own.mean(axis=(1, 2)) - other.mean(axis=1)
        result[f"{name}_gain"], result[f"{name}_gain_interval95"] = gain.mean().item(), bootstrap(gain)
    return result


def bootstrap(values, seed=0):
    """[low, high] of the 95% interval of the mean of values (N,), from resamples of the clips; None for one clip."""
    if len(values) < 2:
        return None
    random, values = generator(seed, "bootstrap", "prediction"), torch.from_numpy(np.asarray(values))
    means = values[torch.randint(len(values), (RESAMPLES, len(values)), generator=random)].mean(dim=1)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


def score_motion(sample, real, truth):
    """(Track of the sample, Truth, whether the shape and the color of the real clip are kept)."""
    found, seen = track(sample), track(real)
    kept = None not in (found.shape, found.color, seen.color) and found.shape == truth.shape
    return found, truth, bool(kept and np.linalg.norm(np.subtract(found.color, seen.color)) < MIN_CONTRAST)


def summarize_motion(tracks):
    found, truths, kept = zip(*tracks, strict=True)
    return summarize(found, truths) | {"kept": sum(kept) / len(kept)}


def values_of(result):
    """The values of a manifest."""
    names = [name + kind for name in METRICS for kind in ("", "_best", "_repeated", "_gain")]
    motion = result.get("motion", {})
    return {name: result[name] for name in names} | {
        name: motion[name] for name in ("direction_accuracy", "speed_ratio", "kept") if name in motion
    }


def result_lines(result):
    """The main results, to print."""

    def cell(name, digits):
        ends = result[f"{name}_interval95"]
        interval = f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else ""
        return f"{result[name]:.{digits}f}{interval}"

    S = result["samples_per_clip"]
    lines = [f"{result['clips']} clips, frames {result['given_frames']} given; {'PSNR in dB':>24} {'SSIM':>24}"]
    kinds = {"": f"mean of {S}", "_best": f"best of {S}", "_repeated": "a given frame repeated", "_gain": "gain"}
    for kind, title in kinds.items():
        lines.append(f"{title:<28} {cell('psnr' + kind, 2):>24} {cell('ssim' + kind, 4):>24}")
    if motion := result.get("motion"):
        share, (low, high) = motion["direction_accuracy"], motion["direction_interval95"]
        speed = "-" if motion["speed_ratio"] is None else f"{motion['speed_ratio']:.3f}"
        lines.append(f"direction right {share:.3f} ({low:.3f} to {high:.3f}), speed / true {speed}")
        lines.append(f"color and shape kept {motion['kept']:.3f}, shape right {motion['shape_accuracy']:.3f}")
    return ["  " + line for line in lines]


def write_pairs(path, predicted, real, names, given):
    """A sheet of clips, two rows each: given (marked) and predicted frames, then the true ones."""
    videos = np.stack(list(itertools.chain(*zip(predicted, real, strict=True))))
    rows = list(itertools.chain(*((name, "true") for name in names)))
    write_sheet(path, videos, rows, [given, ()] * len(names))
