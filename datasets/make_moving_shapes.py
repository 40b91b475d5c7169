"""Make Moving Shapes: small videos of one shape that crosses a dark frame, in UCF-101's layout.

    python datasets/make_moving_shapes.py --out datasets/moving-shapes
    python datasets/make_moving_shapes.py --out datasets/bouncing-shapes --bounce --seconds 12

There are 12 classes, shape x direction (`CircleLeft` ... `TriangleDown`), so the motion of a
generated clip can be scored. --bounce makes videos of any length in 6 classes, shape x axis
(`CircleHorizontal` ... `TriangleVertical`). In them, the shape turns where it touches the border.
The same flags give the same bytes (with the same FFmpeg build). Positions are (x, y) in px from the
top left corner of the frame; y grows downwards, and pixel centers are at + 0.5.
"""

import json
import math
from layout import is_made, new_data_set, write_lists
from argparse import Namespace
from itertools import product
from pathlib import Path

import av
import numpy as np
import torch

from runtime.cli import ArgumentParser, Bar, UserError, number, one_line_errors, say, wrong_input
from runtime.rng import generator
from video.writers import encode

VERSION = 1  # of the drawing code and of shapes.json
FPS = 25
TRAVEL = 9 / 16  # distance in a video, as a fraction of the frame's width
# per class; group 1 is the test list, because UCF-101's lists consist of complete groups
GROUPS = 8
SUBROWS = 8  # scan lines per pixel row

SHAPES = ("Circle", "Square", "Triangle")
DIRECTIONS = {"Left": (-1, 0), "Right": (1, 0), "Up": (0, -1), "Down": (0, 1)}
AXES = {"Horizontal": ("Left", "Right"), "Vertical": ("Up", "Down")}  # of --bounce
CLASSES = tuple(f"{shape}{direction}" for shape in SHAPES for direction in DIRECTIONS)
BOUNCING = tuple(f"{shape}{axis}" for shape in SHAPES for axis in AXES)
COLORS = {
    "red": (240, 70, 60),
    "green": (60, 220, 90),
    "blue": (80, 130, 250),
    "yellow": (240, 220, 60),
    "magenta": (220, 70, 220),
    "cyan": (60, 220, 220),
    "white": (240, 240, 240),
}
BACKGROUNDS = {
    "black": (0, 0, 0),
    "gray": (40, 40, 40),
    "navy": (10, 20, 50),
    "brown": (45, 25, 10),
}

# Sizes in radii. The square has the circle's area. The triangle points up and has 84% of it,
# because a larger one could not travel as far.
HALF_SIDE = math.sqrt(math.pi) / 2
BASE = HEIGHT = 2.3
AREAS = {"Circle": math.pi, "Square": 4 * HALF_SIDE**2, "Triangle": BASE * HEIGHT / 2}
HALF_WIDTHS = {  # at a distance y below the centroid
    "Circle": lambda y: np.sqrt(np.maximum(0, 1 - y**2)),
    "Square": lambda y: np.full_like(y, HALF_SIDE),
    "Triangle": lambda y: (y + HEIGHT * 2 / 3) / HEIGHT * BASE / 2,
}
# Distances from the centroid to the left, upper, right and lower edge
EXTENTS = {
    "Circle": (1, 1, 1, 1),
    "Square": (HALF_SIDE,) * 4,
    "Triangle": (BASE / 2, HEIGHT * 2 / 3, BASE / 2, HEIGHT / 3),
}


def coverage(shape, center, radius, size):
    """The fraction of each pixel that a shape covers, float64 (size, size).

    Each pixel row is clipped to the shape's height and sampled on SUBROWS lines. The overlap of a
    line with each pixel is exact. So squares are exact and other shapes almost exact, even for
    centers at fractions of a pixel.
    """
    x, y = center
    _, up, _, down = EXTENTS[shape]
    edges = np.clip(np.arange(size + 1), y - up * radius, y + down * radius)
    heights = np.diff(edges)  # (H,)
    # (H, SUBROWS)
    lines = edges[:-1, None] + heights[:, None] * (np.arange(SUBROWS) + 0.5) / SUBROWS
    half = radius * HALF_WIDTHS[shape]((lines - y) / radius)[..., None]
    columns = np.clip(np.arange(size + 1), x - half, x + half)  # (H, SUBROWS, W + 1)
    return np.diff(columns).mean(1) * heights[:, None]


def draw_frame(shape, center, radius, size, color, background):
    """An antialiased frame, uint8 (size, size, 3). center: (x, y) of the shape's centroid in px."""
    alpha = coverage(shape, center, radius, size)[..., None]
    return np.rint(alpha * np.array(color) + (1 - alpha) * np.array(background)).astype(np.uint8)


def draw_clip(video, size, frames):
    """The frames of a video, uint8 (frames, size, size, 3). video: its entry in shapes.json."""
    centers = np.array(video["start"]) + np.zeros((frames, 1))
    if "path" in video:
        centers[:, list(AXES).index(video["axis"])] = video["path"][:frames]
    else:
        direction = np.array(DIRECTIONS[video["direction"]])
        centers += np.arange(frames)[:, None] * direction * video["speed"] / FPS
    drawn = [
        draw_frame(
            shape=video["shape"],
            center=center,
            radius=video["radius"],
            size=size,
            color=video["rgb"],
            background=video["background_rgb"],
        )
        for center in centers
    ]
    return np.stack(drawn)


def plan_video(shape, kind, index, args):
    """The entry of a video in shapes.json, with all its random choices.

    kind: a direction; with --bounce an axis.
    """
    purpose = "bouncing-shapes" if args.bounce else "moving-shapes"
    rng = generator(args.seed, purpose, shape, kind, index)
    draws = torch.rand(6, generator=rng, dtype=torch.float64).tolist()
    u_size, u_color, u_background, *u_motion = draws
    small, large = args.radius
    radius = args.size * (small + (large - small) * u_size)
    color = args.colors[int(u_color * len(args.colors))]
    background = args.backgrounds[int(u_background * len(args.backgrounds))]
    left, up, right, down = EXTENTS[shape]
    ends = [
        (radius * left, args.size - radius * right),
        (radius * up, args.size - radius * down),
    ]
    move = bounce if args.bounce else cross
    motion, path = move(kind, ends=ends, draws=u_motion, args=args)
    return {
        "class": f"{shape}{kind}",
        "shape": shape,
        **motion,
        "radius": radius,
        "area": AREAS[shape] * radius**2,
        "color": color,
        "rgb": COLORS[color],
        "background": background,
        "background_rgb": BACKGROUNDS[background],
        **path,
    }


def cross(direction, ends, draws, args):
    """(the fields of a motion across the frame, {}), from three uniform numbers.

    ends: lowest and highest position per axis.
    """
    speed = TRAVEL * args.size * FPS / args.frames
    distance = speed * (args.frames - 1) / FPS
    start = []
    for (low, high), move, share in zip(ends, DIRECTIONS[direction], draws[:2], strict=True):
        first = low + distance * (move < 0)
        last = high - distance * (move > 0)
        start.append(round(first + (last - first) * share, 6))
    return {"direction": direction, "start": start, "speed": speed}, {}


def bounce(axis, ends, draws, args):
    """As `cross`, for a motion that turns at the ends.

    The path: the centroid on the axis in each frame, px.
    """
    shares = zip(ends, draws[:2], strict=True)
    start = [low + (high - low) * share for (low, high), share in shares]
    along = list(AXES).index(axis)
    speed = TRAVEL * args.size
    forwards = draws[2] < 0.5
    sign = 1 if forwards else -1
    position = start[along] + sign * speed / FPS * np.arange(args.frames)
    # reflected at both ends
    low, high = ends[along]
    path = low + np.abs((position - high) % (2 * (high - low)) - (high - low))
    motion = {
        "axis": axis,
        "direction": AXES[axis][forwards],
        "start": [round(value, 6) for value in start],
        "low": low,
        "high": high,
        "speed": speed,
    }
    return motion, {"path": path.round(4).tolist()}


def plan_videos(args):
    """{`Class/stem`: entry in shapes.json} of all videos."""
    videos = {}
    groups = min(GROUPS, args.videos_per_class)
    kinds = AXES if args.bounce else DIRECTIONS
    for shape, kind, index in product(SHAPES, kinds, range(args.videos_per_class)):
        clip, group = divmod(index, groups)
        name = f"{shape}{kind}"
        key = f"{name}/v_{name}_g{group + 1:02d}_c{clip + 1:02d}"
        videos[key] = plan_video(
            shape=shape,
            kind=kind,
            index=index,
            args=args,
        )
    return videos


def write_video(path, frames):
    """Write frames, uint8 (T, H, W, 3), as an almost lossless MPEG-4 part 2 AVI.

    It has no date or encoder version.
    """
    # constant best quality
    options = {
        "flags": "+bitexact+qscale",
        "qmin": "1",
        "qmax": "1",
        "threads": "1",
    }
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as file:
        encode(
            file,
            frames=frames,
            fps=FPS,
            codec="mpeg4",
            pixel_format="yuv420p",
            options=options,
        )


def write_data_set(out, settings, args):
    """Write the data set, all or nothing."""
    videos = plan_videos(args)
    train = [f"{key}.avi" for key in videos if "_g01_" not in key]
    test = [f"{key}.avi" for key in videos if "_g01_" in key]
    with new_data_set(out) as folder:
        for name in {video["class"] for video in videos.values()}:
            (folder / name).mkdir(parents=True)
        for key, video in Bar(videos.items(), desc="Moving Shapes", unit="video"):
            write_video(folder / f"{key}.avi", draw_clip(video, args.size, args.frames))
        write_lists(folder, train, test)
        about = {
            "version": VERSION,
            "size": args.size,
            "fps": FPS,
            "seconds": args.frames / FPS,
            "seed": args.seed,
            "frames": args.frames,
            "settings": settings,
            "videos": videos,
        }
        text = json.dumps(about, indent=1)
        (folder / "shapes.json").write_text(text + "\n")


def check_flags(args):
    """Raise UserError for sizes that can't be drawn."""
    if args.size % 2:
        raise UserError(f"--size {args.size}: an odd number; expected an even number of px")
    small, large = args.radius
    most = math.floor(1000 * (1 - TRAVEL) / max(BASE, HEIGHT, 2)) / 1000
    if not 0.05 <= small <= large <= most:
        raise UserError(
            f"--radius {small:g} {large:g}: expected MIN <= MAX, both between 0.05 and {most:g} "
            "of --size, so that shapes can be recognized and stay in the frame"
        )


def parse_args(argv=None):
    parser = ArgumentParser(description=" ".join(__doc__.partition("\n\n")[0].split()))
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to make; must be new or empty")
    # 2: one trains, one tests
    count = number(int, least=2, most=100_000)
    pixels = number(int, least=16, most=4096)
    add(
        "--videos-per-class",
        type=count,
        default=60,
        help="videos per class; 12 classes, 6 with --bounce",
    )
    add("--size", type=pixels, default=64, help="height and width of a frame, px")
    add(
        "--seconds",
        type=number(float, least=2 / FPS, most=3600),
        default=1.0,
        help="length of a video, s; without --bounce, the shape crosses the frame once",
    )
    add(
        "--bounce",
        action="store_true",
        help="let shapes turn at the border; 6 classes, shape x axis",
    )
    add("--seed", type=int, default=0, help="seed of the random choices; default: 0")
    add(
        "--radius",
        type=float,
        nargs=2,
        default=[0.18, 0.18],
        metavar=("MIN", "MAX"),
        help="range of the radius, as a fraction of --size; random per video",
    )
    add(
        "--colors",
        nargs="+",
        choices=COLORS,
        default=["red", "green", "blue"],
        help="colors of the shapes; random per video",
    )
    add(
        "--backgrounds",
        nargs="+",
        choices=BACKGROUNDS,
        default=["black"],
        help="background colors; random per video",
    )
    return parser.parse_args(argv)


@one_line_errors()
def main(argv=None):
    args = parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    settings["version"] = VERSION
    if not args.bounce:
        del settings["bounce"]  # older data sets do not have this setting
    with wrong_input():
        check_flags(args)
        if is_made(args.out, "Moving Shapes", "shapes.json", settings):
            return
    write_data_set(args.out, settings, Namespace(**vars(args), frames=round(args.seconds * FPS)))
    classes = BOUNCING if args.bounce else CLASSES
    say(f"{args.out}: {len(classes)} classes with {args.videos_per_class} videos each")


if __name__ == "__main__":
    main()
