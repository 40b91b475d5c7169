"""Prediction: a model completes real clips from given frames, and is compared with the real ones.

It measures PSNR and SSIM (of scikit-image) of each predicted frame, compared with repeating the
last given frame. Where little moves, most of a frame is background. So it also measures PSNR of the
moving pixels alone, where the real frame differs from that given frame. Several samples of a clip
give a mean, a best one (by its mean over the frames, as in MCVD, arXiv 2205.09853), and an average
picture. Even a perfect model's sample is one of many futures: its squared error is twice the error
of their average. For Moving Shapes, their tracker also scores the motion.
"""

from itertools import product

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
        scores, baselines = score_clip(clip, predicted, given)
        tracks = None
        if truth:
            tracks = truth.track_pair(
                predicted=predicted[0],
                real=clip,
                class_name=name,
                time_scale=time_scale,
            )
        return scores, baselines, tracks

    scores, baselines, pairs, videos = gather(real, measure)
    baselines = {kind: np.stack([row[kind] for row in baselines]) for kind in baselines[0]}
    result = compare(np.stack(scores), baselines, videos)
    if truth:
        result |= truth.summarize_pairs(pairs, videos)
    lacking = "shares" if truth else ""  # of the motion
    result["interval_units"], line = interval_units(lacking, real=videos)
    result["given_frames"] = samples.about["given"][0]["frames"]
    result["predicted_frames"] = [t for t in range(samples.num_frames) if t not in given]
    if rank() == 0:
        plots.plot_prediction(
            path=out.with_suffix(".png"),
            result=result,
            num_frames=samples.num_frames,
            titles=KINDS,
        )
        write_pairs(out.with_suffix(".sheet.png"), samples, clips)
    names = map("".join, product(METRICS, KINDS))
    values = {name: result[name] for name in names if name in result}
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
    others = [t for t in range(len(real)) if t not in given]
    last_given = []
    for t in others:
        before = [frame for frame in given if frame < t]
        last_given.append(max(before, default=min(given)))
    true = real[others]
    repeated = real[last_given]
    moving = (np.abs(true.astype(int) - repeated) > MOVING).any(axis=-1)  # (F, H, W)

    def scores_of(frames):
        return np.array([*map(frame_scores, frames, true, moving)]).T  # (3, F)

    baselines = {"repeated": scores_of(repeated)}
    if len(samples) > 1:
        average = samples[:, others].mean(axis=0)
        baselines["average"] = scores_of(np.rint(average).astype(np.uint8))
    scores = [scores_of(sample[others]) for sample in samples]
    return np.stack(scores, axis=1), baselines


def frame_scores(frame, real, moving):
    """The METRICS of a frame uint8 (H, W, 3): PSNR, SSIM, and PSNR of the pixels in moving (H, W),
    NaN without any.
    """
    from skimage.metrics import structural_similarity  # takes a second to load

    ssim = 1.0
    if (frame != real).any():
        # As published (Wang et al. 2004): Gaussian windows of sigma 1.5, the mean over the colors
        ssim = structural_similarity(
            real,
            frame,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
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
        of_metric = scores[:, number]  # (N, S, F)
        best = mean(of_metric, axis=2).argmax(axis=1)
        columns = {
            "": of_metric.mean(axis=1),
            "_best": of_metric[np.arange(len(scores)), best],
        }
        for kind, values in baselines.items():
            columns[f"_{kind}"] = values[:, number]
        by_clip = {}  # (N,) each
        for kind, values in columns.items():  # (N, F)
            result[f"{name}{kind}_by_frame"] = {
                "mean": or_none(mean(values)),
                "half95": or_none(half95(by_unit(values, videos))),
            }
            by_clip[kind] = mean(values, axis=1)
        for kind in by_clip.keys() & {"", "_average"}:
            by_clip[f"{kind}_gain"] = by_clip[kind] - by_clip["_repeated"]
        for kind, values in by_clip.items():
            result[name + kind] = or_none(mean(values))
            result[f"{name}{kind}_interval95"] = mean_interval(values, videos)
    return result


def mean(values, axis=0):
    """The mean of values without NaNs; NaN where there are none."""
    return np.ma.filled(np.ma.masked_invalid(values).mean(axis=axis), np.nan)


def or_none(values):
    """A number or a list of numbers for JSON: NaN becomes None."""
    return np.where(np.isnan(values), None, values).tolist()


def result_lines(result):
    """The main results, to print."""
    titles = [title for title, _ in METRICS.values()]
    rows = [[f"clips: {result['clips']}, given {result['given_frames']}", *titles]]
    for kind, title in KINDS.items():
        if f"psnr{kind}" in result:
            cells = [cell(result, name + kind, digits) for name, (_, digits) in METRICS.items()]
            rows.append([title.format(result["samples_per_clip"]), *cells])
    return table(rows)


def write_pairs(path, samples, clips):
    """A sheet of clips, two rows each: given (marked) and predicted frames, then the true ones."""
    S = samples.about["real"]["samples_per_clip"]
    rows = []
    names = []
    marked = []
    for index in range(min(SHOWN, len(samples) // S)):
        sample = index * S
        true = clips[index]["clip"].permute(1, 2, 3, 0).numpy()  # (T, H, W, 3)
        rows += [samples.clips[sample], true]
        marked += [samples.given[sample], ()]
        names += [samples.shown_class(samples.names[sample]), "true"]
    write_sheet(
        path,
        videos=np.stack(rows),
        names=names,
        marked=marked,
        notes=few(SHOWN, len(samples) // S, "clips"),
    )
