"""The tracker finds what a clip shows, and refuses anything but one object in straight, steady motion."""

import itertools
import json
import math

import decord
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import make_moving_shapes as shapes
from runtime.cli import UserError
from scoring import motion
from scoring.motion import Track, Truth

RED, GREEN, BLUE = (shapes.COLORS[name] for name in ("red", "green", "blue"))
COMBINATIONS = list(itertools.product(shapes.SHAPES, shapes.DIRECTIONS))
SIGN = {"Left": (-1, 0), "Right": (1, 0), "Up": (0, -1), "Down": (0, 1)}


def clip_of(centers, shape="Circle", color=RED, size=16, radius=0.18 * 16, background=(0, 0, 0)):
    return np.stack([shapes.draw_frame(shape, center, radius, size, color, background) for center in centers])


def line(direction, frames=16, speed=0.36, middle=(8.1, 7.8)):
    """Centers (T, 2) of straight motion through the middle."""
    time = np.arange(frames)[:, None] - (frames - 1) / 2
    return np.array(middle) + time * speed * np.array(SIGN[direction])


def resize(clip, size):
    frames = torch.from_numpy(clip).permute(0, 3, 1, 2).float()
    small = F.interpolate(frames, size=(size, size), mode="bilinear", antialias=True)
    return small.round().byte().permute(0, 2, 3, 1).numpy()


def blur(clip, deviation):
    x = np.arange(-4, 5)
    kernel = np.exp(-(x**2) / 2 / deviation**2)
    out = clip.astype(float)
    for axis in (1, 2):
        out = np.apply_along_axis(np.convolve, axis, out, kernel / kernel.sum(), "same")
    return out.round().astype(np.uint8)


def noisy(clip, deviation, seed=0):
    noise = np.random.default_rng(seed).normal(0, deviation, clip.shape)
    return (clip + noise).round().clip(0, 255).astype(np.uint8)


def refused(clip, reason):
    found = motion.track(clip)
    assert found.direction is None and found.speed is None, found
    assert reason in found.reason, found


@pytest.fixture(scope="module")
def data_set(tmp_path_factory):
    """Moving Shapes, 64 px, 12 classes of 2 videos."""
    folder = tmp_path_factory.mktemp("data") / "set"
    shapes.main(["--out", str(folder), "--videos-per-class", "2", "--seed", "5"])
    return folder


@pytest.mark.parametrize(("frames", "speed"), [(25, 0.36), (7, 0.55), (2, 0.5)])
def test_drawn_clips_are_measured_correctly(frames, speed):
    for shape, direction in COMBINATIONS:
        found = motion.track(clip_of(line(direction, frames, speed), shape, BLUE))
        assert (found.direction, found.shape, found.reason) == (direction, shape, "")
        assert found.speed == pytest.approx(speed, abs=0.1 / frames)
        assert found.area == pytest.approx(shapes.AREAS[shape] * (0.18 * 16) ** 2, rel=0.05)
        assert np.abs(np.subtract(found.color, BLUE)).max() <= 8


@pytest.mark.parametrize(("deviation", "noise"), [(0.7, 6), (1.0, 0), (0, 10)])
def test_blur_and_noise_as_in_generated_clips_are_tolerated(deviation, noise):
    for shape, direction in COMBINATIONS:
        clip = clip_of(line(direction, 7, 0.55), shape, GREEN)
        found = motion.track(noisy(blur(clip, deviation) if deviation else clip, noise))
        assert (found.direction, found.shape) == (direction, shape), found.reason
        assert found.speed == pytest.approx(0.55, abs=0.05)
        assert found.area == pytest.approx(shapes.AREAS[shape] * (0.18 * 16) ** 2, rel=0.2)


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_noise_and_blur_hardly_change_the_area(shape):
    clip = clip_of(line("Left", 25), shape)
    area = motion.track(clip).area
    assert motion.track(noisy(clip, 8)).area == pytest.approx(area, rel=0.02)
    assert motion.track(blur(clip, 0.5)).area == pytest.approx(area, rel=0.04)


@pytest.mark.parametrize("size", [24, 40, 64, 96])
def test_speed_and_area_are_in_px_of_the_clip_at_any_size(size):
    scale = size / 16
    for shape in shapes.SHAPES:
        found = motion.track(clip_of(line("Up") * scale, shape, RED, size, 2.88 * scale))
        assert (found.direction, found.shape) == ("Up", shape)
        assert found.speed == pytest.approx(0.36 * scale, rel=0.02)
        assert found.area == pytest.approx(shapes.AREAS[shape] * (2.88 * scale) ** 2, rel=0.05)


def test_every_color_of_the_data_set_is_found_on_every_background():
    for color, background in itertools.product(shapes.COLORS.values(), shapes.BACKGROUNDS.values()):
        found = motion.track(clip_of(line("Left"), "Square", color, background=background))
        assert (found.direction, found.shape) == ("Left", "Square")
        assert np.abs(np.subtract(found.color, color)).max() <= 12


@pytest.mark.parametrize("size", [64, 16])
def test_decoded_videos_are_all_tracked_correctly_whole_and_short(data_set, size):
    videos = json.loads((data_set / "shapes.json").read_text())["videos"]
    clips = [decord.VideoReader(str(data_set / f"{key}.avi")).get_batch(range(25)).asnumpy() for key in videos]
    clips = [clip if size == 64 else resize(clip, size) for clip in clips]
    expected = [motion.read_truth(data_set / "shapes.json", video["class"], size, 1 / 25) for video in videos.values()]
    for frames in (25, 4):
        score = motion.summarize([motion.track(clip[:frames]) for clip in clips], expected)
        assert (score["direction_accuracy"], score["shape_accuracy"], score["clips"]) == (1, 1, 24)
        assert score["speed_ratio"] == pytest.approx(1, abs=0.02)
        assert score["area_ratio"] == pytest.approx(1.02, abs=0.02)


def test_mirrored_and_transposed_clips_have_the_mirrored_and_transposed_direction():
    clip = noisy(clip_of(line("Right", 7, 0.55), "Square"), 3)
    found = motion.track(clip)
    others = {"Left": clip[:, :, ::-1], "Down": clip.transpose(0, 2, 1, 3), "Up": clip.transpose(0, 2, 1, 3)[:, ::-1]}
    for direction, other in others.items():
        assert motion.track(other).direction == direction
        assert motion.track(other).speed == pytest.approx(found.speed)
        assert motion.track(other).area == pytest.approx(found.area)
    assert motion.track(clip[::-1]).direction == "Left"


def test_two_objects_have_no_direction():
    small = 2.2
    for gap, reason in ((11, "more than one object"), (2.4 * small, "not compact"), (1.6 * small, "no known shape")):
        left, right = (line("Down", 7, 0.55, (8 + side * gap / 2, 8)) for side in (-1, 1))
        clip = np.maximum(clip_of(left, radius=small), clip_of(right, radius=small))
        refused(clip, reason)
    assert motion.track(clip_of(left, radius=small)).direction == "Down"


def test_more_objects_also_in_a_single_frame_only_have_no_direction():
    starts = [(3, 3), (13, 3), (3, 13), (13, 13), (8, 8)]
    clips = [clip_of(line("Right", 7, 0.3, start), radius=1.8) for start in starts]
    refused(np.maximum.reduce(clips), "more than one object")
    clip = clip_of(line("Up"))
    clip[5] = np.maximum(clip[5], clip_of([(2.5, 2.5)], radius=1.5)[0])
    refused(clip, "more than one object")


def test_a_second_color_anywhere_has_no_direction():
    path = line("Left")
    one, other = clip_of(path, color=GREEN), clip_of(path, color=BLUE)
    refused(np.concatenate([one[:8], other[8:]]), "color")  # from some frame on
    refused(np.concatenate([one[:15], other[15:]]), "color")  # in the last frame only
    red_and_green = np.where(np.arange(16)[:, None, None] < 8, clip_of(path, color=RED), one)
    refused(red_and_green, "color")  # one half each, in every frame
    above, below = line("Left", middle=(8, 4)), line("Left", middle=(8, 12))
    refused(np.maximum(clip_of(above, color=RED), clip_of(below, color=BLUE)), "color")


def test_an_object_that_vanishes_fades_or_splits_has_no_direction():
    path = line("Down")
    missing, faded = clip_of(path), clip_of(path)
    missing[9] = 0
    refused(missing, "vanishes")
    faded[9:] //= 2
    refused(faded, "area changes")
    spread = np.stack([np.linspace(0, 4, 16), np.zeros(16)], 1)
    split = np.maximum(clip_of(path + spread, radius=2), clip_of(path - spread, radius=2))
    assert motion.track(split).direction is None


def test_jumps_stops_turns_curves_and_frames_in_the_wrong_order_have_no_direction():
    path = line("Right", 16, 0.4)
    jump = path + np.where(np.arange(16) < 8, 0, 2)[:, None] * np.array([1, 0])
    hop = path + np.where(np.arange(16) < 8, 0, 2)[:, None] * np.array([0, 1])
    stop = path[np.minimum(np.arange(16), 8)]
    back = np.concatenate([path[:8], path[8:0:-1]])
    angle = np.linspace(0, np.pi / 2, 16)[:, None]
    arc = 8 + 4 * np.concatenate([np.cos(angle), np.sin(angle)], 1)
    diagonal = 8 + np.linspace(-3, 3, 16)[:, None] * np.array([1, 1])
    for centers in (jump, hop, stop, back, arc, diagonal):
        refused(clip_of(centers), "not straight and steady")
    refused(clip_of(path)[[0, 3, 1, 4, 2, 6, 5]], "not straight and steady")  # frames in the wrong order


def test_in_a_short_clip_a_wobble_counts_in_proportion_to_the_travel():
    path, wobble = line("Right", 4, 0.36), np.array([0.4, -0.4, -0.4, 0.4])[:, None] * np.array([0, 1])
    refused(clip_of(path + wobble), "not straight and steady")
    assert motion.track(clip_of(path + wobble / 4)).direction == "Right"


@pytest.mark.parametrize("frames", [2, 4, 25])
def test_a_shape_that_stands_still_has_a_shape_but_no_direction(frames):
    for seed in range(10):
        clip = noisy(clip_of(line("Up", frames, 0), "Triangle"), 5, seed)
        refused(clip, "stands still")
        assert motion.track(clip).shape == "Triangle"


@pytest.mark.filterwarnings("error")
def test_clips_without_an_object_have_no_direction():
    rng = np.random.default_rng(0)
    refused(np.zeros((4, 16, 16, 3), np.uint8), "nothing")
    refused(np.full((4, 16, 16, 3), 255, np.uint8), "nothing")
    refused(noisy(np.full((4, 16, 16, 3), 30, np.uint8), 6), "nothing")
    refused(np.where(np.arange(16)[:, None, None] < 8, 255, np.zeros((4, 16, 16, 3))).astype(np.uint8), "color")
    for _ in range(20):
        assert motion.track(rng.integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)).direction is None


def test_the_truth_is_that_of_shapes_json_scaled_to_the_clip(data_set):
    truth = motion.read_truth(data_set / "shapes.json", "SquareUp", 16, 3 / 25)
    assert (truth.direction, truth.shape) == ("Up", "Square")
    assert truth.speed == pytest.approx(9 * 3 / 25)  # 9 px a second at 16 px
    assert truth.area == pytest.approx(math.pi * 2.88**2)


def test_a_missing_shapes_json_or_class_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="shapes.json"):
        motion.read_truth(tmp_path / "shapes.json", "SquareUp", 16, 1 / 25)
    (tmp_path / "shapes.json").write_text('{"videos": {}, "size": 64}')
    with pytest.raises(UserError, match="no class SquareUp"):
        motion.read_truth(tmp_path / "shapes.json", "SquareUp", 16, 1 / 25)


def test_the_summary_counts_refused_clips_as_wrong_and_measures_the_right_ones():
    truth = Truth("Up", "Circle", 0.5, 20)
    tracks = [Track("Up", "Circle", 0.4, 18), Track("Up", "Square", 0.6, 26), Track("Down", "Circle", 5, 99)]
    tracks.append(Track(reason="more than one object"))
    score = motion.summarize(tracks, [truth] * 4)
    assert (score["clips"], score["right"], score["direction_accuracy"], score["shape_accuracy"]) == (4, 2, 0.5, 0.5)
    assert score["speed_ratio"] == pytest.approx(1.0) and score["area_ratio"] == pytest.approx(1.1)
    assert score["speed_ratio_standard_error"] == pytest.approx(0.2)  # 0.8 and 1.2
    assert score["area_ratio_standard_error"] == pytest.approx(0.2)  # 0.9 and 1.3
    assert score["direction_interval95"] == pytest.approx([0.15, 0.85], abs=0.002)
    assert json.loads(json.dumps(score)) == score
    score = motion.summarize([Track(reason="nothing stands out")] * 10, [truth] * 10)  # no right clip, so no ratios
    assert score["direction_accuracy"] == 0 and score["speed_ratio"] is None and score["area_ratio"] is None
    assert score["direction_interval95"] == pytest.approx([0, 0.2775], abs=1e-4)


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (3, 7), (90, 100), (7, 7)])
def test_the_interval_holds_the_shares_that_a_95_percent_test_does_not_reject(hits, count):
    for share in motion.wilson(hits, count):
        distance = abs(hits / count - share)  # at a bound, 1.96 of the standard deviations of that share
        assert distance == pytest.approx(1.96 * math.sqrt(max(0, share * (1 - share)) / count), abs=1e-9)


def test_the_confusion_counts_what_was_found_for_what_was_asked_and_the_lines_show_it_in_rows_and_columns():
    up, left = Truth("Up", "Circle", 0.5, 20), Truth("Left", "Square", 0.5, 20)
    tracks = [Track("Up", "Circle", 0.5, 20), Track("Down", "Square", 0.5, 20), Track(reason="nothing stands out")]
    tracks += [Track("Left", "Square", 0.5, 20), Track(None, "Square", reason="the object stands still")]
    expected = [up, up, up, left, left]
    found = motion.confusion(tracks, expected)
    assert list(found["direction"]) == ["Left", "Up"]  # only what was asked
    assert found["direction"]["Up"] == {"Left": 0, "Right": 0, "Up": 1, "Down": 1, "none": 1}
    assert found["direction"]["Left"] == {"Left": 1, "Right": 0, "Up": 0, "Down": 0, "none": 1}
    assert found["shape"]["Circle"] == {"Circle": 1, "Square": 1, "Triangle": 0, "none": 1}
    assert found["shape"]["Square"] == {"Circle": 0, "Square": 2, "Triangle": 0, "none": 0}
    assert found["refused"] == {"nothing stands out": 1, "the object stands still": 1}
    assert json.loads(json.dumps(found)) == found

    generated = motion.summarize(tracks, expected) | {"confusion": found}
    nothing = [Track(reason="x")], [up]
    real = motion.summarize(*nothing) | {"confusion": motion.confusion(*nothing)}
    lines = [line.split() for line in motion.result_lines(generated, real)]
    assert ["asked,", "found:", "Left", "Right", "Up", "Down", "none"] in lines
    assert ["Up", "0", "0", "1", "1", "1"] in lines
    assert ["speed", "/", "true", "speed", "1.000", "(1.000", "to", "1.000)", "-"] in lines
