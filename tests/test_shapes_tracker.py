"""The tracker measures one object in straight, steady or bouncing motion, and refuses all other
clips.
"""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.special import stdtrit

import make_moving_shapes as drawing
import shapes_tracker
from sample_folders import read_clips, refused, run, write_samples
from scoring.stats import wilson
from shapes_tracker import Track, track
from test_moving_shapes import plan
from training import error_of

RED, GREEN, BLUE = (drawing.COLORS[name] for name in ("red", "green", "blue"))
COMBINATIONS = list(itertools.product(drawing.SHAPES, drawing.DIRECTIONS))


def clip_of(centers, shape="Circle", color=RED, size=16, radius=0.18 * 16, background=(0, 0, 0)):
    return np.stack(
        [drawing.draw_frame(shape, center, radius, size, color, background) for center in centers]
    )


def line(direction, frames=16, speed=0.36, middle=(8.1, 7.8)):
    """Centers (T, 2) of straight motion through the middle."""
    time = np.arange(frames)[:, None] - (frames - 1) / 2
    return np.array(middle) + time * speed * np.array(drawing.DIRECTIONS[direction])


def noisy(clip, deviation, seed=0):
    noise = np.random.default_rng(seed).normal(0, deviation, clip.shape)
    return (clip + noise).round().clip(0, 255).astype(np.uint8)


# Straight motion ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "speed", "size"),
    [
        (25, 0.36, 16),
        (2, 0.5, 16),
        (7, 0.55, 40),
    ],
)
def test_the_tracker_measures_drawn_clips_of_any_size(frames, speed, size):
    scale = size / 16
    for shape, direction in COMBINATIONS:
        centers = line(direction, frames, speed) * scale
        found = track(clip_of(centers, shape, BLUE, size, radius=2.88 * scale))
        assert (found.direction, found.shape, found.reason) == (direction, shape, "")
        assert found.speed == pytest.approx(speed * scale, abs=0.1 * scale / frames)
        assert found.area == pytest.approx(drawing.AREAS[shape] * (2.88 * scale) ** 2, rel=0.05)
        assert np.abs(np.subtract(found.color, BLUE)).max() <= 8


@pytest.mark.parametrize(
    ("deviation", "noise", "area"), [(0.7, 6, 0.2), (1.0, 0, 0.2), (0, 10, 0.2), (0.5, 0, 0.05)]
)
def test_the_tracker_tolerates_blur_and_noise(deviation, noise, area):
    for shape, direction in COMBINATIONS:
        clip = clip_of(line(direction, 7, 0.55), shape, GREEN)
        widths = (0, deviation, deviation, 0)
        blurred = gaussian_filter(clip.astype(float), widths, mode="constant").round()
        found = track(noisy(blurred, noise))
        assert (found.direction, found.shape) == (direction, shape), found.reason
        assert found.speed == pytest.approx(0.55, abs=0.05)
        assert found.area == pytest.approx(track(clip).area, rel=area)


def test_the_tracker_finds_every_color_on_every_background():
    colors = drawing.COLORS.values()
    for color, background in itertools.product(colors, drawing.BACKGROUNDS.values()):
        found = track(clip_of(line("Left"), "Square", color, background=background))
        assert (found.direction, found.shape) == ("Left", "Square")
        assert np.abs(np.subtract(found.color, color)).max() <= 12


PATH = line("Right", 16, 0.4)
STEPS = np.arange(16)
AFTER = (np.arange(16) >= 8)[:, None]
WOBBLE = np.array([[0, 0.4], [0, -0.4], [0, -0.4], [0, 0.4]])


def pair(gap):
    left, right = (line("Down", 7, 0.55, (8 + side * gap / 2, 8)) for side in (-1, 1))
    return np.maximum(clip_of(left, radius=2.2), clip_of(right, radius=2.2))


def changed(clip, frames, pixels):
    clip[frames] = pixels if np.isscalar(pixels) else np.maximum(clip[frames], pixels)
    return clip


REFUSED = {
    "two objects": (lambda: pair(11), "more than one object"),
    "two that touch": (lambda: pair(5.28), "not compact"),
    "two that overlap": (lambda: pair(3.52), "no known shape"),
    "a second one in a frame": (
        lambda: changed(clip_of(PATH), 5, clip_of([(2.5, 2.5)], radius=1.5)[0]),
        "than one",
    ),
    "a color from some frame on": (
        lambda: np.concatenate([clip_of(PATH)[:8], clip_of(PATH, color=BLUE)[8:]]),
        "color",
    ),
    "colors that cancel": (
        lambda: np.where(STEPS[:, None, None] < 8, 255, np.zeros((4, 16, 16, 3))).astype(np.uint8),
        "color",
    ),
    "it vanishes": (lambda: changed(clip_of(PATH), 9, 0), "vanishes"),
    "it fades": (
        lambda: np.concatenate([clip_of(PATH)[:9], clip_of(PATH)[9:] // 2]),
        "area changes",
    ),
    "a jump": (lambda: clip_of(PATH + 2 * AFTER * [1, 0]), "not straight and steady"),
    "a diagonal": (
        lambda: clip_of(8 + np.linspace(-3, 3, 16)[:, None] * [1, 1]),
        "not straight and steady",
    ),
    "a wobble in a short clip": (
        lambda: clip_of(line("Right", 4) + WOBBLE),
        "not straight and steady",
    ),
    "noise on gray": (lambda: noisy(np.full((4, 16, 16, 3), 30, np.uint8), 6), "nothing"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", REFUSED)
def test_anything_but_one_object_in_steady_motion_has_no_direction(case):
    make, reason = REFUSED[case]
    found = track(make())
    assert found.direction is None and found.speed is None and reason in found.reason, found


def test_a_small_wobble_or_one_of_two_objects_has_a_direction():
    assert track(clip_of(line("Right", 4) + WOBBLE / 4)).direction == "Right"
    assert track(clip_of(line("Down", 7, 0.55), radius=2.2)).direction == "Down"


@pytest.mark.parametrize("frames", [2, 25])
def test_a_static_object_has_a_shape_but_no_direction(frames):
    for seed in range(10):
        found = track(noisy(clip_of(line("Up", frames, 0), "Triangle"), 5, seed))
        assert found.direction is None and found.shape == "Triangle"
        assert "stands still" in found.reason


def test_only_a_clip_with_the_same_color_and_shape_keeps_the_appearance():
    centers = line("Right", 8)
    real = track(clip_of(centers))
    others = [
        clip_of(centers),
        clip_of(centers, shape="Square"),
        clip_of(centers, color=BLUE),
        np.zeros((8, 16, 16, 3), np.uint8),
    ]
    kept = [shapes_tracker.keeps_appearance(track(clip), real) for clip in others]
    assert kept == [True, False, False, False]


def test_the_truth_of_shapes_json_is_scaled_to_the_clip(shapes, tmp_path):
    truth = shapes_tracker.Truth(shapes)("SquareUp", 16, 3 / 25)
    assert (truth.direction, truth.shape) == ("Up", "Square")
    assert truth.speed == pytest.approx(9 * 3 / 25)  # 9 px a second at 16 px
    assert truth.area == pytest.approx(math.pi * 2.88**2)
    about = json.loads((shapes / "shapes.json").read_text())
    others = [[], about | {"videos": []}, about | {"settings": None}, about | {"videos": {"a": {}}}]
    for other in (None, *others):
        if other is not None:
            (tmp_path / "shapes.json").write_text(json.dumps(other))
        error = error_of(shapes_tracker.Truth, tmp_path)
        assert "shapes.json: not the shapes.json of a Moving Shapes data set" in error


def test_the_summary_counts_refused_clips_as_wrong_and_measures_right_ones():
    up = Track("Up", "Circle", 0.5, 20)
    left = Track("Left", "Square", 0.5, 20)
    tracks = [
        Track("Up", "Circle", 0.4, 18),
        Track("Up", "Square", 0.6, 26),
        Track("Down", "Circle", 5, 99),
        Track(reason="nothing stands out"),
        Track(None, "Square", reason="the object stands still"),
    ]
    truths = [up] * 4 + [left]
    found = shapes_tracker.summarize_tracks(tracks, truths)
    accuracies = [found[f"{name}_accuracy"] for name in ("direction", "shape", "both")]
    assert (found["clips"], found["right"], accuracies) == (5, 2, [0.4, 0.6, 0.2])
    assert found["speed_ratio"] == pytest.approx(1.0) and found["area_ratio"] == pytest.approx(1.1)
    half = stdtrit(1, 0.975) * 0.2  # Student's t of 0.9 and 1.3
    assert found["area_ratio_interval95"] == pytest.approx([1.1 - half, 1.1 + half])
    assert found["refused"] == {"nothing stands out": 1, "the object stands still": 1}
    # 3 clips of each video
    tripled = shapes_tracker.summarize_tracks(tracks * 3, truths * 3, [*range(5)] * 3)
    assert tripled["area_ratio_interval95"] == pytest.approx(found["area_ratio_interval95"])
    assert tripled["direction_interval95"] is tripled["shape_interval95"] is None  # of 5 videos
    none = shapes_tracker.summarize_tracks([Track(reason="x")], [up])
    assert none["speed_ratio"] is none["area_ratio"] is None and none["direction_accuracy"] == 0
    both = {"generated": found, "real": none}
    lines = shapes_tracker.result_lines(both, shapes_tracker.TRACKED)
    assert "0.400 (0.118 to 0.769) 0.000 (0.000 to 0.793)" in lines[2]
    assert any("1.000 (-1.541 to 3.541)" in line for line in lines)
    assert lines[-1] == "  refused: the object stands still, 1 clip"


def test_motion_of_real_clips_is_all_right(shapes, tmp_path):
    folder = write_samples(tmp_path / "s", *read_clips(shapes, "val", 12, stream="a"))
    found = run(tmp_path / "m.json", "--samples", folder, "--data-path", shapes, "--num-real", 24)
    assert found["protocol"] == "motion12_real24_8f"
    assert found["values"]["direction_accuracy"] == found["values"]["shape_accuracy"] == 1
    real = found["result"]["real"]
    assert real["right"] == real["clips"] == 24 and real["shape_accuracy"] == 1
    assert (real["speed_ratio"], real["area_ratio"]) == pytest.approx((1, 1.04), abs=0.02)
    assert found["result"]["interval_units"] == {"generated": "12 clips", "real": "12 videos"}
    assert real["direction_interval95"] == wilson(12, 12)


# Bouncing motion ----------------------------------------------------------------------------------

BOUNCING = "--bounce --seed 3 --size 32 --videos-per-class 2 --seconds 6.4"  # 160 frames
VIDEOS = list(plan(*BOUNCING.split())[1].values())


def truth_of(folder, videos):
    """The truth about videos of bouncing shapes."""
    about = {"size": 32, "videos": videos, "settings": {"bounce": True}}
    (folder / "shapes.json").write_text(json.dumps(about))
    return shapes_tracker.Truth(folder)


@pytest.fixture(scope="module")
def follow(tmp_path_factory):
    """What the tracker says of a clip of a video."""
    truth = truth_of(tmp_path_factory.mktemp("bounce"), dict(enumerate(VIDEOS)))

    def follow(clip, video):
        return shapes_tracker.follow(clip, truth(video["class"], 32, 1 / 25))

    return follow


def draw(video, **changes):
    return drawing.draw_clip(video | changes, 32, 160)


def test_objects_of_different_sizes_turn_at_different_places(tmp_path):
    _, videos = plan(*BOUNCING.split(), "--radius", "0.1", "0.19")
    truth = truth_of(tmp_path, videos)
    for video in videos.values():
        expected = truth(video["class"], 32, 1 / 25)
        lost, _, turns = shapes_tracker.follow(draw(video), expected)
        assert turns and not lost


@pytest.mark.parametrize("video", VIDEOS[::2])
def test_bouncing_shapes_move_like_a_ball_between_two_walls(video):
    step = video["speed"] / drawing.FPS
    along = list(drawing.AXES).index(video["axis"])
    position = video["start"][along]
    sign = 1 if video["direction"] in ("Right", "Down") else -1
    for found in video["path"]:
        assert found == pytest.approx(position, abs=1e-3)
        position += sign * step
        if position > video["high"] or position < video["low"]:
            position = 2 * min(max(position, video["low"]), video["high"]) - position
            sign = -sign
    clip = draw(video).astype(float).sum((2, 3) if along else (1, 3))
    masses = clip.sum(axis=1)
    assert masses.min() == pytest.approx(masses.max(), rel=0.01)  # it is never cut off
    # it touches the border where it turns
    assert clip[:, 0].any() and clip[:, -1].any()


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_true_bouncing_clips_have_one_object_the_right_speed_and_right_turns(follow, jitter):
    noise = np.random.default_rng(0).normal(0, jitter, 160)
    for video in VIDEOS[::3]:
        path = np.clip(video["path"] + noise, video["low"], video["high"])
        lost, speeds, turns = follow(draw(video, path=path), video)
        assert lost is None and turns and len(speeds) == 10
        assert jitter or speeds == pytest.approx([1.0] * 10, abs=0.06)
        lost, speeds, turns = follow(draw(video, path=path)[:150], video)
        assert lost is None and turns and len(speeds) == 10  # the last two windows overlap


def switched(video, frame, **changes):
    return np.concatenate([draw(video)[:frame], draw(video, **changes)[frame:]])


def drifting(video):
    """Its clip, with motion across its axis."""
    axis = 0 if video["axis"] == "Horizontal" else 1
    frames = enumerate(draw(video))
    return np.stack([np.roll(frame, round(2 * math.sin(t / 8)), axis) for t, frame in frames])


OTHER = {"Circle": "Square", "Square": "Triangle", "Triangle": "Circle"}
SPOILED = {  # a clip of a video, the window in which it is lost
    "another color": (lambda video: switched(video, 64, rgb=drawing.COLORS["white"]), 4),
    "another shape": (lambda video: switched(video, 96, shape=OTHER[video["shape"]]), 6),
    "two objects": (lambda video: np.maximum(draw(video), draw(video)[::-1, ::-1, ::-1]), None),
    "nothing": (
        lambda video: np.concatenate([draw(video)[:32], np.zeros((128, 32, 32, 3), np.uint8)]),
        2,
    ),
    "nothing at the end": (
        lambda video: np.concatenate([draw(video)[:149], np.zeros((1, 32, 32, 3), np.uint8)]),
        9,
    ),
    "turns early": (lambda video: draw(video, path=early_turns(video)), -1),
    "leaves": (
        lambda video: draw(video, path=np.linspace(video["path"][0], video["path"][0] + 40, 160)),
        None,
    ),
    "moves across": (drifting, -1),
}


def early_turns(video):
    low = video["low"]
    return low + 0.25 * (video["high"] - low) + (np.array(video["path"]) - low) / 2


@pytest.mark.parametrize("kind", SPOILED)
def test_spoiled_bouncing_clips_are_recognized(follow, kind):
    make, window = SPOILED[kind]
    for video in VIDEOS[::4]:
        lost, speeds, turns = follow(make(video), video)
        assert not turns and (lost is None) == (window == -1)
        assert window in (None, -1) or (lost["window"] == window == len(speeds))
    video = VIDEOS[0]
    stops = [*video["path"][:80], *[video["path"][80]] * 80]
    assert follow(draw(video, path=stops), video)[1][-1] < 0.05


@pytest.mark.parametrize(
    ("low", "high", "is_right"),
    [
        ((2, 2), (8, 8), True),
        ((0, 0), (8, 8), False),
        ((2, 2), (10, 10), False),
        ((4, 4), (8, 8), False),
        ((0, 2), (8, 10), True),  # of objects of different sizes
    ],
)
def test_turns_are_the_extremes_of_a_path_despite_jitter(low, high, is_right):
    path = np.array([3, 2.6, 3.1, 5, 4.6, 8, 7.6, 8.2, 8.1, 6, 2, 2.5, 1.8, 2, 4.0])
    centers = np.stack([path, np.zeros(15)], axis=1)
    for axis in (0, 1):
        truth = shapes_tracker.Bounce("Circle", axis, 1.0, low, high)
        found = shapes_tracker.turns_are_right(np.roll(centers, axis, axis=1), truth, unit=1.0)
        assert found == is_right


def test_evaluate_scores_bouncing_clips_by_windows(tmp_path, capsys):
    flags = "--bounce --size 16 --videos-per-class 2 --seconds 2"
    drawing.main(["--out", str(tmp_path / "b"), *flags.split()])
    about = json.loads((tmp_path / "b/shapes.json").read_text())
    videos = about["videos"].values()
    classes = sorted(drawing.BOUNCING)
    assert about["settings"]["bounce"] is True and {len(video["path"]) for video in videos} == {50}
    clips = np.stack([drawing.draw_clip(video, 16, 48) for video in videos])
    labels = [classes.index(video["class"]) for video in videos]
    clips[0] = 0
    folder = write_samples(tmp_path / "s", clips, labels, classes)
    flags = ["--samples", folder, "--data-path", tmp_path / "b", "--num-real", 6]
    made = run(tmp_path / "m.json", *flags)
    assert made["values"]["one_object"] == made["values"]["turns_right"] == pytest.approx(11 / 12)
    assert made["result"]["generated"]["refused"] == {"nothing stands out": 1}
    assert made["result"]["generated"]["lost_in_window"] == [0]
    assert made["result"]["real"]["one_object"] == 1 and made["result"]["real"]["turns_right"] == 1
    low, median, high = (made["values"][f"speed_{name}"] for name in ("low", "median", "high"))
    assert low < median < high and median == pytest.approx(1, abs=0.03)
    flags[1] = write_samples(tmp_path / "short", clips[:, :12], labels, classes)
    refused(capsys, tmp_path / "n.json", *flags, words=["bouncing shapes need at least 16"])
