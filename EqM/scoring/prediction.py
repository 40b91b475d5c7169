"""Prediction: real clips of which some frames are given, completed by a model and compared with what really came.

PSNR and SSIM (scikit-image's) of each predicted frame, of the mean and of the best of several samples of a clip, beside
repeating the last given frame. Where little moves, most of a frame is background that stands still; so there is also
the PSNR of the moving pixels alone, in which what really came differs from that given frame. The best sample is chosen
for each metric on its own, by its mean over the frames, as MCVD (arXiv 2205.09853) does; on clips with one likely
future the mean says more. Of several samples the average is scored as well: a sample is one of many futures, so even a
perfect model's has twice the squared error of the average of many, which is blurred where they differ. Where the data
are Moving Shapes, the tracker of motion.py also says whether the whole clip, given and predicted frames, moves as it
should.
"""

import functools
import itertools
from pathlib import Path

import numpy as np
import torch

from generation import MOST_SAMPLES
from given import as_ranges, check_frames, note_forcing
from runtime import distributed
from runtime.cli import UserError, say
from runtime.distributed import rank
from runtime.rng import generator
from scoring.motion import DIRECTIONS, MIN_CONTRAST, read_truth, summarize, track
from video.writers import write_sheet

RESAMPLES = 1000  # of the bootstrap over clips
MOST_PSNR = 60.0  # dB, of equal frames: rounding to 8 bits alone gives 59
MIN_SIDE = 11  # px, of SSIM's window
SHOWN = 8  # clips on the sheet
MOVING = 8  # grey levels: a pixel moves if a channel differs by more from the given frame
METRICS = ("psnr", "ssim", "psnr_moving")


# ----------------------------------------------------------------------------------------------------------------------
# Checks of evaluate.py


def check_prediction_flags(args, given):
    """Raise UserError for flags that only --metric prediction has, or that it has not; `given` names those given."""
    if args.metric != "prediction":
        for name in sorted(given & {"given_frames", "samples_per_clip", "keep_background"}):
            raise UserError(f"--{name.replace('_', '-')} is for --metric prediction: leave it out")
        return
    if args.samples is not None:
        raise UserError(f"--samples {args.samples}: --metric prediction samples itself: give --ckpt")
    if "num_samples" in given:
        raise UserError(f"--num-samples {args.num_samples}: --metric prediction has --num-real and --samples-per-clip")
    if args.classes not in (None, ["none"]):
        raise UserError(f"--classes {args.classes[0]}: --metric prediction takes the class of each real clip, or none")
    if args.samples_per_clip * (args.num_real or 1) > MOST_SAMPLES:
        raise UserError(f"--samples-per-clip {args.samples_per_clip}: wanted at most {MOST_SAMPLES} samples in all")


def check_prediction(args, generated):
    """Settle --given-frames: the first half where left out. Raises UserError."""
    T = generated.num_frames
    if args.given_frames is None:
        args.given_frames = list(range(T // 2))
    check_frames(args.given_frames, T)
    if generated.image_size < MIN_SIDE:
        found = f"--ckpt {args.ckpt}: makes clips of {generated.image_size} px"
        raise UserError(f"{found}, SSIM needs at least {MIN_SIDE}: --metric prediction is not for them")
    note_forcing(args.ckpt, generated.source)


# ----------------------------------------------------------------------------------------------------------------------
# From clips to scores


def score_prediction(stream, given, out, shapes_json=None):
    """Score a stream of (indices, real clips (n, T, H, W, 3), predicted (n, S, T, H, W, 3), class names, time scales).

    given: the numbers of the given frames. Writes a plot and a sheet beside `out`. With shapes_json, a path, the motion
    of the first sample of each clip is scored too. Returns (values, result), plain dicts for JSON, on rank 0 and (None,
    None) elsewhere.
    """
    truth_of = shapes_json and functools.cache(functools.partial(read_truth, shapes_json))
    rows, shown = [], []
    for indices, real, predicted, names, time_scales in stream:
        for index, clip, samples, name, scale in zip(indices, real, predicted, names, time_scales, strict=True):
            truth = truth_of and truth_of(name, clip.shape[1], scale)
            tracks = truth and (track(samples[0]), track(clip), truth)
            rows.append((index, *score_clip(clip, samples, given, truth), tracks))
            if index < SHOWN:
                shown.append((index, samples[0], clip, name))
    scores, baselines, tracks = distributed.gather_in_order(rows)
    shown = list(distributed.gather_in_order(shown))
    if rank() != 0:
        return None, None
    result = compare(np.stack(scores), {kind: np.stack([row[kind] for row in baselines]) for kind in baselines[0]})
    result |= summarize_motion(tracks) if shapes_json else {}
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


def score_clip(real, samples, given, truth=None):
    """(scores (3, S, F), {baseline: scores (3, F)}) of the F predicted frames; 3: the METRICS.

    real (T, H, W, 3) and samples (S, T, H, W, 3) are uint8. Baselines: "repeated", a given frame (the last one before
    or, if there is none, the first one after); with a Truth "moved", the same frame, moved as the object truly moves;
    with several samples "average", that of the samples, pixel by pixel.
    """
    free = free_frames(given, len(real))
    nearest = [max((frame for frame in given if frame < t), default=min(given)) for t in free]
    moving = [moving_pixels(real[frame], real[t]) for frame, t in zip(nearest, free, strict=True)]

    def scores_of(frames):
        rows = [frame_scores(one, real[t], mask) for one, t, mask in zip(frames, free, moving, strict=True)]
        return np.array(rows).T  # (3, F)

    made = {"repeated": real[nearest]}
    if truth:
        made["moved"] = [moved(real[frame], t - frame, truth) for frame, t in zip(nearest, free, strict=True)]
    if len(samples) > 1:
        made["average"] = np.rint(samples[:, free].mean(axis=0)).astype(np.uint8)
    scores = np.stack([scores_of(sample[free]) for sample in samples], axis=1)
    return scores, {kind: scores_of(frames) for kind, frames in made.items()}


def moving_pixels(before, frame):
    """Which pixels of a frame uint8 (H, W, 3) differ by more than MOVING in a channel: bool (H, W)."""
    return (np.abs(frame.astype(int) - before) > MOVING).any(axis=-1)


def moved(frame, num_frames, truth):
    """A frame uint8 (H, W, 3) that many frames later, if all of it moves as a Truth says: interpolated linearly."""
    from scipy.ndimage import shift  # takes a while to load

    axis = next(axis for axis, names in enumerate(DIRECTIONS) if truth.direction in names)
    distance = num_frames * truth.speed * (1 if truth.direction == DIRECTIONS[axis][1] else -1)  # px
    offset = (0, distance, 0) if axis == 0 else (distance, 0, 0)
    return np.rint(shift(frame.astype(float), offset, order=1, mode="nearest")).astype(np.uint8)


def frame_scores(frame, real, moving):
    """The METRICS of a frame uint8 (H, W, 3): PSNR in dB, SSIM, and PSNR of the pixels in `moving`, bool (H, W), NaN if
    there are none. SSIM as published (Wang et al. 2004): Gaussian windows, sigma 1.5, the mean over the color channels.
    """
    from skimage.metrics import structural_similarity  # takes a second to load

    whole, part = psnr(frame, real), psnr(frame[moving], real[moving])
    if np.array_equal(frame, real):
        return whole, 1.0, part
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return whole, structural_similarity(real, frame, channel_axis=-1, **settings), part


def psnr(found, real):
    """PSNR in dB of arrays uint8 of one shape, at most MOST_PSNR; NaN of empty ones."""
    if not real.size:
        return np.nan
    error = np.mean(np.square(real.astype(float) - found))
    return min(10 * np.log10(255**2 / error), MOST_PSNR) if error else MOST_PSNR


# ----------------------------------------------------------------------------------------------------------------------
# From the scores of all clips to a result


def compare(scores, baselines):
    """A plain dict of scores (N, 3, S, F) and of those of baselines, {name: (N, 3, F)}.

    Frames in which nothing moves have no PSNR of moving pixels (NaN), nor have clips without any other.
    """
    moves = ~np.isnan(scores[:, METRICS.index("psnr_moving"), 0]).all(axis=1)
    result = {"clips": len(scores), "clips_that_move": int(moves.sum()), "samples_per_clip": scores.shape[2]}
    for number, name in enumerate(METRICS):
        own = scores[:, number]  # (N, S, F)
        best = own[np.arange(len(own)), mean(own, axis=2).argmax(axis=1)]  # (N, F)
        columns = {"": own.mean(axis=1), "_best": best}
        columns |= {f"_{kind}": values[:, number] for kind, values in baselines.items()}
        for kind, values in columns.items():
            by_clip = mean(values, axis=1)  # (N,)
            result[name + kind] = or_none(mean(by_clip))
            result[f"{name}{kind}_interval95"] = bootstrap(by_clip)
            count = np.maximum((~np.isnan(values)).sum(axis=0), 1)
            half = 1.96 * mean(np.square(values - mean(values)), axis=0) ** 0.5 / count**0.5
            result[f"{name}{kind}_by_frame"] = {"mean": or_none(mean(values)), "half95": or_none(half)}
        for kind in [kind for kind in ("", "_average") if kind in columns]:
            gain = mean(columns[kind], axis=1) - mean(columns["_repeated"], axis=1)
            result[f"{name}{kind}_gain"], result[f"{name}{kind}_gain_interval95"] = or_none(mean(gain)), bootstrap(gain)
    return result


def mean(values, axis=0):
    """The mean of those values that are not NaN; NaN where there are none."""
    count = (~np.isnan(values)).sum(axis=axis)
    return np.where(count, np.nansum(values, axis=axis) / np.maximum(count, 1), np.nan)


def or_none(values):
    """A number, or a list of numbers, for JSON: NaN becomes None."""
    return np.where(np.isnan(values), None, values).tolist()


def bootstrap(values, seed=0):
    """[low, high] of the 95% interval of the mean of those values (N,) that are not NaN, from resamples of the clips;
    None for fewer than two.
    """
    values = np.asarray(values)
    values = torch.from_numpy(values[~np.isnan(values)])
    if len(values) < 2:
        return None
    random = generator(seed, "bootstrap", "prediction")
    means = values[torch.randint(len(values), (RESAMPLES, len(values)), generator=random)].mean(dim=1)
    return means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()


def keeps_appearance(found, seen):
    """Whether the Track of a predicted clip has the shape and the color of that of the real clip."""
    if None in (found.shape, found.color, seen.color):
        return False
    return found.shape == seen.shape and bool(np.linalg.norm(np.subtract(found.color, seen.color)) < MIN_CONTRAST)


def summarize_motion(tracks):
    """{"motion": of the predicted clips, "motion_real": of the real ones} of (Track, Track of the real clip, Truth)."""
    found, seen, truths = zip(*tracks, strict=True)
    kept = [keeps_appearance(*pair) for pair in zip(found, seen, strict=True)]
    motion = summarize(found, truths) | {"appearance_kept": sum(kept) / len(kept)}
    return {"motion": motion, "motion_real": summarize(seen, truths)}


def values_of(result):
    """The values of a manifest."""
    kinds = ("", "_best", "_repeated", "_gain", "_average", "_average_gain")
    names = [name + kind for name in METRICS for kind in kinds if name + kind in result]
    motion = result.get("motion", {})
    return {name: result[name] for name in names} | {
        name: motion[name] for name in ("direction_accuracy", "speed_ratio", "appearance_kept") if name in motion
    }


def with_interval(result, name, digits):
    """A result with its 95% interval as text; "-" where there is none."""
    if result.get(name) is None:
        return "-"
    ends = result[f"{name}_interval95"]
    interval = f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else ""
    return f"{result[name]:.{digits}f}{interval}"


def result_lines(result):
    """The main results, to print."""
    S = result["samples_per_clip"]
    titles = {
        "": f"mean of {S}",
        "_best": f"best of {S}",
        "_average": f"the average of {S}",
        "_repeated": "a given frame repeated",
        "_moved": "and moved by the true motion",
        "_gain": "mean minus repeated",
        "_average_gain": "average minus repeated",
    }
    head = f"{result['clips']} clips, given {result['given_frames']}"
    lines = [f"{head:<28} {'PSNR in dB, 95%':>24} {'SSIM, 95%':>26} {'PSNR of moving pixels':>24}"]
    for kind in [kind for kind in titles if f"psnr{kind}" in result]:
        cells = [with_interval(result, name + kind, digits) for name, digits in zip(METRICS, (2, 4, 2), strict=True)]
        lines.append(f"{titles[kind]:<28} {cells[0]:>24} {cells[1]:>26} {cells[2]:>24}")
    for name, title in (("motion", "predicted"), ("motion_real", "real")):
        if motion := result.get(name):
            share, (low, high) = motion["direction_accuracy"], motion["direction_interval95"]
            speed = "-" if motion["speed_ratio"] is None else f"{motion['speed_ratio']:.3f}"
            kept = f", shape and color kept {motion['appearance_kept']:.3f}" if "appearance_kept" in motion else ""
            lines.append(f"{title}: direction right {share:.3f} ({low:.3f} to {high:.3f}), speed / true {speed}{kept}")
    return ["  " + line for line in lines]


def write_pairs(path, predicted, real, names, given):
    """A sheet of clips, two rows each: given (marked) and predicted frames, then the true ones."""
    videos = np.stack(list(itertools.chain(*zip(predicted, real, strict=True))))
    rows = list(itertools.chain(*((name, "true") for name in names)))
    write_sheet(path, videos, rows, [given, ()] * len(names))
