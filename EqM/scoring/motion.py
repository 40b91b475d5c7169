"""Direction, shape, speed and area in Moving Shapes clips: a strict centroid tracker, scored against the truth.

Strict, because a lax tracker follows local motion and finds a direction even in a clip of five objects. Here a clip
has a direction only if *every* frame shows the same single compact object of one color, and its centroid moves along
a straight line at a constant speed. Any other clip has none and counts as wrong.

The truth comes from the shapes.json of the data set, scaled to the clip: never from the tracker's own measurement.
Real clips are scored beside generated ones and show the ceiling (16 px: all directions and shapes right, speed ratio
1.00, area ratio 1.02, as the brightest pixels of an object still hold a little background).
"""

import functools
import json
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from runtime import distributed
from runtime.cli import UserError, say
from runtime.distributed import rank

# Lengths are in px of a frame 16 px high and grow with it; shares are of the object's brightness or area.
# They tolerate noise (8 gray levels), blur (1 px) and some jitter in generated clips, and no more.
MIN_CONTRAST = 60  # gray levels (Euclidean in RGB) from the background; the data set's colors have over 180
FLOOR = 0.2  # of full brightness, about 50 gray levels: what is weaker is noise, not an object
MAX_STRAY = 0.1  # of the brightness may lie outside a disc of 1.5 radii + 1 px: 2.6 px of 26, no second object
MAX_SPREAD = 1.7  # second moment over that of a disc of equal area: a triangle has 1.3, blurred 1.5; two discs 2
MIN_MATCH = 0.9  # correlation with the best shape: real clips 0.99, noisy ones 0.97; two shapes half overlapping 0.9
MAX_ANGLE = 10  # degrees between a frame's color and the clip's; two of the default colors are at least 39 apart
MAX_OFF_COLOR = 0.25  # of the brightness may be more than twice that off, as colors bleed at edges
MAX_AREA_FACTOR = 1.5  # between a frame's area and the median: objects that fade, split or merge exceed it
MIN_TRAVEL = 0.25  # px from the first frame to the last; 2 frames at 25 fps still exceed it
MAX_OFF_LINE = 0.5  # px from steady straight motion, and at most a quarter of the travel: jumps, curves, stops
MAX_SLANT = 0.25  # motion across the direction over motion along it: 14 degrees

SHAPES = ("Circle", "Square", "Triangle")
DIRECTIONS = (("Left", "Right"), ("Up", "Down"))  # per axis; y goes down


def score_motion(generated, real, shapes_json):
    """Score two streams of clips (see sources.py) against the truth in the file shapes_json.

    Returns (values, result), plain dicts for JSON, on rank 0 and (None, None) elsewhere.
    """
    truth_of = functools.cache(functools.partial(read_truth, shapes_json))
    result = {"generated": score_stream(generated, truth_of), "real": score_stream(real, truth_of)}
    if rank() != 0:
        return None, None
    for line in result_lines(result["generated"], result["real"]):
        say(line)
    names = "direction_accuracy", "shape_accuracy", "speed_ratio", "area_ratio"
    return {name: result["generated"][name] for name in names}, result


def score_stream(stream, truth_of):
    """`summarize` and `confusion` of the clips of all ranks, on every rank."""
    rows = []
    for indices, clips, names, time_scales in stream:
        for index, clip, name, time_scale in zip(indices, clips.cpu().numpy(), names, time_scales, strict=True):
            rows.append((index, track(clip), truth_of(name, clip.shape[1], time_scale)))
    tracks, expected = distributed.gather_in_order(rows)
    return summarize(tracks, expected) | {"confusion": confusion(tracks, expected)}


# ----------------------------------------------------------------------------------------------------------------------
# The tracker


@dataclass(frozen=True)
class Track:
    """What a clip shows; None where nothing was found, and `reason` says why there is no direction."""

    direction: str | None = None
    shape: str | None = None
    speed: float | None = None  # px per frame along the direction
    area: float | None = None  # px^2
    color: tuple[int, int, int] | None = None
    reason: str = ""


@dataclass(frozen=True)
class Truth:
    """What a clip of a class should show."""

    direction: str
    shape: str
    speed: float  # px per frame
    area: float  # px^2


def track(clip):
    """The Track of one clip, uint8 (T >= 2, H, W = H, 3).

    A clip of 32 px or more is averaged down to 16 ... 31 px first, so that the thresholds mean the same, and colors
    that a video codec smeared over neighboring pixels end up in one.
    """
    frames, factor = prepare(clip)
    unit, found = frames.shape[1] / 16, {}
    try:
        signal, bright, color = separate(frames)
        centers, area = find_object(signal, bright, unit)
        shape = recognize(signal, centers, area)
        rgb = tuple(color.round().astype(int).tolist())
        found = {"shape": shape, "area": area * factor**2, "color": rgb}
        direction, speed = fit_motion(centers, unit)
    except ValueError as reason:
        return Track(**found, reason=str(reason))
    return Track(direction, speed=speed * factor, **found)


def prepare(clip):
    """(frames float64 (T, h, h, 3) of a clip uint8 (T, H, H, 3), averaged down to h = 16 ... 31 px; H / h)."""
    height = clip.shape[1]
    size = height // max(1, height // 16)
    frames = torch.from_numpy(np.array(clip)).permute(0, 3, 1, 2).float()  # (T, C, H, W)
    frames = F.interpolate(frames, size=(size, size), mode="area").permute(0, 2, 3, 1).double().numpy()
    return frames, height / size


def separate(clip):
    """Split clip, float (T, H, W, 3), into background and object: (signal, bright, color (3,)).

    signal (T, H, W) is 0 on the background, 1 on an object of the clip's color, and between on pixels that are partly
    covered; bright (T, H, W) is the same for any color, but 0 below FLOOR. Raises ValueError with the reason unless
    something stands out in every frame, all in one color.
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
        cosine = colors @ color / full / np.maximum(np.linalg.norm(colors, axis=-1), 1e-9)
        return np.degrees(np.arccos(np.clip(cosine, -1, 1)))

    of_frames = np.einsum("thw,thwc->tc", bright, clip)
    off = (bright * (angle(clip) > 2 * MAX_ANGLE)).sum((1, 2))
    if (angle(of_frames) > MAX_ANGLE).any() or (off > MAX_OFF_COLOR * masses).any():
        raise ValueError("more than one color")
    return clip @ color / full**2, bright, color + background


def find_object(signal, bright, unit):
    """(centers (T, 2) as x, y in px, area in px^2) of the one object; unit is 1 px of a frame 16 px high.

    Raises ValueError with the reason unless every frame shows one compact object of about the same area.
    """
    ys, xs = np.mgrid[: signal.shape[1], : signal.shape[2]] + 0.5

    def centroids(weight):
        return np.stack([(weight * xs).sum((1, 2)), (weight * ys).sum((1, 2))], 1) / weight.sum((1, 2))[:, None]

    def squares(centers):  # squared distances (T, H, W)
        return (xs - centers[:, 0, None, None]) ** 2 + (ys - centers[:, 1, None, None]) ** 2

    masses = bright.sum((1, 2))
    if np.median(masses) > signal[0].size / 4:
        raise ValueError("too much is bright for one object")
    disc = squares(centroids(bright)) < (1.5 * math.sqrt(np.median(masses) / math.pi) + unit) ** 2
    if ((bright * ~disc).sum((1, 2)) > MAX_STRAY * masses).any():
        raise ValueError("more than one object")
    weight = signal * disc  # with its weak pixels, so that blur and noise hardly change the sum
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
    """Whether points, relative to the centroid of a shape of area 1, lie in it."""
    if shape == "Circle":
        return x**2 + y**2 < 1 / math.pi
    if shape == "Square":
        return np.maximum(abs(x), abs(y)) < 0.5
    height = math.sqrt(2)  # and base
    return (y < height / 3) & (abs(x) < (y + height * 2 / 3) / 2)


def recognize(signal, centers, area):
    """The shape whose image at the centers, sharp or blurred, correlates best with signal (T, H, W).

    Raises ValueError if no correlation reaches MIN_MATCH.
    """
    sub = 8  # points per px and axis
    ys, xs = ((np.arange(n * sub) + 0.5) / sub for n in signal.shape[1:])
    x = (xs - centers[:, :1])[:, None, :] / math.sqrt(area)
    y = (ys - centers[:, 1:])[:, :, None] / math.sqrt(area)
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    blur = row.outer(row)[None, None]  # standard deviation 0.7 px

    def match(shape):
        fine = torch.from_numpy(inside(shape, x, y).astype(np.float32))[:, None]  # (T, 1, 8 H, 8 W)
        sharp = F.avg_pool2d(fine, sub)
        soft = F.conv2d(sharp, blur, padding=1)
        images = sharp, soft, F.conv2d(soft, blur, padding=1)
        return max(np.corrcoef(image.flatten().numpy(), signal.ravel())[0, 1] for image in images)

    matches = {shape: match(shape) for shape in SHAPES}
    best = max(matches, key=matches.get)
    if matches[best] < MIN_MATCH:
        raise ValueError("the object has no known shape")
    return best


def fit_motion(centers, unit):
    """(direction, speed in px per frame) of centers (T, 2).

    Raises ValueError with the reason unless the motion is straight and steady.
    """
    time = np.arange(len(centers)) - (len(centers) - 1) / 2
    velocity = time @ centers / (time @ time)  # least squares
    axis = int(abs(velocity[1]) > abs(velocity[0]))
    speed, across = abs(velocity[axis]), abs(velocity[1 - axis])
    travel = speed * (len(centers) - 1)
    if travel < MIN_TRAVEL * unit:
        raise ValueError("the object stands still")
    off_line = np.linalg.norm(centers - centers.mean(0) - time[:, None] * velocity, axis=1).max()
    if across > MAX_SLANT * speed or off_line > min(MAX_OFF_LINE * unit, travel / 4):
        raise ValueError("the motion is not straight and steady")
    return DIRECTIONS[axis][int(velocity[axis] > 0)], float(speed)


# ----------------------------------------------------------------------------------------------------------------------
# The truth, and the scores


def read_class(path, class_name):
    """(size of the frames in px, entries of the videos) of a class in the shapes.json at `path`.

    Raises UserError if there is no such file or class.
    """
    try:
        with open(path) as file:
            shapes = json.load(file)
        videos = [video for video in shapes["videos"].values() if video["class"] == class_name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the shapes.json of a Moving Shapes data set ({error!r}); "
                        "make one with datasets/make_moving_shapes.py") from None  # fmt: skip
    if not videos:
        raise UserError(f"{path}: no class {class_name}; --data-path must be the data set of the model's training")
    return shapes["size"], videos


def read_truth(path, class_name, height, time_scale):
    """The Truth of a class in the shapes.json at `path`, for clips of this height in px and this time_scale.

    Speed and area are means over the videos of the class. Raises UserError if there is no such file or class.
    """
    size, videos = read_class(path, class_name)
    scale = height / size
    speed, area = (float(np.mean([video[key] for video in videos])) for key in ("speed", "area"))
    return Truth(videos[0]["direction"], videos[0]["shape"], speed * scale * time_scale, area * scale**2)


def wilson(hits, count):
    """The 95% confidence interval [low, high] of a share (Wilson, 1927), valid near 0 and 1 and for few clips too."""
    z = 1.96
    middle = (hits + z**2 / 2) / (count + z**2)
    half = z / (count + z**2) * math.sqrt(hits * (count - hits) / count + z**2 / 4)
    return [max(0.0, middle - half), min(1.0, middle + half)]  # rounding may exceed 0 or 1


def mean_and_error(values):
    """The mean of values (None if there are none) and its standard error (None for fewer than 2)."""
    mean = float(np.mean(values)) if len(values) else None
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def summarize(tracks, expected):
    """Score at least one Track, each against its Truth; a plain dict for JSON.

    Accuracies are shares of all clips. Speed and area ratios (found over true) are means over the `right` clips, those
    whose direction is right, and None if there are none.
    """
    pairs = list(zip(tracks, expected, strict=True))
    right = [(found, true) for found, true in pairs if found.direction == true.direction]
    shapes = sum(found.shape == true.shape for found, true in pairs)
    speed, speed_error = mean_and_error([found.speed / true.speed for found, true in right])
    area, area_error = mean_and_error([found.area / true.area for found, true in right])

    def interval(value, error):
        return None if error is None else [value - 1.96 * error, value + 1.96 * error]

    return {
        "clips": len(pairs),
        "right": len(right),
        "direction_accuracy": len(right) / len(pairs),
        "direction_interval95": wilson(len(right), len(pairs)),
        "shape_accuracy": shapes / len(pairs),
        "shape_interval95": wilson(shapes, len(pairs)),
        "speed_ratio": speed,
        "speed_ratio_standard_error": speed_error,
        "speed_ratio_interval95": interval(speed, speed_error),
        "area_ratio": area,
        "area_ratio_standard_error": area_error,
        "area_ratio_interval95": interval(area, area_error),
    }


def confusion(tracks, expected):
    """Confusion matrices, {"direction" or "shape": {asked: {found or "none": number of clips}}}, and why clips have no
    direction, {"refused": {reason: number of clips}}; a plain dict for JSON.
    """
    directions, counted = [name for axis in DIRECTIONS for name in axis], {}
    for what, names in (("direction", directions), ("shape", list(SHAPES))):
        counts = {asked: dict.fromkeys([*names, "none"], 0) for asked in names}
        for found, true in zip(tracks, expected, strict=True):
            counts[getattr(true, what)][getattr(found, what) or "none"] += 1
        counted[what] = {asked: row for asked, row in counts.items() if any(row.values())}
    reasons = [found.reason for found in tracks if found.direction is None]
    return counted | {"refused": {reason: reasons.count(reason) for reason in sorted(set(reasons))}}


ROWS = {  # of result_lines: value of `summarize` -> title, its interval
    "direction_accuracy": ("direction right", "direction_interval95"),
    "shape_accuracy": ("shape right", "shape_interval95"),
    "speed_ratio": ("speed / true speed", "speed_ratio_interval95"),
    "area_ratio": ("area / true area", "area_ratio_interval95"),
}


def result_lines(generated, real):
    """The main results of two summaries that include their confusion, to print."""

    def cell(summary, key, interval):
        if summary[key] is None:
            return "-"
        ends = " ({:.3f} to {:.3f})".format(*summary[interval]) if summary[interval] else ""
        return f"{summary[key]:.3f}{ends}"

    lines = [f"{'':<20} {'generated, 95%':>24} {'real, 95%':>24}"]
    lines.append(f"{'clips':<20} {generated['clips']:>24} {real['clips']:>24}")
    for key, (title, interval) in ROWS.items():
        cells = [cell(summary, key, interval) for summary in (generated, real)]
        lines.append(f"{title:<20} {cells[0]:>24} {cells[1]:>24}")
    for what in ("direction", "shape"):
        rows = generated["confusion"][what]
        names = list(next(iter(rows.values())))
        lines.append(f"{'asked, found:':<20} " + " ".join(f"{name:>8}" for name in names))
        lines += [f"{asked:<20} " + " ".join(f"{row[name]:>8}" for name in names) for asked, row in rows.items()]
    refused = sorted(generated["confusion"]["refused"].items(), key=lambda item: -item[1])
    lines += [f"no direction: {reason}, {clips} clips" for reason, clips in refused]
    return ["  " + line for line in lines]
