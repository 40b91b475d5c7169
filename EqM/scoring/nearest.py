"""Nearest training clips: whether a model only remembers what it was trained on.

Each generated clip is compared with every window of the training videos: every start, at the distance in time of its
own frames, as it is and mirrored. The distance is the root mean square difference (RMSE) of all pixels in grey levels
of 255. Held-out real clips, compared in the same way, say how near a clip comes that cannot have been remembered.
Blurred clips are near to everything, so look at the sheet of pairs too.

A squared distance is |a|^2 + |b|^2 - 2 a.b, so a search is matrix products. They are exact: of levels from -128 to 127,
sums of 1024 products are integers of at most 2^24, which float32 holds; all else is float64.
"""

import functools
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from runtime import distributed
from runtime.cli import Bar, UserError, say
from runtime.distributed import rank
from runtime.rng import generator
from scoring.frechet import full_precision
from scoring.sources import file_stats, names_and_sizes
from video.files import UnreadableError, read_all_frames, read_frames, resize_and_crop
from video.index import fitting_interval
from video.loader import batches_of, worker_settings
from video.writers import write_sheet

CHUNK = 64  # frames of a video that are decoded and compared at a time
BLOCK, GREY = 1024, 128  # values in an exact sum of products; what is subtracted from them
RESAMPLES = 1000  # of the bootstrap over clips
QUANTILES = 0, 5, 25, 50, 75, 95, 100  # percent
SHOWN, COLUMNS = 8, 8  # pairs on the sheet and frames of each


def check_split(args):
    """Raise UserError unless the real clips are held out; evaluate.py calls it for --metric nearest."""
    if args.split != "val":
        raise UserError(f"--split {args.split}: --metric nearest compares held-out clips with training: leave it out")


def describe_training(args, videos, num_frames):
    """What the manifest says of the training videos. Raises UserError if none has the frames of the clips."""
    if not videos:
        found = f"no training video has the {num_frames} frames of the clips"
        raise UserError(f"--data-path {args.data_path}: {found}: sample fewer frames")
    return {"training_sha256": names_and_sizes(videos, file_stats(args.data_path, videos))}


def score_nearest(generated, real, args, videos, time_scale, device):
    """Score two streams of clips (see sources.py), at least two clips each, against `videos`, those of training.

    time_scale: seconds between the frames of the clips. Writes a sheet beside args.out. Returns (values, result), plain
    dicts for JSON, on rank 0 and (None, None) elsewhere.
    """
    clips, names = read_stream(generated)
    num_generated = len(clips)
    clips = torch.cat([clips, read_stream(real)[0]])  # (N, T, H, W, 3)
    frames = TrainingFrames(args.data_path, videos, clips.shape[2], distributed.own_indices(len(videos)))
    intervals = [frame_interval(video, clips.shape[1], time_scale) for video in videos]
    nearest, bad = search(clips.to(device), frames, intervals, args.num_workers)
    found = functools.reduce(nearer, distributed.gather([part.cpu() for part in nearest]))
    bad = sorted(path for paths in distributed.gather(bad) for path in paths)
    if found[0].isinf().any():
        raise UserError(f"--data-path {args.data_path}: no training video can be decoded, the first is {bad[0]}")
    if rank() != 0:
        return None, None
    rmse = (found[0] / clips[0].numel()).sqrt()
    values, result = summarize(rmse[:num_generated].numpy(), rmse[num_generated:].numpy())
    order = rmse[:num_generated].argsort(stable=True)[:SHOWN].tolist()
    pairs = [describe(index, rmse[index].item(), found[1][index].tolist(), videos, intervals) for index in order]
    sheet = Path(args.out).with_suffix(".sheet.png")
    write_pairs(sheet, args.data_path, videos, clips, [names[index] for index in order], pairs)
    for line in [*result_lines(values, result), f"  the nearest {len(pairs)} and their training clips: {sheet}"]:
        say(line)
    for path in bad:
        say(f"{path} can't be decoded to its end; only the frames before are compared")
    return values, result | {"training_videos": len(videos), "bad_training_videos": bad, "pairs": pairs}


def read_stream(stream):
    """(the clips of all ranks uint8 (N, T, H, W, 3), their class names), in the order of their indices."""
    rows = []
    for indices, clips, names, _ in stream:
        rows += zip(indices, clips.cpu().numpy(), names, strict=True)
    clips, names = distributed.gather_in_order(rows)
    return torch.from_numpy(np.stack(clips)), names


# ----------------------------------------------------------------------------------------------------------------------
# The windows of the training videos


def frame_interval(video, num_frames, time_scale):
    """The distance between the frames of a window that is closest to time_scale; in short videos the largest there is,
    as in training.
    """
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

    def read_window(self, number, indices, mirrored):
        """Some frames of a video, an array uint8 (n, size, size, 3)."""
        frames = self.resize(read_frames(self.root, self.videos[number], indices))
        return (frames.flip(2) if mirrored else frames).numpy()


class Windows:
    """The windows of a video, whose frames come some at a time, compared with N clips of T frames."""

    def __init__(self, N, T, interval, device):
        self.interval, self.span = interval, (T - 1) * interval + 1
        self.first, self.seen = 0, 0  # the first window that is not complete; the frames that have come
        self.sums = torch.zeros(N, 0, 2, dtype=torch.float64, device=device)  # of the windows from self.first on

    def add(self, terms):
        """Add what the next n frames contribute, (N, T, n, 2), as frame t of a window, and that mirrored.

        Returns (number of the first of the S windows that are now complete, their sums (N, S, 2)).
        """
        T, n = terms.shape[1:3]
        self.sums = F.pad(self.sums, (0, 0, 0, n))
        for t in range(T):
            start = self.seen - t * self.interval - self.first  # the window of which the first of them is frame t
            skip = max(0, -start)  # of no window
            self.sums[:, start + skip : max(0, start + n)] += terms[:, t, skip:]
        self.seen += n
        first, complete = self.first, max(0, self.seen - self.span + 1 - self.first)
        self.first += complete
        sums, self.sums = self.sums.split([complete, self.sums.shape[1] - complete], dim=1)
        return first, sums


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
            windows = begun.pop(number, None) or Windows(N, T, intervals[number], device)
            with full_precision():
                first, sums = windows.add(compare_frames(own, part.to(device)).unflatten(0, (N, T)))
            if windows.seen < frames.videos[number].num_frames:
                begun[number] = windows
            if sums.shape[1]:
                least = sums.flatten(1).argmin(dim=1)  # (N,), number of the window * 2 + mirrored
                distance = energy + sums.flatten(1).gather(1, least[:, None])[:, 0]
                place = torch.stack([torch.full_like(least, number), first + least // 2, least % 2], dim=1)
                best = nearer(best, (distance, place))
            progress.update(len(part))
    return best, bad


def nearer(one, other):
    """The nearer windows of two (squared distances (N,), places (N, 3)); of equal ones that of the first video."""
    (a, place_a), (b, place_b) = one, other
    is_other = (b < a) | ((b == a) & (place_b[:, 0] < place_a[:, 0]))
    return torch.where(is_other, b, a), torch.where(is_other[:, None], place_b, place_a)


# ----------------------------------------------------------------------------------------------------------------------
# From the distances to a result


def summarize(generated, real):
    """(values, result) of the RMSE of generated clips (N,) and of held-out real ones (M,), arrays."""
    ratio, interval = mean_ratio(generated, real)
    values = {"rmse_ratio": ratio}
    for kind, rmse in (("", generated), ("_real", real)):
        values |= {f"rmse{kind}": rmse.mean().item(), f"rmse{kind}_median": np.median(rmse).item()}
    limits = {"nearer_than_all_real": real.min(), "nearer_than_95_percent": np.quantile(real, 0.05)}
    values |= {name: (generated < limit).mean().item() for name, limit in limits.items()}
    result = {"rmse_ratio_interval95": interval, "quantiles": list(QUANTILES)}
    for kind, rmse in (("generated", generated), ("real", real)):
        result[kind] = {"clips": len(rmse), "rmse": np.percentile(rmse, QUANTILES).tolist()}
    return values, result


def mean_ratio(generated, real, seed=0):
    """(mean over mean, its 95% interval by a bootstrap over the clips of both); None where all real ones are zero."""
    if not real.any():
        return None, None
    means = []
    for name, rmse in (("generated", generated), ("real", real)):
        random, N = generator(seed, "bootstrap", "nearest", name), len(rmse)
        means.append(torch.from_numpy(rmse)[torch.randint(N, (RESAMPLES, N), generator=random)].mean(dim=1))
    ratios = means[0] / means[1]
    ratios = ratios[ratios.isfinite()]  # in a resample of few clips, all may be zero
    interval = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return (generated.mean() / real.mean()).item(), interval


def describe(index, rmse, place, videos, intervals):
    """A generated clip and the window that is nearest to it, a plain dict."""
    number, first, mirrored = place
    window = {"video": videos[number].path, "first_frame": first, "frame_interval": intervals[number]}
    return {"clip": index, "rmse": rmse, "number": number} | window | {"mirrored": bool(mirrored)}


def result_lines(values, result):
    """The main results, to print."""
    lines = [f"{'RMSE to the nearest training clip':<36} {'mean':>7} {'median':>7} {'least':>7}   (grey levels of 255)"]
    for kind, name, title in (("", "generated", "generated clips"), ("_real", "real", "held-out real clips")):
        cells = values[f"rmse{kind}"], values[f"rmse{kind}_median"], result[name]["rmse"][0]
        title = f"{result[name]['clips']} {title}"
        lines.append(f"{title:<36} " + " ".join(f"{cell:>7.2f}" for cell in cells))
    if values["rmse_ratio"] is not None:
        low, high = result["rmse_ratio_interval95"]
        lines.append(f"{'generated / real':<36} {values['rmse_ratio']:>7.3f} ({low:.3f} to {high:.3f})")
    lines.append(f"{'nearer than all real clips':<36} {values['nearer_than_all_real']:>7.3f} of the generated ones")
    lines.append(f"{'nearer than 95% of them':<36} {values['nearer_than_95_percent']:>7.3f}")
    return ["  " + line for line in lines]


def write_pairs(path, root, videos, clips, names, pairs):
    """A sheet of pairs, two rows each: a generated clip above its nearest training clip, a few frames of both."""
    (T, size), rows, titles = clips.shape[1:3], [], []
    shown = np.linspace(0, T - 1, min(T, COLUMNS)).round().astype(int)
    frames = TrainingFrames(root, videos, size, ())
    for pair, name in zip(pairs, names, strict=True):
        indices = (pair["first_frame"] + shown * pair["frame_interval"]).tolist()
        rows += [clips[pair["clip"]].numpy()[shown], frames.read_window(pair["number"], indices, pair["mirrored"])]
        stem = os.path.splitext(os.path.basename(pair["video"]))[0]
        mirrored = " mirrored" if pair["mirrored"] else ""
        titles += [f"{name or 'sample'} {pair['clip']}: {pair['rmse']:.1f}"]
        titles += [f"{stem[-30:]} from frame {indices[0]}{mirrored}"]
    write_sheet(path, np.stack(rows), titles)
