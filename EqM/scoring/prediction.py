"""Prediction: a model completes real clips from given frames, and is compared with the real ones.

It measures PSNR and SSIM (of scikit-image) of each predicted frame, compared with repeating the
last given frame. Where little moves, most of a frame is background. So it also measures PSNR of the
moving pixels alone, where the real frame differs from that given frame. Several samples of a clip
give a mean, a best one (by its mean over the frames, as in MCVD, arXiv 2205.09853), and an average
picture. Even a perfect model's sample is one of many futures: its squared error is twice the error
of their average. For Moving Shapes, their tracker also scores the motion.
"""

import numpy as np

from runtime.distributed import rank
from scoring import plots
from scoring.stats import by_unit, cell, gather, half95, interval_units, mean_interval, psnr, table
from video.drawing import few
from video.writers import write_sheet

SHOWN = 8  # clips on the sheet
MOVING = 8  # gray levels: a pixel moves if a channel differs from the given frame by more
# name: (title, digits)
METRICS = {
    "psnr": ("PSNR in dB, 95%", 2),
    "ssim": ("SSIM, 95%", 4),
    "psnr_moving": ("of moving pixels", 2),
}
KINDS = {
    "": "mean of {}",
    "_best": "best of {}",
    "_average": "the average of {}",
    "_repeated": "a given frame repeated",
    "_gain": "mean minus repeated",
    "_average_gain": "average minus repeated",
}


def score_prediction(samples, real, clips, out, truth):
    """Score Samples against `real`, a stream of the Clips that they continue.

    Write a plot and a sheet beside `out`. truth: shapes_tracker.Truth, to score the motion, too.
    """
    S = samples.about["real"]["samples_per_clip"]
    given = samples.given[0]  # the same for all

    def measure(clip, name, time_scale, index):
        predicted = samples.clips[S * index : S * (index + 1)]
        tracks = truth.track_pair(predicted[0], clip, name, time_scale) if truth else None
        return *score_clip(clip, predicted, given), tracks

    scores, baselines, pairs, videos = gather(real, measure)
    baselines = {kind: np.stack([row[kind] for row in baselines]) for kind in baselines[0]}
    result = compare(np.stack(scores), baselines, videos)
    if truth:
        result |= truth.summarize_pairs(pairs, videos)
    lacking = "shares" if truth else ""  # of the motion
    result["interval_units"], line = interval_units(lacking, real=videos)
    others = [frame for frame in range(samples.num_frames) if frame not in given]
    result |= {"given_frames": samples.about["given"][0]["frames"], "predicted_frames": others}
    if rank() == 0:
        plots.plot_prediction(out.with_suffix(".png"), result, samples.num_frames, KINDS)
        write_pairs(out.with_suffix(".sheet.png"), samples, clips, given)
    names = [name + kind for name in METRICS for kind in KINDS if name + kind in result]
    values = {name: result[name] for name in names}
    lines = result_lines(result)
    if truth:
        for name in ("direction_accuracy", "speed_ratio", "appearance_kept"):
            values[name] = result["motion"][name]
        lines += truth.pair_lines(result)
    return values, result, [*lines, line]


def score_clip(real, samples, given):
    """(scores (3, S, F), {baseline: scores (3, F)}) of the F predicted frames; 3: the METRICS.

    real (T, H, W, 3) and samples (S, T, H, W, 3) are uint8. Baselines: "repeated", the last given
    frame before (else the first after); "average", of several samples.
    """
    others = [frame for frame in range(len(real)) if frame not in given]
    nearest = [max((frame for frame in given if frame < t), default=min(given)) for t in others]
    moving = (np.abs(real[others].astype(int) - real[nearest]) > MOVING).any(axis=-1)  # (F, H, W)

    def scores_of(frames):
        return np.array([*map(frame_scores, frames, real[others], moving)]).T  # (3, F)

    made = {"repeated": real[nearest]}
    if len(samples) > 1:
        made["average"] = np.rint(samples[:, others].mean(axis=0)).astype(np.uint8)
    scores = np.stack([scores_of(sample[others]) for sample in samples], axis=1)
    return scores, {kind: scores_of(frames) for kind, frames in made.items()}


def frame_scores(frame, real, moving):
    """The METRICS of a frame uint8 (H, W, 3): PSNR, SSIM, and PSNR of the pixels in moving (H, W),
    NaN without any.
    """
    from skimage.metrics import structural_similarity  # takes a second to load

    # As published (Wang et al. 2004): Gaussian windows of sigma 1.5, the mean over the colors
    settings = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 255,
    }
    ssim = (
        structural_similarity(real, frame, channel_axis=-1, **settings)
        if (frame != real).any()
        else 1.0
    )
    return psnr(frame, real), ssim, psnr(frame[moving], real[moving])


def compare(scores, baselines, videos=()):
    """A plain dict of scores (N, 3, S, F) and of those of baselines, {name: (N, 3, F)}.

    videos: those of the clips.
    """
    moves = ~np.isnan(scores[:, -1, 0]).all(axis=1)
    result = {
        "clips": len(scores),
        "clips_that_move": int(moves.sum()),
        "samples_per_clip": scores.shape[2],
    }
    for number, name in enumerate(METRICS):
        own = scores[:, number]  # (N, S, F)
        best = own[np.arange(len(own)), mean(own, axis=2).argmax(axis=1)]  # (N, F)
        columns = {"": own.mean(axis=1), "_best": best}
        columns |= {f"_{kind}": values[:, number] for kind, values in baselines.items()}
        for kind, values in columns.items():
            half = half95(by_unit(values, videos))
            result[f"{name}{kind}_by_frame"] = {
                "mean": or_none(mean(values)),
                "half95": or_none(half),
            }
        by_clip = {kind: mean(values, axis=1) for kind, values in columns.items()}  # (N,) each
        for kind in by_clip.keys() & {"", "_average"}:
            by_clip[f"{kind}_gain"] = by_clip[kind] - by_clip["_repeated"]
        for kind, values in by_clip.items():
            result |= {
                name + kind: or_none(mean(values)),
                f"{name}{kind}_interval95": mean_interval(values, videos),
            }
    return result


def mean(values, axis=0):
    """The mean of values without NaNs; NaN where there are none."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan)


def or_none(values):
    """A number or a list of numbers for JSON: NaN becomes None."""
    return np.where(np.isnan(values), None, values).tolist()


def result_lines(result):
    """The main results, to print."""
    rows = [
        (
            f"clips: {result['clips']}, given {result['given_frames']}",
            *(title for title, _ in METRICS.values()),
        )
    ]
    for kind, title in KINDS.items():
        if f"psnr{kind}" in result:
            cells = [cell(result, name + kind, digits) for name, (_, digits) in METRICS.items()]
            rows.append((title.format(result["samples_per_clip"]), *cells))
    return table(rows)


def write_pairs(path, samples, clips, given):
    """A sheet of clips, two rows each: given (marked) and predicted frames, then the true ones."""
    S = samples.about["real"]["samples_per_clip"]
    rows = []
    names = []
    marked = []
    for index in range(min(SHOWN, len(samples) // S)):
        true = clips[index]["clip"].permute(1, 2, 3, 0).numpy()  # (T, H, W, 3)
        rows = rows + [samples.clips[index * S], true]
        marked = marked + [given, ()]
        names += [samples.shown_class(samples.names[index * S]), "true"]
    write_sheet(path, np.stack(rows), names, marked, notes=few(SHOWN, len(samples) // S, "clips"))
