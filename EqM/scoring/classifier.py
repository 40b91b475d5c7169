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
from video.files import UnreadableError, resize_and_crop
from video.source import in_threads

SIZE = 32  # px of a window
MOST_FRAMES = 16  # of a window
PURPOSE = "judge"  # names its random draws; another word would change published scores
# of 255 levels: a pixel moves if its gray changes by more in a window; a VAE flickers less
MOVES = 40
# accuracy on real validation clips below which errors of samples may be errors of the classifier
ENOUGH = 0.999
ENTROPIES = "IS", "H(y|x)", "H(y)"  # values of `sharpness`
COMMON = {
    "batch": 16,
    "lr": 3e-3,
    "weight_decay": 0.05,
}
# By --classifier-test. Random changes: the largest, as shares of size, side, contrast and of the
# range black to white
RECIPES = {
    "groups": Namespace(
        **COMMON,
        steps=250,
        smoothing=0.1,
        zoom=0.1,
        shift=0.12,
        contrast=0.3,
        light=0.15,
    ),
    "val": Namespace(**COMMON, steps=1000, smoothing=0.0),
}
# of a clip: `every_window`, number of its class, group, Video
Real = namedtuple("Real", "windows label group video")


def check(samples, clips, training, args):
    """Raise UserError unless a network can learn the classes of Samples from Clips."""
    place = f"--data-path {args.data_path}"
    samples.check_classes(clips.classes, place)
    tested = {video.class_name for video in set(clips.videos) - set(training)}
    trained = {video.class_name for video in training}
    for name in clips.classes:
        paths = [video.path for video in clips.videos if video.class_name == name]
        count = len(set(map(unit_of, paths)))
        if count < 2 or len(clips.classes) < 2:
            raise UserError(
                f"{place}: {plural(len(clips.classes), 'class')}, {plural(count, 'group')} in "
                f"{name}; expected at least 2 of both, as each group is held out once"
            )
        if args.classifier_test == "val" and name not in tested:
            raise UserError(
                f"{place}: no validation video of class {name}; expected one; raise --val-fraction"
            )
        if name not in trained:
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
        return None
    torch.set_num_threads(1)  # another order of sums makes another classifier
    real = read_real(clips, args.num_workers, corrupt)
    training = set(training)
    trained = [one for one in real if one.video in training]
    tested = [one for one in real if not by_split or one.video not in training]
    check(
        samples=samples,
        clips=replace(clips, videos=[one.video for one in real]),
        training=[one.video for one in trained],
        args=args,
    )
    span = (clips.num_frames - 1) * clips.frame_interval[0] + 1
    settings = {
        "num_classes": len(clips.classes),
        "recipe": recipe,
        "steps": args.classifier_steps or recipe.steps,
        "seed": args.seed,
    }
    if not by_split:
        logits = leave_one_out(real, span, settings)
    if distributed.rank() != 0:
        return None
    network = train(trained, "of the training split", **settings)
    if by_split:
        logits = [logits_of(network, one.windows, span) for one in tested]
    paths = [one.video.path for one in tested]
    labels = [one.label for one in tested]
    of_real = summarize(logits, labels, paths)
    found = zip(paths, labels, of_real["found"], strict=True)
    of_real["wrong"] = [path for path, label, shown in found if shown != label]
    of_samples, sample_logits = classify_samples(samples, network, clips, real)
    values = {
        "accuracy": of_real["share"],
        "window_accuracy": of_real["windows"]["share"],
        "asked_class": of_samples["share"],
    }
    groups = sorted({one.group for one in real})
    how = f"each of {len(groups)} groups held out once"
    if by_split:
        of_real |= sharpness(logits)
        of_samples |= sharpness(sample_logits)
        values |= {name: of_samples[name] for name in ENTROPIES}
        how = f"trained on {len(trained)} others"
    lines = compare({f"real clips ({how})": of_real, "samples": of_samples})
    lines.append(
        "  static samples, which move less than any real clip of their class: "
        f"{len(of_samples['static'])}"
    )
    result = {
        "real": of_real,
        "samples": of_samples,
        "recipe": vars(recipe) | {"size": SIZE, "steps": settings["steps"]},
        "window": clips.num_frames,
        "classes": clips.classes,
        "groups": groups,
        "num_training": len(trained),
    }
    result["interval_units"], line = interval_units(real=paths, samples=samples.videos)
    return values, result, [*lines, line]


def classify_samples(samples, network, clips, real):
    """(what `summarize` returns of Samples, and which are static; the logits of their windows).

    Their windows are as long as the Clips; real: the Real of all videos.
    """
    window = clips.num_frames
    shown = []
    for clip in samples.clips:
        frames = torch.tensor(clip).permute(0, 3, 1, 2)
        shown.append(every_window(prepare(frames), window, interval=1))
    logits = [logits_of(network, windows, window) for windows in shown]
    asked = [clips.classes.index(name) for name in samples.names]
    summary = summarize(logits, asked, samples.videos)
    summary["static"] = find_static(shown, asked, real)
    return summary, logits


def read_real(clips, num_workers, corrupt):
    """The Real of the videos of Clips in the order of paths.

    Adds the paths of corrupt videos to the list `corrupt`.
    """

    def read(video):
        try:
            # a few frames at a time: those of a long video may not fit into memory
            grays = [prepare(clips.source.fit(part)) for part in clips.source.decode(video)]
        except UnreadableError:
            corrupt.append(video.path)
            return None
        return Real(
            windows=every_window(torch.cat(grays), clips.num_frames, clips.frame_interval[0]),
            label=clips.classes.index(video.class_name),
            group=unit_of(video.path),
            video=video,
        )

    videos = sorted(clips.videos, key=lambda video: video.path)
    real = Bar(
        in_threads(read, videos, max(1, num_workers)),
        total=len(videos),
        desc="real clips",
        unit="clip",
        leave=False,
    )
    return [one for one in real if one is not None]


class Classifier(nn.Module):
    """Logits (B, classes) of windows (B, T, SIZE, SIZE), values from 0 to 1.

    It sees gray levels and their changes.
    """

    def __init__(self, num_classes):
        super().__init__()
        layers = []
        for inside, outside in itertools.pairwise((2, 12, 24, 48)):
            layers.append(nn.Conv3d(inside, outside, 3, stride=2, padding=1))
            layers.append(nn.GroupNorm(4, outside))
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)
        # Not pooled over places: one arm or two is a question of left and right
        self.head = nn.Sequential(
            nn.Linear(48 * (SIZE // 8) ** 2, 32),
            nn.ReLU(),
            nn.Linear(32, num_classes),
        )

    def forward(self, x):
        gray = x - x.mean(dim=(1, 2, 3), keepdim=True)
        change = x.diff(dim=1, prepend=x[:, :1])
        both = torch.stack([2 * gray, 8 * change], dim=1)
        features = self.layers(both)  # (B, 48, T / 8, SIZE / 8, SIZE / 8)
        return self.head(features.mean(dim=2).flatten(1))


def prepare(frames):
    """Frames uint8 (T, 3, image_size, image_size) of a model -> a gray clip (T, SIZE, SIZE)."""
    frames = resize_and_crop(frames, SIZE).float()
    weights = torch.tensor([0.299, 0.587, 0.114])
    return torch.einsum("tchw,c->thw", frames, weights).round().byte()


def every_window(clip, window, interval):
    """All windows of a clip, one from each frame: (n, window, SIZE, SIZE), a view."""
    span = (window - 1) * interval + 1
    return clip.unfold(0, span, 1)[..., ::interval].movedim(-1, 1)


def windows_of(every, span):
    """Some of `every_window` of a clip, from its first to its last frame.

    Each overlaps the next by half or more. span: the frames from the start of a window to its end.
    """
    rest = len(every) - 1
    count = 1 + math.ceil(2 * rest / span)
    return every[torch.linspace(0, rest, count).round().long()]


def least_motion(windows):
    """The smallest share of moving pixels in any window of a clip."""
    moves = windows.amax(dim=1) - windows.amin(dim=1) > MOVES
    return moves.double().mean(dim=(1, 2)).min().item()


def find_static(samples, asked, real):
    """Indices of samples with a window, of `every_window`, that moves less than all their Real."""
    least = {}
    for one in real:
        if one.label in asked:
            motion = least_motion(one.windows)
            least[one.label] = min(motion, least.get(one.label, motion))
    rows = enumerate(zip(samples, asked, strict=True))
    return [index for index, (windows, label) in rows if least_motion(windows) < least[label]]


def random_windows(of_class, random, batch):
    """Windows (batch, window, SIZE, SIZE) from 0 to 1 and labels (batch,).

    of_class: {label: windows of each clip}.
    """
    # classes equally often
    classes = torch.randint(len(of_class), (batch,), generator=random)
    y = torch.tensor(list(of_class))[classes]
    draws = torch.rand(batch, 2, generator=random)
    windows = []
    for label, (which, when) in zip(y.tolist(), draws.tolist(), strict=True):
        clips = of_class[label]
        every = clips[int(which * len(clips))]
        windows.append(every[int(when * len(every))])
    return torch.stack(windows).float() / 255, y


def change(x, recipe, random):
    """Windows (B, T, SIZE, SIZE) in another place, size, contrast and light.

    Half of them mirrored.
    """
    B = len(x)
    zoom, right, down, contrast, light = 2 * torch.rand(5, B, generator=random) - 1
    mirror = 1 - 2 * torch.randint(2, (B,), generator=random)
    zero = torch.zeros(B)
    zoom = 1 + recipe.zoom * zoom
    right = 2 * recipe.shift * right
    down = 2 * recipe.shift * down
    rows = [mirror * zoom, zero, right, zero, zoom, down]
    matrix = torch.stack(rows, dim=1).view(B, 2, 3)
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
    of_class = {label: [] for label in sorted({one.label for one in real})}
    for one in real:
        of_class[one.label].append(one.windows)
    for step in range(steps):
        done = step / steps
        warm_up = min(1, 10 * done + 0.1)  # for a tenth of the steps, then a cosine to 0
        lr = recipe.lr * warm_up * math.cos(done * math.pi / 2) ** 2
        optimizer.param_groups[0]["lr"] = lr
        random = generator(seed, PURPOSE, name, step)
        x, y = random_windows(of_class, random, recipe.batch)
        if hasattr(recipe, "zoom"):
            x = change(x, recipe, random)
        optimizer.zero_grad()
        loss = F.cross_entropy(network(x), y, label_smoothing=recipe.smoothing)
        loss.backward()
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
    of_rank = [names[number] for number in distributed.own_indices(len(names))]
    rows = []
    for held_out in Bar(
        of_rank,
        desc="groups held out",
        unit="group",
        leave=False,
    ):
        others = [one for one in real if one.group != held_out]
        network = train(others, f"without {held_out}", **settings)
        for index, one in enumerate(real):
            if one.group == held_out:
                rows.append((index, logits_of(network, one.windows, span)))
    return distributed.gather_in_order(rows)[0]


def summarize(logits, labels, videos=()):
    """The share of clips that are classified as their label, a plain dict.

    logits: (n, classes) of each clip's windows. videos: those of the clips. windows: the same share
    of single windows. confusion: a row per label, a column per class that the clips got.
    """
    found = [of_clip.mean(dim=0).argmax().item() for of_clip in logits]
    counts = Counter(zip(labels, found, strict=True))
    every = range(logits[0].shape[1])
    hits = []
    window_shares = []
    for of_clip, label, own in zip(logits, labels, found, strict=True):
        hits.append(own == label)
        window_shares.append((of_clip.argmax(dim=1) == label).double().mean().item())
    window_share, window_interval = share(window_shares, videos)
    _, interval = share(hits, videos)
    return {
        "clips": len(labels),
        "right": sum(hits),
        "share": sum(hits) / len(labels),
        "interval95": interval,
        "windows": {
            "count": sum(map(len, logits)),
            "share": window_share,
            "interval95": window_interval,
        },
        "confusion": [[counts[row, column] for column in every] for row in every],
        "found": found,
    }


def sharpness(logits):
    """The inception score and the entropies in nats of clips, from logits (n, classes) of windows.

    p(y|x) is the softmax of a clip's mean logits, p(y) its mean over the clips. IS = exp(E
    KL(p(y|x) || p(y))), which equals exp(H(y) - H(y|x)): at most the number of classes, if they are
    equally frequent.
    """
    p = torch.stack([of_clip.mean(dim=0) for of_clip in logits]).double().softmax(dim=1)
    given = torch.special.entr(p).sum(dim=1).mean().item()
    overall = torch.special.entr(p.mean(dim=0, keepdim=True)).sum(dim=1).item()
    scores = math.exp(overall - given), given, overall
    return dict(zip(ENTROPIES, scores, strict=True))


def compare(summaries):
    """Lines: how {title: clips} are classified, real clips first, and what to doubt."""
    real, *_ = summaries.values()
    names = [name for name in ENTROPIES if name in real]
    rows = [["", "wrong", "clips", "accuracy, 95%", *names]]
    for title, summary in summaries.items():
        row = [
            title,
            str(summary["clips"] - summary["right"]),
            str(summary["clips"]),
            cell(summary, "share", digits=4, interval="interval95"),
        ]
        rows.append(row + [f"{summary[name]:.4f}" for name in names])
    lines = table(rows)
    if names and real["share"] < ENOUGH:
        lines.append(
            f"  note: below {ENOUGH:.1%} on real clips, errors of samples may be the classifier's; "
            "raise --classifier-steps"
        )
    return lines
