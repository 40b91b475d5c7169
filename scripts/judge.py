"""Which class does a clip show? A small network learns it from real clips and judges generated ones.

    python scripts/judge.py --data-path datasets/weizmann --samples samples/weizmann-f16 --out judge.json
    python scripts/judge.py --data-path datasets/weizmann --out judge.json          only how good the judge is

For data sets of few videos whose file stem names a group, such as the person: <Class>/person3.mkv. First, for each
group, a judge trained on all videos of the others is asked about the videos of that group: the judge's own accuracy.
Then one trained on the training split alone is asked about the samples. A judge sees grey windows of --window frames,
32 px, as far apart as those of the samples. Longer clips are judged by the mean of the logits of evenly spaced windows,
each of which shares half of its time or more with the next. Intervals: 95%, by clip. Runs on the CPU.

A judge knows no class for standing still, so samples that move less than any real clip of their class are counted too.
"""

import math
import os
import statistics
import sys
from argparse import BooleanOptionalAction, Namespace
from collections import Counter
from pathlib import Path, PurePosixPath

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "EqM"))
from runtime import cli
from runtime.cli import UserError, say
from runtime.rng import generator
from scoring import manifest
from scoring.motion import wilson
from scoring.prediction import bootstrap
from scoring.sources import FromFolder, file_stats, names_and_sizes
from video.files import UnreadableError, read_frames, resize_and_crop
from video.index import check_data_path, latents_settings, scan_videos, split_videos

SIZE = 32  # px, of what the judge sees
MOVES = 40  # of 255 levels: a pixel moves if its grey changes by more in a window; what a VAE lets flicker does not
# Training: changes are the largest, in shares of size, side, contrast and of the range from black to white
RECIPE = Namespace(batch=16, lr=3e-3, weight_decay=0.05, smoothing=0.1, zoom=0.1, shift=0.12, contrast=0.3, light=0.15)


def parse_args():
    parser = cli.ArgumentParser(description="Train a small network to tell the classes of real clips; judge samples.")
    add = parser.add_argument
    data = "folder of <Class>/<group>.mkv: videos of one file stem are a group (a person), which is left out as one"
    add("--data-path", required=True, metavar="DIR", help=data)
    samples = "folders that sample_gd.py has written; default: only the accuracy for real clips"
    add("--samples", nargs="+", default=[], metavar="DIR", help=samples)
    add("--out", required=True, metavar="FILE.json", help="all results and what they depend on")
    add("--val-fraction", type=cli.SHARE, default=0.05, metavar="F", help="share of the videos in val, as in training")
    add("--window", type=cli.number(int, least=2, most=1000), default=16, metavar="N", help="frames of a window")
    flip = "train on mirrored clips too; --no-flip for classes that have a left and a right"
    add("--flip", action=BooleanOptionalAction, default=True, help=flip)
    add("--steps", type=cli.COUNT, default=250, metavar="N", help=f"of training, {RECIPE.batch} windows each")
    add("--seed", type=cli.NATURAL, default=0, metavar="N", help="of the weights and the training windows")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------------------------------------
# The judge. A clip is grey, uint8 (T, SIZE, SIZE), of a window's length or longer


class Judge(nn.Module):
    """Logits (B, classes) of windows (B, T, SIZE, SIZE) with values from 0 to 1: of their grey and its change in time.

    The last layers see where something is, as one arm or two is a question of left and right.
    """

    def __init__(self, num_classes, channels=(2, 12, 24, 48), hidden=32):
        super().__init__()
        layers = []
        for inside, outside in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv3d(inside, outside, 3, stride=2, padding=1), nn.GroupNorm(4, outside), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        wide = nn.Linear(channels[-1] * (SIZE // 8) ** 2, hidden)
        self.head = nn.Sequential(wide, nn.ReLU(), nn.Linear(hidden, num_classes))

    def forward(self, x):
        grey, change = x - x.mean(dim=(1, 2, 3), keepdim=True), x.diff(dim=1, prepend=x[:, :1])
        features = self.layers(torch.stack([2 * grey, 8 * change], dim=1))  # (B, 48, T / 8, SIZE / 8, SIZE / 8)
        return self.head(features.mean(dim=2).flatten(1))


def look(frames, image_size):
    """uint8 frames (T, H, W, 3) as a clip; before, they are resized to image_size, as for the model of the samples."""
    frames = resize_and_crop(resize_and_crop(torch.tensor(frames).permute(0, 3, 1, 2), image_size), SIZE)
    return torch.einsum("tchw,c->thw", frames.float(), torch.tensor([0.299, 0.587, 0.114])).round().byte()


def span_of(window, interval):
    """Frames of a clip from the first to the last of a window."""
    return (window - 1) * interval + 1


def windows_of(clip, window, interval):
    """The windows (n, window, SIZE, SIZE) that a clip is judged by, from its first to its last frame."""
    span = span_of(window, interval)
    rest = len(clip) - span
    starts = torch.linspace(0, rest, 1 + math.ceil(2 * rest / span)).round().int().tolist()
    return torch.stack([clip[start : start + span : interval] for start in starts])


def motion_of(clip, window, interval):
    """The share of pixels that move in each window of a clip, one starting at every frame: (n,)."""
    windows = clip.unfold(0, span_of(window, interval), 1)[..., ::interval]  # (n, SIZE, SIZE, window)
    return (windows.amax(dim=-1) - windows.amin(dim=-1) > MOVES).double().mean(dim=(1, 2))


def find_still(samples, labels, clips, window, interval):
    """Indices of samples of which a window moves less than every window of the real (clip, label) of its class."""
    least = {}
    for clip, label in clips:
        least[label] = min(least.get(label, 1.0), motion_of(clip, window, interval).min().item())
    moved = [motion_of(clip, window, 1).min().item() for clip in samples]
    return [index for index, label in enumerate(labels) if moved[index] < least[label]]


def random_windows(of_class, args, random):
    """Training windows (B, window, SIZE, SIZE), changed at random, and labels (B,). of_class: {label: its clips}."""
    B, span, windows = RECIPE.batch, span_of(args.window, args.interval), []
    y = torch.tensor(list(of_class))[torch.randint(len(of_class), (B,), generator=random)]  # classes: equally often
    for label, (which, when) in zip(y.tolist(), torch.rand(B, 2, generator=random).tolist(), strict=True):
        clip = of_class[label][int(which * len(of_class[label]))]
        start = int(when * (len(clip) - span + 1))
        windows.append(clip[start : start + span : args.interval])
    zoom, right, down, contrast, light = 2 * torch.rand(5, B, generator=random) - 1
    mirror = 1 - 2 * torch.randint(1 + args.flip, (B,), generator=random)
    zoom, right, down, zero = 1 + RECIPE.zoom * zoom, 2 * RECIPE.shift * right, 2 * RECIPE.shift * down, torch.zeros(B)
    matrix = torch.stack([mirror * zoom, zero, right, zero, zoom, down], dim=1).view(B, 2, 3)
    x = torch.stack(windows).float() / 255
    grid = F.affine_grid(matrix, x.shape, align_corners=False)  # one change for all frames of a window
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast, light = (1 + RECIPE.contrast * contrast).view(B, 1, 1, 1), (RECIPE.light * light).view(B, 1, 1, 1)
    return (x - 0.5) * contrast + 0.5 + light, y


def train(clips, num_classes, args, name):
    """A Judge, from a list of (clip, label). All draws are functions of --seed, the name of the judge and the step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(args.seed, "judge", name).initial_seed())
        judge = Judge(num_classes)
    optimizer = torch.optim.AdamW(judge.parameters(), RECIPE.lr, weight_decay=RECIPE.weight_decay)
    of_class = {label: [clip for clip, other in clips if other == label] for label in sorted({own for _, own in clips})}
    for step in range(args.steps):
        done = step / args.steps  # a tenth of the steps to warm up, a cosine to 0
        optimizer.param_groups[0]["lr"] = RECIPE.lr * min(1, 10 * done + 0.1) * math.cos(done * math.pi / 2) ** 2
        x, y = random_windows(of_class, args, generator(args.seed, "judge", name, step))
        optimizer.zero_grad()
        F.cross_entropy(judge(x), y, label_smoothing=RECIPE.smoothing).backward()
        optimizer.step()
    return judge


@torch.no_grad()
def logits_of(judge, clip, window, interval):
    """The logits (n, classes) of the windows of a clip. The clip's are their mean."""
    return judge(windows_of(clip, window, interval).float() / 255)


def leave_one_out(clips, groups, num_classes, args):
    """The logits (n, classes) of the windows of each (clip, label), by a judge trained on the other groups alone."""
    logits = [None] * len(clips)
    for group in cli.Bar(sorted(set(groups)), desc="groups left out", unit="group", leave=False):
        others = [clip for clip, other in zip(clips, groups, strict=True) if other != group]
        judge = train(others, num_classes, args, f"without {group}")
        for index, (clip, _) in enumerate(clips):
            if groups[index] == group:
                logits[index] = logits_of(judge, clip, args.window, args.interval)
    return logits


def share(right, count):
    """A count as a share with its interval (Wilson); None without clips."""
    interval = wilson(right, count) if count else None
    return {"clips": count, "right": right, "share": right / count if count else None, "interval95": interval}


def summarize(logits, labels, classes):
    """The share of clips that are judged as their label, a plain dict. logits: (n, classes) of each clip's n windows.

    confusion: a row for each label, a column for each class that clips are judged as. windows: the share of single
    windows, in the mean over the clips, and its bootstrap interval.
    """
    judged = [own.mean(dim=0).argmax().item() for own in logits]
    counts, every = Counter(zip(labels, judged, strict=True)), range(len(classes))
    confusion = [[counts[row, column] for column in every] for row in every]
    right = [(own.argmax(dim=1) == label).double().mean().item() for own, label in zip(logits, labels, strict=True)]
    return share(sum(counts[label, label] for label in every), len(labels)) | {
        "windows": {"count": sum(map(len, logits)), "share": statistics.fmean(right), "interval95": bootstrap(right)},
        "per_class": {classes[label]: share(counts[label, label], sum(confusion[label])) for label in every},
        "confusion": confusion,
        "judged": judged,
    }


def in_words(found):
    low, high = found["interval95"]
    return f"{found['right']} of {found['clips']}, {found['share']:.1%} ({low:.1%} to {high:.1%})"


def open_samples(folders, window, classes):
    """The FromFolder of each folder; their classes are among `classes`, sizes and rates the same. Raises UserError."""
    opened = [FromFolder(Namespace(samples=name, num_samples=None, temporal_patch_size=None)) for name in folders]
    for source in opened:
        here, first = f"--samples {source.folder}", opened[0]
        if unknown := set(source.classes) - set(classes):
            known = f"--data-path has {', '.join(classes)}"
            raise UserError(f"{here}: has class {min(unknown)}, {known}: name the data set of its training")
        if len(source.labels) == 0 or (source.labels < 0).any():
            raise UserError(f"{here}: has no samples or some without a class, wanted a class for each: sample again")
        if source.num_frames < window:
            raise UserError(f"{here}: clips of {source.num_frames} frames, --window is {window}: give a smaller one")
        if source.image_size != first.image_size or abs(source.time_scale / first.time_scale - 1) > 0.01:
            own, other = (f"{one.image_size} px at {1 / one.time_scale:.3g} fps" for one in (source, first))
            raise UserError(f"{here}: clips of {own}, those of {first.folder} have {other}: judge them one by one")
    return opened


def find_clips(args):
    """(the FromFolder of --samples, Videos that have a window, those of them that train, class names, their fps).

    Sets args.interval, the frames of a video from one frame of a window to the next. Raises UserError.
    """
    here = f"--data-path {args.data_path}"
    check_data_path(args.data_path)
    if latents_settings(args.data_path) is not None:
        raise UserError(f"{here}: a latent cache; wanted the folder of its videos")
    scan = scan_videos(args.data_path)
    opened = open_samples(dict.fromkeys(args.samples), args.window, scan.classes)
    fps = statistics.median(video.fps for video in scan.videos)
    seconds = opened[0].time_scale if opened else 1 / fps
    args.interval = max(1, round(seconds * fps))
    if abs(args.interval / fps / seconds - 1) > 0.01:
        say(f"note: real frames are {args.interval / fps:.3g} s apart, those of the samples {seconds:.3g} s")
    train, _ = split_videos(args.data_path, scan.videos, args.val_fraction)  # before any is left out, as in train.py
    span = span_of(args.window, args.interval)
    videos = [video for video in scan.videos if video.num_frames >= span]
    if left_out := len(scan.unreadable) + len(scan.videos) - len(videos):
        say(f"note: {left_out} videos can't be opened or have fewer than the {span} frames of a window: left out")
    train = [video for video in train if video in videos]
    for name in scan.classes:
        count = len({PurePosixPath(video.key).name for video in videos if video.class_name == name})
        if count < 2 or len(scan.classes) < 2:
            found = f"{len(scan.classes)} classes, of {name} videos of {count} groups (file stems)"
            raise UserError(f"{here}: {found}, wanted at least 2 of both: one group is left out at a time")
        if opened and all(video.class_name != name for video in train):
            raise UserError(f"{here}: no video of class {name} in the training split, wanted one: see --val-fraction")
    return opened, videos, train, scan.classes, fps


@cli.one_line_errors(UnreadableError)
def main():
    args = parse_args()
    try:
        if os.path.isdir(args.out):
            raise UserError(f"--out {args.out}: a folder; wanted the name of a JSON file")
        cli.check_writable("--out", os.path.dirname(args.out) or ".")
        opened, videos, training, classes, fps = find_clips(args)
    except UserError as error:
        cli.fail(error)
    torch.set_num_threads(1)  # sums of another order would be another judge
    size = opened[0].image_size if opened else SIZE
    frames = (read_frames(args.data_path, video, range(video.num_frames)) for video in videos)
    clips = [(look(own, size), classes.index(video.class_name)) for own, video in zip(frames, videos, strict=True)]
    labels, groups = [label for _, label in clips], [PurePosixPath(video.key).name for video in videos]

    real = summarize(leave_one_out(clips, groups, len(classes), args), labels, classes)
    real["wrong"] = [v.path for v, label, found in zip(videos, labels, real["judged"], strict=True) if label != found]
    single, (low, high) = real["windows"]["share"], real["windows"]["interval95"]
    say(f"real clips, each of {len(set(groups))} groups left out once, judged right: {in_words(real)}")
    say(f"their single windows of {args.window} frames, judged right: {single:.1%} ({low:.1%} to {high:.1%})")
    values, result = {"accuracy": real["share"], "window_accuracy": single}, {"real": real, "samples": {}}
    if opened:
        own = [clip for clip, video in zip(clips, videos, strict=True) if video in training]
        judge = train(own, len(classes), args, "of the training split")
    for source in opened:
        asked = [classes.index(source.classes[label]) for label in source.labels.tolist()]
        samples = [look(clip, source.image_size) for clip in source.clips]
        found = summarize([logits_of(judge, clip, args.window, interval=1) for clip in samples], asked, classes)
        found["still"] = find_still(samples, asked, clips, args.window, args.interval)
        say(f"{source.folder}, judged as the class that was asked for: {in_words(found)}")
        say(f"{source.folder}, that move less than any real clip of their class: {len(found['still'])}")
        values[f"asked_class {source.folder}"], result["samples"][str(source.folder)] = found["share"], found

    names = names_and_sizes(videos, file_stats(args.data_path, videos))
    about = {
        "data_path": args.data_path, "videos_sha256": names, "num_videos": len(videos), "fps": fps,
        "num_training": len(training), "classes": classes, "groups": sorted(set(groups)), "image_size": size,
        "frame_interval": args.interval,
    }  # fmt: skip
    parameters = sum(parameter.numel() for parameter in Judge(len(classes)).parameters())
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    manifest.write_manifest(args.out, {
        "format": manifest.FORMAT, "metric": "judge", "protocol": f"judge_{args.window}f", "values": values,
        "result": result, "generated": {"folders": [source.provenance() for source in opened]}, "real": about,
        "detector": vars(RECIPE) | {"size": SIZE, "parameters": parameters}, "flags": vars(args), "repeats": None,
        "code": manifest.code_commit(), "packages": manifest.packages(),
        "machine": manifest.machine(torch.device("cpu")),
    })  # fmt: skip


if __name__ == "__main__":
    main()
