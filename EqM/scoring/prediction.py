"""Prediction: a model completes real clips from given frames, and is compared with the real ones.

It measures PSNR and SSIM (of scikit-image) of each predicted frame, compared with repeating the
last given frame. Where little moves, most of a frame is background. So it also measures PSNR of the
moving pixels alone, where the real frame differs from that given frame. Several samples of a clip
give a mean, a best one (by its mean over the frames, as in MCVD, arXiv 2205.09853), and an average
picture. Even a perfect model's sample is one of many futures: its squared error is twice the error
of their average. For Moving Shapes, the tracker of shapes.py also scores the motion.
"""

import numpy as np

from runtime.distributed import rank
from scoring import plots, shapes
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

    Write a plot and a sheet beside `out`.
    """
    S = samples.about["real"]["samples_per_clip"]
    given = samples.given[0]  # the same for all

    def measure(clip, name, time_scale, index):
        predicted = samples.clips[S * index : S * (index + 1)]
        tracks = None
        if truth:  # of the first sample
            tracks = (
                shapes.track(predicted[0]),
                shapes.track(clip),
                truth(name, clip.shape[1], time_scale),
            )
        return *score_clip(clip, predicted, given), tracks

    scores, baselines, tracks, videos = gather(real, measure)
    baselines = {kind: np.stack([row[kind] for row in baselines]) for kind in baselines[0]}
    result = compare(np.stack(scores), baselines, videos) | (
        summarize_motion(tracks, videos) if truth else {}
    )
    lacking = "shares" if truth else ""  # of the motion
    result["interval_units"], line = interval_units(lacking, real=videos)
    others = [frame for frame in range(samples.num_frames) if frame not in given]
    result |= {"given_frames": samples.about["given"][0]["frames"], "predicted_frames": others}
    if rank() == 0:
        plots.plot_prediction(out.with_suffix(".png"), result, samples.num_frames, KINDS)
        write_pairs(out.with_suffix(".sheet.png"), samples, clips, given)
    names = [name + kind for name in METRICS for kind in KINDS if name + kind in result]
    values = {name: result[name] for name in names}
    motion = ("direction_accuracy", "speed_ratio", "appearance_kept") if truth else ()
    return (
        values | {name: result["motion"][name] for name in motion},
        result,
        [*result_lines(result), line],
    )


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


def keeps_appearance(found, real):
    """Whether the Track of a predicted clip has the shape and color of the real clip's Track."""
    if None in (found.shape, found.color, real.color) or found.shape != real.shape:
        return False
    return bool(np.linalg.norm(np.subtract(found.color, real.color)) < shapes.MIN_CONTRAST)


def summarize_motion(tracks, videos):
    """{"motion": of the predicted clips, "motion_real": of the real ones} of (Track, Track of the
    real clip, truth).
    """
    found, real, truths = zip(*tracks, strict=True)
    kept = sum(map(keeps_appearance, found, real)) / len(tracks)
    motion, motion_real = (shapes.summarize_tracks(own, truths, videos) for own in (found, real))
    return {"motion": motion | {"appearance_kept": kept}, "motion_real": motion_real}


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
    if "motion" not in result:
        return table(rows)
    motion = shapes.result_lines(
        {"generated": result["motion"], "real": result["motion_real"]}, shapes.TRACKED
    )
    kept = f"  shape and color of the real clip kept: {result['motion']['appearance_kept']:.3f}"
    return [*table(rows), *motion, kept]


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
