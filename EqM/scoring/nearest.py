"""Nearest training clips: whether a model memorizes its training data.

Each generated clip is compared with every window of the training videos: from every start, with its
own time between frames, as it is and mirrored. The distance is the root mean square difference
(RMSE) of all pixels, in gray levels of
255. Held-out real clips are compared in the same way: a model can't memorize them, so they show
which distance is normal. Blurred clips are near to everything, so look at the sheet of pairs too.

A squared distance is |a|^2 + |b|^2 - 2 a.b, so the search is made of matrix products. They are
exact: with levels from -128 to 127, sums of 1024 products are integers up to 2^24, which float32
can hold. All else is float64.
"""

import functools
import math
import operator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from runtime import distributed
from runtime.cli import Bar, UserError
from scoring.stats import gather, interval_units, ratio_interval, report
from video.drawing import drawable, evenly_spaced, few
from video.files import UnreadableError
from video.index import fitting_interval
from video.loader import batches_of, worker_settings
from video.writers import write_sheet

CHUNK = 128  # frames of a video that are decoded and compared at a time
BLOCK = 1024  # values in an exact sum of products
GRAY = 128  # the level that is subtracted first
SHOWN = 8  # pairs on the sheet
COLUMNS = 8  # frames of each
TITLES = {  # of the values
    "rmse_ratio": "RMSE to the nearest training clip, generated / real",
    "rmse": "mean of the generated clips, gray levels of 255",
    "rmse_median": "their median",
    "rmse_real": "mean of the held-out real clips",
    "rmse_real_median": "their median",
    "nearer_than_all_real": "share of generated clips nearer than all real ones",
    "nearer_than_95_percent": "share nearer than 95% of the real ones",
}


def score_nearest(samples, real, windows, args, sheet, device):
    """Score Samples and a stream of real clips against TrainingWindows.

    Write the nearest pairs to `sheet`.
    """
    real_clips, real_videos = gather(real, lambda clip, *_: (clip,))
    clips = torch.from_numpy(np.concatenate([samples.clips, real_clips]))  # (all, T, H, W, 3)
    (distances, places), corrupt = search(clips.to(device), windows, args.num_workers)
    if distances.isinf().any():
        raise UserError(
            f"--data-path {args.data_path}: no training video can be decoded, the first is "
            f"{corrupt[0]}"
        )
    rmse = (distances / clips[0].numel()).sqrt().numpy()
    N = len(samples)
    result = summarize(rmse[:N], rmse[N:], (samples.videos, real_videos))
    pairs = []
    for index in rmse[:N].argsort(kind="stable")[:SHOWN].tolist():
        number, first, mirrored = places[index].tolist()
        video = windows.videos[number]
        pairs.append(
            {
                "clip": index,
                "class": samples.names[index],
                "rmse": rmse[index].item(),
                "number": number,
                "video": video.path,
                "video_class": video.class_name,
                "first_frame": first,
                "frame_interval": windows.intervals[number],
                "mirrored": bool(mirrored),
            }
        )
    result |= {
        "pairs": pairs,
        "training_videos": len(windows.videos),
        "bad_training_videos": corrupt,
    }
    if distributed.rank() == 0:
        write_pairs(sheet, windows, samples, pairs)
    values, lines = report(result, TITLES)
    result["interval_units"], line = interval_units(
        "ratios", generated=samples.videos, real=real_videos
    )
    lines += [line, f"  the nearest clips and their training clips: {sheet}"]
    lines += [
        f"{path} can't be decoded to its end; only the frames before are compared"
        for path in corrupt
    ]
    return values, result, lines


class TrainingWindows(IterableDataset):
    """All windows of T frames of this rank's videos: (video number, first frame, frames uint8 (n,
    size, size, 3)).

    Parts overlap, so every window is in one part. None instead of frames: the rest of the video
    can't be decoded. Frames are time_scale apart or, in short videos, as far as fits. Loader
    processes share the videos.
    """

    def __init__(self, source, videos, samples):
        """samples: Samples that the windows are compared with."""
        self.source = source
        self.videos = videos
        self.T = samples.num_frames
        self.intervals = []
        for video in videos:
            interval = max(1, round(samples.time_scale * video.fps))
            self.intervals.append(fitting_interval(video, self.T, interval))
        self.of_rank = distributed.own_indices(len(videos))

    def __iter__(self):
        worker = get_worker_info()
        numbers = self.of_rank
        if worker:
            numbers = numbers[worker.id :: worker.num_workers]
        for number in numbers:
            overlap = (self.T - 1) * self.intervals[number]
            first = 0
            rest = torch.empty(0, dtype=torch.uint8)
            try:
                for decoded in self.source.decode(self.videos[number], CHUNK):
                    frames = self.source.fit(decoded).permute(0, 2, 3, 1)
                    frames = torch.cat([rest, frames])
                    yield number, first, frames
                    rest = frames[max(0, len(frames) - overlap) :]
                    first += len(frames) - len(rest)
            except UnreadableError:
                yield number, first, None


def blocks(frames):
    """Frames uint8 (n, H, W, 3) minus GRAY, float32 (n, BLOCK) each: their products sum exactly."""
    return [part.float() - GRAY for part in frames.flatten(1).split(BLOCK, dim=1)]


def search(clips, windows, num_workers):
    """((squared distances (N,), places (N, 3): video, first frame, mirrored), paths of damaged
    videos) of all ranks.

    clips: uint8 (N, T, H, W, 3), kept as float32; windows: TrainingWindows. Without a window,
    distances are infinite.
    """
    N, T = clips.shape[:2]
    device = clips.device
    clip_blocks = blocks(clips.flatten(0, 1))  # (N * T, BLOCK) each
    energy = sum(part.square().sum(dim=1).double() for part in clip_blocks).view(N, T).sum(dim=1)
    distances = torch.full((N,), torch.inf, dtype=torch.float64, device=device)
    best = distances, torch.zeros(N, 3, dtype=int, device=device)
    loader = DataLoader(windows, batch_size=None, **worker_settings(num_workers))
    corrupt = []
    total = sum(math.ceil(windows.videos[number].num_frames / CHUNK) for number in windows.of_rank)
    for number, first, frames in Bar(
        batches_of(loader),
        desc="training videos",
        unit="part",
        total=total,
        leave=False,
    ):
        if frames is None:
            corrupt.append(windows.videos[number].path)
            continue
        frames = frames.to(device)
        interval = windows.intervals[number]
        count = len(frames) - (T - 1) * interval  # of windows
        if count < 1:
            continue
        both = torch.stack([frames, frames.flip(2)], dim=1).flatten(0, 1)
        terms = 0  # |b|^2 - 2 a.b
        for a, b in zip(clip_blocks, blocks(both), strict=True):
            terms = terms + b.square().sum(dim=1).double() - 2 * (a @ b.T).double()
        terms = terms.view(N, T, len(frames), 2)
        starts = [t * interval for t in range(T)]
        sums = sum(terms[:, t, start : start + count] for t, start in enumerate(starts))
        # (N,) each; least: number of the window * 2 + mirrored
        minima, least = sums.flatten(1).min(dim=1)
        place = torch.stack([torch.full_like(least, number), first + least // 2, least % 2], dim=1)
        best = nearer(best, (energy + minima, place))
    best = functools.reduce(nearer, distributed.gather([part.cpu() for part in best]))
    return best, sorted(distributed.gather_items(corrupt))


def nearer(one, other):
    """The nearer of two windows for each clip: (squared distances (N,), places (N, 3)).

    Of equals the first video.
    """
    a, place_a = one
    b, place_b = other
    is_other = (b < a) | ((b == a) & (place_b[:, 0] < place_a[:, 0]))
    distances = torch.where(is_other, b, a)
    return distances, torch.where(is_other[:, None], place_b, place_a)


def summarize(generated, real, videos=((), ())):
    """A plain dict for JSON, from RMSE arrays of generated (N,) and of real clips (M,).

    videos: those of both.
    """
    ratio = None
    interval = None
    if real.any():
        ratio = (generated.mean() / real.mean()).item()
        interval = ratio_interval(operator.truediv, (generated, real), videos, "nearest")
    return {
        "rmse_ratio": ratio,
        "rmse_ratio_interval95": interval,
        "rmse": generated.mean().item(),
        "rmse_median": np.median(generated).item(),
        "rmse_real": real.mean().item(),
        "rmse_real_median": np.median(real).item(),
        "nearer_than_all_real": (generated < real.min()).mean().item(),
        "nearer_than_95_percent": (generated < np.quantile(real, 0.05)).mean().item(),
    }


def write_pairs(path, windows, samples, pairs):
    """A sheet of pairs, two rows each: a generated clip above its nearest training clip.

    Rows name the classes.
    """
    shown = evenly_spaced(samples.num_frames, COLUMNS)
    rows = []
    titles = []
    for pair in pairs:
        video = windows.videos[pair["number"]]
        indices = (pair["first_frame"] + shown * pair["frame_interval"]).tolist()
        window = windows.source.read(video, indices, flipped=pair["mirrored"])
        rows.append(samples.clips[pair["clip"], shown])
        rows.append(window.permute(1, 2, 3, 0))
        titles.append(f"{samples.shown_class(pair['class'])} {pair['clip']}: {pair['rmse']:.1f}")
        stem = drawable(Path(video.path).stem[-24:], f"video {pair['number']}")
        mirrored = ", mirrored" if pair["mirrored"] else ""
        titles.append(
            f"{samples.shown_class(video.class_name)}, {stem}, frame {indices[0]}{mirrored}"
        )
    notes = few(len(pairs), len(samples), "clips") + few(len(shown), samples.num_frames, "frames")
    write_sheet(
        path,
        videos=np.stack(rows),
        names=titles,
        notes=notes,
    )
