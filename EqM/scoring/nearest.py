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
import itertools
import operator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from runtime import distributed
from runtime.cli import Bar, UserError
from scoring.stats import gather, interval_units, ratio_interval, report
from video.drawing import drawable, evenly_spaced, few
from video.files import UnreadableError, read_all_frames, read_frames, resize_and_crop
from video.index import fitting_interval
from video.loader import batches_of, worker_settings
from video.writers import write_sheet

CHUNK = 128  # frames of a video that are decoded and compared at a time
BLOCK, GRAY = 1024, 128  # values in an exact sum of products; the level that is subtracted first
SHOWN, COLUMNS = 8, 8  # pairs on the sheet, and frames of each
TITLES = {  # of the values
    "rmse_ratio": "RMSE to the nearest training clip, generated / real",
    "rmse": "mean of the generated clips, gray levels of 255",
    "rmse_median": "their median",
    "rmse_real": "mean of the held-out real clips",
    "rmse_real_median": "their median",
    "nearer_than_all_real": "share of generated clips nearer than all real ones",
    "nearer_than_95_percent": "share nearer than 95% of the real ones",
}


def score_nearest(samples, real, args, videos, sheet, device):
    """Score Samples and a stream of real clips against training videos.

    Write the nearest pairs to `sheet`.
    """
    others, held_out = gather(real, lambda clip, *_: (clip,))
    clips = torch.from_numpy(np.concatenate([samples.clips, others]))  # (all, T, H, W, 3)
    N = len(samples)
    windows = TrainingWindows(args.data_path, videos, *clips.shape[1:3], samples.time_scale)
    (distances, places), corrupt = search(clips.to(device), windows, args.num_workers)
    if distances.isinf().any():
        raise UserError(
            f"--data-path {args.data_path}: no training video can be decoded, the first is "
            f"{corrupt[0]}"
        )
    rmse = (distances / clips[0].numel()).sqrt().numpy()
    result = summarize(rmse[:N], rmse[N:], (samples.videos, held_out))
    result |= {"pairs": [], "training_videos": len(videos), "bad_training_videos": corrupt}
    for index in rmse[:N].argsort(kind="stable")[:SHOWN].tolist():
        number, first, mirrored = places[index].tolist()
        pair = {
            "clip": index,
            "class": samples.names[index],
            "rmse": rmse[index].item(),
            "number": number,
        }
        pair |= {
            "video": videos[number].path,
            "video_class": videos[number].class_name,
            "first_frame": first,
        }
        result["pairs"].append(
            pair | {"frame_interval": windows.intervals[number], "mirrored": bool(mirrored)}
        )
    if distributed.rank() == 0:
        write_pairs(sheet, windows, samples, result["pairs"])
    values, lines = report(result, TITLES)
    units = interval_units("ratios", generated=samples.videos, real=held_out)
    result["interval_units"], line = units
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

    def __init__(self, root, videos, T, size, time_scale):
        self.root = root
        self.videos = videos
        self.T = T
        self.size = size
        self.intervals = [
            fitting_interval(video, T, max(1, round(time_scale * video.fps))) for video in videos
        ]
        self.own = distributed.own_indices(len(videos))

    def __iter__(self):
        worker = get_worker_info()
        for number in self.own[worker.id :: worker.num_workers] if worker else self.own:
            overlap = (self.T - 1) * self.intervals[number]
            first = 0
            rest = None
            try:
                for frames in map(
                    self.resize, read_all_frames(self.root, self.videos[number], CHUNK)
                ):
                    frames = frames if rest is None else torch.cat([rest, frames])
                    yield number, first, frames
                    rest = frames[max(0, len(frames) - overlap) :]
                    first += len(frames) - len(rest)
            except UnreadableError:
                yield number, first, None

    def resize(self, frames):
        return resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), self.size).permute(
            0, 2, 3, 1
        )


def blocks(frames):
    """Frames uint8 (n, H, W, 3) minus GRAY, float32 (n, BLOCK) each: their products sum exactly."""
    return [part.float() - GRAY for part in frames.flatten(1).split(BLOCK, dim=1)]


def search(clips, windows, num_workers):
    """((squared distances (N,), places (N, 3): video, first frame, mirrored), paths of damaged
    videos) of all ranks.

    clips: uint8 (N, T, H, W, 3), kept as float32; windows: TrainingWindows. Without a window,
    distances are infinite.
    """
    (N, T) = clips.shape[:2]
    device = clips.device
    own = blocks(clips.flatten(0, 1))  # (N * T, BLOCK) each
    energy = sum(part.square().sum(dim=1).double() for part in own).view(N, T).sum(dim=1)
    best = (
        torch.full((N,), torch.inf, dtype=torch.float64, device=device),
        torch.zeros(N, 3, dtype=int, device=device),
    )
    loader = DataLoader(windows, batch_size=None, **worker_settings(num_workers))
    corrupt = []
    total = sum(-(-windows.videos[number].num_frames // CHUNK) for number in windows.own)
    for number, first, frames in Bar(
        batches_of(loader), desc="training videos", unit="part", total=total, leave=False
    ):
        if frames is None:
            corrupt.append(windows.videos[number].path)
            continue
        frames = frames.to(device)
        interval = windows.intervals[number]
        count = len(frames) - (T - 1) * interval  # of windows
        if count < 1:
            continue
        pairs = zip(
            own, blocks(torch.stack([frames, frames.flip(2)], dim=1).flatten(0, 1)), strict=True
        )
        # |b|^2 - 2 a.b
        terms = sum(b.square().sum(dim=1).double() - 2 * (a @ b.T).double() for a, b in pairs)
        terms = terms.view(N, T, len(frames), 2)
        sums = sum(terms[:, t, t * interval : t * interval + count] for t in range(T)).flatten(1)
        least = sums.argmin(dim=1)  # (N,), number of the window * 2 + mirrored
        place = torch.stack([torch.full_like(least, number), first + least // 2, least % 2], dim=1)
        best = nearer(best, (energy + sums.gather(1, least[:, None])[:, 0], place))
    best = functools.reduce(nearer, distributed.gather([part.cpu() for part in best]))
    return best, sorted(itertools.chain(*distributed.gather(corrupt)))


def nearer(one, other):
    """The nearer of two windows for each clip: (squared distances (N,), places (N, 3)).

    Of equals the first video.
    """
    (a, place_a) = one
    (b, place_b) = other
    is_other = (b < a) | ((b == a) & (place_b[:, 0] < place_a[:, 0]))
    return torch.where(is_other, b, a), torch.where(is_other[:, None], place_b, place_a)


def summarize(generated, real, videos=((), ())):
    """A plain dict for JSON, from RMSE arrays of generated (N,) and of real clips (M,).

    videos: those of both.
    """
    result = {"rmse_ratio": None, "rmse_ratio_interval95": None}
    if real.any():
        result["rmse_ratio"] = (generated.mean() / real.mean()).item()
        both = generated, real
        interval = ratio_interval(operator.truediv, both, videos, "nearest")
        result["rmse_ratio_interval95"] = interval
    for name, rmse in (("rmse", generated), ("rmse_real", real)):
        result |= {name: rmse.mean().item(), f"{name}_median": np.median(rmse).item()}
    limits = {"nearer_than_all_real": real.min(), "nearer_than_95_percent": np.quantile(real, 0.05)}
    return result | {name: (generated < limit).mean().item() for name, limit in limits.items()}


def write_pairs(path, windows, samples, pairs):
    """A sheet of pairs, two rows each: a generated clip above its nearest training clip.

    Rows name the classes.
    """
    shown = evenly_spaced(samples.num_frames, COLUMNS)
    rows = []
    titles = []
    for pair in pairs:
        indices = (pair["first_frame"] + shown * pair["frame_interval"]).tolist()
        window = windows.resize(
            read_frames(windows.root, windows.videos[pair["number"]], indices)
        ).numpy()
        rows += [
            samples.clips[pair["clip"], shown],
            window[:, :, ::-1] if pair["mirrored"] else window,
        ]
        titles.append(f"{samples.shown_class(pair['class'])} {pair['clip']}: {pair['rmse']:.1f}")
        stem = Path(pair["video"]).stem[-24:]
        mirrored = ", mirrored" if pair["mirrored"] else ""
        stem = drawable(stem, f"video {pair['number']}")
        titles.append(
            f"{samples.shown_class(pair['video_class'])}, {stem}, frame {indices[0]}{mirrored}"
        )
    notes = few(len(pairs), len(samples), "clips") + few(len(shown), samples.num_frames, "frames")
    write_sheet(path, np.stack(rows), titles, notes=notes)
