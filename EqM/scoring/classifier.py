"""Which class does a clip show? A small network learns it from real clips.

It runs on the CPU and sees gray windows of at most 16 frames of 32 px, with the time between frames
of the samples. A longer clip gets the class of its windows' mean logits. A network trained on the
training split classifies the samples. --classifier-test says how the classifier's own accuracy is
measured:

groups  For few videos, whose file stem names a group, such as the person: <Class>/person3.mkv. A
        network trained on the other groups classifies the videos of each group. Training windows
        are mirrored at random, so classes that differ only by left and right look the same.
val     For thousands of videos, as in the literature on Sprites (C-DSVAE, arXiv 2110.12091): the
        network for the samples classifies the validation split. Windows are not changed at random,
        labels are not smoothed, and IS, H(y|x) and H(y) are reported too. Such a network may be
        certain of poor samples, so H(y|x) is not calibrated: compare it with the H(y|x) of real
        clips.

No class stands for "does not move", so static samples, which move less than any real clip of their
class, are counted.
"""

import itertools
import math
from argparse import Namespace
from collections import Counter, namedtuple
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from runtime import distributed
from runtime.cli import Bar, UserError, plural
from runtime.rng import generator
from scoring.stats import cell, interval_units, share, table, unit_of
from video.files import UnreadableError, read_frames, resize_and_crop
from video.source import in_threads

SIZE, MOST_FRAMES = 32, 16  # px and most frames of a window
PURPOSE = "judge"  # names its random draws; another word would change published scores
# of 255 levels: a pixel moves if its gray changes by more in a window; a VAE flickers less
MOVES = 40
# accuracy on real validation clips below which errors of samples may be errors of the classifier
ENOUGH = 0.999
ENTROPIES = "IS", "H(y|x)", "H(y)"  # values of `sharpness`
COMMON = {"batch": 16, "lr": 3e-3, "weight_decay": 0.05}
# By --classifier-test. Random changes: the largest, as shares of size, side, contrast and of the
# range black to white
RECIPES = {
    "groups": Namespace(
        **COMMON, steps=250, smoothing=0.1, zoom=0.1, shift=0.12, contrast=0.3, light=0.15
    ),
    "val": Namespace(**COMMON, steps=1000, smoothing=0.0),
}
# of a clip: `every_window`, number of its class, group, Video
Real = namedtuple("Real", "windows label group video")


def check(samples, clips, training, place, test):
    """Raise UserError unless a network can learn the classes of Samples from Clips.

    test: --classifier-test.
    """
    samples.check_classes(clips.classes, place)
    tested = {video.class_name for video in set(clips.videos) - set(training)}
    for name in clips.classes:
        count = len({unit_of(video.path) for video in clips.videos if video.class_name == name})
        if count < 2 or len(clips.classes) < 2:
            got = f"{plural(len(clips.classes), 'class')}, {plural(count, 'group')} in {name}"
            raise UserError(
                f"{place}: {got}; expected at least 2 of both, as each group is held out once"
            )
        if test == "val" and name not in tested:
            raise UserError(
                f"{place}: no validation video of class {name}; expected one; raise --val-fraction"
            )
        if all(video.class_name != name for video in training):
            raise UserError(
                f"{place}: no training video of class {name}; expected one; lower --val-fraction"
            )


def score_classifier(samples, clips, training, args, corrupt):
    """Classify Samples with networks trained on the videos of Clips, in windows of their length.

    training: a part.
    """
    by_split = args.classifier_test == "val"
    recipe = RECIPES[args.classifier_test]
    if by_split and distributed.rank() != 0:  # there is one network to train
        return None, None, None
    torch.set_num_threads(1)  # another order of sums makes another classifier
    classes = clips.classes
    window = clips.num_frames
    interval = clips.frame_interval[0]
    real = read_real(clips, args, samples.image_size, corrupt)
    training = set(training)
    own = [one for one in real if one.video in training]
    others = [one for one in real if one.video not in training]
    clips = replace(clips, videos=[one.video for one in real])
    place = f"--data-path {args.data_path}"
    check(samples, clips, [one.video for one in own], place, args.classifier_test)
    span = (window - 1) * interval + 1
    steps = args.classifier_steps or recipe.steps
    settings = {"num_classes": len(classes), "recipe": recipe, "steps": steps, "seed": args.seed}
    tested, logits = (others, None) if by_split else (real, leave_one_out(real, span, settings))
    if distributed.rank() != 0:
        return None, None, None
    network = train(own, "of the training split", **settings)
    if by_split:
        logits = [logits_of(network, one.windows, span) for one in tested]
    videos = [one.video.path for one in tested]
    about = summarize(logits, [one.label for one in tested], classes, videos)
    about["wrong"] = [
        one.video.path for one, got in zip(tested, about["found"], strict=True) if one.label != got
    ]
    shown = [every_window(prepare(clip, samples.image_size), window, 1) for clip in samples.clips]
    of_samples = [logits_of(network, every, window) for every in shown]
    asked = [*map(classes.index, samples.names)]
    found = summarize(of_samples, asked, classes, samples.videos)
    found["static"] = find_static(shown, asked, real)
    groups = sorted({one.group for one in real})
    values = {
        "accuracy": about["share"],
        "window_accuracy": about["windows"]["share"],
        "asked_class": found["share"],
    }
    if by_split:
        about = about | sharpness(logits)
        found = found | sharpness(of_samples)
        values |= {name: found[name] for name in ENTROPIES}
    how = (
        f"trained on {len(own)} others"
        if by_split
        else f"each of {len(groups)} groups held out once"
    )
    lines = compare({f"real clips ({how})": about, "samples": found})
    lines.append(
        "  static samples, which move less than any real clip of their class: "
        f"{len(found['static'])}"
    )
    result = {
        "real": about,
        "samples": found,
        "recipe": vars(recipe) | {"size": SIZE, "steps": steps},
    }
    result |= {"window": window, "classes": classes, "groups": groups, "num_training": len(own)}
    result["interval_units"], line = interval_units(real=videos, samples=samples.videos)
    return values, result, [*lines, line]


def read_real(clips, args, size, corrupt):
    """The Real of the videos of Clips in the order of paths.

    Adds the paths of corrupt videos to the list `corrupt`.
    """

    def read(video):
        try:
            clip = prepare(read_frames(args.data_path, video, range(video.num_frames)), size)
        except UnreadableError:
            corrupt.append(video.path)
            return None
        windows = every_window(clip, clips.num_frames, clips.frame_interval[0])
        return Real(windows, clips.classes.index(video.class_name), unit_of(video.path), video)

    videos = sorted(clips.videos, key=lambda video: video.path)
    found = in_threads(read, videos, max(1, args.num_workers))
    return [
        *filter(None, Bar(found, total=len(videos), desc="real clips", unit="clip", leave=False))
    ]


class Classifier(nn.Module):
    """Logits (B, classes) of windows (B, T, SIZE, SIZE), values from 0 to 1.

    It sees gray levels and their changes.
    """

    def __init__(self, num_classes):
        super().__init__()
        layers = []
        for inside, outside in itertools.pairwise((2, 12, 24, 48)):
            layers += [
                nn.Conv3d(inside, outside, 3, stride=2, padding=1),
                nn.GroupNorm(4, outside),
                nn.ReLU(),
            ]
        self.layers = nn.Sequential(*layers)
        # Not pooled over places: one arm or two is a question of left and right
        self.head = nn.Sequential(
            nn.Linear(48 * (SIZE // 8) ** 2, 32), nn.ReLU(), nn.Linear(32, num_classes)
        )

    def forward(self, x):
        gray = x - x.mean(dim=(1, 2, 3), keepdim=True)
        change = x.diff(dim=1, prepend=x[:, :1])
        # (B, 48, T / 8, SIZE / 8, SIZE / 8)
        features = self.layers(torch.stack([2 * gray, 8 * change], dim=1))
        return self.head(features.mean(dim=2).flatten(1))


def prepare(frames, image_size):
    """uint8 frames (T, H, W, 3) -> a gray clip (T, SIZE, SIZE), by way of a model's image_size."""
    frames = resize_and_crop(
        resize_and_crop(torch.tensor(frames).permute(0, 3, 1, 2), image_size), SIZE
    )
    return (
        torch.einsum("tchw,c->thw", frames.float(), torch.tensor([0.299, 0.587, 0.114]))
        .round()
        .byte()
    )


def every_window(clip, window, interval):
    """All windows of a clip, one from each frame: (n, window, SIZE, SIZE), a view."""
    return clip.unfold(0, (window - 1) * interval + 1, 1)[..., ::interval].movedim(-1, 1)


def windows_of(every, span):
    """Some of `every_window` of a clip, from its first to its last frame.

    Each overlaps the next by half or more. span: the frames from the start of a window to its end.
    """
    rest = len(every) - 1
    return every[torch.linspace(0, rest, 1 + math.ceil(2 * rest / span)).round().long()]


def least_motion(windows):
    """The smallest share of moving pixels in any window of a clip."""
    return (
        (windows.amax(dim=1) - windows.amin(dim=1) > MOVES).double().mean(dim=(1, 2)).min().item()
    )


def find_static(samples, asked, real):
    """Indices of samples with a window, of `every_window`, that moves less than all their Real."""
    least = {
        label: min(least_motion(one.windows) for one in real if one.label == label)
        for label in set(asked)
    }
    rows = enumerate(zip(samples, asked, strict=True))
    return [index for index, (windows, label) in rows if least_motion(windows) < least[label]]


def random_windows(of_class, random, batch):
    """Windows (batch, window, SIZE, SIZE) from 0 to 1 and labels (batch,).

    of_class: {label: windows of each clip}.
    """
    windows = []
    # classes equally often
    y = torch.tensor(list(of_class))[torch.randint(len(of_class), (batch,), generator=random)]
    for label, (which, when) in zip(
        y.tolist(), torch.rand(batch, 2, generator=random).tolist(), strict=True
    ):
        every = of_class[label][int(which * len(of_class[label]))]
        windows.append(every[int(when * len(every))])
    return torch.stack(windows).float() / 255, y


def change(x, recipe, random):
    """Windows (B, T, SIZE, SIZE) in another place, size, contrast and light.

    Half of them mirrored.
    """
    zoom, right, down, contrast, light = 2 * torch.rand(5, B := len(x), generator=random) - 1
    mirror = 1 - 2 * torch.randint(2, (B,), generator=random)
    zero = torch.zeros(B)
    zoom = 1 + recipe.zoom * zoom
    right = 2 * recipe.shift * right
    down = 2 * recipe.shift * down
    matrix = torch.stack([mirror * zoom, zero, right, zero, zoom, down], dim=1).view(B, 2, 3)
    # the same for all frames of a window
    grid = F.affine_grid(matrix, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    contrast = (1 + recipe.contrast * contrast).view(B, 1, 1, 1)
    light = (recipe.light * light).view(B, 1, 1, 1)
    return (x - 0.5) * contrast + 0.5 + light


def train(real, name, num_classes, steps, seed, recipe):
    """A Classifier trained on some Real.

    All draws are functions of the seed, its name and the step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, PURPOSE, name).initial_seed())
        network = Classifier(num_classes)
    optimizer = torch.optim.AdamW(network.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    labels = sorted({one.label for one in real})
    of_class = {label: [one.windows for one in real if one.label == label] for label in labels}
    for step in range(steps):
        done = step / steps  # warm-up for a tenth of the steps, then a cosine to 0
        optimizer.param_groups[0]["lr"] = (
            recipe.lr * min(1, 10 * done + 0.1) * math.cos(done * math.pi / 2) ** 2
        )
        random = generator(seed, PURPOSE, name, step)
        x, y = random_windows(of_class, random, recipe.batch)
        x = change(x, recipe, random) if hasattr(recipe, "zoom") else x
        optimizer.zero_grad()
        F.cross_entropy(network(x), y, label_smoothing=recipe.smoothing).backward()
        optimizer.step()
    return network


@torch.no_grad()
def logits_of(network, every, span):
    """The logits (n, classes) of a clip's `windows_of`. Their mean decides its class."""
    return network(windows_of(every, span).float() / 255)


def leave_one_out(real, span, settings):
    """The logits (n, classes) of each Real's windows, by a network trained on the other groups.

    Equal on all ranks. settings: arguments of `train`. The ranks share the groups.
    """
    names = sorted({one.group for one in real})
    found = []
    own = [names[number] for number in distributed.own_indices(len(names))]
    for held_out in Bar(own, desc="groups held out", unit="group", leave=False):
        network = train(
            [one for one in real if one.group != held_out], f"without {held_out}", **settings
        )
        mine = [(index, one.windows) for index, one in enumerate(real) if one.group == held_out]
        found += [(index, logits_of(network, windows, span)) for index, windows in mine]
    return distributed.gather_in_order(found)[0]


def summarize(logits, labels, classes, videos=()):
    """The share of clips that are classified as their label, a plain dict.

    logits: (n, classes) of each clip's windows. videos: those of the clips. windows: the same share
    of single windows. confusion: a row per label, a column per class that the clips got.
    """
    found = [own.mean(dim=0).argmax().item() for own in logits]
    counts = Counter(zip(labels, found, strict=True))
    every = range(len(classes))
    right = sum(counts[label, label] for label in every)
    count = len(labels)
    windows = [
        (own.argmax(dim=1) == label).double().mean().item()
        for own, label in zip(logits, labels, strict=True)
    ]
    about = {"count": sum(map(len, logits))}
    about["share"], about["interval95"] = share(windows, videos)
    _, interval = share([label == own for label, own in zip(labels, found, strict=True)], videos)
    return {
        "clips": count,
        "right": right,
        "share": right / count,
        "interval95": interval,
        "windows": about,
        "confusion": [[counts[row, column] for column in every] for row in every],
        "found": found,
    }


def sharpness(logits):
    """The inception score and the entropies in nats of clips, from logits (n, classes) of windows.

    p(y|x) is the softmax of a clip's mean logits, p(y) its mean over the clips. IS = exp(E
    KL(p(y|x) || p(y))), which equals exp(H(y) - H(y|x)): at most the number of classes, if they are
    equally frequent.
    """
    p = torch.stack([own.mean(dim=0) for own in logits]).double().softmax(dim=1)
    given, overall = (
        torch.special.entr(q).sum(dim=1).mean().item() for q in (p, p.mean(dim=0, keepdim=True))
    )
    return dict(zip(ENTROPIES, (math.exp(overall - given), given, overall), strict=True))


def compare(found):
    """Lines: how {title: clips} are classified, real clips first, and what to doubt."""
    real, *_ = found.values()
    names = [name for name in ENTROPIES if name in real]
    rows = [["", "wrong", "clips", "accuracy, 95%", *names]]
    for title, one in found.items():
        entropies = [f"{one[name]:.4f}" for name in names]
        wrong = one["clips"] - one["right"]
        accuracy = cell(one, "share", 4, "interval95")
        rows.append([title, str(wrong), str(one["clips"]), accuracy, *entropies])
    note = (
        f"below {ENOUGH:.1%} on real clips, errors of samples may be the classifier's; raise "
        "--classifier-steps"
    )
    return [*table(rows), *[f"  note: {note}"] * bool(names and real["share"] < ENOUGH)]
