"""Bouncing shapes: their videos follow the reflected path, and the tracker tells good clips from bad ones."""

import json
from argparse import Namespace

import numpy as np
import pytest

import evaluate
import make_moving_shapes as shapes
from scoring import bounce
from test_evaluate import write_samples
from training import run_main

ARGS = Namespace(
    seed=3, size=32, radius=[0.18, 0.18], colors=["red", "green", "blue"], backgrounds=["black"], frames=160,
    bounce=True, videos_per_class=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def videos():
    return shapes.plan_videos(ARGS)[0]


@pytest.fixture(scope="module")
def truth_file(videos, tmp_path_factory):
    path = tmp_path_factory.mktemp("bounce") / "shapes.json"
    path.write_text(json.dumps({"size": 32, "videos": videos, "settings": {"bounce": True}}))
    return path


def test_a_path_is_that_of_a_ball_between_two_walls(videos):
    assert len(videos) == 12
    for video in videos.values():
        path, step = np.array(video["path"]), video["speed"] / shapes.FPS
        along = list(shapes.AXES).index(video["axis"])
        position, sign = video["start"][along], 1 if video["direction"] in ("Right", "Down") else -1
        for found in path:
            assert found == pytest.approx(position, abs=1e-3)
            position += sign * step
            if position > video["high"] or position < video["low"]:
                wall = video["high"] if position > video["high"] else video["low"]
                position, sign = 2 * wall - position, -sign


def test_a_shape_is_never_cut_off_and_touches_the_border_where_it_turns(videos):
    for video in list(videos.values())[::2]:
        clip = shapes.draw_clip(video, 32, 160).astype(float).sum((2, 3) if video["axis"] == "Vertical" else (1, 3))
        whole = clip.sum(axis=1)
        assert whole.min() == pytest.approx(whole.max(), rel=0.01)
        assert (clip[:, 0] > 0).any() and (clip[:, -1] > 0).any()


@pytest.mark.parametrize("seconds", [1.0, 6.4])
def test_the_data_set_has_six_classes_and_older_sets_keep_their_settings(tmp_path, seconds):
    small = ["--size", "16", "--videos-per-class", "2"]
    shapes.main(["--out", str(tmp_path / "b"), "--bounce", *small, "--seconds", str(seconds)])
    about = json.loads((tmp_path / "b/shapes.json").read_text())
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if path.is_dir()) == sorted(
        [*shapes.BOUNCING, "ucfTrainTestlist"]
    )
    assert about["settings"]["bounce"] is True
    assert {len(video["path"]) for video in about["videos"].values()} == {round(25 * seconds)}
    shapes.main(["--out", str(tmp_path / "m"), *small])
    assert "bounce" not in json.loads((tmp_path / "m/shapes.json").read_text())["settings"]


def follow(clip, video, truth_file):
    return bounce.follow(clip, bounce.read_bounce(truth_file, video["class"], len(clip[0]), 1 / 25))


def test_true_clips_have_one_object_the_true_speed_and_turns_at_the_borders(videos, truth_file):
    for video in videos.values():
        lost, speeds, turns = follow(shapes.draw_clip(video, 32, 160), video, truth_file)
        assert lost is None and turns and len(speeds) == 10
        assert speeds == pytest.approx([1.0] * 10, abs=0.06)


def spoiled(video, kind):
    clip = shapes.draw_clip(video, 32, 160)
    half = video | {"path": video["path"][:80] + [video["path"][80] + 0 * p for p in video["path"][80:]]}
    low, high = video["low"], video["high"]
    early = low + 0.25 * (high - low) + np.abs(np.array(video["path"]) - low) / 2  # turns before the border
    through = np.linspace(video["path"][0], video["path"][0] + 40, 160)  # leaves the frame
    other_shape = "Triangle" if video["shape"] == "Circle" else "Circle"

    def changed(frame, **changes):
        return np.concatenate([clip[:frame], shapes.draw_clip(video | changes, 32, 160)[frame:]])

    return {
        "another color": lambda: changed(64, rgb=shapes.COLORS["white"]),
        "another shape": lambda: changed(96, shape=other_shape),
        "two objects": lambda: np.maximum(clip, clip[::-1, ::-1, ::-1]),
        "nothing": lambda: np.concatenate([clip[:32], np.zeros_like(clip[32:])]),
        "stands still": lambda: shapes.draw_clip(half, 32, 160),
        "turns early": lambda: shapes.draw_clip(video | {"path": early.tolist()}, 32, 160),
        "leaves": lambda: shapes.draw_clip(video | {"path": through.tolist()}, 32, 160),
    }[kind]()


def test_turning_points_are_the_extremes_of_a_path_without_its_jitter():
    path = np.array([3, 2.6, 3.1, 5, 8, 7.6, 8.2, 8.1, 6, 2, 2.5, 1.8, 2, 4.0])
    assert bounce.turning_points(path, 1.0) == [(8.2, 1), (1.8, -1)]
    assert bounce.turning_points(-path, 1.0) == [(-8.2, -1), (-1.8, 1)]
    assert bounce.turning_points(np.arange(9.0), 1.0) == bounce.turning_points(np.zeros(5), 1.0) == []


@pytest.mark.parametrize("size", [0.0, 0.2])
def test_a_little_jitter_is_no_turn(videos, truth_file, size):
    noise = np.random.default_rng(0).normal(0, size, 160)
    for video in list(videos.values())[::3]:
        path = np.clip(video["path"] + noise, video["low"], video["high"])
        lost, _, turns = follow(shapes.draw_clip(video | {"path": path.tolist()}, 32, 160), video, truth_file)
        assert lost is None and turns


@pytest.mark.parametrize(
    ("kind", "window"),
    [("another color", 4), ("another shape", 6), ("two objects", 0), ("nothing", 2), ("stands still", None),
     ("turns early", None), ("leaves", 0)],
)  # fmt: skip
def test_spoiled_clips_are_told(videos, truth_file, kind, window):
    for video in list(videos.values())[::4]:
        lost, speeds, turns = follow(spoiled(video, kind), video, truth_file)
        assert not turns or (kind == "stands still" and speeds[-1] < 0.05)
        if window is None:
            assert lost is None
        elif window:
            assert lost["window"] == window
        else:
            assert lost is not None


def test_evaluate_scores_bouncing_clips_by_windows(tmp_path):
    shapes.main(["--out", str(tmp_path / "b"), "--bounce", "--size", "16", "--videos-per-class", "2", "--seconds", "2"])
    videos = json.loads((tmp_path / "b/shapes.json").read_text())["videos"]
    classes = sorted({video["class"] for video in videos.values()})
    clips = np.stack([shapes.draw_clip(video, 16, 48) for video in videos.values()])
    labels = [classes.index(video["class"]) for video in videos.values()]
    clips[0] = 0
    folder = write_samples(tmp_path / "s", clips, labels, classes)
    flags = ["--samples", folder, "--data-path", tmp_path / "b", "--num-real", 6, "--num-workers", 0]
    run_main(evaluate, "--metric", "motion", *flags, "--out", tmp_path / "m.json")
    made = json.loads((tmp_path / "m.json").read_text())
    assert made["values"]["one_object"] == pytest.approx(11 / 12)
    assert made["values"]["turns_right"] == pytest.approx(11 / 12)
    assert made["result"]["generated"]["reasons"] == {"nothing stands out": 1}
    assert made["result"]["real"]["one_object"] == 1 and made["result"]["real"]["turns_right"] == 1
    assert made["values"]["speed_median"] == pytest.approx(1, abs=0.03)
    short = write_samples(tmp_path / "short", clips[:, :12], labels, classes)
    flags[1] = short
    run_main(evaluate, "--metric", "motion", *flags, "--out", tmp_path / "n.json", status=2)
