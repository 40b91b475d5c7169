"""Moving Shapes: a strict tracker of one object, for straight and for bouncing motion.

A lax tracker follows local motion and finds a direction even in a clip of five objects. Here a clip
has a direction only if *every* frame shows the same single compact object of one color, and its
centroid moves along a straight line at a constant speed. All other clips count as wrong. Bouncing
objects (make_moving_shapes.py --bounce) are tracked in windows, for any time: is it one object to
the end, how fast is it, does it turn at the borders only?

The truth is the shapes.json of the data set, scaled to the clip, never the tracker's own
measurement. Scores of real clips show the ceiling. At 16 px it is: all directions and shapes right,
speed ratio 1.00, area ratio 1.02.
"""

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from runtime.cli import UserError, plural
from runtime.untrusted import read_json
from scoring.stats import (
    cell,
    gather,
    interval_units,
    mean_and_error,
    mean_interval,
    share,
    shares,
    table,
)

# Lengths are in px of a frame 16 px high, and scale with it. Shares are of the object's brightness
# or area. They tolerate noise (8 gray levels), blur (1 px) and some jitter in generated clips, and
# no more.
# gray levels (Euclidean in RGB) from the background; the data set's colors have over 180
MIN_CONTRAST = 60
FLOOR = 0.2  # of full brightness, about 50 gray levels: weaker pixels are noise, not an object
# of the brightness may be outside a disc of 1.5 radii + 1 px: 2.6 px of 26, no second object
MAX_STRAY = 0.1
# second moment over that of a disc of equal area: a triangle has 1.3, blurred 1.5; two discs 2
MAX_SPREAD = 1.7
# correlation with the best shape: real clips 0.99, noisy ones 0.97; two shapes half overlapping 0.9
MIN_MATCH = 0.9
# degrees between a frame's color and the clip's; two of the default colors are at least 39 apart
MAX_ANGLE = 10
# of the brightness may differ by more than twice that angle, as colors bleed at edges
MAX_OFF_COLOR = 0.25
# between a frame's area and the median: objects that fade, split or merge exceed it
MAX_AREA_FACTOR = 1.5
MIN_TRAVEL = 0.25  # px from the first frame to the last; 2 frames at 25 fps still exceed it
# px from steady straight motion, and at most a quarter of the travel: jumps, curves, stops
MAX_OFF_LINE = 0.5
MAX_SLANT = 0.25  # motion across the direction over motion along it: 14 degrees
WINDOW = 16  # frames of a bouncing object that are tracked together
# px between a turn and the border's turning point; also the shortest way back that counts as a turn
NEAR = 1.0
ACROSS = 0.5  # px, standard deviation of a bouncing object's motion across its axis

SHAPES = ("Circle", "Square", "Triangle")
# by axis; y goes down
AXES = ("Horizontal", "Vertical")
DIRECTIONS = (("Left", "Right"), ("Up", "Down"))
TRACKED = {  # values of `summarize`
    "direction_accuracy": "direction right",
    "shape_accuracy": "shape right",
    "both_accuracy": "both right",
    "speed_ratio": "speed / true speed",
    "area_ratio": "area / true area",
}
FOLLOWED = {  # values of `summarize_bounces`
    "one_object": "one object, color and shape",
    "turns_right": "turns at the borders only",
    "speed_low": "speed / true speed of windows, 5%",
    "speed_median": "median",
    "speed_high": "95%",
}


def score_shapes(generated, real, truth):
    """Score two streams of clips (see sources.py) against the Truth."""

    def measure(clip, name, time_scale, _):
        expected = truth(name, clip.shape[1], time_scale)
        if truth.bounces:
            return follow(clip, expected)
        return track(clip), expected

    summarize = summarize_bounces if truth.bounces else summarize_tracks
    titles = FOLLOWED if truth.bounces else TRACKED
    generated = gather(generated, measure)
    real = gather(real, measure)
    result = {"generated": summarize(*generated), "real": summarize(*real)}
    result["interval_units"], line = interval_units(generated=generated[-1], real=real[-1])
    values = {name: result["generated"][name] for name in titles}
    return values, result, [*result_lines(result, titles), line]


def result_lines(result, titles):
    """Lines to print: both summaries of a result, and why generated clips were refused."""
    generated = result["generated"]
    real = result["real"]
    rows = [
        ("", "generated, 95%", "real, 95%"),
        ("clips", str(generated["clips"]), str(real["clips"])),
    ]
    for name, title in titles.items():
        interval = f"{name.removesuffix('_accuracy')}_interval95"
        cells = [cell(summary, name, interval=interval) for summary in (generated, real)]
        rows.append((title, *cells))
    lines = table(rows)
    for reason, count in generated["refused"].items():
        lines.append(f"  refused: {reason}, {plural(count, 'clip')}")
    return lines


# What a clip shows, and the truth -----------------------------------------------------------------


class Track(NamedTuple):
    """What a clip shows, or should show.

    None: not found; `reason` says why there is no direction.
    """

    direction: str | None = None
    shape: str | None = None
    speed: float | None = None  # px per frame along the direction
    area: float | None = None  # px^2
    color: tuple[int, int, int] | None = None
    reason: str = ""


class Bounce(NamedTuple):
    """What a clip of a bouncing object should show; lengths are in px of the clip."""

    shape: str
    axis: int  # 0: horizontal, 1: vertical
    speed: float  # px per frame
    # where the centroids turn: least and most, as objects have different sizes
    low: tuple[float, float]
    high: tuple[float, float]


class Truth:
    """The truth of each class in the shapes.json of a Moving Shapes data set. Raises UserError."""

    def __init__(self, data_path):
        self.path = Path(data_path, "shapes.json")
        try:
            shapes = read_json(self.path)
            self.size = shapes["size"]
            self.videos = list(shapes["videos"].values())
            self.bounces = bool(shapes.get("settings", {}).get("bounce"))
            self.classes = {video["class"] for video in self.videos}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path}: not the shapes.json of a Moving Shapes data set ({error!r}); make "
                "one with datasets/make_moving_shapes.py"
            ) from error

    def __call__(self, class_name, height, time_scale):
        """What clips of a class, of this height in px, should show: a Track, or a Bounce."""
        videos = [video for video in self.videos if video["class"] == class_name]
        scale = height / self.size
        if class_name not in self.classes:
            raise UserError(
                f"{self.path}: no class {class_name}; pass the data set of the training as "
                "--data-path"
            )

        def mean(key):
            return float(np.mean([video[key] for video in videos]))

        def span(key):
            of_videos = [scale * video[key] for video in videos]
            return min(of_videos), max(of_videos)

        first = videos[0]
        speed = scale * mean("speed") * time_scale
        if self.bounces:
            return Bounce(
                shape=first["shape"],
                axis=AXES.index(first["axis"]),
                speed=speed,
                low=span("low"),
                high=span("high"),
            )
        return Track(
            direction=first["direction"],
            shape=first["shape"],
            speed=speed,
            area=mean("area") * scale**2,
        )

    def track_pair(self, predicted, real, class_name, time_scale):
        """(Track of a predicted clip, Track of the real clip, what both should show)."""
        return track(predicted), track(real), self(class_name, real.shape[1], time_scale)

    @staticmethod
    def summarize_pairs(pairs, videos):
        """{"motion": of the predicted clips, "motion_real": of the real ones}, of `track_pair`s."""
        tracks, real_tracks, truths = zip(*pairs, strict=True)
        motion = summarize_tracks(tracks, truths, videos)
        motion["appearance_kept"] = sum(map(keeps_appearance, tracks, real_tracks)) / len(pairs)
        return {"motion": motion, "motion_real": summarize_tracks(real_tracks, truths, videos)}

    @staticmethod
    def pair_lines(result):
        """Lines to print, of a result with what `summarize_pairs` returns."""
        both = {"generated": result["motion"], "real": result["motion_real"]}
        kept = result["motion"]["appearance_kept"]
        return [
            *result_lines(both, TRACKED),
            f"  shape and color of the real clip kept: {kept:.3f}",
        ]


def find_truth(args, samples, classes):
    """The Truth for --metric motion, and for prediction of straight motion; else None.

    Raises UserError if Samples are too short, or if a class of theirs or of real clips (`classes`)
    has no truth.
    """
    exists = Path(args.data_path, "shapes.json").exists()
    if args.metric == "motion" and not exists:
        raise UserError(
            f"--metric motion: is for Moving Shapes, but --data-path {args.data_path} has no "
            "shapes.json; choose consistency, nearest or fvd"
        )
    if not exists:
        return None
    truth = Truth(args.data_path)
    if truth.bounces and args.metric == "prediction":
        return None
    if truth.bounces and samples.num_frames < WINDOW:
        raise UserError(
            f"{samples.place}: bouncing shapes need at least {WINDOW} frames, got "
            f"{samples.num_frames}"
        )
    for name in {*classes, *samples.names} - {None}:
        truth(name, samples.image_size, samples.time_scale)
    return truth


# The tracker --------------------------------------------------------------------------------------


def track(clip):
    """The Track of one clip, uint8 (T >= 2, H, W = H, 3)."""
    shown = Track()
    try:
        centers, area, shape, color = look(clip)
        color = color.round().astype(int).tolist()
        shown = Track(
            shape=shape,
            area=area,
            color=tuple(color),
        )
        direction, speed = fit_motion(centers, clip.shape[1] / 16)
    except ValueError as reason:
        return shown._replace(reason=str(reason))
    return shown._replace(direction=direction, speed=speed)


def look(clip):
    """(centroids (T, 2) as x, y, area, shape, color (3,)) of the object of a clip (T, H, H, 3).

    Averages large clips down to 16 ... 31 px: thresholds then fit, and colors that a codec smeared
    meet in one pixel. Raises ValueError with the reason if there is no such object.
    """
    height = clip.shape[1]
    size = height // max(1, height // 16)
    frames = torch.from_numpy(np.array(clip)).permute(0, 3, 1, 2).float()  # (T, C, H, W)
    frames = F.interpolate(frames, size=(size, size), mode="area")
    signal, bright, color = separate(frames.permute(0, 2, 3, 1).double().numpy())
    centers, area = find_object(signal, bright, size / 16)
    shape = recognize(signal, centers, area)
    factor = height / size
    return centers * factor, area * factor**2, shape, color


def separate(clip):
    """Split a clip, float (T, H, W, 3), into background and object: (signal, bright, color (3,)).

    signal (T, H, W): 0 on the background, 1 on an object of the clip's color; bright (T, H, W): the
    same for any color, but 0 below FLOOR. Raises ValueError unless something of one color stands
    out in every frame.
    """
    background = np.median(clip, axis=(0, 1, 2))
    clip = clip - background
    contrast = np.linalg.norm(clip, axis=-1)
    peak = contrast.max((1, 2)).mean()
    if peak < MIN_CONTRAST:
        raise ValueError("nothing stands out")
    color = clip[contrast > 0.9 * peak].mean(0)
    full = np.linalg.norm(color)
    if full < MIN_CONTRAST:  # opposite colors cancel
        raise ValueError("more than one color")
    bright = np.where(contrast > FLOOR * full, contrast / full, 0)
    masses = bright.sum((1, 2))
    if masses.min() == 0:
        raise ValueError("the object vanishes")

    def angle(colors):  # degrees from the clip's color
        norm = np.maximum(np.linalg.norm(colors, axis=-1), 1e-9)
        cosine = colors @ color / full / norm
        return np.degrees(np.arccos(np.clip(cosine, -1, 1)))

    of_frames = np.einsum("thw,thwc->tc", bright, clip)
    is_off = angle(clip) > 2 * MAX_ANGLE
    off = (bright * is_off).sum((1, 2))
    if (angle(of_frames) > MAX_ANGLE).any() or (off > MAX_OFF_COLOR * masses).any():
        raise ValueError("more than one color")
    return clip @ color / full**2, bright, color + background


def find_object(signal, bright, unit):
    """(centers (T, 2) as x, y in px, area in px^2) of the one object.

    unit: 1 px of a frame 16 px high. Raises ValueError unless every frame shows one compact object
    of about the same area.
    """
    ys, xs = np.mgrid[: signal.shape[1], : signal.shape[2]] + 0.5

    def centroids(weight):
        x = (weight * xs).sum((1, 2))
        y = (weight * ys).sum((1, 2))
        return np.stack([x, y], 1) / weight.sum((1, 2))[:, None]

    def squares(centers):  # squared distances (T, H, W)
        x, y = centers.T[:, :, None, None]
        return (xs - x) ** 2 + (ys - y) ** 2

    masses = bright.sum((1, 2))
    mass = np.median(masses)
    if mass > signal[0].size / 4:
        raise ValueError("too much is bright for one object")
    radius = 1.5 * math.sqrt(mass / math.pi) + unit
    disc = squares(centroids(bright)) < radius**2
    stray = (bright * ~disc).sum((1, 2))
    if (stray > MAX_STRAY * masses).any():
        raise ValueError("more than one object")
    weight = signal * disc  # includes weak pixels, so blur and noise hardly change the sum
    areas = weight.sum((1, 2))
    area = float(np.median(areas))
    if areas.min() * MAX_AREA_FACTOR < area or areas.max() > area * MAX_AREA_FACTOR:
        raise ValueError("the object's area changes")
    centers = centroids(weight)
    moment = (weight * squares(centers)).sum((1, 2)) / areas  # area / 2 pi for a disc
    if (moment * 2 * math.pi > MAX_SPREAD * areas).any():
        raise ValueError("the object is not compact")
    return centers, area


def inside(shape, x, y):
    """Whether a shape of area 1 contains points (x, y), relative to its centroid."""
    if shape == "Circle":
        return x**2 + y**2 < 1 / math.pi
    if shape == "Square":
        return np.maximum(abs(x), abs(y)) < 0.5
    height = math.sqrt(2)  # and base
    return (y < height / 3) & (abs(x) < (y + height * 2 / 3) / 2)


def recognize(signal, centers, area):
    """The shape whose image at the centers, sharp or blurred, best fits signal (T, H, W).

    ValueError: none does.
    """
    sub = 8  # points per px and axis
    _, H, W = signal.shape
    xs = (np.arange(W * sub) + 0.5) / sub
    ys = (np.arange(H * sub) + 0.5) / sub
    side = math.sqrt(area)
    x = (xs - centers[:, :1])[:, None, :] / side
    y = (ys - centers[:, 1:])[:, :, None] / side
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    blur = row.outer(row)[None, None]  # standard deviation 0.7 px

    def match(shape):
        fine = inside(shape, x, y).astype(np.float32)  # (T, 8 H, 8 W)
        sharp = F.avg_pool2d(torch.from_numpy(fine)[:, None], sub)
        soft = F.conv2d(sharp, blur, padding=1)
        softer = F.conv2d(soft, blur, padding=1)
        correlations = []
        for image in (sharp, soft, softer):
            matrix = np.corrcoef(image.flatten().numpy(), signal.ravel())
            correlations.append(matrix[0, 1])
        return max(correlations)

    matches = {shape: match(shape) for shape in SHAPES}
    best = max(matches, key=matches.get)
    if matches[best] < MIN_MATCH:
        raise ValueError("the object has no known shape")
    return best


def fit_motion(centers, unit):
    """(direction, speed in px per frame) of centers (T, 2).

    Raises ValueError unless motion is straight and steady.
    """
    steps = len(centers) - 1
    time = np.arange(len(centers)) - steps / 2
    velocity = time @ centers / (time @ time)  # least squares
    axis = int(abs(velocity[1]) > abs(velocity[0]))
    speed = abs(velocity[axis])
    across = abs(velocity[1 - axis])
    travel = speed * steps
    if travel < MIN_TRAVEL * unit:
        raise ValueError("the object stands still")
    residuals = centers - centers.mean(0) - time[:, None] * velocity
    off_line = np.linalg.norm(residuals, axis=1).max()
    if across > MAX_SLANT * speed or off_line > min(MAX_OFF_LINE * unit, travel / 4):
        raise ValueError("the motion is not straight and steady")
    return DIRECTIONS[axis][int(velocity[axis] > 0)], float(speed)


def summarize_tracks(tracks, expected, videos=()):
    """A plain dict for JSON: at least one Track, each scored against the true one.

    videos: those of the clips. Accuracies are shares of all clips. Speed and area ratios (found
    over true) are means over clips of right direction.
    """
    pairs = list(zip(tracks, expected, strict=True))
    hits = {
        "direction": [found.direction == true.direction for found, true in pairs],
        "shape": [found.shape == true.shape for found, true in pairs],
    }
    hits["both"] = [*map(all, zip(*hits.values(), strict=True))]
    right = list(itertools.compress(pairs, hits["direction"]))
    videos_of_right = list(itertools.compress(videos, hits["direction"]))
    summary = {"clips": len(pairs), "right": len(right)}
    for name, of_clips in hits.items():
        summary[f"{name}_accuracy"], summary[f"{name}_interval95"] = share(of_clips, videos)
    ratios = {
        "speed_ratio": [found.speed / true.speed for found, true in right],
        "area_ratio": [found.area / true.area for found, true in right],
    }
    for name, of_clips in ratios.items():
        summary[name], _ = mean_and_error(of_clips)
        summary[f"{name}_interval95"] = mean_interval(of_clips, videos_of_right)
    summary["refused"] = count_reasons(track.reason for track in tracks if track.direction is None)
    return summary


def count_reasons(reasons):
    """{reason: number of clips}, the most frequent first."""
    return dict(Counter(sorted(reasons)).most_common())


def keeps_appearance(found, real):
    """Whether the Track of a predicted clip has the shape and color of the real clip's Track."""
    if None in (found.shape, found.color, real.color) or found.shape != real.shape:
        return False
    return bool(np.linalg.norm(np.subtract(found.color, real.color)) < MIN_CONTRAST)


# Bouncing motion ----------------------------------------------------------------------------------


def follow(clip, truth):
    """(the first window that loses the object and why, or None; windows' speeds / true speed; are
    the turns right?)
    """
    path = []
    speeds = []
    first = None
    # the last window ends with the clip, so it may overlap the one before
    starts = [*range(0, len(clip) - WINDOW, WINDOW), len(clip) - WINDOW]
    for number, start in enumerate(starts):
        try:
            centers, _, shape, color = look(clip[start : start + WINDOW])
            first = color if first is None else first
            if shape != truth.shape or np.linalg.norm(color - first) > MIN_CONTRAST:
                raise ValueError("another object")
        except ValueError as reason:
            return {"window": number, "reason": str(reason)}, speeds, False
        path.append(centers[number * WINDOW - start :])
        steps = np.abs(np.diff(centers[:, truth.axis]))
        speeds.append(float(np.median(steps)) / truth.speed)
    return None, speeds, turns_are_right(np.concatenate(path), truth, clip.shape[1] / 16)


def turns_are_right(centers, truth, unit):
    """Whether an object with centroids (T, 2) stays on its axis between the borders.

    It must turn only at the borders.
    """
    from scipy.signal import find_peaks  # takes a while to load

    path = centers[:, truth.axis]
    near = NEAR * unit
    is_right = truth.low[0] - near <= path.min() and path.max() <= truth.high[1] + near
    for sign, (least, most) in ((1, truth.high), (-1, truth.low)):
        peaks, _ = find_peaks(sign * path, prominence=near)  # less is jitter
        turns = path[peaks]
        is_right = is_right and (turns >= least - near).all() and (turns <= most + near).all()
    across = centers[:, 1 - truth.axis].std()
    return bool(is_right and across <= ACROSS * unit)


def summarize_bounces(lost, speeds, turns, videos):
    """A plain dict for JSON, of the columns of `follow`.

    Speeds: 5%, 50% and 95% quantiles over all windows.
    """
    hits = {"one_object": [not entry for entry in lost], "turns_right": turns}
    summary = {"clips": len(lost)} | shares(hits, videos)
    every = [*itertools.chain(*speeds)]
    for name, part in (("speed_low", 0.05), ("speed_median", 0.5), ("speed_high", 0.95)):
        summary[name] = np.quantile(every, part).item() if every else None
    refused = [entry for entry in lost if entry]
    summary["lost_in_window"] = [entry["window"] for entry in refused]
    summary["refused"] = count_reasons(entry["reason"] for entry in refused)
    return summary
