"""Prediction: real clips of which some frames are given, completed by a model and compared with what really came.

PSNR and SSIM (scikit-image's) of each predicted frame, of the mean and of the best of several samples of a clip, beside
repeating the last given frame. The best sample is chosen for each metric on its own, by its mean over the frames, as
MCVD (arXiv 2205.09853) does; on clips with one likely future the mean says more. Where the data are Moving Shapes, the
tracker of motion.py also says whether the whole clip, given and predicted frames, moves as it should.
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
METRICS = ("psnr", "ssim")


# ----------------------------------------------------------------------------------------------------------------------
# Checks of evaluate.py


def check_prediction_flags(args, given):
    """Raise UserError for flags that only --metric prediction has, or that it has not; `given` names those given."""
    if args.metric != "prediction":
        for name in sorted(given & {"given_frames", "samples_per_clip"}):
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
    """(scores (2, S, F), {baseline: scores (2, F)}) of the F predicted frames; 2: PSNR in dB, SSIM.

    real (T, H, W, 3) and samples (S, T, H, W, 3) are uint8. Baselines: "repeated", a given frame (the last one before
    or, if there is none, the first one after); with a Truth "moved", the same frame, moved as the object truly moves.
    """
    free = free_frames(given, len(real))
    nearest = [max((frame for frame in given if frame < t), default=min(given)) for t in free]
    scores = np.array([[frame_scores(sample[t], real[t]) for t in free] for sample in samples])  # (S, F, 2)
    made = {"repeated": [real[frame] for frame in nearest]}
    if truth:
        made["moved"] = [moved(real[frame], t - frame, truth) for frame, t in zip(nearest, free, strict=True)]
    baselines = {kind: [frame_scores(one, real[t]) for one, t in zip(made[kind], free, strict=True)] for kind in made}
    return scores.transpose(2, 0, 1), {kind: np.array(rows).T for kind, rows in baselines.items()}


def moved(frame, num_frames, truth):
    """A frame uint8 (H, W, 3) that many frames later, if all of it moves as a Truth says: interpolated linearly."""
    from scipy.ndimage import shift  # takes a while to load

    axis = next(axis for axis, names in enumerate(DIRECTIONS) if truth.direction in names)
    distance = num_frames * truth.speed * (1 if truth.direction == DIRECTIONS[axis][1] else -1)  # px
    offset = (0, distance, 0) if axis == 0 else (distance, 0, 0)
    return np.rint(shift(frame.astype(float), offset, order=1, mode="nearest")).astype(np.uint8)


def frame_scores(frame, real):
    """(PSNR in dB, SSIM) of a frame uint8 (H, W, 3). SSIM as published (Wang et al. 2004): Gaussian windows, sigma 1.5,
    the mean over the color channels.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity  # takes a second to load

    if np.array_equal(frame, real):
        return MOST_PSNR, 1.0
    psnr = peak_signal_noise_ratio(real, frame, data_range=255)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    return min(psnr, MOST_PSNR), structural_similarity(real, frame, channel_axis=-1, **settings)


# ----------------------------------------------------------------------------------------------------------------------
# From the scores of all clips to a result


def compare(scores, baselines):
    """A plain dict of scores (N, 2, S, F) and of those of baselines, {name: (N, 2, F)}."""
    result = {"clips": len(scores), "samples_per_clip": scores.shape[2]}
    for number, name in enumerate(METRICS):
        own = scores[:, number]  # (N, S, F)
        best = own[np.arange(len(own)), own.mean(axis=2).argmax(axis=1)]  # (N, F)
        columns = {"": own.mean(axis=1), "_best": best}
        columns |= {f"_{kind}": values[:, number] for kind, values in baselines.items()}
        for kind, values in columns.items():
            result[name + kind] = values.mean().item()
            result[f"{name}{kind}_interval95"] = bootstrap(values.mean(axis=1))
            half = 1.96 * values.std(axis=0) / len(values) ** 0.5
            result[f"{name}{kind}_by_frame"] = {"mean": values.mean(axis=0).tolist(), "half95": half.tolist()}
        gain = own.mean(axis=(1, 2)) - baselines["repeated"][:, number].mean(axis=1)
        result[f"{name}_gain"], result[f"{name}_gain_interval95"] = gain.mean().item(), bootstrap(gain)
    return result


def bootstrap(values, seed=0):
    """[low, high] of the 95% interval of the mean of values (N,), from resamples of the clips; None for one clip."""
    if len(values) < 2:
        return None
    random, values = generator(seed, "bootstrap", "prediction"), torch.from_numpy(np.asarray(values))
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
    names = [name + kind for name in METRICS for kind in ("", "_best", "_repeated", "_gain")]
    motion = result.get("motion", {})
    return {name: result[name] for name in names} | {
        name: motion[name] for name in ("direction_accuracy", "speed_ratio", "appearance_kept") if name in motion
    }


def result_lines(result):
    """The main results, to print."""

    def cell(name, digits):
        ends = result[f"{name}_interval95"]
        interval = f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})" if ends else ""
        return f"{result[name]:.{digits}f}{interval}"

    S = result["samples_per_clip"]
    kinds = {"": f"mean of {S}", "_best": f"best of {S}", "_repeated": "a given frame repeated"}
    kinds |= {"_moved": "and moved by the true motion"} if "psnr_moved" in result else {}
    head = f"{result['clips']} clips, given {result['given_frames']}"
    lines = [f"{head:<28} {'PSNR in dB, 95%':>24} {'SSIM, 95%':>26}"]
    for kind, title in (kinds | {"_gain": "mean minus repeated"}).items():
        lines.append(f"{title:<28} {cell('psnr' + kind, 2):>24} {cell('ssim' + kind, 4):>26}")
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
