"""Bouncing Moving Shapes, of any length: is it one object to the end, does it turn at the borders and only there?

A clip is looked at in windows of 16 frames by the tracker of motion.py, which wants one compact object of one color in
every frame. From the centroids of all windows come the speed of each, the turns and where they are. The truth comes
from the shapes.json of the data set, scaled to the clip. Real clips, scored beside generated ones, show the ceiling.
"""

import functools
import json
from dataclasses import dataclass

import numpy as np

from runtime import distributed
from runtime.cli import UserError, say
from runtime.distributed import rank
from scoring.motion import MIN_CONTRAST, find_object, prepare, read_class, recognize, separate, wilson

WINDOW = 16  # frames that are looked at together
# Lengths are in px of a frame 16 px high and grow with it.
NEAR = 1.0  # px between a turn and the border's turning point; also the least way back that makes a turn
ACROSS = 0.5  # px, standard deviation of the motion across the axis
QUANTILES = (0.05, 0.5, 0.95)  # of the speeds of all windows


@dataclass(frozen=True)
class Bounce:
    """What clips of a class should show; lengths in px of the clip."""

    shape: str
    axis: int  # 0: horizontal, 1: vertical
    speed: float  # px per frame
    low: float  # where the centroid turns
    high: float


def score_bounce(generated, real, shapes_json):
    """Score two streams of clips (see sources.py) against the truth in the file shapes_json.

    Returns (values, result), plain dicts for JSON, on rank 0 and (None, None) elsewhere.
    """
    truth_of = functools.cache(functools.partial(read_bounce, shapes_json))
    result = {"generated": score_stream(generated, truth_of), "real": score_stream(real, truth_of)}
    if rank() != 0:
        return None, None
    for line in result_lines(result["generated"], result["real"]):
        say(line)
    names = "one_object", "turns_right", "speed_low", "speed_median", "speed_high"
    return {name: result["generated"][name] for name in names}, result


def score_stream(stream, truth_of):
    rows = []
    for indices, clips, names, time_scales in stream:
        for index, clip, name, time_scale in zip(indices, clips.cpu().numpy(), names, time_scales, strict=True):
            rows.append((index, *follow(clip, truth_of(name, clip.shape[1], time_scale))))
    return summarize(*distributed.gather_in_order(rows))


def is_bouncing(shapes_json):
    """Whether a shapes.json is of make_moving_shapes.py --bounce. Raises UserError if it can't be read."""
    try:
        with open(shapes_json) as file:
            return bool(json.load(file)["settings"].get("bounce"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{shapes_json}: not the shapes.json of a Moving Shapes data set ({error!r})") from None


def read_bounce(path, class_name, height, time_scale):
    """The Bounce of a class in a shapes.json, for clips of this height in px and this time_scale. Raises UserError."""
    size, videos = read_class(path, class_name)
    scale = height / size
    speed, low, high = (scale * float(np.mean([video[key] for video in videos])) for key in ("speed", "low", "high"))
    axis = ("Horizontal", "Vertical").index(videos[0]["axis"])
    return Bounce(videos[0]["shape"], axis, speed * time_scale, low, high)


# ----------------------------------------------------------------------------------------------------------------------
# One clip


def follow(clip, truth):
    """(number of the first window without the one object, or None, or why; speeds of the windows over the true one; are
    the turns right) of a clip uint8 (T, H, W, 3).
    """
    centers, speeds, first = [], [], None
    for start in range(0, len(clip) - WINDOW + 1, WINDOW):
        try:
            found = look(clip[start : start + WINDOW])
            first = first or found
            if found[1] != truth.shape or np.linalg.norm(found[2] - first[2]) > MIN_CONTRAST:
                raise ValueError("another object")
        except ValueError as reason:
            return {"window": start // WINDOW, "reason": str(reason)}, speeds, False
        centers.append(found[0])
        speeds.append(float(np.median(np.abs(np.diff(found[0][:, truth.axis])))) / truth.speed)
    unit = clip.shape[1] / 16
    return None, speeds, turns_are_right(np.concatenate(centers), truth, unit)


def look(window):
    """(centroids (T, 2) in px of the clip, shape, color (3,)) of the one object of a window. Raises ValueError."""
    frames, factor = prepare(window)
    signal, bright, color = separate(frames)
    centers, area = find_object(signal, bright, frames.shape[1] / 16)
    return centers * factor, recognize(signal, centers, area), color


def turns_are_right(centers, truth, unit):
    """Whether an object with these centroids (T, 2) stays between the borders, on its axis, and turns only at them."""
    path, near = centers[:, truth.axis], NEAR * unit
    if centers[:, 1 - truth.axis].std() > ACROSS * unit:
        return False
    if path.min() < truth.low - near or path.max() > truth.high + near:
        return False
    borders = {1: truth.high, -1: truth.low}
    return all(abs(position - borders[direction]) <= near for position, direction in turning_points(path, near))


def turning_points(path, least):
    """[(position, 1 where it is a maximum, -1 a minimum)] of a path's extremes, between which it goes by `least` or
    more; less is jitter.
    """
    low = high = path[0]
    direction, found = 0, []
    for position in path:
        low, high = min(low, position), max(high, position)
        if direction != 1 and position - low >= least:
            found += [(low, -1)] if direction else []
            direction, high = 1, position
        elif direction != -1 and high - position >= least:
            found += [(high, 1)] if direction else []
            direction, low = -1, position
    return found


# ----------------------------------------------------------------------------------------------------------------------
# All clips


def summarize(lost, speeds, turns):
    """A plain dict for JSON, of the columns of `follow`."""
    whole, right = [reason is None for reason in lost], sum(turns)
    every = np.array([speed for clip in speeds for speed in clip])
    low, median, high = np.quantile(every, QUANTILES).tolist() if len(every) else (None,) * 3
    reasons = [entry["reason"] for entry in lost if entry]
    return {
        "clips": len(lost),
        "one_object": sum(whole) / len(lost),
        "one_object_interval95": wilson(sum(whole), len(lost)),
        "turns_right": right / len(lost),
        "turns_right_interval95": wilson(right, len(lost)),
        "speed_low": low,
        "speed_median": median,
        "speed_high": high,
        "lost_in_window": [entry["window"] for entry in lost if entry],
        "reasons": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
    }


def result_lines(generated, real):
    def cell(summary, key):
        low, high = summary[f"{key}_interval95"]
        return f"{summary[key]:.3f} ({low:.3f} to {high:.3f})"

    def speeds(summary):
        values = [summary[f"speed_{name}"] for name in ("low", "median", "high")]
        return "-" if None in values else " ".join(f"{value:.3f}" for value in values)

    lines = [f"{'':<34} {'generated, 95%':>24} {'real, 95%':>24}"]
    for key, title in (("one_object", "one object, color and shape"), ("turns_right", "turns at the borders only")):
        lines.append(f"{title:<34} {cell(generated, key):>24} {cell(real, key):>24}")
    lines.append(f"{'speed / true: 5%, median, 95%':<34} {speeds(generated):>24} {speeds(real):>24}")
    lines += [f"lost: {reason}, {count} clips" for reason, count in generated["reasons"].items()]
    return ["  " + line for line in lines]
