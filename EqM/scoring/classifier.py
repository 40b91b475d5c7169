"""Which class does a clip show? A small network learns it from real clips and classifies generated ones.

For data sets of few videos whose file stem names a group, such as the person: <Class>/person3.mkv. First, for each
group, a network trained on all videos of the others classifies the videos of that group: the classifier's own accuracy.
Then one trained on the training split alone classifies the samples. It sees grey windows of at most 16 frames, 32 px,
as far apart as those of the samples. The class of a longer clip is that of the mean of the logits of evenly spaced
windows, each of which shares half of its time or more with the next. Intervals: 95%, by clip. It runs on the CPU.

Training windows are mirrored at random, so classes that differ only by left and right can't be told apart. There is no
class for standing still, so static samples, which move less than any real clip of their class, are counted too.
"""

import math
import statistics
from argparse import Namespace
from collections import Counter
from pathlib import PurePosixPath

import torch
import torch.nn.functional as F
from torch import nn

from runtime import distributed
from runtime.cli import Bar, UserError
from runtime.distributed import rank
from runtime.rng import generator
from scoring.stats import mean_interval, share
from video.files import read_frames, resize_and_crop

SIZE = 32  # px, of what the classifier sees
MOST_FRAMES = 16  # of a window
PURPOSE = "judge"  # of its random draws, which scores of earlier code depend on
MOVES = 40  # of 255 levels: a pixel moves if its grey changes by more in a window; what a VAE lets flicker does not
# Training: changes are the largest, in shares of size, side, contrast and of the range from black to white
RECIPE = Namespace(batch=16, lr=3e-3, weight_decay=0.05, smoothing=0.1, zoom=0.1, shift=0.12, contrast=0.3, light=0.15)


def check(samples, clips, training, place):
    """Raise UserError unless a network can learn from groups of the videos of Clips to classify Samples."""
    classes, videos = clips.classes, clips.videos
    if unknown := set(samples.classes) - set(classes):
        found = f"has class {min(unknown)}, {place} has {', '.join(classes)}"
        raise UserError(f"{samples.place}: {found}; pass the data set that the model was trained on")
    for name in classes:
        count = len({group_of(video) for video in videos if video.class_name == name})
        if count < 2 or len(classes) < 2:
            found = f"{len(classes)} classes, of {name} videos of {count} groups (file stems)"
            raise UserError(f"{place}: {found}; expected at least 2 of both, as one group is left out at a time")
        if all(video.class_name != name for video in training):
            raise UserError(f"{place}: no video of class {name} in the training split; expected one (--val-fraction)")


def group_of(video):
    return PurePosixPath(video.key).name


def score_classifier(samples, clips, training, args):
    """Classify Samples (see sources.py) by the videos of Clips, clips as long as a window; `training`: some of them."""
    torch.set_num_threads(1)  # sums in another order would make another classifier
    window, (interval, _), classes = clips.num_frames, clips.frame_interval, clips.classes
    videos = sorted(clips.videos, key=lambda video: video.path)
    frames = (read_frames(args.data_path, video, range(video.num_frames)) for video in videos)
    clips = [prepare(own, samples.image_size) for own in frames]
    labels, groups = [classes.index(video.class_name) for video in videos], [group_of(video) for video in videos]
    settings = {"num_classes": len(classes), "window": window, "interval": interval}
    settings |= {"steps": args.classifier_steps, "seed": args.seed}
    logits = leave_one_out(clips, labels, groups, settings)
    if rank() != 0:
        return None, None, None
    real = summarize(logits, labels, classes)
    real["wrong"] = [v.path for v, label, found in zip(videos, labels, real["found"], strict=True) if label != found]
    mine = [index for index, video in enumerate(videos) if video in training]
    network = train([clips[i] for i in mine], [labels[i] for i in mine], "of the training split", **settings)
    shown, asked = [prepare(clip, samples.image_size) for clip in samples.clips], [*map(classes.index, samples.names)]
    found = summarize([logits_of(network, clip, window, interval=1) for clip in shown], asked, classes)
    found["static"] = find_static(shown, asked, clips, labels, window, interval)
    lines = [
        f"  real clips, each of {len(set(groups))} groups left out once, classified correctly: {in_words(real)}",
        f"  samples classified as the class that was asked for: {in_words(found)}",
        f"  static samples, which move less than any real clip of their class: {len(found['static'])}",
    ]
    values = {"accuracy": real["share"], "window_accuracy": real["windows"]["share"], "asked_class": found["share"]}
    about = {"window": window, "classes": classes, "groups": sorted(set(groups)), "num_training": len(mine)}
    return values, {"real": real, "samples": found, "recipe": vars(RECIPE) | {"size": SIZE}} | about, lines


class Classifier(nn.Module):
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


def prepare(frames, image_size):
    """uint8 frames (T, H, W, 3) as a grey clip (T, SIZE, SIZE); before, image_size, as for the model of the samples."""
    frames = resize_and_crop(resize_and_crop(torch.tensor(frames).permute(0, 3, 1, 2), image_size), SIZE)
    return torch.einsum("tchw,c->thw", frames.float(), torch.tensor([0.299, 0.587, 0.114])).round().byte()


def span_of(window, interval):
    """Frames of a clip from the first to the last of a window."""
    return (window - 1) * interval + 1


def windows_of(clip, window, interval):
    """The windows (n, window, SIZE, SIZE) that a clip is classified by, from its first to its last frame."""
    span = span_of(window, interval)
    rest = len(clip) - span
    starts = torch.linspace(0, rest, 1 + math.ceil(2 * rest / span)).round().int().tolist()
    return torch.stack([clip[start : start + span : interval] for start in starts])


def motion_of(clip, window, interval):
    """The share of pixels that move in each window of a clip, one starting at every frame: (n,)."""
    windows = clip.unfold(0, span_of(window, interval), 1)[..., ::interval]  # (n, SIZE, SIZE, window)
    return (windows.amax(dim=-1) - windows.amin(dim=-1) > MOVES).double().mean(dim=(1, 2))


def find_static(samples, asked, clips, labels, window, interval):
    """Indices of the samples of which a window moves less than every window of the real clips of their class."""
    least = {}
    for clip, label in zip(clips, labels, strict=True):
        least[label] = min(least.get(label, 1.0), motion_of(clip, window, interval).min().item())
    moved = [motion_of(clip, window, 1).min().item() for clip in samples]
    return [index for index, label in enumerate(asked) if moved[index] < least[label]]


def random_windows(of_class, window, interval, random):
    """Training windows (B, window, SIZE, SIZE), changed at random, and labels (B,). of_class: {label: its clips}."""
    B, span, windows = RECIPE.batch, span_of(window, interval), []
    y = torch.tensor(list(of_class))[torch.randint(len(of_class), (B,), generator=random)]  # classes: equally often
    for label, (which, when) in zip(y.tolist(), torch.rand(B, 2, generator=random).tolist(), strict=True):
        clip = of_class[label][int(which * len(of_class[label]))]
        start = int(when * (len(clip) - span + 1))
        windows.append(clip[start : start + span : interval])
    zoom, right, down, contrast, light = 2 * torch.rand(5, B, generator=random) - 1
    mirror = 1 - 2 * torch.randint(2, (B,), generator=random)
    zoom, right, down, zero = 1 + RECIPE.zoom * zoom, 2 * RECIPE.shift * right, 2 * RECIPE.shift * down, torch.zeros(B)
    matrix = torch.stack([mirror * zoom, zero, right, zero, zoom, down], dim=1).view(B, 2, 3)
    x = torch.stack(windows).float() / 255
    grid = F.affine_grid(matrix, x.shape, align_corners=False)  # one change for all frames of a window
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast, light = (1 + RECIPE.contrast * contrast).view(B, 1, 1, 1), (RECIPE.light * light).view(B, 1, 1, 1)
    return (x - 0.5) * contrast + 0.5 + light, y


def train(clips, labels, name, num_classes, window, interval, steps, seed):
    """A Classifier of these clips. All draws are functions of the seed, the name of the classifier and the step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, PURPOSE, name).initial_seed())
        network = Classifier(num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), RECIPE.lr, weight_decay=RECIPE.weight_decay)
    rows = list(zip(clips, labels, strict=True))
    of_class = {label: [clip for clip, other in rows if other == label] for label in sorted(set(labels))}
    for step in range(steps):
        done = step / steps  # a tenth of the steps to warm up, a cosine to 0
        optimizer.param_groups[0]["lr"] = RECIPE.lr * min(1, 10 * done + 0.1) * math.cos(done * math.pi / 2) ** 2
        x, y = random_windows(of_class, window, interval, generator(seed, PURPOSE, name, step))
        optimizer.zero_grad()
        F.cross_entropy(network(x), y, label_smoothing=RECIPE.smoothing).backward()
        optimizer.step()
    return network


@torch.no_grad()
def logits_of(network, clip, window, interval):
    """The logits (n, classes) of the windows of a clip. The clip's are their mean."""
    return network(windows_of(clip, window, interval).float() / 255)


def leave_one_out(clips, labels, groups, settings):
    """The logits (n, classes) of the windows of each clip, by a network trained on the other groups alone.

    The ranks share the groups; all get all logits.
    """
    names, found = sorted(set(groups)), []
    own = [names[number] for number in distributed.own_indices(len(names))]
    for left_out in Bar(own, desc="groups left out", unit="group", leave=False, disable=rank() != 0):
        others = [index for index, group in enumerate(groups) if group != left_out]
        network = train([clips[i] for i in others], [labels[i] for i in others], f"without {left_out}", **settings)
        mine = [index for index, group in enumerate(groups) if group == left_out]
        found += [(index, logits_of(network, clips[index], settings["window"], settings["interval"])) for index in mine]
    return distributed.gather_in_order(found)[0]


def summarize(logits, labels, classes):
    """The share of clips that are classified as their label, a plain dict. logits: (n, classes) of n windows of each.

    confusion: a row for each label, a column for each class that clips are classified as. windows: the share of single
    windows, in the mean over the clips, and its bootstrap interval.
    """
    found = [own.mean(dim=0).argmax().item() for own in logits]
    counts, every = Counter(zip(labels, found, strict=True)), range(len(classes))
    confusion = [[counts[row, column] for column in every] for row in every]
    right = [(own.argmax(dim=1) == label).double().mean().item() for own, label in zip(logits, labels, strict=True)]
    windows = {"count": sum(map(len, logits)), "share": statistics.fmean(right), "interval95": mean_interval(right)}
    return share(sum(counts[label, label] for label in every), len(labels)) | {
        "windows": windows,
        "per_class": {classes[label]: share(counts[label, label], sum(confusion[label])) for label in every},
        "confusion": confusion,
        "found": found,
    }


def in_words(found):
    low, high = found["interval95"]
    return f"{found['right']} of {found['clips']}, {found['share']:.1%} ({low:.1%} to {high:.1%})"
