"""Nearest training clips: whether a model only remembers what it was trained on.

Each generated clip is compared with every window of the training videos: every start, at the distance in time of its
own frames, as it is and mirrored. The distance is the root mean square difference (RMSE) of all pixels in grey levels
of 255. Held-out real clips, compared in the same way, say how near a clip comes that cannot have been remembered.
Blurred clips are near to everything, so look at the sheet of pairs too.

A squared distance is |a|^2 + |b|^2 - 2 a.b, so a search is matrix products. They are exact: of levels from -128 to 127,
sums of 1024 products are integers of at most 2^24, which float32 holds; all else is float64.
"""

import functools
import itertools
import os

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from runtime import distributed
from runtime.cli import Bar, UserError
from runtime.distributed import rank
from scoring.stats import bootstrap, gather, interval95, report
from video.files import UnreadableError, read_all_frames, read_frames, resize_and_crop
from video.index import fitting_interval
from video.loader import batches_of, worker_settings
from video.writers import write_sheet

CHUNK = 64  # frames of a video that are decoded and compared at a time
BLOCK, GREY = 1024, 128  # values in an exact sum of products; what is subtracted from them
QUANTILES = 0, 5, 25, 50, 75, 95, 100  # percent
SHOWN, COLUMNS = 8, 8  # pairs on the sheet and frames of each
TITLES = {  # of the values
    "rmse_ratio": "RMSE to the nearest training clip, generated / real",
    "rmse": "mean of the generated clips, grey levels of 255", "rmse_median": "their median",
    "rmse_real": "mean of the held-out real clips", "rmse_real_median": "their median",
    "nearer_than_all_real": "generated clips that are nearer than all real ones",
    "nearer_than_95_percent": "nearer than 95% of the real ones",
}  # fmt: skip


def score_nearest(generated, real, args, videos, time_scale, sheet, device):
    """Score two streams of clips (see sources.py), at least two clips each, against `videos`, those of training.

    time_scale: seconds between the frames of the clips. Writes the nearest pairs to the path `sheet`.
    """
    (own, names), (others, _) = (gather(stream, lambda clip, name, _: (clip, name)) for stream in (generated, real))
    clips = torch.from_numpy(np.stack(own + others))  # (N, T, H, W, 3)
    frames = TrainingFrames(args.data_path, videos, clips.shape[2], distributed.own_indices(len(videos)))
    intervals = [frame_interval(video, clips.shape[1], time_scale) for video in videos]
    nearest, bad = search(clips.to(device), frames, intervals, args.num_workers)
    distances, places = functools.reduce(nearer, distributed.gather([part.cpu() for part in nearest]))
    bad = sorted(itertools.chain(*distributed.gather(bad)))
    if distances.isinf().any():
        raise UserError(f"--data-path {args.data_path}: no training video can be decoded, the first is {bad[0]}")
    rmse = (distances / clips[0].numel()).sqrt().numpy()
    result = summarize(rmse[: len(own)], rmse[len(own) :]) | {"pairs": [], "training_videos": len(videos)}
    for index in rmse[: len(own)].argsort(kind="stable")[:SHOWN].tolist():
        number, first, mirrored = places[index].tolist()
        pair = {"clip": index, "rmse": rmse[index].item(), "number": number, "video": videos[number].path}
        pair |= {"first_frame": first, "frame_interval": intervals[number], "mirrored": bool(mirrored)}
        result["pairs"].append(pair)
    if rank() == 0:
        write_pairs(sheet, frames, clips.numpy(), names, result["pairs"])
    values, lines = report(result, TITLES)
    lines.append(f"  the nearest clips and their training clips: {sheet}")
    lines += [f"{path} can't be decoded to its end; only the frames before are compared" for path in bad]
    return values, result | {"bad_training_videos": bad}, lines


def frame_interval(video, num_frames, time_scale):
    """The distance between the frames of a window: closest to time_scale or, in short videos, the largest that fits."""
    return fitting_interval(video, num_frames, max(1, round(time_scale * video.fps)))


class TrainingFrames(IterableDataset):
    """All frames of the videos with the numbers `own`, in order: (number, frames uint8 (n, size, size, 3)).

    None in place of frames: the video can't be decoded further. Loader processes share the videos.
    """

    def __init__(self, root, videos, size, own):
        self.root, self.videos, self.size, self.own = root, videos, size, own

    def __iter__(self):
        worker = get_worker_info()
        for number in self.own[worker.id :: worker.num_workers] if worker else self.own:
            try:
                for frames in read_all_frames(self.root, self.videos[number], CHUNK):
                    yield number, self.resize(frames)
            except UnreadableError:
                yield number, None

    def resize(self, frames):
        return resize_and_crop(torch.from_numpy(frames).permute(0, 3, 1, 2), self.size).permute(0, 2, 3, 1)


def blocks(frames):
    """Frames uint8 (n, H, W, 3) less GREY, float32 (n, BLOCK) each: sums of their products are exact."""
    return [part.float() - GREY for part in frames.flatten(1).split(BLOCK, dim=1)]


def compare_frames(a, frames):
    """|b|^2 - 2 a.b of M frames a, as blocks, and each b of frames uint8 (n, H, W, 3), as it is and mirrored: float64
    (M, n, 2).
    """
    b = blocks(torch.stack([frames, frames.flip(2)], dim=1).flatten(0, 1))
    terms = torch.zeros(len(a[0]), len(b[0]), dtype=torch.float64, device=frames.device)
    for part_a, part_b in zip(a, b, strict=True):
        terms += part_b.square().sum(dim=1).double() - 2 * (part_a @ part_b.T).double()
    return terms.unflatten(1, (len(frames), 2))


def window_sums(terms, interval):
    """The sums (N, S, 2) of the S windows of T frames, each `interval` after the one before, of terms (N, T, n, 2).

    terms[:, t] are those of n frames of a video as frame t of a window.
    """
    T, n = terms.shape[1:3]
    S = max(0, n - (T - 1) * interval)
    return sum(terms[:, t, t * interval : t * interval + S] for t in range(T))


def search(clips, frames, intervals, num_workers):
    """((squared distances (N,), places (N, 3): video, first frame, mirrored), paths of videos that are damaged).

    clips: uint8 (N, T, H, W, 3), which are held as float32; frames: TrainingFrames; intervals: of each of its videos.
    Distances are infinite where there was no window.
    """
    (N, T), device = clips.shape[:2], clips.device
    own = blocks(clips.flatten(0, 1))  # (N * T, P) in all
    energy = sum(part.square().sum(dim=1).double() for part in own).view(N, T).sum(dim=1)
    best = torch.full((N,), torch.inf, dtype=torch.float64, device=device), torch.zeros(N, 3, dtype=int, device=device)
    loader = DataLoader(frames, batch_size=None, **worker_settings(num_workers))
    bad, begun, total = [], {}, sum(frames.videos[number].num_frames for number in frames.own)
    with Bar(total=total, desc="training frames", unit="frame", leave=False, disable=rank() != 0) as progress:
        for number, part in batches_of(loader):
            if part is None:
                bad.append(frames.videos[number].path)
                continue
            first, rest = begun.pop(number, (0, torch.zeros(N, T, 0, 2, dtype=torch.float64, device=device)))
            terms = torch.cat([rest, compare_frames(own, part.to(device)).unflatten(0, (N, T))], dim=2)
            sums = window_sums(terms, intervals[number])  # of the windows that are now complete
            if complete := sums.shape[1]:
                least = sums.flatten(1).argmin(dim=1)  # (N,), number of the window * 2 + mirrored
                distance = energy + sums.flatten(1).gather(1, least[:, None])[:, 0]
                place = torch.stack([torch.full_like(least, number), first + least // 2, least % 2], dim=1)
                best = nearer(best, (distance, place))
            if first + terms.shape[2] < frames.videos[number].num_frames:
                begun[number] = first + complete, terms[:, :, complete:]
            progress.update(len(part))
    return best, bad


def nearer(one, other):
    """The nearer windows of two (squared distances (N,), places (N, 3)); of equal ones that of the first video."""
    (a, place_a), (b, place_b) = one, other
    is_other = (b < a) | ((b == a) & (place_b[:, 0] < place_a[:, 0]))
    return torch.where(is_other, b, a), torch.where(is_other[:, None], place_b, place_a)


def summarize(generated, real):
    """A plain dict for JSON, of the RMSE of generated clips (N,) and of held-out real ones (M,), arrays."""
    result = {"rmse_ratio": None, "rmse_ratio_interval95": None, "quantiles": list(QUANTILES)}
    if real.any():
        ratios = bootstrap(generated, "nearest", "generated") / bootstrap(real, "nearest", "real")
        ratio = (generated.mean() / real.mean()).item()
        result |= {"rmse_ratio": ratio, "rmse_ratio_interval95": interval95(ratios)}
    for name, kind, rmse in (("rmse", "generated", generated), ("rmse_real", "real", real)):
        result |= {name: rmse.mean().item(), f"{name}_median": np.median(rmse).item()}
        result[kind] = {"clips": len(rmse), "rmse": np.percentile(rmse, QUANTILES).tolist()}
    limits = {"nearer_than_all_real": real.min(), "nearer_than_95_percent": np.quantile(real, 0.05)}
    return result | {name: (generated < limit).mean().item() for name, limit in limits.items()}


def write_pairs(path, frames, clips, names, pairs):
    """A sheet of pairs, two rows each: a generated clip above its nearest training clip, a few frames of both."""
    T, rows, titles = clips.shape[1], [], []
    shown = np.linspace(0, T - 1, min(T, COLUMNS)).round().astype(int)
    for pair in pairs:
        indices = (pair["first_frame"] + shown * pair["frame_interval"]).tolist()
        window = frames.resize(read_frames(frames.root, frames.videos[pair["number"]], indices)).numpy()
        rows += [clips[pair["clip"], shown], window[:, :, ::-1] if pair["mirrored"] else window]
        stem = os.path.splitext(os.path.basename(pair["video"]))[0]
        titles.append(f"{names[pair['clip']] or 'sample'} {pair['clip']}: {pair['rmse']:.1f}")
        titles.append(f"{stem[-30:]} from frame {indices[0]}{' mirrored' if pair['mirrored'] else ''}")
    write_sheet(path, np.stack(rows), titles)
